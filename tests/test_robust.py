"""Classes, radii, pixels, attacks and training on boxes: certified <= true <= attacked (theory §7, [D22])."""

from __future__ import annotations

import copy
import math
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import equipoise as eq
from equipoise.certificates.robustness import reach_of_inputs
from equipoise.data import Preprocessing, Split
from equipoise.errors import InputError, OptionError, StructureError
from equipoise.robust_loss import worst_scores
from test_boxes import PIXELS, images, network, samples

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
    torch.testing.assert_close((high - low)[0, [0, 5]], torch.tensor([0.4, 0.8]).double(), atol=1e-4, rtol=0)


@pytest.mark.parametrize("preprocessing", [
    PIXELS, Preprocessing(mean=(0.4914, -3.0), std=(0.2470, 1e-3), scale=7.3, input_shape=(2, 3)),
    Preprocessing(mean=1e4, std=3e-5, scale=1e-6, input_shape=(2, 3)),
], ids=str)  # fmt: skip
@pytest.mark.parametrize("eps", [1e-7, 1e-4, 0.1])
def test_balls_hold_what_float32_preprocessing_makes_of_every_image_in_them(
    preprocessing: Preprocessing, eps: float
) -> None:
    scale = np.float32(preprocessing.scale)
    start = np.random.default_rng(0).random((500, 6)).astype(np.float32) * scale
    x = preprocessing(start)
    low, high = eq.PixelBall(eps, preprocessing).box(x)
    exact = eq.PixelBall(eps, preprocessing).inner(x)
    reach = Fraction(eps) * Fraction(preprocessing.scale)
    for sign in (-1, 1):
        end = (start.astype(np.float64) + sign * eps * preprocessing.scale).astype(np.float32)
        for _ in range(8):  # inwards until the perturbed image is one of the ball, exactly
            far = [
                abs(Fraction(float(e)) - Fraction(float(s))) > reach or not 0 <= e <= preprocessing.scale
                for e, s in zip(end.flat, start.flat, strict=True)
            ]
            inward = np.nextafter(end, np.where(end > start, np.float32(-np.inf), np.float32(np.inf)))
            end = np.where(np.array(far).reshape(end.shape), np.clip(inward, 0, scale), end)
        moved = preprocessing(end).double()
        assert bool(((low <= moved) & (moved <= high)).all())
    assert bool(((low <= exact[0]) & (exact[1] <= high)).all())
    sharp, same = eq.PixelBall(0.0, preprocessing).box(x)
    assert torch.equal(sharp, x.double())
    assert torch.equal(same, x.double())


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


def test_labels_references_and_widths_that_do_not_fit_are_refused() -> None:
    model, x = network(seed=8), images(5)
    for label in (-1, 3):  # −1 stands for "none is proved" and must never count as right
        with pytest.raises(InputError, match="5 of 5 labels"):
            eq.robustness(model, Split(x, torch.full((5,), label)), PIXELS, 0.1)
    good = Split(x, torch.zeros(5, dtype=torch.long))
    for other in (nn.Linear(10, 2), nn.Linear(10, 4)):
        with pytest.raises(StructureError, match="classes"):
            eq.robustness(model, good, PIXELS, 0.1, reference=nn.Sequential(model[0], other.double()))
    with pytest.raises(InputError, match=r"takes \(batch, 5\)"):
        eq.robustness(model, good, PIXELS, 0.1, reference=network(d=5))
    for call in (eq.certified_radius, lambda m, t: eq.certified_classes(m, t, t), lambda m, t: eq.interval(m, t, t)):
        with pytest.raises(InputError, match=r"takes \(batch, 6\)"):
            call(model, x[:, :4])
        with pytest.raises(InputError, match="float16"):
            call(copy.deepcopy(model).half(), x)


def test_the_attack_stays_in_its_ball_and_finds_what_there_is() -> None:
    model = network(seed=8)
    split = digits_like(model)
    ball = eq.PixelBall(0.2, PIXELS)
    moved = eq.pgd(model, split.x, split.y, ball, 10)
    low, high = ball.inner(split.x)
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
