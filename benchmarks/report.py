"""How a run is shown and kept: a table for people, flat JSON for comparing."""

import json
import os
import platform
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path

import psutil
from rich.console import Console
from rich.table import Table

from benchmarks.case import Figure
from benchmarks.load import CLIENT_CPU_SHARE_LIMIT
from benchmarks.processes import Moment
from benchmarks.system import filesystem_of

# A machine that does other work measures that work too; the kernel's own share is below this.
QUIET_CORES = 0.15
READABLE_S = 1.0


@dataclass(frozen=True, slots=True)
class Machine:
    """Where and when a run took place; `load` is the average number of busy cores in the minute before it."""

    cpus: int
    memory_gb: float
    load: float
    filesystem: str
    python: str
    system: str
    taken_at: str

    @classmethod
    def now(cls) -> "Machine":
        """This machine as it is before the run."""
        return cls(
            cpus=psutil.cpu_count() or 1,
            memory_gb=round(psutil.virtual_memory().total / 2**30, 1),
            load=round(psutil.getloadavg()[0], 2),
            filesystem=filesystem_of(Path(tempfile.gettempdir())),
            python=platform.python_version(),
            system=f"{platform.system()} {platform.machine()}",
            taken_at=datetime.now(UTC).isoformat(timespec="seconds"),
        )


@dataclass(slots=True)
class Results:
    """What a run gave: figures by name, and why the cases without figures have none.

    `others` says how many cores everything that wasn't ours kept busy while a case ran, by the case's name.
    """

    machine: Machine
    figures: dict[str, Figure] = field(default_factory=dict)
    others: dict[str, float] = field(default_factory=dict)
    failed: dict[str, str] = field(default_factory=dict)
    skipped: dict[str, str] = field(default_factory=dict)

    def add_others(self, case: str, before: Moment, after: Moment) -> None:
        """Note what else ran between two readings; a short time says nothing, as processors count in 10 ms."""
        if after.at - before.at >= READABLE_S:
            self.others[case] = after.others_since(before)


def client_cpu_share(figures: Mapping[str, Figure]) -> Figure | None:
    """The largest share of a core that the load generator took in any measurement."""
    shares = [figure.client_cpu_share for figure in figures.values() if figure.client_cpu_share is not None]
    return Figure("client_cpu_share", max(shares), "cores", (), max(shares)) if shares else None


def show(console: Console, results: Results) -> None:
    """Print the table, and what makes a figure doubtful."""
    machine = results.machine
    table = Table(title="Scrip on this machine", title_justify="left", show_edge=False, pad_edge=False)
    table.add_column("figure", no_wrap=True)
    table.add_column("value", justify="right", no_wrap=True)
    table.add_column("unit", no_wrap=True)
    table.add_column("repetitions", justify="right", style="dim", no_wrap=True)
    table.add_column("client", justify="right", style="dim", no_wrap=True)
    table.add_column("", no_wrap=True)
    for figure in results.figures.values():
        table.add_row(
            figure.name,
            _number(figure.value),
            figure.unit,
            _spread(figure.spread),
            f"{figure.client_cpu_share:.2f}" if figure.client_cpu_share is not None else "",
            "" if figure.is_valid else "[red]INVALID[/]",
        )
    console.print(table)
    console.print(
        f"\n{machine.cpus} CPUs, {machine.memory_gb} GiB, {machine.system}, Python {machine.python}, data on "
        f"{machine.filesystem}; {machine.taken_at}. client: share of a core that the load generator took.",
        style="dim",
    )
    busy = {name: cores for name, cores in results.others.items() if cores > QUIET_CORES}
    if busy:
        listed = ", ".join(f"{name} {cores:.2f}" for name, cores in busy.items())
        console.print(
            f"The machine was not quiet: cores that other work kept busy: {listed}. Take figures as lower bounds.",
            style="yellow",
        )
    if any(not figure.is_valid for figure in results.figures.values()):
        console.print(
            f"INVALID: the load generator took more than {CLIENT_CPU_SHARE_LIMIT:.0%} of a core, so it may have "
            "measured itself.",
            style="red",
        )
    for title, reasons in (("skipped", results.skipped), ("FAILED", results.failed)):
        for name, reason in reasons.items():
            console.print(f"{title} {name}: {reason}", style="red" if title == "FAILED" else "dim", markup=False)


def save(path: Path, results: Results) -> None:
    """Write every figure under its name, with what one has to know about the run under `run`."""
    document = {
        **{figure.name: round(figure.value, 4) for figure in results.figures.values()},
        "run": {
            "taken_at": results.machine.taken_at,
            "cpus": results.machine.cpus,
            "memory_gb": results.machine.memory_gb,
            "load_before": results.machine.load,
            "filesystem": results.machine.filesystem,
            "python": results.machine.python,
            "system": results.machine.system,
            "other_cores": {name: round(cores, 2) for name, cores in results.others.items()},
            "invalid": [figure.name for figure in results.figures.values() if not figure.is_valid],
            "failed": results.failed,
            "skipped": results.skipped,
        },
    }
    scratch = path.with_suffix(".tmp")
    scratch.write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")
    os.replace(scratch, path)


def _number(value: float) -> str:
    if value >= 100:
        return f"{value:,.0f}"
    return f"{value:.1f}" if value >= 10 else f"{value:.2f}"


def _spread(values: Sequence[float]) -> str:
    return " ".join(_number(value) for value in values) if len(values) > 1 else ""
