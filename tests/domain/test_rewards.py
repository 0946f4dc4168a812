"""Stock, personal limits and eligibility, under concurrency. Contract: redemptions.md 2.2, 4.3, 4.4, 9.4.

Every redemption here is a transaction of its own that does what a real one does with its reward, in the same order.
"""

import asyncio
from collections import Counter
from collections.abc import Awaitable
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any
from uuid import UUID

import psycopg
import pytest

from db.session import Database, Transaction
from domain import rewards, state
from domain.errors import Refusal
from domain.locks import lock_participants
from domain.rewards import NewReward, Reward
from tests.builders import Shop, make_participant, make_program, open_shop
from tests.conftest import SettableClock, Tenant

NOON = datetime.fromisoformat("2025-01-15T12:00:00+00:00")


@dataclass(frozen=True)
class Catalog:
    """A shop's catalog, and what happens to it, each in a transaction of its own."""

    database: Database
    organization_id: UUID
    shop: Shop

    async def add(self, **fields: Any) -> UUID:
        """An ACTIVE UNIT_BASED reward that costs 5, unless `fields` say otherwise."""
        new = {
            "name": "Mug",
            "redemption_type": "UNIT_BASED",
            "asset_id": self.shop.asset_id,
            "unit_cost": "5",
            "status": "ACTIVE",
            **fields,
        }
        async with self.database.transaction(self.organization_id) as tx:
            return (await rewards.create(tx, self.shop.program_id, NewReward(**new))).id

    async def get(self, reward_id: UUID) -> Reward:
        async with self.database.transaction(self.organization_id) as tx:
            return await rewards.get(tx, self.shop.program_id, reward_id)

    async def change(self, reward_id: UUID, **changes: Any) -> Reward:
        async with self.database.transaction(self.organization_id) as tx:
            return await rewards.update(tx, self.shop.program_id, reward_id, changes)

    async def redeem(self, reward_id: UUID, quantity: int = 1, participant_id: UUID | None = None) -> None:
        """Take units for a participant, alice unless another one is named, after every check of the reward."""
        participant_id = participant_id or self.shop.alice
        async with self.database.transaction(self.organization_id) as tx:
            reward = await rewards.lock(tx, self.shop.program_id, reward_id)
            participant = (await lock_participants(tx, [participant_id]))[participant_id]
            rewards.require_redeemable(reward, tx.now)
            await rewards.require_eligible(tx, reward, participant)
            await rewards.require_allowance(tx, reward, participant_id, quantity)
            rewards.require_stock(reward, quantity)
            await rewards.take(tx, reward, participant_id, quantity)

    async def undo(self, reward_id: UUID, quantity: int = 1, participant_id: UUID | None = None) -> None:
        """Give units back."""
        async with self.database.transaction(self.organization_id) as tx:
            await rewards.lock(tx, self.shop.program_id, reward_id)
            await rewards.give_back(tx, reward_id, participant_id or self.shop.alice, quantity)

    async def usage(self, reward_id: UUID) -> dict[UUID, int]:
        """How many units of the reward each participant has."""
        async with self.database.transaction(self.organization_id) as tx:
            rows = await tx.rows(
                "select participant_id, quantity from reward_usage where organization_id = %s and reward_id = %s",
                (self.organization_id, reward_id),
            )
        return {row["participant_id"]: row["quantity"] for row in rows}

    async def stock(self, reward_id: UUID) -> tuple[int, str]:
        """What has been redeemed, and the status; what the participants have sums to it."""
        reward = await self.get(reward_id)
        assert sum((await self.usage(reward_id)).values()) == reward.redeemed_count
        return reward.redeemed_count, reward.status


@pytest.fixture
async def catalog(database: Database, organization: Tenant) -> Catalog:
    return Catalog(database, organization.id, await open_shop(database, organization.id))


async def code_of(call: Awaitable[Any]) -> str:
    with pytest.raises(Refusal) as refused:
        await call
    return refused.value.code


async def outcome(call: Awaitable[Any]) -> str:
    try:
        await call
    except Refusal as refusal:
        return refusal.code
    return "done"


# --- stock -----------------------------------------------------------------------------------------------------------


async def test_the_last_unit_makes_a_reward_out_of_stock(catalog: Catalog) -> None:
    mug = await catalog.add(max_total=3)

    await catalog.redeem(mug, 2)
    assert await catalog.stock(mug) == (2, "ACTIVE")
    await catalog.redeem(mug)
    assert await catalog.stock(mug) == (3, "OUT_OF_STOCK")
    assert await code_of(catalog.redeem(mug)) == "reward_out_of_stock"


async def test_a_quantity_above_the_stock_fails_outright_and_names_what_is_left(catalog: Catalog) -> None:
    mug = await catalog.add(max_total=3)
    await catalog.redeem(mug)

    with pytest.raises(Refusal) as refused:
        await catalog.redeem(mug, 3)

    assert refused.value.code == "reward_out_of_stock"
    assert (refused.value.problems[0].field, refused.value.problems[0].expected) == ("quantity", "at most 2")
    assert await catalog.stock(mug) == (1, "ACTIVE")


async def test_a_reward_without_limits_still_counts(catalog: Catalog) -> None:
    mug = await catalog.add()
    await catalog.redeem(mug, 1_000)
    assert await catalog.stock(mug) == (1_000, "ACTIVE")


async def test_units_that_come_back_put_the_reward_on_sale_again(catalog: Catalog) -> None:
    mug = await catalog.add(max_total=2)
    await catalog.redeem(mug, 2)

    await catalog.undo(mug)

    assert await catalog.stock(mug) == (1, "ACTIVE")
    await catalog.redeem(mug)
    assert await catalog.stock(mug) == (2, "OUT_OF_STOCK")


@pytest.mark.parametrize("status", ["DRAFT", "ARCHIVED"])
async def test_units_that_come_back_leave_a_withdrawn_reward_as_it_is(catalog: Catalog, status: str) -> None:
    mug = await catalog.add(max_total=2)
    await catalog.redeem(mug, 2)
    await catalog.change(mug, status=status)

    await catalog.undo(mug, 2)

    assert await catalog.stock(mug) == (0, status)


async def test_more_can_never_come_back_than_was_taken(catalog: Catalog) -> None:
    mug = await catalog.add(max_total=5)
    bob = await _participant(catalog)
    await catalog.redeem(mug, 2)
    await catalog.redeem(mug, 3, bob)

    with pytest.raises(psycopg.errors.CheckViolation):
        await catalog.undo(mug, 3)
    with pytest.raises(AssertionError):
        await catalog.undo(mug, 1, await _participant(catalog))

    assert await catalog.stock(mug) == (5, "OUT_OF_STOCK")


async def test_only_a_change_of_status_moves_updated_at(catalog: Catalog, clock: SettableClock) -> None:
    clock.set(NOON)
    mug = await catalog.add(max_total=2)

    clock.advance(hours=1)
    await catalog.redeem(mug)
    assert (await catalog.get(mug)).updated_at == NOON
    clock.advance(hours=1)
    await catalog.redeem(mug)
    assert (await catalog.get(mug)).updated_at == NOON + timedelta(hours=2)
    clock.advance(hours=1)
    await catalog.undo(mug)
    assert (await catalog.get(mug)).updated_at == NOON + timedelta(hours=3)


async def test_of_50_at_once_exactly_max_total_win(catalog: Catalog) -> None:
    mug = await catalog.add(max_total=10)
    buyers = [await _participant(catalog) for _ in range(50)]

    outcomes = Counter(await asyncio.gather(*(outcome(catalog.redeem(mug, 1, buyer)) for buyer in buyers)))

    assert outcomes == {"done": 10, "reward_out_of_stock": 40}
    assert await catalog.stock(mug) == (10, "OUT_OF_STOCK")


async def test_a_race_of_different_quantities_never_oversells(catalog: Catalog) -> None:
    mug = await catalog.add(max_total=10)

    outcomes = await asyncio.gather(*(outcome(catalog.redeem(mug, 1 + n % 4)) for n in range(30)))

    sold = sum(1 + n % 4 for n, code in enumerate(outcomes) if code == "done")
    assert await catalog.stock(mug) == (sold, "OUT_OF_STOCK")
    assert sold == 10


async def test_of_takes_and_returns_at_once_none_is_lost(catalog: Catalog) -> None:
    mug = await catalog.add(max_total=10)
    await catalog.redeem(mug, 10)

    returns = asyncio.gather(*(outcome(catalog.undo(mug)) for _ in range(10)))
    takes = Counter(await asyncio.gather(*(outcome(catalog.redeem(mug)) for _ in range(20))))

    assert set(await returns) == {"done"}
    count = takes["done"]
    assert await catalog.stock(mug) == (count, "OUT_OF_STOCK" if count == 10 else "ACTIVE")


async def test_lowering_the_stock_while_it_sells_keeps_to_either_the_old_or_the_new(catalog: Catalog) -> None:
    mug = await catalog.add(max_total=20)

    async def lower() -> str:
        return await outcome(catalog.change(mug, max_total=5))

    *bought, lowered = await asyncio.gather(*(outcome(catalog.redeem(mug)) for _ in range(30)), lower())

    sold = bought.count("done")
    assert await catalog.stock(mug) == (sold, "OUT_OF_STOCK")
    assert sold == (5 if lowered == "done" else 20)


# --- personal limits -------------------------------------------------------------------------------------------------


async def test_a_participant_has_at_most_their_limit_net_of_what_came_back(catalog: Catalog) -> None:
    mug = await catalog.add(max_per_participant=2)
    bob = await _participant(catalog)

    assert await code_of(catalog.redeem(mug, 3)) == "participant_limit_exceeded"
    await catalog.redeem(mug, 2)
    assert await code_of(catalog.redeem(mug)) == "participant_limit_exceeded"
    await catalog.redeem(mug, 2, bob)
    await catalog.undo(mug)
    await catalog.redeem(mug)

    assert await catalog.usage(mug) == {catalog.shop.alice: 2, bob: 2}


async def test_of_50_at_once_a_participant_wins_exactly_their_limit(catalog: Catalog) -> None:
    mug = await catalog.add(max_per_participant=10)
    bob = await _participant(catalog)

    buyers = [catalog.shop.alice, bob] * 25
    outcomes = Counter(await asyncio.gather(*(outcome(catalog.redeem(mug, 1, buyer)) for buyer in buyers)))

    assert outcomes == {"done": 20, "participant_limit_exceeded": 30}
    assert await catalog.usage(mug) == {catalog.shop.alice: 10, bob: 10}


async def test_a_lowered_personal_limit_blocks_only_new_units(catalog: Catalog) -> None:
    mug = await catalog.add()
    await catalog.redeem(mug, 5)

    await catalog.change(mug, max_per_participant=3)

    assert await code_of(catalog.redeem(mug)) == "participant_limit_exceeded"
    await catalog.undo(mug, 2)
    assert await code_of(catalog.redeem(mug)) == "participant_limit_exceeded"
    await catalog.undo(mug)
    await catalog.redeem(mug)
    assert await catalog.usage(mug) == {catalog.shop.alice: 3}


# --- status and window -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "code"),
    [
        ({"status": "DRAFT"}, "reward_not_available"),
        ({"status": "ARCHIVED"}, "reward_not_available"),
        ({"status": "OUT_OF_STOCK"}, "reward_out_of_stock"),
        ({"available_from": NOON + timedelta(days=1)}, "reward_not_available"),
        ({"available_until": NOON - timedelta(days=1)}, "reward_not_available"),
        ({"available_from": NOON}, "done"),
        ({"available_until": NOON}, "reward_not_available"),
        ({"available_from": NOON - timedelta(1), "available_until": NOON + timedelta(microseconds=1)}, "done"),
        ({"status": "OUT_OF_STOCK", "available_until": NOON}, "reward_out_of_stock"),  # the status comes first
    ],
)
async def test_only_an_active_reward_inside_its_window_can_be_redeemed(  # example E
    catalog: Catalog, clock: SettableClock, fields: dict[str, Any], code: str
) -> None:
    clock.set(NOON)
    mug = await catalog.add(**fields)

    assert await outcome(catalog.redeem(mug)) == code


# --- locks -----------------------------------------------------------------------------------------------------------


async def is_locked(catalog: Catalog, reward_id: UUID) -> bool:
    async with catalog.database.transaction(catalog.organization_id) as tx:
        free = await tx.rows(
            "select 1 from reward where organization_id = %s and id = %s for no key update skip locked",
            (catalog.organization_id, reward_id),
        )
    return not free


async def test_a_reward_is_locked_only_where_units_are_counted(catalog: Catalog) -> None:
    units = await catalog.add(name="Mug")
    cash = await catalog.add(name="Cash", redemption_type="AMOUNT_BASED")

    for reward_id, locked in ((units, True), (cash, False)):
        async with catalog.database.transaction(catalog.organization_id) as tx:
            await rewards.lock(tx, catalog.shop.program_id, reward_id)
            assert await is_locked(catalog, reward_id) is locked


async def test_an_amount_based_reward_stays_for_a_redemption_as_it_read_it(catalog: Catalog) -> None:
    cash = await catalog.add(name="Cash", redemption_type="AMOUNT_BASED")

    async with catalog.database.transaction(catalog.organization_id) as tx:
        before = await rewards.lock(tx, catalog.shop.program_id, cash)
        after = await catalog.change(cash, status="ARCHIVED", unit_cost="9")
        rewards.require_redeemable(before, tx.now)

    assert (before.terms.print(before.unit_cost), after.terms.print(after.unit_cost)) == ("5.00", "9.00")


async def test_a_reward_is_found_only_in_its_own_program(catalog: Catalog) -> None:
    mug = await catalog.add()
    async with catalog.database.transaction(catalog.organization_id) as tx:
        other = await make_program(tx)
        for call in (rewards.lock, rewards.get):
            assert await code_of(call(tx, other, mug)) == "not_found"
        assert await code_of(rewards.update(tx, other, mug, {"name": "Cup"})) == "not_found"


async def test_the_lock_reads_the_terms_between_program_and_asset(catalog: Catalog) -> None:
    mug = await catalog.add()
    scope = catalog.organization_id, catalog.shop.program_id, catalog.shop.asset_id
    async with catalog.database.transaction(catalog.organization_id) as tx:
        await tx.execute(
            "delete from program_asset where organization_id = %s and program_id = %s and asset_id = %s", scope
        )
        await tx.execute("update program set status = 'SUSPENDED' where organization_id = %s and id = %s", scope[:2])
        terms = (await rewards.lock(tx, catalog.shop.program_id, mug)).terms

    assert (terms.program_status, terms.asset_status, terms.is_linked) == ("SUSPENDED", "ACTIVE", False)
    assert (terms.program_id, terms.asset_id, terms.scale) == (catalog.shop.program_id, catalog.shop.asset_id, 2)


# --- eligibility -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("expression", "is_eligible"),
    [
        ('"vip" in participant.tags', True),
        ('"staff" in participant.tags', False),
        ("participant.counters.visits >= 3", True),
        ("participant.counters.visits > 3", False),
        ('participant.attributes["country"] == "AT"', True),
        ('participant.external_id == "alice" && participant.status == "ACTIVE"', True),
        (
            '"vip" in participant.tags && participant.counters.visits == 3 && participant.attributes.country == "AT"',
            True,
        ),
        ('participant.tags.exists(t, t.startsWith("v"))', True),
        ("participant.counters.size() == 2", True),
        ('now() < timestamp("2025-01-15T12:00:01Z")', True),
        ("true", True),
        # A counter whose window has elapsed reads 0.
        ("participant.counters.today == 0", True),
        # What fails admits nobody.
        ("participant.counters.missing > 0", False),
        ('get(participant.counters, "missing", 7) == 7', True),
        ('participant.tiers.gold.level == "gold"', False),
        ("participant.counters.visits", False),
        ("1 / 0 == 1", False),
        ("participant.counters.visits > 'a'", False),
    ],
)
async def test_the_expression_says_who_may_have_it(
    catalog: Catalog, clock: SettableClock, expression: str, is_eligible: bool
) -> None:
    clock.set(NOON - timedelta(days=2))
    alice = await _participant(catalog, external_id="alice")
    async with catalog.database.transaction(catalog.organization_id) as tx:
        entity = await state.lock(tx, "participant", alice)
        await state.replace_tags(tx, entity, ["VIP", "early"])
        await state.merge_attributes(tx, entity, {"country": "AT"})
        await state.set_counter(tx, entity, "visits", "3", None)
        await state.set_counter(tx, entity, "today", "8", "24h")
    clock.set(NOON)
    mug = await catalog.add(eligibility=expression)

    with_state = await outcome(catalog.redeem(mug, 1, alice))

    assert with_state == ("done" if is_eligible else "reward_not_available")


async def test_who_is_not_eligible_is_told_so(catalog: Catalog) -> None:
    mug = await catalog.add(eligibility='"vip" in participant.tags')

    with pytest.raises(Refusal) as refused:
        await catalog.redeem(mug)

    assert refused.value.code == "reward_not_available"
    assert refused.value.problems[0].reason == "not_eligible"
    assert await catalog.stock(mug) == (0, "ACTIVE")


class CountingTransaction(Transaction):
    """A transaction that counts its statements."""

    statements = 0

    async def execute(self, query: Any, params: Any = None) -> Any:
        self.statements += 1
        return await super().execute(query, params)


@pytest.mark.parametrize(
    ("expression", "statements"),
    [
        (None, 0),
        ("now() > timestamp('2020-01-01T00:00:00Z')", 0),
        ("participant.id != ''", 0),
        ("participant.tags.size() == 0", 1),
        ("participant.tags.size() + participant.counters.size() + participant.attributes.size() == 0", 1),
    ],
)
async def test_only_what_the_expression_reads_is_loaded_and_in_one_query(
    catalog: Catalog, expression: str | None, statements: int
) -> None:
    mug = await catalog.get(await catalog.add(eligibility=expression))
    async with catalog.database.transaction(catalog.organization_id) as tx:
        alice = (await lock_participants(tx, [catalog.shop.alice]))[catalog.shop.alice]
        counting = CountingTransaction(tx.connection, tx.organization_id, tx.now)
        await rewards.require_eligible(counting, mug, alice)

    assert counting.statements == statements


async def test_an_expression_that_no_longer_compiles_admits_nobody(catalog: Catalog) -> None:
    mug = await catalog.add()
    async with catalog.database.transaction(catalog.organization_id) as tx:
        await tx.execute("update reward set eligibility = 'tru e' where id = %s", (mug,))

    assert await code_of(catalog.redeem(mug)) == "reward_not_available"


async def _participant(catalog: Catalog, **fields: Any) -> UUID:
    async with catalog.database.transaction(catalog.organization_id) as tx:
        return await make_participant(tx, **fields)
