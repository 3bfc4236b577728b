"""Rounding that gradients pass straight through, with a scale that follows the weights (theory §4).

For training with quantized weights: the forward value is exactly code · scale, the gradient is that of the
unrounded weight [Bengio 2013]; a learned scale gets the gradient of LSQ [Esser 2020].
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any, Literal, Self, final

import torch
from torch import Tensor, nn

from .codes import QuantizedSkew, QuantizedTensor
from .rounding import Granularity, ScaleRule, check_choice, code_dtype, fit_scale, levels

__all__ = ["FakeQuantize", "Seen"]

Part = Literal["all", "off_diagonal", "skew"]

REFIT = 500
"""Fits after which a least-squares scale is searched for globally again; in between it is improved from where it is."""

MANY = 8
"""Bits from which a fitted scale is that of ``"max"``: with so many levels the two differ by a percent or so, and a
round of least squares hardly moves, so that growing weights would be clipped further in every step."""

COMPETE = 4
"""Fits after which another scale competes with the one at hand."""

NEAR = 1.05
"""What a least-squares scale is multiplied or divided by, in turns, to see whether it should move."""


@final
class FakeQuantize(nn.Module):
    """w ↦ w̃ = s · c, ``c = clamp(round(w / s))``, with ∂w̃/∂w = 1; same shape, float64.

    The scale s is a buffer fitted by ``rule`` whenever :meth:`fit` is called (``"mse"``: one round of alternating
    least squares from the last scale, now and then from one near it or that of ``"max"`` if better, and a global
    search every 500 fits; from 8 bits on as ``"max"``), or, with ``learn``, the parameter ``log_scale`` with the
    gradient of LSQ: ∂w̃/∂s = c − w/s within the range and ±(2^(b−1) − 1) beyond it, where
    ∂w̃/∂w = 0; scaled by 1/√(N (2^(b−1) − 1)). A learned scale stays in :meth:`fit`, unless it began at nothing but
    zeros: then the first weights that are not zero set it.

    Args:
        w: the tensor as it is now; sets shape, scale and device.
        bits: 1 to 16, or 32.
        granularity: ``"tensor"``, or ``"row"`` for a scale per index of the first dimension.
        rule: ``"max"`` or ``"mse"``; where the scale is learned, what it starts from.
        part: ``"all"`` entries; those ``"off_diagonal"`` of a square matrix, its diagonal taking code 0; or
            ``"skew"``: as before, and the codes below the diagonal mirror those above it.
        learn: make the scale a parameter.

    State: ``scale`` and how many fits there were, or ``log_scale``. Scales keep their dtype when the module is cast.
    """

    scale: Tensor

    def __init__(
        self,
        w: Tensor,
        bits: int,
        granularity: Granularity = "tensor",
        rule: ScaleRule = "mse",
        part: Part = "all",
        learn: bool = False,
    ) -> None:
        super().__init__()
        check_choice(part, "part", ("all", "off_diagonal", "skew"))
        self.bits, self.top, self.rule, self.part = bits, levels(bits), rule, part
        self.rows = check_choice(granularity, "granularity", ("tensor", "row")) == "row" and w.ndim > 1
        scale = self._search(w)
        self._asleep = learn and bool((scale == 0).any())
        if learn:
            self.log_scale = nn.Parameter(_logarithm(scale))
        else:
            self.register_buffer("scale", scale)
        self.fits = 0  # on the host, so that no step waits for a GPU to say how many there were

    @property
    def learned(self) -> bool:
        return "log_scale" in self._parameters

    def current_scale(self) -> Tensor:
        """s as it would be stored: float32 up to 16 bits, a normal number."""
        if not self.learned:
            return self.scale
        limits = torch.finfo(self.log_scale.dtype)
        return self.log_scale.double().exp().clamp(limits.tiny, limits.max).to(self.log_scale.dtype)

    @torch.no_grad()
    def fit(self, w: Tensor) -> None:
        """Fit the scale to ``w`` again."""
        if not w.numel():
            return
        if self.learned:
            if self._asleep:
                self._wake(w)
            return
        self.fits += 1
        search = self.rule == "mse" and 1 < self.bits < MANY and self.fits % REFIT == 0
        scale = self._search(w) if search else self._improved(w)
        self.scale.copy_(scale.clamp(min=torch.finfo(self.scale.dtype).tiny))

    def _wake(self, w: Tensor) -> None:
        scale = self._search(w)
        unset = (self.log_scale <= _logarithm(torch.zeros_like(scale))) & (scale > 0)
        self.log_scale.copy_(torch.where(unset, _logarithm(scale), self.log_scale))
        self._asleep = bool((scale == 0).any())

    def forward(self, w: Tensor, dtype: torch.dtype = torch.float64) -> Tensor:
        """w̃ in ``dtype``: the exact product rounded once, as that of stored codes is."""
        scale = self.current_scale()
        codes = self._codes(w, scale)
        narrow = dtype == torch.float32 == scale.dtype and codes.dtype == dtype  # one product is rounded once as well
        values = codes * scale.detach() if narrow else (codes.double() * scale.detach().double()).to(dtype)
        if not (torch.is_grad_enabled() and (w.requires_grad or scale.requires_grad)):
            return values
        through = w if not self.learned else self._surrogate(w.double(), scale.double(), codes.double())
        through = through.to(dtype)
        return values + (through - through.detach())  # adds exactly 0: the value is what will be stored

    @torch.no_grad()
    def quantized(self, w: Tensor) -> QuantizedTensor:
        """The codes and the scale that :meth:`forward` multiplies; not for a skew matrix or a part of one."""
        scale = self.current_scale()
        return QuantizedTensor.from_codes(self._codes(w, scale).to(code_dtype(self.bits)), scale.clone(), self.bits)

    @torch.no_grad()
    def quantized_skew(self, w: Tensor) -> QuantizedSkew:
        """The same of a skew matrix."""
        scale, size = self.current_scale(), w.shape[0]
        rows, columns = torch.triu_indices(size, size, 1, device=w.device)
        upper = self._codes(w, scale)[rows, columns].to(code_dtype(self.bits))
        return QuantizedSkew.from_codes(upper, scale.clone(), self.bits, size)

    @torch.no_grad()
    def quantized_off_diagonal(self, w: Tensor) -> QuantizedTensor:
        """The same of the off-diagonal entries, row by row, ``(n, n − 1)``."""
        scale, size = self.current_scale(), w.shape[0]
        off = ~torch.eye(size, dtype=torch.bool, device=w.device)
        codes = self._codes(w, scale)[off].reshape(size, max(size - 1, 0))
        return QuantizedTensor.from_codes(codes.to(code_dtype(self.bits)), scale.clone(), self.bits)

    def _codes(self, w: Tensor, scale: Tensor) -> Tensor:
        """The codes as floating point, float32 where that tells them apart; entries outside the part are 0."""
        w = self._wide_enough(w)
        scale = scale.detach().to(w.dtype)
        if self.bits == 1:
            codes = torch.where(w >= 0, 1.0, -1.0).to(w.dtype)
        else:
            codes = (w / scale.clamp(min=torch.finfo(torch.float32).tiny)).round_().clamp_(-self.top, self.top)
        if self.part == "skew" and self.bits == 1:  # 0 has the sign +1 on both sides; else rounding is odd
            codes = codes.triu_(1)
            return codes - codes.mT
        if self.part == "off_diagonal":
            codes.fill_diagonal_(0)
        return codes

    def _wide_enough(self, w: Tensor) -> Tensor:
        """``w`` in a dtype that tells the codes apart."""
        return w.detach() if w.dtype == torch.float32 and self.bits <= 16 else w.detach().double()

    def _search(self, w: Tensor) -> Tensor:
        """The scale from all of ``w``, wherever it was before."""
        dim, values = (0 if self.rows else None), w.detach()
        if self.part != "all":
            n = w.shape[0]
            off = ~torch.eye(n, dtype=torch.bool, device=w.device)
            values = values[off].reshape(n, max(n - 1, 0))
        return fit_scale(values, self.bits, self.rule, dim)

    def _improved(self, w: Tensor) -> Tensor:
        """One round from scales at hand: for ``"max"`` and at one bit the scale is then exact."""
        w = self._wide_enough(w)
        if self.bits == 1:
            count = w.numel() // w.shape[0] if self.rows else w.numel()
            if self.part != "all":
                count -= 1 if self.rows else w.shape[0]
                w = w - torch.diag(w.diagonal())
            return self._sum(w.abs()) / max(count, 1)
        if self.rule == "max" or self.bits >= MANY:
            return self._peak(w) / self.top
        last = self.scale.to(w.dtype)
        scale, gain = self._round(w, last)
        if self.fits % COMPETE:
            return scale
        # With many levels a round hardly moves, and weights below all levels would stay there: so others compete.
        peak = self._peak(w) / self.top
        start = (last * NEAR, peak, last / NEAR, peak)[self.fits // COMPETE % 4]
        other, better = self._round(w, start)
        return torch.where(better > gain * (1 + 256 * torch.finfo(w.dtype).eps), other, scale)  # by more than rounding

    def _round(self, w: Tensor, start: Tensor) -> tuple[Tensor, Tensor]:
        """The least-squares scale ⟨w, c⟩/⟨c, c⟩ of the codes at ``start``, and by how much it lowers Σ w²."""
        codes = self._codes(w, start)
        along, square = self._inner(codes, w), self._inner(codes, codes).clamp(min=1)
        return along / square, along * (along / square)

    def _inner(self, a: Tensor, b: Tensor) -> Tensor:
        return self._sum(a * b) if self.rows else torch.dot(a.reshape(-1), b.reshape(-1))

    def _sum(self, values: Tensor) -> Tensor:
        return values.sum(tuple(range(1, values.ndim)), keepdim=True) if self.rows else values.sum()

    def _peak(self, w: Tensor) -> Tensor:
        size = w.abs() if self.part == "all" else (w - torch.diag(w.diagonal())).abs()
        return size.amax(tuple(range(1, w.ndim)), keepdim=True) if self.rows else size.amax()

    def _surrogate(self, w: Tensor, scale: Tensor, codes: Tensor) -> Tensor:
        """A function of w and s with the gradients of LSQ."""
        share = 1 / math.sqrt(max(w.numel() // max(scale.numel(), 1), 1) * self.top)
        if self.bits == 1:  # ±s: the gradient of s is the sign, that of w passes
            return w + (share * scale) * codes
        ratio = w.detach() / scale.detach()
        inside = ratio.abs() <= self.top
        return w * inside + (share * scale) * (codes - torch.where(inside, ratio, 0.0))

    def get_extra_state(self) -> Tensor:
        return torch.tensor(self.fits)

    def set_extra_state(self, state: Tensor) -> None:
        self.fits = int(state)
        if self.learned:
            self._asleep = bool((self.log_scale <= _logarithm(torch.zeros_like(self.log_scale))).any())

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        def move(t: Tensor) -> Tensor:  # casting a scale would change what the codes stand for
            device = fn(t).device
            return torch.empty_like(t, device=device) if t.is_meta else t.to(device)

        super()._apply(move, recurse)  # type: ignore[no-untyped-call]
        return self

    def extra_repr(self) -> str:
        how = "learned" if self.learned else self.rule
        return f"bits={self.bits}, scale={how}, part={self.part}"


@final
class Seen:
    """Which tensors the scales were fitted to last.

    Their values are compared, because fused optimizers and ``tensor.data`` write without counting a version; the
    versions, because loading a state brings scales of its own. A copy has seen the same values.
    """

    def __init__(self) -> None:
        self._values: list[Tensor] = []
        self._versions: list[int] | None = []

    def changed(self, tensors: Iterable[Tensor]) -> bool:
        """Whether ``tensors`` are others than at the last call."""
        now = [tensor.detach() for tensor in tensors]
        versions = [tensor._version for tensor in now]
        known = self._versions in (None, versions) and len(now) == len(self._values)
        if known and all(map(_same, self._values, now)):
            self._versions = versions
            return False
        self._values, self._versions = [tensor.clone() for tensor in now], versions
        return True

    def __deepcopy__(self, memo: Any) -> Seen:
        copy = Seen()
        copy._values, copy._versions = [value.clone() for value in self._values], None  # versions begin anew
        return copy

    def __reduce__(self) -> tuple[type[Seen], tuple[()]]:
        return Seen, ()


def _same(old: Tensor, new: Tensor) -> bool:
    alike = old.dtype == new.dtype and old.device == new.device and old.shape == new.shape
    return alike and torch.equal(old, new)


def _logarithm(scale: Tensor) -> Tensor:
    """log s in the dtype of s, of at least its smallest normal number."""
    return scale.double().clamp(min=torch.finfo(scale.dtype).tiny).log().to(scale.dtype)
