"""Groups and their members over HTTP. Contract: holders.md 4 and 5.5."""

from typing import Annotated, Literal
from uuid import UUID

from fastapi import Query
from pydantic import Field, model_validator
from pydantic_core import PydanticCustomError
from starlette.responses import Response

from api.models import (
    ListOf,
    Name,
    PatchModel,
    RequestModel,
    ResponseModel,
    Timestamp,
    omittable,
    unset_field,
    whole_list,
)
from api.queries import IncludeArchived, PageOf50, Search, SortDirection, listed
from api.responses import no_content
from api.route import Tx, make_router
from api.state import HistoryQuery, StateChangeOut, present_change
from db.tables import Group
from domain import groups, state
from domain.groups import GroupFilter, GroupRole, GroupStatus, Member, MemberStatus, NewMember
from domain.ledger import moments
from domain.ledger.balances import holder_totals

router = make_router("Groups")


class MemberIn(RequestModel):
    """A participant who shall join."""

    participant_id: UUID = Field(description="A participant of the organization, whatever its status.")
    role: GroupRole = Field(default="MEMBER", description="ADMIN means: may manage membership. For you to interpret.")

    def member(self) -> NewMember:
        """The same, for the domain."""
        return NewMember(self.participant_id, self.role)


Members = Annotated[list[MemberIn], Field(min_length=1, max_length=groups.MEMBERS_PER_CALL)]
OnBehalfOf = Annotated[UUID | None, Field(description="The participant who asked for it, for the audit.")]


class GroupCreate(RequestModel):
    """A new group."""

    name: Name = Field(description="Need not be unique.", examples=["The Smiths"])
    members: Members = Field(description="1 to 100, each participant once, at least one of them ADMIN.")
    on_behalf_of_participant_id: OnBehalfOf = None


class GroupUpdate(PatchModel):
    """What to change; the rest stays."""

    name: Name = unset_field("The new name.")


class MembersAdd(RequestModel):
    """One member (`participant_id`, `role`), or several (`members`)."""

    participant_id: UUID | None = Field(default=None, description="The one participant to add.")
    role: GroupRole = Field(default="MEMBER", description="The role of the one participant.")
    members: Members | None = Field(default=None, description="1 to 100 participants: all of them join, or none.")
    on_behalf_of_participant_id: OnBehalfOf = None

    @model_validator(mode="after")
    def _is_one_or_several(self) -> "MembersAdd":
        if self.members is None and self.participant_id is None:
            message = "participant_id or members is needed"
            raise PydanticCustomError("one_of", message, {"field": "participant_id", "reason": "required"})
        if self.members is not None and (self.participant_id is not None or "role" in self.model_fields_set):
            message = "members must not be sent together with participant_id or role"
            raise PydanticCustomError("one_of", message, {"field": "members", "expected": "absent"})
        return self

    def joining(self) -> list[NewMember]:
        """Who shall join."""
        if self.participant_id is not None:
            return [NewMember(self.participant_id, self.role)]
        return [member.member() for member in self.members or ()]


class RoleChange(RequestModel):
    """The new role of a member."""

    role: GroupRole = Field(description="ADMIN or MEMBER.")
    on_behalf_of_participant_id: OnBehalfOf = None


class GroupOut(ResponseModel):
    """A group."""

    id: UUID = Field(description="Called `group_id` elsewhere.")
    name: str = Field(description="The name.")
    status: GroupStatus = Field(description="ACTIVE until it is archived.")
    created_at: Timestamp = Field(description="When it was created.")
    updated_at: Timestamp = Field(description="When its name or status was last changed.")
    deleted_at: Timestamp | None = omittable("When it was archived; absent while it isn't.")


class GroupDetailOut(GroupOut):
    """A group with what it has."""

    balances: dict[UUID, str] = Field(description="Total per asset id, all buckets together, as a decimal string.")


class MemberOut(ResponseModel):
    """A membership."""

    participant_id: UUID = Field(description="The participant.")
    external_id: str = Field(description="The participant's external_id.")
    role: GroupRole = Field(description="ADMIN or MEMBER.")
    status: MemberStatus = Field(description="ACTIVE, or LEFT after the removal.")
    joined_at: Timestamp = Field(description="When it joined, the last time.")
    left_at: Timestamp | None = omittable("When it left; absent while it is a member.")


class MembersAdded(ResponseModel):
    """The members have joined."""

    message: str


class RoleChanged(ResponseModel):
    """The role as it is now."""

    message: str
    participant_id: UUID = Field(description="The member.")
    role: GroupRole = Field(description="The role.")


class GroupBalanceOut(ResponseModel):
    """What a group has of one asset."""

    asset_id: UUID = Field(description="The asset.")
    balance: str = Field(description="AVAILABLE, HELD and DEFERRED together, as a decimal string.")


@router.post("/groups", status_code=201, response_model=GroupOut)
async def create_group(tx: Tx, body: GroupCreate) -> GroupOut:
    """Create a group with its first members, at least one of them ADMIN."""
    joining = [member.member() for member in body.members]
    return _present(await groups.create(tx, body.name, joining, body.on_behalf_of_participant_id))


@router.get("/groups", response_model=ListOf[GroupOut])
async def list_groups(
    tx: Tx,
    page: PageOf50,
    status: Annotated[GroupStatus | None, Query(description="Only this status.")] = None,
    include_archived: IncludeArchived = False,
    search: Search = None,
    sort_by: Annotated[Literal["created_at", "name"], Query(description="The order.")] = "created_at",
    sort_dir: SortDirection = "desc",
) -> ListOf[GroupOut]:
    """List groups; `search` looks at the name."""
    wanted = GroupFilter(status=status, include_archived=include_archived, search=search)
    return listed(await groups.find(tx, wanted, page, sort_by, sort_dir == "desc"), _present)


@router.get("/groups/{id}", response_model=GroupDetailOut)
async def get_group(tx: Tx, id: UUID) -> GroupDetailOut:
    """Get one group with its total of each asset."""
    group = await groups.get(tx, id)
    totals = await holder_totals(tx, id)
    return GroupDetailOut.of(group, balances={total.asset_id: total.text for total in totals})


@router.patch("/groups/{id}", response_model=GroupOut)
async def update_group(tx: Tx, id: UUID, body: GroupUpdate) -> GroupOut:
    """Rename a group."""
    return _present(await groups.rename(tx, id, body.name))


@router.delete("/groups/{id}", response_model=GroupOut)
async def archive_group(tx: Tx, id: UUID) -> GroupOut:
    """Archive a group, for good: it stays readable and refuses every change."""
    return _present(await groups.archive(tx, id))


@router.get("/groups/{id}/members", response_model=ListOf[MemberOut])
async def list_group_members(
    tx: Tx,
    id: UUID,
    page: PageOf50,
    include_former: Annotated[bool, Query(description="Also list those who left.")] = False,
) -> ListOf[MemberOut]:
    """List the members of a group, the latest to join first."""
    return listed(await groups.members(tx, id, include_former=include_former, page=page), _present_member)


@router.post("/groups/{id}/members", status_code=201, response_model=MembersAdded)
async def add_group_members(tx: Tx, id: UUID, body: MembersAdd) -> MembersAdded:
    """Add one member, or several at once: all of them or none."""
    await groups.add_members(tx, id, body.joining(), body.on_behalf_of_participant_id)
    return MembersAdded(message="Member(s) added to group")


@router.patch("/groups/{id}/members/{participant_id}", response_model=RoleChanged)
async def change_group_role(tx: Tx, id: UUID, participant_id: UUID, body: RoleChange) -> RoleChanged:
    """Change the role of a member; the last ADMIN stays one."""
    await groups.change_role(tx, id, participant_id, body.role, body.on_behalf_of_participant_id)
    return RoleChanged(message="Member role updated", participant_id=participant_id, role=body.role)


@router.delete("/groups/{id}/members/{participant_id}", status_code=204)
async def remove_group_member(tx: Tx, id: UUID, participant_id: UUID) -> Response:
    """Remove a member, unless it is the last ADMIN; the membership stays listed as LEFT."""
    await groups.remove_member(tx, id, participant_id)
    return no_content()


@router.get("/groups/{id}/balances", response_model=ListOf[GroupBalanceOut])
async def list_group_balances(
    tx: Tx,
    id: UUID,
    program_id: Annotated[UUID | None, Query(description="Only what this program's entries add up to.")] = None,
    as_of: Annotated[
        Timestamp | None, Query(description="The totals at this instant; one in the future means now.")
    ] = None,
) -> ListOf[GroupBalanceOut]:
    """List the group's total of each asset, now or at an instant; assets never touched are absent."""
    await state.require(tx, "group", id)
    moment = None if as_of is None else await moments.at(tx, as_of)
    totals = await holder_totals(tx, id, program_id, moment)
    rows = [GroupBalanceOut(asset_id=total.asset_id, balance=total.text) for total in totals]
    return ListOf[GroupBalanceOut].model_construct(**whole_list(rows))


@router.get("/groups/{id}/activity/state-history", response_model=ListOf[StateChangeOut])
async def list_group_state_history(tx: Tx, id: UUID, page: PageOf50, wanted: HistoryQuery) -> ListOf[StateChangeOut]:
    """List a group's state changes, newest first."""
    await state.require(tx, "group", id)
    return listed(await state.history(tx, id, wanted, page), present_change)


def _present(group: Group) -> GroupOut:
    return GroupOut.of(group)


def _present_member(member: Member) -> MemberOut:
    return MemberOut.of(member)
