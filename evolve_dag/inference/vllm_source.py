"""What vLLM is asked and what it answers, whether it runs in an engine of ours or behind servers."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from evolve_dag.errors import ModelError
from evolve_dag.protocols import Sampling
from evolve_dag.store.layout import ADAPTER_CONFIG, ADAPTER_WEIGHTS

RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""Values of ``max_lora_rank`` that vLLM knows."""
LINEAR = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


@dataclass(frozen=True, slots=True)
class Adapter:
    """A LoRA adapter as it is served."""

    name: str
    """``evolve-`` and the start of the SHA-256 of its two files: other weights never go by the same name."""
    folder: Path
    """Absolute; what peft wrote, which vLLM reads as it is."""
    rank: int
    targets: tuple[str, ...]
    """Last parts of the names of the layers that it changes, without the output layer."""

    @classmethod
    def read(cls, folder: Path) -> Adapter:
        """Look at an adapter's files.

        Raises:
            ModelError: they are missing, or vLLM cannot serve such an adapter.
        """
        folder = folder.resolve()
        digest = hashlib.sha256()
        try:
            text = (folder / ADAPTER_CONFIG).read_bytes()
            digest.update(text)
            with (folder / ADAPTER_WEIGHTS).open("rb") as handle:
                digest.update(hashlib.file_digest(handle, "sha256").digest())
            config = json.loads(text)
            rank, modules = int(config["r"]), config.get("target_modules")
        except (OSError, ValueError, KeyError, TypeError) as problem:
            raise ModelError(
                f"adapter {folder}: cannot be read: {type(problem).__name__}: {problem}",
                f"name the folder of {ADAPTER_CONFIG} and {ADAPTER_WEIGHTS}; materialize adapter again if they are broken",
            ) from problem
        if rank > RANKS[-1]:
            raise ModelError(
                f"adapter {folder}: rank {rank}, vLLM serves at most {RANKS[-1]}",
                "lower distillation.rank, or use models.policy.backend: transformers",
            )
        named = {str(name).rsplit(".", 1)[-1] for name in modules} if isinstance(modules, list) else set(LINEAR)
        # LoRA on the output layer, with log-probabilities, ends vLLM's engine (0.32); our adapters leave it alone.
        return cls(f"evolve-{digest.hexdigest()[:16]}", folder, rank, tuple(sorted(named - {"lm_head"})))


@dataclass(frozen=True, slots=True)
class Ask:
    """One call."""

    ids: tuple[int, ...]
    """The context, control tokens and all; vLLM adds nothing to it."""
    sampling: Sampling
    limit: int
    """Most tokens to sample."""
    stops: tuple[int, ...]
    """Ids that end the answer, being part of it."""
    adapter: Adapter | None = None
    """None asks the bare base model."""
    session: str = ""
    top: int = 0
    """How many of the likeliest ids to report at each position, besides the sampled one."""
    schema: Mapping[str, Any] | None = None
    """JSON schema that the answer must fit."""

    def parameters(self) -> dict[str, Any]:
        """Sampling parameters under vLLM's names. All are said: what is left out, a server takes from the model's
        ``generation_config.json`` (Qwen3: top-k 20), so it would sample from something else than we think."""
        return {
            "temperature": self.sampling.temperature,
            "top_p": self.sampling.top_p,
            "top_k": -1,
            "min_p": 0.0,
            "repetition_penalty": 1.0,
            "presence_penalty": 0.0,
            "frequency_penalty": 0.0,
            "seed": self.sampling.seed & (2**63 - 1),
            "max_tokens": self.limit,
            "stop_token_ids": list(self.stops),
            "logprobs": self.top,
        }


@dataclass(frozen=True, slots=True)
class Sampled:
    """One answer."""

    ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    """At temperature 1, of each id."""
    cached: int = 0
    """Tokens of the context whose keys and values were reused."""
    top: tuple[Mapping[int, float], ...] = ()
    """Per position: id -> log-probability, of the likeliest ids and the sampled one."""


class Check(Protocol):
    """How a source finds out whether the right adapter answers (:class:`~evolve_dag.inference.vllm_probe.Probe`)."""

    @property
    def asks(self) -> list[Ask]:
        """The calls to make, all at once."""
        ...

    def judge(self, answers: Sequence[Sampled], where: str) -> None:
        """Look at the answers, in the order of :attr:`asks`.

        Raises:
            ModelError: something else answers in the adapter's name; ``where`` is named.
        """
        ...


class Source(Protocol):
    """Who samples. Everything here may be called from any thread."""

    max_context: int
    """Longest context with its answer, in tokens."""
    timeout_seconds: float | None
    """Longest wait for one answer; None: the source keeps to a limit itself."""

    def load(self, adapter: Adapter | None, probe: Check | None) -> None:
        """Make ``adapter`` ready everywhere, and check that it is the one that answers.

        Args:
            probe: None checks nothing.

        Raises:
            ModelError: it cannot be loaded, or something else answers in its name.
        """
        ...

    def submit(self, ask: Ask) -> Future[Sampled]:
        """Start a call; cancelling the future ends it. It fails with :class:`ModelError`."""
        ...

    def late(self, seconds: float) -> None:
        """A call was given up after ``seconds``. Where nothing else came meanwhile either, whoever samples hangs."""
        ...

    def release(self, session: str) -> None: ...

    def close(self) -> None:
        """Free everything; safe to call twice."""
        ...
