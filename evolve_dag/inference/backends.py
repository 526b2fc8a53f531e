"""Settings -> a language model that answers."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from evolve_dag.config.schema import ModelSettings, OpenAIModelSettings, RuntimeSettings, VllmModelSettings
from evolve_dag.errors import ModelError
from evolve_dag.inference.folders import base_identity, model_folder

if TYPE_CHECKING:
    from evolve_dag.inference.ledger import Ledger
    from evolve_dag.inference.transformers import TransformersModel
    from evolve_dag.protocols import LanguageModel


def open_backend(
    settings: ModelSettings, *, role: str, runtime: RuntimeSettings, adapter: Path | None = None, ledger: Ledger | None = None
) -> LanguageModel:
    """A model of any backend, with ``adapter`` where it is ours. Calls to endpoints go into ``ledger``.

    Raises:
        ModelError: it cannot be loaded or reached; the message says what to mend.
    """
    if isinstance(settings, OpenAIModelSettings):
        from evolve_dag.inference.openai import OpenAIModel

        return OpenAIModel(settings, role=role, ledger=ledger)
    if isinstance(settings, VllmModelSettings):
        from evolve_dag.inference.vllm import open_vllm

        return open_vllm(settings, runtime=runtime, adapter=adapter)
    return open_transformers(settings, runtime=runtime, adapter=adapter)


def open_transformers(settings: ModelSettings, *, runtime: RuntimeSettings, adapter: Path | None = None) -> TransformersModel:
    """The weights of ``settings`` in this process, whatever serves them elsewhere; the adapter is merged in."""
    from evolve_dag.inference.transformers import TransformersModel

    assert not isinstance(settings, OpenAIModelSettings)  # a policy is one of PolicySettings
    return TransformersModel.load(
        model_folder(settings),
        adapter_dir=adapter,
        dtype=settings.dtype,
        device=runtime.device,
        threads=runtime.threads,
        max_batch=runtime.concurrency,
    )


def check_device(device: str) -> None:
    """Whether torch can compute on ``device`` here.

    Raises:
        ModelError: it cannot.
    """
    if device == "cpu":
        return
    import torch

    try:
        torch.zeros(1, device=device)
    except Exception as error:  # every kind of device has errors of its own
        raise ModelError(
            f"runtime.device: {device} cannot be used here: {error}",
            "correct runtime.device, or install the torch build of this machine (README, Installing)",
        ) from None


def identity(settings: ModelSettings) -> str:
    """What a model *is*, wherever it runs: the hash of its weights, or its name at an endpoint."""
    if isinstance(settings, OpenAIModelSettings):
        return f"openai:{settings.model}"
    return base_identity(settings)
