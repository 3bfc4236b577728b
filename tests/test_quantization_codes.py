"""Packed codes, and the modules that hold codes and scales."""

from __future__ import annotations

import copy
import math
import pickle

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from equipoise.errors import FileFormatError, InputError
from equipoise.quantization import (
    QuantizedSkew,
    QuantizedTensor,
    code_dtype,
    levels,
    pack,
    unpack,
)

BITS = [*range(1, 17), 32]


# --- packing


@st.composite
def coded(draw: st.DrawFn) -> tuple[Tensor, int]:
    bits = draw(st.sampled_from(BITS))
    top = levels(bits)
    code = st.sampled_from([-1, 1]) if bits == 1 else st.integers(-top, top) | st.sampled_from([-top, 0, top])
    values = draw(st.lists(code, max_size=40))
    return torch.tensor(values, dtype=code_dtype(bits)), bits


def test_packed_by_hand() -> None:
    def packed(bits: int, *codes: int) -> list[int]:
        return pack(torch.tensor(codes), bits).tolist()

    assert packed(1, 1, -1, -1, 1, 1) == [0b11001]
    assert packed(3, 1, -1, 3) == [0b11_111_001, 0b0]
    assert packed(4, 7, -7, 1) == [0x97, 0x01]
    assert packed(8, -1, 127) == [255, 127]
    assert packed(12, -1, 1) == [0xFF, 0x1F, 0x00]
    assert packed(16, -2, 258) == [254, 255, 2, 1]
    assert packed(32, -2) == [254, 255, 255, 255]


@given(coded())
def test_unpack_inverts_pack(case: tuple[Tensor, int]) -> None:
    codes, bits = case
    packed = pack(codes, bits)
    assert packed.dtype == torch.uint8
    assert packed.shape == (math.ceil(len(codes) * bits / 8),)
    back = unpack(packed, bits, codes.shape)
    assert back.dtype == codes.dtype
    assert torch.equal(back, codes)


@given(coded())
def test_packed_is_one_little_endian_number(case: tuple[Tensor, int]) -> None:
    codes, bits = case
    fields = [(c + 1) // 2 if bits == 1 else c % 2**bits for c in codes.tolist()]
    number = sum(field << (i * bits) for i, field in enumerate(fields))
    assert bytes(pack(codes, bits).tolist()) == number.to_bytes(math.ceil(len(codes) * bits / 8), "little")
    if bits in (8, 16, 32):
        assert bytes(pack(codes, bits).tolist()) == codes.numpy().astype(f"<i{bits // 8}").tobytes()


@given(case=coded(), data=st.data())
def test_foreign_bytes_are_refused_or_survive_a_round_trip(case: tuple[Tensor, int], data: st.DataObject) -> None:
    codes, bits = case
    raw = data.draw(st.binary(min_size=math.ceil(len(codes) * bits / 8), max_size=math.ceil(len(codes) * bits / 8)))
    packed = torch.tensor(list(raw), dtype=torch.uint8)
    try:
        back = unpack(packed, bits, codes.shape)
    except FileFormatError:
        return
    assert torch.equal(pack(back, bits), packed)


def test_shapes_are_row_major() -> None:
    codes = torch.arange(-7, 5).view(3, 4)
    assert torch.equal(unpack(pack(codes, 4), 4, (3, 4)), codes.to(torch.int8))
    assert torch.equal(pack(codes.T, 4), pack(codes.T.contiguous(), 4))
    assert torch.equal(unpack(pack(torch.tensor(3), 5), 5, ()), torch.tensor(3, dtype=torch.int8))


@pytest.mark.parametrize(
    ("packed", "bits", "shape", "message"),
    [
        ([0, 0], 4, (5,), "are 2 bytes; 5 of 4 bits take 3"),
        ([0, 0, 0, 0], 4, (5,), "are 4 bytes; 5 of 4 bits take 3"),
        ([], 4, (10**30,), "are 0 bytes"),
        ([0], 4, (-1,), "shape"),
        ([0x08], 4, (2,), "-8 is below -7, the least of 4 bits"),
        ([0, 0, 0, 128], 32, (1,), "below -2147483647"),
        ([0, 128], 16, (1,), "-32768 is below"),
        ([0b11111], 1, (4,), "not filled up with zeros"),
    ],
)
def test_corrupted_bytes_are_refused(packed: list[int], bits: int, shape: tuple[int, ...], message: str) -> None:
    with pytest.raises(FileFormatError, match=message):
        unpack(torch.tensor(packed, dtype=torch.uint8), bits, shape)


def test_packed_codes_are_a_byte_vector() -> None:
    for wrong in (torch.zeros(1, dtype=torch.int8), torch.zeros(1, 1, dtype=torch.uint8)):
        with pytest.raises(FileFormatError, match="uint8 vector"):
            unpack(wrong, 4, (2,))


@pytest.mark.parametrize(
    ("codes", "bits"),
    [([-8], 4), ([8], 4), ([-128], 8), ([0], 1), ([2], 1), ([2**31], 32), ([1.0], 4), ([True], 4)],
)
def test_codes_out_of_range_are_refused(codes: list[float], bits: int) -> None:
    with pytest.raises(InputError, match="codes"):
        pack(torch.tensor(codes), bits)
    with pytest.raises(InputError, match="codes"):
        QuantizedTensor.from_codes(torch.tensor(codes), torch.tensor(1.0), bits)


# --- modules


@pytest.mark.parametrize(
    ("scale", "message"),
    [
        (torch.tensor(1), "floating point"),
        (torch.tensor(-1.0), "none negative"),
        (torch.tensor(math.inf), "finite"),
        (torch.ones(2), "does not go with"),
        (torch.ones(3, 1), "does not go with"),
        (torch.ones(1, 2, 1), "does not go with"),
    ],
)
def test_scales_that_do_not_fit_are_refused(scale: Tensor, message: str) -> None:
    with pytest.raises(InputError, match=message):
        QuantizedTensor.from_codes(torch.ones(2, 3, dtype=torch.int8), scale, 4)


def test_packed_bytes_are_the_bytes_packed() -> None:
    w = torch.randn(7, 9)
    for bits in BITS:
        q = QuantizedTensor.fit(w, bits, "row")
        assert q.packed_bytes == pack(q.codes, bits).numel() + 7 * (8 if bits == 32 else 4)
    skew = QuantizedSkew.fit(w[:, :7] - w[:, :7].T, 3)
    assert skew.packed_bytes == math.ceil(21 * 3 / 8) + 4


def holder(bits: int) -> nn.ModuleDict:
    w = torch.randn(6, 6, dtype=torch.float64)
    return nn.ModuleDict(
        {
            "tensor": QuantizedTensor.fit(w, bits, "row", "mse"),
            "skew": QuantizedSkew.fit(w - w.T, bits),
            "linear": nn.Linear(2, 2),
        }
    )


CASTS = {
    "half": lambda m: m.half(),
    "float": lambda m: m.float(),
    "double": lambda m: m.double(),
    "bfloat16": lambda m: m.bfloat16(),
    "to": lambda m: m.to(torch.float16),
    "to_both": lambda m: m.to("cpu", torch.float64),
    "type": lambda m: m.type(torch.float16),
}


@pytest.mark.parametrize("bits", [4, 12, 32])
@pytest.mark.parametrize("cast", CASTS)
def test_casting_a_parent_changes_no_code_and_no_scale(bits: int, cast: str) -> None:
    module = holder(bits)
    before = copy.deepcopy(module)
    CASTS[cast](module)
    wanted = {"half": torch.float16, "double": torch.float64, "to": torch.float16, "bfloat16": torch.bfloat16}
    assert module["linear"].weight.dtype == wanted.get(cast, module["linear"].weight.dtype)  # it was cast
    for name in ("tensor", "skew"):
        for part in ("codes", "scale"):
            new, old = getattr(module[name], part), getattr(before[name], part)
            assert new.dtype == old.dtype
            assert torch.equal(new, old)
        assert torch.equal(module[name].dequantize(), before[name].dequantize())


def test_device_moves_reach_codes_and_scales() -> None:
    module = holder(4).to("meta")
    assert {b.device.type for b in module.buffers()} == {"meta"}
    module.to_empty(device="cpu")
    assert {b.device.type for b in module.buffers()} == {"cpu"}
    assert module["tensor"].codes.dtype == torch.int8
    assert module["tensor"].scale.dtype == torch.float32


@pytest.mark.parametrize("bits", [1, 4, 32])
def test_copies_and_states(bits: int) -> None:
    module, other = holder(bits), holder(bits)
    assert set(module.state_dict()) == {
        "tensor.codes",
        "tensor.scale",
        "skew.upper.codes",
        "skew.upper.scale",
        "linear.weight",
        "linear.bias",
    }
    assert not torch.equal(module["tensor"].dequantize(), other["tensor"].dequantize())
    other.load_state_dict(module.state_dict())
    for twin in (other, copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        for name in ("tensor", "skew"):
            assert torch.equal(twin[name].dequantize(), module[name].dequantize())
            assert twin[name].bits == bits


def test_states_that_do_not_fit_are_refused() -> None:
    w = torch.randn(4, 5)
    q = QuantizedTensor.fit(w, 4)
    with pytest.raises(RuntimeError, match="size mismatch for codes"):
        q.load_state_dict(QuantizedTensor.fit(w[:2], 4).state_dict())
    with pytest.raises(RuntimeError, match="size mismatch for scale"):
        q.load_state_dict(QuantizedTensor.fit(w, 4, "row").state_dict())
    with pytest.raises(RuntimeError, match="Missing key"):
        q.load_state_dict({"codes": q.codes})
    with pytest.raises(InputError, match=r"codes go from -127 to .*; those of 4 bits are from -7 to 7"):
        q.load_state_dict(QuantizedTensor.fit(-w.abs(), 8).state_dict())
    with pytest.raises(InputError, match="finite"):
        q.load_state_dict({"codes": q.codes, "scale": torch.tensor(math.nan)})


def test_dequantize_casts_at_the_end() -> None:
    # 3 * 0.1f in float64 is not representable in float32: cast after the product, not before
    q = QuantizedTensor.from_codes(torch.tensor([3]), torch.tensor(0.1), 3)
    exact = 3 * float(torch.tensor(0.1))
    assert q.dequantize().item() == exact
    assert q.dequantize(torch.float16).item() == torch.tensor(exact, dtype=torch.float64).half().item()
    assert q.dequantize().dtype == torch.float64


def test_fitting_takes_no_part_in_autograd() -> None:
    w = torch.randn(3, 3, requires_grad=True)
    for q in (QuantizedTensor.fit(w, 4, "row", "mse"), QuantizedSkew.fit(w - w.T, 4, "mse")):
        assert not q.dequantize().requires_grad
        assert not list(q.parameters())
