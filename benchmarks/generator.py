"""The load generator, a process of its own: `python -m benchmarks.generator` reads a job on stdin, writes its report.

Bare asyncio streams with keep-alive: an HTTP client library would take a core at a few hundred requests a second.
"""

import asyncio
import gc
import pickle
import sys
import time
from array import array
from asyncio import StreamReader, StreamWriter
from collections.abc import Iterator, Sequence

import uvloop

from benchmarks.load import CLIENTS_LIMIT, EVENT_ID, Burst, BurstReport, Endpoint, LoadFailed, Watch, WatchReport

EMPTY_PAGE = b'"data":[]'
COMPLETED = b'"status":"COMPLETED"'
FAILED = b'"status":"FAILED"'
ID_FIELD = b'"id":"'
SETTLE_LIMIT_S = 300.0
WATCH_CONNECTIONS = 32


class Connection:
    """One keep-alive connection; one request at a time."""

    def __init__(self, reader: StreamReader, writer: StreamWriter) -> None:
        self._reader = reader
        self._writer = writer

    @classmethod
    async def open(cls, endpoint: Endpoint) -> "Connection":
        """Connect."""
        return cls(*await asyncio.open_connection(endpoint.host, endpoint.port))

    async def exchange(self, request: bytes, expected_status: int) -> bytes:
        """Send a request; the body of its answer. Raises LoadFailed when the status is another one."""
        self._writer.write(request)
        head = await self._reader.readuntil(b"\r\n\r\n")
        body = await self._reader.readexactly(_content_length(head))
        if int(head[9:12]) != expected_status:
            raise LoadFailed(f"expected {expected_status}, got {head[:12].decode()}: {body[:500].decode()}")
        return body


def _content_length(head: bytes) -> int:
    start = head.lower().index(b"content-length:") + len(b"content-length:")
    return int(head[start : head.index(b"\r\n", start)])


async def run_burst(job: Burst) -> BurstReport:
    """Send every request of `job` once, and wait until what they caused is done."""
    assert 0 < job.clients <= CLIENTS_LIMIT
    connections = [await Connection.open(job.endpoint) for _ in range(job.clients)]
    latencies_ms = array("d", bytes(8 * len(job.requests)))
    bodies = [b""] * len(job.requests) if job.keep_bodies else []
    todo = iter(enumerate(job.requests))
    cpu_before_s, started = time.process_time(), time.perf_counter()
    async with asyncio.TaskGroup() as clients:
        for connection in connections:
            clients.create_task(_send_all(connection, todo, job, latencies_ms, bodies))
    answered_s = time.perf_counter() - started
    cpu_s = time.process_time() - cpu_before_s
    done_s = await _settle(connections[0], job, started) if job.until_empty else answered_s
    return BurstReport(answered_s, done_s, cpu_s, latencies_ms, bodies)


async def _send_all(
    connection: Connection,
    todo: Iterator[tuple[int, bytes]],
    job: Burst,
    latencies_ms: "array[float]",
    bodies: list[bytes],
) -> None:
    for index, request in todo:
        sent = time.perf_counter()
        body = await connection.exchange(request, job.expected_status)
        latencies_ms[index] = (time.perf_counter() - sent) * 1000
        if bodies:
            bodies[index] = body


async def _settle(connection: Connection, job: Burst, started: float) -> float:
    """Seconds from `started` to when every list was asked for that turned out to be empty."""
    while time.perf_counter() - started < SETTLE_LIMIT_S:
        asked = time.perf_counter()
        if await _all_empty(connection, job.until_empty):
            return asked - started
        await asyncio.sleep(job.poll_ms / 1000)
    raise LoadFailed(f"not everything was processed after {SETTLE_LIMIT_S:.0f} s")


async def _all_empty(connection: Connection, lists: Sequence[bytes]) -> bool:
    # Finding nothing is what costs the server most, so a later list is asked for only when those before it are empty.
    for request in lists:
        if EMPTY_PAGE not in await connection.exchange(request, 200):
            return False
    return True


async def run_watch(job: Watch) -> WatchReport:
    """Send events at their instants and see each of them become COMPLETED."""
    idle: asyncio.Queue[Connection] = asyncio.Queue()
    for _ in range(WATCH_CONNECTIONS):
        idle.put_nowait(await Connection.open(job.endpoint))
    cpu_before_s, started = time.process_time(), time.perf_counter()
    async with asyncio.TaskGroup() as events:
        tasks = [
            events.create_task(_send_and_watch(idle, job, started + offset_s, request))
            for offset_s, request in job.sends
        ]
    wall_s = time.perf_counter() - started
    return WatchReport(wall_s, time.process_time() - cpu_before_s, [task.result() for task in tasks])


async def _send_and_watch(idle: "asyncio.Queue[Connection]", job: Watch, at: float, request: bytes) -> float:
    """Milliseconds from the answer to the event to the answer that shows it COMPLETED."""
    await asyncio.sleep(at - time.perf_counter())
    connection = await idle.get()
    accepted_body = await connection.exchange(request, 202)
    accepted = time.perf_counter()
    start = accepted_body.index(ID_FIELD) + len(ID_FIELD)
    look = job.look_at.replace(EVENT_ID, accepted_body[start : start + len(EVENT_ID)])
    next_look = accepted
    while time.perf_counter() - accepted < SETTLE_LIMIT_S:
        shown = await connection.exchange(look, 200)
        if COMPLETED in shown:
            idle.put_nowait(connection)
            return (time.perf_counter() - accepted) * 1000
        if FAILED in shown:
            raise LoadFailed(f"an event failed: {shown[:500].decode()}")
        next_look = max(next_look + job.poll_ms / 1000, time.perf_counter())
        await asyncio.sleep(next_look - time.perf_counter())
    raise LoadFailed(f"an event was not processed after {SETTLE_LIMIT_S:.0f} s")


def main() -> None:
    """Read the job, do it, write the report; what went wrong goes to stderr."""
    job = pickle.load(sys.stdin.buffer)
    # A collection in the middle of a run would be measured as the server's latency.
    gc.disable()
    try:
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            report: BurstReport | WatchReport = runner.run(_do(job))
    except (LoadFailed, OSError, EOFError, ExceptionGroup) as error:
        sys.exit(str(_first(error)))
    pickle.dump(report, sys.stdout.buffer)


async def _do(job: Burst | Watch) -> BurstReport | WatchReport:
    return await run_burst(job) if isinstance(job, Burst) else await run_watch(job)


def _first(error: BaseException) -> BaseException:
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return error


if __name__ == "__main__":
    main()
