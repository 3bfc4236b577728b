"""The benchmark on images measures what it says it does: at toy sizes, and without a look at any time."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from rich.console import Console

import equipoise as eq
from equipoise.bench import images
from equipoise.bench.measure import Tracker
from equipoise.bench.network import Setting
from equipoise.data import load_data

TOY = images.Size("tiny", 6, 1, 1)


@pytest.fixture(scope="module")
def found() -> dict[str, Any]:
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("EQUIPOISE_DATA", raising=False)
        setting = Setting(True, load_data("digits"))
        return images.measure(setting, Tracker(lambda done, total, text: None), TOY)


def test_both_splittings_reach_the_error_that_is_said(found: dict[str, Any]) -> None:
    race = found["splittings"]
    slow, fast = race["forward-backward"], race["peaceman-rachford"]
    assert slow["steps"] == images.FB_STEPS > fast["steps"]
    assert fast["error"] <= max(slow["error"], images.FLOOR)
    assert race["ratio"] > 0


@pytest.mark.filterwarnings("ignore::equipoise.errors.ConvergenceWarning")
def test_errors_are_of_fixed_numbers_of_steps() -> None:
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Identity(), eq.MonConv2d(1, 3, 8, learn_margin=True)).eval()
    x = torch.randn(4, 1, 8, 8)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(images, "FB_STEPS", 3)
        patch.setattr(images, "PR_STEPS", (1, 2, 50))
        race = images.splittings(model, x, 1)
    assert race["forward-backward"]["error"] > images.FLOOR, "three steps are not enough, and are not exceeded"
    assert race["peaceman-rachford"]["steps"] in (1, 2, 50)


def test_memory_does_not_grow_with_steps(found: dict[str, Any]) -> None:
    assert len(set(found["saved_bytes"].values())) == 1


def test_multiscale_networks_are_counted(found: dict[str, Any]) -> None:
    both = found["multiscale"]
    assert both["contraction"] < 1
    assert both["lmdeq"]["failures"] == both["lmdeq"]["failures_in_step"] == 0
    ours, plain = ({k: both[name][k] for k in ("forward", "backward")} for name in ("lmdeq", "mdeq"))
    assert both["ratios"]["evaluations_step"] == pytest.approx(sum(plain.values()) / sum(ours.values()))


def test_it_prints_and_is_json(found: dict[str, Any]) -> None:
    json.dumps(found, allow_nan=False)
    console = Console(record=True, width=100)
    for part in images.tables(found):
        console.print(part)
    text = console.export_text()
    assert "peaceman-rachford" in text
    assert "lmdeq" in text


def test_its_ratios_are_rows(found: dict[str, Any]) -> None:
    rows = images.rows(found)
    assert [row.ratio for row in rows[:2]] == [found["splittings"]["ratio"], 1.0]
    ratios = found["multiscale"]["ratios"]
    assert [row.ratio for row in rows[2:6]] == [
        ratios[f"{unit}_{key}"] for key in ("step", "inference") for unit in ("evaluations", "time")
    ]
    assert (rows[-1].ratio, rows[-1].met) == (None, True)
