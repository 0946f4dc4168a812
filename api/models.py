"""The kinds of values that requests and responses are made of, each with its own rule and description."""

import re
from datetime import UTC, datetime
from decimal import Decimal
from typing import Annotated, Any, Generic, Self, TypeVar, cast

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, PlainSerializer, StrictBool
from pydantic_core import PydanticCustomError

from domain.clock import format_timestamp
from domain.errors import bad_field
from domain.idempotency import OUR_KEYS, is_ours

Item = TypeVar("Item")

_RFC_3339 = re.compile(r"(\d{4}-\d{2}-\d{2})[Tt](\d{2}:\d{2}:\d{2})(?:\.(\d{1,9}))?([Zz]|[+-]\d{2}:\d{2})", re.ASCII)


class RequestModel(BaseModel):
    """A request body: unknown members are ignored. Contract: README.md "Money"."""

    model_config = ConfigDict(extra="ignore")


class PatchModel(RequestModel):
    """A partial update: what is not sent stays as it is. Its fields are made with `unset_field`."""

    def changes(self) -> dict[str, Any]:
        """The fields that were sent, by name."""
        return {name: getattr(self, name) for name in self.model_fields_set}

    def required_changes(self) -> dict[str, Any]:
        """Like `changes`. Raises Refusal naming the body when nothing that can be changed was sent."""
        changes = self.changes()
        if not changes:
            raise bad_field("body", "names no field that can be changed", expected="present", reason="required")
        return changes


def _unset() -> Any:
    return None


def unset_field(description: str, **more: Any) -> Any:
    """A field of a `PatchModel`: it may be missing, but is null only where its type says so."""
    return Field(default_factory=_unset, description=description, **more)


class ResponseModel(BaseModel):
    """A response body. A member is left out, rather than null, only where its field is `omittable`."""

    @classmethod
    def of(cls, row: object, **more: Any) -> Self:
        """The response whose fields are in `more` or are attributes of `row`; nothing is validated, the row is ours."""
        columns: dict[str, Any] = {
            name: more[name] if name in more else getattr(row, name) for name in cls.model_fields
        }
        return cast("Self", cls.model_construct(**columns))


def _is_none(value: Any) -> bool:
    return value is None


def omittable(description: str, **more: Any) -> Any:
    """A response field that is absent when it has no value."""
    return Field(default=None, exclude_if=_is_none, description=description, **more)


def parse_timestamp(text: str) -> datetime:
    """The instant in an RFC 3339 text, in UTC; digits beyond microseconds are cut.

    Raises ValueError for anything else: a date alone, a missing offset, a day that doesn't exist.
    """
    match = _RFC_3339.fullmatch(text)
    if match is None:
        raise ValueError("not an RFC 3339 timestamp with an offset")
    date, time, fraction, offset = match.groups()
    micros = (fraction or "").ljust(6, "0")[:6]
    try:
        return datetime.fromisoformat(f"{date}T{time}.{micros}{offset.upper()}").astimezone(UTC)
    except OverflowError:
        raise ValueError("out of range") from None


def _read_timestamp(value: Any) -> datetime:
    if isinstance(value, datetime):
        return value
    try:
        if isinstance(value, str):
            return parse_timestamp(value)
    except ValueError:
        pass
    message = "must be an RFC 3339 timestamp with an offset, such as 2024-01-15T10:30:00Z"
    raise PydanticCustomError("timestamp", message, {"expected": "timestamp"})


def _read_integer(value: Any) -> Any:
    # Numbers arrive as Decimals; what pydantic would also take (true, "2", 2.0) is not an integer in JSON.
    if isinstance(value, Decimal) and value == value.to_integral_value():
        return int(value)
    if isinstance(value, int) and not isinstance(value, bool):
        return value
    raise PydanticCustomError("integer", "must be an integer", {"expected": "integer"})


def _refuse_automation_keys(key: str) -> str:
    if is_ours(key):
        message = f"keys that begin with {OUR_KEYS} are reserved"
        raise PydanticCustomError("reserved", message, {"expected": "another key"})
    return key


Timestamp = Annotated[
    datetime,
    BeforeValidator(_read_timestamp, json_schema_input_type=datetime),
    PlainSerializer(format_timestamp, when_used="unless-none"),
]
"""RFC 3339 with an offset in, UTC with `Z` and at most microseconds out."""

Integer = Annotated[int, BeforeValidator(_read_integer, json_schema_input_type=int)]
"""A JSON number without a fraction; not a string, not a boolean."""

Boolean = StrictBool
"""`true` or `false`; no strings, no numbers."""

AmountText = Annotated[
    str, Field(min_length=1, max_length=100, description="Decimal string, never a JSON number.", examples=["100.00"])
]
"""An amount as it is sent; `domain.money.parse_amount` reads it with the asset's scale."""

Name = Annotated[str, Field(min_length=1, max_length=255)]
Description = Annotated[str, Field(min_length=1, max_length=500, description="Why, for people; 1 to 500 characters.")]
ExternalId = Annotated[str, Field(min_length=1, max_length=255, description="The caller's own id of the participant.")]
ReferenceId = Annotated[str, Field(min_length=1, max_length=255, description="Correlates a hold with what ends it.")]
IdempotencyKey = Annotated[
    str,
    Field(
        min_length=1,
        max_length=255,
        description="Makes a retry safe: the same key and payload is done once. Scoped by program and operation.",
        examples=["order-12345-completed"],
    ),
    AfterValidator(_refuse_automation_keys),
]


class Pagination(ResponseModel):
    """Where a list goes on."""

    has_more: bool = Field(description="Whether there is another page.")
    next_cursor: str | None = Field(description="Send it as `cursor` for the next page; null on the last one.")


class ListOf(ResponseModel, Generic[Item]):
    """The envelope of every list. Contract: basics.md 2.3."""

    data: list[Item] = Field(description="The items of this page, in order.")
    pagination: Pagination = Field(description="Where the list goes on.")


def whole_list(items: list[Any]) -> dict[str, Any]:
    """The envelope of a list that is never cut into pages."""
    return {"data": items, "pagination": Pagination(has_more=False, next_cursor=None)}
