"""Activities of upkeep: over all organizations, in their order, for half a minute at a time. docs/upkeep.md."""

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from datetime import datetime, timedelta
from uuid import UUID

from temporalio import activity

from activities.holds import connected
from db.session import Database, DatabaseUnavailable
from domain import limits, upkeep
from domain.clock import Clock
from domain.ledger.checkpoints import append_checkpoints
from domain.ledger.verifications import organizations_after

logger = logging.getLogger("scrip.upkeep")


@dataclass(frozen=True)
class UpkeepRequest:
    """Go on with the organization after this one, None for the first. `due` is the instant the run is for."""

    after: UUID | None
    due: datetime | None = None


@dataclass(frozen=True)
class UpkeepReport:
    """What was done. `after` is the last organization that was finished; `failed` counts those that went wrong.

    `counts` are by what was done: matured, expired, holds ended, checkpoints, promises withdrawn, drifts found.
    """

    after: UUID | None
    finished: bool
    organizations: int
    failed: int
    counts: dict[str, int]


@dataclass(frozen=True)
class ReconcileReport:
    """What was missing in Temporal and was started or woken."""

    event_queues_woken: int
    holds_started: int
    hold_ends_woken: int


Reconcile = Callable[[Callable[[], None]], Awaitable[ReconcileReport]]
"""Makes Temporal agree with Postgres, calling its argument now and then."""

_Work = Callable[[Database, UUID, "_Span"], Awaitable[tuple[dict[str, int], bool]]]
"""Looks after one organization; what it did, and whether it finished."""


class _Span:
    """The time an activity gives itself, and how it shows that it is alive."""

    def __init__(self, progress: Callable[[], None]) -> None:
        self.progress = progress
        self._ends_at = time.monotonic() + limits.SWEEP_S

    def is_over(self) -> bool:
        return time.monotonic() > self._ends_at


class UpkeepActivities:
    """The steps of upkeep. They run in threads, each with a connection and an event loop of its own."""

    def __init__(self, database_url: str, clock: Clock) -> None:
        self._database_url = database_url
        self._clock = clock

    # Without this a cancellation is thrown into the thread at any point, also between a write and its commit.
    @activity.defn(name="sweep", no_thread_cancel_exception=True)
    def sweep(self, request: UpkeepRequest) -> UpkeepReport:
        """Book what is due: maturities, expiries, and ends of holds that nobody carried out in time."""

        async def work(database: Database, organization_id: UUID, span: _Span) -> tuple[dict[str, int], bool]:
            swept, finished = await upkeep.sweep(
                database,
                organization_id,
                at=request.due,
                hold_grace=timedelta(seconds=limits.OVERDUE_HOLD_S),
                progress=span.progress,
                is_over=span.is_over,
            )
            counts = {"matured": swept.matured, "expired": swept.expired, "holds ended": swept.holds_ended}
            return counts, finished

        return asyncio.run(self._for_organizations(request, work))

    @activity.defn(name="maintain", no_thread_cancel_exception=True)
    def maintain(self, request: UpkeepRequest) -> UpkeepReport:
        """Append checkpoints of system accounts and withdraw stale promises."""

        async def work(database: Database, organization_id: UUID, span: _Span) -> tuple[dict[str, int], bool]:
            withdrawn = await database.repeat(organization_id, upkeep.repair)
            counts = {"checkpoints": 0, "promises withdrawn": withdrawn}
            more = True
            while more:
                done = await database.repeat(organization_id, append_checkpoints)
                counts["checkpoints"] += done.written
                more = done.more
                span.progress()
                if more and span.is_over():
                    return counts, False
            return counts, True

        return asyncio.run(self._for_organizations(request, work))

    @activity.defn(name="find_drift", no_thread_cancel_exception=True)
    def find_drift(self, request: UpkeepRequest) -> UpkeepReport:
        """Look for holds that disagree with the ledger; each is logged as an error and left as it is."""

        async def work(database: Database, organization_id: UUID, span: _Span) -> tuple[dict[str, int], bool]:
            drifts = await upkeep.find_drift(database, organization_id, span.progress)
            return {"drifts found": len(drifts)}, True

        return asyncio.run(self._for_organizations(request, work))

    async def _for_organizations(self, request: UpkeepRequest, work: _Work) -> UpkeepReport:
        span = _Span(activity.heartbeat)
        after, seen, failed = request.after, 0, 0
        counts: dict[str, int] = {}
        async with connected(self._database_url, self._clock) as database:
            while page := await organizations_after(database, after, limits.ORGANIZATIONS_PER_PAGE):
                for organization_id in page:
                    done, finished = await self._in_one(database, organization_id, span, work)
                    failed += done is None
                    for name, count in (done or {}).items():
                        counts[name] = counts.get(name, 0) + count
                    if not finished:
                        return UpkeepReport(after, False, seen, failed, counts)
                    after, seen = organization_id, seen + 1
                    span.progress()
                    if span.is_over():
                        return UpkeepReport(after, False, seen, failed, counts)
        return UpkeepReport(after, True, seen, failed, counts)

    async def _in_one(
        self, database: Database, organization_id: UUID, span: _Span, work: _Work
    ) -> tuple[dict[str, int] | None, bool]:
        try:
            return await work(database, organization_id, span)
        except DatabaseUnavailable:
            raise
        except Exception:
            # What is wrong with one organization must not keep the others waiting.
            logger.exception("upkeep failed", extra={"organization_id": str(organization_id)})
            return None, True


class ReconcileActivities:
    """Making Temporal agree with Postgres, as a step of a schedule. It runs on the worker's event loop."""

    def __init__(self, reconcile: Reconcile) -> None:
        self._reconcile = reconcile

    @activity.defn(name="reconcile_temporal")
    async def reconcile(self) -> ReconcileReport:
        """Start what is missing in Temporal."""
        return await self._reconcile(activity.heartbeat)
