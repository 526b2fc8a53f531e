"""Whether the recipe of an experiment suits the policy that it names, said before anything runs."""

from __future__ import annotations

from collections.abc import Iterator

from evolve_dag.config.schema import SHIPPED, Experiment
from evolve_dag.errors import EvolveError
from evolve_dag.inference.folders import is_pocket, longest_context, place

HIGHEST_RATE = 1e-3
"""Peak learning rate beyond which a warning is due. LoRA on language models is trained at 1e-5 to some 5e-4; the pocket policy,
of a million parameters, at 2.5e-3 (docs/adr/0019-drills.md)."""


def warnings(experiment: Experiment) -> Iterator[str]:
    """What to say about it; nothing of the policy that ships."""
    policy, rollout, rate = experiment.models.policy, experiment.rollout, experiment.distillation.learning_rate
    if policy.path in SHIPPED:
        return
    if rate > HIGHEST_RATE and not is_pocket(policy):
        yield (
            f"distillation.learning_rate {rate:g} suits the pocket policy, of a million parameters; a language model is lost "
            f"at it. {policy.path} is one: take the values of configs/own_corpus_llm.yaml (1e-5) in place of pocket.yaml's, "
            "whose limits and extraction are a small model's too"
        )
    try:
        longest = longest_context(policy, place(policy))
    except EvolveError:  # no config.json: told elsewhere
        return
    if rollout.max_steps > 2 and rollout.reach >= longest:
        yield (
            f"rollout.max_tokens {rollout.max_tokens}: beyond it one more action, what that brings, and the answer may come "
            f"(max_action_tokens {rollout.max_action_tokens}), and the model takes {longest} tokens: where they do not fit, an "
            "episode ends without an answer"
        )
