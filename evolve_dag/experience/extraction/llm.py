"""Extraction by a language model: scored trajectories + E(k-1) -> E(k) (METHOD, "Extraction chain").

    summary of every rollout of a mixed group
      -> critique of the group: candidate items
      -> decisions: ADD, UPDATE, DELETE or NONE for each candidate, against the pool
      -> reconciliation of the decisions of ``batch_tasks`` tasks
      -> consolidation, when the pool is over its cap

What a model answers is a proposal. The pool is changed by :meth:`Pool.apply` alone, so ids never change, nothing is lost
silently and every edit has its reason and the trajectories that caused it. ``evidence["support"]`` of an item is the number
of tasks that asked for it, those included that found what it says already.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from pydantic import Field

from evolve_dag.config.section import MOST
from evolve_dag.errors import ModelError, UnreachableError
from evolve_dag.experience.extraction import llm_plans as plans
from evolve_dag.experience.extraction.base import (
    Extraction,
    ExtractorPart,
    Material,
    OtherWordsSettings,
    only_principles_graduate,
)
from evolve_dag.experience.extraction.llm_calls import Asker, in_order
from evolve_dag.experience.extraction.llm_edits import Lesson, PoolEditor, union
from evolve_dag.experience.extraction.llm_form import Form, entities
from evolve_dag.experience.extraction.llm_plans import Candidate, Tally
from evolve_dag.experience.features import strip_last_step
from evolve_dag.experience.llm_text import fit, shorten, trajectory_text
from evolve_dag.experience.pool import Pool, counted, same_words
from evolve_dag.prompts import fence
from evolve_dag.protocols import LanguageModel
from evolve_dag.records import Granularity, Task, Trajectory, solved
from evolve_dag.store.memory import Memory

Domain = Literal["web", "mathematics"]
_COUNTED = (
    "candidates", "dropped_form", "repaired", "unknown_ids", "unreadable", "failed_calls", "undecided", "duplicates", "surplus",
    "unknown_operations", "overruled", "joined", "consolidations", "over_cap",
)  # fmt: skip


class LLMExtraction(OtherWordsSettings):
    """The paper's chain of summary, critique, decision and reconciliation, by the model ``models.extractor``."""

    extractor: Literal["llm"] = "llm"
    """A language model writes the lessons."""
    domain: Domain = "web"
    """Wording of the prompts."""
    batch_tasks: int = Field(4, ge=1, le=MOST)
    """Tasks whose decisions are reconciled together."""
    candidates: int = Field(3, ge=1, le=10)
    """Most candidate items per group of mixed outcomes."""
    temperature: float = Field(0.3, ge=0)
    """Of the extractor's calls."""
    max_tokens: int = Field(2048, ge=32, le=MOST)
    """Most tokens of one of its answers."""
    max_words: int = Field(32, ge=4, le=32)
    """Longest principle."""
    max_characters: int = Field(24_000, ge=500, le=MOST)
    """Most characters of trajectories in one call, about 6,000 tokens; longer ones keep the head and tail of their longest
    parts."""


def prompt_names(granularity: Granularity, domain: Domain) -> tuple[str, ...]:
    """Prompts that decide the outcome, for the lineage's digest."""
    critique = "critique" if granularity == "principle" else "instance"
    names = (f"summary_{domain}", f"{critique}_{domain}", f"form_{granularity}", "decide", "reconcile", "consolidate", "repair")
    return tuple(f"experience/{name}" for name in names)


async def extract_with_llm(
    trajectories: Sequence[Trajectory],
    tasks: Sequence[Task],
    pool: Pool,
    *,
    model: LanguageModel,
    identity: str,
    granularity: Granularity,
    settings: LLMExtraction,
    iteration: int,
    seed: int,
    memory: Memory | None = None,
    concurrency: int = 16,
    on_progress: Callable[[], None] | None = None,
) -> Extraction:
    """Run the chain. The result depends neither on the order of ``trajectories`` nor on that in which calls come back.

    Args:
        tasks: give the order of decisions and the reference answers; a group of another task comes last, without an answer.
        identity: what ``model`` is, for the keys of remembered answers.
        memory: where finished calls are remembered.
        concurrency: calls in flight.
        on_progress: called once for every group.

    Returns:
        As :func:`~evolve_dag.experience.extraction.mining.extract`. ``statistics`` counts trajectories, judged, not_judged,
        groups, mixed_groups; candidates (read from critiques), dropped_form (items without the form, after ``repaired``
        others), unknown_ids, unreadable (answers), failed_calls (each loses its group, or leaves its batch unreconciled or the
        cap to the rule); undecided, duplicates, surplus and unknown_operations (decisions); overruled and joined (proposals of
        one batch); consolidations, and over_cap (items deleted by the rule); added, updated, deleted, merged (edits), refused
        (by the pool), items.

    Raises:
        ModelError: every call failed.
        UnreachableError: for too many there was no model to be asked.
    """
    groups = _groups(trajectories, tasks)
    mixed = [group for group in groups if group.mixed]
    tally: Tally = Counter()
    asker = Asker(
        model, identity, memory=memory, concurrency=concurrency, seed=(seed, iteration), temperature=settings.temperature,
        max_tokens=settings.max_tokens, tally=tally,
    )  # fmt: skip
    form = Form(asker, granularity, settings.max_words, tally)
    critic = _Critic(asker, form, granularity=granularity, settings=settings, tally=tally)
    editor = PoolEditor(pool, asker, form, granularity=granularity, cap=settings.cap, iteration=iteration, tally=tally)

    lost = 0

    async def learn(group: _Group) -> Lesson | None:
        nonlocal lost
        try:
            return await critic.learn(group) if group.mixed else None
        except ModelError as error:
            lost += isinstance(error, UnreachableError)
            return None  # counted where it was raised
        finally:
            if on_progress is not None:
                on_progress()

    lessons = dict(zip((g.task_id for g in groups), await in_order(learn(group) for group in groups), strict=True))
    for start in range(0, len(mixed), settings.batch_tasks):
        batch = [lesson for g in mixed[start : start + settings.batch_tasks] if (lesson := lessons[g.task_id]) is not None]
        await editor.take_in(batch)
    await editor.consolidate((), union(lesson.names for lesson in lessons.values() if lesson))
    asker.raise_if_too_little_came_back(lost, len(mixed))

    edits = tuple(editor.edits)
    after = Pool(editor.pool.items, pool.version + bool(edits), editor.pool.next_number)  # one extraction, one version
    judged = sum(len(group.judged) for group in groups)
    statistics = {
        "trajectories": len(trajectories), "judged": judged, "not_judged": len(trajectories) - judged,
        "groups": len(groups), "mixed_groups": len(mixed), **{name: tally[name] for name in _COUNTED},
    }  # fmt: skip
    statistics |= {**counted(edits), "refused": tally["refused"], "items": len(after)}
    return Extraction(after, edits, {name: float(value) for name, value in statistics.items()})


@dataclass(frozen=True, slots=True)
class _Group:
    """The trajectories of one task."""

    task_id: str
    task: Task | None
    judged: tuple[Trajectory, ...]

    @property
    def mixed(self) -> bool:
        rewards = [t.reward or 0.0 for t in self.judged]
        return bool(rewards) and 0 < sum(rewards) / len(rewards) < 1

    @property
    def question(self) -> str:
        return self.task.question if self.task is not None else strip_last_step(self.judged[0].question)

    @property
    def trajectory_ids(self) -> tuple[str, ...]:
        return tuple(t.id for t in self.judged)


def _groups(trajectories: Sequence[Trajectory], tasks: Sequence[Task]) -> list[_Group]:
    """Groups in the order of ``tasks``, then others by id."""
    known = {task.id: (place, task) for place, task in enumerate(tasks)}
    members: dict[str, list[Trajectory]] = {}
    for trajectory in sorted(trajectories, key=lambda t: (t.rollout, t.id)):
        members.setdefault(trajectory.task_id, []).append(trajectory)
    order = sorted(members, key=lambda task_id: (known.get(task_id, (len(tasks), None))[0], task_id))
    judged = {task_id: tuple(t for t in group if t.reward is not None) for task_id, group in members.items()}
    return [_Group(task_id, known[task_id][1] if task_id in known else None, judged[task_id]) for task_id in order]


class _Critic:
    """The first half of the chain: from the trajectories of one group to candidate items."""

    def __init__(
        self,
        asker: Asker,
        form: Form,
        *,
        granularity: Granularity,
        settings: LLMExtraction,
        tally: Tally,
    ) -> None:
        self._asker, self._form, self._tally = asker, form, tally
        self._granularity, self._settings, self._characters = granularity, settings, settings.max_characters

    async def learn(self, group: _Group) -> Lesson | None:
        """Summaries and critique of one group; None when nothing can be read from it.

        Raises:
            ModelError: a call failed.
        """
        domain = self._settings.domain
        question = fence("question", shorten(group.question, self._characters // 4))

        async def summary(trajectory: Trajectory) -> str:
            blanks = {
                "question": question,
                "trajectory": fence("trajectory", trajectory_text(trajectory, self._characters)),
                "outcome": _outcome(trajectory),
            }
            return await self._asker.text(f"summary_{domain}", (group.task_id, trajectory.rollout), blanks)

        summaries = await in_order(summary(trajectory) for trajectory in group.judged)
        if not any(summaries):
            return None
        texts = fit([text or "(no summary)" for text in summaries], self._characters)
        attempts = "\n\n".join(
            f"attempt {number}, {_outcome(trajectory)}\n{text}"
            for number, (trajectory, text) in enumerate(zip(group.judged, texts, strict=True), 1)
        )
        name = "critique" if self._granularity == "principle" else "instance"
        answer = group.task.answer if group.task is not None else "(not known)"
        blanks = {
            "question": question,
            "answer": fence("answer", shorten(answer, self._characters // 4)),
            "attempts": fence("attempts", attempts),
            "form": self._form.prompt,
            "candidates": self._settings.candidates,
        }
        value = await self._asker.json(
            f"{name}_{domain}", (group.task_id,), blanks, plans.CANDIDATES_SCHEMA,
            lambda v: plans.read_candidates(v) is not None, guide=self._form.guides.candidates(self._settings.candidates),
        )  # fmt: skip
        found = (plans.read_candidates(value) or [])[: self._settings.candidates]
        self._tally["candidates"] += len(found)
        names = entities(group.task, group.judged)
        formed = await in_order(self._form.written(c.text, names, (group.task_id, n)) for n, c in enumerate(found))
        kept: dict[str, Candidate] = {}
        for candidate, text in zip(found, formed, strict=True):
            if text is not None:
                kept.setdefault(same_words(text), replace(candidate, text=text))
        return Lesson(group.task_id, group.trajectory_ids, tuple(kept.values()), names)


def _outcome(trajectory: Trajectory) -> str:
    reward = trajectory.reward or 0.0
    word = "succeeded" if solved(reward) else "failed" if reward <= 0 else f"scored {reward:.2f} of 1"
    return f"{word} ({trajectory.status})"


async def _extract(settings: LLMExtraction, material: Material) -> Extraction:
    roles = material.roles
    return await extract_with_llm(
        material.trajectories,
        material.tasks,
        material.pool,
        model=roles.model("extractor"),
        identity=roles.identity("extractor"),
        granularity=material.granularity,
        settings=settings,
        iteration=material.iteration,
        seed=material.seed,
        memory=roles.memory,
        concurrency=material.concurrency,
        on_progress=material.on_progress,
    )


LLM = ExtractorPart(
    settings=LLMExtraction,
    make=_extract,
    roles=lambda settings: ("extractor",),
    prompts=lambda settings, experiment: prompt_names(experiment.granularity, settings.domain),
    unread=only_principles_graduate,
)
