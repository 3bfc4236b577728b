"""Rounding that gradients pass through: what it stores, which scale it follows, and which gradient it gives."""

from __future__ import annotations

import copy
import io
import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from equipoise.errors import InputError, OptionError
from equipoise.quantization import QuantizedSkew, QuantizedTensor, fit_scale, levels
from equipoise.quantization.straight_through import MANY, REFIT, FakeQuantize, Seen

F64 = torch.float64
TINY = torch.finfo(torch.float32).tiny
BITS = [*range(1, 17), 32]
RULES = st.sampled_from(["max", "mse"])
GRANULARITIES = st.sampled_from(["tensor", "row"])


def error(rounding: FakeQuantize, w: Tensor) -> float:
    return float((rounding(w) - w.double()).square().sum())


def off_diagonal(w: Tensor) -> Tensor:
    return w[~torch.eye(len(w), dtype=torch.bool)].reshape(len(w), len(w) - 1)


# What it computes is what it stores


@given(
    shape=st.sampled_from([(1,), (7,), (0, 4), (1, 1), (3, 5), (6, 2), (4, 1)]),
    bits=st.sampled_from(BITS),
    granularity=GRANULARITIES,
    rule=RULES,
    unit=st.sampled_from([1e-20, 1.0, 1e6]),
    dtype=st.sampled_from([torch.float32, F64]),
    learn=st.booleans(),
)
def test_the_value_is_code_times_scale(
    shape: tuple[int, ...], bits: int, granularity: str, rule: str, unit: float, dtype: torch.dtype, learn: bool
) -> None:
    w = (torch.randn(shape) * unit).to(dtype).requires_grad_()
    rounding = FakeQuantize(w, bits, granularity, rule, learn=learn)
    stored = QuantizedTensor.fit(w.detach(), bits, granularity, rule)
    if not learn:  # from the start it is what quantizing gives; a learned one is so up to the rounding of its logarithm
        assert torch.equal(rounding(w), stored.dequantize())
    elif w.numel():
        assert torch.allclose(rounding.current_scale(), stored.scale, rtol=2e-5)
    for step in (0.0, 0.7, -0.2):
        with torch.no_grad():
            w += step * unit * torch.randn(shape, dtype=dtype)
        rounding.fit(w)
        codes = rounding.quantized(w)
        assert (codes.bits, codes.shape, codes.scale.dtype) == (bits, w.shape, stored.scale.dtype)
        assert codes.scale.shape == stored.scale.shape
        assert torch.equal(rounding(w), codes.dequantize()), "the value with its graph"
        assert torch.equal(rounding(w.detach()), codes.dequantize()), "and without"
        assert rounding(w).dtype == F64


@pytest.mark.parametrize("bits", [1, 2, 5, 16, 32])
@pytest.mark.parametrize("n", [1, 2, 6])
def test_parts_of_a_square_matrix(bits: int, n: int) -> None:
    b = torch.randn(n, n)
    k, w = b - b.mT, b * 1.0
    for rule in ("max", "mse"):
        skew = FakeQuantize(k, bits, "tensor", rule, part="skew")
        stored = QuantizedSkew.fit(k, bits, rule).dequantize()
        assert torch.equal(skew(k), stored) if bits < 32 else torch.allclose(skew(k), stored, rtol=0, atol=1e-8)
        for granularity in ("tensor", "row"):
            off = FakeQuantize(w, bits, granularity, rule, part="off_diagonal")
            expected = QuantizedTensor.fit(off_diagonal(w), bits, granularity, rule)
            assert torch.equal(off_diagonal(off(w)), expected.dequantize())
            assert not off(w).diagonal().any()
            w.diagonal().mul_(1e9)  # the diagonal has no say in the scale, now
            off.fit(w)
            if bits < MANY or rule == "max":
                assert torch.allclose(off.scale, expected.scale, rtol=1e-6, atol=2 * TINY)
            assert torch.equal(off_diagonal(off(w)), off.quantized_off_diagonal(w).dequantize())
        for _ in range(3):  # and stays exactly skew whatever happens to the scale
            skew.fit(k)
            skew.scale *= 0.7
            K = skew(k)
            assert torch.equal(K, -K.mT)
            assert torch.equal(K, skew.quantized_skew(k).dequantize())


# Scales that follow the weights


@given(
    shape=st.sampled_from([(5,), (3, 4), (1, 6), (8, 1), (2, 3, 2)]),
    bits=st.sampled_from(BITS[1:]),
    granularity=GRANULARITIES,
    factors=st.lists(st.sampled_from([0.0, 1e-6, 0.1, 1.0, 3.0, 1e5]), min_size=1, max_size=4),
)
def test_the_largest_weight_is_the_largest_level_after_every_fit(
    shape: tuple[int, ...], bits: int, granularity: str, factors: list[float]
) -> None:
    w = torch.randn(shape)
    rounding = FakeQuantize(w, bits, granularity, "max")
    for factor in factors:
        w = w * factor + torch.randn(shape) * (factor > 0)
        rounding.fit(w)
        expected = fit_scale(w, bits, "max", 0 if granularity == "row" else None)
        assert torch.equal(rounding.scale, expected.clamp(min=torch.finfo(expected.dtype).tiny))


def test_one_bit_takes_the_mean_size() -> None:
    w = torch.tensor([[1.0, -2.0, 0.0], [4.0, 4.0, -1.0]])
    for rule in ("max", "mse"):
        whole, rows = (FakeQuantize(torch.ones(2, 3), 1, granularity, rule) for granularity in ("tensor", "row"))
        whole.fit(w)
        rows.fit(w)
        assert float(whole.scale) == 2.0
        assert rows.scale.tolist() == [[1.0], [3.0]]
        assert rows(w).tolist() == [[1.0, -1.0, 1.0], [3.0, 3.0, -3.0]]
    square = torch.tensor([[90.0, 1.0, -2.0], [3.0, 90.0, 0.0], [-5.0, 1.0, 90.0]])
    off, rows = (FakeQuantize(square * 0.1, 1, g, part="off_diagonal") for g in ("tensor", "row"))
    off.fit(square)
    rows.fit(square)
    assert float(off.scale) == 2.0
    assert rows.scale.tolist() == [[1.5], [1.5], [3.0]]


@pytest.mark.parametrize("granularity", ["tensor", "row"])
@pytest.mark.parametrize("bits", [2, 3, 4, 6, 8, 12, 16])
def test_least_squares_follows_weights_that_drift(bits: int, granularity: str) -> None:
    w = torch.randn(6, 60)
    rounding = FakeQuantize(w, bits, granularity, "mse")
    for step in range(60):
        w = w * (1.005 if step < 30 else 0.995) + 0.005 * torch.randn(6, 60)
        rounding.fit(w)
        found = error(rounding, w)
        assert found <= 1.2 * error(FakeQuantize(w, bits, granularity, "max"), w)
        assert bits >= MANY or found <= 1.4 * error(FakeQuantize(w, bits, granularity, "mse"), w)


@pytest.mark.parametrize("factor", [1e-12, 1e-3, 0.1, 0.24, 0.5, 4.0, 1e6])
@pytest.mark.parametrize("part", ["all", "off_diagonal", "skew"])
def test_no_jump_of_the_weights_leaves_them_without_levels(part: str, factor: float) -> None:
    """Weights that fall below half a level all take code 0: a round of least squares from there finds nothing."""
    b = torch.randn(12, 12)
    w = b - b.mT
    for granularity in ("tensor",) if part == "skew" else ("tensor", "row"):
        rounding = FakeQuantize(w, 2, granularity, "mse", part=part)
        fresh = FakeQuantize(w * factor, 2, granularity, "mse", part=part)
        for _ in range(8):
            rounding.fit(w * factor)
        assert error(rounding, w * factor) <= 1.15 * error(fresh, w * factor)


@pytest.mark.parametrize("bits", [2, 4, 7])
def test_least_squares_at_rest_reaches_the_best_scale(bits: int) -> None:
    w = torch.randn(5, 20)
    w[0] *= 7
    for granularity, dim in (("tensor", None), ("row", 0)):
        rounding = FakeQuantize(w, bits, granularity, "mse")
        rounding.fit(w * 1.6)  # somewhere else
        previous = error(rounding, w)
        for _ in range(2, REFIT):
            rounding.fit(w)
            before, previous = previous, error(rounding, w)
            assert previous <= before * (1 + 1e-6)
        rounding.fit(w)  # the fit that looks everywhere again
        assert rounding.fits == REFIT
        assert torch.equal(rounding.scale, fit_scale(w, bits, "mse", dim))


def test_zeros_have_a_scale_that_can_be_divided_by() -> None:
    zeros = torch.zeros(3, 4)
    for bits in (1, 2, 32):
        for rule in ("max", "mse"):
            for granularity in ("tensor", "row"):
                rounding = FakeQuantize(zeros, bits, granularity, rule)
                assert torch.equal(rounding(zeros), zeros.double())
                rounding.fit(zeros)
                assert bool((rounding.scale > 0).all())
                assert float(rounding(zeros).abs().max()) <= TINY
                w = torch.randn(3, 4)
                for _ in range(3):
                    rounding.fit(w)
                assert error(rounding, w) <= 1.05 * error(FakeQuantize(w, bits, granularity, "max"), w)


# Gradients


def gradients(rounding: FakeQuantize, w: Tensor, toward: Tensor) -> tuple[Tensor, Tensor | None]:
    w = w.clone().requires_grad_()
    rounding.zero_grad()
    (rounding(w) * toward).sum().backward()
    assert w.grad is not None
    return w.grad, rounding.log_scale.grad if rounding.learned else None


@pytest.mark.parametrize("part", ["all", "off_diagonal", "skew"])
@pytest.mark.parametrize("bits", [1, 2, 8, 32])
def test_a_fitted_scale_lets_every_gradient_through(bits: int, part: str) -> None:
    w, toward = torch.randn(4, 4), torch.randn(4, 4, dtype=F64)
    w = w - w.mT if part == "skew" else w
    rounding = FakeQuantize(w * 0.3, bits, part=part)  # many are clipped
    assert torch.equal(gradients(rounding, w, toward)[0], toward.float())


def test_the_gradient_of_a_learned_scale_by_hand() -> None:
    """At 3 bits and s = 1 the codes are −3 … 3: inside, c − w/s; beyond, ±3; by 1/√(5 · 3), times s for log s."""
    w = torch.tensor([0.4, -1.8, 2.5, 3.6, -9.0])
    rounding = FakeQuantize(torch.tensor([3.0]), 3, rule="max", learn=True)
    assert float(rounding.log_scale.detach()) == 0.0
    assert rounding(w).tolist() == [0.0, -2.0, 2.0, 3.0, -3.0]
    toward = torch.tensor([1.0, 10.0, 100.0, 1000.0, 10000.0], dtype=F64)
    grad, of_scale = gradients(rounding, w, toward)
    assert of_scale is not None
    assert grad.tolist() == [1.0, 10.0, 100.0, 0.0, 0.0]
    expected = (-0.4 * 1 - 0.2 * 10 - 0.5 * 100 + 3 * 1000 - 3 * 10000) / math.sqrt(15)
    assert math.isclose(float(of_scale), expected, rel_tol=1e-6)


def test_the_gradient_of_a_learned_scale_at_one_bit_by_hand() -> None:
    w = torch.tensor([[2.0, -4.0], [0.0, 1.0]])
    rounding = FakeQuantize(w, 1, "row", learn=True)
    assert torch.allclose(rounding.current_scale(), torch.tensor([[3.0], [0.5]]))
    grad, of_scale = gradients(rounding, w, torch.tensor([[1.0, 10.0], [100.0, 1000.0]], dtype=F64))
    assert grad.tolist() == [[1.0, 10.0], [100.0, 1000.0]]
    expected = torch.tensor([[3.0 * (1 - 10)], [0.5 * (100 + 1000)]]) / math.sqrt(2)
    assert of_scale is not None
    assert torch.allclose(of_scale, expected, rtol=1e-6)


@given(bits=st.sampled_from([2, 3, 5, 8, 16, 32]), granularity=GRANULARITIES, stretch=st.sampled_from([0.2, 1.0, 5.0]))
def test_the_gradient_of_a_learned_scale_against_its_formula(bits: int, granularity: str, stretch: float) -> None:
    w, toward = torch.randn(3, 7, dtype=F64) * stretch, torch.randn(3, 7, dtype=F64)
    rounding = FakeQuantize(torch.randn(3, 7), bits, granularity, learn=True)
    grad, of_scale = gradients(rounding, w, toward)
    s, top = rounding.current_scale().detach().double().expand(3, 7), levels(bits)
    assert torch.equal(grad, toward * ((w / s).abs() <= top))
    codes = (w / s).round().clamp(-top, top)
    local = torch.where((w / s).abs() <= top, codes - w / s, torch.sign(w) * top) * s * toward
    group = 7 if granularity == "row" else 21
    expected = (local.sum(1, keepdim=True) if granularity == "row" else local.sum()) / math.sqrt(group * top)
    assert of_scale is not None
    assert torch.allclose(of_scale.double(), expected, rtol=1e-5, atol=1e-12 + 1e-9 * float(local.abs().sum()))


def test_frozen_weights_still_teach_a_learned_scale() -> None:
    rounding = FakeQuantize(torch.randn(9), 2, learn=True)
    rounding(torch.randn(9)).square().sum().backward()
    assert rounding.log_scale.grad is not None
    assert float(rounding.log_scale.grad) != 0
    rounding.log_scale.requires_grad_(False)
    assert not rounding(torch.randn(9)).requires_grad


def trained(w: Tensor, rounding: FakeQuantize, toward: Tensor) -> Tensor:
    w = nn.Parameter(w)
    optimizer = torch.optim.Adam([w, *rounding.parameters()], 3e-2)
    for _ in range(400):
        rounding.fit(w)
        optimizer.zero_grad()
        (rounding(w) - toward).square().sum().backward()
        optimizer.step()
    return rounding(w).detach()


@pytest.mark.parametrize("learn", [False, True])
@pytest.mark.parametrize("bits", [1, 3])
def test_weights_that_begin_at_zero_learn(bits: int, learn: bool) -> None:
    """A scale learned from zeros would be the smallest number there is: every weight clipped, no gradient."""
    toward = torch.tensor([2.0, -2.0, 2.0, -2.0], dtype=F64)
    found = trained(torch.zeros(4), FakeQuantize(torch.zeros(4), bits, learn=learn), toward)
    assert float((found - toward).abs().max()) < 0.3


# State


@pytest.mark.parametrize("learn", [False, True])
def test_the_state_holds_the_scale_and_the_count(learn: bool) -> None:
    w = torch.randn(4, 9)
    rounding = FakeQuantize(w, 3, "row", learn=learn)
    for _ in range(REFIT - 2):
        rounding.fit(w * 1.3)
    again = FakeQuantize(torch.randn(4, 9), 3, "row", learn=learn)
    buffer = io.BytesIO()
    torch.save(rounding.state_dict(), buffer)
    buffer.seek(0)
    again.load_state_dict(torch.load(buffer, weights_only=True))
    assert again.fits == rounding.fits == (0 if learn else REFIT - 2)
    for _ in range(3):  # across the fit that looks everywhere again
        rounding.fit(w)
        again.fit(w)
        assert torch.equal(again.current_scale(), rounding.current_scale())


def test_a_learned_scale_that_waits_for_weights_waits_in_its_state_too() -> None:
    waiting = FakeQuantize(torch.zeros(3), 4, learn=True)
    again, done = FakeQuantize(torch.ones(3), 4, learn=True), FakeQuantize(torch.zeros(3), 4, learn=True)
    again.load_state_dict(waiting.state_dict())
    again.fit(torch.full((3,), 0.5))
    assert torch.allclose(again(torch.full((3,), 0.5)), torch.full((3,), 0.5, dtype=F64), rtol=1e-5)
    done.load_state_dict(again.state_dict())
    done.fit(torch.ones(3))  # not a second time
    assert torch.equal(done.log_scale, again.log_scale)


@pytest.mark.parametrize("bits", [4, 32])
@pytest.mark.parametrize("learn", [False, True])
@pytest.mark.parametrize("cast", [nn.Module.double, nn.Module.float, nn.Module.half])
def test_a_cast_leaves_the_scale_alone(cast: Callable[[nn.Module], nn.Module], learn: bool, bits: int) -> None:
    w = torch.randn(5, 5)
    rounding = FakeQuantize(w, bits, learn=learn)
    scale = rounding.current_scale().clone()
    cast(rounding)
    assert rounding.current_scale().dtype == scale.dtype
    assert torch.equal(rounding.current_scale(), scale)
    meta = copy.deepcopy(rounding).to("meta")
    assert meta.current_scale().is_meta
    assert meta.to_empty(device="cpu").current_scale().dtype == scale.dtype


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"bits": 0}, "1 to 16, or 32"),
        ({"bits": 17}, "1 to 16, or 32"),
        ({"bits": 2, "granularity": "column"}, "granularity"),
        ({"bits": 2, "rule": "mean"}, "scale is 'mean'; it is one of"),
        ({"bits": 2, "part": "diagonal"}, "part"),
    ],
)
def test_options_out_of_range_are_refused(options: dict[str, object], message: str) -> None:
    with pytest.raises(OptionError, match=message):
        FakeQuantize(torch.ones(2, 2), **options)  # type: ignore[arg-type]


def test_weights_that_are_not_finite_are_refused() -> None:
    for bad in (math.nan, math.inf):
        with pytest.raises(InputError, match="finite"):
            FakeQuantize(torch.tensor([1.0, bad]), 4)


# What it was fitted to


def fused(w: nn.Parameter) -> None:
    w.grad = torch.ones_like(w)
    torch.optim.Adam([w], 1e-2, fused=True).step()


@torch.no_grad()
def in_place(w: nn.Parameter) -> None:
    w.add_(1)


@pytest.mark.parametrize(
    "write",
    [
        in_place,
        fused,
        lambda w: w.data.mul_(2),
        lambda w: nn.utils.vector_to_parameters(torch.zeros(w.numel()), [w]),
        nn.init.normal_,
        lambda w: w.detach().copy_(w.detach().clone()),  # the same values: a state that was loaded
    ],
)
def test_every_way_to_write_is_seen(write: Callable[[nn.Parameter], object]) -> None:
    w, seen = nn.Parameter(torch.randn(3, 2)), Seen()
    assert seen.changed([w])
    assert not seen.changed([w])
    write(w)
    if write is fused:
        assert w._version == 0, "that it counts no version is why values are compared"
    assert seen.changed([w])
    assert not seen.changed([w])
    assert seen.changed([w.double()])
    assert seen.changed([w, w])


def test_a_copy_has_seen_the_same() -> None:
    w, seen = nn.Parameter(torch.randn(3)), Seen()
    in_place(w)
    seen.changed([w])
    twin, other = copy.deepcopy((w, seen))
    assert not other.changed([twin]), "though its versions begin anew"
    in_place(twin)
    assert other.changed([twin])
    in_place(w)
    twin, other = copy.deepcopy((w, seen))  # written to since
    assert other.changed([twin])
    assert seen.changed([w])
