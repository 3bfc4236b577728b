"""Networks as integer-only C with a proved step count and error, and as ONNX graphs (theory §10)."""

from __future__ import annotations

import os

from torch import Tensor, nn

from ..errors import OptionError
from .build import Options, Shipped, build
from .certificate import ShipCertificate
from .graph import graphs
from .network import take_apart
from .unroll import unrolled
from .write import check_folder, write_c, write_files

__all__ = ["ShipCertificate", "Shipped", "build", "export", "unrolled"]

TARGETS = ("c", "onnx")


def export(
    model: nn.Module,
    out: str | os.PathLike[str],
    target: str = "c",
    *,
    reference: nn.Module | None = None,
    calibration: Tensor | None = None,
    tol: float | None = None,
    mode: str | None = None,
    input_range: tuple[float, float] | None = None,
    activation_bits: int = 16,
    uncertified: bool = False,
    force: bool = False,
) -> ShipCertificate:
    """Write ``model`` as a program into the folder ``out``, with the proof of what its answers are worth (theory §10).

    Target ``"c"``: C99 that computes in integers only, from raw inputs to class scores: u ← C̃|u| + c for a Cayley
    network (mode ``"cayley"``), forward–backward steps on the codes of A and K for a structured one (``"factored"``).
    Target ``"onnx"``: ``unrolled.onnx`` and ``loop.onnx``, the same steps in float32 on integer weights; they do not
    look at the range of their inputs, for which alone the proof holds.

    Args:
        model: a quantized equilibrium layer, or a chain of it and a linear head.
        reference: the float model it came from: the proved error is then against that one.
        calibration: network inputs ``(N, d)`` to choose the range of the iterates by. Larger iterates are reported by
            the program, so the proof holds wherever it answers OK. Without, the range is proved for every input.
        tol: of rounding and truncation together; default: as many steps as the rounding makes sensible.
        mode: ``"cayley"`` or ``"factored"``; default: what the codes are for.
        input_range: least and largest raw input (pixel), or network input for a model without preprocessing.
        activation_bits: of the stored iterates, 8 or 16.
        uncertified: write a model without a proved margin all the same, marked as such.
        force: replace what an earlier export wrote.

    Raises:
        NotWellPosedError: no proved margin, without ``uncertified``.
        OptionError: no input range; bits without a kernel; a tolerance below what the grid can reach.
        StructureError: a model that is no such network, or codes of another mode.
        OutputError: a folder that cannot be written, or that holds something without ``force``.
        MissingExtraError: target onnx without the package onnx.
    """
    if target not in TARGETS:
        raise OptionError(f"target is {target!r}; known: {', '.join(TARGETS)}")
    folder = check_folder(out, force)
    options = Options(mode, tol, input_range, activation_bits, uncertified)
    if target == "onnx":
        if calibration is not None or activation_bits != 16:
            raise OptionError(
                "calibration (--data) and activation_bits (--activation-bits) are for target c; a graph is float32"
            )
        module, certificate = unrolled(model, reference, options)
        written = graphs(take_apart(model), module, certificate)
        write_files(folder, {**written, "certificate.json": certificate.to_json() + "\n"}, force)
        return certificate
    shipped = build(model, reference, calibration, options)
    samples = None if calibration is None else shipped.grid.to_raw(calibration[:4].detach().cpu().numpy())
    write_c(shipped, folder, samples, force)
    return shipped.certificate
