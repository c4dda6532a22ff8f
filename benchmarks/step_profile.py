"""Where the time of a training step goes: the kernels of a trace, added up by the part of the model they belong to.

A trace names the operation of every kernel, the compiled module's text says which named scope an operation came from.
Both come from one run:

    XLA_FLAGS="--xla_dump_to=DUMP --xla_dump_hlo_module_re=jit_train_step --xla_dump_hlo_as_text" \\
      python -m experiments.train --config=... --workdir=RUN --profile=5:6
    python -m benchmarks.step_profile --trace=RUN/profile --hlo=DUMP

On a GPU add --xla_gpu_enable_command_buffer= to XLA_FLAGS: a kernel inside a command buffer has no name.
"""

import argparse
import collections
import gzip
import json
import re
from pathlib import Path

# Named scopes of the model and the step; the innermost one that a name holds counts.
PARTS = (
    "embed", "mla_qkv", "attention_full", "attention_moba", "router", "experts", "moe", "token_logprobs", "optimizer",
)  # fmt: skip
OTHER = "norms, sums, copies"
_INSTRUCTION = re.compile(r'^\s*(?:ROOT )?%?([\w.\-]+) = .*op_name="([^"]*)"')


def scopes(hlo: Path) -> dict[str, str]:
    """{operation: its op_name} of the optimised module in a folder of dumps.

    Raises FileNotFoundError where the folder holds none, ValueError where it holds several.
    """
    found = sorted(hlo.glob("*after_optimizations.txt"))
    if not found:
        raise FileNotFoundError(f"--hlo={hlo} holds no *after_optimizations.txt: set XLA_FLAGS as the docstring says")
    if len(found) > 1:
        raise ValueError(f"--hlo={hlo} holds {len(found)} modules: dump into an empty folder")
    lines = map(_INSTRUCTION.match, found[0].read_text(encoding="utf-8").splitlines())
    return {match[1]: match[2] for match in lines if match}


def kernels(trace: Path) -> list[tuple[str, float]]:
    """(operation, microseconds) of every kernel in the newest trace of a folder.

    Raises FileNotFoundError without a trace, ValueError for one without a named kernel.
    """
    found = sorted(trace.rglob("*.trace.json.gz"))
    if not found:
        raise FileNotFoundError(f"--trace={trace} holds no *.trace.json.gz: train with --profile=FIRST:LAST")
    with gzip.open(found[-1], "rt", encoding="utf-8") as file:
        events = json.load(file)["traceEvents"]
    named = [event for event in events if "hlo_op" in event.get("args", {}) and "dur" in event]
    processes = {event["pid"]: event["args"]["name"] for event in events if event.get("name") == "process_name"}
    on_device = [event for event in named if "/device:" in processes.get(event["pid"], "")]
    if not named:
        raise ValueError(f"{found[-1]}: no kernel has a name; on a GPU switch command buffers off")
    return [(event["args"]["hlo_op"], event["dur"]) for event in on_device or named]


def part(op_name: str) -> tuple[str, str]:
    """(part, pass) of an op_name: the innermost named scope, and whether it runs forward, backward or again."""
    words = re.findall(r"[\w]+", op_name)
    scope = next((word for word in reversed(words) if word in PARTS), OTHER)
    if scope == "optimizer":
        return scope, "update"
    if "rematted_computation" in words:
        return scope, "again"
    return scope, "backward" if "transpose" in words else "forward"


def table(trace: Path, hlo: Path, steps: int) -> dict:
    """{'parts': {part: {pass: ms a step}}, 'unnamed': ms, 'total': ms, 'slowest': [[ms, operation, op_name]]}."""
    names = scopes(hlo)
    parts = collections.defaultdict(lambda: collections.defaultdict(float))
    by_operation = collections.Counter()
    unnamed = 0.0
    for operation, microseconds in kernels(trace):
        ms = microseconds / 1e3 / steps
        by_operation[operation] += ms
        if operation in names:
            where, when = part(names[operation])
            parts[where][when] += ms
        else:
            unnamed += ms
    slowest = [[round(ms, 3), op, names.get(op, "")] for op, ms in by_operation.most_common(25)]
    rounded = {where: {when: round(ms, 3) for when, ms in passes.items()} for where, passes in parts.items()}
    ordered = dict(sorted(rounded.items(), key=lambda item: -sum(item[1].values())))
    total = sum(by_operation.values())
    return {"parts": ordered, "unnamed": round(unnamed, 3), "total": round(total, 3), "slowest": slowest}


def lines(found: dict) -> list[str]:
    """The table as text: milliseconds a step and share of the kernels' time."""
    passes = ("forward", "again", "backward", "update")
    rows = [f"{'part':22}" + "".join(f"{when:>10}" for when in passes) + f"{'ms':>10}{'share':>8}"]
    for where, times in found["parts"].items():
        cells = "".join(f"{times[when]:10.1f}" if when in times else f"{'':10}" for when in passes)
        rows.append(f"{where:22}{cells}{sum(times.values()):10.1f}{sum(times.values()) / found['total']:8.1%}")
    rows.append(f"{'without a name':62}{found['unnamed']:10.1f}{found['unnamed'] / found['total']:8.1%}")
    return rows


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trace", type=Path, required=True)
    parser.add_argument("--hlo", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=1, help="steps in the trace")
    flags = parser.parse_args(argv)
    found = table(flags.trace, flags.hlo, flags.steps)
    print("\n".join(lines(found)))
    for ms, operation, name in found["slowest"]:
        print(f"{ms:10.2f} ms  {operation:40} {name}")


if __name__ == "__main__":
    main()
