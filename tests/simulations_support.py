"""Simulations driven through the domain, without Temporal, and what is compared of them."""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any
from uuid import UUID

from db import json
from db.session import Database
from db.tables import Simulation
from domain.events.engine import Outcome
from domain.simulations import records
from domain.simulations.batches import advance
from domain.simulations.past import PastEvent
from domain.simulations.records import SimulationRequest
from domain.simulations.rule_sets import Asked

LONG_AGO = datetime(2000, 1, 1, tzinfo=UTC)
FAR_AHEAD = datetime(2100, 1, 1, tzinfo=UTC)

# What every attempt at an event makes anew.
_OWN = frozenset({"id", "rule_history_id", "created_at", "journal_entry_id", "hold_id", "automation_id"})


@dataclass
class Simulated:
    """A simulation that has been carried to its end: its row, and each event with its simulated outcome."""

    record: Simulation
    played: Sequence[tuple[PastEvent, Outcome]]

    @property
    def results(self) -> dict[str, Any]:
        """The figures."""
        return self.record.results

    def differences(self) -> list[str]:
        """The events whose simulated outcome isn't what really became of them."""
        found = []
        for past, outcome in self.played:
            simulated = (outcome.verdict == "COMPLETED", outcome.error, plain(outcome.evaluations))
            actual = (past.is_completed, past.error, plain(past.evaluations))
            if simulated != actual:
                found.append(f"{past.event.data}:\n  simulated {simulated}\n  actual    {actual}")
        return found


async def make_simulation(
    database: Database,
    organization_id: UUID,
    program_id: UUID,
    rules: Asked = None,
    *,
    since: datetime = LONG_AGO,
    until: datetime = FAR_AHEAD,
    participant_filter: str | None = None,
) -> UUID:
    """A simulation that nobody carries yet; its id."""
    request = SimulationRequest(program_id, rules, since, until, participant_filter)
    async with database.transaction(organization_id) as tx:
        return (await records.create(tx, request)).id


async def carry(database: Database, organization_id: UUID, simulation_id: UUID) -> list[tuple[PastEvent, Outcome]]:
    """Carry a simulation to its end, batch by batch; what was played."""
    played: list[tuple[PastEvent, Outcome]] = []
    while True:
        try:
            async with database.transaction(organization_id) as tx:
                done = await advance(tx, simulation_id)
        except records.Ended:
            continue
        assert done is not None
        played += done.played
        if done.status not in records.OPEN:
            return played


async def simulate(
    database: Database, organization_id: UUID, program_id: UUID, rules: Asked = None, **fields: Any
) -> Simulated:
    """Make a simulation and carry it to its end."""
    simulation_id = await make_simulation(database, organization_id, program_id, rules, **fields)
    played = await carry(database, organization_id, simulation_id)
    async with database.transaction(organization_id) as tx:
        record = await records.get(tx, program_id, simulation_id)
    return Simulated(record, played)


def plain(evaluations: Any) -> Any:
    """Evaluation records as JSON, without what every attempt makes anew."""
    return _plain(json.loads(json.dumps(evaluations)))


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        # The id of a target stays: it is known by its type.
        return {
            name: _plain(part) for name, part in value.items() if name not in _OWN or (name == "id" and "type" in value)
        }
    return [_plain(part) for part in value] if isinstance(value, list) else value
