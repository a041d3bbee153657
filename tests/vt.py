"""As much of a terminal as the app needs: what is on the screen after some bytes."""

from __future__ import annotations

import re
from typing import NamedTuple

from rich.cells import get_character_cell_size

TOKEN = re.compile(
    r"\x1b\[([0-9;?<>=]*)([@-~])|\x1b\][^\x07\x1b]*(?:\x07|\x1b\\)|\x1bP[^\x1b]*\x1b\\|\x1b.|[^\x1b]", re.S
)


class Look(NamedTuple):
    """How a cell looks: attributes, ink, ground, as SGR codes."""

    attributes: frozenset[str] = frozenset()
    ink: str = "39"
    ground: str = "49"


PLAIN = Look()


class Screen:
    """A grid of characters with their looks; of a wide character the second cell is empty."""

    def __init__(self, width: int, height: int) -> None:
        self.width, self.height = width, height
        self.grid = [[(" ", PLAIN) for _ in range(width)] for _ in range(height)]
        self.x = self.y = 0
        self.look = PLAIN

    @property
    def lines(self) -> list[str]:
        return ["".join(character for character, _ in row).rstrip() for row in self.grid]

    def feed(self, text: str) -> None:
        for token in TOKEN.finditer(text):
            parameters, final = token.group(1), token.group(2)
            if final is None:
                self._write(token.group())
            elif final == "H":
                row, _, column = parameters.partition(";")
                self.y, self.x = int(row or 1) - 1, int(column or 1) - 1
            elif final == "m":
                self._restyle(parameters.split(";"))
            elif final == "K":
                assert parameters == ""
                self.grid[self.y][self.x :] = [(" ", PLAIN)] * (self.width - self.x)
                assert self.look.ground == "49" and "7" not in self.look.attributes, "erased in colour"
            elif final == "J":
                self.grid = [[(" ", PLAIN) for _ in range(self.width)] for _ in range(self.height)]

    def _write(self, token: str) -> None:
        if token == "\r":
            self.x = 0
        elif token == "\n":
            self.y = min(self.y + 1, self.height - 1)
        elif token >= " ":
            size = get_character_cell_size(token)
            if not size:
                character, look = self.grid[self.y][self.x - 1]
                self.grid[self.y][self.x - 1] = (character + token, look)
                return
            self.grid[self.y][self.x : self.x + size] = [(token, self.look), *[("", self.look)] * (size - 1)]
            self.x += size

    def _restyle(self, codes: list[str]) -> None:
        attributes, ink, ground = set(self.look.attributes), self.look.ink, self.look.ground
        while codes:
            code = codes.pop(0)
            if code in ("", "0"):
                attributes, ink, ground = set(), "39", "49"
            elif code in ("38", "48"):
                n = 4 if codes[0] == "2" else 2
                colour, codes = ";".join([code, *codes[:n]]), codes[n:]
                ink, ground = (colour, ground) if code == "38" else (ink, colour)
            elif int(code) < 10:
                attributes.add(code)
            elif code[0] in "39" and len(code) == 2:
                ink = code
            else:
                ground = code
        self.look = Look(frozenset(attributes), ink, ground)
