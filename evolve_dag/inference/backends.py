"""The backends, one row each: settings -> a language model that answers. The models' own modules are heavy; this one is not."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from evolve_dag.config.fence import Fence
from evolve_dag.config.parts import Part, part_of
from evolve_dag.config.schema import (
    ModelSettings,
    OpenAIModelSettings,
    PolicySettings,
    RuntimeSettings,
    TransformersModelSettings,
    VllmModelSettings,
)
from evolve_dag.config.section import RUNTIME, marked
from evolve_dag.errors import ModelError, exhausted, out_of_memory
from evolve_dag.inference.folders import base_identity, model_folder
from evolve_dag.inference.ledger import Ledger, metered
from evolve_dag.inference.outgoing import tokens_of
from evolve_dag.protocols import Completion, LanguageModel, Request
from evolve_dag.records import Message
from evolve_dag.store.memory import Memory

if TYPE_CHECKING:
    from evolve_dag.inference.transformers import TransformersModel

S = TypeVar("S", bound=ModelSettings)


@dataclass(frozen=True, slots=True)
class Opening:
    """What a model is opened with."""

    role: str
    """Whom it serves, for the ledger."""
    runtime: RuntimeSettings
    adapter: Path | None = None
    """Folder of the adapter that it wears, where it holds weights."""
    ledger: Ledger | None = None
    """Where an endpoint writes its calls down."""


@dataclass(frozen=True, slots=True, kw_only=True)
class BackendPart(Part[S]):
    """The row of a backend."""

    make: Callable[[S, Opening], LanguageModel]
    """(settings, what it is opened with) -> the model. Raises ModelError: it cannot be loaded or reached."""
    identity: Callable[[S], str]
    """What the model *is*, wherever it runs: the hash of its weights, or its name at an endpoint."""
    keeps_ledger: bool = False
    """Whether it writes its calls into the ledger itself."""
    seconds: float = 900.0

    def held(self, made: LanguageModel, fence: Fence) -> LanguageModel:
        return FencedModel(made, fence)


@dataclass(frozen=True, slots=True)
class FencedModel:
    """A model from outside. It belongs to the event loop of its step: only what it awaits can be cut off."""

    model: LanguageModel
    fence: Fence

    async def generate(self, request: Request) -> Completion:
        completion = await self.fence.limited(self.model.generate(request))
        if not isinstance(completion, Completion) or not isinstance(completion.text, str):
            raise self.fence.nonsense(f"what it gave is no Completion, but a {type(completion).__name__}")
        return completion

    def count_tokens(self, message: Message) -> int:
        """As the model counts, else an estimate."""
        return tokens_of(self.model, message)

    def release(self, session: str) -> None:
        self.model.release(session)

    async def close(self) -> None:
        await self.fence.limited(self.model.close())


def open_backend(
    settings: ModelSettings, *, role: str, runtime: RuntimeSettings, adapter: Path | None = None, ledger: Ledger | None = None
) -> LanguageModel:
    """A model of any backend, with ``adapter`` where it is ours. Its calls go into ``ledger``.

    Raises:
        ModelError: it cannot be loaded or reached; the message says what to mend.
    """
    row: BackendPart[ModelSettings] = part_of("backend", settings)
    model = row.make(settings, Opening(role, runtime, adapter, ledger))
    if ledger is None or row.keeps_ledger:
        return model
    return metered(model, role=role, model_name=row.identity(settings), ledger=ledger)


def identity(settings: ModelSettings) -> str:
    """What a model *is*, wherever it runs."""
    found: str = part_of("backend", settings).identity(settings)
    return found


def open_transformers(settings: PolicySettings, *, runtime: RuntimeSettings, adapter: Path | None = None) -> TransformersModel:
    """The weights of ``settings`` in this process, whatever serves them elsewhere; the adapter is merged in."""
    from evolve_dag.inference.transformers import TransformersModel

    return TransformersModel.load(
        model_folder(settings),
        adapter_dir=adapter,
        dtype=settings.dtype,
        quantize=settings.quantize,
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
        if out_of_memory(error):
            raise exhausted(f"runtime.device: {device}", error) from None
        raise ModelError(
            f"runtime.device: {device} cannot be used here: {error}",
            "correct runtime.device, or install the torch build of this machine (README, Installing)",
        ) from None


def _openai(settings: OpenAIModelSettings, opening: Opening) -> LanguageModel:
    from evolve_dag.inference.openai import OpenAIModel

    return OpenAIModel(settings, role=opening.role, ledger=opening.ledger)


def _vllm(settings: VllmModelSettings, opening: Opening) -> LanguageModel:
    from evolve_dag.inference.vllm import open_vllm

    return open_vllm(settings, runtime=opening.runtime, adapter=opening.adapter)


def _transformers(settings: TransformersModelSettings, opening: Opening) -> LanguageModel:
    return open_transformers(settings, runtime=opening.runtime, adapter=opening.adapter)


TRANSFORMERS = BackendPart(settings=TransformersModelSettings, make=_transformers, identity=base_identity)
VLLM = BackendPart(settings=VllmModelSettings, make=_vllm, identity=base_identity, variables=("VLLM_API_KEY",))


def _openai_identity(settings: OpenAIModelSettings) -> str:
    """The name, and what else decides an answer where it is not the usual: a judge that may think is another one."""
    fields = type(settings).model_fields.items()
    decides = {name: field.default for name, field in fields if name != "model" and not marked(field, RUNTIME)}
    unusual = {name: value for name, usual in decides.items() if (value := getattr(settings, name)) != usual}
    return f"openai:{settings.model}" + (f" {Memory.key_of(unusual)[:16]}" if unusual else "")


OPENAI = BackendPart(
    settings=OpenAIModelSettings,
    make=_openai,
    identity=_openai_identity,
    keeps_ledger=True,
    variables=("OPENAI_API_KEY",),
)
