"""`dreamblend fit|select|predict|export`: what train.py and blend.py run, too."""

from __future__ import annotations

import importlib
import sys

from dreamblend.cli import entry, quiet  # first: it quiets the libraries as they are imported
from dreamblend.commands.help import show
from dreamblend.errors import InputError

COMMANDS = {
    "fit": "fine-tune a base on photos of a subject, and keep snapshots",
    "select": "pick the early and the late snapshot of a run",
    "predict": "blend the two: draw prompts",
    "export": "write snapshots for other tools",
}


@entry
def main() -> None:
    """Run the command that the first word names."""
    name = sys.argv[1] if len(sys.argv) > 1 else "--help"
    if name in ("--help", "-h"):
        print("The commands:\n")
        for command, what in COMMANDS.items():
            print(f"  {command:<8} {what}")
        print("\nCOMMAND --help lists the options of each.")
    elif name not in COMMANDS:
        raise InputError(f"{name!r} is no command: the commands are {', '.join(COMMANDS)}")
    elif sys.argv[2:] in (["--help"], ["-h"]):
        show(name, lambda: start(name))
    else:
        start(name)


def start(name: str) -> None:
    """Run a command; it reads its options itself."""
    module = importlib.import_module(f"dreamblend.commands.{name}")
    quiet()  # again, as Lightning sets up its own notices where it is imported
    module.main()


if __name__ == "__main__":
    main()
