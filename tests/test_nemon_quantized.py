"""NEMON as codes: the measure is kept by algebra, in files and through training (theory §7)."""

from __future__ import annotations

import copy
from fractions import Fraction
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import equipoise as eq
from equipoise.errors import OptionError, StructureError
from equipoise.norms import WeightedMax, metzler
from equipoise.operators.contractive import AssembledRows, StructuredRows, lowered
from test_nemon import exact_measures, layer


def network(
    n: int = 12, d: int = 5, seed: int = 0, gamma: float = 0.9, dtype: torch.dtype = torch.float32
) -> nn.Sequential:
    made = layer(n=n, d=d, seed=seed, gamma=gamma)
    return nn.Sequential(made, nn.Linear(n, 3).double()).to(dtype)


def stored_matrix(weights: StructuredRows) -> list[list[Fraction]]:
    """γ I + D⁻¹ T̃ D − diag(|T̃| 1) in rationals, from the stored numbers."""
    scale = [Fraction(s) for s in weights.T.scale.double().flatten().tolist()]
    T = [
        [Fraction(c) * scale[i if len(scale) > 1 else 0] for c in row]
        for i, row in enumerate(weights.T.codes.int().tolist())
    ]
    eta = [Fraction(e) for e in weights.eta.double().tolist()]
    gamma, n = Fraction(float(weights.gamma)), len(T)
    return [
        [
            T[i][j] * eta[i] / eta[j] + (gamma - sum(map(abs, T[i])) if i == j else 0)
            for j in range(n)
        ]
        for i in range(n)
    ]  # fmt: skip


@given(
    st.integers(1, 7), st.integers(0, 10_000), st.floats(-1.0, 0.99), st.sampled_from([1, 2, 3, 4, 8, 16]),
    st.sampled_from(["tensor", "row"]), st.sampled_from([torch.float32, torch.float64]),
)  # fmt: skip
def test_structured_codes_keep_gamma_whatever_the_bits(
    n: int, seed: int, gamma: float, bits: int, granularity: str, dtype: torch.dtype
) -> None:
    made = layer(n=n, d=2, seed=seed, gamma=gamma).to(dtype)
    kept = Fraction(float(made.recurrent.gamma))
    q = eq.quantize(made, eq.Structured(bits, granularity=granularity))  # type: ignore[arg-type]
    weights = q.recurrent
    assert isinstance(weights, StructuredRows)
    exact = stored_matrix(weights)
    eta = [Fraction(e) for e in weights.eta.double().tolist()]
    measures = [
        row[i] + sum((abs(w) * eta[j] / eta[i] for j, w in enumerate(row) if j != i), Fraction(0))
        for i, row in enumerate(exact)
    ]
    assert max(measures) <= kept
    # what is multiplied by keeps it too, in exact arithmetic
    assert max(exact_measures(q.weight, weights.eta)) <= kept
    assert Fraction(eq.margin(q)) <= 1 - max(*measures, *exact_measures(q.weight, weights.eta))
    assert eq.margin(q) >= float(1 - kept) - 1e-15
    # and lies as near the stored matrix as it says
    operator = q.operator
    gap = max(
        abs(Fraction(w) - v)
        for a, b in zip(q.weight.double().tolist(), exact, strict=True)
        for w, v in zip(a, b, strict=True)
    )
    assert gap <= Fraction(operator.representation_error)


def test_lowering_takes_as_little_as_it_needs() -> None:
    torch.manual_seed(0)
    family = WeightedMax(torch.rand(9).double() + 0.1)
    W = torch.randn(9, 9).double()
    ceiling = float(family.row_measures(W).median())
    done = lowered(W, family, ceiling)
    assert float(family.row_measures(done).max()) <= ceiling
    untouched = family.row_measures(W) <= ceiling
    assert torch.equal(done[untouched], W[untouched])
    torch.testing.assert_close(
        family.row_measures(done)[~untouched], torch.full((int((~untouched).sum()),), ceiling).double()
    )


@pytest.mark.parametrize("scheme", [eq.Compensated(3), eq.Cayley(8)], ids=lambda s: s.name)
def test_schemes_of_monotone_layers_are_refused(scheme: eq.Scheme) -> None:
    with pytest.raises(StructureError, match="Assembled, Structured"):
        eq.quantize(network(), scheme)
    with pytest.raises(StructureError, match="Assembled, Structured"):
        eq.prepare_qat(network(), scheme)


def test_skew_bits_are_refused() -> None:
    with pytest.raises(OptionError, match="skew_bits"):
        eq.quantize(network(), eq.Structured(3, skew_bits=2))


def test_assembled_takes_the_better_weights_and_never_claims_more_than_it_has() -> None:
    found = 0
    for seed in range(12):
        made = layer(n=6, seed=seed, gamma=0.5)
        q = eq.quantize(made, eq.Assembled(4))
        assert isinstance(q.recurrent, AssembledRows)
        own = float(torch.linalg.eigvals(metzler(q.weight)).real.max())
        assert eq.margin(q) <= 1 - own + 1e-9
        assert eq.margin(q) >= 1 - own - 1e-3 or eq.margin(q) >= WeightedMax(made.norm.eta).margin(q.weight) - 1e-5
        found += eq.margin(q) > 0
    assert found > 0


# Files, sizes, training through


@pytest.mark.parametrize(
    "scheme", [None, eq.Structured(2), eq.Structured(3, granularity="row"), eq.Assembled(6, input_bits=4)], ids=str
)
def test_files_give_back_the_same_network(scheme: eq.Scheme | None, tmp_path: Path) -> None:
    model = network()
    model = model if scheme is None else eq.quantize(model, scheme)
    path = tmp_path / "model.safetensors"
    eq.save(model, path, certificate=eq.certify(model))
    again = eq.load(path)
    x = torch.randn(4, 5)
    assert torch.equal(again(x), model(x))
    assert eq.margin(again) == eq.margin(model)
    assert again[0].scheme == model[0].scheme
    assert eq.size(again) == eq.size(model)


def test_files_keep_free_weights_and_learned_gammas(tmp_path: Path) -> None:
    free = eq.NEMON.from_weights(torch.randn(4, 4) * 0.1, torch.randn(4, 3), torch.zeros(4))
    learned = eq.NEMON(3, 4, learn_gamma=True, learn_weights=False)
    for i, made in enumerate((free, learned)):
        path = tmp_path / f"{i}.safetensors"
        eq.save(made, path)
        again = eq.load(path)
        x = torch.randn(2, 3)
        assert torch.equal(again(x), made(x))
        assert [n for n, _ in again.named_parameters()] == [n for n, _ in made.named_parameters()]


def test_a_file_whose_weights_were_made_negative_is_refused(tmp_path: Path) -> None:
    q = eq.quantize(network(), eq.Structured(2))
    q[0].recurrent.eta[0] = -1.0
    path = tmp_path / "m.safetensors"
    eq.save(q, path)
    with pytest.raises(eq.FileFormatError, match="eta"):
        eq.load(path)


@pytest.mark.parametrize(
    "scheme", [eq.Structured(2), eq.Structured(4, granularity="row", input_bits=4), eq.Assembled(6)], ids=str
)
@pytest.mark.parametrize("learn_scale", [False, True])
def test_training_through_the_quantizer_keeps_gamma_and_converts_bit_for_bit(
    scheme: eq.Scheme, learn_scale: bool
) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(eq.NEMON(4, 16, learn_gamma=True), nn.Linear(16, 2))
    prepared = eq.prepare_qat(model, scheme, learn_scale)
    x = torch.randn(64, 4)
    y = (x[:, 0] > 0).long()
    optimizer = torch.optim.Adam(prepared.parameters(), 1e-2)
    losses = []
    for _ in range(40):
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(prepared(x), y)
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.6 * losses[0]
    assert prepared[0].recurrent.weights.d.grad.abs().max() > 0
    prepared.eval()
    q = eq.convert(prepared)
    with torch.no_grad():
        assert torch.equal(q[0].weight, prepared[0].recurrent())
    torch.testing.assert_close(q(x), prepared(x), rtol=1e-3, atol=1e-3)  # to the solver's tolerance, and γ is near 1
    if isinstance(scheme, eq.Structured):
        assert eq.certify(q).measure <= float(q[0].recurrent.gamma) + 2e-16
    assert q[0].scheme == scheme


def test_structured_from_free_weights_keeps_their_measure() -> None:
    torch.manual_seed(3)
    W = torch.randn(6, 6) * 0.15
    made = eq.NEMON.from_weights(W, torch.randn(6, 3), torch.zeros(6))
    q = eq.quantize(made, eq.Structured(2))
    assert eq.margin(q) >= eq.margin(made) - 1e-6
    fine = eq.quantize(made, eq.Structured(16))
    torch.testing.assert_close(fine.weight, W, atol=1e-3, rtol=0)
    prepared = eq.prepare_qat(made, eq.Structured(16))
    with torch.no_grad():
        torch.testing.assert_close(prepared.recurrent(), W, atol=1e-3, rtol=0)


def test_moving_a_quantized_layer_to_another_dtype_keeps_its_numbers() -> None:
    q = eq.quantize(network(), eq.Structured(3))
    before = {name: value.clone() for name, value in q[0].recurrent.state_dict().items()}
    wide = copy.deepcopy(q).double()
    assert all(torch.equal(value, before[name]) for name, value in wide[0].recurrent.state_dict().items())
    assert eq.margin(wide) == pytest.approx(eq.margin(q), abs=1e-12)
    assert isinstance(wide[0].weight, Tensor)
    assert wide[0].weight.dtype == torch.float64
