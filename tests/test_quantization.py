"""Rounding, scales, packed codes and schemes: worked answers, exhaustive searches, refusals."""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import Tensor, nn

from equipoise.quantization import (
    QuantizedSkew,
    QuantizedTensor,
    fit_scale,
    levels,
    round_to_codes,
    rounding,
)

BITS = [*range(1, 17), 32]
GRANULARITIES = ["tensor", "row"]


def doubles(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


@st.composite
def weights(draw: st.DrawFn, largest: int = 6) -> Tensor:
    """Small matrices of every magnitude a float32 scale can hold, rounded numbers and ties among them."""
    rows, columns = draw(st.integers(1, largest)), draw(st.integers(1, largest))
    entry = st.one_of(st.integers(-9, 9).map(float), st.floats(-3, 3), st.sampled_from([0.0, -0.0, 0.5, 1.5]))
    values = draw(st.lists(entry, min_size=rows * columns, max_size=rows * columns))
    unit = draw(st.sampled_from([1.0, 1e-30, 1e30, 1 / 3]))
    return torch.tensor(values, dtype=torch.float64).view(rows, columns) * unit


def squared_error(w: Tensor, q: QuantizedTensor) -> float:
    return float((w.double() - q.dequantize()).square().sum())


# --- rounding


def test_three_bits_by_hand() -> None:
    # largest |w| 3 on largest code 3: scale 1; ties go to the even code
    q = QuantizedTensor.fit(doubles(-3.0, 1.0, 0.4, 1.5, 2.5, -0.5, 0.5, -1.5), 3)
    assert q.scale == 1.0
    assert q.codes.tolist() == [-3, 1, 0, 2, 2, 0, 0, -2]
    assert q.codes.dtype == torch.int8


def test_codes_are_clamped() -> None:
    assert round_to_codes(doubles(9.0, -9.0, 0.9), torch.tensor(1.0), 3).tolist() == [3, -3, 1]


@pytest.mark.parametrize("rule", ["max", "mse"])
def test_one_bit_by_hand(rule: str) -> None:
    q = QuantizedTensor.fit(doubles(1.0, -2.0, 0.0, 5.0, -0.0), 1, scale=rule)
    assert q.scale == torch.tensor(8.0, dtype=torch.float32) / 5
    assert q.codes.tolist() == [1, -1, 1, 1, 1]


def test_rows_by_hand() -> None:
    w = doubles(1.0, -0.5, 8.0, 6.0).view(2, 2)
    q = QuantizedTensor.fit(w, 4, granularity="row")
    assert q.scale.dtype == torch.float32
    assert torch.equal(q.scale, torch.tensor([[1.0], [8.0]]) / 7)
    assert q.codes.tolist() == [
        [7, -3],
        [7, 5],
    ]  # 1/7 in float32 exceeds 1/7: -0.5 is -3.4999999 steps
    assert fit_scale(w, 4, dim=1).shape == (1, 2)
    assert fit_scale(w, 4, dim=-1).tolist() == fit_scale(w, 4, dim=1).tolist()


def test_a_vector_is_one_row() -> None:
    q = QuantizedTensor.fit(doubles(3.0, 1.0), 3, granularity="row")
    assert q.scale.shape == ()
    assert q.codes.tolist() == [3, 1]


def test_least_squares_by_hand() -> None:
    # max: scale 3, codes 1 1 1 1, squared error 3. Best: the mean 9/4, squared error 3/4.
    w = doubles(2.0, -2.0, 2.0, 3.0)
    assert QuantizedTensor.fit(w, 2).scale == 3.0
    q = QuantizedTensor.fit(w, 2, scale="mse")
    assert q.scale == 2.25
    assert squared_error(w, q) == 0.75


@given(w=weights(), bits=st.sampled_from(BITS[1:]), granularity=st.sampled_from(GRANULARITIES))
def test_max_moves_no_entry_by_more_than_half_a_step(w: Tensor, bits: int, granularity: str) -> None:
    q = QuantizedTensor.fit(w, bits, granularity=granularity)
    excess = (w - q.dequantize()).abs() - q.scale.double() / 2
    # 1e-16 |w|: code times scale is itself rounded once
    assert bool((excess <= 2.3e-16 * w.abs()).all())


def test_codes_are_rounded_against_the_scale_as_stored() -> None:
    # The float64 scale differs from the stored one by up to 6e-8, i.e. 0.001 steps at code 32767.
    w = torch.rand(100_000, dtype=torch.float64)
    q = QuantizedTensor.fit(w, 16)
    assert q.scale.dtype == torch.float32
    assert float((w - q.dequantize()).abs().max() / q.scale.double()) <= 0.5 + 1e-9


def test_thirty_two_bits_use_a_float64_scale_and_all_their_levels() -> None:
    w = torch.linspace(-1, 1, 1001, dtype=torch.float64)
    q = QuantizedTensor.fit(w, 32)
    assert q.scale.dtype == torch.float64
    assert q.codes.dtype == torch.int32
    assert int(q.codes[-1]) == 2**31 - 1
    assert int(q.codes[0]) == 1 - 2**31
    assert 0 < float((w - q.dequantize()).abs().max()) <= 2.0**-32 * (1 + 1e-6)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.int64])
def test_low_precision_weights_are_quantized_in_float64(dtype: torch.dtype) -> None:
    w = (10 * torch.randn(40, 30)).to(dtype)
    same, wide = (QuantizedTensor.fit(v, 12, "row", "mse") for v in (w, w.double()))
    assert torch.equal(same.codes, wide.codes)
    assert torch.equal(same.scale, wide.scale)


@given(w=weights(), bits=st.sampled_from(BITS), granularity=st.sampled_from(GRANULARITIES))
def test_quantizing_twice_changes_nothing(w: Tensor, bits: int, granularity: str) -> None:
    for rule in ("max", "mse"):
        q = QuantizedTensor.fit(w, bits, granularity=granularity, scale=rule)
        once = q.dequantize()
        assert torch.equal(round_to_codes(once, q.scale, bits), q.codes)
        if rule == "max":
            assert torch.equal(QuantizedTensor.fit(once, bits, granularity=granularity).dequantize(), once)


# --- the least-squares scale


def exhaustive(w: Tensor, bits: int) -> float:
    """Least squared error over every vector of codes and, for each, its best scale."""
    top, best = levels(bits), float(w.square().sum())
    for codes in itertools.product(range(-top, top + 1), repeat=w.numel()):
        c = doubles(*codes)
        if bool(c.any()):
            best = min(best, float(w.square().sum() - (w @ c) ** 2 / (c @ c)))
    return max(best, 0.0)


@pytest.mark.parametrize(("bits", "size"), [(2, 6), (3, 4), (4, 3)])
def test_least_squares_is_the_global_minimum(bits: int, size: int) -> None:
    for _ in range(8):
        w = torch.randn(size, dtype=torch.float64)
        found = squared_error(w, QuantizedTensor.fit(w, bits, scale="mse"))
        # the stored scale is a float32: relative 6e-8, which costs its square, in units of |w|^2
        assert found <= exhaustive(w, bits) + 1e-14 * float(w.square().sum())


@given(w=weights(), bits=st.sampled_from(BITS), granularity=st.sampled_from(GRANULARITIES))
def test_mse_is_never_worse_than_max(w: Tensor, bits: int, granularity: str) -> None:
    unit = w / w.abs().max().clamp(min=1e-300)  # so that the squares compared do not underflow
    mse, largest = (QuantizedTensor.fit(unit, bits, granularity, rule) for rule in ("mse", "max"))
    assert squared_error(unit, mse) <= squared_error(unit, largest) * (1 + 1e-12)


@pytest.mark.parametrize("bits", [2, 3, 4, 6, 8])
@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("sample", [2**17, 512])
def test_alternation_comes_close_to_the_global_minimum(
    bits: int, granularity: str, sample: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    w = torch.randn(8, 1000, dtype=torch.float64) * torch.logspace(-3, 3, 8, dtype=torch.float64).view(-1, 1)
    if granularity == "tensor":
        w = w.sign() * w.abs() ** 0.5
    best, largest = (QuantizedTensor.fit(w, bits, granularity, rule) for rule in ("mse", "max"))
    monkeypatch.setattr(rounding, "_SWEEP_LIMIT", 0)
    monkeypatch.setattr(rounding, "_SAMPLE_LIMIT", sample)
    found = QuantizedTensor.fit(w, bits, granularity, "mse")
    scales = (w.square().sum(1, keepdim=True) if granularity == "row" else w.square().sum()).sqrt()

    def relative(q: QuantizedTensor) -> float:
        return float(((w - q.dequantize()) / scales).square().sum())

    assert relative(best) * (1 - 1e-9) <= relative(found) <= 1.1 * relative(best)
    assert relative(found) <= relative(largest)


def test_rows_are_fitted_one_by_one() -> None:
    w = torch.randn(5, 40, dtype=torch.float64)
    for rule in ("max", "mse"):
        for bits in (1, 2, 5):
            rows = torch.stack([fit_scale(row, bits, rule) for row in w])
            assert torch.equal(fit_scale(w, bits, rule, dim=0), rows.view(5, 1))


# --- the published network


@pytest.fixture(scope="module")
def published(shared_reference: Path) -> dict[str, Tensor]:
    parts = {name: value.double() for name, value in load_file(shared_reference).items()}
    a, k = parts["A"], parts["S"] - parts["S"].T
    margin = nn.functional.softplus(parts["m_raw"]) + 1e-4
    return {"A": a, "K": k, "margin": margin, "W": (1 - margin) * torch.eye(100) - a.T @ a + k}


@pytest.mark.parametrize(("bits", "change"), [(4, 0.60384), (6, 0.13745), (8, 0.03467)])
def test_published_perturbation(published: dict[str, Tensor], bits: int, change: float) -> None:
    delta = QuantizedTensor.fit(published["W"], bits).dequantize() - published["W"]
    assert float(torch.linalg.matrix_norm(delta, 2)) == pytest.approx(change, abs=5e-6)


@pytest.mark.parametrize("bits", [1, 2, 4, 6])
def test_structured_scales_are_the_best_a_scan_finds(published: dict[str, Tensor], bits: int) -> None:
    a, k = published["A"], published["K"]
    for w, q in (
        (a.flatten(), QuantizedTensor.fit(a, bits, scale="mse")),
        (k[k.triu(1) != 0], QuantizedSkew.fit(k, bits, "mse")),
    ):
        found = float((w - (q.codes.double() * q.scale.double()).flatten()).square().sum())
        for fraction in np.linspace(0.05, 1.2, 1151):
            scale = torch.tensor(fraction * float(w.abs().max()) / levels(bits))
            codes = round_to_codes(w, scale, bits).double()
            assert found <= float((w - codes * scale.double()).square().sum()) * (1 + 1e-9)


@pytest.mark.parametrize("bits", [1, 2, 4])
def test_structure_keeps_the_margin(published: dict[str, Tensor], bits: int) -> None:
    a, k = (
        QuantizedTensor.fit(published["A"], bits, scale="mse"),
        QuantizedSkew.fit(published["K"], bits, "mse"),
    )
    kept = published["margin"] * torch.eye(100) + a.dequantize().T @ a.dequantize() - k.dequantize()
    assert float(torch.linalg.eigvalsh((kept + kept.T) / 2)[0]) == pytest.approx(0.226887, abs=1e-6)
