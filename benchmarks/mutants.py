"""Mutants of a module: where one constant or one returned bound is changed, and its source with that change."""

from __future__ import annotations

import ast
import zlib
from collections import Counter
from pathlib import Path
from typing import Any, NamedTuple

__all__ = ["HELPER", "ROOT", "Site", "factors", "mutant", "sites"]

ROOT = Path(__file__).resolve().parents[1]

LOWER = {"margin", "row_margins", "certified_radius", "_radius", "_lifts", "_image", "min_eigenvalue", "at_least"}
"""Functions that bound from below."""

NO_BOUNDS = {
    # what is proved of it is proved elsewhere: estimates, guesses, steps that are chosen
    "perron", "_eigenvectors", "_resolvent", "best_family", "_settles", "observe", "spectrum", "start", "find",
    "best_alpha", "_block_norm", "_minimise_cayley_norm", "_power",
    # values and products
    "empty", "lengths",
    "_exact", "metzler", "evaluated", "_scores", "apply", "transpose", "transposed", "_applied", "_product", "summed",
    "pullback", "_symbols", "_cayley_symbols", "cayley_product", "transposed_cayley_product", "_inverse", "kernel",
    "_convolve", "_padded", "_kernel64", "dequantize", "__call__", "equilibrium", "integers", "solve",
    # plumbing
    "fresh_operator", "fresh_kernel", "select", "_columns", "_shape", "to_dict", "summary", "dual", "columns", "of",
    "_on", "once", "_like", "_known", "_known_symbols", "_kept_product", "_blocks", "tensors", "_partners",
    "channels", "fit", "_apply", "quantize", "quantize_tiers", "_centers", "_without", "preset", "_preset", "plan",
    "to64", "_parts", "recurrent_bits", "macs", "load", "_raw", "_real", "compiler", "_compiled", "__init__",
}  # fmt: skip
"""Functions whose results are no bounds: estimates that are proved elsewhere, plain values, plumbing."""


class Site(NamedTuple):
    """Where a module is mutated: the ``number``-th return or constant, on ``line`` of ``function``, whose full name
    is ``place``; ``key`` stays the same as long as the function does, wherever in its file it stands."""

    file: str
    kind: str
    number: int
    line: int
    function: str
    source: str
    key: str
    place: str


class Walker(ast.NodeTransformer):
    """Lists the sites of a module, or rewrites the one that it is given."""

    def __init__(self, kind: str | None = None, number: int = -1, factor: float = 1.0) -> None:
        self.target, self.factor = (kind, number), factor
        self.counts = {"return": 0, "constant": 0}
        self.found: list[tuple[str, int, int, str, str, bool, str]] = []
        self.function = self.code = self.place = ""
        self.rounding = False

    def _site(self, kind: str, node: Any) -> bool:
        number = self.counts[kind]
        self.counts[kind] += 1
        self.found.append((kind, number, node.lineno, self.function, self.code, self.rounding, self.place))
        return (kind, number) == self.target

    def visit_ClassDef(self, node: ast.ClassDef) -> Any:
        outer, self.place = self.place, f"{self.place}.{node.name}".lstrip(".")
        self.generic_visit(node)
        self.place = outer
        return node

    def visit_FunctionDef(self, node: ast.FunctionDef) -> Any:
        outer = self.function, self.code, self.place
        inside = f"{self.place}.<locals>" if self.function else self.place
        self.function, self.place = node.name, f"{inside}.{node.name}".lstrip(".")
        self.code = "" if self.target[0] else ast.unparse(node)
        self.generic_visit(node)
        self.function, self.code, self.place = outer
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
        outer, self.rounding = self.rounding, self.rounding or _counts_roundings(node)
        if self.function not in NO_BOUNDS and not isinstance(node.op, (ast.Mod, ast.FloorDiv)):
            for name in ("left", "right"):
                side = getattr(node, name)
                if _number(side) not in (None, 0) and self._site("constant", side):
                    setattr(node, name, ast.copy_location(ast.Constant(_number(side) * self.factor), side))
        self.generic_visit(node)
        self.rounding = outer
        return node


ROUNDINGS = {"UNIT", "TINY", "tiny", "gamma", "unit", "ulps"}
"""What the rounding of an operation, or underflow, is called."""


def _counts_roundings(node: ast.AST) -> bool:
    """Whether a factor of the product is a rounding: then all of it is."""
    if isinstance(node, ast.BinOp) and isinstance(node.op, (ast.Mult, ast.Div)):
        return _counts_roundings(node.left) or _counts_roundings(node.right)
    if isinstance(node, ast.Call):
        return ast.unparse(node.func).rpartition(".")[2] in ("gamma", "product_rounding")
    return ast.unparse(node).rpartition(".")[2] in ROUNDINGS


def _number(node: ast.AST) -> float | None:
    if isinstance(node, ast.Constant) and isinstance(node.value, (int, float)) and not isinstance(node.value, bool):
        return node.value
    return None


HELPER = """
_changes = []

def _mutated(value, factor):
    import torch
    if isinstance(value, bool):
        return value
    if isinstance(value, float):
        changed = value * (factor if value > 0 else 2 - factor)
        _changes.extend([True] * (changed != value))
        return changed
    if isinstance(value, torch.Tensor) and value.is_floating_point():
        _changes.extend([True] * (value.numel() > 0))
        return value * torch.where(value > 0, factor, 2 - factor).to(value)
    if type(value) is tuple:
        return tuple(_mutated(item, factor) for item in value)
    if type(value).__name__ == "Box":  # narrower about its centre
        _changes.append(True)
        center, half = value.low / 2 + value.high / 2, value.high / 2 - value.low / 2
        return type(value)(center - factor * half, center + factor * half)
    points = ("value", "values", "image", "quantized", "reference", "u", "z", "q")  # stay, bounds about them change
    if isinstance(value, tuple):
        return value._replace(**{n: _mutated(getattr(value, n), factor) for n in value._fields if n not in points})
    if type(value).__name__ in ("Bounds", "Gap"):
        import dataclasses
        return dataclasses.replace(value, **{n: _mutated(v, factor) for n, v in vars(value).items() if n not in points})
    return value
"""


def sites(file: str) -> list[Site]:
    """Every site of a module, in order."""
    text = (ROOT / "src" / "equipoise" / file).read_text()
    walker, lines, counts = Walker(), text.splitlines(), Counter[str]()
    walker.visit(ast.parse(text))
    found = []
    for kind, number, line, function, code, rounding, place in walker.found:
        key = f"{file}:{function}:{zlib.crc32(code.encode()):08x}:{kind}"
        if not rounding:
            source = lines[line - 1].strip()
            found.append(Site(file, kind, number, line, function, source, f"{key}:{counts[key]}", place))
        counts[key] += 1
    return found


def mutant(site: Site, factor: float) -> str:
    """The source of the module with one site changed."""
    text = (ROOT / "src" / "equipoise" / site.file).read_text()
    tree = Walker(site.kind, site.number, factor).visit(ast.parse(text))
    return ast.unparse(ast.fix_missing_locations(tree)) + (HELPER if site.kind == "return" else "")


def factors(site: Site) -> tuple[float, ...]:
    """What the site is multiplied by, one after the other."""
    if site.kind == "return":
        return (1.01,) if site.function in LOWER else (0.99,)
    return 0.99, 1.01
