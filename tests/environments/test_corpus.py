"""Search and visit over a corpus: formats, BM25 against a plain oracle, batches, memory, broken files."""

from __future__ import annotations

import asyncio
import json
import math
import re
import threading
import unicodedata
from collections import Counter
from dataclasses import asdict
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from evolve_dag.config.parts import identity
from evolve_dag.environments.corpus import CorpusEnvironment, CorpusSearch, Page, fold, query_terms, window, words
from evolve_dag.errors import DataError
from evolve_dag.protocols import Environment, ToolError
from evolve_dag.records import ToolCall

PAGES = [
    Page(
        "city Bado Keli",
        "mayor: person Rato Miku\nstream: river Zano Pile",
        indexed="mayor: person Zano Pile\nstream: river Zano Pile",
    ),
    Page("river Bado Keli", "mouth: city Zano Pile\nkeeper: person Rato Miku"),
    Page("person Rato Miku", "home: city Bado Keli"),
    Page("city Old Keli", redirect="city Bado Keli"),
]


def search(query: str) -> ToolCall:
    return ToolCall("search", {"query": query})


def visit(page: str) -> ToolCall:
    return ToolCall("visit", {"page": page})


def ask(environment: CorpusSearch, *calls: ToolCall) -> list[str]:
    async def main() -> list[str]:
        return await asyncio.gather(*(environment.call(call) for call in calls))

    return asyncio.run(main())


# ---- formats


def test_is_an_environment() -> None:
    assert isinstance(CorpusSearch(PAGES), Environment)
    assert [tool.name for tool in CorpusSearch(PAGES).tools] == ["search", "visit"]


def test_a_search_lists_titles_with_the_line_that_the_index_saw() -> None:
    titles_only = CorpusSearch(PAGES, text_weight=0.0, minimum_match=0.65)
    assert titles_only.search("Bado Keli mayor") == (
        "2 results\n1. city Bado Keli: mayor: person Zano Pile\n2. river Bado Keli: mouth: city Zano Pile"
    )
    assert titles_only.search("Old Keli") == "1 result\n1. city Old Keli: see: city Bado Keli"
    assert titles_only.search("What is the mayor of the home of person Rato Miku?") == "no results"
    assert titles_only.search("Nobody") == titles_only.search("?!") == "no results"


def test_a_visit_shows_the_page_as_it_is_now() -> None:
    corpus = CorpusSearch(PAGES)
    assert corpus.visit("city Bado Keli") == "page: city Bado Keli\nmayor: person Rato Miku\nstream: river Zano Pile"
    assert corpus.visit("  CITY bado\tKeli ") == corpus.visit("city Bado Keli")
    assert corpus.visit("city Old Keli") == "page: city Old Keli\nsee: city Bado Keli"
    assert corpus.visit("city  Bado Kela ") == "no page named city Bado Kela"
    assert corpus.visit("Bado Keli") == "no page named Bado Keli"


def test_calls_give_the_same_as_the_plain_methods() -> None:
    corpus = CorpusSearch(PAGES)
    fresh = CorpusSearch(PAGES)
    assert ask(corpus, search("keli mayor"), visit("person rato miku"), search("river")) == [
        fresh.search("keli mayor"),
        fresh.visit("person rato miku"),
        fresh.search("river"),
    ]


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (ToolCall("search", {}), "search needs the argument 'query'"),
        (ToolCall("search", {"q": "Keli"}), "search needs the argument 'query', not 'q'"),
        (ToolCall("search", {"query": " \n"}), "search needs the argument 'query', and it is empty"),
        (ToolCall("visit", {"title": "x", "url": "y"}), "visit needs the argument 'page', not 'title', 'url'"),
        (ToolCall("visit", {"page": ""}), "visit needs the argument 'page', and it is empty"),
        (ToolCall("browse", {"page": "x"}), "no tool named browse: use search or visit"),
    ],
)
def test_bad_arguments_say_what_is_wrong(call: ToolCall, said: str) -> None:
    with pytest.raises(ToolError) as caught:
        ask(CorpusSearch(PAGES), call)
    assert str(caught.value) == said


def test_the_default_system_prompt_holds_the_tools_as_json_schema() -> None:
    prompt = CorpusSearch(PAGES).system_prompt
    listed = prompt.split("<tools>\n")[1].split("\n</tools>")[0].splitlines()
    schemas = [json.loads(line)["function"] for line in listed]
    assert {schema["name"]: schema["parameters"]["required"] for schema in schemas} == {"search": ["query"], "visit": ["page"]}
    assert "<tool_call>" in prompt
    assert "<answer>" in prompt
    assert CorpusSearch(PAGES, system_prompt="tools: search, visit").system_prompt == "tools: search, visit"


# ---- BM25

WORDS = ["bado", "keli", "rato", "miku", "zano", "Été", "x1"]
text = st.lists(st.sampled_from(WORDS), max_size=6).map(" ".join)


@st.composite
def corpora(draw: st.DrawFn) -> list[Page]:
    titles = draw(st.lists(text.filter(bool), min_size=1, max_size=8, unique_by=fold))
    return [Page(title, draw(text), draw(st.none() | text)) for title in titles]


def oracle(pages: list[Page], query: str, title_weight: float, text_weight: float, minimum_match: float) -> dict[str, float]:
    """Title -> score of every page that matches, straight from the formula in the class's docstring."""
    titles = [Counter(words(page.title)) for page in pages]
    texts = [Counter(words(page.seen)) for page in pages]
    fields = [(weight, counts) for weight, counts in ((title_weight, titles), (text_weight, texts)) if weight > 0]
    terms = set(words(query))
    scores: dict[str, float] = {}
    for number, page in enumerate(pages):
        score, held = 0.0, 0
        for term in terms:
            spread = sum(any(counts[i][term] for _, counts in fields) for i in range(len(pages)))
            frequency = 0.0
            for weight, counts in fields:
                mean = sum(c.total() for c in counts) / len(pages)
                if counts[number][term]:
                    frequency += weight * counts[number][term] / (1 - 0.75 + 0.75 * counts[number].total() / mean)
            if frequency:
                held += 1
                score += math.log(1 + (len(pages) - spread + 0.5) / (spread + 0.5)) * frequency / (1.2 + frequency)
        if held and held / len(terms) >= minimum_match - 1e-9:
            scores[page.title] = score
    return scores


@settings(max_examples=40, deadline=None)
@given(
    corpora(),
    st.lists(text, min_size=1, max_size=4),
    st.sampled_from([(3.0, 1.0), (1.0, 0.0), (0.0, 2.0)]),
    st.sampled_from([0.0, 0.5, 0.65, 1.0]),
    st.integers(1, 4),
)
def test_the_ranking_is_bm25(
    pages: list[Page], queries: list[str], weights: tuple[float, float], minimum_match: float, results: int
) -> None:
    title_weight, text_weight = weights
    corpus = CorpusSearch(
        pages, results=results, title_weight=title_weight, text_weight=text_weight, minimum_match=minimum_match
    )
    for query, ranked in zip(queries, corpus.rank([query_terms(query) for query in queries]), strict=True):
        expected = oracle(pages, query, title_weight, text_weight, minimum_match)
        scores = [score for _, score in ranked]
        assert len(ranked) == min(results, len(expected))
        assert scores == sorted(scores, reverse=True)
        assert scores == pytest.approx([expected[page.title] for page, _ in ranked], abs=1e-7)
        left_out = [score for title, score in expected.items() if title not in {page.title for page, _ in ranked}]
        assert max(left_out, default=-1.0) <= min(scores, default=0.0) + 1e-7


def test_a_score_by_hand() -> None:
    """Three titles of two words, one holds the word once: idf ln(1 + 2.5/1.5), mean length, so f = weight."""
    corpus = CorpusSearch([Page("bado keli"), Page("rato miku"), Page("zano pile")], title_weight=3.0, text_weight=0.0)
    [[(page, score)]] = corpus.rank([("bado",)])
    assert page.title == "bado keli"
    assert score == pytest.approx(math.log(1 + 2.5 / 1.5) * 3.0 / (1.2 + 3.0), abs=1e-8)


@settings(max_examples=20, deadline=None)
@given(corpora(), st.lists(text, min_size=1, max_size=6), st.randoms())
def test_neither_company_nor_memory_nor_order_changes_an_answer(pages: list[Page], queries: list[str], random) -> None:
    shuffled = list(pages)
    random.shuffle(shuffled)
    batch, single = CorpusSearch(pages), CorpusSearch(shuffled)
    answers = [single.search(" ".join(reversed(query.split()))) for query in queries]
    assert batch.search_many(queries) == answers
    assert batch.search_many(queries) == answers  # remembered now
    batch._memo.clear()
    asked = [query for query in queries if query.strip()]
    assert ask(batch, *map(search, asked)) == [single.search(query) for query in asked]


def test_equal_pages_stand_in_an_order_of_their_own() -> None:
    """Ties are neither alphabetical nor in order of the file, and stay when a page that matches nothing joins."""
    pages = [Page(f"{kind} bado keli") for kind in "abcdefghij"]
    order = [page.title for page, _ in CorpusSearch(pages, results=10).rank([("bado",)])[0]]
    assert sorted(order) == [page.title for page in pages] != order
    assert [page.title for page, _ in CorpusSearch(pages, results=3).rank([("bado",)])[0]] == order[:3]
    grown = CorpusSearch([Page("x zano pile"), *reversed(pages)], results=10)
    assert [page.title for page, _ in grown.rank([("bado",)])[0]] == order


@settings(max_examples=50, deadline=None)
@given(st.text(max_size=40))
def test_any_text_can_be_searched_and_visited(query: str) -> None:
    corpus = CORPUS
    assert corpus.search(query).startswith(("no results", "1 result\n", "2 results\n", "3 results\n"))
    assert corpus.visit(query).startswith(("page: ", "no page named"))


CORPUS = CorpusSearch(PAGES)


# ---- snippets


def test_the_snippet_is_the_line_that_shares_most_words_else_the_first() -> None:
    corpus = CorpusSearch([Page("Rato", "born: here\nhome town: Keli\nhome: Bado")])
    assert corpus.search("rato home town") == "1 result\n1. Rato: home town: Keli"
    assert corpus.search("rato home") == "1 result\n1. Rato: home town: Keli"
    assert corpus.search("rato") == "1 result\n1. Rato: born: here"


def test_a_long_line_is_cut_to_start_at_the_word() -> None:
    line = " ".join(f"w{n}" for n in range(100))
    excerpt = window(line, ("w50",), 40)
    assert excerpt == "... w50 w51 w52 w53 w54 w55 w56 w57 ..."
    assert window(line, ("w1", "w2"), 40).startswith("... w1 w2 ")
    assert window(line, (), 40).startswith("w0 w1 ")
    assert window(line, ("w99",), 40).endswith(" w99")
    assert len(window(line, ("w99",), 40)) > 25
    assert window("x" * 100, ("x",), 40) == "x" * 32 + " ..."


@given(st.lists(st.sampled_from(["bado", "keli", "a", "y" * 50]), min_size=1, max_size=60), st.integers(20, 80))
def test_an_excerpt_is_short_and_shows_as_many_words_as_any_other(tokens: list[str], characters: int) -> None:
    line, terms = " ".join(tokens), ("bado", "keli")
    excerpt = window(line, terms, characters)
    assert len(excerpt) <= characters
    shown = len(set(words(excerpt)).intersection(terms))
    for start in range(len(tokens)):
        end = start
        while end < len(tokens) and len(" ".join(tokens[start : end + 1])) <= characters - 8:
            end += 1
        assert shown >= len(set(tokens[start:end]).intersection(terms))


# ---- batches


def test_searches_of_one_turn_are_one_statement_and_repeats_none() -> None:
    corpus = CorpusSearch(PAGES)
    asked: list[int] = []
    rank = corpus.rank
    corpus.rank = lambda queries: asked.append(len(queries)) or rank(queries)  # type: ignore[method-assign, func-returns-value]
    ask(corpus, search("bado"), search("keli"), search("Keli keli"), visit("city Bado Keli"))
    assert asked == [2]
    ask(corpus, search("KELI"), search("bado"))
    assert asked == [2]


def test_a_cancelled_search_does_not_disturb_its_neighbour() -> None:
    async def main() -> str:
        first = asyncio.create_task(corpus.call(search("bado")))
        second = asyncio.create_task(corpus.call(search("bado")))
        await asyncio.sleep(0)
        first.cancel()
        return await second

    corpus = CorpusSearch(PAGES)
    assert asyncio.run(main()) == CorpusSearch(PAGES).search("bado")


def test_a_broken_index_is_an_observation_for_everybody_who_asked() -> None:
    async def main() -> list[object]:
        return await asyncio.gather(corpus.call(search("bado")), corpus.call(search("keli")), return_exceptions=True)

    corpus = CorpusSearch(PAGES)
    corpus._connection.execute("DROP TABLE postings")
    for failure in asyncio.run(main()):
        assert isinstance(failure, ToolError)
        assert str(failure).startswith("search failed: ")


def test_several_threads_and_loops_may_ask_at_once() -> None:
    corpus = CorpusSearch(PAGES)
    queries = [f"{a} {b}" for a in ("bado", "keli", "rato") for b in ("mayor", "stream", "home")]
    found: list[list[str]] = []
    threads = [threading.Thread(target=lambda: found.append(ask(corpus, *map(search, queries)))) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [CorpusSearch(PAGES).search_many(queries)] * 6


@pytest.mark.parametrize(
    ("query", "title"),
    [("東京 高さ", "東京タワー"), ("大学 1898年", "北京大学"), ("創建", None), (unicodedata.normalize("NFD", "Zoë"), "Zoë")],
)
def test_letters_beyond_ascii_are_found(query: str, title: str | None) -> None:
    pages = [
        Page("東京タワー", "高さは333メートル。"),
        Page("北京大学", "创建于1898年，初名京师大学堂。"),
        Page("Zoë", unicodedata.normalize("NFD", "Zoë lives in München")),
    ]
    corpus = CorpusSearch(pages)
    assert corpus.search(query).splitlines()[1:2] == (
        [] if title is None else [f"1. {title}: {corpus.visit(title).splitlines()[1]}"]
    )
    assert corpus.visit(unicodedata.normalize("NFD", "zoë")) == corpus.visit("Zoë")
    assert words("x1 東京タワー_2 塔") == ["x1", "東京", "京タ", "タワ", "ワー", "_2", "塔"]


@pytest.mark.parametrize(
    "word",
    ["हिन्दी", "বাংলা", "தமிழ்", "မြန်မာ", "عَرَبِيّ", "שָׁלוֹם", "İzmir", "x\u0301y"],
)
def test_a_mark_is_a_part_of_its_word(word: str) -> None:
    assert words(f"a {word}, {word}") == ["a", *[unicodedata.normalize("NFC", word).lower()] * 2]


def test_pages_that_share_letters_and_no_word_are_not_found() -> None:
    """Split at its vowel signs a word of Hindi was a heap of letters, which every page has."""
    corpus = CorpusSearch([Page("किताब", "किताब एक वस्तु है"), Page("कबूतर", "तोता बाग बस")])
    assert corpus.search("काबुल तीतर") == "no results"
    assert corpus.search("किताब").startswith("1 result\n1. किताब")


# ---- digest and settings


def test_the_digest_follows_pages_and_settings_alone() -> None:
    plain = CorpusSearch(PAGES).digest
    assert CorpusSearch(list(reversed(PAGES))).digest == plain
    others = [
        CorpusSearch(PAGES[:3]),
        CorpusSearch([*PAGES[:3], Page("city Old Keli", "see: city Bado Keli")]),
        CorpusSearch([Page(PAGES[0].title, PAGES[0].text), *PAGES[1:]]),
        CorpusSearch(PAGES, results=2),
        CorpusSearch(PAGES, snippet_characters=50),
        CorpusSearch(PAGES, title_weight=2.0),
        CorpusSearch(PAGES, text_weight=0.0),
        CorpusSearch(PAGES, minimum_match=0.5),
        CorpusSearch(PAGES, system_prompt="other"),
    ]
    digests = {plain, *(other.digest for other in others)}
    assert len(digests) == len(others) + 1


@pytest.mark.parametrize(
    ("text", "told"),
    [("plain", ""), ("Zoë 東京", ""), (unicodedata.normalize("NFD", "Zoë"), ""), ("किताब", "corpus bm25f/3")],
)
@pytest.mark.parametrize("escaped", [True, False])
def test_marks_alone_make_nights_of_other_pages(tmp_path: Path, text: str, told: str, escaped: bool) -> None:
    """What is stored about pages without any stays what it is."""
    pages = tmp_path / "pages.jsonl"
    pages.write_text(json.dumps({"title": "a", "text": text}, ensure_ascii=escaped), encoding="utf-8")
    environment = CorpusEnvironment(kind="corpus", pages=str(pages))
    assert identity("environment", "corpus", environment) == (told or "corpus")
    pages.write_text(json.dumps({"title": "a", "text": "বাংলা, too"}), encoding="utf-8")
    assert identity("environment", "corpus", environment) == "corpus bm25f/3"
    pages.unlink()
    assert identity("environment", "corpus", environment) == "corpus"
    assert CorpusSearch([Page("Rato Miku", "mayor")]).digest == "247035ab1e3bbc5384a911f5d55ef21c"
    assert CorpusSearch([Page("Zoë", "東京タワー")]).digest == "be8045d6ca4792df1756a8385057028f"


@pytest.mark.parametrize(
    "wrong",
    [
        {"results": 0},
        {"snippet_characters": 3},
        {"minimum_match": 1.5},
        {"title_weight": 0.0, "text_weight": 0.0},
        {"text_weight": -1.0},
    ],
)
def test_settings_outside_their_range_are_refused(wrong: dict) -> None:
    with pytest.raises(ValueError, match=next(iter(wrong))):
        CorpusSearch(PAGES, **wrong)


def test_titles_must_be_usable() -> None:
    with pytest.raises(DataError, match="no page"):
        CorpusSearch([])
    with pytest.raises(DataError) as caught:
        CorpusSearch([Page("Bado", "x"), Page(" "), Page("bado ", "y"), Page("a\nb")])
    assert "3 bad titles" in str(caught.value)
    assert "page 2: the title is empty" in str(caught.value)
    assert "page 3: title 'bado ' again, as on page 1" in str(caught.value)
    assert "page 4: title 'a\\nb' is broken over lines" in str(caught.value)


# ---- files


def write(path: Path, *lines: object) -> Path:
    path.write_text("\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines), encoding="utf-8")
    return path


def test_a_file_gives_the_same_corpus(tmp_path: Path) -> None:
    lines = [{key: value for key, value in asdict(page).items() if value} for page in PAGES]
    path = write(tmp_path / "pages.jsonl", "\ufeff" + json.dumps(lines[0]), "", *lines[1:])
    corpus = CorpusSearch.from_jsonl(path, results=2)
    assert corpus.digest == CorpusSearch(PAGES, results=2).digest


def test_every_broken_line_is_named(tmp_path: Path) -> None:
    path = write(
        tmp_path / "pages.jsonl",
        {"title": "Bado", "text": "x"},
        '{"title": "Keli", ',
        {"text": "x"},
        {"title": "Rato"},
        {"title": 3, "text": ["x"]},
        "[1]",
        {"title": "BADO", "text": "y"},
        {"title": "Miku", "text": "x", "redirect": "Bado"},
        {"title": "Zano", "text": "x", "index": "y"},
    )
    with pytest.raises(DataError) as caught:
        CorpusSearch.from_jsonl(path)
    said = str(caught.value).splitlines()
    assert said[0] == f"{path}: 9 mistakes"
    for line, expected in zip(
        said[1:10],
        [
            "line 2: not valid JSON",
            "line 3: 'title' is missing",
            "line 4: 'text' is missing",
            "line 5: 'text' must be text, not a list",
            "line 5: 'title' must be text, not the number 3",
            "line 6: holds a list, not an object",
            "line 7: title 'BADO' again, as on line 1",
            "line 8: 'text' and 'redirect' stand together",
            "line 9: unknown key 'index'",
        ],
        strict=True,
    ):
        assert line.strip().startswith(expected)


def test_many_mistakes_are_counted_and_ten_are_shown(tmp_path: Path) -> None:
    path = write(tmp_path / "pages.jsonl", *[{"title": f"t{n}"} for n in range(13)])
    with pytest.raises(DataError, match="13 mistakes") as caught:
        CorpusSearch.from_jsonl(path)
    assert re.findall(r"  line (\d+):", str(caught.value)) == [str(n) for n in range(1, 11)]
    assert "... and 3 more" in str(caught.value)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "empty file"),
        (b"\n \n", "empty file"),
        (b'{"title": "\xff", "text": "x"}', "line 1: not UTF-8"),
        (b'{"title": "a", "title": "b", "text": "x"}', "line 1: key 'title' stands twice"),
        (b'{"title": "a", "redirect": "b"}', "line 1: redirect to 'b', but no page has that title"),
        (b"[" * 100_000, "line 1: not valid JSON"),
    ],
)
def test_unusable_files(tmp_path: Path, content: bytes, said: str) -> None:
    path = tmp_path / "pages.jsonl"
    path.write_bytes(content)
    with pytest.raises(DataError, match=re.escape(str(path))) as caught:
        CorpusSearch.from_jsonl(path)
    assert said in str(caught.value)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"nowhere\.jsonl: no such file"):
        CorpusSearch.from_jsonl(tmp_path / "nowhere.jsonl")
    with pytest.raises(DataError, match="not a file"):
        CorpusSearch.from_jsonl(tmp_path)
