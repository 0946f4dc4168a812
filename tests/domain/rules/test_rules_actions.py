"""Actions at save: what each type takes, and what is refused under which field. Contract: rules-and-events.md 5.

No database: what the ids mean is tested through the API.
"""

from datetime import UTC, datetime, timedelta
from decimal import Decimal
from typing import Any

import pytest

from domain import limits
from domain.errors import Refusal
from domain.rules.actions import EXPRESSION_CHARS_PER_RULE, Action, parse_actions
from domain.rules.cel import Expression

ASSET = "0197f3b4-c1d2-7c3e-8f00-1a2b3c4d5e6f"
PARTICIPANT = "0197f3b4-c1d2-7c3e-8f00-000000000001"
CREDIT = {"type": "CREDIT", "asset_id": ASSET, "amount": "10"}
TAG = {"type": "TAG", "tag": "vip"}
COUNTER = {"type": "COUNTER", "key": "purchases", "value": "1"}
ATTRIBUTE = {"type": "SET_ATTRIBUTE", "key": "country", "value": "US"}
DEBIT = CREDIT | {"type": "DEBIT"}
HOLD = CREDIT | {"type": "HOLD"}
RELEASE = {"type": "RELEASE", "asset_id": ASSET}
FORFEIT = {"type": "FORFEIT", "asset_id": ASSET}
VOID_HOLD = {"type": "VOID_HOLD", "asset_id": ASSET, "reference_id": "event.authorization_id"}
SCHEDULE_EVENT = {"type": "SCHEDULE_EVENT", "event_name": "check_status", "delay": "24h"}
BROADCAST = {"type": "BROADCAST", "event_name": "check_status"}
ALL = (CREDIT, DEBIT, HOLD, RELEASE, FORFEIT, VOID_HOLD, TAG, COUNTER, ATTRIBUTE, SCHEDULE_EVENT, BROADCAST)
INTO_HELD = CREDIT | {"bucket": "HELD"}


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


@pytest.mark.parametrize("action", ALL)
def test_every_type_needs_only_its_required_fields(action: dict[str, Any]) -> None:
    assert parsed(**action).type == action["type"]


@pytest.mark.parametrize("action", [CREDIT, DEBIT, FORFEIT])
def test_a_bucket_is_available_unless_it_says_held(action: dict[str, Any]) -> None:
    assert parsed(**action).bucket == "AVAILABLE"
    assert parsed(**action, bucket="HELD").bucket == "HELD"


@pytest.mark.parametrize("action", [RELEASE, FORFEIT])
def test_release_and_forfeit_may_leave_the_amount_out(action: dict[str, Any]) -> None:  # 5.7
    assert parsed(**action).amount is None
    assert parsed(**action, amount="5").amount is not None


@pytest.mark.parametrize("action", [CREDIT, DEBIT, HOLD, RELEASE, FORFEIT, VOID_HOLD])
def test_every_asset_action_may_have_a_reference(action: dict[str, Any]) -> None:  # 5.1
    assert parsed(**action | {"reference_id": "event.authorization_id"}).reference_id is not None


@pytest.mark.parametrize("field", ["expires_at", "matures_at", "hold_until"])
@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("8760h", timedelta(days=365)),
        (" 1h30m ", timedelta(minutes=90)),
        ("2027-01-15T10:00:00Z", datetime(2027, 1, 15, 10, tzinfo=UTC)),
        ("2027-01-15T10:00:00+02:00", datetime(2027, 1, 15, 8, tzinfo=UTC)),
        ("2027-01-15", datetime(2027, 1, 15, tzinfo=UTC)),  # as CEL it would be the number 2011
        ("days(30)", timedelta(days=30)),
        ("duration('24h') + duration('30m')", timedelta(hours=24, minutes=30)),
        ("timestamp('2027-01-15T10:00:00Z')", datetime(2027, 1, 15, 10, tzinfo=UTC)),
        ("'72h'", timedelta(hours=72)),
        ("'2027-01-15'", datetime(2027, 1, 15, tzinfo=UTC)),
    ],
)
def test_a_time_is_read_as_duration_then_rfc_3339_then_cel(field: str, text: str, expected: object) -> None:  # 5.5
    action = HOLD if field == "hold_until" else CREDIT

    assert getattr(parsed(**action | {field: text}), field) == expected


@pytest.mark.parametrize("text", ["event.expires_at", "now + days(30)", "has(event.x) ? '24h' : '48h'"])
def test_a_time_that_depends_on_the_event_is_an_expression(text: str) -> None:
    assert isinstance(parsed(**CREDIT, expires_at=text).expires_at, Expression)


def test_an_end_of_a_hold_or_a_maturity_may_have_passed() -> None:  # 5.5, 5.7: released, or available, at once
    assert parsed(**HOLD, hold_until="-1h").hold_until == timedelta(hours=-1)
    assert parsed(**CREDIT, matures_at="0s").matures_at == timedelta(0)


def test_hold_until_goes_with_hold_and_with_credit_into_held() -> None:
    assert parsed(**HOLD, hold_until="72h").hold_until == timedelta(hours=72)
    assert parsed(**INTO_HELD, hold_until="72h", expires_at="8760h").hold_until == timedelta(hours=72)


def test_a_scheduled_event_has_a_name_a_delay_and_a_payload_that_is_not_evaluated() -> None:
    payload = {"amount": Decimal("1.50"), "text": "event.amount", "type": "loses"}

    action = parsed(**SCHEDULE_EVENT, payload=payload)

    assert (action.event_name, action.delay, action.payload) == ("check_status", timedelta(hours=24), payload)
    assert action.expressions() == ()


@pytest.mark.parametrize("delay", ["1us", "24h", "8784h"])
def test_a_delay_is_positive_and_at_most_366_days(delay: str) -> None:
    assert parsed(**SCHEDULE_EVENT | {"delay": delay}).delay


def test_a_payload_has_the_limits_of_event_data() -> None:
    nested: dict[str, Any] = {"a": 1}
    for _ in range(limits.EVENT_DATA_DEPTH - 1):
        nested = {"a": nested}
    largest = {"a": "x" * (limits.EVENT_DATA_BYTES - len('{"a":""}'))}

    assert parsed(**BROADCAST, payload=nested).payload == nested
    assert parsed(**BROADCAST, payload=largest).payload == largest
    assert refused_fields(BROADCAST | {"payload": {"a": nested}}) == ["actions[0].payload"]
    assert refused_fields(BROADCAST | {"payload": {"ab": largest["a"]}}) == ["actions[0].payload"]


@pytest.mark.parametrize("action", [CREDIT, DEBIT, HOLD, RELEASE, FORFEIT, VOID_HOLD, TAG, COUNTER, ATTRIBUTE])
def test_a_group_target_is_a_literal_id_or_an_expression(action: dict[str, Any]) -> None:  # 5.2
    by_id = parsed(**action, target={"type": "GROUP", "id": PARTICIPANT}).target
    by_expression = parsed(**action, target={"type": "GROUP", "id": "event.group_id"}).target

    assert by_id is not None
    assert (str(by_id.id), by_id.group_id) == (PARTICIPANT, None)
    assert by_expression is not None
    assert by_expression.id is None
    assert by_expression.group_id is not None


def test_a_scheduled_event_may_be_for_another_participant() -> None:  # 5.14
    target = parsed(**SCHEDULE_EVENT, target={"type": "PARTICIPANT", "external_id": "event.referrer_id"}).target

    assert target is not None
    assert target.external_id is not None


def test_every_expression_of_an_action_is_listed() -> None:  # the engine learns from them which state is read
    fields = {
        "amount": "event.a",
        "reference_id": "event.b",
        "expires_at": "event.c",
        "hold_until": "event.d",
        "target": {"type": "GROUP", "id": "event.e"},
    }
    matured = parsed(**CREDIT | {"matures_at": "event.f", "target": {"type": "PARTICIPANT", "external_id": "event.g"}})

    assert [e.source for e in parsed(**INTO_HELD | fields).expressions()] == [f"event.{name}" for name in "abcde"]
    assert [e.source for e in matured.expressions()] == ["10", "event.f", "event.g"]


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
        (TAG | {"target": {"type": "PROGRAM", "id": "event.program_id"}}, "target.id"),
        (HOLD | {"amount": None}, "amount"),
        (HOLD | {"target": {"type": "PROGRAM"}}, "target.type"),
        (HOLD | {"hold_until": "72"}, "hold_until"),
        (HOLD | {"hold_until": "tomorrow"}, "hold_until"),
        (HOLD | {"hold_until": "3 days"}, "hold_until"),
        (HOLD | {"hold_until": ""}, "hold_until"),
        (HOLD | {"hold_until": "876601h"}, "hold_until"),
        (DEBIT | {"hold_until": "72h"}, "hold_until"),
        (RELEASE | {"hold_until": "72h"}, "hold_until"),
        (FORFEIT | {"bucket": "HELD", "hold_until": "72h"}, "hold_until"),
        (SCHEDULE_EVENT | {"hold_until": "72h"}, "hold_until"),
        (CREDIT | {"bucket": "AVAILABLE", "hold_until": "event.until"}, "hold_until"),
        (CREDIT | {"expires_at": "365d"}, "expires_at"),
        (CREDIT | {"expires_at": "0s"}, "expires_at"),
        (CREDIT | {"expires_at": "-24h"}, "expires_at"),
        (CREDIT | {"expires_at": "timestamp('soon')"}, "expires_at"),
        (CREDIT | {"expires_at": "true"}, "expires_at"),
        (CREDIT | {"expires_at": "2027-13-01T00:00:00Z"}, "expires_at"),
        (CREDIT | {"expires_at": Decimal(24)}, "expires_at"),
        (CREDIT | {"matures_at": "event."}, "matures_at"),
        (CREDIT | {"expires_at": "24h", "matures_at": "24h"}, "expires_at"),
        (CREDIT | {"expires_at": "2027-01-01", "matures_at": "2027-01-02T00:00:00Z"}, "expires_at"),
        (INTO_HELD | {"matures_at": "24h"}, "matures_at"),
        (DEBIT | {"bucket": "HELD", "allow_negative": True}, "allow_negative"),
        (FORFEIT | {"bucket": "DEFERRED"}, "bucket"),
        (HOLD | {"reference_id": "event."}, "reference_id"),
        (HOLD | {"reference_id": ""}, "reference_id"),
        (RELEASE | {"amount": ""}, "amount"),
        ({"type": "VOID_HOLD", "asset_id": ASSET}, "reference_id"),
        (VOID_HOLD | {"amount": "5"}, "amount"),
        (SCHEDULE_EVENT | {"event_name": None}, "event_name"),
        (SCHEDULE_EVENT | {"event_name": ""}, "event_name"),
        (SCHEDULE_EVENT | {"event_name": "x" * 256}, "event_name"),
        (SCHEDULE_EVENT | {"delay": None}, "delay"),
        (SCHEDULE_EVENT | {"delay": "1d"}, "delay"),
        (SCHEDULE_EVENT | {"delay": "event.delay"}, "delay"),
        (SCHEDULE_EVENT | {"delay": "0s"}, "delay"),
        (SCHEDULE_EVENT | {"delay": "1ns"}, "delay"),
        (SCHEDULE_EVENT | {"delay": "-1h"}, "delay"),
        (SCHEDULE_EVENT | {"delay": "8784h0m1s"}, "delay"),
        (SCHEDULE_EVENT | {"payload": "{}"}, "payload"),
        (SCHEDULE_EVENT | {"payload": [1]}, "payload"),
        (SCHEDULE_EVENT | {"target": {"type": "GROUP", "id": PARTICIPANT}}, "target.type"),
        (SCHEDULE_EVENT | {"target": {"type": "PROGRAM"}}, "target.type"),
        (BROADCAST | {"event_name": None}, "event_name"),
        (BROADCAST | {"target": {"type": "PROGRAM"}}, "target"),
        (BROADCAST | {"target": {"type": "PARTICIPANT", "id": PARTICIPANT}}, "target"),
        (TAG | {"target": {"type": "GROUP"}}, "target.id"),
        (TAG | {"target": {"type": "GROUP", "id": "event."}}, "target.id"),
        (TAG | {"target": {"type": "GROUP", "id": ASSET.replace("-", "")}}, "target.id"),
        (TAG | {"target": {"type": "GROUP", "id": ASSET, "external_id": "event.x"}}, "target.external_id"),
        (TAG | {"target": {"type": "GROUP", "id": ASSET, "participant_id": "event.x"}}, "target.participant_id"),
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


def test_set_tier_is_refused_and_says_so() -> None:
    message = refusal_message({"type": "SET_TIER", "tier": "status", "level": "gold"})

    assert message == "this version does not run SET_TIER actions yet"


def test_a_payload_that_is_too_large_does_not_come_back_in_the_refusal() -> None:
    with pytest.raises(Refusal) as refusal:
        parse_actions([BROADCAST | {"payload": {"a": "x" * 100_000}}])

    assert refusal.value.problems[0].received is None


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


@pytest.mark.parametrize("field", ["reference_id", "expires_at", "matures_at", "hold_until"])
def test_every_kind_of_expression_counts(field: str) -> None:
    action = HOLD if field in ("hold_until", "reference_id") else CREDIT
    long = action | {field: "event.x" + " " * 4_000}

    assert refused_fields(*[long] * 9) == ["actions"]


@pytest.mark.parametrize("name", ["id", "external_id", "participant_id"])
def test_expressions_of_targets_count_too(name: str) -> None:
    target = {"type": "GROUP" if name == "id" else "PARTICIPANT", name: "event.x" + " " * 4_000}

    assert refused_fields(*[TAG | {"target": target}] * 9) == ["actions"]


def test_the_actions_of_a_rule_are_at_most_a_mebibyte() -> None:  # sixteen payloads of the largest size would be more
    large = BROADCAST | {"payload": {"a": "x" * 65_000}}

    assert len(parse_actions([large] * 15)) == 15
    assert refused_fields(*[large] * 17) == ["actions"]


def test_no_more_than_100_problems_are_collected() -> None:
    hostile = TAG | {f"typo_{i}": "x" for i in range(100)}

    assert len(refused_fields(*[hostile] * 100)) == 100
