"""Which tests notice that a formula of a certificate is 1 % wrong: one mutant after another, survivors listed.

    python benchmarks/mutations.py --out mutations.jsonl [--file norms.py] [--limit 50]

Two kinds of mutants, made by rewriting the syntax tree of one module of a copy of ``src``: what a ``return`` gives,
floats and float tensors, times the factor that makes the bound unsound (0.99, or 1.01 in a function whose name says
that it bounds from below); and a constant of an arithmetic expression times 0.99 and, if that is not noticed, 1.01.
Constants that count roundings (in ``gamma(…)``, beside 1 + 1e-12, below 1e-6) are left alone: 1 % of them is nothing.

Before the first mutant all trials and tests are run once, to see which functions each of them calls, how long it takes
and, of trials, how near its truths come to its bounds. A mutant runs, in a process of its own, those soundness trials
that come nearest to some bound and then its module's tests, always only what calls its function and the quickest
first; the first to fail kills it. The journal is kept: the same command goes on, also where other functions changed;
``--again`` tries survivors once more. Exit status 1 where a mutant survived.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import CodeType
from typing import Any

import mpmath  # noqa: F401  what every mutant's process needs is imported once
import pytest
import torch
from mutants import ROOT, Site, factors, mutant, sites

BOXES = ["test_boxes.py", "test_robust.py"]
CERTIFICATES = ["test_certificates.py", "test_certificates_chain.py", "test_certificates_verdicts.py"]
EXPORT = ["test_export.py", "test_export_edges.py"]
MULTISCALE = ["test_lipschitz_mdeq.py", "test_lipschitz_mdeq_codes.py", "test_lipschitz_mdeq_edges.py"]
NEMON = ["test_families.py", "test_nemon.py", "test_nemon_quantized.py"]
NEMON_CONV = ["test_nemon_conv.py", "test_nemon_conv_networks.py"]
TIERS = ["test_mon_conv.py", "test_mon_conv_codes.py", "test_mon_conv_edges.py", "test_spectra.py"]
VERIFIED = ["test_verified.py", "test_verified_cayley.py", "test_verified_input.py"]

TESTS = {
    "norms.py": ["test_norms.py", *NEMON],
    "solvers/posterior.py": ["test_solvers.py", "test_nemon.py"],
    "certificates/boxes.py": BOXES,
    "certificates/certify.py": CERTIFICATES,
    "certificates/convergence.py": [*CERTIFICATES, *NEMON, *NEMON_CONV, *TIERS, "test_rounded.py"],
    "certificates/displacement.py": CERTIFICATES,
    "certificates/iterates.py": ["test_rounded.py"],
    "certificates/printed.py": ["test_certificates_verdicts.py", "test_report.py"],
    "certificates/robustness.py": BOXES,
    "certificates/rows.py": [*BOXES, *NEMON],
    "certificates/types.py": CERTIFICATES,
    "certificates/wellposed.py": [*CERTIFICATES, *NEMON],
    "certificates/convolutional.py": [*NEMON_CONV, *TIERS],
    "certificates/sides.py": [*CERTIFICATES, *TIERS],
    "certificates/multiscale.py": MULTISCALE,
    "operators/conv_norm.py": ["test_conv_norm.py", *MULTISCALE],
    "operators/symbol_bounds.py": [*TIERS, "test_conv_norm.py"],
    "operators/quantized_tiers.py": TIERS,
    "operators/tiers.py": TIERS,
    "layers/multiscale_proofs.py": MULTISCALE,
    "export/proof.py": EXPORT,
    "runtime.py": EXPORT,
    "operators/spectra.py": [*TIERS, "test_conv_norm.py"],
    "operators/conv.py": NEMON_CONV,
    "layers/lipschitz_mdeq.py": MULTISCALE,
    "layers/steps.py": MULTISCALE,
    "export/boxes.py": EXPORT,
    "export/plan.py": EXPORT,
    "export/affine.py": EXPORT,
    "export/cayley.py": EXPORT,
    "export/factored.py": EXPORT,
    "export/fixedpoint.py": EXPORT,
    "verified.py": VERIFIED,
}
"""The modules that are mutated, and the tests that are theirs."""


POOL, SEED = 240, 77
"""Networks of the soundness trials that a mutant's are chosen from."""

NEAR, KEPT = 0.992, 2
"""Of each bound the quickest two networks are kept in which a truth comes so near to it that 1 % would be seen."""

LIMIT = 150
"""Seconds of the processor that a mutant may take, and six times as many by the clock; one that hangs is noticed."""

Functions = set[tuple[str, str]]
"""Functions of the copy, (module, name)."""


def child(work: Callable[[], str], limit: int) -> tuple[str, str | None]:
    """(what ``work`` gives, what ended its process if anything did), in a process of its own, torch in its memory."""
    reading, writing = os.pipe()
    process = os.fork()
    if process == 0:
        os.close(reading)
        resource.setrlimit(resource.RLIMIT_CPU, (limit, limit + 5))
        signal.alarm(6 * limit)
        sys.dont_write_bytecode = True
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, 1)
        os.dup2(null, 2)
        try:
            found = work()
        except BaseException as error:  # nothing of it may reach the parent's code in this process
            found = f"{type(error).__name__}: {error}"
        with os.fdopen(writing, "w") as pipe:
            pipe.write(found)
        os._exit(0)
    os.close(writing)
    with os.fdopen(reading) as pipe:
        found = pipe.read()
    status = os.waitpid(process, 0)[1]
    if os.WIFSIGNALED(status):
        ended = os.WTERMSIG(status)
        return found, "timeout" if ended in (signal.SIGALRM, signal.SIGXCPU) else f"signal {ended}"
    return found, None


def enter(copy: Path) -> None:
    """Make ``copy`` the equipoise of this process and of those that it starts."""
    for path in (ROOT / "tests", ROOT / "benchmarks", copy):
        sys.path.insert(0, str(path))
    os.environ["PYTHONPATH"] = str(copy)


# What calls what


@contextmanager
def watched(copy: Path) -> Iterator[Functions]:
    """The functions of ``copy`` that are called meanwhile."""
    prefix, seen = f"{copy / 'equipoise'}{os.sep}", Functions()
    known: dict[CodeType, tuple[str, str] | None] = {}

    def look(frame: Any, event: str, argument: Any) -> None:
        code = frame.f_code
        if code not in known:
            inside = code.co_filename.startswith(prefix)
            known[code] = (code.co_filename.removeprefix(prefix), code.co_name) if inside else None
        if (found := known[code]) is not None:
            seen.add(found)

    sys.settrace(look)
    try:
        yield seen
    finally:
        sys.settrace(None)


def run_trials(copy: Path) -> str:
    """Lines of JSON: number, seconds, ratios of bounds and functions of each trial."""
    enter(copy)
    from trials.campaign import trial

    lines = []
    for index in range(POOL):
        begin = time.process_time()
        with watched(copy) as seen:
            _, ledger = trial(SEED, index)
        if ledger.violations:
            raise SystemExit(f"trial {index}: {ledger.violations[0]} without a mutant")
        ratios = {name: float(tally.ratio) for name, tally in ledger.tallies.items()}
        lines.append({"name": index, "seconds": time.process_time() - begin, "ratios": ratios, "calls": sorted(seen)})
    return "\n".join(map(json.dumps, lines))


class Watch:
    """A plugin of pytest: seconds and functions of every test, those of the fixtures that it shares among them."""

    def __init__(self, seen: Functions) -> None:
        self.seen, self.lines = seen, list[dict[str, Any]]()
        self.failed = ""
        self.fixtures: dict[Any, Functions] = {}

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_protocol(self, item: Any, nextitem: Any) -> Any:
        self.seen.clear()
        begin = time.process_time()
        result = yield
        seconds = time.process_time() - begin
        shared = [self.fixtures.get(one, set()) for many in item._fixtureinfo.name2fixturedefs.values() for one in many]
        calls = sorted(self.seen.union(*shared))
        self.lines.append({"name": item.nodeid, "seconds": seconds, "calls": calls})
        return result

    @pytest.hookimpl(wrapper=True)
    def pytest_fixture_setup(self, fixturedef: Any, request: Any) -> Any:
        before = set(self.seen)
        self.seen.clear()
        result = yield
        self.fixtures[fixturedef] = set(self.seen)
        self.seen |= before
        return result

    def pytest_runtest_logreport(self, report: Any) -> None:
        if report.failed:
            self.failed = report.nodeid


OPTIONS = ["-x", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", "-m", "not slow", "--rootdir", str(ROOT)]


def run_tests(copy: Path, names: list[str]) -> str:
    """Lines of JSON: name, seconds and functions of each test of these files."""
    enter(copy)
    with watched(copy) as seen:
        watch = Watch(seen)
        code = pytest.main([*OPTIONS, *(str(ROOT / "tests" / name) for name in names)], plugins=[watch])
    if code != 0:
        raise SystemExit(f"{watch.failed or f'pytest ({code})'} fails without a mutant")
    return "\n".join(map(json.dumps, watch.lines))


class Chooser:
    """What a mutant has to pass."""

    def __init__(self, copy: Path, files: list[str], patience: float) -> None:
        self.patience = patience
        trials = self._lines(*child(lambda: run_trials(copy), 40 * LIMIT))
        trials.sort(key=lambda trial: float(trial["seconds"]))
        near = set[int]()
        for bound in {name for trial in trials for name in trial["ratios"]}:
            near |= set([trial["name"] for trial in trials if trial["ratios"].get(bound, 0) > NEAR][:KEPT])
        self.trials = [trial for trial in trials if trial["name"] in near]
        names = sorted({name for file in files for name in TESTS[file]})
        self.tests = self._lines(*child(lambda: run_tests(copy, names), 40 * LIMIT)) if patience > 0 else []
        self.tests.sort(key=lambda test: float(test["seconds"]))

    @staticmethod
    def _lines(text: str, ended: str | None) -> list[dict[str, Any]]:
        try:
            found = [json.loads(line) for line in text.splitlines()]
        except json.JSONDecodeError:
            found = []
        if ended or not found:
            raise SystemExit(f"without a mutant: {ended or text}")
        for line in found:
            line["calls"] = {tuple(call) for call in line["calls"]}
        return found

    def trials_of(self, site: Site) -> list[int]:
        """Numbers of the trials to run, the quickest first."""
        return [
            line["name"] for line in self.trials if not site.function or (site.file, site.function) in line["calls"]
        ]

    def tests_of(self, site: Site) -> list[str]:
        """Names of the tests to run, the quickest first."""
        own, left, found = tuple(f"tests/{name}::" for name in TESTS[site.file]), self.patience, []
        for line in self.tests:
            called = not site.function or (site.file, site.function) in line["calls"]
            if called and line["name"].startswith(own) and left > 0:
                found.append(line["name"])
                left -= line["seconds"]
        return found


def killer(copy: Path, trials: list[int], tests: list[str]) -> str | None:
    """What notices the mutant in ``copy``, or None."""
    found, ended = child(lambda: tried(copy, trials, tests), LIMIT)
    return ended or found or None


def tried(copy: Path, trials: list[int], tests: list[str]) -> str:
    """The first that fails, or nothing."""
    enter(copy)
    try:
        from trials.campaign import trial

        for index in trials:
            _, ledger = trial(SEED, index)
            if ledger.violations:
                return f"trial {index}: {ledger.violations[0]['bound']}"
    except Exception as error:
        return f"trials: {type(error).__name__}"
    if not tests:
        return ""
    watch = Failed()
    code = pytest.main([*OPTIONS, *(str(ROOT / name) for name in tests)], plugins=[watch])
    return watch.failed or ("" if code == 0 else f"pytest {code}")


class Failed:
    """A plugin of pytest: the first test that failed."""

    failed = ""

    def pytest_runtest_logreport(self, report: Any) -> None:
        if report.failed and not self.failed:
            self.failed = report.nodeid

    def pytest_collectreport(self, report: Any) -> None:
        if report.failed and not self.failed:
            self.failed = report.nodeid


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="mutations.py", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--out", type=Path, default=Path("mutations.jsonl"), help="journal (default mutations.jsonl)")
    parser.add_argument("--file", action="append", choices=sorted(TESTS), help="only this module")
    parser.add_argument("--limit", type=int, help="stop after so many new mutants")
    parser.add_argument("--patience", type=float, default=60, metavar="SECONDS",
                        help="of tests that a mutant runs, besides the trials (default 60, 0 for none)")  # fmt: skip
    parser.add_argument("--again", action="store_true", help="try survivors once more")
    parser.add_argument("--seconds", type=float, help="stop after so long")
    options = parser.parse_args(arguments)
    files: list[str] = options.file or list(TESTS)
    wanted = {site.key: site for file in files for site in sites(file)}
    known: dict[str, dict[str, Any]] = {}
    if options.out.exists():
        known = {line["key"]: line for line in map(json.loads, options.out.read_text().splitlines())}
    todo = [
        site for key, site in wanted.items() if key not in known or (options.again and known[key]["killer"] is None)
    ]
    todo = todo[: options.limit]
    if todo:
        with tempfile.TemporaryDirectory() as folder:
            for line in mutate(Path(folder).resolve() / "src", todo, options.patience, options.seconds):
                known[line["key"]] = line
                with options.out.open("a") as journal:
                    journal.write(json.dumps(line) + "\n")
    return report({key: {**known[key], **site._asdict()} for key, site in wanted.items() if key in known})


def mutate(copy: Path, todo: list[Site], patience: float, seconds: float | None) -> Iterator[dict[str, Any]]:
    """A line of the journal for each site."""
    torch.set_num_threads(1)
    begin = time.monotonic()
    shutil.copytree(ROOT / "src" / "equipoise", copy / "equipoise", ignore=shutil.ignore_patterns("__pycache__"))
    chooser = Chooser(copy, sorted({site.file for site in todo}), patience)
    for site in todo:
        if seconds is not None and time.monotonic() - begin > seconds:
            return
        started, target, found = time.monotonic(), copy / "equipoise" / site.file, None
        original = target.read_text()
        for factor in factors(site):
            target.write_text(mutant(site, factor))
            found = killer(copy, chooser.trials_of(site), chooser.tests_of(site))
            if found is not None:
                break
        target.write_text(original)
        spent = round(time.monotonic() - started, 1)
        print(f"{site.file}:{site.line:<6} {found or 'SURVIVED: ' + site.source}", file=sys.stderr, flush=True)
        yield {"key": site.key, "killer": found, "seconds": spent}


def report(known: dict[str, dict[str, Any]]) -> int:
    """List the survivors; the exit status."""
    left = [line for line in known.values() if line["killer"] is None]
    for line in left:
        print(f"{line['file']}:{line['line']} {line['function']} ({line['kind']}): {line['source']}")
    print(f"{len(known)} mutants, {len(left)} survivors")
    return 1 if left else 0


if __name__ == "__main__":
    sys.exit(main())
