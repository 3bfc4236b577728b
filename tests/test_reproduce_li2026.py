"""The experiments of [LLC26] on small networks, against independent few-line implementations and exact answers."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import equipoise as eq
from equipoise.data import Data, load_data
from equipoise.presets import classifier
from equipoise.reproduce import Settings, run
from equipoise.reproduce.li2026 import (
    PAPER,
    convergence,
    displacement,
    gradients,
    grids,
    measure,
    splitting,
    subject,
    training,
)
from equipoise.solvers import ForwardBackward
from test_report import Page


@pytest.fixture(scope="module")
def digits() -> Data:
    return load_data("digits")


@pytest.fixture(scope="module")
def network(digits: Data) -> nn.Sequential:
    """Twelve units, trained for a moment so that its gradients mean something."""
    model = classifier(digits, 12, rank=3, margin=0.3)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    for _ in range(30):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(digits.train.x[:256]), digits.train.y[:256]).backward()
        optimizer.step()
    return model.eval()


@pytest.fixture(scope="module")
def bench(digits: Data, network: nn.Sequential, tmp_path_factory: pytest.TempPathFactory) -> subject.Bench:
    return subject.Bench(Settings(quick=True), digits, tmp_path_factory.mktemp("bench"), network, "a test")


@pytest.fixture(scope="module")
def converged(bench: subject.Bench) -> convergence.Convergence:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(convergence, "PATIENCE", 300)
        return convergence.measure(bench)


def matrices(layer: eq.MonDEQ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    with torch.no_grad():
        return tuple(t.double().numpy() for t in (layer.weight, layer.input_weight, layer.bias))  # type: ignore[return-value]


# 1. The published rule


def rule(W: np.ndarray, q: np.ndarray) -> tuple[int, float]:
    """The published rule in a few lines: steps, and the last residual."""
    F = np.eye(len(W)) - W
    m, L = np.linalg.eigvalsh((F + F.T) / 2)[0], np.linalg.norm(F, 2)
    alpha = m / L**2 if m > 0 else 0.01
    z = np.zeros_like(q)
    step, residual = 0, np.inf
    while step < 2000 and residual >= 1e-5:
        new = np.maximum((1 - alpha) * z + alpha * (z @ W.T + q), 0)
        step, residual, z = step + 1, np.linalg.norm(new - z) / (np.linalg.norm(z) + 1e-12), new
    return step, float(residual)


def rounded_by_hand(W: np.ndarray, bits: int) -> np.ndarray:
    step = np.abs(W).max() / (2 ** (bits - 1) - 1)
    return np.round(W / step) * step


def test_the_rules_counts_are_those_of_a_few_lines(bench: subject.Bench, converged: convergence.Convergence) -> None:
    found = converged
    W, U, b = matrices(bench.layer)
    q = bench.data.test.x[:64].double().numpy() @ U.T + b
    assert found.samples == 64
    assert [width.bits for width in found.widths] == list(convergence.BITS)
    for width in found.widths:
        tilde = rounded_by_hand(W, width.bits)
        steps, residual = rule(tilde, q)
        assert width.steps == steps
        assert width.residual == pytest.approx(residual, rel=1e-4)  # codes have a float32 scale
        assert width.settled == (residual < 1e-5)
        assert width.delta_norm == pytest.approx(np.linalg.norm(tilde - W, 2), rel=1e-4, abs=1e-6)
        margin = np.linalg.eigvalsh(np.eye(12) - (tilde + tilde.T) / 2)[0]
        assert width.margin == pytest.approx(margin, abs=1e-6)
        assert (width.verdict == "certified") == (width.margin > 0)
        assert (width.certified_steps is None) == (width.verdict != "certified")


def test_certified_steps_are_enough(bench: subject.Bench, converged: convergence.Convergence) -> None:
    """After so many steps every sample is 1e-5 times nearer to its equilibrium than where it started."""
    x = bench.data.test.x[:32].double()
    for width in converged.widths:
        if width.certified_steps is None or width.certified_steps > 3000 or width.bits > 8:
            continue
        layer = eq.quantize(bench.wide, eq.Assembled(width.bits))[0]
        exact = layer.solve(x, tol=1e-12).value
        for _, _, z in measure.iterates(
            ForwardBackward(alpha=width.alpha), measure.problem(layer, x), width.certified_steps
        ):
            last = z
        assert bool(((last - exact).norm(dim=1) <= 1.001e-5 * exact.norm(dim=1)).all())


def test_the_rules_step() -> None:
    found = measure.rule_step(torch.tensor([[0.5, 0.3], [-0.3, 0.5]]))
    assert found.margin == pytest.approx(0.5)
    assert found.lipschitz == pytest.approx(math.hypot(0.5, 0.3))
    assert found.alpha == pytest.approx(0.5 / 0.34)
    assert measure.rule_step(torch.tensor([[1.5]])).alpha == 0.01


def scalar(w: float, q: float) -> measure.Problem:
    layer = eq.MonDEQ.from_weights(
        *(torch.full(s, v, dtype=torch.float64) for s, v in (((1, 1), w), ((1, 1), 1.0), ((1,), 0.0))), check=False
    )
    return measure.problem(layer, torch.tensor([[q]], dtype=torch.float64))


def test_residuals_of_a_geometric_series() -> None:
    """z⁺ = z/2 + 1 from 0: after k steps 2 − 2^(1−k), so the residual of step k is 1/(2^k − 2)."""
    seen = measure.residuals(ForwardBackward(alpha=1.0), scalar(0.5, 1.0), 50, 1e-3)
    assert seen[1:] == pytest.approx([1 / (2.0**k - 2) for k in range(2, len(seen) + 1)])
    assert len(seen) == next(k for k in range(2, 50) if 1 / (2.0**k - 2) < 1e-3)


def test_growing_and_settling_samples_are_told_apart() -> None:
    layer = eq.MonDEQ.from_weights(
        torch.diag(torch.tensor([2.0, 0.5])).double(), torch.eye(2).double(), torch.zeros(2).double(), check=False
    )
    x = torch.tensor([[1.0, 0.0], [-1.0, 1.0], [0.0, 1.0]], dtype=torch.float64)
    end = measure.settle(ForwardBackward(alpha=1.0), measure.problem(layer, x), 500)
    assert end.grew.tolist() == [True, False, False]  # z⁺ = 2z + 1 grows; where x₁ <= 0 the unit stays at 0
    assert end.step.tolist()[0] == 0
    assert min(end.step.tolist()[1:]) > 0
    assert end.value[1].tolist() == pytest.approx([0.0, 2.0], abs=1e-4)
    # overflow is growth as well, and a budget that ends before is neither
    assert measure.settle(ForwardBackward(alpha=1.0), measure.problem(layer, x), 3).grew.tolist() == [False] * 3


# 2. Splittings


def test_splittings_reach_the_tolerance_when_they_say(bench: subject.Bench) -> None:
    found = splitting.measure(bench)
    assert {curve.solver for curve in found.curves} == {"FB", "PR", "DR"}
    assert found.disagreement < 1e-8
    for curve in found.curves:
        assert curve.steps is not None
        if curve.steps < len(curve.residuals):
            assert curve.residuals[curve.steps - 1] < 1e-5 <= curve.residuals[curve.steps - 2]
        if curve.solver == "FB":
            tilde, (W, U, b) = None, matrices(bench.layer)
            tilde = W if curve.bits is None else rounded_by_hand(W, curve.bits)
            assert curve.steps == rule(tilde, bench.data.test.x[:64].double().numpy() @ U.T + b)[0]


# 4. Displacement


def test_the_bound_holds_on_every_sample(bench: subject.Bench) -> None:
    found = displacement.measure(bench)
    assert [cloud.bits for cloud in found.clouds] == [6, 8, 12, 16]
    for cloud in found.clouds:
        assert cloud.share == cloud.sharp_share == 1.0
        assert 0 < cloud.moved <= cloud.sharp <= cloud.bound * (1 + 1e-9)
        assert all(move <= bound for move, bound in zip(cloud.moves, cloud.bounds, strict=True))
    for cloud, check in zip(found.clouds, found.checks, strict=True):
        assert 0 <= check.share <= 1
        assert check.bits == cloud.bits


def test_displacements_are_those_of_equilibria_by_enumeration() -> None:
    """One unit: z = relu(w z + x), so z = max(0, x)/(1 − w), exactly."""
    data = load_data("digits")
    layer = eq.MonDEQ.from_factors(torch.zeros(1, 1), torch.zeros(1, 1), 0.4, 0.1 * torch.ones(1, 64), torch.zeros(1))
    model = nn.Sequential(layer, nn.Linear(1, 10)).eval()
    one = subject.Bench(Settings(), data, Path(), model, "a test")
    found = displacement.measure(one)
    x = data.test.x[:2560].double() @ one.layer.input_weight.detach().double().mT
    for cloud in found.clouds:  # one weight has its own value as the scale: nothing moves
        assert cloud.moved == pytest.approx(0.0, abs=1e-6 * float(x.max()))  # but for its float32 scale
        assert cloud.share == 1.0


def test_the_published_solver_is_the_plain_iteration(network: nn.Sequential, digits: Data) -> None:
    x = digits.test.x[:100]
    W, U, b = matrices(network[0])
    z, q = np.zeros((100, 12)), x.double().numpy() @ U.T + b
    for _ in range(500):
        new = np.maximum(z @ W.T + q, 0)
        small = np.linalg.norm(new - z) / (np.linalg.norm(z) + 1e-12) < 1e-5
        z = new
        if small:
            break
    assert displacement.published_solve(network, x).double().numpy() == pytest.approx(z, rel=1e-3, abs=1e-3)


# 5. Grids


def test_rounded_iterates_end_within_what_is_proved(bench: subject.Bench) -> None:
    found = grids.measure(bench)
    assert len(found.tracks) == 12
    for track in found.tracks:
        if track.grid is None:
            assert track.floor is track.worst is None
            continue
        assert track.worst is not None
        assert track.worst <= 1
        assert track.floor is not None
        if track.decay is None:
            assert track.end <= track.floor
    ends = {(track.solver, track.grid, track.decay): track.end for track in found.tracks}
    assert ends["PR", 0.1, 0.5] < 1e-6 < ends["PR", 0.001, None] < ends["PR", 0.1, None]


# 6. Gradients


def test_adjoints_give_the_gradients_of_autograd(bench: subject.Bench) -> None:
    """Against unrolled backpropagation through many plain steps, which knows no implicit function theorem."""
    x, y = bench.data.test.x[:20].double(), bench.data.test.y[:20]
    here = gradients._sensitivity(bench.wide, x, y)
    W = here.W.clone().requires_grad_()
    _, U, b = (torch.from_numpy(t) for t in matrices(bench.layer))
    z = torch.zeros(20, 12, dtype=torch.float64)
    for _ in range(3000):
        z = torch.relu(0.9 * z + 0.1 * (z @ W.mT + x @ U.mT + b))
    nn.functional.cross_entropy(bench.wide[1](z), y, reduction="sum").backward()
    assert W.grad is not None
    found = gradients.adjoint(here.W, here.D, here.g).mT @ here.z
    torch.testing.assert_close(found, W.grad, rtol=1e-6, atol=1e-9)


def test_an_adjoint_solves_its_equation() -> None:
    generator = torch.Generator().manual_seed(0)
    W, D, g = (
        torch.randn(5, 5, generator=generator).double() / 5,
        torch.rand(7, 5).double().round(),
        torch.randn(7, 5).double(),
    )
    y = gradients.adjoint(W, D, g)
    torch.testing.assert_close(y, D * (y @ W + g))


@pytest.mark.parametrize(
    ("true", "frozen", "reference", "share"),
    [
        ([1.0, 0.0], [1.0, 0.0], [0.0, 0.0], 0.0),
        ([1.0, 2.0], [0.0, 0.0], [0.0, 0.0], 1.0),
        ([3.0, 0.0], [0.0, 0.0], [0.0, 4.0], 9 / 25),
        ([0.0, 0.0], [0.0, 0.0], [0.0, 0.0], 0.0),
    ],
)
def test_the_share_of_flips(true: list[float], frozen: list[float], reference: list[float], share: float) -> None:
    tensors = (torch.tensor([values]) for values in (true, frozen, reference))
    assert gradients.flipped_share(*tensors) == pytest.approx(share)


def test_without_flips_the_error_is_proportional_to_the_change(bench: subject.Bench) -> None:
    found = gradients.measure(bench)
    assert found.frozen_slope == pytest.approx(1.0, abs=0.15)
    for error in found.errors:
        assert 0 <= error.flip_share <= 1
        assert (error.flip_share == 0) == (error.flipped == 0) or error.flip_share < 1e-6
        if error.flipped == 0:
            assert error.error == pytest.approx(error.frozen)
        assert error.samples_flipped <= 12 * error.flipped + 1e-12


def test_the_slope_of_a_power_law() -> None:
    assert gradients._slope([(x, 3 * x**1.5) for x in (1.0, 2.0, 5.0)]) == pytest.approx(1.5)
    assert gradients._slope([(1.0, 2.0)]) is None
    assert gradients._slope([(1.0, 2.0), (2.0, 0.0)]) is None


# 3. Versions, and the whole


def test_versions_rounded_after_training(bench: subject.Bench) -> None:
    versions = training.rounded(bench).versions
    assert len(versions) == 14
    W, _, _ = matrices(bench.layer)
    for version in versions:
        scheme = training.scheme_of(version.scheme, version.bits, version.parts)
        small = eq.quantize(bench.network, scheme)
        assert version.margin == eq.margin(small)
        assert version.size_bytes == eq.size(small)
        tilde = matrices(small[0])[0]
        assert version.ratio == pytest.approx(np.linalg.norm(tilde - W, 2) / version.float_margin, rel=1e-4)
        if version.scheme == "structured":
            assert version.verdict == "certified"
            assert version.margin == pytest.approx(version.float_margin, rel=1e-3)


def test_training_through_the_quantizer(bench: subject.Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(training, "FEATURES", 16)
    monkeypatch.setattr(training, "RANK", 4)
    for name, bits, held in (("assembled", 8, False), ("assembled", 4, True), ("structured", 1, False)):
        found = training.trained(bench, name, bits, held)
        assert found.epochs == 1
        assert found.version is not None, found.failure
        assert found.version.method == ("held" if held else "trained")
        if name == "structured":
            assert found.version.margin == pytest.approx(found.version.float_margin, rel=1e-3)
    assert list((bench.folder / "unfinished").iterdir()) == []


def test_the_network_is_trained_and_kept_where_none_is_given(
    digits: Data, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(subject, "FEATURES", 16)
    monkeypatch.setattr(subject, "RANK", 4)
    new = subject.begin(Settings(quick=True), digits, tmp_path)
    found = subject.describe(new)
    assert (found.trained_epochs, found.features, found.rank, found.published) == (1, 16, 4, False)
    assert eq.margin(eq.load(tmp_path / "float.safetensors")) == pytest.approx(found.margin)
    (tmp_path / "unfinished").rmdir()  # empty
    again = subject.Bench(Settings(quick=True, seed=1), digits, tmp_path, None, "trained here")
    assert subject.describe(again).accuracy != found.accuracy  # another seed is another network


@pytest.mark.slow
def test_the_whole_paper_on_digits(
    network: nn.Sequential, digits: Data, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(convergence, "PATIENCE", 500)
    path = tmp_path / "model.safetensors"
    eq.save(network, path)
    outcome = run(dataclasses.replace(PAPER, data="digits"), Settings(path, quick=True), digits, tmp_path / "out")
    read = Page(outcome.report.read_text())
    assert "another network" in read.text
    assert "quick run" in read.text
    assert read.text.count("Another network than the published one") > 10
    assert len(read.values("id")) == len(set(read.values("id")))
    kept = {path.name for path in (tmp_path / "out").iterdir()}
    assert kept == {"report.html", "results.json"}
    for section in outcome.reproduction.sections:
        assert section.findings
        assert all(row.why not in ("", "–") for row in section.comparisons)
    rows = {row.what: row for row in outcome.reproduction.comparisons}
    assert rows["Samples within the bound, 8 bits"].ours == "100.00 %"
