"""Turn a weights file that pickles more than tensors into safetensors, which can hold nothing else.

python tools/convert_checkpoint.py FILE --trust [--key model_ema] [--output FILE.safetensors]

Such a file can run any code while it is opened, so this asks for --trust: give it only for a file whose origin you
would also run a program from.
"""

import argparse
import pickle
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

# As zoo.backbones reads them; repeated here so that the tool runs without the project.
KEYS = ("state_dict_ema", "model_ema", "state_dict", "model", "module")


def tensors(content: Any, key: str | None = None) -> tuple[str, dict[str, Tensor]]:
    """Where the weights lay in the opened file ("" at its top), and the tensors there.

    Raises:
        ValueError: the file holds no tensors at the place asked for.
    """
    if isinstance(content, torch.nn.Module):
        content = content.state_dict()
    if not isinstance(content, Mapping):
        raise ValueError(f"the file holds a {type(content).__name__}, not a dict of weights")
    if key is None:
        key = next((name for name in KEYS if isinstance(content.get(name), (Mapping, torch.nn.Module))), "")
    if key and key not in content:
        raise ValueError(f"there is no {key!r} in the file; its keys are {', '.join(map(str, list(content)[:20]))}")
    inner = content[key] if key else content
    if isinstance(inner, torch.nn.Module):
        inner = inner.state_dict()
    # Tied weights share memory, which safetensors refuses; every name gets its own copy.
    items = inner.items() if isinstance(inner, Mapping) else ()
    found = {str(name): value.detach().cpu().clone().contiguous() for name, value in items if isinstance(value, Tensor)}
    if not found:
        where = f"under {key!r}" if key else "at its top"
        raise ValueError(f"the file holds no tensors {where}; name the place with --key")
    return key, found


def main(argv: list[str] | None = None) -> int:
    """Returns 0, or 2 with a message where the input is not usable."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path, help="the weights file")
    parser.add_argument("--trust", action="store_true", help="open it although that can run code")
    parser.add_argument("--key", help=f"where the weights lie; default: the first there is of {', '.join(KEYS)}")
    parser.add_argument("--output", type=Path, help="default: FILE with the ending .safetensors")
    args = parser.parse_args(argv)
    output = args.output or args.file.with_suffix(".safetensors")
    if not args.file.is_file():
        return _refuse(f"{args.file} is not there")
    if output.exists():
        return _refuse(f"{output} exists already; name another with --output")
    if not args.trust:
        return _refuse(f"opening {args.file} can run code; if you trust its origin, say so with --trust")
    try:
        key, found = tensors(torch.load(args.file, map_location="cpu", weights_only=False), args.key)
    except (ValueError, RuntimeError, EOFError, ImportError, AttributeError, pickle.UnpicklingError) as error:
        return _refuse(f"{args.file}: {error}")
    save_file(found, output, metadata={"format": "pt"})
    count = sum(value.numel() for value in found.values())
    print(f"wrote {output}: {len(found)} tensors, {count:,} values" + (f", from {key!r}" if key else ""))
    return 0


def _refuse(message: str) -> int:
    print(f"convert_checkpoint: {message}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main())
