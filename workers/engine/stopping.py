"""Stop strings: the text of one sample as it grows, and where it ends."""

from __future__ import annotations

from typing import Protocol


class TokenDecoder(Protocol):
    """Turns tokens into text one by one, and never gives half a character."""

    def push(self, token_id: int) -> str: ...

    def flush(self) -> str: ...


class StopSearch:
    """Watches for `stops` across the borders of tokens. After a match `text` ends where the stop string begins.

    Where one token completes several stop strings, the one that begins first counts.
    """

    def __init__(self, decoder: TokenDecoder, stops: tuple[str, ...]) -> None:
        self.text = ""
        self.ended = False
        self._decoder = decoder
        self._stops = stops

    def push(self, token_id: int) -> bool:
        """Add a token's text; True if that completes a stop string."""
        return self._add(self._decoder.push(token_id))

    def flush(self) -> bool:
        """The last token has been pushed: add what was held back; True if that completes a stop string."""
        return self._add(self._decoder.flush())

    def _add(self, piece: str) -> bool:
        if not piece:
            return False
        before = len(self.text)
        self.text += piece
        # A match must end inside the new piece, so it begins at most its own length before that.
        begins = [self.text.find(stop, max(0, before - len(stop) + 1)) for stop in self._stops]
        found = [begin for begin in begins if begin >= 0]
        if found:
            self.text = self.text[: min(found)]
            self.ended = True
        return self.ended
