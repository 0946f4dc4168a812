"""The data directory of the embedded mode (`.scrip/`): whose it is, who uses it, what it remembers.

SCRIP_DATA        says that the directory is ours
lock              held while `scrip up` runs
credentials.json  the first organization's id and API key
children.json     the processes of the running or last `scrip up`
serving.json      where everything serves, while it does
logs/  postgres/  temporal/
"""

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from embedded.files import read_json_object
from embedded.problems import USAGE_EXIT_STATUS, StartupProblem

MARKER = "SCRIP_DATA"


class DataDirectory:
    """Paths below an opened data directory; made by `open_data_directory`."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.logs = root / "logs"
        self.postgres = root / "postgres"
        self.temporal = root / "temporal"
        self.credentials = root / "credentials.json"
        self.children = root / "children.json"
        self.serving = root / "serving.json"
        self.worker_ready = root / "worker.ready"

    def log_of(self, name: str) -> Path:
        """Return the log file of the child `name`."""
        return self.logs / f"{name}.log"


@contextmanager
def open_data_directory(path: Path) -> Iterator[DataDirectory]:
    """Make or open the data directory at `path` and hold it for this process alone.

    The directory gets mode 0700. Raises StartupProblem when it holds something else, belongs to another user or is
    used by another `scrip up`.
    """
    root = path.expanduser().resolve()
    try:
        _claim(root)
        descriptor = os.open(root / "lock", os.O_RDWR | os.O_CREAT, 0o600)
    except OSError as error:
        raise StartupProblem(
            f"The data directory {root} cannot be used ({error.strerror}). Choose another with --data-dir.",
            exit_status=USAGE_EXIT_STATUS,
        ) from error
    try:
        _lock(descriptor, root)
        yield DataDirectory(root)
    finally:
        os.close(descriptor)


def serving(path: Path) -> dict[str, str] | None:
    """Return where a running `scrip up` on the data directory `path` serves, or None when none does.

    The fields of the ready file, and `owner_database_url` for commands that manage the platform.
    """
    found = read_json_object(path.expanduser().resolve() / "serving.json")
    return None if found is None else {name: str(value) for name, value in found.items()}


def _claim(root: Path) -> None:
    root.mkdir(mode=0o700, parents=True, exist_ok=True)
    marker = root / MARKER
    if not marker.exists() and any(root.iterdir()):
        raise StartupProblem(
            f"{root} is not empty and not a data directory of Scrip. Choose another with --data-dir.",
            exit_status=USAGE_EXIT_STATUS,
        )
    marker.touch(mode=0o600)
    root.chmod(0o700)
    (root / "logs").mkdir(mode=0o700, exist_ok=True)


def _lock(descriptor: int, root: Path) -> None:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        holder = os.pread(descriptor, 32, 0).decode(errors="replace").strip()
        raise StartupProblem(
            f"Another `scrip up` (pid {holder or 'unknown'}) is using {root}. "
            "Stop it, or choose another directory with --data-dir.",
            exit_status=USAGE_EXIT_STATUS,
        ) from error
    with suppress(OSError):
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, f"{os.getpid()}\n".encode(), 0)
