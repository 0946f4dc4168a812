"""The paths of LedgerVerification and NightlyVerification, each played through once, with canned activities.

The tests assert what happens on each path; `python -m tests.workflows.ledger_verification_scenarios VERSION` keeps the
histories for the replay test, as `tests.workflows.record` does for EventProcessing.
"""

import asyncio
import json
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any
from uuid import UUID

from temporalio import activity
from temporalio.client import WorkflowFailureError, WorkflowHandle
from temporalio.exceptions import ApplicationError
from temporalio.testing import WorkflowEnvironment
from temporalio.worker import Worker

from activities.ledger import OrganizationsPage, Progress, Stage, Verification
from domain.ids import new_id
from tests.workflows.record import HISTORIES
from tests.workflows.scenarios import time_skipping
from worker import WORKFLOWS
from workflows.ledger_verification import (
    LedgerVerification,
    NightlyInput,
    NightlyVerification,
    VerificationInput,
    workflow_id,
)

ENTRIES = 1_000
ENTRY_ID = UUID("01980000-0000-7000-8000-00000000000a")


def progress(checked: int, *, problem: str | None = None) -> Progress:
    """What an activity answers that has come to this entry, or has found something there."""
    return Progress(
        walk={"sequence": checked},
        entries_checked=checked,
        head_sequence=ENTRIES,
        finished=checked == ENTRIES or problem is not None,
        first_invalid_entry_id=None if problem is None else ENTRY_ID,
        problem=problem,
    )


@dataclass
class Ledgers:
    """Stands in for the activities. Each stage of an organization answers what `stages` says next, the last again and
    again; None makes it wait until it is cancelled. A stage that isn't said checks to the end.
    """

    organizations: Sequence[UUID] = ()
    stages: dict[UUID, list[Progress | Exception | None]] = field(default_factory=dict)
    begun: list[UUID] = field(default_factory=list)
    resumed_at: list[int] = field(default_factory=list)
    abandoned: list[UUID] = field(default_factory=list)
    waiting: asyncio.Event = field(default_factory=asyncio.Event)
    at_once: int = 0
    most_at_once: int = 0

    @activity.defn(name="begin_verification")
    async def begin_verification(self, request: Verification) -> Progress:
        """Note that it began."""
        self.begun.append(request.organization_id)
        return progress(0)

    @activity.defn(name="verify_entries")
    async def verify_entries(self, request: Stage) -> Progress:
        """Answer what is said."""
        self.resumed_at.append(request.walk["sequence"])
        self.at_once += 1
        self.most_at_once = max(self.most_at_once, self.at_once)
        try:
            return await self._answer(request.organization_id)
        finally:
            self.at_once -= 1

    @activity.defn(name="abandon_verification")
    async def abandon_verification(self, request: Verification) -> None:
        """Note that it was given up."""
        self.abandoned.append(request.organization_id)

    @activity.defn(name="list_organizations")
    async def list_organizations(self, request: OrganizationsPage) -> list[UUID]:
        """A page of the organizations."""
        return sorted(id_ for id_ in self.organizations if request.after is None or id_ > request.after)[
            : request.limit
        ]

    async def _answer(self, organization_id: UUID) -> Progress:
        left = self.stages.get(organization_id, [progress(ENTRIES)])
        step = left.pop(0) if len(left) > 1 else left[0]
        if isinstance(step, Exception):
            raise step
        if step is None:
            self.waiting.set()
            while True:
                activity.heartbeat()
                await asyncio.sleep(0.05)
        return step


@asynccontextmanager
async def serving(env: WorkflowEnvironment, ledgers: Ledgers, **worker: Any) -> AsyncIterator[str]:
    """A worker with the canned activities; the queue it serves."""
    queue = f"ledger-{new_id().hex}"
    async with Worker(
        env.client,
        task_queue=queue,
        workflows=WORKFLOWS,
        activities=[
            ledgers.begin_verification,
            ledgers.verify_entries,
            ledgers.abandon_verification,
            ledgers.list_organizations,
        ],
        **worker,
    ):
        yield queue


async def start(
    env: WorkflowEnvironment, queue: str, organization_id: UUID, walk: dict[str, Any] | None = None
) -> WorkflowHandle[Any, Progress]:
    """Start the verification of one ledger."""
    return await env.client.start_workflow(
        LedgerVerification.run,
        VerificationInput(organization_id, new_id(), walk),
        id=workflow_id(organization_id),
        task_queue=queue,
    )


async def start_night(env: WorkflowEnvironment, queue: str) -> WorkflowHandle[Any, NightlyInput]:
    """Start a night."""
    return await env.client.start_workflow(
        NightlyVerification.run, NightlyInput(searchable=False), id=f"night-{new_id()}", task_queue=queue
    )


@dataclass(frozen=True)
class Played:
    """A run that has ended, with its result or the error that ended it."""

    ledgers: Ledgers
    handle: WorkflowHandle[Any, Any]
    result: Any = None
    error: BaseException | None = None


async def ended(ledgers: Ledgers, handle: WorkflowHandle[Any, Any]) -> Played:
    """Wait for the run's end."""
    try:
        return Played(ledgers, handle, result=await handle.result())
    except WorkflowFailureError as failure:
        return Played(ledgers, handle, error=failure.cause)


async def _verify(
    env: WorkflowEnvironment, *stages: Progress | Exception, walk: dict[str, Any] | None = None
) -> Played:
    organization_id = new_id()
    ledgers = Ledgers(stages={organization_id: list(stages)})
    async with serving(env, ledgers) as queue:
        return await ended(ledgers, await start(env, queue, organization_id, walk))


async def _valid(env: WorkflowEnvironment) -> Played:
    return await _verify(env, progress(400), progress(800), progress(ENTRIES))


async def _invalid(env: WorkflowEnvironment) -> Played:
    return await _verify(env, progress(400), progress(650, problem="its content doesn't have its hash"))


async def _resumed(env: WorkflowEnvironment) -> Played:
    return await _verify(env, progress(ENTRIES), walk={"sequence": 400})


async def _repeated(env: WorkflowEnvironment) -> Played:
    return await _verify(env, ApplicationError("the database is away"), progress(ENTRIES))


async def _given_up(env: WorkflowEnvironment) -> Played:
    return await _verify(env, ApplicationError("no such organization", non_retryable=True))


async def _cancelled(env: WorkflowEnvironment) -> Played:
    organization_id = new_id()
    ledgers = Ledgers(stages={organization_id: [progress(400), None]})
    async with serving(env, ledgers) as queue:
        handle = await start(env, queue, organization_id)
        await ledgers.waiting.wait()
        await handle.cancel()
        return await ended(ledgers, handle)


async def _quiet_night(env: WorkflowEnvironment) -> Played:
    ledgers = Ledgers(organizations=[new_id() for _ in range(6)])
    async with serving(env, ledgers) as queue:
        return await ended(ledgers, await start_night(env, queue))


async def _bad_night(env: WorkflowEnvironment) -> Played:
    organizations = [new_id() for _ in range(4)]
    ledgers = Ledgers(
        organizations=organizations,
        stages={
            organizations[1]: [progress(7, problem="it has no postings")],
            organizations[2]: [ApplicationError("broken", non_retryable=True)],
        },
    )
    async with serving(env, ledgers) as queue:
        return await ended(ledgers, await start_night(env, queue))


async def _night_meets_a_verification(env: WorkflowEnvironment) -> Played:
    organization_id = new_id()
    ledgers = Ledgers(organizations=[organization_id, new_id()], stages={organization_id: [None]})
    async with serving(env, ledgers) as queue:
        running = await start(env, queue, organization_id)
        await ledgers.waiting.wait()
        played = await ended(ledgers, await start_night(env, queue))
        await running.cancel()
        await ended(ledgers, running)
        return played


async def _cancelled_night(env: WorkflowEnvironment) -> Played:
    organization_id = new_id()
    ledgers = Ledgers(organizations=[organization_id], stages={organization_id: [None]})
    async with serving(env, ledgers) as queue:
        handle = await start_night(env, queue)
        await ledgers.waiting.wait()
        await handle.cancel()
        return await ended(ledgers, handle)


SCENARIOS: dict[str, Callable[[WorkflowEnvironment], Awaitable[Played]]] = {
    "verifies_in_stages": _valid,
    "verifies_and_finds_a_broken_ledger": _invalid,
    "verifies_on_from_where_a_run_before_stopped": _resumed,
    "verifies_again_after_a_fault": _repeated,
    "verifies_and_gives_up": _given_up,
    "verifies_until_cancelled": _cancelled,
    "verifies_every_ledger_at_night": _quiet_night,
    "verifies_at_night_and_counts_what_failed": _bad_night,
    "verifies_at_night_beside_a_running_verification": _night_meets_a_verification,
    "verifies_at_night_until_cancelled": _cancelled_night,
}
"""Each path by its name."""


async def record(version: str) -> None:
    """Write `histories/<scenario>.<version>.json` for every scenario that has no such file yet."""
    async with time_skipping() as env:
        for name, play in SCENARIOS.items():
            path = HISTORIES / f"{name}.{version}.json"
            if not path.exists():
                played = await play(env)
                history = json.loads((await played.handle.fetch_history()).to_json())
                path.write_text(json.dumps(_without_traces(history), indent=2) + "\n")


def _without_traces(value: Any) -> Any:
    """`value` without stack traces: they name places of the machine on which it was recorded."""
    if isinstance(value, dict):
        return {name: _without_traces(member) for name, member in value.items() if name != "stackTrace"}
    return [_without_traces(item) for item in value] if isinstance(value, list) else value


if __name__ == "__main__":
    asyncio.run(record(version=sys.argv[1]))
