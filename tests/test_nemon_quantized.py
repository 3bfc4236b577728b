"""NEMON as codes: the measure is kept by algebra, and what is proved of the change holds on every input (theory §7)."""

from __future__ import annotations

import copy
import math
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import equipoise as eq
from equipoise.certificates.rows import Comparison
from equipoise.certificates.wellposed import fresh_operator, perturbation
from equipoise.errors import OptionError, StructureError
from equipoise.norms import WeightedMax, metzler, perron
from equipoise.operators import DenseOperator
from equipoise.operators.contractive import AssembledRows, StructuredRows, lowered
from test_nemon import exact_measures, layer


def network(
    n: int = 12, d: int = 5, seed: int = 0, gamma: float = 0.9, dtype: torch.dtype = torch.float32
) -> nn.Sequential:
    made = layer(n=n, d=d, seed=seed, gamma=gamma)
    return nn.Sequential(made, nn.Linear(n, 3).double()).to(dtype)


def stored_matrix(weights: StructuredRows) -> list[list[Fraction]]:
    """γ I + D⁻¹ T̃ D − diag(|T̃| 1) in rationals, from the stored numbers."""
    scale = [Fraction(s) for s in weights.T.scale.double().flatten().tolist()]
    T = [
        [Fraction(c) * scale[i if len(scale) > 1 else 0] for c in row]
        for i, row in enumerate(weights.T.codes.int().tolist())
    ]
    eta = [Fraction(e) for e in weights.eta.double().tolist()]
    gamma, n = Fraction(float(weights.gamma)), len(T)
    return [
        [
            T[i][j] * eta[i] / eta[j] + (gamma - sum(map(abs, T[i])) if i == j else 0)
            for j in range(n)
        ]
        for i in range(n)
    ]  # fmt: skip


@given(
    st.integers(1, 7), st.integers(0, 10_000), st.floats(-1.0, 0.99), st.sampled_from([1, 2, 3, 4, 8, 16]),
    st.sampled_from(["tensor", "row"]), st.sampled_from([torch.float32, torch.float64]),
)  # fmt: skip
def test_structured_codes_keep_gamma_whatever_the_bits(
    n: int, seed: int, gamma: float, bits: int, granularity: str, dtype: torch.dtype
) -> None:
    made = layer(n=n, d=2, seed=seed, gamma=gamma).to(dtype)
    kept = Fraction(float(made.recurrent.gamma))
    q = eq.quantize(made, eq.Structured(bits, granularity=granularity))  # type: ignore[arg-type]
    weights = q.recurrent
    assert isinstance(weights, StructuredRows)
    exact = stored_matrix(weights)
    eta = [Fraction(e) for e in weights.eta.double().tolist()]
    measures = [
        row[i] + sum((abs(w) * eta[j] / eta[i] for j, w in enumerate(row) if j != i), Fraction(0))
        for i, row in enumerate(exact)
    ]
    assert max(measures) <= kept
    # what is multiplied by keeps it too, in exact arithmetic
    assert max(exact_measures(q.weight, weights.eta)) <= kept
    assert Fraction(eq.margin(q)) <= 1 - max(*measures, *exact_measures(q.weight, weights.eta))
    assert eq.margin(q) >= float(1 - kept) - 1e-15
    # and lies as near the stored matrix as it says
    operator = q.operator
    gap = max(
        abs(Fraction(w) - v)
        for a, b in zip(q.weight.double().tolist(), exact, strict=True)
        for w, v in zip(a, b, strict=True)
    )
    assert gap <= Fraction(operator.representation_error)


def test_lowering_takes_as_little_as_it_needs() -> None:
    torch.manual_seed(0)
    family = WeightedMax(torch.rand(9).double() + 0.1)
    W = torch.randn(9, 9).double()
    ceiling = float(family.row_measures(W).median())
    done = lowered(W, family, ceiling)
    assert float(family.row_measures(done).max()) <= ceiling
    untouched = family.row_measures(W) <= ceiling
    assert torch.equal(done[untouched], W[untouched])
    torch.testing.assert_close(
        family.row_measures(done)[~untouched], torch.full((int((~untouched).sum()),), ceiling).double()
    )


@pytest.mark.parametrize("scheme", [eq.Compensated(3), eq.Cayley(8)], ids=lambda s: s.name)
def test_schemes_of_monotone_layers_are_refused(scheme: eq.Scheme) -> None:
    with pytest.raises(StructureError, match="Assembled, Structured"):
        eq.quantize(network(), scheme)
    with pytest.raises(StructureError, match="Assembled, Structured"):
        eq.prepare_qat(network(), scheme)


def test_skew_bits_are_refused() -> None:
    with pytest.raises(OptionError, match="skew_bits"):
        eq.quantize(network(), eq.Structured(3, skew_bits=2))


def test_assembled_takes_the_better_weights_and_never_claims_more_than_it_has() -> None:
    found = 0
    for seed in range(12):
        made = layer(n=6, seed=seed, gamma=0.5)
        q = eq.quantize(made, eq.Assembled(4))
        assert isinstance(q.recurrent, AssembledRows)
        own = float(torch.linalg.eigvals(metzler(q.weight)).real.max())
        assert eq.margin(q) <= 1 - own + 1e-9
        assert eq.margin(q) >= 1 - own - 1e-3 or eq.margin(q) >= WeightedMax(made.norm.eta).margin(q.weight) - 1e-5
        found += eq.margin(q) > 0
    assert found > 0


# What is proved of the change


@settings(max_examples=20)
@given(st.integers(0, 10_000), st.sampled_from([2, 4, 8]), st.sampled_from(["structured", "assembled"]))
def test_displacements_and_classes_hold_on_every_input(seed: int, bits: int, scheme: str) -> None:
    model = network(seed=seed)
    q = eq.quantize(model, eq.Structured(bits) if scheme == "structured" else eq.Assembled(bits))
    x = torch.randn(20, 5, generator=torch.Generator().manual_seed(seed))
    c = eq.certify(q, reference=model, inputs=x)
    assert c.family == "linf"
    if not c.certified:
        assert scheme == "assembled"
        return
    wide, small = copy.deepcopy(model).double(), copy.deepcopy(q).double()
    a, b = (m[0].solve(x.double(), tol=1e-9, stop="residual") for m in (wide, small))
    moved = torch.linalg.vector_norm(a.value - b.value, dim=1)
    assert c.displacement is not None
    assert bool((moved <= c.displacement + 1e-5).all())
    same = wide(x.double()).argmax(1) == small(x.double()).argmax(1)
    assert c.unproved is not None
    proved = torch.ones(len(x), dtype=torch.bool).index_fill_(0, c.unproved, False)
    assert bool(same[proved].all())


def test_many_bits_prove_almost_all_classes_and_few_bits_fewer() -> None:
    model = network(n=30, seed=3)
    x = torch.randn(200, 5)
    shares = [eq.certify(eq.quantize(model, eq.Structured(b)), reference=model, inputs=x).agreement for b in (4, 8, 16)]
    assert shares[0] <= shares[1] <= shares[2]
    assert shares[2] > 0.97


def test_two_networks_far_apart_agree_where_each_settles_its_class() -> None:
    x = torch.randn(40, 4, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    one = nn.Sequential(layer(seed=1), nn.Linear(6, 3).double())
    other = nn.Sequential(layer(seed=2), nn.Linear(6, 3).double())
    found, same = eq.certify(one, reference=other, inputs=x), one(x).argmax(1) == other(x).argmax(1)
    assert found.agreement == pytest.approx(float(same.double().mean()))
    assert found.unproved.tolist() == (~same).nonzero()[:, 0].tolist()
    assert 0 < found.agreement < 1


def test_the_comparison_matrix_beats_every_single_norm() -> None:
    made = layer(n=8, seed=2)
    comparison = Comparison.of(made.operator)
    assert comparison.proved
    r = torch.rand(50, 8, dtype=torch.float64)
    bound = comparison.bound(r)
    exact = torch.linalg.solve(torch.eye(8).double() - metzler(made.weight.detach()), r.mT).mT
    torch.testing.assert_close(bound, exact, rtol=1e-9, atol=1e-12)
    assert bool((bound >= exact * (1 - 1e-14)).all())
    one = (r / made.norm.eta / made.operator.row_margins()).amax(1)[:, None] * made.norm.eta
    assert bool((bound <= one * (1 + 1e-9)).all())
    none = Comparison(torch.tensor([[0.0, 2.0], [2.0, 0.0]]).double())
    assert not none.proved
    assert bool((none.bound(torch.ones(1, 2).double()) == math.inf).all())


@given(st.integers(1, 6), st.integers(0, 10_000), st.floats(0.0, 0.05))
def test_the_comparison_matrix_bounds_every_matrix_within_the_error(n: int, seed: int, error: float) -> None:
    made = layer(n=n, seed=seed, gamma=0.7)
    W = made.weight.detach()
    comparison = Comparison(W, error)
    generator = torch.Generator().manual_seed(seed)
    E = torch.randn(n, n, generator=generator).double()
    E = E * (error / max(float(torch.linalg.matrix_norm(E, 2)), 1e-300))
    q, dq = (torch.randn(16, n, generator=generator).double() for _ in range(2))
    if not comparison.proved:
        return
    other = eq.NEMON.from_weights(W + E, torch.eye(n).double(), torch.zeros(n).double(), check=False)
    a, b = (other.solve(t, tol=1e-9, stop="residual").value for t in (q, q + dq))
    assert bool(((a - b).abs() <= comparison.bound(dq.abs()) + 1e-6).all())


def test_certificates_name_their_family_and_measure() -> None:
    model = network()
    c = eq.certify(model)
    assert c.certified
    assert c.family == "linf"
    assert c.measure == pytest.approx(0.9, abs=1e-5)
    assert c.margin == pytest.approx(0.1, abs=1e-5)
    assert c.rate is not None
    assert c.rate < 1
    assert c.steps is not None
    assert "measure" in str(c)
    assert all(value is None for value in c.closed_rates.values())
    q = eq.quantize(model, eq.Structured(8))
    c = eq.certify(q, reference=model)
    operator, reference = q[0].operator, model[0].operator
    delta = operator.matrix64()[0] - reference.matrix64()[0]
    assert c.delta_norm is not None
    assert c.delta_norm >= reference.family.norm(delta) * (1 - 1e-12)
    euclidean = eq.certify(eq.MonDEQ(4, 5))
    assert euclidean.family == "l2"
    assert euclidean.measure == pytest.approx(1 - euclidean.margin)


@pytest.mark.parametrize(
    "solver",
    [eq.Picard(), eq.ForwardBackward(), eq.PeacemanRachford(), eq.DouglasRachford()],
    ids=lambda s: type(s).__name__,
)
def test_certified_rates_are_those_of_the_solver(solver: eq.Solver) -> None:
    made = layer(seed=4, solver=solver)
    c = eq.certify(made)
    assert c.rate == pytest.approx(solver.tune(made.operator).rate, abs=1e-9)
    beyond = layer(seed=4, solver=type(solver)(alpha=1.0))
    if isinstance(solver, (eq.Picard, eq.ForwardBackward)):
        assert eq.certify(beyond).rate is None


def test_rates_in_rows_in_closed_form() -> None:
    """W = (1 − m) I: every factor is what its formula gives of the one eigenvalue, within α* = 1/m and beyond."""
    m, near, beyond = 1.6, 0.5, 1.0
    factors: dict[Any, tuple[float, float | None]] = {
        eq.Picard: (1 - near, None),
        eq.ForwardBackward: (1 - near * m, None),
        eq.PeacemanRachford: (0.2 / 1.8, 0.6 / 2.6),
        eq.DouglasRachford: (1 / 1.8, 1.6 / 2.6),
    }
    for kind, known in factors.items():
        for alpha, factor in zip((near, beyond), known, strict=True):
            W = (1 - m) * torch.eye(3, dtype=torch.float64)
            made = eq.NEMON.from_weights(W, torch.eye(3).double(), torch.zeros(3).double(), solver=kind(alpha=alpha))
            assert eq.certify(made).rate == (None if factor is None else pytest.approx(factor, rel=1e-9))


def test_nothing_is_promised_before_rounding_in_weights_that_are_uneven() -> None:
    step = 10 / 32767
    W = torch.tensor([[0.9522, 10.0], [0.505 * step, 0.9522]], dtype=torch.float64)  # the small entry doubles
    made = eq.MonDEQ.from_weights(W, torch.eye(2).double(), torch.zeros(2).double(), check=False)
    q = eq.quantize(made, eq.Assembled(16, scale="max"))
    assert float(torch.linalg.eigvals(q.weight).real.max()) > 1
    in_rows = DenseOperator(W, family=WeightedMax(perron(W)[0]))
    assert 2 * step / 2 < in_rows.margin()
    found = perturbation(q, q.operator, in_rows)
    assert (found.predeployment, found.sufficient) == (None, False)
    even = eq.MonDEQ(3, 4, margin=0.5)
    fine = eq.quantize(even, eq.Assembled(12, scale="max"))
    assert perturbation(fine, fine.operator, even.operator).predeployment is True


def test_the_change_is_given_in_the_norm_of_the_certificate() -> None:
    W, changed = torch.zeros(2, 2).double(), torch.tensor([[0.0, 0.5], [0.0, 0.0]]).double()
    U, b, eta = torch.eye(2).double(), torch.zeros(2).double(), torch.tensor([1.0, 1e-3]).double()
    in_rows, euclidean = eq.NEMON.from_weights(W, U, b, eta=eta), eq.MonDEQ.from_weights(changed, U, b)
    found = perturbation(euclidean, euclidean.operator, in_rows.operator)
    assert found.delta_norm == pytest.approx(5e-4)
    assert found.own_norm == pytest.approx(0.5)
    other = perturbation(in_rows, in_rows.operator, euclidean.operator)
    assert other.delta_norm == pytest.approx(0.5)
    assert other.own_norm == pytest.approx(5e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_features_of_very_different_sizes_are_bounded_by_their_weights(dtype: torch.dtype) -> None:
    made = layer(n=5, seed=1)
    with torch.no_grad():
        made.recurrent.d.copy_(torch.tensor([-20.0, -9.0, 0.0, 8.0, 21.0]))
    q = eq.quantize(made.to(dtype), eq.Structured(2))
    operator = fresh_operator(q)
    assert not Comparison(*operator.matrix64()).proved  # one 2-norm error for all hides the small ones
    comparison = Comparison.of(operator)
    assert comparison.proved
    r = torch.rand(20, 5, dtype=torch.float64) * operator.family.eta
    bound = comparison.bound(r)
    assert bool((bound <= (r / operator.family.eta).amax() / operator.row_margins().min() * 1.01).all())
    matrix = torch.eye(5).double() - metzler(operator.matrix64()[0])
    eta = operator.family.eta
    exact = torch.linalg.solve(matrix * eta / eta[:, None], (r / eta).mT)
    assert bool((exact.mT * operator.family.eta <= bound * (1 + 1e-5)).all())
    x = torch.rand(3, 4).to(dtype)
    box = eq.interval(q, x - 0.1, x + 0.1)  # and no error on the way
    (W, _), eta = operator.matrix64(), operator.family.eta
    z, injected = torch.zeros(3, 5).double(), x.double() @ q.input_weight.double().mT + q.bias.double()
    for _ in range(3000):
        z = torch.lerp(z, (z @ W.mT + injected).relu(), operator.averaging_step())
    assert bool((((box.low - z) / eta).amax() < 1e-5) & (((z - box.high) / eta).amax() < 1e-5))


def test_a_chain_of_both_families_is_certified() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(eq.NEMON(4, 6, gamma=0.5), nn.ReLU(), eq.MonDEQ(6, 5, margin=0.5), nn.Linear(5, 3))
    q = eq.quantize(model, eq.Structured(6))
    x = torch.randn(10, 4)
    c = eq.certify(q, reference=model, inputs=x)
    assert [part.family for part in c.layers] == ["linf", "l2"]
    assert c.certified
    wide, small = copy.deepcopy(model).double(), copy.deepcopy(q).double()
    with torch.no_grad():
        moved = torch.linalg.vector_norm(wide[:3](x.double()) - small[:3](x.double()), dim=1)
    assert bool((moved <= c.displacement + 1e-6).all())


# Files, sizes, training through


@pytest.mark.parametrize(
    "scheme", [None, eq.Structured(2), eq.Structured(3, granularity="row"), eq.Assembled(6, input_bits=4)], ids=str
)
def test_files_give_back_the_same_network(scheme: eq.Scheme | None, tmp_path: Path) -> None:
    model = network()
    model = model if scheme is None else eq.quantize(model, scheme)
    path = tmp_path / "model.safetensors"
    eq.save(model, path, certificate=eq.certify(model))
    again = eq.load(path)
    x = torch.randn(4, 5)
    assert torch.equal(again(x), model(x))
    assert eq.margin(again) == eq.margin(model)
    assert again[0].scheme == model[0].scheme
    assert eq.size(again) == eq.size(model)


def test_files_keep_free_weights_and_learned_gammas(tmp_path: Path) -> None:
    free = eq.NEMON.from_weights(torch.randn(4, 4) * 0.1, torch.randn(4, 3), torch.zeros(4))
    learned = eq.NEMON(3, 4, learn_gamma=True, learn_weights=False)
    for i, made in enumerate((free, learned)):
        path = tmp_path / f"{i}.safetensors"
        eq.save(made, path)
        again = eq.load(path)
        x = torch.randn(2, 3)
        assert torch.equal(again(x), made(x))
        assert [n for n, _ in again.named_parameters()] == [n for n, _ in made.named_parameters()]


def test_a_file_whose_weights_were_made_negative_is_refused(tmp_path: Path) -> None:
    q = eq.quantize(network(), eq.Structured(2))
    q[0].recurrent.eta[0] = -1.0
    path = tmp_path / "m.safetensors"
    eq.save(q, path)
    with pytest.raises(eq.FileFormatError, match="eta"):
        eq.load(path)


@pytest.mark.parametrize(
    "scheme", [eq.Structured(2), eq.Structured(4, granularity="row", input_bits=4), eq.Assembled(6)], ids=str
)
@pytest.mark.parametrize("learn_scale", [False, True])
def test_training_through_the_quantizer_keeps_gamma_and_converts_bit_for_bit(
    scheme: eq.Scheme, learn_scale: bool
) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(eq.NEMON(4, 16, learn_gamma=True), nn.Linear(16, 2))
    prepared = eq.prepare_qat(model, scheme, learn_scale)
    x = torch.randn(64, 4)
    y = (x[:, 0] > 0).long()
    optimizer = torch.optim.Adam(prepared.parameters(), 1e-2)
    losses = []
    for _ in range(40):
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(prepared(x), y)
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.6 * losses[0]
    assert prepared[0].recurrent.weights.d.grad.abs().max() > 0
    prepared.eval()
    q = eq.convert(prepared)
    with torch.no_grad():
        assert torch.equal(q[0].weight, prepared[0].recurrent())
    torch.testing.assert_close(q(x), prepared(x), rtol=1e-3, atol=1e-3)  # to the solver's tolerance, and γ is near 1
    if isinstance(scheme, eq.Structured):
        assert eq.certify(q).measure <= float(q[0].recurrent.gamma) + 2e-16
    assert q[0].scheme == scheme


def test_structured_from_free_weights_keeps_their_measure() -> None:
    torch.manual_seed(3)
    W = torch.randn(6, 6) * 0.15
    made = eq.NEMON.from_weights(W, torch.randn(6, 3), torch.zeros(6))
    q = eq.quantize(made, eq.Structured(2))
    assert eq.margin(q) >= eq.margin(made) - 1e-6
    fine = eq.quantize(made, eq.Structured(16))
    torch.testing.assert_close(fine.weight, W, atol=1e-3, rtol=0)
    prepared = eq.prepare_qat(made, eq.Structured(16))
    with torch.no_grad():
        torch.testing.assert_close(prepared.recurrent(), W, atol=1e-3, rtol=0)


def test_moving_a_quantized_layer_to_another_dtype_keeps_its_numbers() -> None:
    q = eq.quantize(network(), eq.Structured(3))
    before = {name: value.clone() for name, value in q[0].recurrent.state_dict().items()}
    wide = copy.deepcopy(q).double()
    assert all(torch.equal(value, before[name]) for name, value in wide[0].recurrent.state_dict().items())
    assert eq.margin(wide) == pytest.approx(eq.margin(q), abs=1e-12)
    assert isinstance(wide[0].weight, Tensor)
    assert wide[0].weight.dtype == torch.float64
