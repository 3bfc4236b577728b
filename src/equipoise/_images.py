"""Image sets as the Hugging Face hub lays them out, read from a folder or the hub, decoded once.

``read_images`` finds the file, takes the decoded images from the cache or decodes them, and keeps them
there. Pixels are bytes all the way; what becomes of them is the business of ``data``.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import os
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ._atomic import replacing
from .errors import DataNotFoundError, FileFormatError, MissingExtraError

__all__ = ["ImageSource", "read_images"]

Arrays = tuple[NDArray[np.uint8], NDArray[np.int64]]  # images (N, *shape), labels (N,)
_FILE = "{split}-00000-of-00001.parquet"


@dataclass(frozen=True)
class ImageSource:
    """A set of 8-bit images, grey (H, W) or RGB (3, H, W), one parquet file per split."""

    name: str
    repository: str  # on the hub
    column: str  # of the encoded images; the labels are in "label"
    shape: tuple[int, ...]
    classes: tuple[str, ...]


def read_images(source: ImageSource, split: str, folder: Path | None) -> Arrays:
    """Images uint8 (N, *shape) and labels int64 (N,) of ``split`` ("train" or "test"), in their own order.

    From ``<folder>/<name>/<split>-00000-of-00001.parquet``; without a folder, from the hub. Raises
    :class:`DataNotFoundError`, :class:`FileFormatError`, :class:`MissingExtraError`.
    """
    if folder is None:
        # A published set does not change, so its name is key enough, and the cache serves it offline.
        return _cached(source, f"{source.name}-{split}-hub", lambda: _decode(source, _fetch(source, split)))
    path = folder / source.name / _FILE.format(split=split)
    try:
        with path.open("rb") as file:
            fingerprint = hashlib.file_digest(file, "blake2b").hexdigest()[:32]
    except OSError as error:
        raise DataNotFoundError(
            f"no {source.name} at {path} ({error.strerror}): name the folder that holds {source.name}/ with"
            " --data-dir or EQUIPOISE_DATA, or name no folder and it comes from the Hugging Face hub"
            f" ({source.repository})"
        ) from error
    key = f"{source.name}-{split}-{fingerprint}"
    return _cached(source, key, lambda: _decode(source, _parquet(path), path))


def _cached(source: ImageSource, key: str, build: Callable[[], Arrays]) -> Arrays:
    """What ``build`` returns, kept under a key that changes with the content it was built from."""
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "equipoise"
    path = folder / f"{key}.npz"
    try:
        with path.open("rb") as file, np.load(file, allow_pickle=False) as kept:
            images, labels = kept["images"], kept["labels"]  # zip members carry a checksum
        if images.dtype == np.uint8 and images.shape == (len(labels), *source.shape):
            return images, labels
    except Exception:  # absent, or damaged in whatever way: build it again
        pass
    images, labels = build()
    with contextlib.suppress(OSError):  # a cache that cannot be written costs time, nothing else
        _write(path, images=images, labels=labels)
    return images, labels


def _write(path: Path, **arrays: NDArray[Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path, force=True) as file:
        np.savez(file, allow_pickle=False, **arrays)


def _datasets() -> Any:
    try:
        import datasets
        import PIL.Image  # noqa: F401
    except ImportError as error:
        message = "mnist and cifar10 need datasets and pillow: pip install 'equipoise[data]'"
        raise MissingExtraError(message) from error
    return datasets


def _parquet(path: Path) -> Any:
    """The rows of one parquet file, images still encoded."""
    datasets = _datasets()
    shown, told = not datasets.are_progress_bars_disabled(), datasets.logging.get_verbosity()
    datasets.disable_progress_bars()
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)  # what it logs, it raises as well
    # The copy that `datasets` writes is thrown away: what is worth keeping is the decoded images.
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as scratch:
        try:
            return datasets.load_dataset(
                "parquet",
                data_files={"rows": str(path)},
                split="rows",
                cache_dir=scratch,
                keep_in_memory=True,
            )
        except Exception as error:  # pyarrow and datasets raise a dozen unrelated types
            raise FileFormatError(f"{path} cannot be read as parquet: {error.__cause__ or error}") from error
        finally:
            datasets.logging.set_verbosity(told)
            if shown:
                datasets.enable_progress_bars()


def _fetch(source: ImageSource, split: str) -> Any:
    """The rows of one split from the hub, or from what was downloaded before when offline mode is on."""
    datasets = _datasets()
    from huggingface_hub import HfApi
    from huggingface_hub.errors import OfflineModeIsEnabled

    try:
        # `datasets` retries for half a minute before it says that there is no network: ask once, briefly.
        with contextlib.suppress(OfflineModeIsEnabled):
            HfApi().dataset_info(source.repository, timeout=5.0)
        return datasets.load_dataset(source.repository, split=split)
    except Exception as error:
        raise DataNotFoundError(
            f"{source.repository} cannot be fetched from the Hugging Face hub ({type(error).__name__}):"
            " go online, or name with --data-dir or EQUIPOISE_DATA a folder that holds"
            f" {source.name}/{_FILE.format(split=split)}"
        ) from error


def _decode(source: ImageSource, dataset: Any, origin: Path | None = None) -> Arrays:
    """All images at once, straight from the arrow buffers (sample by sample takes far longer)."""
    from PIL import Image

    where = origin or source.repository
    mode = "RGB" if len(source.shape) == 3 else "L"
    try:
        table = dataset.with_format("arrow")[:]
        labels = table.column("label").to_numpy().astype(np.int64, casting="same_kind")
        images = np.empty((len(labels), *source.shape), dtype=np.uint8)
        cells = (cell for chunk in table.column(source.column).chunks for cell in chunk.field("bytes"))
        for i, cell in enumerate(_shown(cells, len(labels), f"decoding {source.name}")):
            picture = Image.open(io.BytesIO(cell.as_buffer()), formats=("PNG", "JPEG"))
            if picture.size[::-1] != source.shape[-2:]:  # before it is decoded: it may say that it is a huge one
                raise ValueError(f"image {i} measures {picture.height}×{picture.width}")
            pixels = np.asarray(picture if picture.mode == mode else picture.convert(mode))
            images[i] = pixels.transpose(2, 0, 1) if pixels.ndim == 3 else pixels
    except Exception as error:  # a missing column, labels that are text, a broken image, another size, ...
        expected = f"columns {source.column!r} (images of shape {source.shape}) and 'label'"
        raise FileFormatError(f"{where} does not hold {expected}: {error}") from error
    if not np.isin(labels, np.arange(len(source.classes))).all():
        raise FileFormatError(f"{where} has labels outside 0 … {len(source.classes) - 1}")
    return images, labels


def _shown(cells: Any, count: int, title: str) -> Any:
    """The same cells, with a progress bar on stderr while they are consumed (on a terminal only)."""
    from rich.console import Console  # here, because `import equipoise` passes through this module
    from rich.progress import track

    console = Console(stderr=True)
    hidden = not console.is_terminal
    return track(cells, title, count, console=console, transient=True, disable=hidden, update_period=0.5)
