"""`python -m benchmarks`: measure Scrip on this machine. docs/performance.md."""

import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Annotated

import httpx
import psycopg
import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from temporalio.service import RPCError

from benchmarks.case import HEADLINE, QUICK, Bench, Case, Sizes, Wrong
from benchmarks.cases import CASES
from benchmarks.load import LoadFailed
from benchmarks.processes import Moment
from benchmarks.report import Machine, Results, client_cpu_share, save, show
from benchmarks.rest import Rest
from benchmarks.system import System, SystemFailed, attach, fresh_system
from benchmarks.workload import make_population

LATEST = Path(__file__).parent / "latest.json"
WIDTH_IN_FILES = 120
FAILURES = (LoadFailed, Wrong, httpx.HTTPError, psycopg.Error, RPCError, RuntimeError, OSError)

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode="rich")


@app.command(epilog="Cases: " + ", ".join(f"{case.name}{' (--full)' if case.is_full else ''}" for case in CASES))
def measure(
    quick: Annotated[bool, typer.Option("--quick", help="Half a minute: does it all work? Its figures say little.")] = (
        False
    ),
    full: Annotated[bool, typer.Option("--full", help="Also the long cases; plan for half an hour.")] = False,
    case: Annotated[
        list[str] | None, typer.Option("--case", help="Only this case and those it builds on; can be repeated.")
    ] = None,
    against: Annotated[
        str | None,
        typer.Option(
            metavar="URL",
            help="Measure a system that is up, such as http://127.0.0.1:8080, without what only its servers can tell. "
            "It creates programs, participants and ledger entries there: never in an organization that matters.",
        ),
    ] = None,
    key: Annotated[str | None, typer.Option(envvar="SCRIP_API_KEY", help="The API key for --against.")] = None,
    output: Annotated[
        Path, typer.Option(help="Where the figures go, as flat JSON.", show_default="benchmarks/latest.json")
    ] = LATEST,
) -> None:
    """Measure Scrip on this machine, about five minutes.

    It starts a fresh system on free ports in a temporary directory, sends it a fixed workload through the public API
    from a process of its own, measures two baselines on the same servers, and stops and removes everything.

    The workload: 1,000 participants; events of 8 fields; five rules, of which two credit and one counts on every
    event. "Completed" runs from the first request to the last event COMPLETED. A figure in whose run the load
    generator took more than 40% of a core is marked INVALID. Throughputs are the median of three repetitions.

    Use a quiet machine: what else runs is measured too. Status 0 when every case gave its figures.
    """
    if against is not None and not key:
        raise typer.BadParameter("--against needs --key, or SCRIP_API_KEY in the environment")
    unknown = set(case or ()) - {known.name for known in CASES}
    if unknown:
        raise typer.BadParameter(f"unknown case: {', '.join(sorted(unknown))}")
    if full and quick:
        raise typer.BadParameter("--full and --quick exclude each other")
    signal.signal(signal.SIGTERM, _leave)
    cases = _selected(case, full=full)
    console = Console(soft_wrap=True)
    if not console.is_terminal:
        console = Console(soft_wrap=True, width=WIDTH_IN_FILES)
    results = Results(Machine.now())
    try:
        with _system(against, key) as system:
            _run(system, cases, QUICK if quick else HEADLINE, results)
    except (SystemFailed, ValueError, *FAILURES) as error:
        console.print(str(error), style="red", markup=False)
        raise typer.Exit(1) from None
    _finish(console, results, output)
    raise typer.Exit(1 if results.failed else 0)


def _selected(names: list[str] | None, *, full: bool) -> list[Case]:
    if not names:
        return [case for case in CASES if full or not case.is_full]
    wanted = set(names)
    for case in reversed(CASES):
        if case.name in wanted:
            wanted |= set(case.after)
    return [case for case in CASES if case.name in wanted]


@contextmanager
def _system(against: str | None, key: str | None) -> Iterator[System]:
    if against is not None and key is not None:
        yield attach(against, key)
        return
    with fresh_system() as system:
        yield system


def _run(system: System, cases: list[Case], sizes: Sizes, results: Results) -> None:
    columns = (
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
    )
    rest = Rest(system.endpoint)
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("Creating participants", total=len(cases))
        bench = Bench(system, rest, sizes, make_population(system.endpoint))
        bench.figures = results.figures
        for case in cases:
            progress.update(task, description=case.title)
            before = Moment.now()
            _run_case(case, bench, results)
            results.add_others(case.name, before, Moment.now())
            progress.advance(task)
    rest.close()


def _run_case(case: Case, bench: Bench, results: Results) -> None:
    missing = [name for name in case.after if name in results.failed or name in results.skipped]
    if case.needs_servers and bench.system.servers is None:
        results.skipped[case.name] = "needs the servers behind the API"
    elif missing:
        results.skipped[case.name] = f"needs {', '.join(missing)}"
    else:
        try:
            figures = list(case.run(bench))
        except FAILURES as error:
            results.failed[case.name] = f"{type(error).__name__}: {error}"
            return
        assert tuple(figure.name for figure in figures) == case.yields, f"{case.name} does not yield what it says"
        results.figures.update({figure.name: figure for figure in figures})


def _finish(console: Console, results: Results, output: Path) -> None:
    share = client_cpu_share(results.figures)
    if share is not None:
        results.figures[share.name] = share
    show(console, results)
    save(output, results)
    console.print(f"\nWritten to {output}", style="dim")


def _leave(number: int, frame: FrameType | None) -> None:
    # As an exception, so that everything we started is stopped on the way out.
    sys.exit(128 + number)


if __name__ == "__main__":
    app()
