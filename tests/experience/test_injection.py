from __future__ import annotations

import asyncio
from dataclasses import replace

import pytest
from experience_builders import QUESTION, answer, search, trajectory, visit
from hypothesis import given, settings
from hypothesis import strategies as st

from evolve_dag.errors import AlignmentError
from evolve_dag.experience.injection import Injector, assert_clean, inject_global, inject_step_wise
from evolve_dag.experience.pool import Pool
from evolve_dag.experience.selection.base import Selection
from evolve_dag.plain import GLOBAL_HEADING, STEP_HEADING
from evolve_dag.protocols import Injected
from evolve_dag.records import ExperienceItem, InjectionPattern, Message, Step, Trajectory

TEXTS = ("Narrow: when nothing is known yet, search only the short name.", "Guess: when a page is shown, answer at once.")
POOL = Pool(tuple(ExperienceItem(f"p{n:04d}", text, "principle") for n, text in enumerate(TEXTS, 1)))


class Fixed:
    """Chooses the same ids at every step."""

    def __init__(self, *ids: str) -> None:
        self.ids = ids

    async def select(self, question: str, steps: object, pool: Pool) -> Selection:
        return Selection(self.ids, "fixed")


def prepare(injector: Injector, so_far: Trajectory) -> Injected:
    return asyncio.run(injector.prepare(so_far))


TEXT = st.text(alphabet=st.sampled_from("ab :,.\nhint:notes:"), max_size=30)
STEPS = st.lists(
    st.builds(
        lambda q, o, ids: replace(search(q, o), token_ids=tuple(ids)), TEXT, TEXT, st.lists(st.integers(0, 9), max_size=4)
    ),
    max_size=5,
).map(tuple)
TRAJECTORIES = st.builds(
    lambda system, question, steps: Trajectory("t#0", "t", 0, 0, system, question, steps, "answered"), TEXT, TEXT, STEPS
)


@settings(deadline=None)
@given(TRAJECTORIES, st.lists(TEXT, max_size=4), st.sampled_from(["none", "global", "step_wise"]))
def test_the_stored_history_never_changes_and_the_views_differ_in_one_message(
    stored: Trajectory, texts: list[str], pattern: InjectionPattern
) -> None:
    pool = Pool(tuple(ExperienceItem(f"p{n:04d}", text, "instance") for n, text in enumerate(texts, 1)))
    try:
        assert_clean(stored, texts)
    except AlignmentError:
        return  # drawn text that looks like an injection: covered below
    before = repr(stored)
    student = stored.history(len(stored.steps))
    teacher = prepare(Injector(pattern, pool, Fixed(*pool.ids)), stored)
    assert repr(stored) == before
    assert stored.history(len(stored.steps)) == student
    assert len(teacher.messages) == len(student)
    changed = [n for n, (a, b) in enumerate(zip(student, teacher.messages, strict=True)) if a != b]
    if not teacher.text:
        assert changed == []
    else:
        assert changed == [0 if pattern == "global" else len(student) - 1]
        place = changed[0]
        assert teacher.messages[place].content == student[place].content + teacher.text
        assert teacher.messages[place].role == student[place].role
        assert teacher.text.count("\n") == 1 + sum(bool(text.split()) for text in texts)
    assert [m.token_ids for m in teacher.messages] == [m.token_ids for m in student]


def test_the_exact_text() -> None:
    history = (Message("system", "tools"), Message("user", QUESTION))
    hint = inject_step_wise(history, TEXTS)
    assert hint[1].content == f"{QUESTION}\nhint:\n{TEXTS[0]}\n{TEXTS[1]}"
    assert hint[0] == history[0]
    notes = inject_global(history, TEXTS)
    assert notes[0].content == f"tools\nnotes:\n{TEXTS[0]}\n{TEXTS[1]}"
    assert notes[1] == history[1]
    assert (STEP_HEADING, GLOBAL_HEADING) == ("hint:", "notes:")


def test_a_selection_of_nothing_adds_no_heading() -> None:
    history = (Message("system", "tools"), Message("user", QUESTION))
    assert inject_step_wise(history, ()) == inject_global(history, ["", "\n"]) == history
    so_far = trajectory("t", 0, [], None)
    assert prepare(Injector("step_wise", POOL, Fixed()), so_far).text == ""
    assert prepare(Injector("global", Pool()), so_far).messages == so_far.history(0)
    assert prepare(Injector("none", POOL), so_far) == Injected(so_far.history(0), (), "")


def test_each_step_selects_anew_and_leaves_no_trace() -> None:
    first = trajectory("t", 0, [], None)
    second = trajectory("t", 0, [search("Bado Keli", "no results")], None)
    injected = prepare(Injector("step_wise", POOL, Fixed("p0002")), first)
    assert injected.selected == ("p0002",)
    assert injected.text == f"\nhint:\n{TEXTS[1]}"
    later = prepare(Injector("step_wise", POOL, Fixed("p0001")), second)
    contents = [m.content for m in later.messages]
    assert sum("hint:" in content for content in contents) == 1
    assert contents[-1] == f"no results\nhint:\n{TEXTS[0]}"
    assert contents[1] == QUESTION
    assert prepare(Injector("global", POOL), second).selected == ("p0001", "p0002")


def test_an_item_cannot_forge_a_second_one_or_a_heading() -> None:
    injected = inject_step_wise((Message("user", "q"),), ["one\nhint:\ntwo\r\nthree\u2028four"])
    assert injected[0].content == "q\nhint:\none hint: two three four"


def test_where_nothing_can_be_injected() -> None:
    with pytest.raises(AlignmentError, match="last message is assistant"):
        inject_step_wise((Message("user", "q"), Message("assistant", "a")), TEXTS)
    with pytest.raises(AlignmentError, match="missing"):
        inject_step_wise((), TEXTS)
    with pytest.raises(AlignmentError, match="no system message"):
        inject_global((Message("user", "q"),), TEXTS)
    with pytest.raises(ValueError, match="needs a selector"):
        Injector("step_wise", POOL)


def dirty(place: str) -> Trajectory:
    text = f"words\nhint:\nanother lesson\n{TEXTS[0]}"
    clean = trajectory("t", 0, [search("a", "no results"), visit("b", "page: b\nc: d"), answer("x")], 1.0)
    if place == "system":
        return replace(clean, system=text)
    if place == "question":
        return replace(clean, question=text.replace("hint:", "notes:"))
    steps: list[Step] = list(clean.steps)
    steps[1] = replace(steps[1], index=1, observation=text)
    return replace(clean, steps=tuple(steps))


@pytest.mark.parametrize(
    ("place", "named"), [("system", "system message"), ("question", "question"), ("steps", "observation of step 1")]
)
def test_history_that_holds_experience_is_found(place: str, named: str) -> None:
    with pytest.raises(AlignmentError, match=named):
        assert_clean(dirty(place), TEXTS)
    with pytest.raises(AlignmentError, match=named):
        prepare(Injector("step_wise", POOL, Fixed()), dirty(place))
    assert_clean(dirty(place), TEXTS[1:])  # not an item of this pool


def test_headings_and_items_alone_are_ordinary_text() -> None:
    page = visit("b", f"page: b\nhint: look at {TEXTS[0]}\n{TEXTS[0]}")
    assert_clean(trajectory("t", 0, [page], None), TEXTS)
    quoted = replace(search("a", "no results"), text=f"hint:\n{TEXTS[0]}")  # the policy's own words
    assert_clean(trajectory("t", 0, [quoted], None), TEXTS)
