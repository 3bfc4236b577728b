"""Weights without structure are certified by whichever family proves them, and everything says which (theory §7)."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import equipoise as eq
from equipoise.certificates.wellposed import fresh_operator
from equipoise.errors import NotWellPosedError, StructureError
from equipoise.export.proof import Exact
from equipoise.norms import Euclidean, WeightedMax
from equipoise.penalties import proved
from problems import true_margin

SLANTED = torch.tensor([[0.0, 8.0, 1.0], [0.0, -1.0, 6.0], [0.0, 0.0, 0.25]], dtype=torch.float64)
"""No Euclidean margin, and every measure down to 1/4 for weights that fall fast enough."""


def slanted(dtype: torch.dtype = torch.float64, **options: object) -> eq.MonDEQ:
    generator = torch.Generator().manual_seed(0)
    U, b = (torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype) for shape in ((3, 4), (3,)))
    return eq.MonDEQ.from_weights(SLANTED.to(dtype), U, b, check=False, **options)


def inputs(count: int = 20, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(count, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("bits", [None, 8])
def test_margin_operator_solve_and_certificate_speak_of_one_norm(dtype: torch.dtype, bits: int | None) -> None:
    layer = slanted(dtype)
    assert true_margin(SLANTED) < 0
    if bits is not None:
        layer = eq.quantize(layer, eq.Assembled(bits))
    found = eq.certify(layer)
    assert found.certified
    assert found.family == "linf"
    assert found.margin == eq.margin(layer) == layer.operator.margin() == fresh_operator(layer).margin() > 0
    assert found.lipschitz == eq.lipschitz(layer) == layer.operator.lipschitz()
    assert isinstance(layer.operator.family, WeightedMax)
    assert layer.operator.euclidean_margin() < 0
    assert found.rate is not None
    assert found.rate < 1
    assert set(found.closed_rates.values()) == {None}  # they are of the 2-norm
    x = inputs(dtype=dtype)
    solution = layer.solve(x)
    assert bool(solution.converged.all())
    exact = eq.MonDEQ.from_weights(
        *(t.detach().double() for t in (layer.weight, layer.input_weight, layer.bias)), False
    )
    truth = exact.solve(x.double(), tol=1e-13).value
    assert bool(((solution.value.double() - truth).abs().amax(1) <= solution.error_bound).all())
    assert eq.input_lipschitz(layer) == eq.input_lipschitz(layer, "linf") is not None
    assert eq.input_lipschitz(layer, "l2") is None


def test_displacement_and_agreement_are_proved_in_that_norm() -> None:
    head = nn.Linear(3, 2).double()
    model = nn.Sequential(slanted(), head)
    coded = eq.quantize(model, eq.Assembled(8))
    found = eq.certify(coded, reference=model, inputs=inputs())
    assert found.displacement is not None
    moved = (coded[0].solve(inputs(), tol=1e-12).value - model[0].solve(inputs(), tol=1e-12).value).norm(dim=1)
    assert bool((moved <= found.displacement).all())
    assert found.agreement is not None
    assert found.agreement > 0
    same = coded(inputs()).argmax(1) == model(inputs()).argmax(1)
    assert set((~same).nonzero()[:, 0].tolist()) <= set(found.unproved.tolist())
    radius = eq.certified_radius(coded, inputs())
    assert bool((radius > 0).any())
    with pytest.raises(StructureError, match="linf"):
        eq.certified_radius(coded, inputs(), "l2")


def test_the_measure_is_that_of_the_perron_vector() -> None:
    W = torch.tensor([[0.0, 2.6], [0.1, 0.0]], dtype=torch.float64)  # margin 1 − 1.35; measure √0.26
    U, b = torch.eye(2).double(), torch.zeros(2).double()
    for layer in (eq.MonDEQ.from_weights(W, U, b, check=False), eq.NEMON.from_weights(W, U, b)):
        found = eq.certify(layer, reference=layer, inputs=torch.randn(6, 2, dtype=torch.float64))
        assert (found.certified, found.verdict, found.family) == (True, "certified", "linf")
        assert found.measure == pytest.approx(0.26**0.5, abs=1e-6)
        assert found.displacement is not None
        assert float(found.displacement.max()) < 1e-6


def test_the_euclidean_family_stays_where_it_proves_anything() -> None:
    W = torch.tensor([[0.5, 0.1], [0.0, 0.5]], dtype=torch.float64)
    layer = eq.MonDEQ.from_weights(W, torch.eye(2).double(), torch.zeros(2).double())
    for model in (layer, eq.quantize(layer, eq.Assembled(8))):
        assert eq.certify(model).family == "l2"
        assert isinstance(model.operator.family, Euclidean)
        assert isinstance(fresh_operator(model).family, Euclidean)


@given(st.integers(1, 6), st.integers(0, 10_000), st.floats(0.1, 2.0))
def test_some_family_or_none(n: int, seed: int, size: float) -> None:
    W = torch.randn(n, n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * size
    W = torch.triu(W) if seed % 2 else W
    layer = eq.MonDEQ.from_weights(W, torch.eye(n).double(), torch.zeros(n).double(), check=False)
    by_rows = (W - torch.diag(W.diagonal())).abs() + torch.diag(W.diagonal())
    best = float(torch.linalg.eigvals(by_rows).real.max())
    found = eq.certify(layer)
    if true_margin(W) > 1e-9:
        assert found.certified
        assert found.family == "l2"
    elif best < 0.999:
        assert found.certified
        assert found.family == "linf"
    elif best > 1.001 and true_margin(W) < 0:
        assert not found.certified
        assert found.family == "l2"
        assert found.margin == pytest.approx(true_margin(W), abs=1e-9)


def test_a_checked_layer_is_euclidean_and_says_what_else_there_is() -> None:
    U, b = torch.eye(3).double(), torch.zeros(3).double()
    with pytest.raises(NotWellPosedError, match=r"margin -.*NEMON\.from_weights") as caught:
        eq.MonDEQ.from_weights(SLANTED, U, b)
    assert caught.value.margin < 0
    with pytest.raises(NotWellPosedError, match="Scale W down"):
        eq.MonDEQ.from_weights(3 * torch.ones(3, 3).double(), U, b)


def test_the_norm_follows_the_weights() -> None:
    layer = slanted()
    assert eq.certify(layer).family == "linf"
    with torch.no_grad():
        layer.recurrent.weight.copy_(0.5 * torch.eye(3))
    assert isinstance(layer.operator.family, Euclidean)
    assert layer.operator.margin() == eq.margin(layer) == pytest.approx(0.5)
    with torch.no_grad():
        layer.recurrent.weight.copy_(3 * torch.ones(3, 3))
    assert not eq.certify(layer).certified
    assert layer.operator.margin() < 0


def test_gradients_in_training_and_in_evaluation_are_the_same() -> None:
    for activation in (eq.ReLU(), eq.Tanh()):
        layer, found = slanted(activation=activation, solver=eq.Picard()), []
        for mode in (True, False):
            layer.train(mode).zero_grad()
            layer(inputs()).square().sum().backward()
            found.append([p.grad.clone() for p in layer.parameters()])
        for one, other in zip(*found, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-8, atol=1e-9)


def test_what_is_of_the_2_norm_refuses_or_counts_its_own_margin() -> None:
    layer = slanted()
    with pytest.raises(NotWellPosedError, match="Euclidean margin"):
        eq.iterate_floor(layer, inputs(), eq.Rounded(eq.PeacemanRachford(), 1e-3))
    assert Exact.of(layer).margin < 0  # bounds of exported programs are in the 2-norm
    found, missed = proved(layer, eq.MarginPenalty(target=0.01))
    assert found is not None
    assert found > 0  # well posed, and yet not what was asked for
    assert missed is not None
    assert "-" in missed


def test_it_survives_a_file(tmp_path: Path) -> None:
    for model in (slanted(), eq.quantize(slanted(), eq.Assembled(6))):
        path = tmp_path / "model.safetensors"
        eq.save(model, path, eq.certify(model), force=True)
        again = eq.load(path)
        assert eq.certify(again).to_dict() == eq.certify(model).to_dict()
