"""The result of a run, drawn as tables for a terminal."""

from __future__ import annotations

from typing import Any

from rich.table import Table

__all__ = ["tables"]

DASH = "–"


def tables(result: dict[str, Any]) -> list[Table]:
    """Tables of what :func:`equipoise.bench.solve.run` returned, in reading order."""
    networks = result["networks"]
    return [
        *(_races(network, result) for network in networks),
        _shares(networks),
        _training(result["training"]),
        _scaling(result["scaling"]),
        _conditions(result),
    ]


def _races(network: dict[str, Any], result: dict[str, Any]) -> Table:
    condition = _number(network["condition"])
    table = Table(
        title=f"{network['name']}: n = {network['features']}, κ = {condition}",
        caption=f"a solve to a worst relative error of {result['goal']:g}, and its ratio to {result['reference']}'s",
    )
    table.add_column("solver")
    for race in network["races"]:
        table.add_column(f"batch {race['batch']:,}", justify="right")
    for column in zip(*(race["contenders"] for race in network["races"]), strict=True):
        name, family = column[0]["name"], column[0]["family"]
        label = name if family == "equipoise" else f"{family}: {name}"
        table.add_row(label, *(_race_cell(row) for row in column))
    table.add_section()
    table.add_row("the injection alone", *(_time(race["injection_seconds"]) for race in network["races"]))
    return table


def _race_cell(row: dict[str, Any]) -> str:
    if not row["reached"]:
        error = row["worst_error"]
        return f"not reached ({'diverged' if error is None else f'{error:.1e}'})"
    return f"{_time(row['seconds'])}  {_ratio(row['ratio'])}"


def _shares(networks: list[dict[str, Any]]) -> Table:
    table = Table(title="PeacemanRachford against the others, and against the machine")
    table.add_column("network")
    for race in networks[0]["races"]:
        table.add_column(f"torchdeq's best / ours, batch {race['batch']:,}", justify="right")
    last = networks[0]["races"][-1]["batch"]
    table.add_column(f"plain PyTorch / ours, batch {last:,}", justify="right")
    table.add_column(f"share of the sgemm rate, batch {last:,}", justify="right")
    for network in networks:
        races, sgemm = network["races"], network["sgemm"]
        table.add_row(
            network["name"],
            *(_ratio(race["speedup"]) for race in races),
            _ratio(races[-1]["speedup_plain"]),
            DASH if sgemm is None else f"{100 * sgemm['share']:.0f} % of {sgemm['sgemm_gflops']:.0f} GFLOP/s",
        )
    return table


def _training(step: dict[str, Any]) -> Table:
    table = Table(title=f"training step of 784–100–10, batch {step['batch']}, forward, backward and fused Adam")
    table.add_column("what")
    table.add_column("figure", justify="right")
    reached = "" if step["gradient_reached"] else "  not reached"
    tolerances = f"tol {step['tol']:g}, backward_tol {step['backward_tol']:g}"
    others = f"{step['gradient_error_worst']:.1e}; {step['gradient_error_together']:.1e}"
    rows = [
        ("monDEQ", _time(step["mondeq_seconds"])),
        ("explicit network", _time(step["explicit_seconds"])),
        ("monDEQ / explicit", _ratio(step["ratio"])),
        (f"gradient error (goal 1e-2) at {tolerances}", f"{step['gradient_error']:.1e}{reached}"),
        ("of the worst batch; of all together", others),
        ("the monDEQ's step in training.fit", _time(step["fit_seconds"])),
        ("of which Lightning, schedule and loader", _time(step["overhead_seconds"])),
        ("of which the loader, alone", _time(step["loader_seconds"])),
    ]
    for row in rows:
        table.add_row(*row)
    return table


def _scaling(rows: list[dict[str, Any]]) -> Table:
    table = Table(
        title="as the layer grows, each in a process of its own",
        caption="solve: first time, with the search for the step; then again. Memory: peak, of it before the work",
    )
    for name in ("n", "certify", "memory", "solve", "memory"):
        table.add_column(name, justify="right")
    for row in rows:
        certify, solve = row["certify"], row["solve"]
        both = DASH if "failure" in solve else f"{_time(solve['first_seconds'])}; {_time(solve['seconds'])}"
        table.add_row(
            f"{row['features']:,}",
            certify.get("failure") or _time(certify["seconds"]),
            _memory(certify),
            solve.get("failure") or both,
            _memory(solve),
        )
    return table


def _conditions(result: dict[str, Any]) -> Table:
    machine = result["machine"]
    table = Table(title="measured on", show_header=False)
    table.add_row("machine", f"{machine['processor']}, {machine['threads']} threads, float32 on the CPU")
    table.add_row("software", f"equipoise {result['equipoise']}, torch {machine['torch']}, {machine['system']}")
    table.add_row("inputs", result["data"])
    for note in result["notes"]:
        table.add_row("note", note)
    return table


def _memory(job: dict[str, Any]) -> str:
    if "failure" in job or job["peak_megabytes"] is None:
        return DASH
    return f"{job['peak_megabytes']:,.0f} MB, {job['baseline_megabytes']:,.0f}"


def _time(seconds: float | None) -> str:
    if seconds is None:
        return DASH
    if abs(seconds) < 1e-3:
        return f"{_number(seconds * 1e6)} µs"
    return f"{_number(seconds * 1e3)} ms" if abs(seconds) < 1 else f"{_number(seconds)} s"


def _ratio(value: float | None) -> str:
    return DASH if value is None else f"{_number(value)}×"


def _number(value: float | None) -> str:
    """Three digits."""
    if value is None:
        return DASH
    return f"{value:.2f}" if abs(value) < 10 else f"{value:.1f}" if abs(value) < 100 else f"{value:,.0f}"
