"""Every key of an experiment file; unknown keys are refused.

An experiment is one named config: a lineage of iterations. Each step of the loop reads a *slice* of it
(:meth:`Experiment.slice`); the slice is part of the digest of what the step makes, so a change of the
selector recomputes the contexts and what follows, not the rollouts. ``runtime`` is in no slice: it says
how fast, never what.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, Field, SerializeAsAny, Strict, field_validator, model_validator

from evolve_dag.config.parts import (
    CHOICES,
    Chosen,
    EnvironmentSettings,
    ExtractionSettings,
    Known,
    LauncherSettings,
    SelectionSettings,
    VerificationSettings,
    mistakes,
    part,
    part_of,
)
from evolve_dag.config.scheduling import check_cron, check_timezone
from evolve_dag.config.section import IDENTITY, LATER, MOST, PATH, PROGRAM, RUNTIME, Section, Strings, marked
from evolve_dag.records import LARGEST_SEED, Granularity, InjectionPattern, Source

REGIME_PRESETS: Mapping[str, Mapping[str, Any]] = {
    "off_policy": {"source": "teacher", "divergence": "forward_kl", "rejection": True},
    "on_policy": {"source": "student", "divergence": "reverse_kl", "rejection": False},
}


class Regime(Section):
    """Internalization regime: choices that the paper confounds, kept apart (METHOD: regime)."""

    source: Source = "teacher"
    """Who samples the trajectories that are learned from: the experience-aware teacher or the student."""
    divergence: Annotated[str, AfterValidator(Known("divergence"))] = "forward_kl"
    """What is minimised between teacher p and student q on every action token."""
    rejection: bool = True
    """Keep only successful trajectories."""
    refused: bool = False
    """Learn at actions that the environment refused (malformed, unknown tool) as well. Unset, as ``source`` suggests: true for
    ``student``, whose own slip is what the teacher's distribution corrects; false for ``teacher``, whose slip is nothing to
    learn from."""

    @model_validator(mode="before")
    @classmethod
    def _expand_preset(cls, value: Any) -> Any:
        if isinstance(value, str):
            value = {"preset": value}
        if not isinstance(value, dict):
            return value
        preset = value.get("preset", "")
        if "preset" in value and not (isinstance(preset, str) and preset in REGIME_PRESETS):
            raise ValueError(f"unknown preset {preset!r}: one of {', '.join(REGIME_PRESETS)}")
        stated = {**REGIME_PRESETS.get(preset, {}), **{k: v for k, v in value.items() if k != "preset"}}
        return {"refused": stated.get("source") == "student", **stated}


class ModelSettings(Section):
    """A language model; its backend says where it runs."""

    backend: str
    """Where it runs."""


SHIPPED = ("pocket", "pocket-cases")
"""What ``models.policy.path`` calls the policies that ship with the package."""


class PolicySettings(ModelSettings):
    """A model whose weights we hold: a policy must be one."""

    path: str = Field(json_schema_extra=PATH)
    """Folder that ``from_pretrained`` reads; ``pocket`` and ``pocket-cases`` are the policies that ship with the package."""
    dtype: Literal["float32", "bfloat16", "float16"]
    """Number format of the weights."""
    quantize: Literal["none", "nf4"] = Field("none", json_schema_extra=IDENTITY)
    """How the linear layers are kept."""


class TransformersModelSettings(PolicySettings):
    """A model in this process."""

    backend: Literal["transformers"] = "transformers"
    """In this process, through transformers."""
    path: str = Field("pocket", json_schema_extra=PATH)
    """``pocket`` (the policy that ships with the package), ``pocket-cases`` (the same, taught to recall a case) or a folder
    that ``from_pretrained`` reads."""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Number format of the weights."""
    quantize: Literal["none", "nf4"] = Field("none", json_schema_extra=IDENTITY)
    """How the linear layers are kept: in ``dtype``, or in 4 bit (NF4, as in QLoRA; extra ``[quantized]``) and computed in
    ``dtype``. That is another base, and the teacher, the student and the rollouts of the policy all have it."""


class VllmModelSettings(PolicySettings):
    """A model that vLLM samples from; its weights are opened here too, to teach and to learn."""

    backend: Literal["vllm"] = "vllm"
    """Through vLLM: an engine in a process of its own, or servers that run already."""
    dtype: Literal["float32", "bfloat16", "float16"] = "bfloat16"
    """Number format of the weights."""
    quantize: Literal["none"] = Field("none", json_schema_extra=IDENTITY)
    """vLLM samples from the weights as they are, and what learns and teaches here has to have the same ones: ``nf4`` is for the
    backend ``transformers`` alone."""
    servers: Strings = Field((), json_schema_extra=RUNTIME)
    """Addresses of running vLLM servers, e.g. ``http://127.0.0.1:8000/v1``; calls are spread over them. None: an engine of our
    own. They need ``--enable-lora``, ``VLLM_ALLOW_RUNTIME_LORA_UPDATING=True`` and the adapters' folder in sight."""
    model: str = Field("", json_schema_extra=RUNTIME)
    """Name under which the servers serve the base model; empty: the first that they list."""
    key: str = Field("VLLM_API_KEY", json_schema_extra=RUNTIME)
    """Environment variable that holds the servers' key; it may be unset."""
    python: str = Field("", json_schema_extra=PROGRAM)
    """Interpreter of an environment that holds vLLM, for the engine; relative to the file that names it. Empty: this one."""
    context_tokens: int = Field(32_768, ge=256, le=MOST, json_schema_extra=RUNTIME)
    """Longest context of the engine (``max_model_len``). Below what the model itself allows it decides where an episode ends:
    another one makes all iterations anew. Servers have a limit of their own."""
    gpu_memory: float = Field(0.85, gt=0, le=1, json_schema_extra=RUNTIME)
    """Share of the GPU's memory that the engine takes."""
    tensor_parallel: int = Field(1, ge=1, le=MOST, json_schema_extra=RUNTIME)
    """GPUs that share one engine."""
    timeout_seconds: float = Field(600.0, gt=0, json_schema_extra=RUNTIME)
    """Longest wait for one answer; also how long a call that servers failed is tried again."""


class OpenAIModelSettings(ModelSettings):
    """A model behind an OpenAI-compatible endpoint. The key comes from the environment, never from this file."""

    backend: Literal["openai"] = "openai"
    """Any OpenAI-compatible endpoint."""
    model: str
    """The model's name at the endpoint."""
    endpoints: Strings = Field(("https://api.openai.com/v1",), min_length=1, json_schema_extra=RUNTIME)
    """Addresses that serve it; calls are spread over them."""
    key: str = Field("OPENAI_API_KEY", pattern=r"^[A-Za-z_][A-Za-z0-9_]*$", json_schema_extra=RUNTIME)
    """Environment variable that holds the key; a local server may need none."""
    structured: Literal["json_schema", "json_object", "none"] = "json_schema"
    """What the endpoint offers for answers in JSON; without it the answer is parsed, and repaired once."""
    context_tokens: int = Field(32_768, ge=256, le=MOST)
    """Its context limit. A longer request keeps head and tail of its longest message, and says that it was cut."""
    extra: dict[str, Any] = Field({})
    """Further fields of every request's body, e.g. ``chat_template_kwargs: {enable_thinking: false}``."""
    concurrency: int = Field(32, ge=1, le=MOST, json_schema_extra=RUNTIME)
    """Calls in flight, all endpoints together."""
    timeout_seconds: float = Field(180.0, gt=0, json_schema_extra=RUNTIME)
    """Longest wait for one attempt."""
    attempts: int = Field(6, ge=1, le=20, json_schema_extra=RUNTIME)
    """Tries per call, with growing pauses and jitter; a ``Retry-After`` is honoured."""
    price_prompt: float | None = Field(None, ge=0, json_schema_extra=RUNTIME)
    """US dollars per million prompt tokens; unset: the cost is not known."""
    price_cached: float | None = Field(None, ge=0, json_schema_extra=RUNTIME)
    """The same for prompt tokens that the endpoint had cached; unset: as ``price_prompt``."""
    price_completion: float | None = Field(None, ge=0, json_schema_extra=RUNTIME)
    """US dollars per million sampled tokens."""


HelperRole = Literal["extractor", "selector", "judge", "embedding"]
HelperSettings = Annotated[
    Literal["policy"] | SerializeAsAny[ModelSettings],
    BeforeValidator(Chosen("backend", "transformers", ModelSettings, ("policy",))),
]


class Models(Section):
    """Language models by role. ``policy`` in place of a model means: the policy itself (self-generated experience)."""

    policy: Annotated[SerializeAsAny[PolicySettings], BeforeValidator(Chosen("backend", "transformers", PolicySettings))] = (
        TransformersModelSettings()
    )
    """The model that acts, teaches and learns."""
    extractor: HelperSettings = "policy"
    """Who writes experience (``extraction.extractor: llm``) and sums up web pages: the policy itself, or a model of its own."""
    selector: HelperSettings = "policy"
    """Who chooses items (``selection.selector: llm``)."""
    judge: Annotated[
        SerializeAsAny[ModelSettings] | None, BeforeValidator(Chosen("backend", "transformers", ModelSettings, (None,)))
    ] = None
    """Who judges answers (``verification.kind: judge``); never the policy."""
    embedding: Annotated[
        Literal["policy"] | SerializeAsAny[TransformersModelSettings],
        BeforeValidator(Chosen("backend", "transformers", TransformersModelSettings, ("policy",))),
    ] = "policy"
    """Whose hidden states compare items and states (``selection.selector: embedding``); ``policy``: the base model's."""

    def settings(self, role: HelperRole) -> ModelSettings | None:
        """The model of a role; the policy's where the file says ``policy``."""
        value: ModelSettings | str | None = getattr(self, role)
        return self.policy if isinstance(value, str) else value


class TaskSplit(Section):
    """Tasks of one use: training, development (the gate) or held-out (reported, decides nothing)."""

    count: int | None = Field(None, ge=1, le=MOST)
    """How many tasks; None takes all of the file."""
    world: int | None = Field(None, ge=0, le=MOST)
    """Pocket world that the tasks are about; every split needs its own."""
    path: str | None = Field(None, json_schema_extra=PATH)
    """File of tasks; JSONL with ``{"id"?, "question", "answer"}`` a line, or what ``suite`` says."""
    suite: Annotated[str, AfterValidator(Known("suite"))] = "jsonl"
    """Format of the file: docs/benchmarks.md says where each comes from and what its licence is."""
    fields: dict[str, str] = Field({})
    """Our name -> the file's name, for ``id``, ``question``, ``answer`` and facts to break results down by."""
    skip: int = Field(0, ge=0, le=MOST)
    """Tasks to leave out before ``count`` are drawn (the order of the draw is fixed), so that splits can share one file."""
    percent: Annotated[tuple[int, int], Strict(False)] | None = Field(None, json_schema_extra=LATER)
    """Of a file, the tasks whose question hashes into this part of a hundred: ``[0, 90]`` is nine tenths of it.
    Splits of one file whose parts do not meet never share a task, as a stream too, whatever is appended. None: all."""
    stream: bool = False
    """``train`` only: every iteration takes tasks of its own. In the pocket world it asks about a new world; of a file it takes
    the next ``count`` rows, in their order; of a folder (``path``) the next file with a row, by name. What comes later
    changes no earlier iteration: a file that sorts before one that was read is passed over. False: always the same tasks."""

    @field_validator("percent")
    @classmethod
    def _within_a_hundred(cls, value: tuple[int, int] | None) -> tuple[int, int] | None:
        if value is not None and not 0 <= value[0] < value[1] <= 100:
            raise ValueError("should be two whole numbers from 0 to 100, the smaller one first")
        return value


class Tasks(Section):
    train: TaskSplit = TaskSplit(count=96, world=11)
    """Rolled out in every iteration; experience and distillation come from these."""
    development: TaskSplit = TaskSplit(count=128, world=21)
    """The gate decides on these."""
    held_out: TaskSplit = TaskSplit(count=256, world=31)
    """Reported; decides nothing."""

    @property
    def splits(self) -> dict[str, TaskSplit]:
        """All three, by name."""
        return {"train": self.train, "development": self.development, "held_out": self.held_out}


class RolloutSettings(Section):
    """The ReAct loop and its limits (METHOD step 1)."""

    group_size: int = Field(4, ge=1, le=MOST)
    """G: trajectories per training task."""
    frontier: float = Field(0.0, ge=0.0, le=0.75, json_schema_extra=LATER)
    """Share of the student's rollouts that goes to training tasks near the frontier, which some of its first rollouts solved
    and others did not: only such a group tells what separates success from failure. The budget stays, ``group_size`` times the
    tasks. 0: every task has as many, which was better over five nights of the pocket world (docs/LOG.md)."""
    temperature: float = Field(1.0, ge=0.0)
    """Of the policy's actions; 0 is argmax."""
    top_p: float = Field(1.0, gt=0.0, le=1.0)
    """Nucleus: least share of probability that is sampled from."""
    max_steps: int = Field(12, ge=1, le=MOST)
    """Model calls per episode; the last one is told to answer."""
    max_tokens: int = Field(2048, ge=64, le=MOST)
    """Context limit per episode in tokens; past it the next call is told to answer. The model's context must hold what may
    still come then: an action that was begun below the limit, what it brings, and the answer."""
    max_action_tokens: int = Field(48, ge=4, le=MOST)
    """Tokens of one action."""
    max_seconds: float = Field(600.0, gt=0, le=1e7)
    """Wall time of one episode; past it the next call is told to answer. An episode fails when its environment takes longer
    than that over its set-up or over one call."""
    plain_answers: bool = False
    """Whether a turn without a tool call is the final answer, as chat models are wont to give it; else it is malformed."""

    @property
    def more(self) -> int:
        """Of the rollouts of a task those that go where outcomes are mixed, on average."""
        return round(self.frontier * self.group_size)

    @property
    def reach(self) -> int:
        """Tokens that an episode may come to, but for the observation before its last answer."""
        return self.max_tokens + 2 * self.max_action_tokens


class TeacherCheckSettings(Section):
    """The teacher with experience is compared with the student without it on training tasks, before it teaches
    (docs/adr/0021-teacher-check.md)."""

    enabled: bool = True
    """An item that lowers the teacher's success is withdrawn; a teacher that is below the student does not teach."""
    attempts: int = Field(3, ge=1, le=99)
    """Most times that the teacher is asked in one night. One that is below the student is asked again without what was
    withdrawn, which costs another set of its rollouts: of all training tasks, or of ``tasks`` with ``regime.source: student``.
    After the last nothing is taught tonight."""
    must_help: bool = False
    """Nobody teaches but a teacher that is established to be better than the student: its interval lies above zero. By default
    one that is not established to be worse does, too; where it is no better, the student may lose by it (docs/LOG.md)."""
    tasks: int = Field(32, ge=1, le=MOST)
    """Training tasks that are looked at where looking costs something: rollouts of the teacher with ``regime.source: student``,
    choices of a selector that asks a model. Elsewhere all are."""
    confidence: float = Field(0.95, gt=0.5, lt=1.0)
    """Level at which the interval of the paired difference must lie below zero; for items it holds for all of them together."""


class DistillationSettings(Section):
    """Teacher -> student, by LoRA (METHOD step 5)."""

    rank: int = Field(16, ge=1, le=MOST)
    """Rank of the LoRA matrices on all linear layers."""
    alpha: float = Field(32.0, gt=0)
    """Scale of the LoRA update: alpha / rank."""
    learning_rate: float = Field(7e-4, gt=0)
    """Peak rate of AdamW in the first training."""
    learning_rate_decay: float = Field(0.6, gt=0, le=1.0)
    """Factor with each training that the adapter has had: Adam near zero divergence still takes almost full steps."""
    epochs: int = Field(2, ge=1, le=MOST)
    """Passes over the kept trajectories, at most."""
    target_divergence: float = Field(0.0, ge=0)
    """Training ends after the first pass whose mean divergence from teacher to student, over its steps' clean rows, is at most
    that many nats per action token, so a night that leaves little to learn takes few steps. 0: all passes."""
    tokens_per_batch: int = Field(2048, ge=64, le=MOST)
    """Tokens of one optimizer step, those that several rows share counted in each."""
    warmup_steps: int = Field(5, ge=0, le=MOST)
    """Steps until the peak rate; then it falls linearly to a tenth."""
    gradient_clip: float = Field(1.0, gt=0)
    """Largest norm of a gradient."""
    weight_decay: float = Field(0.0, ge=0)
    """Of the LoRA matrices."""
    top_k: int = Field(64, ge=0, le=MOST)
    """Teacher log-probabilities kept per action token, the tail as one more class; 0 keeps all."""
    retention: float = Field(0.6, ge=0, le=1)
    """Share of the steps with an item in context that are learned a second time *with* it, towards the same teacher, so that
    policy(k+1) still reads experience (docs/adr/0004-retention.md). 0 is the loss of the paper alone."""
    drills: float = Field(0.0, ge=0, le=1)
    """Share of the steps that are learned once more under advice drawn at random, towards policy(k) reading the same, so that
    policy(k+1) goes on reading advice that it has not learned (docs/adr/0019-drills.md). 0: none."""
    teacher_temperature: float = Field(1.0, gt=0, le=10)
    """Of the teacher's distribution at the steps where it reads experience. Below 1 it is surer of what it prefers, so that a
    lesson handed on every night does not wear away (docs/adr/0019-drills.md). 1 is the loss of the paper."""
    retention_weight: float = Field(1.0, gt=0, le=1000)
    """How many action tokens one of those counts for in the loss."""
    jsd_weight: float = Field(0.5, gt=0, lt=1)
    """Weight of the teacher in the mixture of ``divergence: jsd``."""
    refresh: int = Field(1, ge=1, le=MOST)
    """Parts of training, equally long, under ``source: student``: the first learns from the stored trajectories, each other one
    from what the student, as it is then, does on its share of the tasks. 1: from the stored trajectories only."""


class WarmupSettings(Section):
    """A start for a small model (``evolve warmup``): supervised fine-tuning on scripted episodes, until it speaks the format
    and reads advice. What it makes is the folder at ``models.policy.path``, the base of every comparison."""

    base: str = Field(json_schema_extra=PATH)
    """Folder of the model to start from."""
    world: int = Field(ge=0, le=MOST)
    """World of its games, which no split may have; success is measured on the games of the world after it."""
    seed: int = Field(0, ge=0, le=LARGEST_SEED)
    """Decides the script and the order of training; the experiment's own seed does not, so all of them share the model."""
    episodes: int = Field(96, ge=1, le=MOST)
    """Scripted episodes that it learns from."""
    development: int = Field(48, ge=1, le=MOST)
    """Episodes on which success is measured after every round."""
    rounds: int = Field(4, ge=1, le=99)
    """Most passes over the episodes."""
    target: float = Field(0.3, ge=0, le=1)
    """It ends after the first round whose mean reward without advice is at least that: the base must have headroom."""
    skill: float = Field(0.3, ge=0, le=1)
    """How often the script does what is best where it reads no good advice; otherwise it does anything that is listed."""
    advised: float = Field(0.4, ge=0, le=1)
    """Share of the steps with good advice in context, which the script follows."""
    idle: float = Field(0.2, ge=0, le=1)
    """Share of the steps with advice in context that has nothing to do with them."""
    rank: int = Field(16, ge=1, le=MOST)
    """Rank of the LoRA matrices that are merged into the weights in the end."""
    alpha: float = Field(32.0, gt=0)
    """Their scale: alpha / rank."""
    learning_rate: float = Field(1e-3, gt=0)
    """Peak rate of AdamW in each round."""
    tokens_per_batch: int = Field(1024, ge=64, le=MOST)
    """Tokens of one optimizer step."""


class EvaluationSettings(Section):
    """Held-out results (METHOD step 6)."""

    rollouts: int = Field(1, ge=1, le=MOST)
    """Sampled rollouts per held-out task and condition."""
    seed: int = Field(0, ge=0, le=LARGEST_SEED)
    """Common random numbers: experiments with the same value sample from the same draws."""
    with_experience: bool = True
    """Evaluate with experience in context as well."""
    greedy: bool = True
    """Evaluate argmax, without experience, as well."""
    base_temperatures: Annotated[tuple[Annotated[float, Field(ge=0)], ...], Strict(False)] = (0.0,)
    """Temperatures at which iteration 1 scores the base policy, beside that of the rollouts; 0 is argmax."""
    ceiling: bool = False
    """Score the policy that *enters* an iteration with E(k) in context as well: what that night's experience is worth before
    anything is learned, so what distillation can reach."""
    bootstrap: int = Field(2000, ge=100, le=MOST)
    """Resamples of an interval."""


class GateSettings(Section):
    """When a candidate is declined and when the best champion so far comes back (METHOD step 7); decided on development tasks,
    paired."""

    confidence: float = Field(0.95, gt=0.5, lt=1.0)
    """A loss of success counts when the interval of the paired difference to the best champion, or to the champion, lies below
    minus ``margin``; a drift over the nights when the chance that such evidence ever comes up by luck is at most
    1 - ``confidence``, until one is established and again after each."""
    margin: float = Field(0.0025, ge=0.0, lt=0.25)
    """Non-inferiority: loss of success against the best champion, or the champion, that is let pass; 0.01 is one point."""
    max_premature_rise: float = Field(0.10, ge=0.0, le=1.0)
    """Largest rise of the premature-answer rate, unless success is significantly better."""
    max_turn_ratio: float = Field(2.0, gt=1.0)
    """Largest ratio of mean turns, candidate over the best champion, unless success is significantly better."""


class TrackingSettings(Section):
    """What goes to MLflow; in no digest."""

    mlflow: bool = True
    """Whether iterations are sent to MLflow (``MLFLOW_TRACKING_URI``, else ``sqlite`` in the store), never in the run's way."""
    trajectories: int = Field(24, ge=0, le=MOST)
    """Trajectories sent as MLflow traces, per iteration and condition; 0 sends none."""


class ScheduleSettings(Section):
    """When the next iteration runs by itself (``evolve schedule on``); in no digest."""

    cron: str = "0 2 * * *"
    """Minute, hour, day of month, month, day of week."""
    timezone: str = "UTC"
    """Name in the IANA database, e.g. ``Europe/Berlin``."""
    webhook: str = Field("", pattern=r"^([A-Za-z_][A-Za-z0-9_]*)?$")
    """Environment variable that holds an address to which failures and restored champions are posted; empty: they are logged
    only."""


LAUNCHER = Chosen("launcher", "in_process", LauncherSettings)
Launcher = Annotated[SerializeAsAny[LauncherSettings], BeforeValidator(LAUNCHER)]
OF_LAUNCHERS = "runtime.launcher"
"""Where the section below stands."""


class Launchers(Section):
    """Where each heavy step is made: one launcher for all (``launcher: subprocess``), or by step (``launcher: {adapter:
    ray}``); one with settings is a mapping, ``{kind: ray, workers: 4}``. The others are made in the run's own process."""

    trajectories: Launcher = Field(default_factory=LAUNCHER.default_settings)
    contexts: Launcher = Field(default_factory=LAUNCHER.default_settings)
    adapter: Launcher = Field(default_factory=LAUNCHER.default_settings)
    scores: Launcher = Field(default_factory=LAUNCHER.default_settings)

    @model_validator(mode="before")
    @classmethod
    def _by_step(cls, value: Any) -> Any:
        if isinstance(value, str):
            value = {"kind": value}
        if not isinstance(value, dict):
            return value
        named = {step: _launcher(one) for step, one in value.items() if step in cls.model_fields}
        for_all = {key: inner for key, inner in value.items() if key not in cls.model_fields}
        if "kind" not in for_all:
            return for_all | named
        return dict.fromkeys(cls.model_fields, LAUNCHER(for_all)) | named


def for_all_steps(key: str) -> str:
    """``runtime.launcher.python`` of ``runtime.launcher.adapter.python``: what is said once for all heavy steps stands at each
    of them. Any other key as it is."""
    section, _, name = key.rpartition(".")
    holder, _, step = section.rpartition(".")
    return f"{holder}.{name}" if holder == OF_LAUNCHERS and step in Launchers.model_fields else key


def _launcher(value: Any) -> Any:
    return {"kind": value} if isinstance(value, str) else value


class RuntimeSettings(Section):
    """How fast, never what: in no digest."""

    threads: int = Field(2, ge=1, le=1024)
    """CPU threads of a model step."""
    concurrency: int = Field(128, ge=1, le=MOST)
    """Episodes in flight."""
    device: str = Field("cpu", pattern=r"^(cpu|mps|(cuda|xpu)(:[0-9]{1,3})?)$")
    """Where the model runs, as torch names it: `cpu`, `cuda:0`."""
    tokens_per_pass: int = Field(8192, ge=64, le=MOST)
    """Most distinct tokens of one forward and backward pass of training; an optimizer step adds up as many as it takes. One
    trajectory alone may have more. `evolve doctor` with the experiment file calculates the memory."""
    activation_checkpointing: bool = False
    """Training keeps what goes into each layer and computes the rest again on the way back: the same adapter from a fraction of
    the memory, for about a third more time."""
    processes: int = Field(1, ge=1, le=1024)
    """Processes that share the work of training on one machine (torchrun), each with `threads`. On `device: cuda` each has a
    GPU of its own."""
    shard: bool = False
    """Each of the `processes` keeps a part of the base model's weights while it trains (FSDP2), for a base that leaves no room
    on one GPU. The same adapter, for more time. Not with `models.policy.quantize`."""
    launcher: Launchers = Field(default_factory=Launchers)


ENVIRONMENT = Chosen("environment", "pocket", EnvironmentSettings)
VERIFICATION = Chosen("verifier", "exact", VerificationSettings)
EXTRACTION = Chosen("extractor", "contrast", ExtractionSettings)
SELECTION = Chosen("selector", "state", SelectionSettings)


class Experiment(Section):
    """One experiment file, resolved."""

    experiment: Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9_.-]{0,63}$")]
    """Name; the file's name without ending when absent. Partition key in Dagster."""
    description: str = ""
    """One line for lists and the UI."""
    seed: int = Field(0, ge=0, le=LARGEST_SEED)
    """Decides sampling, the order of training and the initial adapter."""
    iterations: int = Field(3, ge=1, le=99)
    """K: where the lineage stops for now; raise it to go on."""
    granularity: Granularity = "principle"
    """What an experience item keeps: a reusable strategy, or the detail of one trajectory."""
    injection: InjectionPattern = "step_wise"
    """How items stand in the teacher's context: chosen anew at each step, the whole pool before the task, or not at all."""
    regime: Regime = Regime()
    start_pool: str = Field("", json_schema_extra=PATH)
    """File of an experience pool to start from, ours or what `evolve import` reads; empty: an empty pool."""
    models: Models = Models()
    warmup: WarmupSettings | None = None
    """How the policy was made (``evolve warmup``); None: it is taken as it is."""
    environment: Annotated[SerializeAsAny[EnvironmentSettings], BeforeValidator(ENVIRONMENT)] = Field(
        default_factory=ENVIRONMENT.default_settings
    )
    tasks: Tasks = Tasks()
    verification: Annotated[SerializeAsAny[VerificationSettings], BeforeValidator(VERIFICATION)] = Field(
        default_factory=VERIFICATION.default_settings
    )
    rollout: RolloutSettings = RolloutSettings()
    extraction: Annotated[SerializeAsAny[ExtractionSettings], BeforeValidator(EXTRACTION)] = Field(
        default_factory=EXTRACTION.default_settings
    )
    selection: Annotated[SerializeAsAny[SelectionSettings], BeforeValidator(SELECTION)] = Field(
        default_factory=SELECTION.default_settings
    )
    teacher_check: TeacherCheckSettings = TeacherCheckSettings()
    distillation: DistillationSettings = DistillationSettings()
    evaluation: EvaluationSettings = EvaluationSettings()
    gate: GateSettings = GateSettings()
    tracking: TrackingSettings = TrackingSettings()
    schedule: ScheduleSettings = ScheduleSettings()
    runtime: RuntimeSettings = Field(default_factory=RuntimeSettings)

    @field_validator("regime", mode="before")
    @classmethod
    def _regime(cls, value: Any) -> Any:
        return Regime.model_validate(value) if isinstance(value, (str, dict)) else value

    def slice(self, *keys: str) -> dict[str, Any]:
        """The part of the config under the dotted ``keys``, as plain JSON values, without keys that say how fast or where.

        Example:
            ``experiment.slice("seed", "tasks.train")`` -> ``{"seed": 0, "tasks.train": {...}}``
        """
        out: dict[str, Any] = {}
        for key in keys:
            value: Any = self
            for name in key.split("."):
                value = getattr(value, name)
            out[key] = _decisive(value)
        return out


def _decisive(value: Any) -> Any:
    """A section as JSON values, without its runtime keys."""
    if not isinstance(value, BaseModel):
        return list(value) if isinstance(value, tuple) else value
    fields = type(value).model_fields
    names = [name for name, field in fields.items() if not marked(field, RUNTIME)]
    return {name: _decisive(getattr(value, name)) for name in names}


def _not_together(e: Experiment) -> Iterator[tuple[str, str]]:
    """What of ``runtime`` several processes cannot work with."""
    if e.runtime.processes == 1:
        if e.runtime.shard:
            yield "shard", "weights are spread over processes, and there is one: set runtime.processes, or shard to false"
        return
    if e.runtime.shard and e.models.policy.quantize != "none":
        what = f"models.policy.quantize is {e.models.policy.quantize}, and weights in 4 bit cannot be spread over processes"
        yield "shard", f"{what}: set it to false (every process keeps all of them), or models.policy.quantize to none"
    if e.distillation.refresh > 1:
        yield "processes", "several processes cannot sample anew while training: set it to 1, or distillation.refresh"
    if e.runtime.device not in ("cpu", "cuda"):
        what = f"{e.runtime.device} is one device, and runtime.processes is {e.runtime.processes}"
        yield "device", f"{what}: set it to cuda (each process takes a GPU of its own) or cpu"


def contradictions(e: Experiment) -> list[tuple[str, str]]:
    """Combinations that cannot work: ``(key, what is wrong)``; what only a part can know, its row says."""
    found: list[tuple[str, str]] = []
    unscored = part("divergence", e.regime.divergence).loss is None
    if e.injection == "none" and not unscored:
        found.append(
            (
                "injection",
                f"'none' makes teacher and student equal, so {e.regime.divergence} is zero everywhere: "
                "set regime.divergence to cross_entropy (the control without experience)",
            )
        )
    if e.distillation.refresh > 1 and e.regime.source != "student":
        found.append(("distillation.refresh", "only source: student samples anew while training: set it to 1"))
    if e.distillation.refresh > 1 and e.distillation.target_divergence:
        what = "a training that samples anew has no passes over the same rows: set it to 0, or distillation.refresh to 1"
        found.append(("distillation.target_divergence", what))
    if e.distillation.target_divergence and unscored:
        what = f"it is measured against the teacher's distribution, which {e.regime.divergence} has not: set it to 0"
        found.append(("distillation.target_divergence", what))
    if e.distillation.drills and unscored:
        what = f"drills are learned from the teacher's distribution, which {e.regime.divergence} has not: set it to 0"
        found.append(("distillation.drills", what))
    if e.rollout.frontier and not (e.rollout.more and e.rollout.group_size - e.rollout.more > 1):
        what = "outcomes can be mixed in two rollouts or more, and one has to be left to give: raise rollout.group_size"
        found.append(("rollout.frontier", f"{e.rollout.frontier:g} of {e.rollout.group_size} rollouts a task: {what}"))
    found.extend(_no_room_for_the_answer(e))
    found.extend((f"runtime.{key}", wrong) for key, wrong in _not_together(e))
    for wrong_here, wrong in (("cron", check_cron(e.schedule.cron)), ("timezone", check_timezone(e.schedule.timezone))):
        if wrong is not None:
            found.append((f"schedule.{wrong_here}", wrong))
    for name in ("development", "held_out"):
        if getattr(e.tasks, name).stream:
            what = "only training tasks are a stream: what is compared over iterations must stay the same"
            found.append((f"tasks.{name}.stream", what))
    own = part_of("environment", e.environment)
    if e.tasks.train.stream and own.tasks is not None and own.fresh is None:
        what = f"the environment {e.environment.kind} makes its tasks itself, and no other ones in the next iteration"
        found.append(("tasks.train.stream", f"{what}: set it to false, or give its row `fresh`"))
    for choice, place in CHOICES.items():
        if place.section is not None:
            settings = getattr(e, place.section)
            found.extend(mistakes(choice, settings, e))
    return found


def _no_room_for_the_answer(e: Experiment) -> list[tuple[str, str]]:
    """An episode that reaches ``max_tokens`` is asked for its last answer: the engine must take that too."""
    policy, rollout = e.models.policy, e.rollout
    # Of two calls the second is announced by max_steps, whatever the context.
    if not isinstance(policy, VllmModelSettings) or rollout.max_steps <= 2 or rollout.reach < policy.context_tokens:
        return []
    what = (
        f"{rollout.max_tokens} leaves no room for the last answer: up to there, one more action and the answer "
        f"({rollout.max_action_tokens} tokens each, max_action_tokens) and an observation between them may come, and "
        f"models.policy.context_tokens is {policy.context_tokens}: "
    )
    most = policy.context_tokens - 2 * rollout.max_action_tokens
    lower = f"set it well below {most}, or " if most > 64 else ""
    return [("rollout.max_tokens", f"{what}{lower}raise context_tokens")]
