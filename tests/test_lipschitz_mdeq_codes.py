"""The Lipschitz multiscale DEQ as codes, and in files."""

from __future__ import annotations

import copy
import warnings
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import equipoise as eq
from equipoise.certificates.fingerprint import fingerprint
from equipoise.layers.blocks import CappedConv2d, CodedKernel
from multiscale_networks import images, small

# Quantized


@pytest.mark.parametrize("bits", [1, 2, 4, 8, 16])
def test_capped_codes_keep_the_contraction(bits: int) -> None:
    model = small(torch.float32, contraction=0.9).eval()
    quantized = eq.quantize(model, eq.Structured(bits=bits))
    assert isinstance(quantized, eq.LipschitzMDEQ)
    assert quantized.contraction() <= 0.9
    for conv in quantized.map.convs.values():
        assert isinstance(conv, CappedConv2d)
        assert isinstance(conv.kernel, CodedKernel)
        assert conv.step("proof").norm <= model.plan.norm_cap
    assert eq.size(quantized) < eq.size(model)


def test_displacements_hold_for_each_image() -> None:
    model, x = small(torch.float32, contraction=0.9).eval(), images(6, torch.float32)
    for scheme in (eq.Structured(bits=3), eq.Structured(bits=8), eq.Assembled(bits=6)):
        quantized = eq.quantize(model, scheme)
        found = eq.certify(quantized, reference=model, inputs=x)
        assert found.certified
        assert found.verdict == "certified"
        truth = [
            network.double().solve(x.double(), tol=1e-12).value
            for network in (copy.deepcopy(quantized), copy.deepcopy(model))
        ]
        actual = (truth[0] - truth[1]).norm(dim=1)
        assert found.displacement is not None
        assert bool((actual <= found.displacement).all())
        assert found.actual_displacement is not None
        assert found.actual_error is not None
        assert bool(((actual - found.actual_displacement).abs() <= found.actual_error).all())
        same = quantized(x).argmax(1) == model(x).argmax(1)
        assert found.unproved is not None
        assert found.agreement == 1 - len(found.unproved) / 6
        proved = torch.ones(6, dtype=torch.bool)
        proved[found.unproved] = False
        assert bool(same[proved].all())


def test_fine_codes_prove_the_class() -> None:
    model, x = small(torch.float32, contraction=0.5).eval(), images(20, torch.float32)
    with torch.no_grad():
        model.linear.weight.mul_(20)
    found = eq.certify(eq.quantize(model, eq.Structured(bits=16)), reference=model, inputs=x)
    assert found.agreement is not None
    assert found.agreement > 0.5


def test_a_certificate_that_does_not_hold_is_not_given() -> None:
    model = small(norm_cap=8.0).eval()
    with torch.no_grad():
        for conv in model.map.convs.values():
            conv.kernel.weight.mul_(3)
    found = eq.certify(model)
    assert model.contraction() > 1
    assert not found.certified
    assert found.verdict == "unknown"
    assert found.rate is None
    with pytest.warns(eq.ConvergenceWarning, match="no bound exists"):
        solution = model.solve(images(2), eq.Picard(max_steps=3), stop="bound")
    assert not bool(solution.converged.any())
    assert bool(torch.isinf(solution.error_bound).all())


def test_codes_that_do_not_fit_are_refused() -> None:
    model = small(torch.float32)
    with pytest.raises(eq.StructureError, match="quantized already"):
        eq.quantize(eq.quantize(model, eq.Structured(bits=4)), eq.Structured(bits=4))
    with pytest.raises(eq.EquipoiseError, match="Compensated"):
        eq.quantize(model, eq.Compensated(bits=4))
    with pytest.raises(eq.OptionError, match="input_bits"):
        eq.quantize(model, eq.Structured(bits=4, input_bits=4))
    with pytest.raises(eq.StructureError, match="no guarantee"):
        eq.quantize(eq.MDEQ(2, 8, 3, (4, 8), groups=2, post_groups=2), eq.Structured(bits=4))
    with pytest.raises(eq.StructureError, match="own stem and head"):
        eq.quantize(nn.Sequential(model, nn.Linear(3, 2)), eq.Structured(bits=4))
    other = small(torch.float32, expansion=1)
    assert eq.certify(eq.quantize(model, eq.Structured(bits=4)), reference=other).certified
    with pytest.raises(eq.StructureError, match="not the same network"):
        eq.certify(model, reference=eq.LipschitzMDEQ(2, 8, 4, (4, 8), groups=2, post_groups=2))


def test_a_subclass_is_refused() -> None:
    class Other(eq.LipschitzMDEQ):  # type: ignore[misc]
        def classify(self, z: Tensor) -> Tensor:
            return 2 * super().classify(z)

    model = Other(2, 8, 3, (4, 8), groups=2, post_groups=2)
    with pytest.raises(eq.StructureError, match="something else"):
        eq.certify(model)


# Files


@pytest.mark.parametrize("kind", ["float", "structured", "head", "mdeq", "chain"])
def test_files_give_back_the_same_network(kind: str, tmp_path: Path) -> None:
    model: nn.Module = small(
        torch.float32, contraction=0.9, solver=eq.Anderson(memory=3), activation="groupsort"
    ).eval()
    if kind in ("structured", "head"):
        model = eq.quantize(model, eq.Structured(bits=3, head_bits=8 if kind == "head" else None))
    elif kind == "mdeq":
        model = eq.MDEQ(2, 8, 3, (4, 8), groups=2, post_groups=2).eval()
    elif kind == "chain":
        model = nn.Sequential(nn.Unflatten(1, (2, 8, 8)), model).eval()
    eq.save(model, tmp_path / "m.safetensors")
    again = eq.load(tmp_path / "m.safetensors")
    assert fingerprint(again) == fingerprint(model)
    x = images(3, torch.float32)
    x = x.flatten(1) if kind == "chain" else x
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", eq.ConvergenceWarning)
        assert torch.equal(again(x), model(x))
    assert again.state_dict().keys() == model.state_dict().keys()
    if kind != "mdeq":
        assert eq.certify(again).contraction == eq.certify(model).contraction
