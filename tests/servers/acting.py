"""A policy for corpus worlds, played by the test server: what it does follows from the request alone.

It looks its way from the entity that the question names to the one that is asked for. Where the request's seed is a
multiple of three it believes the excerpt of a listing (which may be stale) in place of the page, unless a hint tells it to
visit: so rollouts of a task differ, and experience in context can be seen to work.
"""

from __future__ import annotations

import json
import re
from typing import Any

_ENTITY = r"[a-z]+ [A-Z]\w+ [A-Z]\w+"


def act(body: dict[str, Any]) -> str:
    """The next action: a thought that says where it stands, then a tool call or the answer."""
    users = [m["content"] for m in body["messages"] if m["role"] == "user"]
    earlier = [m["content"] for m in body["messages"] if m["role"] == "assistant"]
    question = users[0].split("\n")[0].removeprefix("What is the ").rstrip("?")
    *outer, inner = question.split(" of the ")
    attribute, _, entity = inner.partition(" of ")
    plan = [attribute, *reversed(outer)]
    hop = 0
    if earlier and (stand := re.match(rf"at ({_ENTITY}) after (\d+)", earlier[-1])):
        entity, hop = stand[1], int(stand[2])
    seen = users[-1] if earlier else ""
    careful = "visit" in users[-1].partition("\nhint:\n")[2] or int(body.get("seed", 0)) % 3 != 0
    if "last step: answer now" in users[-1] or hop >= len(plan):
        return _answer(entity, hop)

    if "page: " in seen:
        if redirect := re.search(rf"^see: ({_ENTITY})", seen, re.M):
            return _call(redirect[1], hop, "visit", page=redirect[1])
        value = re.search(rf"^{plan[hop]}: ({_ENTITY})", seen, re.M)
        if value is None:
            return _answer(entity, hop)
        return _arrive(value[1], hop + 1, plan)
    if re.search(r"\d+ results?\n", seen):
        excerpt = re.search(rf"^\d+\. {entity}: .*?{plan[hop]}: ({_ENTITY})", seen, re.M)
        if excerpt and not careful:
            return _arrive(excerpt[1], hop + 1, plan)
        return _call(entity, hop, "visit", page=entity)
    if "no results" in seen or "no page" in seen:
        return _answer(entity, hop)
    return _call(entity, hop, "search", query=f"{entity} {plan[hop]}")


def _arrive(entity: str, hop: int, plan: list[str]) -> str:
    return _answer(entity, hop) if hop == len(plan) else _call(entity, hop, "search", query=f"{entity} {plan[hop]}")


def _call(entity: str, hop: int, name: str, **arguments: str) -> str:
    call = json.dumps({"name": name, "arguments": arguments})
    return f"at {entity} after {hop}\n<tool_call>\n{call}\n</tool_call>"


def _answer(entity: str, hop: int) -> str:
    return f"at {entity} after {hop}\n<answer>{entity.partition(' ')[2]}</answer>"
