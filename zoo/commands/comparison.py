"""What `zoo compare` is asked for: networks or mechanisms, seeds and a budget, read from a YAML file."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from zoo.errors import UsageError, unknown

_KEYS = {
    "recipe": "the recipe that every entry trains",
    "settings": "changes to the recipe for all entries",
    "budget": "seconds: N or gmacs: N",
    "seeds": "a list of whole numbers",
    "accuracy": "val or test",
    "attentions": "patterns over zoo list attentions",
    "backbones": "names of backbones",
    "entries": "name -> changes to the recipe",
}


@dataclass(frozen=True)
class Entry:
    """One line of the comparison.

    Attributes:
        name: a mechanism, a backbone, or what the file calls it.
        settings: what differs from the recipe, in a recipe's own form.
        paper: title and number; "-" where none is known.
        confidence: how surely a mechanism is the one that its paper describes; "-" for everything else.
    """

    name: str
    settings: Mapping[str, Any]
    paper: str
    confidence: str


@dataclass(frozen=True)
class Plan:
    """A comparison.

    Attributes:
        recipe: name or path of the recipe that is trained.
        budget: ("seconds", N) of training, or ("gmacs", N): 1e9 multiply-adds of the forward pass, over all images
            that training takes.
        seeds: one run of every entry for each.
        accuracy: "val", or "test" for what `zoo test` says of the best checkpoint.
        entries: in the order of the table while nothing is trained.
        content: the file, to be compared with that of an interrupted comparison.
    """

    recipe: str
    budget: tuple[str, float]
    seeds: tuple[int, ...]
    accuracy: str
    entries: tuple[Entry, ...]
    content: Mapping[str, Any]

    def overlay(self, entry: Entry, seed: int) -> dict[str, Any]:
        """What a run of this entry changes in the recipe, without its budget."""
        return merged(merged(self.content.get("settings") or {}, entry.settings), {"seed_everything": seed})


def read_plan(path: Path) -> Plan:
    """The plan of a YAML file.

    Raises:
        UsageError: a key, name or value is not what it should be.
    """
    from zoo.commands.parse_errors import check_yaml
    from zoo.resources import find_recipe

    content = check_yaml(path)
    if "recipe" not in content and {"model", "data"} & set(content):
        raise UsageError(
            f"{path.name} is the recipe of one run: zoo fit --config. A comparison names it under recipe:, as "
            "compare/cifar10_attention does"
        )
    for key in content:
        if key not in _KEYS:
            raise unknown(f"key of the comparison {path.name}:", key, _KEYS)
    if not isinstance(content.get("recipe"), str):
        raise UsageError(f"{path.name} names no recipe: give recipe: NAME, one of `zoo list recipes`")
    find_recipe(content["recipe"])
    seeds = content.get("seeds", [0])
    if not isinstance(seeds, list) or not seeds or not all(type(seed) is int for seed in seeds):
        raise UsageError(f"seeds: {seeds!r} in {path.name}; give {_KEYS['seeds']}, such as [0, 1, 2]")
    accuracy = content.get("accuracy", "val")
    if accuracy not in ("val", "test"):
        raise unknown("accuracy", accuracy, ("val", "test"))
    entries = _entries(content, path)
    return Plan(content["recipe"], _budget(content, path), tuple(dict.fromkeys(seeds)), accuracy, entries, content)


def _budget(content: Mapping[str, Any], path: Path) -> tuple[str, float]:
    budget = content.get("budget")
    if isinstance(budget, Mapping) and len(budget) == 1:
        (kind, amount), *_ = budget.items()
        if kind in ("seconds", "gmacs") and isinstance(amount, (int, float)) and amount > 0:
            return kind, float(amount)
    raise UsageError(f"budget: {budget!r} in {path.name}; give one of {{seconds: N}} and {{gmacs: N}}, N above 0")


def _entries(content: Mapping[str, Any], path: Path) -> tuple[Entry, ...]:
    from zoo.attention import attention_spec, list_attentions
    from zoo.catalogue import short_facts
    from zoo.tasks.backbone import check_backbone_name

    for key, kind in (("attentions", list), ("backbones", list), ("entries", dict), ("settings", dict)):
        if not isinstance(content.get(key) or kind(), kind):
            raise UsageError(f"{key}: {content[key]!r} in {path.name}; give {_KEYS[key]}")
    found = []
    for pattern in content.get("attentions") or []:
        names = list_attentions(str(pattern))
        if not names:
            raise unknown("attention", pattern, list_attentions())
        for name in names:
            spec = attention_spec(name)
            found.append(Entry(name, {"model": {"init_args": {"attn": name}}}, spec.paper, spec.confidence))
    for name in content.get("backbones") or []:
        check_backbone_name(name)
        found.append(Entry(name, {"model": {"init_args": {"backbone": name}}}, short_facts(name)[0], "-"))
    for name, settings in (content.get("entries") or {}).items():
        if not isinstance(settings, Mapping):
            raise UsageError(f"entries: {name}: {settings!r} in {path.name}; give changes to the recipe")
        attn = ((settings.get("model") or {}).get("init_args") or {}).get("attn")
        paper, confidence = "-", "-"
        if isinstance(attn, str):
            paper, confidence = attention_spec(attn).paper, attention_spec(attn).confidence
        found.append(Entry(str(name), settings, paper, confidence))
    # A name that is given twice is one entry, as its later place says.
    by_name = {entry.name: entry for entry in found}
    if not by_name:
        raise UsageError(f"{path.name} compares nothing: give attentions, backbones or entries")
    for name in by_name:
        if Path(name).name != name:
            raise UsageError(f"the entry {name!r} cannot be the name of a folder; give it another one under entries")
    return tuple(by_name.values())


def merged(base: Mapping[str, Any], change: Mapping[str, Any]) -> dict[str, Any]:
    """`base` with `change` over it, mapping by mapping."""
    out = dict(base)
    for key, value in change.items():
        old = out.get(key)
        out[key] = merged(old, value) if isinstance(old, Mapping) and isinstance(value, Mapping) else value
    return out
