"""Assets, the units of value, and their links to programs. Contract: basics.md 5.10 and 6."""

from collections.abc import Sequence
from dataclasses import dataclass
from decimal import Decimal
from typing import Any, Literal
from uuid import UUID

from sqlalchemy import exists
from sqlalchemy import update as sql_update
from sqlmodel import col, select

from db.session import Transaction
from db.tables import Asset, ProgramAsset
from domain import programs
from domain.errors import Refusal, not_found
from domain.ids import new_id
from domain.ledger.journal import open_system_accounts
from domain.money import format_amount, parse_amount
from domain.pagination import Page, PageRequest, paginate

AssetStatus = Literal["ACTIVE", "ARCHIVED"]
InventoryMode = Literal["SIMPLE", "LOT"]
IssuancePolicy = Literal["UNLIMITED", "PREFUNDED"]


@dataclass(frozen=True, slots=True)
class LinkedAsset:
    """An asset, and the programs that may use it, the first link first."""

    asset: Asset
    program_ids: list[UUID]

    @property
    def max_transaction_amount(self) -> str | None:
        """The ceiling of a single credit or debit with exactly the asset's decimals, or None."""
        ceiling = self.asset.max_transaction_amount
        return None if ceiling is None else format_amount(ceiling, self.asset.scale)


@dataclass(frozen=True, slots=True, kw_only=True)
class NewAsset:
    """What a new asset is made of; `max_transaction_amount` is decimal text."""

    program_id: UUID
    name: str
    symbol: str
    inventory_mode: InventoryMode
    issuance_policy: IssuancePolicy
    scale: int
    max_transaction_amount: str | None = None


@dataclass(frozen=True, slots=True)
class AssetFilter:
    """What a list of assets keeps; archived ones are listed unless filtered out."""

    program_id: UUID | None = None
    status: AssetStatus | None = None
    search: str | None = None


async def create(tx: Transaction, new: NewAsset) -> LinkedAsset:
    """Create an ACTIVE asset with its three system accounts, linked to its program.

    Raises Refusal: `not_found` for the program, `bad_request` or `invalid_scale` for the ceiling, `program_inactive`
    for an archived program, `conflict` for a symbol in use. Contract: basics.md 6.3.
    """
    programs.require_not_archived(await programs.get(tx, new.program_id))
    await _require_free_symbol(tx, new.symbol)
    asset = Asset(
        organization_id=tx.organization_id,
        id=new_id(),
        name=new.name,
        symbol=new.symbol,
        inventory_mode=new.inventory_mode,
        issuance_policy=new.issuance_policy,
        scale=new.scale,
        max_transaction_amount=_ceiling(new.max_transaction_amount, new.scale),
        status="ACTIVE",
        created_at=tx.now,
        updated_at=tx.now,
    )
    await tx.insert(asset)
    await open_system_accounts(tx, asset.id)
    await _insert_link(tx, new.program_id, asset.id)
    return LinkedAsset(asset, [new.program_id])


async def get(tx: Transaction, asset_id: UUID) -> LinkedAsset:
    """The asset, archived or not. Raises Refusal `not_found`."""
    return (await _with_links(tx, [await _get(tx, asset_id)]))[0]


async def find(tx: Transaction, wanted: AssetFilter, page: PageRequest) -> Page[LinkedAsset]:
    """A page of assets, newest first."""
    statement = select(Asset).where(Asset.organization_id == tx.organization_id)
    if wanted.program_id is not None:
        link = exists().where(
            col(ProgramAsset.organization_id) == tx.organization_id,
            col(ProgramAsset.program_id) == wanted.program_id,
            col(ProgramAsset.asset_id) == Asset.id,
        )
        statement = statement.where(link)
    if wanted.status is not None:
        statement = statement.where(Asset.status == wanted.status)
    if wanted.search:
        name, symbol = (col(column).icontains(wanted.search, autoescape=True) for column in (Asset.name, Asset.symbol))
        statement = statement.where(name | symbol)
    found = await paginate(tx, statement, keys=(col(Asset.created_at), col(Asset.id)), page=page)
    return Page(await _with_links(tx, found.items), found.next_cursor)


async def update(tx: Transaction, asset_id: UUID, changes: dict[str, Any]) -> LinkedAsset:
    """Change some of name, max_transaction_amount (text, or None for no ceiling) and status (to ARCHIVED only).

    Archiving an archived asset again changes nothing. Contract: basics.md 6.3 and 6.4.
    Raises Refusal: `not_found`, `bad_request` or `invalid_scale` for the ceiling.
    """
    asset = await _get(tx, asset_id, lock=True)
    changes = dict(changes)
    if "max_transaction_amount" in changes:
        changes["max_transaction_amount"] = _ceiling(changes["max_transaction_amount"], asset.scale)
    if changes.get("status") == "ARCHIVED":
        changes["deleted_at"] = asset.deleted_at or tx.now
    if any(getattr(asset, name) != value for name, value in changes.items()):
        changes["updated_at"] = tx.now
        await tx.run(
            sql_update(Asset)
            .where(col(Asset.organization_id) == tx.organization_id, col(Asset.id) == asset_id)
            .values(**changes)
        )
    for name, value in changes.items():
        setattr(asset, name, value)
    return (await _with_links(tx, [asset]))[0]


async def linked(tx: Transaction, program_id: UUID, page: PageRequest) -> Page[LinkedAsset]:
    """The assets that a program may use. Raises Refusal `not_found` for the program."""
    await programs.get(tx, program_id)
    return await find(tx, AssetFilter(program_id=program_id), page)


async def link(tx: Transaction, program_id: UUID, asset_id: UUID) -> LinkedAsset:
    """Let a program use an asset. Contract: basics.md 5.10.

    Raises Refusal: `not_found`, `program_inactive` (archived), `asset_archived`, `conflict` when it is linked already.
    """
    program = await programs.get(tx, program_id)
    asset = await _get(tx, asset_id)
    programs.require_not_archived(program)
    if asset.status == "ARCHIVED":
        raise Refusal("asset_archived", "the asset is ARCHIVED")
    if not await _insert_link(tx, program_id, asset_id):
        raise Refusal("conflict", "the asset is linked to this program already")
    return (await _with_links(tx, [asset]))[0]


async def unlink(tx: Transaction, program_id: UUID, asset_id: UUID) -> None:
    """Take an asset from a program that has never moved any of it. Contract: basics.md 5.10.

    Raises Refusal: `not_found` for the program or the link, `conflict` once the ledger has an entry for both.
    """
    await programs.lock(tx, program_id)
    deleted = await tx.execute(
        "delete from program_asset where organization_id = %s and program_id = %s and asset_id = %s",
        (tx.organization_id, program_id, asset_id),
    )
    if deleted.rowcount == 0:
        raise not_found("asset link")
    used = await tx.row(
        "select 1 from journal_entry e join posting p on p.organization_id = e.organization_id and p.entry_id = e.id"
        " where e.organization_id = %s and e.program_id = %s and p.asset_id = %s limit 1",
        (tx.organization_id, program_id, asset_id),
    )
    if used is not None:
        raise Refusal("conflict", "the asset has ledger entries in this program: the link is permanent")


def _ceiling(text: str | None, scale: int) -> Decimal | None:
    return None if text is None else parse_amount(text, scale, "max_transaction_amount")


async def _get(tx: Transaction, asset_id: UUID, *, lock: bool = False) -> Asset:
    statement = select(Asset).where(Asset.organization_id == tx.organization_id, Asset.id == asset_id)
    asset = await tx.first(statement.with_for_update(key_share=True) if lock else statement)
    if asset is None:
        raise not_found("asset")
    return asset


async def _require_free_symbol(tx: Transaction, symbol: str) -> None:
    # Two creations at once are told apart by the unique index: the second is repeated and then ends here.
    taken = await tx.row(
        "select 1 from asset where organization_id = %s and lower(symbol) = lower(%s)", (tx.organization_id, symbol)
    )
    if taken is not None:
        raise Refusal("conflict", f"an asset with the symbol {symbol} exists already")


async def _insert_link(tx: Transaction, program_id: UUID, asset_id: UUID) -> bool:
    inserted = await tx.execute(
        "insert into program_asset (organization_id, program_id, asset_id, created_at) values (%s, %s, %s, %s)"
        " on conflict do nothing",
        (tx.organization_id, program_id, asset_id, tx.now),
    )
    return inserted.rowcount == 1


async def _with_links(tx: Transaction, assets: Sequence[Asset]) -> list[LinkedAsset]:
    links: dict[UUID, list[UUID]] = {asset.id: [] for asset in assets}
    cursor = await tx.execute(
        "select asset_id, program_id from program_asset where organization_id = %s and asset_id = any(%s)"
        " order by created_at, program_id",
        (tx.organization_id, list(links)),
    )
    for asset_id, program_id in await cursor.fetchall():
        links[asset_id].append(program_id)
    return [LinkedAsset(asset, links[asset.id]) for asset in assets]
