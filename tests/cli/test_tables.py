"""Tables as a person sees them, in terminals of several widths."""

import io

import pytest

from zoo.commands import listing, tables


def shown(width, columns, rows):
    console = pytest.importorskip("rich.console").Console(file=io.StringIO(), width=width)
    tables._show_rich(console, columns, rows)
    return console.file.getvalue()


@pytest.mark.parametrize("width", [80, 120, 200, 400])
@pytest.mark.parametrize("kind", ["attentions", "backbones"])
def test_lists_fit_the_terminal_and_lose_nothing(kind, width):
    columns, rows = listing.KINDS[kind](None)
    text = shown(width, columns, rows)
    lines = text.splitlines()
    assert max(map(len, lines)) <= width
    # Every name stands whole at the start of a line of its own: it is there to be typed.
    names = [row[0] for row in rows]
    assert [line.split()[0] for line in lines if line.split()[0] in names] == names
    assert "…" not in text
    found = "".join(text.split())
    for row in rows:
        assert all(word in found for cell in row for word in cell.replace(" ", "\n").split())


def test_a_narrow_terminal_gets_a_block_for_each_row():
    row = ("a_name", "some words " * 4, "x" * 30)
    assert shown(40, ("name", "what", "cost"), [row]).splitlines() == [
        "a_name",
        "  what: some words some words some words",
        "    some words",
        "  cost: " + "x" * 30,
    ]


def test_brackets_are_text():
    assert "[0, 1] [bold]" in shown(80, ("name", "what"), [("a", "[0, 1] [bold]")])
