"""Text to token ids and back, with the tokenizer and the chat template that the model came with."""

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import jinja2
import jinja2.ext
import jinja2.parser
import tokenizers
from jinja2.sandbox import ImmutableSandboxedEnvironment

TOKENIZER_FILE = "tokenizer.json"

REPLACEMENT = "\ufffd"  # what decoders put for bytes that are no whole character
LOOK_BACK = 8  # tokens of a prompt that the text after it may depend on


@dataclass(frozen=True, slots=True)
class ChatMessage:
    role: str
    content: str


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

    def encode(self, text: str) -> list[int]:
        """Token ids of a prompt, with what the tokenizer puts around one (a leading BOS, say)."""
        return self._backend.encode(text).ids

    def encode_chat(self, messages: Iterable[ChatMessage]) -> list[int]:
        """Token ids of a conversation that the assistant is to continue."""
        return self._backend.encode(self.render_chat(messages), add_special_tokens=False).ids

    def render_chat(self, messages: Iterable[ChatMessage]) -> str:
        """The conversation as the model's template writes it. ValueError where there is none."""
        if self._template is None:
            raise ValueError("chat: the model has no chat template; send text or token ids")
        try:
            return self._template.render(
                messages=[{"role": m.role, "content": m.content} for m in messages],
                tools=None,
                documents=None,
                add_generation_prompt=True,
                **self._special,
            )
        except Exception as error:  # a template is a program: it can fail in any way
            raise ValueError(f"chat: the model's template refuses it: {error}") from error

    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool) -> str:
        return self._backend.decode(list(token_ids), skip_special_tokens=skip_special_tokens)

    def stream(self, prompt: Sequence[int] = ()) -> "TextStream":
        """The text that continues `prompt`."""
        return TextStream(self._backend, prompt)


class TextStream:
    """Token ids in, text out, never half a character: bytes that need more tokens are held back.

    A token's text depends on those before it (SentencePiece drops the space that a text begins with),
    so some of them are decoded again with it. `tokenizers.decoders.DecodeStream` does the same, but
    raises where that changes what was sent: a decoder with byte fallback takes back a character when
    bytes follow that are none.
    """

    def __init__(self, backend: tokenizers.Tokenizer, prompt: Sequence[int]) -> None:
        self._backend = backend
        self._context_ids: list[int] = []  # all of their text is sent
        self._context = ""
        self._held_ids: list[int] = []
        self._sent = ""  # of the text of both
        for token_id in prompt[-LOOK_BACK:]:
            self.feed(token_id)

    def feed(self, token_id: int) -> str:
        """The text that this token completes; often empty."""
        self._held_ids.append(token_id)
        text = self._decode(self._context_ids + self._held_ids)
        if not text.startswith(self._sent):
            text = self._context + self._decode(self._held_ids)
        whole = text.rstrip(REPLACEMENT)
        if len(whole) <= len(self._sent):
            return ""
        new, self._sent = whole[len(self._sent) :], whole
        if whole == text:
            self._context_ids, self._held_ids = self._held_ids, []
            self._context = self._sent = self._decode(self._context_ids)
        return new

    def _decode(self, token_ids: list[int]) -> str:
        return self._backend.decode(token_ids, skip_special_tokens=True)


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
