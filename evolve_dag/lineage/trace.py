"""Lineage: from any artifact, experience item, trajectory or score row back to its origins and forward to its uses.

An answer can be walked back: score row -> adapter -> contexts -> injected items -> the trajectories that taught them
-> the policy that acted; and a lesson forward: item -> steps that saw it -> adapters trained on them -> scores.

Ids: a digest or its first six characters or more; the id of an item; ``<task id>#<rollout>`` for trajectories and score
rows, ``<condition>/<task id>#<rollout>`` for one score row. A row id that several artifacts hold finds all of them;
``<digest>/<row id>`` names one.
"""

from __future__ import annotations

import difflib
import json
import re
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from evolve_dag.errors import DataError
from evolve_dag.plain import printable
from evolve_dag.steps.base import STEP_ORDER
from evolve_dag.store.artifacts import Artifact, Store
from evolve_dag.store.graph import reach
from evolve_dag.store.mirror import configured
from evolve_dag.store.query import connect

if TYPE_CHECKING:
    import duckdb
    from rich.console import RenderableType
    from rich.tree import Tree

SHOWN = 5
"""Rows of one kind that a node spells out; the rest are counted."""
SHOWN_BELOW = 2
"""The same for what stands below such a row."""
PREFIX = 6
"""Fewest characters of a digest."""
_READ = {
    "items": "digest, id, text, granularity, condition, evidence, trajectory_ids, created, updated",
    "edits": 'digest, item_id, operation, edit_iteration, before, after, reason, trajectory_ids, "into"',
    "contexts": "digest, trajectory_id, step, selected",
    "steps": 'kind, digest, trajectory_id, "index", selected',
    "trajectories": "digest, id, status, reward, turns, tokens, answer",
    "scores": "digest, task_id, rollout, condition, reward, status, premature, turns, tokens, answer, metadata",
}
"""View -> the columns that a walk looks at."""
_CALLS = 20_000
"""Nested calls that a walk may need: 99 iterations are some 700 artifacts one behind the other, each a few calls deep."""
_SEEN = (
    "(SELECT digest, trajectory_id, step, selected FROM contexts "
    "UNION ALL SELECT digest, trajectory_id, \"index\", selected FROM steps WHERE kind <> 'contexts')"
)
"""Steps that had items in their context; of contexts only those that were learned from."""


@dataclass(frozen=True, slots=True)
class TraceNode:
    """One thing in a lineage."""

    kind: str
    """Artifact kind, or ``item``, ``edit``, ``trajectory``, ``step``, ``score``, ``input``, ``group`` (a heading), ``more``."""
    id: str
    """What :func:`trace` takes to start there; '' for a heading."""
    label: str
    """One line for people."""
    facts: Mapping[str, Any] = field(default_factory=dict)
    """JSON values."""
    children: tuple[TraceNode, ...] = ()
    """What it came from (in origins) or what came of it (in uses)."""

    def to_dict(self) -> dict[str, Any]:
        """The tree as JSON values."""
        children = [child.to_dict() for child in self.children]
        return {"kind": self.kind, "id": self.id, "label": self.label, "facts": dict(self.facts), "children": children}


@dataclass(frozen=True, slots=True)
class Trace:
    """Both directions from one id."""

    id: str
    """As it was asked for."""
    origins: TraceNode
    uses: TraceNode

    def to_dict(self) -> dict[str, Any]:
        """Both trees as JSON values."""
        return {"id": self.id, "origins": self.origins.to_dict(), "uses": self.uses.to_dict()}


def trace(store: Store, id: str, *, experiment: str | None = None) -> Trace:
    """Origins and uses of ``id``; when several things bear it, both roots are headings with one child each.

    Args:
        experiment: take only what an iteration of this experiment uses now.

    Raises:
        DataError: nothing in the store (or in ``experiment``) has that id (names near ones), or a digest is shorter than six
            characters.
        StoreError: an artifact is corrupt.
    """
    id = id.strip()
    with connect(store) as connection, deep():
        walk = _Walk(store, connection)
        starts = walk.starts(id)
        if not starts:
            raise walk.unknown(id)
        if experiment is not None:
            held = [start for start in starts if start.experiments(walk) & {experiment}]
            if not held:
                elsewhere = sorted(set().union(*(start.experiments(walk) for start in starts)))
                known = f"it is known in {', '.join(elsewhere)}" if elsewhere else "no iteration uses it now: leave out --of"
                raise DataError(f"{id!r}: nothing that {experiment} uses now has this id", known)
            starts = held
        starts.sort(key=lambda start: start.artifact not in walk.places)  # what an iteration uses now comes first
        origins = [start.origins(walk.fresh()) for start in starts]
        uses = [start.uses(walk.fresh()) for start in starts]
    if len(starts) == 1:
        return Trace(id, origins[0], uses[0])
    heading = f"{len(starts)} things bear the id {id} (<digest>/{id} names one)"
    return Trace(id, TraceNode("group", "", heading, {}, tuple(origins)), TraceNode("group", "", heading, {}, tuple(uses)))


@contextmanager
def deep() -> Iterator[None]:
    """Room for what goes along a whole lineage, one call in the other: :func:`trace`, and its trees as JSON text."""
    before = sys.getrecursionlimit()
    sys.setrecursionlimit(max(before, _CALLS))
    try:
        yield
    finally:
        sys.setrecursionlimit(before)


def render(traced: Trace) -> RenderableType:
    """Two trees for a rich console. Artifacts that come one from the other stand below each other, each with ``from`` (or
    ``into``, in the uses) to the one above: set in, the third night of a lineage would be out of the terminal."""
    from rich.console import Group
    from rich.text import Text
    from rich.tree import Tree

    def grow(top: Tree, node: TraceNode, word: str) -> None:
        place = top
        while True:
            links = [child for child in node.children if child.kind in STEP_ORDER]
            alone = links[0] if len(links) == 1 else None
            for child in node.children:
                if child is not alone:
                    grow(place.add(line(child)), child, word)
            if alone is None:
                return
            node, place = alone, top.add(Text.assemble((f"{word} ", "dim"), line(alone)))

    def line(node: TraceNode) -> Text:  # Text, not markup: labels hold what models wrote
        text = Text(node.kind if node.kind not in ("group", "more") else "", style="bold cyan")
        text.append(printable(f" {node.label}" if text else node.label), style="default")
        facts = ", ".join(f"{name} {_short(value)}" for name, value in node.facts.items() if value not in (None, "", [], {}))
        return text.append(printable(f"  ({facts})"), style="dim") if facts else text

    parts: list[RenderableType] = []
    for heading, root, word in (("origins", traced.origins, "from"), ("uses", traced.uses, "into")):
        top = Tree(Text(heading, style="bold"))
        grow(top.add(line(root)), root, word)
        if not root.children:
            top.add(Text("nothing", style="dim"))
        parts.append(top)
    return Group(*parts)


@dataclass(frozen=True, slots=True)
class _Start:
    """One thing that bears the id."""

    kind: str
    artifact: str
    """Digest of the artifact that is it or holds it; for an item, of the earliest pool of its lineage."""
    row: str = ""
    """Item id, trajectory id or ``<task>#<rollout>``."""
    condition: str = ""
    """Of a score row."""

    def experiments(self, walk: _Walk) -> set[str]:
        """Experiments that use what bears the id; an item also where a later pool of its lineage holds it."""
        holders = {self.artifact}
        if self.kind == "item":
            holders |= {one for one in walk.descendants(self.artifact) if walk.artifacts[one].kind == "experience"}
        return {place.split("|")[0] for one in holders for place in walk.places.get(one, ())}

    def origins(self, walk: _Walk) -> TraceNode:
        if self.kind == "item":
            return walk.item_origins(self.artifact, self.row)
        if self.kind == "trajectory":
            return walk.trajectory_origins(self.artifact, self.row)
        if self.kind == "score":
            return walk.score(self.artifact, self.row, self.condition, back=True)
        return walk.artifact_origins(self.artifact)

    def uses(self, walk: _Walk) -> TraceNode:
        if self.kind == "item":
            return walk.item_uses(self.artifact, self.row)
        if self.kind == "trajectory":
            return walk.trajectory_uses(self.artifact, self.row)
        if self.kind == "score":
            return walk.score(self.artifact, self.row, self.condition, back=False)
        return walk.artifact_uses(self.artifact)


class _Walk:
    """The artifact graph, the rows behind it, and what one tree has already spelled out."""

    def __init__(self, store: Store, connection: duckdb.DuckDBPyConnection) -> None:
        self.connection = connection
        self.artifacts: dict[str, Artifact] = {one.digest: one for one in store.artifacts()}
        self.places: dict[str, list[str]] = {}
        by_place: dict[tuple[str, int, str], str] = {}
        for ref in store.refs():
            self.places.setdefault(ref.digest, []).append(f"{ref.experiment}|{ref.iteration:02d}")
            by_place[ref.experiment, ref.iteration, ref.kind] = ref.digest
        self.inputs: dict[str, dict[str, str]] = {}
        for digest, one in self.artifacts.items():
            self.inputs[digest] = dict(one.inputs)
            if one.kind == "policy":  # a policy is told by what it is: its parts stand in its config
                parts = one.manifest.config.get("policy")
                parts = parts if isinstance(parts, Mapping) else {}
                self.inputs[digest] |= {
                    name: parts[name] for name in ("adapter", "experience") if isinstance(parts.get(name), str)
                }
        for (experiment, iteration, kind), digest in by_place.items():
            decided = by_place.get((experiment, iteration - 1, "promotion"))
            if kind == "policy" and decided is not None and digest in self.inputs:
                self.inputs[digest][f"promotion of {experiment}|{iteration - 1:02d}"] = decided
        self.users: dict[str, list[str]] = {}
        for digest, inputs in self.inputs.items():
            for upstream in dict.fromkeys(inputs.values()):
                self.users.setdefault(upstream, []).append(digest)
        self.seen: set[str] = set()
        self._made_from: dict[str, set[str]] = {}
        for view, columns in _READ.items():
            # Read once, under the view's name: a question to a view opens the files of all artifacts, and a walk has hundreds.
            connection.execute(f"CREATE TEMP TABLE {view} AS SELECT DISTINCT {columns} FROM memory.main.{view}")

    def fresh(self) -> _Walk:
        """Itself, with nothing spelled out: what one tree has shown must not be missing in the next."""
        self.seen = set()
        return self

    # -- finding

    def starts(self, id: str) -> list[_Start]:
        """Everything that bears ``id``."""
        if id.lower() in self.artifacts:
            return [_Start("artifact", id.lower())]
        starts = self._rows(id, None)
        if not starts and "/" in id:
            prefix, row = id.split("/", 1)
            holders = self._digests(prefix)
            starts = self._rows(row, holders) if holders else []
        return starts or [_Start("artifact", digest) for digest in self._digests(id)]

    def _digests(self, prefix: str) -> list[str]:
        if not re.fullmatch(r"[0-9a-fA-F]{1,32}", prefix):
            return []
        found = sorted(digest for digest in self.artifacts if digest.startswith(prefix.lower()))
        if found and len(prefix) < PREFIX:
            raise DataError(f"{prefix!r}: too short for a digest", f"give at least {PREFIX} characters, e.g. {found[0][:12]}")
        return found

    def _rows(self, row: str, holders: Sequence[str] | None) -> list[_Start]:
        pools = self._query(
            "SELECT digest FROM items WHERE id = ? UNION SELECT digest FROM edits WHERE item_id = ? ORDER BY 1", row, row
        )
        starts = [_Start("item", digest, row) for digest in self._earliest([one["digest"] for one in pools])]
        scored = self._query(
            "SELECT DISTINCT digest, task_id || '#' || rollout AS id, condition FROM scores "
            "WHERE id = ? OR condition || '/' || id = ? ORDER BY ALL",
            row,
            row,
        )
        rolled = self._query("SELECT DISTINCT digest FROM trajectories WHERE id = ? ORDER BY 1", row)
        shown = {one["digest"] for one in scored}  # the trajectory of a score row is told with the score row
        starts += [_Start("trajectory", one["digest"], row) for one in rolled if one["digest"] not in shown]
        starts += [_Start("score", one["digest"], one["id"], one["condition"]) for one in scored]
        return [start for start in starts if holders is None or start.artifact in holders]

    def _earliest(self, pools: list[str]) -> list[str]:
        """Of pools that hold one item, those that have none of the others among their ancestors."""
        return [pool for pool in pools if self.ancestors(pool).isdisjoint({*pools} - {pool})]

    def unknown(self, id: str) -> DataError:
        """The error for an id that nothing bears, with near ones."""
        rows = self._query(
            "SELECT DISTINCT id FROM items UNION SELECT DISTINCT id FROM trajectories "
            "UNION SELECT DISTINCT task_id || '#' || rollout FROM scores"
        )
        known = sorted(one["id"] for one in rows)
        wanted = id.rsplit("/", 1)[-1]
        near: list[str] = []
        if wanted:
            near += [name for name in known if wanted.lower() in name.lower()][:3]
            near += difflib.get_close_matches(wanted, known, 3, 0.5)
            starts = {digest[: len(id)]: digest for digest in self.artifacts}
            near += [starts[name][:12] for name in difflib.get_close_matches(id.lower(), starts, 2, 0.7)]
        if near:
            return DataError(f"{id!r}: nothing in the store has this id", f"near: {', '.join(list(dict.fromkeys(near))[:6])}")
        if not self.artifacts:
            pull = "bring here what the mirror holds (`evolve mirror pull`), " if configured() else ""
            return DataError(f"{id!r}: the store is empty", f"{pull}run an experiment first, or name its store with --store")
        return DataError(
            f"{id!r}: nothing in the store has this id",
            "give a digest (`evolve status` shows them), an item id or <task id>#<rollout>; "
            'list them with evolve sql "select id, text from items"',
        )

    def _query(self, text: str, *values: Any) -> list[dict[str, Any]]:
        cursor = self.connection.execute(text, values)
        names = [column[0] for column in cursor.description or []]
        found = [dict(zip(names, row, strict=True)) for row in cursor.fetchall()]
        for one in found:  # text in Parquet, mappings here
            one.update({name: json.loads(one[name]) for name in ("evidence", "metadata") if one.get(name)})
            if (one.get("condition") or "").startswith("{"):  # of an item; that of a score is one word
                one["condition"] = json.loads(one["condition"])
        return found

    # -- the artifact graph

    def ancestors(self, digest: str) -> set[str]:
        """Digests of everything that ``digest`` was made from."""
        if digest not in self._made_from:
            first = self.inputs.get(digest, {}).values()
            self._made_from[digest] = reach(first, lambda one: self.inputs.get(one, {}).values())
        return self._made_from[digest]

    def descendants(self, digest: str) -> set[str]:
        """Digests of everything that was made from ``digest``."""
        return reach(self.users.get(digest, ()), lambda one: self.users.get(one, ()))

    def _order(self, digests: Iterable[str]) -> list[str]:
        def rank(digest: str) -> tuple[str, int, str]:
            kind = self.artifacts[digest].kind if digest in self.artifacts else ""
            place = min(self.places.get(digest, ["~"]))
            return place, STEP_ORDER.index(kind) if kind in STEP_ORDER else len(STEP_ORDER), digest

        return sorted(digests, key=rank)

    def _artifact(self, digest: str, children: tuple[TraceNode, ...] = (), **facts: Any) -> TraceNode:
        one = self.artifacts[digest]
        places = self.places.get(digest, [])
        label = digest[:12] + (f"  {', '.join(places)}" if places else "  (no iteration uses it now)")
        return TraceNode(one.kind, digest, label, {**facts, "created": one.manifest.created}, children)

    def artifact_origins(self, digest: str, role: str = "") -> TraceNode:
        """An artifact over what it was made from; each artifact is spelled out once."""
        if digest not in self.artifacts:
            return TraceNode("input", digest, f"{role} {digest[:12]}".strip())
        if digest in self.seen:
            return TraceNode(self.artifacts[digest].kind, digest, f"{digest[:12]}  (see above)")
        self.seen.add(digest)
        children: list[TraceNode] = []
        if self.artifacts[digest].kind == "contexts":
            children += self._taught_by(digest)
        inputs = self.inputs[digest]
        inside = [upstream for upstream in dict.fromkeys(inputs.values()) if upstream in self.artifacts]
        # An input that another input was made from stands below that one, so the tree reads as one chain.
        nearest = [one for one in inside if not any(one in self.ancestors(other) for other in inside)]
        children += [self.artifact_origins(upstream) for upstream in reversed(self._order(nearest))]
        children += [self.artifact_origins(value, name) for name, value in inputs.items() if value not in self.artifacts]
        return self._artifact(digest, tuple(children))

    def artifact_uses(self, digest: str) -> TraceNode:
        """An artifact over what was made from it; each artifact is spelled out once."""
        if digest in self.seen:
            return TraceNode(self.artifacts[digest].kind, digest, f"{digest[:12]}  (see above)")
        self.seen.add(digest)
        return self._artifact(digest, tuple(self._later(digest)))

    def _later(self, digest: str) -> list[TraceNode]:
        """What was made from an artifact; what was made from one of these too stands below that one."""
        users = self.users.get(digest, [])
        nearest = [one for one in users if not any(other in self.ancestors(one) for other in users)]
        return [self.artifact_uses(user) for user in self._order(nearest)]

    # -- rows

    def _taught_by(self, contexts: str) -> list[TraceNode]:
        """Items that stood in the learned steps of a contexts artifact, with what taught each."""
        counts = self._query(
            "SELECT item, count(*) AS n FROM (SELECT DISTINCT trajectory_id, step, unnest(selected) AS item "
            "FROM contexts WHERE digest = ?) GROUP BY item ORDER BY n DESC, item",
            contexts,
        )
        nodes = []
        for row in counts[:SHOWN]:
            pool = self._pool_before(contexts, row["item"])
            taught = self._item_facts(pool, row["item"]).get("trajectory_ids", []) if pool else []
            below = tuple(TraceNode("trajectory", one, one) for one in taught[:SHOWN_BELOW])
            facts = {"steps": row["n"], "taught by": len(taught)}
            label = f"{row['item']}: {self._item_text(pool, row['item']) if pool else ''}"
            nodes.append(TraceNode("item", row["item"], label, facts, below + _more(taught, "trajectories", SHOWN_BELOW)))
        return [*nodes, *_more(counts, "items")]

    def _pool_before(self, digest: str, item: str) -> str | None:
        """The latest pool that ``digest`` was made from and that holds ``item``."""
        before = self.ancestors(digest)
        pools = [
            one["digest"]
            for one in self._query("SELECT DISTINCT digest FROM items WHERE id = ?", item)
            if one["digest"] in before
        ]
        last = [pool for pool in pools if not any(pool in self.ancestors(other) for other in pools)]
        return sorted(last)[0] if last else None

    def _item_facts(self, pool: str, item: str) -> dict[str, Any]:
        rows = self._query(
            "SELECT text, granularity, condition, evidence, trajectory_ids, created, updated FROM items "
            "WHERE digest = ? AND id = ? LIMIT 1",
            pool,
            item,
        )
        return rows[0] if rows else {}

    def _item_text(self, pool: str, item: str) -> str:
        text = self._item_facts(pool, item).get("text")
        if text is None:
            rows = self._query(
                "SELECT coalesce(after, before) AS text FROM edits WHERE digest = ? AND item_id = ? ORDER BY edit_iteration",
                pool,
                item,
            )
            text = rows[-1]["text"] if rows else ""
        return _short(text)

    def _lineage(self, pool: str, item: str) -> list[str]:
        """Pools that hold or edited ``item``: ``pool`` and what came of it, oldest first."""
        rows = self._query("SELECT digest FROM items WHERE id = ? UNION SELECT digest FROM edits WHERE item_id = ?", item, item)
        after = self.descendants(pool) | {pool}
        found = [one["digest"] for one in rows if one["digest"] in after]
        return sorted(found, key=lambda digest: (len(self.ancestors(digest)), digest))

    def _item_node(self, pool: str, item: str, children: Sequence[TraceNode]) -> TraceNode:
        facts = dict(self._item_facts(pool, item))
        taught = facts.pop("trajectory_ids", [])
        facts.pop("text", None)
        label = f"{item}: {self._item_text(pool, item)}"
        return TraceNode("item", item, label, {**facts, "taught by": len(taught)}, tuple(children))

    def item_origins(self, pool: str, item: str) -> TraceNode:
        """An item over each edit of it and the trajectories that caused the edit."""
        children: list[TraceNode] = []
        told: set[tuple[Any, ...]] = set()
        lineage = self._lineage(pool, item)
        for digest in lineage:
            edits = self._query(
                "SELECT DISTINCT operation, edit_iteration AS iteration, before, after, reason, trajectory_ids, "
                '"into" FROM edits '
                "WHERE digest = ? AND item_id = ? ORDER BY iteration",
                digest,
                item,
            )
            nodes = []
            for edit in edits:
                key = (edit["operation"], edit["iteration"], edit["before"], edit["after"], edit["reason"])
                if key in told:
                    continue  # a pool carries the edits of its predecessors
                told.add(key)
                facts = {name: edit[name] for name in ("iteration", "before", "after", "into") if edit[name] is not None}
                causes = self._trajectories(self._beside(digest, "trajectories"), edit["trajectory_ids"])
                nodes.append(TraceNode("edit", item, f"{edit['operation']}: {edit['reason']}", facts, causes))
            if nodes or digest == pool:
                if not nodes:  # a pool without recorded edits still names what taught the item
                    taught = self._item_facts(digest, item).get("trajectory_ids", [])
                    nodes = list(self._trajectories(self._beside(digest, "trajectories"), taught))
                children.append(self._artifact(digest, tuple(nodes)))
        first = self.inputs.get(pool, {})
        children += [self.artifact_origins(one) for one in self._order(first.values()) if one in self.artifacts]
        return self._item_node(self._latest_holding(lineage, item), item, children)

    def _latest_holding(self, lineage: Sequence[str], item: str) -> str:
        holding = [digest for digest in lineage if self._item_facts(digest, item)]
        return holding[-1] if holding else lineage[-1]

    def _beside(self, digest: str, kind: str) -> list[str]:
        return [
            one for one in self.inputs.get(digest, {}).values() if one in self.artifacts and self.artifacts[one].kind == kind
        ]

    def _trajectories(self, artifacts: Sequence[str], ids: Sequence[str]) -> tuple[TraceNode, ...]:
        """Nodes of the first trajectories of ``ids``, looked up in ``artifacts``."""
        nodes = []
        for id in ids[:SHOWN]:
            holder = next((one for one in artifacts if self._trajectory_facts(one, id)), None)
            facts = self._trajectory_facts(holder, id) if holder else {}
            nodes.append(TraceNode("trajectory", f"{holder[:12]}/{id}" if holder else id, id, facts))
        return (*nodes, *_more(ids, "trajectories"))

    def item_uses(self, pool: str, item: str) -> TraceNode:
        """An item over the artifacts whose steps saw it, and what was made of those."""
        lineage = self._lineage(pool, item)
        after = self.descendants(pool)
        seen = self._query(
            "SELECT digest, count(*) AS steps, count(DISTINCT trajectory_id) AS trajectories FROM "
            f"(SELECT DISTINCT digest, trajectory_id, step FROM {_SEEN} WHERE list_contains(selected, ?)) GROUP BY digest",
            item,
        )
        facts = {one["digest"]: one for one in seen if one["digest"] in after}
        children = []
        for digest in self._order(facts):
            found = facts[digest]
            nodes = [*self._steps_with(digest, item)]
            if digest not in self.seen:
                self.seen.add(digest)
                nodes += self._later(digest)
            children.append(self._artifact(digest, tuple(nodes), steps=found["steps"], trajectories=found["trajectories"]))
        return self._item_node(self._latest_holding(lineage, item), item, children)

    def _steps_with(self, digest: str, item: str) -> tuple[TraceNode, ...]:
        rows = self._query(
            f"SELECT DISTINCT trajectory_id, step FROM {_SEEN} WHERE digest = ? AND list_contains(selected, ?) ORDER BY ALL",
            digest,
            item,
        )
        nodes = []
        for row in rows[:SHOWN]:
            id = row["trajectory_id"]
            label = f"{id} step {row['step']}"
            nodes.append(TraceNode("step", f"{digest[:12]}/{id}", label, self._trajectory_facts(digest, id)))
        return (*nodes, *_more(rows, "steps"))

    def _trajectory_facts(self, digest: str, id: str) -> dict[str, Any]:
        rows = self._query(
            "SELECT status, reward, turns, tokens, answer FROM trajectories WHERE digest = ? AND id = ? LIMIT 1", digest, id
        )
        return {name: value for name, value in rows[0].items() if value is not None} if rows else {}

    def _selected(self, digest: str, id: str) -> list[TraceNode]:
        """Items that stood in the context of a trajectory's steps."""
        rows = self._query(
            'SELECT item, count(*) AS n FROM (SELECT DISTINCT "index", unnest(selected) AS item FROM steps '
            "WHERE digest = ? AND trajectory_id = ?) GROUP BY item ORDER BY n DESC, item",
            digest,
            id,
        )
        nodes = []
        for row in rows:
            pool = self._pool_before(digest, row["item"])
            text = self._item_text(pool, row["item"]) if pool else ""
            nodes.append(TraceNode("item", row["item"], f"{row['item']}: {text}", {"steps": row["n"]}))
        return nodes

    def trajectory_origins(self, digest: str, id: str) -> TraceNode:
        """A trajectory over the items it saw and the artifact that holds it."""
        children = (*self._selected(digest, id), self.artifact_origins(digest))
        return self._trajectory(digest, id, children)

    def trajectory_uses(self, digest: str, id: str) -> TraceNode:
        """A trajectory over the items it taught and the contexts that learned from it."""
        children = []
        pools = [one for one in self.users.get(digest, ()) if self.artifacts[one].kind == "experience"]
        for pool in self._order(pools):
            taught = self._taught_in(pool, id)
            nodes = tuple(TraceNode("item", item, f"{item}: {_short(text)}") for item, text in taught.items())
            if nodes:
                children.append(self._artifact(pool, nodes))
        for holder in self._order({digest, *self.users.get(digest, ())}):
            steps = self._query(
                "SELECT count(DISTINCT step) AS n FROM contexts WHERE digest = ? AND trajectory_id = ?", holder, id
            )[0]["n"]
            # The teacher's own trajectories bear the same ids as those of the training rollouts.
            learned = holder == digest or self.artifacts[holder].manifest.config.get("regime.source") == "student"
            if steps and learned and self.artifacts[holder].kind == "contexts":
                self.seen.add(holder)
                children.append(self._artifact(holder, tuple(self._later(holder)), steps=steps))
        return self._trajectory(digest, id, children)

    def _taught_in(self, pool: str, id: str) -> dict[str, str]:
        """Item id -> text of what a trajectory caused in the pool of its own iteration.

        A pool carries items and edits of earlier iterations, whose trajectories bear the same ids: those do not count.
        """
        before = ["", *self.ancestors(pool)]
        rows = self._query(
            "SELECT DISTINCT item_id AS id, coalesce(after, before) AS text, edit_iteration FROM edits e "
            "WHERE digest = ? AND list_contains(trajectory_ids, ?) AND NOT EXISTS (SELECT 1 FROM edits o "
            "WHERE list_contains(?, o.digest) AND o.item_id = e.item_id AND o.operation = e.operation "
            "AND o.edit_iteration = e.edit_iteration AND o.reason = e.reason) ORDER BY edit_iteration",
            pool,
            id,
            before,
        )
        rows += self._query(
            "SELECT DISTINCT id, text FROM items WHERE digest = ? AND list_contains(trajectory_ids, ?) "
            "AND id NOT IN (SELECT id FROM items WHERE list_contains(?, digest)) ORDER BY id",
            pool,
            id,
            before,
        )
        return {row["id"]: row["text"] for row in rows}

    def _trajectory(self, digest: str, id: str, children: Sequence[TraceNode]) -> TraceNode:
        label = f"{id}  in {self.artifacts[digest].kind} {digest[:12]}"
        return TraceNode("trajectory", f"{digest[:12]}/{id}", label, self._trajectory_facts(digest, id), tuple(children))

    def score(self, digest: str, row: str, condition: str, *, back: bool) -> TraceNode:
        """A score row over the items it saw and its artifact's origins, or over the uses of its artifact."""
        facts = self._query(
            "SELECT reward, status, premature, turns, tokens, answer, metadata FROM scores "
            "WHERE digest = ? AND task_id || '#' || rollout = ? AND condition = ? LIMIT 1",
            digest,
            row,
            condition,
        )[0]
        id = f"{condition}/{row}"
        # One artifact holds a task's rollouts under several conditions, so its trajectories bear the condition too.
        below = (*self._selected(digest, id), self.artifact_origins(digest)) if back else (self.artifact_uses(digest),)
        return TraceNode("score", f"{digest[:12]}/{id}", f"{row}  {condition}", facts, below)


def _more(rows: Sequence[Any], what: str, shown: int = SHOWN) -> tuple[TraceNode, ...]:
    left = len(rows) - shown
    return (TraceNode("more", "", f"and {left} more {what}"),) if left > 0 else ()


def _short(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, Mapping):
        value = " ".join(f"{name}={_short(inner)}" for name, inner in value.items())
    text = " ".join(str(value).split())
    return text if len(text) <= 100 else text[:99] + "…"
