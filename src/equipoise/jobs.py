"""One training, from data to a network that can be kept: what the commands ``train`` and ``sweep`` do."""

from __future__ import annotations

import hashlib
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from .data import Data, load_data
from .errors import InputError, OptionError
from .files import load
from .layers import NEMON
from .layers.chain import equilibrium_layers
from .layers.linear import QuantizedLinear
from .operators import QuantizedWeight
from .parametrizations import Monotone
from .presets import KINDS, Sizes, preset_of
from .qat import convert, prepare_qat
from .quantization.schemes import Scheme, scheme_to_dict
from .training import FitResult, TrainingConfig, fit

__all__ = ["Job", "Outcome"]


@dataclass(frozen=True)
class Outcome:
    """A trained network, holding codes where a scheme was asked for, and how training went."""

    model: nn.Module
    training: FitResult

    def figures(self) -> dict[str, Any]:
        """What is worth saying of it, as JSON has it."""
        result = self.training
        return {
            "interrupted": result.interrupted,
            "checkpoint": None if result.checkpoint is None else str(result.checkpoint),
            "accuracy": result.accuracy_test,
            "accuracy_validation": result.accuracy_validation,
            "accuracy_test": result.accuracy_test,
            "seconds_per_epoch": result.seconds_per_epoch,
            "epochs": len(result.history),
            "target_met": result.target_met,
            "stopped": result.stopped,
        }


@dataclass(frozen=True)
class Job:
    """What to train on what: a new network of the kind ``model`` as its ``preset`` says (its first one where None; see
    :data:`equipoise.presets.KINDS`), or the float network in the file ``start``; as floats or through ``scheme``.

    ``features`` (channels of a convolutional layer), ``rank``, ``margin`` (to start from, it is learned) and ``gamma``
    are the preset's where they are None. With ``start`` they must be the file's where they are given.

    Raises :class:`OptionError` for options that contradict each other.
    """

    data: str
    config: TrainingConfig
    scheme: Scheme | None = None
    learn_scale: bool = False
    features: int | None = None
    rank: int | None = None
    margin: float | None = None
    start: Path | None = None
    data_dir: Path | None = None
    gamma: float | None = None
    model: str = "mondeq"
    preset: str | None = None

    def __post_init__(self) -> None:
        if self.scheme is None and self.learn_scale:
            raise OptionError("learn_scale needs a scheme: there is no scale to learn without codes")
        if self.scheme is None and self.config.margin is not None and self.config.margin.ratio is not None:
            raise OptionError(
                f"margin ratio {self.config.margin.ratio:g} needs a scheme: nothing is rounded without one"
            )
        preset_of(self.model, self.preset)
        kind = KINDS[self.model]
        for name in self._sizes().given():
            if name not in kind.sizes:
                knowing = ", ".join(other for other, known in KINDS.items() if name in known.sizes)
                raise OptionError(
                    f"{name}={getattr(self, name)!r}: a {self.model} has none, but {knowing}; leave it out"
                )
        if kind.images and self.scheme is not None:
            raise OptionError(f"a {self.model} trains as floats: leave the scheme out, and quantize it after")
        if self.start is not None and (kind.images or self.preset is not None):
            raise OptionError(
                f"{self.start} holds a network, and model={self.model!r} makes a new one: name one of them"
            )
        for name in ("margin", "gamma") if self.start is not None else ():
            if getattr(self, name) is not None:
                raise OptionError(
                    f"{name}={getattr(self, name)!r}: the network in {self.start} has its own; leave it out"
                )

    def _sizes(self) -> Sizes:
        return Sizes(self.features, self.rank, self.margin, self.gamma, self.config.seed)

    def scheme_fields(self) -> dict[str, Any]:
        """The scheme as JSON has it; ``scheme`` and ``bits`` are None for floats."""
        return {"scheme": None, "bits": None} if self.scheme is None else scheme_to_dict(self.scheme)

    def network(self, data: Data) -> nn.Module:
        """The network before training.

        Raises :class:`InputError` where the one in ``start`` does not fit, and what :func:`prepare_qat` raises.
        """
        if self.start is not None:
            model: nn.Module = self._loaded(self.start, data)
        else:
            model = preset_of(self.model, self.preset).build(data, self._sizes())
        return model if self.scheme is None else prepare_qat(model, self.scheme, self.learn_scale)

    def _loaded(self, path: Path, data: Data) -> nn.Module:
        model = load(path)
        layers = [layer for _, layer in equilibrium_layers(model)]
        if any(isinstance(module, (QuantizedWeight, QuantizedLinear)) for module in model.modules()):
            raise InputError(f"the network in {path} holds codes: training starts from floats")
        if self.model == "nemon" and not all(isinstance(layer, NEMON) for layer in layers):
            raise InputError(f"the network in {path} is no nemon: leave the model out")
        for name, wanted in (("features", self.features), ("rank", self.rank)):
            for layer in layers:
                found = layer.features if name == "features" else _rank(layer)
                if wanted is not None and found != wanted:
                    raise InputError(f"{name}={wanted}: the network in {path} has {found}; leave it out or train anew")
        known = getattr(model, "preprocessing", None)
        if known is None:
            warnings.warn(f"{path} does not say how its inputs were preprocessed; taken as {data.name}", stacklevel=2)
            model.preprocessing = data.preprocessing  # type: ignore[assignment]
        elif known != data.preprocessing:
            raise InputError(
                f"the network in {path} takes inputs preprocessed as {known}, and {data.name} is {data.preprocessing}"
            )
        return model

    def _origin(self, model: nn.Module) -> dict[str, str | float | None]:
        """What tells the weights before training from others: the margin, or of a file's network all it holds."""
        if self.start is None:
            return {"start_margin": self.margin}
        content = hashlib.sha256()
        for name, value in sorted(model.state_dict().items()):
            content.update(name.encode())
            content.update(value.detach().cpu().contiguous().numpy().tobytes())
        return {"start_network": content.hexdigest()}

    def run(
        self, folder: Path | None, resume: bool = False, progress: bool = True, network: nn.Module | None = None
    ) -> Outcome:
        """Train in ``folder`` (see :func:`fit`); ``network`` is what :meth:`network` gave, if it was asked before.

        An interrupted network stays as it was being trained.
        """
        data = load_data(self.data, self.data_dir)
        model = self.network(data) if network is None else network
        result = fit(model, data, self.config, folder, progress, resume, self._origin(model))
        done = self.scheme is not None and not result.interrupted
        return Outcome((convert(model) if done else model).eval(), result)


def _rank(layer: Any) -> int | None:
    weights = layer.recurrent
    return weights.A.shape[0] if isinstance(weights, Monotone) else None
