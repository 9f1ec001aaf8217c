"""Errors as one sentence: what a user can correct, what a library reports, and whether another
process was lost.
"""

from __future__ import annotations

import errno
import re

WORDS = 400  # characters of a library's message: some list every option


class InputError(ValueError):
    """A wrong input. Its sentence names the file or setting, and says what to do.

    The entry points print the sentence without a traceback and exit with status 2.
    """


_LOST = re.compile(
    r"Connection (closed|reset) by peer|Connection refused|Connection was likely closed|Broken"
    r" pipe|Socket closed|remote process has exited|"
    r"[Tt]im(ed out|eout)|connectFullMesh failed|failed to connect"
)
_TRANSPORT = re.compile(r"gloo|c10d|NCCL|TCPStore", re.IGNORECASE)


def is_lost_process(error: BaseException) -> bool:
    """Whether torch lost its connection to another process of the same run, which happens when that
    process ends.

    Other errors of torch's communication, such as tensors of different sizes, do not count.
    """
    from torch.distributed import DistNetworkError

    if isinstance(error, DistNetworkError):
        return True
    text = f"{type(error).__name__} {error}"
    return isinstance(error, RuntimeError) and bool(_TRANSPORT.search(text) and _LOST.search(text))


def cause(error: BaseException) -> BaseException:
    """The error of this process itself. If communication failed while another error was handled,
    it is that other error; else it is `error`.
    """
    first, earlier = error, error.__cause__ or error.__context__
    while earlier is not None:
        if is_lost_process(first) and not is_lost_process(earlier):
            first = earlier
        earlier = earlier.__cause__ or earlier.__context__
    return first


def explained(error: BaseException) -> str | None:
    """One sentence for an error that comes from the user's settings or machine, with what to do.
    None if it is a bug.

    Lightning, diffusers, transformers and torch report wrong settings by exceptions of these types.
    """
    import torch
    from lightning.fabric.utilities.exceptions import MisconfigurationException

    message = one_line(error)
    if isinstance(error, ImportError) and "cannot import name" not in message:
        missing = (
            (error.name or "").partition(".")[0] if isinstance(error, ModuleNotFoundError) else ""
        )
        if missing in ("dreamblend", "callbacks", "benchmarks"):
            return None
        return (
            f"{missing} is not installed: pip install {missing}, or leave out the setting that"
            " needs it"
            if missing
            else f"a package is missing: {message}"
        )
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)) or re.search(
        "out of memory|can't allocate memory", message
    ):
        return (
            "out of memory: lower data.batch_size (in training with as much more"
            " trainer.accumulate_grad_batches), or set trainer.precision,"
            f" model.gradient_checkpointing or model.dtype to what needs less ({message[:120]})"
        )
    if isinstance(error, OSError):
        where = f"{error.filename}: " if error.filename else ""
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            return (
                f"{where}no space is left on the disk: make room, and run the same command to go on"
            )
        if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
            return f"{where}{error.strerror}: give a place where this user may read and write"
        return f"{where}{error.strerror}" if error.filename and error.strerror else message
    if (
        isinstance(error, MisconfigurationException)
        or isinstance(error, (ValueError, RuntimeError))
        and raised_by(error).startswith("lightning.")
    ):
        return f"these settings cannot be used: {message}"
    return None


def raised_by(error: BaseException) -> str:
    """The name of the module whose code raised an exception."""
    place = error.__traceback__
    while place is not None and place.tb_next is not None:
        place = place.tb_next
    return "" if place is None else place.tb_frame.f_globals.get("__name__", "")


def one_line(error: BaseException | str) -> str:
    """The message of an exception on one line, cut off after `WORDS` characters."""
    text = " ".join(condensed(str(error)).split()) or type(error).__name__
    return text if len(text) <= WORDS else f"{text[:WORDS]} ..."


# jsonargparse's lines about the types it tried and their formats
_TRIED = re.compile(
    r"Does not validate against|Subtypes: |Errors:$|Expected a path but|Given value type: |Subclass"
    r" types expect|a class path \(str\)|"
    r"a dict with"
)


def condensed(message: str) -> str:
    """jsonargparse's message without the types that it tried: the option, what is wrong with it,
    and the given value.
    """
    lines = [line.strip(" -") for line in message.splitlines()]
    if not any(_TRIED.match(line) for line in lines) and not message.startswith("Parser key"):
        return message
    key = re.match(r'Parser key "([^"]+)":? *', message)
    lines[0] = lines[0].removeprefix(key[0].strip()).strip() if key else lines[0]
    faults = [
        line.rstrip(":")
        for line in lines
        if line
        and not _TRIED.match(line)
        and not line.startswith(("Given value: ", "Expected a <class 'NoneType'>"))
    ]
    faults = list(
        dict.fromkeys(
            [
                line
                for line in faults
                if not line.startswith(("Expected a <class", "Not a valid subclass"))
            ]
            or faults
        )
    )
    given = [
        line
        for line in lines
        if line.startswith("Given value: ")
        and "Namespace(" not in line
        and line[13:] not in " ".join(faults)
    ]
    return "; ".join([(f"--{key[1]}: " if key else "") + ": ".join(faults), *given])
