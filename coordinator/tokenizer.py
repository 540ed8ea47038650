"""Text to token ids and back, with the tokenizer and the chat template that the model came with."""

import asyncio
import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any, TypeVar

import jinja2
import jinja2.ext
import jinja2.parser
import tokenizers
from jinja2.sandbox import ImmutableSandboxedEnvironment

from colrow.errors import InvalidArgument

T = TypeVar("T")

TOKENIZER_FILE = "tokenizer.json"

REPLACEMENT = "\ufffd"  # what decoders put for bytes that are no whole character
MAX_TEXT_CHARACTERS = 2**20  # of one text; that many take seconds, and up to 400 MiB meanwhile
LONG_TEXTS_AT_ONCE = 2
LONG_TEXT = 8192  # characters; tokenizing less takes a few milliseconds at most
LOOK_BACK = 8  # tokens that the text after them may depend on
MAX_HALF = 3  # characters, at most, that decoders make of one that lacks bytes: it has up to four

# What every template is given; a caller may not put something else in its place.
TEMPLATE_NAMES = frozenset({"messages", "tools", "documents", "add_generation_prompt"})

MESSAGE_CHARACTERS = 16  # that a template puts around a message, about

_SPACE = "\u2581"  # SentencePiece's sign for a space
_BYTE_PIECE = re.compile("<0x([0-9A-F]{2})>")
_END_MARK = "COLROW_END_OF_FINAL_MESSAGE "  # trimmed of its space by templates that trim contents


@dataclass(frozen=True, slots=True)
class ChatMessage:
    """`name` tells participants of one role apart, for templates that know it."""

    role: str
    content: str
    name: str | None = None


@dataclass(frozen=True, slots=True)
class ChatOptions:
    """How a conversation is written.

    `continue_final_message` leaves the last message open, for the model to go on with it; it takes the
    place of `add_generation_prompt`. `variables` are further ones of the template.
    """

    add_generation_prompt: bool = True
    continue_final_message: bool = False
    add_special_tokens: bool = False
    variables: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in TEMPLATE_NAMES & self.variables.keys():
            raise InvalidArgument(
                f"chat_template_kwargs.{name}", self.variables[name], "is not for the caller to set"
            )


def chat_length(messages: Sequence[ChatMessage]) -> int:
    """About as many characters as a conversation is when it is written."""
    return sum(len(m.role) + len(m.content) + MESSAGE_CHARACTERS for m in messages)


ASK = ChatOptions()
"""The assistant is to answer."""


class Tokenizer:
    """A Hugging Face fast tokenizer (`tokenizer.json`) and its chat template, if it has one."""

    def __init__(
        self, backend: tokenizers.Tokenizer, template: str | None, special: dict[str, str]
    ) -> None:
        """ValueError when `template` is none that can be read."""
        # What a tokenizer was saved with for training has no place here: prompts are never cut.
        backend.no_truncation()
        backend.no_padding()
        self._backend = backend
        self._special = special
        self.max_characters = MAX_TEXT_CHARACTERS
        self._threads = ThreadPoolExecutor(LONG_TEXTS_AT_ONCE, thread_name_prefix="tokenizer")
        self._added = {
            token_id: token.content
            for token_id, token in backend.get_added_tokens_decoder().items()
        }
        self._special_ids = frozenset(
            token_id
            for token_id, token in backend.get_added_tokens_decoder().items()
            if token.special
        )
        self._decoders = _decoders(backend)
        try:
            self._template = _environment().from_string(template) if template else None
        except jinja2.TemplateSyntaxError as error:
            raise ValueError(f"chat template, line {error.lineno}: {error}") from error

    @classmethod
    def load(cls, folder: Path) -> "Tokenizer | None":
        """The tokenizer of a model folder; None where it has none, and only token ids can be served.

        ValueError naming the file that can't be read.
        """
        file = folder / TOKENIZER_FILE
        if not file.is_file():
            return None
        try:
            backend = tokenizers.Tokenizer.from_file(str(file))
        except Exception as error:  # the library raises a bare Exception
            raise ValueError(f"{file}: {error}") from error
        config_file = folder / "tokenizer_config.json"
        try:
            config = json.loads(config_file.read_text()) if config_file.is_file() else {}
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{config_file}: {error}") from error
        if not isinstance(config, dict):
            raise ValueError(f"{config_file}: is no JSON object")
        template_file = folder / "chat_template.jinja"
        template = (
            template_file.read_text() if template_file.is_file() else config.get("chat_template")
        )
        if isinstance(template, list):  # several templates, by name
            template = {item["name"]: item["template"] for item in template}.get("default")
        special = {
            name: _content(config[name])
            for name in ("bos_token", "eos_token", "unk_token", "pad_token")
            if config.get(name)
        }
        return cls(backend, template, special)

    @property
    def has_chat_template(self) -> bool:
        return self._template is not None

    def check_length(self, field: str, length: int, of: str = "characters") -> None:
        """InvalidArgument of `field` where it has too many characters or tokens to be looked at."""
        if length > self.max_characters:
            raise InvalidArgument(field, f"{length} {of}", f"are more than {self.max_characters}")

    async def aside(self, length: int, work: Callable[[], T]) -> T:
        """`work` on so many characters, off the event loop where others would notice. So few at once
        that their memory is bounded."""
        if length <= LONG_TEXT:
            return work()
        return await asyncio.get_running_loop().run_in_executor(self._threads, work)

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """Token ids of a prompt, with what the tokenizer puts around one (a leading BOS, say)."""
        # Of one text: unlike `encode`, this lets other threads run meanwhile.
        (encoding,) = self._backend.encode_batch_fast([text], add_special_tokens=add_special_tokens)
        return encoding.ids

    def encode_chat(self, messages: Iterable[ChatMessage], options: ChatOptions = ASK) -> list[int]:
        """Token ids of a conversation that the assistant is to continue."""
        text = self.render_chat(messages, options)
        return self.encode(text, add_special_tokens=options.add_special_tokens)

    def render_chat(self, messages: Iterable[ChatMessage], options: ChatOptions = ASK) -> str:
        """The conversation as the model's template writes it. ValueError where there is none."""
        if self._template is None:
            raise ValueError("chat: the model has no chat template; send text or token ids")
        chat = [
            {"role": m.role, "content": m.content} | ({} if m.name is None else {"name": m.name})
            for m in messages
        ]
        if options.continue_final_message:
            if not chat:
                raise ValueError("chat: there is no final message to continue")
            chat[-1]["content"] += _END_MARK
        variables = {
            **self._special,
            **options.variables,
            "messages": chat,
            "tools": None,
            "documents": None,
            "add_generation_prompt": options.add_generation_prompt
            and not options.continue_final_message,
        }
        try:
            text = self._template.render(variables)
        except Exception as error:  # a template is a program: it can fail in any way
            raise ValueError(f"chat: the model's template refuses it: {error}") from error
        return _before_mark(text) if options.continue_final_message else text

    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool) -> str:
        # Of one text: unlike `decode`, this lets other threads run meanwhile.
        (text,) = self._backend.decode_batch(
            [list(token_ids)], skip_special_tokens=skip_special_tokens
        )
        return text

    def token_piece(self, token_id: int) -> str:
        """The vocabulary's own name of a token; empty for an id that it does not have."""
        return self._backend.id_to_token(token_id) or ""

    def token_bytes(self, token_id: int) -> bytes:
        """What a token stands for by itself, whole characters or not; special ones as written."""
        if token_id in self._added:
            return self._added[token_id].encode()
        piece = self.token_piece(token_id)
        if "ByteLevel" in self._decoders:
            # A letter that stands for no byte is of a token that was added by hand.
            return b"".join(
                bytes([_BYTE_LETTERS[letter]]) if letter in _BYTE_LETTERS else letter.encode()
                for letter in piece
            )
        if "ByteFallback" in self._decoders and (byte := _BYTE_PIECE.fullmatch(piece)):
            return bytes.fromhex(byte[1])
        if _SPACE in piece and not self._decoders.isdisjoint({"Replace", "Metaspace"}):
            # Decoded alone it would lose its space, as the one that begins a text does.
            return piece.replace(_SPACE, " ").encode()
        return self.decode([token_id], skip_special_tokens=False).encode()

    def token_text(self, token_id: int) -> str:
        """A token as text; `bytes:\\xe6\\x97` where it is none without those around it."""
        data = self.token_bytes(token_id)
        try:
            return data.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)

    def stream(
        self, prompt: Sequence[int] = (), *, show_special_tokens: bool = False
    ) -> "TextStream":
        """The text that continues `prompt`."""
        hidden = frozenset[int]() if show_special_tokens else self._special_ids
        return TextStream(self._backend, prompt, hidden)


class TextStream:
    """Token ids in, text out, never half a character: bytes that need more tokens are held back.

    A token's text depends on those before it (SentencePiece drops the space that a text begins with),
    so some of them are decoded again with it, and always few: a text may end in tokens without end that
    are no text. `tokenizers.decoders.DecodeStream` does the same, but raises where that changes what was
    sent: a decoder with byte fallback takes back a character when bytes follow that are none.
    """

    def __init__(
        self, backend: tokenizers.Tokenizer, prompt: Sequence[int], hidden: frozenset[int]
    ) -> None:
        """Tokens that are `hidden` have no part in the text."""
        self._backend = backend
        self._hidden = hidden
        self._context_ids: list[int] = []  # all of their text is sent
        self._context = ""
        self._held_ids: list[int] = []
        self._sent = ""  # of the text of both
        self._length = 0  # of that text
        for token_id in prompt[-LOOK_BACK:]:
            self.feed(token_id)

    def feed(self, token_id: int) -> str:
        """The text that this token completes; often empty."""
        if token_id in self._hidden:
            return ""
        self._held_ids.append(token_id)
        text = self._decode(self._context_ids + self._held_ids)
        if not text.startswith(self._sent):
            text = self._context + self._decode(self._held_ids)
        num_half = self._num_half(text)
        whole = text[: len(text) - num_half]
        new = whole[len(self._sent) :]
        if new:
            self._sent = whole
        if new and not num_half:
            self._context_ids, self._held_ids = self._held_ids, []
            text = self._context = self._sent = self._decode(self._context_ids)
        elif len(self._held_ids) > 4 * LOOK_BACK:
            # The last may be half a character. The first ones have spoilt, where bytes are tokens, all
            # that come after them up to the next word.
            del self._held_ids[LOOK_BACK : -2 * LOOK_BACK]
            text = self._decode(self._context_ids + self._held_ids)
            self._sent = text[: len(text) - num_half]
        self._length = len(text)
        return new

    def _num_half(self, text: str) -> int:
        """How many characters at the end may still become others."""
        if len(text) < self._length:
            # Bytes that stood there one by one have become a character, be it that of broken ones.
            return 0
        num_broken = len(text) - len(text.rstrip(REPLACEMENT))
        # What as many tokens have not completed further ones don't, but for its end.
        return num_broken if len(self._held_ids) <= MAX_HALF else min(num_broken, MAX_HALF)

    def _decode(self, token_ids: list[int]) -> str:
        return self._backend.decode(token_ids, skip_special_tokens=False)


def _byte_letters() -> dict[str, int]:
    """The letters that GPT-2 writes bytes with: printable ones for themselves, others from U+0100 on."""
    printable = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAC + 1), *range(0xAE, 0xFF + 1)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {
        chr(256 + place): byte for place, byte in enumerate(others)
    }


_BYTE_LETTERS = _byte_letters()


def _decoders(backend: tokenizers.Tokenizer) -> frozenset[str]:
    """The kinds of decoders that a tokenizer turns its tokens to text with."""
    if backend.decoder is None:
        return frozenset()
    # The library tells what a decoder consists of in its saved form only.
    state = json.loads(backend.decoder.__getstate__())
    return frozenset(part["type"] for part in (state, *state.get("decoders", ())))


def _before_mark(text: str) -> str:
    """The conversation up to the end of the final message."""
    place = text.rfind(_END_MARK.rstrip())
    if place < 0:
        raise ValueError("chat: the model's template does not show the final message to continue")
    # Where the template trims contents, the space before the mark was at an end as well.
    is_kept = text.startswith(_END_MARK, place)
    return text[:place] if is_kept else text[:place].rstrip()


def _content(token: Any) -> str:
    """A special token is written as text or as an object around it."""
    return token["content"] if isinstance(token, dict) else token


class _Generation(jinja2.ext.Extension):
    """`{% generation %}` marks for training what the assistant says; here it stands for its content."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: jinja2.parser.Parser) -> list[jinja2.nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _environment() -> ImmutableSandboxedEnvironment:
    # Templates come with models: they are data from elsewhere and run in a sandbox. The settings and
    # what is added are those that Hugging Face templates are written for.
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, jinja2.ext.loopcontrols]
    )

    def raise_exception(message: str) -> None:
        raise jinja2.TemplateError(message)

    def strftime_now(format: str) -> str:
        return datetime.now().strftime(format)

    def tojson(value: Any, **options: Any) -> str:
        return json.dumps(value, **{"ensure_ascii": False, **options})  # jinja's own escapes HTML

    environment.globals |= {"raise_exception": raise_exception, "strftime_now": strftime_now}
    environment.filters["tojson"] = tojson
    return environment
