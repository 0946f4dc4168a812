"""The `scrip` command as an operator uses it. Contract: README.md "Organizations and API keys"."""

import hashlib
import json
import secrets
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit, urlunsplit
from uuid import UUID, uuid4

import psycopg
import pytest
from psycopg import sql
from typer.testing import CliRunner, Result

import cli
from settings import get_settings
from tests.servers import Postgres

Run = Callable[..., Result]


@pytest.fixture(autouse=True)
def _no_settings_of_this_machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    monkeypatch.setenv("SCRIP_DATA_DIR", str(tmp_path))
    for name in ("SCRIP_DATABASE_URL", "SCRIP_OWNER_DATABASE_URL"):
        monkeypatch.delenv(name, raising=False)
    get_settings.cache_clear()
    yield
    get_settings.cache_clear()


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch) -> Run:
    """Run a command line with environment variables given by keyword."""

    def execute(*arguments: str, **environment: str) -> Result:
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        get_settings.cache_clear()
        return CliRunner().invoke(cli.app, arguments)

    return execute


@pytest.fixture
def fresh(postgres: Postgres) -> Postgres:
    """A migrated database without any organization."""
    return postgres.create_database("cli")


@pytest.fixture
def scrip(run: Run, fresh: Postgres) -> Run:
    """Run a command on the fresh database."""
    return lambda *arguments: run(*arguments, SCRIP_OWNER_DATABASE_URL=fresh.owner_url)


def parsed(result: Result) -> Any:
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


def test_help_teaches_how_to_begin(run: Run) -> None:
    text = run("--help").output
    for word in ("up", "migrate", "bootstrap", "api", "worker", "org", "keys"):
        assert word in text
    for command in (["up"], ["api"], ["worker"], ["migrate"], ["bootstrap"], ["org", "create"], ["keys", "revoke"]):
        assert run(*command, "--help").exit_code == 0


@pytest.mark.parametrize("command", [["org", "list"], ["keys", "list"], ["bootstrap"], ["migrate"]])
def test_a_missing_database_url_is_told(run: Run, command: list[str]) -> None:
    result = run(*command)
    assert result.exit_code == 2
    assert "SCRIP_OWNER_DATABASE_URL is not set" in result.stderr


@pytest.mark.parametrize("command", ["api", "worker"])
def test_servers_need_the_url_of_the_applications_role(run: Run, command: str) -> None:
    result = run(command)
    assert result.exit_code == 2
    assert "SCRIP_DATABASE_URL is not set" in result.stderr


def test_an_unreachable_database_is_told_without_a_traceback(run: Run) -> None:
    result = run("org", "list", SCRIP_OWNER_DATABASE_URL="postgresql://x:hunter2@127.0.0.1:1/scrip")
    assert result.exit_code == 1
    assert "out of reach" in result.stderr
    assert "hunter2" not in result.output


def test_bootstrap_makes_the_first_organization_and_key_once(scrip: Run, fresh: Postgres) -> None:
    first = parsed(scrip("bootstrap", "--json"))
    assert first["api_key"].startswith("sk_")
    assert len(first["api_key"]) == 46
    second = parsed(scrip("bootstrap", "--json"))
    assert second == {"organization_id": first["organization_id"], "api_key": None}
    with psycopg.connect(fresh.owner_url) as connection:
        head = connection.execute("select organization_id, sequence, hash, created_at from chain_head").fetchall()
    assert [(str(row[0]), row[1], row[2], row[3].isoformat()) for row in head] == [
        (first["organization_id"], 0, bytes(32), "1970-01-01T00:00:00+00:00")
    ]


def test_an_organization_gets_its_limits_and_keys(scrip: Run) -> None:
    organization_id = parsed(scrip("org", "create", "Acme", "--rate", "10", "--burst", "30", "--json"))[
        "organization_id"
    ]
    key = parsed(scrip("keys", "create", "--org", organization_id, "--name", "shop", "--json"))

    (organization,) = parsed(scrip("org", "list", "--json"))
    assert organization["id"] == organization_id
    assert (organization["name"], organization["rate_per_second"], organization["rate_burst"]) == ("Acme", 10, 30)
    assert organization["active_keys"] == 1
    (listed,) = parsed(scrip("keys", "list", "--org", organization_id, "--json"))
    assert (listed["id"], listed["name"], listed["hint"]) == (key["id"], "shop", key["api_key"][-4:])
    assert listed["revoked_at"] is None
    assert key["api_key"] not in json.dumps(listed)


def test_only_the_hash_of_a_key_is_stored(scrip: Run, fresh: Postgres) -> None:
    key = parsed(scrip("bootstrap", "--json"))["api_key"]
    with psycopg.connect(fresh.owner_url) as connection:
        stored = connection.execute("select key_hash, hint from api_key").fetchone()
    assert stored == (hashlib.sha256(key.encode()).digest(), key[-4:])


def test_a_key_is_revoked_once_and_for_all(scrip: Run) -> None:
    organization_id = parsed(scrip("bootstrap", "--json"))["organization_id"]
    key_id = parsed(scrip("keys", "create", "--org", organization_id, "--json"))["id"]
    assert scrip("keys", "revoke", key_id).exit_code == 0
    first = {key["id"]: key["revoked_at"] for key in parsed(scrip("keys", "list", "--json"))}
    assert scrip("keys", "revoke", key_id).exit_code == 0
    assert {key["id"]: key["revoked_at"] for key in parsed(scrip("keys", "list", "--json"))} == first
    assert first[key_id] is not None


def test_what_does_not_exist_or_fit_is_told(scrip: Run) -> None:
    for command, words in (
        (["keys", "create", "--org", str(uuid4())], "organization not found"),
        (["keys", "revoke", str(uuid4())], "API key not found"),
        (["org", "create", ""], "1 to 255 characters"),
        (["org", "create", "x", "--rate", "0"], "at least 1"),
    ):
        result = scrip(*command)
        assert (result.exit_code, words in result.stderr) == (1, True), result.output


def test_what_people_read_names_the_ids(scrip: Run) -> None:
    made = scrip("bootstrap").stdout
    organization_id, key = (line.split()[-1] for line in made.splitlines()[::2])
    assert UUID(organization_id)
    assert key.startswith("sk_")
    assert organization_id in scrip("org", "list").stdout
    assert organization_id in scrip("keys", "list").stdout
    assert "already" in scrip("bootstrap").stdout


# --- migrate -----------------------------------------------------------------------------------------------------


@pytest.fixture
def empty(postgres: Postgres) -> Postgres:
    """A database without tables."""
    name = f"empty_{secrets.token_hex(4)}"
    with psycopg.connect(postgres.superuser_url, autocommit=True) as connection:
        connection.execute(sql.SQL("create database {} owner scrip_owner").format(sql.Identifier(name)))

    def of(url: str) -> str:
        return urlunsplit(urlsplit(url)._replace(path=f"/{name}"))

    return Postgres(of(postgres.superuser_url), of(postgres.owner_url), of(postgres.app_url))


def test_migrate_makes_the_tables_and_can_be_repeated(run: Run, empty: Postgres) -> None:
    assert "run `scrip migrate` first" in run("org", "list", SCRIP_OWNER_DATABASE_URL=empty.owner_url).stderr
    for _ in range(2):
        result = run("migrate", SCRIP_OWNER_DATABASE_URL=empty.owner_url, SCRIP_DATABASE_URL=empty.app_url)
        assert result.exit_code == 0, result.output
    assert parsed(run("org", "list", "--json")) == []


def with_user(url: str, user: str, password: str) -> str:
    parts = urlsplit(url)
    return urlunsplit(parts._replace(netloc=f"{user}:{password}@{parts.hostname}:{parts.port}"))


def test_migrate_provides_the_login_role_with_no_power_of_its_own(run: Run, empty: Postgres) -> None:
    role = f"shop_{secrets.token_hex(4)}"
    url = with_user(empty.app_url, role, "pass%20word%25'")
    result = run("migrate", SCRIP_OWNER_DATABASE_URL=empty.superuser_url, SCRIP_DATABASE_URL=url)
    assert result.exit_code == 0, result.output
    with psycopg.connect(url) as connection:
        assert connection.execute("select count(*) from program").fetchone() == (0,)
        found = connection.execute(
            "select rolsuper, rolbypassrls, rolcreatedb, rolcreaterole, pg_has_role('scrip_app', 'usage')"
            " from pg_roles where rolname = current_user"
        ).fetchone()
        assert found == (False, False, False, False, True)


def test_migrate_refuses_a_login_role_that_escapes_row_level_security(run: Run, empty: Postgres) -> None:
    for powerful in (empty.superuser_url, empty.owner_url):
        result = run("migrate", SCRIP_OWNER_DATABASE_URL=empty.owner_url, SCRIP_DATABASE_URL=powerful)
        assert (result.exit_code, "row-level security" in result.stderr) == (1, True), result.output


def test_migrate_says_what_to_do_when_it_may_not_make_roles(run: Run, empty: Postgres) -> None:
    url = with_user(empty.app_url, f"nobody_{secrets.token_hex(4)}", "x")
    result = run("migrate", SCRIP_OWNER_DATABASE_URL=empty.owner_url, SCRIP_DATABASE_URL=url)
    assert (result.exit_code, "CREATE ROLE nobody_" in result.stderr) == (1, True), result.output
