"""The training report: run folders in, one self-contained HTML page out."""

from collections.abc import Sequence
from pathlib import Path

from k2jax.report.curves import bits_panel, loss_panel, overlay_panel, x_axis
from k2jax.report.maps import load_panels, logit_panels
from k2jax.report.moba import selection_section
from k2jax.report.page import Section, render, write_page
from k2jax.report.run_folder import Run, RunFolderError, load_run
from k2jax.report.summary import config_table, difference_table, summary_table
from k2jax.report.svg import MAX_RUNS, run_letter

SAMPLE_CHARACTERS = 8000


def write_report(workdirs: Sequence[Path], output: Path | None = None) -> Path:
    """Write the page that shows these runs together and return its path.

    `output` defaults to report.html in the first run folder; the file is replaced whole. Raises
    RunFolderError (a ValueError) for a folder without records, a corrupt file, no folder, or more than 8.
    """
    paths = [Path(workdir) for workdir in workdirs]
    if not 1 <= len(paths) <= MAX_RUNS:
        raise RunFolderError(f"workdir: got {len(paths)} run folders, expected 1 to {MAX_RUNS}. Name fewer of them.")
    runs = [load_run(path) for path in paths]
    return write_page(training_page(runs), Path(output) if output else paths[0] / "report.html")


def training_page(runs: Sequence[Run]) -> str:
    """The whole page as text."""
    labels = _labels(runs)
    title = f"Training report: {labels[0]}" if len(runs) == 1 else f"Training report: {len(runs)} runs"
    sections = [
        _summary_section(runs),
        _loss_section(runs),
        _optimizer_section(runs),
        _logit_section(runs),
        _load_section(runs),
        _throughput_section(runs),
        selection_section(list(runs)),
        _sample_section(runs),
        Section("config", "Settings", folded=[config_table(run, i) for i, run in enumerate(runs) if run.config]),
    ]
    return render(title, [(run_letter(i), label) for i, label in enumerate(labels)], sections)


def _labels(runs: Sequence[Run]) -> list[str]:
    """Folder names, or whole paths where two runs share a name."""
    names = [run.path.resolve().name for run in runs]
    return [name if names.count(name) == 1 else str(run.path) for name, run in zip(names, runs, strict=True)]


def _summary_section(runs) -> Section:
    notes = [f"Run {run_letter(i)}: {note}" for i, run in enumerate(runs) for note in run.notes]
    difference = difference_table(runs)
    text = "The configs of the runs are the same." if len(runs) > 1 and difference is None else ""
    tables = [summary_table(runs)] + ([difference] if difference else [])
    return Section("summary", "Summary", text, notes=notes, tables=tables)


def _loss_section(runs) -> Section:
    x = x_axis(runs)
    notes = [] if x == "tokens" else ['Not every line logs "tokens", so losses are drawn against steps.']
    return Section("loss", "Loss", notes=notes, panels=[loss_panel(runs, x), bits_panel(runs, x)])


def _optimizer_section(runs) -> Section:
    panels = [
        overlay_panel(
            runs,
            "lr",
            title="Learning rate: should follow its schedule",
            y_name="learning rate",
            caption="Warm-up, plateau and decay as configured; a jump says that a resume lost its place.",
        ),
        overlay_panel(
            runs,
            "grad_norm",
            title="Gradient norm: should stay bounded",
            y_name="global gradient norm",
            log=True,
            caption="Norm over all parameters before any clipping. Sudden peaks come before loss spikes.",
        ),
        overlay_panel(
            runs,
            "update_norm",
            title="Update norm: should follow the learning rate",
            y_name="global update norm",
            log=True,
            caption="Norm of what the optimizer adds to the parameters. Muon fixes the size of its "
            "update, so this curve has the shape of the schedule.",
        ),
    ]
    return Section("optimizer", "Learning rate, gradients and updates", panels=panels)


def _logit_section(runs) -> Section:
    panels = [
        overlay_panel(
            runs,
            "max_logit",
            title="Max logits: should settle at or below the threshold",
            y_name="max logit",
            thresholds=True,
            caption="Largest attention logit of any head, after the scale and before softmax. Dashed: the "
            "QK-Clip threshold of a MuonClip run.",
        ),
        overlay_panel(
            runs,
            "clipped_fraction",
            title="Clipped heads: QK-Clip should act early, then rest",
            y_name="heads clipped (%)",
            from_zero=True,
            percent=True,
            caption="Share of heads above the threshold, whose query and key weights were rescaled.",
        ),
    ]
    for i, run in enumerate(runs):
        panels += logit_panels(run, i)
    notes = [f"Run {run_letter(i)} logged no max logits by head." for i, run in enumerate(runs) if not run.max_logits]
    return Section("logits", "Max logits and QK-Clip", notes=notes, panels=panels)


def _load_section(runs) -> Section:
    panels = [
        overlay_panel(
            runs,
            "load_max_over_mean",
            title="Expert load: should come close to even",
            y_name="max / mean load",
            caption="Busiest expert over an even share, in the worst MoE layer. 1 is perfect balance.",
        ),
        overlay_panel(
            runs,
            "balance_loss",
            title="Balance loss: should fall early and stay down",
            y_name="balance loss",
            caption="Auxiliary loss on the balance of experts within a sequence.",
        ),
    ]
    for i, run in enumerate(runs):
        panels += load_panels(run, i, len(runs))
    missing = [i for i, run in enumerate(runs) if not run.expert_load_NME.size]
    notes = [f"Run {run_letter(i)} logged no load by expert: it has no MoE layer, or none was due." for i in missing]
    return Section("load", "Expert load", notes=notes, panels=panels)


def _throughput_section(runs) -> Section:
    panels = [
        overlay_panel(
            runs,
            "tokens_per_second",
            title="Tokens per second: should stay level",
            y_name="tokens / s",
            from_zero=True,
            caption="Dips that come back regularly are evaluations, checkpoints or slow input.",
        ),
        overlay_panel(
            runs,
            "step_time",
            title="Step time: should stay level after the first step",
            y_name="step time (s)",
            log=True,
            caption="Seconds per step, without compilation. The first one may still load programs.",
        ),
        overlay_panel(
            runs,
            "mfu",
            title="Model FLOPs utilisation: higher is better",
            y_name="MFU (%)",
            from_zero=True,
            percent=True,
            caption="FLOPs that the model needs, as a share of the peak of the hardware.",
        ),
        overlay_panel(
            runs,
            "goodput",
            title="Goodput: should approach 100%",
            y_name="goodput (%)",
            from_zero=True,
            percent=True,
            caption="Share of the time since the process started that went into steps; the rest is start-up, "
            "compilation, evaluation and checkpoints. A resumed run counts anew.",
        ),
    ]
    return Section("throughput", "Throughput", panels=panels)


def _sample_section(runs) -> Section:
    samples, notes = [], []
    for i, run in enumerate(runs):
        if run.sample is None:
            notes.append(f"Run {run_letter(i)} has no sample.txt.")
            continue
        samples.append((f"Run {run_letter(i)}", run.sample[:SAMPLE_CHARACTERS]))
        if len(run.sample) > SAMPLE_CHARACTERS:
            notes.append(f"Run {run_letter(i)}: the first {SAMPLE_CHARACTERS} of {len(run.sample)} characters.")
    return Section("sample", "Generated text", notes=notes, preformatted=samples)
