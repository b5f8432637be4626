"""`zoo export`: a checkpoint as one verified ONNX file, with the program that runs it where asked."""

from pathlib import Path

from zoo.commands.arguments import Parser, need
from zoo.errors import UsageError

_ABOUT = """Writes a run's network as one ONNX file: uint8 images in, normalisation inside. A classifier gives logits; a
detector of defects takes images of any size and gives a score and a map, with its threshold in the metadata; a
segmentation network gives logits for every pixel. The file appears only after onnxruntime has computed with it what
torch computes."""


def run(command: str, arguments: list[str]) -> None:
    """Runs `zoo export`."""
    parser = Parser(command, "RUN_OR_CKPT [MODEL.onnx] [--bundle DIR] [--half]", _ABOUT)
    parser.add_argument("checkpoint", metavar="RUN_OR_CKPT", help="name or folder of a run (its best), or a checkpoint")
    parser.add_argument("path", nargs="?", metavar="MODEL.onnx", help="the file to write; DIR/model.onnx with --bundle")
    parser.add_argument("--bundle", metavar="DIR", help="also fill DIR with all that running it takes")
    parser.add_argument("--half", action="store_true", help="store weights as 16-bit numbers; prints what that costs")
    options = parser.parse_all(arguments)
    if options.path is None and options.bundle is None:
        raise UsageError(f"where to? zoo export {options.checkpoint} model.onnx")
    need("train", "lightning", "torchmetrics")
    need("export", "onnx", "onnxscript", "onnxruntime")

    from zoo.commands.quiet import quiet
    from zoo.commands.runs import find_checkpoint
    from zoo.export import bundle, to_onnx

    quiet()
    checkpoint = find_checkpoint(options.checkpoint)
    path = Path(options.path) if options.path else Path(options.bundle) / "model.onnx"
    if options.path is None:
        path.parent.mkdir(parents=True, exist_ok=True)
    print(f"from      {checkpoint}")
    print(f"written   {to_onnx(checkpoint, path, half=options.half)}")
    if options.bundle is None:
        print(f"next      zoo predict {path} IMAGES...")
    else:
        folder = bundle(path, options.bundle)
        print(f"bundle    {folder}: pip install -r {folder / 'requirements.txt'}")
        print(f"next      python {folder / 'predictor.py'} {folder / path.name} IMAGES...")
