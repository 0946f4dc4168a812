"""The steps of two-step redemptions: in time or never, once, and one of them wins. Contract: redemptions.md 3.

docs/decisions/0007-answered-or-never.md.
"""

import asyncio
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable
from datetime import timedelta
from functools import partial
from typing import Any, TypeVar
from uuid import UUID

import pytest

from db.session import Database, Transaction
from domain import redemptions, two_step
from domain.errors import Refusal
from domain.ids import keyed_id, new_id
from domain.redemptions import ConfirmRequest, ReverseRequest
from domain.two_step import CancelOrder, ConfirmOrder, ExpireOrder, Order, RedemptionState, Reservation
from domain.upkeep import Swept, sweep
from tests.builders import d, open_shop
from tests.conftest import SettableClock, Tenant
from tests.ledger_invariants import assert_ledger_invariants
from tests.redemption_invariants import assert_redemption_invariants
from tests.redemptions_support import Till, refused

T = TypeVar("T")
NOON = "2025-01-15T12:00:00+00:00"
ROUNDS = 100


@pytest.fixture(params=["SIMPLE", "LOT"])
async def till(database: Database, organization: Tenant, request: pytest.FixtureRequest) -> AsyncIterator[Till]:
    """Alice's till, where she has 1000."""
    till = Till.of(database, organization.id, await open_shop(database, organization.id, inventory_mode=request.param))
    await till.desk.credit("1000")
    yield till
    async with database.transaction(organization.id) as tx:
        await assert_ledger_invariants(tx.connection, organization.id)
        await assert_redemption_invariants(tx.connection, organization.id)


async def run(till: Till, work: Callable[[Transaction], Awaitable[T]]) -> T:
    return await till.desk.database.repeat(till.desk.organization_id, work)


async def given(till: Till, order: Callable[[Transaction], T]) -> T:
    """The order that a call gives in its transaction."""
    async with till.desk.database.transaction(till.desk.organization_id) as tx:
        return order(tx)


async def prepared(till: Till, amount: str = "100", wait_s: float = 60, **fields: Any) -> Reservation:
    request = till.request(amount, requires_confirmation=True, **fields)
    return await given(till, lambda tx: two_step.prepare(tx, request, wait_s))


async def reserved(till: Till, amount: str = "100", **fields: Any) -> UUID:
    reservation = await prepared(till, amount, **fields)
    return (await run(till, lambda tx: two_step.reserve(tx, reservation))).redemption_id


def named(till: Till, redemption_id: UUID) -> dict[str, Any]:
    return {"organization_id": till.desk.organization_id, "redemption_id": redemption_id}


# --- once ------------------------------------------------------------------------------------------------------------


async def test_a_key_names_the_redemption_and_without_one_each_is_its_own(till: Till) -> None:
    keyed = [await prepared(till, idempotency_key="k") for _ in range(2)]
    keyless = [await prepared(till) for _ in range(2)]

    assert {made.redemption_id for made in keyed} == {keyed_id(till.desk.program_id, "redemption", "k")}
    assert len({made.redemption_id for made in keyless}) == 2


@pytest.mark.parametrize("key", [None, "k"])
async def test_a_reservation_that_is_made_twice_is_made_once(till: Till, key: str | None) -> None:
    reservation = await prepared(till, idempotency_key=key)

    first, second = [await run(till, lambda tx: two_step.reserve(tx, reservation)) for _ in range(2)]

    assert first.redemption_id == second.redemption_id == reservation.redemption_id
    assert (first.replayed, second.replayed) == (False, key is not None)
    assert (await till.get(first.redemption_id)).idempotency_key == key
    assert await till.desk.buckets() == ("900", "100", "0")


async def test_a_reversal_without_a_key_that_is_made_twice_is_made_once(till: Till) -> None:
    made = await reserved(till)
    await till.confirm(made)
    request = ReverseRequest(reason="returned", amount="30")
    order = await given(till, lambda tx: two_step.reverse_order(tx, made, request, 60))

    first, second = [await run(till, lambda tx: two_step.reverse(tx, order)) for _ in range(2)]

    assert (first.reversal_id, first.replayed) == (second.reversal_id, second.replayed)
    assert second.state.reversed_amount == d("30")


# --- in time or never ------------------------------------------------------------------------------------------------


async def test_a_reservation_that_is_late_is_refused_and_never_was(till: Till) -> None:
    reservation = await prepared(till, wait_s=0, idempotency_key="k")

    with refused("service_unavailable"):
        await run(till, lambda tx: two_step.reserve(tx, reservation))
    with refused("service_unavailable"):
        await run(till, lambda tx: two_step.outcome_of_reservation(tx, reservation))

    assert await till.desk.buckets() == ("1000", "0", "0")
    assert await reserved(till, idempotency_key="k") == reservation.redemption_id


async def test_orders_that_are_late_are_refused_and_change_nothing(till: Till) -> None:
    pending, taken = await reserved(till), await reserved(till)
    await till.confirm(taken)
    confirm = await given(till, lambda tx: two_step.confirm_order(tx, pending, ConfirmRequest(), 0))
    cancel = await given(till, lambda tx: two_step.cancel_order(tx, pending, "too late", 0))
    reverse = await given(till, lambda tx: two_step.reverse_order(tx, taken, ReverseRequest(reason="too late"), 0))

    with refused("service_unavailable"):
        await run(till, lambda tx: two_step.confirm(tx, confirm))
    with refused("service_unavailable"):
        await run(till, lambda tx: two_step.cancel(tx, cancel))
    with refused("service_unavailable"):
        await run(till, lambda tx: two_step.reverse(tx, reverse))
    with refused("service_unavailable"):
        await run(till, lambda tx: two_step.outcome_of_reversal(tx, reverse))

    assert await till.desk.buckets() == ("800", "100", "0")


@pytest.mark.parametrize("step", ["reserve", "confirm", "cancel", "reverse"])
async def test_a_step_that_stands_still_before_its_commit_is_never_committed(till: Till, step: str) -> None:
    """It had done all its work in time."""
    pending, taken = await reserved(till), await reserved(till)
    await till.confirm(taken)
    before = await till.desk.buckets()
    reservation = await prepared(till, wait_s=0.5)
    orders: dict[str, Callable[[Transaction], Order]] = {
        "confirm": lambda tx: two_step.confirm_order(tx, pending, ConfirmRequest(), 0.5),
        "cancel": lambda tx: two_step.cancel_order(tx, pending, "sold out", 0.5),
        "reverse": lambda tx: two_step.reverse_order(tx, taken, ReverseRequest(reason="returned"), 0.5),
    }
    order = reservation if step == "reserve" else await given(till, orders[step])
    assert order.not_after is not None

    with refused("service_unavailable"):
        async with till.desk.database.transaction(till.desk.organization_id) as tx:
            await getattr(two_step, step)(tx, order)
            await tx.execute("select pg_sleep_until(%s)", (order.not_after + timedelta(milliseconds=50),))

    assert await till.desk.buckets() == before
    assert len(await till.listed()) == 2


async def test_the_outcome_of_a_reservation_under_way_is_waited_for(till: Till) -> None:
    """It has written everything when it is asked about, and commits while the one who asks waits."""
    reservation = await prepared(till)
    database, organization_id = till.desk.database, till.desk.organization_id
    async with database.transaction(organization_id) as tx:
        await two_step.reserve(tx, reservation)
        asking = asyncio.create_task(run(till, lambda later: two_step.outcome_of_reservation(later, reservation)))
        await asyncio.wait([asking], timeout=0.2)
        assert not asking.done()

    created = await asking
    assert (created.redemption.id, created.replayed) == (reservation.redemption_id, False)


async def test_the_outcome_of_a_confirm_under_way_is_waited_for(till: Till) -> None:
    made = await reserved(till)
    pending = await till.get(made)
    order = await given(till, lambda tx: two_step.confirm_order(tx, made, ConfirmRequest(), 60))

    def outcome(tx: Transaction) -> Awaitable[redemptions.Redemption]:
        return two_step.outcome_of_order(tx, pending, lambda: redemptions.confirm(tx, made, ConfirmRequest()))

    with refused("service_unavailable"):
        await run(till, outcome)
    async with till.desk.database.transaction(till.desk.organization_id) as tx:
        await two_step.confirm(tx, order)
        asking = asyncio.create_task(run(till, outcome))
        await asyncio.wait([asking], timeout=0.2)
        assert not asking.done()

    assert (await asking).status == "COMPLETED"


# --- one of them wins ------------------------------------------------------------------------------------------------


async def test_of_confirm_cancel_and_expiry_exactly_one_wins(till: Till) -> None:
    """A hundred rounds; whoever loses is told so, and finds the winner's result."""
    winners: Counter[str] = Counter()
    for _ in range(ROUNDS):
        made = await reserved(till, "10")
        names = named(till, made)
        confirm, cancel = ConfirmOrder(**names), CancelOrder(**names, reason="no")
        results = await asyncio.gather(
            run(till, partial(two_step.confirm, order=confirm)),
            run(till, partial(two_step.cancel, order=cancel)),
            run(till, partial(two_step.expire, order=ExpireOrder(**names))),
            return_exceptions=True,
        )

        status = (await till.get(made)).status
        wanted = ["COMPLETED", "CANCELED", "EXPIRED"]
        for result, effect in zip(results, wanted, strict=True):
            if effect == "EXPIRED" or effect == status:
                assert isinstance(result, RedemptionState), result
                assert result.status == status
            else:
                assert isinstance(result, Refusal)
                assert result.code == "redemption_not_pending"
        winners[status] += 1
        if status == "COMPLETED":
            await till.reverse(made)

    assert sum(winners.values()) == ROUNDS
    assert await till.desk.buckets() == ("1000", "0", "0")
    assert await till.desk.entries("REDEMPTION") == winners["COMPLETED"]
    assert await till.desk.entries("RELEASE") == winners["CANCELED"] + winners["EXPIRED"]


# --- what others look after ------------------------------------------------------------------------------------------


async def test_every_pending_redemption_is_found_page_by_page(till: Till) -> None:
    made = [await reserved(till, "1") for _ in range(5)]
    await till.confirm(made[0])
    found, after = [], None
    while page := await two_step.pending_after(till.desk.database, after, limit=2):
        found += [pending.id for pending in page if pending.organization_id == till.desk.organization_id]
        after = page[-1]

    assert sorted(found) == sorted(made[1:])


async def test_upkeep_expires_what_nobody_expired_in_time(till: Till, clock: SettableClock) -> None:
    clock.set(NOON)
    reward_id = await till.reward(max_total=2)
    await reserved(till, "100", expires_in=timedelta(hours=1))
    item = Reservation(
        till.desk.organization_id,
        new_id(),
        till.request(reward_id=reward_id, quantity=2, requires_confirmation=True, expires_in=timedelta(hours=1)),
        (await prepared(till)).not_after,
    )
    await run(till, lambda tx: two_step.reserve(tx, item))
    await reserved(till, "5", expires_in=timedelta(hours=2))

    async def swept(**grace: Any) -> Swept:
        return (await sweep(till.desk.database, till.desk.organization_id, **grace))[0]

    clock.set("2025-01-15T13:00:30+00:00")
    assert await swept(hold_grace=timedelta(minutes=1)) == Swept()
    clock.set("2025-01-15T13:01:00+00:00")
    assert await swept(hold_grace=timedelta(minutes=1)) == Swept(redemptions_expired=2)
    assert await swept() == Swept()

    assert await till.desk.buckets() == ("995", "5", "0")
    assert await till.stock(reward_id) == ("ACTIVE", 0, 0)


async def test_upkeep_goes_on_past_one_that_cannot_be_expired(
    till: Till, clock: SettableClock, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    clock.set(NOON)
    made = [await reserved(till, "1", expires_in=timedelta(hours=1)) for _ in range(5)]
    poison = made[2]
    expire_overdue = redemptions.expire_overdue

    async def stumbling(tx: Transaction, until: Any, limit: int, skipped: Any) -> tuple[int, bool]:
        if poison in await redemptions.find_overdue(tx, until, limit, skipped):
            raise RuntimeError("it cannot be expired")
        return await expire_overdue(tx, until, limit, skipped)

    monkeypatch.setattr(redemptions, "expire_overdue", stumbling)
    clock.set("2025-01-15T13:00:00+00:00")

    done, finished = await sweep(till.desk.database, till.desk.organization_id)

    assert (done, finished) == (Swept(redemptions_expired=4, failed=1), True)
    assert str(poison) in caplog.text
    monkeypatch.undo()
    done, _ = await sweep(till.desk.database, till.desk.organization_id)
    assert done == Swept(redemptions_expired=1)
