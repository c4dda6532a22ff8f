"""What a person watching the run sees: one line with an ETA on a terminal, plain lines elsewhere."""

import shutil
import sys
import time


class Progress:
    """Prints a step's numbers. Lines that matter (evaluations, warnings) stay; a terminal's step line is rewritten."""

    def __init__(self, total_steps: int, every: int, stream=None, silent=False):
        self._total, self._every = total_steps, every
        self._stream, self._silent = stream or sys.stdout, silent
        self._terminal = self._stream.isatty()
        self._first = None
        self._open = False

    def step(self, line: dict) -> None:
        """Shows a step: every one on a terminal, every `log_every`-th elsewhere."""
        step, now = line["step"], time.monotonic()
        # Counted from the end of this process's first step, so that compilation does not spoil the estimate.
        self._first = self._first or (step, now)
        done, since = step - self._first[0], now - self._first[1]
        left = (since / done if done else line["step_time"]) * (self._total - step)
        if self._silent or (not self._terminal and step % self._every and step != self._total):
            return
        text = (
            f"step {step}/{self._total} | eta {clock(left)} | loss {line['loss']:.4f} | "
            f"{line['tokens_per_second']:,.0f} tok/s | lr {line['lr']:.2e} | grad {line['grad_norm']:.2f} | "
            f"max logit {line['max_logit']:.1f} | mfu {line['mfu']:.1%}"
        )
        if self._terminal:
            # A line that wraps could not be rewritten.
            self._stream.write(f"\r\x1b[2K{text[: shutil.get_terminal_size().columns - 1]}")
            self._open = True
        else:
            self._stream.write(text + "\n")
        self._stream.flush()

    def say(self, text: str) -> None:
        """Prints a line that stays."""
        if self._silent:
            return
        self.finish()
        self._stream.write(text + "\n")
        self._stream.flush()

    def finish(self) -> None:
        """Ends a line that is being rewritten."""
        if self._open:
            self._stream.write("\n")
            self._open = False


def clock(seconds: float) -> str:
    """Seconds as m:ss or h:mm:ss."""
    minutes, seconds = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"
