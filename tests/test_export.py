"""Integer programs: the emulation against exact arithmetic and the proved bounds."""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import equipoise as eq
from equipoise.data import Preprocessing
from equipoise.export import Shipped, export
from equipoise.export.affine import integer_affine
from equipoise.export.boxes import box_of, farthest
from equipoise.export.build import Options, build, reals
from equipoise.export.cayley import plan_cayley
from equipoise.export.factored import FactoredMap, FactoredProgram, plan_factored
from equipoise.export.fixedpoint import fit_multipliers, requantize
from equipoise.export.grid import grid_of
from equipoise.export.network import code_linear
from equipoise.export.plan import Iterates
from shipping import FEATURES, INPUTS, PIXELS, exact, network, pixels, quantized

SCHEMES: dict[str, eq.Scheme] = {
    "cayley8": eq.Cayley(bits=8, input_bits=8, head_bits=8),
    "cayley4": eq.Cayley(bits=4, input_bits=3, head_bits=4, bias_bits=8),
    "cayley6-float-u": eq.Cayley(bits=6),
}
FACTORED: dict[str, eq.Scheme] = {
    "structured1": eq.Structured(bits=1, input_bits=1, head_bits=8),
    "structured2-rows": eq.Structured(bits=2, input_bits=2, head_bits=2, granularity="row", bias_bits=8),
    "structured5-float-u": eq.Structured(bits=5),
    "structured8": eq.Structured(bits=8, input_bits=8, head_bits=8),
}


def ship(model: nn.Module, reference: nn.Module | None = None, **options: Any) -> Shipped:
    calibration = options.pop("calibration", None)
    return build(model, reference, calibration, Options(**options))


def within(shipped: Shipped, reference: nn.Module, raw: np.ndarray) -> float:
    """Assert the proved bounds on every input; the worst error as a share of its bound."""
    x = shipped.grid.to_real(raw)
    z, scores, status = reals(shipped, x)
    truth, true_scores, doubt = exact(reference, x)
    certificate = shipped.certificate
    assert certificate.error_bound is not None
    assert certificate.score_error_bound is not None
    ok = status == 0
    assert ok.any()
    error = np.linalg.norm(z - truth, axis=1) - doubt
    assert (error[ok] <= certificate.error_bound).all()
    if scores is not None:
        assert (np.abs(scores - true_scores)[ok].max(axis=1) <= certificate.score_error_bound + 10 * doubt[ok]).all()
    return float(error[ok].max() / certificate.error_bound)


# Fixed point


@given(st.lists(st.integers(-(2**61), 2**61), min_size=1, max_size=8), st.integers(1, 46))
def test_requantizing_is_rounding_to_nearest_halves_away_from_zero(values: list[int], shift: int) -> None:
    found = requantize(np.array(values, dtype=np.int64), shift).tolist()
    for value, result in zip(values, found, strict=True):
        exactly = Fraction(value, 2**shift)
        assert abs(result - exactly) <= Fraction(1, 2)
        assert abs(result - exactly) < Fraction(1, 2) or abs(result) > abs(exactly)


@given(st.lists(st.floats(-1e3, 1e3), min_size=1, max_size=6), st.integers(0, 2**31 - 1))
def test_multipliers_fit_and_their_errors_are_exact(factors: list[float], gain: int) -> None:
    fitted = fit_multipliers([Fraction(f) for f in factors], (len(factors),), [gain] * len(factors))
    for factor, value, error in zip(factors, fitted.values.tolist(), fitted.errors.tolist(), strict=True):
        assert abs(value) < 2**31
        assert abs(value * gain) <= 2**61 + gain
        assert abs(Fraction(factor) - Fraction(value, 2**fitted.shift)) <= Fraction(error) if error else True
        assert error <= 2.0**-fitted.shift


@pytest.mark.parametrize("bits", [1, 2, 5, 8, 12])
@pytest.mark.parametrize("channels", [1, 3])
def test_an_integer_affine_map_stays_within_its_errors_and_its_range(bits: int, channels: int) -> None:
    torch.manual_seed(bits)
    linear = eq.quantize(eq.MonDEQ(12, 7), eq.Cayley(bits=8, input_bits=bits, bias_bits=None)).injection  # type: ignore[union-attr]
    coded = code_linear(linear, 255, "it")
    steps = tuple(Fraction(k + 1, 300) for k in range(channels))
    offsets = tuple(Fraction(-k, 7) for k in range(channels))
    factor = Fraction(2.0**12)
    affine = integer_affine(coded, factor, (0, 255), steps, offsets, "it")
    raw = np.random.default_rng(0).integers(0, 256, (40, 12))
    found = affine(raw)
    assert (found >= affine.least).all()
    assert (found <= affine.most).all()
    for row, image in zip(found, raw, strict=True):
        x = [steps[j // (12 // channels)] * int(v) + offsets[j // (12 // channels)] for j, v in enumerate(image)]
        for i, value in enumerate(row):
            total = sum(
                (coded.weight.scales[i] * int(k) * v for k, v in zip(coded.weight.codes[i], x, strict=True)),
                Fraction(0),
            )
            assert abs(factor * (total + coded.bias[i]) - int(value)) <= Fraction(affine.errors[i])


def test_the_range_of_an_affine_map_is_attained() -> None:
    torch.manual_seed(3)
    coded = code_linear(eq.quantize(eq.MonDEQ(9, 5), eq.Cayley(bits=8, input_bits=4)).injection, 15, "it")  # type: ignore[union-attr]
    affine = integer_affine(coded, Fraction(1000), (0, 15), (Fraction(1),), (Fraction(0),), "it")
    best = np.where(coded.weight.codes > 0, 15, 0)
    assert (np.diag(affine(best)) == affine.most).all()


# Boxes


@given(st.integers(0, 50))
def test_boxes_bound_what_they_should(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    M, b = torch.randn(6, INPUTS, generator=generator).double(), torch.randn(6, generator=generator).double()
    box, _ = box_of(grid_of(INPUTS, PIXELS, None, 16))
    t = torch.rand(200, INPUTS, generator=generator).double().mul(2).sub(1)
    t[100:] = t[100:].sign()
    values = (box.center + t * box.half) @ M.T + b
    assert (values.abs() <= box.entries(M, b)).all()
    assert float(values.norm(dim=1).max()) <= box.norm(M, b)
    assert float(values.clamp(min=0).norm(dim=1).max()) <= box.positive(M, b)
    assert float(((t * box.half) @ M.T).norm(dim=1).max()) <= farthest(M, box.half)


def test_a_box_bound_is_met_where_there_is_a_closed_form() -> None:
    half = torch.full((4,), 0.5, dtype=torch.float64)
    assert farthest(torch.eye(4, dtype=torch.float64), half) == pytest.approx(1.0, rel=1e-6)
    assert farthest(torch.ones(1, 4, dtype=torch.float64), half) == pytest.approx(2.0, rel=1e-6)


# Programs against exact arithmetic


def dot(row: Sequence[Fraction], x: Sequence[Fraction | int]) -> Fraction:
    return sum((a * b for a, b in zip(row, x, strict=True)), Fraction(0))


@pytest.mark.parametrize("bits", [8, 16])
@pytest.mark.parametrize("name", [*SCHEMES, *FACTORED])
def test_the_error_bound_holds_on_every_kind_of_input(name: str, bits: int) -> None:
    model = network()
    q = quantized(model, {**SCHEMES, **FACTORED}[name])
    raw = pixels(60)
    assert 0.001 < within(ship(q, activation_bits=bits), q, raw) < 1
    assert within(ship(q, model, activation_bits=bits), model, raw) < 1


@pytest.mark.parametrize("bits", [8, 16])
@pytest.mark.parametrize("scheme", [SCHEMES["cayley8"], FACTORED["structured2-rows"]], ids=["cayley", "factored"])
def test_with_calibration_the_bound_holds_wherever_the_program_answers(scheme: eq.Scheme, bits: int) -> None:
    q = quantized(network(2), scheme)
    grid = grid_of(INPUTS, PIXELS, None, bits)
    calm = np.random.default_rng(5).integers(60, 100, (50, INPUTS))
    shipped = ship(q, activation_bits=bits, calibration=torch.from_numpy(grid.to_real(calm)))
    raw = np.concatenate([calm, pixels(60)])
    _, _, status = shipped.program(raw)
    assert (status[:50] == 0).all()
    assert (status == 2).any()
    within(shipped, q, raw)
    assert shipped.certificate.rounding_bound < ship(q, activation_bits=bits).certificate.rounding_bound  # type: ignore[operator]


@pytest.mark.parametrize("scheme", [SCHEMES["cayley8"], FACTORED["structured1"]], ids=["cayley", "factored"])
def test_without_calibration_no_input_leaves_the_range(scheme: eq.Scheme) -> None:
    shipped = ship(quantized(network(2), scheme), activation_bits=8)
    assert not shipped.program.checked
    assert (shipped.program(pixels(300))[2] == 0).all()


@pytest.mark.parametrize("bits", [8, 16])
@pytest.mark.parametrize("name", SCHEMES)
def test_one_step_loses_no_more_than_is_proved(name: str, bits: int) -> None:
    """The integer step against the same step in rationals, from states of any kind."""
    layer: Any = quantized(network(), SCHEMES[name])[0]  # type: ignore[index]
    grid = grid_of(INPUTS, PIXELS, None, bits)
    injection = code_linear(layer.injection, 255, "it")
    plan = plan_cayley(layer.recurrent, injection, grid, box_of(grid)[0], Iterates(bits))
    program: Any = plan.program
    C = [[s * int(k) for k in row] for s, row in zip(program.C.scales, program.C.codes, strict=True)]
    U = [[s * int(k) for k in row] for s, row in zip(injection.weight.scales, injection.weight.codes, strict=True)]
    alpha, unit = Fraction(float(layer.recurrent.alpha)), Fraction(plan.unit)
    rng, worst = np.random.default_rng(0), 0.0
    for raw in pixels(4):
        x = [grid.steps[0] * int(v) + grid.offsets[0] for v in raw]
        q = [
            alpha * (b + sum(u * v for u, v in zip(row, x, strict=True)))
            for b, row in zip(injection.bias, U, strict=True)
        ]
        c = [own + sum(k * v for k, v in zip(row, q, strict=True)) for own, row in zip(q, C, strict=True)]
        p = program.injection(raw[None])
        v = rng.integers(0, program.limit // 2, FEATURES)
        stored = requantize(program.start_own * p + program.start_cross * (p @ program.C.codes.T), program.start_shift)
        t = program.multipliers * (v @ program.C.codes.T) + (stored << (program.shift - program.fraction))
        step = requantize(t, program.shift)[0]
        exactly = [
            own + sum(k * int(w) * unit for k, w in zip(row, v, strict=True)) for own, row in zip(c, C, strict=True)
        ]
        lost = sum(float(e - unit * int(s)) ** 2 for e, s in zip(exactly, step, strict=True)) ** 0.5
        worst = max(worst, lost / plan.iteration.step_error)
    assert 0.3 < worst <= 1


@pytest.mark.parametrize("bits", [8, 16])
@pytest.mark.parametrize("name", FACTORED)
def test_one_factored_step_loses_no_more_than_is_proved(name: str, bits: int) -> None:
    layer: Any = quantized(network(), FACTORED[name])[0]  # type: ignore[index]
    grid = grid_of(INPUTS, PIXELS, None, bits)
    injection = code_linear(layer.injection, 255, "it")
    plan = plan_factored(layer.recurrent, injection, grid, box_of(grid)[0], Iterates(bits))
    program: Any = plan.program
    A = [[s * int(k) for k in row] for s, row in zip(program.A.scales, program.A.codes, strict=True)]
    K = [[Fraction(float(layer.recurrent.K.scale)) * int(k) for k in row] for row in program.K]
    U = [[s * int(k) for k in row] for s, row in zip(injection.weight.scales, injection.weight.codes, strict=True)]
    margin, unit = Fraction(float(layer.recurrent.margin)), Fraction(plan.unit)
    alpha = Fraction(FactoredMap.of(layer.recurrent).alpha)
    rng, worst = np.random.default_rng(0), 0.0
    for raw in pixels(4):
        x = [grid.steps[0] * int(v) + grid.offsets[0] for v in raw]
        z = rng.integers(0, program.limit // 2, FEATURES).tolist()
        y = [dot(row, z) for row in A]
        pulled = [sum((A[r][i] * y[r] for r in range(len(A))), Fraction(0)) for i in range(FEATURES)]
        q = [b + dot(row, x) for b, row in zip(injection.bias, U, strict=True)]
        exactly = [
            max(
                (1 - alpha * margin) * z[i] * unit + alpha * unit * (dot(K[i], z) - pulled[i]) + alpha * q[i],
                Fraction(0),
            )
            for i in range(FEATURES)
        ]
        found = one_factored_step(program, program.injection(raw[None])[0], np.array(z))
        lost = sum(float(e - unit * int(s)) ** 2 for e, s in zip(exactly, found, strict=True)) ** 0.5
        worst = max(worst, lost / plan.iteration.step_error)
    assert 0.1 < worst <= 1


def one_factored_step(program: FactoredProgram, p: np.ndarray, z: np.ndarray) -> list[int]:
    y = requantize(program.pull * (program.A.codes @ z), program.pull_shift)
    t = program.own * z + program.skew * (program.K @ z)
    t = (
        t
        + p * 2 ** (program.shift - program.fraction)
        - (program.A.codes.T @ y) * 2 ** (program.shift - program.pull_fraction)
    )
    return requantize(np.maximum(t, 0), program.shift).tolist()


@pytest.mark.parametrize("bits", [8, 16])
def test_more_steps_never_loosen_the_bound(bits: int) -> None:
    q = quantized(network(), SCHEMES["cayley8"])
    floor = ship(q, activation_bits=bits).certificate.rounding_bound
    assert floor is not None
    loose, tight = (ship(q, activation_bits=bits, tol=factor * floor).certificate for factor in (1.5, 1.001))
    assert loose.steps < tight.steps
    for found, factor in ((loose, 1.5), (tight, 1.001)):
        assert found.rounding_bound + found.truncation_bound <= factor * floor  # type: ignore[operator]
    with pytest.raises(eq.OptionError, match="more steps do not lower that"):
        ship(q, activation_bits=bits, tol=0.999 * floor)


def test_a_layer_alone_answers_with_its_equilibrium() -> None:
    q = quantized(network(head=False), SCHEMES["cayley6-float-u"])
    shipped = ship(q)
    z, scores, _ = reals(shipped, shipped.grid.to_real(pixels(10)))
    assert scores is None
    assert z.shape == (22, FEATURES)
    assert within(shipped, q, pixels(10)) < 1


def test_inputs_without_preprocessing_are_rounded_to_the_declared_range() -> None:
    q = quantized(network(preprocessing=None), SCHEMES["cayley8"])
    shipped = ship(q, input_range=(-1.5, 2.0))
    x = np.random.default_rng(0).uniform(-1.5, 2.0, (100, INPUTS))
    z, _, _ = reals(shipped, x)
    truth, _, doubt = exact(q, x)
    assert (np.linalg.norm(z - truth, axis=1) - doubt <= shipped.certificate.error_bound).all()
    with pytest.raises(eq.InputError, match="outside the declared range"):
        reals(shipped, x + 1)
    with pytest.raises(eq.InputError, match="outside"):
        reals(shipped, np.full((1, INPUTS), np.nan))


def test_channels_have_their_own_mean_and_deviation() -> None:
    colour = Preprocessing(mean=(0.1, 0.5), std=(0.2, 0.3), scale=255.0, input_shape=(2, 10))
    q = quantized(network(preprocessing=colour), SCHEMES["cayley8"])
    shipped = ship(q)
    raw = pixels(30)
    x = colour(torch.from_numpy(raw.astype(np.uint8)).view(-1, 2, 10)).numpy()
    assert (shipped.grid.to_raw(x) == raw).all()
    z, _, _ = reals(shipped, x)
    truth, _, doubt = exact(q, x)
    assert (np.linalg.norm(z - truth, axis=1) - doubt <= shipped.certificate.error_bound).all()


# What is refused


def test_bad_requests_are_refused_with_their_reason(tmp_path: Path) -> None:
    model = network()
    q = quantized(model, SCHEMES["cayley8"])
    bare = quantized(network(preprocessing=None), SCHEMES["cayley8"])
    for wrong, error, words in (
        (lambda: ship(bare), eq.OptionError, "--input-range LO HI"),
        (lambda: ship(bare, input_range=(1.0, 1.0)), eq.OptionError, "LO < HI"),
        (lambda: ship(bare, input_range=(0.0, float("inf"))), eq.OptionError, "finite"),
        (lambda: ship(q, input_range=(0.0, 0.5)), eq.OptionError, "integers"),
        (lambda: ship(q, tol=1e-9), eq.OptionError, r"rounding of this grid alone is bounded by \d"),
        (lambda: ship(q, tol=-1.0), eq.OptionError, "positive"),
        (lambda: ship(q, activation_bits=7), eq.OptionError, "8 and 16"),
        (lambda: ship(q, mode="other"), eq.OptionError, "cayley or factored"),
        (lambda: ship(q, mode="factored"), eq.StructureError, "--scheme structured"),
        (lambda: ship(model), eq.StructureError, "--scheme cayley"),
        (lambda: ship(eq.quantize(model, eq.Assembled(bits=8))), eq.StructureError, "assembled"),
        (lambda: ship(quantized(model, eq.Cayley(bits=9))), eq.OptionError, "9 bits"),
        (lambda: ship(quantized(model, eq.Cayley(bits=8, input_bits=32))), eq.OptionError, "32 bits"),
        (lambda: ship(q, network(features=13)), eq.StructureError, "sizes"),
        (lambda: ship(nn.Sequential(*q, nn.Linear(4, 4))), eq.StructureError, "Linear at position '2'"),
        (lambda: export(q, tmp_path / "x", "rust"), eq.OptionError, "rust"),
        (lambda: ship(q, calibration=torch.zeros(3, 5)), eq.InputError, "calibration"),
    ):
        with pytest.raises(error, match=words):
            wrong()  # type: ignore[no-untyped-call]
    smooth = eq.quantize(nn.Sequential(eq.MonDEQ(20, 6, activation="tanh")), eq.Cayley(bits=8))
    with pytest.raises(eq.StructureError, match="Tanh"):
        ship(smooth)


def lost_network() -> nn.Module:
    """A Cayley network whose codes have norm above 1: nothing is certified."""
    torch.manual_seed(0)
    q: Any = quantized(network(), eq.Cayley(bits=8, input_bits=8, head_bits=8))
    q[0].recurrent.C.scale.mul_(3.0)
    return q


def test_what_is_not_certified_is_refused_or_marked(tmp_path: Path) -> None:
    q = lost_network()
    assert eq.margin(q) <= 0
    with pytest.raises(eq.NotWellPosedError, match="--uncertified"):
        export(q, tmp_path / "refused")
    assert not (tmp_path / "refused").exists()
    certificate = export(q, tmp_path / "marked", uncertified=True)
    assert not certificate.certified
    assert certificate.error_bound is None
    for name in ("eqnet.c", "eqnet.h"):
        assert "UNCERTIFIED" in (tmp_path / "marked" / name).read_text()
    assert '"certified": false' in (tmp_path / "marked" / "certificate.json").read_text()


def test_an_existing_folder_is_left_alone_without_force(tmp_path: Path) -> None:
    q = quantized(network(), SCHEMES["cayley8"])
    (tmp_path / "empty").mkdir()
    export(q, tmp_path / "empty")
    with pytest.raises(eq.OutputError, match="--force"):
        export(q, tmp_path / "empty")
    export(q, tmp_path / "empty", force=True)
    (tmp_path / "file").write_text("mine")
    with pytest.raises(eq.OutputError, match="it is a file"):
        export(q, tmp_path / "file", force=True)
    with pytest.raises(eq.OutputError, match="does not exist"):
        export(q, tmp_path / "no" / "where")


def test_the_same_model_gives_the_same_bytes(tmp_path: Path) -> None:
    q = quantized(network(), SCHEMES["cayley4"])
    for name in ("one", "two"):
        export(q, tmp_path / name)
    for file in sorted((tmp_path / "one").iterdir()):
        assert file.read_bytes() == (tmp_path / "two" / file.name).read_bytes()
