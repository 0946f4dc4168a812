#!/usr/bin/env python3
"""Check a ledger export of Scrip without Scrip: `python verify_export.py FILE`.

FILE is what `scrip export --format jsonl` wrote; `-` reads it from standard input. This program is its own proof: it
uses Python's standard library alone, trusts nothing in the file, and is short enough to read before you run it.

What is checked, for every entry (a line) in turn:

1. Form. The line is one JSON object with exactly the members below, each name once.
2. Sequence. It is one more than in the line before: nothing is missing, doubled or out of order.
3. Chain. `prev_hash` is the `entry_hash` of the line before; before sequence 1 it is 64 zeros.
4. Content. `entry_hash` is the SHA-256 of the entry's canonical form (RFC 8785 JSON), computed here anew.
5. Balance. It has postings, and they sum to exactly zero per asset.

Whoever changes, removes or inserts an entry would have to compute every later hash anew. So compare the last hash,
printed at the end, with one that you kept elsewhere or that the running system attests: `--head HASH` does that. An
export that begins after sequence 1 hangs on the hash before it, which is printed too: `--previous HASH` compares it.

Exit status: 0 all of it holds; 1 something doesn't, and which entry; 2 the file could not be read.
"""

import argparse
import contextlib
import hashlib
import json
import re
import sys
from collections.abc import Iterable
from dataclasses import dataclass, field
from decimal import Context, Decimal, Inexact
from typing import Any

Entry = dict[str, Any]

GENESIS = "0" * 64
HASH_VERSION = 1

# The members of a line. All but `entry_hash` are hashed, `hash_version` under the name `version`.
ENTRY_MEMBERS = {
    "sequence", "entry_hash", "prev_hash", "hash_version", "id", "organization_id", "program_id", "action_type",
    "description", "event_id", "rule_id", "reference_id", "created_by_api_key_id", "created_at", "postings",
}  # fmt: skip
POSTING_MEMBERS = {"id", "entity_type", "entity_id", "asset_id", "bucket", "amount"}

# An amount is text: no exponent, no superfluous zeros, so that each number has one way to be written.
AMOUNT = re.compile(r"-?(0|[1-9][0-9]{0,59})(\.[0-9]{0,59}[1-9])?", re.ASCII)

# Sums are exact: a result that would need rounding is an error, never a rounded figure.
EXACT = Context(prec=200, traps=[Inexact])

MOST_PRINTED = 20


class Wrong(Exception):
    """What is wrong with an entry, in words."""


@dataclass
class Found:
    """What has been read so far, and what failed. `first` is None until an entry has been read."""

    entries: int = 0
    first: int | None = None
    last: int = 0
    previous: str = GENESIS
    hash: str = GENESIS
    failures: list[str] = field(default_factory=list)


def main() -> int:
    """Check the file named on the command line; the exit status."""
    parser = argparse.ArgumentParser(description="Check a JSON Lines export of a Scrip ledger.")
    parser.add_argument("file", help="the export; - is standard input")
    parser.add_argument("--head", metavar="HASH", help="the hash that the last entry must have")
    parser.add_argument("--previous", metavar="HASH", help="the hash before the first entry, if that is not sequence 1")
    options = parser.parse_args()
    try:
        with contextlib.ExitStack() as opened:
            lines = sys.stdin.buffer if options.file == "-" else opened.enter_context(open(options.file, "rb"))
            found = check(lines, options.previous)
    except OSError as error:
        print(f"cannot read {options.file}: {error}", file=sys.stderr)
        return 2
    if options.head is not None and options.head != found.hash:
        found.failures.append(f"the last hash is not {options.head}: entries are missing at the end, or were changed")
    report(found)
    return 1 if found.failures else 0


def report(found: Found) -> None:
    """Print what was found."""
    for failure in found.failures[:MOST_PRINTED]:
        # What a tampered file says must not reach the terminal as a command.
        print("FAILED", "".join(char if char.isprintable() else "?" for char in failure))
    if len(found.failures) > MOST_PRINTED:
        print(f"FAILED and {len(found.failures) - MOST_PRINTED} more")
    span = f", sequence {found.first} to {found.last}" if found.first is not None else ""
    print(f"entries    {found.entries}{span}")
    print(f"begins at  {found.previous}{' (genesis)' if found.previous == GENESIS else ''}")
    print(f"ends at    {found.hash}")
    print("INVALID" if found.failures else "VALID")


def check(lines: Iterable[bytes], previous: str | None) -> Found:
    """Check every line. What fails is noted, and the next line is checked against what this one claims to be."""
    found = Found()
    for number, line in enumerate(lines, start=1):
        name = f"line {number}"
        try:
            entry = parse(line)
            name = f"entry {entry['id']} (sequence {entry['sequence']})"
            if found.first is None:
                begin(found, entry, previous)
            sequence, before = found.last + 1, found.hash
            found.entries += 1
            found.last, found.hash = entry["sequence"], entry["entry_hash"]
            check_entry(entry, sequence, before)
        except Wrong as wrong:
            found.failures.append(f"{name}: {wrong}")
    return found


def begin(found: Found, entry: Entry, previous: str | None) -> None:
    """Note where the export begins: at genesis, or after an entry that is not in it."""
    found.first, found.last = entry["sequence"], entry["sequence"] - 1
    # Only the hash before sequence 1 is known for certain; any other is the caller's to know.
    found.previous = GENESIS if entry["sequence"] == 1 else (previous or entry["prev_hash"])
    found.hash = found.previous


def parse(line: bytes) -> Entry:
    """The entry on one line, with every member there and of the right kind. Raises Wrong."""
    try:
        text = line.decode("utf-8")
        entry: Entry = json.loads(text, object_pairs_hook=object_of, parse_constant=refuse, parse_float=refuse)
    except (ValueError, RecursionError) as error:
        raise Wrong(f"not an entry in JSON: {error}") from None
    require_members(entry, ENTRY_MEMBERS, "the entry")
    if type(entry["sequence"]) is not int or entry["sequence"] < 1:
        raise Wrong("its sequence is not a positive number")
    if type(entry["hash_version"]) is not int or entry["hash_version"] != HASH_VERSION:
        raise Wrong(f"its hash_version is not {HASH_VERSION}")
    if not isinstance(entry["postings"], list):
        raise Wrong("its postings are not a list")
    for name in ("entry_hash", "prev_hash"):
        if not isinstance(entry[name], str) or not re.fullmatch("[0-9a-f]{64}", entry[name]):
            raise Wrong(f"its {name} is not 64 lower-case hex digits")
    return entry


def check_entry(entry: Entry, sequence: int, before: str) -> None:
    """Check one entry that should follow the hash `before`. Raises Wrong."""
    if entry["sequence"] != sequence:
        raise Wrong(f"it stands where sequence {sequence} should be")
    if entry["prev_hash"] != before:
        raise Wrong("its prev_hash is not the hash before it")
    if hash_of(entry) != entry["entry_hash"]:
        raise Wrong("its content doesn't have its hash")
    if not entry["postings"]:
        raise Wrong("it has no postings")
    totals: dict[str, Decimal] = {}
    for posting in entry["postings"]:
        require_members(posting, POSTING_MEMBERS, "a posting")
        if not isinstance(posting["amount"], str) or not AMOUNT.fullmatch(posting["amount"]):
            raise Wrong("an amount is not a plain decimal")
        asset = str(posting["asset_id"])
        totals[asset] = EXACT.add(totals.get(asset, Decimal(0)), Decimal(posting["amount"]))
    for asset, total in totals.items():
        if total != 0:
            raise Wrong(f"its postings of asset {asset} sum to {total}, not to zero")


def hash_of(entry: Entry) -> str:
    """The SHA-256 of the canonical form: RFC 8785 is JSON without white space, members sorted, only needed escapes."""
    hashed = {name: value for name, value in entry.items() if name not in ("entry_hash", "hash_version")}
    hashed["version"] = entry["hash_version"]
    text = json.dumps(hashed, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


def require_members(value: object, members: set[str], what: str) -> None:
    """Raise Wrong unless `value` is an object with exactly these members."""
    if not isinstance(value, dict):
        raise Wrong(f"{what} is not an object")
    if set(value) != members:
        raise Wrong(f"{what} has other members than it should: {', '.join(sorted(set(value) ^ members))}")


def object_of(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object. Raises ValueError for a name that comes twice: readers would differ in which one counts."""
    value = dict(pairs)
    if len(value) != len(pairs):
        raise ValueError("a member comes twice")
    return value


def refuse(text: str) -> None:
    """Raise ValueError: nothing in an entry is a fraction, NaN or Infinity."""
    raise ValueError(f"{text[:50]} is not a number that an entry can have")


if __name__ == "__main__":
    sys.exit(main())
