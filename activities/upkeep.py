"""Activities of upkeep: over all organizations, in their order, for half a minute at a time. docs/upkeep.md."""

import logging
import time
from collections import deque
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from datetime import datetime, timedelta
from uuid import UUID

from temporalio import activity

from activities.threads import ThreadDatabases
from db.session import Database, DatabaseUnavailable
from domain import limits, upkeep
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
    """What was done. Go on after the organization `after`, if not `finished`; `failed` counts those that went wrong.

    `organizations` counts those that were finished. `counts` are by what was done: matured, expired, holds ended,
    failures, checkpoints, promises withdrawn, drifts found.
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
    broadcasts_woken: int = 0
    redemptions_started: int = 0
    simulations_started: int = 0


Reconcile = Callable[[Callable[[], None]], Awaitable[ReconcileReport]]
"""Makes Temporal agree with Postgres, calling its argument now and then."""

_Work = Callable[[Database, UUID, "_Span"], Awaitable[dict[str, int]]]
"""Does for one organization what is its share of a run; what it did."""


class _Span:
    """The time an activity gives itself, and how it shows that it is alive."""

    def __init__(self, progress: Callable[[], None]) -> None:
        self.progress = progress
        self._ends_at = time.monotonic() + limits.SWEEP_S

    def is_over(self) -> bool:
        """Also when nobody waits any more: what was done so far is reported, the rest is for the next run."""
        return activity.is_cancelled() or activity.is_worker_shutdown() or time.monotonic() > self._ends_at


class _SweepRounds:
    """Sweeps that take turns, and what they did."""

    def __init__(self, span: _Span) -> None:
        self.waiting: deque[upkeep.Sweep] = deque()
        self._span = span
        self._finished = 0
        self._failed: set[UUID] = set()
        self._done = upkeep.Swept()

    async def take(self, sweep: upkeep.Sweep) -> None:
        """Do a slice of this sweep, and let it wait for its next turn where there is more to do."""
        done, finished = await sweep.go_on(progress=self._span.progress, is_over=self._span.is_over)
        self._span.progress()
        self._done += done
        if done.failed:
            self._failed.add(sweep.organization_id)
        if finished:
            self._finished += 1
        else:
            self.waiting.append(sweep)

    def report(self, after: UUID | None, *, finished: bool) -> UpkeepReport:
        """What all of them did so far."""
        done = self._done
        counts = {
            "matured": done.matured,
            "expired": done.expired,
            "holds ended": done.holds_ended,
            "redemptions expired": done.redemptions_expired,
        }
        if done.failed:
            counts["failures"] = done.failed
        return UpkeepReport(after, finished, self._finished, len(self._failed), counts)


class UpkeepActivities:
    """The steps of upkeep. They run in threads, as they compute."""

    def __init__(self, databases: ThreadDatabases) -> None:
        self._databases = databases

    # Without this a cancellation is thrown into the thread at any point, also between a write and its commit.
    @activity.defn(name="sweep", no_thread_cancel_exception=True)
    def sweep(self, request: UpkeepRequest) -> UpkeepReport:
        """Book what is due: maturities, expiries, and ends of holds and redemptions that nobody carried out in time.

        Every organization gets a slice of a few batches. Those with a backlog get their next ones when all others have
        had theirs: in this step while there is time, then in another round from the first organization.
        """
        return self._databases.run(lambda database: self._sweep(database, request))

    async def _sweep(self, database: Database, request: UpkeepRequest) -> UpkeepReport:
        span, after = _Span(activity.heartbeat), request.after
        rounds = _SweepRounds(span)
        while page := await organizations_after(database, after, limits.ORGANIZATIONS_PER_PAGE):
            for after in page:
                grace = timedelta(seconds=limits.OVERDUE_HOLD_S)
                await rounds.take(upkeep.Sweep(database, after, at=request.due, hold_grace=grace))
                if span.is_over():
                    return rounds.report(after, finished=False)
        while rounds.waiting and not span.is_over():
            await rounds.take(rounds.waiting.popleft())
        return rounds.report(None, finished=False) if rounds.waiting else rounds.report(after, finished=True)

    @activity.defn(name="maintain", no_thread_cancel_exception=True)
    def maintain(self, request: UpkeepRequest) -> UpkeepReport:
        """Append checkpoints of system accounts and withdraw stale promises.

        An organization with a backlog of checkpoints gets limits.CHECKPOINT_PASSES of them, or fewer where the step's
        time is over, and goes on in the next run: nobody waits for more than such a share.
        """

        async def work(database: Database, organization_id: UUID, span: _Span) -> dict[str, int]:
            counts = {"checkpoints": 0, "promises withdrawn": await database.repeat(organization_id, upkeep.repair)}
            for _ in range(limits.CHECKPOINT_PASSES):
                done = await database.repeat(organization_id, append_checkpoints)
                counts["checkpoints"] += done.written
                span.progress()
                if not done.more or span.is_over():
                    break
            return counts

        return self._databases.run(lambda database: self._for_organizations(database, request, work))

    @activity.defn(name="find_drift", no_thread_cancel_exception=True)
    def find_drift(self, request: UpkeepRequest) -> UpkeepReport:
        """Look for holds that disagree with the ledger; each is logged as an error and left as it is."""

        async def work(database: Database, organization_id: UUID, span: _Span) -> dict[str, int]:
            return {"drifts found": len(await upkeep.find_drift(database, organization_id, span.progress))}

        return self._databases.run(lambda database: self._for_organizations(database, request, work))

    async def _for_organizations(self, database: Database, request: UpkeepRequest, work: _Work) -> UpkeepReport:
        span = _Span(activity.heartbeat)
        after, seen, failed = request.after, 0, 0
        counts: dict[str, int] = {}
        while page := await organizations_after(database, after, limits.ORGANIZATIONS_PER_PAGE):
            for organization_id in page:
                done = await self._in_one(database, organization_id, span, work)
                failed += done is None
                for name, count in (done or {}).items():
                    counts[name] = counts.get(name, 0) + count
                after, seen = organization_id, seen + 1
                span.progress()
                if span.is_over():
                    return UpkeepReport(after, False, seen, failed, counts)
        return UpkeepReport(after, True, seen, failed, counts)

    async def _in_one(
        self, database: Database, organization_id: UUID, span: _Span, work: _Work
    ) -> dict[str, int] | None:
        try:
            return await work(database, organization_id, span)
        except DatabaseUnavailable:
            raise
        except Exception:
            # What is wrong with one organization must not keep the others waiting.
            logger.exception("upkeep failed", extra={"organization_id": str(organization_id)})
            return None


class ReconcileActivities:
    """Making Temporal agree with Postgres, as a step of a schedule. It runs on the worker's event loop."""

    def __init__(self, reconcile: Reconcile) -> None:
        self._reconcile = reconcile

    @activity.defn(name="reconcile_temporal")
    async def reconcile(self) -> ReconcileReport:
        """Start what is missing in Temporal."""
        return await self._reconcile(activity.heartbeat)
