"""Adjusting balances. Contract: holders.md 1, 6.2, 9; basics.md 6.8 and 8."""

import asyncio
from collections.abc import AsyncIterator
from dataclasses import replace
from typing import Any
from uuid import UUID

import pytest
from sqlalchemy import update
from sqlmodel import col

from db.session import Database
from db.tables import Asset, Group, Participant, Program
from domain import balances, wallet
from domain.balances import AdjustRequest, AdjustResult, Holder
from domain.errors import Refusal
from domain.ids import new_id
from domain.ledger import queries
from domain.pagination import PageRequest
from domain.wallet import WalletRequest
from tests.builders import Shop, d, make_asset, make_group, make_participant, make_program, open_shop
from tests.conftest import Tenant
from tests.ledger_invariants import assert_ledger_invariants
from tests.repetitions import nothing_repeated


@pytest.fixture(autouse=True)
async def sound_ledger(database: Database, organization: Tenant) -> AsyncIterator[None]:
    yield
    async with database.transaction(organization.id) as tx:
        await assert_ledger_invariants(tx.connection, organization.id)


def an_adjust(shop: Shop, type: Any = "CREDIT", amount: str = "10", **fields: Any) -> AdjustRequest:
    return AdjustRequest(
        program_id=shop.program_id,
        asset_id=shop.asset_id,
        type=type,
        amount=amount,
        description="by hand",
        **fields,
    )


async def adjust(
    database: Database, organization: Tenant, participant_id: UUID, request: AdjustRequest
) -> AdjustResult:
    async with database.transaction(organization.id) as tx:
        return await balances.adjust(tx, Holder("PARTICIPANT", participant_id), request)


async def fund(database: Database, organization: Tenant, shop: Shop, amount: str) -> None:
    async with database.transaction(organization.id) as tx:
        await wallet.fund(tx, WalletRequest(program_id=shop.program_id, asset_id=shop.asset_id, amount=amount))


async def postings_of(database: Database, organization: Tenant, entry_id: UUID) -> list[tuple[str, Any, str, str]]:
    async with database.transaction(organization.id) as tx:
        _, postings = await queries.get_entry(tx, entry_id)
    return [(p["entity_type"], p["entity_id"], p["bucket"], str(p["amount"])) for p in postings]


async def archive_asset(database: Database, organization: Tenant, shop: Shop) -> None:
    async with database.transaction(organization.id) as tx:
        await tx.run(update(Asset).where(col(Asset.id) == shop.asset_id).values(status="ARCHIVED"))


async def set_program_status(database: Database, organization: Tenant, shop: Shop, status: str) -> None:
    async with database.transaction(organization.id) as tx:
        await tx.run(update(Program).where(col(Program.id) == shop.program_id).values(status=status))


async def set_alice_status(database: Database, organization: Tenant, shop: Shop, status: str) -> None:
    async with database.transaction(organization.id) as tx:
        await tx.run(update(Participant).where(col(Participant.id) == shop.alice).values(status=status))


async def refusal_of(database: Database, organization: Tenant, shop: Shop, request: AdjustRequest) -> str:
    with pytest.raises(Refusal) as refused:
        await adjust(database, organization, shop.alice, request)
    return refused.value.code


async def test_an_unlimited_credit_comes_from_issuance(database: Database, organization: Tenant) -> None:
    shop = await open_shop(database, organization.id)

    result = await adjust(database, organization, shop.alice, an_adjust(shop))

    assert result.balance.available == 10
    assert await postings_of(database, organization, result.journal_entry_id) == [
        ("SYSTEM_ISSUANCE", None, "AVAILABLE", "-10"),
        ("PARTICIPANT", shop.alice, "AVAILABLE", "10"),
    ]


async def test_a_prefunded_credit_comes_from_the_wallet(database: Database, organization: Tenant) -> None:
    shop = await open_shop(database, organization.id, issuance_policy="PREFUNDED")
    await fund(database, organization, shop, "25")

    result = await adjust(database, organization, shop.alice, an_adjust(shop))

    assert await postings_of(database, organization, result.journal_entry_id) == [
        ("PROGRAM", shop.program_id, "AVAILABLE", "-10"),
        ("PARTICIPANT", shop.alice, "AVAILABLE", "10"),
    ]
    async with database.transaction(organization.id) as tx:
        page = await wallet.wallet_balances(tx, shop.program_id, asset_id=None, page=PageRequest())
    assert [balance.available for balance in page.items] == [15]


async def test_a_debit_goes_to_breakage(database: Database, organization: Tenant) -> None:
    shop = await open_shop(database, organization.id)
    await adjust(database, organization, shop.alice, an_adjust(shop))

    result = await adjust(database, organization, shop.alice, an_adjust(shop, "DEBIT", "4.5"))

    assert result.balance.available == d("5.5")
    assert await postings_of(database, organization, result.journal_entry_id) == [
        ("PARTICIPANT", shop.alice, "AVAILABLE", "-4.5"),
        ("SYSTEM_BREAKAGE", None, "AVAILABLE", "4.5"),
    ]


async def test_a_debit_may_overdraw_only_with_allow_negative(database: Database, organization: Tenant) -> None:
    shop = await open_shop(database, organization.id)
    await adjust(database, organization, shop.alice, an_adjust(shop))
    too_much = an_adjust(shop, "DEBIT", "10.01")

    assert await refusal_of(database, organization, shop, too_much) == "insufficient_balance"
    overdrawn = await adjust(database, organization, shop.alice, replace(too_much, allow_negative=True))

    assert overdrawn.balance.available == d("-0.01")


async def test_more_decimals_than_the_scale_are_refused(database: Database, organization: Tenant) -> None:
    # holders.md example 3, basics.md example 16
    shop = await open_shop(database, organization.id)

    assert await refusal_of(database, organization, shop, an_adjust(shop, amount="1.009")) == "invalid_scale"
    accepted = await adjust(database, organization, shop.alice, an_adjust(shop, amount="10.5000"))

    assert accepted.balance.available == d("10.5")


async def test_amounts_keep_every_digit(database: Database, organization: Tenant) -> None:
    shop = await open_shop(database, organization.id, scale=18)
    largest = "9" * 19 + "." + "9" * 18

    await adjust(database, organization, shop.alice, an_adjust(shop, amount=largest))
    twice = await adjust(database, organization, shop.alice, an_adjust(shop, amount=largest))

    assert twice.balance.available == d("1" + "9" * 19 + "." + "9" * 17 + "8")


async def test_the_ceiling_holds_for_credits_and_debits_and_allows_its_own_amount(
    database: Database, organization: Tenant
) -> None:  # basics.md example 17
    shop = await open_shop(database, organization.id, max_transaction_amount=d("100.00"))

    await adjust(database, organization, shop.alice, an_adjust(shop, amount="100.00"))

    above = an_adjust(shop, amount="100.01")
    assert await refusal_of(database, organization, shop, above) == "max_transaction_amount_exceeded"
    above = an_adjust(shop, "DEBIT", amount="100.01", allow_negative=True)
    assert await refusal_of(database, organization, shop, above) == "max_transaction_amount_exceeded"


async def test_a_short_wallet_refuses_the_credit_and_nothing_moves(database: Database, organization: Tenant) -> None:
    # basics.md example 21
    shop = await open_shop(database, organization.id, issuance_policy="PREFUNDED")
    await fund(database, organization, shop, "5.00")

    assert await refusal_of(database, organization, shop, an_adjust(shop)) == "insufficient_program_balance"

    accepted = await adjust(database, organization, shop.alice, an_adjust(shop, amount="5"))
    assert accepted.balance.available == 5


async def test_an_archived_asset_takes_no_credit(database: Database, organization: Tenant) -> None:
    # basics.md example 15
    shop = await open_shop(database, organization.id)
    before = await adjust(database, organization, shop.alice, an_adjust(shop))
    await archive_asset(database, organization, shop)

    assert await refusal_of(database, organization, shop, an_adjust(shop)) == "asset_archived"
    assert len(await postings_of(database, organization, before.journal_entry_id)) == 2


@pytest.mark.parametrize("status", ["SUSPENDED", "CLOSED"])
async def test_an_inactive_participant_is_refused(database: Database, organization: Tenant, status: str) -> None:
    shop = await open_shop(database, organization.id)
    await set_alice_status(database, organization, shop, status)

    assert await refusal_of(database, organization, shop, an_adjust(shop)) == "participant_inactive"


@pytest.mark.parametrize("status", ["SUSPENDED", "ARCHIVED"])
async def test_a_program_that_is_not_active_is_refused(database: Database, organization: Tenant, status: str) -> None:
    shop = await open_shop(database, organization.id)
    await set_program_status(database, organization, shop, status)

    assert await refusal_of(database, organization, shop, an_adjust(shop)) == "program_inactive"


async def test_of_several_reasons_the_first_gate_answers(database: Database, organization: Tenant) -> None:
    shop = await open_shop(database, organization.id, max_transaction_amount=d("5"))
    async with database.transaction(organization.id) as tx:
        program_id = await make_program(tx)
    elsewhere = replace(shop, program_id=program_id)
    await archive_asset(database, organization, shop)
    too_much = an_adjust(elsewhere, "DEBIT", "100")

    await set_alice_status(database, organization, shop, "SUSPENDED")
    await set_program_status(database, organization, elsewhere, "SUSPENDED")
    assert await refusal_of(database, organization, shop, replace(too_much, amount="1.001")) == "invalid_scale"
    assert await refusal_of(database, organization, shop, too_much) == "participant_inactive"
    await set_alice_status(database, organization, shop, "ACTIVE")
    assert await refusal_of(database, organization, shop, too_much) == "program_inactive"
    await set_program_status(database, organization, elsewhere, "ACTIVE")
    assert await refusal_of(database, organization, shop, too_much) == "asset_not_linked"
    assert await refusal_of(database, organization, shop, an_adjust(shop, "DEBIT", "100")) == "asset_archived"


async def test_ids_of_another_organization_are_unknown(
    database: Database, organization: Tenant, new_organization: Any
) -> None:
    shop = await open_shop(database, organization.id)
    stranger = new_organization()
    theirs = await open_shop(database, stranger.id)

    for program_id, asset_id, participant_id in [
        (theirs.program_id, shop.asset_id, shop.alice),
        (shop.program_id, theirs.asset_id, shop.alice),
        (shop.program_id, shop.asset_id, theirs.alice),
        (shop.program_id, shop.asset_id, new_id()),
    ]:
        with pytest.raises(Refusal) as refused:
            await adjust(database, organization, participant_id, an_adjust(Shop(program_id, asset_id, participant_id)))
        assert refused.value.code == "not_found"


async def test_a_credit_into_held_reserves_it_and_a_debit_takes_it_from_there(
    database: Database, organization: Tenant
) -> None:
    shop = await open_shop(database, organization.id)
    await adjust(database, organization, shop.alice, an_adjust(shop, bucket="HELD"))

    debited = await adjust(database, organization, shop.alice, an_adjust(shop, "DEBIT", "4", bucket="HELD"))

    assert (debited.balance.available, debited.balance.held) == (d("0"), d("6"))
    assert await postings_of(database, organization, debited.journal_entry_id) == [
        ("PARTICIPANT", shop.alice, "HELD", "-4"),
        ("SYSTEM_BREAKAGE", None, "AVAILABLE", "4"),
    ]
    too_much = an_adjust(shop, "DEBIT", "6.01", bucket="HELD")
    assert await refusal_of(database, organization, shop, too_much) == "insufficient_balance"


async def test_held_cannot_go_below_zero(database: Database, organization: Tenant) -> None:
    shop = await open_shop(database, organization.id)
    overdrawing = an_adjust(shop, "DEBIT", bucket="HELD", allow_negative=True)

    assert await refusal_of(database, organization, shop, overdrawing) == "bad_request"

    accepted = an_adjust(shop, "CREDIT", bucket="HELD", allow_negative=True)
    assert (await adjust(database, organization, shop.alice, accepted)).balance.held == 10


async def test_a_group_is_credited_and_debited_like_a_participant(database: Database, organization: Tenant) -> None:
    shop = await open_shop(database, organization.id)
    async with database.transaction(organization.id) as tx:
        group = Holder("GROUP", await make_group(tx))

    async def adjust_group(type: Any, amount: str) -> AdjustResult:
        async with database.transaction(organization.id) as tx:
            return await balances.adjust(tx, group, an_adjust(shop, type, amount))

    result = await adjust_group("CREDIT", "10")

    assert await postings_of(database, organization, result.journal_entry_id) == [
        ("SYSTEM_ISSUANCE", None, "AVAILABLE", "-10"),
        ("GROUP", group.id, "AVAILABLE", "10"),
    ]
    with pytest.raises(Refusal) as refused:
        await adjust_group("DEBIT", "10.01")
    assert refused.value.code == "insufficient_balance"
    async with database.transaction(organization.id) as tx:
        await tx.run(update(Group).where(col(Group.id) == group.id).values(status="ARCHIVED"))
    with pytest.raises(Refusal) as refused:
        await adjust_group("DEBIT", "1")
    assert refused.value.code == "group_archived"


async def test_a_replay_names_the_same_entry_and_shows_the_balance_of_now(
    database: Database, organization: Tenant
) -> None:
    shop = await open_shop(database, organization.id)
    request = an_adjust(shop, idempotency_key="welcome")
    first = await adjust(database, organization, shop.alice, request)
    await adjust(database, organization, shop.alice, an_adjust(shop, amount="1"))

    replay = await adjust(database, organization, shop.alice, replace(request, amount="10.00"))

    assert (first.replayed, replay.replayed) == (False, True)
    assert replay.journal_entry_id == first.journal_entry_id
    assert replay.balance.available == 11


@pytest.mark.parametrize(
    "change",
    [{"amount": "11"}, {"type": "DEBIT"}, {"description": "another"}, {"bucket": "HELD"}, {"allow_negative": True}],
    ids=lambda change: next(iter(change)),
)
async def test_a_key_with_another_payload_conflicts(
    database: Database, organization: Tenant, change: dict[str, Any]
) -> None:
    shop = await open_shop(database, organization.id)
    request = an_adjust(shop, idempotency_key="once")
    await adjust(database, organization, shop.alice, request)

    assert await refusal_of(database, organization, shop, replace(request, **change)) == "idempotency_conflict"


async def test_a_key_belongs_to_its_program(database: Database, organization: Tenant) -> None:
    # basics.md example 28
    shop = await open_shop(database, organization.id)
    async with database.transaction(organization.id) as tx:
        other_program = await make_program(tx)
        other_asset = await make_asset(tx, other_program)
    await adjust(database, organization, shop.alice, an_adjust(shop, idempotency_key="K"))

    elsewhere = Shop(other_program, other_asset, shop.alice)
    result = await adjust(database, organization, shop.alice, an_adjust(elsewhere, idempotency_key="K"))

    assert not result.replayed


async def test_a_refused_call_does_not_consume_its_key(database: Database, organization: Tenant) -> None:
    shop = await open_shop(database, organization.id)
    debit = an_adjust(shop, "DEBIT", "5", idempotency_key="later")
    assert await refusal_of(database, organization, shop, debit) == "insufficient_balance"
    await adjust(database, organization, shop.alice, an_adjust(shop))

    result = await adjust(database, organization, shop.alice, debit)

    assert not result.replayed
    assert result.balance.available == 5


async def test_fifty_concurrent_debits_leave_no_overdraft(database: Database, organization: Tenant) -> None:
    shop = await open_shop(database, organization.id)
    await adjust(database, organization, shop.alice, an_adjust(shop, amount="100"))

    with nothing_repeated(database):
        outcomes = await asyncio.gather(
            *(adjust(database, organization, shop.alice, an_adjust(shop, "DEBIT", "7")) for _ in range(50)),
            return_exceptions=True,
        )

    assert_winners(outcomes, 14, "insufficient_balance")
    left = await adjust(database, organization, shop.alice, an_adjust(shop, "DEBIT", "2"))
    assert left.balance.available == 0


async def test_fifty_concurrent_credits_never_overdraw_the_wallet(database: Database, organization: Tenant) -> None:
    shop = await open_shop(database, organization.id, issuance_policy="PREFUNDED")
    await fund(database, organization, shop, "100")
    async with database.transaction(organization.id) as tx:
        holders = [await make_participant(tx) for _ in range(10)]

    with nothing_repeated(database):
        outcomes = await asyncio.gather(
            *(adjust(database, organization, holders[i % 10], an_adjust(shop, amount="7")) for i in range(50)),
            return_exceptions=True,
        )

    assert_winners(outcomes, 14, "insufficient_program_balance")


async def test_credits_and_debits_of_many_holders_do_not_deadlock(database: Database, organization: Tenant) -> None:
    shop = await open_shop(database, organization.id, issuance_policy="PREFUNDED")
    await fund(database, organization, shop, "1000")
    async with database.transaction(organization.id) as tx:
        bob = await make_participant(tx)

    with nothing_repeated(database):
        outcomes = await asyncio.gather(
            *(
                adjust(
                    database,
                    organization,
                    (shop.alice, bob)[i % 2],
                    an_adjust(shop, ("CREDIT", "DEBIT")[i // 2 % 2], "1", allow_negative=True),
                )
                for i in range(40)
            )
        )

    assert len(outcomes) == 40


async def test_concurrent_uses_of_one_key_take_effect_once(database: Database, organization: Tenant) -> None:
    shop = await open_shop(database, organization.id)
    request = an_adjust(shop, idempotency_key="race")

    with nothing_repeated(database):
        results = await asyncio.gather(*(adjust(database, organization, shop.alice, request) for _ in range(20)))

    assert sum(result.replayed for result in results) == 19
    assert len({result.journal_entry_id for result in results}) == 1
    assert {result.balance.available for result in results} == {10}


def assert_winners(outcomes: list[AdjustResult | BaseException], winners: int, code: str) -> None:
    assert sum(isinstance(outcome, AdjustResult) for outcome in outcomes) == winners
    losers = [outcome for outcome in outcomes if not isinstance(outcome, AdjustResult)]
    assert all(isinstance(loser, Refusal) and loser.code == code for loser in losers), losers
