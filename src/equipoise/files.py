"""Models in files: one safetensors file holds the tensors and, as JSON, all that gives them a meaning.

Layout, version 1. The tensors have the names of the model's state keys; integer codes are packed at their bits
(see :func:`equipoise.quantization.pack`), scales and float parts keep their dtype. The file's metadata has one
entry, ``equipoise``: a JSON object with ``format_version``, ``library_version``, ``architecture`` (kinds, sizes and
options of the modules, and the schemes of those that are quantized), ``checksums`` (CRC-32 of each tensor's bytes),
``preprocessing`` and ``certificate`` (the text that the certificate wrote).
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator
from importlib.metadata import version
from typing import Any

import safetensors.torch
from torch import nn

from ._atomic import check_output, replacing
from ._codecs.modules import MODULES
from ._codecs.tensors import Fields, TensorReader, TensorWriter, open_tensors
from ._codecs.values import parse
from ._codecs.weights import read_module, write_module
from .certificates.fingerprint import fingerprint
from .certificates.types import Certificate
from .data import Preprocessing
from .errors import DataNotFoundError, EquipoiseError, FileFormatError, InputError, StructureError
from .layers.multiscale_deq import MultiscaleDEQ
from .layers.solving import SolvingLayer

__all__ = ["load", "read_certificate", "save"]

VERSION = 1
KEY = "equipoise"
"""The metadata entry that tells our files; one alone, since their order in a file is not determined."""

_KINDS = SolvingLayer, MultiscaleDEQ, nn.Sequential
_MODELS = {kind: codec for kind, codec in MODULES.items() if issubclass(codec.module, _KINDS)}


def save(
    model: nn.Module,
    path: str | os.PathLike[str],
    certificate: Certificate | None = None,
    force: bool = False,
) -> None:
    """Write ``model`` to ``path``, whole or not at all.

    Saved are architecture, weights (codes packed at their bits), schemes, and the model's ``preprocessing``
    attribute where it has one. Not saved: gradients, the device, the training mode, and the step that a layer
    in training found some batches ago.

    Args:
        model: an equilibrium layer, or an ``nn.Sequential`` of them with Flatten, Linear and activation modules, and
            of images with Unflatten and AvgPool2d.
        path: of the file; its folder exists.
        certificate: of this very model, stored beside it for :func:`read_certificate`.
        force: replace an existing file.

    Raises:
        StructureError: a module, activation or solver that files do not know, by name and position.
        InputError: NaN or infinite weights; a certificate of another network; a certificate or preprocessing that is
            something else.
        OutputError: an existing file without ``force``, or a folder that cannot be written.
    """
    check_output(path, force)
    out = TensorWriter()
    document = {
        "format_version": VERSION,
        "library_version": version("equipoise"),
        "architecture": write_module(model, _MODELS, out),
        "checksums": out.checksums(),
        "preprocessing": _preprocessing_of(model),
        "certificate": None if certificate is None else _checked(certificate, model).to_json(),
    }
    if lost := model.state_dict().keys() ^ out.tensors.keys():
        raise StructureError(f"the model holds tensors that its modules do not account for: {', '.join(sorted(lost))}")
    data = safetensors.torch.save(out.tensors, {KEY: json.dumps(document, allow_nan=False)})
    with replacing(path, force) as file:
        file.write(data)


def load(path: str | os.PathLike[str]) -> nn.Module:
    """The model that :func:`save` wrote to ``path``, on the CPU, in evaluation mode, with its very numbers.

    Its ``preprocessing`` attribute is there if it was there. The file is not trusted: nothing
    is unpickled, and memory is taken in proportion to its length.

    Raises:
        DataNotFoundError: no such file.
        FileFormatError: a file that is truncated, corrupted, of another kind, or of a newer version.
    """
    with _document(path) as (file, document):
        tensors = TensorReader(file)
        model = read_module(document.fields("architecture"), _MODELS, tensors)
        tensors.close()
        tensors.compare(document.take("checksums", dict))
        values = document.take("preprocessing", dict, type(None))
        if values is not None:
            _attach_preprocessing(model, values)
        document.take("library_version", str)
        document.take("certificate", str, type(None))
        document.close()
    return model.eval()


def read_certificate(path: str | os.PathLike[str]) -> dict[str, Any] | None:
    """The certificate stored in a model's file as plain values, None if there is none.

    It says what was proved when the file was written, of the network in the file: one of other numbers or options is
    refused. Nothing is signed; to have it proved, load the model and certify it.

    Raises:
        DataNotFoundError, FileFormatError: as :func:`load`; or the certificate is of another network.
    """
    with _document(path) as (_, document):
        text = document.take("certificate", str, type(None))
        found = None if text is None else _json_object(text)
    if found is not None and found.get("fingerprint") != fingerprint(load(path)):
        raise FileFormatError(
            f"{os.fspath(path)} holds a certificate of another network than the one in it: certify what is there, "
            "eq.certify(eq.load(path))"
        )
    return found


@contextlib.contextmanager
def _document(path: str | os.PathLike[str]) -> Iterator[tuple[Any, Fields]]:
    """The open file and its JSON; complaints about either, until the block ends, name the path."""
    try:
        with open_tensors(path) as file:
            text = (file.metadata() or {}).get(KEY)
            if text is None:
                raise FileFormatError(
                    "it holds tensors but no Equipoise model; if it is another project's state dict, bring it in with "
                    "`equipoise import`"
                )
            document = Fields(parse(text, "the metadata"), "the metadata")
            _check_version(document.take("format_version", int))
            yield file, document
    except DataNotFoundError:
        raise
    except (EquipoiseError, RecursionError) as error:
        raise FileFormatError(f"{os.fspath(path)} cannot be loaded: {error}") from error


def _check_version(found: int) -> None:
    if found > VERSION:
        raise FileFormatError(
            f"it is written in format version {found}, and this library ({version('equipoise')}) reads up to "
            f"{VERSION}; upgrade equipoise"
        )
    if found < 1:
        raise FileFormatError(f"there is no format version {found}")


def _preprocessing_of(model: nn.Module) -> dict[str, Any] | None:
    value = getattr(model, "preprocessing", None)
    if value is not None and not isinstance(value, Preprocessing):
        raise InputError(f"model.preprocessing is {value!r}; an equipoise Preprocessing or nothing is needed")
    return None if value is None else value.to_dict()


def _attach_preprocessing(model: Any, values: dict[str, Any]) -> None:
    try:
        model.preprocessing = Preprocessing.from_dict(values)
    except (ValueError, TypeError, OverflowError) as error:
        raise FileFormatError(f"preprocessing: {error}") from error


def _checked(certificate: Certificate, model: nn.Module) -> Certificate:
    if not isinstance(certificate, Certificate):
        raise InputError(f"certificate is a {type(certificate).__name__}; give what `certify` returns")
    if certificate.fingerprint != fingerprint(model):
        raise InputError(
            "the certificate is of another network, or of this one before it was changed: give eq.certify(model) of "
            "the model that is saved"
        )
    return certificate


def _json_object(text: str) -> dict[str, Any]:
    value = parse(text, "the certificate")
    if not isinstance(value, dict):
        raise FileFormatError("the certificate is not a JSON object")
    return value
