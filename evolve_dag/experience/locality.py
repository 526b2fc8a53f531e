"""What ties an item to the trajectories it came from (METHOD: granularity): addresses, numbers, entity strings.

Granularity says whether an item holds such detail, not how it is phrased. The paper counts, for instance-level items, 74.4%
with a URL or domain, 57.3% with a number, 93.9% with an entity string and 3.7% with a strategy statement; 84.0% of its
principle-level items hold a strategy statement.

Everything here goes by how English is written: a name begins with a capital, and so does a sentence. A script without capitals
shows no names.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from evolve_dag.experience.phrases import without_tool
from evolve_dag.records import ExperienceItem, Task

_URL = re.compile(r"https?://|www\.\w|(?<![\w-])-*+\w[\w-]*+\.(?:com|org|net|edu|gov|io|ai|cn|de|uk|info)\b", re.IGNORECASE)
_NUMBER = re.compile(r"\d\S*")
_NAME = re.compile(r"([A-Z][\w'’-]*+(?:\s++[A-Z][\w'’-]*+)++)|[A-Z][\w'’-]*+")
"""A name of several words; or one word, which is passed over whole: the capitals in it begin no name either."""
_SINGLE_NAME = re.compile(r"(?<=[a-z,] )[A-Z][\w'’-]++(?!\s+[A-Z])")
_ORDINARY_ANSWERS = frozenset({"true", "false", "none", "unknown", "neither", "both"})
_SHORTEST_ANSWER = 4
"""Letters and digits of an answer that is told from ordinary words and labels ('A', 'yes')."""

_TITLE_WORDS, _CAPITALISED = 6, 4
"""Most words of a title before the first colon ('Retrieval of Primary Sources: ...'); from how many letters on each of them
is capitalised."""
_PLACEHOLDER = re.compile(r"<[^<>]*>|\[[^\[\]]*\]|\{[^{}]*\}")
_OPENING, _CLOSING = "\"'“‘«(*_`", "\"'”’»)*_`,"
_ENDS = tuple(".!?:;…—–-•→")
"""What a sentence may begin after. A dash and a bullet are words of their own."""
_ABBREVIATION = re.compile(r"(?:e\.g|i\.e|vs|cf|dr|mrs?|ms|prof|st)\.", re.IGNORECASE)
"""Ends with a full stop, and the sentence goes on."""
_NOT_NAMES = frozenset(
    """
    bing boolean chinese duckduckgo english excel google internet jupyter latin linux markdown pubmed python scholar
    unicode unix wayback web wikidata wikipedia
    """.split()  # noqa: SIM905 as a list it would be twice as long
)
"""Capitalised words that name an agent's tools and sources or a language, not what a task is about. Acronyms (PDF) and
identifiers (WebSearch) are told by their spelling."""

_CONDITION = re.compile(
    # From comma to comma, so that no stretch is looked at twice however many conditions stand in it.
    r"(?:(?<=[,\n])|\A)(?=[^,\n]*?\b(?:when|whenever|if|before|after|once|unless)\b[^,\n])[^,\n]*+,\s*+\w",
    re.IGNORECASE,
)
_ADVICE = frozenset(
    """
    abandon access aggregate always analyze anchor answer apply ask avoid balance begin break build check choose cite
    clarify collect combine compare compute confirm consider construct consult convert count cross-check
    cross-reference cross-validate cross-verify decompose define derive detect diversify do document don't ensure enumerate
    establish evaluate examine exclude expand explore extract favor favour filter find first focus follow formulate
    gather identify ignore inspect isolate iterate keep leverage limit list locate look maintain map match minimize
    monitor narrow never note open organize parse pivot plan prefer preserve prioritise prioritize pursue query quote
    re-examine read recheck recompute record refine reformulate reject rely remember rephrase report require resolve
    restate retry review revisit rewrite scan scrutinize search seek select separate simplify skip start state stop
    summarise summarize switch synthesize target test trace track translate treat trust try use utilize validate verify
    visit weigh write
    """.split()  # noqa: SIM905 as above
)
"""Words with which a sentence opens that tells what to do."""
_BETWEEN_SENTENCES = re.compile(r"(?<=[.!?;:])\s+")


@dataclass(frozen=True, slots=True)
class Locality:
    """Shares between 0 and 1; all 0 for an empty pool."""

    items: int
    """How many items were looked at."""
    url: float
    """Share with a URL or domain."""
    number: float
    """Share with a digit."""
    entity: float
    """Share with an entity string: a capitalised name, or a name that the tasks hold."""
    strategy: float
    """Share with a strategy statement: a sentence without detail that says 'when ..., ...' or tells what to do."""


def trajectory_detail(text: str) -> list[str]:
    """What makes an item instance-level, in words; empty for a principle. The name of a tool (``base64_decode``, ``Search``) is
    none: the environment offers it in every episode."""
    text = without_tool(text)
    found = (
        ("a URL or domain", url_in(text)),
        ("a number", number_in(text)),
        ("an entity name", entity_in(text)),
    )
    return [f"holds {what} ({detail})" for what, detail in found if detail is not None]


def url_in(text: str) -> str | None:
    """The first address or domain, as far as it was recognised."""
    return match[0] if (match := _URL.search(text)) else None


def number_in(text: str) -> str | None:
    """The first word with a digit, from the digit on."""
    return match[0] if (match := _NUMBER.search(text)) else None


def entity_in(text: str) -> str | None:
    """The first capitalised name.

    None of these is one: the name of the item before its colon, the first word of a sentence or a quotation, an acronym
    (PDFs), an identifier (WebSearch), a placeholder (<Person Name>), a tool or source of an agent (Google Scholar).
    """
    heading, colon, rest = text.partition(":")
    return _name_in(rest if colon and _is_title(heading) else text)


def _is_title(heading: str) -> bool:
    words = heading.split()
    return len(words) <= _TITLE_WORDS and all(word[0].isupper() or len(word) < _CAPITALISED for word in words)


def _name_in(text: str) -> str | None:
    for run, opens in _capitalised(_PLACEHOLDER.sub("x", text)):
        # One capitalised word at the start is how English begins a sentence; two are a name.
        if not (opens and len(run) == 1) and _NOT_NAMES.isdisjoint(word.lower() for word in run):
            return " ".join(run)
    return None


def _capitalised(text: str) -> Iterator[tuple[list[str], bool]]:
    """Runs of capitalised words, and whether a sentence or a quotation begins with the run."""
    run: list[str] = []
    opens, starts = False, True
    for raw in re.split(r"[\s/]+", text):
        word = raw.strip(_OPENING + _CLOSING + ".!?:;…")
        begins = starts or raw[:1] in _OPENING
        if run and (begins or not _is_name(word)):  # `... Results. Visit ...` are two runs, `Bado Keli` is one
            yield run, opens
            run = []
        if _is_name(word):
            opens = opens if run else begins
            run.append(re.sub(r"['’]s$", "", word))
        bare = raw.rstrip(_CLOSING)
        starts = starts if not raw else bare.endswith(_ENDS) and not _ABBREVIATION.fullmatch(bare.lstrip(_OPENING))
        if run and raw[-1:] == ",":
            yield run, opens
            run = []
    if run:
        yield run, opens


def _is_name(word: str) -> bool:
    if not (word[:1].isupper() and word[1:2].islower()):
        return False
    return not re.search(r"[a-z][A-Z]|_", word) or word.startswith(("Mc", "Mac"))


def names_in(text: str) -> list[str]:
    """The capitalised names of several words, as they stand."""
    return [name for name in _NAME.findall(text) if name]


def task_names(tasks: Iterable[Task]) -> frozenset[str]:
    """Entity strings of the tasks: the answers, unless they are ordinary words, short or without a letter, and the capitalised
    names inside the questions."""
    names: set[str] = set()
    for task in tasks:
        answer = " ".join(task.answer.split())
        if re.search(r"[^\W\d_]", answer) and not _is_ordinary(answer):
            names.add(answer)
        names.update(" ".join(name.split()) for name in names_in(task.question))
        names.update(_SINGLE_NAME.findall(_NAME.sub(lambda found: " " if found[1] else found[0], task.question)))
    return frozenset(names)


def _is_ordinary(answer: str) -> bool:
    letters = sum(map(str.isalnum, answer))
    return answer.lower() in _ORDINARY_ANSWERS or (answer.isascii() and letters < _SHORTEST_ANSWER)


def locality(items: Sequence[ExperienceItem], tasks: Iterable[Task] = ()) -> Locality:
    """Measure ``items``; ``tasks`` supply names that capitals alone do not show (a lower-case answer)."""
    if not items:
        return Locality(0, 0.0, 0.0, 0.0, 0.0)
    known = task_names(tasks)
    pattern = re.compile("|".join(rf"(?<!\w){re.escape(name)}(?!\w)" for name in sorted(known))) if known else None

    def holds_known(text: str) -> bool:
        return pattern is not None and pattern.search(text) is not None

    def strategy(text: str) -> bool:
        sentences = (s for s in _BETWEEN_SENTENCES.split(text) if _advises(s))
        return not all(url_in(s) or number_in(s) or _name_in(s) or holds_known(s) for s in sentences)

    def share(count: int) -> float:
        return count / len(items)

    texts = [item.text for item in items]
    return Locality(
        items=len(items),
        url=share(sum(url_in(text) is not None for text in texts)),
        number=share(sum(number_in(text) is not None for text in texts)),
        entity=share(sum(entity_in(text) is not None or holds_known(text) for text in texts)),
        strategy=share(sum(strategy(text) for text in texts)),
    )


def _advises(sentence: str) -> bool:
    words = sentence.lower().replace("’", "'").split()
    return _CONDITION.search(sentence) is not None or bool(words and words[0].strip("*_`\"'(-,") in _ADVICE)
