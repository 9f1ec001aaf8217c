"""`PYTHONPATH=.:tests python -m families FOLDER [NAME ...]` writes the tiny pipelines."""

import sys
from pathlib import Path

from families import FAMILIES, save_family

for name in sys.argv[2:] or FAMILIES:
    save_family(name, Path(sys.argv[1]))
