"""A snapshot in memory: its entries as columns, every stack and text once.

Both readers hand their entries over one by one and forget them, so that a file
of a gigabyte takes the memory of its columns.
"""

from __future__ import annotations

from array import array
from collections.abc import Mapping
from typing import Any, NamedTuple

from ..events import AllocatorPool

ALLOC, FREE_REQUESTED, FREE_COMPLETED, OUT_OF_MEMORY, RESERVED, GIVEN_BACK = range(6)
ACTIONS = {
    "alloc": ALLOC, "free_requested": FREE_REQUESTED, "free": FREE_REQUESTED, "free_completed": FREE_COMPLETED,
    "oom": OUT_OF_MEMORY, "segment_alloc": RESERVED, "segment_map": RESERVED, "segment_free": GIVEN_BACK,
    "segment_unmap": GIVEN_BACK,
}  # fmt: skip
"""Those that are kept."""

LARGEST = 1 << 62
MOST_POOLS = 1 << 14
"""More than any program has, and fewer than the column of a trace can number."""


class Frame(NamedTuple):
    """A function on the stack."""

    filename: str
    line: int
    name: str


class FrameIndex(int):
    """A frame's place in `Stacks`."""

    __slots__ = ()


class StackIndex(int):
    """A stack's place in `Stacks`."""

    __slots__ = ()


class Stacks:
    """Every frame and every stack once; a stack is the places of its frames, the innermost first."""

    def __init__(self) -> None:
        self._frames: list[Frame] = []
        self._stacks: list[tuple[FrameIndex, ...]] = [()]
        self._frame_index: dict[Frame, FrameIndex] = {}
        self._stack_index: dict[tuple[FrameIndex, ...], StackIndex] = {(): StackIndex(0)}

    def __len__(self) -> int:
        return len(self._stacks)

    def __getitem__(self, index: int) -> tuple[Frame, ...]:
        return tuple(self._frames[frame] for frame in self._stacks[index])

    def places(self, index: int) -> tuple[FrameIndex, ...]:
        """Indices of a stack's frames."""
        return self._stacks[index]

    def add_frame(self, plain: Mapping[str, Any]) -> FrameIndex:
        """A frame as in the file."""
        frame = Frame(str(plain["filename"]), int(plain["line"]), str(plain["name"]))
        found = self._frame_index.get(frame)
        if found is None:
            found = self._frame_index[frame] = FrameIndex(len(self._frames))
            self._frames.append(frame)
        return found

    def add(self, frames: tuple[FrameIndex, ...]) -> StackIndex:
        """A stack of known frames."""
        found = self._stack_index.get(frames)
        if found is None:
            found = self._stack_index[frames] = StackIndex(len(self._stacks))
            self._stacks.append(frames)
        return found

    def index(self, plain: Any) -> int:
        """Index of a stack as in the file, or as a reader has handed it over; the empty stack is the first."""
        if plain.__class__ is StackIndex:
            return int(plain)
        frames = (frame if frame.__class__ is FrameIndex else self.add_frame(frame) for frame in plain or ())
        return self.add(tuple(frames))


class Texts:
    """Texts that a snapshot adds to its allocations, every combination once."""

    def __init__(self) -> None:
        self.said: list[Mapping[str, str]] = [{}]
        self._index: dict[tuple[tuple[str, str], ...], int] = {(): 0}

    def index(self, said: Mapping[str, str]) -> int:
        """Index of a combination of texts."""
        key = tuple(said.items())
        found = self._index.get(key)
        if found is None:
            found = self._index[key] = len(self.said)
            self.said.append(dict(said))
        return found


class DeviceTrace:
    """The entries of one device, in order.

    Attributes:
        columns: Action, address, bytes, microseconds, index of the stack, index of the text, stream; one after
            another.
    """

    FIELDS = 7

    def __init__(self) -> None:
        self.columns = array("q")

    def __len__(self) -> int:
        return len(self.columns) // self.FIELDS


class Block(NamedTuple):
    """A block of a segment as the snapshot was taken.

    Attributes:
        size: Of the block.
        requested: Asked for; 0: it is not allocated.
        stack: Index.
        said: Index.
    """

    size: int
    requested: int
    stack: int
    said: int


class Alive(NamedTuple):
    """An allocated block: address, bytes asked for, slack, and the indices of its stack and text."""

    address: int
    bytes: int
    slack: int
    stack: int
    said: int


class Snapshot:
    """A snapshot of PyTorch's: the entries of each device, and the blocks alive at its end.

    Attributes:
        devices: By index.
        alive: Allocated at the end, by device.
        segments: Of each device as the snapshot was taken: address, bytes and number of the pool; one after another.
        pools: Numbers of the segments' pools.
        stacks: What the columns index.
        texts: What the columns index.
    """

    def __init__(self) -> None:
        self.devices: list[DeviceTrace] = []
        self.alive: dict[int, list[Alive]] = {}
        self.segments: dict[int, array[int]] = {}
        self.pools: dict[AllocatorPool, int] = {}
        self.stacks, self.texts = Stacks(), Texts()
        self._asked = False

    @property
    def says_owners(self) -> bool:
        """True if it is one of our own exports, which says every block's category and owner, and its slack apart."""
        return any("owner" in said and "category" in said for said in self.texts.said)

    def entry(self, plain: Mapping[str, Any]) -> tuple[int, ...] | None:
        """One entry as numbers; None for what is not kept.

        Raises:
            ValueError: It is not what PyTorch writes.
        """
        action = ACTIONS.get(plain["action"], -1)
        # The allocator's counter moves when a free is asked for; its completion says nothing more.
        self._asked |= action == FREE_REQUESTED
        if action < 0 or (action == FREE_COMPLETED and self._asked):
            return None
        address = plain["device_free"] if action == OUT_OF_MEMORY else plain["addr"]
        numbers = address, plain["size"], plain.get("time_us", 0)
        stream = plain.get("stream", 0)
        if not all(type(n) is int and 0 <= n < LARGEST for n in (*numbers, stream)):
            raise ValueError("an entry's address, size, time or stream is no number")
        return action, *numbers, self.stacks.index(plain.get("frames")), self._said(plain), stream

    def block(self, plain: Mapping[str, Any]) -> Block:
        """One block of a segment.

        Raises:
            ValueError: It is not what PyTorch writes.
        """
        size, requested, frames = plain["size"], plain.get("requested_size", plain["size"]), plain.get("frames")
        history = plain.get("history")
        if history and "frames" not in plain:  # as older versions have it
            requested, frames = history[0]["real_size"], history[0].get("frames")
        if not all(type(n) is int and 0 <= n < LARGEST for n in (size, requested)):
            raise ValueError("a block's size is no number")
        if plain["state"] != "active_allocated":
            return Block(size, 0, 0, 0)
        return Block(size, requested, self.stacks.index(frames), self._said(plain))

    def segment(self, plain: Mapping[str, Any], most_blocks: int) -> int:
        """Take in one of the allocator's segments; how many blocks it has.

        Args:
            plain: As in the file; its blocks may be `Block`s already.
            most_blocks: More than so many cannot have been in the file: they are shared.

        Raises:
            ValueError: It is not what PyTorch writes.
        """
        device, address, total, listed = (plain[key] for key in ("device", "address", "total_size", "blocks"))
        stream, private = plain.get("stream", 0), tuple(plain.get("segment_pool_id", (0, 0)))
        if not all(type(n) is int and 0 <= n < LARGEST for n in (device, address, total, stream, *private)):
            raise ValueError("a segment's device, address, size, stream or pool is no number")
        if len(private) != 2:
            raise ValueError("a segment's pool has no identity")
        size_class = "small" if plain.get("segment_type") == "small" else "large"
        if len(listed) > most_blocks:
            raise ValueError("a segment has more blocks than the file has room for")
        pool = self.pools.setdefault(AllocatorPool(stream, size_class, private), len(self.pools))
        if len(self.pools) > MOST_POOLS:
            raise ValueError("there are more pools than any program has")
        self.segments.setdefault(device, array("q")).extend((address, total, pool))
        alive = self.alive.setdefault(device, [])
        for found in listed:
            block = found if isinstance(found, Block) else self.block(found)
            if block.requested:
                alive.append(Alive(address, block.requested, block.size - block.requested, block.stack, block.said))
            address += block.size
        return len(listed)

    def _said(self, plain: Mapping[str, Any]) -> int:
        """Index of `user_metadata`, and of the category where there is one."""
        known = plain.get("user_metadata")
        said = {str(k): str(v) for k, v in known.items()} if isinstance(known, dict) else {}
        if "category" not in said and isinstance(plain.get("category"), str):
            said["category"] = plain["category"]
        return self.texts.index(said)
