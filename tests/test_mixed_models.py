"""Mixed precision: sizes and bounds of the menu against the quantized models."""

from __future__ import annotations

import random

import pytest
import torch
from torch import nn

import equipoise as eq
from equipoise.mixed import Parts, measure, parts_of, scheme_of
from equipoise.quantization import QuantizedSkew, QuantizedTensor
from test_mixed import every
from test_plan import small_data, small_model

F64 = torch.float64


# What the menu says is true of the models


def chained() -> nn.Sequential:
    """Two equilibrium layers, a linear one between them, no head."""
    torch.manual_seed(3)
    return nn.Sequential(
        eq.MonDEQ(6, 7, rank=3, margin=0.4), nn.Linear(7, 5), nn.ReLU(), eq.MonDEQ(5, 6, rank=6, margin=0.8)
    ).eval()


def twice() -> nn.Sequential:
    """One layer that appears two times."""
    torch.manual_seed(4)
    layer = eq.MonDEQ(6, 6, rank=3, margin=0.6)
    return nn.Sequential(layer, layer, nn.Linear(6, 3)).eval()


@pytest.mark.parametrize("make", [small_model, chained, twice])
@pytest.mark.parametrize("input_bits", [None, 5])
def test_bytes_are_those_of_the_quantized_model(make: type[nn.Module], input_bits: int | None) -> None:
    model = make()
    menu = measure(model, small_data().validation.x, [1, 3, 8], input_bits)
    drawn = random.Random(0).sample(every(menu), 12)
    for parts in (*drawn, *menu.uniform()):
        assert menu.size(parts) == eq.size(eq.quantize(model, scheme_of(parts))), parts
    if input_bits is not None:
        assert {parts.U for parts in every(menu)} == {input_bits}


def test_contributions_are_those_of_each_part_by_itself() -> None:
    torch.manual_seed(5)
    layer = eq.MonDEQ(6, 8, rank=3, margin=0.4).double()
    model, x = nn.Sequential(layer, nn.Linear(8, 3).double()).eval(), small_data().validation.x.double()
    menu = measure(model, x, [2])
    A, K, m = layer.recurrent.factors()  # type: ignore[operator]
    U, b, V = layer.injection.weight.detach(), layer.injection.bias.detach(), model[1].weight.detach()  # type: ignore[union-attr]
    z = layer.solve(x, tol=1e-12).value.detach()
    near = QuantizedTensor.fit(A, 2, scale="mse").dequantize()
    changes = (
        z @ (A.mT @ A - near.mT @ near),
        z @ (QuantizedSkew.fit(K, 2, scale="mse").dequantize() - K).mT,
        x @ (QuantizedTensor.fit(U, 2, scale="mse").dequantize() - U).mT,
        (QuantizedTensor.fit(b, 2, scale="mse").dequantize() - b)[None],
        z @ (QuantizedTensor.fit(V, 2, scale="mse").dequantize() - V).mT,
    )
    over = (m, m, m, m, float(torch.linalg.matrix_norm(V, 2)))
    expected = [float(change.norm(dim=1).mean()) / by for change, by in zip(changes, over, strict=True)]
    assert menu.contributions(Parts(2, 2, 2, 2, 2)) == pytest.approx(tuple(expected), rel=1e-5)
    assert menu.contributions(Parts(2, 2, None, None, None))[2:] == (0.0, 0.0, 0.0)


@pytest.mark.parametrize("seed", range(3))
def test_the_sum_bounds_how_far_the_answers_move(seed: int) -> None:
    torch.manual_seed(seed)
    model, x = small_model(), small_data(seed).validation.x
    menu = measure(model, x, [1, 2, 4, 8])
    head = model[1]
    assert isinstance(head, nn.Linear)
    tight = 0.0
    for parts in random.Random(seed).sample(every(menu), 12):
        small = eq.quantize(model, scheme_of(parts))
        proof = eq.certify(small, model, x)
        assert proof.displacement is not None
        assert proof.actual_displacement is not None
        found = menu.contributions(parts)
        state = sum(found[:4])
        moved = float(proof.actual_displacement.mean())
        assert moved <= state * (1 + 1e-5) + 1e-5
        tight = max(tight, moved / state if state else 0.0)
        assert float(proof.displacement.mean()) <= state * (1 + 1e-5) + 1e-4  # T3's dual side is no more than the sum
        # in scores, with the product of two changes that the estimate leaves out
        norm = float(torch.linalg.matrix_norm(head.weight.detach(), 2))
        coarse = small[1].dense()[0] - head.weight.detach() if parts.head else torch.zeros_like(head.weight)  # type: ignore[index]
        scores = float((small(x) - model(x)).detach().norm(dim=1).mean())
        both = norm * (state + found.head) + float(torch.linalg.matrix_norm(coarse.detach(), 2)) * moved
        assert scores <= both * (1 + 1e-5) + 1e-5
    assert tight > 0.05  # not a bound by being huge


def test_along_a_chain_a_layer_counts_with_its_growth_through_those_that_follow() -> None:
    model, x = chained().double(), small_data().validation.x.double()
    menu = measure(model, x, [2, 8])
    first, between, last = model[0], model[1], model[3]
    assert isinstance(first, eq.MonDEQ)
    assert isinstance(last, eq.MonDEQ)
    points = first.solve(x, tol=1e-12).value, model(x)
    shares = []
    for layer, z in zip((first, last), points, strict=True):
        _, K, margin = layer.recurrent.factors()  # type: ignore[operator]
        change = QuantizedSkew.fit(K, 2, scale="mse").dequantize() - K
        shares.append(float((z @ change.mT).norm(dim=1).mean().detach()) / margin)
    norms = [float(torch.linalg.matrix_norm(m.weight.detach(), 2)) for m in (between, last.injection)]  # type: ignore[union-attr, operator, arg-type]
    expected = shares[0] * norms[0] * norms[1] / 0.8 + shares[1]
    assert pytest.approx(expected, rel=1e-5) == menu.contributions(Parts(2, 2, None, None, None)).K
    assert shares[1] < 0.9 * expected
    for parts in every(menu):
        assert parts.head is None  # the model ends in an equilibrium layer
        proof = eq.certify(eq.quantize(model, scheme_of(parts)), model, x)
        assert proof.actual_displacement is not None
        assert float(proof.actual_displacement.mean()) <= 1.1 * sum(menu.contributions(parts))


def test_bits_travel_into_the_scheme_and_back() -> None:
    parts = Parts(2, 4, 1, 8, None)
    scheme = scheme_of(parts)
    assert scheme == eq.Structured(bits=2, skew_bits=4, input_bits=1, bias_bits=8)
    assert parts_of(scheme) == parts
    assert parts_of(eq.Structured(bits=3)) == Parts(3, 3, None, None, None)
    assert str(parts) == "2/4/1/8/float"
    assert eq.quantize(small_model(), scheme)[0].recurrent.K.bits == 4  # type: ignore[index]
