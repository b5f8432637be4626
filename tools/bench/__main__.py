"""Times ops, layers, mechanisms and networks beside their peers, and writes zoo/kernels/BENCHMARKS.md from the records.

python -m tools.bench ops [PATTERN]         ops and single layers: forward, forward + backward, share of the floor
python -m tools.bench attentions [PATTERN]  every mechanism beside softmax attention, forward + backward
python -m tools.bench networks [PATTERN]    whole networks: inference and training
python -m tools.bench headlines [PATTERN]   the ratios that papers advertise, with ours beside them
python -m tools.bench list                  the names of all cases
python -m tools.bench profile NETWORK       where the time of one step goes
python -m tools.bench report [--check]      write BENCHMARKS.md from all records, or fail if it is not what they say

Exit status: 0 done, 1 ours was wrong or failed (or the page is out of date), 2 bad usage.
"""

import argparse
import math
import shlex
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from tools.bench import machine, report
from tools.bench.cases import CASES, KINDS, Case, FunctionCase, select
from tools.bench.run import COMPARE, PASSES, Options, run_case
from tools.bench.timing import rates, synchronize

COMMANDS = {"ops": ("op", "layer"), "attentions": ("attention",), "networks": ("network",), "headlines": ("headline",)}
PAGE = machine.ROOT / "zoo" / "kernels" / "BENCHMARKS.md"


def load_registry() -> None:
    from tools.bench import attentions, networks, ops  # noqa: F401


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(
        prog="python -m tools.bench", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = top.add_subparsers(dest="action", required=True)
    for name in (*COMMANDS, "profile"):
        one = commands.add_parser(name)
        one.add_argument("--device", choices=("cuda", "cpu"), help="default: cuda where there is one")
        one.add_argument("--quick", action="store_true", help="toy sizes and few repeats: shows that it runs")
        if name == "profile":
            one.add_argument("network", help="a case of `list`, or any name that timm.create_model knows")
            one.add_argument("--mode", choices=("eager", "compile", "recipe", "fused", "graph"), default="eager")
            one.add_argument("--pass", dest="what", choices=PASSES, default="training")
            one.add_argument("--side", choices=("ours", "timm"), default="ours")
            one.add_argument("--top", type=int, default=15, help="single kernels to list (default 15)")
            continue
        one.add_argument("pattern", nargs="?", default="*", help="part of a name, * and ? allowed")
        one.add_argument("--compare", default=",".join(COMPARE), help=f"of {','.join(COMPARE)} (default: all)")
        one.add_argument("--dtype", choices=("bfloat16", "float16", "float32"), default="bfloat16", help="ops, layers")
        one.add_argument("--budget", type=float, default=math.inf, help="seconds after which nothing new is started")
        one.add_argument("--out", type=Path, help="folder of the records (default tools/bench/records; --quick: none)")
        one.add_argument("--add", action="store_true", help="keep rows of earlier records that are not made again")
        if name in ("networks", "headlines"):
            one.add_argument(
                "--pass", dest="what", choices=PASSES, help="default: both; with --add the record keeps the other"
            )
    commands.add_parser("list")
    page = commands.add_parser("report")
    page.add_argument("--check", action="store_true", help="write nothing; exit 1 if the page is out of date")
    page.add_argument("--records", type=Path, default=machine.RECORDS)
    page.add_argument("--page", type=Path, default=PAGE)
    return top


def facts(case: Case, quick: bool) -> dict[str, Any]:
    """What a table says of a case besides its figures."""
    known: dict[str, Any] = {"case": case.name, "kind": case.kind, "title": case.title, "quick": quick}
    known["order"] = list(CASES).index(case.name) if case.name in CASES else len(CASES)
    if isinstance(case, FunctionCase):
        return known | dict(case.about) | {"sizes": dict(case.quick if quick else case.sizes)}
    known |= {key: getattr(case, key) for key in ("ours_name", "peer_name", "claim", "note")}
    known["img_size"] = case.quick_size if quick else case.img_size
    known["peer_img_size"] = known["img_size"] if quick or case.peer_img_size is None else case.peer_img_size
    return known | {"elsewhere": asdict(case.elsewhere) if case.elsewhere else None}


def text_of(row: dict[str, Any]) -> str:
    """A row as it is printed when it is there."""
    head = f"  {row['side']:<10}{row['mode']:<9}{row.get('pass', ''):<18}"
    if row["status"] != "ok":
        return f"{head}{row['status'].upper()}: {row.get('reason', '')}"
    timing = row["timing"]
    text = f"{head}{timing['median_ms']:10.4f} ms  [{timing['low_ms']:.4f}, {timing['high_ms']:.4f}]"
    if "images_per_second" in row:
        text += f"  {row['images_per_second']:10,.0f} images/s"
    if row.get("peak_gb") is not None:
        text += f"  peak {row['peak_gb']:.2f} GB"
    if "share" in row:
        text += f"  {row['share']:.1%} of the floor's speed ({row['floor_ms']:.4f} ms)"
    if "check" in row:
        text += f"  error {row['check']['error']:.1e}"
    return text


def broken(device: str) -> bool:
    """Whether a kernel has broken the process's context on the GPU, so that nothing can run there any more."""
    try:
        synchronize(device)
    except RuntimeError:
        return True
    return False


def execute(cases: list[Case], options: Options, command: str, out: Path | None, add: bool = False) -> int:
    """Runs cases one after the other; a failing one stops none.

    Returns:
        1 if ours was wrong or failed somewhere, else 0.
    """
    about = machine.about(options.device, command)
    options = replace(options, rates=(found := rates(options.device, options.quick)))
    told = asdict(found)
    print(machine.said(about))
    print(f"{told['bytes_per_second'] / 1e9:,.0f} GB/s, {told['flops_per_second'] / 1e12:,.1f} TFLOP/s: {told['how']}")
    left: list[str] = []
    bad: list[str] = []
    for case in cases:
        if time.monotonic() > options.deadline or (bad and broken(options.device)):
            left.append(case.name)
            continue
        print(f"\n{case.name}: {case.title}", flush=True)
        start, rows = time.monotonic(), []
        for row in run_case(case, options):
            rows.append(row)
            print(text_of(row), flush=True)
            if out is not None and row["status"] != "left out":
                # After every row: a run that is killed keeps what it has measured.
                about_case = facts(case, options.quick) | {"dtype": str(options.dtype).removeprefix("torch.")}
                seconds = {"seconds": round(time.monotonic() - start, 1)}
                machine.write(about | about_case | {"rows": rows, "rates": told} | seconds, out, add)
        bad += [case.name for row in rows if row["side"] == "ours" and row["status"] in ("wrong", "failed")]
        left += [case.name for row in rows if row["status"] == "left out"]
    if left:
        print(f"\nleft out, wholly or in part, by the budget or a broken GPU context: {', '.join(dict.fromkeys(left))}")
    if bad:
        print(f"\nwrong or failed: {', '.join(dict.fromkeys(bad))}")
    return 1 if bad else 0


def device_of(args: argparse.Namespace, top: argparse.ArgumentParser) -> str:
    if args.device == "cuda" and not torch.cuda.is_available():
        top.error("--device cuda: torch sees no CUDA device here; --device cpu --quick shows that the tool runs")
    return args.device or ("cuda" if torch.cuda.is_available() else "cpu")


def bench(args: argparse.Namespace, top: argparse.ArgumentParser) -> int:
    start = time.monotonic()
    compare = tuple(part for part in args.compare.split(",") if part)
    unknown = sorted(set(compare) - set(COMPARE))
    if unknown:
        top.error(f"--compare {', '.join(unknown)}: valid are {', '.join(COMPARE)}")
    load_registry()
    try:
        cases = select(COMMANDS[args.action], args.pattern)
    except ValueError as error:
        top.error(str(error))
    dtype = getattr(torch, args.dtype)
    options = Options(device_of(args, top), args.quick, compare, dtype, start + args.budget)
    if getattr(args, "what", None):
        options = replace(options, passes=(args.what,))
    out = args.out or (None if args.quick else machine.RECORDS)
    return execute(cases, options, command_of(args), out, args.add)


def command_of(args: argparse.Namespace) -> str:
    """The command without what hangs on the machine and not on the figures."""
    words = ["python", "-m", "tools.bench", args.action, *([args.pattern] if args.pattern != "*" else [])]
    words += ["--compare", args.compare, "--dtype", args.dtype]
    words += [*(["--pass", args.what] if getattr(args, "what", None) else []), *(["--quick"] if args.quick else [])]
    return shlex.join(words)


def write_page(args: argparse.Namespace, top: argparse.ArgumentParser) -> int:
    try:
        records = machine.load(args.records)
    except ValueError as error:
        top.error(str(error))
    text = report.render(records)
    if args.check:
        if not args.page.is_file() or args.page.read_text(encoding="utf-8") != text:
            print(f"{args.page.name} does not follow from {args.records}; run: python -m tools.bench report")
            return 1
        return 0
    args.page.write_text(text, encoding="utf-8")
    print(f"wrote {args.page.name} from {len(records)} records")
    return 0


def main(argv: list[str] | None = None) -> int:
    top = parser()
    args = top.parse_args(argv)
    if args.action == "report":
        return write_page(args, top)
    if args.action == "list":
        load_registry()
        for kind in KINDS:
            print(f"{kind}:", *(f"  {case.name:<34}{case.title}" for case in select((kind,))), sep="\n")
        return 0
    if args.action == "profile":
        from tools.bench.profiling import profile

        load_registry()
        try:
            return profile(args.network, device_of(args, top), args.mode, args.side, args.what, args.quick, args.top)
        except ValueError as error:
            top.error(str(error))
    return bench(args, top)


if __name__ == "__main__":
    sys.exit(main())
