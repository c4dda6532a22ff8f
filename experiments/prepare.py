r"""Turns text into tokenised shards, once, for any number of runs.

python -m experiments.prepare --source=packages --tokenizer=k2 --out=data/packages
python -m experiments.prepare --source='corpus/*.jsonl.gz#body' --train-tokenizer=8192 --out=data/corpus

A run then takes them with --config.data.source=data/packages --config.data.tokenizer=k2. The same command again
continues what was interrupted, and checks what is done. docs/data.md has every form of a source.
"""

import argparse
import os
import shutil
import signal
import sys
import time
from pathlib import Path

from experiments import common
from k2jax.data.prepare import Request, prepare, tokenizer_name
from k2jax.training.errors import Interrupted, SetupError
from k2jax.training.progress import clock


def parse(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--source", required=True, help="'stdlib', 'packages', a path, a bucket, hf://owner/name")
    parser.add_argument("--tokenizer", help="'bytes', 'k2', 'k2:FILE' or 'hf:PATH'")
    parser.add_argument("--train-tokenizer", type=int, metavar="IDS", help="train a BPE of so many ids on the text")
    parser.add_argument(
        "--out", required=True, type=Path, help="folder of the shards; made if absent, continued if not"
    )
    parser.add_argument("--shards", type=int, help="training shards (default: one per 128 MiB of text)")
    parser.add_argument("--held-out-fraction", type=float, default=0.03, help="of the documents (default 0.03)")
    parser.add_argument("--workers", type=int, default=os.cpu_count(), help="processes (default: one per core)")
    return parser.parse_args(argv)


def main(argv=None):
    flags = parse(argv)
    if (flags.tokenizer is None) == (flags.train_tokenizer is None):
        raise SetupError("give one of --tokenizer=NAME and --train-tokenizer=IDS, for example --tokenizer=bytes")
    if flags.workers < 1:
        raise SetupError(f"--workers={flags.workers} must be at least 1")
    tokenizer = flags.tokenizer or f"train:{flags.train_tokenizer}"
    meter = Meter()
    try:
        request = Request(flags.source, tokenizer, flags.held_out_fraction, flags.shards)
        indexes = prepare(request, flags.out, flags.workers, meter.report)
    except (ValueError, FileNotFoundError) as error:
        raise SetupError(error) from error
    except KeyboardInterrupt:
        text = "stopped by SIGINT; finished shards are kept, the same command continues"
        raise Interrupted(text, signal.SIGINT) from None
    finally:
        meter.finish()
    for split, index in indexes.items():
        documents, tokens, text = (sum(getattr(s, name) for s in index.shards) for name in _TOTALS)
        print(
            f"{split}: {documents:,} documents, {text:,} bytes of text, {tokens:,} tokens "
            f"({text / tokens:.2f} bytes a token) in {len(index.shards)} shards"
        )
    made = "complete" if meter.has_tokenised else "complete already; every shard was read and is as it was written"
    name = tokenizer_name(request, flags.out)
    print(f"{flags.out}: {made}\n--config.data.source={flags.out} --config.data.tokenizer={name}")


_TOTALS = ("documents", "tokens", "text_bytes")


class Meter:
    """One line of progress: rewritten on a terminal, every ten seconds elsewhere."""

    def __init__(self, stream=None):
        self._stream = stream or sys.stdout
        self._terminal = self._stream.isatty()
        self._phase, self._began, self._shown, self._open = None, 0.0, 0.0, False
        self.has_tokenised = False

    def report(self, phase: str, done: int, total: int | None) -> None:
        """Shows bytes of text done, and of `total` how long the rest takes."""
        now = time.monotonic()
        self.has_tokenised |= phase == "tokenising"
        if phase != self._phase:
            self.finish()
            self._phase, self._began, self._shown = phase, now, now
        if now - self._shown < (0.2 if self._terminal else 10.0):
            return
        self._shown = now
        rate = done / max(now - self._began, 1e-9)
        text = (
            f"{phase}: {done / 1e6:,.0f}" + (f" of {total / 1e6:,.0f}" if total else "") + f" MB, {rate / 1e6:.1f} MB/s"
        )
        text += f", eta {clock((total - done) / max(rate, 1e-9))}" if total else ""
        # A line that wraps could not be rewritten.
        start, end = ("\r\x1b[2K", "") if self._terminal else ("", "\n")
        self._stream.write(start + text[: shutil.get_terminal_size().columns - 1] + end)
        self._stream.flush()
        self._open = self._terminal

    def finish(self) -> None:
        """Ends a line that is being rewritten."""
        if self._open:
            self._stream.write("\n")
            self._open = False


if __name__ == "__main__":
    common.run_main(main)
