"""The earlier name of ``sample``, for scripts that import it."""

from .sample import *  # noqa: F403
