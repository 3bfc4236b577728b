"""Files that are damaged, foreign, edited or hostile: each gives a typed error that names it, or a model."""

from __future__ import annotations

import contextlib
import json
import os
import pickle
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import equipoise as eq
from equipoise.data import Preprocessing
from equipoise.files import load, read_certificate, save

D, N, K = 7, 5, 3

Document = dict[str, Any]


def layer(**options: Any) -> eq.MonDEQ:
    return eq.MonDEQ(D, N, **options)


def classifier() -> nn.Sequential:
    return nn.Sequential(layer(), nn.Linear(N, K))


def quantized(scheme: eq.Scheme) -> nn.Module:
    return eq.quantize(nn.Sequential(layer(margin=0.5), nn.Linear(N, K)), scheme)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "model.safetensors"


class Bomb:
    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (os.environ["EQUIPOISE_TEST_BOMB"],)


def foreign() -> bytes:
    return safetensors.torch.save({"A": torch.zeros(2, 2)}, {"format": "pt"})


@pytest.mark.parametrize(
    ("content", "match"),
    [
        (b"", "empty"),
        (b"{}", "truncated or corrupted"),
        (os.urandom(4096), "truncated or corrupted"),
        (pickle.dumps({"a": 1}), "pickle.*equipoise import"),
        (pickle.dumps({"a": 1}, protocol=2), "pickle"),
        (foreign(), "no Equipoise model.*equipoise import"),
        (safetensors.torch.save({}), "no Equipoise model"),
        (safetensors.torch.save({}, {"equipoise": "{"}), "not valid JSON"),
        (safetensors.torch.save({}, {"equipoise": "[" * 100_000}), "not valid JSON"),
        (safetensors.torch.save({}, {"equipoise": "[]"}), "object is needed"),
        (struct.pack("<Q", 2**63) + b"{}", "truncated or corrupted"),
        (struct.pack("<Q", 2) + b"{}", "no Equipoise model"),
    ],
)
def test_other_files_are_refused(content: bytes, match: str, path: Path) -> None:
    path.write_bytes(content)
    for read in (load, read_certificate):
        with pytest.raises(eq.FileFormatError, match=match) as caught:
            read(path)
        assert str(path) in str(caught.value)


@pytest.mark.parametrize("protocol", [None, 0, 2, 4])
def test_nothing_is_ever_unpickled(
    protocol: int | None, path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("EQUIPOISE_TEST_BOMB", str(tmp_path / "boom"))
    torch.save(Bomb(), path) if protocol is None else path.write_bytes(pickle.dumps(Bomb(), protocol))
    with pytest.raises(eq.FileFormatError, match=r"pickle|corrupted"):
        load(path)
    assert not (tmp_path / "boom").exists()


def test_a_checkpoint_is_told_apart(path: Path) -> None:
    torch.save(classifier().state_dict(), path)
    with pytest.raises(eq.FileFormatError, match=r"PyTorch checkpoint.*equipoise import"):
        load(path)


@pytest.mark.parametrize("place", ["absent", "folder", "pipe", "nu\0ll", "file/model", "n" * 300])
def test_absent_files_are_named(place: str, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "folder").mkdir()
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(eq.DataNotFoundError) as caught:
        load(tmp_path / place)
    assert place in str(caught.value)


def test_every_truncation_is_seen(path: Path) -> None:
    save(classifier(), path)
    whole = path.read_bytes()
    for length in range(0, len(whole), 7):
        path.write_bytes(whole[:length])
        with pytest.raises(eq.FileFormatError):
            load(path)
    path.write_bytes(whole + b"\0")
    with pytest.raises(eq.FileFormatError):
        load(path)


def test_every_flipped_bit_of_a_tensor_is_seen(path: Path) -> None:
    save(whole_quantized(), path)
    content = path.read_bytes()
    begin = 8 + struct.unpack("<Q", content[:8])[0]
    for place in range(begin, len(content)):
        damaged = bytearray(content)
        damaged[place] ^= 1 << place % 8
        path.write_bytes(damaged)
        with pytest.raises(eq.FileFormatError):
            load(path)


def parts(content: bytes) -> tuple[Document, dict[str, Tensor]]:
    """The JSON of a file of ours, and its tensors."""
    length = struct.unpack("<Q", content[:8])[0]
    header = json.loads(content[8 : 8 + length])
    return json.loads(header["__metadata__"]["equipoise"]), safetensors.torch.load(content)


def joined(document: Any, tensors: dict[str, Tensor]) -> bytes:
    return safetensors.torch.save(tensors, {"equipoise": json.dumps(document)})


def modules(document: Document) -> list[Document]:
    return document["architecture"]["modules"]


Edit = Callable[[Document, dict[str, Tensor]], object]
HUGE = 2**31
STANDARD = {"mean": 0.0, "std": 1.0, "scale": 1.0, "input_shape": [D]}

EDITS: list[tuple[Edit, str]] = [
    (lambda d, t: d.update(format_version=2), r"version 2.*reads up to 1; upgrade"),
    (lambda d, t: d.update(format_version=0), "no format version 0"),
    (lambda d, t: d.update(format_version="1"), "format_version is '1'"),
    (lambda d, t: d.update(format_version=True), "format_version is True"),
    (lambda d, t: d.pop("format_version"), "format_version is missing"),
    (lambda d, t: d.pop("architecture"), "architecture is missing"),
    (lambda d, t: d.update(colour="red"), "unknown entries 'colour'"),
    (lambda d, t: d["architecture"].update(kind="linear"), "unknown kind 'linear'"),
    (lambda d, t: modules(d)[0].update(kind="perceptron"), "'0'.*unknown kind 'perceptron'"),
    (lambda d, t: modules(d)[0].update(kind=["mondeq"]), "kind is"),
    (lambda d, t: modules(d)[0].update(rotation=3), "'0'.*unknown entries 'rotation'"),
    (lambda d, t: modules(d)[0]["recurrent"].update(kind="dense"), "0.recurrent.weight is missing"),
    (lambda d, t: modules(d)[0].update(features=HUGE), r"0.recurrent.A.* needs \(5, 2147483648\)"),
    (lambda d, t: modules(d)[0].update(features=10**18), "a size from 1"),
    (lambda d, t: modules(d)[0].update(features=0), "a size from 1"),
    (lambda d, t: modules(d)[0].update(features=5.0), "features is 5.0"),
    (lambda d, t: modules(d)[0]["recurrent"].update(rank=-1), "a size from 0"),
    (lambda d, t: modules(d)[0]["injection"].update(in_features=HUGE), "0.injection.weight"),
    (lambda d, t: modules(d)[0]["injection"].update(bias=False), "5 outputs and a bias"),
    (lambda d, t: modules(d)[0]["activation"].update(name="GELU"), "GELU"),
    (lambda d, t: modules(d)[0]["activation"].update(slope=0.1), "slope"),
    (lambda d, t: modules(d)[0].update(activation={"name": "LeakyReLU", "slope": 2}), "slope is 2"),
    (lambda d, t: modules(d)[0].update(activation={"name": "Hardtanh", "low": "a", "high": "b"}), "numbers"),
    (lambda d, t: modules(d)[0]["solver"].update(name="Newton"), "unknown solver 'Newton'"),
    (lambda d, t: modules(d)[0]["solver"].update(beta=1), "no option 'beta'"),
    (lambda d, t: modules(d)[0]["solver"].update(alpha=-1), "alpha is -1"),
    (lambda d, t: modules(d)[0]["solver"].update(alpha="1"), "numbers"),
    (lambda d, t: modules(d)[0].update(solver={"name": "Anderson", "on": 3}), "numbers, and on a solver"),
    (lambda d, t: modules(d)[0].update(solver={"name": "Anderson", "on": {"name": "Broyden"}}), "splitting"),
    (lambda d, t: modules(d)[0].update(solver={"name": "Tseng", "on": {"name": "Tseng"}}), "no option 'on'"),
    (lambda d, t: modules(d)[0].update(tol=2.0), "tol is 2"),
    (lambda d, t: modules(d)[0].update(strict=1), "strict is 1"),
    (lambda d, t: modules(d)[0].update(scheme={"scheme": "ternary", "bits": 2}), "ternary"),
    (lambda d, t: modules(d)[0].update(scheme={"scheme": "assembled", "bits": 40}), "40"),
    (lambda d, t: modules(d)[1].update(name="0"), "two modules"),
    (lambda d, t: modules(d)[2].update(name="forward"), "'forward'.*no module can have this name"),
    (lambda d, t: modules(d)[2].update(name="a.b"), "no module can have this name"),
    (lambda d, t: modules(d)[2].update(start_dim=1.5), "start_dim"),
    (lambda d, t: modules(d)[3].update(p=1.5), "dropout"),
    (lambda d, t: modules(d).append(3), "an object is needed"),
    (lambda d, t: d.update(preprocessing={"mean": 0}), "preprocessing"),
    (lambda d, t: d.update(preprocessing={**STANDARD, "std": []}), "preprocessing"),
    (lambda d, t: d.update(preprocessing={**STANDARD, "scale": -1.0}), "scale"),
    (lambda d, t: d.update(certificate=3), "certificate is 3"),
    (lambda d, t: d.pop("checksums"), "checksums is missing"),
    (lambda d, t: d["checksums"].pop("0.recurrent.B"), "corrupted.*0.recurrent.B"),
    (lambda d, t: t["1.bias"].neg_(), "corrupted.*1.bias"),
    (lambda d, t: t.pop("0.recurrent.B"), "0.recurrent.B is missing"),
    (lambda d, t: t.update({"0.recurrent.C": torch.zeros(1)}), "unknown tensors '0.recurrent.C'"),
    (lambda d, t: t.update({"0.recurrent.A": torch.zeros(5, 6)}), r"0.recurrent.A is \(5, 6\)"),
    (lambda d, t: t.update({"0.recurrent.A": torch.zeros(5, 5, dtype=torch.int32)}), "I32"),
    (lambda d, t: t.update({"0.recurrent.A": torch.zeros(5, 5, dtype=torch.float64)}), "0.recurrent.B is F32"),
    (lambda d, t: t.update({"0.recurrent.A": torch.full((5, 5), torch.nan)}), "NaN"),
    (lambda d, t: t.update({"0.recurrent.margin": torch.tensor(-0.5)}), "margin is -0.5"),
    (lambda d, t: t.update({"0.injection.bias": torch.zeros(5, dtype=torch.float64)}), "0.injection.bias"),
    (lambda d, t: t.update({"1.weight": torch.full((K, N), torch.inf)}), "infinite"),
]

QUANTIZED_EDITS: list[tuple[Edit, str]] = [
    (lambda d, t: modules(d)[0]["recurrent"]["A"].update(bits=8), "of 8 bits take"),
    (lambda d, t: modules(d)[0]["recurrent"]["A"].update(bits=40), "40"),
    (lambda d, t: modules(d)[0]["recurrent"]["K"].update(bits=None), "bits is None"),
    (lambda d, t: modules(d)[0]["recurrent"]["A"].update(shape=[HUGE, HUGE]), "of 2 bits take"),
    (lambda d, t: modules(d)[0]["recurrent"]["A"].update(shape=[]), "1 to 4 are needed"),
    (lambda d, t: modules(d)[0]["recurrent"]["A"].update(shape=[5, -5]), "a size from 0"),
    (lambda d, t: modules(d)[0]["recurrent"]["A"].update(shape=[25]), r"codes \(25,\) where"),
    (lambda d, t: modules(d)[0]["recurrent"].update(A=5), "an object is needed|A is 5"),
    (lambda d, t: modules(d)[0]["recurrent"]["K"].update(features=HUGE), "of 2 bits take"),
    (lambda d, t: modules(d)[0].update(features=HUGE), "codes of 5 features where 2147483648"),
    (lambda d, t: modules(d)[0]["injection"].update(in_features=HUGE), "of 3 bits take"),
    (lambda d, t: modules(d)[0]["injection"].update(dtype="int8"), "unknown dtype 'int8'"),
    (lambda d, t: modules(d)[0]["injection"].update(bias=False), "unknown|bias"),
    (lambda d, t: t.update({"0.recurrent.A.codes": torch.full((7,), 0xAA, dtype=torch.uint8)}), "filled up|least"),
    (lambda d, t: t.update({"0.recurrent.K.upper.codes": torch.tensor([2, 0, 0]).byte()}), "least of 2 bits"),
    (lambda d, t: t.update({"0.recurrent.K.upper.codes": torch.zeros(9).byte()}), "0.recurrent.K.upper.*take 3"),
    (lambda d, t: t.update({"0.recurrent.A.codes": torch.zeros(7)}), "F32"),
    (lambda d, t: t.update({"0.recurrent.A.scale": torch.tensor(torch.nan)}), "NaN"),
    (lambda d, t: t.update({"0.recurrent.A.scale": torch.tensor(-1.0)}), "negative"),
    (lambda d, t: t.update({"0.recurrent.A.scale": torch.ones(3)}), "does not go with codes"),
    (lambda d, t: t.update({"0.recurrent.K.upper.scale": torch.ones(10)}), "skew"),
    (lambda d, t: t.update({"0.recurrent.margin": torch.tensor(0.5)}), "0.recurrent.margin is F32"),
    (lambda d, t: t.update({"0.recurrent.margin": torch.tensor(-0.5).double()}), "margin is -0.5"),
]


def whole() -> nn.Module:
    return nn.Sequential(layer(), nn.Linear(N, K), nn.Flatten(), nn.Dropout(0.5))


def whole_quantized() -> nn.Module:
    return eq.quantize(whole(), eq.Structured(2, input_bits=3, bias_bits=4, head_bits=5))


@pytest.mark.parametrize(
    ("make", "edit", "match"),
    [(whole, *case) for case in EDITS] + [(whole_quantized, *case) for case in QUANTIZED_EDITS],
)
def test_what_was_tampered_with_is_named(make: Callable[[], nn.Module], edit: Edit, match: str, path: Path) -> None:
    save(make(), path)
    document, tensors = parts(path.read_bytes())
    path.write_bytes(joined(document, tensors))
    load(path)
    edit(document, tensors)
    path.write_bytes(joined(document, tensors))
    with pytest.raises(eq.FileFormatError, match=match) as caught:
        load(path)
    assert str(path) in str(caught.value)


def test_a_cayley_file_needs_a_positive_step(path: Path) -> None:
    save(quantized(eq.Cayley(8)), path)
    document, tensors = parts(path.read_bytes())
    tensors["0.recurrent.alpha"].neg_()
    path.write_bytes(joined(document, tensors))
    with pytest.raises(eq.FileFormatError, match="alpha is -"):
        load(path)


@pytest.mark.parametrize("text", ["{", "3", "[" * 100_000])
def test_a_damaged_certificate_is_seen(text: str, path: Path) -> None:
    save(classifier(), path)
    document, tensors = parts(path.read_bytes())
    document["certificate"] = text
    path.write_bytes(joined(document, tensors))
    load(path)  # the model itself is sound
    with pytest.raises(eq.FileFormatError, match="certificate"):
        read_certificate(path)


def test_numbers_beyond_json_are_refused(path: Path) -> None:
    save(classifier(), path)
    document, tensors = parts(path.read_bytes())
    text = json.dumps(document)
    for value in ("NaN", "Infinity", "1e999", "9" * 19, "9" * 5000):
        metadata = {"equipoise": text.replace('"tol": null', f'"tol": {value}')}
        path.write_bytes(safetensors.torch.save(tensors, metadata))
        with pytest.raises(eq.FileFormatError, match="JSON"):
            load(path)


# Whatever else a file may hold


@pytest.fixture(scope="module")
def samples(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[bytes]]:
    folder = tmp_path_factory.mktemp("fuzz")
    torch.manual_seed(0)
    models = [
        whole(),
        whole_quantized(),
        quantized(eq.Compensated(3)),
        quantized(eq.Cayley(4)),
        layer(solver=eq.Anderson(on=eq.Tseng()), activation=eq.Hardtanh(), learn_margin=True),
    ]
    models[0].preprocessing = Preprocessing(mean=0.1, std=0.3, scale=2.0, input_shape=(1, D))  # type: ignore[assignment]
    contents = []
    for model in models:
        save(model, folder / "sample", force=True)
        contents.append((folder / "sample").read_bytes())
    return folder / "fuzzed", contents


def survives(path: Path, content: bytes) -> None:
    """A model or a typed error, and nothing else."""
    path.write_bytes(content)
    try:
        load(path)
    except eq.FileFormatError as error:
        message = str(error)
        assert message.startswith(f"{path} cannot be loaded: ")
    with contextlib.suppress(eq.FileFormatError):
        read_certificate(path)


Samples = tuple[Path, list[bytes]]


@given(st.data())
def test_flipped_bytes_do_no_harm(samples: Samples, data: st.DataObject) -> None:
    path, contents = samples
    content = bytearray(data.draw(st.sampled_from(contents)))
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(0, len(content) - 1))] ^= data.draw(st.integers(1, 255))
    survives(path, bytes(content))


JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.sampled_from([0, 1, 2, 3, 5, 7, 8, 2**31, 2**62])
    | st.floats()
    | st.text(max_size=4)
    | st.sampled_from(["inf", "Hardtanh", "Anderson", "mondeq", "dense", "linear", "relu", "0", "\ud800"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=6,
)


def mutate(value: Any, data: st.DataObject) -> Any:
    """The value with one entry, somewhere in it, replaced, removed or added."""
    if isinstance(value, dict | list) and value and data.draw(st.integers(0, 9)) > 0:
        keys = list(value) if isinstance(value, dict) else list(range(len(value)))
        key = data.draw(st.sampled_from(keys))
        copy: Any = dict(value) if isinstance(value, dict) else list(value)
        action = data.draw(st.integers(0, 11))
        if action == 0:
            del copy[key]
        elif action == 1 and isinstance(copy, dict):
            copy[data.draw(st.text(max_size=4))] = data.draw(JSON)
        elif action == 2 and isinstance(copy, list):
            copy.insert(key, copy[key])
        else:
            copy[key] = mutate(value[key], data)
        return copy
    return data.draw(JSON)


@given(st.data())
def test_edited_metadata_does_no_harm(samples: Samples, data: st.DataObject) -> None:
    path, contents = samples
    document, tensors = parts(data.draw(st.sampled_from(contents)))
    survives(path, joined(mutate(document, data), tensors))


@given(st.data())
def test_edited_headers_do_no_harm(samples: Samples, data: st.DataObject) -> None:
    path, contents = samples
    content = data.draw(st.sampled_from(contents))
    length = struct.unpack("<Q", content[:8])[0]
    header = json.dumps(mutate(json.loads(content[8 : 8 + length]), data)).encode()
    survives(path, struct.pack("<Q", len(header)) + header + content[8 + length :])


@given(st.data())
def test_exchanged_tensors_do_no_harm(samples: Samples, data: st.DataObject) -> None:
    path, contents = samples
    document, tensors = parts(data.draw(st.sampled_from(contents)))
    name = data.draw(st.sampled_from(sorted(tensors)))
    shape = data.draw(st.lists(st.integers(0, 9), max_size=3))
    kinds = [torch.float16, torch.float32, torch.float64, torch.uint8, torch.int64, torch.bool, torch.complex64]
    kind = data.draw(st.sampled_from([*kinds, torch.float8_e4m3fn]))
    tensors[name] = torch.full(shape, data.draw(st.sampled_from([0, 1, 3, 255]))).to(kind)
    survives(path, joined(document, tensors))
