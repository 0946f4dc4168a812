"""Waiting for what must not be cancelled half way. docs/upkeep.md "Cancelling".

A money activity runs in a task of its own under a shield: a cancel of the workflow is noted and acted upon when the
activity has ended. (With Temporal's own cancellation types a compensation would run before the activity has ended, and
the activity would then commit after it.)
"""

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar

T = TypeVar("T")


async def through_cancel(work: Coroutine[Any, Any, T], note_cancel: Callable[[], None]) -> T:
    """The result of `work`, which a cancel of the workflow doesn't interrupt: `note_cancel` is called instead."""
    task = asyncio.create_task(work)
    while True:
        try:
            return await asyncio.shield(task)
        except asyncio.CancelledError:
            # Cancelling the workflow cancels its main task only. Where this one is cancelled too, the worker is
            # dropping the run from its cache, and waiting on would hang it.
            if task.done() or task.cancelling():
                raise
            note_cancel()
