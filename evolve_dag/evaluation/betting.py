"""Evidence that adds up over nights: a test by betting, valid whenever one looks at it.

A bettor with stake ``s`` puts, on every task of every night, the share ``s`` of his capital on a loss beyond the margin: it is
multiplied by ``1 + s (loss - margin)``. How large a loss would be is not known, so the capital is divided over several stakes.
While nothing is lost no stake makes money on average, and the chance that the capital ever grows to ``1 / level`` is at most
``level`` (Ville's inequality), however often one looks.

Source: Waudby-Smith and Ramdas (2024), "Estimating means of bounded random variables by betting", J. R. Stat. Soc. B 86, 1-27
(arXiv:2010.09686): the capital process, and betting diversified over a grid of stakes.

What is tested. Tasks are the same every night and differ from each other, so their mean losses ``m_t`` do too. A stake that is
the same for all of them keeps the bet fair: the expected product of the factors is ``prod (1 + s (m_t - margin))``, by the
inequality of arithmetic and geometric means at most ``(1 + s (mean - margin)) ^ T``, hence at most 1 while the *average* of the
mean losses, over the tasks and the nights so far, is within the margin. New in every night are the draws; what is found holds
for these tasks.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np
from numpy.typing import NDArray

from evolve_dag.evaluation.intervals import POWER

STAKES = (0.05, 0.1, 0.2, 0.4, 0.8)
"""Each twice the one before. The best stake is about the loss over its variance: 0.05 for one point among coin flips, 0.8 for
two points where one task in forty differs."""
LEAST = 1 / 16
"""What bets about something new begin with at least. A climb costs the bettors all they have, and who begins with nothing sees
no erosion after it; every such beginning adds at most this share to the chance of a false finding."""
_MOST = 700.0
"""Natural logarithm beyond which capital is not counted any more."""


@dataclass(frozen=True, slots=True)
class Capital:
    """What the bettors have made of 1, divided evenly at the start."""

    logs: tuple[float, ...] = (0.0,) * len(STAKES)
    """Natural logarithm of the capital at each of :data:`STAKES`, as a multiple of what it began with."""

    @property
    def total(self) -> float:
        """All of it; above ``1 / level`` the loss is established. Never more than a number holds: of a candidate that knows
        nothing a thousand tasks make more."""
        return float(np.exp(np.minimum(self.logs, _MOST)).mean())

    def after(self, losses_T: Sequence[float] | NDArray[np.float64], margin: float = 0.0) -> Capital:
        """The capital when a night's tasks have been played.

        Args:
            losses_T: one a task, each in -1..1; positive is worse.
            margin: loss that is let pass, in 0..0.25, so that nobody can lose more than he has.
        """
        beyond_T = np.asarray(losses_T, dtype=np.float64) - margin
        gains_S = np.log1p(np.outer(beyond_T, STAKES)).sum(axis=0)
        return Capital(tuple(float(log) for log in self.logs + gains_S))

    def at_most(self, limit: float) -> Capital:
        """The same bets with what exceeds ``limit`` in all given away, by the richest. Who gives away wins no more often.

        The others keep what they have. After a night in which nearly everything is lost the highest stake is further ahead of
        the lowest than a slow loss ever takes that one; if all gave the same share, none would be seen again.
        """
        left = limit * len(self.logs)
        for place, log in enumerate(sorted(self.logs)):
            most = math.log(left / (len(self.logs) - place))
            if log > most:  # nor is anybody who is richer let keep more
                return Capital(tuple(min(log, most) for log in self.logs))
            left -= math.exp(log)
        return self

    def restarted(self) -> Capital:
        """Divided evenly anew, for bets about something else: earlier winnings stay behind, and so do losses down to
        :data:`LEAST`."""
        return Capital((math.log(min(1.0, max(LEAST, self.total))),) * len(STAKES))


def detectable(sd: float, plays: int, *, level: float, power: float = POWER) -> float:
    """Smallest average loss beyond the margin that ``plays`` bets establish in about ``power`` of the cases.

    With a mean of ``u`` standard errors the best stake's log capital has mean ``u^2 / 2`` and standard deviation ``u``; what
    the other stakes are given costs the mixture about 1.

    Args:
        sd: standard deviation of one task's loss.
        plays: tasks of all nights together, at least 1.
        level: chance of a false finding.
    """
    z = NormalDist().inv_cdf(power)
    needed = math.log(1 / level) + 1.0
    return float((z + math.sqrt(z * z + 2 * needed)) * sd / math.sqrt(plays))
