"""`scrip demo`: send three months of card purchases to a running system and show what became of them."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Iterator
from dataclasses import dataclass
from decimal import Decimal
from itertools import chain, islice
from pathlib import Path
from typing import Any, TypeVar

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn
from rich.table import Table

from demo import card_program
from demo.api_client import ApiClient
from demo.make_purchases import Purchase, read_purchases
from demo.problems import DemoProblem
from embedded.datadir import serving
from embedded.files import read_json_object
from embedded.problems import StartupProblem

Item = TypeVar("Item")
Result = TypeVar("Result")

BATCH = 100
STREAMS = 4
TOP = 10
POLL_S = 0.2
PATIENCE_S = 60.0
ERRORS_SHOWN = 3
# What the API checks in one request: the whole chain up to this length, else this many of the newest entries.
VERIFY_LIMIT = 100_000
INTEGRITY_WINDOW = 10_000
UNFINISHED = ("RECEIVED", "PENDING", "PROCESSING")


@dataclass(frozen=True, slots=True)
class Connection:
    """Where the system is, and the key to it."""

    api_url: str
    api_key: str


@dataclass(frozen=True, slots=True)
class CardProgram:
    """The demo's program as it exists in the system; `rules` are the API's, in their order."""

    program_id: str
    asset_id: str
    rules: list[dict[str, Any]]


@dataclass(frozen=True, slots=True)
class Outcome:
    """What the demo found in the end; `rule_hits` by rule name, `balances` by cardholder, both complete."""

    rule_hits: dict[str, int]
    balances: dict[str, Decimal]
    failed: list[str]
    verification: dict[str, Any]
    added: bool


def demo_command(
    *,
    api_url: str | None = None,
    api_key: str | None = None,
    ready_file: Path | None = None,
    data_dir: Path = Path(".scrip"),
    console: Console | None = None,
) -> int:
    """Run the demo and return the exit status of the command: 0, or 1 after a message that says what to do.

    The system is the one that `api_url` and `api_key` name, else the one of `ready_file`, else the one that `scrip up`
    runs on `data_dir`. Each of the two options replaces its part of what a file says.
    """
    console = console or Console(highlight=False)
    try:
        connection = find_system(api_url, api_key, ready_file, data_dir)
        outcome = asyncio.run(run_demo(connection, console))
    except (DemoProblem, StartupProblem) as problem:
        Console(stderr=True, highlight=False, soft_wrap=True).print(str(problem), markup=False)
        return 1
    return 0 if outcome.verification["valid"] and not outcome.failed else 1


def find_system(api_url: str | None, api_key: str | None, ready_file: Path | None, data_dir: Path) -> Connection:
    """Where the system is. Raises DemoProblem when nobody says so, StartupProblem when a file is damaged."""
    if api_url is not None and api_key is not None:
        return Connection(api_url, api_key)
    found = read_json_object(ready_file) if ready_file is not None else serving(data_dir)
    if found is None:
        where = (
            f"{ready_file} does not exist" if ready_file is not None else f"{data_dir} says nothing of a running one"
        )
        raise DemoProblem(
            f"Scrip is not running here ({where}). Start it with `make run` in another terminal, "
            "or name a running one with --api-url and --api-key."
        )
    return Connection(api_url or str(found["api_url"]), api_key or str(found["api_key"]))


async def run_demo(connection: Connection, console: Console) -> Outcome:
    """Set the program up, send every purchase, wait until all are processed, and show the result on `console`."""
    async with ApiClient(connection.api_url, connection.api_key) as api:
        card = await set_up(api)
        console.print(f"[bold]{card_program.PROGRAM_NAME}[/] at {connection.api_url}\nprogram {card.program_id}")
        before = await _newest_entry(api, card)
        with _progress(console) as progress:
            await _send_everything(api, card, read_purchases(), progress)
            hits = await _count_hits(api, card, progress)
            balances = await _read_balances(api, card, progress)
        outcome = Outcome(
            rule_hits=hits,
            balances=balances,
            failed=[str(event["error_message"]) async for event in _failed_events(api, card)],
            verification=await _verify(api),
            added=await _newest_entry(api, card) != before,
        )
    show(outcome, console)
    return outcome


async def set_up(api: ApiClient) -> CardProgram:
    """Find the demo's program, asset and rules, and make what is missing."""
    program_id = await _find_or_make(
        api,
        "/programs",
        {"search": card_program.PROGRAM_NAME},
        lambda found: bool(found["name"] == card_program.PROGRAM_NAME),
        card_program.program,
    )
    asset_id = await _find_or_make(
        api,
        "/assets",
        {"search": card_program.ASSET_SYMBOL},
        lambda found: bool(found["symbol"] == card_program.ASSET_SYMBOL),
        lambda: card_program.asset(program_id),
    )
    existing = {rule["name"] async for rule in api.items("/rules", program_id=program_id)}
    for rule in card_program.rules(program_id, asset_id):
        if rule["name"] not in existing:
            await api.post("/rules", rule)
    return CardProgram(program_id, asset_id, [rule async for rule in api.items("/rules", program_id=program_id)])


async def _find_or_make(
    api: ApiClient,
    path: str,
    query: dict[str, str | int],
    matches: Callable[[dict[str, Any]], bool],
    make: Callable[[], dict[str, Any]],
) -> str:
    async for found in api.items(path, **query):
        if matches(found):
            return str(found["id"])
    return str((await api.post(path, make()))["id"])


# --- Sending -----------------------------------------------------------------------------------------------------


async def _send_everything(api: ApiClient, card: CardProgram, purchases: list[Purchase], progress: Progress) -> None:
    """Send every purchase and wait until all of them have been processed."""
    streams = [list(stream) for stream in _streams(card.program_id, purchases)]
    total = sum(len(stream) for stream in streams)
    sent = progress.add_task("events sent", total=total)
    completed = progress.add_task("events completed", total=total)
    problem: BaseException | None = None
    try:
        async with asyncio.TaskGroup() as group:
            for stream in streams:
                group.create_task(_send(api, stream, progress, sent))
            group.create_task(_watch(api, card, progress, sent, completed))
    except* DemoProblem as problems:
        problem = problems.exceptions[0]
    if problem is not None:
        raise problem


def _streams(program_id: str, purchases: list[Purchase]) -> Iterator[Iterator[str]]:
    """The events in a few streams that can be sent side by side.

    Events of one participant take effect in the order in which they were accepted, so a cardholder's events all go
    through one stream, one batch after the other.
    """
    by_cardholder: dict[str, list[Purchase]] = {}
    for purchase in purchases:
        by_cardholder.setdefault(purchase.cardholder, []).append(purchase)
    histories = list(by_cardholder.values())
    for first in range(STREAMS):
        yield chain.from_iterable(card_program.events_of(program_id, one) for one in histories[first::STREAMS])


async def _send(api: ApiClient, events: list[str], progress: Progress, task: TaskID) -> None:
    for batch in _batches(events):
        answer = await api.post("/events/batch", '{"events":[' + ",".join(batch) + "]}")
        refused = [result["error"] for result in answer["results"] if result["status"] == "error"]
        if refused:
            raise DemoProblem(f"{len(refused)} of {len(batch)} events were refused; the first: {refused[0]}")
        progress.advance(task, len(batch))


def _batches(events: Iterable[str]) -> Iterator[list[str]]:
    remaining = iter(events)
    while batch := list(islice(remaining, BATCH)):
        yield batch


async def _watch(api: ApiClient, card: CardProgram, progress: Progress, sent: TaskID, completed: TaskID) -> None:
    """Show how many of the events sent have been processed, until all are. Raises DemoProblem when nothing moves."""
    last, waited = 0.0, 0.0
    while not progress.tasks[completed].finished:
        await asyncio.sleep(POLL_S)
        accepted = progress.tasks[sent].completed
        done = accepted - await _count_unfinished(api, card)
        if done > last:
            progress.update(completed, completed=done)
            last, waited = done, 0.0
        waited += POLL_S
        if waited > PATIENCE_S:
            raise DemoProblem(
                f"{accepted - last:.0f} events are accepted and wait, but for {PATIENCE_S:.0f} seconds none was "
                "processed. Are the worker and Temporal running? /readyz and the Temporal UI show it."
            )


async def _count_unfinished(api: ApiClient, card: CardProgram) -> int:
    # One after the other and in the order in which an event passes through them, so that none slips through between.
    return sum([await _count(api, "/events", program_id=card.program_id, status=status) for status in UNFINISHED])


async def _count(api: ApiClient, path: str, **query: str) -> int:
    return sum([len(page) async for page in api.pages(path, **query)])


# --- Results -----------------------------------------------------------------------------------------------------


async def _count_hits(api: ApiClient, card: CardProgram, progress: Progress) -> dict[str, int]:
    """How many events each rule matched, by rule name, in the rules' order."""

    async def hits(rule: dict[str, Any]) -> int:
        return await _count(api, "/events", program_id=card.program_id, rule_id=str(rule["id"]))

    counts = await _all(hits, card.rules, progress, "rules counted")
    return {str(rule["name"]): count for rule, count in zip(card.rules, counts, strict=True)}


async def _read_balances(api: ApiClient, card: CardProgram, progress: Progress) -> dict[str, Decimal]:
    """The cashback of every cardholder, by its external id, largest first."""

    async def balance(participant: dict[str, Any]) -> Decimal:
        answer = await api.get(f"/participants/{participant['id']}/balances", asset_id=card.asset_id)
        return sum((Decimal(row["available"]) for row in answer["data"]), Decimal(0))

    cardholders = [found async for found in api.items("/participants", program_id=card.program_id)]
    amounts = await _all(balance, cardholders, progress, "balances read")
    pairs = [(str(found["external_id"]), amount) for found, amount in zip(cardholders, amounts, strict=True)]
    return dict(sorted(pairs, key=lambda pair: (-pair[1], pair[0])))


async def _all(
    ask: Callable[[Item], Awaitable[Result]], items: list[Item], progress: Progress, label: str
) -> list[Result]:
    """What `ask` says of every item, a few at a time."""
    task = progress.add_task(label, total=len(items))
    places = asyncio.Semaphore(STREAMS)

    async def one(item: Item) -> Result:
        async with places:
            result = await ask(item)
        progress.advance(task)
        return result

    return await asyncio.gather(*(one(item) for item in items))


async def _failed_events(api: ApiClient, card: CardProgram) -> AsyncIterator[dict[str, Any]]:
    async for event in api.items("/events", program_id=card.program_id, status="FAILED"):
        yield event


async def _verify(api: ApiClient) -> dict[str, Any]:
    """The ledger's own check: of all of it, or of its newest entries where that is too much for one request."""
    newest = await api.get("/reports/integrity", window=INTEGRITY_WINDOW)
    return newest if newest["head_sequence"] > VERIFY_LIMIT else await api.get("/ledger/verify")


async def _newest_entry(api: ApiClient, card: CardProgram) -> str | None:
    """The id of the program's newest journal entry."""
    newest = (await api.get("/journal-entries", program_id=card.program_id, limit=1))["data"]
    return str(newest[0]["id"]) if newest else None


def show(outcome: Outcome, console: Console) -> None:
    """Print the outcome: top balances, how often each rule matched, and whether the ledger holds."""
    top = Table("Cardholder", "Cashback", title=f"Top {TOP} of {len(outcome.balances)} cardholders", title_style="bold")
    top.columns[1].justify = "right"
    for cardholder, amount in islice(outcome.balances.items(), TOP):
        top.add_row(cardholder, f"{amount:,} USD")
    top.add_section()
    top.add_row("all of them", f"{sum(outcome.balances.values()):,} USD")
    console.print(top)

    rules = Table("Rule", "Events", title="What the rules did", title_style="bold")
    rules.columns[1].justify = "right"
    for name, count in outcome.rule_hits.items():
        rules.add_row(name, f"{count:,}")
    console.print(rules)

    if outcome.failed:
        console.print(f"[red]{len(outcome.failed):,} events FAILED[/]:")
        for message in outcome.failed[:ERRORS_SHOWN]:
            console.print(f"  {message}", markup=False)
    if not outcome.added:
        console.print("All of this was there before: the same events sent again add nothing.")
    _show_verification(outcome.verification, console)


def _show_verification(verification: dict[str, Any], console: Console) -> None:
    if not verification["valid"]:
        entry = verification["first_invalid_entry_id"]
        console.print(f"[red]The ledger does NOT verify[/]: {verification.get('problem')} (entry {entry})")
        return
    checked, length = verification["entries_checked"], verification["head_sequence"]
    if checked == length:
        what = f"all {checked:,} journal entries from the first one on, every hash, every sum and every balance."
    else:
        what = f"the newest {checked:,} of {length:,} journal entries; `scrip verify` checks all of them."
    console.print(f"[green]The ledger verifies[/]: {what}")
    console.print(f"Head of the hash chain: {verification['head_hash']}", soft_wrap=True)


def _progress(console: Console) -> Progress:
    return Progress(
        TextColumn("{task.description:<17}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), console=console
    )
