"""Multiscale DEQs at their edges: bad input, numbers that overflow, weights that moved; and the plain network."""

from __future__ import annotations

import copy
import math
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import equipoise as eq
from equipoise.layers.blocks import Plan
from equipoise.layers.multiscale import split
from equipoise.layers.multiscale_proofs import Gap, Head, row_lengths
from equipoise.layers.room import memory_needed
from equipoise.layers.steps import (
    EPS,
    Average,
    Conv,
    GroupMean,
    Mask,
    Pool,
    Slope,
    Sort,
    Standardize,
    Up,
    through,
)
from multiscale_networks import images, small

PUBLISHED = Plan(((32, 32, 32), (64, 16, 16), (128, 8, 8), (256, 4, 4)))


# Bad input, and the plain network


def test_bad_options_are_refused() -> None:
    make = eq.LipschitzMDEQ
    with pytest.raises(eq.OptionError, match="does not divide 6 channels"):
        make(3, 8, 10, (6, 12), groups=4, post_groups=2)
    with pytest.raises(eq.OptionError, match="do not halve as often"):
        make(3, 12, 10, (8, 16, 32, 64))
    with pytest.raises(eq.OptionError, match="do not halve as often"):
        make(3, (32, 20), 10, (8, 16, 32), stem_stride=2)
    with pytest.raises(eq.OptionError, match="splitting for ForwardBackward"):
        make(3, 8, 10, (8, 16), solver=eq.ForwardBackward())
    with pytest.raises(eq.OptionError, match="give one"):
        make(3, 8, 10, (8, 16), norm_cap=2.0, contraction=0.9)
    for name, value in (
        ("dropout", 1.0), ("gradient", "exact"), ("phantom_damping", 0.0), ("slope", -1.0), ("activation", "gelu"),
        ("residual", 1.5), ("fusion", -0.1), ("norm_cap", 0.0), ("tol", 2.0), ("expansion", 0), ("channels", ()),
    ):  # fmt: skip
        with pytest.raises(eq.OptionError, match=name):
            make(3, 8, 10, **{"channels": (8, 16), name: value})
    with pytest.raises(eq.OptionError, match="preset"):
        make.preset("huge", 3, 32, 10)  # type: ignore[arg-type]


def test_bad_images_are_refused() -> None:
    model = small(torch.float32)
    for wrong in (torch.randn(2, 3, 8, 8), torch.randn(2, 2, 8, 9), torch.randn(2, 8, 8), torch.randn(2, 128)):
        with pytest.raises(eq.InputError, match=r"\(batch, 2, 8, 8\)"):
            model(wrong)
        with pytest.raises(eq.InputError, match=r"\(batch, 2, 8, 8\)"):
            model.solve(wrong)
    with pytest.raises(eq.InputError, match="floats"):
        model(torch.ones(1, 2, 8, 8, dtype=torch.int64))
    with pytest.raises(eq.InputError, match="NaN"):
        model(torch.full((1, 2, 8, 8), math.nan))
    assert model(torch.zeros(0, 2, 8, 8)).shape == (0, 3)
    assert model.solve(torch.zeros(0, 2, 8, 8)).value.shape == (0, 384)


def test_a_batch_that_does_not_fit_says_what_it_needs() -> None:
    model = small(torch.float32)
    with pytest.raises(eq.InputError, match=r"GiB.*at most about \d+ images"):
        model(torch.zeros(1, 1, 1, 1).expand(10**9, 2, 8, 8))
    training, evaluation = (memory_needed(PUBLISHED, 128, 4, eq.Picard(), graph) for graph in (True, False))
    assert 2**30 < training < 2**34
    assert evaluation < training


def test_images_that_no_memory_holds_are_refused_before_anything_is_made() -> None:
    with pytest.raises(eq.InputError, match=r"a batch of 1 images .*GiB.*smaller preset or image"):
        eq.LipschitzMDEQ.preset("tiny", 3, 2**17, 10)


def test_the_plain_network_trains_and_promises_nothing() -> None:
    torch.manual_seed(0)
    model = eq.MDEQ(
        2,
        8,
        3,
        (4, 8),
        groups=2,
        post_groups=2,
        expansion=2,
        head_channels=8,
        solver=eq.Anderson(safeguard=False, max_steps=8),
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", eq.ConvergenceWarning)
        model(images(4, torch.float32)).sum().backward()
        found = eq.certify(model.eval(), inputs=images(2, torch.float32))
    assert model.tally.samples == 4
    assert model.tally.evaluations <= 32
    assert not found.certified
    assert found.contraction is None
    assert found.verdict in ("converged", "diverged")


@pytest.mark.parametrize("name", ["tiny", "small", "published"])
def test_presets_are_of_equal_size(name: Any) -> None:
    with torch.device("meta"):
        one, other = (kind.preset(name, 3, 32, 10) for kind in (eq.LipschitzMDEQ, eq.MDEQ))
    sizes = [sum(p.numel() for p in model.parameters()) for model in (one, other)]
    assert sizes[0] == pytest.approx(sizes[1], rel=0.01)
    assert (
        split(torch.zeros(1, sum(math.prod(s) for s in one.plan.shapes)), one.plan.shapes)[0].shape[1:]
        == one.plan.shapes[0]
    )


# Numbers at their edges


def test_options_are_checked_before_a_cap_is_sought() -> None:
    for dropout in ("a", 1.0, math.nan, None):
        with pytest.raises(eq.OptionError, match="dropout is"):
            small(contraction=0.9, dropout=dropout)


@pytest.mark.parametrize("kind", [eq.LipschitzMDEQ, eq.MDEQ])
def test_one_image_of_one_pixel(kind: type[eq.LipschitzMDEQ] | type[eq.MDEQ]) -> None:
    """Where a group of the usual normalization holds a single entry, which torch's own function refuses."""
    model = kind(2, 1, 3, (4,), groups=4, post_groups=4, head_channels=4)
    assert model(torch.randn(1, 2, 1, 1)).shape == (1, 3)


def test_kernels_of_zeros_have_gradients() -> None:
    model = small(torch.float32).train()
    with torch.no_grad():
        for conv in model.map.convs.values():
            conv.kernel.weight.zero_()
    model(images(2, torch.float32)).sum().backward()
    assert all(bool(torch.isfinite(p.grad).all()) for p in model.parameters() if p.grad is not None)


def test_large_kernels_are_scaled_in_evaluation() -> None:
    """Also where the squares that the power iteration sums up overflow."""
    model = small(torch.float32, contraction=0.9).eval()
    with torch.no_grad():
        for conv in model.map.convs.values():
            conv.kernel.weight.mul_(1e20)
    assert model.contraction() <= 0.9
    assert bool(torch.isfinite(model(images(2, torch.float32))).all())


def test_iterates_that_overflow_are_reported() -> None:
    model = small(torch.float32, norm_cap=1e30).eval()
    with torch.no_grad():
        for conv in model.map.convs.values():
            conv.kernel.weight.mul_(1e15)
    with pytest.warns(eq.ConvergenceWarning, match="overflowed"):
        found = model.solve(images(2, torch.float32))
    assert not bool(found.converged.any())
    assert bool(torch.isinf(found.error_bound).all())
    assert bool(torch.isinf(found.residual).all())


def test_a_certificate_checks_its_inputs() -> None:
    model = small(torch.float32)
    quantized = eq.quantize(model, eq.Structured(bits=4))
    empty = eq.certify(quantized, reference=model, inputs=torch.zeros(0, 2, 8, 8))
    assert empty.displacement is not None
    assert len(empty.displacement) == 0
    assert empty.agreement is None
    plain = eq.MDEQ(2, 8, 3, (4, 8), groups=2, post_groups=2)
    for network in (model, plain):
        with pytest.raises(eq.InputError, match=r"\(batch, 2, 8, 8\)"):
            eq.certify(network, inputs=torch.randn(2, 3, 8, 8))
        with pytest.raises(eq.InputError, match="NaN"):
            eq.certify(network, inputs=torch.full((2, 2, 8, 8), math.nan))
        with pytest.raises(eq.InputError, match="list"):
            eq.certify(network, inputs=[1.0])  # type: ignore[arg-type]
    chain = nn.Sequential(nn.Unflatten(1, (2, 8, 8)), model)
    for wrong in (torch.randn(2, 17), [1.0]):
        with pytest.raises(eq.InputError):
            eq.certify(chain, inputs=wrong)  # type: ignore[arg-type]


# Weights that moved


def moved(model: eq.LipschitzMDEQ, how: str) -> eq.LipschitzMDEQ:
    """``model`` with other weights than those its bounds were last computed of."""
    kernels = [conv.kernel for conv in model.map.convs.values()]
    with torch.no_grad():
        if how == "data":
            for kernel in kernels:
                kernel.weight.data.mul_(0.3)
        elif how == "in place":
            for kernel in kernels:
                kernel.weight.view(-1)[3] += 5
        elif how == "loaded":
            model.load_state_dict(small(torch.float32, seed=7, contraction=0.9).state_dict())
        elif how == "float64":
            model.double()
    if how == "trained":
        optimizer = torch.optim.SGD(model.parameters(), 1.0)
        for _ in range(3):
            optimizer.zero_grad()
            model.train()(images(4, torch.float32)).square().sum().backward()
            optimizer.step()
    return model.eval()


@pytest.mark.parametrize("how", ["data", "in place", "loaded", "float64", "trained"])
def test_bounds_follow_the_weights(how: str) -> None:
    model = small(torch.float32, contraction=0.9).eval()
    before = model.contraction()
    moved(model, how)
    assert model.contraction() == copy.deepcopy(model).contraction() <= 0.9
    assert model.contraction() != before
    x = images(2).to(model.linear.weight.dtype)
    assert torch.equal(model.solve(x).value, copy.deepcopy(model).solve(x).value)


def test_bounds_follow_the_codes(tmp_path: Path) -> None:
    """Whoever raises a scale, in memory or in a file, gets the norm that is true of it."""
    quantized = eq.quantize(small(torch.float32, contraction=0.9).eval(), eq.Structured(bits=4))
    assert quantized.contraction() <= 0.9
    for conv in quantized.map.convs.values():
        conv.kernel.values.scale.mul_(4.0)
    assert quantized.contraction() > 1
    eq.save(quantized, tmp_path / "m.safetensors")
    again = eq.load(tmp_path / "m.safetensors")
    assert again.contraction() == quantized.contraction()
    assert not eq.certify(again).certified


def test_a_training_that_is_continued_takes_the_same_steps() -> None:
    x, start = images(4, torch.float32), small(torch.float32, contraction=0.9, dropout=0.3).state_dict()

    def trained(state: dict[str, Tensor], steps: int) -> dict[str, Tensor]:
        model = small(torch.float32, seed=5, contraction=0.9, dropout=0.3).train()
        model.load_state_dict(state)
        optimizer = torch.optim.SGD(model.parameters(), 0.1)
        for _ in range(steps):
            torch.manual_seed(9)  # of the masks
            optimizer.zero_grad()
            model(x).square().sum().backward()
            optimizer.step()
        return copy.deepcopy(model.state_dict())

    whole, parts = trained(start, 4), trained(trained(start, 2), 2)
    assert all(torch.equal(whole[name], parts[name]) for name in whole)
    assert not torch.equal(whole["map.convs.widen_0.kernel.vector"], start["map.convs.widen_0.kernel.vector"])


def test_implicit_gradients_in_training_with_caps_at_work() -> None:
    """Against differences in float64, masks and power iterations beginning alike; one direction for each parameter."""
    x, model = images(2), small(contraction=0.95, dropout=0.3, tol=1e-13).train()
    for conv in model.map.convs.values():
        conv.kernel.advance(4000)
    begun = {name: tensor.clone() for name, tensor in model.named_buffers()}

    def loss() -> Tensor:
        for name, tensor in model.named_buffers():
            tensor.copy_(begun[name])
        torch.manual_seed(9)
        result: Tensor = model(x).square().sum()
        return result

    loss().backward()
    for parameter in model.parameters():
        assert parameter.grad is not None
        direction, length = torch.randn_like(parameter), 1e-6
        with torch.no_grad():
            parameter.add_(length * direction)
            high = loss()
            parameter.sub_(2 * length * direction)
            low = loss()
            parameter.add_(length * direction)
        slope = float((parameter.grad * direction).sum())
        assert float(high - low) / (2 * length) == pytest.approx(slope, rel=1e-4, abs=1e-6)


# What is proved of points, by its formula


def test_bounds_of_points_are_those_of_a_contraction() -> None:
    gap = Gap(torch.zeros(1, 3).double(), torch.tensor([0.5]).double(), torch.tensor([0.25]).double())
    assert float(gap.from_point(0.75)) == pytest.approx(0.75 / 0.25, rel=1e-8)
    bound, truncation = gap.from_image(0.75)
    assert float(truncation) == pytest.approx(3 * 0.5, rel=1e-8)
    assert float(bound) == pytest.approx(3 * 0.75 + 0.25, rel=1e-8)
    assert float(row_lengths(torch.tensor([[3.0, 4.0]]).double())) == pytest.approx(5, rel=1e-12)


def test_features_move_by_the_norms_on_their_way() -> None:
    """Branches within e of where they are move the sum by at most e √(Σ L_i²), here of matrices of norms 3 and 4."""

    def conv(factor: float) -> Conv:
        return Conv(factor * torch.eye(2, dtype=torch.float64)[:, :, None, None])

    head = Head(((conv(3.0),), (conv(4.0), Pool(2))), (conv(2.0), Average(4)))
    z = [torch.ones(1, 2, 2, 2).double(), torch.ones(1, 2, 4, 4).double()]
    found = head.proved(z, torch.tensor([0.1]).double())
    assert torch.equal(found.value, torch.full((1, 2), 14.0).double())
    assert float(found.error) == pytest.approx(0.1 * math.hypot(3, 4 / 2) * 2 / 2, rel=1e-6)


def test_steps_move_by_what_they_are_said_to() -> None:
    """Constants of every step, and of paths, where the numbers are known."""
    ones = torch.ones(2).double()
    gamma = torch.tensor([0.5, -3.0]).double()
    assert GroupMean(1, gamma, ones).lipschitz() == 3
    assert (GroupMean(1).lipschitz(), Slope(0.4).lipschitz(), Sort(0.7).lipschitz(), Up(4).lipschitz()) == (
        1,
        0.4,
        0.7,
        4,
    )
    assert Pool(4).lipschitz() == pytest.approx(0.25, rel=1e-12)
    assert Average(16).lipschitz() == pytest.approx(0.25, rel=1e-12)
    assert Mask(0.2).lipschitz() == pytest.approx(1.25, rel=1e-12)
    path = (Conv(torch.ones(1, 1, 1, 1).double(), norm=3.0), Slope(0.4), Up(2))
    assert through(path) == pytest.approx(2.4, rel=1e-12)
    # about x = (−1, 1): s² = 1 + ε, and 2 |γ|/s is what it can move
    x = torch.tensor([-1.0, 1.0]).double()[None, :, None, None]
    known = 2 * 3 / math.sqrt(1 + EPS)
    assert float(Standardize(1, gamma, ones).gain(x)) == pytest.approx(known, rel=1e-6)


def test_a_cap_that_was_changed_is_what_is_proved() -> None:
    model = small().eval()
    before = model.contraction()
    for part in model.modules():
        if isinstance(getattr(part, "cap", None), float):
            part.cap = 9.0
    assert before < model.contraction() == copy.deepcopy(model).contraction()
