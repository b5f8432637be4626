"""The `zoo` command: finds the subcommand, runs it, and turns whatever goes wrong into one plain message."""

import importlib
import os
import sys
from collections.abc import Sequence

from zoo.errors import UsageError, unknown

# Subcommand -> module with `run(command, arguments)`, and what it does in a few words. Modules load on use.
COMMANDS = {
    "fit": ("zoo.commands.fit", "train from a recipe:        zoo fit --config quickstart"),
    "validate": ("zoo.commands.evaluate", "accuracy on validation:     zoo validate --run NAME"),
    "test": ("zoo.commands.evaluate", "accuracy on the test split: zoo test --run NAME"),
    "predict": ("zoo.commands.predict", "name images:                zoo predict model.onnx IMAGES..."),
    "export": ("zoo.commands.export", "one file without torch:     zoo export RUN.ckpt model.onnx"),
    "compare": ("zoo.commands.compare", "one budget for each of many: zoo compare --config compare/cifar10_attention"),
    "list": ("zoo.commands.listing", "what there is:              zoo list backbones|attentions|recipes [PATTERN]"),
    "info": ("zoo.commands.info", "facts about one of these:   zoo info zoo_vit_tiny_patch16_224"),
}
_VALUE_OPTIONS = ("--config", "-c", "--run", "--ckpt")


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line and returns the exit status: 0 done, 2 bad input or usage, 1 failure while running."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    debug = "--debug" in arguments or os.environ.get("ZOO_DEBUG", "0") not in ("", "0")
    arguments = [argument for argument in arguments if argument != "--debug"]
    try:
        command, rest = _split(arguments)
        if command is None:
            print(_answer(rest))
            return 0
        status = importlib.import_module(COMMANDS[command][0]).run(command, rest)
        sys.stdout.flush()
        return status or 0
    except BaseException as error:
        # Imported here: most calls need none of it.
        from zoo.commands.failures import report

        return report(error, debug)


def entry() -> None:
    """The console script."""
    sys.exit(main())


def _split(arguments: list[str]) -> tuple[str | None, list[str]]:
    """The subcommand and everything else: options that every command understands may also stand before it."""
    index = 0
    while index < len(arguments) and arguments[index].startswith("-"):
        index += 2 if arguments[index] in _VALUE_OPTIONS else 1
    if index >= len(arguments):
        return None, arguments
    command = arguments[index]
    if command not in COMMANDS:
        raise unknown("command", command, COMMANDS)
    return command, arguments[:index] + arguments[index + 1 :]


def _answer(options: list[str]) -> str:
    """The answer to a line without a subcommand."""
    if not options or options[0] in ("-h", "--help"):
        lines = ["usage: zoo COMMAND ...", "", "commands:"]
        lines += [f"  {name:<10}{about}" for name, (_, about) in COMMANDS.items()]
        lines += [
            "",
            "Each command explains itself: zoo COMMAND --help. --debug shows the traceback of an error.",
        ]
        return "\n".join(lines)
    if options[0] == "--version":
        import zoo

        return f"attnzoo {zoo.__version__}"
    raise UsageError(f"which command? Valid: {', '.join(COMMANDS)}. For instance: zoo fit {' '.join(options)}")


if __name__ == "__main__":
    entry()
