"""Goal: what the benchmark says about its own figures is true."""

import json
from pathlib import Path

import pytest

from benchmarks.case import Figure
from benchmarks.cases import CASES
from benchmarks.load import Endpoint, percentile
from benchmarks.processes import Moment
from benchmarks.report import Machine, Results, client_cpu_share, save
from benchmarks.system import attach


def test_a_figure_is_invalid_when_the_client_took_more_than_40_percent_of_a_core() -> None:
    assert Figure("rate", 1, "/s", (), 0.40).is_valid
    assert not Figure("rate", 1, "/s", (), 0.41).is_valid
    assert Figure("memory", 1, "MB").is_valid


def test_the_share_shown_is_the_largest_of_all_measurements() -> None:
    figures = {name: Figure(name, 1, "/s", (), share) for name, share in (("a", 0.1), ("b", 0.5), ("c", None))}
    share = client_cpu_share(figures)
    assert share is not None
    assert share.value == 0.5
    assert not share.is_valid
    assert client_cpu_share({"c": figures["c"]}) is None


@pytest.mark.parametrize(
    ("percent", "expected"),
    [(50, 2), (75, 3), (76, 4), (99, 4), (100, 4), (1, 1)],
)
def test_percentiles_are_values_that_occurred(percent: float, expected: float) -> None:
    assert percentile([4, 1, 3, 2], percent) == expected


def test_names_of_figures_are_unique_and_every_case_comes_after_those_it_builds_on() -> None:
    names = [name for case in CASES for name in case.yields]
    assert len(names) == len(set(names))
    seen: set[str] = set()
    for case in CASES:
        assert set(case.after) <= seen
        seen.add(case.name)


def test_the_file_holds_flat_names_and_marks_invalid_ones(tmp_path: Path) -> None:
    results = Results(Machine.now())
    results.figures = {name: Figure(name, 2.5, "/s", (), share) for name, share in (("good", 0.1), ("bad", 0.9))}
    save(tmp_path / "latest.json", results)
    document = json.loads((tmp_path / "latest.json").read_text())
    assert document["good"] == document["bad"] == 2.5
    assert document["run"]["invalid"] == ["bad"]
    assert [path.name for path in tmp_path.iterdir()] == ["latest.json"]


def test_a_request_is_what_a_server_expects_byte_by_byte() -> None:
    endpoint = Endpoint("127.0.0.1", 8080, "sk_secret")
    assert endpoint.post("/v1/events", b'{"a":1}') == (
        b"POST /v1/events HTTP/1.1\r\nHost: 127.0.0.1:8080\r\nAuthorization: Bearer sk_secret\r\n"
        b'Content-Type: application/json\r\nContent-Length: 7\r\n\r\n{"a":1}'
    )


def test_only_plain_http_can_be_measured() -> None:
    assert attach("http://localhost:8080", "sk_x").endpoint == Endpoint("localhost", 8080, "sk_x")
    with pytest.raises(ValueError, match="plain HTTP"):
        attach("https://scrip.example", "sk_x")


def test_what_others_did_is_what_the_processors_did_less_what_we_did() -> None:
    before, after = Moment(at=10, busy=100, ours=20), Moment(at=20, busy=115, ours=30)
    assert after.others_since(before) == 0.5
    assert Moment(at=20, busy=105, ours=30).others_since(before) == 0
