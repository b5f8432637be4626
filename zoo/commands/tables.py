"""Tables on the terminal: rich where it is installed and someone is looking, plain columns elsewhere."""

import sys
import textwrap
from collections.abc import Sequence
from typing import Any


def show(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Prints a table to stdout."""
    if sys.stdout.isatty():
        try:
            from rich.console import Console
        except ImportError:
            pass
        else:
            _show_rich(Console(), columns, rows)
            return
    print(plain(columns, rows))


# A column this narrow is never wrapped, nor is the first: names are there to be typed, numbers to be compared. What is
# wrapped has room for a few words in every line.
_KEPT = 20
_WORDS = 24


def _show_rich(console: Any, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """The table in the width of the terminal, or a block for each row where wrapped columns would be slivers."""
    from rich.table import Table
    from rich.text import Text

    widths = [max(map(len, cells)) for cells in zip(columns, *rows, strict=True)]
    whole = [index == 0 or width <= _KEPT for index, width in enumerate(widths)]
    room = [width if keep else min(width, _WORDS) for width, keep in zip(widths, whole, strict=True)]
    if sum(room) + 2 * (len(room) - 1) > console.width:
        for row in rows:
            console.print(Text(row[0], style="bold"))
            console.print(Text(block(columns, row, console.width)), soft_wrap=True)
        return
    table = Table(box=None, header_style="bold", pad_edge=False)
    for column, keep in zip(columns, whole, strict=True):
        table.add_column(column, no_wrap=keep, overflow="fold")
    for row in rows:
        table.add_row(*map(Text, row))
    console.print(table)


def block(columns: Sequence[str], row: Sequence[str], width: int) -> str:
    """All but the first cell of a row, each under its column's name, in lines of at most `width` characters."""
    lines: list[str] = []
    for column, cell in zip(columns[1:], row[1:], strict=True):
        lines += textwrap.wrap(f"{column}: {cell}", width, initial_indent="  ", subsequent_indent="    ")
    return "\n".join(lines)


def plain(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """The table as aligned text without any markup, one row a line, for pipes and logs."""
    table = [columns, *rows]
    widths = [max(len(line[i]) for line in table) for i in range(len(columns))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) for line in table]
    return "\n".join(line.rstrip() for line in lines)


def facts(pairs: Sequence[tuple[str, str]]) -> str:
    """Names and values, one pair a line, values aligned."""
    width = max(len(name) for name, _ in pairs)
    return "\n".join(f"{name:<{width}}  {value}" for name, value in pairs)
