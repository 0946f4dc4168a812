"""Programs over HTTP. Contract: basics.md 5."""

from typing import Annotated, Literal
from uuid import UUID

from fastapi import Query
from pydantic import Field

from api.models import ListOf, Name, PatchModel, RequestModel, ResponseModel, Timestamp, omittable, unset_field
from api.queries import IncludeArchived, PageOf50, Search, SortDirection, listed
from api.route import Tx, make_router
from db.tables import Program
from domain import programs
from domain.programs import ProgramFilter, ProgramStatus, RedemptionTarget, UnknownParticipant

router = make_router("Programs")

ProgramText = Annotated[str, Field(max_length=1000)]


class ProgramCreate(RequestModel):
    """A new program."""

    name: Name = Field(description="Need not be unique.", examples=["Q1 Sales Bonus"])
    description: ProgramText | None = Field(default=None, description="At most 1000 characters.")
    on_unknown_participant: UnknownParticipant = Field(
        default="CREATE", description="What an event with an unknown external_id does."
    )


class ProgramUpdate(PatchModel):
    """What to change; the rest stays."""

    name: Name = unset_field("The new name.")
    description: ProgramText | None = unset_field("The new description; null clears it.")
    on_unknown_participant: UnknownParticipant = unset_field("What an event with an unknown external_id does.")
    status: ProgramStatus = unset_field("Archives, suspends or reactivates; every change is allowed.")
    redemption_target_type: RedemptionTarget = unset_field("Where value redeemed from now on is posted.")
    redemption_target_entity_id: UUID | None = unset_field(
        "A participant, group or program: required with LEDGER_ENTITY, refused with the others."
    )


class ProgramOut(ResponseModel):
    """A program."""

    id: UUID = Field(description="Called `program_id` elsewhere.")
    name: str = Field(description="The name.")
    description: str | None = Field(description="The description, or null.")
    status: ProgramStatus = Field(description="ACTIVE at creation.")
    on_unknown_participant: UnknownParticipant = Field(description="What an event with an unknown external_id does.")
    redemption_target_type: RedemptionTarget = Field(description="Where redeemed value is posted.")
    redemption_target_entity_id: UUID | None = omittable("Only with LEDGER_ENTITY.")
    created_at: Timestamp = Field(description="When it was created.")
    updated_at: Timestamp = Field(description="When it was last changed.")
    deleted_at: Timestamp | None = Field(description="When it was archived; null while it isn't.")


@router.post("/programs", status_code=201, response_model=ProgramOut)
async def create_program(tx: Tx, body: ProgramCreate) -> ProgramOut:
    """Create a program; it is ACTIVE at once."""
    program = await programs.create(
        tx, name=body.name, description=body.description, on_unknown_participant=body.on_unknown_participant
    )
    return present(program)


@router.get("/programs", response_model=ListOf[ProgramOut])
async def list_programs(
    tx: Tx,
    page: PageOf50,
    status: Annotated[ProgramStatus | None, Query(description="Only this status, ARCHIVED included.")] = None,
    include_archived: IncludeArchived = False,
    search: Search = None,
    sort_by: Annotated[Literal["created_at", "name"], Query(description="The order.")] = "created_at",
    sort_dir: SortDirection = "desc",
) -> ListOf[ProgramOut]:
    """List programs, newest first; archived ones only when asked for."""
    wanted = ProgramFilter(status=status, include_archived=include_archived, search=search)
    return listed(await programs.find(tx, wanted, page, sort_by, sort_dir == "desc"), present)


@router.get("/programs/{id}", response_model=ProgramOut)
async def get_program(tx: Tx, id: UUID) -> ProgramOut:
    """Get one program, archived or not."""
    return present(await programs.get(tx, id))


@router.patch("/programs/{id}", response_model=ProgramOut)
async def update_program(tx: Tx, id: UUID, body: ProgramUpdate) -> ProgramOut:
    """Change a program; archiving and reactivating is a change of its status."""
    return present(await programs.update(tx, id, body.required_changes()))


def present(program: Program) -> ProgramOut:
    """The program as the API shows it."""
    return ProgramOut.of(program)
