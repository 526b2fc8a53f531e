"""What half precision keeps of what an adapter learned, by where the adapter is added.

    python benchmarks/half_precision.py models/smollm2-135m              # two minutes on one core

A LoRA adapter learns four answers by heart. Its loss on them in float32, over the same weights, is the truth; each way of
computing it in bfloat16 keeps a share of the distance from the base. A share can be above 1: what is rounded is noise as well.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from evolve_dag.config.schema import DistillationSettings, Regime
from evolve_dag.distillation.adapter import load_adapter
from evolve_dag.distillation.alignment import StudentRow
from evolve_dag.distillation.dataset import DistillationRow, StepView
from evolve_dag.distillation.trainer import distill
from evolve_dag.inference.lora import wear

QUESTIONS = ("Which city is the capital?", "Who built the old bridge?", "Name the northern river.", "When was the fair held?")
ANSWERS = ("I ask the index first, then I read the third page.", "I ask the index first, then I look at the notes.")
LEARNING = Regime(source="student", divergence="cross_entropy", rejection=False, refused=True)


def rows_of(folder: Path) -> list[DistillationRow]:
    tokenizer: Any = AutoTokenizer.from_pretrained(folder)
    rows = []
    for number, question in enumerate(QUESTIONS):
        context = tokenizer(f"<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n")["input_ids"]
        answer = tokenizer(ANSWERS[number % 2])["input_ids"]
        row = StudentRow(f"t{number}#0", (*context, *answer), (0,), ((len(context), len(context) + len(answer)),))
        rows.append(DistillationRow(row, (StepView(0, (), "", len(context)),), None))
    return rows


@torch.inference_mode()
def loss(model: Any, rows: list[DistillationRow]) -> float:
    """Nats a token."""
    total = tokens = 0.0
    for one in rows:
        ids, ((start, end),) = torch.tensor([one.row.ids]), one.row.spans
        found = model(input_ids=ids).logits[0, start - 1 : end - 1].float().log_softmax(-1)
        total -= float(found.gather(1, ids[0, start:end, None]).sum())
        tokens += end - start
    return total / tokens


def in_peft(base: Any, adapter: Path) -> Any:
    from peft import PeftModel

    return PeftModel.from_pretrained(base, str(adapter)).eval()


WAYS: dict[str, Callable[[Any, Path], Any]] = {
    "merged into the weights": lambda base, adapter: in_peft(base, adapter).merge_and_unload(),
    "beside them, peft's layer": in_peft,
    "beside them, rounded once": lambda base, adapter: wear(in_peft(base, adapter)),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--rates", type=float, nargs="+", default=[1e-5, 1e-4, 1e-3])
    given = parser.parse_args()
    torch.set_num_threads(1)

    def base(dtype: torch.dtype) -> Any:
        return AutoModelForCausalLM.from_pretrained(given.model, dtype=dtype).eval()

    rows = rows_of(given.model)
    print("| learning rate | float32: base, with the adapter | " + " | ".join(WAYS) + " |")
    print("|---|---|" + "---|" * len(WAYS))
    for rate in given.rates:
        settings = DistillationSettings(rank=32, alpha=64, learning_rate=rate, epochs=given.steps, tokens_per_batch=2048)
        with tempfile.TemporaryDirectory() as folder:
            adapter = Path(folder)
            distill(base(torch.float32), rows, settings=settings, regime=LEARNING, out=adapter, seed=1)
            plain, rounded = loss(base(torch.float32), rows), loss(base(torch.bfloat16), rows)
            truth = loss(load_adapter(base(torch.float32), adapter), rows)
            found = [loss(way(base(torch.bfloat16), adapter), rows) for way in WAYS.values()]
        shares = [f"{(rounded - one) / (plain - truth):.0%}" for one in found]
        print(f"| {rate:g} | {plain:.3f}, {truth:.3f} | " + " | ".join(shares) + " |", flush=True)


if __name__ == "__main__":
    main()
