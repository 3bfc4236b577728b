"""Models that can be quantized, certified and saved: a layer, or a chain of known modules."""

from __future__ import annotations

import math

from torch import nn

from ..errors import StructureError
from ..operators import PreparedWeight
from .convolutional import ConvolutionalLayer
from .equilibrium import EquilibriumLayer
from .linear import PreparedLinear, QuantizedLinear
from .lipschitz_mdeq import MDEQ, LipschitzMDEQ
from .mon_conv import MonConv2d, MultiTierMonDEQ
from .mondeq import MonDEQ
from .multiscale_deq import MultiscaleDEQ
from .nemon import NEMON
from .nemon_conv import NEMONConv2d

__all__ = [
    "CONVOLUTIONAL",
    "EQUILIBRIUM",
    "IMAGES",
    "LIPSCHITZ_ONE",
    "any_layers",
    "chain",
    "equilibrium_layers",
    "features_taken",
    "final_head",
    "is_prepared",
    "multiscale_of",
]

EQUILIBRIUM = (MonDEQ, NEMON)
"""Equilibrium layers: a new kind registers here."""

CONVOLUTIONAL = (NEMONConv2d, MonConv2d, MultiTierMonDEQ)
"""Equilibrium layers on images: admitted where ``images`` is asked for."""

IMAGES = (*CONVOLUTIONAL, nn.Unflatten, nn.AvgPool2d)
"""What is admitted in a chain only where ``images`` is asked for, as not everything here is proved of these."""

LINEAR = (nn.Linear, QuantizedLinear, PreparedLinear, nn.Conv2d)
"""What gives U x + b, or scores."""

LIPSCHITZ_ONE = (
    nn.Flatten,
    nn.Identity,
    nn.Dropout,
    nn.ReLU,
    nn.Tanh,
    nn.Sigmoid,
    nn.Softplus,
    nn.Hardtanh,
)
"""Modules without weights that are 1-Lipschitz in the 2-norm when evaluated."""

CALLING = ("__call__", "__getattribute__", "__getattr__")
"""What of a class comes before its ``forward``, or gives it other attributes than those that proofs read."""


def chain(model: nn.Module, prepared: bool = False, images: bool = False) -> list[tuple[str, nn.Module]]:
    """The modules of ``model`` in order, with their names; nested ``nn.Sequential`` are opened.

    ``images`` admits convolutional layers, and what brings images to them and away.

    Raises:
        StructureError: a module that is neither an equilibrium layer, linear, nor a known activation, or that
            computes something else than its kind does: a ``forward`` of its own, or hooks; and, unless
            ``prepared``, one that is being trained for quantization.
    """
    found = _opened(model, images)
    waiting = None if prepared else next((name for name, module in found if is_prepared(module)), None)
    if waiting is not None:
        where = f"module {waiting!r}" if waiting else "the layer"
        raise StructureError(f"{where} is prepared for training with quantization; equipoise.convert it first")
    return found


def is_prepared(module: nn.Module) -> bool:
    """Whether ``module`` itself rounds its weights in every forward pass."""
    return isinstance(module, PreparedLinear) or (
        isinstance(module, EQUILIBRIUM)
        and (isinstance(module.recurrent, PreparedWeight) or isinstance(module.injection, PreparedLinear))
    )


def _opened(model: nn.Module, images: bool) -> list[tuple[str, nn.Module]]:
    if isinstance(model, nn.Sequential):
        _check_plain(model, nn.Sequential, "")
        found = []
        for name, child in model._modules.items():  # named_children() leaves out a module that appears twice
            assert child is not None
            inner = _opened(child, images) if isinstance(child, nn.Sequential) else [("", _known(child, name, images))]
            found += [(f"{name}.{rest}" if rest else name, module) for rest, module in inner]
        return found
    return [("", _known(model, "", images))]


def _known(module: nn.Module, name: str, images: bool) -> nn.Module:
    admitted = IMAGES if images else ()
    for kind in (*EQUILIBRIUM, nn.Linear, QuantizedLinear, PreparedLinear, *LIPSCHITZ_ONE, *admitted):
        if isinstance(module, kind):
            _check_plain(module, kind, name)
            if isinstance(module, (EquilibriumLayer, ConvolutionalLayer)):
                _check_linear(module.injection, f"{name}.injection" if name else "injection")
            return module
    allowed = ", ".join(kind.__name__ for kind in (*EQUILIBRIUM, nn.Linear, *LIPSCHITZ_ONE))
    where = f" at position {name!r}" if name else ""
    if isinstance(module, IMAGES):
        raise StructureError(
            f"{type(module).__name__}{where} is not supported here: a network for images can be trained as floats and "
            "quantized afterwards, saved, and certified (NEMONConv2d without inputs); it cannot be trained through a "
            "quantizer, planned, exported, or proved over boxes"
        )
    raise StructureError(
        f"{type(module).__name__}{where} is not supported here; build the model as a layer or an nn.Sequential of "
        f"{allowed}"
    )


def _check_plain(module: nn.Module, kind: type[nn.Module], name: str) -> None:
    """Refuse a module that says it is a ``kind`` but may compute something else: nothing would be proved of that."""
    inside = () if isinstance(module, nn.Sequential) else module.modules()
    hooked = any(m._forward_hooks or m._forward_pre_hooks for m in (module, *inside))
    own = sorted(_overridden(type(module), kind)) if kind in (*EQUILIBRIUM, *CONVOLUTIONAL, *LINEAR[1:]) else []
    own += [name for name in CALLING if getattr(type(module), name) is not getattr(kind, name)]
    if hooked or own or type(module).forward is not kind.forward or "forward" in vars(module):
        what = "has forward hooks" if hooked else f"has a {own[0] if own else 'forward'} of its own"
        where = f" at position {name!r}" if name else ""
        raise StructureError(
            f"{type(module).__name__}{where} {what}, so it may compute something else than {kind.__name__}; "
            f"remove them, or build the model of plain {kind.__name__} modules"
        )


def _check_linear(module: nn.Module, name: str) -> None:
    """Refuse an injection, or the last module of a network that is whole in itself, that may compute something else
    than its weights say; a convolution that repeats the pixels of its edge enlarges what its weights bound."""
    kind = next((kind for kind in LINEAR if isinstance(module, kind)), None)
    if kind is None or getattr(module, "padding_mode", "zeros") not in ("zeros", "circular"):
        known = ", ".join(kind.__name__ for kind in LINEAR)
        raise StructureError(
            f"{module} at position {name!r} is not supported here; known: {known}, padded by zeros or circularly"
        )
    _check_plain(module, kind, name)


def _overridden(derived: type, kind: type) -> set[str]:
    """What a class derived from a layer's ``kind`` does its own way, but for how it is shown and copied."""
    between = derived.__mro__[: derived.__mro__.index(kind)]
    names = {name for cls in between for name in vars(cls) if not name.startswith(("__", "_abc_"))}
    return (names & set(dir(kind))) - {"extra_repr"}


def equilibrium_layers(model: nn.Module, prepared: bool = False) -> list[tuple[str, EquilibriumLayer]]:
    """The equilibrium layers of ``model`` in order; raises :class:`StructureError` where there is none."""
    found: list[tuple[str, EquilibriumLayer]]
    found = [(name, module) for name, module in chain(model, prepared) if isinstance(module, EQUILIBRIUM)]
    if not found:
        raise StructureError(f"{type(model).__name__} has no equilibrium layer; nothing to quantize or certify")
    return found


def any_layers(model: nn.Module) -> list[tuple[str, EquilibriumLayer | ConvolutionalLayer]]:
    """:func:`equilibrium_layers`, convolutional ones included."""
    kinds = (*EQUILIBRIUM, *CONVOLUTIONAL)
    found: list[tuple[str, EquilibriumLayer | ConvolutionalLayer]]
    found = [(name, module) for name, module in chain(model, images=True) if isinstance(module, kinds)]
    if not found:
        raise StructureError(f"{type(model).__name__} has no equilibrium layer; nothing to quantize or certify")
    return found


def final_head(model: nn.Module, prepared: bool = False, images: bool = False) -> str | None:
    """The name of the one linear module that follows the last equilibrium layer and ends the model, if so."""
    modules, kinds = chain(model, prepared, images), (*EQUILIBRIUM, *CONVOLUTIONAL)
    last = max((i for i, (_, module) in enumerate(modules) if isinstance(module, kinds)), default=-1)
    rest = [
        (name, module)
        for name, module in modules[last + 1 :]
        if not isinstance(module, (nn.Flatten, nn.Identity, nn.Dropout, nn.AvgPool2d))
    ]
    if len(rest) == 1 and isinstance(rest[0][1], (nn.Linear, QuantizedLinear, PreparedLinear)):
        return rest[0][0]
    return None


def features_taken(model: nn.Module) -> int | None:
    """The length of the flat inputs that ``model`` takes; None where it takes images as such."""
    found = multiscale_of(model)
    modules = [module for _, module in chain(model, images=True)] if found is None else [*found[0], found[1]]
    for module in modules:
        if isinstance(module, nn.Unflatten):
            return math.prod(module.unflattened_size)
        if isinstance(module, (*CONVOLUTIONAL, MultiscaleDEQ)):
            return None
        if (size := getattr(module, "in_features", None)) is not None:
            return int(size)
    return None


def multiscale_of(model: nn.Module) -> tuple[list[nn.Module], MultiscaleDEQ] | None:
    """The multiscale network that ``model`` is or ends in, and the modules before it; None where there is none.

    Raises :class:`StructureError` for anything around it but what only gives an image its shape: in itself it is whole.
    """
    found = [module for module in model.modules() if isinstance(module, MultiscaleDEQ)]
    if not found:
        return None
    if model is not found[0] and not isinstance(model, nn.Sequential):
        raise StructureError(f"{type(model).__name__} is not supported here; give its {type(found[0]).__name__} itself")
    modules: list[nn.Module] = [model] if model is found[0] else list(model.children())
    if modules[-1] is not found[0] or not all(isinstance(m, (nn.Unflatten, nn.Identity)) for m in modules[:-1]):
        names = ", ".join(type(module).__name__ for module in modules)
        raise StructureError(
            f"a chain of {names}: {type(found[0]).__name__} has its own stem and head; only Unflatten goes before it"
        )
    if type(found[0]) not in (LipschitzMDEQ, MDEQ):
        raise StructureError(
            f"{type(found[0]).__name__} may compute something else than a LipschitzMDEQ; give a plain one"
        )
    for module in modules:
        kind = next(kind for kind in (nn.Unflatten, nn.Identity, type(found[0])) if isinstance(module, kind))
        _check_plain(module, kind, "")
    _check_linear(found[0].linear, "head.linear")
    return modules[:-1], found[0]
