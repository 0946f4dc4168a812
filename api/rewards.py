"""The rewards catalog over HTTP. Contract: redemptions.md 4."""

from typing import Annotated, Any, Literal
from uuid import UUID

from fastapi import Query
from pydantic import AfterValidator, Field
from pydantic.json_schema import SkipJsonSchema
from pydantic_core import PydanticCustomError

from api.models import (
    AmountText,
    Boolean,
    Integer,
    ListOf,
    Name,
    PatchModel,
    RequestModel,
    ResponseModel,
    Timestamp,
    omittable,
    unset_field,
)
from api.queries import IncludeArchived, PageOf50, Search, SortDirection, pagination_of
from api.responses import JsonResponse, respond_dict
from api.route import Tx, make_router
from domain import limits, rewards
from domain.clock import format_timestamp
from domain.rewards import NewReward, RedemptionType, Reward, RewardFilter, RewardSort, RewardStatus

router = make_router("Rewards catalog")


def _refuse_change(_: Any) -> None:
    raise PydanticCustomError("fixed", "is fixed when the reward is created", {"expected": "absent"})


Fixed = Annotated[SkipJsonSchema[Any], AfterValidator(_refuse_change)]
RewardText = Annotated[str, Field(max_length=1000)]
Category = Annotated[str, Field(max_length=100)]
Units = Annotated[Integer, Field(ge=1, le=limits.REWARD_UNITS)]
Eligibility = Annotated[str, Field(min_length=1, max_length=limits.EXPRESSION_CHARS)]


class RewardCreate(RequestModel):
    """A new reward."""

    name: Name = Field(description="Unique in the program.", examples=["$10 Gift Card"])
    redemption_type: RedemptionType = Field(
        description="UNIT_BASED is sold by the piece, AMOUNT_BASED for any amount from `unit_cost` up."
    )
    asset_id: UUID = Field(description="What it is paid with: an asset that is linked to the program.")
    unit_cost: AmountText = Field(description="Price per unit; for AMOUNT_BASED the minimum amount.")
    status: RewardStatus = Field(description="Usually DRAFT; only ACTIVE can be redeemed.")
    description: RewardText | None = Field(default=None, description="At most 1000 characters.")
    category: Category | None = Field(default=None, description="At most 100 characters.", examples=["gift cards"])
    max_total: Units | None = Field(default=None, description="UNIT_BASED only: the stock; null for no limit.")
    max_per_participant: Units | None = Field(
        default=None, description="UNIT_BASED only: how many units one participant may have; null for no limit."
    )
    available_from: Timestamp | None = Field(default=None, description="Redeemable from this instant on.")
    available_until: Timestamp | None = Field(default=None, description="Redeemable before this instant.")
    metadata: dict[str, Any] | None = Field(
        default=None, description="Whatever you want to keep with it; at most 16 KiB as compact JSON."
    )
    requires_confirmation: Boolean = Field(
        default=False, description="Its redemptions are reserved first, and confirmed or canceled later."
    )
    eligibility: Eligibility | None = Field(
        default=None,
        description="CEL over `participant` and `now()`: who may have it.",
        examples=['"vip" in participant.tags'],
    )


class RewardUpdate(PatchModel):
    """What to change; the rest stays. It applies to redemptions made afterwards."""

    name: Name = unset_field("The new name.")
    unit_cost: AmountText = unset_field("The new price, or minimum.")
    status: Literal["DRAFT", "ACTIVE", "ARCHIVED"] = unset_field(
        "Publishes, withdraws or archives; ACTIVE is stored as OUT_OF_STOCK while everything is sold."
    )
    description: RewardText | None = unset_field("The new description; null clears it.")
    category: Category | None = unset_field("The new category; null clears it.")
    max_total: Units | None = unset_field("The new stock, not below what is redeemed; null for no limit.")
    max_per_participant: Units | None = unset_field("The new limit of a participant; null for no limit.")
    available_from: Timestamp | None = unset_field("The new start; null opens it.")
    available_until: Timestamp | None = unset_field("The new end; null opens it.")
    metadata: dict[str, Any] | None = unset_field("Replaces all of the old; null clears it.")
    requires_confirmation: Boolean = unset_field("Whether redemptions from now on are two-step.")
    eligibility: Eligibility | None = unset_field("The new expression; null admits everybody.")
    redemption_type: Fixed = unset_field("Never changes.")
    asset_id: Fixed = unset_field("Never changes.")


class RewardOut(ResponseModel):
    """A reward."""

    id: UUID = Field(description="Called `reward_id` elsewhere.")
    program_id: UUID = Field(description="The program whose catalog it is in.")
    name: str = Field(description="Unique in the program.")
    description: str | None = Field(description="The description, or null.")
    category: str | None = Field(description="The category, or null.")
    redemption_type: RedemptionType = Field(description="UNIT_BASED or AMOUNT_BASED.")
    asset_id: UUID = Field(description="What it is paid with.")
    unit_cost: str = Field(description="Price per unit, or minimum amount, with the asset's decimals.")
    status: RewardStatus = Field(description="OUT_OF_STOCK while everything is sold.")
    max_total: int | None = Field(description="The stock; null for no limit.")
    max_per_participant: int | None = Field(description="How many units one participant may have; null for no limit.")
    redeemed_count: int = Field(description="Units redeemed, net of what was given back; 0 for AMOUNT_BASED.")
    available_from: Timestamp | None = Field(description="Start of the window, inclusive; null for none.")
    available_until: Timestamp | None = Field(description="End of the window, exclusive; null for none.")
    metadata: dict[str, Any] | None = Field(description="As it was sent, or null.")
    requires_confirmation: bool | None = omittable("Present only when true: redemptions are two-step.")
    eligibility: str | None = omittable("Present only when set: who may have it.")
    created_at: Timestamp = Field(description="When it was created.")
    updated_at: Timestamp = Field(description="When it was last changed; sales alone don't change it.")


@router.post("/programs/{program_id}/rewards", status_code=201, response_model=RewardOut)
async def create_reward(tx: Tx, program_id: UUID, body: RewardCreate) -> JsonResponse:
    """Add a reward to the program's catalog."""
    new = NewReward(**{name: getattr(body, name) for name in RewardCreate.model_fields})
    return respond_dict(present(await rewards.create(tx, program_id, new)), 201)


@router.get("/programs/{program_id}/rewards", response_model=ListOf[RewardOut])
async def list_rewards(
    tx: Tx,
    program_id: UUID,
    page: PageOf50,
    status: Annotated[RewardStatus | None, Query(description="Only this status, ARCHIVED included.")] = None,
    include_archived: IncludeArchived = False,
    search: Search = None,
    sort_by: Annotated[RewardSort, Query(description="The order.")] = "created_at",
    sort_dir: SortDirection = "desc",
) -> JsonResponse:
    """List the program's catalog, newest first; archived rewards only when asked for."""
    wanted = RewardFilter(status=status, include_archived=include_archived, search=search)
    found = await rewards.find(tx, program_id, wanted, page, sort_by, sort_dir == "desc")
    shown = [present(reward) for reward in found.items]
    return respond_dict({"data": shown, "pagination": pagination_of(found).model_dump()})


@router.get("/programs/{program_id}/rewards/{reward_id}", response_model=RewardOut)
async def get_reward(tx: Tx, program_id: UUID, reward_id: UUID) -> JsonResponse:
    """Get one reward, archived or not, with what has been redeemed of it by now."""
    return respond_dict(present(await rewards.get(tx, program_id, reward_id)))


@router.patch("/programs/{program_id}/rewards/{reward_id}", response_model=RewardOut)
async def update_reward(tx: Tx, program_id: UUID, reward_id: UUID, body: RewardUpdate) -> JsonResponse:
    """Change a reward; publishing and archiving it is a change of its status."""
    return respond_dict(present(await rewards.update(tx, program_id, reward_id, body.required_changes())))


def present(reward: Reward) -> dict[str, Any]:
    """The reward as the API shows it; metadata number by number, which pydantic would print as strings."""
    start, end = reward.available_from, reward.available_until
    shown = {
        "id": reward.id,
        "program_id": reward.program_id,
        "name": reward.name,
        "description": reward.description,
        "category": reward.category,
        "redemption_type": reward.redemption_type,
        "asset_id": reward.asset_id,
        "unit_cost": reward.terms.print(reward.unit_cost),
        "status": reward.status,
        "max_total": reward.max_total,
        "max_per_participant": reward.max_per_participant,
        "redeemed_count": reward.redeemed_count,
        "available_from": None if start is None else format_timestamp(start),
        "available_until": None if end is None else format_timestamp(end),
        "metadata": reward.metadata,
        "created_at": format_timestamp(reward.created_at),
        "updated_at": format_timestamp(reward.updated_at),
    }
    if reward.requires_confirmation:
        shown["requires_confirmation"] = True
    if reward.eligibility is not None:
        shown["eligibility"] = reward.eligibility
    return shown
