"""What the entry points share: any error becomes one clear sentence."""

from __future__ import annotations

import functools
import logging
import os
import sys
import tempfile
import traceback
import warnings
from collections.abc import Callable

from dreamblend.errors import InputError, cause, explained, is_lost_process, one_line

# they read this when they are imported, so this module is imported first
for _library in ("TRANSFORMERS", "DIFFUSERS"):
    os.environ.setdefault(f"{_library}_VERBOSITY", "error")

DEBUG = "DREAMBLEND_DEBUG"  # 1: errors come with their traceback
_NOTICES = (
    ".*overrides the configure_model.*",
    ".*does not have many workers.*",
    ".*srun.*",
    ".*isinstance.treespec, LeafSpec.*",
    ".*litlogger.*",
    ".*Couldn't infer the batch indices.*",
)


def entry(main: Callable[[], None]) -> Callable[[], None]:
    """Run `main`. An exception becomes a sentence and an exit status.

    Status 2: the user can correct an input, a setting or the machine. 130: Ctrl-C. 1: another
    process of this run was lost, or there is a bug; then the sentence names the file with the
    traceback. DREAMBLEND_DEBUG=1 prints the traceback of any of them.
    """

    @functools.wraps(main)
    def run() -> None:
        quiet()
        try:
            main()
        except (KeyboardInterrupt, SystemExit) as error:
            # Lightning turns Ctrl-C into an exit
            if not isinstance(error, KeyboardInterrupt) and not isinstance(
                error.__context__, KeyboardInterrupt
            ):
                raise
            print(
                "interrupted: what was written is complete; run the same command to go on",
                file=sys.stderr,
            )
            sys.exit(130)
        except Exception as error:
            if os.environ.get(DEBUG, "0") not in ("", "0"):
                traceback.print_exc()
            sentence, status = sentence_and_status(error)
            print(f"error: {sentence}", file=sys.stderr)
            sys.exit(status)

    return run


def sentence_and_status(error: BaseException) -> tuple[str, int]:
    """The sentence for an error, and the exit status."""
    error = cause(error)
    if isinstance(error, InputError):
        return str(error), 2
    if is_lost_process(error):
        message = one_line(error)[:120]
        return (
            (
                "another process of this run was lost, and what it said tells why: run the same"
                f" command to go on (here: {message})"
            ),
            1,
        )
    if sentence := explained(error):
        return sentence, 2
    return (
        (
            f"{type(error).__name__}: {one_line(error)}; this is a fault of dreamblend or of a"
            f" library, and {_kept(error)}"
        ),
        1,
    )


def _kept(error: BaseException) -> str:
    """Write an error's traceback into a file, and say where."""
    trace = "".join(traceback.format_exception(error))
    try:
        with tempfile.NamedTemporaryFile(
            "w", prefix="dreamblend-error-", suffix=".txt", delete=False, encoding="utf-8"
        ) as file:
            file.write(f"{' '.join(sys.argv)}\n\n{trace}")
        return f"its whole traceback is in {file.name}"
    except OSError:
        print(trace, file=sys.stderr)
        return "its traceback is above"


def quiet() -> None:
    """Hide the libraries' notices about which a user can do nothing."""
    for name in ("lightning.pytorch", "lightning.fabric"):  # their reports are no errors: to stdout
        for handler in logging.getLogger(name).handlers:
            if isinstance(handler, logging.StreamHandler):
                handler.setStream(sys.stdout)
    for message in _NOTICES:
        warnings.filterwarnings("ignore", message=message)
    logging.getLogger("lightning.pytorch.utilities.rank_zero").addFilter(_is_no_advert)
    # what the packages of quantised weights say where they are imported
    for name in ("torchao", "torch.utils._pytree", "bitsandbytes"):
        logging.getLogger(name).setLevel(logging.ERROR)


def _is_no_advert(record: logging.LogRecord) -> bool:
    return not any(name in record.getMessage() for name in ("litlogger", "litmodels"))
