"""Programs: the containers of rules, assets and participants. Contract: basics.md 5."""

from dataclasses import dataclass
from typing import Any, Literal
from uuid import UUID

from sqlalchemy import update as sql_update
from sqlmodel import col, select
from sqlmodel.sql.expression import SelectOfScalar

from db.session import Transaction
from db.tables import Group, Lane, Participant, Program
from domain.errors import Refusal, bad_field, not_found
from domain.ids import new_id
from domain.pagination import Page, PageRequest, paginate

ProgramStatus = Literal["ACTIVE", "SUSPENDED", "ARCHIVED"]
UnknownParticipant = Literal["CREATE", "REJECT"]
RedemptionTarget = Literal["SYSTEM_REDEMPTION", "SYSTEM_BREAKAGE", "LEDGER_ENTITY"]


@dataclass(frozen=True, slots=True)
class ProgramFilter:
    """What a list of programs keeps; archived ones only when asked for, one way or the other."""

    status: ProgramStatus | None = None
    include_archived: bool = False
    search: str | None = None


async def create(
    tx: Transaction, *, name: str, description: str | None, on_unknown_participant: UnknownParticipant
) -> Program:
    """Create an ACTIVE program, with its lane in the event queue. Contract: basics.md 5.3."""
    program = Program(
        organization_id=tx.organization_id,
        id=new_id(),
        name=name,
        description=description,
        status="ACTIVE",
        on_unknown_participant=on_unknown_participant,
        redemption_target_type="SYSTEM_REDEMPTION",
        rules_version=0,
        created_at=tx.now,
        updated_at=tx.now,
    )
    await tx.insert(program)
    await tx.insert(Lane(organization_id=tx.organization_id, program_id=program.id))
    return program


async def get(tx: Transaction, program_id: UUID) -> Program:
    """The program, archived or not. Raises Refusal `not_found`."""
    program = await tx.first(_by_id(tx, program_id))
    if program is None:
        raise not_found("program")
    return program


async def lock(tx: Transaction, program_id: UUID) -> Program:
    """The program, locked until the end of the transaction: its wallet, state and settings. Raises Refusal `not_found`.

    The place of this lock in the global order is in docs/ledger.md.
    """
    program = await tx.first(_by_id(tx, program_id).with_for_update(key_share=True))
    if program is None:
        raise not_found("program")
    return program


async def find(
    tx: Transaction, wanted: ProgramFilter, page: PageRequest, sort_by: str, descending: bool
) -> Page[Program]:
    """A page of programs, ordered by `created_at` or `name`."""
    statement = select(Program).where(Program.organization_id == tx.organization_id)
    if wanted.status is not None:
        statement = statement.where(Program.status == wanted.status)
    elif not wanted.include_archived:
        statement = statement.where(Program.status != "ARCHIVED")
    if wanted.search:
        statement = statement.where(col(Program.name).icontains(wanted.search, autoescape=True))
    first_key = col(Program.name) if sort_by == "name" else col(Program.created_at)
    return await paginate(tx, statement, keys=(first_key, col(Program.id)), page=page, descending=descending)


async def update(tx: Transaction, program_id: UUID, changes: dict[str, Any]) -> Program:
    """Change some of name, description, on_unknown_participant, status and the redemption target.

    Every status can follow every other. Redemptions made before keep the target they were made with.
    Raises Refusal: `not_found` for the program or the target entity, `bad_request` for a target and an entity id that
    don't go together. Contract: basics.md 5.3 and 5.4.
    """
    program = await lock(tx, program_id)
    changes = {**changes, **await _redemption_target(tx, program, changes)}
    if "status" in changes:
        changes["deleted_at"] = (program.deleted_at or tx.now) if changes["status"] == "ARCHIVED" else None
    changes["updated_at"] = tx.now
    await tx.run(
        sql_update(Program)
        .where(col(Program.organization_id) == tx.organization_id, col(Program.id) == program_id)
        .values(**changes)
    )
    for name, value in changes.items():
        setattr(program, name, value)
    return program


def require_active(program: Program) -> None:
    """Raise Refusal `program_inactive` unless the program is ACTIVE. Contract: basics.md 5.5."""
    if program.status != "ACTIVE":
        raise Refusal("program_inactive", f"the program is {program.status}")


def require_not_archived(program: Program) -> None:
    """Raise Refusal `program_inactive` for an ARCHIVED program. Contract: basics.md 5.5."""
    if program.status == "ARCHIVED":
        raise Refusal("program_inactive", "the program is ARCHIVED")


async def _redemption_target(tx: Transaction, program: Program, changes: dict[str, Any]) -> dict[str, Any]:
    """The two columns of the redemption target, if `changes` touch either."""
    kind = changes.get("redemption_target_type")
    entity_id: UUID | None = changes.get("redemption_target_entity_id")
    if kind is None and "redemption_target_entity_id" not in changes:
        return {}
    target = kind or program.redemption_target_type
    if target != "LEDGER_ENTITY":
        if entity_id is not None:
            message = f"must not be sent with redemption_target_type {target}"
            raise bad_field("redemption_target_entity_id", message, expected="absent", received=str(entity_id))
        return {"redemption_target_entity_id": None}
    if entity_id is None:
        message = "is required with redemption_target_type LEDGER_ENTITY"
        raise bad_field("redemption_target_entity_id", message, expected="uuid", reason="required")
    if not await _entity_exists(tx, entity_id):
        raise not_found("redemption target entity")
    return {"redemption_target_entity_id": entity_id}


async def _entity_exists(tx: Transaction, entity_id: UUID) -> bool:
    """Whether a holder or program of this organization has this id. Contract: basics.md 5.7."""
    if await tx.first(_by_id(tx, entity_id)):
        return True
    participant = select(Participant).where(
        Participant.organization_id == tx.organization_id, Participant.id == entity_id
    )
    if await tx.first(participant):
        return True
    group = select(Group).where(Group.organization_id == tx.organization_id, Group.id == entity_id)
    return await tx.first(group) is not None


def _by_id(tx: Transaction, program_id: UUID) -> SelectOfScalar[Program]:
    return select(Program).where(Program.organization_id == tx.organization_id, Program.id == program_id)
