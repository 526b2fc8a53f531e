"""Features that any tool-use trajectory has (METHOD step 3, DESIGN: extraction).

Before each step the *situation* is a mapping feature -> value (:func:`features`); the step itself is one
*action* value (:func:`action`). Both read only the question, the earlier calls and what they returned. They
know no world, no page kinds and no agent. Where the environment describes an observation itself
(:attr:`~evolve_dag.records.Step.features`), its word counts and the text is not read: ``observation`` is ``described``,
each of its features stands in the situation under ``env:<name>``, and the next call is told by its tool (``use:<tool>``), or by
what the environment says that it did (its feature ``did``: ``did:go back``), where one tool takes every command.
Otherwise the text alone decides; the rules, in the order in which they are tried, are:

==============  ======================================================================================
feature         values
==============  ======================================================================================
``tool``        ``none`` before the first call and after a refused action, else the last tool's name
``observation``  what the last call gave: ``none`` | ``problem`` (the action was refused) | ``empty`` (blank, 'no
                results') | ``missing`` ('no page', 'not found', error-like) | ``redirect`` (nothing but a pointer:
                'see: X', 'moved to X') | ``listing`` ('<n> results' or mostly numbered or bulleted lines) | ``page``
``listed``      entries of a listing: ``none`` | ``one`` | ``several``
``shared_name``  ``yes`` when two listed titles share a name, i.e. at least two words (capitalised ones where a
                title has two of them, so that a kind word is no part of the name)
``evidence``    ``asked`` when the question's head word (first content word) stands in the observation, ``part``
                when another relation word of the question does, else ``none``
``mark``        what stands with the asked value beside names and numbers ('home: city Bado Keli old 12' is marked
                ``old``); ``none`` for a plain value, for a sentence and where nothing asked is shown
``repeat``      ``yes`` when the last call had been made before
``depth``       steps so far: ``early`` (< 3) | ``middle`` (< 6) | ``late``
==============  ======================================================================================

What is longer ago is told where it is asked for (:data:`HISTORY`):

==============  ======================================================================================
``led``         what the last step did: an action of :data:`ACTIONS`; ``none`` before the first call
``in_row``      how often in a row the same was given: ``once`` | ``twice`` | ``more``; ``none`` before the first call. The
                same is the same kind of observation, with all that the environment says of it
``shown``       ``yes`` when an observation before the last showed the asked value
==============  ======================================================================================

A question word *stands in* a page when it is the key of a ``key: value`` line or a word of a prose line; title
lines and the values of fields do not count. Names (capitalised words) and the kind word directly before one
('person Bado Keli') are not relation words.

Limits, known and accepted: head word and names lean on English word order and capitals; a page of another
entity that happens to carry the asked field reads ``asked``; a title that stands on an earlier page counts as
fitting, which is generous on pages with hundreds of links; tools are told apart by their names (see ``_OPENERS``).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache

from evolve_dag.plain import LAST_STEP
from evolve_dag.protocols import CAN, OR
from evolve_dag.records import ExperienceItem, Step, ToolCall, Trajectory

FEATURES: tuple[str, ...] = ("tool", "observation", "listed", "shared_name", "evidence", "mark", "repeat", "depth")
"""Names of the features, in the order in which a condition shows them."""

HISTORY: tuple[str, ...] = ("led", "in_row", "shown")
"""Names of the features that tell what is longer ago than the last call: a sequence, a count, what was shown."""

OBSERVATIONS: tuple[str, ...] = ("none", "problem", "empty", "missing", "redirect", "listing", "page", "described")

OWN = "env:"
"""Begins the name of a feature that the environment gave."""

DID = "did"
"""The feature that tells of the call itself, not of what it showed: the action, and no part of a situation. Nor is
:data:`~evolve_dag.protocols.CAN`: who could not do a thing is no witness of what it is worth to leave it."""

ACTIONS: Mapping[str, str] = {
    "repeat": "the last call once more (to come back to an earlier one is what it is: a search, an opening)",
    "open_pointed": "opens the target of the redirect in the last observation",
    "open_fitting": "title whose words stand in the question, or a listed one that the step before or an earlier page names",
    "open_first": "opens the first entry of a listing, which does not fit",
    "open_other": "opens another entry of a listing, which does not fit",
    "open_linked": "opens a title that was not listed and stands on the last page",
    "open_unlisted": "opens a title that stands nowhere in a listing or on the last page",
    "search_short": "a free-text call of at most four words",
    "search_long": "a free-text call of more words",
    "use_tool": "any other call (code, or several arguments that are not named for what the tool does)",
    "use:<tool>": "a call, by its tool's name, where that neither searches nor opens nor runs code, or is described",
    "did:<words>": "a call, by what the environment says that it did",
    "answer_highest": "of several rows with a number each, the last observation's, the answer is that with the highest number",
    "answer_lowest": "the same with the lowest number",
    "answer_top": "the same, the first row, when its number is neither",
    "answer_bottom": "the same, the last row or one in the middle, when its number is neither",
    "answer_listed": "the answer stands in a listing only (the last observation decides before earlier ones)",
    "answer_page": "the answer stands on a page",
    "answer_unseen": "the answer stands in no observation",
    "malformed": "no call and no answer, or refused",
}
"""Every action value and its rule. Exactly one holds for a step; the calls are tried in this order."""

SHORT_QUERY_WORDS = 4
"""Most words of a short free-text call."""

STOP_WORDS = frozenset(
    re.findall(
        r"\w+",
        """a an the of in on at to for from by with and or is are was were be been being do does did has have had it its
        this that these those there their his her as into than then what which who whom whose when where why how many
        much name named called tell me give find please can could would will s""",
    )
)
_SEARCHERS = frozenset({"search", "query", "find", "lookup", "ask", "scholar", "google", "bing"})
_OPENERS = frozenset(re.findall(r"\w+", "visit open fetch read browse goto page url link title document file path click get"))
_RUNNERS = frozenset({"python", "code", "run", "execute", "shell", "bash", "calculator", "interpreter", "sql"})
_KINDS = {"run": _RUNNERS, "search": _SEARCHERS, "open": _OPENERS}

_WORD = re.compile(r"[^\W_]+(?:['’\-][^\W_]+)*")
_MARKUP = re.compile(r"\*\*|[`\"“”«»]")
_EMPTY = re.compile(r"(?:no|0|zero) (?:results?|matches|match|hits?)\b|nothing (?:was )?found\b", re.IGNORECASE)
_MISSING = re.compile(
    r"no (?:such )?(?:page|file|document|article|entry|site|url)\b|no such\b|(?:\w+)?error\b|unknown\b"
    r"|.*\b(?:not found|does not exist|404|timed out|timeout|unavailable|failed|cannot be|could not|unable to)\b",
    re.IGNORECASE,
)
_HEADER = re.compile(r"\d+ (?:results?|matches|hits?|pages?)\b[^\n]{0,40}$", re.IGNORECASE)
_ENTRY = re.compile(r"(?:\d{1,3}[.)\]:]|\[\d{1,3}\]|[-*•])\s+(\S.*)")
_TITLE_LINE = re.compile(r"(?:page|title)\s*:\s*(.*)", re.IGNORECASE)
_POINTER = re.compile(
    r"(?:see(?: also)?|redirect(?:s|ed|ing)?(?: to)?|(?:has )?moved(?: permanently)?(?: to)?|main article)"
    r"(?:\s*+[:\-→>]++)?\s++(\S.*)",
    re.IGNORECASE,
)
_FIELD = re.compile(r"([^:]{1,40}):(?:\s+|$)(.*)")
_KEY_WORD = re.compile(r"(?<![^\W_])([^\W_]++)\s*+:(?=\s|$)")
_NUMBER = re.compile(r"\d+(?:[.,]\d+)*")
MARK_WORDS = 2
"""Most words beside names and numbers in a marked value; more make a sentence."""
_URL = re.compile(r"https?://[^\s)\]>\"]+")
_TITLE_END = re.compile(r":\s|\s[-–—|]\s|$|\]\(")


def strip_last_step(text: str) -> str:
    """``text`` without the loop's closing demand for an answer, which is no part of an observation."""
    before, _, last = text.rpartition("\n")
    return before if last == LAST_STEP else text


def answer_demanded(question: str, steps: Sequence[Step]) -> bool:
    """Whether the loop has told the policy that only an answer is possible now.

    Its line is told by every letter: whatever a page or a question holds that looks like it has become a quotation
    (:func:`evolve_dag.plain.plain`), and a recipe may end with 'Last step: let it cool'.
    """
    text = (steps[-1].observation or "") if steps else question
    return text.rpartition("\n")[2] == LAST_STEP


def normalised(text: str) -> str:
    """Lower-case words of ``text`` joined by single blanks; marks, quotes and punctuation are gone."""
    return " ".join(_WORD.findall(text.lower()))


def _stem(word: str) -> str:
    word = word.lower().removesuffix("'s").removesuffix("’s")
    return word[:-1] if len(word) > 3 and word.endswith("s") and not word.endswith("ss") else word


@dataclass(frozen=True, slots=True)
class ParsedQuestion:
    """The words of a question, by their use."""

    words: frozenset[str]
    """All words, lower-case."""
    head: str
    """Stem of the first content word that is no name: what is asked for; '' when there is none."""
    relations: frozenset[str]
    """Stems of the other content words that are neither names nor the kind word before a name."""


@lru_cache(maxsize=8192)
def parse_question(text: str) -> ParsedQuestion:
    """Split a question into head word, relation words and the rest."""
    words = _WORD.findall(strip_last_step(text))
    is_name = [place > 0 and word[:1].isupper() for place, word in enumerate(words)]
    content = [
        (place, _stem(word))
        for place, word in enumerate(words)
        if not is_name[place] and word.lower() not in STOP_WORDS and not word.isdigit()
    ]
    head = content[0][1] if content else ""
    relations = {stem for place, stem in content[1:] if stem != head and not (place + 1 < len(words) and is_name[place + 1])}
    return ParsedQuestion(frozenset(word.lower() for word in words), head, frozenset(relations))


@dataclass(frozen=True, slots=True)
class Listed:
    """One line of a listing."""

    title: str
    """Normalised text up to the first colon, dash or bar."""
    text: str
    """Normalised text of the whole entry."""
    name: frozenset[str]
    """Words that two entries must share to have the same name."""
    urls: tuple[str, ...]

    def matches(self, argument: str) -> bool:
        """Whether a call with ``argument`` (raw) opens this entry: by title, by the entry's beginning or by address."""
        plain = normalised(argument)
        if not plain:
            return False
        # A title may hold a colon or a dash itself: then the argument is a longer beginning of the entry.
        return (
            plain == self.title
            or (len(plain) > len(self.title) and f"{self.text} ".startswith(f"{plain} "))
            or (argument.strip() in self.urls)
        )


@dataclass(frozen=True, slots=True)
class Observation:
    """What a call gave back, read generically."""

    kind: str
    """One of :data:`OBSERVATIONS`."""
    text: str = ""
    """All words, normalised, with a blank at both ends."""
    body: str = ""
    """The same without the title line."""
    entries: tuple[Listed, ...] = ()
    target: str = ""
    """Normalised target of a redirect."""
    keys: frozenset[str] = frozenset()
    """Stems of the words that count as evidence."""
    own: Mapping[str, str] = field(default_factory=dict)
    """What the environment says of it, by the names that a situation holds."""
    fields: tuple[tuple[str, str], ...] = ()
    """(stem of the key, value) of every ``key: value`` line of a page, in their order."""

    def values(self, key: str) -> list[str]:
        """Values of the fields with this key."""
        return [value for name, value in self.fields if name == key]

    def mark(self, key: str) -> str:
        """Words that stand with the values of ``key`` beside names, numbers and the kind word before a name."""
        words: dict[str, None] = {}
        for value in self.values(key):
            parts = value.split()
            for place, word in enumerate(parts):
                named = place + 1 < len(parts) and parts[place + 1][:1].isupper()
                if word.isalpha() and word.islower() and not named and word not in STOP_WORDS:
                    words[word] = None
        return " ".join(sorted(words)) if 0 < len(words) <= MARK_WORDS else "none"

    def rows(self, key: str) -> list[tuple[float, str]]:
        """(number, normalised value) of the fields with this key when there are several, each with one number."""
        found = []
        for value in self.values(key):
            numbers = _NUMBER.findall(value)
            if len(numbers) != 1:
                return []
            found.append((float(numbers[0].replace(",", "")), f" {normalised(value)} "))
        return found if len(found) > 1 else []

    @property
    def listed(self) -> str:
        return "none" if not self.entries else "one" if len(self.entries) == 1 else "several"

    @property
    def shared_name(self) -> str:
        names = [entry.name for entry in self.entries]
        shared = any(len(a & b) >= 2 for place, a in enumerate(names) for b in names[place + 1 :])
        return "yes" if shared else "no"


_START = Observation("none")
_TIMES = ("none", "once", "twice", "more")


def _described(step: Step) -> Observation:
    words = f" {normalised(strip_last_step(step.observation or ''))} "
    return Observation("described", words, words, own=_shown(step))


def _shown(step: Step) -> dict[str, str]:
    return {f"{OWN}{name}": value for name, value in step.features.items() if name not in (DID, CAN)}


@lru_cache(maxsize=16384)
def parse_observation(text: str) -> Observation:
    """Classify one observation (the kind ``problem`` is the caller's to set: it is no matter of text)."""
    plain = _MARKUP.sub("", strip_last_step(text))
    lines = [line.strip() for line in plain.splitlines() if line.strip()]
    words = f" {normalised(plain)} "
    if not lines or (len(lines) == 1 and _EMPTY.match(lines[0])):
        return Observation("empty", words, words)
    if len(lines) <= 2 and len(lines[0].split()) <= 15 and _MISSING.match(lines[0]):
        return Observation("missing", words, words)
    title = _TITLE_LINE.match(lines[0])
    body = lines[1:] if title else lines
    body_words = f" {normalised(' '.join(body))} "
    if len(body) == 1 and len(body[0].split()) <= 12 and (pointer := _POINTER.fullmatch(body[0])):
        return Observation("redirect", words, body_words, target=normalised(pointer.group(1)))
    entries = () if title else _entries(lines)
    if entries:
        bodies = [e for line in lines if (e := _ENTRY.match(line))]
        after_title = [match.group(1)[_title_end(match.group(1)) :].lstrip(" :-–—|") for match in bodies]
        following = [line for line in lines if not _ENTRY.match(line) and not _HEADER.match(line)]
        return Observation("listing", words, body_words, entries, keys=_evidence_words([*after_title, *following]))
    return Observation("page", words, body_words, keys=_evidence_words(body), fields=_fields(body))


def _entries(lines: list[str]) -> tuple[Listed, ...]:
    """Entries of a listing (a header, or entries on at least half of the lines), or () when the text is none."""
    starts = [place for place, line in enumerate(lines) if _ENTRY.match(line)]
    if not starts or not (_HEADER.match(lines[0]) or 2 * len(starts) >= len(lines)):
        return ()
    found = []
    for place, start in enumerate(starts):
        end = starts[place + 1] if place + 1 < len(starts) else len(lines)
        chunk = lines[start:end]
        match = _ENTRY.match(chunk[0])
        assert match is not None  # starts were chosen by this very pattern
        first = match.group(1).lstrip("[")
        title = first[: _title_end(first)]
        title_words = _WORD.findall(title)
        capitals = [word for word in title_words if word[:1].isupper()]
        name = capitals if len(capitals) >= 2 else title_words
        urls = tuple(_URL.findall(" ".join(chunk)))
        whole = normalised(" ".join([first, *chunk[1:]]))
        found.append(Listed(normalised(title), whole, frozenset(word.lower() for word in name), urls))
    return tuple(found)


def _title_end(entry: str) -> int:
    match = _TITLE_END.search(entry)
    return match.start() if match else len(entry)


def _evidence_words(lines: Sequence[str]) -> frozenset[str]:
    found: set[str] = set()
    for line in lines:
        for part in re.split(r"[;|]", line):
            field = _FIELD.match(part.strip())
            if field is not None and len(field.group(1).split()) <= 4:
                found.update(_WORD.findall(field.group(1)))
                found.update(_KEY_WORD.findall(field.group(2)))  # several fields on one line, as in a snippet
                if len(field.group(2).split()) <= 6:
                    continue  # a short value is a name or a number, not a statement
            found.update(_WORD.findall(part))
    return frozenset(_stem(word) for word in found)


def _fields(lines: Sequence[str]) -> tuple[tuple[str, str], ...]:
    found = []
    for line in lines:
        match = _FIELD.fullmatch(line)
        if match is not None and match.group(2) and len(match.group(1).split()) == 1:
            found.append((_stem(match.group(1)), match.group(2)))
    return tuple(found)


def _call_key(call: ToolCall) -> tuple[str, tuple[tuple[str, str], ...]]:
    return call.name, tuple(sorted((name, " ".join(value.lower().split())) for name, value in call.texts.items()))


def call_name(call: ToolCall) -> str:
    """The tool's name as one word of a principle."""
    return re.sub(r"[^A-Za-z0-9_-]+", "_", call.name)[:40]


def _call_kind(call: ToolCall) -> tuple[str, str]:
    """``search``, ``open``, ``run`` or ``unknown``, by the names of tool and argument, and the argument that says what for."""
    if len(call.arguments) == 1:
        ((name, argument),) = call.texts.items()
        return _kind(call.name) or _kind(name) or "unknown", argument
    # Of several arguments that which is named for what the tool does: of visit(url, goal) the address.
    kind = _kind(call.name)
    told = next((text for name, text in call.texts.items() if _words(name) & _KINDS[kind]), None) if kind else None
    return ("run", "") if kind is None or told is None else (kind, told)


def _kind(name: str) -> str | None:
    return next((kind for kind, hints in _KINDS.items() if _words(name) & hints), None)


def _words(name: str) -> set[str]:
    return set(re.split(r"[^a-z]+", re.sub(r"(?<=[a-z])(?=[A-Z])", "_", name).lower()))


class Tracker:
    """The steps so far, read once: asks for features and actions cost no second look at earlier text.

    Args:
        history: situations tell of :data:`HISTORY` as well.
    """

    def __init__(self, question: str, steps: Sequence[Step] = (), *, history: bool = False) -> None:
        self._question = parse_question(question)
        self._history = history
        self._led = "none"
        self._in_row = 0
        self._shown = False
        self._count = 0
        self._calls: set[tuple[str, tuple[tuple[str, str], ...]]] = set()
        self._observations: list[Observation] = []
        self._tool = "none"
        self._repeated = False
        self._last_call: tuple[str, tuple[tuple[str, str], ...]] | None = None
        self._last_text = ""
        for step in steps:
            self.append(step)

    def append(self, step: Step) -> None:
        """Read one more step, with its observation."""
        before = self.last
        if self._history:
            self._led = self.action(step)
            self._shown |= self._asked
        self._read(step)
        same = (before.kind, before.own) == (self.last.kind, self.last.own)
        self._in_row = self._in_row + 1 if same else 1

    def _read(self, step: Step) -> None:
        self._count += 1
        self._last_text = step.text
        self._repeated = False
        self._last_call = None
        if step.problem is not None or step.call is None:
            self._tool = "none"
            self._observations.append(Observation("problem", f" {normalised(step.observation or '')} "))
            if step.call is None:
                return
        else:
            self._tool = step.call.name
            self._observations.append(_described(step) if step.features else parse_observation(step.observation or ""))
        self._last_call = _call_key(step.call)
        self._repeated = self._last_call in self._calls
        self._calls.add(self._last_call)

    @property
    def last(self) -> Observation:
        return self._observations[-1] if self._observations else _START

    def features(self) -> dict[str, str]:
        """The situation before the next step."""
        last = self.last
        evidence = "asked" if self._asked else "part" if self._question.relations & last.keys else "none"
        return {
            "tool": self._tool,
            "observation": last.kind,
            "listed": last.listed,
            "shared_name": last.shared_name,
            "evidence": evidence,
            "mark": last.mark(self._question.head) if evidence == "asked" else "none",
            "repeat": "yes" if self._repeated else "no",
            "depth": "early" if self._count < 3 else "middle" if self._count < 6 else "late",
            **last.own,
            **(self._ago if self._history else {}),
        }

    @property
    def _ago(self) -> dict[str, str]:
        """What is longer ago: :data:`HISTORY`."""
        return {"led": self._led, "in_row": _TIMES[min(self._in_row, 3)], "shown": "yes" if self._shown else "no"}

    @property
    def _asked(self) -> bool:
        """Whether the last observation shows the asked value."""
        return bool(self._question.head) and self._question.head in self.last.keys

    def action(self, step: Step) -> str:
        """What ``step``, the next one, does: a key of :data:`ACTIONS`."""
        if step.answer is not None:
            return self._answer(step.answer)
        if step.call is None or step.problem is not None:
            return "malformed"
        if did := step.features.get(DID):
            return f"{DID}:{did}"
        if _call_key(step.call) == self._last_call:
            return "repeat"
        if step.features or self.last.kind == "described":
            return f"use:{call_name(step.call)}"
        kind, argument = _call_kind(step.call)
        if kind == "run":
            return "use_tool"
        plain = normalised(argument)
        rank = self._rank(argument) if kind != "search" else None
        pointed = bool(plain) and plain == self.last.target
        if pointed and kind != "search":
            return "open_pointed"
        # A tool of unknown name opens when it is given a listed title.
        if kind == "unknown" and rank is None:
            return f"use:{call_name(step.call)}"
        if kind == "search":
            return "search_short" if len(plain.split()) <= SHORT_QUERY_WORDS else "search_long"
        if plain and set(plain.split()) <= self._question.words:
            return "open_fitting"
        if rank is not None:
            if self._named_before(plain):
                return "open_fitting"
            return "open_first" if rank == 1 else "open_other"
        on_last_page = self.last.kind in ("page", "redirect") and f" {plain} " in self.last.body
        return "open_linked" if plain and on_last_page else "open_unlisted"

    def _rank(self, argument: str) -> int | None:
        """1-based rank of the entry that ``argument`` opens, in the latest listing that holds it."""
        for observation in reversed(self._observations):
            for place, entry in enumerate(observation.entries, 1):
                if entry.matches(argument):
                    return place
        return None

    def _named_before(self, title: str) -> bool:
        """The step before or an earlier page names ``title``. The acting step's own thought does not count: it would
        make every title fit that is spoken of before it is opened."""
        if not title:
            return False
        if f" {title} " in f" {normalised(self._last_text)} ":
            return True
        return any(f" {title} " in o.body for o in self._observations if o.kind in ("page", "redirect"))

    def _answer(self, answer: str) -> str:
        value = normalised(answer)
        if not value:
            return "answer_unseen"
        holders = [
            o for o in self._observations if o.kind in ("page", "redirect", "listing", "described") and f" {value} " in o.text
        ]
        if not holders:
            return "answer_unseen"
        if holders[-1] is self.last and self.last.kind == "listing":
            return "answer_listed"
        rows = self.last.rows(self._question.head)
        place = next((place for place, (_, text) in enumerate(rows) if f" {value} " in text), None)
        if place is not None:
            numbers = [number for number, _ in rows]
            if numbers[place] in (max(numbers), min(numbers)):
                return "answer_highest" if numbers[place] == max(numbers) else "answer_lowest"
            return "answer_top" if place == 0 else "answer_bottom"
        return "answer_page" if any(o.kind != "listing" for o in holders) else "answer_listed"


def features(question: str, steps: Sequence[Step], *, history: bool = False) -> dict[str, str]:
    """The situation after ``steps``, i.e. before the next one: every name of :data:`FEATURES` with its value, of
    :data:`HISTORY` too where ``history`` asks for it."""
    return Tracker(question, steps, history=history).features()


def looks_back(condition: Iterable[str]) -> bool:
    """Whether a condition, given by its features, tells of :data:`HISTORY`."""
    return any(feature in HISTORY for feature in condition)


def any_looks_back(items: Iterable[ExperienceItem]) -> bool:
    """Whether the situation of one of them does: then situations have to be read with their history."""
    return any(looks_back(item.condition) for item in items)


def action(question: str, before: Sequence[Step], step: Step) -> str:
    """What ``step`` does, given the steps ``before`` it: a key of :data:`ACTIONS`."""
    return Tracker(question, before).action(step)


@dataclass(frozen=True, slots=True)
class Choice:
    """A step where the policy had a choice."""

    step: int
    """Its index in the trajectory."""
    state: dict[str, str]
    """The situation before it."""
    action: str
    """What was done."""
    possible: frozenset[str] | None
    """All that could have been done, of the actions ``did:<words>``; None where the environment does not say."""

    def allows(self, action: str) -> bool:
        """Whether ``action`` could have been done, as far as is known."""
        return self.possible is None or action in self.possible or not action.startswith(f"{DID}:")


def choices(trajectory: Trajectory, *, history: bool = False) -> list[Choice]:
    """Every step where the policy had a choice; ``history`` as in :func:`features`.

    A step under the demand 'last step: answer now' is left out: there nothing but an answer was possible.
    """
    transcript = Tracker(trajectory.question, history=history)
    found = []
    for place, step in enumerate(trajectory.steps):
        if not answer_demanded(trajectory.question, trajectory.steps[:place]):
            before = trajectory.steps[place - 1].features if place else {}
            can = frozenset(f"{DID}:{one}" for one in before[CAN].split(OR)) if CAN in before else None
            found.append(Choice(step.index, transcript.features(), transcript.action(step), can))
        transcript.append(step)
    return found


def walk(trajectory: Trajectory, *, history: bool = False) -> list[tuple[dict[str, str], str]]:
    """(situation, action) of :func:`choices`."""
    return [(choice.state, choice.action) for choice in choices(trajectory, history=history)]
