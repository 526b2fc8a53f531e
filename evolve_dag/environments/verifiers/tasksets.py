"""Which taskset an experiment names: where its code is, whether it can be played here, and its rows as tasks.

What can be known without the library (is it there, is the taskset) is looked at without importing it, since that takes seconds.
"""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import io
import json
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from functools import lru_cache
from importlib import metadata
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar

from evolve_dag.config.fence import Fence
from evolve_dag.config.outside import code_hash, python_files
from evolve_dag.errors import DataError, PartError
from evolve_dag.plain import one_line
from evolve_dag.records import Task

T = TypeVar("T")

INSTALL = "pip install 'evolve-dag[verifiers]'"
SHIPPED = "v1/tasksets"
"""Where the library keeps the tasksets that it brings."""
LOADING_SECONDS = 300.0
"""Longest that a taskset may take to be imported and to give its next rows."""
MOST_OF_ID = 80
"""Characters of a task's id."""
MOST_TWINS = 10_000
"""Rows in a row that were all there before: the taskset has no more."""


def code_digest(id: str) -> str:
    """Version of the library and hash of the taskset's Python files, without importing either.

    Raises:
        PartError: one of them is not installed.
    """
    files = _files(id)
    return f"verifiers {metadata.version('verifiers')}, {code_hash(files)}"


def _files(id: str) -> list[tuple[str, Path]]:
    library = importlib.util.find_spec("verifiers")
    if library is None or not library.submodule_search_locations:
        raise PartError("kind: verifiers needs the library of that name, which is not installed", INSTALL)
    # The library's own rule: `owner/name@version` is the module `name`.
    module = id.rpartition("/")[2].partition("@")[0].replace("-", "_").lower()
    shipped = Path(library.submodule_search_locations[0]) / SHIPPED / module
    if module.isidentifier() and shipped.is_dir():
        return python_files(shipped)
    spec = importlib.util.find_spec(module) if module.isidentifier() else None
    if spec is None:
        raise PartError(f"no taskset {one_line(id, 60)!r}: there is no module {one_line(module, 60)!r}", "install its package")
    if spec.submodule_search_locations:
        return [file for place in spec.submodule_search_locations for file in python_files(Path(place))]
    return [(module, Path(spec.origin or ""))]


class Taskset:
    """A taskset of the library with its settings, loaded once in a process.

    Args:
        id: name of its package.
        args: keys of its own configuration, as JSON.

    Raises:
        PartError: it is not installed.
        DataError: it cannot be loaded, its arguments are wrong, or it needs what is not offered here.
    """

    def __init__(self, id: str, args: str) -> None:
        self.id = id
        code_digest(id)
        self._lock = threading.Lock()
        self.config: Any = self._loaded(_configured, id, json.loads(args))
        """The library's configuration of the environment, our harness in its one seat."""
        loaders = importlib.import_module("verifiers.v1.utils.loaders")
        self._rows = iter(self._loaded(loaders.load_taskset, self.config.taskset))
        self._found: dict[str, tuple[Task, Any]] = {}
        self._known: set[str] = set()
        """Whole ids of the rows, where a task's is one line of at most :data:`MOST_OF_ID` characters."""
        self._twins = 0

    def take(self, skip: int, count: int) -> list[tuple[Task, Any]]:
        """Rows ``skip`` to ``skip + count``, as tasks of ours, each with the library's; fewer where the taskset ends. A row
        with the id of one before it, or without id and the same as one, is passed over: other rows are other tasks.

        Raises:
            DataError: a row cannot be loaded, or needs what is not offered here.
        """
        with self._lock:
            self._loaded(self._read, skip + count)
            return list(islice(self._found.values(), skip, skip + count))

    def _read(self, until: int) -> None:
        while len(self._found) < until and self._twins < MOST_TWINS:
            if (row := next(self._rows, None)) is None:
                return
            task = _task(self.id, row)
            whole = row.data.id or task.id
            if whole in self._known:
                self._twins += 1
                continue
            self._twins = 0
            self._known.add(whole)
            if task.id in self._found:  # they differ in what was cut off: the first keeps the name that it has in the store
                task = replace(task, id=f"{one_line(task.id, MOST_OF_ID - 17)} {_hash(whole)}")
            self._found[task.id] = task, row

    def _loaded(self, load: Callable[..., T], *args: Any) -> T:
        """What the taskset's own code gives, in words where it does not."""
        try:
            with _no_terminal():
                return Fence(f"taskset {self.id}", LOADING_SECONDS).run(load, *args)
        except PartError as error:
            if isinstance(error.__cause__, EOFError):
                remedy = "run it once by hand: it may want a licence accepted"
                raise DataError(f"taskset {self.id}: asks for input", remedy) from error
            remedy = "mend `environment.id` and `environment.args`, or do what the message asks for"
            raise DataError(error.what, remedy) from error


@lru_cache(maxsize=64)
def taskset(id: str, args: str) -> Taskset:
    """The taskset of these settings."""
    return Taskset(id, args)


@contextmanager
def _no_terminal() -> Iterator[None]:
    """A taskset that asks something gets the end of the file, and no run hangs at a prompt."""
    before, sys.stdin = sys.stdin, io.StringIO()
    try:
        yield
    finally:
        sys.stdin = before


def _configured(id: str, args: Mapping[str, Any]) -> Any:
    """Our harness in the one seat of the environment; refuses what we cannot play."""
    from pydantic import ValidationError

    loaders = importlib.import_module("verifiers.v1.utils.loaders")
    library = importlib.import_module("evolve_dag.environments.verifiers.library")
    try:
        config = loaders.resolve_env_config({"taskset": {**args, "id": id}})
        seats = importlib.import_module("verifiers.v1.configs.agent").agent_config_fields(config)
        _refuse_unplayable(loaders, config, seats)
        seat = {"harness": {"id": library.HARNESS}, "runtime": {"type": "subprocess"}, "network_notice": False}
        return loaders.resolve_env_config({"taskset": {**args, "id": id}, **dict.fromkeys(seats, seat)})
    except ValidationError as error:
        told = "; ".join(f"{'.'.join(map(str, one['loc']))}: {one['msg']}" for one in error.errors())
        raise DataError(f"taskset {id}: environment.args: {told}", "its package says which keys it has") from None


def _refuse_unplayable(loaders: Any, config: Any, seats: Mapping[str, Any]) -> None:
    id = config.taskset.id
    if len(seats) != 1:
        raise _refused(id, f"seats {len(seats)} agents ({', '.join(seats)})", "only environments with one agent can be played")
    [seat] = seats.values()
    if seat.harness is not None or loaders.default_harness_id(id) != "bash":
        raise _refused(id, "brings a program of its own that plays", "only those that any harness can play")
    if seat.runtime.type not in ("prime", "subprocess"):  # prime is the library's default, and no wish of the environment
        raise _refused(id, f"needs the runtime {seat.runtime.type}", "only what runs without a container can be played")
    if loaders.task_type(id).NEEDS_CONTAINER:
        raise _refused(id, "needs a container", "only what runs without one can be played")
    if config.taskset.task.judges:
        raise _refused(id, "lets a model judge, at an endpoint of its own", "leave `judges` out of environment.args.task")


def _refused(id: str, what: str, remedy: str) -> DataError:
    return DataError(f"taskset {id}: {what}", remedy)


def _task(id: str, row: Any) -> Task:
    """A row as a task of ours: what is asked, as far as it is known before the episode, and the reference where it has one."""
    data = row.data
    if data.image is not None or "*" not in data.network_allow or data.network_block:
        raise _refused(id, f"row {data.idx} needs a container", "only tasks that run without one can be played")
    content = json.dumps(data.model_dump(mode="json", exclude={"idx"}, exclude_none=True), sort_keys=True)
    name = one_line(data.id, MOST_OF_ID) if data.id else _hash(content)
    answer = getattr(data, "answer", "")
    question = data.prompt_text or data.description or data.name or name
    return Task(name, question, answer if isinstance(answer, str) else json.dumps(answer, default=str), suite=id)


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:16]
