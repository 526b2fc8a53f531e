"""The miner on synthetic trajectories with a planted effect, with none, and over several iterations."""

from __future__ import annotations

import json
import random
import time
from collections.abc import Callable
from dataclasses import replace

import pytest
from experience_builders import QUESTION, answer, malformed, search, trajectory, visit

from evolve_dag.experience.extraction.contrast import MAX_TRAJECTORY_IDS, Mined, mine
from evolve_dag.experience.extraction.evidence import Effect, Evidence, Moments, discoveries, welch
from evolve_dag.experience.extraction.mining import ContrastExtraction, extract
from evolve_dag.experience.extraction.reconcile import reconcile, subsumed
from evolve_dag.experience.extraction.situations import condition_of, situations_of
from evolve_dag.experience.features import HISTORY, features, looks_back
from evolve_dag.experience.phrases import render
from evolve_dag.experience.pool import Pool, Proposal
from evolve_dag.records import Step, Trajectory

SHARED = "2 results\n1. river Bado Keli: mouth: city Zano Pile\n2. person Bado Keli: home: city Zano Pile"
ONE = "1 result\n1. person Bado Keli: home: city Zano Pile"
PARTIAL = "page: person Bado Keli\nhome: city Zano Pile"
ASKED = "page: city Zano Pile\nmayor: person Rato Miku"

SHARED_STATE = condition_of({"observation": "listing"})
FITTING = visit("person Bado Keli", "page: person Bado Keli\nhome: city Zano Pile")
FIRST = visit("river Bado Keli", "page: river Bado Keli\nmouth: city Zano Pile")


def simulate(seed: int, tasks: int, group: int, success: dict[str, float], listing: str = SHARED) -> list[Trajectory]:
    """After one search, a coin decides between opening the fitting and the first page; ``success`` is its chance."""
    draw = random.Random(seed)
    found = []
    for task in range(tasks):
        for rollout in range(group):
            choice = draw.choice(["fitting", "first"])
            steps = [search("Bado Keli", listing), FITTING if choice == "fitting" else FIRST, answer("Rato Miku")]
            found.append(trajectory(f"t{task}", rollout, steps, float(draw.random() < success[choice])))
    return found


def lift_of(mined: Mined, action: str = "open_fitting") -> tuple[float, float, float]:
    effect = mined.effect(SHARED_STATE, action)
    assert effect is not None
    return effect.lift, effect.low, effect.high


def test_lift_by_hand() -> None:
    # Two groups of two. Group means 0.5 and 0.5; fitting: +0.5, +0.5; first: -0.5, -0.5. Lift = 0.5 - (-0.5) = 1.
    rows = [("a", FITTING, 1.0), ("a", FIRST, 0.0), ("b", FITTING, 1.0), ("b", FIRST, 0.0)]
    data = [trajectory(t, n, [search("Bado Keli", SHARED), step, answer("x")], r) for n, (t, step, r) in enumerate(rows)]
    lift, low, high = lift_of(mine(data))
    assert lift == pytest.approx(1.0)
    assert low < 1.0 < high  # two successes of two are not certain: the floor on the variance
    assert lift_of(mine(data), "open_first")[0] == pytest.approx(-1.0)


def test_a_trajectory_counts_once_per_pattern_and_not_against_itself() -> None:
    both = [search("Bado Keli", SHARED), FIRST, search("Bado Keli x", SHARED), FITTING, answer("x")]
    only = [search("Bado Keli", SHARED), FIRST, answer("x")]
    data = [trajectory("a", n, both if n < 2 else only, float(n < 2)) for n in range(4)]
    effect = mine(data).effect(SHARED_STATE, "open_fitting")
    assert effect is not None
    assert (effect.support, effect.others) == (2, 2)
    assert mine(data).effect(SHARED_STATE, "open_first") is None  # all four show it: no contrast


def test_a_planted_effect_is_found_with_the_right_sign_and_provenance() -> None:
    data = simulate(1, 100, 4, {"fitting": 0.7, "first": 0.2})
    mined = mine(data, min_support=10)
    assert [p.text for p in mined.patterns] == ["Match: when the search shows results, open the page that fits the question."]
    pattern = mined.patterns[0]
    assert pattern.action == "open_fitting"
    assert 0 < pattern.effect.low < pattern.effect.lift < pattern.effect.high
    by_id = {t.id: t for t in data}
    assert len(pattern.trajectory_ids) == MAX_TRAJECTORY_IDS < pattern.effect.support
    assert all(by_id[i].reward == 1.0 and FITTING in by_id[i].steps for i in pattern.trajectory_ids)


def test_the_interval_covers_and_no_effect_is_seldom_found() -> None:
    effect, null = {"fitting": 0.7, "first": 0.3}, {"fitting": 0.5, "first": 0.5}
    # The estimand includes the conditioning on mixed groups: its value comes from one very large sample.
    truth, low, high = lift_of(mine(simulate(10_000, 2_000, 4, effect)))
    assert high - low < 0.06
    seeds = range(200)
    covered = [low <= truth <= high for _, low, high in (lift_of(mine(simulate(s, 25, 4, effect))) for s in seeds[:120])]
    # 95% nominal; binomial standard error over 120 seeds is 2%
    assert sum(covered) / len(covered) >= 0.90
    null_data = [mine(simulate(s, 25, 4, null), min_support=5, min_lift=0.0) for s in seeds]
    # Each side of the two-sided 95% interval errs 2.5% of the time: two patterns a seed, at most one of them can win.
    wrong = [lift_of(m, a)[1] > 0 for m in null_data for a in ("open_fitting", "open_first")]
    assert 0.005 <= sum(wrong) / len(wrong) <= 0.05
    assert sum(bool(m.patterns) for m in null_data) / len(seeds) <= 0.10


def test_only_mixed_groups_and_judged_trajectories_teach() -> None:
    data = simulate(2, 60, 4, {"fitting": 0.7, "first": 0.2})
    mined = mine(data)
    steps = [search("Bado Keli", SHARED), FIRST, answer("x")]
    always = [trajectory("always", n, steps, 1.0) for n in range(50)]
    never = [trajectory("never", n, steps, 0.0) for n in range(50)]
    # Not judged: as zeros they would turn this group of successes into a mixed one that praises 'first'.
    unjudged = [trajectory("half", n, steps, 1.0) for n in range(20)]
    unjudged += [trajectory("half", 20 + n, [search("Bado Keli", SHARED), FITTING, answer("x")], None) for n in range(20)]
    more = mine(data + always + never + unjudged)
    assert [(p.text, p.effect) for p in more.patterns] == [(p.text, p.effect) for p in mined.patterns]
    assert more.statistics["mixed_groups"] == mined.statistics["mixed_groups"]
    assert more.statistics["not_judged"] == 20
    assert more.statistics["judged"] == mined.statistics["judged"] + 120


def test_the_order_of_the_trajectories_does_not_matter() -> None:
    data = simulate(3, 60, 4, {"fitting": 0.8, "first": 0.2})
    shuffled = list(data)
    random.Random(0).shuffle(shuffled)
    a, b = mine(data, seed=5), mine(shuffled, seed=5)
    assert a.patterns == b.patterns
    assert a.statistics == b.statistics
    assert mine(data, seed=6).patterns[0].trajectory_ids != a.patterns[0].trajectory_ids


def test_thresholds() -> None:
    data = simulate(1, 100, 4, {"fitting": 0.7, "first": 0.2})
    support = mine(data).patterns[0].effect.support
    lift = mine(data).patterns[0].effect.lift
    assert mine(data, min_support=support).patterns
    assert not mine(data, min_support=support + 1).patterns
    assert not mine(data, min_lift=lift + 1e-6).patterns
    assert mine([]).patterns == ()
    assert mine(simulate(1, 5, 1, {"fitting": 0.7, "first": 0.2})).patterns == ()  # groups of one have no contrast


def test_malformed_is_never_advice() -> None:
    data = []
    for task in range(40):
        data += [trajectory(f"t{task}", n, [malformed(), answer("x")], 1.0) for n in range(2)]
        data += [trajectory(f"t{task}", n, [answer("x")], 0.0) for n in range(2, 4)]
    assert all(p.action != "malformed" for p in mine(data).patterns)


def two_listings(seed: int, good_when_one: str, good_when_several: str) -> list[Trajectory]:
    """Listings of one result, and of several; what pays may differ between them."""
    draw = random.Random(seed)
    found = []
    for task in range(120):
        listing, good = (ONE, good_when_one) if task % 2 else (SHARED, good_when_several)
        for rollout in range(4):
            choice = draw.choice(["answer", "search"])
            step = answer("Zano Pile") if choice == "answer" else search("Zano Pile mayor", "no results")
            steps = [search("Bado Keli", listing), step]
            found.append(trajectory(f"t{task}", rollout, steps, float(draw.random() < (0.8 if choice == good else 0.2))))
    return found


def test_special_cases_that_disagree_replace_the_general_rule() -> None:
    found = {p.text for p in mine(two_listings(0, "answer", "search")).patterns}
    assert found == {
        "Trust: when the search shows one result, trust the listed value.",
        "Narrow: when the search shows several results, search only the short name.",
    }


def test_special_cases_that_add_nothing_are_left_out() -> None:
    assert [p.text for p in mine(two_listings(0, "search", "search")).patterns] == [
        "Narrow: when the search shows results, search only the short name."
    ]


def test_the_lattice_holds_only_situations_that_are_true_and_can_be_said() -> None:
    from evolve_dag.experience.phrases import situation_text

    cases = [[], [search("x", "no results")], [search("x", ONE)], [search("x", SHARED)], [visit("x", ASKED)], [malformed()],
             [visit("x", "page: city Zano Pile\nmayor: person Rato Miku old")],
             [search("x", "2 results\n1. city Alo Be\n2. city Ceto Di")]]  # fmt: skip
    for steps in cases:
        state = features(QUESTION, steps)
        conditions = list(situations_of(state))
        assert len(set(conditions)) == len(conditions)
        texts = [situation_text(dict(c)) for c in conditions]
        assert len(set(texts)) == len(texts)
        for condition in conditions:
            assert set(condition) <= set(state.items())
            assert "observation" in dict(condition)


MARKED = "page: city Zano Pile\nmayor: person Rato Miku old"


def test_advice_for_any_page_does_not_reach_under_a_mark() -> None:
    """What a page shows of the question stands in every condition about pages."""
    for page in (ASKED, PARTIAL, MARKED):
        for condition in situations_of(features(QUESTION, [visit("x", page)])):
            assert dict(condition).keys() >= {"evidence"}
    (marked,) = [c for c in situations_of(features(QUESTION, [visit("x", MARKED)])) if "repeat" not in dict(c)]
    assert dict(marked) == {"observation": "page", "evidence": "asked", "mark": "old"}


def test_advice_that_always_fails_in_a_part_of_its_situation_is_refused() -> None:
    """Under one kind of listing 'fitting' pays in mixed groups; under the other it never does, and nothing else was tried
    with success, so that no group there is mixed and the contrast alone praises 'fitting' for both."""
    data = simulate(1, 60, 4, {"fitting": 0.8, "first": 0.1}, SHARED)
    alone = simulate(2, 40, 4, {"fitting": 0.0, "first": 0.0}, ONE)
    alone = [replace(t, task_id=f"u{t.task_id}", id=f"u{t.id}") for t in alone]
    assert [p.text for p in mine(data).patterns] == [
        "Match: when the search shows results, open the page that fits the question."
    ]
    both = mine(data + alone)
    assert [p.text for p in both.patterns] == [
        "Match: when the search shows several results, open the page that fits the question."
    ]
    assert both.statistics["patterns_too_general"] > 0


def test_false_discoveries_are_held_down() -> None:
    """Benjamini and Hochberg by hand: of p = 0.01, 0.02, 0.03, 0.2 at 5% the bounds are 0.0125, 0.025, 0.0375, 0.05."""
    effects = {
        ((("observation", str(n)),), "search_short"): Effect(5, 5, 0.1, 0.0, 0.2, p)
        for n, p in enumerate((0.03, 0.2, 0.01, 0.02))
    }
    assert [dict(c)["observation"] for c, _ in discoveries(effects, 0.05)] == ["2", "3", "0"]
    assert discoveries(effects, 0.01) == {}
    assert discoveries({}, 0.05) == {}


def test_where_most_is_found_an_interval_may_just_include_zero() -> None:
    """12 of 20 against 6 of 20: 97% one-sided, so the two-sided interval of 95% begins below zero. A rate of false discoveries
    is held, not a level of each interval."""
    acted, others, all_of_them = (Moments(n, won, won, won) for n, won in ((20, 12), (20, 6), (40, 18)))
    weak = Effect(20, 20, *welch(acted, others, all_of_them.variance, 0.95))
    assert 0.025 < weak.p < 0.05
    assert weak.low < 0
    strong = replace(weak, p=0.001)
    effects = {((("observation", str(n)),), "search_short"): effect for n, effect in enumerate((weak, strong, strong))}
    assert discoveries(effects, 0.05) == effects
    nothing = {((("observation", str(n)),), "search_short"): replace(weak, p=0.9) for n in range(3, 9)}
    assert weak not in discoveries(effects | nothing, 0.05).values(), "among much that is nothing it is not believed"


def test_moments_match_a_plain_computation() -> None:
    values = [0.5, -0.5, 0.25]
    moments = Moments(3, sum(values), sum(values), sum(v * v for v in values))
    mean = sum(values) / 3
    assert moments.mean == pytest.approx(mean)
    assert moments.variance == pytest.approx(sum((v - mean) ** 2 for v in values) / 2)
    assert Moments(1, 0.5, 0.5, 0.25).variance == 0.0


SETTINGS = ContrastExtraction()


def run(data: list[Trajectory], pool: Pool, iteration: int, cap: int = 12) -> tuple[Pool, list[tuple[str, str]]]:
    settings = SETTINGS.model_copy(update={"cap": cap})
    result = extract(data, pool, granularity="principle", settings=settings, iteration=iteration, seed=0)
    assert result.statistics["items"] == len(result.pool)
    return result.pool, [(e.operation, e.item_id) for e in result.edits]


def test_items_live_through_iterations() -> None:
    pool, edits = run(simulate(1, 100, 4, {"fitting": 0.7, "first": 0.2}), Pool(), 1)
    assert edits == [("add", "p0001")]
    same, edits = run([], pool, 2)
    assert (same, edits) == (pool, [])  # silence refutes nothing, and makes no version
    updated, edits = run(simulate(2, 100, 4, {"fitting": 0.6, "first": 0.3}), pool, 2)
    assert edits == [("update", "p0001")]
    item = updated.get("p0001")
    assert item.text == pool.get("p0001").text
    assert item.evidence != pool.get("p0001").evidence
    assert (item.created, item.updated) == (1, 2)
    replaced, edits = run(simulate(3, 100, 4, {"fitting": 0.2, "first": 0.7}), updated, 3)
    assert edits == [("delete", "p0001"), ("add", "p0002")]
    assert replaced.items[0].text == "First: when the search shows results, open the first result."


def test_a_general_item_goes_when_its_special_cases_disagree() -> None:
    pool, _ = run(two_listings(0, "search", "search"), Pool(), 1)
    assert pool.ids == ("p0001",)
    after, edits = run(two_listings(1, "answer", "search"), pool, 2)
    # The special case that agrees comes as an item of its own, because the rule that covered it is gone.
    assert ("delete", "p0001") in edits
    assert sorted(i.text.split(":")[0] for i in after.items) == ["Narrow", "Trust"]


def special_case(action: str) -> Pool:
    condition = {"observation": "listing", "listed": "one"}
    proposal = Proposal("add", text=render(condition, action), condition=condition, evidence={"lift": 0.4, "low": 0.2})
    return Pool().apply([proposal], iteration=1, strict=True).pool


def test_a_general_rule_yields_to_a_standing_exception_that_was_not_put_to_the_test() -> None:
    pool = special_case("open_fitting")  # nobody opens anything here
    after, edits = run(two_listings(0, "search", "search"), pool, 2)
    assert edits == []
    assert after == pool


def test_a_general_rule_replaces_an_exception_that_lost() -> None:
    pool = special_case("answer_listed")
    after, edits = run(two_listings(0, "search", "search"), pool, 2)
    assert edits == [("delete", "p0001"), ("add", "p0002")]
    assert after.items[0].text == "Narrow: when the search shows results, search only the short name."


def test_a_general_rule_absorbs_its_special_case() -> None:
    pool = (
        Pool()
        .apply(
            [
                Proposal(
                    "add",
                    text="Narrow: when the search shows one result, search only the short name.",
                    condition={"observation": "listing", "listed": "one"},
                    evidence={"lift": 0.3, "low": 0.1},
                )
            ],
            iteration=1,
        )
        .pool
    )
    after, edits = run(two_listings(0, "search", "search"), pool, 2)
    assert edits == [("add", "p0002"), ("merge", "p0001")]
    assert after.ids == ("p0002",)
    strong = replace(pool.items[0], evidence={"lift": 0.99, "low": 0.95})
    seen = mine(two_listings(0, "search", "search")).seen
    assert subsumed(Pool((strong, *after.items)), seen) == []  # clearly better than the general rule: stays


def test_a_refuted_item_goes_even_when_nothing_replaces_it() -> None:
    pool, _ = run(simulate(1, 100, 4, {"fitting": 0.7, "first": 0.2}), Pool(), 1)
    mined = mine(simulate(3, 100, 4, {"fitting": 0.2, "first": 0.7}), min_support=10_000)
    assert mined.patterns == ()
    assert [(p.operation, p.item_id) for p in reconcile(mined, pool)] == [("delete", "p0001")]


def test_a_withdrawn_item_is_not_learned_again_and_keeps_nothing_else_out() -> None:
    pool, _ = run(simulate(1, 100, 4, {"fitting": 0.7, "first": 0.2}), Pool(), 1)
    gone = pool.apply([Proposal("withdraw", item_id="p0001")], iteration=2).pool
    assert run(simulate(2, 100, 4, {"fitting": 0.6, "first": 0.3}), gone, 2) == (gone, []), "the same lesson was found again"
    after, edits = run(simulate(3, 100, 4, {"fitting": 0.2, "first": 0.7}), gone, 3)
    assert edits == [("add", "p0002")], "the contrary lesson is kept out by advice that stands, not by withdrawn advice"
    assert after.items[0] == gone.items[0], "it stays in the record"


def test_an_item_that_graduated_keeps_out_no_special_case_in_which_the_policy_does_otherwise() -> None:
    """Nobody reads it: what it says of the whole is learned, and is not what the policy does in the part."""
    first = room("begin", "go back; go on", light="on", doors="two")
    played = [("one", "go on", 1.0), ("one", "go back", 0.0), ("two", "go on", 0.0), ("two", "go on", 1.0)]
    data = [
        trajectory(f"t{task}", n, [first, room("go on", "go back; go on", light="on", doors=doors), room(act)], reward)
        for task in range(20)
        for n, (doors, act, reward) in enumerate(played)
    ]
    active = go_on_when(light="on")
    assert reconcile(mine(data), active) == [], "it says so already"
    graduated = Pool((replace(active.items[0], graduated=1, evidence={"lift": 1.0}),))
    proposals = reconcile(mine(data), graduated)
    assert [(p.operation, p.text) for p in proposals] == [("add", "Do: when the doors is one, go on.")]
    after = graduated.apply(proposals, iteration=2).pool
    assert subsumed(after, mine(data).seen) == [], "what nobody reads takes in nothing that is read"
    recalled = after.apply([Proposal("recall", item_id="p0001")], iteration=3).pool
    assert [(p.item_id, p.into) for p in subsumed(recalled, mine(data).seen)] == [("p0002", "p0001")]
    again = go_on(7, light=lambda draw: "on", doors=lambda draw: "two")
    assert reconcile(mine(again), graduated) == [], "the same situation in other words"


def test_items_in_other_words_and_of_other_granularity_are_left_alone() -> None:
    pool = (
        Pool()
        .apply(
            [
                Proposal("add", text="Care: when a list is long, read it twice.", condition=dict(SHARED_STATE)),
                Proposal("add", text="Case: q answer a.", granularity="instance"),
            ],
            iteration=1,
        )
        .pool
    )
    after, edits = run(simulate(1, 100, 4, {"fitting": 0.7, "first": 0.2}), pool, 2)
    assert edits == [("add", "p0003")]
    assert after.items[:2] == pool.items


def test_many_trajectories_cost_in_proportion() -> None:
    """CPU of sixteen times as many, both sides in one run: what is quadratic costs 256 times as much."""

    def cost(tasks: int) -> float:
        data = simulate(4, tasks, 4, {"fitting": 0.7, "first": 0.2})
        long = [replace(t, steps=(*[search(f"q {n}", f"no results {n}") for n in range(3)], *t.steps)) for t in data]
        start = time.process_time()
        assert mine(long).statistics["trajectories"] == 4 * tasks
        return time.process_time() - start

    assert cost(640) < 64 * cost(40)


def test_a_forced_answer_is_no_choice_and_so_no_evidence() -> None:
    forced: list[Step] = [search("Bado Keli", f"{SHARED}\nlast step: answer now"), answer("x")]
    free: list[Step] = [search("Bado Keli", SHARED), answer("x")]
    data = simulate(1, 60, 4, {"fitting": 0.7, "first": 0.2})
    with_forced = mine(data + [trajectory(f"t{n}", 9, forced, 0.0) for n in range(60)])
    with_free = mine(data + [trajectory(f"t{n}", 9, free, 0.0) for n in range(60)])
    assert with_forced.effect(SHARED_STATE, "answer_unseen") is None
    assert with_free.effect(SHARED_STATE, "answer_unseen") is not None


def test_what_an_environment_says_of_itself_becomes_a_lesson() -> None:
    draw = random.Random(5)
    data = []
    for task in range(40):
        for rollout in range(4):
            failed, looked = draw.random() < 0.5, draw.random() < 0.5
            result = {"result": "an error" if failed else "rows"}
            steps = [replace(search("Bado Keli", "text"), features=result)]
            steps += [replace(visit("table", "columns"), features={"result": "rows"})] if looked else []
            chance = 0.9 if failed == looked else 0.2  # to look helps after an error, and nowhere else
            data.append(trajectory(f"t{task}", rollout, [*steps, answer("x")], float(draw.random() < chance)))
    texts = {pattern.text for pattern in mine(data).patterns}
    assert "Source: when the result is an error, call visit." in texts
    assert not any("when the result is rows, call visit" in text for text in texts)


def room(command: str, can: str = "", **features: str) -> Step:
    """A step of a game that says what the command came to, and what can be done then."""
    told = {"did": command, **({"can": can} if can else {}), **features}
    return replace(search(command, "a room"), features=told)


def prize(seed: int, *, says: bool, taken: float) -> list[Trajectory]:
    """Luck puts a prize before half of the players; it is taken by ``taken`` of them, and who has it has won."""
    draw, data = random.Random(seed), []
    for task in range(40):
        for rollout in range(4):
            there, tries = draw.random() < 0.5, draw.random() < taken
            can = ("go on; take it" if there else "go on") if says else ""
            first = room("go on", can, prize="near" if there else "far", floor="dry")
            won = there and tries
            data.append(trajectory(f"t{task}", rollout, [first, room("take it" if won else "go on")], float(won)))
    return data


def test_what_is_possible_in_a_good_place_alone_is_no_good_advice_for_that() -> None:
    """'Take it' is done by winners alone, because losers never could."""
    misled = mine(prize(1, says=False, taken=1.0))
    assert {pattern.text for pattern in misled.patterns} >= {"Do: when the floor is dry, take it."}
    assert mine(prize(1, says=True, taken=1.0)).patterns == ()
    # Of those who could, some did not: now there is something to compare.
    texts = [pattern.text for pattern in mine(prize(1, says=True, taken=0.7)).patterns]
    assert texts == ["Do: when the floor is dry, take it."]  # where it is possible, the prize is near: said once


def test_who_could_not_act_so_is_kept_apart_over_the_nights() -> None:
    condition = condition_of({"observation": "described", "env:floor": "dry"})
    first = mine(prize(1, says=True, taken=0.7)).evidence
    again = Evidence.from_json(first.to_json())
    assert again.barred.keys() == first.barred.keys()
    assert json.loads(again.to_json()) == json.loads(first.to_json())
    barred, free = first.barred[condition, "did:take it"], first.free(condition, "did:take it")
    assert barred.count + free.count == first.situations[condition].count
    assert barred.count > 0
    assert first.faded(0.5).barred[condition, "did:take it"].count == barred.count / 2
    both = mine(prize(2, says=True, taken=0.7), before=first).evidence
    second = mine(prize(2, says=True, taken=0.7)).evidence
    assert both.barred[condition, "did:take it"] == barred + second.barred[condition, "did:take it"]
    # Nobody takes it in a later night: who could not is told from who did not, since another night asks of all of them.
    later = [replace(t, reward=float(n % 2)) for n, t in enumerate(prize(3, says=True, taken=0.0))]
    alone, both = mine(later).evidence, mine(later, before=first).evidence
    assert alone.barred[condition, "did:take it"].count > 0
    assert both.barred[condition, "did:take it"] == barred + alone.barred[condition, "did:take it"]
    # Nor could anybody: such a night says nothing of it, whether it comes before or after.
    never = {"did": "go on", "can": "go on", "prize": "far", "floor": "dry"}
    nowhere = [replace(t, steps=tuple(replace(step, features=never) for step in t.steps)) for t in later]
    unheard = mine(nowhere).evidence
    assert unheard.barred == {}
    assert (unheard + first).free(condition, "did:take it") == free
    assert (first + unheard).free(condition, "did:take it") == free
    stored = Evidence.from_json(unheard.to_json()).faded(0.5)
    assert (stored + first).free(condition, "did:take it").squares == pytest.approx(free.squares)
    # Where nobody is told what could be done, whoever did not do it could have.
    silent = [replace(t, steps=tuple(replace(s, features={"did": "go on", "floor": "dry"}) for s in t.steps)) for t in later]
    free_too = (mine(silent).evidence + first).free(condition, "did:take it")
    assert free_too.count == free.count + mine(silent).evidence.situations[condition].count
    # Everybody could, and nobody did: that is known as well.
    idle = [replace(t, steps=tuple(replace(s, features={**never, "can": "go on; take it"}) for s in t.steps)) for t in later]
    assert (mine(idle).evidence + first).free(condition, "did:take it").count == free.count + len(later)


def test_advice_does_not_reach_where_nobody_tried_it() -> None:
    """To go on pays on the way. Before the prize hardly anybody does, as it is taken there: what is said of the way holds on
    the way alone, and does not contradict what holds before the prize."""
    draw, data = random.Random(3), []
    for task in range(60):
        for rollout in range(4):
            near, goes = draw.random() < 0.4, draw.random() < 0.5
            acts = ("take it" if draw.random() < 0.9 else "go on") if near else "go on" if goes else "go back"
            chance = 0.9 if acts == "take it" else 0.1 if near else 0.8 if goes else 0.2
            first = room("begin", "go back; go on; take it", place="prize" if near else "way", light="on")
            data.append(trajectory(f"t{task}", rollout, [first, room(acts)], float(draw.random() < chance)))
    texts = {pattern.text for pattern in mine(data).patterns}
    assert "Do: when the place is way, go on." in texts
    assert "Do: when the place is prize, take it." in texts
    assert not any("light" in text and text.endswith("go on.") for text in texts)


def test_a_hard_place_does_not_speak_against_what_is_best_there() -> None:
    """To go on is best everywhere; in the dark everybody mostly loses."""
    draw, data = random.Random(4), []
    for task in range(80):
        for rollout in range(4):
            dark, goes = draw.random() < 0.5, draw.random() < 0.5
            chance = (0.3 if goes else 0.02) if dark else (0.9 if goes else 0.5)
            first = room("begin", "go back; go on", light="off" if dark else "on")
            acts = "go on" if goes else "go back"
            data.append(trajectory(f"t{task}", rollout, [first, room(acts)], float(draw.random() < chance)))
    texts = [pattern.text for pattern in mine(data).patterns]
    assert all(text.endswith("go on.") for text in texts)
    assert mine(data).statistics["patterns_too_general"] == 0


def test_advice_that_names_a_feature_tells_its_value() -> None:
    draw, data = random.Random(5), []
    for task in range(60):
        for rollout in range(4):
            way, goes = draw.choice(["north", "south"]), draw.random() < 0.5
            first = room("begin", "go back; go onward", onward=way, light="on")
            acts = "go onward" if goes else "go back"
            data.append(trajectory(f"t{task}", rollout, [first, room(acts)], float(draw.random() < (0.8 if goes else 0.2))))
    texts = {pattern.text for pattern in mine(data).patterns}
    assert texts == {"Do: when the onward is north, go onward.", "Do: when the onward is south, go onward."}


def test_contrary_advice_for_states_that_never_meet_stands_together() -> None:
    """Nothing says that a prize is never on the way; that it never was is seen."""
    draw, data = random.Random(6), []
    for task in range(80):
        for rollout in range(4):
            prize_here, right = draw.random() < 0.4, draw.random() < 0.6
            features = {"prize": "here", "way": "none"} if prize_here else {"prize": "far", "way": "open"}
            acts = ("take it" if right else "go on") if prize_here else ("go on" if right else "go back")
            first = room("begin", "go back; go on; take it", **features)
            data.append(trajectory(f"t{task}", rollout, [first, room(acts)], float(draw.random() < (0.9 if right else 0.1))))
    mined = mine(data)
    texts = {item.text for item in Pool().apply(reconcile(mined, Pool()), iteration=1).pool.items}
    assert {text.rpartition(", ")[2] for text in texts} == {"take it.", "go on."}
    far, way_open, here = (
        condition_of({"observation": "described", name: value})
        for name, value in (("env:prize", "far"), ("env:way", "open"), ("env:prize", "here"))
    )
    assert not mined.meet(way_open, here)
    assert mined.meet(way_open, far)
    # Of what was seen in a night before the sums are left: tonight nobody is far from the prize.
    near = [replace(t, steps=tuple(replace(s, features={**s.features, "prize": "here"}) for s in t.steps)) for t in data]
    assert not mine(near).meet(way_open, far)
    assert mine(near, before=mined.evidence.faded(0.5)).meet(way_open, far)


def go_on(seed: int, **features: Callable[[random.Random], str]) -> list[Trajectory]:
    """To go on pays; ``features`` tell of the place, each drawn for itself."""
    draw, data = random.Random(seed), []
    for task in range(60):
        for rollout in range(4):
            told = {name: value(draw) for name, value in features.items()}
            acts, chance = ("go on", 0.8) if draw.random() < 0.5 else ("go back", 0.2)
            first = room("begin", "go back; go on", **told)
            data.append(trajectory(f"t{task}", rollout, [first, room(acts)], float(draw.random() < chance)))
    return data


def go_on_when(**features: str) -> Pool:
    condition = {"observation": "described"} | {f"env:{name}": value for name, value in features.items()}
    text = render(condition, "did:go on")
    return Pool().apply([Proposal("add", text=text, condition=condition, evidence={"lift": 0.3, "low": 0.2})], iteration=1).pool


def test_a_later_night_does_not_say_the_same_in_other_words() -> None:
    """Doors and light go together: whoever reads of the one needs not be told of the other."""
    data = go_on(7, light=lambda draw: "on", doors=lambda draw: "two")
    pool = go_on_when(light="on")
    assert [pattern.text for pattern in mine(data).patterns] == ["Do: when the doors is two, go on."]
    assert run(data, pool, 2)[1] == []
    withdrawn = pool.apply([Proposal("withdraw", item_id="p0001")], iteration=2).pool
    assert run(data, withdrawn, 2)[1] == [("add", "p0002")], "what is no advice says nothing"


def test_advice_that_reaches_further_takes_the_place_of_the_same_in_other_words() -> None:
    data = go_on(8, light=lambda draw: draw.choice(["on", "dim"]), doors=lambda draw: "two")
    pool = go_on_when(light="dim")
    after, edits = run(data, pool, 2)
    assert edits == [("add", "p0002"), ("merge", "p0001")]
    assert [item.text for item in after.items] == ["Do: when the doors is two, go on."]
    strong = Pool((replace(pool.items[0], evidence={"lift": 0.99, "low": 0.95}),))
    assert subsumed(Pool((*strong.items, *after.items)), mine(data).seen) == [], "clearly better where it holds: stays"
    elsewhere = go_on_when(light="off")  # never met this night: nothing is known of its moments
    assert run(data, elsewhere, 2)[1] == [("add", "p0002")]


@pytest.mark.parametrize("order", ["lsd", "dls", "sdl", "dsl"])
def test_a_chain_of_merges_ends_in_what_reaches_furthest(order: str) -> None:
    draw, steps = random.Random(1), {"l": "light", "s": "sound", "d": "doors"}
    reach = {"light": 0.5, "sound": 0.7, "doors": 1.0}
    data = []
    for rollout in range(60):
        one = draw.random()
        features = {name: "yes" if one < share else "no" for name, share in reach.items()}
        data.append(trajectory("t", rollout, [room("go on", "go back; go on", **features)] * 2, float(rollout % 2)))
    proposals = [
        Proposal("add", text=render(condition, "did:go on"), condition=condition, evidence={"lift": 0.3, "low": 0.1})
        for condition in ({"observation": "described", f"env:{steps[one]}": "yes"} for one in order)
    ]
    pool = Pool().apply(proposals, iteration=1, strict=True).pool
    tidied = pool.apply(subsumed(pool, mine(data).seen), iteration=2)
    assert tidied.refused == []
    assert [item.text for item in tidied.pool.items] == ["Do: when the doors is yes, go on."]


def test_partial_rewards_teach_and_equal_ones_do_not() -> None:
    def data(better: float, worse: float, tasks: int = 10) -> list[Trajectory]:
        rows = [(FITTING, better), (FIRST, worse)] * 2
        return [
            trajectory(f"t{task}", n, [search("Bado Keli", SHARED), step, answer("x")], reward)
            for task in range(tasks)
            for n, (step, reward) in enumerate(rows)
        ]

    assert lift_of(mine(data(0.75, 0.25)))[0] == pytest.approx(0.5)
    (few_points,) = mine(data(0.4, 0.1, tasks=MAX_TRAJECTORY_IDS)).patterns
    assert len(few_points.trajectory_ids) == MAX_TRAJECTORY_IDS, "what did better than its group taught it, however little"
    equal = mine(data(0.5, 0.5))
    assert equal.statistics["mixed_groups"] == 0
    assert equal.effect(SHARED_STATE, "open_fitting") is None


EMPTY = [search(name, "no results") for name in ("Bado", "Keli", "Zano")]
SHORT, LONG = search("Rato", ONE), search("the mayor of the home of person Bado Keli", ONE)


def stuck(seed: int, tasks: int, success: dict[tuple[int, str], float]) -> list[Trajectory]:
    """One or two searches find nothing, then a coin decides between a short and a long one. ``success``: (how many found
    nothing, what was done then) -> chance."""
    draw = random.Random(seed)
    found = []
    for task in range(tasks):
        times = draw.choice((1, 2))
        for rollout in range(4):
            what = draw.choice(("search_short", "search_long"))
            steps = [*EMPTY[:times], SHORT if what == "search_short" else LONG, answer("Rato Miku")]
            found.append(trajectory(f"t{task}", rollout, steps, float(draw.random() < success[times, what])))
    return found


TURNS = {(1, "search_short"): 0.8, (1, "search_long"): 0.2, (2, "search_short"): 0.2, (2, "search_long"): 0.8}
"""What pays after the first failure harms after the second."""


def test_what_hangs_on_how_often_a_thing_came_is_found_where_it_is_asked_for() -> None:
    data = stuck(1, 120, TURNS)
    assert not [p for p in mine(data).patterns if ("observation", "empty") in p.condition and p.action == "search_long"]
    texts = [p.text for p in mine(data, history=True).patterns]
    assert "Broad: when a search returns no results and twice in a row, search the whole question." in texts
    assert not any("no results" in text and "twice" in text and text.startswith("Narrow") for text in texts)


def test_what_is_longer_ago_is_seldom_found_where_there_is_nothing() -> None:
    null = dict.fromkeys(TURNS, 0.5)
    found = [mine(stuck(s, 25, null), min_support=5, min_lift=0.0, history=True).patterns for s in range(100)]
    back = [any(f in HISTORY for p in patterns for f, _ in p.condition) for patterns in found]
    assert sum(back) / len(back) <= 0.10


@pytest.mark.parametrize("chances", [TURNS, {(times, what): 0.8 if what == "search_short" else 0.3 for times, what in TURNS}])
@pytest.mark.parametrize("seed", range(3))
def test_what_is_longer_ago_takes_no_evidence_from_the_rest(seed: int, chances: dict[tuple[int, str], float]) -> None:
    data = stuck(seed, 40, chances)
    plain, back = mine(data), mine(data, history=True)
    assert not any(looks_back(dict(condition)) for condition in plain.evidence.situations)
    assert {c: m for c, m in back.evidence.situations.items() if not looks_back(dict(c))} == plain.evidence.situations
    assert {k: m for k, m in back.evidence.actions.items() if not looks_back(dict(k[0]))} == plain.evidence.actions
    asked = plain.statistics["patterns_tested"]
    assert asked < back.statistics["patterns_tested"]
    assert plain.statistics["patterns_significant"] <= back.statistics["patterns_significant"]


def test_nothing_is_asked_twice() -> None:
    data = [t for t in stuck(0, 40, TURNS) if len(t.steps) == 3]  # one empty search each: nothing of it is longer ago
    plain, back = mine(data), mine(data, history=True)
    assert plain.statistics["patterns_tested"] == back.statistics["patterns_tested"] > 0


def rooms(seed: int, success: dict[tuple[str, str], float]) -> list[Trajectory]:
    """An environment that tells of its lamp, which means nothing; what pays hangs on what led there."""
    draw = random.Random(seed)
    found = []
    for task in range(100):
        for rollout in range(4):
            led, what = draw.choice(("open door", "look")), draw.choice(("go on", "go back"))
            steps = [
                replace(search("x", "a room"), features={"did": did, "lamp": draw.choice(("on", "off"))}) for did in (led, what)
            ]
            found.append(trajectory(f"t{task}", rollout, [*steps, answer("x")], float(draw.random() < success[led, what])))
    return found


def test_what_led_there_is_found_where_an_environment_describes_itself() -> None:
    data = rooms(
        1, {("open door", "go on"): 0.9, ("open door", "go back"): 0.1, ("look", "go on"): 0.1, ("look", "go back"): 0.9}
    )
    assert not mine(data).patterns
    texts = {p.text for p in mine(data, history=True).patterns}
    for lamp in ("on", "off"):
        assert f"Do: when the lamp is {lamp} and that after you open door, go on." in texts
        assert f"Do: when the lamp is {lamp} and that after you look, go back." in texts


FOUND = visit("person Bado Keli", "page: person Bado Keli\nhome: city Zano Pile")
OTHER = visit("river Bado Keli", "page: river Bado Keli\nmouth: city Zano Pile")


def listings(seed: int, success: dict[tuple[bool, bool], float]) -> list[Trajectory]:
    """One or two listings, the last of a short or a long search; what is to be opened hangs on whether it is the second, and
    of a long one."""
    draw = random.Random(seed)
    found = []
    for task in range(120):
        for rollout in range(4):
            long, times, fitting = draw.random() < 0.5, draw.choice((1, 2)), draw.random() < 0.5
            queries = ["Bado"][: times - 1] + (["the mayor of the home of person Bado Keli"] if long else ["Zano"])
            steps = [*(search(q, SHARED) for q in queries), FOUND if fitting else OTHER, answer("x")]
            found.append(trajectory(f"t{task}", rollout, steps, float(draw.random() < success[long and times == 2, fitting])))
    return found


ALIKE = {(False, True): 0.7, (False, False): 0.3, (True, True): 0.7, (True, False): 0.3}
TURNED = {(False, True): 0.7, (False, False): 0.3, (True, True): 0.05, (True, False): 0.95}
"""The second listing, of a long search, asks for the other page."""


@pytest.mark.parametrize("start", [None, {"observation": "listing", "evidence": "part", "repeat": "no"}])
def test_a_lesson_that_is_refuted_in_part_is_replaced_by_what_is_left_of_it(start: dict[str, str] | None) -> None:
    settings = ContrastExtraction(history=True, min_support=5)
    pool, evidence = Pool(), None
    if start is not None:
        item = Proposal(
            "add",
            text=render(start, "open_fitting"),
            granularity="principle",
            condition=start,
            evidence={"lift": 0.4},
            reason="x",
        )
        pool = pool.apply([item], iteration=0).pool
    for night in range(1, 7):
        data = listings(night, ALIKE if night == 1 and start is None else TURNED)
        found = extract(data, pool, granularity="principle", settings=settings, iteration=night, seed=0, before=evidence)
        pool, evidence = found.pool, found.evidence
        assert found.statistics["refused"] == 0, "whatever is found can be said"
    held = [(i.text.split(":")[0], i.condition) for i in pool.active.items]
    states = {
        (in_row, led): {name for name, condition in held if condition.items() <= listed(in_row, led).items()}
        for in_row in ("once", "twice")
        for led in ("search_short", "search_long")
    }
    assert states.pop(("twice", "search_long")) == {"First"}
    assert all(names == {"Match"} for names in states.values()), states


def listed(in_row: str, led: str) -> dict[str, str]:
    """The situation before a page is opened."""
    query = "Zano" if led == "search_short" else "the mayor of the home of person Bado Keli"
    return features(QUESTION, [search(q, SHARED) for q in (["Bado"] if in_row == "twice" else []) + [query]], history=True)


def test_nights_add_up_for_what_is_longer_ago() -> None:
    settings = ContrastExtraction(history=True, min_support=5)
    pool, evidence = Pool(), None
    for night in range(1, 6):
        found = extract(
            stuck(night, 14, TURNS), pool, granularity="principle", settings=settings, iteration=night, seed=0, before=evidence
        )
        assert found.evidence is not None
        pool, evidence = found.pool, Evidence.from_json(found.evidence.to_json())
    twice = [i for i in pool.active.items if i.condition.get("in_row") == "twice"]
    assert [i.text.split(":")[0] for i in twice] == ["Broad"]
    assert not ContrastExtraction().history
