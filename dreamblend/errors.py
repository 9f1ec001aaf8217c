"""The one exception for what a user can mend, and how to know that another process is gone."""


class InputError(ValueError):
    """A wrong input, told in one sentence that names the file or setting and the mend.

    The entry points print the sentence without a traceback and exit with status 2.
    """


def is_lost_process(error: BaseException) -> bool:
    """Whether torch's communication failed, as it does where another process of the same run has ended."""
    said = f"{type(error).__name__} {error}"
    return any(word in said for word in ("DistBackendError", "DistNetworkError", "gloo", "Connection closed by peer"))
