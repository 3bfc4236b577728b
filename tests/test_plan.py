"""The ladder: the choice by hand-made findings, and rungs against what certify says of the same model."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import equipoise as eq
from equipoise import plan
from equipoise.data import Data, Preprocessing, Split
from equipoise.errors import InputError, NotWellPosedError, OptionError, OutputError
from equipoise.ladder import Findings, Ladder, Requirements, Rung, choose
from equipoise.operators import schemes
from equipoise.plan import build_ladder, check_fits

RUNG_KEYS = [
    "scheme",
    "bits",
    "input_bits",
    "size_bytes",
    "margin",
    "verdict",
    "rate",
    "steps",
    "accuracy",
    "displacement_mean",
    "displacement_bound_mean",
    "agreement",
    "skew_bits",
    "bias_bits",
    "head_bits",
]
GOOD = Findings(True, 1000, 0.2, accuracy=0.9, agreement=0.8, displacement=1.0)


def small_data(seed: int = 0) -> Data:
    """Six features, three classes; the splits are different and the labels random."""
    generator = torch.Generator().manual_seed(seed)

    def split(n: int) -> Split:
        x = torch.randn(n, 6, generator=generator)
        return Split(x, torch.randint(0, 3, (n,), generator=generator))

    return Data("small", split(8), split(20), split(30), Preprocessing(0.0, 1.0, 1.0, (6,)), ("a", "b", "c"))


def small_model() -> nn.Sequential:
    return nn.Sequential(eq.MonDEQ(6, 8, rank=3, margin=0.4), nn.Linear(8, 3)).eval()


# The choice


def test_the_smallest_certified_version_is_chosen() -> None:
    findings = [
        GOOD,
        dataclasses.replace(GOOD, size_bytes=900),
        dataclasses.replace(GOOD, size_bytes=100, certified=False),
    ]
    assert choose(findings, Requirements()) == 1


def test_of_equal_sizes_the_larger_margin_is_chosen() -> None:
    findings = [dataclasses.replace(GOOD, margin=margin) for margin in (0.1, 0.3, 0.2)]
    assert choose(findings, Requirements()) == 1


@pytest.mark.parametrize(
    ("asked", "missed"),
    [
        (Requirements(min_agreement=0.81), "min_agreement"),
        (Requirements(min_accuracy=0.91), "min_accuracy"),
        (Requirements(max_displacement=0.99), "max_displacement"),
        (Requirements(max_bytes=999), "max_bytes"),
    ],
)
def test_every_requirement_can_rule_a_version_out(asked: Requirements, missed: str) -> None:
    assert asked.unmet(GOOD) == (missed,)
    assert choose([GOOD], asked) is None


def test_requirements_are_met_at_their_very_value() -> None:
    asked = Requirements(min_agreement=0.8, max_displacement=1.0, min_accuracy=0.9, max_bytes=1000)
    assert asked.unmet(GOOD) == ()
    assert choose([GOOD], asked) == 0


@pytest.mark.parametrize("name", ["accuracy", "agreement", "displacement"])
def test_what_is_not_known_does_not_meet_a_requirement(name: str) -> None:
    asked = Requirements(min_agreement=0.0, max_displacement=1e9, min_accuracy=0.0)
    assert choose([dataclasses.replace(GOOD, **{name: None})], asked) is None


share = st.floats(0, 1)


@given(
    st.lists(
        st.builds(
            Findings,
            st.booleans(),
            st.integers(1, 50),
            st.floats(-1, 1),
            st.none() | share,
            st.none() | share,
            st.none() | st.floats(0, 9),
        )
    ),
    st.builds(Requirements, st.none() | share, st.none() | st.floats(0, 9), st.none() | share),
)
def test_nothing_smaller_than_the_chosen_version_would_do(findings: list[Findings], asked: Requirements) -> None:
    chosen = choose(findings, asked)
    fit = [found for found in findings if not asked.unmet(found)]
    if chosen is None:
        assert not fit
    else:
        assert findings[chosen] in fit
        assert all(findings[chosen].size_bytes <= found.size_bytes for found in fit)
        assert findings[chosen].certified


@pytest.mark.parametrize(
    "options",
    [
        {"min_agreement": 95},
        {"min_agreement": -0.1},
        {"min_accuracy": math.nan},
        {"max_displacement": -1.0},
        {"max_displacement": math.inf},
        {"max_bytes": 0},
        {"max_bytes": 1e6},
    ],
)
def test_impossible_requirements_are_refused_with_their_value(options: dict[str, float]) -> None:
    with pytest.raises(OptionError) as caught:
        Requirements(**options)  # type: ignore[arg-type]
    assert repr(next(iter(options.values()))) in str(caught.value)


# What is written


def test_json_has_the_documented_keys_and_no_infinities(tmp_path: Path) -> None:
    rung = Rung("structured", 4, None, 10, None, "diverged", None, None, 0.5, None, None, None)
    ladder = Ladder((rung,), None, Requirements(min_accuracy=0.5))
    ladder.write(tmp_path / "ladder.json")
    read = json.loads((tmp_path / "ladder.json").read_text(), parse_constant=pytest.fail)
    assert list(read) == ["rungs", "chosen", "requirements"]
    assert list(read["rungs"][0]) == RUNG_KEYS
    assert read["chosen"] is None
    assert read["requirements"] == {"min_accuracy": 0.5}
    with pytest.raises(OutputError, match="exists"):
        ladder.write(tmp_path / "ladder.json")
    ladder.write(tmp_path / "ladder.json", force=True)


# Built from a model


@pytest.fixture(scope="module")
def built() -> tuple[nn.Sequential, Data, Ladder]:
    torch.manual_seed(1)
    model, data = small_model(), small_data()
    return model, data, build_ladder(model, data, bits=(8, 2))


def test_one_rung_per_scheme_and_bits_in_order(built: tuple[nn.Sequential, Data, Ladder]) -> None:
    _, _, ladder = built
    order = [(rung.scheme, rung.bits) for rung in ladder.rungs]
    assert order == [(s, b) for s in ("assembled", "structured", "compensated", "cayley") for b in (8, 2)]
    assert len(ladder.evidence) == len(ladder.rungs)
    assert ladder.notes == ()


def test_figures_are_those_of_the_test_split(built: tuple[nn.Sequential, Data, Ladder]) -> None:
    model, data, ladder = built
    small = eq.quantize(model, eq.Structured(bits=2))
    proof = eq.certify(small, reference=model, inputs=data.test.x)
    assert proof.displacement is not None
    assert proof.actual_displacement is not None
    rung = next(r for r in ladder.rungs if (r.scheme, r.bits) == ("structured", 2))
    assert rung == Rung(
        "structured",
        2,
        None,
        eq.size(small),
        proof.margin,
        "certified",
        proof.rate,
        proof.steps,
        float((small(data.test.x).argmax(1) == data.test.y).double().mean()),
        pytest.approx(float(proof.actual_displacement.mean())),  # type: ignore[arg-type]
        pytest.approx(float(proof.displacement.mean())),  # type: ignore[arg-type]
        proof.agreement,
    )


def test_the_choice_is_made_on_the_validation_split(built: tuple[nn.Sequential, Data, Ladder]) -> None:
    model, data, ladder = built
    for rung, evidence in zip(ladder.rungs, ladder.evidence, strict=True):
        small = eq.quantize(model, schemes()[rung.scheme](bits=rung.bits))
        proof = eq.certify(small, reference=model, inputs=data.validation.x)
        found = evidence.findings
        held_out = (small(data.validation.x).argmax(1) == data.validation.y).double().mean()
        assert found.accuracy == float(held_out)
        assert (found.size_bytes, found.agreement) == (rung.size_bytes, proof.agreement)
        if proof.displacement is not None:
            assert found.displacement == pytest.approx(float(proof.displacement.max()))


def test_only_the_chosen_model_is_kept(built: tuple[nn.Sequential, Data, Ladder]) -> None:
    _, _, ladder = built
    assert [i for i, evidence in enumerate(ladder.evidence) if evidence.model is not None] == [ladder.chosen]


def test_the_float_model_is_described_beside_its_ladder(built: tuple[nn.Sequential, Data, Ladder]) -> None:
    model, data, ladder = built
    subject = ladder.subject
    assert subject is not None
    assert (subject.data, subject.validation_samples, subject.test_samples) == ("small", 20, 30)
    assert (subject.size_bytes, subject.margin) == (eq.size(model), eq.margin(model))
    assert subject.accuracy == float((model(data.test.x).argmax(1) == data.test.y).double().mean())


def test_every_validation_input_is_proved_within_a_displacement_that_was_asked() -> None:
    model, data = small_model(), small_data()
    free = build_ladder(model, data, schemes=["structured"], bits=[8, 6, 4])
    bounds = [evidence.findings.displacement for evidence in free.evidence]
    assert bounds[0] is not None
    assert bounds[1] is not None
    limit = (bounds[0] + bounds[1]) / 2
    ladder = build_ladder(model, data, ["structured"], [8, 6, 4], Requirements(max_displacement=limit))
    assert ladder.chosen == 0
    chosen = ladder.evidence[0].model
    assert chosen is not None
    proof = eq.certify(chosen, model, data.validation.x)
    assert proof.displacement is not None
    assert float(proof.displacement.max()) <= limit


def test_input_bits_are_quantized_and_reported() -> None:
    ladder = build_ladder(small_model(), small_data(), ["assembled"], [4], input_bits=3)
    assert ladder.rungs[0].input_bits == 3
    assert (
        ladder.rungs[0].size_bytes < build_ladder(small_model(), small_data(), ["assembled"], [4]).rungs[0].size_bytes
    )


def test_what_a_scheme_cannot_make_is_left_out_and_noted() -> None:
    W = torch.diag(torch.linspace(-1.0, 1.37, 6))  # margin -0.37
    layer = eq.MonDEQ.from_weights(W, torch.randn(6, 6), torch.zeros(6), check=False)
    model = nn.Sequential(layer, nn.Linear(6, 3)).eval()
    ladder = build_ladder(model, small_data(), ["structured", "assembled"], [4])
    assert [rung.scheme for rung in ladder.rungs] == ["assembled"]
    assert ladder.chosen is None
    assert not ladder.rungs[0].certified
    assert ladder.rungs[0].verdict in ("converged", "diverged")
    assert len(ladder.notes) == 1
    assert "structured, 4 bits" in ladder.notes[0]
    json.dumps(ladder.to_dict(), allow_nan=False)


def test_a_scheme_that_finds_no_margin_does_not_stop_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    real = plan.quantize

    def failing(model: nn.Module, scheme: eq.Scheme) -> nn.Module:
        if scheme.bits == 1:
            raise NotWellPosedError("no diagonal reaches it", 0.01)
        return real(model, scheme)

    monkeypatch.setattr(plan, "quantize", failing)
    ladder = build_ladder(small_model(), small_data(), ["compensated"], [2, 1])
    assert [rung.bits for rung in ladder.rungs] == [2]
    assert ladder.notes == ("compensated, 1 bit: not made; no diagonal reaches it",)


def test_progress_goes_from_nothing_to_everything() -> None:
    told: list[tuple[int, int]] = []
    build_ladder(
        small_model(), small_data(), ["assembled"], [8, 4], progress=lambda done, total, _: told.append((done, total))
    )
    assert told == [(0, 3), (1, 3), (2, 3), (3, 3)]


def test_certificates_for_files_carry_no_samples(built: tuple[nn.Sequential, Data, Ladder]) -> None:
    _, _, ladder = built
    portable = ladder.evidence[0].portable_certificate
    assert portable.agreement == ladder.evidence[0].certificate.agreement
    assert portable.margin == ladder.evidence[0].certificate.margin
    assert [portable.displacement, portable.actual_displacement, portable.unproved] == [None] * 3
    assert len(portable.to_json()) < 3000


# Bad input


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"schemes": ["rounded"]}, "rounded"),
        ({"bits": [0]}, "0"),
        ({"bits": [40]}, "40"),
        ({"bits": []}, "at least one"),
        ({"schemes": []}, "at least one"),
    ],
)
def test_unknown_schemes_and_bits_are_refused(options: dict[str, list[str]], words: str) -> None:
    with pytest.raises(OptionError, match=words):
        build_ladder(small_model(), small_data(), **options)  # type: ignore[arg-type]


def test_a_model_of_other_features_is_refused_by_both_numbers() -> None:
    model = nn.Sequential(nn.Flatten(), eq.MonDEQ(7, 4), nn.Linear(4, 3))
    with pytest.raises(InputError, match=r"7 features and small has 6"):
        build_ladder(model, small_data())


def test_inputs_preprocessed_otherwise_are_warned_of() -> None:
    model, data = small_model(), small_data()
    model.preprocessing = data.preprocessing  # type: ignore[assignment]
    check_fits(model, data)
    model.preprocessing = Preprocessing(0.5, 1.0, 1.0, (6,))  # type: ignore[assignment]
    with pytest.warns(UserWarning, match=r"mean=0\.5"):
        check_fits(model, data)


def test_an_accuracy_cannot_be_asked_of_a_model_without_classes() -> None:
    layer = eq.MonDEQ(6, 8, margin=0.4).eval()
    with pytest.raises(InputError, match="8 outputs, small has 3 classes"):
        build_ladder(layer, small_data(), requirements=Requirements(min_accuracy=0.5))
    ladder = build_ladder(layer, small_data(), ["structured"], [4])
    assert ladder.rungs[0].accuracy is None
    assert ladder.rungs[0].agreement is None
    assert ladder.chosen == 0
