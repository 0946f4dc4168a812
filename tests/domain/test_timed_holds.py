"""A hold with an end is made in time or never. docs/decisions/0007-answered-or-never.md; holders.md 6.8."""

import asyncio
from collections.abc import AsyncIterator
from dataclasses import replace
from datetime import timedelta
from typing import Any

import pytest

from db.session import Database, Transaction
from domain import timed_holds
from domain.balances import OperationRequest, OperationResult
from domain.errors import Refusal
from domain.ids import keyed_id
from domain.locks import lock_participants
from domain.timed_holds import Reservation, Reserved
from tests.builders import open_shop
from tests.conftest import Tenant
from tests.holdings_support import Desk, HoldSeen
from tests.ledger_invariants import assert_ledger_invariants


@pytest.fixture
async def desk(database: Database, organization: Tenant) -> AsyncIterator[Desk]:
    """Alice's desk, with 100 available."""
    desk = Desk.of(database, organization.id, await open_shop(database, organization.id))
    await desk.credit("100")
    yield desk
    async with database.transaction(organization.id) as tx:
        await assert_ledger_invariants(tx.connection, organization.id)


async def prepared(desk: Desk, wait_s: float = 60, **fields: Any) -> Reservation:
    request = OperationRequest(
        operation="HOLD",
        program_id=desk.program_id,
        asset_id=desk.asset_id,
        description="Card authorization",
        amount="30",
        **{"expires_in": timedelta(hours=1), **fields},
    )
    async with desk.database.transaction(desk.organization_id) as tx:
        return timed_holds.prepare(tx, desk.holder, request, wait_s)


async def reserve(desk: Desk, reservation: Reservation) -> Reserved:
    return await desk.database.repeat(desk.organization_id, lambda tx: timed_holds.reserve(tx, reservation))


class _Undone(Exception):
    """Rolls a transaction back."""


async def outcome(desk: Desk, reservation: Reservation) -> OperationResult | None:
    found: list[OperationResult | None] = []

    async def ask(tx: Transaction) -> None:
        found.append(await timed_holds.outcome(tx, reservation))
        raise _Undone

    with pytest.raises(_Undone):
        await desk.database.repeat(desk.organization_id, ask)
    return found[-1]


async def test_a_key_names_the_hold_and_without_one_each_is_its_own(desk: Desk) -> None:
    keyed = [await prepared(desk, idempotency_key="k") for _ in range(2)]
    keyless = [await prepared(desk) for _ in range(2)]

    assert {reservation.hold_id for reservation in keyed} == {keyed_id(desk.program_id, "hold", "k")}
    assert len({reservation.hold_id for reservation in keyless}) == 2


@pytest.mark.parametrize("field", ["expires_in", "expires_at"])
async def test_a_hold_ends_within_a_hundred_years(desk: Desk, field: str) -> None:
    """Its workflow sleeps until then."""

    async def prepare(past: timedelta) -> Reservation:
        ahead = timed_holds.LONGEST + past
        end: dict[str, Any] = {"expires_in": None, field: ahead}
        if field == "expires_at":
            end[field] = desk.database.clock() + ahead
        return await prepared(desk, **end)

    await prepare(timedelta(minutes=-1))
    with pytest.raises(Refusal) as refused:
        await prepare(timedelta(minutes=1))
    assert (refused.value.code, refused.value.problems[0].field) == ("bad_request", field)


@pytest.mark.parametrize("key", ["k", None])
async def test_a_step_that_is_repeated_makes_one_hold(desk: Desk, key: str | None) -> None:
    """The worker died after the commit: Temporal runs the step again. Only a caller's own key makes it a replay."""
    reservation = await prepared(desk, idempotency_key=key)

    first, second = await reserve(desk, reservation), await reserve(desk, reservation)

    assert first.result.journal_entry_id == second.result.journal_entry_id
    assert first.hold == second.hold
    assert [first.result.replayed, second.result.replayed] == [False, key is not None]
    assert await desk.holds() == [HoldSeen("ACTIVE", "30", "30")]


async def test_after_its_time_a_reservation_refuses_itself_and_leaves_its_key_unused(desk: Desk) -> None:
    late = await prepared(desk, wait_s=-0.001, idempotency_key="k")

    with pytest.raises(Refusal) as refused:
        await reserve(desk, late)

    assert refused.value.code == "service_unavailable"
    assert await desk.buckets() == ("100", "0", "0")
    assert await outcome(desk, late) is None
    await reserve(desk, await prepared(desk, idempotency_key="k"))
    assert await desk.buckets() == ("70", "30", "0")


async def test_a_reservation_that_waited_for_a_lock_beyond_its_time_is_rolled_back(desk: Desk) -> None:
    reservation = await prepared(desk, wait_s=0.3)
    async with desk.database.transaction(desk.organization_id) as tx:
        await lock_participants(tx, [desk.holder.id])
        waiting = asyncio.create_task(reserve(desk, reservation))
        await tx.execute("select pg_sleep_until(%s)", (reservation.not_after + timedelta(milliseconds=50),))

    with pytest.raises(Refusal) as refused:
        await waiting

    assert refused.value.code == "service_unavailable"
    assert await desk.buckets() == ("100", "0", "0")


async def test_a_reservation_that_stands_still_before_its_commit_is_never_committed(desk: Desk) -> None:
    reservation = await prepared(desk, wait_s=0.3)

    async def stand_still() -> None:
        async with desk.database.transaction(desk.organization_id) as tx:
            await timed_holds.reserve(tx, reservation)
            await tx.execute("select pg_sleep_until(%s)", (reservation.not_after + timedelta(milliseconds=50),))

    with pytest.raises(Refusal) as refused:
        await stand_still()

    assert refused.value.code == "service_unavailable"
    assert await desk.buckets() == ("100", "0", "0")
    assert await desk.holds() == []


async def test_who_asks_for_the_outcome_waits_for_a_reservation_under_way(desk: Desk) -> None:
    reservation = await prepared(desk)
    async with desk.database.transaction(desk.organization_id) as tx:
        made = await timed_holds.reserve(tx, reservation)
        asking = asyncio.create_task(outcome(desk, reservation))
        await asyncio.sleep(0)
        assert not asking.done()

    found = await asking
    assert found is not None
    assert found.journal_entry_id == made.result.journal_entry_id
    assert found.replayed is False


async def test_asking_consumes_no_key(desk: Desk) -> None:
    reservation = await prepared(desk, idempotency_key="k")

    assert await outcome(desk, reservation) is None
    assert await outcome(desk, reservation) is None
    assert not (await reserve(desk, reservation)).result.replayed


async def test_another_payload_under_the_key_is_a_conflict(desk: Desk) -> None:
    reservation = await prepared(desk, idempotency_key="k")
    await reserve(desk, reservation)

    with pytest.raises(Refusal) as refused:
        await reserve(desk, replace(reservation, request=replace(reservation.request, amount="31")))

    assert refused.value.code == "idempotency_conflict"
