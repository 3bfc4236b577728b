"""Swapping weights for codes: what is stored, what it weighs, what is left alone, and what is refused."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import equipoise as eq
from catalogue import SCHEME_KINDS
from equipoise.errors import InputError, NotWellPosedError, OptionError, StructureError
from equipoise.layers import QuantizedLinear
from equipoise.operators import QuantizedWeight
from equipoise.quantization import QuantizedSkew, QuantizedTensor, levels
from problems import true_margin

F64 = torch.float64
N, D, RANK, CLASSES = 5, 3, 2, 4
BITS = [*range(1, 17), 32]


def classifier(dtype: torch.dtype = torch.float32) -> nn.Sequential:
    return nn.Sequential(eq.MonDEQ(D, N, rank=RANK, margin=0.3), nn.Linear(N, CLASSES)).to(dtype)


def scale_bytes(bits: int, count: int = 1) -> int:
    return count * (8 if bits == 32 else 4)


# What is stored


KEYS = {
    eq.Assembled: {"codes.codes", "codes.scale"},
    eq.Structured: {"A.codes", "A.scale", "K.upper.codes", "K.upper.scale", "margin"},
    eq.Compensated: {"off_diagonal.codes", "off_diagonal.scale", "diagonal.codes", "diagonal.scale"},
    eq.Cayley: {"C.codes", "C.scale", "alpha"},
}


@pytest.mark.parametrize("kind", KEYS)
def test_a_quantized_layer_holds_codes_and_scales_only(kind: Any) -> None:
    model = classifier()
    state = eq.quantize(model, kind(3, input_bits=4, bias_bits=5, head_bits=6)).state_dict()
    expected = {f"0.recurrent.{key}" for key in KEYS[kind]}
    expected |= {f"0.injection.{name}.{part}" for name in ("weight", "bias") for part in ("codes", "scale")}
    assert set(state) == expected | {"1.weight.codes", "1.weight.scale", "1.bias"}
    for key, tensor in state.items():
        if key.endswith("codes"):
            assert tensor.dtype in (torch.int8, torch.int16, torch.int32)
        elif key != "1.bias":
            assert tensor.numel() in (1, RANK, N, CLASSES), f"{key} is as large as a float matrix"
            assert not (tensor.ndim == 1 and tensor.numel() > 1)
    kept = eq.quantize(model, kind(3)).state_dict()
    assert set(kept) == {key for key in expected if "injection" not in key} | {
        "0.injection.weight", "0.injection.bias", "1.weight", "1.bias"
    }  # fmt: skip
    assert torch.equal(kept["0.injection.weight"], model[0].injection.weight)


@pytest.mark.parametrize("kind", SCHEME_KINDS)
@pytest.mark.parametrize("bits", BITS)
def test_bits_are_honoured(kind: Any, bits: int) -> None:
    other = BITS[-1 - BITS.index(bits)]
    options = {"scale": "max", "input_bits": other, "bias_bits": bits, "head_bits": other}
    model = eq.quantize(classifier(), kind(bits, **options))
    found = {name: m for name, m in model.named_modules() if isinstance(m, QuantizedTensor)}
    for name, codes in found.items():
        wide = name in ("0.injection.weight", "1.weight")
        expected = 16 if name.endswith(".diagonal") else other if wide else bits
        assert codes.bits == expected
        assert int(codes.codes.abs().max()) <= levels(expected)
        assert expected == 1 or int(codes.codes.abs().max()) > 0.4 * levels(expected)
        assert codes.scale.dtype == (F64 if expected == 32 else torch.float32)
    assert isinstance(model[0].recurrent, QuantizedWeight)
    assert model[0].scheme == kind(bits, **options)


@pytest.mark.parametrize(("option", "module"), [("input_bits", "weight"), ("bias_bits", "bias"), ("head_bits", "head")])
def test_each_option_acts_on_its_own_part(option: str, module: str) -> None:
    model = eq.quantize(classifier(), eq.Structured(2, **{option: 3}))
    parts = {"weight": model[0].injection, "bias": model[0].injection, "head": model[1]}
    assert isinstance(model[0].injection, QuantizedLinear) == (module != "head")
    assert isinstance(model[1], QuantizedLinear) == (module == "head")
    linear = parts[module]
    assert isinstance(linear.weight, QuantizedTensor) == (module != "bias")
    assert isinstance(linear.bias, QuantizedTensor) == (module == "bias")  # the head's bias stays float


@pytest.mark.parametrize("granularity", ["tensor", "row"])
def test_granularity_and_scale_rule_reach_every_part(granularity: str) -> None:
    model = classifier(F64)
    for rule in ("max", "mse"):
        options = {"granularity": granularity, "scale": rule, "input_bits": 3, "head_bits": 3}
        quantized = eq.quantize(model, eq.Assembled(3, **options))
        for W, codes in (
            (model[0].weight, quantized[0].recurrent.codes),
            (model[0].input_weight, quantized[0].injection.weight),
            (model[1].weight, quantized[1].weight),
        ):
            expected = QuantizedTensor.fit(W, 3, granularity, rule)
            assert torch.equal(codes.codes, expected.codes)
            assert torch.equal(codes.scale, expected.scale)
        assert isinstance(eq.quantize(model, eq.Structured(3, **options))[0].recurrent.K, QuantizedSkew)


# What it computes


@pytest.mark.parametrize("kind", SCHEME_KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, F64])
def test_a_quantized_model_computes_with_its_codes(kind: Any, dtype: torch.dtype) -> None:
    model = classifier(dtype)
    quantized, x = eq.quantize(model, kind(6, input_bits=5, bias_bits=7, head_bits=4)), torch.randn(7, D, dtype=dtype)
    layer, head = quantized
    U, b = layer.injection.weight.dequantize(dtype), layer.injection.bias.dequantize(dtype)
    assert torch.equal(layer.input_weight, U)
    assert torch.equal(layer.bias, b)
    W, near = layer.recurrent().to(dtype), 1e-4 if dtype == torch.float32 else 1e-10
    assert torch.equal(layer.weight, W)
    z = layer(x)
    assert z.dtype == dtype
    assert torch.allclose((z @ W.mT + x @ U.mT + b).relu(), z, atol=near)
    assert torch.allclose(quantized(x), z @ head.weight.dequantize(dtype).mT + model[1].bias, atol=near)
    assert [p.shape for p in quantized.parameters()] == []
    trainable = eq.quantize(model, kind(6))
    assert [name for name, _ in trainable.named_parameters()] == [
        "0.injection.weight", "0.injection.bias", "1.weight", "1.bias"
    ]  # fmt: skip
    trainable(x).square().sum().backward()
    assert float(trainable[0].injection.weight.grad.norm()) > 0
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("dtype", [torch.float32, F64])
def test_schemes_that_keep_a_margin_keep_it_at_every_width(bits: int, dtype: torch.dtype) -> None:
    for seed in range(3):
        torch.manual_seed(seed)
        layer = eq.MonDEQ(D, 12, rank=4, margin=[0.02, 0.3, 1.2][seed]).to(dtype)
        kept = eq.quantize(layer, eq.Structured(bits))
        near = 2e-5 if dtype == torch.float32 else 1e-12
        assert eq.margin(kept) >= layer.recurrent.margin.item() - near
        assert true_margin(kept.recurrent()) >= layer.recurrent.margin.item() - 1e-12
        for target in (1e-3, 0.05, 0.4):
            for diagonal_bits in (4, 8, 16, 32):
                scheme = eq.Compensated(bits, margin=target, diagonal_bits=diagonal_bits)
                assert eq.margin(eq.quantize(layer, scheme)) >= target


def test_compensation_lowers_the_diagonal_only_where_it_must() -> None:
    layer = eq.MonDEQ(D, 12, margin=2.0).double()
    quantized = eq.quantize(layer, eq.Compensated(8, margin=0.5))
    assert torch.allclose(quantized.weight.diagonal(), layer.weight.diagonal(), atol=2e-3)
    assert bool((quantized.weight.diagonal() <= layer.weight.diagonal()).all())
    narrow = eq.quantize(layer, eq.Compensated(8, margin=5.0))
    assert eq.margin(narrow) == pytest.approx(5.0, abs=2e-2)


# What is left alone


@pytest.mark.parametrize("kind", SCHEME_KINDS)
def test_the_original_is_left_as_it_was(kind: Any) -> None:
    model = classifier()
    x = torch.randn(4, D)
    before, state, modules = model(x), copy.deepcopy(model.state_dict()), list(model.modules())
    quantized = eq.quantize(model, kind(2, input_bits=2, bias_bits=2, head_bits=2))
    assert all(torch.equal(state[key], value) for key, value in model.state_dict().items())
    assert all(a is b for a, b in zip(modules, model.modules(), strict=True))
    assert torch.equal(model(x), before)
    assert model[0].scheme is None
    assert type(quantized[0]) is type(model[0])
    assert not {p.data_ptr() for p in model.parameters()} & {t.data_ptr() for t in quantized.state_dict().values()}
    for parameter in quantized.parameters():
        parameter.data.zero_()
    assert torch.equal(model(x), before)


def test_only_the_last_linear_module_is_a_head() -> None:
    inner = nn.Sequential(nn.Linear(N, D), nn.Tanh(), eq.MonDEQ(D, N))
    model = nn.Sequential(nn.Linear(2, D), eq.MonDEQ(D, N), inner, nn.Dropout(), nn.Sequential(nn.Linear(N, 2)))
    quantized = eq.quantize(model, eq.Structured(2, head_bits=3))
    assert isinstance(quantized[4][0], QuantizedLinear)
    for kept in (quantized[0], quantized[2][0]):
        assert isinstance(kept, nn.Linear)
    for layer in (quantized[1], quantized[2][2]):
        assert isinstance(layer.recurrent, QuantizedWeight)
        assert isinstance(layer.injection, nn.Linear)
    assert quantized(torch.randn(3, 2)).shape == (3, 2)


def test_a_layer_that_appears_twice_stays_one() -> None:
    layer = eq.MonDEQ(N, N)
    tied = nn.Sequential(layer, nn.Tanh(), layer)
    quantized = eq.quantize(tied, eq.Structured(3))
    assert quantized[0] is quantized[2]
    assert isinstance(quantized[0].recurrent, QuantizedWeight)
    assert eq.size(tied) == eq.size(layer)
    assert eq.size(quantized) == eq.size(eq.quantize(layer, eq.Structured(3)))
    assert len(eq.certify(quantized, tied, torch.randn(3, N)).layers) == 2


CASTS = {
    "double": lambda model: model.double(),
    "to": lambda model: model.to(F64),
    "there and back": lambda model: model.double().float().half().to(F64),
    "copy": copy.deepcopy,
    "state": lambda model: _reloaded(model),
}


def _reloaded(model: nn.Module) -> nn.Module:
    other = eq.quantize(classifier(), model[0].scheme)
    other.load_state_dict(model.state_dict())
    return other


@pytest.mark.parametrize("kind", SCHEME_KINDS)
@pytest.mark.parametrize("cast", CASTS)
def test_casts_and_copies_keep_codes_and_scales(kind: Any, cast: str) -> None:
    for bits in (3, 32):
        model = eq.quantize(classifier(), kind(bits, input_bits=bits, bias_bits=bits, head_bits=bits, scale="max"))
        W, margin = model[0].recurrent().clone(), eq.margin(model.double() if cast != "copy" else model)
        stored = {key: t.clone() for key, t in model.state_dict().items() if key != "1.bias"}
        moved = CASTS[cast](model)
        for key, tensor in stored.items():
            assert torch.equal(moved.state_dict()[key], tensor)
            assert moved.state_dict()[key].dtype == tensor.dtype
        assert torch.equal(moved[0].recurrent(), W)
        if moved[0].bias.dtype == F64:
            assert torch.equal(moved[0].weight, W)
            assert eq.margin(moved) == margin
            assert moved(torch.randn(2, D, dtype=F64)).dtype == F64


# What it weighs


def test_float_sizes_by_hand() -> None:
    layer = RANK * N + N * N + 1 + N * D + N  # A, B, m, U, b
    assert eq.size(classifier()[0]) == 4 * layer
    assert eq.size(classifier()) == 4 * (layer + N * CLASSES + CLASSES)
    assert eq.size(classifier(F64)) == 8 * (layer + N * CLASSES + CLASSES)
    dense = eq.MonDEQ.from_weights(torch.zeros(N, N), torch.zeros(N, D), torch.zeros(N))
    assert eq.size(nn.Sequential(nn.Flatten(), dense, nn.Dropout())) == 4 * (N * N + N * D + N)


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("granularity", ["tensor", "row"])
def test_quantized_sizes_by_hand(bits: int, granularity: str) -> None:
    def codes(count: int, rows: int, width: int = bits) -> int:
        return math.ceil(count * width / 8) + scale_bytes(width, rows if granularity == "row" else 1)

    def alone(count: int, width: int = bits) -> int:
        return math.ceil(count * width / 8) + scale_bytes(width)

    floats = 4 * (N * D + N + N * CLASSES + CLASSES)
    expected = {
        eq.Assembled: codes(N * N, N),
        eq.Structured: codes(RANK * N, RANK) + alone(N * (N - 1) // 2) + 8,  # m
        eq.Compensated: codes(N * (N - 1), N) + alone(N, 16),
        eq.Cayley: codes(N * N, N) + 8,  # α
    }
    for kind, recurrent in expected.items():
        options = {"granularity": granularity, "scale": "max"}
        assert eq.size(eq.quantize(classifier(), kind(bits, **options))) == recurrent + floats
        options |= {"input_bits": bits, "bias_bits": 3, "head_bits": 5}
        linear = codes(N * D, N) + alone(N, 3) + codes(N * CLASSES, CLASSES, 5) + 4 * CLASSES
        assert eq.size(eq.quantize(classifier(), kind(bits, **options))) == recurrent + linear


# What is refused


class Doubled(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * x


@pytest.mark.parametrize(
    ("model", "words"),
    [
        (Doubled(), "^Doubled is not supported"),
        (nn.Sequential(eq.MonDEQ(D, N), Doubled()), "Doubled at position '1'"),
        (nn.Sequential(eq.MonDEQ(D, N), nn.Sequential(nn.GELU())), "GELU at position '0'"),
        (nn.Sequential(nn.Conv2d(1, 1, 3), eq.MonDEQ(D, N)), "Conv2d"),
        (nn.Sequential(nn.Linear(3, 3)), "no equilibrium layer"),
        (nn.ModuleList([eq.MonDEQ(D, N)]), "ModuleList"),
    ],
)
def test_unsupported_models_are_refused_by_name(model: nn.Module, words: str) -> None:
    for use in (lambda m: eq.quantize(m, eq.Structured(4)), eq.certify, eq.margin):
        with pytest.raises(StructureError, match=words):
            use(model)


def test_quantizing_twice_is_refused() -> None:
    once = eq.quantize(classifier(), eq.Structured(4, head_bits=4))
    mixed = nn.Sequential(classifier()[0], once[1])
    with pytest.raises(StructureError, match="layer '0' is quantized already"):
        eq.quantize(once, eq.Structured(2))
    with pytest.raises(StructureError, match="head '1' is quantized already"):
        eq.quantize(mixed, eq.Structured(2, head_bits=2))
    assert isinstance(eq.quantize(mixed, eq.Structured(2))[1], QuantizedLinear)
    inputs_only = eq.MonDEQ(D, N)
    inputs_only.injection = eq.quantize(inputs_only, eq.Structured(2, input_bits=2)).injection
    with pytest.raises(StructureError, match="quantized already"):
        eq.quantize(inputs_only, eq.Structured(2))


def test_head_bits_without_a_head_are_refused() -> None:
    layer, two = eq.MonDEQ(D, N), nn.Sequential(eq.MonDEQ(D, N), nn.Linear(N, 4), nn.Linear(4, 2))
    for model in (layer, nn.Sequential(layer), two, nn.Sequential(layer, nn.Linear(N, 2), nn.ReLU())):
        with pytest.raises(StructureError, match="head_bits is 4"):
            eq.quantize(model, eq.Structured(4, head_bits=4))


@pytest.mark.parametrize("scheme", ["structured", 4, eq.Structured, None])
def test_what_is_no_scheme(scheme: Any) -> None:
    with pytest.raises(OptionError, match="scheme is"):
        eq.quantize(classifier(), scheme)


def test_weights_that_cannot_be_quantized() -> None:
    W = torch.eye(2) * 1.5
    ill = eq.MonDEQ.from_weights(W, torch.eye(2), torch.zeros(2), check=False)
    with pytest.raises(NotWellPosedError, match="Compensated") as caught:
        eq.quantize(ill, eq.Structured(4))
    assert caught.value.margin == pytest.approx(-0.5)
    assert eq.margin(eq.quantize(ill, eq.Compensated(4, margin=0.1))) >= 0.1
    for part in ("recurrent.B", "injection.weight"):
        model = classifier()
        with torch.no_grad():
            model[0].get_parameter(part)[0, 1] = math.nan
        with pytest.raises(InputError, match=r"NaN|finite"):
            eq.quantize(model, eq.Structured(4, input_bits=4))
    model = classifier()
    with torch.no_grad():
        model[1].weight[0] = math.inf
    with pytest.raises(InputError, match=r"NaN|finite"):
        eq.quantize(model, eq.Assembled(4, head_bits=4))
