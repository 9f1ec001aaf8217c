"""The one exception for what a user can mend."""


class InputError(ValueError):
    """A wrong input, told in one sentence that names the file or setting and the mend.

    The entry points print the sentence without a traceback and exit with status 2.
    """
