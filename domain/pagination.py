"""Keyset pagination: a page begins after the sort key of the last row seen. Contract: basics.md 2.3.

Rows inserted or deleted between two pages cause neither skips nor duplicates, and page 1,000 costs what page 1 costs.
A cursor is opaque: base64url of a JSON array, the name of the sort first, then the sort key's values.
"""

import base64
import binascii
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from decimal import Decimal
from typing import Any, Generic, TypeVar
from uuid import UUID

import orjson
from sqlalchemy import literal, tuple_
from sqlalchemy.orm import QueryableAttribute
from sqlmodel import SQLModel
from sqlmodel.sql.expression import SelectOfScalar

from db.session import Transaction
from domain import limits
from domain.clock import format_timestamp
from domain.errors import Refusal, bad_field
from domain.money import parse_number

Row = TypeVar("Row", bound=SQLModel)
Item = TypeVar("Item")

_CURSOR_CHARS = 2_048


@dataclass(frozen=True, slots=True)
class PageRequest:
    """Which page a caller wants: at most `limit` rows, after `cursor` (None: from the start)."""

    limit: int = limits.PAGE_DEFAULT
    cursor: str | None = None


@dataclass(frozen=True, slots=True)
class Page(Generic[Item]):
    """One page and where the next one begins; `next_cursor` is None on the last."""

    items: list[Item]
    next_cursor: str | None

    @property
    def has_more(self) -> bool:
        """Whether there is another page."""
        return self.next_cursor is not None


async def paginate(
    tx: Transaction,
    statement: SelectOfScalar[Row],
    *,
    keys: Sequence[Any],
    page: PageRequest,
    descending: bool = True,
) -> Page[Row]:
    """The page of `statement` (a `select(Table)` without order or limit) in the order of `keys`.

    `keys` are columns of the table, together unique and never null, all in the same direction.
    Raises Refusal naming `cursor` when it was not made by this very sort.
    """
    columns: list[QueryableAttribute[Any]] = list(keys)
    sort = sort_name([column.key for column in columns], descending)
    after = decode_cursor(page.cursor, sort, [column.type.python_type for column in columns])
    if after is not None:
        position = tuple_(*columns)
        start = tuple_(*(literal(value, column.type) for value, column in zip(after, columns, strict=True)))
        statement = statement.where(position < start if descending else position > start)
    ordered = [column.desc() if descending else column.asc() for column in columns]
    rows = await tx.all(statement.order_by(*ordered).limit(page.limit + 1))
    return cut(rows, page.limit, sort, lambda row: [getattr(row, column.key) for column in columns])


def cut(items: list[Item], limit: int, sort: str, key: Callable[[Item], Sequence[Any]]) -> Page[Item]:
    """The page in `items`, which were read with `limit + 1`; `key` gives the sort key's values of one item."""
    if len(items) <= limit:
        return Page(items, None)
    return Page(items[:limit], encode_cursor(sort, key(items[limit - 1])))


def sort_name(keys: Sequence[str], descending: bool) -> str:
    """The name of a sort, which its cursors carry so that no other sort takes them."""
    return f"{'-' if descending else '+'}{','.join(keys)}"


def encode_cursor(sort: str, values: Sequence[Any]) -> str:
    """The cursor after the row whose sort key has `values` (datetimes, UUIDs, strings, integers, Decimals)."""
    packed = orjson.dumps([sort, *(_pack(value) for value in values)])
    return base64.urlsafe_b64encode(packed).rstrip(b"=").decode()


def decode_cursor(cursor: str | None, sort: str, types: Sequence[type]) -> list[Any] | None:
    """The sort key's values in `cursor`, of these `types`; None for no cursor.

    Raises Refusal naming `cursor` when it can't be decoded or belongs to another sort.
    """
    if cursor is None:
        return None
    try:
        if len(cursor) > _CURSOR_CHARS:
            raise ValueError("too long")
        raw = base64.b64decode(cursor.encode("ascii") + b"=" * (-len(cursor) % 4), altchars=b"-_", validate=True)
        packed = orjson.loads(raw)
        if not isinstance(packed, list) or len(packed) != len(types) + 1 or packed[0] != sort:
            raise ValueError("made for another list")
        return [_unpack(value, kind) for value, kind in zip(packed[1:], types, strict=True)]
    except (ValueError, TypeError, OverflowError, binascii.Error):
        raise _bad_cursor(cursor) from None


def _bad_cursor(cursor: str) -> Refusal:
    message = "is not a cursor of this list and sort order"
    return bad_field("cursor", message, expected="a next_cursor of this list", received=cursor[:100])


def _pack(value: Any) -> str | int:
    if isinstance(value, datetime):
        return format_timestamp(value)
    if isinstance(value, UUID | Decimal):
        return str(value)
    assert isinstance(value, str | int), f"cannot sort by {type(value).__name__}"
    return value


def _unpack(value: Any, kind: type) -> Any:
    if kind is int:
        if type(value) is not int or not -(2**63) <= value < 2**63:
            raise ValueError("not an integer")
        return value
    if not isinstance(value, str) or "\x00" in value:
        raise ValueError("not a text")
    if kind is str:
        return value
    if kind is UUID:
        return UUID(value)
    if kind is datetime:
        instant = datetime.fromisoformat(value)
        if instant.tzinfo is None:
            raise ValueError("no time zone")
        return instant.astimezone(UTC)
    assert kind is Decimal, f"cannot sort by {kind.__name__}"
    number = parse_number(value)
    if number is None:
        raise ValueError("not a number")
    return number
