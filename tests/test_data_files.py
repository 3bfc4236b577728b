"""Image sets from files and from a hub: good, damaged, missing."""

from __future__ import annotations

import hashlib
import io
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

from equipoise.data import Data, load_data
from equipoise.errors import DataNotFoundError, FileFormatError

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
