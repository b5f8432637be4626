"""Attention mechanisms by name: what each one is, and how to build it in the layout that the caller lives in."""

import fnmatch
import inspect
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from zoo.attention.adapters import MapAdapter, TokensAdapter
from zoo.attention.base import Attention, Grid
from zoo.errors import UsageError, unknown

_SPECS: dict[str, "AttentionSpec"] = {}
_FRAMEWORK = ("dim", "grid_size", "num_prefix_tokens")


@dataclass(frozen=True)
class AttentionSpec:
    """Facts about a mechanism that code reads or a test checks.

    Attributes:
        name: what `create_attention` takes.
        cls: the module.
        paper: title and number of the paper that defines it.
        layout: "tokens" or "map", the native one.
        options: keyword and default of every option of the constructor.
        supports: which of "key_mask", "bias" and "prefix" (prefix tokens that take part) forward accepts.
        prefix: what happens to prefix tokens: they "mix" with the others, "pass" unchanged, or it "refuse"s them.
        cost: multiplications and additions of one image with default options: N tokens, C channels.
        forms_map: whether it stores numbers for all pairs of tokens, of which it then bounds the count.
        fixed_grid: whether it has parameters made for `grid_size`, which it resizes to other grids.
        confidence: "high", "medium" or "low": how surely this is the mechanism that the paper describes, on images;
            the docstring of the module says what is not sure.
        wrapper: whether it composes another mechanism, given as `inner` and `inner_options`.
    """

    name: str
    cls: type[Attention]
    paper: str
    layout: str
    options: Mapping[str, Any]
    supports: frozenset[str]
    prefix: str
    cost: str
    forms_map: bool
    fixed_grid: bool
    confidence: str
    wrapper: bool


def register_attention(
    name: str,
    *,
    paper: str,
    supports: Iterable[str] = (),
    prefix: str,
    cost: str,
    forms_map: bool = False,
    fixed_grid: bool = False,
    confidence: str = "high",
) -> Callable[[type[Attention]], type[Attention]]:
    """Class decorator that makes a mechanism known as `name`.

    Raises:
        ValueError: the name is taken, or a fact is not one of the contract's.
    """

    def register(cls: type[Attention]) -> type[Attention]:
        if name in _SPECS:
            raise ValueError(f"attention {name!r} is registered already, by {_SPECS[name].cls.__qualname__}")
        if prefix not in ("mix", "pass", "refuse"):
            raise ValueError(f"attention {name!r}: prefix={prefix!r}; valid: mix, pass, refuse")
        if confidence not in ("high", "medium", "low"):
            raise ValueError(f"attention {name!r}: confidence={confidence!r}; valid: high, medium, low")
        stray = set(supports) - {"key_mask", "bias", "prefix"}
        if stray or (prefix == "mix") != ("prefix" in set(supports)):
            raise ValueError(f"attention {name!r}: supports={sorted(supports)} does not agree with prefix={prefix!r}")
        parameters = inspect.signature(cls).parameters
        if any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters.values()):
            raise ValueError(f"attention {name!r}: its constructor swallows unknown options in **kwargs")
        options = {key: p.default for key, p in parameters.items() if key not in _FRAMEWORK}
        _SPECS[name] = AttentionSpec(
            name,
            cls,
            paper,
            cls.layout,
            options,
            frozenset(supports),
            prefix,
            cost,
            forms_map,
            fixed_grid,
            confidence,
            wrapper="inner" in options,
        )
        return cls

    return register


def list_attentions(pattern: str = "*") -> list[str]:
    """Names of the mechanisms that match an fnmatch pattern, sorted."""
    return sorted(fnmatch.filter(_SPECS, pattern))


def attention_spec(name: str) -> AttentionSpec:
    """The facts about a mechanism.

    Raises:
        UsageError: there is no such mechanism; the closest names are given.
    """
    if name not in _SPECS:
        raise unknown("attention", name, _SPECS)
    return _SPECS[name]


def create_attention(
    name: str,
    dim: int,
    *,
    layout: str = "tokens",
    grid_size: Grid = (14, 14),
    num_prefix_tokens: int = 0,
    **options: Any,
) -> Attention:
    """Builds a mechanism in the layout of the caller.

    Args:
        name: one of `list_attentions()`.
        dim: channels.
        layout: "tokens", (B, P + H*W, C), or "map", (B, C, H, W).
        grid_size: (H, W) for which position tables are made; every other grid works too.
        num_prefix_tokens: P, tokens before the grid (class token, registers); 0 in the layout "map".
        options: the mechanism's own options.

    Raises:
        UsageError: unknown name, layout or option, or prefix tokens for a mechanism that refuses them.
    """
    spec = attention_spec(name)
    if layout not in ("tokens", "map"):
        raise unknown("layout", layout, ("tokens", "map"))
    for option in options:
        if option not in spec.options:
            raise unknown(f"option of attention {name!r}:", option, spec.options)
    if num_prefix_tokens and layout == "map":
        raise UsageError(f"a map has no prefix tokens, but num_prefix_tokens={num_prefix_tokens}; use layout='tokens'")
    if num_prefix_tokens and spec.prefix == "refuse":
        raise UsageError(
            f"attention {name!r} takes no prefix tokens (class token, registers), but there are {num_prefix_tokens}; "
            "use a network without them (in zoo_vit_*: class_token=False, global_pool='avg')"
        )
    own_prefix = num_prefix_tokens if spec.prefix == "mix" else 0
    attention = spec.cls(dim, grid_size=grid_size, num_prefix_tokens=own_prefix, **options)
    if spec.layout == layout and own_prefix == num_prefix_tokens:
        return attention
    return MapAdapter(attention) if layout == "map" else TokensAdapter(attention, num_prefix_tokens)


def with_defaults(name: str, options: Mapping[str, Any] | None, defaults: Mapping[str, Any]) -> dict[str, Any]:
    """The user's options over a host's defaults (num_heads, qkv_bias, dropout, ...), as far as the mechanism has these.

    The defaults of a wrapper go on to the mechanism inside it. The user's options are kept as they are, so that a wrong
    one is refused by `create_attention`.
    """
    spec = attention_spec(name)
    merged = {key: value for key, value in defaults.items() if key in spec.options} | dict(options or {})
    if spec.wrapper:
        inner = merged.get("inner", spec.options["inner"])
        merged["inner_options"] = with_defaults(inner, merged.get("inner_options"), defaults)
    return merged
