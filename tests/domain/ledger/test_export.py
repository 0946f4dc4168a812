"""An export is all that an auditor needs, and every change to it is found. Contract: README.md "Hash chain"."""

import json
import re
import shutil
import subprocess
import sys
from collections import defaultdict
from collections.abc import Callable, Iterator
from decimal import Decimal
from pathlib import Path
from typing import Any
from uuid import UUID

import psycopg
import pytest

from db.session import Database
from domain import limits
from domain.errors import Refusal
from domain.ids import new_id
from domain.ledger import queries
from domain.ledger.canonical import GENESIS_HASH
from domain.ledger.export import FORMATS, span_of
from domain.ledger.journal import load_accounts, write
from domain.locks import lock_participants
from domain.money import EXACT
from tests.builders import Shop, d, make_asset, open_shop
from tests.conftest import Tenant
from tests.servers import Postgres

VERIFIER = Path(__file__).parents[3] / "tools" / "verify_export.py"
HLEDGER = shutil.which("hledger")

# Texts that a format of lines, of comments or of escapes might stumble over.
AWKWARD = (
    "Welcome",
    'Quote " backslash \\ tab \t newline \n return \r bell \x07 delete \x7f',
    "line separators \u2028 \u2029 \x85 and a form feed \f",
    "; comment  two spaces | bar = 5 EUR @ 3 {4} [2020-01-01] date:2020-01-01",
    "é e\u0301 \U0001f600 \u202e right to left",
    "* (code) ! ~ end comment",
)


@pytest.fixture
def tamper(postgres: Postgres) -> Iterator[Callable[..., None]]:
    """Run one statement as a superuser for whom no guard exists."""
    with psycopg.connect(postgres.superuser_url, autocommit=True) as connection:
        connection.execute("set session_replication_role = replica")

        def run(statement: Any, *params: Any) -> None:
            assert connection.execute(statement, params).rowcount > 0

        yield run


@pytest.fixture
async def shop(database: Database, organization: Tenant) -> Shop:
    return await open_shop(database, organization.id)


async def post(database: Database, shop: Shop, organization: Tenant, *assets: tuple[UUID, str], **fields: Any) -> UUID:
    """One entry that credits alice with amounts of assets."""
    async with database.transaction(organization.id, api_key_id=organization.api_key_id) as tx:
        await lock_participants(tx, [shop.alice])
        books = await load_accounts(tx, [shop.alice], [asset_id for asset_id, _ in assets])
        movements = []
        for asset_id, amount in assets:
            movements.append((books.system("SYSTEM_ISSUANCE", asset_id), d(f"-{amount}")))
            movements.append((books.account("PARTICIPANT", shop.alice, asset_id, "AVAILABLE"), d(amount)))
        books.post("CREDIT", movements, program_id=shop.program_id, **fields)
        await write(tx, books)
    return books.entries[0].id


@pytest.fixture
async def entries(database: Database, organization: Tenant, shop: Shop) -> list[UUID]:
    """A ledger with awkward texts, two assets and one entry of four postings."""
    async with database.transaction(organization.id) as tx:
        coins = await make_asset(tx, shop.program_id, scale=18, symbol="1COIN")
    both = ((shop.asset_id, "1000"), (coins, "0.000000000000000001"))
    return [
        *[
            await post(database, shop, organization, (shop.asset_id, f"{n}.5"), description=text)
            for n, text in enumerate(AWKWARD, start=1)
        ],
        await post(database, shop, organization, (coins, "12345678901234567890.5"), description=None),
        await post(database, shop, organization, *both, reference_id="a, b: c ; d\ne", description="x"),
    ]


async def exported(database: Database, organization: Tenant, file_format: str = "jsonl", first: int = 1) -> str:
    span = await span_of(database, organization.id, first)
    return "".join([chunk.text async for chunk in FORMATS[file_format](database, span)])


def verify(export: str | list[Any], tmp_path: Path, *options: str) -> subprocess.CompletedProcess[str]:
    """Run the verifier as an auditor would: nothing of ours is importable, nor anything installed."""
    if isinstance(export, list):
        export = "".join(f"{json.dumps(entry, ensure_ascii=False)}\n" for entry in export)
    file = tmp_path / "export.jsonl"
    file.write_bytes(export.encode())
    return run_verifier(file, *options)


def run_verifier(file: Path, *options: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-I", "-S", "-B", str(VERIFIER), str(file), *options]
    return subprocess.run(command, capture_output=True, text=True, check=False, cwd=file.parent, env={})


def parsed(export: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in export.split("\n")[:-1]]


# --- JSON Lines --------------------------------------------------------------------------------------------------


async def test_the_verifier_uses_nothing_but_the_standard_library() -> None:
    imported = set(re.findall(r"^\s*(?:import|from) (\w+)", VERIFIER.read_text(), re.MULTILINE))

    assert imported <= sys.stdlib_module_names


async def test_an_export_verifies_without_our_code(
    database: Database, organization: Tenant, entries: list[UUID], tmp_path: Path
) -> None:
    export = await exported(database, organization)

    done = verify(export, tmp_path)

    assert done.returncode == 0, done.stdout
    assert f"entries    {len(entries)}, sequence 1 to {len(entries)}" in done.stdout
    assert "(genesis)" in done.stdout
    assert done.stdout.endswith("VALID\n")
    assert [entry["id"] for entry in parsed(export)] == [str(entry_id) for entry_id in entries]


async def test_a_line_has_what_the_api_shows(
    database: Database, organization: Tenant, entries: list[UUID], shop: Shop
) -> None:
    line = parsed(await exported(database, organization))[1]
    async with database.transaction(organization.id) as tx:
        entry, postings = await queries.get_entry(tx, entries[1])

    assert line["prev_hash"] == entry["prev_hash"].hex()
    assert line["entry_hash"] == entry["entry_hash"].hex()
    assert (line["sequence"], line["hash_version"], line["description"]) == (2, 1, AWKWARD[1])
    assert (line["organization_id"], line["program_id"]) == (str(organization.id), str(shop.program_id))
    assert line["created_by_api_key_id"] == str(organization.api_key_id)
    assert (line["event_id"], line["rule_id"], line["reference_id"]) == (None, None, None)
    assert [posting["id"] for posting in line["postings"]] == [str(posting["id"]) for posting in postings]
    assert [posting["amount"] for posting in line["postings"]] == ["-2.5", "2.5"]
    assert [posting["entity_id"] for posting in line["postings"]] == [None, str(shop.alice)]


async def test_pages_make_no_difference(
    database: Database, organization: Tenant, entries: list[UUID], monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = {name: await exported(database, organization, name) for name in FORMATS}
    for size in (1, 3, len(entries)):
        monkeypatch.setattr(limits, "VERIFY_PAGE", size)
        assert {name: await exported(database, organization, name) for name in FORMATS} == whole


async def test_an_export_ends_at_the_head_as_it_was(
    database: Database, organization: Tenant, entries: list[UUID], shop: Shop
) -> None:
    span = await span_of(database, organization.id)
    await post(database, shop, organization, (shop.asset_id, "1"), description="late")

    chunks = [chunk async for chunk in FORMATS["jsonl"](database, span)]

    assert sum(chunk.entries for chunk in chunks) == span.entries == len(entries)


async def test_an_empty_ledger_exports_nothing_and_is_valid(
    database: Database, organization: Tenant, tmp_path: Path
) -> None:
    assert await exported(database, organization) == ""
    assert verify("", tmp_path).returncode == 0


async def test_what_cannot_be_exported_is_refused(database: Database, organization: Tenant) -> None:
    with pytest.raises(Refusal, match="organization not found"):
        await span_of(database, new_id())
    with pytest.raises(Refusal):
        await span_of(database, organization.id, 0)


async def test_a_part_of_the_chain_hangs_on_the_hash_before_it(
    database: Database, organization: Tenant, entries: list[UUID], tmp_path: Path
) -> None:
    before = parsed(await exported(database, organization))[2]["entry_hash"]
    part = await exported(database, organization, first=4)

    assert [entry["sequence"] for entry in parsed(part)] == list(range(4, len(entries) + 1))
    assert verify(part, tmp_path).returncode == 0
    assert f"begins at  {before}\n" in verify(part, tmp_path).stdout
    assert verify(part, tmp_path, "--previous", before).returncode == 0
    assert verify(part, tmp_path, "--previous", "f" * 64).returncode == 1


async def test_a_kept_head_tells_a_shortened_export(
    database: Database, organization: Tenant, entries: list[UUID], tmp_path: Path
) -> None:
    export = await exported(database, organization)
    head = parsed(export)[-1]["entry_hash"]

    assert verify(export, tmp_path, "--head", head).returncode == 0
    assert verify(parsed(export)[:-1], tmp_path).returncode == 0, "a prefix of a chain is a chain"
    assert verify(parsed(export)[:-1], tmp_path, "--head", head).returncode == 1


CHANGES: dict[str, Callable[[dict[str, Any]], object]] = {
    "an amount": lambda entry: entry["postings"][1].update(amount="9000"),
    "both amounts": lambda entry: [
        posting.update(amount=amount) for posting, amount in zip(entry["postings"], ("-9", "9"), strict=True)
    ],
    "an amount's form": lambda entry: entry["postings"][1].update(amount=entry["postings"][1]["amount"] + "0"),
    "an amount's type": lambda entry: entry["postings"][1].update(amount=4),
    "a holder": lambda entry: entry["postings"][1].update(entity_id=str(new_id())),
    "a posting's id": lambda entry: entry["postings"][0].update(id=str(new_id())),
    "the order of postings": lambda entry: entry["postings"].reverse(),
    "no postings": lambda entry: entry.update(postings=[]),
    "postings of another kind": lambda entry: entry.update(postings=[1, 2]),
    "the description": lambda entry: entry.update(description="Goodbye"),
    "the reference": lambda entry: entry.update(reference_id="x"),
    "the time": lambda entry: entry.update(created_at="2020-01-01T00:00:00Z"),
    "the version": lambda entry: entry.update(hash_version=2),
    "the version's type": lambda entry: entry.update(hash_version=True),
    "the sequence": lambda entry: entry.update(sequence=5),
    "the sequence's type": lambda entry: entry.update(sequence="4"),
    "the previous hash": lambda entry: entry.update(prev_hash=GENESIS_HASH.hex()),
    "the hash": lambda entry: entry.update(entry_hash="0" * 64),
    "the hash's case": lambda entry: entry.update(entry_hash=entry["entry_hash"].upper()),
    "a member more": lambda entry: entry.update(note="trust me"),
    "a member of a posting more": lambda entry: entry["postings"][0].update(note="trust me"),
    "a member less": lambda entry: entry.pop("rule_id"),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES.keys())
async def test_whatever_changes_in_an_export_is_found_and_named(
    database: Database, organization: Tenant, entries: list[UUID], tmp_path: Path, change: Callable[[Any], object]
) -> None:
    lines = parsed(await exported(database, organization))
    change(lines[3])

    done = verify(lines, tmp_path)

    assert done.returncode == 1
    failed = [line for line in done.stdout.splitlines() if line.startswith("FAILED")]
    assert str(entries[3]) in failed[0] or failed[0].startswith("FAILED line 4:")
    assert done.stdout.endswith("INVALID\n")
    assert done.stderr == ""


async def test_lines_that_are_missing_doubled_or_moved_are_found(
    database: Database, organization: Tenant, entries: list[UUID], tmp_path: Path
) -> None:
    lines = parsed(await exported(database, organization))

    for wrong, first_invalid in (
        (lines[1:3] + lines[4:], entries[4]),
        ([*lines[:3], lines[2], *lines[3:]], entries[2]),
        ([lines[0], lines[2], lines[1], *lines[3:]], entries[2]),
        (lines[4:] + lines[:4], entries[0]),
    ):
        done = verify(wrong, tmp_path)
        assert done.returncode == 1
        assert f"FAILED entry {first_invalid}" in done.stdout.splitlines()[0]


async def test_hashes_computed_anew_do_not_save_an_entry_that_makes_value(
    database: Database, organization: Tenant, entries: list[UUID], tmp_path: Path
) -> None:
    """The head kept elsewhere would tell, and the sum does at once."""
    namespace: dict[str, Any] = {"__name__": "verify_export"}
    exec(compile(VERIFIER.read_text(), VERIFIER, "exec"), namespace)
    lines = parsed(await exported(database, organization))
    lines[-1]["postings"][1]["amount"] = "9000"
    lines[-1]["entry_hash"] = namespace["hash_of"](lines[-1])

    done = verify(lines, tmp_path)

    assert done.returncode == 1
    assert "not to zero" in done.stdout


@pytest.mark.parametrize(
    "text",
    ["{", "[]", "null", '{"id":1,"id":2}', "NaN", '{"a":1.5}', "[" * 100_000, "\ud800", '{"\x1b[2J":1}', "1" * 5_000],
)
async def test_what_is_no_export_is_refused_without_a_traceback(tmp_path: Path, text: str) -> None:
    file = tmp_path / "export.jsonl"
    file.write_bytes(text.encode("utf-8", "surrogatepass") + b"\n")

    done = run_verifier(file)

    assert done.returncode == 1
    assert done.stderr == ""
    assert "FAILED line 1" in done.stdout
    assert "\x1b" not in done.stdout


async def test_a_file_that_is_not_there_is_status_2(tmp_path: Path) -> None:
    assert run_verifier(tmp_path / "nothing").returncode == 2


async def test_what_was_tampered_with_in_the_database_is_exported_as_it_is_and_found(
    database: Database, organization: Tenant, entries: list[UUID], tamper: Callable[..., None], tmp_path: Path
) -> None:
    for statement in (
        "update posting set amount = amount * 2 where entry_id = %s and ordinal = 1",
        "update posting set amount = 'NaN' where entry_id = %s and ordinal = 0",
        "update posting set account_id = gen_random_uuid() where entry_id = %s and ordinal = 0",
        "delete from posting where entry_id = %s",
    ):
        tamper(statement, entries[3])
        done = verify(await exported(database, organization), tmp_path)
        assert done.returncode == 1
        assert f"FAILED entry {entries[3]}" in done.stdout
        assert await exported(database, organization, "hledger"), "it can still be written"


# --- hledger -----------------------------------------------------------------------------------------------------

_POSTING = re.compile(
    r'    ([a-z]+(?::[^: ]+){3}|system(?::[^: ]+){3})  (-?[0-9.]+) ("[A-Za-z0-9]+")(?: = (-?[0-9.]+) \3)?'
)
_TITLE = re.compile(r"\d{4}-\d\d-\d\d \(([0-9a-f-]{36})\) ([A-Z_]+)( \| [^;\n]*)?")


def folded(journal: str) -> dict[tuple[str, str], Decimal]:
    """The balances of a journal by account and commodity; every line is of a form that we mean to write."""
    accounts, commodities = set(), set()
    balances: dict[tuple[str, str], Decimal] = defaultdict(Decimal)
    for line in journal.splitlines():
        if line.startswith("commodity "):
            commodities.add(line.split(" ")[2])
        elif line.startswith("account "):
            accounts.add(line.partition(" ")[2])
        elif match := _POSTING.fullmatch(line):
            account, amount, commodity, asserted = match.groups()
            assert account in accounts
            assert commodity in commodities
            balances[account, commodity] = EXACT.add(balances[account, commodity], Decimal(amount))
            assert asserted is None or balances[account, commodity] == Decimal(asserted)
        else:
            assert not line or line == "decimal-mark ." or line.lstrip().startswith(";") or _TITLE.fullmatch(line), line
    return {key: balance for key, balance in balances.items() if balance}


async def stored_balances(database: Database, organization: Tenant) -> dict[tuple[str, str], Decimal]:
    query = """
        select a.entity_type, a.entity_id, s.symbol, a.bucket, sum(p.amount) as total
        from posting p join account a using (organization_id) join asset s using (organization_id)
        where p.organization_id = %s and a.id = p.account_id and s.id = p.asset_id
        group by 1, 2, 3, 4
    """
    async with database.transaction(organization.id) as tx:
        rows = await tx.rows(query, (organization.id,))
    found = {}
    for row in rows:
        owner = row["entity_type"].lower().replace("system_", "system:")
        if row["entity_id"] is not None:
            owner = f"{owner}:{row['entity_id']}"
        found[f"{owner}:{row['symbol']}:{row['bucket'].lower()}", f'"{row["symbol"]}"'] = row["total"]
    return found


async def test_a_journal_declares_what_it_uses_and_folds_to_our_balances(
    database: Database, organization: Tenant, entries: list[UUID]
) -> None:
    journal = await exported(database, organization, "hledger")

    assert folded(journal) == await stored_balances(database, organization)
    assert [match[1] for match in _TITLE.finditer(journal)] == [str(entry_id) for entry_id in entries]


async def test_a_part_of_a_journal_asserts_no_balances(
    database: Database, organization: Tenant, entries: list[UUID]
) -> None:
    part = await exported(database, organization, "hledger", first=4)

    assert " = " not in re.sub(r"\n[^ ].*", "", part)
    assert len(_TITLE.findall(part)) == len(entries) - 3


def hledger(journal: str, tmp_path: Path, *words: str) -> subprocess.CompletedProcess[str]:
    assert HLEDGER is not None
    file = tmp_path / "ledger.journal"
    file.write_bytes(journal.encode())
    environment = {"LANG": "C.UTF-8", "LC_ALL": "C.UTF-8", "HOME": str(tmp_path)}
    command = [HLEDGER, "-f", str(file), *words]
    return subprocess.run(command, capture_output=True, text=True, check=False, env=environment)


@pytest.mark.skipif(HLEDGER is None, reason="hledger is not installed: apt-get install hledger")
async def test_hledger_accepts_the_journal_and_shows_our_balances(
    database: Database, organization: Tenant, entries: list[UUID], tmp_path: Path
) -> None:
    journal = await exported(database, organization, "hledger")

    for words in (["check"], ["check", "--strict"], ["check", "ordereddates"]):
        checked = hledger(journal, tmp_path, *words)
        assert checked.returncode == 0, checked.stderr
    shown = hledger(journal, tmp_path, "balance", "--flat", "--layout=bare", "--no-total", "-O", "csv")
    assert shown.returncode == 0, shown.stderr
    rows = [line.strip('"').split('","') for line in shown.stdout.splitlines()[1:]]
    balances = {(account, f'"{commodity}"'): Decimal(amount) for account, commodity, amount in rows}
    assert balances == await stored_balances(database, organization)


@pytest.mark.skipif(HLEDGER is None, reason="hledger is not installed: apt-get install hledger")
async def test_hledger_finds_a_tampered_amount_and_a_tampered_balance(
    database: Database, organization: Tenant, entries: list[UUID], tamper: Callable[..., None], tmp_path: Path
) -> None:
    tamper("update posting set balance = balance + 1 where entry_id = %s and ordinal = 1", entries[2])
    asserted = hledger(await exported(database, organization, "hledger"), tmp_path, "check")
    tamper("update posting set amount = amount + 1 where entry_id = %s and ordinal = 1", entries[2])
    unbalanced = hledger(await exported(database, organization, "hledger"), tmp_path, "check")

    assert asserted.returncode != 0
    assert "assertion" in asserted.stderr
    assert unbalanced.returncode != 0
    assert str(entries[2]) in unbalanced.stderr
