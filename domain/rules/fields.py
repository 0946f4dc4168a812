"""How each field of a rule's action is read at save, and what is said about one that is wrong.

One reader per field. A reader takes the field's `Place`, whose JSON kind has been checked, gives what the engine works
with, and notes what is wrong in the place's list of problems. Contract: rules-and-events.md 5.1, 5.2 and 5.17.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from typing import Any
from uuid import UUID

from db import json
from domain import exact_json, limits, money
from domain.durations import parse_duration
from domain.errors import Problem
from domain.rules.cel import Activation, EvaluationError, Expression, ExpressionError, compile_expression
from domain.rules.cel.functions import to_timestamp

DESCRIPTION_CHARS = 500
LONGEST_TERM = timedelta(days=limits.TERM_DAYS)
LONGEST_DELAY = timedelta(days=limits.DELAY_DAYS)

When = timedelta | datetime | Expression
"""A point in time as an action gives it: so long after the action runs, or fixed, or what an expression comes to."""


@dataclass(frozen=True, slots=True)
class Target:
    """Whom an action is directed at. Contract: rules-and-events.md 5.2.

    PARTICIPANT has exactly one of `id`, `external_id` and `participant_id`, GROUP one of `id` and `group_id` (CEL that
    was given as `id`). PROGRAM with `id` None means the event's own program, else any program of the organization.
    """

    type: str
    id: UUID | None = None
    external_id: Expression | None = None
    participant_id: Expression | None = None
    group_id: Expression | None = None


# Every field of the contract's flat schema, with its JSON type. One that a type doesn't use has no effect.
FIELDS: dict[str, type] = {
    "type": str,
    "asset_id": str,
    "amount": str,
    "bucket": str,
    "allow_negative": bool,
    "description": str,
    "reference_id": str,
    "expires_at": str,
    "matures_at": str,
    "hold_until": str,
    "tag": str,
    "key": str,
    "value": str,
    "reset_after": str,
    "tier": str,
    "level": str,
    "event_name": str,
    "delay": str,
    "payload": dict,
    "target": dict,
}
JSON_NAMES = {str: "string", bool: "boolean", dict: "object"}
TARGET_FIELDS = ("type", "id", "external_id", "participant_id")

_HOLDERS = frozenset({"PARTICIPANT", "GROUP"})
_STATEFUL = frozenset({"PARTICIPANT", "GROUP", "PROGRAM"})
_TARGET_TYPES: dict[str, frozenset[str]] = {
    **dict.fromkeys(("CREDIT", "DEBIT", "HOLD", "RELEASE", "FORFEIT", "VOID_HOLD"), _HOLDERS),
    **dict.fromkeys(("TAG", "UNTAG", "COUNTER", "SET_ATTRIBUTE"), _STATEFUL),
    "SCHEDULE_EVENT": frozenset({"PARTICIPANT"}),
}


@dataclass(frozen=True, slots=True)
class Place:
    """A value somewhere in an action, and the list that takes what is wrong with it."""

    path: str
    action_type: str
    value: Any
    problems: list[Problem]

    def wrong(self, message: str, expected: str = "<any>", reason: str = "invalid") -> None:
        """Note a problem of this value."""
        self.problems.append(Problem(self.path, message, reason, expected, self.value))

    def within(self, name: str, value: Any) -> "Place":
        """The place of a member of this value."""
        return replace(self, path=f"{self.path}.{name}", value=value)


def read_field(name: str, field: Place) -> Any:
    """What the engine works with for this field; anything at all where a problem was noted."""
    return _READERS[name](field)


# --- texts, ids and expressions --------------------------------------------------------------------------------------


def _read_uuid(field: Place) -> UUID | None:
    found = parse_uuid(field.value)
    if found is None:
        field.wrong("must be a UUID", "uuid")
    return found


def parse_uuid(text: str) -> UUID | None:
    """The UUID that `text` writes in its common form, of either case; None for anything else."""
    try:
        found = UUID(text)
    except ValueError:
        return None
    # UUID() also takes braces, URNs and digits without hyphens.
    return found if str(found) == text.lower() else None


def _read_expression(field: Place) -> Expression | None:
    try:
        return compile_expression(field.value)
    except ExpressionError as error:
        field.wrong(f"invalid CEL: {error}", "CEL expression")
        return None


def _read_number(field: Place) -> Expression | None:
    """A decimal literal, also in the forms that CEL doesn't write (`+10`, `10.`), or an expression."""
    literal = money.parse_number(field.value.strip())
    return _read_expression(field if literal is None else replace(field, value=format(literal, "f")))


def _read_bucket(field: Place) -> str:
    if field.value not in ("AVAILABLE", "HELD"):
        field.wrong("unknown bucket", "AVAILABLE | HELD")
    return str(field.value)


def _read_as_is(field: Place) -> Any:
    return field.value


def _read_description(field: Place) -> str:
    return _read_text(field, field.value, DESCRIPTION_CHARS, shortest=0)


def _read_tag(field: Place) -> str:
    return _read_text(field, field.value.lower(), limits.STATE_KEY_CHARS)


def _read_key(field: Place) -> str:
    return _read_text(field, field.value, limits.STATE_KEY_CHARS)


def _read_event_name(field: Place) -> str:
    return _read_text(field, field.value, limits.EVENT_NAME_CHARS)


def _read_text(field: Place, text: str, longest: int, shortest: int = 1) -> str:
    if not shortest <= len(text) <= longest:
        field.wrong(f"must have {shortest} to {longest} characters", f"string of {shortest} to {longest} characters")
    return text


# Texts that would compile and are meant as they stand: a date would come out as a difference (`2024-01-15` is 2008), a
# number without its zeros, and single words name whole maps (`group`) or types (`string`). `now` is worth evaluating.
_PLAIN_ATTRIBUTE = re.compile(r"[+-]?\d+(\.\d+)?|(\d{4}-)?\d{2}-\d{2}|(?!now$)[A-Za-z_][A-Za-z0-9_]*", re.ASCII)


def _read_value(field: Place) -> Expression | str | None:
    if field.action_type == "COUNTER":
        return _read_number(field)
    text = _read_text(field, field.value, limits.ATTRIBUTE_CHARS)
    if _PLAIN_ATTRIBUTE.fullmatch(text):
        return text
    try:
        return compile_expression(text)
    except ExpressionError:
        return text


def _read_payload(field: Place) -> dict[str, Any]:
    payload: dict[str, Any] = field.value
    shown = replace(field, value=None)  # not the payload again, which may be megabytes
    if exact_json.depth(payload) > limits.EVENT_DATA_DEPTH:
        shown.wrong(f"must not nest deeper than {limits.EVENT_DATA_DEPTH}", "a flatter object")
    elif len(json.dumps(payload)) > limits.EVENT_DATA_BYTES:
        shown.wrong(f"must be at most {limits.EVENT_DATA_BYTES} bytes of JSON", "a smaller object")
    return payload


# --- times -----------------------------------------------------------------------------------------------------------


def span_or_instant(value: object) -> timedelta | datetime | None:
    """The duration or the point in time that `value` is, or that its text writes; None for anything else.

    A text is a Go duration or an RFC 3339 timestamp, of which a bare date is midnight UTC. Contract: 5.5.
    """
    if isinstance(value, timedelta | datetime):
        return value
    if not isinstance(value, str):
        return None
    try:
        return parse_duration(value)
    except ValueError:
        pass
    try:
        return to_timestamp(value)
    except EvaluationError:
        return None


_TIMES = 'duration such as "720h", RFC 3339 timestamp or CEL expression'


def _read_when(field: Place) -> When | None:
    """Read as duration, timestamp, expression, in this order. An expression that reads nothing counts as its value."""
    found: When | None = span_or_instant(field.value.strip())
    if found is None:
        try:
            found = compile_expression(field.value)
        except ExpressionError as error:
            field.wrong(f"neither a duration nor an RFC 3339 timestamp nor valid CEL: {error}", _TIMES)
            return None
    if isinstance(found, Expression) and found.is_constant:
        found = _constant_time(found)
        if found is None:
            field.wrong("gives neither a time nor a duration", _TIMES)
    if isinstance(found, timedelta) and found > LONGEST_TERM:
        field.wrong("must not be more than a hundred years", "a shorter duration")
    return found


_NOTHING = Activation(
    event={}, participant=None, program={}, groups=[], group=None, now=datetime(1970, 1, 1, tzinfo=UTC)
)


def _constant_time(expression: Expression) -> timedelta | datetime | None:
    try:
        return span_or_instant(expression.evaluate(_NOTHING))
    except EvaluationError:
        return None


def _read_expires_at(field: Place) -> When | None:
    found = _read_when(field)
    if isinstance(found, timedelta) and found <= timedelta(0):
        field.wrong("must be a positive duration", "duration")
    return found


def _read_reset_after(field: Place) -> str:
    if field.value:
        _read_span(field)
    return str(field.value)


def _read_delay(field: Place) -> timedelta | None:
    delay = _read_span(field)
    if delay is not None and delay > LONGEST_DELAY:
        field.wrong(f"must not be more than {limits.DELAY_DAYS} days", "a shorter duration")
    return delay


def _read_span(field: Place) -> timedelta | None:
    """A positive Go duration, which is never evaluated."""
    try:
        span = parse_duration(field.value)
    except ValueError as error:
        field.wrong(str(error), "duration")
        return None
    if span <= timedelta(0):
        field.wrong("must be a positive duration", "duration")
    return span


# --- targets ---------------------------------------------------------------------------------------------------------


def _read_target(field: Place) -> Target | None:
    raw: dict[str, Any] = field.value
    _check_target_kinds(field, raw)
    target_type = raw.get("type")
    if not _check_target_type(field.within("type", target_type), target_type):
        return None
    if target_type == "PARTICIPANT":
        return _read_participant_target(field, raw)
    for name in ("external_id", "participant_id"):
        if raw.get(name) is not None:
            message = f"names a participant, but the target is a {target_type}"
            field.within(name, raw[name]).wrong(message, "absent")
    place = field.within("id", raw.get("id"))
    return _read_group_target(place) if target_type == "GROUP" else _read_program_target(place)


def _check_target_kinds(field: Place, raw: dict[str, Any]) -> None:
    for name, value in raw.items():
        if name not in TARGET_FIELDS:
            field.within(name[:100], value).wrong("unknown field")
        elif value is not None and not isinstance(value, str):
            field.within(name, value).wrong("must be a JSON string", "string")


def _check_target_type(field: Place, target_type: Any) -> bool:
    allowed = _TARGET_TYPES[field.action_type]
    expected = " | ".join(sorted(allowed))
    if target_type is None:
        field.wrong("This field is required", expected, "required")
    elif not isinstance(target_type, str):
        return False  # _check_target_kinds has said so
    elif target_type not in _STATEFUL:
        field.wrong("unknown target type", expected)
    elif target_type not in allowed:
        field.wrong(f"{field.action_type} cannot target a {target_type}", expected)
    else:
        return True
    return False


def _read_participant_target(field: Place, raw: dict[str, Any]) -> Target | None:
    named = [name for name in ("id", "external_id", "participant_id") if raw.get(name) is not None]
    if len(named) != 1:
        field.wrong(
            "a PARTICIPANT target takes exactly one of id, external_id and participant_id",
            "exactly one of id, external_id, participant_id",
            "invalid" if named else "required",
        )
        return None
    name = named[0]
    place = field.within(name, raw[name])
    if not isinstance(place.value, str):
        return None  # _check_target_kinds has said so
    if name == "id":
        return Target("PARTICIPANT", id=_read_uuid(place))
    if name == "external_id":
        return Target("PARTICIPANT", external_id=_read_expression(place))
    return Target("PARTICIPANT", participant_id=_read_expression(place))


def _read_group_target(place: Place) -> Target | None:
    """A literal id is not looked up at save: a target that cannot be resolved fails the action (5.2)."""
    if place.value is None:
        place.wrong("This field is required", "uuid or CEL expression", "required")
        return None
    if not isinstance(place.value, str):
        return None  # _check_target_kinds has said so
    group_id = parse_uuid(place.value)
    if group_id is not None:
        return Target("GROUP", id=group_id)
    try:
        return Target("GROUP", group_id=compile_expression(place.value))
    except ExpressionError as error:
        place.wrong(f"neither a UUID nor valid CEL: {error}", "uuid or CEL expression")
        return None


def _read_program_target(place: Place) -> Target:
    return Target("PROGRAM", id=_read_uuid(place) if isinstance(place.value, str) else None)


_READERS: dict[str, Callable[[Place], Any]] = {
    "asset_id": _read_uuid,
    "amount": _read_number,
    "bucket": _read_bucket,
    "allow_negative": _read_as_is,
    "description": _read_description,
    "reference_id": _read_expression,
    "expires_at": _read_expires_at,
    "matures_at": _read_when,
    "hold_until": _read_when,
    "tag": _read_tag,
    "key": _read_key,
    "value": _read_value,
    "reset_after": _read_reset_after,
    "event_name": _read_event_name,
    "delay": _read_delay,
    "payload": _read_payload,
    "target": _read_target,
}
