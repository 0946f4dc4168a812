"""`scrip export`: a ledger as a file, for whoever checks it without Scrip. docs/ledger.md "Exports"."""

import asyncio
import json
import subprocess
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from uuid import UUID

import psycopg
import pytest
from typer.testing import CliRunner, Result

import cli
from db.session import Database, DatabaseUnavailable
from domain import limits
from domain.clock import system_clock
from domain.ids import new_id
from domain.ledger.export import FORMATS, Chunk, Span
from domain.ledger.journal import load_accounts, write
from domain.locks import lock_participants
from settings import Settings
from tests.builders import d, open_shop
from tests.conftest import Tenant
from tests.servers import Postgres

VERIFIER = Path(__file__).parent.parent / "tools" / "verify_export.py"
ENTRIES = 5


@pytest.fixture(autouse=True)
def _environment(monkeypatch: pytest.MonkeyPatch, settings: Settings) -> None:
    monkeypatch.setattr(cli, "get_settings", lambda: settings)
    monkeypatch.setattr(limits, "VERIFY_PAGE", 2)


@pytest.fixture
def entry_ids(postgres: Postgres, organization: Tenant) -> list[UUID]:
    """Five credits in the organization's ledger, with a text that is not ASCII."""

    async def fill() -> list[UUID]:
        database = Database(postgres.app_url, size=1, timeout_s=5, clock=system_clock)
        await database.open()
        shop = await open_shop(database, organization.id)
        async with database.transaction(organization.id) as tx:
            await lock_participants(tx, [shop.alice])
            books = await load_accounts(tx, [shop.alice], [shop.asset_id])
            source = books.system("SYSTEM_ISSUANCE", shop.asset_id)
            alice = books.account("PARTICIPANT", shop.alice, shop.asset_id, "AVAILABLE")
            for n in range(1, ENTRIES + 1):
                movements = [(source, d(f"-{n}")), (alice, d(str(n)))]
                books.post("CREDIT", movements, program_id=shop.program_id, description="Grüße \U0001f600")
            await write(tx, books)
        await database.close()
        return [entry.id for entry in books.entries]

    return asyncio.run(fill())


def export(*arguments: object) -> Result:
    return CliRunner().invoke(cli.app, ["export", *map(str, arguments)])


def verify(file: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-I", "-S", str(VERIFIER), str(file)], capture_output=True, text=True, check=False
    )


def test_a_file_has_every_entry_and_verifies(organization: Tenant, entry_ids: list[UUID], tmp_path: Path) -> None:
    file = tmp_path / "ledger.jsonl"
    file.write_text("an older export")

    result = export("--org", organization.id, "--output", file)

    assert result.exit_code == 0, result.output
    assert result.stdout == "", "the progress bar goes to stderr"
    assert [json.loads(line)["id"] for line in file.read_bytes().splitlines()] == [str(id_) for id_ in entry_ids]
    assert verify(file).returncode == 0
    assert list(tmp_path.iterdir()) == [file]


def test_without_a_file_it_goes_to_standard_output(organization: Tenant, entry_ids: list[UUID]) -> None:
    result = export("--org", organization.id, "--from-sequence", 4)

    assert result.exit_code == 0
    assert [json.loads(line)["sequence"] for line in result.stdout_bytes.splitlines()] == [4, 5]
    assert result.stderr == ""


def test_the_other_format_is_a_journal(organization: Tenant, entry_ids: list[UUID]) -> None:
    journal = export("--org", organization.id, "--format", "hledger").stdout

    assert journal.count("CREDIT | Grüße \U0001f600\n") == ENTRIES
    assert all(str(entry_id) in journal for entry_id in entry_ids)


def test_an_export_that_fails_leaves_the_older_file(
    organization: Tenant, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def breaks(database: Database, span: Span) -> AsyncIterator[Chunk]:
        yield Chunk("half a line", 1)
        raise DatabaseUnavailable("the connection was lost")

    monkeypatch.setitem(FORMATS, "jsonl", breaks)
    file = tmp_path / "ledger.jsonl"
    file.write_text("an older export")

    result = export("--org", organization.id, "--output", file)

    assert result.exit_code == 1
    assert "out of reach" in result.stderr
    assert file.read_text() == "an older export"
    assert list(tmp_path.iterdir()) == [file]


@pytest.mark.parametrize("where", ["missing/ledger.jsonl", "."])
def test_a_file_that_cannot_be_written_is_told(
    organization: Tenant, entry_ids: list[UUID], tmp_path: Path, where: str
) -> None:
    result = export("--org", organization.id, "--output", tmp_path / where)

    assert result.exit_code == 1
    assert "Cannot write" in result.stderr


def test_an_unknown_organization_or_format_is_refused(organization: Tenant) -> None:
    assert export("--org", new_id()).exit_code == 1
    assert export("--org", organization.id, "--format", "xml").exit_code == 2
    assert export("--org", organization.id, "--from-sequence", 0).exit_code == 2


def test_one_changed_posting_is_found_by_the_command_and_by_the_verifier(
    organization: Tenant, entry_ids: list[UUID], postgres: Postgres, tmp_path: Path
) -> None:
    """The integrity report, `GET /v1/ledger/verify` and the workflow: tests/workflows/test_ledger_verification.py."""
    with psycopg.connect(postgres.superuser_url, autocommit=True) as attacker:
        attacker.execute("set session_replication_role = replica")
        attacker.execute("update posting set amount = 7 where entry_id = %s and ordinal = 1", (entry_ids[2],))
    file = tmp_path / "ledger.jsonl"
    export("--org", organization.id, "--output", file)

    command = CliRunner().invoke(cli.app, ["verify", "--json", "--org", str(organization.id)])
    audit = verify(file)

    assert command.exit_code == 1
    assert json.loads(command.stdout)[0]["first_invalid_entry_id"] == str(entry_ids[2])
    assert audit.returncode == 1
    assert f"FAILED entry {entry_ids[2]} (sequence 3)" in audit.stdout
