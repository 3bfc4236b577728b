"""Every printed bound against truth, on random and adversarial networks: one violation is one too many.

    python benchmarks/soundness.py --trials 1000000 --seed 0 --out soundness.jsonl

A *trial* is one bound compared with one truth found by other means: in long doubles, with their own rounding counted
as slack (``trials/wide.py``), equilibria by Newton's method or by trying all linear pieces (``trials/equilibria.py``).
Every network follows from (seed, index), and the journal gains a line per network: after an interruption, however
rude, the same command goes on. ``--only INDEX`` repeats one network and prints what broke. A ratio is the largest
truth/bound seen (bound/truth of lower bounds): near 1, a bound made 1 % too small would have been noticed.

Exit status: 0 no violation, 1 a violation, with what reproduces it, 2 bad use.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from trials.campaign import trial
from trials.ledger import Tally
from trials.wide import require_wide

import equipoise

__all__ = ["main"]

BUNCH = 20
"""Networks a line of the journal."""


class Journal:
    """Lines of finished bunches of networks, after a header; a line that a crash cut off does not count."""

    def __init__(self, path: Path | None, seed: int) -> None:
        self.path, self.header = path, {"soundness": 1, "seed": seed, "bunch": BUNCH, "version": equipoise.__version__}
        self.tallies: dict[str, Tally] = {}
        self.violations: list[dict[str, Any]] = []
        self.networks: dict[str, int] = {}
        self.done = 0
        if path is None:
            return
        whole = self._read(path) if path.exists() else []
        if whole and whole[0] != self.header:
            raise SystemExit(f"{path} is the journal of {whole[0]}, not of {self.header}: give another --out")
        with path.open("w") as file:  # without what was cut off
            for line in whole or [self.header]:
                file.write(json.dumps(line) + "\n")
        for line in whole[1:]:
            self._take(line)

    @staticmethod
    def _read(path: Path) -> list[dict[str, Any]]:
        lines = []
        for text in path.read_text().split("\n")[:-1]:
            try:
                lines.append(json.loads(text))
            except json.JSONDecodeError:
                break
        return lines

    def _take(self, line: dict[str, Any]) -> None:
        for bound, tally in line["tallies"].items():
            self.tallies.setdefault(bound, Tally()).add(tally)
        for kind, count in line["networks"].items():
            self.networks[kind] = self.networks.get(kind, 0) + count
        self.violations += line["violations"]
        self.done += 1

    def write(self, line: dict[str, Any]) -> None:
        """One more bunch."""
        self._take(line)
        if self.path is not None:
            with self.path.open("a") as file:
                file.write(json.dumps(line) + "\n")

    @property
    def trials(self) -> int:
        return sum(tally.trials for tally in self.tallies.values())


def bunch(seed: int, indices: range, faults: dict[str, float]) -> dict[str, Any]:
    """The journal's line for these networks."""
    tallies: dict[str, Tally] = {}
    networks: dict[str, int] = {}
    violations: list[dict[str, Any]] = []
    for index in indices:
        kind, ledger = trial(seed, index, faults)
        for bound, tally in ledger.tallies.items():
            tallies.setdefault(bound, Tally()).add(asdict(tally))
        name = kind.split("(")[0]
        networks[name] = networks.get(name, 0) + 1
        violations += [{"seed": seed, "index": index, "network": kind, **broken} for broken in ledger.violations]
    return {"tallies": {name: asdict(t) for name, t in tallies.items()}, "networks": networks, "violations": violations}


def campaign(seed: int, trials: int, journal: Journal, faults: dict[str, float]) -> Iterator[int]:
    """Go on until so many trials are in the journal; yields how many are."""
    while journal.trials < trials:
        start = journal.done * BUNCH
        journal.write(bunch(seed, range(start, start + BUNCH), faults))
        yield journal.trials


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="soundness.py", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--trials", type=int, default=10_000, help="stop after so many (default 10,000)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="journal; the run goes on where it ends")
    parser.add_argument("--only", type=int, metavar="INDEX", help="repeat one network")
    parser.add_argument("--fault", action="append", default=[], metavar="BOUND=FACTOR",
                        help="multiply a bound on purpose, to see that it is noticed; =FACTOR for all")  # fmt: skip
    options = parser.parse_args(arguments)
    try:
        faults = {name: float(factor) for name, _, factor in (text.rpartition("=") for text in options.fault)}
    except ValueError:
        parser.error(f"--fault is {options.fault}; it is BOUND=FACTOR, as in displacement=0.99")
    if options.trials < 1 or options.seed < 0 or (options.only is not None and options.only < 0):
        parser.error("--trials is a positive integer; --seed and --only are not negative")
    require_wide()
    torch.set_num_threads(1)
    if options.only is not None:
        line = bunch(options.seed, range(options.only, options.only + 1), faults)
        journal = Journal(None, options.seed)
        journal.write(line)
        return report(journal)
    journal = Journal(options.out, options.seed)
    columns = TextColumn("trials"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
    with Progress(*columns, console=Console(stderr=True)) as progress:
        task = progress.add_task("", total=options.trials, completed=journal.trials)
        for count in campaign(options.seed, options.trials, journal, faults):
            progress.update(task, completed=count)
    return report(journal)


def report(journal: Journal) -> int:
    """Print the books; the exit status."""
    width = max((len(name) for name in journal.tallies), default=5)
    print(f"{'bound':<{width}}  {'trials':>9}  {'broken':>6}  {'tightest':>10}  undecided")
    for name, tally in sorted(journal.tallies.items()):
        ratio = f"{tally.ratio:.8f}" if tally.ratio else "–"
        print(f"{name:<{width}}  {tally.trials:>9,}  {tally.violations:>6}  {ratio:>10}  {tally.undecided:,}")
    networks = ", ".join(f"{count:,} {kind}" for kind, count in sorted(journal.networks.items()))
    broken = sum(tally.violations for tally in journal.tallies.values())
    print(f"{journal.trials:,} trials, {broken} violations; networks: {networks}")
    for found in journal.violations[:20]:
        print(f"VIOLATION {json.dumps(found)}")
        print(f"  repeat: python benchmarks/soundness.py --seed {found['seed']} --only {found['index']}")
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(main())
