"""Recipes and sample images: from the checkout in an editable install, from the package in a wheel."""

from pathlib import Path

from zoo.errors import UsageError, unknown

_PACKAGE = Path(__file__).resolve().parent


def recipes_dir() -> Path:
    """The folder of the shipped recipes."""
    return _find("recipes", "recipes")


def samples_dir() -> Path:
    """The folder of the bundled sample images, one folder a task."""
    return _find("samples", "data/samples")


def recipes() -> dict[str, Path]:
    """The shipped recipes by name, such as "quickstart" or "classification/cifar10_vit_tiny", sorted."""
    root = recipes_dir()
    return {path.relative_to(root).with_suffix("").as_posix(): path for path in sorted(root.rglob("*.yaml"))}


def find_recipe(name: str) -> Path:
    """The file of a recipe, given by its name or by a path to any YAML file.

    Raises:
        UsageError: neither a shipped recipe nor a file; the closest names are given.
    """
    shipped = recipes()
    if name in shipped:
        return shipped[name]
    path = Path(name).expanduser()
    if path.is_file():
        return path
    if path.suffix in (".yaml", ".yml"):
        if name.removesuffix(path.suffix) in shipped:
            return shipped[name.removesuffix(path.suffix)]
        raise UsageError(f"there is no recipe file {name!r}. Shipped recipes: {', '.join(shipped)}.")
    if path.is_dir():
        raise UsageError(f"{name!r} is a folder, not a recipe. Give a YAML file or one of: {', '.join(shipped)}.")
    raise unknown("recipe", name, shipped)


def _find(packaged: str, checkout: str) -> Path:
    for path in (_PACKAGE / "_resources" / packaged, _PACKAGE.parent / checkout):
        if path.is_dir():
            return path
    raise UsageError(f"this installation of attnzoo lacks its {packaged}: install it again")
