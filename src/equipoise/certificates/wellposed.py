"""Well-posedness: margin and Lipschitz constants as proved bounds, and how a perturbation moves them (T2).

Theory §1 and §5; in maximum norms §7.
"""

from __future__ import annotations

import copy
import math
import warnings
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from .. import verified
from ..activations import ACTIVATIONS, PROVED, flaw
from ..errors import ConvergenceWarning, NotWellPosedError, OptionError, StructureError
from ..layers.chain import any_layers, chain, equilibrium_layers
from ..layers.convolutional import ConvolutionalLayer
from ..layers.equilibrium import EquilibriumLayer, family_of
from ..layers.linear import QuantizedLinear, affine64
from ..norms import Euclidean
from ..operators import DenseOperator, QuantizedWeight, operator_of
from ..operators.conv import ConvOperator
from ..operators.dense import in_proving_norm
from ..operators.quantized import AssembledWeight
from ..operators.tiers import TierOperator
from ..parametrizations import Dense
from ..solvers import ForwardBackward

__all__ = [
    "Perturbation",
    "euclidean_lipschitz",
    "fresh_kernel",
    "fresh_operator",
    "lipschitz",
    "margin",
    "observe",
    "perturbation",
    "spectrum",
    "vouched",
]


def vouched(layer: EquilibriumLayer | ConvolutionalLayer) -> tuple[str, ...]:
    """What a proof about this layer takes somebody's word for; nothing where its activation is this library's.

    Raises:
        StructureError: an activation that nobody vouches for (it is not in ``equipoise.activations.ACTIVATIONS``), or
            that is seen to be no proximal map.
    """
    activation = layer.activation
    kind = type(activation)
    if kind in PROVED:
        return ()
    if kind not in ACTIVATIONS.values():
        raise StructureError(
            f"nothing is proved of the activation {activation!r}; if it is a proximal map (non-decreasing, slopes at "
            "most 1) and errs by no more than its evaluation_error, vouch for it by "
            f'equipoise.activations.ACTIVATIONS["{kind.__name__}"] = {kind.__name__}'
        )
    if (seen := flaw(activation)) is not None:
        raise StructureError(f"{activation!r} is no proximal map of a scalar convex function: {seen}")
    return (f"{activation!r} is a proximal map and errs by no more than its evaluation_error",)


def fresh_operator(layer: EquilibriumLayer) -> DenseOperator:
    """The layer's operator made anew from its stored tensors: no constant computed earlier is trusted, and of the
    activation nothing that is not :func:`vouched` for."""
    vouched(layer)
    with torch.no_grad():
        if isinstance(layer.recurrent, QuantizedWeight):
            return operator_of(layer.recurrent, layer.bias.detach())
        operator = DenseOperator(layer.recurrent().detach(), family=family_of(layer.recurrent))
        return in_proving_norm(operator) if isinstance(layer.recurrent, Dense) else operator


def fresh_kernel(layer: ConvolutionalLayer) -> ConvOperator | TierOperator:
    """:func:`fresh_operator` of a convolutional layer; of NEMON its constants hold on images of any size."""
    vouched(layer)
    with torch.no_grad():
        found: ConvOperator | TierOperator = copy.deepcopy(layer).operator  # type: ignore[assignment]
        return found


def _fresh(layer: EquilibriumLayer | ConvolutionalLayer) -> DenseOperator | ConvOperator | TierOperator:
    return fresh_kernel(layer) if isinstance(layer, ConvolutionalLayer) else fresh_operator(layer)


def margin(model: nn.Module) -> float:
    """A proved lower bound of m = λ_min(sym(I − W)), the smallest over the model's equilibrium layers.

    Of a NEMON layer the margin is 1 − μ_η(W) in its weighted maximum norm: 1 − μ(W) in either family (theory §7). So it
    is of weights without structure (``from_weights(check=False)``, Assembled codes) where no Euclidean margin is proved
    and a maximum norm proves one: ``layer.operator.family`` and ``certify(layer).family`` name the norm.

    Holds for the matrix that the stored codes define and for the one multiplied by; of a float layer for W as the
    layer computes it in its own dtype (theory §1, §6).
    """
    return min(_fresh(layer).margin() for _, layer in any_layers(model))


def lipschitz(model: nn.Module) -> float:
    """A proved upper bound of L = ‖I − W‖₂ (‖I − W‖_η where that is the norm of the margin), the largest over the
    equilibrium layers (theory §1)."""
    return max(_fresh(layer).lipschitz() for _, layer in any_layers(model))


def euclidean_lipschitz(model: nn.Module) -> float | None:
    """A proved bound of the 2-norm Lipschitz constant of x ↦ output: ‖U‖₂/m per equilibrium layer (theory §1 [PWK21]).

    Linear modules on the way count with their norms. None where a layer has no proved Euclidean margin, and where there
    is a torch softplus, which has no Lipschitz constant: it jumps at its threshold (by 2e-9 for the defaults).
    """
    bound = 1.0
    for _, module in chain(model):
        if isinstance(module, EquilibriumLayer):
            operator = fresh_operator(module)
            m = operator.margin()
            if m <= 0 or not isinstance(operator.family, Euclidean):
                return None
            assert isinstance(module.injection, (nn.Linear, QuantizedLinear))
            bound = verified.up(bound * verified.up(_norm(module.injection) / m))
        elif isinstance(module, (nn.Linear, QuantizedLinear)):
            bound = verified.up(bound * _norm(module))
        elif isinstance(module, nn.Softplus):
            return None
    return bound if math.isfinite(bound) else None


def _norm(linear: nn.Linear | QuantizedLinear) -> float:
    weight, _, error, _ = affine64(linear)
    return verified.spectral_norm(weight, error)


@torch.no_grad()
def spectrum(model: nn.Module) -> Tensor:
    """The numbers ``(N,)`` of which the margin is the least, ascending, float64: of every equilibrium layer the
    eigenvalues of sym(I − W), of a NEMON layer the 1 − μ_i of its rows (theory §1, §7).

    Computed and not proved: :func:`margin` proves a bound of the least one. Empty where the codes define no matrix.
    """
    found = [torch.empty(0, dtype=torch.float64)]
    for _, layer in equilibrium_layers(model):
        operator = fresh_operator(layer)
        W, error = operator.matrix64()
        if error == math.inf or not bool(W.isfinite().all()):
            return found[0]
        if isinstance(operator.family, Euclidean):
            found.append(torch.linalg.eigvalsh(torch.eye(len(W), dtype=W.dtype) - (W + W.mT) / 2))
        else:
            found.append(operator.row_margins())
    return torch.cat(found).sort().values


@dataclass(frozen=True)
class Perturbation:
    """T2 in its three forms (theory §5 [LLC26]), ΔW = W̃ − W; norms are those of the reference's family (§7).

    ``delta_norm`` >= ‖ΔW‖₂, so |m̃ − m| and |L̃ − L| are at most that; ``own_norm`` the same in the quantized layer's
    family, where that is another. ``sufficient``: ‖ΔW‖₂ < m proved.
    ``predeployment``: nΔ/2 < m, known before rounding, for the published scheme with scale ``max`` and a Euclidean
    m only (else None). The exact form, m̃ > 0, is the certificate's own margin.
    """

    delta: Tensor
    delta_norm: float
    own_norm: float
    sufficient: bool
    predeployment: bool | None


def perturbation(layer: EquilibriumLayer, operator: DenseOperator, reference: DenseOperator) -> Perturbation:
    """ΔW between a quantized layer and its float reference, bounded (T2, theory §5)."""
    (tilde, e_tilde), (exact, e) = operator.matrix64(), reference.matrix64()
    delta = tilde - exact
    rounding = verified.up(verified.UNIT * verified.absolute_norm(delta))
    error = verified.up(verified.up(e_tilde + e) + rounding)
    norm, m = reference.family.norm(delta, error), reference.margin()
    euclidean = isinstance(reference.family, Euclidean)
    own = norm if operator.family.name == reference.family.name else operator.family.norm(delta, error)
    return Perturbation(delta, norm, own, norm < m, _predeployment(layer, m) if euclidean else None)


def _predeployment(layer: EquilibriumLayer, m: float) -> bool | None:
    """nΔ/2 < m with Δ the step of the ``max`` rule; one bit and fitted scales have no such check. In a weighted
    maximum norm there is none either: ‖ΔW‖_η may exceed nΔ/2 by the spread of the weights."""
    weights = layer.recurrent
    if not isinstance(weights, AssembledWeight) or weights.codes.bits < 2:
        return None
    if layer.scheme is None or layer.scheme.scale != "max":
        return None
    step = float(weights.codes.scale.double().max())
    return verified.up(layer.features * step / 2) < m


@torch.no_grad()
def observe(model: nn.Module, inputs: Tensor) -> Literal["unknown", "converged", "diverged"]:
    """Whether some solver settles on every input: an observation about these inputs, in float64.

    The layer's own solver first, then forward–backward with a short step: a poor step is not divergence. "unknown"
    where there are no inputs, or the codes define no matrix at all.
    """
    if not len(inputs) or any(_fresh(layer).representation_error == math.inf for _, layer in any_layers(model)):
        return "unknown"
    for fallback in (False, True):
        wide = copy.deepcopy(model).cpu().double().eval()
        for _, layer in any_layers(wide):
            layer.strict = False
            if fallback:
                layer.solver = ForwardBackward(max_steps=2000)
        if _settles(wide, inputs.detach().to("cpu", torch.float64, copy=True)):
            return "converged"
    return "diverged"


def _settles(model: nn.Module, a: Tensor) -> bool:
    for _, module in chain(model, images=True):
        if not isinstance(module, (EquilibriumLayer, ConvolutionalLayer)):
            a = module(a)
            continue
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", ConvergenceWarning)
                solution = module.solve(a, tol=1e-5, stop="residual")
        except (NotWellPosedError, OptionError):  # this solver's step does not exist for these weights
            return False
        if not bool(solution.converged.all()):
            return False
        a = module.images(solution.value, a) if isinstance(module, ConvolutionalLayer) else solution.value
    return True
