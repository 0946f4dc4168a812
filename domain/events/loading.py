"""Reading everything that a batch of events may touch, under the locks of the global order.

What expressions name (targets, references, groups) is learnt by applying the batch to what was loaded before, so a load
is asked for a set of references and of shelves, and a batch whose events reach further asks again.
Contract: rules-and-events.md 7.2; docs/decisions/0004-batches.md.
"""

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, field
from decimal import Decimal
from typing import Any, LiteralString
from uuid import UUID

from psycopg.rows import DictRow

from db import json
from db.session import Transaction
from domain import faults, limits
from domain.events.state import CounterState, Holder
from domain.events.world import AssetTerms, Crowd, Membership, QueuedEvent, Reference, World
from domain.ids import new_id
from domain.ledger import journal
from domain.ledger.books import Books
from domain.ledger.shelves import Shelf, Shelves, load_shelves
from domain.locks import lock_groups, lock_participants, lock_programs
from domain.rules.budgets import BudgetBook, load_budgets
from domain.rules.compiled import Keys, RuleSet


@dataclass(frozen=True, slots=True)
class Wanted:
    """What to load. `members` are the participants and recipients of the events, who become members of the program.

    `shelves` are the ones that are to be read beyond their beginning, and how far. `crowded` are holders found to get
    more counters or attributes than they may, and how many they may still get.
    """

    members: frozenset[Reference]
    references: frozenset[Reference]
    shelves: dict[Shelf, Decimal | None] = field(default_factory=dict)
    crowded: dict[Crowd, int] = field(default_factory=dict)

    @classmethod
    def by(cls, events: Iterable[QueuedEvent]) -> "Wanted":
        """What the events name themselves."""
        members = frozenset(reference for event in events for reference in _members(event))
        return cls(members, members)

    def grown(self, world: World) -> "Wanted":
        """What the events have reached for in `world`, which was loaded by this."""
        shelves = dict(self.shelves)
        for shelf, amount in world.shelves.wanted().items():
            before = shelves.get(shelf, Decimal(0))
            shelves[shelf] = None if amount is None or before is None else max(amount, before)
        return Wanted(self.members, self.members | world.reached, shelves, self.crowded)


def _members(event: QueuedEvent) -> Iterable[Reference]:
    if event.participant_id is not None:
        yield Reference(id=event.participant_id)
    elif event.external_id is not None:
        yield Reference(external_id=event.external_id)
    if event.recipient_id is not None:
        yield Reference(id=event.recipient_id)
    elif event.recipient_external_id is not None:
        yield Reference(external_id=event.recipient_external_id)


async def load_world(tx: Transaction, program: DictRow, rules: RuleSet, wanted: Wanted, *, locked: bool) -> World:
    """Everything the events may touch; with `locked`, under the locks of the global order."""
    program_id: UUID = program["id"]
    ids = {r.id for r in wanted.references if r.id is not None and r.kind == "PARTICIPANT"}
    external_ids = [r.external_id for r in wanted.references if r.external_id is not None]
    resolved: dict[str, UUID] = {}
    created: set[UUID] = set()
    if external_ids:
        creates_unknown = program["on_unknown_participant"] == "CREATE"
        resolved, created = await _resolve_external_ids(tx, external_ids, create=creates_unknown)
        ids |= set(resolved.values())
    assets = await _asset_terms(tx, program_id, rules.asset_ids)
    has_wallets = any(asset.is_prefunded for asset in assets.values())

    # The locks, in the global order; what each guards is read by later statements.
    budgets = BudgetBook()
    if rules.budgeted:
        budgets.add(await load_budgets(tx, rules.budgeted, locked=locked))
    named_programs = {r.id for r in wanted.references if r.id is not None and r.kind == "PROGRAM"}
    if locked:
        own = {program_id} if has_wallets or rules.uses_program_state else set()
        await lock_programs(tx, named_programs | own)
    programs = await _programs(tx, program_id, named_programs)
    groups = await _groups(tx, [r.id for r in wanted.references if r.id and r.kind == "GROUP"], locked=locked)
    participants = await _participants(tx, ids, locked=locked)
    if locked:
        await faults.reach("batch.locked")

    joining = created | {holder.id for holder in participants.values() if _is_member(holder, wanted.members)}
    await _enroll(tx, program_id, joining)
    memberships = await _memberships(tx, participants, groups) if rules.reads_groups else {}
    seen_groups = groups | {m.group.id: m.group for members in memberships.values() for m in members}
    await load_state(tx, participants.values(), rules.keys["PARTICIPANT"])
    await load_state(tx, seen_groups.values(), rules.keys["GROUP"])
    if rules.uses_program_state:
        await load_state(tx, programs.values(), rules.keys["PROGRAM"])
    for holder in (*participants.values(), *seen_groups.values(), *programs.values()):
        holder.open_view(tx.now)
    books, shelves = await _load_books(
        tx, rules, wanted, assets, [*participants, *groups], list(programs) if has_wallets else []
    )
    return World(
        program=programs[program_id],
        participants=participants,
        groups=groups,
        programs=programs,
        by_external_id={h.external_id: h for h in participants.values() if h.external_id is not None},
        memberships=memberships,
        known={*wanted.references, Reference(id=program_id, kind="PROGRAM")},
        assets=assets,
        books=books,
        shelves=shelves,
        budgets=budgets,
        created=created,
        is_stale=any(participants[id].external_id != external_id for external_id, id in resolved.items()),
        crowded=wanted.crowded,
    )


def _is_member(holder: Holder, members: Collection[Reference]) -> bool:
    return Reference(id=holder.id) in members or Reference(external_id=holder.external_id) in members


# --- who -------------------------------------------------------------------------------------------------------------

_EXTERNAL_IDS = "select external_id, id from participant where organization_id = %s and external_id = any(%s)"

_CREATE = """
insert into participant (organization_id, id, external_id, status, created_at, updated_at)
select %(organization_id)s, r.id, r.external_id, 'ACTIVE', %(now)s, %(now)s
from json_to_recordset(%(rows)s::json) as r (id uuid, external_id text)
order by r.external_id
on conflict (organization_id, external_id) do nothing
"""


async def _resolve_external_ids(
    tx: Transaction, external_ids: Sequence[str], *, create: bool
) -> tuple[dict[str, UUID], set[UUID]]:
    """The ids behind these external ids, and which of them are new: unknown ones are created where the policy says so.

    Creation comes before any participant is locked: whoever waits here for another's insert holds nothing yet.
    """
    found: dict[str, UUID] = dict(await _external_ids(tx, external_ids))
    unknown = sorted(set(external_ids) - set(found))
    if not unknown or not create:
        return found, set()
    rows = json.parameter([{"id": new_id(), "external_id": external_id} for external_id in unknown])
    await tx.execute(_CREATE, {"organization_id": tx.organization_id, "now": tx.now, "rows": rows})
    # A statement of its own: one that somebody else created meanwhile is visible only now.
    made: dict[str, UUID] = dict(await _external_ids(tx, unknown))
    return found | made, set(made.values())


async def _external_ids(tx: Transaction, external_ids: Sequence[str]) -> list[Any]:
    return await (await tx.execute(_EXTERNAL_IDS, (tx.organization_id, list(external_ids)))).fetchall()


async def _programs(tx: Transaction, own_id: UUID, named: set[UUID]) -> dict[UUID, Holder]:
    """The event's own program and the ones that events name.

    The own one counts as ACTIVE: events that it accepted before it stopped being so finish processing.
    """
    programs = {own_id: Holder("PROGRAM", own_id)}
    if others := named - {own_id}:
        rows = await tx.execute(
            "select id, status from program where organization_id = %s and id = any(%s)",
            (tx.organization_id, list(others)),
        )
        programs |= {id: Holder("PROGRAM", id, status=status) for id, status in await rows.fetchall()}
    return programs


async def _groups(tx: Transaction, ids: Sequence[UUID], *, locked: bool) -> dict[UUID, Holder]:
    if not ids:
        return {}
    if locked:
        await lock_groups(tx, ids)
    rows = await tx.execute(
        "select id, status, name from holder_group where organization_id = %s and id = any(%s)",
        (tx.organization_id, list(ids)),
    )
    return {
        group_id: Holder("GROUP", group_id, status=status, name=name)
        for group_id, status, name in await rows.fetchall()
    }


async def _participants(tx: Transaction, ids: set[UUID], *, locked: bool) -> dict[UUID, Holder]:
    if not ids:
        return {}
    if locked:
        await lock_participants(tx, ids)
    rows = await tx.execute(
        "select id, external_id, status from participant where organization_id = %s and id = any(%s)",
        (tx.organization_id, list(ids)),
    )
    return {
        participant_id: Holder("PARTICIPANT", participant_id, external_id, status)
        for participant_id, external_id, status in await rows.fetchall()
    }


_MEMBERSHIPS = """
select m.participant_id, m.group_id, m.role, m.name
from unnest(%(participant_ids)s::uuid[]) as p (id)
cross join lateral (
    select m.participant_id, m.group_id, m.role, g.name
    from group_member m join holder_group g on g.organization_id = m.organization_id and g.id = m.group_id
    where m.organization_id = %(organization_id)s and m.participant_id = p.id and m.status = 'ACTIVE'
      and g.status = 'ACTIVE'
    order by m.joined_at, m.group_id limit %(limit)s
) m
order by m.participant_id
"""


async def _memberships(
    tx: Transaction, participants: Collection[UUID], targets: dict[UUID, Holder]
) -> dict[UUID, list[Membership]]:
    """The active groups of each participant, the longest membership first.

    Groups that are only read are not locked: nothing is decided from them that their own lock would have to guard.
    """
    params = {
        "organization_id": tx.organization_id,
        "participant_ids": list(participants),
        "limit": limits.GROUPS_SEEN,
    }
    groups = dict(targets)
    memberships: dict[UUID, list[Membership]] = {}
    for participant_id, group_id, role, name in await (await tx.execute(_MEMBERSHIPS, params)).fetchall():
        group = groups.setdefault(group_id, Holder("GROUP", group_id, name=name))
        memberships.setdefault(participant_id, []).append(Membership(group, role))
    return memberships


_ENROLL = """
insert into enrollment (organization_id, program_id, participant_id, status, created_at, updated_at)
select %(organization_id)s, %(program_id)s, participant_id, 'ACTIVE', %(now)s, %(now)s
from unnest(%(participant_ids)s::uuid[]) as participant_id
order by participant_id
on conflict (organization_id, program_id, participant_id)
    do update set status = 'ACTIVE', updated_at = excluded.updated_at
"""


async def _enroll(tx: Transaction, program_id: UUID, participant_ids: set[UUID]) -> None:
    """Make these participants members of the program. Contract: rules-and-events.md 7.2."""
    if not participant_ids:
        return
    enrolled = await tx.execute(
        "select participant_id from enrollment where organization_id = %s and program_id = %s"
        " and participant_id = any(%s) and status = 'ACTIVE'",
        (tx.organization_id, program_id, list(participant_ids)),
    )
    outside = participant_ids - {row[0] for row in await enrolled.fetchall()}
    if outside:
        params = {
            "organization_id": tx.organization_id,
            "program_id": program_id,
            "participant_ids": list(outside),
            "now": tx.now,
        }
        await tx.execute(_ENROLL, params)


# --- what they have --------------------------------------------------------------------------------------------------

_ASSETS = """
select a.id, a.scale, a.inventory_mode = 'LOT', a.issuance_policy = 'PREFUNDED',
       a.status = 'ARCHIVED', l.asset_id is not null, a.max_transaction_amount
from asset a
left join program_asset l on l.organization_id = a.organization_id and l.program_id = %s and l.asset_id = a.id
where a.organization_id = %s and a.id = any(%s)
"""


async def _asset_terms(tx: Transaction, program_id: UUID, asset_ids: Iterable[UUID]) -> dict[UUID, AssetTerms]:
    ids = list(asset_ids)
    if not ids:
        return {}
    rows = await (await tx.execute(_ASSETS, (program_id, tx.organization_id, ids))).fetchall()
    return {row[0]: AssetTerms(*row) for row in rows}


async def _load_books(
    tx: Transaction,
    rules: RuleSet,
    wanted: Wanted,
    assets: dict[UUID, AssetTerms],
    holder_ids: Sequence[UUID],
    program_ids: Sequence[UUID],
) -> tuple[Books, Shelves]:
    """The accounts of the holders and of the programs with a wallet, and the lots and holds that rules may take."""
    books = await journal.load_accounts(tx, [*holder_ids, *program_ids], list(assets))
    kinds = [
        Shelf(UUID(int=0), asset_id, bucket, assets[asset_id].has_lots)
        for asset_id, bucket in rules.taking
        # AVAILABLE value of a SIMPLE asset lies in no lots and no holds: its account says it all.
        if asset_id in assets and (assets[asset_id].has_lots or bucket == "HELD")
    ]
    if not kinds or not holder_ids:
        return books, Shelves()
    return books, await load_shelves(tx, books, holder_ids, kinds, wanted.shelves)


async def load_state(tx: Transaction, holders: Iterable[Holder], keys: Keys) -> None:
    """Read the tags, counters and attributes that the rules can reach.

    Whatever else is stored on a holder costs nothing, however much it is.
    """
    by_id = {holder.id: holder for holder in holders}
    if not by_id:
        return
    scope = (tx.organization_id, list(by_id))
    if keys.tags:
        cursor = await tx.execute(
            "select entity_id, tag from tag where organization_id = %s and entity_id = any(%s)", scope
        )
        for entity_id, tag in await cursor.fetchall():
            by_id[entity_id].tags.add(tag)
    if keys.counters is None or keys.counters:
        cursor = await tx.execute(*_keyed(_COUNTERS, scope, keys.counters))
        for entity_id, key, *stored in await cursor.fetchall():
            by_id[entity_id].counters[key] = CounterState(*stored)
    if keys.attributes is None or keys.attributes:
        cursor = await tx.execute(*_keyed(_ATTRIBUTES, scope, keys.attributes))
        for entity_id, key, value in await cursor.fetchall():
            by_id[entity_id].attributes[key] = value


_COUNTERS: LiteralString = """
select entity_id, key, value, reset_after, last_reset_at from counter
where organization_id = %s and entity_id = any(%s)
"""
_ATTRIBUTES: LiteralString = """
select entity_id, key, value from attribute where organization_id = %s and entity_id = any(%s)
"""


def _keyed(
    query: LiteralString, scope: tuple[Any, ...], keys: frozenset[str] | None
) -> tuple[LiteralString, tuple[Any, ...]]:
    """`query` narrowed to these keys by a condition of its own, which the primary key can serve; None for all."""
    return (query, scope) if keys is None else (query + " and key = any(%s)", (*scope, list(keys)))


_CROWDED: dict[str, LiteralString] = {
    kind: f"""
        select a.id, greatest(%(most)s - k.kept, 0) from unnest(%(ids)s::uuid[], %(added)s::int[]) as a (id, added)
        cross join lateral (
            select count(*) as kept from {kind} where organization_id = %(organization_id)s and entity_id = a.id
        ) k
        where k.kept + a.added > %(most)s"""
    for kind in ("counter", "attribute")
}


async def crowded_holders(tx: Transaction, world: World) -> dict[Crowd, int]:
    """The holders that would get more counters or attributes than they may, and how many they may. holders.md 5.

    Rules read only the keys that they can reach, so how many there are is asked when events have made a new one.
    """
    crowded: dict[Crowd, int] = {}
    for kind, query in _CROWDED.items():
        added: dict[UUID, int] = {}
        for change in world.state.changes:
            if change.state_type == kind and change.old is None and (change.holder.id, kind) not in world.crowded:
                added[change.holder.id] = added.get(change.holder.id, 0) + 1
        if added:
            params = {"ids": list(added), "added": list(added.values()), "most": limits.STATE_KEYS}
            rows = await tx.execute(query, params | {"organization_id": tx.organization_id})
            crowded |= {(holder_id, kind): room for holder_id, room in await rows.fetchall()}
    return crowded
