"""Terms of a training loss that drive a network to a margin its codes will keep (theory §5)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, final

import torch
from torch import Tensor, nn

from . import verified
from .errors import NotWellPosedError, OptionError, StructureError
from .layers import NEMON, NEMONConv2d
from .layers.chain import CONVOLUTIONAL, EQUILIBRIUM
from .operators import PreparedWeight
from .operators.prepared import PreparedAssembled
from .parametrizations import Dense, Monotone
from .parametrizations.monotone import MARGIN_FLOOR

__all__ = ["MarginPenalty", "proved"]

SLACK = 0.2
"""Training aims so much further than the target, since codes jump between steps."""

CLOSE = 1e-4
"""What a projection aims further than the target, relatively: proofs are made with the rounding of float32 counted."""

REACH = 0.9
"""Scaling W down brings every margin towards 1; to larger targets than this only the penalty leads."""


@final
@dataclass(frozen=True)
class MarginPenalty:
    """A differentiable hinge on what rounding leaves of the margin, zero where everything asked for holds.

    With W the free matrix, W̃ what it is rounded to (:func:`equipoise.prepare_qat`), ΔW = W̃ − W, m the margin of W,
    and s = 0.2 of slack, for every equilibrium layer

        weight · ( Σᵢ max(0, (1 + s) target − λᵢ(sym(I − W̃))) + Σᵢ max(0, σᵢ(ΔW) − ratio · m/(1 + s)) ).

    The largest term of each sum is the hinge on the margin m̃ and on ‖ΔW‖₂; with the others, eigenvalues that lie close
    together rise together. Gradients are those of a simple eigenvalue, vᵀ(∂X)v with v held fixed; through the rounding
    they pass straight in the first sum, and in the second codes stand still, so that W is drawn to its codes.
    ``ratio < 1`` implies m̃ >= (1 − ratio) m (T2 of [LLC26]). Without rounding ΔW = 0.

    Args:
        target: the margin m̃ to reach, positive; None asks for none.
        ratio: the largest ‖ΔW‖₂/m to allow, positive; None allows any.
        weight: factor of the sums, positive.

    Raises:
        OptionError: neither ``target`` nor ``ratio``, or a value that is not positive.
    """

    target: float | None = None
    ratio: float | None = None
    weight: float = 1.0

    def __post_init__(self) -> None:
        if self.target is None and self.ratio is None:
            raise OptionError("a margin penalty needs a target for the margin, such as 0.05, or a ratio, such as 0.5")
        for name in ("target", "ratio", "weight"):
            value = getattr(self, name)
            number = isinstance(value, (int, float)) and not isinstance(value, bool)
            if (value is not None and not (number and 0 < value < math.inf)) or (name == "weight" and value is None):
                raise OptionError(f"{name}={value!r} of a margin penalty: give a positive finite number")

    def penalty(self, model: nn.Module) -> Tensor:
        """The sum over the equilibrium layers of ``model``: a number with its graph, in the dtype of the weights.

        Raises :class:`StructureError` where there is no equilibrium layer.
        """
        terms = [self._term(layer.recurrent) for layer in _layers(model)]
        return self.weight * torch.stack(terms).sum()

    def _term(self, recurrent: Any) -> Tensor:
        rounded: Tensor = recurrent()
        total = rounded.new_zeros(())
        if self.target is not None:
            total = total + _below(_gap(rounded), (1 + SLACK) * self.target)
        if self.ratio is not None and isinstance(recurrent, PreparedWeight):
            free = recurrent.weights()
            margin = _margin(recurrent.weights, free)
            change = rounded.detach() - free
            total = total + _above(change, self.ratio / (1 + SLACK) * margin)
        return total

    @torch.no_grad()
    def project(self, model: nn.Module) -> None:
        """Scale W of every layer that misses the target or the ratio by the largest s < 1 that makes it hold.

        Q(s W) = s Q(W) where the scale of the codes is scaled, too, so that m̃ becomes 1 − s (1 − m̃), m becomes
        1 − s (1 − m) and ‖ΔW‖₂ becomes s ‖ΔW‖₂: the codes stay, and the answer is exact. It is for Assembled and
        for weights that are not rounded; other schemes, and a margin that is not learned, are left as they are.
        """
        for layer in _layers(model):
            for _ in range(4):  # rounding s and the products by it may leave a little
                factor = self._factor(layer.recurrent)
                if factor >= 1 or not _scale(layer.recurrent, factor):
                    break

    def _factor(self, recurrent: Any) -> float:
        """s of :meth:`project` (1 where all holds)."""
        prepared = isinstance(recurrent, PreparedWeight)
        if prepared:
            with torch.enable_grad():  # in training the scales follow the weights
                recurrent.refit()
        rounded = recurrent()
        free = recurrent.weights() if prepared else rounded
        factor = 1.0
        if self.target is not None:
            target = self.target if self.target < REACH else REACH
            gap = _gap(rounded.double())
            if not _above_level(gap, target * (1 + CLOSE)):
                factor = (1 - target * (1 + 2 * CLOSE)) / (1 - float(torch.linalg.eigvalsh(gap)[0]))
        if self.ratio is not None and rounded is not free:
            change, ratio = (rounded - free).double(), self.ratio * (1 - CLOSE)
            margin = float(_margin(recurrent.weights, free.double()))
            if margin <= 0 or not _above_level(-change.mT @ change, -((ratio * margin) ** 2)):
                size = float(torch.linalg.matrix_norm(change, 2))
                factor = min(factor, ratio * (1 - CLOSE) / (size + ratio * (1 - margin)))
        return factor


@torch.no_grad()
def proved(model: nn.Module, asked: MarginPenalty | None = None) -> tuple[float | None, str | None]:
    """(smallest margin, what falls short of ``asked`` in words), both proved of the codes that ``model`` holds or
    would be converted to; None where there is no equilibrium layer, and where nothing falls short."""
    layers = _layers(model, needed=asked is not None)
    if not layers:
        return None, None
    margin = min(float(layer.operator.margin()) for layer in layers)
    missed = []
    if asked is not None and asked.target is not None:
        found = min(float(layer.operator.euclidean_margin()) for layer in layers)  # the one that was driven
        if found < asked.target:
            missed.append(f"a margin of {asked.target:g} was asked for, and only {found:.6g} is proved")
    if asked is not None and asked.ratio is not None:
        ratio = max(_proved_ratio(layer.recurrent) for layer in layers)
        if not ratio <= asked.ratio:
            missed.append(f"‖ΔW‖₂ was to be at most {asked.ratio:g} of the margin, and only {ratio:.6g} is proved")
    return margin, "; ".join(missed) or None


def _layers(model: nn.Module, needed: bool = True) -> list[Any]:
    """The equilibrium layers of any module, each once."""
    layers = [module for module in model.modules() if isinstance(module, (*EQUILIBRIUM, *CONVOLUTIONAL))]
    if needed and not layers:
        raise StructureError(f"{type(model).__name__} has no equilibrium layer, so it has no margin to drive")
    if needed and any(isinstance(layer, (NEMON, NEMONConv2d)) for layer in layers):
        raise StructureError("a NEMON layer keeps its measure by structure: leave the margin penalty out")
    return layers


def _scale(recurrent: Any, factor: float) -> bool:
    """Replace W by ``factor`` W and W̃ by ``factor`` W̃, if these weights can be scaled."""
    weights = recurrent.weights if isinstance(recurrent, PreparedAssembled) else recurrent
    if isinstance(weights, Dense):
        weights.weight.mul_(factor)
    elif isinstance(weights, Monotone) and "raw_margin" in weights._parameters:
        weights.A.mul_(math.sqrt(factor))
        weights.B.mul_(factor)
        excess = 1 - factor * (1 - float(weights.current_margin())) - MARGIN_FLOOR
        weights.raw_margin.fill_(excess + math.log(-math.expm1(-excess)))  # the inverse of softplus
    else:
        return False
    if isinstance(recurrent, PreparedAssembled):
        rounding = recurrent.rounding
        if rounding.learned:
            rounding.log_scale.add_(math.log(factor))
        else:
            rounding.scale.mul_(factor)
    return True


def _gap(W: Tensor) -> Tensor:
    """sym(I − W)."""
    return torch.eye(len(W), dtype=W.dtype, device=W.device) - (W + W.mT) / 2


def _margin(weights: Any, W: Tensor) -> Tensor:
    """m = λ_min(sym(I − W)) of W = ``weights()``, with the gradient of a simple eigenvalue."""
    if isinstance(weights, Monotone) and len(weights.A) < len(W):
        return weights.current_margin()
    H = _gap(W)
    v = torch.linalg.eigh(H.detach())[1][:, 0]
    return v @ H @ v


def _above_level(H: Tensor, level: float) -> bool:
    """Whether all eigenvalues lie above ``level``, by a Cholesky that costs a fiftieth of the eigenvalues."""
    shifted = H - level * torch.eye(len(H), dtype=H.dtype, device=H.device)
    return int(torch.linalg.cholesky_ex(shifted)[1]) == 0


def _below(H: Tensor, level: float) -> Tensor:
    """Σᵢ max(0, level − λᵢ(H))."""
    if _above_level(H.detach(), level):
        return H.new_zeros(())
    values, vectors = torch.linalg.eigh(H.detach())
    V = vectors[:, values < level]
    return level * V.shape[1] - ((V.mT @ H) * V.mT).sum()


def _above(X: Tensor, level: Tensor) -> Tensor:
    """Σᵢ max(0, σᵢ(X) − level)."""
    fixed = X.detach()
    if _above_level(-fixed.mT @ fixed, -(float(level.detach()) ** 2)):
        return X.new_zeros(())
    U, values, Vh = torch.linalg.svd(fixed)
    over = values > level.detach()
    return ((U[:, over].mT @ X) * Vh[over]).sum() - level * over.sum()


def _proved_ratio(recurrent: Any) -> float:
    """An upper bound of ‖ΔW‖₂/m; inf where no margin of W is proved, 0 where nothing is rounded."""
    if not isinstance(recurrent, PreparedWeight):
        return 0.0
    free = recurrent.weights().to("cpu", torch.float64)
    try:
        exact, error = recurrent.quantized().assemble()
    except NotWellPosedError:
        return math.inf
    margin = verified.margin(free)
    change = verified.up(verified.spectral_norm(exact - free, error) * (1 + 1e-12) + verified.TINY)
    return verified.up(change / margin) if margin > 0 else math.inf
