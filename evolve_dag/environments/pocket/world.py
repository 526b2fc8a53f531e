"""Generator of pocket worlds: a closed corpus about invented entities, and questions of one to three hops.

A world is a pure function of its seed. It holds what makes searching hard for a real agent, in small:
stale snippets (the search index saw an older page), pages that share a name, titles that only point to another
page, queries that find nothing, and pages that do not exist.

Seeds below :data:`PRETRAINING_SEEDS` are for tasks (training, development, held-out); pretraining draws its worlds
from the seeds above, so no policy has seen a world that it is asked about.
"""

from __future__ import annotations

from dataclasses import dataclass
from random import Random

from evolve_dag.environments.corpus import CorpusSearch, Page
from evolve_dag.environments.pocket.language import KINDS, NAME_WORDS, SYSTEM_PROMPT
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
HOPS = ((1, 0.35), (2, 0.40), (3, 0.25))
"""Hops of a question and their shares."""
RESULTS = 3
MINIMUM_MATCH = 0.65
"""Share of a query's words that a title must hold: a name and an attribute find the name's pages, a whole
question finds nothing."""


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
    """Name of the value that the last page shows."""

    @property
    def text(self) -> str:
        """The question as the policy reads it: asked attribute first."""
        chain = "".join(f"the {relation} of " for relation in reversed(self.relations))
        return f"What is {chain}{title(self.reference)}?"


class World:
    """One pocket world."""

    def __init__(self, seed: int, counts: dict[str, int] | None = None) -> None:
        rng = Random(seed)
        self.seed = seed
        self.entities: dict[str, list[Entity]] = {kind: [] for kind in KINDS}
        self.alias_of: dict[Entity, Entity] = {}
        """Alias -> the entity that it points to."""
        self._alias: dict[Entity, Entity] = {}
        self._kinds_by_name: dict[str, list[str]] = {}
        self._names: list[str] = []
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
        """Entity -> attribute -> value as its page names it."""
        self.stale: dict[Entity, dict[str, Entity]] = {}
        """The same as the search index saw it."""
        for kind in KINDS:
            for entity in self.entities[kind]:
                facts, stale = {}, {}
                for attribute, value_kind in KINDS[kind]:
                    others = [e for e in self.entities[value_kind] if e != entity]
                    facts[attribute] = self._named(rng.choice(others), rng)
                    stale[attribute] = self._named(rng.choice(others), rng) if rng.random() < STALE else facts[attribute]
                self.facts[entity], self.stale[entity] = facts, stale

    def _new_entity(self, kind: str, rng: Random) -> Entity:
        if self._names and rng.random() < SHARED_NAME:
            for _ in range(5):
                name = rng.choice(self._names)
                if len(self._kinds_by_name[name]) == 1 and kind not in self._kinds_by_name[name]:
                    self._kinds_by_name[name].append(kind)
                    return kind, name
        while True:
            name = " ".join(rng.sample(NAME_WORDS, 2))
            if name not in self._kinds_by_name and " ".join(reversed(name.split())) not in self._kinds_by_name:
                self._kinds_by_name[name] = [kind]
                self._names.append(name)
                return kind, name

    def _named(self, entity: Entity, rng: Random) -> Entity:
        return self._alias[entity] if entity in self._alias and rng.random() < ALIAS_REFERENCE else entity

    def resolve(self, entity: Entity) -> Entity:
        """The entity behind an alias, or the entity itself."""
        return self.alias_of.get(entity, entity)

    def question(self, rng: Random, hops: int | None = None) -> Question:
        """One question; its chain never visits two pages of the same kind."""
        hops = hops or rng.choices([h for h, _ in HOPS], [share for _, share in HOPS])[0]
        while True:
            kind = rng.choice(list(KINDS))
            current = self._named(rng.choice(self.entities[kind]), rng)
            reference, relations, visited = current, [], set()
            for hop in range(hops):
                page = self.resolve(current)
                visited.add(page[0])
                last = hop == hops - 1
                options = [a for a, value_kind in KINDS[page[0]] if last or value_kind not in visited]
                if not options:
                    break
                relations.append(rng.choice(options))
                current = self.facts[page][relations[-1]]
            else:
                return Question(reference, tuple(relations), current[1])

    def pages(self) -> list[Page]:
        """Every page of the world, aliases included."""
        out = []
        for entity, facts in self.facts.items():
            out.append(Page(title(entity), _lines(facts), indexed=_lines(self.stale[entity])))
        for alias, entity in self.alias_of.items():
            first, value = next(iter(self.stale[entity].items()))
            lines = _lines({first: value, **self.stale[entity]})
            out.append(Page(title(alias), "", indexed=lines, redirect=title(entity)))
        return out

    def environment(self, results: int = RESULTS) -> CorpusSearch:
        """Search and visit over this world, by the same code as any corpus."""
        return CorpusSearch(
            self.pages(), results=results, text_weight=0.0, minimum_match=MINIMUM_MATCH, system_prompt=SYSTEM_PROMPT
        )

    def tasks(self, count: int, suite: str, seed: int = 0) -> list[Task]:
        """``count`` distinct questions of this world."""
        rng = Random(f"{self.seed}/{seed}/tasks")
        found: dict[str, Question] = {}
        attempts = 0
        while len(found) < count:
            attempts += 1
            if attempts > 50 * count:
                raise ValueError(f"pocket world {self.seed} has fewer than {count} distinct questions")
            question = self.question(rng)
            found.setdefault(question.text, question)
        return [
            Task(
                id=f"{suite.rpartition('/')[2]}-{self.seed}-{n:04d}",
                question=q.text,
                answer=q.answer,
                suite=suite,
                metadata={"hops": str(len(q.relations))},
            )
            for n, q in enumerate(found.values())
        ]


def _lines(facts: dict[str, Entity]) -> str:
    return "\n".join(f"{attribute}: {title(value)}" for attribute, value in facts.items())
