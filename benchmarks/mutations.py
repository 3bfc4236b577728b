"""Which tests notice that a formula of a certificate is 1 % wrong: one mutant after another, survivors listed.

    python benchmarks/mutations.py --out mutations.jsonl [--file norms.py] [--limit 50]

Two kinds of mutants, made by rewriting the syntax tree of one function: what a ``return`` gives, floats and float
tensors, times the factor that makes the bound unsound (0.99, or 1.01 in a function whose name says that it bounds from
below); and a constant of an arithmetic expression times 0.99 and, if that is not noticed, 1.01. Constants that count
roundings (in ``gamma(…)``, beside UNIT, TINY or 1 + 1e-12, below 1e-6) are left alone: 1 % of them is nothing.

Everything is imported and collected once. All trials and tests then run once, to see which functions each calls, how
long it takes and, of trials, how near its truths come to its bounds. A mutant is a fork in which one function has
another code: it runs the trials that come nearest to some bound and then its module's tests, only what calls its
function and the quickest first; the first to fail kills it. The journal is kept: the same command goes on, also where
other functions changed; ``--again`` tries survivors once more. Exit status 1 where a mutant survived.
"""

from __future__ import annotations

import argparse
import gc
import hashlib
import importlib
import json
import os
import resource
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import CodeType, FunctionType
from typing import Any

import pytest
import torch
from mutants import HELPER, ROOT, Site, factors, mutant, sites
from trials.campaign import trial

import equipoise

FORMULAS = ["test_formulas_certificates.py", "test_formulas_operators.py"]
BOXES = ["test_boxes.py", "test_robust.py", *FORMULAS]
CERTIFICATES = [*(f"test_certificates{part}.py" for part in ("", "_rates", "_chain", "_verdicts")), *FORMULAS]
EXPORT = ["test_export.py", "test_export_edges.py", "test_formulas_export.py"]
MULTISCALE = ["test_lipschitz_mdeq.py", "test_lipschitz_mdeq_codes.py", "test_lipschitz_mdeq_edges.py", *FORMULAS]
NEMON = ["test_families.py", "test_nemon.py", "test_nemon_quantized.py", "test_nemon_certificates.py"]
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
    "certificates/iterates.py": ["test_rounded.py", *FORMULAS],
    "certificates/printed.py": ["test_certificates_verdicts.py", "test_report.py", *FORMULAS],
    "certificates/robustness.py": BOXES,
    "certificates/rows.py": [*BOXES, *NEMON],
    "certificates/types.py": CERTIFICATES,
    "certificates/wellposed.py": [*CERTIFICATES, *NEMON],
    "certificates/convolutional.py": [*NEMON_CONV, *TIERS],
    "certificates/sides.py": [*CERTIFICATES, *TIERS],
    "certificates/multiscale.py": MULTISCALE,
    "operators/conv_norm.py": ["test_conv_norm.py", *MULTISCALE],
    "operators/symbol_bounds.py": [*TIERS, "test_conv_norm.py", *FORMULAS],
    "operators/quantized_tiers.py": [*TIERS, *FORMULAS],
    "operators/tiers.py": [*TIERS, *FORMULAS],
    "layers/multiscale_proofs.py": MULTISCALE,
    "export/proof.py": EXPORT,
    "runtime.py": EXPORT,
    "operators/spectra.py": [*TIERS, "test_conv_norm.py", *FORMULAS],
    "operators/conv.py": [*NEMON_CONV, *FORMULAS],
    "layers/lipschitz_mdeq.py": MULTISCALE,
    "layers/steps.py": MULTISCALE,
    "export/boxes.py": EXPORT,
    "export/plan.py": EXPORT,
    "export/affine.py": EXPORT,
    "export/cayley.py": EXPORT,
    "export/factored.py": EXPORT,
    "export/fixedpoint.py": EXPORT,
    "verified.py": [*VERIFIED, *FORMULAS],
}
"""The modules that are mutated, and the tests that are theirs."""


POOL, SEED = 180, 77
"""Networks of the soundness trials that a mutant's are chosen from."""

NEAR, KEPT = 0.992, 2
"""Of each bound the quickest two networks are kept in which a truth comes so near to it that 1 % would be seen."""

LONGEST = 2.0
"""Seconds of the processor that a single test may take to be run on mutants."""

LIMIT = 150
"""Seconds of the processor that a mutant may take, and six times as many by the clock; one that hangs is noticed."""

VOID = "void"
"""In the journal: a ``return`` that gave nothing to multiply."""

SOURCE = Path(equipoise.__file__).parent

Functions = set[tuple[str, str]]
"""Functions of the library, (module, qualified name)."""


def child(work: Callable[[], str], limit: int) -> tuple[str, str | None]:
    """(what ``work`` gives, what ended its process if anything did), in a fork."""
    reading, writing = os.pipe()
    process = os.fork()
    if process == 0:
        os.close(reading)
        resource.setrlimit(resource.RLIMIT_CPU, (limit, limit + 5))
        signal.alarm(6 * limit)
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


# What calls what


@contextmanager
def watched() -> Iterator[Functions]:
    """The functions of the library that are called meanwhile."""
    prefix, seen = f"{SOURCE}{os.sep}", Functions()
    known: dict[CodeType, tuple[str, str] | None] = {}

    def look(frame: Any, event: str, argument: Any) -> None:
        code = frame.f_code
        if code not in known:
            inside = code.co_filename.startswith(prefix)
            known[code] = (code.co_filename.removeprefix(prefix), code.co_qualname) if inside else None
        if (found := known[code]) is not None:
            seen.add(found)

    sys.settrace(look)
    try:
        yield seen
    finally:
        sys.settrace(None)


def run_trials() -> str:
    """Lines of JSON: number, seconds, ratios of bounds and functions of each trial."""
    lines = []
    for index in range(POOL):
        begin = time.process_time()
        with watched() as seen:
            ledger = trial(SEED, index)[1]
        if ledger.violations:
            raise SystemExit(f"trial {index}: {ledger.violations[0]} without a mutant")
        ratios = {name: float(tally.ratio) for name, tally in ledger.tallies.items()}
        lines.append({"name": index, "seconds": time.process_time() - begin, "ratios": ratios, "calls": sorted(seen)})
    return "\n".join(map(json.dumps, lines))


class Slow(BaseException):
    """A test that takes too long; no Exception, so that nobody looks for a simpler example of it."""


def run_tests(items: list[Any], watch: Watch) -> str:
    """Lines of JSON: name, seconds and functions of each test that passes, watched, before it is too slow."""

    def stop(*_: Any) -> None:
        raise Slow

    signal.signal(signal.SIGVTALRM, stop)
    lines = []
    with watched() as watch.seen:
        for number, item in enumerate(items):
            watch.seen.clear()
            watch.failed = ""
            begin = time.process_time()
            signal.setitimer(signal.ITIMER_VIRTUAL, LONGEST, 0.5)
            try:
                item.ihook.pytest_runtest_protocol(item=item, nextitem=next(iter(items[number + 1 :]), None))
            except Slow:
                watch.failed = "Slow"
            signal.setitimer(signal.ITIMER_VIRTUAL, 0)
            seconds = time.process_time() - begin
            defined = [one for many in item._fixtureinfo.name2fixturedefs.values() for one in many]
            calls = sorted(watch.seen.union(*(watch.fixtures.get(one, set()) for one in defined)))
            if not watch.failed:
                lines.append({"name": item.nodeid, "seconds": seconds, "calls": calls})
    return "\n".join(map(json.dumps, lines))


class Watch:
    """A plugin of pytest: whether a test failed, and the functions that fixtures call, which tests may share."""

    def __init__(self) -> None:
        self.failed, self.seen, self.fixtures = "", Functions(), dict[Any, Functions]()

    @pytest.hookimpl(wrapper=True)
    def pytest_fixture_setup(self, fixturedef: Any, request: Any) -> Any:
        before = set(self.seen)
        self.seen.clear()
        result = yield
        self.fixtures[fixturedef] = set(self.seen)
        self.seen |= before
        return result

    def pytest_runtest_logreport(self, report: Any) -> None:
        if report.failed and not self.failed:
            self.failed = report.nodeid


class Mutate:
    """A plugin of pytest that runs mutants in the place of tests, and writes of each what noticed it."""

    def __init__(
        self, todo: list[Site], path: Path, tests: bool, patience: float, seconds: float | None,
        write: Callable[..., None],
    ) -> None:  # fmt: skip
        self.todo, self.path, self.with_tests, self.patience, self.write = todo, path, tests, patience, write
        self.watch, self.tests = Watch(), list[dict[str, Any]]()
        self.end = float("inf") if seconds is None else time.monotonic() + seconds

    def pytest_configure(self, config: Any) -> None:
        config.pluginmanager.register(self.watch)

    def pytest_runtestloop(self, session: Any) -> bool:
        items = session.items
        self.items = {item.nodeid: item for item in items}
        trials = seen_before(self.path, "trials", run_trials)
        near = set[int]()
        for bound in {name for line in trials for name in line["ratios"]}:
            near |= set([line["name"] for line in trials if line["ratios"].get(bound, 0) > NEAR][:KEPT])
        self.trials = [line for line in trials if line["name"] in near]
        if self.with_tests:
            self.tests = seen_before(self.path, "tests", lambda: run_tests(items, self.watch), sorted(self.items))
        for file in (files := {site.file for site in self.todo}):
            importlib.import_module("equipoise." + file.removesuffix(".py").replace("/", "."))
        functions = {file: defined(file) for file in files}
        for site in self.todo:
            if time.monotonic() > self.end:
                break
            begin, found = time.monotonic(), None
            for factor in factors(site):
                found = self.killer(functions[site.file], site, mutant(site, factor))
                if found is not None:
                    break
            self.write(site, found, round(time.monotonic() - begin, 1))
        return True

    def chosen(self, site: Site, lines: list[dict[str, Any]]) -> list[Any]:
        """Names of what calls the site's function, the quickest first, as far as patience goes."""
        left, found = self.patience, []
        for line in lines:
            if left > 0 and (not site.place or (site.file, site.place) in line["calls"]):
                found.append(line["name"])
                left -= line["seconds"]
        return found

    def killer(self, functions: list[FunctionType], site: Site, source: str) -> str | None:
        """What notices the mutant, or None."""
        own = {f"tests/{name}" for name in TESTS[site.file]}
        tests = [line for line in self.tests if line["name"].partition("::")[0] in own]
        found, ended = child(lambda: self.tried(functions, site, source, self.chosen(site, tests)), LIMIT)
        return ended or found or None

    def tried(self, functions: list[FunctionType], site: Site, source: str, tests: list[str]) -> str:
        """The first that fails, or nothing."""
        changes, trials = put_in(functions, site, source), self.chosen(site, self.trials)
        for index in trials:
            if found := trial(SEED, index)[1].violations:
                return f"trial {index}: {found[0]['bound']}"
        self.watch.failed = ""
        for name in tests:
            item = self.items[name]
            item.ihook.pytest_runtest_protocol(item=item, nextitem=None)
            if self.watch.failed:
                return self.watch.failed
        called = site.kind == "return" and (trials or tests)
        return VOID if called and not changes else ""


def defined(file: str) -> list[FunctionType]:
    """The functions that a module of the library defines, methods and what decorators hide included."""
    path = str(SOURCE / file)
    return [found for found in gc.get_objects() if type(found) is FunctionType and found.__code__.co_filename == path]


def put_in(functions: list[FunctionType], site: Site, source: str) -> list[bool]:
    """Give the functions of the module that is loaded their code from ``source``, or the module its numbers; a list
    that is longer whenever a mutated ``return`` gave a number."""
    path, codes = str(SOURCE / site.file), dict[str, CodeType]()
    module = next(vars(m) for m in list(sys.modules.values()) if getattr(m, "__file__", None) == path)

    def collect(code: CodeType) -> None:
        for inner in code.co_consts:
            if isinstance(inner, CodeType):
                codes[inner.co_qualname] = inner
                collect(inner)

    whole = compile(source, path, "exec")
    collect(whole)
    for function in functions:
        if function.__globals__ is module and function.__code__.co_qualname in codes:
            function.__code__ = codes[function.__code__.co_qualname]
    fresh = {**module}
    exec(HELPER if site.place else whole, fresh)  # of its classes and functions none is used
    module |= {name: fresh.get(name) for name in ("_mutated", "_changes")}
    for name, value in fresh.items():
        if isinstance(value, (int, float)) and value != (old := module.get(name)):
            for other in [vars(m) for m in list(sys.modules.values()) if getattr(m, "__name__", "")[:9] == "equipoise"]:
                if other.get(name) is old:
                    other[name] = value
    changes: list[bool] = fresh["_changes"] if site.place else []
    return changes


def seen_before(path: Path, kind: str, look: Callable[[], str], names: list[str] | None = None) -> list[dict[str, Any]]:
    """What ``look`` finds in a fork, or found: kept beside the journal for these very sources, by their seconds."""
    digest = hashlib.sha256(repr(names).encode())
    for source in sorted([*SOURCE.rglob("*.py"), *ROOT.glob("tests/*.py"), *ROOT.glob("benchmarks/trials/*.py")]):
        digest.update(source.read_bytes())
    kept, mark = path.with_suffix(f".{kind}.json"), digest.hexdigest()
    stored = json.loads(kept.read_text()) if kept.exists() else {}
    if stored.get("sources") != mark:
        text, ended = child(look, 40 * LIMIT)
        try:
            lines = [json.loads(line) for line in text.splitlines()]
        except json.JSONDecodeError:
            lines = []
        if ended or not lines:
            raise SystemExit(f"without a mutant: {ended or text}")
        stored = {"sources": mark, "lines": lines}
        kept.write_text(json.dumps(stored))
    for line in stored["lines"]:
        line["calls"] = {tuple(call) for call in line["calls"]}
    return sorted(stored["lines"], key=lambda line: float(line["seconds"]))


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="mutations.py", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--out", type=Path, default=Path("mutations.jsonl"), help="journal (default mutations.jsonl)")
    parser.add_argument("--file", action="append", choices=sorted(TESTS), help="only this module")
    parser.add_argument("--limit", type=int, help="stop after so many new mutants")
    parser.add_argument("--trials", action="store_true", help="the soundness trials alone, not the tests")
    parser.add_argument("--patience", type=float, default=20, metavar="SECONDS",
                        help="of trials, and of tests, that a mutant runs (default 20)")  # fmt: skip
    parser.add_argument("--again", action="store_true", help="try survivors once more")
    parser.add_argument("--seconds", type=float, help="stop after so long")
    options = parser.parse_args(arguments)
    wanted = {site.key: site for file in options.file or TESTS for site in sites(file)}
    known: dict[str, dict[str, Any]] = {}
    if options.out.exists():
        known = {line["key"]: line for line in map(json.loads, options.out.read_text().splitlines())}
    todo = [site for key, site in wanted.items() if key not in known or (options.again and not known[key]["killer"])]

    def write(site: Site, found: str | None, spent: float) -> None:
        known[site.key] = {"key": site.key, "killer": found, "seconds": spent}
        with options.out.open("a") as journal:
            journal.write(json.dumps(known[site.key]) + "\n")
        print(f"{site.file}:{site.line:<6} {found or 'SURVIVED: ' + site.source}", file=sys.stderr, flush=True)

    if todo := todo[: options.limit]:
        torch.set_num_threads(1)
        names = set[str]() if options.trials else {name for site in todo for name in TESTS[site.file]}
        files = [str(ROOT / "tests" / name) for name in sorted(names or {"test_mutations.py"})]
        plugin = Mutate(todo, options.out, not options.trials, options.patience, options.seconds, write)
        flags = ["-q", "-s", "-p", "no:cacheprovider", "-p", "no:xdist", "-m", "not slow", "--rootdir", str(ROOT)]
        pytest.main([*flags, *files], plugins=[plugin])
    return report({key: {**known[key], **site._asdict()} for key, site in wanted.items() if key in known})


def report(known: dict[str, dict[str, Any]]) -> int:
    """List the survivors; the exit status."""
    left = [line for line in known.values() if line["killer"] is None]
    for line in left:
        print(f"{line['file']}:{line['line']} {line['function']} ({line['kind']}): {line['source']}")
    void = sum(line["killer"] == VOID for line in known.values())
    print(f"{len(known) - void} mutants, {len(left)} survivors; {void} places where there was nothing to change")
    return 1 if left else 0


if __name__ == "__main__":
    sys.exit(main())
