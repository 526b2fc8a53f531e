"""Trajectories as MLflow traces: an episode is a tree of spans (model calls, tools, selections).

The ids of a trace and of its spans follow from the run, the artifact and the trajectory, so sending the same trajectory
again, by whomever and after whatever kill, changes the trace that is there and never makes a second one.
"""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from evolve_dag.plain import GLOBAL_HEADING
from evolve_dag.records import ExperienceItem, Step, Trajectory, solved
from evolve_dag.seeds import stable_hash
from evolve_dag.steps.scores import DEVELOPMENT
from evolve_dag.store.frames import trajectories_from_frames
from evolve_dag.store.layout import STEPS, TRAJECTORIES
from evolve_dag.tracking.mlflow_facts import IterationFacts, masker, milliseconds

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Span, TraceInfo

BATCH = 8
"""Trajectories whose spans go in one request."""
TEXT_CHARACTERS = 20_000
"""Longest text of one attribute; the artifact holds all of it."""
_INSTANT = 1_000
"""Nanoseconds of a span whose own time was not recorded."""


@dataclass(frozen=True, slots=True)
class Sample:
    """One trajectory to be sent."""

    condition: str
    """``train`` and ``teacher`` rollouts, or the condition of an evaluation: ``base``, ``without``, ``with``, ``greedy``."""
    trajectory: Trajectory
    digest: str
    """Of the artifact that holds it."""
    kind: str
    """Of the artifact that holds it."""
    ended: int
    """Milliseconds since 1970 when the artifact was finished; no episode ended later."""


def sample(trajectories: Sequence[Trajectory], count: int) -> list[Trajectory]:
    """``count`` trajectories, half of them successes where there are that many; the same ones at every call.

    Which ones follows from their ids and seeds alone, so they are no pick of the best. What one half lacks the other gives.
    """
    ranked = sorted(trajectories, key=lambda t: (stable_hash("trace", t.id, t.seed), t.id))
    good = [t for t in ranked if solved(t.reward)]
    other = [t for t in ranked if not solved(t.reward)]
    wanted = min(max((count + 1) // 2, count - len(other)), len(good))
    chosen = {t.id for t in (*good[:wanted], *other[: count - wanted])}
    return [t for t in trajectories if t.id in chosen]


def samples(facts: IterationFacts, count: int) -> list[Sample]:
    """What is sent of one iteration: ``count`` trajectories of every condition but the gate's."""
    found: list[Sample] = []
    for kind in ("trajectories", "contexts", "scores"):
        artifact = facts.artifacts.get(kind)
        if artifact is None or count < 1 or STEPS not in artifact.manifest.files:
            continue
        if kind == "contexts" and facts.artifacts["contexts"].manifest.config.get("regime.source") != "teacher":
            continue  # the student's trajectories again
        by_condition: dict[str, list[Trajectory]] = {}
        for trajectory in trajectories_from_frames(artifact.frame(TRAJECTORIES), artifact.frame(STEPS)):
            name = {"trajectories": "train", "contexts": "teacher"}.get(kind) or trajectory.id.partition("/")[0]
            by_condition.setdefault(name, []).append(trajectory)
        ended = milliseconds(artifact.manifest.created)
        for condition, trajectories in by_condition.items():
            if condition not in DEVELOPMENT:
                found += [Sample(condition, t, artifact.digest, kind, ended) for t in sample(trajectories, count)]
    return found


def send(
    client: MlflowClient,
    experiment_id: str,
    run_id: str,
    facts: IterationFacts,
    chosen: Sequence[Sample],
    *,
    advance: Callable[[int], None],
) -> int:
    """Send what the run has not got yet; returns how many.

    Raises:
        Exception: whatever MLflow raises; what was sent before stays and is not sent twice.
    """
    from mlflow.tracing.client import TracingClient

    there = dict(_present(client, experiment_id, run_id))
    tracing = TracingClient(client.tracking_uri)
    items = {item.id: item for item in facts.row.items}
    text = _shortener()
    sent = 0
    for start in range(0, len(chosen), BATCH):
        spans: list[Span] = []
        part = chosen[start : start + BATCH]
        for one in part:
            trace_id = _trace_id(run_id, one)
            if there.get(trace_id):
                continue
            if trace_id not in there:
                tracing.start_trace(trace_info(one, facts, trace_id, experiment_id, run_id, text))
            spans += build_spans(one, facts, trace_id, items, text)
            sent += 1
        if spans:
            tracing.log_spans(experiment_id, spans)
        advance(len(part))
    return sent


def _present(client: MlflowClient, experiment_id: str, run_id: str) -> Iterator[tuple[str, bool]]:
    """Ids of the run's traces, and whether their spans are there (a kill falls between the two)."""
    token = None
    while True:
        page = client.search_traces(
            locations=[experiment_id],
            filter_string=f"metadata.`mlflow.sourceRun` = '{run_id}'",
            include_spans=False,
            max_results=200,
            page_token=token,
        )
        for trace in page:
            yield trace.info.trace_id, "mlflow.trace.spansLocation" in trace.info.tags
        token = page.token
        if not token:
            return


def _trace_id(run_id: str, one: Sample) -> str:
    name = f"{run_id}/{one.digest}/{one.trajectory.id}"
    return "tr-" + hashlib.sha256(name.encode()).hexdigest()[:32]


def trace_info(
    one: Sample, facts: IterationFacts, trace_id: str, experiment_id: str, run_id: str, text: Callable[[str], str]
) -> TraceInfo:
    """The trace's own facts, by which it is found in a list: question, answer, reward, place in the lineage."""
    from mlflow.entities import AssessmentSource, Feedback, TraceInfo, TraceLocation, TraceState
    from mlflow.entities.assessment_source import AssessmentSourceType

    t = one.trajectory
    begun, ended = _times(one)
    usage = {"input_tokens": sum(s.prompt_tokens for s in t.steps), "output_tokens": sum(len(s.token_ids) for s in t.steps)}
    usage["total_tokens"] = sum(usage.values())
    source = AssessmentSource(source_type=AssessmentSourceType.CODE, source_id="evolve-dag verifier")
    verdict = [] if t.reward is None else [Feedback(name="reward", value=t.reward, source=source, trace_id=trace_id)]
    return TraceInfo(
        trace_id=trace_id,
        trace_location=TraceLocation.from_experiment_id(experiment_id),
        request_time=begun // 1_000_000,
        execution_duration=(ended - begun) // 1_000_000,
        state=TraceState.ERROR if t.status == "failed" else TraceState.OK,
        request_preview=text(t.question)[:1000],
        response_preview=text(t.answer or t.error or t.status)[:1000],
        trace_metadata={
            "mlflow.sourceRun": run_id,
            "mlflow.trace_schema.version": "3",
            "mlflow.trace.tokenUsage": json.dumps(usage),
        },
        tags={
            "mlflow.traceName": f"{one.condition} episode",
            "evolve.experiment": facts.experiment,
            "evolve.iteration": str(facts.iteration),
            "evolve.condition": one.condition,
            "evolve.trajectory": t.id,
            "evolve.task": t.task_id,
            "evolve.digest": one.digest,
            "evolve.status": t.status,
            "evolve.reward": "null" if t.reward is None else f"{t.reward:g}",
        },
        assessments=list(verdict),
    )


def build_spans(
    one: Sample, facts: IterationFacts, trace_id: str, items: Mapping[str, ExperienceItem], text: Callable[[str], str]
) -> list[Span]:
    """The episode (AGENT) and, for each step, what was selected (RETRIEVER), the model call (LLM) and the tool (TOOL).

    A step's seconds cover selection, model and tool together; the model call is drawn over all of them and the other two
    as instants at its ends. All episodes are drawn as if they had ended with their artifact.
    """
    t = one.trajectory
    begun, ended = _times(one)
    new = _SpanFactory(trace_id, text)
    root = new(
        f"{one.condition} episode",
        "AGENT",
        None,
        begun,
        ended,
        inputs={"question": new.text(t.question)},
        outputs={"answer": t.answer if t.answer is None else new.text(t.answer)},
        error=t.error if t.status == "failed" else None,
        **{
            "evolve.trajectory": t.id,
            "evolve.artifact": f"{one.kind}/{one.digest}",
            "evolve.condition": one.condition,
            "evolve.partition": facts.partition,
            "evolve.reward": t.reward,
            "evolve.status": t.status,
            "evolve.error": new.text(t.error or ""),
            "evolve.rollout": t.rollout,
            "evolve.seed": str(t.seed),
            "evolve.turns": t.turns,
            "evolve.selected": sorted({item for step in t.steps for item in step.selected}),
            "evolve.times": "reconstructed from the seconds of the steps",
        },
    )
    found = [root]
    at = begun
    for step in t.steps:
        until = at + max(10 * _INSTANT, round(step.seconds * 1e9))
        found += _step_spans(new, root.span_id, t, step, at, until, items)
        at = until
    return found


def _step_spans(
    new: _SpanFactory,
    parent: str,
    t: Trajectory,
    step: Step,
    at: int,
    until: int,
    items: Mapping[str, ExperienceItem],
) -> list[Span]:
    spans = []
    messages = _messages(new, t, step)
    state = messages[-1]["content"]
    _inject(new, messages, step)
    experience: dict[str, Any] = {"evolve.selected": list(step.selected), "evolve.rationale": new.text(step.rationale)}
    if step.selected or step.rationale:
        documents = [
            {"page_content": new.text(items[name].text) if name in items else "", "metadata": {"doc_uri": name, "id": name}}
            for name in step.selected
        ]
        spans.append(
            new(
                "selection",
                "RETRIEVER",
                parent,
                at,
                at + _INSTANT,
                inputs={"state": state},
                outputs=documents,
                **experience,
            )
        )
    tokens = {"input_tokens": step.prompt_tokens, "output_tokens": len(step.token_ids)}
    tokens["total_tokens"] = sum(tokens.values())
    spans.append(
        new(
            f"step {step.index + 1}",
            "LLM",
            parent,
            at + _INSTANT,
            until - 2 * _INSTANT,
            inputs={"messages": messages},
            outputs={"choices": [{"message": {"role": "assistant", "content": new.text(step.text)}}]},
            **{
                "mlflow.chat.tokenUsage": tokens,
                "evolve.step": step.index,
                "evolve.problem": new.text(step.problem or ""),
                "evolve.seconds": step.seconds,
                "evolve.injected": new.text(step.injected),
                "evolve.logprob_mean": sum(step.logprobs) / len(step.logprobs) if step.logprobs else None,
                **(experience if step.selected else {}),
            },
        )
    )
    if step.call is not None and step.problem is None:
        spans.append(
            new(
                step.call.name,
                "TOOL",
                parent,
                until - 2 * _INSTANT,
                until - _INSTANT,
                inputs={name: new.text(value) for name, value in step.call.texts.items()},
                outputs={"observation": None if step.observation is None else new.text(step.observation)},
            )
        )
    return spans


def _messages(new: _SpanFactory, t: Trajectory, step: Step) -> list[dict[str, str]]:
    """What the call saw that the call before it had not seen."""
    if step.index == 0:
        return [{"role": "system", "content": new.text(t.system)}, {"role": "user", "content": new.text(t.question)}]
    return [{"role": "user", "content": new.text(t.steps[step.index - 1].observation or "")}]


def _inject(new: _SpanFactory, messages: list[dict[str, str]], step: Step) -> None:
    """Put the experience where it stood: global injection before the task, step-wise behind the last message."""
    if step.injected.strip().startswith(GLOBAL_HEADING):
        if step.index == 0:
            messages[0]["content"] += new.text(step.injected)
    elif step.injected:
        messages[-1]["content"] += new.text(step.injected)


def _times(one: Sample) -> tuple[int, int]:
    """Start and end in nanoseconds since 1970."""
    steps = sum(max(10 * _INSTANT, round(s.seconds * 1e9)) for s in one.trajectory.steps)
    ended = one.ended * 1_000_000
    return ended - max(steps, round(one.trajectory.seconds * 1e9), 1_000_000), ended


class _SpanFactory:
    """Finished spans of one trace, with ids that follow from the trace and the order."""

    def __init__(self, trace_id: str, text: Callable[[str], str]) -> None:
        self.trace_id = trace_id
        self.text = text
        self.made = 0

    def __call__(
        self,
        name: str,
        kind: str,
        parent: str | None,
        begun: int,
        ended: int,
        *,
        inputs: Any,
        outputs: Any,
        error: str | None = None,
        **attributes: Any,
    ) -> Span:
        from mlflow.entities import Span

        span_id = hashlib.sha256(f"{self.trace_id}/{self.made}".encode()).digest()[:8]
        self.made += 1
        values = {
            "mlflow.traceRequestId": self.trace_id,
            "mlflow.spanType": kind,
            "mlflow.spanInputs": inputs,
            "mlflow.spanOutputs": outputs,
            **{key: value for key, value in attributes.items() if value not in (None, "", [])},
        }
        return Span.from_dict(
            {
                "trace_id": _base64(bytes.fromhex(self.trace_id.removeprefix("tr-"))),
                "span_id": _base64(span_id),
                "parent_span_id": _base64(bytes.fromhex(parent)) if parent else "",
                "name": name,
                "start_time_unix_nano": begun,
                "end_time_unix_nano": max(ended, begun + 1),
                "status": {
                    "code": "STATUS_CODE_ERROR" if error is not None else "STATUS_CODE_OK",
                    "message": self.text(error or ""),
                },
                "attributes": {key: json.dumps(value, ensure_ascii=False) for key, value in values.items()},
                "events": [],
            }
        )


def _base64(value: bytes) -> str:
    return base64.b64encode(value).decode("ascii")


def _shortener() -> Callable[[str], str]:
    """What every text goes through: secrets masked, long texts cut, broken Unicode mended."""
    mask = masker()

    def shorten(text: str) -> str:
        text = mask(text.encode("utf-8", "replace").decode("utf-8"))
        if len(text) <= TEXT_CHARACTERS:
            return text
        return f"{text[:TEXT_CHARACTERS]}… ({len(text) - TEXT_CHARACTERS} more characters in the artifact)"

    return shorten
