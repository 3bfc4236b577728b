"""The quantized skew part: exactly skew, whatever the codes."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from equipoise.errors import InputError
from equipoise.quantization import (
    QuantizedSkew,
    fit_scale,
)

BITS = [*range(1, 17), 32]


def test_skew_by_hand() -> None:
    k = torch.tensor([[0.0, 3.0, -1.0], [-3.0, 0.0, 2.2], [1.0, -2.2, 0.0]])
    q = QuantizedSkew.fit(k, 3)
    assert q.scale == 1.0
    assert q.codes.tolist() == [3, -1, 2]  # row by row above the diagonal
    assert q.dequantize().tolist() == [[0, 3, -1], [-3, 0, 2], [1, -2, 0]]
    assert q.shape == (3, 3)


@given(
    n=st.integers(0, 7),
    unit=st.sampled_from([1e-30, 1.0, 1e6]),
    bits=st.sampled_from(BITS),
    rule=st.sampled_from(["max", "mse"]),
)
def test_skew_is_exactly_skew(n: int, unit: float, bits: int, rule: str) -> None:
    b = torch.randn(n, n, dtype=torch.float64) * unit
    k = b - b.T
    q = QuantizedSkew.fit(k, bits, rule)
    for dtype in (torch.float64, torch.float16):
        back = q.dequantize(dtype)
        assert back.dtype == dtype
        assert torch.equal(back, -back.T)  # infinite where float16 overflows, with the sign mirrored
        assert not back.diagonal().any()
    off = ~torch.eye(n, dtype=torch.bool)
    assert torch.equal(q.scale, fit_scale(k.triu(1)[off.triu(1)], bits, rule))
    if bits > 1 and rule == "max":
        assert bool(((q.dequantize() - k).abs() <= float(q.scale) / 2 + 2.3e-16 * k.abs()).all())
    again = QuantizedSkew.from_codes(q.codes, q.scale, bits, n)
    assert torch.equal(again.dequantize(), q.dequantize())


def test_one_bit_skew_has_no_codes_on_the_diagonal() -> None:
    k = torch.tensor([[0.0, 2.0, -4.0], [-2.0, 0.0, 0.0], [4.0, 0.0, 0.0]])
    q = QuantizedSkew.fit(k, 1)
    assert q.dequantize().tolist() == [[0, 2, -2], [-2, 0, 2], [2, -2, 0]]


@pytest.mark.parametrize("n", [0, 1])
def test_skew_of_no_entries(n: int) -> None:
    q = QuantizedSkew.fit(torch.zeros(n, n), 2, "mse")
    assert q.codes.shape == (0,)
    assert torch.equal(q.dequantize(), torch.zeros(n, n, dtype=torch.float64))


@pytest.mark.parametrize(
    ("k", "message"),
    [
        ([[0.0, 1.0], [-1.0000001, 0.0]], "not skew-symmetric"),
        ([[1e-30, 1.0], [-1.0, 0.0]], "not skew-symmetric"),
        ([[0.0, 1.0], [math.nan, 0.0]], "not skew-symmetric"),
        ([[0.0, math.inf], [-math.inf, 0.0]], "finite"),
        ([[0.0, 1.0]], r"skew matrix is \(1, 2\); it is square"),
        ([0.0], "square"),
    ],
)
def test_what_is_not_skew_is_refused(k: list[list[float]], message: str) -> None:
    with pytest.raises(InputError, match=message):
        QuantizedSkew.fit(torch.tensor(k), 4)


def test_skew_codes_of_another_size_are_refused() -> None:
    codes = torch.ones(3, dtype=torch.int8)
    for size, scale in ((4, torch.tensor(1.0)), (-2, torch.tensor(1.0)), (3, torch.ones(1))):
        with pytest.raises(InputError, match="one scale"):
            QuantizedSkew.from_codes(codes, scale, 4, size)
