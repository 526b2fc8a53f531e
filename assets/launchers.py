"""Where a heavy step is made: in the run's own process, in one of its own, as a Ray job, or in a Kubernetes pod.

A launcher (``runtime.launcher``) says where, never what: it is in no digest. All but ``in_process`` start
``python -m evolve_dag.assets.worker`` through a client of Dagster Pipes and hand over one step that is due
(:mod:`evolve_dag.assets.handover`); the process gives its memory back when it ends.
"""

from __future__ import annotations

import os
import re
import shlex
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from subprocess import TimeoutExpired
from typing import TYPE_CHECKING, Any, Literal, Protocol, TypeVar

from pydantic import Field

from evolve_dag.config.parts import LauncherSettings, Part
from evolve_dag.config.section import MOST, PATH, PROGRAM

if TYPE_CHECKING:
    from dagster import AssetExecutionContext, PipesMessageReader

S = TypeVar("S", bound=LauncherSettings)
ENTRY = ("-m", "evolve_dag.assets.worker")
PATIENCE_SECONDS = 20.0
"""How long a run that is canceled waits for its worker to end."""
POLL_SECONDS = 1.0
"""Between two looks at a pod: what one that fails at once had to say is read only if it was seen alive."""


class Listen(Protocol):
    """Makes the reader of a Pipes client tell what the worker says of itself."""

    def __call__(self, reader: type[PipesMessageReader], **made_with: Any) -> PipesMessageReader: ...


@dataclass(frozen=True, slots=True)
class Handover:
    """What a launcher starts a worker with."""

    context: AssetExecutionContext
    order: dict[str, Any]
    """What is to be made, as JSON values: the extras of the Pipes session."""
    environment: dict[str, str]
    """Variables that the worker needs and that hold no secret."""
    listen: Listen


Launch = Callable[[Handover], object]
"""Starts a worker and returns when it has ended; raises what the client raises when it has not ended well."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LauncherPart(Part[S]):
    """The row of a launcher."""

    make: Callable[[S], Launch | None]
    """(settings) -> what starts a worker; None: no worker, the step is made where the run is."""
    elsewhere: bool = False
    """Whether it may end up on another machine: then the store must stand on a mirror that both see."""
    remedy: str = "run it again: it goes on from its journal"
    """For a worker that ended without a word."""


class InProcessSettings(LauncherSettings):
    """In the run's own process."""

    kind: Literal["in_process"] = "in_process"
    """In the run's own process."""


class SubprocessSettings(LauncherSettings):
    """In a process of its own on the same machine, which gives its memory back when it ends."""

    kind: Literal["subprocess"] = "subprocess"
    """In a process of its own on the same machine."""
    python: str = Field("", json_schema_extra=PROGRAM)
    """Interpreter of a virtual environment that holds evolve-dag, relative to the file that names it; empty: this one."""


class RaySettings(LauncherSettings):
    """As a job on a Ray cluster whose nodes have this package and see the mirror (``EVOLVE_MIRROR``)."""

    kind: Literal["ray"] = "ray"
    """As a job on a Ray cluster."""
    address: str = ""
    """Of the cluster's dashboard, e.g. ``http://127.0.0.1:8265``; empty: ``RAY_ADDRESS``."""
    python: str = "python"
    """Interpreter on the cluster's nodes."""
    workers: int = Field(0, ge=0, le=MOST)
    """``trajectories`` only: Ray actors that its episodes fan out over, each with ``runtime.concurrency`` episodes in flight.
    0: the job plays them itself."""
    cpus: float = Field(1.0, ge=0, le=MOST)
    """CPUs that Ray sets aside for the job, or for each of ``workers``."""
    gpus: float = Field(0.0, ge=0, le=MOST)
    """GPUs, likewise."""


class KubernetesSettings(LauncherSettings):
    """In a pod of its own on a Kubernetes cluster that sees the mirror (``EVOLVE_MIRROR``)."""

    kind: Literal["kubernetes"] = "kubernetes"
    """In a pod of its own on a Kubernetes cluster."""
    image: str = Field(min_length=1)
    """Image that holds this package (``docker/Dockerfile``)."""
    namespace: str = ""
    """Where the pod is made; empty: the one this process is in, else ``default``."""
    pod: str = Field("", json_schema_extra=PATH)
    """YAML file with a PodSpec that is laid under: resources, volumes, secrets as variables (``docker/kubernetes/``)."""
    python: str = "python"
    """Interpreter in the image."""


def _in_process(settings: InProcessSettings) -> None:
    return None


def _subprocess(settings: SubprocessSettings) -> Launch:
    def launch(handover: Handover) -> None:
        from dagster import PipesSubprocessClient
        from dagster._core.errors import DagsterPipesExecutionError
        from dagster._core.pipes.utils import PipesTempFileMessageReader

        client = PipesSubprocessClient(
            message_reader=handover.listen(PipesTempFileMessageReader), termination_timeout_seconds=PATIENCE_SECONDS
        )
        command = _command(settings.python or sys.executable)
        try:
            client.run(command=command, context=handover.context, extras=handover.order, env=handover.environment)
        except DagsterPipesExecutionError as error:
            raise ChildProcessError(_ending(str(error))) from None
        except TimeoutExpired as late:  # the run is canceled all the same; the worker ends once this process is gone
            raise late.__context__ or late from None

    return launch


def _ending(message: str) -> str:
    """What became of a process, by the client's message: it names the code, and a signal by its number alone."""
    by_signal = re.search(r"code -(\d+)", message)
    return f"killed by {signal.Signals(int(by_signal[1])).name}" if by_signal else message


def _ray(settings: RaySettings) -> Launch:
    def launch(handover: Handover) -> None:
        from dagster_ray.core.pipes import PipesRayJobClient, PipesRayJobMessageReader, SubmitJobParams

        client = PipesRayJobClient(address=settings.address or None, message_reader=handover.listen(PipesRayJobMessageReader))
        crew = {"count": settings.workers, "cpus": settings.cpus, "gpus": settings.gpus} if settings.workers else None
        job = SubmitJobParams(
            entrypoint=shlex.join(_command(settings.python)),
            runtime_env={"env_vars": handover.environment},
            entrypoint_num_cpus=0 if crew else settings.cpus,  # the actors compute, the job waits for them
            entrypoint_num_gpus=0 if crew else settings.gpus,
        )
        with _reached_at(settings.address):
            client.run(context=handover.context, extras=handover.order | {"workers": crew}, submit_job_params=job)

    return launch


@contextmanager
def _reached_at(address: str) -> Iterator[None]:
    """Make Ray's clients take this address. What the process's environment names goes before what they are given: with a
    ``RAY_ADDRESS`` around, the job would go to another cluster without a word."""
    variable = "RAY_API_SERVER_ADDRESS"
    before = os.environ.get(variable)
    if address:
        os.environ[variable] = address
    try:
        yield
    finally:
        if before is not None:
            os.environ[variable] = before
        elif address:
            del os.environ[variable]


def _kubernetes(settings: KubernetesSettings) -> Launch:
    def launch(handover: Handover) -> None:
        from dagster_k8s import PipesK8sClient
        from dagster_k8s.pipes import PipesK8sPodLogsMessageReader

        PipesK8sClient(message_reader=handover.listen(PipesK8sPodLogsMessageReader), poll_interval=POLL_SECONDS).run(
            context=handover.context,
            extras=handover.order,
            image=settings.image,
            command=_command(settings.python),
            namespace=settings.namespace or None,
            env=handover.environment,
            base_pod_spec=_pod_spec(settings.pod),
        )

    return launch


def _command(python: str) -> list[str]:
    return [python, *ENTRY]


def _pod_spec(path: str) -> dict[str, Any] | None:
    from evolve_dag.config.yamlfile import read_mapping
    from evolve_dag.errors import ConfigError

    if not path:
        return None
    spec, mistakes = read_mapping(Path(path))
    if mistakes:
        raise ConfigError(f"{path}: {'; '.join(mistakes)}", "give the `spec:` of a pod, without `spec:` itself")
    return spec


def _nodes(what: str) -> str:
    return f"see its log in {what}, then run it again; what the mirror has is kept"


IN_PROCESS = LauncherPart(settings=InProcessSettings, make=_in_process)
SUBPROCESS = LauncherPart(
    settings=SubprocessSettings,
    make=_subprocess,
    remedy="run it again: it goes on from its journal. Where memory ran out (the system's log tells), lower "
    "runtime.concurrency, runtime.tokens_per_pass or rollout.max_tokens, or choose another runtime.launcher",
)
RAY = LauncherPart(
    settings=RaySettings,
    make=_ray,
    elsewhere=True,
    libraries={"dagster_ray": "ray"},
    variables=("RAY_ADDRESS",),
    remedy=_nodes("Ray's dashboard"),
)
KUBERNETES = LauncherPart(
    settings=KubernetesSettings,
    make=_kubernetes,
    elsewhere=True,
    libraries={"dagster_k8s": "kubernetes"},
    remedy=_nodes("the cluster (kubectl describe pod)"),
)
