"""The layer itself: how it is built, what it refuses, what it promises in floating point, and published numbers."""

from __future__ import annotations

import inspect
import math
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import Tensor

import equipoise as eq
from equipoise.errors import ConvergenceWarning, EquipoiseError, InputError, NotWellPosedError, OptionError
from problems import equilibrium, matrix, true_margin


def free(W: Tensor, **options: Any) -> eq.MonDEQ:
    eye = torch.eye(len(W), dtype=W.dtype)
    return eq.MonDEQ.from_weights(W, eye, torch.zeros(len(W), dtype=W.dtype), **options)


# Building


def test_from_factors_is_the_formula() -> None:
    A, B, U, b = (torch.randn(s, dtype=torch.float64) for s in ((2, 5), (5, 5), (5, 3), (5,)))
    layer = eq.MonDEQ.from_factors(A, B, 0.3, U, b, activation="tanh")
    W = 0.7 * torch.eye(5, dtype=torch.float64) - A.mT @ A + B - B.mT
    torch.testing.assert_close(layer.weight, W)
    assert torch.equal(layer.input_weight, U)
    assert torch.equal(layer.bias, b)
    assert (layer.in_features, layer.features) == (3, 5)
    assert {p.dtype for p in layer.parameters()} == {torch.float64}
    assert layer.operator.margin() == pytest.approx(0.3, abs=1e-12)  # rank 2 < 5: attained
    assert all(p.requires_grad for p in layer.parameters())
    assert "Tanh" in repr(layer)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_from_weights_keeps_the_matrix(dtype: torch.dtype) -> None:
    W = matrix(4, 0.4, 1).to(dtype)
    layer = free(W)
    assert torch.equal(layer.weight, W)
    assert layer.weight.dtype == dtype
    assert true_margin(W) - 1e-12 <= layer.operator.margin() <= true_margin(W) + 1e-14
    W.zero_()
    assert float(layer.weight.detach().abs().sum()) > 0  # copied


def test_the_equilibrium_is_one() -> None:
    for activation in ("relu", "leakyrelu", "tanh", "sigmoid", "softplus", "elu", "hardtanh", "softthreshold"):
        layer = eq.MonDEQ(4, 9, rank=3, activation=activation).double()
        x = torch.randn(5, 4, dtype=torch.float64)
        z = layer(x)
        again = layer.activation(z @ layer.weight.mT + x @ layer.input_weight.mT + layer.bias)
        torch.testing.assert_close(z, again, rtol=1e-9, atol=1e-10)


def test_the_solution_has_the_documented_shapes() -> None:
    layer = eq.MonDEQ(4, 9)
    x = torch.randn(5, 4)
    solution = layer.solve(x, tol=1e-4)
    assert isinstance(solution, eq.Solution)
    assert (solution.value.shape, solution.value.dtype) == ((5, 9), torch.float32)
    assert (solution.converged.shape, solution.converged.dtype) == ((5,), torch.bool)
    assert (solution.steps.shape, solution.steps.dtype) == ((5,), torch.int64)
    for field in (solution.residual, solution.error_bound, solution.truncation):
        assert (field.shape, field.dtype) == ((5,), torch.float64)
    assert not solution.value.requires_grad
    again = solution.value @ layer.weight.mT + x @ layer.input_weight.mT + layer.bias
    torch.testing.assert_close(solution.value, again.relu(), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_an_empty_batch_is_empty(dtype: torch.dtype) -> None:
    layer = eq.MonDEQ(4, 9).to(dtype)
    none = torch.zeros(0, 4, dtype=dtype, requires_grad=True)
    z = layer(none)
    assert z.shape == (0, 9)
    assert z.dtype == dtype
    z.sum().backward()
    assert none.grad is not None
    solution = layer.solve(none)
    assert solution.value.shape == (0, 9)
    assert solution.converged.shape == solution.steps.shape == solution.error_bound.shape == (0,)
    assert solution.converged.dtype == torch.bool


def test_one_unit_one_input() -> None:
    layer = eq.MonDEQ.from_factors(
        torch.zeros(0, 1), torch.zeros(1, 1), 0.5, torch.tensor([[2.0]]), torch.tensor([1.0])
    )
    assert layer(torch.tensor([[3.0], [-1.0]])).tolist() == [[pytest.approx(14.0, rel=1e-5)], [0.0]]


# Tolerance of forward


@pytest.mark.parametrize("solver", [eq.PeacemanRachford(), eq.ForwardBackward(), eq.Tseng(), eq.Anderson()], ids=str)
@pytest.mark.parametrize("tol", [1e-3, 1e-7])
@pytest.mark.parametrize("seed", [7, 12, 21])
def test_forward_keeps_its_tolerance(seed: int, solver: eq.Solver, tol: float) -> None:
    """By an estimate, not by a bound: hence a factor of three, also where ‖W‖ is about 30."""
    W = matrix(5, 0.5, seed, gain=1.5)
    layer = free(W, tol=tol, solver=solver).eval()
    q = torch.randn(40, 5, dtype=torch.float64)
    answer = equilibrium(W, q, eq.ReLU())
    size = answer.norm(dim=1)
    error = (layer(q).detach() - answer).norm(dim=1)[size > 0] / size[size > 0]
    assert float(error.max()) <= 3 * tol


# Bounds in floating point


@given(
    seed=st.integers(0, 10**6),
    n=st.integers(1, 5),
    d=st.integers(1, 8),
    size=st.sampled_from([1e-8, 1.0, 1e4, 1e9]),
    margin=st.sampled_from([0.05, 0.5, 2.0]),
    tol=st.sampled_from([1e-1, 1e-3, 1e-6]),
    double=st.booleans(),
)
def test_single_precision_stays_within_its_bound(
    seed: int, n: int, d: int, size: float, margin: float, tol: float, double: bool
) -> None:
    """Against the float64 answer for the stored float32 numbers; x may come in float64 and be rounded."""
    torch.manual_seed(seed)
    W = matrix(n, margin, seed, gain=0.4).float()
    if true_margin(W) < 0.01:
        return
    U, b = torch.randn(n, d), torch.randn(n)
    x = torch.randn(4, d, dtype=torch.float64) * size
    x = x if double else x.float()
    layer = eq.MonDEQ.from_weights(W, U, b)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        solution = layer.solve(x, tol=tol)
    answer = equilibrium(W, x.double() @ U.double().mT + b.double(), eq.ReLU())
    error = (solution.value.double() - answer).norm(dim=1)
    assert bool((error <= solution.error_bound).all())
    kept = solution.truncation <= tol * solution.value.double().norm(dim=1)
    assert torch.equal(solution.converged, kept)


@pytest.mark.parametrize("cast", [False, True])
def test_rounding_of_the_injection_is_in_the_bound(cast: bool) -> None:
    """U x cancels to a small q: what is lost on the way is far above the rounding of everything after it."""
    torch.manual_seed(0)
    half, large = torch.randn(4, 150), torch.randn(6, 150, dtype=torch.float64) * 1e4
    U = torch.cat([half, -half], 1)
    x = torch.cat([large, large + 1e-2 * torch.randn(6, 150, dtype=torch.float64)], 1)
    x = x if cast else x.float()
    W, b = matrix(4, 0.5, 2, gain=0.3).float(), torch.ones(4)
    solution = eq.MonDEQ.from_weights(W, U, b).solve(x, tol=1e-5)
    answer = equilibrium(W, x.double() @ U.double().mT + b.double(), eq.ReLU())
    error = (solution.value.double() - answer).norm(dim=1)
    assert float(error.max()) > 1e-4  # the case is what it claims to be
    assert bool((error <= solution.error_bound).all())


@pytest.mark.parametrize("scheme", [eq.Assembled(8), eq.Structured(2), eq.Compensated(4), eq.Cayley(8)], ids=str)
@pytest.mark.parametrize("bits", [None, 4])
def test_quantized_layers_stay_within_their_bound(scheme: Any, bits: int | None) -> None:
    """Against the equilibrium of the codes, in float64."""
    torch.manual_seed(3)
    layer = eq.MonDEQ(6, 8, rank=3, margin=0.5)
    scheme = type(scheme)(scheme.bits, input_bits=bits, bias_bits=bits)
    quantized = eq.quantize(layer, scheme)
    x = torch.randn(20, 6) * torch.logspace(-3, 6, 20)[:, None]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        solution = quantized.solve(x, tol=1e-6)
    W, e = quantized.recurrent.assemble()
    assert e < 1e-12
    U, b = quantized.injection.weight, quantized.injection.bias
    U, b = (t.dequantize() if hasattr(t, "codes") else t.detach().double() for t in (U, b))
    answer = equilibrium(W, x.double() @ U.mT + b, eq.ReLU())
    assert bool(((solution.value.double() - answer).norm(dim=1) <= solution.error_bound).all())


# Bad input


def message_of(kind: type[EquipoiseError], call: Any, *words: str) -> EquipoiseError:
    with pytest.raises(kind) as caught:
        call()
    for word in words:
        assert word in str(caught.value), f"{word!r} is not in {str(caught.value)!r}"
    return caught.value


LAYER: dict[str, Any] = {"in_features": 3, "features": 4}
CALLS = {"forward": lambda layer, x: layer(x), "solve": lambda layer, x: layer.solve(x)}
each_call = pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)


@each_call
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_inputs_that_are_not_finite(call: Any, bad: float) -> None:
    x = torch.randn(5, 3)
    x[1, 2] = bad
    x[4, 0] = bad
    message_of(InputError, lambda: call(eq.MonDEQ(**LAYER), x), "2 of 5", "NaN or infinite", "isfinite")


@each_call
@pytest.mark.parametrize("shape", [(3,), (2, 4), (2, 3, 1), (), (3, 2)])
def test_inputs_of_another_shape(call: Any, shape: tuple[int, ...]) -> None:
    message_of(InputError, lambda: call(eq.MonDEQ(**LAYER), torch.zeros(shape)), str(shape), "(batch, 3)", "Flatten")


@each_call
@pytest.mark.parametrize("dtype", [torch.int64, torch.bool, torch.complex64])
def test_inputs_of_another_type(call: Any, dtype: torch.dtype) -> None:
    message_of(InputError, lambda: call(eq.MonDEQ(**LAYER), torch.zeros(2, 3).to(dtype)), str(dtype), ".float()")


@each_call
def test_inputs_that_are_no_tensors(call: Any) -> None:
    message_of(InputError, lambda: call(eq.MonDEQ(**LAYER), [[1.0, 2.0, 3.0]]), "list", "(batch, 3)")


@each_call
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_layers_of_low_precision(call: Any, dtype: torch.dtype) -> None:
    layer = eq.MonDEQ(**LAYER).to(dtype)
    message_of(InputError, lambda: call(layer, torch.zeros(2, 3, dtype=dtype)), str(dtype), "float32")


@each_call
@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("name", ["recurrent.A", "recurrent.B", "injection.weight", "injection.bias"])
@pytest.mark.parametrize("used", [False, True])
def test_weights_that_are_not_finite(call: Any, name: str, bad: float, used: bool) -> None:
    """A typed error, whether or not the layer has been used before it was spoiled."""
    layer, x = eq.MonDEQ(**LAYER), torch.randn(2, 3)
    if used:
        layer(x)
    layer.get_parameter(name).data.flatten()[1] = bad
    message_of(InputError, lambda: call(layer, x), "NaN or infinite", "weights")


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("which", [0, 1, 2])
def test_from_weights_that_are_not_finite(which: int, bad: float) -> None:
    tensors = [torch.zeros(4, 4), torch.ones(4, 3), torch.ones(4)]
    tensors[which].flatten()[0] = bad
    message_of(InputError, lambda: eq.MonDEQ.from_weights(*tensors), "WUb"[which], "1 NaN or infinite")
    if which == 0:
        message_of(
            InputError,
            lambda: eq.MonDEQ.from_factors(torch.full((2, 4), bad), torch.zeros(4, 4), 0.5, *tensors[1:]),
            "NaN or infinite",
        )


@pytest.mark.parametrize("scale", [1.0, 1.5, 100.0])
def test_from_weights_without_a_margin(scale: float) -> None:
    W = torch.eye(3) * scale
    error = message_of(
        NotWellPosedError,
        lambda: eq.MonDEQ.from_weights(W, torch.ones(3, 2), torch.zeros(3)),
        f"{1 - scale:.3g}"[:3],
        "check=False",
    )
    assert isinstance(error, NotWellPosedError)
    assert 1 - scale - 1e-9 <= error.margin <= 1 - scale
    unchecked = eq.MonDEQ.from_weights(W, torch.ones(3, 2), torch.zeros(3), check=False)
    assert unchecked.operator.margin() <= 1 - scale


@pytest.mark.parametrize(
    ("W", "U", "b"),
    [
        ((3, 4), (3, 2), (3,)),
        ((3,), (3, 2), (3,)),
        ((3, 3), (2, 3), (3,)),
        ((3, 3), (3,), (3,)),
        ((3, 3), (3, 2), (2,)),
    ],
)
def test_from_weights_of_shapes_that_do_not_fit(W: Any, U: Any, b: Any) -> None:
    tensors = [torch.zeros(shape) for shape in (W, U, b)]
    with pytest.raises(InputError, match="needed"):
        eq.MonDEQ.from_weights(*tensors)


def test_from_weights_of_integers() -> None:
    W = torch.zeros(3, 3, dtype=torch.int64)
    message_of(InputError, lambda: eq.MonDEQ.from_weights(W, torch.zeros(3, 2), torch.zeros(3)), "int64")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"rank": 5}, ("rank is 5", "n = 4")),
        ({"rank": -1}, ("rank is -1", "n = 4")),
        ({"margin": 0.0}, ("margin is 0.0", "above 0")),
        ({"margin": -0.3}, ("margin is -0.3", "above 0")),
        ({"margin": math.nan}, ("margin is nan",)),
        ({"in_features": 0}, ("in_features is 0", "positive")),
        ({"in_features": 2.5}, ("in_features is 2.5",)),
        ({"features": -4}, ("features is -4", "positive")),
        ({"features": True}, ("features is True",)),
        ({"activation": "gelu"}, ("'gelu'", "Softplus")),
        ({"activation": torch.nn.Tanh}, ("unknown activation",)),
        ({"solver": "newton"}, ("'newton'", "PeacemanRachford")),
        ({"solver": eq.PeacemanRachford}, ("solver is",)),
        ({"tol": 0.0}, ("tol is 0.0",)),
        ({"tol": 2}, ("tol is 2",)),
        ({"backward_tol": -1e-3}, ("tol is -0.001",)),
    ],
    ids=str,
)
def test_options_out_of_range(options: dict[str, Any], words: tuple[str, ...]) -> None:
    message_of(OptionError, lambda: eq.MonDEQ(**{**LAYER, **options}), *words)


def test_options_nobody_knows() -> None:
    weights = torch.zeros(4, 4), torch.zeros(4, 3), torch.zeros(4)
    with pytest.raises(TypeError, match="activatoin"):
        eq.MonDEQ(**LAYER, activatoin="relu")
    for unknown in ("activatoin", "margin", "learn_margin", "rank"):  # W has no structure that could keep a margin
        with pytest.raises((TypeError, OptionError), match=unknown):
            eq.MonDEQ.from_weights(*weights, **{unknown: 1})
    for unknown in ("activatoin", "rank"):
        with pytest.raises((TypeError, OptionError), match=unknown):
            eq.MonDEQ.from_factors(torch.zeros(1, 4), weights[0], 0.5, *weights[1:], **{unknown: 1})
    with pytest.raises(TypeError, match="tolerance"):
        eq.MonDEQ(**LAYER).solve(torch.zeros(1, 3), tolerance=1e-3)  # type: ignore[call-arg]


def test_no_positive_margin_and_no_inverse() -> None:
    """W = 2 I makes I + α(I − W) singular at α = 1: a typed error with the margin, not LAPACK's."""
    layer = free(2 * torch.eye(3), check=False)
    error = message_of(NotWellPosedError, lambda: layer(torch.ones(1, 3)), "ForwardBackward")
    assert isinstance(error, NotWellPosedError)
    assert error.margin == pytest.approx(-1.0)


def test_defaults_are_the_documented_ones() -> None:
    signature = inspect.signature(eq.MonDEQ)
    default = {name: parameter.default for name, parameter in signature.parameters.items()}
    assert (default["activation"], default["solver"]) == (eq.ReLU(), eq.PeacemanRachford())
    assert default["rank"] is None
    assert not any(p.kind is p.VAR_KEYWORD for p in signature.parameters.values())
    layer = eq.MonDEQ(**LAYER)
    assert layer.recurrent.A.shape == (4, 4)
    assert layer.activation == eq.ReLU()


# The published checkpoint


@pytest.fixture(scope="module")
def published(shared_reference: Path) -> eq.MonDEQ:
    stored = load_file(shared_reference)
    margin = float(torch.nn.functional.softplus(stored["m_raw"].double())) + 1e-4
    return eq.MonDEQ.from_factors(stored["A"], stored["S"], margin, stored["U"], stored["b"])


def test_published_numbers(published: eq.MonDEQ) -> None:
    operator = published.operator
    m, L = operator.margin(), operator.lipschitz()
    assert m == pytest.approx(0.226887, abs=5e-7)
    assert pytest.approx(1.845263, abs=5e-7) == L
    assert L / m == pytest.approx(8.13297, abs=2e-5)
    assert operator.norm() == pytest.approx(1.715768, abs=5e-7)
    assert m <= true_margin(published.weight.detach())
    assert operator.norm() / m == pytest.approx(7.56, abs=5e-3)


def test_published_rate_and_steps(published: eq.MonDEQ) -> None:
    operator = published.operator
    alpha = operator.best_alpha()
    assert operator.cayley_norm(alpha) == pytest.approx(0.859, abs=2e-3)
    assert operator.cayley_norm(alpha) <= operator.cayley_norm(0.8) + 1e-3
    x = torch.randn(64, 784, generator=torch.Generator().manual_seed(0))
    solution = published.solve(x, tol=1e-4)
    assert bool(solution.converged.all())
    assert int(solution.steps.max()) <= 60
    answer = published.double().solve(x.double(), tol=1e-12)
    error = (solution.value.double() - answer.value).norm(dim=1)
    assert bool((error <= solution.error_bound + answer.error_bound).all())
    assert bool((error <= 1.1e-4 * answer.value.norm(dim=1)).all())
    published.float()
