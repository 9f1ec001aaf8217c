"""What the entry points share: one clear sentence for a wrong input."""

from __future__ import annotations

import functools
import logging
import os
import sys
import warnings
from collections.abc import Callable

from dreamblend.errors import InputError, cause, is_lost_process

for _library in ("TRANSFORMERS", "DIFFUSERS"):  # they read this as they are imported, so this module comes first
    os.environ.setdefault(f"{_library}_VERBOSITY", "error")

_NOTICES = (
    ".*overrides the configure_model.*", ".*does not have many workers.*", ".*srun.*",
    ".*isinstance.treespec, LeafSpec.*", ".*litlogger.*", ".*Couldn't infer the batch indices.*",
)


def entry(main: Callable[[], None]) -> Callable[[], None]:
    """Run `main`; an InputError becomes its sentence and exit status 2, Ctrl-C becomes 130, the loss of another process 1."""

    @functools.wraps(main)
    def run() -> None:
        quiet()
        try:
            main()
        except InputError as error:
            print(f"error: {error}", file=sys.stderr)
            sys.exit(2)
        except RuntimeError as error:
            if isinstance(mine := cause(error), InputError):
                print(f"error: {mine}", file=sys.stderr)
                sys.exit(2)
            if not is_lost_process(mine):
                raise
            said = " ".join(str(error).split())
            print(f"error: another process of this run was lost, and what it said tells why: run the same command to go on (here: {said})", file=sys.stderr)
            sys.exit(1)
        except (KeyboardInterrupt, SystemExit) as error:
            # Lightning turns Ctrl-C into an exit
            if not isinstance(error, KeyboardInterrupt) and not isinstance(error.__context__, KeyboardInterrupt):
                raise
            print("interrupted: what was written is complete; run the same command to go on", file=sys.stderr)
            sys.exit(130)

    return run


def quiet() -> None:
    """Leave out the libraries' notices that a user can do nothing about."""
    for name in ("lightning.pytorch", "lightning.fabric"):  # what goes well is told on stdout
        for handler in logging.getLogger(name).handlers:
            if isinstance(handler, logging.StreamHandler):
                handler.setStream(sys.stdout)
    for message in _NOTICES:
        warnings.filterwarnings("ignore", message=message)
    logging.getLogger("lightning.pytorch.utilities.rank_zero").addFilter(_is_no_advert)


def _is_no_advert(record: logging.LogRecord) -> bool:
    return not any(name in record.getMessage() for name in ("litlogger", "litmodels"))
