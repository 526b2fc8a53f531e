"""Synthetic lineages for the tests of this folder: invented numbers, real types."""

from __future__ import annotations

import hashlib
from dataclasses import replace

import numpy as np

from evolve_dag.evaluation.gate import GateDecision
from evolve_dag.evaluation.metrics import Breakdown, Metrics
from evolve_dag.experience.teacher_check import CheckedItem, Comparison, TeacherCheck
from evolve_dag.lineage.audit import ALL, Internalized
from evolve_dag.records import ExperienceItem
from evolve_dag.reporting.summary import IterationRow, LineageSummary, StepRow
from evolve_dag.steps.base import STEP_ORDER

PRINCIPLES = (
    "Verify: when a listing shows the asked fact, visit the page before answering.",
    "Requery: when a search finds nothing, search again with fewer words.",
    "Redirect: when a page only says see, visit the page it names.",
    "Match: when several titles are listed, visit the one whose kind stands in the question.",
    "Chain: when the page names the next entity, search for that entity.",
    "Stop: when the visited page states the asked fact, answer with it.",
)


def metrics(success: float, premature: float, turns: float, unanswered: float, *, judged: int = 512) -> Metrics:
    def around(share: float, n: int = 512) -> tuple[float, float]:
        half = 1.96 * (share * (1 - share) / n) ** 0.5
        return max(0.0, share - half), min(1.0, share + half)

    shares = {"success": success, "success_all": success * judged / 512, "premature": premature}
    shares |= {"no_tool": 0.004, "forced": 0.01, "unanswered": unanswered, "failed": 0.0}
    means = {"turns": turns, "tokens": 19 * turns, "problems": 0.03}
    by_hops = {str(hops): min(1.0, max(0.0, success - 0.15 * (hops - 2))) for hops in (1, 2, 3)}
    return Metrics(
        n=512,
        tasks=512,
        judged=judged,
        **shares,
        **means,
        intervals={name: around(share) for name, share in shares.items()}
        | {name: (0.96 * mean, 1.04 * mean) for name, mean in means.items()},
        by={"hops": {hops: Breakdown(170, 170, share, around(share, 170), premature) for hops, share in by_hops.items()}},
    )


def lineage(
    name: str = "pocket",
    without: tuple[float, ...] = (0.28, 0.62, 0.79, 0.81),
    with_experience: tuple[float, ...] = (0.72, 0.84, 0.85),
    premature: tuple[float, ...] = (0.76, 0.34, 0.13, 0.07),
    declined: tuple[int, ...] = (),
    texts: tuple[str, ...] = PRINCIPLES,
    seed: int = 0,
) -> LineageSummary:
    rng = np.random.default_rng(seed)
    rows = [IterationRow(0, without=metrics(without[0], premature[0], 3.9, 0.002))]
    for k in range(1, len(without)):
        kept = k in declined
        seconds = dict(zip(STEP_ORDER, (0.02, 11.3, 0.6, 14.8, 17.2, 21.5, 0.1), strict=True))
        tokens = {"trajectories": 31_400 + 1000 * k, "contexts": 29_900, "adapter": 0, "scores": 148_000}
        items = tuple(
            ExperienceItem(
                f"{name}-{i:03d}",
                text,
                "principle",
                {"observation": "listing"},
                {"support": 40 + 9 * i, "lift": 0.12 + 0.03 * i, "low": 0.05 + 0.02 * i, "high": 0.25 + 0.03 * i},
                ("train-0001#0", "train-0007#2"),
                created=min(k, 1 + i // 3),
                updated=k if i % 2 else min(k, 1 + i // 3),
            )
            for i, text in enumerate(texts[: 3 * k])
        )
        losses = [float(0.03 / k * np.exp(-i / 14) + 0.004 + 0.001 * rng.random()) for i in range(46 + 6 * k)]
        digests = {step: hashlib.sha256(f"{name}{step}{k}".encode()).hexdigest()[:32] for step in STEP_ORDER}
        steps = tuple(StepRow(step, digests[step], seconds[step], tokens.get(step), recomputed=k == 3) for step in STEP_ORDER)
        rows.append(
            IterationRow(
                k,
                without=metrics(without[k], premature[k], 4.6 + 0.3 * k, 0.01 * k),
                with_experience=metrics(with_experience[k - 1], premature[k] / 2, 4.9 + 0.3 * k, 0.008 * k),
                greedy=metrics(min(0.99, without[k] + 0.08), premature[k] / 3, 4.7 + 0.3 * k, 0.0),
                pool_size=len(items),
                edits={"added": 3 if k < 3 else 0, "updated": k, "deleted": k // 2, "merged": 0},
                locality={"url": 0.0, "number": 0.02 * k, "entity": 0.05, "strategy": 1.0},
                gate=GateDecision(
                    "keep" if kept else "promote",
                    (f"success {without[k]:.1%} against {without[k - 1]:.1%}: +9.0 points, 95% interval +4.0 to +14.0",),
                    {"success_difference": without[k] - without[k - 1], "turn_ratio": 1.1},
                ),
                training={"rows": 240 + 40 * k, "kept": 200 + 40 * k, "loss_first": 0.03 / k, "loss_last": 0.004},
                curve=tuple({"step": float(i), "loss": loss} for i, loss in enumerate(losses)),
                items=items,
                steps=steps,
            )
        )
    return LineageSummary(
        name,
        tuple(rows),
        settings={
            "seed": seed,
            "granularity": "principle",
            "injection": "step_wise",
            "regime.source": "teacher",
            "regime.divergence": "forward_kl",
            "regime.rejection": True,
            "tasks.train": {"count": 96, "world": 11},
        },
        command=f"evolve run configs/{name}.yaml --iterations {len(without) - 1}",
    )


def checked(summary: LineageSummary) -> LineageSummary:
    """The lineage with teachers that were checked: the second was so in its second attempt, the last one is below the student,
    and one item was withdrawn."""
    good, bad = Comparison(64, 0.5, 0.4, 0.1, 0.02, 0.18), Comparison(40, 0.1, 0.4, -0.3, -0.4, -0.2)
    last = summary.rows[-1].iteration
    rows = []
    for row in summary.rows:
        if row.iteration:
            items = (
                CheckedItem("pocket-000", good),
                CheckedItem("pocket-001", bad, (), f"the teacher does worse with it: {bad}"),
            )
            earlier = (bad,) if row.iteration == 2 else ()
            check = TeacherCheck(bad if row.iteration == last else good, items[: row.iteration], earlier=earlier)
            row = replace(row, check=check)
        rows.append(row)
    return replace(summary, rows=tuple(rows))


def audited(summary: LineageSummary) -> LineageSummary:
    """The lineage with what was measured of two items, and with paid calls in the step ``experience``."""
    calls = {"extractor": {"calls": 12, "errors": 1, "prompt_tokens": 34_000, "completion_tokens": 5_600, "cost": 0.0123}}
    rows = []
    for row in summary.rows:
        if row.iteration:
            k = row.iteration
            found = (
                Internalized(ALL, k, "", 100, 900, 0.05, 0.01, 0.012, (0.75, 0.85), (0.7, 0.8)),
                Internalized("p1", k, PRINCIPLES[0], 40, 300, 0.08, 0.02, 0.004 if k == 1 else 0.04, (0.7, 0.8), (0.92, 0.97)),
                Internalized("p2", k, PRINCIPLES[1], 20, 100, 0.08, 0.04, 0.02 if k == 1 else 0.04, (0.4, 0.6), (0.72, 0.77)),
            )
            steps = tuple(replace(step, calls=calls) if step.name == "experience" else step for step in row.steps)
            row = replace(row, internalized=found, steps=steps)
        rows.append(row)
    return replace(summary, rows=tuple(rows))
