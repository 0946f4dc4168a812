"""The ledger in memory: accounts of locked holders, and the entries of one transaction before they are written.

Posting changes balances here, at once and exactly; `journal.write` then writes everything in bulk. A mark and `undo`
take back what came after it, in proportion to what changed, so that a failing event leaves nothing behind.
Contract: holders.md 8, README.md "Ledger".
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from decimal import Decimal
from typing import Literal
from uuid import UUID

from domain.errors import Refusal
from domain.ids import new_id
from domain.ledger.holds import HoldBook
from domain.ledger.lots import LotBook
from domain.money import EXACT, ZERO

EntityType = Literal["PARTICIPANT", "GROUP", "PROGRAM", "SYSTEM_ISSUANCE", "SYSTEM_BREAKAGE", "SYSTEM_REDEMPTION"]
Bucket = Literal["AVAILABLE", "HELD", "DEFERRED"]
ActionType = Literal[
    "CREDIT",
    "DEBIT",
    "HOLD",
    "RELEASE",
    "FORFEIT",
    "MATURITY",
    "EXPIRY",
    "VOID_HOLD",
    "REDEMPTION",
    "REDEMPTION_REVERSAL",
    "TRANSFER",
    "FUND",
    "BURN",
]
SYSTEM_TYPES: tuple[EntityType, ...] = ("SYSTEM_ISSUANCE", "SYSTEM_BREAKAGE", "SYSTEM_REDEMPTION")


@dataclass(slots=True)
class Account:
    """One place of value. `version` and `balance` are those after its newest posting, on system accounts unused."""

    id: UUID
    entity_type: EntityType
    entity_id: UUID | None
    asset_id: UUID
    bucket: Bucket
    version: int = 0
    balance: Decimal = ZERO
    is_new: bool = False

    @property
    def is_system(self) -> bool:
        """Whether this is one of the asset's three system accounts, which carry no running balance."""
        return self.entity_id is None


@dataclass(frozen=True, slots=True)
class Line:
    """A posting to be written: the signed amount, and its account's version and balance after it."""

    id: UUID
    account: Account
    amount: Decimal
    version: int | None
    balance: Decimal | None


@dataclass(frozen=True, slots=True)
class Entry:
    """A journal entry to be written."""

    id: UUID
    program_id: UUID
    action_type: ActionType
    description: str | None
    event_id: UUID | None
    rule_id: UUID | None
    reference_id: str | None
    request_id: str | None
    lines: tuple[Line, ...]


@dataclass(slots=True)
class Books:
    """Accounts by their coordinates with their lots and holds, and the entries posted so far, in order.

    Only accounts of holders whose row the transaction has locked may be in here: that lock is what makes the balances
    true until the commit.
    """

    accounts: dict[tuple[UUID | None, UUID, str], Account] = field(default_factory=dict)
    entries: list[Entry] = field(default_factory=list)
    lots: LotBook = field(default_factory=LotBook)
    holds: HoldBook = field(default_factory=HoldBook)

    def add(self, accounts: Iterable[Account]) -> None:
        """Take over accounts as they were loaded."""
        for account in accounts:
            key = account.bucket if account.entity_id is not None else account.entity_type
            self.accounts[account.entity_id, account.asset_id, key] = account

    def account(self, entity_type: EntityType, entity_id: UUID, asset_id: UUID, bucket: Bucket) -> Account:
        """The account at these coordinates; a holder's first touch of an asset opens it."""
        key = (entity_id, asset_id, bucket)
        account = self.accounts.get(key)
        if account is None:
            account = Account(new_id(), entity_type, entity_id, asset_id, bucket, is_new=True)
            self.accounts[key] = account
        return account

    def system(self, entity_type: EntityType, asset_id: UUID) -> Account:
        """The asset's system account of this type. Raises KeyError when it wasn't loaded."""
        return self.accounts[None, asset_id, entity_type]

    def balance(self, entity_id: UUID, asset_id: UUID, bucket: Bucket) -> Decimal:
        """What the bucket holds now, postings of this transaction included."""
        account = self.accounts.get((entity_id, asset_id, bucket))
        return ZERO if account is None else account.balance

    def post(
        self,
        action_type: ActionType,
        movements: Sequence[tuple[Account, Decimal]],
        *,
        program_id: UUID,
        description: str | None = None,
        event_id: UUID | None = None,
        rule_id: UUID | None = None,
        reference_id: str | None = None,
        request_id: str | None = None,
        entry_id: UUID | None = None,
    ) -> Entry:
        """Post one entry: (account, signed amount) pairs of one asset that sum to zero, none of them zero.

        Whether the balances may go where they go is the caller's business.
        """
        assert len(movements) >= 2, "an entry has at least two postings"
        total = ZERO
        lines = []
        for account, amount in movements:
            assert amount != ZERO, "a posting of zero is not written"
            total = EXACT.add(total, amount)
            lines.append(_post_line(account, amount))
        assert total == ZERO, "the postings of an entry sum to zero"
        entry = Entry(
            entry_id or new_id(),
            program_id,
            action_type,
            description,
            event_id,
            rule_id,
            reference_id,
            request_id,
            tuple(lines),
        )
        self.entries.append(entry)
        return entry

    def mark(self) -> tuple[int, int, int]:
        """A point to which `undo` can go back."""
        return len(self.entries), self.lots.mark(), self.holds.mark()

    def undo(self, mark: tuple[int, int, int]) -> None:
        """Take back every entry posted since `mark`, newest first, with what it did to lots and holds."""
        entries, lots, holds = mark
        while len(self.entries) > entries:
            for line in reversed(self.entries.pop().lines):
                if line.version is not None:
                    line.account.version -= 1
                    line.account.balance = EXACT.subtract(line.account.balance, line.amount)
        self.lots.undo(lots)
        self.holds.undo(holds)


def _post_line(account: Account, amount: Decimal) -> Line:
    if account.is_system:
        return Line(new_id(), account, amount, None, None)
    account.version += 1
    account.balance = EXACT.add(account.balance, amount)
    return Line(new_id(), account, amount, account.version, account.balance)


def require(balance: Decimal, amount: Decimal, *, code: str = "insufficient_balance", what: str = "balance") -> None:
    """Raise Refusal `code` when `balance` doesn't cover `amount`."""
    if balance < amount:
        raise Refusal(code, f"insufficient {what}")
