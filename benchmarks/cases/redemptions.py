"""Redeeming and reversing by API call, 16 clients, one organization: each call is one journal entry when answered."""

import json
from collections.abc import Iterator
from random import Random
from statistics import median
from typing import Any
from uuid import UUID, uuid4

from benchmarks.case import Bench, Case, Figure, Wrong
from benchmarks.load import Burst, BurstReport, middle, offer
from benchmarks.workload import PARTICIPANTS, BenchProgram, adjust_requests, make_program

CLIENTS = 16
REWARDS = 20


def run(bench: Bench) -> Iterator[Figure]:
    """Yield redemptions of amounts, of items of twenty rewards, and full reversals of the former, per second."""
    endpoint = bench.system.endpoint
    program = make_program(bench.rest, "redemptions")
    opening = adjust_requests(endpoint, program, bench.population, 2 * PARTICIPANTS, each_once=True)
    offer(Burst(endpoint, opening, CLIENTS, 200))
    rewards = [_reward(bench, program, number) for number in range(REWARDS)]
    count = bench.sizes.adjusts // 2
    amounts: list[BurstReport] = []
    items: list[BurstReport] = []
    reversals: list[BurstReport] = []
    for _ in range(bench.sizes.repetitions):
        before = bench.rest.entries_written()
        amounts.append(offer(Burst(endpoint, _amounts(bench, program, count), CLIENTS, 201, keep_bodies=True)))
        items.append(offer(Burst(endpoint, _items(bench, program, rewards, count), CLIENTS, 201)))
        made = [json.loads(body)["id"] for body in amounts[-1].bodies]
        reversals.append(offer(Burst(endpoint, _reversals(bench, made), CLIENTS, 201)))
        written = bench.rest.entries_written() - before
        if written != 3 * count:
            raise Wrong(f"{3 * count} operations made {written} journal entries")
    yield _rate("redemption_per_s", amounts, count)
    latencies = [median(report.latencies_ms) for report in amounts]
    yield Figure("redemption_p50_ms", middle(latencies), "ms", tuple(latencies), _share(amounts))
    yield _rate("item_redemption_per_s", items, count)
    yield _rate("reversal_per_s", reversals, count)


def _rate(name: str, reports: list[BurstReport], count: int) -> Figure:
    rates = [count / report.answered_s for report in reports]
    return Figure(name, middle(rates), "/s", tuple(rates), _share(reports))


def _share(reports: list[BurstReport]) -> float:
    return max(report.client_cpu_share for report in reports)


def _reward(bench: Bench, program: BenchProgram, number: int) -> str:
    reward = {
        "name": f"Voucher {number}",
        "redemption_type": "UNIT_BASED",
        "asset_id": str(program.asset_ids[0]),
        "unit_cost": "0.01",
        "status": "ACTIVE",
        "max_total": 1_000_000,
    }
    reward_id: str = bench.rest.post(f"/v1/programs/{program.id}/rewards", reward)["id"]
    return reward_id


def _amounts(bench: Bench, program: BenchProgram, count: int) -> list[bytes]:
    body = {"asset_id": str(program.asset_ids[0]), "amount": "0.01", "description": "Cash-out"}
    return _redemptions(bench, "redemptions", program.id, [body] * count)


def _items(bench: Bench, program: BenchProgram, rewards: list[str], count: int) -> list[bytes]:
    bodies = [{"reward_id": rewards[number % len(rewards)]} for number in range(count)]
    return _redemptions(bench, "redemptions/items", program.id, bodies)


def _redemptions(bench: Bench, path: str, program_id: UUID, bodies: list[dict[str, Any]]) -> list[bytes]:
    """One request for each body, of participants that are drawn, each with a key of its own."""
    draw, run = Random(7), uuid4().hex
    return [
        bench.system.endpoint.post(
            f"/v1/participants/{draw.choice(bench.population.ids)}/{path}",
            json.dumps({"program_id": str(program_id), "idempotency_key": f"{run}-{number}", **body}).encode(),
        )
        for number, body in enumerate(bodies)
    ]


def _reversals(bench: Bench, redemption_ids: list[str]) -> list[bytes]:
    body = json.dumps({"reason": "Returned"}).encode()
    return [bench.system.endpoint.post(f"/v1/redemptions/{id}/reverse", body) for id in redemption_ids]


CASE = Case(
    "redemptions",
    "Redemptions and reversals",
    ("redemption_per_s", "redemption_p50_ms", "item_redemption_per_s", "reversal_per_s"),
    run,
)
