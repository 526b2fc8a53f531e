"""Generator of pocket worlds: a closed corpus about invented entities, and questions of one to three hops.

A world is a pure function of its seed. It holds what makes searching hard for a real agent, in small:
stale snippets (the search index saw an older page), pages that share a name, titles that only point to another
page, queries that find nothing, and pages that do not exist.

And it has depth (:class:`Law`). What a page says of a fact may be *marked*: outdated, disputed, coded... Each mark
asks for one tool, which shows the fact one layer further in, under the next mark; every other tool answers too, with
a value that looks as good and is wrong. The marks come in one order, so that a policy meets the second only after it
has learned what the first asks for. At the bottom lies the value, or rows of it, of which one is right.

Seeds below :data:`PRETRAINING_SEEDS` are for tasks (training, development, held-out); pretraining draws its worlds
from the seeds above, so no policy has seen a world that it is asked about.
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from random import Random

from evolve_dag.environments.corpus import Page
from evolve_dag.environments.pocket.language import (
    KINDS,
    MARKS,
    NAME_WORDS,
    ROW_LABELS,
    ROW_MOVES,
    TOOLS,
)
from evolve_dag.errors import DataError
from evolve_dag.records import Task

PRETRAINING_SEEDS = 1_000_000
"""First world seed that pretraining may use."""

Entity = tuple[str, str]
"""(kind, name); its page's title is the two joined by a blank."""

COUNTS = {"person": 70, "city": 50, "river": 30, "firm": 40, "book": 30}
SHARED_NAME = 0.45
"""Chance that a new entity takes the name of one of another kind."""
ALIAS = 0.35
"""Chance that an entity has a second title that only points to its page."""
ALIAS_REFERENCE = 0.5
"""Chance that a page or a question names such an entity by its second title."""
STALE = 0.7
"""Chance that the search index holds an outdated value of an attribute."""
HOPS = ((1, 0.6), (2, 0.4))
"""Hops of a question and their shares."""
DEPTHS = (0.25, 0.15, 0.15, 0.15, 0.15, 0.15)
"""Share of the questions (and of the facts) at each depth: marks between the page and the value. One more depth, after all
marks, would be rows: the policy that ships does not read them (model card), so no task has them."""
ROWS = 3
"""Rows at the bottom of the deepest facts."""
RESULTS = 3
MINIMUM_MATCH = 0.65
"""Share of a query's words that a title must hold: a name and an attribute find the name's pages, a whole
question finds nothing."""


@dataclass(frozen=True, slots=True)
class Law:
    """What the marks of a world ask for. All worlds of tasks share :data:`LAW`; pretraining draws another for each of its
    worlds, in which no mark asks for what it asks for here."""

    tools: Mapping[str, str]
    """Mark -> the tool that it asks for, outermost layer first."""
    label: str
    """Word before the number of each row at the bottom."""
    row: str
    """Which row is right: a key of :data:`~evolve_dag.environments.pocket.language.ROW_MOVES`."""

    @property
    def marks(self) -> tuple[str, ...]:
        """Outermost first."""
        return tuple(self.tools)


LAW = Law(dict(zip(MARKS[:5], TOOLS, strict=True)), ROW_LABELS[0], "row_highest")
"""The law of every world that tasks are about."""


def other_law(rng: Random) -> Law:
    """A law for a world of pretraining: marks, tools and rows drawn at random, without any pairing of :data:`LAW`."""
    while True:
        marks = rng.sample(MARKS, len(LAW.marks))
        tools = [rng.choice(TOOLS) for _ in marks]
        if not any(LAW.tools.get(mark) == tool for mark, tool in zip(marks, tools, strict=True)):
            break
    while True:
        label, row = rng.choice(ROW_LABELS), rng.choice(list(ROW_MOVES))
        if (label, row) != (LAW.label, LAW.row):
            return Law(dict(zip(marks, tools, strict=True)), label, row)


def title(entity: Entity) -> str:
    """Title of an entity's page."""
    return f"{entity[0]} {entity[1]}"


@dataclass(frozen=True, slots=True)
class Question:
    """A question with what the scripted policy of pretraining needs to know about it."""

    reference: Entity
    """Entity as the question names it (may be an alias)."""
    relations: tuple[str, ...]
    """Attributes along the chain, first hop first."""
    answer: str
    """Name of the value at the bottom of the last fact."""
    depth: int = 0
    """Layers between the last page and that value."""

    @property
    def text(self) -> str:
        """The question as the policy reads it: asked attribute first."""
        chain = "".join(f"the {relation} of " for relation in reversed(self.relations))
        return f"What is {chain}{title(self.reference)}?"


class World:
    """One pocket world."""

    def __init__(
        self, seed: int, counts: dict[str, int] | None = None, law: Law = LAW, depths: Sequence[float] = DEPTHS
    ) -> None:
        rng = Random(seed)
        self.seed = seed
        self.law = law
        self.depths = depths
        self.entities: dict[str, list[Entity]] = {kind: [] for kind in KINDS}
        self.alias_of: dict[Entity, Entity] = {}
        """Alias -> the entity that it points to."""
        self._alias: dict[Entity, Entity] = {}
        self._kinds_by_name: dict[str, list[str]] = {}
        self._names: list[str] = []
        self.entries: dict[str, tuple[Entity, str, int]] = {}
        """Name that stands under a mark -> where it stands: entity, attribute, layer. No two are alike, and no entity
        bears one."""
        counts = counts or COUNTS
        order = [kind for kind in KINDS for _ in range(counts[kind])]
        rng.shuffle(order)
        for kind in order:
            self.entities[kind].append(self._new_entity(kind, rng))
        for kind in KINDS:
            for entity in self.entities[kind]:
                if rng.random() < ALIAS:
                    alias = self._new_entity(kind, rng)
                    self.alias_of[alias] = entity
                    self._alias[entity] = alias
        self.facts: dict[Entity, dict[str, Entity]] = {}
        """Entity -> attribute -> value, as the bottom of the fact names it."""
        self.stale: dict[Entity, dict[str, Entity]] = {}
        """The same as the search index saw it."""
        self.depth: dict[tuple[Entity, str], int] = {}
        """(entity, attribute) -> layers above the value."""
        self.views: dict[tuple[Entity, str], tuple[str, ...]] = {}
        """(entity, attribute) -> what stands behind the attribute, the page's view first, the bottom last; a view may
        have several lines."""
        for kind in KINDS:
            for entity in self.entities[kind]:
                facts, stale = {}, {}
                for attribute, value_kind in KINDS[kind]:
                    others = [e for e in self.entities[value_kind] if e != entity]
                    facts[attribute] = self._named(rng.choice(others), rng)
                    depth = rng.choices(range(len(depths)), depths)[0]
                    old = depth > 0 or rng.random() < STALE
                    stale[attribute] = self._named(rng.choice(others), rng) if old else facts[attribute]
                    self.depth[entity, attribute] = depth
                    self.views[entity, attribute] = self._views(entity, attribute, facts[attribute], depth, others, rng)
                self.facts[entity], self.stale[entity] = facts, stale

    def _views(
        self, entity: Entity, attribute: str, value: Entity, depth: int, others: list[Entity], rng: Random
    ) -> tuple[str, ...]:
        """The fact from the outside to its bottom. The name under a mark is the value of nothing."""
        wrong = [e for e in others if e[1] != value[1]]
        views = []
        for layer, mark in enumerate(self.law.marks[:depth]):
            name = self._new_name(rng)
            self.entries[name] = (entity, attribute, layer)
            views.append(f"{value[0]} {name} {mark}")
        if depth <= len(self.law.marks):
            return (*views, title(value))
        rows = rng.sample(range(1, 10), ROWS)
        right = ROW_MOVES[self.law.row](rows)
        values = [value if place == right else rng.choice(wrong) for place in range(ROWS)]
        lines = [f"{self.law.label} {n} {title(v)}" for n, v in zip(rows, values, strict=True)]
        return (*views, f"\n{attribute}: ".join(lines))

    def _new_entity(self, kind: str, rng: Random) -> Entity:
        if self._names and rng.random() < SHARED_NAME:
            for _ in range(5):
                name = rng.choice(self._names)
                if len(self._kinds_by_name[name]) == 1 and kind not in self._kinds_by_name[name]:
                    self._kinds_by_name[name].append(kind)
                    return kind, name
        name = self._new_name(rng)
        self._kinds_by_name[name] = [kind]
        self._names.append(name)
        return kind, name

    def _new_name(self, rng: Random) -> str:
        while True:
            name = " ".join(rng.sample(NAME_WORDS, 2))
            if {name, " ".join(reversed(name.split()))}.isdisjoint(self._kinds_by_name.keys() | self.entries.keys()):
                return name

    def _named(self, entity: Entity, rng: Random) -> Entity:
        return self._alias[entity] if entity in self._alias and rng.random() < ALIAS_REFERENCE else entity

    def resolve(self, entity: Entity) -> Entity:
        """The entity behind an alias, or the entity itself."""
        return self.alias_of.get(entity, entity)

    def question(self, rng: Random, hops: int | None = None, depth: int | None = None) -> Question:
        """One question; its chain never visits two pages of the same kind, and only its last fact has layers."""
        hops = hops or rng.choices([h for h, _ in HOPS], [share for _, share in HOPS])[0]
        if depth is None:
            depth = rng.choices(range(len(self.depths)), self.depths)[0]
        while True:
            kind = rng.choice(list(KINDS))
            current = self._named(rng.choice(self.entities[kind]), rng)
            reference, relations, visited = current, [], set()
            for hop in range(hops):
                page = self.resolve(current)
                visited.add(page[0])
                last = hop == hops - 1
                options = [
                    a
                    for a, value_kind in KINDS[page[0]]
                    if self.depth[page, a] == (depth if last else 0) and (last or value_kind not in visited)
                ]
                if not options:
                    break
                relations.append(rng.choice(options))
                current = self.facts[page][relations[-1]]
            else:
                return Question(reference, tuple(relations), current[1], depth)

    def pages(self) -> list[Page]:
        """Every page of the world, aliases included."""
        out = []
        for entity in self.facts:
            out.append(Page(title(entity), self.page_text(entity), indexed=_lines(self.stale[entity])))
        for alias, entity in self.alias_of.items():
            first, value = next(iter(self.stale[entity].items()))
            lines = _lines({first: value, **self.stale[entity]})
            out.append(Page(title(alias), "", indexed=lines, redirect=title(entity)))
        return out

    def page_text(self, entity: Entity) -> str:
        """What the entity's page says: of every fact the outermost view."""
        return "\n".join(f"{attribute}: {self.views[entity, attribute][0]}" for attribute in self.facts[entity])

    def consult(self, tool: str, name: str) -> str:
        """What ``tool`` answers about the name under a mark: the fact one layer further in when the mark asks for this tool,
        else a value that looks as good and is wrong (always the same one)."""
        found = self.entries.get(" ".join(name.split()))
        if found is None:
            return f"no entry named {' '.join(name.split())}"  # on one line: what was asked must not pass for what was read
        entity, attribute, layer = found
        if self.law.tools[self.law.marks[layer]] == tool:
            view = self.views[entity, attribute][layer + 1]
        else:
            value_kind = dict(KINDS[entity[0]])[attribute]
            wrong = [e for e in self.entities[value_kind] if e[1] != self.facts[entity][attribute][1]]
            view = title(wrong[zlib.crc32(f"{tool} {name}".encode()) % len(wrong)])
        return f"page: {attribute} of {title(entity)}\n{attribute}: {view}"

    def tasks(self, count: int, suite: str, seed: int = 0) -> list[Task]:
        """``count`` distinct questions of this world.

        Raises:
            DataError: it has fewer: some 1,400.
        """
        rng = Random(f"{self.seed}/{seed}/tasks")
        found: dict[str, Question] = {}
        attempts = 0
        while len(found) < count:
            attempts += 1
            if attempts > 50 * count:
                what = f"{suite}: pocket world {self.seed} has fewer than {count} distinct questions ({len(found)} were found)"
                raise DataError(what, "ask for some 1,400 at most: lower `count` of the split (of a study: `held_out`)")
            question = self.question(rng)
            found.setdefault(question.text, question)
        return [
            Task(
                id=f"{suite.rpartition('/')[2]}-{self.seed}-{n:04d}",
                question=q.text,
                answer=q.answer,
                suite=suite,
                metadata={"hops": str(len(q.relations)), "depth": str(q.depth)},
            )
            for n, q in enumerate(found.values())
        ]


def _lines(facts: dict[str, Entity]) -> str:
    return "\n".join(f"{attribute}: {title(value)}" for attribute, value in facts.items())
