"""The small language of the pocket world: names, kinds, attributes, and the principles its policy can read.

Principles are drawn from a phrase grammar: every situation and every strategy has slots, and a paraphrase is
one choice per slot. One paraphrase in five, picked by a hash, is **held out**: pretraining never shows it, and
obedience is measured on it (``docs/pocket_model_card.md``). The phrases that the extractor writes
(:mod:`evolve_dag.experience.phrases`) are held out as well, so a principle that the loop finds reaches the policy
in words whose combination it has never seen.
"""

from __future__ import annotations

import itertools
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import lru_cache
from random import Random

from evolve_dag.environments.corpus import CORPUS_PROMPT

NAME_WORDS = [
    "Beli",
    "Bemi",
    "Beri",
    "Bidu",
    "Bola",
    "Bona",
    "Buma",
    "Dapo",
    "Dato",
    "Davu",
    "Dazu",
    "Debi",
    "Degu",
    "Dezu",
    "Dobi",
    "Dofi",
    "Dozu",
    "Fegi",
    "Feki",
    "Fepo",
    "Fibo",
    "Fina",
    "Fizu",
    "Fobu",
    "Fopa",
    "Fuga",
    "Fupa",
    "Gapi",
    "Geda",
    "Gifu",
    "Gosu",
    "Kedo",
    "Kezi",
    "Kimu",
    "Kito",
    "Kura",
    "Kuta",
    "Kuva",
    "Laku",
    "Lemo",
    "Leni",
    "Liko",
    "Lisu",
    "Liva",
    "Lizo",
    "Ludo",
    "Meno",
    "Meta",
    "Mino",
    "Mofu",
    "Moga",
    "Mova",
    "Mufa",
    "Muza",
    "Nabu",
    "Nafi",
    "Nefa",
    "Nero",
    "Neso",
    "Nilo",
    "Nodi",
    "Noru",
    "Pamo",
    "Pano",
    "Pebu",
    "Puki",
    "Puna",
    "Ragi",
    "Razo",
    "Renu",
    "Rugi",
    "Rumi",
    "Sabo",
    "Sako",
    "Sigu",
    "Sonu",
    "Suka",
    "Sula",
    "Suno",
    "Taki",
    "Tami",
    "Tavo",
    "Teba",
    "Tela",
    "Tepu",
    "Tevo",
    "Tivo",
    "Vadi",
    "Vagu",
    "Valo",
    "Vefo",
    "Vilu",
    "Vofa",
    "Voma",
    "Vosi",
    "Vozi",
    "Zali",
    "Zeto",
    "Zuli",
    "Zuto",
]

KINDS: Mapping[str, Sequence[tuple[str, str]]] = {
    "person": [("home", "city"), ("job", "firm"), ("mate", "person")],
    "city": [("mayor", "person"), ("stream", "river"), ("patron", "person")],
    "river": [("mouth", "city"), ("keeper", "person"), ("source", "city")],
    "firm": [("seat", "city"), ("chief", "person"), ("partner", "firm")],
    "book": [("author", "person"), ("house", "firm"), ("setting", "city")],
}
"""Kind of entity -> its attributes and the kind of each value."""

TOOLS = ("archive", "registry", "ledger", "atlas", "bureau")
"""Tools that look up what stands under a mark."""

MARKS = ("old", "disputed", "coded", "local", "copied", "draft", "sworn", "partial", "foreign", "sealed", "spare", "loose")
"""Words that may stand behind a value. Worlds of tasks use the first five, in this order."""

ROW_LABELS = ("year", "rank", "size", "dose", "grade", "issue")
"""Words that may stand before the number of a row. Worlds of tasks use the first."""

ROW_MOVES: Mapping[str, Callable[[Sequence[int]], int]] = {
    "row_first": lambda numbers: 0,
    "row_last": lambda numbers: len(numbers) - 1,
    "row_highest": lambda numbers: max(range(len(numbers)), key=numbers.__getitem__),
    "row_lowest": lambda numbers: min(range(len(numbers)), key=numbers.__getitem__),
}
"""Move -> place of the row that it answers, given the rows' numbers from top to bottom."""

SYSTEM_PROMPT = ", ".join([CORPUS_PROMPT, *TOOLS])
"""System message of the pocket world."""

State = str
"""Where the scripted policy of pretraining stands; see :mod:`evolve_dag.environments.pocket.script`."""
Move = str
"""What it does next."""

SITUATIONS: Mapping[State, Sequence[Sequence[str]]] = {
    "start": [["nothing"], ["is", "was"], ["known", "found", "read", "seen"], ["yet", "so far", "at the start"]],
    "empty": [
        ["a search", "the search", "the last search", "the query", "a lookup"],
        ["returns", "gives", "finds", "brings"],
        ["no results", "nothing", "no result", "no match", "an empty list"],
    ],
    "one": [
        ["a search", "the search", "the last search", "the query", "the list"],
        ["shows", "lists", "returns", "brings"],
        ["one result", "one title", "a single result", "a single title", "just one page"],
    ],
    "several": [
        ["several", "two", "many"],
        ["results", "titles", "listed pages"],
        ["share", "have", "carry", "bear"],
        ["one name", "the same name", "a common name"],
    ],
    "redirect": [
        ["the page", "a page", "the text", "this page"],
        ["only points", "just points", "only refers", "just refers", "only leads"],
        ["to another page", "to another title", "to a page elsewhere", "elsewhere"],
    ],
    "part": [
        ["the page", "a page", "the text", "this page"],
        ["answers", "covers", "settles", "solves"],
        ["only part", "just a part", "one part", "only one step"],
        ["of the question", "of the task"],
    ],
    "asked": [
        ["the page", "a page", "the text", "this page"],
        ["shows", "states", "holds", "gives"],
        ["the asked value", "the asked word", "the final value", "the value in question"],
    ],
    "wrong": [
        ["the page", "a page", "the text", "this page"],
        ["lacks", "misses", "leaves out", "does not hold"],
        ["the asked part", "the needed part", "every asked word", "what was asked"],
    ],
    "listing": [
        ["a search", "the search", "the last search", "the query", "the list"],
        ["shows", "lists", "returns", "brings"],
        ["results", "some results", "titles", "some titles", "some pages"],
    ],
    "page": [
        ["the page", "a page", "the text", "this page", "some page"],
        ["is shown", "is read", "is open", "was opened", "is there"],
    ],
    "missing": [
        ["no page", "not one page", "no title"],
        ["has", "carries", "bears", "matches"],
        ["that name", "this name", "the name", "that title"],
    ],
}
"""State, or group of states, -> slots of its paraphrases; the text is one choice per slot, joined by blanks."""

MARK_SITUATION: Sequence[Sequence[str]] = [
    ["the line", "the entry", "its line", "that line", "some entry"],
    ["reads", "bears", "carries", "says", "is marked"],
]
"""Slots before the word of a mark or of a row's label: 'the entry bears old'."""
CONSULT: Sequence[Sequence[str]] = [["consult", "ask", "try", "call", "check"], ["the", "that", "this", "its"]]
"""Slots before the name of a tool: 'consult the archive'."""

GROUPS: Mapping[State, Sequence[State]] = {"listing": ("one", "several"), "page": ("part", "asked", "wrong")}
"""Situations that cover more than one state."""

STRATEGIES: Mapping[Move, Sequence[Sequence[str]]] = {
    "search_short": [
        ["search", "look up", "query"],
        ["only", "just", "simply"],
        ["the short name", "the bare name", "a brief name", "the plain name"],
    ],
    "search_long": [
        ["search", "look up", "query"],
        ["the whole", "the full", "the entire", "the complete"],
        ["question", "sentence", "task"],
    ],
    "visit_match": [
        ["open", "visit", "read"],
        ["the page", "the title", "the one", "the result"],
        ["that fits", "that matches", "that suits"],
        ["the question", "the asked kind", "the kind"],
    ],
    "visit_first": [["open", "visit", "read"], ["the first", "the top", "the upper"], ["result", "page", "title", "one"]],
    "visit_link": [
        ["follow", "open", "visit", "read"],
        ["the page", "the title", "the one"],
        ["it points to", "it refers to", "it leads to", "it names"],
    ],
    "snippet": [
        ["trust", "use", "take", "believe"],
        ["the listed", "the shown", "the previewed"],
        ["value", "word", "snippet"],
    ],
    "answer": [
        ["answer", "reply", "finish", "respond"],
        ["with", "by", "using"],
        ["that value", "that word", "the value"],
        ["now", "promptly", "at once"],
    ],
    "row_first": [["take", "pick", "choose", "give"], ["the first", "the upper", "the top"], ["row", "line"]],
    "row_last": [["take", "pick", "choose", "give"], ["the last", "the lower", "the bottom"], ["row", "line"]],
    "row_highest": [
        ["take", "pick", "choose", "give"],
        ["the row", "the line", "the one"],
        ["with", "of"],
        ["the highest", "the greatest", "the largest"],
        ["number", "figure"],
    ],
    "row_lowest": [
        ["take", "pick", "choose", "give"],
        ["the row", "the line", "the one"],
        ["with", "of"],
        ["the lowest", "the least", "the smallest"],
        ["number", "figure"],
    ],
    **{tool: [*CONSULT, [tool]] for tool in TOOLS},
}
"""Move -> slots of its paraphrases."""

NAMES: Mapping[Move, Sequence[str]] = {
    "search_short": ["Narrow", "Brief"],
    "search_long": ["Broad", "Full"],
    "visit_match": ["Match", "Verify"],
    "visit_first": ["First", "Top"],
    "visit_link": ["Follow", "Trace"],
    "snippet": ["Trust", "Quick"],
    "answer": ["Conclude", "Finish"],
    "row_first": ["Top", "Upper"],
    "row_last": ["Bottom", "Lower"],
    "row_highest": ["Highest", "Greatest"],
    "row_lowest": ["Lowest", "Least"],
    **{tool: ["Source", "Desk"] for tool in TOOLS},
}
"""Move -> names that its principles bear."""

ADDITIONS = [
    ["some", "few", "many", "several"],
    ["steps", "calls", "turns", "searches"],
    ["are", "were"],
    ["done", "made", "behind"],
]
"""Slots of what may be added to a situation with 'and'; it says nothing about the state."""
ADDED = 0.15
"""How often a situation has such an addition."""

DISTRACTOR_SITUATIONS = [
    ["the date", "the map", "the tone", "the font", "the list"],
    ["is", "looks", "seems"],
    ["old", "small", "rude", "blue", "long", "odd"],
]
DISTRACTOR_STRATEGIES = [["write", "keep", "count", "sort", "thank"], ["a note", "the lines", "calm", "the user", "the list"]]
DISTRACTOR_NAMES = ["Care", "Order", "Style"]

HELD_OUT_SHARE = 5
"""One paraphrase in this many never occurs in pretraining."""

EXTRA_WORDS = [
    "when",
    "and",
    "Case",
    ":",
    "answer",
    "tools",
    ",",
    "search",
    "visit",
    ".",
    "?",
    "What",
    "is",
    "the",
    "of",
    "need",
    "open",
    "see",
    "again",
    "check",
    "follow",
    "first",
    "trust",
    "found",
    "value",
    "no",
    "idea",
    "recall",
    "case",
    "page",
    "named",
    "results",
    "result",
    "1",
    "2",
    "3",
    "last",
    "step",
    "now",
    "hint",
    "notes",
    "results",
    "same",
    "call",
    "was",
    "made",
    "before",
    "many",
    "steps",
    "are",
    "done",
    "try",
    "other",
    "another",
    "points",
    "answers",
    "Guess",
    "Retry",
    "Other",
    "at",
    "once",
    "with",
    "that",
    "question",
    "all",
    "so",
    "idea",
]
"""Words outside the phrase grammar: templates of the environment, thoughts of the policy, headings."""


def state_of_mark(word: str) -> State:
    """The state in which the asked value stands under a mark, or in rows with a label."""
    return f"{'rows' if word in ROW_LABELS else 'mark'} {word}"


def paraphrases(slots: Sequence[Sequence[str]]) -> Iterator[str]:
    """Every choice of one phrase per slot."""
    for choice in itertools.product(*slots):
        yield " ".join(choice)


def is_held_out(phrase: str) -> bool:
    """True for the paraphrases that pretraining never shows: one in five, and all that the extractor writes."""
    return zlib.crc32(phrase.encode()) % HELD_OUT_SHARE == 0 or phrase in _extractor_phrases()


@lru_cache(maxsize=1)
def _extractor_phrases() -> frozenset[str]:
    from evolve_dag.experience.phrases import all_phrases

    return frozenset(all_phrases())


class PhraseBank:
    """Paraphrases of every situation and strategy, split into seen in pretraining and held out."""

    def __init__(self, *, held_out: bool) -> None:
        self.situations = {state: self._keep(slots, held_out) for state, slots in SITUATIONS.items()}
        self.situations |= {
            state_of_mark(word): self._keep([*MARK_SITUATION, [word]], held_out) for word in (*MARKS, *ROW_LABELS)
        }
        self.strategies = {move: self._keep(slots, held_out) for move, slots in STRATEGIES.items()}
        self._additions = self._keep(ADDITIONS, held_out)
        self._distractors = [list(paraphrases(DISTRACTOR_SITUATIONS)), list(paraphrases(DISTRACTOR_STRATEGIES))]

    @staticmethod
    def _keep(slots: Sequence[Sequence[str]], held_out: bool) -> list[str]:
        return [p for p in paraphrases(slots) if is_held_out(p) == held_out]

    def principle(self, state: State, move: Move, rng: Random) -> str:
        """One principle in a random paraphrase, in the form of METHOD (granularity)."""
        situation = rng.choice(self.situations[state])
        if rng.random() < ADDED:
            situation = f"{situation} and {rng.choice(self._additions)}"
        return f"{rng.choice(NAMES[move])}: when {situation}, {rng.choice(self.strategies[move])}."

    def distractor(self, rng: Random) -> str:
        """A principle about something that never happens in the pocket world."""
        situation, strategy = (rng.choice(bank) for bank in self._distractors)
        return f"{rng.choice(DISTRACTOR_NAMES)}: when {situation}, {strategy}."


def vocabulary() -> list[str]:
    """All words of the language, sorted, each once."""
    words: set[str] = {*MARKS, *ROW_LABELS, *TOOLS, *map(str, range(10)), "entry"}
    words |= set(NAME_WORDS) | set(KINDS) | {a for attributes in KINDS.values() for a, _ in attributes} | set(EXTRA_WORDS)
    banks = [
        *SITUATIONS.values(),
        MARK_SITUATION,
        *STRATEGIES.values(),
        ADDITIONS,
        DISTRACTOR_SITUATIONS,
        DISTRACTOR_STRATEGIES,
    ]
    for slots in banks:
        for slot in slots:
            for phrase in slot:
                words.update(phrase.split())
    for names in [*NAMES.values(), DISTRACTOR_NAMES]:
        words.update(names)
    for phrase in _extractor_phrases():
        words.update(phrase.split())
    return sorted(words)
