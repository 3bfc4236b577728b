"""The C itself: strict compilers, sanitizers, bit for bit against the emulation; and the Python binding."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import equipoise as eq
from equipoise import runtime
from equipoise.data import Preprocessing
from equipoise.errors import ConvergenceWarning
from equipoise.export import Shipped, export
from equipoise.export.build import Options, build
from shipping import (
    CLASSES,
    FEATURES,
    INPUTS,
    STRICT,
    build_and_run,
    builds_for_32_bits,
    compilers,
    exact,
    need_compiler,
    network,
    pixels,
    quantized,
)

KINDS: dict[str, tuple[eq.Scheme, dict[str, Any]]] = {
    "cayley-8-8": (eq.Cayley(bits=8, input_bits=8, head_bits=8), {"activation_bits": 8}),
    "cayley-8-16": (eq.Cayley(bits=8, input_bits=8, head_bits=8, bias_bits=8), {}),
    "cayley-4-8": (eq.Cayley(bits=4, input_bits=4, head_bits=4), {"activation_bits": 8}),
    "cayley-5-16-float-u": (eq.Cayley(bits=5), {}),
    "cayley-7-3-1": (eq.Cayley(bits=7, input_bits=3, head_bits=1), {}),
    "cayley-6-1-2": (eq.Cayley(bits=6, input_bits=1, head_bits=2), {}),
    "cayley-8-2-6": (eq.Cayley(bits=8, input_bits=2, head_bits=6), {"input_range": (-200, 300)}),
    "factored-1": (eq.Structured(bits=1, input_bits=1, head_bits=8), {}),
    "factored-2": (eq.Structured(bits=2, input_bits=2, head_bits=2, granularity="row"), {"activation_bits": 8}),
    "factored-4": (eq.Structured(bits=4, input_bits=8), {}),
    "factored-8": (eq.Structured(bits=8, input_bits=8, head_bits=8), {}),
    "factored-11": (eq.Structured(bits=11, input_bits=9), {"activation_bits": 8}),
}


def written(folder: Path, kind: str, **more: Any) -> tuple[Any, Shipped]:
    scheme, options = KINDS[kind]
    model, asked = quantized(network(), scheme), {**options, **more}
    export(model, folder, **asked)
    calibration = asked.pop("calibration", None)
    return model, build(model, None, calibration, Options(**asked))


@pytest.mark.parametrize("kind", KINDS)
def test_the_self_test_passes_bit_for_bit(kind: str, tmp_path: Path) -> None:
    cc = need_compiler()
    written(tmp_path / "net", kind)
    assert "bit for bit" in build_and_run(tmp_path / "net", cc, "-O1")


@pytest.mark.parametrize("kind", ["cayley-8-8", "cayley-6-1-2", "factored-2", "factored-11"])
def test_the_host_build_compiles_strictly(kind: str, tmp_path: Path) -> None:
    cc = need_compiler()
    written(tmp_path / "net", kind)
    for flags in (("-O3",), ("-O1", "-fopenmp")):
        command = [cc, *STRICT, *flags, "-c", str(tmp_path / "net" / "eqnet_host.c"), "-o", str(tmp_path / "host.o")]
        made = subprocess.run(command, capture_output=True, text=True, check=False)
        assert made.returncode == 0, made.stderr


@pytest.mark.slow
@pytest.mark.parametrize("level", ["-O0", "-O1", "-O2", "-Os", "-O3"])
@pytest.mark.parametrize("kind", KINDS)
def test_every_compiler_and_level_gives_the_same_bits(kind: str, level: str, tmp_path: Path) -> None:
    need_compiler()
    written(tmp_path / "net", kind)
    for cc in compilers():
        assert "bit for bit" in build_and_run(tmp_path / "net", cc, level)
        assert "bit for bit" in build_and_run(tmp_path / "net", cc, level, "-march=native")


@pytest.mark.slow
@pytest.mark.parametrize("level", ["-O0", "-O3"])
@pytest.mark.parametrize("kind", KINDS)
def test_32_bit_processors_give_the_same_bits(kind: str, level: str, tmp_path: Path) -> None:
    able = [cc for cc in compilers() if builds_for_32_bits(cc, tmp_path)]
    if not able:
        pytest.skip("no compiler here builds for 32 bits (-m32; Debian: gcc-multilib)")
    written(tmp_path / "net", kind)
    for cc in able:
        assert "bit for bit" in build_and_run(tmp_path / "net", cc, level, "-m32")


@pytest.mark.parametrize("kind", ["cayley-8-8", "cayley-6-1-2", "factored-2", "factored-4"])
def test_nothing_undefined_happens(kind: str, tmp_path: Path) -> None:
    cc = need_compiler()
    written(tmp_path / "net", kind)
    try:
        build_and_run(tmp_path / "net", cc, "-O1", "-g", "-fsanitize=undefined,address", "-fno-sanitize-recover=all")
    except AssertionError as error:
        if "sanitize" in str(error) or "asan" in str(error):
            pytest.skip(f"{cc} has no sanitizers here")
        raise


@pytest.mark.parametrize("kind", ["cayley-8-8", "cayley-6-1-2", "factored-1", "factored-8"])
def test_cppcheck_finds_nothing(kind: str, tmp_path: Path) -> None:
    if not shutil.which("cppcheck"):
        pytest.skip("cppcheck is not installed")
    written(tmp_path / "net", kind)
    command = ["cppcheck", "--std=c99", "--enable=warning,performance,portability", "--error-exitcode=1", "--quiet"]
    run = subprocess.run([*command, str(tmp_path / "net" / "eqnet.c")], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr


def test_the_source_keeps_its_promises(tmp_path: Path) -> None:
    for kind in KINDS:
        written(tmp_path / kind, kind)
        text = (tmp_path / kind / "eqnet.c").read_text()
        code = "\n".join(line.split("/*")[0] for line in text.splitlines() if not line.lstrip().startswith(("*", "/*")))
        for word in ("float", "double", "malloc", " / ", " % ", "#include <s", "memcpy"):
            assert word not in code, word
        assert text.count("#include") == 1
        assert "#include <stdint.h>" in (tmp_path / kind / "eqnet.h").read_text()


def test_at_one_and_two_bits_there_is_no_multiplication(tmp_path: Path) -> None:
    for bits in (1, 2):
        model = quantized(network(), eq.Structured(bits=bits, input_bits=bits, head_bits=bits))
        export(model, tmp_path / str(bits))
        text = (tmp_path / str(bits) / "eqnet.c").read_text()
        lines = [line for line in text.splitlines() if not line.lstrip().startswith(("/*", "*"))]
        products = [line for line in lines if re.search(r"[\w\])] \* [\w(]", line.split("/*")[0])]
        # only in the place of a code in its byte, by a constant power of two
        assert all(">> (2 * (j & 3" in line for line in products), products


def test_a_changed_table_fails_the_self_test(tmp_path: Path) -> None:
    cc = need_compiler()
    written(tmp_path / "net", "cayley-8-8")
    path = tmp_path / "net" / "eqnet.c"
    text = path.read_text()
    start = text.index("eqnet_C[")
    first = text.index("{\n", start) + 2
    end = text.index(",", first)
    path.write_text(text[:first] + str((int(text[first:end]) + 64) % 128) + text[end:])
    with pytest.raises(AssertionError, match="differences"):
        build_and_run(tmp_path / "net", cc, "-O1")


@pytest.mark.parametrize("kind", ["cayley-8-8", "cayley-5-16-float-u", "cayley-8-2-6", "factored-1", "factored-11"])
def test_the_binding_answers_what_the_emulation_answers(kind: str, tmp_path: Path) -> None:
    need_compiler()
    model, shipped = written(tmp_path / "net", kind)
    f = runtime.load(tmp_path / "net")
    raw = pixels(40, shipped.grid.low, shipped.grid.high)
    z, scores, status = f.integers(shipped.grid.to_real(raw))
    expected = shipped.program(raw)
    assert (z == expected[0]).all()
    assert (scores == expected[1]).all()
    assert (status == expected[2]).all()
    x = shipped.grid.to_real(raw).astype(np.float32)
    truth, true_scores, doubt = exact(model, x)
    assert f(x).shape == (len(raw), CLASSES)
    assert (np.linalg.norm(f.equilibrium(x) - truth, axis=1) - doubt <= f.certificate["error_bound"]).all()
    assert (np.abs(f(x) - true_scores).max(axis=1) <= f.certificate["score_error_bound"] + 10 * doubt).all()
    assert (f(raw.astype(np.int16)) == f(x)).all()  # raw inputs, as integers
    assert f(x[:0]).shape == (0, CLASSES)


@pytest.mark.parametrize("scheme", [eq.Cayley(bits=6), eq.Structured(bits=4, input_bits=5)], ids=["cayley", "factored"])
def test_the_bound_of_each_input_holds_and_is_sharper(scheme: eq.Scheme, tmp_path: Path) -> None:
    need_compiler()
    model = network()
    certificate = export(quantized(model, scheme), tmp_path / "net", reference=model)
    f = runtime.load(tmp_path / "net")
    x = f.grid.to_real(pixels(60))
    x[::3] += np.random.default_rng(0).uniform(0, 0.4, x[::3].shape) * float(f.grid.steps[0])  # between the pixels
    x = x.clip(f.grid.to_real(pixels(0)).min(), f.grid.to_real(pixels(0)).max())
    bound = f.error_bound(x)
    truth, _, doubt = exact(model, x)
    error = np.linalg.norm(f.equilibrium(x) - truth, axis=1)
    assert (error - doubt <= bound).all()
    assert np.median(bound) < 0.9 * certificate.error_bound  # type: ignore[operator]


def test_the_binding_refuses_what_the_program_cannot_take(tmp_path: Path) -> None:
    need_compiler()
    _, shipped = written(tmp_path / "net", "cayley-8-16", input_range=(10, 200))
    f = runtime.load(tmp_path / "net")
    x = shipped.grid.to_real(np.full((2, INPUTS), 50))
    with pytest.raises(eq.InputError, match="outside the declared range"):
        f(x + 100)
    with pytest.raises(eq.InputError, match="outside the declared range"):
        f(np.full((2, INPUTS), 201))
    with pytest.raises(eq.InputError, match="shape"):
        f(x[0])


def test_an_iterate_out_of_its_range_is_told(tmp_path: Path) -> None:
    need_compiler()
    calm = np.full((4, INPUTS), 80)
    grid_x = written(tmp_path / "first", "cayley-8-8")[1].grid.to_real(calm)
    written(tmp_path / "net", "cayley-8-8", calibration=torch.from_numpy(grid_x))
    assert "bit for bit" in build_and_run(tmp_path / "net", need_compiler(), "-O1")
    f = runtime.load(tmp_path / "net")
    wild = np.concatenate([calm, np.full((1, INPUTS), 255), np.zeros((1, INPUTS), dtype=np.int64)])
    with pytest.warns(ConvergenceWarning, match="out of its range"):
        scores = f(wild)
    assert np.isfinite(scores[:4]).all()
    assert np.isnan(scores[4:]).all(axis=1).any()


def test_a_layer_alone_and_pixels_of_few_levels(tmp_path: Path) -> None:
    cc = need_compiler()
    few: Any = Preprocessing(mean=0.0, std=1.0, scale=16.0, input_shape=(4, 5))
    model = quantized(network(head=False, preprocessing=few), eq.Cayley(bits=8, input_bits=8))
    export(model, tmp_path / "net")
    assert "bit for bit" in build_and_run(tmp_path / "net", cc, "-O2")
    f = runtime.load(tmp_path / "net")
    x = np.random.default_rng(0).integers(0, 17, (5, INPUTS)) / 16
    assert (f(x) == f.equilibrium(x)).all()
    assert f(x).shape == (5, FEATURES)
    # beyond the range the C itself answers with an error code and zeros
    raw = np.full((1, INPUTS), 17, dtype=np.uint8)
    z, status = np.ones((1, FEATURES), dtype=np.int16), np.zeros(1, dtype=np.int32)
    assert f._library.eqnet_batch(raw.ctypes.data, 1, z.ctypes.data, None, status.ctypes.data) == 1
    assert status[0] == 1
    assert not z.any()


def test_no_compiler_and_no_program_are_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(eq.DataNotFoundError, match=r"eqnet|certificate"):
        runtime.load(tmp_path)
    written(tmp_path / "net", "cayley-8-8")
    monkeypatch.setenv("PATH", "/nonexistent")
    monkeypatch.delenv("CC", raising=False)
    with pytest.raises(eq.MissingExtraError, match="C compiler"):
        runtime.load(tmp_path / "net")
    (tmp_path / "net" / "certificate.json").write_text("{}")
    with pytest.raises(eq.FileFormatError, match="not written by an export"):
        runtime.load(tmp_path / "net")
