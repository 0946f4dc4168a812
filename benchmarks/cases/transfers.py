"""Transfers from one participant to another, 16 clients, one organization: each is one journal entry when answered."""

import json
from collections.abc import Iterator
from random import Random
from uuid import uuid4

from benchmarks.case import Bench, Case, Figure, Wrong
from benchmarks.load import Burst, middle, offer
from benchmarks.workload import BenchProgram, make_program

CLIENTS = 16

# Nobody runs out: no participant gives a cent this often.
_OPENING = "1000.00"


def run(bench: Bench) -> Iterator[Figure]:
    """Yield transfers per second, each a cent to one recipient that is named by the caller's own id."""
    endpoint, count = bench.system.endpoint, bench.sizes.adjusts
    program = make_program(bench.rest, "transfers")
    offer(Burst(endpoint, _openings(bench, program), CLIENTS, 200))
    rates, share = [], 0.0
    for _ in range(bench.sizes.repetitions):
        before = bench.rest.entries_written()
        report = offer(Burst(endpoint, _transfers(bench, program, count), CLIENTS, 201))
        written = bench.rest.entries_written() - before
        if written != count:
            raise Wrong(f"{count} transfers made {written} journal entries")
        rates.append(count / report.answered_s)
        share = max(share, report.client_cpu_share)
    yield Figure("transfers_per_s", middle(rates), "/s", tuple(rates), share)


def _openings(bench: Bench, program: BenchProgram) -> list[bytes]:
    """A credit for every participant."""
    body = _body(program, type="CREDIT", amount=_OPENING)
    paths = (f"/v1/participants/{participant_id}/balances/adjust" for participant_id in bench.population.ids)
    return [bench.system.endpoint.post(path, body) for path in paths]


def _transfers(bench: Bench, program: BenchProgram, count: int) -> list[bytes]:
    """`count` transfers, each between two participants that are drawn."""
    draw, run, external_ids = Random(11), uuid4().hex, bench.population.external_ids
    requests = []
    for number in range(count):
        source, recipient = draw.sample(external_ids, 2)
        body = _body(
            program,
            source_external_id=source,
            recipients=[{"external_id": recipient, "amount": "0.01"}],
            idempotency_key=f"{run}-{number}",
        )
        requests.append(bench.system.endpoint.post("/v1/transfers", body))
    return requests


def _body(program: BenchProgram, **fields: object) -> bytes:
    context = {"program_id": str(program.id), "asset_id": str(program.asset_ids[0]), "description": "Benchmark"}
    return json.dumps({**context, **fields}).encode()


CASE = Case("transfers", "Transfers", ("transfers_per_s",), run)
