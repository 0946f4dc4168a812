"""Activities of event processing. Contract: rules-and-events.md 7."""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from uuid import UUID

from temporalio import activity

from activities.threads import ThreadDatabases
from db.session import Database
from domain import limits
from domain.events.batch import News
from domain.events.control import set_paused
from domain.events.drain import drain
from domain.events.retries import RetryPolicy


@dataclass(frozen=True)
class DrainRequest:
    """Which queue to drain."""

    organization_id: UUID
    program_id: UUID


@dataclass(frozen=True)
class DrainReport:
    """What was done, and when the next event falls due; None means not before somebody wakes the workflow."""

    events: int
    completed: int
    failed: int
    next_due_at: datetime | None
    is_paused: bool = False


@dataclass(frozen=True)
class PauseRequest:
    """Whether a program's events are to be processed."""

    organization_id: UUID
    program_id: UUID
    paused: bool


class EventActivities:
    """The draining activity and what it needs. It runs in a thread: applying events is computation, and heartbeats and
    workflow tasks must go on beside it.
    """

    def __init__(self, databases: ThreadDatabases, retries: RetryPolicy, tell: Callable[[News], None]) -> None:
        """`tell` gets, in any thread, what other workflows are to be told of after a batch; it returns at once."""
        self._databases = databases
        self._retries = retries
        self._tell = tell
        self._turns = threading.Semaphore(limits.BATCHES_AT_ONCE)
        self._drains = 0
        self._drains_lock = threading.Lock()

    # Without this a cancellation (a terminated workflow, a Temporal that forgot it) is thrown into the thread at any
    # point, also in the middle of an event, which would then look as if it couldn't be processed.
    @activity.defn(no_thread_cancel_exception=True)
    def drain_events(self, request: DrainRequest) -> DrainReport:
        """Process the program's due events until its queue has been dry for a moment, for at most ten seconds.

        An attempt that follows a lost one begins with one event at a time, so that an event that brings the worker down
        is found. Raises what the database raises; Temporal repeats the activity.
        """
        with self._counted():
            return self._databases.run(lambda database: self._drain(database, request))

    @activity.defn(no_thread_cancel_exception=True)
    def set_processing_paused(self, request: PauseRequest) -> None:
        """Stop or resume the processing of a program's events. Repeating it changes nothing."""
        self._databases.run(lambda database: self._set_paused(database, request))

    async def _drain(self, database: Database, request: DrainRequest) -> DrainReport:
        result = await drain(
            database,
            request.organization_id,
            request.program_id,
            self._retries,
            activity.heartbeat,
            after_loss=activity.info().attempt > 1,
            pace_s=self._pace_s,
            turns=self._turns,
            tell=self._tell,
        )
        return DrainReport(result.events, result.completed, result.failed, result.next_due_at, result.is_paused)

    async def _set_paused(self, database: Database, request: PauseRequest) -> None:
        async with database.transaction(request.organization_id) as tx:
            await set_paused(tx, request.program_id, paused=request.paused)

    @contextmanager
    def _counted(self) -> Iterator[None]:
        with self._drains_lock:
            self._drains += 1
        try:
            yield
        finally:
            with self._drains_lock:
                self._drains -= 1

    def _pace_s(self) -> float:
        """Looking at queues costs the same however many programs this worker drains: each looks the more rarely."""
        return limits.DRAIN_POLL_MS / 1000 * max(1.0, self._drains / limits.DRAINS_AT_FULL_PACE)
