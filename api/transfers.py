"""Transfers over HTTP. Contract: redemptions.md 5."""

from typing import Annotated, Any
from uuid import UUID

from fastapi import Query
from pydantic import Field, model_validator
from pydantic_core import PydanticCustomError

from api.models import (
    AmountText,
    Description,
    ExternalId,
    IdempotencyKey,
    ListOf,
    RequestModel,
    ResponseModel,
    Timestamp,
    omittable,
)
from api.queries import From, PageOf50, To, pagination_of
from api.responses import JsonResponse, respond_dict
from api.route import Tx, make_router
from domain import limits, transfers
from domain.clock import format_timestamp
from domain.ledger.movements import HolderType
from domain.money import format_amount
from domain.transfers import HolderName, Party, TransferFilter, TransferRecord, TransferRequest, WantedShare

router = make_router("Transfers")


class RecipientIn(RequestModel):
    """Who gets how much: exactly one of `external_id`, `participant_id` and `group_id`."""

    external_id: ExternalId | None = Field(default=None, description="A participant, by your own id.")
    participant_id: UUID | None = Field(default=None, description="A participant, by Scrip's id.")
    group_id: UUID | None = Field(default=None, description="A group.")
    amount: AmountText

    @model_validator(mode="after")
    def _is_named_once(self) -> "RecipientIn":
        if len(self.names()) != 1:
            message = "exactly one of external_id, participant_id and group_id is needed"
            raise PydanticCustomError("one_of", message, {"reason": "invalid" if self.names() else "required"})
        return self

    def names(self) -> list[HolderName]:
        """The names that were sent."""
        return _names(self.external_id, self.participant_id, self.group_id)


class TransferCreate(RequestModel):
    """Value to move. The source is exactly one of the three `source_*_id`."""

    program_id: UUID = Field(description="The program in whose context it happens.")
    asset_id: UUID = Field(description="An asset that is linked to the program.")
    source_external_id: ExternalId | None = Field(default=None, description="The source, a participant by your own id.")
    source_participant_id: UUID | None = Field(default=None, description="The source, a participant by Scrip's id.")
    source_group_id: UUID | None = Field(default=None, description="The source, a group.")
    recipients: list[RecipientIn] = Field(
        min_length=1,
        max_length=limits.RECIPIENTS_PER_TRANSFER,
        description="One that is named twice gets both amounts.",
    )
    description: Description
    metadata: dict[str, Any] | None = Field(
        default=None, description="Whatever you want to keep with it; at most 16 KiB as compact JSON."
    )
    idempotency_key: IdempotencyKey | None = None

    @model_validator(mode="after")
    def _names_one_source(self) -> "TransferCreate":
        names = self._source_names()
        if len(names) != 1:
            message = "exactly one of source_external_id, source_participant_id and source_group_id is needed"
            # Of two the second is the one too many.
            field = f"source_{names[1].kind}" if names else "source_external_id"
            raise PydanticCustomError("one_of", message, {"field": field, "reason": "invalid" if names else "required"})
        return self

    def _source_names(self) -> list[HolderName]:
        return _names(self.source_external_id, self.source_participant_id, self.source_group_id)

    def request(self) -> TransferRequest:
        """The same, for the domain."""
        return TransferRequest(
            program_id=self.program_id,
            asset_id=self.asset_id,
            source=self._source_names()[0],
            shares=[WantedShare(recipient.names()[0], recipient.amount) for recipient in self.recipients],
            description=self.description,
            metadata=self.metadata,
            idempotency_key=self.idempotency_key,
        )


class RecipientOut(ResponseModel):
    """What one recipient got."""

    participant_id: UUID | None = omittable("The recipient, if a participant.")
    external_id: str | None = omittable("Your own id of the participant.")
    group_id: UUID | None = omittable("The recipient, if a group.")
    amount: str = Field(description="What it got.")


class TransferOut(ResponseModel):
    """A transfer: it exists only when it is done, and never changes."""

    id: UUID
    program_id: UUID = Field(description="The program in whose context it was made.")
    asset_id: UUID
    journal_entry_id: UUID = Field(description="The entry that recorded it.")
    source_type: HolderType = Field(description="Whether a participant or a group gave.")
    source_id: UUID = Field(description="The participant or group that gave.")
    source_external_id: str | None = omittable("Your own id of the participant that gave.")
    recipient_count: int = Field(description="How many rows of recipients it has.")
    total_amount: str = Field(description="What the source gave: the exact sum of what the recipients got.")
    description: str
    metadata: dict[str, Any] | None = omittable("As it was sent.")
    created_at: Timestamp
    recipients: list[RecipientOut] | None = omittable("In the order of the request; left out of lists.")


@router.post("/transfers", status_code=201, response_model=TransferOut)
async def create_transfer(tx: Tx, body: TransferCreate) -> JsonResponse:
    """Move value from one participant or group to 1 to 100 others, all of it or nothing."""
    created = await transfers.create(tx, body.request())
    return respond_dict(_detail(created.transfer), 200 if created.replayed else 201, replayed=created.replayed)


@router.get("/transfers", response_model=ListOf[TransferOut])
async def list_transfers(
    tx: Tx,
    page: PageOf50,
    program_id: Annotated[UUID | None, Query(description="Only transfers of this program.")] = None,
    participant_id: Annotated[UUID | None, Query(description="Only transfers from or to this participant.")] = None,
    group_id: Annotated[UUID | None, Query(description="Only transfers from or to this group.")] = None,
    asset_id: Annotated[UUID | None, Query(description="Only transfers of this asset.")] = None,
    since: From = None,
    to: To = None,
) -> JsonResponse:
    """List transfers, newest first, without their recipients."""
    wanted = TransferFilter(
        program_id=program_id,
        asset_id=asset_id,
        participant_id=participant_id,
        group_id=group_id,
        created_from=since,
        created_to=to,
    )
    found = await transfers.find(tx, wanted, page)
    return respond_dict(
        {"data": [_summary(transfer) for transfer in found.items], "pagination": pagination_of(found).model_dump()}
    )


@router.get("/transfers/{id}", response_model=TransferOut)
async def get_transfer(tx: Tx, id: UUID) -> JsonResponse:
    """Get one transfer with its recipients."""
    return respond_dict(_detail(await transfers.get(tx, id)))


def _names(external_id: str | None, participant_id: UUID | None, group_id: UUID | None) -> list[HolderName]:
    names = []
    if external_id is not None:
        names.append(HolderName("external_id", external_id))
    if participant_id is not None:
        names.append(HolderName("participant_id", participant_id))
    if group_id is not None:
        names.append(HolderName("group_id", group_id))
    return names


def _detail(transfer: TransferRecord) -> dict[str, Any]:
    recipients = [
        {**_party(share.recipient), "amount": format_amount(share.amount, transfer.scale)} for share in transfer.shares
    ]
    return {**_summary(transfer), "recipients": recipients}


def _party(party: Party) -> dict[str, Any]:
    if party.type == "GROUP":
        return {"group_id": party.id}
    return {"participant_id": party.id, "external_id": party.external_id}


def _summary(transfer: TransferRecord) -> dict[str, Any]:
    body: dict[str, Any] = {
        "id": transfer.id,
        "program_id": transfer.program_id,
        "asset_id": transfer.asset_id,
        "journal_entry_id": transfer.journal_entry_id,
        "source_type": transfer.source.type,
        "source_id": transfer.source.id,
        "recipient_count": transfer.recipient_count,
        "total_amount": format_amount(transfer.total_amount, transfer.scale),
        "description": transfer.description,
        "created_at": format_timestamp(transfer.created_at),
    }
    if transfer.source.external_id is not None:
        body["source_external_id"] = transfer.source.external_id
    if transfer.metadata is not None:
        body["metadata"] = transfer.metadata
    return body
