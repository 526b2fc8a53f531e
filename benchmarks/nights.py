"""Ten nights without a neural network: the scripted policy of pretraining, the real miner, the real world. Seconds a seed.

    python benchmarks/nights.py --seeds 1 2 3 4 5 6 7 8

The policy acts by habit, but for states about which the pool says something: there it follows the item with probability
``--obedience``.
What is left is the question of extraction: does every night find something that is true, and does nothing block the next?

    python benchmarks/nights.py --seeds 1 2 3 4 5 6 7 8 --frontier    # as many rollouts, half of them where outcomes were mixed
    python benchmarks/nights.py --seeds 1 2 3 4 5 6 7 8 --history     # situations also tell of what is longer ago
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from functools import partial
from random import Random

from evolve_dag.agent.frontier import more_rollouts
from evolve_dag.environments.pocket.script import FastSearch, ScriptedAgent, action_text, habitual, moves
from evolve_dag.environments.pocket.world import Question, World
from evolve_dag.experience.extraction.mining import ContrastExtraction, extract
from evolve_dag.experience.features import Tracker
from evolve_dag.experience.phrases import action_of
from evolve_dag.experience.pool import Pool
from evolve_dag.records import ExperienceItem, Step, ToolCall, Trajectory

COPYING, STEPS = 0.985, 12
MOVES = {
    "search_short": "search_short",
    "search_long": "search_long",
    "open_fitting": "visit_match",
    "open_first": "visit_first",
    "open_pointed": "visit_link",
    "open_linked": "visit_link",
    "answer_listed": "snippet",
    "answer_page": "answer",
    "answer_unseen": "answer",
    "answer_highest": "row_highest",
    "answer_lowest": "row_lowest",
    "answer_top": "row_first",
    "answer_bottom": "row_last",
}
ARGUMENT = {"search": "query", "visit": "page"}


def advised(items: tuple[ExperienceItem, ...], state: dict[str, str]) -> str | None:
    """The move that the most specific fitting item asks for."""
    fitting = [i for i in items if i.condition and all(state.get(f) == v for f, v in i.condition.items())]
    if not fitting:
        return None
    action = action_of(max(fitting, key=lambda i: len(i.condition)).text) or ""
    return action.removeprefix("use:") if action.startswith("use:") else MOVES.get(action)


def play(
    world: World, search: FastSearch, question: Question, name: str, rollout: int, pool: Pool, rng: Random, obedience: float
) -> Trajectory:
    """One episode."""
    agent, tracker, steps, answer = ScriptedAgent(world, question, search), Tracker(question.text, history=True), [], None
    for place in range(STEPS):
        move = advised(pool.items, tracker.features())
        if move not in moves(agent.state) or rng.random() > obedience:
            move = habitual(agent.state, [], rng)
        thought, tool, argument = agent.act(move)
        if place == STEPS - 1:
            (thought, argument), tool = agent.best_guess(), "answer"
        if rng.random() > COPYING:
            argument = "Zuli Zuto"
        text = action_text(thought, tool, argument)
        if tool == "answer":
            answer = argument
            steps.append(Step(place, text, (), (), answer=answer))
            break
        call = ToolCall(tool, {ARGUMENT.get(tool, "entry"): argument})
        steps.append(Step(place, text, (), (), call, observation=agent.observe(tool, argument)))
        tracker.append(steps[-1])
    reward = float(answer == question.answer)
    return Trajectory(
        f"{name}#{rollout}", name, rollout, 0, "", question.text, tuple(steps), "answered", answer=answer, reward=reward
    )


def rollouts(
    ask: Callable[[Question, str, int], Trajectory], questions: list[Question], group: int, frontier: bool
) -> list[Trajectory]:
    """``group`` rollouts of each question; with ``frontier`` half of them go where outcomes were mixed."""
    found: list[list[Trajectory]] = [[] for _ in questions]
    sure = [n for n in range(len(questions)) for _ in range(group // 2 if frontier else group)]
    for n in sure:
        found[n].append(ask(questions[n], f"t{n}", len(found[n])))
    more = more_rollouts([[one.reward for one in own] for own in found], len(questions) * group - len(sure))
    for n, count in enumerate(more):
        found[n] += [ask(questions[n], f"t{n}", len(found[n]) + one) for one in range(count)]
    return [one for own in found for one in own]


def nights(
    seed: int, count: int, tasks: int, group: int, memory: float, obedience: float, frontier: bool, history: bool
) -> list[float]:
    """Success on 512 held-out questions before the first night and after each."""
    settings = ContrastExtraction(min_support=5, cap=24, memory=memory, history=history)
    held_out = World(3000 + seed)
    asked = [held_out.question(Random(f"{seed}/{n}")) for n in range(512)]
    searching, pool, curve, evidence = FastSearch(held_out), Pool(), [], None
    for night in range(count + 1):
        rng = Random(f"{seed}/{night}")
        right = [play(held_out, searching, q, "held-out", 0, pool, rng, obedience).reward or 0.0 for q in asked]
        curve.append(sum(right) / len(right))
        world = World(1000 + seed + 10_000 * night)
        search, questions = FastSearch(world), [world.question(rng) for _ in range(tasks)]
        ask = partial(play, world, search, pool=pool, rng=rng, obedience=obedience)
        every = rollouts(ask, questions, group, frontier)
        found = extract(
            every, pool, granularity="principle", settings=settings, iteration=night + 1, seed=seed, before=evidence
        )
        pool, evidence = found.pool, found.evidence
    return curve


def main() -> None:
    """Print a line a seed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--nights", type=int, default=10)
    parser.add_argument("--tasks", type=int, default=64)
    parser.add_argument("--group", type=int, default=6)
    parser.add_argument("--memory", type=float, default=0.8)
    parser.add_argument("--obedience", type=float, default=0.95)
    parser.add_argument("--frontier", action="store_true", help="Half of the rollouts go where outcomes were mixed")
    parser.add_argument("--history", action="store_true", help="Situations also tell of what is longer ago")
    arguments = parser.parse_args()
    if arguments.frontier and arguments.group < 4:
        parser.error("--frontier needs --group 4 or more: half of it has to show mixed outcomes")
    a = arguments
    for seed in a.seeds:
        curve = nights(seed, a.nights, a.tasks, a.group, a.memory, a.obedience, a.frontier, a.history)
        print(
            f"seed {seed}: " + " ".join(f"{value:.1%}" for value in curve),
            f"mean with the base {sum(curve) / len(curve):.3f}",
            flush=True,
        )


if __name__ == "__main__":
    main()
