"""Balances of system accounts: what their postings sum to, read from the newest checkpoint on. holders.md 8.1."""

import asyncio
from collections.abc import AsyncIterator
from decimal import Decimal
from uuid import UUID

import psycopg
import pytest

from db.session import Database
from domain.ledger.checkpoints import _SUMS, append_checkpoints, system_balance
from tests.builders import d, make_asset, open_shop
from tests.conftest import Tenant
from tests.holdings_support import Desk
from tests.ledger_invariants import assert_ledger_invariants


@pytest.fixture
async def desk(database: Database, organization: Tenant) -> AsyncIterator[Desk]:
    yield Desk.of(database, organization.id, await open_shop(database, organization.id))
    async with database.transaction(organization.id) as tx:
        await assert_ledger_invariants(tx.connection, organization.id)


async def account(desk: Desk, kind: str) -> UUID:
    async with desk.database.transaction(desk.organization_id) as tx:
        row = await tx.row("select id from account where asset_id = %s and entity_type = %s", (desk.asset_id, kind))
    assert row is not None
    found: UUID = row["id"]
    return found


async def balances(desk: Desk) -> tuple[Decimal, Decimal]:
    """What SYSTEM_ISSUANCE and SYSTEM_BREAKAGE hold."""
    issuance, breakage = await account(desk, "SYSTEM_ISSUANCE"), await account(desk, "SYSTEM_BREAKAGE")
    async with desk.database.transaction(desk.organization_id) as tx:
        return await system_balance(tx, issuance), await system_balance(tx, breakage)


async def checkpoint(desk: Desk) -> int:
    async with desk.database.transaction(desk.organization_id) as tx:
        return (await append_checkpoints(tx, min_entries=1)).written


async def test_a_system_account_holds_what_its_postings_sum_to_with_and_without_checkpoints(desk: Desk) -> None:
    await desk.credit("100")
    await desk.debit("30")
    assert await balances(desk) == (d("-100"), d("30"))

    assert await checkpoint(desk) == 2
    assert await balances(desk) == (d("-100"), d("30"))
    await desk.debit("5")
    assert await balances(desk) == (d("-100"), d("35"))


async def test_an_account_that_a_pass_does_not_touch_keeps_its_older_checkpoint(desk: Desk) -> None:
    await desk.credit("100")
    await desk.debit("30")
    await checkpoint(desk)
    await desk.credit("1")
    assert await checkpoint(desk) == 1, "only the issuance"
    await desk.debit("2")
    assert await checkpoint(desk) == 1, "only the breakage"
    assert await balances(desk) == (d("-101"), d("32"))


async def test_entries_that_touch_no_system_account_are_read_again(desk: Desk) -> None:
    await desk.credit("10")
    await checkpoint(desk)
    await desk.hold("5")

    assert await checkpoint(desk) == 0
    await desk.debit("1")
    assert await checkpoint(desk) == 1
    assert await balances(desk) == (d("-10"), d("1"))


async def test_a_full_span_that_touches_no_system_account_is_left_behind(
    desk: Desk, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Or the passes would stand still before it for ever."""
    await desk.credit("10")
    await checkpoint(desk)
    for _ in range(7):
        await desk.hold("1")
    await desk.debit("1")
    monkeypatch.setattr("domain.limits.CHECKPOINT_SPAN", 3)

    passes = []
    for _ in range(3):
        async with desk.database.transaction(desk.organization_id) as tx:
            passes.append(await append_checkpoints(tx, min_entries=1))

    assert [(done.written, done.until, done.more) for done in passes] == [(1, 4, True), (1, 7, True), (1, 9, False)]
    assert await balances(desk) == (d("-10"), d("1"))


async def test_a_pass_waits_until_it_is_worth_it(desk: Desk) -> None:
    for _ in range(3):
        await desk.credit("1")

    async with desk.database.transaction(desk.organization_id) as tx:
        assert await append_checkpoints(tx, min_entries=4) == (await append_checkpoints(tx))
        done = await append_checkpoints(tx, min_entries=3)
    assert (done.written, done.until, done.more) == (1, 3, False)


async def test_passes_at_the_same_time_are_all_true(desk: Desk) -> None:
    for _ in range(3):
        await desk.credit("1")

    await asyncio.gather(*(checkpoint(desk) for _ in range(5)), *(desk.credit("1") for _ in range(5)))
    await checkpoint(desk)

    assert (await balances(desk))[0] == d("-8")
    async with desk.database.transaction(desk.organization_id) as tx:
        rows = await tx.rows("select sequence, balance from system_checkpoint order by sequence")
    assert [(row["sequence"], row["balance"]) for row in rows] == [
        (row["sequence"], d(f"-{row['sequence']}")) for row in rows
    ]


async def test_assets_and_organizations_are_kept_apart(desk: Desk, new_organization: object) -> None:
    await desk.credit("10")
    async with desk.database.transaction(desk.organization_id) as tx:
        other = desk.using(asset_id=await make_asset(tx, desk.program_id))
    await other.credit("3")
    await checkpoint(desk)
    issuance = await account(desk, "SYSTEM_ISSUANCE")

    assert ((await balances(desk))[0], (await balances(other))[0]) == (d("-10"), d("-3"))
    async with desk.database.transaction(new_organization().id) as tx:  # type: ignore[operator]
        assert await system_balance(tx, issuance) == d("0")


async def test_checkpoints_are_never_changed(desk: Desk, owner: psycopg.Connection[object]) -> None:
    await desk.credit("10")
    await checkpoint(desk)

    with pytest.raises(psycopg.errors.RestrictViolation):
        owner.execute("update system_checkpoint set balance = 0 where organization_id = %s", (desk.organization_id,))


async def test_the_rest_is_read_entry_by_entry_through_indexes(desk: Desk) -> None:
    """What comes after a checkpoint costs what it is, however long the journal before it."""
    for _ in range(5):
        await desk.credit("1")
    params = {"organization_id": desk.organization_id, "after": 4, "until": 5, "account_id": None}

    async with desk.database.transaction(desk.organization_id) as tx:
        await tx.execute("set local enable_seqscan = off")
        lines = await (await tx.execute("explain " + _SUMS, params)).fetchall()

    conditions = [line for (line,) in lines if "Index Cond" in line]
    assert len(conditions) == 2
    assert "sequence >" in conditions[0]
    assert "entry_id" in conditions[1]
    assert all("organization_id" in condition for condition in conditions)
