"""Simulations of the batch workload's events: the rules as they are, and with one more that takes what they issue.

Rules that only issue need no balances; as soon as one takes from an asset, what everybody has of it is carried along
and what others did to it is done again, which is what the second figure shows.
"""

import time
from collections.abc import Iterator
from typing import Any

from benchmarks.case import Bench, Case, Figure, Wrong
from benchmarks.load import middle

LIMIT_S = 600.0
POLL_S = 0.05


def run(bench: Bench) -> Iterator[Figure]:
    """Yield events per second of both simulations, from the request until they are COMPLETED."""
    program = bench.programs["batch"]
    stored = bench.rest.get(f"/v1/rules?program_id={program.id}&status=ACTIVE&limit=200")["data"]
    debit = {
        "name": "Fee",
        "condition": 'event.type == "purchase"',
        "actions": [{"type": "DEBIT", "asset_id": str(program.asset_ids[0]), "amount": "0.01", "allow_negative": True}],
    }
    rule_sets: dict[str, Any] = {
        "simulated_events_per_s": None,
        "simulated_events_with_balances_per_s": [*({"rule_id": rule["id"]} for rule in stored), debit],
    }
    for name, rules in rule_sets.items():
        rates = [_simulate(bench, rules) for _ in range(bench.sizes.repetitions)]
        yield Figure(name, middle(rates), "/s", tuple(rates))


def _simulate(bench: Bench, rules: Any) -> float:
    """Simulated events per second. Raises Wrong when rules as they are do anything else than they did."""
    path = f"/v1/programs/{bench.programs['batch'].id}/simulations"
    body = {"from": "2000-01-01T00:00:00Z", "to": "2100-01-01T00:00:00Z", "rules": rules}
    started = time.perf_counter()
    simulation = bench.rest.post(path, body)
    while simulation["status"] in ("PENDING", "RUNNING"):
        if time.perf_counter() - started > LIMIT_S:
            raise Wrong(f"the simulation was not done within {LIMIT_S:.0f} s")
        time.sleep(POLL_S)
        simulation = bench.rest.get(f"{path}/{simulation['id']}")
    elapsed_s = time.perf_counter() - started
    if simulation["status"] != "COMPLETED":
        raise Wrong(f"the simulation is {simulation['status']}: {simulation.get('error')}")
    if rules is None and any(rule["simulated"] != rule["actual"] for rule in simulation["rules"]):
        raise Wrong("the rules as they are did not do what they really did")
    return float(simulation["progress"]["events_total"]) / elapsed_s


CASE = Case(
    "simulation",
    "Simulations of past events",
    ("simulated_events_per_s", "simulated_events_with_balances_per_s"),
    run,
    after=("batch",),
    is_full=True,
)
