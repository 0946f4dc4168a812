"""A holder's lots and holds for tests: every operation in a transaction of its own, and what can be seen of it."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from datetime import datetime
from decimal import Decimal
from typing import Any, Literal, NamedTuple
from uuid import UUID

from db.session import Database, Transaction
from domain import balances, gates, holds, transfers, wallet
from domain.balances import AdjustRequest, AdjustResult, Holder, Operation, OperationRequest, OperationResult
from domain.gates import Terms
from domain.holds import HoldEnd
from domain.ids import new_id
from domain.ledger import movements, queries
from domain.ledger.books import Books
from domain.ledger.holdings import load_holds, load_lots
from domain.ledger.journal import load_accounts, write
from domain.ledger.movements import Cause, HoldTerms, Position, Settlement
from domain.locks import lock_groups, lock_participants, lock_programs
from domain.money import format_plain
from domain.transfers import HolderName, TransferRecord, TransferRequest, WantedShare
from domain.upkeep import process_due_lots
from domain.wallet import WalletRequest
from tests.builders import Shop


class LotSeen(NamedTuple):
    """What a test compares of a lot."""

    status: str
    amount: str
    remaining: str
    reference_id: str | None


class HoldSeen(NamedTuple):
    """What a test compares of a hold."""

    status: str
    amount: str
    remaining: str


@dataclass(frozen=True)
class Desk:
    """Operations on one holder's share of one asset, in the context of one program."""

    database: Database
    organization_id: UUID
    program_id: UUID
    asset_id: UUID
    holder: Holder

    @staticmethod
    def of(database: Database, organization_id: UUID, shop: Shop) -> "Desk":
        """Alice's desk."""
        return Desk(database, organization_id, shop.program_id, shop.asset_id, Holder("PARTICIPANT", shop.alice))

    def using(self, **change: Any) -> "Desk":
        """The same for another program, asset or holder."""
        return replace(self, **change)

    # --- by API call ---

    async def adjust(self, type: Any, amount: str, **fields: Any) -> AdjustResult:
        request = AdjustRequest(
            program_id=self.program_id,
            asset_id=self.asset_id,
            type=type,
            amount=amount,
            description="by hand",
            **fields,
        )
        async with self.database.transaction(self.organization_id) as tx:
            return await balances.adjust(tx, self.holder, request)

    async def credit(self, amount: str, **fields: Any) -> AdjustResult:
        return await self.adjust("CREDIT", amount, **fields)

    async def debit(self, amount: str, **fields: Any) -> AdjustResult:
        return await self.adjust("DEBIT", amount, **fields)

    async def operate(self, operation: Operation, amount: str | None = None, **fields: Any) -> OperationResult:
        fields = {"description": "by hand", **fields}
        request = OperationRequest(
            operation=operation, program_id=self.program_id, asset_id=self.asset_id, amount=amount, **fields
        )
        async with self.database.transaction(self.organization_id) as tx:
            return await balances.operate(tx, self.holder, request)

    async def hold(self, amount: str | None = None, **fields: Any) -> OperationResult:
        return await self.operate("HOLD", amount, **fields)

    async def release(self, amount: str | None = None, **fields: Any) -> OperationResult:
        return await self.operate("RELEASE", amount, **fields)

    async def forfeit(self, amount: str | None = None, **fields: Any) -> OperationResult:
        return await self.operate("FORFEIT", amount, **fields)

    async def void(self, reference_id: str, **fields: Any) -> OperationResult:
        return await self.operate("VOID_HOLD", reference_id=reference_id, **fields)

    async def transfer(self, recipient: Holder, *amounts: str) -> TransferRecord:
        """A transfer to one recipient, in as many shares as there are amounts."""
        request = TransferRequest(
            program_id=self.program_id,
            asset_id=self.asset_id,
            source=_name(self.holder),
            shares=[WantedShare(_name(recipient), amount) for amount in amounts],
            description="by hand",
        )
        async with self.database.transaction(self.organization_id) as tx:
            return (await transfers.create(tx, request)).transfer

    async def fund(self, amount: str) -> None:
        async with self.database.transaction(self.organization_id) as tx:
            await wallet.fund(tx, self._wallet_request(amount))

    async def burn(self, amount: str) -> None:
        async with self.database.transaction(self.organization_id) as tx:
            await wallet.burn(tx, self._wallet_request(amount))

    def _wallet_request(self, amount: str) -> WalletRequest:
        return WalletRequest(program_id=self.program_id, asset_id=self.asset_id, amount=amount)

    # --- what only rules and time do ---

    async def grant(
        self,
        amount: str,
        *,
        expires_at: datetime | None = None,
        matures_at: datetime | None = None,
    ) -> None:
        """A credit as a rule makes it: with an expiry, a maturity."""
        async with self._posting() as (tx, terms, books):
            source = balances.credit_source(books, terms, Decimal(amount))
            cause = self._cause(tx)
            movements.credit(
                books,
                self._position(terms),
                cause,
                Decimal(amount),
                source,
                expires_at=expires_at,
                matures_at=matures_at,
            )

    async def provision(self, amount: str, reference_id: str | None = None, expires_at: datetime | None = None) -> None:
        """A CREDIT into HELD as a rule makes it: with a reference, and an expiry of the lot."""
        async with self._posting() as (tx, terms, books):
            source = balances.credit_source(books, terms, Decimal(amount))
            cause = self._cause(tx, reference_id)
            hold_terms = HoldTerms(new_id())
            movements.credit_held(
                books, self._position(terms), cause, Decimal(amount), source, hold_terms, expires_at=expires_at
            )

    async def settle(
        self,
        amount: str,
        reference_id: str,
        *,
        expires_at: datetime | None = None,
        matures_at: datetime | None = None,
    ) -> Settlement:
        """A CREDIT that settles a reference, as a rule makes it."""
        async with self._posting(reference_id) as (tx, terms, books):
            position = self._position(terms)
            selection = position.select("HELD", tx.now, reference_id=reference_id, only_provisional=True)
            await load_lots(tx, books.lots, selection, None)
            lots = list(books.lots.matching(selection))
            await load_holds(tx, books.holds, {lot.hold_id for lot in lots if lot.hold_id})
            programs = {self.program_id, *(lot.program_id for lot in lots)}
            if terms.is_prefunded:
                sources = {p: books.account("PROGRAM", p, self.asset_id, "AVAILABLE") for p in programs}
            else:
                sources = dict.fromkeys(programs, books.system("SYSTEM_ISSUANCE", self.asset_id))
            return movements.settle(
                books,
                position,
                self._cause(tx, reference_id),
                Decimal(amount),
                sources[self.program_id],
                selection,
                sources,
                expires_at=expires_at,
                matures_at=matures_at,
            )

    async def mature_due(self) -> int:
        """Upkeep's maturities, of the whole organization; how many entries that took."""
        written, _ = await process_due_lots(self.database, self.organization_id, "MATURITY")
        return written

    async def expire_due(self) -> int:
        """Upkeep's expiries, of the whole organization; how many entries that took."""
        written, _ = await process_due_lots(self.database, self.organization_id, "EXPIRY")
        return written

    async def end(
        self, hold_id: UUID, operation: Literal["RELEASE", "FORFEIT"], amount: str | None = None, key: str | None = None
    ) -> OperationResult:
        """Release or forfeit one hold by its id."""
        request = HoldEnd(operation=operation, description="by id", amount=amount, idempotency_key=key)
        async with self.database.transaction(self.organization_id) as tx:
            return (await holds.end(tx, hold_id, request))[1]

    @asynccontextmanager
    async def _posting(self, reference_id: str | None = None) -> AsyncIterator[tuple[Transaction, Terms, Books]]:
        async with self.database.transaction(self.organization_id) as tx:
            terms = await gates.read_terms(tx, self.program_id, self.asset_id)
            programs = await self._programs_under(tx, reference_id) if terms.is_prefunded else set()
            await lock_programs(tx, programs)
            await (lock_participants if self.holder.type == "PARTICIPANT" else lock_groups)(tx, [self.holder.id])
            books = await load_accounts(tx, [self.holder.id, *programs], [self.asset_id])
            yield tx, terms, books
            await write(tx, books)

    async def _programs_under(self, tx: Transaction, reference_id: str | None) -> set[UUID]:
        rows = await tx.rows(
            "select distinct program_id from lot where organization_id = %s and entity_id = %s and reference_id = %s",
            (tx.organization_id, self.holder.id, reference_id),
        )
        return {self.program_id, *(row["program_id"] for row in rows)}

    def _cause(self, tx: Transaction, reference_id: str | None = None) -> Cause:
        return Cause(new_id(), self.program_id, tx.now, "by rule", reference_id=reference_id)

    def _position(self, terms: Terms) -> Position:
        return Position(self.holder.type, self.holder.id, self.asset_id, terms.has_lots)

    # --- what can be seen ---

    async def buckets(self) -> tuple[str, str, str]:
        """AVAILABLE, HELD, DEFERRED, as plain numbers."""
        async with self.database.transaction(self.organization_id) as tx:
            books = await load_accounts(tx, [self.holder.id], [self.asset_id])
        found = (books.balance(self.holder.id, self.asset_id, bucket) for bucket in ("AVAILABLE", "HELD", "DEFERRED"))
        available, held, deferred = map(format_plain, found)
        return available, held, deferred

    async def wallet(self) -> str:
        """What the program's wallet has."""
        async with self.database.transaction(self.organization_id) as tx:
            books = await load_accounts(tx, [self.program_id], [self.asset_id])
        return format_plain(books.balance(self.program_id, self.asset_id, "AVAILABLE"))

    async def lot_rows(self) -> list[dict[str, Any]]:
        """Every lot of the holder, FIFO."""
        async with self.database.transaction(self.organization_id) as tx:
            return await tx.rows(
                "select * from lot where organization_id = %s and entity_id = %s and asset_id = %s"
                " order by created_at, id",
                (self.organization_id, self.holder.id, self.asset_id),
            )

    async def lots(self, *statuses: str) -> list[LotSeen]:
        """The lots, FIFO; all of them, or those of some statuses."""
        return [
            LotSeen(lot["status"], format_plain(lot["amount"]), format_plain(lot["remaining"]), lot["reference_id"])
            for lot in await self.lot_rows()
            if not statuses or lot["status"] in statuses
        ]

    async def hold_rows(self) -> list[dict[str, Any]]:
        """Every hold of the holder, the oldest first."""
        async with self.database.transaction(self.organization_id) as tx:
            return await tx.rows(
                "select * from hold where organization_id = %s and entity_id = %s and asset_id = %s"
                " order by created_at, id",
                (self.organization_id, self.holder.id, self.asset_id),
            )

    async def holds(self) -> list[HoldSeen]:
        """The holds, the oldest first."""
        return [
            HoldSeen(hold["status"], format_plain(hold["amount"]), format_plain(hold["remaining"]))
            for hold in await self.hold_rows()
        ]

    async def postings(self, entry_id: UUID) -> list[tuple[str, str, str]]:
        """The postings of an entry: whose, bucket, signed amount."""
        async with self.database.transaction(self.organization_id) as tx:
            _, postings = await queries.get_entry(tx, entry_id)
        return [(p["entity_type"], p["bucket"], format_plain(p["amount"])) for p in postings]

    async def entries(self, action_type: str | None = None) -> int:
        """How many entries the organization has, all or of one type."""
        async with self.database.transaction(self.organization_id) as tx:
            row = await tx.row(
                "select count(*) as n from journal_entry where organization_id = %(org)s"
                " and (%(type)s::text is null or action_type = %(type)s)",
                {"org": self.organization_id, "type": action_type},
            )
        assert row is not None
        count: int = row["n"]
        return count


def _name(holder: Holder) -> HolderName:
    return HolderName("group_id" if holder.type == "GROUP" else "participant_id", holder.id)
