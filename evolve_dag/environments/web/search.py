"""``search`` and ``scholar``: Serper (Google) or a SearXNG instance, as a listing that a policy reads."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from evolve_dag.environments.web.services import Service
from evolve_dag.errors import ConfigError, ModelError
from evolve_dag.inference.addresses import http_host
from evolve_dag.plain import one_line
from evolve_dag.protocols import ToolError
from evolve_dag.secrecy import read_key

SERPER = "https://google.serper.dev"
SERPER_KEY = "SERPER_API_KEY"
SNIPPET_CHARACTERS = 400
MAX_QUERY = 2_000
"""Bytes of a query. Instances hang up on a longer address, which must not look like an outage."""
Kind = Literal["search", "scholar"]


@dataclass(frozen=True, slots=True)
class Result:
    """One entry of a listing."""

    title: str
    url: str
    """'' where the entry has none (an answer box)."""
    snippet: str = ""


@dataclass(frozen=True)
class Searcher:
    """Asks one provider.

    Raises (at :meth:`check`):
        ModelError: the key is missing.
        ConfigError: the address of the instance is.
    """

    provider: Literal["serper", "searxng"]
    results: int
    """Entries of a listing."""
    seconds: float
    """Longest wait for one attempt."""
    base: str = ""
    """Address of the instance; for Serper '' is its own."""
    blocked: Callable[[str], bool] = lambda url: False
    """Whether an address must not be listed."""
    service: Service | None = None
    environment: Mapping[str, str] = field(default_factory=lambda: os.environ)

    def check(self) -> None:
        """Whether calls can succeed at all."""
        if self.provider == "serper" and not read_key(SERPER_KEY, self.environment):
            raise ModelError(
                f"environment.search: serper needs a key, and {SERPER_KEY} is not set",
                f"export {SERPER_KEY}=..., or set environment.search: searxng and environment.searxng to your instance",
            )
        if self.provider == "searxng" and http_host(self.base) is None:
            raise ConfigError(
                f"environment.searxng: {self.base!r} is not the address of an instance",
                "write e.g. searxng: http://127.0.0.1:8080; the instance must allow format=json",
            )

    async def ask(self, kind: Kind, query: str) -> str:
        """The observation: ``10 results`` and a line an entry, or ``no results``.

        Raises:
            ToolError: the query is too long, or the provider refuses it.
            UnreachableError: the provider cannot be asked now, or does not accept the key.
        """
        self.check()
        if len(query.encode(errors="replace")) > MAX_QUERY:
            raise ToolError(f"the query is longer than {MAX_QUERY} bytes")
        name = "Serper" if self.provider == "serper" else "SearXNG"
        service = self.service or Service(name, self.seconds)
        found = await (self._serper if self.provider == "serper" else self._searxng)(service, kind, query)
        kept = [result for result in found if not (result.url and self.blocked(result.url))][: self.results]
        return listing(kept)

    async def _serper(self, service: Service, kind: Kind, query: str) -> list[Result]:
        answer = await service.ask(
            "POST",
            f"{(self.base or SERPER).rstrip('/')}/{kind}",
            headers={"X-API-KEY": read_key(SERPER_KEY, self.environment)},
            content={"q": query, "num": self.results},  # above 10 a call costs twice
        )
        return read_serper(answer)

    async def _searxng(self, service: Service, kind: Kind, query: str) -> list[Result]:
        answer = await service.ask(
            "GET",
            f"{self.base.rstrip('/')}/search",
            parameters={"q": query, "format": "json"} | ({"categories": "science"} if kind == "scholar" else {}),
            forbidden=("does not give JSON", "list json under search.formats in its settings.yml"),
        )
        return read_searxng(answer)


def listing(results: list[Result]) -> str:
    """Entries as the policy reads them, one a line."""
    if not results:
        return "no results"
    lines = [f"{len(results)} result{'s' if len(results) > 1 else ''}"]
    for number, result in enumerate(results, 1):
        snippet = one_line(result.snippet, SNIPPET_CHARACTERS)
        lines.append(
            f"{number}. {one_line(result.title, 200) or 'untitled'}"
            + (f": {snippet}" if snippet else "")
            + (f" ({one_line(result.url, 500)})" if result.url else "")
        )
    return "\n".join(lines)


def read_serper(answer: Any) -> list[Result]:
    """Entries of Serper's answer; the answer box comes first.

    Raises:
        ToolError: it is not one.
    """
    if not isinstance(answer, dict):
        raise ToolError("Serper answered with something that is not a listing")
    found = []
    box = answer.get("answerBox")
    if isinstance(box, dict) and (text := _text(box, "answer", "snippet")):
        found.append(Result(_text(box, "title"), _text(box, "link"), text))
    for entry in _entries(answer.get("organic")):
        facts = [_text(entry, "snippet"), _text(entry, "publicationInfo"), _text(entry, "date", "year")]
        cited = entry.get("citedBy")
        if isinstance(cited, int):
            facts.append(f"cited by {cited}")
        found.append(Result(_text(entry, "title"), _text(entry, "link", "pdfUrl"), "; ".join(filter(None, facts))))
    return found


def read_searxng(answer: Any) -> list[Result]:
    """Entries of SearXNG's answer; its direct answers come first.

    Raises:
        ToolError: it is not one.
    """
    if not isinstance(answer, dict):
        raise ToolError("SearXNG answered with something that is not a listing")
    found = []
    for direct in answer.get("answers") or []:
        text = _text(direct, "answer") if isinstance(direct, dict) else direct if isinstance(direct, str) else ""
        if text:
            found.append(Result("answer", _text(direct, "url") if isinstance(direct, dict) else "", text))
    for entry in _entries(answer.get("results")):
        facts = [_text(entry, "content"), _text(entry, "journal"), _text(entry, "publishedDate")[:10]]
        found.append(Result(_text(entry, "title"), _text(entry, "url"), "; ".join(filter(None, facts))))
    return found


def _entries(value: Any) -> list[dict[str, Any]]:
    return [entry for entry in value if isinstance(entry, dict)] if isinstance(value, list) else []


def _text(entry: dict[str, Any], *names: str) -> str:
    """The first of ``names`` that holds text or a number."""
    for name in names:
        value = entry.get(name)
        if isinstance(value, str) and value.strip():
            return value.strip()
        if isinstance(value, int) and not isinstance(value, bool):
            return str(value)
    return ""
