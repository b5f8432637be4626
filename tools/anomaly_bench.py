"""Detectors of anomalies on one dataset: choose a configuration on held-out good images, then measure it on test.

python tools/anomaly_bench.py run CONFIG --data DIR --weights FILE [--split val] [--normals 300] [--device cuda]
python tools/anomaly_bench.py list             the configurations
python tools/anomaly_bench.py page [--check]   write recipes/ANOMALY.md from the records in recipes/results/anomaly/

DIR is unpacked magnetic_tile: tile/{train,test,ground_truth} and splits.csv. On `val` a detector learns from most
groups of good images (photos of one tile are one group) and is judged on the others, as they are and with drawn
defects: no test image is opened. On `test` it learns from all good images, or from --normals of them.

Maps are compared with masks on a grid of 224 x 224 over the image, whatever size the network saw, and on `test` also at
the images' own sizes.
"""

import argparse
import csv
import hashlib
import json
import os
import random
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # zoo need not be installed

from tools.anomaly_page import LIMITS, page  # noqa: E402
from tools.anomaly_record import hardware, memory, public, versions  # noqa: E402

RECORDS = ROOT / "recipes" / "results" / "anomaly"
PAGE = ROOT / "recipes" / "ANOMALY.md"
BACKBONE = "tf_efficientnet_lite0"
GRID = (224, 224)
HELD_OUT = 16  # groups of good images
TRAINING = {"epochs": 10, "lr": 1e-3, "batch_size": 8}  # those of recipes/anomaly/l2bt.yaml

# Levels of the backbone: 1 has reduction 4, 2 has 8, 3 has 16, 4 has 32. `memory_bank_224` is PatchCore as published,
# but for the weight of the score, which changed nothing on val.
CONFIGS: dict[str, dict[str, Any]] = {
    "memory_bank_224": {"method": "memory_bank", "layers": [2, 3], "img_size": 224, "head_options": {}},
    "memory_bank_448_coarse": {
        "method": "memory_bank",
        "layers": [2, 3, 4],
        "img_size": 448,
        # A small bank, of few places: on val enough.
        "head_options": {"bank_size": 2000, "max_places": 20_000},
    },
    "l2bt_224": {"method": "l2bt", "layers": [2, 3], "img_size": 224, "head_options": {}},
    "l2bt_448": {"method": "l2bt", "layers": [2, 3], "img_size": 448, "head_options": {}},
    "l2bt_448_coarse": {"method": "l2bt", "layers": [3, 4], "img_size": 448, "head_options": {}},
}


def good_images(data: Path) -> tuple[list[str], list[str]]:
    """File names of the good images of train: those to learn from, and those of the groups held out."""
    with open(data / "splits.csv", newline="", encoding="utf-8") as file:
        rows = [row for row in csv.DictReader(file) if row["split"] == "train/good"]
    groups = sorted({row["group"] for row in rows}, key=lambda g: hashlib.sha256(f"val{g}".encode()).hexdigest())
    held = set(groups[:HELD_OUT])
    names = [sorted(row["file"] for row in rows if (row["group"] in held) == out) for out in (False, True)]
    return names[0], names[1]


def view(data: Path, folder: Path, split: str, normals: int | None, seed: int) -> int:
    """Lays out what a run may see as links in `folder`; returns the number of images to learn from."""
    tile = (data / "tile").resolve()
    learned, held = good_images(data)
    if split == "test":
        learned = sorted(learned + held)
        for name in ("test", "ground_truth"):
            (folder / name).symlink_to(tile / name)
    if normals is not None:
        learned = sorted(random.Random(seed).sample(learned, normals))
    for part, names in (("train", learned), ("validation", held)):
        (folder / part / "good").mkdir(parents=True)
        for name in names:
            (folder / part / "good" / name).symlink_to(tile / "train" / "good" / name)
    return len(learned)


class Judge:
    """Image and pixel metrics of one set of images."""

    def __init__(self) -> None:
        from zoo.metrics import AUPRO, ImageAUROC, PixelAUPR, PixelAUROC

        self.images, self.count = ImageAUROC(), 0
        self.pixels = {"pixel_auroc": PixelAUROC(), "pixel_aupr": PixelAUPR()}
        self.regions = AUPRO(limits=LIMITS)

    def update(self, score: Tensor, anomaly_map: Tensor, mask: Tensor) -> None:
        """score (1,), map float (1, H, W), mask bool (1, H, W) of one image."""
        self.count += 1
        self.images.update(score, mask.flatten(1).any(1))
        for metric in (*self.pixels.values(), self.regions):
            metric.update(anomaly_map, mask)

    def compute(self) -> dict[str, Any]:
        values = {"image_auroc": self.images.compute()} | {k: m.compute() for k, m in self.pixels.items()}
        regions = self.regions.compute()
        values |= {name: regions[name] for name in regions}
        return {"images": self.count} | {name: round(float(value), 4) for name, value in values.items()}


def data_module(config: dict[str, Any], folder: Path, seed: int) -> Any:
    from zoo.data import AnomalyDetection

    return AnomalyDetection(
        str(folder),
        layout="mvtec",
        img_size=config["img_size"],
        batch_size=TRAINING["batch_size"],
        num_workers=0,
        seed=seed,
    )


def detector_of(config: dict[str, Any], weights: str) -> Any:
    from zoo.heads import create_detector

    return create_detector(
        config["method"],
        BACKBONE,
        layers=config["layers"],
        img_size=config["img_size"],
        pretrained=weights,
        **config["head_options"],
    )


def normalised(detector: Any, images: Tensor, device: str) -> Tensor:
    """uint8 (B, C, H, W) as the teacher wants them."""
    mean, std = (torch.tensor(v, device=device).view(-1, 1, 1) for v in (detector.mean, detector.std))
    return (images.to(device).float() / 255 - mean) / std


def fit(detector: Any, loader: Any, device: str, seed: int) -> None:
    """Fills a bank, or trains students. The teacher is frozen and images do not change: it looks at each once."""
    if not detector.head.needs_gradient:
        for batch in loader:
            detector.update(normalised(detector, batch["image"], device))
        detector.finalize(lambda done, total: _say(f"coreset {done}/{total}"))
        return
    seen = [detector.features(normalised(detector, batch["image"], device)) for batch in loader]
    features = [torch.cat(maps).half().cpu() for maps in zip(*seen, strict=True)]
    optimizer = torch.optim.Adam(detector.head.parameters(), lr=TRAINING["lr"])
    steps = TRAINING["epochs"] * -(-len(features[0]) // TRAINING["batch_size"])
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    generator = torch.Generator().manual_seed(seed)
    detector.head.train()
    for epoch in range(TRAINING["epochs"]):
        total = 0.0
        for index in torch.randperm(len(features[0]), generator=generator).split(TRAINING["batch_size"]):
            loss = detector.head.loss([maps[index].to(device).float() for maps in features])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            total += float(loss.detach()) * len(index)
        _say(f"epoch {epoch + 1}: loss {total / len(features[0]):.4f}")
    detector.head.eval()
    detector.finalize()


def answers(
    detector: Any, loader: Any, device: str, good: bool = True
) -> Iterator[tuple[str, str, Tensor, Tensor, Tensor]]:
    """(path, kind, score (1,), map (1, 1, h, w), mask bool (1, h, w)) of every image, or without `good` of those with a
    defect."""
    for batch in loader:
        wanted = [i for i, label in enumerate(batch["label"].tolist()) if good or label]
        if not wanted:
            continue
        with torch.no_grad():
            scores, maps = (out.cpu() for out in detector(normalised(detector, batch["image"][wanted], device)))
        for place, i in enumerate(wanted):
            one = slice(place, place + 1)
            yield batch["path"][i], batch["kind"][i], scores[one], maps[one], batch["mask"][i]


def on_grid(anomaly_map: Tensor, size: tuple[int, int]) -> Tensor:
    """(1, 1, h, w) -> (1, *size), bilinear, averaging where it shrinks."""
    if tuple(anomaly_map.shape[-2:]) != size:
        anomaly_map = F.interpolate(anomaly_map, size, mode="bilinear", antialias=True)
    return anomaly_map[:, 0]


def judge_val(detector: Any, config: dict[str, Any], folder: Path, device: str, drawings: int) -> dict[str, Any]:
    """Metrics over the held-out good images and `drawings` drawn defects on each."""
    from zoo.data.masks import fit_mask

    judge = Judge()
    for seed in range(drawings):
        loader = data_module(config, folder, seed).val_dataloader()
        for _, _, score, inner, mask in answers(detector, loader, device, good=seed == 0):
            judge.update(score, on_grid(inner, GRID), torch.from_numpy(fit_mask(mask[0].numpy(), GRID))[None])
    return {"all": judge.compute()}


def judge_test(detector: Any, config: dict[str, Any], folder: Path, device: str, without: str) -> dict[str, Any]:
    """Metrics over the test images: all kinds and all but one, on the common grid and at the images' own sizes."""
    from zoo.data.masks import fit_mask, read_mask, size_of

    module = data_module(config, folder, 0)
    photos = {photo.path: photo for photo in module._open().test()}
    parts = {"all": None, f"without_{without}": without}
    judges = {name + end: Judge() for name in parts for end in ("", "_own_size")}
    for path, kind, score, inner, _ in answers(detector, module.test_dataloader(), device):
        size = size_of(path)
        drawn = photos[path].mask
        mask = torch.zeros(size, dtype=torch.bool).numpy() if drawn is None else read_mask(drawn, path, size)
        for end, grid in (("", GRID), ("_own_size", size)):
            shown = on_grid(inner, grid), torch.from_numpy(fit_mask(mask, grid).copy())[None]
            for name, left_out in parts.items():
                if kind != left_out:
                    judges[name + end].update(score, *shown)
    return {name: judge.compute() for name, judge in judges.items()}


def speed(path: Path, weights: str, device: str, count: int = 30) -> dict[str, Any]:
    """Time and memory of one image at a time, in a process that has done nothing else. 1 MB = 1e6 bytes."""
    import zoo.heads  # noqa: F401  (what importing takes is not the detector's)

    saved = torch.load(path, weights_only=True)
    before = memory("VmRSS")
    detector = detector_of(saved["config"], weights).eval()
    detector.load_state_dict(saved["state"])
    detector.to(device)
    size = detector.img_size
    images = [normalised(detector, torch.randint(0, 256, (1, 3, *size), dtype=torch.uint8), device) for _ in range(4)]
    wall, busy = [], []
    with torch.no_grad():
        for i in range(count + 5):
            start, used = time.perf_counter(), time.process_time()
            detector(images[i % 4])
            if device == "cuda":
                torch.cuda.synchronize()
            wall.append(time.perf_counter() - start)
            busy.append(time.process_time() - used)
    found = {"ms": 1e3 * statistics.median(wall[5:]), "threads": torch.get_num_threads()}
    if device == "cuda":
        found["peak_mb"] = torch.cuda.max_memory_allocated() / 1e6
    else:
        found |= {"cpu_ms": 1e3 * statistics.median(busy[5:]), "peak_mb": memory("VmHWM") - before}
    return {name: round(value, 1) for name, value in found.items()}


def run(args: argparse.Namespace) -> dict[str, Any]:
    """One configuration, measured: its record."""
    config = CONFIGS[args.config]
    torch.manual_seed(args.seed)
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "view"
        folder.mkdir()
        normals = view(Path(args.data), folder, args.split, args.normals, args.seed)
        detector = detector_of(config, args.weights).to(args.device).eval()
        start, used = time.perf_counter(), time.process_time()
        fit(detector, data_module(config, folder, args.seed).train_dataloader(), args.device, args.seed)
        took = {"fit_seconds": time.perf_counter() - start, "fit_cpu_seconds": time.process_time() - used}
        if args.split == "val":
            measured = judge_val(detector, config, folder, args.device, args.drawings)
        else:
            measured = judge_test(detector, config, folder, args.device, args.without)
        saved = Path(scratch) / "detector.pt"
        torch.save({"config": config, "state": detector.state_dict()}, saved)
        own = [sys.executable, __file__, "speed", str(saved), "--weights", args.weights, "--device", args.device]
        timed = subprocess.run(
            [*own, "--threads", str(args.threads)], capture_output=True, text=True, check=True, env=os.environ
        )
    return {
        "command": shlex.join(["python", "tools/anomaly_bench.py", *public(args, _plain(args.config))]),
        "config": args.config,
        "split": args.split,
        "seed": args.seed,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "hardware": hardware(args.device),
        "versions": versions(),
        "backbone": BACKBONE,
        **config,
        **({"training": TRAINING} if detector.head.needs_gradient else {"bank": list(detector.head.bank.shape)}),
        "normals": normals,
        **{name: round(value, 1) for name, value in took.items()},
        "per_image": json.loads(timed.stdout.splitlines()[-1]),
        args.split: measured,
    }


def _plain(config: str) -> argparse.Namespace:
    """The arguments of `run` with nothing but what must be given."""
    return parser().parse_args(["run", config, "--data", "", "--weights", ""])


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = top.add_subparsers(dest="action", required=True)
    one = commands.add_parser("run")
    one.add_argument("config", choices=CONFIGS)
    one.add_argument("--data", required=True, help="folder of unpacked magnetic_tile")
    one.add_argument("--split", choices=("val", "test"), default="val")
    one.add_argument("--normals", type=int, help="so many good images to learn from, drawn by the seed; default: all")
    one.add_argument("--without", default="uneven", help="the kind that the second table of test leaves out")
    one.add_argument("--drawings", type=int, default=3, help="drawn defects for each held-out image")
    one.add_argument("--seed", type=int, default=0)
    one.add_argument("--out", type=Path, default=RECORDS, help="folder of the records")
    timed = commands.add_parser("speed", help="of a saved detector; run calls it")
    timed.add_argument("detector", type=Path)
    for command in (one, timed):
        command.add_argument("--weights", required=True, help=f"weights file of {BACKBONE}")
        command.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
        command.add_argument("--threads", type=int, default=1)
    commands.add_parser("list")
    written = commands.add_parser("page")
    written.add_argument("--check", action="store_true", help="write nothing; exit 1 if the page is out of date")
    return top


def main(argv: list[str] | None = None) -> int:
    args = parser().parse_args(argv)
    if args.action == "list":
        print("\n".join(f"{name}: {json.dumps(config)}" for name, config in CONFIGS.items()))
        return 0
    if args.action == "page":
        text = page([json.loads(path.read_text()) for path in sorted(RECORDS.glob("*.json"))])
        if args.check:
            return int(not PAGE.is_file() or PAGE.read_text() != text)
        PAGE.write_text(text)
        return 0
    torch.set_num_threads(args.threads)
    if args.action == "speed":
        print(json.dumps(speed(args.detector, args.weights, args.device)))
        return 0
    record = run(args)
    name = f"{args.config}.{record['normals']}.{args.split}.{args.device}" + (f".s{args.seed}" if args.seed else "")
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / f"{name}.json").write_text(json.dumps(record, indent=1) + "\n")
    print(json.dumps({k: record[k] for k in ("config", "normals", "per_image", args.split)}, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
