"""Groups: sets of participants with a wallet and a state of their own. Contract: holders.md 4.

Whatever changes a group or its membership locks the group's row first, so that an ACTIVE group keeps an ADMIN and an
archived one stays as it is, however many change it at once.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Literal
from uuid import UUID

from sqlalchemy import update as sql_update
from sqlmodel import col, select

from db.session import Transaction
from db.tables import Group
from domain.errors import Refusal, bad_field, not_found
from domain.ids import new_id
from domain.locks import lock_groups
from domain.pagination import Page, PageRequest, cut, decode_cursor, paginate, sort_name

GroupStatus = Literal["ACTIVE", "ARCHIVED"]
GroupRole = Literal["ADMIN", "MEMBER"]
MemberStatus = Literal["ACTIVE", "LEFT"]
SortKey = Literal["created_at", "name"]

MEMBERS_PER_CALL = 100

_MEMBER_SORT = sort_name(["joined_at", "participant_id"], descending=True)

_MEMBERS = """
select m.participant_id, p.external_id, m.role, m.status, m.joined_at, m.left_at
from group_member m
join participant p on p.organization_id = m.organization_id and p.id = m.participant_id
where m.organization_id = %(organization_id)s and m.group_id = %(group_id)s
    and (%(include_former)s or m.status = 'ACTIVE')
    and (%(after_at)s::timestamptz is null or (m.joined_at, m.participant_id) < (%(after_at)s, %(after_id)s))
order by m.joined_at desc, m.participant_id desc
limit %(rows)s
"""

_JOIN = """
insert into group_member (organization_id, group_id, participant_id, role, status, joined_at, changed_on_behalf_of)
select %(organization_id)s, %(group_id)s, participant_id, role, 'ACTIVE', %(now)s, %(on_behalf_of)s
from unnest(%(participant_ids)s::uuid[], %(roles)s::text[]) as joining (participant_id, role)
on conflict (organization_id, group_id, participant_id) do update
    set role = excluded.role, status = excluded.status, joined_at = excluded.joined_at, left_at = null,
        changed_on_behalf_of = excluded.changed_on_behalf_of
"""


@dataclass(frozen=True, slots=True)
class NewMember:
    """A participant who shall join a group."""

    participant_id: UUID
    role: GroupRole = "MEMBER"


@dataclass(frozen=True, slots=True)
class Member:
    """A membership; `left_at` is None while it is ACTIVE."""

    participant_id: UUID
    external_id: str
    role: GroupRole
    status: MemberStatus
    joined_at: datetime
    left_at: datetime | None


@dataclass(frozen=True, slots=True)
class GroupFilter:
    """What a list of groups keeps; archived ones only when asked for, one way or the other."""

    status: GroupStatus | None = None
    include_archived: bool = False
    search: str | None = None


# --- Groups ------------------------------------------------------------------------------------------------------


async def create(tx: Transaction, name: str, members: Sequence[NewMember], on_behalf_of: UUID | None) -> Group:
    """Create an ACTIVE group with its first members; `on_behalf_of` is the participant who wants it, for the audit.

    Raises Refusal: `bad_request` naming `members` without an ADMIN or with a participant twice, `not_found` for an
    unknown participant. Contract: holders.md 4.2.
    """
    _require_distinct(members)
    if all(member.role != "ADMIN" for member in members):
        raise bad_field("members", "must have at least one ADMIN", expected="an ADMIN")
    await _require_participants(tx, members, on_behalf_of)
    group = Group(
        organization_id=tx.organization_id,
        id=new_id(),
        name=name,
        status="ACTIVE",
        created_at=tx.now,
        updated_at=tx.now,
    )
    await tx.insert(group)
    await _join(tx, group.id, members, on_behalf_of)
    return group


async def get(tx: Transaction, group_id: UUID) -> Group:
    """The group, archived or not. Raises Refusal `not_found`."""
    group = await tx.first(select(Group).where(Group.organization_id == tx.organization_id, Group.id == group_id))
    if group is None:
        raise not_found("group")
    return group


async def find(
    tx: Transaction, wanted: GroupFilter, page: PageRequest, sort_by: SortKey, descending: bool
) -> Page[Group]:
    """A page of groups."""
    statement = select(Group).where(Group.organization_id == tx.organization_id)
    if wanted.status is not None:
        statement = statement.where(Group.status == wanted.status)
    elif not wanted.include_archived:
        statement = statement.where(Group.status != "ARCHIVED")
    if wanted.search:
        statement = statement.where(col(Group.name).icontains(wanted.search, autoescape=True))
    first_key = col(Group.name) if sort_by == "name" else col(Group.created_at)
    return await paginate(tx, statement, keys=(first_key, col(Group.id)), page=page, descending=descending)


async def rename(tx: Transaction, group_id: UUID, name: str | None) -> Group:
    """Change the name; None leaves it. Raises Refusal `not_found` or `group_archived`."""
    group = await _lock(tx, group_id)
    _require_not_archived(group.status)
    if name is None or name == group.name:
        return group
    return await _change(tx, group, name=name)


async def archive(tx: Transaction, group_id: UUID) -> Group:
    """Archive the group for good: everything stays readable, nothing can be changed. Again: nothing happens.

    Raises Refusal `not_found`. Contract: holders.md 4.2.
    """
    group = await _lock(tx, group_id)
    if group.status == "ARCHIVED":
        return group
    return await _change(tx, group, status="ARCHIVED", deleted_at=tx.now)


def require_active(group: Mapping[str, Any] | None) -> None:
    """Refuse a group, a row of `lock_groups`, that doesn't exist (`not_found`) or is archived (`group_archived`)."""
    if group is None:
        raise not_found("group")
    _require_not_archived(group["status"])


# --- Members -----------------------------------------------------------------------------------------------------


async def members(tx: Transaction, group_id: UUID, *, include_former: bool, page: PageRequest) -> Page[Member]:
    """A page of the group's members, the latest to join first; those who left only if `include_former`.

    Raises Refusal `not_found` for the group, and naming `cursor` for a bad one.
    """
    await get(tx, group_id)
    after_at, after_id = decode_cursor(page.cursor, _MEMBER_SORT, [datetime, UUID]) or (None, None)
    params = {
        "organization_id": tx.organization_id,
        "group_id": group_id,
        "include_former": include_former,
        "after_at": after_at,
        "after_id": after_id,
        "rows": page.limit + 1,
    }
    found = [Member(**row) for row in await tx.rows(_MEMBERS, params)]
    return cut(found, page.limit, _MEMBER_SORT, lambda member: (member.joined_at, member.participant_id))


async def add_members(tx: Transaction, group_id: UUID, joining: Sequence[NewMember], on_behalf_of: UUID | None) -> None:
    """Add all of these participants, or none; whoever had left joins anew, with the new role.

    Raises Refusal: `bad_request` naming `members` for a participant twice, `not_found` for the group or a participant,
    `group_archived`, `conflict` when one is an active member already. Contract: holders.md 4.2.
    """
    _require_distinct(joining)
    await _lock_active(tx, group_id)
    await _require_participants(tx, joining, on_behalf_of)
    already = await tx.row(
        "select participant_id from group_member where organization_id = %s and group_id = %s"
        " and participant_id = any(%s) and status = 'ACTIVE' limit 1",
        (tx.organization_id, group_id, [member.participant_id for member in joining]),
    )
    if already is not None:
        raise Refusal("conflict", f"participant {already['participant_id']} is a member already")
    await _join(tx, group_id, joining, on_behalf_of)


async def change_role(
    tx: Transaction, group_id: UUID, participant_id: UUID, role: GroupRole, on_behalf_of: UUID | None
) -> None:
    """Give an active member this role; the role it has is no change.

    Raises Refusal: `not_found` for the group, the membership or `on_behalf_of`, `group_archived`, `last_admin` when
    nobody else could manage the membership. Contract: holders.md 4.2.
    """
    await _lock_active(tx, group_id)
    old_role, status = await _membership(tx, group_id, participant_id)
    if status != "ACTIVE":
        raise not_found("active member")
    await _require_participants(tx, (), on_behalf_of)
    if role == old_role:
        return
    if old_role == "ADMIN":
        await _require_another_admin(tx, group_id, participant_id)
    await tx.execute(
        "update group_member set role = %s, changed_on_behalf_of = %s"
        " where organization_id = %s and group_id = %s and participant_id = %s",
        (role, on_behalf_of, tx.organization_id, group_id, participant_id),
    )


async def remove_member(tx: Transaction, group_id: UUID, participant_id: UUID) -> None:
    """Let a member leave: the membership stays as LEFT, the group's balance as it is. Who left before, leaves no more.

    Raises Refusal: `not_found` for the group or the membership, `group_archived`, `last_admin`.
    Contract: holders.md 4.2.
    """
    await _lock_active(tx, group_id)
    role, status = await _membership(tx, group_id, participant_id)
    if status == "LEFT":
        return
    if role == "ADMIN":
        await _require_another_admin(tx, group_id, participant_id)
    await tx.execute(
        "update group_member set status = 'LEFT', left_at = %s, changed_on_behalf_of = null"
        " where organization_id = %s and group_id = %s and participant_id = %s",
        (tx.now, tx.organization_id, group_id, participant_id),
    )


async def _lock(tx: Transaction, group_id: UUID) -> Group:
    row = (await lock_groups(tx, [group_id])).get(group_id)
    if row is None:
        raise not_found("group")
    return Group(organization_id=tx.organization_id, **row)


async def _lock_active(tx: Transaction, group_id: UUID) -> None:
    require_active((await lock_groups(tx, [group_id])).get(group_id))


async def _change(tx: Transaction, group: Group, **columns: Any) -> Group:
    """Write these columns of a group whose row is locked, and `updated_at`."""
    columns["updated_at"] = tx.now
    await tx.run(
        sql_update(Group)
        .where(col(Group.organization_id) == tx.organization_id, col(Group.id) == group.id)
        .values(**columns)
    )
    for name, value in columns.items():
        setattr(group, name, value)
    return group


async def _join(tx: Transaction, group_id: UUID, joining: Sequence[NewMember], on_behalf_of: UUID | None) -> None:
    await tx.execute(
        _JOIN,
        {
            "organization_id": tx.organization_id,
            "group_id": group_id,
            "now": tx.now,
            "on_behalf_of": on_behalf_of,
            "participant_ids": [member.participant_id for member in joining],
            "roles": [member.role for member in joining],
        },
    )


async def _membership(tx: Transaction, group_id: UUID, participant_id: UUID) -> tuple[GroupRole, MemberStatus]:
    row = await tx.row(
        "select role, status from group_member where organization_id = %s and group_id = %s and participant_id = %s",
        (tx.organization_id, group_id, participant_id),
    )
    if row is None:
        raise not_found("member")
    return row["role"], row["status"]


async def _require_another_admin(tx: Transaction, group_id: UUID, participant_id: UUID) -> None:
    other = await tx.row(
        "select 1 from group_member where organization_id = %s and group_id = %s"
        " and role = 'ADMIN' and status = 'ACTIVE' and participant_id <> %s limit 1",
        (tx.organization_id, group_id, participant_id),
    )
    if other is None:
        raise Refusal("last_admin", "the group would be left without an ADMIN: make another member ADMIN first")


async def _require_participants(tx: Transaction, joining: Collection[NewMember], on_behalf_of: UUID | None) -> None:
    named = [member.participant_id for member in joining]
    if on_behalf_of is not None:
        named.append(on_behalf_of)
    cursor = await tx.execute(
        "select id from participant where organization_id = %s and id = any(%s)", (tx.organization_id, named)
    )
    known = {participant_id for (participant_id,) in await cursor.fetchall()}
    for participant_id in named:
        if participant_id not in known:
            raise not_found(f"participant {participant_id}")


def _require_distinct(joining: Sequence[NewMember]) -> None:
    seen: set[UUID] = set()
    for index, member in enumerate(joining):
        if member.participant_id in seen:
            field = f"members[{index}].participant_id"
            raise bad_field(
                field, "is named twice", expected="another participant", received=str(member.participant_id)
            )
        seen.add(member.participant_id)


def _require_not_archived(status: str) -> None:
    if status == "ARCHIVED":
        raise Refusal("group_archived", "the group is ARCHIVED")
