"""Convolutional equilibria at their edges: how sums are rounded, second derivatives, modes, and what is refused."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import conv2d

import equipoise as eq
from equipoise.errors import InputError
from equipoise.layers.memory import Memory
from equipoise.operators import grids, quantized_tiers
from equipoise.operators.grids import Geometry, correlate
from equipoise.operators.symbol_bounds import contracts, size, whole
from equipoise.operators.tiers import TierOperator
from equipoise.parametrizations import Kernels
from equipoise.solvers import Tuning

F64 = torch.float64
KINDS: dict[str, Callable[..., Any]] = {
    "one grid": lambda **options: eq.MonConv2d(1, 2, 4, **options),
    "two grids": lambda **options: eq.MultiTierMonDEQ(1, (1, 2), 4, **options),
    "rows": lambda **options: eq.NEMONConv2d(1, 2, **options),
}


@pytest.mark.parametrize(("stride", "size"), [(1, (5, 4)), (2, (7, 6)), (2, (3, 3))])
def test_sums_are_those_of_a_convolution(stride: int, size: tuple[int, int]) -> None:
    x, kernel = torch.randn(2, 3, *size, dtype=F64), torch.randn(4, 3, 3, 3, dtype=F64)
    found = correlate(x.permute(2, 3, 1, 0), kernel, stride).permute(3, 2, 0, 1)
    torch.testing.assert_close(found, conv2d(x, kernel, stride=stride))


@pytest.mark.parametrize("kind", KINDS)
def test_what_a_bound_is_proved_of_is_summed_plainly(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """No call of conv2d, which may go by Winograd's transform, between an input and its bound."""

    def refuse(*_: Any, **__: Any) -> Tensor:
        raise AssertionError("conv2d")

    layer, x = KINDS[kind](), torch.randn(17, 1, 4, 4)
    operator = layer.operator if kind != "rows" else layer.operator_for((4, 4))
    expected = layer._inject(x)[0]
    monkeypatch.setattr(grids.torch, "conv2d", refuse)
    monkeypatch.setattr(torch.nn.functional, "conv2d", refuse)
    with torch.no_grad():
        found = layer._inject(x, summed=True)[0]
        torch.testing.assert_close(found, expected)
        torch.testing.assert_close(operator.summed(found).isfinite().all(), torch.tensor(True))


SMALL: list[Callable[..., Any]] = [
    lambda **options: eq.MonConv2d(1, 1, 2, learn_margin=True, border=0, **options),
    lambda **options: eq.MultiTierMonDEQ(1, (1, 1), 2, border=0, **options),
    lambda **options: eq.NEMONConv2d(1, 2, **options),
]


@pytest.mark.slow
@pytest.mark.parametrize("make", SMALL, ids=list(KINDS))
def test_second_derivatives(make: Callable[..., Any]) -> None:
    layer = make(activation=eq.Tanh(), tol=1e-12).double()
    names = [name for name, _ in layer.named_parameters()]

    def value(x: Tensor, *tensors: Tensor) -> Tensor:
        found: Tensor = torch.func.functional_call(layer, dict(zip(names, tensors, strict=True)), (x,))
        return found

    torch.manual_seed(0)
    x = torch.randn(1, 1, 2, 2, dtype=F64, requires_grad=True)
    weights = tuple(p.detach().clone().requires_grad_() for p in layer.parameters())
    assert torch.autograd.gradgradcheck(value, (x, *weights), atol=1e-5, fast_mode=True)


def test_second_derivatives_with_frozen_kernels() -> None:
    layer = KINDS["two grids"]().double()
    for name, parameter in layer.named_parameters():
        parameter.requires_grad_(not name.startswith(("recurrent.A", "recurrent.a", "recurrent.d")))
    x = torch.randn(1, 1, 4, 4, dtype=F64, requires_grad=True)
    (slope,) = torch.autograd.grad(layer(x).square().sum(), x, create_graph=True)
    slope.square().sum().backward()
    assert layer.recurrent.B[0].grad is not None
    assert layer.recurrent.A[0].grad is None


@pytest.mark.parametrize("kind", KINDS)
def test_modes_may_follow_each_other(kind: str) -> None:
    layer, x = KINDS[kind](), torch.randn(2, 1, 4, 4)
    with torch.inference_mode():
        first = layer(x).clone()
        layer.solve(x, tol=1e-3)
    with torch.no_grad():
        assert torch.equal(layer(x), first)
        layer.solve(x, tol=1e-3)
    layer(x).sum().backward()
    layer.eval()(x).sum().backward()


@pytest.mark.parametrize("kind", KINDS)
def test_no_samples(kind: str) -> None:
    layer, x = KINDS[kind](), torch.randn(2, 1, 4, 4)
    found, whole = layer.solve(x[:0]), layer.solve(x, tol=1e-3)
    assert found.value.shape == (0, whole.value.shape[1])
    assert found.error_bound.shape == (0,)


def test_a_step_is_searched_again_for_other_weights() -> None:
    kernel = torch.randn(2, 2, 3, 3)
    memory = Memory.after(None, Tuning(1.0, None, None), kernel)
    assert memory.lasts(kernel * 1.01)
    assert not memory.lasts(kernel * 5)


def test_what_lowering_moved_is_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    """A kernel lowered once more lies further from its codes, in float32 by more than was asked for."""
    torch.manual_seed(0)
    layer = eq.quantize(eq.MonConv2d(1, 2, 3), eq.Structured(bits=3))
    margin, rounds = float(layer.recurrent.margin), []  # type: ignore[union-attr, arg-type]

    def short(_: TierOperator) -> float:
        rounds.append(1)
        return margin - (1e-15 if len(rounds) < 4 else 0.0)

    before = layer.recurrent.operator(layer.geometry, torch.zeros(1)).representation_error
    monkeypatch.setattr(quantized_tiers.TierOperator, "margin", short)
    after = layer.recurrent.operator(layer.geometry, torch.zeros(1)).representation_error
    assert len(rounds) == 4
    assert after > before + 1e-8


def test_rates_near_one_and_near_zero() -> None:
    """W = (1 − m) I: every constant is known exactly."""
    m, size = 0.7, (2, 2)
    kernel = torch.full((1, 1, 1, 1), 1 - m, dtype=F64)
    operator = TierOperator(Kernels((kernel,)), Geometry((1, 1)[:1], (size,), 0))
    exact = 1 - float(kernel)
    for alpha in (1e-12, 1e-6, 1.0, 1 / exact, 1e6):
        for found, true in (
            (operator.cayley_bound(alpha), abs(1 - alpha * exact) / (1 + alpha * exact)),
            (operator.forward_bound(alpha), abs(1 - alpha * exact)),
        ):
            assert found is None or found >= true * (1 - 1e-15)
    F = (1 - kernel).reshape(1, 1, 1).to(torch.complex128)
    assert not contracts(F, 1e-12, 1 - 1.5e-12, 0.0)
    assert contracts(F, 1e-12, 1 - 1e-12, 0.0)


@pytest.mark.parametrize("alpha", [1e-300, 1e160, 1e300])
def test_steps_beyond_reason_prove_nothing(alpha: float) -> None:
    for solver in (eq.PeacemanRachford(alpha=alpha), eq.ForwardBackward(alpha=alpha)):
        assert eq.certify(KINDS["one grid"](solver=solver)).rate is None


def test_images_that_the_injection_wraps_around() -> None:
    layer = eq.NEMONConv2d(1, 2, kernel_size=5)
    with pytest.raises(InputError, match=r"1×3.*2 pixels"):
        layer(torch.zeros(1, 1, 1, 3))
    assert layer(torch.zeros(1, 1, 2, 3)).shape == (1, 2, 2, 3)


@pytest.mark.parametrize("scheme", [eq.Structured(bits=2), eq.Assembled(bits=2), eq.Compensated(bits=2)], ids=str)
def test_kernels_of_one_entry(scheme: eq.Scheme) -> None:
    small = eq.quantize(eq.MonConv2d(1, 1, 4, kernel_size=1), scheme)
    assert math.isfinite(small.margin())  # type: ignore[operator]
    assert eq.size(small) > 0
    assert copy.deepcopy(small)(torch.zeros(1, 1, 4, 4)).shape == (1, 1, 4, 4)


@pytest.mark.parametrize("kind", ["one grid", "two grids"])
def test_constants_and_rates_of_a_multiple_of_the_identity(kind: str) -> None:
    """W = (1 − m) I: F = m I, and every factor is what its formula gives of the one eigenvalue."""
    m, alpha = 0.75, 0.5
    factors = {
        eq.ForwardBackward: 1 - alpha * m,
        eq.PeacemanRachford: (1 - alpha * m) / (1 + alpha * m),
        eq.DouglasRachford: 1 / (1 + alpha * m),
        eq.Picard: 1 - alpha + alpha * (1 - m),
        eq.Tseng: math.sqrt(1 - (p := 1 - (alpha * m) ** 2) * (q := 2 * alpha * m) / (p + q)),
    }
    for solver, factor in factors.items():
        layer = KINDS[kind](margin=m, solver=solver(alpha=alpha)).double()
        with torch.no_grad():
            for gains in (layer.recurrent.a, layer.recurrent.h, layer.recurrent.d):
                for gain in gains:
                    gain.zero_()
        found = eq.certify(layer)
        assert found.margin == pytest.approx(m, rel=1e-12)
        assert found.lipschitz == pytest.approx(m, rel=1e-12)
        assert found.weight_condition == pytest.approx((1 - m) / m, rel=1e-12)
        # splittings of a convolution are proved by searching, which leaves 1e-6 of what is short of 1
        assert found.rate == pytest.approx(factor, abs=1e-6)
        assert found.rate is not None
        assert found.rate >= factor


def _positive(own: tuple[float, float], down: float, lift: float) -> Kernels:
    """Kernels of one entry on two tiers of one channel: what their blocks are bounded by is attained."""
    (first, second), d, a = own, down, lift

    def kernel(value: float) -> Tensor:
        return torch.full((1, 1, 1, 1), value, dtype=F64)

    return Kernels((kernel(first), kernel(second)), (kernel(d),), (kernel(a),))


def _in_rows(X: Any) -> float:
    """What stands in for ‖ |X| ‖₂: the root of the largest row sum of |X|ᵀ|X|, or ‖X‖_F."""
    X = torch.as_tensor(X, dtype=F64).abs()
    return math.sqrt(min(float((X.mT @ X).sum(1).max()), float(X.square().sum())))


def test_blocks_of_one_entry_meet_their_bounds() -> None:
    """I − W is [[1 − o₁ + d², 0], [2ad, 1 − o₂]] on the pixels that d reaches, all of it positive."""
    geometry = Geometry((1, 1), ((4, 4), (2, 2)), 0)
    own, down, lift = (-0.5, -1.0), 0.8, 0.6
    operator = TierOperator(_positive(own, down, lift), geometry)
    F = torch.tensor([[1 - own[0] + down**2, 0], [2 * lift * down, 1 - own[1]]], dtype=F64)
    W = torch.tensor([[0.5 + down**2, 0], [2 * lift * down, 1.0]], dtype=F64)
    assert operator.lipschitz() == pytest.approx(float(torch.linalg.matrix_norm(F, 2)), rel=1e-9)
    assert operator.norm() == pytest.approx(float(torch.linalg.matrix_norm(W, 2)), rel=1e-9)
    assert operator.absolute_norm() == pytest.approx(_in_rows(W), rel=1e-6)
    assert operator.margin() == pytest.approx(min(1 - own[0], 1 - own[1] - lift**2), rel=1e-12)
    assert operator.averaging_step() == pytest.approx(1 / (1 + operator.lipschitz()), rel=1e-12)
    other = TierOperator(_positive((-0.7, -1.1), 0.9, 0.7), geometry)
    moved = torch.tensor([[0.2 + 0.81 - 0.64, 0], [2 * (0.7 * 0.9 - 0.6 * 0.8), 0.1]], dtype=F64)
    # (a − a')d + a'(d − d') is ad − a'd' where all of it has one sign
    assert operator.distance(other) == pytest.approx(float(torch.linalg.matrix_norm(moved, 2)), rel=1e-9)


def test_how_far_kernels_were_moved_by_casting() -> None:
    """By blocks, with sizes no smaller than either set's, and what forming cost added."""
    used, stored = _positive((0.5, 1.0), 0.9, 0.7), _positive((0.4, 0.7), 0.8, 0.6)
    e, d, a = 0.1, 0.9, 0.7
    blocks = [[0.1 + 0.03 + 2 * d * e + e**2, 0], [2 * (a * e + d * e + e * e), 0.3 + 0.05]]
    assert quantized_tiers._distance(used, stored, [0.03, 0.05]) == pytest.approx(_in_rows(blocks), rel=1e-6)


def test_sizes_of_kernels_and_of_blocks() -> None:
    K = torch.randn(3, 2, 3, 3, generator=torch.Generator().manual_seed(0), dtype=F64)
    assert size(K) == pytest.approx(_in_rows(K.abs().sum((2, 3))), rel=1e-6)
    assert whole(torch.tensor([[3.0, 0.0], [4.0, 0.0]], dtype=F64)) == pytest.approx(5.0, rel=1e-12)
    assert whole(torch.tensor([[3.0]], dtype=F64)) == 3.0


@pytest.mark.parametrize(("f", "alpha"), [(0.5, 1.0), (2.0, 0.7), (3.0, 0.2), (0.25, 1.5)])
def test_contraction_is_proved_as_far_as_it_holds(f: float, alpha: float) -> None:
    """Of F = f the factor is |1 − αf|/(1 + αf), and an error is taken at its worst in every term."""
    F, rho = torch.full((1, 1, 1), f, dtype=torch.complex128), abs(1 - alpha * f) / (1 + alpha * f)
    assert contracts(F, alpha, rho * (1 + 1e-5) + 1e-12, 0.0)
    assert not contracts(F, alpha, rho * (1 - 1e-5) - 1e-12, 0.0)
    rho = rho + 0.1 * (1 - rho)
    less, more = 1 - rho**2, (1 + rho**2) * alpha
    left = 2 * more * f - less * (1 + (alpha * f) ** 2)  # = 2 more e + less α² (2f + e) e
    a, b = less * alpha**2, 2 * more + 2 * less * alpha**2 * f
    e = 2 * left / (b + math.sqrt(b * b + 4 * a * left))
    assert contracts(F, alpha, rho, e * (1 - 1e-5))
    assert not contracts(F, alpha, rho, e * (1 + 1e-5))
