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
from equipoise.activations import Linearized
from equipoise.errors import InputError, NotWellPosedError, OptionError
from equipoise.norms import WeightedMax, WeightedSum, metzler, perron
from equipoise.operators import DenseOperator
from equipoise.parametrizations import Contractive, Weighted, contractive_factors
from equipoise.solvers import Problem, a_posteriori
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


# The norm


@given(st.integers(1, 7), st.integers(0, 10_000), st.floats(0.0, 6.0))
def test_row_bounds_are_above_exact_rationals_and_near_them(n: int, seed: int, spread: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    W = torch.randn(n, n, generator=generator, dtype=torch.float64)
    eta = torch.exp(spread * torch.randn(n, generator=generator, dtype=torch.float64))
    family = WeightedMax(eta)
    exact, eta_max = exact_measures(W, eta), float(eta.max())
    size = float(family.row_norms(W).max())
    for bound, true in zip(family.row_measures(W).tolist(), exact, strict=True):
        assert 0 <= Fraction(bound) - true <= Fraction(1e-13) * (1 + Fraction(size))
    assert Fraction(family.margin(W)) <= 1 - max(exact)
    identity = torch.eye(n, dtype=torch.float64)
    ratios = eta[None, :] / eta[:, None]
    assert family.lipschitz(W) >= float(((identity - W).abs() * ratios).sum(1).max()) * (1 - 1e-12)
    assert family.norm(W) >= float((W.abs() * ratios).sum(1).max()) * (1 - 1e-12)
    assert family.norm(W) <= float((W.abs() * ratios).sum(1).max()) * (1 + 1e-12) + 1e-12
    assert family.reach() == eta_max


def test_an_error_moves_every_row_by_what_it_can() -> None:
    torch.manual_seed(1)
    W, eta, error = torch.randn(5, 5).double(), torch.rand(5).double() + 0.2, 0.03
    family = WeightedMax(eta)
    bound = family.row_measures(W, error)
    for seed in range(200):
        E = torch.randn(5, 5, generator=torch.Generator().manual_seed(seed)).double()
        E = E * (error / torch.linalg.matrix_norm(E, 2))
        assert bool((family.row_measures(W + E) <= bound + 1e-12).all())
    # and the worst row direction reaches it
    worst = error * eta / eta.norm()
    E = torch.zeros(5, 5).double()
    E[2] = worst * torch.where(W[2] < 0, -1.0, 1.0)
    E[2, 2] = worst[2]
    assert float(family.row_measures(W + E)[2]) == pytest.approx(float(bound[2]), abs=1e-10)


@pytest.mark.parametrize(
    "eta", [[1.0, 0.0], [1.0, -1.0], [1.0, math.nan], [1.0, math.inf], [1.0, 1e-150], [1e300, 1e300]]
)
def test_weights_that_are_not_positive_are_refused(eta: list[float]) -> None:
    with pytest.raises(InputError, match="eta"):
        WeightedMax(torch.tensor(eta, dtype=torch.float64))
    with pytest.raises(InputError, match="eta"):
        eq.NEMON.from_weights(
            torch.zeros(2, 2), torch.eye(2), torch.zeros(2), eta=torch.tensor(eta, dtype=torch.float64)
        )


def test_norms_and_their_duals() -> None:
    family = WeightedMax(torch.tensor([1.0, 2.0]))
    x = torch.tensor([[3.0, -8.0], [0.0, 0.0]])
    assert family.of(x).tolist() == [4.0, 0.0]
    assert isinstance(family.dual(), WeightedSum)
    assert family.dual().of(x).tolist() == [19.0, 0.0]
    assert isinstance(family.dual().dual(), WeightedMax)
    W = torch.tensor([[0.2, -1.0], [0.0, 0.5]]).double()
    assert family.dual().margin(W.mT) == family.margin(W) == pytest.approx(-1.2)
    assert family.dual().norm(W.mT) == family.norm(W)
    assert family.dual().lipschitz(W.mT) == family.lipschitz(W)


# The best weights


@given(st.integers(1, 9), st.integers(0, 10_000))
def test_the_perron_vector_reaches_the_spectral_abscissa(n: int, seed: int) -> None:
    W = torch.randn(n, n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    eta, abscissa = perron(W)
    true = float(torch.linalg.eigvals(metzler(W)).real.max())
    assert abscissa == pytest.approx(true, abs=1e-8)
    assert 1 - WeightedMax(eta).margin(W) == pytest.approx(true, abs=1e-6 * (1 + abs(true)))


def test_reducible_majorants_get_positive_weights() -> None:
    W = torch.tensor([[0.5, 3.0, 0.0], [0.0, 0.9, 0.0], [0.0, 0.0, -4.0]]).double()
    eta, abscissa = perron(W)
    assert abscissa == pytest.approx(0.9)
    assert bool((eta > 0).all())
    assert WeightedMax(eta).margin(W) > 0.09
    assert WeightedMax(torch.ones(3)).margin(W) < 0
    made = eq.NEMON.from_weights(W, torch.eye(3).double(), torch.zeros(3).double())
    assert eq.margin(made) > 0.09


def test_large_matrices_use_power_iteration() -> None:
    W = torch.randn(1100, 1100, generator=torch.Generator().manual_seed(3), dtype=torch.float64) * 1e-3
    eta, abscissa = perron(W)
    assert 1 - WeightedMax(eta).margin(W) == pytest.approx(abscissa, abs=1e-4)


def test_matrices_that_lapack_cannot_balance_get_weights_all_the_same() -> None:
    rows = [[0.54, 5e-324, -1.63], [0.26, -677.0, 2.3e-308], [-0.49, 1e300, 5e-324]]
    eta, _ = perron(torch.tensor(rows, dtype=torch.float64))
    WeightedMax(eta)
    graded = torch.triu(torch.full((6, 6), 1e-3).double())
    graded[5, 0] = 1e-100
    eta, abscissa = perron(graded)
    assert abscissa == pytest.approx(1e-3, abs=1e-3)
    assert WeightedMax(eta).margin(graded) > 0.99


def test_weights_without_any_certificate_say_the_abscissa() -> None:
    W = torch.tensor([[0.0, 2.0], [2.0, 0.0]]).double()
    with pytest.raises(NotWellPosedError, match="abscissa of its Metzler majorant is about 2") as error:
        eq.NEMON.from_weights(W, torch.eye(2).double(), torch.zeros(2).double())
    assert error.value.margin == pytest.approx(-1)
    free = eq.NEMON.from_weights(W, torch.eye(2).double(), torch.zeros(2).double(), check=False)
    with pytest.warns(eq.ConvergenceWarning):
        assert bool((free.solve(torch.ones(1, 2).double()).error_bound == math.inf).all())


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
