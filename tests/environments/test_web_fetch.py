from __future__ import annotations

import asyncio
import gzip
import ssl
import time
import zlib
from collections.abc import Iterator
from pathlib import Path

import pytest
import web_fakes
from web_fakes import Reply, Web

from evolve_dag.environments.web.fetch import MAX_REDIRECTS, Fetched, RefusedError, fetch
from evolve_dag.environments.web.guard import Guard
from evolve_dag.protocols import ToolError

HTML = {"Content-Type": "text/html; charset=utf-8"}


def get(web: Web, path: str = "/", *, most: int = 100_000, seconds: float = 5.0, guard: Guard | None = None) -> Fetched:
    guard = guard or Guard(["blocked.example"], allowed=[web.place])
    return asyncio.run(fetch(f"{web.base}{path}", guard, max_bytes=most, seconds=seconds))


def test_a_page(web: Web) -> None:
    web.pages["/a"] = Reply(b"<html>hello</html>")
    assert get(web, "/a?x=1#part") == Fetched(f"{web.base}/a?x=1", "html", "utf-8", b"<html>hello</html>")
    heard = web.heard[0]
    assert heard.path == "/a?x=1"
    assert "cookie" not in heard.headers
    assert "authorization" not in heard.headers


@pytest.mark.parametrize(
    ("content_type", "body", "kind", "charset"),
    [
        ("text/html", b"x", "html", ""),
        ("TEXT/HTML; Charset=ISO-8859-1", b"x", "html", "cp1252"),
        ('application/json; charset="utf-8"', b"{}", "text", "utf-8"),
        ("text/plain; charset=zlib", b"x", "text", ""),
        ("text/plain; charset=unicode_escape", b"x", "text", ""),
        ("text/plain; charset=no-such", b"x", "text", ""),
        ("application/pdf", b"%PDF-1.4", "pdf", ""),
        ("application/octet-stream", b"%PDF-1.4", "pdf", ""),
        ("text/html", b"%PDF-1.4", "pdf", ""),
        ("", b"<HTML><p>x", "html", ""),
        ("", b"plain words", "text", ""),
    ],
)
def test_kinds(web: Web, content_type: str, body: bytes, kind: str, charset: str) -> None:
    web.pages["/"] = Reply(body, headers={"Content-Type": content_type} if content_type else {})
    fetched = get(web)
    assert (fetched.kind, fetched.charset) == (kind, charset)


@pytest.mark.parametrize(
    "content_type", ["image/png", "video/mp4", "application/zip", "application/x-executable", "multipart/x"]
)
def test_other_kinds_are_refused(web: Web, content_type: str) -> None:
    web.pages["/"] = Reply(b"x", headers={"Content-Type": content_type})
    with pytest.raises(ToolError, match="not a page of text"):
        get(web)


def test_bytes_without_a_kind_are_refused(web: Web) -> None:
    web.pages["/"] = Reply(b"MZ\0\0", headers={})
    with pytest.raises(ToolError, match="not a page of text"):
        get(web)


@pytest.mark.parametrize("status", [404, 403, 410, 429, 500, 503, 204])
def test_other_statuses_are_no_page(web: Web, status: int) -> None:
    web.pages["/"] = Reply(b"", status)
    with pytest.raises(RefusedError, match=str(status)) as caught:
        get(web)
    assert caught.value.again == (status in (429, 500, 503))


# ---------------------------------------------------------------- redirects


@pytest.mark.parametrize(
    "location",
    [
        "http://10.0.0.1/", "http://169.254.169.254/latest/meta-data/", "http://[::1]/", "http://127.0.0.1:1/", "http://127.1/",
        "http://localhost/", "file:///etc/passwd", "ftp://example.com/", "http://user@example.com/", "https://blocked.example/x",
        "//blocked.example./x", "http://0x7f000001/", "gopher://x/", "http://[::ffff:10.0.0.1]/",
    ],
)  # fmt: skip
def test_a_redirect_is_checked_like_the_first_address(web: Web, location: str) -> None:
    web.pages["/"] = Reply(status=302, headers={"Location": location})
    with pytest.raises(ToolError, match="address"):
        get(web)
    assert len(web.heard) == 1


@pytest.mark.parametrize(
    "location",
    [
        "http://[::1", "http://[", "//[", "http://[::1]x/", "http://example.com:port/", "http://example.com:0/", "//[v1.x]/",
        "http://\xdf[/",
        "http://" + "a" * 300 + ".com/", "http://xn--\xfc.com/", "http://%00/", "http:", "http://", "\xa0",
        "http://a..b/", "[::1]:80",
    ],
)  # fmt: skip
def test_a_redirect_to_what_is_no_address_refuses_the_page(web: Web, location: str) -> None:
    web.pages["/"] = Reply(status=302, headers={"Location": location})
    with pytest.raises(ToolError):
        get(web)


def test_a_name_is_resolved_and_judged_on_every_redirect(web: Web) -> None:
    """The first answer is harmless, the second is this machine: the rebinding that a check before the redirects would miss."""
    asked: list[str] = []

    async def resolve(host: str, port: int) -> list[str]:
        asked.append(host)
        return ["127.0.0.1"]

    # The first hop is let through by name and port, as a public host would be; the second is another name.
    guard = Guard(ports=[80, 443, web.port], allowed=[("first.example", web.port)], resolve=resolve)
    web.pages["/"] = Reply(status=307, headers={"Location": f"http://second.example:{web.port}/secret"})
    web.pages["/secret"] = Reply(b"secret")
    with pytest.raises(ToolError, match="not on the public web"):
        asyncio.run(fetch(f"http://first.example:{web.port}/", guard, max_bytes=1000, seconds=5))
    assert asked == ["first.example", "second.example"]
    assert [heard.path for heard in web.heard] == ["/"]


def test_the_connection_goes_to_the_checked_address_under_the_name(web: Web) -> None:
    """No resolver but ours knows the name, so a second question to the system would fail; the server hears the name."""
    asked: list[str] = []

    async def resolve(host: str, port: int) -> list[str]:
        asked.append(host)
        return ["127.0.0.1"]

    web.pages["/x"] = Reply(b"<html>pinned</html>")
    guard = Guard(allowed=[("pinned.invalid", web.port)], resolve=resolve)
    fetched = asyncio.run(fetch(f"http://Pinned.invalid:{web.port}/x", guard, max_bytes=1000, seconds=5))
    assert fetched.body == b"<html>pinned</html>"
    assert asked == ["pinned.invalid"]
    assert web.heard[0].headers["host"] == f"pinned.invalid:{web.port}"


def test_relative_redirects_are_followed_up_to_a_limit(web: Web) -> None:
    for hop in range(MAX_REDIRECTS):
        web.pages[f"/{hop}"] = Reply(status=301, headers={"Location": f"./{hop + 1}"})
    web.pages[f"/{MAX_REDIRECTS}"] = Reply(b"end")
    assert get(web, "/0").body == b"end"
    web.pages["/loop"] = Reply(status=302, headers={"Location": "/loop"})
    web.heard.clear()
    with pytest.raises(ToolError, match="sends on more than"):
        get(web, "/loop")
    assert len(web.heard) == MAX_REDIRECTS + 1


def test_no_proxy_of_the_environment_is_used(web: Web, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:9/")
    web.pages["/"] = Reply(b"direct")
    assert get(web).body == b"direct"


# ---------------------------------------------------------------- sizes and times


def test_a_body_of_exactly_the_limit_passes_and_one_byte_more_does_not(web: Web) -> None:
    web.pages["/"] = Reply(b"x" * 5000)
    assert len(get(web, most=5000).body) == 5000
    with pytest.raises(ToolError, match="larger than 4999"):
        get(web, most=4999)


def test_a_body_without_an_end_is_cut_off(web: Web) -> None:
    sent = 0

    def endless() -> Iterator[bytes]:
        nonlocal sent
        while True:
            sent += 65_536
            yield b"x" * 65_536

    web.pages["/"] = Reply(chunks=endless)
    with pytest.raises(ToolError, match="larger"):
        get(web, most=200_000)
    assert sent < 20_000_000


@pytest.mark.parametrize("encoding", ["gzip", "deflate", "bare deflate", "x-gzip"])
def test_packed_pages_are_unpacked(web: Web, encoding: str) -> None:
    page = b"<html>" + bytes(range(256)) * 20
    bare = zlib.compressobj(wbits=-zlib.MAX_WBITS)
    packed = {"deflate": zlib.compress(page), "bare deflate": bare.compress(page) + bare.flush()}.get(
        encoding, gzip.compress(page)
    )
    web.pages["/"] = Reply(packed, headers={**HTML, "Content-Encoding": encoding.removeprefix("bare ")})
    assert get(web).body == page


def test_a_bomb_is_not_unpacked(web: Web) -> None:
    packed = gzip.compress(b"0" * 300_000_000, 9)
    assert len(packed) < 400_000
    web.pages["/"] = Reply(packed, headers={**HTML, "Content-Encoding": "gzip"})
    started = time.monotonic()
    with pytest.raises(ToolError, match="unpacks to more"):
        get(web, most=1_000_000)
    assert time.monotonic() - started < 3


@pytest.mark.parametrize("encoding", ["br", "zstd", "gzip, gzip", "compress"])
def test_other_packings_are_refused(web: Web, encoding: str) -> None:
    web.pages["/"] = Reply(b"x", headers={**HTML, "Content-Encoding": encoding})
    with pytest.raises(ToolError, match="packed"):
        get(web)


def test_damaged_and_cut_bodies(web: Web) -> None:
    web.pages["/"] = Reply(b"no gzip at all", headers={**HTML, "Content-Encoding": "gzip"})
    with pytest.raises(RefusedError, match="not come whole"):
        get(web)
    web.pages["/"] = Reply(b"short", headers={**HTML, "Content-Length": "500"})
    with pytest.raises(RefusedError, match="not come whole"):
        get(web)


def test_a_server_that_drips_is_left(web: Web) -> None:
    def drip() -> Iterator[bytes]:
        for _ in range(100):
            time.sleep(0.05)
            yield b"x"

    web.pages["/"] = Reply(chunks=drip)
    started = time.monotonic()
    with pytest.raises(RefusedError, match=r"within 0\.3 seconds") as caught:
        get(web, seconds=0.3)
    assert caught.value.again
    assert time.monotonic() - started < 2


def test_nobody_listens() -> None:
    with web_fakes.serve() as gone:
        pass
    with pytest.raises(RefusedError, match="no connection"):
        get(gone)


def test_the_second_address_is_tried_when_the_first_does_not_connect(web: Web) -> None:
    async def resolve(host: str, port: int) -> list[str]:
        return ["127.0.0.9", "127.0.0.1"]  # the server listens at the second alone

    web.pages["/"] = Reply(b"here")
    guard = Guard(allowed=[("two.invalid", web.port)], resolve=resolve)
    assert asyncio.run(fetch(f"http://two.invalid:{web.port}/", guard, max_bytes=100, seconds=5)).body == b"here"


# ---------------------------------------------------------------- TLS


def test_certificates_are_checked_against_the_name_not_the_address(tmp_path: Path) -> None:
    pem = web_fakes.certificate(tmp_path, "good.invalid")
    ours = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    ours.load_cert_chain(pem)
    trust = ssl.create_default_context(cafile=str(pem))

    async def resolve(host: str, port: int) -> list[str]:
        return ["127.0.0.1"]

    with web_fakes.serve(ours) as web:
        web.pages["/"] = Reply(b"<html>safe</html>")
        guard = Guard(allowed=[("good.invalid", web.port), ("evil.invalid", web.port)], resolve=resolve)

        def over_tls(host: str, trusted: ssl.SSLContext | None) -> Fetched:
            return asyncio.run(fetch(f"https://{host}:{web.port}/", guard, max_bytes=1000, seconds=5, tls=trusted))

        assert over_tls("good.invalid", trust).body == b"<html>safe</html>"
        with pytest.raises(ToolError, match="certificate"):
            over_tls("evil.invalid", trust)
        with pytest.raises(ToolError, match="certificate"):
            over_tls("good.invalid", None)
