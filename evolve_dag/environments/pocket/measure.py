"""Measures what the pocket policy can do, for its model card (``evolve pocket measure``).

Every figure is sampled at temperature 1 in worlds that neither pretraining nor any task uses. Obedience is measured on
paraphrases that pretraining never showed (:func:`~evolve_dag.environments.pocket.language.is_held_out`) and, beside
it, on ones that it did; for marks also on what the worlds of tasks ask for, which no item of pretraining ever
recommended, in the words of the extractor and by a case that shows it.
"""

from __future__ import annotations

import copy
import itertools
import json
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

from evolve_dag.environments.pocket.language import GROUPS, SYSTEM_PROMPT, PhraseBank, state_of_mark
from evolve_dag.environments.pocket.pretrain import Encoder
from evolve_dag.environments.pocket.script import (
    GROUP_MOVES,
    HABIT,
    MOVES,
    SKILL,
    FastSearch,
    ScriptedAgent,
    Transcript,
    action_text,
    habitual,
    moves,
    played_case,
    taught,
)
from evolve_dag.environments.pocket.world import LAW, World
from evolve_dag.experience.phrases import render
from evolve_dag.records import Message

MEASURING_WORLDS = range(900_000, 900_040)
"""Worlds of this measurement alone."""
MEASURED_DEPTHS = (0.25, *(0.75 / len(LAW.marks),) * len(LAW.marks))
"""Shares of depths among the facts of these worlds."""
MARKED = [state_of_mark(word) for word in LAW.marks]
"""States of marks that the worlds of tasks have."""
STATES = [*MOVES, *MARKED]


class Sampler:
    """Samples one action for many conversations at once with plain ``transformers``."""

    def __init__(self, folder: Path, seed: int = 0) -> None:
        import torch
        from transformers import AutoModelForCausalLM, AutoTokenizer

        self.tokenizer = AutoTokenizer.from_pretrained(folder)
        self.encode = Encoder(self.tokenizer)
        self.opening = self.encode.header["assistant"]
        self.model = AutoModelForCausalLM.from_pretrained(folder).eval()
        torch.manual_seed(seed)

    def __call__(self, conversations: Sequence[Sequence[Message]], *, batch: int = 128, tokens: int = 40) -> list[str]:
        """One sampled action per conversation, control tokens included, end-of-turn removed."""
        import torch

        prompts = [[*self.encode(Transcript(tuple(c), (None,) * len(c), "", False))[0], *self.opening] for c in conversations]
        order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
        out = [""] * len(prompts)
        pad = self.tokenizer.pad_token_id
        for chunk in _chunks(order, batch):
            width = len(prompts[chunk[-1]])
            ids = torch.tensor([[pad] * (width - len(prompts[i])) + prompts[i] for i in chunk])
            mask = torch.tensor([[0] * (width - len(prompts[i])) + [1] * len(prompts[i]) for i in chunk])
            with torch.inference_mode():
                sampled = self.model.generate(
                    input_ids=ids,
                    attention_mask=mask,
                    do_sample=True,
                    temperature=1.0,
                    top_k=0,
                    top_p=1.0,
                    max_new_tokens=tokens,
                )
            for i, row in zip(chunk, sampled[:, width:], strict=True):
                out[i] = self.tokenizer.decode(row, skip_special_tokens=False).split("<|im_end|>")[0]
        return out


def _chunks(order: Sequence[int], size: int) -> list[Sequence[int]]:
    return [order[i : i + size] for i in range(0, len(order), size)]


def situations(per_state: int, rng: Random) -> dict[str, list[tuple[list[Message], ScriptedAgent]]]:
    """Conversations that stand in each state, with the agent that knows the truth there."""
    found: dict[str, list[tuple[list[Message], ScriptedAgent]]] = defaultdict(list)
    advice = [((s,), m) for s in MOVES for m in MOVES[s]]
    skilled = [((s,), m) for s, m in SKILL.items()]
    for seed in itertools.cycle(MEASURING_WORLDS):
        world = World(seed, depths=MEASURED_DEPTHS)
        search = FastSearch(world, lenient=True)
        for n in range(40):
            question = world.question(rng, depth=len(MARKED) if n % 2 else None)
            agent = ScriptedAgent(world, question, search)
            messages = [Message("system", SYSTEM_PROMPT), Message("user", question.text)]
            for _ in range(11):
                if len(found[agent.state]) < per_state:
                    found[agent.state].append((list(messages), copy.copy(agent)))
                told = skilled if n % 2 else rng.sample(advice, 6)
                thought, tool, argument = agent.act(habitual(agent.state, told, rng))
                if tool == "answer":
                    break
                if tool in ("search", "visit") and rng.random() < 0.05:
                    argument = argument.split(" ")[0] + " " + " ".join(rng.sample(_names(), 2))
                messages.append(Message("assistant", action_text(thought, tool, argument)))
                messages.append(Message("tool", agent.observe(tool, argument)))
        if all(len(found[s]) >= per_state for s in STATES):
            return dict(found)
    raise AssertionError("cycle() does not end")


def _asked_for(state: str) -> str:
    """The move that the law of tasks asks for under a mark."""
    return LAW.tools[state.split()[1]]


def _lesson(state: str) -> str:
    """The same as the extractor writes it."""
    mark = {"observation": "page", "evidence": "asked", "mark": state.split()[1]}
    return render(mark, f"use:{_asked_for(state)}")


def _names() -> list[str]:
    from evolve_dag.environments.pocket.language import NAME_WORDS

    return NAME_WORDS


def _classify(text: str, agent: ScriptedAgent) -> tuple[str, bool]:
    """(move, copied exactly); the move is ``other`` when no move of the state looks like it."""
    wanted = {}
    for move in moves(agent.state):
        wanted[move] = action_text(*copy.copy(agent).act(move))
    squeezed = "".join(text.split())
    for move, action in wanted.items():
        if "".join(action.split()) == squeezed:
            return move, True
    shape = _shape(text)
    for move, action in wanted.items():
        if _shape(action) == shape:
            return move, False
    return "other", False


def _shape(action: str) -> str:
    names = set(_names())
    kept = [w for w in action.replace('"', " ").replace("<", " ").replace(">", " ").split() if w not in names]
    return " ".join(kept)


def _hinted(messages: Sequence[Message], items: Sequence[str]) -> list[Message]:
    last = messages[-1]
    return [*messages[:-1], Message(last.role, f"{last.content}\nhint:\n" + "\n".join(items))]


@dataclass(frozen=True, slots=True)
class Probe:
    """One conversation that is asked for its next action."""

    kind: str
    """What its last message says: ``habit`` (nothing), ``distractor``, ``elsewhere`` (an item about another state), or what
    is to be followed: ``held_out``, ``seen`` (a paraphrase), ``law`` (the lesson of the tasks' worlds), ``among`` (that
    lesson among two other items), ``case`` (a case that shows it)."""
    state: str
    move: str
    """What is to be followed; '' where nothing is asked."""
    messages: Sequence[Message]
    agent: ScriptedAgent


def _probes(stand: Mapping[str, Sequence[tuple[list[Message], ScriptedAgent]]], rng: Random) -> Iterator[Probe]:
    for state in STATES:
        for messages, agent in stand[state]:
            for kind, move, items in _asked(state, rng):
                yield Probe(kind, state, move, _hinted(messages, items) if items else messages, agent)


HELD_OUT, SEEN = PhraseBank(held_out=True), PhraseBank(held_out=False)


def _asked(state: str, rng: Random) -> Iterator[tuple[str, str, list[str]]]:
    """(kind, move, items) of every probe in one state."""
    yield "habit", "", []
    yield "distractor", "", [HELD_OUT.distractor(rng), HELD_OUT.distractor(rng)]
    yield "elsewhere", "", [_elsewhere(state, rng)]
    if state in MARKED:
        lesson = _lesson(state)
        yield "law", _asked_for(state), [lesson]
        yield "among", _asked_for(state), rng.sample([lesson, _elsewhere(state, rng), _elsewhere(state, rng)], 3)
        yield "case", _asked_for(state), [_case(state, rng)]
    for move in taught(state):
        yield "held_out", move, [HELD_OUT.principle(state, move, rng)]
        if rng.random() < 1 / 3:
            yield "seen", move, [SEEN.principle(state, move, rng)]
    for group, states in GROUPS.items():
        for move in GROUP_MOVES[group] if state in states else ():
            yield "held_out", move, [HELD_OUT.principle(group, move, rng)]


def _elsewhere(state: str, rng: Random) -> str:
    other = rng.choice([s for s in STATES if s != state])
    return HELD_OUT.principle(other, rng.choice(taught(other)), rng)


def _case(state: str, rng: Random) -> str:
    """A case that meets the mark of ``state`` and asks what the tasks' worlds ask for, from a world of its own."""
    world = World(rng.choice(MEASURING_WORLDS))
    least = LAW.marks.index(state.split()[1]) + 1
    question = world.question(rng, hops=1, depth=rng.randint(least, len(LAW.marks)))
    return played_case(world, question, FastSearch(world), _at_once)[0]


def measure(folder: Path, *, per_state: int = 150, seed: int = 0) -> dict[str, Any]:
    """All figures of the model card.

    Args:
        folder: the model.
        per_state: conversations per state; each is asked once per move.
        seed: of the conversations and the sampling.

    Returns:
        ``copy_accuracy``; ``unknown_actions``; ``habit`` (state -> move -> share, no item); ``obedience`` (what is to be
        followed -> ``state -> move`` -> share); ``indifference`` (total variation that distractors and items on other states
        cause); ``recall`` (right and wrong case).
    """
    rng = Random(seed)
    sample = Sampler(folder, seed)
    probes = list(_probes(situations(per_state, rng), rng))
    shares: dict[str, dict[str, Counter[str]]] = defaultdict(lambda: defaultdict(Counter))
    followed: dict[str, dict[str, list[bool]]] = defaultdict(lambda: defaultdict(list))
    exact: list[bool] = []
    for probe, text in zip(probes, sample([p.messages for p in probes]), strict=True):
        done, copied = _classify(text, probe.agent)
        if done != "other":
            exact.append(copied)
        if probe.move:
            followed[probe.kind][f"{probe.state} -> {probe.move}"].append(done == probe.move)
        else:
            shares[probe.kind][probe.state][done] += 1
    habit = {s: {m: n / c.total() for m, n in sorted(c.items())} for s, c in shares["habit"].items()}
    obedience = {kind: {k: _mean(v) for k, v in found.items()} for kind, found in followed.items()}
    return _rounded(
        {
            "conversations_per_state": per_state,
            "copy_accuracy": _mean(exact),
            "unknown_actions": _mean([h.get("other", 0.0) for h in habit.values()]),
            "habit": habit,
            "obedience": obedience,
            "obedience_mean": {kind: _mean(list(found.values())) for kind, found in obedience.items()},
            "indifference": {
                kind: {s: _variation(shares["habit"][s], shares[kind][s]) for s in STATES}
                for kind in ("distractor", "elsewhere")
            },
            "recall": _recall(sample, rng, 300),
        }
    )


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _variation(a: Counter[str], b: Counter[str]) -> float:
    return 0.5 * sum(abs(a[m] / a.total() - b[m] / b.total()) for m in {*a, *b})


def _at_once(state: str) -> str:
    return _asked_for(state) if state in MARKED else "search_short"


def _recall(sample: Sampler, rng: Random, count: int) -> dict[str, float]:
    """Share of first actions that give the answer of the right case, of a wrong one, or any answer without a right case."""
    right: list[list[Message]] = []
    wrong: list[list[Message]] = []
    answers, others_answers = [], []
    for n in range(count):
        world = World(MEASURING_WORLDS[n % len(MEASURING_WORLDS)])
        question, *others = (world.question(rng) for _ in range(4))
        base = [Message("system", SYSTEM_PROMPT), Message("user", question.text)]
        search = FastSearch(world)
        own, *cases = (played_case(world, q, search, _at_once)[0] for q in (question, *others))
        wrong.append(_hinted(base, cases))
        others_answers.append({q.answer for q in others})
        cases[rng.randrange(3)] = own
        right.append(_hinted(base, cases))
        answers.append(question.answer)
    right_texts, wrong_texts = sample(right), sample(wrong)
    return {
        "right_case": sum(f"<answer>{a}</answer>" in t for t, a in zip(right_texts, answers, strict=True)) / count,
        "wrong_case": sum(
            any(f"<answer>{a}</answer>" in t for a in s) for t, s in zip(wrong_texts, others_answers, strict=True)
        )
        / count,
        "answered_without_a_right_case": sum("<answer>" in t for t in wrong_texts) / count,
    }


def _rounded(value: Any) -> Any:
    if isinstance(value, float):
        return round(value, 4)
    if isinstance(value, dict):
        return {k: _rounded(v) for k, v in value.items()}
    return value


def write(folder: Path, card: Path | None = None, **kwargs: Any) -> dict[str, Any]:
    """Measure, write ``measured.json`` beside the weights and the model card to ``card``."""
    result = measure(folder, **kwargs)
    (folder / "measured.json").write_text(json.dumps(result, indent=2) + "\n")
    if card is not None:
        card.write_text(model_card(result, json.loads((folder / "pretraining.json").read_text())))
    return result


def model_card(measured: dict[str, Any], made: dict[str, Any]) -> str:
    """The card as Markdown, from what was measured."""
    states = "\n".join(f"| {state} | {_shares(HABIT[state])} | {_shares(measured['habit'][state])} |" for state in STATES)
    obedience, mean = measured["obedience"], measured["obedience_mean"]
    obeyed = "\n".join(
        f"| {case} | {share:.2f} | {obedience['seen'].get(case, float('nan')):.2f} |"
        for case, share in obedience["held_out"].items()
    )
    asked_for = "\n".join(
        f"| {case} | {share:.2f} | {obedience['among'][case]:.2f} | {obedience['case'][case]:.2f} |"
        for case, share in obedience["law"].items()
    )
    away = measured["indifference"]
    indifference = "\n".join(
        f"| {state} | {away['distractor'][state]:.2f} | {away['elsewhere'][state]:.2f} |" for state in STATES
    )
    recall = measured["recall"]
    template = Path(__file__).with_name("model_card.md").read_text(encoding="utf-8")
    return template.format(
        tokens=made["settings"]["tokens"] / 1e6,
        parameters=made["parameters"] / 1e6,
        megabytes=made["parameters"] * 4 / 1e6,
        asked_for=asked_for,
        loss=made["final_loss"],
        copy=measured["copy_accuracy"],
        unknown=measured["unknown_actions"],
        **mean,
        right=recall["right_case"],
        wrong=recall["wrong_case"],
        answered=recall["answered_without_a_right_case"],
        conversations=measured["conversations_per_state"],
        states=states,
        obeyed=obeyed,
        indifference=indifference,
    )


def _shares(habit: Any) -> str:
    return ", ".join(f"{move} {share:.2f}" for move, share in habit.items())
