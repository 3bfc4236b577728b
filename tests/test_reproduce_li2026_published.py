"""The experiments of [LLC26] on the published network, where it is at hand."""

from __future__ import annotations

from pathlib import Path

import pytest

from equipoise.data import load_data
from equipoise.reproduce import Settings
from equipoise.reproduce.li2026 import (
    convergence,
    displacement,
    subject,
)

# The published network, where it is at hand


@pytest.fixture(scope="module")
def published(shared_reference: Path, mnist_dir: Path) -> subject.Bench:
    return subject.begin(Settings(shared_reference), load_data("mnist", mnist_dir), Path())


def test_the_published_checkpoint_is_taken_as_it_is(published: subject.Bench) -> None:
    found = subject.describe(published)
    assert found.published
    assert found.accuracy == pytest.approx(0.9825)
    assert 0.226886 < found.margin < 0.226887


def test_the_published_counts(published: subject.Bench) -> None:
    counts = {}
    for bits in (5, 6, 8, 16):
        width = convergence._width(published, bits, 64)
        counts[bits] = width.steps
        assert width.settled
        assert width.verdict == "certified"
    assert counts == {5: 1730, 6: 653, 8: 458, 16: 424}


def test_four_bits_of_the_published_network_settle_with_a_good_step(
    published: subject.Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(convergence, "PATIENCE", 3000)
    by_rule = convergence._width(published, 4, 64)
    assert (by_rule.steps, by_rule.settled, by_rule.verdict) == (2000, False, "converged")
    good = convergence._trial(published, 4, 0.25, 64)
    assert (good.settled, good.grew) == (1.0, 0.0)
    lost = convergence._trial(published, 3, 0.25, 64)
    assert lost.grew > 0.4


def test_the_published_shares_come_from_unfinished_solves(
    published: subject.Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(displacement, "BITS", (8,))
    monkeypatch.setattr(displacement, "SAMPLES", 512)
    found = displacement.measure(published)
    (cloud,), (check,) = found.clouds, found.checks
    assert cloud.share == cloud.sharp_share == check.exact_share == check.settled_share == 1.0
    assert check.share < 0.97
    assert found.settled < 0.9
