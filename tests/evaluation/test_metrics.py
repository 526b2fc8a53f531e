"""Metrics of trajectories: what counts as read, premature, without tool; shares and their denominators."""

from __future__ import annotations

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from evolve_dag.config.schema import EvaluationSettings
from evolve_dag.errors import DataError
from evolve_dag.evaluation.metrics import (
    answered_without_tool,
    evaluate_summary,
    is_listing,
    is_premature,
    measure,
    metrics_from_json,
    metrics_to_json,
    score_trajectories,
    stands_in,
    told_reward,
)
from evolve_dag.records import Step, Task, ToolCall, Trajectory, TrajectoryStatus

LISTING = "2 results\n1. city Bado Keli: mayor: person Rato Miku\n2. river Bado Keli: mouth: city Zano Pile"
PAGE = "page: city Bado Keli\nmayor: person Rato Miku\nstream: river Zano Pile"


def search(observation: str, query: str = "Bado Keli mayor") -> dict:
    return {"call": ToolCall("search", {"query": query}), "observation": observation}


def visit(observation: str, page: str = "city Bado Keli") -> dict:
    return {"call": ToolCall("visit", {"page": page}), "observation": observation}


def trajectory(
    *steps: dict,
    answer: str | None = "Rato Miku",
    reward: float | None = 1.0,
    status: TrajectoryStatus = "answered",
    task: str = "t1",
    rollout: int = 0,
    offers_tools: bool = True,
) -> Trajectory:
    made = [Step(i, "act", (1, 2, 3), (), **fields) for i, fields in enumerate(steps)]
    if answer is not None:
        made.append(Step(len(made), "answer", (4, 5), (), answer=answer))
    return Trajectory(
        f"{task}#{rollout}",
        task,
        rollout,
        0,
        "system",
        "What is the mayor of city Bado Keli?",
        tuple(made),
        status,
        answer,
        reward,
        offers_tools=offers_tools,
    )


@pytest.mark.parametrize(
    ("rewards", "success", "solved"),
    [((1.0, 0.0), 0.5, None), ((1.0, 0.25, None), 0.625, 0.5), ((0.5, 0.5), 0.5, 0.0), ((None, None), None, None)],
)
def test_where_parts_of_a_reward_are_given_the_whole_ones_are_counted(
    rewards: tuple[float | None, ...], success: float | None, solved: float | None
) -> None:
    rolled = [trajectory(reward=reward, rollout=n) for n, reward in enumerate(rewards)]
    found = measure(rolled, {"t1": Task("t1", "q", "Rato Miku")}, resamples=100)
    assert (found.success, found.solved) == (success, solved)
    assert metrics_from_json(metrics_to_json(found)) == found


@pytest.mark.parametrize(
    ("reward", "told"), [(1.0, "right"), (0.0, "wrong"), (0.375, "0.38 of 1"), (None, "not judged"), (1, "right")]
)
def test_a_reward_in_words(reward: float | None, told: str) -> None:
    assert told_reward(reward) == told


PREMATURE_CASES = {
    "no tool at all": (trajectory(), True),
    "no tool there": (trajectory(offers_tools=False), False),
    "page holds the answer": (trajectory(search(LISTING), visit(PAGE)), False),
    "only a listing holds it": (trajectory(search(LISTING)), True),
    "no results": (trajectory(search("no results")), True),
    "one result": (trajectory(search("1 result\n1. city Bado Keli: mayor: person Rato Miku")), True),
    "page holds something else": (trajectory(visit("page: river Bado Keli\nmouth: city Zano Pile")), True),
    "wrong answer that the page states": (trajectory(visit(PAGE), answer="Zano Pile", reward=0.0), False),
    "wrong answer that no page states": (trajectory(visit(PAGE), answer="Noru Tabe", reward=0.0), True),
    "first a miss, then the page": (trajectory(visit("no page named city Bado Kela"), visit(PAGE)), False),
    "the miss repeats the guess": (trajectory(visit("no page named person Rato Miku", "person Rato Miku")), True),
    "the miss repeats the guess, with a notice": (
        trajectory(visit("no page named person Rato Miku\nlast step: answer now", "person Rato Miku")),
        True,
    ),
    "listing with a notice": (trajectory(search(LISTING + "\nlast step: answer now")), True),
    "page with a notice": (trajectory(visit(PAGE + "\nlast step: answer now")), False),
    "a redirect names it": (trajectory(visit("page: city Old Name\nsee: city Bado Keli"), answer="Bado Keli"), False),
    "refused action": (
        trajectory(
            {"call": ToolCall("vist", {"page": "x"}), "problem": "unknown tool", "observation": "unknown tool\nRato Miku"}
        ),
        True,
    ),
    "malformed action": (trajectory({"problem": "malformed", "observation": "malformed\nRato Miku"}), True),
    "other case and spacing": (trajectory(visit(PAGE), answer=" rato  MIKU "), False),
    "part of a longer name": (trajectory(visit("page: person Rato Mikuno\nhome: city Bado"), answer="Rato Miku"), True),
    "computed by a tool": (
        trajectory({"call": ToolCall("python", {"code": "print(6 * 7)"}), "observation": "42"}, answer="42"),
        False,
    ),
    "no spaces between words": (trajectory(visit("页面：北京\n市长是张三，生于1960年"), answer="张三"), False),
    "right in other words": (trajectory(visit(PAGE), answer="The mayor is Rato Miku.", reward=1.0), False),
    "wrong in other words": (trajectory(visit(PAGE), answer="It might be Rato Miku or another", reward=0.0), True),
    "empty answer": (trajectory(visit(PAGE), answer="", reward=0.0), True),
    "forced": (trajectory(search(LISTING), status="forced"), False),
    "unanswered": (trajectory(visit(PAGE), answer=None, status="unanswered", reward=0.0), False),
    "failed": (trajectory(answer=None, status="failed", reward=None), False),
}


@pytest.mark.parametrize("name", PREMATURE_CASES)
def test_premature_cases(name: str) -> None:
    given_trajectory, expected = PREMATURE_CASES[name]
    assert is_premature(given_trajectory, ["Rato Miku"]) is expected


def test_a_page_read_after_the_answer_is_no_evidence() -> None:
    t = trajectory({"answer": "Rato Miku"}, visit(PAGE), answer=None)
    late = Trajectory(t.id, t.task_id, 0, 0, t.system, t.question, t.steps, "answered", "Rato Miku", 1.0)
    assert is_premature(late, ["Rato Miku"])
    assert answered_without_tool(late)


def test_the_reference_alone_never_excuses_a_wrong_answer() -> None:
    wrong = trajectory(visit(PAGE), answer="Noru Tabe", reward=0.0)
    unjudged = trajectory(visit(PAGE), answer="Noru Tabe", reward=None)
    assert is_premature(wrong, ["Rato Miku"])
    assert is_premature(unjudged, ["Rato Miku"])


@pytest.mark.parametrize(
    ("t", "expected"),
    [
        (trajectory(), True),
        (trajectory({"problem": "malformed", "observation": "no call found"}), True),
        (trajectory(search("no results")), False),
        (trajectory(status="forced"), False),
        (trajectory(answer=None, status="unanswered"), False),
    ],
)
def test_answered_without_tool(t: Trajectory, expected: bool) -> None:
    assert answered_without_tool(t) is expected


@pytest.mark.parametrize(
    ("value", "text", "expected"),
    [
        ("5", "built in 1995", False),
        ("5", "5 arches", True),
        ("C++", "written in C++.", True),
        ('"Rato Miku".', "mayor: person Rato Miku", True),
        ("?", "who?", True),
        ("Ｒato", "rato", True),  # full-width letter
        ("café", "the cafe\u0301 of", True),
        ("", "anything", False),
        ("a.c", "abc", False),
    ],
)
def test_stands_in(value: str, text: str, expected: bool) -> None:
    assert stands_in(value, text) is expected


@settings(deadline=None, max_examples=60)
@given(st.text(min_size=1, max_size=20), st.text(max_size=30), st.text(max_size=30))
def test_a_value_on_a_line_of_its_own_is_found(value: str, before: str, after: str) -> None:
    assert stands_in(value, f"{before}\n{value}\n{after}") is bool("".join(value.split()))


def test_listings() -> None:
    assert is_listing(LISTING)
    assert is_listing("no results")
    assert is_listing("no results\nlast step: answer now")
    assert not is_listing(PAGE)
    assert not is_listing("page: 2 results of the vote")


TASKS = {
    "t1": Task("t1", "q", "Rato Miku", metadata={"hops": "1", "url": "u1"}),
    "t2": Task("t2", "q", "Rato Miku", metadata={"hops": "2", "url": "u2"}),
    "t3": Task("t3", "q", "Rato Miku", metadata={"hops": "2", "url": "u3"}),
    "t4": Task("t4", "q", "Rato Miku"),
}


def mixed() -> list[Trajectory]:
    malformed = {"problem": "malformed", "observation": "?"}
    return [
        trajectory(visit(PAGE), task="t1", reward=1.0),
        trajectory(task="t2", answer="Zano Pile", reward=0.0),
        trajectory(visit(PAGE), task="t3", reward=None),
        trajectory(
            search(LISTING),
            malformed,
            task="t4",
            answer=None,
            status="unanswered",
            reward=0.0,
        ),
    ]


def test_shares_by_hand() -> None:
    m = measure(mixed(), TASKS, resamples=200)
    assert (m.n, m.tasks, m.judged) == (4, 4, 3)
    assert m.success == pytest.approx(1 / 3), "the one that was not judged is not a wrong one"
    assert m.success_all == 0.25, "what was not judged lends no success to the whole"
    assert (m.premature, m.no_tool, m.forced, m.unanswered, m.failed) == (0.25, 0.25, 0.0, 0.25, 0.0)
    assert m.turns == pytest.approx((2 + 1 + 2 + 2) / 4)
    assert m.tokens == pytest.approx((5 + 2 + 5 + 6) / 4)
    assert m.problems == 0.25
    assert m.by["hops"]["2"].n == 2
    assert m.by["hops"]["2"].judged == 1
    assert m.by["hops"]["2"].success == 0.0
    assert m.by["hops"]["1"].success == 1.0
    assert set(m.intervals) == {
        "success",
        "success_all",
        "premature",
        "no_tool",
        "forced",
        "unanswered",
        "failed",
        "turns",
        "tokens",
        "problems",
    }
    for name, interval in m.intervals.items():
        assert interval is not None
        assert interval[0] <= getattr(m, name) <= interval[1], name


def test_nothing_judged_is_unknown() -> None:
    m = measure([trajectory(reward=None)], TASKS, resamples=100)
    assert (m.n, m.judged, m.success, m.intervals["success"]) == (1, 0, None, None)
    assert m.success_all == 0.0
    assert m.premature == 1.0


def test_no_episode_is_unknown() -> None:
    m = measure([], TASKS)
    assert (m.n, m.judged, m.success, m.premature, m.turns) == (0, 0, None, None, None)
    assert metrics_from_json(json.loads(json.dumps(metrics_to_json(m)))) == m


def test_ids_make_no_breakdown() -> None:
    tasks = {f"t{i}": Task(f"t{i}", "q", "a", metadata={"id": str(i), "hops": str(i % 3)}) for i in range(13)}
    m = measure([trajectory(task=task) for task in tasks], tasks, resamples=100)
    assert set(m.by) == {"hops"}
    assert sum(b.n for b in m.by["hops"].values()) == 13


def test_a_right_answer_by_an_alias_has_the_evidence_of_any_name() -> None:
    task = Task("t1", "q", "Rato Mikunen", metadata={"aliases": "Mayor Miku|Rato Miku"})
    t = trajectory(visit(PAGE), answer="Mayor Miku", reward=1.0)
    m = measure([t], {"t1": task}, resamples=100)
    assert m.premature == 0.0
    assert m.by == {}, "aliases are no breakdown"


def test_an_unknown_task_is_named() -> None:
    with pytest.raises(DataError, match="'t9'"):
        measure([trajectory(task="t9")], TASKS)


def test_scores_keep_what_the_gate_reads() -> None:
    scores = score_trajectories(mixed(), TASKS, "without")
    assert [s.task_id for s in scores] == ["t1", "t2", "t3", "t4"]
    assert [s.premature for s in scores] == [False, True, False, False]
    assert [s.reward for s in scores] == [1.0, 0.0, None, 0.0]
    assert [s.tokens for s in scores] == [5, 2, 5, 6]
    assert scores[1].metadata == {"hops": "2", "url": "u2"}
    assert {s.condition for s in scores} == {"without"}


def test_json_is_lossless_and_the_settings_decide() -> None:
    settings = EvaluationSettings(bootstrap=150, seed=4)
    content = evaluate_summary(mixed(), TASKS.values(), settings)
    assert content == evaluate_summary(mixed(), TASKS, settings)
    assert metrics_from_json(json.loads(json.dumps(content))) == measure(mixed(), TASKS, resamples=150, seed=4)


def test_a_summary_of_an_earlier_version_is_read() -> None:
    content = metrics_to_json(measure(mixed(), TASKS, resamples=100))
    del content["success_all"], content["intervals"]["success_all"]
    found = metrics_from_json(content)
    assert (found.success_all, found.success) == (None, pytest.approx(1 / 3))


@pytest.mark.parametrize("broken", [{}, {"n": 1}, None, {"n": "many", "tasks": 1, "judged": 1}])
def test_a_broken_file_is_a_data_error(broken: object) -> None:
    with pytest.raises(DataError, match="metrics"):
        metrics_from_json(broken)  # type: ignore[arg-type]


@settings(deadline=None, max_examples=60)
@given(
    st.lists(
        st.tuples(
            st.sampled_from(["answered", "forced", "ended", "unanswered", "failed"]),
            st.booleans(),
            st.sampled_from([0.0, 1.0, None]),
        ),
        min_size=1,
        max_size=20,
    )
)
def test_every_episode_ends_in_one_way(rows: list[tuple[TrajectoryStatus, bool, float | None]]) -> None:
    made = [
        trajectory(
            *([visit(PAGE)] if read else []),
            status=status,
            answer="Rato Miku" if status in ("answered", "forced") else None,
            reward=reward,
            rollout=i,
        )
        for i, (status, read, reward) in enumerate(rows)
    ]
    m = measure(made, TASKS, resamples=100)
    assert m.no_tool is not None
    assert m.premature is not None
    assert m.no_tool <= m.premature
    grounded = sum(status == "answered" and read for status, read, _ in rows) / len(rows)
    others = (m.forced or 0) + (m.ended or 0) + (m.unanswered or 0) + (m.failed or 0)
    assert grounded + m.premature + others == pytest.approx(1.0)
    assert m.ended_solved == sum(status == "ended" and reward == 1 for status, _, reward in rows) / len(rows)
