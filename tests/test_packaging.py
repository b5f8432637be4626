"""What is installed: a wheel and an editable checkout both find recipes and samples, and the core needs no extras."""

import os
import site
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
EXTRAS = (
    "lightning",
    "pytorch_lightning",
    "jsonargparse",
    "rich",
    "torchmetrics",
    "albumentations",
    "tensorboard",
    "matplotlib",
    "onnx",
    "onnxscript",
    "onnxruntime",
    "triton",
)
BLOCK = f"""
import sys
from importlib.machinery import PathFinder
class Without(PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        return None if name.partition(".")[0] in {EXTRAS!r} else super().find_spec(name, path, target)
sys.meta_path[sys.meta_path.index(PathFinder)] = Without
"""
FIND = """
import zoo, zoo.resources as r
print(zoo.__file__)
print(r.find_recipe("quickstart"))
print(next(p for p in sorted(r.samples_dir().joinpath("classification").rglob("*")) if p.is_file()))
"""


def python(executable: Path | str, *arguments: str, cwd: Path) -> subprocess.CompletedProcess:
    environment = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "PYTHONHOME")}
    return subprocess.run([str(executable), *arguments], cwd=cwd, env=environment, capture_output=True, text=True)


def block_and_run(source: str, cwd: Path) -> subprocess.CompletedProcess:
    return python(sys.executable, "-c", f"{BLOCK}\nsys.path.insert(0, {str(ROOT)!r})\n{source}", cwd=cwd)


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    pytest.importorskip("hatchling", reason="hatchling comes with the dev extra")
    folder = tmp_path_factory.mktemp("wheel")
    done = python(sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(folder), cwd=ROOT)
    assert done.returncode == 0, done.stderr
    return next(folder.glob("*.whl"))


def install(what: list[str], folder: Path) -> Path:
    """A new environment with `what` in it and everything else that this one has; returns its Python."""
    made = python(
        sys.executable, "-m", "venv", "--without-pip", "--system-site-packages", str(folder), cwd=folder.parent
    )
    assert made.returncode == 0, made.stderr
    interpreter = folder / "bin" / "python"
    # The system's packages are those of the interpreter that our own environment was made from. Ours come by path, and
    # so without what their .pth files say: an editable attnzoo in ours is out of sight.
    own = Path(sysconfig.get_path("purelib", vars={"base": str(folder), "platbase": str(folder)}))
    (own / "parent.pth").write_text("\n".join(site.getsitepackages()) + "\n")
    pip = ["-m", "pip", "--python", str(interpreter), "install", "--no-deps", "--no-index", "--no-build-isolation"]
    done = python(sys.executable, *pip, "--quiet", "--ignore-installed", *what, cwd=folder.parent)
    assert done.returncode == 0, done.stderr
    return interpreter


@pytest.mark.clients
def test_wheel_brings_recipes_and_samples(wheel, tmp_path):
    interpreter = install([str(wheel)], tmp_path / "env")
    listed = python(interpreter.with_name("zoo"), "list", "recipes", cwd=tmp_path)
    assert listed.returncode == 0, listed.stderr
    assert "quickstart" in listed.stdout
    assert "classification/cifar10_vit_tiny" in listed.stdout
    found = python(interpreter, "-c", FIND, cwd=tmp_path)
    assert found.returncode == 0, found.stderr
    for line in found.stdout.splitlines():
        assert Path(line).is_file()
        assert Path(line).is_relative_to(tmp_path / "env"), line


@pytest.mark.clients
def test_editable_install_reads_the_checkout(tmp_path):
    pytest.importorskip("hatchling", reason="hatchling comes with the dev extra")
    pytest.importorskip("editables", reason="editables comes with the dev extra")
    interpreter = install(["--editable", str(ROOT)], tmp_path / "env")
    found = python(interpreter, "-c", FIND, cwd=tmp_path)
    assert found.returncode == 0, found.stderr
    assert found.stdout.splitlines()[1] == str(ROOT / "recipes" / "quickstart.yaml")
    for line in found.stdout.splitlines():
        assert Path(line).is_relative_to(ROOT), line
    assert "quickstart" in python(interpreter.with_name("zoo"), "list", "recipes", cwd=tmp_path).stdout


def test_wheel_holds_what_it_should_and_no_more(wheel):
    names = set(zipfile.ZipFile(wheel).namelist())
    tops = {name.split("/")[0] for name in names}
    assert {top.partition("-")[0] for top in tops} == {"zoo", "attnzoo"}
    sources = {str(p.relative_to(ROOT)) for p in (ROOT / "zoo").rglob("*.py")}
    recipes = {f"zoo/_resources/{p.relative_to(ROOT)}" for p in (ROOT / "recipes").rglob("*.yaml")}
    samples = ROOT / "data" / "samples"
    images = {f"zoo/_resources/samples/{p.relative_to(samples)}" for p in samples.rglob("*") if p.is_file()}
    assert sources | recipes | images <= names
    assert any(name.endswith("LICENSE") for name in names)


def test_core_imports_and_lists_without_any_extra(tmp_path):
    source = (
        "import zoo, timm, torch\n"
        "from zoo.cli import main\n"
        "m = timm.create_model('zoo_vit_tiny_patch16_224', depth=1, num_classes=3).eval()\n"
        "assert m(torch.zeros(1, 3, 224, 224)).shape == (1, 3)\n"
        "assert main(['list']) == 0\n"
        "assert main(['info', 'zoo_vit_tiny_patch16_224']) == 0\n"
        f"loaded = {{name.partition('.')[0] for name in sys.modules}} & set({EXTRAS!r})\n"
        "assert not loaded, loaded\n"
    )
    done = block_and_run(source, tmp_path)
    assert done.returncode == 0, done.stderr
    assert "quickstart" in done.stdout


@pytest.mark.parametrize(
    ("line", "extra"),
    [
        (["fit", "--config", "quickstart"], "train"),
        pytest.param(["test", "--run", "x"], "train", marks=pytest.mark.slow),
        (["export", "x", "m.onnx"], "train"),
    ],
)
def test_command_without_its_extra_says_which(tmp_path, line, extra):
    done = block_and_run(f"from zoo.cli import main\nsys.exit(main({line!r}))", tmp_path)
    assert done.returncode == 2
    assert f"pip install 'attnzoo[{extra}]'" in done.stderr
    assert "Traceback" not in done.stderr


def test_import_is_light(tmp_path):
    # Contract: less than 2 s over `import timm`, in one of three tries, since other tests share the cores.
    source = (
        f"import sys, time; sys.path.insert(0, {str(ROOT)!r}); import timm; t = time.perf_counter(); import zoo; "
        "print(time.perf_counter() - t)"
    )
    tries = (float(python(sys.executable, "-c", source, cwd=tmp_path).stdout) for _ in range(3))
    assert any(seconds < 2 for seconds in tries)


def test_heavy_rooms_load_on_first_use(tmp_path):
    source = f"import sys; sys.path.insert(0, {str(ROOT)!r}); import zoo; print(*sys.modules)"
    loaded = {name.partition(".")[0] for name in python(sys.executable, "-c", source, cwd=tmp_path).stdout.split()}
    assert not loaded & {"lightning", "albumentations", "onnx", "onnxruntime", "matplotlib", "jsonargparse"}
    heavy = f"import sys; sys.path.insert(0, {str(ROOT)!r}); import zoo; print(zoo.tasks.Classification.__name__)"
    assert python(sys.executable, "-c", heavy, cwd=tmp_path).stdout.strip() == "Classification"
