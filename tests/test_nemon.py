"""NEMON: weights with a measure below 1 by construction, solves with bounds that hold, gradients (theory §7)."""

from __future__ import annotations

import copy
import math
import pickle
from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import equipoise as eq
from equipoise.errors import InputError, NotWellPosedError, OptionError
from equipoise.linearized import Linearized
from equipoise.norms import WeightedMax
from equipoise.operators import DenseOperator
from equipoise.parametrizations import Contractive, Weighted, contractive_factors
from equipoise.solvers import Problem, a_posteriori, solve
from problems import equilibrium, matrix, scalar

ACTIVATIONS = [
    eq.ReLU(), eq.LeakyReLU(0.2), eq.Tanh(), eq.Sigmoid(), eq.Softplus(), eq.ELU(), eq.Hardtanh(), eq.SoftThreshold(0.2)
]  # fmt: skip
SOLVERS = [
    eq.Picard(), eq.ForwardBackward(), eq.PeacemanRachford(), eq.DouglasRachford(), eq.Anderson(), eq.Broyden(),
    eq.Anderson(on=eq.ForwardBackward()),
]  # fmt: skip


def layer(n: int = 6, d: int = 4, seed: int = 0, gamma: float = 0.9, **options: object) -> eq.NEMON:
    """A float64 layer with random weights, d included."""
    torch.manual_seed(seed)
    made = eq.NEMON(d, n, gamma=gamma, **options).double()
    with torch.no_grad():
        made.recurrent.d.normal_(std=0.7)
        made.recurrent.T.normal_(std=0.6)
    return made


def exact_measures(W: Tensor, eta: Tensor) -> list[Fraction]:
    rows = []
    for i, row in enumerate(W.double().tolist()):
        weights = [Fraction(e) for e in eta.double().tolist()]
        off = sum((abs(Fraction(w)) * weights[j] for j, w in enumerate(row) if j != i), Fraction(0))
        rows.append(Fraction(row[i]) + off / weights[i])
    return rows


# The weights


@given(st.integers(1, 8), st.integers(0, 10_000), st.floats(-2.0, 0.99), st.floats(0.0, 3.0))
def test_every_factor_gives_a_measure_of_at_most_gamma(n: int, seed: int, gamma: float, spread: float) -> None:
    torch.manual_seed(seed)
    weights = Contractive.from_factors(torch.randn(n, n).double() * 3, torch.randn(n).double() * spread, gamma)
    W, eta = weights().detach(), weights.family().eta
    assert max(exact_measures(W, eta)) <= gamma + 1e-9 * (1 + float(W.abs().max()))
    assert WeightedMax(eta).margin(W) >= 1 - gamma - 1e-9 * (1 + float(W.abs().max()))


@given(st.integers(1, 8), st.integers(0, 10_000))
def test_the_right_inverse_gives_back_any_member(n: int, seed: int) -> None:
    torch.manual_seed(seed)
    W, eta = torch.randn(n, n).double(), torch.rand(n).double() + 0.1
    gamma = 1 - WeightedMax(eta).margin(W)
    T = contractive_factors(W, eta, gamma)
    again = T * (eta[:, None] / eta[None, :]) + torch.diag(gamma - T.abs().sum(1))
    torch.testing.assert_close(again, W, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("gamma", [1.0, 1.5, math.nan, math.inf, "much", None])
def test_gamma_of_1_or_more_is_refused(gamma: object) -> None:
    with pytest.raises(OptionError, match=r"below 1"):
        eq.NEMON(3, 4, gamma=gamma)  # type: ignore[arg-type]
    with pytest.raises(OptionError, match=r"below 1"):
        eq.NEMON.from_factors(torch.eye(2), torch.zeros(2), gamma, torch.eye(2), torch.zeros(2))  # type: ignore[arg-type]


def test_a_learned_gamma_starts_where_it_was_told_and_stays_below_1() -> None:
    made = eq.NEMON(3, 4, gamma=0.9, learn_gamma=True)
    assert float(made.recurrent.current_gamma().detach()) == pytest.approx(0.9, abs=1e-6)
    with torch.no_grad():
        made.recurrent.raw_gap.fill_(-100.0)
    assert float(made.recurrent.current_gamma().detach()) < 1
    assert eq.margin(made) > 0
    with pytest.raises(OptionError, match="starts below"):
        eq.NEMON(3, 4, gamma=0.9999, learn_gamma=True)


@pytest.mark.parametrize("activation", ["gelu", "silu", eq.ReLU, 3])
def test_an_activation_with_other_slopes_is_refused(activation: object) -> None:
    with pytest.raises(OptionError, match="slopes in"):
        eq.NEMON(3, 4, activation=activation)  # type: ignore[arg-type]
    with pytest.raises(OptionError):
        eq.NEMON(3, 4, activation=eq.LeakyReLU(1.5))


# Solving


@pytest.mark.parametrize("solver", SOLVERS, ids=lambda s: type(s).__name__)
@pytest.mark.parametrize("activation", ACTIVATIONS, ids=lambda a: a.name)
def test_solvers_find_the_equilibrium_within_their_bound(activation: eq.Activation, solver: eq.Solver) -> None:
    made = layer(n=4, d=3, seed=5, activation=activation)
    x = torch.randn(6, 3, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    solution = made.solve(x, solver=solver, tol=1e-10)
    assert bool(solution.converged.all())
    W, q = made.weight.detach(), made.injection(x).detach()
    for row in range(len(x)):
        v = q[row] + W @ solution.value[row]
        residual = max(abs(float(scalar(activation, float(v[i]))) - float(solution.value[row, i])) for i in range(4))
        assert residual < 1e-8
    reference = made.solve(x, tol=1e-12)
    error = (solution.value - reference.value).abs().amax(1)
    assert bool((error <= solution.error_bound + reference.error_bound).all())


@settings(max_examples=25)
@given(st.integers(1, 4), st.integers(0, 10_000), st.floats(-1.0, 0.99))
def test_the_bound_of_any_point_holds(n: int, seed: int, gamma: float) -> None:
    made = layer(n=n, d=2, seed=seed, gamma=gamma)
    generator = torch.Generator().manual_seed(seed)
    W = made.weight.detach()
    q, w = (torch.randn(4, n, generator=generator, dtype=torch.float64) for _ in range(2))
    truth = equilibrium(W, q, eq.ReLU())
    with torch.no_grad():
        found = a_posteriori(Problem(made.operator, q, eq.ReLU()), w)
    error = (found.value - truth).abs().amax(1)
    assert bool((error <= found.error_bound + 1e-11).all())
    assert bool((found.truncation <= found.error_bound).all())


def test_the_bound_is_met_where_one_row_decides() -> None:
    W = torch.tensor([[0.5]]).double()
    found = a_posteriori(
        Problem(DenseOperator(W, family=WeightedMax(torch.ones(1))), torch.tensor([[1.0]]).double(), eq.ReLU()),
        torch.zeros(1, 1).double(),
    )
    assert float(found.value) == 1.0  # the equilibrium is 2: |W e|/(1 − μ) = 0.5/0.5
    assert float(found.error_bound) == pytest.approx(1.0, abs=1e-11)


def test_the_averaged_factor_is_never_exceeded_in_its_norm() -> None:
    for seed in range(20):
        made = layer(seed=seed)
        operator, solver = made.operator, eq.Picard()
        tuning = solver.tune(operator)
        assert tuning.alpha == pytest.approx(1 / (1 - min(float(made.weight.detach().diagonal().min()), 0.0)))
        assert tuning.rate == pytest.approx(1 - tuning.alpha * 0.1, abs=1e-7)
        for kind in (solver, eq.ForwardBackward(), eq.PeacemanRachford(), eq.PeacemanRachford(tuning.alpha)):
            found = kind.tune(operator)
            generator = torch.Generator().manual_seed(seed)
            u, v, q = (torch.randn(64, 6, generator=generator, dtype=torch.float64) for _ in range(3))
            with torch.no_grad():
                T = kind.map(Problem(operator, q, made.activation), found)
                shrunk, apart = T.length(T(u.clone()) - T(v.clone())), T.length(u - v)
            assert found.rate is not None
            assert bool((shrunk <= found.rate * apart * (1 + 1e-12)).all()), type(kind).__name__


@pytest.mark.parametrize("solver", SOLVERS[:4], ids=lambda s: type(s).__name__)
def test_the_backward_factor_is_never_exceeded_in_the_dual_norm(solver: eq.Solver) -> None:
    made = layer(seed=3)
    operator = made.operator.transposed()
    tuning = solver.tune(made.operator)
    generator = torch.Generator().manual_seed(1)
    u, v, g = (torch.randn(64, 6, generator=generator, dtype=torch.float64) for _ in range(3))
    slopes = torch.rand(64, 6, generator=generator, dtype=torch.float64).round(decimals=1)
    with torch.no_grad():
        T = solver.map(Problem(operator, g, Linearized(slopes)), tuning)
        shrunk, apart = T.length(T(u.clone()) - T(v.clone())), T.length(u - v)
    assert tuning.rate is not None
    assert bool((shrunk <= tuning.rate * apart * (1 + 1e-12)).all())


def test_float32_answers_stay_within_their_bound_and_meet_tight_tolerances() -> None:
    made = layer(n=50, d=20, seed=1, gamma=0.9)
    x = torch.randn(200, 20, generator=torch.Generator().manual_seed(4))
    small = copy.deepcopy(made).float()
    wide = copy.deepcopy(small).double()
    # the float32 layer's own W, not that of its factors in float64
    exact = eq.NEMON.from_weights(
        small.weight.detach().double(), small.input_weight.detach().double(), small.bias.detach().double(),
        eta=small.norm.eta,
    )  # fmt: skip
    truth = exact.solve(x.double(), tol=1e-9)
    for tol in (1e-3, 1e-5, 1e-6):
        found = small.solve(x, tol=tol)
        assert bool(found.converged.all())
        error = (found.value.double() - truth.value).abs().amax(1)
        assert bool((error <= found.error_bound + truth.error_bound).all())
        assert bool((found.truncation <= tol * found.value.double().abs().amax(1) * (1 + 1e-6)).all())
    assert eq.margin(wide) == pytest.approx(0.1, abs=1e-7)


def test_a_gain_that_float32_cannot_hold_is_no_failure() -> None:
    problem = Problem(DenseOperator(torch.tensor([[0.5]])), torch.ones(3, 1), eq.ReLU())
    solver = eq.PeacemanRachford()
    tuning = solver.tune(problem.operator)._replace(gain=1e300)
    found = solve(solver, problem, tuning, 1e-6, "bound")
    assert bool(found.converged.all())
    torch.testing.assert_close(found.value, torch.full((3, 1), 2.0))


def test_a_sample_does_not_depend_on_its_batch() -> None:
    made = layer(n=30, d=10, seed=2).float()
    x = torch.randn(64, 10)
    whole = made.solve(x).value
    alone = torch.cat([made.solve(row[None]).value for row in x])
    torch.testing.assert_close(whole, alone, rtol=1e-5, atol=1e-6)


def test_all_inputs_zero_features_one_and_empty_batches() -> None:
    made = eq.NEMON(1, 1)
    assert made(torch.zeros(0, 1)).shape == (0, 1)
    assert made.solve(torch.zeros(0, 1)).value.shape == (0, 1)
    assert made(torch.zeros(3, 1)).shape == (3, 1)


# Gradients


@pytest.mark.parametrize(
    ("activation", "solver"),
    [*((a, eq.Picard()) for a in ACTIVATIONS[1:6]), *((eq.LeakyReLU(0.2), s) for s in SOLVERS[1:5])],
    ids=lambda v: type(v).__name__,
)
def test_gradients_against_finite_differences(activation: eq.Activation, solver: eq.Solver) -> None:
    made = layer(n=3, d=2, seed=7, activation=activation, solver=solver, learn_gamma=True)
    names = [name for name, _ in made.named_parameters()]
    assert {"recurrent.T", "recurrent.d", "recurrent.raw_gap"} <= set(names)

    def value(x: Tensor, *tensors: Tensor) -> Tensor:
        return torch.func.functional_call(made, dict(zip(names, tensors, strict=True)), (x,))

    x = torch.randn(2, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(value, (x, *(p.detach().requires_grad_() for p in made.parameters())), atol=1e-6)


def test_gradients_equal_unrolled_ones() -> None:
    made = layer(n=8, d=3, seed=9)
    x = torch.randn(5, 3, dtype=torch.float64)
    weights = torch.randn(8, dtype=torch.float64)
    (made(x) @ weights).sum().backward()
    found = {name: p.grad.clone() for name, p in made.named_parameters()}
    made.zero_grad()
    z = torch.zeros(5, 8, dtype=torch.float64)
    W, q = made.weight, made.injection(x)
    for _ in range(2000):
        z = 0.8 * z + 0.2 * torch.relu(z @ W.mT + q)
    (z @ weights).sum().backward()
    for name, p in made.named_parameters():
        torch.testing.assert_close(found[name], p.grad, rtol=1e-8, atol=1e-10, msg=name)


def test_second_derivatives() -> None:
    made = layer(n=3, d=2, seed=4, activation=eq.Tanh())
    x = torch.randn(2, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradgradcheck(made, (x,), atol=1e-6)


# As a module


def test_it_copies_pickles_and_loads_like_any_module() -> None:
    made = layer()
    x = torch.randn(3, 4, dtype=torch.float64)
    for other in (copy.deepcopy(made), pickle.loads(pickle.dumps(made))):
        torch.testing.assert_close(other(x), made(x))
    fresh = eq.NEMON(4, 6, gamma=0.9).double()
    fresh.load_state_dict(made.state_dict())
    torch.testing.assert_close(fresh(x), made(x))
    assert set(made.state_dict()) == {
        "recurrent.T", "recurrent.d", "recurrent.gamma", "injection.weight", "injection.bias"
    }  # fmt: skip


def test_a_layer_of_any_weights_is_certified_by_the_family_that_proves_it() -> None:
    W = torch.tensor([[0.0, 1.9], [-0.3, 0.0]], dtype=torch.float64)  # ‖sym W‖ = 0.8; the plain row sum is 1.9
    made = eq.NEMON.from_weights(W, torch.eye(2).double(), torch.zeros(2).double())
    assert eq.margin(made) == pytest.approx(1 - math.sqrt(1.9 * 0.3), abs=1e-7)
    wide = matrix(4, 0.5, 3)
    with pytest.raises(NotWellPosedError):
        eq.NEMON.from_weights(
            wide - wide.mT + 0.4 * torch.eye(4).double(), torch.eye(4).double(), torch.zeros(4).double()
        )


def test_wrong_shapes_are_refused() -> None:
    T, d, U, b = torch.eye(2), torch.zeros(2), torch.eye(2), torch.zeros(2)
    with pytest.raises(InputError):
        eq.NEMON.from_factors(T, torch.zeros(3), 0.5, U, b)
    with pytest.raises(InputError):
        eq.NEMON.from_factors(torch.ones(2, 3), d, 0.5, U, b)
    with pytest.raises(InputError):
        eq.NEMON.from_factors(T, d, 0.5, torch.ones(3, 2), b)
    with pytest.raises(InputError, match="eta is"):
        eq.NEMON.from_weights(T / 2, U, b, eta=torch.ones(3))
    with pytest.raises(OptionError, match="takes no gamma"):
        eq.NEMON.from_weights(T / 2, U, b, gamma=0.5)
    with pytest.raises(InputError, match="NaN"):
        eq.NEMON.from_weights(T * math.nan, U, b)
    with pytest.raises(OptionError, match="features"):
        eq.NEMON(0, 4)
    with pytest.raises(InputError):
        Weighted(T, torch.tensor([1.0, -1.0]))


def test_it_sits_in_a_network_and_trains() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(eq.NEMON(4, 16), nn.Linear(16, 2))
    x = torch.randn(64, 4)
    y = (x[:, 0] > 0).long()
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    for _ in range(60):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()
    assert float((model(x).argmax(1) == y).float().mean()) > 0.9
    assert eq.margin(model) >= 0.05 - 1e-5
