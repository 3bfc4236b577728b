"""Data: preprocessing to the last bit, splits that cover and do not overlap, batches, files good and bad."""

from __future__ import annotations

import hashlib
import io
import json
import os
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any

import datasets
import huggingface_hub
import numpy as np
import PIL.Image
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from equipoise.data import Batches, Data, Preprocessing, Split, load_data
from equipoise.errors import DataNotFoundError, FileFormatError, InputError, OptionError

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


# Image sets from files

ROWS = {"train": 5_003, "test": 4}
SHAPES = {"mnist": (28, 28), "cifar10": (32, 32, 3)}


def png(pixels: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    PIL.Image.fromarray(pixels).save(buffer, "PNG", compress_level=1)
    return buffer.getvalue()


def write_set(folder: Path, name: str, rows: dict[str, int] = ROWS) -> dict[str, np.ndarray]:
    """A small set in the hub's layout; returns its pixels. Labels are the sample's number modulo 10."""
    column = {"mnist": "image", "cifar10": "img"}[name]
    (folder / name).mkdir(parents=True)
    pixels = {}
    for split, count in rows.items():
        generator = np.random.default_rng(len(split))
        # Few different images: encoding thousands of them would take most of the test's time.
        few = generator.integers(0, 256, (5, *SHAPES[name]), dtype=np.uint8)
        encoded = [png(image) for image in few]
        pixels[split] = few[np.arange(count) % 5]
        images = [{"bytes": encoded[i % 5], "path": f"{i}.png"} for i in range(count)]
        table = pa.table({column: images, "label": [i % 10 for i in range(count)]})
        pq.write_table(table, folder / name / f"{split}-00000-of-00001.parquet")
    return pixels


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache, no data named by the environment, and a hub nobody must ask."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv("EQUIPOISE_DATA", raising=False)

    def asked(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("the hub was asked")

    monkeypatch.setattr(huggingface_hub.HfApi, "dataset_info", asked)
    return tmp_path / "cache" / "equipoise"


def same(a: Data, b: Data) -> bool:
    pairs = [(a.train, b.train), (a.validation, b.validation), (a.test, b.test)]
    return all(torch.equal(s.x, t.x) and torch.equal(s.y, t.y) for s, t in pairs)


@pytest.mark.parametrize("name", ["mnist", "cifar10"])
def test_an_image_set_is_read_from_parquet(name: str, tmp_path: Path, cache: Path) -> None:
    pixels = write_set(tmp_path, name)
    data = load_data(name, tmp_path)
    channels_first = {k: v.transpose(0, 3, 1, 2) if v.ndim == 4 else v for k, v in pixels.items()}
    assert [len(s) for s in (data.train, data.validation, data.test)] == [3, 5_000, 4]
    everything = torch.cat([data.train.x, data.validation.x])
    assert torch.equal(everything, data.preprocessing(channels_first["train"]))
    assert torch.equal(data.test.x, data.preprocessing(channels_first["test"]))
    assert data.validation.y[:3].tolist() == [3, 4, 5]
    assert data.features == pixels["test"][0].size
    assert data.class_count == 10


def test_the_folder_may_be_named_by_the_environment(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_set(tmp_path / "named", "mnist")
    monkeypatch.setenv("EQUIPOISE_DATA", str(tmp_path / "named"))
    assert len(load_data("mnist").test) == 4
    with pytest.raises(DataNotFoundError, match="elsewhere"):
        load_data("mnist", tmp_path / "elsewhere")  # the argument wins


def test_images_are_decoded_once(tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_set(tmp_path, "mnist")
    first = load_data("mnist", tmp_path)
    assert sorted(p.suffix for p in cache.iterdir()) == [".npz", ".npz"]  # and nothing half-written

    def decoded(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("decoded again")

    monkeypatch.setattr(PIL.Image, "open", decoded)
    assert same(load_data("mnist", tmp_path), first)


def test_other_content_at_the_same_path_is_not_taken_from_the_cache(tmp_path: Path, cache: Path) -> None:
    pixels = write_set(tmp_path, "mnist")
    load_data("mnist", tmp_path)
    path = tmp_path / "mnist" / "test-00000-of-00001.parquet"
    before = path.stat()
    row = {"bytes": png(255 - pixels["test"][0]), "path": None}
    pq.write_table(pa.table({"image": [row], "label": [7]}), path)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert load_data("mnist", tmp_path).test.y.tolist() == [7]


def flip_a_pixel(content: bytes) -> bytes:
    middle = len(content) // 2
    return content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :]


def another_shape(content: bytes) -> bytes:
    buffer = io.BytesIO()
    np.savez(buffer, images=np.zeros((4, 8, 8), np.uint8), labels=np.zeros(4, np.int64))
    return buffer.getvalue()


def pickled(content: bytes) -> bytes:
    buffer = io.BytesIO()
    np.savez(buffer, images=np.array([{}], dtype=object), labels=np.zeros(1, np.int64))
    return buffer.getvalue()


@pytest.mark.parametrize(
    "damage",
    [flip_a_pixel, another_shape, pickled, lambda c: c[: len(c) // 2], lambda c: b"", lambda c: b"junk" * 99],
    ids=["flipped bit", "another shape", "pickled", "truncated", "empty", "foreign"],
)
def test_a_damaged_cache_is_rebuilt(damage: Any, tmp_path: Path, cache: Path) -> None:
    write_set(tmp_path, "mnist")
    first = load_data("mnist", tmp_path)
    kept = {path: path.read_bytes() for path in cache.iterdir()}
    for path, content in kept.items():
        path.write_bytes(damage(content))
    assert same(load_data("mnist", tmp_path), first)
    assert {path: path.read_bytes() for path in cache.iterdir()} == kept


def test_a_cache_that_cannot_be_written_is_done_without(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_set(tmp_path, "mnist")
    (tmp_path / "a file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "a file"))
    assert len(load_data("mnist", tmp_path).test) == 4


def one_row(**change: Any) -> dict[str, list[Any]]:
    return {"image": [{"bytes": png(np.zeros((28, 28), np.uint8)), "path": None}], "label": [0], **change}


@pytest.mark.parametrize(
    ("table", "says"),
    [
        (one_row(label=[10]), "labels outside 0 … 9"),
        (one_row(label=[-1]), "labels outside 0 … 9"),
        (one_row(label=["seven"]), "'label'"),
        (one_row(label=[7.5]), "'label'"),
        (one_row(label=[None]), "'label'"),
        ({"img": one_row()["image"], "label": [0]}, "'image'"),
        (one_row(image=[{"bytes": b"not an image", "path": None}]), "cannot identify"),
        (one_row(image=[{"bytes": png(np.zeros((8, 8), np.uint8)), "path": None}]), "8×8"),
        (one_row(image=[{"bytes": None, "path": "elsewhere.png"}]), "'image'"),
        (one_row(), "1 training images"),
    ],
)
def test_parquet_of_something_else_is_refused(
    table: dict[str, list[Any]], says: str, tmp_path: Path, cache: Path
) -> None:
    (tmp_path / "mnist").mkdir()
    pq.write_table(pa.table(table), tmp_path / "mnist" / "train-00000-of-00001.parquet")
    with pytest.raises(FileFormatError, match=says):
        load_data("mnist", tmp_path)
    assert says.endswith("training images") or not cache.exists()


@pytest.mark.parametrize("content", [b"", b"PAR1 but no more", b"\x80\x04K\x01."])
def test_a_file_that_is_not_parquet_is_refused(content: bytes, tmp_path: Path, cache: Path) -> None:
    (tmp_path / "mnist").mkdir()
    path = tmp_path / "mnist" / "train-00000-of-00001.parquet"
    path.write_bytes(content)
    with pytest.raises(FileFormatError, match=r"train-00000-of-00001.parquet cannot be read as parquet"):
        load_data("mnist", tmp_path)


# The hub


def test_missing_data_names_both_ways(tmp_path: Path, cache: Path) -> None:
    with pytest.raises(DataNotFoundError, match=r"--data-dir or EQUIPOISE_DATA.*Hugging Face hub") as caught:
        load_data("cifar10", tmp_path)
    assert str(tmp_path / "cifar10" / "train-00000-of-00001.parquet") in str(caught.value)


def test_an_unreachable_hub_fails_at_once(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def unreachable(*args: Any, **kwargs: Any) -> None:
        assert kwargs["timeout"] <= 5
        raise ConnectionError("no route")

    def patient(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("load_dataset would go on trying for half a minute")

    monkeypatch.setattr(huggingface_hub.HfApi, "dataset_info", unreachable)
    monkeypatch.setattr(datasets, "load_dataset", patient)
    with pytest.raises(DataNotFoundError, match=r"ylecun/mnist.*hub.*--data-dir or EQUIPOISE_DATA"):
        load_data("mnist")


def test_a_refused_connection_is_one_line(tmp_path: Path) -> None:
    """The real client against a closed port; in its own process, since it reads the endpoint once."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "EQUIPOISE_"))}
    environment |= {
        "HF_ENDPOINT": "http://127.0.0.1:9",
        "HF_HOME": str(tmp_path),
        "XDG_CACHE_HOME": str(tmp_path),
    }
    code = "import equipoise.data as d\ntry: d.load_data('mnist')\nexcept FileNotFoundError as e: print(e)"
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=60, check=True
    )
    assert done.stdout.count("\n") == 1
    assert "--data-dir or EQUIPOISE_DATA" in done.stdout
    assert done.stderr == ""


def test_the_hub_serves_and_is_asked_once(tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_set(tmp_path, "mnist")
    from_folder, from_file, asked = load_data("mnist", tmp_path), datasets.load_dataset, []

    def hub(repository: str, split: str) -> Any:
        asked.append((repository, split))
        path = tmp_path / "mnist" / f"{split}-00000-of-00001.parquet"
        return from_file("parquet", data_files={"x": str(path)}, split="x", cache_dir=str(tmp_path / "hf"))

    monkeypatch.setattr(huggingface_hub.HfApi, "dataset_info", lambda *a, **k: None)
    monkeypatch.setattr(datasets, "load_dataset", hub)
    assert same(load_data("mnist"), from_folder)
    assert same(load_data("mnist"), from_folder)  # offline by now, as far as the cache is concerned
    assert asked == [("ylecun/mnist", "train"), ("ylecun/mnist", "test")]


# The real thing


def test_mnist_is_mnist(mnist_dir: Path, cache: Path) -> None:
    """Pixel for pixel: the IDX files made from it have the published MD5 sums."""
    from equipoise._images import read_images
    from equipoise.data import _SOURCES

    sums = {"train": "6bbc9ace898e44ae57da46a324031adb", "test": "2646ac647ad5339dbf082846283269ea"}
    for split, expected in sums.items():
        images, _ = read_images(_SOURCES["mnist"], split, mnist_dir)
        idx = struct.pack(">4I", 2051, *images.shape) + images.tobytes()
        assert hashlib.md5(idx).hexdigest() == expected
    data = load_data("mnist", mnist_dir)
    assert [tuple(s.x.shape) for s in (data.train, data.validation, data.test)] == [
        (55_000, 784),
        (5_000, 784),
        (10_000, 784),
    ]
    assert data.train.y[:5].tolist() == [5, 0, 4, 1, 9]
    assert data.test.y[:4].tolist() == [7, 2, 1, 0]
    assert abs(float(data.train.x.mean())) < 1e-3
    assert abs(float(data.train.x.std()) - 1) < 1e-3
    assert torch.bincount(data.test.y).tolist() == [980, 1135, 1032, 1010, 982, 892, 958, 1028, 974, 1009]
