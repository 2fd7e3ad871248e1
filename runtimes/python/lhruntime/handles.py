"""Handle: what a caller holds of a sequence that runs in an engine."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence

from lhruntime.errors import LhruntimeError

__all__ = ["Handle"]


class Handle:
    """A sequence that waits, runs or has ended. Any thread may use it, several at once."""

    def __init__(self) -> None:
        """Use `Engine.submit`."""
        self._changed = threading.Condition()
        self._tokens: list[int] = []
        self._reason: str | None = None
        self._error: LhruntimeError | None = None

    @property
    def tokens(self) -> list[int]:
        """Those that have come so far."""
        with self._changed:
            return list(self._tokens)

    @property
    def reason(self) -> str | None:
        """Why it has ended: "length", "stop", "cancelled" or "failed"; None before."""
        return self._reason

    def stream(self) -> Iterator[int]:
        """All its tokens from the first on, each as soon as it is there, a stop token included.

        Ends where the sequence does. Raises the error if it failed, after the tokens that had come.
        """
        seen = 0
        while True:
            with self._changed:
                while len(self._tokens) == seen and self._reason is None:
                    self._changed.wait()
                fresh, error = self._tokens[seen:], self._error
            yield from fresh
            seen += len(fresh)
            if not fresh:
                if error is not None:
                    raise error
                return

    def result(self, timeout: float | None = None) -> list[int]:
        """All its tokens, once it has ended. timeout: seconds to wait at most, for ever if None.

        Raises TimeoutError if it has not ended by then, and the error if it failed.
        """
        with self._changed:
            if not self._changed.wait_for(lambda: self._reason is not None, timeout):
                raise TimeoutError(f"the sequence has not ended after {timeout:g} seconds")
            if self._error is not None:
                raise self._error
            return list(self._tokens)

    def cancel(self) -> None:
        """End it now, wherever it stands: no token comes any more. What has ended is left as it is."""
        self.end("cancelled")

    def give(self, tokens: Sequence[int], reason: str | None) -> None:
        """For the engine: more tokens, and the reason if it ends with them. Nothing if it has ended."""
        with self._changed:
            if self._reason is None:
                self._tokens.extend(tokens)
                self._reason = reason
                self._changed.notify_all()

    def end(self, reason: str, error: LhruntimeError | None = None) -> None:
        """For the engine: it ends without another token. Nothing if it has ended."""
        with self._changed:
            if self._reason is None:
                self._reason, self._error = reason, error
                self._changed.notify_all()
