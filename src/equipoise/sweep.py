"""Many trainings side by side, on the cores of one machine or on a cluster: schemes × bits × seeds.

Each job has a folder of its own: its checkpoint while it trains, then ``model.safetensors`` and ``result.json``. A
job with a result is not repeated, one without goes on from its checkpoint: so a sweep that was killed goes on where
it was. A job that fails leaves its error in the table, and the others go on.
"""

from __future__ import annotations

import contextlib
import csv
import io
import json
import statistics
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ._atomic import replacing
from ._checkpoints import flat
from ._codecs.values import parse, restored
from ._lightning import quiet
from .certificates import certify
from .data import Data, load_data
from .errors import ConvergenceWarning, EquipoiseError, FileFormatError, MissingExtraError, OptionError, OutputError
from .files import save
from .jobs import Job
from .quantization.schemes import Scheme
from .quantize import size

__all__ = ["BACKENDS", "Row", "Sweep", "run_sweep"]

BACKENDS = ("loky", "threading", "ray", "dask")
RESULT, MODEL, RUN = "result.json", "model.safetensors", "run"
PLACES = ("data_dir",)  # what may differ between the machines of a sweep, or after a move

Tell = Callable[[int, int, str], None]


@dataclass(frozen=True)
class Row:
    """One job: its scheme (``float`` without one), what was measured and proved, or why it failed.

    ``accuracy`` is that on the test split, ``margin`` proved; None where the job failed.
    """

    scheme: str
    bits: int | None
    seed: int
    folder: str
    accuracy: float | None = None
    accuracy_validation: float | None = None
    margin: float | None = None
    certified: bool | None = None
    target_met: bool | None = None
    size_bytes: int | None = None
    seconds_per_epoch: float | None = None
    error: str | None = None

    def to_dict(self) -> dict[str, Any]:
        """The fields as JSON has them."""
        return {field.name: getattr(self, field.name) for field in fields(self)}


@dataclass(frozen=True)
class Sweep:
    """All jobs in the order they were asked for."""

    rows: tuple[Row, ...]

    @property
    def failed(self) -> tuple[Row, ...]:
        """The jobs that ended in an error."""
        return tuple(row for row in self.rows if row.error is not None)

    def means(self) -> list[dict[str, Any]]:
        """Of each scheme and bits: mean and standard deviation (over seeds, n − 1) of accuracy, the least margin."""
        found = []
        for scheme, bits in dict.fromkeys((row.scheme, row.bits) for row in self.rows):
            same = [row for row in self.rows if (row.scheme, row.bits) == (scheme, bits)]
            done = [row for row in same if row.error is None and row.accuracy is not None]
            accuracies = [row.accuracy for row in done if row.accuracy is not None]
            margins = [row.margin for row in done if row.margin is not None]
            found.append(
                {
                    "scheme": scheme,
                    "bits": bits,
                    "seeds": len(done),
                    "accuracy_mean": statistics.fmean(accuracies) if accuracies else None,
                    "accuracy_std": statistics.stdev(accuracies) if len(accuracies) > 1 else None,
                    "margin_mean": statistics.fmean(margins) if margins else None,
                    "margin_least": min(margins, default=None),
                    "certified": all(row.certified for row in done) if done else None,
                    "size_bytes": done[0].size_bytes if done else None,
                    "failed": len(same) - len(done),
                }
            )
        return found

    def to_dict(self) -> dict[str, Any]:
        """``{"jobs": […], "means": […]}``."""
        return {"jobs": [row.to_dict() for row in self.rows], "means": self.means()}

    def write(self, folder: Path) -> None:
        """``sweep.json``, and ``sweep.csv`` with a row per job."""
        with replacing(folder / "sweep.json", force=True) as file:
            file.write(json.dumps(self.to_dict(), indent=1, allow_nan=False).encode())
        text = io.StringIO()
        table = csv.DictWriter(text, fieldnames=[field.name for field in fields(Row)])
        table.writeheader()
        table.writerows(row.to_dict() for row in self.rows)
        with replacing(folder / "sweep.csv", force=True) as file:
            file.write(text.getvalue().encode())


def run_sweep(
    base: Job,
    schemes: Sequence[Scheme | None],
    seeds: Sequence[int],
    out: Path,
    jobs: int = 1,
    backend: str = "loky",
    progress: Tell | None = None,
) -> Sweep:
    """Train ``base`` with every one of ``schemes`` (None: floats) and ``seeds``, ``jobs`` at a time.

    ``out`` receives a folder per job, ``sweep.json`` and ``sweep.csv``; the tables are written again after every job.
    ``backend`` is joblib's: processes (``loky``), ``threading``, or a running ``ray`` or ``dask`` cluster whose
    machines share ``out``. ``progress`` is told (jobs done, jobs in all, what ended last).

    Raises:
        OptionError: nothing to do, something twice, ``jobs`` not positive or an unknown backend, or results in
            ``out`` that were made with other options: says which.
        OutputError: ``out`` cannot be written.
        MissingExtraError: joblib, or the cluster's library, is not installed.
        KeyboardInterrupt: Ctrl-C; what is done stays done.
    """
    if type(jobs) is not int or jobs < 1:
        raise OptionError(f"jobs={jobs!r}: give a positive integer")
    parallel, delayed = _joblib(backend)
    planned = _planned(base, schemes, seeds, out)
    rows: dict[str, Row] = {}
    for name, job in planned.items():
        done = _finished(out / name, job)
        if done is not None:
            rows[name] = done
    tell = progress or (lambda done, total, last: None)
    waiting = [(name, job) for name, job in planned.items() if name not in rows]
    tell(len(rows), len(planned), "")

    def so_far() -> Sweep:
        return Sweep(tuple(rows[name] for name in planned if name in rows))

    # Threads share one global generator: there all networks are drawn before the first one is trained.
    data = load_data(base.data, base.data_dir) if backend == "threading" else None
    starts = [None if data is None else _drawn(job, data) for _, job in waiting]
    with quiet(), torch.random.fork_rng(devices=[]), _cluster(backend, jobs):
        tasks = zip(waiting, starts, strict=True)
        calls = (delayed(_run)(job, out / name, start) for (name, job), start in tasks)
        for row in parallel(n_jobs=jobs, return_as="generator_unordered")(calls):
            if row is None:
                raise KeyboardInterrupt
            rows[row.folder] = row
            so_far().write(out)
            tell(len(rows), len(planned), row.folder)
    so_far().write(out)
    return so_far()


def _planned(base: Job, schemes: Sequence[Scheme | None], seeds: Sequence[int], out: Path) -> dict[str, Job]:
    """The jobs by the names of their folders; the folder they lie in is made."""
    if not schemes or not seeds:
        raise OptionError("a sweep needs at least one scheme and one seed")
    planned: dict[str, Job] = {}
    for scheme in schemes:
        for seed in seeds:
            what = "float" if scheme is None else f"{scheme.name}-{scheme.bits}"
            name = f"{what}-seed{seed}"
            if name in planned:
                raise OptionError(f"{name} is asked for twice: give each scheme, number of bits and seed once")
            learn = base.learn_scale and scheme is not None
            planned[name] = replace(base, scheme=scheme, learn_scale=learn, config=replace(base.config, seed=seed))
    try:
        out.mkdir(parents=True, exist_ok=True)
        with replacing(out / ".probe", force=True):
            pass
        (out / ".probe").unlink()
    except OSError as error:
        raise OutputError(f"{out} cannot be written ({error.strerror}): choose another folder") from error
    return planned


def _identity(job: Job) -> dict[str, Any]:
    values = {f.name: getattr(job, f.name) for f in fields(Job) if f.name not in (*PLACES, "config", "scheme")}
    return flat({**values, **job.config.course(), **job.scheme_fields()}, "")


def _finished(folder: Path, job: Job) -> Row | None:
    """The result that lies in ``folder``, if there is one; one that failed is tried again."""
    path = folder / RESULT
    if not path.exists():
        return None
    try:
        found = parse(path.read_bytes())
        made, row = dict(found["job"]), restored(Row, found["row"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise FileFormatError(f"{path} is not a result of a sweep, or damaged: {error}; remove it") from error
    wanted = _identity(job)
    for field in {**wanted, **made}:
        if made.get(field) != wanted.get(field):
            raise OptionError(
                f"{path} was made with {field}={made.get(field)!r}, not {wanted.get(field)!r}: "
                "sweep into another folder, or with the same"
            )
    return row


def _drawn(job: Job, data: Data) -> nn.Module | Exception:
    """The network before training, or why there is none: that is for the job's own row."""
    try:
        return job.network(data)
    except EquipoiseError as error:
        return error


def _run(job: Job, folder: Path, start: nn.Module | Exception | None) -> Row | None:
    """One job, in whatever process; None after Ctrl-C."""
    scheme = job.scheme
    row = Row(
        "float" if scheme is None else scheme.name,
        None if scheme is None else scheme.bits,
        job.config.seed,
        folder.name,
    )
    try:
        if isinstance(start, Exception):
            raise start
        with _alone(folder):
            return _finished(folder, job) or _trained(job, folder, row, start)
    except KeyboardInterrupt:
        return None
    except Exception as error:  # whatever it is, it is this job's, and the table says so
        return replace(row, error=f"{type(error).__name__}: {' '.join(str(error).split())}")


@contextlib.contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """In the folder nobody else works: the processes of a sweep that was killed may live on until their job ends."""
    folder.mkdir(parents=True, exist_ok=True)
    try:
        import fcntl
    except ImportError:  # Windows
        yield
        return
    with (folder / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # let go by the system when the process ends, however it does
        yield


def _trained(job: Job, folder: Path, row: Row, start: nn.Module | None) -> Row | None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # its traces are in the steps of metrics.csv
        outcome = job.run(folder / RUN, resume=True, progress=False, network=start)
    training = outcome.training
    if training.interrupted:
        return None
    certificate = certify(outcome.model)
    save(outcome.model, folder / MODEL, certificate, force=True)
    proof = certificate.to_dict()
    row = replace(
        row,
        accuracy=training.accuracy_test,
        accuracy_validation=training.accuracy_validation,
        margin=proof["margin"],
        certified=proof["certified"],
        target_met=training.target_met,
        size_bytes=size(outcome.model),
        seconds_per_epoch=training.seconds_per_epoch,
    )
    with replacing(folder / RESULT, force=True) as file:
        file.write(json.dumps({"job": _identity(job), "row": row.to_dict()}, allow_nan=False).encode())
    return row


def _joblib(backend: str) -> tuple[Any, Any]:
    if backend not in BACKENDS:
        raise OptionError(f"backend={backend!r}: choose one of {', '.join(BACKENDS)}")
    try:
        from joblib import Parallel, delayed
    except ImportError as error:
        raise MissingExtraError("a sweep needs joblib: pip install 'equipoise[train]'") from error
    return Parallel, delayed


@contextlib.contextmanager
def _cluster(backend: str, jobs: int) -> Iterator[None]:
    """Joblib's backend of that name, registered and connected."""
    from joblib import parallel_config

    options: dict[str, Any] = {}
    own: Any = None
    try:
        if backend == "ray":
            from ray.util.joblib import register_ray

            register_ray()
        elif backend == "dask":
            from dask.distributed import get_client
            from distributed import Client

            try:
                get_client()
            except ValueError:  # none is connected: the one that DASK_SCHEDULER_ADDRESS names, else on this machine
                options["client"] = own = Client()
    except ImportError as error:
        raise MissingExtraError(f"backend={backend!r} needs its library: pip install 'equipoise[cluster]'") from error
    try:
        with parallel_config(backend=backend, n_jobs=jobs, **options):
            yield
    finally:
        if own is not None:
            own.shutdown()
