"""Whom events of a simulation may reach: participants, groups and programs, as they were at any instant.

And the frame of a simulation, which is the same for all of its batches. Names, roles and external ids are those of
today: what they were before isn't kept.
"""

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any
from uuid import UUID, uuid5

from db.session import Transaction
from domain import limits
from domain.events.world import AssetTerms
from domain.rules.compiled import RuleSet
from domain.simulations.holders import Kind


@dataclass(frozen=True, slots=True)
class Frame:
    """What is fixed for a simulation. `sequence_before` is the newest journal entry before `starts_at`.

    `assets` are those of the rules as they are now, `archived_at` when some of them were archived. `followed` are the
    assets that rules take from: of others neither balances nor lots change what rules do. `wallets` are those that are
    drawn from program wallets.
    """

    simulation_id: UUID
    program_id: UUID
    creates_unknown: bool
    starts_at: datetime
    sequence_before: int
    has_filter: bool
    rules: RuleSet
    assets: dict[UUID, AssetTerms]
    archived_at: dict[UUID, datetime]
    followed: frozenset[UUID]
    wallets: frozenset[UUID]

    @property
    def followed_lots(self) -> frozenset[UUID]:
        """The followed assets that have lots."""
        return frozenset(asset_id for asset_id in self.followed if self.assets[asset_id].has_lots)

    def is_followed(self, kind: Kind, asset_id: UUID) -> bool:
        """Whether a holder of this kind has something of this asset that rules can reach."""
        return asset_id in (self.wallets if kind == "PROGRAM" else self.followed)

    def id_of_made(self, external_id: str) -> UUID:
        """The id of a participant whom the simulation makes, as there is none of this external id: always the same."""
        return uuid5(self.simulation_id, external_id)


@dataclass(frozen=True, slots=True)
class Entity:
    """A participant, group or program. `changes` are (instant, status before, status after), the oldest first."""

    kind: Kind
    id: UUID
    created_at: datetime
    status: str
    external_id: str | None = None
    name: str | None = None
    changes: Sequence[tuple[datetime, str, str]] = ()

    def status_at(self, instant: datetime) -> str:
        """The status that it had then."""
        status = self.changes[0][1] if self.changes else self.status
        for changed_at, _, after in self.changes:
            if changed_at <= instant:
                status = after
        return status


@dataclass(frozen=True, slots=True)
class Belonging:
    """A membership in a group: in force from `joined_at` until before `left_at`."""

    participant_id: UUID
    group_id: UUID
    role: str
    joined_at: datetime
    left_at: datetime | None

    def holds_at(self, instant: datetime) -> bool:
        """Whether the participant was a member then."""
        return self.joined_at <= instant and (self.left_at is None or instant < self.left_at)


_ASSETS = """
select a.id, a.scale, a.inventory_mode = 'LOT', a.issuance_policy = 'PREFUNDED', false,
       l.asset_id is not null, a.max_transaction_amount, a.deleted_at
from asset a
left join program_asset l on l.organization_id = a.organization_id and l.program_id = %s and l.asset_id = a.id
where a.organization_id = %s and a.id = any(%s)
"""

_PARTICIPANTS = """
select id, created_at, status, external_id from participant
where organization_id = %(organization_id)s and id = any(%(ids)s)
union
select id, created_at, status, external_id from participant
where organization_id = %(organization_id)s and external_id = any(%(external_ids)s)
"""

_STATUS_CHANGES = """
select participant_id, changed_at, old_status, new_status from participant_status_change
where organization_id = %s and participant_id = any(%s)
order by participant_id, changed_at, id
"""

# Whoever joins a group anew loses the trace of having been in it before.
_BELONGINGS = """
select m.participant_id, m.group_id, m.role, m.joined_at, case when m.status = 'LEFT' then m.left_at end
from group_member m
where m.organization_id = %s and m.participant_id = any(%s)
order by m.participant_id, m.joined_at, m.group_id
"""


async def read_assets(
    tx: Transaction, program_id: UUID, asset_ids: Iterable[UUID]
) -> tuple[dict[UUID, AssetTerms], dict[UUID, datetime]]:
    """The assets, none of them archived yet, and when those were that are archived now."""
    rows = await (await tx.execute(_ASSETS, (program_id, tx.organization_id, list(asset_ids)))).fetchall()
    return {row[0]: AssetTerms(*row[:-1]) for row in rows}, {row[0]: row[-1] for row in rows if row[-1] is not None}


async def read_participants(tx: Transaction, ids: Collection[UUID], external_ids: Collection[str]) -> list[Entity]:
    """The participants behind these ids and external ids, as far as there are any."""
    params = {"organization_id": tx.organization_id, "ids": list(ids), "external_ids": list(external_ids)}
    rows = await (await tx.execute(_PARTICIPANTS, params)).fetchall()
    changes: dict[UUID, list[tuple[datetime, str, str]]] = {}
    scope = (tx.organization_id, [row[0] for row in rows])
    for participant_id, *change in await (await tx.execute(_STATUS_CHANGES, scope)).fetchall():
        changes.setdefault(participant_id, []).append((change[0], change[1], change[2]))
    return [
        Entity("PARTICIPANT", id, created_at, status, external_id=external_id, changes=changes.get(id, ()))
        for id, created_at, status, external_id in rows
    ]


async def read_groups(tx: Transaction, ids: Collection[UUID]) -> list[Entity]:
    """The groups of these ids, as far as there are any."""
    rows = await tx.execute(
        "select id, created_at, status, name, deleted_at from holder_group where organization_id = %s and id = any(%s)",
        (tx.organization_id, list(ids)),
    )
    return [
        Entity("GROUP", id, created_at, status, name=name, changes=_archiving(deleted_at))
        for id, created_at, status, name, deleted_at in await rows.fetchall()
    ]


async def read_programs(tx: Transaction, ids: Collection[UUID]) -> list[Entity]:
    """The programs of these ids, as far as there are any. Of their status only ARCHIVED matters."""
    rows = await tx.execute(
        "select id, created_at, deleted_at from program where organization_id = %s and id = any(%s)",
        (tx.organization_id, list(ids)),
    )
    return [
        Entity("PROGRAM", id, created_at, "ACTIVE", changes=_archiving(deleted_at))
        for id, created_at, deleted_at in await rows.fetchall()
    ]


async def read_belongings(tx: Transaction, participant_ids: Collection[UUID]) -> dict[UUID, list[Belonging]]:
    """The memberships of these participants, former ones too, the longest first."""
    found: dict[UUID, list[Belonging]] = {}
    rows: list[Any] = await (await tx.execute(_BELONGINGS, (tx.organization_id, list(participant_ids)))).fetchall()
    for row in rows:
        belonging = Belonging(*row)
        found.setdefault(belonging.participant_id, []).append(belonging)
    return found


def in_force(belongings: Sequence[Belonging], groups: dict[UUID, Entity], instant: datetime) -> list[Belonging]:
    """Those memberships that events of this instant see. Contract: rules-and-events.md 6.3."""
    seen = [
        belonging
        for belonging in belongings
        if belonging.holds_at(instant) and groups[belonging.group_id].status_at(instant) == "ACTIVE"
    ]
    return seen[: limits.GROUPS_SEEN]


def _archiving(deleted_at: datetime | None) -> Sequence[tuple[datetime, str, str]]:
    return () if deleted_at is None else ((deleted_at, "ACTIVE", "ARCHIVED"),)
