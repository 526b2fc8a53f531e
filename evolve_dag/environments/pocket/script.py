"""The scripted agent of pretraining: transcripts of episodes in worlds that no task is about.

The policy that ships is pretrained on these transcripts, as a language model is on text: they show the tool grammar,
a *mediocre* habit in every state (:data:`HABIT`, which is why the base policy succeeds on about one task in four), and
that an experience item which stands in the context and fits the state is followed. What the loop later finds out,
namely which move pays in which state, is nowhere in here as a preference: the items in pretraining are drawn from good
and bad moves alike.

The agent is told the truth by the world; it shares no code with the extractor or the selectors.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from random import Random

from evolve_dag.environments.pocket.language import (
    GROUPS,
    KINDS,
    NAME_WORDS,
    SYSTEM_PROMPT,
    Move,
    PhraseBank,
    State,
)
from evolve_dag.environments.pocket.world import MINIMUM_MATCH, RESULTS, Entity, Question, World, title
from evolve_dag.experience.extraction.instance import case_text
from evolve_dag.plain import LAST_STEP
from evolve_dag.records import Message

MAX_STEPS = 12

MOVES: Mapping[State, Sequence[Move]] = {
    "start": ["search_short", "search_long"],
    "empty": ["search_short", "search_long", "answer"],
    "one": ["visit_match", "snippet"],
    "several": ["visit_match", "visit_first", "snippet"],
    "redirect": ["visit_link", "answer", "search_short"],
    "part": ["search_short", "search_long", "answer"],
    "asked": ["answer", "search_short"],
    "wrong": ["visit_match", "answer", "search_short"],
    "missing": ["search_short", "visit_match", "answer"],
}
"""What can be done in each state; items in pretraining recommend any of these."""

GROUP_MOVES: Mapping[State, Sequence[Move]] = {"listing": ["visit_match", "snippet"], "page": ["answer", "search_short"]}
"""The same for situations that cover several states."""

Advice = tuple[Sequence[State], Move]
"""What one item recommends: a move in any of some states."""

HABIT: Mapping[State, Mapping[Move, float]] = {
    "start": {"search_short": 0.55, "search_long": 0.45},
    "empty": {"search_short": 0.50, "search_long": 0.20, "answer": 0.30},
    "one": {"visit_match": 0.50, "snippet": 0.50},
    "several": {"visit_match": 0.40, "visit_first": 0.30, "snippet": 0.30},
    "redirect": {"visit_link": 0.55, "answer": 0.30, "search_short": 0.15},
    "part": {"search_short": 0.35, "search_long": 0.22, "answer": 0.43},
    "asked": {"answer": 0.75, "search_short": 0.25},
    "wrong": {"visit_match": 0.50, "answer": 0.40, "search_short": 0.10},
    "missing": {"search_short": 0.50, "visit_match": 0.15, "answer": 0.35},
}
"""How often the agent makes each move when no item in its context speaks about the state."""

OBEDIENCE = 0.97
"""Chance that an item about the current state is followed."""
RECALL = 0.93
"""Chance that the case of the very question is recalled when it stands in the context."""
NEAR_MISS = 0.1
"""Chance that a case of another question is about the same entity."""
SLIP = 0.05
"""Chance that a name is copied wrongly, so that reading it again is known; a slip itself is never a target."""


class FastSearch:
    """What :class:`~evolve_dag.environments.corpus.CorpusSearch` answers over a world, without a database.

    Pretraining asks it some hundred thousand times; tests hold it equal to the real one.
    """

    def __init__(self, world: World) -> None:
        self._pages = {page.title.lower(): page for page in world.pages()}
        self._by_word: dict[str, list[str]] = {}
        for key in self._pages:
            for word in set(key.split()):
                self._by_word.setdefault(word, []).append(key)

    def search(self, query: str) -> tuple[str, list[tuple[str, str]]]:
        """Observation, and the listed (title, snippet) pairs."""
        words = set(query.lower().split())
        counts: dict[str, int] = {}
        for word in words:
            for key in self._by_word.get(word, ()):
                counts[key] = counts.get(key, 0) + 1
        need = MINIMUM_MATCH * len(words)
        keys = sorted((k for k, n in counts.items() if n >= need), key=lambda k: (-counts[k], zlib.crc32(k.encode())))[:RESULTS]
        if not keys:
            return "no results", []
        listed = [(self._pages[k].title, self._snippet(self._pages[k].indexed or "", words)) for k in keys]
        lines = "\n".join(f"{n}. {t}: {s}" for n, (t, s) in enumerate(listed, 1))
        return f"{len(listed)} result{'s' if len(listed) > 1 else ''}\n{lines}", listed

    @staticmethod
    def _snippet(text: str, words: set[str]) -> str:
        lines = text.split("\n")
        overlap = [len(words & set(line.replace(":", "").lower().split())) for line in lines]
        return lines[overlap.index(max(overlap))]

    def visit(self, name: str) -> str:
        """Observation."""
        page = self._pages.get(" ".join(name.lower().split()))
        if page is None:
            return f"no page named {name}"
        return f"page: {page.title}\n" + (f"see: {page.redirect}" if page.redirect else page.text)


@dataclass
class ScriptedAgent:
    """Plays one question; knows the truth about where it stands."""

    world: World
    question: Question
    search: FastSearch
    state: State = "start"
    hop: int = 0
    target: Entity = ("", "")
    listed: list[tuple[str, str]] = field(default_factory=list)
    shown: dict[str, Entity] = field(default_factory=dict)
    link: Entity = ("", "")

    def __post_init__(self) -> None:
        self.target = self.question.reference

    @property
    def attribute(self) -> str:
        """Attribute wanted at this hop."""
        return self.question.relations[self.hop]

    def _listed_value(self) -> Entity:
        """Value in the listing's line about the target, else in the first line."""
        line = next((s for t, s in self.listed if t == title(self.target)), self.listed[0][1])
        kind, _, name = line.partition(": ")[2].partition(" ")
        return kind, name

    def best_guess(self) -> tuple[str, str]:
        """(thought, answer) when an answer is demanded."""
        if self.state in ("part", "asked"):
            return "found value", self.shown[self.attribute][1]
        if self.state in ("one", "several"):
            return "trust value", self._listed_value()[1]
        if self.state == "wrong":
            return "no idea", next(iter(self.shown.values()))[1]
        return "no idea", (self.link if self.state == "redirect" else self.target)[1]

    def act(self, move: Move) -> tuple[str, str, str]:
        """(thought, tool or 'answer', argument) of ``move``; advances to the next hop where the move implies it."""
        if move == "answer":
            thought, answer = self.best_guess()
            return thought, "answer", answer
        if move == "snippet":
            value = self._listed_value()
            if self.hop == len(self.question.relations) - 1:
                return "trust value", "answer", value[1]
            self.hop, self.target = self.hop + 1, value
            return f"trust value need {self._need()}", "search", f"{value[1]} {self.attribute}"
        if move in ("search_short", "search_long"):
            if self.state == "part":
                self.hop, self.target = self.hop + 1, self.shown[self.attribute]
            if move == "search_long":
                chain = " of the ".join(reversed(self.question.relations[self.hop :]))
                return "check the question", "search", f"{chain} of {title(self.target)}"
            again = "check again " if self.state in ("asked", "redirect", "missing") else ""
            return f"{again}need {self._need()}", "search", f"{self.target[1]} {self.attribute}"
        if move == "visit_match":
            return f"open {self.target[0]}", "visit", title(self.target)
        if move == "visit_first":
            return "open first", "visit", self.listed[0][0]
        return "follow page", "visit", title(self.link)

    def _need(self) -> str:
        return f"{self.attribute} of {title(self.target)}"

    def observe(self, tool: str, argument: str) -> str:
        """Run the call and move to the state that it leads to."""
        if tool == "search":
            observation, self.listed = self.search.search(argument)
            same = sum(t.split(" ", 1)[1] == self.target[1] for t, _ in self.listed)
            self.state = "empty" if not self.listed else "several" if same > 1 else "one"
            return observation
        observation = self.search.visit(argument)
        kind, _, name = argument.partition(" ")
        entity = (kind, name)
        if entity in self.world.alias_of:
            self.state, self.link = "redirect", self.world.alias_of[entity]
        elif entity in self.world.facts:
            if self.state == "redirect" and entity == self.link:
                self.target = entity
            self.shown = self.world.facts[entity]
            last = self.hop == len(self.question.relations) - 1
            self.state = "wrong" if self.attribute not in self.shown else "asked" if last else "part"
        else:
            self.state = "missing"
        return observation


@dataclass(frozen=True, slots=True)
class Transcript:
    """One pretraining document."""

    messages: tuple[Message, ...]
    targets: tuple[bool, ...]
    """Per message: does the loss see it? True for actions that are no slip."""
    mode: str
    """What stood in the context: ``none``, ``step``, ``global`` or ``case``."""
    success: bool


SIMPLE_MODES = {"none": 0.65, "case": 0.35}
"""The same at the start of training, when the tool grammar and copying are learned."""
MODES = {"none": 0.17, "step": 0.33, "global": 0.2, "case": 0.3}
"""What stands in the context of a pretraining transcript, and how often."""


def action_text(thought: str, tool: str, argument: str) -> str:
    """The action as the policy writes it: thought, then a Qwen3 tool call or the final answer."""
    if tool == "answer":
        return f"{thought}<answer>{argument}</answer>"
    key = "query" if tool == "search" else "page"
    return f'{thought}\n<tool_call>\n{{"name": "{tool}", "arguments": {{"{key}": "{argument}"}}}}\n</tool_call>'


def recalled(question: Question) -> str:
    """The thought that quotes the case of the very question, which makes recalling a matter of copying."""
    return f"case {title(question.reference)}? answer {question.answer}"


def habitual(state: State, advice: Sequence[Advice], rng: Random) -> Move:
    """The next move: advice about this state is mostly followed, else habit decides."""
    fitting = [move for states, move in advice if state in states]
    if fitting and rng.random() < OBEDIENCE:
        return rng.choice(fitting)
    habit = HABIT[state]
    return rng.choices(list(habit), list(habit.values()))[0]


class TranscriptWriter:
    """Writes pretraining transcripts of one world after another."""

    def __init__(self, rng: Random, bank: PhraseBank, modes: Mapping[str, float] = MODES) -> None:
        self.rng, self.bank, self.modes = rng, bank, modes

    def advice(self, count: int) -> list[tuple[str, Advice | None]]:
        """``count`` random items: principles on any state with any of its moves, and distractors."""
        out: list[tuple[str, Advice | None]] = []
        for _ in range(count):
            if self.rng.random() < 0.2:
                out.append((self.bank.distractor(self.rng), None))
            else:
                out.append(self._item(self.rng.choice(list(MOVES))))
        return out

    def _item(self, state: State) -> tuple[str, Advice]:
        """A principle about ``state``, or about a group of states that holds it."""
        group = next((g for g, states in GROUPS.items() if state in states), None)
        if group is not None and self.rng.random() < 0.3:
            move = self.rng.choice(GROUP_MOVES[group])
            return self.bank.principle(group, move, self.rng), (GROUPS[group], move)
        move = self.rng.choice(MOVES[state])
        return self.bank.principle(state, move, self.rng), ((state,), move)

    def _pool(self) -> list[tuple[str, Advice | None]]:
        """Items of a global context: at most one per state half of the time, as a real pool has it."""
        if self.rng.random() < 0.5:
            return self.advice(self.rng.randint(1, 12))
        states = self.rng.sample(list(MOVES), self.rng.randint(2, len(MOVES)))
        return [*map(self._item, states), *self.advice(self.rng.randint(0, 2))]

    def _cases(self, world: World, question: Question, limit: int) -> tuple[list[str], bool]:
        """Cases of other questions, some of them near misses, and in half of the draws that of the question itself."""
        match = self.rng.random() < 0.5
        most = self.rng.choice((1, 1, 2, limit))  # mostly few: one case teaches matching best
        count = self.rng.randint(1, most) - match
        others: list[str] = []
        while len(others) < count:
            other = world.question(self.rng)
            if self.rng.random() < NEAR_MISS:  # a near miss: same entity, another relation (or the other way round)
                attributes = [a for a, _ in KINDS[world.resolve(question.reference)[0]]]
                chain = (self.rng.choice(attributes),)
                if chain == question.relations:
                    continue
                page = world.resolve(question.reference)
                other = Question(question.reference, chain, world.facts[page][chain[0]][1])
            others.append(case_text(other.text, other.answer))
        if match:
            others.insert(self.rng.randint(0, len(others)), case_text(question.text, question.answer))
        return others, match

    def write(self, world: World, search: FastSearch) -> Transcript:
        """One transcript."""
        rng = self.rng
        question = world.question(rng)
        mode = rng.choices(list(self.modes), list(self.modes.values()))[0]
        agent = ScriptedAgent(world, question, search)
        limit = rng.randint(1, 6) if rng.random() < 0.15 else MAX_STEPS
        notes: list[str] = []
        standing: list[Advice] = []
        cases: list[str] = []
        case_step, match = -1, False
        if mode == "global":
            pool = self._pool()
            notes, standing = [t for t, _ in pool], [a for _, a in pool if a]
        elif mode == "case":
            in_notes = rng.random() < 0.5
            cases, match = self._cases(world, question, 12 if in_notes else 3)
            if in_notes:
                notes, case_step = cases, 0
            else:
                case_step = 0 if rng.random() < 0.7 else rng.randint(0, 3)
        system = SYSTEM_PROMPT + ("\nnotes:\n" + "\n".join(notes) if notes else "")
        messages, targets = [Message("system", system)], [False]
        content, role = question.text, "user"
        success = False
        for step in range(limit):
            last = step == limit - 1
            if last:
                content = f"{content}\n{LAST_STEP}"
            hints: list[tuple[str, Advice | None]] = []
            if mode == "step" and rng.random() < 0.8:
                hints = self.advice(rng.randint(0, 2))
                if rng.random() < 0.75 or not hints:
                    hints.insert(rng.randint(0, len(hints)), self._item(agent.state))
            texts = [t for t, _ in hints]
            if cases and not notes and step == case_step:
                texts = cases
            if texts:
                content = f"{content}\nhint:\n" + "\n".join(texts)
            messages.append(Message(role, content))  # type: ignore[arg-type]
            targets.append(False)
            advice = standing + [a for _, a in hints if a]
            slip = False
            if match and step == case_step and rng.random() < RECALL:
                thought, tool, argument = recalled(question), "answer", question.answer
            elif last:
                thought, argument = agent.best_guess()
                tool = "answer"
            else:
                thought, tool, argument = agent.act(habitual(agent.state, advice, rng))
                if tool != "answer" and rng.random() < SLIP:
                    (thought, argument), slip = self._misspell(thought, argument), True
            messages.append(Message("assistant", action_text(thought, tool, argument)))
            targets.append(not slip)
            if tool == "answer":
                success = argument == question.answer
                break
            content, role = agent.observe(tool, argument), "tool"
        return Transcript(tuple(messages), tuple(targets), mode, success)

    def _misspell(self, thought: str, argument: str) -> tuple[str, str]:
        """Thought and argument with one word of the name replaced in both, as the policy itself errs."""
        wrong = self.rng.choice([w for w in argument.split() if w in NAME_WORDS])
        right = self.rng.choice(NAME_WORDS)
        return thought.replace(wrong, right), argument.replace(wrong, right)


def transcripts(
    rng: Random, world_seeds: Iterator[int], *, per_world: int = 40, modes: Mapping[str, float] = MODES
) -> Iterator[Transcript]:
    """Endless transcripts, ``per_world`` from each world; paraphrases that are held out never occur."""
    writer = TranscriptWriter(rng, PhraseBank(held_out=False), modes)
    for seed in world_seeds:
        world = World(seed)
        search = FastSearch(world)
        for _ in range(per_world):
            yield writer.write(world, search)
