"""Exported programs in Python: compiled with the system's C compiler, called on numpy arrays (theory §10)."""

from __future__ import annotations

import ctypes
import os
import re
import shutil
import subprocess
import tempfile
import warnings
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ._codecs.values import parse, restored
from .errors import ConvergenceWarning, DataNotFoundError, FileFormatError, InputError, MissingExtraError
from .export.fixedpoint import SLACK
from .export.grid import Grid
from .export.write import PROVED, fingerprint

__all__ = ["Runtime", "compiler", "load"]

FLAGS = ("-std=c99", "-O3", "-funroll-loops", "-fPIC", "-shared")
TUNED = (("-march=native", "-fopenmp"), ("-march=native",), ("-fopenmp",), ())
"""Tried in this order: not every compiler has OpenMP's runtime or knows the machine."""

SIZES = ("INPUTS", "FEATURES", "CLASSES")
PER_INPUT = ("iteration", "delta_weight", "delta_input", "delta_center", "reference_input", "reference_margin")
_TYPES = {"uint8_t": np.uint8, "int16_t": np.int16, "int32_t": np.int32}


def load(folder: str | os.PathLike[str]) -> Runtime:
    """Compile the program that ``equipoise export --target c`` wrote into ``folder``.

    Uses ``CC``, else cc, gcc or clang; the library is built in a temporary folder.

    Raises:
        DataNotFoundError: no such folder, or no program in it.
        FileFormatError: a certificate that was not written by an export, or about other sources than those beside it;
            source that does not compile.
        MissingExtraError: no C compiler on this machine.
    """
    path = Path(folder)
    for name in ("certificate.json", *PROVED):
        if not (path / name).is_file():
            raise DataNotFoundError(f"{path} holds no {name}; write the program with `equipoise export --target c`")
    try:
        document = parse((path / "certificate.json").read_bytes())
        program = document.pop("program")
        grid = Grid.from_dict(program["grid"])
        types = _TYPES[program["input_type"]], _TYPES[program["state_type"]]
        units = restored(float, program["state_unit"]), restored(float | None, program["score_unit"])
        per_input = program["per_input"]
        if per_input is not None:
            per_input = {name: restored(float, per_input[name]) for name in PER_INPUT}
        sources = {name: str(program["sha256"][name]) for name in PROVED}
        sizes = grid.features, restored(int, document["features"]), restored(int, document["classes"])
    except (ValueError, KeyError, TypeError, AttributeError, ArithmeticError) as error:
        raise FileFormatError(f"{path / 'certificate.json'} was not written by an export: {error!r}") from error
    for name, stored in sources.items():
        if fingerprint((path / name).read_bytes()) != stored:
            raise FileFormatError(
                f"{path / name} is not the file certificate.json is about: nothing is proved about it; export again"
            )
    if sizes != _sizes(path / "eqnet.h"):  # the program writes that many numbers, wherever they are told to go
        raise FileFormatError(f"{path / 'certificate.json'} is about a program of other sizes than that in eqnet.h")
    return Runtime(_compiled(path), document, grid, types, units, per_input)


def _sizes(header: Path) -> tuple[int, ...]:
    """(inputs, features, classes) of the program."""
    text = header.read_text(encoding="utf-8")
    found = [re.search(rf"^#define EQNET_{name} (\d+)$", text, re.MULTILINE) for name in SIZES]
    return tuple(int(match[1]) for match in found if match is not None)


class Runtime:
    """An exported program: ``f(x)`` maps ``(B, d)`` floats to ``(B, classes)`` scores.

    Network inputs are rounded to the program's integers. For a network with preprocessing arrays of an integer dtype
    are taken as raw inputs (pixels).
    ``certificate``: the certificate's fields.
    """

    def __init__(
        self,
        library: ctypes.CDLL,
        certificate: dict[str, Any],
        grid: Grid,
        types: tuple[Any, Any],
        units: tuple[float, float | None],
        per_input: dict[str, float] | None,
    ) -> None:
        self.certificate, self.grid, self._per_input = certificate, grid, per_input
        self._library, self._types, self._units = library, types, units
        library.eqnet_batch.restype = ctypes.c_int
        library.eqnet_batch.argtypes = [ctypes.c_void_p, ctypes.c_int32, *[ctypes.c_void_p] * 3]

    def __call__(self, x: NDArray[Any]) -> NDArray[np.float64]:
        """Class scores ``(B, classes)``; the equilibrium where the network has no head.

        Rows on which an iterate left its range are NaN, with a :class:`ConvergenceWarning`.

        Raises:
            InputError: x of another shape, or outside the declared range.
        """
        if self._units[1] is None:
            return self.equilibrium(x)
        _, scores, status = self.integers(x)
        return self._real(scores, self._units[1], status)

    def equilibrium(self, x: NDArray[Any]) -> NDArray[np.float64]:
        """The equilibrium ``(B, n)`` for inputs ``(B, d)``; as for a call."""
        z, _, status = self.integers(x)
        return self._real(z, self._units[0], status)

    def error_bound(self, x: NDArray[Any]) -> NDArray[np.float64]:
        """Proved bounds ``(B,)`` of ‖equilibrium − the reference's‖₂ for these very inputs, NaN where none holds.

        Where the reference is another network this is mostly far below ``certificate["error_bound"]``, which covers
        the worst input of the range. With x̂ the grid point of x and ẑ the computed equilibrium (theory §10),

            iteration + (‖ΔW‖ (‖ẑ‖ + iteration) + ‖ΔU‖ ‖x̂ − x̄‖ + ‖ΔU x̄ + Δb‖ + ‖U‖ ‖x − x̂‖) / m.
        """
        raw = self._raw(x)
        z, _, status = self.integers(x)
        known = self._per_input
        if known is None:
            return np.full(len(raw), np.nan)
        grid = self.grid
        real = grid.to_real(raw)
        center = (grid.to_real(np.full_like(raw, grid.low)) + grid.to_real(np.full_like(raw, grid.high))) / 2
        given = real if self._holds_raw(x) else np.asarray(x, dtype=np.float64)
        # to_real is rounded: a few ulps of its terms, an entry
        terms = grid.spread(grid.steps) * max(abs(grid.low), abs(grid.high)) + np.abs(grid.spread(grid.offsets))
        ulps = 1e-15 * float(np.linalg.norm(terms))
        size = np.linalg.norm(z.astype(np.float64), axis=1) * self._units[0]
        moved = known["delta_weight"] * (size + known["iteration"]) + known["delta_center"]
        moved = moved + known["delta_input"] * (np.linalg.norm(real - center, axis=1) + ulps)
        moved = moved + known["reference_input"] * (np.linalg.norm(given - real, axis=1) + ulps)
        bound: NDArray[np.float64] = (known["iteration"] + moved / known["reference_margin"]) * SLACK
        return np.where(status == 0, bound, np.nan)

    def integers(self, x: NDArray[Any]) -> tuple[NDArray[Any], NDArray[np.int32], NDArray[np.int32]]:
        """(equilibrium ``(B, n)``, scores ``(B, classes)``, status ``(B,)``) as the program's own integers."""
        raw = np.ascontiguousarray(self._raw(x), dtype=self._types[0])
        z = np.zeros((len(raw), self.certificate["features"]), dtype=self._types[1])
        scores = np.zeros((len(raw), self.certificate["classes"]), dtype=np.int32)
        status = np.zeros(len(raw), dtype=np.int32)
        if len(raw):
            self._library.eqnet_batch(
                raw.ctypes.data,
                len(raw),
                z.ctypes.data,
                scores.ctypes.data if scores.size else None,
                status.ctypes.data,
            )
        return z, scores, status

    def _holds_raw(self, x: NDArray[Any]) -> bool:
        """Whether ``x`` is pixels; without preprocessing the integers of the grid mean nothing outside."""
        return self.grid.natural and np.issubdtype(np.asarray(x).dtype, np.integer)

    def _raw(self, x: NDArray[Any]) -> NDArray[Any]:
        values = np.asarray(x)
        if not self._holds_raw(values):
            return self.grid.to_raw(values)
        grid = self.grid
        if values.ndim != 2 or values.shape[1] != grid.features:
            raise InputError(f"the input has shape {values.shape}; (batch, {grid.features}) is needed")
        held = np.iinfo(values.dtype)  # a type that holds nothing outside the range needs no look
        if (
            (held.min < grid.low or held.max > grid.high)
            and values.size
            and (int(values.min()) < grid.low or int(values.max()) > grid.high)
        ):
            raise InputError(
                f"raw inputs from {int(values.min())} to {int(values.max())} lie outside the declared range "
                f"[{grid.low}, {grid.high}]"
            )
        return values

    def _real(self, integers: NDArray[Any], unit: float, status: NDArray[np.int32]) -> NDArray[np.float64]:
        real = integers.astype(np.float64) * unit
        if failed := int((status != 0).sum()):
            real[status != 0] = np.nan
            warnings.warn(
                f"{failed} of {len(real)} inputs drove an iterate out of its range, so nothing is known about their "
                "answers (NaN); export with a wider calibration, or without",
                ConvergenceWarning,
                stacklevel=3,
            )
        return real


def compiler() -> str | None:
    """The C compiler that would be used: ``CC``, else the first of cc, gcc, clang that is there."""
    for name in (os.environ.get("CC"), "cc", "gcc", "clang"):
        if name and (found := shutil.which(name)):
            return found
    return None


def _compiled(folder: Path) -> ctypes.CDLL:
    cc = compiler()
    if cc is None:
        raise MissingExtraError(
            "no C compiler was found (CC, cc, gcc, clang): install one, e.g. apt install gcc, or name one in CC"
        )
    with tempfile.TemporaryDirectory(prefix="equipoise-", ignore_cleanup_errors=True) as scratch:
        library = Path(scratch) / "eqnet.so"
        complaint = ""
        for tuned in TUNED:
            command = [cc, *FLAGS, *tuned, str(folder / "eqnet_host.c"), "-o", str(library)]
            run = subprocess.run(command, capture_output=True, text=True, check=False)
            if run.returncode == 0:
                try:
                    return ctypes.CDLL(str(library))
                except OSError as error:  # OpenMP's runtime may be missing where its headers are not
                    complaint = str(error)
                    continue
            complaint = run.stderr.strip()
        raise FileFormatError(f"{folder / 'eqnet_host.c'} cannot be compiled and loaded with {cc}: {complaint[-800:]}")
