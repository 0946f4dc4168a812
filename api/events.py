"""Events over HTTP: ingestion, reading, retry. Contract: rules-and-events.md 7 and 8."""

from collections.abc import Mapping
from typing import Annotated, Any, Literal
from uuid import UUID

from fastapi import Query, Request
from pydantic import Field, ValidationError, model_validator
from pydantic_core import PydanticCustomError

from api.errors import problems_of
from api.models import ExternalId, IdempotencyKey, ListOf, RequestModel, ResponseModel, Timestamp, omittable
from api.queries import EventFrom, EventTo, From, PageOf50, SortDirection, To, pagination_of
from api.responses import JsonResponse, respond_dict
from api.route import ApiServices, Tx, make_router
from db import json
from db.session import Transaction
from db.tables import Event
from domain import limits, participants, programs
from domain.clock import format_timestamp
from domain.errors import Refusal
from domain.events import queries
from domain.events.ingest import Accepted, NewEvent, ingest, ingest_one
from domain.events.queries import EventFilter
from domain.pagination import Page

router = make_router("Events")

EventStatus = Literal["RECEIVED", "PENDING", "PROCESSING", "COMPLETED", "FAILED"]


class EventIn(RequestModel):
    """One event as a client sends it. Contract: rules-and-events.md 7.2."""

    program_id: UUID = Field(description="The program whose rules apply.")
    external_id: ExternalId | None = Field(default=None, description="The participant, by your own id.")
    participant_id: UUID | None = Field(default=None, description="The participant, by Scrip's id.")
    recipient_external_id: ExternalId | None = Field(
        default=None, description="Who receives the value, by your own id, when not the participant."
    )
    recipient_id: UUID | None = Field(default=None, description="Who receives the value, by Scrip's id.")
    idempotency_key: IdempotencyKey
    event_timestamp: Timestamp = Field(description="When it happened; expressions see it as `now`.")
    event_data: dict[str, Any] = Field(description="The payload that rules read; at most 64 KiB, nested at most 32.")

    @model_validator(mode="after")
    def _names_one_participant(self) -> "EventIn":
        if (self.external_id is None) == (self.participant_id is None):
            reason = "required" if self.external_id is None else "invalid"
            message = "exactly one of external_id and participant_id is needed"
            raise PydanticCustomError("one_of", message, {"field": "external_id", "reason": reason})
        if self.recipient_external_id is not None and self.recipient_id is not None:
            message = "at most one of recipient_external_id and recipient_id can be given"
            raise PydanticCustomError("one_of", message, {"field": "recipient_id"})
        return self

    def to_domain(self) -> NewEvent:
        """The event as the domain takes it."""
        return NewEvent(
            program_id=self.program_id,
            idempotency_key=self.idempotency_key,
            event_timestamp=self.event_timestamp,
            event_data=self.event_data,
            participant_id=self.participant_id,
            external_id=self.external_id,
            recipient_id=self.recipient_id,
            recipient_external_id=self.recipient_external_id,
        )


class EventBatchIn(RequestModel):
    """1 to 100 events, each judged for itself. Contract: rules-and-events.md 7.5."""

    events: list[Any] = Field(
        min_length=1,
        max_length=limits.EVENTS_PER_BATCH,
        description="Events as for a single ingestion; a bad one is an error of that item only.",
    )


class AcceptedOut(ResponseModel):
    """An accepted event. Contract: rules-and-events.md 7.3."""

    id: UUID = Field(description="Deterministic for (program_id, idempotency_key).")
    program_id: UUID = Field(description="The program.")
    participant_id: UUID | None = Field(description="Null until the worker has resolved it.")
    external_id: str | None = Field(description="As it was sent.")
    idempotency_key: str = Field(description="As it was sent.")
    event_timestamp: Timestamp = Field(description="When it happened.")
    status: EventStatus = Field(description="RECEIVED for a new event.")


class BatchItemOut(ResponseModel):
    """What became of one item."""

    index: int = Field(description="Position in the request, from 0.")
    status: Literal["accepted", "error"] = Field(description="Whether the event was accepted.")
    event: AcceptedOut | None = omittable("The accepted event.")
    error: str | None = omittable("Why it was not accepted.")


class EventBatchOut(ResponseModel):
    """The results of a batch, in input order."""

    total: int = Field(description="Items sent.")
    success_count: int = Field(description="Items accepted.")
    error_count: int = Field(description="Items refused.")
    results: list[BatchItemOut] = Field(description="One result per item, in input order.")


class EvaluationOut(ResponseModel):
    """What one rule did with the event. Contract: rules-and-events.md 4.1."""

    id: UUID = Field(description="Id of this record.")
    rule_id: UUID = Field(description="The rule.")
    rule_name: str = Field(description="Its name then.")
    rule_history_id: UUID = Field(description="The exact version that was evaluated.")
    status: Literal["SUCCESS", "FAILED", "SKIPPED", "SKIPPED_ERROR", "SKIPPED_TIMEOUT"] = Field(description="Outcome.")
    reason: str | None = Field(description="Why it was skipped.")
    error_message: str | None = Field(description="What went wrong.")
    stopped_by_rule_id: UUID | None = Field(description="The rule before it that stopped the walk.")
    created_at: Timestamp = Field(description="When it was evaluated.")
    actions: list[dict[str, Any]] = Field(description="The actions that ran, with their resolved values.")


class EventOut(ResponseModel):
    """An event. Contract: rules-and-events.md 7.1."""

    id: UUID = Field(description="Deterministic for (program_id, idempotency_key).")
    program_id: UUID = Field(description="The program.")
    participant_id: UUID | None = Field(description="Null until the worker has resolved it.")
    external_id: str | None = Field(description="As it was sent.")
    recipient_id: UUID | None = Field(description="Who received the value, when not the participant.")
    idempotency_key: str = Field(description="As it was sent.")
    event_type: Literal["EXTERNAL", "SYSTEM"] = Field(description="Sent through the API, or made by Scrip.")
    event_data: dict[str, Any] = Field(description="The payload, number by number as it was sent.")
    event_timestamp: Timestamp = Field(description="When it happened.")
    received_at: Timestamp = Field(description="When the API received it.")
    created_at: Timestamp = Field(description="When it was stored.")
    processed_at: Timestamp | None = Field(description="When processing ended; null before.")
    updated_at: Timestamp = Field(description="Last change.")
    status: EventStatus = Field(description="Where it is on its way.")
    error_message: str | None = Field(description="Why it FAILED.")


class EventDetailOut(EventOut):
    """An event with what every rule did with it."""

    rule_evaluations: list[EvaluationOut] = Field(description="In the order of evaluation.")


class RetryOut(ResponseModel):
    """An event that was queued again."""

    event_id: UUID = Field(description="The event.")
    message: str = Field(description="`Event queued for retry`.")
    previous_error: str | None = Field(description="Why it had FAILED.")
    previous_status: Literal["FAILED"] = Field(description="Its status before.")
    status: Literal["PENDING"] = Field(description="Its status now.")


class BulkRetryIn(RequestModel):
    """Which FAILED events to queue again. Contract: README.md "Bulk retry"."""

    program_id: UUID = Field(description="The program.")
    from_: Timestamp | None = Field(default=None, alias="from", description="Stored at or after this instant.")
    to: Timestamp | None = Field(default=None, description="Stored at or before this instant.")
    error_contains: str | None = Field(
        default=None, min_length=1, max_length=500, description="Text that the error message contains."
    )


class BulkRetryOut(ResponseModel):
    """How many events were queued again."""

    count: int = Field(description="Events queued.")


@router.post("/events", status_code=202, response_model=AcceptedOut)
async def ingest_event(request: Request, tx: Tx, body: EventIn) -> JsonResponse:
    """Send one event. It is stored durably before the answer and processed right afterwards."""
    _services(request).backlog.admit(tx.organization_id)
    accepted = await ingest_one(tx, body.to_domain())
    _wake_after_commit(request, tx, {accepted.program_id})
    return respond_dict(_accepted(accepted), 202, replayed=accepted.replayed)


@router.post("/events/batch", status_code=202, response_model=EventBatchOut)
async def ingest_events(request: Request, tx: Tx, body: EventBatchIn) -> JsonResponse:
    """Send up to 100 events. Items are independent: good ones are accepted, bad ones answered with their error."""
    _services(request).backlog.admit(tx.organization_id)
    results: list[Accepted | str] = [""] * len(body.events)
    valid: list[tuple[int, NewEvent]] = []
    for index, item in enumerate(body.events):
        try:
            valid.append((index, EventIn.model_validate(item).to_domain()))
        except ValidationError as error:
            results[index] = _item_error(error)
    for (index, _), result in zip(valid, await ingest(tx, [event for _, event in valid]), strict=True):
        results[index] = _refusal_text(result) if isinstance(result, Refusal) else result
    _wake_after_commit(request, tx, {r.program_id for r in results if isinstance(r, Accepted) and not r.replayed})
    accepted = sum(isinstance(result, Accepted) for result in results)
    return respond_dict(
        {
            "total": len(results),
            "success_count": accepted,
            "error_count": len(results) - accepted,
            "results": [_batch_item(index, result) for index, result in enumerate(results)],
        },
        202,
    )


@router.post("/events/retry", status_code=202, response_model=BulkRetryOut)
async def retry_events(request: Request, tx: Tx, body: BulkRetryIn) -> JsonResponse:
    """Queue every FAILED event of a program again that matches."""
    await programs.get(tx, body.program_id)
    count = await queries.retry_all(tx, body.program_id, body.from_, body.to, body.error_contains)
    _wake_after_commit(request, tx, {body.program_id})
    return respond_dict({"count": count}, 202)


@router.get("/events", response_model=ListOf[EventOut])
async def list_events(
    tx: Tx,
    page: PageOf50,
    program_id: UUID | None = None,
    status: EventStatus | None = None,
    event_type: Literal["EXTERNAL", "SYSTEM"] | None = None,
    participant_id: UUID | None = None,
    external_id: ExternalId | None = None,
    rule_id: Annotated[UUID | None, Query(description="Events on which this rule matched.")] = None,
    created_from: From = None,
    to: To = None,
    event_from: EventFrom = None,
    event_to: EventTo = None,
    sort_by: Literal["created_at", "event_timestamp", "status"] = "created_at",
    sort_dir: SortDirection = "desc",
) -> JsonResponse:
    """List events, newest first."""
    wanted = EventFilter(
        program_id,
        status,
        event_type,
        participant_id,
        external_id,
        rule_id,
        created_from,
        to,
        event_from,
        event_to,
    )
    return _listed(await queries.find(tx, wanted, page, sort_by, descending=sort_dir == "desc"))


@router.get("/participants/{participant_id}/activity/events", response_model=ListOf[EventOut])
async def list_participant_events(
    tx: Tx,
    participant_id: UUID,
    page: PageOf50,
    program_id: UUID | None = None,
    status: EventStatus | None = None,
    created_from: From = None,
    to: To = None,
    event_from: EventFrom = None,
    event_to: EventTo = None,
) -> JsonResponse:
    """List the events processed for a participant, newest first."""
    await participants.get(tx, participant_id)
    wanted = EventFilter(
        program_id=program_id,
        status=status,
        participant_id=participant_id,
        created_from=created_from,
        created_to=to,
        event_from=event_from,
        event_to=event_to,
    )
    return _listed(await queries.find(tx, wanted, page))


@router.get("/events/{event_id}", response_model=EventDetailOut)
async def get_event(
    tx: Tx,
    event_id: UUID,
    include_skipped: Annotated[bool, Query(description="Also show rules that met an error or a limit.")] = False,
) -> JsonResponse:
    """Get an event with what every rule did with it."""
    event = await queries.get(tx, event_id)
    records = await queries.evaluations(tx, event, include_skipped=include_skipped)
    shown = _event(event) | {"rule_evaluations": [_evaluation(record) for record in records]}
    return JsonResponse(json.dumps(shown))


@router.post("/events/{event_id}/retry", response_model=RetryOut)
async def retry_event(request: Request, tx: Tx, event_id: UUID) -> JsonResponse:
    """Queue a FAILED event again. It meets the rules as they are now and starts with a fresh count of attempts."""
    before = await queries.retry(tx, event_id)
    _wake_after_commit(request, tx, {before.program_id})
    return respond_dict(
        {
            "event_id": str(event_id),
            "message": "Event queued for retry",
            "previous_error": before.error_message,
            "previous_status": "FAILED",
            "status": "PENDING",
        }
    )


def _services(request: Request) -> ApiServices:
    services: ApiServices = request.app.state.services
    return services


def _wake_after_commit(request: Request, tx: Transaction, program_ids: set[UUID]) -> None:
    waker = _services(request).waker
    for program_id in program_ids:
        tx.after_commit(lambda program_id=program_id: waker.wake(tx.organization_id, program_id))  # type: ignore[misc]


def _accepted(event: Accepted) -> dict[str, Any]:
    return {
        "id": str(event.id),
        "program_id": str(event.program_id),
        "participant_id": str(event.participant_id) if event.participant_id else None,
        "external_id": event.external_id,
        "idempotency_key": event.idempotency_key,
        "event_timestamp": format_timestamp(event.event_timestamp),
        "status": event.status,
    }


def _batch_item(index: int, result: Accepted | str) -> dict[str, Any]:
    if isinstance(result, str):
        return {"index": index, "status": "error", "error": result}
    return {"index": index, "status": "accepted", "event": _accepted(result)}


def _item_error(error: ValidationError) -> str:
    """The first problem of an item as one line, such as `invalid program_id`."""
    problem = problems_of(error.errors())[0]
    if problem.field in ("body", ""):
        return "invalid event"
    verb = "missing" if problem.reason == "required" else "invalid"
    return f"{verb} {problem.field}"


def _refusal_text(refusal: Refusal) -> str:
    if refusal.code == "not_found":
        return "invalid program_id"
    if refusal.problems:
        return f"invalid {refusal.problems[0].field}: {refusal.problems[0].message}"
    return f"{refusal.code}: {refusal.message}"


def _listed(page: Page[Event]) -> JsonResponse:
    pagination = pagination_of(page).model_dump()
    return JsonResponse(json.dumps({"data": [_event(event) for event in page.items], "pagination": pagination}))


def _event(event: Event) -> dict[str, Any]:
    return {
        "id": event.id,
        "program_id": event.program_id,
        "participant_id": event.participant_id,
        "external_id": event.external_id,
        "recipient_id": event.recipient_id,
        "idempotency_key": event.idempotency_key,
        "event_type": event.event_type,
        "event_data": event.event_data,
        "event_timestamp": format_timestamp(event.event_timestamp),
        "received_at": format_timestamp(event.received_at),
        "created_at": format_timestamp(event.created_at),
        "processed_at": format_timestamp(event.processed_at) if event.processed_at else None,
        "updated_at": format_timestamp(event.updated_at),
        "status": event.status,
        "error_message": event.error_message,
    }


def _evaluation(record: Mapping[str, Any]) -> dict[str, Any]:
    nullable = ("reason", "error_message", "stopped_by_rule_id")
    return {**{name: record.get(name) for name in nullable}, "actions": record.get("actions", []), **record}
