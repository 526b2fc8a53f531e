"""A policy behind an address (:class:`endpoint.Endpoint`), as a part in a file beside an experiment; needs no weights."""

from __future__ import annotations

import os
from typing import Literal

import httpx
from pydantic import Field

from evolve_dag.config.schema import PolicySettings
from evolve_dag.config.section import RUNTIME
from evolve_dag.inference.backends import BackendPart, Opening
from evolve_dag.protocols import Completion, Request


class EndpointSettings(PolicySettings):
    """A policy behind an address."""

    backend: str
    path: str = "pocket"
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    url: str = Field(json_schema_extra=RUNTIME)


class EndpointPolicy:
    """Asks for every action; says which process asks."""

    def __init__(self, url: str) -> None:
        self._url = url
        self._client: httpx.AsyncClient | None = None

    async def generate(self, request: Request) -> Completion:
        self._client = self._client or httpx.AsyncClient(timeout=60)
        turn = sum(message.role == "assistant" for message in request.messages)
        asked = {"question": request.messages[1].content, "turn": turn, "seed": request.sampling.seed, "process": os.getpid()}
        text = (await self._client.post(self._url, json=asked)).json()["text"]
        ids = tuple(text.encode()[:40])
        return Completion(text, ids, (-0.5,) * len(ids), "stop", 10 * turn, 0)

    def release(self, session: str) -> None: ...

    async def close(self) -> None:
        if self._client is not None:
            await self._client.aclose()


def _make(settings: EndpointSettings, opening: Opening) -> EndpointPolicy:
    return EndpointPolicy(settings.url)


ENDPOINT = BackendPart(settings=EndpointSettings, make=_make, identity=lambda settings: "endpoint")
