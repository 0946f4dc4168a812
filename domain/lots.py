"""Listing the lots of a holder. Contract: holders.md 7.5."""

from dataclasses import dataclass
from datetime import datetime
from uuid import UUID

from sqlmodel import col, select

from db.session import Transaction
from db.tables import Asset, Lot
from domain.errors import bad_field, not_found
from domain.ledger.lots import LotStatus
from domain.pagination import Page, PageRequest, paginate

# A lot of these always has something left, which is what the FIFO index holds.
_OPEN: frozenset[LotStatus] = frozenset({"DEFERRED", "AVAILABLE", "HELD"})


@dataclass(frozen=True, slots=True, kw_only=True)
class LotFilter:
    """Which lots of an asset to list; None means any. Bounds of the expiry are exclusive and skip lots without one."""

    asset_id: UUID
    program_id: UUID | None = None
    status: LotStatus | None = None
    expires_before: datetime | None = None
    expires_after: datetime | None = None
    reference_id: str | None = None


@dataclass(frozen=True, slots=True)
class LotPage:
    """A page of lots, and the decimals of their asset."""

    page: Page[Lot]
    scale: int


async def find(tx: Transaction, entity_id: UUID, wanted: LotFilter, page: PageRequest) -> LotPage:
    """A page of a participant's or group's lots in FIFO order, ended ones included unless a status is asked for.

    Raises Refusal: `not_found` for an unknown asset, `bad_request` for one without lots.
    """
    asset = await tx.first(
        select(Asset).where(Asset.organization_id == tx.organization_id, Asset.id == wanted.asset_id)
    )
    if asset is None:
        raise not_found("asset")
    if asset.inventory_mode != "LOT":
        raise bad_field("asset_id", "only LOT assets have lots", expected="a LOT asset", received=str(asset.id))
    statement = select(Lot).where(
        Lot.organization_id == tx.organization_id, Lot.entity_id == entity_id, Lot.asset_id == wanted.asset_id
    )
    if wanted.status is not None:
        statement = statement.where(Lot.status == wanted.status)
    if wanted.status in _OPEN:
        statement = statement.where(col(Lot.remaining) > 0)
    if wanted.program_id is not None:
        statement = statement.where(Lot.program_id == wanted.program_id)
    if wanted.reference_id is not None:
        statement = statement.where(Lot.reference_id == wanted.reference_id)
    if wanted.expires_before is not None:
        statement = statement.where(col(Lot.expires_at) < wanted.expires_before)
    if wanted.expires_after is not None:
        statement = statement.where(col(Lot.expires_at) > wanted.expires_after)
    keys = (col(Lot.created_at), col(Lot.id))
    return LotPage(await paginate(tx, statement, keys=keys, page=page, descending=False), asset.scale)
