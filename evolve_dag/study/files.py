"""A study in the store: one experiment file a cell, so that every lineage is an experiment like any other.

``studies/<study>/study.json`` says which file the study is of; ``studies/<study>/<arm>-s<seed>.yaml`` is a cell, frozen as it
was when the command began: an edit of an arm's file meanwhile changes nothing before the command is given again.
"""

from __future__ import annotations

import json
from pathlib import Path

from evolve_dag.config import registry
from evolve_dag.config.yamlfile import to_yaml
from evolve_dag.errors import ConfigError, EvolveError, StoreError
from evolve_dag.store.disk import pretty, write_atomic
from evolve_dag.store.faults import disk_error
from evolve_dag.study.definition import Cell, Study, load_study


def folder(root: Path, study: Study) -> Path:
    """Where the store keeps what is the study's own."""
    return root / "studies" / study.name


def cell_file(root: Path, study: Study, cell: Cell) -> Path:
    """Experiment file of a cell."""
    return folder(root, study) / f"{cell.arm}-s{cell.seed}.yaml"


def logs(root: Path, study: Study, cell: Cell) -> Path:
    """What the processes that worked on a cell said."""
    return folder(root, study) / "logs" / f"{cell.arm}-s{cell.seed}.log"


def refuse_another(root: Path, study: Study) -> None:
    """A name belongs to one study file of a store, as an experiment's name does.

    Raises:
        ConfigError: another file that still defines a study of this name has it.
    """
    marker = folder(root, study) / "study.json"
    try:
        owner = Path(json.loads(marker.read_text(encoding="utf-8"))["file"])
    except FileNotFoundError:
        return
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise StoreError(f"{marker}: cannot be read: {error}", "delete the file and give the command again") from None
    if owner == study.file or not owner.is_file():
        return
    try:
        if load_study(owner).name != study.name:
            return
    except EvolveError:
        return  # a file that is wrong has lost its claim
    raise ConfigError(
        f"{study.file}: the study name {study.name!r} belongs to {owner} in this store",
        "give one of the two its own name with `study: <name>`, or use another --store",
    )


def write(root: Path, study: Study) -> None:
    """Claim the study's name and register every cell as an experiment of the store.

    Raises:
        ConfigError: the study's name, or that of a lineage, belongs to another file.
        StoreError: the store cannot be written.
    """
    refuse_another(root, study)
    here = folder(root, study)
    try:
        (here / "logs").mkdir(parents=True, exist_ok=True)
        write_atomic(here / "study.json", pretty({"file": str(study.file)}))
        for cell in study.cells:
            write_atomic(cell_file(root, study, cell), _content(study, cell), durable=False)
    except OSError as error:
        raise disk_error(error, here) from error
    for cell in study.cells:
        registered = registry.register(root, cell_file(root, study, cell))
        assert registered == cell.experiment, f"{cell.name} reads otherwise than it was written"


def _content(study: Study, cell: Cell) -> bytes:
    head = f"# Written by `evolve study {study.file.name}`: arm {cell.arm}, seed {cell.seed}. Change that file, not this one.\n"
    values = cell.experiment.model_dump(mode="json")
    return (head + to_yaml(values)).encode()
