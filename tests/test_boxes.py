"""Boxes, classes and radii: no sampled point of any box ever leaves what is proved (theory §7, [D22])."""

from __future__ import annotations

import copy
import itertools
import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import equipoise as eq
from equipoise.activations import Activation, Mirrored
from equipoise.certificates.boxes import Box, affine_box
from equipoise.certificates.robustness import reach_of_inputs
from equipoise.data import Preprocessing, Split
from equipoise.errors import InputError, NotWellPosedError, OptionError, StructureError
from equipoise.layers.box import box_equilibrium, doubled
from equipoise.norms import WeightedMax, metzler
from equipoise.robust import worst_scores
from problems import matrix
from test_nemon import ACTIVATIONS, layer

PIXELS = Preprocessing(mean=0.3, std=0.5, scale=255.0, input_shape=(2, 3))


def network(n: int = 10, d: int = 6, seed: int = 0, gamma: float = 0.8, **options: Any) -> nn.Sequential:
    made = layer(n=n, d=d, seed=seed, gamma=gamma, **options)
    return nn.Sequential(made, nn.Linear(n, 3).double())


def images(count: int, seed: int = 0) -> Tensor:
    pixels = torch.rand(count, 6, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return (pixels - 0.3) / 0.5


def samples(low: Tensor, high: Tensor, count: int, seed: int = 0) -> Tensor:
    """Corners, edges and inner points ``(count, B, d)``."""
    generator = torch.Generator().manual_seed(seed)
    inner = torch.rand(count, *low.shape, generator=generator, dtype=torch.float64)
    inner[: count // 2] = inner[: count // 2].round()
    inner[count // 2 :: 3] = (2 * inner[count // 2 :: 3] - 0.5).clamp(0, 1)
    return low + inner * (high - low)


# Boxes


@pytest.mark.parametrize("activation", ACTIVATIONS, ids=lambda a: a.name)
@pytest.mark.parametrize("bits", [None, 3])
def test_no_point_of_a_box_leaves_its_image(activation: Activation, bits: int | None) -> None:
    model = network(activation=activation, seed=len(activation.name))
    model = model if bits is None else eq.quantize(model, eq.Structured(bits, input_bits=bits, head_bits=4))
    x = torch.randn(8, 6, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    for eps in (0.0, 0.1, 1.0):
        box = eq.interval(model, x - eps, x + eps)
        assert bool(torch.isfinite(box.low + box.high).all())
        points = samples(x - eps, x + eps, 30)
        with torch.no_grad():
            out = model[1](model[0].solve(points.reshape(-1, 6), tol=1e-9, stop="residual").value)
        out = out.reshape(30, 8, 3)
        assert bool(((out >= box.low - 1e-7) & (out <= box.high + 1e-7)).all())


@settings(max_examples=30)
@given(st.integers(0, 10_000), st.integers(1, 6), st.floats(-1.0, 0.95), st.floats(0.0, 2.0))
def test_state_boxes_hold_and_are_the_limit_of_the_iteration(seed: int, n: int, gamma: float, eps: float) -> None:
    made = layer(n=n, d=3, seed=seed, gamma=gamma)
    x = torch.randn(4, 3, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    box = eq.interval(made, x - eps, x + eps)
    points = samples(x - eps, x + eps, 40, seed)
    z = made.solve(points.reshape(-1, 3), tol=1e-10, stop="residual").value.reshape(40, 4, n)
    assert bool(((z >= box.low - 1e-9) & (z <= box.high + 1e-9)).all())
    W = made.weight.detach()
    plus = W.clamp_min(0) + torch.diag(W.diagonal().clamp_max(0))
    minus = W - plus
    U, b = made.input_weight.detach(), made.bias.detach()
    q_lo = (x - eps) @ U.clamp_min(0).mT + (x + eps) @ U.clamp_max(0).mT + b
    q_hi = (x + eps) @ U.clamp_min(0).mT + (x - eps) @ U.clamp_max(0).mT + b
    lo, hi = torch.zeros(4, n).double(), torch.zeros(4, n).double()
    alpha = made.operator.averaging_step()
    for _ in range(20_000):
        new_lo = (1 - alpha) * lo + alpha * torch.relu(lo @ plus.mT + hi @ minus.mT + q_lo)
        new_hi = (1 - alpha) * hi + alpha * torch.relu(hi @ plus.mT + lo @ minus.mT + q_hi)
        done = float((new_lo - lo).abs().max() + (new_hi - hi).abs().max()) < 1e-14
        lo, hi = new_lo, new_hi
        if done:
            break
    size = 1 + float(hi.abs().max())
    assert bool((box.low <= lo + 1e-10 * size).all())
    assert bool((box.high >= hi - 1e-10 * size).all())
    # the iteration stops at 1e-5, and the rest is what inflating costs
    assert float((lo - box.low).max()) < 1e-2 * size
    assert float((box.high - hi).max()) < 1e-2 * size


@pytest.mark.slow
def test_a_hundred_thousand_points() -> None:
    model = network(n=40, seed=3).float()
    x = images(10).float()
    box = eq.interval(model, x - 0.1, x + 0.1)
    violated = 0
    for seed in range(10):
        points = samples(x.double() - 0.1, x.double() + 0.1, 1000, seed)
        with torch.no_grad():
            z = model[0].double().solve(points.reshape(-1, 6), tol=1e-8, stop="residual").value
            out = model[1].double()(z).reshape(1000, 10, 3)
        violated += int((~((out >= box.low) & (out <= box.high))).sum())
    assert violated == 0


def test_a_quantized_float32_layer_is_enclosed_as_stored_and_as_multiplied() -> None:
    model = network().float()
    q = eq.quantize(model, eq.Structured(2))
    x = images(20).float()
    box = eq.interval(q, x, x)
    with torch.no_grad():
        assert bool(box.contains(copy.deepcopy(q).double()(x.double())).all())
    assert float((box.high - box.low).max()) < 1e-3


def test_a_monotone_layer_is_enclosed_where_some_norm_proves_it() -> None:
    W = matrix(5, 0.5, 2, gain=0.1)
    made = eq.MonDEQ.from_weights(W, torch.randn(5, 3).double(), torch.zeros(5).double())
    assert 1 - float(torch.linalg.eigvals(metzler(W)).real.max()) > 0
    x = torch.randn(4, 3).double()
    box = eq.interval(made, x - 0.1, x + 0.1)
    z = made.solve(samples(x - 0.1, x + 0.1, 50).reshape(-1, 3), tol=1e-10).value.reshape(50, 4, 5)
    assert bool(((z >= box.low) & (z <= box.high)).all())


def test_a_layer_without_such_a_norm_says_the_abscissa() -> None:
    torch.manual_seed(0)
    B = torch.randn(6, 6).double()
    made = eq.MonDEQ.from_weights(B - B.mT, torch.eye(6).double(), torch.zeros(6).double())
    true = float(torch.linalg.eigvals(metzler(B - B.mT)).real.max())
    with pytest.raises(NotWellPosedError, match=rf"abscissa of its Metzler majorant is about {true:.6g}"):
        eq.interval(made, torch.zeros(1, 6), torch.zeros(1, 6))


@pytest.mark.parametrize(
    "module", [nn.ReLU(), nn.Tanh(), nn.Sigmoid(), nn.Softplus(), nn.Hardtanh(), nn.Flatten(), nn.Dropout()], ids=str
)
def test_modules_on_the_way_are_enclosed(module: nn.Module) -> None:
    model = nn.Sequential(nn.Linear(6, 5).double(), module, layer(n=4, d=5), nn.Identity(), nn.Linear(4, 2).double())
    x = torch.randn(5, 6).double()
    box = eq.interval(model, x - 0.2, x + 0.2)
    with torch.no_grad():
        out = model.eval()(samples(x - 0.2, x + 0.2, 60).reshape(-1, 6)).reshape(60, 5, 2)
    assert bool(((out >= box.low) & (out <= box.high)).all())


@given(st.integers(1, 5), st.integers(1, 5), st.integers(0, 10_000), st.floats(0, 3))
def test_affine_boxes_reach_their_corners_and_not_much_further(k: int, m: int, seed: int, eps: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    W, b, x = (torch.randn(*shape, generator=generator, dtype=torch.float64) for shape in ((m, k), (m,), (2, k)))
    box = affine_box(W, b, eq.Box(x - eps, x + eps))
    corners = torch.stack([x + eps * torch.tensor(signs).double() for signs in itertools.product((-1, 1), repeat=k)])
    out = corners @ W.mT + b
    assert bool((box.low <= out.amin(0)).all())
    assert bool((box.high >= out.amax(0)).all())
    torch.testing.assert_close(box.low, out.amin(0), rtol=1e-12, atol=1e-11)
    torch.testing.assert_close(box.high, out.amax(0), rtol=1e-12, atol=1e-11)


@pytest.mark.parametrize(
    ("low", "high"),
    [
        (torch.ones(1, 2), torch.zeros(1, 2)),
        (torch.full((1, 2), math.nan), torch.zeros(1, 2)),
        (torch.zeros(1, 2), torch.full((1, 2), math.inf)),
        (torch.zeros(1, 2), torch.zeros(2, 2)),
        (torch.zeros(1, 2, dtype=torch.int64), torch.zeros(1, 2)),
    ],
)
def test_bad_boxes_are_refused(low: Tensor, high: Tensor) -> None:
    with pytest.raises(InputError):
        eq.interval(eq.NEMON(2, 3), low, high)


def test_sums_that_overflow_enclose_everything() -> None:
    W, x = torch.tensor([[1.9, 1.9, -1.9]]).double(), torch.full((1, 3), 8e307, dtype=torch.float64)
    box = affine_box(W, torch.zeros(1).double(), Box(x, x))
    assert float(box.low) <= 1.9 * 8e307 <= float(box.high)


def test_a_box_that_is_not_proved_is_infinite() -> None:
    model = network()
    x = torch.full((2, 6), 1e200, dtype=torch.float64)
    x[1] = 0.0
    box = eq.interval(model[0], x, x)
    assert bool((box.low[0] == -math.inf).all())
    assert bool((box.high[0] == math.inf).all())
    assert bool(torch.isfinite(box.low[1] + box.high[1]).all())
    assert eq.certified_classes(model, x, x).tolist()[0] == -1


def test_wider_boxes_enclose_narrower_ones() -> None:
    model = network()
    x = images(5)
    inner, outer = (eq.interval(model, x - e, x + e) for e in (0.1, 0.11))
    assert bool((outer.low <= inner.low).all())
    assert bool((outer.high >= inner.high).all())


# The doubled system


@given(st.integers(1, 6), st.integers(0, 10_000))
def test_the_doubled_matrix_keeps_the_measure(n: int, seed: int) -> None:
    W = torch.randn(n, n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    family, twice = WeightedMax(torch.ones(n)), WeightedMax(torch.ones(2 * n))
    assert twice.margin(doubled(W)) == pytest.approx(family.margin(W), abs=1e-12)


def test_the_mirrored_activation() -> None:
    for activation in ACTIVATIONS:
        mirrored = Mirrored(activation)
        v = torch.randn(7, 6, dtype=torch.float64)
        a, b = v.chunk(2, 1)
        torch.testing.assert_close(mirrored(v), torch.cat((-activation(-a), activation(b)), 1))
        torch.testing.assert_close(
            mirrored.prox(v, 0.3), torch.cat((-activation.prox(-a, 0.3), activation.prox(b, 0.3)), 1)
        )
        torch.testing.assert_close(
            mirrored.derivative(v), torch.cat((activation.derivative(-a), activation.derivative(b)), 1)
        )


def test_boxes_are_differentiable() -> None:
    made = layer(n=3, d=2, seed=5, activation=eq.Tanh())
    low = torch.randn(2, 3, dtype=torch.float64, requires_grad=True)
    high = (low.detach() + 0.5).requires_grad_()

    def ends(low: Tensor, high: Tensor) -> Tensor:
        return torch.cat(box_equilibrium(made, low, high, 1e-12), 1)

    assert torch.autograd.gradcheck(ends, (low, high), atol=1e-6)
    weights = torch.randn(2, 6, dtype=torch.float64)
    (ends(low, high) * weights).sum().backward()
    for p in made.recurrent.parameters():
        direction = torch.randn_like(p)
        values = []
        with torch.no_grad():
            for step in (1e-6, -2e-6):
                p += step * direction
                values.append(float((ends(low, high) * weights).sum()))
            p += 1e-6 * direction
        assert p.grad is not None
        assert (values[0] - values[1]) / 2e-6 == pytest.approx(float((p.grad * direction).sum()), rel=1e-4, abs=1e-6)


# Classes and radii


@pytest.mark.parametrize("bits", [None, 2, 4])
def test_certified_classes_are_those_of_every_sampled_point(bits: int | None) -> None:
    model = network(seed=2)
    model = model if bits is None else eq.quantize(model, eq.Structured(bits))
    x = images(40)
    found = 0
    for eps in (0.01, 0.05, 0.3):
        proved = eq.certified_classes(model, x - eps, x + eps)
        points = samples(x - eps, x + eps, 100)
        with torch.no_grad():
            classes = model(points.reshape(-1, 6)).argmax(1).reshape(100, 40)
        assert bool(((classes == proved) | (proved < 0)).all())
        found += int((proved >= 0).sum())
        assert eps != 0.01 or found > 20
    assert bool((eq.certified_classes(model, x - 100, x + 100) < 0).any())


def test_a_point_is_certified_to_the_class_it_has() -> None:
    model = network(seed=4)
    x = images(30)
    assert torch.equal(eq.certified_classes(model, x, x), model(x).argmax(1))


def test_ties_are_never_certified() -> None:
    model = network()
    with torch.no_grad():
        model[1].weight.zero_()
        model[1].bias.zero_()
    assert bool((eq.certified_classes(model, images(3), images(3)) == -1).all())


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_nothing_within_its_radius_changes_class(norm: str) -> None:
    torch.manual_seed(0)
    monotone = nn.Sequential(eq.MonDEQ(6, 8, margin=0.5), nn.Linear(8, 3)).double()
    model = network(seed=6) if norm == "linf" else monotone
    x = images(50)
    radius = eq.certified_radius(model, x, norm)  # type: ignore[arg-type]
    assert bool((radius > 0).sum() > 25)
    assert bool(torch.isfinite(radius).all())
    base = model(x).argmax(1)
    for seed in range(40):
        d = torch.randn(50, 6, generator=torch.Generator().manual_seed(seed)).double()
        d = d.sign() if norm == "linf" else d / d.norm(dim=1, keepdim=True)
        assert torch.equal(model(x + 0.999 * radius[:, None] * d).argmax(1), base)
    if norm == "linf":  # boxes know at least as much
        assert torch.equal(eq.certified_classes(model, x - 0.99 * radius[:, None], x + 0.99 * radius[:, None]), base)


def test_radii_and_lipschitz_bounds_are_of_the_norm_they_name() -> None:
    model = network()
    with pytest.raises(StructureError, match="linf"):
        eq.certified_radius(model, images(2), "l2")
    with pytest.raises(OptionError, match="norm"):
        eq.certified_radius(model, images(2), "l1")  # type: ignore[arg-type]
    with pytest.raises(OptionError, match="norm"):
        eq.input_lipschitz(model, "l1")  # type: ignore[arg-type]
    with pytest.raises(StructureError, match="linear"):
        eq.certified_radius(nn.Sequential(model[0]), images(2))
    assert eq.input_lipschitz(model, "l2") is None
    assert eq.input_lipschitz(model) == eq.input_lipschitz(model, "linf")
    monotone = eq.MonDEQ(6, 8, margin=0.5)
    assert eq.input_lipschitz(monotone) == eq.input_lipschitz(monotone, "l2")
    through = eq.input_lipschitz(monotone, "linf")
    assert through is not None
    x = torch.randn(200, 6)
    d = torch.randn(200, 6).sign() * 1e-2
    with torch.no_grad():
        moved = (monotone.double()(x.double() + d.double()) - monotone(x.double())).abs().amax(1)
    assert float(moved.max()) <= through * 1e-2


@settings(max_examples=20)
@given(st.integers(0, 10_000), st.floats(-2.0, 0.9))
def test_the_lipschitz_bound_holds_and_is_below_every_row_bound(seed: int, gamma: float) -> None:
    model = network(seed=seed, gamma=gamma)
    bound = eq.input_lipschitz(model)
    made = model[0]
    assert bound is not None
    eta, U, V = made.norm.eta, made.input_weight.detach().abs(), model[1].weight.detach().abs()
    rows = float((V @ eta).max() * (U.sum(1) / eta / made.operator.row_margins()).max())
    assert bound <= rows * (1 + 1e-9)
    assert float(eq.lipschitz_loss(model).detach()) == pytest.approx(rows, rel=1e-6)
    generator = torch.Generator().manual_seed(seed)
    x, d = (torch.randn(100, 6, generator=generator, dtype=torch.float64) for _ in range(2))
    moved = (model(x + d) - model(x)).abs().amax(1) / d.abs().amax(1)
    assert float(moved.detach().max()) <= bound


def test_one_row_reaches_the_lipschitz_bound() -> None:
    made = eq.NEMON.from_weights(
        torch.tensor([[0.5]]).double(), torch.tensor([[3.0]]).double(), torch.zeros(1).double()
    )
    assert eq.input_lipschitz(made) == pytest.approx(6.0, rel=1e-10)
    assert reach_of_inputs(made).tolist() == pytest.approx([6.0])
    negative = eq.NEMON.from_weights(
        torch.tensor([[-1.0]]).double(), torch.tensor([[3.0]]).double(), torch.zeros(1).double()
    )
    assert eq.input_lipschitz(negative) == pytest.approx(1.5, rel=1e-10)


def test_the_lipschitz_loss_has_the_gradient_of_its_value() -> None:
    model = network(seed=3)
    model[0].recurrent.T.data += 0.01
    value = eq.lipschitz_loss(model)
    value.backward()
    for name in ("recurrent.T", "recurrent.d", "injection.weight"):
        p = dict(model[0].named_parameters())[name]
        direction = torch.randn_like(p)
        with torch.no_grad():
            p += 1e-6 * direction
            above = float(eq.lipschitz_loss(model))
            p -= 2e-6 * direction
            below = float(eq.lipschitz_loss(model))
            p += 1e-6 * direction
        assert p.grad is not None
        assert (above - below) / 2e-6 == pytest.approx(float((p.grad * direction).sum()), rel=1e-3, abs=1e-5)
    with pytest.raises(StructureError):
        eq.lipschitz_loss(nn.Sequential(eq.MonDEQ(3, 4), nn.Linear(4, 2)))


# Pixels, attacks, training


def test_balls_are_in_pixels() -> None:
    ball = eq.PixelBall(0.1, PIXELS)
    pixels = torch.tensor([[0.0, 0.05, 0.5, 0.95, 1.0, 0.2]], dtype=torch.float64)
    low, high = ball.box((pixels - 0.3) / 0.5)
    back_low, back_high = low * 0.5 + 0.3, high * 0.5 + 0.3
    torch.testing.assert_close(back_low, torch.tensor([[0.0, 0.0, 0.4, 0.85, 0.9, 0.1]]).double(), atol=1e-5, rtol=0)
    torch.testing.assert_close(back_high, torch.tensor([[0.1, 0.15, 0.6, 1.0, 1.0, 0.3]]).double(), atol=1e-5, rtol=0)
    colour = Preprocessing(mean=(0.5, 0.25), std=(0.5, 0.25), scale=255.0, input_shape=(2, 3))
    low, high = eq.PixelBall(0.1, colour).box(torch.zeros(1, 6))
    torch.testing.assert_close((high - low)[0, [0, 5]], torch.tensor([0.4, 0.8]).double())


@pytest.mark.parametrize("eps", [-0.1, 1.5, math.nan, "0.1", True, None])
def test_radii_that_are_none_are_refused(eps: object) -> None:
    for make in (lambda: eq.PixelBall(eps, PIXELS), lambda: eq.RobustLoss(eps)):  # type: ignore[arg-type]
        with pytest.raises(OptionError, match="eps"):
            make()


def test_inputs_that_are_no_pixels_are_refused() -> None:
    ball = eq.PixelBall(0.1, PIXELS)
    with pytest.raises(InputError, match=r"outside \[-0\.6, 1\.4\]"):
        ball.box(torch.full((1, 6), 255.0))
    with pytest.raises(InputError, match="outside"):
        ball.box(torch.full((1, 6), -0.7))
    with pytest.raises(InputError, match="batch, 6"):
        ball.box(torch.zeros(1, 5))


def digits_like(model: nn.Module, count: int = 60) -> Split:
    x = images(count, 5)
    return Split(x, model(x).argmax(1).detach())


def test_certified_is_never_above_attacked_and_attacked_never_above_clean() -> None:
    model = network(seed=8)
    split = digits_like(model)
    last = 1.0
    for eps in (0.0, 0.01, 0.05, 0.2):
        found = eq.robustness(model, split, PIXELS, eps, attack_steps=8)
        assert found.pgd_accuracy is not None
        assert found.certified_accuracy <= found.pgd_accuracy <= found.clean_accuracy == 1.0
        assert found.certified_accuracy <= last
        last = found.certified_accuracy
        assert set(found.to_dict()) == {
            "eps",
            "count",
            "certified_accuracy",
            "clean_accuracy",
            "pgd_accuracy",
            "robust_agreement",
        }
    assert last < 1


def test_the_attack_stays_in_its_ball_and_finds_what_there_is() -> None:
    model = network(seed=8)
    split = digits_like(model)
    ball = eq.PixelBall(0.2, PIXELS)
    moved = eq.pgd(model, split.x, split.y, ball, 10)
    low, high = ball.box(split.x)
    assert bool(((moved >= low) & (moved <= high)).all())
    assert bool((model(moved).argmax(1) != split.y).any())
    with pytest.raises(OptionError, match="steps"):
        eq.pgd(model, split.x, split.y, ball, 0)


def test_perturbation_and_quantization_at_once() -> None:
    model = network(seed=8)
    split = digits_like(model)
    shares = []
    for bits in (2, 8):
        q = eq.quantize(model, eq.Structured(bits))
        found = eq.robustness(q, split, PIXELS, 0.02, reference=model, attack_steps=0)
        assert found.pgd_accuracy is None
        assert found.agreeing is not None
        points = samples(*eq.PixelBall(0.02, PIXELS).box(split.x), 50)
        with torch.no_grad():
            same = (model(points.reshape(-1, 6)).argmax(1) == q(points.reshape(-1, 6)).argmax(1)).reshape(50, -1)
        assert bool(same[:, found.agreeing].all())
        shares.append(found.robust_agreement)
    assert shares[0] <= shares[1]
    assert shares[1] > 0.3


def test_worst_scores_bound_every_sampled_difference() -> None:
    model = network(seed=9)
    x = images(10)
    y = model(x).argmax(1)
    worst = worst_scores(model, x - 0.1, x + 0.1, y)
    points = samples(x - 0.1, x + 0.1, 50)
    scores = model(points.reshape(-1, 6)).reshape(50, 10, 3)
    lead = scores - scores.gather(2, y.expand(50, 10)[..., None])
    assert bool((lead.amax(0) <= worst + 1e-3).all())
    assert bool((worst.gather(1, y[:, None]).abs() < 1e-9).all())


def test_training_on_boxes_makes_a_network_certifiable() -> None:
    torch.manual_seed(0)
    x = images(256).float()
    y = (x[:, 0] > 0.4).long()
    shares = []
    for loss in (eq.RobustLoss(), eq.RobustLoss(eps=0.15, ramp=0.3, share=0.7, lipschitz_weight=1e-3)):
        torch.manual_seed(0)
        model = nn.Sequential(eq.NEMON(6, 16, gamma=0.8), nn.Linear(16, 2))
        optimizer = torch.optim.Adam(model.parameters(), 2e-2)
        for step in range(80):
            optimizer.zero_grad()
            loss(model, x, y, model(x), step / 80, PIXELS).backward()
            optimizer.step()
        shares.append(eq.robustness(model, Split(x, y), PIXELS, 0.1, attack_steps=0).certified_accuracy)
    assert shares[1] > shares[0] + 0.1


@pytest.mark.parametrize(
    "options", [{"share": 2}, {"ramp": -1}, {"lipschitz_weight": -1}, {"lipschitz_weight": math.inf}]
)
def test_bad_loss_options_are_refused(options: dict[str, float]) -> None:
    with pytest.raises(OptionError):
        eq.RobustLoss(**options)
