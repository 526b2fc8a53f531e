"""Which experiments a store knows: name -> the experiment file (and seed) that defines it.

An asset is asked for by partition key, i.e. by the *name* of an experiment; this registry leads back to the
file. One small JSON file per name, ``<store>/experiments/<name>.json``, written by the command line before a run
and by the ``config_watch`` sensor for every valid file of the configs folder.
"""

from __future__ import annotations

import json
import os
import re
import shlex
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

from evolve_dag.errors import ConfigError, StoreError
from evolve_dag.records import LARGEST_SEED
from evolve_dag.store.disk import write_atomic

if TYPE_CHECKING:
    from evolve_dag.config.schema import Experiment

STORE_VARIABLE = "EVOLVE_STORE"
CONFIGS_VARIABLE = "EVOLVE_CONFIGS"
HOME_VARIABLE = "DAGSTER_HOME"
_PROJECT = Path(__file__).parents[2] / "configs"
"""The experiments of this project, where it runs from its own folder: no package holds them."""
_NAME = re.compile(r"[a-z0-9][a-z0-9_.-]{0,99}")
"""What an experiment may be called, under another seed too; what a command was given may be anything."""


@dataclass(frozen=True, slots=True)
class Entry:
    """One registered experiment."""

    name: str
    """Name of the lineage: the experiment's own, or ``<experiment>-s<N>`` under another seed."""
    config: Path
    """Experiment file, absolute."""
    seed: int | None = None
    """Seed laid over the file's own; None: the file's."""
    mlflow: bool | None = field(default=None, compare=False)
    """What ``tracking.mlflow`` said when the file was last read, for where it is gone; None: of an earlier version."""

    @property
    def family(self) -> str:
        """The experiment's name in the file itself: ``pocket`` of ``pocket-s3``."""
        return self.name if self.seed is None else self.name.removesuffix(f"-s{self.seed}")

    def load(self) -> Experiment:
        """The experiment as its file stands now.

        Raises:
            ConfigError: the file is gone, wrong, or now names another experiment.
        """
        experiment = load_seeded(self.config, self.seed)
        if experiment.experiment != self.name:
            raise ConfigError(
                f"{self.config}: names the experiment {experiment.experiment!r}, but {self.name!r} was registered from it",
                f"set `experiment: {self.name}` back, or run the new name: evolve run {self.config}",
            )
        return experiment


def default_store() -> Path:
    """``EVOLVE_STORE``, or ``.evolve`` in the working folder."""
    return Path(os.environ.get(STORE_VARIABLE) or ".evolve")


def configs_folder() -> Path:
    """``EVOLVE_CONFIGS``, or ``configs`` in the working folder."""
    return Path(os.environ.get(CONFIGS_VARIABLE) or "configs")


def dagster_home(root: Path) -> Path:
    """``DAGSTER_HOME``, or ``dagster`` in the store; a relative one is below the working folder."""
    configured = os.environ.get(HOME_VARIABLE)
    return Path(configured).expanduser() if configured else root / "dagster"


def load_seeded(config: Path, seed: int | None = None) -> Experiment:
    """The experiment of a file; another ``seed`` than the file's makes a lineage of its own, ``<experiment>-s<N>``.

    Its own name keeps the partitions, the references and the champion of the two seeds apart; the store still
    shares every artifact that does not depend on the seed.

    Raises:
        ConfigError: as :func:`evolve_dag.config.loading.load_experiment`, and for a seed out of its bounds.
    """
    from evolve_dag.config.loading import load_experiment

    experiment = load_experiment(config)
    if seed is None or seed == experiment.seed:
        return experiment
    if not 0 <= seed <= LARGEST_SEED:
        raise ConfigError(f"--seed {seed}: a seed is from 0 to {LARGEST_SEED}", "choose e.g. --seed 1")
    return experiment.model_copy(update={"seed": seed, "experiment": f"{experiment.experiment}-s{seed}"})


def scan(folder: Path) -> tuple[dict[Entry, Experiment], list[ConfigError]]:
    """Experiments of a configs folder, and the mistakes of the files that are left out; studies are no experiments.

    Two files that give the same name are a mistake of the second; the first keeps the name.
    """
    from evolve_dag.config.loading import is_study

    found: dict[Entry, Experiment] = {}
    files: dict[str, Path] = {}
    mistakes: list[ConfigError] = []
    for path in sorted([*folder.glob("*.yaml"), *folder.glob("*.yml")]):
        if is_study(path):
            continue
        try:
            experiment = load_seeded(path)
        except ConfigError as error:
            mistakes.append(error)
            continue
        name = experiment.experiment
        if name in files:
            what = f"{path}: the name {name!r} is taken by {files[name].name}"
            mistakes.append(ConfigError(what, "give it its own with `experiment: <name>`"))
            continue
        files[name] = path
        found[Entry(name, _absolute(path), mlflow=experiment.tracking.mlflow)] = experiment
    return found, mistakes


def register(root: Path, config: Path, seed: int | None = None) -> Experiment:
    """Check an experiment file and remember it in the store under its name.

    Raises:
        ConfigError: the file is wrong, or the name belongs to another file that still defines it differently.
        StoreError: the store cannot be written.
    """
    experiment = load_seeded(config, seed)
    own_name = seed is None or load_seeded(config).experiment == experiment.experiment
    entry = Entry(experiment.experiment, _absolute(config), None if own_name else seed, experiment.tracking.mlflow)
    known = _read(_file(root, entry.name))
    if known is not None and known.config != entry.config:
        claim = _claim(known)
        if claim is not None and claim != experiment:
            raise ConfigError(
                f"{entry.config}: the experiment name {entry.name!r} belongs to {known.config} in this store",
                "give one of the two its own name with `experiment: <name>`, or use another --store",
            )
    if known is None or _differs(known, entry):
        _write(root, entry)
    return experiment


def _differs(one: Entry, other: Entry) -> bool:
    return one != other or one.mlflow != other.mlflow


def _absolute(config: Path) -> Path:
    """Where a file lies; of a link its own place, since its name is the experiment's and what it extends lies beside it."""
    return config.parent.resolve() / config.name


def _claim(entry: Entry) -> Experiment | None:
    """What an entry defines now; a file that is gone, wrong or renamed has lost its claim to the name."""
    try:
        return entry.load()
    except ConfigError:
        return None


def resolved(root: Path, found: Iterable[Entry]) -> dict[str, Entry]:
    """Name -> entry, of the store and of a configs folder: a known one stands as long as its file does.

    A file that was renamed or moved is found again by the name in it, together with the lineages of its other seeds.
    """
    known = {entry.name: entry for entry in entries(root)}
    by_name = {entry.name: entry for entry in found}
    now = dict(known)
    for name, entry in by_name.items():
        if name not in known or known[name] == entry or _has_left(known[name], entry):
            now[name] = entry
    for entry in known.values():
        family = by_name.get(entry.family)
        if entry.seed is not None and family is not None and (family.config == entry.config or not entry.config.exists()):
            now[entry.name] = replace(entry, config=family.config, mlflow=family.mlflow)
    return now


def remember(root: Path, found: Iterable[Entry]) -> None:
    """Write the entries of a configs folder that are not there yet, and those whose file is another or was edited.

    Raises:
        StoreError: the store cannot be written.
    """
    known = {entry.name: entry for entry in entries(root)}
    for name, entry in resolved(root, found).items():
        # A damaged one is not among the known: it stays, `evolve doctor` names it.
        if _differs(known[name], entry) if name in known else not _file(root, name).exists():
            _write(root, entry)


def _has_left(known: Entry, entry: Entry) -> bool:
    """Whether another file has the name by now: the known one is gone or names another experiment. One that is wrong is being
    edited: it keeps its name."""
    try:
        return load_seeded(known.config, known.seed).experiment != known.name
    except ConfigError:
        return not known.config.exists()


def entries(root: Path) -> Iterator[Entry]:
    """Every registered experiment, by name; unreadable files are left out (``evolve doctor`` names them)."""
    for path in sorted((root / "experiments").glob("*.json")):
        with suppress(StoreError):
            entry = _read(path)
            if entry is not None:
                yield entry


def load(root: Path, name: str) -> Experiment:
    """The experiment behind a partition key.

    Raises:
        ConfigError: nobody registered the name, or its file is wrong.
        StoreError: the registry's entry is damaged.
    """
    return entry_of(root, name).load()


def entry_of(root: Path, name: str) -> Entry:
    """Where an experiment is defined now.

    Raises:
        ConfigError: nobody registered the name, or the file in the configs folder that would have it is wrong.
        StoreError: the registry's entry is damaged.
    """
    entry = _entry(root, name)
    if entry is None:
        for path in (configs_folder() / f"{name}.yaml", configs_folder() / f"{name}.yml"):
            if path.is_file():
                load_seeded(path)  # tells the mistake that keeps the file from having its name
        found = meant(root, name)
        raise ConfigError(
            f"no experiment {name!r} in the store {root} or in {configs_folder()}/",
            f"name its file ({found[0]}), run that once, or set {CONFIGS_VARIABLE} to its folder"
            if found
            else f"run `evolve run <file>` once, put the file into {configs_folder()}/, or set {CONFIGS_VARIABLE}",
        )
    return entry


def find(root: Path, name: str) -> Experiment | None:
    """What the file of a partition key says now, also where it names another experiment by now; None where it is not on this
    machine, or not any more.

    Raises:
        ConfigError: the file is wrong.
        StoreError: the registry's entry is damaged.
    """
    entry = _entry(root, name)
    return load_seeded(entry.config, entry.seed) if entry is not None and entry.config.exists() else None


def name_of(root: Path, config: Path) -> str:
    """The experiment of a file; where the file has a mistake, that under which it is on record.

    Raises:
        ConfigError: the file is wrong, and not on record, or under several names.
    """
    try:
        return load_seeded(config).experiment
    except ConfigError:
        names = [entry.name for entry in entries(root) if entry.config == _absolute(config) and entry.seed is None]
        if len(names) != 1:
            raise
        return names[0]


def run_command(root: Path, name: str, config: str | None = None, seed: int | None = None) -> str:
    """What makes a lineage: ``evolve run FILE``, with ``--seed N`` where it has another seed than its file.

    Args:
        config: the file as the user has called it; None: the one on record, or in the configs folder.
        seed: that its artifacts were made with, for where nothing is on record.
    """
    entry = _found(root, name)
    family, _, number = name.rpartition("-s")
    if entry is None and family and number.isdecimal():
        known = _found(root, family) or _named(config, family)
        if known is not None or number == str(seed):
            entry = Entry(name, known.config if known is not None else Path(f"configs/{family}.yaml"), int(number))
    file = config or (_shown(entry.config) if entry is not None else f"configs/{name}.yaml")
    return f"evolve run {shlex.quote(file)}" + (f" --seed {entry.seed}" if entry is not None and entry.seed is not None else "")


def meant(root: Path, given: str | Path) -> tuple[str, int | None] | None:
    """What may be meant by what is no file: one of that name, or of the experiment of that name.

    Returns:
        The file, for a shell, and the seed where the experiment has another one than its file; None where there is something
        of the given name, or nothing that could be meant.
    """
    if os.path.exists(given):  # noqa: PTH110 - as in `is_file`
        return None
    place = Path(given)
    name = place.name.removesuffix(".yaml").removesuffix(".yml")
    for folder in (place.parent, configs_folder(), _PROJECT):
        for file in (folder / f"{name}.yaml", folder / f"{name}.yml"):
            if is_file(str(file)):
                return shlex.quote(_shown(file)), None
    entry = _found(root, name)
    return (shlex.quote(_shown(entry.config)), entry.seed) if entry is not None and entry.config.exists() else None


def _found(root: Path, name: str) -> Entry | None:
    with suppress(StoreError):
        return _entry(root, name)
    return None


def _named(config: str | None, name: str) -> Entry | None:
    """The entry that a file would have, if it names that experiment."""
    if config is not None:
        with suppress(ConfigError):
            if load_seeded(Path(config)).experiment == name:
                return Entry(name, _absolute(Path(config)))
    return None


def _shown(config: Path) -> str:
    """A file as it is called in the working folder."""
    here = Path.cwd()
    return str(config.relative_to(here) if config.is_relative_to(here) else config)


def _entry(root: Path, name: str) -> Entry | None:
    """The entry of a name, or that of the configs folder where there is none or its file is gone."""
    if not _NAME.fullmatch(name):
        return None
    known = _read(_file(root, name))
    if known is not None and known.config.exists():
        return known
    wanted = name if known is None else known.family
    found = next((entry for entry in scan(configs_folder())[0] if entry.name == wanted), None)
    if known is None or found is None:
        return found or known
    return replace(known, config=found.config)


def is_file(config: str) -> bool:
    """Whether what a command was given is a file, and not the name of an experiment."""
    return os.path.isfile(config)  # noqa: PTH113 - Path.is_file fails where the name is too long for one


def is_name(config: str) -> bool:
    """Whether what a command was given reads as the name of an experiment, and not as that of a file."""
    return _NAME.fullmatch(config) is not None and not config.endswith((".yaml", ".yml"))


def _file(root: Path, name: str) -> Path:
    return root / "experiments" / f"{name}.json"


def _read(path: Path) -> Entry | None:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        name, config, seed = content["name"], content["config"], content["seed"]
        if not isinstance(name, str) or isinstance(seed, bool) or not isinstance(seed, int | None):
            raise TypeError(f"the name {name!r} or the seed {seed!r} is none")
        mlflow = content.get("mlflow")
        return Entry(name, Path(config), seed, mlflow if isinstance(mlflow, bool) else None)
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise StoreError(f"{path}: not a registry entry: {error}", "delete the file and run the experiment again") from None


def _write(root: Path, entry: Entry) -> None:
    path = _file(root, entry.name)
    facts = {"name": entry.name, "config": str(entry.config), "seed": entry.seed, "mlflow": entry.mlflow}
    content = json.dumps(facts, indent=1)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(path, f"{content}\n".encode())
    except OSError as error:
        raise StoreError(f"{path}: cannot be written: {error}", "check the folder's permissions and free space") from None
