"""`zoo info NAME`: the facts about a backbone, an attention mechanism or a recipe."""

from zoo.commands.arguments import Parser
from zoo.commands.tables import facts
from zoo.errors import unknown

_ABOUT = "Facts about a backbone (ours or any of timm's), an attention mechanism or a recipe."


def run(command: str, arguments: list[str]) -> None:
    """Runs `zoo info`."""
    parser = Parser(command, "NAME", _ABOUT)
    parser.add_argument("name")
    name = parser.parse_all(arguments).name

    import timm

    from zoo.attention import list_attentions
    from zoo.resources import recipes

    if name in list_attentions():
        print(facts(_attention(name)))
    elif name in recipes():
        path = recipes()[name]
        print(f"# {path}\n{path.read_text(encoding='utf-8')}", end="")
    elif timm.is_model(name):
        print(facts(_backbone(name)))
    else:
        raise unknown("name", name, [*timm.list_models(), *list_attentions(), *recipes()])


def _backbone(name: str) -> list[tuple[str, str]]:
    from zoo.catalogue import backbone_facts
    from zoo.published import published_top1

    found = backbone_facts(name)
    channels, height, width = found.input_size
    return [
        ("backbone", found.name),
        ("parameters", f"{found.parameters / 1e6:.2f} M"),
        ("multiply-adds", "not counted" if found.macs is None else f"{found.macs / 1e9:.2f} G"),
        ("input", f"{channels} x {height} x {width}"),
        ("attention", ", ".join(found.attention) or "not exchangeable"),
        ("paper", found.paper or "not recorded"),
        ("published top-1 %", published_top1(name, "none recorded")),
        ("licence", found.licence or "not recorded"),
        ("weights", found.weights),
    ]


def _attention(name: str) -> list[tuple[str, str]]:
    from zoo.attention import attention_spec

    spec = attention_spec(name)
    prefix = {"mix": "take part", "pass": "come out unchanged", "refuse": "are refused"}[spec.prefix]
    options = ", ".join(f"{key}={_default(value)}" for key, value in spec.options.items())
    return [
        ("attention", spec.name),
        ("paper", spec.paper),
        ("layout", spec.layout),
        ("options", options or "none"),
        ("supports", ", ".join(sorted(spec.supports)) or "neither key_mask, bias nor prefix tokens"),
        ("prefix tokens", prefix),
        ("operations", spec.cost),
        ("map of N x N", "formed, so memory bounds the batch" if spec.forms_map else "not formed"),
        ("other grids", "by resizing its parameters" if spec.fixed_grid else "as they are"),
        ("confidence", spec.confidence),
        ("wraps another", "yes: inner, inner_options" if spec.wrapper else "no"),
        ("use it as", f"--model.attn {name}"),
    ]


def _default(value: object) -> str:
    return value.__name__ if isinstance(value, type) else repr(value)
