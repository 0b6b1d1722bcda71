"""Which network addresses may be fetched from: public ones, and what the configuration allows. Nothing else, whoever redirects there."""

import functools
import socket
from collections.abc import Iterator, Sequence
from ipaddress import IPv4Address, IPv6Address, ip_address, ip_network

Address = IPv4Address | IPv6Address

_NAT64 = ip_network("64:ff9b::/96")
_COMPATIBLE = ip_network("::/96")
_NEVER = tuple(map(ip_network, ("64:ff9b:1::/48", "2001::/32", "fec0::/10", "192.88.99.0/24", "192.0.0.0/24")))
"""Local NAT64, Teredo, site-local, 6to4 relays, protocol assignments: what some Python versions call global."""


class PrivateAddress(OSError):  # noqa: N818 - a verdict, which aiohttp carries through its own exceptions
    """The host is, or resolves to, an address that may not be fetched from."""


class AddressGuard:
    """Decides by address. Made once per downloader, asked for every connection."""

    def __init__(self, allowed_networks: Sequence[str] = ()) -> None:
        self._allowed = tuple(ip_network(network) for network in allowed_networks)
        self._known: dict[str, bool] = {}

    def allows(self, text: str) -> bool:
        """Whether the address `text` (an IPv6 scope may follow) may be connected to."""
        verdict = self._known.get(text)
        if verdict is None:
            verdict = self._known[text] = is_public(text) or self._is_allowed(text)
        return verdict

    def check(self, text: str) -> None:
        """Raises `PrivateAddress` unless `text` may be connected to."""
        if not self.allows(text):
            raise PrivateAddress(None, f"{text} is no public address")

    def open_socket(self, info: tuple[int, int, int, str, tuple[object, ...]]) -> socket.socket:
        """A socket for one `getaddrinfo` result, as aiohttp's `socket_factory`: the last gate before the connection itself."""
        family, kind, protocol, _, where = info
        self.check(str(where[0]))
        return socket.socket(family, kind, protocol)

    def _is_allowed(self, text: str) -> bool:
        return any(address.version == network.version and address in network for address in _meanings(text) for network in self._allowed)


def is_public(text: str) -> bool:
    """Whether an address belongs to the public internet, and every address that it wraps or is translated to as well."""
    return all(_is_public(address) for address in _meanings(text))


@functools.lru_cache(maxsize=4096)
def literal_address(host: str) -> Address | None:
    """The address that a host *is* rather than names, in any spelling that a C library takes; None for a name.

    `127.1`, `0x7f.1`, `017700000001` and `2130706433` all are 127.0.0.1.
    """
    try:
        return ip_address(host.strip("[]"))
    except ValueError:
        pass
    name = host.rstrip(".")
    if not name or name[-1] not in "0123456789abcdefABCDEFxX" or not name[0].isdigit():
        return None
    try:
        return IPv4Address(socket.inet_aton(name))
    except (OSError, ValueError, UnicodeEncodeError):
        return None


def _meanings(text: str) -> Iterator[Address]:
    """The address and, for an IPv6 address that stands for an IPv4 one, that one in place of it where routers do the same."""
    address = ip_address(text.partition("%")[0])
    if isinstance(address, IPv4Address):
        yield address
        return
    if address.ipv4_mapped is not None:
        yield address.ipv4_mapped
        return
    yield address
    if address.sixtofour is not None:
        yield address.sixtofour
    if address in _NAT64 or (address in _COMPATIBLE and int(address) > 1):
        yield IPv4Address(int(address) & 0xFFFFFFFF)


def _is_public(address: Address) -> bool:
    if address.version == 6 and address in _NAT64:
        return True  # the address inside decides
    if any(address.version == network.version and address in network for network in _NEVER):
        return False
    return address.is_global and not (address.is_multicast or address.is_reserved or address.is_loopback or address.is_link_local)
