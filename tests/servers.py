"""The servers of a test run: each is started by the first worker that needs it and lives until the last is done."""

import fcntl
import json
import os
import secrets
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from urllib.parse import urlsplit, urlunsplit

import psutil
import psycopg
from psycopg import sql

from embedded.postgres import OWNER, EmbeddedPostgres
from embedded.temporal import EmbeddedTemporal

TEMPLATE = "scrip"


@dataclass(frozen=True)
class Postgres:
    """The run's Postgres. Its database `scrip` is migrated and never used: the template of all others."""

    superuser_url: str
    owner_url: str
    app_url: str

    def create_database(self, name: str) -> "Postgres":
        """The same server with a new, empty, migrated database."""
        unique = f"{name}_{secrets.token_hex(3)}"
        statement = sql.SQL("create database {} template {} owner {}").format(
            sql.Identifier(unique), sql.Identifier(TEMPLATE), sql.Identifier(OWNER)
        )
        with psycopg.connect(_with_database(self.superuser_url, "postgres"), autocommit=True) as connection:
            connection.execute(statement)
        return Postgres(**{role: _with_database(url, unique) for role, url in asdict(self).items()})


@contextmanager
def shared_postgres(directory: Path, migrate: Callable[[str], None]) -> Iterator[Postgres]:
    """The Postgres of the run that shares `directory`."""

    @contextmanager
    def start() -> Iterator[dict[str, str]]:
        server = EmbeddedPostgres(directory / "postgres", durable=False)
        server.start()
        try:
            migrate(server.owner_url)
            yield asdict(Postgres(server.superuser_url, server.owner_url, server.app_url))
        finally:
            server.stop()

    with _shared(directory, "postgres", start) as urls:
        yield Postgres(**urls)


@contextmanager
def shared_temporal(directory: Path) -> Iterator[str]:
    """The address of the Temporal server of the run that shares `directory`."""

    @contextmanager
    def start() -> Iterator[dict[str, str]]:
        server = EmbeddedTemporal(directory / "temporal")
        server.start()
        try:
            yield {"address": server.address}
        finally:
            server.stop()

    with _shared(directory, "temporal", start) as found:
        yield found["address"]


@contextmanager
def _shared(
    directory: Path, name: str, start: Callable[[], AbstractContextManager[dict[str, str]]]
) -> Iterator[dict[str, str]]:
    """What `start` yields in whichever process comes first; that process keeps it until nobody uses it any more."""
    state = directory / f"{name}.json"
    with ExitStack() as started:
        with _locked(directory, name):
            if state.exists():
                record = json.loads(state.read_text())
            else:
                record = {"facts": started.enter_context(start()), "keeper": os.getpid(), "users": []}
            state.write_text(json.dumps({**record, "users": [*record["users"], os.getpid()]}))
        try:
            yield record["facts"]
        finally:
            _leave(directory, name)
            if record["keeper"] == os.getpid():
                _wait_for_others(directory, name)


def _leave(directory: Path, name: str) -> None:
    state = directory / f"{name}.json"
    with _locked(directory, name):
        record = json.loads(state.read_text())
        record["users"].remove(os.getpid())
        state.write_text(json.dumps(record))


def _wait_for_others(directory: Path, name: str) -> None:
    """Wait until no live process uses the server; from then on a newcomer starts another one."""
    state = directory / f"{name}.json"
    while True:
        with _locked(directory, name):
            users = json.loads(state.read_text())["users"]
            if not any(psutil.pid_exists(pid) for pid in users):
                state.unlink()
                return
        time.sleep(0.1)


@contextmanager
def _locked(directory: Path, name: str) -> Iterator[None]:
    with (directory / f"{name}.lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _with_database(url: str, name: str) -> str:
    return urlunsplit(urlsplit(url)._replace(path=f"/{name}"))
