"""The check of the teacher: who is withdrawn, who is not, and when nothing is taught."""

from __future__ import annotations

import random
from collections.abc import Iterable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from evolve_dag.experience.pool import Pool, Proposal
from evolve_dag.experience.teacher_check import CheckedItem, Comparison, TeacherCheck, check_teacher, new_items
from evolve_dag.records import ExperienceItem, Step, Trajectory
from evolve_dag.store.jsonvalues import from_values, to_values

NEW = frozenset("abc") | {"bad", "good", "idle", "rescue", "always"} | {f"n{n}" for n in range(20)}
"""Items of a first night."""


def pool(*names: str) -> Pool:
    return Pool(tuple(ExperienceItem(n, f"Advice {n}.", "principle") for n in names))


def rollout(task: int, number: int, reward: float | None, *items: Iterable[str]) -> Trajectory:
    """An episode with these items in the context of its steps, step by step."""
    steps = (*(Step(n, "", (), (), selected=tuple(some)) for n, some in enumerate(items)), Step(9, "", (), (), answer="x"))
    return Trajectory(f"t{task:02d}#{number}", f"t{task:02d}", number, 0, "", "?", steps, "answered", reward=reward)


def night(tasks: int, success: dict[tuple[str, ...], tuple[float, float]], seed: int = 0) -> list[list[Trajectory]]:
    """Rollouts of both sides, four of each kind a task: items that one concerns -> chances of success (teacher, student)."""
    draw = random.Random(seed)
    sides: list[list[Trajectory]] = [[], []]
    for task in range(tasks):
        for place, (items, chances) in enumerate(success.items()):
            for side, chance in enumerate(chances):
                sides[side] += [rollout(task, 4 * place + n, float(draw.random() < chance), items) for n in range(4)]
    return sides


def withdrawn(check: TeacherCheck) -> list[str]:
    return sorted(check.withdrawn)


def test_an_item_that_lowers_success_is_withdrawn_and_the_others_stay():
    sides = night(40, {("bad",): (0.1, 0.6), ("good",): (0.8, 0.5), ("idle",): (0.5, 0.5), (): (0.5, 0.5)})
    check = check_teacher(pool("good", "bad", "idle"), *sides, new=NEW)
    assert withdrawn(check) == ["bad"]
    assert [one.item for one in check.items] == ["good", "bad", "idle"]
    bad = check.items[1].comparison
    assert bad is not None
    assert bad.low <= bad.difference <= bad.high < 0
    assert check.withdrawn["bad"].startswith("the teacher does worse with it: -")
    assert [(f.operation, f.item_id) for f in check.findings] == [("withdraw", "bad")]
    assert from_values(TeacherCheck, to_values(check), "check", "") == check


def test_a_teacher_that_is_asked_again_has_one_check_of_all_attempts():
    """`bad` stands in front of `worse` at first; `good` is judged anew."""
    first = check_teacher(pool("good", "bad"), *night(40, {("bad",): (0.1, 0.6), ("good",): (0.5, 0.5)}), new=NEW)
    second = check_teacher(pool("good", "worse"), *night(40, {("worse",): (0.1, 0.6), ("good",): (0.9, 0.1)}, 1), new=NEW)
    check = second.after(first)
    assert (check.attempts, check.whole, check.earlier) == (2, second.whole, (first.whole,))
    assert [(one.item, one.attempt) for one in check.items] == [("good", 2), ("bad", 1), ("worse", 2)]
    assert check.items[0].comparison == second.items[0].comparison
    assert withdrawn(check) == ["bad", "worse"]
    assert [f.item_id for f in check.findings] == ["bad", "worse"]
    assert not check.refusal
    assert check.told == (
        f"attempt 1 of 2: {first.refusal}",
        f"attempt 2 of 2: the teacher may teach, without bad: {second.whole}",
        f"bad is withdrawn by attempt 1: {first.withdrawn['bad']}",
        f"worse is withdrawn by attempt 2: {second.withdrawn['worse']}",
    )
    assert from_values(TeacherCheck, to_values(check), "check", "") == check
    refused = first.after(check)  # a third
    assert (refused.attempts, refused.earlier) == (3, (first.whole, second.whole))
    assert refused.told[2] == f"attempt 3 of 3: nothing is taught: {first.refusal}"


def test_only_what_the_last_attempt_withdrew_is_a_reason_to_ask_again():
    worse = Comparison(40, 0.1, 0.6, -0.5, -0.6, -0.4)
    first = TeacherCheck(worse, (CheckedItem("bad", worse, (), "why"),))
    assert first.withdrew
    assert not TeacherCheck(worse, (CheckedItem("good", None),)).after(first).withdrew


def test_a_check_of_before_there_were_attempts_is_read():
    check = check_teacher(pool("bad"), *night(40, {("bad",): (0.1, 0.6)}), new=NEW)
    values = to_values(check)
    del values["earlier"]
    for item in values["items"]:
        del item["attempt"]
    assert from_values(TeacherCheck, values, "check", "") == check


def test_an_item_about_a_bad_situation_is_not_blamed_for_it():
    """Whoever comes into the item's situation mostly fails, with the item as without it; the rest mostly succeeds."""
    check = check_teacher(pool("rescue"), *night(40, {("rescue",): (0.15, 0.1), (): (0.9, 0.9)}), new=NEW)
    assert withdrawn(check) == []
    assert check.items[0].comparison is not None
    assert check.items[0].comparison.student < 0.3


def test_a_companion_is_judged_by_the_rollouts_without_the_culprit():
    """`good` stands beside `bad` in most of its rollouts, which fail; where it stands alone it helps."""
    chances = {("bad", "good"): (0.05, 0.6), ("bad",): (0.1, 0.6), ("good",): (0.9, 0.5)}
    check = check_teacher(pool("good", "bad"), *night(40, chances), new=NEW)
    assert withdrawn(check) == ["bad"]
    assert check.items[0].comparison is not None
    assert check.items[0].comparison.difference > 0


def test_a_companion_that_never_stands_alone_is_not_judged():
    check = check_teacher(pool("always", "bad"), *night(40, {("bad", "always"): (0.1, 0.6), ("bad",): (0.1, 0.6)}), new=NEW)
    assert withdrawn(check) == ["bad"]
    assert check.items[0].comparison is None
    assert check.refusal, "the teacher as a whole is below the student"


def test_of_items_that_cannot_be_told_apart_the_new_ones_go():
    """All stand in every context (injection: global). Yesterday's teacher with `old` was checked."""
    both = pool("old", "new")
    sides = night(40, {("old", "new"): (0.1, 0.6)})
    check = check_teacher(both, *sides, new={"new"})
    assert withdrawn(check) == ["new"]
    assert "these always stood together: old, new" in check.withdrawn["new"]
    assert withdrawn(check_teacher(both, *sides, new=())) == ["new", "old"]


def test_a_teacher_below_the_student_teaches_nothing_and_its_new_items_go():
    """Each item alone is seen too seldom."""
    names = [f"n{n}" for n in range(20)]
    check = check_teacher(pool(*names), *many_that_each_are_seen_seldom(), new=NEW)
    assert check.whole is not None
    assert check.whole.harmful
    assert check.refusal.startswith("the teacher with experience is below the student without it: -")
    assert withdrawn(check) == sorted(names)
    assert "no item alone accounts for it" in check.withdrawn["n0"]


@pytest.mark.parametrize(("teacher", "taught"), [(0.9, True), (0.5, False), (0.1, False)])
def test_a_teacher_that_must_help_is_refused_where_it_is_not_established_to(teacher: float, taught: bool):
    sides = night(40, {("a",): (teacher, 0.5)})
    check = check_teacher(pool("a"), *sides, new=NEW, must_help=True)
    assert (check.refusal == "") == taught
    assert check.whole is not None
    assert ("not established to be better than the student" in check.refusal) == (not taught and not check.whole.harmful)
    assert withdrawn(check) == (["a"] if check.whole.harmful else []), "what does not help is no harm"
    assert bool(check_teacher(pool("a"), *sides, new=NEW).refusal) == check.whole.harmful
    assert from_values(TeacherCheck, to_values(check), "check", "") == check


def test_a_teacher_that_must_help_is_refused_where_nothing_was_judged():
    sides = [[rollout(t, 0, None, ["a"]) for t in range(30)] for _ in range(2)]
    check = check_teacher(pool("a"), *sides, new=NEW, must_help=True)
    assert check.refusal == "nothing says that the teacher is better than the student: no task was judged on both sides"
    assert check_teacher(pool("a"), *sides, new=NEW).refusal == ""


def many_that_each_are_seen_seldom(helps: str = "") -> tuple[list[Trajectory], list[Trajectory]]:
    """Twenty items, each in three tasks of sixty; the teacher succeeds in half as many, or with one item in all."""
    teacher = [
        rollout(t, n, float(n == 0 and (t % 4 == 0 or f"n{t % 20}" == helps)), [f"n{t % 20}"])
        for t in range(60)
        for n in range(2)
    ]
    student = [rollout(t, n, float(n == 0 and f"n{t % 20}" != helps), [f"n{t % 20}"]) for t in range(60) for n in range(2)]
    return teacher, student


def test_items_that_are_not_new_stay_but_for_the_worst_where_none_is_to_blame():
    """A miner that finds the evidence of every item again makes none of them new; they have taught before."""
    names = [f"n{n}" for n in range(20)]
    check = check_teacher(pool(*names), *many_that_each_are_seen_seldom(), new=())
    assert check.refusal
    [gone] = withdrawn(check)
    assert "no item alone accounts for it" in check.withdrawn[gone]
    lost = {one.item: one.comparison.lost for one in check.items if one.comparison is not None}
    assert lost[gone] == max(lost.values())


def test_a_new_item_that_is_seen_to_help_is_not_blamed_with_the_others():
    names = [f"n{n}" for n in range(20)]
    check = check_teacher(pool(*names), *many_that_each_are_seen_seldom("n3"), new=NEW)
    assert check.refusal
    assert withdrawn(check) == sorted({*names} - {"n3"})


def led_by_good_advice(seed: int) -> list[list[Trajectory]]:
    """`first` keeps the easy episodes from coming to `later`, which nobody heeds: there success is owed to the way taken."""
    draw = random.Random(seed)

    def episode(task: int, n: int, advised: bool) -> Trajectory:
        well = advised or draw.random() < 0.5
        if well and draw.random() < 0.85:
            return rollout(task, n, 1.0, ["first"])
        return rollout(task, n, float(draw.random() < (0.1 if well else 0.5)), ["first"], ["later"])

    return [[episode(t, n, advised) for t in range(40) for n in range(4)] for advised in (True, False)]


@pytest.mark.parametrize("seed", range(5))
def test_what_good_advice_leaves_over_is_not_blamed_on_what_stands_there(seed: int):
    check = check_teacher(pool("first", "later"), *led_by_good_advice(seed), new={"first", "later"})
    assert check.whole is not None
    assert check.whole.helpful
    assert withdrawn(check) == []
    assert [one.item for one in check.items] == ["first"], "nothing can be said of the other"


def test_harm_from_the_first_step_on_is_seen_though_the_teacher_helps():
    rows = {("bad",): (0.1, 0.6), ("good",): (0.95, 0.2), ("idle", "good"): (0.95, 0.2)}
    check = check_teacher(pool("good", "bad"), *night(40, rows), new=NEW)
    assert check.whole is not None
    assert check.whole.helpful
    assert withdrawn(check) == ["bad"]


def test_new_evidence_for_the_same_words_makes_no_item_new():
    before = Pool().apply(
        [Proposal("add", text="Do: when lost, search."), Proposal("add", text="Do: when done, answer.")], iteration=1
    )
    again = [Proposal("update", item_id="p0001", text="Do: when lost, search.", evidence={"lift": 0.4}, reason="again")]
    again += [Proposal("update", item_id="p0002", text="Do: when done, answer now.", reason="other words")]
    after = before.pool.apply([*again, Proposal("add", text="Do: when stuck, go back.")], iteration=2)
    assert new_items(after.edits) == {"p0002", "p0003"}


@pytest.mark.parametrize("reward", [None, 0.5])
def test_what_was_not_judged_counts_on_neither_side(reward: float | None):
    teacher = [rollout(t, 0, reward, ["a"]) for t in range(30)]
    check = check_teacher(pool("a"), teacher, [rollout(t, 0, 0.5, ["a"]) for t in range(30)], new=NEW)
    assert withdrawn(check) == []
    assert (check.whole is None) == (reward is None) == bool(check.note)


@pytest.mark.parametrize(("lost", "gone"), [(3, False), (12, True)])
def test_few_tasks_prove_nothing(lost: int, gone: bool):
    sides = [[rollout(t, 0, reward, ["a"]) for t in range(lost)] for reward in (0.0, 1.0)]
    assert (withdrawn(check_teacher(pool("a"), *sides, new=NEW)) == ["a"]) is gone


def test_partial_rewards_are_compared_as_they_are():
    sides = [[rollout(t, 0, reward, ["a"]) for t in range(40)] for reward in (0.3, 0.7)]
    check = check_teacher(pool("a"), *sides, new=NEW)
    assert check.whole is not None
    assert (check.whole.teacher, check.whole.student) == pytest.approx((0.3, 0.7))
    assert withdrawn(check) == ["a"]


def test_false_withdrawals_of_useless_items_stay_rare():
    """Ten items that do nothing, in twenty nights: the level holds for all of them together."""
    names = [f"n{n}" for n in range(10)]
    wrong = 0
    for seed in range(20):
        check = check_teacher(pool(*names), *night(24, {(name,): (0.4, 0.4) for name in names}, seed), new=NEW)
        wrong += bool(check.withdrawn)
    assert wrong <= 2


@given(
    st.lists(st.tuples(st.integers(0, 3), st.sampled_from([None, 0.0, 0.5, 1.0]), st.sets(st.sampled_from("abc"))), max_size=12)
)
def test_two_equal_sides_withdraw_nothing(rows: list[tuple[int, float | None, set[str]]]):
    side = [rollout(task, n, reward, sorted(items)) for n, (task, reward, items) in enumerate(rows)]
    check = check_teacher(pool("a", "b", "c"), side, side, new=NEW)
    assert not check.withdrawn
    assert not check.refusal
