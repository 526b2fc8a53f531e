"""Every key of a study file: arms by seeds by iterations (:mod:`evolve_dag.study.definition` reads it)."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BeforeValidator, Field, Strict, field_validator

from evolve_dag.config.section import MOST, Section, Strings
from evolve_dag.records import LARGEST_SEED

Seeds = Annotated[tuple[Annotated[int, Field(ge=0, le=LARGEST_SEED)], ...], Strict(False)]


def _listed(value: Any) -> Any:
    return (value,) if isinstance(value, str) else value


class Worlds(Section):
    """Pocket worlds by seed. In other environments with worlds seed S takes the S-th after the one that the arm's file names;
    tasks that are read from files are the same for all seeds."""

    train: int = Field(1000, ge=0, le=MOST)
    """World of the training tasks at seed 0; seed S takes the S-th after it."""
    development: int = Field(2000, ge=0, le=MOST)
    """The same for the gate's tasks."""
    held_out: int = Field(3000, ge=0, le=MOST)
    """The same for the tasks that are reported."""


class ArmSettings(Section):
    """One arm."""

    config: str
    """Experiment file, relative to the study file."""
    set: dict[str, Any] = Field(default_factory=dict)
    """Keys of the experiment file, laid over it and over the study's own ``set``."""
    seeds: Seeds | None = None
    """In place of the study's."""
    iterations: int | None = Field(None, ge=1, le=99)
    """In place of the study's."""
    reference: Annotated[Strings, BeforeValidator(_listed)] = ()
    """Arm that it is contrasted with in place of the study's ``reference``, or several: the arms that it is matched to. The
    report says in which keys it differs from each."""


class PublishedArms(Section):
    """Which arm stands for which one of the paper; the report lays the published figures beside it. ``step_wise`` must be a
    reference of the others, or they would differ in more than their name says."""

    step_wise: str | None = None
    """The final recipe: principles, injected step by step, learned off-policy."""
    global_injection: str | None = None
    """The whole pool before the task."""
    on_policy: str | None = None
    """Trajectories of the student."""
    instance: str | None = None
    """Items that keep the detail of a trajectory."""


class StudySettings(Section):
    """Every key of a study file."""

    study: Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9_-]{0,31}$")]
    """Name; the file's name without ending when absent. It begins the name of every lineage."""
    description: str = ""
    """One line, above the report."""
    seeds: Seeds = Field(min_length=1)
    """Each is a replicate of every arm: other sampling, and other worlds where the environment has worlds."""
    iterations: int = Field(ge=1, le=99)
    """K of every arm that does not say otherwise."""
    held_out: int | None = Field(None, ge=1, le=MOST)
    """Held-out tasks per seed; unset: as each arm's file says."""
    worlds: Worlds = Worlds()
    set: dict[str, Any] = Field(default_factory=dict)
    """Keys laid over every arm's experiment file."""
    arms: dict[Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9_-]*$")], ArmSettings] = Field(min_length=1)
    """Name -> experiment file, or a mapping with ``config``, ``set``, ``seeds``, ``iterations``, ``reference``."""
    reference: str = ""
    """Arm that the others are contrasted with, where they name none of their own; unset: the first."""
    paper: PublishedArms = PublishedArms()
    processes: int = Field(2, ge=1, le=1024)
    """Cells worked on at a time, each in a process of its own. With ``runtime.device: cuda`` the GPUs of the machine are dealt
    out among them."""
    threads: int = Field(1, ge=1, le=1024)
    """CPU threads of each."""

    @field_validator("arms", mode="before")
    @classmethod
    def _files(cls, value: Any) -> Any:
        if not isinstance(value, dict):
            return value
        return {name: {"config": arm} if isinstance(arm, str) else arm for name, arm in value.items()}
