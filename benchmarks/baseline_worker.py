"""The worker of the baseline "one workflow per event": `python -m benchmarks.baseline_worker ADDRESS QUEUE`."""

import asyncio
import os
import signal
import sys

from temporalio import workflow
from temporalio.client import Client
from temporalio.worker import UnsandboxedWorkflowRunner, Worker

WORKFLOW_NAME = "BenchmarkNoop"


@workflow.defn(name=WORKFLOW_NAME)
class Noop:
    """Ends at once."""

    @workflow.run
    async def run(self) -> None:
        """Do nothing."""


async def serve(address: str, queue: str) -> None:
    """Run the workflows of `queue` until SIGTERM."""
    stop = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, stop.set)
    client = await Client.connect(address)
    # The sandbox costs time on every workflow; the baseline is to be as fast as it can be.
    async with Worker(client, task_queue=queue, workflows=[Noop], workflow_runner=UnsandboxedWorkflowRunner()):
        await stop.wait()


if __name__ == "__main__":
    asyncio.run(serve(sys.argv[1], sys.argv[2]))
    # The SDK's native threads can crash a Python that tears itself down under them.
    os._exit(0)
