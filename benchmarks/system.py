"""The system under measurement: a fresh one in a temporary directory, or one that is up already."""

import json
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit
from uuid import UUID

import psutil

from benchmarks.load import ROOT, Endpoint
from benchmarks.processes import Watched
from embedded.datadir import serving

START_LIMIT_S = 120.0
STOP_LIMIT_S = 90.0
PROCESSES = ("api", "worker", "postgres", "temporal")


class SystemFailed(Exception):
    """The system did not come up; the message holds what it printed."""


@dataclass(frozen=True, slots=True)
class Servers:
    """What only the machine that the system runs on can see."""

    organization_id: UUID
    owner_database_url: str
    application_database_url: str
    temporal_address: str
    processes: Watched


@dataclass(frozen=True, slots=True)
class System:
    """Where the API serves, and the servers behind it if they are ours (else figures that need them are skipped)."""

    endpoint: Endpoint
    servers: Servers | None


def attach(url: str, key: str) -> System:
    """A system that is up already. Raises ValueError when `url` is not plain HTTP: the load generator has no TLS."""
    parts = urlsplit(url)
    if parts.scheme != "http" or parts.hostname is None:
        raise ValueError(f"{url}: the benchmark speaks plain HTTP only, such as http://127.0.0.1:8080")
    return System(Endpoint(parts.hostname, parts.port or 80, key), None)


@contextmanager
def fresh_system() -> Iterator[System]:
    """Start Scrip on free ports with an empty data directory; stop it and remove the directory at the end.

    Raises SystemFailed when it does not come up.
    """
    home = Path(tempfile.mkdtemp(prefix="scrip-bench-"))
    try:
        with (home / "output").open("wb") as output:
            process = _start(home, output.fileno())
            try:
                yield from _serve(home, process)
            finally:
                _stop(process)
    finally:
        shutil.rmtree(home, ignore_errors=True)


def filesystem_of(path: Path) -> str:
    """The type of the file system that holds `path`, such as ext4: on tmpfs a commit costs no disk write."""
    mounts = [mount for mount in psutil.disk_partitions(all=True) if path.resolve().is_relative_to(mount.mountpoint)]
    return max(mounts, key=lambda mount: len(mount.mountpoint)).fstype if mounts else "unknown"


def _start(home: Path, output: int) -> subprocess.Popen[bytes]:
    ports = ("--api-port", "0", "--temporal-port", "0", "--ui-port", "0")
    places = ("--data-dir", str(home / "data"), "--ready-file", str(home / "ready.json"))
    # A session of its own: Ctrl-C reaches us only, and we stop it in order.
    return subprocess.Popen(
        [sys.executable, "-m", "cli", "up", *places, *ports],
        cwd=ROOT,
        stdin=subprocess.DEVNULL,
        stdout=output,
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )


def _serve(home: Path, process: subprocess.Popen[bytes]) -> Iterator[System]:
    facts = _wait_ready(home, process)
    where = serving(home / "data")
    if where is None:
        raise SystemFailed("the system stopped right after it was ready")
    processes = Watched(_pids(home / "data" / "children.json"))
    processes.start()
    try:
        system = attach(facts["api_url"], facts["api_key"])
        servers = Servers(
            UUID(facts["organization_id"]),
            where["owner_database_url"],
            facts["database_url"],
            facts["temporal_address"],
            processes,
        )
        yield System(system.endpoint, servers)
    finally:
        processes.stop()


def _wait_ready(home: Path, process: subprocess.Popen[bytes]) -> dict[str, str]:
    ready = home / "ready.json"
    deadline = time.monotonic() + START_LIMIT_S
    while not ready.exists():
        if process.poll() is not None or time.monotonic() > deadline:
            raise SystemFailed("`scrip up` did not become ready:\n" + (home / "output").read_text(errors="replace"))
        time.sleep(0.1)
    facts: dict[str, str] = json.loads(ready.read_text(encoding="utf-8"))
    return facts


def _pids(children: Path) -> dict[str, int]:
    stored: list[dict[str, Any]] = json.loads(children.read_text(encoding="utf-8"))["children"]
    return {child["name"]: child["pid"] for child in stored if child["name"] in PROCESSES}


def _stop(process: subprocess.Popen[bytes]) -> None:
    if process.poll() is not None:
        return
    family = psutil.Process(process.pid).children(recursive=True)
    process.send_signal(signal.SIGTERM)
    try:
        process.wait(STOP_LIMIT_S)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
        for child in family:
            with suppress(psutil.NoSuchProcess):
                child.kill()
