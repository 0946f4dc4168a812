"""Everything that the events of one batch may reach, and playing them on it.

As with real batches, what expressions will touch is learnt by applying the events: what they reach for beyond what is
there is loaded, and the events are applied again to a fresh world. Nothing is locked, and nothing but the simulation's
own rows is ever written.
"""

import time
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime
from decimal import Decimal
from typing import Any, TypeVar
from uuid import UUID

from db import json
from db.session import Transaction
from domain import limits
from domain.events.engine import Outcome, apply_event
from domain.events.loading import Wanted
from domain.events.state import Holder
from domain.events.world import Membership, QueuedEvent, Reference, World
from domain.ledger.books import Books, Bucket
from domain.ledger.journal import load_accounts
from domain.ledger.lots import LotStatus, Selection
from domain.ledger.movements import Position
from domain.ledger.shelves import Shelf, Shelves
from domain.money import EXACT, ZERO
from domain.rules.budgets import Budget, BudgetBook
from domain.simulations.beginnings import JUST_BEFORE, read_beginnings, read_budgets
from domain.simulations.dues import Bookings, Due, Dues, read_bookings
from domain.simulations.entities import (
    Belonging,
    Entity,
    Frame,
    in_force,
    read_belongings,
    read_groups,
    read_participants,
    read_programs,
)
from domain.simulations.holders import Kind, Snapshot
from domain.simulations.meanwhile import Meanwhile, Operation, StateChange, read_meanwhile
from domain.simulations.past import PastBatch, PastEvent, Place
from domain.simulations.repeats import Repeater, repeat_change
from domain.simulations.tallies import issues_of

_OPEN: tuple[LotStatus, ...] = ("DEFERRED", "AVAILABLE", "HELD")

Item = TypeVar("Item", Operation, StateChange)

Play = list[tuple[PastEvent, Outcome]]
"""Simulated events with their outcomes, in their order."""

_READ_HOLDERS = """
select entity_id, state from simulation_holder
where organization_id = %s and simulation_id = %s and entity_id = any(%s) and state is not null
"""

_WRITE_HOLDERS = """
insert into simulation_holder (organization_id, simulation_id, entity_id, state)
select %(organization_id)s, %(simulation_id)s, r.id, r.state
from json_to_recordset(%(rows)s::json) as r (id uuid, state json)
on conflict (organization_id, simulation_id, entity_id) do update set state = excluded.state
"""


@dataclass(slots=True)
class Played:
    """One pass through the events: what came of them, and the world afterwards, up to the place `end`.

    `batches` are those that were played: fewer than there are where time ran out, none where so much happened in the
    meantime that it alone fills the pass. `reached` and `unknown` are what was missing for it to count.
    """

    world: World
    repeater: Repeater
    budgets: list[Budget]
    end: Place
    batches: list[PastBatch] = field(default_factory=list)
    outcomes: Play = field(default_factory=list)
    reached: set[Reference] = field(default_factory=set)
    unknown: set[Due] = field(default_factory=set)


class Stage:
    """What is known of the real world and of the simulated one before some batches of past events.

    `left_out` are the events whose participants a filter leaves out: what they really did is done again.
    """

    def __init__(
        self,
        tx: Transaction,
        frame: Frame,
        budgets: Collection[Budget],
        batches: Sequence[PastBatch],
        left_out: Collection[UUID],
    ) -> None:
        self._tx = tx
        self.frame = frame
        self._budgets = list(budgets)
        self.batches = list(batches)
        self.left_out = frozenset(left_out)
        self.known: set[Reference] = set()
        self.entities: dict[UUID, Entity] = {}
        self.snapshots: dict[UUID, Snapshot] = {}
        self.belongings: dict[UUID, list[Belonging]] = {}
        self.meanwhile = Meanwhile()
        self.bookings: Bookings = {}
        self.system: Books = Books()

    async def play(self, progress: Callable[[], None]) -> Played:
        """Play the events; `progress` is called after each.

        Raises TooMuchToSimulate.
        """
        self.system = await load_accounts(self._tx, [], list(self.frame.assets))
        own = Reference(id=self.frame.program_id, kind="PROGRAM")
        await self._load({own} | {r for event in self._simulated() for r in Wanted.by([event]).references})
        passes = 0
        while True:
            played = _Pass(self, progress).run()
            assert not played.world.shelves.short, "all lots and holds of a holder are loaded"
            if not played.reached and not played.unknown:
                return played
            await self._load(played.reached)
            self.bookings |= await read_bookings(self._tx, played.unknown)
            passes += 1
            if passes % limits.SIMULATION_PASSES == 0 and len(self.batches) > 1:
                # Each pass gets one event further at least; fewer events need fewer of them.
                del self.batches[(len(self.batches) + 1) // 2 :]

    async def save(self, played: Played) -> None:
        """Keep what has become of the holders."""
        marks, accounts = self.meanwhile.marks_at(played.end), self._accounts(played.world)
        rows = []
        for entity_id, before in self.snapshots.items():
            holder = played_holder(played.world, before.kind, entity_id)
            # Whoever doesn't exist yet at the end of the batch begins when they do.
            if holder is not None:
                after = self._after(holder, before, played)
                after.marks = before.marks | marks.get(entity_id, {})
                after.balances = accounts.get(entity_id, {})
                rows.append({"id": entity_id, "state": after.document()})
        if rows:
            params = {
                "organization_id": self._tx.organization_id,
                "simulation_id": self.frame.simulation_id,
                "rows": json.parameter(rows),
            }
            await self._tx.execute(_WRITE_HOLDERS, params)

    # --- loading -----------------------------------------------------------------------------------------------------

    def _simulated(self) -> Iterable[QueuedEvent]:
        for batch in self.batches:
            for past in batch.events:
                if past.event.id not in self.left_out:
                    yield past.event

    async def _load(self, references: Collection[Reference]) -> None:
        """Load whom these references name, with everything that they have."""
        found = [
            *await self._participants([r for r in references if r.kind == "PARTICIPANT"]),
            *await read_groups(self._tx, _ids(references, "GROUP")),
            *await read_programs(self._tx, _ids(references, "PROGRAM")),
        ]
        if self.frame.rules.reads_groups:
            found += await self._groups_of([e.id for e in found if e.kind == "PARTICIPANT"])
        await self._add({entity.id: entity for entity in found if entity.id not in self.entities})
        self.known |= set(references)

    async def _participants(self, references: Collection[Reference]) -> list[Entity]:
        if not references:
            return []
        ids = _ids(references, "PARTICIPANT")
        external_ids = {r.external_id for r in references if r.external_id is not None}
        found = await read_participants(self._tx, ids, external_ids)
        if self.frame.creates_unknown:
            # Whoever is named by an external id exists from then on, in the real world or only here.
            first = self.batches[0].at
            found = [
                replace(entity, created_at=min(entity.created_at, first))
                if entity.external_id in external_ids
                else entity
                for entity in found
            ]
            unknown = external_ids - {entity.external_id for entity in found}
            found += [self._made(external_id, first) for external_id in sorted(unknown)]
        return found + await self._made_before(ids - {entity.id for entity in found})

    def _made(self, external_id: str, at: datetime) -> Entity:
        return Entity("PARTICIPANT", self.frame.id_of_made(external_id), at, "ACTIVE", external_id)

    async def _made_before(self, ids: set[UUID]) -> list[Entity]:
        """Those of these participants whom only the simulation knows."""
        stored = await self._read_documents(ids)
        snapshots = [(entity_id, Snapshot.read(entity_id, state)) for entity_id, state in stored.items()]
        return [
            Entity("PARTICIPANT", entity_id, made.exists_from, "ACTIVE", made.external_id)
            for entity_id, made in snapshots
            if made.external_id is not None
        ]

    async def _groups_of(self, participant_ids: Collection[UUID]) -> list[Entity]:
        belongings = await read_belongings(self._tx, participant_ids)
        self.belongings |= belongings
        return await read_groups(self._tx, {b.group_id for of_one in belongings.values() for b in of_one})

    async def _read_documents(self, ids: Collection[UUID]) -> dict[UUID, dict[str, Any]]:
        if not ids:
            return {}
        params = (self._tx.organization_id, self.frame.simulation_id, list(ids))
        return dict(await (await self._tx.execute(_READ_HOLDERS, params)).fetchall())

    async def _add(self, entities: dict[UUID, Entity]) -> None:
        """Load what these entities have, and what others did to them since."""
        if not entities:
            return
        stored = await self._read_documents(entities)
        snapshots = {entity_id: Snapshot.read(entity_id, state) for entity_id, state in stored.items()}
        fresh = [entity for entity_id, entity in entities.items() if entity_id not in stored]
        snapshots |= await read_beginnings(self._tx, self.frame, fresh)
        own = self.frame.program_id
        if own in snapshots and own not in stored:
            snapshots[own].budgets = await read_budgets(self._tx, self.frame, self._budgets)
        for entity_id, snapshot in snapshots.items():
            entity = entities[entity_id]
            if entity_id == self._made_id(entity):
                snapshot.external_id = entity.external_id
            snapshot.exists_from = min(snapshot.exists_from, entity.created_at)
            entities[entity_id] = replace(entity, created_at=snapshot.exists_from)
        self.entities |= entities
        self.snapshots |= snapshots
        end = self.batches[-1].end
        self.meanwhile.add(await read_meanwhile(self._tx, self.frame, list(entities.values()), snapshots, end))

    def _made_id(self, entity: Entity) -> UUID | None:
        return None if entity.external_id is None else self.frame.id_of_made(entity.external_id)

    # --- afterwards --------------------------------------------------------------------------------------------------

    def _after(self, holder: Holder, before: Snapshot, played: Played) -> Snapshot:
        """What has become of a holder, but for its balances."""
        books = played.world.books
        after = replace(
            before,
            seen_at=max(before.seen_at, played.end.at),
            tags=holder.tags,
            counters=holder.counters,
            attributes=holder.attributes,
            lots=[],
            holds=[],
            reserved=played.repeater.reserved.get(holder.id, {}),
            budgets=played.budgets if holder.id == self.frame.program_id else [],
        )
        if before.kind != "PROGRAM":
            self._add_holdings(after, holder.id, books)
        return after

    def _accounts(self, world: World) -> dict[UUID, dict[tuple[UUID, Bucket], Decimal]]:
        """The followed balances of every holder that has some."""
        found: dict[UUID, dict[tuple[UUID, Bucket], Decimal]] = {}
        for account in world.books.accounts.values():
            if account.entity_id is None or account.balance == ZERO:
                continue
            kind = self.snapshots[account.entity_id].kind
            if self.frame.is_followed(kind, account.asset_id):
                found.setdefault(account.entity_id, {})[account.asset_id, account.bucket] = account.balance
        return found

    def _add_holdings(self, after: Snapshot, entity_id: UUID, books: Books) -> None:
        for asset_id in sorted(self.frame.followed_lots):
            for status in _OPEN:
                after.lots += books.lots.matching(Selection(entity_id, asset_id, status))
        for asset_id in sorted(self.frame.followed):
            active = books.holds.take_oldest(entity_id, asset_id, None)
            after.holds += [books.holds.get(hold_id) for hold_id in active]


class _Pass:
    """One pass of the events through a fresh world. It needs nothing but what the stage has loaded."""

    def __init__(self, stage: Stage, progress: Callable[[], None]) -> None:
        self._stage = stage
        self._frame = stage.frame
        self._progress = progress
        self._batches, self._end = _known_part(stage.batches, stage.meanwhile)
        self._at = self._batches[0].at if self._batches else self._end.at
        self._budgets = [replace(budget) for budget in stage.snapshots[self._frame.program_id].budgets]
        self._world = self._empty_world()
        self._repeater = Repeater(self._world)
        self._dues = Dues(self._world, self._frame, stage.bookings)
        self._waiting = sorted(stage.entities.values(), key=lambda entity: entity.created_at, reverse=True)
        self._changing = [entity.id for entity in stage.entities.values() if entity.changes]
        operations = [o for o in stage.meanwhile.operations if self._end.is_after(o.at, o.sequence)]
        changes = [change for change in stage.meanwhile.changes if change.at <= self._end.at]
        # What an event did that is left out has its place among the events of its batch.
        self._operations = [operation for operation in operations if operation.event_id not in stage.left_out]
        self._changes = [change for change in changes if change.event_id not in stage.left_out]
        self._operations_of = _by_event(operations, stage.left_out)
        self._changes_of = _by_event(changes, stage.left_out)

    def run(self) -> Played:
        """Play the batches as far as time goes, and do again what others did until then."""
        self._admit(self._at)
        played: list[PastBatch] = []
        outcomes: Play = []
        ends_at = time.monotonic() + limits.SIMULATION_BATCH_MS / 1000
        end = self._end
        for batch in self._batches:
            if played and time.monotonic() > ends_at:
                end = played[-1].end
                break
            self._go_to(batch.place)
            outcomes += self._play(batch)
            played.append(batch)
        self._go_to(end)
        return Played(
            self._world,
            self._repeater,
            self._budgets,
            end,
            played,
            outcomes,
            self._world.missing,
            self._dues.unknown,
        )

    # --- the world ---------------------------------------------------------------------------------------------------

    def _empty_world(self) -> World:
        books, stage = Books(), self._stage
        books.add(stage.system.accounts.values())
        budgets = BudgetBook()
        budgets.add(self._budgets)
        return World(
            program=Holder("PROGRAM", self._frame.program_id),
            participants={},
            groups={},
            programs={},
            by_external_id={},
            memberships={},
            known=set(stage.known),
            assets=dict(self._frame.assets),
            books=books,
            shelves=Shelves(),
            budgets=budgets,
        )

    def _admit(self, at: datetime) -> None:
        """Let those into the world who exist by now."""
        while self._waiting and self._waiting[-1].created_at <= at:
            entity = self._waiting.pop()
            snapshot = self._stage.snapshots[entity.id].copy()
            holder = Holder(entity.kind, entity.id, entity.external_id, entity.status_at(at), entity.name)
            holder.tags, holder.counters, holder.attributes = snapshot.tags, snapshot.counters, snapshot.attributes
            if entity.id == self._frame.program_id:
                # Events that a program accepted are processed whatever becomes of it.
                holder.status = "ACTIVE"
                self._world.program = holder
            holder.open_view(at)
            self._place(entity, holder)
            self._stock(entity, holder, snapshot)

    def _place(self, entity: Entity, holder: Holder) -> None:
        world = self._world
        if entity.kind == "PROGRAM":
            world.programs[entity.id] = holder
        elif entity.kind == "GROUP":
            world.groups[entity.id] = holder
        else:
            world.participants[entity.id] = holder
            if entity.external_id is not None:
                world.by_external_id[entity.external_id] = holder

    def _stock(self, entity: Entity, holder: Holder, snapshot: Snapshot) -> None:
        """Bring in what the holder has."""
        world = self._world
        for (asset_id, bucket), balance in snapshot.balances.items():
            world.books.account(entity.kind, entity.id, asset_id, bucket).balance = balance
        if entity.kind == "PROGRAM":
            return
        world.books.lots.add(snapshot.lots)
        world.books.holds.add(snapshot.holds)
        for asset_id, bucket in self._frame.rules.taking:
            if asset_id in self._frame.assets:
                has_lots = self._frame.assets[asset_id].has_lots
                world.shelves.complete.add(Shelf(entity.id, asset_id, bucket, has_lots))
        if snapshot.reserved:
            self._repeater.reserved[entity.id] = snapshot.reserved
        self._dues.follow(holder)

    # --- what happens ------------------------------------------------------------------------------------------------

    def _play(self, batch: PastBatch) -> Play:
        """Apply the events of a batch."""
        outcomes: Play = []
        for past in batch.events:
            if past.event.id in self._stage.left_out:
                self._repeat(past)
            else:
                outcomes.append((past, self._apply(past)))
                self._dues.notice()
            self._progress()
        return outcomes

    def _apply(self, past: PastEvent) -> Outcome:
        event, world = past.event, self._world
        if not past.was_applied:
            return Outcome(event, "FAILED", error=past.error)
        if event.participant_id is not None and self._frame.rules.reads_groups:
            world.memberships[event.participant_id] = self._memberships(event.participant_id)
        mark = world.mark()
        try:
            outcome = apply_event(world, self._frame.rules, event, past.processed_at)
        except Exception as error:
            # As in a real drain: an event that can't be processed fails, and holds up no others.
            world.undo(mark)
            return Outcome(event, "FAILED", error=f"processing failed: {type(error).__name__}")
        return outcome or Outcome(event, "FAILED", error="not everything is loaded")

    def _memberships(self, participant_id: UUID) -> list[Membership]:
        stage = self._stage
        found = in_force(stage.belongings.get(participant_id, ()), stage.entities, self._at)
        return [Membership(self._world.groups[belonging.group_id], belonging.role) for belonging in found]

    # --- what others did ---------------------------------------------------------------------------------------------

    def _go_to(self, place: Place) -> None:
        """Do again everything that others did before this place, and what fell due by then."""
        while self._operations and place.is_after(self._operations[0].at, self._operations[0].sequence):
            self._do_again(self._operations.pop(0))
        touched = set()
        while self._changes and self._changes[0].at <= place.at:
            touched.add(self._change(self._changes.pop(0)))
        self._admit(place.at)
        self._keep_up(place.at, touched)
        self._dues.book(place)
        self._at = place.at

    def _repeat(self, past: PastEvent) -> None:
        """Do again what an event did that is left out."""
        for operation in self._operations_of.get(past.event.id, ()):
            self._do_again(operation)
        touched = {self._change(change) for change in self._changes_of.get(past.event.id, ())}
        self._keep_up(self._at, touched)
        if past.is_completed:
            for rule_id, asset_id, amount in issues_of(past.evaluations):
                self._charge(rule_id, asset_id, amount, past.processed_at)

    def _charge(self, rule_id: UUID, asset_id: UUID, amount: Decimal, now: datetime) -> None:
        """Charge a rule's budget, if it has one, with what it really issued, as far as that goes."""
        for budget in self._budgets:
            if (budget.rule_id, budget.asset_id) == (rule_id, asset_id):
                room = max(ZERO, EXACT.subtract(budget.maximum, budget.consumed_at(now)))
                self._world.budgets.consume(rule_id, asset_id, min(amount, room), now)

    def _do_again(self, operation: Operation) -> None:
        self._admit(operation.at)
        entity = self._stage.entities[operation.entity_id]
        if entity.kind == "PROGRAM":
            self._repeater.move(operation)
            return
        self._dues.book(Place(operation.at, operation.sequence), only=entity.id)
        has_lots = self._frame.assets[operation.asset_id].has_lots
        position = Position(entity.kind, entity.id, operation.asset_id, has_lots)
        self._repeater.operate(operation, position)
        self._dues.notice()

    def _change(self, change: StateChange) -> UUID:
        self._admit(change.at)
        kind = self._stage.entities[change.entity_id].kind
        holder = played_holder(self._world, kind, change.entity_id)
        if holder is not None:
            repeat_change(holder, change)
        return change.entity_id

    def _keep_up(self, at: datetime, touched: Collection[UUID]) -> None:
        """Let views show what others have changed, and statuses be those of the instant."""
        world = self._world
        for entity_id in {*self._changing, *touched}:
            entity = self._stage.entities[entity_id]
            holder = played_holder(world, entity.kind, entity_id)
            if holder is None:
                continue
            status = "ACTIVE" if holder is world.program else entity.status_at(at)
            if status != holder.status or entity_id in touched:
                holder.status = status
                holder.open_view(at)
        for asset_id, archived_at in self._frame.archived_at.items():
            if archived_at <= at:
                world.assets[asset_id] = replace(world.assets[asset_id], is_archived=True)


def _by_event(items: Iterable[Item], event_ids: Collection[UUID]) -> dict[UUID, list[Item]]:
    """Those items that these events did, by the event."""
    found: dict[UUID, list[Item]] = {}
    for item in items:
        if item.event_id is not None and item.event_id in event_ids:
            found.setdefault(item.event_id, []).append(item)
    return found


def _known_part(batches: Sequence[PastBatch], meanwhile: Meanwhile) -> tuple[list[PastBatch], Place]:
    """The batches before which everything is known that others did, and the place that can be reached."""
    known = list(batches)
    ends: list[Place] = []
    if meanwhile.known_to is not None:
        sequence, at = meanwhile.known_to
        known = [batch for batch in known if not batch.place.is_after(at, sequence)]
        ends.append(Place(at, sequence + 1))
    if meanwhile.known_until is not None:
        known = [batch for batch in known if batch.at < meanwhile.known_until]
        ends.append(Place(meanwhile.known_until - JUST_BEFORE))
    if known:
        return known, known[-1].end
    return [], min(ends, key=lambda place: place.at)


def played_holder(world: World, kind: Kind, entity_id: UUID) -> Holder | None:
    """The entity in this world; None while it doesn't exist there."""
    if kind == "PROGRAM":
        return world.programs.get(entity_id)
    return (world.groups if kind == "GROUP" else world.participants).get(entity_id)


def _ids(references: Iterable[Reference], kind: Kind) -> set[UUID]:
    return {r.id for r in references if r.id is not None and r.kind == kind}
