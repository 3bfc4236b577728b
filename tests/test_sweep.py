"""Sweeps: every job once, failures in the table, and a killed one that goes on."""

from __future__ import annotations

import csv
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import equipoise as eq
from command_line import Capsys, run, run_json
from equipoise.data import load_data
from equipoise.errors import FileFormatError, OptionError, OutputError
from equipoise.jobs import Job
from equipoise.sweep import Row, Sweep, run_sweep
from equipoise.training import TrainingConfig, evaluate

BASE = Job("digits", TrainingConfig(1, accelerator="cpu"), features=8)


def test_every_job_has_its_row_and_its_model(tmp_path: Path) -> None:
    told: list[tuple[int, int, str]] = []
    schemes = (None, eq.Structured(2), eq.Structured(1))
    found = run_sweep(BASE, schemes, (0, 3), tmp_path, progress=lambda *news: told.append(news))
    assert [(row.scheme, row.bits, row.seed) for row in found.rows] == [
        ("float", None, 0), ("float", None, 3), ("structured", 2, 0), ("structured", 2, 3), ("structured", 1, 0),
        ("structured", 1, 3),
    ]  # fmt: skip
    for row in found.rows:
        model = eq.load(tmp_path / row.folder / "model.safetensors")
        assert row.accuracy == evaluate(model, load_data("digits").test)
        assert row.margin == eq.margin(model)
        assert (row.certified, row.error) == (True, None)
    assert [done for done, _, _ in told] == list(range(7))
    assert json.loads((tmp_path / "sweep.json").read_text()) == found.to_dict()
    with (tmp_path / "sweep.csv").open(newline="") as file:
        assert [row["folder"] for row in csv.DictReader(file)] == [row.folder for row in found.rows]


def test_a_job_is_what_train_does(tmp_path: Path, capsys: Capsys) -> None:
    swept = run_sweep(BASE, [eq.Structured(3)], [1], tmp_path).rows[0]
    line = ["train", "--epochs", 1, "--features", 8, "--scheme", "structured", "--bits", 3, "--seed", 1]
    trained = run_json(capsys, *line, "--out", tmp_path / "o")
    assert (swept.accuracy, swept.margin) == (trained["accuracy"], trained["margin"])


def test_finished_jobs_are_not_repeated_and_others_are_added(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = run_sweep(BASE, [eq.Structured(2)], [0], tmp_path)
    ran: list[int] = []
    real = Job.run

    def counted(self: Job, *arguments: Any, **options: Any) -> Any:
        ran.append(self.config.seed)
        return real(self, *arguments, **options)

    monkeypatch.setattr(Job, "run", counted)
    second = run_sweep(BASE, [eq.Structured(2)], [0, 1], tmp_path)
    assert ran == [1]
    assert second.rows[0] == first.rows[0]


def test_results_of_another_configuration_are_refused_by_name(tmp_path: Path) -> None:
    run_sweep(BASE, [eq.Structured(2)], [0], tmp_path)
    for base, scheme, says in (
        (replace(BASE, features=9), eq.Structured(2), "features=8, not 9"),
        (replace(BASE, config=replace(BASE.config, epochs=2)), eq.Structured(2), "epochs=1, not 2"),
        (BASE, eq.Structured(2, input_bits=4), "input_bits=None, not 4"),
    ):
        with pytest.raises(OptionError, match=f"was made with {says}"):
            run_sweep(base, [scheme], [0], tmp_path)
    (tmp_path / "structured-2-seed0" / "result.json").write_text("{}")
    with pytest.raises(FileFormatError, match="not a result of a sweep"):
        run_sweep(BASE, [eq.Structured(2)], [0], tmp_path)


def test_a_job_that_fails_does_not_stop_the_others(
    tmp_path: Path, capsys: Capsys, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = Job.run

    def failing(self: Job, *arguments: Any, **options: Any) -> Any:
        if self.config.seed == 1:
            raise ZeroDivisionError("of this\njob's own")
        return real(self, *arguments, **options)

    monkeypatch.setattr(Job, "run", failing)
    line = ["sweep", "--bits", "2", "--seeds", "0-2", "--epochs", 1, "--features", 8, "--out", tmp_path / "s"]
    status, out, err = run(capsys, *line)
    assert (status, err) == (1, "structured-2-seed1 failed: ZeroDivisionError: of this job's own\n")
    assert "2 of 3" in out
    found = json.loads((tmp_path / "s" / "sweep.json").read_text())
    assert [row["error"] is None for row in found["jobs"]] == [True, False, True]
    assert found["jobs"][1]["accuracy"] is None
    monkeypatch.setattr(Job, "run", real)
    assert run(capsys, *line)[0] == 0  # it is tried again


def test_a_margin_that_was_missed_is_exit_1(tmp_path: Path, capsys: Capsys) -> None:
    line = ["sweep", "--bits", "2", "--epochs", 1, "--features", 8, "--margin-target", 7, "--out", tmp_path / "s"]
    status, _, err = run(capsys, *line)
    assert status == 1
    assert err.startswith("structured-2-seed0 missed the margin 7: 1.")


def test_threads_come_to_the_same(tmp_path: Path) -> None:
    schemes, seeds = (None, eq.Structured(2)), (0, 1)
    torch.manual_seed(11)
    state = torch.get_rng_state()
    threads = run_sweep(BASE, schemes, seeds, tmp_path / "threads", jobs=2, backend="threading")
    assert torch.equal(torch.get_rng_state(), state)
    alone = run_sweep(BASE, schemes, seeds, tmp_path / "alone")
    assert [replace(row, seconds_per_epoch=None) for row in threads.rows] == [
        replace(row, seconds_per_epoch=None) for row in alone.rows
    ]


def test_means_are_over_the_seeds_that_ended() -> None:
    rows = (
        Row("structured", 2, 0, "a", accuracy=0.9, margin=0.3, certified=True, size_bytes=5),
        Row("structured", 2, 1, "b", accuracy=0.8, margin=0.1, certified=True, size_bytes=5),
        Row("structured", 2, 2, "c", error="ValueError: no"),
        Row("float", None, 0, "d", accuracy=0.95, margin=0.2, certified=False),
    )
    first, second = Sweep(rows).means()
    assert (first["seeds"], first["failed"], first["margin_least"], first["certified"]) == (2, 1, 0.1, True)
    assert first["accuracy_mean"] == pytest.approx(0.85)
    assert first["accuracy_std"] == pytest.approx(0.0707107, rel=1e-5)
    assert (second["accuracy_std"], second["certified"]) == (None, False)
    assert Sweep(rows).failed == (rows[2],)


COMMAND = [sys.executable, "-m", "equipoise", "sweep", "--schemes", "structured", "--bits", "3,2", "--epochs", "40"]


@pytest.mark.slow
def test_a_killed_sweep_goes_on_where_it_was(tmp_path: Path) -> None:
    """Two processes; the sweep is killed in its middle, its workers with it or a little later."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    whole = [*COMMAND, "--out", str(tmp_path / "whole"), "--json"]
    expected = subprocess.run(whole, capture_output=True, env=environment, check=True, timeout=300)
    command = [*COMMAND, "--jobs", "2", "--out", str(tmp_path / "killed"), "--json"]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, env=environment, start_new_session=True)
    table = tmp_path / "killed" / "structured-2-seed0" / "run" / "metrics.csv"
    for _ in range(600):
        if table.exists():
            break
        time.sleep(0.1)
    process.send_signal(signal.SIGKILL)
    process.wait()
    again = subprocess.run(command, capture_output=True, env=environment, check=True, timeout=300)
    one, two = (json.loads(done.stdout)["jobs"] for done in (expected, again))
    for row, other in zip(one, two, strict=True):
        assert {**row, "seconds_per_epoch": 0} == {**other, "seconds_per_epoch": 0}


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"jobs": 0}, "jobs=0"),
        ({"backend": "slurm"}, "backend='slurm'"),
        ({"schemes": []}, "at least one scheme"),
        ({"seeds": []}, "and one seed"),
        ({"seeds": [1, 1]}, "structured-2-seed1 is asked for twice"),
    ],
)
def test_bad_options_are_refused(options: dict[str, Any], says: str, tmp_path: Path) -> None:
    given = {"base": BASE, "schemes": [eq.Structured(2)], "seeds": [0], "out": tmp_path / "s", **options}
    with pytest.raises(OptionError, match=says):
        run_sweep(**given)
    assert not (tmp_path / "s" / "sweep.json").exists()


def test_a_folder_that_cannot_be_written_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(OutputError, match="cannot be written"):
        run_sweep(BASE, [None], [0], tmp_path / "file")


@pytest.mark.parametrize("backend", ["ray", "dask"])
def test_a_cluster_that_is_not_installed_names_the_extra(backend: str, tmp_path: Path, capsys: Capsys) -> None:
    if backend in sys.modules:
        pytest.skip(f"{backend} is here")
    hidden = dict.fromkeys(("ray", "dask", "distributed"))
    with pytest.MonkeyPatch.context() as patch:
        for name in hidden:
            patch.setitem(sys.modules, name, None)
        status, _, err = run(capsys, "sweep", "--backend", backend, "--epochs", 1, "--out", tmp_path / "s")
    assert (status, "pip install 'equipoise[cluster]'" in err) == (2, True)


def test_the_command_prints_a_table_and_draws_a_figure(tmp_path: Path, capsys: Capsys) -> None:
    line = ["sweep", "--schemes", "float,structured", "--bits", "2-1", "--seeds", "0,1", "--epochs", 1, "--features", 8]
    status, out, err = run(capsys, *line, "--out", tmp_path / "s")
    assert (status, err) == (0, "")
    assert max(map(len, out.splitlines())) <= 79
    assert "structured" in out
    found = run_json(capsys, *line, "--out", tmp_path / "s")  # nothing is trained again
    assert len(found["jobs"]) == 6
    assert found["figure"] == str(tmp_path / "s" / "sweep.svg")
    assert (tmp_path / "s" / "sweep.svg").read_text().startswith("<svg")


# One job


def test_a_job_starts_from_a_float_file(tmp_path: Path) -> None:
    first = BASE.run(None, progress=False)
    eq.save(first.model, tmp_path / "f")
    job = Job("digits", BASE.config, eq.Structured(2), start=tmp_path / "f", rank=2)
    network = job.network(load_data("digits"))
    assert torch.equal(network[0].recurrent.weights.A, first.model[0].recurrent.A)  # type: ignore[index]
    trained = job.run(None, progress=False)
    assert trained.model[0].scheme == eq.Structured(2)  # type: ignore[index]
    assert network[0].features == 8  # the file's size was taken  # type: ignore[index]


def test_options_of_a_job_that_contradict_each_other_are_refused(tmp_path: Path) -> None:
    with pytest.raises(OptionError, match="learn_scale needs a scheme"):
        replace(BASE, learn_scale=True)
    with pytest.raises(OptionError, match=r"ratio 0\.5 needs a scheme"):
        replace(BASE, config=replace(BASE.config, margin=eq.MarginPenalty(ratio=0.5)))
    with pytest.raises(OptionError, match=r"margin=0\.2: the network in"):
        Job("digits", BASE.config, start=tmp_path / "f", margin=0.2)
