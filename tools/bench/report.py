"""zoo/kernels/BENCHMARKS.md, from the records and from nothing else."""

from collections.abc import Iterable
from typing import Any

HEAD = """# Benchmarks

Written by `python -m tools.bench report` from the records in [tools/bench/records](../../tools/bench/records); no
figure is typed by hand. Ours and its peer are timed in one run, but where a ratio has (**), and nothing is timed before
its answer agrees with the reference. To make the records again, on a machine with a GPU, in the root of the checkout
(torch, triton and timm are enough; a budget is in seconds, and what it leaves out is named):

```
python -m tools.bench ops --budget 550
python -m tools.bench attentions --budget 550
python -m tools.bench networks --compare timm,eager,recipe --budget 550
python -m tools.bench networks --compare timm,compile,fused,graph --add --budget 550
python -m tools.bench headlines
python -m tools.bench report
```

Where a step's time goes, kernel by kernel, and what is left to do: [profiles](../../tools/bench/records/profiles).

How to read the tables: times are medians over repeats by CUDA events, and "+-" is half of the distance from the fastest
to the slowest repeat. Data are random, bfloat16, channels-last (timm's lambda layers refuse that and get ordinary
maps). The floor is the larger of two times: the fewest bytes that must move over the rate of a large copy, and the
arithmetic over the rate of a large bfloat16 product, both rates measured in the same run; for a layer, only its input,
output and weights must move. Share is floor / time. Peak GB is what was allocated, weights and inputs included.
Training is forward, loss and backward without the optimizer; `recipe` is how our recipes train: blocks compiled, the
step replayed as CUDA graphs; `fused` is `compile` after timm's `reparameterize_model`, which folds batch norms into the
convolutions before them where a network, ours or the peer, knows how; `graph` is an op, a layer or a fused network
replayed so (the latter by `torch.compile(mode="reduce-overhead")`), without what the host needs to launch its kernels.
An op is timed by its kernel, also where "auto" leaves it to the reference. A ratio compares the fastest of ours with
the fastest of the peer, which had the same ways of being run but for two: `recipe` is ours alone, so that in training
only the compiled peer stands beside our replayed step; and where the peer of an op has no `graph`, ours has the host's
time less. Peaks of ops and layers replayed are left out until measured again: they counted the bench's own copies.
"""
OTHER_RUN = "(**) The fastest of the peer is from another run than the fastest of ours; the runs are listed below."
EMPTY = "\nThere are no records yet.\n"
TITLES = {
    "op": "Ops",
    "layer": "Layers, projections included",
    "attention": "Attention mechanisms",
    "network": "Networks",
    "headline": "Headlines",
}
COLUMNS = {
    "op": (
        *("op", "pass", "peer", "peer ms", "ours ms", "ours eager", "ratio"),
        *("peak GB peer", "ours", "floor ms", "share of floor"),
    ),
    "network": (
        *("network", "pass", "batch", "peer", "peer eager", "peer compile", "peer fused", "peer graph"),
        *("ours eager", "ours compile", "ours fused", "ours graph", "ours recipe", "ratio", "peak GB peer", "ours"),
    ),
    "headline": ("what", "peer", "peer images/s", "ours images/s", "ratio", "the paper's ratio"),
}
COLUMNS["layer"] = ("layer", *COLUMNS["op"][1:])
COLUMNS["attention"] = (
    *("mechanism", "cost grows as", "stores N x N", "tokens", "softmax ms", "ours ms", "ours eager", "ratio"),
    *("peak GB softmax", "ours", "floor ms", "share of floor"),
)
Row = dict[str, Any]


def line(cells: Iterable[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def number(value: float | None, digits: int = 3) -> str:
    """To `digits` significant digits, without an exponent."""
    if value is None:
        return "-"
    text = f"{value:.{digits}g}"
    return f"{float(text):,.0f}" if "e" in text or abs(value) >= 100 else text


def spread(row: Row) -> float:
    """Half of the distance from fastest to slowest repeat, over the median."""
    timing = row["timing"]
    return (timing["high_ms"] - timing["low_ms"]) / 2 / timing["median_ms"]


def milliseconds(row: Row | None) -> str:
    return "-" if row is None else f"{number(row['timing']['median_ms'])} +- {spread(row):.0%}"


def speed(row: Row | None) -> str:
    return "-" if row is None else f"{row['images_per_second']:,.0f}"


def good(record: Row, side: str, what: str) -> list[Row]:
    """Rows of a side (or, with "peer", of whatever is not ours) in a pass that were right and timed."""
    rows = [row for row in record["rows"] if row["status"] == "ok" and row.get("pass") == what]
    return [row for row in rows if (row["side"] == "ours") == (side == "ours")]


def fastest(rows: list[Row]) -> Row | None:
    return min(rows, key=lambda row: row["timing"]["median_ms"], default=None)


def times(ratio: float | None, record: Row, *rows: Row | None) -> str:
    """A ratio between rows, with a mark if they are from different runs."""
    if ratio is None:
        return "-"
    # Rows that were kept from an earlier run name its date.
    runs = {row.get("date", record["date"]) for row in rows if row}
    return f"{number(ratio)}x" + (" (**)" if len(runs) > 1 else "")


def passes(record: Row) -> list[str]:
    known = ("forward", "forward+backward", "inference", "training")
    return [what for what in known if any(row.get("pass") == what for row in record["rows"])]


def function_lines(record: Row) -> list[str]:
    """Table lines of an op, a layer or a mechanism: one a pass."""
    lines = []
    for what in passes(record):
        ours, peer = fastest(good(record, "ours", what)), fastest(good(record, "peer", what))
        if ours is None and peer is None:
            continue
        ratio = faster(record, what)
        share = (ours or {}).get("share")
        cells = [record["title"], what, "-" if peer is None else f"{peer['side']}, {peer['mode']}"]
        if record["kind"] == "attention":
            cells = [record["title"], record["growth"], "yes" if record["forms_map"] else "no"]
            cells.append(f"{record['sizes']['side'] ** 2:,}")
        eager = of_mode(good(record, "ours", what), "eager")
        cells += [milliseconds(row) for row in (peer, ours, eager)] + [times(ratio, record, peer, ours)]
        cells += [number((row or {}).get("peak_gb")) for row in (peer, ours)]
        cells += [number((ours or {}).get("floor_ms")), "-" if share is None else f"{share:.0%}"]
        lines.append(line(cells))
    return lines


def faster(record: Row, what: str) -> float | None:
    """How many times ours is as fast as its peer, each in its fastest way; None where one has no figure."""
    ours, peer = fastest(good(record, "ours", what)), fastest(good(record, "peer", what))
    return peer["timing"]["median_ms"] / ours["timing"]["median_ms"] if ours and peer else None


# Why a mechanism of linear cost is slower than one fused kernel of quadratic cost, where it is.
SLOW = {
    "efficient": "two softmaxes and two products are kernels of their own, and one softmax runs along the tokens",
    "focused_linear": "backward of heads of 64 channels spills registers, and four images fill a quarter of the GPU",
    "hedgehog": "feature maps of twice the channels are written and read by a chain of pointwise kernels",
    "lambda": "every token sums over 23 x 23 places, with keys of 16 channels, which fill a tensor core by half",
    "shifted_window": "rolling the map and cutting it copies every token four times, there and back",
}


def mechanism_notes(records: list[Row]) -> list[str]:
    """What the table of mechanisms is about, and which of them are not what their cost promises."""
    sizes = records[0]["sizes"]
    told = (
        f"Forward + backward of one layer with its projections, {sizes['batch']} images, {sizes['channels']} channels, "
        f"{sizes['heads']} heads; the ratio is to softmax attention by torch's fused kernel in the same run."
    )
    peers = [peer["timing"]["median_ms"] for r in records if (peer := fastest(good(r, "peer", "forward+backward")))]
    if peers and max(peers) > 1.1 * min(peers):
        told += f" That took {min(peers):.2f} to {max(peers):.2f} ms: longer since its gradients leave cuDNN out."
    slow = [(r["title"], faster(r, "forward+backward")) for r in records if r["growth"] in ("constant", "N")]
    named = [f"{title} ({number(ratio)}x)" for title, ratio in slow if ratio is not None and ratio < 1]
    text = "Slower than softmax attention here though its cost grows with N alone: "
    why = [f"- {title}: {SLOW[title]}." for title, ratio in slow if ratio is not None and ratio < 1 and title in SLOW]
    told += " Replayed as a graph, but not compiled: in a compiled network chains of pointwise kernels become few."
    return [told, *([text + ", ".join(named) + ".", *(["\n".join(why)] if why else [])] if named else [])]


def of_mode(rows: list[Row], mode: str) -> Row | None:
    return next((row for row in rows if row["mode"] == mode), None)


def told_of(record: Row) -> Row:
    """The figures from elsewhere, if they come from the same kind of GPU at the same sizes."""
    elsewhere = record.get("elsewhere")
    if not elsewhere or record.get("quick") or elsewhere["device"] not in record["device"]["name"]:
        return {}
    return elsewhere


def network_lines(record: Row) -> list[str]:
    """Table lines of a network in images per second: one a pass."""
    lines = []
    for what in passes(record):
        ours, peer = good(record, "ours", what), good(record, "peer", what)
        elsewhere = told_of(record)
        told = dict(elsewhere.get("images_per_second", {}).get(what, {}))
        told_gb = elsewhere.get("peak_gb", {}).get(what, {})
        if not ours and not peer:
            continue
        best, rival = fastest(ours), fastest(peer)
        rival_speed = max(told.values(), default=None) if rival is None else rival["images_per_second"]
        rival_gb = rival.get("peak_gb") if rival else told_gb.get(max(told, key=lambda mode: told[mode], default=""))
        name = f"{elsewhere['peer']} (*)" if elsewhere and not peer else record["peer_name"] or "-"
        ratio = best["images_per_second"] / rival_speed if best and rival_speed else None
        batch = (ours + peer)[0]["batch"]
        cells = [record["title"], what, str(batch), name]
        for mode in ("eager", "compile", "fused", "graph"):
            row = of_mode(peer, mode)
            cells.append(f"{told[mode]:,.0f}" if row is None and not peer and mode in told else speed(row))
        cells += [speed(of_mode(ours, mode)) for mode in ("eager", "compile", "fused", "graph", "recipe")]
        cells += [times(ratio, record, best, rival), number(rival_gb), number((best or {}).get("peak_gb"))]
        lines.append(line(cells))
    return lines


def headline_lines(record: Row) -> list[str]:
    best, rival = fastest(good(record, "ours", "inference")), fastest(good(record, "peer", "inference"))
    if best is None and rival is None:
        return []
    ratio = best["images_per_second"] / rival["images_per_second"] if best and rival else None
    cells = [record["title"], record["peer_name"]]
    cells += [f"{speed(row)} ({row['mode']})" if row else "-" for row in (rival, best)]
    return [line([*cells, times(ratio, record, best, rival), record["claim"] or "-"])]


LINES = {
    "op": function_lines,
    "layer": function_lines,
    "attention": function_lines,
    "network": network_lines,
    "headline": headline_lines,
}


def troubles(record: Row) -> list[str]:
    """A sentence for every row without a figure."""
    found = []
    for row in record["rows"]:
        if row["status"] != "ok":
            where = ", ".join(part for part in (row["side"], row["mode"], row.get("pass")) if part)
            found.append(f"- {record['title']} ({where}): {row['status']}: {row.get('reason', '')}".rstrip(": "))
    return found


def table(kind: str, records: list[Row]) -> str:
    """The table of a kind of cases with its notes, its commands and what went wrong."""
    lines = [f"\n### {TITLES[kind]}\n", line(COLUMNS[kind]), "|" + "---|" * len(COLUMNS[kind])]
    lines += [cells for record in records for cells in LINES[kind](record)]
    notes = mechanism_notes(records) if kind == "attention" else []
    notes += [record["note"] for record in records if record.get("note")]
    sources = {told_of(record)["source"] for record in records if told_of(record)}
    notes += [f"(*) {source}; it cannot be installed beside ours." for source in sorted(sources)]
    notes += [OTHER_RUN] if any("(**)" in cells for cells in lines) else []
    if notes:
        lines += ["", *dict.fromkeys(notes)]
    bad = [text for record in records for text in troubles(record)]
    if bad:
        lines += ["", "Without a figure:", "", *bad]
    commands = dict.fromkeys(command for record in records for command in record["commands"])
    return "\n".join([*lines, "", "```", *commands, "```", ""])


def machines(records: list[Row]) -> list[str]:
    """Hardware, versions, date and commit of runs in a sentence each, with the rates that were measured in them."""
    found: dict[str, list[Row]] = {}
    for record in records:
        device = ", ".join(f"{key} {value}" for key, value in record["device"].items() if key != "name")
        known = ", ".join(f"{name} {version}" for name, version in sorted(record["versions"].items()))
        # Rows that were kept from an earlier run name their own.
        for made in (record, *(row for row in record["rows"] if "commit" in row)):
            said = f"- {record['device']['name']}, {device}; {known}; {made['date'][:10]}"
            name, *changes = (made.get("commit") or "unknown").split(" ", 1)
            said += f"; commit {' '.join([name[:12], *changes])}"
            rates = [record["rates"]] if made is record and record.get("rates") else []
            found.setdefault(said, []).extend(rates)
    return [f"{said}{_span(rates)}." for said, rates in found.items()]


def _span(rates: list[Row]) -> str:
    if not rates:
        return ""
    parts = []
    for key, unit, name in (("bytes_per_second", 1e9, "GB/s"), ("flops_per_second", 1e12, "TFLOP/s")):
        low, high = (f"{extreme(rate[key] for rate in rates) / unit:,.0f}" for extreme in (min, max))
        parts.append(f"{low} {name}" if low == high else f"{low} to {high} {name}")
    return f"; measured rates {' and '.join(parts)}"


def render(records: list[Row]) -> str:
    """BENCHMARKS.md for these records: a section for each kind of device, a table for each kind of case."""
    if not records:
        return HEAD + EMPTY
    parts = [HEAD]
    groups = sorted({(bool(record.get("quick")), record["device"]["name"]) for record in records})
    for quick, name in groups:
        here = [r for r in records if r["device"]["name"] == name and bool(r.get("quick")) == quick]
        here.sort(key=lambda record: record.get("order", 0))
        parts.append(f"\n## {name}" + (", toy sizes: a test of the tool, no measurement" if quick else "") + "\n")
        parts += [table(kind, same) for kind in TITLES if (same := [r for r in here if r["kind"] == kind])]
        parts.append("\n" + "\n".join(machines(here)) + "\n")
    return "".join(parts)
