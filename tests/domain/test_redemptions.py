"""Redemptions in one step, and reversals. Contract: redemptions.md 1, 2, 9 and 10 (A to E, G)."""

import asyncio
from collections.abc import AsyncIterator
from datetime import timedelta
from typing import Any
from uuid import UUID

import pytest

from db.session import Database
from domain import redemptions
from domain.balances import Holder
from domain.errors import Refusal
from domain.ids import new_id
from domain.pagination import PageRequest
from tests.builders import d, make_asset, make_group, make_participant, make_program, open_shop
from tests.conftest import SettableClock, Tenant
from tests.ledger_invariants import assert_ledger_invariants
from tests.redemptions_support import Till, plain, refused

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


# --- amount redemptions ----------------------------------------------------------------------------------------------


async def test_redeeming_spends_available_and_never_held(till: Till) -> None:
    await till.desk.credit("1600")
    await till.desk.hold("200")

    redemption = (await till.redeem("1000")).redemption

    assert (redemption.status, plain(redemption.amount), plain(redemption.reversed_amount)) == (
        "COMPLETED",
        "1000",
        "0",
    )
    assert await till.desk.buckets() == ("500", "200", "0")
    assert await till.desk.postings(redemption.journal_entry_id) == [
        ("PARTICIPANT", "AVAILABLE", "-1000"),
        ("SYSTEM_REDEMPTION", "AVAILABLE", "1000"),
    ]
    with refused("insufficient_balance"):
        await till.redeem("600")
    assert await till.desk.buckets() == ("500", "200", "0")


async def test_a_negative_balance_redeems_nothing(till: Till) -> None:
    await till.desk.debit("150", allow_negative=True)

    with refused("insufficient_balance"):
        await till.redeem("0.01")


@pytest.mark.parametrize(("amount", "code"), [("0", "bad_request"), ("-1", "bad_request"), ("1.005", "invalid_scale")])
async def test_an_amount_is_positive_and_fits_the_scale(till: Till, amount: str, code: str) -> None:
    with refused(code):
        await till.redeem(amount)


async def test_the_cap_holds_and_equal_is_allowed(till: Till) -> None:
    await till.desk.credit("900")
    await till.change_asset(max_transaction_amount=d("500"))

    await till.redeem("500")
    with refused("max_transaction_amount_exceeded"):
        await till.redeem("500.01")


async def test_gates_refuse_in_the_contracts_order(till: Till) -> None:
    """Everything is wrong at first; what is refused first is mended, and the next one shows."""
    await till.change_asset(max_transaction_amount=d("50"), status="ARCHIVED")
    await till.unlink_asset()
    await till.change_program(status="SUSPENDED")
    await till.set_status("SUSPENDED")

    async def refusal_of(amount: str) -> str:
        with pytest.raises(Refusal) as refusal:
            await till.redeem(amount)
        return refusal.value.code

    assert await refusal_of("1000.001") == "invalid_scale"
    assert await refusal_of("1000") == "participant_inactive"
    await till.set_status("ACTIVE")
    assert await refusal_of("1000") == "program_inactive"
    await till.change_program(status="ACTIVE")
    assert await refusal_of("1000") == "asset_archived"
    await till.change_asset(status="ACTIVE")
    assert await refusal_of("1000") == "asset_not_linked"
    await till.link_asset()
    assert await refusal_of("1000") == "max_transaction_amount_exceeded"
    await till.change_asset(max_transaction_amount=None)
    assert await refusal_of("1000") == "insufficient_balance"


@pytest.mark.parametrize("status", ["SUSPENDED", "ARCHIVED"])
async def test_only_an_active_program_redeems(till: Till, status: str) -> None:
    await till.change_program(status=status)

    with refused("program_inactive"):
        await till.redeem("1")


@pytest.mark.parametrize("what", ["program_id", "asset_id", "participant_id"])
async def test_unknown_ids_are_not_found(till: Till, what: str) -> None:
    with refused("not_found"):
        await till.redeem("1", **{what: new_id()})


async def test_expiry_is_only_for_redemptions_that_wait(till: Till) -> None:
    with refused("bad_request"):
        await till.redeem("1", expires_in=timedelta(hours=1))


async def test_metadata_is_kept_and_bounded(till: Till) -> None:
    made = (await till.redeem("1", metadata={"card": "4711", "n": d("1.50")})).redemption

    assert (await till.get(made.id)).metadata == {"card": "4711", "n": d("1.50")}
    with refused("bad_request"):
        await till.redeem("1", metadata={"x": "y" * (16 * 1024)})


async def test_what_its_flag_or_its_reward_wants_confirmed_is_not_redeemed_at_once(till: Till) -> None:
    plain_reward, careful = await till.reward(), await till.reward(requires_confirmation=True)

    assert await till.try_redeem("1", requires_confirmation=True) is None
    assert await till.try_redeem(reward_id=careful) is None
    assert await till.try_redeem(reward_id=plain_reward, requires_confirmation=True) is None
    assert await till.desk.entries() == 1, "her opening credit"
    assert await till.try_redeem(reward_id=plain_reward) is not None


# --- idempotency -----------------------------------------------------------------------------------------------------


async def test_a_key_redeems_once_and_shows_the_redemption_as_it_is_now(till: Till) -> None:
    first = await till.redeem("50", idempotency_key="k")
    again = await till.redeem("50.00", idempotency_key="k")

    assert (first.replayed, again.replayed) == (False, True)
    assert again.redemption == first.redemption
    with refused("idempotency_conflict"):
        await till.redeem("51", idempotency_key="k")
    await till.reverse(first.redemption.id, "20")
    assert (await till.redeem("50", idempotency_key="k")).redemption.status == "PARTIALLY_REVERSED"
    found = await till.consider("50", idempotency_key="k")
    assert found is not None
    assert found.id == first.redemption.id
    assert await till.desk.buckets() == ("70", "0", "0")


async def test_the_key_is_checked_before_every_state(till: Till) -> None:
    first = await till.redeem("100", idempotency_key="k")
    await till.set_status("CLOSED")
    await till.change_program(status="ARCHIVED")
    await till.change_asset(status="ARCHIVED", max_transaction_amount=d("1"))
    await till.unlink_asset()

    assert (await till.redeem("100", idempotency_key="k")).redemption.id == first.redemption.id


async def test_keys_belong_to_a_program(till: Till, database: Database, organization: Tenant) -> None:
    async with database.transaction(organization.id) as tx:
        other = till.using(program_id=await make_program(tx))
    await other.link_asset()

    first = await till.redeem("10", idempotency_key="k")
    second = await other.redeem("10", idempotency_key="k")

    assert (second.replayed, second.redemption.id != first.redemption.id) == (False, True)


async def test_amounts_and_items_share_their_keys(till: Till) -> None:
    reward_id = await till.reward()
    await till.redeem("10", idempotency_key="k")

    with refused("idempotency_conflict"):
        await till.redeem(reward_id=reward_id, idempotency_key="k")


async def test_a_refusal_leaves_the_key_free(till: Till) -> None:
    with refused("insufficient_balance"):
        await till.redeem("150", idempotency_key="k")
    await till.desk.credit("50")

    assert not (await till.redeem("150", idempotency_key="k")).replayed


async def test_an_item_without_quantity_is_the_same_as_one(till: Till) -> None:
    reward_id = await till.reward()
    first = await till.redeem(reward_id=reward_id, idempotency_key="k")

    again = await till.redeem(reward_id=reward_id, quantity=1, idempotency_key="k")

    assert again.redemption.id == first.redemption.id
    assert await till.stock(reward_id) == ("ACTIVE", 1, 1)


@pytest.mark.parametrize(
    "change",
    [
        {"description": "other"},
        {"metadata": {"a": 1}},
        {"requires_confirmation": True},
        {"requires_confirmation": True, "expires_in": timedelta(hours=1)},
    ],
)
async def test_every_semantic_field_makes_another_payload(till: Till, change: dict[str, Any]) -> None:
    await till.redeem("1", idempotency_key="k")

    with refused("idempotency_conflict"):
        await till.consider("1", idempotency_key="k", **change)


async def test_twenty_calls_with_one_key_redeem_once(till: Till) -> None:
    made = await asyncio.gather(*(till.redeem("10", idempotency_key="k") for _ in range(20)))

    assert sorted(created.replayed for created in made) == [False] + [True] * 19
    assert len({created.redemption.id for created in made}) == 1
    assert await till.desk.buckets() == ("90", "0", "0")


# --- items -----------------------------------------------------------------------------------------------------------


async def test_units_cost_their_price_and_count(till: Till) -> None:
    reward_id = await till.reward(unit_cost=d("12.5"), max_total=4, max_per_participant=3)

    made = (await till.redeem(reward_id=reward_id, quantity=3)).redemption

    assert (plain(made.amount), made.quantity, made.unit_cost, made.reversed_quantity) == ("37.5", 3, d("12.5"), 0)
    assert made.description.startswith("Redeemed: Mug")
    assert await till.stock(reward_id) == ("ACTIVE", 3, 3)
    with refused("participant_limit_exceeded"):
        await till.redeem(reward_id=reward_id)


async def test_the_last_unit_sells_it_out_and_too_many_get_nothing(till: Till) -> None:
    reward_id = await till.reward(max_total=3)

    with refused("reward_out_of_stock"):
        await till.redeem(reward_id=reward_id, quantity=4)
    made = (await till.redeem(reward_id=reward_id, quantity=3)).redemption
    assert await till.stock(reward_id) == ("OUT_OF_STOCK", 3, 3)
    with refused("reward_out_of_stock"):
        await till.redeem(reward_id=reward_id)
    await till.reverse(made.id, quantity=1)
    assert await till.stock(reward_id) == ("ACTIVE", 2, 2)
    await till.redeem(reward_id=reward_id)


@pytest.mark.parametrize("columns", [{"status": "DRAFT"}, {"status": "ARCHIVED"}, {"from": 1}, {"until": 0}])
async def test_a_reward_is_redeemed_while_it_is_active_and_in_its_window(
    till: Till, clock: SettableClock, columns: dict[str, Any]
) -> None:
    clock.set(NOON)
    now = clock()
    if "from" in columns:
        columns = {"available_from": now + timedelta(microseconds=1)}
    elif "until" in columns:
        columns = {"available_until": now}
    reward_id = await till.reward(**columns)

    with refused("reward_not_available"):
        await till.redeem(reward_id=reward_id)
    assert await till.stock(reward_id) == (columns.get("status", "ACTIVE"), 0, 0)
    await till.change_reward(
        reward_id, status="ACTIVE", available_from=now, available_until=now + timedelta(microseconds=1)
    )
    await till.redeem(reward_id=reward_id)


async def test_a_minimum_is_the_least_of_an_amount_based_reward(till: Till) -> None:
    reward_id = await till.reward(redemption_type="AMOUNT_BASED", unit_cost=d("25"))

    with refused("amount_below_minimum"):
        await till.redeem("24.99", reward_id=reward_id)
    await till.redeem("25", reward_id=reward_id)
    made = (await till.redeem("30.50", reward_id=reward_id)).redemption

    assert (made.quantity, made.reversed_quantity, made.unit_cost) == (None, None, d("25"))
    assert await till.stock(reward_id) == ("ACTIVE", 0, 0)
    with refused("bad_request"):
        await till.reverse(made.id, quantity=1)
    assert plain((await till.reverse(made.id, "0.5")).reversal.amount) == "0.5"


@pytest.mark.parametrize(
    ("kind", "fields"),
    [
        ("UNIT_BASED", {"amount": "10"}),
        ("UNIT_BASED", {"quantity": 0}),
        ("UNIT_BASED", {"quantity": 10**30}),
        ("AMOUNT_BASED", {"quantity": 1}),
        ("AMOUNT_BASED", {"amount": "10", "quantity": 1}),
        ("AMOUNT_BASED", {}),
    ],
)
async def test_the_unit_matches_the_reward(till: Till, kind: str, fields: dict[str, Any]) -> None:
    reward_id = await till.reward(redemption_type=kind)

    with refused("bad_request"):
        await till.redeem(reward_id=reward_id, **fields)


async def test_the_gates_of_an_item_come_in_the_contracts_order(till: Till) -> None:
    reward_id = await till.reward(unit_cost=d("60"), status="DRAFT", max_per_participant=1, max_total=2)
    await till.change_asset(max_transaction_amount=d("50"), status="ARCHIVED")

    async def refusal_of(**fields: Any) -> str:
        with pytest.raises(Refusal) as refusal:
            await till.redeem(**{"reward_id": reward_id, **fields})
        return refusal.value.code

    assert await refusal_of(quantity=3) == "asset_archived"
    await till.change_asset(status="ACTIVE")
    assert await refusal_of(quantity=3) == "reward_not_available"
    await till.change_reward(reward_id, status="ACTIVE")
    assert await refusal_of(quantity=3) == "participant_limit_exceeded"
    await till.change_reward(reward_id, max_per_participant=None)
    assert await refusal_of(quantity=3) == "reward_out_of_stock"
    assert await refusal_of(quantity=2) == "max_transaction_amount_exceeded"
    await till.change_asset(max_transaction_amount=None)
    assert await refusal_of(quantity=2) == "insufficient_balance"
    assert await till.stock(reward_id) == ("ACTIVE", 0, 0)


async def test_a_reward_of_nobody_is_refused_after_participant_and_program(till: Till) -> None:
    with refused("not_found"):
        await till.redeem(reward_id=new_id())
    await till.set_status("SUSPENDED")
    with refused("participant_inactive"):
        await till.redeem(reward_id=new_id())


async def test_a_reward_of_another_program_is_unknown_here(
    till: Till, database: Database, organization: Tenant
) -> None:
    reward_id = await till.reward()
    async with database.transaction(organization.id) as tx:
        elsewhere = till.using(program_id=await make_program(tx))

    with refused("not_found"):
        await elsewhere.redeem(reward_id=reward_id)


async def test_only_who_is_eligible_gets_it(till: Till) -> None:
    reward_id = await till.reward(eligibility='"vip" in participant.tags')

    with refused("reward_not_available"):
        await till.redeem(reward_id=reward_id)


async def test_fifty_buyers_get_ten_units_and_never_more(till: Till) -> None:
    reward_id = await till.reward(max_total=10)
    buyers = []
    for _ in range(50):
        buyer = till.using(holder=Holder("PARTICIPANT", await till.new_participant()))
        await buyer.desk.credit("10")
        buyers.append(buyer)

    outcomes = await asyncio.gather(*(buyer.redeem(reward_id=reward_id) for buyer in buyers), return_exceptions=True)

    lost = [outcome for outcome in outcomes if isinstance(outcome, BaseException)]
    assert [getattr(refusal, "code", refusal) for refusal in lost] == ["reward_out_of_stock"] * 40
    assert (await till.stock(reward_id))[:2] == ("OUT_OF_STOCK", 10)


async def test_one_participant_never_gets_more_than_allowed_however_often_at_once(till: Till) -> None:
    reward_id = await till.reward(unit_cost=d("1"), max_per_participant=3)

    outcomes = await asyncio.gather(*(till.redeem(reward_id=reward_id) for _ in range(10)), return_exceptions=True)

    assert sum(not isinstance(outcome, BaseException) for outcome in outcomes) == 3
    assert await till.stock(reward_id) == ("ACTIVE", 3, 3)


async def test_concurrent_redemptions_never_overdraw(till: Till) -> None:
    outcomes = await asyncio.gather(*(till.redeem("60") for _ in range(4)), return_exceptions=True)

    assert sum(not isinstance(outcome, BaseException) for outcome in outcomes) == 1
    assert await till.desk.buckets() == ("40", "0", "0")


# --- reversals -------------------------------------------------------------------------------------------------------


async def test_parts_are_given_back_until_nothing_remains(till: Till) -> None:
    made = (await till.redeem("100")).redemption

    await till.reverse(made.id, "30")
    now = await till.get(made.id)
    assert (now.status, plain(now.reversed_amount)) == ("PARTIALLY_REVERSED", "30")
    with refused("reversal_exceeds_redemption"):
        await till.reverse(made.id, "70.01")
    last = await till.reverse(made.id)
    assert plain(last.reversal.amount) == "70"
    assert (await till.get(made.id)).status == "FULLY_REVERSED"
    with refused("already_fully_reversed"):
        await till.reverse(made.id)
    with refused("already_fully_reversed"):
        await till.reverse(made.id, "1")
    assert await till.desk.postings(last.reversal.journal_entry_id) == [
        ("SYSTEM_REDEMPTION", "AVAILABLE", "-70"),
        ("PARTICIPANT", "AVAILABLE", "70"),
    ]
    assert await till.desk.buckets() == ("100", "0", "0")


async def test_units_go_back_at_the_frozen_price(till: Till) -> None:
    reward_id = await till.reward(unit_cost=d("10"))
    made = (await till.redeem(reward_id=reward_id, quantity=5)).redemption
    await till.change_reward(reward_id, unit_cost=d("99"), status="ARCHIVED")

    part = (await till.reverse(made.id, quantity=2)).reversal
    assert (plain(part.amount), part.quantity) == ("20", 2)
    assert await till.stock(reward_id) == ("ARCHIVED", 3, 3)
    with refused("reversal_exceeds_redemption"):
        await till.reverse(made.id, quantity=4)
    with refused("bad_request"):
        await till.reverse(made.id, "10")
    rest = (await till.reverse(made.id)).reversal
    assert (plain(rest.amount), rest.quantity) == ("30", 3)
    assert await till.desk.buckets() == ("100", "0", "0")


async def test_a_reversal_is_not_stopped_by_program_link_cap_or_archive(till: Till) -> None:
    made = (await till.redeem("100")).redemption
    await till.change_program(status="ARCHIVED")
    await till.change_asset(status="ARCHIVED", max_transaction_amount=d("1"))
    await till.unlink_asset()

    await till.reverse(made.id)

    assert await till.desk.buckets() == ("100", "0", "0")


@pytest.mark.parametrize("status", ["SUSPENDED", "CLOSED"])
async def test_a_reversal_needs_an_active_participant(till: Till, status: str) -> None:
    made = (await till.redeem("100")).redemption
    await till.set_status(status)

    with refused("participant_inactive"):
        await till.reverse(made.id)


async def test_a_reversals_key_works_once_whatever_came_after(till: Till) -> None:
    made = (await till.redeem("100")).redemption
    first = await till.reverse(made.id, "100", idempotency_key="k")
    await till.set_status("CLOSED")

    again = await till.reverse(made.id, "100.00", idempotency_key="k")

    assert (again.replayed, again.reversal) == (True, first.reversal)
    for change in ({"amount": "1"}, {"amount": None}, {"amount": "100", "reason": "other"}):
        with refused("idempotency_conflict"):
            await till.reverse(made.id, **{**change, "idempotency_key": "k"})


async def test_a_reversals_key_is_not_a_redemptions(till: Till) -> None:
    made = (await till.redeem("10", idempotency_key="k")).redemption

    assert not (await till.reverse(made.id, idempotency_key="k")).replayed


async def test_an_unknown_redemption_is_not_found(till: Till) -> None:
    for call in (till.reverse, till.get, till.confirm, till.cancel):
        with refused("not_found"):
            await call(new_id())
    assert await till.expire(new_id()) is None


async def test_concurrent_reversals_never_give_back_more_than_was_taken(till: Till) -> None:
    made = (await till.redeem("100")).redemption

    outcomes = await asyncio.gather(*(till.reverse(made.id, "30") for _ in range(10)), return_exceptions=True)

    assert sum(not isinstance(outcome, BaseException) for outcome in outcomes) == 3
    assert plain((await till.get(made.id)).reversed_amount) == "90"


async def test_reversals_are_listed_as_they_were_booked_whenever_their_transactions_began(
    till: Till, clock: SettableClock
) -> None:
    """One that waits for its turn began before the one that it waited for."""
    clock.set("2025-01-15T12:00:00+00:00")
    made = (await till.redeem("100")).redemption
    clock.advance(minutes=5)
    first = (await till.reverse(made.id, "1")).reversal
    clock.set("2025-01-15T12:00:00+00:00")
    later = [(await till.reverse(made.id, amount)).reversal for amount in ("2", "3")]

    async with till.desk.database.transaction(till.desk.organization_id) as tx:
        listed = (await redemptions.find_reversals(tx, made.id, PageRequest())).items
    assert listed == [first, *later]
    assert [reversal.created_at for reversal in listed] == sorted({reversal.created_at for reversal in listed})
    assert (await till.get(made.id)).updated_at == later[-1].created_at


async def test_a_confirm_does_not_turn_the_time_back(till: Till, clock: SettableClock) -> None:
    clock.set("2025-01-15T12:00:00+00:00")
    made = (await till.reserve("100")).redemption
    clock.set("2025-01-15T11:59:59+00:00")

    confirmed = await till.confirm(made.id)

    assert confirmed.confirmed_at == confirmed.updated_at == made.created_at


# --- targets ---------------------------------------------------------------------------------------------------------


async def test_redeemed_value_may_go_to_breakage(till: Till) -> None:
    await till.change_program(redemption_target_type="SYSTEM_BREAKAGE")
    made = (await till.redeem("10")).redemption
    await till.change_program(redemption_target_type="SYSTEM_REDEMPTION")

    back = (await till.reverse(made.id)).reversal

    assert (await till.desk.postings(back.journal_entry_id))[0] == ("SYSTEM_BREAKAGE", "AVAILABLE", "-10")


@pytest.mark.parametrize("kind", ["GROUP", "PARTICIPANT", "PROGRAM"])
@pytest.mark.parametrize("inventory_mode", ["SIMPLE", "LOT"])
async def test_a_ledger_entity_gets_the_value_and_gives_it_back_though_it_has_spent_it(
    database: Database, organization: Tenant, kind: Any, inventory_mode: str
) -> None:
    shop = await open_shop(database, organization.id, inventory_mode=inventory_mode)
    till = Till.of(database, organization.id, shop)
    await till.desk.credit("100")
    async with database.transaction(organization.id) as tx:
        entity_id = shop.program_id
        if kind != "PROGRAM":
            entity_id = await (make_group if kind == "GROUP" else make_participant)(tx)
    await till.aim_at(entity_id)

    made = (await till.redeem("60")).redemption
    assert await till.desk.postings(made.journal_entry_id) == [
        ("PARTICIPANT", "AVAILABLE", "-60"),
        (kind, "AVAILABLE", "60"),
    ]
    assert (made.target_lot_id is not None) == (inventory_mode == "LOT" and kind != "PROGRAM")
    merchant = till.desk_of(kind, entity_id)
    if kind != "PROGRAM":
        await merchant.debit("50")
    await till.change_program(redemption_target_type="SYSTEM_REDEMPTION", redemption_target_entity_id=None)

    await till.reverse(made.id)

    assert await till.desk.buckets() == ("100", "0", "0")
    assert await merchant.buckets() == ("0" if kind == "PROGRAM" else "-50", "0", "0")


async def test_a_reversal_draws_on_the_redemptions_own_lot_first(lot_till: Till) -> None:
    await lot_till.desk.credit("100")
    merchant = lot_till.desk_of("PARTICIPANT", await lot_till.new_participant())
    await merchant.credit("5")
    await lot_till.aim_at(merchant.holder.id)
    first = (await lot_till.redeem("10")).redemption
    await lot_till.redeem("20")

    await lot_till.reverse(first.id, "4")
    assert [lot.remaining for lot in await merchant.lots()] == ["5", "6", "20"]
    await merchant.debit("5")
    await lot_till.reverse(first.id)
    assert [lot.remaining for lot in await merchant.lots()] == ["0", "0", "20"]


async def test_a_merchant_that_is_overdrawn_loses_the_lots_that_expired_by_their_own_entries(
    lot_till: Till, clock: SettableClock
) -> None:
    clock.set(NOON)
    await lot_till.desk.credit("100")
    merchant = lot_till.desk_of("PARTICIPANT", await lot_till.new_participant())
    await lot_till.aim_at(merchant.holder.id)
    made = (await lot_till.redeem("10")).redemption
    await merchant.debit("10")
    await merchant.grant("3", expires_at=clock() + timedelta(hours=1))
    clock.advance(hours=2)

    await lot_till.reverse(made.id)

    assert await merchant.buckets() == ("-10", "0", "0")
    assert await merchant.entries("EXPIRY") == 1


async def test_nobody_pays_himself(lot_till: Till) -> None:
    """It would wash the expiry out of his lots."""
    await lot_till.desk.credit("100")
    await lot_till.aim_at(lot_till.desk.holder.id)

    with refused("conflict"):
        await lot_till.redeem("10")
    with refused("conflict"):
        await lot_till.reserve("10")


async def test_redemptions_between_two_merchants_do_not_deadlock(
    till: Till, database: Database, organization: Tenant
) -> None:
    """Each one's program pays the other: whoever locks in any other order than by id meets himself."""
    other = till.using(holder=Holder("PARTICIPANT", await till.new_participant()))
    async with database.transaction(organization.id) as tx:
        second_program = await make_program(
            tx, redemption_target_type="LEDGER_ENTITY", redemption_target_entity_id=till.desk.holder.id
        )
    other = other.using(program_id=second_program)
    await other.link_asset()
    await other.desk.credit("100")
    await till.aim_at(other.desk.holder.id)

    await asyncio.gather(*(one.redeem("1") for one in (till, other) for _ in range(20)))

    assert [await one.desk.buckets() for one in (till, other)] == [("100", "0", "0")] * 2


async def test_prefunded_value_goes_to_the_target_and_not_to_the_wallet(
    database: Database, organization: Tenant
) -> None:
    shop = await open_shop(database, organization.id, issuance_policy="PREFUNDED")
    till = Till.of(database, organization.id, shop)
    await till.desk.fund("100")
    await till.desk.credit("100")

    await till.redeem("40")
    assert await till.desk.wallet() == "0"
    await till.aim_at(shop.program_id)
    made = (await till.redeem("40")).redemption
    assert await till.desk.wallet() == "40"
    await till.desk.credit("30")
    await till.reverse(made.id)

    assert await till.desk.wallet() == "-30"
    assert await till.desk.buckets() == ("90", "0", "0")


# --- lots ------------------------------------------------------------------------------------------------------------


async def test_lots_are_eaten_fifo_and_refilled_lifo(lot_till: Till, clock: SettableClock) -> None:
    clock.set(NOON)
    for _ in range(3):
        await lot_till.desk.credit("10")
        clock.advance(hours=1)
    a, b, c = (lot["id"] for lot in await lot_till.desk.lot_rows())

    made = (await lot_till.redeem("25")).redemption
    assert await lot_till.taken(made.id) == [(a, "10", "0"), (b, "10", "0"), (c, "5", "0")]
    await lot_till.reverse(made.id, "8")
    assert await lot_till.taken(made.id) == [(a, "10", "0"), (b, "10", "3"), (c, "5", "5")]
    assert [(lot.status, lot.remaining) for lot in await lot_till.desk.lots()] == [
        ("CONSUMED", "0"),
        ("AVAILABLE", "3"),
        ("AVAILABLE", "10"),
    ]
    await lot_till.reverse(made.id)
    assert [(lot.status, lot.remaining) for lot in await lot_till.desk.lots()] == [("AVAILABLE", "10")] * 3
    assert len(await lot_till.desk.lot_rows()) == 3, "no new lot"


async def test_expired_and_unmatured_lots_are_skipped(lot_till: Till, clock: SettableClock) -> None:
    clock.set(NOON)
    await lot_till.desk.grant("10", expires_at=clock() + timedelta(hours=1))
    await lot_till.desk.grant("10", matures_at=clock() + timedelta(days=1))
    clock.advance(hours=1)
    await lot_till.desk.credit("10")

    with refused("insufficient_balance"):
        await lot_till.redeem("10.01")
    await lot_till.redeem("10")

    assert [lot.remaining for lot in await lot_till.desk.lots()] == ["10", "10", "0"]


async def test_a_lot_that_expired_meanwhile_is_refilled_in_full_and_forfeited_by_the_next_run(
    lot_till: Till, clock: SettableClock
) -> None:
    clock.set(NOON)
    await lot_till.desk.grant("10", expires_at=clock() + timedelta(hours=1))
    made = (await lot_till.redeem("6")).redemption
    clock.advance(hours=2)
    assert await lot_till.desk.expire_due() == 1

    assert plain((await lot_till.reverse(made.id)).reversal.amount) == "6"
    assert await lot_till.desk.buckets() == ("6", "0", "0")
    with refused("insufficient_balance"):
        await lot_till.redeem("1")
    assert await lot_till.desk.expire_due() == 1
    assert await lot_till.desk.buckets() == ("0", "0", "0")


async def test_a_refill_finds_lots_that_are_held_now(lot_till: Till) -> None:
    await lot_till.desk.credit("10")
    made = (await lot_till.redeem("4")).redemption
    await lot_till.desk.hold()

    await lot_till.reverse(made.id)
    assert await lot_till.desk.buckets() == ("4", "6", "0")
    await lot_till.desk.release()
    assert [(lot.status, lot.remaining) for lot in await lot_till.desk.lots()] == [
        ("AVAILABLE", "6"),
        ("AVAILABLE", "4"),
    ]


async def test_a_reversal_repays_an_overdraft_first(lot_till: Till) -> None:
    await lot_till.desk.credit("10")
    made = (await lot_till.redeem("10")).redemption
    await lot_till.desk.debit("4", allow_negative=True)

    await lot_till.reverse(made.id)

    assert await lot_till.desk.buckets() == ("6", "0", "0")
    assert [lot.remaining for lot in await lot_till.desk.lots()] == ["6"]


async def test_more_lots_than_a_page_are_eaten_and_refilled(lot_till: Till, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("domain.limits.LOTS_PER_PAGE", 2)
    for _ in range(7):
        await lot_till.desk.credit("1")

    made = (await lot_till.redeem("6.5")).redemption
    await lot_till.reverse(made.id, "3")
    await lot_till.reverse(made.id)

    assert [lot.remaining for lot in await lot_till.desk.lots()] == ["1"] * 7


# --- lists -----------------------------------------------------------------------------------------------------------


async def test_lists_are_narrowed_by_every_filter(till: Till, clock: SettableClock) -> None:
    clock.set(NOON)
    reward_id = await till.reward()
    amount = (await till.redeem("1")).redemption
    clock.advance(hours=1)
    item = (await till.redeem(reward_id=reward_id)).redemption
    await till.reverse(amount.id)
    clock.advance(hours=1)
    pending = (await till.reserve("2")).redemption

    async def ids(**wanted: Any) -> list[UUID]:
        return [redemption.id for redemption in await till.listed(**wanted)]

    assert await ids() == [pending.id, item.id, amount.id]
    assert await ids(status="FULLY_REVERSED") == [amount.id]
    assert await ids(reward_id=reward_id) == [item.id]
    assert await ids(program_id=new_id()) == []
    assert await ids(asset_id=till.desk.asset_id) == [pending.id, item.id, amount.id]
    assert await ids(created_from=item.created_at) == [pending.id, item.id]
    assert await ids(created_to=item.created_at, status="COMPLETED") == [item.id]
    with refused("not_found"):
        await till.using(holder=Holder("PARTICIPANT", new_id())).listed()


async def test_other_organizations_see_nothing(till: Till, database: Database, new_organization: Any) -> None:
    made = (await till.redeem("1")).redemption
    stranger = till.using(organization_id=new_organization().id)

    for call in (stranger.get, stranger.reverse, stranger.confirm, stranger.cancel):
        with refused("not_found"):
            await call(made.id)
    with refused("not_found"):
        await stranger.listed()


async def test_assets_of_any_scale_redeem(database: Database, organization: Tenant, till: Till) -> None:
    async with database.transaction(organization.id) as tx:
        asset_id = await make_asset(tx, till.desk.program_id, scale=18)
    fine = till.using(asset_id=asset_id)
    await fine.desk.credit("1")

    made = (await fine.redeem("0.000000000000000001")).redemption
    await fine.reverse(made.id)

    assert await fine.desk.buckets() == ("1", "0", "0")
