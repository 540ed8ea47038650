"""Stop strings: however text is cut into pieces, it ends before the first of them and nowhere else."""

from hypothesis import given
from hypothesis import strategies as st

from coordinator.stop_strings import StopStrings

TEXTS = st.text(alphabet="ab", max_size=30)
STOPS = st.lists(st.text(alphabet="ab", min_size=1, max_size=4), min_size=1, max_size=3)


def run(stops: StopStrings, pieces: list[str]) -> tuple[str, str | None]:
    """All that is shown of a text, and what ended it."""
    shown = ""
    for piece in pieces:
        text, stop = stops.feed(piece)
        shown += text
        if stop is not None:
            return shown, stop
    return shown + stops.flush(), None


def first_stop(text: str, strings: list[str]) -> tuple[int, str] | None:
    """The end of what is shown, and the stop string that is complete first."""
    for end in range(1, len(text) + 1):
        found = [(text.find(s, 0, end), -len(s), s) for s in strings if s in text[:end]]
        if found:
            place, _, stop = min(found)
            return place, stop
    return None


@given(text=TEXTS, strings=STOPS, include=st.booleans())
def test_one_character_at_a_time_the_first_complete_stop_string_ends_the_text(
    text: str, strings: list[str], include: bool
) -> None:
    shown, stop = run(StopStrings(strings, include=include), [*text])
    expected = first_stop(text, strings)
    if expected is None:
        assert (shown, stop) == (text, None)
    else:
        place, name = expected
        assert stop == name
        assert shown == text[:place] + (name if include else "")


@given(text=TEXTS, strings=STOPS, data=st.data())
def test_in_pieces_of_any_size_no_stop_string_is_ever_shown_and_none_is_missed(
    text: str, strings: list[str], data: st.DataObject
) -> None:
    pieces, at = [], 0
    while at < len(text):
        size = data.draw(st.integers(1, 8))
        pieces.append(text[at : at + size])
        at += size
    shown, stop = run(StopStrings(strings), pieces)
    assert not any(string in shown for string in strings)
    assert (stop is None) == (first_stop(text, strings) is None)
    assert text.startswith(shown if stop is None else shown + stop)


@given(text=TEXTS, strings=STOPS)
def test_only_what_may_become_a_stop_string_is_held_back(text: str, strings: list[str]) -> None:
    stops = StopStrings(strings)
    shown, stop = stops.feed(text)
    if stop is None:
        held = text[len(shown) :]
        assert text == shown + held
        assert not held or any(s.startswith(held) and s != held for s in strings)


def test_of_stop_strings_that_begin_together_the_longest_counts() -> None:
    assert StopStrings(["\n", "\n\n"], include=True).feed("a\n\nb") == ("a\n\n", "\n\n")
