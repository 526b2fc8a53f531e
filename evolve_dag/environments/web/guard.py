"""Which addresses of the web may be opened. A model chooses them, and pages it reads may tell it to: every one is suspect.

A name is resolved here, every address it has is checked, and the connection goes to the checked address itself
(:mod:`fetch`): between check and connection nobody asks the name again (DNS rebinding).

The block list promises hosts: nothing is asked of a blocked host or of one below it, in whatever spelling and after whatever
redirect. It cannot promise content. An address elsewhere that names a blocked host in plain letters (a proxy's, an archive's)
is refused too; one that hides the name (``huggingface-co.translate.goog``, base64, a shortener's number) is not seen through.

Sources: the IANA special-purpose address registries for IPv4 and IPv6; RFC 6052 (NAT64), RFC 3056 (6to4), RFC 4380 (Teredo);
the WHATWG URL standard for hosts that end in a number.
"""

from __future__ import annotations

import asyncio
import ipaddress
import re
import socket
import unicodedata
from collections.abc import Awaitable, Callable, Collection
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING
from urllib.parse import unquote, urljoin

from evolve_dag.protocols import ToolError

if TYPE_CHECKING:
    import httpx

Address = ipaddress.IPv4Address | ipaddress.IPv6Address
Resolve = Callable[[str, int], Awaitable[list[str]]]
"""Host and port -> addresses as text, in order of preference."""

MAX_URL = 2000
PORTS = frozenset({80, 443})
_REFUSED_4 = tuple(
    ipaddress.IPv4Network(text)
    for text in (
        "0.0.0.0/8", "10.0.0.0/8", "100.64.0.0/10", "127.0.0.0/8", "169.254.0.0/16", "172.16.0.0/12", "192.0.0.0/24",
        "192.0.2.0/24", "192.31.196.0/24", "192.52.193.0/24", "192.88.99.0/24", "192.168.0.0/16", "192.175.48.0/24",
        "198.18.0.0/15", "198.51.100.0/24", "203.0.113.0/24", "224.0.0.0/3",
    )
)  # fmt: skip
_GLOBAL_6 = ipaddress.IPv6Network("2000::/3")
"""All that is given out; whatever is outside is local, reserved, mapped or multicast."""
_REFUSED_6 = tuple(
    ipaddress.IPv6Network(text)
    # protocol assignments with Teredo and ORCHID; documentation; 6to4; direct delegation; documentation
    for text in ("2001::/23", "2001:db8::/32", "2002::/16", "2620:4f:8000::/48", "3fff::/20")
)
_NAT64 = ipaddress.IPv6Network("64:ff9b::/96")
_HOST = re.compile(r"(?=.{1,253}$)(?:[a-z0-9_](?:[a-z0-9_-]{0,61}[a-z0-9_])?\.)*[a-z0-9_](?:[a-z0-9_-]{0,61}[a-z0-9_])?")
_LOCAL_NAMES = ("localhost", "local", "internal", "intranet", "lan", "home", "corp", "onion", "arpa")


def is_public(address: Address) -> bool:
    """Whether an address is one of the public internet. Addresses that carry an IPv4 address in them are judged by that."""
    if isinstance(address, ipaddress.IPv4Address):
        return not any(address in network for network in _REFUSED_4)
    if address.ipv4_mapped is not None:
        return is_public(address.ipv4_mapped)
    if address in _NAT64:
        return is_public(ipaddress.IPv4Address(int(address) & 0xFFFFFFFF))
    return address.scope_id is None and address in _GLOBAL_6 and not any(address in network for network in _REFUSED_6)


@dataclass(frozen=True, slots=True)
class Target:
    """An address of the web that passed: where to connect, and what to ask there."""

    url: httpx.URL
    """As it is asked for."""
    host: str
    """Lower-cased, in ASCII, without a trailing dot."""
    port: int
    addresses: tuple[str, ...]
    """Checked; a connection may go to these and no other."""


class Guard:
    """Decides which addresses may be opened.

    Args:
        blocked: hosts that may not be asked, with all below them (mirrors of the benchmarks, and who would fetch them for us).
        ports: that a public host may be asked at.
        allowed: (host, port) pairs that are let through unchecked, for tests and for services that run on this machine.
        resolve: replaces the system's resolver, in tests.
    """

    def __init__(
        self,
        blocked: Collection[str] = (),
        *,
        ports: Collection[int] = PORTS,
        allowed: Collection[tuple[str, int]] = (),
        resolve: Resolve | None = None,
    ) -> None:
        self.blocked = tuple(sorted({_ascii(host.removeprefix("*.")) for host in blocked if host.strip(".* ")}))
        self._ports = frozenset(ports)
        self._allowed = frozenset(allowed)
        self._resolve = resolve or system_resolve
        # A proxy or an archive would open the blocked page for us: its address often names it.
        names = "|".join(re.escape(host) for host in self.blocked)
        self._mention = re.compile(rf"(?<![a-z0-9-])(?:{names})\.?(?![a-z0-9.-])") if names else None

    def blocks(self, url: str) -> bool:
        """Whether ``url`` is on the block list, or cannot be read."""
        try:
            self._parse(url)
        except ToolError:
            return True
        return False

    async def check(self, url: str) -> Target:
        """Read, resolve and judge ``url``.

        Raises:
            ToolError: it may not be opened; the words hold no address of a private network.
        """
        parsed, host, port = self._parse(url)
        if (host, port) in self._allowed:
            return Target(parsed, host, port, tuple(await self._resolve(host, port)))
        if port not in self._ports:
            raise ToolError(f"this address may not be opened: port {port}")
        literal = _literal(host)
        if literal is None:
            last = host.rpartition(".")[2]
            if "." not in host or last in _LOCAL_NAMES:
                raise ToolError("this address may not be opened: it is not on the public web")
            addresses = await self._resolve(host, port)
        else:
            addresses = [str(literal)]
        if not addresses:
            raise ToolError(f"there is no host {host}")
        # One bad address refuses the name: which of them would be used is not for the name's owner to play with.
        if not all(_public_text(address) for address in addresses):
            raise ToolError("this address may not be opened: it is not on the public web")
        return Target(parsed, host, port, tuple(addresses))

    def _parse(self, url: str) -> tuple[httpx.URL, str, int]:
        import httpx

        if len(url) > MAX_URL:
            raise ToolError(f"this address may not be opened: it is longer than {MAX_URL} characters")
        if re.search(r"[\x00-\x20\x7f-\x9f\\\u2028\u2029]", url):
            raise ToolError("this address may not be opened: it holds spaces or control characters")
        try:
            parsed = httpx.URL(url)
            host = parsed.raw_host.decode("ascii").lower()
            port = parsed.port
        except (httpx.InvalidURL, UnicodeError, ValueError):
            raise ToolError("this is no address: write http://... or https://...") from None
        if parsed.scheme not in ("http", "https"):
            raise ToolError("this is no address that can be opened: write http://... or https://...")
        if parsed.userinfo or re.match(r"[^/?#]*//[^/?#]*@", url):
            raise ToolError("this address may not be opened: it holds a user name")
        host = host.rstrip(".")
        if ":" not in host and not _HOST.fullmatch(host):
            raise ToolError("this address may not be opened: its host is no name")
        if _ends_in_number(host) and _literal(host) is None:
            # 127.1, 0x7f000001, 017700000001: forms that libraries read in different ways.
            raise ToolError("this address may not be opened: its host is no name")
        rest = unicodedata.normalize("NFKC", url)
        for _ in range(3):  # an address within an address may be escaped once more
            rest = unquote(rest)
        if self._blocks_host(host) or (self._mention is not None and self._mention.search(rest.lower())):
            raise ToolError("this address may not be opened: its host is blocked")
        usual = 443 if parsed.scheme == "https" else 80
        return parsed, host, usual if port is None else port

    def _blocks_host(self, host: str) -> bool:
        return any(host == blocked or host.endswith(f".{blocked}") for blocked in self.blocked)


def absolute(base: str, reference: str) -> str:
    """Where a page at ``base`` sends on to.

    Raises:
        ToolError: ``reference`` cannot be read.
    """
    try:
        return urljoin(base, reference)
    except ValueError:
        raise ToolError("the page sends on to what is no address") from None


async def system_resolve(host: str, port: int) -> list[str]:
    """The system's addresses of ``host``, IPv4 first.

    Raises:
        ToolError: there is no such host.
    """
    try:
        found = await asyncio.get_running_loop().getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError):
        raise ToolError(f"there is no host {host}") from None
    addresses = dict.fromkeys(str(sockaddr[0]) for _, _, _, _, sockaddr in found)
    return sorted(addresses, key=lambda address: ":" in address)


def _public_text(address: str) -> bool:
    try:
        return is_public(ipaddress.ip_address(address))
    except ValueError:
        return False


@lru_cache(maxsize=256)
def _literal(host: str) -> Address | None:
    """The address that a host is, in its one canonical form."""
    try:
        return ipaddress.ip_address(host)
    except ValueError:
        return None


def _ends_in_number(host: str) -> bool:
    """WHATWG URL, "ends in a number checker": the host would be read as an IPv4 address by some."""
    last = host.rpartition(".")[2]
    return ":" not in host and re.fullmatch(r"[0-9]+|0[xX][0-9A-Fa-f]*", last) is not None


def _ascii(host: str) -> str:
    import idna

    text = host.strip().strip(".").lower()
    try:
        return text if text.isascii() else idna.encode(text).decode("ascii").lower()
    except idna.IDNAError:
        return text
