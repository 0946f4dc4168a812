"""Rules: CEL conditions with actions, their versions, and trying them out. Contract: rules-and-events.md 2 and 8."""

import asyncio
from collections.abc import Iterable
from dataclasses import asdict
from decimal import Decimal
from typing import Annotated, Any, Literal
from uuid import UUID

from fastapi import Query
from pydantic import AfterValidator, BeforeValidator, Field
from pydantic_core import PydanticCustomError

from api.models import (
    AmountText,
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
from db.tables import Rule, RuleHistory
from domain import limits, money
from domain.clock import format_timestamp
from domain.exact_json import depth
from domain.pagination import Page
from domain.rules import simulate, store
from domain.rules.budgets import BudgetDraft
from domain.rules.cel import ExpressionError, compile_expression

router = make_router("Rules")

RuleStatus = Literal["ACTIVE", "SUSPENDED", "ARCHIVED"]
ScheduleType = Literal["CRON", "INTERVAL"]
ChangeType = Literal["created", "updated", "archived", "suspended", "activated"]

VALID = "CEL condition is valid"
VALID_NOTE = "Only the syntax was checked: the names of event fields are not known before an event arrives."

# The flat schema of the contract's 5.1 and 5.2, for the documentation; domain/rules/actions.py is what checks it.
ACTION_FIELDS = {
    "type": "Which action. This version runs all of the contract's but SET_TIER.",
    "asset_id": "CREDIT, DEBIT, HOLD, RELEASE, FORFEIT, VOID_HOLD: an asset that is linked to the program.",
    "amount": "A decimal string, or CEL that gives a number. Nothing is rounded: see round(x, n). RELEASE and FORFEIT"
    " without it take everything that matches; VOID_HOLD never has one.",
    "bucket": "CREDIT, DEBIT, FORFEIT: AVAILABLE, the default, or HELD.",
    "allow_negative": "DEBIT from AVAILABLE: whether the balance may go below zero; false by default.",
    "description": "Actions with an asset: description of the ledger entry.",
    "reference_id": "Actions on LOT assets: CEL that gives a string. A CREDIT into HELD is stamped with it, a CREDIT to"
    " AVAILABLE settles what was credited to HELD under it.",
    "expires_at": "CREDIT on LOT assets: when the lot expires; Go-style duration, RFC 3339 or CEL.",
    "matures_at": "CREDIT to AVAILABLE on LOT assets: until when it is DEFERRED; Go-style duration, RFC 3339 or CEL.",
    "hold_until": "HOLD, CREDIT into HELD: when the hold ends and releases; Go-style duration, RFC 3339 or CEL.",
    "tag": "TAG, UNTAG: the tag; stored in lower case.",
    "key": "COUNTER, SET_ATTRIBUTE: which one.",
    "value": "COUNTER: what is added, a decimal string or CEL. SET_ATTRIBUTE: CEL where it compiles, else plain text.",
    "reset_after": "COUNTER: Go-style duration after which it starts anew; an empty string removes the auto-reset.",
    "tier": "Not run by this version yet.",
    "level": "Not run by this version yet.",
    "event_name": "SCHEDULE_EVENT, BROADCAST: the `type` of the events that are made.",
    "delay": f"SCHEDULE_EVENT: Go-style duration after the event's own timestamp; at most {limits.DELAY_DAYS} days.",
    "payload": "SCHEDULE_EVENT, BROADCAST: the other members of `event_data`, passed on as they are.",
    "target": "Whom it is directed at. Without it the event's participant, or its recipient for actions with an asset."
    " BROADCAST has none.",
}
TARGET_FIELDS = {
    "type": "PARTICIPANT; GROUP, for actions with an asset and TAG, UNTAG, COUNTER and SET_ATTRIBUTE; PROGRAM for the"
    " latter four only.",
    "id": "The id, literally; for a GROUP also CEL. A PROGRAM without it is the event's own. A PARTICIPANT has exactly"
    " one of this and the next two.",
    "external_id": "PARTICIPANT: CEL that gives an external_id, such as event.referrer_id.",
    "participant_id": "PARTICIPANT: CEL that gives a participant's id, such as event.recipient_id.",
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


class BudgetIn(RequestModel):
    """The most that a rule may issue of an asset in a period, by CREDIT actions. Contract: rules-and-events.md 3."""

    asset_id: UUID = Field(description="An asset that is linked to the program; at most one budget for each.")
    limit: AmountText = Field(
        description="The most in one period. A credit that would go beyond it is left out as a whole.",
        examples=["10000.00"],
    )
    schedule_type: ScheduleType | None = Field(default=None, description="Without it: for the rule's lifetime.")
    cron_expression: str | None = Field(
        default=None, description="With CRON: when a new period begins, five fields, UTC.", examples=["0 0 1 * *"]
    )
    interval: str | None = Field(
        default=None, description="With INTERVAL: how long a period is, a Go-style duration.", examples=["720h"]
    )


class BudgetOut(ResponseModel):
    """A budget and its state."""

    asset_id: UUID = Field(description="The asset whose credits it caps.")
    limit: str = Field(description="The most in one period.")
    schedule_type: ScheduleType | None = Field(description="What begins a new period; null: nothing does.")
    cron_expression: str | None = omittable("When a new period begins, UTC; only with CRON.")
    interval: str | None = omittable("How long a period is; only with INTERVAL.")
    consumed: str = Field(
        description="Issued in the current period; more than `limit` only after `limit` was lowered below it."
    )
    next_reset_at: Timestamp | None = Field(description="When the next period begins; null for a lifetime budget.")


BudgetList = Annotated[
    list[BudgetIn],
    Field(max_length=limits.BUDGETS_PER_RULE, description="Caps on what the rule may issue, one per asset."),
]


class RuleFields(RequestModel):
    """What a rule is made of."""

    name: Name = Field(description="A label; need not be unique.")
    description: RuleDescription | None = None
    condition: Condition
    actions: Actions
    order: Order | None = Field(default=None, description="Without it: the program's highest order + 10.")
    stop_after_match: StopAfterMatch = False
    active_from: ActiveFrom = None
    active_to: ActiveTo = None
    budgets: BudgetList | None = Field(default=None, description="Without it, or empty: nothing is capped.")
    status: Literal["ACTIVE", "SUSPENDED"] = Field(default="ACTIVE", description="A rule cannot begin ARCHIVED.")


class RuleCreate(RuleFields):
    """A rule to be."""

    program_id: UUID = Field(description="The program that owns the rule, for good.")


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
    budgets: BudgetList = unset_field(
        "All of the new budgets. One whose asset stays keeps what it has consumed; `[]` removes all."
    )
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
    budgets: list[BudgetOut] = Field(description="With their state, by asset.")
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
    return await _answer_rule(tx, await store.create_rule(tx, draft_of(body, body.program_id)), 201)


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
    return _answer_page(await store.documents(tx, found.items), found)


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
    """Get a rule with the state of its budgets; archived ones too."""
    return await _answer_rule(tx, await store.get_rule(tx, id))


@router.patch("/rules/{id}", response_model=RuleOut)
async def update_rule(tx: Tx, id: UUID, body: RuleUpdate) -> JsonResponse:
    """Change a rule, for events processed from now on; each change is a new version in its history.

    409 `conflict` when the order is taken or the rule is archived, `program_inactive` when its program is archived.
    """
    body.required_changes()
    return await _answer_rule(tx, await store.patch_rule(tx, id, changes_of(body)))


@router.post("/rules/{id}/reset-budget", response_model=BudgetOut)
async def reset_rule_budget(
    tx: Tx, id: UUID, asset_id: Annotated[UUID, Query(description="Which of the rule's budgets.")]
) -> JsonResponse:
    """Set what a rule's budget has consumed to zero, and begin its next period.

    `next_reset_at` is the next point of a CRON schedule, a whole interval from now for INTERVAL, and null for a
    lifetime budget. 404 without such a budget; 409 `conflict` when the rule is archived, `program_inactive` when its
    program is.
    """
    return _answer((await store.reset_budget(tx, id, asset_id)).document(tx.now))


@router.post("/rules/{id}/simulate", response_model=Simulation)
async def simulate_rule(tx: Tx, id: UUID, body: SimulationRequest) -> JsonResponse:
    """Try a rule on an event. Nothing is stored; window, budgets and the rule's status are not considered."""
    rule = await store.get_rule(tx, id)
    given = body.participant_state or ParticipantState()
    state = simulate.SimulatedState([tag.lower() for tag in given.tags], given.counters, given.attributes)
    evaluation = await simulate.simulate_rule(tx, rule, body.event, state)
    return _answer(
        {
            "rule": SimulatedRule.of(rule, order=rule.rule_order).model_dump(mode="json"),
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
    return _answer_page([_shown_version(version) for version in found.items], found)


def _shown_version(version: RuleHistory) -> dict[str, Any]:
    return {
        **version.model_dump(exclude={"organization_id", "changed_at"}),
        "changed_at": format_timestamp(version.changed_at),
        "changed_by_user_id": None,
    }


def draft_of(fields: RuleFields, program_id: UUID) -> store.RuleDraft:
    """The rule that was sent, for the domain."""
    draft = {name: getattr(fields, name) for name in RuleFields.model_fields}
    return store.RuleDraft(program_id=program_id, **draft | {"budgets": _drafts(fields.budgets or ())})


def changes_of(body: RuleUpdate) -> dict[str, Any]:
    """The changes that were sent, for the domain; none where nothing was."""
    changes = body.changes()
    if "budgets" in changes:
        changes["budgets"] = _drafts(body.budgets)
    return changes


def _drafts(budgets: Iterable[BudgetIn]) -> list[BudgetDraft]:
    return [BudgetDraft(**budget.model_dump()) for budget in budgets]


async def _answer_rule(tx: Tx, rule: Rule, status: int = 200) -> JsonResponse:
    (shown,) = await store.documents(tx, [rule])
    return _answer(shown, status)


def _answer(body: dict[str, Any], status: int = 200) -> JsonResponse:
    # Not by pydantic, which would print the numbers of an action's payload as strings: actions come back as sent.
    return JsonResponse(json.dumps(body), status)


def _answer_page(shown: list[dict[str, Any]], page: Page[Any]) -> JsonResponse:
    return _answer({"data": shown, "pagination": {"has_more": page.has_more, "next_cursor": page.next_cursor}})
