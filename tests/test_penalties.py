"""The margin penalty: its value and gradient against eigenvalues, what scaling W does, and that targets are met."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import equipoise as eq
from equipoise import verified
from equipoise.data import Data, load_data
from equipoise.errors import OptionError, StructureError
from equipoise.penalties import SLACK, proved
from equipoise.training import TrainingConfig, fit
from trainings import implicit


def layer(margin: float = 0.3, seed: int = 0, rank: int = 3) -> eq.MonDEQ:
    torch.manual_seed(seed)
    return eq.MonDEQ(5, 12, rank=rank, margin=margin, learn_margin=True).double()


def prepared(bits: int = 3, seed: int = 0, learn_scale: bool = False, **options: Any) -> Any:
    return eq.prepare_qat(layer(seed=seed), eq.Assembled(bits, **options), learn_scale)


def eigenvalues(W: Tensor) -> Tensor:
    return torch.linalg.eigvalsh(torch.eye(len(W), dtype=W.dtype) - (W + W.mT) / 2)


# Value and gradient


@given(st.floats(0.01, 2.0), st.integers(0, 30), st.floats(0.1, 5.0))
def test_the_value_is_the_hinge_on_every_eigenvalue(target: float, seed: int, weight: float) -> None:
    model = layer(seed=seed)
    expected = (target * (1 + SLACK) - eigenvalues(model.weight.detach())).clamp(min=0).sum()
    found = eq.MarginPenalty(target, weight=weight).penalty(model)
    torch.testing.assert_close(found.detach(), weight * expected)


@given(st.floats(0.05, 2.0), st.integers(0, 30))
def test_the_value_of_the_ratio_is_the_hinge_on_every_singular_value(ratio: float, seed: int) -> None:
    model = prepared(seed=seed)
    W = model.recurrent.weights().detach()
    level = ratio / (1 + SLACK) * eigenvalues(W)[0]
    expected = (torch.linalg.svdvals(model.recurrent().detach() - W) - level).clamp(min=0).sum()
    torch.testing.assert_close(eq.MarginPenalty(ratio=ratio).penalty(model).detach(), expected)


def test_the_gradient_is_that_of_the_eigenvalues() -> None:
    """Against autograd through eigvalsh, which is right where eigenvalues are simple (full rank)."""
    model = layer(rank=12)
    parameters = list(model.recurrent.parameters())
    level = float(eigenvalues(model.weight.detach()).median())
    found = torch.autograd.grad(eq.MarginPenalty(level / (1 + SLACK)).penalty(model), parameters)
    direct = (level - eigenvalues(model.weight)).clamp(min=0).sum()
    for one, other in zip(found, torch.autograd.grad(direct, parameters), strict=True):
        torch.testing.assert_close(one, other)


def test_through_the_rounding_gradients_pass_straight_for_the_target_and_codes_stand_still_for_the_ratio() -> None:
    model = eq.prepare_qat(layer(rank=12), eq.Assembled(3))
    W = model.recurrent.weights.B  # type: ignore[union-attr]
    target = eq.MarginPenalty(1.0).penalty(model)
    values, V = torch.linalg.eigh(torch.eye(12) - (model.recurrent() + model.recurrent().mT).detach() / 2)
    V = V[:, values < 1 + SLACK]
    margin = torch.autograd.grad(target, model.recurrent.weights.raw_margin)[0]  # type: ignore[union-attr]
    slope = torch.sigmoid(model.recurrent.weights.raw_margin)  # type: ignore[union-attr]
    torch.testing.assert_close(margin, -V.shape[1] * slope.detach())  # ∂λ/∂m = 1 for each of them
    (skew,) = torch.autograd.grad(eq.MarginPenalty(ratio=1e-3).penalty(model), W)
    assert float(skew.abs().max()) > 0  # the target alone cannot move the skew part, the ratio can


def test_there_is_no_penalty_where_all_holds() -> None:
    value = eq.MarginPenalty(0.1, 0.9).penalty(eq.prepare_qat(layer(0.5), eq.Assembled(12)))
    assert value.item() == 0.0
    assert eq.MarginPenalty(ratio=1e-9).penalty(layer()).item() == 0.0  # nothing is rounded


def test_every_layer_counts_once() -> None:
    one = layer()
    alone = eq.MarginPenalty(1.0).penalty(one).item()
    assert eq.MarginPenalty(1.0).penalty(nn.Sequential(one, nn.Linear(12, 5), one)).item() == pytest.approx(alone)
    both = nn.Sequential(one, nn.Linear(12, 5).double(), layer(seed=1))
    other = eq.MarginPenalty(1.0).penalty(both[2]).item()
    assert eq.MarginPenalty(1.0).penalty(both).item() == pytest.approx(alone + other)


# Scaling W


@given(st.integers(2, 5), st.integers(0, 40), st.sampled_from([0.05, 0.4, 0.8]), st.sampled_from(["tensor", "row"]))
def test_scaling_meets_the_target_and_keeps_the_codes(bits: int, seed: int, target: float, granularity: str) -> None:
    model = prepared(bits, seed, granularity=granularity).eval()
    before, asked = eq.convert(model), eq.MarginPenalty(target)
    asked.project(model)
    after = eq.convert(model)
    assert torch.equal(after.recurrent.codes.codes, before.recurrent.codes.codes)  # type: ignore[union-attr]
    assert eq.margin(after) >= target
    if eq.margin(before) >= target * 1.001:
        assert eq.margin(after) == eq.margin(before)  # nothing to do, nothing done
    else:
        assert eq.margin(after) == pytest.approx(target, rel=1e-3)  # and no more than needed


@pytest.mark.parametrize("learn_scale", [False, True])
@pytest.mark.parametrize("ratio", [0.1, 0.9])
def test_scaling_meets_the_ratio(ratio: float, learn_scale: bool) -> None:
    model = prepared(2, learn_scale=learn_scale).eval()
    asked = eq.MarginPenalty(ratio=ratio)
    assert proved(model, asked)[1] is not None
    asked.project(model)
    margin, shortfall = proved(model, asked)
    assert shortfall is None
    W = model.recurrent.weights().detach()
    change = torch.linalg.matrix_norm(model.recurrent().detach() - W, 2)
    assert float(change / eigenvalues(W)[0]) == pytest.approx(ratio, rel=1e-3)
    assert margin is not None
    assert margin >= (1 - ratio) * verified.margin(W)  # T2


def test_scaling_does_what_it_says_to_plain_weights() -> None:
    lost = eq.MonDEQ.from_weights(
        torch.diag(torch.linspace(-1, 1.3, 12)), torch.zeros(12, 5), torch.zeros(12), check=False
    )
    before = lost.weight.detach().clone()
    eq.MarginPenalty(0.2).project(lost)
    factor = 0.8 / 1.3
    torch.testing.assert_close(lost.weight.detach(), factor * before, rtol=1e-3, atol=0)
    assert eq.margin(lost) >= 0.2
    model = layer(0.1)
    W = model.weight.detach().clone()
    eq.MarginPenalty(0.2).project(model)
    torch.testing.assert_close(model.weight.detach(), 0.8 / 0.9 * W, rtol=1e-3, atol=1e-6)


def test_what_cannot_be_scaled_stays() -> None:
    fixed = eq.MonDEQ(5, 12, margin=0.1)
    structured = eq.prepare_qat(layer(0.1), eq.Structured(2)).eval()
    for model in (fixed, structured):
        before = {name: value.clone() for name, value in model.state_dict().items()}
        eq.MarginPenalty(0.3).project(model)
        assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


# Training


@pytest.fixture(scope="module")
def digits() -> Data:
    return load_data("digits")


@pytest.mark.parametrize(
    ("bits", "asked"), [(4, eq.MarginPenalty(0.6)), (2, eq.MarginPenalty(0.5)), (3, eq.MarginPenalty(ratio=0.3))]
)
def test_training_gives_the_margin_that_was_asked_for(bits: int, asked: eq.MarginPenalty, digits: Data) -> None:
    model = eq.prepare_qat(implicit(), eq.Assembled(bits))
    assert proved(model, asked)[1] is not None  # it is not there from the start
    config = TrainingConfig(6, learning_rate=1e-2, accelerator="cpu", margin=asked)
    result = fit(model, digits, config, progress=False)
    codes = eq.convert(model)
    assert (result.target_met, result.shortfall) == (True, None)
    assert result.margin == eq.margin(codes) == result.history[-1]["margin"]
    assert proved(codes, eq.MarginPenalty(asked.target or 0.01))[1] is None
    assert (result.accuracy_test or 0) > 0.7
    assert eq.certify(codes).certified


def test_a_target_that_is_missed_is_told(digits: Data) -> None:
    model = nn.Sequential(eq.MonDEQ(64, 16, rank=4, margin=0.1), nn.Linear(16, 10))  # the margin is fixed
    config = TrainingConfig(1, accelerator="cpu", margin=eq.MarginPenalty(0.4))
    result = fit(model, digits, config, progress=False)
    assert result.target_met is False
    assert result.margin == pytest.approx(0.1, rel=1e-4)
    assert result.shortfall == f"a margin of 0.4 was asked for, and only {result.margin:.6g} is proved"


def test_the_ratio_that_is_proved_is_an_upper_bound_and_says_where_there_is_none() -> None:
    model = prepared(2)
    W = model.recurrent.weights().detach()
    true = float(torch.linalg.matrix_norm(model.recurrent().detach() - W, 2) / eigenvalues(W)[0])
    for factor in (1 + 1e-6, 1 - 1e-6):
        shortfall = proved(model, eq.MarginPenalty(ratio=true * factor))[1]
        assert (shortfall is None) == (factor > 1)
    with torch.no_grad():
        lost = eq.MonDEQ.from_weights(2 * torch.eye(4), torch.zeros(4, 2), torch.zeros(4), check=False)
    assert "only inf is proved" in (proved(eq.prepare_qat(lost, eq.Assembled(8)), eq.MarginPenalty(ratio=1.0))[1] or "")


# Refusals


@pytest.mark.parametrize(
    "options",
    [{}, {"weight": 2.0}, {"target": 0.0}, {"target": -1}, {"target": math.nan}, {"ratio": 0}, {"ratio": math.inf},
     {"target": "0.1"}, {"target": True}, {"target": 0.1, "weight": 0.0}, {"target": 0.1, "weight": None}],
)  # fmt: skip
def test_bad_options_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(OptionError, match="margin penalty"):
        eq.MarginPenalty(**options)


def test_a_model_without_equilibrium_layers_is_refused(digits: Data) -> None:
    with pytest.raises(StructureError, match="no equilibrium layer"):
        eq.MarginPenalty(0.1).penalty(nn.Linear(2, 2))
    config = TrainingConfig(1, accelerator="cpu", margin=eq.MarginPenalty(0.1))
    with pytest.raises(StructureError, match="no equilibrium layer"):
        fit(nn.Linear(64, 10), digits, config, progress=False)
    assert proved(nn.Linear(2, 2)) == (None, None)
