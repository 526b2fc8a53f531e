"""``visit``: a page of the web as text, and what of it serves the policy's goal."""

from __future__ import annotations

import asyncio
import codecs
import json
import logging
import os
from collections.abc import Callable, Mapping
from concurrent.futures import Executor
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from evolve_dag import prompts
from evolve_dag.environments.web.fetch import Fetched, RefusedError, fetch
from evolve_dag.environments.web.guard import Guard
from evolve_dag.environments.web.services import Service
from evolve_dag.errors import ExhaustedError, UnreachableError
from evolve_dag.inference.ledger import purpose
from evolve_dag.inference.reasoning import said
from evolve_dag.plain import head, one_line, plain
from evolve_dag.prompts import fence
from evolve_dag.protocols import Request, Sampling, ToolError
from evolve_dag.records import Message
from evolve_dag.secrecy import describe_error, read_key
from evolve_dag.store.memory import Memory

if TYPE_CHECKING:
    from evolve_dag.environments.web.sandbox import Sandbox
    from evolve_dag.protocols import LanguageModel

JINA = "https://r.jina.ai"
JINA_KEY = "JINA_API_KEY"
PROMPT = "environments/web/page_summary"
SUMMARY_TOKENS = 600
PARSE_SECONDS = 20.0

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class ReadPage:
    """A page that was read."""

    url: str
    """Where it came from in the end."""
    title: str
    text: str

    @property
    def title_line(self) -> str:
        """First line of an observation."""
        return f"page: {one_line(self.title) or one_line(self.url, 500)}"

    @property
    def shown(self) -> str:
        """Title line and text."""
        return f"{self.title_line}\n{self.text}"


@dataclass(frozen=True)
class LocalReader:
    """Fetches through the guard and reads in the sandbox."""

    guard: Guard
    parser: Callable[[], Sandbox]
    executor: Executor
    """Runs the parser's processes, a few at a time."""
    max_bytes: int
    characters: int
    seconds: float
    attempts: int = 2
    pause: float = 1.0

    async def read(self, url: str) -> ReadPage:
        """The page at ``url``.

        Raises:
            ToolError: it may not be opened, did not come, or holds no text.
        """
        for attempt in range(self.attempts):
            try:
                fetched = await fetch(url, self.guard, max_bytes=self.max_bytes, seconds=self.seconds)
                break
            except RefusedError as problem:
                if attempt + 1 == self.attempts or not problem.again:
                    raise
                await asyncio.sleep(self.pause)
        return await self._text(fetched)

    async def _text(self, fetched: Fetched) -> ReadPage:
        if fetched.kind == "text":
            text = fetched.body.decode(fetched.charset, "replace") if fetched.charset else decoded(fetched.body)
            return ReadPage(fetched.url, "", head(text.removeprefix("\ufeff"), self.characters))
        arguments = {"url": fetched.url, "charset": fetched.charset, "characters": self.characters + 1}
        text = await asyncio.get_running_loop().run_in_executor(
            self.executor, lambda: parse(self.parser(), fetched.body, fetched.kind, arguments)
        )
        if fetched.kind != "html":
            return ReadPage(fetched.url, "", head(text, self.characters))
        title, _, rest = text.partition("\n")
        return ReadPage(fetched.url, title, rest)  # its end is its links, so it was cut to size where it was read


def decoded(body: bytes, *, whole: bool = True) -> str:
    """Text of which nothing says how it is encoded; where it is not ``whole``, its last character may be cut through."""
    encoding = "utf-16" if body.startswith((b"\xff\xfe", b"\xfe\xff")) else "utf-8-sig"
    try:
        return codecs.getincrementaldecoder(encoding)().decode(body, whole)
    except UnicodeDecodeError:
        text = body.decode("utf-8-sig", "replace")
        broken = text.count("\ufffd")
        if sum(not character.isascii() for character in text) > 2 * broken:  # a damaged byte of much that can be read
            return text
        return body.decode("cp1252", "replace")  # what old spreadsheets and old servers write


def parse(sandbox: Sandbox, body: bytes, kind: str, arguments: Mapping[str, object]) -> str:
    """Text of a document.

    Raises:
        ToolError: it has none, or reading it took too much.
        SessionError: nothing could be started to read it.
    """
    from evolve_dag.environments.web.sandbox import NotConfinedError, not_started

    try:
        outcome = sandbox.parse(body, kind, arguments, seconds=PARSE_SECONDS)
    except NotConfinedError as problem:
        raise not_started(problem) from None
    if outcome.ending == "done":
        return outcome.output.decode("utf-8", "replace")
    if outcome.ending == "unreadable":
        raise ToolError(f"the {kind} could not be read: {one_line(outcome.output.decode('utf-8', 'replace'))}")
    reason = {"time": "it takes too long", "memory": "it takes too much memory"}.get(outcome.ending, "it is damaged")
    raise ToolError(f"the {kind} could not be read: {reason}")


@dataclass(frozen=True)
class JinaReader:
    """Lets Jina's reader fetch and read. The address is checked here before Jina hears of it."""

    guard: Guard
    characters: int
    seconds: float
    base: str = JINA
    service: Service | None = None
    environment: Mapping[str, str] = field(default_factory=lambda: os.environ)

    async def read(self, url: str) -> ReadPage:
        """The page at ``url``.

        Raises:
            ToolError: it may not be opened, or Jina gave no text of it.
            UnreachableError: Jina cannot be reached, does not accept the key, or has no credit left.
        """
        target = await self.guard.check(url)
        key = read_key(JINA_KEY, self.environment)
        # No X-Timeout: from 20 seconds on the reader then waits for a page to fall silent, which many never do, and we hang up.
        headers = {"Accept": "application/json"} | ({"Authorization": f"Bearer {key}"} if key else {})
        service = self.service or Service("the reader", self.seconds)
        answer = await service.ask(
            "GET",
            f"{self.base.rstrip('/')}/{target.url.copy_with(fragment=None)}",
            headers=headers,
            refused=lambda status: None if status in (401, 402) else f"the page could not be read (status {status})",
            one_page=True,
        )
        data = answer.get("data") if isinstance(answer, dict) else None
        content = data.get("content") if isinstance(data, dict) else None
        if not isinstance(data, dict) or not isinstance(content, str) or not content.strip():
            raise ToolError("the page holds no text")
        final = data.get("url")
        if isinstance(final, str) and final and self.guard.blocks(final):
            raise ToolError("this address may not be opened: it sends on to a blocked host")
        title = data.get("title")
        return ReadPage(str(final or target.url), title if isinstance(title, str) else "", head(content, self.characters))


@dataclass(frozen=True)
class Summarizer:
    """Has a model write down what of a page serves a goal; remembered by page, goal and model."""

    model: Callable[[], LanguageModel]
    identity: Callable[[], str]
    """Of the model: what it writes for one page and goal follows from this."""
    memory: Memory | None

    async def summarize(self, page: ReadPage, goal: str) -> str:
        """The observation. When the model fails, the beginning of the page, and a line that says so; that is not remembered.

        Raises:
            UnreachableError: there is no model to be asked.
        """
        key = Memory.key_of("summary", page.title, page.text, goal, self.identity(), prompts.digest(PROMPT))
        known = self.memory.get("web", key) if self.memory is not None else None
        if known is None:
            known = await self._ask(page, goal)
            if known is None:
                note = "the page could not be summed up for the goal; this is its beginning"
                return f"{page.shown}\n({note})"
            if self.memory is not None:
                self.memory.put("web", key, known)
        return f"{page.title_line}\n{known}"

    async def _ask(self, page: ReadPage, goal: str) -> str | None:
        prompt = prompts.load(PROMPT).fill(
            goal=one_line(goal, 1000), url=one_line(page.url, 500), page=fence("page", plain(page.text))
        )
        try:
            with purpose("page"):
                completion = await self.model().generate(
                    Request((Message("user", prompt),), Sampling(temperature=0.0, max_tokens=SUMMARY_TOKENS))
                )
        except (ExhaustedError, UnreachableError):
            raise  # every page would be cut short: whoever plays the episode writes down why it is lost
        except Exception as problem:  # whatever the model's failure is: the page is there, and the policy can read it itself
            log.warning("a page was not summed up: %s", describe_error(problem))
            return None
        return said(completion.text) or None


def page_to_memory(page: ReadPage) -> str:
    """One string for :class:`~evolve_dag.store.memory.Memory`."""
    return json.dumps([page.url, page.title, page.text], ensure_ascii=True)


def page_from_memory(value: str) -> ReadPage:
    """The inverse of :func:`page_to_memory`."""
    return ReadPage(*json.loads(value))
