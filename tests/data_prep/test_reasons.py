"""Reasons and groups of them."""

import pickle

import pytest

from data_prep.reasons import CAN_HEAL, REASONS, Drop, explain, is_reason, matches


def test_every_reason_explains_itself() -> None:
    assert all(explain(reason) for reason in REASONS)
    assert explain("http_418") == "the server answered 418"
    assert explain("of another version") == ""


@pytest.mark.parametrize(
    ("reason", "wanted", "result"), [("http_503", "5xx", True), ("http_403", "5xx", False), ("dns", "dns", True), ("tls", "dns", False)]
)
def test_groups_stand_for_their_statuses(reason: str, wanted: str, result: bool) -> None:
    assert matches(reason, frozenset([wanted])) is result


def test_what_can_heal_is_made_of_reasons() -> None:
    assert all(is_reason(reason) for reason in CAN_HEAL)
    assert not is_reason("7xx")


def test_a_verdict_crosses_process_borders() -> None:
    found = pickle.loads(pickle.dumps(Drop("dns", "NXDOMAIN")))
    assert (found.reason, found.detail) == ("dns", "NXDOMAIN")
