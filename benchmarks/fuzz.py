"""Bent files for every reader, found by coverage: only the package's own errors may come out.

    pip install atheris                                   # not a dependency: it brings a fuzzing engine of its own
    python benchmarks/fuzz.py --seconds 600               # all readers in turn, guided by coverage
    python benchmarks/fuzz.py --reader model --seed 7     # without atheris: random bytes, and the seed repeats them
    python benchmarks/fuzz.py --reader model --only 123   # one trial again, with its traceback

The bytes that the engine chooses decide where good files are bent (``hostile/``), so that most of them come past the
first check. Without atheris, or with ``--seed``, the bytes are random and numbered. A crash prints its traceback and
what repeats it. Exit status: 0 none, 1 a crash, 2 bad use.
"""

from __future__ import annotations

import argparse
import contextlib
import resource
import subprocess
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from random import Random

__all__ = ["Bytes", "main"]

MEMORY = 12 * 2**30
"""Bytes of address space: a file that asks for more than that is a finding."""


class Bytes(Random):
    """Chance that is read off ``data``; zeros when it is used up."""

    def __init__(self, data: bytes) -> None:
        super().__init__(0)
        self._data, self._place = data, 0

    def random(self) -> float:
        return self.getrandbits(16) / 2**16

    def getrandbits(self, k: int) -> int:
        count = -(-k // 8)
        taken = self._data[self._place : self._place + count].ljust(count, b"\0")
        self._place += count
        return int.from_bytes(taken, "little") & (2**k - 1)

    def _randbelow(self, n: int) -> int:  # the default draws again until it fits, and zeros may never do
        return self.getrandbits(n.bit_length() + 8) % n


@contextlib.contextmanager
def scratch() -> Iterator[Path]:
    """A path in a folder that is gone afterwards."""
    with tempfile.TemporaryDirectory() as folder:
        yield Path(folder) / "file"


def once(name: str, seed: int) -> str:
    """One numbered trial of a reader."""
    from hostile.readers import READERS

    with scratch() as path:
        return READERS[name].trial(Random(seed), path)


def numbered(names: list[str], seconds: float, seed: int) -> int:
    """Trials in turn from ``seed`` on; the number of crashes."""
    found: Counter[str] = Counter()
    crashes, until, number = 0, time.monotonic() + seconds, seed
    while time.monotonic() < until:
        name = names[number % len(names)]
        try:
            found[f"{name}: {once(name, number)}"] += 1
        except Exception:
            crashes += 1
            traceback.print_exc()
            print(f"CRASH repeat: python benchmarks/fuzz.py --reader {name} --only {number}", flush=True)
        number += 1
    for what, count in sorted(found.items()):
        print(f"{count:>9,}  {what}")
    print(f"{number - seed:,} trials, {crashes} crashes")
    return crashes


def guided(name: str, seconds: float) -> int:
    """Coverage-guided trials of one reader, in this process, which the engine ends."""
    import atheris

    with atheris.instrument_imports(include=["equipoise"]):
        from hostile.readers import READERS
    reader = READERS[name]

    def trial(data: bytes) -> None:
        with scratch() as path:
            reader.trial(Bytes(data), path)

    options = [f"-max_total_time={int(seconds)}", "-max_len=512", "-rss_limit_mb=12000", "-timeout=60"]
    corpus = Path(tempfile.mkdtemp(prefix="fuzz-"))
    for seed in range(32):  # short inputs end in zeros, and these bend the same place again and again
        (corpus / f"seed{seed}").write_bytes(Random(seed).randbytes(256))
    atheris.Setup([sys.argv[0], *options, "-len_control=0", f"-artifact_prefix={corpus}/", str(corpus)], trial)
    atheris.Fuzz()
    return 0


def main(arguments: list[str] | None = None) -> int:
    from hostile import NAMES

    parser = argparse.ArgumentParser(prog="fuzz.py", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--reader", choices=NAMES, help="one alone; default: all in turn")
    parser.add_argument("--seconds", type=float, default=60.0, help="in all (default 60)")
    parser.add_argument("--seed", type=int, help="numbered trials from here on, without atheris")
    parser.add_argument("--only", type=int, metavar="NUMBER", help="repeat one numbered trial")
    options = parser.parse_args(arguments)
    names = list(NAMES) if options.reader is None else [options.reader]
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    if options.only is not None:
        print(once(names[0], options.only))
        return 0
    if options.seed is None:
        try:
            import atheris  # noqa: F401
        except ImportError:
            print("no atheris (pip install atheris): random trials instead", file=sys.stderr)
            options.seed = 0
    if options.seed is not None:
        return min(numbered(names, options.seconds, options.seed), 1)
    if options.reader is not None:
        return guided(options.reader, options.seconds)
    share = options.seconds / len(names)
    ends = [subprocess.run([sys.executable, __file__, "--reader", n, "--seconds", str(share)], check=False).returncode
            for n in names]  # fmt: skip
    return int(any(ends))


if __name__ == "__main__":
    sys.exit(main())
