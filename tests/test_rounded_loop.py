"""Iterates on a grid: the grids, and how the loop, gradients, options and files take them."""

from __future__ import annotations

import dataclasses
import math
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import settings

import equipoise as eq
from equipoise.errors import ConvergenceWarning, FileFormatError, InputError, OptionError, StructureError
from equipoise.solvers import tuned
from equipoise.solvers.rounded import _round
from problems import equilibrium, matrix
from test_rounded import SPLITTINGS, iterates, quietly
from test_solvers import layer_of

F64 = torch.float64
FEW = settings(max_examples=max(settings.default.max_examples * 2 // 5, 1))


# Grids


def test_ties_go_to_the_even_multiple() -> None:
    for spacing in (1.0, 0.25, 1024.0):
        u = torch.tensor([[0.5, 1.5, 2.5, -0.5, -1.5, 0.49, -3.2, 0.0]]) * spacing
        expected = torch.tensor([[0.0, 2.0, 2.0, 0.0, -2.0, 0.0, -3.0, 0.0]]) * spacing
        assert torch.equal(_round(u, torch.tensor([[spacing]])), expected)


@pytest.mark.parametrize("spacing", [0.0, 1e-45, 1e-20, 1e-7, 3.4e38])
def test_extreme_grids_make_no_nan(spacing: float) -> None:
    u = torch.tensor([[0.0, 1e-45, -1.0, 7.0, 3e38, -3e38]])
    found = _round(u, torch.tensor([[spacing]]))
    assert bool(torch.isfinite(found).all())
    assert bool(((found - u).abs() <= 0.51 * spacing + 1e-6 * u.abs()).all())


@pytest.mark.parametrize("on", SPLITTINGS, ids=lambda on: type(on).__name__)
def test_iterates_lie_on_their_grid(on: eq.Solver) -> None:
    layer = layer_of(matrix(6, 0.4, 3, gain=0.3), eq.ReLU())
    q = torch.randn(5, 6, dtype=F64)
    for k, (u, _) in enumerate(iterates(layer, eq.Rounded(on, 0.25, 0.5), q, 30)):
        multiple = u / (0.25 * 0.5**k)
        assert torch.equal(multiple, multiple.round())
    plain = iterates(layer, eq.Rounded(on, 2.0**-10), q, 30)
    assert all(torch.equal(u * 1024, (u * 1024).round()) for u, _ in plain)


@pytest.mark.parametrize("dtype", [torch.float32, F64], ids=["f32", "f64"])
@pytest.mark.parametrize("on", SPLITTINGS, ids=lambda on: type(on).__name__)
def test_adaptive_grids_converge_where_fixed_ones_do_not(on: eq.Solver, dtype: torch.dtype) -> None:
    W = matrix(6, 0.5, 3, gain=0.3).to(dtype)
    layer = layer_of(W, eq.ReLU())
    q = torch.randn(8, 6, dtype=dtype)
    answer, tol = equilibrium(W, q, eq.ReLU()), 1e-4 if dtype == torch.float32 else 1e-9
    # looked at from the first step on, where the grid is coarse and the rounded iterates stand still
    for grid, decay, every in ((1.0, 0.5, None), (4.0, 0.9, 1), (100.0, 0.97, 1)):
        solver = eq.Rounded(on, grid, decay, max_steps=2000, check_every=every)
        adaptive = layer.solve(q, solver=solver, tol=tol)
        assert bool(adaptive.converged.all())
        assert bool(((adaptive.value - answer).norm(dim=1) <= 1.01 * tol * answer.norm(dim=1) + 1e-6 * tol).all())
    with pytest.warns(ConvergenceWarning):
        fixed = layer.solve(q, solver=eq.Rounded(on, 0.25, max_steps=2000), tol=tol)
    short = ~fixed.converged  # but where the answer itself lies on the grid, as 0 does
    assert int(short.sum()) >= 6
    assert float((fixed.value - answer).norm(dim=1)[short].min()) > 10 * tol
    # the bound after k steps goes to what the arithmetic leaves; that of a fixed grid does not
    late = eq.iterate_floor(layer, q, eq.Rounded(on, 1.0, 0.5), steps=20_000)
    assert float(late.iterate.max()) < (1e-3 if dtype == torch.float32 else 1e-11)
    assert eq.iterate_floor(layer, q, eq.Rounded(on, 1.0, 0.5)).exact == 0
    assert float(eq.iterate_floor(layer, q, eq.Rounded(on, 0.25)).iterate.min()) > 0.1


@pytest.mark.parametrize("dtype", [torch.float32, F64], ids=["f32", "f64"])
def test_a_grid_finer_than_the_arithmetic_changes_nothing(dtype: torch.dtype) -> None:
    layer = layer_of(matrix(6, 0.5, 3, gain=0.3).to(dtype), eq.ReLU())
    q = torch.randn(8, 6, dtype=dtype)
    for on in SPLITTINGS:
        plain = layer.solve(q, solver=on, tol=1e-4)
        for solver in (eq.Rounded(on, 1e-40), eq.Rounded(on, 1e-3, 1e-9), eq.Rounded(on, 1e-300)):
            found = layer.solve(q, solver=solver, tol=1e-4)
            torch.testing.assert_close(found.value, plain.value, rtol=2e-4, atol=1e-6)
            assert bool(found.converged.all())
    # a grid that has long shrunk to nothing
    last = iterates(layer, eq.Rounded(eq.PeacemanRachford(), 1.0, 0.5), q, 3000)[-1][1]
    assert bool(torch.isfinite(last).all())


# The loop


def test_a_repeating_iterate_ends_and_is_judged_as_it_is() -> None:
    """0.9 z + 1 from 0 on the integers stalls at 6 of 10 (5.5 is a tie): no more steps, no claim of convergence."""
    layer = layer_of(torch.tensor([[0.9]], dtype=F64), eq.ReLU())
    q = torch.tensor([[1.0], [0.25], [40.0]], dtype=F64)
    solver = eq.Rounded(eq.ForwardBackward(alpha=1.0), 1.0, check_every=1)
    with pytest.warns(ConvergenceWarning, match="3 of 3"):
        found = layer.solve(q, solver=solver)
    assert found.value.flatten().tolist() == [0.9 * 6 + 1, 0.25, 0.9 * 396 + 40]
    assert found.steps[0].item() <= 12
    assert found.steps[1].item() == 1
    assert bool((found.error_bound >= (found.value - 10 * q).abs()[:, 0]).all())
    # nobody judges a layer's forward: it returns what the grid gives, without a word
    own = eq.MonDEQ.from_weights(*(torch.tensor(v, dtype=F64) for v in ([[0.9]], [[1.0]], [0.0])), solver=solver)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert own(q[:1]).item() == 6.4


def test_a_cycle_runs_to_the_end_of_its_budget() -> None:
    """z⁺ = round(relu(5.5 − 0.9 z)) runs 0, 6, 0, 6, …, around the equilibrium 2.89."""
    layer = layer_of(torch.tensor([[-0.9]], dtype=F64), eq.ReLU())
    q = torch.tensor([[5.5], [0.4]], dtype=F64)
    solver = eq.Rounded(eq.ForwardBackward(alpha=1.0), 1.0, max_steps=321)
    assert [u[0].item() for u, _ in iterates(layer, solver, q, 5)] == [6.0, 0.0, 6.0, 0.0, 6.0]
    with pytest.warns(ConvergenceWarning, match="2 of 2"):
        found = layer.solve(q, solver=solver)
    assert found.steps.tolist()[0] == 321
    assert found.steps.tolist()[1] < 321  # this one stalls at 0
    assert bool((found.error_bound[0] >= abs(float(found.value[0]) - 5.5 / 1.9)).all())
    own = eq.MonDEQ.from_weights(*(torch.tensor(v, dtype=F64) for v in ([[-0.9]], [[1.0]], [0.0])), solver=solver)
    with pytest.warns(ConvergenceWarning, match="1 of 1"):
        own(q[:1])


@pytest.mark.parametrize("decay", [None, 0.8])
@pytest.mark.parametrize("on", SPLITTINGS, ids=lambda on: type(on).__name__)
def test_a_sample_does_not_depend_on_its_batch(on: eq.Solver, decay: float | None) -> None:
    layer = layer_of(matrix(8, 0.8, 3, gain=0.2), eq.ReLU())
    q = torch.randn(300, 8, dtype=F64) * torch.logspace(-2, 2, 300, dtype=F64)[:, None]
    solver = eq.Rounded(on, 2.0**-9, decay)
    together = quietly(layer, q, solver=solver, tol=1e-4)
    some = list(range(0, 300, 20))
    alone = [quietly(layer, q[i : i + 1], solver=solver, tol=1e-4) for i in some]
    assert torch.equal(torch.cat([s.steps for s in alone]), together.steps[some])
    torch.testing.assert_close(torch.cat([s.value for s in alone]), together.value[some], rtol=1e-9, atol=1e-12)


def test_the_trial_run_is_the_splittings() -> None:
    layer = layer_of(matrix(6, 0.4, 3, gain=0.3), eq.ReLU())
    like = torch.zeros(1, dtype=F64)
    for on in SPLITTINGS:
        plain = tuned(on, layer.operator, eq.ReLU(), like)
        assert tuned(eq.Rounded(on, 1.0), layer.operator, eq.ReLU(), like) == plain
        slow = tuned(eq.Rounded(on, 1.0, 0.999), layer.operator, eq.ReLU(), like)
        assert slow == plain._replace(rate=0.999, pace=0.999)


@pytest.mark.parametrize("on", SPLITTINGS, ids=lambda on: type(on).__name__)
def test_gradients_are_not_rounded(on: eq.Solver) -> None:
    """The transposed problem at the point the grid gives, solved to tolerance: y = D (Wᵀ y + g)."""
    W = matrix(5, 0.6, 3, gain=0.2)
    layer = eq.MonDEQ.from_weights(W, torch.eye(5, dtype=F64), torch.zeros(5, dtype=F64), solver=eq.Rounded(on, 0.5))
    x = torch.randn(4, 5, dtype=F64, requires_grad=True)
    g = torch.randn(4, 5, dtype=F64) * 1e-3
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        z = layer(x)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        (found,) = torch.autograd.grad(z, x, g)
    D = (z > 0).double()
    expected = torch.linalg.solve(torch.eye(5, dtype=F64) - D[:, :, None] * W.mT, (D * g)[:, :, None])[:, :, 0]
    torch.testing.assert_close(found, expected, rtol=1e-8, atol=1e-14)


# Options and files


@pytest.mark.parametrize(
    "on",
    [eq.Anderson(), eq.Broyden(), eq.Tseng(), eq.Picard(), eq.Rounded(eq.PeacemanRachford(), 0.1)],
    ids=lambda on: type(on).__name__,
)
def test_what_is_not_proved_to_contract_is_refused(on: eq.Solver) -> None:
    with pytest.raises(OptionError, match=rf"proved to contract.*not on {type(on).__name__}"):
        eq.Rounded(on, 0.1)


def test_accelerations_do_not_act_on_rounded_iterates() -> None:
    for kind in (eq.Anderson, eq.Broyden):
        with pytest.raises(OptionError, match="splitting"):
            kind(on=eq.Rounded(eq.PeacemanRachford(), 0.1))


@pytest.mark.parametrize("on", ["PeacemanRachford", eq.PeacemanRachford, None, 3])
def test_what_is_no_splitting_is_refused(on: Any) -> None:
    with pytest.raises(OptionError, match="Rounded acts on a splitting"):
        eq.Rounded(on, 0.1)


@pytest.mark.parametrize("grid", [0, 0.0, -1.0, math.nan, math.inf, True, "0.1", None])
def test_grids_out_of_range_are_refused(grid: Any) -> None:
    with pytest.raises(OptionError, match=f"grid is {grid!r}"):
        eq.Rounded(eq.PeacemanRachford(), grid)


@pytest.mark.parametrize("decay", [0, 0.0, 1, 1.0, 1.5, -0.5, math.nan, True, "0.5"])
def test_decays_out_of_range_are_refused(decay: Any) -> None:
    with pytest.raises(OptionError, match=f"decay is {decay!r}"):
        eq.Rounded(eq.PeacemanRachford(), 0.1, decay)


def test_options_belong_where_they_work() -> None:
    with pytest.raises(OptionError, match="give alpha to ForwardBackward, not to Rounded"):
        eq.Rounded(eq.ForwardBackward(), 0.1, alpha=0.5)
    for option in ("max_steps", "check_every"):
        with pytest.raises(OptionError, match=f"give {option} to Rounded, not to DouglasRachford"):
            eq.Rounded(eq.DouglasRachford(**{option: 9}), 0.1)
        with pytest.raises(OptionError, match=f"Rounded {option} is 0"):
            eq.Rounded(eq.DouglasRachford(), 0.1, **{option: 0})
    with pytest.raises(TypeError):
        eq.Rounded(eq.DouglasRachford())  # type: ignore[call-arg]
    solver = eq.Rounded(eq.PeacemanRachford(alpha=0.5), 0.1, 0.9, max_steps=7)
    assert hash(solver) == hash(dataclasses.replace(solver))
    with pytest.raises(dataclasses.FrozenInstanceError):
        solver.grid = 1.0  # type: ignore[misc]
    assert solver.to_dict()["on"] == eq.PeacemanRachford(alpha=0.5).to_dict()


@pytest.mark.parametrize("on", [eq.ForwardBackward(alpha=0.1), eq.PeacemanRachford(), eq.DouglasRachford()])
@pytest.mark.parametrize("decay", [None, 0.75])
def test_files_keep_it(on: eq.Solver, decay: float | None, tmp_path: Path) -> None:
    solver = eq.Rounded(on, 2.0**-5, decay, max_steps=60)
    layer = eq.MonDEQ(3, 4, solver=solver)
    eq.save(layer, tmp_path / "net.safetensors")
    loaded = eq.load(tmp_path / "net.safetensors")
    assert isinstance(loaded, eq.MonDEQ)
    assert loaded.solver == solver
    x = torch.randn(2, 3)
    assert torch.equal(quietly(loaded, x).value, quietly(layer, x).value)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"name": "Rounded", "on": {"name": "Tseng"}, "grid": 1.0}, "proved to contract"),
        ({"name": "Rounded", "on": {"name": "ForwardBackward"}}, "Rounded needs grid"),
        ({"name": "Rounded", "grid": 1.0}, "Rounded needs on"),
        ({"name": "Rounded", "on": {"name": "ForwardBackward"}, "grid": None}, "grid is None"),
        ({"name": "Rounded", "on": {"name": "ForwardBackward"}, "grid": "1"}, "numbers"),
        ({"name": "Rounded", "on": {"name": "ForwardBackward"}, "grid": 1.0, "decay": 2.0}, "decay is 2.0"),
    ],
)
def test_damaged_files_are_refused(values: dict[str, Any], message: str) -> None:
    from equipoise._codecs.options import read_solver
    from equipoise._codecs.tensors import Fields

    with pytest.raises((FileFormatError, OptionError), match=message):  # `load` names the file
        read_solver(Fields(values, "solver"))


def test_what_the_floor_is_asked_of() -> None:
    layer = eq.MonDEQ(3, 4)
    x, solver = torch.randn(2, 3), eq.Rounded(eq.PeacemanRachford(), 0.1)
    with pytest.raises(StructureError, match="Linear"):
        eq.iterate_floor(torch.nn.Linear(3, 4), x, solver)  # type: ignore[arg-type]
    with pytest.raises(OptionError, match=r"rounds none.*Rounded"):
        eq.iterate_floor(layer, x)
    for steps in (0, -1, 1.5, True):
        with pytest.raises(OptionError, match="steps"):
            eq.iterate_floor(layer, x, solver, steps=steps)  # type: ignore[arg-type]
    for bad in (x[0], x[:, :2], x.long(), x / 0, "x"):
        with pytest.raises(InputError, match="inputs"):
            eq.iterate_floor(layer, bad, solver)  # type: ignore[arg-type]
    with pytest.raises(InputError, match="float16"):
        eq.iterate_floor(eq.MonDEQ(3, 4).half(), x, solver)
    with pytest.raises(OptionError, match=r"Tanh.*alpha=1\.0"):
        eq.iterate_floor(eq.MonDEQ(3, 4, activation="tanh"), x, solver)
    with pytest.raises(eq.NotWellPosedError, match="nothing contracts"):
        eq.iterate_floor(layer_of(torch.eye(3) * 1.5, eq.ReLU(), check=False), x, solver)
    steep = layer_of(torch.tensor([[-3.0]]), eq.ReLU())
    with pytest.raises(eq.NotWellPosedError, match="another alpha"):
        eq.iterate_floor(steep, torch.ones(1, 1), eq.Rounded(eq.ForwardBackward(alpha=1.0), 0.1))
    empty = eq.iterate_floor(layer, x[:0], solver)
    assert empty.iterate.shape == empty.value.shape == (0,)
