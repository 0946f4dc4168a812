"""Holding and releasing by API call, 16 clients, one organization: each call is one journal entry when answered."""

import json
from collections.abc import Iterator
from random import Random
from uuid import UUID, uuid4

from benchmarks.case import Bench, Case, Figure, Wrong
from benchmarks.load import Burst, middle, offer
from benchmarks.workload import PARTICIPANTS, BenchProgram, adjust_requests, make_program

CLIENTS = 16


def run(bench: Bench) -> Iterator[Figure]:
    """Yield operations per second, half of them holds and half releases."""
    endpoint = bench.system.endpoint
    program = make_program(bench.rest, "holds")
    opening = adjust_requests(endpoint, program, bench.population, PARTICIPANTS, each_once=True)
    offer(Burst(endpoint, opening, CLIENTS, 200))
    pairs = bench.sizes.adjusts // 2
    rates, share = [], 0.0
    for _ in range(bench.sizes.repetitions):
        before = bench.rest.entries_written()
        # All holds of a round come before its releases: a release must find what it releases.
        holds = offer(Burst(endpoint, _requests(bench, program, "hold", pairs), CLIENTS, 200))
        releases = offer(Burst(endpoint, _requests(bench, program, "release", pairs), CLIENTS, 200))
        written = bench.rest.entries_written() - before
        if written != 2 * pairs:
            raise Wrong(f"{2 * pairs} operations made {written} journal entries")
        rates.append(2 * pairs / (holds.answered_s + releases.answered_s))
        share = max(share, holds.client_cpu_share, releases.client_cpu_share)
    yield Figure("hold_release_per_s", middle(rates), "/s", tuple(rates), share)


def _requests(bench: Bench, program: BenchProgram, operation: str, count: int) -> list[bytes]:
    """`count` holds (or releases) of a cent, spread over the participants the same way for both."""
    draw, run = Random(7), uuid4().hex
    return [
        bench.system.endpoint.post(
            f"/v1/participants/{draw.choice(bench.population.ids)}/balances/{operation}",
            json.dumps(_body(program.id, program.asset_ids[0], f"{run}-{number}")).encode(),
        )
        for number in range(count)
    ]


def _body(program_id: UUID, asset_id: UUID, key: str) -> dict[str, str]:
    return {
        "program_id": str(program_id),
        "asset_id": str(asset_id),
        "amount": "0.01",
        "description": "Authorization",
        "idempotency_key": key,
    }


CASE = Case("holds", "Holds and releases", ("hold_release_per_s",), run)
