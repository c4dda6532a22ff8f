"""Matplotlib figures as inline SVG that takes its colours and its font from the page.

Figures are drawn with placeholder colours, one for each role (ink, grid, run A ...); the SVG text then names
CSS variables in their place, so one picture is right on a light and on a dark page.

Legend: N points of a curve.
"""

import html
import io
import re
import zlib

import matplotlib
import numpy as np
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

INK, MUTED, GRID, ALERT = "#010101", "#020202", "#030303", "#040404"
MAX_RUNS = 8
MAX_POINTS = 400
_RUN = tuple(f"#0a0a{i:02x}" for i in range(MAX_RUNS))
_VARIABLES = {INK: "--ink", MUTED: "--muted", GRID: "--grid", ALERT: "--alert"} | {
    color: f"--run-{i}" for i, color in enumerate(_RUN)
}

_RC = {
    "svg.fonttype": "none",
    "svg.hashsalt": "report",  # the same run folder gives the same page
    "font.family": "DejaVu Sans",  # ships with matplotlib, so the layout does not depend on the machine
    "font.size": 8.5,
    "axes.titlesize": 8.5,
    "axes.edgecolor": MUTED,
    "axes.labelcolor": INK,
    "axes.titlecolor": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.linewidth": 0.6,
    "axes.formatter.useoffset": False,
    "axes.unicode_minus": True,
    "grid.color": GRID,
    "grid.linewidth": 0.5,
    "lines.linewidth": 1.3,
    "lines.solid_joinstyle": "round",
    "text.color": INK,
    "text.parse_math": False,
    "xtick.color": MUTED,
    "xtick.labelcolor": INK,
    "ytick.color": MUTED,
    "ytick.labelcolor": INK,
    "legend.frameon": False,
    "legend.fontsize": 8,
}


def run_color(index: int) -> str:
    """The placeholder colour of run number `index`."""
    return _RUN[index]


def run_letter(index: int) -> str:
    """A, B, C ...: the name of a run inside figures, so that colour is never the only key."""
    return "ABCDEFGH"[index]


def layer_colors(count: int) -> list[str]:
    """`count` hex colours from shallow to deep; the range stays legible on light and on dark."""
    ramp = matplotlib.colormaps["viridis"](np.linspace(0.32, 0.86, max(count, 2)))
    return [matplotlib.colors.to_hex(color) for color in ramp[:count]]


def draw(plot, *, label: str, height: float = 2.7, width: float = 4.6) -> str:
    """Call `plot(fig)` on a fresh figure and return it as an SVG element described by `label`."""
    with matplotlib.rc_context(_RC):
        fig = Figure(figsize=(width, height), layout="constrained")
        FigureCanvasSVG(fig)
        plot(fig)
        buffer = io.StringIO()
        fig.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    return _inline(buffer.getvalue(), label)


def _inline(svg: str, label: str) -> str:
    """Strip what only a stand-alone file needs, make ids unique, hand colours to the page."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r'\sxmlns(:xlink)?="[^"]*"', "", svg)
    view_box = re.search(r'viewBox="[^"]*"', svg).group(0)
    key = f"f{zlib.crc32((label + svg).encode()):08x}"
    svg = re.sub(r'\bid="', f'id="{key}-', svg)
    svg = svg.replace("url(#", f"url(#{key}-").replace('href="#', f'href="#{key}-')
    for color, variable in _VARIABLES.items():
        svg = svg.replace(color, f"var({variable})")
    head = f'<svg {view_box} role="img" aria-label="{html.escape(label)}">'
    return re.sub(r"<svg[^>]*>", lambda _: head, svg, count=1).strip()


def equal_groups(count: int, limit: int) -> list[slice]:
    """At most `limit` slices of one size (the last may be shorter), so that none is smoother than another."""
    size = -(-count // limit)
    return [slice(start, min(start + size, count)) for start in range(0, count, size)]


def thin(x_N: np.ndarray, y_N: np.ndarray, limit: int = MAX_POINTS) -> tuple[np.ndarray, ...]:
    """At most `limit` points: (x, mean, lowest, highest) of neighbours; non-finite values are left out.

    A group with no finite value gives nan, which matplotlib draws as a gap.
    """
    y_N = np.where(np.isfinite(y_N), y_N, np.nan)
    rows = []
    for group in equal_groups(len(x_N), limit):
        finite = y_N[group][~np.isnan(y_N[group])]
        stats = (finite.mean(), finite.min(), finite.max()) if finite.size else (np.nan,) * 3
        rows.append((x_N[group].mean(), *stats))
    return tuple(np.asarray(rows).T)


def spread(count: int, limit: int) -> list[int]:
    """At most `limit` of `count` places, the first and the last among them, evenly apart."""
    return sorted(set(np.linspace(0, count - 1, min(count, limit)).round().astype(int).tolist()))


def count_text(value: float) -> str:
    """1234567 -> '1.23M': three significant digits with K, M, B or T."""
    for size, unit in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "K")):
        if abs(value) >= size:
            return f"{value / size:.3g}{unit}"
    return f"{value:.3g}"


def style_axes(ax, x_name: str, y_name: str) -> None:
    """Grid, names with units, and counts written as 10K or 3M along x."""
    ax.set_xlabel(x_name)
    ax.set_ylabel(y_name)
    ax.grid(axis="y")
    ax.set_axisbelow(True)
    ax.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    ax.xaxis.set_major_formatter(FuncFormatter(lambda value, _: count_text(value)))


def log_scale(ax, value_N: np.ndarray) -> None:
    """A logarithmic y axis with plain numbers, where values are positive and span enough for one to help."""
    finite = value_N[np.isfinite(value_N) & (value_N > 0)]
    if not finite.size or finite.max() < 4 * finite.min():
        return
    ax.set_yscale("log")
    ax.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if finite.max() < 200 * finite.min() else (1,)))
    ax.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    ax.yaxis.set_minor_formatter(NullFormatter())


def label_ends(ax, ends: list[tuple[int, float]]) -> None:
    """Each run's letter right of the axes at the height of its last value, moved apart where they touch."""
    right = ax.get_xlim()[1]
    to_axes = ax.transData + ax.transAxes.inverted()
    heights = [(to_axes.transform((right, y))[1], index) for index, y in ends if np.isfinite(y)]
    top = -np.inf
    for height, index in sorted(heights):
        top = max(min(max(height, 0), 1), top + 0.06)  # of the height of the axes: a little more than a letter
        ax.text(
            1.012,
            top,
            run_letter(index),
            transform=ax.transAxes,
            color=run_color(index),
            va="center",
            weight="bold",
        )
