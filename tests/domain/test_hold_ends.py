"""Ends of holds: once, by whoever comes first, whatever else has become of the holder. Contract: holders.md 6.8."""

import asyncio
import contextlib
import re
from collections.abc import AsyncIterator
from datetime import datetime, timedelta
from typing import Any

import pytest
from sqlalchemy import update
from sqlmodel import col

from db.session import Database
from db.tables import Asset, Group, Participant, Program
from domain import faults, holds
from domain.balances import Holder
from domain.errors import Refusal
from domain.faults import InjectedFault
from domain.hold_ends import (
    _DUE,
    _NEXT_END,
    _PROGRAMS_WITH_ENDS,
    CLOCK_SKEW,
    HoldState,
    carried_holds,
    end_due_holds,
    end_hold,
    find_hold,
    programs_with_ends,
)
from domain.holds import HoldEnd
from domain.ids import new_id
from tests.builders import make_group, make_participant, open_shop
from tests.conftest import SettableClock, Tenant
from tests.due_support import entries_of, timed_hold
from tests.holdings_support import Desk, HoldSeen
from tests.ledger_invariants import assert_ledger_invariants
from tests.repetitions import nothing_repeated

NOON = datetime.fromisoformat("2025-01-15T12:00:00+00:00")
ONE_O_CLOCK = NOON + timedelta(hours=1)


@pytest.fixture(autouse=True)
async def sound_ledger(database: Database, organization: Tenant, clock: SettableClock) -> AsyncIterator[None]:
    clock.set(NOON)
    yield
    async with database.transaction(organization.id) as tx:
        await assert_ledger_invariants(tx.connection, organization.id)


@pytest.fixture(params=["SIMPLE", "LOT"])
async def desk(database: Database, organization: Tenant, request: pytest.FixtureRequest) -> Desk:
    """Alice's desk, with 100 available."""
    shop = await open_shop(database, organization.id, inventory_mode=request.param)
    desk = Desk.of(database, organization.id, shop)
    await desk.credit("100")
    return desk


async def end_due(desk: Desk, **how: Any) -> int:
    return (await end_due_holds(desk.database, desk.organization_id, desk.program_id, **how)).ended


async def set_status(desk: Desk, table: Any, id: Any, status: str) -> None:
    async with desk.database.transaction(desk.organization_id) as tx:
        await tx.run(update(table).where(col(table.id) == id).values(status=status))


async def test_at_its_end_what_remains_is_released_by_an_entry_without_a_cause(
    desk: Desk, clock: SettableClock
) -> None:
    hold_id = await timed_hold(desk, "30", ONE_O_CLOCK)
    async with desk.database.transaction(desk.organization_id) as tx:
        await holds.end(tx, hold_id, HoldEnd(operation="FORFEIT", description="part", amount="10"))

    clock.set(ONE_O_CLOCK)
    assert await end_due(desk) == 1

    assert await desk.buckets() == ("90", "0", "0")
    assert await desk.holds() == [HoldSeen("EXPIRED", "30", "0")]
    (entry,) = await entries_of(desk, "RELEASE")
    assert (entry["event_id"], entry["rule_id"], entry["api_key_id"]) == (None, None, None)
    assert entry["program_id"] == desk.program_id


async def test_at_its_end_what_remains_is_forfeited_where_the_hold_says_so(desk: Desk, clock: SettableClock) -> None:
    await timed_hold(desk, "30", ONE_O_CLOCK, on_expiry="FORFEIT")

    clock.set(ONE_O_CLOCK)
    assert await end_due(desk) == 1

    assert await desk.buckets() == ("70", "0", "0")
    assert await desk.holds() == [HoldSeen("EXPIRED", "30", "0")]
    assert len(await entries_of(desk, "FORFEIT")) == 1


async def test_nothing_ends_early_and_nothing_ends_twice(desk: Desk, clock: SettableClock) -> None:
    await timed_hold(desk, "30", ONE_O_CLOCK)

    clock.set(ONE_O_CLOCK - timedelta(microseconds=1))
    report = await end_due_holds(desk.database, desk.organization_id, desk.program_id)
    assert (report.ended, report.more, report.next_end) == (0, False, ONE_O_CLOCK)
    clock.set(ONE_O_CLOCK)
    report = await end_due_holds(desk.database, desk.organization_id, desk.program_id)
    assert (report.ended, report.more, report.next_end) == (1, False, None)

    before = await desk.entries()
    assert await end_due(desk) == 0
    assert await desk.entries() == before


async def test_a_step_that_is_told_its_instant_does_not_wait_for_the_clock(desk: Desk, clock: SettableClock) -> None:
    """Server time and the injected clock can't disagree by seconds: the later of the two counts."""
    hold_id = await timed_hold(desk, "30", ONE_O_CLOCK)
    clock.set(ONE_O_CLOCK - CLOCK_SKEW)

    async with desk.database.transaction(desk.organization_id) as tx:
        assert await end_hold(tx, hold_id, order=None) == HoldState("ACTIVE", ONE_O_CLOCK)
    async with desk.database.transaction(desk.organization_id) as tx:
        assert await end_hold(tx, hold_id, order=None, at=ONE_O_CLOCK) == HoldState("EXPIRED", ONE_O_CLOCK)


async def test_a_step_that_comes_long_before_its_time_ends_nothing(desk: Desk, clock: SettableClock) -> None:
    """A timer that fires early. Who asks for a program's next end is told to come back, not at once."""
    hold_id = await timed_hold(desk, "30", ONE_O_CLOCK)
    clock.set(ONE_O_CLOCK - CLOCK_SKEW - timedelta(microseconds=1))

    async with desk.database.transaction(desk.organization_id) as tx:
        assert await end_hold(tx, hold_id, order=None, at=ONE_O_CLOCK) == HoldState("ACTIVE", ONE_O_CLOCK)
    report = await end_due_holds(desk.database, desk.organization_id, desk.program_id, at=ONE_O_CLOCK)
    assert (report.ended, report.more, report.next_end) == (0, False, ONE_O_CLOCK + CLOCK_SKEW)


async def test_ends_come_in_batches_the_longest_overdue_first(desk: Desk, clock: SettableClock) -> None:
    """After a downtime everything that fell due is carried out, a batch a transaction."""
    for minute in range(7):
        await timed_hold(desk, "1", NOON + timedelta(minutes=1 + minute))

    clock.set(ONE_O_CLOCK)
    reports = [await end_due_holds(desk.database, desk.organization_id, desk.program_id, limit=3) for _ in range(3)]

    assert [(report.ended, report.more) for report in reports] == [(3, True), (3, True), (1, False)]
    assert await desk.buckets() == ("100", "0", "0")
    assert len(await entries_of(desk, "RELEASE")) == 7


async def test_status_of_holder_program_and_asset_does_not_matter(desk: Desk, clock: SettableClock) -> None:
    await timed_hold(desk, "30", ONE_O_CLOCK)
    for table, id, status in (
        (Participant, desk.holder.id, "CLOSED"),
        (Program, desk.program_id, "ARCHIVED"),
        (Asset, desk.asset_id, "ARCHIVED"),
    ):
        await set_status(desk, table, id, status)

    clock.set(ONE_O_CLOCK)

    assert await end_due(desk) == 1
    assert await desk.buckets() == ("100", "0", "0")


async def test_holds_of_groups_and_participants_end_together(
    desk: Desk, organization: Tenant, database: Database, clock: SettableClock
) -> None:
    async with database.transaction(organization.id) as tx:
        groups = [Holder("GROUP", await make_group(tx)) for _ in range(2)]
        people = [Holder("PARTICIPANT", await make_participant(tx)) for _ in range(2)]
    desks = [desk.using(holder=holder) for holder in (*groups, *people)]
    for one in desks:
        await one.credit("5")
        await timed_hold(one, "5", ONE_O_CLOCK)
    await set_status(desk, Group, groups[0].id, "ARCHIVED")

    clock.set(ONE_O_CLOCK)

    assert await end_due(desk) == 4
    assert [await one.buckets() for one in desks] == [("5", "0", "0")] * 4


async def test_an_operator_ends_a_hold_at_once(desk: Desk) -> None:
    released = await timed_hold(desk, "10", ONE_O_CLOCK)
    forfeited = await timed_hold(desk, "20", ONE_O_CLOCK)

    for hold_id, order, status in ((released, "RELEASE", "RELEASED"), (forfeited, "FORFEIT", "FORFEITED")):
        for _ in range(2):
            async with desk.database.transaction(desk.organization_id) as tx:
                state = await end_hold(tx, hold_id, order=order)  # type: ignore[arg-type]
            assert state == HoldState(status, ONE_O_CLOCK)  # type: ignore[arg-type]

    assert await desk.buckets() == ("80", "0", "0")


async def test_an_order_for_a_hold_of_another_program_or_of_nobody_changes_nothing(desk: Desk) -> None:
    hold_id = await timed_hold(desk, "10", ONE_O_CLOCK)

    async with desk.database.transaction(desk.organization_id) as tx:
        state = await end_hold(tx, hold_id, order="RELEASE", program_id=new_id())
    assert state == HoldState("ACTIVE", ONE_O_CLOCK)
    async with desk.database.transaction(desk.organization_id) as tx:
        assert await end_hold(tx, new_id(), order="RELEASE") is None


async def test_a_program_ends_only_holds_that_it_carries(desk: Desk, clock: SettableClock) -> None:
    own = await timed_hold(desk, "10", ONE_O_CLOCK, carrier="WORKFLOW")
    carried = await timed_hold(desk, "20", ONE_O_CLOCK, carrier="PROGRAM")
    clock.set(ONE_O_CLOCK)

    async with desk.database.transaction(desk.organization_id) as tx:
        for carrier in ("WORKFLOW", "PROGRAM"):
            found = await programs_with_ends(tx, ONE_O_CLOCK, (carrier,))
            assert found == [(desk.program_id, "Loyalty")]
        page = await carried_holds(tx, desk.program_id, None)
        assert [(hold.id, hold.participant_id) for hold in page] == [(own, desk.holder.id)]
        assert await carried_holds(tx, desk.program_id, page[-1]) == []
    assert await end_due(desk) == 1

    async with desk.database.transaction(desk.organization_id) as tx:
        states = [await find_hold(tx, hold_id) for hold_id in (own, carried)]
    assert [state.status for state in states if state] == ["ACTIVE", "EXPIRED"]


async def test_of_a_release_and_an_end_that_race_one_wins(desk: Desk, clock: SettableClock) -> None:
    hold_ids = [await timed_hold(desk, "2", ONE_O_CLOCK) for _ in range(25)]
    clock.set(ONE_O_CLOCK)

    refusals: list[str] = []

    async def release(hold_id: Any) -> bool:
        try:
            async with desk.database.transaction(desk.organization_id) as tx:
                await holds.end(tx, hold_id, HoldEnd(operation="RELEASE", description="by hand"))
        except Refusal as refusal:
            refusals.append(refusal.code)
            return False
        return True

    with nothing_repeated(desk.database):
        results = await asyncio.gather(
            *(release(hold_id) for hold_id in hold_ids), *(end_due(desk, limit=3) for _ in range(25))
        )

    released, ended = sum(results[:25]), sum(results[25:])
    assert released + ended == 25
    assert set(refusals) <= {"hold_not_active"}
    assert await desk.buckets() == ("100", "0", "0")
    statuses = [hold.status for hold in await desk.holds()]
    assert (statuses.count("RELEASED"), statuses.count("EXPIRED")) == (released, ended)


async def test_a_batch_that_dies_leaves_nothing_and_is_done_by_the_next(desk: Desk, clock: SettableClock) -> None:
    for _ in range(4):
        await timed_hold(desk, "5", ONE_O_CLOCK)
    clock.set(ONE_O_CLOCK)

    assert await end_due(desk, limit=2) == 2
    with faults.arm("ledger.written=fail"), pytest.raises(InjectedFault):
        await end_due(desk, limit=2)
    assert await desk.buckets() == ("90", "10", "0")

    assert await end_due(desk, limit=200) == 2
    assert await desk.buckets() == ("100", "0", "0")


async def test_lots_of_a_hold_go_back_as_they_were(
    database: Database, organization: Tenant, clock: SettableClock
) -> None:
    shop = await open_shop(database, organization.id, inventory_mode="LOT")
    desk = Desk.of(database, organization.id, shop)
    await desk.grant("10", expires_at=NOON + timedelta(days=1))
    await timed_hold(desk, "4", ONE_O_CLOCK, reference_id="auth1")

    clock.set(ONE_O_CLOCK)
    await end_due(desk)

    lots = await desk.lot_rows()
    assert [(lot["status"], lot["reference_id"], lot["expires_at"]) for lot in lots] == [
        ("AVAILABLE", None, NOON + timedelta(days=1))
    ] * 2


async def test_one_organization_never_ends_anothers_holds(
    desk: Desk, new_organization: Any, clock: SettableClock
) -> None:
    hold_id = await timed_hold(desk, "10", ONE_O_CLOCK)
    clock.set(ONE_O_CLOCK)
    stranger = new_organization()

    report = await end_due_holds(desk.database, stranger.id, desk.program_id)
    assert (report.ended, report.next_end) == (0, None)
    async with desk.database.transaction(stranger.id) as tx:
        assert await end_hold(tx, hold_id, order="RELEASE") is None


async def test_programs_with_ends_are_found_by_one_probe_each(desk: Desk) -> None:
    """However many holds a program has: the index's first entry tells."""
    params = {"organization_id": desk.organization_id, "until": ONE_O_CLOCK, "carriers": ["PROGRAM"]}
    async with desk.database.transaction(desk.organization_id) as tx:
        await tx.execute("set local enable_seqscan = off")
        lines = [line for (line,) in await (await tx.execute("explain " + _PROGRAMS_WITH_ENDS, params)).fetchall()]

    at = next(number for number, line in enumerate(lines) if "using hold_end_idx" in line)
    assert any("Limit" in line for line in lines[:at])
    assert "program_id = p.id" in lines[at + 1]
    assert "carrier = c.carrier" in lines[at + 1]
    assert "expires_at <=" in lines[at + 1]


@pytest.mark.parametrize("carrier", ["WORKFLOW", "PROGRAM"])
async def test_holds_of_other_carriers_are_not_read(desk: Desk, carrier: str) -> None:
    """Twenty thousand of the other carrier come to their end before the few of this one."""
    other = {"WORKFLOW": "PROGRAM", "PROGRAM": "WORKFLOW"}[carrier]
    due = {"organization_id": desk.organization_id, "until": ONE_O_CLOCK, "carriers": [carrier]}
    probe = (desk.organization_id, desk.program_id, ONE_O_CLOCK, carrier)
    plans = []
    with contextlib.suppress(_Undone):
        async with desk.database.transaction(desk.organization_id) as tx:
            assert (await tx.row("select current_user = 'scrip_app' as is_app")) == {"is_app": True}
            for kind, count, end in ((other, 20_000, NOON), (carrier, 5, ONE_O_CLOCK)):
                params = {**vars(desk), "holder": desk.holder.id, "now": NOON}
                await tx.execute(_MANY_HOLDS, {**params, "carrier": kind, "count": count, "end": end})
            for statement, values in ((_DUE, (*probe, 200)), (_NEXT_END, probe), (_PROGRAMS_WITH_ENDS, due)):
                lines = await tx.execute("explain (analyze, timing off) " + statement, values)
                plans.append([line for (line,) in await lines.fetchall()])
            raise _Undone

    for plan in plans:
        assert not any("Seq Scan on hold" in line for line in plan), plan
        assert rows_read(plan) <= 5, plan


def rows_read(plan: list[str]) -> float:
    """How many rows the scans of holds of this plan gave or filtered out."""
    read = 0.0
    for number, line in enumerate(plan):
        if re.search(r"Scan .*(on hold|hold_end_idx)", line):
            read += float(re.findall(r"rows=([\d.]+)", line)[-1])
            read += sum(float(found) for below in plan[number + 1 :] for found in _REMOVED.findall(below))
    return read


_REMOVED = re.compile(r"Rows Removed by .*: (\d+)")


class _Undone(Exception):
    """Rolls a transaction back."""


_MANY_HOLDS = """
insert into hold (organization_id, id, entity_type, entity_id, program_id, asset_id, kind, amount, remaining, status,
                  expires_at, on_expiry, carrier, entry_id, created_at, updated_at)
select %(organization_id)s, gen_random_uuid(), 'PARTICIPANT', %(holder)s, %(program_id)s, %(asset_id)s, 'OWN', 1, 1,
       'ACTIVE', %(end)s, 'RELEASE', %(carrier)s, gen_random_uuid(), %(now)s, %(now)s
from generate_series(1, %(count)s) n
"""
