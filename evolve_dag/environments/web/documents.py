"""Bytes of a document -> text. Runs inside the sandbox (:mod:`confine`): it parses what others wrote.

Standard library at import; trafilatura and markitdown where they are used.
"""

from __future__ import annotations

import io
import re
import sys
import types
from collections.abc import Mapping
from typing import Any

MAX_UNPACKED = 100_000_000
"""Bytes that an Office file may unpack to."""
MAX_LINKS = 80
"""Of a page, in its order."""
SHORT = 200
"""Characters of an article below which the whole page is looked at."""
OFFICE = ("docx", "pptx", "xlsx")


class UnreadableError(ValueError):
    """The document holds no text that can be read; the message says why."""


def prepare(kind: str) -> None:
    """Import what :func:`to_text` needs for ``kind``."""
    if kind == "html":
        import trafilatura  # noqa: F401
    else:
        _converter(kind)


def to_text(body: bytes, kind: str, arguments: Mapping[str, Any]) -> str:
    """Text of ``body``, a document of ``kind`` (``html``, ``pdf``, ``docx``, ``pptx``, ``xlsx``).

    Args:
        arguments: for ``html``: ``url``, the page's address, ``charset`` or '' and ``characters``, the most to give.

    Returns:
        For ``html`` the title on the first line, then the text and a list of links; else Markdown.

    Raises:
        UnreadableError: there is none.
    """
    if kind == "html":
        return _html(body, arguments["url"], arguments["charset"], arguments["characters"])
    if kind in OFFICE:
        _refuse_bomb(body)
    converter = _converter(kind)
    from markitdown import StreamInfo

    result = converter.convert(io.BytesIO(body), StreamInfo(extension=f".{kind}"))
    text: str = result.markdown
    return text[: int(arguments["characters"])]


def _converter(kind: str) -> Any:
    # The converters themselves, not MarkItDown(): that one guesses formats with a neural network (magika), whose runtime
    # costs half of the time of reading a document, opens threads, and is not asked here: the format is known.
    if "magika" not in sys.modules:
        stand_in: Any = types.ModuleType("magika")
        stand_in.Magika = object
        sys.modules["magika"] = stand_in
    from markitdown import converters

    return {
        "pdf": converters.PdfConverter,
        "docx": converters.DocxConverter,
        "pptx": converters.PptxConverter,
        "xlsx": converters.XlsxConverter,
    }[kind]()


def _refuse_bomb(body: bytes) -> None:
    import zipfile

    with zipfile.ZipFile(io.BytesIO(body)) as archive:
        # A size in the directory that is too small ends the member there: zipfile gives no more than it says.
        if sum(member.file_size for member in archive.infolist()) > MAX_UNPACKED:
            raise UnreadableError("it unpacks to too much")


def _html(body: bytes, url: str, charset: str, characters: int) -> str:
    import lxml.html  # type: ignore[import-untyped]
    import trafilatura

    tree = trafilatura.load_html(body.decode(charset, "replace") if charset else body)
    if tree is None:
        raise UnreadableError("it holds no page")
    title = _one_line(tree.findtext(".//title") or "")[:300]
    links = _links(tree, url)
    text = trafilatura.extract(
        tree, url=url or None, output_format="txt", include_comments=False, include_tables=True, favor_recall=True
    )
    if not text or len(text) < SHORT:
        # Lists and menus are no article; what they say is still the page.
        whole = lxml.html.tostring(tree, encoding="unicode")
        plain = trafilatura.html2txt(whole) or ""
        text = plain if len(plain) > len(text or "") else text
    if not text and not links:
        raise UnreadableError("it holds no text")
    listing = ""
    for name, target in links:
        line = f"\n{name}: {target}"
        if len(listing) + len(line) > characters // 4:
            break
        listing += line
    head = (text or "").strip()
    room = characters - len(listing)
    if len(head) > room:
        head = f"{head[:room].rstrip()}\n... (cut after {room} characters)"
    return f"{title}\n{head}" + (f"\n\nlinks:{listing}" if listing else "")


def _links(tree: Any, url: str) -> list[tuple[str, str]]:
    """Where one can go from the page: anchor text and absolute address, each address once."""
    from urllib.parse import urldefrag, urljoin

    found: dict[str, str] = {}
    for anchor in tree.iter("a"):
        name = _one_line(anchor.text_content())[:120]
        try:
            target = urldefrag(urljoin(url, (anchor.get("href") or "").strip())).url
        except ValueError:
            continue
        if name and re.match(r"https?://", target) and target != url and target not in found and len(target) <= 500:
            found[target] = name
        if len(found) >= MAX_LINKS:
            break
    return [(name, target) for target, name in found.items()]


def _one_line(text: str) -> str:
    return " ".join(text.split())
