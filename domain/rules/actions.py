"""A rule's actions: what each type needs, checked at save and turned into what the engine runs.

One table says which fields a type uses, one says how a field is read; nothing else knows an action's shape.
Contract: rules-and-events.md 5.1, 5.2 and 5.17.

Amounts have run-time semantics also where they are literals: the contract makes a negative amount, or one with more
decimals than its asset's scale, a failure of the action (5.4), and its list of refusals at save (5.17) has neither.
So saving never depends on whether an amount was written as `"1.005"` or as `"event.amount"`.
"""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any
from uuid import UUID

from db.session import Transaction
from domain import limits, money
from domain.durations import parse_duration
from domain.errors import Problem, Refusal
from domain.rules import not_yet
from domain.rules.cel import Expression, ExpressionError, compile_expression

PROBLEMS_REPORTED = 100
DESCRIPTION_CHARS = 500
EXPRESSION_CHARS_PER_RULE = 32 * 1024
"""All expressions of a rule's actions together: compiling takes about 40 microseconds a character at worst."""


@dataclass(frozen=True, slots=True)
class Target:
    """Whom an action is directed at. Contract: rules-and-events.md 5.2.

    PARTICIPANT has exactly one of `id`, `external_id` and `participant_id`. PROGRAM means the event's own program; its
    `id` is None or that program's.
    """

    type: str
    id: UUID | None
    external_id: Expression | None
    participant_id: Expression | None


@dataclass(frozen=True, slots=True)
class Action:
    """One action, ready to run. `index` is its place in the rule; `raw` is the action as it was sent and is stored.

    `target` None means the event's participant (or its recipient). Fields that the type doesn't use are at their
    defaults. `value` of a COUNTER is always an Expression; of a SET_ATTRIBUTE a str is a literal. `tag` is lower-case.
    `reset_after` is a Go duration, or "" to remove the auto-reset, or None to leave it.
    """

    index: int
    type: str
    raw: dict[str, Any]
    target: Target | None = None
    asset_id: UUID | None = None
    amount: Expression | None = None
    bucket: str = "AVAILABLE"
    allow_negative: bool = False
    description: str | None = None
    tag: str | None = None
    key: str | None = None
    value: Expression | str | None = None
    reset_after: str | None = None

    def expressions(self) -> tuple[Expression, ...]:
        """Every expression that running this action evaluates."""
        target = (self.target.external_id, self.target.participant_id) if self.target else ()
        return tuple(found for found in (self.amount, self.value, *target) if isinstance(found, Expression))


@dataclass(frozen=True, slots=True)
class _Shape:
    """The fields that a type uses, and whom it may be directed at."""

    required: tuple[str, ...]
    optional: tuple[str, ...]
    targets: frozenset[str]


_HOLDERS = frozenset({"PARTICIPANT", "GROUP"})
_STATEFUL = frozenset({"PARTICIPANT", "GROUP", "PROGRAM"})
_SHAPES: dict[str, _Shape] = {
    "CREDIT": _Shape(("asset_id", "amount"), ("bucket", "description", "target"), _HOLDERS),
    "DEBIT": _Shape(("asset_id", "amount"), ("bucket", "allow_negative", "description", "target"), _HOLDERS),
    "TAG": _Shape(("tag",), ("target",), _STATEFUL),
    "UNTAG": _Shape(("tag",), ("target",), _STATEFUL),
    "COUNTER": _Shape(("key", "value"), ("reset_after", "target"), _STATEFUL),
    "SET_ATTRIBUTE": _Shape(("key", "value"), ("target",), _STATEFUL),
}
_TYPES = (*_SHAPES, *sorted(not_yet.ACTION_TYPES))

# Every field of the contract's flat schema, with its JSON type. One that a type doesn't use has no effect.
_FIELDS: dict[str, type] = {
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
_JSON_NAMES = {str: "string", bool: "boolean", dict: "object"}
_LOT_FIELDS = ("reference_id", "expires_at", "matures_at")
_TARGET_FIELDS = ("type", "id", "external_id", "participant_id")
_PARTICIPANT_FIELDS = ("id", "external_id", "participant_id")


def parse_actions(raw_actions: Sequence[Any]) -> tuple[Action, ...]:
    """The actions in `raw_actions` (JSON as `exact_json` reads it), compiled, in their order.

    Raises Refusal `bad_request` with every problem, each naming `actions[i].field`. Looks at nothing but the text:
    what the ids in it mean is `check_references`.
    """
    if not raw_actions:
        raise _refusal([Problem("actions", "a rule needs at least one action", "required", "non-empty array")])
    if len(raw_actions) > limits.ACTIONS_PER_RULE:
        message = f"a rule has at most {limits.ACTIONS_PER_RULE} actions"
        raise _refusal([Problem("actions", message, expected=f"at most {limits.ACTIONS_PER_RULE} items")])
    if sum(_expression_chars(raw) for raw in raw_actions) > EXPRESSION_CHARS_PER_RULE:
        message = f"the expressions of a rule's actions have at most {EXPRESSION_CHARS_PER_RULE:,} characters together"
        raise _refusal([Problem("actions", message, expected="shorter expressions")])
    problems: list[Problem] = []
    actions = [_parse_action(index, raw, problems) for index, raw in enumerate(raw_actions)]
    if problems:
        raise _refusal(problems)
    return tuple(action for action in actions if action is not None)


def _expression_chars(raw: Any) -> int:
    if not isinstance(raw, dict):
        return 0
    target = raw.get("target")
    texts = [raw.get("amount"), raw.get("value")]
    if isinstance(target, dict):
        texts += [target.get("external_id"), target.get("participant_id")]
    return sum(len(text) for text in texts if isinstance(text, str))


async def check_references(tx: Transaction, program_id: UUID, actions: Sequence[Action]) -> None:
    """Whether a rule of the program may use what the actions name by id; all assets are looked up in one query.

    Raises Refusal: 404 `not_found` for an asset the organization doesn't have, 409 `asset_archived`, 422
    `asset_not_linked`, 400 `bad_request` for fields that the asset's inventory mode doesn't have and for another
    program as target.
    """
    strangers = [
        a for a in actions if a.target and a.target.type == "PROGRAM" and a.target.id not in (None, program_id)
    ]
    if strangers:
        raise _refusal([Problem(f"actions[{a.index}].target.id", not_yet.OTHER_PROGRAMS) for a in strangers])
    asset_ids = sorted({action.asset_id for action in actions if action.asset_id is not None})
    if not asset_ids:
        return
    found = await tx.rows(
        """select a.id, a.inventory_mode, a.status, l.asset_id is not null as linked
           from asset a left join program_asset l
             on l.organization_id = a.organization_id and l.program_id = %s and l.asset_id = a.id
           where a.organization_id = %s and a.id = any(%s)""",
        [program_id, tx.organization_id, asset_ids],
    )
    assets = {row["id"]: row for row in found}
    _refuse_assets(actions, "not_found", "asset not found", lambda asset_id: asset_id not in assets)
    _refuse_assets(actions, "asset_archived", "asset is archived", lambda a: assets[a]["status"] == "ARCHIVED")
    _refuse_assets(actions, "asset_not_linked", "asset is not linked to the program", lambda a: not assets[a]["linked"])
    problems = [
        problem
        for action in actions
        if action.asset_id is not None
        for problem in _mode_problems(action, assets[action.asset_id]["inventory_mode"])
    ]
    if problems:
        raise _refusal(problems)


def _refuse_assets(actions: Sequence[Action], code: str, message: str, is_wrong: Callable[[UUID], bool]) -> None:
    problems = [
        Problem(f"actions[{action.index}].asset_id", message, received=str(action.asset_id))
        for action in actions
        if action.asset_id is not None and is_wrong(action.asset_id)
    ]
    if problems:
        raise Refusal(code, message, problems)


def _mode_problems(action: Action, inventory_mode: str) -> list[Problem]:
    path = f"actions[{action.index}]"
    lot_fields = [name for name in _LOT_FIELDS if action.raw.get(name) is not None]
    if inventory_mode == "SIMPLE":
        message = "{} needs an asset of inventory_mode LOT"
        return [Problem(f"{path}.{name}", message.format(name), received=action.raw[name]) for name in lot_fields]
    problems = [Problem(f"{path}.{name}", not_yet.message(name), received=action.raw[name]) for name in lot_fields]
    if action.type in not_yet.LOT_ACTION_TYPES:
        problems.append(Problem(f"{path}.asset_id", not_yet.message(f"{action.type} actions on LOT assets")))
    return problems


def _refusal(problems: Sequence[Problem]) -> Refusal:
    return Refusal("bad_request", "Invalid request parameters", problems[:PROBLEMS_REPORTED])


@dataclass(frozen=True, slots=True)
class _Place:
    """A value somewhere in an action, and the list that takes what is wrong with it."""

    path: str
    action_type: str
    value: Any
    problems: list[Problem]

    def wrong(self, message: str, expected: str = "<any>", reason: str = "invalid") -> None:
        self.problems.append(Problem(self.path, message, reason, expected, self.value))

    def within(self, name: str, value: Any) -> "_Place":
        return replace(self, path=f"{self.path}.{name}", value=value)


def _parse_action(index: int, raw: Any, problems: list[Problem]) -> Action | None:
    place = _Place(f"actions[{index}]", "", raw, problems)
    if len(problems) >= PROBLEMS_REPORTED:
        return None
    if not isinstance(raw, dict):
        place.wrong("an action is an object", "object")
        return None
    known_before = len(problems)
    _check_kinds(place, raw)
    shape = _shape(place, raw)
    if shape is None:
        return None
    place = replace(place, action_type=raw["type"])
    _check_hold_until(place, raw)
    fields = _read_fields(place, raw, shape)
    if len(problems) > known_before:
        return None
    return Action(index=index, type=raw["type"], raw=raw, **fields)


def _check_kinds(place: _Place, raw: dict[str, Any]) -> None:
    """Unknown fields, and known ones of another JSON type, whether or not this type of action uses them."""
    for name, value in raw.items():
        kind = _FIELDS.get(name)
        if kind is None:
            place.within(name[:100], value).wrong("unknown field")
        elif value is not None and not isinstance(value, kind):
            place.within(name, value).wrong(f"must be a JSON {_JSON_NAMES[kind]}", _JSON_NAMES[kind])


def _shape(place: _Place, raw: dict[str, Any]) -> _Shape | None:
    action_type = raw.get("type")
    type_place = place.within("type", action_type)
    if action_type is None:
        type_place.wrong("This field is required", " | ".join(_TYPES), "required")
    elif not isinstance(action_type, str):
        return None  # _check_kinds has said so
    elif action_type in not_yet.ACTION_TYPES:
        type_place.wrong(not_yet.message(f"{action_type} actions"))
    elif action_type not in _SHAPES:
        type_place.wrong("unknown action type", " | ".join(_TYPES))
    else:
        return _SHAPES[action_type]
    return None


def _check_hold_until(place: _Place, raw: dict[str, Any]) -> None:
    # The one field that is refused where it has no meaning: ignored, it would leave a hold without an end.
    if raw.get("hold_until") is not None:
        place.within("hold_until", raw["hold_until"]).wrong("hold_until goes with HOLD and with CREDIT into HELD only")


def _read_fields(place: _Place, raw: dict[str, Any], shape: _Shape) -> dict[str, Any]:
    fields: dict[str, Any] = {}
    for name in (*shape.required, *shape.optional):
        value = raw.get(name)
        field = place.within(name, value)
        if value is None and name in shape.required:
            field.wrong("This field is required", _JSON_NAMES[_FIELDS[name]], "required")
        elif value is not None and isinstance(value, _FIELDS[name]):
            fields[name] = _READERS[name](field)
    return fields


def _read_uuid(field: _Place) -> UUID | None:
    try:
        found = UUID(field.value)
    except ValueError:
        found = None
    # UUID() also takes braces, URNs and digits without hyphens.
    if found is None or str(found) != field.value.lower():
        field.wrong("must be a UUID", "uuid")
        return None
    return found


def _read_expression(field: _Place) -> Expression | None:
    try:
        return compile_expression(field.value)
    except ExpressionError as error:
        field.wrong(f"invalid CEL: {error}", "CEL expression")
        return None


def _read_number(field: _Place) -> Expression | None:
    """A decimal literal, also in the forms that CEL doesn't write (`+10`, `10.`), or an expression."""
    literal = money.parse_number(field.value.strip())
    return _read_expression(field if literal is None else replace(field, value=format(literal, "f")))


def _read_bucket(field: _Place) -> str:
    if field.value in not_yet.BUCKETS:
        field.wrong(not_yet.message(f"actions on the {field.value} bucket"), "AVAILABLE")
    elif field.value != "AVAILABLE":
        field.wrong("unknown bucket", "AVAILABLE | HELD")
    return str(field.value)


def _read_as_is(field: _Place) -> Any:
    return field.value


def _read_description(field: _Place) -> str:
    return _read_text(field, field.value, DESCRIPTION_CHARS, shortest=0)


def _read_tag(field: _Place) -> str:
    return _read_text(field, field.value.lower(), limits.STATE_KEY_CHARS)


def _read_key(field: _Place) -> str:
    return _read_text(field, field.value, limits.STATE_KEY_CHARS)


def _read_text(field: _Place, text: str, longest: int, shortest: int = 1) -> str:
    if not shortest <= len(text) <= longest:
        field.wrong(f"must have {shortest} to {longest} characters", f"string of {shortest} to {longest} characters")
    return text


# Texts that would compile and are meant as they stand: dates and phone numbers would come out as differences
# (`2024-01-15` is 2008), single words name whole maps (`group`) or types (`string`). `now` alone is worth evaluating.
_PLAIN_ATTRIBUTE = re.compile(r"[\d\s.:/+-]+|(?!now$)[A-Za-z_][A-Za-z0-9_]*", re.ASCII)


def _read_value(field: _Place) -> Expression | str | None:
    if field.action_type == "COUNTER":
        return _read_number(field)
    text = _read_text(field, field.value, limits.ATTRIBUTE_CHARS)
    if _PLAIN_ATTRIBUTE.fullmatch(text):
        return text
    try:
        return compile_expression(text)
    except ExpressionError:
        return text


def _read_reset_after(field: _Place) -> str:
    if field.value == "":
        return ""
    try:
        if parse_duration(field.value).total_seconds() <= 0:
            field.wrong("must be a positive duration", "duration")
    except ValueError as error:
        field.wrong(str(error), "duration")
    return str(field.value)


def _read_target(field: _Place) -> Target | None:
    raw: dict[str, Any] = field.value
    _check_target_kinds(field, raw)
    target_type = raw.get("type")
    if not _check_target_type(field.within("type", target_type), target_type):
        return None
    named = [name for name in _PARTICIPANT_FIELDS if raw.get(name) is not None]
    if target_type == "PROGRAM":
        return _read_program_target(field, raw, named)
    if len(named) != 1:
        field.wrong(
            "a PARTICIPANT target takes exactly one of id, external_id and participant_id",
            "exactly one of id, external_id, participant_id",
            "invalid" if named else "required",
        )
        return None
    return _read_participant_target(field.within(named[0], raw[named[0]]), named[0])


def _check_target_kinds(field: _Place, raw: dict[str, Any]) -> None:
    for name, value in raw.items():
        if name not in _TARGET_FIELDS:
            field.within(name[:100], value).wrong("unknown field")
        elif value is not None and not isinstance(value, str):
            field.within(name, value).wrong("must be a JSON string", "string")


def _check_target_type(field: _Place, target_type: Any) -> bool:
    allowed = _SHAPES[field.action_type].targets
    expected = " | ".join(sorted(allowed))
    if target_type is None:
        field.wrong("This field is required", expected, "required")
    elif not isinstance(target_type, str):
        return False  # _check_target_kinds has said so
    elif target_type not in _STATEFUL:
        field.wrong("unknown target type", expected)
    elif target_type not in allowed:
        field.wrong(f"{field.action_type} cannot target a {target_type}", expected)
    elif target_type in not_yet.TARGET_TYPES:
        field.wrong(not_yet.message(f"{target_type} targets"))
    else:
        return True
    return False


def _read_program_target(field: _Place, raw: dict[str, Any], named: list[str]) -> Target:
    for name in named:
        if name != "id":
            field.within(name, raw[name]).wrong("names a participant, but the target is a PROGRAM", "absent")
    program_id = _read_uuid(field.within("id", raw["id"])) if isinstance(raw.get("id"), str) else None
    return Target("PROGRAM", program_id, None, None)


def _read_participant_target(field: _Place, name: str) -> Target | None:
    if not isinstance(field.value, str):
        return None  # _check_target_kinds has said so
    if name == "id":
        return Target("PARTICIPANT", _read_uuid(field), None, None)
    expression = _read_expression(field)
    if name == "external_id":
        return Target("PARTICIPANT", None, expression, None)
    return Target("PARTICIPANT", None, None, expression)


_READERS: dict[str, Callable[[_Place], Any]] = {
    "asset_id": _read_uuid,
    "amount": _read_number,
    "bucket": _read_bucket,
    "allow_negative": _read_as_is,
    "description": _read_description,
    "tag": _read_tag,
    "key": _read_key,
    "value": _read_value,
    "reset_after": _read_reset_after,
    "target": _read_target,
}
