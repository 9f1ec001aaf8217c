"""Blend two snapshots of a run: `python blend.py predict --config configs/blend.yaml --run runs/mug
--prompts ...`.

`python blend.py select --run runs/mug` picks the two, which `predict` does by itself where none are
named.
"""

from dreamblend.__main__ import main

if __name__ == "__main__":
    main()
