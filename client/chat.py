"""`colrow chat`: a conversation in the terminal, or over a pipe.

`Conversation` is what was said and what of it still fits, `Chat` what a line that was typed does, and
a `Reader` where lines come from: an editor on a terminal, plain lines everywhere else.
"""

import json
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from rich.console import Console
from rich.markup import escape

from client.answer import Answer, stream_answer
from client.grpc_client import Colrow
from client.views import new_table
from colrow.errors import ServiceError
from colrow.v1 import inference_service_pb2

PROMPT = "> "
CONTINUED = ". "
CONTINUES = "\\"
"""A line that ends with it goes on in the next one."""

MIN_ROOM = 512
"""Tokens that the oldest turns make room for when no smaller answer was asked for."""

DEFAULT = "default"
NONE = "none"

SETTINGS: dict[str, Callable[[str], Any]] = {
    "temperature": float,
    "top_p": float,
    "top_k": int,
    "min_p": float,
    "max_tokens": int,
    "seed": int,
    "repetition_penalty": float,
    "presence_penalty": float,
    "frequency_penalty": float,
}

COMMANDS = {
    "help": ("/help", "this list"),
    "system": ("/system [TEXT]", f"show the system message, or set it; '{NONE}' removes it"),
    "settings": (
        "/settings [NAME VALUE]",
        f"show the settings, or change one; '{DEFAULT}' leaves it to the server",
    ),
    "retry": ("/retry", "answer the last question once more"),
    "undo": ("/undo", "take back the last question and its answer"),
    "reset": ("/reset", "forget all that was said; system message and settings stay"),
    "save": ("/save FILE", "write the conversation, as JSON where FILE ends with .json"),
    "stats": ("/stats", "tokens and times so far, and how full the context is"),
    "quit": ("/quit", "leave, as Ctrl-D does"),
}


@dataclass(frozen=True, slots=True)
class Turn:
    """A question and what was answered."""

    question: str
    answer: str


@dataclass(slots=True)
class Conversation:
    """What was said. The first `forgotten` turns are no longer told to the model."""

    system: str | None = None
    turns: list[Turn] = field(default_factory=list)
    forgotten: int = 0

    def messages(self, question: str | None = None) -> list[dict[str, str]]:
        """What the model is told, with a further question."""
        return self._messages(self.turns[self.forgotten :], question)

    def _messages(self, turns: list[Turn], question: str | None) -> list[dict[str, str]]:
        said = [] if self.system is None else [{"role": "system", "content": self.system}]
        for turn in turns:
            said.append({"role": "user", "content": turn.question})
            said.append({"role": "assistant", "content": turn.answer})
        if question is not None:
            said.append({"role": "user", "content": question})
        return said

    def forget_oldest(self) -> bool:
        """Leaves out one turn more; False when none is left."""
        if self.forgotten == len(self.turns):
            return False
        self.forgotten += 1
        return True

    def take_back(self) -> Turn | None:
        """Removes the last turn."""
        if not self.turns:
            return None
        turn = self.turns.pop()
        self.forgotten = min(self.forgotten, len(self.turns))
        return turn

    def reset(self) -> None:
        self.turns.clear()
        self.forgotten = 0

    def as_json(self) -> str:
        """All messages, those that the model was no longer told too."""
        return json.dumps(self._messages(self.turns, None), indent=2, ensure_ascii=False) + "\n"

    def as_markdown(self) -> str:
        parts = [
            f"**{message['role']}**\n\n{message['content'].strip()}\n"
            for message in self._messages(self.turns, None)
        ]
        return "\n".join(parts)


# --- where lines come from --------------------------------------------------------------------


class Reader(Protocol):
    """`read` gives what was typed; EOFError at the end, KeyboardInterrupt on Ctrl-C."""

    interactive: bool

    def read(self) -> str: ...


class LineReader:
    """Plain lines: of a pipe, without a prompt, or of a terminal that can do no more."""

    def __init__(self, *, interactive: bool) -> None:
        self.interactive = interactive

    def read(self) -> str:
        lines = [self._line(PROMPT)]
        while lines[-1].endswith(CONTINUES):
            lines[-1] = lines[-1].removesuffix(CONTINUES)
            try:
                lines.append(self._line(CONTINUED))
            except EOFError:
                break
        return "\n".join(lines)

    def _line(self, prompt: str) -> str:
        if self.interactive:
            # Not on stdout, which may be a file that takes the answers.
            sys.stderr.write(prompt)
            sys.stderr.flush()
        line = sys.stdin.readline()
        if not line:
            raise EOFError
        return line.removesuffix("\n")


class EditorReader:
    """An editor of several lines with history. Enter sends; Alt-Enter begins a new line."""

    interactive = True

    def __init__(self) -> None:
        from prompt_toolkit import PromptSession
        from prompt_toolkit.completion import WordCompleter
        from prompt_toolkit.key_binding import KeyBindings, KeyPressEvent

        bindings = KeyBindings()

        @bindings.add("enter")
        def _send(event: KeyPressEvent) -> None:
            buffer = event.current_buffer
            if buffer.document.text_before_cursor.endswith(CONTINUES):
                buffer.delete_before_cursor()
                buffer.insert_text("\n")
            else:
                buffer.validate_and_handle()

        @bindings.add("escape", "enter")
        def _new_line(event: KeyPressEvent) -> None:
            event.current_buffer.insert_text("\n")

        # History is kept in memory: what is typed into a chat should not be found on disk.
        self._session: PromptSession[str] = PromptSession(
            PROMPT,
            multiline=True,
            prompt_continuation=CONTINUED,
            key_bindings=bindings,
            completer=WordCompleter([f"/{name}" for name in COMMANDS], sentence=True),
            complete_while_typing=False,
        )

    def read(self) -> str:
        return self._session.prompt()


def make_reader(messages: Console) -> Reader:
    """An editor where both ends are a terminal that can show one."""
    if not sys.stdin.isatty():
        return LineReader(interactive=False)
    if not sys.stdout.isatty() or not messages.is_terminal or messages.is_dumb_terminal:
        return LineReader(interactive=True)
    return EditorReader()


# --- what lines do ----------------------------------------------------------------------------


class Chat:
    """A conversation with the model of a cluster. Answers go to stdout, all else to `messages`."""

    def __init__(
        self,
        colrow: Colrow,
        model: inference_service_pb2.GetModelResponse,
        messages: Console,
        *,
        system: str | None = None,
        settings: dict[str, Any] | None = None,
    ) -> None:
        if not model.has_chat_template:
            raise ValueError(
                f"model = {model.model!r}: has no chat template; "
                "`colrow generate --raw` continues text"
            )
        self.conversation = Conversation(system)
        self.settings = {name: (settings or {}).get(name) for name in SETTINGS}
        self.answers: list[Answer] = []
        self._colrow = colrow
        self._model = model
        self._messages = messages
        self._unanswered: str | None = None
        self._context_tokens = 0
        self._saved: set[Path] = set()

    def run(self, reader: Reader) -> None:
        """Reads and answers until the end of the input or /quit.

        Without anybody to read them errors are raised, so that a script notices.
        """
        if reader.interactive:
            self._say(
                f"{escape(self._model.model)} at {escape(self._colrow.target)}. Enter sends; a line "
                f"that ends with {CONTINUES} goes on. Ctrl-C stops an answer, Ctrl-D leaves, /help "
                "lists commands."
            )
        while True:
            try:
                line = reader.read()
            except EOFError:
                if reader.interactive:
                    self._messages.print()
                return
            except KeyboardInterrupt:
                if not reader.interactive:
                    raise
                self._say("\nCtrl-D or /quit leaves.")
                continue
            try:
                if not self.handle(line):
                    return
            except (ServiceError, ValueError) as error:
                if not reader.interactive:
                    raise
                self._messages.print(f"[red]{escape(str(error))}[/red]", soft_wrap=True)
            except KeyboardInterrupt:  # before the answer began
                if not reader.interactive:
                    raise
                self._say("Stopped.")

    def handle(self, line: str) -> bool:
        """Does what a line says; False to leave.

        A question may begin with a slash when it is doubled. ValueError names what is no command.
        """
        text = line.strip()
        if text.startswith("//"):
            text = text[1:]
        elif text.startswith("/"):
            name, _, rest = text[1:].partition(" ")
            if name in ("quit", "exit"):
                return False
            if name not in COMMANDS:
                raise ValueError(f"/{name} is no command; /help lists them, // begins a question")
            getattr(self, f"_{name}")(rest.strip())
            return True
        if text:
            self.ask(text)
        return True

    def ask(self, question: str) -> None:
        """Streams the answer; what the model said until Ctrl-C counts as its answer."""
        self._unanswered = question
        said, max_tokens = self._fit(question)
        answer = stream_answer(
            self._colrow,
            said,
            interruptible=True,
            **self.settings | {"max_tokens": max_tokens},  # type: ignore[typeddict-item]
        )
        if answer.completion_tokens:
            self._unanswered = None
            self.conversation.turns.append(Turn(question, answer.text))
            self.answers.append(answer)
        self._context_tokens += answer.completion_tokens
        self._say(answer.summary)

    def _fit(self, question: str) -> tuple[list[dict[str, str]], int]:
        """The messages to send, without turns that leave no room for an answer, and that room."""
        limit = self._model.context_length
        wanted = self.settings["max_tokens"] or limit
        needed = min(wanted, MIN_ROOM, max(1, limit // 2))
        before = self.conversation.forgotten
        while True:
            said = self.conversation.messages(question)
            num_tokens = len(self._colrow.tokenize(said))
            if limit - num_tokens >= needed or not self.conversation.forget_oldest():
                break
        if dropped := self.conversation.forgotten - before:
            turns = "turn" if dropped == 1 else f"{dropped} turns"
            self._say(
                f"The conversation no longer fits the context of {limit:,} tokens: "
                f"the oldest {turns} left out."
            )
        if num_tokens >= limit:
            raise ValueError(
                f"the question: with the system message it has {num_tokens:,} tokens, and the "
                f"context holds {limit:,}"
            )
        self._context_tokens = num_tokens
        return said, min(wanted, limit - num_tokens)

    def _say(self, text: str) -> None:
        self._messages.print(text, style="dim", soft_wrap=True)

    # Commands; each takes what stands after its name.

    def _help(self, _: str) -> None:
        table = new_table("Commands", "command", "what it does")
        for usage, what in COMMANDS.values():
            table.add_row(escape(usage), escape(what))
        self._messages.print(table)

    def _system(self, text: str) -> None:
        if text:
            self.conversation.system = None if text == NONE else text
        current = self.conversation.system
        self._say(f"system: {escape(current)}" if current is not None else "no system message")

    def _settings(self, text: str) -> None:
        if text:
            name, _, value = text.replace("=", " ", 1).partition(" ")
            self.settings[name] = parse_setting(name, value.strip())
        for known, current in self.settings.items():
            self._say(f"{known} {DEFAULT if current is None else current}")

    def _reset(self, _: str) -> None:
        self.conversation.reset()
        self._unanswered = None
        self._context_tokens = 0
        self._say("All that was said is forgotten.")

    def _undo(self, _: str) -> None:
        turn = self.conversation.take_back()
        if turn is None:
            raise ValueError("/undo: nothing was said yet")
        self._say(f"Taken back: {escape(_shortened(turn.question))}")

    def _retry(self, _: str) -> None:
        question = self._unanswered  # of a call that failed
        if question is None:
            turn = self.conversation.take_back()
            if turn is None:
                raise ValueError("/retry: nothing was asked yet")
            question = turn.question
        self.ask(question)

    def _save(self, name: str) -> None:
        if not name:
            raise ValueError("/save: needs the name of a file")
        path = Path(name).expanduser()
        if path.exists() and path.resolve() not in self._saved:
            raise ValueError(f"/save {name}: the file is there already")
        said = self.conversation
        text = said.as_json() if path.suffix == ".json" else said.as_markdown()
        try:
            path.write_text(text, encoding="utf-8")
        except OSError as error:
            raise ValueError(f"/save {name}: {error.strerror}") from error
        self._saved.add(path.resolve())
        self._say(f"{len(said.turns)} turns written to {escape(str(path))}")

    def _stats(self, _: str) -> None:
        answers = self.answers
        prompt = sum(answer.prompt_tokens for answer in answers)
        cached = sum(answer.cached_prompt_tokens for answer in answers)
        completion = sum(answer.completion_tokens for answer in answers)
        line = f"{len(answers)} answers of {completion:,} tokens; {prompt:,} prompt tokens"
        if prompt:
            line += f", {cached / prompt:.0%} of them from the prefix cache"
        self._say(line)
        decoding = sum(answer.last_s - answer.first_s for answer in answers)
        later = sum(answer.completion_tokens - answer.first_tokens for answer in answers)
        if decoding:
            first = sum(answer.first_s for answer in answers) / len(answers)
            self._say(f"first token after {first:.2f} s, then {later / decoding:.1f} tokens/s")
        forgotten = self.conversation.forgotten
        self._say(
            f"context: {self._context_tokens:,} of {self._model.context_length:,} tokens"
            + (f"; {forgotten} of the oldest turns left out" if forgotten else "")
        )


def parse_setting(name: str, text: str) -> Any:
    """The value of a setting; ValueError names what is wrong. Ranges are the server's to check."""
    if name not in SETTINGS:
        raise ValueError(f"{name} is no setting; there are {', '.join(SETTINGS)}")
    if text == DEFAULT:
        return None
    kind = SETTINGS[name]
    try:
        value = kind(text)
    except ValueError:
        kind_name = "whole number" if kind is int else "number"
        raise ValueError(f"{name} = {text!r}: is no {kind_name}, nor '{DEFAULT}'") from None
    if kind is int and not 0 <= value < 2**32 and name != "seed":
        raise ValueError(f"{name} = {text}: is not in [0, {2**32})")
    return value


def _shortened(text: str, limit: int = 60) -> str:
    line = " ".join(text.split())
    return line if len(line) <= limit else f"{line[: limit - 1]}…"
