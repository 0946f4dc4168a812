"""What the database itself refuses, also when our code is wrong. Contract: holders.md 8.4; docs/ledger.md."""

from typing import Any
from uuid import UUID

import psycopg
import pytest

from db.session import Database
from domain.ids import new_id
from domain.ledger.journal import load_accounts, write
from domain.locks import lock_participants
from tests.builders import Shop, d, open_shop
from tests.conftest import Tenant
from tests.ledger_invariants import assert_ledger_invariants


async def credit(database: Database, organization: Tenant, shop: Shop) -> UUID:
    async with database.transaction(organization.id) as tx:
        await lock_participants(tx, [shop.alice])
        books = await load_accounts(tx, [shop.alice], [shop.asset_id])
        alice = books.account("PARTICIPANT", shop.alice, shop.asset_id, "AVAILABLE")
        source = books.system("SYSTEM_ISSUANCE", shop.asset_id)
        entry = books.post("CREDIT", [(source, d("-10")), (alice, d("10"))], program_id=shop.program_id)
        await write(tx, books)
    return entry.id


async def insert_posting(tx: Any, shop: Shop, entry_id: UUID, *amounts: str) -> None:
    await tx.execute(
        "insert into posting (organization_id, entry_id, ordinal, id, account_id, asset_id, amount)"
        " select a.organization_id, %s, m.ordinal + 100, gen_random_uuid(), a.id, a.asset_id, m.amount"
        " from account a, unnest(%s::numeric[]) with ordinality m (amount, ordinal)"
        " where a.organization_id = %s and a.asset_id = %s and a.entity_type = 'SYSTEM_ISSUANCE'",
        (entry_id, list(amounts), tx.organization_id, shop.asset_id),
    )


@pytest.mark.parametrize("table", ["journal_entry", "posting"])
@pytest.mark.parametrize("change", ["update {} set organization_id = organization_id", "delete from {}", "truncate {}"])
async def test_the_application_can_change_nothing_in_the_journal(
    database: Database, organization: Tenant, table: str, change: str
) -> None:
    await credit(database, organization, await open_shop(database, organization.id))

    with pytest.raises((psycopg.errors.InsufficientPrivilege, psycopg.errors.RestrictViolation)):
        async with database.transaction(organization.id) as tx:
            await tx.execute(change.format(table))


@pytest.mark.parametrize("table", ["journal_entry", "posting"])
@pytest.mark.parametrize("change", ["update {} set organization_id = organization_id", "delete from {}", "truncate {}"])
async def test_not_even_the_owner_of_the_tables_can(
    database: Database, organization: Tenant, owner: psycopg.Connection[Any], table: str, change: str
) -> None:
    await credit(database, organization, await open_shop(database, organization.id))

    with pytest.raises(psycopg.errors.RestrictViolation, match="append-only"):
        owner.execute(change.format(table))


async def test_postings_that_do_not_sum_to_zero_are_refused(database: Database, organization: Tenant) -> None:
    shop = await open_shop(database, organization.id)

    with pytest.raises(psycopg.errors.CheckViolation, match="sum to zero"):
        async with database.transaction(organization.id) as tx:
            await insert_posting(tx, shop, new_id(), "10", "-9.99")


async def test_an_entry_without_postings_is_refused(database: Database, organization: Tenant) -> None:
    with pytest.raises(psycopg.errors.CheckViolation, match="no postings"):
        async with database.transaction(organization.id) as tx:
            await tx.execute(
                "select seal_entries(%s, now(), json_build_array(json_build_object("
                "'id', gen_random_uuid(), 'program_id', gen_random_uuid(), 'action_type', 'CREDIT',"
                " 'body', '', 'tail', '')))",
                (organization.id,),
            )


async def test_a_sealed_entry_takes_no_more_postings(database: Database, organization: Tenant) -> None:
    shop = await open_shop(database, organization.id)
    entry_id = await credit(database, organization, shop)

    with pytest.raises(psycopg.errors.RestrictViolation, match="sealed already"):
        async with database.transaction(organization.id) as tx:
            await insert_posting(tx, shop, entry_id, "10", "-10")
    async with database.transaction(organization.id) as tx:
        await assert_ledger_invariants(tx.connection, organization.id)


async def test_a_posting_of_zero_is_refused(database: Database, organization: Tenant) -> None:
    shop = await open_shop(database, organization.id)

    with pytest.raises(psycopg.errors.CheckViolation, match="posting_amount_check"):
        async with database.transaction(organization.id) as tx:
            await insert_posting(tx, shop, new_id(), "0")


@pytest.mark.parametrize("table", ["journal_entry", "posting", "account", "chain_head", "idempotency_key"])
async def test_rows_of_another_organization_are_invisible(
    database: Database, organization: Tenant, new_organization: Any, table: str
) -> None:
    await credit(database, organization, await open_shop(database, organization.id))

    async with database.transaction(new_organization().id) as tx:
        query: Any = f"select from {table} where organization_id = %s"
        found = await tx.rows(query, (organization.id,))

    assert found == []


async def test_rows_cannot_be_written_for_another_organization(
    database: Database, organization: Tenant, new_organization: Any
) -> None:
    shop = await open_shop(database, organization.id)

    with pytest.raises(psycopg.errors.InsufficientPrivilege, match="row-level security"):
        async with database.transaction(new_organization().id) as tx:
            await tx.execute(
                "insert into account (organization_id, id, entity_type, entity_id, asset_id, bucket)"
                " values (%s, %s, 'PARTICIPANT', %s, %s, 'HELD')",
                (organization.id, new_id(), shop.alice, shop.asset_id),
            )
