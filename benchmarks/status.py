"""Writes README's status table from what is in the tree: code, independent tests, planted bugs, result files.

    python -m benchmarks.status

absent: no code. reference: code with its author's tests. proven: an oracle that the author did not write agrees,
planted bugs in it turn named tests red, and result files hold its measurements.
"""

from dataclasses import dataclass

from benchmarks import record
from tests.mutants.mutants import MUTANTS

BEGIN, END = "<!-- status: python -m benchmarks.status -->", "<!-- end of status -->"


@dataclass(frozen=True)
class Room:
    """One row: code is a file or folder; oracles are tests written without its author; results are file names."""

    name: str
    code: str
    oracles: tuple[str, ...] = ()
    results: tuple[str, ...] = ()


ROOMS = (
    Room("MuonClip as an optax transformation", "k2jax/muonclip.py",
         ("tests/test_paper_muonclip.py", "tests/test_update_parity.py"), ("nano_cpu", "nano_h100", "optimizers")),
    Room("QK-Clip", "k2jax/qk_clip.py", ("tests/test_paper_muonclip.py",),
         ("logit_explosion", "logit_explosion_h100", "nano_cpu", "nano_h100")),
    Room("Newton-Schulz, standard and on the Gram matrix", "k2jax/newton_schulz.py",
         ("tests/test_paper_muonclip.py", "tests/test_update_parity.py"), ("ns_quality", "nano_cpu")),
    Room("Symmetric product, a Hopper kernel (Pallas)", "k2jax/kernels/symmetric_matmul", (), ("symmetric_matmul",)),
    Room("MoBA, plain and XLA form", "k2jax/kernels/moba", ("tests/test_paper_moba.py",),
         ("moba_memory", "nano_cpu", "nano_h100")),
    Room("Full attention with max logits, XLA", "k2jax/kernels/attention", ("tests/test_paper_model.py",),
         ("nano_cpu", "nano_h100")),
    Room("K2 model: MLA, YaRN, router, experts", "k2jax/layers",
         ("tests/test_paper_model.py", "tests/test_golden_deepseek_v3.py"), ("nano_cpu", "nano_h100")),
    Room("Data: sources, tokenizers, shards, mixtures, exact state", "k2jax/data",
         ("tests/test_faults.py", "tests/test_processes.py"), ("nano_cpu",)),
    Room("Training loop, checkpoints, faults", "k2jax/training", ("tests/test_faults.py",),
         ("nano_cpu", "nano_h100", "h100_baseline")),
    Room("Meshes: data, fsdp, expert, seq, tensor, slice", "k2jax/sharding.py", (), ("cut_sequences",)),
    Room("Stages: context, attention, mixture, schedule", "k2jax/training/stages.py", (), ("stage_switch",)),
    Room("Several processes, watchdog, trackers, compile cache", "k2jax/training/processes.py", (), ("compile_cache",)),
    Room("Doctor: ops, rates and memory of a machine", "k2jax/diagnostics", (), ("doctor_cpu",)),
    Room("Report page", "k2jax/report"),
    Room("Sampling without a cache", "k2jax/inference"),
    Room("MoBA for Hopper (Pallas)", "k2jax/kernels/moba/sm90.py", ("tests/oracles/moba.py",),
         ("moba", "moba_h100", "long_context")),
    Room("Full attention for Hopper (Pallas)", "k2jax/kernels/attention/sm90.py", ("tests/oracles/moba.py",),
         ("dense_attention", "moba", "long_context")),
    Room("MoBA and full attention for TPU (Pallas)", "k2jax/kernels/moba/tpu.py", ("tests/oracles/moba.py",)),
    Room("Ahead-of-time compilation for pods", "k2jax/aot.py"),
    Room("Released checkpoints (Hugging Face)", "k2jax/hf"),
    Room("Agentic synthesis, RL, evaluation", "k2jax/rl"),
)  # fmt: skip


def row(room: Room) -> str:
    """One line of the table."""
    if not (record.ROOT / room.code).exists():
        return f"| {room.name} | absent | | |"
    measured = {name: record.read(name) for name in room.results}
    planted = sum(mutant.file.startswith(room.code) for mutant in MUTANTS)
    agrees = bool(room.oracles) and all((record.ROOT / test).exists() for test in room.oracles)
    proven = agrees and planted and room.results and all(measured.values())
    ran = sorted({result["hardware"] for result in measured.values() if result})
    evidence = [f"[{test.split('/')[-1]}]({test})" for test in room.oracles]
    evidence += [f"[{name}.json](benchmarks/results/{name}.json)" for name, result in measured.items() if result]
    if planted:
        evidence.append(f"planted bugs: {planted}")
    state = "proven" if proven else "reference"
    return f"| {room.name} | {state} | {'; '.join(ran) or 'CPU, by its tests'} | {', '.join(evidence)} |"


def table() -> str:
    """The table with its markers."""
    head = ["| Part | State | Ran on | Evidence |", "|---|---|---|---|"]
    return "\n".join([BEGIN, *head, *map(row, ROOMS), "", "Nothing here has ever run on a TPU.", END])


def updated(readme: str) -> str:
    """README's text with the table between the markers replaced."""
    before, rest = readme.split(BEGIN)
    return before + table() + rest.split(END)[1]


if __name__ == "__main__":
    path = record.ROOT / "README.md"
    path.write_text(updated(path.read_text(encoding="utf-8")), encoding="utf-8")
    print(table())
