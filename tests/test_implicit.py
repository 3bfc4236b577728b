"""Gradients through an equilibrium: against finite differences, unrolling, and the linear system they solve."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import equipoise as eq
from equipoise.activations import Activation
from equipoise.solvers import Problem
from problems import matrix

SMOOTH: list[Activation] = [eq.Tanh(), eq.Sigmoid(), eq.Softplus(), eq.ELU(0.7)]
KINKED: list[Activation] = [eq.ReLU(), eq.LeakyReLU(0.2), eq.Hardtanh(-0.4, 0.5), eq.SoftThreshold(0.2)]
EVERY = SMOOTH + KINKED
SOLVERS: list[eq.Solver] = [
    eq.PeacemanRachford(),
    eq.DouglasRachford(),
    eq.ForwardBackward(),
    eq.Tseng(),
    eq.Anderson(),
    eq.Broyden(),
]
TIGHT = {"tol": 1e-13, "backward_tol": 1e-13}


def factors(seed: int = 0, n: int = 3, d: int = 2, rank: int = 2) -> tuple[Tensor, ...]:
    """A, B, margin, U, b, x: leaves that require a gradient, away from kinks."""
    generator = torch.Generator().manual_seed(seed)
    shapes = ((rank, n), (n, n), (), (n, d), (n,), (2, d))
    tensors = [torch.randn(shape, generator=generator, dtype=torch.float64) * 0.6 for shape in shapes]
    tensors[2] = torch.tensor(0.5, dtype=torch.float64)
    return tuple(tensor.requires_grad_() for tensor in tensors)


def recurrence(A: Tensor, B: Tensor, margin: Tensor) -> Tensor:
    return (1 - margin) * torch.eye(len(B), dtype=B.dtype) - A.mT @ A + B - B.mT


class Free(nn.Module):
    """Weights given from outside, with their graph: the layer as a function of W, U and b."""

    def __init__(self, layer: eq.MonDEQ) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, W: Tensor, U: Tensor, b: Tensor, x: Tensor) -> Tensor:
        weights = {"recurrent.weight": W, "injection.weight": U, "injection.bias": b}
        return torch.func.functional_call(self.layer, weights, (x,))


def free(activation: Activation, solver: eq.Solver = eq.PeacemanRachford(), n: int = 3, d: int = 2) -> Free:
    zeros = (torch.zeros(shape, dtype=torch.float64) for shape in ((n, n), (n, d), (n,)))
    return Free(eq.MonDEQ.from_weights(*zeros, activation=activation, solver=solver, **TIGHT).eval())


def unrolled(W: Tensor, q: Tensor, activation: Activation, steps: int = 1500) -> Tensor:
    """The equilibrium as a long forward–backward recursion that autograd sees through; σ needs prox_{αf} = σ."""
    z, alpha = torch.zeros_like(q), 0.0
    F = torch.eye(len(W), dtype=W.dtype) - W
    with torch.no_grad():
        m = torch.linalg.eigvalsh((F + F.mT) / 2)[0]
        alpha = float(m / torch.linalg.matrix_norm(F, 2) ** 2)
    for _ in range(steps):
        z = activation.prox(z - alpha * (z @ F.mT - q), alpha)
    return z


# Finite differences


@pytest.mark.parametrize("activation", EVERY, ids=str)
def test_gradients_against_finite_differences(activation: Activation) -> None:
    A, B, margin, U, b, x = factors()
    run = free(activation)
    assert torch.autograd.gradcheck(
        lambda *t: run(recurrence(t[0], t[1], t[2]), *t[3:]),
        (A, B, margin, U, b, x),
        atol=1e-6,
        rtol=1e-5,
        fast_mode=True,
    )


@pytest.mark.parametrize("solver", SOLVERS[1:], ids=lambda s: type(s).__name__)
@pytest.mark.parametrize("activation", [eq.ReLU(), eq.Tanh()], ids=str)
def test_gradients_of_every_solver(activation: Activation, solver: eq.Solver) -> None:
    A, B, margin, U, b, x = factors(1)
    inputs = [recurrence(A, B, margin), U, b, x]
    reference = torch.autograd.grad(free(activation)(*inputs).square().sum(), inputs, retain_graph=True)
    found = torch.autograd.grad(free(activation, solver)(*inputs).square().sum(), inputs)
    for one, other in zip(found, reference, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("activation", [eq.Tanh(), eq.Softplus(), eq.ReLU(), eq.LeakyReLU(0.2)], ids=str)
def test_second_derivatives_against_finite_differences(activation: Activation) -> None:
    A, B, margin, U, b, x = factors(2, n=2, d=1, rank=1)
    run = free(activation, n=2, d=1)
    assert torch.autograd.gradgradcheck(
        lambda *t: run(recurrence(t[0], t[1], t[2]), *t[3:]),
        (A, B, margin, U, b, x),
        atol=1e-5,
        rtol=1e-4,
        fast_mode=True,
    )


# Other ways to the same gradient


@pytest.mark.parametrize("activation", KINKED, ids=str)
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_gradients_against_unrolled_backpropagation(activation: Activation, seed: int) -> None:
    leaves = factors(seed, n=4, d=3)
    A, B, margin, U, b, x = leaves
    target = torch.randn(2, 4, dtype=torch.float64)
    W = recurrence(A, B, margin)
    expected = torch.autograd.grad((unrolled(W, x @ U.mT + b, activation) * target).sum(), leaves)
    found = torch.autograd.grad((free(activation, n=4, d=3)(recurrence(A, B, margin), U, b, x) * target).sum(), leaves)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize("activation", EVERY, ids=str)
def test_gradients_against_the_linear_system(activation: Activation) -> None:
    """y = (I − D Wᵀ)⁻¹ D g; then U-, b-, x- and W-gradients are y xᵀ, y, Uᵀ y and y z*ᵀ (theory §3)."""
    torch.manual_seed(4)
    W = matrix(6, 0.4, 4, gain=0.4).requires_grad_()
    U, b, x = (torch.randn(s, dtype=torch.float64, requires_grad=True) for s in ((6, 5), (6,), (3, 5)))
    g = torch.randn(3, 6, dtype=torch.float64)
    z = free(activation, n=6, d=5)(W, U, b, x)
    grads = torch.autograd.grad(z, (W, U, b, x), g)
    with torch.no_grad():
        D = activation.derivative(z @ W.mT + x @ U.mT + b)
        systems = torch.eye(6, dtype=torch.float64) - D[:, :, None] * W.mT
        y = torch.linalg.solve(systems, (D * g)[:, :, None])[:, :, 0]
        expected = (y.mT @ z, y.mT @ x, y.sum(0), y @ U)
    for one, other in zip(grads, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-11)


def test_single_precision_gradients_are_accurate() -> None:
    torch.manual_seed(3)
    fine = eq.MonDEQ(6, 20, rank=8, margin=0.3).double()
    coarse = eq.MonDEQ(6, 20, rank=8, margin=0.3)
    coarse.load_state_dict(fine.state_dict())
    fine.load_state_dict(coarse.state_dict())  # the same numbers
    x = torch.randn(9, 6)
    coarse(x).square().sum().backward()
    fine(x.double()).square().sum().backward()
    for (name, one), (_, other) in zip(coarse.named_parameters(), fine.named_parameters(), strict=True):
        assert one.grad is not None
        assert other.grad is not None
        distance = float((one.grad.double() - other.grad).norm() / other.grad.norm())
        assert distance <= 1e-3, f"{name}: {distance}"


# The layer's own parameters


@pytest.mark.parametrize("learn", [False, True])
def test_gradients_of_a_layers_parameters(learn: bool) -> None:
    A, B, _, U, b, x = (t.detach() for t in factors(5))
    layer = eq.MonDEQ.from_factors(A, B, 0.4, U, b, learn_margin=learn, activation="softplus", **TIGHT)
    names = [name for name, _ in layer.named_parameters()]
    values = [p.detach().clone().requires_grad_() for p in layer.parameters()]
    assert ("recurrent.raw_margin" in names) == learn

    def run(*tensors: Tensor) -> Any:
        return torch.func.functional_call(layer, dict(zip(names, tensors, strict=True)), (x,))

    assert torch.autograd.gradcheck(run, values, atol=1e-6, rtol=1e-5, fast_mode=True)


def test_training_lowers_a_loss_and_keeps_the_margin() -> None:
    torch.manual_seed(1)
    layer = eq.MonDEQ(4, 10, margin=0.3, learn_margin=True)
    head = nn.Linear(10, 1)
    x = torch.randn(64, 4)
    y = x.prod(1, keepdim=True)
    optimizer = torch.optim.Adam([*layer.parameters(), *head.parameters()], lr=1e-2)
    losses = []
    for _ in range(60):
        optimizer.zero_grad()
        loss = (head(layer(x)) - y).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]
    assert layer.operator.margin() > 0


def test_retain_graph_and_accumulation() -> None:
    A, B, _, U, b, x = (t.detach() for t in factors(6))
    layer = eq.MonDEQ.from_factors(A, B, 0.4, U, b)
    z = layer(x)
    z.sum().backward(retain_graph=True)
    once = [p.grad.clone() for p in layer.parameters() if p.grad is not None]
    z.sum().backward()
    for parameter, first in zip(layer.parameters(), once, strict=True):
        torch.testing.assert_close(parameter.grad, 2 * first)
    with pytest.raises(RuntimeError, match="second time"):
        z.sum().backward()


def test_only_what_is_asked_for_gets_a_gradient() -> None:
    A, B, _, U, b, x = (t.detach() for t in factors(7))
    layer = eq.MonDEQ.from_factors(A, B, 0.4, U, b)
    assert not layer(x).detach().requires_grad
    with torch.no_grad():
        assert not layer(x).requires_grad
    for parameter in layer.parameters():
        parameter.requires_grad_(False)
    assert not layer(x).requires_grad
    leaf = x.clone().requires_grad_()
    layer(leaf).sum().backward()
    assert leaf.grad is not None
    assert all(parameter.grad is None for parameter in layer.parameters())
    layer.injection.bias.requires_grad_()
    layer(x).sum().backward()
    assert layer.injection.bias.grad is not None
    assert layer.recurrent.A.grad is None


def test_gradient_of_a_batch_is_the_sum_over_its_samples() -> None:
    A, B, _, U, b, _ = (t.detach() for t in factors(8, n=5, d=3))
    layer = eq.MonDEQ.from_factors(A, B, 0.4, U, b, activation="elu", tol=1e-11)
    x = torch.randn(6, 3, dtype=torch.float64)
    together = torch.autograd.grad(layer(x).square().sum(), list(layer.parameters()))
    parts = [torch.autograd.grad(layer(row[None]).square().sum(), list(layer.parameters())) for row in x]
    for k, whole in enumerate(together):
        torch.testing.assert_close(sum(part[k] for part in parts), whole, rtol=1e-8, atol=1e-10)


def test_a_sample_without_a_gradient_is_no_failure() -> None:
    """Rows of zeros in the gradient, and samples whose units are all off, have the adjoint 0."""
    W = torch.tensor([[0.9, 0.4], [-0.4, 0.9]], dtype=torch.float64)
    layer = eq.MonDEQ.from_weights(W, torch.eye(2).double(), torch.zeros(2).double())
    x = torch.tensor([[1.0, 2.0], [-1.0, -1.0], [3.0, 1.0]], dtype=torch.float64, requires_grad=True)
    layer(x)[:2].sum().backward()
    assert x.grad is not None
    assert bool((x.grad[0] != 0).any())
    assert x.grad[1:].tolist() == [[0.0, 0.0], [0.0, 0.0]]


def test_changing_the_weights_before_backward_is_noticed() -> None:
    """The step must not go into the gradient unseen: the right gradient, or torch's own complaint."""
    layer = eq.MonDEQ.from_weights(matrix(4, 0.4, 2), torch.eye(4).double(), torch.zeros(4).double())
    x = torch.randn(2, 4, dtype=torch.float64, requires_grad=True)
    z = layer(x)
    (expected,) = torch.autograd.grad(z.sum(), x, retain_graph=True)
    with torch.no_grad():
        layer.recurrent.weight.mul_(-1)
    try:
        (found,) = torch.autograd.grad(z.sum(), x)
    except RuntimeError as error:
        assert "inplace" in str(error)  # noqa: PT017 - either outcome is right
    else:
        torch.testing.assert_close(found, expected)


def test_gradients_of_quantized_layers_reach_the_input() -> None:
    torch.manual_seed(2)
    layer = eq.MonDEQ(3, 5, margin=0.4).double()
    for scheme in (eq.Assembled(8), eq.Structured(3), eq.Compensated(4, input_bits=4, bias_bits=4), eq.Cayley(8)):
        quantized = eq.quantize(layer, scheme)
        x = torch.randn(2, 3, dtype=torch.float64, requires_grad=True)
        assert torch.autograd.gradcheck(quantized, (x,), atol=1e-6, rtol=1e-5)


def test_the_transposed_problem_has_the_same_contraction() -> None:
    """Forward certified, hence backward certified: the two maps have the same factor (Theorem 5)."""
    operator = eq.MonDEQ.from_weights(matrix(5, 0.3, 1), torch.eye(5).double(), torch.zeros(5).double()).operator
    solver = eq.PeacemanRachford()
    for one in (operator, operator.transposed()):
        tuning = solver.tune(one)
        u, w = torch.randn(50, 5).double(), torch.randn(50, 5).double()
        fixed_point = solver.map(Problem(one, torch.randn(1, 5).double().expand(50, 5), eq.ReLU()), tuning)
        moved = (fixed_point(u).clone() - fixed_point(w)).norm(dim=1)
        assert bool((moved <= tuning.rate * (u - w).norm(dim=1) * (1 + 1e-9)).all())
        assert solver.tune(operator).rate == tuning.rate
