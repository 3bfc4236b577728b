"""What a certificate says of one layer: proved against exact rationals, and closed forms."""

from __future__ import annotations

import copy
import math
import random
from collections.abc import Iterator

import pytest
import torch
from flint import fmpq_mat
from torch import Tensor

import equipoise as eq
from catalogue import ACTIVATIONS, SCHEME_KINDS
from equipoise.operators.quantized import AssembledWeight, CayleyWeight, CompensatedWeight, StructuredWeight
from equipoise.quantization import QuantizedTensor
from exact_arithmetic import F64, at_least, at_most, exact, eye, q, spectrum, sym_margin
from problems import matrix, true_margin

BITS = [*range(1, 9), 16, 32]
IDENTITY = eq.LeakyReLU(1.0)


def layer_of(W: Tensor, dtype: torch.dtype = F64, **options: object) -> eq.MonDEQ:
    n = len(W)
    return eq.MonDEQ.from_weights(W.to(dtype), torch.eye(n, dtype=dtype), torch.zeros(n, dtype=dtype), False, **options)


def random_layer(n: int, d: int, dtype: torch.dtype = F64, **options: object) -> eq.MonDEQ:
    return eq.MonDEQ(d, n, margin=random.choice([0.02, 0.3, 1.2]), **options).to(dtype)


def coded(codes: QuantizedTensor) -> fmpq_mat:
    """Codes times scales, not rounded."""
    scales = codes.scale.double().expand(codes.codes.shape)
    return fmpq_mat(
        *codes.codes.shape, [int(c) * q(s) for c, s in zip(codes.codes.flatten(), scales.flatten(), strict=True)]
    )


def stored(layer: eq.MonDEQ) -> fmpq_mat | None:
    """W as the stored numbers define it, exactly; None where codes of C_α define none."""
    weights, n = layer.recurrent, layer.features
    match weights:
        case AssembledWeight():
            return coded(weights.codes)
        case StructuredWeight():
            A, K = coded(weights.A), fmpq_mat(n, n)
            half = iter(weights.K.codes.tolist())
            for i in range(n):
                for j in range(i + 1, n):
                    K[i, j] = next(half) * q(weights.K.scale)
            return eye(n, 1 - q(weights.margin)) - A.transpose() * A + K - K.transpose()
        case CompensatedWeight():
            off, W = coded(weights.off_diagonal) if n > 1 else None, fmpq_mat(n, n)
            for i in range(n):
                W[i, i] = int(weights.diagonal.codes[i]) * q(weights.diagonal.scale)
                for j in range(n - 1):
                    W[i, j + (j >= i)] = off[i, j]
            return W
        case CayleyWeight():
            C = coded(weights.C)
            if (eye(n) + C).det() == 0:
                return None
            return eye(n) - (eye(n) - C) * (eye(n) + C).inv() / q(weights.alpha)
    return exact(layer.weight.detach().double())


def check_constants(layer: eq.MonDEQ) -> eq.Certificate:
    """Margin and Lipschitz constant hold for the stored numbers and for what the layer multiplies by."""
    c = eq.certify(layer)
    assert c.certified == (c.margin is not None and c.margin > 0) == (c.verdict == "certified")
    assert eq.margin(layer) == (-math.inf if c.margin is None else c.margin)
    assert eq.lipschitz(layer) == (math.inf if c.lipschitz is None else c.lipschitz)
    for W in (stored(layer), exact(layer.weight.detach().double())):
        if W is None or c.margin is None or c.lipschitz is None:
            assert not c.certified
            continue
        assert at_least(sym_margin(W), q(c.margin))
        assert at_most(eye(layer.features) - W, q(c.lipschitz))
        if c.certified and c.condition is not None and c.weight_condition is not None:
            assert q(c.condition) >= q(c.lipschitz) / q(c.margin)
            assert at_most(W, q(c.weight_condition) * q(c.margin))
    return c


# Margin and Lipschitz constant


def test_quantized_constants_against_exact_rationals() -> None:
    certified = 0
    for i, bits in enumerate(BITS * 5):
        for kind in SCHEME_KINDS:
            dtype, n = (torch.float32, F64)[i // 2 % 2], 1 + (i + bits) % 4
            layer = random_layer(n, 2, dtype)
            options = {"granularity": random.choice(["tensor", "row"]), "scale": random.choice(["max", "mse"])}
            certified += check_constants(eq.quantize(layer, kind(bits, **options))).certified
    assert 150 < certified < 200  # nearly all, but not all: Assembled and Cayley lose some


def almost_singular() -> Iterator[Tensor]:
    """W whose margin is 0 up to 1e-12 or 1e-15, on both sides, with skew parts of any size."""
    for i in range(40):
        n, low = 1 + i % 4, [1e-12, -1e-12, 1e-15, -1e-15, 0.0][i % 5]
        H = spectrum(torch.cat([torch.tensor([low], dtype=F64), torch.rand(n, dtype=F64)]))
        B = torch.randn(n + 1, n + 1, dtype=F64) * random.choice([0.0, 1.0, 1e4])
        yield torch.eye(n + 1, dtype=F64) - H + B - B.T


def test_constants_on_the_edge_of_singularity() -> None:
    verdicts = []
    for i, W in enumerate(almost_singular()):
        verdicts.append(check_constants(layer_of(W, (F64, torch.float32)[i % 2])).certified)
        for kind in (eq.Assembled, eq.Compensated, eq.Cayley):
            check_constants(eq.quantize(layer_of(W), kind(random.choice([8, 16, 32]))))
    assert any(verdicts)
    assert not all(verdicts)


def test_codes_that_are_exactly_singular_are_not_certified() -> None:
    for _ in range(30):
        n = random.randint(2, 5)
        A, B = torch.randint(-2, 3, (n - 1, n)), torch.randint(-2, 3, (n, n))
        layer = layer_of(torch.zeros(n, n, dtype=F64))
        codes = torch.eye(n, dtype=torch.int64) - A.T @ A + B - B.T
        layer.recurrent = AssembledWeight(QuantizedTensor.from_codes(codes, torch.tensor(1.0), 8))
        assert -1e-12 * n < layer.operator.euclidean_margin() <= 0
        if eq.certify(layer).family == "l2":  # else its row sums prove what the Euclidean margin cannot
            check_constants(layer)


def test_codes_times_float64_scales_are_rounded() -> None:
    """code · scale has up to 85 bits: the float64 matrix is not the stored one, and I + C̃ near 0 magnifies that."""
    for i in range(120):
        W = torch.randn(1, 1, dtype=F64) - 10 ** random.uniform(0, 9) * (i % 2)
        for kind in (eq.Cayley(32, alpha=random.uniform(0.2, 5)), eq.Assembled(32), eq.Compensated(32)):
            check_constants(eq.quantize(layer_of(W), kind))
        layer = eq.quantize(layer_of(W), eq.Cayley(8, alpha=random.uniform(0.2, 5), granularity="tensor"))
        C = layer.recurrent.C
        layer.recurrent.C = QuantizedTensor.from_codes(C.codes, C.scale.double() * (1 - random.random() * 1e-7), 8)
        check_constants(layer)  # as files from elsewhere may have it: few bits, and a float64 scale


def test_codes_that_define_no_matrix_are_not_certified() -> None:
    layer = eq.quantize(random_layer(2, 2), eq.Cayley(8, granularity="tensor"))
    layer.recurrent.C.scale.fill_(1.0)
    layer.recurrent.C.codes.copy_(torch.tensor([[-1, 0], [0, 1]]))
    for solver in (eq.PeacemanRachford(), eq.ForwardBackward(), eq.Picard(), eq.Tseng(), eq.Anderson()):
        layer.solver = solver
        c = eq.certify(layer, random_layer(2, 2), torch.randn(3, 2))
        assert (c.margin, c.lipschitz, c.rate, c.delta_norm, c.verdict) == (None, None, None, None, "unknown")


def test_constants_are_tight() -> None:
    for i, kind in enumerate(SCHEME_KINDS * 6):
        layer = eq.quantize(random_layer(30, 3, (torch.float32, F64)[i % 2]), kind([3, 8, 16][i % 3]))
        W, c = layer.weight.detach().double(), eq.certify(layer)
        near = 1e-11 if i % 2 else 1e-5
        assert true_margin(W) - near < c.margin < true_margin(W) + near
        largest = float(torch.linalg.matrix_norm(torch.eye(30, dtype=F64) - W, 2))
        assert largest - near < c.lipschitz < largest + near


# What a perturbation does (T2, C3)


def test_three_forms_of_the_perturbation_theorem() -> None:
    sufficient, predeployed = 0, 0
    for i in range(60):
        n, dtype = 2 + i % 4, (torch.float32, F64)[i // 2 % 2]
        model = layer_of(matrix(n, random.choice([0.05, 0.5]), i, gain=0.2), dtype)
        scheme = (eq.Assembled if i % 3 else eq.Structured)(random.choice([1, 2, 4, 8, 16]))
        quantized = eq.quantize(model, scheme)
        c, m, W = eq.certify(quantized, model), eq.margin(model), exact(model.weight.detach().double())
        if c.family != "l2":  # proved by its rows, and all is in another norm
            continue
        codes, used = stored(quantized), exact(quantized.weight.double())
        for tilde in (codes, used):
            assert at_most(tilde - W, q(c.delta_norm))
        true = float(torch.linalg.matrix_norm(quantized.weight.double() - model.weight.detach().double(), 2))
        assert c.delta_norm <= true * (1 + 1e-9) + (1e-5 if dtype == torch.float32 else 1e-13)
        assert abs(c.margin - m) <= c.delta_norm * (1 + 1e-9) + 1e-12
        assert c.sufficient is (c.delta_norm < m)
        assert c.certified or not c.sufficient
        assert c.certified or not c.predeployment
        sufficient += bool(c.sufficient)
        if isinstance(scheme, eq.Structured) or scheme.bits == 1:
            assert c.predeployment is None
        else:
            step = max(q(s) for s in quantized.recurrent.codes.scale.double().flatten().tolist())
            assert c.predeployment is (n * step / 2 < q(m))
            assert c.sufficient or not c.predeployment
            predeployed += bool(c.predeployment)
    assert 0 < predeployed < sufficient < 60


@pytest.mark.parametrize(("entry", "holds"), [(0.5, False), (0.499, True)])
def test_the_predeployment_check_at_its_limit(entry: float, holds: bool) -> None:
    """n = 2, two bits: Δ = max|w| = entry, nΔ/2 = entry, m = 1 − entry."""
    model = layer_of(torch.diag(torch.tensor([-0.4, entry], dtype=F64)))
    for granularity in ("tensor", "row"):
        c = eq.certify(eq.quantize(model, eq.Assembled(2, granularity=granularity)), model)
        assert c.predeployment is holds
    assert eq.certify(eq.quantize(model, eq.Assembled(2, scale="mse")), model).predeployment is None
    other = layer_of(torch.diag(torch.tensor([-0.4, 2 * entry - (0.999 if holds else 1.001)], dtype=F64)))
    assert eq.certify(other, model).sufficient is holds  # ‖ΔW‖ = 0.999 − entry, or 1.001 − entry; m = 1 − entry


def test_the_relative_bound_holds_and_needs_the_same_injection() -> None:
    seen = 0
    for i in range(16):
        model = random_layer(
            5, 3, (torch.float32, F64)[i % 2], activation=ACTIVATIONS[i % len(ACTIVATIONS) * (i < len(ACTIVATIONS))]
        )
        quantized = eq.quantize(model, eq.Structured(8 + i % 9, scale="max"))
        x = torch.randn(8, 3, dtype=F64)
        c = eq.certify(quantized, model, x)
        assert (c.relative_bound is None) == (c.delta_norm >= eq.margin(model))
        if c.relative_bound is None or c.displacement is None:
            continue
        seen += 1
        delta = q(c.delta_norm) / q(eq.margin(model))
        assert delta / (1 - delta) <= q(c.relative_bound) <= delta / (1 - delta) * q(1 + 1e-12)
        size = model.double().solve(x, tol=1e-10).value.norm(dim=1)
        assert bool((c.displacement <= c.relative_bound * size * (1 + 1e-5) + 1e-5).all())  # T3 knows more
        for more in ({"input_bits": 8}, {"bias_bits": 8}, {"input_bits": 32, "bias_bits": 32}):
            other = eq.quantize(model, eq.Structured(16, scale="max", **more))
            assert eq.certify(other, model).relative_bound is None
        twin = copy.deepcopy(model).double()
        with torch.no_grad():  # the same float64 values; stored are others that round to them
            twin.injection.weight.copy_(other.injection.weight.dequantize())
            twin.injection.bias.copy_(other.injection.bias.dequantize())
        assert eq.certify(other.double(), twin).relative_bound is None
    assert seen > 6
    one = eq.MonDEQ.from_weights(*torch.tensor([[[0.0]], [[1.0]]], dtype=F64), torch.zeros(1).double())
    two = eq.MonDEQ.from_weights(*torch.tensor([[[0.375]], [[1.0]]], dtype=F64), torch.zeros(1).double())
    c = eq.certify(two, one, torch.tensor([[2.0]]))  # z = 2 and 2/0.625, δ = 0.375: reached
    assert c.relative_bound == pytest.approx(0.6, rel=1e-12)
    assert c.actual_displacement.item() == pytest.approx(0.6 * 2, rel=1e-9)
