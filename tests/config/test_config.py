"""Experiment files: inheritance, all mistakes at once, slices."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from evolve_dag.config.loading import is_study, load_experiment, stated_keys
from evolve_dag.config.registry import scan
from evolve_dag.config.schema import REGIME_PRESETS, Experiment, Regime, contradictions
from evolve_dag.errors import ConfigError

CONFIGS = Path(__file__).parents[2] / "configs"
EXPERIMENTS = [path for path in CONFIGS.glob("*.yaml") if not is_study(path)]


def write(folder: Path, name: str, text: str) -> Path:
    path = folder / name
    path.write_text(text)
    return path


@pytest.mark.parametrize("path", sorted(EXPERIMENTS), ids=lambda p: p.stem)
def test_every_shipped_config_loads_and_opens_with_its_purpose(path: Path) -> None:
    experiment = load_experiment(path)
    assert experiment.experiment == path.stem
    head = path.read_text().split("\n\n")[0]
    assert head.startswith("#")
    assert f"evolve run configs/{path.name}" in path.read_text()


def test_every_cell_of_the_grid_is_there_once() -> None:
    cells = []
    for path in sorted(EXPERIMENTS):
        e = load_experiment(path)
        for name, preset in REGIME_PRESETS.items():
            plain = e.selection.selector == "state" and e.environment.kind == "pocket" and e.distillation.drills > 0
            if e.regime == Regime.model_validate(preset) and plain and not e.extraction.placebo:
                cells.append((e.granularity, e.injection, name))
    wanted = [
        (g, i, r) for g in ("principle", "instance") for i in ("step_wise", "global") for r in ("off_policy", "on_policy")
    ]
    assert sorted(cells) == sorted(wanted)


def test_all_mistakes_come_in_one_message_with_file_and_key(tmp_path: Path) -> None:
    write(tmp_path, "base.yaml", "experiment: base\nrollout: {max_step: 3}\n")
    path = write(tmp_path, "mine.yaml", "extends: base.yaml\nseed: many\ninjektion: global\ndistillation: {rank: 0}\n")
    with pytest.raises(ConfigError) as caught:
        load_experiment(path)
    message = str(caught.value)
    assert "4 mistakes" in message
    assert "mine.yaml: seed: should be a valid integer, not 'many'" in message
    assert "mine.yaml: injektion: unknown key (did you mean 'injection'?)" in message
    assert "mine.yaml: distillation.rank: should be greater than or equal to 1, not 0" in message
    assert "base.yaml: rollout.max_step: unknown key (did you mean 'max_steps'?)" in message
    assert "remedy:" in message


@pytest.mark.parametrize(
    ("text", "key"),
    [
        ("injection: none\n", "injection"),
        ("tasks: {held_out: {world: 11}}\n", "tasks.held_out.world"),
        ("tasks: {train: {path: a.jsonl}}\n", "tasks.train.path"),
        ("environment: {kind: corpus, pages: p.jsonl}\n", "tasks.train.path"),
        ("distillation: {refresh: 3}\n", "distillation.refresh"),
        ("regime: sideways\n", "regime"),
        ("regime: {preset: off_policy, sorce: student}\n", "regime.sorce"),
        ("environment: {kind: moon}\n", "environment.kind"),
        ("experiment: Not A Name\n", "experiment"),
        ("rollout: {temperature: .nan}\n", "rollout.temperature"),
        ("rollout: {temperature: .inf}\n", "rollout.temperature"),
        ("evaluation: {base_temperatures: [0, .inf]}\n", "evaluation.base_temperatures.1"),
        ("gate: {max_turn_ratio: .inf}\n", "gate.max_turn_ratio"),
        ("tasks: {train: {percent: [0, 50]}}\n", "tasks.train.percent"),
    ],
)
def test_impossible_values_are_refused(tmp_path: Path, text: str, key: str) -> None:
    path = write(tmp_path, "x.yaml", text)
    with pytest.raises(ConfigError) as caught:
        load_experiment(path)
    assert f"x.yaml: {key}: " in str(caught.value)


@pytest.mark.parametrize("text", ["- a\n- b\n", "a: [1\n", "just words\n", "\x00"])
def test_files_that_are_no_mapping_are_refused(tmp_path: Path, text: str) -> None:
    with pytest.raises(ConfigError, match=r"x\.yaml"):
        load_experiment(write(tmp_path, "x.yaml", text))


def test_missing_file_and_circle(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no such file"):
        load_experiment(tmp_path / "none.yaml")
    write(tmp_path, "a.yaml", "extends: b.yaml\n")
    with pytest.raises(ConfigError, match="extends itself"):
        load_experiment(write(tmp_path, "b.yaml", "extends: a.yaml\n"))


def test_a_file_that_only_names_itself_is_the_default_experiment(tmp_path: Path) -> None:
    assert load_experiment(write(tmp_path, "plain.yaml", "experiment: plain\n")) == Experiment(experiment="plain")


def test_regime_parts_settable_alone_and_over_a_preset(tmp_path: Path) -> None:
    write(tmp_path, "on.yaml", "regime: on_policy\n")
    part = load_experiment(write(tmp_path, "part.yaml", "extends: on.yaml\nregime: {rejection: true}\n")).regime
    assert (part.source, part.divergence, part.rejection) == ("student", "reverse_kl", True)
    other = load_experiment(
        write(tmp_path, "other.yaml", "extends: part.yaml\nregime: {preset: off_policy, divergence: jsd}\n")
    )
    assert (other.regime.source, other.regime.divergence, other.regime.rejection) == ("teacher", "jsd", True)


@pytest.mark.parametrize(
    ("regime", "refused"),
    [
        ("off_policy", False),
        ("on_policy", True),
        ({"source": "student"}, True),
        ({"preset": "off_policy", "source": "student"}, True),
        ({"preset": "on_policy", "refused": False}, False),
        ({"source": "teacher", "refused": True}, True),
    ],
)
def test_refused_actions_are_learned_as_the_source_suggests_unless_stated(regime: object, refused: bool) -> None:
    assert Regime.model_validate(regime).refused is refused


def test_a_key_is_stated_by_the_file_whose_word_counts(tmp_path: Path) -> None:
    first, second, third = (tmp_path / f"{name}.yaml" for name in ("first", "second", "third"))
    first.write_text("seed: 1\nregime: {preset: off_policy, rejection: false}\nselection: {selector: llm, min_items: 2}\n")
    second.write_text("extends: first.yaml\nregime: off_policy\n")
    third.write_text("extends: second.yaml\nseed: 2\nselection: {selector: state}\n")
    laid_over = tmp_path / "over.yaml"
    found = stated_keys(third, {"distillation": {"rank": 4}}, laid_over)
    leaves = {key: file for key, file in found.items() if key not in ("regime", "selection", "distillation", "extends")}
    assert leaves == {
        "seed": third, "regime.preset": second, "selection.selector": third, "distillation.rank": laid_over,
    }, "the preset has set rejection back, and another selector asks for no number"  # fmt: skip


def test_a_study_is_no_experiment(tmp_path: Path) -> None:
    path = write(tmp_path, "grid.yaml", "seeds: [1]\niterations: 1\narms: {a: a.yaml}\n")
    with pytest.raises(ConfigError, match=r"grid\.yaml: is a study") as caught:
        load_experiment(path)
    assert "evolve study" in caught.value.remedy
    write(tmp_path, "a.yaml", "seed: 1\n")
    entries, mistakes = scan(tmp_path)
    assert [entry.name for entry in entries] == ["a"]
    assert not mistakes


def test_a_placebo_needs_mined_principles() -> None:
    for changes in ({"granularity": "instance"}, {"start_pool": "pool.json"}):
        e = Experiment.model_validate({"experiment": "x", "extraction": {"placebo": True}, **changes})
        assert "extraction.placebo" in dict(contradictions(e))


@pytest.mark.parametrize(
    ("changes", "refused"),
    [
        ({}, True),
        ({"granularity": "instance"}, False),
        ({"start_pool": "pool.json"}, False),
        ({"extraction": {"extractor": "llm"}}, False),
        ({"injection": "none", "regime": {"divergence": "cross_entropy"}}, False),
        ({"rollout": {"group_size": 2}}, False),
    ],
)
def test_principles_are_not_mined_in_groups_of_one(changes: dict, refused: bool) -> None:
    e = Experiment.model_validate({"experiment": "x", "rollout": {"group_size": 1}, **changes})
    assert ("rollout.group_size" in dict(contradictions(e))) is refused


def test_what_follows_the_context_limit_must_fit_the_engine() -> None:
    def refused(context: int, **rollout: int) -> bool:
        policy = {"backend": "vllm", "path": "x", "context_tokens": context}
        e = Experiment.model_validate({"experiment": "x", "models": {"policy": policy}, "rollout": rollout})
        return "rollout.max_tokens" in dict(contradictions(e))

    assert refused(3000, max_tokens=2000, max_action_tokens=500)
    assert not refused(3001, max_tokens=2000, max_action_tokens=500)
    assert refused(3000, max_tokens=2000, max_action_tokens=2000)
    assert not refused(3000, max_tokens=2000, max_action_tokens=2000, max_steps=2)  # the second call is the last anyway


@pytest.mark.parametrize(
    ("runtime", "key", "words"),
    [
        ({"shard": True}, "shard", "there is one"),
        ({"processes": 2, "device": "cuda:0"}, "device", "set it to cuda"),
        ({"processes": 2, "device": "mps"}, "device", "one device"),
        ({"processes": 2}, "processes", "distillation.refresh"),
    ],
)
def test_what_several_processes_cannot_work_with(runtime: dict[str, Any], key: str, words: str) -> None:
    changes = {"regime": "on_policy", "distillation": {"refresh": 2}} if key == "processes" else {}
    e = Experiment.model_validate({"experiment": "x", "runtime": runtime, **changes})
    assert words in dict(contradictions(e))[f"runtime.{key}"]
    able = Experiment.model_validate({"experiment": "x", "runtime": {"processes": 2, "shard": True, "device": "cuda"}})
    assert not contradictions(able)


def test_a_base_in_4_bit_is_not_kept_in_parts() -> None:
    policy = {"backend": "transformers", "quantize": "nf4"}
    e = Experiment.model_validate({"experiment": "x", "models": {"policy": policy}, "runtime": {"processes": 2, "shard": True}})
    assert [key for key, _ in contradictions(e)] == ["runtime.shard"]
    told = dict(contradictions(e))["runtime.shard"]
    assert "models.policy.quantize is nf4" in told
    assert "set it to false" in told
    assert "quantize to none" in told
    whole = e.model_copy(update={"runtime": e.runtime.model_copy(update={"shard": False})})
    assert not contradictions(whole)


def test_name_comes_from_the_file_that_is_run(tmp_path: Path) -> None:
    write(tmp_path, "base.yaml", "experiment: base\n")
    assert load_experiment(write(tmp_path, "child.yaml", "extends: base.yaml\n")).experiment == "child"


def test_paths_are_relative_to_the_file_that_names_them(tmp_path: Path) -> None:
    (tmp_path / "deep").mkdir()
    splits = ", ".join(f"{name}: {{path: {name[0]}.jsonl, world: null}}" for name in ("train", "development", "held_out"))
    tasks = f"tasks: {{{splits}}}"
    write(tmp_path / "deep", "base.yaml", f"environment: {{kind: corpus, pages: pages.jsonl}}\n{tasks}\n")
    e = load_experiment(write(tmp_path, "top.yaml", "extends: deep/base.yaml\ntasks: {train: {path: mine.jsonl}}\n"))
    assert e.environment.kind == "corpus"
    assert e.environment.pages == str(tmp_path / "deep" / "pages.jsonl")
    assert e.tasks.train.path == str(tmp_path / "mine.jsonl")
    assert e.tasks.held_out.path == str(tmp_path / "deep" / "h.jsonl")


def test_the_interpreter_of_an_environment_is_relative_too_and_stays_a_link(tmp_path: Path) -> None:
    """Behind the link is the system's interpreter, which knows nothing of the environment."""
    (tmp_path / "deep").mkdir()
    (tmp_path / "python").symlink_to("/usr/bin/env")

    def named(python: str) -> object:
        text = f"models: {{policy: {{backend: vllm, path: x, python: {python}}}}}\n"
        return load_experiment(write(tmp_path / "deep", "x.yaml", text)).models.policy.model_dump()["python"]

    assert named("../python") == str(tmp_path / "python")
    assert named("/usr/bin/env") == "/usr/bin/env"
    assert named("python3") == "python3"
    assert named("''") == ""


def test_slices_hold_just_what_was_asked() -> None:
    e = Experiment(experiment="x", seed=3)
    assert e.slice("seed", "regime.source") == {"seed": 3, "regime.source": "teacher"}
    assert e.slice("gate")["gate"]["confidence"] == 0.95


MODELS = """
models:
  policy: {backend: vllm, path: pocket, servers: [http://one:8000/v1, http://two:8000/v1]}
  extractor: {backend: openai, model: large, price_prompt: 1.5, endpoints: [http://one/v1]}
  judge: {backend: openai, model: large}
"""


def test_models_by_role(tmp_path: Path) -> None:
    e = load_experiment(write(tmp_path, "roles.yaml", f"extends: {CONFIGS / 'pocket.yaml'}\n{MODELS}"))
    assert e.models.policy.backend == "vllm"
    assert e.models.settings("selector") == e.models.policy
    extractor = e.models.settings("extractor")
    assert extractor is not None
    assert extractor.backend == "openai"


def test_where_and_how_fast_are_in_no_slice(tmp_path: Path) -> None:
    one = load_experiment(write(tmp_path, "one.yaml", f"extends: {CONFIGS / 'pocket.yaml'}\n{MODELS}"))
    other = load_experiment(
        write(tmp_path, "two.yaml", f"extends: {CONFIGS / 'pocket.yaml'}\n{MODELS.replace('one', 'three').replace('1.5', '9')}")
    )
    assert one.models != other.models
    assert one.slice("models") == other.slice("models")
    assert one.slice("models.judge") == {"models.judge": {**one.slice("models.judge")["models.judge"], "model": "large"}}
    renamed = load_experiment(write(tmp_path, "three.yaml", "extends: two.yaml\nmodels: {judge: {model: small}}"))
    assert renamed.slice("models.judge") != one.slice("models.judge")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("models: {policy: {backend: openai, model: x}}", ["models.policy", "openai"]),
        ("models: {extractor: {backend: openai}}", ["models.extractor.model: missing"]),
        ("models: {selector: {backend: openai, model: x, key: 'sk-123 secret'}}", ["models.selector.key"]),
        ("verification: {kind: judge}", ["models.judge: missing"]),
        ("environment: {kind: tools, search: searxng}", ["environment.searxng: missing", "environment.files: missing"]),
        ("environment: {kind: tools, tools: [browse]}", ["environment.tools.0"]),
        ("extraction: {domain: mathematics}", ["extraction.domain"]),
        ("tasks: {train: {suite: aime}}", ["tasks.train"]),
        (
            "rollout: {max_tokens: 4096, max_action_tokens: 99}\n"
            "models: {policy: {backend: vllm, path: x, context_tokens: 4096}}",
            ["rollout.max_tokens: 4096 leaves no room", "set it well below 3898", "raise context_tokens"],
        ),
        ("models: {policy: {backend: vllm, path: x, servers: 'http://a'}}", ["servers: should be a list, not 'http://a'"]),
        ("schedule: {cron: 'every night'}", ["schedule.cron"]),
        ("schedule: {timezone: Mars/Olympus}", ["schedule.timezone"]),
        ("schedule: {webhook: 'https://example.org/hook'}", ["schedule.webhook"]),
    ],
)
def test_mistakes_of_models_tools_and_schedules(tmp_path: Path, text: str, words: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        load_experiment(write(tmp_path, "wrong.yaml", f"extends: {CONFIGS / 'pocket.yaml'}\n{text}"))
    for word in words:
        assert word in str(caught.value)
    assert "sk-123" not in str(caught.value)
