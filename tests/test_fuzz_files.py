"""Bent files for every reader: a value or one of the package's errors comes out, whatever is in them."""

from __future__ import annotations

import dataclasses
import json
import resource
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from random import Random
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import equipoise as eq
from command_line import Capsys, run
from equipoise._codecs.modules import MODULES
from equipoise._images import read_images

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))

import fuzz
from hostile import NAMES
from hostile.junk import checksum
from hostile.models import MODELS
from hostile.networks import Bomb, model_file, parts
from hostile.readers import READERS, SOURCE, bomb_png, exported

COUNTS = {"model": 40, "training": 4, "images": 5, "sweep": 15, "checkpoint": 20}
"""Examples of a run, of readers that take long."""


def test_every_reader_is_tried() -> None:
    assert tuple(READERS) == NAMES


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("bent") / "file"


@pytest.mark.parametrize("name", NAMES)
def test_nothing_but_our_errors_comes_out_of_a_reader(name: str, path: Path) -> None:
    found = set()

    @settings(max_examples=COUNTS.get(name, 40))
    @given(st.randoms(use_true_random=False))
    def bend(rng: Random) -> None:
        found.add(READERS[name].trial(rng, path.with_name(name)))

    bend()
    assert found
    assert not Path(Bomb.where).exists()


@pytest.mark.filterwarnings("ignore:.*Triggered internally:UserWarning")  # of what torch makes of odd tensors
@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_nor_after_many_seeds(name: str, path: Path) -> None:
    for seed in range(300 if name in COUNTS else 1000):
        READERS[name].trial(Random(seed), path.with_name(name))


def test_a_crash_is_noticed_and_can_be_repeated(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(path: Path) -> None:
        raise ZeroDivisionError

    monkeypatch.setitem(READERS, "journal", dataclasses.replace(READERS["journal"], read=broken))
    monkeypatch.setattr(resource, "setrlimit", lambda *_: None)
    assert fuzz.main(["--reader", "journal", "--seconds", "0.05", "--seed", "3"]) == 1
    assert "--reader journal --only 3" in capsys.readouterr().out
    monkeypatch.undo()


# Found by bending, and mended


def bent(kind: str, edit: Callable[[Any, dict[str, Tensor]], object]) -> bytes:
    """A file of ``kind`` with its document and tensors edited, checksums right."""
    document, tensors = parts(model_file(kind))
    edit(document["architecture"], tensors)
    document["checksums"] = {name: checksum(tensor) for name, tensor in tensors.items()}
    return safetensors.torch.save(tensors, {"equipoise": json.dumps(document)})


def filled(name: str, value: float) -> Callable[[Any, dict[str, Tensor]], object]:
    return lambda architecture, tensors: tensors[name].fill_(value)


def test_weights_that_overflow_have_a_certificate_that_says_little(path: Path) -> None:
    for kind, name, value in (
        ("dense", "recurrent.weight", 3e38),
        ("structured", "0.recurrent.A.scale", 3e38),
        ("structured", "0.recurrent.margin", 1e-300),
        ("mon conv structured", "1.recurrent.margin", 1e-300),
        ("multiscale", "map.convs.widen_0.kernel.vector", 1e38),
    ):
        path.write_bytes(bent(kind, filled(name, value)))
        try:
            found = eq.certify(eq.load(path))
        except eq.EquipoiseError:
            continue
        assert not found.certified or (found.margin is not None and found.margin >= 0), kind


# Files that claim too much


@pytest.fixture
def little_memory() -> Iterator[None]:
    """3 GiB more than is taken now; what asks for more fails instead of taking the machine down."""
    before = resource.getrlimit(resource.RLIMIT_AS)
    taken = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (taken + 3 * 2**30, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_AS, before)


def large(side: int) -> Callable[[Any, dict[str, Tensor]], object]:
    def edit(architecture: Any, tensors: dict[str, Tensor]) -> None:
        architecture["modules"][0].update(sizes=[1, side, side])
        architecture["modules"][1].update(image_size=[side, side])

    return edit


HUGE: dict[str, tuple[str, Callable[[Any, dict[str, Tensor]], object]]] = {
    "features": ("classifier", lambda a, t: a["modules"][0].update(features=2**31)),
    "inputs": ("structured", lambda a, t: a["modules"][0]["injection"].update(in_features=2**31)),
    "rows of codes": ("cayley", lambda a, t: a["modules"][0].update(features=10**6)),
    "images": ("mon conv", large(8192)),
    "images of codes": ("mon conv structured", large(8192)),
    "a border": ("mon conv", lambda a, t: a["modules"][1].update(border=8192)),
    "two grids": ("two tiers", lambda a, t: a.update(image_size=[8192, 8192])),
    "a kernel": ("mon conv", lambda a, t: a["modules"][1].update(kernel_size=2**31)),
    "channels": ("two tiers", lambda a, t: a.update(channels=[2**20, 2**20])),
    "branches": ("multiscale", lambda a, t: a.update(size=[2**16, 2**16])),
    "branches of codes": ("multiscale structured", lambda a, t: a.update(size=[2**16, 2**16])),
    "a pool": ("nemon conv", lambda a, t: a["modules"][2].update(kernel_size=10**12)),
}


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="nothing says how much memory is taken")
@pytest.mark.parametrize("what", HUGE)
def test_a_file_that_claims_too_much_is_refused(what: str, path: Path, little_memory: None, capsys: Capsys) -> None:
    path.write_bytes(bent(*HUGE[what]))
    status, _, err = run(capsys, "certify", path)
    assert status == 2
    assert err.startswith("error: ")


def test_a_header_that_claims_too_much_is_refused(path: Path, little_memory: None) -> None:
    content = model_file("classifier")
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    header["0.recurrent.B"]["shape"] = [10**6, 10**6]
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + content[8 + length :])
    with pytest.raises(eq.FileFormatError):
        eq.load(path)


def test_a_picture_that_says_it_is_huge_is_not_decoded(path: Path, little_memory: None) -> None:
    folder = path.parent / "bomb"
    (folder / "tiny").mkdir(parents=True)
    cells = [{"bytes": bomb_png(12_000), "path": "0.png"}]
    pq.write_table(pa.table({"image": cells, "label": [0]}), folder / "tiny" / "test-00000-of-00001.parquet")
    with pytest.raises(eq.FileFormatError, match="image 0 measures 12000×12000"):
        read_images(SOURCE, "test", folder)


def test_no_memory_is_one_line(path: Path, capsys: Capsys, monkeypatch: pytest.MonkeyPatch) -> None:
    path.write_bytes(model_file("classifier"))
    for error in (
        MemoryError(),
        RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 1 byte"),
    ):

        def failing(*_: object, error: Exception = error) -> None:
            raise error

        monkeypatch.setattr("equipoise.files.load", failing)
        status, out, err = run(capsys, "certify", path)
        assert (status, out, err.count("\n")) == (2, "", 1)
        assert "memory" in err


def test_modules_that_do_not_go_together_are_told_before_the_work(path: Path, capsys: Capsys) -> None:
    model = torch.nn.Sequential(eq.MonDEQ(64, 5), torch.nn.Linear(6, 10))
    eq.save(model, path, force=True)
    for line in (["certify", path, "--data", "digits", "--limit", 3], ["plan", path, "--data", "digits"]):
        status, _, err = run(capsys, *line)
        assert status == 2
        assert "do not fit together" in err


def test_a_certificate_of_another_size_does_not_reach_the_program(tmp_path: Path) -> None:
    certificate = json.loads(exported()["certificate.json"])
    certificate["features"] = 1
    for name, content in {**exported(), "certificate.json": json.dumps(certificate).encode()}.items():
        (tmp_path / name).write_bytes(content)
    with pytest.raises(eq.FileFormatError, match="other sizes"):
        eq.runtime.load(tmp_path)


def test_every_kind_of_network_is_bent() -> None:
    kinds = {json.dumps(parts(model_file(kind))[0]["architecture"]) for kind in MODELS}
    text = " ".join(kinds)
    missing = [name for name in MODULES if f'"kind": "{name}"' not in text]
    assert set(missing) <= {"leaky_relu", "elu", "softplus", "softshrink", "hardtanh", "sigmoid", "tanh"}
