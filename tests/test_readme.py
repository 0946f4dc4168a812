"""Goal: what newcomers read is true: the quickstart works as printed, links lead somewhere, no variable is missing."""

import re
import shutil
import subprocess
from pathlib import Path

import pytest

from settings import Settings
from tests.system import ROOT, System, running_system  # noqa: F401

README = (ROOT / "README.md").read_text()
DOCS = sorted((ROOT / "docs").glob("*.md"))
PAGES = [ROOT / "README.md", *DOCS]


def section(title: str) -> str:
    return re.split(r"^## ", README.partition(f"## {title}\n")[2], maxsplit=1, flags=re.MULTILINE)[0]


def code(language: str, text: str) -> list[str]:
    blocks = re.findall(r"^```(\w*)\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)
    return [content for found, content in blocks if found == language]


def test_the_quickstart_works_as_it_is_printed(system: System) -> None:
    script = "\n".join(code("bash", section("Quickstart")))
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", script],
        cwd=system.directory,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert '"available":"10"' in done.stdout
    assert '"valid":true' in done.stdout


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_link_leads_to_a_file(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#\s]+)", page.read_text()):
        assert target.startswith("http") or (page.parent / target).exists(), f"{page.name} links to {target}"


def test_the_index_of_the_documentation_is_complete() -> None:
    listed = set(re.findall(r"\]\(([^)#\s]+)", (ROOT / "docs" / "README.md").read_text()))
    there = {path.relative_to(ROOT / "docs").as_posix() for path in (ROOT / "docs").rglob("*.md")} - {"README.md"}
    assert there - listed == set()


def test_the_tree_names_what_is_there() -> None:
    (tree,) = [block for block in code("", section("How it is put together")) if "cli.py" in block]
    named = {line.split()[0].rstrip("/") for line in tree.splitlines()}
    assert all((ROOT / name).exists() for name in named)
    packages = {path.parent.name for path in ROOT.glob("*/__init__.py")}
    assert packages <= named


def test_the_two_commands_are_targets_of_the_makefile() -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    assert set(re.findall(r"\bmake ([a-z-]+)", "".join(code("console", README)))) == {"run", "test"}
    assert {"run", "test", "check"} <= targets


@pytest.mark.skipif(shutil.which("bash") is None, reason="CI's script is for bash")
def test_the_script_of_ci_calls_both_targets_and_is_executable() -> None:
    script = ROOT / ".ci" / "run"
    assert script.stat().st_mode & 0o111
    assert "set -euo pipefail" in script.read_text()
    assert [f"make {name}" in script.read_text() for name in ("check", "test")] == [True, True]
    subprocess.run(["bash", "-n", script], check=True)


def test_every_variable_is_documented_with_its_default() -> None:
    rows = re.findall(
        r"^\| `(SCRIP_\w+)` \| (.*?) \| (.+) \|$", (ROOT / "docs/configuration.md").read_text(), re.MULTILINE
    )
    documented = {name: default for name, default, _ in rows}
    assert len(documented) == len(rows)
    assert documented == {f"SCRIP_{name.upper()}": default_of(name) for name in Settings.model_fields}


def default_of(field: str) -> str:
    """A setting's default as it would be written in the environment."""
    value = Settings.model_fields[field].default
    if hasattr(value, "get_secret_value"):
        value = value.get_secret_value() or None
    if value is None:
        return "none"
    if isinstance(value, tuple):
        return str(list(value)).replace(" ", "")
    return str(value).lower() if isinstance(value, bool) else str(value)


def test_a_list_can_be_set_as_it_is_documented(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SCRIP_RETRY_SCHEDULE_S", default_of("retry_schedule_s"))
    assert Settings().retry_schedule_s == (2, 4, 8, 16, 32)
