"""Scrip's own Temporal Schedules, made or brought up to date by every worker that starts.

Their times and actions are the code's, so a change made to them in Temporal lasts until the next worker starts. Whether
one is paused is the operator's, and stays.
"""

import logging
from collections.abc import Callable
from datetime import timedelta
from typing import Any

from temporalio.client import (
    Client,
    Schedule,
    ScheduleActionStartWorkflow,
    ScheduleAlreadyRunningError,
    ScheduleCalendarSpec,
    ScheduleIntervalSpec,
    ScheduleOverlapPolicy,
    SchedulePolicy,
    ScheduleRange,
    ScheduleSpec,
    ScheduleUpdate,
    ScheduleUpdateInput,
)
from temporalio.common import Priority
from temporalio.service import RPCError

from workflows import ledger_verification, queues, upkeep
from workflows.gateway import has_search_attributes
from workflows.ledger_verification import LOW_PRIORITY_KEY, NightlyInput, NightlyVerification

logger = logging.getLogger("scrip.temporal")


def _nightly_verification(searchable: bool) -> Schedule:
    return Schedule(
        action=ScheduleActionStartWorkflow(
            NightlyVerification.run,
            NightlyInput(searchable=searchable),
            id=ledger_verification.NIGHTLY_ID,
            task_queue=queues.LEDGER,
            static_summary="Verification of every ledger",
            priority=Priority(priority_key=LOW_PRIORITY_KEY),
        ),
        spec=ScheduleSpec(
            calendars=[ScheduleCalendarSpec(hour=[ScheduleRange(2)], comment="02:00 UTC")],
            jitter=timedelta(minutes=10),
        ),
        # Half a day rather than minutes: a night that was missed is made up for once the machine is back.
        policy=SchedulePolicy(overlap=ScheduleOverlapPolicy.SKIP, catchup_window=timedelta(hours=12)),
    )


def _upkeep(workflow: Any, workflow_id: str, summary: str, *, every: timedelta, jitter: timedelta) -> Schedule:
    return Schedule(
        action=ScheduleActionStartWorkflow(
            workflow, upkeep.UpkeepInput(), id=workflow_id, task_queue=queues.LEDGER, static_summary=summary
        ),
        spec=ScheduleSpec(intervals=[ScheduleIntervalSpec(every=every)], jitter=jitter),
        policy=SchedulePolicy(overlap=ScheduleOverlapPolicy.SKIP, catchup_window=timedelta(minutes=5)),
    )


def _due_lots(_searchable: bool) -> Schedule:
    return _upkeep(
        upkeep.Upkeep.run,
        upkeep.UPKEEP_ID,
        "Maturities, expiries, overdue ends of holds",
        every=timedelta(seconds=30),
        jitter=timedelta(seconds=5),
    )


def _reconcile(_searchable: bool) -> Schedule:
    return _upkeep(
        upkeep.Reconcile.run,
        upkeep.RECONCILE_ID,
        "Start what Temporal lacks",
        every=timedelta(minutes=5),
        jitter=timedelta(seconds=30),
    )


def _drift_check(_searchable: bool) -> Schedule:
    return _upkeep(
        upkeep.DriftCheck.run,
        upkeep.DRIFT_ID,
        "Look for holds that disagree with the ledger",
        every=timedelta(hours=1),
        jitter=timedelta(minutes=10),
    )


SCHEDULES: dict[str, Callable[[bool], Schedule]] = {
    ledger_verification.NIGHTLY_ID: _nightly_verification,
    upkeep.UPKEEP_ID: _due_lots,
    upkeep.RECONCILE_ID: _reconcile,
    upkeep.DRIFT_ID: _drift_check,
}
"""Every schedule of ours by its id; each is told whether Scrip's search attributes are registered."""


async def ensure_schedules(client: Client) -> None:
    """Make those that are missing and bring the others up to date.

    Where Temporal refuses, a warning says so: a worker without schedules still carries everything else.
    """
    searchable = await has_search_attributes(client)
    for schedule_id, make in SCHEDULES.items():
        try:
            await _ensure(client, schedule_id, make(searchable))
        except RPCError as error:
            logger.warning("the schedule %s is not up to date: %s", schedule_id, error)


async def _ensure(client: Client, schedule_id: str, wanted: Schedule) -> None:
    def bring_up_to_date(found: ScheduleUpdateInput) -> ScheduleUpdate:
        wanted.state = found.description.schedule.state
        return ScheduleUpdate(wanted)

    try:
        await client.create_schedule(schedule_id, wanted)
    except ScheduleAlreadyRunningError:
        await client.get_schedule_handle(schedule_id).update(bring_up_to_date)
