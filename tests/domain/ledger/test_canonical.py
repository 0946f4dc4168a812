"""The canonical form of an entry. Contract: README.md "Hash chain"; docs/ledger.md."""

import hashlib
from datetime import UTC, datetime
from decimal import Decimal
from typing import Any

import pytest
import rfc8785
from hypothesis import example, given
from hypothesis import strategies as st

from db.session import Database
from domain.ids import new_id
from domain.ledger import queries
from domain.ledger.canonical import GENESIS_HASH, HashedPosting, entry_body, entry_hash, entry_tail
from domain.ledger.journal import load_accounts, write
from domain.locks import lock_participants
from tests.builders import open_shop
from tests.conftest import SettableClock, Tenant
from tests.ledger_invariants import assert_ledger_invariants, canonical_document

# Whatever a request can carry: no NUL characters and no surrogates, both refused when the body is parsed.
TEXTS = st.text(st.characters(min_codepoint=1, exclude_categories=["Cs"]), max_size=60)
IDS = st.uuids()
AMOUNTS = st.decimals(allow_nan=False, allow_infinity=False, places=18, min_value=-(10**20), max_value=10**20)
HARD_TEXTS = [
    'quotes " and \\ and / and \x7f',
    "\x01\x08\t\n\x0b\x0c\r\x1f\x80\u2028\u2029\ufeff\uffff",
    "\u00e9 e\u0301 \U0001f4b0 \U0010ffff",
    "100 % of {0} $1 %s '; commit; --",
]
POSTINGS = st.lists(
    st.builds(
        HashedPosting,
        id=IDS,
        entity_type=st.sampled_from(["PARTICIPANT", "SYSTEM_ISSUANCE"]),
        entity_id=st.none() | IDS,
        asset_id=IDS,
        bucket=st.sampled_from(["AVAILABLE", "HELD", "DEFERRED"]),
        amount=AMOUNTS,
    ),
    min_size=1,
    max_size=4,
)


@given(
    description=st.none() | TEXTS,
    reference_id=st.none() | TEXTS,
    optional_ids=st.tuples(st.none() | IDS, st.none() | IDS, st.none() | IDS),
    postings=POSTINGS,
    created_at=st.datetimes(min_value=datetime(1970, 1, 1), max_value=datetime(9999, 1, 1), timezones=st.just(UTC)),  # noqa: DTZ001
    sequence=st.integers(1, 2**53 - 1),
    prev_hash=st.binary(min_size=32, max_size=32),
)
@example(HARD_TEXTS[1], None, (None, None, None), [], datetime(2024, 1, 1, tzinfo=UTC), 1, GENESIS_HASH)
def test_the_hash_is_over_the_rfc_8785_form(
    description: str | None,
    reference_id: str | None,
    optional_ids: tuple[Any, Any, Any],
    postings: list[HashedPosting],
    created_at: datetime,
    sequence: int,
    prev_hash: bytes,
) -> None:
    entry_id, organization_id, program_id = new_id(), new_id(), new_id()
    api_key_id, event_id, rule_id = optional_ids

    computed = entry_hash(
        action_type="CREDIT",
        created_at=created_at,
        body=entry_body(
            entry_id=entry_id,
            organization_id=organization_id,
            api_key_id=api_key_id,
            description=description,
            event_id=event_id,
            postings=postings,
        ),
        prev_hash=prev_hash,
        tail=entry_tail(program_id=program_id, reference_id=reference_id, rule_id=rule_id),
        sequence=sequence,
    )

    entry = {
        "id": entry_id,
        "program_id": program_id,
        "action_type": "CREDIT",
        "description": description,
        "event_id": event_id,
        "rule_id": rule_id,
        "reference_id": reference_id,
        "api_key_id": api_key_id,
        "created_at": created_at,
    }
    lines = [
        {name: getattr(posting, name) for name in ("id", "entity_type", "entity_id", "asset_id", "bucket", "amount")}
        for posting in postings
    ]
    document = canonical_document(organization_id, entry, lines, prev_hash, sequence)
    assert computed == hashlib.sha256(rfc8785.dumps(document)).digest()


@pytest.mark.parametrize(
    "instant", ["2024-01-15T10:30:00Z", "2024-01-15T10:30:00.000100Z", "2024-01-15T10:30:59.999999Z"]
)
async def test_the_database_seals_with_the_same_form(
    database: Database, organization: Tenant, clock: SettableClock, instant: str
) -> None:
    shop = await open_shop(database, organization.id, scale=18)
    clock.set(instant)
    async with database.transaction(organization.id, api_key_id=organization.api_key_id, request_id="req_1") as tx:
        await lock_participants(tx, [shop.alice])
        books = await load_accounts(tx, [shop.alice], [shop.asset_id])
        alice = books.account("PARTICIPANT", shop.alice, shop.asset_id, "AVAILABLE")
        issuance = books.system("SYSTEM_ISSUANCE", shop.asset_id)
        for text in HARD_TEXTS:
            for amount in (Decimal("1E+3"), Decimal("10.500"), Decimal("99999999999999999999.000000000000000001")):
                books.post(
                    "CREDIT",
                    [(issuance, amount.copy_negate()), (alice, amount)],
                    program_id=shop.program_id,
                    description=text,
                    reference_id=text,
                    event_id=new_id(),
                    rule_id=new_id(),
                )
        await write(tx, books)

    async with database.transaction(organization.id) as tx:
        await assert_ledger_invariants(tx.connection, organization.id)
        entry, postings = await queries.get_entry(tx, books.entries[0].id)
    assert entry["created_at"] == datetime.fromisoformat(instant)
    assert entry["description"] == HARD_TEXTS[0]
    assert [posting["amount"] for posting in postings] == [-1000, 1000]
