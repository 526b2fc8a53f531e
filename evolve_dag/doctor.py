"""What ``evolve doctor`` looks at. Changes nothing but for a probe file in the store, which it removes."""

from __future__ import annotations

import importlib.util
import json
import os
import platform
import shutil
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from evolve_dag.config import registry
from evolve_dag.config.outside import distribution, installed
from evolve_dag.config.parts import CHOICES, Choice, Part, part, parts, parts_beside
from evolve_dag.config.registry import Entry
from evolve_dag.errors import ConfigError, EvolveError, PartError, StoreError

if TYPE_CHECKING:
    from evolve_dag.config.schema import Experiment

State = Literal["ok", "note", "broken"]
Row = tuple[Choice, str, Part[Any]]
"""What :func:`parts` gives."""

LEAST_FREE_GIB = 1.0
"""Free disk below which a note is made: a store of three pocket iterations takes a few hundred MB."""

USABLE = 0.9
"""Share of a device's memory that is planned with: the rest is the driver's, the allocator's, other programs'."""
CARDS = (24, 48, 80)
"""GiB that GPUs have."""
WORTH = 2.0
"""Times that one number format has to be multiplied faster than the other before it is told: norms and attention gain less."""


@dataclass(frozen=True, slots=True)
class Finding:
    """One line of the report."""

    state: State
    """``ok``; ``note``: something works without it; ``broken``: experiments cannot run."""
    subject: str
    text: str


def examine(root: Path, experiment: Experiment | None = None) -> Iterator[Finding]:
    """Look at everything that an experiment needs: first this machine, then the experiments that are here.

    Args:
        root: the store.
        experiment: what it needs is looked for, its recipe is looked at, its memory calculated; else the gates of all.
    """
    here = cache(lambda: registry.scan(registry.configs_folder()))  # read once, inside of a check: one may be unreadable
    rows = cache(lambda: list(parts()))
    checks: list[Callable[[], Iterator[Finding]]] = [
        _python,
        _packages,
        _threads,
        _weights,
        lambda: _store(root),
        lambda: _dagster_home(root),
        lambda: _databases(root),
        _sandbox,
        lambda: _keys(rows()),
        lambda: _optional(rows()),
        lambda: _configs(*here()),
        lambda: _parts(here()[0]),
        lambda: _registry(root),
    ]
    if experiment is None:
        checks.append(lambda: _gates(root, here()[0].values()))
    else:
        checks += [
            lambda: _needs(experiment),
            lambda: _recipe(experiment),
            lambda: _gates(root, [experiment]),
            lambda: _memory(experiment),
            lambda: _number_format(experiment),
        ]
    for check in checks:
        try:
            yield from check()
        except EvolveError as error:
            yield Finding("broken", "installation", str(error))
        except Exception as error:  # whatever is broken: this command must live to say so
            yield Finding("broken", "installation", f"{type(error).__name__}: {error}")


def _needs(experiment: Experiment) -> Iterator[Finding]:
    """What of an experiment is not there yet."""
    from evolve_dag.inference.backends import check_device
    from evolve_dag.steps.needs import absent_files, absent_programs, unset_keys

    missing = [*absent_files(experiment), *absent_programs(experiment)]
    yield from (Finding("note", "missing", one) for one in missing)
    for name, readers in unset_keys(experiment).items():
        yield Finding("note", "key", f"{name} is not set; {', '.join(readers)} may need it")
    try:
        check_device(experiment.runtime.device)
    except EvolveError as error:
        yield Finding("note", "device", str(error.what))
    started = list(_warmed_up(experiment))
    yield from started
    if not missing and all(finding.state == "ok" for finding in started):
        yield Finding("ok", experiment.experiment, "the files, folders and programs that it names are there")


def _recipe(experiment: Experiment) -> Iterator[Finding]:
    from evolve_dag.lineage.recipe import warnings

    yield from (Finding("note", "recipe", text) for text in warnings(experiment))


def _warmed_up(experiment: Experiment) -> Iterator[Finding]:
    from evolve_dag.warmup.folder import absent_base, outdated

    if experiment.warmup is not None:
        if absent := absent_base(experiment):
            yield Finding("note", "missing", absent)
        why = outdated(experiment)
        told = f"{why}: run `evolve warmup` with this file" if why else f"{experiment.models.policy.path} is up to date"
        yield Finding("note" if why else "ok", "warm-up", told)


def _memory(experiment: Experiment) -> Iterator[Finding]:
    """What the policy of an experiment takes while it samples and while it is trained, against the device."""
    from transformers import AutoConfig

    from evolve_dag.distillation.memory import training_memory
    from evolve_dag.inference.folders import longest_context, place
    from evolve_dag.inference.quantization import require

    policy, runtime = experiment.models.policy, experiment.runtime
    folder = place(policy)
    if not (folder / "config.json").is_file():
        yield Finding("note", "memory", f"{folder}/config.json is not there: that file alone is enough to calculate")
        return
    require(policy.quantize, runtime.device)
    config = AutoConfig.from_pretrained(str(folder), local_files_only=True, trust_remote_code=False)
    # `reach` leaves out the last observation, whose length is the environment's affair.
    most = longest_context(policy, folder)
    longest = min(experiment.rollout.reach, most)
    together = max(1, runtime.tokens_per_pass // longest)
    shards = runtime.processes if runtime.shard else 1
    try:
        training = training_memory(
            config,
            dtype=policy.dtype,
            settings=experiment.distillation,
            rows=[longest] * together,
            activation_checkpointing=runtime.activation_checkpointing,
            shards=shards,
            quantize=policy.quantize,
        )
    except RuntimeError as problem:  # products that exist on no tensor without content: a mixture of experts in float32
        yield Finding("note", "memory", f"{config.model_type} in {policy.dtype} cannot be calculated: {problem}")
        return
    rows = "1 trajectory" if together == 1 else f"{together} trajectories"
    text = f"passes of {rows} of {longest} tokens" + ", activations computed twice" * runtime.activation_checkpointing
    text += f", in {runtime.processes} processes of {_size(training.peak)}" * (runtime.processes > 1)
    part = f"1/{shards} of the weights" if shards > 1 else "weights"
    text += (
        f" ({part} {_size(training.weights)}, LoRA and moments {_size(4 * training.adapter)}, "
        f"saved {_size(training.saved)}, logits {_size(training.logits)})"
    )
    on_one = runtime.processes if runtime.device == "cpu" else 1
    text += _held_back() if runtime.device == "cpu" else ""
    remedy = "set runtime.activation_checkpointing, lower runtime.tokens_per_pass or rollout.max_tokens"
    yield _against_device("training", training.peak * on_one, text, runtime.device, remedy)
    if policy.backend == "transformers":
        yield _rollouts(experiment, config, training.weights * shards, longest, most)


def _rollouts(experiment: Experiment, config: Any, weights: int, longest: int, most: int) -> Finding:
    """What sampling takes: the weights, and the keys and values of as many episodes as the policy holds at once.

    Args:
        weights: bytes of the base.
        longest: tokens of an episode.
        most: tokens that the model takes.
    """
    import torch

    from evolve_dag.distillation.memory import cache_memory
    from evolve_dag.inference.kv import SlotPool, cache_share, tokens_in

    policy, device, concurrency = experiment.models.policy, experiment.runtime.device, experiment.runtime.concurrency
    copies = 2 if experiment.distillation.refresh > 1 else 1  # while training, the student that samples is a copy
    held, episode = copies * weights, cache_memory(config, policy.dtype, longest)

    def at_once(there: int) -> int:
        share = cache_share(int(USABLE * there) - held, device)
        tokens = tokens_in(share, config.get_text_config(), getattr(torch, policy.dtype))
        return min(concurrency, SlotPool(tokens, most).rows_allowed(longest))

    kept = f"two copies of the weights {_size(held)}" if copies > 1 else f"weights {_size(held)}"
    there = _device_bytes(device)
    if there is None:
        fit = [card for card in CARDS if held + episode <= USABLE * card * 2**30]
        cards = ", ".join(f"{at_once(card * 2**30)} on a card of {card} GB" for card in fit)
        text = f"{_size(held + episode)} with one episode of {longest} tokens ({kept}); no {device} here; "
        text += f"of {concurrency} at once (runtime.concurrency) {cards}" if fit else "fits cards of no usual size"
        return Finding("note", "memory, rollouts", text)
    rows = at_once(there)
    text = f"{kept}, keys and values of {'1 episode' if rows == 1 else f'{rows} episodes'} of {longest} tokens"
    if rows < concurrency:
        text += f" at once, of {concurrency} (runtime.concurrency): where all get so long the others wait and are read anew"
    remedies = ["lower rollout.max_tokens"]
    remedies += ["set distillation.refresh to 1"] * (copies > 1)
    remedies += ["set models.policy.quantize: nf4"] * (policy.quantize == "none")
    remedy = f"{', '.join(remedies)} or take a smaller model"
    found = _against_device("rollouts", held + rows * episode, text, device, remedy)
    return replace(found, state="note") if found.state == "ok" and rows < concurrency else found


def _number_format(experiment: Experiment) -> Iterator[Finding]:
    """Whether this processor multiplies the other number format much faster than that of the policy."""
    from evolve_dag.config.schema import SHIPPED

    policy = experiment.models.policy
    usual = policy.backend == "transformers" and policy.quantize == "none" and policy.path not in SHIPPED
    if not usual or experiment.runtime.device != "cpu" or policy.dtype == "float16":
        return
    faster, slower = ("bfloat16", "float32") if policy.dtype == "float32" else ("float32", "bfloat16")
    gain = _seconds_of_product(slower) / _seconds_of_product(faster)
    if gain >= WORTH:
        text = f"this processor multiplies {faster} {gain:.1f} x as fast as {slower}: set models.policy.dtype: {faster}"
        yield Finding("note", "number format", f"{text} (another base: nothing that was made with {slower} is used again)")
    else:
        yield Finding("ok", "number format", f"{policy.dtype}; {faster} would not be multiplied much faster here")


def _seconds_of_product(dtype: str, rows: int = 256, width: int = 512, tries: int = 40) -> float:
    """Of ``rows`` tokens with a layer of ``width`` squared, on one thread; the least of some, since other programs take their
    share of the processor."""
    import torch

    kind, before = getattr(torch, dtype), torch.get_num_threads()
    tokens, weight = torch.ones(rows, width, dtype=kind), torch.ones(width, width, dtype=kind)

    def once() -> float:
        begun = time.perf_counter()
        torch.nn.functional.linear(tokens, weight)
        return time.perf_counter() - begun

    torch.set_num_threads(1)
    try:
        return min(once() for _ in range(tries))
    finally:
        torch.set_num_threads(before)


def _against_device(subject: str, needed: int, text: str, device: str, remedy: str) -> Finding:
    text, there = f"{_size(needed)}: {text}", _device_bytes(device)
    if there is None:
        fits = [f"{size} GB" for size in CARDS if needed <= USABLE * size * 2**30]
        return Finding(
            "note", f"memory, {subject}", f"{text}; no {device} here; fits cards of {', '.join(fits) or 'no usual size'}"
        )
    if needed <= USABLE * there:
        return Finding("ok", f"memory, {subject}", f"{text}; {device} has {_size(there)}")
    return Finding("broken", f"memory, {subject}", f"{text}; {device} has {_size(there)}: {remedy}")


def _held_back() -> str:
    """What a training on the CPU holds beside what it needs (measured: docs/LOG.md, 2026-11-25 and 27)."""
    if platform.libc_ver()[0] != "glibc" or os.environ.get("MALLOC_MMAP_THRESHOLD_"):
        return ""
    return (
        "; by itself glibc also keeps what was freed, so the process holds 1.3 to 2.9 times that: "
        "MALLOC_MMAP_THRESHOLD_=262144 gives it back, for 6 to 25% of the time"
    )


def _device_bytes(device: str) -> int | None:
    """None where there is no such device, or it does not say."""
    if device == "cpu":
        from evolve_dag.inference.host_memory import host_memory

        return host_memory()[0]
    import torch

    if device.startswith("cuda") and torch.cuda.is_available():
        return int(torch.cuda.mem_get_info(device)[1])
    return None


def _size(bytes_: float) -> str:
    return f"{bytes_ / 2**30:.1f} GiB" if bytes_ >= 2**30 else f"{bytes_ / 2**20:.0f} MiB"


def _python() -> Iterator[Finding]:
    version = ".".join(map(str, sys.version_info[:3]))
    good = sys.version_info >= (3, 11)
    yield Finding("ok" if good else "broken", "python", version if good else f"{version}: needs 3.11 or later")


def _packages() -> Iterator[Finding]:
    try:
        needed = [line.partition(";") for line in metadata.requires("evolve-dag") or [] if "extra ==" not in line]
    except metadata.PackageNotFoundError:
        yield Finding("note", "packages", "evolve-dag is not installed, only found on the path: pip install -e .")
        return
    from packaging.requirements import Requirement

    found: list[str] = []
    for text, _, _ in needed:
        requirement = Requirement(text)
        try:
            version = metadata.version(requirement.name)
        except metadata.PackageNotFoundError:
            yield Finding("broken", requirement.name, f"not installed: pip install '{requirement}'")
            continue
        if requirement.specifier.contains(version, prereleases=True):
            found.append(f"{requirement.name} {version}")
        else:
            yield Finding("broken", requirement.name, f"{version} is installed, needed is {requirement.specifier}")
    yield Finding("ok", "packages", ", ".join(found))


def _threads() -> Iterator[Finding]:
    import torch

    threads, cores = torch.get_num_threads(), os.cpu_count() or 1
    text = f"{threads} threads on {cores} cores (runtime.threads in the experiment file decides)"
    yield Finding("ok", "torch", text)
    if torch.cuda.is_available():
        yield Finding("ok", "gpu", f"{torch.cuda.get_device_name(0)}: use it with runtime.device: cuda")
    else:
        yield Finding("ok", "gpu", "none; the pocket world needs none")


def _weights() -> Iterator[Finding]:
    from evolve_dag.inference.folders import shipped

    for name in shipped():
        yield from _shipped(name)


def _shipped(name: str) -> Iterator[Finding]:
    from evolve_dag.config.schema import TransformersModelSettings
    from evolve_dag.inference.folders import folder_digest, model_folder, pretraining

    subject = f"{name} weights"
    try:
        folder = model_folder(TransformersModelSettings(path=name))
    except EvolveError as error:
        yield Finding("broken", subject, f"{error.what}; {error.remedy}")
        return
    from safetensors import SafetensorError, safe_open

    digest = folder_digest(folder)
    try:
        for path in folder.glob("*.safetensors"):
            with safe_open(path, framework="numpy") as weights:
                count = len(weights.keys())
    except (SafetensorError, OSError) as error:
        yield Finding(
            "broken", subject, f"{path}: {error}: make them anew with `{pretraining(name)}`, or reinstall the package"
        )
        return
    record = folder / "pretraining.json"
    expected = json.loads(record.read_text(encoding="utf-8")).get("digest") if record.is_file() else None
    if expected is not None and expected != digest:
        yield Finding(
            "broken",
            subject,
            f"{folder}: digest {digest[:12]}..., recorded is {expected[:12]}...: reinstall the package",
        )
        return
    checked = "as recorded" if expected else "no digest recorded beside them"
    yield Finding("ok", subject, f"{count} tensors, digest {digest[:12]}..., {checked}")


def _configs(found: Mapping[Entry, Experiment], mistakes: Sequence[ConfigError]) -> Iterator[Finding]:
    folder = registry.configs_folder()
    for mistake in mistakes:
        yield Finding("broken", "experiment file", mistake.what)
    if found:
        yield Finding("ok", "experiments", f"{folder}/: {', '.join(entry.name for entry in found)}")
    elif not mistakes:
        yield Finding(
            "note",
            "experiments",
            f"no *.yaml in {folder}/: go to the project's folder, or set {registry.CONFIGS_VARIABLE}",
        )


def _parts(experiments: Mapping[Entry, Experiment]) -> Iterator[Finding]:
    """Parts from outside: what installed distributions bring, and what experiment files name in files beside them."""
    for kind, choice in CHOICES.items():
        for name, entries in installed(kind).items():
            who = f"{' and '.join(map(distribution, entries))}, `{choice.places[0]}: {name}`"
            if name in choice.rows:
                yield Finding("note", "part", f"{who}: not used, the name is one of evolve-dag's own: it needs another one")
                continue
            try:
                part(kind, name)
            except PartError as error:
                yield Finding("note", "part", f"{error.what}: {error.remedy}")
            else:
                yield Finding("ok", "part", who)
    for entry, experiment in experiments.items():
        for kind, found in parts_beside(experiment):
            yield Finding("ok", "part", f"{kind} {found.identity}, named by {entry.config.name}")


def _gates(root: Path, experiments: Iterable[Experiment]) -> Iterator[Finding]:
    from evolve_dag.lineage.power import few_rollouts, warning
    from evolve_dag.store.artifacts import Store

    told: dict[tuple[str, str], list[str]] = {}
    for experiment in experiments:
        told.setdefault(("gate", warning(experiment, Store(root))), []).append(experiment.experiment)
        told.setdefault(("extraction", few_rollouts(experiment)), []).append(experiment.experiment)
    for (about, text), names in told.items():
        if text:
            yield Finding("note", about, f"{', '.join(names)}: {text}")


def _registry(root: Path) -> Iterator[Finding]:
    for path in sorted((root / "experiments").glob("*.json")):
        try:
            registry.load(root, path.stem)
        except EvolveError as error:
            yield Finding("note", f"lineage {path.stem}", f"{error.what}; {error.remedy}")


def _store(root: Path) -> Iterator[Finding]:
    place = root
    while not place.exists():  # a first run makes the folder: look at what it would be made in
        place = place.parent if place != place.parent else Path()
    probe = place / f".probe-{os.getpid()}"
    try:
        probe.touch()
        probe.unlink()
    except OSError as error:
        yield Finding("broken", "store", f"{root}: not writable: {error.strerror}: name another folder with --store")
        return
    from evolve_dag.store.artifacts import Store

    made = sum(1 for _ in Store(root).artifacts()) if root.exists() else 0
    yield Finding(
        "ok", "store", f"{root}: writable, {made} artifacts" if root.exists() else f"{root}: not there yet, can be made"
    )
    free = shutil.disk_usage(place).free / 2**30
    yield Finding("ok" if free >= LEAST_FREE_GIB else "note", "disk", f"{free:.1f} GiB free")


def _dagster_home(root: Path) -> Iterator[Finding]:
    configured, home = os.environ.get(registry.HOME_VARIABLE), registry.dagster_home(root)
    if not configured:
        yield Finding("ok", "dagster home", f"{home} (DAGSTER_HOME is not set)")
        return
    absent = "" if home.is_dir() else ": not there yet, is made by the first run"
    if not Path(configured).is_absolute():
        text = f"{home.resolve()} (DAGSTER_HOME={configured}){absent}; Dagster's own commands take an absolute path alone"
        yield Finding("note", "dagster home", f"{text}: set it so")
    elif absent:
        yield Finding("note", "dagster home", f"DAGSTER_HOME={configured}{absent}")
    else:
        yield Finding("ok", "dagster home", f"{configured} (DAGSTER_HOME)")


def _databases(root: Path) -> Iterator[Finding]:
    from evolve_dag.store.disk import require_address
    from evolve_dag.store.faults import damaged_databases

    home = registry.dagster_home(root)
    for folder in (home, root / "mlflow"):
        try:
            require_address(folder.resolve())
        except StoreError as error:
            yield Finding("note", "database", f"{error.what}: {error.remedy}")
    for path in (*damaged_databases(home), *damaged_databases(root / "mlflow"), *damaged_databases(root / "cache")):
        yield Finding("broken", "database", f"{path}: damaged: move it away; artifacts are files of their own and not touched")


def _optional(rows: Sequence[Row]) -> Iterator[Finding]:
    features = {
        "dagster_webserver": "the web interface (evolve ui): pip install dagster-webserver",
        **{
            library: f"`{choice.places[0]}: {name}`: pip install 'evolve-dag[{extra}]'"
            for choice, name, row in rows
            for library, extra in row.libraries.items()
        },
        "bitsandbytes": "a base in 4 bit (models.policy.quantize: nf4): pip install 'evolve-dag[quantized]'",
        "gguf": "model folders from GGUF files (evolve model): pip install 'evolve-dag[gguf]'",
        "s3fs": "a store on object storage (EVOLVE_MIRROR): pip install 'evolve-dag[s3]'",
        "pytest": "the tests (make test): pip install -e '.[dev]'",
    }
    for module, feature in features.items():
        if importlib.util.find_spec(module) is None:
            yield Finding("note", module, f"missing: {feature}")
    yield Finding("ok", "not needed", "API keys, a GPU, a browser, vLLM: configs/pocket.yaml asks for none of them")


def _sandbox() -> Iterator[Finding]:
    from evolve_dag.environments.web.sandbox import sandbox_report

    report = sandbox_report()
    yield Finding("ok" if "holds" in report else "note", "python sandbox", report)


def _keys(rows: Sequence[Row]) -> Iterator[Finding]:
    names = [*(name for _, _, row in rows for name in row.variables), "MLFLOW_TRACKING_URI", "EVOLVE_MIRROR"]
    found = [name for name in names if os.environ.get(name)]  # never their values
    yield Finding("ok", "environment", f"set: {', '.join(found)}" if found else f"none of {', '.join(names)} is set")
