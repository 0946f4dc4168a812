"""One batch of a simulation in one transaction: read, play, count, keep.

Two attempts never overlap; the simulation's cursor moves in the transaction that keeps what the batch has made of the
holders, so that a crash leaves whole batches behind. Nothing else is written.
"""

from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import datetime
from threading import Lock
from uuid import UUID

from db import json
from db.session import Database, Transaction
from db.tables import Simulation
from domain import faults, limits
from domain.events.engine import Outcome
from domain.events.loading import load_state
from domain.events.state import Holder
from domain.rules.budgets import Budget
from domain.rules.cel import (
    Activation,
    EvaluationError,
    Expression,
    compile_expression,
    evaluate_condition,
)
from domain.rules.compiled import Keys, RuleSet
from domain.simulations import records
from domain.simulations.entities import Frame, read_assets, read_participants
from domain.simulations.past import PastBatch, PastEvent, read_past
from domain.simulations.stage import Played, Stage
from domain.simulations.tallies import Tallies

RULE_BYTES_CACHED = 2 * limits.SIMULATION_RULES_BYTES
"""What the kept rules were saved as, about a twelfth of the memory that they take."""


@dataclass(frozen=True, slots=True)
class Advance:
    """How a simulation stands after a batch. `played` are the events that were simulated in it, with their outcomes."""

    status: records.Status
    events_done: int
    events_total: int
    error: str | None = None
    played: Sequence[tuple[PastEvent, Outcome]] = ()


@dataclass(frozen=True, slots=True)
class _Rules:
    """The rules of a simulation, compiled, and their budgets; their size as they were saved."""

    compiled: RuleSet
    budgets: list[Budget]
    size: int


_cache: OrderedDict[UUID, _Rules] = OrderedDict()
_cache_lock = Lock()

_EXCLUDED = """
select entity_id, is_included from simulation_holder
where organization_id = %s and simulation_id = %s and entity_id = any(%s) and is_included is not null
"""

_DECIDE = """
insert into simulation_holder (organization_id, simulation_id, entity_id, is_included)
select %(organization_id)s, %(simulation_id)s, r.id, r.is_included
from json_to_recordset(%(rows)s::json) as r (id uuid, is_included boolean)
on conflict (organization_id, simulation_id, entity_id) do update set is_included = excluded.is_included
"""


async def advance(tx: Transaction, simulation_id: UUID, progress: Callable[[], None] = lambda: None) -> Advance | None:
    """Simulate the next batch, or find that the simulation has ended; None where there is none.

    `progress` is called after each event. Raises TooMuchToSimulate for what can't be simulated, Ended when it was
    cancelled meanwhile, and what the database raises.
    """
    simulation = await records.take(tx, simulation_id)
    if simulation is None:
        return None
    if simulation.status not in records.OPEN:
        return _standing(simulation)
    if simulation.status == "PENDING":
        await records.begin(tx, simulation)
    after = (simulation.last_processed_at or simulation.starts_at, simulation.last_seq or 0)
    batches = await read_past(tx, simulation.program_id, after, simulation.ends_at)
    if not batches:
        await records.end(tx, simulation_id, "COMPLETED")
        simulation.status = "COMPLETED"
        return _standing(simulation)
    rules = _known_rules(simulation_id) or _compile(simulation, progress)
    frame = await _frame(tx, simulation, rules.compiled)
    left_out = await _left_out(tx, simulation, batches)
    stage = Stage(tx, frame, rules.budgets, batches, left_out)
    played = await stage.play(progress)
    await stage.save(played)
    _count(simulation, played)
    await faults.reach("simulation.played")
    await records.save(tx, simulation, "status", "results", "events_done", "last_processed_at", "last_seq", "starts")
    await faults.reach("simulation.written")
    return _standing(simulation, played)


def _standing(simulation: Simulation, played: Played | None = None) -> Advance:
    status: records.Status = simulation.status  # type: ignore[assignment]
    outcomes = played.outcomes if played is not None else ()
    return Advance(status, simulation.events_done, simulation.events_total, simulation.error, outcomes)


async def learn_rules(
    database: Database, organization_id: UUID, simulation_id: UUID, progress: Callable[[], None]
) -> None:
    """Compile the rules of a simulation; `progress` is called after each.

    To be called outside any transaction before `advance`: compiling rules at their limits takes long.
    """
    if _known_rules(simulation_id) is not None:
        return
    async with database.transaction(organization_id) as tx:
        simulation = await records.look_up(tx, simulation_id)
    if simulation is not None and simulation.status in records.OPEN:
        _compile(simulation, progress)


def _known_rules(simulation_id: UUID) -> _Rules | None:
    with _cache_lock:
        return _cache.get(simulation_id)


def _compile(simulation: Simulation, progress: Callable[[], None]) -> _Rules:
    """The compiled rules, which are kept per process for the simulations that were carried on last."""
    rules = []
    budgets: list[Budget] = []
    for planned in records.planned_rules(simulation):
        if planned.status == "ACTIVE" and (rule := planned.compiled()) is not None:
            rules.append(rule)
            budgets += planned.budgets
        progress()
    compiled = RuleSet(simulation.program_id, 0, rules, {budget.rule_id for budget in budgets})
    made = _Rules(compiled, budgets, len(json.dumps(simulation.rules)))
    with _cache_lock:
        _cache[simulation.id] = made
        total = sum(kept.size for kept in _cache.values())
        while total > RULE_BYTES_CACHED and len(_cache) > 1:
            total -= _cache.popitem(last=False)[1].size
    return made


async def _frame(tx: Transaction, simulation: Simulation, rules: RuleSet) -> Frame:
    assets, archived_at = await read_assets(tx, simulation.program_id, rules.asset_ids)
    program = await tx.row(
        "select on_unknown_participant from program where organization_id = %s and id = %s",
        (tx.organization_id, simulation.program_id),
    )
    assert program is not None, "a simulation has a program"
    assert simulation.sequence_before is not None, "it has begun"
    return Frame(
        simulation_id=simulation.id,
        program_id=simulation.program_id,
        creates_unknown=program["on_unknown_participant"] == "CREATE",
        starts_at=simulation.starts_at,
        sequence_before=simulation.sequence_before,
        has_filter=simulation.participant_filter is not None,
        rules=rules,
        assets=assets,
        archived_at=archived_at,
        followed=frozenset(asset_id for asset_id, _ in rules.taking if asset_id in assets),
        wallets=frozenset(asset.id for asset in assets.values() if asset.is_prefunded),
    )


# --- the filter ------------------------------------------------------------------------------------------------------


async def _left_out(tx: Transaction, simulation: Simulation, batches: Sequence[PastBatch]) -> set[UUID]:
    """The events whose participants the filter leaves out. Who takes part is decided once, by the state of today."""
    if simulation.participant_filter is None:
        return set()
    events = [past.event for batch in batches for past in batch.events]
    ids = {event.participant_id for event in events if event.participant_id is not None}
    rows = await tx.execute(_EXCLUDED, (tx.organization_id, simulation.id, list(ids)))
    decided: dict[UUID, bool] = dict(await rows.fetchall())
    undecided = ids - decided.keys()
    if undecided:
        decided |= await _decide(tx, simulation, simulation.participant_filter, undecided)
    return {e.id for e in events if e.participant_id is None or not decided[e.participant_id]}


async def _decide(tx: Transaction, simulation: Simulation, source: str, ids: set[UUID]) -> dict[UUID, bool]:
    expression = compile_expression(source)
    holders = [
        Holder("PARTICIPANT", entity.id, entity.external_id, entity.status)
        for entity in await read_participants(tx, ids, ())
    ]
    await load_state(tx, holders, Keys.of(expression.references, "participant", ()))
    decided = dict.fromkeys(ids, False)
    for holder in holders:
        holder.open_view(simulation.created_at)
        decided[holder.id] = _admits(expression, holder, simulation.created_at)
    params = {
        "organization_id": tx.organization_id,
        "simulation_id": simulation.id,
        "rows": json.parameter([{"id": id_, "is_included": included} for id_, included in decided.items()]),
    }
    await tx.execute(_DECIDE, params)
    return decided


def _admits(expression: Expression, holder: Holder, now: datetime) -> bool:
    activation = Activation(event={}, participant=holder.view, program={}, groups=[], group=None, now=now)
    try:
        return evaluate_condition(expression, activation)
    except EvaluationError:
        return False


# --- the figures -----------------------------------------------------------------------------------------------------


def _count(simulation: Simulation, played: Played) -> None:
    """Add what was played to the figures, and move the cursor behind it."""
    results = simulation.results
    simulated, actual = Tallies.read(results.get("simulated")), Tallies.read(results.get("actual"))
    for past, outcome in played.outcomes:
        simulated.count(outcome.evaluations, is_completed=outcome.verdict == "COMPLETED")
        actual.count(past.evaluations, is_completed=past.is_completed)
    events = sum(len(batch.events) for batch in played.batches)
    simulation.results = {
        "simulated": simulated.document(),
        "actual": actual.document(),
        "left_out": int(results.get("left_out", 0)) + events - len(played.outcomes),
        "incomplete": int(results.get("incomplete", 0)) + played.repeater.incomplete,
    }
    simulation.events_done = int(simulation.events_done) + events
    simulation.starts = 0
    if played.batches:
        last = played.batches[-1]
        simulation.last_processed_at, simulation.last_seq = last.at, last.last_seq
