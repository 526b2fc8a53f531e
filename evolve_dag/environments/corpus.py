"""Search and visit over a closed corpus of pages: the same tools for the pocket world and for your own pages."""

from __future__ import annotations

import asyncio
import hashlib
import json
import math
import re
import sys
import threading
import unicodedata
import zlib
from collections import Counter, OrderedDict
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cache, cached_property, lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field

from evolve_dag.config.parts import EnvironmentSettings
from evolve_dag.config.section import PATH
from evolve_dag.environments.base import EnvironmentPart, Place, file_tasks, tool_prompt
from evolve_dag.errors import DataError
from evolve_dag.inference.folders import is_pocket
from evolve_dag.jsonlines import SHOWN, Mistake, kind_of, read_objects, refuse, text_mistakes
from evolve_dag.protocols import ToolError, ToolSpec
from evolve_dag.records import ToolCall

if TYPE_CHECKING:
    import duckdb

K1 = 1.2
"""Saturation of the term frequency."""
B = 0.75
"""Strength of the length normalisation."""
RANKING = "bm25f/1"
"""Name of the ranking in :attr:`CorpusSearch.digest`; raise it when the same pages and settings would answer otherwise, and
tell it in the row's ``data``: nights are named by that."""
RANKING_BEYOND_ASCII = "bm25f/2"
"""Its name where a page holds other letters: 2 composes them and pairs those that are written without spaces."""
RANKING_WITH_MARKS = "bm25f/3"
"""Its name where signs stand above or below them that are no letters themselves: 3 does not split a word there."""
UNIT = 1e-9
"""Weights are kept as whole multiples of this: integer sums do not depend on the order of addition, so pages
that match equally well tie exactly, alone or in a batch."""
MEMO = 8192
"""Searches whose answers are remembered."""

CORPUS_PROMPT = "tools: search, visit"
"""The one system message over a corpus that the pocket policy knows; any other model is told the tools in full."""
Terms = tuple[str, ...]
"""Distinct lower-cased words of a query, sorted; everything that a search depends on."""

TOOLS = (
    ToolSpec(
        "search",
        "Search the pages. Lists the best matching titles, each with a short excerpt.",
        {"query": "Words to look for."},
    ),
    ToolSpec("visit", "Open one page and read it.", {"page": "Exact title, as listed by search or named on a page."}),
)


@dataclass(frozen=True, slots=True)
class Page:
    """One page of the corpus."""

    title: str
    """Unique in the corpus, whatever its case and spaces; one line."""
    text: str = ""
    """What a visit shows below the title."""
    indexed: str | None = None
    """Older version that the search index saw: decides matches and snippets. None: the page as it is."""
    redirect: str | None = None
    """Title of the page that this one only points to; a visit shows that instead of ``text``."""

    @property
    def body(self) -> str:
        """What a visit shows below the title line."""
        return self.text if self.redirect is None else f"see: {self.redirect}"

    @property
    def seen(self) -> str:
        """What the search index knows of the page below its title."""
        return self.indexed if self.indexed is not None else self.text or self.body


class CorpusSearch:
    """An :class:`~evolve_dag.protocols.Environment` with two tools: ``search(query)`` and ``visit(page)``.

    Search is BM25 over an inverted index in DuckDB. DuckDB's own ``fts`` extension is not used: it must be
    downloaded once, which a closed machine cannot do. Two fields, title and text, are joined as in BM25F: their
    weighted, length-normalised frequencies are added *before* saturation, so a word that stands in both is not
    counted as two. With one field it is plain BM25.

    score(q, d) = sum over terms t of  idf(t) * f / (k1 + f),   f = sum over fields of w * tf / (1 - b + b * len / mean len)
    idf(t) = ln(1 + (N - n + 0.5) / (n + 0.5)),  N pages, n of them with t in any indexed field

    Sources: Robertson and Zaragoza, "The Probabilistic Relevance Framework: BM25 and Beyond", Foundations and Trends
    in Information Retrieval 3(4), 2009, sections 3.4 and 3.6; the idf with 1 + under the logarithm, which is never
    negative, and the absent constant factor (k1 + 1) are those of Lucene's BM25Similarity.

    Searches awaited within one turn of the event loop are answered by one SQL statement, and answers are remembered,
    since pages never change. Safe to use from several threads.

    Args:
        pages: in any order; the order decides nothing.
        results: most pages that one search lists.
        snippet_characters: longest excerpt in a listing.
        title_weight: how much a word counts in a title; 0 leaves titles out of the index.
        text_weight: how much a word counts in the text; 0 leaves texts out of the index.
        minimum_match: least share (0 to 1) of the query's distinct words that a page must hold in an indexed field.
        system_prompt: first message of every episode; :func:`tool_prompt` by default.

    Raises:
        DataError: no page, or titles that are blank, broken over lines or not unique.
        ValueError: a setting outside its range.
    """

    def __init__(
        self,
        pages: Sequence[Page],
        *,
        results: int = 3,
        snippet_characters: int = 160,
        title_weight: float = 3.0,
        text_weight: float = 1.0,
        minimum_match: float = 0.0,
        system_prompt: str | None = None,
    ) -> None:
        if results < 1:
            raise ValueError(f"results must be at least 1, not {results}")
        if snippet_characters < 20:
            raise ValueError(f"snippet_characters must be at least 20, not {snippet_characters}")
        if not 0.0 <= minimum_match <= 1.0:
            raise ValueError(f"minimum_match is a share between 0 and 1, not {minimum_match}")
        if min(title_weight, text_weight) < 0 or title_weight + text_weight == 0:
            raise ValueError(f"title_weight {title_weight} and text_weight {text_weight}: none below 0 and one above it")
        if not pages:
            raise DataError("corpus: no page", "give it at least one page")
        found = title_mistakes([page.title for page in pages])
        if found:
            listing = "".join(f"\n  page {n}: {what}" for n, what in found[:SHOWN])
            more = f"\n  ... and {len(found) - SHOWN} more" if len(found) > SHOWN else ""
            raise DataError(
                f"corpus: {len(found)} bad title{'s' if len(found) > 1 else ''}{listing}{more}",
                "give every page its own title, on one line",
            )
        self.pages: tuple[Page, ...] = tuple(sorted(pages, key=lambda page: page.title))
        self.results = results
        self.snippet_characters = snippet_characters
        self.minimum_match = minimum_match
        self._weights = {"title": title_weight, "text": text_weight}
        self._system_prompt = tool_prompt(TOOLS) if system_prompt is None else system_prompt
        self._by_title = {fold(page.title): page for page in self.pages}
        self._lines: dict[int, list[tuple[str, frozenset[str]]]] = {}
        self._memo: OrderedDict[Terms, str] = OrderedDict()
        self._memo_lock = threading.Lock()
        self._connection_lock = threading.Lock()
        self._connection = self._build_index()
        # Searches of the current turn of each event loop; a loop runs in one thread, so its entry has one writer.
        self._waiting: dict[asyncio.AbstractEventLoop, dict[Terms, list[asyncio.Future[str]]]] = {}

    @classmethod
    def from_jsonl(cls, path: str | Path, **settings: Any) -> CorpusSearch:
        """A corpus from a file with one page a line; ``settings`` as for the constructor.

        A line reads ``{"title": ..., "text": ...}``; ``"indexed"`` may hold an older text that the search still shows.
        A redirect reads ``{"title": ..., "redirect": <title of another page>}``.

        Raises:
            DataError: lists the broken lines with their numbers.
        """
        return cls(load_pages(path), **settings)

    @property
    def tools(self) -> tuple[ToolSpec, ...]:
        return TOOLS

    @property
    def system_prompt(self) -> str:
        return self._system_prompt

    @cached_property
    def digest(self) -> str:
        """32 hex digits over pages (in any order), settings and ranking."""
        plain = all(f"{page.title}{page.seen}".isascii() for page in self.pages)
        ranking = RANKING if plain else RANKING_WITH_MARKS if _hold_marks(self.pages) else RANKING_BEYOND_ASCII
        content = {
            "ranking": [ranking, K1, B],
            "results": self.results,
            "snippet_characters": self.snippet_characters,
            "minimum_match": self.minimum_match,
            "weights": self._weights,
            "system_prompt": self._system_prompt,
            "pages": [asdict(page) for page in self.pages],
        }
        canonical = json.dumps(content, sort_keys=True, ensure_ascii=True, separators=(",", ":"))
        return hashlib.sha256(canonical.encode()).hexdigest()[:32]

    async def call(self, call: ToolCall) -> str:
        """Serve ``search`` or ``visit``.

        Raises:
            ToolError: unknown tool, or an argument that is missing or blank.
        """
        if call.name == "visit":
            return self.visit(argument(call, "page"))
        if call.name != "search":
            raise ToolError(f"no tool named {call.name}: use {' or '.join(tool.name for tool in TOOLS)}")
        terms = query_terms(argument(call, "query"))
        known = self._recall(terms)
        if known is not None:
            return known
        loop = asyncio.get_running_loop()
        if loop not in self._waiting:
            self._waiting[loop] = {}
            # Everything that is ready in this turn of the loop asks before _answer_waiting runs in the next one.
            # It runs in the loop's own thread: a batch takes milliseconds, and handing it to another thread would let
            # episodes that search fall behind those that visit, which splits the model's next batch.
            loop.call_soon(self._answer_waiting, loop)
        # One future a caller, not one a query: an episode that is cancelled must not cancel its neighbours.
        future: asyncio.Future[str] = loop.create_future()
        self._waiting[loop].setdefault(terms, []).append(future)
        return await future

    def search(self, query: str) -> str:
        """The observation of one search: ``2 results`` and a line a page, or ``no results``."""
        return self.search_many([query])[0]

    def search_many(self, queries: Sequence[str]) -> list[str]:
        """The observations of several searches, in order, by one SQL statement for those not remembered."""
        return self._answers([query_terms(query) for query in queries])

    def visit(self, page: str) -> str:
        """The observation of one visit; titles match whatever their case and spaces."""
        found = self._by_title.get(fold(page))
        return f"no page named {' '.join(page.split())}" if found is None else f"page: {found.title}\n{found.body}"

    def rank(self, queries: Sequence[Terms]) -> list[list[tuple[Page, float]]]:
        """Best pages with their BM25 scores for each query, at most ``results`` each, by one SQL statement."""
        if not any(queries):
            return [[] for _ in queries]
        wanted = [(number, term) for number, terms in enumerate(queries) for term in terms]
        with self._connection_lock:
            rows = self._connection.execute(
                _SEARCH,
                {
                    "query": [number for number, _ in wanted],
                    "term": [term for _, term in wanted],
                    "needed": [least_matches(self.minimum_match, len(terms)) for terms in queries],
                    "results": self.results,
                },
            ).fetchall()
        ranked: list[list[tuple[Page, float]]] = [[] for _ in queries]
        for number, page_id, score in rows:
            ranked[number].append((self.pages[page_id], score * UNIT))
        return ranked

    def _answers(self, wanted: Sequence[Terms]) -> list[str]:
        answers: dict[Terms, str] = {}
        fresh: list[Terms] = []
        for terms in dict.fromkeys(wanted):
            known = self._recall(terms)
            if known is None:
                fresh.append(terms)
            else:
                answers[terms] = known
        for terms, ranked in zip(fresh, self.rank(fresh), strict=True):
            answers[terms] = self._listing(terms, [page for page, _ in ranked])
        self._remember({terms: answers[terms] for terms in fresh})
        return [answers[terms] for terms in wanted]

    def _answer_waiting(self, loop: asyncio.AbstractEventLoop) -> None:
        waiting = self._waiting.pop(loop)
        try:
            answers = self._answers(list(waiting))
        except Exception as error:
            # An exception here would end in the loop's handler and leave every episode waiting for ever.
            for futures in waiting.values():
                for future in futures:
                    if not future.done():
                        future.set_exception(ToolError(f"search failed: {error}"))
            return
        for futures, answer in zip(waiting.values(), answers, strict=True):
            for future in futures:
                if not future.done():
                    future.set_result(answer)

    def _recall(self, terms: Terms) -> str | None:
        with self._memo_lock:
            known = self._memo.get(terms)
            if known is not None:
                self._memo.move_to_end(terms)
            return known

    def _remember(self, answers: dict[Terms, str]) -> None:
        with self._memo_lock:
            self._memo.update(answers)
            while len(self._memo) > MEMO:
                self._memo.popitem(last=False)

    def _listing(self, terms: Terms, pages: Sequence[Page]) -> str:
        if not pages:
            return "no results"
        lines = [f"{n}. {page.title}: {self._snippet(page, terms)}" for n, page in enumerate(pages, 1)]
        return "\n".join([f"{len(pages)} result{'s' if len(pages) > 1 else ''}", *lines])

    def _snippet(self, page: Page, terms: Terms) -> str:
        key = id(page)  # pages live as long as the corpus
        if key not in self._lines:
            self._lines[key] = [(line, frozenset(words(line))) for line in map(str.strip, page.seen.splitlines()) if line]
        lines = self._lines[key]
        if not lines:
            return ""
        best, _ = max(lines, key=lambda line: len(line[1].intersection(terms)))  # the first of equals
        return best if len(best) <= self.snippet_characters else window(best, terms, self.snippet_characters)

    def _build_index(self) -> duckdb.DuckDBPyConnection:
        import duckdb
        import polars as pl

        lengths: list[tuple[int, str, int]] = []
        counts: list[tuple[int, str, str, int]] = []
        for page_id, page in enumerate(self.pages):
            for field, text in (("title", page.title), ("text", page.seen)):
                if self._weights[field] > 0:
                    tokens = words(text)
                    lengths.append((page_id, field, len(tokens)))
                    counts.extend((page_id, field, term, count) for term, count in Counter(tokens).items())
        # Pages that match equally well stand in an order that says nothing of them, and that no reordering of the file changes.
        ties = [zlib.crc32(fold(page.title).encode("utf-8", "surrogatepass")) for page in self.pages]
        # One thread: a batch is too small to share out, and the cores belong to the model.
        connection = duckdb.connect(":memory:", config={"threads": 1})
        # By Polars: an array that pyarrow makes of a list imports pandas: some 0.3 s.
        tables = {
            "lengths": pl.DataFrame(lengths, {"page_id": pl.Int64, "field": pl.String, "tokens": pl.Int64}, orient="row"),
            "counts": pl.DataFrame(
                counts, {"page_id": pl.Int64, "field": pl.String, "term": pl.String, "count": pl.Int64}, orient="row"
            ),
            "ties": pl.DataFrame({"page_id": range(len(ties)), "tie": ties}, {"page_id": pl.Int64, "tie": pl.Int64}),
        }
        for name, table in tables.items():
            connection.register(name, table)
        connection.execute(_INDEX, {"k1": K1, "b": B, "unit": UNIT, "pages": len(self.pages), **self._weights})
        for name in tables:
            connection.unregister(name)
        return connection


_INDEX = """
CREATE TABLE postings AS
WITH means AS (
    SELECT field, avg(tokens) AS mean FROM lengths GROUP BY field
), frequencies AS (
    SELECT term, page_id,
           sum(CASE field WHEN 'title' THEN $title ELSE $text END * count / (1 - $b + $b * tokens / mean)) AS frequency
    FROM counts JOIN lengths USING (page_id, field) JOIN means USING (field)
    GROUP BY term, page_id
), spread AS (
    SELECT term, count(*) AS held FROM frequencies GROUP BY term
)
SELECT term, page_id, tie,
       CAST(round(ln(1 + ($pages - held + 0.5) / (held + 0.5)) * frequency / ($k1 + frequency) / $unit) AS BIGINT) AS weight
FROM frequencies JOIN spread USING (term) JOIN ties USING (page_id)
ORDER BY term, page_id  -- sorted, so that a scan can skip the blocks without a wanted term
"""

_SEARCH = """
WITH wanted AS (
    SELECT unnest($query) AS query, unnest($term) AS term
)
SELECT query, page_id, sum(weight) AS score
FROM wanted JOIN postings USING (term)
GROUP BY query, page_id, tie
HAVING count(*) >= ($needed)[query + 1]
QUALIFY row_number() OVER (PARTITION BY query ORDER BY sum(weight) DESC, tie, page_id) <= $results
ORDER BY query, score DESC, tie, page_id
"""


def load_pages(path: str | Path) -> list[Page]:
    """The pages of a JSONL file; see :meth:`CorpusSearch.from_jsonl` for its lines.

    Raises:
        DataError: lists the broken lines with their numbers.
    """
    objects, mistakes = read_objects(path)
    pages: list[tuple[int, Page]] = []
    for number, value in objects:
        wrong = _page_mistakes(value)
        mistakes.extend((number, what) for what in wrong)
        if not wrong:
            pages.append(
                (number, Page(value["title"].strip(), value.get("text") or "", value.get("indexed"), value.get("redirect")))
            )
    numbers = [number for number, _ in pages]
    for at, what in title_mistakes([page.title for _, page in pages], [f"line {number}" for number in numbers]):
        mistakes.append((numbers[at - 1], what))
    if not mistakes:  # a page on a broken line would look missing
        titles = {fold(page.title) for _, page in pages}
        mistakes = [
            (number, f"redirect to {page.redirect!r}, but no page has that title")
            for number, page in pages
            if page.redirect is not None and fold(page.redirect) not in titles
        ]
    if mistakes:
        refuse(
            path,
            mistakes,
            'one page a line: {"title": "...", "text": "..."} or {"title": "...", "redirect": "<another title>"}',
        )
    return [page for _, page in pages]


def _page_mistakes(value: dict[str, Any]) -> list[str]:
    wrong = text_mistakes(value, "title")
    if value.get("redirect") is None:
        wrong += text_mistakes(value, "text")
    else:
        wrong += text_mistakes(value, "redirect")
        if value.get("text"):
            wrong.append("'text' and 'redirect' stand together: a redirect shows only where it leads")
    if not isinstance(value.get("indexed"), (str, type(None))):
        wrong.append(f"'indexed' must be text, not {kind_of(value['indexed'])}")
    unknown = [key for key in value if key not in ("title", "text", "indexed", "redirect")]
    if unknown:
        wrong.append(f"unknown key {', '.join(map(repr, unknown))}: known are title, text, indexed, redirect")
    return wrong


def title_mistakes(titles: Sequence[str], places: Sequence[str] | None = None) -> list[Mistake]:
    """Titles that cannot be used: ``(1-based position, what is wrong)``; ``places`` name them for the reader."""
    found: list[Mistake] = []
    first: dict[str, int] = {}
    for number, title in enumerate(titles, 1):
        if not title.strip():
            found.append((number, "the title is empty"))
        elif len(title.splitlines()) > 1:
            found.append((number, f"title {title!r} is broken over lines"))
        elif fold(title) in first:
            before = first[fold(title)]
            found.append((number, f"title {title!r} again, as on {places[before - 1] if places else f'page {before}'}"))
        else:
            first[fold(title)] = number
    return found


def argument(call: ToolCall, name: str) -> str:
    """The argument ``name`` of ``call``.

    Raises:
        ToolError: it is missing or blank.
    """
    value = call.arguments.get(name)
    if value is None:
        given = f", not {', '.join(map(repr, call.arguments))}" if call.arguments else ""
        raise ToolError(f"{call.name} needs the argument {name!r}{given}")
    if not value.strip():
        raise ToolError(f"{call.name} needs the argument {name!r}, and it is empty")
    return value


def words(text: str) -> list[str]:
    """Tokens of the index and of queries: lower-cased runs of letters, digits and underscores, in composed form (NFC), with the
    signs above or below them (the vowels of Hindi). Of a run of Chinese or Japanese, where no space says where a word ends,
    every two neighbours."""
    composed = _composed(text)
    runs = (_run_with_marks() if _has_marks(composed) else _RUN).findall(composed)
    return [word for pairless, paired in runs for word in ([pairless] if pairless else _pairs(paired))]


def _composed(text: str) -> str:
    return unicodedata.normalize("NFC", text).lower()


def _has_marks(text: str) -> bool:
    return not text.isascii() and any(map(_is_mark, set(text)))


def _hold_marks(pages: Sequence[Page]) -> bool:
    return any(_has_marks(_composed(f"{page.title}\n{page.seen}")) for page in pages)


def _is_mark(character: str) -> bool:
    return unicodedata.category(character).startswith("M")


def _pairs(run: str) -> list[str]:
    return [run[at : at + 2] for at in range(max(1, len(run) - 1))]


_UNSPACED = (
    "\u3005-\u3007\u3041-\u3096\u309d-\u309f\u30a1-\u30fa\u30fc-\u30ff"  # kana
    "\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"  # Chinese characters
)
_RUN = re.compile(rf"([^\W{_UNSPACED}]+)|([{_UNSPACED}]+)")


@cache
def _run_with_marks() -> re.Pattern[str]:
    """The same where a mark belongs to the letter before it; to :mod:`re` it is no part of a word. Made when it is needed."""
    marks = "".join(filter(_is_mark, map(chr, range(sys.maxunicode))))
    return re.compile(rf"((?:[^\W{_UNSPACED}][{marks}]*)+)|([{_UNSPACED}]+)")


def query_terms(query: str) -> Terms:
    """Distinct words of a query, sorted."""
    return tuple(sorted(set(words(query))))


def least_matches(minimum_match: float, terms: int) -> int:
    """Distinct query words that a page must hold, of ``terms``; never below one."""
    return max(1, math.ceil(minimum_match * terms - 1e-9))  # 0.6 * 5 is 3.0000000000000004 in some products


def fold(title: str) -> str:
    """What two spellings of one title have in common: case, runs of white space and how accents are coded do not matter."""
    return unicodedata.normalize("NFC", " ".join(title.split())).casefold()


def window(line: str, terms: Terms, characters: int) -> str:
    """An excerpt of a long line, at most ``characters`` long, that shows as many query words as possible.

    It starts at the first of them, since what a reader looks for mostly follows the word; cuts are marked with dots.
    """
    mark = "..."
    room = characters - 2 * (len(mark) + 1)
    spans = [(m.start(), m.end(), frozenset(words(m.group())).intersection(terms)) for m in re.finditer(r"\S+", line)]
    held: Counter[str] = Counter()
    best, best_start, best_end, end = -1, 0, 0, 0
    improving = False
    for start, (left, right, own) in enumerate(spans):
        if end <= start:
            end = start + 1
            held.update(own)
        while end < len(spans) and spans[end][1] - left <= room:
            held.update(spans[end][2])
            end += 1
        shown = sum(count > 0 for count in held.values())
        if shown > best or (shown == best and improving and best > 0):
            best, best_start, best_end = shown, left, max(right, spans[end - 1][1])
            improving = True  # the same words, further left in the window: still the first place that shows them
        else:
            improving = False
        if end == len(spans):
            break  # a later start would show no other word and less around it
        held.subtract(own)
    text = line[best_start : min(best_end, best_start + room)]
    return (f"{mark} " if best_start > 0 else "") + text + (f" {mark}" if best_start + len(text) < len(line) else "")


class CorpusEnvironment(EnvironmentSettings):
    """Search and visit over your own pages."""

    kind: Literal["corpus"] = "corpus"
    """Your own pages."""
    pages: str = Field(json_schema_extra=PATH)
    """JSONL file, one page a line: ``{"title": ..., "text": ...}``; relative to the file that names it."""
    results: int = Field(3, ge=1, le=20)
    """Pages that one search lists."""
    snippet_characters: int = Field(160, ge=20, le=2000)
    """Length of the excerpt in a listing."""
    title_weight: float = Field(3.0, ge=0)
    """Weight of a word in a title, against ``text_weight`` for one in the text (BM25 fields)."""
    text_weight: float = Field(1.0, ge=0)
    """0 searches titles only."""
    minimum_match: float = Field(0.0, ge=0, le=1)
    """Least share of a query's words that a page must hold; 0 lists any page with one of them."""
    system: str = ""
    """The whole system message, in place of ours, which describes every tool as JSON schema; empty: ours."""


def _make(settings: CorpusEnvironment, place: Place) -> CorpusSearch:
    return CorpusSearch.from_jsonl(
        settings.pages,
        results=settings.results,
        snippet_characters=settings.snippet_characters,
        title_weight=settings.title_weight,
        text_weight=settings.text_weight,
        minimum_match=settings.minimum_match,
        system_prompt=CORPUS_PROMPT if is_pocket(place.policy) else settings.system or None,
    )


def _data(settings: CorpusEnvironment) -> str:
    """The ranking where there are marks, so that no night mixes it with one that split words there; '' elsewhere."""
    path = Path(settings.pages)
    try:
        if not path.is_file():  # a pipe would wait for ever, a device never end
            return ""
        stat = path.stat()
        return RANKING_WITH_MARKS if _holds_marks(path, stat.st_mtime_ns, stat.st_size) else ""
    except (OSError, ValueError, DataError):  # told by whoever reads the pages
        return ""


@lru_cache(maxsize=16)
def _holds_marks(path: Path, changed: int, size: int) -> bool:
    """Whether a page does; ``changed`` and ``size`` tell versions of the file apart."""
    content = path.read_bytes()
    if content.isascii() and b"\\u" not in content:  # the pages need not be parsed
        return False
    return _hold_marks(load_pages(path))


CORPUS = EnvironmentPart(
    settings=CorpusEnvironment,
    make=_make,
    data=_data,
    mistakes=lambda settings, experiment: file_tasks(experiment),
    check=lambda settings: load_pages(settings.pages),
)
