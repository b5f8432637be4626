"""What the parsers of all subcommands share."""

import argparse
import importlib.util
from typing import NoReturn

from zoo.errors import UsageError, missing_extra, unknown


class Parser(argparse.ArgumentParser):
    """An argparse parser that raises UsageError, with the closest option named, instead of printing and leaving."""

    def __init__(self, command: str, usage: str, about: str, epilog: str | None = None):
        super().__init__(
            prog=f"zoo {command}",
            usage=f"zoo {command} {usage}",
            description=about,
            epilog=epilog,
            allow_abbrev=False,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )

    def error(self, message: str) -> NoReturn:
        raise UsageError(f"{message}. Usage: {self.format_usage().removeprefix('usage: ').strip()}")

    def parse_all(self, arguments: list[str]) -> argparse.Namespace:
        """Parses all arguments.

        Raises:
            UsageError: one is missing, malformed or unknown.
        """
        known, rest = self.parse_known_args(arguments)
        if rest:
            name = rest[0].split("=")[0]
            if name.startswith("-"):
                raise unknown(f"option of `{self.prog}`:", name, self._option_string_actions)
            raise UsageError(f"unexpected {rest[0]!r}. Usage: {self.format_usage().removeprefix('usage: ').strip()}")
        return known


def need(extra: str, *packages: str) -> None:
    """Raises UsageError, which names the extra to install, unless all packages are there."""
    for package in packages:
        # A blocked or half-removed package answers with ValueError or an import error of its parent.
        try:
            found = importlib.util.find_spec(package) is not None
        except (ImportError, ValueError):
            found = False
        if not found:
            raise missing_extra(extra, package)
