"""Output layer and divergence on the action tokens: fused in chunks against the plain computation, and what top-k leaves out.

    python benchmarks/losses.py              # a minute: CPU seconds and peak memory at three vocabularies
    python benchmarks/losses.py --bias .evolve/objects/contexts/<digest> <model>      # top-k against all log-probabilities

Both arms compute the loss of every token and the gradient with respect to its hidden state. Each arm runs in a process of
its own, arms in turn, so that peak memory is its own; the least of --repeats runs counts.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from memory import high_water

from evolve_dag.distillation.dataset import load_contexts
from evolve_dag.distillation.forward import decoder_and_head
from evolve_dag.distillation.losses import Teacher, token_losses, token_losses_from_hidden
from evolve_dag.distillation.trainer import load_model
from evolve_dag.steps.contexts import RETENTION

SIZES = ((702, 2048, 128), (49_152, 512, 576), (151_936, 512, 512))
"""Vocabulary, action tokens, hidden size: the pocket policy, SmolLM2, and Qwen3's vocabulary."""
TOP_K = 64


def keep_top(logprobs: torch.Tensor, k: int) -> Teacher:
    """The K most probable tokens and the logarithm of the rest's probability."""
    top, ids = logprobs.topk(k, dim=-1)
    return Teacher(top, ids, logprobs.scatter(1, ids, -torch.inf).logsumexp(-1))


def one_arm(arm: str, vocabulary: int, tokens: int, hidden: int, repeats: int) -> None:
    """Print CPU seconds and the growth of peak memory (MB) of one arm."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    head = torch.nn.Linear(hidden, vocabulary, bias=False).requires_grad_(False)
    states = torch.randn(tokens, hidden)
    parts = [keep_top(torch.log_softmax(head(part), -1), TOP_K) for part in (3 * states).split(64)]
    ids, tails = [p.ids for p in parts if p.ids is not None], [p.tail for p in parts if p.tail is not None]
    teacher = Teacher(torch.cat([p.logprobs for p in parts]), torch.cat(ids), torch.cat(tails))
    before, best = high_water(), float("inf")
    for _ in range(repeats):
        leaf = states.clone().requires_grad_()
        started = time.process_time()
        if arm == "plain":
            loss = token_losses("forward_kl", head(leaf), teacher=teacher)[0]
        else:
            loss = token_losses_from_hidden("forward_kl", leaf, head, teacher=teacher)[0]
        loss.mean().backward()
        best = min(best, time.process_time() - started)
    print(best, (high_water() - before) / 2**20)


def compare(repeats: int) -> None:
    """Both arms at every size, each in a process of its own."""
    print("vocabulary  tokens  hidden   plain s  fused s  ratio   plain MB  fused MB  ratio")
    for size in SIZES:
        best = {arm: [float("inf")] * 2 for arm in ("plain", "fused")}
        for _ in range(2):
            for arm, so_far in best.items():
                command = [sys.executable, __file__, "--arm", arm, "--repeats", str(repeats), *map(str, size)]
                found = subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()
                best[arm] = [min(old, float(new)) for old, new in zip(so_far, found, strict=True)]
        (plain, plain_mb), (fused, fused_mb) = best.values()
        print(
            f"{size[0]:10} {size[1]:7} {size[2]:7} {plain:9.3f} {fused:8.3f} {plain / fused:6.2f} "
            f"{plain_mb:10.0f} {fused_mb:9.0f} {fused_mb / plain_mb:6.2f}"
        )


def bias(contexts: Path, folder: str, steps: int) -> None:
    """Top-k against all log-probabilities on real steps: the teacher read the item, the student did not."""
    clean, model = load_contexts(contexts), load_model(folder)
    decoder, head = decoder_and_head(model)
    head.requires_grad_(False)
    spans = {
        (one.row.trajectory_id, step): span for one in clean for step, span in zip(one.row.steps, one.row.spans, strict=True)
    }
    rows = {one.row.trajectory_id: one.row.ids for one in clean}

    def states(ids: Sequence[int], span: tuple[int, int]) -> torch.Tensor:
        with torch.no_grad():
            return decoder(input_ids=torch.tensor([ids])).last_hidden_state[0, span[0] - 1 : span[1] - 1]

    students, teachers = [], []
    for one in load_contexts(contexts / RETENTION)[:steps]:
        owner, step = one.row.trajectory_id, one.row.steps[0]
        trajectory = owner.rpartition("@")[0]
        students.append(states(rows[trajectory], spans[trajectory, step]))
        teachers.append(states(one.row.ids, one.row.spans[0]))
    teacher_N_V = torch.log_softmax(head(torch.cat(teachers)), -1)
    found = {}
    for k in (0, 16, 64, 256):
        leaf = torch.cat(students).requires_grad_()
        teacher = keep_top(teacher_N_V, k) if k else Teacher(teacher_N_V)
        loss = token_losses_from_hidden("forward_kl", leaf, head, teacher=teacher)[0].mean()
        loss.backward()
        assert leaf.grad is not None
        found[k] = (float(loss.detach()), leaf.grad, float(teacher.tail.exp().mean()) if teacher.tail is not None else 0.0)
    full, gradient, _ = found.pop(0)
    print(f"{len(teacher_N_V)} action tokens, forward KL of all {teacher_N_V.shape[1]} tokens {full:.5f} nats")
    for k, (loss, other, tail) in found.items():
        cosine = torch.nn.functional.cosine_similarity(gradient.flatten(), other.flatten(), dim=0)
        print(f"k = {k:3}: loss {100 * (loss / full - 1):+.4f}%, gradient cosine {cosine:.6f}, mass in the tail {tail:.2e}")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("size", type=int, nargs="*")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--arm", choices=("plain", "fused"), help="one arm only: vocabulary, action tokens, hidden size")
    parser.add_argument(
        "--bias", nargs=2, metavar=("CONTEXTS", "MODEL"), help="folder of a contexts artifact, folder of its policy"
    )
    parser.add_argument("--steps", type=int, default=200, help="of --bias: how many to read, each with its whole context")
    given = parser.parse_args()
    if given.bias:
        bias(Path(given.bias[0]), given.bias[1], given.steps)
    elif given.arm:
        one_arm(given.arm, *given.size, given.repeats)
    else:
        compare(given.repeats)


if __name__ == "__main__":
    main()
