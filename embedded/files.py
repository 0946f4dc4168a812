"""Small private files that are either whole or absent."""

import json
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from embedded.problems import StartupProblem


def write_private_json(path: Path, value: Mapping[str, Any]) -> None:
    """Write `value` to `path` with mode 0600; a reader sees the old file or the whole new one, also after a crash."""
    descriptor, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(descriptor, "w", encoding="utf-8") as file:
            json.dump(value, file, indent=2)
            file.write("\n")
            file.flush()
            os.fsync(file.fileno())
        os.replace(name, path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


def read_json_object(path: Path) -> dict[str, Any] | None:
    """Return the JSON object stored at `path`, or None when there is no such file.

    Raises StartupProblem when the file holds anything else.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except ValueError as error:
        raise StartupProblem(f"{path} is damaged ({error}). Restore it from a backup of the data directory.") from error
    if not isinstance(value, dict):
        raise StartupProblem(f"{path} is damaged (no JSON object). Restore it from a backup of the data directory.")
    return value


def tail(path: Path, lines: int = 20) -> str:
    """Return the last `lines` lines of a text file, or an empty string when it does not exist."""
    try:
        with path.open("rb") as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(max(0, size - 16 * 1024))
            text = file.read().decode("utf-8", errors="replace")
    except FileNotFoundError:
        return ""
    return "\n".join(text.splitlines()[-lines:])
