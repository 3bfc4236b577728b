"""The convolutional NEMON layer: one circular matrix, its row sums, its equilibria and gradients (theory §7)."""

from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import equipoise as eq
from equipoise.errors import InputError, OptionError, StructureError
from equipoise.norms import WeightedMax
from equipoise.operators.conv import ConvOperator
from trainings import learns_to_compare


def layer(c: int = 2, channels: int = 3, k: int = 3, seed: int = 0, **options: object) -> eq.NEMONConv2d:
    torch.manual_seed(seed)
    made = eq.NEMONConv2d(c, channels, k, **options).double()  # type: ignore[arg-type]
    with torch.no_grad():
        made.recurrent.d.normal_(std=0.5)
        made.recurrent.T.normal_(std=0.3)
    return made


def dense(operator: ConvOperator) -> Tensor:
    with torch.no_grad():
        return operator.apply(torch.eye(operator.features, dtype=operator.weight.dtype)).mT


@settings(max_examples=25)
@given(st.integers(1, 3), st.sampled_from([1, 3, 5]), st.integers(1, 5), st.integers(1, 5), st.integers(0, 1000))
def test_products_and_row_sums_are_those_of_the_dense_matrix(channels: int, k: int, h: int, w: int, seed: int) -> None:
    made = layer(1, channels, k, seed, gamma=0.8)
    operator = made.operator_for((h, w))
    W = dense(operator)
    z, y = torch.randn(2, 4, operator.features, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    with torch.no_grad():
        torch.testing.assert_close(operator.apply(z), z @ W.mT)
        torch.testing.assert_close(operator.transpose(z), z @ W)
        torch.testing.assert_close(operator.transposed().apply(z), z @ W)
    family = operator.family
    assert isinstance(family, WeightedMax)
    true = family.row_margins(W)
    if min(h, w) >= k:  # no taps fall together
        torch.testing.assert_close(operator.row_margins(), true, rtol=1e-10, atol=1e-10)
    assert bool((operator.row_margins() <= true + 1e-12).all())
    assert operator.margin() == pytest.approx(0.2, abs=1e-6) or operator.margin() > 0.2
    assert operator.norm() >= family.norm(W) * (1 - 1e-12)
    assert operator.lipschitz() >= family.lipschitz(W) * (1 - 1e-12)
    assert operator.absolute_norm() >= float(torch.linalg.matrix_norm(W.abs(), 2)) * (1 - 1e-12)
    assert operator.averaging_step() <= 1 / (1 - min(float(W.diagonal().min()), 0.0)) + 1e-12 or min(h, w) < k
    kernel = operator.weight.detach().clone().requires_grad_()
    (expected,) = torch.autograd.grad(
        (ConvOperator(kernel, (h, w), operator.eta).apply(z) * y).sum(), kernel, create_graph=False
    )
    torch.testing.assert_close(operator.pullback(y, z)[0], expected)


def test_the_published_diagonal_is_not_the_row_sum() -> None:
    made = layer(channels=4, seed=1, gamma=0.5)
    T = made.recurrent.T.detach()
    kernel = T.clone()
    kernel[:, :, 1, 1] += torch.diag(torch.full((4,), 0.5).double() - T.abs().max() * 4)
    published = ConvOperator(kernel, (6, 6), torch.ones(4))
    assert published.margin() < 0 < made.margin()


@pytest.mark.parametrize("activation", [eq.ReLU(), eq.LeakyReLU(0.1), eq.Tanh()], ids=lambda a: a.name)
@pytest.mark.parametrize("solver", [None, eq.Picard(), eq.Anderson()], ids=str)
def test_equilibria_within_their_bound(activation: eq.Activation, solver: eq.Solver | None) -> None:
    made = layer(activation=activation, solver=solver)
    x = torch.randn(3, 2, 5, 4, dtype=torch.float64)
    found = made.solve(x, tol=1e-9)
    assert bool(found.converged.all())
    operator = made.operator_for((5, 4))
    W, q = dense(operator), made.injection(x).detach().flatten(1)
    assert operator.family is not None
    assert isinstance(operator.family, WeightedMax)
    U, b, eta = torch.eye(len(W)).double(), torch.zeros(len(W)).double(), operator.family.eta
    truth = eq.NEMON.from_weights(W, U, b, eta=eta, activation=activation).solve(q, tol=1e-9)
    error = (found.value - truth.value).abs().amax(1)
    assert bool((error <= found.error_bound + truth.error_bound).all())
    torch.testing.assert_close(made(x).flatten(1).detach(), truth.value, rtol=1e-7, atol=1e-8)


def test_float32_stays_within_its_bound() -> None:
    made = layer(seed=2, gamma=0.5)
    small = copy.deepcopy(made).float()
    wide = copy.deepcopy(small).double()
    x = torch.randn(4, 2, 6, 6)
    found, truth = small.solve(x, tol=1e-3), wide.solve(x.double(), tol=1e-10)
    assert bool(((found.value.double() - truth.value).abs().amax(1) <= found.error_bound + 1e-5).all())


def test_gradients_against_finite_differences() -> None:
    made = layer(1, 2, activation=eq.Tanh(), gamma=0.7)
    names = [name for name, _ in made.named_parameters()]

    def value(x: Tensor, *tensors: Tensor) -> Tensor:
        return torch.func.functional_call(made, dict(zip(names, tensors, strict=True)), (x,))

    x = torch.randn(1, 1, 3, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(value, (x, *(p.detach().requires_grad_() for p in made.parameters())), atol=1e-6)


def test_it_trains_in_a_network() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        eq.NEMONConv2d(1, 4, stride=2, gamma=0.8, training_tol=1e-2), nn.AvgPool2d(2), nn.Flatten(), nn.Linear(16, 2)
    )
    x = torch.rand(64, 1, 8, 8)
    y = (x[:, 0, :4].mean((1, 2)) > x[:, 0, 4:].mean((1, 2))).long()
    assert learns_to_compare(model, x, y) > 0.85
    assert model[0].margin() >= 0.2 - 1e-5


@pytest.mark.parametrize(("solver", "factor"), [(eq.Picard, 0.5), (eq.ForwardBackward, 1 - 0.5 * 1.5)])
def test_rates_in_closed_form(solver: type[eq.Solver], factor: float) -> None:
    """W = (1 − m) I with m = 1.5, and α = 0.5 <= 1/m: 1 − α min(m, 1) and 1 − αm."""
    layer = eq.NEMONConv2d(1, 2, gamma=-0.5, solver=solver(alpha=0.5)).double()  # type: ignore[call-arg]
    with torch.no_grad():
        layer.recurrent.T.zero_()
    found = eq.certify(layer)
    assert found.margin == pytest.approx(1.5, rel=1e-12)
    assert found.lipschitz == pytest.approx(1.5, rel=1e-12)
    assert found.rate == pytest.approx(factor, rel=1e-9)


def test_bad_input_is_refused() -> None:
    for options in ({"channels": 0}, {"kernel_size": 2}, {"gamma": 1.0}, {"stride": 0}, {"activation": "gelu"}):
        with pytest.raises(OptionError):
            eq.NEMONConv2d(**{"in_channels": 1, "channels": 2, **options})  # type: ignore[arg-type]
    made = eq.NEMONConv2d(1, 2)
    for x in (torch.zeros(1, 4), torch.zeros(1, 2, 4, 4), torch.zeros(1, 1, 4, 4, dtype=torch.int64)):
        with pytest.raises(InputError):
            made(x)
    with pytest.raises(InputError, match="NaN"):
        made(torch.full((1, 1, 4, 4), torch.nan))
    with pytest.raises(StructureError, match="inverse"):
        made.solve(torch.zeros(1, 1, 4, 4), solver=eq.PeacemanRachford())
    assert made(torch.zeros(0, 1, 4, 4)).shape == (0, 2, 4, 4)
