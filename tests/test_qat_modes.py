"""Models prepared for quantization: their parts and modes, copies and casts, odd shapes, and what is refused."""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import equipoise as eq
from catalogue import SCHEME_KINDS
from equipoise.data import load_data
from equipoise.errors import ConvergenceWarning, InputError, NotWellPosedError, OptionError, StructureError
from equipoise.layers import PreparedLinear
from equipoise.operators import PreparedWeight
from equipoise.parametrizations import Monotone
from equipoise.plan import build_ladder
from problems import matrix, true_margin
from trainings import one_step

F64 = torch.float64
D, N, RANK, CLASSES = 4, 7, 3, 5


def classifier(dtype: torch.dtype = torch.float32, **options: Any) -> nn.Sequential:
    options = {"rank": RANK, "margin": 0.3} | options
    return nn.Sequential(eq.MonDEQ(D, N, **options), nn.Linear(N, CLASSES)).to(dtype)


def scales(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items() if "rounding" in name}


def unchanged(model: nn.Module, before: dict[str, Tensor]) -> bool:
    return all(torch.equal(value, before[name]) for name, value in scales(model).items())


# Parts


def test_parts_without_bits_stay_the_parameters_they_were() -> None:
    plain = classifier()
    model = eq.prepare_qat(plain, eq.Structured(2))
    assert type(model[0].injection) is type(model[1]) is nn.Linear
    assert [name for name, _ in model.named_parameters()] == [
        name.replace("recurrent.", "recurrent.weights.") for name, _ in plain.named_parameters()
    ]
    before = copy.deepcopy(model)
    one_step(model)
    converted = eq.convert(model)
    for one, other, stored in zip(
        (*model[0].injection.parameters(), *model[1].parameters()),
        (*before[0].injection.parameters(), *before[1].parameters()),
        (*converted[0].injection.parameters(), *converted[1].parameters()),
        strict=True,
    ):
        assert not torch.equal(one, other), "trained"
        assert torch.equal(one, stored)


@pytest.mark.parametrize(("option", "rounded"), [("input_bits", "weight"), ("bias_bits", "bias")])
def test_one_part_rounded_leaves_the_other_float(option: str, rounded: str) -> None:
    model = eq.prepare_qat(classifier(), eq.Structured(2, **{option: 1}))
    injection = model[0].injection
    assert isinstance(injection, PreparedLinear)
    before = {name: p.detach().clone() for name, p in injection.named_parameters()}
    one_step(model)
    for name, p in injection.named_parameters():
        assert not torch.equal(p, before[name])
        value = (model[0].input_weight if name == "weight" else model[0].bias).detach()
        assert torch.equal(value, p) == (name != rounded)
        assert (len(value.abs().unique()) == 1) == (name == rounded)


def test_the_original_is_left_alone() -> None:
    plain = classifier().eval()
    state = copy.deepcopy(plain.state_dict())
    model = eq.prepare_qat(plain, eq.Structured(2, input_bits=2, bias_bits=2, head_bits=2))
    assert not any(module.training for module in model.modules())
    one_step(model.train())
    assert all(torch.equal(state[name], value) for name, value in plain.state_dict().items())
    assert not any(isinstance(m, (PreparedWeight, PreparedLinear)) for m in plain.modules())


def test_frozen_weights_stay() -> None:
    plain = classifier()
    plain[0].recurrent.requires_grad_(False)
    model = eq.prepare_qat(plain, eq.Structured(2, input_bits=2))
    before = model[0].weight.detach().clone()
    one_step(model)
    assert torch.equal(model[0].weight, before)
    assert not torch.equal(model[0].input_weight, eq.convert(eq.prepare_qat(plain, eq.Structured(2)))[0].input_weight)


# Modes


FULL = {"input_bits": 3, "bias_bits": 3, "head_bits": 3}


@pytest.mark.parametrize("kind", SCHEME_KINDS)
def test_only_training_with_gradients_fits(kind: Any) -> None:
    model = eq.prepare_qat(classifier(), kind(4, **FULL))
    one_step(model)
    before, x = scales(model), torch.randn(3, D)
    with torch.no_grad():
        model(x)
        model[0].recurrent()
    with torch.inference_mode():
        model(x)
        model[0].solve(x)
    model.eval()
    model(x).sum().backward()
    assert model[0].weight.requires_grad
    assert unchanged(model, before)
    model.train()
    model(x)
    assert not unchanged(model, before), "and what happened in between did not use up the fit"
    before = scales(model)
    model(x)
    assert model[0].bias.requires_grad
    assert unchanged(model, before), "once per step"


@pytest.mark.parametrize("kind", SCHEME_KINDS)
@pytest.mark.parametrize("learn", [False, True])
def test_evaluation_with_gradients_leaves_no_trace(kind: Any, learn: bool) -> None:
    """Constants of the weights at the old scales must not serve those at the new ones."""
    model = eq.prepare_qat(classifier(tol=1e-7), kind(4, **FULL), learn)
    one_step(model, 0.3)
    twin, x = copy.deepcopy(model), torch.randn(6, D)
    model.eval()
    model(x)
    model[0].operator.margin()
    model.train(), twin.train()
    z = model[0](x)
    assert torch.allclose(z, twin[0](x), rtol=1e-4, atol=1e-5)
    W, q = model[0].weight, x @ model[0].input_weight.mT + model[0].bias
    assert torch.allclose(z, torch.relu(z @ W.mT + q), rtol=1e-4, atol=1e-5)
    assert model[0].operator.margin() == twin[0].operator.margin()


@pytest.mark.parametrize("write", [lambda w: w.data.mul_(1.7), lambda w: w.mul_(1.7)])
@pytest.mark.parametrize("kind", SCHEME_KINDS)
def test_whatever_changes_in_evaluation_is_what_is_certified(kind: Any, write: Callable[[Tensor], None]) -> None:
    model = eq.prepare_qat(classifier(), kind(4, **FULL)).eval()
    x = torch.randn(3, D)
    targets = [p for _, p in model.named_parameters()] + [b for name, b in model.named_buffers() if "scale" in name]
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        for target in targets:
            before = model(x)
            write(target)
            assert kind is eq.Compensated or not torch.equal(model(x), before)
            converted = eq.convert(model).eval()
            assert torch.equal(model(x), converted(x))
            assert model[0].operator.margin() == eq.margin(converted)


def test_a_scale_that_is_none_is_refused() -> None:
    model = eq.prepare_qat(classifier(), eq.Structured(2))
    model[0].recurrent.rounding_A.scale.fill_(math.nan)
    with pytest.raises(InputError, match="finite"):
        eq.convert(model)


@pytest.mark.parametrize("kind", SCHEME_KINDS)
@pytest.mark.parametrize("learn", [False, True])
def test_casts_change_the_numbers_but_not_the_codes(kind: Any, learn: bool) -> None:
    model = eq.prepare_qat(classifier(), kind(4, **FULL), learn)
    one_step(model)
    for cast in (nn.Module.double, nn.Module.float):
        codes = eq.convert(model).state_dict()
        converted = eq.convert(cast(model))
        state = converted.state_dict()
        if kind is eq.Structured:  # the others round what is computed in the dtype of the weights
            assert all(torch.equal(codes[key], state[key]) for key in codes if key.endswith("codes"))
        assert all(value.dtype == torch.float32 for key, value in state.items() if key.endswith("scale"))
        if kind is eq.Cayley:
            assert torch.equal(state["0.recurrent.alpha"], codes["0.recurrent.alpha"])
            assert model[0].recurrent._alpha == float(model[0].recurrent.alpha)
        one_step(model)
        model(torch.randn(2, D, dtype=next(model.parameters()).dtype))
        assert torch.equal(eq.convert(model)[0].weight, model[0].weight)


def test_autocast_changes_nothing() -> None:
    model = eq.prepare_qat(classifier(), eq.Structured(2, input_bits=2))
    x = torch.randn(5, D)
    plain = model[0](x)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.allclose(model[0](x), plain, rtol=1e-4, atol=1e-5)
        assert model[0].weight.dtype == torch.float32
        assert torch.equal(model[0].weight, eq.convert(model)[0].weight)


# Shapes


def check(model: nn.Module, scheme: eq.Scheme, learn: bool = False) -> nn.Module:
    """Two steps of training, then the conversion, bit for bit."""
    prepared = eq.prepare_qat(model, scheme, learn)
    layers = [m for m in prepared.modules() if isinstance(m, eq.MonDEQ)]
    x = torch.randn(3, layers[0].in_features, dtype=next(model.parameters()).dtype)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        one_step(prepared, 0.05, 0)
        one_step(prepared, 0.05, 1)
        prepared(x)
        used = [(m.weight.detach(), m.input_weight.detach(), m.bias.detach()) for m in layers]
        converted = eq.convert(prepared).eval()
        with torch.no_grad():
            assert torch.equal(prepared.eval()(x), converted(x))
    found = [(m.weight, m.input_weight, m.bias) for m in converted.modules() if isinstance(m, eq.MonDEQ)]
    for one, other in zip(used, found, strict=True):
        assert all(map(torch.equal, one, other))
    return converted


OWN = st.sampled_from([None, 1, 2, 7, 16, 32])


@settings(max_examples=60)
@given(
    sizes=st.tuples(st.integers(1, 5), st.integers(1, 9)),
    rank=st.sampled_from([0, 1, 2, None]),
    kind=st.sampled_from(SCHEME_KINDS),
    bits=st.sampled_from([1, 2, 3, 5, 8, 16, 32]),
    own=st.tuples(OWN, OWN, OWN),
    granularity=st.sampled_from(["tensor", "row"]),
    rule=st.sampled_from(["max", "mse"]),
    learn=st.booleans(),
    dtype=st.sampled_from([torch.float32, F64]),
    dense=st.booleans(),
)
def test_any_shape_and_any_bits(
    sizes: tuple[int, int],
    rank: int | None,
    kind: Any,
    bits: int,
    own: tuple[int | None, int | None, int | None],
    granularity: str,
    rule: str,
    learn: bool,
    dtype: torch.dtype,
    dense: bool,
) -> None:
    d, n = sizes
    layer = eq.MonDEQ(d, n, rank=min(n, rank) if rank is not None else None, margin=0.4)
    if dense:
        layer = eq.MonDEQ.from_weights(matrix(n, 0.4, d, rank, 0.3).float(), torch.randn(n, d), torch.randn(n))
    names = ("input_bits", "bias_bits", "head_bits")
    scheme = kind(bits, granularity=granularity, scale=rule, **dict(zip(names, own, strict=True)))
    try:
        converted = check(nn.Sequential(layer, nn.Linear(n, 3)).to(dtype), scheme, learn)
    except InputError:  # one bit may give a C̃ of eigenvalue −1
        assert kind is eq.Cayley
        return
    if kind is eq.Structured and not dense:
        assert true_margin(converted[0].weight) >= 0.4 - 1e-4 * (1 + float(converted[0].weight.norm()))


@pytest.mark.parametrize("kind", SCHEME_KINDS)
def test_zeros_train(kind: Any) -> None:
    for learn in (False, True):
        model = classifier()
        with torch.no_grad():
            for p in model.parameters():
                p.zero_()
        model[1].bias.data.fill_(1.0)
        check(model, kind(3, **FULL), learn)


@pytest.mark.parametrize("learn", [False, True])
def test_a_skew_part_that_begins_at_zero_wakes(learn: bool) -> None:
    W = torch.diag(torch.linspace(-1, 0.5, N))  # symmetric: K = 0
    layer = eq.MonDEQ.from_weights(W, torch.randn(N, D), torch.randn(N))
    model = eq.prepare_qat(layer, eq.Structured(3), learn)
    assert isinstance(model.recurrent.weights, Monotone)
    for seed in range(3):
        one_step(model, 0.1, seed)
    model.recurrent()
    assert eq.convert(model).recurrent.K.dequantize().norm() > 0.05


def test_one_layer_in_two_places_stays_one() -> None:
    layer = eq.MonDEQ(N, N)
    converted = check(nn.Sequential(layer, nn.ReLU(), layer, nn.Linear(N, 2)), eq.Structured(2, **FULL))
    assert converted[0] is converted[2]


def test_several_layers_and_nested_chains() -> None:
    model = nn.Sequential(nn.Flatten(), nn.Sequential(eq.MonDEQ(D, 5), nn.Tanh(), eq.MonDEQ(5, 3)), nn.Linear(3, 2))
    prepared = eq.prepare_qat(model, eq.Compensated(3, **FULL))
    prepared(torch.randn(4, D)).sum().backward()
    assert all(p.grad is not None for p in prepared.parameters())
    converted = eq.convert(prepared)
    assert [converted[1][i].scheme for i in (0, 2)] == [eq.Compensated(3, **FULL)] * 2
    assert eq.certify(converted).margin >= 0.05
    assert isinstance(check(eq.MonDEQ(D, 5), eq.Cayley(4)), eq.MonDEQ)


# What is refused


def test_models_in_the_wrong_state_are_refused(tmp_path: Path) -> None:
    plain = classifier()
    prepared, quantized = eq.prepare_qat(plain, eq.Structured(2)), eq.quantize(plain, eq.Structured(2))
    for model in (plain, quantized, eq.convert(prepared)):
        with pytest.raises(StructureError, match=r"not prepared.*prepare_qat"):
            eq.convert(model)
    head_only = nn.Sequential(plain[0], eq.quantize(plain, eq.Structured(2, head_bits=2))[1])
    for model in (quantized, eq.convert(prepared)):
        with pytest.raises(StructureError, match="quantized already"):
            eq.prepare_qat(model, eq.Structured(2))
    with pytest.raises(StructureError, match="quantized already"):
        eq.prepare_qat(head_only, eq.Structured(2, head_bits=2))
    digits = load_data("digits")
    only_head = eq.prepare_qat(plain, eq.Structured(2, head_bits=2))
    only_head[0] = plain[0]
    for model in (prepared, prepared[0], only_head):
        for use in (
            lambda m: eq.prepare_qat(m, eq.Structured(2)),
            lambda m: eq.quantize(m, eq.Structured(2)),
            lambda m: eq.save(m, tmp_path / "model.eqz"),
            eq.size, eq.certify, eq.margin, eq.lipschitz, eq.input_lipschitz,
            lambda m: eq.certify(quantized if len(list(m.children())) == 2 else quantized[0], m),
            lambda m: build_ladder(m, digits, ["structured"], [2]),
        ):  # fmt: skip
            with pytest.raises(StructureError, match=r"convert it first"):
                use(model)
    assert not list(tmp_path.iterdir())


def test_options_out_of_place_are_refused() -> None:
    with pytest.raises(StructureError, match="head_bits is 2"):
        eq.prepare_qat(eq.MonDEQ(D, N), eq.Structured(2, head_bits=2))
    with pytest.raises(OptionError, match="skew_bits"):
        eq.Structured(2, skew_bits=0)
    for scheme in (None, 4, eq.Structured):
        with pytest.raises(OptionError, match="scheme is"):
            eq.prepare_qat(classifier(), scheme)
    with pytest.raises(NotWellPosedError, match="margin"):
        eq.prepare_qat(
            eq.MonDEQ.from_weights(2 * torch.eye(3), torch.ones(3, 1), torch.ones(3), check=False), eq.Structured(2)
        )


@pytest.mark.parametrize("kind", SCHEME_KINDS)
@pytest.mark.parametrize(
    "name", ["0.recurrent.A", "0.recurrent.B", "0.injection.weight", "0.injection.bias", "1.weight"]
)
def test_weights_that_are_not_finite_are_refused(kind: Any, name: str) -> None:
    model = classifier()
    model.get_parameter(name).data[-1:].fill_(math.nan)
    with pytest.raises(InputError):
        eq.prepare_qat(model, kind(3, **FULL))


def test_modules_that_compute_something_else_are_refused() -> None:
    model = classifier()
    handle = model[0].register_forward_hook(lambda *_: None)
    with pytest.raises(StructureError, match="hooks"):
        eq.prepare_qat(model, eq.Structured(2))
    handle.remove()
    prepared = eq.prepare_qat(model, eq.Structured(2))
    prepared[0].recurrent.rounding_A.register_forward_hook(lambda *_: None)
    with pytest.raises(StructureError, match="hooks"):
        eq.convert(prepared)
    nn.utils.parametrizations.weight_norm(model[0].injection)
    with pytest.raises(StructureError, match="remove_parametrizations"):
        eq.prepare_qat(model, eq.Structured(2, input_bits=2))
    with pytest.raises(StructureError):
        eq.prepare_qat(nn.Linear(2, 2), eq.Structured(2))
