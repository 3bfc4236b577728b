"""The built wheel as a user gets it: in fresh environments, alone and with each extra alone.

    python -m build && python tests/dist_smoke.py dist [EXTRA ...]

Every environment is made with the Python that runs this file, which needs pip and its ``venv`` and nothing else.
Without extras named, all are tried. ``--site DIR`` lends the environments the packages of another one, such as a
torch that need not be fetched again; ``PIP_CONSTRAINT`` and pip's other variables hold as ever.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import zipfile
from pathlib import Path

PROJECT = Path(__file__).resolve().parents[1]

CORE = """
import torch, equipoise as eq
from torch import nn
torch.manual_seed(0)
model = nn.Sequential(eq.MonDEQ(8, 6, margin=0.5), nn.Linear(6, 3)).eval()
x = torch.rand(5, 8)
small = eq.quantize(model, eq.Structured(bits=1))
certificate = eq.certify(small, reference=model, inputs=x)
assert certificate.certified, certificate
eq.save(model, "float.safetensors")
eq.save(small, "small.safetensors", certificate=certificate)
assert torch.equal(eq.load("small.safetensors")(x), small(x))
program = eq.export(small, "program", input_range=(0.0, 1.0), reference=model)
assert eq.runtime.load("program")(x.numpy()).shape == (5, 3)
print("1 bit:", eq.size(small), "bytes, margin", eq.margin(small[0]), "steps", program.steps)
"""
"""Built, quantized at one bit, certified, saved, loaded, exported, compiled and run, without any extra."""

REPORT = """
from pathlib import Path
from equipoise.report.pages import fill
from equipoise.report.sweeps import sweep_figure
row = dict(scheme="structured", bits=2, accuracy_mean=0.9, accuracy_std=None)
assert "<svg" in sweep_figure([row], Path("sweep.svg")).read_text()
"""
BENCH = """
import torch, equipoise as eq
from equipoise.bench.peers import peers
assert len(peers(eq.MonDEQ(8, 6), torch.rand(20, 8))) == 3
"""
EXPORT = """
import json, numpy as np, onnxruntime
graph = next(iter(__import__("pathlib").Path("graphs").glob("*.onnx")))
session = onnxruntime.InferenceSession(str(graph), providers=["CPUExecutionProvider"])
entry = session.get_inputs()[0]
assert np.isfinite(session.run(None, {entry.name: np.zeros((1, 8), np.float32)})[0]).all()
"""
DATA = """
import io, os, datasets, numpy as np
from equipoise.data import load_data
os.makedirs("data/mnist")
for split, count in (("train", 60000), ("test", 10000)):
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(10)})
    images = [np.zeros((28, 28), np.uint8)] * count
    rows = datasets.Dataset.from_dict({"image": images, "label": [i % 10 for i in range(count)]}, features=features)
    rows.to_parquet(f"data/mnist/{split}-00000-of-00001.parquet")
assert load_data("mnist", "data").features == 784
"""

Command = list[str]
TRAIN: Command = ["train", "--data", "digits", "--epochs", "1", "--features", "8", "--out", "trained.safetensors"]
SWEEP: Command = ["sweep", "--bits", "2", "--epochs", "1", "--features", "8", "--out", "sweep"]

PROMISES: dict[str, list[str | Command]] = {
    "train": [TRAIN, SWEEP, ["certify", "trained.safetensors", "--data", "digits", "--limit", "20"]],
    "data": [DATA],
    "report": [REPORT],
    "bench": [BENCH],
    "export": [
        ["export", "small.safetensors", "--target", "onnx", "--input-range", "0", "1", "--out", "graphs"],
        EXPORT,
    ],
    "train,cluster": [[*SWEEP, "--backend", "dask"], [*SWEEP[:-1], "sweep2", "--backend", "ray"]],
    "docs": [["mkdocs", "build", "--strict", "--quiet", "--config-file", str(PROJECT / "mkdocs.yml")]],
}
"""What each extra lets one do: a program, or a command of equipoise (or mkdocs)."""

REFUSED: dict[str, list[Command]] = {
    "train": [
        TRAIN,
        SWEEP,
        ["demo", "--out", "demo"],
        ["certify", "small.safetensors", "--data", "digits"],
        ["plan", "float.safetensors", "--data", "digits"],
        ["bench", "--quick"],
        ["reproduce", "li2026", "--quick", "--out", "paper"],
    ],
    "data": [["certify", "small.safetensors", "--data", "mnist"]],
    "export": [["export", "small.safetensors", "--target", "onnx", "--input-range", "0", "1", "--out", "graphs"]],
}
"""What says, without the extra, which one is missing."""


def run(python: Path, work: Path, what: str | Command, fails: bool = False) -> str:
    """One program or command; its stderr. Ends everything where it does not end as it should."""
    if isinstance(what, str):
        command = ["-c", what]
    else:
        command = ["-m", *([] if what[0] in ("pip", "mkdocs") else ["equipoise"]), *what]
    environment = {"PATH": os.defpath, "HOME": str(work), "TERM": "dumb", "NO_MKDOCS_2_WARNING": "1"}
    environment |= {
        name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "PYTHONHOME", "EQUIPOISE_DATA")
    }
    done = subprocess.run([python, *command], cwd=work, env=environment, capture_output=True, text=True, check=False)
    if done.returncode != (2 if fails else 0) or "Traceback" in done.stderr:
        sys.exit(f"{what}: exit status {done.returncode}\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}")
    return done.stderr


def environment(folder: Path, sites: list[Path]) -> tuple[Path, Path]:
    """A fresh environment that also sees the packages of ``sites``: its Python, and where its packages are."""
    subprocess.run([sys.executable, "-m", "venv", folder], check=True)
    site = Path(sysconfig.get_path("purelib", "venv", {"base": str(folder), "platbase": str(folder)}))
    (site / "lent.pth").write_text("".join(f"{path}\n" for path in sites))
    return folder / ("Scripts" if os.name == "nt" else "bin") / "python", site


def megabytes(site: Path) -> float:
    """What is installed in ``site``, without pip itself."""
    files = (path for path in site.rglob("*") if path.is_file() and path.relative_to(site).parts[0][:3] != "pip")
    return sum(path.stat().st_size for path in files) / 1e6


def archives(folder: Path) -> Path:
    """The wheel in ``folder``, once its contents are those of the tree and nothing else."""
    (wheel,) = folder.glob("*.whl")
    source = PROJECT / "src"
    kept = {path for path in source.rglob("*") if path.is_file() and "__pycache__" not in path.parts}
    tree = {path.relative_to(source).as_posix() for path in kept if "egg-info" not in path.parent.name}
    with zipfile.ZipFile(wheel) as file:
        packed = {name for name in file.namelist() if ".dist-info/" not in name}
        differing = [name for name in packed & tree if file.read(name) != (source / name).read_bytes()]
    if packed != tree or differing:
        sys.exit(f"{wheel.name} is not the tree: {sorted(packed ^ tree)[:5]}, {differing[:5]}")
    return wheel


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("dist", type=Path)
    parser.add_argument("extras", nargs="*", metavar="EXTRA", help=f"some of {' '.join(PROMISES)}; default: all")
    parser.add_argument("--core", action="store_true", help="no extra at all")
    parser.add_argument("--site", type=Path, action="append", default=[], help="packages to lend")
    given = parser.parse_args()
    wheel = archives(given.dist).resolve()
    print(f"Python {sys.version.split()[0]}, {wheel.name}")
    with tempfile.TemporaryDirectory() as scratch:
        work = Path(scratch, "work")
        work.mkdir()
        python, site = environment(Path(scratch, "core"), given.site)
        run(python, work, ["pip", "install", "--quiet", str(wheel)])
        for question in (["pip", "check"], ["--help"], ["--version"], CORE):
            run(python, work, question)
        print(f"core: {megabytes(site):.0f} MB, as promised")
        for extra, commands in REFUSED.items():
            for command in commands:
                if f"pip install 'equipoise[{extra}]'" not in (said := run(python, work, command, fails=True)):
                    sys.exit(f"equipoise {' '.join(command)} does not ask for the extra {extra}: {said}")
        print("without extras: refused with their names")
        for extra in [] if given.core else given.extras or PROMISES:
            python, own = environment(Path(scratch, "extra"), [site, *given.site])
            run(python, work, ["pip", "install", "--quiet", f"{wheel}[{extra}]"])
            for promise in [["pip", "check"], *PROMISES.get(extra, [CORE])]:
                run(python, work, promise)
            print(f"{extra}: {megabytes(own):.0f} MB more, as promised", flush=True)
            shutil.rmtree(Path(scratch, "extra"))


if __name__ == "__main__":
    main()
