"""The doctor's round: machine, ops, rates, steps, what is slow, verdict. No finding stops what comes after it."""

import dataclasses
import os
import platform
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from importlib.metadata import version
from pathlib import Path

import jax

from k2jax.config import RunConfig
from k2jax.diagnostics import advice, rates
from k2jax.diagnostics.cases import all_cases
from k2jax.diagnostics.ops import check, reference_device
from k2jax.diagnostics.steps import take_steps
from k2jax.training.errors import RunError
from k2jax.training.memory import capacity, text


def examine(cfg: RunConfig, folder: Path, *, quick: bool, say: Callable[[str], None]) -> dict:
    """Everything that is found, as a dict for JSON; `say` gets the same as lines while it is being found.

    folder: on the disk that checkpoints will go to.
    'wrong' names what computed wrongly (ops, collectives, steps); 'verdict' is the closing line.
    """
    runs, steps = (3, 5) if quick else (rates.RUNS, 20)
    found = {"machine": _machine(say)}
    say(f"--- ops, against references on {reference_device().device_kind}")
    outcomes = _ops(quick, say)
    say("--- rates, medians, without compilation")
    measured, links, failed = _rates(folder, runs, quick, say)
    say(f"--- {steps} steps of the config")
    stepped, trouble = _steps(cfg, steps, say)
    say("--- what will be slow, and why")
    slow = advice.slow_parts(cfg, outcomes, measured, stepped)
    for line in slow or ["nothing that was looked for"]:
        say(f"  {line}")
    wrong = [outcome.name for outcome in outcomes if outcome.state == "fail"]
    wrong += failed + trouble
    found |= {"ops": [dataclasses.asdict(o) for o in outcomes], "rates": measured, "collectives": links}
    found |= {"steps": stepped, "slow": slow, "wrong": wrong}
    right = sum(outcome.state == "pass" for outcome in outcomes)
    absent = sum(outcome.state == "absent" for outcome in outcomes)
    found["verdict"] = f"WRONG: {'; '.join(wrong)}" if wrong else f"all right: {right} op checks passed"
    found["verdict"] += f", {absent} absent on this platform" if absent else ""
    return found


def _machine(say):
    devices, has = jax.devices(), capacity()
    machine = {
        "python": platform.python_version(),
        "versions": {name: version(name) for name in ("k2jax", "jax", "jaxlib", "flax", "optax", "numpy")},
        "platform": devices[0].platform,
        "device_kind": devices[0].device_kind,
        "devices": len(devices),
        "processes": jax.process_count(),
        "cores": os.cpu_count(),
        "load": os.getloadavg()[0] if hasattr(os, "getloadavg") else None,
        "memory_per_device": dataclasses.asdict(has) if has else None,
        "xla_flags": os.environ.get("XLA_FLAGS", ""),
    }
    named = ", ".join(f"{name} {number}" for name, number in machine["versions"].items())
    say(f"python {machine['python']}, {named}")
    if machine["load"] and machine["load"] > 0.5 * machine["cores"]:
        say(f"load {machine['load']:.1f} before the doctor began: other programs run, and rates will be too low")
    memory = f"{text(has.limit)} each ({has.source})" if has else "of unknown memory"
    say(f"{len(devices)} x {devices[0].device_kind} ({devices[0].platform}), {memory}; {machine['cores']} CPU cores")
    return machine


def _ops(quick, say):
    """Outcomes of all cases; several at a time, since nearly all of their time is compilation on one core each."""
    outcomes = []
    with ThreadPoolExecutor(max_workers=min(4, os.cpu_count() or 1)) as pool:
        for outcome in pool.map(check, all_cases(quick)):
            outcomes.append(outcome)
            say(outcome.line())
    return outcomes


def _rates(folder, runs, quick, say):
    """({name: per second, 'dispatch' in seconds}, {collective: {...}}, what failed), told while it is measured."""
    found, failed = {}, []

    def measure(name, fn, *args):
        try:
            return fn(*args)
        except Exception as error:  # What cannot be measured is a finding like a wrong op.
            failed.append(name)
            say(f"FAIL   {name}: {type(error).__name__}: {str(error)[:300]}")
            return None

    for dtype in ("float32", "bfloat16"):
        if product := measure(f"product {dtype}", rates.product_flops, dtype, runs):
            found[f"product {dtype}"], size = product
            say(f"product {dtype:9} {product[0] / 1e12:10.3f} TFLOP/s, {size} x {size}")
    if memory := measure("memory", rates.memory_bandwidth, runs):
        found["memory"] = memory
        say(f"device memory     {memory / 1e9:10.2f} GB/s, reading and writing")
    if dispatch := measure("dispatch", rates.dispatch_seconds, runs):
        found["dispatch"] = dispatch
        say(f"dispatch          {dispatch * 1e6:10.1f} us of a call that computes nothing")
    if jax.default_backend() == "cpu":
        say("host to device    skipped: a CPU's memory is the host's")
    else:
        for name, rate in (measure("transfer", rates.transfer_bandwidth, runs) or {}).items():
            found[name] = rate
            say(f"{name:17} {rate / 1e9:10.2f} GB/s")
    megabytes = 64 if quick else 256
    if disk := measure("disk write", rates.disk_bandwidth, folder, megabytes):
        found["disk write"] = disk
        say(f"disk write        {disk / 1e9:10.2f} GB/s, {megabytes} MiB under {folder}")
    links = {}
    if jax.device_count() == 1:
        say("collectives       skipped: one device")
    else:
        links = measure("collectives", rates.collective_bandwidth, runs) or {}
    for name, link in links.items():
        right = "" if link["right"] else ", and its result is WRONG"
        say(f"{name:17} {link['bytes_per_second'] / 1e9:10.2f} GB/s from each device{right}")
    return found, links, failed + [name for name, link in links.items() if not link["right"]]


def _steps(cfg, steps, say):
    """(what the steps told or None, what is wrong with them)."""
    try:
        told = take_steps(cfg, steps)
    except (RunError, ValueError) as error:  # It does not fit this machine.
        say(f"FAIL   {error}")
        return None, [f"steps: {error}"]
    except Exception as error:  # A step that crashes is a finding like a wrong op.
        say(f"FAIL   {type(error).__name__}: {str(error)[:500]}")
        return None, [f"steps: {type(error).__name__}"]
    say(
        f"{told['tokens_per_second']:,.0f} tokens/s on {told['devices']} device(s), median step "
        f"{told['step_seconds'] * 1e3:.1f} ms, MFU {told['mfu']:.1%} of {told['peak']}"
    )
    first, last = (f"{loss:.4f}" if loss is not None else "not finite" for loss in told["losses"])
    say(f"compiled in {told['compile_seconds']:.0f} s; loss {first} to {last}")
    for line in told["memory"]:
        say(line)
    say(_comparison(told))
    return told, [] if told["finite"] else ["steps: the loss is not finite"]


def _comparison(told):
    size = partial(map, lambda name: told[f"memory_{name}"])
    predicted, compiled, peak = size(("predicted", "compiled", "peak"))
    parts = [f"predicted from shapes {text(predicted)}"]
    if compiled:
        parts.append(f"by the compiled step {text(compiled)} (prediction {predicted / compiled - 1:+.1%})")
    parts.append(f"at most in use so far {text(peak)}" if peak else "this platform does not count what is in use")
    return f"memory: {', '.join(parts)}"
