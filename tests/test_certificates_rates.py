"""How fast a certificate says that solvers converge: against exact rationals, closed forms, and the solvers' maps."""

from __future__ import annotations

import math
import random
from fractions import Fraction
from itertools import pairwise

import mpmath
import pytest
import torch
from torch import Tensor

import equipoise as eq
from catalogue import ACTIVATIONS
from equipoise.certificates.convergence import closed_rates, inexact_factor, steps_for
from equipoise.solvers import Problem
from exact_arithmetic import F64, at_most, dominated, exact, eye, q
from problems import matrix
from test_certificates import IDENTITY, layer_of, stored


@torch.no_grad()
def contraction(solver: eq.Solver, layer: eq.MonDEQ, activation: eq.ELU, pairs: Tensor) -> float:
    """The largest factor by which the solver's map moves pairs ``(2, B, n)`` of points together."""
    problem = Problem(layer.operator, torch.randn(pairs.shape[1:], dtype=F64), activation)
    T = solver.map(problem, solver.tune(layer.operator))
    return float(((T(pairs[0]) - T(pairs[1])).norm(dim=1) / (pairs[0] - pairs[1]).norm(dim=1)).max())


SPLITTINGS = [eq.ForwardBackward, eq.PeacemanRachford, eq.DouglasRachford, eq.Tseng, eq.Picard]


@pytest.mark.parametrize("kind", SPLITTINGS)
def test_no_map_contracts_less_than_its_rate(kind: type[eq.Solver]) -> None:
    proved = 0
    for seed in range(60):
        n, alpha = 1 + seed % 5, [None, 0.05, 0.3, 1.0][seed % 4]
        W = matrix(n, 0.3, seed, gain=0.3) if kind is not eq.Picard else matrix(n, 0.5, seed, gain=0.2)
        layer = layer_of(W - 0.5 * torch.eye(n, dtype=F64) * (seed % 3), solver=kind(alpha=alpha))
        if seed % 7 == 0:
            layer = eq.quantize(layer, eq.Cayley(8))
        c = eq.certify(layer)
        assert (c.steps is None) == (c.inexact is None) == (c.rate is None)
        if c.rate is None:
            continue
        proved += 1
        worst = torch.linalg.svd(layer.weight.detach()).Vh if kind is not eq.Tseng else torch.eye(n, dtype=F64)
        for activation in (*ACTIVATIONS, IDENTITY):
            pairs = torch.randn(2, 40, n, dtype=F64)
            pairs[1, ::2] = pairs[0, ::2] + 1e-3 * torch.randn(20, n, dtype=F64)
            pairs[1, :n] = pairs[0, :n] + worst
            assert contraction(layer.solver, layer, activation, pairs) <= c.rate * (1 + 1e-9) + 1e-12
    assert proved > 25


def test_rates_against_exact_rationals() -> None:
    """Of the stored matrix and of the one multiplied by, to the last bit."""
    seen = 0
    for i in range(240):
        kind, n = random.choice([eq.ForwardBackward, eq.PeacemanRachford, eq.DouglasRachford, eq.Picard]), 1 + i % 2
        W = torch.randn(n, n, dtype=F64) / (1 + i % 5) - 1e3 * random.random() * (i % 7 == 0) * torch.eye(n)
        layer = layer_of(W, (F64, torch.float32)[i % 3 // 2], solver=kind(alpha=math.exp(random.uniform(-3, 1))))
        if i % 4:
            layer = eq.quantize(
                layer, random.choice([eq.Assembled, eq.Cayley])(random.choice([4, 16, 32]), scale="max")
            )
        c = eq.certify(layer)
        if c.rate is None:
            continue
        seen, rate, a = seen + 1, q(c.rate), q(c.alpha)
        for V in (stored(layer), exact(layer.weight.detach().double())):
            here, there = eye(n) - a * (eye(n) - V), eye(n) + a * (eye(n) - V)
            match layer.solver:
                case eq.ForwardBackward():
                    assert at_most(here, rate)
                case eq.Picard():
                    assert at_most(V, (rate - 1 + a) / a)
                case eq.PeacemanRachford():
                    assert dominated(here, there, rate)
                case eq.DouglasRachford():
                    assert dominated(here, there, 2 * rate - 1)
    assert seen > 100


def test_rates_are_reached_where_the_activation_is_the_identity() -> None:
    for seed in range(20):
        W = matrix(4, 0.4, seed)
        for kind in (eq.ForwardBackward, eq.PeacemanRachford):
            layer = layer_of(W, solver=kind())
            c = eq.certify(layer)
            one = torch.eye(4, dtype=F64)
            linear = one - c.alpha * (one - W)
            if kind is eq.PeacemanRachford:
                linear = linear @ torch.linalg.inv(one + c.alpha * (one - W))
            top = torch.linalg.svd(linear).Vh[:1]
            seen = contraction(layer.solver, layer, IDENTITY, torch.stack((torch.zeros_like(top), top)))
            assert seen == pytest.approx(c.rate, rel=1e-9)


def test_rates_in_closed_form() -> None:
    """W = (1 − m) I + K with KᵀK = k² I meets the closed bounds at their steps; W = −s I meets κ = 1."""
    for m, k in ((0.5, 1.5), (0.1, 3.0), (1.0, 0.0)):
        W = torch.tensor([[1 - m, k], [-k, 1 - m]], dtype=F64)
        L = math.hypot(m, k)
        for kind, alpha, name in (
            (eq.ForwardBackward, m / L**2, "forward_backward"),
            (eq.PeacemanRachford, 1 / L, "peaceman_rachford"),
            (eq.DouglasRachford, 1 / L, "douglas_rachford"),
        ):
            c = eq.certify(layer_of(W, solver=kind(alpha=alpha)))
            closed = {"f": math.sqrt(1 - (m / L) ** 2), "p": math.sqrt((L - m) / (L + m))}
            closed["d"] = (1 + closed["p"]) / 2
            assert c.rate == pytest.approx(closed[name[0]], abs=1e-9)
            assert c.closed_rates[name] == pytest.approx(closed[name[0]], abs=1e-6)
    s, n = 2.0, 3
    W, alpha = -s * torch.eye(n, dtype=F64), 0.2
    factors = {eq.ForwardBackward: 1 - 0.6, eq.PeacemanRachford: 0.4 / 1.6, eq.DouglasRachford: (1 + 0.4 / 1.6) / 2}
    for kind, factor in factors.items():
        assert eq.certify(layer_of(W, solver=kind(alpha=alpha))).rate == pytest.approx(factor, rel=1e-12)
    assert eq.certify(layer_of(-0.25 * W, solver=eq.Picard(alpha=0.5))).rate == pytest.approx(0.75, rel=1e-12)
    tseng, (p, f) = eq.certify(layer_of(W, solver=eq.Tseng(alpha=alpha))).rate, (1 - 0.36, 2 * alpha * (1 + s))
    assert tseng == pytest.approx(math.sqrt(1 - p * f / (p + f)), rel=1e-12)


def test_what_has_no_proved_rate() -> None:
    W = matrix(3, 0.3, 1, gain=2.0)
    for solver in (eq.Anderson(), eq.Broyden(), eq.Picard(), eq.ForwardBackward(alpha=9.0), eq.Tseng(alpha=9.0)):
        c = eq.certify(layer_of(W, solver=solver))
        assert c.certified
        assert (c.rate, c.steps, c.inexact) == (None, None, None)
    c = eq.certify(layer_of(2 * torch.eye(1, dtype=F64)))  # I + α(I − W) is singular at the α of least norm
    assert (c.rate, c.certified, c.closed_rates["peaceman_rachford"]) == (None, False, None)


@pytest.mark.parametrize("solver", SPLITTINGS)
@pytest.mark.parametrize("dtype", [torch.float32, F64])
@pytest.mark.parametrize("entry", [1.0, 1.0 - 2.0**-24, 1.0 + 2.0**-23])
def test_a_step_that_overflows_is_no_failure(solver: type[eq.Solver], dtype: torch.dtype, entry: float) -> None:
    """F = I − W is next to nothing, or nothing: a step of 1/‖F‖ overflows."""
    W, one = torch.tensor([[entry]], dtype=dtype), torch.ones(1, 1, dtype=dtype)
    layer = eq.MonDEQ.from_weights(W, one, one[0], check=False, solver=solver())  # type: ignore[call-arg]
    found = eq.certify(layer)
    assert found.certified == (float(W) < 1)
    assert found.certified or found.rate is None


def test_closed_rates_bound_the_formulas_in_many_digits() -> None:
    for kappa in (1.0, 1 + 2.0**-52, 1 + 1e-9, 1.5, 3.0, 1e3, 1e6, 1e9, 1e200):
        for margin in (1.0, 0.3, 1e-7):
            lipschitz, found = kappa * margin, closed_rates(margin, kappa * margin)
            true = max(mpmath.mpf(lipschitz) / mpmath.mpf(margin), mpmath.mpf(1))
            peaceman = mpmath.sqrt((true - 1) / (true + 1))
            exactly = [mpmath.sqrt(1 - 1 / true**2), peaceman, (1 + peaceman) / 2]
            for rate, formula in zip(found.values(), exactly, strict=True):
                assert formula > 1 - 1e-12 if rate is None else formula <= rate < 1
                assert rate is None or rate <= formula + 1e-6
    assert set(closed_rates(0.0, 1.0).values()) == set(closed_rates(-1.0, 1.0).values()) == {None}


def test_step_counts_and_the_cost_of_inexact_steps() -> None:
    for rate in (1e-300, 1e-9, 0.1, 0.5, 0.999, 1 - 1e-9, 1 - 2.0**-53):
        for tol in (0.9, 0.5, 1e-6, 1e-300):
            k = steps_for(rate, tol)
            assert mpmath.mpf(rate) ** k <= mpmath.mpf(tol)
            assert k == 1 or mpmath.mpf(rate) ** (k * (1 - 2e-9) - 2) > mpmath.mpf(tol)
        factor = inexact_factor(rate)
        assert Fraction(factor) >= 1 / (1 - Fraction(rate))
        assert rate > 0.9999 or Fraction(factor) <= (1 + Fraction(1, 10**12)) / (1 - Fraction(rate))
    assert (steps_for(None, 0.1), inexact_factor(None), steps_for(0.0, 1e-9)) == (None, None, 1)
    layer = layer_of(matrix(4, 0.3, 5))
    problem = Problem(layer.operator, torch.randn(50, 4, dtype=F64), eq.ReLU())
    for tol in (0.1, 1e-3, 1e-6):
        c, T = eq.certify(layer, tol=tol), layer.solver.map(problem, layer.solver.tune(layer.operator))
        points = [torch.randn(50, 4, dtype=F64) * 9]
        for _ in range(2000):
            points.append(T(points[-1]))
        far = [(u - points[-1]).norm(dim=1) for u in points]
        assert bool((far[c.steps] <= tol * far[0] + 1e-12).all())
        assert c.tolerance == tol
    assert all(a <= b for a, b in pairwise(eq.certify(layer, tol=t).steps for t in (0.5, 1e-2, 1e-9)))
