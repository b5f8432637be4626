"""`zoo list`: the backbones, attention mechanisms and recipes there are."""

from collections.abc import Callable, Sequence
from pathlib import Path

from zoo.commands.arguments import Parser
from zoo.commands.tables import show
from zoo.errors import UsageError, unknown

_ABOUT = "What there is. PATTERN: a part of the name, or wildcards such as 'zoo_vit_*_cb_*'."
Table = tuple[Sequence[str], Sequence[Sequence[str]]]


def run(command: str, arguments: list[str]) -> None:
    """Runs `zoo list`."""
    parser = Parser(command, "[backbones|attentions|recipes] [PATTERN]", _ABOUT)
    parser.add_argument("kind", nargs="?", help="backbones, attentions or recipes; all three when absent")
    parser.add_argument("pattern", nargs="?")
    options = parser.parse_all(arguments)
    if options.kind is not None and options.kind not in KINDS:
        raise unknown("kind of thing:", options.kind, KINDS)
    if options.kind is None:
        for index, (kind, table) in enumerate(KINDS.items()):
            print(f"{kind}:" if index == 0 else f"\n{kind}:")
            show(*table(None))
        return
    columns, rows = KINDS[options.kind](options.pattern)
    if not rows and options.pattern:
        fits = (
            f" fits {options.pattern!r}. All of them: zoo list {options.kind}" if options.pattern else " is installed"
        )
        raise UsageError(f"none of the {options.kind}{fits}")
    show(columns, rows)


def _backbones(pattern: str | None) -> Table:
    from zoo.catalogue import list_backbones, short_facts
    from zoo.published import published_top1

    columns = ("backbone", "paper", "input", "published top-1 %", "licence")
    rows = []
    for name in list_backbones(pattern):
        paper, size, licence = short_facts(name)
        rows.append((name, paper, size, published_top1(name), licence))
    return columns, rows


def _attentions(pattern: str | None) -> Table:
    from zoo.attention import attention_spec, list_attentions
    from zoo.catalogue import hosts_of, match

    specs = [attention_spec(name) for name in match(pattern, list_attentions())]
    rows = [(s.name, s.paper, s.cost, ", ".join(sorted(s.supports)) or "-", hosts_of(s.name)) for s in specs]
    return ("attention", "paper", "multiply-adds for N tokens of C channels", "supports", "tried in"), rows


def _recipes(pattern: str | None) -> Table:
    from zoo.catalogue import match
    from zoo.resources import recipes

    found = recipes()
    return ("recipe", "what"), [(name, _first_comment(found[name])) for name in match(pattern, found)]


def _first_comment(path: Path) -> str:
    """The first line of a recipe's comment says what it is."""
    for line in path.read_text(encoding="utf-8").splitlines():
        if line.startswith("#") and line.strip("# "):
            return line.strip("# ")
    return "-"


KINDS: dict[str, Callable[[str | None], Table]] = {
    "backbones": _backbones,
    "attentions": _attentions,
    "recipes": _recipes,
}
