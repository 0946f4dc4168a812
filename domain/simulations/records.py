"""The row of a simulation: made by a call, begun and carried on by its workflow, ended once.

PENDING until it begins, RUNNING until it is COMPLETED, FAILED or CANCELED; what has ended stays as it is, but for the
holders that it leaves behind, which are cleared away then. Contract: README.md "Simulations".
"""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Literal
from uuid import UUID

from sqlalchemy import update
from sqlmodel import col, select

from db import json
from db.session import Database, Transaction
from db.tables import Simulation
from domain import eligibility, limits, programs
from domain.clock import format_timestamp
from domain.errors import Refusal, bad_field, not_found
from domain.ids import new_id
from domain.ledger.moments import sequence_before
from domain.pagination import Page, PageRequest, paginate
from domain.simulations.past import count_past, has_earlier
from domain.simulations.rule_sets import Asked, PlannedRule, plan

Status = Literal["PENDING", "RUNNING", "COMPLETED", "FAILED", "CANCELED"]
Basis = Literal["BEGINNING", "STATE_AT_FROM"]

OPEN: tuple[Status, ...] = ("PENDING", "RUNNING")
"""A simulation that goes on."""

_CLEAR = """
delete from simulation_holder h using (
    select entity_id from simulation_holder
    where organization_id = %(organization_id)s and simulation_id = %(id)s order by entity_id limit %(limit)s) g
where h.organization_id = %(organization_id)s and h.simulation_id = %(id)s and h.entity_id = g.entity_id
"""


@dataclass(frozen=True, slots=True)
class SimulationRequest:
    """What is to be simulated. Both instants are inclusive and are about when events were processed.

    `participant_filter` is CEL over the participant and `now`, the time of the request.
    """

    program_id: UUID
    rules: Asked
    starts_at: datetime
    ends_at: datetime
    participant_filter: str | None = None


class Ended(Exception):
    """The simulation was cancelled while a batch was in work, which is to be rolled back."""


@dataclass(frozen=True, slots=True)
class CarriedSimulation:
    """A simulation as the one who starts its workflow has to know it."""

    organization_id: UUID
    id: UUID
    program_id: UUID


async def create(tx: Transaction, request: SimulationRequest) -> Simulation:
    """Make a simulation, which its workflow has then to carry out.

    Raises Refusal: `not_found` for the program, 400 for the range or the filter, 409 `conflict` where too many are
    open, and those of `rule_sets.plan`.
    """
    await programs.get(tx, request.program_id)
    if request.ends_at < request.starts_at:
        raise bad_field(
            "to", "must not be before from", expected="timestamp", received=format_timestamp(request.ends_at)
        )
    if request.participant_filter is not None:
        await eligibility.check(request.participant_filter, "participant_filter")
    rules = await plan(tx, request.program_id, request.rules, request.starts_at)
    documents = [rule.document() for rule in rules]
    if len(json.dumps(documents)) > limits.SIMULATION_RULES_BYTES:
        message = f"the rules have more than {limits.SIMULATION_RULES_BYTES // 1024**2} MiB together"
        raise bad_field("rules", message, expected="fewer or smaller rules")
    await _require_room(tx)
    basis: Basis = "BEGINNING"
    if await has_earlier(tx, request.program_id, request.starts_at):
        basis = "STATE_AT_FROM"
    simulation = Simulation(
        organization_id=tx.organization_id,
        id=new_id(),
        program_id=request.program_id,
        status="PENDING",
        rules=documents,
        starts_at=request.starts_at,
        # Nothing of what happens from now on belongs to it.
        ends_at=max(request.starts_at, min(request.ends_at, tx.now)),
        participant_filter=request.participant_filter,
        basis=basis,
        events_total=0,
        events_done=0,
        starts=0,
        results={},
        api_key_id=tx.api_key_id,
        created_at=tx.now,
        updated_at=tx.now,
    )
    await tx.insert(simulation)
    return await get(tx, request.program_id, simulation.id)


async def get(tx: Transaction, program_id: UUID, simulation_id: UUID) -> Simulation:
    """The simulation. Raises Refusal `not_found`, also for one of another program."""
    found = await tx.first(
        select(Simulation).where(
            Simulation.organization_id == tx.organization_id,
            Simulation.program_id == program_id,
            Simulation.id == simulation_id,
        )
    )
    if found is None:
        raise not_found("simulation")
    return found


async def find(tx: Transaction, program_id: UUID, page: PageRequest, status: Status | None) -> Page[Simulation]:
    """A page of the program's simulations, the newest first. Raises Refusal `not_found` for the program."""
    await programs.get(tx, program_id)
    statement = select(Simulation).where(
        Simulation.organization_id == tx.organization_id, Simulation.program_id == program_id
    )
    if status is not None:
        statement = statement.where(Simulation.status == status)
    return await paginate(tx, statement, keys=(col(Simulation.created_at), col(Simulation.id)), page=page)


async def cancel(tx: Transaction, simulation_id: UUID) -> None:
    """Cancel the simulation: the batch that may be in work is undone. One that has ended is left as it is."""
    await end(tx, simulation_id, "CANCELED")


async def take(tx: Transaction, simulation_id: UUID) -> Simulation | None:
    """The simulation, which no other batch works on until the transaction ends; None where there is none.

    Its row is free meanwhile, so that whoever cancels it doesn't wait.
    """
    await tx.execute("select pg_advisory_xact_lock(hashtextextended(%s, 0))", (f"simulation:{simulation_id}",))
    return await look_up(tx, simulation_id)


async def look_up(tx: Transaction, simulation_id: UUID) -> Simulation | None:
    """The simulation; None where there is none."""
    return await tx.first(
        select(Simulation).where(Simulation.organization_id == tx.organization_id, Simulation.id == simulation_id)
    )


async def wait_for_batches(tx: Transaction, simulation_id: UUID) -> None:
    """Wait until the batches of real events that had begun when the simulation was made are over.

    What is in its range has been committed then. Nothing is kept from being processed but for an instant.
    """
    await tx.execute(
        "select pg_advisory_xact_lock(hashtextextended(program_id::text, 0)) from simulation"
        " where organization_id = %s and id = %s and status = 'PENDING'",
        (tx.organization_id, simulation_id),
    )


async def begin(tx: Transaction, simulation: Simulation) -> None:
    """Let a simulation, which was taken, begin: count its events, fix where the ledger stood before them.

    Raises Ended.
    """
    simulation.status = "RUNNING"
    simulation.sequence_before = await sequence_before(tx, simulation.starts_at)
    simulation.events_total = await count_past(tx, simulation.program_id, simulation.starts_at, simulation.ends_at)
    await save(tx, simulation, "status", "sequence_before", "events_total")


async def save(tx: Transaction, simulation: Simulation, *columns: str) -> None:
    """Write these columns of a simulation, which was taken. Raises Ended."""
    values: dict[str, Any] = {column: getattr(simulation, column) for column in columns}
    saved = await tx.run(
        update(Simulation)
        .where(
            col(Simulation.organization_id) == tx.organization_id,
            col(Simulation.id) == simulation.id,
            col(Simulation.status).in_(OPEN),
        )
        .values(**values, updated_at=tx.now)
    )
    if saved == 0:
        raise Ended


async def end(tx: Transaction, simulation_id: UUID, status: Status, error: str | None = None) -> None:
    """Let the simulation end as `status`, unless it has ended already."""
    await tx.run(
        update(Simulation)
        .where(
            col(Simulation.organization_id) == tx.organization_id,
            col(Simulation.id) == simulation_id,
            col(Simulation.status).in_(OPEN),
        )
        .values(status=status, error=error, updated_at=tx.now, finished_at=tx.now)
    )


async def note_start(tx: Transaction, simulation_id: UUID, change: int) -> int:
    """Count that the simulation is about to be tried again after a loss (+1), or that it was none (-1); the count.

    A batch that commits sets it back. 0 for one that doesn't exist.
    """
    cursor = await tx.execute(
        "update simulation set starts = greatest(starts + %s, 0) where organization_id = %s and id = %s"
        " returning starts",
        (change, tx.organization_id, simulation_id),
    )
    row = await cursor.fetchone()
    return 0 if row is None else int(row[0])


async def clear(tx: Transaction, simulation_id: UUID, limit: int = limits.SIMULATED_HOLDERS_CLEARED) -> bool:
    """Clear away up to `limit` of the holders of a simulation that has ended; whether there were so many."""
    params = {"organization_id": tx.organization_id, "id": simulation_id, "limit": limit}
    return (await tx.execute(_CLEAR, params)).rowcount == limit


async def open_simulations(database: Database, limit: int = limits.SIMULATIONS_PER_LOOK) -> list[CarriedSimulation]:
    """The simulations of all organizations that a workflow has to carry, the oldest first.

    Raises DatabaseUnavailable.
    """
    rows = await database.system_rows("select organization_id, id, program_id from open_simulations(%s)", (limit,))
    return [CarriedSimulation(*row) for row in rows]


def planned_rules(simulation: Simulation) -> Sequence[PlannedRule]:
    """The rules of the simulation, in their order."""
    return [PlannedRule.read(document) for document in simulation.rules]


async def _require_room(tx: Transaction) -> None:
    # Whoever comes at the same time waits here and then sees this one.
    await tx.execute("select pg_advisory_xact_lock(hashtextextended(%s, 0))", (f"simulations:{tx.organization_id}",))
    row = await tx.row(
        "select count(*) as open from simulation where organization_id = %s and status = any(%s)",
        (tx.organization_id, list(OPEN)),
    )
    assert row is not None
    if row["open"] >= limits.SIMULATIONS_AT_ONCE:
        message = f"an organization has at most {limits.SIMULATIONS_AT_ONCE} simulations at once: cancel one, or wait"
        raise Refusal("conflict", message)
