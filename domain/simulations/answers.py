"""What a simulation has to say so far: per rule, what it would have done beside what it really did."""

from collections.abc import Iterable
from dataclasses import dataclass
from uuid import UUID

from db.session import Transaction
from db.tables import Simulation
from domain.simulations.records import planned_rules
from domain.simulations.tallies import Tallies, Tally


@dataclass(frozen=True, slots=True)
class RuleFigures:
    """A rule of the simulation, or one that really matched and isn't part of it: `runs` says whether it is evaluated.

    `rule_id` and `order` are None for a draft, and for a rule that isn't part of it, respectively.
    """

    rule_id: UUID | None
    name: str
    order: int | None
    is_changed: bool
    runs: bool
    simulated: Tally
    actual: Tally


@dataclass(frozen=True, slots=True)
class Figures:
    """Everything that was counted. `left_out` are the events of participants whom the filter leaves out."""

    rules: list[RuleFigures]
    simulated: Tallies
    actual: Tallies
    left_out: int
    notes: list[str]


async def read_figures(tx: Transaction, simulation: Simulation) -> Figures:
    """The figures of a simulation so far."""
    results = simulation.results
    simulated, actual = Tallies.read(results.get("simulated")), Tallies.read(results.get("actual"))
    planned = planned_rules(simulation)
    rules = [
        RuleFigures(
            rule.rule_id,
            rule.name,
            rule.order,
            rule.is_changed,
            rule.status == "ACTIVE",
            simulated.rules.get(str(rule.id), Tally()),
            actual.rules.get(str(rule.id), Tally()),
        )
        for rule in planned
    ]
    others = [UUID(rule_id) for rule_id in actual.rules.keys() - {str(rule.id) for rule in planned}]
    for rule_id, name in await _names(tx, others):
        rules.append(RuleFigures(rule_id, name, None, False, False, Tally(), actual.rules[str(rule_id)]))
    notes = list(_notes(simulation, int(results.get("incomplete", 0)), simulated))
    return Figures(rules, simulated, actual, int(results.get("left_out", 0)), notes)


async def _names(tx: Transaction, rule_ids: Iterable[UUID]) -> list[tuple[UUID, str]]:
    rows = await tx.execute(
        "select id, name from rule where organization_id = %s and id = any(%s) order by rule_order, id",
        (tx.organization_id, list(rule_ids)),
    )
    return [(rule_id, name) for rule_id, name in await rows.fetchall()]


def _notes(simulation: Simulation, incomplete: int, simulated: Tallies) -> Iterable[str]:
    """What to bear in mind with these figures."""
    if simulation.basis == "STATE_AT_FROM":
        yield (
            "Events were processed before `from`: balances, lots, holds and budgets begin as the ledger has them at"
            " that instant, tags, counters and attributes as far as the state history tells them."
        )
    if incomplete:
        yield (
            f"{incomplete} operations of others (API calls, other programs) found less in the simulated balances than"
            " they really moved, and were done as far as it went."
        )
    if any(tally.scheduled_events or tally.broadcasts for tally in simulated.rules.values()):
        yield (
            "Scheduled events and broadcasts are counted, not run; those that really happened are simulated where they"
            " happened."
        )
