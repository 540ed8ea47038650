"""Text to token ids and back, with the tokenizer and the chat template that the model came with."""

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2
import tokenizers
from jinja2.sandbox import ImmutableSandboxedEnvironment
from tokenizers.decoders import DecodeStream

TOKENIZER_FILE = "tokenizer.json"


@dataclass(frozen=True, slots=True)
class ChatMessage:
    role: str
    content: str


class Tokenizer:
    """A Hugging Face fast tokenizer (`tokenizer.json`) and its chat template, if it has one."""

    def __init__(
        self, backend: tokenizers.Tokenizer, template: str | None, special: dict[str, str]
    ) -> None:
        self._backend = backend
        self._special = special
        self._template = _environment().from_string(template) if template else None

    @classmethod
    def load(cls, folder: Path) -> "Tokenizer | None":
        """The tokenizer of a model folder; None where it has none, and only token ids can be served."""
        file = folder / TOKENIZER_FILE
        if not file.is_file():
            return None
        try:
            backend = tokenizers.Tokenizer.from_file(str(file))
        except Exception as error:  # the library raises a bare Exception
            raise ValueError(f"{file}: {error}") from error
        config_file = folder / "tokenizer_config.json"
        config = json.loads(config_file.read_text()) if config_file.is_file() else {}
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
                add_generation_prompt=True,
                **self._special,
            )
        except jinja2.TemplateError as error:
            raise ValueError(f"chat: the model's template refuses it: {error}") from error

    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool) -> str:
        return self._backend.decode(list(token_ids), skip_special_tokens=skip_special_tokens)

    def stream(self) -> "TextStream":
        return TextStream(self._backend)


class TextStream:
    """Token ids in, text out, never half a character: bytes that need more tokens are held back."""

    def __init__(self, backend: tokenizers.Tokenizer) -> None:
        self._backend = backend
        self._stream = DecodeStream(skip_special_tokens=True)

    def feed(self, token_id: int) -> str:
        """The text that this token completes; often empty."""
        return self._stream.step(self._backend, token_id) or ""


def _content(token: Any) -> str:
    """A special token is written as text or as an object around it."""
    return token["content"] if isinstance(token, dict) else token


def _environment() -> ImmutableSandboxedEnvironment:
    # Templates come with models: they are data from elsewhere and run in a sandbox. The settings and
    # `raise_exception` are what Hugging Face templates are written for.
    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)

    def raise_exception(message: str) -> None:
        raise jinja2.TemplateError(message)

    environment.globals["raise_exception"] = raise_exception
    return environment
