"""`python -m dreamblend.sandbox photos NAME DIR`, `... subjects`, `... check`, `... scenes
FILE.png`.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from random import Random

from PIL import Image

from dreamblend.cli import entry
from dreamblend.errors import InputError
from dreamblend.sandbox import world


@entry
def main() -> None:
    """Run a command of the sandbox."""
    parser = argparse.ArgumentParser(
        prog="python -m dreamblend.sandbox", description="The sandbox world."
    )
    commands = parser.add_subparsers(dest="command", required=True)
    photos = commands.add_parser("photos", help="write the training photos of a subject")
    photos.add_argument("name", choices=sorted(world.SUBJECTS))
    photos.add_argument("folder", type=Path)
    commands.add_parser("subjects", help="list the subjects")
    check = commands.add_parser(
        "check",
        help="measure judges, bases and attention against what the sandbox must reach (minutes)",
    )
    check.add_argument(
        "--weights",
        type=Path,
        help="a folder that the recipe makes (its --out); the shipped weights where none is given",
    )
    scenes = commands.add_parser("scenes", help="a sheet of random scenes with nothing trained")
    scenes.add_argument("file", type=Path)
    args = parser.parse_args()
    if args.command == "photos":
        args.folder.mkdir(parents=True, exist_ok=True)
        for i, photo in enumerate(world.photos(args.name)):
            photo.save(args.folder / f"{i}.png")
        print(
            f"photos of {args.name} (class noun {world.SUBJECTS[args.name].noun}) are in"
            f" {args.folder}"
        )
    elif args.command == "subjects":
        for name, look in world.SUBJECTS.items():
            print(f"{name:16} {look.noun}")
    elif args.command == "scenes":
        rng, sheet = Random(0), Image.new("RGB", (8 * world.SIZE, 4 * world.SIZE))
        for i in range(32):
            sheet.paste(
                world.render(world.random_scene(rng))[0], (i % 8 * world.SIZE, i // 8 * world.SIZE)
            )
        sheet.save(args.file)
    else:
        from dreamblend.sandbox.making import check as checking

        folder = args.weights or checking.WEIGHTS
        if not (folder / "judges").is_dir():
            raise InputError(f"{folder} has no judges/: name the --out of the recipe")
        print(checking.table(checking.check(folder)))


if __name__ == "__main__":
    main()
