"""What training adds for robustness: worst cases over boxes, and the ℓ∞ Lipschitz bound (theory §7)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, final

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from .certificates.displacement import evaluated
from .data import Preprocessing
from .errors import OptionError, StructureError
from .layers.box import box_equilibrium, box_linear
from .layers.chain import chain, final_head
from .layers.equilibrium import EquilibriumLayer
from .layers.linear import PreparedLinear, QuantizedLinear, affine
from .norms import WeightedMax
from .robust import PixelBall, check_eps

__all__ = ["RobustLoss", "lipschitz_loss", "worst_scores"]

LINEAR = (nn.Linear, QuantizedLinear, PreparedLinear)


def worst_scores(model: nn.Module, low: Tensor, high: Tensor, y: Tensor) -> Tensor:
    """Scores ``(B, k)`` relative to that of class ``y (B,)``, each as large as it gets over the box: 0 at y itself.

    Differentiable: boxes through linear modules, monotone activations and equilibria (implicitly); a bound up to the
    solver's tolerance and rounding, as training needs it. All entries negative: the class is kept.
    """
    head = final_head(model, prepared=True)
    if head is None:
        raise StructureError("training on boxes needs a model that ends in one linear module")
    for name, module in chain(model, prepared=True):
        if name == head:
            break
        if isinstance(module, EquilibriumLayer):
            injection: Any = module.injection
            low, high = box_equilibrium(module, *box_linear(injection, low, high))
        elif isinstance(module, LINEAR):
            low, high = box_linear(module, low, high)
        else:
            low, high = evaluated(module, low), evaluated(module, high)
    V, c = affine(model.get_submodule(head))
    center, radius = (low + high) / 2, (high - low) / 2
    scores = torch.nn.functional.linear(center, V, c)
    # |V_j − V_y| r for every j, by the class of the sample
    spread = torch.einsum("bkn,bn->bk", (V[None] - V[y][:, None]).abs(), radius)
    return scores - scores.gather(1, y[:, None]) + spread


def lipschitz_loss(model: nn.Module) -> Tensor:
    """The ℓ∞ Lipschitz bound of the whole model as computed, differentiable: a regularizer (theory §7 [JDPB21]).

    Row by row, max_k Σ_j |V_kj| η_j · max_i (Σ_j |U_ij|/η_i)/(1 − μ_i) for a NEMON layer between linear ones. What is
    proved of the model is :func:`equipoise.input_lipschitz`, which is never larger but for rounding.
    """
    bound: Tensor | None = None
    for _, module in chain(model, prepared=True):
        if isinstance(module, EquilibriumLayer):
            U, _ = affine(module.injection)
            bound = _layer_reach(module, U.abs().sum(1) if bound is None else U.abs() @ bound)
        elif isinstance(module, LINEAR):
            W, _ = affine(module)
            bound = W.abs().sum(1) if bound is None else W.abs() @ bound
    assert bound is not None
    return bound.amax()


def _layer_reach(layer: EquilibriumLayer, q: Tensor) -> Tensor:
    """η · max_i (q_i/η_i)/(1 − μ_i) for q ``(n,)`` >= 0, with its graph."""
    recurrent: Any = layer.recurrent
    weights = getattr(recurrent, "weights", recurrent)
    W, family = layer.operator.weight, layer.operator.family
    if not isinstance(family, WeightedMax):
        raise StructureError(f"the ℓ∞ Lipschitz loss is of NEMON layers; {type(layer).__name__} has another norm")
    d = getattr(weights, "d", None)
    eta = family.eta.to(W) if d is None else torch.exp(d.detach().min() - d)
    off = W.abs() - torch.diag(W.diagonal().abs())
    margins = 1 - W.diagonal() - (off @ eta) / eta
    return eta * (q / eta / margins.clamp_min(1e-3)).amax()


@final
@dataclass(frozen=True)
class RobustLoss:
    """What training adds for robustness: cross-entropy of the worst scores over boxes, and a Lipschitz term.

        (1 − κ) CE(scores) + κ CE(worst scores within ε_t) + lipschitz_weight · Lipschitz bound

    ε_t grows linearly from 0 to ``eps`` over the first ``ramp`` of the training, κ to ``share`` with it.

    Args:
        eps: in pixels scaled to [0, 1]; 0 leaves the boxes out.
        share: κ at the end, in [0, 1].
        ramp: part of the training until both are reached, in [0, 1].
        lipschitz_weight: 0 or more.

    Raises :class:`OptionError` for a value outside its range.
    """

    eps: float = 0.0
    share: float = 0.5
    ramp: float = 0.5
    lipschitz_weight: float = 0.0

    def __post_init__(self) -> None:
        check_eps(self.eps)
        for name in ("share", "ramp"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value <= 1:
                raise OptionError(f"{name} is {value!r}; give a part from 0 to 1")
        weight = self.lipschitz_weight
        if isinstance(weight, bool) or not isinstance(weight, (int, float)) or not 0 <= weight < math.inf:
            raise OptionError(f"lipschitz_weight is {weight!r}; give 0 or a positive number")

    def __call__(
        self, model: nn.Module, x: Tensor, y: Tensor, scores: Tensor, progress: float, preprocessing: Preprocessing
    ) -> Tensor:
        """The loss of a batch, ``progress`` of the training in [0, 1] done; ``scores`` are the model's of ``x``."""
        grown = 1.0 if self.ramp == 0 else min(progress / self.ramp, 1.0)
        loss = cross_entropy(scores, y)
        if self.eps and grown:
            low, high = PixelBall(self.eps * grown, preprocessing).box(x)
            worst = worst_scores(model, low.to(x), high.to(x), y)
            share = self.share * grown
            loss = (1 - share) * loss + share * cross_entropy(worst, y)
        if self.lipschitz_weight:
            loss = loss + self.lipschitz_weight * lipschitz_loss(model)
        return loss
