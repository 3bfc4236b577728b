"""Convolutional monDEQs as codes, as certified networks and in files."""

from __future__ import annotations

import copy
from fractions import Fraction
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import equipoise as eq
from equipoise.certificates.fingerprint import fingerprint
from equipoise.errors import FileFormatError, InputError, OptionError, StructureError
from equipoise.operators.quantized_tiers import AssembledTiers, QuantizedSkewKernel, StructuredTiers, _distance
from equipoise.parametrizations.convolution import Kernels
from equipoise.quantization.codes import QuantizedTensor
from test_mon_conv import LAYERS, dense, gained, single, tiered, widened
from trainings import learns_to_compare

F64 = torch.float64


@settings(max_examples=20)
@given(st.integers(1, 4), st.sampled_from([1, 3, 5]), st.sampled_from([1, 2, 4, 8, 16]), st.integers(0, 99))
def test_skew_kernels_stay_skew(channels: int, size: int, bits: int, seed: int) -> None:
    B = torch.randn(channels, channels, size, size, generator=torch.Generator().manual_seed(seed), dtype=F64)
    K = B - B.transpose(0, 1).flip(2, 3)
    if channels * size == 1:
        return
    made = QuantizedSkewKernel.fit(K, bits, "max")
    found = made.dequantize()
    assert torch.equal(found, -found.transpose(0, 1).flip(2, 3))
    if bits == 16:
        torch.testing.assert_close(found, K, rtol=0, atol=float(K.abs().max()) * 2.0**-15)
    assert made.taps.codes.numel() == ((channels * size) ** 2 - channels) // 2


@pytest.mark.parametrize("bits", [1, 2, 4, 8, 16])
@pytest.mark.parametrize("name", ["single", "two tiers", "three tiers"])
@pytest.mark.parametrize("dtype", [torch.float32, F64], ids=["f32", "f64"])
def test_the_margin_is_kept_at_every_bit_width(bits: int, name: str, dtype: torch.dtype) -> None:
    layer = LAYERS[name]().to(dtype)
    m = float(layer.recurrent.margin)
    small = eq.quantize(layer, eq.Structured(bits=bits))
    weights, operator = small.recurrent, small.operator
    assert isinstance(weights, StructuredTiers)
    assert float(weights.margin) == m
    assert small.margin() >= m
    applied = dense(widened(operator))
    F = torch.eye(len(applied), dtype=F64) - applied
    assert float(torch.linalg.eigvalsh((F + F.mT) / 2)[0]) >= m - 1e-12
    stored = dense(weights.operator(layer.geometry, torch.zeros(1, dtype=F64)))
    apart = float(torch.linalg.matrix_norm(applied - stored, 2))
    assert apart <= operator.representation_error + 1e-13
    assert operator.representation_error < (1e-4 if dtype == torch.float32 else 1e-9)
    certificate = eq.certify(small, layer)
    change = float(torch.linalg.matrix_norm(stored - dense(widened(layer.operator)), 2))
    assert certificate.delta_norm is not None
    assert change <= certificate.delta_norm * (1 + 1e-9) + 1e-12
    if name == "single":
        assert certificate.delta_norm <= change + 1e-4 * (1 + change)
    assert certificate.certified
    assert certificate.family == "l2"


def test_assembled_and_compensated_codes() -> None:
    layer = single(channels=4, size=6, margin=0.3)
    target = 0.12
    for bits in (1, 2, 3, 8):
        assert eq.quantize(layer, eq.Compensated(bits=bits, margin=target)).margin() >= target  # type: ignore[operator]
    fine, coarse = (eq.quantize(layer, eq.Assembled(bits=bits)) for bits in (12, 2))
    assert eq.margin(fine) == pytest.approx(layer.margin(), abs=0.02)
    assert eq.margin(coarse) < 0
    assert not eq.certify(coarse).certified
    x = torch.randn(3, 2, 6, 6, dtype=F64)
    assert eq.certify(coarse, layer, x).verdict in ("converged", "diverged")


def test_schemes_that_do_not_fit_are_refused() -> None:
    one, two = single(), tiered()
    for layer, scheme in ((one, eq.Cayley(bits=4)), (two, eq.Assembled(bits=4)), (two, eq.Compensated(bits=4))):
        with pytest.raises(StructureError, match=type(scheme).__name__):
            eq.quantize(layer, scheme)
    with pytest.raises(OptionError, match="input_bits"):
        eq.quantize(one, eq.Structured(bits=4, input_bits=4))
    with pytest.raises(StructureError, match="already"):
        eq.quantize(eq.quantize(one, eq.Structured(bits=4)), eq.Structured(bits=2))
    with pytest.raises(StructureError):
        eq.prepare_qat(one, eq.Structured(bits=4))


# Networks


def network(multi: bool = False) -> nn.Sequential:
    torch.manual_seed(1)
    layer = eq.MultiTierMonDEQ(1, (2, 3), 8) if multi else eq.MonConv2d(1, 3, 8)
    pool = 2
    return nn.Sequential(
        nn.Unflatten(1, (1, 8, 8)), gained(layer), nn.AvgPool2d(pool), nn.Flatten(), nn.Linear(12 if multi else 48, 4)
    ).eval()


@pytest.mark.parametrize("multi", [False, True])
def test_displacements_and_classes_per_input(multi: bool) -> None:
    model, x = network(multi), torch.randn(8, 64)
    wide = copy.deepcopy(model).double()
    shown = []
    for bits in (2, 10):
        small = eq.quantize(model, eq.Structured(bits=bits, head_bits=16))
        certificate = eq.certify(small, model, x)
        assert certificate.displacement is not None
        assert certificate.actual_displacement is not None
        assert certificate.agreement is not None
        assert certificate.unproved is not None
        other = copy.deepcopy(small).double()
        value, truth = other[1].solve(other[0](x.double()), tol=1e-9), wide[1].solve(wide[0](x.double()), tol=1e-9)
        moved = torch.linalg.vector_norm(value.value - truth.value, dim=1)
        assert bool((moved <= certificate.displacement + value.error_bound + truth.error_bound + 1e-5).all())
        with torch.no_grad():
            same = other(x.double()).argmax(1) == wide(x.double()).argmax(1)
        proved = torch.ones(len(x), dtype=torch.bool)
        proved[certificate.unproved] = False
        assert bool(same[proved].all())
        assert certificate.agreement == pytest.approx(float(proved.double().mean()))
        shown.append(float(certificate.displacement.max()))
    assert shown[0] > shown[1] > 0
    with pytest.raises(InputError):
        eq.certify(small, model, torch.randn(3, 65))


def test_codes_times_float64_scales_are_counted_as_rounded() -> None:
    small = eq.quantize(single().double(), eq.Assembled(bits=8))
    codes = small.recurrent.codes.codes
    third = QuantizedTensor(codes, torch.tensor(0.01, dtype=F64) / 3, 8)
    exact = [int(code) * Fraction(float(third.scale)) for code in codes.flatten()]
    lost = [abs(Fraction(float(v)) - truth) for v, truth in zip(third.dequantize().flatten(), exact, strict=True)]
    operator = AssembledTiers(third).operator(small.geometry, torch.zeros(1, dtype=F64))
    assert 0 < max(lost) <= operator.representation_error < 1e-13
    tap = third.dequantize().flatten()[int(torch.tensor([float(e) for e in lost]).argmax())].view(1, 1, 1, 1)
    one = torch.ones(1, 1, 1, 1, dtype=F64)
    kernels = Kernels((one, one), (tap,), (one,))  # block (1, 0) is −2 · tap
    assert _distance(kernels, kernels, [0.0, 0.0]) >= 2 * max(lost)


@pytest.mark.parametrize("multi", [False, True])
def test_files_hold_the_very_numbers(multi: bool, tmp_path: Path) -> None:
    model, x = network(multi), torch.randn(3, 64)
    schemes: list[eq.Scheme] = [eq.Structured(bits=3, head_bits=8)]
    schemes += [] if multi else [eq.Assembled(bits=6), eq.Compensated(bits=4)]
    for kept in (model, *(eq.quantize(model, scheme) for scheme in schemes)):
        eq.save(kept, tmp_path / "file", force=True)
        again = eq.load(tmp_path / "file")
        assert torch.equal(again(x), kept(x))
        assert again[1].scheme == kept[1].scheme
        assert fingerprint(again) == fingerprint(kept)
        assert eq.margin(again) == eq.margin(kept)
        assert eq.size(again) == eq.size(kept) <= eq.size(model)
        assert {k: v.tolist() for k, v in again.state_dict().items()} == {
            k: v.tolist() for k, v in kept.state_dict().items()
        }


def test_a_layer_alone_is_a_model(tmp_path: Path) -> None:
    for layer in (single(), tiered()):
        eq.save(layer, tmp_path / "layer", force=True)
        assert eq.load(tmp_path / "layer").margin() == layer.margin()


def test_damaged_files_are_refused(tmp_path: Path) -> None:
    from safetensors import safe_open
    from safetensors.torch import save_file

    eq.save(network(), tmp_path / "good")
    with safe_open(tmp_path / "good", "pt") as file:
        tensors, metadata = {k: file.get_tensor(k) for k in file.keys()}, file.metadata()  # noqa: SIM118
    for key, value in (("1.recurrent.A.0", torch.zeros(3, 3, 5, 5)), ("1.recurrent.margin", torch.tensor(-1.0))):
        save_file({**tensors, key: value}, tmp_path / "bad", metadata)
        with pytest.raises((FileFormatError, OptionError)):
            eq.load(tmp_path / "bad")
    for old, new in (('"channels": [3]', '"channels": [3, 3]'), ('"image_size": [8, 8]', '"image_size": [8, 99999]')):
        changed = {key: value.replace(old, new) for key, value in metadata.items()}
        assert changed != metadata
        save_file(tensors, tmp_path / "bad", changed)
        with pytest.raises((FileFormatError, OptionError)):
            eq.load(tmp_path / "bad")


@pytest.mark.parametrize("multi", [False, True])
def test_it_trains(multi: bool) -> None:
    model = network(multi).train()
    model[1].training_tol = 1e-2
    torch.manual_seed(0)
    x = torch.rand(64, 64)
    y = (x[:, :32].mean(1) > x[:, 32:].mean(1)).long()
    assert learns_to_compare(model, x, y) > 0.85
    assert eq.margin(model) >= 1 - 1e-5
    for bits in (1, 2, 4, 8):
        assert eq.margin(eq.quantize(model, eq.Structured(bits=bits))) >= 1
