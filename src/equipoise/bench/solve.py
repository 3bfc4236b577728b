"""Solvers side by side, against torchdeq, against plain PyTorch, and against the machine's own product."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from rich.table import Table

from ..errors import MissingExtraError
from .contenders import OURS, RACING, REFERENCE, Contender, library, plain
from .measure import Tracker
from .network import Network, Setting, trained_network
from .peers import FAMILY, peers
from .race import GOAL, race, work_for
from .rows import DASH, MORE, Row, Target, at_least_times, not_measured, number, ratio_text, time_text
from .sgemm import share_of_sgemm

__all__ = ["FULL", "QUICK", "Sizes", "measure", "rows", "tables"]

BESIDES = 6
"""Parts of a race besides our solvers: ``layer(x)``, plain PyTorch, torchdeq's three, and the rounds."""

LARGE, PROMPT, SHARE = 10_000, 0.5e-3, 0.6
"""The batch that targets are of, seconds of one sample that are few enough, and the share of the sgemm rate wanted."""


@dataclass(frozen=True)
class Sizes:
    """How large everything is; ``batches``: (samples in a solve, different solves in a measurement)."""

    batches: tuple[tuple[int, int], ...] = ((1, 16), (256, 4), (LARGE, 1))
    rounds: int = 7
    sgemm: int = 2048
    warm_up_steps: int = 400


FULL = Sizes()
QUICK = Sizes(batches=((1, 8), (256, 1), (1000, 1)), rounds=5, warm_up_steps=100)


def measure(setting: Setting, tell: Tracker, sizes: Sizes | None = None) -> dict[str, Any]:
    """Every network's races; plain values, as JSON has them. Without torchdeq ``notes`` says so."""
    sizes = sizes or (QUICK if setting.quick else FULL)
    tell.expect((len(sizes.batches) * (len(RACING) + BESIDES) + 1) * (1 if setting.given is None else 2) + 1)
    tell("a network to measure on")
    trained = trained_network(setting.data, sizes.warm_up_steps)
    notes, measured = [], []
    for network in (trained,) if setting.given is None else (trained, setting.given):
        contenders, missing = _contenders(network)
        notes += [missing] if missing and missing not in notes else []
        measured.append(_network(network, contenders, sizes, tell))
    return {"goal": GOAL, "reference": REFERENCE, "networks": measured, "notes": notes}


def _contenders(network: Network) -> tuple[list[Contender], str | None]:
    """Everybody who can take part, and who cannot."""
    contenders = [*library(network.layer), plain(network.layer)]
    try:
        return [*contenders, *peers(network.layer, network.samples)], None
    except MissingExtraError as error:
        return contenders, f"no peers: {error}"


def _network(network: Network, contenders: list[Contender], sizes: Sizes, tell: Tracker) -> dict[str, Any]:
    races = []
    for batch, count in sizes.batches:
        work = work_for(network.layer, network.samples, batch, count)
        label = f"{network.name}, batch {batch:,}"
        races.append(race(network.layer, contenders, work, sizes.rounds, tell, label))
    # at the largest batch, which is the last, and at the setting that served there
    row = next(row for row in races[-1]["contenders"] if (row["family"], row["name"]) == (OURS, REFERENCE))
    tell(f"{network.name}: share of the sgemm rate")
    share = None
    if row["reached"]:
        share = share_of_sgemm(network.layer, work, row["setting"], sizes.sgemm, sizes.rounds)
    return {**network.to_dict(), "races": races, "sgemm": share}


def rows(found: dict[str, Any]) -> list[Row]:
    """The ratios: of the fastest solver that reaches the accuracy on either side."""
    return [row for network in found["networks"] for row in _ratios(network, found["notes"])]


def _ratios(network: dict[str, Any], notes: list[str]) -> list[Row]:
    listed = []
    for held in network["races"]:
        what, batch = f"solve, {network['name']}, batch {held['batch']:,}", held["batch"]
        seconds = {(row["family"], row["name"]): row["seconds"] for row in held["contenders"]}
        ours = seconds[OURS, REFERENCE]
        if ours is None:
            listed.append(not_measured(what, f"{REFERENCE} did not reach the accuracy"))
            continue
        if held["fastest_peer"] is None:
            listed.append(not_measured(what, notes[0] if notes else "no solver of torchdeq reached the accuracy"))
        else:
            peer = f"torchdeq, {held['fastest_peer']}"
            target = {1: _soon(ours), LARGE: at_least_times(10)}.get(batch)
            listed.append(Row.timed(what, ours, seconds[FAMILY, held["fastest_peer"]], peer, target=target))
        if held["speedup_plain"] is not None:
            theirs = ours * held["speedup_plain"]
            target = at_least_times(1) if batch == LARGE else None
            listed.append(Row.timed(what, ours, theirs, "plain PyTorch, told its steps", target=target))
    if (share := network["sgemm"]) is not None:
        what = f"rate of its products, {network['name']}, batch {share['batch']:,}"
        rates = (f"{number(share[f'{key}_gflops'])} GFLOP/s" for key in ("solve", "sgemm"))
        wanted = Target(f"≥ {SHARE:g}×", lambda ratio: ratio >= SHARE) if share["batch"] == LARGE else None
        listed.append(
            Row.of(what, next(rates), f"{next(rates)} sgemm {share['size']:,}³", share["share"], wanted or MORE)
        )
    return listed


def _soon(seconds: float) -> Target:
    return Target("≥ 5×, or < 0.5 ms", lambda ratio: ratio >= 5 or seconds < PROMPT)


def tables(found: dict[str, Any]) -> list[Table]:
    """All that was measured, in reading order."""
    networks = found["networks"]
    return [*(_races(network, found) for network in networks), _shares(networks)]


def _races(network: dict[str, Any], result: dict[str, Any]) -> Table:
    condition = number(network["condition"])
    table = Table(
        title=f"{network['name']}: n = {network['features']}, κ = {condition}",
        caption=f"a solve to a worst relative error of {result['goal']:g}, and its ratio to {result['reference']}'s",
    )
    table.add_column("solver")
    for held in network["races"]:
        table.add_column(f"batch {held['batch']:,}", justify="right")
    for column in zip(*(held["contenders"] for held in network["races"]), strict=True):
        name, family = column[0]["name"], column[0]["family"]
        label = name if family == "equipoise" else f"{family}: {name}"
        table.add_row(label, *(_race_cell(row) for row in column))
    table.add_section()
    table.add_row("the injection alone", *(time_text(held["injection_seconds"]) for held in network["races"]))
    return table


def _race_cell(row: dict[str, Any]) -> str:
    if not row["reached"]:
        error = row["worst_error"]
        return f"not reached ({'diverged' if error is None else f'{error:.1e}'})"
    return f"{time_text(row['seconds'])}  {ratio_text(row['ratio'])}"


def _shares(networks: list[dict[str, Any]]) -> Table:
    table = Table(title="PeacemanRachford against the others, and against the machine")
    table.add_column("network")
    for held in networks[0]["races"]:
        table.add_column(f"torchdeq's best / ours, batch {held['batch']:,}", justify="right")
    last = networks[0]["races"][-1]["batch"]
    table.add_column(f"plain PyTorch / ours, batch {last:,}", justify="right")
    table.add_column(f"share of the sgemm rate, batch {last:,}", justify="right")
    for network in networks:
        races, sgemm = network["races"], network["sgemm"]
        table.add_row(
            network["name"],
            *(ratio_text(held["speedup"]) for held in races),
            ratio_text(races[-1]["speedup_plain"]),
            DASH if sgemm is None else f"{100 * sgemm['share']:.0f} % of {sgemm['sgemm_gflops']:.0f} GFLOP/s",
        )
    return table
