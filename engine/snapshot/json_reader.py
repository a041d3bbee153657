"""A snapshot's JSON, read piece by piece: an entry at a time, whatever the size of the file."""

from __future__ import annotations

import codecs
import json
from collections.abc import Callable, Iterator
from json import JSONDecodeError
from typing import Any, BinaryIO

from .entries import DeviceTrace, Snapshot
from .pickle_reader import RefusedError

PIECE = 1 << 20
"""Bytes read at once."""
LARGEST_VALUE = 1 << 28
"""Characters of a value that has to be whole: an entry, a segment."""
_BLANK = " \t\r\n"


class JsonReader:
    """One document.

    Args:
        file: Opened for reading bytes.
        snapshot: Takes in what is read.
        tell: Told every now and then how many bytes have been read; may raise to stop.
    """

    def __init__(self, file: BinaryIO, snapshot: Snapshot, tell: Callable[[int], None]) -> None:
        self._file, self._snapshot, self._tell = file, snapshot, tell
        self._text, self._at, self._read, self._ended = "", 0, 0, False
        self._utf8 = codecs.getincrementaldecoder("utf-8")()
        self._decode = json.JSONDecoder().raw_decode

    def read(self) -> None:
        """Read the whole document into the snapshot.

        Raises:
            RefusedError: It is damaged, or no snapshot.
            OSError: It cannot be read.
        """
        try:
            if self._peek() == "[":  # segments only, as older versions write
                self._segments()
                return
            for key in self._keys():
                if key == "device_traces":
                    for _ in self._items():
                        self._snapshot.devices.append(self._trace())
                elif key == "segments":
                    self._segments()
                else:
                    self._value()
        except (KeyError, TypeError, AttributeError, UnicodeDecodeError, RecursionError) as error:
            raise RefusedError(f"damaged before byte {self._read}: {type(error).__name__}") from None

    def _trace(self) -> DeviceTrace:
        trace = DeviceTrace()
        for _ in self._items():
            entry = self._snapshot.entry(self._value())
            if entry is not None:
                trace.columns.extend(entry)
        return trace

    def _segments(self) -> None:
        for _ in self._items():
            self._snapshot.segment(self._value(), LARGEST_VALUE)

    # --- the document -------------------------------------------------------------------

    def _keys(self) -> Iterator[str]:
        """The keys of an object; whoever asks reads the value of each."""
        self._expect("{")
        if self._peek() == "}":
            self._at += 1
            return
        while True:
            key = self._value()
            self._expect(":")
            yield str(key)
            if self._expect(",}") == "}":
                return

    def _items(self) -> Iterator[None]:
        """One for each item of an array; whoever asks reads it."""
        self._expect("[")
        if self._peek() == "]":
            self._at += 1
            return
        while True:
            yield
            if self._expect(",]") == "]":
                return

    def _value(self) -> Any:
        """The next value, whole."""
        self._peek()
        while True:
            try:
                value, end = self._decode(self._text, self._at)
                if end < len(self._text) or self._ended:  # a number may go on in the next piece
                    self._at = end
                    return value
            except JSONDecodeError as error:
                if self._ended:
                    raise self._broken(error.msg) from None
            if len(self._text) - self._at > LARGEST_VALUE:
                raise RefusedError(f"a value of more than {LARGEST_VALUE} characters before byte {self._read}")
            self._more(max(PIECE, len(self._text) - self._at))

    def _peek(self) -> str:
        """The next character that is not blank, which stays."""
        while True:
            while self._at < len(self._text):
                if self._text[self._at] not in _BLANK:
                    return self._text[self._at]
                self._at += 1
            if self._ended:
                raise RefusedError("it is cut off")
            self._more(PIECE)

    def _expect(self, characters: str) -> str:
        found = self._peek()
        if found not in characters:
            raise self._broken(f"expected {' or '.join(characters)}")
        self._at += 1
        return found

    def _more(self, size: int) -> None:
        piece = self._file.read(size)
        self._read, self._ended = self._read + len(piece), not piece
        self._text, self._at = self._text[self._at :] + self._utf8.decode(piece, final=not piece), 0
        self._tell(self._read)

    def _broken(self, what: str) -> RefusedError:
        cut = self._ended and len(self._text) - self._at < 2
        return RefusedError("it is cut off" if cut else f"damaged before byte {self._read}: {what}")
