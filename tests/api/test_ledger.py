"""The journal and its proofs over HTTP. Contract: holders.md 8, 9; endpoints.md "integrity"; README.md "Hash chain"."""

import hashlib
from decimal import Decimal
from typing import Any

import httpx
import psycopg
import pytest
import rfc8785
from sqlmodel import select

from db.session import Database
from db.tables import Participant
from domain.ids import new_id
from domain.money import format_plain
from tests.builders import Shop, open_shop
from tests.conftest import SettableClock, Tenant
from tests.servers import Postgres


@pytest.fixture
async def shop(database: Database, organization: Tenant) -> Shop:
    return await open_shop(database, organization.id)


async def credit(client: httpx.AsyncClient, shop: Shop, amount: str = "10", **fields: Any) -> str:
    body = {
        "program_id": str(shop.program_id),
        "asset_id": str(shop.asset_id),
        "type": "CREDIT",
        "amount": amount,
        "description": 'Goodwill \u2028 \u00e9\t"\\',
        **fields,
    }
    answer = await client.post(f"/participants/{shop.alice}/balances/adjust", json=body)
    assert answer.status_code == 200, answer.text
    return str(answer.json()["journal_entry_id"])


async def listed(client: httpx.AsyncClient, **query: Any) -> list[str]:
    answer = await client.get("/journal-entries", params=query)
    assert answer.status_code == 200, answer.text
    return [entry["id"] for entry in answer.json()["data"]]


async def test_an_entry_shows_everything_that_its_hash_covers(
    client: httpx.AsyncClient, shop: Shop, organization: Tenant
) -> None:
    entry = (await client.get(f"/journal-entries/{await credit(client, shop)}")).json()

    issuance, alice = entry["postings"]
    assert (issuance["entity_type"], issuance["entity_id"], issuance["amount"]) == ("SYSTEM_ISSUANCE", None, "-10.00")
    assert (alice["entity_type"], alice["participant_id"], alice["amount"]) == (
        "PARTICIPANT",
        str(shop.alice),
        "10.00",
    )
    assert "participant_id" not in issuance
    assert "program_id" not in alice
    assert alice["created_at"] == entry["created_at"]
    assert (entry["sequence"], entry["prev_hash"], entry["hash_version"]) == (1, "0" * 64, 1)
    assert entry["organization_id"] == str(organization.id)
    assert (entry["program_id"], entry["program_name"]) == (str(shop.program_id), "Loyalty")
    assert entry["created_by_api_key_id"] == str(organization.api_key_id)
    assert (entry["event_id"], entry["rule_id"], entry["reference_id"]) == (None, None, None)


async def test_anyone_can_verify_the_chain_from_what_the_api_shows(client: httpx.AsyncClient, shop: Shop) -> None:
    """Written with nothing of ours but the API's answers, as README.md describes the form."""
    entry_ids = [await credit(client, shop, amount) for amount in ("10", "0.50", "1234567890.1")]

    previous = "0" * 64
    for entry_id in entry_ids:
        entry = (await client.get(f"/journal-entries/{entry_id}")).json()
        document = {
            "version": entry["hash_version"],
            **{
                name: entry[name]
                for name in (
                    "sequence",
                    "prev_hash",
                    "id",
                    "organization_id",
                    "program_id",
                    "action_type",
                    "description",
                    "event_id",
                    "rule_id",
                    "reference_id",
                    "created_by_api_key_id",
                    "created_at",
                )
            },
            "postings": [
                {
                    **{name: line[name] for name in ("id", "entity_type", "entity_id", "asset_id", "bucket")},
                    "amount": format_plain(Decimal(line["amount"])),
                }
                for line in entry["postings"]
            ],
        }
        assert entry["prev_hash"] == previous
        previous = hashlib.sha256(rfc8785.dumps(document)).hexdigest()
        assert entry["entry_hash"] == previous


async def test_the_list_leaves_the_postings_out(client: httpx.AsyncClient, shop: Shop) -> None:
    first, second = await credit(client, shop), await credit(client, shop)

    answer = (await client.get("/journal-entries")).json()

    assert [entry["id"] for entry in answer["data"]] == [second, first]
    assert "postings" not in answer["data"][0]
    assert answer["data"][0]["program_name"] == "Loyalty"
    assert answer["pagination"] == {"has_more": False, "next_cursor": None}


async def test_a_printed_created_at_finds_its_row(client: httpx.AsyncClient, shop: Shop) -> None:
    for _ in range(3):
        await credit(client, shop)
    entries = (await client.get("/journal-entries")).json()["data"]
    middle = entries[1]

    assert await listed(client, **{"from": middle["created_at"], "to": middle["created_at"]}) == [middle["id"]]
    assert await listed(client, to=middle["created_at"]) == [entries[1]["id"], entries[2]["id"]]


async def test_filters_by_holder(
    client: httpx.AsyncClient, shop: Shop, database: Database, organization: Tenant
) -> None:
    entry_id = await credit(client, shop)
    async with database.transaction(organization.id) as tx:
        alice = await tx.first(select(Participant).where(Participant.id == shop.alice))
    assert alice is not None

    assert await listed(client, participant_id=str(shop.alice)) == [entry_id]
    assert await listed(client, external_id=alice.external_id) == [entry_id]
    assert await listed(client, external_id="nobody") == []
    assert await listed(client, group_id=str(new_id())) == []
    assert await listed(client, min_amount="10", max_amount="10.00") == [entry_id]
    assert await listed(client, max_amount="-10", bucket="AVAILABLE") == [entry_id]
    assert await listed(client, participant_id=str(shop.alice), max_amount="-10") == []


@pytest.mark.parametrize(
    ("query", "field"),
    [
        ({"participant_id": str(new_id()), "external_id": "a"}, "external_id"),
        ({"participant_id": str(new_id()), "group_id": str(new_id())}, "group_id"),
        ({"min_amount": "ten"}, "min_amount"),
        ({"max_amount": "1e5"}, "max_amount"),
        ({"max_amount": "NaN"}, "max_amount"),
        ({"bucket": "SPENT"}, "bucket"),
        ({"action_type": "GIFT"}, "action_type"),
        ({"from": "yesterday"}, "from"),
        ({"event_id": "x"}, "event_id"),
        ({"cursor": "YWJj"}, "cursor"),
        ({"limit": "0"}, "limit"),
    ],
)
async def test_a_bad_filter_is_named(client: httpx.AsyncClient, query: dict[str, str], field: str) -> None:
    answer = await client.get("/journal-entries", params=query)

    assert answer.status_code == 400
    assert answer.json()["details"]["field"] == field


async def test_an_unknown_entry_is_not_found(client: httpx.AsyncClient) -> None:
    assert (await client.get(f"/journal-entries/{new_id()}")).status_code == 404


async def test_an_empty_ledger_is_sound(client: httpx.AsyncClient, organization: Tenant) -> None:
    report = (await client.get("/reports/integrity")).json()

    assert report.pop("checked_at").endswith("Z")
    assert report == {
        "valid": True,
        "organization_id": str(organization.id),
        "checked_from_sequence": None,
        "checked_to_sequence": None,
        "entries_checked": 0,
        "head_sequence": 0,
        "head_hash": "0" * 64,
        "first_invalid_entry_id": None,
    }


async def test_the_integrity_report_attests_the_newest_entries(client: httpx.AsyncClient, shop: Shop) -> None:
    entry_ids = [await credit(client, shop) for _ in range(5)]

    report = (await client.get("/reports/integrity", params={"window": 2})).json()

    newest = (await client.get(f"/journal-entries/{entry_ids[-1]}")).json()
    assert report["valid"] is True
    assert (report["checked_from_sequence"], report["checked_to_sequence"], report["entries_checked"]) == (4, 5, 2)
    assert (report["head_sequence"], report["head_hash"]) == (5, newest["entry_hash"])


async def test_the_integrity_report_of_an_instant_ends_at_its_newest_entry(
    client: httpx.AsyncClient, shop: Shop, clock: SettableClock
) -> None:
    clock.set("2030-01-01T12:00:00Z")
    await credit(client, shop)
    await credit(client, shop)
    clock.advance(hours=1)
    await credit(client, shop)

    report = (await client.get("/reports/integrity", params={"as_of": "2030-01-01T12:30:00Z"})).json()

    assert (report["valid"], report["checked_to_sequence"], report["head_sequence"]) == (True, 2, 3)
    assert (await client.get("/reports/integrity", params={"as_of": "noon"})).json()["details"]["field"] == "as_of"


@pytest.mark.parametrize("window", ["0", "10001", "-1", "1.5", "all", ""])
async def test_a_window_is_1_to_10000(client: httpx.AsyncClient, window: str) -> None:
    answer = await client.get("/reports/integrity", params={"window": window})

    assert answer.status_code == 400
    assert answer.json()["details"]["field"] == "window"


async def test_tampering_is_named(client: httpx.AsyncClient, shop: Shop, postgres: Postgres) -> None:
    # holders.md example 15
    entry_ids = [await credit(client, shop) for _ in range(3)]
    assert (await client.get("/ledger/verify")).json()["valid"] is True
    with psycopg.connect(postgres.superuser_url, autocommit=True) as attacker:
        attacker.execute("set session_replication_role = replica")
        attacker.execute("update posting set amount = amount * 100 where entry_id = %s", (entry_ids[1],))

    verified = (await client.get("/ledger/verify")).json()
    attested = (await client.get("/reports/integrity")).json()

    assert (verified["valid"], verified["first_invalid_entry_id"]) == (False, entry_ids[1])
    assert "hash" in verified["problem"]
    assert (attested["valid"], attested["first_invalid_entry_id"]) == (False, entry_ids[1])


async def test_the_whole_check_answers_what_it_checked(
    client: httpx.AsyncClient, shop: Shop, organization: Tenant
) -> None:
    for _ in range(3):
        await credit(client, shop)

    answer = (await client.get("/ledger/verify")).json()

    assert (answer["valid"], answer["entries_checked"], answer["first_invalid_entry_id"]) == (True, 3, None)
    assert (answer["organization_id"], answer["head_sequence"]) == (str(organization.id), 3)
