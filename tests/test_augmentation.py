"""Random shifts and mirror images, against the same written image by image; and what decides them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from equipoise.augmentation import Augmentation, usual_augmentation
from equipoise.data import Preprocessing, load_data
from equipoise.errors import OptionError
from equipoise.training import TrainingConfig, fit
from trainings import explicit, same, stopped

COLOUR = Preprocessing(mean=(0.5, 0.4, 0.3), std=(0.2, 0.3, 0.4), scale=255.0, input_shape=(3, 7, 5))
GREY = Preprocessing(mean=0.3, std=0.4, scale=16.0, input_shape=(8, 8))


def images(preprocessing: Preprocessing, count: int = 40) -> Tensor:
    torch.manual_seed(0)
    raw = torch.randint(1, int(preprocessing.scale) + 1, (count, *preprocessing.input_shape), dtype=torch.uint8)
    return preprocessing(raw)


def every_image(x: Tensor, preprocessing: Preprocessing, shift: int) -> Tensor:
    """``(B, 2, 2 shift + 1, 2 shift + 1, features)``: each image, mirrored or not, in all of its places."""
    height, width = preprocessing.input_shape[-2:]
    black = preprocessing(np.zeros((1, *preprocessing.input_shape), dtype=np.uint8))
    found = []
    for image in x:
        single = image.view(-1, height, width)
        for mirrored in (single, single.flip(2)):
            canvas = torch.empty(len(single), height + 2 * shift, width + 2 * shift)
            canvas[:] = black.view(-1, height, width)[:, :1, :1]
            canvas[:, shift : shift + height, shift : shift + width] = mirrored
            for down in range(2 * shift + 1):
                for right in range(2 * shift + 1):
                    found.append(canvas[:, down : down + height, right : right + width].reshape(-1))
    return torch.stack(found).view(len(x), 2, 2 * shift + 1, 2 * shift + 1, -1)


@pytest.mark.parametrize("preprocessing", [COLOUR, GREY], ids=["colour", "grey"])
@pytest.mark.parametrize("mirror", [False, True])
def test_every_image_is_one_of_its_crops(preprocessing: Preprocessing, mirror: bool) -> None:
    x = images(preprocessing)
    given = x.clone()
    changed = Augmentation(2, mirror)(x, preprocessing, (0, 1))
    assert torch.equal(x, given)
    hits = (every_image(x, preprocessing, 2) - changed[:, None, None, None]).abs().amax(-1) < 1e-6
    assert bool((hits.flatten(1).sum(1) == 1).all())
    _, mirrored, down, right = hits.nonzero(as_tuple=True)
    assert set(mirrored.tolist()) == ({0, 1} if mirror else {0})
    assert set(down.tolist()) == set(right.tolist()) == set(range(5)), "all shifts occur, and not in step"
    assert len({*zip(down.tolist(), right.tolist(), strict=True)}) > 10


def test_it_is_a_function_of_the_entropy() -> None:
    x, change = images(GREY), Augmentation(1)
    assert torch.equal(change(x, GREY, (0, 1, 2)), change(x, GREY, (0, 1, 2)))
    assert not torch.equal(change(x, GREY, (0, 1, 2)), change(x, GREY, (0, 1, 3)))


def test_a_mirror_image_alone() -> None:
    x = images(COLOUR)
    changed = Augmentation(0, mirror=True)(x, COLOUR, (3,)).view(-1, 3, 7, 5)
    plain = x.view(-1, 3, 7, 5)
    kept = (changed == plain).flatten(1).all(1)
    assert torch.equal(changed[~kept], plain[~kept].flip(3))
    assert 5 < int(kept.sum()) < 35


@pytest.mark.parametrize(("shift", "mirror"), [(-1, False), (0, False), (1.5, False), (True, False), (1, 1)])
def test_bad_options_are_refused(shift: int, mirror: bool) -> None:
    with pytest.raises(OptionError):
        Augmentation(shift, mirror)


def test_what_is_no_image_cannot_be_shifted() -> None:
    with pytest.raises(OptionError, match=r"\(12,\)"):
        Augmentation(1)(torch.zeros(2, 12), Preprocessing(0.0, 1.0, 1.0, (12,)), (0,))
    with pytest.raises(OptionError, match="8 pixels"):
        Augmentation(8)(images(GREY), GREY, (0,))


def test_a_resumed_training_sees_the_same_images(tmp_path: Path) -> None:
    digits = load_data("digits")
    config = TrainingConfig(3, accelerator="cpu", augment=usual_augmentation("digits"))
    whole, parts, plain = explicit(), explicit(), explicit()
    fit(whole, digits, config, progress=False)
    with pytest.raises(InterruptedError):
        fit(stopped(parts, 14), digits, config, tmp_path, progress=False)
    again = explicit()
    fit(again, digits, config, tmp_path, progress=False, resume=True)
    assert same(again, whole)
    fit(plain, digits, TrainingConfig(3, accelerator="cpu"), progress=False)
    assert not same(plain, whole)
    for other in (None, Augmentation(2)):
        with pytest.raises(OptionError, match="augment"):
            fit(explicit(), digits, TrainingConfig(3, accelerator="cpu", augment=other), tmp_path, resume=True)
