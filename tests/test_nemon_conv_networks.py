"""Convolutional networks on their way: certified by row sums, quantized below them, saved, trained by the command."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import equipoise as eq
from command_line import Capsys, run, run_json
from equipoise.data import load_data
from equipoise.errors import FileFormatError, OptionError, StructureError
from equipoise.files import read_certificate
from equipoise.jobs import Job
from equipoise.norms import WeightedMax
from equipoise.operators.conv import ConvOperator
from equipoise.operators.kernels import StructuredKernel
from equipoise.presets import Sizes, convolutional, preset_of
from equipoise.training import TrainingConfig, fit
from trainings import stopped


def network(seed: int = 0, channels: int = 3, gamma: float = 0.8) -> nn.Sequential:
    torch.manual_seed(seed)
    model = nn.Sequential(
        nn.Unflatten(1, (1, 6, 6)),
        eq.NEMONConv2d(1, channels, gamma=gamma),
        nn.AvgPool2d(2),
        nn.Flatten(),
        nn.Linear(9 * channels, 4),
    )
    with torch.no_grad():
        model[1].recurrent.d.normal_(std=0.7)
        model[1].recurrent.T.normal_(std=0.3)
    return model.eval()


def dense(operator: ConvOperator) -> Tensor:
    with torch.no_grad():
        return operator.apply(torch.eye(operator.features, dtype=operator.weight.dtype)).mT.double()


def codes_operator(weights: StructuredKernel, size: tuple[int, int]) -> ConvOperator:
    """The kernel that the codes define, computed here: D⁻¹T̃D, and at the centre γ − Σ |T̃|."""
    T, eta = weights.T.dequantize(), weights.eta.double()
    kernel = T * (eta[:, None] / eta[None, :])[:, :, None, None]
    for i in range(len(T)):
        kernel[i, i, 1, 1] += float(weights.gamma) - T[i].abs().sum()
    return ConvOperator(kernel, size, eta)


@pytest.mark.parametrize("bits", [1, 2, 3, 4, 8])
@pytest.mark.parametrize("granularity", ["tensor", "row"])
def test_the_measure_is_kept_at_every_bit_width(bits: int, granularity: str) -> None:
    model = network(seed=bits)
    small = eq.quantize(model, eq.Structured(bits=bits, granularity=granularity))  # type: ignore[arg-type]
    weights = small[1].recurrent
    assert isinstance(weights, StructuredKernel)
    gamma = float(model[1].recurrent.gamma)
    assert float(weights.gamma) == gamma
    certificate = eq.certify(small, model)
    assert certificate.certified
    assert certificate.family == "linf"
    assert certificate.measure is not None
    assert certificate.measure <= gamma + 1e-15
    assert certificate.margin == eq.margin(small)
    assert certificate.rate is not None
    assert certificate.rate < 1
    operator, truth = small[1].operator_for((5, 6)), codes_operator(weights, (5, 6))
    family = WeightedMax(weights.eta.double().repeat_interleave(30))
    applied, stored = dense(operator), dense(truth)
    for W in (applied, stored):
        assert family.margin(W) >= certificate.margin - 1e-12
        assert family.lipschitz(W) <= certificate.lipschitz * (1 + 1e-12)
        assert family.norm(W) <= operator.norm() * (1 + 1e-12)
    assert family.margin(applied) >= 1 - gamma - 1e-12, "what is multiplied by keeps γ, too"
    apart = float(torch.linalg.matrix_norm(applied - stored, 2))
    assert 0 < apart <= operator.representation_error < 1e-4
    before = WeightedMax(model[1].recurrent.family().eta.repeat_interleave(30))
    assert certificate.delta_norm is not None
    assert certificate.delta_norm >= before.norm(stored - dense(model[1].operator_for((5, 6)))) * (1 - 1e-9)
    again = eq.certify(small, reference=small).delta_norm  # each of the two may lie that far from what is multiplied by
    assert again is not None
    assert again >= 1.9 * float(operator._doubt.rows.max())


def test_the_certificate_of_a_float_network_holds_of_small_dense_matrices() -> None:
    model = network(seed=3).double()
    certificate, eta = eq.certify(model), model[1].recurrent.family().eta
    for h, w in ((1, 1), (2, 3), (5, 4)):
        W, family = dense(model[1].operator_for((h, w))), WeightedMax(eta.repeat_interleave(h * w))
        assert family.margin(W) >= certificate.margin - 1e-12
        assert family.lipschitz(W) <= certificate.lipschitz * (1 + 1e-12)
    assert certificate.measure == pytest.approx(0.8, abs=1e-6)
    assert eq.lipschitz(model) == certificate.lipschitz


def test_answers_of_codes_lie_within_their_bound() -> None:
    model = network(seed=5)
    small = eq.quantize(model, eq.Structured(bits=3))
    x = torch.randn(3, 1, 5, 6)
    found = small[1].solve(x, tol=1e-3)
    truth = codes_operator(small[1].recurrent, (5, 6))
    W, q = dense(truth), small[1].double().injection(x.double()).detach().flatten(1)
    z = torch.zeros_like(q)
    for _ in range(3000):
        z = 0.9 * z + 0.1 * torch.relu(z @ W.mT + q)
    assert bool(((found.value.double() - z).abs().amax(1) <= found.error_bound + 1e-9).all())


def test_files_hold_the_very_numbers(tmp_path: Path) -> None:
    model, x = network(), torch.randn(4, 36)
    for name, kept in (("float", model), ("codes", eq.quantize(model, eq.Structured(bits=2, head_bits=8)))):
        eq.save(kept, tmp_path / name, certificate=eq.certify(kept))
        again = eq.load(tmp_path / name)
        assert read_certificate(tmp_path / name)["certified"] is True
        assert torch.equal(again(x), kept(x))
        assert again[1].scheme == kept[1].scheme
        assert eq.certify(again) == eq.certify(kept)
    assert eq.size(again) < eq.size(model) / 2
    wide = nn.Sequential(nn.AvgPool2d(3, stride=2), eq.NEMONConv2d(1, 2))
    with pytest.raises(StructureError, match="AvgPool2d"):
        eq.save(wide, tmp_path / "wide")


def test_a_file_with_another_kernel_is_refused(tmp_path: Path) -> None:
    from safetensors import safe_open
    from safetensors.torch import save_file

    eq.save(network(), tmp_path / "good")
    with safe_open(tmp_path / "good", "pt") as file:
        tensors, metadata = {k: file.get_tensor(k) for k in file.keys()}, file.metadata()  # noqa: SIM118
    for key, value in (("1.recurrent.T", torch.zeros(3, 3, 5, 5)), ("1.recurrent.gamma", torch.tensor(1.5))):
        save_file({**tensors, key: value}, tmp_path / "bad", metadata)
        with pytest.raises(FileFormatError):
            eq.load(tmp_path / "bad")


def test_what_is_not_proved_is_refused_and_says_what_is() -> None:
    model, x = network(), torch.zeros(2, 36)
    small = eq.quantize(model, eq.Structured(bits=4))
    for attempt in (
        lambda: eq.certify(small, model, x),
        lambda: eq.prepare_qat(model, eq.Structured(bits=2)),
        lambda: eq.interval(model, x, x),
        lambda: eq.input_lipschitz(model),
    ):
        with pytest.raises(StructureError, match="network for images can be"):
            attempt()
    with pytest.raises(StructureError, match="Structured alone"):
        eq.quantize(model, eq.Assembled(bits=4))
    for name in ("input_bits", "bias_bits", "skew_bits"):
        with pytest.raises(OptionError, match=name):
            eq.quantize(model, eq.Structured(bits=4, **{name: 4}))
    with pytest.raises(StructureError, match="quantized already"):
        eq.quantize(small, eq.Structured(bits=2))
    with pytest.raises(StructureError, match="convolutional layer"):
        eq.certify(small, network(channels=2))


def test_presets_are_the_networks_they_say() -> None:
    data = load_data("digits")
    published, small = (preset_of("nemonconv", name).build(data, Sizes()) for name in ("published", "small"))
    assert published[1].channels == 81
    assert float(published[1].recurrent.gamma) == pytest.approx(0.1)
    assert published(data.test.x[:2]).shape == small(data.test.x[:2]).shape == (2, 10)
    with pytest.raises(OptionError, match="too small"):
        convolutional(data, 2, stride=8, pool=4)
    for options, says in (({"preset": "huge"}, "small, published"), ({"margin": 1.0}, "has none, but mondeq")):
        with pytest.raises(OptionError, match=says):
            Job("digits", TrainingConfig(1), model="nemonconv", **options)  # type: ignore[arg-type]
    with pytest.raises(OptionError, match="as floats"):
        Job("digits", TrainingConfig(1), eq.Structured(bits=2), model="nemonconv")


def test_the_command_trains_quantizes_and_certifies(tmp_path: Path, capsys: Capsys) -> None:
    out, small = tmp_path / "m.safetensors", tmp_path / "m2.safetensors"
    options = ("--model", "nemonconv", "--features", 8, "--lr", 3e-2, "--epochs", 3, "--batch-size", 32)
    found = run_json(capsys, "train", *options, "--out", out)
    assert found["accuracy_test"] > 0.75
    assert found["certified"] is True
    assert found["margin"] >= 0.9 - 1e-6
    rows = (tmp_path / "m.run" / "metrics.csv").read_text().splitlines()
    assert len(rows) == 4
    assert rows[0].endswith("margin,steps")
    run_json(capsys, "quantize", out, "--scheme", "structured", "--bits", 4, "--out", small)
    certified = run_json(capsys, "certify", small, "--reference", out, "--require")
    assert certified["measure"] <= 0.1 + 1e-7
    data = load_data("digits")
    right = (eq.load(small)(data.test.x).argmax(1) == data.test.y).double().mean()
    assert abs(float(right) - found["accuracy_test"]) < 0.1
    status, _, said = run(capsys, "train", "--gamma", "0.1", "--out", tmp_path / "x.safetensors")
    assert status == 2
    assert "nemonconv" in said


def test_training_goes_on_where_it_stopped(tmp_path: Path) -> None:
    data = load_data("digits")
    whole, parts = (convolutional(data, channels=3) for _ in range(2))
    config = TrainingConfig(2, 256)
    fit(whole, data, config, tmp_path / "whole", progress=False)
    with pytest.raises(InterruptedError):
        fit(stopped(parts, 8), data, config, tmp_path / "parts", progress=False)
    again = convolutional(data, channels=3)
    fit(again, data, config, tmp_path / "parts", progress=False, resume=True)
    for one, other in zip(whole.parameters(), again.parameters(), strict=True):
        assert torch.equal(one, other)
