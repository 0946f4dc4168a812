"""Redemptions in two steps, and what becomes of them. Contract: redemptions.md 3, 9 and 10 (I); holders.md 6.4."""

import asyncio
from collections.abc import AsyncIterator
from datetime import timedelta
from typing import Any

import pytest

from db.session import Database
from domain import limits, redemptions
from domain.errors import Refusal
from domain.ids import new_id
from tests.builders import d, open_shop
from tests.conftest import SettableClock, Tenant
from tests.holdings_support import HoldSeen
from tests.ledger_invariants import assert_ledger_invariants
from tests.redemptions_support import Till, refused

NOON = "2025-01-15T12:00:00+00:00"


@pytest.fixture(autouse=True)
async def sound_ledger(database: Database, organization: Tenant) -> AsyncIterator[None]:
    yield
    async with database.transaction(organization.id) as tx:
        await assert_ledger_invariants(tx.connection, organization.id)


@pytest.fixture
async def till(database: Database, organization: Tenant) -> Till:
    """Alice's, of a SIMPLE asset of scale 2; she has 100."""
    till = Till.of(database, organization.id, await open_shop(database, organization.id))
    await till.desk.credit("100")
    return till


@pytest.fixture
async def lot_till(database: Database, organization: Tenant) -> Till:
    """Alice's, of a LOT asset of scale 2; she has nothing."""
    return Till.of(database, organization.id, await open_shop(database, organization.id, inventory_mode="LOT"))


async def test_a_reservation_is_confirmed(till: Till) -> None:
    """Worked example I, with 150 in place of the 100 of the others."""
    await till.desk.credit("50")
    made = (await till.reserve("100")).redemption

    assert made.status == "PENDING"
    assert made.expires_at == made.created_at + timedelta(days=1)
    assert await till.desk.buckets() == ("50", "100", "0")
    hold_entry = made.journal_entry_id
    confirmed = await till.confirm(made.id)

    assert (confirmed.status, confirmed.requested_amount) == ("COMPLETED", d("100"))
    assert confirmed.confirmed_at == confirmed.updated_at
    assert confirmed.journal_entry_id != hold_entry
    assert await till.desk.postings(confirmed.journal_entry_id) == [
        ("PARTICIPANT", "HELD", "-100"),
        ("SYSTEM_REDEMPTION", "AVAILABLE", "100"),
    ]
    assert await till.desk.buckets() == ("50", "0", "0")
    assert await till.get(made.id) == confirmed
    assert await till.desk.entries("RELEASE") == 0


async def test_a_reservation_is_a_hold_that_nobody_else_touches(till: Till) -> None:
    made = (await till.reserve("60")).redemption
    await till.desk.hold("10")
    (reserved, own) = await till.desk.hold_rows()

    assert (reserved["id"], reserved["kind"], reserved["reference_id"]) == (made.id, "REDEMPTION", str(made.id))
    assert (reserved["carrier"], reserved["expires_at"]) == ("WORKFLOW", made.expires_at)
    for operation in ("RELEASE", "FORFEIT"):
        with refused("conflict"):
            await till.desk.operate(operation, hold_id=made.id, bucket="HELD")
        with refused("insufficient_balance"):
            await till.desk.operate(operation, "10.01", bucket="HELD")
    with refused("insufficient_balance"):
        await till.desk.debit("10.01", bucket="HELD")
    await till.desk.release()

    assert await till.desk.buckets() == ("40", "60", "0")
    assert own["id"] != made.id


async def test_reserved_lots_are_passed_over_and_cannot_be_named(lot_till: Till) -> None:
    for _ in range(2):
        await lot_till.desk.credit("10")
    made = (await lot_till.reserve("10")).redemption
    reserved = (await lot_till.desk.lot_rows())[0]["id"]

    for naming in ({"reference_id": str(made.id)}, {"lot_ids": [reserved]}, {"hold_id": made.id}):
        with refused("conflict"):
            await lot_till.desk.release(**naming)
        with refused("conflict"):
            await lot_till.desk.forfeit(bucket="HELD", **naming)
    for operation in (lot_till.desk.release, lot_till.desk.forfeit):
        with refused("insufficient_balance"):
            await operation(bucket="HELD")
    with refused("conflict"):
        await lot_till.desk.void(str(made.id))
    with refused("insufficient_balance"):
        await lot_till.desk.debit("1", bucket="HELD")


async def test_a_part_is_confirmed_and_the_rest_released(till: Till) -> None:
    made = (await till.reserve("100")).redemption

    confirmed = await till.confirm(made.id, "30")

    assert (confirmed.amount, confirmed.requested_amount) == (d("30"), d("100"))
    assert await till.desk.buckets() == ("70", "0", "0")
    assert await till.desk.entries("RELEASE") == 1
    assert await till.desk.holds() == [HoldSeen("SETTLED", "100", "0")]
    with refused("reversal_exceeds_redemption"):
        await till.reverse(made.id, "30.01")
    await till.reverse(made.id)
    assert await till.desk.buckets() == ("100", "0", "0")


async def test_fewer_units_are_confirmed_and_the_others_are_back_in_stock(till: Till) -> None:
    reward_id = await till.reward(max_total=5)
    made = (await till.reserve(reward_id=reward_id, quantity=5)).redemption
    assert await till.stock(reward_id) == ("OUT_OF_STOCK", 5, 5)
    await till.change_reward(reward_id, unit_cost=d("77"))

    confirmed = await till.confirm(made.id, quantity=2)

    assert (confirmed.amount, confirmed.quantity, confirmed.requested_quantity) == (d("20"), 2, 5)
    assert await till.stock(reward_id) == ("ACTIVE", 2, 2)


@pytest.mark.parametrize(
    ("fields", "code"),
    [
        ({"amount": "0"}, "bad_request"),
        ({"amount": "100.01"}, "bad_request"),
        ({"amount": "1.001"}, "invalid_scale"),
        ({"quantity": 1}, "bad_request"),
        ({"amount": "1", "quantity": 1}, "bad_request"),
    ],
)
async def test_a_confirm_takes_at_most_what_is_reserved(till: Till, fields: dict[str, Any], code: str) -> None:
    made = (await till.reserve("100")).redemption

    with refused(code):
        await till.confirm(made.id, **fields)


@pytest.mark.parametrize("fields", [{"quantity": 0}, {"quantity": 3}, {"amount": "10"}])
async def test_units_are_confirmed_in_units(till: Till, fields: dict[str, Any]) -> None:
    made = (await till.reserve(reward_id=await till.reward(), quantity=2)).redemption

    with refused("bad_request"):
        await till.confirm(made.id, **fields)


async def test_a_confirm_keeps_to_the_frozen_minimum(till: Till) -> None:
    reward_id = await till.reward(redemption_type="AMOUNT_BASED", unit_cost=d("25"))
    made = (await till.reserve("50", reward_id=reward_id)).redemption
    await till.change_reward(reward_id, unit_cost=d("40"))

    with refused("amount_below_minimum"):
        await till.confirm(made.id, "24.99")
    assert (await till.confirm(made.id, "25")).amount == 25


async def test_repeating_a_confirm_is_safe_and_another_one_is_refused(till: Till) -> None:
    made = (await till.reserve("100")).redemption
    await till.confirm(made.id, "60")
    await till.reverse(made.id, "10")

    assert (await till.confirm(made.id, "60.00")).status == "PARTIALLY_REVERSED"
    for amount in (None, "59"):
        with refused("redemption_not_pending"):
            await till.confirm(made.id, amount)
    assert await till.desk.entries("REDEMPTION") == 1


async def test_the_key_of_a_confirm_stands_for_its_payload(till: Till) -> None:
    made = (await till.reserve("100")).redemption
    await till.confirm(made.id, "60", idempotency_key="c")

    assert (await till.confirm(made.id, "60", idempotency_key="c")).status == "COMPLETED"
    with refused("idempotency_conflict"):
        await till.confirm(made.id, "61", idempotency_key="c")
    with refused("redemption_not_pending"):
        await till.confirm(made.id, "61", idempotency_key="d")


async def test_a_redemption_in_one_step_has_nothing_to_confirm_or_cancel(till: Till) -> None:
    made = (await till.redeem("10")).redemption

    for call in (till.confirm, till.cancel):
        with refused("redemption_not_pending"):
            await call(made.id)


async def test_only_participant_and_asset_can_stop_a_confirm(till: Till) -> None:
    reward_id = await till.reward()
    made = (await till.reserve(reward_id=reward_id)).redemption
    await till.change_program(status="ARCHIVED")
    await till.change_reward(reward_id, status="ARCHIVED")
    await till.change_asset(max_transaction_amount=d("1"), status="ARCHIVED")
    await till.unlink_asset()
    await till.set_status("SUSPENDED")

    with refused("participant_inactive"):
        await till.confirm(made.id)
    await till.set_status("ACTIVE")
    with refused("asset_archived"):
        await till.confirm(made.id)
    await till.change_asset(status="ACTIVE")
    assert (await till.confirm(made.id)).status == "COMPLETED"


async def test_a_confirm_pays_the_target_of_the_reservation(lot_till: Till) -> None:
    await lot_till.desk.credit("100")
    merchant = lot_till.desk_of("PARTICIPANT", await lot_till.new_participant())
    await lot_till.aim_at(merchant.holder.id)
    made = (await lot_till.reserve("60")).redemption
    assert (await merchant.buckets(), await merchant.lots()) == (("0", "0", "0"), [])
    await lot_till.change_program(redemption_target_type="SYSTEM_BREAKAGE", redemption_target_entity_id=None)

    confirmed = await lot_till.confirm(made.id, "40")

    assert await merchant.buckets() == ("40", "0", "0")
    assert [lot["id"] for lot in await merchant.lot_rows()] == [confirmed.target_lot_id]


async def test_a_cancel_gives_everything_back_whatever_the_statuses(till: Till) -> None:
    reward_id = await till.reward(max_total=2)
    made = (await till.reserve(reward_id=reward_id, quantity=2)).redemption
    await till.change_program(status="ARCHIVED")
    await till.change_asset(status="ARCHIVED")
    await till.set_status("CLOSED")

    canceled = await till.cancel(made.id, "supplier has none")

    assert (canceled.status, canceled.cancel_reason) == ("CANCELED", "supplier has none")
    assert (canceled.canceled_at, canceled.journal_entry_id) == (canceled.updated_at, made.journal_entry_id)
    assert await till.desk.buckets() == ("100", "0", "0")
    assert await till.stock(reward_id) == ("ACTIVE", 0, 0)
    assert await till.desk.holds() == [HoldSeen("RELEASED", "20", "0")]
    assert await till.cancel(made.id, "again") == canceled
    with refused("redemption_not_pending"):
        await till.confirm(made.id)
    with refused("redemption_not_confirmed"):
        await till.reverse(made.id)


async def test_after_a_confirm_there_is_nothing_to_cancel(till: Till) -> None:
    made = (await till.reserve("10")).redemption
    with refused("redemption_not_confirmed"):
        await till.reverse(made.id)
    await till.confirm(made.id)

    with refused("redemption_not_pending"):
        await till.cancel(made.id)


async def test_lots_of_a_reservation_go_back_into_the_lots_they_came_from(lot_till: Till) -> None:
    for _ in range(3):
        await lot_till.desk.credit("10")
    before = await lot_till.desk.lots()
    made = (await lot_till.reserve("15")).redemption
    await lot_till.cancel(made.id)

    assert await lot_till.desk.lots("AVAILABLE") == before
    made = (await lot_till.reserve("25")).redemption
    a, b, c = (lot["id"] for lot in await lot_till.desk.lot_rows() if lot["amount"] == 10)
    confirmed = await lot_till.confirm(made.id, "14")
    assert await lot_till.taken(made.id) == [(a, "10", "0"), (b, "10", "6"), (c, "5", "5")]
    await lot_till.reverse(confirmed.id, "5")
    assert await lot_till.taken(made.id) == [(a, "10", "1"), (b, "10", "10"), (c, "5", "5")]
    await lot_till.reverse(confirmed.id)

    assert await lot_till.desk.lots("AVAILABLE") == before


async def test_reserved_lots_outlive_their_expiry_and_are_forfeited_once_they_are_back(
    lot_till: Till, clock: SettableClock
) -> None:
    clock.set(NOON)
    await lot_till.desk.grant("10", expires_at=clock() + timedelta(hours=1))
    made = (await lot_till.reserve("6")).redemption
    clock.advance(hours=2)
    assert await lot_till.desk.expire_due() == 1
    assert await lot_till.desk.buckets() == ("0", "6", "0")

    await lot_till.cancel(made.id)
    assert await lot_till.desk.buckets() == ("6", "0", "0")
    assert await lot_till.desk.expire_due() == 1
    assert await lot_till.desk.buckets() == ("0", "0", "0")


async def test_a_reservation_expires_exactly_once_at_its_instant(till: Till, clock: SettableClock) -> None:
    clock.set(NOON)
    reward_id = await till.reward(max_total=1)
    made = (await till.reserve(reward_id=reward_id, expires_in=timedelta(minutes=1))).redemption
    clock.advance(seconds=59.999999)
    early = await till.expire(made.id)
    assert early is not None
    assert early.status == "PENDING"
    await till.set_status("CLOSED")
    await till.change_asset(status="ARCHIVED")

    clock.advance(microseconds=1)
    ended = [await till.expire(made.id) for _ in range(2)]

    assert [one and one.status for one in ended] == ["EXPIRED"] * 2
    assert await till.desk.buckets() == ("100", "0", "0")
    assert await till.stock(reward_id) == ("ACTIVE", 0, 0)
    assert await till.desk.holds() == [HoldSeen("EXPIRED", "10", "0")]
    assert await till.desk.entries("RELEASE") == 1


async def test_a_step_may_be_ahead_of_the_clock_by_little(till: Till, clock: SettableClock) -> None:
    clock.set(NOON)
    made = (await till.reserve("10", expires_in=timedelta(minutes=2))).redemption
    assert made.expires_at is not None

    for at, status in ((made.expires_at, "PENDING"), (made.expires_at, "EXPIRED")):
        one = await till.expire(made.id, at=at)
        assert one is not None
        assert one.status == status
        clock.advance(minutes=1)


async def test_an_operator_may_let_it_expire_at_once(till: Till) -> None:
    made = (await till.reserve("10")).redemption

    ended = await till.expire(made.id, at_once=True)

    assert ended is not None
    assert ended.status == "EXPIRED"
    confirmed = (await till.reserve("10")).redemption
    await till.confirm(confirmed.id)
    still = await till.expire(confirmed.id, at_once=True)
    assert still is not None
    assert still.status == "COMPLETED"


async def test_a_confirm_or_cancel_that_is_late_meets_it_expired_with_the_money_back(
    till: Till, clock: SettableClock
) -> None:
    clock.set(NOON)
    calls: tuple[Any, ...] = (till.confirm, till.cancel)
    made = [(await till.reserve("10")).redemption for _ in calls]
    clock.advance(days=1)

    for call, redemption in zip(calls, made, strict=True):
        late = await call(redemption.id)
        assert late.status == "EXPIRED"
        with refused("redemption_not_pending"):
            redemptions.require_in_time(late)
        with refused("redemption_not_pending"):
            await call(redemption.id)
    assert await till.desk.buckets() == ("100", "0", "0")


async def test_a_late_confirm_gives_units_back(till: Till, clock: SettableClock) -> None:
    clock.set(NOON)
    reward_id = await till.reward(max_total=2)
    made = (await till.reserve(reward_id=reward_id, quantity=2)).redemption
    clock.advance(days=1)

    assert (await till.confirm(made.id)).status == "EXPIRED"
    assert await till.stock(reward_id) == ("ACTIVE", 0, 0)


async def test_reads_never_meet_an_overdue_one_as_pending(till: Till, clock: SettableClock) -> None:
    clock.set(NOON)
    one, _, three = [(await till.reserve("10", idempotency_key=f"k{n}")).redemption for n in range(3)]
    clock.advance(hours=1)
    young = (await till.reserve("10")).redemption
    clock.advance(hours=23)

    assert (await till.get(one.id)).status == "EXPIRED"
    replay = await till.reserve("10", idempotency_key="k1")
    assert (replay.replayed, replay.redemption.status) == (True, "EXPIRED")
    listed = await till.listed()
    assert [(r.id, r.status) for r in listed[:2]] == [(young.id, "PENDING"), (three.id, "EXPIRED")]
    assert await till.listed(status="PENDING") == listed[:1]
    assert await till.desk.buckets() == ("90", "10", "0")
    assert await till.expire_due() == 0


async def test_no_read_meets_one_of_more_that_are_overdue_than_it_expires(
    till: Till, clock: SettableClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(limits, "DUE_REDEMPTIONS", 1)
    clock.set(NOON)
    overdue = {(await till.reserve("10")).redemption.id for _ in range(4)}
    clock.advance(hours=1)
    young = (await till.reserve("10")).redemption
    clock.advance(hours=23)

    assert [made.id for made in await till.listed(status="PENDING")] == [young.id]
    seen = await till.listed(status="EXPIRED")
    assert ({made.id for made in seen}, {made.status for made in seen}) == (overdue, {"EXPIRED"})
    assert [made.status for made in await till.listed()] == ["PENDING", *["EXPIRED"] * 4]
    assert await till.listed(status="CANCELED") == []
    # Each of the four reads has given one back.
    assert await till.desk.buckets() == ("90", "10", "0")


async def test_all_that_is_overdue_expires_together(lot_till: Till, clock: SettableClock) -> None:
    clock.set(NOON)
    await lot_till.desk.credit("100")
    rewards = [await lot_till.reward(max_total=1) for _ in range(3)]
    for reward_id in rewards:
        await lot_till.reserve(reward_id=reward_id)
    await lot_till.reserve("5")
    clock.advance(days=1)

    assert await lot_till.expire_due() == 4
    assert await lot_till.desk.buckets() == ("100", "0", "0")
    assert [await lot_till.stock(reward_id) for reward_id in rewards] == [("ACTIVE", 0, 0)] * 3


async def test_making_a_reservation_twice_makes_one_and_it_has_the_id_it_was_given(till: Till) -> None:
    redemption_id = new_id()
    key = f"automation:redemption:{redemption_id}"
    first = await till.reserve("10", redemption_id=redemption_id, idempotency_key=key)
    again = await till.reserve("10", redemption_id=redemption_id, idempotency_key=key)

    assert (first.redemption.id, again.redemption.id) == (redemption_id, redemption_id)
    assert (first.replayed, again.replayed) == (False, True)
    assert first.redemption.idempotency_key is None, "nobody sent it"
    assert await till.desk.buckets() == ("90", "10", "0")


@pytest.mark.parametrize("seconds", [59, 2_592_001])
async def test_a_reservation_waits_a_minute_to_thirty_days(till: Till, seconds: int) -> None:
    with refused("bad_request"):
        await till.reserve("10", expires_in=timedelta(seconds=seconds))


async def test_every_gate_holds_for_a_reservation(till: Till) -> None:
    reward_id = await till.reward(max_per_participant=1)
    await till.reserve(reward_id=reward_id)
    with refused("participant_limit_exceeded"):
        await till.reserve(reward_id=reward_id)
    with refused("insufficient_balance"):
        await till.reserve("90.01")
    await till.set_status("SUSPENDED")
    with refused("participant_inactive"):
        await till.reserve("1")


@pytest.mark.parametrize("inventory_mode", ["SIMPLE", "LOT"])
async def test_of_confirm_cancel_and_expiry_at_once_exactly_one_wins(
    database: Database, organization: Tenant, inventory_mode: str
) -> None:
    till = Till.of(database, organization.id, await open_shop(database, organization.id, inventory_mode=inventory_mode))
    await till.desk.credit("100")
    reward_id = await till.reward(max_total=3)
    for _ in range(5):
        made = (await till.reserve(reward_id=reward_id, quantity=2)).redemption

        outcomes = await asyncio.gather(
            *(till.confirm(made.id), till.cancel(made.id), till.expire(made.id, at_once=True), till.confirm(made.id)),
            return_exceptions=True,
        )

        final = (await till.get(made.id)).status
        assert final in ("COMPLETED", "CANCELED", "EXPIRED")
        for outcome in outcomes:
            if isinstance(outcome, Refusal):
                assert outcome.code == "redemption_not_pending"
            else:
                assert isinstance(outcome, redemptions.Redemption)
                assert outcome.status == final
        if final == "COMPLETED":
            await till.reverse(made.id)
