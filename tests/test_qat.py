"""Training through the quantizer: the codes kept are those trained, the gradients exact, the guarantee never lost."""

from __future__ import annotations

import copy
import math
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import equipoise as eq
from equipoise.data import load_data
from equipoise.errors import ConvergenceWarning
from equipoise.layers import PreparedLinear, QuantizedLinear
from equipoise.operators import PreparedWeight
from equipoise.parametrizations import Dense
from equipoise.quantization import fit_scale
from equipoise.quantization.straight_through import FakeQuantize
from problems import matrix, true_margin
from trainings import one_step

F64 = torch.float64
D, N, RANK, CLASSES = 4, 7, 3, 5
ASSEMBLED, STRUCTURED, COMPENSATED, CAYLEY = SCHEMES = [eq.Assembled, eq.Structured, eq.Compensated, eq.Cayley]
MARGIN = 0.3


def classifier(dtype: torch.dtype = torch.float32, **options: Any) -> nn.Sequential:
    options = {"rank": RANK, "margin": MARGIN} | options
    return nn.Sequential(eq.MonDEQ(D, N, **options), nn.Linear(N, CLASSES)).to(dtype)


def dense_classifier(dtype: torch.dtype = torch.float32) -> nn.Sequential:
    W, U, b = matrix(N, MARGIN, 5, rank=RANK, gain=0.2), torch.randn(N, D, dtype=F64), torch.randn(N, dtype=F64)
    layer = eq.MonDEQ.from_weights(W.to(dtype), U.to(dtype), b.to(dtype))
    return nn.Sequential(layer, nn.Linear(N, CLASSES)).to(dtype)


def batch(dtype: torch.dtype = torch.float32, size: int = 9) -> tuple[Tensor, Tensor]:
    return torch.randn(size, D, dtype=dtype), torch.randint(0, CLASSES, (size,))


def loss(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    return nn.functional.cross_entropy(model(x), y)


def train(model: nn.Module, steps: int = 3, rate: float = 3e-2, optimizer: Any = None, seed: int = 1) -> nn.Module:
    """Steps of training; the weights that the last forward pass used are then still those of the model."""
    torch.manual_seed(seed)
    dtype = next(model.parameters()).dtype
    optimizer = optimizer or torch.optim.Adam([p for p in model.parameters() if p.requires_grad], rate)
    model.train()
    for _ in range(steps):
        x, y = batch(dtype)
        optimizer.zero_grad()
        loss(model, x, y).backward()
        optimizer.step()
    return model


def parts(model: nn.Module) -> list[Tensor]:
    """W, U, b and the head as they are multiplied by."""
    layer, head = model
    dense = head.dense() if isinstance(head, (PreparedLinear, QuantizedLinear)) else (head.weight, head.bias)
    return [t.detach().clone() for t in (layer.weight, layer.input_weight, layer.bias, *dense)]


def same(one: list[Tensor], other: list[Tensor]) -> bool:
    return all(a.dtype == b.dtype and torch.equal(a, b) for a, b in zip(one, other, strict=True))


def learnable(scheme: eq.Scheme, dtype: torch.dtype = torch.float32, learn: bool = False) -> nn.Module:
    return eq.prepare_qat(classifier(dtype), scheme, learn)


# Bit for bit


@pytest.mark.parametrize("learn", [False, True])
@pytest.mark.parametrize("rule", ["max", "mse"])
@pytest.mark.parametrize("granularity", ["tensor", "row"])
@pytest.mark.parametrize("kind", SCHEMES)
def test_what_is_converted_is_what_was_trained(
    kind: Any, granularity: str, rule: str, learn: bool, tmp_path: Path
) -> None:
    skew = {"skew_bits": 5} if kind is STRUCTURED else {}
    for i, bits in enumerate((1, 3, 8)):
        own = ({}, {"input_bits": 2, "bias_bits": 3, "head_bits": 4}, {"bias_bits": 1} | skew)[i]
        scheme = kind(bits, granularity=granularity, scale=rule, **own)
        dtype = (torch.float32, F64, torch.float32)[i]
        model = eq.prepare_qat(classifier(dtype, solver=eq.PeacemanRachford(max_steps=300)), scheme, learn)
        x, _ = batch(dtype)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)  # Assembled may lose its margin
            train(model)
            model(x)  # fits the scales to the weights after the last step
            used = parts(model)
            before = copy.deepcopy(model.state_dict())
            converted = eq.convert(model)
            assert model.training
            assert same(parts(converted), used)
            assert converted[0].scheme == scheme
            assert model[0].scheme is None
            assert not any(isinstance(m, (FakeQuantize, PreparedWeight, PreparedLinear)) for m in converted.modules())
            model.eval(), converted.eval()
            with torch.no_grad():
                assert torch.equal(model(x), converted(x))
                assert same(parts(model), used)
                assert model[0].operator.margin() == converted[0].operator.margin() == eq.margin(converted)
            for one, other in zip(model[0].solve(x).columns(), converted[0].solve(x).columns(), strict=True):
                assert torch.equal(one, other)
            eq.save(converted, tmp_path / "model.eqz", force=True)
            loaded = eq.load(tmp_path / "model.eqz").eval()
            assert same(parts(loaded), used)
            assert loaded[0].scheme == scheme
            with torch.no_grad():
                assert torch.equal(loaded(x), converted(x))
        assert before.keys() == model.state_dict().keys()
        assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())


@pytest.mark.parametrize("kind", SCHEMES)
def test_a_fresh_model_converts_to_what_quantizing_gives(kind: Any) -> None:
    for make in (classifier, dense_classifier):
        for dtype in (torch.float32, F64):
            model = make(dtype)
            scheme = kind(4, input_bits=3, bias_bits=2, head_bits=5)
            one, other = eq.convert(eq.prepare_qat(model, scheme)), eq.quantize(model, scheme)
            exact = kind is not CAYLEY  # whose α and C are found in another arithmetic
            if exact and (kind is not STRUCTURED or make is classifier):
                assert one.state_dict().keys() == other.state_dict().keys()
                for key, value in other.state_dict().items():
                    assert torch.equal(one.state_dict()[key], value), key
            assert torch.allclose(one[0].weight, other[0].weight, rtol=1e-4, atol=1e-5)


def test_converting_does_not_disturb_training() -> None:
    scheme = eq.Structured(3, input_bits=2, head_bits=2)
    model = learnable(scheme)
    twin = copy.deepcopy(model)
    optimizers = [torch.optim.Adam(m.parameters(), 1e-2) for m in (model, twin)]
    for step in range(6):
        train(model, 1, optimizer=optimizers[0], seed=step)
        eq.convert(model)
        eq.certify(eq.convert(model))
        train(twin, 1, optimizer=optimizers[1], seed=step)
        for (name, one), other in zip(model.state_dict().items(), twin.state_dict().values(), strict=True):
            assert torch.equal(one, other), (step, name)


def test_two_bits_learn_digits_and_converting_costs_nothing() -> None:
    digits = load_data("digits")
    torch.manual_seed(0)
    model = nn.Sequential(eq.MonDEQ(64, 30, rank=10), nn.Linear(30, 10))
    model = eq.prepare_qat(model, eq.Structured(2, input_bits=2, head_bits=2))
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    for _ in range(120):
        rows = torch.randint(0, len(digits.train.x), (128,))
        optimizer.zero_grad()
        loss(model, digits.train.x[rows], digits.train.y[rows]).backward()
        optimizer.step()
    converted = eq.convert(model).eval()
    with torch.no_grad():
        scores = converted(digits.test.x)
        assert torch.equal(scores, model.eval()(digits.test.x))
    assert float((scores.argmax(1) == digits.test.y).float().mean()) > 0.8
    assert eq.certify(converted).margin > 0.19


# Gradients


def leaves(model: nn.Module, layer: eq.MonDEQ, x: Tensor, y: Tensor) -> Tensor:
    """∂loss/∂W̃ for a layer of free W̃, filling the gradients of its other leaves."""
    head = nn.Linear(N, CLASSES).double()
    head.load_state_dict({"weight": parts(model)[3], "bias": parts(model)[4]})
    loss(nn.Sequential(layer, head), x, y).backward()
    recurrent = layer.recurrent
    return recurrent.weight.grad if isinstance(recurrent, Dense) else torch.empty(0)


def close(one: Tensor | None, other: Tensor | None) -> None:
    assert one is not None
    assert other is not None
    assert float(other.abs().max()) > 1e-6, "nothing to compare"
    worst = float((one - other).abs().max() / other.abs().max())
    assert worst < 1e-9, worst


@pytest.mark.parametrize("learn_margin", [False, True])
@pytest.mark.parametrize("bits", [1, 2, 6])
def test_structured_gradients_are_those_of_the_rounded_factors(bits: int, learn_margin: bool) -> None:
    model = classifier(F64, learn_margin=learn_margin)
    model = eq.prepare_qat(model, eq.Structured(bits, skew_bits=4, input_bits=3, bias_bits=2))
    x, y = batch(F64)
    loss(model, x, y).backward()
    codes, linear = eq.convert(model)[0].recurrent, model[0].injection
    assert (codes.A.bits, codes.K.bits) == (bits, 4)
    A, K, m = codes.A.dequantize(), codes.K.dequantize(), float(codes.margin)
    _, U, b, *_ = parts(model)
    exact = eq.MonDEQ.from_factors(A, K / 2, m, U, b, learn_margin=learn_margin)
    leaves(model, exact, x, y)
    found, expected = model[0].recurrent.weights, exact.recurrent
    close(found.A.grad, expected.A.grad)
    close(found.B.grad, expected.B.grad)  # K = B − Bᵀ on both sides
    close(linear.weight.grad, exact.injection.weight.grad)
    close(linear.bias.grad, exact.injection.bias.grad)
    if learn_margin:
        close(found.raw_margin.grad[None], expected.raw_margin.grad[None])


@pytest.mark.parametrize("kind", [ASSEMBLED, COMPENSATED, CAYLEY])
@pytest.mark.parametrize("bits", [3, 8])
def test_gradients_are_those_of_the_rounded_matrix(kind: Any, bits: int) -> None:
    """∂loss/∂W̃ from free weights, then through W(A, B), or C(W) and W̃(C̃), by autograd on the textbook formulas."""
    model = eq.prepare_qat(classifier(F64), kind(bits))
    x, y = batch(F64)
    loss(model, x, y).backward()
    rounded, U, b, *_ = parts(model)
    G = leaves(model, eq.MonDEQ.from_weights(rounded, U, b), x, y)
    weights = copy.deepcopy(model[0].recurrent.weights)
    weights.zero_grad()
    A, B, eye = weights.A, weights.B, torch.eye(N, dtype=F64)
    W = (1 - float(weights.margin)) * eye - A.T @ A + B - B.T
    if kind is CAYLEY:
        alpha = float(model[0].recurrent.alpha)
        codes = eq.convert(model)[0].recurrent.C.dequantize().requires_grad_()
        ((eye - torch.linalg.inv(eye + codes) @ (eye - codes) / alpha) * G).sum().backward()
        F = alpha * (eye - W)
        (torch.linalg.solve(eye + F, eye - F) * codes.grad).sum().backward()
    else:  # the lowering of the diagonal is a constant
        (W * G).sum().backward()
    close(model[0].recurrent.weights.A.grad, A.grad)
    close(model[0].recurrent.weights.B.grad, B.grad)


@pytest.mark.parametrize("granularity", ["tensor", "row"])
def test_a_learned_scale_gets_its_gradient_through_the_equilibrium(granularity: str) -> None:
    model = eq.prepare_qat(classifier(F64), eq.Structured(3, granularity=granularity), learn_scale=True)
    recurrent = model[0].recurrent
    with torch.no_grad():
        recurrent.rounding_A.log_scale -= 0.4  # some entries are clipped
    x, y = batch(F64)
    loss(model, x, y).backward()
    codes = eq.convert(model)[0].recurrent
    _, U, b, *_ = parts(model)
    exact = eq.MonDEQ.from_factors(codes.A.dequantize(), codes.K.dequantize() / 2, float(codes.margin), U, b)
    leaves(model, exact, x, y)
    s = codes.A.scale.double()
    ratio, G = recurrent.weights.A.detach() / s, exact.recurrent.A.grad
    inside = ratio.abs() <= 3
    assert 0 < int(inside.sum()) < inside.numel()
    local = torch.where(inside, codes.A.codes - ratio, codes.A.codes.double()) * G * s
    total, count = (local.sum(1, keepdim=True), N) if granularity == "row" else (local.sum(), RANK * N)
    found = recurrent.rounding_A.log_scale.grad
    assert torch.allclose(found.double(), total / (3 * count) ** 0.5, rtol=1e-5, atol=1e-7)
    close(recurrent.weights.A.grad, G * inside)


# Scales


@pytest.mark.parametrize("optimizer", [{"foreach": False}, {"fused": True}, {"foreach": True}])
def test_scales_follow_the_weights_whatever_writes_them(optimizer: dict[str, bool]) -> None:
    """A fused optimizer counts no version of what it writes."""
    model = learnable(eq.Structured(3, scale="max", input_bits=3, head_bits=3))
    adam = torch.optim.Adam(model.parameters(), 5e-2, **optimizer)
    for seed in range(3):
        train(model, 1, optimizer=adam, seed=seed)
        model(batch()[0])
        layer, head = model
        weights = layer.recurrent.weights
        for rounding, w in (
            (layer.recurrent.rounding_A, weights.A),
            (layer.recurrent.rounding_K, weights.B - weights.B.mT),
            (layer.injection.rounding_weight, layer.injection.weight),
            (head.rounding_weight, head.weight),
        ):
            assert torch.equal(rounding.scale, fit_scale(w, 3, "max"))


@pytest.mark.parametrize("learn", [False, True])
@pytest.mark.parametrize("kind", SCHEMES)
def test_training_resumed_from_a_state_is_the_unbroken_one(kind: Any, learn: bool) -> None:
    scheme = kind(4, input_bits=3, bias_bits=3, head_bits=3)
    model = learnable(scheme, learn=learn)
    adam = torch.optim.SGD(model.parameters(), 1e-2)
    train(model, 4, optimizer=adam)
    state = copy.deepcopy(model.state_dict())
    resumed, again = learnable(scheme, learn=learn), learnable(scheme, learn=learn)
    resumed.load_state_dict(state)
    train(again, 1)
    again.load_state_dict(copy.deepcopy(state), assign=True)
    copied = copy.deepcopy(model)
    for layer in (model[0], resumed[0], again[0], copied[0]):
        layer.forget_tuning()  # the solver's step is no part of the state, and decides on the last bits
    train(model, 4, optimizer=adam, seed=2)
    for other in (resumed, again, copied):
        train(other, 4, optimizer=torch.optim.SGD(other.parameters(), 1e-2), seed=2)
        for name, value in model.state_dict().items():
            assert torch.equal(other.state_dict()[name], value), name


# The guarantee


@pytest.mark.parametrize("learn", [False, True])
@pytest.mark.parametrize("bits", range(1, 9))
def test_a_structured_margin_survives_every_step(bits: int, learn: bool) -> None:
    """However wild the steps; and forward and backward solves converge, which ``strict`` would tell (Theorem 5)."""
    layer = eq.MonDEQ(D, N, rank=RANK, margin=0.25, strict=True, learn_margin=learn)
    model = eq.prepare_qat(layer.double(), eq.Structured(bits, skew_bits=9 - bits), learn_scale=learn)
    for seed in range(5):
        one_step(model, 0.5, seed)
        converted = eq.convert(model)
        m, K = float(model.recurrent.weights.current_margin().detach()), converted.recurrent.K.dequantize()
        assert torch.equal(K, -K.mT)
        assert not learn or m != 0.25
        assert m * (1 - 1e-12) - 1e-13 * (1 + float(converted.weight.norm())) <= eq.margin(converted)
        assert math.isclose(true_margin(converted.weight), m, rel_tol=1e-9, abs_tol=1e-11)  # rank < n
        with torch.no_grad():
            assert model.operator.margin() == eq.margin(converted)


@pytest.mark.parametrize("dtype", [torch.float32, F64])
@pytest.mark.parametrize("bits", [1, 2, 4, 8])
def test_a_compensated_target_is_kept(bits: int, dtype: torch.dtype) -> None:
    for diagonal_bits in (4, 16, 32):
        scheme = eq.Compensated(bits, margin=0.1, diagonal_bits=diagonal_bits)
        model = eq.prepare_qat(eq.MonDEQ(D, N, strict=True).to(dtype), scheme)
        for seed in range(3):
            one_step(model, 0.2, seed)
            W = model.weight.detach()  # as in the next forward pass
            converted = eq.convert(model)
            assert torch.equal(converted.weight, W)
            assert eq.margin(converted) >= 0.1
            assert true_margin(W) >= 0.1


@pytest.mark.parametrize("kind", [eq.Assembled, eq.Cayley])
def test_solves_converge_wherever_a_margin_is_proved(kind: Any) -> None:
    proved = 0
    for seed in range(12):
        torch.manual_seed(seed)
        model = eq.prepare_qat(eq.MonDEQ(D, N, rank=RANK, margin=0.5).double(), kind(2 + seed % 3))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)
            one_step(model, 0.05, seed)
        if eq.margin(eq.convert(model)) > 0.01:
            proved += 1
            model.recurrent()  # fits the scales
            if eq.margin(eq.convert(model)) > 0.01:
                model.strict = True
                model(torch.randn(9, D, dtype=F64)).square().sum().backward()
    assert proved > 2


def test_a_learned_margin_learns() -> None:
    model = eq.prepare_qat(eq.MonDEQ(D, N, learn_margin=True), eq.Structured(2))
    one_step(model)
    assert model.recurrent.weights.raw_margin.grad != 0
    assert eq.convert(model).recurrent.margin != pytest.approx(0.2, abs=1e-4)
