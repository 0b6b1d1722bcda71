import socket

import pytest

from data_prep.download.addresses import AddressGuard, PrivateAddress, literal_address

PRIVATE = [
    "0.0.0.0",
    "0.1.2.3",
    "10.0.0.1",
    "10.255.255.255",
    "100.64.0.1",
    "100.127.255.255",
    "127.0.0.1",
    "127.255.255.254",
    "169.254.169.254",
    "172.16.0.1",
    "172.31.255.255",
    "192.0.0.1",
    "192.0.0.9",
    "192.0.2.1",
    "192.88.99.1",
    "192.168.0.1",
    "198.18.0.1",
    "198.51.100.1",
    "203.0.113.1",
    "224.0.0.1",
    "239.255.255.255",
    "240.0.0.1",
    "255.255.255.255",
    "::",
    "::1",
    "::127.0.0.1",
    "::8.8.8.8",
    "::ffff:127.0.0.1",
    "::ffff:10.0.0.1",
    "::ffff:169.254.169.254",
    "64:ff9b::127.0.0.1",
    "64:ff9b::10.0.0.1",
    "64:ff9b:1::1",
    "2001::1",
    "2001:db8::1",
    "2002:7f00:1::",
    "2002:a00:1::1",
    "fc00::1",
    "fd12:3456::1",
    "fe80::1",
    "fe80::1%eth0",
    "fec0::1",
    "ff02::1",
    "ff0e::1",
    "100::1",
]

PUBLIC = [
    "1.1.1.1",
    "8.8.8.8",
    "100.63.255.255",
    "172.32.0.1",
    "198.17.255.255",
    "223.255.255.255",
    "2606:4700::1111",
    "::ffff:8.8.8.8",
    "64:ff9b::8.8.8.8",
]


@pytest.mark.parametrize("address", PRIVATE)
def test_what_is_not_public_is_refused(address: str) -> None:
    assert not AddressGuard().allows(address)
    with pytest.raises(PrivateAddress):
        AddressGuard().check(address)


@pytest.mark.parametrize("address", PUBLIC)
def test_public_addresses_are_allowed(address: str) -> None:
    assert AddressGuard().allows(address)


def test_allowed_networks_are_exceptions_and_no_more() -> None:
    guard = AddressGuard(("10.2.0.0/16", "fd00::/8"))
    assert [guard.allows(address) for address in ("10.2.3.4", "10.3.0.1", "127.0.0.1")] == [True, False, False]
    assert [guard.allows(address) for address in ("fd00::1", "fc00::1", "::ffff:10.2.3.4", "::ffff:10.3.0.1")] == [True, False, True, False]


@pytest.mark.parametrize(
    "host",
    ["127.0.0.1", "127.1", "127.0.1", "2130706433", "0x7f000001", "0x7f.1", "0177.0.0.1", "017700000001", "0x7f.0x0.0x0.0x1", "127.0.0.1."],
)
def test_odd_spellings_are_addresses(host: str) -> None:
    assert str(literal_address(host)) == "127.0.0.1"


@pytest.mark.parametrize(
    "host", ["example.org", "1password.com", "0xdeadbeef.org", "127.0.0.1.nip.example", "1.2.3.4.5", "cafe", "256.1.1.1", "", "face.de"]
)
def test_names_are_not_addresses(host: str) -> None:
    assert literal_address(host) is None


def test_the_socket_itself_is_guarded() -> None:
    info = (socket.AF_INET, socket.SOCK_STREAM, 0, "", ("127.0.0.1", 80))
    with pytest.raises(PrivateAddress):
        AddressGuard().open_socket(info)
    AddressGuard(("127.0.0.0/8",)).open_socket(info).close()
