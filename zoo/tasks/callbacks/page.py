"""The report of a test as one HTML file that needs nothing else: its pictures are inside."""

import base64
import html
import io
from collections.abc import Mapping, Sequence
from pathlib import Path

_STYLE = """
:root { color-scheme: light dark; --line: #8884; --soft: #8881; --dim: #777; }
body { font: 15px/1.5 system-ui, sans-serif; max-width: 1180px; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.5rem; margin: 0 0 .3rem } h2 { font-size: 1.1rem; margin: 2.2rem 0 .6rem }
p.about { color: var(--dim); margin: .2rem 0 1rem; overflow-wrap: anywhere }
.cards { display: flex; flex-wrap: wrap; gap: .7rem }
.card { border: 1px solid var(--line); border-radius: 8px; padding: .5rem .9rem; min-width: 7.5rem }
.card b { display: block; font-size: 1.25rem; font-variant-numeric: tabular-nums }
.card span { color: var(--dim); font-size: .85rem }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; margin: .4rem 0 }
th, td { padding: .25rem .8rem; text-align: right; border-bottom: 1px solid var(--line) }
th { font-weight: 600; border-bottom-width: 2px } th:first-child, td:first-child { text-align: left }
.wide { overflow-x: auto }
figure { margin: .8rem 0; background: white; border: 1px solid var(--line); border-radius: 6px; padding: .3rem }
figure { text-align: center }
img { max-width: 100%; height: auto }
.pictures { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 34rem), 1fr)); gap: .8rem }
.pictures figure { margin: 0 }
"""


def page(
    title: str,
    about: str,
    cards: Sequence[tuple[str, str]],
    tables: Sequence[tuple[str, str, Sequence[str], Sequence[Sequence[str]]]],
    pictures: Mapping[str, Sequence[tuple[Path, str]]],
    figure: tuple[str, Path, str] | None = None,
) -> str:
    """The whole page.

    Args:
        cards: (name, value) of the figures at the top.
        tables: (heading, remark, columns, rows).
        pictures: heading -> (picture file, what it shows in words).
        figure: (heading, picture file, what it shows in words) of one that comes before the tables.
    """
    parts = [f"<h1>{_text(title)}</h1>", f'<p class="about">{_text(about)}</p>', '<div class="cards">']
    parts += [f'<div class="card"><b>{_text(value)}</b><span>{_text(name)}</span></div>' for name, value in cards]
    parts.append("</div>")
    if figure is not None:
        heading, path, words = figure
        parts += [f"<h2>{_text(heading)}</h2>", _figure(path, words)]
    for heading, remark, columns, rows in tables:
        parts += [f"<h2>{_text(heading)}</h2>", f'<p class="about">{_text(remark)}</p>', _table(columns, rows)]
    for heading, shown in pictures.items():
        parts += [f"<h2>{_text(heading)}</h2>", '<div class="pictures">']
        parts += [_figure(path, words) for path, words in shown]
        parts.append("</div>")
    body = "\n".join(parts)
    return (
        f'<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n<title>{_text(title)}</title>\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<style>{_STYLE}</style>\n</head>\n<body>\n{body}\n</body>\n</html>\n"
    )


def write_page(path: Path, text: str) -> None:
    """Writes the page; it gets its name when it is complete."""
    partial = path.with_name(f"{path.name}.part")
    partial.write_text(text, encoding="utf-8")
    partial.replace(path)


def print_table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Prints one of the tables on the terminal."""
    from rich.console import Console
    from rich.table import Table

    table = Table(title=title, title_justify="left", title_style="bold", box=None, header_style="dim", pad_edge=False)
    for place, name in enumerate(columns):
        table.add_column(name, justify="right" if place else "left", no_wrap=True)
    for row in rows:
        table.add_row(*row)
    Console().print(table)


def _text(value: object) -> str:
    return html.escape(str(value))


def _table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    head = "".join(f"<th>{_text(name)}</th>" for name in columns)
    body = "\n".join("<tr>" + "".join(f"<td>{_text(cell)}</td>" for cell in row) + "</tr>" for row in rows)
    return f'<div class="wide"><table>\n<tr>{head}</tr>\n{body}\n</table></div>'


def _figure(path: Path, words: str) -> str:
    from PIL import Image

    # As JPEG: photos as PNG would make the page several times as large.
    content = io.BytesIO()
    with Image.open(path) as picture:
        picture.convert("RGB").save(content, "JPEG", quality=88)
    data = base64.b64encode(content.getvalue()).decode("ascii")
    return f'<figure><img src="data:image/jpeg;base64,{data}" alt="{_text(words)}"></figure>'
