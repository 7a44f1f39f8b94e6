"""Each test of this folder runs without drawing."""

from blank import blank_figures  # noqa: F401
