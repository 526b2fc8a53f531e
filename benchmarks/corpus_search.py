"""How many searches a second the corpus answers: one by one, in batches, and from memory.

Command: python benchmarks/corpus_search.py [--pages 400] [--queries 2048]

All figures come from one run over one corpus. The last comparison is what the agent loop does: many episodes that
search at once in one event loop (answered by one SQL statement) against one after the other.
"""

from __future__ import annotations

import argparse
import asyncio
import statistics
import time
from collections.abc import Callable
from random import Random

from evolve_dag.environments.corpus import CorpusSearch, Page
from evolve_dag.records import ToolCall

REPEATS = 3
SYLLABLES = [consonant + vowel for consonant in "bdfgklmnprstvz" for vowel in "aeiou"]


def corpus_and_queries(pages: int, queries: int) -> tuple[list[Page], list[str]]:
    """Random titles of a kind and two of 120 words, two lines of text each; queries of two words and an attribute."""
    rng = Random(0)
    vocabulary = [rng.choice(SYLLABLES) + rng.choice(SYLLABLES) for _ in range(120)]

    def name() -> str:
        return " ".join(rng.sample(vocabulary, 2))

    titles: dict[str, None] = {}
    while len(titles) < pages:
        titles[f"{rng.choice(['city', 'river', 'person'])} {name()}"] = None
    made = [Page(title, f"mayor: person {name()}\nstream: river {name()}") for title in titles]
    return made, [f"{name()} {rng.choice(['mayor', 'stream'])}" for _ in range(queries)]


def rate(answer: Callable[[CorpusSearch], None], pages: list[Page], queries: int, *, twice: bool = False) -> float:
    """Median queries per second over fresh corpora (nothing remembered), or of the second pass with ``twice``."""
    found = []
    for _ in range(REPEATS):
        corpus = CorpusSearch(pages)
        if twice:
            answer(corpus)
        started = time.perf_counter()
        answer(corpus)
        found.append(queries / (time.perf_counter() - started))
    return statistics.median(found)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--pages", type=int, default=400)
    parser.add_argument("--queries", type=int, default=2048)
    options = parser.parse_args()
    pages, queries = corpus_and_queries(options.pages, options.queries)
    calls = [ToolCall("search", {"query": query}) for query in queries]

    def batched(size: int) -> Callable[[CorpusSearch], None]:
        def run(corpus: CorpusSearch) -> None:
            for start in range(0, len(queries), size):
                corpus.search_many(queries[start : start + size])

        return run

    def one_after_the_other(corpus: CorpusSearch) -> None:
        async def episode() -> None:
            for call in calls:
                await corpus.call(call)

        asyncio.run(episode())

    def many_episodes(corpus: CorpusSearch) -> None:
        async def episode(own: list[ToolCall]) -> None:
            for call in own:
                await corpus.call(call)

        async def everybody() -> None:
            await asyncio.gather(*(episode(calls[n::128]) for n in range(128)))

        asyncio.run(everybody())

    print(f"{len(pages)} pages, {len(set(queries))} distinct of {len(queries)} queries, median of {REPEATS}, queries/s")
    rows = [(f"search_many, {size} at a time", batched(size), False) for size in (1, 16, 64, 128)]
    rows += [
        ("search_many, 128 at a time, remembered", batched(128), True),
        ("await call, one after the other", one_after_the_other, False),
        ("await call, 128 episodes at once", many_episodes, False),
    ]
    for label, answer, twice in rows:
        print(f"  {label:42}{rate(answer, pages, len(queries), twice=twice):>12,.0f}")


if __name__ == "__main__":
    main()
