"""Random days at the till: whatever comes after whatever, lots, holds, stock and ledger agree. redemptions.md 9.

Each walk draws operations on one participant's lots and on a merchant that is paid with them; refusals are part of it.
What must hold is checked against the tables as the walk goes on, and at its end everything is given back.
"""

from collections.abc import Awaitable, Callable
from datetime import timedelta
from random import Random
from typing import Any
from uuid import UUID

import pytest

from db.session import Database
from domain.errors import Refusal
from tests.builders import d, open_shop
from tests.conftest import SettableClock, Tenant
from tests.ledger_invariants import assert_ledger_invariants
from tests.redemptions_support import Till

STEPS = 60
CHECKED_EVERY = 10
EXPECTED = {
    "insufficient_balance",
    "redemption_not_pending",
    "redemption_not_confirmed",
    "already_fully_reversed",
    "reversal_exceeds_redemption",
    "reward_out_of_stock",
    "bad_request",
    "not_found",
}


@pytest.mark.parametrize("inventory_mode", ["LOT", "SIMPLE"])
@pytest.mark.parametrize("seed", range(4))
async def test_any_order_of_operations_keeps_everything_in_agreement(
    database: Database, organization: Tenant, clock: SettableClock, seed: int, inventory_mode: str
) -> None:
    clock.set("2025-01-15T12:00:00+00:00")
    draw = Random(f"{inventory_mode} {seed}")
    till = Till.of(database, organization.id, await open_shop(database, organization.id, inventory_mode=inventory_mode))
    merchant = till.desk_of("PARTICIPANT", await till.new_participant())
    if seed % 2:
        await till.aim_at(merchant.holder.id)
    reward_id = await till.reward(unit_cost=d("3"), max_total=12)
    made: list[UUID] = []
    refused: set[str] = set()

    async def remember(call: Awaitable[Any]) -> None:
        made.append((await call).redemption.id)

    def some() -> str:
        return str(draw.randint(1, 30))

    def soon() -> Any:
        return clock() + timedelta(minutes=draw.randint(1, 300))

    def any_made() -> UUID:
        return draw.choice(made) if made else reward_id

    steps: list[tuple[int, Callable[[], Awaitable[Any]]]] = [
        (4, lambda: till.desk.credit(some())),
        (3, lambda: till.desk.grant(some(), expires_at=soon() if inventory_mode == "LOT" else None)),
        (6, lambda: remember(till.redeem(some()))),
        (2, lambda: remember(till.redeem(reward_id=reward_id, quantity=draw.randint(1, 4)))),
        (6, lambda: remember(till.reserve(some(), expires_in=timedelta(minutes=draw.randint(1, 300))))),
        (3, lambda: remember(till.reserve(reward_id=reward_id, quantity=draw.randint(1, 4)))),
        (4, lambda: till.confirm(any_made())),
        (4, lambda: till.confirm(any_made(), some())),
        (3, lambda: till.confirm(any_made(), quantity=draw.randint(1, 3))),
        (3, lambda: till.cancel(any_made())),
        (3, lambda: till.reverse(any_made())),
        (5, lambda: till.reverse(any_made(), str(draw.randint(1, 9)))),
        (2, lambda: till.reverse(any_made(), quantity=1)),
        (3, lambda: till.desk.hold(draw.choice((None, some())))),
        (2, lambda: till.desk.release(draw.choice((None, some())))),
        (1, lambda: till.desk.forfeit(some(), bucket="HELD")),
        (2, lambda: till.desk.debit(some(), allow_negative=draw.random() < 0.5)),
        (1, lambda: merchant.debit(some())),
        (2, lambda: till.expire_due()),
        (2, lambda: till.desk.expire_due()),
    ]
    weights, calls = zip(*steps, strict=True)
    for step in range(1, STEPS + 1):
        clock.advance(minutes=draw.randint(0, 30))
        try:
            await draw.choices(calls, weights)[0]()
        except Refusal as refusal:
            refused.add(refusal.code)
        if step % CHECKED_EVERY == 0:
            await _check(database, organization)

    clock.advance(days=2)
    await till.expire_due()
    for redemption in await till.listed():
        assert redemption.status != "PENDING"
        if redemption.status in ("COMPLETED", "PARTIALLY_REVERSED"):
            await till.reverse(redemption.id)
    await _check(database, organization)
    assert (await till.stock(reward_id))[1:] == (0, 0)
    assert refused <= EXPECTED


async def _check(database: Database, organization: Tenant) -> None:
    async with database.transaction(organization.id) as tx:
        await assert_ledger_invariants(tx.connection, organization.id)
