"""The platform under drill: Postgres and Temporal of its own, API and workers as processes that can be killed."""

import asyncio
import os
import shutil
import sys
import tempfile
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from uuid import UUID

import psycopg

from cli import migrate_schema
from domain.clock import system_clock
from domain.organizations import bootstrap
from embedded.child import Child, ChildProcess
from embedded.ports import LOOPBACK, PortRequest, pick_ports
from embedded.postgres import EmbeddedPostgres
from embedded.probes import answers_ok
from embedded.problems import StartupProblem
from embedded.temporal import EmbeddedTemporal

RESTART_LIMIT_S = 120.0
LOOK_EVERY_S = 0.1


class Process:
    """One process of the platform, which can be killed and started again; every run has a log of its own."""

    def __init__(self, child: Child, logs: Path) -> None:
        self.child = child
        self.faults = ""
        self.starts = 0
        self._logs = logs
        self._run: ChildProcess | None = None

    @property
    def name(self) -> str:
        """What it is called in messages."""
        return self.child.name

    @property
    def pid(self) -> int | None:
        """Its process id while it runs, else None."""
        return self._run.pid if self._run is not None else None

    async def start(self, faults: str = "") -> None:
        """Start it with these faults armed (SCRIP_FAULTS) and wait until it is ready. Raises StartupProblem."""
        self.faults = faults
        self.starts += 1
        env = {**self.child.env, **({"SCRIP_FAULTS": faults} if faults else {})}
        self._run = ChildProcess(replace(self.child, env=env), self._logs / f"{self.name}.{self.starts}.log")
        starting = asyncio.create_task(asyncio.to_thread(self._run.start_and_wait))
        try:
            await asyncio.shield(starting)
        except asyncio.CancelledError:
            # A thread can't be cancelled: let it finish, so that whoever cleans up has a process to stop.
            with suppress(StartupProblem):
                await starting
            raise

    async def revive(self, faults: str = "") -> None:
        """Start it after a kill. A server may need a moment until what its predecessor left has gone."""
        deadline = asyncio.get_running_loop().time() + RESTART_LIMIT_S
        while True:
            try:
                return await self.start(faults)
            except StartupProblem:
                if asyncio.get_running_loop().time() > deadline:
                    raise
                await asyncio.sleep(0.5)

    async def stop(self) -> None:
        """Ask it to stop and wait for its end; does nothing when it doesn't run."""
        if self._run is not None:
            await asyncio.to_thread(self._run.stop)

    def kill(self) -> None:
        """kill -9."""
        if self._run is not None:
            self._run.kill()

    def output(self) -> str:
        """What all of its runs have written."""
        logs = [self._logs / f"{self.name}.{run}.log" for run in range(1, self.starts + 1)]
        return "".join(log.read_text(errors="replace") for log in logs if log.exists())

    def has_reached(self, point: str) -> bool:
        """Whether the fault armed at `point` has struck in the present run, or in the one that it ended."""
        log = self._logs / f"{self.name}.{self.starts}.log"
        return f"fault point {point}" in log.read_text(errors="replace")


@dataclass
class Platform:
    """Everything that runs, the organization it runs for, and where it is reached."""

    home: Path
    postgres: Process
    temporal: Process
    api: Process
    worker: Process
    second_worker: Process
    organization_id: UUID
    api_key: str
    api_url: str
    temporal_address: str
    owner_url: str
    superuser_url: str

    @property
    def logs(self) -> Path:
        """Where every run of every process has its log."""
        return self.home / "logs"

    @property
    def temporal_files(self) -> list[Path]:
        """Temporal's whole state."""
        return list((self.home / "temporal").glob("temporal.db*"))

    async def provide(self, *, api_faults: str = "", worker_faults: str = "") -> None:
        """One API and one worker running, with these faults armed; what runs as wanted already is left alone."""
        await self.second_worker.stop()
        for process, faults in ((self.api, api_faults), (self.worker, worker_faults)):
            if process.pid is None or faults or process.faults:
                await process.stop()
                await process.start(faults)

    @asynccontextmanager
    async def supervised(self, *processes: Process) -> AsyncIterator[list[str]]:
        """Start each of `processes` again whenever it dies, without faults; the list names those it started."""
        started: list[str] = []
        done = asyncio.Event()

        async def keep(process: Process) -> None:
            while not done.is_set():
                if process.pid is None:
                    started.append(process.name)
                    await process.revive()
                with suppress(TimeoutError):
                    await asyncio.wait_for(done.wait(), LOOK_EVERY_S)

        async with asyncio.TaskGroup() as group:
            for process in processes:
                group.create_task(keep(process))
            try:
                yield started
            finally:
                # Not by cancelling: a start under way must end, or its process would be nobody's.
                done.set()


@asynccontextmanager
async def fresh_platform() -> AsyncIterator[Platform]:
    """An empty, migrated platform with one organization; API and workers are not running yet. Removed at the end."""
    home = Path(tempfile.mkdtemp(prefix="scrip-drill-"))
    started: list[Process] = []
    try:
        yield await _start(home, started)
    finally:
        for process in reversed(started):
            await process.stop()
        shutil.rmtree(home, ignore_errors=True)


async def _start(home: Path, started: list[Process]) -> Platform:
    logs = home / "logs"
    logs.mkdir()
    # Not durable: a drill kills processes, never the machine.
    postgres = EmbeddedPostgres(home / "postgres", durable=False)
    temporal = EmbeddedTemporal(home / "temporal")
    postgres_process = Process(await asyncio.to_thread(postgres.prepare), logs)
    temporal_process = Process(temporal.prepare(), logs)
    for server in (postgres_process, temporal_process):
        started.append(server)
        await server.start()
    await asyncio.to_thread(postgres.provision)
    await asyncio.to_thread(migrate_schema, postgres.owner_url)
    organization_id, api_key = await asyncio.to_thread(_first_organization, postgres.owner_url)
    (port,) = pick_ports([PortRequest("the API's port", 0)])
    url = f"http://{LOOPBACK}:{port}"
    env = {
        **{name: value for name, value in os.environ.items() if not name.startswith(("SCRIP_", "TEMPORAL_"))},
        "PYTHONUNBUFFERED": "1",
        "SCRIP_DATABASE_URL": postgres.app_url,
        "SCRIP_TEMPORAL_ADDRESS": temporal.address,
        "SCRIP_TEMPORAL_NAMESPACE": temporal.namespace,
    }
    platform = Platform(
        home=home,
        postgres=postgres_process,
        temporal=temporal_process,
        api=Process(_api(env, url, port), logs),
        worker=Process(_worker(home, env, "worker"), logs),
        second_worker=Process(_worker(home, env, "second-worker"), logs),
        organization_id=organization_id,
        api_key=api_key,
        api_url=f"{url}/v1",
        temporal_address=temporal.address,
        owner_url=postgres.owner_url,
        superuser_url=postgres.superuser_url,
    )
    started += [platform.api, platform.worker, platform.second_worker]
    return platform


def _api(env: dict[str, str], url: str, port: int) -> Child:
    return Child(
        name="api",
        argv=(sys.executable, "-m", "cli", "api", "--port", str(port)),
        env=env,
        ready=lambda: answers_ok(f"{url}/healthz"),
        grace_seconds=15,
    )


def _worker(home: Path, env: dict[str, str], name: str) -> Child:
    ready = home / f"{name}.ready"
    return Child(
        name=name,
        argv=(sys.executable, "-m", "cli", "worker"),
        env={**env, "SCRIP_WORKER_READY_FILE": str(ready)},
        ready=ready.exists,
        grace_seconds=30,
        before_start=lambda: ready.unlink(missing_ok=True),
    )


def _first_organization(owner_url: str) -> tuple[UUID, str]:
    with psycopg.connect(owner_url) as connection:
        organization_id, key = bootstrap(connection, rate_per_second=100_000, rate_burst=100_000, now=system_clock())
    assert key is not None, "the database is new"
    return organization_id, key.secret
