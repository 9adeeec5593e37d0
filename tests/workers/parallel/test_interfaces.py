"""Which network interface a gang binds."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from pipeline.errors import JobError
from workers.parallel.group import _choose_interface, interface_of, own_address

VARIABLES = ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME")


@pytest.fixture(autouse=True)
def no_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    for variable in VARIABLES:
        monkeypatch.setenv(variable, "")  # so that it is put back
        monkeypatch.delenv(variable)


def test_an_interface_is_found_by_its_address() -> None:
    assert interface_of("127.0.0.1") == "lo"
    assert interface_of("192.0.2.77") is None
    table = Path("/proc/net/if_inet6")
    if table.exists() and " lo" in table.read_text():
        assert interface_of("::1") == "lo"
    assert interface_of("2001:db8::77") is None


def test_the_address_that_others_see_is_of_the_way_to_them() -> None:
    assert own_address("127.0.0.9", 9) == "127.0.0.1"


def test_an_interface_that_is_not_found_is_told_where_the_loopback_would_not_do(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    _choose_interface("192.0.2.77", spans=False)
    with pytest.raises(JobError, match=r"no network interface of this node is known to have 192\.0\.2\.77"):
        _choose_interface("192.0.2.77", spans=True)
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "mine")
    _choose_interface("192.0.2.77", spans=True)
    _choose_interface("127.0.0.1", spans=False)
    assert [os.environ[variable] for variable in VARIABLES] == ["mine", "lo"]
