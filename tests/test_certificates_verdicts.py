"""What can be said and what cannot: verdicts, heads, models and inputs that are refused, and published networks."""

from __future__ import annotations

import copy
import dataclasses
import json
import math
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

import equipoise as eq
from equipoise.errors import InputError, OptionError, StructureError

F64 = torch.float64


def dense(*rows: list[float], **options: Any) -> eq.MonDEQ:
    W = torch.tensor(rows, dtype=F64)
    return eq.MonDEQ.from_weights(W, torch.eye(len(W), dtype=F64), torch.zeros(len(W), dtype=F64), False, **options)


# Verdicts


@pytest.mark.parametrize(
    ("rows", "inputs", "verdict"),
    [
        ([[-8.0, 0.0], [0.0, 0.5]], [[1.0, 1.0]], "certified"),
        ([[-8.0, 0.0], [0.0, 0.5]], None, "certified"),
        ([[0.0, 4.0], [0.0, 0.0]], None, "certified"),  # triangular: not in the 2-norm, but in a maximum norm
        ([[0.0, 4.0], [-0.3, 0.0]], [[1.0, 1.0], [-1.0, 2.0]], "converged"),  # no norm says so, and yet
        ([[0.0, 4.0], [-0.3, 0.0]], None, "unknown"),
        ([[2.0]], [[1.0], [-1.0]], "diverged"),  # z = relu(2z + 1) has no solution
        ([[2.0]], [[-1.0]], "converged"),  # but z = relu(2z − 1) has z = 0
        ([[1.5]], [[1.0]], "diverged"),
        ([[1.0]], [[-1.0]], "converged"),  # a margin of exactly 0 is not a positive one
        ([[2.0]], [], "unknown"),
    ],
)
@pytest.mark.parametrize("solver", [eq.PeacemanRachford(), eq.ForwardBackward(), eq.Anderson(), eq.Tseng(alpha=9.0)])
def test_verdicts(rows: list[list[float]], inputs: list[list[float]] | None, verdict: str, solver: eq.Solver) -> None:
    model = dense(*rows, solver=solver)
    x = None if inputs is None else torch.tensor(inputs, dtype=F64).reshape(-1, len(rows))
    c = eq.certify(model, inputs=x)
    assert (c.verdict, c.certified) == (verdict, verdict == "certified")
    assert (c.condition is None) == (c.weight_condition is None) == (not c.certified)
    assert model.solver == solver  # looking changed nothing
    assert not model.strict
    if verdict != "certified":
        assert c.margin <= 0
        again = eq.certify(model, model, x)
        assert (again.displacement, again.agreement, again.unproved) == (None, None, None)
        assert again.relative_bound is None
        assert again.sufficient is False
    for head in (nn.Linear(len(rows), 2), nn.Softplus(threshold=1.0)):
        assert eq.certify(nn.Sequential(nn.Flatten(), model, head.double()), inputs=x).verdict == verdict


def test_one_bad_layer_and_one_bad_sample_tell_on_the_model() -> None:
    good, bad = dense([0.5]), dense([2.0])
    assert eq.certify(nn.Sequential(good, bad), inputs=torch.tensor([[-1.0]])).verdict == "converged"
    c = eq.certify(nn.Sequential(bad, good), inputs=torch.tensor([[-1.0], [-2.0], [1.0]]))
    assert (c.verdict, [part.verdict for part in c.layers]) == ("diverged", ["diverged", "certified"])


def test_a_reference_without_a_margin_bounds_nothing() -> None:
    c = eq.certify(dense([0.5]), dense([2.0]), torch.ones(1, 1))
    assert (c.verdict, c.displacement, c.agreement, c.relative_bound) == ("certified", None, None, None)
    assert c.delta_norm == pytest.approx(1.5)
    assert (c.sufficient, c.predeployment) == (False, None)


# Heads


def classifier(*after: nn.Module) -> nn.Sequential:
    torch.manual_seed(5)
    return nn.Sequential(eq.MonDEQ(4, 6, margin=0.5), *after).double()


def test_agreement_needs_one_linear_head() -> None:
    x, scheme = torch.randn(30, 4, dtype=F64), eq.Structured(6)
    heads: list[tuple[nn.Module, ...]] = [(), (nn.Linear(6, 5), nn.Linear(5, 3)), (nn.ReLU(), nn.Linear(6, 3))]
    for after in (*heads, (nn.Linear(6, 3), nn.Tanh())):
        model = classifier(*after)
        c = eq.certify(eq.quantize(model, scheme), model, x)
        assert (c.agreement, c.unproved) == (None, None)
        assert c.displacement is not None
    for after in ((nn.Linear(6, 3),), (nn.Dropout(), nn.Flatten(), nn.Identity(), nn.Linear(6, 3, bias=False))):
        model = classifier(*after)
        c = eq.certify(eq.quantize(model, scheme), model, x)
        assert c.agreement is not None
        assert len(c.unproved) == 30 - round(30 * c.agreement)


def test_agreement_of_one_class_and_of_ties() -> None:
    x = torch.randn(20, 4, dtype=F64)
    one = classifier(nn.Linear(6, 1))
    assert eq.certify(eq.quantize(one, eq.Structured(1)), one, x).agreement == 1.0
    tied = classifier(nn.Linear(6, 3))
    assert eq.certify(tied, tied, x).agreement == 1.0
    with torch.no_grad():
        tied[1].weight.zero_()
        tied[1].bias.copy_(torch.tensor([1.0, 1.0, 0.0]))
    c = eq.certify(tied, tied, x)
    assert (c.agreement, c.unproved.tolist()) == (0.0, list(range(20)))
    nn.init.zeros_(tied[1].bias)
    assert eq.certify(tied, tied, x).agreement == 0.0


def test_a_quantized_head_must_give_the_class_itself() -> None:
    """The float head says 0 by a hair; at one bit both of its rows become alike, or the order turns."""
    model = classifier(nn.Linear(6, 2))
    with torch.no_grad():
        model[1].weight.copy_(torch.tensor([[0.4], [0.1]]).expand(2, 6))
        model[1].bias.zero_()
    x = torch.randn(40, 4, dtype=F64)
    assert eq.certify(model, model, x).agreement > 0.9
    halved = eq.quantize(model, eq.Structured(16, scale="max", head_bits=1))  # one scale: both rows are 0.25
    c, scores = eq.certify(halved, model, x), halved(x)
    assert torch.equal(scores[:, 0], scores[:, 1])
    assert c.agreement == 0.0
    assert eq.certify(eq.quantize(model, eq.Structured(16, scale="max", head_bits=8)), model, x).agreement > 0.9


def test_many_classes_take_little_memory() -> None:
    model = classifier(nn.Linear(6, 3000))
    c = eq.certify(model, model, torch.randn(3, 4))  # 3000² pairs of 6 would be half a gigabyte
    assert c.agreement == 1.0


# Modes and side effects


def test_dropout_and_writing_activations_leave_no_trace() -> None:
    torch.manual_seed(1)
    model = nn.Sequential(nn.ReLU(inplace=True), nn.Dropout(0.5), eq.MonDEQ(4, 5), nn.Dropout(0.5), nn.Linear(5, 3))
    model = model.double()
    quantized, x = eq.quantize(model, eq.Structured(4)), torch.randn(25, 4, dtype=F64)
    before, state = x.clone(), copy.deepcopy(model.state_dict())
    first = eq.certify(quantized, model, x)
    assert torch.equal(x, before)
    assert model.training
    assert quantized.training
    assert all(torch.equal(state[key], value) for key, value in model.state_dict().items())
    second = eq.certify(quantized.eval(), model.eval(), x)
    assert torch.equal(first.displacement, second.displacement)
    assert first.unproved.tolist() == second.unproved.tolist()
    with torch.no_grad():
        moved = (quantized[2].double()(x.relu()) - model[2](x.relu())).norm(dim=1)
    assert bool((moved <= first.displacement + 1e-9).all())
    bad = nn.Sequential(nn.ReLU(inplace=True), nn.Dropout(0.9), dense([2.0]))
    y = torch.tensor([[-1.0]])
    assert eq.certify(bad, inputs=y).verdict == "converged"
    assert y.item() == -1


def test_the_arithmetic_of_the_process_does_not_matter() -> None:
    model = classifier(nn.Linear(6, 3)).float()
    quantized, x = eq.quantize(model, eq.Structured(4)), torch.randn(8, 4)
    c = eq.certify(quantized, model, x)
    with torch.inference_mode():
        inside = eq.certify(quantized, model, x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cast = eq.certify(quantized, model, x)
    torch.set_default_dtype(torch.float64)
    try:
        wide = eq.certify(quantized, model, x)
    finally:
        torch.set_default_dtype(torch.float32)
    for other in (inside, cast, wide):
        assert (other.margin, other.lipschitz, other.rate) == (c.margin, c.lipschitz, c.rate)
        assert torch.equal(other.displacement, c.displacement)


# What is refused


def refusals() -> list[tuple[str, nn.Module, nn.Module | None, Any, type[Exception], str]]:
    layer, head = eq.MonDEQ(4, 6), nn.Linear(6, 3)
    model, x = nn.Sequential(layer, head), torch.randn(3, 4)
    bad = nn.Sequential(nn.Linear(3, 1).double(), dense([2.0]))

    def with_(module: nn.Module) -> nn.Sequential:
        return nn.Sequential(module, layer)

    return [
        ("features", layer, eq.MonDEQ(4, 5), None, StructureError, "4 -> 6.*4 -> 5"),
        ("inputs", layer, eq.MonDEQ(3, 6), None, StructureError, "4 -> 6.*3 -> 6"),
        ("activation", layer, eq.MonDEQ(4, 6, activation="tanh"), None, StructureError, "ReLU.*Tanh"),
        ("slope", *(eq.MonDEQ(4, 6, activation=eq.ELU(s)) for s in (1.0, 0.5)), None, StructureError, "1.0.*0.5"),
        ("length", model, layer, None, StructureError, "'0', '1'"),
        ("head", model, nn.Sequential(layer, nn.Linear(6, 4)), None, StructureError, "6 -> 3.*6 -> 4"),
        ("kind", with_(nn.ReLU()), with_(nn.Tanh()), None, StructureError, "ReLU.*Tanh"),
        ("ends", with_(nn.Hardtanh(-1, 1)), with_(nn.Hardtanh(-2, 2)), x, StructureError, "-1.*-2"),
        ("beta", with_(nn.Softplus()), with_(nn.Softplus(2.0)), x, StructureError, "beta=1.*beta=2"),
        ("flatten", with_(nn.Flatten()), with_(nn.Flatten(2)), x, StructureError, "start_dim=1.*start_dim=2"),
        ("unknown", with_(nn.GELU()), None, None, StructureError, "GELU at position '0'"),
        ("reference", layer, nn.Linear(4, 6), None, StructureError, "Linear|linear"),
        ("none", nn.Sequential(nn.Linear(3, 3)), None, None, StructureError, "no equilibrium layer"),
        ("half", copy.deepcopy(layer).bfloat16(), None, None, InputError, "bfloat16"),
        ("width", layer, None, torch.randn(3, 5), InputError, r"\(batch, 4\).*\(3, 5\)"),
        ("width with a reference", model, model, torch.randn(3, 5), InputError, r"\(batch, 4\).*\(3, 5\)"),
        ("width of no samples", layer, layer, torch.randn(0, 5), InputError, r"\(0, 5\)"),
        ("width where nothing is proved", bad, None, torch.randn(3, 5), InputError, r"'0'.*\(3, 5\)"),
        ("one dimension", layer, None, torch.randn(4), InputError, r"\(4,\)"),
        ("three dimensions", layer, None, torch.randn(2, 2, 4), InputError, r"\(2, 2, 4\)"),
        ("images", model, model, torch.randn(2, 1, 2, 2), InputError, r"\(2, 1, 2, 2\)"),
        ("mixed samples", with_(nn.Flatten(0)), with_(nn.Flatten(0)), x, InputError, "apart"),
        ("nan", layer, layer, x * math.nan, InputError, "12 NaN"),
        ("inf", bad, None, torch.tensor([[math.inf, 1.0, 0.0]]), InputError, "1 NaN or infinite"),
        ("integers", layer, None, torch.ones(3, 4, dtype=torch.int64), InputError, "int64"),
        ("a list", layer, None, [[1.0] * 4], InputError, "list"),
    ]


@pytest.mark.parametrize("case", refusals(), ids=lambda case: case[0])
def test_refused(case: tuple[str, nn.Module, nn.Module | None, Any, type[Exception], str]) -> None:
    _, model, reference, inputs, error, words = case
    with pytest.raises(error, match=words):
        eq.certify(model, reference, inputs)


@pytest.mark.parametrize("tol", [0.0, 1.0, -1.0, math.nan])
def test_tolerances_out_of_range(tol: float) -> None:
    with pytest.raises(OptionError, match="tol"):
        eq.certify(eq.MonDEQ(2, 2), tol=tol)


def test_empty_inputs() -> None:
    model = classifier(nn.Linear(6, 3))
    c = eq.certify(eq.quantize(model, eq.Structured(4)), model, torch.empty(0, 4))
    assert [tuple(t.shape) for t in (c.displacement, c.actual_displacement, c.actual_error, c.unproved)] == [(0,)] * 4
    assert c.agreement is None
    assert "proved bound" not in str(c)
    assert c.to_dict()["displacement"] == []
    alone = eq.certify(model[0], model[0], torch.empty(0, 4))
    assert (alone.verdict, alone.unproved) == ("certified", None)


# As an object


def test_certificates_are_frozen_plain_values() -> None:
    model = nn.Sequential(eq.MonDEQ(3, 4), nn.Linear(4, 2))
    quantized, x = eq.quantize(model, eq.Structured(3)), torch.randn(6, 3)
    bad = dense([5.0, 5.0], [5.0, 5.0])
    for c in (eq.certify(model), eq.certify(quantized, model), eq.certify(quantized, model, x), eq.certify(bad)):
        with pytest.raises(dataclasses.FrozenInstanceError):
            c.margin = 2.0
        plain = json.loads(c.to_json(), parse_constant=lambda word: pytest.fail(f"{word} in the JSON"))
        assert plain == c.to_dict()
        assert set(plain) == {field.name for field in dataclasses.fields(c)}
        lines = str(c).splitlines()
        assert len(lines) == len(c.summary()) > 2
        assert len({len(line) - len(line.split("  ")[-1].lstrip()) for line in lines}) == 1  # aligned
        assert c.verdict in lines[0]
    overflow = dataclasses.replace(c, displacement=torch.tensor([math.inf, 1.0]), rate=math.nan)
    assert json.loads(overflow.to_json())["displacement"] == [None, 1.0]
    assert "inf" not in str(overflow)


def test_printed_bounds_are_rounded_to_the_safe_side() -> None:
    c = eq.certify(dense([1 / 3, 0.0], [0.0, -1 / 3]))
    shown = dict(dataclasses.replace(c, agreement=0.99996, displacement=torch.tensor([1 / 3])).summary())
    assert shown["margin, at least"] == "0.666666"
    assert shown["Lipschitz constant, at most"] == "1.33334"
    assert shown["displacement, largest proved bound"] == "0.3334"
    assert shown["class proved unchanged"] == "99.99 % of inputs"
    huge = dict(dataclasses.replace(c, margin=1e-30, lipschitz=1e200).summary())
    assert Fraction(huge["margin, at least"].replace("−", "-")) <= Fraction(1e-30)
    assert Fraction(huge["Lipschitz constant, at most"]) >= Fraction(1e200)


# How far an input moves an output


def test_input_lipschitz() -> None:
    layer = eq.MonDEQ.from_weights(torch.diag(torch.tensor([0.5, -1.0])), torch.tensor([[3.0], [0.0]]), torch.zeros(2))
    assert eq.input_lipschitz(layer) == pytest.approx(6.0, rel=1e-12)  # z = relu(z/2 + 3x): reached
    z = layer(torch.tensor([[1.0], [2.0]])).detach()
    assert float((z[1] - z[0]).norm()) == pytest.approx(6.0, rel=1e-4)
    model = nn.Sequential(nn.Linear(4, 1), nn.Tanh(), layer, nn.Dropout(), nn.Linear(2, 3))
    product = 6.0
    for i in (0, 4):
        product *= float(torch.linalg.matrix_norm(model[i].weight.detach().double(), 2))
    assert product * (1 - 1e-14) <= eq.input_lipschitz(model) <= product * (1 + 1e-11)
    coded = eq.quantize(nn.Sequential(layer), eq.Structured(4, input_bits=1, head_bits=None))
    W = coded[0].input_weight.double()
    assert eq.input_lipschitz(coded) >= float(torch.linalg.matrix_norm(W, 2)) / 0.5 * (1 - 1e-14)
    assert eq.input_lipschitz(dense([1.5])) is None
    for jump in (nn.Softplus(beta=3.0), nn.Softplus(threshold=2.0)):  # torch's function falls at its threshold
        at = torch.tensor(jump.threshold / jump.beta, dtype=torch.float64)
        assert float(jump(at) - jump(torch.nextafter(at, at + 1))) > 0
        jumping = nn.Sequential(jump, layer, nn.Linear(2, 2))
        assert eq.input_lipschitz(jumping) is eq.input_lipschitz(jumping, "linf") is None
        for norm in ("l2", "linf"):
            assert eq.certified_radius(jumping, torch.ones(3, 1), norm).tolist() == [0.0] * 3


# The published checkpoint


@pytest.fixture(scope="module")
def published(shared_reference: Path) -> nn.Sequential:
    stored = load_file(shared_reference)
    margin = float(nn.functional.softplus(stored["m_raw"].double())) + 1e-4
    head = nn.Linear(100, 10)
    head.load_state_dict({"weight": stored["classifier.weight"], "bias": stored["classifier.bias"]})
    return nn.Sequential(eq.MonDEQ.from_factors(stored["A"], stored["S"], margin, stored["U"], stored["b"]), head)


@pytest.fixture(scope="module")
def images(mnist_dir: Path) -> Tensor:
    """The first 64 test images as the checkpoint takes them."""
    from equipoise._images import read_images
    from equipoise.data import _SOURCES

    pixels, _ = read_images(_SOURCES["mnist"], "test", mnist_dir)
    return (torch.from_numpy(pixels[:64]).reshape(64, -1) / 255 - 0.1307) / 0.3081


@pytest.mark.parametrize(
    ("bits", "margin", "delta", "verdict"),
    [(3, None, None, "diverged"), (4, -0.14234, 0.60384, "converged"), (5, 0.0454, None, "certified"),
     (6, 0.1376, 0.13745, "certified"), (8, 0.2074, 0.03467, "certified")],
)  # fmt: skip
def test_published_network(
    published: nn.Sequential, images: Tensor, bits: int, margin: float | None, delta: float | None, verdict: str
) -> None:
    c = eq.certify(eq.quantize(published, eq.Assembled(bits)), published, images)
    assert c.verdict == verdict
    if margin is not None:
        assert c.margin == pytest.approx(margin, abs=6e-5)
    if delta is not None:
        assert c.delta_norm == pytest.approx(delta, abs=6e-6)
    assert c.sufficient is (bits >= 6)
    assert c.predeployment is False
    if bits == 8:
        assert bool((c.actual_displacement <= c.displacement).all())
        assert float(c.displacement.mean()) < 6 * float(c.actual_displacement.mean())
        assert c.agreement > 0.8


@pytest.mark.parametrize("bits", [1, 2, 3, 4])
def test_published_network_with_its_structure(published: nn.Sequential, images: Tensor, bits: int) -> None:
    c = eq.certify(eq.quantize(published, eq.Structured(bits)), published, images)
    assert c.verdict == "certified"
    assert c.margin == pytest.approx(0.2269, abs=6e-5)
    assert bool((c.actual_displacement <= c.displacement).all())
