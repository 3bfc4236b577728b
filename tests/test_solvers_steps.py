"""One step of a solver: the safeguard of the accelerated ones, and what a step costs."""

from __future__ import annotations

import dataclasses
import itertools
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import equipoise as eq
from equipoise.operators import DenseOperator
from equipoise.solvers import Problem
from equipoise.solvers.accelerated import Accelerated, push
from problems import equilibrium, matrix
from test_solvers import layer_of, name


def relative(found: Tensor, expected: Tensor) -> float:
    return float(((found - expected).norm(dim=1) / expected.norm(dim=1)).max())


# The safeguard


@dataclasses.dataclass(frozen=True)
class Saboteur(Accelerated):
    """An acceleration that has learnt nothing but nonsense, and says so whenever its memory is not blank."""

    def blank(self, u: Tensor) -> tuple[Tensor, ...]:
        return (u.new_zeros(len(u), 1, u.shape[1]),)

    def learn(self, memory: tuple[Tensor, ...], du: Tensor, dr: Tensor) -> None:
        push(memory[0], du)

    def propose(self, memory: tuple[Tensor, ...], u: Tensor, residual: Tensor) -> Tensor:
        taught = (memory[0] != 0).flatten(1).any(1, keepdim=True)
        return torch.where(taught, 1e6 * u + 1e4, u + residual)


@pytest.mark.parametrize("on", [None, eq.ForwardBackward(), eq.DouglasRachford()])
def test_safeguard_survives_any_proposal(on: eq.Solver | None) -> None:
    W = matrix(5, 0.5, 9, gain=0.3)
    q = torch.randn(4, 5, dtype=torch.float64) * 2
    solution = layer_of(W, eq.ReLU()).solve(q, solver=Saboteur(on=on, max_steps=20_000, check_every=1), tol=1e-8)
    assert bool(solution.converged.all())
    assert relative(solution.value, equilibrium(W, q, eq.ReLU())) <= 1e-7


def plain_anderson(problem: Problem, on: eq.Solver, memory: int, steps: int) -> float:
    """The relative residual that textbook Anderson, without a safeguard, has after its steps."""
    fixed_point = on.map(problem, on.tune(problem.operator))
    u, image = fixed_point.start()
    points, residuals = [u], [image - u]
    u = image
    for _ in range(steps):
        r = fixed_point(u) - u
        points, residuals = [*points, u][-memory - 1 :], [*residuals, r][-memory - 1 :]
        du = torch.stack([b - a for a, b in itertools.pairwise(points)], -1)[0]
        dr = torch.stack([b - a for a, b in itertools.pairwise(residuals)], -1)[0]
        mixing = torch.linalg.lstsq(dr, r.mT, driver="gelsd").solution
        u = u + r - ((du + dr) @ mixing).mT
    return float(r.norm() / u.norm())


def test_safeguarded_anderson_converges_where_plain_anderson_does_not() -> None:
    W = matrix(10, 0.1, 126, rank=5, gain=0.5)
    torch.manual_seed(126)
    q = torch.randn(1, 10, dtype=torch.float64)
    on = eq.ForwardBackward()
    assert plain_anderson(Problem(DenseOperator(W), q, eq.ReLU()), on, 5, 1000) > 1e-3
    solver = eq.Anderson(on=on, memory=5, check_every=50, max_steps=20_000)
    solution = layer_of(W, eq.ReLU()).solve(q, solver=solver, tol=1e-8)
    assert bool(solution.converged.all())
    assert relative(solution.value, equilibrium(W, q, eq.ReLU())) <= 1e-7


# What a step costs


class Counter(TorchDispatchMode):
    """Counts matrix products and elementwise passes."""

    def __init__(self) -> None:
        super().__init__()
        self.products = 0
        self.others: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        operation = func.overloadpacket.__name__
        if operation in ("mm", "addmm", "bmm", "baddbmm", "mv", "addmv", "matmul", "linear"):
            self.products += 1
        else:
            self.others.append(operation)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    ("solver", "products"),
    [
        (eq.PeacemanRachford(), 1),
        (eq.DouglasRachford(), 1),
        (eq.ForwardBackward(), 1),
        (eq.Picard(), 1),
        (eq.Tseng(), 2),
    ],
    ids=lambda value: name(value) if isinstance(value, eq.Solver) else str(value),
)
def test_products_a_step(solver: eq.Solver, products: int) -> None:
    operator = DenseOperator(matrix(6, 0.4, 3).float() * 0.1)
    problem = Problem(operator, torch.randn(9, 6), eq.ReLU())
    fixed_point = solver.map(problem, solver.tune(operator))
    state = solver.step(fixed_point, solver.init(fixed_point))
    with Counter() as counted:
        for _ in range(5):
            state = solver.step(fixed_point, state)
    assert counted.products == 5 * products
    if isinstance(solver, eq.PeacemanRachford) and solver.relaxation == 1:
        assert counted.others == ["abs"] * 5  # one reflection, nothing else: the image goes into the older buffer


def test_peaceman_rachford_starts_without_a_product() -> None:
    operator = DenseOperator(matrix(6, 0.4, 3).float())
    solver = eq.PeacemanRachford()
    fixed_point = solver.map(Problem(operator, torch.randn(9, 6), eq.ReLU()), solver.tune(operator))
    with Counter() as counted:
        fixed_point.start()
    assert counted.products == 0
