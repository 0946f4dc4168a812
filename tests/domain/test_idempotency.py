"""Idempotency keys. Contract: README.md "Idempotency", basics.md 2.4 and examples 27 and 28."""

import asyncio
from datetime import UTC, datetime, timedelta, timezone
from decimal import Decimal
from typing import Any
from uuid import UUID, uuid4

import pytest

from db.session import Database
from domain.errors import Refusal
from domain.idempotency import Claim, claim, payload_hash
from domain.ids import new_id
from tests.conftest import Tenant

PROGRAM = UUID("0197f3b4-c1d2-7c3e-8f00-000000000001")


async def claimed(
    database: Database, organization: Tenant, key: str | None, payload: dict[str, Any], **where: Any
) -> Claim:
    async with database.transaction(organization.id) as tx:
        return await claim(
            tx,
            where.get("program_id", PROGRAM),
            where.get("operation", "hold"),
            key,
            payload,
            {"journal_entry_id": str(new_id())},
        )


async def test_the_same_key_and_payload_replays_the_first_result(  # example 27
    database: Database, organization: Tenant
) -> None:
    first = await claimed(database, organization, "K", {"amount": Decimal("10"), "asset_id": PROGRAM})
    second = await claimed(database, organization, "K", {"asset_id": PROGRAM, "amount": Decimal("10.0")})
    assert (first.replayed, second.replayed) == (False, True)
    assert second.result == first.result


async def test_another_payload_is_a_conflict(database: Database, organization: Tenant) -> None:
    await claimed(database, organization, "K", {"amount": Decimal("10")})
    with pytest.raises(Refusal) as refusal:
        await claimed(database, organization, "K", {"amount": Decimal("11")})
    assert (refusal.value.code, refusal.value.status) == ("idempotency_conflict", 409)


async def test_a_key_belongs_to_its_program_operation_and_organization(  # example 28
    database: Database, organization: Tenant, new_organization: Any
) -> None:
    await claimed(database, organization, "K", {"amount": Decimal("10")})
    for where in ({"program_id": uuid4()}, {"operation": "release"}):
        assert not (await claimed(database, organization, "K", {"amount": Decimal("99")}, **where)).replayed
    assert not (await claimed(database, new_organization(), "K", {"amount": Decimal("99")})).replayed


async def test_without_a_key_every_call_is_new(database: Database, organization: Tenant) -> None:
    results = [await claimed(database, organization, None, {"amount": Decimal("10")}) for _ in range(2)]
    assert results[0].result != results[1].result
    assert not any(result.replayed for result in results)


async def test_only_success_consumes_a_key(database: Database, organization: Tenant) -> None:
    async def fail() -> None:
        async with database.transaction(organization.id) as tx:
            await claim(tx, PROGRAM, "hold", "K", {"amount": Decimal("10")}, {})
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        await fail()
    assert not (await claimed(database, organization, "K", {"amount": Decimal("11")})).replayed


async def test_of_concurrent_first_uses_one_executes_and_the_others_replay_it(
    database: Database, organization: Tenant
) -> None:
    claims = await asyncio.gather(*(claimed(database, organization, "K", {"amount": Decimal("10")}) for _ in range(6)))
    assert sorted(result.replayed for result in claims) == [False, True, True, True, True, True]
    assert len({result.result["journal_entry_id"] for result in claims}) == 1


async def test_a_second_first_use_waits_and_takes_over_when_the_first_fails(
    database: Database, organization: Tenant
) -> None:
    async with database.transaction(organization.id) as tx:
        await claim(tx, PROGRAM, "hold", "K", {"amount": Decimal("10")}, {})
        waiting = asyncio.create_task(claimed(database, organization, "K", {"amount": Decimal("10")}))
        done, _ = await asyncio.wait([waiting], timeout=0.05)
        assert not done
        await tx.execute("rollback; begin")
    assert not (await waiting).replayed


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ({"a": 1, "b": 2}, {"b": 2, "a": 1}),
        ({"a": Decimal("10")}, {"a": Decimal("1E+1")}),
        ({"a": Decimal("-0.00")}, {"a": Decimal("0")}),
        ({"a": {"b": [Decimal("1.50")]}}, {"a": {"b": [Decimal("1.5")]}}),
        (
            {"a": datetime(2030, 1, 1, 12, tzinfo=UTC)},
            {"a": datetime(2030, 1, 1, 14, tzinfo=timezone(timedelta(hours=2)))},
        ),
    ],
)
def test_payloads_of_the_same_meaning_hash_alike(one: dict[str, Any], other: dict[str, Any]) -> None:
    assert payload_hash(one) == payload_hash(other)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ({"a": Decimal("10")}, {"a": "10"}),
        ({"a": None}, {}),
        ({"a": [1, 2]}, {"a": [2, 1]}),
        ({"a": "x"}, {"a": "x "}),
        ({"a": True}, {"a": 1}),
        ({"a": Decimal("0.1")}, {"a": Decimal("0.1000000000000000000000000001")}),
    ],
)
def test_payloads_of_different_meaning_hash_differently(one: dict[str, Any], other: dict[str, Any]) -> None:
    assert payload_hash(one) != payload_hash(other)


def test_an_integer_of_any_size_is_the_number_that_it_is() -> None:
    assert payload_hash({"quantity": 10**30}) == payload_hash({"quantity": Decimal(10**30)})
    assert payload_hash({"deep": [{"n": 2**64}]}) == payload_hash({"deep": [{"n": Decimal(2**64)}]})
    assert payload_hash({"n": 10**5000}) != payload_hash({"n": 10**5000 + 1})
    assert payload_hash({"n": 2**64, "yes": True}) != payload_hash({"n": 2**64, "yes": 1})
