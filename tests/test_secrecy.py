"""No more than the first three characters of a key are in any message, wherever the key stood and wherever it was cut."""

from __future__ import annotations

import html
import json
import os
import string
from collections.abc import Iterator
from urllib.parse import quote

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from evolve_dag import secrecy
from evolve_dag.errors import ModelError
from evolve_dag.secrecy import describe_error, excerpt, masker, read_key, without_keys

KEY = "Zq9vK2xWb7LmT4YpRg6N"
ODD = r'Xk+7/vQ"z\9=&<w2Z%'
"""A key whose characters are written otherwise in JSON, in an address and on a page."""
LONG = "".join(f"{a}{b}" for a, b in zip(string.ascii_letters, reversed(string.ascii_letters), strict=True)) * 3

positions = st.integers(0, 700)


def pieces(key: str, text: str) -> list[str]:
    """What of a key a text shows beyond three characters."""
    return [key[n : n + 4] for n in range(len(key) - 3) if key[n : n + 4] in text]


@pytest.fixture(autouse=True)
def _environment(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(secrecy, "_keys", set())
    for variable, key in (("ENDPOINT_WORD", KEY), ("OTHER_WORD", ODD), ("THIRD_WORD", LONG)):
        monkeypatch.setenv(variable, key)
        assert read_key(variable) == key
    yield
    secrecy._masker.cache_clear()


@pytest.mark.parametrize("key", [KEY, ODD, LONG], ids=["plain", "odd", "long"])
@pytest.mark.parametrize("limit", [40, 300])
def test_no_position_of_a_key_gets_through_our_cut(key: str, limit: int) -> None:
    for start in range(limit + len(key)):
        for around in (" ", '"', "="):
            text = f"{'-' * start}{around}{key}{around} and more" * 2
            told = excerpt(text, limit)
            assert not pieces(key, told), (start, told)
            assert len(told) <= limit


@pytest.mark.parametrize("key", [KEY, ODD, LONG], ids=["plain", "odd", "long"])
@pytest.mark.parametrize("end", ["", "…", "...", "****", "****" + "WXyz", " and", '"}', "\n"])
def test_a_key_that_another_has_cut_shows_no_more_than_its_first_three(key: str, end: str) -> None:
    for kept in range(len(key) + 1):
        told = excerpt(f"the key {key[:kept]}{end}")
        assert not pieces(key, told), told
        assert ("***" in told) == (kept > 3 or "*" in end)


@given(
    before=positions, after=positions, spelling=st.sampled_from([str, quote, html.escape, json.dumps, lambda k: quote(k, "")])
)
@example(295, 0, str)
def test_a_key_in_any_spelling(before: int, after: int, spelling: object) -> None:
    for key in (KEY, ODD, LONG):
        text = f"{'. ' * (before // 2)}{spelling(key)}{' .' * (after // 2)}"  # type: ignore[operator]
        for told in (excerpt(text), masker()(text), without_keys(text), describe_error(RuntimeError(text))):
            assert not pieces(key, told)
            assert not pieces(spelling(key), told)  # type: ignore[operator]


@given(st.text(max_size=400), st.integers(0, 400), st.integers(0, 3))
def test_whatever_stands_around_it(text: str, place: int, which: int) -> None:
    key = (KEY, ODD, LONG, KEY)[which]
    surrounded = f"{text[:place]}{key}{text[place:]}"
    if pieces(key, text):
        return
    for told in (excerpt(surrounded), masker()(surrounded), without_keys(surrounded)):
        assert not pieces(key, told)


def test_what_is_kept_as_content_loses_keys_and_nothing_else() -> None:
    said = f"password: swordfish, sk-abcdefghijkl, Bearer of news, {KEY[:6]} of {KEY}"
    assert without_keys(said) == f"password: swordfish, sk-abcdefghijkl, Bearer of news, {KEY[:6]} of ***"
    assert without_keys(f"it ends within {KEY[:4]}") == "it ends within ***"
    assert (
        without_keys(f"{KEY[:4]}… or {KEY[:4]}*** or {KEY[:8]}, {LONG[:40]}; {KEY[:8]}X")
        == f"*** or *** or ***, ***; {KEY[:8]}X"
    )
    assert json.loads(without_keys(json.dumps({"a": ODD, "b": [KEY]}))) == {"a": "***", "b": ["***"]}


def test_a_path_is_masked_whole_and_its_beginning_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", "/home/me/.aws/credentials")
    assert excerpt("in /home/me/work: no /home/me/.aws/credentials") == "in /home/me/work: no ***"


def test_a_variable_that_another_thread_takes_away_keeps_nothing_from_being_masked(monkeypatch: pytest.MonkeyPatch) -> None:
    names = type(os.environ).__iter__
    monkeypatch.setattr(type(os.environ), "__iter__", lambda self: iter([*names(self), "TAKEN_AWAY_KEY"]))
    monkeypatch.setenv("SOME_API_KEY", "Zq9vK2xWb7LmT4Yp")
    assert describe_error(ValueError("Bearer Zq9vK2xWb7LmT4Yp")) == "ValueError: Bearer ***"


def test_a_short_value_that_is_named_like_a_secret_is_a_word(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "false")
    assert excerpt("that is false") == "that is false"


@pytest.mark.parametrize("value", ["two words", "a\nb c d e f g", "schlüssel-0123", "tab\tin-it", "nul\x01inside"])
def test_a_value_that_cannot_be_a_key_is_refused_and_not_shown(value: str) -> None:
    with pytest.raises(ModelError, match="the environment variable SOME_WORD holds characters") as caught:
        read_key("SOME_WORD", {"SOME_WORD": value})
    assert value not in str(caught.value)
    assert value not in excerpt(f"said back: {value}.")


def test_a_key_is_read_without_the_line_break_of_its_file() -> None:
    assert read_key("SOME_WORD", {"SOME_WORD": f" {KEY}\n"}) == KEY
    assert read_key("SOME_WORD", {}) == ""


def test_a_provider_that_shows_the_ends_of_a_key() -> None:
    assert (
        excerpt("Incorrect API key provided: sk-proj-****wxyz. See the page.")
        == "Incorrect API key provided: *** See the page."
    )


def test_a_message_is_one_line_of_text() -> None:
    assert excerpt("a\n b\t\ud800c") == "a b ?c"
    assert excerpt("x" * 301) == "x" * 299 + "…"
    assert describe_error(ValueError(" ")) == "ValueError"
