"""The real chat format, the real injection and the shipped policy's trained weights, together."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer

from evolve_dag.config.schema import TransformersModelSettings
from evolve_dag.distillation.alignment import Aligned, align, replay_injection
from evolve_dag.distillation.teacher import TeacherScorer
from evolve_dag.distillation.trainer import load_model
from evolve_dag.errors import AlignmentError
from evolve_dag.experience.injection import block, inject_global, inject_step_wise
from evolve_dag.inference.chat import ChatFormat
from evolve_dag.inference.folders import model_folder
from evolve_dag.plain import GLOBAL_HEADING, STEP_HEADING
from evolve_dag.records import Step, Trajectory

ACTIONS = [
    'Look it up.\n<tool_call>\n{"name": "search", "arguments": {"query": "Bado Keli mayor"}}\n</tool_call>',
    'Open it.\n<tool_call>\n{"name": "visit", "arguments": {"page": "city Bado Keli"}}\n</tool_call>',
    "It says so.\n<answer>Rato Miku</answer>",
]
OBSERVATIONS = [
    "2 results\n1. city Bado Keli: mayor: person Rato Miku\n2. river Bado Keli: mouth: city Zano Pile",
    "page: city Bado Keli\nmayor: person Rato Miku\nstream: river Zano Pile",
    None,
]
PRINCIPLES = [
    ["Verify: when a result names the page, visit it before you answer."],
    ["Verify: when a result names the page, visit it before you answer.", "Words: when a search is empty, shorten it."],
    [],
]


@pytest.fixture(scope="module")
def chat() -> ChatFormat:
    return ChatFormat.from_tokenizer(AutoTokenizer.from_pretrained(str(model_folder(TransformersModelSettings()))))


def recorded(chat: ChatFormat, pattern: str) -> Trajectory:
    """A trajectory as the loop records it, with what the injection module added at each step."""
    texts = [PRINCIPLES[0]] * 3 if pattern == "global" else PRINCIPLES
    heading = GLOBAL_HEADING if pattern == "global" else STEP_HEADING
    steps = tuple(
        Step(
            index=index,
            text=action,
            token_ids=tuple(chat.encode_action(action)),
            logprobs=(),
            observation=OBSERVATIONS[index],
            selected=tuple(f"p{n}" for n in range(len(texts[index]))),
            injected=block(heading, texts[index]),
        )
        for index, action in enumerate(ACTIONS)
    )
    return Trajectory(
        "t#0", "t", 0, 0, "Tools: search, visit.", "What is the mayor of city Bado Keli?", steps, "answered", reward=1.0
    )


def aligned_of(chat: ChatFormat, pattern: str) -> Aligned:
    return align(recorded(chat, pattern), chat, replay_injection(pattern))  # type: ignore[arg-type]


@pytest.mark.parametrize("pattern", ["step_wise", "global"])
def test_replay_is_what_the_injection_module_made(chat: ChatFormat, pattern: str) -> None:
    trajectory = recorded(chat, pattern)
    inject = inject_global if pattern == "global" else inject_step_wise
    texts = [PRINCIPLES[0]] * 3 if pattern == "global" else PRINCIPLES
    for step in range(3):
        replayed = replay_injection(pattern)(trajectory, step)  # type: ignore[arg-type]
        assert tuple(replayed.messages) == inject(trajectory.history(step), texts[step])


@pytest.mark.parametrize("pattern", ["step_wise", "global"])
def test_scores_of_the_shipped_weights_equal_one_sequence_per_step(chat: ChatFormat, pattern: str) -> None:
    model = load_model(model_folder(TransformersModelSettings())).eval()
    aligned = aligned_of(chat, pattern)
    scored = TeacherScorer(model, top_k=0).score([aligned.views])[0]
    rows = []
    with torch.no_grad():
        for view in aligned.views:
            logits = model(input_ids=torch.tensor([view.ids])).logits[0].float()
            rows.append(torch.log_softmax(logits, -1)[view.start - 1 : len(view.ids) - 1])
    np.testing.assert_allclose(scored.logprobs, torch.cat(rows).numpy(), atol=1e-4, rtol=1e-4)


def test_experience_that_leaked_into_an_observation_is_found(chat: ChatFormat) -> None:
    trajectory = recorded(chat, "step_wise")
    first = replace(trajectory.steps[0], observation=f"{OBSERVATIONS[0]}{trajectory.steps[1].injected}")
    with pytest.raises(AlignmentError, match="step 1: the clean history holds experience"):
        align(replace(trajectory, steps=(first, *trajectory.steps[1:])), chat, replay_injection("step_wise"))
