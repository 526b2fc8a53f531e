"""What an experiment file chooses by name: environments, verifiers, extractors, selectors, backends, divergences, suites,
launchers.

Of a *part* there is one row (:class:`Part`), and it stands in the part's own module, beside the code that it describes: the
settings that it alone has, how it is made, the models and prompts that it uses, what it needs. Here is only where each name
leads (:data:`CHOICES`); a row is imported when an experiment names it. :func:`part` is the one place where a name becomes code,
and where parts that others wrote come in (:mod:`evolve_dag.config.outside`): they are what ours are, within limits.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from importlib import import_module
from typing import Any, Generic, Self, TypeVar

from pydantic import Field, ValidationError
from pydantic.fields import FieldInfo
from pydantic_core import InitErrorDetails, PydanticCustomError

from evolve_dag.config.fence import Fence
from evolve_dag.config.outside import FILE, Found, changed, find, installed
from evolve_dag.config.section import MOST, Section
from evolve_dag.errors import PartError
from evolve_dag.secrecy import describe_error


@dataclass(frozen=True, slots=True)
class Choice:
    """A place in an experiment file where a part is named."""

    key: str
    """The key that names it."""
    section: str | None
    """The section of the experiment that is this part's settings; None where the name stands alone or in several places."""
    rows: Mapping[str, str]
    """Name -> where its row is, ``module:attribute``."""
    row: str
    """What the row of such a part must be, ``module:class``."""
    settings: str | None = None
    """What its settings must be, ``module:class``; None: it has none."""
    elsewhere: tuple[str, ...] = ()
    """Dotted keys where such parts are named, where it is no section; ``*`` stands for any name."""

    @property
    def place(self) -> str:
        """As people write it: ``selection.selector``."""
        return f"{self.section}.{self.key}" if self.section else self.key

    @property
    def places(self) -> tuple[str, ...]:
        """Every dotted key that names such a part."""
        return self.elsewhere or (self.place,)


CHOICES: Mapping[str, Choice] = {
    "environment": Choice(
        "kind",
        "environment",
        {
            "pocket": "evolve_dag.environments.pocket.tools:POCKET",
            "corpus": "evolve_dag.environments.corpus:CORPUS",
            "tools": "evolve_dag.environments.web.tools:TOOLS",
            "textworld": "evolve_dag.environments.textworld.tools:TEXTWORLD",
            "verifiers": "evolve_dag.environments.verifiers.environment:VERIFIERS",
        },
        row="evolve_dag.environments.base:EnvironmentPart",
        settings="evolve_dag.config.parts:EnvironmentSettings",
    ),
    "verifier": Choice(
        "kind",
        "verification",
        {
            "exact": "evolve_dag.verification.exact:EXACT",
            "contains": "evolve_dag.verification.contains:CONTAINS",
            "mathematics": "evolve_dag.verification.mathematics:MATHEMATICS",
            "judge": "evolve_dag.verification.judge:JUDGE",
        },
        row="evolve_dag.verification.base:VerifierPart",
        settings="evolve_dag.config.parts:VerificationSettings",
    ),
    "extractor": Choice(
        "extractor",
        "extraction",
        {
            "contrast": "evolve_dag.experience.extraction.mining:CONTRAST",
            "llm": "evolve_dag.experience.extraction.llm:LLM",
            "given": "evolve_dag.experience.extraction.given:GIVEN",
        },
        row="evolve_dag.experience.extraction.base:ExtractorPart",
        settings="evolve_dag.config.parts:ExtractionSettings",
    ),
    "selector": Choice(
        "selector",
        "selection",
        {
            "state": "evolve_dag.experience.selection.state:STATE",
            "lexical": "evolve_dag.experience.selection.lexical:LEXICAL",
            "embedding": "evolve_dag.experience.selection.embedding:EMBEDDING",
            "llm": "evolve_dag.experience.selection.llm:LLM",
        },
        row="evolve_dag.experience.selection.base:SelectorPart",
        settings="evolve_dag.config.parts:SelectionSettings",
    ),
    "backend": Choice(
        "backend",
        None,
        {
            "transformers": "evolve_dag.inference.backends:TRANSFORMERS",
            "vllm": "evolve_dag.inference.backends:VLLM",
            "openai": "evolve_dag.inference.backends:OPENAI",
        },
        row="evolve_dag.inference.backends:BackendPart",
        settings="evolve_dag.config.schema:ModelSettings",
        elsewhere=("models.*.backend",),
    ),
    "divergence": Choice(
        "divergence",
        None,
        {
            "forward_kl": "evolve_dag.distillation.divergences:FORWARD_KL",
            "reverse_kl": "evolve_dag.distillation.divergences:REVERSE_KL",
            "jsd": "evolve_dag.distillation.divergences:JSD",
            "cross_entropy": "evolve_dag.distillation.divergences:CROSS_ENTROPY",
        },
        row="evolve_dag.distillation.divergences:Divergence",
        elsewhere=("regime.divergence",),
    ),
    "suite": Choice(
        "suite",
        None,
        {
            "jsonl": "evolve_dag.tasks.formats:JSONL",
            "webwalkerqa": "evolve_dag.tasks.formats:WEBWALKERQA",
            "gaia_text_103": "evolve_dag.tasks.formats:GAIA_TEXT_103",
            "browsecomp_zh": "evolve_dag.tasks.formats:BROWSECOMP_ZH",
            "aime": "evolve_dag.tasks.formats:AIME",
            "dapo": "evolve_dag.tasks.formats:DAPO",
        },
        row="evolve_dag.tasks.formats:Suite",
        elsewhere=("tasks.*.suite",),
    ),
    "launcher": Choice(
        "kind",
        None,
        {
            "in_process": "evolve_dag.assets.launchers:IN_PROCESS",
            "subprocess": "evolve_dag.assets.launchers:SUBPROCESS",
            "ray": "evolve_dag.assets.launchers:RAY",
            "kubernetes": "evolve_dag.assets.launchers:KUBERNETES",
        },
        row="evolve_dag.assets.launchers:LauncherPart",
        settings="evolve_dag.config.parts:LauncherSettings",
        elsewhere=("runtime.launcher.kind", "runtime.launcher.*.kind"),
    ),
}

S = TypeVar("S", bound=Section)
V = TypeVar("V")


def _nothing(settings: Any, experiment: Any = None) -> tuple[Any, ...]:
    return ()


def _listed(function: Callable[..., Iterable[str]]) -> Callable[..., tuple[str, ...]]:
    """``function``, which others wrote and which may be a generator, read to its end."""
    return lambda *args: tuple(map(str, function(*args)))


def _pairs(function: Callable[..., Iterable[tuple[str, str]]]) -> Callable[..., list[tuple[str, str]]]:
    return lambda *args: [(str(key), str(what)) for key, what in function(*args)]


def _no_data(settings: Any) -> str:
    return ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Part(Generic[S]):
    """One row. ``experiment``, below, is the :class:`~evolve_dag.config.schema.Experiment` around the settings."""

    settings: type[S]
    """The keys that it alone has; its docstring says what the part is."""
    make: Callable[..., Any]
    """(settings, what a part of its kind is made with) -> the part. It opens nothing yet and asks nobody."""
    roles: Callable[[S], Sequence[str]] = _nothing
    """Models (``models.<role>``) that it asks under these settings. They are in the digest; no other can be asked."""
    prompts: Callable[[S, Any], Sequence[str]] = _nothing
    """(settings, experiment) -> names of the prompts it uses. They are in the digest; no other can be loaded."""
    unread: Callable[[S, Any], Sequence[str]] = _nothing
    """(settings, experiment) -> keys of its own that it does not read under this experiment."""
    mistakes: Callable[[S, Any], Iterable[tuple[str, str]]] = _nothing
    """(settings, experiment) -> what cannot work: (dotted key, what is wrong)."""
    libraries: Mapping[str, str] = field(default_factory=dict)
    """Module that it cannot work without -> the extra of this package that brings it."""
    variables: Sequence[str] = ()
    """Environment variables that it may read keys from."""
    data: Callable[[S], str] = _no_data
    """(settings) -> digest of what decides it and is neither in its code nor behind a key that is a file; '' for none."""
    seconds: float = 60.0
    """Longest that one call of a part from outside may take; what takes longer has failed."""

    def fenced(self, fence: Fence) -> Self:
        """The same row within limits, for a part from outside. What a row's class knows of the part itself, it adds."""
        functions = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "settings"}
        functions |= {name: _listed(functions[name]) for name in ("roles", "prompts", "unread")}
        functions["mistakes"] = _pairs(functions["mistakes"])
        fenced: dict[str, Any] = {name: fence.around(value) for name, value in functions.items() if callable(value)}
        make = fenced["make"]
        return replace(self, **fenced | {"make": lambda *given: self.held(make(*given), fence)})

    def held(self, made: Any, fence: Fence) -> Any:
        """What ``make`` gave, within limits."""
        return made


class EnvironmentSettings(Section):
    """What answers tool calls."""

    kind: str
    """The environment."""


class VerificationSettings(Section):
    """How a final answer is judged (METHOD step 2)."""

    kind: str
    """The verifier."""


class ExtractionSettings(Section):
    """Scored trajectories -> experience pool E(k) (METHOD step 3)."""

    extractor: str
    """Who finds lessons."""
    cap: int = Field(12, ge=1, le=MOST)
    """Most items in the pool."""


class SelectionSettings(Section):
    """Which items fit the current state (METHOD: step_wise)."""

    selector: str
    """Who chooses."""
    max_items: int = Field(3, ge=1, le=50)
    """Most items per step."""


class LauncherSettings(Section):
    """Where this step is made. `runtime.launcher: subprocess` stands for all four, `{adapter: ray}` for one, and a mapping with
    `kind` has a launcher's own keys."""

    kind: str
    """The launcher."""


def part(choice: str, name: str) -> Any:
    """The row of a part.

    Raises:
        ValueError: nothing has that name; says which names there are.
        PartError: what has that name comes from outside, and is no such part.
    """
    ours = CHOICES[choice].rows
    if isinstance(name, str):
        if name in ours:
            return _at(ours[name])
        if (found := outside(choice, name)) is not None:
            return found.row
    raise ValueError(f"unknown {choice} {name!r}: should be {either(names(choice))}")


_outside: dict[tuple[str, str], Found] = {}
"""Rows from outside that this process has, within their limits."""


def outside(choice: str, name: str) -> Found | None:
    """What ``name`` leads to outside of this package, checked and fenced; None for a part of ours, and for no part.

    Raises:
        PartError: it cannot be imported, or is no such part.
    """
    if name in CHOICES[choice].rows:
        return None
    if (choice, name) not in _outside:
        if (found := find(choice, name)) is None:
            return None
        _refuse_what_is_no_row(choice, found)
        fence = Fence(f"{choice} {found.name} ({found.origin})", getattr(found.row, "seconds", 60.0))
        _outside.setdefault((choice, name), replace(found, row=found.row.fenced(fence)))
    return _outside[choice, name]


def _refuse_what_is_no_row(choice: str, found: Found) -> None:
    told, place = f"{choice} {found.name} ({found.origin})", CHOICES[choice]
    wanted = _at(place.row)
    if not isinstance(found.row, wanted):
        it = f"the class {found.row.__name__}" if isinstance(found.row, type) else f"a {type(found.row).__name__}"
        raise PartError(f"{told}: is {it}, not a row: a {wanted.__name__}", "docs/extending.md shows a row of each kind")
    base = _at(place.settings) if place.settings else None
    if base is not None and not (isinstance(found.row.settings, type) and issubclass(found.row.settings, base)):
        raise PartError(f"{told}: its settings are no {base.__name__}", f"derive them from {place.settings}")
    if isinstance(found.row, Part) and not (isinstance(found.row.seconds, (int, float)) and 0 < found.row.seconds < math.inf):
        raise PartError(f"{told}: `seconds` must be a positive number, not {found.row.seconds!r}", "mend the row")


def _at(place: str) -> Any:
    module, _, attribute = place.partition(":")
    return getattr(import_module(module), attribute)


def names(choice: str) -> list[str]:
    """Every name that can stand in an experiment file: ours, then those of installed distributions."""
    ours = CHOICES[choice].rows
    return [*ours, *sorted(name for name in installed(choice) if name not in ours)]


def usable(choice: str) -> list[str]:
    """Those of :func:`names` that lead to a part."""

    def leads(name: str) -> bool:
        try:
            part(choice, name)
        except PartError:
            return False
        return True

    return [name for name in names(choice) if leads(name)]


def identity(choice: str, name: str, settings: Section) -> str:
    """What stands for a part in a digest: the name of one of ours, whose code the steps' versions stand for; else what it is.

    Raises:
        PartError: it cannot be used, or cannot say what its data is.
    """
    found = outside(choice, name)
    row, told = (part(choice, name), name) if found is None else (found.row, found.identity)
    data = row.data(settings) if isinstance(row, Part) else ""
    return f"{told} {data}" if data else told


def named_by(section: Section, key: str) -> str | None:
    """The choice whose parts the key of a section names; None where it names none."""
    field = type(section).model_fields[key]
    if (one := known(field)) is not None:
        return one.choice
    choices = (name for name, choice in CHOICES.items() if choice.settings and choice.key == key)
    return next((name for name in choices if isinstance(section, _at(str(CHOICES[name].settings)))), None)


def parts_beside(experiment: Section) -> list[tuple[str, Found]]:
    """The parts in files beside it that an experiment names, each with its choice."""
    beside = []
    for key in type(experiment).model_fields:
        value = getattr(experiment, key)
        if isinstance(value, Section):
            beside += parts_beside(value)
        elif (choice := named_by(experiment, key)) and (found := outside(choice, value)) and found.origin == FILE:
            beside.append((choice, found))
    return beside


def altered() -> list[str]:
    """Parts from outside whose installed code is another than what this process has loaded."""
    return [found.identity for (choice, _), found in _outside.items() if changed(found, choice)]


def mistakes(choice: str, settings: Section, experiment: Any) -> list[tuple[str, str]]:
    """What cannot work of a chosen part: (dotted key, what is wrong); also where the row itself fails to say."""
    row = part_of(choice, settings)
    try:
        row.data(settings)
        unknown = [role for role in row.roles(settings) if role not in type(experiment.models).model_fields]
        row.prompts(settings, experiment), row.unread(settings, experiment)
        wrong = [(CHOICES[choice].place, f"its row asks models.{role}, which is no role") for role in unknown]
        return wrong or list(row.mistakes(settings, experiment))
    except PartError as error:
        return [(CHOICES[choice].place, error.what)]


def part_of(choice: str, settings: Section) -> Any:
    """The row of the part that settings are of."""
    return part(choice, getattr(settings, CHOICES[choice].key))


def parts() -> Iterator[tuple[Choice, str, Part[Any]]]:
    """Every part that has settings and can be used: (the choice, its name, its row)."""
    for kind, choice in CHOICES.items():
        for name in usable(kind):
            if isinstance(row := part(kind, name), Part):
                yield choice, name, row


def either(names: Iterable[str]) -> str:
    """``'a', 'b' or 'c'``."""
    *others, last = map(repr, names)
    return f"{', '.join(others)} or {last}" if others else last


@dataclass(frozen=True, slots=True)
class Known:
    """Validator of a key that holds nothing but the name of a part."""

    choice: str

    def __call__(self, name: str) -> str:
        try:
            part(self.choice, name)
        except PartError as error:
            raise _unusable(error) from None
        except ValueError:
            raise ValueError(f"should be {either(names(self.choice))}") from None
        return name


UNUSABLE = "unusable_part"
"""Type of the mistake that a part from outside cannot be used: its message says it all."""


def _unusable(error: PartError) -> PydanticCustomError:
    return PydanticCustomError(UNUSABLE, "{what}", {"what": error.what})


@dataclass(frozen=True, slots=True)
class Chosen:
    """Validator of a section that is the settings of the part that it names."""

    choice: str
    default: str
    """Name of the part where the section names none."""
    base: type[Section]
    """What its settings must be."""
    words: tuple[Any, ...] = ()
    """Values that stand in place of a section."""

    def __call__(self, value: Any) -> Any:
        if isinstance(value, self.base) or any(value is word or value == word for word in self.words):
            return value
        if not isinstance(value, dict):
            words = "".join(f" or {word!r}" for word in self.words if word is not None)
            raise ValueError(f"should be a mapping{words}")
        name = self.name(value)
        try:
            settings = self._settings(name)
        except PartError as error:
            raise self._mistake(_unusable(error), name) from None
        if settings is None:
            raise self._mistake(PydanticCustomError("part", "should be {names}", {"names": either(self.names)}), name)
        try:
            return settings.model_validate({**value, self.key: name})
        except ValidationError:
            raise
        except Exception as error:  # in a validator that others wrote
            told = PartError(f"{self.choice} {name}: its settings: {describe_error(error)}")
            raise self._mistake(_unusable(told), name) from error

    def _mistake(self, error: PydanticCustomError, name: Any) -> ValidationError:
        return ValidationError.from_exception_data(self.choice, [InitErrorDetails(type=error, loc=(self.key,), input=name)])

    @property
    def key(self) -> str:
        """The key that names the part."""
        return CHOICES[self.choice].key

    def default_settings(self) -> Any:
        """What an absent section is."""
        return self({})

    def name(self, value: Mapping[str, Any]) -> Any:
        """Name of the part that a section's content names."""
        return value.get(self.key, self.default)

    def settings(self, value: Mapping[str, Any]) -> type[Section] | None:
        """The settings of that part; None where it may not stand here, or is not known."""
        try:
            return self._settings(self.name(value))
        except PartError:
            return None

    def _settings(self, name: Any) -> type[Section] | None:
        """Raises: PartError, the part comes from outside and cannot be used."""
        try:
            settings: type[Section] = part(self.choice, name).settings
        except ValueError:
            return None
        return settings if issubclass(settings, self.base) else None

    @property
    def names(self) -> list[str]:
        """Parts that may stand here."""
        return [name for name in names(self.choice) if self.settings({self.key: name}) is not None]

    def fields(self, name: str) -> Mapping[str, FieldInfo]:
        """Keys of one of them."""
        settings = self.settings({self.key: name})
        return settings.model_fields if settings is not None else {}


def chosen(field: FieldInfo) -> Chosen | None:
    """The :class:`Chosen` that validates a field, if one does."""
    return _validator(field, Chosen)


def known(field: FieldInfo) -> Known | None:
    """The :class:`Known` that validates a field, if one does."""
    return _validator(field, Known)


def _validator(field: FieldInfo, kind: type[V]) -> V | None:
    return next((found for m in field.metadata if isinstance(found := getattr(m, "func", None), kind)), None)
