"""Rows of parts that others wrote: from installed distributions, by entry points, and from a file beside the experiment.

Both are code that an experiment file names, so they are trusted as a package is that one installs; but they may be wrong, and
what they *are* decides what a step makes: each row comes with the hash of the code that was loaded (:attr:`Found.digest`).
Code is loaded once in a process: what was hashed is what runs, though a file is edited meanwhile.
"""

from __future__ import annotations

import hashlib
import re
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from types import ModuleType
from typing import Any, TypeVar, cast

from evolve_dag.config.fence import Fence
from evolve_dag.errors import PartError
from evolve_dag.store.disk import read_bytes

T = TypeVar("T")

IMPORT_SECONDS = 120.0
"""Longest import of a part; heavy libraries take a while on a busy machine."""
FILE = "file"
"""Origin of what lies in a file beside an experiment."""
MOST_BYTES = 10_000_000
_BESIDE = re.compile(r"([A-Za-z_]\w*):([A-Za-z_]\w*)", re.ASCII)
_LOCATED = re.compile(r"(.+\.py):([A-Za-z_]\w*)", re.ASCII | re.DOTALL)


@dataclass(frozen=True, slots=True)
class Found:
    """What a name outside of this package leads to."""

    name: str
    """Of the part, without the folder that it lies in."""
    row: Any
    """As it was found; nothing is checked yet."""
    origin: str
    """Distribution and version, or ``file``."""
    digest: str
    """Hash of the code."""

    @property
    def identity(self) -> str:
        """What stands for it in a digest."""
        return f"{self.name} ({self.origin}, {self.digest})"


def group(choice: str) -> str:
    """The group of entry points for a choice: ``evolve_dag.selectors``."""
    return f"evolve_dag.{choice}s"


def beside(name: Any, file: Path) -> Any:
    """``my_module:MyThing``, as an experiment file says it, with the place of that module; all else as it is."""
    match = _BESIDE.fullmatch(name) if isinstance(name, str) else None
    return name if match is None else f"{(file.parent / f'{match[1]}.py').resolve()}:{match[2]}"


def installed(choice: str) -> dict[str, list[metadata.EntryPoint]]:
    """Names that installed distributions give to parts, each with those that give it."""
    found: dict[str, list[metadata.EntryPoint]] = {}
    for entry in metadata.entry_points(group=group(choice)):
        found.setdefault(entry.name, []).append(entry)
    return found


def find(choice: str, name: str) -> Found | None:
    """What ``name`` leads to; None where nothing has that name.

    Raises:
        PartError: it cannot be imported, or two distributions give the name.
    """
    if (match := _LOCATED.fullmatch(name)) and (path := Path(match[1])).is_absolute():
        module, digest = _module(path)
        return Found(f"{path.stem}:{match[2]}", _attribute(module, match[2]), FILE, digest)
    entries = installed(choice).get(name)
    return None if entries is None else _entry(choice, name, entries)


def distribution(entry: metadata.EntryPoint) -> str:
    """Name and version of the distribution of an entry point."""
    return f"{entry.dist.name} {entry.dist.version}" if entry.dist is not None else "unknown distribution"


def _entry(choice: str, name: str, entries: Sequence[metadata.EntryPoint]) -> Found:
    origins = sorted(map(distribution, entries))
    if len(entries) > 1:
        raise PartError(f"{choice} {name}: {' and '.join(origins)} both give this name", "uninstall one of them")
    part = f"{choice} {name} ({origins[0]})"

    def load() -> Found:
        row = Fence(part, IMPORT_SECONDS).run(entries[0].load)
        return Found(name, row, origins[0], _package_digest(entries[0].module))

    return _once(part, load)


def changed(found: Found, choice: str) -> bool:
    """Whether the installed code of a part is another than the one that was loaded: modules may be imported late."""
    if found.origin == FILE:  # loaded whole, and as it was hashed
        return False
    entries = installed(choice).get(found.name, ())
    try:
        return any(_package_digest(entry.module) != found.digest for entry in entries)
    except (KeyError, OSError):  # it leads to another module, or files are gone
        return True


def _package_digest(module: str) -> str:
    """Hash of the code of a package: of an editable installation, the version alone would not change with it."""
    package = sys.modules[module.partition(".")[0]]
    places = [Path(place) for place in getattr(package, "__path__", ())]
    if not places:
        return _hash(Path(package.__file__ or "").read_bytes())
    return code_hash(file for place in places for file in python_files(place))


def python_files(folder: Path) -> list[tuple[str, Path]]:
    """The Python files below a folder: name within it, path."""
    return [(path.relative_to(folder).as_posix(), path) for path in folder.rglob("*.py")]


def code_hash(files: Iterable[tuple[str, Path]]) -> str:
    """Hash of the files' names and contents, in whatever order they come."""
    return _hash("\n".join(f"{name}\0{_hash(path.read_bytes())}" for name, path in sorted(files)).encode())


_modules: dict[Path, tuple[ModuleType, str]] = {}
"""Files that were loaded in this process, with the hash of what was loaded."""
_outcomes: dict[str, Any] = {}
"""What came of loading code in this process: code that fails, or hangs, is not tried again and again."""


def _once(what: str, load: Callable[[], T]) -> T:
    if what not in _outcomes:
        try:
            _outcomes.setdefault(what, load())
        except PartError as error:
            _outcomes[what] = error
    if isinstance(_outcomes[what], PartError):
        raise _outcomes[what]
    return cast(T, _outcomes[what])


def _module(path: Path) -> tuple[ModuleType, str]:
    if path not in _modules:
        try:
            content = read_bytes(path, most=MOST_BYTES)
        except OSError as error:
            why = "no such file" if isinstance(error, FileNotFoundError) else f"cannot be read: {error.strerror}"
            raise PartError(f"{path}: {why}", "name a module beside the experiment file, as `my_module:MY_ROW`") from None
        fence, digest = Fence(str(path), IMPORT_SECONDS), _hash(content)
        module = _once(f"{path} {digest}", lambda: fence.run(_execute, path, content))
        _modules.setdefault(path, (module, digest))
    return _modules[path]


def _execute(path: Path, content: bytes) -> ModuleType:
    """The module that ``content`` makes: from these bytes, not from what the file may hold by now."""
    # Its classes look their module up by name, and two experiments may each have a file of one name.
    module = ModuleType(f"{path.stem}@{_hash(str(path).encode())}")
    module.__file__ = str(path)
    sys.modules[module.__name__] = module
    try:
        exec(compile(content, str(path), "exec"), module.__dict__)
    except BaseException:
        del sys.modules[module.__name__]
        raise
    return module


def _attribute(module: ModuleType, name: str) -> Any:
    try:
        return getattr(module, name)
    except AttributeError:
        raise PartError(f"{module.__file__}: has no {name}", "name the row that it states") from None


def _hash(content: bytes) -> str:
    return f"sha256:{hashlib.sha256(content).hexdigest()[:32]}"
