"""What holders had when the range of a simulation begins.

State is what it is now with every change since undone. Balances, lots and holds are what the ledger's entries up to
then explain, and what budgets had consumed is what their rules had credited. Only what these histories tell is known:
the window of a counter, for one, is taken as it is configured now.
"""

from collections.abc import Collection, Sequence
from dataclasses import replace
from datetime import datetime, timedelta
from decimal import Decimal
from typing import Any, cast
from uuid import UUID

from db.session import Transaction
from domain import limits
from domain.cron import Cron, parse_cron
from domain.durations import parse_duration
from domain.events.loading import load_state
from domain.events.state import CounterState, Holder
from domain.ledger.books import Bucket
from domain.ledger.holdings import HOLD_COLUMNS, LOT_COLUMNS
from domain.ledger.holds import Hold
from domain.ledger.lots import Lot
from domain.ledger.moments import Position, marks, sequence_before
from domain.money import ZERO
from domain.rules.budgets import Budget
from domain.rules.compiled import Keys
from domain.simulations.entities import Entity, Frame
from domain.simulations.holders import Reservation, ReservedPart, Snapshot

JUST_BEFORE = timedelta(microseconds=1)
_LONGEST_PERIOD = timedelta(days=9 * 366)


class TooMuchToSimulate(Exception):
    """A holder has more than a simulation can carry from batch to batch. The text is for people."""


async def read_beginnings(tx: Transaction, frame: Frame, entities: Collection[Entity]) -> dict[UUID, Snapshot]:
    """What these entities had at the start of the range, by id; of the own program without its budgets.

    Raises TooMuchToSimulate.
    """
    found = {
        entity.id: Snapshot(entity.kind, exists_from=entity.created_at, seen_at=frame.starts_at - JUST_BEFORE)
        for entity in entities
    }
    # Whoever came later began with nothing; what others did to them is part of the range.
    there_before = {entity.id: entity for entity in entities if entity.created_at < frame.starts_at}
    if there_before:
        await _read_state(tx, frame, there_before, found)
        await _read_balances(tx, frame, there_before, found)
        holders = [entity.id for entity in there_before.values() if entity.kind != "PROGRAM"]
        if holders and frame.followed:
            await _read_lots(tx, frame, holders, found)
            await _read_holds(tx, frame, holders, found)
    return found


# --- state -----------------------------------------------------------------------------------------------------------

# The first change since then says what it was before; keys that haven't changed are as they are now.
_FIRST_CHANGES = """
select distinct on (entity_id, state_type, key) entity_id, state_type, key, old_value
from state_history
where organization_id = %s and entity_id = any(%s) and changed_at >= %s
  and state_type in ('tag', 'counter', 'attribute')
order by entity_id, state_type, key, changed_at, id
"""

# What began a counter's window: it was made, set by a call, or reset by itself.
_WINDOW_BEGINNINGS = """
select w.entity_id, w.key, h.changed_at
from unnest(%s::uuid[], %s::text[]) as w (entity_id, key)
cross join lateral (
    select changed_at from state_history
    where organization_id = %s and entity_id = w.entity_id and changed_at < %s and state_type = 'counter'
      and key = w.key and (operation = 'auto_reset' or old_value is null or event_id is null)
    order by changed_at desc, id desc limit 1
) h
"""


async def _read_state(tx: Transaction, frame: Frame, entities: dict[UUID, Entity], found: dict[UUID, Snapshot]) -> None:
    holders = {entity.id: Holder(entity.kind, entity.id) for entity in entities.values() if _has_state(frame, entity)}
    for kind, keys in frame.rules.keys.items():
        await load_state(tx, [holder for holder in holders.values() if holder.entity_type == kind], keys)
    rows = await tx.execute(_FIRST_CHANGES, (tx.organization_id, list(holders), frame.starts_at))
    for entity_id, state_type, key, old_value in await rows.fetchall():
        holder = holders[entity_id]
        if is_reachable(frame.rules.keys[holder.entity_type], state_type, key):
            _undo(holder, state_type, key, old_value, frame.starts_at)
    await _correct_windows(tx, frame, list(holders.values()))
    for holder in holders.values():
        snapshot = found[holder.id]
        snapshot.tags, snapshot.counters, snapshot.attributes = holder.tags, holder.counters, holder.attributes


def _has_state(frame: Frame, entity: Entity) -> bool:
    return entity.kind != "PROGRAM" or frame.rules.uses_program_state


def is_reachable(keys: Keys, state_type: str, key: str) -> bool:
    """Whether rules can read or write this tag, counter or attribute."""
    if state_type == "tag":
        return keys.tags
    reachable = keys.counters if state_type == "counter" else keys.attributes
    return reachable is None or key in reachable


def _undo(holder: Holder, state_type: str, key: str, old_value: str | None, starts_at: datetime) -> None:
    if state_type == "tag":
        if old_value is None:
            holder.tags.discard(key)
        else:
            holder.tags.add(key)
    elif state_type == "attribute":
        holder.attributes.pop(key, None)
        if old_value is not None:
            holder.attributes[key] = old_value
    else:
        now = holder.counters.pop(key, None)
        if old_value is not None:
            window = now.reset_after if now else None
            holder.counters[key] = CounterState(Decimal(old_value), window, now.last_reset_at if now else starts_at)


async def _correct_windows(tx: Transaction, frame: Frame, holders: Sequence[Holder]) -> None:
    """Let windows that have begun anew since then begin where they did before."""
    wrong = [
        (holder, key)
        for holder in holders
        for key, counter in holder.counters.items()
        if counter.reset_after is not None and counter.last_reset_at >= frame.starts_at
    ]
    if not wrong:
        return
    keys = [key for _, key in wrong]
    params = ([holder.id for holder, _ in wrong], keys, tx.organization_id, frame.starts_at)
    rows = await (await tx.execute(_WINDOW_BEGINNINGS, params)).fetchall()
    began = {(entity_id, key): changed_at for entity_id, key, changed_at in rows}
    for holder, key in wrong:
        last_reset_at = began.get((holder.id, key), frame.starts_at)
        holder.counters[key] = holder.counters[key]._replace(last_reset_at=last_reset_at)


# --- value -----------------------------------------------------------------------------------------------------------

_ACCOUNTS = """
select id, entity_id, asset_id, bucket from account
where organization_id = %s and entity_id = any(%s) and asset_id = any(%s)
"""

# The status at the time: that of the last change up to then, else the one it was made with, which is the bucket that
# the entry which made it brought value into.
_LOTS = f"""
select l.* from unnest(%(holders)s::uuid[]) as h (id)
cross join lateral (
    select {", ".join(f"lot.{column.strip()}" for column in LOT_COLUMNS.split(","))},
           lot.amount + spent.delta as then_remaining, coalesce(last.status, born.bucket) as then_status
    from lot
    cross join lateral (
        select from journal_entry e
        where e.organization_id = lot.organization_id and e.id = lot.entry_id and e.sequence <= %(sequence)s limit 1
    ) made
    cross join lateral (
        select coalesce(sum(c.delta), 0) as delta from lot_change c
        join journal_entry e on e.organization_id = c.organization_id and e.id = c.entry_id
        where c.organization_id = lot.organization_id and c.lot_id = lot.id and e.sequence <= %(sequence)s
    ) spent
    left join lateral (
        select c.status from lot_change c
        join journal_entry e on e.organization_id = c.organization_id and e.id = c.entry_id
        where c.organization_id = lot.organization_id and c.lot_id = lot.id and e.sequence <= %(sequence)s
        order by e.sequence desc, c.ordinal desc limit 1
    ) last on true
    left join lateral (
        select a.bucket from posting p join account a on a.organization_id = p.organization_id and a.id = p.account_id
        where p.organization_id = lot.organization_id and p.entry_id = lot.entry_id and p.amount > 0
          and a.entity_id = lot.entity_id and a.asset_id = lot.asset_id
        order by p.ordinal limit 1
    ) born on last.status is null
    where lot.organization_id = %(organization_id)s and lot.entity_id = h.id and lot.asset_id = any(%(assets)s)
      and lot.created_at < %(starts_at)s and lot.amount + spent.delta > 0
    order by lot.created_at, lot.id limit %(limit)s
) l
"""

# The hold that a lot lay in: the one that was opened by the last entry that brought the lot into HELD.
_HOLDS_OF_LOTS = """
select distinct on (w.id) w.id, h.id, h.kind, h.reference_id
from unnest(%(lots)s::uuid[]) as w (id)
join lot l on l.organization_id = %(organization_id)s and l.id = w.id
cross join lateral (
    select l.entry_id union
    select c.entry_id from lot_change c
    where c.organization_id = l.organization_id and c.lot_id = l.id and c.status = 'HELD'
) c
join journal_entry e on e.organization_id = l.organization_id and e.id = c.entry_id and e.sequence <= %(sequence)s
join hold h on h.organization_id = l.organization_id and h.entity_id = l.entity_id and h.asset_id = l.asset_id
           and h.entry_id = c.entry_id
order by w.id, e.sequence desc
"""

_HOLDS = f"""
select h.* from unnest(%(holders)s::uuid[]) as w (id)
cross join lateral (
    select {", ".join(f"hold.{column.strip()}" for column in HOLD_COLUMNS.split(","))},
           hold.amount + taken.delta as then_remaining
    from hold
    cross join lateral (
        select from journal_entry e
        where e.organization_id = hold.organization_id and e.id = hold.entry_id and e.sequence <= %(sequence)s limit 1
    ) made
    cross join lateral (
        select coalesce(sum(c.delta), 0) as delta from hold_change c
        join journal_entry e on e.organization_id = c.organization_id and e.id = c.entry_id
        where c.organization_id = hold.organization_id and c.hold_id = hold.id and e.sequence <= %(sequence)s
    ) taken
    where hold.organization_id = %(organization_id)s and hold.entity_id = w.id and hold.asset_id = any(%(assets)s)
      and hold.created_at < %(starts_at)s and hold.amount + taken.delta > 0
    order by hold.created_at, hold.id limit %(limit)s
) h
"""


async def _read_balances(
    tx: Transaction, frame: Frame, entities: dict[UUID, Entity], found: dict[UUID, Snapshot]
) -> None:
    assets = list(frame.followed | frame.wallets)
    if not assets:
        return
    rows = await (await tx.execute(_ACCOUNTS, (tx.organization_id, list(entities), assets))).fetchall()
    accounts = {row[0]: row[1:] for row in rows if frame.is_followed(entities[row[1]].kind, row[2])}
    at_start = await marks(tx, list(accounts), [Position(frame.sequence_before)])
    for account_id, (mark,) in at_start.items():
        entity_id, asset_id, bucket = accounts[account_id]
        found[entity_id].marks[account_id] = mark.version
        if mark.balance != ZERO:
            found[entity_id].balances[asset_id, cast(Bucket, bucket)] = mark.balance


async def _read_lots(tx: Transaction, frame: Frame, holders: Sequence[UUID], found: dict[UUID, Snapshot]) -> None:
    assets = frame.followed_lots
    if not assets:
        return
    lots: list[Lot] = []
    for row in await (await tx.execute(_LOTS, _params(tx, frame, holders, assets))).fetchall():
        remaining, status = row[-2:]
        lots.append(replace(Lot(*row[:-2]), remaining=remaining, status=status))
    _require_bounded([lot.entity_id for lot in lots], "lots")
    held = {lot.id: lot for lot in lots if lot.status == "HELD"}
    placed = await _holds_of(tx, frame, list(held))
    for lot in lots:
        lot.reference_id, lot.hold_id, lot.is_provisional = None, None, False
        if lot.id not in placed:
            found[lot.entity_id].lots.append(lot)
            continue
        hold_id, kind, reference_id = placed[lot.id]
        if kind == "REDEMPTION":
            reservation = found[lot.entity_id].reserved.setdefault(hold_id, Reservation(lot.asset_id, ZERO))
            reservation.parts.append(ReservedPart(lot.remaining, lot.program_id, lot.created_at, lot.expires_at))
            continue
        lot.reference_id, lot.hold_id, lot.is_provisional = reference_id, hold_id, kind == "PROVISIONAL"
        found[lot.entity_id].lots.append(lot)


async def _holds_of(tx: Transaction, frame: Frame, lot_ids: list[UUID]) -> dict[UUID, tuple[UUID, str, str | None]]:
    if not lot_ids:
        return {}
    params = {"organization_id": tx.organization_id, "lots": lot_ids, "sequence": frame.sequence_before}
    rows = await (await tx.execute(_HOLDS_OF_LOTS, params)).fetchall()
    return {lot_id: (hold_id, kind, reference_id) for lot_id, hold_id, kind, reference_id in rows}


async def _read_holds(tx: Transaction, frame: Frame, holders: Sequence[UUID], found: dict[UUID, Snapshot]) -> None:
    holds: list[Hold] = []
    for row in await (await tx.execute(_HOLDS, _params(tx, frame, holders, frame.followed))).fetchall():
        holds.append(replace(Hold(*row[:-1]), remaining=row[-1], status="ACTIVE"))
    _require_bounded([hold.entity_id for hold in holds], "holds")
    for hold in holds:
        if hold.kind == "REDEMPTION":
            reserved = found[hold.entity_id].reserved.setdefault(hold.id, Reservation(hold.asset_id, ZERO))
            reserved.amount = hold.remaining
        else:
            found[hold.entity_id].holds.append(hold)


def _params(tx: Transaction, frame: Frame, holders: Sequence[UUID], assets: Collection[UUID]) -> dict[str, Any]:
    return {
        "organization_id": tx.organization_id,
        "holders": list(holders),
        "assets": list(assets),
        "sequence": frame.sequence_before,
        "starts_at": frame.starts_at,
        "limit": limits.SIMULATED_LOTS + 1,
    }


def _require_bounded(holder_ids: Sequence[UUID], what: str) -> None:
    counts: dict[UUID, int] = {}
    for holder_id in holder_ids:
        counts[holder_id] = counts.get(holder_id, 0) + 1
        if counts[holder_id] > limits.SIMULATED_LOTS:
            raise TooMuchToSimulate(f"holder {holder_id} has more than {limits.SIMULATED_LOTS:,} open {what}")


# --- budgets ---------------------------------------------------------------------------------------------------------

# What left issuance or a wallet by the rule's credits; what a settle gave back comes off.
_ISSUED = """
select coalesce(-sum(p.amount), 0) from journal_entry e
cross join lateral (
    select sum(p.amount) as amount from posting p
    join account a on a.organization_id = p.organization_id and a.id = p.account_id
    where p.organization_id = e.organization_id and p.entry_id = e.id and p.asset_id = %(asset_id)s
      and a.entity_type in ('SYSTEM_ISSUANCE', 'PROGRAM')
) p
where e.organization_id = %(organization_id)s and e.rule_id = %(rule_id)s and e.action_type = 'CREDIT'
  and e.sequence > %(after)s and e.sequence <= %(until)s
"""


async def read_budgets(tx: Transaction, frame: Frame, budgets: Collection[Budget]) -> list[Budget]:
    """These budgets as they stood at the start of the range: what their rules had issued in the period until then."""
    return [await _at_start(tx, frame, budget) for budget in budgets]


async def _at_start(tx: Transaction, frame: Frame, budget: Budget) -> Budget:
    begun_at = _period_start(budget, frame.starts_at)
    consumed = ZERO
    if begun_at < frame.starts_at:
        params = {
            "organization_id": tx.organization_id,
            "rule_id": budget.rule_id,
            "asset_id": budget.asset_id,
            "after": await sequence_before(tx, begun_at),
            "until": frame.sequence_before,
        }
        row = await (await tx.execute(_ISSUED, params)).fetchone()
        assert row is not None
        consumed = max(ZERO, row[0])
    if budget.schedule_type is None:
        return replace(budget, consumed=consumed)
    # As if the period before had ended just now: then the budget itself says when this one does.
    ended = replace(budget, next_reset_at=frame.starts_at)
    return replace(budget, consumed=consumed, next_reset_at=ended.next_reset_after(frame.starts_at))


def _period_start(budget: Budget, instant: datetime) -> datetime:
    """When the period of the budget that `instant` lies in began; `instant` itself where nothing went before it."""
    if budget.starts_at >= instant:
        return instant
    if budget.interval is not None:
        interval = parse_duration(budget.interval)
        return budget.starts_at + (instant - budget.starts_at) // interval * interval
    if budget.cron_expression is not None:
        point = _last_point(parse_cron(budget.cron_expression), instant)
        return budget.starts_at if point is None else max(point, budget.starts_at)
    return budget.starts_at


def _last_point(cron: Cron, instant: datetime) -> datetime | None:
    """The schedule's last point up to `instant`; None where the years before have none."""
    back = timedelta(minutes=1)
    while back < _LONGEST_PERIOD:
        point = cron.next_after(instant - back)
        if point <= instant:
            while (following := cron.next_after(point)) <= instant:
                point = following
            return point
        back *= 4
    return None
