"""What falls due by itself: maturities, expiries, overdue holds. Contract: holders.md 7.3, 9.10; docs/upkeep.md."""

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator
from datetime import datetime, timedelta
from typing import Any

import psycopg
import pytest
from sqlalchemy import update
from sqlmodel import col

from db.session import Database, DatabaseUnavailable
from db.tables import Asset, Participant
from domain import faults
from domain.balances import Holder
from domain.errors import Refusal
from domain.faults import InjectedFault
from domain.hold_ends import CLOCK_SKEW
from domain.ledger import movements
from domain.upkeep import _DUE, DueKind, Sweep, Swept, find_drift, process_due_lots, repair, sweep
from tests.builders import d, make_group, make_participant, open_shop
from tests.conftest import SettableClock, Tenant
from tests.due_support import entries_of, timed_hold
from tests.holdings_support import Desk, HoldSeen
from tests.ledger_invariants import assert_ledger_invariants
from tests.repetitions import nothing_repeated

NOON = datetime.fromisoformat("2025-01-15T12:00:00+00:00")
ONE_O_CLOCK = NOON + timedelta(hours=1)
THIRTY_DAYS = timedelta(days=30)


@pytest.fixture(autouse=True)
def at_noon(clock: SettableClock) -> None:
    clock.set(NOON)


@pytest.fixture
async def desk(database: Database, organization: Tenant) -> AsyncIterator[Desk]:
    """Alice's desk for a LOT asset."""
    yield Desk.of(database, organization.id, await open_shop(database, organization.id, inventory_mode="LOT"))
    async with database.transaction(organization.id) as tx:
        await assert_ledger_invariants(tx.connection, organization.id)


async def run(desk: Desk, **how: Any) -> Swept:
    swept, finished = await sweep(desk.database, desk.organization_id, **how)
    assert finished
    return swept


async def code_of(call: Any) -> str:
    with pytest.raises(Refusal) as refused:
        await call
    return refused.value.code


async def test_worked_example_10_maturity(desk: Desk, clock: SettableClock) -> None:
    await desk.grant("500", matures_at=NOON + THIRTY_DAYS)
    assert await desk.buckets() == ("0", "0", "500")
    assert await code_of(desk.hold("1")) == "insufficient_balance"
    assert await code_of(desk.debit("1")) == "insufficient_balance"
    clock.set(NOON + THIRTY_DAYS - timedelta(microseconds=1))
    assert await run(desk) == Swept()

    clock.set(NOON + THIRTY_DAYS)
    assert await run(desk) == Swept(matured=1)

    assert await desk.buckets() == ("500", "0", "0")
    (entry,) = await entries_of(desk, "MATURITY")
    assert [posting[1:] for posting in await desk.postings(entry["id"])] == [
        ("DEFERRED", "-500"),
        ("AVAILABLE", "500"),
    ]
    (lot,) = await desk.lot_rows()
    assert (lot["status"], lot["created_at"]) == ("AVAILABLE", NOON), "its age stays"
    before = await desk.entries()
    assert await run(desk) == Swept()
    assert await desk.entries() == before


async def test_every_expired_lot_gets_an_entry_of_its_own(desk: Desk, clock: SettableClock) -> None:
    """A full lot, a part of one that was spent from, one without an expiry and one that isn't due."""
    await desk.grant("10", expires_at=ONE_O_CLOCK)
    await desk.debit("4")
    await desk.grant("20", expires_at=ONE_O_CLOCK)
    await desk.grant("30")
    await desk.grant("40", expires_at=ONE_O_CLOCK + timedelta(seconds=1))

    clock.set(ONE_O_CLOCK)
    assert await run(desk) == Swept(expired=2)

    assert await desk.buckets() == ("70", "0", "0")
    entries = await entries_of(desk, "EXPIRY")
    assert [await desk.postings(entry["id"]) for entry in entries] == [
        [("PARTICIPANT", "AVAILABLE", f"-{amount}"), ("SYSTEM_BREAKAGE", "AVAILABLE", amount)] for amount in ("6", "20")
    ]
    assert all(entry["event_id"] is entry["rule_id"] is entry["api_key_id"] is None for entry in entries)
    assert [(lot.status, lot.remaining) for lot in await desk.lots("EXPIRED")] == [("EXPIRED", "0")] * 2
    assert await run(desk) == Swept()


async def test_held_lots_do_not_expire_while_they_are_held(desk: Desk, clock: SettableClock) -> None:
    await desk.grant("10", expires_at=ONE_O_CLOCK)
    await desk.hold("10")
    clock.set(ONE_O_CLOCK)
    assert await run(desk) == Swept()
    assert await desk.buckets() == ("0", "10", "0")

    await desk.release()

    assert await run(desk) == Swept(expired=1)
    assert await desk.buckets() == ("0", "0", "0")


async def test_a_hold_that_ends_after_its_lots_expiry_is_ended_and_expired(desk: Desk, clock: SettableClock) -> None:
    await desk.grant("10", expires_at=ONE_O_CLOCK)
    await timed_hold(desk, "10", ONE_O_CLOCK + timedelta(hours=1))

    clock.set(ONE_O_CLOCK + timedelta(hours=1))
    assert await run(desk) == Swept(holds_ended=1)
    assert await run(desk) == Swept(expired=1)

    assert await desk.holds() == [HoldSeen("EXPIRED", "10", "0")]
    assert await desk.buckets() == ("0", "0", "0")


async def test_a_lot_that_is_past_both_dates_matures_and_expires_in_one_run(desk: Desk, clock: SettableClock) -> None:
    await desk.grant("10", matures_at=ONE_O_CLOCK, expires_at=ONE_O_CLOCK + timedelta(hours=1))

    clock.set(NOON + THIRTY_DAYS)

    assert await run(desk) == Swept(matured=1, expired=1)
    assert await desk.buckets() == ("0", "0", "0")


async def test_a_maturity_repays_an_overdraft_first(desk: Desk, clock: SettableClock) -> None:
    await desk.grant("10", matures_at=ONE_O_CLOCK)
    await desk.debit("3", allow_negative=True)

    clock.set(ONE_O_CLOCK)
    await run(desk)

    assert await desk.buckets() == ("7", "0", "0")
    assert [(lot.status, lot.remaining) for lot in await desk.lots()] == [("AVAILABLE", "7")]


async def test_archived_assets_and_closed_participants_are_no_exception(desk: Desk, clock: SettableClock) -> None:
    await desk.grant("10", matures_at=ONE_O_CLOCK)
    await desk.grant("20", expires_at=ONE_O_CLOCK)
    async with desk.database.transaction(desk.organization_id) as tx:
        await tx.run(update(Asset).where(col(Asset.id) == desk.asset_id).values(status="ARCHIVED"))
        await tx.run(update(Participant).where(col(Participant.id) == desk.holder.id).values(status="CLOSED"))

    clock.set(ONE_O_CLOCK)

    assert await run(desk) == Swept(matured=1, expired=1)


async def test_many_holders_are_swept_in_batches(desk: Desk, clock: SettableClock) -> None:
    async with desk.database.transaction(desk.organization_id) as tx:
        holders = [Holder("PARTICIPANT", await make_participant(tx)) for _ in range(3)]
        holders.append(Holder("GROUP", await make_group(tx)))
    desks = [desk.using(holder=holder) for holder in holders]
    for one in desks:
        await one.grant("10", matures_at=ONE_O_CLOCK)
        await one.grant("20", matures_at=ONE_O_CLOCK)

    clock.set(ONE_O_CLOCK)
    batches = [await process_due_lots(desk.database, desk.organization_id, "MATURITY", limit=3) for _ in range(4)]

    assert batches == [(3, True), (3, True), (2, False), (0, False)]
    assert [await one.buckets() for one in desks] == [("30", "0", "0")] * 4


async def test_a_run_that_dies_half_way_is_finished_by_the_next(desk: Desk, clock: SettableClock) -> None:
    for _ in range(6):
        await desk.grant("10", expires_at=ONE_O_CLOCK)
    clock.set(ONE_O_CLOCK)

    async def two() -> tuple[int, bool]:
        return await process_due_lots(desk.database, desk.organization_id, "EXPIRY", limit=2)

    assert await two() == (2, True)
    with faults.arm("ledger.written=fail"), pytest.raises(InjectedFault):
        await two()
    assert await desk.buckets() == ("40", "0", "0")

    assert await run(desk) == Swept(expired=4)
    assert await desk.buckets() == ("0", "0", "0")
    assert await run(desk) == Swept()


async def test_runs_at_the_same_time_write_each_entry_once(desk: Desk, clock: SettableClock) -> None:
    for _ in range(20):
        await desk.grant("1", expires_at=ONE_O_CLOCK)
        await desk.grant("2", matures_at=ONE_O_CLOCK)
    clock.set(ONE_O_CLOCK)

    with nothing_repeated(desk.database):
        results = await asyncio.gather(*(run(desk) for _ in range(6)))

    assert (sum(swept.matured for swept in results), sum(swept.expired for swept in results)) == (20, 20)
    assert await desk.buckets() == ("40", "0", "0")


async def test_spending_and_expiry_that_race_never_take_the_same_value(desk: Desk, clock: SettableClock) -> None:
    """Half of the value has expired, fifty spend one each meanwhile: none of it from expired lots."""
    for _ in range(30):
        await desk.grant("1", expires_at=ONE_O_CLOCK)
        await desk.grant("1")
    clock.set(ONE_O_CLOCK)

    async def spend() -> bool:
        try:
            await desk.debit("1")
        except Refusal:
            return False
        return True

    with nothing_repeated(desk.database):
        swept, *spent = await asyncio.gather(run(desk), *(spend() for _ in range(50)))

    assert spent.count(True) == 30
    assert swept == Swept(expired=30)
    assert await desk.buckets() == ("0", "0", "0")


async def test_a_sweep_that_is_told_its_instant_does_not_wait_for_the_clock(desk: Desk, clock: SettableClock) -> None:
    """Unless it is far ahead of the clock."""
    await desk.grant("10", matures_at=ONE_O_CLOCK)

    assert await run(desk, at=NOON - timedelta(hours=1)) == Swept()
    assert await run(desk, at=ONE_O_CLOCK) == Swept()
    clock.set(ONE_O_CLOCK - CLOCK_SKEW)
    assert await run(desk, at=ONE_O_CLOCK) == Swept(matured=1)


async def test_the_kinds_take_turns_a_batch_each(
    desk: Desk, clock: SettableClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A backlog of one kind doesn't keep the others waiting."""
    monkeypatch.setattr("domain.limits.DUE_LOTS", 2)
    await desk.credit("1")
    await timed_hold(desk, "1", ONE_O_CLOCK)
    for _ in range(7):
        await desk.grant("1", matures_at=ONE_O_CLOCK)
        await desk.grant("1", expires_at=ONE_O_CLOCK)
    clock.set(ONE_O_CLOCK)
    work = Sweep(desk.database, desk.organization_id)

    assert await work.go_on(2) == (Swept(matured=2, expired=2), False)
    assert await work.go_on(2) == (Swept(matured=2, expired=2, holds_ended=1), False)
    assert await work.go_on() == (Swept(matured=3, expired=3), True)


async def test_a_lot_that_cannot_be_processed_is_skipped_and_reported(
    desk: Desk, clock: SettableClock, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """All others are processed, of its kind and of the rest; the next sweep tries it again."""
    await desk.credit("3")
    await timed_hold(desk, "3", ONE_O_CLOCK)
    for _ in range(20):
        await desk.grant("1", expires_at=ONE_O_CLOCK)
        await desk.grant("2", matures_at=ONE_O_CLOCK)
    lots = [lot["id"] for lot in await desk.lot_rows() if lot["expires_at"] and lot["status"] == "AVAILABLE"]
    poison = {lots[0], lots[7], lots[19]}
    expire = movements.expire

    def fails_for_some(books: Any, position: Any, lot: Any, now: datetime) -> Any:
        if lot.id in poison:
            raise ValueError("something about this lot")
        return expire(books, position, lot, now)

    monkeypatch.setattr(movements, "expire", fails_for_some)
    clock.set(ONE_O_CLOCK)

    with caplog.at_level(logging.ERROR, "scrip.upkeep"):
        assert await run(desk) == Swept(matured=20, expired=17, holds_ended=1, failed=3)
    assert {lot_id for lot_id in poison if str(lot_id) in caplog.text} == poison
    assert await run(desk) == Swept(failed=3)
    monkeypatch.setattr(movements, "expire", expire)
    assert await run(desk) == Swept(expired=3)


async def test_a_kind_that_fails_throughout_does_not_stop_the_others(
    desk: Desk, clock: SettableClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is given up after a few lots: it isn't about them."""
    monkeypatch.setattr("domain.upkeep.SKIPPED", 2)
    await desk.credit("3")
    await timed_hold(desk, "3", ONE_O_CLOCK)
    for _ in range(5):
        await desk.grant("1", expires_at=ONE_O_CLOCK)
        await desk.grant("1", matures_at=ONE_O_CLOCK)

    def fails(*_: Any) -> None:
        raise ValueError("something about all of them")

    monkeypatch.setattr(movements, "mature", fails)
    clock.set(ONE_O_CLOCK)

    assert await run(desk) == Swept(expired=5, holds_ended=1, failed=3)


async def test_a_database_that_is_away_is_nobodys_fault(desk: Desk, clock: SettableClock) -> None:
    await desk.grant("1", expires_at=ONE_O_CLOCK)
    clock.set(ONE_O_CLOCK)
    away = Database("postgresql://nobody@127.0.0.1:1/none", size=1, timeout_s=0.1, clock=clock)
    await away.open()
    try:
        with pytest.raises(DatabaseUnavailable):
            await sweep(away, desk.organization_id)
    finally:
        await away.close()


async def test_a_sweep_stops_when_its_time_is_over_and_says_so(desk: Desk, clock: SettableClock) -> None:
    for _ in range(260):
        await desk.grant("1", expires_at=ONE_O_CLOCK)
    clock.set(ONE_O_CLOCK)

    first = await sweep(desk.database, desk.organization_id, is_over=lambda: True)
    second = await sweep(desk.database, desk.organization_id, is_over=lambda: True)

    assert first == (Swept(expired=250), False)
    assert second == (Swept(expired=10), True)


async def test_overdue_holds_are_ended_whoever_should_have_done_it(desk: Desk, clock: SettableClock) -> None:
    await desk.credit("100")
    await timed_hold(desk, "10", ONE_O_CLOCK, carrier="WORKFLOW")
    await timed_hold(desk, "20", ONE_O_CLOCK, carrier="PROGRAM", on_expiry="FORFEIT")

    clock.set(ONE_O_CLOCK + timedelta(seconds=59))
    assert await run(desk, hold_grace=timedelta(minutes=1)) == Swept()
    clock.set(ONE_O_CLOCK + timedelta(seconds=60))
    assert await run(desk, hold_grace=timedelta(minutes=1)) == Swept(holds_ended=2)

    assert await desk.buckets() == ("80", "0", "0")


async def test_one_organization_never_sweeps_another(desk: Desk, new_organization: Any, clock: SettableClock) -> None:
    await desk.grant("10", expires_at=ONE_O_CLOCK)
    clock.set(ONE_O_CLOCK)

    assert await sweep(desk.database, new_organization().id) == (Swept(), True)
    assert await desk.buckets() == ("10", "0", "0")


async def test_promises_that_reach_implausibly_far_are_withdrawn(
    desk: Desk, owner: psycopg.Connection[Any], database: Database
) -> None:
    """A clock or a backup that was set back; only a plausible promise is left as it is."""
    for ahead, withdrawn in (("10 seconds", 0), ("1 hour", 1)):
        owner.execute(
            "update lane set drained_until = clock_timestamp() + %s::interval where program_id = %s",
            (ahead, desk.program_id),
        )
        async with database.transaction(desk.organization_id) as tx:
            assert await repair(tx) == withdrawn
            lane = await tx.row("select drained_until from lane where program_id = %s", (desk.program_id,))
        assert lane is not None
        assert (lane["drained_until"] is None) == bool(withdrawn)


@pytest.mark.parametrize("mode", ["SIMPLE", "LOT"])
async def test_holds_that_disagree_with_the_ledger_are_reported_and_left_alone(
    database: Database, organization: Tenant, owner: psycopg.Connection[Any], mode: str
) -> None:
    desk = Desk.of(database, organization.id, await open_shop(database, organization.id, inventory_mode=mode))
    await desk.credit("100")
    held = await desk.hold("30")
    await desk.hold("5")
    assert await find_drift(database, organization.id) == []

    owner.execute("update hold set remaining = 20 where id = %s", (held.hold_id,))

    (drift,) = await find_drift(database, organization.id)
    assert (drift.entity_id, drift.asset_id) == (desk.holder.id, desk.asset_id)
    assert (drift.held, drift.active) == (d("35"), d("25"))
    assert drift.in_lots == (None if mode == "SIMPLE" else d("35"))
    assert [hold.remaining for hold in await desk.holds()] == ["20", "5"]


@pytest.mark.parametrize(
    ("kind", "index", "column"),
    [("MATURITY", "lot_maturity_idx", "matures_at"), ("EXPIRY", "lot_expiry_idx", "expires_at")],
)
async def test_what_is_due_is_found_by_its_index(desk: Desk, kind: DueKind, index: str, column: str) -> None:
    """Only the due lots are read, however many lots there are."""
    plan = ""
    with contextlib.suppress(_Undone):
        async with desk.database.transaction(desk.organization_id) as tx:
            await tx.execute(_MANY_LOTS, {**vars(desk), "holder": desk.holder.id, "now": NOON, "due": ONE_O_CLOCK})
            lines = await tx.execute("explain " + _DUE[kind], (desk.organization_id, NOON, [], 250))
            plan = "\n".join(line for (line,) in await lines.fetchall())
            raise _Undone

    assert f"using {index} on lot" in plan
    condition = next(line for line in plan.splitlines() if "Index Cond" in line)
    assert "organization_id" in condition
    assert column in condition


class _Undone(Exception):
    """Rolls a transaction back."""


_MANY_LOTS = """
insert into lot (organization_id, id, entity_type, entity_id, asset_id, program_id, status, amount, remaining,
                 created_at, expires_at, matures_at, is_provisional, entry_id)
select %(organization_id)s, gen_random_uuid(), 'PARTICIPANT', %(holder)s, %(asset_id)s, %(program_id)s,
       case n %% 2 when 0 then 'AVAILABLE' else 'DEFERRED' end, 1, 1, %(now)s, %(due)s, %(due)s, false,
       gen_random_uuid()
from generate_series(1, 20000) n
"""
