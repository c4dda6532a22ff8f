"""README's status table is the one that the tree gives."""

from benchmarks import record, status


def test_readme_holds_the_generated_table():
    readme = (record.ROOT / "README.md").read_text(encoding="utf-8")
    assert status.updated(readme) == readme, "run `python -m benchmarks.status`"


def test_a_room_without_its_measurement_is_not_proven():
    room = status.Room("x", "k2jax/muonclip.py", ("tests/test_paper_muonclip.py",), ("never_measured",))
    assert "| reference |" in status.row(room)
    assert "| absent |" in status.row(status.Room("y", "k2jax/nothing_here.py"))
