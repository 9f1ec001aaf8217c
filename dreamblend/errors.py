"""The one exception for what a user can mend, and how to know that another process is gone."""

from __future__ import annotations


class InputError(ValueError):
    """A wrong input, told in one sentence that names the file or setting and the mend.

    The entry points print the sentence without a traceback and exit with status 2.
    """


def is_lost_process(error: BaseException) -> bool:
    """Whether torch's communication failed, as it does where another process of the same run has ended."""
    said = f"{type(error).__name__} {error}"
    return any(word in said for word in ("DistBackendError", "DistNetworkError", "gloo", "Connection closed by peer"))


def cause(error: BaseException) -> BaseException:
    """What this process itself failed of: the error during whose handling communication failed, where there is one, and else `error`."""
    earlier, found = error, error
    while (earlier := earlier.__cause__ or earlier.__context__) is not None:
        if is_lost_process(found) and not is_lost_process(earlier):
            found = earlier
    return found
