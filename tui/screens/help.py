"""Help: what is selected, the keys, and what every category means."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from rich.style import Style

from ...engine.categories import CATEGORIES
from ..actions import KEYS_WIDTH, Action, help_lines, moves, offered_here
from ..control import Control
from ..draw import Row, wrap
from ..palette import Palette
from ..state import ViewState
from .page import Page, Topic

OUTSIDE = (
    ("c", "cached", "Reserved by the caching allocator and not allocated: free for this process only."),
    ("x", "context", "GPU: CUDA context and libraries. CPU: the process without its counted tensors."),
    ("n", "NCCL", "Communicators and buffers between ranks."),
    ("m", "managed", "CUDA managed memory of paged optimizers."),
    ("h", "host", "Page-locked memory of the host, in a bar of its own: what was offloaded."),
    ("u", "unaccounted", "This process beyond torch, NCCL and the context as measured."),
    ("o", "others", "Other processes on the device."),
)

ABOUT = (
    "Figures are measured. On a GPU they come from the caching allocator's own trace; on a CPU every "
    "operation's outputs are counted. A dash is what is not known."
)


class HelpPage(Page):
    """Over all other screens; `?` and escape leave it.

    Args:
        state: As for every page.
        control: As for every page.
        palette: As for every page.
        page: The screen it is called from.
        everywhere: What can be done on every screen.
    """

    title = "help"

    def __init__(
        self,
        state: ViewState,
        control: Control,
        palette: Palette,
        page: Callable[[], Page],
        everywhere: Callable[[], tuple[Action, ...]],
    ) -> None:
        super().__init__(state, control, palette)
        self._page, self._everywhere = page, everywhere
        self.top = 0

    def make_actions(self) -> tuple[Action, ...]:
        """Scroll."""
        return moves("scroll", "scroll")

    def topic(self) -> Topic:
        """The help itself."""
        return Topic("help", "Keys, and what the bytes are there for.")

    def move(self, by: int) -> None:
        """Scroll."""
        self.top = max(0, self.top + by)

    def undo(self) -> None:
        """Undo as on the screen that help was called from."""
        self._page().undo()

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
        """The selected part, then the keys: the screen's own, those of every screen, a letter for each setting."""
        palette, page = self.palette, self._page()
        live, several, of_script = self.state.acts, self.state.several, self.changes.of_script
        topic = page.topic()
        rows = [Row().add(f" {topic.title}", palette.bold)]
        rows += [Row().add(f" {line}") for line in wrap(topic.text, width - 2)]
        offered = offered_here(page.actions, live, several, not of_script)
        own = [action for action in offered if not action.name.startswith("change.")]
        listed = {f"change.{option.name}" for _, _, option, _ in self.changes.listed()}
        settings = [action for action in offered if action.name.removesuffix("-back") in listed]
        changing = page.changing_script if of_script else page.changing
        for title, actions in (
            (f"keys on {page.title}, from here too; arrows scroll", own),
            ("keys everywhere", offered_here(self._everywhere(), live, several, not of_script)),
            (f"settings: {changing}", settings),
        ):
            if actions:
                rows += [Row(), Row().add(f" {title}", palette.bold)]
                rows += self._entries(help_lines(actions), width)
        rows.append(Row())
        return rows + [Row().add(f" {line}", palette.dim) for line in wrap(ABOUT, width - 2)]

    def _entries(self, entries: Sequence[tuple[str, str]], width: int) -> list[Row]:
        rows = []
        for key, text in entries:
            for i, line in enumerate(wrap(text, width - KEYS_WIDTH - 3) or [""]):
                rows.append(Row().add(f" {key if not i else '':<{KEYS_WIDTH}} ", self.palette.accent).add(line))
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
