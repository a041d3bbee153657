"""Everything that can be done, each from one definition: its keys, its palette entry, its line in the help.

Screens list the actions of their own; those here hold on every screen.
"""

from __future__ import annotations

import re
import string
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import groupby
from typing import Any, NamedTuple

from ..engine.config import Option, UserError, did_you_mean
from ..engine.technique import Technique
from .draw import wrap

KEYS_WIDTH = 12
"""Columns for keys in the help."""

RESERVED = ("ctrl+a", "ctrl+b", "ctrl+s", "ctrl+q")
"""Keys of tmux, screen and the terminal: no action may have them."""


class Action(NamedTuple):
    """One thing that can be done.

    Attributes:
        name: In the config file's `[keys]`: `save`, `step.zoom-in`.
        keys: As typed (`B`, `<`), or Textual's name (`pageup`, `ctrl+t`); none: it is in the palette alone.
        title: In the command palette.
        text: In the help; neighbours with the same text share a line.
        run: Gets the app, or the screen whose action it is.
        label: In the screen's row of keys; empty: not there.
        acts: It takes an engine: on a recording it is not offered, and refused.
        several: It takes another run to look at, likewise.
        own: It takes a loop of the engine's own, likewise: a watched script is restarted and held where it runs.
    """

    name: str
    keys: tuple[str, ...]
    title: str
    text: str
    run: Callable[[Any], None]
    label: str = ""
    acts: bool = False
    several: bool = False
    own: bool = False


def offered_here(actions: Iterable[Action], live: bool, several: bool, own: bool) -> tuple[Action, ...]:
    """The actions that can do anything.

    Args:
        actions: Some.
        live: Whether there is an engine.
        several: Whether there is another run to look at.
        own: Whether the loop is the engine's own.
    """
    return tuple(
        action
        for action in actions
        if (live or not action.acts) and (several or not action.several) and (own or not action.own)
    )


def calling(method: str, *arguments: Any) -> Callable[[Any], None]:
    """A function that calls a method of the app or of a screen."""

    def run(target: Any) -> None:
        getattr(target, method)(*arguments)

    return run


def everywhere(titles: Sequence[str]) -> tuple[Action, ...]:
    """The actions of every screen.

    Args:
        titles: Of the screens, in the order of their digits.
    """
    screens = tuple(
        Action(f"screen.{title}", (str(n),), f"Screen: {title}", ", ".join(titles), calling("go", n - 1))
        for n, title in enumerate(titles, 1)
    )
    return (*screens, *EVERYWHERE)


_OTHER = "the next run, the one before, on all screens: runs of this session, recordings, the prediction"

EVERYWHERE: tuple[Action, ...] = (
    Action("help", ("?",), "Explain this", "explain what is selected; keys; what the bytes are",
           lambda app: app.toggle_help(), "help"),
    Action("quit", ("q",), "Quit", "quit; a run may go on without the app", lambda app: app.quit(), "quit"),
    Action("dismiss", ("escape",), "Dismiss", "take a message away, cancel saving, leave help or details",
           lambda app: app.leave()),
    Action("pause", ("space",), "Pause the view", "pause the view while data goes on; again: catch up",
           lambda app: app.toggle_freeze(), "pause"),
    Action("palette", (":", "ctrl+p"), "Command palette", "every action by name", lambda app: app.open_palette()),
    Action("undo", ("z",), "Undo", "undo the last change: of those collected, or go back to the run before",
           lambda app: app.page.undo()),
    Action("restart", ("r",), "Restart the run", "restart the run as it is", lambda app: app.control.restart(),
           acts=True, own=True),
    Action("hold", ("h",), "Hold the run, or let it go on", "hold the run at the next micro-batch, or let it go on",
           lambda app: app.control.toggle_pause(), acts=True, own=True),
    Action("stop", ("x",), "Stop the run", "stop the run and free everything", lambda app: app.control.stop(),
           acts=True, own=True),
    Action("save", ("s",), "Save a recording", "save a recording: gpumem-tui open FILE shows it again",
           lambda app: app.control.save()),
    Action("export", ("X",), "Export the run as a page", "export the run as a page for a browser; other formats: :",
           lambda app: app.control.save("html")),
    Action("run.next", ("j",), "Look at the next run", _OTHER, lambda app: app.control.look_on(1), several=True),
    Action("run.before", ("J",), "Look at the run before", _OTHER, lambda app: app.control.look_on(-1), several=True),
    Action("copy", ("y",), "Copy this table", "copy the screen's table to the terminal's clipboard (OSC 52)",
           lambda app: app.copy_table()),
    Action("picture", ("i",), "Save the screen", "save the screen as SVG and as text", lambda app: app.save_picture()),
    Action("out-of-memory", ("M",), "Out of memory: why", "why the run that ran out of memory did, and what would fit",
           lambda app: app.board.show_refusal()),
    Action("predict", ("P",), "Predict, or do not", "work out what changes would do, or no longer",
           lambda app: app.toggle_predictions()),
    Action("units", ("g",), "GiB or GB", "count in GiB or in GB", lambda app: app.next_units()),
    Action("theme", ("v",), "Next theme", "next theme: auto, dark, light, ansi", lambda app: app.next_theme()),
    Action("slower", ("[",), "Refresh less often", "refresh less often, more often", lambda app: app.refresh_by(-1)),
    Action("faster", ("]",), "Refresh more often", "refresh less often, more often", lambda app: app.refresh_by(1)),
    Action("take-over", ("!",), "Take over", "take over from whoever commands this engine",
           lambda app: app.control.take_over(), acts=True, own=True),
    Action("tour", ("w",), "Tour", "the tour of the first start", lambda app: app.start_tour()),
)  # fmt: skip

MOVES = {"up": -1, "down": 1, "pageup": -10, "pagedown": 10, "home": -1_000_000, "end": 1_000_000}
"""Keys that move a selection, and by how many rows."""

_MOVE_TITLES = ("Up", "Down", "Page up", "Page down", "First", "Last")


def moves(text: str = "select a row", label: str = "select") -> tuple[Action, ...]:
    """The actions of a screen that move its selection: `page.move(rows)`."""
    texts = (text, "by ten rows", "to the first, to the last")
    return tuple(
        Action(f"move.{key}", (key,), title, texts[i // 2], calling("move", by), label if abs(by) == 1 else "")
        for i, ((key, by), title) in enumerate(zip(MOVES.items(), _MOVE_TITLES, strict=True))
    )


Change = Callable[[Any, Option, int, bool], None]


def _changing(change: Change, option: Option, by: int, around: bool) -> Callable[[Any], None]:
    def run(page: Any) -> None:
        change(page, option, by, around)

    return run


def changes(
    offered: Iterable[tuple[str, str, Option, Technique | None]],
    run: Callable[[Any, Option, int, bool], None],
    acts: bool,
) -> tuple[Action, ...]:
    """A letter for every technique, and in capitals the way back; without a letter it is in the palette alone.

    Args:
        offered: Key, title, option, technique.
        run: Gets the screen, the option, +1 or -1, and whether values go round.
        acts: Whether that takes an engine.
    """
    found = []
    for key, title, option, technique in offered:
        for letter, by, which in ((key, 1, "next value"), (key.upper(), -1, "value before")):
            keys = (letter,) if letter else ()
            found.append(
                Action(
                    f"change.{option.name}{'' if by > 0 else '-back'}", keys, f"{title}: {which}",
                    f"{title}: next value, value before",
                    _changing(run, option, by, technique is not None), acts=acts,
                )
            )  # fmt: skip
    return tuple(found)


def remapped(actions: Iterable[Action], keys: Mapping[str, tuple[str, ...]]) -> tuple[Action, ...]:
    """The actions with the keys that a config file gives them."""
    return tuple(action._replace(keys=keys.get(action.name, action.keys)) for action in actions)


def check_keys(scopes: Mapping[str, Sequence[Action]], keys: Mapping[str, tuple[str, ...]], where: str) -> None:
    """Refuse keys that no action could be reached by.

    Args:
        scopes: By screen, everything that can be done there, remapped.
        keys: What the config file says.
        where: The config file, or what was typed.

    Raises:
        UserError: One line that names this and the key.
    """
    names = {action.name for actions in scopes.values() for action in actions}
    for name, wanted in keys.items():
        if name not in names:
            known = sorted({re.sub(r"[.].*", ".…", one) for one in names})
            hint = did_you_mean(name, names, f"known: {', '.join(known)}")
            raise UserError(f"{where}: keys.{name}: there is no such action; {hint}")
        if taken := set(wanted) & set(RESERVED):
            raise UserError(f"{where}: keys.{name}: {min(taken)} belongs to tmux, screen or the terminal")
    for actions in scopes.values():
        owner: dict[str, str] = {}
        for action in actions:
            for key in action.keys:
                if owner.setdefault(key, action.name) != action.name:
                    raise UserError(f"{where}: keys.{action.name}: {key} is {owner[key]}'s already")


_SHOWN = {
    "up": "↑", "down": "↓", "left": "←", "right": "→", "pageup": "PgUp", "pagedown": "PgDn",
    "home": "Home", "end": "End", "escape": "esc", "delete": "Del",
}  # fmt: skip


def shown_keys(actions: Iterable[Action]) -> str:
    """Keys for reading: `↑ ↓`, and of digits in a row `1…7`."""
    keys = [_SHOWN.get(key, key) for action in actions for key in action.keys]
    if len(keys) > 2 and "".join(keys) in string.digits:
        return f"{keys[0]}…{keys[-1]}"
    return " ".join(keys)


def help_lines(actions: Iterable[Action]) -> list[tuple[str, str]]:
    """Keys and text; neighbours that say the same share a line. What has no key is in the palette."""
    found = []
    for text, group in _grouped((action for action in actions if action.keys), lambda action: action.text):
        keys = wrap(shown_keys(group), KEYS_WIDTH - 1)
        found += [(line, text if not i else "") for i, line in enumerate(keys)]
    return found


def hint(actions: Iterable[Action]) -> str:
    """The labelled ones in one row, each with its first key: `↑ ↓ select · f filter`."""
    labelled = (action._replace(keys=action.keys[:1]) for action in actions if action.label)
    return " · ".join(f"{shown_keys(g)} {label}" for label, g in _grouped(labelled, lambda a: a.label))


def _grouped(actions: Iterable[Action], by: Callable[[Action], str]) -> list[tuple[str, list[Action]]]:
    return [(text, list(group)) for text, group in groupby(actions, by)]
