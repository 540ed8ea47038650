"""`colrow chat`: what is told to the model, what lines do, and where they come from."""

import io
import json
from collections.abc import Generator, Iterator
from pathlib import Path
from typing import Any

import pytest
from prompt_toolkit.application import create_app_session
from prompt_toolkit.input import PipeInput, create_pipe_input
from prompt_toolkit.output import DummyOutput
from rich.console import Console

from client.chat import (
    Chat,
    Conversation,
    EditorReader,
    LineReader,
    Reader,
    Turn,
    make_reader,
    parse_setting,
)
from client.grpc_client import Piece
from colrow.errors import ServiceError, Unavailable
from colrow.v1 import inference_service_pb2 as pb

Messages = list[dict[str, str]]


class FakeColrow:
    """Answers `a1`, `a2`, …; a message is as many tokens as it has words, and two more."""

    target = "there:1"

    def __init__(self) -> None:
        self.asked: list[Messages] = []
        self.settings: list[dict[str, Any]] = []
        self.error: BaseException | None = None
        self.answers_before_error = 0

    def tokenize(self, messages: Messages) -> list[int]:
        return [0] * sum(2 + len(message["content"].split()) for message in messages)

    def generate(self, messages: Messages, **settings: Any) -> Generator[Piece, None, None]:
        self.asked.append(list(messages))
        self.settings.append(settings)
        text = f"a{len(self.asked)}"
        if self.error is None or self.answers_before_error:
            yield Piece(text, (1,))
        if self.error is not None:
            raise self.error
        yield Piece("", (), "length", len(self.tokenize(messages)), 1, 4)


class Typed:
    """A reader of given lines; exceptions among them are raised."""

    def __init__(self, *lines: str | BaseException, interactive: bool = True) -> None:
        self.interactive = interactive
        self._lines: Iterator[str | BaseException] = iter((*lines, EOFError()))

    def read(self) -> str:
        line = next(self._lines)
        if isinstance(line, BaseException):
            raise line
        return line


def make_chat(colrow: FakeColrow, *, context: int = 8192, **options: Any) -> Chat:
    about = pb.GetModelResponse(model="tiny", context_length=context, has_chat_template=True)
    shown = Console(file=io.StringIO(), width=200, highlight=False)
    return Chat(colrow, about, shown, **options)  # type: ignore[arg-type]


def shown(chat: Chat) -> str:
    file = chat._messages.file
    assert isinstance(file, io.StringIO)
    return file.getvalue()


@pytest.fixture
def colrow() -> FakeColrow:
    return FakeColrow()


# --- the conversation -------------------------------------------------------------------------


def test_the_model_is_told_system_message_turns_and_question() -> None:
    said = Conversation("Be brief.", [Turn("q1", "a1")])
    assert [(m["role"], m["content"]) for m in said.messages("q2")] == [
        ("system", "Be brief."),
        ("user", "q1"),
        ("assistant", "a1"),
        ("user", "q2"),
    ]


def test_forgotten_turns_are_not_told_and_still_written() -> None:
    said = Conversation("Be brief.", [Turn("q1", "a1"), Turn("q2", "a2")])
    assert said.forget_oldest()
    assert [m["content"] for m in said.messages("q3")] == ["Be brief.", "q2", "a2", "q3"]
    assert [m["content"] for m in json.loads(said.as_json())] == [
        *("Be brief.", "q1", "a1", "q2", "a2")
    ]
    assert "**user**\n\nq1\n\n**assistant**\n\na1\n" in said.as_markdown()
    assert said.forget_oldest()
    assert not said.forget_oldest()


def test_taking_back_reaches_into_what_was_forgotten() -> None:
    said = Conversation(None, [Turn("q1", "a1"), Turn("q2", "a2")], forgotten=2)
    assert said.take_back() == Turn("q2", "a2")
    assert said.forgotten == 1
    said.turns.append(Turn("q3", "a3"))
    assert [m["content"] for m in said.messages()] == ["q3", "a3"]
    said.reset()
    assert said.take_back() is None
    assert said.messages() == []


# --- asking -----------------------------------------------------------------------------------


def test_each_question_is_asked_with_what_was_said_before(
    colrow: FakeColrow, capsys: pytest.CaptureFixture[str]
) -> None:
    chat = make_chat(colrow, system="Be brief.", settings={"temperature": 0.5, "max_tokens": 7})
    chat.run(Typed("one", "", "two"))
    assert [m["content"] for m in colrow.asked[1]] == ["Be brief.", "one", "a1", "two"]
    assert colrow.settings[1]["temperature"] == 0.5
    assert colrow.settings[1]["max_tokens"] == 7
    assert colrow.settings[1]["seed"] is None
    assert capsys.readouterr().out == "a1\na2\n", "answers and nothing else"
    assert "1 tokens in" in shown(chat)
    assert "4 cached" in shown(chat)


def test_oldest_turns_are_left_out_when_there_is_no_room_and_that_is_said(
    colrow: FakeColrow,
) -> None:
    # A turn is 3 + 3 tokens and a question 3; the context of 20 keeps 10 free for the answer.
    chat = make_chat(colrow, context=20)
    chat.run(Typed("q1", "q2", "q3", "q4"))
    assert [[m["content"] for m in asked] for asked in colrow.asked] == [
        ["q1"],
        ["q1", "a1", "q2"],
        ["q2", "a2", "q3"],
        ["q3", "a3", "q4"],
    ]
    assert shown(chat).count("no longer fits the context of 20 tokens") == 2
    assert [s["max_tokens"] for s in colrow.settings] == [17, 11, 11, 11]
    assert len(chat.conversation.turns) == 4


def test_a_smaller_answer_makes_less_room(colrow: FakeColrow) -> None:
    chat = make_chat(colrow, context=20, settings={"max_tokens": 5})
    chat.run(Typed("q1", "q2", "q3"))
    assert [m["content"] for m in colrow.asked[2]] == ["q1", "a1", "q2", "a2", "q3"]
    assert colrow.settings[2]["max_tokens"] == 5


def test_a_question_that_is_longer_than_the_context_is_refused(colrow: FakeColrow) -> None:
    chat = make_chat(colrow, context=20)
    chat.run(Typed("q1", "word " * 30))
    assert "32 tokens, and the context holds 20" in shown(chat)
    assert len(colrow.asked) == 1


def test_ctrl_c_ends_the_answer_and_not_the_chat(
    colrow: FakeColrow, capsys: pytest.CaptureFixture[str]
) -> None:
    colrow.error, colrow.answers_before_error = KeyboardInterrupt(), 1
    chat = make_chat(colrow)
    assert chat.handle("one")
    colrow.error = None
    chat.handle("two")
    # What was said until then is part of the conversation.
    assert [m["content"] for m in colrow.asked[1]] == ["one", "a1", "two"]
    assert capsys.readouterr().out == "a1\na2\n"
    assert "interrupted" in shown(chat)


def test_an_answer_that_did_not_begin_can_be_asked_for_again(colrow: FakeColrow) -> None:
    colrow.error = KeyboardInterrupt()
    chat = make_chat(colrow)
    chat.handle("one")
    assert chat.conversation.turns == []
    colrow.error = None
    chat.handle("/retry")
    assert [m["content"] for m in colrow.asked[1]] == ["one"]
    assert chat.conversation.turns == [Turn("one", "a2")]


def test_an_error_is_shown_and_the_chat_goes_on(colrow: FakeColrow) -> None:
    colrow.error = Unavailable("[nobody] there")
    chat = make_chat(colrow)
    chat.run(Typed("one", "/settings temperature 0"))
    assert "[nobody] there" in shown(chat)
    assert chat.settings["temperature"] == 0
    assert chat.conversation.turns == []


def test_without_anybody_there_an_error_is_raised(colrow: FakeColrow) -> None:
    colrow.error = Unavailable("gone")
    with pytest.raises(ServiceError, match="gone"):
        make_chat(colrow).run(Typed("one", interactive=False))
    with pytest.raises(ValueError, match="/no is no command"):
        make_chat(colrow).run(Typed("/no such", interactive=False))


def test_ctrl_c_at_the_prompt_says_how_to_leave(colrow: FakeColrow) -> None:
    chat = make_chat(colrow)
    chat.run(Typed(KeyboardInterrupt(), "one"))
    assert "Ctrl-D or /quit leaves" in shown(chat)
    assert len(colrow.asked) == 1


def test_a_model_without_a_chat_template_is_refused(colrow: FakeColrow) -> None:
    about = pb.GetModelResponse(model="base", context_length=20)
    with pytest.raises(ValueError, match=r"'base': has no chat template; .*--raw"):
        Chat(colrow, about, Console())  # type: ignore[arg-type]


# --- commands ---------------------------------------------------------------------------------


def test_retry_asks_the_last_question_again(colrow: FakeColrow) -> None:
    chat = make_chat(colrow)
    chat.run(Typed("one", "two", "/retry"))
    assert [m["content"] for m in colrow.asked[2]] == ["one", "a1", "two"]
    assert chat.conversation.turns == [Turn("one", "a1"), Turn("two", "a3")]


def test_undo_and_reset(colrow: FakeColrow) -> None:
    chat = make_chat(colrow, system="Be brief.")
    chat.run(Typed("one", "two", "/undo", "three"))
    assert [m["content"] for m in colrow.asked[2]] == ["Be brief.", "one", "a1", "three"]
    assert "Taken back: two" in shown(chat)
    chat.handle("/reset")
    for command in ("/undo", "/retry"):
        with pytest.raises(ValueError, match=command):
            chat.handle(command)
    assert chat.conversation.system == "Be brief."


def test_system_sets_shows_and_removes(colrow: FakeColrow) -> None:
    chat = make_chat(colrow)
    chat.run(Typed("/system", "/system Be [b]brief[/b].", "/system"))
    assert "no system message" in shown(chat)
    assert shown(chat).count("system: Be [b]brief[/b].") == 2
    chat.handle("/system none")
    assert chat.conversation.system is None


def test_settings_change_what_is_asked_next(colrow: FakeColrow) -> None:
    chat = make_chat(colrow, settings={"temperature": 0.6})
    chat.run(Typed("/settings seed=7", "/settings temperature default", "one"))
    assert colrow.settings[0]["seed"] == 7
    assert colrow.settings[0]["temperature"] is None
    assert "seed 7" in shown(chat)


@pytest.mark.parametrize(
    ("name", "text", "complaint"),
    [
        ("volume", "1", "volume is no setting; there are temperature"),
        ("temperature", "warm", "temperature = 'warm': is no number"),
        ("top_k", "1.5", "top_k = '1.5': is no whole number"),
        ("max_tokens", "-1", "max_tokens = -1"),
        ("seed", "", "seed = ''"),
    ],
)
def test_a_setting_that_is_none_is_named(name: str, text: str, complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        parse_setting(name, text)


def test_save_writes_markdown_or_json_and_overwrites_only_its_own(
    colrow: FakeColrow, tmp_path: Path
) -> None:
    chat = make_chat(colrow)
    chat.handle("one")
    chat.handle(f"/save {tmp_path}/talk.json")
    assert json.loads((tmp_path / "talk.json").read_text()) == [
        {"role": "user", "content": "one"},
        {"role": "assistant", "content": "a1"},
    ]
    chat.handle(f"/save {tmp_path}/talk.md")
    chat.handle("two")
    chat.handle(f"/save {tmp_path}/talk.md")
    assert "two" in (tmp_path / "talk.md").read_text()
    (tmp_path / "other").write_text("precious")
    with pytest.raises(ValueError, match="is there already"):
        chat.handle(f"/save {tmp_path}/other")
    assert (tmp_path / "other").read_text() == "precious"
    with pytest.raises(ValueError, match="No such file or directory"):
        chat.handle(f"/save {tmp_path}/none/talk.md")
    with pytest.raises(ValueError, match="needs the name"):
        chat.handle("/save")


def test_stats_and_help(colrow: FakeColrow) -> None:
    chat = make_chat(colrow)
    chat.run(Typed("/stats", "one two", "/stats", "/help"))
    assert "1 answers of 1 tokens; 4 prompt tokens, 100% of them" in shown(chat)
    assert "context: 5 of 8,192 tokens" in shown(chat)
    for name in ("/system", "/settings", "/retry", "/undo", "/reset", "/save", "/stats", "/quit"):
        assert name in shown(chat)


def test_quit_leaves_and_a_doubled_slash_is_a_question(colrow: FakeColrow) -> None:
    chat = make_chat(colrow)
    chat.run(Typed("//etc?", "/quit", "never"))
    assert [asked[-1]["content"] for asked in colrow.asked] == ["/etc?"]


# --- where lines come from --------------------------------------------------------------------


def read_all(reader: Reader) -> list[str]:
    lines = []
    while True:
        try:
            lines.append(reader.read())
        except EOFError:
            return lines


def test_plain_lines_go_on_after_a_backslash(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("one\ntwo\\\n  more\\\nend\n\nlast\\"))
    assert read_all(LineReader(interactive=False)) == ["one", "two\n  more\nend", "", "last"]
    assert capsys.readouterr() == ("", "")


def test_a_terminal_that_can_do_no_more_gets_a_prompt(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("one\\\ntwo\n"))
    assert read_all(LineReader(interactive=True)) == ["one\ntwo"]
    assert capsys.readouterr() == ("", "> . > ")


def test_without_a_terminal_lines_are_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO())
    reader = make_reader(Console())
    assert isinstance(reader, LineReader)
    assert not reader.interactive


@pytest.fixture
def keyboard() -> Iterator[PipeInput]:
    with create_pipe_input() as pipe, create_app_session(input=pipe, output=DummyOutput()):
        yield pipe


@pytest.mark.parametrize(
    ("keys", "text"),
    [
        ("one\r", "one"),
        ("one\x1b\rtwo\r", "one\ntwo"),  # Alt-Enter
        ("one\\\rtwo\r", "one\ntwo"),
        ("\x1b[200~one\ntwo\x1b[201~\r", "one\ntwo"),  # pasted
    ],
)
def test_enter_sends_and_alt_enter_begins_a_line(keyboard: PipeInput, keys: str, text: str) -> None:
    keyboard.send_text(keys)
    assert EditorReader().read() == text


def test_the_editor_knows_ctrl_d_ctrl_c_and_what_was_typed_before(keyboard: PipeInput) -> None:
    reader = EditorReader()
    keyboard.send_text("one\r")
    assert reader.read() == "one"
    keyboard.send_text("\x1b[A\r")  # up
    assert reader.read() == "one"
    keyboard.send_text("half\x03")
    with pytest.raises(KeyboardInterrupt):
        reader.read()
    keyboard.send_text("\x04")
    with pytest.raises(EOFError):
        reader.read()
