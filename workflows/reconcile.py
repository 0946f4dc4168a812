"""Making Temporal agree with Postgres, which says what should be running. Runs beside workflows, not inside one.

Temporal's state can be thrown away: a restored backup, a terminated workflow, a deleted server and a lost start are all
the same case, and this is what mends it (`scrip reconcile`, every worker's start, and a timer in every worker).
"""

import logging
from datetime import UTC, datetime, timedelta

from temporalio.service import RPCError, RPCStatusCode

from db.session import Database
from domain import limits
from domain.events.drain import lane_of, programs_with_events_due_at
from workflows.gateway import Gateway

logger = logging.getLogger("scrip.temporal")

_OUT_OF_REACH = (RPCStatusCode.UNAVAILABLE, RPCStatusCode.DEADLINE_EXCEEDED, RPCStatusCode.CANCELLED)
_END_OF_TIME = datetime(9999, 1, 1, tzinfo=UTC)


async def reconcile(database: Database, gateway: Gateway) -> int:
    """Start what is missing: EventProcessing of every program that has events waiting, due or not; how many.

    Raises DatabaseUnavailable, or RPCError when Temporal is out of reach.
    """
    return await _wake(database, gateway, _END_OF_TIME)


async def find_lost_wakes(database: Database, gateway: Gateway) -> int:
    """Wake the programs that have had an event due for more than a second and nobody looking; how many.

    Raises DatabaseUnavailable, or RPCError when Temporal is out of reach.
    """
    return await _wake(database, gateway, database.clock() - timedelta(seconds=limits.LOST_WAKE_AGE_S))


async def _wake(database: Database, gateway: Gateway, due_at: datetime) -> int:
    woken = 0
    for organization_id, program_id in await programs_with_events_due_at(database, due_at):
        lane = await lane_of(database, organization_id, program_id)
        if lane.is_drained:
            continue
        try:
            await gateway.wake_event_processing(organization_id, program_id, lane.program_name)
        except RPCError as error:
            if error.status in _OUT_OF_REACH:
                raise
            # Temporal answers, it only won't take this one: the programs behind it must not wait for that.
            logger.error("program %s cannot be woken: %s", program_id, error)
        else:
            woken += 1
    return woken
