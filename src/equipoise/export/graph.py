"""ONNX graphs of a fixed number of steps: unrolled, and as a ``Loop``; weights as integers with their scales.

Opset 21: DequantizeLinear of int8 and int16 codes, with one scale or one per row. All arithmetic is float32.
"""

from __future__ import annotations

from importlib.metadata import version
from typing import Any

import numpy as np
from torch import nn

from ..errors import MissingExtraError
from ..layers.linear import QuantizedLinear
from ..operators.quantized import CayleyWeight, StructuredWeight
from ..quantization.codes import QuantizedTensor
from .certificate import ShipCertificate
from .floating import FixedSteps
from .network import Network

__all__ = ["OPSET", "graphs"]

OPSET, IR = 21, 10


def _onnx() -> Any:
    try:
        import onnx
        import onnx.helper
        import onnx.numpy_helper
    except ImportError as error:
        raise MissingExtraError("ONNX graphs need the package onnx: pip install 'equipoise[export]'") from error
    return onnx


class _Builder:
    """Nodes and initializers of one graph, with names that do not repeat."""

    def __init__(self, onnx: Any, prefix: str = "") -> None:
        self.onnx, self.prefix = onnx, prefix
        self.nodes: list[Any] = []
        self.constants: list[Any] = []
        self.count = 0

    def node(self, kind: str, *inputs: str, name: str | None = None, **attributes: Any) -> str:
        self.count += 1
        output = name or f"{self.prefix}{kind.lower()}_{self.count}"
        self.nodes.append(self.onnx.helper.make_node(kind, list(inputs), [output], **attributes))
        return output

    def constant(self, name: str, values: Any) -> str:
        self.constants.append(self.onnx.numpy_helper.from_array(np.array(values, order="C"), name))
        return name

    def coded(self, name: str, codes: Any, scales: Any) -> str:
        """``scale · codes`` by DequantizeLinear, ``(n, k)``."""
        dtype = np.int8 if np.abs(codes).max(initial=0) <= 127 else np.int16
        q = self.constant(f"{name}_codes", np.asarray(codes).astype(dtype))
        flat = np.asarray(scales, dtype=np.float32).reshape(-1)
        if flat.size == 1:
            return self.node("DequantizeLinear", q, self.constant(f"{name}_scale", flat.reshape(())), name=name)
        return self.node("DequantizeLinear", q, self.constant(f"{name}_scale", flat), name=name, axis=0)

    def matrix(self, name: str, stored: Any) -> str:
        """A weight as codes where it is stored as codes that fit, else as floats."""
        if isinstance(stored, QuantizedTensor):
            if _fits(stored):
                return self.coded(name, stored.codes.cpu().numpy(), stored.scale.double().cpu().numpy())
            stored = stored.dequantize()
        return self.constant(name, stored.detach().float().cpu().numpy())

    def affine(self, x: str, W: str, *b: str, name: str | None = None) -> str:
        """x Wᵀ + b. Gemm and not MatMul: onnxruntime rounds the activations of a MatMul on dequantized weights to 8
        bits on its own, which no bound here accounts for."""
        return self.node("Gemm", x, W, *b, name=name, transB=1)


def _fits(stored: QuantizedTensor) -> bool:
    """Whether DequantizeLinear reads it here: at most 16 bits, one scale or one per row."""
    return stored.bits <= 16 and all(size == 1 for size in stored.scale.shape[1:])


def _vector(stored: Any, size: int) -> Any:
    if stored is None:
        return np.zeros(size, dtype=np.float32)
    value = stored.dequantize() if isinstance(stored, QuantizedTensor) else stored.detach()
    return value.float().cpu().numpy()


def graphs(network: Network, module: FixedSteps, certificate: ShipCertificate) -> dict[str, bytes]:
    """``unrolled.onnx`` and ``loop.onnx``: input ``x (batch, d)`` float32, outputs ``scores`` and ``equilibrium``."""
    onnx = _onnx()
    return {
        f"{form}.onnx": _model(onnx, network, module, certificate, form == "loop").SerializeToString(deterministic=True)
        for form in ("unrolled", "loop")
    }


def _model(onnx: Any, network: Network, module: FixedSteps, certificate: ShipCertificate, loop: bool) -> Any:
    helper, kind = onnx.helper, onnx.TensorProto.FLOAT
    graph = _Builder(onnx)
    layer = network.layer
    injection: nn.Linear | QuantizedLinear = layer.injection  # type: ignore[assignment]
    U = graph.matrix("U", injection.weight)
    q = graph.affine("x", U, graph.constant("b", _vector(injection.bias, layer.features)))
    z = _equilibrium(graph, network, module, q, loop)
    z = graph.node("Identity", z, name="equilibrium")
    outputs = [helper.make_tensor_value_info("equilibrium", kind, ["batch", layer.features])]
    if network.head is not None:
        V = graph.matrix("V", network.head.weight)
        c = graph.constant("c", _vector(network.head.bias, network.head.out_features))
        graph.affine(z, V, c, name="scores")
        outputs.insert(0, helper.make_tensor_value_info("scores", kind, ["batch", network.head.out_features]))
    inputs = [helper.make_tensor_value_info("x", kind, ["batch", layer.in_features])]
    words = "; ".join(f"{name.strip()}: {value}" for name, value in certificate.summary())
    made = helper.make_graph(graph.nodes, "equipoise", inputs, outputs, graph.constants, doc_string=words)
    model = helper.make_model(
        made,
        opset_imports=[helper.make_opsetid("", OPSET)],
        ir_version=IR,
        producer_name="equipoise",
        producer_version=version("equipoise"),
    )
    helper.set_model_props(model, {"equipoise.certificate": certificate.to_json()})
    onnx.checker.check_model(model, full_check=True)
    return model


def _equilibrium(graph: _Builder, network: Network, module: FixedSteps, q: str, loop: bool) -> str:
    """All steps; those of a loop share one body."""
    weights = network.layer.recurrent
    alpha = graph.constant("alpha", np.float32(module.alpha))
    if isinstance(weights, CayleyWeight):
        C = graph.matrix("C", weights.C)
        start = graph.node("Mul", graph.affine(q, C, q), alpha)

        def step(body: _Builder, u: str) -> str:
            return body.affine(body.node("Abs", u), C, start)

        return graph.node("Relu", _repeat(graph, module.steps, start, step, network.layer.features, loop))
    assert isinstance(weights, StructuredWeight)
    n = weights.features
    half = np.zeros((n, n), dtype=np.int64)
    half[np.triu_indices(n, 1)] = weights.K.codes.cpu().numpy()
    # FactoredMap.of has refused codes of more than 16 bits
    K = graph.coded("K", half - half.T, weights.K.scale.double().cpu().numpy())
    A = graph.matrix("A", weights.A)
    keep = graph.constant("keep", np.float32(module.keep))
    p = graph.node("Mul", q, alpha)

    def forward(body: _Builder, z: str) -> str:
        pulled = body.node("Gemm", body.affine(z, A), A)
        moved = body.node("Mul", body.node("Sub", body.affine(z, K), pulled), alpha)
        return body.node("Relu", body.node("Add", body.node("Add", body.node("Mul", z, keep), moved), p))

    return _repeat(graph, module.steps, graph.node("Relu", p), forward, n, loop)


def _repeat(graph: _Builder, steps: int, start: str, step: Any, features: int, loop: bool) -> str:
    if not loop:
        for _ in range(steps):
            start = step(graph, start)
        return start
    onnx, helper = graph.onnx, graph.onnx.helper
    body = _Builder(onnx, "step_")
    body.node("Identity", "going", name="going_on")
    body.node("Identity", step(body, "u"), name="u_next")
    shape = ["batch", features]
    flag, real = onnx.TensorProto.BOOL, onnx.TensorProto.FLOAT
    inner = helper.make_graph(
        [*body.nodes],
        "step",
        [
            helper.make_tensor_value_info("k", onnx.TensorProto.INT64, []),
            helper.make_tensor_value_info("going", flag, []),
            helper.make_tensor_value_info("u", real, shape),
        ],
        [helper.make_tensor_value_info("going_on", flag, []), helper.make_tensor_value_info("u_next", real, shape)],
        body.constants,
    )
    trips = graph.constant("steps", np.int64(steps))
    return graph.node("Loop", trips, graph.constant("go", np.bool_(True)), start, body=inner)
