"""Which run a checkpoint belongs to: the folder it lies in, and what must be the same to go on from it."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ._codecs.values import restored
from .errors import FileFormatError, OptionError, OutputError
from .layers.convolutional import ConvolutionalLayer
from .layers.equilibrium import EquilibriumLayer
from .layers.linear import PreparedLinear, QuantizedLinear
from .layers.multiscale_deq import MultiscaleDEQ
from .operators import PreparedWeight
from .parametrizations import Contractive, ContractiveKernel, Monotone
from .quantization.schemes import scheme_to_dict

__all__ = ["CHECKPOINT_NAME", "checkpoint_in", "flat", "matching", "model_fields"]

CHECKPOINT_NAME = "last.ckpt"


def checkpoint_in(folder: Path, resume: bool) -> Path:
    """The checkpoint's path in ``folder``, which is made and can be written.

    Raises :class:`OutputError` where it cannot, or where there is a checkpoint and ``resume`` is False.
    """
    checkpoint = folder / CHECKPOINT_NAME
    if checkpoint.exists() and not resume:
        raise OutputError(f"{checkpoint} exists: resume it, remove it, or choose another folder")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / f"{CHECKPOINT_NAME}.tmp"
        probe.touch()
        probe.unlink(missing_ok=True)  # several processes may be here at once
    except OSError as error:
        raise OutputError(f"{folder} cannot be written ({error.strerror}): choose another folder") from error
    return checkpoint


def flat(value: Any, name: str) -> dict[str, Any]:
    """Plain values by dotted name: ``{"margin.target": 0.05, …}`` of nested dataclasses and dicts."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        value = {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
    if not isinstance(value, Mapping):
        return {name: value if isinstance(value, (bool, int, float, str, type(None))) else repr(value)}
    found: dict[str, Any] = {}
    for key, inner in value.items():
        found |= flat(inner, f"{name}.{key}" if name else key)
    return found


def model_fields(model: nn.Module) -> dict[str, Any]:
    """What ``model`` is made of, by name: sizes, options and schemes, but no weights."""
    found: dict[str, Any] = {}
    for name, module in model.named_modules():
        found |= flat(_fields(module), name)
    return found


SIZES = ("in_features", "features", "in_channels", "channels", "image_size", "size", "border", "plan")
OPTIONS = (*SIZES, "dropout", "gradient", "activation", "solver", "tol", "backward_tol", "training_tol")


def _fields(module: nn.Module) -> dict[str, Any]:
    if isinstance(module, (EquilibriumLayer, ConvolutionalLayer, MultiscaleDEQ)):
        values = {name: getattr(module, name) for name in OPTIONS if hasattr(module, name)}
        return {name: repr(v) if name in ("activation", "solver") else v for name, v in values.items()}
    if isinstance(module, nn.Conv2d):
        return {"kernel_size": module.kernel_size[0], "stride": module.stride[0]}
    if isinstance(module, ContractiveKernel):
        return {"gamma": float(module.gamma)}
    if isinstance(module, nn.AvgPool2d):
        return {"kernel_size": module.kernel_size}
    if isinstance(module, Monotone):
        return {"rank": module.A.shape[0], "learn_margin": "raw_margin" in module._parameters}
    if isinstance(module, Contractive):
        fixed = float(module.gamma) if "gamma" in module._buffers else None
        return {"gamma": fixed, "learn_weights": "d" in module._parameters}
    if isinstance(module, PreparedWeight):
        return {**scheme_to_dict(module.scheme), "learn_scale": module.learn_scale}
    if isinstance(module, (nn.Linear, QuantizedLinear, PreparedLinear)):
        return {"in_features": module.in_features, "out_features": module.out_features}
    return {} if any(module.children()) or _is_part(module) else {"kind": type(module).__name__}


def _is_part(module: nn.Module) -> bool:
    return type(module).__module__.startswith(__package__ or "equipoise")


def matching(path: Path, identity: Mapping[str, Any], shapes: Mapping[str, Tensor]) -> list[dict[str, float]]:
    """The history in the checkpoint at ``path``, if it was written by the run that ``identity`` and ``shapes`` tell.

    Raises:
        FileFormatError: it is damaged, or something else.
        OptionError: it is of another run: says which field was what, and is what now.
    """
    try:
        saved = torch.load(path, map_location="cpu", weights_only=True)
        known, history = (
            dict(saved["equipoise"]["identity"]),
            restored(list[dict[str, float]], saved["equipoise"]["history"]),
        )
        if any(row.keys() != history[0].keys() or "seconds" not in row for row in history):
            raise ValueError("its epochs have no record")
        weights = {name: tuple(value.shape) for name, value in saved["state_dict"].items() if hasattr(value, "shape")}
    except Exception as error:  # damaged files make torch raise a dozen unrelated types
        raise FileFormatError(f"{path} is not a checkpoint of this trainer, or damaged: {error}") from error
    differing = [field for field in {**identity, **known} if known.get(field) != identity.get(field)]
    # another scheme brings other parts along: name the scheme
    for field in sorted(differing, key=lambda f: (f.split(".")[-1] != "scheme", f not in known or f not in identity)):
        was, value = known.get(field), identity.get(field)
        raise OptionError(f"{path} was written with {field}={was!r}, not {value!r}: resume with the same")
    wanted = {name: tuple(value.shape) for name, value in shapes.items() if hasattr(value, "shape")}
    for name in {**wanted, **weights}:
        if weights.get(name) != wanted.get(name):
            raise OptionError(
                f"{path} holds weights of other names or shapes: {name} of shape {weights.get(name)}, "
                f"not {wanted.get(name)}: resume with the model that wrote it"
            )
    return history
