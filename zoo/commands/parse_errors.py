"""jsonargparse's errors in one sentence, with the closest valid option named."""

import importlib
import inspect
import re
from collections.abc import Iterable
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from zoo.errors import UsageError

_TYPES = {
    "int": "a whole number",
    "float": "a number",
    "bool": "true or false",
    "str": "text",
    "dict": "a mapping such as '{key: value}'",
    "list": "a list such as '[a, b]'",
}


def plain(error: BaseException, parser: Any, arguments: list[str]) -> UsageError:
    """The error to show for one that parsing raised.

    Args:
        error: from jsonargparse.
        parser: the parser that raised it: knows all options that are not of a class.
        arguments: the command line it was given.
    """
    texts = [str(e) for e in _chain(error)]
    for make in (_own, _missing_value, _unrecognised, _not_accepted, _class_path, _wrong_type):
        found = make(texts, error, parser, arguments)
        if found is not None:
            return found
    return UsageError(_squeeze(texts[0]))


def check_yaml(path: Path) -> dict:
    """The mapping in a YAML file.

    Raises:
        UsageError: it cannot be read, is no YAML, or holds no mapping; says at which line.
    """
    import yaml

    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        where = f", line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        raise UsageError(f"{path} is no valid YAML{where}: {error.problem or error}") from error
    except (UnicodeDecodeError, yaml.YAMLError) as error:
        raise UsageError(f"{path} is no YAML file: {_squeeze(str(error))}") from error
    except OSError as error:
        raise UsageError(f"{path} cannot be read: {error.strerror}") from error
    if not isinstance(content, dict):
        raise UsageError(f"{path} is no recipe: it holds {_kind(content)}, not a mapping with model, data and trainer")
    return content


def _own(texts: list[str], error: BaseException, parser: Any, arguments: list[str]) -> UsageError | None:
    return next((e for e in _chain(error) if isinstance(e, UsageError)), None)


def _missing_value(texts: list[str], error: BaseException, parser: Any, arguments: list[str]) -> UsageError | None:
    match = re.search(r"argument (\S+): expected (one|at least one) argument", texts[0])
    if not match:
        return None
    prefix = match[1].split("/")[-1]
    for argument, following in zip(arguments, [*arguments[1:], "--"], strict=True):
        if argument.startswith(prefix) and "=" not in argument and following.startswith("--"):
            return UsageError(f"{argument} needs a value")
    return UsageError(f"{prefix} needs a value")


def _unrecognised(texts: list[str], error: BaseException, parser: Any, arguments: list[str]) -> UsageError | None:
    from_line = re.search(r"[Uu]nrecognized arguments: (\S+)", texts[0])
    from_file = re.match(r"Option '([^']+)' is not accepted", texts[0])
    match = from_line or from_file
    if match is None:
        return None
    name = match[1].split("=")[0]
    if from_line and not name.startswith("-"):
        return UsageError(f"unexpected {name!r}: options begin with --, and a value follows its option")
    given = name.lstrip("-")
    section = given.split(".")[0]
    if section not in _SECTIONS and (from_file or "." in given):
        close = get_close_matches(section, _SECTIONS, n=1)
        hint = f" Did you mean {close[0]!r}?" if close else ""
        return UsageError(f"a recipe has no section {section!r} (in {given!r}).{hint} Valid: {', '.join(_SECTIONS)}.")
    options = sorted(o.lstrip("-") for o in parser._option_string_actions if "." in o or o in _TOP)
    return _unknown(given, options)


def _not_accepted(texts: list[str], error: BaseException, parser: Any, arguments: list[str]) -> UsageError | None:
    keys = [m for text in texts for m in re.findall(r"Option '([^']+)' is not accepted", text)]
    classes = re.findall(r"Problem with given class_path '([^']+)':\s+Option", texts[0])
    if not keys or not classes or "is not accepted" not in texts[-1]:
        return None
    return _unknown(f"{_path(texts)}.{keys[-1]}", [f"{_path(texts)}.{p}" for p in _parameters(classes[0])])


def _class_path(texts: list[str], error: BaseException, parser: Any, arguments: list[str]) -> UsageError | None:
    match = re.search(r"Problem with given class_path '([^']+)':\s+(.+)", texts[0])
    if not match or not re.search(r"has no attribute|No module|not import|Unable to import|Unexpected", match[2]):
        return None
    given, reason = match[1], match[2].strip()
    module, _, name = given.rpartition(".")
    try:
        others = [n for n in dir(importlib.import_module(module)) if n[:1].isupper()]
    except (ImportError, ValueError):
        others = []
    close = get_close_matches(name, others, n=3, cutoff=0.5)
    hint = " Did you mean " + " or ".join(f"{module}.{n}" for n in close) + "?" if close else ""
    return UsageError(f"{_path(texts)}: there is no class {given!r} ({reason}).{hint}")


def _wrong_type(texts: list[str], error: BaseException, parser: Any, arguments: list[str]) -> UsageError | None:
    innermost = next((text for text in reversed(texts) if "Got value:" in text), None)
    if innermost is None:
        return None
    value = innermost.rpartition("Got value:")[2].strip()
    subtypes = [m for text in texts for m in re.findall(r"Subtypes: \[(.+)\]", text)]
    wanted = list(re.findall(r"Expected an? (?:<class ')?([\w.]+)", innermost))
    # The last union met is that of the value itself, unless the value's own type is a plain one.
    if subtypes and _is_union(texts) and (names := _names(subtypes[-1])):
        wanted = names
    if not wanted:
        return None
    literals = re.findall(r"Literal\[([^\]]+)\]", texts[0])
    if literals and not set(wanted) & set(_TYPES):
        wanted = ["one of " + ", ".join(dict.fromkeys(part for text in literals for part in text.split(", ")))]
    words = " or ".join(dict.fromkeys(_TYPES.get(name, name) for name in wanted))
    return UsageError(f"--{_path(texts)} takes {words}, not {value!r}")


_SECTIONS = ("model", "data", "trainer", "seed_everything")
_TOP = ("--seed_everything", "--config", "--model", "--data", "--trainer", "--ckpt", "--run", "--resume")


def _unknown(given: str, options: Iterable[str]) -> UsageError:
    options = sorted(set(options))
    prefix = given.rpartition(".")[0]
    near = [o for o in options if o.rpartition(".")[0] == prefix]
    close = get_close_matches(given, near or options, n=2, cutoff=0.6) or get_close_matches(given, options, n=2)
    if close:
        return UsageError(f"unknown option --{given}. Did you mean " + " or ".join(f"--{c}" for c in close) + "?")
    if near and prefix:
        names = ", ".join(o.rpartition(".")[2] for o in near)
        return UsageError(f"unknown option --{given}. --{prefix} takes: {names}.")
    return UsageError(
        f"unknown option --{given}. Options of the network begin with --model., of the images with --data., "
        "of the training loop with --trainer. (`zoo fit --help`)"
    )


def _path(texts: list[str]) -> str:
    """The option in full: the keys of all nested parsers, outermost first."""
    keys: list[str] = []
    for text in texts:
        match = re.match(r'\s*Parser key "([^"]+)"', text)
        if match and (not keys or (match[1] != keys[-1] and not keys[-1].endswith("." + match[1]))):
            keys.append(match[1])
    return ".".join(keys)


def _is_union(texts: list[str]) -> bool:
    # Depth of the last "Parser key" against that of the last "Subtypes": a union after the key belongs to the value.
    order = [("key" if text.lstrip().startswith("Parser key") else "", "Subtypes" in text) for text in texts]
    last_key = max((i for i, (key, _) in enumerate(order) if key), default=-1)
    return last_key >= 0 and "Subtypes" in texts[last_key]


def _names(subtypes: str) -> list[str]:
    found = re.findall(r"<class '([\w.]+)'>|(?:^|, )(\w+)\[|typing\.(\w+)", subtypes)
    names = [next(part for part in parts if part) for parts in found]
    return [n for n in names if n in _TYPES]


def _parameters(class_path: str) -> list[str]:
    module, _, name = class_path.rpartition(".")
    try:
        cls = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, ValueError):
        return []
    linked = ("class_names", "palette")
    return [p for p in inspect.signature(cls).parameters if p not in ("args", "kwargs", *linked)]


def _chain(error: BaseException | None) -> Iterable[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def _kind(content: object) -> str:
    return "nothing" if content is None else f"one {type(content).__name__}"


def _squeeze(text: str, limit: int = 300) -> str:
    text = " ".join(text.split())
    return text if len(text) <= limit else text[:limit] + " ..."
