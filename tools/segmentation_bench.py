"""Segmentation networks beside those of segmentation_models_pytorch, trained by one program with one budget.

python tools/segmentation_bench.py run --data DIR [--weights FILE] [--jobs 6] [--device cuda] [--until S] RUN...
python tools/segmentation_bench.py best --data DIR  print our network with the highest validation mIoU
python tools/segmentation_bench.py page [--check]   write recipes/SEGMENTATION.md from recipes/results/segmentation/

A RUN is NAME[+OPTION=VALUE...][/BACKBONE][@SEED]: NAME a head of ours, or smp.ARCH for a peer (smp.unet, smp.fpn, ...;
the package segmentation_models_pytorch is needed for these alone). An option is the head's, or the task's where that
has one of the name. The encoder tf_efficientnet_lite0 starts from FILE where one is given, every other one from random
weights. For instance:

    run --data camvid --weights lite0.safetensors fpn segformer+embed_dim=128 segformer@1 smp.segformer
    run --data camvid fpn/zoo_shvit_s2 smp.unet smp.unet/resnet34

DIR is camvid or membrane, unpacked; the program of a folder is in PROGRAMS by its name (--program NAME). All of it is
the same for every network: images, augmentation, their order, loss unless an option says otherwise, optimizer,
schedule, epochs, precision, and the weights that are judged, those of the last epoch. Test images are looked at once,
at the end.

Every run is a process of its own and writes its own record when it is done; --jobs of them share the device. Speed is
measured afterwards, one network at a time. The same command again goes on where it was stopped: what has a record is
not trained once more. With --until S no run begins later than S seconds after the start, so that a machine lent for
minutes is given back with whole records.

The page is made by these commands, from DIR/camvid, DIR/membrane and FILE, on one GPU with 16 CPU cores. The second
takes the best of our networks that start with weights, by validation, and the strongest peer, to three seeds:

    bench() { python tools/segmentation_bench.py run --device cuda --jobs 6 --weights FILE "$@"; }
    bench --data DIR/camvid fpn/zoo_flatten_swin_tiny fpn/zoo_uniformer_small fpn/zoo_halonet26t \\
        fpn/zoo_lambda_resnet26t fpn/zoo_vit_small_cb_patch16_224 fpn/zoo_shvit_s2 smp.unet/resnet34 \\
        macmd upernet upernet+deep_supervision=true fpn segformer segformer+embed_dim=512 \\
        smp.segformer smp.fpn smp.deeplabv3plus smp.unet
    best=$(python tools/segmentation_bench.py best --data DIR/camvid)
    bench --data DIR/camvid "$best@1" "$best@2" smp.segformer@1 smp.segformer@2
    bench --data DIR/membrane macmd smp.unet macmd@1 smp.unet@1 macmd@2 smp.unet@2
    python tools/segmentation_bench.py page
"""

import argparse
import json
import math
import os
import shlex
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor, nn

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # zoo need not be installed

from tools.anomaly_record import hardware, versions  # noqa: E402
from tools.segmentation_page import STARTS, page  # noqa: E402

RECORDS = ROOT / "recipes" / "results" / "segmentation"
PAGE = ROOT / "recipes" / "SEGMENTATION.md"
ENCODER = "tf_efficientnet_lite0"
TASK_OPTIONS = ("loss", "loss_weights", "class_weights", "label_smoothing", "lr", "weight_decay")

# Those of recipes/segmentation/{camvid,membrane}.yaml.
PROGRAMS: dict[str, dict[str, Any]] = {
    "camvid": {
        "epochs": 60,
        "eval_shape": [360, 480],
        "data": {"crop_size": (320, 448), "batch_size": 16, "scale": (0.67, 2.0), "hflip": 0.5},
        "task": {"loss": "cross_entropy", "lr": 1e-3, "weight_decay": 0.01, "warmup_epochs": 6},
    },
    "membrane": {
        "epochs": 200,
        "eval_shape": [512, 512],
        "data": {
            "crop_size": 256,
            "batch_size": 8,
            "scale": (0.8, 1.25),
            "hflip": 0.5,
            "vflip": 0.5,
            "rotate": 20.0,
            "brightness": 0.2,
            "contrast": 0.2,
        },
        "task": {
            "loss": "ce_dice",
            "lr": 1e-3,
            "weight_decay": 0.01,
            "warmup_epochs": 20,
            "metrics": ["boundary_f1"],
        },
    },
}


@dataclass(frozen=True)
class Run:
    """One training: `network` is all of its text but the seed."""

    name: str
    options: tuple[tuple[str, Any], ...]
    backbone: str
    seed: int

    @classmethod
    def of(cls, text: str) -> "Run":
        """Raises SystemExit where the text is no RUN."""
        network, _, seed = text.partition("@")
        first, _, backbone = network.partition("/")
        name, *options = first.split("+")
        pairs = [option.partition("=") for option in options]
        if not name or not all(key and sign for key, sign, _ in pairs) or not (seed or "0").isdecimal():
            raise SystemExit(f"{text!r} is no run: write NAME[+OPTION=VALUE...][/BACKBONE][@SEED]")
        values = tuple((key, yaml.safe_load(value)) for key, _, value in pairs)
        return cls(name, values, backbone or ENCODER, int(seed or 0))

    @property
    def network(self) -> str:
        options = "".join(f"+{key}={json.dumps(value).replace(' ', '')}" for key, value in self.options)
        return f"{self.name}{options}/{self.backbone}"

    def file(self, program: str, weights: bool) -> str:
        """Name of the record."""
        start = ".in1k" if weights and self.backbone == ENCODER else ""
        safe = "".join(c if c.isalnum() or c in "._-+=" else "." for c in self.network)
        return f"{program}.{safe}{start}.s{self.seed}.json"


class Peer(nn.Module):
    """A network of segmentation_models_pytorch in the place of ours: images are padded to multiples of 32."""

    any_size = True

    def __init__(self, arch: str, backbone: str, num_classes: int, weights: str | None, options: dict[str, Any]):
        super().__init__()
        import segmentation_models_pytorch as smp
        import timm

        self.network = smp.create_model(
            arch, encoder_name=f"tu-{backbone}", encoder_weights=None, in_channels=3, classes=num_classes, **options
        )
        if weights is not None:
            same = timm.create_model(
                backbone, features_only=True, pretrained=True, pretrained_cfg_overlay={"file": weights}
            )
            self.network.encoder.model.load_state_dict(same.state_dict())

    def forward(self, images: Tensor) -> Tensor:
        height, width = images.shape[-2:]
        below, right = -height % 32, -width % 32
        if below or right:
            images = nn.functional.pad(images, (0, right, 0, below), mode="replicate")
        return self.network(images)[..., :height, :width]


def task_of(run: Run, program: dict[str, Any], class_names: list[str], size: Any, weights: str | None) -> Any:
    """The task of a run; a peer takes the place of our network in it."""
    from zoo.tasks import Segmentation

    weights = weights if run.backbone == ENCODER else None
    options = dict(run.options)
    own = {key: options.pop(key) for key in TASK_OPTIONS if key in options}
    common = {"class_names": class_names, "img_size": size, "backbone": run.backbone, "pretrained": weights or False}
    common |= program["task"] | own
    peer = run.name.startswith("smp.")
    task = Segmentation("fpn" if peer else run.name, head_options=None if peer else options, **common)
    if peer:
        torch.manual_seed(run.seed)
        task.segmenter = Peer(run.name.removeprefix("smp."), run.backbone, len(class_names), weights, options)
    return task


def train(run: Run, args: argparse.Namespace) -> dict[str, Any]:
    """Trains one network: its record."""
    from lightning.pytorch import Trainer, seed_everything

    from zoo.data import Segmentation as Data

    program = PROGRAMS[args.program]
    epochs = args.epochs or program["epochs"]
    seed_everything(run.seed, verbose=False)
    cuda = args.device == "cuda"
    data = Data(args.data, num_workers=args.workers, preload=True, seed=run.seed, **program["data"])
    task = task_of(run, program, data.class_names, data.hparams.crop_size, args.weights)
    task.reports = list  # the record is this program's
    trainer = Trainer(
        accelerator="gpu" if cuda else "cpu",
        devices=1,
        precision="bf16-mixed" if cuda else "32-true",
        max_epochs=epochs,
        check_val_every_n_epoch=epochs,
        num_sanity_val_steps=0,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        logger=False,
        default_root_dir=args.out,
    )
    start = time.perf_counter()
    trainer.fit(task, datamodule=data)
    seconds = time.perf_counter() - start
    measured = {"val": _measured(trainer, task, "val")}
    if data.has_test:
        trainer.test(task, datamodule=data, verbose=False)
        measured["test"] = _measured(trainer, task, "test")
    return {
        "program": args.program,
        "network": run.network,
        "name": run.name,
        "options": dict(run.options),
        "backbone": run.backbone,
        "start": "in1k" if args.weights and run.backbone == ENCODER else "random",
        "seed": run.seed,
        "epochs": epochs,
        "training": {**program["data"], **program["task"], "precision": str(trainer.precision)},
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "hardware": hardware(args.device),
        "versions": versions() | _versions_of("lightning", "albumentations", "segmentation_models_pytorch"),
        "jobs": args.jobs,
        "fit_seconds": round(seconds, 1),
        **cost(run, args.program, data.class_names),
        **measured,
    }


def _versions_of(*packages: str) -> dict[str, str]:
    """Of those that are installed."""
    found = {}
    for package in packages:
        with suppress(PackageNotFoundError):
            found[package] = version(package)
    return found


def _measured(trainer: Any, task: Any, stage: str) -> dict[str, Any]:
    values, by_class = task.measures[stage].compute()
    names = task.class_names
    return {name: round(value, 4) for name, value in values.items()} | {
        "per_class": {
            # JSON knows no NaN, which a class has that is nowhere.
            name: {k: round(v[i], 4) for k, v in by_class.items() if not math.isnan(v[i])}
            for i, name in enumerate(names)
        }
    }


def cost(run: Run, program: str, class_names: list[str]) -> dict[str, float]:
    """Million parameters, and billion multiply-adds of one image of the validation's size."""
    from zoo.catalogue import count_macs

    shape = PROGRAMS[program]["eval_shape"]
    network = task_of(run, PROGRAMS[program], class_names, shape, None).segmenter.eval()
    macs = count_macs(network, (3, *shape))
    assert macs is not None
    millions = sum(p.numel() for p in network.parameters()) / 1e6
    return {"parameters_m": round(millions, 2), "gmacs": round(macs / 1e9, 2)}


def speed(runs: list[Run], args: argparse.Namespace) -> None:
    """Adds images/s of inference to the records of these runs: batches of 16 on a GPU, of 1 on a CPU."""
    measured: dict[str, float] = {}
    for run in runs:
        path = Path(args.out) / run.file(args.program, bool(args.weights))
        if not path.is_file():
            continue
        record = json.loads(path.read_text())
        if run.network not in measured:
            measured[run.network] = round(_images_per_second(run, args, list(record["val"]["per_class"])), 1)
        _write(path, record | {"images_per_second": measured[run.network]})


def _images_per_second(run: Run, args: argparse.Namespace, class_names: list[str], seconds: float = 1.5) -> float:
    shape = PROGRAMS[args.program]["eval_shape"]
    cuda = args.device == "cuda"
    network = task_of(run, PROGRAMS[args.program], class_names, shape, None).segmenter.eval().to(args.device)
    layout = torch.channels_last if cuda else torch.contiguous_format
    network.to(memory_format=layout)
    images = torch.randn(16 if cuda else 1, 3, *shape, device=args.device).contiguous(memory_format=layout)
    with torch.inference_mode(), torch.autocast(args.device, torch.bfloat16, enabled=cuda):
        for _ in range(5):
            network(images)
        done, start = 0, _now(args.device)
        while (elapsed := _now(args.device) - start) < seconds:
            for _ in range(4):
                network(images)
            done += 4 * len(images)
    return done / elapsed


def _now(device: str) -> float:
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def run_all(args: argparse.Namespace) -> int:
    """Trains every run that has no record yet, then measures speed; the number of runs that failed or are left."""
    runs = [Run.of(text) for text in dict.fromkeys(args.runs)]
    out = Path(args.out)
    out.mkdir(parents=True, exist_ok=True)  # for the logs of those that fail
    start = time.monotonic()
    common = ["--program", args.program, "--data", args.data, "--out", args.out, "--device", args.device]
    common += [*(["--weights", args.weights] if args.weights else []), "--jobs", str(args.jobs)]
    more = ["--workers", str(args.workers), *(["--epochs", str(args.epochs)] if args.epochs else [])]
    # Threads of one process that others share the cores with only take turns.
    threads = max(1, (os.cpu_count() or 1) // (args.jobs * (1 + args.workers)))
    environment = os.environ | {"OMP_NUM_THREADS": str(threads), "NO_ALBUMENTATIONS_UPDATE": "1"}

    def one(text: str) -> bool:
        path = out / Run.of(text).file(args.program, bool(args.weights))
        if path.is_file() and not args.again:
            print(f"{text}: {path.name} is there", flush=True)
            return True
        if args.until is not None and time.monotonic() - start > args.until:
            print(f"{text}: left for another time", flush=True)
            return False
        command = [sys.executable, __file__, "one", *common, *more, text]
        done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
        last = (done.stdout if done.returncode == 0 else done.stderr).strip().splitlines()[-1:] or ["no output"]
        print(f"[{time.monotonic() - start:5.0f} s] {text}: {last[0]}", flush=True)
        if done.returncode:
            (out / f"{path.stem}.log").write_text(done.stdout + done.stderr)
        return done.returncode == 0

    with ThreadPoolExecutor(args.jobs) as pool:
        succeeded = list(pool.map(one, dict.fromkeys(args.runs)))
    if args.speed:
        speed(runs, args)
    return succeeded.count(False)


def best(args: argparse.Namespace) -> str:
    """The text of our network whose first seed has the highest mIoU on validation images.

    Raises:
        SystemExit: there is no record of one.
    """
    records = [json.loads(path.read_text()) for path in sorted(Path(args.out).glob("*.json"))]
    ours = [
        record
        for record in records
        if (record["program"], record["start"], record["seed"]) == (args.program, args.start, 0)
        and not record["name"].startswith("smp.")
    ]
    if not ours:
        raise SystemExit(f"{args.out} holds no record of a network of ours of {args.program} with seed 0")
    return max(ours, key=lambda record: record["val"]["miou"])["network"]


def train_one(args: argparse.Namespace) -> None:
    """One run, in a process of its own."""
    run = Run.of(args.runs[0])
    record = train(run, args)
    # Without where files lie on this machine.
    options = ["--data", args.program, *(["--weights", "efficientnet_lite0_in1k.safetensors"] if args.weights else [])]
    options += ["--device", args.device, "--jobs", str(args.jobs)]
    options += ["--epochs", str(args.epochs)] if args.epochs else []
    record["command"] = shlex.join(["python", "tools/segmentation_bench.py", "run", *options, args.runs[0]])
    _write(Path(args.out) / run.file(args.program, bool(args.weights)), record)
    shown = ", ".join(f"{stage} mIoU {record[stage]['miou']:.4f}" for stage in ("val", "test") if stage in record)
    print(f"{shown}; {record['fit_seconds']} s")


def _write(path: Path, record: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".part")
    partial.write_text(json.dumps(record, indent=1) + "\n")
    partial.replace(path)


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = top.add_subparsers(dest="action", required=True)
    for name, about in (("run", "train networks"), ("one", "train one in this process; run calls it")):
        command = commands.add_parser(name, help=about)
        command.add_argument("runs", nargs="+", metavar="RUN")
        command.add_argument("--data", required=True, help="folder of unpacked camvid or membrane")
        command.add_argument("--program", choices=PROGRAMS, help="default: the name of the data's folder")
        command.add_argument("--weights", help=f"weights file of {ENCODER}")
        command.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
        command.add_argument("--jobs", type=int, default=1, help="runs at a time")
        command.add_argument("--workers", type=int, default=2, help="processes of a run that change images")
        command.add_argument("--epochs", type=int, help="instead of the program's, to try things out")
        command.add_argument("--out", default=str(RECORDS), help="folder of the records")
        command.add_argument("--until", type=float, metavar="S", help="begin no run later than after S seconds")
        command.add_argument("--again", action="store_true", help="train also what has a record")
        command.add_argument("--no-speed", dest="speed", action="store_false", help="leave the measuring of speed out")
    chosen = commands.add_parser("best", help="print our network with the highest validation mIoU")
    chosen.add_argument("--data", required=True, help="as of run")
    chosen.add_argument("--program", choices=PROGRAMS, help="as of run")
    chosen.add_argument("--start", choices=STARTS, default="in1k", help="of the encoder")
    chosen.add_argument("--out", default=str(RECORDS), help="folder of the records")
    written = commands.add_parser("page")
    written.add_argument("--check", action="store_true", help="write nothing; exit 1 if the page is out of date")
    return top


def main(argv: list[str] | None = None) -> int:
    args = parser().parse_args(argv)
    if args.action == "page":
        text = page([json.loads(path.read_text()) for path in sorted(RECORDS.glob("*.json"))])
        if args.check:
            return int(not PAGE.is_file() or PAGE.read_text() != text)
        PAGE.write_text(text)
        return 0
    args.program = args.program or Path(args.data).name
    if args.program not in PROGRAMS:
        raise SystemExit(f"--program is one of {', '.join(PROGRAMS)}; {args.data} is named like none of them")
    if args.action == "best":
        print(best(args))
        return 0
    if args.action == "one":
        train_one(args)
        return 0
    return run_all(args)


if __name__ == "__main__":
    sys.exit(main())
