"""The explorer: its numbers are those of the ladder, its pictures stand where the numbers are."""

from __future__ import annotations

import dataclasses
import math
import re
from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import equipoise as eq
from equipoise.certificates.wellposed import spectrum
from equipoise.ladder import Evidence, Ladder, Requirements, Rung
from equipoise.operators import scheme_from_dict, schemes
from equipoise.plan import build_ladder
from equipoise.report import render
from equipoise.report.drawing import BOX, Scale, fitted, line, shape
from equipoise.report.explorer import Explorer, Frame, explore
from equipoise.report.words import MISSING, at_least, at_most, bytes_text, percent, percent_at_least
from test_plan import small_data, small_model

NUMBER = r"-?\d+(?:\.\d)?"


@pytest.fixture(scope="module")
def ladder() -> Ladder:
    torch.manual_seed(1)
    asked = Requirements(min_agreement=0.5)
    return build_ladder(small_model(), small_data(), bits=(8, 4, 3, 2, 1), requirements=asked)


@pytest.fixture(scope="module")
def explorer(ladder: Ladder) -> Explorer:
    found = explore(ladder)
    assert found is not None
    return found


# The spectrum


def eigenvalues(W: Tensor) -> Tensor:
    W = W.double()
    return torch.linalg.eigvalsh(torch.eye(len(W), dtype=torch.float64) - (W + W.T) / 2)


@pytest.mark.parametrize("bits", [1, 3, 8])
@pytest.mark.parametrize("name", schemes())
def test_the_spectrum_is_that_of_the_dequantized_weight(name: str, bits: int) -> None:
    torch.manual_seed(3)
    model = small_model().double()
    small = eq.quantize(model, scheme_from_dict({"scheme": name, "bits": bits}))
    found = spectrum(small)
    torch.testing.assert_close(found, eigenvalues(small[0].weight.detach()), rtol=0, atol=1e-13)
    assert -1e-12 < float(found[0]) - eq.margin(small) < 1e-9


def test_a_rung_has_the_spectrum_of_its_version(ladder: Ladder) -> None:
    torch.manual_seed(1)
    model = small_model()
    assert ladder.subject is not None
    assert ladder.subject.spectrum == pytest.approx(eigenvalues(model[0].weight.detach()).tolist(), abs=1e-12)
    for rung, evidence in zip(ladder.rungs, ladder.evidence, strict=True):
        small = eq.quantize(model, scheme_from_dict({"scheme": rung.scheme, "bits": rung.bits}))
        assert evidence.spectrum is not None
        # what is multiplied by is the float32 nearest to what is stored
        torch.testing.assert_close(evidence.spectrum, eigenvalues(small[0].weight.detach()), rtol=0, atol=1e-6)
        assert rung.margin is not None
        assert rung.margin <= float(evidence.spectrum[0]) + 1e-12


def test_of_several_layers_the_numbers_are_joined() -> None:
    first, second = eq.MonDEQ(6, 5, margin=0.5).double(), eq.MonDEQ(5, 4, margin=0.1).double()
    both = torch.cat([eigenvalues(layer.weight.detach()) for layer in (first, second)]).sort().values
    torch.testing.assert_close(spectrum(nn.Sequential(first, second)), both, rtol=0, atol=1e-13)


def test_of_a_nemon_layer_it_is_one_minus_the_measure_of_each_row() -> None:
    torch.manual_seed(0)
    layer = eq.NEMON(6, 5, gamma=0.3).double()
    W, eta = layer.weight.detach(), layer.operator.family.eta
    off = W.abs() * eta / eta[:, None]
    rows = 1 - (W.diagonal() + off.sum(1) - off.diagonal())
    torch.testing.assert_close(spectrum(layer), rows.sort().values, rtol=0, atol=1e-12)
    ladder = build_ladder(nn.Sequential(layer, nn.Linear(5, 3).double()).eval(), small_data(), ["structured"], [4])
    found = explore(ladder)
    assert found is not None
    assert found.pictures[0].title == "1 − μ, row by row"


def test_a_bar_stands_at_its_eigenvalue_and_red_ones_below_zero(ladder: Ladder, explorer: Explorer) -> None:
    sunk = 0
    for frame, evidence in zip(explorer.frames, ladder.evidence, strict=True):
        assert evidence.spectrum is not None
        values = evidence.spectrum.tolist()
        above, below = (bars(frame.paths[f"spectrum-{part}"]) for part in ("above", "below"))
        assert len(above) == len(below) == len(values)
        lengths = [up if up > 0 else -down for up, down in zip(above, below, strict=True)]
        assert lengths == sorted(lengths)
        for value, up, down in zip(values, above, below, strict=True):
            assert (up > 0, down > 0) == (value > 0, value < 0) or abs(value) < 0.005
        negative = sum(value < 0 for value in values)
        sunk += negative
        assert frame.texts["spectrum-aside"] == (f"{negative} below zero" if negative else "")
        assert f"{len(values)} eigenvalues" in frame.texts["spectrum-says"]
    assert sunk  # or nothing was tried


def bars(path: str) -> list[float]:
    """The length of each bar, downwards ones included."""
    found = re.findall(rf"M{NUMBER} ({NUMBER})V({NUMBER})", path)
    zero = float(found[0][0])
    return [abs(zero - float(end)) for _, end in found]


def test_a_long_spectrum_is_thinned_to_its_ends_and_says_so(ladder: Ladder) -> None:
    values = torch.linspace(-1, 2, 1001, dtype=torch.float64)
    long = [dataclasses.replace(evidence, spectrum=values) for evidence in ladder.evidence]
    found = explore(dataclasses.replace(ladder, evidence=tuple(long)))
    assert found is not None
    frame = found.frames[0]
    below = bars(frame.paths["spectrum-below"])
    assert len(below) == 200
    assert below[0] == max(below) > 0
    assert bars(frame.paths["spectrum-above"])[-1] > 0
    assert (
        "1,001 eigenvalues (200 of them drawn), the least −1 as computed. 334 of them" in frame.texts["spectrum-says"]
    )


# Bounds and movements


def test_every_input_has_a_point_and_no_sound_bound_lies_below_the_diagonal(ladder: Ladder, explorer: Explorer) -> None:
    drawn = 0
    for frame, evidence in zip(explorer.frames, ladder.evidence, strict=True):
        moved, bound = evidence.certificate.actual_displacement, evidence.certificate.displacement
        points = places(frame.paths["cloud-points"])
        if bound is None or moved is None:
            assert not points
            assert frame.texts["cloud-aside"] == "no bound"
            continue
        assert len(points) == len(bound)
        for (x, y), m, b in zip(points, moved.tolist(), bound.tolist(), strict=True):
            across, up = (x - BOX.left) / (BOX.right - BOX.left), (BOX.bottom - y) / (BOX.bottom - BOX.top)
            assert up >= across - 0.001
            # both axes are the same logarithm
            assert (up - across) * _decades(explorer) == pytest.approx(math.log10(b / m), abs=0.02)
        drawn += len(points)
    assert drawn > 200


def places(path: str) -> list[tuple[float, float]]:
    return [(float(x), float(y)) for x, y in re.findall(rf"M({NUMBER}) ({NUMBER})h0", path)]


def _decades(explorer: Explorer) -> float:
    """Decades from end to end of the cloud's axes, from two ticks."""
    rows = next(picture for picture in explorer.pictures if picture.key == "cloud").rows
    (low, first), (high, last) = rows[-1], rows[0]
    return math.log10(float(last) / float(first)) / ((low - high) / (BOX.bottom - BOX.top))


def crowded(ladder: Ladder) -> Ladder:
    """As large as a page gets: every scheme at every number of bits, a wide layer and ten thousand inputs."""
    generator = torch.Generator().manual_seed(0)
    rungs, evidence = [], []
    for name in schemes():
        for bits in range(1, 17):
            bound = torch.rand(10_000, generator=generator, dtype=torch.float64) + 0.5**bits
            proof = dataclasses.replace(
                ladder.evidence[0].certificate, displacement=bound, actual_displacement=0.4 * bound
            )
            values = torch.randn(1000, generator=generator, dtype=torch.float64).sort().values
            rungs.append(dataclasses.replace(ladder.rungs[0], scheme=name, bits=bits, size_bytes=1000 * bits))
            evidence.append(dataclasses.replace(ladder.evidence[0], certificate=proof, spectrum=values))
    return dataclasses.replace(ladder, rungs=tuple(rungs), evidence=tuple(evidence), chosen=7)


def test_a_large_ladder_still_makes_a_small_page(ladder: Ladder) -> None:
    source = render(crowded(ladder))
    assert 500_000 < len(source.encode()) < 2_000_000
    assert "one test input (every 25th of 10,000)" in source


# Texts


def test_a_frame_says_what_the_rung_has(ladder: Ladder, explorer: Explorer) -> None:
    assert explorer.start == ladder.chosen
    for rung, frame in zip(ladder.rungs, explorer.frames, strict=True):
        assert frame.verdict == rung.verdict == frame.texts["verdict"]
        assert frame.texts["size"] == bytes_text(rung.size_bytes)
        assert frame.texts["margin"] == at_least(rung.margin)
        assert frame.texts["steps"] == (MISSING if rung.steps is None else str(rung.steps))
        assert frame.texts["moved"] == at_most(rung.displacement_bound_mean, 3)
        assert frame.texts["kept"] == percent_at_least(rung.agreement)
        assert frame.texts["accuracy"] == percent(rung.accuracy)
        kinds = {key: frame.texts[f"{key}-kind"] for key in ("size", "margin", "kept", "accuracy")}
        proved = ("proved", "proved") if rung.certified else ("not above zero", "no proof")
        assert tuple(kinds.values()) == ("counted", *proved, "measured")
    assert not all(rung.certified for rung in ladder.rungs)


def test_frames_move_the_same_places(explorer: Explorer) -> None:
    assert len({(*frame.texts, *frame.paths) for frame in explorer.frames}) == 1
    asked = {f"{p.key}-{s.moves}" for p in explorer.pictures for s in p.strokes if s.moves}
    asked |= {s.moves for tile in explorer.tiles for s in tile.strokes if s.moves}
    assert asked == set(explorer.frames[0].paths)


def test_a_group_holds_a_scheme_from_few_bits_to_many(ladder: Ladder, explorer: Explorer) -> None:
    assert sorted(i for group in explorer.groups for i in group.frames) == list(range(len(ladder.rungs)))
    for group in explorer.groups:
        mine = [ladder.rungs[i] for i in group.frames]
        assert {rung.scheme for rung in mine} == {group.scheme}
        assert [rung.bits for rung in mine] == sorted(rung.bits for rung in mine)


def test_mixed_versions_are_a_group_of_their_own() -> None:
    torch.manual_seed(1)
    ladder = build_ladder(small_model(), small_data(), ["structured"], (8, 4, 2), mixed=True)
    found = explore(ladder)
    assert found is not None
    assert [group.name for group in found.groups] == ["Structured", "Mixed"]
    mine = [ladder.rungs[i] for i in found.groups[1].frames]
    assert mine
    assert all(rung.mixed for rung in mine)
    assert [rung.size_bytes for rung in mine] == sorted(rung.size_bytes for rung in mine)
    frame = found.frames[found.groups[1].frames[0]]
    assert frame.texts["bits"] == str(mine[0].parts)
    assert (frame.tick, frame.paths["margin-ring"]) == ("", "")
    assert frame.paths["bytes-ring"]


def test_a_margin_far_below_the_others_still_has_a_place(ladder: Ladder) -> None:
    sunk = dataclasses.replace(ladder.rungs[0], margin=-50.0, verdict="diverged")
    found = explore(dataclasses.replace(ladder, rungs=(sunk, *ladder.rungs[1:]), chosen=None))
    assert found is not None
    _, y = map(float, re.findall(rf"M({NUMBER}) ({NUMBER})a", found.frames[0].paths["margin-ring"])[0])
    assert BOX.bottom - 30 < y < BOX.bottom


def test_a_rung_without_figures_is_a_frame_too() -> None:
    bare = Rung("newscheme", 4, None, 10, None, "diverged", None, None, None, None, None, None)
    found = explore(Ladder((bare,), None, Requirements()))
    assert found is not None
    assert [tile.key for tile in found.tiles] == ["size"]
    assert found.pictures == []
    assert explore(Ladder((), None, Requirements())) is None


def test_bounds_that_are_no_numbers_have_no_point(ladder: Ladder) -> None:
    assert ladder.chosen is not None
    proof = ladder.evidence[ladder.chosen].certificate
    assert proof.displacement is not None
    bound = proof.displacement.clone()
    bound[0] = math.inf
    endless = dataclasses.replace(proof, displacement=bound)
    evidence: list[Evidence] = list(ladder.evidence)
    evidence[ladder.chosen] = dataclasses.replace(evidence[ladder.chosen], certificate=endless)
    found = explore(dataclasses.replace(ladder, evidence=tuple(evidence)))
    assert found is not None
    frame: Frame = found.frames[ladder.chosen]
    assert len(places(frame.paths["cloud-points"])) == len(bound) - 1


# Drawing


@given(
    st.lists(st.floats(1e-6, 1e6), min_size=1, max_size=6),
    st.sampled_from(["even", "log", "asinh"]),
    st.floats(1e-3, 1e3),
)
def test_a_scale_keeps_the_order_and_its_ticks_apart(values: list[float], bend: str, unit: float) -> None:
    signed = [*values, -values[0], 0.0] if bend == "asinh" else values
    scale = fitted(signed, 200.0, 0.0, bend, unit)  # type: ignore[arg-type]
    found = [scale(value) for value in sorted(signed)]
    assert found == sorted(found, reverse=True)
    assert all(0 <= place <= 200 for place in found)
    ticks = scale.ticks(20)
    assert all(a - b >= 19.9 for (a, _), (b, _) in pairwise(ticks))
    for place, text in ticks:
        value = float(text.replace("−", "-").replace(",", ""))
        assert scale(value) == pytest.approx(place, abs=0.05 + 200 * 1e-5)


def test_ticks_are_round_numbers() -> None:
    assert [text for _, text in Scale(0, 1, 0, 100).ticks(20)] == ["0", "0.2", "0.4", "0.6", "0.8", "1"]
    assert [text for _, text in Scale(0.05, 200, 0, 400, "log").ticks(40)] == [
        "0.1",
        "0.3",
        "1",
        "3",
        "10",
        "30",
        "100",
    ]
    assert [text for _, text in Scale(-2, 2, 0, 100, "asinh", 0.1).ticks(10)] == [
        "−1",
        "−0.3",
        "−0.1",
        "0",
        "0.1",
        "0.3",
        "1",
    ]


def test_a_line_is_broken_where_there_is_no_number() -> None:
    assert line([(0, 1), (1, 2), (2, None), (3, 4.25), (4, 5)]) == "M0 1L1 2M3 4.2L4 5"


@pytest.mark.parametrize("scheme", ["assembled", "structured", "compensated", "cayley", "newscheme"])
def test_every_scheme_has_a_mark_of_its_own(scheme: str) -> None:
    others = {
        shape(name, 7, 7, 5) for name in ("assembled", "structured", "compensated", "cayley", "new") if name != scheme
    }
    assert shape(scheme, 7, 7, 5) not in others or scheme == "newscheme"
