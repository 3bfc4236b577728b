"""Activations: proximal maps against their definition, derivatives, and the rounding they admit to."""

from __future__ import annotations

import math

import mpmath
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import equipoise as eq
from catalogue import EVERY_ACTIVATION, definition
from equipoise.activations import ACTIVATIONS, Activation, activation_from_dict, as_activation
from equipoise.errors import OptionError
from equipoise.linearized import Linearized
from problems import scalar

ALPHAS = [0.01, 0.3, 1.0, 4.0, 100.0]
DTYPES = [torch.float32, torch.float64]
POINTS = [-40.0, -3.3, -1.05, -0.71, -0.2, -0.05, -1e-9, 0.0, 1e-9, 0.05, 0.2, 0.71, 1.05, 2.2, 3.3, 40.0]

each = pytest.mark.parametrize("activation", EVERY_ACTIVATION, ids=str)
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=["f32", "f64"])


def exact_prox(activation: Activation, v: float, alpha: float) -> mpmath.mpf:
    """σ(t) for the root t of α t + (1 − α) σ(t) = v, by bisection in 50 digits."""
    a, x = mpmath.mpf(alpha), mpmath.mpf(v)
    reach = (abs(x) + 200) * max(1, 1 / a) + 10
    low, high = -reach, reach
    for _ in range(130):
        t = (low + high) / 2
        below = a * t + (1 - a) * scalar(activation, t) < x
        low, high = (t, high) if below else (low, t)
    return scalar(activation, (low + high) / 2)


def penalty(activation: Activation, z: mpmath.mpf) -> mpmath.mpf:
    """The convex f with σ = prox_f: f(z) = ∫ (σ⁻¹(s) − s) ds, integrated by hand; infinite off its domain."""
    log = mpmath.log
    match activation:
        case eq.ReLU():
            return mpmath.mpf(0) if z >= 0 else mpmath.inf
        case eq.LeakyReLU(slope=a):
            return (1 / mpmath.mpf(a) - 1) * z * z / 2 if z < 0 else mpmath.mpf(0)
        case eq.Hardtanh(low=low, high=high):
            return mpmath.mpf(0) if low <= z <= high else mpmath.inf
        case eq.SoftThreshold(threshold=width):
            return width * abs(z)
        case eq.Tanh():
            return z * mpmath.atanh(z) + log(1 - z * z) / 2 - z * z / 2 if abs(z) < 1 else mpmath.inf
        case eq.Sigmoid():
            return z * log(z) + (1 - z) * log(1 - z) - z * z / 2 if 0 < z < 1 else mpmath.inf
        case eq.ELU(scale=s):
            if z >= 0:
                return mpmath.mpf(0)
            return (s + z) * log(1 + z / s) - z - z * z / 2 if z > -s else mpmath.inf
    raise AssertionError(activation)


def minimiser(activation: Activation, v: float, alpha: float) -> float:
    """argmin_z α f(z) + (z − v)²/2 by golden section in 50 digits, which sees f only through its values."""
    ratio = (mpmath.sqrt(5) - 1) / 2
    low, high = mpmath.mpf(-60), mpmath.mpf(61)

    def cost(z: mpmath.mpf) -> mpmath.mpf:
        return alpha * penalty(activation, z) + (z - v) ** 2 / 2

    # a finite point first, so that the section never compares two infinities
    inside = {"Sigmoid": (0, 1), "Tanh": (-1, 1), "Hardtanh": (-1, 1), "ReLU": (0, 60), "ELU": (-1, 60)}
    low, high = (mpmath.mpf(end) for end in inside.get(activation.name, (-60, 61)))
    for _ in range(150):
        x, y = high - ratio * (high - low), low + ratio * (high - low)
        low, high = (low, y) if cost(x) <= cost(y) else (x, high)
    return float((low + high) / 2)


@pytest.mark.parametrize("alpha", [0.3, 1.0, 4.0])
@pytest.mark.parametrize(
    "activation",
    [
        eq.ReLU(),
        eq.LeakyReLU(0.3),
        eq.Tanh(),
        eq.Sigmoid(),
        eq.ELU(),
        eq.Hardtanh(),
        eq.SoftThreshold(0.7),
    ],
    ids=str,
)
def test_prox_minimises_its_penalty(activation: Activation, alpha: float) -> None:
    points = [-3.3, -0.2, 0.4, 2.2]
    found = activation.prox(torch.tensor(points, dtype=torch.float64), alpha).tolist()
    expected = [minimiser(activation, v, alpha) for v in points]
    assert found == pytest.approx(expected, abs=1e-9)


@each_dtype
@pytest.mark.parametrize("alpha", ALPHAS)
@each
def test_prox_solves_its_equation(activation: Activation, alpha: float, dtype: torch.dtype) -> None:
    v = torch.tensor(POINTS, dtype=dtype)
    found = activation.prox(v, alpha)
    assert found.dtype == dtype
    assert found.shape == v.shape
    exact = [float(exact_prox(activation, x, alpha)) for x in v.tolist()]
    eps = torch.finfo(dtype).eps
    allowed = 8 * eps * max(1.0, alpha) * (1 + v.double().abs())
    error = (found.double() - torch.tensor(exact, dtype=torch.float64)).abs()
    assert bool((error <= allowed).all()), f"off by {float((error / allowed).max())} times the tolerance"


@each_dtype
@pytest.mark.parametrize("alpha", ALPHAS)
@each
def test_reflection(activation: Activation, alpha: float, dtype: torch.dtype) -> None:
    v = torch.randn(5, 7, dtype=dtype) * 3
    kept = v.clone()
    expected = 2 * activation.prox(v, alpha) - v
    out = torch.full_like(v, 7.0)
    torch.testing.assert_close(activation.reflect(v, alpha), expected)
    returned = activation.reflect(v, alpha, out=out)
    torch.testing.assert_close(returned, expected)
    assert returned.data_ptr() == out.data_ptr()
    assert torch.equal(v, kept)


@each
def test_prox_at_one_is_the_activation(activation: Activation) -> None:
    v = torch.randn(50, dtype=torch.float64) * 4
    torch.testing.assert_close(activation.prox(v, 1.0), activation(v), rtol=1e-14, atol=1e-15)


@each
def test_activation_is_its_definition(activation: Activation) -> None:
    v = torch.tensor(POINTS, dtype=torch.float64)
    expected = torch.tensor([float(scalar(activation, x)) for x in POINTS], dtype=torch.float64)
    torch.testing.assert_close(activation(v), expected, rtol=1e-15, atol=0)


@each_dtype
@each
def test_derivative_is_the_slope(activation: Activation, dtype: torch.dtype) -> None:
    points = [-4.03, -2.21, -0.93, -0.52, -0.21, -0.03, 0.04, 0.22, 0.53, 0.94, 1.7, 2.6]  # no kink is near
    v = torch.tensor(points, dtype=dtype)
    step = mpmath.mpf(10) ** -12
    expected = [float((scalar(activation, x + step) - scalar(activation, x - step)) / (2 * step)) for x in v.tolist()]
    found = activation.derivative(v)
    assert found.dtype == dtype
    torch.testing.assert_close(
        found.double(), torch.tensor(expected, dtype=torch.float64), rtol=0, atol=8 * torch.finfo(dtype).eps
    )


@each_dtype
@each
@given(values=st.lists(st.floats(allow_nan=False, allow_infinity=False, width=32), min_size=2, max_size=20))
def test_slopes_lie_in_the_unit_interval(activation: Activation, dtype: torch.dtype, values: list[float]) -> None:
    v = torch.tensor(sorted(values), dtype=dtype)
    slope = activation.derivative(v)
    assert float(slope.min()) >= 0
    assert float(slope.max()) <= 1
    p = activation(v)
    rounding = activation.evaluation_error(p)
    slack = 2 * (rounding if isinstance(rounding, Tensor) else torch.zeros_like(p)) + torch.finfo(dtype).eps * v.abs()
    rise, run = p.diff(), v.diff()
    between = slack[1:] + slack[:-1]
    assert bool((rise >= -between).all())  # non-decreasing,
    assert bool((rise <= run + between).all())  # and not faster than v


@each
def test_derivative_at_a_kink_lies_between_the_slopes_beside_it(activation: Activation) -> None:
    kinks = definition(activation).kinks(activation) or (0.0,)
    v = torch.tensor(kinks, dtype=torch.float64)
    left, here, right = (activation.derivative(v + shift) for shift in (-1e-9, 0.0, 1e-9))
    assert bool((here >= torch.minimum(left, right) - 1e-8).all())
    assert bool((here <= torch.maximum(left, right) + 1e-8).all())


def spread(dtype: torch.dtype) -> Tensor:
    """Random and extreme arguments: tiny ones, denormals, where e^v over- and underflows, huge ones."""
    info = torch.finfo(dtype)
    end = -math.log(info.tiny)  # 87.3 or 708.4
    ladder = torch.logspace(-44 if dtype == torch.float32 else -320, 30, 300, dtype=torch.float64)
    near = torch.linspace(end - 12, end + 42, 200, dtype=torch.float64)
    some = torch.cat([torch.randn(400, dtype=torch.float64) * 5, ladder, near])
    return torch.cat([some, -some]).to(dtype)


@each_dtype
@each
def test_evaluation_error_bounds_the_rounding(activation: Activation, dtype: torch.dtype) -> None:
    v = spread(dtype)
    p = activation(v)
    bound = activation.evaluation_error(p)
    limits = bound.double().tolist() if isinstance(bound, Tensor) else [bound] * len(v)
    broken = []
    for x, y, limit in zip(v.tolist(), p.tolist(), limits, strict=True):
        error = float(abs(mpmath.mpf(y) - scalar(activation, x)))
        if error > limit:
            broken.append((x, y, error, limit))
    assert not broken, f"{len(broken)} of {len(v)}, e.g. (v, computed, error, bound) = {broken[0]} and {broken[-1]}"


# The activation of the backward problem


@pytest.mark.parametrize("alpha", ALPHAS)
def test_linearized(alpha: float) -> None:
    D = torch.tensor([[0.0, 1e-3, 0.25, 0.9, 1.0], [1.0, 0.0, 0.5, 0.1, 0.7]], dtype=torch.float64)
    v = torch.randn(2, 5, dtype=torch.float64)
    activation = Linearized(D)
    torch.testing.assert_close(activation(v), D * v)
    torch.testing.assert_close(activation.derivative(v), D)
    p = activation.prox(v, alpha)
    # p = D t with α t + (1 − α) p = v; where D = 0 the proximal map of an indicator, p = 0
    torch.testing.assert_close(D * (v - (1 - alpha) * p), alpha * p)
    assert bool((p[D == 0] == 0).all())
    out = torch.empty_like(v)
    torch.testing.assert_close(activation.reflect(v, alpha, out=out), 2 * p - v)
    assert out is activation.reflect(v, alpha, out=out)
    torch.testing.assert_close(activation.reflect(v, alpha), 2 * p - v)


def test_linearized_relu_reflects_by_signs() -> None:
    slopes = eq.ReLU().derivative(torch.tensor([[-1.0, 2.0, 0.0]]))
    v = torch.tensor([[3.0, 5.0, 7.0]])
    for alpha in ALPHAS:
        assert Linearized(slopes).reflect(v, alpha).tolist() == [[-3.0, 5.0, -7.0]]


# Names and options


@each
def test_round_trip_through_a_dict(activation: Activation) -> None:
    assert activation_from_dict(activation.to_dict()) == activation


def test_every_activation_by_name() -> None:
    for name, kind in ACTIVATIONS.items():
        assert as_activation(name) == kind()
        assert as_activation(name.upper()) == kind()
        assert kind().name == name
        assert getattr(eq, name) is kind
    relu = eq.LeakyReLU(0.2)
    assert as_activation(relu) is relu


@pytest.mark.parametrize("value", ["gelu", "SiLU", "", "relu6", None, 3, torch.relu, torch.nn.ReLU(), eq.ReLU])
def test_unknown_activations_are_refused(value: object) -> None:
    with pytest.raises(OptionError, match="unknown activation") as caught:
        as_activation(value)
    assert "Softplus" in str(caught.value)  # what there is instead


@pytest.mark.parametrize("fields", [{}, {"name": "gelu"}, {"slope": 0.1}, {"name": None}, {"name": ["ReLU"]}])
def test_dicts_of_nobody_are_refused(fields: dict[str, object]) -> None:
    with pytest.raises(OptionError, match="unknown activation"):
        activation_from_dict(fields)


def test_dicts_with_foreign_options_are_refused() -> None:
    with pytest.raises(OptionError, match="threshold"):
        activation_from_dict({"name": "ReLU", "threshold": 1.0})


@pytest.mark.parametrize(
    ("make", "value"),
    [
        (lambda: eq.LeakyReLU(-0.1), "-0.1"),
        (lambda: eq.LeakyReLU(1.5), "1.5"),
        (lambda: eq.LeakyReLU(math.nan), "nan"),
        (lambda: eq.ELU(0.0), "0.0"),
        (lambda: eq.ELU(1.01), "1.01"),
        (lambda: eq.Hardtanh(1.0, -1.0), "1.0"),
        (lambda: eq.Hardtanh(0.5, 0.5), "0.5"),
        (lambda: eq.SoftThreshold(-2.0), "-2.0"),
        (lambda: eq.SoftThreshold(math.nan), "nan"),
    ],
)
def test_options_that_make_no_proximal_map_are_refused(make: object, value: str) -> None:
    assert callable(make)
    with pytest.raises(OptionError, match=value):
        make()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_limits_beyond_a_dtype_are_infinite_in_it(dtype: torch.dtype) -> None:
    v = torch.tensor([-3.0, 0.0, 3.0], dtype=dtype)
    assert eq.Hardtanh(-1.0, 1e200)(v).tolist() == [-1.0, 0.0, 3.0]
    assert eq.Hardtanh(-1e200, 1.0).prox(v, 0.5).tolist() == [-3.0, 0.0, 1.0]
    assert eq.SoftThreshold(1e200)(v).tolist() == [0.0, 0.0, 0.0]
    assert eq.Hardtanh(1e200, 2e200).fixes_zero is False
    layer = eq.NEMON(2, 3, activation=eq.Hardtanh(0.0, 1e200)).to(dtype)
    assert bool(torch.isfinite(layer(torch.ones(1, 2, dtype=dtype))).all())


@pytest.mark.parametrize("name", [name for name, kind in ACTIVATIONS.items() if kind.prox is Activation.prox])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_steps_that_change_nothing_are_left_out(name: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    v = torch.cat([torch.randn(50) * size for size in (1e-6, 1.0, 1e3)] + [torch.tensor([torch.nan, torch.inf, -0.0])])
    activation, found = ACTIVATIONS[name](), {}
    for whole in (False, True):
        monkeypatch.setattr(torch.compiler, "is_compiling", lambda whole=whole: whole)
        found[whole] = [activation.prox(v.to(dtype), alpha) for alpha in (0.01, 0.3, 0.999, 2.5, 40.0)]
    for short, long in zip(found[False], found[True], strict=True):
        torch.testing.assert_close(short, long, rtol=0, atol=0, equal_nan=True)
