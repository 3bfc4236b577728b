"""Mixed precision: the best assignment against all of them, sizes and bounds against the quantized models."""

from __future__ import annotations

import itertools
import json
import math
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import equipoise as eq
from equipoise.cli import main
from equipoise.data import load_data
from equipoise.errors import NotWellPosedError, OptionError, StructureError
from equipoise.ladder import Findings, Ladder, Requirements, choose
from equipoise.mixed import Menu, Option, Parts, Trial, assign, check_budget, measure, parts_of, scheme_of
from equipoise.plan import build_ladder
from equipoise.presets import classifier
from equipoise.report import render
from equipoise.report.overview import groups_of
from equipoise.report.terminal import ladder_table, ladder_words, rendered
from test_plan import small_data, small_model

F64 = torch.float64


def every(menu: Menu) -> list[Parts]:
    return [Parts(*bits) for bits in itertools.product(*([option.bits for option in part] for part in menu.options))]


def cost(menu: Menu, parts: Parts, power: int) -> float:
    *state, head = menu.contributions(parts)
    return math.fsum(c**power for c in state) ** (1 / power) + head


@pytest.fixture(scope="module")
def digits() -> tuple[nn.Module, Menu]:
    torch.manual_seed(0)
    data = load_data("digits")
    model = classifier(data, 12, rank=4).eval()
    return model, measure(model, data.validation.x, [1, 2, 4, 8])


def some_menu(draw: st.DrawFn) -> Menu:
    options = st.lists(st.tuples(st.integers(0, 40), st.integers(0, 9)), min_size=1, max_size=3)
    parts = [
        tuple(Option(bits, size, float(moved)) for bits, (size, moved) in enumerate(draw(options), start=1))
        for _ in range(5)
    ]
    return Menu(tuple(parts), draw(st.integers(0, 20)))


menus = st.composite(some_menu)()


# The choice is exact


@pytest.mark.parametrize("power", [1, 2])
def test_no_assignment_within_the_budget_has_a_smaller_sum(digits: tuple[nn.Module, Menu], power: int) -> None:
    _, menu = digits
    table = [(menu.size(parts), cost(menu, parts, power)) for parts in every(menu)]
    sizes = sorted({bytes_ for bytes_, _ in table})
    for budget in (*sizes[:3], *sizes[:: len(sizes) // 12], sizes[-1], sizes[-1] + 10**6):
        best = menu.best(budget, power)
        assert best is not None
        assert menu.size(best) <= budget
        least = min(value for bytes_, value in table if bytes_ <= budget)
        assert cost(menu, best, power) == pytest.approx(least, rel=1e-12)
    assert menu.best(sizes[0] - 1, power) is None
    assert menu.smallest == sizes[0]


@given(menus, st.integers(0, 250), st.sampled_from([1, 2]))
def test_any_menu_is_searched_exactly_and_ties_take_fewer_bytes(menu: Menu, budget: int, power: int) -> None:
    fitting = [parts for parts in every(menu) if menu.size(parts) <= budget]
    best = menu.best(budget, power)
    if best is None:
        assert not fitting
        assert budget < menu.smallest
        return
    assert best in fitting
    least = min(cost(menu, parts, power) for parts in fitting)
    assert cost(menu, best, power) == pytest.approx(least, rel=1e-12, abs=1e-12)
    if power == 1:  # whole numbers: ties are exact
        assert menu.size(best) == min(menu.size(parts) for parts in fitting if cost(menu, parts, 1) == least)


def test_more_bytes_never_cost_more(digits: tuple[nn.Module, Menu]) -> None:
    _, menu = digits
    found = [menu.best(budget) for budget in range(menu.smallest, menu.smallest + 6000, 250)]
    costs = [cost(menu, parts, 1) for parts in found if parts is not None]
    assert costs == sorted(costs, reverse=True)
    assert costs[0] > 2 * costs[-1]


# Never worse than bits that are all alike


@given(menus, st.data())
@settings(max_examples=60)
def test_whatever_certificates_find_uniform_bits_are_never_better(menu: Menu, data: st.DataObject) -> None:
    bits = [option.bits for option in menu.options[0]]
    uniform = [Parts(*(b if b in [o.bits for o in part] else part[-1].bits for part in menu.options)) for b in bits]
    budgets = data.draw(st.lists(st.integers(menu.smallest, menu.smallest + 120), min_size=1, max_size=4))
    trials: dict[Parts, Trial] = {}

    def judge(parts: Parts) -> Trial:
        if parts not in trials:
            trials[parts] = Trial(menu.size(parts), data.draw(st.sampled_from([1.0, 2.0, 3.0, math.inf])))
        return trials[parts]

    found = assign(menu, budgets, uniform, judge)
    assert set(found) == set(budgets)
    for budget, parts in found.items():
        assert judge(parts).size_bytes <= budget
        fitting = [judge(even).moved for even in uniform if menu.size(even) <= budget]
        assert judge(parts).moved <= min(fitting, default=math.inf)


@pytest.fixture(scope="module")
def ladder(digits: tuple[nn.Module, Menu]) -> Ladder:
    return build_ladder(digits[0], load_data("digits"), ["structured"], [8, 4, 2, 1], mixed=True)


def test_each_rung_of_the_staircase_beats_what_uniform_bits_prove(
    digits: tuple[nn.Module, Menu], ladder: Ladder
) -> None:
    model, menu = digits
    x = load_data("digits").validation.x
    judge = eq.certificates.Certifier(model, x)
    uniform = []
    for parts in menu.uniform():
        small = eq.quantize(model, scheme_of(parts))
        bound = judge(small).displacement
        assert bound is not None
        uniform.append((eq.size(small), float(bound.mean())))
    chosen = [(r, e.findings) for r, e in zip(ladder.rungs, ladder.evidence, strict=True) if r.mixed]
    assert len({rung.parts for rung, _ in chosen}) == len(chosen) >= 4
    for bytes_, moved in uniform:
        rivals = [e.findings for e in ladder.evidence if e.findings.size_bytes <= bytes_]
        assert min(f.displacement_mean or 0.0 for f in rivals) <= moved * (1 + 1e-12)
    for rung, found in chosen:
        assert found.displacement_mean is not None
        assert found.displacement_mean <= min(moved for bytes_, moved in uniform if bytes_ <= rung.size_bytes)
        assert rung.size_bytes == eq.size(eq.quantize(model, scheme_of(rung.parts)))
    assert [rung.parts for rung in ladder.rungs[:4]] == [Parts(b, b, None, None, None) for b in (8, 4, 2, 1)]
    assert any(len(set(rung.parts)) > 2 for rung, _ in chosen)


@pytest.mark.parametrize("extra", [0, 300, 3000])
def test_a_budget_is_kept_and_the_best_within_it_is_chosen(digits: tuple[nn.Module, Menu], extra: int) -> None:
    model, menu = digits
    budget = menu.smallest + extra
    asked = Requirements(max_bytes=budget)
    ladder = build_ladder(model, load_data("digits"), ["structured"], [8, 4, 2, 1], asked, mixed=True)
    assert ladder.chosen is not None
    chosen, small = ladder.rungs[ladder.chosen], ladder.evidence[ladder.chosen].model
    assert small is not None
    assert eq.size(small) == chosen.size_bytes <= budget
    assert chosen.mixed
    assert sum(rung.mixed for rung in ladder.rungs) == 1
    within = [e.findings.displacement_mean for e in ladder.evidence if e.findings.size_bytes <= budget]
    assert ladder.evidence[ladder.chosen].findings.displacement_mean == min(d for d in within if d is not None)
    text = rendered(ladder_words(ladder))
    assert f"{chosen.parts} (A K U b head) keeps the guarantee" in text.replace("\n", " ")
    assert "the one proved to move least" in text.replace("\n", " ")


def test_other_requirements_still_rule_versions_out(digits: tuple[nn.Module, Menu]) -> None:
    model, menu = digits
    asked = Requirements(max_bytes=menu.smallest, min_agreement=1.0)
    assert build_ladder(model, load_data("digits"), ["structured"], [2, 1], asked, mixed=True).chosen is None


def test_input_bits_that_are_given_are_not_chosen_again() -> None:
    ladder = build_ladder(small_model(), small_data(), ["structured"], [4, 2], input_bits=3, mixed=True)
    assert {rung.input_bits for rung in ladder.rungs} == {3}
    assert any(rung.mixed for rung in ladder.rungs)


def test_the_goal_decides_between_the_smallest_and_the_least_moved() -> None:
    small = Findings(True, 10, 0.2, None, None, 3.0, displacement_mean=2.0)
    exact = Findings(True, 20, 0.2, None, None, 2.0, displacement_mean=1.0)
    unproved = Findings(True, 5, 0.2, None, None, None)
    assert choose([exact, small], Requirements()) == 1
    assert choose([unproved, exact, small], Requirements(), "displacement") == 1
    assert choose([exact, small], Requirements(max_bytes=15), "displacement") == 1


def test_progress_ends_with_everything_done() -> None:
    told: list[tuple[int, int, str]] = []
    build_ladder(
        small_model(), small_data(), ["structured"], [4, 2], progress=lambda *step: told.append(step), mixed=True
    )
    assert told[0][:2] == (0, 4)
    assert told[-1] == (4, 4, "done")
    assert [done for done, _, _ in told] == sorted(done for done, _, _ in told)
    assert any("structured, 2/" in text for done, _, text in told if done == 3)


# What is shown and written


def test_mixed_rungs_are_labelled_and_stay_off_the_axis_of_bits(ladder: Ladder) -> None:
    page = render(ladder).replace("\xa0", " ")
    table = rendered(ladder_table(ladder))
    assert max(map(len, table.splitlines())) <= 79
    assert "bits of A/K/U/b/head" in page
    for rung in ladder.rungs:
        if rung.mixed:
            assert f">{rung.parts}<" in page
            assert str(rung.parts).replace("float", "–") in table
    groups = groups_of(ladder.rungs)
    assert [group.mixed for group in groups] == [False, True]
    sizes = [ladder.rungs[i].size_bytes for i in groups[-1].frames]
    assert sizes == sorted(sizes)
    rungs = ladder.to_dict()["rungs"]
    assert all(list(rung)[-3:] == ["skew_bits", "bias_bits", "head_bits"] for rung in rungs)
    assert [rungs[0][key] for key in ("bits", "input_bits", "skew_bits", "bias_bits", "head_bits")] == [8] + 4 * [None]


def test_without_mixed_rungs_nothing_speaks_of_them() -> None:
    plain = build_ladder(small_model(), small_data(), ["structured"], [4, 2])
    assert "A/K/U/b/head" not in render(plain)
    assert "A/K/U/b/head" not in rendered(ladder_table(plain))


# Bad input


def test_a_budget_that_nothing_fits_in_names_the_smallest_size() -> None:
    model, data = small_model(), small_data()
    menu = measure(model, data.validation.x, [4, 2])
    check_budget(menu, menu.smallest)
    with pytest.raises(OptionError, match=rf"max_bytes=7: .* takes {menu.smallest} bytes"):
        build_ladder(model, data, ["structured"], [4, 2], Requirements(max_bytes=7), mixed=True)
    reached = build_ladder(model, data, ["structured"], [4, 2], Requirements(max_bytes=menu.smallest), mixed=True)
    assert reached.chosen is not None
    assert reached.rungs[reached.chosen].size_bytes == menu.smallest


def test_without_the_structured_scheme_there_is_nothing_to_mix() -> None:
    with pytest.raises(OptionError, match="structured"):
        build_ladder(small_model(), small_data(), ["assembled"], [4], mixed=True)


def test_models_that_cannot_be_quantized_are_refused() -> None:
    x = small_data().validation.x
    with pytest.raises(StructureError, match="quantized already"):
        measure(eq.quantize(small_model(), eq.Structured(bits=4)), x, [4])
    with pytest.raises(OptionError, match="17"):
        measure(small_model(), x, [17])


def test_without_a_margin_the_ladder_says_that_nothing_was_mixed() -> None:
    layer = eq.MonDEQ.from_weights(
        torch.diag(torch.linspace(-1.0, 1.37, 6)), torch.randn(6, 6), torch.zeros(6), check=False
    )
    model = nn.Sequential(layer, nn.Linear(6, 3)).eval()
    with pytest.raises(NotWellPosedError):
        measure(model, small_data().validation.x, [4])
    ladder = build_ladder(model, small_data(), ["structured", "assembled"], [4], mixed=True)
    assert [rung.scheme for rung in ladder.rungs] == ["assembled"]
    assert any(note.startswith("structured, mixed: not made") for note in ladder.notes)


# The command


def test_plan_chooses_saves_and_refuses(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.manual_seed(0)
    model = classifier(load_data("digits"), 8, rank=2)
    eq.save(model, tmp_path / "float.safetensors")
    line = ["plan", str(tmp_path / "float.safetensors"), "--data", "digits", "--schemes", "structured", "--bits", "8,2"]
    saved = str(tmp_path / "mixed.safetensors")
    assert main([*line, "--mixed", "--max-bytes", "600", "--save", saved, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    chosen = found["rungs"][found["chosen"]]
    again = eq.load(saved)
    assert eq.size(again) == chosen["size_bytes"] <= 600
    assert parts_of(again[1].scheme if isinstance(again[1], eq.MonDEQ) else again[0].scheme) == Parts(  # type: ignore[index]
        *(chosen[key] for key in ("bits", "skew_bits", "input_bits", "bias_bits", "head_bits"))
    )
    assert main([*line, "--mixed", "--max-bytes", "7"]) == 2
    assert "the smallest assignment of bits takes" in capsys.readouterr().err
    assert main([*line, "--max-bytes", "7"]) == 1
