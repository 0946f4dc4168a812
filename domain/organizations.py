"""Organizations and API keys, managed by the command line alone. Contract: README.md "Organizations and API keys".

These functions run on a connection of the owning role, which sees every organization, and never commit.
"""

import hashlib
import secrets
from dataclasses import dataclass
from datetime import datetime
from typing import Any
from uuid import UUID

from psycopg import Connection
from psycopg.rows import class_row

from domain.errors import Refusal, not_found
from domain.ids import new_id

NAME_CHARS = 255


@dataclass(frozen=True, slots=True)
class OrganizationSummary:
    """An organization, its rate limit (requests per second, burst) and how many of its keys are valid."""

    id: UUID
    name: str
    rate_per_second: int
    rate_burst: int
    created_at: datetime
    active_keys: int


@dataclass(frozen=True, slots=True)
class KeySummary:
    """An API key without its secret; `hint` is the secret's last four characters."""

    id: UUID
    organization_id: UUID
    name: str
    hint: str
    created_at: datetime
    revoked_at: datetime | None


@dataclass(frozen=True, slots=True)
class NewKey:
    """A key that was just made: the only time its secret is known."""

    id: UUID
    secret: str


def create_organization(
    connection: Connection[Any], name: str, *, rate_per_second: int, rate_burst: int, now: datetime
) -> UUID:
    """Create an organization with an empty ledger; its id. Raises Refusal `bad_request` for a bad name or rate."""
    _require_name(name)
    if rate_per_second < 1 or rate_burst < 1:
        raise Refusal("bad_request", "rate and burst are at least 1")
    organization_id = new_id()
    connection.execute(
        "insert into organization (id, name, rate_per_second, rate_burst, created_at) values (%s, %s, %s, %s, %s)",
        (organization_id, name, rate_per_second, rate_burst, now),
    )
    # The genesis of the hash chain: sequence 0 and 32 zero bytes, older than any entry.
    connection.execute(
        "insert into chain_head (organization_id, sequence, hash, created_at)"
        " values (%s, 0, %s, '1970-01-01T00:00:00Z')",
        (organization_id, bytes(32)),
    )
    return organization_id


def list_organizations(connection: Connection[Any]) -> list[OrganizationSummary]:
    """Every organization, the oldest first."""
    with connection.cursor(row_factory=class_row(OrganizationSummary)) as cursor:
        return cursor.execute(
            "select o.id, o.name, o.rate_per_second, o.rate_burst, o.created_at,"
            " (select count(*) from api_key k where k.organization_id = o.id and k.revoked_at is null) as active_keys"
            " from organization o order by o.created_at, o.id"
        ).fetchall()


def create_key(connection: Connection[Any], organization_id: UUID, name: str, *, now: datetime) -> NewKey:
    """Create an API key. Only its SHA-256 is stored. Raises Refusal `not_found` for the organization."""
    _require_name(name)
    found = connection.execute("select 1 from organization where id = %s", (organization_id,)).fetchone()
    if found is None:
        raise not_found("organization")
    key = NewKey(new_id(), f"sk_{secrets.token_urlsafe(32)}")
    connection.execute(
        "insert into api_key (organization_id, id, name, key_hash, hint, created_at) values (%s, %s, %s, %s, %s, %s)",
        (organization_id, key.id, name, hashlib.sha256(key.secret.encode()).digest(), key.secret[-4:], now),
    )
    return key


def list_keys(connection: Connection[Any], organization_id: UUID | None = None) -> list[KeySummary]:
    """The keys of one organization, or of all, the oldest first."""
    with connection.cursor(row_factory=class_row(KeySummary)) as cursor:
        return cursor.execute(
            "select id, organization_id, name, hint, created_at, revoked_at from api_key"
            " where %(id)s::uuid is null or organization_id = %(id)s order by organization_id, created_at, id",
            {"id": organization_id},
        ).fetchall()


def revoke_key(connection: Connection[Any], key_id: UUID, *, now: datetime) -> None:
    """Make a key invalid from the next request on; again is a no-op. Raises Refusal `not_found`."""
    updated = connection.execute(
        "update api_key set revoked_at = coalesce(revoked_at, %s) where id = %s", (now, key_id)
    )
    if updated.rowcount == 0:
        raise not_found("API key")


def bootstrap(
    connection: Connection[Any], *, rate_per_second: int, rate_burst: int, now: datetime
) -> tuple[UUID, NewKey | None]:
    """The first organization with a key, made if there is no organization yet; None for a key that exists already."""
    # Two bootstraps at once would both find nothing.
    connection.execute("select pg_advisory_xact_lock(hashtext('scrip bootstrap'))")
    organizations = list_organizations(connection)
    if organizations:
        return organizations[0].id, None
    organization_id = create_organization(
        connection, "default", rate_per_second=rate_per_second, rate_burst=rate_burst, now=now
    )
    return organization_id, create_key(connection, organization_id, "first key", now=now)


def _require_name(name: str) -> None:
    if not 0 < len(name) <= NAME_CHARS or "\x00" in name:
        raise Refusal("bad_request", f"a name has 1 to {NAME_CHARS} characters")
