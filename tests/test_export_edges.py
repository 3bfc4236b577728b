"""Integer programs and graphs at their edges: what a proof must not leave out, and files that go together."""

from __future__ import annotations

import copy
import math
import signal
import subprocess
import sys
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import equipoise as eq
from equipoise import runtime
from equipoise.data import Preprocessing
from equipoise.export import cayley, export, unrolled
from equipoise.export.boxes import box_of
from equipoise.export.build import Options, build
from equipoise.export.grid import Grid, grid_of
from equipoise.export.network import code_linear
from equipoise.export.plan import Iteration
from equipoise.layers.linear import quantize_linear
from equipoise.operators.quantized import CayleyWeight
from equipoise.quantization.codes import QuantizedTensor
from shipping import FEATURES, INPUTS, STRICT, exact, need_compiler, network, pixels, quantized

EIGHT = eq.Cayley(bits=8, input_bits=8)


def test_a_checked_range_bounds_the_iterate_that_was_checked_whole() -> None:
    """Of the last Peaceman–Rachford iterate only the positive part is compared: v_{K−1} bounds the fixed point."""
    contraction, limit = 0.9, 2.0
    iteration = Iteration(contraction, 0.0, limit, math.inf, 1, True)
    for steps in (1, 2, 7):
        largest = limit / (1 - contraction**steps)  # ‖v*‖ for ‖v_{K−1} − v*‖ = ρ^K ‖v*‖
        assert iteration.truncation(steps) >= contraction ** (steps + 1) * largest
        assert iteration.truncation(steps) <= 1.001 * contraction ** (steps + 1) * largest
    assert iteration.truncation(0) == math.inf


@pytest.mark.parametrize("scheme", [EIGHT, eq.Structured(bits=2, input_bits=2)], ids=["cayley", "factored"])
def test_the_host_build_of_a_layer_alone_compiles_strictly(scheme: eq.Scheme, tmp_path: Path) -> None:
    cc = need_compiler()
    export(quantized(network(head=False), scheme), tmp_path / "net")
    command = [cc, *STRICT, "-O1", "-c", str(tmp_path / "net" / "eqnet_host.c"), "-o", str(tmp_path / "host.o")]
    made = subprocess.run(command, capture_output=True, text=True, check=False)
    assert made.returncode == 0, made.stderr


def test_work_and_memory_count_what_the_code_does() -> None:
    with_head, alone = (
        build(quantized(network(head=h), EIGHT), None, None, Options()).certificate for h in (True, False)
    )
    # p and c in int32, two iterates in int16; eqnet_scores holds the equilibrium as well
    assert (with_head.ram_bytes, alone.ram_bytes) == (14 * FEATURES, 12 * FEATURES)
    two = eq.Structured(bits=2, input_bits=2)
    with_head, alone = (
        build(quantized(network(head=h), two), None, None, Options()).certificate for h in (True, False)
    )
    assert (with_head.ram_bytes, alone.ram_bytes) == (14 * FEATURES, 12 * FEATURES)
    step = FEATURES * (FEATURES - 1) + 2 * 5 * FEATURES
    assert alone.macs == INPUTS * FEATURES + (alone.steps + 1) * step


@pytest.mark.parametrize("shape", [(1, FEATURES), (FEATURES, FEATURES)], ids=["columns", "entries"])
def test_scales_that_no_kernel_reads_are_refused(shape: tuple[int, int], tmp_path: Path) -> None:
    model: Any = quantized(network(), eq.Cayley(bits=8))
    old = model[0].recurrent
    scales = torch.linspace(0.3, 0.9, shape[0] * shape[1]).view(shape) * old.C.scale.max()
    model[0].recurrent = CayleyWeight(QuantizedTensor.from_codes(old.C.codes, scales, 8), float(old.alpha))
    with pytest.raises(eq.OptionError, match="one per tensor or per row"):
        build(model, None, None, Options())
    runs = pytest.importorskip("onnxruntime")
    certificate = export(model, tmp_path / "net", "onnx")  # as floats
    x = runtime_inputs()
    answer = runs.InferenceSession(str(tmp_path / "net" / "loop.onnx")).run(["equilibrium"], {"x": x})[0]
    truth, _, doubt = exact(model, x)
    assert (np.linalg.norm(answer - truth, axis=1) - doubt <= certificate.error_bound).all()


def runtime_inputs() -> Any:
    """Corners and random images, as the network takes them."""
    return ((pixels(20) / 255.0 - 0.3) / 0.25).astype(np.float32)


def test_codes_of_32_bits_are_not_cut_off_in_a_graph(tmp_path: Path) -> None:
    runs = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnx")
    model = quantized(network(), eq.Cayley(bits=8, input_bits=32, head_bits=32))
    certificate = export(model, tmp_path / "net", "onnx")
    x = runtime_inputs()
    truth, _, doubt = exact(model, x)
    for form in ("unrolled", "loop"):
        answer = runs.InferenceSession(str(tmp_path / "net" / f"{form}.onnx")).run(["equilibrium"], {"x": x})[0]
        assert (np.linalg.norm(answer - truth, axis=1) - doubt <= certificate.error_bound).all()


def test_a_graph_whose_numbers_leave_float32_is_refused() -> None:
    for part, value in ((0, 1e38), (1, 3e38)):
        model: Any = quantized(network(), eq.Cayley(bits=8))
        with torch.no_grad():
            (model[0].injection if part == 0 else model[1]).weight[0, 0] = value
        with pytest.raises(eq.OptionError, match="float32"):
            unrolled(model)
    bare = quantized(network(preprocessing=None), eq.Cayley(bits=8))
    with pytest.raises(eq.OptionError, match="float32"):
        unrolled(bare, None, Options(input_range=(-1e38, 1e38)))
    tiny: Any = quantized(network(preprocessing=None), eq.Cayley(bits=8))
    with torch.no_grad():  # every product underflows
        tiny[0].injection.weight.fill_(1e-30)
        tiny[0].injection.bias.zero_()
    module, certificate = unrolled(tiny, None, Options(input_range=(0.0, 1e-10)))
    x = np.full((1, INPUTS), 1e-10, dtype=np.float32)
    with torch.no_grad():
        found = module(torch.from_numpy(x))[1].numpy()
    assert np.linalg.norm(found - exact(tiny, x)[0]) <= certificate.error_bound  # type: ignore[operator]


def test_what_a_graph_does_not_use_is_refused(tmp_path: Path) -> None:
    model = quantized(network(), EIGHT)
    for more in ({"activation_bits": 8}, {"calibration": torch.zeros(2, INPUTS)}):
        with pytest.raises(eq.OptionError, match="target c"):
            export(model, tmp_path / "net", "onnx", **more)  # type: ignore[arg-type]


def test_a_bias_that_is_no_number_is_refused() -> None:
    for value in (math.nan, math.inf):
        model: Any = quantized(network(), eq.Cayley(bits=8))
        with torch.no_grad():
            model[1].bias[0] = value
        with pytest.raises(eq.InputError, match="the head has a bias with NaN"):
            build(model, None, None, Options())


def test_a_reference_that_sees_other_inputs_is_refused() -> None:
    model: Any = network()
    q = quantized(model, EIGHT)
    other = copy.deepcopy(model)
    other.preprocessing = Preprocessing(mean=0.5, std=0.25, scale=255.0, input_shape=(20,))
    with pytest.raises(eq.StructureError, match="preprocessing"):
        build(q, other, None, Options())
    other.preprocessing = None
    assert build(q, other, None, Options()).certificate.certified


def test_files_that_do_not_belong_together_are_not_run(tmp_path: Path) -> None:
    need_compiler()
    export(quantized(network(), EIGHT), tmp_path / "one")
    export(quantized(network(1, features=30), EIGHT), tmp_path / "two")
    for name in ("eqnet.c", "eqnet.h", "eqnet_host.c"):
        folder = tmp_path / f"mixed-{name}"
        folder.mkdir()
        for file in (tmp_path / "one").iterdir():
            (folder / file.name).write_bytes(file.read_bytes())
        (folder / name).write_bytes((tmp_path / "two" / name).read_bytes())
        with pytest.raises(eq.FileFormatError, match="nothing is proved"):
            runtime.load(folder)


def test_an_export_that_is_cut_off_leaves_no_proof_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    export(quantized(network(), EIGHT), tmp_path / "net")
    from equipoise.export import write

    original = write.replacing

    def stops(path: Path, force: bool) -> Any:
        if path.name == "vectors.h":
            raise KeyboardInterrupt
        return original(path, force)

    monkeypatch.setattr(write, "replacing", stops)
    with pytest.raises(KeyboardInterrupt):
        export(quantized(network(1), EIGHT), tmp_path / "net", force=True)
    assert not (tmp_path / "net" / "certificate.json").exists()
    with pytest.raises(eq.DataNotFoundError, match=r"certificate\.json"):
        runtime.load(tmp_path / "net")


@pytest.mark.skipif(sys.platform == "win32", reason="no signals to kill with")
def test_a_killed_export_leaves_no_folder(tmp_path: Path) -> None:
    eq.save(quantized(network(), EIGHT), tmp_path / "model.safetensors")
    code = (
        "import os, signal, equipoise as eq\n"
        "from equipoise.export import export, write\n"
        "original = write.replacing\n"
        "def stops(path, force):\n"
        "    if path.name == 'selftest.c':\n"
        "        os.kill(os.getpid(), signal.SIGKILL)\n"
        "    return original(path, force)\n"
        "write.replacing = stops\n"
        "export(eq.load('model.safetensors'), 'net')\n"
    )
    run = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert run.returncode == -signal.SIGKILL, run.stderr
    assert not (tmp_path / "net").exists()
    export(eq.load(tmp_path / "model.safetensors"), tmp_path / "net")  # and is not in the way of the next


def test_another_target_takes_the_place_of_the_first_whole(tmp_path: Path) -> None:
    pytest.importorskip("onnx")
    model, folder = quantized(network(), EIGHT), tmp_path / "net"
    export(model, folder)
    (folder / "mine.txt").write_text("kept")
    export(model, folder, "onnx", force=True)
    assert {p.name for p in folder.iterdir()} == {"certificate.json", "loop.onnx", "unrolled.onnx", "mine.txt"}
    export(model, folder, force=True)
    assert not (folder / "loop.onnx").exists()
    assert (folder / "eqnet.c").is_file()


def test_integers_are_pixels_only_where_there_are_pixels(tmp_path: Path) -> None:
    need_compiler()
    export(quantized(network(preprocessing=None), EIGHT), tmp_path / "net", input_range=(-2.0, 2.0))
    f = runtime.load(tmp_path / "net")
    x = np.random.default_rng(0).integers(-2, 3, (9, INPUTS))
    assert (f.equilibrium(x) == f.equilibrium(x.astype(np.float64))).all()
    assert (f.error_bound(x) == f.error_bound(x.astype(np.float64))).all()


@pytest.mark.parametrize(("rho", "bits"), [(0.9, 8), (0.999, 16)])
def test_one_feature_comes_close_to_its_bound(rho: float, bits: int) -> None:
    """n = 1: the iterates stick below the fixed point, as far off as the rounding bound says (theory §5, C2)."""
    layer: Any = eq.MonDEQ(1, 1, rank=1)
    with torch.no_grad():
        layer.injection.weight.fill_(1.0)
        layer.injection.bias.zero_()
    layer.injection = quantize_linear(layer.injection, EIGHT, 8, None)
    layer.recurrent = CayleyWeight(QuantizedTensor.from_codes(torch.tensor([[127]]), torch.tensor(rho / 127), 8), 1.0)
    layer.scheme = EIGHT
    model: Any = nn.Sequential(layer)
    model.preprocessing = Preprocessing(mean=0.0, std=1.0, scale=255.0, input_shape=(1,))
    shipped = build(model, None, None, Options(activation_bits=bits))
    z, _, status = shipped.program(np.arange(256)[:, None])
    scale, weight = (float(stored.dequantize()) for stored in (layer.recurrent.C, layer.injection.weight))
    truth = np.arange(256) / 255 * weight * (1 + scale) / (1 - scale)
    error = np.abs(z[:, 0] * shipped.unit - truth)
    assert (status == 0).all()
    assert 0.5 < error.max() / shipped.certificate.error_bound <= 1  # type: ignore[operator]


def test_what_rounding_costs_the_injection_counts_towards_overflow() -> None:
    """c is computed from p, which is rounded: where that is much in units of c, the exact c alone is no bound of it."""
    model: Any = quantized(network(), EIGHT)
    layer, grid = model[0], grid_of(INPUTS, model.preprocessing, None, 16)
    on = cayley._Map(layer.recurrent, injection := code_linear(layer.injection, 255, "U"), box_of(grid)[0])
    affine, p_unit = cayley._injection(on, injection, grid)
    unit = float(on.c.max()) / 32767
    cayley._error(on, (affine, p_unit), unit, 32767)
    fraction = cayley._start(on, (affine, p_unit), unit)[1]
    coarse = Fraction(unit) * 2 ** (29 - fraction) * Fraction(9, 10)  # about the largest that has multipliers
    loose = replace(affine, least=affine.least * 0, most=affine.most * 0, errors=affine.errors * 6)
    with pytest.raises(eq.OptionError, match="far beyond"):
        cayley._error(on, (loose, coarse), unit, 32767)


@pytest.mark.parametrize(("bits", "remedy"), [(8, "--activation-bits 16"), (16, "larger margin")])
def test_iterates_that_are_as_fine_as_can_be_are_not_advised(bits: int, remedy: str) -> None:
    model: Any = quantized(network(), EIGHT)
    near = CayleyWeight(QuantizedTensor.from_codes(torch.eye(FEATURES).long(), torch.tensor(1 - 2.0**-20), 8), 1.0)
    model[0].recurrent = near
    with pytest.raises(eq.OptionError, match=remedy):
        build(model, None, None, Options(activation_bits=bits))


@pytest.mark.parametrize("natural", [True, False])
def test_the_bound_of_an_input_is_its_formula(natural: bool) -> None:
    """iteration + (‖ΔW‖ (‖ẑ‖ + iteration) + ‖ΔU‖ ‖x̂ − x̄‖ + ‖ΔU x̄ + Δb‖ + ‖U‖ ‖x − x̂‖)/m, term by term."""
    grid = Grid(2, 0, 100, (Fraction(1, 50),), (Fraction(-1),), natural)
    known = {
        "iteration": 0.5, "delta_weight": 0.3, "delta_input": 0.7, "delta_center": 0.2, "reference_input": 1.5,
        "reference_margin": 0.4,
    }  # fmt: skip

    class Stub(runtime.Runtime):
        def integers(self, x: Any) -> Any:
            return np.full((len(x), 2), [3, 4]), None, np.array([0, 1])

    library: Any = SimpleNamespace(eqnet_batch=SimpleNamespace())
    found = Stub(library, {}, grid, (np.uint8, np.int16), (0.01, None), known).error_bound(
        np.array([[0.505, -0.2]] * 2)
    )
    moved = 0.3 * (0.05 + 0.5) + 0.7 * math.hypot(0.5, 0.2) + 0.2 + 1.5 * 0.005
    assert found[0] == pytest.approx(0.5 + moved / 0.4, rel=1e-6)
    assert math.isnan(found[1])
