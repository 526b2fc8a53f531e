"""``evolve import``: pools and rollouts that other code wrote, in the shapes in which it wrote them."""

from __future__ import annotations

import json
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pool_replay import outline, replay
from typer.testing import CliRunner

from evolve_dag import cli
from evolve_dag.config.schema import TaskSplit
from evolve_dag.errors import DataError
from evolve_dag.experience.extraction.mining import ContrastExtraction, extract
from evolve_dag.experience.injection import assert_clean
from evolve_dag.experience.pool import Pool
from evolve_dag.interop.pools import artifact_of, pool_digest, pool_from_file, read_pool
from evolve_dag.interop.rollouts import artifact_of_rollouts, detect, import_file, read_rollouts, rollouts_from_file
from evolve_dag.jsonlines import read_objects
from evolve_dag.lineage import garbage
from evolve_dag.lineage.trace import render, trace
from evolve_dag.records import LARGEST_SEED, ExperienceItem, Step, ToolCall
from evolve_dag.steps.policies import open_pool
from evolve_dag.store.artifacts import Ref, Store
from evolve_dag.store.frames import edits_from_frame, load_trajectories
from evolve_dag.store.layout import TASKS
from evolve_dag.store.query import run_sql
from evolve_dag.tasks.formats import load_suite
from evolve_dag.tasks.jsonl import question_id, tasks_from

PRINCIPLE = "Verify: when a snippet names the answer, open its page first."
LOOSE = "Source choice: Prefer named sources over assumptions."
LOCAL = "The mayor of Bado Keli stands on https://example.org/7."
PROMPT = """**Task:** Solve the input problem by leveraging relevant insights from your accumulated experiences

**ACCUMULATED EXPERIENCES:**
[G0]. Prefer named sources.
[G12]. Read pages, not snippets.

**CURRENT PROBLEM:**
{question}"""


def write(path: Path, content: object) -> Path:
    path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
    return path


def write_lines(path: Path, rows: list[dict[str, Any]]) -> Path:
    return write(path, "".join(json.dumps(row) + "\n" for row in rows))


# -- pools


@pytest.mark.parametrize(
    "content",
    [
        {"G0": PRINCIPLE, "G7": LOOSE},  # extraction of the released code, youtu-agent
        {"operations": [], "revision_plan": [], "new_experiences": {"G0": PRINCIPLE, "G7": LOOSE}},  # batch_update.json
        [{"id": "G0", "full_text": f"[G0]. {PRINCIPLE}"}, {"id": "G7", "full_text": f"[G7]. {LOOSE}"}],  # what evaluation wants
        {"experiences": [{"id": "G0", "content": PRINCIPLE}, {"id": "G7", "experience": LOOSE}]},
        {"G0": {"text": PRINCIPLE}, "G7": {"content": LOOSE}},
    ],
)
def test_every_shape_of_a_pool_gives_the_same_pool(tmp_path: Path, content: object) -> None:
    """PEERS 2: extraction writes a dict, step-wise evaluation wants a list, and its own output crashes it."""
    pool = pool_from_file(write(tmp_path / "experiences.json", content))
    assert [(i.id, i.text, i.granularity) for i in pool.items] == [("G0", PRINCIPLE, "principle"), ("G7", LOOSE, "principle")]


def test_texts_without_ids_get_ours(tmp_path: Path) -> None:
    found = read_pool(write(tmp_path / "e.json", [LOOSE, PRINCIPLE]))
    assert found.pool.ids == ("p0001", "p0002")
    assert found.pool.next_number == 3
    assert not found.renamed


def test_ids_that_cannot_be_ours_are_mapped_and_told(tmp_path: Path) -> None:
    content = {"p0004": PRINCIPLE, "a lesson!": LOOSE, "": "Third of them."}
    found = read_pool(write(tmp_path / "e.json", content))
    assert found.pool.ids == ("p0004", "p0005", "p0006")  # past what the file has: an id is never given twice
    assert found.renamed == {"p0005": "a lesson!", "p0006": ""}
    assert any("'a lesson!' is p0005 here" in note for note in found.notes)
    store = Store(tmp_path / "store")
    digest = artifact_of(found.pool, store, "e.json", renamed=found.renamed)
    reasons = {edit.item_id: edit.reason for edit in edits_from_frame(store.open("experience", digest).frame("edits.parquet"))}
    assert reasons["p0005"] == "imported from e.json (there: a lesson!)"
    assert reasons["p0004"] == "imported from e.json"


def test_items_come_in_as_they_are_and_what_is_odd_is_told(tmp_path: Path) -> None:
    long = "Verify: when a page is open, " + "read " * 40 + "it."
    content = {"a": long, "b": "See https://example.org at 3 pm.", "c": "<b>Read</b> the page.", "d": LOOSE, "e": LOOSE.upper()}
    found = read_pool(write(tmp_path / "e.json", content))
    assert [item.text for item in found.pool.items] == list(content.values())
    assert [item.granularity for item in found.pool.items] == ["principle", "instance", "principle", "principle", "principle"]
    assert found.notes == (
        "1 item longer than the 32 words of a new principle (a: 47 words)",
        "1 item with trajectory detail, taken in as instance-level items "
        "(b: holds a URL or domain (https://); holds a number (3))",
        "1 item with markup (c)",
        "1 item with the text of another item (e, as d)",
    )


@pytest.mark.parametrize(
    ("content", "granularities"),
    [
        ([{"text": LOOSE, "granularity": "instance"}, {"text": LOCAL, "granularity": "principle"}], ["instance", "principle"]),
        ({"granularity": "instance", "G0": LOOSE, "G1": LOCAL}, ["instance", "instance"]),
        ({"granularity": "principle", "experiences": [LOOSE, LOCAL]}, ["principle", "principle"]),
        ({"granularity": "principle", "items": {"G0": {"text": LOOSE, "granularity": "instance"}, "G1": LOCAL}},
         ["instance", "principle"]),
        ({"G0": LOOSE, "G1": LOCAL}, ["principle", "instance"]),
        ({"granularity": LOOSE, "G1": LOCAL}, ["principle", "instance"]),  # an item that bears this id
    ],
)  # fmt: skip
def test_what_the_file_or_the_option_states_wins(tmp_path: Path, content: object, granularities: list[str]) -> None:
    path = write(tmp_path / "e.json", content)
    assert [i.granularity for i in read_pool(path).pool.items] == granularities
    for asked in ("principle", "instance"):
        assert {i.granularity for i in read_pool(path, granularity=asked).pool.items} == {asked}


def test_a_principle_that_is_only_stated_is_told(tmp_path: Path) -> None:
    found = read_pool(write(tmp_path / "e.json", [{"id": "G0", "text": LOCAL, "granularity": "principle"}]))
    assert "1 item stated as principle-level, with trajectory detail (G0: holds a URL or domain" in found.notes[0]
    assert Pool.from_json(found.pool.to_json()) == found.pool  # and can be stored


def test_the_option_holds_for_our_own_pools_too(tmp_path: Path) -> None:
    path = write(tmp_path / "pool.json", Pool((ExperienceItem("p0002", LOOSE, "principle"),), 3).to_json())
    assert [i.granularity for i in read_pool(path, granularity="instance").pool.items] == ["instance"]


def test_our_own_pool_is_read_as_it_is(tmp_path: Path) -> None:
    item = ExperienceItem("p0002", PRINCIPLE, "principle", {"observation": "list"}, {"lift": 0.5}, ("t#1",), 2, 3)
    pool = Pool((item,), version=4, next_number=9)
    assert pool_from_file(write(tmp_path / "pool.json", pool.to_json())) == pool


def test_numbers_of_an_item_are_its_evidence(tmp_path: Path) -> None:
    content = [{"id": "G1", "text": PRINCIPLE, "support": 3, "score": 0.5, "author": "me", "good": True}]
    assert pool_from_file(write(tmp_path / "e.json", content)).items[0].evidence == {"support": 3.0, "score": 0.5}


@pytest.mark.parametrize(
    ("text", "what"),
    [
        ("", "empty file"),
        (" \n", "empty file"),
        ("{}", "no item"),
        ("[]", "no item"),
        ("7", "the number 7 that holds no experience"),
        ('{"G0": "a",\n "G1" "b"}', r"line 2, column 7"),
        ("<!DOCTYPE html><html>", "a web page"),
        ('{"G0": "one", "G0": "two"}', "key 'G0' stands 2 times"),
        ('[{"id": "a", "text": "x"}, {"id": "a", "text": "y"}]', r"item 2 \(a\): the same id as item 1 \(a\)"),
        ('{"a": "", "b": null, "c": 3}', r"3 mistakes\n  item 'a': empty\n  item 'b': no text[^\n]*\n  item 'c': no text"),
        ('[{"text": "x", "granularity": "global"}]', "item 1: granularity: must be `principle` or `instance`, not 'global'"),
        ("[" * 100_000, "nested too deeply"),
        (f'{{"p1": {"9" * 5000}}}', "too many digits"),
    ],
)
def test_bad_pools_are_refused_with_file_and_place(tmp_path: Path, text: str, what: str) -> None:
    path = write(tmp_path / "experiences.json", text)
    with pytest.raises(DataError, match=what) as caught:
        read_pool(path)
    assert str(caught.value).startswith(f"{path}: ")
    assert "remedy: " in str(caught.value)


def test_files_that_are_no_text_are_refused(tmp_path: Path) -> None:
    (tmp_path / "e.json").write_bytes(b'{"a": "\xff"}')
    with pytest.raises(DataError, match=r"not UTF-8 \(byte 8\)"):
        read_pool(tmp_path / "e.json")
    with pytest.raises(DataError, match="no such file"):
        read_pool(tmp_path / "missing.json")
    with pytest.raises(DataError, match="is a folder"):
        detect(tmp_path)


@pytest.mark.parametrize(
    "content",
    [
        {"\ud83d": PRINCIPLE, "G1": "Read \ud83d first."},
        [{"id": "\ud83d", "text": PRINCIPLE}, {"id": "G1", "text": "Read \ud83d first."}],
        json.loads(Pool((ExperienceItem("p1", PRINCIPLE, "principle"), ExperienceItem("p2", LOOSE, "principle"))).to_json()),
    ],
)
def test_half_an_emoji_is_a_replacement_character(tmp_path: Path, content: Any) -> None:
    if "items" in content:
        content["items"][1]["text"] = "Read \ud83d first."
    store = Store(tmp_path / "store")
    done = import_file(write(tmp_path / "e.json", content), store, kind="pool")
    pool = open_pool(store.open("experience", done.digest))
    assert [item.text for item in pool.items] == [PRINCIPLE, "Read \ufffd first."]
    assert run_sql(store, "select text from items").height == 2


@settings(max_examples=60, deadline=None)
@given(
    content=st.dictionaries(st.text(max_size=6), st.text(min_size=1, max_size=40).filter(str.strip), min_size=1, max_size=8),
    as_list=st.booleans(),
)
def test_no_item_is_lost_and_the_pool_can_be_stored(
    tmp_path_factory: pytest.TempPathFactory, content: dict[str, str], as_list: bool
) -> None:
    path = tmp_path_factory.mktemp("pools") / "e.json"
    write(path, [{"id": k, "text": v} for k, v in content.items()] if as_list else content)
    found = read_pool(path)
    assert len(found.pool) == len(content)
    assert {found.renamed.get(i.id, i.id) for i in found.pool.items} <= set(content)
    assert Pool.from_json(found.pool.to_json()) == found.pool


def test_an_imported_pool_is_an_experience_artifact(tmp_path: Path) -> None:
    store = Store(tmp_path / "store")
    path = write(tmp_path / "experiences.json", {"G0": PRINCIPLE, "G1": LOOSE})
    done = import_file(path, store, experiment="web")
    assert done.kind == "pool"
    assert done.digest == pool_digest(pool_from_file(path), "experiences.json")  # can be told before it is made
    artifact = store.open("experience", done.digest)
    assert open_pool(artifact) == pool_from_file(path)
    edits = edits_from_frame(artifact.frame("edits.parquet"))
    assert replay(edits) == outline(open_pool(artifact))
    assert {edit.reason for edit in edits} == {"imported from experiences.json"}
    rows = run_sql(store, "select id, granularity, experiment from items order by id").rows()
    assert rows == [("G0", "principle", "web-imported"), ("G1", "principle", "web-imported")]
    assert "imported from experiences.json" in json.dumps(trace(store, "G0").to_dict())
    assert render(trace(store, "G0"))
    again = import_file(path, store, experiment="web")
    assert again.digest == done.digest
    assert len(store.refs()) == 1
    assert not garbage.find(store).removable  # nobody needs it yet, and it is not garbage
    import_file(write(tmp_path / "other.json", [LOOSE]), store, experiment="web")
    assert [ref.iteration for ref in store.refs("web-imported")] == [1, 2]


def test_what_a_terminal_would_obey_is_not_sent_to_it(tmp_path: Path) -> None:
    rows = [{"id": "\x9b2J", "question": f"Who is {n}?", "response": "x", "reward": 1.0} for n in range(2)]
    done = import_file(write_lines(tmp_path / "r.jsonl", rows), Store(tmp_path / "store"))
    assert "\x9b2J is" in done.notes[0]
    assert "\ufffd2J is" in done.lines()[1]
    assert "\x9b" not in "".join(done.lines())


def test_the_longest_name_of_an_experiment_has_room_for_imports_and_seeds(tmp_path: Path) -> None:
    store, name = Store(tmp_path / "store"), "a" * 64
    path = write(tmp_path / "experiences.json", {"G0": PRINCIPLE})
    for lineage in (name, f"{name}-s{LARGEST_SEED}"):
        done = import_file(path, store, experiment=lineage)
        assert [ref.digest for ref in store.refs(f"{lineage}-imported")] == [done.digest]
        with store.lock(lineage):
            pass


def test_two_imports_at_once_keep_both(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store, together, real = Store(tmp_path / "store"), threading.Barrier(2), Store.refs

    def both_at_once(self: Store, experiment: str | None = None) -> list[Ref]:
        found = real(self, experiment)
        with suppress(threading.BrokenBarrierError):  # where one waits for the other there are never two
            together.wait(0.5)
        return found

    with monkeypatch.context() as patch, ThreadPoolExecutor() as pool:
        patch.setattr(Store, "refs", both_at_once)
        files = [write(tmp_path / f"{n}.json", {"G0": text}) for n, text in enumerate((PRINCIPLE, LOOSE))]
        made = {done.digest for done in pool.map(lambda file: import_file(file, store), files)}
    assert {ref.digest for ref in store.refs("imported")} == made
    assert not garbage.find(store).removable


def test_an_import_waits_for_gc(tmp_path: Path) -> None:
    """What stands in the store already may be what is about to be removed."""
    store = Store(tmp_path / "store")
    file = write(tmp_path / "e.json", {"G0": PRINCIPLE})
    with ThreadPoolExecutor() as pool, store.lock("imported"):
        going_on = pool.submit(import_file, file, store)
        with pytest.raises(TimeoutError):
            going_on.result(0.3)
    assert [ref.digest for ref in store.refs("imported")] == [going_on.result().digest]


# -- rollouts


def chat(question: str, *, answer: str, prompt: str | None = None) -> list[dict[str, Any]]:
    """One search and an answer, as youtu-agent writes it."""
    call = {"name": "search", "arguments": json.dumps({"query": "Bado Keli", "num_results": 5})}
    return [
        {"role": "user", "content": prompt or question},
        {"role": "assistant", "content": "", "tool_calls": [{"id": "c1", "type": "function", "function": call}]},
        {"role": "tool", "tool_call_id": "c1", "content": "1. city Bado Keli: mayor: person Rato Miku"},
        {"role": "assistant", "content": answer},
    ]


def extraction_row(runid: int, id: int, question: str, answer: str, reward: float) -> dict[str, Any]:
    prompt = PROMPT.format(question=question)
    return {
        "runid": runid,
        "prompt": prompt,
        "id": id,
        "problem": question,
        "groundtruth": "Rato Miku",
        "retry_count": 0,
        "response": answer,
        "trajectories": [{"agent": "base", "trajectory": chat(question, answer=answer, prompt=prompt)}],
        "error": None,
        "rollout_time": 2.5,
        "reward": reward,
    }


QUESTIONS = ("Who is the mayor of Bado Keli?", "Who keeps the river Zano Pile?")


@pytest.fixture
def extraction(tmp_path: Path) -> Path:
    """Two tasks by two rollouts: the tasks in order, then again, as their runner writes them."""
    rows = [
        extraction_row(0, 8, QUESTIONS[0], "Rato Miku", 1.0),
        extraction_row(1, 35, QUESTIONS[1], "Zano", 0.0),
        extraction_row(2, 8, QUESTIONS[0], "Nobody", 0.0),
        extraction_row(3, 35, QUESTIONS[1], "Rato Miku", 1.0),
    ]
    return write_lines(tmp_path / "rollout.jsonl", rows)


def test_extraction_rollouts(extraction: Path) -> None:
    found = read_rollouts(extraction)
    assert [(t.id, t.reward, t.answer, t.status) for t in found.trajectories] == [
        ("8#0", 1.0, "Rato Miku", "answered"),
        ("35#0", 0.0, "Zano", "answered"),
        ("8#1", 0.0, "Nobody", "answered"),
        ("35#1", 1.0, "Rato Miku", "answered"),
    ]
    first = found.trajectories[0]
    assert first.question == QUESTIONS[0]  # the prompt around it holds experience: the clean history does not
    assert first.seconds == 2.5
    look, answer = first.steps
    assert look.call == ToolCall("search", {"query": "Bado Keli", "num_results": "5"})
    assert look.text == '<tool_call>\n{"name": "search", "arguments": {"query": "Bado Keli", "num_results": "5"}}\n</tool_call>'
    assert look.observation == "1. city Bado Keli: mayor: person Rato Miku"
    assert answer.answer == "Rato Miku"
    assert answer.observation is None
    assert look.selected == answer.selected == ("G0", "G12")
    assert "[G12]. Read pages, not snippets." in look.injected
    assert QUESTIONS[0] not in look.injected
    assert not any(step.token_ids for t in found.trajectories for step in t.steps)
    assert [(t.id, t.answer) for t in found.tasks] == [("8", "Rato Miku"), ("35", "Rato Miku")]


def test_evaluation_rollouts(tmp_path: Path) -> None:
    def row(*messages: tuple[str, str], **more: Any) -> dict[str, Any]:
        chat = [{"role": role, "content": content} for role, content in messages]
        return {"question": QUESTIONS[0], "answer": "Rato Miku", "messages": chat, **more}

    glued = "\n\nSolve the input problem by leveraging it.\n\n**ACCUMULATED EXPERIENCES:**\nG0: Prefer names."
    system = f"Research.\nCurrent date: {glued}"
    look = '<think>look</think>\n<tool_call>\n{"name": "search", "arguments": {"query": "Bado"}}\n</tool_call>'
    opening = (("system", system), ("user", QUESTIONS[0]), ("assistant", look))
    seen = ("user", "<tool_response>\nmayor: Rato Miku\n</tool_response>")
    choice = [{"round": 1, "selected_ids": ["G1", "G4"], "rationale": "a first look"}, {"round": 2, "selected_ids": ["G9"]}]
    rows = [
        row(*opening, seen, ("assistant", "<answer>Rato Miku</answer>"), prediction="Rato Miku", termination="answer",
            exp_selections=choice),
        row(*opening, seen, ("assistant", "perhaps Rato"), prediction="perhaps Rato",
            termination="format error: generate an answer as token limit reached"),
        row(*opening, seen, prediction="No answer found.", termination="exceed available llm calls"),
        {**row(), "error": "Timeout (>1800s)", "prediction": "[Failed]", "rollout_idx": 1},
    ]  # fmt: skip
    found = read_rollouts(write_lines(tmp_path / "iter1.jsonl", rows))
    by = found.trajectories
    # PEERS 5: retried questions append lines; the fourth is the same question again, and nothing is lost.
    assert [t.rollout for t in by] == [0, 1, 2, 3]
    assert [(t.status, t.answer) for t in by] == [
        ("answered", "Rato Miku"), ("forced", "perhaps Rato"), ("unanswered", None), ("failed", None),
    ]  # fmt: skip
    assert {t.reward for t in by} == {None}  # scores stand in another file: not judged is not wrong
    assert by[0].system == "Research.\nCurrent date: "
    assert by[0].steps[0].call == ToolCall("search", {"query": "Bado"})
    assert by[0].steps[0].observation == "mayor: Rato Miku"
    assert by[0].steps[0].selected == ("G1", "G4")
    assert by[0].steps[0].rationale == "a first look"
    assert by[0].steps[1].selected == ("G9",)
    assert "G0: Prefer names." in by[0].steps[0].injected
    assert by[3].error == "RolloutError: Timeout (>1800s)"
    assert by[0].task_id == question_id(QUESTIONS[0])


@pytest.mark.parametrize(("given", "selected"), [("G12", ("G12",)), (["G1", 2], ("G1", "2")), (5, ()), (None, ()), ("", ())])
def test_a_selection_may_be_one_id(tmp_path: Path, given: Any, selected: tuple[str, ...]) -> None:
    chat = [{"role": "user", "content": QUESTIONS[0]}, {"role": "assistant", "content": "<answer>Rato</answer>"}]
    row = {"question": QUESTIONS[0], "messages": chat, "exp_selections": [{"round": 1, "selected_ids": given}]}
    [found] = read_rollouts(write_lines(tmp_path / "iter1.jsonl", [row])).trajectories
    assert found.steps[0].selected == selected


def test_arguments_nested_too_deeply_are_kept_as_they_are(tmp_path: Path) -> None:
    call = {"function": {"name": "search", "arguments": "[" * 100_000}}
    row = {"question": QUESTIONS[0], "messages": [{"role": "assistant", "content": "", "tool_calls": [call]}]}
    [found] = read_rollouts(write_lines(tmp_path / "iter1.jsonl", [row])).trajectories
    assert found.steps[0].call == ToolCall("search", {"arguments": "[" * 100_000})


def test_a_failed_rollout_is_not_judged_and_tells_no_secret(tmp_path: Path) -> None:
    error = 'Traceback (most recent call last):\n  File "x.py"\nAuthError: api_key=abcdefgh is wrong\n'
    row = {**extraction_row(0, 1, QUESTIONS[0], "Error: after 3 retries.", 0), "trajectories": [], "error": error}
    (failed,) = rollouts_from_file(write_lines(tmp_path / "r.jsonl", [row]))
    assert (failed.status, failed.reward, failed.answer) == ("failed", None, None)
    assert failed.error == "RolloutError: AuthError: api_key=*** is wrong"


def test_a_rollout_that_never_ran_is_told(tmp_path: Path) -> None:
    waiting = {"runid": 1, "prompt": "x", "problem": QUESTIONS[1], "groundtruth": "y"}
    found = read_rollouts(write_lines(tmp_path / "r.jsonl", [extraction_row(0, 1, QUESTIONS[0], "a", 1), waiting]))
    assert len(found.trajectories) == 1
    assert any("1 rollout that never ran, left out (line 2)" in note for note in found.notes)
    with pytest.raises(DataError, match="no rollout in it has happened"):
        read_rollouts(write_lines(tmp_path / "none.jsonl", [waiting]))


def test_one_id_for_two_questions_names_neither(tmp_path: Path) -> None:
    rows = [extraction_row(n, 1, question, "a", 1) for n, question in enumerate(QUESTIONS)]
    found = read_rollouts(write_lines(tmp_path / "r.jsonl", rows))
    assert [t.task_id for t in found.trajectories] == [question_id(q) for q in QUESTIONS]
    assert any("whose id is also another's" in note for note in found.notes)


def test_several_calls_in_one_action_all_stand_in_its_text(tmp_path: Path) -> None:
    row = extraction_row(0, 1, QUESTIONS[0], "a", 1)
    calls = [{"function": {"name": name, "arguments": {"q": ["x", "y"]}}} for name in ("search", "visit")]
    messages = [
        {"role": "user", "content": QUESTIONS[0]},
        {"role": "assistant", "content": "both", "tool_calls": calls},
        {"role": "tool", "content": "one"},
        {"role": "tool", "content": [{"type": "text", "text": "two"}]},
    ]
    row["trajectories"] = [messages]
    found = read_rollouts(write_lines(tmp_path / "r.jsonl", [row]))
    (step,) = found.trajectories[0].steps
    assert step.call == ToolCall("search", {"q": '["x", "y"]'})
    assert step.text.count("<tool_call>") == 2
    assert step.observation == "one\n\ntwo"
    assert any("several calls in one action" in note for note in found.notes)


def test_arguments_in_tags_that_are_no_text_are_kept_as_json(tmp_path: Path) -> None:
    look = '<tool_call>\n{"name": "search", "arguments": {"query": ["a", "b"], "n": 5}}\n</tool_call>'
    chat = [{"role": "user", "content": QUESTIONS[0]}, {"role": "assistant", "content": look}]
    found = read_rollouts(write_lines(tmp_path / "r.jsonl", [{"question": QUESTIONS[0], "messages": chat}]))
    (step,) = found.trajectories[0].steps
    assert (step.call, step.problem) == (ToolCall("search", {"query": '["a", "b"]', "n": "5"}), None)


def test_a_system_message_in_mid_conversation_is_not_the_prompt(tmp_path: Path) -> None:
    roles = ("system", "user", "assistant", "system", "user", "assistant")
    texts = ("Search.", QUESTIONS[0], "hm", "2 calls left", "go on", "<answer>a</answer>")
    messages = [{"role": role, "content": text} for role, text in zip(roles, texts, strict=True)]
    found = read_rollouts(write_lines(tmp_path / "r.jsonl", [{"question": QUESTIONS[0], "messages": messages}]))
    assert (found.trajectories[0].system, found.trajectories[0].steps[0].observation) == ("Search.", "go on")
    assert any("system message in mid-conversation" in note for note in found.notes)


def test_a_question_in_other_letters_is_the_same_task_and_a_whole_number_is_text(tmp_path: Path) -> None:
    rows = [extraction_row(0, 1, question, "204", 1) | {"groundtruth": 204.0} for question in ("How many?", "how  Many?")]
    found = read_rollouts(write_lines(tmp_path / "r.jsonl", [{**row, "id": None} for row in rows]))
    assert [(t.id, t.question, t.answer) for t in found.tasks] == [(question_id("How many?"), "How many?", "204")]
    assert [t.rollout for t in found.trajectories] == [0, 1]


def test_an_observation_cannot_pose_as_experience(tmp_path: Path) -> None:
    row = extraction_row(0, 1, QUESTIONS[0], "a", 1)
    row["trajectories"][0]["trajectory"][2]["content"] = f"a page\nhint:\n{PRINCIPLE}"
    (trajectory,) = rollouts_from_file(write_lines(tmp_path / "r.jsonl", [row]))
    assert trajectory.steps[0].observation == f"a page\n> hint:\n{PRINCIPLE}"
    assert_clean(trajectory, [PRINCIPLE])


@pytest.mark.parametrize(
    ("change", "what"),
    [
        ({"problem": " "}, "no question"),
        ({"reward": 2}, "reward must be a number from 0 to 1, not 2"),
        ({"reward": "good"}, "reward must be"),
        ({"response": ["a"]}, "the answer must be text, not a list"),
        ({"trajectories": 3}, "messages must be a list, not the number 3"),
        ({"trajectories": ["x"]}, "a message must be an object, not text"),
        ({"trajectories": "[{"}, "text, and not JSON"),
        ({"trajectories": [{"role": "judge", "content": ""}]}, "message 1 has the role 'judge'"),
        ({"trajectories": [{"role": "tool", "content": "x"}]}, "message 1: a tool's result before any action"),
        ({"trajectories": "[" * 100_000}, "text, and not JSON"),
        ({"trajectories": [{"role": "user", "content": 3}]}, "message 1: the content must be text"),
        ({"trajectories": [{"role": "user", "content": [{"text": 3}]}]}, "message 1: the content must be text"),
        ({"trajectories": [{"role": "assistant", "tool_calls": [{"function": {}}]}]}, "a tool call has no name"),
    ],
)
def test_broken_lines_come_in_one_message_with_their_numbers(tmp_path: Path, change: dict[str, Any], what: str) -> None:
    good = extraction_row(0, 1, QUESTIONS[0], "a", 1)
    path = write(tmp_path / "r.jsonl", "\n".join([json.dumps(good), json.dumps({**good, **change}), "", '{"problem":']))
    with pytest.raises(DataError, match=r"r\.jsonl: \d mistakes?") as caught:
        read_rollouts(path)
    assert "line 4: not valid JSON" in str(caught.value)
    path.write_text(json.dumps(good) + "\n" + json.dumps({**good, **change}))
    with pytest.raises(DataError, match=rf"1 mistake\n  line 2: [^\n]*{what}"):
        read_rollouts(path)


def test_a_web_page_is_no_rollout_file(tmp_path: Path) -> None:
    path = write(tmp_path / "r.jsonl", "<html>\nlogin</html>")
    for read in (detect, read_rollouts):
        with pytest.raises(DataError, match="a web page"):
            read(path)


def test_imported_rollouts_can_be_queried_traced_and_extracted_from(extraction: Path, tmp_path: Path) -> None:
    store = Store(tmp_path / "store")
    done = import_file(extraction, store)
    assert (done.kind, done.ids) == ("rollouts", ("8", "35"))
    assert done.facts == {"trajectories": 4, "tasks": 2, "judged": 4}
    rows = run_sql(
        store, "select task_id, avg(reward), sum(turns), any_value(experiment) from trajectories group by 1 order by 1"
    )
    assert rows.rows() == [("35", 0.5, 4, "imported"), ("8", 0.5, 4, "imported")]
    assert run_sql(store, "select distinct tool from steps where tool is not null").rows() == [("search",)]
    assert trace(store, "8#1").to_dict()["origins"]
    trajectories = load_trajectories(store.open("trajectories", done.digest))
    assert trajectories == rollouts_from_file(extraction)
    settings = ContrastExtraction(min_support=1)
    learned = extract(trajectories, Pool(), granularity="instance", settings=settings, iteration=1, seed=0)
    assert learned.statistics["judged"] == 4
    assert {item.trajectory_ids for item in learned.pool.items} == {("8#0",), ("35#1",)}
    assert done.file is not None
    tasks = tasks_from(
        done.file, *read_objects(done.file), suite="x", count=None
    )  # a split can name it, and its ids are those of the rollouts
    assert {t.id for t in tasks} == {t.task_id for t in trajectories}
    assert store.open("trajectories", done.digest).json("lines.json") == {"8#0": 1, "35#0": 2, "8#1": 3, "35#1": 4}


def test_kind_is_found_in_the_file(extraction: Path, tmp_path: Path) -> None:
    assert detect(extraction) == "rollouts"
    rows = [json.loads(line) for line in extraction.read_text().splitlines()]
    assert detect(write(tmp_path / "rollouts.json", rows)) == "rollouts"
    assert rollouts_from_file(tmp_path / "rollouts.json") == rollouts_from_file(extraction)
    assert detect(write(tmp_path / "e.json", {"G0": LOOSE})) == "pool"
    assert detect(write_lines(tmp_path / "e.jsonl", [{"id": "G0", "text": LOOSE}])) == "pool"
    assert pool_from_file(tmp_path / "e.jsonl").ids == ("G0",)


# -- the command


def evolve(*arguments: str) -> tuple[int, str]:
    result = CliRunner().invoke(cli.app, list(arguments))
    return result.exit_code, result.output if result.exception is None or result.exit_code == 0 else repr(result.exception)


def test_the_command(extraction: Path, tmp_path: Path) -> None:
    store = str(tmp_path / "store")
    pool = write(tmp_path / "experiences.json", {"G0": PRINCIPLE, "G1": LOOSE})
    config = write(tmp_path / "mine.yaml", "experiment: mine\n")
    code, output = evolve("import", str(pool), "--experiment", str(config), "--store", store, "--json")
    assert code == 0, output
    told = json.loads(output)
    assert told["kind"] == "pool"
    assert told["lineage"] == "mine-imported"
    assert (told["items"], told["principles"], told["ids"]) == (2, 2, ["G0", "G1"])
    code, output = evolve("import", str(extraction), "--store", store)
    assert code == 0, output
    assert "rollout.jsonl: 4 rollouts of 2 tasks, 4 judged\n" in output
    assert "tasks.jsonl" in output
    query = output.split('evolve sql "')[1].split('"')[0]
    assert run_sql(Store(store), query).height == 4
    assert evolve("import", str(pool), "--kind", "table", "--store", store)[0] == 2
    assert "have no granularity" in evolve("import", str(extraction), "--granularity", "instance", "--store", store)[1]
    assert (
        "no question"
        in evolve("import", str(write_lines(tmp_path / "x.jsonl", [{"a": 1}])), "--kind", "rollouts", "--store", store)[1]
    )


def test_a_step_of_text_alone_is_the_answer(tmp_path: Path) -> None:
    """youtu-agent's prompt mode: no messages but the prompt and what came back."""
    row = {"problem": QUESTIONS[0], "groundtruth": ["Rato Miku", "Miku"], "response": " Rato Miku ", "reward": True}
    found = read_rollouts(write_lines(tmp_path / "r.jsonl", [row]))
    (trajectory,) = found.trajectories
    assert trajectory.steps == (Step(0, "Rato Miku", (), (), answer="Rato Miku"),)
    assert trajectory.reward == 1.0
    assert found.tasks[0].answer == "Rato Miku"


def test_all_reference_answers_are_kept_and_what_is_none_is_told(tmp_path: Path) -> None:
    given: list[Any] = [["Washington, D.C.", "Washington", "a|b"], True, {"city": "Bonn"}, None]
    rows = [{"problem": f"Question {n}?", "groundtruth": value, "response": "x"} for n, value in enumerate(given)]
    found = read_rollouts(write_lines(tmp_path / "r.jsonl", rows))
    assert [(task.answer, dict(task.metadata)) for task in found.tasks] == [
        ("Washington, D.C.", {"aliases": "Washington"}),
        ("True", {}),
    ]
    assert "1 rollout with a reference answer that is no text, left out (line 3)" in found.notes
    assert "1 rollout with another right answer that holds '|', left out (line 1)" in found.notes
    store = Store(tmp_path / "store")
    artifact = store.open("trajectories", artifact_of_rollouts(found, store, tmp_path / "r.jsonl"))
    split = TaskSplit(path=str(artifact.file(TASKS)))
    assert [(task.answer, dict(task.metadata)) for task in load_suite(split, suite="s")] == [
        (task.answer, dict(task.metadata)) for task in found.tasks
    ]
