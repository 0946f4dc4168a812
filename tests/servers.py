"""The servers of a test run: each is started by the first worker that needs it and lives until the last is done."""

import secrets
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from urllib.parse import urlsplit, urlunsplit

import psycopg
from psycopg import sql

from embedded.postgres import OWNER, EmbeddedPostgres
from embedded.temporal import EmbeddedTemporal
from tests.shared import shared

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

    def start() -> tuple[int, dict[str, str]]:
        server = EmbeddedPostgres(directory / "postgres", durable=False)
        server.start()
        migrate(server.owner_url)
        return server.pid, asdict(Postgres(server.superuser_url, server.owner_url, server.app_url))

    with shared(directory / "postgres-shared", start, signal.SIGINT) as urls:
        yield Postgres(**urls)


@contextmanager
def shared_temporal(directory: Path) -> Iterator[str]:
    """The address of the Temporal server of the run that shares `directory`."""

    def start() -> tuple[int, dict[str, str]]:
        server = EmbeddedTemporal(directory / "temporal")
        server.start()
        return server.pid, {"address": server.address}

    with shared(directory / "temporal-shared", start, signal.SIGTERM) as found:
        yield found["address"]


def _with_database(url: str, name: str) -> str:
    return urlunsplit(urlsplit(url)._replace(path=f"/{name}"))
