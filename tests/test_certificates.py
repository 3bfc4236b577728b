"""What a certificate says of one layer: proved against exact rationals, closed forms, and the solvers' own maps."""

from __future__ import annotations

import copy
import math
import random
from collections.abc import Iterator
from fractions import Fraction
from itertools import pairwise

import mpmath
import pytest
import torch
from flint import fmpq_mat
from torch import Tensor

import equipoise as eq
from catalogue import ACTIVATIONS, SCHEME_KINDS
from equipoise.certificates.convergence import closed_rates, inexact_factor, steps_for
from equipoise.operators.quantized import AssembledWeight, CayleyWeight, CompensatedWeight, StructuredWeight
from equipoise.quantization import QuantizedTensor
from equipoise.solvers import Problem
from exact_arithmetic import F64, at_least, at_most, dominated, exact, eye, q, spectrum, sym_margin
from problems import matrix, true_margin

BITS = [*range(1, 9), 16, 32]
IDENTITY = eq.LeakyReLU(1.0)


def layer_of(W: Tensor, dtype: torch.dtype = F64, **options: object) -> eq.MonDEQ:
    n = len(W)
    return eq.MonDEQ.from_weights(W.to(dtype), torch.eye(n, dtype=dtype), torch.zeros(n, dtype=dtype), False, **options)


def random_layer(n: int, d: int, dtype: torch.dtype = F64, **options: object) -> eq.MonDEQ:
    return eq.MonDEQ(d, n, margin=random.choice([0.02, 0.3, 1.2]), **options).to(dtype)


def coded(codes: QuantizedTensor) -> fmpq_mat:
    """Codes times scales, not rounded."""
    scales = codes.scale.double().expand(codes.codes.shape)
    return fmpq_mat(
        *codes.codes.shape, [int(c) * q(s) for c, s in zip(codes.codes.flatten(), scales.flatten(), strict=True)]
    )


def stored(layer: eq.MonDEQ) -> fmpq_mat | None:
    """W as the stored numbers define it, exactly; None where codes of C_α define none."""
    weights, n = layer.recurrent, layer.features
    match weights:
        case AssembledWeight():
            return coded(weights.codes)
        case StructuredWeight():
            A, K = coded(weights.A), fmpq_mat(n, n)
            half = iter(weights.K.codes.tolist())
            for i in range(n):
                for j in range(i + 1, n):
                    K[i, j] = next(half) * q(weights.K.scale)
            return eye(n, 1 - q(weights.margin)) - A.transpose() * A + K - K.transpose()
        case CompensatedWeight():
            off, W = coded(weights.off_diagonal) if n > 1 else None, fmpq_mat(n, n)
            for i in range(n):
                W[i, i] = int(weights.diagonal.codes[i]) * q(weights.diagonal.scale)
                for j in range(n - 1):
                    W[i, j + (j >= i)] = off[i, j]
            return W
        case CayleyWeight():
            C = coded(weights.C)
            if (eye(n) + C).det() == 0:
                return None
            return eye(n) - (eye(n) - C) * (eye(n) + C).inv() / q(weights.alpha)
    return exact(layer.weight.detach().double())


def check_constants(layer: eq.MonDEQ) -> eq.Certificate:
    """Margin and Lipschitz constant hold for the stored numbers and for what the layer multiplies by."""
    c = eq.certify(layer)
    assert c.certified == (c.margin is not None and c.margin > 0) == (c.verdict == "certified")
    assert eq.margin(layer) == (-math.inf if c.margin is None else c.margin)
    assert eq.lipschitz(layer) == (math.inf if c.lipschitz is None else c.lipschitz)
    for W in (stored(layer), exact(layer.weight.detach().double())):
        if W is None or c.margin is None or c.lipschitz is None:
            assert not c.certified
            continue
        assert at_least(sym_margin(W), q(c.margin))
        assert at_most(eye(layer.features) - W, q(c.lipschitz))
        if c.certified and c.condition is not None and c.weight_condition is not None:
            assert q(c.condition) >= q(c.lipschitz) / q(c.margin)
            assert at_most(W, q(c.weight_condition) * q(c.margin))
    return c


# Margin and Lipschitz constant


def test_quantized_constants_against_exact_rationals() -> None:
    certified = 0
    for i, bits in enumerate(BITS * 5):
        for kind in SCHEME_KINDS:
            dtype, n = (torch.float32, F64)[i // 2 % 2], 1 + (i + bits) % 4
            layer = random_layer(n, 2, dtype)
            options = {"granularity": random.choice(["tensor", "row"]), "scale": random.choice(["max", "mse"])}
            certified += check_constants(eq.quantize(layer, kind(bits, **options))).certified
    assert 150 < certified < 200  # nearly all, but not all: Assembled and Cayley lose some


def almost_singular() -> Iterator[Tensor]:
    """W whose margin is 0 up to 1e-12 or 1e-15, on both sides, with skew parts of any size."""
    for i in range(40):
        n, low = 1 + i % 4, [1e-12, -1e-12, 1e-15, -1e-15, 0.0][i % 5]
        H = spectrum(torch.cat([torch.tensor([low], dtype=F64), torch.rand(n, dtype=F64)]))
        B = torch.randn(n + 1, n + 1, dtype=F64) * random.choice([0.0, 1.0, 1e4])
        yield torch.eye(n + 1, dtype=F64) - H + B - B.T


def test_constants_on_the_edge_of_singularity() -> None:
    verdicts = []
    for i, W in enumerate(almost_singular()):
        verdicts.append(check_constants(layer_of(W, (F64, torch.float32)[i % 2])).certified)
        for kind in (eq.Assembled, eq.Compensated, eq.Cayley):
            check_constants(eq.quantize(layer_of(W), kind(random.choice([8, 16, 32]))))
    assert any(verdicts)
    assert not all(verdicts)


def test_codes_that_are_exactly_singular_are_not_certified() -> None:
    for _ in range(30):
        n = random.randint(2, 5)
        A, B = torch.randint(-2, 3, (n - 1, n)), torch.randint(-2, 3, (n, n))
        layer = layer_of(torch.zeros(n, n, dtype=F64))
        codes = torch.eye(n, dtype=torch.int64) - A.T @ A + B - B.T
        layer.recurrent = AssembledWeight(QuantizedTensor.from_codes(codes, torch.tensor(1.0), 8))
        assert -1e-12 * n < layer.operator.euclidean_margin() <= 0
        if eq.certify(layer).family == "l2":  # else its row sums prove what the Euclidean margin cannot
            check_constants(layer)


def test_codes_times_float64_scales_are_rounded() -> None:
    """code · scale has up to 85 bits: the float64 matrix is not the stored one, and I + C̃ near 0 magnifies that."""
    for i in range(120):
        W = torch.randn(1, 1, dtype=F64) - 10 ** random.uniform(0, 9) * (i % 2)
        for kind in (eq.Cayley(32, alpha=random.uniform(0.2, 5)), eq.Assembled(32), eq.Compensated(32)):
            check_constants(eq.quantize(layer_of(W), kind))
        layer = eq.quantize(layer_of(W), eq.Cayley(8, alpha=random.uniform(0.2, 5), granularity="tensor"))
        C = layer.recurrent.C
        layer.recurrent.C = QuantizedTensor.from_codes(C.codes, C.scale.double() * (1 - random.random() * 1e-7), 8)
        check_constants(layer)  # as files from elsewhere may have it: few bits, and a float64 scale


def test_codes_that_define_no_matrix_are_not_certified() -> None:
    layer = eq.quantize(random_layer(2, 2), eq.Cayley(8, granularity="tensor"))
    layer.recurrent.C.scale.fill_(1.0)
    layer.recurrent.C.codes.copy_(torch.tensor([[-1, 0], [0, 1]]))
    for solver in (eq.PeacemanRachford(), eq.ForwardBackward(), eq.Picard(), eq.Tseng(), eq.Anderson()):
        layer.solver = solver
        c = eq.certify(layer, random_layer(2, 2), torch.randn(3, 2))
        assert (c.margin, c.lipschitz, c.rate, c.delta_norm, c.verdict) == (None, None, None, None, "unknown")


def test_constants_are_tight() -> None:
    for i, kind in enumerate(SCHEME_KINDS * 6):
        layer = eq.quantize(random_layer(30, 3, (torch.float32, F64)[i % 2]), kind([3, 8, 16][i % 3]))
        W, c = layer.weight.detach().double(), eq.certify(layer)
        near = 1e-11 if i % 2 else 1e-5
        assert true_margin(W) - near < c.margin < true_margin(W) + near
        largest = float(torch.linalg.matrix_norm(torch.eye(30, dtype=F64) - W, 2))
        assert largest - near < c.lipschitz < largest + near


# What a perturbation does (T2, C3)


def test_three_forms_of_the_perturbation_theorem() -> None:
    sufficient, predeployed = 0, 0
    for i in range(60):
        n, dtype = 2 + i % 4, (torch.float32, F64)[i // 2 % 2]
        model = layer_of(matrix(n, random.choice([0.05, 0.5]), i, gain=0.2), dtype)
        scheme = (eq.Assembled if i % 3 else eq.Structured)(random.choice([1, 2, 4, 8, 16]))
        quantized = eq.quantize(model, scheme)
        c, m, W = eq.certify(quantized, model), eq.margin(model), exact(model.weight.detach().double())
        if c.family != "l2":  # proved by its rows, and all is in another norm
            continue
        codes, used = stored(quantized), exact(quantized.weight.double())
        for tilde in (codes, used):
            assert at_most(tilde - W, q(c.delta_norm))
        true = float(torch.linalg.matrix_norm(quantized.weight.double() - model.weight.detach().double(), 2))
        assert c.delta_norm <= true * (1 + 1e-9) + (1e-5 if dtype == torch.float32 else 1e-13)
        assert abs(c.margin - m) <= c.delta_norm * (1 + 1e-9) + 1e-12
        assert c.sufficient is (c.delta_norm < m)
        assert c.certified or not c.sufficient
        assert c.certified or not c.predeployment
        sufficient += bool(c.sufficient)
        if isinstance(scheme, eq.Structured) or scheme.bits == 1:
            assert c.predeployment is None
        else:
            step = max(q(s) for s in quantized.recurrent.codes.scale.double().flatten().tolist())
            assert c.predeployment is (n * step / 2 < q(m))
            assert c.sufficient or not c.predeployment
            predeployed += bool(c.predeployment)
    assert 0 < predeployed < sufficient < 60


@pytest.mark.parametrize(("entry", "holds"), [(0.5, False), (0.499, True)])
def test_the_predeployment_check_at_its_limit(entry: float, holds: bool) -> None:
    """n = 2, two bits: Δ = max|w| = entry, nΔ/2 = entry, m = 1 − entry."""
    model = layer_of(torch.diag(torch.tensor([-0.4, entry], dtype=F64)))
    for granularity in ("tensor", "row"):
        c = eq.certify(eq.quantize(model, eq.Assembled(2, granularity=granularity)), model)
        assert c.predeployment is holds
    assert eq.certify(eq.quantize(model, eq.Assembled(2, scale="mse")), model).predeployment is None
    other = layer_of(torch.diag(torch.tensor([-0.4, 2 * entry - (0.999 if holds else 1.001)], dtype=F64)))
    assert eq.certify(other, model).sufficient is holds  # ‖ΔW‖ = 0.999 − entry, or 1.001 − entry; m = 1 − entry


def test_the_relative_bound_holds_and_needs_the_same_injection() -> None:
    seen = 0
    for i in range(16):
        model = random_layer(
            5, 3, (torch.float32, F64)[i % 2], activation=ACTIVATIONS[i % len(ACTIVATIONS) * (i < len(ACTIVATIONS))]
        )
        quantized = eq.quantize(model, eq.Structured(8 + i % 9, scale="max"))
        x = torch.randn(8, 3, dtype=F64)
        c = eq.certify(quantized, model, x)
        assert (c.relative_bound is None) == (c.delta_norm >= eq.margin(model))
        if c.relative_bound is None or c.displacement is None:
            continue
        seen += 1
        delta = q(c.delta_norm) / q(eq.margin(model))
        assert delta / (1 - delta) <= q(c.relative_bound) <= delta / (1 - delta) * q(1 + 1e-12)
        size = model.double().solve(x, tol=1e-10).value.norm(dim=1)
        assert bool((c.displacement <= c.relative_bound * size * (1 + 1e-5) + 1e-5).all())  # T3 knows more
        for more in ({"input_bits": 8}, {"bias_bits": 8}, {"input_bits": 32, "bias_bits": 32}):
            other = eq.quantize(model, eq.Structured(16, scale="max", **more))
            assert eq.certify(other, model).relative_bound is None
        twin = copy.deepcopy(model).double()
        with torch.no_grad():  # the same float64 values; stored are others that round to them
            twin.injection.weight.copy_(other.injection.weight.dequantize())
            twin.injection.bias.copy_(other.injection.bias.dequantize())
        assert eq.certify(other.double(), twin).relative_bound is None
    assert seen > 6
    one = eq.MonDEQ.from_weights(*torch.tensor([[[0.0]], [[1.0]]], dtype=F64), torch.zeros(1).double())
    two = eq.MonDEQ.from_weights(*torch.tensor([[[0.375]], [[1.0]]], dtype=F64), torch.zeros(1).double())
    c = eq.certify(two, one, torch.tensor([[2.0]]))  # z = 2 and 2/0.625, δ = 0.375: reached
    assert c.relative_bound == pytest.approx(0.6, rel=1e-12)
    assert c.actual_displacement.item() == pytest.approx(0.6 * 2, rel=1e-9)


# Rates


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
