"""Which training tasks get more rollouts: those that some rollouts solved and others did not."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import cycle, islice

MOST = 4
"""Times the rollouts that all tasks have, that one near the frontier gets on top."""


def more_rollouts(groups: Sequence[Sequence[float | None]], budget: int) -> list[int]:
    """How many more rollouts each task gets.

    Lessons are where a group holds both success and failure (METHOD step 2); groups that are all alike say nothing. So what is
    left of the budget goes to tasks with mixed outcomes in turn, up to :data:`MOST` times what they had, and what then
    remains to the others in turn. Tasks of which nothing was judged get none while there are others.

    Args:
        groups: of each task the rewards of its first rollouts, None where one was not judged.
        budget: rollouts to give out.

    Returns:
        One number a task; they add up to ``budget``, or to 0 where there is no task.
    """
    known = [[reward for reward in group if reward is not None] for group in groups]
    mixed = [at for at, rewards in enumerate(known) if len(set(rewards)) > 1]
    alike = [at for at, rewards in enumerate(known) if len(set(rewards)) == 1]
    others = alike or mixed or range(len(groups))
    given = list(islice(cycle(mixed), min(budget, sum(MOST * len(groups[at]) for at in mixed))))
    given += islice(cycle(others), budget - len(given))
    more = [0] * len(groups)
    for at in given:
        more[at] += 1
    return more
