"""The comparison of dense attention: who takes turns, what a row says, and what cannot run."""

import functools

import jax
import pytest

from benchmarks import dense_attention, moba, record
from k2jax.kernels.attention import attention


def test_a_row_says_how_ours_stand_against_the_fastest_peer():
    row = dense_attention.line("4K", "forward", {"k2jax dense": 2.0, "a": 1.5, "b": 3.0})
    assert "k2jax dense 2.00 (0.75x of the fastest), a 1.50" in row
    assert dense_attention.line("4K", "forward", {"k2jax dense": 2.0}).endswith("k2jax dense 2.00")


@pytest.fixture
def tiny(monkeypatch, tmp_path):
    """One tiny case; ours, and a peer that cannot run it."""

    def broken(q, k, v):
        raise ValueError("not built for this")

    ours = functools.partial(attention, scale=0.1, implementation="xla")
    monkeypatch.setattr(dense_attention, "CASES", {"tiny": (1, 64, 2, 1, 16, 8)})
    monkeypatch.setattr(moba, "dense_peers", lambda: {"k2jax dense": ours, "broken": broken})
    monkeypatch.setattr(record, "RESULTS", tmp_path)
    return tmp_path


def test_what_cannot_run_is_said_and_the_rest_is_timed_and_kept(tiny, capsys):
    dense_attention.main(["--write", "--only", "tiny"])
    kept, said = record.read("dense_attention")["milliseconds"]["tiny"], capsys.readouterr().out
    assert {what: list(times) for what, times in kept.items()} == {what: ["k2jax dense"] for what in kept}
    assert all(times["k2jax dense"] > 0 for times in kept.values())
    assert said.count("broken: ValueError: not built for this") == 2


def test_out_of_time_starts_nothing_new_and_says_so(tiny, capsys):
    dense_attention.main(["--seconds", "-1", "--only", "tiny"])
    assert capsys.readouterr().out == "out of time before tiny\n"
    assert not list(tiny.iterdir())


def test_each_is_told_in_its_own_way_where_documents_end():
    peers = dense_attention.document_peers(2, (3, 8))
    assert peers["k2jax dense"][1][0].tolist() == [[0, 0, 0, 1, 1, 1, 1, 1]] * 2
    assert peers["flash-attn3-jax"][1][0].tolist() == [0, 3, 8, 11, 16]


def test_documents_are_an_argument_of_the_timed_programs(tiny, monkeypatch):
    monkeypatch.setattr(dense_attention, "CASES", {"tiny": (1, 64, 2, 1, 16, 8, 20, 64)})
    ours = functools.partial(attention, scale=0.1, implementation="xla")
    told_ids = []

    def told(q, k, v, segment_ids):
        told_ids.append(segment_ids)
        return ours(q, k, v, segment_ids=segment_ids)

    real = dense_attention.document_peers
    monkeypatch.setattr(
        dense_attention, "document_peers", lambda B, ends: {"k2jax dense": (told, real(B, ends)["k2jax dense"][1])}
    )
    found = dense_attention.time_case("tiny", dense_attention.compiled_cases(["tiny"])["tiny"])
    assert all(times["k2jax dense"] > 0 for times in found.values())
    assert [isinstance(x, jax.core.Tracer) for x in told_ids] == [True, True]
