"""Rules: CEL conditions with actions, their versions, and trying them out. Contract: rules-and-events.md 2 and 8."""

import asyncio
from collections.abc import Callable
from dataclasses import asdict
from decimal import Decimal
from typing import Annotated, Any, Literal, TypeVar
from uuid import UUID

from fastapi import Query
from pydantic import AfterValidator, BeforeValidator, Field
from pydantic_core import PydanticCustomError

from api.models import (
    Boolean,
    Integer,
    ListOf,
    Name,
    PatchModel,
    RequestModel,
    ResponseModel,
    Timestamp,
    omittable,
    unset_field,
)
from api.queries import From, IncludeArchived, PageOf20, PageOf50, Search, SortDirection, To
from api.responses import JsonResponse
from api.route import Tx, make_router
from db import json
from db.tables import RuleHistory
from domain import limits, money
from domain.clock import format_timestamp
from domain.exact_json import depth
from domain.pagination import Page
from domain.rules import simulate, store
from domain.rules.cel import ExpressionError, compile_expression

router = make_router("Rules")

Row = TypeVar("Row")

RuleStatus = Literal["ACTIVE", "SUSPENDED", "ARCHIVED"]
ChangeType = Literal["created", "updated", "archived", "suspended", "activated"]

VALID = "CEL condition is valid"
VALID_NOTE = "Only the syntax was checked: the names of event fields are not known before an event arrives."

# The flat schema of the contract's 5.1 and 5.2, for the documentation; domain/rules/actions.py is what checks it.
ACTION_FIELDS = {
    "type": "Which action. This version runs CREDIT, DEBIT, TAG, UNTAG, COUNTER and SET_ATTRIBUTE.",
    "asset_id": "CREDIT, DEBIT: an asset that is linked to the program.",
    "amount": "CREDIT, DEBIT: a decimal string, or CEL that gives a number. Nothing is rounded: see round(x, n).",
    "bucket": "CREDIT, DEBIT: AVAILABLE, the default.",
    "allow_negative": "DEBIT: whether the balance may go below zero; false by default.",
    "description": "CREDIT, DEBIT: description of the ledger entry.",
    "reference_id": "LOT assets only.",
    "expires_at": "LOT assets only.",
    "matures_at": "LOT assets only.",
    "hold_until": "Not run by this version yet.",
    "tag": "TAG, UNTAG: the tag; stored in lower case.",
    "key": "COUNTER, SET_ATTRIBUTE: which one.",
    "value": "COUNTER: what is added, a decimal string or CEL. SET_ATTRIBUTE: CEL where it compiles, else plain text.",
    "reset_after": "COUNTER: Go-style duration after which it starts anew; an empty string removes the auto-reset.",
    "tier": "Not run by this version yet.",
    "level": "Not run by this version yet.",
    "event_name": "Not run by this version yet.",
    "delay": "Not run by this version yet.",
    "payload": "Not run by this version yet.",
    "target": "Whom it is directed at; without it the event's participant, or its recipient for CREDIT and DEBIT.",
}
TARGET_FIELDS = {
    "type": "PARTICIPANT, with exactly one of the others; or PROGRAM, the event's own, for TAG to SET_ATTRIBUTE.",
    "id": "The participant's id, literally.",
    "external_id": "CEL that gives an external_id, such as event.referrer_id.",
    "participant_id": "CEL that gives a participant's id, such as event.recipient_id.",
}
_ACTION_TYPES = {"allow_negative": "boolean", "payload": "object"}
_TARGET_SCHEMA = {
    "type": "object",
    "description": ACTION_FIELDS["target"],
    "required": ["type"],
    "additionalProperties": False,
    "properties": {name: {"type": "string", "description": text} for name, text in TARGET_FIELDS.items()},
}
_ACTION_SCHEMA = {
    "type": "object",
    "required": ["type"],
    "additionalProperties": False,
    "properties": {
        name: {"type": _ACTION_TYPES.get(name, "string"), "description": text} for name, text in ACTION_FIELDS.items()
    }
    | {"target": _TARGET_SCHEMA},
}

RuleDescription = Annotated[str, Field(max_length=1_000, description="For people; at most 1,000 characters.")]
Condition = Annotated[
    str,
    Field(
        min_length=1,
        description=f"CEL that gives a bool; at most {limits.EXPRESSION_CHARS:,} characters.",
        examples=["event.type == 'purchase' && event.amount >= 100.0"],
    ),
]
Actions = Annotated[
    list[Any],
    Field(
        description="What happens on a match, in this order. A field that no action has is refused.",
        examples=[
            [
                {"type": "CREDIT", "asset_id": "0197f3b4-c1d2-7c3e-8f00-1a2b3c4d5e6f", "amount": "event.amount * 10"},
                {"type": "COUNTER", "key": "purchase_count", "value": "1"},
            ]
        ],
        json_schema_extra={"items": _ACTION_SCHEMA, "minItems": 1, "maxItems": limits.ACTIONS_PER_RULE},
    ),
]
Order = Annotated[
    Integer, Field(ge=1, le=store.ORDER_MAX, description="Lower runs first; unique among the program's ACTIVE rules.")
]
StopAfterMatch = Annotated[Boolean, Field(description="On a match, skip every later rule.")]
ActiveFrom = Annotated[Timestamp | None, Field(description="Start of the window, by wall clock; null is open.")]
ActiveTo = Annotated[Timestamp | None, Field(description="End of the window, exclusive, by wall clock; null is open.")]
Budgets = Annotated[list[Any] | None, Field(description="Rule budgets: not run by this version yet, so only `[]`.")]


class RuleCreate(RequestModel):
    """A rule to be."""

    program_id: UUID = Field(description="The program that owns the rule, for good.")
    name: Name = Field(description="A label; need not be unique.")
    description: RuleDescription | None = None
    condition: Condition
    actions: Actions
    order: Order | None = Field(default=None, description="Without it: the program's highest order + 10.")
    stop_after_match: StopAfterMatch = False
    active_from: ActiveFrom = None
    active_to: ActiveTo = None
    budgets: Budgets = None
    status: Literal["ACTIVE", "SUSPENDED"] = Field(default="ACTIVE", description="A rule cannot begin ARCHIVED.")


class RuleUpdate(PatchModel):
    """What to change; the rest stays. null clears description, active_from and active_to, and nothing else."""

    name: Name = unset_field("The new label.")
    description: RuleDescription | None = unset_field("The new description; null clears it.")
    condition: Condition = unset_field("The new condition.")
    actions: Actions = unset_field("All of the new actions.")
    order: Order = unset_field("The new place.")
    stop_after_match: Boolean = unset_field("On a match, skip every later rule.")
    active_from: Timestamp | None = unset_field("Start of the window, by wall clock; null opens it.")
    active_to: Timestamp | None = unset_field("End of the window, exclusive, by wall clock; null opens it.")
    budgets: Budgets = unset_field("Rule budgets: not run by this version yet, so only `[]`.")
    status: RuleStatus = unset_field("SUSPENDED keeps the rule without running it; ARCHIVED is for good.")


class RuleOut(ResponseModel):
    """A rule."""

    id: UUID = Field(description="Called `rule_id` elsewhere.")
    program_id: UUID = Field(description="The program that owns it.")
    name: str = Field(description="The label.")
    description: str | None = Field(description="The description, or null.")
    condition: str = Field(description="CEL, as it was sent.")
    actions: list[dict[str, Any]] = Field(description="In the order in which they run, as they were sent.")
    order: int = Field(description="Lower runs first.")
    stop_after_match: bool = Field(description="Whether a match skips every later rule.")
    active_from: Timestamp | None = Field(description="Start of the window; null is open.")
    active_to: Timestamp | None = Field(description="End of the window, exclusive; null is open.")
    budgets: list[dict[str, Any]] = Field(description="With their state; always empty in this version.")
    status: RuleStatus = Field(description="Only ACTIVE rules are evaluated.")
    created_at: Timestamp = Field(description="When it was created.")
    updated_at: Timestamp = Field(description="When it was last changed.")
    deleted_at: Timestamp | None = omittable("When it was archived; absent before.")


class RuleVersionOut(ResponseModel):
    """One version of a rule."""

    id: UUID = Field(description="The `rule_history_id` of evaluations that used this version.")
    rule_id: UUID = Field(description="The rule.")
    program_id: UUID = Field(description="Its program.")
    change_type: ChangeType = Field(description="What kind of change made this version.")
    changed_at: Timestamp = Field(description="When the change was made.")
    changed_by_api_key_id: UUID | None = Field(description="The API key that made it.")
    changed_by_user_id: UUID | None = Field(description="Always null: changes are made with API keys.")
    changes: dict[str, Any] = Field(description="field -> `{old, new}`")
    snapshot: dict[str, Any] = Field(description="The whole rule after the change.")


class ConditionCheck(RequestModel):
    """A condition to check."""

    condition: Condition


class ConditionVerdict(ResponseModel):
    """Whether a condition could be saved."""

    valid: bool = Field(description="Whether it compiles.")
    message: str = Field(description="What is wrong, with line, column and a hint, if anything is.")
    note: str | None = omittable("What was not checked; only when valid.")


def _within_event_limits(event: dict[str, Any]) -> dict[str, Any]:
    if depth(event) > limits.EVENT_DATA_DEPTH:
        raise _wrong(f"nested deeper than {limits.EVENT_DATA_DEPTH}", "a flatter object")
    if len(json.dumps(event)) > limits.EVENT_DATA_BYTES:
        raise _wrong(f"larger than {limits.EVENT_DATA_BYTES // 1024} KiB", "a smaller object")
    return event


def _read_counter(value: Any) -> Decimal:
    number = money.parse_number(value) if isinstance(value, str) else value
    if not isinstance(number, Decimal):
        raise _wrong("must be a decimal string", "decimal string")
    if not (money.fits_size(number) and money.fits_scale(number, limits.COUNTER_DECIMALS)):
        raise _wrong("is more than a counter can hold", "decimal string")
    return number


def _wrong(message: str, expected: str) -> PydanticCustomError:
    return PydanticCustomError("invalid", "{reason}", {"reason": message, "expected": expected})


StateKey = Annotated[str, Field(min_length=1, max_length=limits.STATE_KEY_CHARS)]


class ParticipantState(RequestModel):
    """The state that the simulated participant has; parts left out are empty."""

    tags: list[StateKey] = Field(default=[], max_length=limits.STATE_KEYS, description="Upper or lower case.")
    counters: dict[StateKey, Annotated[Decimal, BeforeValidator(_read_counter, json_schema_input_type=str)]] = Field(
        default={}, max_length=limits.STATE_KEYS, description="Decimal strings."
    )
    attributes: dict[StateKey, Annotated[str, Field(max_length=limits.ATTRIBUTE_CHARS)]] = Field(
        default={}, max_length=limits.STATE_KEYS, description="Strings."
    )


class SimulationRequest(RequestModel):
    """An event that never happened, and the participant it would have happened to."""

    event: Annotated[dict[str, Any], AfterValidator(_within_event_limits)] = Field(
        description="The event's data, as `event_data` of an ingested event.",
        examples=[{"type": "purchase", "amount": 75}],
    )
    participant_state: ParticipantState | None = Field(default=None, description="Without it: no state at all.")


class SimulatedRule(ResponseModel):
    """The rule that was tried."""

    id: UUID = Field(description="The rule.")
    name: str = Field(description="Its label.")
    condition: str = Field(description="Its condition.")
    order: int = Field(description="Its place in the program.")
    stop_after_match: bool = Field(description="Whether a match skips every later rule.")


class SimulatedAction(ResponseModel):
    """An action and what it would do, or `{error}` where that cannot be computed."""

    action: dict[str, Any] = Field(description="The action as it is stored.")
    result: dict[str, Any] = Field(description="Resolved values, and projections of the given state.")


class SimulatedEvaluation(ResponseModel):
    """How the condition came out, and on a match what the actions would do."""

    matched: bool = Field(description="Whether the condition is true.")
    status: Literal["evaluated", "condition_failed"] = Field(description="Whether the condition has a value at all.")
    reason: str | None = omittable("Why the condition has no value; only with `condition_failed`.")
    results: list[SimulatedAction] | None = omittable("One per action; only when matched.")


class Simulation(ResponseModel):
    """The outcome of a dry run."""

    rule: SimulatedRule = Field(description="The rule that was tried.")
    evaluation: SimulatedEvaluation = Field(description="How it went.")


@router.post("/rules", status_code=201, response_model=RuleOut)
async def create_rule(tx: Tx, body: RuleCreate) -> JsonResponse:
    """Create a rule.

    404 for an unknown program or asset; 409 `conflict` when the order is taken, `program_inactive` when the program
    is archived, `asset_archived`; 422 `asset_not_linked`. Every action's problem is named as `actions[i].field`.
    """
    draft = {name: getattr(body, name) for name in RuleCreate.model_fields}
    return _answer(store.document(await store.create_rule(tx, store.RuleDraft(**draft))), 201)


@router.get("/rules", response_model=ListOf[RuleOut])
async def list_rules(
    tx: Tx,
    page: PageOf50,
    program_id: Annotated[UUID | None, Query(description="Only rules of this program.")] = None,
    status: Annotated[RuleStatus | None, Query(description="Only this status; ARCHIVED lists archived ones.")] = None,
    include_archived: IncludeArchived = False,
    search: Search = None,
    sort_by: Annotated[Literal["order", "name", "created_at", "updated_at"], Query(description="Sort key.")] = "order",
    sort_dir: SortDirection = "asc",
) -> JsonResponse:
    """List rules, by default in the order in which they run."""
    found = await store.list_rules(
        tx,
        page,
        program_id=program_id,
        status=status,
        include_archived=include_archived,
        search=search,
        sort_by=sort_by,
        descending=sort_dir == "desc",
    )
    return _answer_page(found, store.document)


@router.post("/rules/validate", response_model=ConditionVerdict)
async def validate_condition(tx: Tx, body: ConditionCheck) -> ConditionVerdict:
    """Check the syntax of a condition without saving anything."""
    try:
        await asyncio.to_thread(compile_expression, body.condition)
    except ExpressionError as error:
        return ConditionVerdict(valid=False, message=str(error))
    return ConditionVerdict(valid=True, message=VALID, note=VALID_NOTE)


@router.get("/rules/{id}", response_model=RuleOut)
async def get_rule(tx: Tx, id: UUID) -> JsonResponse:
    """Get a rule; archived ones too."""
    return _answer(store.document(await store.get_rule(tx, id)))


@router.patch("/rules/{id}", response_model=RuleOut)
async def update_rule(tx: Tx, id: UUID, body: RuleUpdate) -> JsonResponse:
    """Change a rule, for events processed from now on; each change is a new version in its history.

    409 `conflict` when the order is taken or the rule is archived, `program_inactive` when its program is archived.
    """
    return _answer(store.document(await store.patch_rule(tx, id, body.required_changes())))


@router.post("/rules/{id}/simulate", response_model=Simulation)
async def simulate_rule(tx: Tx, id: UUID, body: SimulationRequest) -> JsonResponse:
    """Try a rule on an event. Nothing is stored; window, budgets and the rule's status are not considered."""
    rule = await store.get_rule(tx, id)
    given = body.participant_state or ParticipantState()
    state = simulate.SimulatedState([tag.lower() for tag in given.tags], given.counters, given.attributes)
    evaluation = await simulate.simulate_rule(tx, rule, body.event, state)
    shown = store.document(rule)
    return _answer(
        {
            "rule": {name: shown[name] for name in SimulatedRule.model_fields},
            "evaluation": {name: value for name, value in asdict(evaluation).items() if value is not None},
        }
    )


@router.get("/rules/{id}/history", response_model=ListOf[RuleVersionOut])
async def list_rule_history(
    tx: Tx,
    id: UUID,
    page: PageOf20,
    change_type: Annotated[ChangeType | None, Query(description="Only this kind of change.")] = None,
    since: From = None,
    to: To = None,
) -> JsonResponse:
    """List the versions of a rule, newest first."""
    found = await store.list_history(tx, id, page, change_type=change_type, changed_from=since, changed_to=to)
    return _answer_page(found, _shown_version)


def _shown_version(version: RuleHistory) -> dict[str, Any]:
    return {
        **version.model_dump(exclude={"organization_id", "changed_at"}),
        "changed_at": format_timestamp(version.changed_at),
        "changed_by_user_id": None,
    }


def _answer(body: dict[str, Any], status: int = 200) -> JsonResponse:
    # Not by pydantic, which would print the numbers of an action's payload as strings: actions come back as sent.
    return JsonResponse(json.dumps(body), status)


def _answer_page(page: Page[Row], present: Callable[[Row], dict[str, Any]]) -> JsonResponse:
    return _answer(
        {
            "data": [present(row) for row in page.items],
            "pagination": {"has_more": page.has_more, "next_cursor": page.next_cursor},
        }
    )
