"""Several processes that train one network: how they are started, what they must agree on; and one thread alone.

Lightning's DDP starts them by running the script again, once per device, with ``LOCAL_RANK`` in the environment; on
several machines the same command is started on each. In one process everything here is trivial.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import Tensor

from .errors import OptionError

__all__ = ["anyone", "check_machines", "one_thread", "together", "total", "world"]

NAMES = ("LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT", "NODE_RANK", "WORLD_SIZE")
_done: list[int] = []


@contextmanager
def one_thread() -> Iterator[None]:
    """Matrices of a hundred rows gain nothing from a second thread, and wait long for it where cores are shared."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def world() -> tuple[int, int]:
    """(this process's rank, how many there are)."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return 0, 1


def total(values: Tensor) -> Tensor:
    """The sum over all processes, the same in each."""
    if world()[1] > 1:
        values = values.to("cuda" if dist.get_backend() == "nccl" else "cpu")
        dist.all_reduce(values)
    return values


def anyone(flag: bool) -> bool:
    """Whether ``flag`` is set in any process: all of them come to the same answer, or one would wait for ever."""
    return bool(total(torch.tensor(float(flag))) > 0) if world()[1] > 1 else flag


@contextmanager
def together(devices: int, nodes: int) -> Iterator[None]:
    """Around a training of ``devices`` processes on each of ``nodes`` machines; leaves no trace of it."""
    if devices * nodes == 1:
        yield
        return
    _done.append(devices * nodes)
    before = {name: os.environ.get(name) for name in NAMES}
    try:
        yield
    finally:
        if world()[1] > 1:
            dist.destroy_process_group()
        for name, value in before.items():
            os.environ.pop(name, None)
            if value is not None:
                os.environ[name] = value


def check_machines(devices: int, nodes: int) -> None:
    """Raise :class:`OptionError` where so many could not be started, or would wait for each other for ever."""
    if devices * nodes == 1:
        return
    asked = f"devices={devices}, nodes={nodes}"
    if _done:
        raise OptionError(
            f"{asked}: a second training with several processes in one script: they run the script from its start, "
            "and would meet the first one. Give each training a script of its own"
        )
    outside = "LOCAL_RANK" in os.environ or "SLURM_NTASKS" in os.environ  # torchrun or SLURM starts the processes
    if not outside and getattr(sys.modules["__main__"], "__spec__", None) is None and not os.path.isfile(sys.argv[0]):
        raise OptionError(f"{asked}: every process runs the script again, and there is none: put the lines in a file")
    missing = [name for name in ("MASTER_ADDR", "MASTER_PORT", "NODE_RANK") if name not in os.environ]
    if nodes > 1 and not outside and missing:
        raise OptionError(
            f"{asked}: start the same command on every machine, with MASTER_ADDR and MASTER_PORT of the first one and "
            f"its own NODE_RANK from 0 to {nodes - 1} in the environment, or use torchrun; {', '.join(missing)} not set"
        )
