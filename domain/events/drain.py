"""Draining a program's queue: batch after batch until it has been dry for a moment.

While a drain promises to look for events by itself (the lane's `drained_until`), the API need not wake anybody. The
order of reading and clearing that promise is what makes it safe: an event is committed before the promise is read, and
the promise is withdrawn before the queue is read for the last time.
"""

import asyncio
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime, timedelta
from uuid import UUID

from db.session import Database
from domain import limits
from domain.events.batch import BatchResult, BatchTooWide, next_due, process_batch
from domain.events.retries import RetryPolicy


@dataclass(frozen=True, slots=True)
class DrainResult:
    """What a drain did, and when the program wants the next one: `next_due_at` None means not before a wake."""

    events: int
    completed: int
    failed: int
    next_due_at: datetime | None


async def drain(
    database: Database,
    organization_id: UUID,
    program_id: UUID,
    retries: RetryPolicy,
    progress: Callable[[int], None],
    first_limit: int = limits.BATCH_EVENTS,
) -> DrainResult:
    """Process due events of a program for at most ten seconds; `progress` is told the events so far after each batch.

    `first_limit` bounds the size of batches: an attempt that follows a lost one works in smaller steps.
    """
    totals = _Totals()
    size = _BatchSize(first_limit)
    ends_at = time.monotonic() + limits.DRAIN_LIMIT_S
    await _promise(database, organization_id, program_id, for_s=limits.DRAIN_LIMIT_S)
    dry_since = time.monotonic()
    while time.monotonic() < ends_at:
        result = await _one_batch(database, organization_id, program_id, size, retries)
        totals.add(result)
        progress(totals.events)
        if result.events:
            dry_since = time.monotonic()
        elif (time.monotonic() - dry_since) * 1000 > limits.DRAIN_LINGER_MS:
            break
        else:
            await asyncio.sleep(limits.DRAIN_POLL_MS / 1000)
    await _promise(database, organization_id, program_id, for_s=None)
    totals.add(await _one_batch(database, organization_id, program_id, size, retries))
    due = await next_due(database, organization_id, program_id)
    return DrainResult(totals.events, totals.completed, totals.failed, due)


@dataclass(slots=True)
class _Totals:
    events: int = 0
    completed: int = 0
    failed: int = 0

    def add(self, result: BatchResult) -> None:
        self.events += result.events
        self.completed += result.completed
        self.failed += result.failed


class _BatchSize:
    """How many events the next batch takes: as many as fit the time that direct operations may have to wait."""

    def __init__(self, most: int) -> None:
        self.most = most
        self.events = most

    def adapt(self, events: int, elapsed_ms: float) -> None:
        """Learn from a batch of `events` that took `elapsed_ms`."""
        if elapsed_ms > limits.BATCH_TARGET_MS:
            self.events = max(1, int(events * limits.BATCH_TARGET_MS / elapsed_ms))
        elif events >= self.events:
            self.events = min(self.most, self.events * 2)

    def halve(self) -> None:
        """Try again with half as many."""
        self.events = max(1, self.events // 2)


async def _one_batch(
    database: Database, organization_id: UUID, program_id: UUID, size: _BatchSize, retries: RetryPolicy
) -> BatchResult:
    while True:
        started = time.monotonic()
        try:
            result = await process_batch(database, organization_id, program_id, size.events, retries)
        except BatchTooWide:
            if size.events == 1:
                raise
            size.halve()
            continue
        size.adapt(result.events, (time.monotonic() - started) * 1000)
        return result


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


async def programs_with_due_events(database: Database) -> list[tuple[UUID, UUID]]:
    """(organization, program) of queues with an event that has been due for more than a second: lost wakes."""
    older_than = database.clock() - timedelta(seconds=limits.LOST_WAKE_AGE_S)
    rows = await database.system_rows("select * from programs_with_due_events(%s, 1000)", (older_than,))
    return [(organization_id, program_id) for organization_id, program_id in rows]
