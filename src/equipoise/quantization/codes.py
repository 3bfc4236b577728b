"""Integer codes with their scales, and the dense bytes they take in a file.

A quantized module holds codes and scales only; every matrix it stands for is computed from them, so
what is proved about that matrix is proved about what is stored. Source: theory §4.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Self

import torch
from torch import Tensor, nn

from ..errors import FileFormatError, InputError
from .rounding import (
    Granularity,
    ScaleRule,
    check_bits,
    check_choice,
    code_dtype,
    fit_scale,
    levels,
    round_to_codes,
)

__all__ = ["QuantizedSkew", "QuantizedTensor", "Stored", "code_dtype", "pack", "unpack"]


def pack(codes: Tensor, bits: int) -> Tensor:
    """Dense bytes of ``codes``: ``ceil(numel * bits / 8)`` of them, a uint8 vector.

    Layout: each code takes ``bits`` bits in two's complement, codes in row-major order, each starting
    at the bit where the one before ended, least significant bit first; the last byte is filled up
    with zeros. At 8, 16 and 32 bits this is the plain little-endian array. One bit: 1 for +1, 0 for -1.

    Raises:
        OptionError: unknown ``bits``.
        InputError: a code that is no integer or that a quantizer of ``bits`` bits does not write.
    """
    _check_codes(codes, bits)
    wide = codes.detach().reshape(-1).to(_work_dtype(bits))
    if bits == 1:
        wide = (wide + 1) >> 1
    blocks = nn.functional.pad(wide & (2**bits - 1), (0, -wide.numel() % 8)).view(-1, 8)
    packed = torch.zeros(len(blocks), bits, dtype=torch.uint8, device=codes.device)
    for code, byte, shift in _overlaps(bits):
        piece = blocks[:, code] << shift if shift >= 0 else blocks[:, code] >> -shift
        packed[:, byte] |= (piece & 0xFF).to(torch.uint8)
    return packed.view(-1)[: _packed_length(codes.numel(), bits)].clone()


def unpack(packed: Tensor, bits: int, shape: Sequence[int]) -> Tensor:
    """Codes of the given ``shape`` and of dtype ``code_dtype(bits)``: exact inverse of :func:`pack`.

    Raises:
        OptionError: unknown ``bits``.
        FileFormatError: not a uint8 vector, of the wrong length, filled up with bits that are not
            zero, or holding the code ``-2^(bits-1)``, which no quantizer writes.
    """
    check_bits(bits)
    count = _count(shape)
    length = _packed_length(count, bits)
    if packed.dtype != torch.uint8 or packed.ndim != 1:
        raise FileFormatError(f"packed codes are {packed.dtype} {tuple(packed.shape)}; a uint8 vector is needed")
    if packed.numel() != length:
        raise FileFormatError(
            f"packed codes are {packed.numel()} bytes; {count} of {bits} bits take {length}: "
            "the file is truncated, or its bits or shapes are not those of its codes"
        )
    if length and int(packed[-1]) >> (8 - (8 * length - count * bits)):
        raise FileFormatError("corrupted codes: the last byte is not filled up with zeros")
    filled = nn.functional.pad(packed, (0, -length % bits)).view(-1, bits).to(_work_dtype(bits))
    blocks = torch.zeros(len(filled), 8, dtype=filled.dtype, device=packed.device)
    for code, byte, shift in _overlaps(bits):
        blocks[:, code] |= filled[:, byte] >> shift if shift >= 0 else filled[:, byte] << -shift
    codes = blocks.view(-1)[:count] & (2**bits - 1)
    half = 2 ** (bits - 1)
    codes = 2 * codes - 1 if bits == 1 else (codes ^ half) - half  # the second extends the sign
    if bits > 1 and bool((codes == -half).any()):
        raise FileFormatError(f"corrupted codes: {-half} is below {1 - half}, the least of {bits} bits")
    narrow: Tensor = codes.to(code_dtype(bits))
    return narrow.view(tuple(shape))


class Stored(nn.Module):
    """A module whose own buffers stay the numbers that were stored: it moves between devices, and no cast reaches them.

    Casting a scale would change the matrix behind the codes, and with it what was proved.
    """

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        for child in self.children() if recurse else ():
            child._apply(fn)
        for name, buffer in self._buffers.items():
            assert buffer is not None
            device = fn(buffer).device
            if device != buffer.device:
                empty = buffer.is_meta  # to_empty(): there is nothing to copy
                self._buffers[name] = torch.empty_like(buffer, device=device) if empty else buffer.to(device)
        return self


class QuantizedTensor(Stored):
    """A tensor ``scale * codes``.

    Buffers (and state keys): ``codes``, any shape, int8 up to 8 bits, int16 up to 16, int32; ``scale``,
    shape ``()`` or that of ``codes`` with 1 in every dimension the scale is shared along, e.g. ``(rows, 1)``.
    Neither changes its dtype when a module is cast: only its device follows. Loading a state with codes
    that ``bits`` bits do not hold is refused.

    Raises:
        OptionError: unknown ``bits``.
        InputError: codes out of range or not integer; a scale that is not floating point, negative,
            not finite, or of a shape that does not go with the codes.
    """

    codes: Tensor
    scale: Tensor

    def __init__(self, codes: Tensor, scale: Tensor, bits: int) -> None:
        super().__init__()
        _check_codes(codes, bits)
        _check_scale(scale, codes)
        self.bits = bits
        self.register_buffer("codes", codes.detach().to(code_dtype(bits)).contiguous())
        self.register_buffer("scale", scale.detach())

    @classmethod
    def fit(cls, w: Tensor, bits: int, granularity: Granularity = "tensor", scale: ScaleRule = "max") -> Self:
        """Quantize ``w`` (any shape, finite): fit its scale or scales, then round against them as stored.

        ``granularity="row"`` gives each index of the first dimension its own scale; a vector counts as
        one row. See :func:`fit_scale` and :func:`round_to_codes`.
        """
        check_choice(granularity, "granularity", ("tensor", "row"))
        fitted = fit_scale(w, bits, scale, dim=0 if granularity == "row" else None)
        return cls(round_to_codes(w, fitted, bits), fitted, bits)

    @classmethod
    def from_codes(cls, codes: Tensor, scale: Tensor, bits: int) -> Self:
        """The tensor of given ``codes`` and ``scale``, e.g. read from a file."""
        return cls(codes, scale, bits)

    def dequantize(self, dtype: torch.dtype = torch.float64) -> Tensor:
        """``scale * codes`` in the shape of ``codes``, computed in float64, then cast to ``dtype``."""
        return (self.codes.to(torch.float64) * self.scale.to(torch.float64)).to(dtype)

    @property
    def shape(self) -> torch.Size:
        """Shape of the tensor the codes stand for."""
        return self.codes.shape

    @property
    def exact(self) -> bool:
        """Whether code · scale is exact in float64: a float32 scale has 24 bits, a code at most 16."""
        return self.bits <= 16 and self.scale.dtype == torch.float32

    @property
    def packed_bytes(self) -> int:
        """Bytes in a file: the codes at their bits, densely packed, and the scales as they are."""
        return _packed_length(self.codes.numel(), self.bits) + self.scale.numel() * self.scale.element_size()

    def extra_repr(self) -> str:
        return f"shape={tuple(self.shape)}, bits={self.bits}, scales={self.scale.numel()}"

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
        codes, scale = state_dict.get(prefix + "codes"), state_dict.get(prefix + "scale")
        if codes is not None:
            _check_codes(codes, self.bits)
            if scale is not None:
                _check_scale(scale, codes)
        super()._load_from_state_dict(state_dict, prefix, *rest)


class QuantizedSkew(nn.Module):
    """A skew-symmetric matrix ``K`` (n, n): codes above its diagonal, mirrored with the sign below it.

    Its one submodule ``upper`` is the :class:`QuantizedTensor` of the ``n (n - 1) / 2`` entries of the
    strict upper triangle, row by row, with one scale (state keys ``upper.codes``, ``upper.scale``).
    The matrix is exactly skew, with zeros on the diagonal, whatever the codes: row scales would destroy
    that, and codes of -1 and +1 on the diagonal would cost margin. Source: theory §4.

    Raises:
        InputError: ``upper`` is not a vector of ``n (n - 1) / 2`` codes with one scale.
    """

    def __init__(self, upper: QuantizedTensor, size: int) -> None:
        super().__init__()
        expected = (size * (size - 1) // 2,)
        if size < 0 or tuple(upper.shape) != expected or upper.scale.ndim:
            raise InputError(
                f"a skew matrix of size {size} has {expected[0]} codes in a vector and one scale; "
                f"got codes {tuple(upper.shape)} and scale {tuple(upper.scale.shape)}"
            )
        self.size = size
        self.upper = upper

    @classmethod
    def fit(cls, k: Tensor, bits: int, scale: ScaleRule = "max") -> Self:
        """Quantize ``k`` (n, n), with its scale fitted off the diagonal.

        Raises:
            OptionError: unknown ``bits`` or ``scale``.
            InputError: ``k`` is not a square matrix, not finite, or not exactly skew.
        """
        if k.ndim != 2 or k.shape[0] != k.shape[1]:
            raise InputError(f"a skew matrix is {tuple(k.shape)}; it is square")
        upper = QuantizedTensor.fit(k[_above_diagonal(k.shape[0], k.device)], bits, scale=scale)
        defect = (k.detach() + k.detach().T).abs()
        if bool((defect != 0).any()):  # NaN and infinity below the diagonal end here as well
            raise InputError(f"not skew-symmetric: |K + Kᵀ| reaches {float(defect.max()):.3g}; pass B - Bᵀ")
        return cls(upper, k.shape[0])

    @classmethod
    def from_codes(cls, codes: Tensor, scale: Tensor, bits: int, size: int) -> Self:
        """The matrix (size, size) of given ``codes`` (size (size - 1) / 2,) and ``scale`` ()."""
        return cls(QuantizedTensor.from_codes(codes, scale, bits), size)

    def dequantize(self, dtype: torch.dtype = torch.float64) -> Tensor:
        """The matrix (n, n), exactly skew: computed in float64, then cast to ``dtype``."""
        half = torch.zeros(self.shape, dtype=dtype, device=self.codes.device)
        half[_above_diagonal(self.size, half.device)] = self.upper.dequantize(dtype)
        return half - half.T

    @property
    def bits(self) -> int:
        """Bits of a code."""
        return self.upper.bits

    @property
    def codes(self) -> Tensor:
        """Codes of the strict upper triangle, row by row, shape (n (n - 1) / 2,)."""
        return self.upper.codes

    @property
    def scale(self) -> Tensor:
        """The one scale, shape ()."""
        return self.upper.scale

    @property
    def shape(self) -> torch.Size:
        """(n, n)."""
        return torch.Size((self.size, self.size))

    @property
    def packed_bytes(self) -> int:
        """Bytes in a file: half the matrix at its bits, and one scale."""
        return self.upper.packed_bytes

    def extra_repr(self) -> str:
        return f"size={self.size}"


def _check_codes(codes: Tensor, bits: int) -> None:
    top = levels(bits)
    if codes.is_floating_point() or codes.is_complex() or codes.dtype == torch.bool:
        raise InputError(f"codes are {codes.dtype}; integers are needed")
    if codes.numel() == 0 or codes.is_meta:
        return
    low, high = (int(end) for end in codes.aminmax())
    if low < -top or high > top or (bits == 1 and bool((codes == 0).any())):
        allowed = "-1 or +1" if bits == 1 else f"from {-top} to {top}"
        raise InputError(f"codes go from {low} to {high}; those of {bits} bits are {allowed}")


def _check_scale(scale: Tensor, codes: Tensor) -> None:
    if not scale.is_floating_point():
        raise InputError(f"a scale is {scale.dtype}; floating point is needed")
    pairs = zip(scale.shape, codes.shape, strict=False)  # none for a single scale
    if scale.ndim not in (0, codes.ndim) or any(s not in (1, c) for s, c in pairs):
        raise InputError(f"scale {tuple(scale.shape)} does not go with codes {tuple(codes.shape)}")
    if not scale.is_meta and not bool(((scale >= 0) & torch.isfinite(scale)).all()):
        raise InputError(f"scales are {scale.flatten()[:8].tolist()}; finite ones, none negative, are needed")


def _above_diagonal(size: int, device: torch.device) -> tuple[Tensor, Tensor]:
    rows, columns = torch.triu_indices(size, size, 1, device=device)
    return rows, columns


def _count(shape: Sequence[int]) -> int:
    if any(size < 0 for size in shape):
        raise FileFormatError(f"a tensor cannot have the shape {tuple(shape)}")
    return math.prod(shape)


def _packed_length(count: int, bits: int) -> int:
    return -(-count * bits // 8)


def _work_dtype(bits: int) -> torch.dtype:
    return torch.int32 if bits <= 16 else torch.int64


def _overlaps(bits: int) -> Iterator[tuple[int, int, int]]:
    """Where 8 codes lie in their ``bits`` bytes: (code, byte, bit the code starts at, from the byte's)."""
    for code in range(8):
        first = code * bits
        for byte in range(first // 8, (first + bits - 1) // 8 + 1):
            yield code, byte, first - 8 * byte
