"""The experiments of [JDPB21], in small."""

from __future__ import annotations

from pathlib import Path

import equipoise as eq
from equipoise.data import load_data
from equipoise.reproduce import PAPERS, Settings, run


def test_every_network_is_trained_judged_and_written_up(tmp_path: Path) -> None:
    outcome = run(PAPERS["jafarpour2021"], Settings(quick=True), load_data("digits"), tmp_path / "out")
    (section,) = outcome.reproduction.sections
    networks, robust = section.tables
    for table in (networks, robust):
        assert len(table.rows) == 4
        assert all(len(row) == len(table.head) for row in table.rows)
    assert outcome.reproduction.data["nemon"]["samples"] == 200
    assert "digits" in outcome.reproduction.limits[-1]
    assert "Lipschitz" in section.findings[0]
    assert outcome.report.exists()
    for kind in ("nemon", "regularized", "boxes"):
        assert isinstance(eq.load(tmp_path / "out" / f"{kind}.safetensors")[0], eq.NEMON)
