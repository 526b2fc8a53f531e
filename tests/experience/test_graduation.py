"""Graduation: what the weights hold leaves the context, and comes back when it fades."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
from pool_replay import outline, replay

from evolve_dag.experience.graduation import LEAST_STEPS, LEAST_TASKS, decided, graduations, habit, habits
from evolve_dag.experience.pool import Pool, Proposal
from evolve_dag.records import ExperienceItem, Step, ToolCall, Trajectory

ITEM = ExperienceItem(
    "p0001",
    "Narrow: when a search returns no results, search only the short name.",
    "principle",
    {"observation": "empty"},
)
POOL = Pool((ITEM,))


def episode(number: int, query: str) -> Trajectory:
    """A search that finds nothing, then ``query``, then an answer."""
    first = Step(0, "", (), (), ToolCall("search", {"query": "the mayor of the city of Bado Keli"}), observation="no results")
    second = Step(1, "", (), (), ToolCall("search", {"query": query}), observation="no results")
    answer = Step(2, "", (), (), answer="x")
    return Trajectory(
        f"t{number}#0", f"t{number}", 0, 0, "", "What is the mayor of city Bado Keli?", (first, second, answer), "answered"
    )


def nights(followed: int, others: int) -> list[Trajectory]:
    short = [episode(n, "Bado Keli") for n in range(followed)]
    return short + [episode(1000 + n, "the mayor of the city that is named Bado") for n in range(others)]


def test_the_habit_counts_the_steps_of_the_situation():
    # Each episode stands twice before an empty search; the second time it answers.
    found = habits(POOL.items, nights(3, 1))["p0001"]
    assert (found.steps, found.followed) == (8, 3)


@pytest.mark.parametrize(("tasks", "each", "low"), [(0, 0, 0.0), (10, 1, 0.7225), (10, 40, 0.9905), (64, 6, 0.9901)])
def test_where_nothing_differs_every_step_is_a_witness(tasks, each, low):
    steps = [(f"t{n}", 1.0) for n in range(tasks) for _ in range(each)]
    assert habit(steps).interval == pytest.approx((low, 1.0), abs=1e-4)


@pytest.mark.parametrize("each", [1, 6])
def test_steps_that_go_alike_within_a_task_are_one_witness(each):
    steps = [(f"t{n}", float(n % 10 > 0)) for n in range(100) for _ in range(each)]
    assert habit(steps).witnesses == pytest.approx(100)
    assert habit(steps).interval == pytest.approx((0.8256, 0.9448), abs=1e-4), "Wilson's, of 90 of 100"


def test_steps_that_go_their_own_ways_are_each_a_witness():
    steps = [(f"t{n}", float(k > 0)) for n in range(100) for k in range(10)]  # more even than chance: no more than there are
    assert habit(steps).witnesses == 1000


@pytest.mark.parametrize(("tasks", "operations"), [(1, []), (LEAST_TASKS - 1, []), (LEAST_TASKS, ["graduate"])])
def test_what_few_tasks_show_decides_nothing(tasks, operations):
    found = habit([(f"t{n}", 1.0) for n in range(tasks) for _ in range(60)])
    assert [p.operation for p in decided(POOL, {ITEM.id: found}, 0.9, "done")] == operations
    gone = Pool((replace(ITEM, graduated=1),))
    never = habit([(f"t{n}", 0.0) for n in range(tasks) for _ in range(60)])
    assert [p.operation for p in decided(gone, {ITEM.id: never}, 0.9, "done")] == ["recall"] * len(operations)


def graduates(share: float, *, alike: bool, tasks: int = 64, nights: int = 40) -> float:
    """Share of the nights, of six rollouts a task, that a habit of ``share`` graduates in where 0.9 is asked; ``alike``: the
    rollouts of a task all do the same."""
    count = 0
    for seed in range(nights):
        draw = random.Random(seed)
        own = [draw.random() < share for _ in range(tasks)]
        steps = [(f"t{n}", float(own[n] if alike else draw.random() < share)) for n in range(tasks) for _ in range(6)]
        count += habit(steps).interval[0] >= 0.9
    return count / nights


@pytest.mark.parametrize("tasks", [30, 64])
def test_a_habit_below_the_share_seldom_graduates_however_alike_a_tasks_rollouts_are(tasks):
    """With each step a witness of its own, alike rollouts did so in an eighth of the nights with 64 tasks."""
    assert graduates(0.88, alike=True, tasks=tasks) <= 0.05
    assert graduates(0.88, alike=False, tasks=tasks) <= 0.05


def test_a_habit_above_the_share_graduates_in_most_nights():
    assert graduates(0.95, alike=False) >= 0.9
    assert graduates(0.99, alike=True) >= 0.6


def test_an_item_that_the_policy_follows_by_itself_graduates_and_stays_in_the_pool():
    [proposal] = graduations(POOL, nights(40, 0), 0.35)
    assert (proposal.operation, proposal.item_id) == ("graduate", "p0001")
    after, edits, refused = POOL.apply([proposal], iteration=3)
    assert not refused
    assert after.items == (replace(ITEM, graduated=3),)
    assert after.active.items == ()
    assert Pool.from_json(after.to_json()) == after
    assert edits[0].before == edits[0].after == ITEM.text


def test_it_comes_back_when_the_behaviour_fades():
    graduated = Pool((replace(ITEM, graduated=3),))
    [proposal] = graduations(graduated, nights(2, 40), 0.4)
    assert proposal.operation == "recall"
    assert graduated.apply([proposal], iteration=5).pool.active.items == (ITEM,)


@pytest.mark.parametrize("graduated", [0, 2])
def test_between_the_two_nothing_changes(graduated):
    assert graduations(Pool((replace(ITEM, graduated=graduated),)), nights(32, 8), 0.4) == []


def test_few_steps_decide_nothing():
    assert graduations(POOL, nights(LEAST_STEPS // 2 - 1, 0), 0.01) == []


def test_switched_off_nobody_graduates_and_who_has_comes_back():
    assert graduations(POOL, nights(40, 0), 0.0) == []
    [proposal] = graduations(Pool((replace(ITEM, graduated=3),)), [], 0.0)
    assert proposal.operation == "recall"


def test_an_item_in_other_words_is_left_alone():
    other = Pool((replace(ITEM, text="Check the source: look twice before answering."),))
    assert graduations(other, nights(40, 0), 0.1) == []


@pytest.mark.parametrize(("operation", "graduated"), [("graduate", 2), ("recall", 0)])
def test_what_is_so_already_is_refused(operation, graduated):
    pool = Pool((replace(ITEM, graduated=graduated),))
    assert pool.apply([Proposal(operation, item_id="p0001")], iteration=4).refused


def test_graduated_items_do_not_count_for_the_cap():
    pool = Pool(
        (replace(ITEM, graduated=2), replace(ITEM, id="p0002", text="Match: when a page is shown, open the page it names."))
    )
    assert pool.apply([], iteration=4, cap=1).pool == pool


def test_replay_knows_graduation():
    pool, added, _ = Pool().apply([Proposal("add", text=ITEM.text, condition=ITEM.condition)], iteration=1)
    pool, moved, _ = pool.apply([Proposal("graduate", item_id="p0001"), Proposal("recall", item_id="p0001")], iteration=2)
    assert [edit.operation for edit in moved] == ["graduate", "recall"]
    assert replay([*added, *moved]) == outline(pool)


def test_an_item_that_looks_back_counts_its_own_steps():
    item = replace(ITEM, condition={"observation": "empty", "in_row": "twice"})
    found = habits((item,), nights(3, 1))["p0001"]
    assert (found.steps, found.followed) == (4, 0), "the second time everybody answers"
