"""The training report: what the page holds, and what happens to run folders that are damaged or hostile.

Legend: S MoBA layers, H heads, T queries, J selection slots.
"""

import json
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

from experiments.report import main
from k2jax.report.moba import block_shares
from k2jax.report.run_folder import RunFolderError, Selections, load_run
from k2jax.report.summary import flatten
from k2jax.report.svg import equal_groups, thin
from k2jax.report.training import write_report

SECTIONS = ["summary", "loss", "optimizer", "logits", "load", "throughput", "moba", "sample", "config"]
HEADS, EXPERTS = 4, 8


def make_config(**optimizer) -> dict:
    return {
        "model": {"dim": 128, "num_layers": 4, "heads": HEADS, "experts": EXPERTS},
        "optimizer": {"name": "muonclip", "lr": 0.02, "tau": 30.0} | optimizer,
        "data": {"source": "stdlib", "seq_len": 512},
        "train": {"steps": 300, "seed": 0},
    }


def make_records(steps: int = 300, seed: int = 0) -> list[dict]:
    """As train would log it: a falling loss, a spike, a skipped step, logits that meet tau, a lazy expert."""
    rng = np.random.default_rng(seed)
    records = []
    for step in range(1, steps + 1):
        progress = step / steps
        loss = 1.3 + 4.2 * np.exp(-progress * 7) + 0.05 * rng.normal() + (1.5 if step == steps // 2 else 0)
        logits = 8 + 30 * np.minimum(progress * 2, 0.9) * np.linspace(0.2, 1, 4 * HEADS).reshape(4, HEADS)
        load = np.array([0.3, 0.05, *[0.65 / 6] * 6]) * np.exp(0.2 * rng.normal(size=(3, EXPERTS)))
        load = (1 - progress) * load + progress / EXPERTS
        load /= load.sum(1, keepdims=True)
        record = {
            "step": step,
            "tokens": step * 8192,
            "loss": loss,
            "balance_loss": 1.0 + 0.2 * np.exp(-progress * 5),
            "lr": 0.02 * min(step / 20, 1) * (1 - 0.9 * max(0.0, progress - 0.7) / 0.3),
            "grad_norm": 0.4 + np.exp(-progress * 9) + 0.05 * abs(rng.normal()),
            "update_norm": 0.9 * min(step / 20, 1),
            "max_logit": float(logits.max()),
            "clipped_fraction": float((logits > 30).mean()),
            "load_max_over_mean": float(load.max() * EXPERTS),
            "skipped": int(step == steps // 3),
            "spike": int(step == steps // 2),
            "step_time": (9.0 if step == 1 else 0.4) + 0.02 * rng.random(),
            "tokens_per_second": 8192 / (0.4 + 0.02 * rng.random()),
            "mfu": 0.31 + 0.01 * rng.normal(),
            "goodput": 0.9 * progress + 0.05,
        }
        if step % 5 == 0 or step == 1:
            record["max_logits"] = {"dense": logits[:1].tolist(), "moe": logits[1:].tolist()}
            record["expert_load"] = load.tolist()
        if step % (steps // 6) == 0:
            record["eval/loss"] = loss + 0.05
            record["eval/bits_per_byte"] = (loss + 0.05) / np.log(2)
        records.append(record)
    return records


def brief_records(steps: int = 12) -> list[dict]:
    """The few keys that make few figures, for tests of what is around the figures."""
    keys = ("step", "tokens", "loss", "eval/loss", "eval/bits_per_byte")
    return [{key: record[key] for key in keys if key in record} for record in make_records(steps)]


def make_selections(block_size: int = 32, queries: int = 1000) -> dict:
    """Two layers, four heads: the current block, the first one, and one at random among the earlier ones."""
    rng = np.random.default_rng(1)
    own_T = np.arange(queries) // block_size
    selected_SHTJ = np.full((2, HEADS, queries, 3), -1, np.int32)
    selected_SHTJ[..., 0] = own_T
    selected_SHTJ[..., 1] = np.where(own_T > 0, 0, -1)
    pick = (rng.random((2, HEADS, queries)) ** (1 + np.arange(HEADS))[:, None] * own_T).astype(np.int32)
    selected_SHTJ[..., 2] = np.where(pick > 0, pick, -1)
    text = ("def add(a, b):\n    return a + b  # <b>&amp;</b>\n" * 50)[:queries]
    return {
        "selected": selected_SHTJ,
        "layers": np.array([1, 3]),
        "text": np.array([text[i : i + block_size] for i in range(0, queries, block_size)]),
        "block_size": block_size,
    }


def make_run(path: Path, *, config=None, records=None, selections=True, sample="for x in range(10):") -> Path:
    path.mkdir(parents=True)
    (path / "config.json").write_text(json.dumps(make_config() if config is None else config))
    lines = [json.dumps(record) for record in (make_records(60) if records is None else records)]
    (path / "metrics.jsonl").write_text("".join(line + "\n" for line in lines))
    if selections:
        np.savez(path / "selections.npz", **make_selections())
    if sample is not None:
        (path / "sample.txt").write_text(sample)
    return path


class Reader(HTMLParser):
    """Collects elements, ids, text, and whatever makes a browser fetch or run something."""

    VOID = frozenset({"meta", "br", "hr", "img", "link", "input"})

    def __init__(self, page: str):
        super().__init__()
        self.tags, self.ids, self.texts, self.fetched, self.open = [], [], [], [], []
        self.svgs = []
        self.feed(page)
        self.close()

    def handle_starttag(self, tag, attributes):
        names = dict(attributes)
        self.tags.append(tag)
        self.ids += [names["id"]] if "id" in names else []
        self.svgs += [names] if tag == "svg" else []
        for name in ("src", "href", "xlink:href", "action", "data", "srcset"):
            value = names.get(name, "#")
            if not value.startswith(("#", "data:image/png;base64,")):
                self.fetched.append((tag, name, value))
        self.fetched += [(tag, name, value) for name, value in attributes if name.startswith("on")]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.handle_starttag(tag, attributes)
        if tag not in self.VOID:
            self.open.pop()

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.texts.append(data)


def read_page(path: Path) -> tuple[str, Reader, str]:
    page = path.read_text(encoding="utf-8")
    reader = Reader(page)
    assert reader.open == []
    return page, reader, " ".join(reader.texts)


@pytest.fixture(scope="module")
def one(tmp_path_factory):
    """The page of one whole run, as (markup, elements, text)."""
    run = make_run(tmp_path_factory.mktemp("report") / "nano", records=make_records(300))
    path = write_report([run])
    assert path == run / "report.html"
    return read_page(path)


def test_page_needs_nothing_from_outside(one):
    page, reader, _ = one
    assert reader.fetched == []
    assert not {"script", "link", "iframe", "object", "embed", "img", "base", "form"} & set(reader.tags)
    assert not re.search(r"https?://|//[a-z]+\.|@import|url\((?!#)", page)
    assert "default-src 'none'" in page
    assert len(page) < 3_000_000


def test_every_section_and_figure_is_present(one):
    _, reader, text = one
    assert [key for key in reader.ids if key in SECTIONS] == SECTIONS
    for title in (
        "Loss: should",
        "Bits per byte: should",
        "Learning rate: should",
        "Gradient norm:",
        "Update norm:",
        "Max logits:",
        "Clipped heads:",
        "the largest max logit of each layer",
        "max logit of every layer and head",
        "Expert load:",
        "load of every expert, moe 0",
        "Tokens per second:",
        "Step time:",
        "FLOPs utilisation:",
        "Goodput:",
        "what the heads of layer 1 read",
        "what the heads of layer 3 read",
        "for x in range(10):",
    ):
        assert title in text, title
    assert "No run logged" not in text


def test_figures_are_described_and_their_ids_are_unique(one):
    _, reader, _ = one
    assert len(reader.svgs) >= 17
    assert all(svg["role"] == "img" and len(svg["aria-label"]) > 30 for svg in reader.svgs)
    assert len(set(reader.ids)) == len(reader.ids)


def test_references_inside_figures_point_at_ids_that_exist(one):
    page, reader, _ = one
    wanted = set(re.findall(r'(?:xlink:href|href)="#([^"]+)"|url\(#([^)]+)\)', page))
    assert {a or b for a, b in wanted} <= set(reader.ids)


def test_colours_come_from_the_page_so_that_dark_mode_works(one):
    page, _, _ = one
    assert "prefers-color-scheme: dark" in page
    assert "var(--run-0)" in page
    assert "var(--ink)" in page
    assert not re.search(r"#(010101|020202|030303|040404|0a0a0[0-7])\b", page)
    assert set(re.findall(r"var\((--[a-z0-9-]+)\)", page)) <= set(re.findall(r"(--[a-z0-9-]+):", page))


def test_spikes_and_skipped_steps_are_counted_on_the_loss_figure(one):
    _, _, text = one
    assert "run A spikes: 1" in text
    assert "run A skipped steps: 1" in text


def test_threshold_is_drawn_only_for_muonclip(tmp_path, one):
    assert "threshold τ = 30" in one[2]
    adam = make_run(tmp_path / "adam", config=make_config(name="adamw"))
    assert "threshold τ = 30" not in read_page(write_report([adam]))[2]


def test_summary_shows_the_numbers_of_the_log(tmp_path):
    records = make_records(60)
    _, _, text = read_page(write_report([make_run(tmp_path / "run", records=records)]))
    bits = [(r["eval/bits_per_byte"], r["step"]) for r in records if "eval/bits_per_byte" in r]
    assert f"{bits[-1][0]:.4f}" in text
    assert f"{min(bits)[0]:.4f} (step {min(bits)[1]})" in text
    assert f"{sum(r['step_time'] for r in records):.1f} s" in text
    assert "492K" in text  # 60 steps of 8192 tokens


def test_two_runs_overlay_with_a_table_of_what_differs(tmp_path):
    a = make_run(tmp_path / "first")
    b = make_run(tmp_path / "second", config=make_config(name="adamw", lr=0.003), records=make_records(60, seed=7))
    page, reader, text = read_page(write_report([a, b], tmp_path / "out" / "both.html"))
    assert reader.fetched == []
    assert "first" in text
    assert "second" in text
    assert "var(--run-1)" in page
    differences = page.split("Config fields that differ between the runs</caption>")[1].split("</table>")[0]
    assert re.findall(r'<th scope="row">([^<]+)</th>', differences) == ["optimizer.name", "optimizer.lr"]
    assert "0.003" in differences
    assert not (a / "report.html").exists()


def test_runs_with_one_config_and_one_name_are_told_apart(tmp_path):
    runs = [make_run(tmp_path / side / "nano", records=brief_records(), selections=False) for side in ("left", "right")]
    _, _, text = read_page(write_report(runs))
    assert "The configs of the runs are the same." in text
    assert str(runs[0]) in text
    assert str(runs[1]) in text


def test_hostile_text_stays_text(tmp_path):
    evil = "</pre><script>alert(1)</script><img src=http://evil.example/x onerror=alert(2)>\x1b[2J\x00"
    config = make_config() | {"<script>key</script>": "</td><script>value</script>"}
    run = make_run(tmp_path / "<img src=x onerror=alert(3)>", sample=evil, config=config, records=brief_records())
    page, reader, text = read_page(write_report([run]))
    assert "script" not in reader.tags
    assert "img" not in reader.tags
    assert reader.fetched == []
    assert "<script>alert(1)</script>" in text
    assert "<img src=x onerror=alert(3)>" in text
    assert "<b>&amp;</b>" in text  # from the document in selections.npz
    assert "\x1b" not in page
    assert "\x00" not in page


def test_truncated_last_line_is_a_note(tmp_path):
    run = make_run(tmp_path / "run", records=make_records(20))
    log = run / "metrics.jsonl"
    log.write_bytes(log.read_bytes()[:-40])
    assert load_run(run).last_step == 19
    assert "last line of metrics.jsonl (line 20) is incomplete" in read_page(write_report([run]))[2]


def test_corrupt_middle_line_names_file_and_line(tmp_path):
    run = make_run(tmp_path / "run", records=make_records(20))
    lines = (run / "metrics.jsonl").read_text().splitlines()
    for damaged in ('{"step": 7, "loss": ', "[7, 1.5]", "", "\x00" * 20):
        (run / "metrics.jsonl").write_text("\n".join([*lines[:6], damaged, *lines[7:]]) + "\n")
        with pytest.raises(RunFolderError, match=r"metrics\.jsonl, line 7"):
            write_report([run])
    assert not (run / "report.html").exists()


@pytest.mark.parametrize("bad", [{"loss": "low"}, {"max_logits": {"moe": [1.0]}}, {"expert_load": [[1], [1, 2]]}])
def test_value_of_the_wrong_kind_names_file_line_and_key(tmp_path, bad):
    records = make_records(20)
    records[6] = {"step": 7, **bad}
    with pytest.raises(RunFolderError, match=r"metrics\.jsonl, line 7: .*" + next(iter(bad))):
        load_run(make_run(tmp_path / "run", records=records))


def test_missing_folder_log_or_records_name_the_path_and_the_command(tmp_path):
    empty = make_run(tmp_path / "empty", records=[])
    bare = tmp_path / "bare"
    bare.mkdir()
    for path in (tmp_path / "absent", bare, empty):
        with pytest.raises(RunFolderError, match=f"{path.name}.*experiments.train --config=configs/nano.py"):
            write_report([path])


def test_log_without_optional_keys_still_makes_a_page(tmp_path):
    run = make_run(tmp_path / "run", records=[{"step": 1}, {"step": 2, "loss": 5.0}], selections=False, sample=None)
    (run / "config.json").unlink()
    _, reader, text = read_page(write_report([run]))
    assert [key for key in reader.ids if key in SECTIONS] == SECTIONS
    assert "No run logged a finite value of lr" in text
    assert "no MoBA layer" in text
    assert "There is no config.json" in text
    assert 'Not every line logs "tokens"' in text


def test_run_killed_before_its_first_evaluation(tmp_path):
    text = read_page(write_report([make_run(tmp_path / "run", records=make_records(60)[:4])]))[2]
    assert "No evaluation logged yet by A" in text


def test_nan_losses_are_marked(tmp_path):
    records = make_records(60)
    for record in records[40:]:
        record |= {"loss": float("nan"), "grad_norm": float("inf")}
        if "max_logits" in record:
            record["max_logits"]["moe"][0][0] = None
    text = read_page(write_report([make_run(tmp_path / "run", records=records)]))[2]
    assert "run A losses not finite: 20" in text


def test_run_in_which_nothing_is_finite(tmp_path):
    records = [{"step": n, "tokens": n, "loss": float("nan"), "max_logits": {"dense": [[None]]},
                "expert_load": [[None, None]]} for n in (1, 2)]  # fmt: skip
    text = read_page(write_report([make_run(tmp_path / "run", records=records)]))[2]
    assert "No finite value to draw" in text


def test_repeated_step_is_noted_and_the_later_line_kept(tmp_path):
    run = load_run(
        make_run(tmp_path / "run", records=[{"step": s, "loss": s * 1.0 + n} for n, s in enumerate((1, 2, 2))])
    )
    assert run.curves["loss"].value.tolist() == [1.0, 4.0]
    assert "logged twice (first: step 2)" in run.notes[0]


@pytest.mark.parametrize(
    "change",
    [
        {"selected": np.full((2, HEADS, 1000, 3), 99)},
        {"layers": np.arange(3)},
        {"text": np.array(["too", "few"])},
        {"text": np.zeros(32, np.uint8)},
        {"selected": np.zeros((2, HEADS, 1000, 3))},
        {"block_size": 0},
        {"text": None},
    ],
)
def test_selections_that_make_no_sense_name_the_file(tmp_path, change):
    run = make_run(tmp_path / "run")
    np.savez(run / "selections.npz", **{k: v for k, v in (make_selections() | change).items() if v is not None})
    with pytest.raises(RunFolderError, match=r"selections\.npz"):
        load_run(run)
    (run / "selections.npz").write_bytes(b"PK\x03\x04 not a zip")
    with pytest.raises(RunFolderError, match=r"selections\.npz"):
        load_run(run)


def test_a_wrong_byte_in_selections_is_told_or_does_no_harm(tmp_path):
    run = make_run(tmp_path / "run", records=brief_records())
    np.savez_compressed(run / "selections.npz", **make_selections())
    whole = (run / "selections.npz").read_bytes()
    told = 0
    for place in range(0, len(whole), 3):  # As the trainer writes it: a wrong byte breaks the compression too.
        (run / "selections.npz").write_bytes(whole[:place] + bytes([whole[place] ^ 0x55]) + whole[place + 1 :])
        try:
            load_run(run)
        except RunFolderError as error:
            told += "selections.npz" in str(error)
    assert told > len(whole) / 6


def test_block_shares_count_gate_picks_and_leave_the_own_block_out():
    selected_SHTJ = np.array([[[[0, -1], [0, -1], [1, 0], [1, -1], [2, 1], [2, 0]]]], np.int32)
    saved = Selections(selected_SHTJ, np.array([0]), np.zeros(6, np.uint8), block_size=2)
    share_HQC, own_QC = block_shares(saved, 0, 3)
    np.testing.assert_array_equal(share_HQC, [[[0, 0, 0], [0.5, 0, 0], [0.5, 0.5, 0]]])
    np.testing.assert_array_equal(own_QC, np.eye(3, dtype=bool))


def test_thin_keeps_extremes_and_shows_gaps():
    y = np.arange(1000.0)
    y[500] = 9e9
    y[:100] = np.nan
    assert {s.stop - s.start for s in equal_groups(200, 120)} == {2}
    x, mean, low, high = thin(np.arange(1000), y, 100)
    assert len(x) == 100
    assert np.isnan(mean[:10]).all()
    assert low[10] == 100
    assert high[50] == 9e9


def test_threshold_is_in_view_or_said_to_be_above_it(tmp_path):
    for tau, peak in ((30.0, 20.0), (30.0, 400.0), (30.0, 1.0)):
        records = [{"step": n, "max_logit": peak + n / 100} for n in range(1, 4)]
        run = make_run(tmp_path / f"{peak}", config=make_config(tau=tau), records=records, selections=False)
        page, _, text = read_page(write_report([run]))
        assert ("threshold τ = 30 is above this view" in text) == (peak == 1.0)
        assert ("stroke-dasharray" in page) == (peak != 1.0)


def test_flatten_names_nested_fields():
    assert flatten({"a": {"b": {"c": 1}, "d": [1, 2]}, "e": {}}) == {"a.b.c": 1, "a.d": [1, 2], "e": {}}


def test_same_folder_gives_the_same_page_and_leaves_no_partial_file(tmp_path):
    run = make_run(tmp_path / "run", records=brief_records(), selections=False)
    first = write_report([run]).read_bytes()
    assert write_report([run]).read_bytes() == first
    assert sorted(p.name for p in run.iterdir()) == [
        "config.json",
        "metrics.jsonl",
        "report.html",
        "sample.txt",
    ]


def test_command_line_writes_the_page_and_says_what_is_wrong(tmp_path, capsys):
    runs = [make_run(tmp_path / name, records=brief_records(), selections=False) for name in "ab"]
    output = tmp_path / "page.html"
    main([f"--workdir={runs[0]},{runs[1]}", f"--output={output}"])
    assert capsys.readouterr().out.strip() == str(output)
    assert "2 runs" in output.read_text(encoding="utf-8")
    with pytest.raises(SystemExit, match=r"report: workdir .*absent is not a folder"):
        main([f"--workdir={tmp_path / 'absent'}"])


def test_report_loads_no_jax_and_no_pyplot():
    code = (
        "import sys, k2jax.report.training;"
        "print([name for name in ('jax', 'matplotlib.pyplot') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
