"""Help: the keys, and what every category means."""

from __future__ import annotations

from collections.abc import Sequence

from rich.style import Style

from ...engine.events import CATEGORIES
from ..control import offered
from ..draw import Row, wrap
from .page import MOVES, Page

KEYS = (
    ("1 … 5", "live, step, layers, techniques, events"),
    ("space", "pause the run at the next micro-batch, or go on"),
    ("r", "restart the run as it is"),
    ("x", "stop the run and free everything"),
    ("s", "save a recording: gpumem-tui open FILE shows it again"),
    ("z", "live: back to the settings before; techniques: undo a change"),
    ("esc", "take a message away, leave help or details"),
    ("!", "command an engine that another viewer commands"),
    ("q", "quit: detach, and the run goes on, or stop it"),
)

OUTSIDE = (
    ("c", "cached", "Reserved by the caching allocator and not allocated: free for this process only."),
    ("x", "context", "GPU: CUDA context and libraries. CPU: the process without its counted tensors."),
    ("m", "managed", "CUDA managed memory of paged optimizers."),
    ("o", "others", "Other processes on the device."),
)

ABOUT = (
    "Figures are measured. On a GPU they come from the caching allocator's own trace; on a CPU every "
    "operation's outputs are counted. A dash is what is not known."
)


class HelpPage(Page):
    """Over all other screens; `?` and escape leave it."""

    title = "help"
    hint = "↑ ↓ scroll · ? or esc back"

    top = 0

    def press(self, key: str) -> bool:
        """Scroll."""
        if key not in MOVES:
            return False
        self.top = max(0, self.top + MOVES[key])
        return True

    def rows(self, width: int, height: int) -> list[Row]:
        """Side by side where there is room."""
        if width >= 110:
            half = width // 2
            left, right = self._keys(half - 1), self._meanings(half - 1)
            rows = []
            for i in range(max(len(left), len(right))):
                row = Row().extend(left[i]) if i < len(left) else Row()
                rows.append(row.to(half).extend(right[i]) if i < len(right) else row)
        else:
            rows = [*self._keys(width), Row(), *self._meanings(width)]
        self.top = max(0, min(self.top, len(rows) - height))
        return rows[self.top : self.top + height]

    def _keys(self, width: int) -> list[Row]:
        palette = self.palette
        rows = [Row().add(" keys", palette.bold)]
        rows += self._entries(KEYS, width)
        letters = [(key, title) for key, title, _, _ in offered() if key]
        rows += [Row(), Row().add(" letters: live restarts at once, techniques collects", palette.bold)]
        rows += self._entries([(key + (" B" if key == "b" else ""), title) for key, title in letters], width)
        rows.append(Row())
        return rows + [Row().add(f" {line}", palette.dim) for line in wrap(ABOUT, width - 2)]

    def _entries(self, entries: Sequence[tuple[str, str]], width: int) -> list[Row]:
        rows = []
        for key, text in entries:
            for i, line in enumerate(wrap(text, width - 10)):
                rows.append(Row().add(f" {key if not i else '':<7} ", self.palette.accent).add(line))
        return rows

    def _meanings(self, width: int) -> list[Row]:
        palette = self.palette
        rows = [Row().add(" what the bytes are there for", palette.bold)]
        for category, info in CATEGORIES.items():
            for i, line in enumerate(wrap(info.meaning, width - 19)):
                rows.append(self._meaning(info.letter, info.title, line, palette.paint[category], i == 0))
        rows += [Row(), Row().add(" outside the allocator", palette.bold)]
        for letter, title, meaning in OUTSIDE:
            for i, line in enumerate(wrap(meaning, width - 19)):
                rows.append(self._meaning(letter, title, line, palette.device[letter], i == 0))
        return rows

    def _meaning(self, letter: str, title: str, line: str, style: Style, first: bool) -> Row:
        """One line of a definition; letter and title stand before the first only."""
        row = Row().add(" ").add(letter, style).add(f" {title:<13}  ") if first else Row().to(18)
        return row.add(line, self.palette.dim)
