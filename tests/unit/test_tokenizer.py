"""Text comes in whole characters and all of it; chats are written as the model's template says."""

# ruff: noqa: RUF001  (texts of many scripts are what is tested)

import json
import re
import shutil
from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from typing import Any, cast

import pytest
import tokenizers
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import decoders, models, pre_tokenizers, trainers

from colrow.errors import InvalidArgument
from coordinator.tokenizer import LOOK_BACK, ChatMessage, ChatOptions, TextStream, Tokenizer

pytestmark = pytest.mark.timeout(60)

REPLACEMENT = "\ufffd"

TEXTS = [
    "Plain words, and numbers: 3.14159.",
    "  spaces   at both ends  ",
    "line\nbreaks\r\n\tand tabs",
    "Grüße aus Łódź, señor",
    "👩‍👩‍👧‍👦 families, 🇨🇭 flags and 🤷🏽‍♀️ shrugs",
    "日本語の文章と中文句子，한국어도",
    "e\u0301 i\u0302 o\u0308 and Z\u0351\u0343\u0334algo",
    "العربية עברית हिन्दी ไทย",
    "𝔘𝔫𝔦𝔠𝔬𝔡𝔢 outside the first plane",
    "a model may write \ufffd itself.",
]


def byte_level() -> tokenizers.Tokenizer:
    """Byte-level BPE as GPT-2, Llama 3 and Qwen have it, with merges that cut through characters."""
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=["<|end|>"],
    )
    tokenizer.train_from_iterator(TEXTS, trainer)
    return tokenizer


def byte_fallback() -> tokenizers.Tokenizer:
    """SentencePiece's kind as Llama 2 and Mistral have it: words with a space before, else bytes."""
    words = ["▁", "▁Paris", "▁is", "▁a", "a", "b", "é", "日", "."]
    names = ["<unk>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *words]
    tokenizer = tokenizers.Tokenizer(
        models.BPE(
            {name: i for i, name in enumerate(names)}, [], unk_token="<unk>", byte_fallback=True
        )
    )
    tokenizer.add_special_tokens(["</s>"])
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    return tokenizer


BYTE_LEVEL = byte_level()
BYTE_FALLBACK = byte_fallback()
BACKENDS = {"byte_level": BYTE_LEVEL, "byte_fallback": BYTE_FALLBACK}


def pieces(
    tokenizer: Tokenizer, token_ids: list[int], prompt: list[int] | None = None
) -> list[str]:
    stream = tokenizer.stream(prompt or [])
    return [stream.feed(token) for token in token_ids]


def token_id(backend: tokenizers.Tokenizer, name: str) -> int:
    found = backend.token_to_id(name)
    assert found is not None, name
    return found


def byte_ids(backend: tokenizers.Tokenizer, data: bytes) -> list[int]:
    """A token for each byte."""
    if backend is BYTE_FALLBACK:
        names = [f"<0x{byte:02X}>" for byte in data]
    else:
        # GPT-2 writes each byte as one printable character.
        (letters,) = (p for p in [_byte_letters()])
        names = [letters[byte] for byte in data]
    return [token_id(backend, name) for name in names]


def _byte_letters() -> list[str]:
    kept = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAC + 1), *range(0xAE, 0xFF + 1)]
    shifted = [byte for byte in range(256) if byte not in kept]
    return [chr(b) if b in kept else chr(256 + shifted.index(b)) for b in range(256)]


@pytest.fixture(scope="module")
def demo(demo_model_folder: Path) -> Tokenizer:
    tokenizer = Tokenizer.load(demo_model_folder)
    assert tokenizer is not None
    return tokenizer


@pytest.mark.parametrize("text", TEXTS)
def test_a_stream_of_the_demo_model_is_the_text_in_whole_characters(
    demo: Tokenizer, text: str
) -> None:
    token_ids = demo.encode(text)
    got = pieces(demo, token_ids)
    assert "".join(got) == text == demo.decode(token_ids, skip_special_tokens=True)
    assert max(map(len, got)) < len(text)  # it did not come all at once
    if REPLACEMENT not in text:
        assert not any(REPLACEMENT in piece for piece in got)


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize("text", TEXTS)
def test_each_character_comes_with_its_last_byte(name: str, text: str) -> None:
    text = text.strip()  # SentencePiece takes no space that begins a text for its own
    tokenizer = Tokenizer(BACKENDS[name], None, {})
    got = pieces(tokenizer, byte_ids(BACKENDS[name], text.encode()))
    expected = [part for char in text for part in (*[""] * (len(char.encode()) - 1), char)]
    if REPLACEMENT in text:
        # The character that stands for broken ones is not to be told from one: it comes a bit later.
        assert "".join(got) == text
    else:
        assert got == expected


@pytest.mark.parametrize("name", BACKENDS)
@settings(deadline=None, max_examples=200)
@given(text=st.text(min_size=1))
def test_any_text_comes_out_as_it_went_in(name: str, text: str) -> None:
    text = f"a{text}b"
    tokenizer = Tokenizer(BACKENDS[name], None, {})
    got = pieces(tokenizer, byte_ids(BACKENDS[name], text.encode()))
    assert "".join(got) == text


@settings(deadline=None, max_examples=300)
@given(st.lists(st.integers(0, BYTE_LEVEL.get_vocab_size() - 1), max_size=40))
def test_any_tokens_stream_to_their_whole_decoding_but_for_a_tail_of_broken_characters(
    token_ids: list[int],
) -> None:
    tokenizer = Tokenizer(BYTE_LEVEL, None, {})
    got = "".join(pieces(tokenizer, token_ids))
    whole = tokenizer.decode(token_ids, skip_special_tokens=True)
    assert whole.startswith(got)
    assert set(whole[len(got) :]) <= {REPLACEMENT}


def test_whole_characters_come_with_a_token_that_ends_within_the_next() -> None:
    tokenizer = Tokenizer(BYTE_LEVEL, None, {})
    texts = {i: tokenizer.decode([i], skip_special_tokens=True) for i in range(1, 320)}
    token, text = next(
        (i, text) for i, text in texts.items() if text[-1] == REPLACEMENT and text[0] != REPLACEMENT
    )
    assert pieces(tokenizer, [token]) == [text.rstrip(REPLACEMENT)]


@settings(deadline=None, max_examples=300)
@given(st.binary(max_size=30))
def test_random_bytes_stream_to_what_a_decoder_makes_of_them(data: bytes) -> None:
    tokenizer = Tokenizer(BYTE_LEVEL, None, {})
    got = "".join(pieces(tokenizer, byte_ids(BYTE_LEVEL, data)))
    whole = data.decode(errors="replace")
    assert whole.startswith(got)
    assert set(whole[len(got) :]) <= {REPLACEMENT}


@settings(deadline=None, max_examples=300)
@given(st.lists(st.integers(0, BYTE_FALLBACK.get_vocab_size() - 1), max_size=100))
def test_no_tokens_break_a_stream_whose_decoder_takes_characters_back(token_ids: list[int]) -> None:
    tokenizer = Tokenizer(BYTE_FALLBACK, None, {})
    got = "".join(pieces(tokenizer, [*token_ids, token_id(BYTE_FALLBACK, "b")]))
    # Characters that bytes around them spoil may come whole; none of the others is lost.
    words = [BYTE_FALLBACK.id_to_token(token) for token in token_ids]
    expected = [word.strip("▁") for word in words if word and not word.startswith("<")]
    assert re.search(".*".join(map(re.escape, [*expected, "b"])), got, re.DOTALL)


def test_a_character_is_kept_when_bytes_that_are_none_follow_it() -> None:
    ids = [*byte_ids(BYTE_FALLBACK, "é".encode() + b"\xff"), token_id(BYTE_FALLBACK, "a")]
    assert pieces(Tokenizer(BYTE_FALLBACK, None, {}), ids) == ["", "é", "", REPLACEMENT + "a"]


def test_a_stream_goes_on_from_its_prompt() -> None:
    tokenizer = Tokenizer(BYTE_FALLBACK, None, {})
    ids = [token_id(BYTE_FALLBACK, name) for name in ("▁is", "▁Paris", ".")]
    assert pieces(tokenizer, ids[1:]) == ["Paris", "."]
    assert pieces(tokenizer, ids[1:], ids[:1]) == [" Paris", "."]


@pytest.mark.parametrize("name", BACKENDS)
def test_a_character_that_the_prompt_begins_comes_with_the_rest_of_it(name: str) -> None:
    tokenizer = Tokenizer(BACKENDS[name], None, {})
    ids = byte_ids(BACKENDS[name], "ab😀c".encode())
    assert pieces(tokenizer, ids[4:], ids[:4]) == ["", "😀", "c"]


def test_special_tokens_are_not_text_and_do_not_break_it() -> None:
    end = token_id(BYTE_LEVEL, "<|end|>")
    ids = byte_ids(BYTE_LEVEL, b"ab")
    assert pieces(Tokenizer(BYTE_LEVEL, None, {}), [end, ids[0], end, end, ids[1]]) == [
        "", "a", "", "", "b",
    ]  # fmt: skip
    ids = [token_id(BYTE_FALLBACK, name) for name in ("▁is", "</s>", "▁a")]
    assert pieces(Tokenizer(BYTE_FALLBACK, None, {}), ids) == ["is", "", " a"]


class Counting:
    """A tokenizer that counts the tokens it decodes."""

    def __init__(self, backend: tokenizers.Tokenizer) -> None:
        self.backend = backend
        self.most = 0

    def decode(self, token_ids: list[int], **options: bool) -> str:
        self.most = max(self.most, len(token_ids))
        return self.backend.decode(token_ids, **options)


END_OF = {BYTE_LEVEL: "<|end|>", BYTE_FALLBACK: "</s>"}
ENDLESS = {
    "specials": lambda backend: [token_id(backend, END_OF[backend])],
    "no character": lambda backend: byte_ids(backend, b"\xff"),
    "begun characters": lambda backend: byte_ids(backend, b"\xf0\x9f\x98"),
    "characters in pieces": lambda backend: byte_ids(backend, "日😀".encode()),
    "ids of no token": lambda backend: [10**6],
    "replacement characters": lambda backend: byte_ids(backend, "\ufffd".encode()),
}


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize("kind", ENDLESS)
@pytest.mark.parametrize("begin", ["", "ab"])
def test_however_long_a_text_is_few_tokens_are_decoded_again(
    name: str, kind: str, begin: str
) -> None:
    backend = BACKENDS[name]
    counting = Counting(backend)
    shown = frozenset({token_id(backend, END_OF[backend])})
    for hidden in (shown, frozenset[int]()):
        stream = TextStream(cast(tokenizers.Tokenizer, counting), (), hidden)
        tokens = [*(token_id(backend, letter) for letter in begin), *(500 * ENDLESS[kind](backend))]
        got = "".join(stream.feed(token) for token in tokens)
        # What more than four bytes have left open stays so.
        whole = Tokenizer(backend, None, {}).decode(tokens, skip_special_tokens=bool(hidden))
        assert whole.startswith(got)
        assert len(whole) - len(got) <= 3
    assert counting.most <= 8 * LOOK_BACK + 2


def test_tokens_that_straddle_characters_without_end_are_few_again() -> None:
    """Each token ends one character and begins the next, so that at no time all is whole."""
    backend = tokenizers.Tokenizer(models.BPE({"æ": 0, "ĹĦåĹ": 1, "¥": 2}, []))
    backend.decoder = decoders.ByteLevel()
    assert backend.decode([1]) == b"\x97\x84\xe5\x97".decode(errors="replace")
    counting = Counting(backend)
    stream = TextStream(cast(tokenizers.Tokenizer, counting), (), frozenset())
    tokens = [0, *[1] * 500, 2]
    assert "".join(map(stream.feed, tokens)) == backend.decode(tokens)
    assert counting.most <= 8 * LOOK_BACK + 2


# What is hard to stream: whole characters, parts of them, bytes that are none, and special tokens.
BYTES = st.sampled_from(
    [0xFF, 0x80, 0xE6, 0x97, 0xA5, 0xF0, 0x9F, 0x98, 0x80, 0xEF, 0xBF, 0xBD, 0x61]
)


@settings(deadline=None, max_examples=500)
@given(
    st.lists(
        st.lists(BYTES, max_size=40).map(lambda data: byte_ids(BYTE_LEVEL, bytes(data)))
        | st.lists(st.integers(0, BYTE_LEVEL.get_vocab_size() - 1), max_size=20)
        | st.integers(0, 40).map(lambda count: count * [token_id(BYTE_LEVEL, "<|end|>")]),
        max_size=8,
    )
)
def test_long_broken_texts_stream_to_their_whole_decoding(parts: list[list[int]]) -> None:
    tokens = [token for part in parts for token in part]
    tokenizer = Tokenizer(BYTE_LEVEL, None, {})
    got = "".join(pieces(tokenizer, tokens))
    whole = tokenizer.decode(tokens, skip_special_tokens=True)
    assert whole.startswith(got)
    assert set(whole[len(got) :]) <= {REPLACEMENT}
    assert len(whole) - len(got) <= 3


WORDS = [token_id(BYTE_FALLBACK, name) for name in ("▁", "▁Paris", "a", "é", ".")]


@settings(deadline=None, max_examples=500)
@given(
    st.lists(
        st.lists(st.sampled_from(WORDS), min_size=1, max_size=4)
        # One byte that is none spoils those after it, as many as come without a word between.
        | st.lists(BYTES, max_size=60).map(
            lambda data: byte_ids(BYTE_FALLBACK, b"\xff" + bytes(data)) + WORDS[2:3]
        )
        | st.lists(st.sampled_from("日é😀a\ufffd"), min_size=1, max_size=30).map(
            lambda text: byte_ids(BYTE_FALLBACK, "".join(text).encode()) + WORDS[2:3]
        )
        | st.integers(0, 40).map(lambda count: count * [token_id(BYTE_FALLBACK, "</s>")]),
        max_size=8,
    )
)
def test_long_texts_with_spoilt_bytes_stream_to_their_whole_decoding(
    parts: list[list[int]],
) -> None:
    tokens = [token for part in parts for token in part]
    tokenizer = Tokenizer(BYTE_FALLBACK, None, {})
    assert "".join(pieces(tokenizer, tokens)) == tokenizer.decode(tokens, skip_special_tokens=True)


CHATS = [
    [("user", "Hello!")],
    [("system", "You answer briefly."), ("user", "What is <b>2 + 2</b>?")],
    [("user", "Hi"), ("assistant", "Hello, how are you?"), ("user", "Fine, 谢谢 🙂\n")],
]


def messages(chat: list[tuple[str, str]]) -> list[ChatMessage]:
    return [ChatMessage(role, content) for role, content in chat]


def plain(chat: list[tuple[str, str]]) -> list[dict[str, str]]:
    return [{"role": role, "content": content} for role, content in chat]


@pytest.mark.parametrize("chat", CHATS)
def test_a_chat_of_the_demo_model_is_that_of_transformers(
    demo: Tokenizer, demo_model_folder: Path, chat: list[tuple[str, str]]
) -> None:
    reference = transformers.AutoTokenizer.from_pretrained(demo_model_folder)
    expected = reference.apply_chat_template(
        plain(chat), tokenize=False, add_generation_prompt=True
    )
    assert demo.render_chat(messages(chat)) == expected
    ids = reference.apply_chat_template(plain(chat), add_generation_prompt=True, return_dict=False)
    assert demo.encode_chat(messages(chat)) == ids
    assert demo.encode(chat[0][1]) == reference(chat[0][1])["input_ids"]


# What templates of published models make use of.
TEMPLATES = {
    "special tokens": "{{ bos_token }}{% for m in messages %}{{ m.content + eos_token }}{% endfor %}",
    "one that is not set": "[{{ pad_token }}]{% if pad_token is defined %}!{% endif %}",
    "whitespace of blocks": """{% for m in messages %}
    {% if m.role == 'user' %}
<user>{{ m['content'] }}</user>
    {% endif %}
{% endfor %}""",
    "generation prompt": "{% if add_generation_prompt %}<assistant>{% endif %}",
    "no tools": "{% if tools is not none %}tools{% endif %}{% if not documents %}-{% endif %}",
    "a loop that ends early": (
        "{% for m in messages %}{% if loop.index0 == 1 %}{% break %}{% endif %}"
        "{% if m.role == 'system' %}{% continue %}{% endif %}{{ m.content }}{% endfor %}"
    ),
    "namespaces": (
        "{% set ns = namespace(n=0) %}{% for m in messages %}{% set ns.n = ns.n + 1 %}{% endfor %}"
        "{{ ns.n }}"
    ),
    "json": "{{ messages | tojson }}{{ messages[0] | tojson(indent=2) }}",
    "today": "{{ strftime_now('%d %b %Y') }}",
    "what is to be trained": (
        "{% for m in messages %}{% generation %}<{{ m.content }}>{% endgeneration %}{% endfor %}"
    ),
}


@pytest.mark.parametrize("use", TEMPLATES)
def test_a_template_gives_what_it_gives_in_transformers(use: str) -> None:
    special = {"bos_token": "<s>", "eos_token": "</s>"}
    reference = transformers.PreTrainedTokenizerFast(tokenizer_object=BYTE_LEVEL, **special)
    for _ in range(2):  # once more, should midnight have come in between
        today = datetime.now().day
        got = [
            Tokenizer(BYTE_LEVEL, TEMPLATES[use], special).render_chat(messages(c)) for c in CHATS
        ]
        expected = [
            reference.apply_chat_template(
                plain(c), chat_template=TEMPLATES[use], tokenize=False, add_generation_prompt=True
            )
            for c in CHATS
        ]
        if today == datetime.now().day:
            break
    assert got == expected


# How templates write a conversation that is to be continued: as it came, or trimmed.
OPEN_TEMPLATES = {
    "as it came": "{% for m in messages %}<{{ m.role }}>{{ m.content }}</>{% endfor %}",
    "trimmed": "{% for m in messages %}<{{ m.role }}>{{ m.content | trim }}</>{% endfor %}",
    "trimmed at its end": "{% for m in messages %}{{ m.content.rstrip() }}\n\n{% endfor %}",
}


@pytest.mark.parametrize("use", OPEN_TEMPLATES)
@pytest.mark.parametrize("begun", ["It is", "It is ", " It is\n", "Hello!", "2 + 2", ""])
def test_a_final_message_is_left_open_as_in_transformers(use: str, begun: str) -> None:
    chat = [("user", "Hello! It is 2 + 2?"), ("assistant", begun)]
    options = ChatOptions(continue_final_message=True)
    got = Tokenizer(BYTE_LEVEL, OPEN_TEMPLATES[use], {}).render_chat(messages(chat), options)
    expected = transformers.PreTrainedTokenizerFast(
        tokenizer_object=BYTE_LEVEL
    ).apply_chat_template(
        plain(chat),
        chat_template=OPEN_TEMPLATES[use],
        tokenize=False,
        continue_final_message=True,
    )
    assert got == expected


def test_a_final_message_of_the_demo_model_is_left_open(
    demo: Tokenizer, demo_model_folder: Path
) -> None:
    reference = transformers.AutoTokenizer.from_pretrained(demo_model_folder)
    chat = [("user", "What is 2 + 2?"), ("assistant", "It is")]
    expected = reference.apply_chat_template(
        plain(chat), continue_final_message=True, return_dict=False
    )
    assert demo.encode_chat(messages(chat), ChatOptions(continue_final_message=True)) == expected


@pytest.mark.parametrize(
    ("template", "chat"),
    [("{{ messages[0].content }}", CHATS[2]), ("", [("user", "Hi")]), ("{{ messages }}", [])],
)
def test_a_final_message_that_is_not_shown_can_not_be_continued(
    template: str, chat: list[tuple[str, str]]
) -> None:
    tokenizer = Tokenizer(BYTE_LEVEL, template, {})
    with pytest.raises(ValueError, match="chat: "):
        tokenizer.render_chat(messages(chat), ChatOptions(continue_final_message=True))


def test_a_template_gets_what_the_caller_sets_for_it() -> None:
    template = (
        "{{ messages[0].name }}{{ thinks }}{{ bos_token }}"
        "{% if add_generation_prompt %}>{% endif %}"
    )
    tokenizer = Tokenizer(BYTE_LEVEL, template, {"bos_token": "<s>"})
    chat = [ChatMessage("user", "Hi", name="Al")]
    assert tokenizer.render_chat(chat) == "Al<s>>"
    options = ChatOptions(add_generation_prompt=False, variables={"thinks": "?", "bos_token": "!"})
    assert tokenizer.render_chat(chat, options) == "Al?!"
    for name in ("messages", "tools", "documents", "add_generation_prompt"):
        with pytest.raises(InvalidArgument, match=f"chat_template_kwargs.{name}"):
            ChatOptions(variables={name: None})


def with_a_beginning() -> Tokenizer:
    """Puts a token in front of every text, as Llama's does."""
    backend = tokenizers.Tokenizer.from_str(BYTE_LEVEL.to_str())
    backend.post_processor = tokenizers.processors.TemplateProcessing(
        single="<|end|> $A", special_tokens=[("<|end|>", token_id(backend, "<|end|>"))]
    )
    return Tokenizer(backend, "{{ messages[0].content }}", {})


def test_special_tokens_are_put_around_texts_and_not_around_chats_unless_asked() -> None:
    tokenizer, end = with_a_beginning(), token_id(BYTE_LEVEL, "<|end|>")
    plain_ids = BYTE_LEVEL.encode("Hi").ids
    assert tokenizer.encode("Hi") == [end, *plain_ids]
    assert tokenizer.encode("Hi", add_special_tokens=False) == plain_ids
    chat = [ChatMessage("user", "Hi")]
    assert tokenizer.encode_chat(chat) == plain_ids
    assert tokenizer.encode_chat(chat, ChatOptions(add_special_tokens=True)) == [end, *plain_ids]


@pytest.mark.parametrize("text", TEXTS)
def test_the_bytes_of_tokens_are_those_of_the_text(demo: Tokenizer, text: str) -> None:
    for tokenizer in (demo, Tokenizer(BYTE_LEVEL, None, {})):
        ids = tokenizer.encode(text)
        assert b"".join(map(tokenizer.token_bytes, ids)) == text.encode()


def test_the_bytes_of_byte_tokens_and_words_are_what_they_stand_for() -> None:
    tokenizer = Tokenizer(BYTE_FALLBACK, None, {})

    def shown(name: str) -> tuple[bytes, str]:
        token = token_id(BYTE_FALLBACK, name)
        assert tokenizer.token_piece(token) == name
        return tokenizer.token_bytes(token), tokenizer.token_text(token)

    assert shown("▁Paris") == (b" Paris", " Paris")
    assert shown("▁") == (b" ", " ")
    assert shown("日") == ("日".encode(), "日")
    assert shown("<0x41>") == (b"A", "A")
    assert shown("<0xE6>") == (b"\xe6", "bytes:\\xe6")
    assert shown("</s>") == (b"</s>", "</s>")


def test_tokens_that_are_no_characters_are_shown_as_bytes() -> None:
    tokenizer = Tokenizer(BYTE_LEVEL, None, {})
    first, *_ = byte_ids(BYTE_LEVEL, "é".encode())
    assert tokenizer.token_text(first) == "bytes:\\xc3"
    assert tokenizer.token_text(token_id(BYTE_LEVEL, "<|end|>")) == "<|end|>"
    assert tokenizer.token_text(token_id(BYTE_LEVEL, "Ġ")) == " "


def test_ids_beyond_the_vocabulary_stand_for_nothing() -> None:
    # Models round their vocabulary up.
    tokenizer = Tokenizer(BYTE_LEVEL, None, {})
    assert tokenizer.token_bytes(10**6) == b""
    assert tokenizer.token_text(10**6) == tokenizer.token_piece(10**6) == ""


def test_tokens_of_other_kinds_are_decoded_alone() -> None:
    backend = tokenizers.Tokenizer(models.WordPiece({"un": 0, "##able": 1}, unk_token="un"))
    backend.decoder = decoders.WordPiece()
    tokenizer = Tokenizer(backend, None, {})
    assert tokenizer.token_bytes(0) == b"un"
    backend = tokenizers.Tokenizer(models.WordLevel({"w0": 0}, unk_token="w0"))
    assert Tokenizer(backend, None, {}).token_bytes(0) == b"w0"


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{{ raise_exception('roles must alternate') }}", "roles must alternate"),
        ("{{ messages[0].content + 1 }}", "can only concatenate"),
        ("{{ messages[0].missing.further }}", "missing"),
        ("{{ 1 // 0 }}", "zero"),
    ],
)
def test_a_template_that_fails_is_an_error_of_the_chat(template: str, message: str) -> None:
    tokenizer = Tokenizer(BYTE_LEVEL, template, {})
    with pytest.raises(ValueError, match=f"^chat: the model's template refuses it: .*{message}"):
        tokenizer.render_chat(messages(CHATS[0]))


@pytest.mark.parametrize(
    "template",
    [
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ messages.__class__.__base__ }}",
        "{{ raise_exception.__globals__['json'] }}",
        "{{ strftime_now.__code__.co_consts }}",
        "{{ ''['__class__']['__base__'] }}",
        "{{ (messages | attr('__class__')).__base__ }}",
        "{{ '{0.__class__.__base__}'.format(messages) }}",
        "{{ messages.append(1) }}",
        "{{ messages[0].update({'role': 'system'}) }}",
        "{{ namespace.__init__.__globals__ }}",
        "{% for i in range(10 ** 9) %}{% endfor %}",
    ],
)
def test_a_template_reaches_nothing_but_its_messages(template: str) -> None:
    with pytest.raises(ValueError, match="refuses it"):
        Tokenizer(BYTE_LEVEL, template, {}).render_chat(messages(CHATS[0]))


def test_a_template_that_can_not_be_read_is_refused_with_its_line() -> None:
    with pytest.raises(ValueError, match="chat template, line 2"):
        Tokenizer(BYTE_LEVEL, "fine\n{% for m in messages %}", {})


def test_without_a_template_a_chat_is_refused_and_text_is_not() -> None:
    tokenizer = Tokenizer(BYTE_LEVEL, None, {})
    assert not tokenizer.has_chat_template
    with pytest.raises(ValueError, match="has no chat template"):
        tokenizer.encode_chat(messages(CHATS[0]))
    assert tokenizer.decode(tokenizer.encode("Grüße"), skip_special_tokens=True) == "Grüße"


def test_a_folder_without_a_tokenizer_has_none(tmp_path: Path) -> None:
    assert Tokenizer.load(tmp_path) is None


def with_template_file(folder: Path, config: dict[str, Any], template: str) -> None:
    (folder / "chat_template.jinja").write_text(template)
    config["chat_template"] = "not this one"


def with_template_in_config(folder: Path, config: dict[str, Any], template: str) -> None:
    config["chat_template"] = template


def with_templates_by_name(folder: Path, config: dict[str, Any], template: str) -> None:
    config["chat_template"] = [
        {"name": "tool_use", "template": "not this one"},
        {"name": "default", "template": template},
    ]


@pytest.mark.parametrize(
    "write", [with_template_file, with_template_in_config, with_templates_by_name]
)
def test_a_template_is_found_wherever_models_keep_it(
    tmp_path: Path, write: Callable[[Path, dict[str, Any], str], None]
) -> None:
    BYTE_LEVEL.save(str(tmp_path / "tokenizer.json"))
    config: dict[str, Any] = {"bos_token": {"content": "<s>", "lstrip": False}, "eos_token": "</s>"}
    write(tmp_path, config, "{{ bos_token }}{{ messages[0].content }}{{ eos_token }}")
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    tokenizer = Tokenizer.load(tmp_path)
    assert tokenizer is not None
    assert tokenizer.has_chat_template
    assert tokenizer.render_chat([ChatMessage("user", "hi")]) == "<s>hi</s>"


def test_a_prompt_is_never_cut_or_padded_as_a_tokenizer_was_in_training(tmp_path: Path) -> None:
    backend = tokenizers.Tokenizer.from_str(BYTE_LEVEL.to_str())
    backend.enable_truncation(4)
    backend.enable_padding(length=8)
    backend.save(str(tmp_path / "tokenizer.json"))
    tokenizer = Tokenizer.load(tmp_path)
    assert tokenizer is not None
    for text in ("ab", "a much longer text than four tokens"):
        assert tokenizer.encode(text) == BYTE_LEVEL.encode(text).ids


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json"])
def test_a_damaged_file_is_named(demo_model_folder: Path, tmp_path: Path, name: str) -> None:
    for part in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(demo_model_folder / part, tmp_path / part)
    text = (tmp_path / name).read_text()
    (tmp_path / name).write_text(text[: len(text) // 2])
    with pytest.raises(ValueError, match=re.escape(str(tmp_path / name))):
        Tokenizer.load(tmp_path)
