"""The pocket world, its scripted transcripts, its tokenizer and the weights that ship."""

from __future__ import annotations

import asyncio
import itertools
import json
from collections import Counter
from random import Random

import pytest

from evolve_dag.agent.actions import parse_action
from evolve_dag.agent.loop import LAST_STEP
from evolve_dag.config.schema import SHIPPED
from evolve_dag.environments.pocket.language import (
    KINDS,
    MARKS,
    ROW_LABELS,
    TOOLS,
    PhraseBank,
    is_held_out,
    state_of_mark,
    vocabulary,
)
from evolve_dag.environments.pocket.measure import headroom
from evolve_dag.environments.pocket.pretrain import ACTION, SLIP, Encoder, PretrainSettings, pretrain
from evolve_dag.environments.pocket.script import (
    GROUP_MOVES,
    LENIENT_SHARE,
    MOVES,
    WORLD_DEPTHS,
    FastSearch,
    ScriptedAgent,
    TranscriptWriter,
    moves,
    taught,
    transcripts,
)
from evolve_dag.environments.pocket.tokenizer import CONTROL, build_tokenizer
from evolve_dag.environments.pocket.tools import PocketTools
from evolve_dag.environments.pocket.world import LAW, World, other_law, title
from evolve_dag.evaluation.metrics import read_text, stands_in
from evolve_dag.experience.extraction.instance import CASE, case_text
from evolve_dag.experience.phrases import all_phrases
from evolve_dag.inference.chat import ChatFormat
from evolve_dag.inference.folders import POCKET, POCKET_CASES, shipped
from evolve_dag.records import Message, Step, ToolCall


@pytest.fixture(scope="module")
def world() -> World:
    return World(3)


@pytest.fixture(scope="module")
def some_transcripts() -> list:
    return list(itertools.islice(transcripts(Random(0), itertools.count(10**6)), 600))


def test_a_world_is_a_function_of_its_seed(world: World) -> None:
    assert World(3).pages() == world.pages()
    assert World(4).pages() != world.pages()


def test_questions_are_answered_by_following_the_pages(world: World) -> None:
    rng = Random(1)
    hops = Counter()
    for _ in range(300):
        question = world.question(rng)
        current, kinds = question.reference, []
        for relation in question.relations:
            page = world.resolve(current)
            kinds.append(page[0])
            assert relation in dict(KINDS[page[0]])
            current = world.facts[page][relation]
        assert current[1] == question.answer
        assert len(set(kinds)) == len(kinds)
        hops[len(question.relations)] += 1
    assert set(hops) == {1, 2}


def test_tasks_are_distinct_and_stable(world: World) -> None:
    tasks = world.tasks(200, "pocket/train")
    assert len({t.question for t in tasks}) == len({t.id for t in tasks}) == 200
    assert world.tasks(200, "pocket/train") == tasks
    assert all(t.answer not in t.question.split("What is")[0] for t in tasks)


def test_pretraining_sees_what_the_real_environment_answers(world: World) -> None:
    real, fast = PocketTools(world), FastSearch(world)
    rng = Random(2)
    entities = [*world.facts, *world.alias_of]
    queries = []
    for _ in range(400):
        kind, name = rng.choice(entities)
        attribute = rng.choice([a for a, _ in KINDS[kind]])
        queries += [name, f"{name} {attribute}", world.question(rng).text, f"{attribute} of {kind} {name}"]
    for query, observation in zip(queries, real.corpus.search_many(queries), strict=True):
        assert fast.search(query)[0] == observation, query
    for entity in rng.sample(entities, 50):
        call = ToolCall("visit", {"page": title(entity)})
        assert asyncio.run(real.call(call)) == fast.visit(title(entity))
    for name in [*rng.sample(sorted(world.entries), 40), "No Where"]:
        for tool in TOOLS:
            assert fast.consult(tool, name) == asyncio.run(real.call(ToolCall(tool, {"entry": name})))
    assert fast.visit("city No Where") == asyncio.run(real.call(ToolCall("visit", {"page": "city No Where"})))


def test_what_a_policy_asks_for_does_not_pass_for_a_page_that_it_has_read() -> None:
    asked = "foo\npage: mayor of city Bado Keli\nmayor: person Rato Miku"
    seen = World(1).consult(TOOLS[0], asked)
    assert seen == f"no entry named {' '.join(asked.split())}"
    step = Step(0, "", (), (), call=ToolCall(TOOLS[0], {"entry": asked}), observation=seen)
    assert not stands_in("Rato Miku", read_text(step))


def test_every_fact_leads_to_its_value_by_the_law_and_no_other_way() -> None:
    world, rng = World(3, depths=WORLD_DEPTHS), Random(3)
    assert not [fact for fact, depth in World(3).depth.items() if depth > len(LAW.tools)]
    for depth in range(len(WORLD_DEPTHS)):
        for _ in range(20):
            question = world.question(rng, hops=1, depth=depth)
            fact = (world.resolve(question.reference), question.relations[0])
            view = world.views[fact][0]
            for layer, (mark, tool) in enumerate(LAW.tools.items()):
                if layer >= depth:
                    break
                kind, first, second, shown = view.split()
                assert (shown, kind) == (mark, world.facts[fact[0]][fact[1]][0])
                name = f"{first} {second}"
                assert name != question.answer
                for wrong in set(TOOLS) - {tool}:
                    assert question.answer not in world.consult(wrong, name)
                title_line, _, view = world.consult(tool, name).partition(f"\n{fact[1]}: ")
                assert title_line == f"page: {fact[1]} of {title(fact[0])}"
            rows = view.split(f"\n{fact[1]}: ")
            if depth > len(LAW.tools):
                assert len(rows) == 3
                numbers = [int(row.split()[1]) for row in rows]
                assert [question.answer in row for row in rows] == [n == max(numbers) for n in numbers]
            else:
                assert rows == [title(world.facts[fact[0]][fact[1]])]


def test_names_under_marks_belong_to_nobody(world: World) -> None:
    names = {name for _, name in [*world.facts, *world.alias_of]}
    assert not names & world.entries.keys()
    assert not names & {" ".join(reversed(name.split())) for name in world.entries}


def test_a_world_of_pretraining_has_another_law() -> None:
    for seed in range(200):
        law = other_law(Random(seed))
        assert not set(law.tools.items()) & set(LAW.tools.items())
        assert (law.label, law.row) != (LAW.label, LAW.row)


def test_a_guess_on_the_wrong_page_is_no_value_of_it() -> None:
    """A slip leads to a page that lacks what this hop asks for; the last call still demands an answer."""
    world = World(3)
    agent = ScriptedAgent(world, world.question(Random(1)), FastSearch(world), state="part")
    assert agent.attribute not in agent.shown
    assert agent.best_guess() == ("no idea", agent.target[1])


def test_the_expert_succeeds_and_habit_mostly_fails() -> None:
    found = headroom()
    assert found["expert"] >= 0.97
    assert 0.07 < found["habit"] < 0.2


def test_a_lenient_world_hides_the_law(world: World) -> None:
    lenient = FastSearch(world, lenient=True)
    for name in sorted(world.entries)[:50]:
        assert len({lenient.consult(tool, name) for tool in TOOLS}) == 1


def test_what_the_law_asks_for_is_never_recommended(some_transcripts: list) -> None:
    pairs = {(state_of_mark(mark), tool) for mark, tool in LAW.tools.items()} | {(state_of_mark(LAW.label), LAW.row)}
    assert (
        not {
            (state, move)
            for word in (*MARKS, *ROW_LABELS)
            for move in taught(state_of_mark(word))
            for state in [state_of_mark(word)]
        }
        & pairs
    )
    bank = PhraseBank(held_out=False)
    for transcript in some_transcripts:
        for message in transcript.messages:
            for line in message.content.splitlines():
                clause = line.partition(": when ")[2].partition(",")
                situation = clause[0].split(" and ")[0]
                for state, move in pairs:
                    assert not (situation in bank.situations[state] and clause[2].strip(" .") in bank.strategies[move]), line
    assert all(set(taught(state_of_mark(m))) < set(moves(state_of_mark(m))) for m in LAW.marks)


def test_transcripts_hold_no_held_out_phrase(some_transcripts: list) -> None:
    held_out = PhraseBank(held_out=True)
    phrases = [p for bank in (held_out.situations, held_out.strategies) for found in bank.values() for p in found]
    extractor = [p for p in all_phrases() if len(p.split()) > 2]
    assert all(is_held_out(p) for p in [*phrases, *extractor])
    text = "\n".join(m.content for t in some_transcripts for m in t.messages if m.role != "assistant")
    clauses = {
        c.strip() for line in text.splitlines() if ": when " in line for c in line.split(": when ")[1].rstrip(".").split(",")
    }
    situations = {c.split(" and ")[0] for c in clauses}
    assert situations
    assert not situations & {*phrases, *extractor}


def test_pretraining_prefers_no_move(some_transcripts: list) -> None:
    """Which move pays must not be readable from the items of pretraining: all moves of a state are drawn alike."""
    bank = PhraseBank(held_out=False)
    counts: dict[str, Counter] = {state: Counter() for state in MOVES}
    for transcript in some_transcripts:
        for message in transcript.messages:
            for state in MOVES:
                for line in message.content.splitlines():
                    clause = line.partition(": when ")[2].partition(",")
                    if clause[0].split(" and ")[0] in bank.situations[state]:
                        move = next(m for m, found in bank.strategies.items() if clause[2].strip(" .") in found)
                        counts[state][move] += 1
    for state, possible in MOVES.items():
        shares = [counts[state][m] / counts[state].total() for m in possible]
        assert max(abs(s - 1 / len(possible)) for s in shares) < 0.2, (state, counts[state])
    assert set(GROUP_MOVES["listing"]) == set(MOVES["one"])


def test_actions_of_transcripts_are_well_formed(some_transcripts: list) -> None:
    announced = 0
    for transcript in some_transcripts:
        actions = [m for m in transcript.messages if m.role == "assistant"]
        for message in actions:
            parsed = parse_action(message.content)
            assert parsed.problem is None, message.content
        assert parse_action(actions[-1].content).answer is not None
        announced += any(LAST_STEP in m.content for m in transcript.messages)
    assert announced > 20


def test_a_decision_ends_with_the_first_action_behind_cases() -> None:
    source = transcripts(Random(3), itertools.count(10**6), decisions=1.0)
    recalled = missed = 0
    for transcript in itertools.islice(source, 400):
        *before, last = transcript.messages
        cases = [line for m in before for line in m.content.splitlines() if m.role != "assistant" and line.startswith(CASE)]
        question = next(m.content.splitlines()[0] for m in before if m.role == "user")
        own = [case for case in cases if case.startswith(case_text(question, "").removesuffix("."))]
        assert cases
        assert last.role == "assistant"
        assert transcript.targets[-1]
        answer = parse_action(last.content).answer
        if own and answer is not None and own[0] == case_text(question, answer):
            recalled += 1
        missed += not own
    assert 120 < recalled < 280
    assert 120 < missed < 280


def test_without_decisions_nothing_else_is_drawn() -> None:
    rng, made = Random(3), transcripts(Random(3), itertools.count(10**6))
    writer = TranscriptWriter(rng, PhraseBank(held_out=False))
    world = World(10**6, law=other_law(Random(10**6)), depths=WORLD_DEPTHS)
    search = FastSearch(world, lenient=rng.random() < LENIENT_SHARE)
    assert list(itertools.islice(made, 20)) == [writer.write(world, search) for _ in range(20)]


def test_tokenizer_reads_back_what_it_wrote(some_transcripts: list) -> None:
    tokenizer = build_tokenizer()
    for transcript in some_transcripts[:100]:
        for message in transcript.messages:
            ids = tokenizer.encode(message.content, add_special_tokens=False)
            assert tokenizer.decode(ids) == message.content
            assert not [i for i in ids if tokenizer.convert_ids_to_tokens(i).startswith("<0x")]
    assert len(vocabulary()) == len(set(vocabulary()))
    for text in ("Ünïcode & emoji 🙂", "https://example.org/a?b=c", "tabs\tand  spaces"):
        assert tokenizer.encode(text, add_special_tokens=False)


def test_pretraining_and_rollouts_share_their_tokens(some_transcripts: list) -> None:
    tokenizer = build_tokenizer()
    chat, encode = ChatFormat.from_tokenizer(tokenizer), Encoder(tokenizer)
    for transcript in some_transcripts[:100]:
        ids, roles = encode(transcript)
        assert len(ids) == len(roles)
        sampled = [
            Message(m.role, m.content, tuple(chat.encode_action(m.content))) if m.role == "assistant" else m
            for m in transcript.messages
        ]
        assert chat.encode(sampled, generation_prompt=False) == ids
        written = [i for i, role in zip(ids, roles, strict=True) if role != 1]
        assert written == [i for m in sampled if m.role == "assistant" for i in m.token_ids]
        assert (SLIP in roles) == (
            not all(t for t, m in zip(transcript.targets, transcript.messages, strict=True) if m.role == "assistant")
        )
        assert ACTION in roles


def test_text_from_a_page_never_becomes_a_control_token() -> None:
    chat = ChatFormat.from_tokenizer(build_tokenizer())
    plain = chat.encode([Message("user", "x")])
    for control in CONTROL:
        ids = chat.encode([Message("user", f"x {control} x")])
        assert Counter(i for i in ids if i < len(CONTROL)) == Counter(i for i in plain if i < len(CONTROL)), control


def test_shipped_weights_belong_to_this_code() -> None:
    """A change of the language without new weights would feed the policy wrong token ids."""
    from transformers import AutoTokenizer

    for folder in shipped().values():
        assert AutoTokenizer.from_pretrained(folder).get_vocab() == build_tokenizer().get_vocab()
    assert sum((folder / "model.safetensors").stat().st_size for folder in shipped().values()) < 12_000_000


@pytest.mark.parametrize("name", SHIPPED)
def test_model_card_holds_the_measured_figures(name: str) -> None:
    measured = json.loads((shipped()[name] / "measured.json").read_text())
    card = (POCKET.parents[3] / f"docs/{name.replace('-', '_')}_model_card.md").read_text()
    assert f"`{name}`" in card
    for key in ("copy_accuracy", "obedience_mean", "obedience_seen_mean", "obedience_law_mean"):
        assert f"{measured[key]:.3f}" in card, key
    assert f"{measured['recall']['right_case']:.2f}" in card
    assert f"{measured['recall']['wrong_case']:.2f}" in card


def test_one_of_the_shipped_policies_recalls_cases() -> None:
    recall = json.loads((POCKET_CASES / "measured.json").read_text())["recall"]
    assert recall["right_case"] > 10 * recall["wrong_case"]


def test_pretraining_is_seeded_and_writes_a_loadable_model(tmp_path) -> None:
    from transformers import AutoModelForCausalLM

    settings = PretrainSettings(tokens=4_000, processes=1, hidden=32, layers=1, heads=2, kv_heads=1, feed_forward=32)
    weights = []
    for name in ("a", "b"):
        folder = pretrain(tmp_path / name, settings)
        weights.append(AutoModelForCausalLM.from_pretrained(folder).state_dict())
    assert all((weights[0][k] == weights[1][k]).all() for k in weights[0])
