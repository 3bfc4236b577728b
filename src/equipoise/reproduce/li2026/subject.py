"""The network under test: a checkpoint, or one trained here with the paper's architecture."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from torch import nn

from ...activations import ReLU
from ...certificates import certify
from ...data import Data
from ...errors import FileFormatError, InputError
from ...files import load, save
from ...importers import import_model
from ...layers import MonDEQ
from ...parametrizations import Monotone
from ...plan import check_fits
from ...presets import classifier
from ...training import TrainingConfig, evaluate
from ..resumed import resumed
from ..run import UNFINISHED, Settings

__all__ = ["FEATURES", "MARGIN", "RANK", "Bench", "Subject", "begin", "describe", "train"]

FEATURES, RANK, MARGIN = 100, 25, 0.2
"""Hidden units and rows of A of the published network; the margin that training starts from here."""

FLOAT_NAME = "float.safetensors"

PUBLISHED_MARGIN, PUBLISHED_LIPSCHITZ = 0.226887, 1.845263
"""Of the released checkpoint: tells whether the network under test is that one."""


@dataclass(frozen=True)
class Bench:
    """What the experiments work on. ``given`` is the checkpoint's network, ``source`` where it came from in words."""

    settings: Settings
    data: Data
    folder: Path
    given: nn.Sequential | None
    source: str

    @cached_property
    def network(self) -> nn.Sequential:
        """The float network ``Sequential(MonDEQ, Linear)``; of a run without a checkpoint, once it is trained."""
        if self.given is not None:
            return self.given
        return _checked(load(self.folder / FLOAT_NAME), self.data, FLOAT_NAME)

    @cached_property
    def wide(self) -> nn.Sequential:
        """The network in float64, where experiments that compare with a bound are computed."""
        return copy.deepcopy(self.network).double().eval()

    @property
    def layer(self) -> MonDEQ:
        """The equilibrium layer in float64."""
        layer = self.wide[0]
        assert isinstance(layer, MonDEQ)
        return layer

    @property
    def epochs(self) -> int:
        """Passes over the training split, of the float network and of each network trained through a quantizer."""
        return 1 if self.settings.quick else 12


@dataclass(frozen=True)
class Subject:
    """The float network in figures: margin and Lipschitz constant proved, the rest measured."""

    source: str
    published: bool
    trained_epochs: int | None
    features: int
    rank: int
    margin: float
    lipschitz: float
    condition: float
    weight_norm: float
    accuracy: float
    test_samples: int


def begin(settings: Settings, data: Data, folder: Path) -> Bench:
    """Read the checkpoint, if one is given: a model file of equipoise, or the published state dict itself.

    Raises:
        FileFormatError: neither of the two.
        InputError: a network of another kind, or for another data set.
    """
    path = settings.checkpoint
    if path is None:
        return Bench(settings, data, folder, None, "trained here")
    try:
        model: nn.Module = load(path)
        source = f"the model file {path.name}"
    except FileFormatError as foreign:
        try:
            model = import_model(path, "mondeq-quant")
        except FileFormatError:
            raise FileFormatError(
                f"{path} is neither a model file of equipoise nor a checkpoint of mondeq-quant ({foreign}); bring"
                f" another project's network in with: equipoise import {path} --format ... --out model.safetensors"
            ) from foreign
        source = f"{path.name}, a checkpoint of mondeq-quant"
    return Bench(settings, data, folder, _checked(model, data, path.name), source)


def _checked(model: nn.Module, data: Data, name: str) -> nn.Sequential:
    """``model`` if it is what the paper's experiments are about: one structured float ReLU layer and a linear head."""
    parts = list(model.children()) if isinstance(model, nn.Sequential) else []
    if len(parts) != 2 or not isinstance(parts[0], MonDEQ) or not isinstance(parts[1], nn.Linear):
        kinds = ", ".join(type(part).__name__ for part in parts) or type(model).__name__
        raise InputError(f"{name} holds {kinds}; the experiments need one float MonDEQ layer and a Linear head")
    layer = parts[0]
    if not isinstance(layer.recurrent, Monotone) or not isinstance(layer.injection, nn.Linear):
        raise InputError(f"{name} is quantized, or has weights without structure: give the float network it came from")
    if not isinstance(layer.activation, ReLU):
        raise InputError(f"{name} has the activation {layer.activation}; the paper's experiments are about ReLU")
    check_fits(model, data)
    if parts[1].out_features != data.class_count:
        raise InputError(f"{name} ends in {parts[1].out_features} outputs, {data.name} has {data.class_count} classes")
    assert isinstance(model, nn.Sequential)
    return model.float().eval()


def train(bench: Bench, model: nn.Module, name: str, config: TrainingConfig) -> None:
    """Train ``model`` in place on the bench's data; a run that was killed goes on at its last whole epoch."""
    resumed(model, bench.data, config, bench.folder / UNFINISHED / name)


def describe(bench: Bench) -> Subject:
    """Train the network where no checkpoint was given, keep it, and say what it is."""
    if bench.given is None:
        model = classifier(bench.data, FEATURES, RANK, MARGIN, bench.settings.seed)
        train(bench, model, "float", TrainingConfig(bench.epochs, seed=bench.settings.seed))
        save(model, bench.folder / FLOAT_NAME, certify(model), force=True)
    proof = certify(bench.wide)
    weights = bench.layer.recurrent
    assert isinstance(weights, Monotone)
    assert proof.margin is not None
    assert proof.lipschitz is not None
    with torch.no_grad():
        norm = float(torch.linalg.matrix_norm(bench.layer.weight, 2))
    known = abs(proof.margin - PUBLISHED_MARGIN) < 5e-6 and abs(proof.lipschitz - PUBLISHED_LIPSCHITZ) < 5e-6
    return Subject(
        source=bench.source,
        published=known,
        trained_epochs=bench.epochs if bench.given is None else None,
        features=bench.layer.features,
        rank=weights.A.shape[0],
        margin=proof.margin,
        lipschitz=proof.lipschitz,
        condition=proof.lipschitz / proof.margin,
        weight_norm=norm,
        accuracy=evaluate(bench.network, bench.data.test),
        test_samples=len(bench.data.test),
    )
