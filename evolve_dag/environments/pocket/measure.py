"""Measures what the pocket policy can do, for its model card (``evolve pocket measure``).

Every figure is sampled at temperature 1 in worlds that neither pretraining nor any task uses. Obedience is measured on
paraphrases that pretraining never showed (:func:`~evolve_dag.environments.pocket.language.is_held_out`) and, beside
it, on ones that it did; for marks and rows also on what the worlds of tasks ask for, which no item of pretraining ever
recommended, in the words of the extractor.
"""

from __future__ import annotations

import copy
import itertools
import json
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from random import Random
from typing import Any

from evolve_dag.environments.pocket.language import GROUPS, SYSTEM_PROMPT, PhraseBank, state_of_mark
from evolve_dag.environments.pocket.pretrain import CASES, RECIPE, Encoder
from evolve_dag.environments.pocket.script import (
    GROUP_MOVES,
    HABIT,
    MOVES,
    SKILL,
    WORLD_DEPTHS,
    FastSearch,
    ScriptedAgent,
    Transcript,
    action_text,
    habitual,
    moves,
    taught,
)
from evolve_dag.environments.pocket.world import LAW, World
from evolve_dag.experience.extraction.instance import case_text
from evolve_dag.experience.phrases import render
from evolve_dag.records import Message

MEASURING_WORLDS = range(900_000, 900_040)
"""Worlds of this measurement alone."""
MARKED = [state_of_mark(word) for word in (*LAW.marks, LAW.label)]
"""States of marks and rows that the worlds of tasks have."""
STATES = [*MOVES, *MARKED]


class Sampler:
    """Samples one action for many conversations at once with plain ``transformers``."""

    def __init__(self, folder: Path, seed: int = 0) -> None:
        import torch
        from transformers import AutoModelForCausalLM, AutoTokenizer

        self.tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
        self.encode = Encoder(self.tokenizer)
        self.opening = self.encode.header["assistant"]
        self.model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=False).eval()
        torch.manual_seed(seed)

    def __call__(self, conversations: Sequence[Sequence[Message]], *, batch: int = 128, tokens: int = 40) -> list[str]:
        """One sampled action per conversation, control tokens included, end-of-turn removed."""
        import torch

        prompts = [[*self.encode(Transcript(tuple(c), (False,) * len(c), "", False))[0], *self.opening] for c in conversations]
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
        world = World(seed, depths=WORLD_DEPTHS)
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
    """The move that the law of tasks asks for under a mark or in rows."""
    return LAW.row if state == state_of_mark(LAW.label) else LAW.tools[state.split()[1]]


def _lesson(state: str) -> str:
    """The same as the extractor writes it."""
    mark = {"observation": "page", "evidence": "asked", "mark": state.split()[1]}
    return render(mark, "answer_highest" if state == state_of_mark(LAW.label) else f"use:{_asked_for(state)}")


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


def measure(folder: Path, *, per_state: int = 150, seed: int = 0) -> dict[str, Any]:
    """All figures of the model card.

    Args:
        folder: the model.
        per_state: conversations per state; each is asked once per move.
        seed: of the conversations and the sampling.

    Returns:
        ``copy_accuracy``, ``habit`` (state -> move -> share, no item), ``obedience`` (state -> move -> share followed, held-out
        paraphrases), ``obedience_seen``, ``indifference`` (total variation that distractors and items on other states cause),
        ``recall`` (right and wrong case), ``headroom`` (:func:`headroom`).
    """
    rng = Random(seed)
    sample = Sampler(folder, seed)
    stand = situations(per_state, rng)
    jobs: list[tuple[str, str, str, list[Message], ScriptedAgent]] = []
    held_out, seen = PhraseBank(held_out=True), PhraseBank(held_out=False)
    for state, found in stand.items():
        for messages, agent in found:
            jobs.append(("habit", state, "", messages, agent))
            jobs.append(("distractor", state, "", _hinted(messages, [held_out.distractor(rng) for _ in range(2)]), agent))
            other = rng.choice([s for s in STATES if s != state])
            item = held_out.principle(other, rng.choice(taught(other)), rng)
            jobs.append(("elsewhere", state, "", _hinted(messages, [item]), agent))
            if state in MARKED:
                jobs.append(("law", state, _asked_for(state), _hinted(messages, [_lesson(state)]), agent))
            for move in taught(state):
                jobs.append(("held_out", state, move, _hinted(messages, [held_out.principle(state, move, rng)]), agent))
                if len(jobs) % 3 == 0:
                    jobs.append(("seen", state, move, _hinted(messages, [seen.principle(state, move, rng)]), agent))
            for group, states in GROUPS.items():
                for move in GROUP_MOVES[group] if state in states else ():
                    jobs.append(("held_out", state, move, _hinted(messages, [held_out.principle(group, move, rng)]), agent))
    texts = sample([j[3] for j in jobs])
    shares: dict[str, dict[str, Counter[str]]] = defaultdict(lambda: defaultdict(Counter))
    followed: dict[str, dict[str, list[bool]]] = {kind: defaultdict(list) for kind in ("held_out", "seen", "law")}
    exact: list[bool] = []
    for (kind, state, move, _, agent), text in zip(jobs, texts, strict=True):
        done, copied = _classify(text, agent)
        if done != "other":
            exact.append(copied)
        if move:
            followed[kind][f"{state} -> {move}"].append(done == move)
        else:
            shares[kind][state][done] += 1
    habit = {s: {m: n / sum(c.values()) for m, n in sorted(c.items())} for s, c in shares["habit"].items()}
    result: dict[str, Any] = {
        "conversations_per_state": per_state,
        "copy_accuracy": sum(exact) / len(exact),
        "unknown_actions": sum(c["other"] for c in shares["habit"].values())
        / sum(sum(c.values()) for c in shares["habit"].values()),
        "habit": habit,
        "habit_taught": HABIT,
        "obedience": {k: sum(v) / len(v) for k, v in followed["held_out"].items()},
        "obedience_law": {k: sum(v) / len(v) for k, v in followed["law"].items()},
        "obedience_seen": {k: sum(v) / len(v) for k, v in followed["seen"].items()},
        "indifference": {
            kind: {s: _variation(shares["habit"][s], shares[kind][s]) for s in STATES} for kind in ("distractor", "elsewhere")
        },
        "recall": _recall(sample, rng, 300),
        "headroom": headroom(),
    }
    result["obedience_mean"] = sum(result["obedience"].values()) / len(result["obedience"])
    result["obedience_law_mean"] = sum(result["obedience_law"].values()) / len(result["obedience_law"])
    result["obedience_seen_mean"] = sum(result["obedience_seen"].values()) / len(result["obedience_seen"])
    return _rounded(result)


def headroom(count: int = 600, steps: int = 12) -> dict[str, float]:
    """Share of questions that a script answers.

    Returns:
        ``expert``, who knows every lesson of the world, and ``habit``, that of pretraining. Both copy without a slip.
    """
    lessons = {**SKILL, "asked": "answer", **{state_of_mark(mark): tool for mark, tool in LAW.tools.items()}}
    lessons[state_of_mark(LAW.label)] = LAW.row
    return {"expert": _answered(lessons, count, steps), "habit": _answered({}, count, steps)}


def _answered(lessons: Mapping[str, str], count: int, steps: int) -> float:
    rng, right = Random(5), 0
    for n in range(count):
        if n % 100 == 0:
            world = World(MEASURING_WORLDS[n // 100])
            search = FastSearch(world)
        agent = ScriptedAgent(world, world.question(rng), search)
        for _ in range(steps):
            _, tool, argument = agent.act(lessons.get(agent.state) or habitual(agent.state, [], rng))
            if tool == "answer":
                right += argument == agent.question.answer
                break
            agent.observe(tool, argument)
    return right / count


def _variation(a: Counter[str], b: Counter[str]) -> float:
    return 0.5 * sum(abs(a[m] / a.total() - b[m] / b.total()) for m in {*a, *b})


def _recall(sample: Sampler, rng: Random, count: int) -> dict[str, float]:
    """Share of first actions that give the answer of the right case, of a wrong one, or any answer without a right case."""
    right: list[list[Message]] = []
    wrong: list[list[Message]] = []
    answers, others_answers = [], []
    for n in range(count):
        world = World(MEASURING_WORLDS[n % len(MEASURING_WORLDS)])
        question, *others = (world.question(rng) for _ in range(4))
        base = [Message("system", SYSTEM_PROMPT), Message("user", question.text)]
        cases = [case_text(q.text, q.answer) for q in others]
        wrong.append(_hinted(base, cases))
        others_answers.append({q.answer for q in others})
        cases[rng.randrange(3)] = case_text(question.text, question.answer)
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
    states = "\n".join(
        f"| {state} | {_shares(HABIT[state if state in MOVES else state.split()[0]])} | {_shares(measured['habit'][state])} |"
        for state in STATES
    )
    obeyed = "\n".join(
        f"| {case} | {share:.2f} | {measured['obedience_seen'].get(case, float('nan')):.2f} |"
        for case, share in measured["obedience"].items()
    )
    away = measured["indifference"]
    indifference = "\n".join(
        f"| {state} | {away['distractor'][state]:.2f} | {away['elsewhere'][state]:.2f} |" for state in STATES
    )
    recall = measured["recall"]
    template = Path(__file__).with_name("model_card.md").read_text(encoding="utf-8")
    decided = made["settings"].get("decisions", 0.0) > 0
    stages = (*RECIPE, *CASES) if decided else RECIPE
    return template.format(
        name="the pocket policy that recalls cases (`pocket-cases`)" if decided else "the pocket policy (`pocket`)",
        deciding=DECIDING if decided else "",
        recall_limit=RECALL_LIMITED if decided else NO_RECALL,
        stages=len(stages),
        tokens=sum(stage.tokens * stage.until for stage in stages) / 1e6,
        parameters=made["parameters"] / 1e6,
        megabytes=made["parameters"] * 4 / 1e6,
        law=measured["obedience_law_mean"],
        rows=list(measured["obedience_law"].values())[-1],
        asked_for="\n".join(f"| {case} | {share:.2f} |" for case, share in measured["obedience_law"].items()),
        loss=made["final_loss"],
        copy=measured["copy_accuracy"],
        unknown=measured["unknown_actions"],
        held_out=measured["obedience_mean"],
        seen=measured["obedience_seen_mean"],
        right=recall["right_case"],
        wrong=recall["wrong_case"],
        answered=recall["answered_without_a_right_case"],
        expert=measured["headroom"]["expert"],
        habit=measured["headroom"]["habit"],
        conversations=measured["conversations_per_state"],
        states=states,
        obeyed=obeyed,
        indifference=indifference,
    )


DECIDING = "; the last stages, which go on from `pocket`, show little but whether a case is that of the question"
NO_RECALL = """\
- **Recall does not work.** The transcripts show it in one of ten and fewer, and most decisions where no case is the right one
  are played for the agent and not learned: a policy that sees cases often answers at once, and mostly wrong. The aim was at
  least 0.60 for the right case and at most 0.05 for a wrong one. `pocket-cases` is the same policy after five million tokens of
  such decisions ([its card](pocket_cases_model_card.md)); experiments with instance-level experience want that one."""
RECALL_LIMITED = "- A case is recalled by its very question. What a case says of other questions was never taught."


def _shares(habit: Any) -> str:
    return ", ".join(f"{move} {share:.2f}" for move, share in habit.items())
