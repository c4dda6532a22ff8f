"""The comparison of optimizers keeps scales apart and finds the share of tokens that Muon needs."""

import json

import pytest

from benchmarks import optimizers
from k2jax.config import load_config


def sweep(folder, points):
    """A finished sweep as `experiments.sweep` leaves it: (settings, steps, held-out loss) of every point."""
    listed = []
    for i, (settings, steps, loss) in enumerate(points):
        (folder / f"point{i}").mkdir()
        lines = [{"step": s, "loss": 5.0 - s / 100, "tokens": 100 * s} for s in range(1, steps + 1)]
        (folder / f"point{i}" / "metrics.jsonl").write_text("\n".join(map(json.dumps, lines)) + "\n")
        (folder / f"point{i}" / "log.txt").write_text("devices: 1 x Some GPU; peak 1 TFLOP/s\n")
        point = {"point": f"point{i}", "status": "finished", "bits_per_byte": loss / 2, "held_out_loss": loss}
        listed.append(point | {"max_logit": 9.0, "steps": steps, "settings": settings})
    (folder / "sweep.json").write_text(json.dumps({"config": "configs/optimizers.py", "points": listed}))


def point(optimizer, lr, **more):
    return {"optimizer": optimizer, "lr": lr, **more}


def test_scales_have_their_own_best_runs_and_share_of_tokens(tmp_path):
    sweep(
        tmp_path,
        [
            (point("muonclip", 0.004, scale="medium"), 50, 2.0),
            (point("adamw", 0.001, scale="medium"), 50, 2.5),
            (point("muonclip", 0.004), 50, 3.0),
            (point("muonclip", 0.002), 50, 3.2),
            (point("adamw", 0.001), 50, 4.0),
            (point("muonclip", 0.004, steps=20), 20, 3.9),
            (point("muonclip", 0.004, steps=10), 10, 4.1),
        ],
    )
    medium, small = optimizers.read_sweep(tmp_path)
    assert (medium["scale"], small["scale"]) == ("medium", "small")
    assert medium["parameters"] == "105M parameters, 42M active"
    assert small["parameters"] == "35M parameters, 22M active"
    assert medium["share_of_adamw_tokens"] is None
    assert small["share_of_adamw_tokens"] == pytest.approx(20 / 50)
    assert {name: run["held_out_loss"] for name, run in optimizers.best(small["runs"]).items()} == {
        "muonclip": 3.0,
        "adamw": 4.0,
    }
    optimizers.draw([medium, small], tmp_path / "picture.png")
    assert (tmp_path / "picture.png").stat().st_size > 10_000


def test_an_unfinished_sweep_is_refused(tmp_path):
    sweep(tmp_path, [(point("adamw", 0.001), 20, 4.0)])
    text = (tmp_path / "sweep.json").read_text().replace("finished", "waiting")
    (tmp_path / "sweep.json").write_text(text)
    with pytest.raises(ValueError, match="point0 is not finished"):
        optimizers.read_sweep(tmp_path)


def test_an_unknown_scale_is_refused():
    with pytest.raises(ValueError, match=r"scale='large': use one of \['medium', 'small'\]"):
        load_config("configs/optimizers.py:scale=large")
