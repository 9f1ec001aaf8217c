"""`python -m dreamblend.sandbox photos NAME DIR`, `... subjects`, `... check`, `... scenes
FILE.png`.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from random import Random

from PIL import Image

from dreamblend.sandbox import world


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
    commands.add_parser(
        "check",
        help="measure judges, base and attention against what the sandbox must reach (minutes)",
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
        from dreamblend.sandbox.making.check import check, table

        print(table(check()))


if __name__ == "__main__":
    main()
