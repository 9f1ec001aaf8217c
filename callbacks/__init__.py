"""The Lightning callbacks of `dreamblend.callbacks`, by their short names."""

from dreamblend import renamed
from dreamblend.callbacks import *  # noqa: F403
from dreamblend.callbacks import __all__  # noqa: F401

renamed.install(renamed.CALLBACKS)
