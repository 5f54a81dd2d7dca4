"""Names, ids, pages, masks and addresses of requests: hostile until checked."""

from __future__ import annotations

import base64

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vswitchd.errors import ApiError
from vswitchd.resources import (
    NIC_ID,
    check_id,
    check_interface_address,
    check_labels,
    check_mac,
    check_mask,
    page,
    parse,
)


def test_a_name_is_taken_apart() -> None:
    assert parse("name", "switches/s0/ports/p0", "switches", "ports") == ("s0", "p0")


@pytest.mark.parametrize(
    "name", ["", "s0", "switches/", "switches/s0/ports", "ports/p0", "switches//ports/p0", "/" * 1000]
)
def test_a_wrong_name_is_refused_with_the_form_that_is_needed(name: str) -> None:
    with pytest.raises(ApiError, match=r"is not a name of the form switches/\{switch\}/ports/\{port\}"):
        parse("name", name, "switches", "ports")


@pytest.mark.parametrize("value", ["", "A", "../x", "a/b", "-a", ".", "a" * 64, "a\n", "a b"])
def test_an_id_that_could_be_a_path_or_an_option_is_refused(value: str) -> None:
    with pytest.raises(ApiError, match="switch_id"):
        check_id("switch_id", value)


@pytest.mark.parametrize("value", ["eth0", "lan.7", "a"])
def test_interface_names_are_ids_of_nics(value: str) -> None:
    assert check_id("nic_id", value, NIC_ID) == value


def test_a_nic_id_longer_than_an_interface_name_is_refused() -> None:
    with pytest.raises(ApiError, match="nic_id"):
        check_id("nic_id", "e" * 16, NIC_ID)


@given(st.lists(st.integers(0, 200), unique=True), st.integers(1, 50))
def test_pages_give_every_item_once_in_order(items: list[int], size: int) -> None:
    seen: list[int] = []
    token = ""
    while True:
        cut, token = page(items, lambda item: (item,), size, token)
        seen += cut
        if not token:
            break
    assert seen == sorted(items)


def test_an_item_deleted_between_pages_does_no_harm() -> None:
    first, token = page(["a", "b", "c"], lambda item: (item,), 2, "")
    assert list(first) == ["a", "b"]
    rest, token = page(["a", "c"], lambda item: (item,), 2, token)
    assert (list(rest), token) == (["c"], "")


@pytest.mark.parametrize(
    "token",
    [
        "x",
        "%%%",
        "é",
        *(base64.b64encode(text).decode() for text in (b"{}", b"[1.5]", b'[["a"]]', b"[1]")),
    ],
)
def test_a_forged_page_token_is_refused(token: str) -> None:
    with pytest.raises(ApiError, match="page_token"):
        page(["a", "b"], lambda item: (item,), 1, token)


@pytest.mark.parametrize("paths", [[], ["name"], ["friendly_name", "uid"]])
def test_an_update_mask_names_only_what_can_be_changed(paths: list[str]) -> None:
    with pytest.raises(ApiError, match="update_mask") as refused:
        check_mask(paths, ["friendly_name"])
    assert "friendly_name" in refused.value.remedy


@pytest.mark.parametrize(
    "mac", ["", "00:15:5d", "01:00:5e:00:00:01", "ff:ff:ff:ff:ff:ff", "00:00:00:00:00:00"]
)
def test_a_mac_address_must_be_one_stations(mac: str) -> None:
    with pytest.raises(ApiError, match="mac"):
        check_mac("mac", mac)


def test_an_address_needs_its_prefix_length() -> None:
    assert check_interface_address("a", "10.0.0.1/24") == "10.0.0.1/24"
    assert check_interface_address("a", "fd00::1/64") == "fd00::1/64"
    with pytest.raises(ApiError, match=r"10\.0\.0\.1 has no prefix length") as refused:
        check_interface_address("a", "10.0.0.1")
    assert refused.value.remedy == "write it as 10.0.0.1/24"


def test_labels_are_bounded() -> None:
    check_labels("labels", {"lab": "two-guests"})
    with pytest.raises(ApiError, match="33 labels"):
        check_labels("labels", {str(number): "" for number in range(33)})
    with pytest.raises(ApiError, match="longer than 255"):
        check_labels("labels", {"lab": "x" * 256})
