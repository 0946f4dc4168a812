"""The lots of participants and groups over HTTP. Contract: holders.md 7.5."""

from typing import Annotated
from uuid import UUID

from fastapi import APIRouter, Query
from pydantic import Field

from api.models import ListOf, ResponseModel, Timestamp
from api.queries import PageOf50, listed
from api.route import Tx, make_router
from db.tables import Lot
from domain import lots, state
from domain.ledger.lots import LotStatus
from domain.lots import LotFilter
from domain.money import format_amount
from domain.state import EntityKind

router = make_router("Lots")


class LotOut(ResponseModel):
    """Value that was earned at one time, or the part of it that was split off."""

    id: UUID
    asset_id: UUID
    amount: str = Field(description="What it had when it was made.")
    remaining: str = Field(description="What is left of it.")
    status: LotStatus = Field(description="Only AVAILABLE lots can be spent, and only before they expire.")
    created_at: Timestamp = Field(description="When it was earned; a part that is split off keeps it.")
    expires_at: Timestamp | None = Field(description="From then on it cannot be spent; null: never.")
    matures_at: Timestamp | None = Field(description="Until then it is DEFERRED; null: at once.")
    reference_id: str | None = Field(description="The reference under which it is held.")


def _serve(router: APIRouter, path: str, kind: EntityKind) -> None:
    """The list of lots of one kind of holder, under `path`."""

    @router.get(f"{path}/{{id}}/balances/lots", response_model=ListOf[LotOut])
    async def list_lots(
        tx: Tx,
        id: UUID,
        page: PageOf50,
        asset_id: Annotated[UUID, Query(description="The LOT asset.")],
        program_id: Annotated[UUID | None, Query(description="Only lots that this program gave.")] = None,
        status: Annotated[LotStatus | None, Query(description="Only this status.")] = None,
        expires_before: Annotated[Timestamp | None, Query(description="Only lots that expire before.")] = None,
        expires_after: Annotated[Timestamp | None, Query(description="Only lots that expire after.")] = None,
        reference_id: Annotated[str | None, Query(max_length=255, description="Only this reference.")] = None,
    ) -> ListOf[LotOut]:
        """List lots in the order in which they are spent, the oldest first."""
        await state.require(tx, kind, id)
        wanted = LotFilter(
            asset_id=asset_id,
            program_id=program_id,
            status=status,
            expires_before=expires_before,
            expires_after=expires_after,
            reference_id=reference_id,
        )
        found = await lots.find(tx, id, wanted, page)
        return listed(found.page, lambda lot: _present(lot, found.scale))


def _present(lot: Lot, scale: int) -> LotOut:
    return LotOut.of(lot, amount=format_amount(lot.amount, scale), remaining=format_amount(lot.remaining, scale))


_serve(router, "/participants", "participant")
_serve(router, "/groups", "group")
