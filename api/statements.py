"""Statements and histories over HTTP. Contract: webhooks-and-reports.md 16, holders.md 3.9, basics.md 5.9."""

from typing import Annotated
from uuid import UUID

from fastapi import Depends, Query
from pydantic import Field

from api.models import ListOf, ResponseModel, Timestamp, omittable
from api.queries import EventFrom, EventTo, From, PageOf50, To, listed, pagination_of
from api.route import Tx, make_router
from db.session import Transaction
from domain.ledger import statements
from domain.ledger.books import ActionType, Bucket
from domain.ledger.statements import HistoryFilter, Line, OwnerKind, StatementFilter, StatementLine
from domain.money import format_amount
from domain.pagination import PageRequest

router = make_router("Statements")

InBucket = Annotated[Bucket | None, Query(description="Only this bucket.")]


async def _read_statement_filter(
    asset_id: Annotated[UUID, Query(description="The asset that the statement is of.")],
    bucket: InBucket = None,
    created_from: From = None,
    to: To = None,
) -> StatementFilter:
    return StatementFilter(asset_id=asset_id, bucket=bucket, created_from=created_from, created_to=to)


async def _read_history_filter(
    asset_id: Annotated[UUID | None, Query(description="Only this asset.")] = None,
    bucket: InBucket = None,
    created_from: From = None,
    to: To = None,
    event_from: EventFrom = None,
    event_to: EventTo = None,
) -> HistoryFilter:
    return HistoryFilter(
        asset_id=asset_id,
        bucket=bucket,
        created_from=created_from,
        created_to=to,
        event_from=event_from,
        event_to=event_to,
    )


WhichStatement = Annotated[StatementFilter, Depends(_read_statement_filter)]
WhichHistory = Annotated[HistoryFilter, Depends(_read_history_filter)]


class MovementOut(ResponseModel):
    """A posting and what it was for."""

    journal_entry_id: UUID = Field(description="The entry that it belongs to.")
    action_type: ActionType = Field(description="What the entry did.")
    amount: str = Field(description="Signed: + came in, - went out.", examples=["-10.00"])
    bucket: Bucket = Field(description="The bucket that it moved.")
    description: str | None = Field(description="Why, for people.")
    created_at: Timestamp = Field(description="When it was stored.")
    event_id: UUID | None = Field(description="The event that caused it; null if none did.")
    event_timestamp: Timestamp | None = omittable("When that event happened; only with an event.")
    created_by_api_key_id: UUID | None = Field(description="The key of the call that caused it; null if none did.")


class HistoryRow(MovementOut):
    """A row of a history."""

    asset_id: UUID = Field(description="The asset that it moved.")


class StatementRow(MovementOut):
    """A line of a statement."""

    posting_id: UUID = Field(description="The posting: unique where an entry moves several buckets.")
    running_balance: str = Field(description="The balance after it: of the bucket, or the total over the buckets.")


class StatementOut(ListOf[StatementRow]):
    """A statement: opening_balance + all amounts = closing_balance = running_balance of its last line."""

    asset_id: UUID = Field(description="The asset covered.")
    bucket: Bucket | None = omittable("Only when one bucket was asked for; without, balances are totals over all.")
    opening_balance: str = Field(description="Just before the window; zero without `from`. The same on every page.")
    closing_balance: str = Field(description="As of `to`, or of the first page's present. The same on every page.")
    from_: Timestamp | None = omittable("Where the window begins, when given.", alias="from")
    to: Timestamp | None = omittable("Where the window ends, when given.")


@router.get("/participants/{id}/statement", response_model=StatementOut)
async def get_participant_statement(tx: Tx, id: UUID, wanted: WhichStatement, page: PageOf50) -> StatementOut:
    """Get a participant's statement of one asset: every movement with the balance after it, oldest first."""
    return await _statement(tx, "participant", id, wanted, page)


@router.get("/groups/{id}/statement", response_model=StatementOut)
async def get_group_statement(tx: Tx, id: UUID, wanted: WhichStatement, page: PageOf50) -> StatementOut:
    """Get a group's statement of one asset: every movement with the balance after it, oldest first."""
    return await _statement(tx, "group", id, wanted, page)


@router.get("/programs/{id}/statement", response_model=StatementOut)
async def get_program_statement(tx: Tx, id: UUID, wanted: WhichStatement, page: PageOf50) -> StatementOut:
    """Get the wallet's statement of one asset: every fund, burn and draw with the balance after it, oldest first."""
    return await _statement(tx, "program", id, wanted, page)


@router.get("/participants/{id}/activity/history", response_model=ListOf[HistoryRow])
async def list_participant_history(tx: Tx, id: UUID, wanted: WhichHistory, page: PageOf50) -> ListOf[HistoryRow]:
    """List what moved a participant's balances, newest first; one row per posting."""
    return listed(await statements.read_history(tx, "participant", id, wanted, page), _history_row)


@router.get("/groups/{id}/activity/history", response_model=ListOf[HistoryRow])
async def list_group_history(tx: Tx, id: UUID, wanted: WhichHistory, page: PageOf50) -> ListOf[HistoryRow]:
    """List what moved a group's balances, newest first; one row per posting."""
    return listed(await statements.read_history(tx, "group", id, wanted, page), _history_row)


@router.get("/programs/{id}/history", response_model=ListOf[HistoryRow])
async def list_program_history(tx: Tx, id: UUID, wanted: WhichHistory, page: PageOf50) -> ListOf[HistoryRow]:
    """List what moved the program's wallet, newest first: every fund, burn and draw."""
    return listed(await statements.read_history(tx, "program", id, wanted, page), _history_row)


async def _statement(
    tx: Transaction, kind: OwnerKind, id: UUID, wanted: StatementFilter, page: PageRequest
) -> StatementOut:
    statement = await statements.read_statement(tx, kind, id, wanted, page)
    return StatementOut.model_construct(
        asset_id=wanted.asset_id,
        bucket=wanted.bucket,
        opening_balance=format_amount(statement.opening_balance, statement.scale),
        closing_balance=format_amount(statement.closing_balance, statement.scale),
        from_=wanted.created_from,
        to=wanted.created_to,
        data=[_statement_row(row) for row in statement.page.items],
        pagination=pagination_of(statement.page),
    )


def _statement_row(row: StatementLine) -> StatementRow:
    return StatementRow.of(
        row.line,
        amount=format_amount(row.line.amount, row.line.scale),
        running_balance=format_amount(row.running_balance, row.line.scale),
    )


def _history_row(line: Line) -> HistoryRow:
    return HistoryRow.of(line, amount=format_amount(line.amount, line.scale))
