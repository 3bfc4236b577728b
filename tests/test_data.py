"""Data: preprocessing to the last bit, splits that cover and do not overlap, batches, files good and bad."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from equipoise.data import Batches, Preprocessing, Split, load_data
from equipoise.errors import FileFormatError, InputError, OptionError

GREY = Preprocessing(mean=0.1307, std=0.3081, scale=255.0, input_shape=(28, 28))
COLOUR = Preprocessing(
    mean=(0.4914, 0.4822, 0.4465), std=(0.2470, 0.2435, 0.2616), scale=255.0, input_shape=(3, 32, 32)
)


# Preprocessing


def test_preprocessing_is_the_usual_transform_bit_for_bit() -> None:
    raw = torch.randint(0, 256, (50, 28, 28), dtype=torch.uint8)
    expected = (raw.float() / 255 - 0.1307) / 0.3081
    assert torch.equal(GREY(raw), expected.reshape(50, 784))
    assert GREY(raw).dtype == torch.float32
    assert GREY(raw).is_contiguous()


def test_channels_have_their_own_mean_and_std() -> None:
    raw = torch.randint(0, 256, (5, 3, 32, 32), dtype=torch.uint8)
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (COLOUR.mean, COLOUR.std))
    assert torch.equal(COLOUR(raw), ((raw.float() / 255 - mean) / std).reshape(5, 3072))


def test_raw_input_may_be_flat_or_have_axes_of_length_one_and_is_left_alone() -> None:
    raw = torch.rand(4, 28, 28) * 255
    kept = raw.clone()
    assert torch.equal(GREY(raw), GREY(raw.reshape(4, 784)))
    assert torch.equal(GREY(raw), GREY(raw[:, None]))
    assert torch.equal(GREY(raw), GREY(raw.numpy()))
    assert torch.equal(raw, kept)
    assert GREY(raw[:0]).shape == (0, 784)


@pytest.mark.parametrize("shape", [(28, 28), (5, 27, 28), (5, 783), (5, 3, 28, 28)])
def test_raw_input_of_another_shape_is_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(InputError, match=r"B, 28, 28.*B, 784"):
        GREY(torch.zeros(shape))


def test_channels_last_is_refused_rather_than_scrambled() -> None:
    with pytest.raises(InputError, match=r"\(2, 32, 32, 3\)"):
        COLOUR(torch.zeros(2, 32, 32, 3))


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_raw_input_that_is_not_finite_is_refused(bad: float) -> None:
    raw = torch.zeros(3, 784)
    raw[1, 5] = bad
    with pytest.raises(InputError, match="NaN or infinite"):
        GREY(raw)


@pytest.mark.parametrize("preprocessing", [GREY, COLOUR])
def test_preprocessing_survives_json(preprocessing: Preprocessing) -> None:
    assert Preprocessing.from_dict(json.loads(json.dumps(preprocessing.to_dict()))) == preprocessing


@pytest.mark.parametrize(
    "change",
    [
        {"std": 0.0},
        {"scale": -1.0},
        {"scale": "255"},
        {"mean": float("nan")},
        {"mean": (0.1, 0.2)},
        {"input_shape": ()},
        {"input_shape": (28, 0)},
    ],
)
def test_preprocessing_refuses_impossible_numbers(change: dict[str, Any]) -> None:
    fields: dict[str, Any] = {"mean": 0.1, "std": 0.3, "scale": 255.0, "input_shape": (28, 28), **change}
    with pytest.raises(OptionError, match=next(iter(change))):
        Preprocessing(**fields)


@pytest.mark.parametrize("fields", [{}, {**GREY.to_dict(), "gamma": 2.2}, {**GREY.to_dict(), "std": 0}, [1, 2]])
def test_preprocessing_from_a_foreign_file_is_refused(fields: Any) -> None:
    with pytest.raises(FileFormatError, match="preprocessing"):
        Preprocessing.from_dict(fields)


# Digits


def test_digits_are_split_in_proportion_without_overlap() -> None:
    from sklearn.datasets import load_digits

    data = load_data()
    splits = [data.train, data.validation, data.test]
    assert (data.name, data.features, data.class_count) == ("digits", 64, 10)
    assert [len(s) for s in splits] == [1257, 180, 360]
    rows = torch.cat([s.x for s in splits])
    expected = data.preprocessing(load_digits().images)
    assert torch.equal(*(v[np.lexsort(v.numpy().T)] for v in (rows, expected)))  # each image exactly once
    for split in splits:
        share = torch.bincount(split.y, minlength=10) / len(split)
        assert (share - 0.1).abs().max() < 0.012
        assert split.x.dtype == torch.float32
        assert split.x.is_contiguous()
    assert abs(float(rows.mean())) < 0.01
    assert abs(float(rows.std()) - 1) < 0.01


def test_digits_depend_on_the_seed_alone() -> None:
    first, again, other = load_data(seed=1), load_data(seed=1), load_data(seed=2)
    assert torch.equal(first.test.x, again.test.x)
    assert torch.equal(first.validation.y, again.validation.y)
    assert not torch.equal(first.test.x, other.test.x)


@pytest.mark.parametrize("name", ["", "MNIST", "imagenet", "../mnist"])
def test_an_unknown_name_is_refused(name: str) -> None:
    with pytest.raises(OptionError, match="digits, mnist, cifar10"):
        load_data(name)


@pytest.mark.parametrize("seed", [-1, 2**32, 0.5, True])
def test_a_bad_seed_is_refused(seed: Any) -> None:
    with pytest.raises(OptionError, match="seed"):
        load_data("digits", seed=seed)


def test_a_split_of_mismatched_lengths_is_refused() -> None:
    with pytest.raises(InputError, match=r"\(3, 2\).*\(4,\)"):
        Split(torch.zeros(3, 2), torch.zeros(4, dtype=torch.int64))


# Batches


def numbered(count: int) -> Split:
    """Samples whose features and class are their number."""
    return Split(torch.arange(count).float()[:, None].repeat(1, 2), torch.arange(count))


@given(st.integers(0, 50), st.integers(1, 60), st.booleans())
def test_batches_serve_every_sample_once(count: int, size: int, shuffle: bool) -> None:
    batches = Batches(numbered(count), size, shuffle)
    served = list(batches)
    assert len(served) == len(batches) == -(-count // size)
    assert all(len(y) == size for _, y in served[:-1])
    assert sorted(int(v) for _, y in served for v in y) == list(range(count))
    assert all(torch.equal(x[:, 1].long(), y) for x, y in served)


def test_batch_order_is_a_function_of_seed_and_epoch() -> None:
    def order(seed: int, epoch: int) -> list[int]:
        batches = Batches(numbered(40), 7, shuffle=True, seed=seed)
        batches.set_epoch(epoch)
        first = [int(v) for _, y in batches for v in y]
        assert first == [int(v) for _, y in batches for v in y]  # iterating does not advance
        return first

    orders = {(seed, epoch): tuple(order(seed, epoch)) for seed in range(3) for epoch in range(3)}
    assert len(set(orders.values())) == 9
    assert order(1, 2) == list(orders[1, 2])


def test_unshuffled_batches_are_views_in_order() -> None:
    split = numbered(10)
    served = list(Batches(split, 4))
    assert torch.equal(torch.cat([y for _, y in served]), split.y)
    assert served[0][0].data_ptr() == split.x.data_ptr()


@pytest.mark.parametrize("size", [0, -1, 2.5, True, None])
def test_a_bad_batch_size_is_refused(size: Any) -> None:
    with pytest.raises(OptionError, match="batch_size"):
        Batches(numbered(3), size)
