"""Which addresses a server may dial on behalf of strangers.

The tables are IANA's special-purpose address registries (RFC 6890 and what was added since), written out: Python's own
``is_global`` follows them only from some patch releases on, and counts some of the IPv6 disguises of IPv4 as global.
"""

from __future__ import annotations

from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network

Address = IPv4Address | IPv6Address

_NOT_PUBLIC_4 = tuple(
    IPv4Network(network)
    for network in (
        "0.0.0.0/8",  # this network; 0.0.0.0 reaches the machine itself
        "10.0.0.0/8",
        "100.64.0.0/10",  # carrier-grade NAT; some clouds keep their metadata there
        "127.0.0.0/8",
        "168.63.129.16/32",  # Azure's host agent, in public space and yet inside
        "169.254.0.0/16",  # link-local, the clouds' metadata
        "172.16.0.0/12",
        "192.0.0.0/24",
        "192.0.2.0/24",  # documentation, as 198.51.100 and 203.0.113
        "192.88.99.0/24",  # 6to4 relays
        "192.168.0.0/16",
        "198.18.0.0/15",  # benchmarks
        "198.51.100.0/24",
        "203.0.113.0/24",
        "224.0.0.0/4",  # multicast
        "240.0.0.0/4",  # reserved, broadcast
    )
)
_UNICAST_6 = IPv6Network("2000::/3")  # all that has been given out; what carries or hides IPv4 lies elsewhere, or below
_NOT_PUBLIC_6 = tuple(
    IPv6Network(network)
    for network in (
        "2001::/23",  # protocol assignments, Teredo among them
        "2001:db8::/32",  # documentation, as 3fff
        "2002::/16",  # 6to4
        "3fff::/20",
    )
)
_NAT64 = IPv6Network("64:ff9b::/96")  # how a network without IPv4 spells the addresses of one that has it

_INSIDE = tuple(
    IPv4Network(n) for n in ("10.0.0.0/8", "100.64.0.0/10", "127.0.0.0/8", "172.16.0.0/12", "192.168.0.0/16")
)
_INSIDE_6 = (IPv6Network("::1/128"), IPv6Network("fc00::/7"))


def is_public(address: Address) -> bool:
    """Whether ``address`` belongs to one machine on the public internet.

    IPv4 in the guise of IPv6 (mapped, compatible, 6to4, Teredo) is not, whatever it carries; NAT64's standard prefix
    is judged by the IPv4 address in it. A NAT64 prefix that a network has chosen for itself cannot be told.
    """
    if isinstance(address, IPv4Address):
        return not any(address in network for network in _NOT_PUBLIC_4)
    if address.scope_id is not None:
        return False
    if address in _NAT64:
        return is_public(IPv4Address(int(address) & 0xFFFFFFFF))
    return address in _UNICAST_6 and not any(address in network for network in _NOT_PUBLIC_6)


def is_inside(address: Address) -> bool:
    """Whether ``address`` is this machine's loopback or a private network's.

    Never link-local, multicast, unspecified or reserved ones: nothing that serves pictures to a server lives there, and
    the clouds' metadata does.
    """
    if isinstance(address, IPv4Address):
        return any(address in network for network in _INSIDE)
    return address.scope_id is None and any(address in network for network in _INSIDE_6)
