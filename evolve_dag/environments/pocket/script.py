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
from dataclasses import dataclass, field, replace
from random import Random

from evolve_dag.environments.pocket.language import (
    CORPUS_PROMPT,
    GROUPS,
    KINDS,
    MARKS,
    NAME_WORDS,
    ROW_LABELS,
    ROW_MOVES,
    SYSTEM_PROMPT,
    TOOLS,
    Move,
    PhraseBank,
    State,
    state_of_mark,
)
from evolve_dag.environments.pocket.world import LAW, MINIMUM_MATCH, RESULTS, Entity, Law, Question, World, other_law, title
from evolve_dag.experience.extraction.instance import CASE, case_text
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

MARK_MOVES: Sequence[Move] = (*TOOLS, "answer")
"""What can be done where the asked value stands under a mark."""


def moves(state: State) -> Sequence[Move]:
    """What can be done in ``state``."""
    kind = state.split()[0]
    return MARK_MOVES if kind == "mark" else tuple(ROW_MOVES) if kind == "rows" else MOVES[state]


def taught(state: State) -> Sequence[Move]:
    """What items of pretraining may recommend in ``state``: all but what the worlds of tasks ask for there."""
    word = state.split()[-1]
    unseen = LAW.row if state == state_of_mark(LAW.label) else LAW.tools.get(word)
    return [move for move in moves(state) if move != unseen]


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
    "mark": {**dict.fromkeys(TOOLS, 0.17), "answer": 0.15},
    "rows": {"row_first": 0.40, "row_last": 0.20, "row_highest": 0.20, "row_lowest": 0.20},
}
"""How often the agent makes each move when no item in its context speaks about the state."""

OBEDIENCE = 0.97
"""Chance that an item about the current state is followed."""
RECALL = 0.93
"""Chance that the case of the very question is recalled when it stands in the context."""
SLIP = 0.05
"""Chance that a name is copied wrongly, so that reading it again is known; a slip itself is never a target."""


class FastSearch:
    """What :class:`~evolve_dag.environments.corpus.CorpusSearch` answers over a world, without a database.

    Pretraining asks it some hundred thousand times; tests hold it equal to the real one.

    Args:
        world: what is searched.
        lenient: every tool shows what lies under a mark, so that transcripts of a mediocre agent get to deep layers. Which
            tool is right cannot be learned from such a world.
    """

    def __init__(self, world: World, *, lenient: bool = False) -> None:
        self._world, self._lenient = world, lenient
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

    def consult(self, tool: str, name: str) -> str:
        """Observation."""
        if self._lenient and (found := self._world.entries.get(name)):
            tool = self._world.law.tools[self._world.law.marks[found[2]]]
        return self._world.consult(tool, name)


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
    view: str = ""
    """What stands behind the asked attribute, on the page or in the entry that was read last."""

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
        if self.state == "part" and self.attribute in self.shown:  # after a slip the page may be another one's
            return "found value", self.shown[self.attribute][1]
        if self.state == "asked":
            return "found value", _value(self.view)
        if self.state.startswith("mark"):
            return "trust value", _value(self.view)
        if self.state.startswith("rows"):
            return self._row("row_first")
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
        if move in TOOLS:
            return f"entry {self.state.split()[1]}", move, _value(self.view)
        if move in ROW_MOVES:
            thought, answer = self._row(move)
            return thought, "answer", answer
        if move == "visit_match":
            return f"open {self.target[0]}", "visit", title(self.target)
        if move == "visit_first":
            return "open first", "visit", self.listed[0][0]
        return "follow page", "visit", title(self.link)

    def _row(self, move: Move) -> tuple[str, str]:
        """(thought, answer) for the row that ``move`` takes; the thought names its number, so that the value is copied."""
        rows = [line.removeprefix(f"{self.attribute}: ").split(" ", 2) for line in self.view.split("\n")]
        label, number, value = rows[ROW_MOVES[move]([int(number) for _, number, _ in rows])]
        return f"{label} {number}", _value(value)

    def _need(self) -> str:
        return f"{self.attribute} of {title(self.target)}"

    def observe(self, tool: str, argument: str) -> str:
        """Run the call and move to the state that it leads to."""
        if tool == "search":
            observation, self.listed = self.search.search(argument)
            same = sum(t.split(" ", 1)[1] == self.target[1] for t, _ in self.listed)
            self.state = "empty" if not self.listed else "several" if same > 1 else "one"
            return observation
        if tool in TOOLS:
            observation = self.search.consult(tool, argument)
            _, _, shown = observation.partition("\n")
            if not shown:
                self.state = "missing"
            elif argument != _value(self.view):  # a slip that is the name of another entry
                attribute, _, view = shown.split("\n")[0].partition(": ")
                self.state, self.shown = "wrong", {attribute: ("", _value(view))}
            else:
                self._see(shown.removeprefix(f"{self.attribute}: "))
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
            if self.attribute not in self.shown:
                self.state = "wrong"
            elif self.hop < len(self.question.relations) - 1:
                self.state = "part"
            else:
                self._see(self.world.views[entity, self.attribute][0])
        else:
            self.state = "missing"
        return observation

    def _see(self, view: str) -> None:
        """Stand before what is said of the asked attribute."""
        self.view = view
        words = view.split("\n")[0].split()
        self.state = (
            state_of_mark(words[0]) if words[0] in ROW_LABELS else state_of_mark(words[3]) if len(words) > 3 else "asked"
        )


def _value(view: str) -> str:
    """The name in 'city Beli Kura old' or 'city Beli Kura'."""
    return " ".join(view.split()[1:3])


@dataclass(frozen=True, slots=True)
class Transcript:
    """One pretraining document."""

    messages: tuple[Message, ...]
    targets: tuple[bool, ...]
    """Per message: does the loss see it? True for actions that are no slip."""
    mode: str
    """What stood in the context: ``none``, ``step``, ``global`` or ``case``."""
    success: bool


LENIENT_SHARE = 0.8
"""Share of pretraining's worlds in which every tool shows what lies under a mark."""


@dataclass(frozen=True, slots=True)
class Curriculum:
    """What a stage of pretraining dwells on."""

    skipped: float = 0.55
    """Share of the transcripts whose beginning is played well and not learned, since habit seldom gets to a mark."""
    layers: tuple[int, ...] = (0, 0, 1, 2, 3, 5, 5, 5, 5)
    """Layers that such a beginning passes as well: one is drawn."""
    told: float = 0.6
    """Chance that an item about the very state stands there in mode ``step``, at marks and rows."""
    near_miss: float = 0.1
    """Chance that a case of another question is about the same entity."""


DWELL_ON_MARKS = Curriculum(skipped=0.75, layers=(0, 0, 0, 5), told=0.88)
"""Marks and rows are met often, mostly with an item that says what to do."""
DECIDE_ON_CASES = Curriculum(skipped=0.0, near_miss=0.3)
"""Nothing is played for the agent, so that every decision whether a case is that of the question is learned."""

WORLD_DEPTHS = (0.28, 0.12, 0.12, 0.12, 0.12, 0.12, 0.12)
"""Shares of depths among the facts of a pretraining world; the last is rows."""
DEPTHS = (0.28, 0.08, 0.08, 0.08, 0.08, 0.08, 0.32)
"""Shares of depths in the questions of pretraining."""
SKILL: Mapping[State, Move] = {
    **dict.fromkeys(("start", "empty", "part", "missing"), "search_short"),
    **dict.fromkeys(("one", "several", "wrong"), "visit_match"),
    "redirect": "visit_link",
}
"""The moves of such a beginning."""
CORPUS_SHARE = 0.1
"""Share of the transcripts over a corpus without entries: two tools, and facts without layers."""
SIMPLE_MODES = {"none": 0.9, "case": 0.1}
"""The same at the start of training, when the tool grammar and copying are learned."""
MODES = {"none": 0.2, "step": 0.46, "global": 0.24, "case": 0.1}
"""What stands in the context of a pretraining transcript, and how often."""


def action_text(thought: str, tool: str, argument: str) -> str:
    """The action as the policy writes it: thought, then a Qwen3 tool call or the final answer."""
    if tool == "answer":
        return f"{thought}<answer>{argument}</answer>"
    key = "query" if tool == "search" else "page" if tool == "visit" else "entry"
    return f'{thought}\n<tool_call>\n{{"name": "{tool}", "arguments": {{"{key}": "{argument}"}}}}\n</tool_call>'


def recalled(question: Question) -> str:
    """The thought that quotes the case of the very question, which makes recalling a matter of copying."""
    return f"case {title(question.reference)}? answer {question.answer}"


def habitual(state: State, advice: Sequence[Advice], rng: Random) -> Move:
    """The next move: advice about this state is mostly followed, else habit decides."""
    fitting = [move for states, move in advice if state in states]
    if fitting and rng.random() < OBEDIENCE:
        return rng.choice(fitting)
    habit = HABIT[state if state in HABIT else state.split()[0]]
    return rng.choices(list(habit), list(habit.values()))[0]


class TranscriptWriter:
    """Writes pretraining transcripts of one world after another."""

    def __init__(
        self, rng: Random, bank: PhraseBank, modes: Mapping[str, float] = MODES, curriculum: Curriculum | None = None
    ) -> None:
        self.rng, self.bank, self.modes, self.curriculum = rng, bank, modes, curriculum or Curriculum()

    def advice(self, count: int, states: Sequence[State]) -> list[tuple[str, Advice | None]]:
        """``count`` random items: principles on any of ``states`` with any of its moves, and distractors."""
        out: list[tuple[str, Advice | None]] = []
        for _ in range(count):
            if self.rng.random() < 0.2:
                out.append((self.bank.distractor(self.rng), None))
            else:
                out.append(self._item(self.rng.choice(states)))
        return out

    def _states(self, law: Law) -> list[State]:
        """States that items speak about in a world with this law: mostly those that occur in it."""
        words = [*law.marks, law.label, *self.rng.sample([*MARKS, *ROW_LABELS], 3)]
        return [*MOVES, *dict.fromkeys(map(state_of_mark, words))]

    def _item(self, state: State) -> tuple[str, Advice]:
        """A principle about ``state``, or about a group of states that holds it."""
        group = next((g for g, states in GROUPS.items() if state in states), None)
        if group is not None and self.rng.random() < 0.3:
            move = self.rng.choice(GROUP_MOVES[group])
            return self.bank.principle(group, move, self.rng), (GROUPS[group], move)
        move = self.rng.choice(taught(state))
        return self.bank.principle(state, move, self.rng), ((state,), move)

    def _pool(self, states: Sequence[State]) -> list[tuple[str, Advice | None]]:
        """Items of a global context: at most one per state half of the time, as a real pool has it."""
        if self.rng.random() < 0.5:
            return self.advice(self.rng.randint(1, 12), states)
        chosen = self.rng.sample(states, self.rng.randint(2, min(14, len(states))))
        return [*map(self._item, chosen), *self.advice(self.rng.randint(0, 2), states)]

    def _hints(self, state: State, states: Sequence[State]) -> list[tuple[str, Advice | None]]:
        """Items of one step, mostly with one about the state."""
        told = 0.6 if state in MOVES else self.curriculum.told
        about = self.rng.random() < told
        if not about and self.rng.random() < 0.5:
            return []
        hints = self.advice(self.rng.randint(0, 2), states)
        if about or not hints:
            hints.insert(self.rng.randint(0, len(hints)), self._item(state))
        return hints

    def _cases(self, world: World, question: Question, limit: int) -> tuple[list[str], bool]:
        """Cases of other questions, some of them near misses, and in half of the draws that of the question itself."""
        match = self.rng.random() < 0.5
        most = self.rng.choice((1, 1, 2, limit))  # mostly few: one case teaches matching best
        count = self.rng.randint(1, most) - match
        others: list[str] = []
        while len(others) < count:
            other = world.question(self.rng)
            if self.rng.random() < self.curriculum.near_miss:  # same entity, another relation (or the other way round)
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
        plain = rng.random() < CORPUS_SHARE
        question = world.question(rng, depth=0 if plain else rng.choices(range(len(DEPTHS)), DEPTHS)[0])
        states = self._states(world.law)
        mode = rng.choices(list(self.modes), list(self.modes.values()))[0]
        agent = ScriptedAgent(world, question, search)
        limit = rng.randint(1, 6) if rng.random() < 0.15 else MAX_STEPS
        notes: list[str] = []
        standing: list[Advice] = []
        cases: list[str] = []
        case_step, match = -1, False
        if mode == "global":
            pool = self._pool(states)
            notes, standing = [t for t, _ in pool], [a for _, a in pool if a]
        elif mode == "case":
            in_notes = rng.random() < 0.5
            cases, match = self._cases(world, question, 12 if in_notes else 3)
            if in_notes:
                notes, case_step = cases, 0
            else:
                case_step = 0 if rng.random() < 0.7 else rng.randint(0, 3)
        system = (CORPUS_PROMPT if plain else SYSTEM_PROMPT) + ("\nnotes:\n" + "\n".join(notes) if notes else "")
        messages, targets = [Message("system", system)], [False]
        content, role = question.text, "user"
        success = False
        skipped = rng.choice(self.curriculum.layers) if rng.random() < self.curriculum.skipped else -1
        for step in range(limit):
            last = step == limit - 1
            if last:
                content = f"{content}\n{LAST_STEP}"
            hints: list[tuple[str, Advice | None]] = []
            if mode == "step":
                hints = self._hints(agent.state, states)
            texts = [t for t, _ in hints]
            if cases and not notes and step == case_step:
                texts = cases
            if texts:
                content = f"{content}\nhint:\n" + "\n".join(texts)
            messages.append(Message(role, content))  # type: ignore[arg-type]
            targets.append(False)
            advice = standing + [a for _, a in hints if a]
            slip = False
            skip = agent.state in SKILL and skipped >= 0
            if agent.state.startswith("mark"):
                skip, skipped = skipped > 0, skipped - 1
            if match and step == case_step and rng.random() < RECALL:
                thought, tool, argument = recalled(question), "answer", question.answer
            elif last:
                thought, argument = agent.best_guess()
                tool = "answer"
            elif skip:
                slip = True
                thought, tool, argument = agent.act(SKILL.get(agent.state) or rng.choice(TOOLS))
            else:
                skipped = -1
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

    def decision(self, world: World, search: FastSearch) -> Transcript:
        """A transcript that ends with the first action behind cases: recalling the right one, or whatever else is done where
        none is. Short ones show more of them: whole episodes with cases hold one such decision in some 400 tokens."""
        while True:
            transcript = self.write(world, search)
            read, end = False, 0
            for place, message in enumerate(transcript.messages):
                read = read or (message.role != "assistant" and CASE in message.content)
                if read and message.role == "assistant":
                    end = place + 1
                    break
            if end and transcript.targets[end - 1]:
                return replace(transcript, messages=transcript.messages[:end], targets=transcript.targets[:end])

    def _misspell(self, thought: str, argument: str) -> tuple[str, str]:
        """Thought and argument with one word of the name replaced in both, as the policy itself errs."""
        wrong = self.rng.choice([w for w in argument.split() if w in NAME_WORDS])
        right = self.rng.choice(NAME_WORDS)
        return thought.replace(wrong, right), argument.replace(wrong, right)


def transcripts(
    rng: Random,
    world_seeds: Iterator[int],
    *,
    per_world: int = 40,
    modes: Mapping[str, float] = MODES,
    curriculum: Curriculum | None = None,
    decisions: float = 0.0,
) -> Iterator[Transcript]:
    """Endless transcripts, ``per_world`` from each world; paraphrases that are held out never occur.

    Args:
        decisions: share of them that end with the decision whether a case in the context is that of the question.
    """
    bank = PhraseBank(held_out=False)
    writer = TranscriptWriter(rng, bank, modes, curriculum)
    deciding = TranscriptWriter(rng, bank, {"case": 1.0}, DECIDE_ON_CASES)
    for seed in world_seeds:
        world = World(seed, law=other_law(Random(seed)), depths=WORLD_DEPTHS)
        search = FastSearch(world, lenient=rng.random() < LENIENT_SHARE)
        for _ in range(per_world):
            yield deciding.decision(world, search) if decisions and rng.random() < decisions else writer.write(world, search)
