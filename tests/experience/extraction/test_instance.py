from __future__ import annotations

import random
from dataclasses import replace

from experience_builders import QUESTION, answer, malformed, search, trajectory, visit

from evolve_dag.experience.extraction.base import Extraction
from evolve_dag.experience.extraction.instance import case_text, cases, reconcile
from evolve_dag.experience.extraction.mining import ContrastExtraction, extract
from evolve_dag.experience.pool import Pool
from evolve_dag.records import Step, ToolCall, Trajectory

CAP4 = ContrastExtraction(cap=4)


def group(task: str, rewards: list[float | None], lengths: list[int] | None = None) -> list[Trajectory]:
    question = f"What is the mayor of city {task.title()} Keli?"
    found = []
    for n, reward in enumerate(rewards):
        steps = [search(f"{task} {m}", "no results") for m in range((lengths or [1] * len(rewards))[n])]
        found.append(trajectory(task, n, [*steps, answer("Rato Miku")], reward, question))
    return found


def run(data: list[Trajectory], pool: Pool, iteration: int = 1, seed: int = 0) -> Extraction:
    return extract(data, pool, granularity="instance", settings=CAP4, iteration=iteration, seed=seed)


def test_the_text_is_the_one_agreed() -> None:
    assert case_text(QUESTION, "Rato Miku") == "Case: What is the mayor of the home of person Bado Keli? answer Rato Miku."
    assert case_text(f"{QUESTION}\nlast step: answer now", " Rato\nMiku ") == case_text(QUESTION, "Rato Miku")


def test_the_shortest_success_of_each_task() -> None:
    data = group("alo", [1.0, 1.0, 1.0, 0.0], [3, 1, 2, 0]) + group("bem", [0.0, None, 0.0, 0.0])
    found = cases(data, seed=0)
    assert [(c.trajectory_id, c.steps) for c in found.cases] == [("alo#1", 2)]
    assert found.statistics["not_judged"] == 1
    assert found.statistics["mixed_groups"] == 1


def test_a_success_without_an_answer_is_no_case() -> None:
    data = [trajectory("t", 0, [answer("x")], 1.0, final=None), trajectory("t", 1, [answer("x")], 0.0)]
    assert cases(data, seed=0).cases == ()


def test_mixed_groups_come_first_in_a_seeded_order_that_ignores_the_input_order() -> None:
    data = [t for n in range(10) for t in group(f"easy{n}", [1.0, 1.0])] + [
        t for n in range(6) for t in group(f"hard{n}", [0.0, 1.0])
    ]
    shuffled = list(data)
    random.Random(1).shuffle(shuffled)
    order = [c.trajectory_id for c in cases(data, seed=3).cases]
    assert order == [c.trajectory_id for c in cases(shuffled, seed=3).cases]
    assert all(name.startswith("hard") for name in order[:6])
    assert all(name.startswith("easy") for name in order[6:])
    assert order != [c.trajectory_id for c in cases(data, seed=4).cases]
    result = run(data, Pool())
    assert len(result.pool) == 4
    assert all("Hard" in item.text for item in result.pool.items)
    assert all(item.evidence["lift"] == 0.5 and item.condition == {} for item in result.pool.items)


def test_a_question_has_one_item_over_iterations() -> None:
    first = run(group("alo", [1.0, 0.0]), Pool())
    same = run(group("alo", [1.0, 0.0]), first.pool, 2)
    assert same.edits == ()
    assert same.pool == first.pool
    worse = run(group("alo", [1.0, 0.0, 0.0, 0.0]), first.pool, 2)
    assert [(e.operation, e.item_id) for e in worse.edits] == [("update", "p0001")]
    assert worse.pool.get("p0001").evidence["lift"] == 0.75
    more = run([t for name in ("bem", "cid", "dor", "eka") for t in group(name, [1.0, 0.0, 0.0])], worse.pool, 3)
    # four places: three are free, and the fifth case is no better than what stands
    assert more.pool.ids == ("p0001", "p0002", "p0003", "p0004")
    assert [e.operation for e in more.edits] == ["add"] * 3
    harder = run(group("fil", [1.0, 0.0, 0.0, 0.0, 0.0]), more.pool, 4)
    assert harder.pool.ids == ("p0001", "p0002", "p0003", "p0005")
    assert [(e.operation, e.item_id) for e in harder.edits] == [("add", "p0005"), ("delete", "p0004")]
    assert "over the cap of 4" in harder.edits[-1].reason


def test_two_tasks_with_one_question_make_one_item() -> None:
    data = [trajectory(name, 0, [answer("x")], 1.0) for name in ("a", "b")] + group("cid", [1.0])
    result = run(data, Pool())
    assert len(result.pool) == 2
    assert result.statistics["refused"] == 0


def test_questions_that_hold_the_word_answer_do_not_collide() -> None:
    data = [trajectory("a", 0, [answer("x")], 1.0, "What is the answer to riddle Alo?"),
            trajectory("b", 0, [answer("x")], 1.0, "What is the answer to riddle Bem?")]  # fmt: skip
    pool = run(data, Pool()).pool
    assert len(pool) == 2
    assert reconcile(cases(data, seed=0), pool, cap=4) == []


def game(number: int, way: str, reward: float, rollout: int = 0) -> Trajectory:
    """A plain turn is a command; the system message tells of the game's beginning."""
    steps = [
        Step(n, said, (), (), ToolCall("act", {"command": said}), observation="You are in a room.")
        for n, said in enumerate([f"go {way}", "take coin"])
    ]
    won = trajectory(f"game-{number}", rollout, steps, reward, "Play.", final=None)
    return replace(won, system=f"You play a game: find the coin.\nYou are in room {number}.", status="ended")


def test_a_game_that_was_won_is_told_by_its_beginning_and_what_was_done() -> None:
    data = [
        game(n, way, reward, r) for n, way in ((1, "east"), (2, "east"), (3, "north")) for r, reward in enumerate((1.0, 0.0))
    ]
    first = run(data, Pool())
    assert sorted(item.text for item in first.pool.items) == [
        "Case: Play. You are in room 1. path go east, then take coin.",
        "Case: Play. You are in room 2. path go east, then take coin.",
        "Case: Play. You are in room 3. path go north, then take coin.",
    ]
    again = run([*data, game(1, "east", 0.0, 2)], first.pool, 2)
    assert [e.operation for e in again.edits] == ["update"], "the same game has one item, the others are untouched"
    other = run([game(4, "west", 1.0), game(5, "west", 0.0)], first.pool, 2)
    assert [e.operation for e in other.edits] == ["add"]


def test_of_a_call_that_is_no_plain_turn_the_tool_is_told_and_of_a_refused_one_nothing() -> None:
    steps = [malformed(), replace(visit("x", "no"), problem="no such page"), search("Bado", "1 result"), visit("Alo", "won")]
    data = [trajectory("t", 0, steps, 1.0, "Play.", final=None), trajectory("t", 1, [answer("x")], 0.0, "Play.")]
    assert [case.text for case in cases(data, seed=0).cases] == ["Case: Play. path search Bado, then visit Alo."]


def test_the_path_is_kept_on_demand() -> None:
    steps = [
        search("Bado Keli", "no results"),
        visit("city Alo", "page: city Alo\nmayor: person Rato Miku"),
        answer("Rato Miku"),
    ]
    data = [trajectory("t", 0, steps, 1.0), trajectory("t", 1, [answer("x")], 0.0)]
    plain = extract(data, Pool(), granularity="instance", settings=CAP4, iteration=1, seed=0)
    path = extract(data, Pool(), granularity="instance", settings=CAP4, iteration=1, seed=0, case_path=True)
    assert "search" not in plain.pool.items[0].text
    assert path.pool.items[0].text == f"{plain.pool.items[0].text} path search Bado Keli, then visit city Alo."
