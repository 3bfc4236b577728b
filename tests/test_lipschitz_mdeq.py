"""The Lipschitz multiscale DEQ: what it computes and what it proves."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

import equipoise as eq
from equipoise import verified
from equipoise.implicit import attach_map
from equipoise.layers.blocks import CappedConv2d, Plan
from equipoise.layers.lipschitz_mdeq import scaled_norm
from equipoise.layers.multiscale import weights_of_fusion
from equipoise.layers.steps import VALUES, GroupMean, Pool, Proved, Proving, Slope, Sort, Standardize, Step, Up
from equipoise.operators.conv_norm import conv_norm
from multiscale_networks import images, injected, small

PUBLISHED = Plan(((32, 32, 32), (64, 16, 16), (128, 8, 8), (256, 4, 4)))


# The certificate


def test_the_published_configuration_has_the_published_contraction() -> None:
    assert verified.spectral_norm(PUBLISHED.nominal(2.0)) == pytest.approx(0.732, abs=5e-4)
    assert verified.spectral_norm(PUBLISHED.nominal(2.0, 0.3)) == pytest.approx(0.925, abs=5e-4)
    assert scaled_norm(PUBLISHED.nominal(2.0)) == pytest.approx(0.681, abs=5e-4)


def test_the_scaled_rate_is_the_spectral_radius() -> None:
    N = PUBLISHED.nominal(2.0)
    radius = float(torch.linalg.eigvals(N).abs().max())
    assert radius <= scaled_norm(N) <= radius * (1 + 1e-5)
    assert scaled_norm(torch.diag(torch.tensor([0.5, 0.25], dtype=torch.float64))) == pytest.approx(0.5)
    triangular = torch.tensor([[0.5, 4.0], [0.0, 0.5]], dtype=torch.float64)
    assert scaled_norm(triangular) < 0.6 < verified.spectral_norm(triangular)


@pytest.mark.parametrize("contraction", [0.01, 0.3, 0.9, 0.999])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_any_contraction_is_reached(contraction: float, dropout: float) -> None:
    model = small(contraction=contraction, dropout=dropout)
    assert model.rate() <= contraction
    assert model.contraction(training=True) <= contraction
    assert model.contraction() <= model.contraction(training=True)
    cap = PUBLISHED.cap_for(contraction, dropout)
    assert verified.spectral_norm(PUBLISHED.nominal(cap, dropout)) == pytest.approx(contraction, rel=1e-6)


@pytest.mark.parametrize("contraction", [0.0, 1.0, -0.5, 1.5, math.nan, True, "0.9"])
def test_no_other_contraction_is(contraction: Any) -> None:
    with pytest.raises(eq.OptionError, match="contraction"):
        small(contraction=contraction)


@pytest.mark.parametrize("activation", ["relu", "groupsort"])
@pytest.mark.parametrize("norm_cap", [0.5, 2.0, 3.0])
def test_the_jacobian_never_exceeds_the_contraction(activation: str, norm_cap: float) -> None:
    model = small(activation=activation, norm_cap=norm_cap).eval()
    proved = model.contraction()
    cell, injection = model.map.cell("evaluation"), injected(model, images(1))
    for scale in (0.1, 10.0):
        u = scale * torch.randn(1, cell.features, dtype=torch.float64)
        jacobian = torch.autograd.functional.jacobian(lambda v: cell(v, injection)[0], u)[:, 0]
        assert float(torch.linalg.matrix_norm(jacobian, 2)) <= proved
        v = u + torch.randn_like(u) * (0.01 + scale)
        assert (cell(u, injection) - cell(v, injection)).norm() <= proved * (u - v).norm()


@pytest.mark.parametrize("branch", [0, 1])
def test_every_entry_of_the_gain_matrix_bounds_its_block(branch: int) -> None:
    model = small(norm_cap=2.5).eval()
    N, cell, injection = model.gains(), model.map.cell("evaluation"), injected(model, images(1))
    for _ in range(2):
        u = torch.randn(1, cell.features, dtype=torch.float64)
        jacobian = torch.autograd.functional.jacobian(lambda v: cell(v, injection)[0], u)[:, 0]
        for i, rows in enumerate(jacobian.split([4 * 64, 8 * 16], 0)):
            block = rows.split([4 * 64, 8 * 16], 1)[branch]
            assert float(torch.linalg.matrix_norm(block, 2)) <= float(N[i, branch])


STEPS: list[tuple[Step, float]] = [
    (GroupMean(2), 1.0),
    (GroupMean(2, torch.tensor([0.5, -2.0, 1.0, 0.3], dtype=torch.float64), torch.ones(4, dtype=torch.float64)), 2.0),
    (Slope(0.4), 0.4),
    (Sort(0.7), 0.7),
    (Up(2), 2.0),
    (Up(4), 4.0),
    (Pool(2), 0.5),
]


@pytest.mark.parametrize(("step", "norm"), STEPS, ids=[type(step).__name__ + str(norm) for step, norm in STEPS])
def test_norms_of_the_steps(step: Step, norm: float) -> None:
    """The Jacobian at random points reaches the norm that is claimed, and never exceeds it."""
    torch.manual_seed(0)
    found = 0.0
    for _ in range(4):
        x = torch.randn(1, 4, 4, 4, dtype=torch.float64)
        jacobian = torch.autograd.functional.jacobian(lambda v: step(v).flatten(), x).flatten(1)
        found = max(found, float(torch.linalg.matrix_norm(jacobian, 2)))
    assert step.lipschitz() == pytest.approx(norm)
    assert found <= step.lipschitz() * (1 + 1e-12)
    assert found == pytest.approx(norm, rel=0.2)


def test_standardization_moves_no_more_than_its_local_gain() -> None:
    torch.manual_seed(0)
    step = Standardize(2, torch.randn(4, dtype=torch.float64), torch.randn(4, dtype=torch.float64))
    x = 0.1 * torch.randn(50, 4, 3, 3, dtype=torch.float64)
    gain = step.gain(x)
    for size in (1e-6, 1e-2, 1.0, 100.0):
        other = x + size * torch.randn_like(x)
        moved = (step(x) - step(other)).flatten(1).norm(dim=1)
        assert bool((moved <= gain * (x - other).flatten(1).norm(dim=1)).all())


def test_the_weights_of_fusion() -> None:
    rows = weights_of_fusion(3, 0.3)
    assert [sum(row) for row in rows] == pytest.approx([1.0, 1.0, 1.0])
    assert rows[1] == pytest.approx([0.3 / (1 + math.exp(-1)), 0.7, 0.3 * math.exp(-1) / (1 + math.exp(-1))])
    assert weights_of_fusion(1, 0.3) == [[1.0]]


def test_the_caps_hold_in_evaluation() -> None:
    model = small(torch.float32, norm_cap=0.8).eval()
    for conv in model.map.convs.values():
        assert isinstance(conv, CappedConv2d)
        step = conv.step("proof")
        assert conv_norm(step.kernel, conv.place.size, conv.place.stride) <= step.norm <= 0.8


# Solving


@pytest.mark.parametrize(
    "solver", [eq.Picard(), eq.Picard(alpha=0.7), eq.Anderson(), eq.Broyden(), eq.Anderson(safeguard=False)]
)
def test_every_solver_finds_the_equilibrium(solver: eq.Solver) -> None:
    model, x = small(contraction=0.9).eval(), images()
    found = model.solve(x, solver, tol=1e-12)
    assert bool(found.converged.all())
    cell, injection = model.map.cell("evaluation"), injected(model, x)
    assert (cell(found.value, injection) - found.value).abs().max() < 1e-11
    assert bool((found.error_bound < 1e-9).all())


def test_error_bounds_hold_in_float32() -> None:
    model = small(torch.float32, contraction=0.95).eval()
    x = images(8, torch.float32)
    wide = model.evaluator()
    w = torch.zeros(8, wide.cell.features, dtype=torch.float64)
    for _ in range(200):
        w = wide.gap(x, w).image
    for tol in (0.5, 1e-2, 1e-4):
        for stop in ("residual", "bound"):
            found = model.solve(x, tol=tol, stop=stop)  # type: ignore[arg-type]
            assert bool(found.converged.all())
            assert bool(((found.value.double() - w).norm(dim=1) <= found.error_bound).all())
            if stop == "bound":
                assert bool((found.truncation <= tol * found.value.double().norm(dim=1) * (1 + 1e-6)).all())


def test_samples_do_not_depend_on_their_company() -> None:
    model, x = small(torch.float32, contraction=0.9).eval(), images(6, torch.float32)
    whole = model.solve(x, tol=1e-4)
    for i in range(6):
        alone = model.solve(x[i : i + 1], tol=1e-4)
        assert int(alone.steps) == int(whole.steps[i])
        assert (alone.value[0] - whole.value[i]).norm() <= 1e-6 * whole.value[i].norm()


def test_float64_readings_bound_their_rounding() -> None:
    """The same program in float64 and, as near to exact as numbers here get, with its input scaled by a power of two:
    mean-only normalization and ReLU are homogeneous where nothing is added."""
    model = small(torch.float32).eval()
    x = images(3, torch.float32)
    evaluator = model.evaluator()
    u = torch.randn(3, evaluator.cell.features, dtype=torch.float64)
    found = evaluator.gap(x, u)
    assert bool((found.error > 0).all())
    assert bool((found.error < 1e-9).all())
    narrow = model.map.cell("evaluation")(u.float(), injected(model, x))
    assert (narrow.double() - found.image).norm() < 1e-4 * found.image.norm()
    exact = torch.zeros(3, dtype=torch.float64)
    lifted = Proving().along((Slope(0.4),), Proved(torch.ones(3, 2, 2, 2, dtype=torch.float64), exact + 1))
    assert bool((lifted.error >= 0.4).all())
    assert bool((lifted.error < 0.4001).all())


def test_dropout_uses_one_mask_for_a_solve() -> None:
    model, x = small(torch.float32, contraction=0.9, dropout=0.5, tol=1e-5), images(4, torch.float32)
    for conv in model.map.convs.values():
        conv.kernel.advance(500)  # which goes on from solve to solve
    torch.manual_seed(3)
    one = model.equilibrium(x)
    assert model.tally.failures == 0
    torch.manual_seed(3)
    assert torch.allclose(one, model.equilibrium(x), atol=1e-5)
    assert not torch.allclose(one, model.equilibrium(x), atol=1e-3)


def test_the_tally_counts() -> None:
    model, x = small(torch.float32, contraction=0.9), images(5, torch.float32)
    model(x).sum().backward()
    assert (model.tally.samples, model.tally.failures) == (5, 0)
    assert model.tally.evaluations % 5 == 0
    assert model.tally.backward_samples == 5
    assert model.tally.backward_evaluations > 0
    model.tally.reset()
    assert model.tally.evaluations == 0


# Gradients


def gradcheck(model: eq.LipschitzMDEQ, x: Tensor) -> bool:
    names = [name for name, _ in model.named_parameters()]
    values = [p.detach().clone().requires_grad_() for p in model.parameters()]

    def run(x: Tensor, *parameters: Tensor) -> Tensor:
        torch.manual_seed(5)  # the same dropout mask
        result: Tensor = torch.func.functional_call(model, dict(zip(names, parameters, strict=True)), (x,))
        return result

    return bool(torch.autograd.gradcheck(run, (x.requires_grad_(), *values), atol=1e-6, rtol=1e-4, fast_mode=True))


@pytest.mark.parametrize("solver", [eq.Picard(), eq.Anderson()])
def test_implicit_gradients_with_a_fixed_mask(solver: eq.Solver) -> None:
    """Below their caps, where the power iteration, which goes on between two evaluations, plays no part."""
    model = small(contraction=0.9, dropout=0.3, tol=1e-13, solver=solver).train()
    with torch.no_grad():
        for conv in model.map.convs.values():
            conv.kernel.weight.mul_(0.2)
    assert gradcheck(model, images(2))


def test_implicit_gradients_through_the_caps() -> None:
    model = small(contraction=0.9, tol=1e-13).eval()
    for conv in model.map.convs.values():
        conv.kernel.advance(4000)
    assert gradcheck(model, images(2))


def test_gradients_agree_with_unrolling() -> None:
    model, x = small(contraction=0.8, tol=1e-13).eval(), images(2)
    model(x).square().sum().backward()
    implicit = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    model.zero_grad()
    injection, cell = VALUES.along(model.inject(), x), model.map.cell("evaluation")
    z = torch.zeros(2, cell.features, dtype=torch.float64)
    for _ in range(60):
        z = cell(z, injection)
    model.classify(z).square().sum().backward()
    for one, parameter in zip(implicit, (p for p in model.parameters() if p.grad is not None), strict=True):
        assert parameter.grad is not None
        assert torch.allclose(one, parameter.grad, atol=1e-9)


@pytest.mark.parametrize("options", [{"gradient": "one-step"}, {"gradient": "phantom", "phantom_steps": 3}])
def test_cheap_gradients_point_the_same_way(options: dict[str, Any]) -> None:
    x, found = images(4), []
    for chosen in ({}, options):
        model = small(contraction=0.9, tol=1e-10, **chosen).eval()
        model(x).square().sum().backward()
        found.append(torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]))
        assert model.tally.backward_samples == (4 if not chosen else 0)
    assert torch.cosine_similarity(found[0], found[1], 0) > 0.9


def test_many_phantom_steps_are_the_gradient() -> None:
    x, found = images(2), []
    for options in ({}, {"gradient": "phantom", "phantom_steps": 80, "phantom_damping": 1.0}):
        model = small(contraction=0.8, tol=1e-12, **options).eval()
        model(x).square().sum().backward()
        found.append(torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]))
    assert torch.allclose(found[0], found[1], atol=1e-9)


def test_no_second_derivatives() -> None:
    model, x = small(contraction=0.8), images(1).requires_grad_()
    with pytest.raises(eq.StructureError, match="second derivatives"):
        torch.autograd.grad(model(x).sum(), x, create_graph=True)
    assert not attach_map(torch.ones(1, 2), torch.ones(1, 2), lambda adjoint: adjoint.grad).requires_grad


def test_a_training_step_keeps_one_evaluation() -> None:
    """What the graph holds does not depend on how many steps the solver took."""
    counts = []
    for tol in (1e-1, 1e-12):
        model, saved = small(contraction=0.95, tol=tol), []

        def pack(tensor: Tensor, saved: list[int] = saved) -> Tensor:
            saved.append(tensor.numel())
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            model(images(3))
        counts.append(sum(saved))
    assert counts[0] == counts[1]
