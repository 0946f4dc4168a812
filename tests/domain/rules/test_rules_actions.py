"""Actions at save: what each type takes, and what is refused under which field. Contract: rules-and-events.md 5.

No database: what the ids mean is tested through the API.
"""

from decimal import Decimal
from typing import Any

import pytest

from domain.errors import Refusal
from domain.rules.actions import EXPRESSION_CHARS_PER_RULE, Action, parse_actions
from domain.rules.cel import Expression

ASSET = "0197f3b4-c1d2-7c3e-8f00-1a2b3c4d5e6f"
PARTICIPANT = "0197f3b4-c1d2-7c3e-8f00-000000000001"
CREDIT = {"type": "CREDIT", "asset_id": ASSET, "amount": "10"}
TAG = {"type": "TAG", "tag": "vip"}
COUNTER = {"type": "COUNTER", "key": "purchases", "value": "1"}
ATTRIBUTE = {"type": "SET_ATTRIBUTE", "key": "country", "value": "US"}


def parsed(**fields: Any) -> Action:
    return parse_actions([fields])[0]


def refused_fields(*actions: Any) -> list[str]:
    with pytest.raises(Refusal) as refusal:
        parse_actions(actions)
    assert refusal.value.code == "bad_request"
    return [problem.field for problem in refusal.value.problems]


def refusal_message(action: Any) -> str:
    with pytest.raises(Refusal) as refusal:
        parse_actions([action])
    return refusal.value.problems[0].message


# --- what is read -----------------------------------------------------------------------------------------------------


def test_a_credit_has_an_amount_that_is_an_expression_and_goes_to_available() -> None:
    action = parsed(**CREDIT, description="Welcome")

    assert (action.type, str(action.asset_id), action.bucket, action.description) == (
        "CREDIT",
        ASSET,
        "AVAILABLE",
        "Welcome",
    )
    assert isinstance(action.amount, Expression)
    assert action.target is None


def test_actions_keep_their_order_and_what_was_sent() -> None:
    sent = [CREDIT, TAG, COUNTER]

    actions = parse_actions(sent)

    assert [action.index for action in actions] == [0, 1, 2]
    assert [action.raw for action in actions] == sent


def test_a_tag_is_lower_cased_for_the_engine_but_stored_as_sent() -> None:
    action = parsed(type="TAG", tag="VIP")

    assert action.tag == "vip"
    assert action.raw["tag"] == "VIP"


@pytest.mark.parametrize("literal", ["1", "-5", "0.30", "+10", "10.", ".5", " 7 "])
def test_a_counters_value_may_be_any_decimal_literal(literal: str) -> None:
    assert isinstance(parsed(**(COUNTER | {"value": literal})).value, Expression)


@pytest.mark.parametrize("amount", ["1.005", "-5", "event.amount * 10", "round(event.amount * 0.03, 2)"])
def test_whether_an_amount_works_is_decided_when_the_action_runs_literal_or_not(amount: str) -> None:
    assert isinstance(parsed(**(CREDIT | {"amount": amount})).amount, Expression)


def test_null_is_the_same_as_leaving_a_field_out() -> None:
    action = parsed(**CREDIT, bucket=None, description=None, target=None, expires_at=None)

    assert action == Action(0, "CREDIT", action.raw, asset_id=action.asset_id, amount=action.amount)


def test_a_field_that_the_type_does_not_use_has_no_effect() -> None:
    assert parsed(**TAG, amount="event.", tier="status", payload={"n": Decimal(1)}).amount is None


@pytest.mark.parametrize(
    "text",
    [
        "US",
        "gold",
        "2024-01-15",
        "06-15",
        "+1 555 010-0199",
        "1.50",
        "group",
        "string",
        "event",
        "New York",
        "it's",
        "gold && silver",
        "purchase(1)",
    ],
)
def test_an_attribute_that_is_no_expression_over_known_names_is_literal(text: str) -> None:  # 5.12
    assert parsed(**(ATTRIBUTE | {"value": text})).value == text


@pytest.mark.parametrize("text", ["event.country", "'gold'", "now", "string(event.amount)", "event.c.upperAscii()"])
def test_an_attribute_that_compiles_is_an_expression(text: str) -> None:
    assert isinstance(parsed(**(ATTRIBUTE | {"value": text})).value, Expression)


@pytest.mark.parametrize("reset_after", ["720h", "1h30m", ""])
def test_reset_after_is_a_positive_go_duration_or_empty(reset_after: str) -> None:
    assert parsed(**COUNTER, reset_after=reset_after).reset_after == reset_after


def test_a_participant_target_is_an_id_or_an_expression() -> None:
    by_id = parsed(**CREDIT, target={"type": "PARTICIPANT", "id": PARTICIPANT}).target
    by_external_id = parsed(**CREDIT, target={"type": "PARTICIPANT", "external_id": "event.referrer_id"}).target
    by_participant_id = parsed(**TAG, target={"type": "PARTICIPANT", "participant_id": "event.friend"}).target

    assert by_id is not None
    assert str(by_id.id) == PARTICIPANT
    assert by_external_id is not None
    assert by_external_id.external_id is not None
    assert by_participant_id is not None
    assert by_participant_id.participant_id is not None


@pytest.mark.parametrize("action", [TAG, {"type": "UNTAG", "tag": "x"}, COUNTER, ATTRIBUTE])
def test_state_actions_may_target_the_program(action: dict[str, Any]) -> None:
    target = parsed(**action, target={"type": "PROGRAM"}).target

    assert target is not None
    assert target.type == "PROGRAM"


# --- what is refused, and under which name ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("action", "field"),
    [
        ({}, "type"),
        ({"type": None}, "type"),
        ({"type": "CREDT"}, "type"),
        ({"type": Decimal(1)}, "type"),
        ({"type": ["CREDIT"]}, "type"),
        (CREDIT | {"expires_att": "8760h"}, "expires_att"),
        (CREDIT | {"Amount": "1"}, "Amount"),
        ({"type": "CREDIT", "amount": "1"}, "asset_id"),
        ({"type": "CREDIT", "asset_id": ASSET}, "amount"),
        ({"type": "DEBIT", "asset_id": ASSET, "amount": None}, "amount"),
        (CREDIT | {"asset_id": "points"}, "asset_id"),
        (CREDIT | {"asset_id": ASSET.replace("-", "")}, "asset_id"),
        (CREDIT | {"asset_id": "{" + ASSET + "}"}, "asset_id"),
        (CREDIT | {"amount": Decimal(10)}, "amount"),
        (CREDIT | {"amount": ""}, "amount"),
        (CREDIT | {"amount": "event.amount *"}, "amount"),
        (CREDIT | {"amount": "amount"}, "amount"),
        (CREDIT | {"amount": "NaN"}, "amount"),
        (CREDIT | {"bucket": "DEFERRED"}, "bucket"),
        (CREDIT | {"bucket": "available"}, "bucket"),
        (CREDIT | {"bucket": True}, "bucket"),
        (CREDIT | {"hold_until": "72h"}, "hold_until"),
        (TAG | {"hold_until": "72h"}, "hold_until"),
        (CREDIT | {"description": "x" * 501}, "description"),
        (CREDIT | {"type": "DEBIT", "allow_negative": "true"}, "allow_negative"),
        (CREDIT | {"type": "DEBIT", "allow_negative": Decimal(1)}, "allow_negative"),
        ({"type": "TAG"}, "tag"),
        ({"type": "TAG", "tag": ""}, "tag"),
        ({"type": "UNTAG", "tag": "x" * 256}, "tag"),
        ({"type": "TAG", "tag": "İ" * 200}, "tag"),  # two characters each in lower case
        (TAG | {"amount": Decimal(1)}, "amount"),  # even where it has no effect, it is a string
        ({"type": "COUNTER", "value": "1"}, "key"),
        (COUNTER | {"key": ""}, "key"),
        (COUNTER | {"key": "k" * 256}, "key"),
        ({"type": "COUNTER", "key": "k"}, "value"),
        (COUNTER | {"value": "one"}, "value"),
        (COUNTER | {"value": Decimal(1)}, "value"),
        (COUNTER | {"reset_after": "30d"}, "reset_after"),
        (COUNTER | {"reset_after": "0s"}, "reset_after"),
        (COUNTER | {"reset_after": "-24h"}, "reset_after"),
        (ATTRIBUTE | {"value": ""}, "value"),
        (ATTRIBUTE | {"value": "x" * 4_097}, "value"),
        (CREDIT | {"target": "event.referrer_id"}, "target"),
        (CREDIT | {"target": {}}, "target.type"),
        (CREDIT | {"target": {"type": "MERCHANT", "id": PARTICIPANT}}, "target.type"),
        (CREDIT | {"target": {"type": [], "id": PARTICIPANT}}, "target.type"),
        (CREDIT | {"target": {"type": "PROGRAM"}}, "target.type"),
        (CREDIT | {"target": {"type": "PARTICIPANT"}}, "target"),
        (CREDIT | {"target": {"type": "PARTICIPANT", "id": PARTICIPANT, "external_id": "event.x"}}, "target"),
        (CREDIT | {"target": {"type": "PARTICIPANT", "id": "event.referrer_id"}}, "target.id"),
        (CREDIT | {"target": {"type": "PARTICIPANT", "id": Decimal(1)}}, "target.id"),
        (CREDIT | {"target": {"type": "PARTICIPANT", "external_id": "user_1"}}, "target.external_id"),
        (CREDIT | {"target": {"type": "PARTICIPANT", "participant_id": "event."}}, "target.participant_id"),
        (TAG | {"target": {"type": "PROGRAM", "external_id": "event.x"}}, "target.external_id"),
        (TAG | {"target": {"type": "PROGRAM", "id": "x"}}, "target.id"),
    ],
)
def test_a_wrong_action_is_refused_under_the_name_of_its_field(action: dict[str, Any], field: str) -> None:
    assert refused_fields(TAG, action) == [f"actions[1].{field}"]


def test_a_typo_in_a_target_is_refused_too() -> None:
    target = {"type": "PARTICIPANT", "external_id": "event.x", "externl_id": "event.y"}

    assert refused_fields(CREDIT | {"target": target}) == ["actions[0].target.externl_id"]


@pytest.mark.parametrize("action", [None, "CREDIT", Decimal(1), [], True])
def test_an_action_is_an_object(action: Any) -> None:
    assert refused_fields(TAG, action) == ["actions[1]"]


def test_every_problem_is_reported_not_only_the_first() -> None:
    fields = refused_fields(
        {"type": "CREDIT", "asset_id": "x", "amount": "event.", "typo": "1"},
        TAG,
        {"type": "COUNTER", "reset_after": "1 day"},
    )

    assert fields == [
        "actions[0].typo",
        "actions[0].asset_id",
        "actions[0].amount",
        "actions[2].key",
        "actions[2].value",
        "actions[2].reset_after",
    ]


def test_cel_that_does_not_compile_is_explained_with_its_position_and_a_hint() -> None:
    message = refusal_message(CREDIT | {"amount": "event.amount = 3"})

    assert "line 1, column 14" in message
    assert "use ==" in message


@pytest.mark.parametrize(
    "amount", ["1" + "+1" * 2_048, "(" * 65 + "1" + ")" * 65, "-" * 200 + "1", "[" * 2_000, '"' + r"\n" * 40]
)
def test_hostile_cel_is_refused_like_any_other(amount: str) -> None:
    assert refused_fields(CREDIT | {"amount": amount}) == ["actions[0].amount"]


@pytest.mark.parametrize("action_type", ["HOLD", "RELEASE", "FORFEIT", "VOID_HOLD", "SET_TIER", "SCHEDULE_EVENT"])
def test_types_that_this_version_does_not_run_are_refused_and_say_so(action_type: str) -> None:
    assert refusal_message({"type": action_type}) == f"this version does not run {action_type} actions yet"


def test_groups_and_held_are_refused_and_say_so() -> None:
    group = {"type": "GROUP", "id": PARTICIPANT}

    assert refusal_message(CREDIT | {"target": group}) == "this version does not run GROUP targets yet"
    assert refusal_message(CREDIT | {"bucket": "HELD"}) == "this version does not run actions on the HELD bucket yet"


# --- bounds -----------------------------------------------------------------------------------------------------------


def test_a_rule_has_1_to_100_actions() -> None:
    assert len(parse_actions([TAG] * 100)) == 100
    assert refused_fields(*[TAG] * 101) == ["actions"]
    assert refused_fields(*[TAG] * 500) == ["actions"]
    assert refused_fields() == ["actions"]


def test_the_expressions_of_a_rule_are_bounded_together_before_anything_is_compiled() -> None:
    long = COUNTER | {"value": "event.x" + " " * 4_000}

    assert len(parse_actions([long] * 8)) == 8
    assert EXPRESSION_CHARS_PER_RULE < 9 * 4_007
    assert refused_fields(*[long] * 9) == ["actions"]


def test_no_more_than_100_problems_are_collected() -> None:
    hostile = TAG | {f"typo_{i}": "x" for i in range(1_000)}

    assert len(refused_fields(*[hostile] * 100)) == 100
