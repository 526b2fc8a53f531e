"""Every key of an experiment file; unknown keys are refused.

An experiment is one named config: a lineage of iterations. Each step of the loop reads a *slice* of it
(:meth:`Experiment.slice`); the slice is part of the digest of what the step makes, so a change of the
selector recomputes the contexts and what follows, not the rollouts. ``runtime`` is in no slice: it says
how fast, never what.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    ConfigDict,
    Discriminator,
    Field,
    Strict,
    Tag,
    field_validator,
    model_validator,
)

from evolve_dag.config.scheduling import check_cron, check_timezone
from evolve_dag.records import LARGEST_SEED, Divergence, Granularity, InjectionPattern, Source

MOST = 10_000_000
"""Bound of every number that counts something: a slip of the hand, not a need, lies above it."""


class Section(BaseModel):
    """A part of an experiment file; unknown keys and silent type conversions are refused."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, use_attribute_docstrings=True)


REGIME_PRESETS: Mapping[str, Mapping[str, Any]] = {
    "off_policy": {"source": "teacher", "divergence": "forward_kl", "rejection": True},
    "on_policy": {"source": "student", "divergence": "reverse_kl", "rejection": False},
}


class Regime(Section):
    """Internalization regime: choices that the paper confounds, kept apart (METHOD: regime)."""

    source: Source = "teacher"
    """Who samples the trajectories that are learned from: the experience-aware teacher or the student."""
    divergence: Divergence = "forward_kl"
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


Strings = Annotated[tuple[str, ...], Strict(False)]
"""YAML knows lists only."""
RUNTIME: dict[str, Any] = {"runtime": True}
"""Marks a key that says how fast or where, never what: it is in no slice, so in no digest."""


class TransformersModelSettings(Section):
    """A model in this process."""

    backend: Literal["transformers"] = "transformers"
    """In this process, through transformers."""
    path: str = "pocket"
    """``pocket`` (the policy that ships with the package) or a folder that ``from_pretrained`` reads."""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Number format of the weights."""


class VllmModelSettings(Section):
    """A model that vLLM samples from; its weights are opened here too, to teach and to learn."""

    backend: Literal["vllm"]
    """Through vLLM: an engine in a process of its own, or servers that run already."""
    path: str
    """Folder that ``from_pretrained`` reads; ``pocket`` is the policy that ships with the package."""
    dtype: Literal["float32", "bfloat16", "float16"] = "bfloat16"
    """Number format of the weights."""
    servers: Strings = Field((), json_schema_extra=RUNTIME)
    """Addresses of running vLLM servers, e.g. ``http://127.0.0.1:8000/v1``; calls are spread over them. None: an engine of our
    own. They need ``--enable-lora``, ``VLLM_ALLOW_RUNTIME_LORA_UPDATING=True`` and the adapters' folder in sight."""
    model: str = Field("", json_schema_extra=RUNTIME)
    """Name under which the servers serve the base model; empty: the first that they list."""
    key: str = Field("VLLM_API_KEY", json_schema_extra=RUNTIME)
    """Environment variable that holds the servers' key; it may be unset."""
    python: str = Field("", json_schema_extra=RUNTIME)
    """Interpreter of a virtual environment that holds vLLM, for the engine; empty: this one."""
    context_tokens: int = Field(32_768, ge=256, le=MOST, json_schema_extra=RUNTIME)
    """Longest context of the engine (``max_model_len``)."""
    gpu_memory: float = Field(0.85, gt=0, le=1, json_schema_extra=RUNTIME)
    """Share of the GPU's memory that the engine takes."""
    tensor_parallel: int = Field(1, ge=1, le=MOST, json_schema_extra=RUNTIME)
    """GPUs that share one engine."""
    timeout_seconds: float = Field(600.0, gt=0, json_schema_extra=RUNTIME)
    """Longest wait for one answer."""


class OpenAIModelSettings(Section):
    """A model behind an OpenAI-compatible endpoint. The key comes from the environment, never from this file."""

    backend: Literal["openai"]
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
    extra: dict[str, Any] = {}
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


PolicySettings = TransformersModelSettings | VllmModelSettings
"""Models whose weights we hold: a policy must be one."""
ModelSettings = TransformersModelSettings | VllmModelSettings | OpenAIModelSettings
HelperRole = Literal["extractor", "selector", "judge", "embedding"]


def _branch(value: Any) -> str | None:
    if isinstance(value, str):
        return value
    return value.get("backend") if isinstance(value, dict) else getattr(value, "backend", None)


HelperSettings = Annotated[
    Annotated[Literal["policy"], Tag("policy")]
    | Annotated[TransformersModelSettings, Tag("transformers")]
    | Annotated[VllmModelSettings, Tag("vllm")]
    | Annotated[OpenAIModelSettings, Tag("openai")],
    Discriminator(_branch),
]


class Models(Section):
    """Language models by role. ``policy`` in place of a model means: the policy itself (self-generated experience)."""

    policy: Annotated[PolicySettings, Field(discriminator="backend")] = TransformersModelSettings()
    """The model that acts, teaches and learns."""
    extractor: HelperSettings = "policy"
    """Who writes experience (``extraction.extractor: llm``) and sums up web pages: the policy itself, or a model of its own."""
    selector: HelperSettings = "policy"
    """Who chooses items (``selection.selector: llm``)."""
    judge: Annotated[ModelSettings, Field(discriminator="backend")] | None = None
    """Who judges answers (``verification.kind: judge``); never the policy."""
    embedding: Annotated[
        Annotated[Literal["policy"], Tag("policy")] | Annotated[TransformersModelSettings, Tag("transformers")],
        Discriminator(_branch),
    ] = "policy"
    """Whose hidden states compare items and states (``selection.selector: embedding``); ``policy``: the base model's."""

    @field_validator("policy", "extractor", "selector", "judge", "embedding", mode="before")
    @classmethod
    def _default_backend(cls, value: Any) -> Any:
        return {"backend": "transformers", **value} if isinstance(value, dict) else value

    def settings(self, role: HelperRole) -> ModelSettings | None:
        """The model of a role; the policy's where the file says ``policy``."""
        value: ModelSettings | str | None = getattr(self, role)
        return self.policy if isinstance(value, str) else value


class PocketEnvironment(Section):
    """A generated closed corpus about invented entities."""

    kind: Literal["pocket"] = "pocket"
    """A generated world."""
    results: int = Field(3, ge=1, le=10)
    """Pages that one search lists."""


class CorpusEnvironment(Section):
    """Search and visit over your own pages."""

    kind: Literal["corpus"]
    """Your own pages."""
    pages: str
    """JSONL file, one page a line: ``{"title": ..., "text": ...}``; relative to the file that names it."""
    results: int = Field(3, ge=1, le=20)
    """Pages that one search lists."""
    snippet_characters: int = Field(160, ge=20, le=2000)
    """Length of the excerpt in a listing."""
    title_weight: float = Field(3.0, ge=0)
    """Weight of a word in a title, against ``text_weight`` for one in the text (BM25 fields)."""
    text_weight: float = Field(1.0, ge=0)
    """0 searches titles only."""
    minimum_match: float = Field(0.0, ge=0, le=1)
    """Least share of a query's words that a page must hold; 0 lists any page with one of them."""
    system: str = ""
    """The whole system message, in place of ours, which describes every tool as JSON schema; empty: ours."""


ToolName = Literal["search", "visit", "scholar", "python", "file"]


class ToolsEnvironment(Section):
    """The live web and a sandbox: the paper's five tools, or some of them."""

    kind: Literal["tools"]
    """The live web, a python sandbox, files."""
    system: str = ""
    """The whole system message, in place of ours, which describes every tool as JSON schema; empty: ours."""
    tools: Annotated[tuple[ToolName, ...], Strict(False)] = Field(
        ("search", "visit", "scholar", "python", "file"), min_length=1
    )
    """Which tools the policy has."""
    search: Literal["serper", "searxng"] = "serper"
    """Who answers ``search``: Serper (key in ``SERPER_API_KEY``) or a SearXNG instance."""
    searxng: str = ""
    """Address of the SearXNG instance."""
    reader: Literal["local", "jina"] = "local"
    """Who turns a page into text for ``visit``: this process, or Jina's reader (key in ``JINA_API_KEY``, optional)."""
    results: int = Field(10, ge=1, le=20)
    """Entries that one search lists."""
    summarize: bool = True
    """Whether the extractor model sums a visited page up for the stated goal; else its beginning is shown."""
    page_characters: int = Field(12_000, ge=200, le=200_000)
    """Most characters of a page that the policy or the extractor reads."""
    page_bytes: int = Field(5_000_000, ge=10_000, le=MOST)
    """Larger bodies are refused."""
    blocked: Strings = ("huggingface.co", "hf-mirror.com", "hf.co")
    """Hosts, with all below them, that no tool may ask: mirrors of the benchmarks. A page elsewhere that holds the same is not
    known to it: name translators and archives here too (``translate.goog``, ``web.archive.org``) where that matters."""
    files: str = ""
    """Folder that the ``file`` tool may read; relative to the file that names it."""
    cache: Literal["day", "none"] = "day"
    """``day``: an address fetched today is not fetched again today."""
    timeout_seconds: float = Field(30.0, gt=0)
    """Longest wait for a page or a search."""
    python_seconds: float = Field(10.0, gt=0, le=600)
    """Processor and wall time of one ``python`` call."""
    python_megabytes: int = Field(512, ge=64, le=MOST)
    """Memory of one ``python`` call."""


class VerificationSettings(Section):
    """How a final answer is judged (METHOD step 2)."""

    kind: Literal["exact", "contains", "mathematics", "judge"] = "exact"
    """``exact``: normalized text. ``contains``: the reference stands in a short answer as whole words.
    ``mathematics``: equal as mathematics (math-verify). ``judge``: a model's verdict."""
    verdict: Literal["word", "json"] = "word"
    """What the judge is asked for: one word (WebWalkerQA, GAIA) or JSON (BrowseComp-ZH)."""


SuiteName = Literal["jsonl", "webwalkerqa", "gaia_text_103", "browsecomp_zh", "aime", "dapo"]


STREAM_WORLDS = 10_000
"""Distance between the pocket worlds of neighbouring iterations of a stream. Worlds of the other splits lie below it."""
MOST_STREAM_ITERATIONS = 90
"""Iterations whose worlds lie below those of measuring and pretraining (environments/pocket)."""


class TaskSplit(Section):
    """Tasks of one use: training, development (the gate) or held-out (reported, decides nothing)."""

    count: int | None = Field(None, ge=1, le=MOST)
    """How many tasks; None takes all of the file."""
    world: int | None = Field(None, ge=0, le=MOST)
    """Pocket world that the tasks are about; every split needs its own."""
    path: str | None = None
    """File of tasks; JSONL with ``{"id"?, "question", "answer"}`` a line, or what ``suite`` says."""
    suite: SuiteName = "jsonl"
    """Format of the file: docs/benchmarks.md says where each comes from and what its licence is."""
    fields: dict[str, str] = {}
    """Our name -> the file's name, for ``id``, ``question``, ``answer`` and facts to break results down by."""
    skip: int = Field(0, ge=0, le=MOST)
    """Tasks to leave out before ``count`` are drawn (the order of the draw is fixed), so that splits can share one file."""
    stream: bool = False
    """``train`` only: every iteration takes tasks of its own. In the pocket world it asks about a new world; of a file it takes
    the next ``count`` rows, in their order; of a folder (``path``) the next file, by name. Appending changes no earlier
    iteration. False: the same tasks in every iteration."""


class Tasks(Section):
    train: TaskSplit = TaskSplit(count=96, world=11)
    """Rolled out in every iteration; experience and distillation come from these."""
    development: TaskSplit = TaskSplit(count=128, world=21)
    """The gate decides on these."""
    held_out: TaskSplit = TaskSplit(count=256, world=31)
    """Reported; decides nothing."""


class RolloutSettings(Section):
    """The ReAct loop and its limits (METHOD step 1)."""

    group_size: int = Field(4, ge=1, le=MOST)
    """G: trajectories per training task."""
    temperature: float = Field(1.0, ge=0.0)
    """Of the policy's actions; 0 is argmax."""
    top_p: float = Field(1.0, gt=0.0, le=1.0)
    """Nucleus: least share of probability that is sampled from."""
    max_steps: int = Field(12, ge=1, le=MOST)
    """Model calls per episode; the last one is told to answer."""
    max_tokens: int = Field(2048, ge=64, le=MOST)
    """Context limit per episode in tokens; past it the next call is told to answer."""
    max_action_tokens: int = Field(48, ge=4, le=MOST)
    """Tokens of one action."""
    max_seconds: float = Field(600.0, gt=0, le=1e7)
    """Wall time of one episode; past it the next call is told to answer."""
    plain_answers: bool = False
    """Whether a turn without a tool call is the final answer, as chat models are wont to give it; else it is malformed."""


class ExtractionSettings(Section):
    """Scored trajectories -> experience pool E(k) (METHOD step 3)."""

    extractor: Literal["contrast", "llm"] = "contrast"
    """``contrast``: mines state -> action patterns that separate success from failure; needs no LLM. ``llm``: the paper's
    chain of summary, critique, decision and reconciliation."""
    cap: int = Field(12, ge=1, le=MOST)
    """Most items in the pool."""
    min_support: int = Field(10, ge=1, le=MOST)
    """Trajectories that must show a pattern."""
    min_lift: float = Field(0.05, ge=0.0)
    """Least gain in group-centred success of the action over the others in the same state."""
    confidence: float = Field(0.95, gt=0.5, lt=1.0)
    """Level at which the lower end of the lift's interval must be above zero."""
    memory: float = Field(0.8, ge=0, le=1)
    """``contrast``: what evidence of the iteration before still counts, of two before its square, and so on; 0: none."""
    placebo: bool = False
    """``contrast``, a control: every mined principle stands in the pool with another action than the one that was mined."""
    graduation: float = Field(0.0, ge=0, lt=1)
    """``contrast``: an item leaves the context once the policy, without experience, clearly does what it says in this share of
    the steps in its situation, and comes back when it clearly does so less often. 0: items stay."""
    domain: Literal["web", "mathematics"] = "web"
    """Wording of the prompts of ``llm``."""
    batch_tasks: int = Field(4, ge=1, le=MOST)
    """``llm``: tasks whose decisions are reconciled together."""
    candidates: int = Field(3, ge=1, le=10)
    """``llm``: most candidate items per group of mixed outcomes."""
    temperature: float = Field(0.3, ge=0)
    """``llm``: of the extractor's calls."""
    max_tokens: int = Field(2048, ge=32, le=MOST)
    """``llm``: most tokens of one of its answers."""
    max_words: int = Field(32, ge=4, le=32)
    """``llm``: longest principle."""
    max_characters: int = Field(24_000, ge=500, le=MOST)
    """``llm``: most characters of trajectories in one call; head and tail of what is longer."""


class SelectionSettings(Section):
    """Which items fit the current state (METHOD: step_wise)."""

    selector: Literal["state", "lexical", "embedding", "llm"] = "state"
    """``state``: the item's condition holds. ``lexical``: word overlap of item and state, BM25. ``embedding``: nearest hidden
    states. ``llm``: ``models.selector`` chooses; an invalid or empty choice falls back to ``lexical`` and is counted."""
    min_items: int = Field(3, ge=0, le=50)
    """``llm``: fewest items it is asked for (fewer where the pool or ``max_items`` is smaller)."""
    max_items: int = Field(3, ge=1, le=50)
    """Most items per step."""
    temperature: float = Field(0.3, ge=0)
    """``llm``: of the selector's calls."""
    top_p: float = Field(0.9, gt=0, le=1)
    """``llm``: nucleus of the selector's calls."""
    max_tokens: int = Field(512, ge=32, le=MOST)
    """``llm``: most tokens of one choice."""
    max_characters: int = Field(8_000, ge=500, le=MOST)
    """``llm``: most characters of question and steps in one call; head and tail of what is longer."""


class DistillationSettings(Section):
    """Teacher -> student, by LoRA (METHOD step 5)."""

    rank: int = Field(16, ge=1, le=MOST)
    """Rank of the LoRA matrices on all linear layers."""
    alpha: float = Field(32.0, gt=0)
    """Scale of the LoRA update: alpha / rank."""
    learning_rate: float = Field(7e-4, gt=0)
    """Peak rate of AdamW in iteration 1."""
    learning_rate_decay: float = Field(0.6, gt=0, le=1.0)
    """Factor per iteration: Adam near zero divergence still takes almost full steps."""
    epochs: int = Field(2, ge=1, le=MOST)
    """Passes over the kept trajectories."""
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
    """Times that ``source: student`` samples anew while training; 1 uses the stored trajectories only."""


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
    """When a candidate is declined (METHOD step 7); decided on development tasks, paired."""

    confidence: float = Field(0.95, gt=0.5, lt=1.0)
    """A loss of success counts when the interval of the paired difference lies below zero."""
    max_premature_rise: float = Field(0.10, ge=0.0, le=1.0)
    """Largest rise of the premature-answer rate."""
    max_turn_ratio: float = Field(2.0, gt=1.0)
    """Largest ratio of mean turns, candidate over champion."""


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
    """Environment variable that holds an address to which failures are posted; empty: failures are logged only."""


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
    start_pool: str = ""
    """File of an experience pool to start from, ours or what `evolve import` reads; empty: an empty pool."""
    models: Models = Models()
    environment: Annotated[PocketEnvironment | CorpusEnvironment | ToolsEnvironment, Field(discriminator="kind")] = (
        PocketEnvironment()
    )
    tasks: Tasks = Tasks()
    verification: VerificationSettings = VerificationSettings()
    rollout: RolloutSettings = RolloutSettings()
    extraction: ExtractionSettings = ExtractionSettings()
    selection: SelectionSettings = SelectionSettings()
    distillation: DistillationSettings = DistillationSettings()
    evaluation: EvaluationSettings = EvaluationSettings()
    gate: GateSettings = GateSettings()
    tracking: TrackingSettings = TrackingSettings()
    schedule: ScheduleSettings = ScheduleSettings()
    runtime: RuntimeSettings = RuntimeSettings()

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
            for part in key.split("."):
                value = getattr(value, part)
            out[key] = _decisive(value)
        return out


def _decisive(value: Any) -> Any:
    """A section as JSON values, without its runtime keys."""
    if not isinstance(value, BaseModel):
        return list(value) if isinstance(value, tuple) else value
    fields = type(value).model_fields
    names = [name for name, field in fields.items() if field.json_schema_extra != RUNTIME]
    return {name: _decisive(getattr(value, name)) for name in names}


def _stream_mistakes(e: Experiment, name: str, split: TaskSplit) -> list[tuple[str, str]]:
    if not split.stream:
        return []
    found = []
    if name != "train":
        found.append(("stream", "only training tasks are a stream: what is compared over iterations must stay the same"))
    if e.environment.kind != "pocket" and split.count is None and split.path is not None and not Path(split.path).is_dir():
        found.append(("count", "missing: how many rows of the file an iteration takes"))
    worlds = [s.world for s in (e.tasks.train, e.tasks.development, e.tasks.held_out) if s.world is not None]
    if e.environment.kind == "pocket" and max(worlds, default=0) >= STREAM_WORLDS:
        found.append(("world", f"a stream goes on in steps of {STREAM_WORLDS}: number the worlds of all splits below that"))
    if e.environment.kind == "pocket" and e.iterations >= MOST_STREAM_ITERATIONS:
        found.append(("stream", f"the pocket world has fresh worlds for {MOST_STREAM_ITERATIONS - 1} iterations"))
    return found


def contradictions(e: Experiment) -> list[tuple[str, str]]:
    """Combinations that cannot work: ``(key, what is wrong)``."""
    found: list[tuple[str, str]] = []
    if e.injection == "none" and e.regime.divergence != "cross_entropy":
        found.append(
            (
                "injection",
                f"'none' makes teacher and student equal, so {e.regime.divergence} is zero everywhere: "
                "set regime.divergence to cross_entropy (the control without experience)",
            )
        )
    if e.distillation.refresh > 1 and e.regime.source != "student":
        found.append(("distillation.refresh", "only source: student samples anew while training: set it to 1"))
    if e.verification.kind == "judge" and e.models.judge is None:
        found.append(("models.judge", "missing: verification.kind is judge, so name the model that judges"))
    if e.environment.kind == "tools":
        if e.environment.search == "searxng" and not e.environment.searxng:
            found.append(("environment.searxng", "missing: the address of the SearXNG instance"))
        if "file" in e.environment.tools and not e.environment.files:
            found.append(("environment.files", "missing: the folder that the file tool may read; or leave `file` out of tools"))
    if e.extraction.extractor == "llm" and e.granularity == "principle" and e.selection.selector == "state":
        found.append(
            (
                "selection.selector",
                "'state' needs conditions, which only `extractor: contrast` writes: use lexical or llm",
            )
        )
    if e.extraction.placebo and (e.extraction.extractor != "contrast" or e.granularity != "principle" or e.start_pool):
        found.append(
            ("extraction.placebo", "only mined principles have one: `extractor: contrast`, no instances, no start_pool")
        )
    if e.extraction.extractor == "contrast" and e.extraction.domain != "web":
        found.append(("extraction.domain", "only `extractor: llm` has a wording for mathematics"))
    for part, wrong in (("cron", check_cron(e.schedule.cron)), ("timezone", check_timezone(e.schedule.timezone))):
        if wrong is not None:
            found.append((f"schedule.{part}", wrong))
    splits = {name: getattr(e.tasks, name) for name in ("train", "development", "held_out")}
    for name, split in splits.items():
        key = f"tasks.{name}"
        if e.environment.kind == "pocket":
            if split.path is not None:
                found.append(
                    (f"{key}.path", "the pocket world makes its own tasks: remove it, or set environment.kind to corpus")
                )
            if split.suite != "jsonl" or split.fields or split.skip:
                found.append((key, "suite, fields and skip are for files; the pocket world makes its own tasks"))
            if split.world is None:
                found.append((f"{key}.world", "missing: the number of the pocket world"))
            if split.count is None:
                found.append((f"{key}.count", "missing: how many tasks"))
        elif split.path is None:
            found.append((f"{key}.path", "missing: a file of tasks"))
        found.extend((f"{key}.{last}", what) for last, what in _stream_mistakes(e, name, split))
    pairs = [("train", "development"), ("train", "held_out"), ("development", "held_out")]
    for a, b in pairs:
        if e.environment.kind == "pocket" and splits[a].world is not None and splits[a].world == splits[b].world:
            found.append((f"tasks.{b}.world", f"the same world as tasks.{a}: splits must not share a world"))
    return found
