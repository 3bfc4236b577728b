"""Layers, injections, heads and weights from elsewhere: what may compute something else is in no certificate."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm

import equipoise as eq
from equipoise.errors import StructureError
from equipoise.norms import WeightedMax
from test_extending import Circulant, X, network

F64 = torch.float64


def test_weights_of_ones_own_are_proved_of_and_quantized(tmp_path: Path) -> None:
    model = network()
    model[0].recurrent = Circulant(torch.tensor([0.2, 0.1, -0.3, 0.2, 0.0]))
    model(X).sum().backward()
    assert model[0].recurrent.row.grad is not None
    W = model[0].weight.detach().double()
    true = float(torch.linalg.eigvalsh(torch.eye(5) - (W + W.mT) / 2)[0])
    assert true - 1e-12 <= eq.margin(model) <= true
    for scheme in (eq.Structured(4), eq.Assembled(8), eq.Compensated(4), eq.Cayley(8)):
        assert eq.certify(eq.quantize(model, scheme), reference=model, inputs=X).certified
    assert eq.convert(eq.prepare_qat(model, eq.Assembled(8))) is not None
    with pytest.raises(StructureError, match="Circulant"):
        eq.save(model, tmp_path / "m.safetensors")


def test_a_norm_of_ones_own_is_refused() -> None:
    class Easy(WeightedMax):
        def margin(self, W: Tensor, error: float = 0.0) -> float:
            return 1.0

    model = network()
    model[0].recurrent = Circulant(torch.full((5,), 3.0))
    model[0].recurrent.family = lambda: Easy(torch.ones(5))
    with pytest.raises(StructureError, match="Circulant"):
        eq.certify(model)


def test_a_layer_that_overrides_what_certificates_are_about_is_refused() -> None:
    class Mine(eq.MonDEQ):  # type: ignore[misc]
        def _inject(self, x: Tensor) -> Tensor:
            return super()._inject(x) * 1e6

    with pytest.raises(StructureError, match="Mine"):
        eq.certify(nn.Sequential(Mine(6, 5), nn.Linear(5, 3)))


def test_what_comes_before_forward_is_no_way_around_it() -> None:
    class Negated(nn.Linear):
        def __call__(self, x: Tensor) -> Tensor:
            return -super().__call__(x)

    class Doubled(eq.MonDEQ):  # type: ignore[misc]
        def __call__(self, x: Tensor) -> Tensor:
            return 2 * super().__call__(x)

    class Louder(nn.Identity):
        def forward(self, x: Tensor) -> Tensor:
            return 9 * x

    for model in (nn.Sequential(eq.MonDEQ(6, 5), Negated(5, 3)), Doubled(6, 5)):
        with pytest.raises(StructureError, match="__call__ of its own"):
            eq.certify(model)
    with pytest.raises(StructureError, match="Louder"):
        eq.certify(nn.Sequential(Louder(), eq.LipschitzMDEQ(2, 8, 3, channels=(8, 8))))


def test_weights_that_change_as_they_are_read_are_refused() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(eq.MonDEQ(6, 5), spectral_norm(nn.Linear(5, 3)))
    with pytest.raises(StructureError, match=r"model\.eval\(\)"):
        eq.certify(model, reference=model, inputs=X)
    assert eq.certify(model.eval(), reference=model, inputs=X).agreement == 1.0


class Turned(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return -super().forward(x)


class Amplified(nn.Conv2d):
    def _conv_forward(self, *arguments: Any) -> Tensor:
        return 9 * super()._conv_forward(*arguments)


def by_injection() -> nn.Module:
    model = network()
    model[0].injection = Turned(6, 5)
    return model


def by_head() -> nn.Module:
    model = eq.LipschitzMDEQ(2, 8, 3, channels=(8, 8))
    model.head["linear"] = Turned(model.linear.in_features, 3)
    return model


def by_convolution() -> nn.Module:
    model = eq.MonConv2d(1, 2, 4)
    model.injection = Amplified(1, 2, 3, padding=1)
    return model


def by_edges() -> nn.Module:
    model = eq.MonConv2d(1, 2, 4)
    model.injection = nn.Conv2d(1, 2, 3, padding=1, padding_mode="replicate")
    return model


@pytest.mark.parametrize("make", [by_injection, by_head, by_convolution, by_edges], ids=lambda make: make.__name__)
def test_parts_that_compute_something_else_than_their_weights_say_are_refused(make: Any) -> None:
    with pytest.raises(StructureError, match=r"injection|head\.linear"):
        eq.certify(make())


def test_bounds_of_iterates_are_of_plain_layers_too() -> None:
    class Mine(eq.MonDEQ):  # type: ignore[misc]
        def _inject(self, x: Tensor) -> Tensor:
            return super()._inject(x) * 1e6

    for layer in (by_injection()[0], Mine(6, 5)):  # type: ignore[index]
        with pytest.raises(StructureError, match="of its own"):
            eq.iterate_floor(layer, X, eq.Rounded(eq.ForwardBackward(), 1e-3))
