"""Assets and their links to programs, over HTTP. Contract: basics.md 5.10 and 6."""

from typing import Annotated, Any, Literal
from uuid import UUID

from fastapi import Query
from pydantic import AfterValidator, Field
from pydantic.json_schema import SkipJsonSchema
from pydantic_core import PydanticCustomError
from starlette.responses import Response

from api.models import (
    AmountText,
    Integer,
    ListOf,
    Name,
    PatchModel,
    RequestModel,
    ResponseModel,
    Timestamp,
    unset_field,
)
from api.queries import PageOf50, Search, listed
from api.responses import no_content
from api.route import Tx, make_router
from domain import assets, limits
from domain.assets import AssetFilter, AssetStatus, InventoryMode, IssuancePolicy, LinkedAsset, NewAsset

router = make_router("Assets")


def _refuse_change(_: Any) -> None:
    raise PydanticCustomError("fixed", "is fixed when the asset is created", {"expected": "absent"})


Fixed = Annotated[SkipJsonSchema[Any], AfterValidator(_refuse_change)]
Ceiling = Annotated[AmountText, Field(description="Ceiling of any single credit or debit; equal is allowed.")]


class AssetCreate(RequestModel):
    """A new asset."""

    program_id: UUID = Field(description="The program to link it to.")
    name: Name = Field(description="The name.", examples=["Points"])
    symbol: str = Field(
        min_length=1,
        max_length=16,
        pattern="^[A-Za-z0-9]+$",
        description="Letters and digits; unique in the organization, whatever the case.",
        examples=["PTS"],
    )
    inventory_mode: InventoryMode = Field(description="LOT: each credit is a lot that can expire and vest.")
    issuance_policy: IssuancePolicy = Field(description="PREFUNDED: credits come out of the program's wallet.")
    scale: Integer = Field(ge=0, le=limits.SCALE_MAX, description="Decimals allowed in amounts.")
    max_transaction_amount: Ceiling | None = None


class AssetUpdate(PatchModel):
    """What to change; the rest stays."""

    name: Name = unset_field("The new name.")
    max_transaction_amount: Ceiling | None = unset_field("The new ceiling; null removes it.")
    status: Literal["ARCHIVED"] = unset_field("Archives the asset, for good.")
    inventory_mode: Fixed = unset_field("Never changes.")
    issuance_policy: Fixed = unset_field("Never changes.")
    scale: Fixed = unset_field("Never changes.")
    symbol: Fixed = unset_field("Never changes.")


class AssetLink(RequestModel):
    """The asset to link."""

    asset_id: UUID = Field(description="An asset of the organization.")


class AssetOut(ResponseModel):
    """An asset."""

    id: UUID = Field(description="Called `asset_id` elsewhere.")
    program_ids: list[UUID] = Field(description="The programs that may use it.")
    name: str = Field(description="The name.")
    symbol: str = Field(description="The short code.")
    inventory_mode: InventoryMode = Field(description="SIMPLE or LOT.")
    issuance_policy: IssuancePolicy = Field(description="UNLIMITED or PREFUNDED.")
    scale: int = Field(description="Decimals of its amounts.")
    max_transaction_amount: str | None = Field(description="Ceiling of any single credit or debit, or null.")
    status: AssetStatus = Field(description="ACTIVE or ARCHIVED.")
    created_at: Timestamp = Field(description="When it was created.")
    updated_at: Timestamp = Field(description="When it was last changed.")
    deleted_at: Timestamp | None = Field(description="When it was archived, or null.")


@router.post("/assets", status_code=201, response_model=AssetOut)
async def create_asset(tx: Tx, body: AssetCreate) -> AssetOut:
    """Create an asset and link it to a program."""
    return present(await assets.create(tx, NewAsset(**body.model_dump())))


@router.get("/assets", response_model=ListOf[AssetOut])
async def list_assets(
    tx: Tx,
    page: PageOf50,
    program_id: Annotated[UUID | None, Query(description="Only assets linked to this program.")] = None,
    status: Annotated[AssetStatus | None, Query(description="Only this status.")] = None,
    search: Search = None,
) -> ListOf[AssetOut]:
    """List the organization's assets, archived ones included, newest first; `search` looks at symbol and name."""
    wanted = AssetFilter(program_id=program_id, status=status, search=search)
    return listed(await assets.find(tx, wanted, page), present)


@router.get("/assets/{id}", response_model=AssetOut)
async def get_asset(tx: Tx, id: UUID) -> AssetOut:
    """Get one asset, archived or not."""
    return present(await assets.get(tx, id))


@router.patch("/assets/{id}", response_model=AssetOut)
async def update_asset(tx: Tx, id: UUID, body: AssetUpdate) -> AssetOut:
    """Change the name or the ceiling, or archive the asset. Archiving is final."""
    return present(await assets.update(tx, id, body.required_changes()))


@router.get("/programs/{id}/assets", response_model=ListOf[AssetOut])
async def list_program_assets(tx: Tx, id: UUID, page: PageOf50) -> ListOf[AssetOut]:
    """List the assets that a program may use."""
    return listed(await assets.linked(tx, id, page), present)


@router.post("/programs/{id}/assets", status_code=201, response_model=AssetOut)
async def link_asset(tx: Tx, id: UUID, body: AssetLink) -> AssetOut:
    """Let a program use an asset that exists."""
    return present(await assets.link(tx, id, body.asset_id))


@router.delete("/programs/{id}/assets/{asset_id}", status_code=204)
async def unlink_asset(tx: Tx, id: UUID, asset_id: UUID) -> Response:
    """Take an asset from a program; refused once the ledger has entries for both."""
    await assets.unlink(tx, id, asset_id)
    return no_content()


def present(linked: LinkedAsset) -> AssetOut:
    """The asset as the API shows it."""
    return AssetOut.of(
        linked.asset, program_ids=linked.program_ids, max_transaction_amount=linked.max_transaction_amount
    )
