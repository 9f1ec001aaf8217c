"""The command line: options win over --config files, `~` is the home
folder, wrong settings are one sentence.
"""

from __future__ import annotations

import argparse
import os
from collections import Counter
from pathlib import Path
from typing import Any, NoReturn

from jsonargparse import ArgumentParser

from dreamblend import renamed
from dreamblend.errors import InputError, one_line
from dreamblend.processes import rank_zero_warn

RECIPES = Path(__file__).parent / "configs"  # the repository's configs/, also where installed


class Parser(ArgumentParser):
    """Reports an error in one sentence, without a screen of usage, and accepts no abbreviated
    option names.
    """

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, allow_abbrev=False, **kwargs)

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        tip = f"; {self.prog.replace(' [options]', '')} --help lists the options"
        raise InputError(
            one_line(message) + tip * ("lists the options" not in message)
        ) from ex  # an inner parser has added the tip


def arranged(words: list[str]) -> list[str]:
    """A command line with its --config files first, in their own order, and `~` as the home folder.

    jsonargparse reads the options in their order, so a file would override the options before it.
    Warns about an option that is given twice, as the last one counts.
    """
    configs, rest, named = [], [], []
    waiting = iter(words)
    for word in waiting:
        name, equals, value = word.partition("=")
        if name in ("--config", "-c"):
            path = value if equals else next(waiting, None)
            if path is None:
                configs.append(word)
            else:
                configs += ["--config", renamed.config(recipe(home(path)))]
            continue
        name = renamed.option(name)
        if name.startswith("--"):
            rest.append(f"{name}={home(value)}" if equals else name)
        else:
            rest.append(home(word))
        if name.startswith("--"):
            named.append(name)
    appended = [name.rstrip("+") for name in named if name.endswith("+")]
    for name, times in Counter(named).items():
        if (
            times > 1
            and not name.endswith("+")
            # each item of a list has settings of its own
            and not any(name.startswith(f"{of}.") for of in appended)
        ):
            several = (
                """; several are one option: --prompts '["...", "..."]'"""
                if name == "--prompts"
                else ""
            )
            rank_zero_warn(f"{name} is given {times} times, and the last one counts{several}")
    place = 1 if rest and not rest[0].startswith("-") else 0  # after the subcommand
    return [*rest[:place], *configs, *rest[place:]]


def recipe(name: str) -> str:
    """The path of a --config file. A bare name that is no file in this folder means a file that
    comes with the package.
    """
    shipped = RECIPES / name
    bare = name == Path(name).name and not Path(name).exists()
    return str(shipped) if bare and shipped.is_file() else name


def home(value: Any) -> Any:
    """`value` with `~` replaced by the home folder, in paths and texts, also inside lists,
    dictionaries and namespaces.
    """
    if isinstance(value, str):
        user, slash, _ = value.partition("/")
        return (
            os.path.expanduser(value)
            if value == "~" or user.startswith("~") and slash and " " not in user
            else value
        )
    if isinstance(value, Path):
        return value.expanduser()
    if isinstance(value, list):
        return [home(item) for item in value]
    if isinstance(value, dict):
        return {key: home(item) for key, item in value.items()}
    if isinstance(value, argparse.Namespace):
        for key, item in vars(value).items():
            setattr(value, key, home(item))
    return value
