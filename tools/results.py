"""Write recipes/RESULTS.md from the records of finished runs, so that no figure in it is typed by hand.

python tools/results.py add runs/NAME [--as LABEL]   keep the record of a run in recipes/results/
python tools/results.py                              write recipes/RESULTS.md from all kept records
python tools/results.py --check                      fail if RESULTS.md is not what the records say
"""

import argparse
import json
import sys
from pathlib import Path

RECIPES = Path(__file__).resolve().parent.parent / "recipes"
HEAD = """# Results

Every row is a run of the command under its table, read from its record in [results/](results/) by
`tools/results.py`. Time counts from the first step of training, compilation included. One seed each unless a row says
otherwise: differences of a few tenths of a point mean nothing. No hyperparameter was chosen on the test split.
"""
COLUMNS = ("network", "input", "patch", "parameters M", "epochs", "train s", "images/s", "peak GB", "test top-1 %")
NEEDED = ("command", "recipe", "seed", "hardware", "versions", "backbone", "parameters", "test")


def network(record: dict) -> str:
    """What was trained, with the attention where it is not the network's own."""
    attn = record.get("attn")
    name = f"`{record['backbone']}`"
    return name if not attn else f"{name}, attn `{attn}`"


def row(record: dict) -> str:
    """One line of a table."""
    size = record.get("img_size")
    size = size if isinstance(size, list) else [size, size]
    patch = record.get("patch_size")
    patch = patch[0] if isinstance(patch, list) else patch
    memory = record.get("peak_memory_gb")
    cells = (
        network(record),
        f"{size[0]} x {size[1]}",
        str(patch or "-"),
        f"{record['parameters'] / 1e6:.2f}",
        f"{record['epochs_done']:.1f}",
        f"{record['train_seconds']:.0f}",
        f"{record['images_per_second']:,.0f}",
        "-" if memory is None else f"{memory:.1f}",
        f"{100 * record['test']['top1']:.2f}",
    )
    return "| " + " | ".join(cells) + " |"


def table(recipe: str, records: list[dict]) -> str:
    """The table of a recipe with the commands and the machines behind it."""
    lines = [f"\n## {recipe}\n", "| " + " | ".join(COLUMNS) + " |", "|" + "---|" * len(COLUMNS)]
    lines += [row(record) for record in records]
    lines.append("\n```")
    lines += [f"{record['command']}" for record in records]
    lines.append("```\n")
    for about in sorted({machine(record) for record in records}):
        lines.append(about)
    return "\n".join(lines) + "\n"


def machine(record: dict) -> str:
    """Hardware, versions, seed and date of a run in a sentence."""
    versions = ", ".join(f"{name} {version}" for name, version in sorted(record["versions"].items()))
    return f"{record['hardware']}; {versions}; seed {record['seed']}; {record.get('date', '')[:10]}."


def render(records: list[dict]) -> str:
    """RESULTS.md for these records: one table a recipe, the best first."""
    recipes = sorted({record["recipe"] for record in records})
    parts = [HEAD]
    for recipe in recipes:
        same = [record for record in records if record["recipe"] == recipe]
        parts.append(table(recipe, sorted(same, key=lambda record: -record["test"]["top1"])))
    return "".join(parts)


def draw(records: list[dict], path: Path) -> None:
    """Writes the README's picture: test accuracy of every run as a bar, with what it took."""
    from matplotlib.figure import Figure

    ordered = sorted(records, key=lambda record: record["test"]["top1"])
    figure = Figure(figsize=(9, 1.0 + 0.5 * len(ordered)), layout="constrained", dpi=110)
    axes = figure.subplots()
    names = []
    for record in ordered:
        size = record["img_size"] if isinstance(record["img_size"], list) else [record["img_size"]]
        attn = f", {record['attn']}" if record.get("attn") else ""
        patch = f", patch {record['patch_size']}" if record.get("patch_size") else ""
        names.append(f"{record['backbone']}{attn}\n{size[-1]} px{patch}")
    values = [100 * record["test"]["top1"] for record in ordered]
    bars = axes.barh(names, values, color="#3b6ea5", height=0.6)
    labels = [
        f"{value:.1f} %   {record['images_per_second']:,.0f} images/s"
        for value, record in zip(values, ordered, strict=True)
    ]
    axes.bar_label(bars, labels, padding=4, fontsize=9)
    axes.set(xlim=(0, 105), xlabel="top-1 on the 10,000 test images, %")
    axes.tick_params(axis="y", labelsize=8)
    axes.spines[["top", "right"]].set_visible(False)
    low, high = (round(pick(record["train_seconds"] for record in ordered)) for pick in (min, max))
    seconds = f"{low}" if low == high else f"{low} to {high}"
    figure.suptitle(f"CIFAR-10 (JPEG) from scratch, {seconds} s of training on {ordered[0]['hardware']}", fontsize=10)
    path.parent.mkdir(exist_ok=True)
    figure.savefig(path)


def load(folder: Path) -> list[dict]:
    """Every kept record.

    Raises:
        SystemExit: a record lacks what a row needs.
    """
    records = []
    for path in sorted(folder.glob("*.json")):
        record = json.loads(path.read_text())
        missing = [key for key in NEEDED if not record.get(key) and record.get(key) != 0]
        if missing:
            raise SystemExit(f"{path.name} lacks {', '.join(missing)}: was the run finished and tested (zoo test)?")
        records.append(record)
    return records


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("action", nargs="?", choices=("write", "add"), default="write")
    parser.add_argument("run", nargs="?", type=Path, help="a run folder (or its record.json) to keep")
    parser.add_argument("--as", dest="label", help="name of the kept record; default: the run's")
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 if RESULTS.md is out of date")
    parser.add_argument("--recipes", type=Path, default=RECIPES, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    kept, page = args.recipes / "results", args.recipes / "RESULTS.md"
    if args.action == "add":
        if args.run is None:
            parser.error("add needs a run folder")
        source = args.run / "record.json" if args.run.is_dir() else args.run
        if not source.is_file():
            parser.error(f"{source} is not there; give a run folder that holds a record.json")
        kept.mkdir(exist_ok=True)
        label = args.label or (args.run.name if args.run.is_dir() else args.run.stem)
        (kept / f"{label}.json").write_text(source.read_text())
    text = render(load(kept))
    if args.check:
        if not page.is_file() or page.read_text() != text:
            print("recipes/RESULTS.md does not follow from recipes/results; run: python tools/results.py")
            return 1
        return 0
    page.write_text(text)
    records = [record for record in load(kept) if record["recipe"].startswith("classification/cifar10")]
    if records:
        draw(records, args.recipes.parent / "docs" / "results.png")
    print(f"wrote {page.name} from {len(load(kept))} records")
    return 0


if __name__ == "__main__":
    sys.exit(main())
