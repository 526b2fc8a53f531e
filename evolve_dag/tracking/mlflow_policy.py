"""An adapter as an MLflow model: ``mlflow.pyfunc.load_model("models:/pocket@champion").predict([{"question": ...}])``.

The model's folder holds the adapter and says which base model it belongs to; the base weights stay where they are and are
checked against their digest when the model is loaded. It needs this package, and no pickle.
"""

from __future__ import annotations

import asyncio
import json
import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from evolve_dag.errors import DataError, ModelError
from evolve_dag.inference.folders import folder_digest, shipped

if TYPE_CHECKING:
    from evolve_dag.inference.transformers import TransformersModel
    from evolve_dag.records import Message

BASE_VARIABLE = "EVOLVE_BASE_MODEL"
"""Folder of the base model where it lies elsewhere than on the machine that trained the adapter."""
DESCRIPTION = "policy.json"
ADAPTER = "adapter"
DEFAULTS = {"temperature": 0.0, "max_tokens": 48, "seed": 0}
"""Parameters of ``predict``; ``max_tokens`` is the experiment's ``rollout.max_action_tokens``."""


def write_policy(folder: Path, adapter: Path, names: Sequence[str], description: Mapping[str, Any]) -> None:
    """Fill a model's folder: ``policy.json`` and the adapter's files.

    Args:
        folder: made here.
        adapter: folder of the adapter artifact.
        names: files of the artifact to take.
        description: ``base`` (identity), ``path`` (``pocket``, ``pocket-cases`` or a folder), ``dtype``, ``quantize``,
            ``system`` (system message), ``max_tokens``, and what else a reader should know.
    """
    (folder / ADAPTER).mkdir(parents=True)
    for name in names:
        shutil.copyfile(adapter / name, folder / ADAPTER / name)
    (folder / DESCRIPTION).write_text(json.dumps(description, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


class Policy:
    """What ``predict`` reaches: the base model with the adapter merged in, without experience in its context."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        try:
            self.description: dict[str, Any] = json.loads((folder / DESCRIPTION).read_text(encoding="utf-8"))
            self._model = self._open()
        except (OSError, ValueError, KeyError) as error:
            raise ModelError(
                f"{folder / DESCRIPTION}: cannot be read: {error}", "send the adapter again: evolve sync-mlflow --again"
            ) from error

    def _open(self) -> TransformersModel:
        from evolve_dag.inference.transformers import TransformersModel

        return TransformersModel.load(
            base_folder(self.description["base"], self.description["path"]),
            adapter_dir=self._folder / ADAPTER,
            dtype=self.description["dtype"],
            quantize=self.description.get("quantize", "none"),
            threads=int(os.environ.get("OMP_NUM_THREADS") or 1),
        )

    def predict(self, model_input: Any, params: Mapping[str, Any] | None = None) -> list[str]:
        """The policy's next action for every input, as text.

        Args:
            model_input: a list (or data frame) of ``{"question": text}`` or ``{"messages": [{"role", "content"}, ...]}``.
                A question is asked under the system message of the environment that the policy was trained in.
            params: ``temperature`` (0 is greedy), ``max_tokens``, ``seed``.

        Raises:
            DataError: an input is neither of the two.
            ModelError: the context is too long.
        """
        from evolve_dag.protocols import Request, Sampling

        chosen = {**DEFAULTS, "max_tokens": self.description["max_tokens"], **(params or {})}
        sampling = Sampling(float(chosen["temperature"]), 1.0, int(chosen["max_tokens"]), int(chosen["seed"]))
        requests = [Request(self._messages(row, n), sampling) for n, row in enumerate(_rows(model_input))]

        async def ask() -> list[str]:
            return [done.text for done in await asyncio.gather(*map(self._model.generate, requests))]

        return asyncio.run(ask())

    def _messages(self, row: Any, number: int) -> tuple[Message, ...]:
        from evolve_dag.records import Message

        messages, question = (row.get(key) if isinstance(row, Mapping) else None for key in ("messages", "question"))
        if isinstance(question, str) and question:
            return Message("system", self.description["system"]), Message("user", question)
        # A data frame with both columns holds NaN where a row has none.
        found = list(messages) if messages is not None and not isinstance(messages, (str, float)) else []
        if found and all(_is_message(m) for m in found):
            return tuple(Message(m["role"], m["content"]) for m in found)
        raise DataError(
            f"input {number + 1}: neither a question nor messages",
            'give {"question": "..."} or {"messages": [{"role": "user", "content": "..."}]}',
        )


_ROLES = ("system", "user", "assistant", "tool")


def base_folder(identity: str, path: str) -> Path:
    """Folder of the base model whose weights have this identity.

    Args:
        identity: ``sha256:<32 hex digits>:<dtype>``, with ``:nf4`` behind it in 4 bit, as
            :func:`evolve_dag.inference.folders.base_identity` gives it.
        path: where it lay; '' when that is not known.

    Raises:
        ModelError: it is not there, or holds other weights.
    """
    digest = identity.split(":")[1]
    places = [os.environ.get(BASE_VARIABLE, ""), "" if path in shipped() else path, *map(str, shipped().values())]
    seen = []
    for place in filter(None, places):
        folder = Path(place)
        if any(folder.glob("*.safetensors")):
            if folder_digest(folder).startswith(digest):
                return folder
            seen.append(place)
    raise ModelError(
        f"the base model {identity} of this adapter is not on this machine (looked at {', '.join(seen) or path or 'nothing'})",
        f"set {BASE_VARIABLE} to the folder of {path or 'that model'}; the adapter is of no use to other weights",
    )


def _is_message(value: Any) -> bool:
    return isinstance(value, Mapping) and value.get("role") in _ROLES and isinstance(value.get("content"), str)


def _rows(model_input: Any) -> list[Any]:
    if isinstance(model_input, Mapping):
        return [model_input]
    if hasattr(model_input, "to_dict") and hasattr(model_input, "columns"):  # what MLflow makes of a list of mappings
        records: list[Any] = model_input.to_dict(orient="records")
        return records
    return list(model_input)


def _load_pyfunc(path: str) -> Policy:
    """MLflow's entry point."""
    return Policy(Path(path))
