"""Participants over HTTP. Contract: holders.md 3 and 6.1."""

from typing import Annotated, Any, Literal
from uuid import UUID

from email_validator import EmailNotValidError, validate_email
from fastapi import Query
from pydantic import AfterValidator, Field
from pydantic_core import PydanticCustomError

from api.models import (
    ExternalId,
    ListOf,
    PatchModel,
    RequestModel,
    ResponseModel,
    Timestamp,
    unset_field,
    whole_list,
)
from api.queries import From, PageOf50, Search, SortDirection, To, listed
from api.responses import JsonResponse, respond
from api.route import Tx, make_router
from db.tables import Participant
from domain import participants, state
from domain.ledger import moments
from domain.ledger.balances import AssetBalance, holder_balances_at
from domain.participants import ParticipantDetail, ParticipantFilter, ParticipantStatus, StateChanges

router = make_router("Participants")


def _check_email(text: str) -> str:
    if text:
        try:
            validate_email(text, check_deliverability=False, test_environment=True)
        except EmailNotValidError as error:
            raise PydanticCustomError("email", "is not an email address", {"expected": "email"}) from error
    return text


Email = Annotated[str, Field(max_length=255), AfterValidator(_check_email)]
Phone = Annotated[str, Field(max_length=50)]
PersonName = Annotated[str, Field(max_length=255)]
Attributes = Annotated[dict[str, str], Field(description="Merged into what is there; keys 1 to 255 characters.")]
Tags = Annotated[list[str], Field(description="Replaces all tags; stored in lower case.")]

_PROFILE = ("email", "phone", "first_name", "last_name", "display_name")


class Profile(PatchModel):
    """The fields of a participant that creation and update share; an empty string clears."""

    email: Email | None = unset_field("Checked for its form only.")
    phone: Phone | None = unset_field("At most 50 characters.")
    first_name: PersonName | None = unset_field("At most 255 characters.")
    last_name: PersonName | None = unset_field("At most 255 characters.")
    display_name: PersonName | None = unset_field("At most 255 characters.")
    attributes: Attributes = unset_field("Merged into the attributes that are there.")
    tags: Tags = unset_field("Replaces all tags; stored in lower case.")

    def state_changes(self) -> StateChanges:
        """The tags and attributes that were sent."""
        return StateChanges(attributes=self.attributes or {}, tags=self.tags)

    def columns(self, *names: str) -> dict[str, Any]:
        """Of these columns and the profile's, the ones that were sent."""
        return {name: value for name, value in self.changes().items() if name in (*_PROFILE, *names)}


class ParticipantUpsert(Profile):
    """A new participant, or what to change of the one with this external_id."""

    external_id: ExternalId = Field(description="The caller's own id: unique, and the key of the upsert.")
    program_id: UUID | None = Field(default=None, description="Enrols in this program.")
    status: ParticipantStatus = unset_field("ACTIVE when created; on an update only changed if sent.")


class ParticipantUpdate(Profile):
    """What to change; the rest stays, and so does the status."""

    external_id: ExternalId = unset_field("A new external_id.")


class StatusChange(RequestModel):
    """The new status."""

    status: ParticipantStatus = Field(description="Every transition is allowed.")


class ParticipantOut(ResponseModel):
    """A participant, as lists show it."""

    id: UUID = Field(description="Called `participant_id` elsewhere.")
    external_id: str = Field(description="The caller's own id.")
    status: ParticipantStatus = Field(description="ACTIVE, SUSPENDED or CLOSED.")
    email: str | None = Field(description="Or null.")
    phone: str | None = Field(description="Or null.")
    first_name: str | None = Field(description="Or null.")
    last_name: str | None = Field(description="Or null.")
    display_name: str | None = Field(description="Or null.")
    created_at: Timestamp = Field(description="When it was created.")
    updated_at: Timestamp = Field(description="When a field of it was last changed.")


class BucketsOut(ResponseModel):
    """The balance of one asset."""

    asset_id: UUID = Field(description="The asset.")
    available: str = Field(description="Spendable; may be negative after a debit with allow_negative.")
    held: str = Field(description="Reserved.")
    deferred: str = Field(description="Not matured yet.")


class BalanceRow(BucketsOut):
    """The balance of one asset, with its symbol."""

    symbol: str = Field(description="The asset's short code.")


class TierLevel(ResponseModel):
    """The level that a participant has in one tier."""

    level: str = Field(description="The level's key.")
    rank: int = Field(description="Higher is better.")


class ParticipantDetailOut(ParticipantOut):
    """A participant with everything that hangs on it."""

    attributes: dict[str, str] = Field(description="Key-value strings.")
    tags: list[str] = Field(description="Flags, in lower case.")
    counters: dict[str, str] = Field(description="Decimal strings, after auto-reset.")
    tiers: dict[str, TierLevel] = Field(description="Levels by tier key.")
    balances: list[BucketsOut] = Field(description="Every asset it ever had.")
    program_ids: list[UUID] = Field(description="The programs it is enrolled in.")


@router.post("/participants", status_code=201, response_model=ParticipantDetailOut)
async def upsert_participant(tx: Tx, body: ParticipantUpsert) -> JsonResponse:
    """Create a participant (201), or update the one with this external_id (200)."""
    detail, created = await participants.upsert(
        tx,
        body.external_id,
        profile=body.columns("status"),
        changes=body.state_changes(),
        program_id=body.program_id,
    )
    return respond(_present_detail(detail), 201 if created else 200)


@router.get("/participants", response_model=ListOf[ParticipantOut])
async def list_participants(
    tx: Tx,
    page: PageOf50,
    external_id: Annotated[str | None, Query(max_length=255, description="Exactly this external_id.")] = None,
    program_id: Annotated[UUID | None, Query(description="Only participants enrolled in this program.")] = None,
    status: Annotated[ParticipantStatus | None, Query(description="Only this status.")] = None,
    search: Search = None,
    created_from: From = None,
    to: To = None,
    sort_by: Annotated[Literal["created_at", "external_id", "status"], Query(description="The order.")] = "created_at",
    sort_dir: SortDirection = "desc",
) -> ListOf[ParticipantOut]:
    """List participants; `search` looks at external_id, email, phone and the names."""
    wanted = ParticipantFilter(
        external_id=external_id,
        program_id=program_id,
        status=status,
        search=search,
        created_from=created_from,
        created_to=to,
    )
    return listed(await participants.find(tx, wanted, page, sort_by, sort_dir == "desc"), _present)


@router.get("/participants/{id}", response_model=ParticipantDetailOut)
async def get_participant(tx: Tx, id: UUID) -> ParticipantDetailOut:
    """Get one participant with balances, tags, counters, attributes, tiers and programs."""
    return _present_detail(await participants.get(tx, id))


@router.patch("/participants/{id}", response_model=ParticipantDetailOut)
async def update_participant(tx: Tx, id: UUID, body: ParticipantUpdate) -> ParticipantDetailOut:
    """Change profile, attributes (merged) and tags (replaced). A status in the body is ignored."""
    return _present_detail(await participants.update(tx, id, body.columns("external_id"), body.state_changes()))


@router.patch("/participants/{id}/status", response_model=ParticipantDetailOut)
async def set_participant_status(tx: Tx, id: UUID, body: StatusChange) -> ParticipantDetailOut:
    """Suspend, close or reactivate a participant; balances stay."""
    return _present_detail(await participants.set_status(tx, id, body.status))


@router.get("/participants/{id}/balances", response_model=ListOf[BalanceRow])
async def list_participant_balances(
    tx: Tx,
    id: UUID,
    asset_id: Annotated[UUID | None, Query(description="Only this asset.")] = None,
    as_of: Annotated[
        Timestamp | None, Query(description="The balances at this instant; one in the future means now.")
    ] = None,
) -> ListOf[BalanceRow]:
    """List balances per asset, split by bucket, now or at an instant; assets never touched are absent."""
    if as_of is None:
        found = await participants.balances(tx, id, asset_id)
    else:
        await state.require(tx, "participant", id)
        found = await holder_balances_at(tx, id, await moments.at(tx, as_of), asset_id)
    rows = [BalanceRow.model_construct(**_buckets(balance), symbol=balance.symbol) for balance in found]
    return ListOf[BalanceRow].model_construct(**whole_list(rows))


def _present(participant: Participant) -> ParticipantOut:
    return ParticipantOut.of(participant)


def _present_detail(detail: ParticipantDetail) -> ParticipantDetailOut:
    return ParticipantDetailOut.of(
        detail.participant,
        attributes=detail.attributes,
        tags=detail.tags,
        counters={counter.key: counter.value for counter in detail.counters},
        tiers={},
        balances=[BucketsOut.model_construct(**_buckets(balance)) for balance in detail.balances],
        program_ids=detail.program_ids,
    )


def _buckets(balance: AssetBalance) -> dict[str, Any]:
    return {
        "asset_id": balance.asset_id,
        "available": balance.print(balance.available),
        "held": balance.print(balance.held),
        "deferred": balance.print(balance.deferred),
    }
