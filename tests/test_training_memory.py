"""What a layer remembers from step to step of training saves work and decides nothing."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

import equipoise as eq
from equipoise.bench.train import saved_bytes
from equipoise.layers.memory import Memory
from equipoise.operators import DenseOperator
from equipoise.solvers.loop import PATIENCE, Habit

X = torch.linspace(-1, 1, 160).reshape(32, 5)
Y = torch.arange(32) % 3


def make(dtype: torch.dtype = torch.float32, **options: object) -> nn.Sequential:
    torch.manual_seed(0)
    layer = eq.MonDEQ(5, 12, rank=4, margin=0.5, learn_margin=True, **options)  # type: ignore[arg-type]
    return nn.Sequential(layer, nn.Linear(12, 3)).to(dtype)


def step(model: nn.Sequential, optimizer: torch.optim.Optimizer) -> None:
    optimizer.zero_grad()
    nn.functional.cross_entropy(model(X.to(model[1].weight)), Y).backward()
    optimizer.step()


def trained(steps: int, rate: float = 1e-3, **options: object) -> nn.Sequential:
    model = make(**options)  # type: ignore[arg-type]
    optimizer = torch.optim.Adam(model.parameters(), rate)
    for _ in range(steps):
        step(model, optimizer)
    return model


def monotone(n: int, seed: int = 0) -> Tensor:
    torch.manual_seed(seed)
    A, B = torch.randn(3, n, dtype=torch.float64), torch.randn(n, n, dtype=torch.float64)
    return 0.7 * torch.eye(n, dtype=torch.float64) - A.T @ A / n + (B - B.T) / n


@pytest.mark.parametrize("alpha", [0.3, 1.0, 2.5])
def test_a_refined_transform_is_the_transform_up_to_the_square_of_its_residual(alpha: float) -> None:
    W = monotone(20)
    near = W + 1e-3 * torch.randn(20, 20, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    operator = DenseOperator(near)
    assert operator.refine_cayley(alpha, DenseOperator(W).cayley(alpha), 1e-2)
    exact = DenseOperator(near).cayley(alpha)
    V, M = (DenseOperator(W).cayley(alpha) + torch.eye(20)) / 2, torch.eye(20) + alpha * (torch.eye(20) - near)
    residual = float(torch.linalg.matrix_norm(torch.eye(20) - M @ V))
    error = float(torch.linalg.matrix_norm(operator.cayley(alpha) - exact))
    assert 0 < error <= 2.01 * residual**2 * float(torch.linalg.matrix_norm((exact + torch.eye(20)) / 2))


def test_a_guess_that_is_too_far_off_is_not_taken() -> None:
    operator = DenseOperator(monotone(20, seed=3))
    assert not operator.refine_cayley(1.0, DenseOperator(monotone(20)).cayley(1.0), 1e-6)
    assert operator.formed_cayley(1.0) is None
    assert torch.equal(operator.cayley(1.0), DenseOperator(monotone(20, seed=3)).cayley(1.0))
    assert not operator.refine_cayley(0.5, torch.full((20, 20), torch.nan, dtype=torch.float64), 1e-6)


def test_a_habit_comes_a_step_earlier_after_patience_and_goes_back_at_once() -> None:
    habit = Habit()
    habit.learn(9)
    assert (habit.first, habit.planned) == (9, None)
    habit.plan()
    assert habit.planned == 9
    for _ in range(PATIENCE):
        habit.learn(9)
    assert (habit.first, habit.planned) == (8, 9)
    habit.learn(10)
    assert habit.first == 10
    for _ in range(20 * PATIENCE):
        habit.learn(1)
    assert habit.first == 1


def test_trained_layers_look_where_solves_end_and_still_reach_the_tolerance() -> None:
    model = trained(60, training_tol=1e-3)
    layer = model[0]
    assert isinstance(layer, eq.MonDEQ)
    assert layer.training_memory is not None
    assert layer.training_memory.forward.first is not None
    exact = copy.deepcopy(layer).double().eval().solve(X.double(), tol=1e-10).value
    found = layer(X).detach()
    error = torch.linalg.vector_norm(found.double() - exact, dim=1) / torch.linalg.vector_norm(exact, dim=1)
    assert float(error.max()) < 3e-3


def test_gradients_with_a_memory_are_those_without() -> None:
    model = trained(60)
    fresh = copy.deepcopy(model)
    fresh[0].forget_tuning()  # type: ignore[operator]
    grads = []
    for one in (model, fresh):
        one.zero_grad()
        nn.functional.cross_entropy(one(X), Y).backward()
        grads.append(torch.cat([p.grad.flatten() for p in one.parameters() if p.grad is not None]))
    assert float((grads[0] - grads[1]).norm() / grads[1].norm()) < 1e-4


def test_proved_solutions_never_use_an_approximate_inverse() -> None:
    model = trained(30, training_tol=0.3)
    layer = model[0]
    assert isinstance(layer, eq.MonDEQ)
    with torch.no_grad():
        layer.recurrent.B.add_(1e-3)  # type: ignore[operator]
    layer(X)  # in training mode: the transform is refined from the last one
    assert layer.training_memory is not None
    used = layer.training_memory.cayley
    alpha = layer.training_memory.tuning.alpha
    assert used is not None
    assert not torch.equal(used, DenseOperator(layer.weight.detach()).cayley(alpha))
    solution = layer.solve(X, tol=1e-6)
    assert bool(solution.converged.all())
    W, U, b = (t.detach().double() for t in (layer.weight, layer.input_weight, layer.bias))
    exact = eq.MonDEQ.from_weights(W, U, b).solve(X.double(), tol=1e-12).value  # W as float32 rounded it
    error = torch.linalg.vector_norm(solution.value.double() - exact, dim=1)
    assert bool((error <= solution.error_bound).all())


def test_the_tolerance_of_training_is_left_behind_in_evaluation() -> None:
    model = trained(5, training_tol=0.2)
    layer = model[0]
    assert isinstance(layer, eq.MonDEQ)
    exact = copy.deepcopy(layer).double().eval().solve(X.double(), tol=1e-12).value
    coarse = float((layer(X).detach().double() - exact).norm())
    fine = float((layer.eval()(X).detach().double() - exact).norm())
    assert fine < 1e-4 < coarse


def test_weights_that_jump_are_met_with_a_new_search() -> None:
    model = trained(20)
    layer = model[0]
    assert isinstance(layer, eq.MonDEQ)
    assert layer.training_memory is not None
    before = layer.training_memory
    layer(X)
    assert layer.training_memory is before
    with torch.no_grad():
        layer.recurrent.B.mul_(40)  # type: ignore[operator]
    layer(X)
    assert isinstance(layer.training_memory, Memory)
    assert layer.training_memory is not before


def test_the_same_weights_give_the_same_answer_however_often_they_are_asked() -> None:
    model = trained(20, training_tol=1e-2)
    first = model(X)
    for _ in range(3 * PATIENCE):
        assert torch.equal(model(X), first)


def test_memory_of_a_step_does_not_grow_with_solver_steps() -> None:
    model = make()
    few, many = (saved_bytes(model, (X, Y), steps) for steps in (20, 200))
    assert 0 < few == many
