"""Bits, options and weights at the edge of their range: refused, or rounded without NaN."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from equipoise.errors import InputError, OptionError
from equipoise.quantization import (
    Assembled,
    QuantizedTensor,
    code_dtype,
    fit_scale,
    levels,
    pack,
    round_to_codes,
    unpack,
)

BAD_BITS = [0, -1, 17, 40, 2.5, 4.0, True, "4", None]
GRANULARITIES = ["tensor", "row"]


def test_levels_and_dtypes() -> None:
    assert [levels(b) for b in (1, 2, 3, 4, 8, 16, 32)] == [1, 1, 3, 7, 127, 32767, 2**31 - 1]
    assert [code_dtype(b) for b in (1, 8, 9, 16, 32)] == [
        torch.int8,
        torch.int8,
        torch.int16,
        torch.int16,
        torch.int32,
    ]


@pytest.mark.parametrize("bits", BAD_BITS)
def test_bits_out_of_range_are_refused_with_value_and_range(bits: object) -> None:
    w = torch.ones(2, 2)
    codes = torch.ones(2, dtype=torch.int8)
    for use in (
        levels,
        code_dtype,
        lambda b: fit_scale(w, b),
        lambda b: round_to_codes(w, torch.tensor(1.0), b),
        lambda b: pack(codes, b),
        lambda b: unpack(torch.zeros(1, dtype=torch.uint8), b, (2,)),
        lambda b: QuantizedTensor.fit(w, b),
        lambda b: QuantizedTensor.from_codes(codes, torch.tensor(1.0), b),
        Assembled,
    ):
        with pytest.raises(OptionError, match=r"it is an integer from . to 16, or 32") as caught:
            use(bits)
        assert repr(bits) in str(caught.value)


@pytest.mark.parametrize("bits", [1, 2, 8, 16, 32])
@pytest.mark.parametrize("rule", ["max", "mse"])
@pytest.mark.parametrize("granularity", GRANULARITIES)
class TestEdges:
    def fit(self, w: Tensor, bits: int, rule: str, granularity: str) -> QuantizedTensor:
        q = QuantizedTensor.fit(w, bits, granularity, rule)
        assert bool(torch.isfinite(q.dequantize()).all())
        assert bool((q.scale >= 0).all())
        assert q.shape == w.shape
        return q

    def test_zeros(self, bits: int, rule: str, granularity: str) -> None:
        q = self.fit(torch.zeros(3, 4), bits, rule, granularity)
        assert torch.equal(q.dequantize(), torch.zeros(3, 4, dtype=torch.float64))
        assert bool((q.codes == (1 if bits == 1 else 0)).all())

    def test_a_row_of_zeros_leaves_the_others_alone(self, bits: int, rule: str, granularity: str) -> None:
        w = torch.tensor([[0.0, 0.0], [2.0, -2.0]])
        q = self.fit(w, bits, rule, granularity)
        if granularity == "row":
            assert q.scale[0] == 0.0
            assert torch.allclose(q.dequantize(), w.double(), rtol=1e-6, atol=0)

    @pytest.mark.parametrize("shape", [(0,), (0, 5), (5, 0)])
    def test_empty(self, shape: tuple[int, ...], bits: int, rule: str, granularity: str) -> None:
        q = self.fit(torch.zeros(shape), bits, rule, granularity)
        per_row = granularity == "row" and len(shape) == 2
        assert q.scale.shape == ((shape[0], 1) if per_row else ())
        assert q.codes.dtype == code_dtype(bits)

    def test_constant_rows_are_exact(self, bits: int, rule: str, granularity: str) -> None:
        w = torch.full((3, 4), -0.7)
        q = self.fit(w, bits, rule, granularity)
        assert torch.allclose(q.dequantize(), w.double(), rtol=1e-6, atol=0)

    @pytest.mark.parametrize("size", [1e-36, 1e-39, 1e-44, 1e-300, 5e-324])
    def test_tiny(self, size: float, bits: int, rule: str, granularity: str) -> None:
        w = torch.tensor([[1.0, -0.3], [0.2, 0.0]], dtype=torch.float64) * size
        q = self.fit(w, bits, rule, granularity)
        tiny = torch.finfo(q.scale.dtype).tiny
        assert bool(((q.scale == 0) | (q.scale >= tiny)).all())
        if bits > 1 and rule == "max":
            assert bool(((w - q.dequantize()).abs() <= q.scale.double() / 2).all())
        if size < 1e-3 * tiny:  # below half of the least scale there is
            assert float(q.dequantize().abs().max()) == 0.0

    def test_huge(self, bits: int, rule: str, granularity: str) -> None:
        w = torch.tensor([[1.7e308, -1e307], [1.0, 1.7e308]], dtype=torch.float64)
        if bits <= 16:
            with pytest.raises(InputError, match="rescale the weights"):
                QuantizedTensor.fit(w, bits, granularity, rule)
        else:
            assert torch.allclose(self.fit(w, bits, rule, granularity).dequantize(), w, rtol=1e-8, atol=1e300)

    @pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
    def test_not_finite(self, bad: float, bits: int, rule: str, granularity: str) -> None:
        with pytest.raises(InputError, match=r"1 of 2 entries of the .* are NaN"):
            QuantizedTensor.fit(torch.tensor([[1.0], [bad]]), bits, granularity, rule)


def test_unknown_options_and_inputs() -> None:
    w = torch.ones(2, 2)
    with pytest.raises(OptionError, match="scale is 'mean'; it is one of 'max', 'mse'"):
        QuantizedTensor.fit(w, 4, scale="mean")  # type: ignore[arg-type]
    with pytest.raises(OptionError, match="granularity is 'column'; it is one of 'tensor', 'row'"):
        QuantizedTensor.fit(w, 4, granularity="column")  # type: ignore[arg-type]
    with pytest.raises(InputError, match=r"given as torch\.complex64; a real tensor"):
        fit_scale(w.to(torch.complex64), 4)
    with pytest.raises(InputError, match="given as list; a real tensor"):
        fit_scale([1.0], 4)  # type: ignore[arg-type]
    with pytest.raises(InputError, match=r"a scale is -1\.0; none is negative"):
        round_to_codes(w, torch.tensor(-1.0), 4)
    with pytest.raises(InputError, match="1 of 1 entries of the scale are NaN"):
        round_to_codes(w, torch.tensor(math.nan), 4)


@pytest.mark.parametrize(("bits", "code"), [(1, 1), (2, 0), (8, 0), (32, 0)])
def test_a_scale_of_zero_has_one_code(bits: int, code: int) -> None:
    codes = round_to_codes(torch.tensor([-1.0, 0.0, 2.0]), torch.tensor(0.0), bits)
    assert codes.tolist() == [code] * 3
