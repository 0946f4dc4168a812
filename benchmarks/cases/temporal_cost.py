"""What the events of the throughput cases cost Temporal, counted in the histories of their workflows."""

import asyncio
from collections import Counter
from collections.abc import AsyncIterator, Iterator

import psycopg
from temporalio.api.enums.v1 import EventType
from temporalio.client import Client

from benchmarks.case import Bench, Case, Figure, Wrong
from benchmarks.workload import BenchProgram
from workflows.event_processing import workflow_id

COUNTED = ("batch", "single")
SIGNALED = EventType.EVENT_TYPE_WORKFLOW_EXECUTION_SIGNALED
# What Temporal does once per entry of a history: take a signal, start a run, hand out a task, keep a timer.
OPERATIONS = frozenset(
    {
        SIGNALED,
        EventType.EVENT_TYPE_WORKFLOW_EXECUTION_STARTED,
        EventType.EVENT_TYPE_WORKFLOW_TASK_SCHEDULED,
        EventType.EVENT_TYPE_ACTIVITY_TASK_SCHEDULED,
        EventType.EVENT_TYPE_TIMER_STARTED,
    }
)


def run(bench: Bench) -> Iterator[Figure]:
    """Yield signals per 1,000 events and events per operation, over both throughput cases with their warm-ups."""
    counted = Counter[int]()
    for name in COUNTED:
        counted += asyncio.run(_count(bench.servers.temporal_address, bench.programs[name]))
    events = _count_events(bench)
    operations = sum(counted[kind] for kind in OPERATIONS)
    if not counted[SIGNALED]:
        raise Wrong("no workflow of the events was found")
    yield Figure("signals_per_1000_events", counted[SIGNALED] * 1000 / events, "")
    yield Figure("events_per_temporal_operation", events / operations, "")


def _count_events(bench: Bench) -> int:
    program_ids = [bench.programs[name].id for name in COUNTED]
    with psycopg.connect(bench.servers.owner_database_url) as connection:
        found = connection.execute(
            "select count(*) from event where organization_id = %s and program_id = any(%s)",
            (bench.servers.organization_id, program_ids),
        ).fetchone()
    assert found is not None
    return int(found[0])


async def _count(address: str, program: BenchProgram) -> Counter[int]:
    """How many history events of each type the program's runs have."""
    client = await Client.connect(address)
    return Counter([kind async for kind in history(client, workflow_id(program.id))])


async def history(client: Client, id_: str) -> AsyncIterator[int]:
    """The type of every history event of the runs of this workflow."""
    async for execution in client.list_workflows(f"WorkflowId = '{id_}'"):
        handle = client.get_workflow_handle(id_, run_id=execution.run_id)
        async for event in handle.fetch_history_events():
            yield event.event_type


CASE = Case(
    "temporal_cost",
    "Cost to Temporal",
    ("signals_per_1000_events", "events_per_temporal_operation"),
    run,
    after=COUNTED,
    needs_servers=True,
)
