"""Groups under concurrency, and what they have. Contract: holders.md 4, 8.1."""

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any
from uuid import UUID

import psycopg
import pytest

from db.session import Database, Transaction
from domain import groups
from domain.errors import Refusal
from domain.groups import GroupRole, NewMember
from domain.ids import new_id
from domain.ledger.balances import _PROGRAM_TOTALS, holder_totals
from domain.ledger.books import Bucket
from domain.ledger.journal import load_accounts, write
from domain.locks import lock_groups
from domain.pagination import PageRequest
from tests.builders import Shop, d, make_asset, make_group, make_participant, make_program, open_shop
from tests.conftest import Tenant

Work = Callable[[Transaction], Awaitable[Any]]


@pytest.fixture
async def shop(database: Database, organization: Tenant) -> Shop:
    return await open_shop(database, organization.id)


async def roles(tx: Transaction, group_id: UUID) -> dict[UUID, GroupRole]:
    """The active members of a group."""
    page = await groups.members(tx, group_id, include_former=False, page=PageRequest(200))
    return {member.participant_id: member.role for member in page.items}


async def outcomes(database: Database, organization: Tenant, *works: Work) -> list[str]:
    """What became of these works, each in its own transaction and all at once: `done`, or the code of the refusal."""

    async def outcome(work: Work) -> str:
        try:
            await database.repeat(organization.id, work)
        except Refusal as refusal:
            return refusal.code
        return "done"

    return sorted(await asyncio.gather(*(outcome(work) for work in works)))


def joins(group_id: UUID, participant_id: UUID) -> Work:
    return lambda tx: groups.add_members(tx, group_id, [NewMember(participant_id)], None)


def leaves(group_id: UUID, participant_id: UUID) -> Work:
    return lambda tx: groups.remove_member(tx, group_id, participant_id)


def steps_down(group_id: UUID, participant_id: UUID) -> Work:
    return lambda tx: groups.change_role(tx, group_id, participant_id, "MEMBER", None)


# --- Locks -------------------------------------------------------------------------------------------------------


async def test_groups_are_locked_by_id_and_unknown_ones_left_out(
    database: Database, organization: Tenant, new_organization: Any
) -> None:
    stranger = new_organization()
    async with database.transaction(stranger.id) as tx:
        foreign = await make_group(tx)
    async with database.transaction(organization.id) as tx:
        group_id = await make_group(tx, name="Mine")
        rows = await lock_groups(tx, [foreign, group_id, new_id()])

    assert {key: row["name"] for key, row in rows.items()} == {group_id: "Mine"}


async def test_the_gate_tells_unknown_and_archived_groups_apart(database: Database, organization: Tenant) -> None:
    async with database.transaction(organization.id) as tx:
        active, archived = await make_group(tx), await make_group(tx, status="ARCHIVED")
        rows = await lock_groups(tx, [active, archived])

    groups.require_active(rows[active])
    for row, code in ((rows[archived], "group_archived"), (None, "not_found")):
        with pytest.raises(Refusal) as refused:
            groups.require_active(row)
        assert refused.value.code == code


# --- An ACTIVE group always has an ADMIN -------------------------------------------------------------------------


async def test_twenty_admins_who_all_leave_or_step_down_leave_one(database: Database, organization: Tenant) -> None:
    async with database.transaction(organization.id) as tx:
        admins = [await make_participant(tx) for _ in range(20)]
        group_id = await make_group(tx, *admins)

    works = [(leaves, steps_down)[number % 2](group_id, admin) for number, admin in enumerate(admins)]
    results = await outcomes(database, organization, *works)

    assert results == ["done"] * 19 + ["last_admin"]
    async with database.transaction(organization.id) as tx:
        assert list((await roles(tx, group_id)).values()).count("ADMIN") == 1


async def test_two_admins_who_remove_each_other_leave_one(database: Database, organization: Tenant) -> None:
    for _ in range(5):
        async with database.transaction(organization.id) as tx:
            alice, bob = await make_participant(tx), await make_participant(tx)
            group_id = await make_group(tx, alice, bob)

        works = leaves(group_id, alice), leaves(group_id, bob)
        assert await outcomes(database, organization, *works) == ["done", "last_admin"]


async def test_one_participant_who_is_added_twenty_times_joins_once(database: Database, organization: Tenant) -> None:
    async with database.transaction(organization.id) as tx:
        group_id, bob = await make_group(tx), await make_participant(tx)

    works = [joins(group_id, bob)] * 20
    assert await outcomes(database, organization, *works) == ["conflict"] * 19 + ["done"]


async def test_nothing_changes_in_a_group_once_it_is_archived(database: Database, organization: Tenant) -> None:
    async with database.transaction(organization.id) as tx:
        people = [await make_participant(tx) for _ in range(9)]
        group_id = await make_group(tx)
    archived: list[dict[UUID, GroupRole]] = []

    async def archive(tx: Transaction) -> None:
        await groups.archive(tx, group_id)
        archived.append(await roles(tx, group_id))

    works = [joins(group_id, one) for one in people]
    results = await outcomes(database, organization, *works[:5], archive, *works[5:])

    async with database.transaction(organization.id) as tx:
        after = await roles(tx, group_id)
    assert archived == [after]
    assert results.count("done") == len(after)
    assert set(results) <= {"done", "group_archived"}


async def test_the_database_remembers_on_whose_behalf(
    database: Database, organization: Tenant, owner: psycopg.Connection[Any]
) -> None:
    async with database.transaction(organization.id) as tx:
        alice, bob = await make_participant(tx), await make_participant(tx)
        group = await groups.create(tx, "Family", [NewMember(alice, "ADMIN")], on_behalf_of=bob)
        await groups.add_members(tx, group.id, [NewMember(bob)], on_behalf_of=alice)

    rows = owner.execute(
        "select participant_id, changed_on_behalf_of from group_member where group_id = %s", (group.id,)
    ).fetchall()

    assert dict(rows) == {alice: bob, bob: alice}


# --- What a group has --------------------------------------------------------------------------------------------


async def credit(
    database: Database,
    organization: Tenant,
    group_id: UUID,
    asset_id: UUID,
    program_id: UUID,
    *amounts: str,
    bucket: Bucket = "AVAILABLE",
) -> None:
    """Credits to a group (debits, where negative) by entries of a program."""
    async with database.transaction(organization.id) as tx:
        groups.require_active((await lock_groups(tx, [group_id])).get(group_id))
        books = await load_accounts(tx, [group_id], [asset_id])
        wallet = books.account("GROUP", group_id, asset_id, bucket)
        for amount in map(d, amounts):
            source = books.system("SYSTEM_ISSUANCE" if amount > 0 else "SYSTEM_BREAKAGE", asset_id)
            books.post(
                "CREDIT" if amount > 0 else "DEBIT", [(source, -amount), (wallet, amount)], program_id=program_id
            )
        await write(tx, books)


async def test_a_total_is_all_buckets_together(database: Database, organization: Tenant, shop: Shop) -> None:
    async with database.transaction(organization.id) as tx:
        group_id = await make_group(tx)
        assert await holder_totals(tx, group_id) == []
    where = (database, organization, group_id, shop.asset_id, shop.program_id)
    await credit(*where, "100")
    await credit(*where, "20.5", bucket="HELD")
    await credit(*where, "0.07", bucket="DEFERRED")

    async with database.transaction(organization.id) as tx:
        assert [(t.asset_id, t.text) for t in await holder_totals(tx, group_id)] == [(shop.asset_id, "120.57")]
        # Made by hand, without the hold and the lot that operations make: only the sum is looked at.


async def test_a_programs_total_counts_its_own_entries_alone(
    database: Database, organization: Tenant, shop: Shop
) -> None:
    async with database.transaction(organization.id) as tx:
        group_id, other_group = await make_group(tx), await make_group(tx)
        elsewhere, unused = await make_program(tx), await make_program(tx)
        nights = await make_asset(tx, shop.program_id, scale=0, symbol="NIGHTS")
    here = (group_id, shop.asset_id, shop.program_id)
    await credit(database, organization, *here, "100")
    await credit(database, organization, *here, "5", bucket="HELD")
    await credit(database, organization, other_group, shop.asset_id, shop.program_id, "1000")
    await credit(database, organization, group_id, nights, shop.program_id, "2")
    # What one program gave is spent in another: its own sum goes below zero.
    await credit(database, organization, group_id, shop.asset_id, elsewhere, "-30")

    async def totals(program_id: UUID | None) -> dict[UUID, str]:
        async with database.transaction(organization.id) as tx:
            return {total.asset_id: total.text for total in await holder_totals(tx, group_id, program_id)}

    assert await totals(shop.program_id) == {shop.asset_id: "105.00", nights: "2"}
    assert await totals(elsewhere) == {shop.asset_id: "-30.00"}
    assert await totals(unused) == {}
    assert await totals(None) == {shop.asset_id: "75.00", nights: "2"}


async def test_a_programs_total_reads_only_the_groups_postings(
    database: Database, organization: Tenant, owner: psycopg.Connection[Any], shop: Shop
) -> None:
    """As the application's role: row-level security turns index conditions into filters where one isn't careful."""
    async with database.transaction(organization.id) as tx:
        small, large = await make_group(tx), await make_group(tx)
    await credit(database, organization, large, shop.asset_id, shop.program_id, *["1"] * 5_000)
    await credit(database, organization, small, shop.asset_id, shop.program_id, *["1"] * 20)
    owner.execute("analyze posting, journal_entry, account, asset")

    async with database.transaction(organization.id) as tx:
        holder = {"entity_id": small, "program_id": shop.program_id}
        params = {"organization_id": tx.organization_id, **holder, "sequence": None}
        explained: Any = f"explain (analyze, costs off, timing off) {_PROGRAM_TOTALS}"
        lines = [line for (line,) in await (await tx.execute(explained, params)).fetchall()]

    assert any("posting_version_key" in line for line in lines), lines
    assert not any("Seq Scan on posting" in line for line in lines), lines
    assert not any("Seq Scan on journal_entry" in line for line in lines), lines
