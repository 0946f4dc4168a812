"""Keys that make a retry safe: the same key and payload takes effect once. Contract: README.md "Idempotency"."""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from decimal import Decimal
from typing import Any
from uuid import UUID

import orjson
from psycopg.types.json import Jsonb

from db.session import Transaction
from domain.clock import format_timestamp
from domain.errors import Refusal
from domain.money import format_plain

OPERATIONS = frozenset(
    {
        "event",
        "adjust",
        "hold",
        "release",
        "forfeit",
        "void_hold",
        "redemption",
        "redemption_reversal",
        "transfer",
        "fund",
        "burn",
    }
)


OUR_KEYS = "automation:"
"""Begins the keys that Scrip makes itself; the API refuses them from callers. Contract: README.md "Idempotency"."""


def is_ours(key: str | None) -> bool:
    """Whether the key is one of ours: then there is nothing to replay for a caller, only a step that was repeated."""
    return key is not None and key.startswith(OUR_KEYS)


@dataclass(frozen=True, slots=True)
class Claim:
    """What came of claiming a key: `result` is the first use's, whether that is this call or an earlier one."""

    replayed: bool
    result: dict[str, Any]


async def claim(
    tx: Transaction,
    program_id: UUID,
    operation: str,
    key: str | None,
    payload: Mapping[str, Any],
    result: Mapping[str, Any],
) -> Claim:
    """Consume `key` for `operation` with the meaning `payload`, remembering `result` (ids made beforehand, as text).

    The row is written with the effect, in the caller's transaction: only success consumes a key. Of two concurrent
    first uses the second waits here until the first has ended, then replays it (or takes its place if it failed).
    Without a key every call is new. Call it before any other lock is taken: keys come first in the lock order.

    `payload` holds every accepted field after defaults, amounts as Decimal. Numbers compare by value.
    Raises Refusal `idempotency_conflict` when the key was used with another payload.
    """
    assert operation in OPERATIONS, operation
    if key is None:
        return Claim(replayed=False, result=dict(result))
    digest = payload_hash(payload)
    inserted = await tx.execute(
        "insert into idempotency_key (organization_id, program_id, operation, key, payload_hash, result, created_at)"
        " values (%s, %s, %s, %s, %s, %s, %s) on conflict do nothing",
        (tx.organization_id, program_id, operation, key, digest, Jsonb(dict(result)), tx.now),
    )
    if inserted.rowcount == 1:
        return Claim(replayed=False, result=dict(result))
    # A statement of its own: under READ COMMITTED it sees the row of the winner that was waited for.
    cursor = await tx.execute(
        "select payload_hash, result from idempotency_key"
        " where organization_id = %s and program_id = %s and operation = %s and key = %s",
        (tx.organization_id, program_id, operation, key),
    )
    found = await cursor.fetchone()
    assert found is not None, "keys are never deleted"
    if bytes(found[0]) != digest:
        raise conflict(key)
    return Claim(replayed=True, result=found[1])


async def find(
    tx: Transaction, program_id: UUID, operation: str, key: str, payload: Mapping[str, Any]
) -> dict[str, Any] | None:
    """What the first use of `key` remembered; None where it hasn't been used. Nothing is consumed or waited for.

    `payload` as for `claim`. Raises Refusal `idempotency_conflict` when the key was used with another payload.
    """
    cursor = await tx.execute(
        "select payload_hash, result from idempotency_key"
        " where organization_id = %s and program_id = %s and operation = %s and key = %s",
        (tx.organization_id, program_id, operation, key),
    )
    found = await cursor.fetchone()
    if found is None:
        return None
    if bytes(found[0]) != payload_hash(payload):
        raise conflict(key)
    result: dict[str, Any] = found[1]
    return result


async def remember(
    tx: Transaction, program_id: UUID, operation: str, key: str | None, result: Mapping[str, Any]
) -> None:
    """Replace what a key that this transaction has claimed remembers: for results that are known only afterwards."""
    if key is None:
        return
    await tx.execute(
        "update idempotency_key set result = %s"
        " where organization_id = %s and program_id = %s and operation = %s and key = %s",
        (Jsonb(dict(result)), tx.organization_id, program_id, operation, key),
    )


def conflict(key: str) -> Refusal:
    """The refusal of a key that was used with another payload."""
    return Refusal("idempotency_conflict", f'the idempotency key "{key}" was used with another payload')


def payload_hash(payload: Mapping[str, Any]) -> bytes:
    """SHA-256 over the canonical JSON of `payload`: keys sorted, numbers by value (10 = 10.0), instants in UTC.

    A number and a text of the same digits differ, so an amount belongs into `payload` as a Decimal.
    """
    try:
        canonical = _dump(payload)
    except orjson.JSONEncodeError:
        canonical = _dump(_without_wide_integers(payload))
    return hashlib.sha256(canonical).digest()


def _dump(payload: Any) -> bytes:
    return orjson.dumps(payload, default=_canonical, option=orjson.OPT_SORT_KEYS | orjson.OPT_PASSTHROUGH_DATETIME)


def _without_wide_integers(value: Any) -> Any:
    """The same value with Decimals for integers, which orjson takes only up to 64 bits."""
    if isinstance(value, int) and not isinstance(value, bool):
        return Decimal(value)
    if isinstance(value, Mapping):
        return {key: _without_wide_integers(member) for key, member in value.items()}
    if isinstance(value, list | tuple):
        return [_without_wide_integers(member) for member in value]
    return value


def _canonical(value: Any) -> Any:
    if isinstance(value, Decimal):
        return orjson.Fragment(format_plain(value).encode())
    if isinstance(value, datetime):
        return format_timestamp(value)
    raise TypeError(f"cannot hash {type(value).__name__}")
