"""Monotone weights: every matrix with the margin and nothing else, the way back, and what is refused."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from equipoise import verified
from equipoise.errors import EquipoiseError, InputError, NotWellPosedError, OptionError
from equipoise.parametrizations import Dense, Monotone, monotone_factors
from problems import matrix, true_margin

sizes = st.integers(1, 7)


def by_formula(A: Tensor, B: Tensor, margin: float) -> Tensor:
    return (1 - margin) * torch.eye(len(B), dtype=B.dtype) - A.mT @ A + B - B.mT


def rank_of_gap(W: Tensor, margin: float) -> int:
    gap = (1 - margin) * torch.eye(len(W), dtype=torch.float64) - (W + W.mT) / 2
    return int((torch.linalg.eigvalsh(gap).abs() > 1e-9).sum())


# Forward


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("rank", [0, 2, 5, None])
def test_forward_is_the_formula(rank: int | None, dtype: torch.dtype) -> None:
    module = Monotone(5, rank=rank, margin=0.37).to(dtype)
    W = module()
    assert W.dtype == dtype
    assert module.A.shape == (5 if rank is None else rank, 5)
    torch.testing.assert_close(W, by_formula(module.A, module.B, float(module.margin)))


@given(
    n=sizes,
    rank=st.integers(0, 7),
    margin=st.floats(1e-3, 5.0),
    gain=st.floats(1e-3, 30.0),
    seed=st.integers(0, 10**6),
)
def test_every_member_has_the_margin(n: int, rank: int, margin: float, gain: float, seed: int) -> None:
    torch.manual_seed(seed)
    A, B = (torch.randn(rows, n, dtype=torch.float64) * gain for rows in (min(rank, n), n))
    module = Monotone.from_factors(A, B, margin)
    W = module().detach()
    slack = 1e-13 * (1 + float(W.abs().sum()))
    assert true_margin(W) >= margin - slack
    if rank < n:  # A's kernel is not empty: the margin is attained there
        assert true_margin(W) <= margin + slack
        assert margin - 10 * slack <= verified.margin(W) <= margin + slack


@pytest.mark.parametrize("margin", [1.0, 1.5, 20.0])
def test_margins_of_one_and_more_are_legitimate(margin: float) -> None:
    module = Monotone(4, rank=2, margin=margin).double()
    assert true_margin(module().detach()) == pytest.approx(margin, rel=1e-6)
    learned = Monotone(4, rank=2, margin=margin, learn_margin=True).double()
    assert float(learned.current_margin().detach()) == pytest.approx(margin, rel=1e-6)


@pytest.mark.parametrize("margin", [1.001e-4, 1e-3, 0.2, 1.0, 30.0])
def test_a_learned_margin_starts_where_it_is_told_and_stays_above_its_floor(margin: float) -> None:
    A, B = torch.zeros(1, 3, dtype=torch.float64), torch.zeros(3, 3, dtype=torch.float64)
    module = Monotone.from_factors(A, B, margin, learn_margin=True)
    assert module.raw_margin.dtype == torch.float64
    assert float(module.current_margin().detach()) == pytest.approx(margin, rel=1e-12)
    with torch.no_grad():
        module.raw_margin.fill_(-1000.0)
    assert float(module.current_margin().detach()) >= 1e-4 * (1 - 1e-12)
    assert true_margin(module().detach()) > 0


def test_margin_is_learned_only_when_asked() -> None:
    fixed, learned = Monotone(3), Monotone(3, learn_margin=True)
    assert {name for name, _ in fixed.named_parameters()} == {"A", "B"}
    assert set(fixed.state_dict()) == {"A", "B", "margin"}
    assert {name for name, _ in learned.named_parameters()} == {"A", "B", "raw_margin"} == set(learned.state_dict())
    learned().diagonal().sum().backward()
    assert learned.raw_margin.grad is not None
    assert float(learned.raw_margin.grad) < 0  # a larger margin lowers W's diagonal


def test_factors_are_copied() -> None:
    A, B = torch.ones(1, 2), torch.ones(2, 2)
    module = Monotone.from_factors(A, B, 0.5)
    A.zero_()
    assert float(module.A.detach().sum()) == 2
    assert not module.A.detach().equal(A)


# The right inverse


@given(n=sizes, rank=st.integers(0, 7), margin=st.floats(0.01, 3.0), seed=st.integers(0, 10**6))
def test_right_inverse(n: int, rank: int, margin: float, seed: int) -> None:
    rank = min(rank, n)
    W = matrix(n, margin, seed, rank)
    A, B = monotone_factors(W, margin)
    torch.testing.assert_close(by_formula(A, B, margin), W, rtol=0, atol=1e-12 * (1 + float(W.abs().max())) * n)
    assert len(A) == rank_of_gap(W, margin)


def test_right_inverse_of_a_smaller_margin_needs_full_rank() -> None:
    W = matrix(6, 0.5, 1, rank=2)
    A, B = monotone_factors(W, 0.3)
    assert len(A) == 6
    torch.testing.assert_close(by_formula(A, B, 0.3), W, rtol=0, atol=1e-13)


def test_right_inverse_in_float32_keeps_its_dtype() -> None:
    W = matrix(5, 0.4, 2).float()
    A, B = monotone_factors(W, 0.4)
    assert A.dtype == B.dtype == torch.float32
    torch.testing.assert_close(by_formula(A, B, 0.4), W, rtol=1e-5, atol=1e-5)


@given(n=sizes, seed=st.integers(0, 10**6))
def test_factors_of_dense_weights(n: int, seed: int) -> None:
    W = matrix(n, 0.3, seed)
    A, K, margin = Dense(W).factors()
    assert torch.equal(K, -K.mT)
    assert 0.3 - 1e-10 <= margin <= true_margin(W) + 1e-14 * (1 + float(W.abs().sum()))
    rebuilt = (1 - margin) * torch.eye(n, dtype=torch.float64) - A.mT @ A + K
    torch.testing.assert_close(rebuilt, W, rtol=0, atol=1e-12 * n * (1 + float(W.abs().max())))


@given(n=st.integers(1, 5), margin=st.floats(0.01, 2.0), seed=st.integers(0, 10**6), excess=st.floats(1e-6, 2.0))
def test_membership(n: int, margin: float, seed: int, excess: float) -> None:
    """In if the margin is there, out if it is not: ``verified.margin`` decides, the formula agrees."""
    W = matrix(n, margin, seed, rank=n - 1)  # margin exactly
    assert verified.margin(W) >= margin - 1e-11
    asked = margin + excess
    assert not verified.margin(W) >= asked
    A, B = monotone_factors(W, asked)
    assert not torch.allclose(by_formula(A, B, asked), W, rtol=0, atol=excess / 100)


# Refusals


@pytest.mark.parametrize("rank", [-1, 6, 2.0, True, "3"])
def test_ranks_out_of_range(rank: object) -> None:
    with pytest.raises(OptionError, match=rf"rank is {rank}.*n = 5"):
        Monotone(5, rank=rank)  # type: ignore[arg-type]


@pytest.mark.parametrize("margin", [0.0, -0.2, math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("learn", [False, True])
def test_margins_that_are_not_positive(margin: float, learn: bool) -> None:
    with pytest.raises(OptionError, match=f"margin is {margin}.*above 0"):
        Monotone(5, margin=margin, learn_margin=learn)
    with pytest.raises(OptionError, match=f"margin is {margin}"):
        Monotone.from_factors(torch.zeros(1, 2), torch.zeros(2, 2), margin, learn)


@pytest.mark.parametrize("margin", ["wide", None, [0.1]])
def test_margins_that_are_no_numbers(margin: object) -> None:
    with pytest.raises(OptionError, match="margin"):
        Monotone(5, margin=margin)  # type: ignore[arg-type]


def test_a_learned_margin_below_its_floor() -> None:
    with pytest.raises(OptionError, match=r"0\.0001"):
        Monotone(5, margin=1e-4, learn_margin=True)


@pytest.mark.parametrize(
    ("A", "B"),
    [((2, 4), (3, 3)), ((2, 3), (3, 4)), ((3,), (3, 3)), ((2, 3), (3,)), ((4, 3), (3, 3))],
)
def test_factors_that_do_not_fit(A: tuple[int, ...], B: tuple[int, ...]) -> None:
    with pytest.raises(EquipoiseError) as caught:
        Monotone.from_factors(torch.zeros(A), torch.zeros(B), 0.5)
    assert isinstance(caught.value, (InputError, OptionError))
    assert str(A[0]) in str(caught.value)


def test_dense_weights_without_a_margin_have_no_factors() -> None:
    with pytest.raises(NotWellPosedError) as caught:
        Dense(torch.eye(3) * 1.5).factors()
    assert caught.value.margin == pytest.approx(-0.5)
