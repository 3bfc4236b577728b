"""The conformance suite: what every operator promises, checked on every kind of operator.

A new kind registers in the catalogue's ``OPERATORS`` by a name and a function that builds it in a given dtype.
"""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import equipoise as eq
from catalogue import LOOSE, OPERATORS, SCHEMES, Build, codes, monotone
from equipoise.errors import InputError, NotWellPosedError, OptionError
from equipoise.operators import DenseOperator, MonotoneOperator, QuantizedWeight, quantize_weight
from equipoise.operators.dense import TransposedOperator
from equipoise.parametrizations import Dense
from problems import true_margin

DTYPES = [torch.float32, torch.float64]


@pytest.fixture(params=OPERATORS)
def build(request: pytest.FixtureRequest) -> Build:
    return OPERATORS[request.param]


@pytest.fixture(params=DTYPES, ids=["f32", "f64"])
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    return request.param


@pytest.fixture
def operator(build: Build, dtype: torch.dtype) -> MonotoneOperator:
    return build(dtype)


def applied(operator: MonotoneOperator) -> Tensor:
    """The matrix that products really use, read off column by column, in float64."""
    if isinstance(operator, TransposedOperator):
        return applied(operator.base).mT
    eye = torch.eye(operator.features, dtype=operator.tensors()[0].dtype)
    return operator.summed(eye).mT.detach().double()  # sums of one product each: nothing is rounded


def shifted(W: Tensor) -> Tensor:
    return torch.eye(len(W), dtype=torch.float64) - W


def norm(W: Tensor) -> float:
    return float(torch.linalg.matrix_norm(W, 2))


def close(dtype: torch.dtype) -> float:
    return 1e-5 if dtype == torch.float32 else 1e-12


# Products


def test_apply_and_transpose_are_the_dense_products(operator: MonotoneOperator, dtype: torch.dtype) -> None:
    W = applied(operator)
    z = torch.randn(4, operator.features, dtype=dtype)
    for found, expected in ((operator.apply(z), z.double() @ W.mT), (operator.transpose(z), z.double() @ W)):
        assert found.dtype == dtype
        assert float((found.double() - expected).norm()) <= close(dtype) * norm(W) * float(z.norm())


def test_transpose_is_the_adjoint(operator: MonotoneOperator, dtype: torch.dtype) -> None:
    n = operator.features
    y, z = torch.randn(6, n, dtype=dtype), torch.randn(6, n, dtype=dtype)
    left = (operator.apply(z) * y).double().sum(1)
    right = (z * operator.transpose(y)).double().sum(1)
    torch.testing.assert_close(left, right, rtol=0, atol=close(dtype) * 50 * max(norm(applied(operator)), 1e-3))


def test_transposed_is_the_operator_of_the_transpose(operator: MonotoneOperator, dtype: torch.dtype) -> None:
    other = operator.transposed()
    z = torch.randn(3, operator.features, dtype=dtype)
    torch.testing.assert_close(other.apply(z), operator.transpose(z))
    torch.testing.assert_close(other.transpose(z), operator.apply(z))
    for constant in ("margin", "lipschitz", "norm", "absolute_norm", "best_alpha"):
        assert getattr(other, constant)() == getattr(operator, constant)()
    assert other.features == operator.features
    assert other.representation_error == operator.representation_error


def test_empty_batch(operator: MonotoneOperator, dtype: torch.dtype) -> None:
    none = torch.zeros(0, operator.features, dtype=dtype)
    assert operator.apply(none).shape == operator.transpose(none).shape == none.shape


def test_pullback_is_the_gradient_of_its_form(operator: MonotoneOperator, dtype: torch.dtype) -> None:
    y, z = (torch.randn(3, operator.features, dtype=dtype) for _ in range(2))
    tensors = operator.tensors()
    for tensor in tensors:
        tensor.requires_grad_()
    expected = torch.autograd.grad((operator.apply(z) * y).sum(), tensors)
    found = operator.pullback(y, z)
    assert len(found) == len(expected) == len(tensors)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other)


# Constants


@pytest.fixture
def loose(request: pytest.FixtureRequest) -> tuple[float, float]:
    """Which part of itself the margin may be proved too small, and a norm too large."""
    return LOOSE.get(request.node.callspec.params["build"], (0.0, 1e-11))


def test_margin_is_proved_and_close(operator: MonotoneOperator, loose: tuple[float, float]) -> None:
    W = applied(operator)
    true, found = true_margin(W), operator.margin()
    # of the matrix multiplied by, and so of the stored one: what representation_error may cost is in it
    assert found <= true + 1e-14 * norm(W)
    slack = 2.1 * operator.representation_error + 1e-12 * max(norm(shifted(W)), 1.0)
    assert found >= true - slack - loose[0] * true


def test_lipschitz_is_proved_and_close(operator: MonotoneOperator, loose: tuple[float, float]) -> None:
    F = shifted(applied(operator))
    true, found = norm(F), operator.lipschitz()
    assert found >= true * (1 - 1e-14)
    assert found <= true * (1 + loose[1]) + 2.1 * operator.representation_error


def test_norms_are_proved_and_close(operator: MonotoneOperator, loose: tuple[float, float]) -> None:
    W = applied(operator)
    true, open_by = norm(W), 2.1 * operator.representation_error + 1e-300
    assert true * (1 - 1e-14) <= operator.norm() <= true * (1 + loose[1]) + open_by
    spread = norm(W.abs())
    assert operator.absolute_norm() >= spread * (1 - 1e-14)
    slack = 1e-9 + 2.1 * operator.features * operator.representation_error
    assert operator.absolute_norm() <= spread * math.sqrt(operator.features) + slack


def test_bounds_of_both_steps_hold_or_are_none(operator: MonotoneOperator) -> None:
    """``cayley_bound`` and ``forward_bound``, of which solvers make their proved factors."""
    W = applied(operator)
    eye = torch.eye(len(W), dtype=torch.float64)
    for alpha in (0.05, 0.4, 1.0, 2.3, operator.best_alpha()):
        C = 2 * torch.linalg.inv(eye + alpha * (eye - W)) - eye
        for found, true in (
            (operator.cayley_bound(alpha), norm(C)),
            (operator.forward_bound(alpha), norm((1 - alpha) * eye + alpha * W)),
        ):
            cast = 2 * alpha * operator.representation_error  # it is of the stored numbers
            assert found is None or true * (1 - 1e-12) - cast <= found < 1
    assert operator.margin() <= 0 or operator.cayley_bound(operator.best_alpha()) is not None


@given(seed=st.integers(0, 10**6), n=st.integers(1, 6), exponent=st.integers(-6, 4))
def test_constants_of_random_matrices(seed: int, n: int, exponent: int) -> None:
    torch.manual_seed(seed)
    W = torch.randn(n, n, dtype=torch.float32) * 10.0**exponent
    operator, W64 = DenseOperator(W), W.double()
    tiny = 1e-14 * (1 + norm(W64))
    assert true_margin(W64) - 1e-12 * (1 + norm(W64)) <= operator.margin() <= true_margin(W64) + tiny
    assert operator.lipschitz() >= norm(shifted(W64)) - tiny
    assert operator.norm() >= norm(W64) - tiny
    assert operator.representation_error == 0


# Cayley transform and steps


def test_cayley_is_its_formula(operator: MonotoneOperator, dtype: torch.dtype) -> None:
    W = applied(operator)
    eye = torch.eye(len(W), dtype=torch.float64)
    for alpha in (0.07, 0.5, 1.0, 3.1, operator.best_alpha()):
        system = eye + alpha * (eye - W)
        expected = 2 * torch.linalg.inv(system) - eye
        found = operator.cayley(alpha)
        assert found.dtype == dtype
        allowed = close(dtype) * float(torch.linalg.cond(system)) + 20 * operator.representation_error * alpha
        assert norm(found.double() - expected) <= allowed * (1 + norm(expected))
        assert operator.cayley_norm(alpha) == pytest.approx(norm(expected), rel=allowed + 1e-6, abs=1e-6)
        torch.testing.assert_close(operator.transposed().cayley(alpha), found.mT)


def test_cayley_contracts_exactly_where_there_is_a_margin(operator: MonotoneOperator) -> None:
    for alpha in (0.1, 1.0, 2.3):
        # of weights that a maximum norm proves, the Euclidean margin decides
        margin = operator.euclidean_margin() if isinstance(operator, DenseOperator) else operator.margin()
        assert (operator.cayley_norm(alpha) < 1) == (margin > 0)


def test_forward_norm_is_its_formula(operator: MonotoneOperator) -> None:
    W = applied(operator)
    eye = torch.eye(len(W), dtype=torch.float64)
    for alpha in (0.01, 0.4, 1.0, 1.6):
        assert operator.forward_norm(alpha) == pytest.approx(norm((1 - alpha) * eye + alpha * W), rel=1e-4, abs=1e-6)


def test_best_alpha_is_no_worse_than_a_grid(operator: MonotoneOperator, dtype: torch.dtype) -> None:
    stored = [getattr(o, "stored_cayley", None) for o in (operator, getattr(operator, "base", None))]
    if operator.margin() <= 0 or any(cayley is not None for cayley in stored):
        pytest.skip("nothing to minimise: no margin, or the step is stored with the codes")
    F = shifted(applied(operator))
    eye = torch.eye(len(F), dtype=torch.float64)
    grid = torch.logspace(-5, 4, 1500, dtype=torch.float64)
    norms = torch.linalg.matrix_norm(2 * torch.linalg.inv(eye + grid[:, None, None] * F) - eye, 2)
    best = norm(2 * torch.linalg.inv(eye + operator.best_alpha() * F) - eye)
    assert best <= float(norms.min()) + 0.01  # the search stops at 2 % of α


def test_a_stored_cayley_matrix_is_used_as_it_is(dtype: torch.dtype) -> None:
    weight = codes(eq.Cayley(6), 7)
    operator = weight.operator(torch.zeros(1, dtype=dtype))
    alpha = float(weight.alpha)
    assert operator.best_alpha() == alpha
    assert torch.equal(operator.cayley(alpha), weight.C.dequantize().to(dtype))


def test_cayley_of_a_singular_system_is_refused() -> None:
    operator = DenseOperator(3.0 * torch.eye(2))  # I + α(I − W) = (1 − 2α) I
    with pytest.raises(NotWellPosedError, match=r"alpha") as caught:
        operator.cayley(0.5)
    assert caught.value.margin == pytest.approx(-2.0)


# What is stored


def exact_matrix(weight: QuantizedWeight) -> list[list[object]]:
    """W̃ in rational arithmetic, straight from the codes, scales and scalars, by the scheme's definition."""
    import flint

    def rational(x: float) -> flint.fmpq:
        numerator, denominator = float(x).as_integer_ratio()
        return flint.fmpq(numerator, denominator)

    def scaled(quantized: object) -> flint.fmpq_mat:
        values, scale = quantized.codes, quantized.scale  # type: ignore[attr-defined]
        scale = scale.expand(values.shape)
        rows = [
            [int(c) * rational(s) for c, s in zip(line, steps, strict=True)]
            for line, steps in zip(values.tolist(), scale.tolist(), strict=True)
        ]
        return flint.fmpq_mat(rows)

    n = weight.features
    eye = flint.fmpq_mat([[int(i == j) for j in range(n)] for i in range(n)])
    kind = type(weight).__name__
    if kind == "StructuredWeight":
        A = scaled(weight.A)
        step, values = rational(float(weight.K.scale)), weight.K.codes.tolist()
        K = [[flint.fmpq(0)] * n for _ in range(n)]
        for (i, j), code in zip(itertools.combinations(range(n), 2), values, strict=True):
            K[i][j], K[j][i] = code * step, -code * step
        W = eye * (1 - rational(float(weight.margin))) - A.transpose() * A + flint.fmpq_mat(K)
    elif kind == "CompensatedWeight":
        off = weight.off_diagonal
        scale = off.scale.expand(off.codes.shape)
        step = rational(float(weight.diagonal.scale))
        table = [[flint.fmpq(0)] * n for _ in range(n)]
        for i in range(n):
            table[i][i] = int(weight.diagonal.codes[i]) * step
            for k, j in enumerate([j for j in range(n) if j != i]):
                table[i][j] = int(off.codes[i, k]) * rational(float(scale[i, k]))
        W = flint.fmpq_mat(table)
    elif kind == "CayleyWeight":
        C = scaled(weight.C)
        W = eye - (eye - C) * (eye + C).inv() / rational(float(weight.alpha))
    else:  # codes of W itself
        W = scaled(weight.codes)
    return [[W[i, j] for j in range(n)] for i in range(n)]


@pytest.mark.parametrize("scheme", SCHEMES, ids=lambda s: f"{s.name}-{s.bits}-{s.granularity}")
def test_representation_error_bounds_the_distance_to_the_codes(scheme: eq.Scheme, dtype: torch.dtype) -> None:
    weight = codes(scheme, 6)
    operator = weight.operator(torch.zeros(1, dtype=dtype))
    used = operator.weight.double().tolist()
    difference = []
    for i, row in enumerate(exact_matrix(weight)):
        for j, entry in enumerate(row):
            numerator, denominator = used[i][j].as_integer_ratio()
            gap = entry - type(entry)(numerator, denominator)
            difference.append(int(gap.p) / int(gap.q))
    distance = norm(torch.tensor(difference, dtype=torch.float64).view(6, 6))
    assert distance <= operator.representation_error
    # and it is not a number that bounds everything
    assert operator.representation_error <= 1e-4 * (1 + operator.norm()) if dtype == torch.float32 else 1e-11


def test_structure_keeps_its_margin(dtype: torch.dtype) -> None:
    for bits in (1, 2, 4, 8, 16):
        operator = codes(eq.Structured(bits), 7).operator(torch.zeros(1, dtype=dtype))
        assert operator.margin() >= 0.3 - (1e-5 if dtype == torch.float32 else 1e-12)


@pytest.mark.parametrize("bits", [1, 2, 4])
@pytest.mark.parametrize("diagonal_bits", [2, 8, 16])
def test_compensation_reaches_its_target(bits: int, diagonal_bits: int) -> None:
    module = codes(eq.Compensated(bits, margin=0.2, diagonal_bits=diagonal_bits), 7)
    assert module.operator(torch.zeros(1, dtype=torch.float64)).margin() >= 0.2


def test_quantized_weights_hold_codes_and_scales_only() -> None:
    for scheme in SCHEMES:
        module = codes(scheme, 7)
        assert not list(module.parameters())
        full = [key for key, value in module.state_dict().items() if value.is_floating_point() and value.numel() >= 49]
        assert not full, f"{scheme.name} keeps a float matrix in {full}"


def test_casting_a_quantized_weight_does_not_move_its_matrix() -> None:
    for scheme in SCHEMES:
        module = codes(scheme, 7)
        before = module()
        module.half().float()
        assert torch.equal(module(), before)


def test_quantizing_what_has_no_margin_by_structure_is_refused() -> None:
    with pytest.raises(NotWellPosedError, match=r"-1") as caught:
        quantize_weight(Dense(2 * torch.eye(3)), eq.Structured(4))
    assert caught.value.margin == pytest.approx(-1.0)


def test_quantizing_twice_and_weights_that_are_not_finite_are_refused() -> None:
    with pytest.raises(InputError, match="already"):
        quantize_weight(codes(eq.Structured(4), 3), eq.Structured(4))
    for bad in (math.nan, math.inf):
        module = monotone(3)
        module.B.data[0, 1] = bad
        for scheme in (eq.Assembled(4), eq.Structured(4), eq.Compensated(4), eq.Cayley(4)):
            with pytest.raises(InputError, match=r"NaN|finite"):
                quantize_weight(module, scheme)


def test_a_scheme_nobody_knows_is_refused() -> None:
    class Made(eq.Scheme):
        pass

    with pytest.raises(OptionError, match="Made"):
        quantize_weight(monotone(3), Made(4))
