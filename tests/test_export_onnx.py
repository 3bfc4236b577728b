"""ONNX graphs and the module they come from, against exact arithmetic and the proved bound."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import equipoise as eq
from equipoise.export import export, unrolled
from equipoise.export.build import Options
from equipoise.export.grid import grid_of
from shipping import INPUTS, exact, network, pixels, quantized

KINDS: dict[str, eq.Scheme] = {
    "cayley8": eq.Cayley(bits=8, input_bits=8, head_bits=8),
    "cayley4-float-u": eq.Cayley(bits=4, granularity="tensor"),
    "structured1": eq.Structured(bits=1, input_bits=1, head_bits=4),
    "structured10-rows": eq.Structured(bits=10, granularity="row", input_bits=12),
}


def inputs(model: Any, count: int = 40) -> np.ndarray:
    """Floats all over the range, on the grid and off it."""
    grid = grid_of(INPUTS, model.preprocessing, None, 16)
    x = grid.to_real(pixels(count)).astype(np.float32)
    inside = np.random.default_rng(3).uniform(x.min(), x.max(), (count, INPUTS)).astype(np.float32)
    return np.concatenate([x, inside])


@pytest.mark.parametrize("kind", KINDS)
def test_the_unrolled_module_stays_within_its_bound(kind: str) -> None:
    q: Any = quantized(network(), KINDS[kind])
    module, certificate = unrolled(q)
    x = inputs(q)
    truth, true_scores, doubt = exact(q, x)
    with torch.no_grad():
        scores, z = module(torch.from_numpy(x))
    assert certificate.error_bound is not None
    error = np.linalg.norm(z.numpy() - truth, axis=1) - doubt
    assert 0 < error.max() <= certificate.error_bound
    assert np.abs(scores.numpy() - true_scores).max() <= certificate.score_error_bound + 10 * doubt.max()
    model = network()
    against = unrolled(q, model)[1]
    far = np.linalg.norm(z.numpy() - exact(model, x)[0], axis=1)
    assert far.max() <= against.error_bound


@pytest.mark.parametrize("kind", KINDS)
def test_both_graphs_run_and_stay_within_the_bound(kind: str, tmp_path: Path) -> None:
    pytest.importorskip("onnx")
    runtime = pytest.importorskip("onnxruntime")
    q: Any = quantized(network(), KINDS[kind])
    certificate = export(q, tmp_path / "net", "onnx")
    x = inputs(q)
    truth, true_scores, doubt = exact(q, x)
    for name in ("unrolled", "loop"):
        session = runtime.InferenceSession(tmp_path / "net" / f"{name}.onnx", providers=["CPUExecutionProvider"])
        scores, z = session.run(None, {"x": x})
        assert (np.linalg.norm(z - truth, axis=1) - doubt).max() <= certificate.error_bound
        assert np.abs(scores - true_scores).max() <= certificate.score_error_bound + 10 * doubt.max()
        assert session.run(["equilibrium"], {"x": x[:1]})[0].shape == (1, 12)


def test_the_graph_holds_integers_and_its_certificate(tmp_path: Path) -> None:
    onnx = pytest.importorskip("onnx")
    q = quantized(network(), KINDS["cayley8"])
    certificate = export(q, tmp_path / "net", "onnx")
    model = onnx.load(tmp_path / "net" / "unrolled.onnx")
    assert [(i.domain, i.version) for i in model.opset_import] == [("", 21)]
    kinds = {t.name: t.data_type for t in model.graph.initializer}
    assert all(kinds[f"{name}_codes"] == onnx.TensorProto.INT8 for name in ("U", "C", "V"))
    assert sum(node.op_type == "Abs" for node in model.graph.node) == certificate.steps
    loop = onnx.load(tmp_path / "net" / "loop.onnx")
    assert sum(node.op_type == "Loop" for node in loop.graph.node) == 1
    assert '"steps"' in {p.key: p.value for p in loop.metadata_props}["equipoise.certificate"]
    assert (tmp_path / "net" / "certificate.json").is_file()


def test_a_layer_alone_has_one_output(tmp_path: Path) -> None:
    pytest.importorskip("onnx")
    runtime = pytest.importorskip("onnxruntime")
    q = quantized(network(head=False), eq.Cayley(bits=8))
    certificate = export(q, tmp_path / "net", "onnx", tol=1.0)
    session = runtime.InferenceSession(tmp_path / "net" / "loop.onnx", providers=["CPUExecutionProvider"])
    x = inputs(q)
    (z,) = session.run(None, {"x": x})
    truth, _, doubt = exact(q, x)
    assert (np.linalg.norm(z - truth, axis=1) - doubt).max() <= certificate.error_bound <= 1.0


def test_torch_export_takes_the_module() -> None:
    q: Any = quantized(network(), KINDS["cayley8"])
    module, _ = unrolled(q)
    x = torch.from_numpy(inputs(q))
    batch = torch.export.Dim("batch", min=1, max=1024)
    program = torch.export.export(module, (x[:3],), dynamic_shapes={"x": {0: batch}})
    for found, expected in zip(program.module()(x), module(x), strict=True):
        assert torch.equal(found, expected)


def test_what_graphs_cannot_be_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    q = quantized(network(), KINDS["cayley8"])
    with pytest.raises(eq.OptionError, match="cannot be reached"):
        unrolled(q, None, Options(tol=1e-9))
    with pytest.raises(eq.OptionError, match="uncertified is for target c"):
        export(q, tmp_path / "a", "onnx", uncertified=True)
    with pytest.raises(eq.StructureError, match="--scheme"):
        export(network(), tmp_path / "a", "onnx")
    monkeypatch.setitem(sys.modules, "onnx", None)
    with pytest.raises(eq.MissingExtraError, match=r"equipoise\[export\]"):
        export(q, tmp_path / "a", "onnx")
    assert not (tmp_path / "a").exists()
