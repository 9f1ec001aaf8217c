"""What the configuration files of other people's models may not say: code to import, and sizes that
no model has.
"""

from __future__ import annotations

import json
from pathlib import Path

from dreamblend.errors import InputError

LIBRARIES = (
    "diffusers",
    "transformers",
    "stable_diffusion",
)  # the last is diffusers' own, of the safety checker
RUNS_CODE = {"auto_map", "custom_pipeline", "custom_pipelines", "trust_remote_code"}
LARGEST, MOST_PIXELS = (
    2**18,
    2**12,
)  # of any size (a vocabulary's, say), and of a side of the latents


def read_config(file: Path) -> dict:
    """What a JSON configuration says. Raises InputError where it is damaged, would have code run,
    or would take all memory.
    """
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
        if not isinstance(config, dict):
            raise ValueError("it is not a JSON object")
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"{file} is damaged ({error}): download or save it again") from error
    if asked := sorted(RUNS_CODE & config.keys()):
        raise InputError(
            f"{file} asks for code of its own to be run ({asked[0]}): nothing but weights and"
            " settings is read; use another base"
        )
    for (
        key,
        value,
    ) in (
        config.items()
        # no upper bound for what is below zero: DPM++ clips at -Infinity, and a size below zero is
        # none
    ):
        for number in value if isinstance(value, list) else [value]:
            if isinstance(number, int | float) and not number <= (
                MOST_PIXELS if key == "sample_size" else LARGEST
            ):
                raise InputError(
                    f"{file} gives {key} as {number:g}, a size that no model has: download or save"
                    " it again"
                )
    return config


def check_index(file: Path) -> dict:
    """What a pipeline's model_index.json says. Raises InputError where a part of it would be
    imported from elsewhere.
    """
    config = read_config(file)
    for part, kind in config.items():
        if (
            isinstance(kind, list)
            and not part.startswith("_")
            and kind[:1] not in ([None], *([library] for library in LIBRARIES))
        ):
            library = f"{kind[0]!r}, which is code of its own" if kind else "nothing"
            raise InputError(
                f"{file} says that {part} is of {library}: nothing but weights and settings is"
                " read; use another base"
            )
    return config
