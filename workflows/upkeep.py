"""Upkeep, Reconcile and DriftCheck: what schedules start over and over. Contract: holders.md 7.3; docs/upkeep.md.

They only call activities, which go through all organizations for half a minute at a time, so that neither an activity
nor a history grows with what there is to do.
"""

from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any
from uuid import UUID

from temporalio import workflow
from temporalio.common import RetryPolicy

with workflow.unsafe.imports_passed_through():
    from activities.upkeep import (
        ReconcileActivities,
        ReconcileReport,
        UpkeepActivities,
        UpkeepReport,
        UpkeepRequest,
    )
    from workflows import queues

UPKEEP_ID = "upkeep"
RECONCILE_ID = "reconcile"
DRIFT_ID = "drift-check"

_SWEEP_HEARTBEAT = timedelta(seconds=20)
"""What is due may wait for a minute, and runs begin every half a minute: a lost worker must show soon."""
_RETRIES = RetryPolicy(initial_interval=timedelta(seconds=1), maximum_interval=timedelta(seconds=10))


@dataclass(frozen=True)
class UpkeepInput:
    """Where to go on: after this organization, for this instant; both None at the start of a run."""

    after: UUID | None = None
    due: datetime | None = None


@workflow.defn(name="Upkeep")
class Upkeep:
    """Matures and expires lots of every organization, and ends holds that are overdue."""

    @workflow.run
    async def run(self, request: UpkeepInput) -> dict[str, int]:
        """Do what is due when the run starts; what was done."""
        due = request.due or workflow.info().start_time
        return await _through_organizations(UpkeepActivities.sweep, request.after, due, heartbeat=_SWEEP_HEARTBEAT)


@workflow.defn(name="Reconcile")
class Reconcile:
    """Starts what Temporal lacks, appends checkpoints of system accounts, withdraws stale promises."""

    @workflow.run
    async def run(self, request: UpkeepInput) -> dict[str, int]:
        """Do it all once; what was done."""
        counts: dict[str, int] = {}
        if request.after is None:
            report: ReconcileReport = await workflow.execute_activity_method(
                ReconcileActivities.reconcile,
                task_queue=queues.LIFECYCLE,
                start_to_close_timeout=timedelta(hours=1),
                heartbeat_timeout=timedelta(minutes=1),
                retry_policy=_RETRIES,
            )
            counts = {
                "event queues woken": report.event_queues_woken,
                "holds started": report.holds_started,
                "hold ends woken": report.hold_ends_woken,
                "broadcasts woken": report.broadcasts_woken,
                "redemptions started": report.redemptions_started,
                "simulations started": report.simulations_started,
            }
        return counts | await _through_organizations(UpkeepActivities.maintain, request.after, None)


@workflow.defn(name="DriftCheck")
class DriftCheck:
    """Looks for holds that disagree with the ledger, and reports them."""

    @workflow.run
    async def run(self, request: UpkeepInput) -> dict[str, int]:
        """Look once through every organization; what was found."""
        return await _through_organizations(UpkeepActivities.find_drift, request.after, None)


async def _through_organizations(
    step: Any, after: UUID | None, due: datetime | None, *, heartbeat: timedelta = timedelta(minutes=1)
) -> dict[str, int]:
    """Run `step` until it has been through all organizations after this one; the sums of what it counted."""
    counts = {"organizations": 0, "failed": 0}
    finished = False
    while not finished:
        if workflow.info().is_continue_as_new_suggested():
            workflow.continue_as_new(UpkeepInput(after, due))
        report: UpkeepReport = await workflow.execute_activity_method(
            step,
            UpkeepRequest(after, due),
            start_to_close_timeout=timedelta(minutes=5),
            heartbeat_timeout=heartbeat,
            retry_policy=_RETRIES,
        )
        after, finished = report.after, report.finished
        counts["organizations"] += report.organizations
        counts["failed"] += report.failed
        for name, count in report.counts.items():
            counts[name] = counts.get(name, 0) + count
        done = ", ".join(f"{count} {name}" for name, count in counts.items())
        workflow.set_current_details(f"{'Done' if finished else 'Under way'}: {done}.")
    return counts
