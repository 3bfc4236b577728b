"""Where a file is written: whole or not at all, never over another one by accident, and no scratch left behind."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest
from torch import nn

import equipoise as eq
from equipoise.files import load, save


def classifier() -> nn.Sequential:
    return nn.Sequential(eq.MonDEQ(7, 5), nn.Linear(5, 3))


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "model.safetensors"


def test_an_existing_file_is_kept_unless_forced(path: Path) -> None:
    path.write_bytes(b"mine")
    with pytest.raises(eq.OutputError, match=r"model\.safetensors exists already.*force=True \(--force\)"):
        save(classifier(), path)
    assert path.read_bytes() == b"mine"
    save(classifier(), path, force=True)
    load(path)
    assert list(path.parent.iterdir()) == [path]


def test_a_file_that_appears_meanwhile_is_kept(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sync = os.fsync
    monkeypatch.setattr(os, "fsync", lambda fd: (path.write_bytes(b"theirs"), sync(fd)))
    with pytest.raises(eq.OutputError, match="exists already"):
        save(classifier(), path)
    assert path.read_bytes() == b"theirs"
    assert list(path.parent.iterdir()) == [path]


@pytest.mark.parametrize(
    ("place", "match"),
    [
        ("absent/model", "absent does not exist; create it"),
        ("file/model", "file does not exist"),
        ("folder", "it is a folder"),
        (".", "it is a folder"),
        ("pipe", "not a regular file"),
        ("n" * 300, "too long"),
        ("nu\0ll", "null"),
    ],
)
@pytest.mark.parametrize("force", [False, True])
def test_impossible_places_are_refused(place: str, match: str, force: bool, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "folder").mkdir()
    os.mkfifo(tmp_path / "pipe")
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(eq.OutputError, match=match):
        save(classifier(), tmp_path / place, force=force)
    assert sorted(tmp_path.rglob("*")) == before


def test_an_unwritable_folder_is_refused(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "access", lambda *_: False)  # root may write everywhere
    with pytest.raises(eq.OutputError, match="not writable"):
        save(classifier(), path)


@pytest.mark.parametrize("call", ["fsync", "replace"])
@pytest.mark.parametrize("raised", [OSError(28, "No space left on device"), KeyboardInterrupt()], ids=repr)
def test_a_failed_write_leaves_no_trace(
    call: str, raised: BaseException, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path.write_bytes(b"mine")

    def fail(*_: object) -> None:
        raise raised

    monkeypatch.setattr(os, call, fail)
    expected = eq.OutputError if isinstance(raised, OSError) else KeyboardInterrupt
    with pytest.raises(expected) as caught:
        save(classifier(), path, force=True)
    assert not isinstance(raised, OSError) or "No space left" in str(caught.value)
    assert path.read_bytes() == b"mine"
    assert list(path.parent.iterdir()) == [path]


def test_the_file_has_the_usual_permissions(path: Path) -> None:
    before = os.umask(0o027)
    try:
        save(classifier(), path)
    finally:
        os.umask(before)
    assert stat.S_IMODE(path.stat().st_mode) == 0o640
