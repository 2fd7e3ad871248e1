"""Text and token ids. Byte-level models are served here; for all others the caller brings ids."""

from __future__ import annotations

import codecs
from collections.abc import Iterable
from typing import Any

import numpy as np

from lhruntime.errors import ArgumentError
from lhruntime.manifest import Manifest

__all__ = ["ByteTokenizer", "IdsOnly", "StreamDecoder", "tokenizer_for"]


class StreamDecoder:
    """Bytes to text as they come: a character appears once all its bytes have.

    What is not UTF-8, and ids above 255, become U+FFFD.
    """

    def __init__(self) -> None:
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def feed(self, *tokens: int) -> str:
        """The text that is complete after these tokens."""
        return self._decoder.decode(_to_bytes(tokens))

    def finish(self) -> str:
        """What is left of an incomplete character."""
        return self._decoder.decode(b"", final=True)


class ByteTokenizer:
    """Token ids are the bytes of UTF-8 text."""

    def encode(self, text: str) -> np.ndarray[Any, np.dtype[np.int64]]:
        """int64 [seq]. Raises ArgumentError for text that has no UTF-8 form."""
        try:
            data = text.encode("utf-8", errors="surrogateescape")
        except UnicodeEncodeError as error:
            raise ArgumentError(f"the text cannot be encoded: {error}") from error
        return np.frombuffer(data, np.uint8).astype(np.int64)

    def decode(self, tokens: Iterable[int]) -> str:
        """Text of tokens [seq]; what is not UTF-8 becomes U+FFFD."""
        return _to_bytes(tokens).decode("utf-8", errors="replace")

    def stream(self) -> StreamDecoder:
        """A decoder that takes tokens one by one."""
        return StreamDecoder()


class IdsOnly:
    """Stands where a model's tokenizer is not one of ours: every call raises ArgumentError."""

    def __init__(self, kind: str) -> None:
        self._reason = f"the model's tokenizer is of kind {kind!r}: text is not supported, pass token ids"

    def encode(self, text: str) -> np.ndarray[Any, np.dtype[np.int64]]:
        raise ArgumentError(self._reason)

    def decode(self, tokens: Iterable[int]) -> str:
        raise ArgumentError(self._reason)

    def stream(self) -> StreamDecoder:
        raise ArgumentError(self._reason)


def tokenizer_for(manifest: Manifest) -> ByteTokenizer | IdsOnly:
    """The tokenizer that the manifest names."""
    kind = manifest.tokenizer["kind"]
    return ByteTokenizer() if kind == "bytes" else IdsOnly(kind)


def _to_bytes(tokens: Iterable[int]) -> bytes:
    """Ids above 255 stand for no byte; 0xFF occurs nowhere in UTF-8 and so decodes to U+FFFD."""
    return bytes(min(int(token), 0xFF) for token in tokens)
