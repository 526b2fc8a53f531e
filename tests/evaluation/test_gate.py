"""The gate: when the champion stays."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from evolve_dag.config.schema import GateSettings
from evolve_dag.errors import DataError
from evolve_dag.evaluation.betting import LEAST
from evolve_dag.evaluation.gate import decide, gate_from_json, gate_to_json
from evolve_dag.records import Score, Standing

SETTINGS = GateSettings()


def score(task: int, reward: float | None = 1.0, *, premature: bool = False, turns: int = 4, rollout: int = 0) -> Score:
    return Score(f"t{task:03d}", rollout, "without", reward, premature, "answered", turns, 20)


def side(rewards: list[float | None], **fields) -> list[Score]:
    return [score(i, reward, **fields) for i, reward in enumerate(rewards)]


def test_a_better_candidate_is_promoted_and_the_reasons_carry_the_numbers() -> None:
    d = decide(side([1.0] * 80 + [0.0] * 20), side([1.0] * 40 + [0.0] * 60), SETTINGS, 0)
    assert d.decision == "promote"
    assert d.reasons[0].startswith("success 80.0% against 40.0%: +40.0 points")
    assert d.evidence["success_difference"] == pytest.approx(0.4)
    low = d.evidence["success_low"]
    assert low is not None
    assert 0.2 < low < 0.4


def test_a_significant_loss_keeps_the_champion() -> None:
    d = decide(side([1.0] * 30 + [0.0] * 70), side([1.0] * 60 + [0.0] * 40), SETTINGS, 0)
    assert d.decision == "keep"
    assert len(d.reasons) == 1
    assert d.reasons[0].startswith("significant loss of success 30.0% against 60.0%: -30.0 points")


def test_a_fall_from_a_champion_that_is_not_known_to_be_the_best_keeps_it() -> None:
    """Best 33%, champion 45% (not significantly better), candidate 30%: against the best nothing is lost."""
    best = [1.0] * 33 + [0.0] * 67
    champion = [0.0] * 10 + [1.0] * 45 + [0.0] * 45
    candidate = [0.0] * 10 + [1.0] * 30 + [0.0] * 60
    assert decide(side(candidate), side(best), SETTINGS, 0).decision == "promote"
    d = decide(side(candidate), side(best), SETTINGS, 0, champion=side(champion))
    assert d.decision == "keep"
    assert [reason.partition(": ")[0] for reason in d.reasons] == [
        "significant loss of success 30.0% against 45.0% of the champion"
    ]
    assert d.evidence["success_champion_difference"] == pytest.approx(-0.15)
    # Better than the best and than the champion: both are told.
    good = decide(side([1.0] * 80 + [0.0] * 20), side(best), SETTINGS, 0, champion=side(champion))
    assert good.decision == "promote"
    assert "success 80.0% against 45.0% of the champion: +35.0 points" in " ".join(good.reasons)
    # Of a champion that nobody could judge nothing is known.
    assert decide(side(candidate), side(best), SETTINGS, 0, champion=side([None] * 100)).decision == "promote"
    with pytest.raises(DataError, match="candidate and champion hold different tasks: 1 on one side only, first 't099'"):
        decide(side(candidate), side(best), SETTINGS, 0, champion=side(champion[:99]))


def test_a_loss_within_the_noise_is_no_reason() -> None:
    champion = [1.0, 0.0] * 50
    candidate = [0.0 if i < 8 else 1.0 if 9 <= i < 14 else v for i, v in enumerate(champion)]
    assert sum(candidate) < sum(champion)
    assert decide(side(candidate), side(champion), SETTINGS, 0).decision == "promote"


def test_rise_of_premature_answers() -> None:
    champion = side([1.0] * 100)

    def candidate(premature: int) -> list[Score]:
        return [score(i, premature=i < premature) for i in range(100)]

    assert decide(candidate(10), champion, SETTINGS, 0).decision == "promote"
    d = decide(candidate(11), champion, SETTINGS, 0)
    assert d.decision == "keep"
    assert d.reasons == ("premature answers 11.0% against 0.0%: +11.0 points, at most +10.0 allowed",)


def test_many_more_turns() -> None:
    assert decide(side([1.0] * 9, turns=8), side([1.0] * 9, turns=4), SETTINGS, 0).decision == "promote"
    d = decide(side([1.0] * 9, turns=9), side([1.0] * 9, turns=4), SETTINGS, 0)
    assert d.decision == "keep"
    assert "2.25 times as many" in d.reasons[0]
    assert d.evidence["turn_ratio"] == 2.25


def test_turns_that_bring_success_are_no_fault() -> None:
    """A base policy that answers after one look takes few turns; whoever has learned to look takes more."""
    d = decide(side([1.0] * 40, turns=9), side([0.0] * 40, turns=4), SETTINGS, 0)
    assert d.decision == "promote"
    assert "2.25 times as many" in " ".join(d.reasons)
    assert decide(side([1.0] + [0.0] * 39, turns=9), side([0.0] * 40, turns=4), SETTINGS, 0).decision == "keep"


def test_premature_answers_that_bring_success_are_no_fault() -> None:
    """Best answers 10% and is forced to in the rest; the candidate answers everything and solves half."""
    best = [score(i, float(i < 13), premature=i < 13) for i in range(128)]
    d = decide([score(i, float(i < 64), premature=True) for i in range(128)], best, SETTINGS, 0)
    assert d.decision == "promote"
    assert "premature answers 100.0% against 10.2%" in " ".join(d.reasons)
    same = [score(i, float(i < 13), premature=True) for i in range(128)]
    assert decide(same, best, SETTINGS, 0).decision == "keep"


def test_every_failed_check_is_named() -> None:
    d = decide(side([0.0] * 50, turns=9, premature=True), side([1.0] * 50), SETTINGS, 0)
    assert d.decision == "keep"
    assert [reason.split()[0] for reason in d.reasons] == ["significant", "premature", "mean"]


@pytest.mark.parametrize("candidate", [[None] * 4, [1.0, None, None, None]])
def test_too_few_judged_keeps(candidate: list[float | None]) -> None:
    d = decide(side(candidate), side([1.0] * 4), SETTINGS, 0)
    assert d.decision == "keep"
    assert "too few to compare" in d.reasons[0]


def test_tasks_judged_on_one_side_only_decide_nothing() -> None:
    champion = side([1.0] * 40 + [None] * 10)
    candidate = side([1.0] * 40 + [0.0] * 10)
    d = decide(candidate, champion, SETTINGS, 0)
    assert d.decision == "promote"
    assert d.evidence["judged_tasks"] == 40
    assert d.evidence["success_difference"] == 0.0


def test_no_task_at_all_keeps() -> None:
    d = decide([], [], SETTINGS, 0)
    assert d.decision == "keep"
    assert "0 of 0" in d.reasons[0]


def test_a_champion_without_turns_has_no_ratio() -> None:
    d = decide(side([1.0] * 3, turns=2), side([1.0] * 3, turns=0), SETTINGS, 0)
    assert d.decision == "promote"
    assert d.evidence["turn_ratio"] is None


def test_other_tasks_are_refused() -> None:
    with pytest.raises(DataError, match=r"different tasks: 1 on one side only, first 't003' \(best champion\)"):
        decide(side([1.0] * 3), side([1.0] * 4), SETTINGS, 0)


def test_a_rollout_twice_is_refused() -> None:
    with pytest.raises(DataError, match="candidate scores hold 1 rollouts more than once"):
        decide([score(0), score(0)], [score(0)], SETTINGS, 0)


def test_a_task_weighs_the_same_however_often_it_was_rolled_out() -> None:
    candidate = [score(0, 0.0), *(score(1, 1.0, rollout=r) for r in range(9))]
    d = decide(candidate, side([0.0, 1.0]), SETTINGS, 0)
    assert d.evidence["success_candidate"] == 0.5
    assert d.evidence["success_difference"] == 0.0


rows = st.lists(st.tuples(st.sampled_from([0.0, 0.5, 1.0]), st.booleans(), st.integers(0, 9)), min_size=1, max_size=30)


@settings(deadline=None, max_examples=60)
@given(rows, st.integers(0, 5))
def test_identical_scores_lose_nothing(values: list[tuple[float, bool, int]], seed: int) -> None:
    scores = [score(i, reward, premature=premature, turns=turns) for i, (reward, premature, turns) in enumerate(values)]
    assert decide(scores, scores, SETTINGS, seed).decision == "promote"


@settings(deadline=None, max_examples=60)
@given(rows, rows, st.integers(0, 5))
def test_more_success_never_turns_promote_into_keep(
    candidate: list[tuple[float, bool, int]], champion: list[tuple[float, bool, int]], seed: int
) -> None:
    n = min(len(candidate), len(champion))

    def made(values: list[tuple[float, bool, int]], **over) -> list[Score]:
        return [score(i, over.get("reward", r), premature=p, turns=t) for i, (r, p, t) in enumerate(values[:n])]

    if decide(made(candidate), made(champion), SETTINGS, seed).decision == "promote":
        assert decide(made(candidate, reward=1.0), made(champion), SETTINGS, seed).decision == "promote"


@settings(deadline=None, max_examples=60)
@given(rows, st.randoms(use_true_random=False))
def test_order_of_rows_decides_nothing(values: list[tuple[float, bool, int]], random) -> None:
    a = [score(i, r, premature=p, turns=t) for i, (r, p, t) in enumerate(values)]
    b = [score(i, 1.0 - r, premature=not p, turns=t) for i, (r, p, t) in enumerate(values)]
    shuffled = list(a)
    random.shuffle(shuffled)
    assert decide(shuffled, b, SETTINGS, 1) == decide(a, b, SETTINGS, 1)


def test_json_is_lossless() -> None:
    before = Standing(3, 2, "a" * 32, None, (0.1, 0.2, 0.3, 0.4, 0.5), 4, 0.01)
    d = decide(side([1.0] * 5), side([0.0] * 5, turns=0), SETTINGS, 0, iteration=4, standing=before)
    assert gate_from_json(json.loads(json.dumps(gate_to_json(d)))) == d


@pytest.mark.parametrize(
    "broken",
    [
        {},
        {"decision": "maybe", "reasons": [], "evidence": {}},
        {"decision": "keep", "reasons": 3, "evidence": {}},
        {"decision": "keep", "reasons": [], "evidence": {}, "standing": {"champion": 1, "capital": ["x"]}},
    ],
)
def test_a_broken_decision_is_a_data_error(broken: dict) -> None:
    with pytest.raises(DataError, match="gate decision"):
        gate_from_json(broken)


def test_a_decision_of_an_earlier_version_is_read() -> None:
    assert gate_from_json({"decision": "keep", "reasons": ["x"], "evidence": {}}).standing == Standing()


# -- both rates


def test_what_was_not_judged_does_not_make_a_candidate_better() -> None:
    """13.3% of all and 22.7% of the judged against 32.0% was once promoted."""
    champion = side([1.0] * 48 + [0.0] * 102)
    candidate = side([1.0] * 20 + [0.0] * 68 + [None] * 62)
    d = decide(candidate, champion, SETTINGS, 0)
    assert d.decision == "keep"
    assert d.evidence["success_all_candidate"] == pytest.approx(20 / 150)
    assert d.evidence["success_all_best"] == pytest.approx(0.32)
    assert any(reason.startswith("significant loss of success of all") for reason in d.reasons)


def test_where_everything_is_judged_there_is_one_rate() -> None:
    d = decide(side([1.0] * 5), side([1.0] * 5), SETTINGS, 0)
    assert not [key for key in d.evidence if key.startswith("success_all")]


# -- the margin, and what could have been seen


def test_a_loss_within_the_margin_is_let_pass() -> None:
    champion, candidate = side([1.0] * 90 + [0.0] * 10), side([1.0] * 82 + [0.0] * 18)
    assert decide(candidate, champion, SETTINGS, 0).decision == "keep"
    assert decide(candidate, champion, SETTINGS.model_copy(update={"margin": 0.1}), 0).decision == "promote"


def test_every_decision_says_what_it_could_have_seen() -> None:
    champion = [1.0, 0.0] * 64
    d = decide(side([1 - r if i < 16 else r for i, r in enumerate(champion)]), side(champion), SETTINGS, 0)
    sd = (18 / 130) ** 0.5  # 16 tasks of 128 differ, and two are invented
    assert d.evidence["success_sd"] == pytest.approx(sd)
    assert d.evidence["success_detectable"] == pytest.approx(SETTINGS.margin + (1.959964 + 0.841621) * sd / 128**0.5, rel=1e-5)
    assert "(a loss of 9.5 points would be seen with 80% power)" in d.reasons[0]


# -- over the nights


def lost(worse: int, better: int = 0, tasks: int = 200) -> tuple[list[Score], list[Score]]:
    """Candidate and best: of ``tasks`` so many got worse and so many better."""
    best = [1.0] * (tasks // 2 + worse) + [0.0] * (tasks // 2 - worse)
    candidate = [0.0] * worse + best[worse : tasks - better] + [1.0] * better
    return side(candidate), side(best)


def through(nights: list[tuple[int, int]], standing: Standing = Standing(), first: int = 1) -> list:
    decisions = []
    for k, (worse, better) in enumerate(nights, first):
        decisions.append(decide(*lost(worse, better), SETTINGS, 0, iteration=k, standing=standing))
        standing = decisions[-1].standing
    return decisions


def test_a_slow_loss_adds_up_until_the_best_comes_back() -> None:
    nights = through([(7, 3)] * 20)
    decisions = [d.decision for d in nights]
    assert decisions[0] == "promote", "two points are no significant loss of a single night"
    at = decisions.index("restore")
    assert 3 <= at <= 12
    assert set(decisions[:at]) == {"promote"}
    restored = nights[at]
    assert restored.reasons[0].startswith(
        f"over {at + 1} nights the candidates since the base policy lost 2.0 points on average"
    )
    assert restored.standing == Standing(), "the base policy is the champion again, and bets begin anew"
    assert nights[at - 1].standing.champion == at


def test_what_is_lost_in_one_night_is_told_of_one_night() -> None:
    [night] = through([(100, 0)], Standing(capital=(2.9,) * 5))
    assert night.reasons[-1].startswith("over 1 night the candidates since the base policy lost 50.0 points on average")


def test_gains_and_losses_that_cancel_out_restore_nothing() -> None:
    assert {d.decision for d in through([(5, 5), (7, 3), (3, 7)] * 10)} == {"promote"}


def test_one_night_that_went_wrong_is_no_drift() -> None:
    even, wrong = through([(5, 5), (60, 0)])
    assert (even.decision, wrong.decision) == ("promote", "keep")
    assert wrong.evidence["drift_evidence"] <= 4 * (even.evidence["drift_evidence"] or 0) + 1e-9
    assert wrong.standing.champion == 1


def test_a_slow_loss_is_seen_after_a_night_that_went_wrong_too() -> None:
    """The high stakes, which such a night makes rich, lose it all on a slow loss; the low ones must not have paid for them."""
    wrong, *nights = [d.decision for d in through([(70, 5), *[(7, 3)] * 20])]
    assert wrong == "keep"
    assert nights.index("restore") < 12


def test_a_candidate_that_knows_nothing_ends_no_lineage() -> None:
    tasks = 1500  # their capital is more than a float holds
    d = decide(side([0.0] * tasks), side([1.0] * tasks), SETTINGS, 0)
    assert d.decision == "keep"
    assert d.standing.capital == pytest.approx([math.log(4.0)] * 5)
    evidence = d.evidence["drift_evidence"]
    assert evidence == pytest.approx(4.0)


def test_nights_that_all_go_wrong_are_one() -> None:
    decisions = [d.decision for d in through([(5, 5), *[(60, 0)] * 4])]
    assert decisions == ["promote", "keep", "keep", "restore", "keep"]


def test_after_two_losses_the_next_candidate_must_not_look_worse() -> None:
    """A loss of 4 points that is not significant passes, but not where two before it were declined for one."""
    poor = Standing(1, 1, capital=(-3.0,) * 5)  # so that no drift is established meanwhile
    assert [d.decision for d in through([(18, 2), (12, 4)], poor, first=2)] == ["keep", "promote"]
    nights = through([(5, 5), (18, 2), (18, 2), (12, 4), (5, 5), (12, 4)], poor, first=2)
    assert [d.decision for d in nights] == ["promote", "keep", "keep", "keep", "promote", "promote"]
    assert [d.standing.declined for d in nights] == [0, 1, 2, 3, 0, 0]
    assert nights[3].reasons == (
        "2 candidates in a row had lost against this champion, so the next one must not look worse: "
        "success 52.0% against 56.0%, at most 0.25 points below allowed",
    )
    assert nights[4].evidence["declined_in_a_row"] == 3
    assert nights[3].standing.champion == 2


def test_what_is_no_loss_turns_no_burden() -> None:
    """Infrastructure that judged nothing, and turns: the next candidate owes no more than any."""
    few = decide(side([None] * 60 + [1.0] * 40), side([1.0] * 100), SETTINGS, 0)
    slow = decide(side([1.0] * 50 + [0.0] * 50, turns=40), side([1.0] * 50 + [0.0] * 50), SETTINGS, 0)
    assert [d.decision for d in (few, slow)] == ["keep", "keep"]
    assert slow.standing.declined == 0


def test_the_champion_that_was_not_trained_owes_nothing_and_pays_no_debt() -> None:
    """It looks worse than the best, which it does not come from, on this night's draws."""
    standing = Standing(4, 2, declined=2)
    night = decide(*lost(12, 4), SETTINGS, 0, iteration=7, standing=standing, unchanged=True)
    assert night.decision == "promote"
    assert night.standing.declined == 2
    assert decide(*lost(12, 4), SETTINGS, 0, iteration=7, standing=standing).decision == "keep"


def test_nights_without_training_spend_no_evidence() -> None:
    """Ten nights whose candidate is the best champion itself, then a slow loss: it is seen as soon as without them."""
    idle = lost(0)
    standing = through([(7, 3)])[-1].standing
    after = standing
    for k in range(2, 12):
        d = decide(*idle, SETTINGS, 0, iteration=k, standing=after, same=True)
        assert d.decision == "promote"
        assert d.evidence["drift_nights"] == 1
        assert "the best champion, which the candidate is" in d.reasons[-1]
        after = d.standing
    assert after == replace(standing, champion=11)
    at = [d.decision for d in through([(7, 3)] * 20, after, first=12)].index("restore")
    assert at == [d.decision for d in through([(7, 3)] * 20, standing, first=2)].index("restore")
    first = decide(*idle, SETTINGS, 0, iteration=1, same=True)
    assert first.standing == Standing(champion=1), "nothing has been bet yet"
    assert gate_from_json(json.loads(json.dumps(gate_to_json(first)))) == first


def test_there_is_nothing_to_go_back_to_while_the_best_holds() -> None:
    nights = through([(60, 0)] * 6)
    assert {d.decision for d in nights} == {"keep"}
    assert {d.standing.champion for d in nights} == {0}


def test_only_a_significantly_better_candidate_becomes_the_best() -> None:
    lucky, better = through([(5, 9), (2, 40)])
    assert (lucky.standing.champion, lucky.standing.best) == (1, 0)
    assert (better.standing.champion, better.standing.best) == (2, 2)
    assert better.standing.nights == 0
    assert sum(better.standing.capital) <= 0, "what was won on the one before is not carried over"


def test_a_slow_loss_is_seen_after_a_climb_too() -> None:
    """Two new bests, forty and thirty points above the ones before; then two points a night against the last."""
    climbed = through([(5, 45), (5, 35)])[-1].standing
    assert (climbed.best, climbed.began) == (2, LEAST)
    after = through([(7, 3)] * 20, climbed, first=3)
    at = [d.decision for d in after].index("restore")
    flat = [d.decision for d in through([(7, 3)] * 20)].index("restore")
    assert flat <= at <= 2 * flat + 1, "it begins with a sixteenth, so it asks for more evidence, and no more than that"
    told = after[0].evidence["drift_detectable"], through([(7, 3)])[0].evidence["drift_detectable"]
    assert told[0] > told[1] * 1.1, "and what it can see says so"


night = st.tuples(st.integers(0, 60), st.integers(0, 60))


@settings(deadline=None, max_examples=30)
@given(st.lists(night, min_size=1, max_size=6))
def test_who_holds_is_the_candidate_the_champion_or_the_best(nights: list[tuple[int, int]]) -> None:
    before = Standing()
    for k, d in enumerate(through(nights), 1):
        assert d.standing.champion == {"promote": k, "keep": before.champion, "restore": before.best}[d.decision]
        assert d.standing.best in (before.best, k)
        assert d.decision != "restore" or before.champion != before.best
        assert (d.standing.best == k) == (d.decision == "promote" and (d.evidence["success_low"] or 0) > 0)
        before = d.standing
