"""Rows and products, any finite entries, flushed denormals, and input that is refused."""

from __future__ import annotations

import math
import sys
from fractions import Fraction

import pytest
import torch
from flint import fmpq
from hypothesis import given
from hypothesis import strategies as st

from equipoise import verified as v
from equipoise.errors import InputError, OptionError
from exact_arithmetic import F64, at_least, at_most, exact, eye, q, sym_margin, symmetric

FINITE = st.floats(allow_nan=False, allow_infinity=False, allow_subnormal=True)


@given(st.lists(st.lists(FINITE, min_size=3, max_size=3), min_size=1, max_size=4))
def test_row_norms_enclose_the_exact_ones(rows: list[list[float]]) -> None:
    X = torch.tensor(rows, dtype=F64)
    for row, high, low in zip(rows, v.row_norms(X).tolist(), v.row_norms_lower(X).tolist(), strict=True):
        square = sum(Fraction(x) ** 2 for x in row)
        assert Fraction(low) ** 2 <= square
        assert high == math.inf or square <= Fraction(high) ** 2
        true = math.hypot(*row)
        if true < math.inf:
            assert true * (1 - 1e-14) - 1e-306 <= low
            assert high <= true * (1 + 1e-14) + 1e-306


def test_row_norms_at_the_edges() -> None:
    X = torch.tensor([[0.0, 0.0], [sys.float_info.max] * 2, [5e-324, 0.0]], dtype=F64)
    assert v.row_norms(X)[0] == v.row_norms_lower(X)[0] == 0
    assert v.row_norms(X)[1] == math.inf
    assert v.row_norms_lower(X)[1] == sys.float_info.max
    assert v.row_norms(torch.zeros(3, 0)).tolist() == [0.0] * 3
    assert v.row_norms(torch.zeros(0, 3)).shape == (0,)
    assert v.row_norms(torch.full((1, 2), 2.0**-149))[0] >= 2.0**-149 * math.sqrt(2)  # float32's denormals


@pytest.mark.parametrize(("dtype", "unit"), [(F64, v.UNIT), (torch.float32, 2.0**-24), (torch.bfloat16, 2.0**-8)])
@pytest.mark.parametrize("scale", [1.0, 2.0**-70, 2.0**-140, 2.0**-515])
def test_product_rounding_covers_what_a_product_loses(dtype: torch.dtype, unit: float, scale: float) -> None:
    for n, k in ((3, 4), (5, 16)):
        W, w = ((torch.randn(r, k, dtype=F64) * scale).to(dtype) for r in (n, 6))
        computed = exact((w @ W.T).double())
        difference = computed - exact(w.double()) * exact(W.double()).transpose()
        norms = v.row_norms(w.double())
        bounds = v.product_rounding(v.absolute_norm(W.double()), k, norms, unit=unit, outputs=n).tolist()
        for i, bound in enumerate(bounds):
            assert sum((difference[i, j] ** 2 for j in range(n)), fmpq(0)) <= q(bound) ** 2
        if scale == 1.0:
            true = v.gamma(k, unit) * v.absolute_norm(W.double()) * norms
            assert bool((torch.tensor(bounds, dtype=F64) <= true * (1 + 1e-13) + 1e-30).all())


def test_product_rounding_refuses_what_are_no_norms() -> None:
    with pytest.raises(InputError, match="product_rounding: 2 of 3"):
        v.product_rounding(1.0, 3, torch.tensor([1.0, -1.0, math.nan]))
    for W_abs_norm, k in ((-1.0, 3), (math.nan, 3), (1.0, -1)):
        with pytest.raises(OptionError, match=r"product_rounding|gamma"):
            v.product_rounding(W_abs_norm, k, torch.ones(1))
    with pytest.raises(OptionError, match="finer dtype"):
        v.product_rounding(1.0, 300, torch.ones(1), unit=2.0**-8)
    assert v.product_rounding(math.inf, 3, torch.tensor([0.0, math.inf])).tolist() == [math.inf] * 2


@given(st.integers(1, 4).flatmap(lambda n: st.lists(FINITE, min_size=n * n, max_size=n * n)), FINITE.map(abs))
def test_bounds_hold_for_any_finite_entries(entries: list[float], error: float) -> None:
    n = math.isqrt(len(entries))
    X = torch.tensor(entries, dtype=F64).reshape(n, n)
    H = torch.tril(X) + torch.tril(X, -1).T
    for low, matrix in ((v.min_eigenvalue(H, error), exact(H)), (v.margin(X, error), sym_margin(exact(X)))):
        assert low == -math.inf or at_least(matrix, q(low) + q(error))
    for high, matrix in ((v.spectral_norm(X, error), exact(X)), (v.lipschitz(X, error), eye(n) - exact(X))):
        assert high == math.inf or at_most(matrix, q(high) - q(error))
    if v.is_positive_semidefinite(H):
        assert at_least(exact(H), fmpq(0))


def test_bounds_hold_where_the_processor_flushes_denormals() -> None:
    cases = [symmetric(1 + i % 4, 10.0 ** -(300 + i % 24)) for i in range(48)]
    cases += [symmetric(3) * torch.tensor([1.0, 1e-160, 1e-170], dtype=F64).outer(torch.ones(3, dtype=F64))]
    cases[-1] = torch.tril(cases[-1]) + torch.tril(cases[-1], -1).T
    wanted, single = [exact(H) for H in cases], torch.full((2, 2), 2.0**-140)
    if not torch.set_flush_denormal(True):
        pytest.skip("this processor cannot flush denormals")
    try:
        found = [(v.min_eigenvalue(H), v.spectral_norm(H), v.is_positive_semidefinite(H)) for H in cases]
        moved = [(v.min_eigenvalue(H, 5e-309), v.spectral_norm(H, 5e-309)) for H in cases]
        rows, small = [v.row_norms(H) for H in cases], v.spectral_norm(single)
    finally:
        torch.set_flush_denormal(False)
    for matrix, (low, high) in zip(wanted, moved, strict=True):
        assert at_least(matrix, q(low) + q(5e-309))
        assert at_most(matrix, q(high) - q(5e-309))
    for matrix, (low, high, definite), norms in zip(wanted, found, rows, strict=True):
        assert at_least(matrix, q(low))
        assert at_most(matrix, q(high))
        assert not definite or at_least(matrix, fmpq(0))
        for i, norm in enumerate(norms.tolist()):
            assert sum((matrix[i, j] ** 2 for j in range(len(norms))), fmpq(0)) <= q(norm) ** 2
    assert small == pytest.approx(2.0**-139, rel=1e-13, abs=0)


MATRIX_FUNCTIONS = [
    v.min_eigenvalue,
    v.spectral_norm,
    v.absolute_norm,
    v.margin,
    v.lipschitz,
    lambda X: v.quotient_norm(X, torch.eye(3)),
    lambda X: v.quotient_norm(torch.eye(3), X),
    lambda X: v.cayley_norm(X, 1.0),
    lambda X: v.cayley_margin(X, 1.0),
    lambda X: v.cayley_lipschitz(X, 1.0),
    v.row_norms,
    v.row_norms_lower,
]


@pytest.mark.parametrize("function", MATRIX_FUNCTIONS)
def test_entries_that_are_not_finite_are_counted(function: object) -> None:
    assert callable(function)
    X = torch.eye(3)
    X[0, 1] = X[1, 0] = math.nan
    X[2, 2] = -math.inf
    with pytest.raises(InputError, match=r"^\w+: 3 of 9 entries are not finite"):
        function(X)
    for bad in (torch.eye(3, dtype=torch.int64), torch.ones(3), torch.ones(2, 3, 3)):
        with pytest.raises(InputError, match=r"a .* is needed"):
            function(bad)


def test_shapes_symmetry_errors_and_steps_are_checked() -> None:
    for function in (v.min_eigenvalue, v.is_positive_semidefinite):
        with pytest.raises(InputError, match="exactly symmetric"):
            function(torch.tensor([[1.0, 0.1], [0.1 + 1e-7, 1.0]]))
        with pytest.raises(InputError, match=r"square|symmetric"):
            function(torch.ones(2, 3))
    for square in (v.margin, v.lipschitz):
        with pytest.raises(InputError, match="square"):
            square(torch.ones(2, 3))
    with pytest.raises(InputError, match="columns"):
        v.quotient_norm(torch.eye(2), torch.eye(3))
    for error in (-1e-300, math.nan):
        with pytest.raises(OptionError, match="error"):
            v.margin(torch.eye(2), error)
    for alpha in (0.0, -1.0, math.nan, math.inf):
        for cayley in (v.cayley_norm, v.cayley_margin, v.cayley_lipschitz):
            with pytest.raises(OptionError, match="alpha"):
                cayley(torch.eye(2) / 2, alpha)


def test_inputs_are_left_alone() -> None:
    X = torch.rand(4, 4, dtype=F64) / 2 + torch.eye(4, dtype=F64) / 4
    X = (X + X.T) / 2
    kept = X.clone()
    for function in (*MATRIX_FUNCTIONS[:5], *MATRIX_FUNCTIONS[7:]):
        function(X)  # type: ignore[operator]
    v.quotient_norm(X, X)
    v.is_positive_semidefinite(X)
    assert torch.equal(X, kept)
