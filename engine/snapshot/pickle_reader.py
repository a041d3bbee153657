"""A snapshot's pickle, read opcode by opcode: plain containers, and nothing is ever called.

`pickle.load` runs what a file tells it to. This reader knows the opcodes that
make dicts, lists, tuples, texts and numbers, and refuses all others. Entries
and stacks are handed over as soon as they are whole; what the pickle's memo
still refers to is kept in its compact form, so that memory does not grow with
the file (but for eight bytes a container).
"""

from __future__ import annotations

import pickle
import pickletools
import struct
from collections.abc import Callable
from itertools import chain
from typing import Any, BinaryIO

from .entries import DeviceTrace, FrameIndex, Snapshot, StackIndex

PIECE = 1 << 22
"""Bytes read at once."""
LONGEST = 1 << 20
"""The longest text in bytes: stacks are short lines."""
DEEPEST = 1 << 23
"""The most items on the stack; a list's lie on it a thousand at a time, those from C++ all at once."""
_SPARE = 16
"""Bytes: more than the longest opcode without a text."""
_NAMES = {ord(opcode.code): opcode.name for opcode in pickletools.opcodes}
_INT32, _UINT16, _UINT32, _UINT64, _DOUBLE = (struct.Struct(f) for f in ("<i", "<H", "<I", "<Q", ">d"))


class RefusedError(ValueError):
    """A file that is no snapshot, or asks for more than plain containers."""


class _Dict(dict[Any, Any]):
    """A dict that knows where the memo has it; -1: nowhere."""

    __slots__ = ("slot",)
    slot: int


class _List(list[Any]):
    """Likewise a list."""

    __slots__ = ("slot",)
    slot: int


class _Taken(tuple[int, ...]):
    """An entry that has been handed over, as numbers."""

    __slots__ = ()


_MARK = object()
_CONSUMED = object()


class PickleReader:
    """One pickle.

    Args:
        file: Opened for reading bytes.
        snapshot: Takes in what is read.
        tell: Told every now and then how many bytes have been read; may raise to stop.
    """

    def __init__(self, file: BinaryIO, snapshot: Snapshot, tell: Callable[[int], None]) -> None:
        self._file, self._snapshot, self._tell = file, snapshot, tell
        self._data, self._at, self._before, self._ended = b"", 0, 0, False
        self._stack: list[Any] = []
        self._memo: list[Any] = []

    def read(self) -> Any:
        """Read the whole pickle; traces are `DeviceTrace`s.

        Raises:
            RefusedError: It is damaged, or holds anything but plain containers.
            OSError: It cannot be read.
        """
        try:
            return self._run()
        except (IndexError, struct.error, KeyError, TypeError, UnicodeDecodeError, OverflowError) as error:
            raise RefusedError(f"damaged at byte {self._place}: {type(error).__name__}") from None

    @property
    def _place(self) -> int:
        return self._before + self._at

    def _refill(self, size: int) -> None:
        """Have so many bytes at hand; behind the last ones come zeros, that a short opcode may be read over them."""
        if self._ended:
            raise RefusedError("it is cut off")
        rest = self._data[self._at :]
        piece = self._file.read(max(PIECE, size))
        self._before += self._at
        self._data, self._at = rest + piece, 0
        if len(self._data) < size + _SPARE:
            self._ended = True
            if len(self._data) < size:
                raise RefusedError("it is cut off")
            self._data += bytes(_SPARE)
        self._tell(self._before)
        if len(self._stack) > DEEPEST:
            raise RefusedError(f"its stack is too deep at byte {self._place}")

    def _take(self, size: int) -> int:
        """Step over so many bytes; where they are."""
        if self._at + size + _SPARE > len(self._data):
            self._refill(size)
        start = self._at
        self._at += size
        return start

    def _bytes(self, size: int, longest: int = LONGEST) -> bytes:
        if size > longest:
            raise RefusedError(f"a value of {size} bytes at byte {self._place}")
        start = self._take(size)
        return self._data[start : start + size]

    def _run(self) -> Any:
        """The opcodes that make nine in ten of a snapshot come first and without a call."""
        stack, push, memo, admitted = self._stack, self._stack.append, self._memo, _ADMITTED
        data, at, last = self._data, self._at, -1
        while True:
            if at > last:
                self._at = at
                self._refill(1)
                data, at, last = self._data, self._at, len(self._data) - _SPARE - 1
            code = data[at]
            at += 1
            if code == 0x68:  # BINGET
                push(memo[data[at]])
                at += 1
            elif code == 0x6A:  # LONG_BINGET
                push(memo[_UINT32.unpack_from(data, at)[0]])
                at += 4
            elif code == 0x4B:  # BININT1
                push(data[at])
                at += 1
            elif code == 0x4A:  # BININT
                push(_INT32.unpack_from(data, at)[0])
                at += 4
            elif code == 0x8A and data[at] <= 8:  # LONG1, of an address or a time
                end = at + 1 + data[at]
                push(int.from_bytes(data[at + 1 : end], "little", signed=True))
                at = end
            elif code == 0x94:  # MEMOIZE
                top = stack[-1]
                if top.__class__ is _Dict or top.__class__ is _List:
                    top.slot = len(memo)
                memo.append(top)
            elif code == 0x2E:  # STOP
                return stack.pop()
            else:
                act = admitted.get(code)
                self._at = at
                if act is None:
                    name = _NAMES.get(code, f"{code:#04x}")
                    raise RefusedError(f"it asks for {name} at byte {self._place - 1}; only plain containers are read")
                act(self)
                data, at, last = self._data, self._at, len(self._data) - _SPARE - 1

    # --- numbers and texts ------------------------------------------------------------

    def _proto(self) -> None:
        self._take(1)

    def _frame(self) -> None:
        self._take(8)

    def _none(self) -> None:
        self._stack.append(None)

    def _newtrue(self) -> None:
        self._stack.append(True)

    def _newfalse(self) -> None:
        self._stack.append(False)

    def _binint2(self) -> None:
        self._stack.append(_UINT16.unpack(self._bytes(2))[0])

    def _long1(self) -> None:
        size = self._bytes(1)[0]
        self._stack.append(int.from_bytes(self._bytes(size, 16), "little", signed=True))

    def _binfloat(self) -> None:
        self._stack.append(_DOUBLE.unpack(self._bytes(8))[0])

    def _short_binunicode(self) -> None:
        self._text(self._bytes(1)[0])

    def _binunicode(self) -> None:
        self._text(_UINT32.unpack(self._bytes(4))[0])

    def _binunicode8(self) -> None:
        self._text(_UINT64.unpack(self._bytes(8))[0])

    def _text(self, size: int) -> None:
        self._stack.append(self._bytes(size).decode("utf-8", "surrogatepass"))

    # --- the memo ---------------------------------------------------------------------

    def _binput(self) -> None:
        self._remember(self._bytes(1)[0])

    def _long_binput(self) -> None:
        self._remember(_UINT32.unpack(self._bytes(4))[0])

    def _remember(self, slot: int) -> None:
        top = self._stack[-1]
        if isinstance(top, _Dict | _List):
            top.slot = slot
        if slot == len(self._memo):
            self._memo.append(top)
        elif slot < len(self._memo):
            self._memo[slot] = top
        else:
            raise RefusedError(f"its memo has gaps at byte {self._place}")

    def _settle(self, container: _Dict | _List, compact: Any) -> None:
        """Have the memo hold the compact form of a container that is whole."""
        if container.slot >= 0:
            self._memo[container.slot] = compact

    # --- containers -------------------------------------------------------------------

    def _mark(self) -> None:
        self._stack.append(_MARK)

    def _marked(self) -> list[Any]:
        """The items above the last mark, taken off the stack with it."""
        stack = self._stack
        at = len(stack) - 1
        while stack[at] is not _MARK:
            at -= 1
            if at < 0:
                raise RefusedError(f"damaged at byte {self._place}")
        items = stack[at + 1 :]
        del stack[at:]
        if _CONSUMED in items:
            raise RefusedError(f"it refers to an entry twice at byte {self._place}")
        return items

    def _empty_dict(self) -> None:
        made = _Dict()
        made.slot = -1
        self._stack.append(made)

    def _empty_list(self) -> None:
        made = _List()
        made.slot = -1
        self._stack.append(made)

    def _empty_tuple(self) -> None:
        self._stack.append(())

    def _tuple(self) -> None:
        self._stack.append(tuple(self._marked()))

    def _tuple1(self) -> None:
        self._stack[-1:] = [tuple(self._stack[-1:])]

    def _tuple2(self) -> None:
        self._stack[-2:] = [tuple(self._stack[-2:])]

    def _tuple3(self) -> None:
        self._stack[-3:] = [tuple(self._stack[-3:])]

    def _dict(self) -> None:
        items = self._marked()
        self._empty_dict()
        self._fill(items)

    def _list(self) -> None:
        items = self._marked()
        self._empty_list()
        self._extend(items)

    def _setitem(self) -> None:
        items = self._stack[-2:]
        del self._stack[-2:]
        self._fill(items)

    def _setitems(self) -> None:
        self._fill(self._marked())

    def _append(self) -> None:
        self._extend([self._stack.pop()])

    def _appends(self) -> None:
        self._extend(self._marked())

    def _fill(self, items: list[Any]) -> None:
        """Put keys and values into the dict on top; an entry, a frame, a block is handed over when it is whole."""
        top, snapshot = self._stack[-1], self._snapshot
        if top.__class__ is not _Dict:
            raise RefusedError(f"damaged at byte {self._place}")
        top.update(zip(items[::2], items[1::2], strict=True))
        if "action" in top and "size" in top:
            self._stack[-1] = _Taken(snapshot.entry(top) or ())
            self._settle(top, _CONSUMED)
        elif "filename" in top and "line" in top and "name" in top:
            self._stack[-1] = snapshot.stacks.add_frame(top)
            self._settle(top, self._stack[-1])
        elif "state" in top and "size" in top:
            self._stack[-1] = snapshot.block(top)
            self._settle(top, self._stack[-1])

    def _extend(self, items: list[Any]) -> None:
        """Put items into the list on top; one of frames becomes a stack, one of entries a trace."""
        top = self._stack[-1]
        kind = items[0].__class__ if items else None
        if kind is FrameIndex and (top.__class__ is StackIndex or (top.__class__ is _List and not top)):
            if any(item.__class__ is not FrameIndex for item in items):
                raise RefusedError(f"damaged at byte {self._place}")
            stacks = self._snapshot.stacks
            before = stacks.places(top) if isinstance(top, StackIndex) else ()
            self._stack[-1] = stacks.add((*before, *items))
            if top.__class__ is _List:
                self._settle(top, self._stack[-1])
        elif kind is _Taken:
            if top.__class__ is _List and not top:
                self._stack[-1] = trace = DeviceTrace()
                self._settle(top, trace)
                top = trace
            if top.__class__ is not DeviceTrace or any(item.__class__ is not _Taken for item in items):
                raise RefusedError(f"damaged at byte {self._place}")
            top.columns.extend(chain.from_iterable(items))
        elif top.__class__ is _List:
            top.extend(items)
        elif items:
            raise RefusedError(f"damaged at byte {self._place}")


_ADMITTED: dict[int, Callable[[PickleReader], None]] = {
    code[0]: act
    for code, act in (
        (pickle.PROTO, PickleReader._proto),
        (pickle.FRAME, PickleReader._frame),
        (pickle.NONE, PickleReader._none),
        (pickle.NEWTRUE, PickleReader._newtrue),
        (pickle.NEWFALSE, PickleReader._newfalse),
        (pickle.BININT2, PickleReader._binint2),
        (pickle.LONG1, PickleReader._long1),
        (pickle.BINFLOAT, PickleReader._binfloat),
        (pickle.SHORT_BINUNICODE, PickleReader._short_binunicode),
        (pickle.BINUNICODE, PickleReader._binunicode),
        (pickle.BINUNICODE8, PickleReader._binunicode8),
        (pickle.BINPUT, PickleReader._binput),
        (pickle.LONG_BINPUT, PickleReader._long_binput),
        (pickle.MARK, PickleReader._mark),
        (pickle.EMPTY_DICT, PickleReader._empty_dict),
        (pickle.EMPTY_LIST, PickleReader._empty_list),
        (pickle.EMPTY_TUPLE, PickleReader._empty_tuple),
        (pickle.TUPLE, PickleReader._tuple),
        (pickle.TUPLE1, PickleReader._tuple1),
        (pickle.TUPLE2, PickleReader._tuple2),
        (pickle.TUPLE3, PickleReader._tuple3),
        (pickle.DICT, PickleReader._dict),
        (pickle.LIST, PickleReader._list),
        (pickle.SETITEM, PickleReader._setitem),
        (pickle.SETITEMS, PickleReader._setitems),
        (pickle.APPEND, PickleReader._append),
        (pickle.APPENDS, PickleReader._appends),
    )
}
"""The opcodes read beside those of `_run`. `pickle` gives the opcodes' names; nothing else of it is used."""
