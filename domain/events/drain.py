"""Draining a program's queue: batch after batch until it has been dry for a moment.

While a drain promises to look for events by itself (the lane's `drained_until`), the API need not wake anybody. The
order of reading and clearing that promise is what makes it safe: an event is committed before the promise is read, and
the promise is withdrawn before the queue is read for the last time.
"""

import asyncio
import contextlib
import logging
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from datetime import datetime
from uuid import UUID

import psycopg
from psycopg.errors import UniqueViolation

from db.session import REPEATABLE, Database, DatabaseUnavailable
from domain import faults, limits
from domain.events.batch import BatchResult, News, mark_started, outlook, process_batch, withdraw_start
from domain.events.retries import RetryPolicy

logger = logging.getLogger("scrip.events")

# What is never an event's fault. A table, column or right that is missing (a migration that hasn't run yet) and a
# database in a wrong state would refuse every event alike: they stop the queue, they don't empty it.
TRANSIENT = (DatabaseUnavailable, *REPEATABLE, psycopg.ProgrammingError, psycopg.InternalError)


@dataclass(frozen=True, slots=True)
class DrainResult:
    """What a drain did, and when the program wants the next one: `next_due_at` None means not before a wake."""

    events: int
    completed: int
    failed: int
    next_due_at: datetime | None
    is_paused: bool


async def drain(
    database: Database,
    organization_id: UUID,
    program_id: UUID,
    retries: RetryPolicy,
    progress: Callable[[int], None],
    *,
    after_loss: bool = False,
    pace_s: Callable[[], float] = lambda: limits.DRAIN_POLL_MS / 1000,
    turns: AbstractContextManager[object] | None = None,
    tell: Callable[[News], None] = lambda news: None,
) -> DrainResult:
    """Process due events of a program for at most ten seconds; `progress` is told the events so far after each batch.

    `pace_s` says how long to wait, in seconds, before looking again at a queue that has just been emptied. `turns` is
    entered for each batch: drains in other threads share it, so that few batches at once hold locks and compute.
    `tell` gets what others are to be told of after a batch.

    `after_loss` says that the attempt before this one was lost: the first events are then taken one by one, each with
    a mark, so that one that brings its worker down is found and ends FAILED instead of holding up the rest.
    """
    queue = _Queue(database, organization_id, program_id, retries, progress, turns or nullcontext(), tell)
    if after_loss:
        queue.cautious_events = limits.BATCH_EVENTS
    ends_at = time.monotonic() + limits.DRAIN_LIMIT_S
    await _promise(database, organization_id, program_id, for_s=limits.DRAIN_LIMIT_S)
    await faults.reach("drain.promised")
    dry_since = time.monotonic()
    while time.monotonic() < ends_at:
        found = await queue.process()
        progress(queue.events)
        if found:
            dry_since = time.monotonic()
        elif (time.monotonic() - dry_since) * 1000 > limits.DRAIN_LINGER_MS:
            break
        # A full batch says that more is waiting; otherwise a moment lets the next one grow.
        if not queue.was_full:
            await asyncio.sleep(pace_s())
    await _promise(database, organization_id, program_id, for_s=None)
    await faults.reach("drain.withdrawn")
    await queue.process()
    ahead = await outlook(database, organization_id, program_id)
    return DrainResult(queue.events, queue.completed, queue.failed, ahead.next_due_at, ahead.is_paused)


class _Queue:
    """The batches of one drain: how large the next one is, and what to do with one that can't be processed."""

    def __init__(
        self,
        database: Database,
        organization_id: UUID,
        program_id: UUID,
        retries: RetryPolicy,
        progress: Callable[[int], None],
        turns: AbstractContextManager[object],
        tell: Callable[[News], None],
    ) -> None:
        self._progress = progress
        self._turns = turns
        self._tell = tell
        self._told_at = time.monotonic()
        self._database = database
        self._organization_id = organization_id
        self._program_id = program_id
        self._retries = retries
        self._limit = limits.BATCH_EVENTS
        self.cautious_events = 0
        self.was_full = False
        self.events = 0
        self.completed = 0
        self.failed = 0

    async def process(self) -> int:
        """Process one batch; how many events it had.

        Raises what is wrong with the database, for Temporal to repeat the drain: an outage is never charged to events.
        """
        if self.cautious_events > 0:
            self.cautious_events -= 1
            return await self._process_cautiously()
        limit = self._limit
        while True:
            started = time.monotonic()
            try:
                result = await self._batch(limit)
            except TRANSIENT:
                raise
            except Exception as error:
                # Something about these events themselves: halve until it is one event that can be told apart.
                logger.warning("a batch of %d events failed, halving it: %s", limit, error)
                # The next batch begins as small, too, and batches grow again from there.
                self._limit = limit = max(limit // 2, 1)
                if limit <= 1:
                    return await self._process_cautiously()
                continue
            self.was_full = result.events >= limit
            self._adapt(result.events, (time.monotonic() - started) * 1000)
            return self._count(result)

    async def _process_cautiously(self) -> int:
        """Process the next event alone, marked; what goes wrong is charged to that event and to no other."""
        begun = await mark_started(self._database, self._organization_id, self._program_id)
        if begun is None:
            self.was_full = False
            return 0
        if begun.starts > limits.LOST_STARTS:
            return await self._give_up(begun.event_id, f"processing brought its worker down {limits.LOST_STARTS} times")
        try:
            result = await self._batch(1, only=begun.event_id)
            if result.events == 0:
                # The queue has moved on, so this was no start.
                await withdraw_start(self._database, self._organization_id, begun.event_id)
            return self._count(result)
        except TRANSIENT as error:
            # A conflict that comes back for one event alone is no conflict with anybody else.
            if isinstance(error, UniqueViolation):
                return await self._give_up(begun.event_id, error)
            # The worker is alive, so this start is none of those that count.
            with contextlib.suppress(*TRANSIENT):
                await withdraw_start(self._database, self._organization_id, begun.event_id)
            raise
        except Exception as error:
            return await self._give_up(begun.event_id, error)

    async def _give_up(self, event_id: UUID, cause: Exception | str) -> int:
        """End this event FAILED: it can't be processed, whatever else is in its batch."""
        if isinstance(cause, Exception):
            logger.error("an event cannot be processed", exc_info=cause)
            cause = f"processing failed: {type(cause).__name__}"
        return self._count(await self._batch(1, poison=cause, only=event_id))

    async def _batch(self, limit: int, *, poison: str | None = None, only: UUID | None = None) -> BatchResult:
        return await process_batch(
            self._database,
            self._organization_id,
            self._program_id,
            limit,
            self._retries,
            poison,
            only,
            self._beat,
            self._turns,
        )

    def _beat(self) -> None:
        """Tell that the drain is alive, a batch of slow events included: once a second, as telling costs too."""
        if time.monotonic() - self._told_at > 1:
            self._told_at = time.monotonic()
            self._progress(self.events)

    def _count(self, result: BatchResult) -> int:
        if result.news is not None:
            self._tell(result.news)
        self.events += result.events
        self.completed += result.completed
        self.failed += result.failed
        return result.events

    def _adapt(self, events: int, elapsed_ms: float) -> None:
        """Take as many events next time as fit the time that direct operations may have to wait for a batch."""
        if elapsed_ms > limits.BATCH_TARGET_MS:
            self._limit = max(1, int(events * limits.BATCH_TARGET_MS / elapsed_ms))
        elif events >= self._limit:
            self._limit = min(limits.BATCH_EVENTS, self._limit * 2)


async def _promise(database: Database, organization_id: UUID, program_id: UUID, for_s: float | None) -> None:
    async with database.transaction(organization_id) as tx:
        await tx.execute(
            "update lane set drained_until = clock_timestamp() + make_interval(secs => %s)"
            " where organization_id = %s and program_id = %s",
            (for_s, organization_id, program_id),
        )


@dataclass(frozen=True, slots=True)
class Lane:
    """A program's queue as a waker sees it; `is_drained` when a drain will find what was committed before now."""

    program_name: str
    is_drained: bool


async def lane_of(database: Database, organization_id: UUID, program_id: UUID) -> Lane:
    """The lane of this program, as of now."""
    async with database.transaction(organization_id) as tx:
        cursor = await tx.execute(
            "select p.name, coalesce(l.drained_until > clock_timestamp(), false)"
            " from lane l join program p on p.organization_id = l.organization_id and p.id = l.program_id"
            " where l.organization_id = %s and l.program_id = %s",
            (organization_id, program_id),
        )
        row = await cursor.fetchone()
        assert row is not None, "every program has a lane"
        return Lane(*row)


async def programs_with_events_due_at(database: Database, instant: datetime) -> list[tuple[UUID, UUID]]:
    """(organization, program) of the queues, paused ones left out, that have an event which is due at `instant`."""
    rows = await database.system_rows(
        "select * from programs_with_due_events(%s, %s)", (instant, limits.PROGRAMS_PER_LOOK)
    )
    return [(organization_id, program_id) for organization_id, program_id in rows]
