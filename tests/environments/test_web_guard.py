from __future__ import annotations

import asyncio
import base64
import ipaddress
import socket

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from evolve_dag.environments.web.fetch import _request
from evolve_dag.environments.web.guard import Guard, Target, absolute, is_public
from evolve_dag.protocols import ToolError

PUBLIC = "93.184.215.14"
PRIVATE_4 = [
    "0.0.0.0", "0.1.2.3", "10.0.0.1", "10.255.255.255", "100.64.0.1", "100.127.255.255", "127.0.0.1", "127.255.0.1",
    "169.254.169.254", "172.16.0.1", "172.31.255.255", "192.0.0.8", "192.0.2.1", "192.88.99.1", "192.168.1.1", "198.18.0.1",
    "198.51.100.7", "203.0.113.9", "224.0.0.1", "239.1.1.1", "240.0.0.1", "255.255.255.255",
]  # fmt: skip
PRIVATE_6 = [
    "::", "::1", "::127.0.0.1", "::ffff:127.0.0.1", "::ffff:10.0.0.1",
    "fe80::1", "fe80::1%eth0", "fc00::1", "fd12::1", "ff02::1",
    "fec0::1", "64:ff9b::10.0.0.1", "64:ff9b::127.0.0.1", "64:ff9b:1::808:808", "2002:7f00:1::", "2002:a00:1::1",
    "2001:0:4136:e378:8000:63bf:3fff:fdd2", "2001:db8::1", "3fff::1", "100::1", "5f00::1", "2001:10::1", "2001:4860::1%1",
]  # fmt: skip


def judge(url: str, guard: Guard) -> Target:
    return asyncio.run(guard.check(url))


def resolving(*answers: list[str]) -> tuple[Guard, list[str]]:
    """A guard whose resolver gives ``answers`` in turn, and what it was asked."""
    asked: list[str] = []

    async def resolve(host: str, port: int) -> list[str]:
        asked.append(host)
        return answers[min(len(asked), len(answers)) - 1]

    return Guard(resolve=resolve), asked


def lenient() -> Guard:
    """As the system's resolver reads numbers: 127.1 and 0x7f000001 are addresses to it."""

    async def resolve(host: str, port: int) -> list[str]:
        try:
            return [socket.inet_ntoa(socket.inet_aton(host))]
        except OSError:
            return [PUBLIC]

    return Guard(resolve=resolve)


@pytest.mark.parametrize("address", [*PRIVATE_4, *PRIVATE_6])
def test_addresses_that_are_not_public(address: str) -> None:
    assert not is_public(ipaddress.ip_address(address))


@pytest.mark.parametrize(
    "address",
    [
        PUBLIC, "1.1.1.1", "100.63.255.255", "100.128.0.1", "172.15.0.1", "172.32.0.1", "192.167.1.1", "223.255.255.255",
        "2606:4700:4700::1111", "2a00:1450:4001::1", "::ffff:8.8.8.8", "64:ff9b::8.8.8.8",
    ],
)  # fmt: skip
def test_addresses_that_are(address: str) -> None:
    assert is_public(ipaddress.ip_address(address))


@given(st.one_of(st.ip_addresses(v=4), st.ip_addresses(v=6)))
def test_never_wider_than_pythons_own_table(address: ipaddress.IPv4Address | ipaddress.IPv6Address) -> None:
    carried = getattr(address, "ipv4_mapped", None)
    if carried is None and address not in ipaddress.ip_network("64:ff9b::/96"):
        assert address.is_global or not is_public(address)


private_4 = st.sampled_from(PRIVATE_4).flatmap(
    lambda text: st.integers(0, 255).map(lambda last: ipaddress.IPv4Address((int(ipaddress.IPv4Address(text)) & ~0xFF) | last))
)


def _forms(address: ipaddress.IPv4Address) -> list[str]:
    number, parts = int(address), str(address).split(".")
    return [
        str(address),
        f"{address}.",
        str(number),
        hex(number),
        hex(number).upper(),
        f"0{number:o}",
        ".".join(hex(int(part)) for part in parts),
        ".".join(f"0{int(part):o}" for part in parts),
        ".".join(f"{int(part):04d}" for part in parts),
        f"{parts[0]}.{number & 0xFFFFFF}",
        f"{parts[0]}.{parts[1]}.{number & 0xFFFF}",
        "．".join(parts),
        "。".join(parts),
        ".".join(chr(0x2460 + int(part) - 1) if 0 < int(part) <= 20 else part for part in parts),  # circled digits
        f"[::ffff:{address}]",
        f"[::ffff:{number >> 16:x}:{number & 0xFFFF:x}]",
        f"[::{address}]",
        f"[64:ff9b::{address}]",
        f"[2002:{number >> 16:x}:{number & 0xFFFF:x}::1]",
        f"[2001:0:4136:e378:8000:63bf:{(number ^ 0xFFFFFFFF) >> 16:x}:{(number ^ 0xFFFFFFFF) & 0xFFFF:x}]",
        f"%{ord(str(address)[0]):02x}{str(address)[1:]}",
    ]


@given(private_4, st.sampled_from(["http", "https", "HTTP"]), st.data())
def test_no_way_of_writing_a_private_address_passes(address: ipaddress.IPv4Address, scheme: str, data: st.DataObject) -> None:
    host = data.draw(st.sampled_from(_forms(address)))
    with pytest.raises(ToolError):
        judge(f"{scheme}://{host}/", lenient())


@given(st.ip_addresses(v=4).filter(is_public))
def test_public_addresses_pass_in_their_one_form_alone(address: ipaddress.IPv4Address) -> None:
    assert judge(f"http://{address}/", lenient()).addresses == (str(address),)
    for form in (str(int(address)), hex(int(address))):
        with pytest.raises(ToolError):
            judge(f"http://{form}/", lenient())


@pytest.mark.parametrize(
    "url",
    [
        "file:///etc/passwd", "ftp://example.com/", "gopher://example.com/", "data:text/html,x", "javascript:alert(1)",
        "//example.com/", "example.com", "", "http://", "http:///x", "http://user@example.com/", "http://user:pw@example.com/",
        "http://@example.com/", "http://example.com:22/", "http://example.com:8080/", "https://example.com:6379/",
        "http://example.com:99999/", "http://exa mple.com/",
        "http://example.com/a b", "http://example.com/\r\nHost: x",
        "http://example.com\\@127.0.0.1/", "http://example.com\t/", "http://localhost/", "http://LOCALHOST./",
        "http://a.localhost/",
        "http://intranet/", "http://db.internal/", "http://printer.local/", "http://[::1]/", "http://[fe80::1%25eth0]/",
        "http://exam%70le.com/", "http://-bad-.com/", "http://a..b/", "http://\u2488.com/",
        "http://ex\u200bample.com/" + "x" * 3000,
        "http://\U0001d41a" + "a" * 70 + ".com/",
    ],
)  # fmt: skip
def test_addresses_that_are_refused_before_any_question_to_the_network(url: str) -> None:
    guard, asked = resolving([PUBLIC])
    with pytest.raises(ToolError):
        judge(url, guard)
    assert not asked


def test_a_good_address_passes_and_keeps_its_name() -> None:
    guard, asked = resolving([PUBLIC, "2606:4700::1"])
    target = judge("https://Example.COM./a?b=c#d", guard)
    assert (target.host, target.port, target.addresses) == ("example.com", 443, (PUBLIC, "2606:4700::1"))
    assert asked == ["example.com"]
    assert judge("http://bücher.example.com/", guard).host == "xn--bcher-kva.example.com"


def test_one_private_address_among_public_ones_refuses_the_name() -> None:
    guard, _ = resolving([PUBLIC, "10.0.0.1"])
    with pytest.raises(ToolError, match="not on the public web") as caught:
        judge("http://rebind.example/", guard)
    assert "10.0.0.1" not in str(caught.value)


def test_a_name_is_asked_once_a_check_and_its_second_answer_decides_nothing() -> None:
    guard, asked = resolving([PUBLIC], ["127.0.0.1"])
    assert judge("http://rebind.example/", guard).addresses == (PUBLIC,)
    assert len(asked) == 1
    with pytest.raises(ToolError):
        judge("http://rebind.example/", guard)


@pytest.mark.parametrize("answers", [[], ["not an address"], [""]])
def test_a_resolver_that_says_nothing_useful(answers: list[str]) -> None:
    guard, _ = resolving(answers)
    with pytest.raises(ToolError):
        judge("http://example.com/", guard)


def test_a_name_that_the_system_does_not_know() -> None:
    with pytest.raises(ToolError, match="no host"):
        judge("http://name.invalid/", Guard())


@pytest.mark.parametrize(
    "url",
    [
        "https://huggingface.co/datasets/x", "https://HuggingFace.CO/", "https://huggingface.co./", "https://a.b.huggingface.co/",
        "https://hf.co/x", "http://bücher.de/", "http://xn--bcher-kva.de/", "http://BÜCHER.de/", "http://huggingface。co/",
        "https://web.archive.org/web/2024/https://huggingface.co/datasets/x", "https://proxy.example/?u=https%3A%2F%2Fhf.co%2Fx",
        "https://proxy.example/?u=https%253A%252F%252Fhf.co%252Fx", "https://r.example/hf.co",
    ],
)  # fmt: skip
def test_the_block_list_holds_whatever_the_spelling(url: str) -> None:
    guard = Guard(["huggingface.co", ".HF.co.", "*.bücher.de"])
    assert guard.blocks(url)
    with pytest.raises(ToolError, match="blocked"):
        judge(url, guard)


@pytest.mark.parametrize(
    "url", ["https://nothuggingface.co/", "https://huggingface.com/", "https://chf.co.uk/", "https://example.com/hf.com/shf.co"]
)
def test_the_block_list_leaves_neighbours_alone(url: str) -> None:
    assert not Guard(["huggingface.co", "hf.co"]).blocks(url)


IDEOGRAPHIC_DOTS = "\u3002\uff0e\uff61"
BLOCKED = ["huggingface.co", "hf.co", "bücher.de"]


@st.composite
def spellings(draw: st.DrawFn) -> str:
    """An address of a blocked host, or of one below it, as a browser would take it."""
    host = draw(st.sampled_from(BLOCKED))
    below = draw(st.sampled_from(["", "www.", "a.b.", "xn--bcher-kva.", "1.2.3.4."]))
    dots = st.sampled_from([".", *IDEOGRAPHIC_DOTS])
    letters = [
        draw(st.sampled_from([c, c.upper(), chr(ord(c) + 0xFEE0)])) if c.isascii() and c.isalpha() else c for c in below + host
    ]
    spelled = "".join(draw(dots) if c == "." else c for c in letters) + draw(st.sampled_from(["", "."]))
    port = draw(st.sampled_from(["", ":80", ":443", ":00443", ":", ":8080", ":0"]))
    rest = draw(st.sampled_from(["", "/", "/a/b", "?q=1", "#x", "/a?b#c", "/%2e%2e/"]))
    return f"{draw(st.sampled_from(['http', 'https', 'HTTPS']))}://{spelled}{port}{rest}"


@given(spellings())
def test_no_spelling_of_a_blocked_host_is_asked(url: str) -> None:
    """What the block list promises: hosts."""
    guard, asked = resolving([PUBLIC])
    guard = Guard(BLOCKED, resolve=guard._resolve)
    assert guard.blocks(url)
    with pytest.raises(ToolError):
        judge(url, guard)
    assert not asked


@pytest.mark.parametrize(
    "url",
    [
        "https://huggingface-co.translate.goog/datasets/x?_x_tr_sl=en",
        f"https://proxy.example/?u={base64.b64encode(b'https://huggingface.co/datasets/x').decode()}",
        "https://short.example/3xYz",
        "https://mirror.example/GAIA/validation.jsonl",
    ],
)
def test_what_the_block_list_does_not_promise(url: str) -> None:
    """Another host that hides which page it gives: SECURITY.md says so. Its own name can be blocked."""
    guard, asked = resolving([PUBLIC])
    assert not Guard(BLOCKED).blocks(url)
    assert judge(url, Guard(BLOCKED, resolve=guard._resolve)).addresses == (PUBLIC,)
    assert len(asked) == 1
    host = url.split("/")[2]
    assert Guard([*BLOCKED, host.partition(".")[2] if host.endswith("goog") else host]).blocks(url)


FRAGMENTS = st.sampled_from(
    [
        "http", "https", ":", "//", "/", "@", "[", "]", "::1", "[::1", "[::ffff:1.2.3.4]", "[v1.x]", "[fe80::1%25eth0]",
        "%25", "%00", "%", "xn--",
        "xn--a", "xn--\u00fc", "example.com", "a.b", ".", "..", *IDEOGRAPHIC_DOTS, "\u2488", "ß", "\u200d", "\u0301",
        "\U0001d41a", "\ud800", "\uffff", "\u202e", "-", "_", "0", ":0", ":65536", ":-1", ":80", ":\u0663", "1", "\u0661", "²",
        "?", "#",
        "\\", "\t", "a" * 64, "a" * 300, "é", "ا", "א", "\u00ad", "\ufe0f", "İ", "ﬀ", "%E2%80%8B",
    ]
)  # fmt: skip
anything = st.lists(FRAGMENTS | st.text(max_size=4), max_size=8).map("".join)
hosts = st.lists(
    st.sampled_from(["example", "com", "a-b", "xn--bcher-kva", "bücher", "1", "münchen", "☃", "中文"]), min_size=2, max_size=4
)
addresses = st.builds(
    "{}{}{}{}".format, st.sampled_from(["http://", "https://"]), hosts.map(".".join), st.just("/") | anything, anything
)


@given(addresses | anything | st.builds("http://{}".format, anything))
@example("http://[::1")
@example("http://example.com:0/")
def test_every_address_is_refused_or_can_be_asked_for(url: str) -> None:
    guard, _ = resolving([PUBLIC, "2606:4700::1"])
    try:
        target = judge(url, guard)
    except ToolError:
        return
    assert target.port in (80, 443)
    for address in target.addresses:
        request = _request(target, address)
        assert request.url.host == address
        assert (request.url.port or target.port) == target.port
        assert request.headers["host"].isascii()


@given(anything | addresses, st.sampled_from(["http://example.com/", "https://example.com/a/b?c=d", "http://[2606:4700::1]/x"]))
@example("http://[::1", "http://example.com/")
@example("//[\xdf]", "http://example.com/")
@example("//exa\u2100mple.com", "http://example.com/")
def test_a_page_sends_on_to_an_address_or_is_refused(location: str, base: str) -> None:
    guard, _ = resolving([PUBLIC])
    try:
        judge(absolute(base, location), guard)
    except ToolError:
        return


def test_an_empty_block_list_blocks_nothing() -> None:
    assert not Guard(["", "*."]).blocks("https://example.com/")
    assert Guard().blocks("ftp://example.com/")


def test_what_is_allowed_for_this_machine_is_one_port_of_it() -> None:
    guard = Guard(["example.com"], allowed=[("127.0.0.1", 8765)])
    assert judge("http://127.0.0.1:8765/", guard).port == 8765
    for url in ("http://127.0.0.1:8766/", "http://127.0.0.1/", "http://127.0.0.2:8765/", "http://127.1:8765/"):
        with pytest.raises(ToolError):
            judge(url, guard)
