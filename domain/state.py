"""Tags, attributes and counters of participants, groups and programs, and their history. Contract: holders.md 5.

Everything that writes takes a `LockedEntity`: the entity's row lock is what makes read-then-write safe.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from datetime import datetime
from decimal import Decimal
from typing import Literal, LiteralString
from uuid import UUID

from sqlalchemy import and_, func
from sqlmodel import col, select

from db.session import Transaction
from db.tables import Event, StateHistory
from domain import groups, limits
from domain.durations import parse_duration
from domain.errors import bad_field, not_found
from domain.events.state import CounterState
from domain.ids import new_id
from domain.locks import lock_groups, lock_participants, lock_programs
from domain.money import ZERO, fits_scale, fits_size, format_plain, parse_number
from domain.pagination import Page, PageRequest, paginate

EntityKind = Literal["participant", "group", "program"]
StateType = Literal["tag", "counter", "attribute", "tier"]
Operation = Literal["set", "delete", "add", "remove", "auto_reset"]

_LOCKS = {"participant": lock_participants, "group": lock_groups, "program": lock_programs}
_TABLES: dict[EntityKind, LiteralString] = {
    "participant": "participant",
    "group": "holder_group",
    "program": "program",
}


@dataclass(frozen=True, slots=True)
class LockedEntity:
    """An entity whose row this transaction has locked: only then may its state be changed."""

    id: UUID


@dataclass(frozen=True, slots=True)
class CounterView:
    """A counter as it reads now; the window's fields are None without auto-reset."""

    key: str
    value: str
    reset_after: str | None
    last_reset_at: datetime | None


@dataclass(frozen=True, slots=True)
class HistoryFilter:
    """What a state history keeps. Instants are inclusive; occurrence falls back to `changed_at` without an event."""

    state_type: StateType | None = None
    key: str | None = None
    program_id: UUID | None = None
    operation: Operation | None = None
    changed_from: datetime | None = None
    changed_to: datetime | None = None
    event_from: datetime | None = None
    event_to: datetime | None = None


async def lock(tx: Transaction, kind: EntityKind, entity_id: UUID) -> LockedEntity:
    """Lock the entity's row until the end of the transaction, to change its state.

    Raises Refusal `not_found`, and `group_archived`: the state of an archived group is final.
    """
    row = (await _LOCKS[kind](tx, [entity_id])).get(entity_id)
    if row is None:
        raise not_found(kind)
    if kind == "group":
        groups.require_active(row)
    return LockedEntity(entity_id)


async def require(tx: Transaction, kind: EntityKind, entity_id: UUID) -> None:
    """Raise Refusal `not_found` unless the entity exists."""
    query: LiteralString = f"select 1 from {_TABLES[kind]} where organization_id = %s and id = %s"
    if await tx.row(query, (tx.organization_id, entity_id)) is None:
        raise not_found(kind)


# --- Tags --------------------------------------------------------------------------------------------------------


async def tags(tx: Transaction, entity_id: UUID) -> list[str]:
    """The entity's tags in alphabetical order."""
    cursor = await tx.execute(
        "select tag from tag where organization_id = %s and entity_id = %s order by tag",
        (tx.organization_id, entity_id),
    )
    return [tag for (tag,) in await cursor.fetchall()]


async def replace_tags(tx: Transaction, entity: LockedEntity, wanted: Iterable[str]) -> list[str]:
    """Make these the entity's tags; lower-cased, duplicates collapse. The tags it has then.

    Raises Refusal naming `tags` for a tag of no or more than 255 characters, or more than 1000 tags.
    """
    new = {_tag(tag, "tags") for tag in wanted}
    _require_room(len(new), "tags")
    old = set(await tags(tx, entity.id))
    await _delete_tags(tx, entity, sorted(old - new))
    await _insert_tags(tx, entity, sorted(new - old))
    return sorted(new)


async def add_tag(tx: Transaction, entity: LockedEntity, tag: str) -> tuple[str, bool]:
    """Add one tag; the tag as stored, and whether it is new. Raises Refusal naming `tag`."""
    tag = _tag(tag, "tag")
    old = await tags(tx, entity.id)
    if tag in old:
        return tag, False
    _require_room(len(old) + 1, "tag")
    await _insert_tags(tx, entity, [tag])
    return tag, True


async def remove_tag(tx: Transaction, entity: LockedEntity, tag: str) -> None:
    """Remove one tag; nothing happens when it is absent."""
    if (tag := tag.lower()) in await tags(tx, entity.id):
        await _delete_tags(tx, entity, [tag])


async def _insert_tags(tx: Transaction, entity: LockedEntity, new: list[str]) -> None:
    if not new:
        return
    await tx.execute(
        "insert into tag (organization_id, entity_id, tag, created_at) select %s, %s, unnest(%s::text[]), %s",
        (tx.organization_id, entity.id, new, tx.now),
    )
    await _record(tx, entity, [_Change("tag", tag, "add", None, tag) for tag in new])


async def _delete_tags(tx: Transaction, entity: LockedEntity, gone: list[str]) -> None:
    if not gone:
        return
    await tx.execute(
        "delete from tag where organization_id = %s and entity_id = %s and tag = any(%s)",
        (tx.organization_id, entity.id, gone),
    )
    await _record(tx, entity, [_Change("tag", tag, "remove", tag, None) for tag in gone])


def _tag(text: str, field: str) -> str:
    # Lower case can be longer than upper case, so the limit is on what is stored.
    tag = text.lower()
    _require_key(tag, field)
    return tag


# --- Attributes --------------------------------------------------------------------------------------------------


async def attributes(tx: Transaction, entity_id: UUID) -> dict[str, str]:
    """The entity's attributes, keys in alphabetical order."""
    cursor = await tx.execute(
        "select key, value from attribute where organization_id = %s and entity_id = %s order by key",
        (tx.organization_id, entity_id),
    )
    return dict(await cursor.fetchall())


async def merge_attributes(tx: Transaction, entity: LockedEntity, new: Mapping[str, str]) -> dict[str, str]:
    """Set these attributes and leave the others; all attributes afterwards.

    Raises Refusal naming `attributes` for a key or value of a wrong length, or more than 1000 attributes.
    """
    for key, value in new.items():
        _require_key(key, "attributes")
        _require_value(value, f"attributes.{key}"[:300])
    old = await attributes(tx, entity.id)
    changed = {key: value for key, value in new.items() if old.get(key) != value}
    _require_room(len(old.keys() | new.keys()), "attributes")
    if changed:
        await tx.execute(
            "insert into attribute (organization_id, entity_id, key, value, updated_at)"
            " select %s, %s, unnest(%s::text[]), unnest(%s::text[]), %s"
            " on conflict (organization_id, entity_id, key)"
            " do update set value = excluded.value, updated_at = excluded.updated_at",
            (tx.organization_id, entity.id, list(changed), list(changed.values()), tx.now),
        )
        changes = [_Change("attribute", key, "set", old.get(key), value) for key, value in changed.items()]
        await _record(tx, entity, changes)
    return dict(sorted((old | changed).items()))


async def delete_attribute(tx: Transaction, entity: LockedEntity, key: str) -> None:
    """Delete one attribute; nothing happens when it is absent."""
    cursor = await tx.execute(
        "delete from attribute where organization_id = %s and entity_id = %s and key = %s returning value",
        (tx.organization_id, entity.id, key),
    )
    deleted = await cursor.fetchone()
    if deleted is not None:
        await _record(tx, entity, [_Change("attribute", key, "delete", deleted[0], None)])


# --- Counters ----------------------------------------------------------------------------------------------------


async def counters(tx: Transaction, entity_id: UUID) -> list[CounterView]:
    """The entity's counters by key, as they read now: 0 once the window has elapsed."""
    stored = await _counters(tx, entity_id)
    return [_view(tx, key, counter) for key, counter in sorted(stored.items())]


async def counter(tx: Transaction, entity_id: UUID, key: str) -> CounterView:
    """One counter as it reads now. Raises Refusal `not_found`."""
    stored = (await _counters(tx, entity_id)).get(key)
    if stored is None:
        raise not_found("counter")
    return _view(tx, key, stored)


async def set_counter(
    tx: Transaction, entity: LockedEntity, key: str, value: str, reset_after: str | None
) -> CounterView:
    """Set a counter to `value`, whatever it was; it begins a new window now.

    `reset_after` is a Go-style duration that configures auto-reset; `""` removes it, None leaves it as it is.
    Raises Refusal naming `key`, `value` or `reset_after`. Contract: holders.md 5.3 and 5.4.
    """
    _require_key(key, "key")
    number = _counter_value(value)
    if reset_after:
        _require_window(reset_after)
    stored = await _counters(tx, entity.id)
    old = stored.get(key)
    if old is None:
        _require_room(len(stored) + 1, "key")
    window = (old.reset_after if old else None) if reset_after is None else (reset_after or None)
    await tx.execute(
        "insert into counter (organization_id, entity_id, key, value, reset_after, last_reset_at)"
        " values (%s, %s, %s, %s, %s, %s) on conflict (organization_id, entity_id, key) do update"
        " set value = excluded.value, reset_after = excluded.reset_after, last_reset_at = excluded.last_reset_at",
        (tx.organization_id, entity.id, key, number, window, tx.now),
    )
    await _record(tx, entity, _counter_changes(tx, key, old, number))
    return _view(tx, key, CounterState(number, window, tx.now))


async def delete_counter(tx: Transaction, entity: LockedEntity, key: str) -> None:
    """Delete one counter; nothing happens when it is absent."""
    old = (await _counters(tx, entity.id)).get(key)
    if old is None:
        return
    await tx.execute(
        "delete from counter where organization_id = %s and entity_id = %s and key = %s",
        (tx.organization_id, entity.id, key),
    )
    await _record(tx, entity, [_Change("counter", key, "delete", format_plain(old.effective(tx.now)), None)])


async def _counters(tx: Transaction, entity_id: UUID) -> dict[str, CounterState]:
    cursor = await tx.execute(
        "select key, value, reset_after, last_reset_at from counter where organization_id = %s and entity_id = %s",
        (tx.organization_id, entity_id),
    )
    return {key: CounterState(*stored) for key, *stored in await cursor.fetchall()}


def _view(tx: Transaction, key: str, stored: CounterState) -> CounterView:
    last_reset_at = stored.last_reset_at if stored.reset_after else None
    return CounterView(key, format_plain(stored.effective(tx.now)), stored.reset_after, last_reset_at)


def _counter_changes(tx: Transaction, key: str, old: CounterState | None, new: Decimal) -> list["_Change"]:
    """The history of one counter being set: first the reset that was due, if any."""
    if old is None:
        return [_Change("counter", key, "set", None, format_plain(new))]
    changes = []
    before = format_plain(old.value)
    if old.is_elapsed(tx.now):
        changes.append(_Change("counter", key, "auto_reset", before, format_plain(ZERO)))
        before = format_plain(ZERO)
    if before != format_plain(new):
        changes.append(_Change("counter", key, "set", before, format_plain(new)))
    return changes


def _counter_value(text: str) -> Decimal:
    number = parse_number(text)
    if number is None or not fits_size(number) or not fits_scale(number, limits.COUNTER_DECIMALS):
        message = (
            f"must be a decimal string with at most {limits.COUNTER_INTEGER_DIGITS} digits before the point"
            f" and {limits.COUNTER_DECIMALS} after it"
        )
        raise bad_field("value", message, expected="decimal string", received=text)
    return number


def _require_window(text: str) -> None:
    try:
        positive = parse_duration(text).total_seconds() > 0
    except ValueError:
        positive = False
    if not positive:
        message = 'must be a positive duration such as "24h", or "" for no auto-reset'
        raise bad_field("reset_after", message, expected="duration", received=text)


# --- History -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Change:
    state_type: StateType
    key: str
    operation: Operation
    old_value: str | None
    new_value: str | None


async def history(tx: Transaction, entity_id: UUID, wanted: HistoryFilter, page: PageRequest) -> Page[StateHistory]:
    """A page of the entity's changes, newest first. Contract: holders.md 5.5."""
    row = StateHistory
    statement = select(row).where(row.organization_id == tx.organization_id, row.entity_id == entity_id)
    for column in ("state_type", "key", "program_id", "operation"):
        if (value := getattr(wanted, column)) is not None:
            statement = statement.where(getattr(row, column) == value)
    if wanted.changed_from is not None:
        statement = statement.where(row.changed_at >= wanted.changed_from)
    if wanted.changed_to is not None:
        statement = statement.where(row.changed_at <= wanted.changed_to)
    if wanted.event_from is not None or wanted.event_to is not None:
        of_event = and_(col(Event.organization_id) == row.organization_id, col(Event.id) == row.event_id)
        statement = statement.outerjoin(Event, of_event)
        occurred_at = func.coalesce(Event.event_timestamp, row.changed_at)
        if wanted.event_from is not None:
            statement = statement.where(occurred_at >= wanted.event_from)
        if wanted.event_to is not None:
            statement = statement.where(occurred_at <= wanted.event_to)
    return await paginate(tx, statement, keys=(col(row.changed_at), col(row.id)), page=page)


async def _record(tx: Transaction, entity: LockedEntity, changes: list[_Change]) -> None:
    """Write the history of changes made by this API call."""
    if not changes:
        return
    columns = zip(*((c.state_type, c.key, c.operation, c.old_value, c.new_value) for c in changes), strict=True)
    await tx.execute(
        "insert into state_history (organization_id, entity_id, changed_at, api_key_id,"
        " id, state_type, key, operation, old_value, new_value)"
        " select %s, %s, %s, %s, * from unnest(%s::uuid[], %s::text[], %s::text[], %s::text[], %s::text[], %s::text[])",
        (
            tx.organization_id,
            entity.id,
            tx.now,
            tx.api_key_id,
            [new_id() for _ in changes],
            *(list(column) for column in columns),
        ),
    )


# --- Limits ------------------------------------------------------------------------------------------------------


def _require_key(key: str, field: str) -> None:
    if not 0 < len(key) <= limits.STATE_KEY_CHARS:
        message = f"must have 1 to {limits.STATE_KEY_CHARS} characters"
        raise bad_field(field, message, expected="string", received=key[:100])


def _require_value(value: str, field: str) -> None:
    if not 0 < len(value) <= limits.ATTRIBUTE_CHARS:
        message = f"must have 1 to {limits.ATTRIBUTE_CHARS} characters"
        raise bad_field(field, message, expected="string", received=value[:100])


def _require_room(count: int, field: str) -> None:
    if count > limits.STATE_KEYS:
        raise bad_field(field, f"an entity has at most {limits.STATE_KEYS} of them", received=str(count))
