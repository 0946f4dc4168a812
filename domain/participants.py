"""Participants: the end users of the customer's system. Contract: holders.md 3."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any, Literal
from uuid import UUID

from sqlalchemy import exists, or_
from sqlalchemy import update as sql_update
from sqlmodel import col, select

from db.session import Transaction
from db.tables import Enrollment, Participant, ParticipantStatusChange
from domain import programs, state
from domain.errors import Refusal, not_found
from domain.ids import new_id
from domain.ledger.balances import AssetBalance, holder_balances
from domain.pagination import Page, PageRequest, paginate
from domain.state import CounterView, LockedEntity

ParticipantStatus = Literal["ACTIVE", "SUSPENDED", "CLOSED"]
SortKey = Literal["created_at", "external_id", "status"]

_SEARCHED = ("external_id", "email", "phone", "first_name", "last_name", "display_name")


@dataclass(frozen=True, slots=True)
class ParticipantDetail:
    """A participant with everything that hangs on it."""

    participant: Participant
    tags: list[str]
    attributes: dict[str, str]
    counters: list[CounterView]
    program_ids: list[UUID]
    balances: list[AssetBalance]


@dataclass(frozen=True, slots=True)
class StateChanges:
    """Attributes to merge, and tags that replace all others (None: leave them)."""

    attributes: Mapping[str, str] = field(default_factory=dict)
    tags: list[str] | None = None


@dataclass(frozen=True, slots=True)
class ParticipantFilter:
    """What a list of participants keeps; instants are inclusive."""

    external_id: str | None = None
    program_id: UUID | None = None
    status: ParticipantStatus | None = None
    search: str | None = None
    created_from: datetime | None = None
    created_to: datetime | None = None


async def upsert(
    tx: Transaction,
    external_id: str,
    *,
    profile: Mapping[str, Any],
    changes: StateChanges,
    program_id: UUID | None,
) -> tuple[ParticipantDetail, bool]:
    """Create the participant with this external_id, or update it; its detail, and whether it is new.

    `profile` has some of status, email, phone, first_name, last_name, display_name: only those change. Of two
    concurrent creations the second waits and becomes an update. `program_id` enrols, and never ends an enrolment.
    Raises Refusal: `not_found` for the program, `bad_request` for tags or attributes. Contract: holders.md 3.2.
    """
    if program_id is not None:
        await programs.get(tx, program_id)
    participant_id = new_id()
    inserted = await tx.execute(
        "insert into participant (organization_id, id, external_id, status, created_at, updated_at)"
        " values (%s, %s, %s, 'ACTIVE', %s, %s) on conflict (organization_id, external_id) do nothing",
        (tx.organization_id, participant_id, external_id, tx.now, tx.now),
    )
    created = inserted.rowcount == 1
    participant = await _locked(tx, Participant.external_id == external_id)
    await _change(tx, participant, profile, changes)
    if program_id is not None:
        await tx.execute(
            "insert into enrollment (organization_id, program_id, participant_id, status, created_at, updated_at)"
            " values (%s, %s, %s, 'ACTIVE', %s, %s) on conflict do nothing",
            (tx.organization_id, program_id, participant.id, tx.now, tx.now),
        )
    return await _detail(tx, participant), created


async def get(tx: Transaction, participant_id: UUID) -> ParticipantDetail:
    """The participant with everything that hangs on it. Raises Refusal `not_found`."""
    statement = select(Participant).where(
        Participant.organization_id == tx.organization_id, Participant.id == participant_id
    )
    participant = await tx.first(statement)
    if participant is None:
        raise not_found("participant")
    return await _detail(tx, participant)


async def find(
    tx: Transaction, wanted: ParticipantFilter, page: PageRequest, sort_by: SortKey, descending: bool
) -> Page[Participant]:
    """A page of participants."""
    statement = select(Participant).where(Participant.organization_id == tx.organization_id)
    if wanted.external_id is not None:
        statement = statement.where(Participant.external_id == wanted.external_id)
    if wanted.status is not None:
        statement = statement.where(Participant.status == wanted.status)
    if wanted.program_id is not None:
        enrolled = exists().where(
            col(Enrollment.organization_id) == tx.organization_id,
            col(Enrollment.program_id) == wanted.program_id,
            col(Enrollment.participant_id) == Participant.id,
        )
        statement = statement.where(enrolled)
    if wanted.search:
        columns = (getattr(Participant, name) for name in _SEARCHED)
        statement = statement.where(or_(*(col(c).icontains(wanted.search, autoescape=True) for c in columns)))
    if wanted.created_from is not None:
        statement = statement.where(Participant.created_at >= wanted.created_from)
    if wanted.created_to is not None:
        statement = statement.where(Participant.created_at <= wanted.created_to)
    first_key = col(getattr(Participant, sort_by))
    return await paginate(tx, statement, keys=(first_key, col(Participant.id)), page=page, descending=descending)


async def update(
    tx: Transaction, participant_id: UUID, profile: Mapping[str, Any], changes: StateChanges
) -> ParticipantDetail:
    """Change some of external_id and the profile, and the state; never the status. Contract: holders.md 3.6.

    Raises Refusal: `not_found`, `conflict` for an external_id in use, `bad_request` for tags or attributes.
    """
    participant = await _locked(tx, Participant.id == participant_id)
    external_id = profile.get("external_id", participant.external_id)
    if external_id != participant.external_id:
        await _require_free_external_id(tx, external_id)
    await _change(tx, participant, profile, changes)
    return await _detail(tx, participant)


async def set_status(tx: Transaction, participant_id: UUID, status: ParticipantStatus) -> ParticipantDetail:
    """Change the status; every transition is allowed, and none moves a balance. Contract: holders.md 3.7.

    Raises Refusal `not_found`.
    """
    participant = await _locked(tx, Participant.id == participant_id)
    await _change(tx, participant, {"status": status}, StateChanges())
    return await _detail(tx, participant)


async def balances(tx: Transaction, participant_id: UUID, asset_id: UUID | None) -> list[AssetBalance]:
    """The participant's balances, of one asset if named. Raises Refusal `not_found`. Contract: holders.md 6.1."""
    await state.require(tx, "participant", participant_id)
    return await holder_balances(tx, [participant_id], asset_id)


async def _locked(tx: Transaction, condition: Any) -> Participant:
    statement = select(Participant).where(Participant.organization_id == tx.organization_id, condition)
    participant = await tx.first(statement.with_for_update(key_share=True))
    if participant is None:
        raise not_found("participant")
    return participant


async def _change(tx: Transaction, participant: Participant, profile: Mapping[str, Any], changes: StateChanges) -> None:
    """Apply changes to a participant whose row is locked; `updated_at` moves only when a column changes."""
    # An empty text clears a field of the profile.
    new = {name: value or None for name, value in profile.items()}
    new = {name: value for name, value in new.items() if getattr(participant, name) != value}
    if new:
        new["updated_at"] = tx.now
        if "status" in new:
            await _record_status(tx, participant, str(new["status"]))
        await tx.run(
            sql_update(Participant)
            .where(col(Participant.organization_id) == tx.organization_id, col(Participant.id) == participant.id)
            .values(**new)
        )
        for name, value in new.items():
            setattr(participant, name, value)
    entity = LockedEntity(participant.id)
    if changes.attributes:
        await state.merge_attributes(tx, entity, changes.attributes)
    if changes.tags is not None:
        await state.replace_tags(tx, entity, changes.tags)


async def _record_status(tx: Transaction, participant: Participant, status: str) -> None:
    await tx.insert(
        ParticipantStatusChange(
            organization_id=tx.organization_id,
            participant_id=participant.id,
            changed_at=tx.now,
            id=new_id(),
            old_status=participant.status,
            new_status=status,
            api_key_id=tx.api_key_id,
        )
    )


async def _require_free_external_id(tx: Transaction, external_id: str) -> None:
    # Two at once are told apart by the unique index: the second is repeated and then ends here.
    taken = await tx.row(
        "select 1 from participant where organization_id = %s and external_id = %s", (tx.organization_id, external_id)
    )
    if taken is not None:
        raise Refusal("conflict", "another participant has this external_id")


async def _detail(tx: Transaction, participant: Participant) -> ParticipantDetail:
    cursor = await tx.execute(
        "select program_id from enrollment where organization_id = %s and participant_id = %s"
        " order by created_at, program_id",
        (tx.organization_id, participant.id),
    )
    return ParticipantDetail(
        participant=participant,
        program_ids=[program_id for (program_id,) in await cursor.fetchall()],
        tags=await state.tags(tx, participant.id),
        attributes=await state.attributes(tx, participant.id),
        counters=await state.counters(tx, participant.id),
        balances=await holder_balances(tx, [participant.id]),
    )
