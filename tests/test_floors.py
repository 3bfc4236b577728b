"""The walls of the house: who may import whom, read from the source with ``ast``.

``ROOMS`` is the plan. A module may import lower floors and earlier rooms of its own floor, so, with the
rooms listed in order, only what stands before it. ``docs/architecture.md`` draws the same plan.
"""

from __future__ import annotations

import ast
import json
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SOURCE = ROOT / "src" / "equipoise"

FLOORS: tuple[tuple[str, ...], ...] = (
    ("errors", "memory", "verified", "norms", "activations", "linearized"),
    (
        "parametrizations.monotone",
        "parametrizations.nemon",
        "parametrizations.convolution",
        "parametrizations.lipschitz",
        "quantization.rounding",
        "quantization.codes",
        "quantization.schemes",
        "quantization.straight_through",
    ),
    (
        "operators.base",
        "operators.spectra",
        "operators.conv_norm",
        "operators.dense",
        "operators.torus",
        "operators.grids",
        "operators.symbol_bounds",
        "operators.tiers",
        "operators.conv",
        "operators.quantized",
        "operators.contractive",
        "operators.kernels",
        "operators.quantized_tiers",
        "operators.prepared",
        "operators.prepared_rows",
        "operators.recipes",
    ),
    (
        "solvers.problem",
        "solvers.loop",
        "solvers.picard",
        "solvers.forward_backward",
        "solvers.peaceman_rachford",
        "solvers.tseng",
        "solvers.rounded",
        "solvers.accelerated",
        "solvers.anderson",
        "solvers.broyden",
        "solvers.posterior",
        "solvers.trial",
    ),
    (
        "implicit",
        "layers.arguments",
        "layers.cache",
        "layers.linear",
        "layers.memory",
        "layers.solving",
        "layers.equilibrium",
        "layers.convolutional",
        "layers.mondeq",
        "layers.nemon",
        "layers.nemon_conv",
        "layers.border",
        "layers.mon_conv",
        "layers.steps",
        "layers.multiscale",
        "layers.blocks",
        "layers.room",
        "layers.multiscale_proofs",
        "layers.ends",
        "layers.multiscale_deq",
        "layers.lipschitz_mdeq",
        "layers.chain",
        "layers.box",
    ),
    (
        "quantize",
        "qat",
        "penalties",
        "certificates.printed",
        "certificates.types",
        "certificates.wellposed",
        "certificates.convergence",
        "certificates.convolutional",
        "certificates.rows",
        "certificates.sides",
        "certificates.displacement",
        "certificates.multiscale",
        "certificates.boxes",
        "certificates.robustness",
        "certificates.iterates",
        "certificates.fingerprint",
        "certificates.certify",
    ),
    (
        "_atomic",
        "_images",
        "data",
        "augmentation",
        "robust",
        "robust_loss",
        "_codecs",
        "files",
        "importers",
        "_config",
        "_machines",
        "_checkpoints",
        "_callbacks",
        "_lightning",
        "training",
        "presets",
        "mixed",
        "ladder",
        "plan",
        "report",
        "export",
        "runtime",
        "bench",
        "demo",
        "jobs",
        "sweep",
        "reproduce",
    ),
    # The package's own face, `equipoise/__init__.py`, is the empty name: it may show every room below
    # the command line, and only the command line may look at it.
    ("", "cli", "__main__"),
)
ROOMS: list[str] = [room for floor in FLOORS for room in floor]
# Rooms that are packages with an inner order of their own; their modules may import each other.
SUITES = {"_codecs", "report", "export", "bench", "reproduce", "cli"}

CORE = {"torch", "numpy", "safetensors", "rich"}
# Heavy or optional libraries, and the only rooms that may import them.
GUESTS: dict[str, set[str]] = {
    "typer": {"cli"},
    "lightning": {"_callbacks", "_lightning"},
    "tensorboard": {"_lightning"},
    "sklearn": {"data"},
    "joblib": {"sweep"},
    "ray": {"sweep"},
    "dask": {"sweep"},
    "distributed": {"sweep"},
    "datasets": {"_images"},
    "huggingface_hub": {"_images"},
    "PIL": {"_images"},
    "matplotlib": {"report"},
    "jinja2": {"report"},
    "torchdeq": {"bench"},
    "onnx": {"export"},
}
# Rooms that may import other rooms inside a function, to start quickly.
LAZY = {"", "cli", "__main__"}
NEVER_AT_IMPORT = ["lightning", "sklearn", "datasets", "matplotlib", "jinja2", "torchdeq", "onnx"]


@dataclass(frozen=True)
class Import:
    """One import statement: the dotted name it brings in, where, and whether inside a function."""

    name: str
    line: int
    inner: bool


def module_name(path: Path) -> str:
    """The name below ``equipoise``: ``solvers.loop``, or ``solvers`` for that package's ``__init__``."""
    parts = path.relative_to(SOURCE).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES: dict[str, Path] = {module_name(path): path for path in sorted(SOURCE.rglob("*.py"))}
NAMES = {*MODULES, *ROOMS}


def imports_of(source: str, module: str, is_package: bool) -> list[Import]:
    """Every import in ``source`` by absolute name; ``from a import b`` is ``a.b`` where that is a module."""
    package = ["equipoise", *(module.split(".") if module else [])]
    if not is_package:
        package.pop()
    tree = ast.parse(source)
    functions = (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)
    inner = {id(node) for scope in ast.walk(tree) if isinstance(scope, functions) for node in ast.walk(scope)}
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found += [Import(alias.name, node.lineno, id(node) in inner) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) - node.level + 1] if node.level else []
            base = ".".join([*above, *([node.module] if node.module else [])])
            for alias in node.names:
                full = f"{base}.{alias.name}"
                name = full if full.removeprefix("equipoise.") in NAMES else base
                found.append(Import(name, node.lineno, id(node) in inner))
    return list(dict.fromkeys(found))


def room_of(module: str) -> str | None:
    """The room that ``module`` is or lies in; a package that only groups rooms counts as its last one."""
    if module in ROOMS:
        return module
    suite = module.split(".")[0]
    if suite in SUITES:
        return suite
    grouped = [room for room in ROOMS if module and room.startswith(f"{module}.")]
    return grouped[-1] if grouped else None


def may_import(module: str, target: str) -> bool:
    """Whether the plan lets ``module`` import ``target``, both names below ``equipoise``."""
    source, goal = room_of(module), room_of(target)
    if source is None or goal is None:
        return False
    if goal == source:  # inside a suite; or a grouping package showing its last room, never the other way
        return source in SUITES or module != source
    return ROOMS.index(goal) < ROOMS.index(source)


def complaints(module: str, source: str, is_package: bool) -> list[str]:
    """What is wrong with the imports of one module, one line each."""
    found = []
    room = room_of(module)
    for entry in imports_of(source, module, is_package):
        where = f"equipoise.{module}:{entry.line} imports {entry.name}"
        top, _, below = entry.name.partition(".")
        if top == "equipoise":
            if not may_import(module, below):
                found.append(f"{where}: that is not below it, nor earlier on its own floor")
            if entry.inner and room not in LAZY:
                found.append(f"{where} inside a function: only the command line does that")
        elif top in GUESTS:
            if room not in GUESTS[top]:
                found.append(f"{where}: {top} may be imported only in {sorted(GUESTS[top])}")
        elif top not in CORE and top not in sys.stdlib_module_names:
            found.append(f"{where}: {top} is not a dependency that the plan knows")
    return found


@pytest.mark.parametrize("module", MODULES, ids=lambda name: name or "__init__")
def test_every_module_belongs_to_a_room(module: str) -> None:
    assert room_of(module) is not None, f"equipoise.{module} is in no room of the plan: add it to FLOORS"


def test_every_room_is_built() -> None:
    missing = [room or "__init__" for room in ROOMS if room not in MODULES]
    assert not missing, f"the plan has rooms that src/equipoise does not have: {missing}"


@pytest.mark.parametrize("module", MODULES, ids=lambda name: name or "__init__")
def test_imports_run_downwards(module: str) -> None:
    path = MODULES[module]
    found = complaints(module, path.read_text(encoding="utf-8"), path.name == "__init__.py")
    assert not found, "\n".join(found)


def test_the_picture_shows_every_room_where_it_is() -> None:
    picture = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    parts = re.split(r"^### Floor \d.*$", picture, flags=re.MULTILINE)[1:]
    shown = [tuple(re.findall(r"^\| `([\w.]+)` \|", part, re.MULTILINE)) for part in parts]
    assert shown == [tuple(room or "__init__" for room in floor) for floor in FLOORS]


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("norms", "from equipoise.layers.mondeq import MonDEQ"),
        ("norms", "from .layers import mondeq"),
        ("norms", "from . import cli"),
        ("verified", "import equipoise"),
        ("errors", "from equipoise.verified import x"),
        ("verified", "if True:\n    from equipoise import activations"),
        ("solvers.picard", "from .tseng import Tseng"),
        ("solvers.picard", "from equipoise.solvers import Tseng"),
        ("solvers.loop", "from equipoise.layers import MonDEQ"),
        ("solvers.tseng", "from equipoise.solvers import Picard"),
        ("plan", "def f():\n    from equipoise.files import save"),
        ("plan", "import lightning"),
        ("cli", "from sklearn.datasets import load_digits"),
        ("data", "def f():\n    import lightning.pytorch as pl"),
        ("operators.dense", "import scipy.linalg"),
        ("solvers.typo", "from equipoise.errors import OptionError"),
        ("solvers.tseng", "from equipoise.typo import x"),
    ],
)
def test_a_broken_wall_is_seen(module: str, source: str) -> None:
    assert complaints(module, source, False)


@pytest.mark.parametrize(
    ("module", "is_package", "source"),
    [
        ("verified", False, "import math\nfrom torch import Tensor\nfrom equipoise.errors import x"),
        ("solvers.tseng", False, "from .loop import iterate\nfrom equipoise.operators import Op"),
        ("solvers", True, "from .loop import Solution\nfrom equipoise.solvers.tseng import Tseng"),
        ("layers.mondeq", False, "from equipoise import errors\nfrom equipoise.solvers import Tseng"),
        ("_lightning", False, "def f():\n    import lightning"),
        ("report.figures", False, "import jinja2\nfrom equipoise.report.tables import rows"),
        ("", True, "from equipoise.plan import plan\nfrom equipoise.layers import MonDEQ"),
        ("cli", False, "import typer\ndef f():\n    from equipoise.training import train\nimport equipoise"),
    ],
)
def test_a_sound_wall_is_left_alone(module: str, is_package: bool, source: str) -> None:
    assert complaints(module, source, is_package) == []


def test_importing_the_package_loads_nothing_heavy() -> None:
    code = (
        f"import json, sys, equipoise\nprint(json.dumps([name for name in {NEVER_AT_IMPORT!r} if name in sys.modules]))"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    assert json.loads(run.stdout) == []
