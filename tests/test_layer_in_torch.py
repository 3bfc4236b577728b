"""The layer as a citizen of torch: copies, states, casts, autocast, compile, and caches that are never stale."""

from __future__ import annotations

import copy
import io
import pickle
import shutil
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import equipoise as eq
from equipoise.operators import DenseOperator
from equipoise.parametrizations import Monotone
from equipoise.solvers import Problem
from equipoise.solvers.peaceman_rachford import PeacemanRachfordMap
from problems import equilibrium, matrix

X = torch.linspace(-2, 2, 12).view(4, 3)


def make(seed: int = 0, margin: float = 0.4, learn: bool = False, **options: Any) -> eq.MonDEQ:
    torch.manual_seed(seed)
    return eq.MonDEQ(3, 6, rank=3, margin=margin, learn_margin=learn, **options)


def truth(layer: eq.MonDEQ, x: Tensor = X) -> Tensor:
    """z* in float64 for the numbers the layer holds, by enumeration."""
    weight, U, b = (t.detach().double() for t in (layer.weight, layer.input_weight, layer.bias))
    return equilibrium(weight, x.double() @ U.mT + b, layer.activation)


def off(found: Tensor, expected: Tensor) -> float:
    return float((found.detach().double() - expected.double()).norm() / expected.double().norm())


# State


def test_state_keys_are_the_documented_ones() -> None:
    fixed = {"recurrent.A", "recurrent.B", "recurrent.margin", "injection.weight", "injection.bias"}
    learned = fixed - {"recurrent.margin"} | {"recurrent.raw_margin"}
    dense = {"recurrent.weight", "injection.weight", "injection.bias"}
    assert set(make().state_dict()) == fixed
    assert set(make(learn=True).state_dict()) == learned
    layer = eq.MonDEQ.from_weights(torch.zeros(2, 2), torch.zeros(2, 3), torch.zeros(2))
    assert set(layer.state_dict()) == dense
    layer(torch.zeros(1, 3))
    layer.solve(torch.zeros(1, 3), tol=1e-5)
    assert set(layer.state_dict()) == dense  # solving adds nothing


@pytest.mark.parametrize("learn", [False, True])
def test_state_dict_round_trip(learn: bool) -> None:
    source, target = make(1, 0.7, learn), make(2, 0.2, learn)
    target(X)  # caches of the old weights
    buffer = io.BytesIO()
    torch.save(source.state_dict(), buffer)
    buffer.seek(0)
    target.load_state_dict(torch.load(buffer, weights_only=True))
    assert torch.equal(target.weight, source.weight)
    target.eval()
    source.eval()
    assert torch.equal(target(X), source(X))
    assert target.operator.margin() == source.operator.margin()


@pytest.mark.parametrize("learn", [False, True])
def test_a_wrong_state_is_refused(learn: bool) -> None:
    with pytest.raises(RuntimeError, match="margin"):
        make(learn=learn).load_state_dict(make(learn=not learn).state_dict())


def through_pickle(layer: eq.MonDEQ) -> eq.MonDEQ:
    copied: eq.MonDEQ = pickle.loads(pickle.dumps(layer))
    return copied


@pytest.mark.parametrize("clone", [copy.deepcopy, through_pickle])
@pytest.mark.parametrize("used", [False, True])
def test_copies_are_equal_and_independent(clone: Callable[[eq.MonDEQ], eq.MonDEQ], used: bool) -> None:
    layer = make(activation=eq.LeakyReLU(0.3), solver=eq.Anderson(memory=3)).eval()
    if used:
        layer(X).sum().backward()
        layer.solve(X, tol=1e-5)
    other = clone(layer)
    assert torch.equal(other(X), layer(X))
    assert other.activation == layer.activation
    assert other.solver == layer.solver
    before = layer(X).detach()
    with torch.no_grad():
        other.recurrent.B.mul_(3)
        other.injection.bias.add_(1)
    assert torch.equal(layer(X).detach(), before)
    assert off(other(X), truth(other)) < 1e-4


def test_copies_of_quantized_layers() -> None:
    layer = eq.quantize(make(), eq.Structured(3, input_bits=4, bias_bits=8))
    layer(X)
    for other in (copy.deepcopy(layer), through_pickle(layer)):
        assert torch.equal(other(X), layer(X))


def test_casting() -> None:
    layer = make()
    low = layer(X).detach()
    layer.double()
    assert {p.dtype for p in layer.parameters()} == {torch.float64}
    high = layer(X.double()).detach()
    assert high.dtype == torch.float64
    assert off(high, truth(layer)) < 1e-10
    assert off(low, truth(layer)) < 1e-4
    assert layer(X).dtype == torch.float64  # the layer's dtype decides
    layer.to(torch.float32)
    assert layer(X.double()).dtype == torch.float32
    assert layer.solve(X, tol=1e-5).value.dtype == torch.float32


def test_casting_a_quantized_layer() -> None:
    layer = eq.quantize(make(), eq.Structured(3))
    margin = layer.operator.margin()
    before = truth(layer.double())
    assert off(layer(X.double()), before) < 1e-10
    assert layer.operator.margin() >= margin - 1e-12
    layer.float()
    assert off(layer(X), before) < 1e-4


def test_inside_a_sequential() -> None:
    model = nn.Sequential(nn.Flatten(), make(), nn.Linear(6, 2))
    loss = model(X.view(4, 3, 1)).square().mean()
    loss.backward()
    assert all(p.grad is not None and bool(torch.isfinite(p.grad).all()) for p in model.parameters())


# Autocast and compile


def test_autocast_leaves_the_equilibrium_alone() -> None:
    plain, layer = make().eval(), make().eval()
    expected = torch.autograd.grad(plain(X).square().sum(), list(plain.parameters()))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        z = layer(X)
        solution = layer.solve(X, tol=1e-5)
    found = torch.autograd.grad(z.square().sum(), list(layer.parameters()))
    assert z.dtype == torch.float32
    assert off(z, truth(layer)) < 1e-4
    assert off(solution.value, truth(layer)) < 2e-5
    for one, other in zip(found, expected, strict=True):
        assert off(one, other) < 1e-5


def test_autocast_accepts_what_autocast_makes() -> None:
    model = nn.Sequential(nn.Linear(5, 3), make())
    x = torch.randn(4, 5)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        model(x).sum().backward()  # the linear layer hands over bfloat16
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in model.parameters())


@pytest.mark.parametrize("graph", [True, False])
def test_constants_asked_for_under_autocast_are_of_the_stored_weights(graph: bool) -> None:
    layer, fresh = make(), make()
    with torch.set_grad_enabled(graph):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            constants = layer.operator.margin(), layer.operator.lipschitz(), layer.operator.norm()
            weight = layer.weight
        assert constants == (fresh.operator.margin(), fresh.operator.lipschitz(), fresh.operator.norm())
        assert torch.equal(weight, fresh.weight)
        assert layer.operator.margin() == fresh.operator.margin()  # and nothing wrong was kept
        assert torch.equal(layer.solve(X, tol=1e-5).value, fresh.solve(X, tol=1e-5).value)


@pytest.mark.skipif(not any(shutil.which(name) for name in ("cc", "gcc", "clang")), reason="no C compiler")
def test_a_step_compiles_without_a_graph_break() -> None:
    operator = DenseOperator(matrix(5, 0.4, 1).float())
    solver = eq.PeacemanRachford()
    fixed_point = solver.map(Problem(operator, torch.randn(3, 5), eq.ReLU()), solver.tune(operator))
    assert isinstance(fixed_point, PeacemanRachfordMap)
    u = torch.randn(3, 5)
    expected = fixed_point(u).clone()
    torch._dynamo.reset()
    compiled = torch.compile(lambda t: fixed_point(t), fullgraph=True)
    torch.testing.assert_close(compiled(u), expected)


@pytest.mark.parametrize("activation", ["relu", "tanh", "softthreshold"])
def test_a_step_traces_without_a_graph_break(activation: str) -> None:
    operator = DenseOperator(matrix(5, 0.4, 1).float())
    solver = eq.PeacemanRachford()
    problem = Problem(operator, torch.randn(3, 5), eq.activations.as_activation(activation))
    fixed_point = solver.map(problem, solver.tune(operator))
    u = torch.randn(3, 5)
    expected = fixed_point(u).clone()
    torch._dynamo.reset()
    compiled = torch.compile(lambda t: fixed_point(t), fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(u), expected)


def test_a_compiled_model_agrees_with_itself() -> None:
    torch._dynamo.reset()
    layer = make().eval()
    model = nn.Sequential(layer, nn.Linear(6, 2))
    compiled = torch.compile(model, backend="eager")
    expected = torch.autograd.grad(model(X).square().sum(), list(model.parameters()))
    found = torch.autograd.grad(compiled(X).square().sum(), list(model.parameters()))
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


# Caches


def step(layer: eq.MonDEQ) -> None:
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.5)
    layer(X.to(layer.injection.bias.dtype)).square().sum().backward()
    optimizer.step()


def by_data(layer: eq.MonDEQ) -> None:
    layer.recurrent.B.data.mul_(6)  # hidden from the version counter
    layer.injection.weight.data.neg_()


def by_margin(layer: eq.MonDEQ) -> None:
    layer.recurrent.margin.data.fill_(0.3)  # smaller, and forward–backward's κ² steps exceed its budget
    layer.recurrent.B.data.mul_(4)


def by_state(layer: eq.MonDEQ) -> None:
    state = {key: value.clone() for key, value in make(9, 0.1).state_dict().items()}
    state["recurrent.B"] *= 3
    layer.load_state_dict(state)


def by_replacing(layer: eq.MonDEQ) -> None:
    layer.recurrent.B = nn.Parameter(layer.recurrent.B.detach() * 6)


def by_numpy(layer: eq.MonDEQ) -> None:
    layer.recurrent.B.detach().numpy()[:] *= 6  # shares memory, tells nobody


CHANGES = [step, by_data, by_margin, by_state, by_replacing, by_numpy]
SOLVERS = [eq.PeacemanRachford(), eq.ForwardBackward(), eq.Tseng(), eq.Anderson(), eq.Picard()]


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_constants_follow_the_weights(change: Callable[[eq.MonDEQ], None]) -> None:
    layer = make(3, 1.0)
    layer(X)
    layer.solve(X, tol=1e-5)
    before = layer.operator.margin(), layer.operator.lipschitz()
    change(layer)
    fresh = make(3, 1.0)
    fresh.load_state_dict(layer.state_dict())
    after = layer.operator.margin(), layer.operator.lipschitz()
    assert after != before
    assert after == (fresh.operator.margin(), fresh.operator.lipschitz())
    with torch.no_grad():
        assert torch.equal(layer.operator.weight, fresh.weight)
    found, expected = layer.solve(X, tol=1e-3), fresh.solve(X, tol=1e-3)
    assert torch.equal(found.value, expected.value)
    assert torch.equal(found.error_bound, expected.error_bound)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("solver", SOLVERS[:-1], ids=lambda s: type(s).__name__)
@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_answers_follow_the_weights(change: Callable[[eq.MonDEQ], None], solver: eq.Solver, training: bool) -> None:
    """Also in training, where steps are reused: what worked for the old weights must not spoil the new ones."""
    x, tol = X.double(), 1e-8
    layer = make(3, 1.0, solver=solver, tol=tol).double().train(training)
    layer(x)
    change(layer)
    z = layer(x)  # a warning would be an error
    assert off(z, truth(layer)) < 20 * tol
    fresh = make(3, 1.0, solver=solver, tol=tol).double().eval()
    fresh.load_state_dict(layer.state_dict())
    for one, other in zip(
        torch.autograd.grad(z.sum(), list(layer.parameters())),
        torch.autograd.grad(fresh(x).sum(), list(fresh.parameters())),
        strict=True,
    ):
        assert off(one, other) < 1000 * tol


class Halved(Monotone):
    def forward(self) -> Tensor:
        return 0.5 * super().forward()


def by_class(layer: eq.MonDEQ) -> None:
    layer.recurrent.__class__ = Halved


def by_sharing(layer: eq.MonDEQ) -> None:
    old, layer.recurrent = layer.recurrent, Halved(6, 3, 1.0)
    layer.recurrent.A, layer.recurrent.B, layer.recurrent.margin = old.A, old.B, old.margin


@pytest.mark.parametrize("change", [by_class, by_sharing], ids=lambda change: change.__name__)
def test_the_very_same_tensors_may_mean_another_matrix(change: Callable[[eq.MonDEQ], None]) -> None:
    layer = make(3, 1.0)
    layer.solve(X)
    change(layer)
    fresh = copy.deepcopy(layer)
    assert torch.equal(layer.solve(X).value, fresh.solve(X).value)
    with torch.no_grad():
        assert torch.equal(layer.operator.weight, layer.recurrent())
        assert layer.operator.margin() == fresh.operator.margin()


def test_input_weights_are_not_cached_either() -> None:
    layer = eq.quantize(make(), eq.Structured(4, input_bits=6, bias_bits=6)).eval()
    layer(X)
    layer.solve(X, tol=1e-5)
    layer.injection.weight.scale.mul_(2)
    layer.injection.bias.scale.mul_(3)
    assert off(layer(X), truth(layer)) < 1e-4
    solution = layer.solve(X, tol=1e-5)
    assert bool(((solution.value.double() - truth(layer)).norm(dim=1) <= solution.error_bound).all())


def test_inference_mode_leaves_nothing_behind_that_training_cannot_use() -> None:
    layer = make()
    for parameter in layer.parameters():
        parameter.requires_grad_(False)
    with torch.inference_mode():
        layer(X)
        layer.solve(X, tol=1e-5)
    x = X.clone().requires_grad_()
    (first,) = torch.autograd.grad(layer(x).square().sum(), x, create_graph=True)
    first.square().sum().backward()
    assert x.grad is not None
    for parameter in layer.parameters():
        parameter.requires_grad_(True)
    layer(X).sum().backward()
    assert layer.recurrent.A.grad is not None


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("training", [True, False])
def test_without_gradients_the_weights_are_assembled_once(mode: Callable[[], Any], training: bool) -> None:
    layer, calls = make().train(training), []
    layer.recurrent.register_forward_hook(lambda *_: calls.append(1))
    with mode():
        for _ in range(4):
            assert not layer(X).requires_grad
            assert not layer.operator.weight.requires_grad
    for _ in range(2):
        layer.solve(X, tol=1e-5)  # differentiates nothing, whatever the mode around it
    assert len(calls) == 1
    layer(X).sum().backward()
    assert layer.recurrent.A.grad is not None
