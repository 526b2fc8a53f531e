"""Which GPUs a process of a study works on."""

from __future__ import annotations

import os

from evolve_dag.config.schema import VllmModelSettings
from evolve_dag.study.definition import Study

VISIBLE = "CUDA_VISIBLE_DEVICES"
"""Read when CUDA is first used: a process that sets it before sees those alone, numbered from 0."""


def shares(study: Study) -> tuple[str, ...]:
    """The GPUs of this machine in equal shares, as :data:`VISIBLE` takes them: a process gets one, or as many as a training or
    an engine takes (``runtime.processes``, ``models.policy.tensor_parallel``).

    Returns:
        None of them where no cell runs on ``device: cuda``, or one names a GPU by its number: then everybody sees them all.
    """
    runtimes = [cell.experiment.runtime for cell in study.cells]
    devices = {runtime.device for runtime in runtimes}
    if "cuda" not in devices or any(device.startswith("cuda:") for device in devices):
        return ()
    policies = [cell.experiment.models.policy for cell in study.cells]
    engines = [policy.tensor_parallel for policy in policies if isinstance(policy, VllmModelSettings)]
    size, found = max(*(runtime.processes for runtime in runtimes), *engines, 1), _visible()
    return tuple(",".join(found[at : at + size]) for at in range(0, len(found) - size + 1, size))


def _visible() -> list[str]:
    if VISIBLE in os.environ:
        return [name.strip() for name in os.environ[VISIBLE].split(",") if name.strip()]
    import torch

    return [str(number) for number in range(torch.cuda.device_count())]
