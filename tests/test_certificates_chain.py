"""Displacements, agreement and verdicts: against equilibria found by other means, and along chains of modules."""

from __future__ import annotations

import copy
import importlib
import math
import random
from fractions import Fraction
from operator import mul
from typing import Any

import mpmath
import pytest
import torch
from torch import Tensor, nn

import equipoise as eq
from catalogue import ACTIVATIONS, SCHEME_KINDS
from equipoise.certificates import Certifier, displacement
from equipoise.certificates.sides import DenseSide
from equipoise.layers.chain import chain
from equipoise.layers.linear import QuantizedLinear, quantize_linear
from equipoise.quantization import QuantizedTensor
from problems import equilibrium, exact_rows, matrix

F64 = torch.float64
IDENTITY = eq.LeakyReLU(1.0)


def values(linear: Any, stored: bool) -> tuple[Tensor, Tensor]:
    """(W, b) in float64, as stored or as multiplied by."""
    pairs = (linear.weight, linear.bias)
    if isinstance(linear, QuantizedLinear) and not stored:
        pairs = linear.dense()
    found = [v.dequantize() if isinstance(v, QuantizedTensor) else v.detach().double() for v in pairs]
    return found[0], found[1]


def outputs(model: nn.Module, x: Tensor, stored: bool = True) -> dict[str, Tensor]:
    """What each module gives for ``x``, equilibria by enumeration or Newton's method; dropout is off."""
    found, a = {}, x.double()
    for name, module in chain(model):
        if isinstance(module, eq.MonDEQ):
            (U, b), quantized = values(module.injection, stored), module.scheme is not None
            W = module.recurrent().detach() if stored and quantized else module.weight.detach()
            a = equilibrium(W.double(), a @ U.mT + b, module.activation)
        elif isinstance(module, (nn.Linear, QuantizedLinear)):
            W, b = values(module, stored)
            a = a @ W.mT + b
        elif not isinstance(module, nn.Dropout):
            a = module(a.clone())
        found[name] = a
    return found


def layer(n: int, d: int, dtype: torch.dtype = F64, **options: Any) -> eq.MonDEQ:
    return eq.MonDEQ(d, n, margin=random.choice([0.3, 1.2]), **options).to(dtype)


def random_scheme(bits: list[int]) -> eq.Scheme:
    small = {k: random.choice([None, 3, 8, 32]) for k in ("input_bits", "bias_bits")}
    return random.choice(SCHEME_KINDS)(random.choice(bits), scale="max", **small)


# Displacement of one layer (T3)


@pytest.mark.parametrize("activation", ACTIVATIONS, ids=lambda activation: activation.name)
def test_displacements_bound_the_true_ones(activation: Any) -> None:
    seen = 0
    for i in range(12):
        model, x = layer(4, 3, (torch.float32, F64)[i % 2], activation=activation), torch.randn(6, 3)
        quantized = eq.quantize(model, random_scheme([3, 5, 8, 16, 32]))
        c = eq.certify(quantized, model, x)
        if c.displacement is None:
            assert not c.certified
            continue
        seen += 1
        for stored in (True, False):
            zq, zr = outputs(quantized, x, stored)[""], outputs(model, x, stored)[""]
            true = (zq - zr).norm(dim=1)
            assert bool((c.displacement >= true - 1e-12 * (1 + zr.norm(dim=1))).all())
            assert bool(((c.actual_displacement - true).abs() <= c.actual_error + 1e-12).all())
        W, V = quantized.recurrent().double(), model.weight.detach().double()
        (U, b), (R, s) = values(quantized.injection, True), values(model.injection, True)
        moved = x.double() @ (U - R).mT + (b - s)
        primal = (zq @ (W - V).mT + moved).norm(dim=1) / eq.margin(model)
        dual = (zr @ (W - V).mT + moved).norm(dim=1) / c.margin
        slack = (1e-4 if i % 2 == 0 else 1e-7) * (1 + zq.norm(dim=1) + x.norm(dim=1))
        assert bool((c.displacement <= torch.minimum(primal, dual) * (1 + 1e-7) + slack).all())
    assert seen >= 9


@pytest.mark.parametrize("activation", ACTIVATIONS, ids=lambda activation: activation.name)
def test_tiny_displacements_in_fifty_digits(activation: Any) -> None:
    """Where the rounding of the proof itself is as large as what is bounded."""
    n, x = 3, torch.randn(3, 3, dtype=F64)
    b = torch.zeros(n, dtype=F64)
    for seed, size in enumerate((0.0, 1e-15, 1e-13, 1e-9)):
        W = matrix(n, 0.2, seed)
        reference, other = (
            eq.MonDEQ.from_weights(V, torch.eye(n, dtype=F64), b, activation=activation)
            for V in (W, W + size * torch.randn(n, n, dtype=F64))
        )
        c = eq.certify(other, reference, x)
        rows = (exact_rows(m.weight, x, activation) for m in (other, reference))
        for bound, actual, error, one, two in zip(
            c.displacement, c.actual_displacement, c.actual_error, *rows, strict=True
        ):
            true = mpmath.norm(one - two)
            assert mpmath.mpf(float(bound)) >= true
            assert abs(mpmath.mpf(float(actual)) - true) <= mpmath.mpf(float(error))


@pytest.mark.parametrize(("w", "v"), [(0.5, 0.4), (0.4, 0.5), (-3.0, 0.1)])
def test_displacements_are_reached(w: float, v: float) -> None:
    """σ = id: z = q/(1 − w), and ‖ΔW z̃ + ΔU x + Δb‖/m is the displacement itself."""
    eye, x = torch.eye(2, dtype=F64), torch.randn(5, 2, dtype=F64)
    b = torch.tensor([1.0, -2.0], dtype=F64)
    one = eq.MonDEQ.from_weights(w * eye, 2 * eye, b, activation=IDENTITY)
    two = eq.MonDEQ.from_weights(v * eye, 3 * eye, 2 * b, activation=IDENTITY)
    true = ((2 * x + b) / (1 - w) - (3 * x + 2 * b) / (1 - v)).norm(dim=1)
    c = eq.certify(two, one, x)
    assert torch.allclose(c.displacement, true, rtol=1e-7)
    assert bool((c.displacement >= true * (1 - 1e-14)).all())


def test_nothing_moves_where_nothing_is_quantized() -> None:
    for i in range(16):
        model = nn.Sequential(
            layer(6, 4, (torch.float32, F64)[i % 2], activation=ACTIVATIONS[i % len(ACTIVATIONS)]), nn.Linear(6, 5)
        )
        x = torch.randn(9, 4)
        c = eq.certify(model, copy.deepcopy(model), x)
        assert bool((c.displacement <= 5e-9 * (1 + outputs(model, x)["0"].norm(dim=1))).all())
        assert (c.agreement, c.unproved.tolist()) == (1.0, [])
        assert c.relative_bound < 1e-300
        assert c.delta_norm < 1e-300


# The algebra of a chain: computed points that are off by as much as their bounds allow


def unit(*shape: int) -> Tensor:
    v = torch.randn(*shape, dtype=F64)
    return v / v.norm(dim=-1, keepdim=True)


def doubtful(k: int, count: int = 400) -> tuple[displacement.Trace, Tensor, Tensor]:
    """A trace with errors of size 1, and the exact points of both sides."""
    exact_q, exact_r = torch.randn(2, count, k, dtype=F64) * 3
    size_q, size_r = torch.rand(2, count, 1, dtype=F64)
    q, r = exact_q + size_q * unit(count, k), exact_r + size_r * unit(count, k)
    bounds = size_q[:, 0], size_r[:, 0], (exact_q - exact_r).norm(dim=1), (q - exact_r).norm(dim=1)
    return displacement.Trace(q, r, *(bound * (1 + 1e-13) for bound in bounds)), exact_q, exact_r


def check_trace(trace: displacement.Trace, exact_q: Tensor, exact_r: Tensor) -> Tensor:
    """No bound is below the truth; returns the largest ratio of truth to bound, each."""
    truths = (
        (trace.quantized - exact_q).norm(dim=1),
        (trace.reference - exact_r).norm(dim=1),
        (exact_q - exact_r).norm(dim=1),
        (trace.quantized - exact_r).norm(dim=1),
    )
    ratios = torch.stack([truth / bound for truth, bound in zip(truths, trace[2:6], strict=True)])
    assert float(ratios.max()) <= 1 + 1e-9
    return ratios.amax(1)


@pytest.mark.parametrize(("k", "m"), [(1, 1), (3, 2), (2, 4)])
def test_linear_modules_carry_every_error(k: int, m: int) -> None:
    for bits in (None, 1, 4, 32):
        one, two = nn.Linear(k, m).to((torch.float32, F64)[m % 2]), nn.Linear(k, m).double()
        head = nn.Sequential(layer(k, k), one)
        quantized = eq.quantize(head, eq.Structured(4, head_bits=bits))[1] if bits else one
        if bits == 4:
            scale = quantized.weight.scale.double() * (1 + 1e-9)
            quantized.weight = QuantizedTensor.from_codes(quantized.weight.codes, scale, bits)
        before, exact_q, exact_r = doubtful(k)
        for other in (two, copy.deepcopy(one)):
            after = displacement.linear_trace(quantized, other, before)
            (R, s), ratios = values(other, True), []
            for stored in (True, False):
                V, c = values(quantized, stored)
                ratios.append(check_trace(after, exact_q @ V.mT + c, exact_r @ R.mT + s))
            assert k > 1 or bool((torch.stack(ratios).amax(0) > 0.999).all()), "not reached in one dimension"


def fractions(value: Any, used: Tensor | None = None) -> list[list[Fraction]]:
    """The rows of a matrix or vector exactly, of codes without rounding; or those of ``used``."""
    if used is None and isinstance(value, QuantizedTensor):
        scales = value.scale.double().expand(value.codes.shape)
        pairs = zip(*(torch.atleast_2d(t).tolist() for t in (value.codes, scales)), strict=True)
        return [[int(c) * Fraction(s) for c, s in zip(*pair, strict=True)] for pair in pairs]
    rows = torch.atleast_2d((value if used is None else used).detach().double()).tolist()
    return [[Fraction(entry) for entry in row] for row in rows]


def apart(a: list[Fraction], b: list[Fraction]) -> Fraction:
    """The squared distance."""
    return sum((x - y) ** 2 for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize(("bits", "bias_bits"), [(None, None), (32, None), (None, 32), (8, 8)])
@pytest.mark.parametrize("dtype", [torch.float32, F64])
def test_linear_modules_count_every_rounding(bits: int | None, bias_bits: int | None, dtype: torch.dtype) -> None:
    """Exact inputs, exact arithmetic: what is left is rounding, of storage and of products."""
    for k, size in ((1, 1.0), (1, 0.0), (20, 1.0)):
        one = nn.Linear(k, 3).to(dtype)
        coded = quantize_linear(one, eq.Assembled(4), bits, bias_bits)
        if bits == 8:
            coded.weight = QuantizedTensor.from_codes(coded.weight.codes, coded.weight.scale.double() * 1.1, 8)
        twin = nn.Linear(k, 3).double()
        with torch.no_grad():
            twin.weight.copy_(values(coded, True)[0])
            twin.bias.copy_(values(coded, True)[1])
        x = size * torch.randn(12, k, dtype=F64)
        after = displacement.linear_trace(coded, twin, displacement.start(x))
        dense = coded.dense() if isinstance(coded, QuantizedLinear) else (None, None)
        for used in ((None, None), dense):
            V, (c,) = (fractions(v, u) for v, u in zip((coded.weight, coded.bias), used, strict=True))
            R, (s,) = fractions(twin.weight), fractions(twin.bias)
            for i, a in enumerate(fractions(x)):
                q, r = ([sum(map(mul, row, a)) + t for row, t in zip(*m, strict=True)] for m in ((V, c), (R, s)))
                (out_q,), (out_r,) = fractions(after.quantized[i]), fractions(after.reference[i])
                truths = apart(out_q, q), apart(out_r, r), apart(q, r), apart(out_q, r)
                for truth, bound in zip(truths, after[2:6], strict=True):
                    assert truth <= Fraction(float(bound[i])) ** 2


@pytest.mark.parametrize(("n", "d"), [(1, 1), (3, 2)])
def test_equilibria_carry_every_error(n: int, d: int) -> None:
    for activation in (IDENTITY, *ACTIVATIONS) if n > 1 else (IDENTITY,):
        one, two = (
            eq.MonDEQ.from_weights(W, torch.randn(n, d).double(), torch.randn(n).double(), activation=activation)
            for W in (matrix(n, 0.4, 1), matrix(n, 0.7, 2))
        )
        before, exact_q, exact_r = doubtful(d, 60 if n > 1 else 4000)
        sides = [DenseSide.of(side, side.operator) for side in (one, two)]
        after = displacement.equilibrium_trace(*sides, before, {}, "")
        exact = [
            equilibrium(side.weight, a @ side.input_weight.mT + side.bias, activation).detach()
            for side, a in ((one, exact_q), (two, exact_r))
        ]
        ratios = check_trace(after, *exact)
        assert n > 1 or bool((ratios[[0, 1, 3]] > 0.99).all()), "not reached in one dimension"


def test_modules_without_weights_carry_every_error() -> None:
    modules = [nn.Flatten(), nn.Identity(), nn.Dropout(0.9), nn.ReLU(inplace=True), nn.Tanh(), nn.Sigmoid()]
    modules += [nn.Hardtanh(-2.0, 0.5), nn.Softplus(), nn.Softplus(beta=7.0), nn.Softplus(0.2, 1.0), nn.ReLU6()]
    for module in modules:  # in training mode, as modules come
        before, exact_q, exact_r = doubtful(2, 2000)
        after = displacement.lipschitz_one_trace(module, before)
        module.eval()
        check_trace(after, module(exact_q.clone()), module(exact_r.clone()))
        assert bool((after.displacement <= before.displacement + (5 if module is modules[9] else 1e-7)).all())


def test_torch_softplus_is_not_lipschitz_where_it_turns_into_the_identity() -> None:
    for threshold in (1.0, 5.0, 20.0):
        one = torch.ones(1, 1, dtype=F64)
        last = eq.MonDEQ.from_weights(0.5 * one, one, one[0])
        steps = [nn.Sequential(nn.Linear(1, 1).double(), nn.Softplus(2.0, threshold), last) for _ in range(2)]
        for model, side in zip(steps, (1, -1), strict=True):
            nn.init.zeros_(model[0].weight)
            nn.init.constant_(model[0].bias, threshold / 2 * (1 + side * 1e-13))
        x = torch.zeros(1, 1)
        true = float((outputs(steps[0], x)["2"] - outputs(steps[1], x)["2"]).norm())
        fall = math.log1p(math.exp(-threshold)) / 2
        assert fall < true <= float(eq.certify(*steps, x).displacement)


# Chains


def network(dtype: torch.dtype) -> nn.Sequential:
    between = random.choice([nn.Tanh(), nn.Hardtanh(-0.5, 0.8), nn.Softplus(), nn.ReLU(inplace=True)])
    first = layer(4, 4, dtype, activation=random.choice(ACTIVATIONS))
    inner = nn.Sequential(nn.Dropout(0.5), between, nn.Linear(4, 3)).to(dtype)
    front = nn.Sequential(nn.Flatten(), nn.Linear(6, 4), nn.ReLU(inplace=True)).to(dtype)
    return nn.Sequential(*front, first, inner, layer(4, 3, dtype), nn.Dropout(0.5), nn.Linear(4, 3).to(dtype))


def test_two_layer_chains_bound_every_displacement_and_class() -> None:
    shares = []
    for i in range(24):
        dtype, x = (torch.float32, F64)[i % 2], torch.randn(20, 2, 3)
        reference = network(dtype)
        model = eq.quantize(reference, eq.Structured(random.choice([3, 6, 12]), scale="max", head_bits=4 + i % 12))
        if i % 4 == 0:  # anything of the same shape is a reference
            for module in (reference[1], reference[4][2]):
                nn.init.normal_(module.weight, std=0.3)
        c = eq.certify(model, reference, x)
        if not c.certified:
            continue
        assert c.layers[0].relative_bound is None or i % 4
        assert c.layers[1].relative_bound is None
        assert c.relative_bound is None
        ours, theirs = outputs(model, x), outputs(reference, x)
        for name, part in zip(("3", "5"), c.layers, strict=True):
            assert bool((part.displacement >= (ours[name] - theirs[name]).norm(dim=1) - 1e-11).all())
        assert torch.equal(c.displacement, c.layers[1].displacement)
        same = ours["7"].argmax(1) == theirs["7"].argmax(1)
        proved = torch.ones(20, dtype=torch.bool)
        proved[c.unproved] = False
        assert bool(same[proved].all())
        assert c.agreement == float(proved.double().mean()) <= float(same.double().mean())
        shares.append(c.agreement)
    assert max(shares) == 1
    assert min(shares) < 0.9


def test_the_summary_is_the_weakest_of_the_layers() -> None:
    skew = torch.tensor([[0.0, 50.0], [-50.0, 0.0]], dtype=F64)
    eye, b = torch.eye(2, dtype=F64), torch.zeros(2, dtype=F64)
    wild, narrow = (eq.MonDEQ.from_weights(W, eye, b) for W in (skew, 0.9 * eye))
    model = nn.Sequential(wild, nn.Tanh(), narrow)
    c = eq.certify(eq.quantize(model, eq.Assembled(8)), model)
    parts = {name: [getattr(part, name) for part in c.layers] for name in vars(c)}
    assert c.margin == min(parts["margin"]) == pytest.approx(0.1)
    for name in ("lipschitz", "condition", "weight_condition", "rate", "steps", "inexact", "delta_norm"):
        assert getattr(c, name) == max(parts[name])
    assert c.closed_rates == c.layers[0].closed_rates
    assert c.closed_rates["peaceman_rachford"] > 0.9
    assert c.sufficient is all(parts["sufficient"])
    assert c.predeployment is all(parts["predeployment"])
    wild.solver = eq.Anderson()
    mixed = eq.certify(model, model)
    assert (mixed.rate, mixed.steps, mixed.solver, mixed.predeployment) == (None, None, "Anderson", None)
    bad = eq.MonDEQ.from_weights(skew + 3 * eye, eye, b, check=False)
    broken = eq.certify(nn.Sequential(narrow, bad))
    assert (broken.certified, broken.verdict, broken.condition) == (False, "unknown", None)
    assert [part.verdict for part in broken.layers] == ["certified", "unknown"]


def test_a_certifier_says_the_same_and_cannot_be_reached(monkeypatch: pytest.MonkeyPatch) -> None:
    reference, x = network(F64), torch.randn(11, 2, 3)
    models = [eq.quantize(reference, eq.Structured(bits)) for bits in (3, 6)]
    whole, again = [eq.certify(model, reference, x) for model in models], Certifier(reference, x)
    monkeypatch.setattr(importlib.import_module("equipoise.certificates.certify"), "CHUNK", 4)
    parts, kept = [eq.certify(model, reference, x) for model in models], Certifier(reference, x)
    x.fill_(math.nan)
    nn.init.zeros_(reference[1].weight)
    for model, c, part in zip(models, whole, parts, strict=True):
        for other in (part, again(model), kept(model)):
            assert torch.allclose(other.displacement, c.displacement, rtol=1e-6, atol=1e-8)
            assert (other.agreement, other.unproved.tolist()) == (c.agreement, c.unproved.tolist())


# Agreement


@pytest.mark.parametrize(("gap", "share"), [(1 + 1e-6, 1.0), (1 - 1e-6, 0.0)])
def test_agreement_at_its_limit(gap: float, share: float) -> None:
    """Scores ±v z + c: proved exactly where their gap exceeds 2v times the displacement, which is reached here."""
    x, one = torch.tensor([[1.0]], dtype=F64), torch.ones(1, 1, dtype=F64)
    reference, model = (
        nn.Sequential(eq.MonDEQ.from_weights(w * one, one, 0 * x[0], activation=IDENTITY), nn.Linear(1, 2).double())
        for w in (0.5, 0.25)
    )
    z, moved, v = 1 / 0.75, 2 - 1 / 0.75, 3.0
    for head in (reference[1], model[1]):
        nn.init.zeros_(head.bias)
        with torch.no_grad():
            head.weight.copy_(torch.tensor([[v], [-v]]))
            head.bias[1] = 2 * v * z - 2 * v * moved * gap
    c = eq.certify(model, reference, x)
    assert (c.agreement, c.unproved.tolist()) == (share, [] if share else [0])
