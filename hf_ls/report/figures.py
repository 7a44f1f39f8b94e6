"""The look which all figures share: colours, style, names of runs, saving.

matplotlib is imported on use, without pyplot: such a Figure always saves
through Agg and leaves the caller's backend alone.
"""

from __future__ import annotations

import io
import math
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hf_ls.common.files import write_atomically
from hf_ls.common.text import one_line
from hf_ls.report.calibration_report import CalibrationReport

if TYPE_CHECKING:
    from matplotlib.figure import Figure

DPI = 150
# After Okabe and Ito 2008, safe for colour-blind readers: one colour a run, lighter with temperature.
PALETTE = (("#0072B2", "#56B4E9"), ("#D55E00", "#E69F00"), ("#009E73", "#66C2A5"), ("#7B3F8C", "#CC79A7"))
INK, GREY, LIGHT = "#222222", "#767676", "#EEEEEE"
Series = list[tuple[float, float]]
_STYLE: dict[str, Any] = {
    "font.family": "DejaVu Sans",
    "font.size": 9.0,
    "axes.titlesize": 9.0,
    "axes.edgecolor": GREY,
    "axes.labelcolor": INK,
    "axes.linewidth": 0.8,
    "axes.axisbelow": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "xtick.color": GREY,
    "ytick.color": GREY,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "text.color": INK,
    "legend.frameon": False,
    "figure.facecolor": "white",
}


@contextmanager
def figure_style() -> Iterator[None]:
    """The project's matplotlib settings, whatever the user's matplotlibrc says."""
    import matplotlib.style

    with matplotlib.style.context(["default", _STYLE]):
        yield


def new_figure(width: float, height: float, hspace: float = 0) -> Figure:
    """An empty figure of so many inches, without pyplot."""
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    rect = (0.01, 0.01, 0.98, 0.98)
    layout = ConstrainedLayoutEngine(rect=rect, w_pad=0.07, h_pad=0.02, wspace=0, hspace=hspace)
    return Figure(figsize=(width, height), layout=layout)


def save_figure(figure: Figure, path: str | os.PathLike[str]) -> Path:
    """Write a PNG in one piece or not at all."""
    buffer = io.BytesIO()
    with figure_style():  # some ticks are only made now
        figure.savefig(buffer, format="png", dpi=DPI)
    return write_atomically(path, buffer.getvalue())


def row_colours(report: CalibrationReport) -> dict[str, str]:
    """Name of a row -> its colour."""
    runs = list(dict.fromkeys(row.run for row in report.rows))
    return {row.name: PALETTE[runs.index(row.run) % len(PALETTE)][row.tempered] for row in report.rows}


def short_name(name: str) -> str:
    """The name of a row as matplotlib must be told it: one line, not too long, nothing read as a formula."""
    text = one_line(name)
    text = text if len(text) <= 28 else text[:27] + "…"
    # An unescaped pair of $ would be read as a formula, and a leading _ would keep it out of legends.
    return text.replace("$", r"\$").replace("_", " _", text.startswith("_"))


def logged_series(records: list[dict[str, Any]], key: str) -> Series:
    """(step, value) of one logged quantity, NaN where it was not a number."""
    points = [(record["step"], record[key]) for record in records if "step" in record and key in record]
    return [(step, math.nan if value is None else value) for step, value in points]
