"""Texts that end a continuation, found wherever token borders are."""

from collections.abc import Sequence


class StopStrings:
    """Passes text on until a stop string appears in it; what may become one is held back."""

    def __init__(self, strings: Sequence[str], *, include: bool = False) -> None:
        assert all(strings), "an empty text is everywhere"
        self._strings = tuple(strings)
        self._include = include
        self._held = ""

    def feed(self, text: str) -> tuple[str, str | None]:
        """The text that may be shown by now, and the stop string that ended it, if one did.

        Of several the one that begins first counts, of those that begin together the longest.
        """
        text = self._held + text
        self._held = ""
        found = [(place, -len(s), s) for s in self._strings if (place := text.find(s)) >= 0]
        if found:
            place, _, stop = min(found)
            return text[: place + (len(stop) if self._include else 0)], stop
        held = max(self._half_seen(text, s) for s in self._strings)
        if held:
            text, self._held = text[:-held], text[-held:]
        return text, None

    @staticmethod
    def _half_seen(text: str, string: str) -> int:
        """How many characters at the end of `text` are the beginning of `string`."""
        for length in range(min(len(text), len(string) - 1), 0, -1):
            if text.endswith(string[:length]):
                return length
        return 0

    def flush(self) -> str:
        """What was held back, once nothing more comes."""
        held, self._held = self._held, ""
        return held
