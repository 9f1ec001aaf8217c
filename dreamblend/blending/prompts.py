"""Prompts and seeds, as a user gives them."""

from __future__ import annotations

import os
import re
import warnings
from pathlib import Path

from dreamblend.errors import InputError
from dreamblend.models import Backbone, weighted_prompts
from dreamblend.processes import rank_zero_warn

Pair = tuple[str, int]  # prompt, seed
# endings of names that mean a file, even if it does not exist
ENDINGS = (".txt", ".text", ".md", ".csv", ".prompt", ".prompts")

# AUTOMATIC1111's <lora:name:0.8>, (word:1.3), [a:b:0.5], ((word)), [word], and compel's word++.
# Parentheses in prose are none of these: (at 10:30)
_AUTOMATIC1111 = (
    r"<(?:lora|lyco|locon|hypernet):[^>]*>|\([^()]*[^\d\s(]:\s*\d*\.?\d+\s*\)"
    r"|\(\([^()]*\)\)|(?<!\[)\[[^\[\]]+\](?!\])"
)
_COMPEL = r"\w+(?:\+\+|--)(?=\s|,|$)"


def read_prompts(
    prompts: list[str] | str, identifier: str, class_noun: str, weighting: str | None = None
) -> list[str]:
    """Prompts from text files (one a line, # comments), or as given; `{subject}` becomes "sks mug".
    Repeats are dropped. `weighting` compel is how weights are written (`weighted_prompts`); plain
    text where None.

    A file that exists is read, whatever its name. Warns of weights and adapters in the syntax of
    other tools. Raises InputError for a file that does not exist, and for what compel has and a
    blend has not.
    """
    if isinstance(prompts, str):
        prompts = [prompts]
    lines = []
    for prompt in prompts:
        path = Path(prompt).expanduser() if prompt.startswith("~/") else Path(prompt)
        there = os.path.isfile(path)  # takes any text, unlike Path.is_file
        if there or path.suffix.lower() in ENDINGS or ("/" in prompt and " " not in prompt):
            if not there:
                raise InputError(f"the prompt file {prompt[:200]} does not exist")
            try:
                lines += [
                    line
                    for line in path.read_text(encoding="utf-8-sig").splitlines()
                    if not line.lstrip().startswith("#")
                ]
            except UnicodeDecodeError as error:
                raise InputError(f"the prompt file {prompt} is not UTF-8 text") from error
        elif re.fullmatch(r"\s*\[.*[,{].*\]\s*", prompt, re.DOTALL):
            raise InputError(
                f"the prompts {prompt[:60]} are no list as they stand: quote each of them, as in"
                """ --prompts '["...", "..."]'"""
            )
        else:
            lines.append(prompt)
    filled = [
        " ".join(line.split()).replace("{subject}", f"{identifier} {class_noun}") for line in lines
    ]
    distinct = list(dict.fromkeys(p for p in filled if p))
    if not distinct:
        raise InputError(
            "there are no prompts: give --prompts a text file with one a line, or the prompts"
            " themselves"
        )
    syntax = _AUTOMATIC1111 if weighting else f"{_AUTOMATIC1111}|{_COMPEL}"
    for prompt in distinct:
        if weighting:
            weighted_prompts.parsed(prompt)
        if foreign := re.findall(syntax, prompt, re.IGNORECASE):
            rank_zero_warn(
                f"the prompt {prompt[:60]!r} has {', '.join(dict.fromkeys(foreign))}: weights,"
                " schedules and adapters in a prompt belong to other tools and are read as plain"
                " text here; leave them out"
            )
    return distinct


def without_identifier(prompt: str, identifier: str) -> str:
    """The prompt without the subject's rare token, which means nothing to a model that has not
    learned it: "a sks mug" is "a mug". It is found in any case, beside punctuation, and with a
    weight of its own.
    """
    word = re.escape(identifier)
    found = rf"\({word}\)[\d.]*[+-]*|(?<![\w-]){word}[+-]*(?![\w-])"
    rest = re.sub(found, " ", prompt, flags=re.IGNORECASE)
    return re.sub(r"\(\s+", "(", " ".join(rest.split()))


def read_seeds(seeds: str) -> list[int]:
    """`0-3` or `0,5,7-9` to a list of seeds."""
    numbers: list[int] = []
    for part in str(seeds).replace(" ", "").split(","):
        match = re.fullmatch(r"(\d+)(?:-(\d+))?", part)
        first, last = (int(match[1]), int(match[2] or match[1])) if match else (1, 0)
        if last < first:
            raise InputError(f"seeds {seeds!r} are not understood: write 0-3, or 0,5,7-9")
        if last >= 2**64 or last - first >= 10**6:
            raise InputError(
                f"seeds {seeds!r} are too large or too many: a seed is below 2^64, and a range at"
                " most a million seeds"
            )
        numbers += range(first, last + 1)
    return list(dict.fromkeys(numbers))


def read_shard(shard: str, setting: str = "data.shard") -> slice:
    """`1/3` to every third from the second on. `setting` names it in the error if it cannot be
    read.
    """
    match = re.fullmatch(r"(\d+)/(\d+)", shard)
    if match is None or int(match[1]) >= int(match[2]):
        raise InputError(
            f"{setting} is {shard!r}: write 0/3, 1/3 and 2/3 for three jobs that share the work,"
            " 0/4 to 3/4 for four"
        )
    return slice(int(match[1]), None, int(match[2]))


def check_prompts(prompts: list[str], backbone: Backbone, identifier: str, class_noun: str) -> None:
    """Warn of prompts that cannot draw what they ask for, and say why."""
    for prompt in prompts:
        words = prompt.lower()
        for part, word in (("identifier", identifier), ("class noun", class_noun)):
            if not re.search(rf"(?<!\w){re.escape(word.lower())}(?!\w)", words):
                known = f"the snapshots know the subject as '{identifier} {class_noun}'"
                warnings.warn(
                    f"the prompt {prompt!r} lacks the {part} {word!r}: {known}", stacklevel=2
                )
        if dropped := backbone.dropped_words(prompt):
            warnings.warn(
                f"the prompt {prompt[:60]!r} is over the token limit: these words fall off its end:"
                f" {' '.join(dropped)}",
                stacklevel=2,
            )


def named(pairs: list[Pair]) -> str:
    """Pairs in a message: the first three."""
    return ", ".join(
        f"{prompt[:60]!r} with seed {seed}" for prompt, seed in pairs[:3]
    ) + f" and {len(pairs) - 3} more" * (len(pairs) > 3)
