"""Is the adapter that vLLM serves the one that was asked for?

vLLM can serve the base model, an older adapter or another request's adapter without a word. So after loading, the likeliest
next tokens of a few fixed contexts are compared with transformers + peft on the same files, for the adapter and, in the same
batch, for the bare base model. The calls are ordinary ones: what they go through is what rollouts go through.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from evolve_dag.errors import ModelError
from evolve_dag.inference.vllm_source import Adapter, Ask, Sampled
from evolve_dag.protocols import Sampling
from evolve_dag.records import Message

if TYPE_CHECKING:
    from evolve_dag.inference.chat import ChatFormat

TOLERANCE: Mapping[str, float] = {"float32": 2e-3, "float16": 0.03, "bfloat16": 0.1}
"""Greatest mean difference of log-probabilities (nats) that rounding explains; docs/LOG.md has what was measured."""
TOP = 5
"""Likeliest ids that are compared per context."""
_SHARE = (0.3, 1.7)
"""Part of the adapter's change that must be there, by least squares; 1 is right, 0 the base model. Looked at where the change
is smaller than the tolerance but more than half of it; rounding alone moves it by about 0.2 there."""
_KEPT = 64
"""Likeliest ids whose expected values are kept; what vLLM lists beyond them is compared with the last."""
_TEMPERATURE = 0.5
"""Not 1: log-probabilities must be those before the temperature, and would differ here if they were not."""

_DIALOGUES: tuple[tuple[Message, ...], ...] = (
    (Message("user", "What is the capital of France?"),),
    (Message("system", "Use the tools: search, visit. Then answer."), Message("user", "Who is the mayor of Bado Keli?")),
    (
        Message("system", "You are a careful assistant."),
        Message("user", "Count from 1 to 9 and stop."),
        Message("assistant", "1 2 3 4 5"),
        Message("user", "Go on."),
    ),
    (
        Message("user", "Find the year in which the bridge was built."),
        Message("assistant", '<tool_call>\n{"name": "search", "arguments": {"query": "bridge built year"}}\n</tool_call>'),
        Message("tool", "2 results\n1. bridge: opened in 1932\n2. bridge: closed"),
    ),
)
_BEGINNINGS = ("", "The", "I will search", '<tool_call>\n{"name": "', "<answer>")
"""How the assistant's turn begins; its next token is compared."""

Table = Mapping[int, float]
"""Id -> log-probability of one context's next token, the likeliest first."""


@dataclass(frozen=True)
class Probe:
    """Contexts and what must come back."""

    contexts: tuple[tuple[int, ...], ...]
    adapter: Adapter | None
    base: tuple[Table, ...]
    """Expected of the bare base model, one per context."""
    adapted: tuple[Table, ...]
    """Expected with the adapter; empty without one."""
    tolerance: float
    """Greatest mean difference, nats."""

    @property
    def asks(self) -> list[Ask]:
        """The calls to make, all at once: base and adapter by turns, so that they share batches."""
        sampling = Sampling(temperature=_TEMPERATURE, max_tokens=1, seed=1)
        who = (None, self.adapter) if self.adapter else (None,)
        return [Ask(ids, sampling, 1, (), adapter, top=TOP) for ids in self.contexts for adapter in who]

    def judge(self, answers: Sequence[Sampled], where: str) -> None:
        """Compare what came back.

        Args:
            answers: to :attr:`asks`, in their order.
            where: who answered, for messages.

        Raises:
            ModelError: it is not what was asked for.
        """
        tables = [answer.top[0] for answer in answers]
        step = 2 if self.adapter else 1
        base = _compare(tables[::step], self.base)
        if self.adapter is not None:
            adapted = _compare(tables[1::2], self.adapted)
            share = _share(tables[1::2], self.base, self.adapted)
            change = _compare([dict(list(table.items())[:TOP]) for table in self.adapted], self.base)
            if adapted > self.tolerance:
                looks = "the bare base model" if _compare(tables[1::2], self.base) <= self.tolerance else "something else"
                raise ModelError(
                    f"{where}: in the name of adapter {self.adapter.folder} it serves {looks}: log-probabilities are off by "
                    f"{adapted:.2g} nats in the mean, {self.tolerance:g} is allowed",
                    "the folder must hold the same files in the server's sight as here; restart the server if it holds a stale "
                    "adapter; compare models.policy.path and dtype with what it was started with",
                )
            if change > self.tolerance / 2 and not _SHARE[0] <= share <= _SHARE[1]:
                raise ModelError(
                    f"{where}: of what adapter {self.adapter.folder} changes, {share:.0%} is served",
                    "the adapter is not applied, or not once: restart the server, and compare its LoRA options",
                )
            if change <= self.tolerance / 2:
                logging.getLogger(__name__).warning(
                    "adapter %s changes the probe by %.2g nats only: rounding hides whether it is applied",
                    self.adapter.folder,
                    change,
                )
        if base > self.tolerance:
            raise ModelError(
                f"{where}: calls without adapter are off by {base:.2g} nats in the mean, {self.tolerance:g} is allowed",
                "where the base model is the right one, all adapter slots are taken (earlier adapters keep theirs) "
                "and such calls get one of them: restart the server, with --max-loras above the adapters to come; else compare "
                "models.policy.path, dtype and --logprobs-mode raw_logprobs",
            )


def make_probe(folder: Path, adapter: Adapter | None, chat: ChatFormat, *, dtype: str, device: str = "cpu") -> Probe:
    """Contexts with their expected values from transformers + peft.

    Values are remembered for the life of the process, by the contents of the base's folder and the adapter's name.

    Args:
        folder: of the base model.
        device: where to compute; everything is freed again.

    Raises:
        ModelError: model or adapter cannot be read.
    """
    from evolve_dag.inference.folders import folder_digest

    contexts = tuple(
        (*chat.encode(dialogue), *chat.encode_action(beginning)[:-1]) for dialogue in _DIALOGUES for beginning in _BEGINNINGS
    )
    place = (folder_digest(folder), dtype)
    wanted = [(place, adapter.name if adapter else "") for adapter in ((None, adapter) if adapter else (None,))]
    if not all(key in _REMEMBERED for key in wanted):
        for key, tables in zip(wanted, _expect(folder, adapter, contexts, dtype, device), strict=True):
            _REMEMBERED[key] = tables
    base, *adapted = (_REMEMBERED[key] for key in wanted)
    return Probe(contexts, adapter, base, adapted[0] if adapted else (), TOLERANCE[dtype])


_REMEMBERED: dict[tuple[tuple[str, str], str], tuple[Table, ...]] = {}


def _expect(
    folder: Path, adapter: Adapter | None, contexts: Sequence[Sequence[int]], dtype: str, device: str
) -> list[tuple[Table, ...]]:
    """Next-token tables of the base and, where there is one, of the adapter."""
    import torch

    from evolve_dag.inference.quantization import pretrained
    from evolve_dag.inference.quiet import quiet_peft

    @torch.inference_mode()
    def tables(model: Any) -> tuple[Table, ...]:
        found = []
        for context in contexts:
            logits = model(input_ids=torch.tensor([list(context)], device=device), use_cache=False).logits[0, -1].float()
            values, ids = torch.log_softmax(logits, dim=-1).topk(min(_KEPT, len(logits)))
            found.append(dict(zip(ids.tolist(), values.tolist(), strict=True)))
        return tuple(found)

    try:
        # Weights as they are served, arithmetic in float32: rounding then stands on one side of the comparison only.
        model = pretrained(folder, dtype=dtype, quantize="none", device="cpu").float().to(device).eval()
        results = [tables(model)]
        if adapter is not None:
            from peft import PeftModel

            with quiet_peft():
                results.append(tables(PeftModel.from_pretrained(model, str(adapter.folder)).eval()))
    except Exception as problem:  # transformers, peft and safetensors share no base class
        where = f" with {adapter.folder}" if adapter else ""
        raise ModelError(
            f"the probe of {folder}{where} cannot be computed: {type(problem).__name__}: {problem}",
            "both must be intact and fit each other; where memory is short, set runtime.device to cpu",
        ) from problem
    del model
    if torch.device(device).type == "cuda":
        torch.cuda.empty_cache()  # the engine wants it
    return results


def _at(table: Table, index: int, seen: float = 0.0) -> float:
    """Expected value of an id; of one beyond those kept, what is seen where it may be right, else the most that it can be."""
    value = table.get(index)
    return value if value is not None else min(seen, min(table.values()))


def _compare(tables: Sequence[Table], expected: Sequence[Table]) -> float:
    """Mean absolute difference, nats, over all ids that ``tables`` list."""
    differences = [
        abs(value - _at(wanted, index, value))
        for table, wanted in zip(tables, expected, strict=True)
        for index, value in table.items()
    ]
    return sum(differences) / len(differences)


def _share(tables: Sequence[Table], base: Sequence[Table], adapted: Sequence[Table]) -> float:
    """How far ``tables`` lie on the way from ``base`` (0) to ``adapted`` (1), by least squares."""
    along = across = 0.0
    for table, zero, one in zip(tables, base, adapted, strict=True):
        for index, value in table.items():
            if index in zero and index in one:
                change = one[index] - zero[index]
                along += (value - zero[index]) * change
                across += change * change
    return along / across if across else 1.0
