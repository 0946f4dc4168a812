"""`python -m drills`: break a running Scrip on purpose and prove that nothing happened. docs/drills.md."""

import asyncio
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Table

from drills.case import Case, Finding, Sizes
from drills.catalog import DRILLS
from drills.platform import Platform, fresh_platform

WIDTH_IN_FILES = 140

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode="rich")


@dataclass(frozen=True, slots=True)
class Result:
    """What a case showed: a finding, or what was broken."""

    case: Case
    took_s: float
    finding: Finding | None = None
    problem: str | None = None


@app.command(epilog="Drills: " + ", ".join(drill.name for drill in DRILLS) + ". `--list` says what each of them does.")
def drill(
    only: Annotated[
        list[str] | None,
        typer.Option("--only", metavar="NAME", help="Only this drill, or this case of one; can be repeated."),
    ] = None,
    list_only: Annotated[bool, typer.Option("--list", help="Name the drills and their cases, and stop.")] = False,
    seconds: Annotated[float, typer.Option(min=1, help="How long the contention drill keeps up full load.")] = (
        Sizes().contention_s
    ),
) -> None:
    """Break a running Scrip on purpose and prove that nothing was lost, doubled or reordered; about half an hour.

    Each drill starts a platform of its own on free ports in a temporary directory: Postgres, Temporal, the API and the
    worker as separate processes. It sends events through the public API with a client that repeats what was not
    answered with the same idempotency keys, and meanwhile kills processes with kill -9, lets them hang, or takes
    Temporal's state away. Nobody helps: what died is started again as a supervisor would, and that is all.

    Afterwards the ledger, the state and every event's outcome are compared with what must have come of the accepted
    events: each exactly once, those of a participant in order, nothing charged to an event that was no fault of its
    own. Then the whole ledger is checked, hash chain and running balances included, twice: by the tests' invariants
    and by `scrip verify`.

    Status 0 when everything held, 1 otherwise.
    """
    console = Console(soft_wrap=True)
    if not console.is_terminal:
        console = Console(soft_wrap=True, width=WIDTH_IN_FILES)
    if list_only:
        _show_drills(console)
        return
    known = {name for drill in DRILLS for name in (drill.name, *(case.name for case in drill.cases))}
    if unknown := set(only or ()) - known:
        raise typer.BadParameter(f"no such drill: {', '.join(sorted(unknown))}; see --list", param_hint="--only")
    signal.signal(signal.SIGTERM, _leave)
    results = asyncio.run(_run(set(only or known), replace(Sizes(), contention_s=seconds), console))
    _show(console, results)
    raise typer.Exit(1 if any(result.problem for result in results) else 0)


async def _run(wanted: set[str], sizes: Sizes, console: Console) -> list[Result]:
    chosen = [[case for case in drill.cases if drill.name in wanted or case.name in wanted] for drill in DRILLS]
    columns = (
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("", total=sum(map(len, chosen)))
        results: list[Result] = []

        def say(case: Case, what: str) -> None:
            progress.update(task, description=f"[bold]{case.name}[/] {what}")

        for cases in chosen:
            async for result in _run_cases(cases, sizes, say):
                results.append(result)
                progress.advance(task)
                if not console.is_terminal:
                    console.print(_line(result), markup=False)
    return results


async def _run_cases(cases: Sequence[Case], sizes: Sizes, say: Callable[[Case, str], None]) -> AsyncIterator[Result]:
    """Run the cases of one drill on one platform; one that breaks it leaves a new platform to those after it."""
    async with AsyncExitStack() as stack:
        platform: Platform | None = None
        for case in cases:
            begun = time.monotonic()
            try:
                if platform is None:
                    say(case, "starting Postgres and Temporal")
                    platform = await stack.enter_async_context(fresh_platform())
                finding = await case.run(platform, sizes, partial(say, case))
                result = Result(case, time.monotonic() - begun, finding)
            except Exception as error:
                problem = str(_first(error)) or type(_first(error)).__name__
                if platform is not None:
                    problem += f"; the logs are in {_keep_logs(platform)}"
                result = Result(case, time.monotonic() - begun, problem=problem)
                await stack.aclose()
                platform = None
            yield result


def _first(error: BaseException) -> BaseException:
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return error


def _keep_logs(platform: Platform) -> Path:
    kept = Path(tempfile.mkdtemp(prefix="scrip-drill-failed-"))
    shutil.copytree(platform.logs, kept, dirs_exist_ok=True)
    return kept


def _show_drills(console: Console) -> None:
    for drill in DRILLS:
        console.print(f"[bold]{drill.name}[/]  {drill.title}")
        if len(drill.cases) > 1:
            for case in drill.cases:
                console.print(f"    {case.name}", markup=False)


def _show(console: Console, results: Sequence[Result]) -> None:
    table = Table(title="Drills", title_justify="left", show_edge=False, pad_edge=False)
    for name in ("drill", "events", "faults", "recovered in"):
        table.add_column(name, justify="left" if name == "drill" else "right", no_wrap=True)
    table.add_column("outcome")
    table.add_column("", style="dim")
    for result in results:
        table.add_row(*_cells(result), style="red" if result.problem else None)
    console.print(table)
    broken = [result for result in results if result.problem]
    if broken:
        console.print(f"\n{len(broken)} of {len(results)} did not hold.", style="red")
        for result in broken:
            console.print(f"{result.case.name}: {result.problem}", markup=False)
    else:
        console.print(f"\nAll {len(results)} held.")


def _cells(result: Result) -> tuple[str, ...]:
    found = result.finding
    if found is None:
        return (result.case.name, "", "", "", "BROKEN", "see below")
    recovered = f"{found.recovered_s:.1f} s" if found.recovered_s is not None else ""
    return (result.case.name, f"{found.events:,}", str(found.faults), recovered, "held", found.note)


def _line(result: Result) -> str:
    return "  ".join([f"{result.took_s:5.0f} s", *filter(None, _cells(result)), result.problem or ""]).rstrip()


def _leave(number: int, frame: FrameType | None) -> None:
    # As an exception, so that everything we started is stopped on the way out.
    sys.exit(128 + number)


if __name__ == "__main__":
    app()
