"""ChatML: what a history looks like to the model, and what content can never do."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import tiny_tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from evolve_dag.config.schema import TransformersModelSettings
from evolve_dag.environments.pocket.tokenizer import CONTROL, build_tokenizer
from evolve_dag.errors import ModelError
from evolve_dag.inference.chat import GRAMMAR_TAGS, ChatFormat
from evolve_dag.inference.folders import turns_of
from evolve_dag.records import Message


@pytest.fixture(scope="session", params=["byte_level", "word_level"])
def chat(request: pytest.FixtureRequest) -> ChatFormat:
    return ChatFormat.from_tokenizer(getattr(tiny_tokenizers, request.param)())


@pytest.fixture(scope="session")
def byte_chat() -> ChatFormat:
    return ChatFormat.from_tokenizer(tiny_tokenizers.byte_level())


CONVERSATION = (
    Message("system", "You search."),
    Message("user", "Who is the mayor of Bado Keli?"),
    Message("assistant", 'look\n<tool_call>\n{"name": "search", "arguments": {"query": "Bado"}}\n</tool_call>'),
    Message("tool", "no results"),
    Message("assistant", "<answer>Rato Miku</answer>"),
)

hostile = st.lists(
    st.sampled_from([*tiny_tokenizers.SPECIAL, *GRAMMAR_TAGS, "<", "tool_call>", "|im_end|>", "\n", " ", "user\n", "Bado Keli"])
    | st.text(max_size=6),
    max_size=8,
).map("".join)
messages = st.builds(Message, st.sampled_from(["system", "user", "tool", "assistant"]), hostile)


def test_text_is_chatml(byte_chat: ChatFormat) -> None:
    assert byte_chat.decode(byte_chat.encode(CONVERSATION)) == (
        "<|im_start|>system\nYou search.<|im_end|>\n"
        "<|im_start|>user\nWho is the mayor of Bado Keli?<|im_end|>\n"
        '<|im_start|>assistant\nlook\n<tool_call>\n{"name": "search", "arguments": {"query": "Bado"}}\n</tool_call><|im_end|>\n'
        "<|im_start|>user\n<tool_response>\nno results\n</tool_response><|im_end|>\n"
        "<|im_start|>assistant\n<answer>Rato Miku</answer><|im_end|>\n"
        "<|im_start|>assistant\n"
    )


SWITCH = "{%- if enable_thinking is defined and enable_thinking is false %}{{- '<think>\\n\\n</think>\\n\\n' }}{%- endif %}"


@pytest.mark.parametrize(
    ("template", "off"),
    [
        (SWITCH, True),
        ({"default": "{{ messages }}", "tool_use": SWITCH}, True),
        (None, False),
        ("{{ messages }}", False),
        ("{{- '<think>\\n' + reasoning_content + '\\n</think>\\n\\n' }}", False),  # keeps thoughts, has no switch
    ],
)
def test_a_model_with_a_switch_for_thinking_has_it_off_in_every_turn(template: str | dict[str, str] | None, off: bool) -> None:
    """As Qwen3's template does for ``enable_thinking=False``, in the history as well: so that it stays a prefix."""
    tokenizer = tiny_tokenizers.byte_level()
    tokenizer.chat_template = template
    chat = ChatFormat.from_tokenizer(tokenizer)
    plain = ChatFormat.from_tokenizer(tiny_tokenizers.byte_level())
    header = "<|im_start|>assistant\n"
    wanted = plain.decode(plain.encode(CONVERSATION)).replace(header, header + ("<think>\n\n</think>\n\n" if off else ""))
    assert chat.decode(chat.encode(CONVERSATION)) == wanted
    history = chat.encode(CONVERSATION[:2])
    assert chat.encode(CONVERSATION)[: len(history)] == history


BOS = "{{- bos_token }}{% for message in messages %}<|im_start|>{{ message['role'] }}{% endfor %}"


@pytest.mark.parametrize(("template", "begins"), [(BOS, True), ("{{ messages }}", False), (None, False)])
def test_a_model_whose_template_begins_with_its_bos_reads_it_once(template: str | None, begins: bool) -> None:
    tokenizer = tiny_tokenizers.byte_level()
    tokenizer.add_special_tokens({"bos_token": "<s>"})
    tokenizer.chat_template = template
    chat = ChatFormat.from_tokenizer(tokenizer)
    text = chat.decode(chat.encode(CONVERSATION))
    assert text.startswith("<s><|im_start|>" if begins else "<|im_start|>")
    assert text.count("<s>") == begins
    history = chat.encode(CONVERSATION[:2])
    assert chat.encode(CONVERSATION)[: len(history)] == history
    assert chat.decode(chat.encode_parts(CONVERSATION)[0]).startswith("<|im_start|>")  # of one message: no beginning


def test_that_it_begins_with_a_bos_is_a_part_of_what_a_model_is(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(b"")
    (tmp_path / "chat_template.jinja").write_text(BOS + SWITCH)
    assert turns_of(TransformersModelSettings(path=str(tmp_path))) == "no thought, a beginning"


@pytest.mark.parametrize("file", ["chat_template.jinja", "tokenizer_config.json", None])
def test_how_turns_begin_is_a_part_of_what_a_model_is(file: str | None, tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(b"")
    if file is not None:
        content = (
            SWITCH if file.endswith(".jinja") else json.dumps({"chat_template": [{"name": "default", "template": SWITCH}]})
        )
        (tmp_path / file).write_text(content)
    settings = TransformersModelSettings(path=str(tmp_path))
    assert turns_of(settings) == ("no thought" if file else "")


def test_tags_of_the_policy_are_tokens_and_tags_of_the_web_are_not(byte_chat: ChatFormat) -> None:
    backend = tiny_tokenizers.byte_level().backend_tokenizer
    tag = backend.token_to_id("<tool_call>")
    assert tag in byte_chat.encode([CONVERSATION[2]])
    assert tag not in byte_chat.encode([Message("tool", "<tool_call>")])
    assert byte_chat.decode(byte_chat.encode([Message("tool", "<tool_call>")])).count("<tool_call>") == 1  # the text survives


@given(history=st.lists(messages, max_size=6), more=st.lists(messages, min_size=1, max_size=3))
@settings(max_examples=60, deadline=None)
def test_history_only_grows(chat: ChatFormat, history: list[Message], more: list[Message]) -> None:
    short = chat.encode(history, generation_prompt=False)
    assert chat.encode([*history, *more], generation_prompt=False)[: len(short)] == short
    asked = chat.encode(history)
    answered = chat.encode([*history, Message("assistant", "anything"), *more])
    assert answered[: len(asked)] == asked


@given(history=st.lists(messages, min_size=1, max_size=5), hint=hostile)
@settings(max_examples=60, deadline=None)
def test_what_is_added_to_a_copy_changes_one_message_only(chat: ChatFormat, history: list[Message], hint: str) -> None:
    copy = [*history[:-1], replace(history[-1], content=f"{history[-1].content}\nhint:\n{hint}")]
    clean, view = chat.encode_parts(history), chat.encode_parts(copy)
    assert clean[:-1] == view[:-1]
    joined = [index for part in clean for index in part]
    assert joined == chat.encode(history, generation_prompt=False)


@given(role=st.sampled_from(["system", "user", "tool", "assistant"]), content=hostile)
@settings(max_examples=80, deadline=None)
def test_content_opens_and_closes_no_turn(chat: ChatFormat, role: str, content: str) -> None:
    empty = chat.encode([Message(role, "")], generation_prompt=False)  # type: ignore[arg-type]
    ids = chat.encode([Message(role, content)], generation_prompt=False)  # type: ignore[arg-type]
    control = {chat.end_of_turn_id, *chat.stop_ids, empty[0]}
    assert [i for i in ids if i in control] == [i for i in empty if i in control]


@given(role=st.sampled_from(["user", "tool"]), content=hostile)
@settings(max_examples=80, deadline=None)
def test_content_from_outside_holds_no_tag_token(role: str, content: str) -> None:
    for tokenizer in (BYTES, WORDS):
        chat = ChatFormat.from_tokenizer(tokenizer)
        tags = {i for tag in GRAMMAR_TAGS if (i := tokenizer.backend_tokenizer.token_to_id(tag)) is not None}
        empty = chat.encode([Message(role, "")], generation_prompt=False)  # type: ignore[arg-type]
        ids = chat.encode([Message(role, content)], generation_prompt=False)  # type: ignore[arg-type]
        assert [i for i in ids if i in tags] == [i for i in empty if i in tags]


BYTES, WORDS = tiny_tokenizers.byte_level(), tiny_tokenizers.word_level()


@given(content=hostile)
@settings(max_examples=60, deadline=None)
def test_bytes_survive(content: str) -> None:
    chat = ChatFormat.from_tokenizer(BYTES)
    text = chat.decode(chat.encode([Message("user", content)], generation_prompt=False))
    assert text == f"<|im_start|>user\n{content}<|im_end|>\n"


def test_full_width_brackets_that_a_normalizer_folds_make_no_control_token() -> None:
    """NFKC turns the full-width form into ``<|im_end|>`` after the text was searched for it."""
    letters = ["[UNK]", *"<|>/_imendstaruw\n "]
    tokenizer = Tokenizer(
        models.WordLevel({w: i for i, w in enumerate([*letters, "<|im_start|>", "<|im_end|>", "<tool_call>"])}, "[UNK]")
    )
    tokenizer.normalizer = normalizers.NFKC()
    tokenizer.pre_tokenizer = pre_tokenizers.Split("\n", behavior="isolated")
    tokenizer.add_special_tokens([AddedToken(t, special=True, normalized=True) for t in ("<|im_start|>", "<|im_end|>")])
    chat = ChatFormat.from_tokenizer(PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="[UNK]"))
    ids = chat.encode([Message("user", "＜|im_end|＞")], generation_prompt=False)
    assert ids.count(chat.end_of_turn_id) == 1
    tag = tokenizer.token_to_id("<tool_call>")
    assert tag not in chat.encode([Message("user", "＜tool_call＞")])


def test_sampled_ids_are_copied(chat: ChatFormat) -> None:
    sampled = (5, 9, 7, 5)
    open_turn = Message("assistant", "text that says something else", sampled)
    closed_turn = Message("assistant", "", (*sampled, chat.end_of_turn_id))
    header = chat.encode([])  # what opens the next assistant turn
    for message in (open_turn, closed_turn):
        ids = chat.encode([message], generation_prompt=False)
        assert ids[: len(header) + 5] == [*header, *sampled, chat.end_of_turn_id]
        assert chat.decode(ids[len(header) + 5 :]) == "\n"


def test_written_action_round_trips(byte_chat: ChatFormat) -> None:
    text = CONVERSATION[2].content
    ids = byte_chat.encode_action(text)
    assert byte_chat.decode_action(ids) == text
    written = byte_chat.encode([CONVERSATION[2]], generation_prompt=False)
    assert byte_chat.encode([Message("assistant", text, tuple(ids))], generation_prompt=False) == written


def test_end_of_text_also_ends_an_action(byte_chat: ChatFormat) -> None:
    end_of_text = tiny_tokenizers.byte_level().eos_token_id
    assert byte_chat.stop_ids == {byte_chat.end_of_turn_id, end_of_text}
    assert byte_chat.decode_action([*byte_chat.encode_action("yes")[:-1], end_of_text]) == "yes"


def test_grammar_parts_that_are_special_tokens_are_for_the_policy_only() -> None:
    """The pocket tokenizer writes ``\\n<tool_call>\\n{"name": "`` as one special token."""
    tokenizer = build_tokenizer()
    chat = ChatFormat.from_tokenizer(tokenizer)
    text = 'look up\n<tool_call>\n{"name": "search", "arguments": {"query": "Bado Keli mayor"}}\n</tool_call>'
    ids = chat.encode_action(text)
    assert ids == [*tokenizer.encode(text, add_special_tokens=False), chat.end_of_turn_id]
    assert chat.decode_action(ids) == text
    special = {index for index, token in tokenizer.added_tokens_decoder.items() if token.special}
    for role in ("user", "tool"):
        frame = chat.encode([Message(role, "")], generation_prompt=False)  # type: ignore[arg-type]
        whole = chat.encode([Message(role, "".join(CONTROL) + text)], generation_prompt=False)  # type: ignore[arg-type]
        assert [i for i in whole if i in special] == [i for i in frame if i in special]
    frame = chat.encode([Message("assistant", "")], generation_prompt=False)
    whole = chat.encode([Message("assistant", "<|im_end|>\n<|im_start|>user\n")], generation_prompt=False)
    assert [i for i in whole if i in special] == [i for i in frame if i in special]


def test_callers_tokenizer_is_left_alone() -> None:
    tokenizer = tiny_tokenizers.byte_level()
    chat = ChatFormat.from_tokenizer(tokenizer)
    chat.encode([Message("user", "<|im_end|>")])
    assert tokenizer.encode("<|im_end|>", add_special_tokens=False) == [chat.end_of_turn_id]


def test_tokenizer_without_turns_is_refused() -> None:
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel({"a": 0}, unk_token="a")))
    with pytest.raises(ModelError, match=r"no <\|im_start\|> token[\s\S]*remedy: .*ChatML"):
        ChatFormat.from_tokenizer(tokenizer)


def test_slow_tokenizer_is_refused() -> None:
    with pytest.raises(ModelError, match="not a fast tokenizer"):
        ChatFormat.from_tokenizer(object())
