"""What is benched: a network trained here for a moment, the checkpoint of a file, and the inputs of both."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, interpolate

from ..data import Batches, Data, Preprocessing, Split, load_data
from ..errors import DataNotFoundError, InputError, MissingExtraError
from ..importers import import_model
from ..layers import MonDEQ

__all__ = [
    "BATCH",
    "CLASSES",
    "FEATURES",
    "RANK",
    "SIDE",
    "Network",
    "Setting",
    "checkpoint_network",
    "images",
    "stepper",
    "trained_network",
    "warm_up",
]

SIDE = 28
FEATURES, RANK, CLASSES = 100, 25, 10
BATCH = 128
COPIES = 12
"""Of each training digit, with other noise each."""


class Network(NamedTuple):
    """A float32 classifier that begins with an equilibrium layer, and samples ``(N, 784)`` for that layer."""

    name: str
    model: nn.Sequential
    layer: MonDEQ
    samples: Tensor
    accuracy: float

    def to_dict(self) -> dict[str, Any]:
        operator = self.layer.operator
        margin, lipschitz = operator.margin(), operator.lipschitz()
        return {
            "name": self.name,
            "in_features": self.layer.in_features,
            "features": self.layer.features,
            "margin": margin,
            "lipschitz": lipschitz,
            "condition": lipschitz / margin if margin > 0 else None,
            "accuracy": self.accuracy,
        }


class Setting(NamedTuple):
    """What a run is asked for: less of everything or not; 28 × 28 images; where data lie; a network of the user's."""

    quick: bool
    data: Data
    data_dir: str | Path | None = None
    given: Network | None = None


def images(data_dir: str | Path | None) -> tuple[Data, list[str]]:
    """28 × 28 images and remarks about them: MNIST from a named folder, else scikit-learn's digits, enlarged.

    The hub is not asked: a benchmark should not wait for a download.
    """
    notes: list[str] = []
    if data_dir is not None or os.environ.get("EQUIPOISE_DATA"):
        try:
            return load_data("mnist", data_dir), notes
        except (DataNotFoundError, MissingExtraError) as error:
            if data_dir is not None:
                raise
            notes.append(f"no MNIST: {error}")
    notes.append("inputs are scikit-learn's digits, enlarged to 28 × 28, and noisy in training; --data-dir names MNIST")
    return _enlarged(load_data("digits")), notes


def _enlarged(data: Data) -> Data:
    def enlarge(split: Split) -> Split:
        small = split.x.unflatten(1, (1, *data.preprocessing.input_shape))
        return Split(interpolate(small, (SIDE, SIDE), mode="bilinear").flatten(1), split.y)

    old, train = data.preprocessing, enlarge(data.train)
    # So few images are soon learned by heart, and their gradients are then too small to compare.
    x, y = train.x.repeat(COPIES, 1), train.y.repeat(COPIES)
    noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(0))
    return dataclasses.replace(
        data,
        name=f"{data.name}, enlarged",
        train=Split(x + noise, y),
        validation=enlarge(data.validation),
        test=enlarge(data.test),
        preprocessing=Preprocessing(old.mean, old.std, old.scale, (SIDE, SIDE)),
    )


def stepper(model: nn.Module, rate: float = 1e-3, decay: float = 0.0) -> Callable[[Tensor, Tensor], None]:
    """One training step as everybody writes it: forward, backward, fused Adam (with ``decay``, AdamW)."""
    optimizer = torch.optim.AdamW(model.parameters(), rate, weight_decay=decay, fused=True)

    def step(x: Tensor, y: Tensor) -> None:
        optimizer.zero_grad()
        cross_entropy(model(x), y).backward()
        optimizer.step()

    return step


def trained_network(data: Data, steps: int, seed: int = 0, margin: float = 0.3, decay: float = 0.0) -> Network:
    """A monDEQ 784–100–10 as [LLC26] has it (r = 25, m learned) after a moment of training, so that W is not random."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        layer = MonDEQ(data.features, FEATURES, rank=RANK, margin=margin, learn_margin=True, tol=1e-2)
        model = nn.Sequential(layer, nn.Linear(FEATURES, CLASSES))
    warm_up(model, data, steps, seed, decay)
    layer.tol = None
    return _network("trained here", model.eval(), layer, data)


def warm_up(model: nn.Module, data: Data, steps: int, seed: int = 0, decay: float = 0.0) -> None:
    """``steps`` steps of training."""
    step, done, epoch = stepper(model, 3e-3, decay), 0, 0
    batches = Batches(data.train, BATCH, shuffle=True, seed=seed)
    while done < steps:
        batches.set_epoch(epoch)
        for x, y in batches:
            step(x, y)
            done += 1
            if done == steps:
                break
        epoch += 1


def checkpoint_network(path: str | Path, data: Data) -> Network:
    """The network of a checkpoint of mondeq-quant [LLC26] in float32.

    Raises:
        InputError: it does not take 784 features.
    """
    model = import_model(path, "mondeq-quant").float().eval()
    layer = model[0]
    assert isinstance(layer, MonDEQ)
    if layer.in_features != data.features:
        raise InputError(
            f"the network of {path} takes {layer.in_features} features, where MNIST has {data.features}:"
            " bench one that was trained on that"
        )
    return _network(Path(path).name, model, layer, data)


@torch.no_grad()
def _network(name: str, model: nn.Sequential, layer: MonDEQ, data: Data) -> Network:
    scores = model(data.test.x)
    accuracy = float((scores.argmax(1) == data.test.y).double().mean())
    return Network(name, model, layer, data.test.x, accuracy)
