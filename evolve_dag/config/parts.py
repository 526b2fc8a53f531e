"""What an experiment file chooses by name: environments, verifiers, extractors, selectors, backends, divergences, suites.

Of a *part* there is one row (:class:`Part`), and it stands in the part's own module, beside the code that it describes: the
settings that it alone has, how it is made, the models and prompts that it uses, what it needs. Here is only where each name
leads (:data:`CHOICES`); a row is imported when an experiment names it. :func:`part` is the one place where a name becomes code.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import import_module
from typing import Any, Generic, TypeVar

from pydantic import Field, ValidationError
from pydantic.fields import FieldInfo
from pydantic_core import InitErrorDetails, PydanticCustomError

from evolve_dag.config.section import MOST, Section


@dataclass(frozen=True, slots=True)
class Choice:
    """A place in an experiment file where a part is named."""

    key: str
    """The key that names it."""
    section: str | None
    """The section of the experiment that is this part's settings; None where the name stands alone or in several places."""
    rows: Mapping[str, str]
    """Name -> where its row is, ``module:attribute``."""

    @property
    def place(self) -> str:
        """As people write it: ``selection.selector``."""
        return f"{self.section}.{self.key}" if self.section else self.key


CHOICES: Mapping[str, Choice] = {
    "environment": Choice(
        "kind",
        "environment",
        {
            "pocket": "evolve_dag.environments.pocket.tools:POCKET",
            "corpus": "evolve_dag.environments.corpus:CORPUS",
            "tools": "evolve_dag.environments.web.tools:TOOLS",
        },
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
    ),
    "extractor": Choice(
        "extractor",
        "extraction",
        {
            "contrast": "evolve_dag.experience.extraction.mining:CONTRAST",
            "llm": "evolve_dag.experience.extraction.llm:LLM",
        },
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
    ),
    "backend": Choice(
        "backend",
        None,
        {
            "transformers": "evolve_dag.inference.backends:TRANSFORMERS",
            "vllm": "evolve_dag.inference.backends:VLLM",
            "openai": "evolve_dag.inference.backends:OPENAI",
        },
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
    ),
}

S = TypeVar("S", bound=Section)


def _nothing(settings: Any, experiment: Any = None) -> tuple[Any, ...]:
    return ()


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


def part(choice: str, name: str) -> Any:
    """The row of a part.

    Raises:
        ValueError: nothing has that name; says which names there are.
    """
    rows = CHOICES[choice].rows
    if not isinstance(name, str) or name not in rows:
        raise ValueError(f"unknown {choice} {name!r}: should be {either(rows)}")
    module, _, attribute = rows[name].partition(":")
    return getattr(import_module(module), attribute)


def part_of(choice: str, settings: Section) -> Any:
    """The row of the part that settings are of."""
    return part(choice, getattr(settings, CHOICES[choice].key))


def parts() -> Iterator[tuple[Choice, str, Part[Any]]]:
    """Every part that has settings: (the choice, its name, its row)."""
    for kind, choice in CHOICES.items():
        for name in choice.rows:
            row = part(kind, name)
            if isinstance(row, Part):
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
        except ValueError:
            raise ValueError(f"should be {either(CHOICES[self.choice].rows)}") from None
        return name


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
        name, settings = self.name(value), self.settings(value)
        if settings is None:
            wrong = PydanticCustomError("part", "should be {names}", {"names": either(self.names)})
            raise ValidationError.from_exception_data(self.choice, [InitErrorDetails(type=wrong, loc=(self.key,), input=name)])
        return settings.model_validate({**value, self.key: name})

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
            settings: type[Section] = part(self.choice, self.name(value)).settings
        except ValueError:
            return None
        return settings if issubclass(settings, self.base) else None

    @property
    def names(self) -> list[str]:
        """Parts that may stand here."""
        return [name for name in CHOICES[self.choice].rows if self.settings({self.key: name}) is not None]

    def fields(self, name: str) -> Mapping[str, FieldInfo]:
        """Keys of one of them."""
        settings = self.settings({self.key: name})
        return settings.model_fields if settings is not None else {}


def chosen(field: FieldInfo) -> Chosen | None:
    """The :class:`Chosen` that validates a field, if one does."""
    return next((found for m in field.metadata if isinstance(found := getattr(m, "func", None), Chosen)), None)


def known(field: FieldInfo) -> Known | None:
    """The :class:`Known` that validates a field, if one does."""
    return next((found for m in field.metadata if isinstance(found := getattr(m, "func", None), Known)), None)
