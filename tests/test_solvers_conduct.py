"""How solvers behave: company in a batch, wild samples, budgets, stopping rules, options, and what a step costs."""

from __future__ import annotations

import dataclasses
import math
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor

import equipoise as eq
from catalogue import SOLVERS, VARIANTS
from equipoise.activations import Activation
from equipoise.bench.contenders import RACING as REGISTRY
from equipoise.errors import ConvergenceError, ConvergenceWarning, OptionError
from equipoise.solvers import problem
from equipoise.solvers.accelerated import Accelerated
from problems import equilibrium, matrix
from test_solvers import layer_of, name

PROVED = [solver for solver in SOLVERS if not isinstance(solver, eq.Picard)]


def relative(found: Tensor, expected: Tensor) -> float:
    """The worst row's relative distance; rows that should be zero and are count as right."""
    found, expected = found.double(), expected.double()
    return float(((found - expected).norm(dim=1) / expected.norm(dim=1).clamp_min(1e-300)).max())


# Company in a batch


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["f32", "f64"])
@pytest.mark.parametrize("solver", PROVED + VARIANTS, ids=name)
@pytest.mark.parametrize("activation", [eq.ReLU(), eq.SoftThreshold()], ids=str)
def test_a_sample_does_not_depend_on_its_batch(activation: Activation, solver: eq.Solver, dtype: torch.dtype) -> None:
    layer = layer_of(matrix(8, 0.8, 3, gain=0.2).to(dtype), activation)
    q = torch.randn(12, 8, dtype=dtype) * torch.logspace(-2, 2, 12, dtype=dtype)[:, None]
    tol, allowed = (1e-4, 1e-6) if dtype == torch.float32 else (1e-9, 1e-12)
    if isinstance(solver, Accelerated):
        allowed *= 5  # mixing magnifies what rounding makes of another batch size
    together = layer.solve(q, solver=solver, tol=tol)
    alone = [layer.solve(row[None], solver=solver, tol=tol) for row in q]
    assert relative(torch.cat([s.value for s in alone]), together.value) <= allowed
    assert torch.equal(torch.cat([s.converged for s in alone]), together.converged)
    assert bool(together.converged.all())


def test_a_large_batch_is_worked_off_in_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    layer = layer_of(matrix(5, 0.4, 3), eq.ReLU())
    q = torch.randn(150, 5, dtype=torch.float64)
    whole = layer.solve(q, tol=1e-9)
    monkeypatch.setattr(problem, "CHUNK", 1)
    parts = layer.solve(q, tol=1e-9)
    for field in ("value", "converged", "steps", "error_bound"):
        torch.testing.assert_close(getattr(parts, field), getattr(whole, field), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("wild", [1e6, 1e18, 1e25, 1e30])
@pytest.mark.parametrize("solver", PROVED, ids=name)
def test_a_wild_sample_leaves_the_others_alone(solver: eq.Solver, wild: float) -> None:
    W = matrix(6, 0.5, 4, gain=0.3).float()
    layer = layer_of(W, eq.ReLU())
    q = torch.randn(5, 6)
    bad = q.clone()
    bad[2] *= wild
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        found = layer.solve(bad, solver=solver, tol=1e-4)
    calm = layer.solve(q, solver=solver, tol=1e-4)
    others = [0, 1, 3, 4]
    assert relative(found.value[others], calm.value[others]) <= 2e-6
    assert bool(found.converged[others].all())


@pytest.mark.parametrize("size", [1e15, 1e18, 1e19, 3e19, 1e20, 1e25, 1e35])
@pytest.mark.parametrize("activation", [eq.ReLU(), eq.LeakyReLU(0.3)], ids=str)
def test_overflow_never_looks_like_convergence(activation: Activation, size: float) -> None:
    """Squares overflow float32 from 2e19 on: what is called converged must be, and its bound must say so."""
    W = matrix(3, 0.8, 2, gain=0.1).float()
    layer = layer_of(W, activation)
    q = torch.tensor([[1.0, 2.0, 3.0]]) * size
    answer = equilibrium(W, q / size, activation) * size  # both activations are positively homogeneous
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        solution = layer.solve(q, tol=1e-5)
    error = relative(solution.value.double(), answer)
    if bool(solution.converged):
        assert error <= 2e-5
        assert math.isfinite(float(solution.error_bound))
    assert float(solution.error_bound) >= error * float(answer.norm()) * (1 - 1e-6)


@pytest.mark.parametrize("size", [1e19, 3e19, 1e20])
def test_forward_is_right_or_warns_near_overflow(size: float) -> None:
    W = matrix(3, 0.8, 2, gain=0.1).float()
    layer = layer_of(W, eq.ReLU())
    q = torch.tensor([[1.0, 2.0, 3.0]]) * size
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        z = layer(q).detach()
    if not caught:
        assert relative(z.double(), equilibrium(W, q / size, eq.ReLU()) * size) <= 1e-4


# Budgets


@pytest.mark.parametrize("solver", PROVED + VARIANTS, ids=name)
def test_running_out_of_steps_is_visible(solver: eq.Solver) -> None:
    layer = layer_of(matrix(6, 0.2, 5), eq.ReLU())
    q = torch.rand(4, 6, dtype=torch.float64) + 0.5
    short = dataclasses.replace(solver, max_steps=3)
    with pytest.warns(ConvergenceWarning, match="4 of 4 samples"):
        solution = layer.solve(q, solver=short, tol=1e-9)
    assert not bool(solution.converged.any())
    assert solution.steps.tolist() == [3] * 4
    with pytest.raises(ConvergenceError, match="4 of 4 samples"):
        layer.solve(q, solver=short, tol=1e-9, strict=True)


def test_running_out_of_steps_is_seen_sample_by_sample() -> None:
    W = torch.diag(torch.tensor([0.99, 0.1], dtype=torch.float64))
    layer = layer_of(W, eq.ReLU())
    q = torch.tensor([[1.0, 0.0], [-1.0, 1.0], [0.0, 0.0]], dtype=torch.float64)
    with pytest.warns(ConvergenceWarning, match="1 of 3 samples") as record:
        solution = layer.solve(q, solver=eq.ForwardBackward(alpha=1.0, max_steps=40, check_every=1), tol=1e-6)
    assert len(record) == 1
    assert solution.converged.tolist() == [False, True, True]


def test_forward_and_backward_warn_and_raise() -> None:
    W = matrix(6, 0.2, 5)
    eye, zero = torch.eye(6, dtype=torch.float64), torch.zeros(6, dtype=torch.float64)
    q = torch.rand(2, 6, dtype=torch.float64) + 0.5
    hasty = eq.PeacemanRachford(max_steps=2)
    loose = eq.MonDEQ.from_weights(W, eye, zero, solver=hasty)
    with pytest.warns(ConvergenceWarning, match="forward: 2 of 2"):
        z = loose(q)
    with pytest.warns(ConvergenceWarning, match="backward: 2 of 2"):
        z.sum().backward()
    strict = eq.MonDEQ.from_weights(W, eye, zero, solver=hasty, strict=True)
    with pytest.raises(ConvergenceError, match="forward: 2 of 2"):
        strict(q)


@pytest.mark.parametrize("tol", [1e-1, 1e-2, 1e-4, 1e-12])
@pytest.mark.parametrize("near", [0.95, 0.98])
@pytest.mark.parametrize("solver", PROVED, ids=name)
def test_an_answer_of_zero_is_no_failure(solver: eq.Solver, near: float, tol: float) -> None:
    """z* = 0: relative to its size nothing is small, yet the answer is exact; no warning, forward or backward."""
    W = torch.tensor([[near, 0.5], [-0.5, near]], dtype=torch.float64)
    eye, zero = torch.eye(2, dtype=torch.float64), torch.zeros(2, dtype=torch.float64)
    layer = eq.MonDEQ.from_weights(W, eye, zero, solver=solver, tol=tol)
    x = torch.tensor([[-1.0, -2.0]], dtype=torch.float64, requires_grad=True)
    solution = layer.solve(x, tol=tol)
    assert bool(solution.converged.all())
    z = layer(x)
    assert z.tolist() == [[0.0, 0.0]]
    (gradient,) = torch.autograd.grad(z.sum(), x)
    assert gradient.tolist() == [[0.0, 0.0]]


def test_no_default_budget_exceeds_twenty_thousand_steps() -> None:
    W = torch.tensor([[0.95, 3.0], [-3.0, 0.95]], dtype=torch.float64)  # κ = 60: FB needs about 80,000
    q = torch.ones(1, 2, dtype=torch.float64)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        solution = layer_of(W, eq.ReLU()).solve(q, solver=eq.ForwardBackward(), tol=1e-9)
    assert int(solution.steps) <= 20_000


def test_divergence_is_visible() -> None:
    layer = layer_of(torch.diag(torch.tensor([-8.0, 0.5], dtype=torch.float64)), eq.LeakyReLU(0.9))
    q = torch.ones(2, 2, dtype=torch.float64)
    with pytest.warns(ConvergenceWarning, match="2 of 2"):
        solution = layer.solve(q, solver=eq.ForwardBackward(alpha=1.5))
    assert not bool(solution.converged.any())
    assert bool(torch.isfinite(solution.error_bound).logical_not().all()) or bool((solution.error_bound > 1).all())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["f32", "f64"])
@pytest.mark.parametrize("alpha", [0.3, 1.5])
def test_divergence_of_forward_and_backward_is_visible(alpha: float, dtype: torch.dtype) -> None:
    W, eye = torch.diag(torch.tensor([-8.0, 0.5], dtype=dtype)), torch.eye(2, dtype=dtype)
    layer = eq.MonDEQ.from_weights(
        W, eye, eye[0] * 0, activation=eq.LeakyReLU(0.9), solver=eq.ForwardBackward(alpha=alpha)
    )
    x = torch.ones(2, 2, dtype=dtype, requires_grad=True)
    with pytest.warns(ConvergenceWarning, match="forward: 2 of 2"):
        z = layer(x)
    with pytest.warns(ConvergenceWarning, match="backward: 2 of 2"):
        z.sum().backward()


# Stopping rules


@pytest.mark.parametrize("solver", PROVED, ids=name)
def test_the_rule_that_was_asked_for_holds(solver: eq.Solver) -> None:
    layer = layer_of(matrix(5, 0.3, 6, gain=0.3), eq.Softplus())
    q = torch.randn(6, 5, dtype=torch.float64)
    for tol in (1e-3, 1e-7):
        by_bound = layer.solve(q, solver=solver, tol=tol)
        assert bool((by_bound.truncation <= tol * by_bound.value.norm(dim=1) * (1 + 1e-9)).all())
        by_residual = layer.solve(q, solver=solver, tol=tol, stop="residual")
        assert bool((by_residual.residual <= tol * (1 + 1e-9)).all())
        assert bool(by_bound.converged.all())
        assert bool(by_residual.converged.all())


def test_without_a_margin_only_the_residual_can_stop() -> None:
    """Both units are active, so the answer is plain; W has the margin 0.8 − 0.9 and the spectral abscissa
    0.2 + √0.88 of its majorant, so no norm proves it."""
    W = torch.tensor([[0.2, 2.2], [-0.4, 0.2]], dtype=torch.float64)
    layer = layer_of(W, eq.ReLU(), check=False)
    q = torch.tensor([[1.0, 2.0]], dtype=torch.float64)
    answer = torch.tensor([[5.2 / 1.52, 1.2 / 1.52]], dtype=torch.float64)
    for solver in (eq.ForwardBackward(), eq.PeacemanRachford(), eq.Picard(), eq.Anderson()):
        solution = layer.solve(q, solver=solver, tol=1e-9, stop="residual")
        assert bool(solution.converged.all())
        assert relative(solution.value, answer) < 1e-7
        assert math.isinf(float(solution.error_bound))
    with pytest.warns(ConvergenceWarning, match="no positive margin"):
        assert not bool(layer.solve(q, stop="bound").converged.any())


@pytest.mark.parametrize("stop", ["Bound", "", None, 3])
def test_unknown_stopping_rules_are_refused(stop: Any) -> None:
    layer = layer_of(torch.zeros(2, 2), eq.ReLU())
    with pytest.raises(OptionError, match=r"'bound' or 'residual'"):
        layer.solve(torch.zeros(1, 2), stop=stop)


@pytest.mark.parametrize("tol", [0.0, -1e-3, 1.0, math.nan, math.inf, "small", None, True])
def test_tolerances_that_make_no_sense_are_refused(tol: Any) -> None:
    layer = layer_of(torch.zeros(2, 2), eq.ReLU())
    with pytest.raises(OptionError, match="tol"):
        layer.solve(torch.zeros(1, 2), tol=tol)


# Options


@pytest.mark.parametrize("every", [1, 7, 40])
def test_check_every(every: int) -> None:
    layer = layer_of(matrix(5, 0.3, 6, gain=0.3), eq.ReLU())
    q = torch.randn(6, 5, dtype=torch.float64)
    solution = layer.solve(q, solver=eq.PeacemanRachford(check_every=every), tol=1e-8)
    finest = layer.solve(q, solver=eq.PeacemanRachford(check_every=1), tol=1e-8)
    assert bool((solution.steps % every == 0).all())
    # when a sample is judged depends on what earlier looks measured, hence two looks of slack
    assert bool((solution.steps <= finest.steps + 2 * every).all())
    assert bool(solution.converged.all())


@pytest.mark.parametrize("alpha", [0.2, 1, 3.0])
@pytest.mark.parametrize("kind", [eq.PeacemanRachford, eq.DouglasRachford, eq.Anderson, eq.Broyden])
@pytest.mark.parametrize("activation", [eq.ReLU(), eq.LeakyReLU(0.1), eq.Tanh(), eq.SoftThreshold(0.3)], ids=str)
def test_any_step_is_right_for_the_resolvent_splittings(
    activation: Activation, kind: type[eq.Solver], alpha: float
) -> None:
    W = matrix(4, 0.5, 8, gain=0.4)
    q = torch.randn(3, 4, dtype=torch.float64)
    solution = layer_of(W, activation).solve(q, solver=kind(alpha=alpha), tol=1e-8)
    assert bool(solution.converged.all())
    assert relative(solution.value, equilibrium(W, q, activation)) <= 1e-7


@pytest.mark.parametrize("share", [0.2, 0.9])
@pytest.mark.parametrize("activation", [eq.ReLU(), eq.LeakyReLU(0.1), eq.Sigmoid(), eq.SoftThreshold(0.3)], ids=str)
def test_steps_within_the_limits_of_the_forward_splittings(activation: Activation, share: float) -> None:
    W = matrix(4, 0.8, 8, gain=0.3)
    layer = layer_of(W, activation)
    m, L = layer.operator.margin(), layer.operator.lipschitz()
    q = torch.randn(3, 4, dtype=torch.float64)
    for solver in (eq.ForwardBackward(alpha=share * 2 * m / L**2), eq.Tseng(alpha=share / L)):
        solution = layer.solve(q, solver=solver, tol=1e-7)
        assert bool(solution.converged.all())
        assert relative(solution.value, equilibrium(W, q, activation)) <= 1e-6


@pytest.mark.parametrize("factor", [1.0, 1.01, 10.0])
def test_tseng_refuses_steps_without_a_guarantee(factor: float) -> None:
    layer = layer_of(torch.tensor([[0.0, 2.0], [-2.0, 0.0]], dtype=torch.float64), eq.ReLU())  # L = √5
    alpha = factor / math.sqrt(5)
    with pytest.raises(OptionError, match=rf"{alpha:g}.*1/L"):
        layer.solve(torch.ones(1, 2, dtype=torch.float64), solver=eq.Tseng(alpha=alpha))


@pytest.mark.parametrize("kind", REGISTRY.values(), ids=REGISTRY)
@pytest.mark.parametrize(
    ("option", "value"),
    [("alpha", value) for value in (0.0, -1.0, math.nan, math.inf, True, "0.5")]
    + [(option, value) for option in ("max_steps", "check_every") for value in (0, -3, 1.5, True, "9")],
)
def test_options_out_of_range_are_refused(kind: type[eq.Solver], option: str, value: Any) -> None:
    with pytest.raises(OptionError, match=f"{kind.__name__} {option} is {value!r}"):
        kind(**{option: value})


@pytest.mark.parametrize("kind", [eq.Anderson, eq.Broyden])
def test_options_of_the_accelerated_solvers(kind: type[Accelerated]) -> None:
    for memory in (0, -1, 2.0, True):
        with pytest.raises(OptionError, match=f"memory is {memory!r}"):
            kind(memory=memory)
    with pytest.raises(OptionError, match="splitting"):
        kind(on=eq.Anderson())
    with pytest.raises(OptionError, match="give alpha to"):
        kind(on=eq.PeacemanRachford(), alpha=0.3)
    for on in ("PeacemanRachford", eq.ForwardBackward, 3):
        with pytest.raises(OptionError, match="on"):
            kind(on=on)


@pytest.mark.parametrize("kind", REGISTRY.values(), ids=REGISTRY)
def test_solvers_are_frozen_and_name_their_options(kind: type[eq.Solver]) -> None:
    with pytest.raises(TypeError, match="alhpa"):
        kind(alhpa=0.5)
    solver = kind(alpha=0.25)
    with pytest.raises(dataclasses.FrozenInstanceError):
        solver.alpha = 1.0  # type: ignore[misc]
    assert solver == kind(alpha=0.25)
    assert hash(solver) == hash(kind(alpha=0.25))
    assert solver.to_dict()["name"] == kind.__name__
    assert solver.to_dict()["alpha"] == 0.25
    assert getattr(eq, kind.__name__) is kind


@pytest.mark.parametrize("solver", ["PeacemanRachford", eq.PeacemanRachford, 3])
def test_what_is_no_solver_is_refused(solver: Any) -> None:
    with pytest.raises(OptionError, match="solver"):
        eq.MonDEQ(3, 4, solver=solver)
    with pytest.raises(OptionError, match="solver"):
        eq.MonDEQ(3, 4).solve(torch.zeros(2, 3), solver=solver)
