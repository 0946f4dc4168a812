"""`scrip up`: everything Scrip needs on this machine, from one command.

Order: Postgres and Temporal side by side; migrations, the first organization and its key; the worker and the API.
"""

import json
import os
import sys
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from embedded.child import Child
from embedded.datadir import DataDirectory, open_data_directory
from embedded.files import read_json_object, write_private_json
from embedded.keeper import Keeper, StopRequested
from embedded.ports import LOOPBACK, PortRequest, pick_ports
from embedded.postgres import EmbeddedPostgres
from embedded.probes import answers_ok
from embedded.problems import StartupProblem
from embedded.records import Records, stop_leftovers
from embedded.temporal import EmbeddedTemporal

SERVERS_LAYER = 2


@dataclass(frozen=True)
class UpOptions:
    """What `scrip up` was asked for. Port 0 picks a free one; `host` is where the API listens, nothing else."""

    data_dir: Path = Path(".scrip")
    api_port: int = 8080
    temporal_port: int = 7233
    ui_port: int = 8233
    host: str = LOOPBACK
    ready_file: Path | None = None


@dataclass(frozen=True)
class Credentials:
    """The first organization and its API key."""

    organization_id: str
    api_key: str


def up(options: UpOptions) -> int:
    """Run Scrip until it is asked to stop and return the exit status of the command.

    0 after Ctrl-C, SIGTERM or SIGHUP; 2 when an option has to change; 1 when something cannot start or does not stay
    up. Nothing is left running in any case. See docs/running.md.
    """
    console = Console(highlight=False, soft_wrap=True)
    try:
        with open_data_directory(options.data_dir) as home:
            _Up(options, home, console).run()
    except StopRequested:
        pass
    except StartupProblem as problem:
        _say(console, f"\n{problem}")
        return problem.exit_status
    _say(console, "Everything has stopped.")
    return 0


class _Up:
    """One run of `scrip up` on a data directory that is ours."""

    def __init__(self, options: UpOptions, home: DataDirectory, console: Console) -> None:
        self._options = options
        self._home = home
        self._console = console
        self._postgres = EmbeddedPostgres(home.postgres)
        self._temporal = EmbeddedTemporal(home.temporal, options.temporal_port, options.ui_port)
        self._api_port = options.api_port
        self._ready_file = options.ready_file.expanduser().resolve() if options.ready_file is not None else None

    def run(self) -> None:
        """Start everything, say where it serves, keep it up, stop it. Raises StartupProblem and StopRequested."""
        try:
            with Keeper(self._home.log_of, Records(self._home.children), self._say) as keeper:
                try:
                    self._start(keeper)
                    keeper.watch()
                    self._say("Stopping ...")
                finally:
                    self._remove_ready_files()
        finally:
            self._postgres.close()

    def _clean_up(self) -> None:
        self._remove_ready_files()
        left = stop_leftovers(self._home.children)
        if left:
            self._say(f"Stopped what an earlier run had left: {', '.join(left)}.")

    def _pick_ports(self) -> None:
        # All at once and before anything runs, so that a taken port is told at once and leaves nothing to stop.
        self._api_port, self._temporal.port, self._temporal.ui_port = pick_ports(
            [
                PortRequest("--api-port", self._options.api_port, self._options.host),
                PortRequest("--temporal-port", self._options.temporal_port),
                PortRequest("--ui-port", self._options.ui_port),
            ]
        )

    def _start(self, keeper: Keeper) -> None:
        self._clean_up()
        self._pick_ports()
        self._say("Starting Postgres and Temporal ...")
        keeper.start(self._temporal.prepare())
        keeper.start(self._postgres.prepare())
        keeper.wait_ready("postgres")
        self._postgres.provision()
        self._say("Preparing the database ...")
        keeper.run_once("migrate", _command("migrate"), self._owner_env())
        credentials = self._load_credentials(keeper)
        keeper.wait_ready("temporal")
        self._say("Starting the worker and the API ...")
        keeper.start(self._worker())
        keeper.start(self._api())
        keeper.wait_ready("worker", "api")
        self._publish(credentials)

    def _load_credentials(self, keeper: Keeper) -> Credentials:
        """Return the first organization and its key; both are made on the first start, and the key is shown once."""
        stored = read_json_object(self._home.credentials)
        if stored is None:
            stored = self._ask(keeper, "bootstrap", "--json")
            if stored.get("api_key") is None:
                # An earlier start ended after the key was made and before it was kept; only its hash is left.
                organization = str(stored["organization_id"])
                stored = self._ask(keeper, "keys", "create", "--org", organization, "--name", "scrip up", "--json")
            write_private_json(self._home.credentials, {name: stored[name] for name in ("organization_id", "api_key")})
        return Credentials(str(stored["organization_id"]), str(stored["api_key"]))

    def _ask(self, keeper: Keeper, *words: str) -> dict[str, Any]:
        """Run a command as the database's owner and return the JSON object it prints."""
        answer: dict[str, Any] = json.loads(keeper.run_once(words[0], _command(*words), self._owner_env()))
        return answer

    def _worker(self) -> Child:
        ready = self._home.worker_ready
        return Child(
            name="worker",
            argv=_command("worker"),
            env={**self._app_env(), "SCRIP_WORKER_READY_FILE": str(ready)},
            ready=ready.exists,
            layer=SERVERS_LAYER,
            # The worker itself gives activities under way 15 seconds to finish.
            grace_seconds=20,
            before_start=lambda: ready.unlink(missing_ok=True),
        )

    def _api(self) -> Child:
        url = f"{self._api_url}/readyz"
        return Child(
            name="api",
            argv=_command("api", "--host", self._options.host, "--port", str(self._api_port)),
            env=self._app_env(),
            ready=lambda: answers_ok(url),
            layer=SERVERS_LAYER,
            # The API itself gives requests under way 10 seconds to finish.
            grace_seconds=15,
        )

    @property
    def _api_url(self) -> str:
        host = {"0.0.0.0": LOOPBACK, "::": "::1", "": LOOPBACK}.get(self._options.host, self._options.host)  # noqa: S104
        return f"http://[{host}]:{self._api_port}" if ":" in host else f"http://{host}:{self._api_port}"

    def _owner_env(self) -> dict[str, str]:
        return {**_clean_env(), "SCRIP_OWNER_DATABASE_URL": self._postgres.owner_url}

    def _app_env(self) -> dict[str, str]:
        return {
            **_clean_env(),
            "SCRIP_DATABASE_URL": self._postgres.app_url,
            "SCRIP_TEMPORAL_ADDRESS": self._temporal.address,
            "SCRIP_TEMPORAL_NAMESPACE": self._temporal.namespace,
        }

    def _publish(self, credentials: Credentials) -> None:
        facts = {
            "api_url": self._api_url,
            "api_key": credentials.api_key,
            "organization_id": credentials.organization_id,
            "temporal_address": self._temporal.address,
            "temporal_ui_url": self._temporal.ui_url,
            "database_url": self._postgres.app_url,
        }
        write_private_json(self._home.serving, {**facts, "owner_database_url": self._postgres.owner_url})
        self._show()
        if self._ready_file is not None:
            try:
                write_private_json(self._ready_file, facts)
            except OSError as error:
                raise StartupProblem(
                    f"The ready file {self._ready_file} cannot be written: {error.strerror}"
                ) from error

    def _show(self) -> None:
        # Lines instead of a table of rich: a table cuts long paths, and these are to be copied.
        rows = {
            "API": self._api_url,
            "API documentation": f"{self._api_url}/docs",
            "API key": f"in {self._home.credentials}",
            "Temporal UI": self._temporal.ui_url,
            "Database URL": f"in {self._home.serving}",
            "Logs": str(self._home.logs),
        }
        lines = "\n".join(f"  {label:<20}{value}" for label, value in rows.items())
        self._say(f"\n{lines}\n\nScrip is ready. Ctrl-C stops everything.")

    def _remove_ready_files(self) -> None:
        self._home.serving.unlink(missing_ok=True)
        if self._ready_file is not None:
            self._ready_file.unlink(missing_ok=True)

    def _say(self, text: str) -> None:
        _say(self._console, text)


def _command(*words: str) -> tuple[str, ...]:
    return (sys.executable, "-m", "cli", *words)


def _clean_env() -> dict[str, str]:
    """Return our environment without what belongs to another deployment, so that no child meets its database."""
    kept = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(("SCRIP_TEMPORAL_", "TEMPORAL_")) and name not in _DATABASE_VARIABLES
    }
    return {**kept, "PYTHONUNBUFFERED": "1"}


_DATABASE_VARIABLES = {"SCRIP_DATABASE_URL", "SCRIP_OWNER_DATABASE_URL"}


def _say(console: Console, text: str) -> None:
    # A closed terminal or pipe must never keep us from stopping the children; rich ends the program on a closed pipe.
    with suppress(OSError, SystemExit):
        console.print(text, markup=False)
