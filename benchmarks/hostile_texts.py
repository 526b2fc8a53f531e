"""Texts that make a careless reader take quadratic time, through every function that reads what others wrote.

Command: python benchmarks/hostile_texts.py [--megabytes 10] [--only NAME]

Prints processor seconds at an eighth of the size and at the whole of it, and their ratio: 8 is linear, 64 quadratic. All
figures come from one run. tests/test_hostile_texts.py sends the same texts through the same functions.
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from evolve_dag.agent.actions import parse_action
from evolve_dag.experience.extraction.llm_form import entities, tidy
from evolve_dag.experience.features import parse_observation, strip_last_step
from evolve_dag.experience.llm_text import shorten
from evolve_dag.experience.locality import locality, names_in
from evolve_dag.experience.phrases import split
from evolve_dag.experience.pool import principle_problems
from evolve_dag.experience.selection.lexical import _NAMED
from evolve_dag.inference.openai import _said, _wants_other_limit
from evolve_dag.inference.outgoing import cut_middle, neutral
from evolve_dag.inference.structured import extract_json
from evolve_dag.interop.pools import _MARKUP
from evolve_dag.interop.rollouts import _before_experience
from evolve_dag.plain import one_line, plain
from evolve_dag.prompts import fence
from evolve_dag.records import ExperienceItem, Step, Task, Trajectory
from evolve_dag.secrecy import excerpt, masker, read_key
from evolve_dag.verification.exact import normalise
from evolve_dag.verification.judge import read_word

KEY = "Zq9vK2xWb7LmT4YpRg6N"


@dataclass(frozen=True)
class Hostile:
    """One function with what it should not be slow on."""

    name: str
    read: Callable[[str], object]
    texts: Sequence[tuple[str, str, str]]
    """Beginning, what is repeated, end."""

    def text(self, number: int, characters: int) -> str:
        before, unit, after = self.texts[number]
        return f"{before}{unit * (characters // len(unit))}{after}"


def _repeated(*units: str) -> list[tuple[str, str, str]]:
    return [("", unit, "") for unit in units]


def _entities(text: str) -> object:
    step = Step(0, "search", (), (), observation=text)
    return entities(Task("t", "What?", "x"), [Trajectory("t#0", "t", 0, 0, "", "What?", (step,), "answered")])


def _mask(text: str) -> object:
    read_key("HOSTILE_KEY", {"HOSTILE_KEY": KEY})
    return masker()(text), excerpt(text)


CASES = (
    Hostile(
        "an action",
        parse_action,
        [
            *_repeated(
                "<tool_call>",
                "<answer>",
                "</tool_call>",
                "<tool_call></answer>",
                "</think>",
                "<tool_call>{",
                "<answer></tool_call>",
            ),
            *_repeated("<think>", "<answer></think>", "<tool_call></think>", "<answer><think></think>"),
            ("", "<answer></think>", "</answer>"),
            ("", "<tool_call></think>", "</tool_call>"),
            ("", "<answer><tool_call></think>", "</answer></tool_call>"),
            ("", "<answer></think><tool_call></answer>", "</tool_call>"),
            ("", '<tool_call>{"</think>": "<answer>"}</answer></think><answer>', "</tool_call>"),
            ("<tool_call>", "[", "</tool_call>"),
            ("<tool_call>", "<answer>", "</tool_call>"),
        ],
    ),
    Hostile(
        "a fence",
        lambda text: fence("page", text),
        [*_repeated("<", "< ", "</ ", "<data", "< / data"), ("<", " ", ""), ("</", "\n", "x"), ("<", " ", "/dat")],
    ),
    Hostile(
        "an answer in JSON",
        extract_json,
        [
            *_repeated(
                "```", "``` ", "`", '"', '\\"', "{", "[", '{"', '{"a":', "<think>", "</think>", '[1 \\"] ', "{}}", '{"\\'
            ),
            ("```", " ", "x"),
            ("```json", "\t ", "x"),
            ('{"', '\\"', ""),
            ("[", '"\\', ""),
            ("{", " ", ""),
        ],
    ),
    Hostile(
        "an observation",
        plain,
        [*_repeated("\u200b", "\u3164", "hin\n", "\u04bb", "h\u20dd", "\r", "\u2028"), ("", "\u200b", "hint:")],
    ),
    Hostile("one line", one_line, _repeated(" ", "a ", "\n")),
    Hostile("text to an endpoint", neutral, [*_repeated("<", "<s ", "<|", "[INST", "< /s>"), ("<tool_call", " ", "")]),
    Hostile(
        "a conversation that is too long",
        lambda text: cut_middle(text, len(text) // 3),
        _repeated("a", "\u00e9", "a\U0001f600"),
    ),
    Hostile("the middle left out", lambda text: shorten(text, 4_000), _repeated("a", "\n")),
    Hostile(
        "an error",
        _mask,
        [
            *_repeated("bearer ", "sk-", "://a:", "://a:b", "password=", "X-Amz-", KEY[:4], KEY[:-1], f"{KEY[:9]}…", KEY),
            ("password", " ", ""),
            ("bearer", " ", ""),
        ],
    ),
    Hostile("an endpoint's error", lambda text: (_said({"error": text}), _wants_other_limit(text)), _repeated("max_tokens ")),
    Hostile("a verdict", read_word, [*_repeated("not ", "correct", "incorrect ", "n't"), ("not", " ", "")]),
    Hostile("an answer", normalise, [*_repeated(".", "!", "5!", ",", " "), ("", ".", "x"), ("(" * 9_999, "a", ")" * 9_999)]),
    Hostile("names", names_in, [*_repeated("A", "Aa ", "A-", "a ", "A\n", "\u2019A"), ("A", " ", "")]),
    Hostile("names of a task", _entities, [*_repeated("A", "A-"), ("A", " ", "b")]),
    Hostile("names in a question", lambda text: _NAMED.sub(" ", text), [*_repeated("a", "Aa ", "A"), ("A", " ", "a")]),
    Hostile(
        "an item",
        principle_problems,
        [*_repeated("a-", "org-", "-", "a.", "Aa"), ("Verify: when ", "a, ", "\n."), ("Aa: when ", ", ", "")],
    ),
    Hostile("a principle", split, [("Verify: when ", "a, ", "."), ("Verify: when ", ", ", "x"), *_repeated("A", "A-")]),
    Hostile(
        "an item to tidy", tidy, [("Verify: when ", ".", "x"), ("Verify: when ", "a;", "x"), ("A", "-", ""), ("A", " ", ":")]
    ),
    Hostile(
        "conditions",
        lambda text: locality([ExperienceItem("p0001", text, "instance")]),
        [*_repeated("if ", "if-", "when,", "a-", "A"), ("if", " ", "")],
    ),
    Hostile(
        "the last line",
        strip_last_step,
        [*_repeated("last step:\n", "\n"), ("last step:", " ", "\nx"), ("last step:", "\n", "x")],
    ),
    Hostile(
        "a page",
        parse_observation,
        [*_repeated("a:", "a", "1", "- ", "1. a\n", "A: b; "), ("a: ", "b", ""), ("see", " ", "x"), ("see", ": ", "")],
    ),
    Hostile(
        "a system message",
        _before_experience,
        [*_repeated("\n", "Solve the input problem by leveraging "), ("", "\n", "**ACC")],
    ),
    Hostile("markup in an item", _MARKUP.search, _repeated("<a", "<!--", "<!-", "</", "<!-- ")),
)


def seconds(case: Hostile, number: int, characters: int) -> float:
    """Processor time of one reading."""
    text = case.text(number, characters)
    started = time.process_time()
    case.read(text)
    return time.process_time() - started


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--megabytes", type=float, default=10.0)
    parser.add_argument("--only", default="", help="cases whose name holds this")
    options = parser.parse_args()
    os.nice(5)
    whole = round(options.megabytes * 1e6)
    print(f"{'':32} {'worst text':40} {whole / 8e6:5.2f} MB {whole / 1e6:6.2f} MB  ratio")
    for case in CASES:
        if options.only in case.name:
            timed = [(seconds(case, n, whole // 8), seconds(case, n, whole), text) for n, text in enumerate(case.texts)]
            short, long, text = max(timed, key=lambda row: row[1])
            steepest = max((b / max(a, 0.01) for a, b, _ in timed if b > 0.1), default=0.0)  # shorter ones say nothing
            print(f"{case.name:32} {ascii(text[1])[:40]:40} {short:6.2f} s {long:7.2f} s {steepest:6.1f}", flush=True)


if __name__ == "__main__":
    main()
