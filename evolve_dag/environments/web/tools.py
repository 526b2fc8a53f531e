"""The paper's five tools over the live web: ``search``, ``visit``, ``scholar``, ``python``, ``file``."""

from __future__ import annotations

import asyncio
import hashlib
import importlib.util
import json
import os
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, date, datetime
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal, TypeVar

from pydantic import Field, Strict

from evolve_dag import prompts
from evolve_dag.config.parts import EnvironmentSettings
from evolve_dag.config.schema import Experiment
from evolve_dag.config.section import FOLDER, MOST, Strings
from evolve_dag.environments.base import EnvironmentPart, Place, file_tasks, tool_prompt
from evolve_dag.environments.corpus import argument
from evolve_dag.environments.web.files import FileReader
from evolve_dag.environments.web.guard import Guard
from evolve_dag.environments.web.reader import (
    JINA_KEY,
    PROMPT,
    JinaReader,
    LocalReader,
    ReadPage,
    Summarizer,
    page_from_memory,
    page_to_memory,
)
from evolve_dag.environments.web.sandbox import NotConfinedError, Outcome, not_started, open_parser, open_sandbox
from evolve_dag.environments.web.search import SERPER_KEY, Kind, Searcher
from evolve_dag.errors import ConfigError, EvolveError, ModelError
from evolve_dag.plain import plain
from evolve_dag.protocols import ToolError, ToolSpec
from evolve_dag.records import ToolCall
from evolve_dag.secrecy import read_key
from evolve_dag.store.memory import Memory

if TYPE_CHECKING:
    from evolve_dag.protocols import LanguageModel

RENDERING = "web/4"
"""Name of how observations are written, a part of what nights are made of; raise it when the same answers would read
otherwise."""
SPACE = "web"
"""Of :class:`~evolve_dag.store.memory.Memory`."""
OUTPUT_CHARACTERS = 8_000
"""Most of a program's output that the policy reads."""
MAX_CODE = 50_000
T = TypeVar("T")

SPECS = {
    "search": ToolSpec(
        "search",
        "Search the web. Lists titles with a short excerpt and the address of each page.",
        {"query": "Words to look for."},
    ),
    "visit": ToolSpec(
        "visit",
        "Open one page of the web, or a PDF, and read what on it serves a goal.",
        {"url": "Full address, as listed by search or named on a page.", "goal": "What you want to learn from the page."},
    ),
    "scholar": ToolSpec(
        "scholar",
        "Search scientific publications. Lists titles with authors, year and the address of each.",
        {"query": "Words to look for."},
    ),
    "python": ToolSpec(
        "python",
        "Run a Python program and read what it prints. Nothing is kept between calls; there is no network.",
        {"code": "The whole program; print what you want to see."},
    ),
    "file": ToolSpec(
        "file",
        "Read one of the files that come with the task: PDF, Word, PowerPoint, Excel, CSV, ZIP, text.",
        {"name": "Name of the file; archive.zip/name for a file within an archive."},
    ),
}


ToolName = Literal["search", "visit", "scholar", "python", "file"]


class ToolsEnvironment(EnvironmentSettings):
    """The live web and a sandbox: the paper's five tools, or some of them."""

    kind: Literal["tools"] = "tools"
    """The live web, a python sandbox, files."""
    system: str = ""
    """The whole system message, in place of ours, which describes every tool as JSON schema; empty: ours."""
    tools: Annotated[tuple[ToolName, ...], Strict(False)] = Field(
        ("search", "visit", "scholar", "python", "file"), min_length=1
    )
    """Which tools the policy has."""
    search: Literal["serper", "searxng"] = "serper"
    """Who answers ``search``: Serper (key in ``SERPER_API_KEY``) or a SearXNG instance."""
    searxng: str = ""
    """Address of the SearXNG instance."""
    reader: Literal["local", "jina"] = "local"
    """Who turns a page into text for ``visit``: this process, or Jina's reader (key in ``JINA_API_KEY``, optional)."""
    results: int = Field(10, ge=1, le=20)
    """Entries that one search lists."""
    summarize: bool = True
    """Whether the extractor model sums a visited page up for the stated goal; else its beginning is shown."""
    page_characters: int = Field(12_000, ge=200, le=200_000)
    """Most characters of a page that the policy or the extractor reads."""
    page_bytes: int = Field(5_000_000, ge=10_000, le=MOST)
    """Larger bodies are refused."""
    blocked: Strings = ("huggingface.co", "hf-mirror.com", "hf.co")
    """Hosts, with all below them, that no tool may ask: mirrors of the benchmarks. A page elsewhere that holds the same is not
    known to it: name translators and archives here too (``translate.goog``, ``web.archive.org``) where that matters."""
    files: str = Field("", json_schema_extra=FOLDER)
    """Folder that the ``file`` tool may read; relative to the file that names it."""
    cache: Literal["day", "none"] = "day"
    """``day``: an address fetched today is not fetched again today."""
    timeout_seconds: float = Field(30.0, gt=0)
    """Longest wait for a page or a search."""
    python_seconds: float = Field(10.0, gt=0, le=600)
    """Processor and wall time of one ``python`` call."""
    python_megabytes: int = Field(512, ge=64, le=MOST)
    """Memory of one ``python`` call."""

    @property
    def sums_up(self) -> bool:
        """Whether a model is asked to sum up pages."""
        return self.summarize and "visit" in self.tools


class ToolsWorld:
    """An :class:`~evolve_dag.protocols.Environment` over the live web. Safe to call from many episodes at once,
    and from one event loop after another.

    What the web says changes, so a call may answer otherwise tomorrow; :attr:`digest` covers what *we* decide (settings,
    prompts, files), not what others publish. A trajectory artifact keeps what was seen; it is not recomputed because a day
    has passed.

    Args:
        settings: of the experiment file.
        extractor: gives the model that sums pages up; needed with ``summarize``.
        identity: of that model, for what is remembered; a function where it changes with the policy that is open.
        memory: where pages, listings and summaries are remembered; None: nowhere.
        guard, searcher, jina: in place of those that the settings make, in tests.
        today: the day in UTC, for tests.
    """

    def __init__(
        self,
        settings: ToolsEnvironment,
        *,
        extractor: Callable[[], LanguageModel] | None,
        identity: str | Callable[[], str],
        memory: Memory | None,
        guard: Guard | None = None,
        searcher: Searcher | None = None,
        jina: JinaReader | None = None,
        today: Callable[[], date] = lambda: datetime.now(UTC).date(),
    ) -> None:
        self.settings = settings
        self._identity = identity if callable(identity) else lambda: identity
        self._tools = tuple(SPECS[name] for name in dict.fromkeys(settings.tools))
        self._system_prompt = settings.system or tool_prompt(self._tools)
        self._memory = memory
        self._today = today
        self._guard = guard or Guard(settings.blocked)
        self._searcher = searcher or Searcher(
            settings.search, settings.results, settings.timeout_seconds, settings.searxng, self._guard.blocks
        )
        # A process a job: as many at once as there are processors.
        self._executor = ThreadPoolExecutor(max_workers=max(2, os.cpu_count() or 2), thread_name_prefix="sandbox")
        self._reader: LocalReader | JinaReader
        if settings.reader == "jina":
            self._reader = jina or JinaReader(self._guard, settings.page_characters, settings.timeout_seconds)
        else:
            self._reader = LocalReader(
                self._guard,
                open_parser,
                self._executor,
                settings.page_bytes,
                settings.page_characters,
                settings.timeout_seconds,
            )
        self._summarizer: Summarizer | None = None
        if settings.sums_up and extractor is not None:
            self._summarizer = Summarizer(extractor, self._identity, memory)
        # '' would be the folder that the process was started in.
        folder = Path(settings.files) if settings.files else None
        self._files = FileReader(folder, open_parser, settings.page_characters) if folder is not None else None

    @property
    def tools(self) -> tuple[ToolSpec, ...]:
        return self._tools

    @property
    def system_prompt(self) -> str:
        return self._system_prompt

    @cached_property
    def digest(self) -> str:
        """32 hex digits over settings, prompts, the summing model and the content of the files; not over the day or the web."""
        settings = self.settings.model_dump(mode="json")
        for where in ("cache", "files"):
            del settings[where]
        content = {
            "rendering": RENDERING,
            "settings": settings,
            "system_prompt": self._system_prompt,
            "summary": [self._identity(), prompts.digest(PROMPT)] if self.settings.sums_up else None,
            "files": _folder_content(Path(self.settings.files))
            if self._files is not None and "file" in self.settings.tools
            else None,
        }
        canonical = json.dumps(content, sort_keys=True, ensure_ascii=True, separators=(",", ":"))
        return hashlib.sha256(canonical.encode()).hexdigest()[:32]

    def check(self) -> None:
        """Whether every tool can work here: call it before the first episode, since a call that fails is only data.

        Raises:
            ConfigError: lists all that is missing: keys, libraries, the sandbox, the folder of files.
        """
        tools = set(self.settings.tools)
        found: list[EvolveError] = []

        def attempt(test: Callable[[], object]) -> None:
            try:
                test()
            except EvolveError as problem:
                found.append(problem)

        if tools & {"search", "scholar"}:
            attempt(lambda: need("httpx"))
            attempt(self._searcher.check)
        if "visit" in tools:
            attempt(lambda: need("httpx"))
            if self.settings.reader == "jina":
                attempt(lambda: read_key(JINA_KEY))
            if self.settings.reader == "local":
                attempt(lambda: need("trafilatura"))
                attempt(lambda: need("markitdown"))
            if self.settings.sums_up and self._summarizer is None:
                found.append(ConfigError("environment.summarize: no model to sum pages up with", "set models.extractor"))
            if self._summarizer is not None:
                attempt(self._summarizer.model)  # its key is not set, its folder is not there
        if "python" in tools:
            attempt(open_sandbox)
        if "file" in tools:
            attempt(lambda: need("markitdown"))
            if not self.settings.files or not Path(self.settings.files).is_dir():
                found.append(
                    ConfigError(f"environment.files: no folder {self.settings.files!r}", "make it, or correct its name")
                )
        distinct = {problem.what: problem for problem in found}
        if distinct:
            raise ConfigError(
                "the tools cannot work here:" + "".join(f"\n  {problem.what}" for problem in distinct.values()),
                "; ".join(dict.fromkeys(problem.remedy for problem in distinct.values())),
            )

    async def call(self, call: ToolCall) -> str:
        """Serve one call; what comes back is plain text in which nothing poses as ours (:mod:`plain`).

        Raises:
            ToolError: it could not be served.
            ModelError: no call of this tool can be: a key is refused, a library or the sandbox is missing.
        """
        serve: dict[str, Callable[[ToolCall], Awaitable[str]]] = {
            "search": self._search,
            "scholar": self._search,
            "visit": self._visit,
            "python": self._python,
            "file": self._file,
        }
        if call.name not in self.settings.tools:
            raise ToolError(f"no tool named {call.name}: use {' or '.join(self.settings.tools)}")
        try:
            return plain(await serve[call.name](call))
        except ToolError as problem:
            raise ToolError(plain(str(problem))) from None

    def close(self) -> None:
        """Let the threads go."""
        self._executor.shutdown(wait=False, cancel_futures=True)

    async def _search(self, call: ToolCall) -> str:
        need("httpx")
        kind: Kind = "scholar" if call.name == "scholar" else "search"
        query = " ".join(argument(call, "query").split())
        s = self.settings
        key = self._day_key("listing", kind, query, s.search, s.searxng, s.results, sorted(s.blocked))
        known = self._recall(key)
        if known is None:
            known = await self._searcher.ask(kind, query)
            self._remember(key, known)
        return known

    async def _visit(self, call: ToolCall) -> str:
        need("httpx")
        if self.settings.reader == "local":
            need("trafilatura")
            need("markitdown")
        url, goal = argument(call, "url").strip(), argument(call, "goal")
        page = await self._page(url)
        if self._summarizer is not None:
            return await self._summarizer.summarize(page, goal)
        return page.shown

    async def _page(self, url: str) -> ReadPage:
        s = self.settings
        key = self._day_key("page", url, s.reader, s.page_characters, s.page_bytes, sorted(s.blocked))
        known = self._recall(key)
        if known is not None:
            return page_from_memory(known)
        page = await self._reader.read(url)
        self._remember(key, page_to_memory(page))
        return page

    async def _python(self, call: ToolCall) -> str:
        code = argument(call, "code")
        if len(code) > MAX_CODE:
            raise ToolError(f"the program is longer than {MAX_CODE} characters")
        s = self.settings
        sandbox = await self._in_thread(open_sandbox)
        try:
            outcome = await self._in_thread(
                lambda: sandbox.run_python(code, seconds=s.python_seconds, megabytes=s.python_megabytes)
            )
        except NotConfinedError as problem:  # the machine's fault: the sandbox is there, and no program ran
            raise not_started(problem) from None
        return program_output(outcome, s.python_seconds, s.python_megabytes)

    async def _file(self, call: ToolCall) -> str:
        need("markitdown")
        name, files = argument(call, "name"), self._files
        if files is None:
            raise ToolError("there are no files")
        return await self._in_thread(lambda: files.read(name))

    async def _in_thread(self, work: Callable[[], T]) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._executor, work)

    def _day_key(self, *parts: object) -> str | None:
        return None if self.settings.cache == "none" else Memory.key_of(self._today().isoformat(), RENDERING, *parts)

    def _recall(self, key: str | None) -> str | None:
        return self._memory.get(SPACE, key) if self._memory is not None and key is not None else None

    def _remember(self, key: str | None, value: str) -> None:
        if self._memory is not None and key is not None:
            self._memory.put(SPACE, key, value)


def program_output(outcome: Outcome, seconds: float, megabytes: int) -> str:
    """The observation of one program: what it wrote, and what it was stopped for."""
    text = outcome.output.decode("utf-8", "replace").rstrip()
    if len(text) > OUTPUT_CHARACTERS:
        # The error stands at the end, what was asked for mostly at the beginning.
        tail = OUTPUT_CHARACTERS // 4
        left_out = len(text) - OUTPUT_CHARACTERS
        text = f"{text[: OUTPUT_CHARACTERS - tail]}\n... ({left_out} characters left out) ...\n{text[-tail:]}"
    reason = {
        "time": f"stopped: it ran longer than {seconds:g} seconds",
        "memory": f"it needs more than {megabytes} megabytes of memory",
        "output": "stopped: it writes too much",
        "disk": "stopped: its files are too large or too many",
        "crash": "stopped: the interpreter crashed",
        "error": "" if text else "it ended with an error",
    }.get(outcome.ending, "")
    return "\n".join(filter(None, [text, reason])) or "no output"


def need(module: str) -> None:
    """Whether a library of the extra ``web`` is installed.

    Raises:
        ModelError: it is not.
    """
    if importlib.util.find_spec(module) is None:
        raise ModelError(f"{module} is not installed", "pip install 'evolve-dag[web]'")


def _folder_content(folder: Path) -> list[list[str]]:
    """Name and hash of every file, so that another file of the same name is another world."""
    found = []
    for path in sorted(folder.rglob("*")):
        if path.is_file() and not path.is_symlink():
            with path.open("rb") as handle:
                found.append([path.relative_to(folder).as_posix(), hashlib.file_digest(handle, "sha256").hexdigest()])
    return found


def _make(settings: ToolsEnvironment, place: Place) -> ToolsWorld:
    roles = place.roles
    return ToolsWorld(
        settings,
        extractor=roles.later("extractor") if roles is not None and settings.sums_up else None,
        identity=(lambda: roles.identity("extractor")) if roles is not None and settings.sums_up else "",
        memory=roles.memory if roles is not None else None,
    )


def _mistakes(settings: ToolsEnvironment, experiment: Experiment) -> list[tuple[str, str]]:
    found = file_tasks(experiment)
    if settings.search == "searxng" and not settings.searxng:
        found.append(("environment.searxng", "missing: the address of the SearXNG instance"))
    if "file" in settings.tools and not settings.files:
        what = "missing: the folder that the file tool may read; or leave `file` out of tools"
        found.append(("environment.files", what))
    return found


TOOLS = EnvironmentPart(
    settings=ToolsEnvironment,
    make=_make,
    roles=lambda settings: ("extractor",) if settings.sums_up else (),
    prompts=lambda settings, experiment: (PROMPT,) if settings.sums_up else (),
    mistakes=_mistakes,
    libraries={"trafilatura": "web", "markitdown": "web"},
    variables=(SERPER_KEY, JINA_KEY),
    data=lambda settings: RENDERING,
)
