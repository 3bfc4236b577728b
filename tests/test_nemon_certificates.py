"""What is proved of NEMON as codes: displacements, classes and rates hold on every input (theory §7)."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import equipoise as eq
from equipoise.certificates.rows import Comparison
from equipoise.certificates.wellposed import fresh_operator, perturbation
from equipoise.norms import WeightedMax, metzler, perron
from equipoise.operators import DenseOperator
from test_nemon import layer
from test_nemon_quantized import network


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
