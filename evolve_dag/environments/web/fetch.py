"""One page of the web into memory, through the guard.

The connection goes to an address that :class:`~evolve_dag.environments.web.guard.Guard` has checked, with the host's name in
the TLS handshake (so certificates are checked against the name) and in the ``Host`` header. Every redirect is checked anew.
No proxy, no cookie, no ``.netrc``, nothing of this machine's settings is used: what is checked is what is asked.
"""

from __future__ import annotations

import asyncio
import re
import ssl
import zlib
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from evolve_dag.environments.web.guard import Guard, Target, absolute
from evolve_dag.protocols import ToolError

if TYPE_CHECKING:
    import httpx

MAX_REDIRECTS = 5
USER_AGENT = "Mozilla/5.0 (compatible; evolve-dag; research agent)"
KINDS = {
    "text/html": "html",
    "application/xhtml+xml": "html",
    "application/pdf": "pdf",
    "application/x-pdf": "pdf",
    "text/plain": "text",
    "text/markdown": "text",
    "text/csv": "text",
    "text/xml": "text",
    "application/xml": "text",
    "application/json": "text",
    "application/ld+json": "text",
    "application/rss+xml": "text",
    "application/atom+xml": "text",
    "application/vnd.openxmlformats-officedocument.wordprocessingml.document": "docx",
    "application/vnd.openxmlformats-officedocument.spreadsheetml.sheet": "xlsx",
    "application/vnd.openxmlformats-officedocument.presentationml.presentation": "pptx",
}
"""Content type -> kind of document; others are refused before their body is read."""

CHARSETS = {
    "ascii": "cp1252",
    "iso8859-1": "cp1252",
    "iso8859-9": "cp1254",
    "iso8859-11": "cp874",
    "tis-620": "cp874",
    "gb2312": "gb18030",
    "gbk": "gb18030",
    "big5": "big5hkscs",
    "euc_kr": "cp949",
    "shift_jis": "cp932",
}
"""What a server calls its character set -> the larger one that pages are written in (WHATWG, Encoding, section 4.2)."""


@dataclass(frozen=True, slots=True)
class Fetched:
    """A body that came whole."""

    url: str
    """Where it came from in the end."""
    kind: str
    """One of the values of :data:`KINDS`."""
    charset: str
    """As the server says; '' where it does not."""
    body: bytes


class RefusedError(ToolError):
    """The server would not give the page; ``again`` where it might later."""

    def __init__(self, message: str, *, again: bool) -> None:
        super().__init__(message)
        self.again = again


async def fetch(url: str, guard: Guard, *, max_bytes: int, seconds: float, tls: ssl.SSLContext | None = None) -> Fetched:
    """Get ``url``.

    Args:
        max_bytes: most that the body may hold, as sent and unpacked.
        seconds: longest time for all of it, names and redirects included.
        tls: in place of the usual authorities, in tests.

    Raises:
        ToolError: it may not be opened, or did not come; says why in words for the policy.
    """
    try:
        async with asyncio.timeout(seconds):
            return await _follow(url, guard, max_bytes, seconds, tls or usual_tls())
    except TimeoutError:
        raise RefusedError(f"the page did not come within {seconds:g} seconds", again=True) from None


async def _follow(url: str, guard: Guard, max_bytes: int, seconds: float, tls: ssl.SSLContext) -> Fetched:
    for _ in range(MAX_REDIRECTS + 1):
        target = await guard.check(url)
        answer = await _ask(target, max_bytes, seconds, tls)
        if isinstance(answer, Fetched):
            return answer
        url = absolute(url, answer)
    raise ToolError(f"the page sends on more than {MAX_REDIRECTS} times")


async def _ask(target: Target, max_bytes: int, seconds: float, tls: ssl.SSLContext) -> Fetched | str:
    """The page, or where it sends on to."""
    import httpx

    problem: Exception | None = None
    for address in target.addresses[:3]:
        request = _request(target, address)
        async with httpx.AsyncHTTPTransport(verify=tls, trust_env=False) as transport:
            try:
                response = await transport.handle_async_request(request)
            except (httpx.ConnectError, httpx.ConnectTimeout) as error:
                problem = error
                continue
            except (httpx.HTTPError, OSError) as error:
                raise RefusedError(f"the page did not come: {type(error).__name__}", again=True) from None
            response.request = request
            try:
                return await _read(target, response, max_bytes)
            except (httpx.HTTPError, httpx.StreamError, zlib.error, OSError) as error:
                raise RefusedError(f"the page did not come whole: {type(error).__name__}", again=True) from None
            finally:
                await response.aclose()
    certificate = "certificate" in str(problem).lower()
    raise RefusedError("its certificate is not valid" if certificate else "no connection to the host", again=not certificate)


def _request(target: Target, address: str) -> httpx.Request:
    import httpx

    # The name is in the header and in the handshake; the connection goes to the number.
    extensions: dict[str, Any] = {"timeout": dict.fromkeys(("connect", "read", "write", "pool"), 30.0)}
    if target.url.scheme == "https" and target.host != address:
        extensions["sni_hostname"] = target.host
    headers = {
        "Host": target.url.netloc.decode("ascii"),
        "User-Agent": USER_AGENT,
        "Accept": "text/html,application/xhtml+xml,application/pdf;q=0.9,*/*;q=0.5",
        "Accept-Language": "en,*;q=0.5",
        "Accept-Encoding": "gzip, deflate",
        "Connection": "close",
    }
    return httpx.Request("GET", target.url.copy_with(host=address, fragment=None), headers=headers, extensions=extensions)


async def _read(target: Target, response: httpx.Response, max_bytes: int) -> Fetched | str:
    status, headers = response.status_code, response.headers
    if status in (301, 302, 303, 307, 308) and "location" in headers:
        return headers["location"].strip()
    if status != 200:
        raise RefusedError(f"the server answers {status}", again=status == 429 or status >= 500)
    content_type, _, parameters = headers.get("content-type", "").partition(";")
    content_type = content_type.strip().lower()
    kind = KINDS.get(content_type)
    if kind is None and content_type not in ("", "application/octet-stream", "binary/octet-stream"):
        raise ToolError(f"this is {content_type[:60]}, not a page of text")
    declared = headers.get("content-length", "")
    if declared.isdigit() and int(declared) > max_bytes:
        raise ToolError(f"the page is larger than {max_bytes} bytes")
    unpack = _unpacker(headers.get("content-encoding", ""))
    body = bytearray()
    received = 0
    async for chunk in response.stream:  # type: ignore[union-attr]
        received += len(chunk)
        if received > max_bytes:
            raise ToolError(f"the page is larger than {max_bytes} bytes")
        body += unpack(chunk, max_bytes + 1 - len(body))
        if len(body) > max_bytes:
            raise ToolError(f"the page unpacks to more than {max_bytes} bytes")
    content = bytes(body)
    if content.startswith(b"%PDF-"):
        kind = "pdf"
    if kind is None:
        if b"\0" in content[:4096]:
            raise ToolError("this is not a page of text")
        kind = "html" if b"<html" in content[:4096].lower() else "text"
    return Fetched(str(target.url.copy_with(fragment=None)), kind, _charset(parameters), content)


def _unpacker(encoding: str) -> Any:
    """What turns sent bytes into bytes of the page, never more than it is asked for: a small body may unpack to gigabytes."""
    name = encoding.strip().lower()
    if name in ("", "identity"):
        return lambda chunk, most: chunk[:most]
    if name not in ("gzip", "x-gzip", "deflate"):
        raise ToolError(f"the page is packed in a way that is not read: {name[:40]}")
    decoder: Any = None

    def unpack(chunk: bytes, most: int) -> bytes:
        nonlocal decoder
        if decoder is None and chunk:
            # deflate comes with and without its zlib header
            bare = name == "deflate" and chunk[0] & 0x0F != 8
            decoder = zlib.decompressobj(-zlib.MAX_WBITS if bare else zlib.MAX_WBITS | 32)
        out = b""
        while chunk and not decoder.eof and len(out) < most:
            out += decoder.decompress(chunk, most - len(out))
            chunk = decoder.unconsumed_tail
        return out

    return unpack


def _charset(parameters: str) -> str:
    import codecs

    for part in parameters.split(";"):
        name, _, value = part.partition("=")
        if name.strip().lower() == "charset":
            try:
                found = codecs.lookup(value.strip().strip("\"'")).name
            except (LookupError, ValueError):
                return ""
            # Python knows codecs that are no character sets (zlib, punycode, unicode_escape).
            known = re.match(r"(utf|iso|cp|koi8|gb|big5|euc|shift_jis|ascii|mac|tis|hz|johab|ptcp)", found)
            return CHARSETS.get(found, found) if known else ""
    return ""


@lru_cache(maxsize=1)
def usual_tls() -> ssl.SSLContext:
    """The usual authorities, whatever the environment says."""
    import certifi

    return ssl.create_default_context(cafile=certifi.where())
