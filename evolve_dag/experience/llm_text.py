"""Trajectories and states as text for a language model: shortened, and fenced so that they stay data.

What an environment returned may hold anything, our own markup included: :func:`evolve_dag.prompts.fence`.
"""

from __future__ import annotations

from collections.abc import Sequence

from evolve_dag.experience.pool import Pool
from evolve_dag.plain import one_line
from evolve_dag.records import Step, Trajectory

_LEAST = 120
"""Characters of one part below which shortening every part says nothing any more."""


def shorten(text: str, limit: int) -> str:
    """Head and tail of ``text`` with a note between that says how much was left out; at most ``limit`` characters."""
    if len(text) <= limit:
        return text
    room = limit - len(_note(len(text)))
    if room < 2:
        return text[: max(0, limit)]
    head, tail = (room + 1) // 2, room // 2
    return text[:head] + _note(len(text) - head - tail) + text[len(text) - tail :]


def _note(characters: int) -> str:
    return f"\n[... {characters} characters left out ...]\n"


def fit(parts: Sequence[str], limit: int) -> list[str]:
    """``parts`` with the longest shortened to one common length, so that together they have at most ``limit`` characters.

    Short parts stay whole: of a long trajectory every step keeps its head and its tail.
    """
    left, count = max(0, limit), len(parts)
    for length in sorted(len(part) for part in parts):
        level = left // count
        if length > level:
            return [shorten(part, level) for part in parts]
        left -= length
        count -= 1
    return list(parts)


def _joined(labels: Sequence[str], parts: Sequence[str], limit: int) -> str:
    """Labelled parts, at most ``limit`` characters in all."""
    fitted = fit(parts, limit - sum(len(label) + 2 for label in labels))
    if any(len(new) < _LEAST and new != old for new, old in zip(fitted, parts, strict=True)):
        fitted = list(parts)  # too many: the middle of the whole goes, not that of each
    return shorten("\n".join(f"{label}\n{part}" for label, part in zip(labels, fitted, strict=True)), limit)


def trajectory_text(trajectory: Trajectory, limit: int) -> str:
    """Actions and observations of a trajectory in order, at most ``limit`` characters; long ones lose their middle."""
    labels, parts = [], []
    for number, step in enumerate(trajectory.steps, 1):
        labels.append(f"step {number}, action:")
        parts.append(step.text.strip())
        if step.observation is not None:
            labels.append(f"step {number}, result:")
            parts.append(step.observation.strip())
    if trajectory.answer is not None:
        labels.append("final answer:")
        parts.append(trajectory.answer.strip())
    return _joined(labels, parts, limit) if parts else "(nothing was done)"


def state_text(steps: Sequence[Step], limit: int, recent: int = 4) -> str:
    """The steps so far for a selector: head and tail of the last ``recent`` actions and results, of earlier steps the call."""
    if not steps:
        return "(nothing yet: the next step is the first)"
    early = max(0, len(steps) - recent)
    calls = "\n".join(f"step {number}: {one_line(_call(step), 160)}" for number, step in enumerate(steps[:early], 1))
    calls = f"{shorten(calls, limit // 4)}\n" if calls else ""
    labels, parts = [], []
    for number, step in enumerate(steps[early:], early + 1):
        labels += [f"step {number}, action:", f"step {number}, result:"]
        parts += [step.text.strip(), (step.observation or "").strip() or "(nothing)"]
    return calls + _joined(labels, parts, limit - len(calls))


def _call(step: Step) -> str:
    if step.call is None:
        return f"refused: {step.problem}" if step.problem else step.text
    return str(step.call)


def pool_text(pool: Pool, *, support: bool = False) -> str:
    """One item a line, id in front, and what became of it where it has left the context; with ``support`` also how many tasks
    support it and when it was last changed."""
    lines = []
    for item in pool.items:
        known = f" [{item.evidence.get('support', 0.0):g} tasks, iteration {item.updated}]" if support else ""
        left = " [withdrawn: agents did worse with it]" if item.withdrawn else ""
        left = left or (" [the agent does so by itself now]" if item.graduated else "")
        lines.append(f"{item.id}{known}{left} {one_line(item.text, 2000)}")
    return "\n".join(lines) or "(empty)"
