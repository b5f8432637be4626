"""The direction of dependency between the rooms, read from every import statement, lazy ones included."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "zoo"

# Room -> rooms it may import besides itself, zoo.errors and zoo.resources. What is missing here fails the test.
ALLOWED = {
    "errors": set(),
    "resources": set(),
    "kernels": set(),
    "layers": {"kernels"},
    "attention": {"layers", "kernels"},
    "backbones": {"layers", "attention", "kernels"},
    "accelerate": {"layers"},
    "features": set(),
    "heads": {"features", "layers", "attention", "kernels"},
    "metrics": set(),
    "data": set(),
    "tasks": {"data", "metrics", "heads", "features", "backbones"},
    "export": {"tasks", "data"},
    "published": set(),
    "catalogue": {"backbones", "attention", "kernels"},
    "commands": {
        *("cli", "catalogue", "published", "tasks", "data", "export"),
        *("attention", "backbones", "heads", "metrics"),
    },
    "cli": {"commands"},
    "__init__": {
        *("accelerate", "attention", "backbones", "kernels"),
        *("data", "export", "features", "heads", "metrics", "tasks"),
    },
}
EVERYWHERE = {"errors", "resources"}
# The core installs without these: rooms that belong to it may not even import them lazily.
EXTRAS = {
    "lightning",
    "pytorch_lightning",
    "jsonargparse",
    "torchmetrics",
    "scipy",
    "albumentations",
    "tensorboard",
    "matplotlib",
    "onnx",
    "onnxscript",
    "onnxruntime",
}
CORE = {"errors", "resources", "kernels", "layers", "attention", "backbones", "accelerate", "features", "heads"}


def files() -> list[Path]:
    return sorted(PACKAGE.rglob("*.py"))


def room_of(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imports(path: Path) -> set[str]:
    """Dotted names of all modules that a file imports, wherever in it; `from zoo import x` counts as zoo.x."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import; the project writes its own names in full"
            module = node.module or ""
            found |= {f"zoo.{alias.name}" for alias in node.names} if module == "zoo" else {module}
        elif is_import_call(node):
            found.add(node.args[0].value)
    return found


def is_import_call(node: ast.AST) -> bool:
    if not (isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant)):
        return False
    name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
    return name in ("import_module", "__import__") and isinstance(node.args[0].value, str)


def violations(path: Path, room: str, names: set[str]) -> list[str]:
    allowed = ALLOWED[room] | EVERYWHERE | {room}
    public = {"__version__", "create_attention", "list_attentions", "attention_spec", "register_attention"}
    found = []
    for name in sorted(names):
        top, _, rest = name.partition(".")
        target = rest.partition(".")[0]
        if top == "zoo" and target and target not in public and target not in allowed:
            found.append(f"{path.relative_to(ROOT)} ({room}) imports {name}")
        if room in CORE and top in EXTRAS:
            found.append(f"{path.relative_to(ROOT)} ({room}) imports {top}, which the core does not install")
    return found


@pytest.mark.parametrize("path", files(), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_direction_of_dependency(path):
    room = room_of(path)
    assert room in ALLOWED, f"new room {room!r}: say in ALLOWED what it may import"
    assert violations(path, room, imports(path)) == []


def test_the_walker_sees_what_it_must_refuse(tmp_path):
    source = tmp_path / "bad.py"
    source.write_text(
        "def f():\n    import lightning\n    from zoo import tasks\n    importlib.import_module('zoo.export')\n"
    )
    names = imports(source)
    assert names == {"lightning", "zoo.tasks", "zoo.export"}
    assert len(violations(PACKAGE / "bad.py", "attention", names)) == 3


def test_kernels_import_torch_alone():
    import sys

    for path in sorted((PACKAGE / "kernels").rglob("*.py")):
        tops = {name.partition(".")[0] for name in imports(path)} - set(sys.stdlib_module_names)
        triton = {"triton"} if "triton" in path.name else set()
        assert tops <= {"torch", "zoo"} | triton, path


def test_predictor_stands_alone():
    tops = {name.partition(".")[0] for name in imports(PACKAGE / "export" / "predictor.py")}
    assert not tops & {"zoo", "torch", "torchvision", "timm", "lightning"}


def test_recipes_and_data_hold_no_python():
    assert [str(p) for folder in ("recipes", "data") for p in (ROOT / folder).rglob("*.py")] == []
