"""Record the history of every path of EventProcessing: `python -m tests.workflows.record VERSION`.

Run it with a new version when the workflow changes, and keep the old recordings: runs that began under them are still
out there, and a change that breaks their replay needs `workflow.patched`.
"""

import asyncio
import sys
from pathlib import Path

from tests.workflows.scenarios import SCENARIOS, play, time_skipping

HISTORIES = Path(__file__).parent / "histories"


async def record(version: str) -> None:
    """Write `histories/<scenario>.<version>.json` for every scenario that has no such file yet."""
    async with time_skipping() as env:
        for name in SCENARIOS:
            path = HISTORIES / f"{name}.{version}.json"
            if not path.exists():
                run = await play(env, name)
                path.write_text((await run.handle.fetch_history()).to_json() + "\n")


if __name__ == "__main__":
    asyncio.run(record(version=sys.argv[1]))
