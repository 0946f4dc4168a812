"""Running rules against past events. Contract: README.md "Simulations", rules-and-events.md 7.6."""

import logging
from collections.abc import Mapping
from decimal import Decimal
from typing import Annotated, Any, TypeVar
from uuid import UUID

from fastapi import Query
from pydantic import Field, ValidationError
from starlette.requests import Request
from starlette.responses import Response
from temporalio.exceptions import TemporalError

from api.afterwards import Afterwards
from api.errors import problems_of
from api.models import ListOf, RequestModel, ResponseModel, Timestamp, omittable
from api.queries import PageOf50, pagination_of
from api.responses import JsonResponse, no_content, respond_dict
from api.route import ApiServices, Tx, make_router
from api.rules import RuleFields, RuleUpdate, changes_of, draft_of
from db.session import Transaction
from db.tables import Simulation
from domain import limits, programs
from domain.clock import format_timestamp
from domain.errors import Problem, Refusal, bad_field
from domain.rules.store import RuleDraft
from domain.simulations import records
from domain.simulations.answers import RuleFigures, read_figures
from domain.simulations.records import Basis, CarriedSimulation, SimulationRequest, Status
from domain.simulations.rule_sets import Asked, ChangedRule
from domain.simulations.tallies import Tally

Model = TypeVar("Model", bound=RequestModel)

router = make_router("Simulations")

logger = logging.getLogger("scrip.temporal")

_CHANGED_RULE = "`{rule_id, changes}`, a rule of the program with the fields of a PATCH"
_RULES = (
    f"Nothing: the ACTIVE rules as they are. An object {_CHANGED_RULE}: the ACTIVE rules with that one changed, or"
    f" added if it is not ACTIVE. An array: exactly these, each a draft as for `POST /v1/rules` (without `program_id`)"
    f" or {_CHANGED_RULE}; drafts without an `order` come last."
)


class SimulationCreate(RequestModel):
    """Which rules to run against which past events."""

    rules: Any = Field(
        default=None,
        description=_RULES,
        examples=[{"rule_id": "0197f3b4-c1d2-7c3e-8f00-1a2b3c4d5e6f", "changes": {"stop_after_match": True}}],
        json_schema_extra={"type": ["array", "object", "null"]},
    )
    from_: Timestamp = Field(alias="from", description="Events that were processed at or after this instant.")
    to: Timestamp = Field(description="And at or before this one; one in the future means now.")
    participant_filter: Annotated[str, Field(min_length=1, max_length=limits.EXPRESSION_CHARS)] | None = Field(
        default=None,
        description="CEL over `participant` as it is now, and `now`: only events of whom it is true for are simulated."
        " What those of the others really did stays as it was.",
        examples=["'vip' in participant.tags"],
    )


class AmountOf(ResponseModel):
    """An amount of an asset."""

    asset_id: UUID = Field(description="The asset.")
    amount: str = Field(description="Decimal string at the asset's scale.")


class RuleTally(ResponseModel):
    """What a rule did; nothing of an event that failed counts as done."""

    matches: int = Field(description="Events in which its condition was true.")
    failed: int = Field(description="Those of them that ended FAILED, by whichever rule.")
    skipped_budget: int = Field(description="Those in which a spent budget suppressed a credit.")
    errors: int = Field(description="Events in which its condition had no value: a missing field, a type error.")
    scheduled_events: int = Field(description="Events that it scheduled. Simulated ones are counted, not run.")
    broadcasts: int = Field(description="Broadcasts that it made. Simulated ones are counted, not run.")
    issued: list[AmountOf] = Field(description="What it credited, per asset; of a settle its delta.")


class SimulatedRuleOut(ResponseModel):
    """A rule with what it would have done, and what it really did."""

    rule_id: UUID | None = Field(description="The stored rule; null for a draft.")
    name: str = Field(description="Its label.")
    order: int | None = Field(description="Its place in the simulation; null if it is not part of it.")
    is_changed: bool = Field(description="Whether it is simulated with changes.")
    runs: bool = Field(description="Whether it is evaluated; false for one that really matched and is not simulated.")
    simulated: RuleTally = Field(description="What it would have done; zeros for one that does not run.")
    actual: RuleTally = Field(description="What it really did with the same events, whatever its version then.")


class ProgressOut(ResponseModel):
    """How far a simulation has come."""

    events_done: int = Field(description="Events that it has gone through, those left out included.")
    events_total: int = Field(description="Events of the range; 0 until it begins.")


class EndedEvents(ResponseModel):
    """How events ended."""

    completed: int = Field(description="COMPLETED.")
    failed: int = Field(description="FAILED.")


class BothEnds(ResponseModel):
    """How the simulated events end, and how they really ended."""

    simulated: EndedEvents
    actual: EndedEvents
    left_out: int = Field(description="Events of participants whom the filter leaves out; in neither count.")


class BothIssues(ResponseModel):
    """What all rules together issue, and what they really issued."""

    simulated: list[AmountOf]
    actual: list[AmountOf]


class SimulationSummary(ResponseModel):
    """A simulation, without its figures."""

    id: UUID = Field(description="Called `simulation_id` elsewhere.")
    program_id: UUID = Field(description="Whose events they are.")
    status: Status = Field(description="RUNNING has figures already; CANCELED and FAILED keep those they have.")
    from_: Timestamp = Field(alias="from", description="Start of the range.")
    to: Timestamp = Field(description="End of the range.")
    participant_filter: str | None = Field(description="Whose events are simulated; null: everybody's.")
    basis: Basis = Field(
        description="BEGINNING: the program has no earlier events. STATE_AT_FROM: it begins with the state at `from`,"
        " as far as it is known."
    )
    progress: ProgressOut
    error: str | None = omittable("Why it FAILED.")
    created_at: Timestamp
    updated_at: Timestamp
    finished_at: Timestamp | None = Field(description="When it ended; null before.")


class SimulationOut(SimulationSummary):
    """A simulation with its figures so far."""

    events: BothEnds
    issued: BothIssues
    rules: list[SimulatedRuleOut] = Field(
        description="In the order in which they run, then those that really matched and are not part of it."
    )
    notes: list[str] = Field(description="What to bear in mind, for people.")


@router.post("/programs/{id}/simulations", status_code=202, response_model=SimulationOut)
async def create_simulation(tx: Tx, id: UUID, body: SimulationCreate, request: Request) -> Response:
    """Run rules against past events of the program, without touching its ledger, state or budgets.

    It runs in the background: ask for it by its id. Rules are checked as when they are saved, problems named as
    `rules[i].field`. 409 `conflict` while five simulations of the organization are open.
    """
    asked = _asked(body.rules, id)
    wanted = SimulationRequest(id, asked, body.from_, body.to, body.participant_filter)
    simulation = await records.create(tx, wanted)
    answer = respond_dict(await _shown(tx, simulation), 202)
    carried = CarriedSimulation(tx.organization_id, simulation.id, id)
    return _started(carried, request.app.state.services, answer)


@router.get("/programs/{id}/simulations", response_model=ListOf[SimulationSummary])
async def list_simulations(
    tx: Tx,
    id: UUID,
    page: PageOf50,
    status: Annotated[Status | None, Query(description="Only this status.")] = None,
) -> JsonResponse:
    """List the program's simulations, newest first, without their figures."""
    found = await records.find(tx, id, page, status)
    return respond_dict(
        {"data": [_summary(item) for item in found.items], "pagination": pagination_of(found).model_dump()}
    )


@router.get("/programs/{id}/simulations/{simulation_id}", response_model=SimulationOut)
async def get_simulation(tx: Tx, id: UUID, simulation_id: UUID) -> JsonResponse:
    """Get a simulation: how far it has come, and its figures so far."""
    await programs.get(tx, id)
    return respond_dict(await _shown(tx, await records.get(tx, id, simulation_id)))


@router.delete("/programs/{id}/simulations/{simulation_id}", status_code=204)
async def cancel_simulation(tx: Tx, id: UUID, simulation_id: UUID) -> Response:
    """Cancel a simulation; it keeps the figures that it has. One that has ended stays as it is."""
    await programs.get(tx, id)
    await records.get(tx, id, simulation_id)
    await records.cancel(tx, simulation_id)
    return no_content()


def _started(carried: CarriedSimulation, services: ApiServices, answer: Response) -> Response:
    """The answer, once the workflow is started; where Temporal is out of reach reconciling starts it later."""

    async def work() -> Response:
        try:
            await services.gateway.start_simulation(carried)
        except (TemporalError, RuntimeError) as error:
            logger.warning("simulation %s was not started, reconcile will: %s", carried.id, error)
        return answer

    return Afterwards(work)


# --- what is asked for -----------------------------------------------------------------------------------------------


class _ChangedRuleBody(RequestModel):
    rule_id: UUID
    changes: RuleUpdate = Field(default_factory=RuleUpdate)


def _asked(rules: Any, program_id: UUID) -> Asked:
    """The rules that a body asks for. Raises Refusal naming `rules…`."""
    if rules is None:
        return None
    if isinstance(rules, dict):
        return _changed(rules, "rules")
    if not isinstance(rules, list):
        raise bad_field("rules", "must be an array or an object", expected="array | object", received=rules)
    if len(rules) > limits.RULES_PER_PROGRAM:
        message = f"has at most {limits.RULES_PER_PROGRAM} rules"
        raise bad_field("rules", message, expected="a shorter array")
    return [_item(item, program_id, f"rules[{index}]") for index, item in enumerate(rules)]


def _item(item: Any, program_id: UUID, place: str) -> RuleDraft | ChangedRule:
    if not isinstance(item, dict):
        raise bad_field(place, "a rule is an object", expected="object", received=item)
    if "rule_id" in item:
        return _changed(item, place)
    return draft_of(_validated(RuleFields, item, place), program_id)


def _changed(item: Mapping[str, Any], place: str) -> ChangedRule:
    body = _validated(_ChangedRuleBody, item, place)
    return ChangedRule(body.rule_id, changes_of(body.changes))


def _validated(model: type[Model], item: Mapping[str, Any], place: str) -> Model:
    try:
        return model.model_validate(item)
    except ValidationError as error:
        problems = problems_of(error.errors())
        placed = [
            Problem(f"{place}.{found.field}", found.message, found.reason, found.expected, found.received)
            for found in problems
        ]
        raise Refusal("bad_request", "Invalid request parameters", placed) from None


# --- what is shown ---------------------------------------------------------------------------------------------------


async def _shown(tx: Transaction, simulation: Simulation) -> dict[str, Any]:
    figures = await read_figures(tx, simulation)
    return _summary(simulation) | {
        "events": {
            "simulated": {"completed": figures.simulated.completed, "failed": figures.simulated.failed},
            "actual": {"completed": figures.actual.completed, "failed": figures.actual.failed},
            "left_out": figures.left_out,
        },
        "issued": {
            "simulated": _amounts(figures.simulated.issued()),
            "actual": _amounts(figures.actual.issued()),
        },
        "rules": [_shown_rule(rule) for rule in figures.rules],
        "notes": figures.notes,
    }


def _summary(simulation: Simulation) -> dict[str, Any]:
    shown = {
        "id": simulation.id,
        "program_id": simulation.program_id,
        "status": simulation.status,
        "from": format_timestamp(simulation.starts_at),
        "to": format_timestamp(simulation.ends_at),
        "participant_filter": simulation.participant_filter,
        "basis": simulation.basis,
        "progress": {"events_done": simulation.events_done, "events_total": simulation.events_total},
        "created_at": format_timestamp(simulation.created_at),
        "updated_at": format_timestamp(simulation.updated_at),
        "finished_at": None if simulation.finished_at is None else format_timestamp(simulation.finished_at),
    }
    return shown if simulation.error is None else shown | {"error": simulation.error}


def _shown_rule(rule: RuleFigures) -> dict[str, Any]:
    return {
        "rule_id": rule.rule_id,
        "name": rule.name,
        "order": rule.order,
        "is_changed": rule.is_changed,
        "runs": rule.runs,
        "simulated": _shown_tally(rule.simulated),
        "actual": _shown_tally(rule.actual),
    }


def _shown_tally(tally: Tally) -> dict[str, Any]:
    return tally.document() | {"issued": _amounts(tally.issued)}


def _amounts(by_asset: Mapping[str, Decimal]) -> list[dict[str, str]]:
    # The addends had exactly the asset's decimals, so the sums have them too.
    return [{"asset_id": asset_id, "amount": format(amount, "f")} for asset_id, amount in sorted(by_asset.items())]
