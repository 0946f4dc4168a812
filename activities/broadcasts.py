"""Activities of broadcasts: fan-outs to the participants of a program. Contract: tiers-and-automations.md B5, B7."""

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from uuid import UUID

from temporalio import activity

from activities.threads import ThreadDatabases
from db.session import Database, Transaction
from domain import automations, faults, limits
from domain.errors import Refusal
from domain.fan_outs import Batch, FanOut, cancel_executing, fan_out_batch

logger = logging.getLogger("scrip.broadcasts")

Wake = Callable[[UUID, UUID], None]
"""Tells the event processing of an organization's program that there may be events. Any thread may call it."""


@dataclass(frozen=True)
class FanOutRequest:
    """Whose fan-outs to work on."""

    organization_id: UUID
    program_id: UUID


@dataclass(frozen=True)
class FanOutProgress:
    """How far a fan-out under way has come: so many participants of `total`."""

    automation_id: UUID
    name: str
    processed: int
    total: int


@dataclass(frozen=True)
class FanOutReport:
    """What was done: `events` made, `finished` fan-outs ended.

    `under_way` is one that goes on; `more` says that there may be something to do at once. With `is_held_back` there
    is, but too many events of the program wait to be processed.
    """

    events: int
    finished: int
    under_way: FanOutProgress | None = None
    more: bool = False
    is_held_back: bool = False


@dataclass(frozen=True)
class CancelOrder:
    """Cancel this automation of the program; None for the fan-out that is under way."""

    organization_id: UUID
    program_id: UUID
    automation_id: UUID | None


class FanOutActivities:
    """Making the events of fan-outs. It runs in threads: a batch is computation, and heartbeats and workflow tasks
    must go on beside it.
    """

    def __init__(self, databases: ThreadDatabases, wake: Wake) -> None:
        self._databases = databases
        self._wake = wake

    # Without this a cancellation is thrown into the thread at any point, also between a write and its commit.
    @activity.defn(name="fan_out", no_thread_cancel_exception=True)
    def fan_out(self, request: FanOutRequest) -> FanOutReport:
        """Work on the program's fan-outs, batch after batch, a transaction each, for ten seconds at most.

        It returns as soon as the fan-out under way is cancelled by somebody. Raises what the database raises; Temporal
        repeats the activity, which goes on where the last committed batch ended.
        """
        return self._databases.run(lambda database: self._fan_out(database, request))

    async def _fan_out(self, database: Database, request: FanOutRequest) -> FanOutReport:
        ends_at = time.monotonic() + limits.FAN_OUT_S
        events = finished = 0
        under_way: FanOut | None = None
        while True:
            batch = await database.repeat(request.organization_id, lambda tx: fan_out_batch(tx, request.program_id))
            await faults.reach("fan_out.committed")
            was_cancelled = under_way is not None and _id(batch) != under_way.automation_id
            if batch.events:
                # For each batch: the first events are processed while later ones are still being made.
                self._wake(request.organization_id, request.program_id)
            events += batch.events
            activity.heartbeat(events)
            under_way = batch.fan_out if batch.fan_out is not None and batch.fan_out.status == "executing" else None
            finished += batch.fan_out is not None and under_way is None
            is_over = was_cancelled or time.monotonic() > ends_at or activity.is_cancelled()
            if batch.fan_out is None or batch.is_held_back or is_over:
                more = batch.fan_out is not None
                return FanOutReport(events, finished, _progress(under_way), more, batch.is_held_back)


class AutomationActivities:
    """What operators ask for. It only waits for the database, so it shares the worker's event loop."""

    def __init__(self, database: Database) -> None:
        self._database = database

    @activity.defn
    async def cancel_automation(self, order: CancelOrder) -> bool:
        """Cancel an automation, or the fan-out under way; whether there was something to cancel.

        Repeating it changes nothing. One that doesn't exist, or has ended, is only noted in the log.
        """

        async def work(tx: Transaction) -> bool:
            if order.automation_id is None:
                return await cancel_executing(tx, order.program_id) is not None
            await automations.cancel(tx, order.program_id, order.automation_id)
            return True

        try:
            return await self._database.repeat(order.organization_id, work)
        except Refusal as refusal:
            logger.warning("automation %s is not cancelled: %s", order.automation_id, refusal.message)
            return False


def _id(batch: Batch) -> UUID | None:
    return None if batch.fan_out is None else batch.fan_out.automation_id


def _progress(fan_out: FanOut | None) -> FanOutProgress | None:
    if fan_out is None:
        return None
    return FanOutProgress(fan_out.automation_id, fan_out.name, fan_out.processed, fan_out.total or 0)
