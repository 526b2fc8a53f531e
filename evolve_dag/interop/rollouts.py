"""``evolve import``: what others already have: experience pools (:mod:`evolve_dag.interop.pools`) and rollout files.

A rollout file has one rollout a line. The extraction of the paper's released code (arXiv:2606.04703) and youtu-agent
(arXiv:2510.08191) write ``rollout.jsonl``: ``problem``, ``groundtruth``, ``trajectories`` with chat messages and
``tool_calls``, ``response``, ``reward``. The paper's evaluation writes ``iter1.jsonl``: ``question``, ``answer``, ``messages``
with tags in the text, ``prediction``, ``termination``, ``exp_selections``.

Their prompts often hold experience. It is taken out of the question, which is part of the clean history, and kept as what was
injected. A rollout that failed stands there with reward 0; here it is not judged.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from evolve_dag.agent.actions import ParsedAction, parse_action
from evolve_dag.errors import DataError
from evolve_dag.evaluation.metrics import ALIASES
from evolve_dag.interop.pools import (
    LISTED,
    Notes,
    a_page,
    artifact_of,
    is_page,
    pool_from_file,
    read_json,
    read_pool,
    read_text,
)
from evolve_dag.jsonlines import Mistake, kind_of, read_objects, refuse
from evolve_dag.plain import plain, printable
from evolve_dag.records import Granularity, Step, Task, ToolCall, Trajectory, TrajectoryStatus
from evolve_dag.secrecy import describe_error
from evolve_dag.store.artifacts import WAIT_SECONDS
from evolve_dag.store.jsonvalues import is_finite
from evolve_dag.store.layout import TASKS
from evolve_dag.store.locks import locked
from evolve_dag.tasks.formats import as_text
from evolve_dag.tasks.jsonl import ALIAS_SEPARATOR, folded, question_id

if TYPE_CHECKING:
    from evolve_dag.store.artifacts import Build, Store

__all__ = ["artifact_of", "detect", "import_file", "pool_from_file", "read_pool", "read_rollouts", "rollouts_from_file"]

Kind = Literal["pool", "rollouts"]
VERSION = "3"
"""Raise it when the same file would become something else."""

_REMEDY = "a rollout a line, with its question, its messages and its answer"
_TASK_ID = re.compile(r"[^\s#]{1,200}")
_RESPONSE = re.compile(r"\s*<tool_response>\n?(.*?)\n?(?:</tool_response>\s*)?", re.S)
_GLOBAL = "**ACCUMULATED EXPERIENCES:**"
_GLOBAL_LEAD = "Solve the input problem by leveraging"
"""Begins the line that may stand above it."""
_ROLES = {"human": "user", "gpt": "assistant", "function": "tool", "observation": "tool", "developer": "system"}
_FORCED = "token limit reached"


class RolloutError(Exception):
    """What a rollout file says of a rollout that failed; gives the error of the trajectory its name."""


@dataclass(frozen=True, slots=True)
class ImportedRollouts:
    """A rollout file, read."""

    trajectories: tuple[Trajectory, ...]
    """In the order of the file; without token ids."""
    lines: tuple[int, ...]
    """Line of each trajectory in the file."""
    tasks: tuple[Task, ...]
    """The tasks that have a reference answer in the file; their ids are those of the trajectories."""
    notes: tuple[str, ...]


# -- rollouts


def rollouts_from_file(path: str | Path) -> list[Trajectory]:
    """The rollouts of a file in any of the formats above; see :func:`read_rollouts`."""
    return list(read_rollouts(path).trajectories)


def read_rollouts(path: str | Path) -> ImportedRollouts:
    """A rollout file.

    Task ids are those of the lines, or hashes of the questions where there are none or where one id stands for two questions.
    The rollouts of a question are numbered in the order of the file, so a line that was appended twice loses nothing. Lines
    whose rollout never happened (a run that was stopped writes them) are left out and told.

    Raises:
        DataError: the file is missing, empty, or lists every broken line.
    """
    path = Path(path)
    rows = _rows(path)
    mistakes: list[Mistake] = []
    drafts: list[_Draft] = []
    noted = Notes()
    for line, row in rows:
        try:
            draft = _draft(line, row, noted)
        except _RowError as error:
            mistakes.append((line, str(error)))
            continue
        if draft is None:
            noted.add("that never ran, left out", f"line {line}")
        else:
            drafts.append(draft)
    if mistakes:
        refuse(path, mistakes, _REMEDY)
    if not drafts:
        raise DataError(f"{path}: no rollout in it has happened", "import the file of a run that got further")
    ids = _task_ids(drafts, noted)
    counted: Counter[str] = Counter()
    trajectories: list[Trajectory] = []
    tasks: dict[str, Task] = {}
    for draft in drafts:
        task_id = ids[draft.key]
        rollout = counted[task_id]
        counted[task_id] += 1
        trajectories.append(replace(draft.trajectory, id=f"{task_id}#{rollout}", task_id=task_id, rollout=rollout))
        if draft.references:
            answer, *others = draft.references
            aliases = {ALIASES: ALIAS_SEPARATOR.join(others)} if others else {}
            task = Task(task_id, draft.trajectory.question, answer, f"imported/{path.stem}", aliases)
            tasks.setdefault(task_id, task)
    return ImportedRollouts(
        tuple(trajectories), tuple(draft.line for draft in drafts), tuple(tasks.values()), noted.lines("rollout")
    )


def artifact_of_rollouts(found: ImportedRollouts, store: Store, path: str | Path) -> str:
    """Rollouts as a ``trajectories`` artifact: tables to query, to trace and to extract from, and ``tasks.jsonl``, which a
    split of an experiment can name.

    Returns:
        The digest.
    """
    from evolve_dag.evaluation.metrics import counts
    from evolve_dag.store.frames import save_trajectories

    path = Path(path)
    with path.open("rb") as stream:
        # The name alone: with the folder, the same file would be another artifact on another machine.
        config = {"imported": path.name, "sha256": hashlib.file_digest(stream, "sha256").hexdigest()}
    version = f"imported/{VERSION}"
    digest = store.digest_of("trajectories", version, config, {})
    with store.build("trajectories", digest, code_version=version, config=config, inputs={}) as build:
        if build.artifact is None:
            save_trajectories(build.path, found.trajectories)
            _save_tasks(build, found)
            build.note(imported=path.name, **counts(found.trajectories))
    return digest


def _save_tasks(build: Build, found: ImportedRollouts) -> None:
    rows = [{"id": t.id, "question": t.question, "answer": t.answer, **t.metadata} for t in found.tasks]
    lines = [json.dumps(row, ensure_ascii=False) for row in rows]
    text = "".join(f"{line}\n" for line in lines)
    (build.path / TASKS).write_bytes(text.encode("utf-8", "replace"))
    places = {t.id: line for t, line in zip(found.trajectories, found.lines, strict=True)}
    (build.path / "lines.json").write_text(json.dumps(places, indent=1) + "\n", encoding="utf-8")


class _RowError(ValueError):
    """What is wrong with one line."""


@dataclass(frozen=True, slots=True)
class _Draft:
    """A rollout before its task's id is known."""

    line: int
    given: str | None
    """Task id that the line bears."""
    references: tuple[str, ...]
    """The reference answer, and behind it others that are right too; () for none."""
    trajectory: Trajectory

    @property
    def key(self) -> str:
        return folded(self.trajectory.question)


def _draft(line: int, row: Mapping[str, Any], noted: Notes) -> _Draft | None:
    question = _first(row, "problem", "question", "query", "task")
    if not isinstance(question, str) or not question.strip():
        raise _RowError("no question (looked for problem, question, query, task)")
    question = question.strip()
    messages = _messages(row)
    given_answer = _first(row, "response", "prediction", "final_answer", "output")
    if given_answer is not None and not isinstance(given_answer, str):
        raise _RowError(f"the answer must be text, not {kind_of(given_answer)}")
    error = row.get("error")
    if not messages and not given_answer and not error:
        return None
    failed = bool(error)
    told = describe_error(RolloutError(_last_line(str(error)))) if failed else None
    system, added, steps = _steps(messages, question, row, line, noted)
    status, answer = _status(row, steps, given_answer, failed)
    if not steps and answer is not None:
        steps = [Step(0, answer, (), (), injected=added)]
    if answer is not None and steps and steps[-1].call is None:
        steps[-1] = replace(steps[-1], answer=answer, problem=None)
    reward = _reward(row)
    # Their code scores an error with 0. Taken for wrong, a broken endpoint would make a group of right answers a mixed one.
    if failed and reward is not None:
        noted.add("that failed and had a reward, not judged here", f"line {line}")
        reward = None
    elif reward is None and not failed:
        noted.add("without a reward, not judged", f"line {line}")
    if added:
        noted.add("with more in the prompt than the question, kept apart as injected experience", f"line {line}")
    given = _first(row, "id", "task_id", "qid", "_id")
    task_id = str(given) if isinstance(given, (str, int)) and not isinstance(given, bool) else None
    seconds = _first(row, "rollout_time", "seconds")
    return _Draft(
        line,
        task_id if task_id is not None and _TASK_ID.fullmatch(task_id) else None,
        _references(row, line, noted),
        Trajectory(
            id="", task_id="", rollout=0, seed=0, system=system, question=question, steps=tuple(steps), status=status,
            answer=answer, reward=reward, error=told, seconds=float(seconds) if is_finite(seconds) else 0.0,
        ),
    )  # fmt: skip


def _task_ids(drafts: Sequence[_Draft], noted: Notes) -> dict[str, str]:
    """Key of a question -> id of its task."""
    hashes: dict[str, str] = {}
    given: dict[str, str] = {}
    for draft in drafts:
        hashes.setdefault(draft.key, question_id(draft.trajectory.question))
        if draft.given is not None:
            given.setdefault(draft.key, draft.given)
    borne = Counter(given.values())
    for key, id in given.items():
        # Their extraction numbers tasks anew in every file: in files that were put together one id stands for two questions.
        if borne[id] > 1:
            noted.add("of a task whose id is also another's: named by the hash of its question", f"{id} is {hashes[key]}")
    return hashes | {key: id for key, id in given.items() if borne[id] == 1}


def _steps(
    messages: Sequence[Mapping[str, Any]], question: str, row: Mapping[str, Any], line: int, noted: Notes
) -> tuple[str, str, list[Step]]:
    """System message, what was injected into every call, and the steps."""
    system, added = "", ""
    steps: list[Step] = []
    for number, message in enumerate(messages, 1):
        role = message.get("role", message.get("from"))
        role = _ROLES.get(str(role), role)
        text = _text(message.get("content", message.get("value")), number)
        if role == "assistant":
            steps.append(_action(len(steps), text, message, line, noted))
        elif role == "system" and steps:  # of another agent, or what is left of a budget: no prompt of what was done before
            noted.add("with a system message in mid-conversation, left out", f"line {line}")
        elif role == "system":
            system = _before_experience(text)
            added += text[len(system) :]
        elif role in ("user", "tool"):
            if not steps:
                if role == "tool":
                    raise _RowError(f"message {number}: a tool's result before any action")
                # Nothing of the prompt around the question may enter the clean history: a student would learn it as its own.
                if text.strip() != question:
                    added += text.replace(question, "", 1)
                continue
            match = _RESPONSE.fullmatch(text)
            seen = plain(match[1] if match else text)
            before = steps[-1].observation
            # Several calls in one action have a result each; a step of ours has one observation.
            steps[-1] = replace(steps[-1], observation=seen if before is None else f"{before}\n\n{seen}")
        else:
            raise _RowError(f"message {number} has the role {role!r}")
    selected = LISTED.findall(added)
    steps = [replace(s, injected=added, selected=tuple(selected)) for s in steps] if added else steps
    return system, added, _with_selections(steps, row.get("exp_selections"))


def _before_experience(text: str) -> str:
    """A system message up to the pool that was glued to it."""
    marker = text.find(_GLOBAL)
    if marker < 0:
        return text
    before = text[:marker].rstrip("\n")
    if len(before) < marker:
        lead = before.find(_GLOBAL_LEAD, before.rfind("\n") + 1)
        if lead >= 0:
            before = before[:lead].rstrip("\n")
    return before


def _action(index: int, text: str, message: Mapping[str, Any], line: int, noted: Notes) -> Step:
    thought = message.get("reasoning_content") or message.get("reasoning")
    if isinstance(thought, str) and thought.strip():
        text = f"<think>\n{thought.strip()}\n</think>\n{text}"
    calls = message.get("tool_calls") or []
    if not isinstance(calls, list):
        raise _RowError(f"tool_calls must be a list, not {kind_of(calls)}")
    if not calls:
        action = _read(text)
        return Step(
            index, text, (), (), call=action.call, answer=action.answer, problem=None if action.plain else action.problem
        )
    written = []
    for call in calls:
        function = call.get("function", call) if isinstance(call, Mapping) else None
        if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
            raise _RowError("a tool call has no name")
        arguments = function.get("arguments") or {}
        if isinstance(arguments, str):
            try:
                arguments = json.loads(arguments)
            except (ValueError, RecursionError):  # what a model wrote is kept as it is: it is what the policy did
                arguments = {"arguments": arguments}
        if not isinstance(arguments, Mapping):
            arguments = {"arguments": arguments}
        shown = {str(k): v if isinstance(v, str) else json.dumps(v, ensure_ascii=False) for k, v in arguments.items()}
        written.append(ToolCall(function["name"], shown))
    if len(written) > 1:
        noted.add("with several calls in one action: the first is the step's call, all stand in its text", f"line {line}")
    blocks = [json.dumps({"name": c.name, "arguments": dict(c.arguments)}, ensure_ascii=False) for c in written]
    body = "\n".join(f"<tool_call>\n{block}\n</tool_call>" for block in blocks)
    return Step(index, f"{text}\n{body}" if text.strip() else body, (), (), call=written[0])


def _read(text: str) -> ParsedAction:
    """An action in tags; arguments that are no text (a list of queries) are kept as JSON."""
    action = parse_action(text)
    if action.problem is None:
        return action
    typed = parse_action(text, typed=True)
    return action if typed.call is None else replace(typed, call=ToolCall(typed.call.name, typed.call.texts))


def _with_selections(steps: list[Step], selections: Any) -> list[Step]:
    """The ids that a selector chose at each round, as step-wise evaluation records them."""
    if not isinstance(selections, list):
        return steps
    for entry in selections:
        number = entry.get("round") if isinstance(entry, Mapping) else None
        if not isinstance(number, int) or not 1 <= number <= len(steps):
            continue
        given = entry.get("selected_ids")
        ids = [str(one) for one in given] if isinstance(given, list) else [given] if isinstance(given, str) and given else []
        rationale = entry.get("rationale")
        steps[number - 1] = replace(
            steps[number - 1], selected=tuple(ids), rationale=rationale if isinstance(rationale, str) else ""
        )
    return steps


def _status(
    row: Mapping[str, Any], steps: Sequence[Step], given: str | None, failed: bool
) -> tuple[TrajectoryStatus, str | None]:
    if failed:
        return "failed", None
    termination = row.get("termination")
    answer = given if given is not None and given.strip() else (steps[-1].answer if steps else None)
    if isinstance(termination, str) and termination != "answer":
        return ("forced", answer) if _FORCED in termination and answer is not None else ("unanswered", None)
    return ("unanswered", None) if answer is None else ("answered", answer.strip())


def _reward(row: Mapping[str, Any]) -> float | None:
    reward = _first(row, "reward", "score")
    if reward is None:
        return None
    if isinstance(reward, bool):
        return float(reward)
    if not is_finite(reward) or not 0 <= reward <= 1:
        raise _RowError(f"the reward must be a number from 0 to 1, not {reward!r:.60}")
    return float(reward)


def _references(row: Mapping[str, Any], line: int, noted: Notes) -> tuple[str, ...]:
    """The reference answers as text."""
    given = _first(row, "groundtruth", "ground_truth", "answer", "reference")
    values = given if isinstance(given, list) else [] if given is None else [given]
    texts = [as_text(str(value) if isinstance(value, bool) else value) for value in values]
    if not all(isinstance(text, str) for text in texts):
        noted.add("with a reference answer that is no text, left out", f"line {line}")
    found = tuple(dict.fromkeys(text.strip() for text in texts if isinstance(text, str) and text.strip()))
    kept = found[:1] + tuple(text for text in found[1:] if ALIAS_SEPARATOR not in text)
    if kept != found:
        noted.add(f"with another right answer that holds {ALIAS_SEPARATOR!r}, left out", f"line {line}")
    return kept


def _messages(row: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """The chat of one rollout, of all its agents in order."""
    found = _first(row, "trajectories", "trajectory", "messages", "conversations")
    if isinstance(found, str):  # the older youtu-agent stores the chat as JSON text
        try:
            found = json.loads(found)
        except (ValueError, RecursionError):
            raise _RowError("the trajectory is text, and not JSON") from None
    if isinstance(found, Mapping):
        found = [found]
    if found is None:
        return []
    if not isinstance(found, list):
        raise _RowError(f"the messages must be a list, not {kind_of(found)}")
    messages: list[Mapping[str, Any]] = []
    for part in found:
        inner = part.get("trajectory") if isinstance(part, Mapping) else part if isinstance(part, list) else None
        for message in inner if isinstance(inner, list) else [part]:
            if not isinstance(message, Mapping):
                raise _RowError(f"a message must be an object, not {kind_of(message)}")
            messages.append(message)
    return messages


def _text(content: Any, number: int) -> str:
    if content is None:
        return ""
    if isinstance(content, list):  # parts, as newer chat formats have them
        parts = [part.get("text") or "" for part in content if isinstance(part, Mapping)]
        wrong = [part for part in parts if not isinstance(part, str)]
        content = wrong[0] if wrong else "".join(parts)
    if not isinstance(content, str):
        raise _RowError(f"message {number}: the content must be text, not {kind_of(content)}")
    return content


def _last_line(text: str) -> str:
    """Of a traceback the line that says what happened."""
    lines = [line for line in text.splitlines() if line.strip()]
    return lines[-1] if text.startswith("Traceback") and lines else text


def _rows(path: Path) -> list[tuple[int, dict[str, Any]]]:
    if path.suffix.lower() == ".json":
        content = read_json(path, read_text(path))
        rows = content if isinstance(content, list) else [content]
        broken = [
            (number, f"holds {kind_of(row)}, not an object") for number, row in enumerate(rows, 1) if not isinstance(row, dict)
        ]
        if not rows:
            raise DataError(f"{path}: empty list", _REMEDY)
        if broken:
            refuse(path, broken, _REMEDY)
        return list(enumerate(rows, 1))
    if is_page(read_text(path)):
        raise a_page(path)
    objects, mistakes = read_objects(path)
    if mistakes:
        refuse(path, mistakes, _REMEDY)
    return objects


# -- both


def detect(path: str | Path) -> Kind:
    """Whether a file holds a pool or rollouts.

    Raises:
        DataError: it is missing, a folder, or neither.
    """
    path = Path(path)
    if path.is_dir():
        names = sorted(p.name for p in path.iterdir() if p.suffix in (".json", ".jsonl"))
        raise DataError(f"{path}: is a folder", f"name a file in it{f', e.g. {names[0]}' if names else ''}")
    rollout_keys = {"trajectories", "trajectory", "messages", "conversations", "response", "prediction", "groundtruth"}
    if path.suffix.lower() in (".jsonl", ".ndjson"):
        if is_page(read_text(path)):
            raise a_page(path)
        objects, mistakes = read_objects(path)
        if not objects:
            refuse(path, mistakes, _REMEDY)
        return "rollouts" if any(rollout_keys & row.keys() for _, row in objects) else "pool"
    content = read_json(path, read_text(path))
    rows = content if isinstance(content, list) else [content]
    return "rollouts" if any(isinstance(row, dict) and rollout_keys & row.keys() for row in rows) else "pool"


@dataclass(frozen=True, slots=True)
class Report:
    """What an import has done."""

    kind: Kind
    source: str
    """Name of the file."""
    digest: str
    lineage: str
    """Name under which SQL finds it (``experiment``); keeps it from ``evolve gc``."""
    facts: Mapping[str, Any]
    """Counts."""
    notes: tuple[str, ...]
    ids: tuple[str, ...]
    """Of the items, or of the tasks."""
    file: Path | None = None
    """For rollouts: the tasks, for ``tasks.<split>.path``."""

    def to_dict(self) -> dict[str, Any]:
        """JSON values: what ``evolve import --json`` prints."""
        return {
            "kind": self.kind, "source": self.source, "digest": self.digest, "lineage": self.lineage, **self.facts,
            "notes": list(self.notes), "ids": list(self.ids), "tasks_file": str(self.file) if self.file else None,
        }  # fmt: skip

    def lines(self) -> list[str]:
        """The same for people."""
        shown = ", ".join(self.ids[:8]) + (", ..." if len(self.ids) > 8 else "")
        if self.kind == "pool":
            first = f"{self.source}: {self.facts['items']} items ({self.facts['principles']} principles): {shown}"
            ask = f"select id, granularity, text from items where digest = '{self.digest}'"
            more = [f"experience {self.digest[:12]}"]
        else:
            judged = f"{self.facts['judged']} judged"
            first = f"{self.source}: {self.facts['trajectories']} rollouts of {self.facts['tasks']} tasks, {judged}"
            ask = f"select id, status, reward, turns from trajectories where digest = '{self.digest}'"
            more = [f"trajectories {self.digest[:12]}", f"its tasks, for tasks.<split>.path: {self.file}"]
        lines = [first, *(f"note: {note}" for note in self.notes), *more, f'evolve sql "{ask}"']
        return [printable(line) for line in lines]  # names and ids are the file's


def import_file(
    path: str | Path,
    store: Store,
    *,
    kind: Kind | None = None,
    experiment: str | None = None,
    granularity: Granularity | None = None,
) -> Report:
    """Take a file into the store.

    Args:
        kind: None: looked for in the file.
        experiment: name of the experiment that it is for; decides the lineage under which it is found.
        granularity: of all items of a pool, whatever the file says; None: as :func:`~evolve_dag.interop.pools.read_pool` finds.

    Raises:
        DataError: lists what is wrong with the file, with places.
    """
    path = Path(path)
    kind = kind or detect(path)
    lineage = f"{experiment}-imported" if experiment else "imported"
    if granularity is not None and kind != "pool":
        raise DataError(f"{path}: holds rollouts, which have no granularity", "leave --granularity out")
    if kind == "pool":
        found = read_pool(path, granularity=granularity)
        with _importing(store, lineage):
            digest = artifact_of(found.pool, store, path.name, renamed=found.renamed)
            _refer(store, lineage, "experience", digest)
        principles = sum(item.granularity == "principle" for item in found.pool.items)
        facts: dict[str, Any] = {"items": len(found.pool), "principles": principles, "renamed": dict(found.renamed)}
        return Report(kind, path.name, digest, lineage, facts, found.notes, found.pool.ids)
    rolled = read_rollouts(path)
    with _importing(store, lineage):
        digest = artifact_of_rollouts(rolled, store, path)
        _refer(store, lineage, "trajectories", digest)
    judged = sum(t.reward is not None for t in rolled.trajectories)
    ids = tuple(dict.fromkeys(t.task_id for t in rolled.trajectories))
    facts = {"trajectories": len(rolled.trajectories), "tasks": len(ids), "judged": judged}
    file = store.open("trajectories", digest).file(TASKS)
    return Report(kind, path.name, digest, lineage, facts, rolled.notes, ids, file)


def _importing(store: Store, lineage: str) -> AbstractContextManager[None]:
    """One import at a time: two would take the same number. By this name `evolve gc` holds the lineage while it removes."""
    return locked(store.root, f"experiment-{lineage}", f"something is being imported as {lineage!r}", WAIT_SECONDS)


def _refer(store: Store, lineage: str, kind: str, digest: str) -> None:
    """A reference of its own for every import; the same file again gets none."""
    # Imports have no iterations of their own; the number only keeps their references apart.
    present = [ref for ref in store.refs(lineage) if ref.kind == kind]
    if not any(ref.digest == digest for ref in present):
        store.set_ref(lineage, max((ref.iteration for ref in present), default=0) + 1, kind, digest)


def _first(row: Mapping[str, Any], *names: str) -> Any:
    return next((row[name] for name in names if row.get(name) is not None), None)
