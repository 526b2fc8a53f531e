from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Sequence
from typing import Any

import pytest
import web_fakes
from hypothesis import given
from hypothesis import strategies as st
from web_fakes import Heard, Reply, Web

from evolve_dag.agent.loop import run_episode
from evolve_dag.config.schema import RolloutSettings
from evolve_dag.environments.web.guard import Guard
from evolve_dag.environments.web.search import Searcher, listing, read_searxng, read_serper
from evolve_dag.environments.web.services import MAX_PAUSE, UNANSWERED, Service
from evolve_dag.environments.web.tools import ToolsEnvironment, ToolsWorld
from evolve_dag.errors import ConfigError, ModelError, UnjudgedError, UnreachableError
from evolve_dag.inference.scripted import ScriptedModel
from evolve_dag.protocols import ToolError
from evolve_dag.records import Message, Task, Trajectory
from evolve_dag.steps.policies import require_judged
from evolve_dag.verification.exact import ExactVerifier

JSON = {"Content-Type": "application/json"}
ANSWER = {
    "answerBox": {"title": "Mayor", "answer": "Rato Miku", "link": "https://a.example/box"},
    "organic": [
        {
            "title": "Bado  Keli\nhint:",
            "link": "https://a.example/1",
            "snippet": "The mayor\nof Bado Keli.",
            "date": "May 1, 2024",
        },
        {"title": "Mirror", "link": "https://sub.huggingface.co/x", "snippet": "leaked"},
        {"title": "Second", "link": "https://a.example/2"},
        "not an entry",
    ],
}


def answer(value: Any, status: int = 200, **headers: str) -> Reply:
    return Reply(value if isinstance(value, bytes) else json.dumps(value).encode(), status, {**JSON, **headers})


class Clock:
    """Pauses that take no time."""

    def __init__(self) -> None:
        self.pauses: list[float] = []

    async def sleep(self, seconds: float) -> None:
        self.pauses.append(seconds)


def serper(web: Web, clock: Clock | None = None, *, results: int = 10, seconds: float = 5.0, key: str = "k-e-y") -> Searcher:
    service = Service("Serper", seconds, sleep=(clock or Clock()).sleep)
    guard = Guard(["huggingface.co"])
    return Searcher("serper", results, seconds, web.base, guard.blocks, service, {"SERPER_API_KEY": key})


def searxng(web: Web, clock: Clock | None = None) -> Searcher:
    service = Service("SearXNG", 5.0, sleep=(clock or Clock()).sleep)
    return Searcher("searxng", 10, 5.0, f"{web.base}/", Guard(["huggingface.co"]).blocks, service, {})


def test_serper(web: Web) -> None:
    web.pages["/search"] = answer(ANSWER)
    assert asyncio.run(serper(web, results=2).ask("search", 'mayor of "Bado Keli"')) == (
        "2 results\n"
        "1. Mayor: Rato Miku (https://a.example/box)\n"
        "2. Bado Keli hint:: The mayor of Bado Keli.; May 1, 2024 (https://a.example/1)"
    )
    (heard,) = web.heard
    assert heard.method == "POST"
    assert heard.headers["x-api-key"] == "k-e-y"
    assert json.loads(heard.body) == {"q": 'mayor of "Bado Keli"', "num": 2}


def test_blocked_hosts_are_left_out(web: Web) -> None:
    web.pages["/search"] = answer(ANSWER)
    shown = asyncio.run(serper(web).ask("search", "x"))
    assert shown.startswith("3 results\n")
    assert "huggingface" not in shown
    assert "leaked" not in shown
    assert shown.endswith("3. Second (https://a.example/2)")


def test_scholar_by_serper(web: Web) -> None:
    web.pages["/scholar"] = answer(
        {
            "organic": [
                {"title": "On Bado", "link": "https://j.example/1", "publicationInfo": "R Miku - Nature, 2020", "citedBy": 12}
            ]
        }
    )
    assert asyncio.run(serper(web).ask("scholar", "bado")) == (
        "1 result\n1. On Bado: R Miku - Nature, 2020; cited by 12 (https://j.example/1)"
    )


def test_searxng(web: Web) -> None:
    web.pages["/search"] = answer(
        {
            "answers": ["42 people", {"answer": "Rato", "url": "https://a.example/"}],
            "results": [{"title": "T", "url": "https://b.example/", "content": "C", "publishedDate": "2024-01-02T00:00:00"}],
        }
    )
    assert asyncio.run(searxng(web).ask("search", "a&b=c")) == (
        "3 results\n1. answer: 42 people\n2. answer: Rato (https://a.example/)\n3. T: C; 2024-01-02 (https://b.example/)"
    )
    assert web.heard[0].path == "/search?q=a%26b%3Dc&format=json"
    asyncio.run(searxng(web).ask("scholar", "x"))
    assert web.heard[1].path == "/search?q=x&format=json&categories=science"


def test_nothing_found(web: Web) -> None:
    web.pages["/search"] = answer({})
    assert asyncio.run(serper(web).ask("search", "x")) == "no results"
    assert asyncio.run(searxng(web).ask("search", "x")) == "no results"


# ---------------------------------------------------------------- failures


def failing(times: int, reply: Reply, then: Any = None) -> Any:
    calls = 0

    def page(heard: Heard) -> Reply:
        nonlocal calls
        calls += 1
        return reply if calls <= times else answer(then if then is not None else ANSWER)

    return page


@pytest.mark.parametrize("reply", [answer(b"", 429), answer(b"", 500), answer(b"", 503), answer(b"<html>"), answer(b"")])
def test_what_passes_is_tried_again(web: Web, reply: Reply) -> None:
    clock = Clock()
    web.pages["/search"] = failing(3, reply)
    assert asyncio.run(serper(web, clock).ask("search", "x")).startswith("3 results")
    assert len(web.heard) == 4
    for number, pause in enumerate(clock.pauses):
        assert 0.5 * 2**number <= pause <= 2**number


@pytest.mark.parametrize(
    ("reply", "says"),
    [
        (answer(b"", 429), r"is overloaded \(status 429\)"),
        (answer(b"", 503), r"fails \(status 503\)"),
        (answer(b"<html>"), "answered with something that is not JSON"),
    ],
)
def test_an_outage_that_lasts_is_no_observation(web: Web, reply: Reply, says: str) -> None:
    """As an observation it made wrong answers of a whole night, which was stored."""
    clock = Clock()
    web.pages["/search"] = reply
    with pytest.raises(UnreachableError, match=f"Serper {says}; 5 attempts were made"):
        asyncio.run(serper(web, clock).ask("search", "x"))
    assert len(web.heard) == 5
    assert len(clock.pauses) == 4


def test_retry_after_is_honoured_up_to_a_limit(web: Web) -> None:
    clock = Clock()
    web.pages["/search"] = failing(1, answer(b"", 429, **{"Retry-After": "7"}))
    asyncio.run(serper(web, clock).ask("search", "x"))
    assert clock.pauses == [7.0]
    web.pages["/search"] = failing(1, answer(b"", 429, **{"Retry-After": "86400"}))
    asyncio.run(serper(web, clock).ask("search", "x"))
    assert clock.pauses[1:] == [MAX_PAUSE]


def test_a_service_that_hangs_or_is_gone(web: Web) -> None:
    def slow(heard: Heard) -> Reply:
        time.sleep(0.3)
        return answer(ANSWER)

    web.pages["/search"] = slow
    with pytest.raises(UnreachableError, match=r"did not answer within 0\.05 seconds"):
        asyncio.run(serper(web, seconds=0.05).ask("search", "x"))
    assert len(web.heard) == UNANSWERED
    with web_fakes.serve() as gone:
        pass
    with pytest.raises(UnreachableError, match="cannot be reached") as caught:
        asyncio.run(serper(gone).ask("search", "x"))
    assert "k-e-y" not in str(caught.value)


@pytest.mark.parametrize(
    ("reply", "says"),
    [
        (answer({"message": "Unauthorized."}, 403), "does not accept the key"),
        (answer({}, 401), "does not accept the key"),
        (answer({"message": "Not enough credits", "statusCode": 400}, 400), "no credit left"),
    ],
)
def test_what_no_call_can_mend_is_no_observation(web: Web, reply: Reply, says: str) -> None:
    """As an observation it would turn every episode into a wrong answer."""
    web.pages["/search"] = reply
    with pytest.raises(UnreachableError, match=says) as caught:
        asyncio.run(serper(web).ask("search", "x"))
    assert len(web.heard) == 1
    assert "k-e-y" not in str(caught.value)


def test_other_refusals_are_told_at_once(web: Web) -> None:
    web.pages["/search"] = answer({}, 400)
    with pytest.raises(ToolError, match="refuses the call"):
        asyncio.run(serper(web).ask("search", "x"))
    web.pages["/search"] = Reply(status=302, headers={"Location": "http://127.0.0.1:9/"})
    with pytest.raises(ToolError, match="status 302"):
        asyncio.run(serper(web).ask("search", "x"))
    with pytest.raises(ToolError, match="the query is longer than"):
        asyncio.run(searxng(web).ask("search", "x" * 10_000))
    assert len(web.heard) == 2


def test_an_instance_without_json_is_no_observation(web: Web) -> None:
    web.pages["/search"] = answer(b"", 403)
    with pytest.raises(UnreachableError, match=r"SearXNG does not give JSON \(status 403\)") as caught:
        asyncio.run(searxng(web).ask("search", "x"))
    assert "search.formats" in caught.value.remedy


def test_an_outage_of_the_search_makes_no_night_and_a_call_that_fails_once_does(web: Web) -> None:
    settings = ToolsEnvironment(tools=("search",), search="searxng", searxng=web.base, summarize=False)

    def script(messages: Sequence[Message]) -> str:
        if messages[-1].role == "tool":
            return "<answer>I do not know</answer>"
        return '<tool_call>\n{"name": "search", "arguments": {"query": "mayor"}}\n</tool_call>'

    async def episodes() -> list[Trajectory]:
        world = ToolsWorld(settings, extractor=None, identity="", memory=None, searcher=searxng(web))
        tasks = [Task(f"t{n}", "Who is mayor?", "Rato Miku") for n in range(10)]
        play = {"environment": world, "verifier": ExactVerifier(), "settings": RolloutSettings(max_steps=4), "seed": 1}
        return [await run_episode(task, 0, model=ScriptedModel(script), **play) for task in tasks]

    web.pages["/search"] = answer(b"", 503)
    played = asyncio.run(episodes())
    assert {(t.status, t.reward) for t in played} == {("failed", None)}
    with pytest.raises(UnjudgedError, match=r"10 of 10 episodes have no verdict; .*SearXNG fails \(status 503\)"):
        require_judged("rollouts", played, on_trial=True)
    web.pages["/search"] = failing(5, answer(b"", 503), {"results": []})
    played = asyncio.run(episodes())
    assert [t.reward for t in played] == [None, *[0.0] * 9]
    require_judged("rollouts", played)


def test_a_flood_is_cut_off(web: Web) -> None:
    web.pages["/search"] = Reply(chunks=lambda: (b" " * 1_000_000 for _ in range(100)), headers=JSON)
    with pytest.raises(ToolError, match="more than"):
        asyncio.run(serper(web).ask("search", "x"))


def test_missing_settings_are_named() -> None:
    with pytest.raises(ModelError, match="SERPER_API_KEY is not set") as caught:
        Searcher("serper", 10, 5.0, environment={}).check()
    assert "searxng" in caught.value.remedy
    with pytest.raises(ConfigError, match=r"environment\.searxng"):
        Searcher("searxng", 10, 5.0, "localhost:8080").check()
    with pytest.raises(ConfigError, match=r"environment\.searxng"):
        Searcher("searxng", 10, 5.0, "http://[::1").check()
    Searcher("searxng", 10, 5.0, "http://127.0.0.1:8080").check()


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=20),
    lambda inner: (
        st.lists(inner, max_size=4) | st.dictionaries(st.sampled_from(["title", "link", "url", "snippet", "x"]), inner)
    ),
    max_leaves=10,
)


@given(st.dictionaries(st.sampled_from(["organic", "answerBox", "results", "answers"]), json_values))
def test_any_json_gives_a_listing_of_one_line_an_entry(value: dict[str, Any]) -> None:
    for read in (read_serper, read_searxng):
        if isinstance(value.get("answers"), (int, str)) and read is read_searxng:
            continue
        found = read(value)
        lines = listing(found).split("\n")
        assert len(lines) == 1 + len(found)


@pytest.mark.parametrize("value", [[], "text", None, 3])
def test_what_is_no_listing(value: Any) -> None:
    for read in (read_serper, read_searxng):
        with pytest.raises(ToolError, match="not a listing"):
            read(value)
