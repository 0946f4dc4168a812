"""What others did to the holders of a simulation: calls of the API, other programs, events that a filter leaves out.

It is done again in the simulated world, at its place between the simulated events, so that these meet the balances and
the state that they really met as far as the simulated rules don't change them. The ledger says what was done to
balances, its lots and holds say on which terms; the state history says what was done to state.
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime
from decimal import Decimal
from typing import Any
from uuid import UUID

from db.session import Transaction
from domain import limits
from domain.ledger.books import Bucket
from domain.ledger.holdings import HOLD_COLUMNS
from domain.ledger.holds import Hold
from domain.money import EXACT, ZERO
from domain.simulations.beginnings import is_reachable
from domain.simulations.entities import Entity, Frame
from domain.simulations.holders import Snapshot
from domain.simulations.past import Place

# Entries that time makes: a simulation makes its own (dues.py).
_BY_TIME = frozenset({"MATURITY", "EXPIRY"})

# How long after the start of the range an entry may be of an event that was processed before it: locks were waited for.
_STRAGGLING_S = 60


@dataclass(frozen=True, slots=True)
class NewLot:
    """A lot that an operation made, or value that it gave back to one: with the vintage and the terms of that."""

    amount: Decimal
    created_at: datetime
    expires_at: datetime | None
    matures_at: datetime | None


@dataclass(frozen=True, slots=True)
class Operation:
    """What one journal entry of somebody else did to one holder's share of an asset, bucket by bucket.

    `hold` is the one that it made, `reduced` those that it took from, as (id, kind).
    """

    entry_id: UUID
    sequence: int
    at: datetime
    action_type: str
    program_id: UUID
    event_id: UUID | None
    reference_id: str | None
    description: str | None
    entity_id: UUID
    asset_id: UUID
    moved: dict[str, Decimal]
    lots: tuple[NewLot, ...] = ()
    hold: Hold | None = None
    reduced: tuple[tuple[UUID, str], ...] = ()

    def in_bucket(self, bucket: Bucket) -> Decimal:
        """The signed amount that it moved in this bucket."""
        return self.moved.get(bucket, ZERO)


@dataclass(frozen=True, slots=True)
class StateChange:
    """What somebody else did to one tag, counter or attribute. `window` is the counter's as it is configured now."""

    at: datetime
    entity_id: UUID
    state_type: str
    key: str
    operation: str
    old_value: str | None
    new_value: str | None
    event_id: UUID | None
    window: str | None


@dataclass(slots=True)
class Meanwhile:
    """What others did to some holders, in order, as far as it was read.

    `read_to` are the versions that were read of each real account, with the sequences and instants of their entries,
    `owners` whose accounts they are. Where it was too much at once, all is known up to the entry `known_to` (sequence
    and instant) of the ledger, and before the instant `known_until` of the state history; None where nothing was left.
    """

    operations: list[Operation] = field(default_factory=list)
    changes: list[StateChange] = field(default_factory=list)
    read_to: dict[UUID, list[tuple[int, int, datetime]]] = field(default_factory=dict)
    owners: dict[UUID, UUID] = field(default_factory=dict)
    known_to: tuple[int, datetime] | None = None
    known_until: datetime | None = None

    def add(self, more: "Meanwhile") -> None:
        """Take in what was read of further holders."""
        self.operations = sorted([*self.operations, *more.operations], key=lambda done: done.sequence)
        self.changes = sorted([*self.changes, *more.changes], key=lambda change: change.at)
        self.read_to |= more.read_to
        self.owners |= more.owners
        self.known_to = min(filter(None, (self.known_to, more.known_to)), default=None)
        self.known_until = min(filter(None, (self.known_until, more.known_until)), default=None)

    def marks_at(self, end: Place) -> dict[UUID, dict[UUID, int]]:
        """Up to which version each holder's real accounts have been read, at the place `end`."""
        marks: dict[UUID, dict[UUID, int]] = {}
        for account_id, versions in self.read_to.items():
            behind = [version for version, sequence, at in versions if end.is_after(at, sequence)]
            if behind:
                marks.setdefault(self.owners[account_id], {})[account_id] = max(behind)
        return marks


async def read_meanwhile(
    tx: Transaction, frame: Frame, entities: Collection[Entity], snapshots: dict[UUID, Snapshot], end: Place
) -> Meanwhile:
    """What others did to these entities between their snapshots and the place `end`."""
    found = Meanwhile()
    by_id = {entity.id: entity for entity in entities}
    if frame.followed or frame.wallets:
        await _read_operations(tx, frame, by_id, snapshots, end, found)
    with_state = [e.id for e in entities if e.kind != "PROGRAM" or frame.rules.uses_program_state]
    if with_state:
        await _read_changes(tx, frame, by_id, with_state, snapshots, end.at, found)
    return found


# --- the ledger ------------------------------------------------------------------------------------------------------

_ACCOUNTS = """
select id, entity_id, asset_id, bucket from account
where organization_id = %s and entity_id = any(%s) and asset_id = any(%s)
"""

# A few postings of each account beyond its mark, whatever their time: asking for those until an instant would read an
# account to its end, as nothing says that its postings are in the order of time.
_FURTHER = """
select a.id, p.version, p.amount, e.id, e.sequence, e.created_at, e.action_type, e.program_id, e.event_id,
       e.reference_id, e.description
from unnest(%(accounts)s::uuid[], %(versions)s::bigint[]) as a (id, version)
cross join lateral (
    select version, amount, entry_id from posting
    where organization_id = %(organization_id)s and account_id = a.id and version > a.version
    order by version limit %(limit)s
) p
cross join lateral (
    select id, sequence, created_at, action_type, program_id, event_id, reference_id, description from journal_entry
    where organization_id = %(organization_id)s and id = p.entry_id limit 1
) e
order by a.id, p.version
"""

_EVENTS = """
select v.id, v.processed_at >= %(starts_at)s and (not %(has_filter)s or coalesce(h.is_included, false))
from event v
left join simulation_holder h on h.organization_id = v.organization_id and h.simulation_id = %(simulation_id)s
                             and h.entity_id = v.participant_id
where v.organization_id = %(organization_id)s and v.id = any(%(ids)s)
"""


@dataclass(frozen=True, slots=True)
class _Line:
    """A posting on a followed account, with its entry."""

    account_id: UUID
    version: int
    amount: Decimal
    entry_id: UUID
    sequence: int
    at: datetime
    action_type: str
    program_id: UUID
    event_id: UUID | None
    reference_id: str | None
    description: str | None


async def _read_operations(
    tx: Transaction,
    frame: Frame,
    entities: dict[UUID, Entity],
    snapshots: dict[UUID, Snapshot],
    end: Place,
    found: Meanwhile,
) -> None:
    assets = list(frame.followed | frame.wallets)
    rows = await (await tx.execute(_ACCOUNTS, (tx.organization_id, list(entities), assets))).fetchall()
    accounts = {row[0]: row[1:] for row in rows if frame.is_followed(entities[row[1]].kind, row[2])}
    marks = {account_id: snapshots[of[0]].marks.get(account_id, 0) for account_id, of in accounts.items()}
    lines = await _read_lines(tx, marks, end, found)
    found.owners = {account_id: accounts[account_id][0] for account_id in found.read_to}
    others = await _of_others(tx, frame, lines)
    grouped: dict[tuple[UUID, UUID, UUID], Operation] = {}
    for line in others:
        entity_id, asset_id, bucket = accounts[line.account_id]
        operation = grouped.setdefault((line.entry_id, entity_id, asset_id), _operation(line, entity_id, asset_id))
        operation.moved[bucket] = EXACT.add(operation.moved.get(bucket, ZERO), line.amount)
    operations = await _with_terms(tx, frame, entities, list(grouped.values()))
    found.operations = sorted(operations, key=lambda done: done.sequence)


async def _read_lines(tx: Transaction, marks: dict[UUID, int], end: Place, found: Meanwhile) -> list[_Line]:
    """The postings on these accounts after their marks and before `end`, a few of each at first, then more."""
    lines: list[_Line] = []
    waiting, limit = dict(marks), limits.OTHERS_FIRST_LOOK
    while waiting:
        params = {
            "organization_id": tx.organization_id,
            "accounts": list(waiting),
            "versions": list(waiting.values()),
            "limit": limit,
        }
        read: dict[UUID, list[_Line]] = {}
        for row in await (await tx.execute(_FURTHER, params)).fetchall():
            read.setdefault(row[0], []).append(_Line(*row))
        waiting = {}
        for account_id, of_account in read.items():
            inside = [line for line in of_account if end.is_after(line.at, line.sequence)]
            lines += inside
            versions = found.read_to.setdefault(account_id, [])
            versions += [(line.version, line.sequence, line.at) for line in inside]
            if len(inside) == limit:
                waiting[account_id] = inside[-1].version
        if limit >= limits.OTHERS_LAST_LOOK and waiting:
            # So much happened that it has to be taken in portions.
            found.known_to = min(found.read_to[account_id][-1][1:] for account_id in waiting)
            return lines
        limit *= 8
    return lines


async def _of_others(tx: Transaction, frame: Frame, lines: Sequence[_Line]) -> list[_Line]:
    """Those postings that no simulated event stands for."""
    own = {line.event_id for line in lines if line.event_id is not None and line.program_id == frame.program_id}
    doubtful = {
        line.event_id
        for line in lines
        if line.event_id in own and (frame.has_filter or (line.at - frame.starts_at).total_seconds() < _STRAGGLING_S)
    }
    simulated = own - doubtful
    if doubtful:
        params = {
            "organization_id": tx.organization_id,
            "simulation_id": frame.simulation_id,
            "starts_at": frame.starts_at,
            "has_filter": frame.has_filter,
            "ids": list(doubtful),
        }
        rows = await (await tx.execute(_EVENTS, params)).fetchall()
        simulated |= {event_id for event_id, is_simulated in rows if is_simulated}
    return [line for line in lines if line.event_id not in simulated]


def _operation(line: _Line, entity_id: UUID, asset_id: UUID) -> Operation:
    return Operation(
        line.entry_id,
        line.sequence,
        line.at,
        line.action_type,
        line.program_id,
        line.event_id,
        line.reference_id,
        line.description,
        entity_id,
        asset_id,
        {},
    )


_LOTS_MADE = """
select l.entry_id, l.entity_id, l.asset_id, l.amount, l.created_at, l.expires_at, l.matures_at from lot l
where l.organization_id = %(organization_id)s and l.entity_id = any(%(holders)s) and l.asset_id = any(%(assets)s)
  and l.entry_id = any(%(entries)s)
union all
select c.entry_id, l.entity_id, l.asset_id, c.delta, l.created_at, l.expires_at, null from lot_change c
join lot l on l.organization_id = c.organization_id and l.id = c.lot_id
where c.organization_id = %(organization_id)s and c.entry_id = any(%(entries)s) and c.delta > 0
order by created_at
"""

_HOLDS_MADE = f"""
select {HOLD_COLUMNS} from hold
where organization_id = %(organization_id)s and entity_id = any(%(holders)s) and entry_id = any(%(entries)s)
"""

_HOLDS_REDUCED = """
select c.entry_id, h.entity_id, h.asset_id, h.id, h.kind, c.status from hold_change c
join hold h on h.organization_id = c.organization_id and h.id = c.hold_id
where c.organization_id = %(organization_id)s and c.entry_id = any(%(entries)s)
order by h.created_at, h.id
"""


async def _with_terms(
    tx: Transaction, frame: Frame, entities: dict[UUID, Entity], operations: Sequence[Operation]
) -> list[Operation]:
    """The operations with what they did to lots and holds; without those that time made."""
    operations = [done for done in operations if done.action_type not in _BY_TIME]
    touching = [done for done in operations if entities[done.entity_id].kind != "PROGRAM"]
    if not touching:
        return list(operations)
    params: dict[str, Any] = {
        "organization_id": tx.organization_id,
        "holders": list({done.entity_id for done in touching}),
        "assets": list(frame.followed_lots),
        "entries": list({done.entry_id for done in touching}),
    }
    lots: dict[tuple[UUID, UUID, UUID], list[NewLot]] = {}
    for *where, amount, created_at, expires_at, matures_at in await (await tx.execute(_LOTS_MADE, params)).fetchall():
        lots.setdefault((where[0], where[1], where[2]), []).append(NewLot(amount, created_at, expires_at, matures_at))
    holds = {
        (hold.entry_id, hold.entity_id, hold.asset_id): hold
        for hold in (Hold(*row) for row in await (await tx.execute(_HOLDS_MADE, params)).fetchall())
    }
    reduced: dict[tuple[UUID, UUID, UUID], list[tuple[UUID, str]]] = {}
    ended_by_time: set[UUID] = set()
    for *where, hold_id, kind, status in await (await tx.execute(_HOLDS_REDUCED, params)).fetchall():
        reduced.setdefault((where[0], where[1], where[2]), []).append((hold_id, kind))
        if status == "EXPIRED" and kind != "REDEMPTION":
            ended_by_time.add(where[0])
    found = []
    for done in operations:
        key = (done.entry_id, done.entity_id, done.asset_id)
        if done.entry_id not in ended_by_time:
            found.append(
                replace(done, lots=tuple(lots.get(key, ())), hold=holds.get(key), reduced=tuple(reduced.get(key, ())))
            )
    return found


# --- state -----------------------------------------------------------------------------------------------------------

_CHANGES = """
select s.changed_at, s.entity_id, s.state_type, s.key, s.operation, s.old_value, s.new_value, s.event_id, c.reset_after
from unnest(%(entities)s::uuid[], %(since)s::timestamptz[]) as w (id, since)
cross join lateral (
    select * from state_history
    where organization_id = %(organization_id)s and entity_id = w.id
      and changed_at > w.since and changed_at <= %(until)s
) s
left join event v on v.organization_id = %(organization_id)s and v.id = s.event_id
left join simulation_holder h on h.organization_id = %(organization_id)s and h.simulation_id = %(simulation_id)s
                             and h.entity_id = v.participant_id
left join counter c on c.organization_id = %(organization_id)s and c.entity_id = s.entity_id and c.key = s.key
                   and s.state_type = 'counter'
where s.state_type in ('tag', 'counter', 'attribute') and (
    v.id is null or v.program_id <> %(program_id)s or v.processed_at is null or v.processed_at < %(starts_at)s
    or (%(has_filter)s and not coalesce(h.is_included, false)))
order by s.changed_at, s.id limit %(limit)s
"""


async def _read_changes(
    tx: Transaction,
    frame: Frame,
    entities: dict[UUID, Entity],
    entity_ids: Sequence[UUID],
    snapshots: dict[UUID, Snapshot],
    until: datetime,
    found: Meanwhile,
) -> None:
    params = {
        "organization_id": tx.organization_id,
        "simulation_id": frame.simulation_id,
        "program_id": frame.program_id,
        "starts_at": frame.starts_at,
        "has_filter": frame.has_filter,
        "entities": list(entity_ids),
        "since": [snapshots[entity_id].seen_at for entity_id in entity_ids],
        "until": until,
        "limit": limits.OTHERS_STATE_CHANGES,
    }
    rows = await (await tx.execute(_CHANGES, params)).fetchall()
    changes = [StateChange(*row) for row in rows]
    if len(changes) == limits.OTHERS_STATE_CHANGES and changes[-1].at > changes[0].at:
        found.known_until = changes[-1].at
        changes = [change for change in changes if change.at < changes[-1].at]
    found.changes = [change for change in changes if _is_reachable(frame, entities[change.entity_id], change)]


def _is_reachable(frame: Frame, entity: Entity, change: StateChange) -> bool:
    return is_reachable(frame.rules.keys[entity.kind], change.state_type, change.key)
