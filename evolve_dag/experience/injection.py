"""Injection: experience in the teacher's view, never in the stored history (METHOD step 4).

``step_wise`` appends the items that fit the state to the last user or tool message, ``global`` appends the whole pool
to the system message; both of a copy. The student's view is the stored history itself.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace

from evolve_dag.errors import AlignmentError
from evolve_dag.experience.pool import Pool
from evolve_dag.experience.selection.base import Selector
from evolve_dag.plain import GLOBAL_HEADING, STEP_HEADING, one_line
from evolve_dag.protocols import Injected
from evolve_dag.records import InjectionPattern, Message, Trajectory


def block(heading: str, texts: Sequence[str]) -> str:
    """What is appended: heading and items, one a line, so that none forges a heading or a second item; '' without items."""
    lines = [line for text in texts if (line := one_line(text, None))]
    return "".join(f"\n{line}" for line in [heading, *lines]) if lines else ""


def inject_step_wise(messages: Sequence[Message], texts: Sequence[str]) -> tuple[Message, ...]:
    """A copy with ``texts`` appended to the last user or tool message.

    Raises:
        AlignmentError: there is none, or an assistant message follows it (then no action is next).
    """
    copy = list(messages)
    text = block(STEP_HEADING, texts)
    if text:
        if not copy or copy[-1].role not in ("user", "tool"):
            raise AlignmentError(
                f"step-wise injection: the last message is {copy[-1].role if copy else 'missing'}, not user or tool",
                "inject into the history that precedes an action",
            )
        copy[-1] = replace(copy[-1], content=copy[-1].content + text)
    return tuple(copy)


def inject_global(messages: Sequence[Message], texts: Sequence[str]) -> tuple[Message, ...]:
    """A copy with ``texts`` appended to the system message, i.e. before the task.

    Raises:
        AlignmentError: the conversation does not begin with a system message.
    """
    copy = list(messages)
    text = block(GLOBAL_HEADING, texts)
    if text:
        if not copy or copy[0].role != "system":
            raise AlignmentError("global injection: no system message", "begin the conversation with one")
        copy[0] = replace(copy[0], content=copy[0].content + text)
    return tuple(copy)


def injected(pattern: InjectionPattern, messages: Sequence[Message], texts: Sequence[str]) -> tuple[tuple[Message, ...], str]:
    """A copy of ``messages`` with ``texts`` where the pattern puts them, and exactly what was added.

    Raises:
        AlignmentError: there is no place for them.
    """
    if pattern == "none":
        return tuple(messages), ""
    if pattern == "global":
        return inject_global(messages, texts), block(GLOBAL_HEADING, texts)
    return inject_step_wise(messages, texts), block(STEP_HEADING, texts)


class Injector:
    """The experience source of an episode: gives the teacher's view before every step.

    Args:
        pattern: ``none``, ``global`` or ``step_wise``.
        pool: what is chosen from; not changed.
        selector: needed by ``step_wise`` only.
    """

    def __init__(self, pattern: InjectionPattern, pool: Pool, selector: Selector | None = None) -> None:
        if pattern == "step_wise" and selector is None:
            raise ValueError("step_wise injection needs a selector")
        self.pattern = pattern
        self.pool = pool
        self.selector = selector
        self._texts = {item.id: item.text for item in pool.items}

    async def prepare(self, trajectory: Trajectory) -> Injected:
        """The teacher's view of the history before step ``len(trajectory.steps)``.

        Raises:
            AlignmentError: the stored history holds experience already.
        """
        assert_clean(trajectory, self._texts.values())
        history = trajectory.history(len(trajectory.steps))
        if self.pattern == "none" or not self._texts:
            return Injected(history, (), "")
        ids, rationale = tuple(self._texts), ""
        if self.pattern == "step_wise":
            assert self.selector is not None  # checked when this was made
            selection = await self.selector.select(trajectory.question, trajectory.steps, self.pool)
            ids, rationale = selection.ids, selection.rationale
        messages, text = injected(self.pattern, history, [self._texts[item_id] for item_id in ids])
        return Injected(messages, ids, text, rationale)


def assert_clean(trajectory: Trajectory, texts: Iterable[str]) -> None:
    """Stored history never holds experience: neither system message, question nor any observation has a heading line
    with an item below it. Actions are the policy's own words and are not looked at.

    Raises:
        AlignmentError: one does; names the place and the item.
    """
    lines = {one_line(text, None) for text in texts}
    places = [("system message", trajectory.system), ("question", trajectory.question)]
    places += [(f"observation of step {s.index}", s.observation) for s in trajectory.steps if s.observation is not None]
    for where, content in places:
        if STEP_HEADING not in content and GLOBAL_HEADING not in content:
            continue
        below = False
        for line in content.split("\n"):
            if below and line in lines:
                raise AlignmentError(
                    f"trajectory {trajectory.id}: the stored {where} holds experience: {line[:80]!r}",
                    "inject into a copy of the history only (evolve_dag.experience.injection)",
                )
            below = below or line in (STEP_HEADING, GLOBAL_HEADING)
