"""Making Temporal agree with Postgres, which says what should be running. Runs beside workflows, not inside one.

Temporal's state can be thrown away: a restored backup, a terminated workflow, a deleted server and a lost start are all
the same case, and this is what mends it (`scrip reconcile`, every worker's start, and a timer in every worker).
"""

import asyncio
import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Collection, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from functools import partial
from typing import TypeVar
from uuid import UUID

from temporalio.service import RPCError, RPCStatusCode

from db.session import Database
from domain import limits
from domain.events.drain import lane_of, programs_with_events_due_at
from domain.fan_outs import programs_with_fan_outs
from domain.hold_ends import CARRIED, OWN, CarriedHold, carried_holds, programs_with_ends
from domain.ledger.verifications import organizations_after
from domain.simulations.records import open_simulations
from domain.two_step import CarriedRedemption, pending_after
from workflows.gateway import Gateway

logger = logging.getLogger("scrip.temporal")

Carried = TypeVar("Carried", CarriedHold, CarriedRedemption)

_OUT_OF_REACH = (RPCStatusCode.UNAVAILABLE, RPCStatusCode.DEADLINE_EXCEEDED, RPCStatusCode.CANCELLED)
_END_OF_TIME = datetime(9999, 1, 1, tzinfo=UTC)


@dataclass(frozen=True)
class CarriedHolds:
    """How many workflows of single holds were missing and started, and how many programs' HoldEnds were woken."""

    started: int
    woken: int


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


async def reconcile_holds(
    database: Database, gateway: Gateway, progress: Callable[[], None] = lambda: None
) -> CarriedHolds:
    """Start what is missing: the workflow of every hold that has one, HoldEnds of every program that carries holds.

    Ends need none of it, as upkeep ends what is overdue; but operators find and steer holds by their workflows. The
    workflow of a hold that isn't active any more ends by itself. `progress` is called after every page of holds.
    Raises DatabaseUnavailable, or RPCError when Temporal is out of reach.
    """
    started = woken = 0
    async for organization_id in _organizations(database):
        async with database.transaction(organization_id) as tx:
            with_own = await programs_with_ends(tx, _END_OF_TIME, OWN)
            carrying = await programs_with_ends(tx, _END_OF_TIME, CARRIED)
        for program_id, name in carrying:
            await gateway.wake_hold_ends(organization_id, program_id, name)
            woken += 1
        for program_id, _ in with_own:
            started += await _start_holds(database, gateway, organization_id, program_id, progress)
        progress()
    return CarriedHolds(started, woken)


async def reconcile_redemptions(
    database: Database, gateway: Gateway, progress: Callable[[], None] = lambda: None
) -> int:
    """Start the workflow of every pending redemption that lacks one; how many.

    Expiries need none of it, as reads and upkeep expire what is overdue; but a pending redemption is confirmed, seen
    and steered by its workflow. `progress` is called after every page. Raises DatabaseUnavailable, or RPCError when
    Temporal is out of reach.
    """
    started, after = 0, None
    while page := await pending_after(database, after):
        running = await gateway.running_redemptions([pending.id for pending in page])
        started += await _start_missing(page, running, gateway.carry_redemption)
        after = page[-1]
        progress()
    return started


async def reconcile_simulations(database: Database, gateway: Gateway) -> int:
    """Start the workflow of every simulation that has not ended, or has left something behind, and lacks one; how many.

    Raises DatabaseUnavailable, or RPCError when Temporal is out of reach.
    """
    return sum([await gateway.start_simulation(carried) for carried in await open_simulations(database)])


async def reconcile_broadcasts(database: Database, gateway: Gateway) -> int:
    """Wake Broadcasts of every program that has a fan-out to work on; how many.

    Raises DatabaseUnavailable, or RPCError when Temporal is out of reach.
    """
    return await _wake_broadcasts(database, gateway, _END_OF_TIME)


async def find_lost_broadcasts(database: Database, gateway: Gateway) -> int:
    """Wake Broadcasts of the programs whose fan-outs nobody has moved on for ten seconds; how many.

    Not only a lost wake: it is also how those go on that waited for their program to be ACTIVE, or unpaused, again.
    Raises DatabaseUnavailable, or RPCError when Temporal is out of reach.
    """
    return await _wake_broadcasts(database, gateway, database.clock() - timedelta(seconds=limits.LOST_FAN_OUT_S))


async def _wake_broadcasts(database: Database, gateway: Gateway, idle_since: datetime) -> int:
    woken = 0
    for organization_id, program_id, name in await programs_with_fan_outs(database, idle_since):
        woken += await _is_woken(program_id, gateway.wake_broadcasts(organization_id, program_id, name))
    return woken


async def _start_holds(
    database: Database, gateway: Gateway, organization_id: UUID, program_id: UUID, progress: Callable[[], None]
) -> int:
    started, after = 0, None
    while True:
        async with database.transaction(organization_id) as tx:
            page = await carried_holds(tx, program_id, after)
        if not page:
            return started
        running = await gateway.running_holds([hold.id for hold in page])
        started += await _start_missing(page, running, partial(gateway.carry_hold, organization_id))
        after = page[-1]
        progress()


async def _start_missing(
    page: Sequence[Carried], running: Collection[UUID], carry: Callable[[Carried], Awaitable[bool]]
) -> int:
    """Start the workflows of what isn't running, a page at once; how many."""
    return sum(await asyncio.gather(*(carry(carried) for carried in page if carried.id not in running)))


async def _organizations(database: Database) -> AsyncIterator[UUID]:
    after: UUID | None = None
    while page := await organizations_after(database, after, limits.ORGANIZATIONS_PER_PAGE):
        for organization_id in page:
            yield organization_id
        after = page[-1]


async def _wake(database: Database, gateway: Gateway, due_at: datetime) -> int:
    woken = 0
    for organization_id, program_id in await programs_with_events_due_at(database, due_at):
        lane = await lane_of(database, organization_id, program_id)
        if lane.is_drained:
            continue
        wake = gateway.wake_event_processing(organization_id, program_id, lane.program_name)
        woken += await _is_woken(program_id, wake)
    return woken


async def _is_woken(program_id: UUID, wake: Awaitable[None]) -> bool:
    """Whether Temporal took it. Raises RPCError when Temporal is out of reach."""
    try:
        await wake
    except RPCError as error:
        if error.status in _OUT_OF_REACH:
            raise
        # Temporal answers, it only won't take this one: the programs behind it must not wait for that.
        logger.error("program %s cannot be woken: %s", program_id, error)
        return False
    return True
