"""A certificate names its network, and files refuse one that is about another."""

from __future__ import annotations

import json
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import nn

import equipoise as eq
from equipoise.certificates.fingerprint import fingerprint
from equipoise.data import Preprocessing
from equipoise.files import load, read_certificate, save
from test_files import D, Model, classifier, layer, quantized


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "model.safetensors"


def one_code() -> nn.Module:
    model = quantized(eq.Structured(4))
    with torch.no_grad():
        model.get_submodule("0.recurrent.A").codes[0, 0] ^= 1
    return model


def a_last_bit() -> nn.Module:
    model = quantized(eq.Structured(4))
    with torch.no_grad():
        bias = model.get_submodule("0").bias
        bias[-1] = torch.nextafter(bias[-1], bias.new_tensor(torch.inf))
    return model


def seeded(make: Callable[[], Model]) -> Model:
    torch.manual_seed(0)
    return make()


OTHERS: dict[str, Callable[[], Model]] = {
    "one code": one_code,
    "the last bit of a bias": a_last_bit,
    "another dtype": lambda: quantized(eq.Structured(4)).double(),
    "other bits": lambda: quantized(eq.Structured(3)),
    "the float network": classifier,
    "another activation": lambda: eq.quantize(classifier(activation=eq.LeakyReLU(0.5)), eq.Structured(4)),
    "another slope": lambda: eq.quantize(classifier(activation=eq.LeakyReLU(0.25)), eq.Structured(4)),
    "another solver": lambda: eq.quantize(classifier(solver=eq.Tseng()), eq.Structured(4)),
    "one module more": lambda: nn.Sequential(*quantized(eq.Structured(4)), nn.ReLU()),
    "other names": lambda: nn.Sequential(OrderedDict(zip("ab", quantized(eq.Structured(4)), strict=True))),
}


def test_networks_have_names_of_their_own() -> None:
    names = [fingerprint(seeded(make)) for make in (lambda: quantized(eq.Structured(4)), *OTHERS.values())]
    assert len(set(names)) == len(names)
    assert names[0] == fingerprint(seeded(lambda: quantized(eq.Structured(4))).train())


@pytest.mark.parametrize("option", [{"residual": 0.2}, {"slope": 0.1}, {"fusion": 0.1}, {"activation": "groupsort"}])
def test_options_that_no_tensor_shows_are_part_of_a_name(option: dict[str, Any], path: Path) -> None:
    one, other = (eq.LipschitzMDEQ(2, 8, 3, channels=(8, 8), **options) for options in ({}, option))
    other.load_state_dict(one.state_dict())
    assert fingerprint(one) != fingerprint(other)
    with pytest.raises(eq.InputError, match="another network"):
        save(other, path, certificate=eq.certify(one))


def test_dtypes_that_numpy_does_not_know_have_names_too() -> None:
    model = classifier()
    names = {fingerprint(model.to(dtype)) for dtype in (torch.float32, torch.bfloat16, torch.float16)}
    assert len(names) == 3
    codes = eq.quantize(layer(), eq.Structured(4, input_bits=4, bias_bits=4))
    assert fingerprint(codes) != fingerprint(codes.double())  # the very same tensors, multiplied by as others


def test_what_is_done_to_inputs_is_not_part_of_a_name() -> None:
    model = classifier()
    before = fingerprint(model)
    model.preprocessing = Preprocessing(0.5, 0.5, 255.0, (D,))
    assert fingerprint(model) == before


@pytest.mark.parametrize("other", OTHERS)
def test_a_certificate_of_another_network_is_refused(other: str, path: Path) -> None:
    model, changed = seeded(lambda: quantized(eq.Structured(4))), seeded(OTHERS[other])
    certificate = eq.certify(model)
    with pytest.raises(eq.InputError, match="another network"):
        save(changed, path, certificate=certificate)
    assert not path.exists()
    save(changed, path)
    raw = safetensors.torch.load_file(path)
    with safetensors.safe_open(path, "pt") as file:
        document = json.loads(file.metadata()["equipoise"]) | {"certificate": certificate.to_json()}
    safetensors.torch.save_file(raw, path, {"equipoise": json.dumps(document)})
    assert fingerprint(load(path)) == fingerprint(changed)  # the network is sound, the text beside it is not its own
    with pytest.raises(eq.FileFormatError, match="another network"):
        read_certificate(path)
