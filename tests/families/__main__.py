"""`PYTHONPATH=.:tests python -m families FOLDER [NAME ...]`: the tiny pipelines, in folders of their
names.
"""

import sys
from pathlib import Path

from families import FAMILIES, save_family

for name in sys.argv[2:] or FAMILIES:
    save_family(name, Path(sys.argv[1]))
