"""A rule's actions: what each type needs, checked at save and turned into what the engine runs.

One table says which fields a type uses (here), another how a field is read (fields.py); nothing else knows an action's
shape. Contract: rules-and-events.md 5.

Amounts have run-time semantics also where they are literals: the contract makes a negative amount, or one with more
decimals than its asset's scale, a failure of the action (5.4), and its list of refusals at save (5.17) has neither.
So saving never depends on whether an amount was written as `"1.005"` or as `"event.amount"`. A time that can never be
one (`"720"`, without a unit) is refused at save, as a bad duration.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime, timedelta
from typing import Any
from uuid import UUID

from db import json
from db.session import Transaction
from domain import limits
from domain.errors import Problem, Refusal
from domain.rules import not_yet
from domain.rules.cel import Expression
from domain.rules.fields import FIELDS, JSON_NAMES, Place, Target, When, read_field

__all__ = ["Action", "Target", "When", "check_references", "parse_actions"]

PROBLEMS_REPORTED = 100
EXPRESSION_CHARS_PER_RULE = 32 * 1024
"""All expressions of a rule's actions together: compiling takes about 40 microseconds a character at worst."""


@dataclass(frozen=True, slots=True)
class Action:
    """One action, ready to run. `index` is its place in the rule; `raw` is the action as it was sent and is stored.

    `target` None means the event's participant (or its recipient). Fields that the type doesn't use are at their
    defaults. `value` of a COUNTER is always an Expression; of a SET_ATTRIBUTE a str is a literal. `tag` is lower-case.
    `reset_after` is a Go duration, or "" to remove the auto-reset, or None to leave it. `amount` None, on RELEASE and
    FORFEIT, means everything that matches. `payload` is passed on as it is.
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
    reference_id: Expression | None = None
    expires_at: When | None = None
    matures_at: When | None = None
    hold_until: When | None = None
    event_name: str | None = None
    delay: timedelta | None = None
    payload: dict[str, Any] | None = None

    def expressions(self) -> tuple[Expression, ...]:
        """Every expression that running this action evaluates."""
        target = self.target
        addressed = (target.external_id, target.participant_id, target.group_id) if target else ()
        timed = (self.expires_at, self.matures_at, self.hold_until)
        given = (self.amount, self.value, self.reference_id, *timed, *addressed)
        return tuple(found for found in given if isinstance(found, Expression))


@dataclass(frozen=True, slots=True)
class _Shape:
    """The fields that a type uses, and those that would be dangerous to ignore, with what is said about them."""

    required: tuple[str, ...]
    optional: tuple[str, ...]
    refused: Mapping[str, str] = field(default_factory=dict)


_SHAPES: dict[str, _Shape] = {
    "CREDIT": _Shape(
        ("asset_id", "amount"),
        ("bucket", "description", "reference_id", "expires_at", "matures_at", "hold_until", "target"),
    ),
    "DEBIT": _Shape(("asset_id", "amount"), ("bucket", "allow_negative", "description", "reference_id", "target")),
    "HOLD": _Shape(("asset_id", "amount"), ("description", "reference_id", "hold_until", "target")),
    "RELEASE": _Shape(("asset_id",), ("amount", "description", "reference_id", "target")),
    "FORFEIT": _Shape(("asset_id",), ("amount", "bucket", "description", "reference_id", "target")),
    "VOID_HOLD": _Shape(
        ("asset_id", "reference_id"),
        ("description", "target"),
        {"amount": "a VOID_HOLD takes the whole accrual of its reference and has no amount"},
    ),
    "TAG": _Shape(("tag",), ("target",)),
    "UNTAG": _Shape(("tag",), ("target",)),
    "COUNTER": _Shape(("key", "value"), ("reset_after", "target")),
    "SET_ATTRIBUTE": _Shape(("key", "value"), ("target",)),
    "SCHEDULE_EVENT": _Shape(("event_name", "delay"), ("payload", "target")),
    "BROADCAST": _Shape(
        ("event_name",),
        ("payload",),
        {"target": "a BROADCAST goes to every active participant of the program and has no target"},
    ),
}
_TYPES = (*_SHAPES, *sorted(not_yet.ACTION_TYPES))
_LOT_FIELDS = ("reference_id", "expires_at", "matures_at")
_EXPRESSION_FIELDS = ("amount", "value", "reference_id", "expires_at", "matures_at", "hold_until")
_TARGET_EXPRESSION_FIELDS = ("id", "external_id", "participant_id")


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
    if len(json.dumps(list(raw_actions))) > limits.ACTIONS_BYTES_PER_RULE:
        # Every version of a rule is kept, and a process holds the rules of many programs.
        message = f"a rule's actions have at most {limits.ACTIONS_BYTES_PER_RULE:,} bytes of JSON together"
        raise _refusal([Problem("actions", message, expected="smaller payloads")])
    problems: list[Problem] = []
    actions = [_parse_action(index, raw, problems) for index, raw in enumerate(raw_actions)]
    if problems:
        raise _refusal(problems)
    return tuple(action for action in actions if action is not None)


def _expression_chars(raw: Any) -> int:
    if not isinstance(raw, dict):
        return 0
    texts = [raw.get(name) for name in _EXPRESSION_FIELDS]
    target = raw.get("target")
    if isinstance(target, dict):
        texts += [target.get(name) for name in _TARGET_EXPRESSION_FIELDS]
    return sum(len(text) for text in texts if isinstance(text, str))


async def check_references(tx: Transaction, program_id: UUID, actions: Sequence[Action]) -> None:
    """Whether a rule of the program may use the programs and assets that the actions name; two queries at most.

    Participants and groups are looked up when an action runs, and fail it where there are none (5.2).

    Raises Refusal: 404 `not_found` for a program or an asset that the organization doesn't have, 409 `asset_archived`,
    422 `asset_not_linked`, 400 `bad_request` for what only LOT assets have on a SIMPLE one.
    """
    await _check_programs(tx, program_id, actions)
    await _check_assets(tx, program_id, actions)


async def _check_programs(tx: Transaction, program_id: UUID, actions: Sequence[Action]) -> None:
    foreign = {
        action.index: action.target.id
        for action in actions
        if action.target is not None and action.target.type == "PROGRAM" and action.target.id not in (None, program_id)
    }
    if not foreign:
        return
    found = await tx.rows(
        "select id from program where organization_id = %s and id = any(%s)",
        [tx.organization_id, list(set(foreign.values()))],
    )
    known = {row["id"] for row in found}
    problems = [
        Problem(f"actions[{index}].target.id", "program not found", received=str(target_id))
        for index, target_id in foreign.items()
        if target_id not in known
    ]
    if problems:
        raise Refusal("not_found", "program not found", problems)


async def _check_assets(tx: Transaction, program_id: UUID, actions: Sequence[Action]) -> None:
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
    if inventory_mode != "SIMPLE":
        return []
    path = f"actions[{action.index}]"
    message = "{} needs an asset of inventory_mode LOT"
    problems = [
        Problem(f"{path}.{name}", message.format(name), received=action.raw[name])
        for name in _LOT_FIELDS
        if getattr(action, name) is not None
    ]
    if action.type == "VOID_HOLD":
        problems.insert(0, Problem(f"{path}.asset_id", message.format("VOID_HOLD"), received=action.raw["asset_id"]))
    return problems


def _refusal(problems: Sequence[Problem]) -> Refusal:
    return Refusal("bad_request", "Invalid request parameters", problems[:PROBLEMS_REPORTED])


def _parse_action(index: int, raw: Any, problems: list[Problem]) -> Action | None:
    place = Place(f"actions[{index}]", "", raw, problems)
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
    _check_misplaced(place, raw, shape)
    fields = _read_fields(place, raw, shape)
    _check_order_of_terms(place, raw, fields)
    if len(problems) > known_before:
        return None
    return Action(index=index, type=raw["type"], raw=raw, **fields)


def _check_kinds(place: Place, raw: dict[str, Any]) -> None:
    """Unknown fields, and known ones of another JSON type, whether or not this type of action uses them."""
    for name, value in raw.items():
        kind = FIELDS.get(name)
        if kind is None:
            place.within(name[:100], value).wrong("unknown field")
        elif value is not None and not isinstance(value, kind):
            place.within(name, value).wrong(f"must be a JSON {JSON_NAMES[kind]}", JSON_NAMES[kind])


def _shape(place: Place, raw: dict[str, Any]) -> _Shape | None:
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


def _check_misplaced(place: Place, raw: dict[str, Any], shape: _Shape) -> None:
    """Fields that are refused where they have no meaning: ignored, they would change what happens to value."""
    into_held = raw.get("bucket") == "HELD"
    messages = dict(shape.refused)
    if not (place.action_type == "HOLD" or (place.action_type == "CREDIT" and into_held)):
        messages["hold_until"] = "hold_until goes with HOLD and with CREDIT into HELD only"
    if place.action_type == "CREDIT" and into_held:
        messages["matures_at"] = "value in HELD does not mature"
    if place.action_type == "DEBIT" and into_held and raw.get("allow_negative") is True:
        messages["allow_negative"] = "a debit from HELD cannot go below zero"
    for name, message in messages.items():
        if raw.get(name) is not None:
            place.within(name, raw[name]).wrong(message, "absent")


def _read_fields(place: Place, raw: dict[str, Any], shape: _Shape) -> dict[str, Any]:
    fields: dict[str, Any] = {}
    for name in (*shape.required, *shape.optional):
        value = raw.get(name)
        field_place = place.within(name, value)
        if value is None and name in shape.required:
            field_place.wrong("This field is required", JSON_NAMES[FIELDS[name]], "required")
        elif value is not None and isinstance(value, FIELDS[name]):
            fields[name] = read_field(name, field_place)
    return fields


def _check_order_of_terms(place: Place, raw: dict[str, Any], fields: Mapping[str, Any]) -> None:
    """A lot that expires before it matures, where both ends are known already."""
    expires_at: Any = fields.get("expires_at")
    matures_at: Any = fields.get("matures_at")
    is_known = any(all(isinstance(term, kind) for term in (expires_at, matures_at)) for kind in (timedelta, datetime))
    if is_known and expires_at <= matures_at:
        place.within("expires_at", raw["expires_at"]).wrong("must be later than matures_at", "a later time")
