"""The canonical form of a journal entry, over which its hash is taken. Contract: README.md "Hash chain".

The form is RFC 8785 canonical JSON. Its keys in order are action_type, created_at, created_by_api_key_id, description,
event_id, id, organization_id, postings, prev_hash, program_id, reference_id, rule_id, sequence, version. Only
created_at, prev_hash and sequence depend on the place in the chain, so the rest is prepared before the chain is
locked, as two
fragments: `body` (from created_by_api_key_id to postings) and `tail` (from program_id to rule_id). The database puts
them together (seal_entries in db/migrations/sql); `entry_hash` here does it again for verification.
"""

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import datetime
from decimal import Decimal
from uuid import UUID

import orjson

from domain.clock import format_timestamp
from domain.money import format_plain

HASH_VERSION = 1
GENESIS_HASH = bytes(32)


@dataclass(frozen=True, slots=True)
class HashedPosting:
    """A posting as the hash sees it; `entity_id` is None for system accounts."""

    id: UUID
    entity_type: str
    entity_id: UUID | None
    asset_id: UUID
    bucket: str
    amount: Decimal


def entry_body(
    *,
    entry_id: UUID,
    organization_id: UUID,
    api_key_id: UUID | None,
    description: str | None,
    event_id: UUID | None,
    postings: Iterable[HashedPosting],
) -> str:
    """The fragment between `created_at` and `prev_hash`, without the commas around it."""
    lines = ",".join(
        f'{{"amount":"{format_plain(p.amount)}","asset_id":"{p.asset_id}","bucket":"{p.bucket}",'
        f'"entity_id":{_id(p.entity_id)},"entity_type":"{p.entity_type}","id":"{p.id}"}}'
        for p in postings
    )
    return (
        f'"created_by_api_key_id":{_id(api_key_id)},"description":{_text(description)},"event_id":{_id(event_id)},'
        f'"id":"{entry_id}","organization_id":"{organization_id}","postings":[{lines}]'
    )


def entry_tail(*, program_id: UUID, reference_id: str | None, rule_id: UUID | None) -> str:
    """The fragment between `prev_hash` and `sequence`, without the commas around it."""
    return f'"program_id":"{program_id}","reference_id":{_text(reference_id)},"rule_id":{_id(rule_id)}'


def entry_hash(
    *, action_type: str, created_at: datetime, body: str, prev_hash: bytes, tail: str, sequence: int
) -> bytes:
    """The SHA-256 of the whole canonical form."""
    form = (
        f'{{"action_type":"{action_type}","created_at":"{format_timestamp(created_at)}",{body},'
        f'"prev_hash":"{prev_hash.hex()}",{tail},"sequence":{sequence},"version":{HASH_VERSION}}}'
    )
    return hashlib.sha256(form.encode()).digest()


def _id(value: UUID | None) -> str:
    return "null" if value is None else f'"{value}"'


def _text(value: str | None) -> str:
    return "null" if value is None else orjson.dumps(value).decode()
