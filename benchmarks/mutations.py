"""Which tests notice that a formula of a certificate is 1 % wrong: one mutant after another, survivors listed.

    python benchmarks/mutations.py --out mutations.jsonl [--file norms.py] [--limit 50]

Two kinds of mutants, made by rewriting the syntax tree of one module of a copy of ``src``: what a ``return`` gives,
floats and float tensors, times the factor that makes the bound unsound (0.99, or 1.01 in a function whose name says
that it bounds from below); and a constant of an arithmetic expression times 0.99 and, if that is not noticed, 1.01.
Constants that count roundings (in ``gamma(…)``, beside 1 + 1e-12, below 1e-6) are left alone: 1 % of them is nothing.
Every mutant runs, in a process of its own, some soundness trials and then the module's tests; the first to fail kills
it. The journal is kept: the same command goes on. Exit status 1 where a mutant survived.
"""

from __future__ import annotations

import argparse
import ast
import json
import os
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parents[1]

TESTS = {
    "certificates/boxes.py": ["test_boxes.py"],
    "certificates/certify.py": ["test_certificates.py", "test_certificates_chain.py", "test_certificates_verdicts.py"],
    "certificates/convergence.py": ["test_certificates.py", "test_families.py", "test_nemon.py"],
    "certificates/convolutional.py": ["test_nemon_conv.py", "test_nemon_conv_networks.py"],
    "certificates/displacement.py": ["test_certificates.py", "test_certificates_chain.py"],
    "certificates/sides.py": ["test_certificates.py", "test_certificates_chain.py", "test_mon_conv_codes.py"],
    "certificates/multiscale.py": ["test_lipschitz_mdeq_codes.py"],
    "certificates/iterates.py": ["test_rounded.py"],
    "certificates/printed.py": ["test_certificates_verdicts.py", "test_report.py"],
    "certificates/robustness.py": ["test_robust.py", "test_boxes.py"],
    "certificates/rows.py": ["test_boxes.py", "test_nemon.py"],
    "certificates/types.py": ["test_certificates.py", "test_certificates_chain.py"],
    "certificates/wellposed.py": ["test_certificates.py", "test_families.py"],
    "export/proof.py": ["test_export.py", "test_export_edges.py"],
    "norms.py": ["test_norms.py"],
    "solvers/posterior.py": ["test_solvers.py", "test_nemon.py"],
}
"""The modules that are mutated, and the tests that are theirs."""

LOWER = {"margin", "row_margins", "certified_radius", "_radius", "_lifts", "_image", "min_eigenvalue", "at_least"}
"""Functions that bound from below."""

NO_BOUNDS = {
    "perron", "_eigenvectors", "_resolvent", "best_family", "_exact", "metzler", "fresh_operator", "fresh_kernel",
    "spectrum", "observe", "_settles", "start", "evaluated", "find", "select", "_scores", "_columns", "_shape",
    "to_dict", "summary", "dual", "columns", "of", "_on",
}  # fmt: skip
"""Functions whose results are no bounds: estimates that are proved elsewhere, plain values, plumbing."""

TRIALS = 24
"""Networks of the soundness trials that a mutant must pass, besides the tests."""

LIMIT = 150
"""Seconds that a mutant may take; one that hangs is noticed as well."""


class Site(NamedTuple):
    """Where a module is mutated: the ``number``-th return or constant, on ``line`` of ``function``."""

    file: str
    kind: str
    number: int
    line: int
    function: str
    source: str

    @property
    def key(self) -> str:
        return f"{self.file}:{self.line}:{self.kind}:{self.number}"


class Walker(ast.NodeTransformer):
    """Lists the sites of a module, or rewrites the one that it is given."""

    def __init__(self, kind: str | None = None, number: int = -1, factor: float = 1.0) -> None:
        self.target, self.factor = (kind, number), factor
        self.counts = {"return": 0, "constant": 0}
        self.found: list[tuple[str, int, int, str, ast.AST]] = []
        self.function = ""

    def _site(self, kind: str, node: Any) -> bool:
        number = self.counts[kind]
        self.counts[kind] += 1
        self.found.append((kind, number, node.lineno, self.function, node))
        return (kind, number) == self.target

    def visit_FunctionDef(self, node: ast.FunctionDef) -> Any:
        outer, self.function = self.function, node.name
        self.generic_visit(node)
        self.function = outer
        return node

    def visit_Return(self, node: ast.Return) -> Any:
        self.generic_visit(node)
        plain = node.value is None or isinstance(node.value, (ast.Constant, ast.Compare, ast.BoolOp, ast.JoinedStr))
        if plain or self.function in NO_BOUNDS:
            return node
        if self._site("return", node):
            call = ast.Call(ast.Name("_mutated", ast.Load()), [node.value, ast.Constant(self.factor)], [])
            node.value = ast.copy_location(call, node)
        return node

    def visit_Call(self, node: ast.Call) -> Any:
        if ast.unparse(node.func).rpartition(".")[2] in ("gamma", "product_rounding", "range", "field"):
            return node
        return self.generic_visit(node)

    def visit_Subscript(self, node: ast.Subscript) -> Any:
        return node

    def visit_BinOp(self, node: ast.BinOp) -> Any:
        numbers = [side for side in (node.left, node.right) if _number(side) is not None]
        small = any(0 < abs(_number(side) or 0) < 1e-6 for side in numbers)
        if len(numbers) == 2 or small or any(isinstance(side, ast.List) for side in (node.left, node.right)):
            return node  # 1 + 1e-12, 2.0**-45
        if self.function not in NO_BOUNDS and not isinstance(node.op, (ast.Mod, ast.FloorDiv)):
            for name in ("left", "right"):
                side = getattr(node, name)
                if _number(side) not in (None, 0) and self._site("constant", side):
                    setattr(node, name, ast.copy_location(ast.Constant(_number(side) * self.factor), side))
        return self.generic_visit(node)


def _number(node: ast.AST) -> float | None:
    if isinstance(node, ast.Constant) and isinstance(node.value, (int, float)) and not isinstance(node.value, bool):
        return node.value
    return None


HELPER = """
def _mutated(value, factor):
    import torch
    if isinstance(value, bool):
        return value
    if isinstance(value, float):
        return value * (factor if value > 0 else 2 - factor)
    if isinstance(value, torch.Tensor) and value.is_floating_point():
        return value * torch.where(value > 0, factor, 2 - factor).to(value)
    if type(value) is tuple:
        return tuple(_mutated(item, factor) for item in value)
    if isinstance(value, tuple):  # points stay where they are, bounds about them change
        points = ("value", "quantized", "reference", "u", "z", "q")
        return value._replace(**{n: _mutated(getattr(value, n), factor) for n in value._fields if n not in points})
    return value
"""


def sites(file: str) -> list[Site]:
    """Every site of a module, in order."""
    text = (ROOT / "src" / "equipoise" / file).read_text()
    walker = Walker()
    walker.visit(ast.parse(text))
    lines = text.splitlines()
    return [
        Site(file, kind, number, line, function, lines[line - 1].strip())
        for kind, number, line, function, _ in walker.found
    ]


def mutant(site: Site, factor: float) -> str:
    """The source of the module with one site changed."""
    text = (ROOT / "src" / "equipoise" / site.file).read_text()
    tree = Walker(site.kind, site.number, factor).visit(ast.parse(text))
    return ast.unparse(ast.fix_missing_locations(tree)) + (HELPER if site.kind == "return" else "")


def killer(copy: Path, site: Site, quick: bool, limit: int = LIMIT) -> str | None:
    """What notices the mutant in ``copy``, or None; a process of its own, torch already in its memory."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reading)
        signal.alarm(limit)
        sys.dont_write_bytecode = True
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, 1)
        os.dup2(null, 2)
        try:
            found = _tried(copy, site, quick)
        except BaseException as error:  # nothing of it may reach the parent's code in this process
            found = f"{type(error).__name__}: {error}"
        os.write(writing, (found or "").encode()[:4000])
        os._exit(0)
    os.close(writing)
    with os.fdopen(reading) as pipe:
        found = pipe.read()
    status = os.waitpid(child, 0)[1]
    if os.WIFSIGNALED(status):
        return "timeout" if os.WTERMSIG(status) == signal.SIGALRM else f"signal {os.WTERMSIG(status)}"
    return found or None


def _tried(copy: Path, site: Site, quick: bool) -> str | None:
    for path in (ROOT / "tests", ROOT / "benchmarks", copy):
        sys.path.insert(0, str(path))
    try:
        from trials.campaign import trial

        for index in range(TRIALS):
            _, ledger = trial(77, index)
            if ledger.violations:
                return f"trial {index}: {ledger.violations[0]['bound']}"
    except Exception as error:
        return f"trials: {type(error).__name__}"
    if quick:
        return None
    import pytest

    class First:
        failed = ""

        def pytest_runtest_logreport(self, report: Any) -> None:
            if report.failed and not self.failed:
                self.failed = report.nodeid

        def pytest_collectreport(self, report: Any) -> None:
            if report.failed and not self.failed:
                self.failed = report.nodeid

    first = First()
    files = [str(ROOT / "tests" / name) for name in TESTS[site.file]]
    options = ["-x", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", "-m", "not slow", "--rootdir", str(ROOT)]
    code = pytest.main([*options, *files], plugins=[first])
    return first.failed or ("" if code == 0 else f"pytest {code}") or None


def factors(site: Site) -> Iterator[float]:
    if site.kind == "return":
        yield 1.01 if site.function in LOWER else 0.99
    else:
        yield from (0.99, 1.01)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="mutations.py", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--out", type=Path, default=Path("mutations.jsonl"), help="journal (default mutations.jsonl)")
    parser.add_argument("--file", action="append", choices=sorted(TESTS), help="only this module")
    parser.add_argument("--limit", type=int, help="stop after so many new mutants")
    parser.add_argument("--quick", action="store_true", help="the soundness trials alone, not the tests")
    parser.add_argument("--seconds", type=float, help="stop after so long")
    options = parser.parse_args(arguments)
    import mpmath  # noqa: F401  what every mutant's process needs is imported once
    import pytest  # noqa: F401
    import torch

    torch.set_num_threads(1)
    known = {}
    if options.out.exists():
        known = {line["key"]: line for line in map(json.loads, options.out.read_text().splitlines())}
    begin, tried = time.monotonic(), 0
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / "src"
        ignored = shutil.ignore_patterns("__pycache__")
        shutil.copytree(ROOT / "src" / "equipoise", copy / "equipoise", ignore=ignored)
        for file in options.file or TESTS:
            target = copy / "equipoise" / file
            original = target.read_text()
            if any(site.key not in known for site in sites(file)) and (
                sick := killer(copy, sites(file)[0], options.quick, 4 * LIMIT)
            ):
                raise SystemExit(f"{file}: {sick} fails without a mutant")
            for site in sites(file):
                if site.key in known:
                    continue
                if tried == options.limit or time.monotonic() - begin > (options.seconds or float("inf")):
                    break
                tried += 1
                found = None
                for factor in factors(site):
                    target.write_text(mutant(site, factor))
                    found = killer(copy, site, options.quick)
                    if found is not None:
                        break
                known[site.key] = {"key": site.key, "killer": found, **site._asdict()}
                with options.out.open("a") as journal:
                    journal.write(json.dumps(known[site.key]) + "\n")
                print(f"{site.key:<44} {found or 'SURVIVED: ' + site.source}", file=sys.stderr, flush=True)
            target.write_text(original)
    return report(known)


def report(known: dict[str, dict[str, Any]]) -> int:
    """List the survivors; the exit status."""
    left = [line for line in known.values() if line["killer"] is None]
    for line in left:
        print(f"{line['file']}:{line['line']} {line['function']} ({line['kind']}): {line['source']}")
    print(f"{len(known)} mutants, {len(left)} survivors")
    return 1 if left else 0


if __name__ == "__main__":
    sys.exit(main())
