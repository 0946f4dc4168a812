"""The worker of the baselines: `python -m benchmarks.baseline_worker ADDRESS QUEUE`."""

import asyncio
import os
import signal
import sys
from datetime import timedelta

from temporalio import activity, workflow
from temporalio.client import Client
from temporalio.worker import UnsandboxedWorkflowRunner, Worker

EMPTY_WORKFLOW = "BenchmarkEmpty"
NOOP_WORKFLOW = "BenchmarkNoop"
TWO_STEP_WORKFLOW = "BenchmarkTwoSteps"
FIRST_UPDATE = "first"
SECOND_UPDATE = "second"


@activity.defn
async def noop() -> None:
    """Do nothing, in the place where an event's effect would be."""


@workflow.defn(name=EMPTY_WORKFLOW)
class Empty:
    """Ends at once."""

    @workflow.run
    async def run(self) -> None:
        """Do nothing."""


@workflow.defn(name=NOOP_WORKFLOW)
class Noop:
    """Has one activity that does nothing: the least that a workflow with an effect needs."""

    @workflow.run
    async def run(self) -> None:
        """Run the activity."""
        await workflow.execute_activity(noop, start_to_close_timeout=timedelta(seconds=30))


@workflow.defn(name=TWO_STEP_WORKFLOW)
class TwoSteps:
    """Answers two updates and ends after the second. They do nothing, or run an activity that does nothing."""

    def __init__(self) -> None:
        self._is_done = False

    @workflow.update(name=FIRST_UPDATE)
    async def first(self, with_activity: bool) -> None:
        """Do nothing."""
        if with_activity:
            await workflow.execute_activity(noop, start_to_close_timeout=timedelta(seconds=30))

    @workflow.update(name=SECOND_UPDATE)
    async def second(self, with_activity: bool) -> None:
        """End the workflow."""
        if with_activity:
            await workflow.execute_activity(noop, start_to_close_timeout=timedelta(seconds=30))
        self._is_done = True

    @workflow.run
    async def run(self) -> None:
        """Wait for the second update."""
        await workflow.wait_condition(lambda: self._is_done)


async def serve(address: str, queue: str) -> None:
    """Run the workflows of `queue` until SIGTERM."""
    stop = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, stop.set)
    client = await Client.connect(address)
    # The sandbox costs time on every workflow; the baseline is to be as fast as it can be.
    runner = UnsandboxedWorkflowRunner()
    workflows = [Empty, Noop, TwoSteps]
    async with Worker(client, task_queue=queue, workflows=workflows, activities=[noop], workflow_runner=runner):
        await stop.wait()


if __name__ == "__main__":
    asyncio.run(serve(sys.argv[1], sys.argv[2]))
    # The SDK's native threads can crash a Python that tears itself down under them.
    os._exit(0)
