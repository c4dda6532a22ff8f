"""Which blocks each MoBA head reads in a held-out document: maps of query against block, and the text.

Legend: S layers with a saved selection, H heads, T queries, J selection slots, Q rows of queries, C blocks.
"""

import numpy as np
from matplotlib.ticker import MaxNLocator

from k2jax.report.page import Panel, Section, Table, printable
from k2jax.report.run_folder import Run, Selections
from k2jax.report.svg import INK, draw, run_letter, spread

MAX_QUERY_ROWS = 96
MAX_LAYERS = 6
MAX_HEADS = 16
_BLUE, _GREY = (0.13, 0.47, 0.80), (0.5, 0.5, 0.5)  # mid tones: legible on a light and on a dark page


def selection_section(runs: list[Run]) -> Section:
    """The section on MoBA for every run that saved selections; says so where none did."""
    panels, tables, notes = [], [], []
    for index, run in enumerate(runs):
        if run.selections is None:
            notes.append(f"Run {run_letter(index)} saved no selections.npz: it has no MoBA layer to map.")
            continue
        shown = spread(len(run.selections.layers_S), max(1, MAX_LAYERS // len(runs)))
        if len(shown) < len(run.selections.layers_S):
            notes.append(f"Run {run_letter(index)}: {len(shown)} of {len(run.selections.layers_S)} MoBA layers drawn.")
        panels += [_panel(run.selections, s, index) for s in shown]
        tables.append(_block_table(run.selections, shown, index))
    text = (
        "A query always reads its own block and the gate picks the rest among earlier ones. Vertical stripes "
        "are blocks that everyone reads (often the first), a band beside the diagonal is local reading, and "
        "scattered cells are retrieval from far back."
        if panels
        else ""
    )
    return Section("moba", "Blocks that MoBA selects", text, notes=notes, panels=panels, folded=tables)


def block_shares(saved: Selections, layer: int, rows: int) -> tuple[np.ndarray, np.ndarray]:
    """How a layer's queries spread over blocks, `rows` groups of neighbouring queries at a time.

    Returns (share of the queries of a group that picked the block through the gate [H, Q, C], whether the
    block is a query's own in that group [Q, C]).
    """
    selected_HTJ = saved.selected_SHTJ[layer]
    heads, queries, _ = selected_HTJ.shape
    blocks = -(-queries // saved.block_size)
    row_T = np.arange(queries) * rows // queries
    size_Q = np.bincount(row_T, minlength=rows)
    share_HQC = np.zeros((heads, rows, blocks))
    h, t, j = np.nonzero(selected_HTJ[:, :, 1:] >= 0)
    np.add.at(share_HQC, (h, row_T[t], selected_HTJ[h, t, j + 1]), 1)
    own_QC = np.zeros((rows, blocks), bool)
    _, t, _ = np.nonzero(selected_HTJ[:, :, :1] >= 0)
    own_QC[row_T[t], selected_HTJ[:, :, 0][selected_HTJ[:, :, 0] >= 0]] = True
    return share_HQC / size_Q[:, None], own_QC


def _panel(saved: Selections, layer: int, index: int) -> Panel:
    heads, queries = saved.selected_SHTJ.shape[1:3]
    share_HQC, own_QC = block_shares(saved, layer, min(MAX_QUERY_ROWS, queries))
    drawn = spread(heads, MAX_HEADS)
    columns = min(4, len(drawn))
    lines = -(-len(drawn) // columns)
    title = f"Run {run_letter(index)}: what the heads of layer {int(saved.layers_S[layer])} read"
    caption = (
        f"One map per head: queries from top to bottom, blocks of {saved.block_size} tokens from left to "
        f"right. Grey: the block a query lies in, always read. Blue: blocks picked by the gate, the stronger "
        f"the more queries of that row picked it. Slots per query: {saved.selected_SHTJ.shape[3]}."
    )
    if len(drawn) < heads:
        caption += f" {len(drawn)} of {heads} heads are drawn."

    def plot(fig):
        axes = fig.subplots(lines, columns, squeeze=False, sharex=True, sharey=True)
        for ax in axes.flat[len(drawn) :]:
            ax.set_visible(False)
        for ax, head in zip(axes.flat, drawn, strict=False):
            ax.imshow(
                _colored(share_HQC[head], own_QC),
                aspect="auto",
                interpolation="none",
                extent=(-0.5, own_QC.shape[1] - 0.5, queries, 0),
            )
            ax.set_title(f"head {head}", color=INK, pad=3)
            ax.spines[["top", "right"]].set_visible(True)
            ax.xaxis.set_major_locator(MaxNLocator(4, integer=True))
            ax.yaxis.set_major_locator(MaxNLocator(4, integer=True))
        fig.supxlabel("block", fontsize=8.5, color=INK)
        fig.supylabel("query position (tokens)", fontsize=8.5, color=INK)

    svg = draw(plot, label=f"Maps of selected blocks. {title}.", height=0.7 + 1.8 * lines)
    return Panel(title, caption, svg)


def _colored(share_QC: np.ndarray, own_QC: np.ndarray) -> np.ndarray:
    """RGBA over a transparent ground; the square root lifts blocks that few queries of a row picked."""
    image = np.zeros((*share_QC.shape, 4))
    image[..., :3] = _BLUE
    image[..., 3] = np.sqrt(np.clip(share_QC, 0, 1))
    only_own = own_QC & (share_QC == 0)
    image[only_own] = (*_GREY, 0.7)
    return image


def _block_table(saved: Selections, shown: list[int], index: int) -> Table:
    """Per block: the share of later queries that picked it (mean over heads), by layer, and how it starts."""
    queries, size = saved.selected_SHTJ.shape[2], saved.block_size
    blocks = -(-queries // size)
    later_C = queries - np.minimum(queries, (np.arange(blocks) + 1) * size)
    share_SC = np.stack([block_shares(saved, s, 1)[0].mean(0)[0] * queries for s in shown])
    share_SC = np.divide(share_SC, later_C, out=np.full(share_SC.shape, np.nan), where=later_C > 0)
    rows = []
    for block in range(blocks):
        shares = ("" if np.isnan(value) else f"{100 * value:.1f}%" for value in share_SC[:, block])
        rows.append((f"{block}", *shares, printable(str(saved.text_C[block])).replace("\n", "⏎").replace("\t", " ")))
    head = ("Block", *(f"layer {int(saved.layers_S[s])}" for s in shown), "Text at its start")
    return Table(
        f"Run {run_letter(index)}: which share of the later queries pick each block (mean over heads)",
        head,
        rows,
        prose=True,
    )
