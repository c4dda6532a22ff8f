"""Documents laid end to end in one stream of tokens, cut into windows of equal length.

Legend: N tokens of the stream, T window length.

Concatenate-then-split loses nothing and pads once, at the end of the corpus. The price: a document that
crosses a window's edge starts anew in the next window, with no sight of what came before; its segment ids
start from 1 there, and what is cut per document (positions, MoBA blocks) restarts as well.
"""

import numpy as np

from k2jax.data.stream import TokenStream


def window(stream: TokenStream, start: int, stop: int, length: int, pad_id: int) -> dict:
    """The window whose inputs are the tokens start .. stop - 1 of `stream`: dict of arrays [T], T = `length`.

    tokens int32; targets int32, the tokens one position later; segment_ids int32, 1 for the window's first
    document and one more at each BOS; loss_mask float32, 0 where the target is the BOS of another document.
    Positions past stop - start are padding: PAD, segment 0, mask 0. Reads stop - start + 1 tokens.
    """
    real = stop - start
    tokens, targets = (np.full(length, pad_id, np.int32) for _ in range(2))
    segment_ids, loss_mask = np.zeros(length, np.int32), np.zeros(length, np.float32)
    read = stream.read(start, stop + 1)
    tokens[:real], targets[:real] = read[:-1], read[1:]
    first, last = np.searchsorted(stream.doc_starts, (start, stop), side="right")
    document = np.zeros(real + 1, np.int32)
    document[stream.doc_starts[first:last] - start] = 1
    document = document.cumsum()
    segment_ids[:real] = document[:-1] + 1
    loss_mask[:real] = document[1:] == document[:-1]
    return {"tokens": tokens, "targets": targets, "segment_ids": segment_ids, "loss_mask": loss_mask}


class PackedWindows:
    """Random access to the windows of a stream: window i holds the inputs i*T .. i*T + T - 1.

    A window reads T + 1 tokens, of which the last is the first of the next window, so every token of the
    stream except the first is a target exactly once. The last window is padded, never dropped. Items: see
    `window`.

    Raises ValueError if `seq_len` < 1, IndexError outside 0 .. len - 1.
    """

    def __init__(self, stream: TokenStream, seq_len: int, pad_id: int):
        if seq_len < 1:
            raise ValueError(f"data.seq_len={seq_len} must be at least 1. Fix: try 256.")
        self._stream = stream
        self._seq_len = seq_len
        self._pad_id = pad_id

    def __len__(self) -> int:
        return -(-(self._stream.num_tokens - 1) // self._seq_len)

    def __getitem__(self, index) -> dict:
        if not 0 <= index < len(self):
            raise IndexError(f"window {index} of {len(self)}")
        start = int(index) * self._seq_len
        stop = min(start + self._seq_len, self._stream.num_tokens - 1)  # The last token is a target only.
        return window(self._stream, start, stop, self._seq_len, self._pad_id)

    def __repr__(self) -> str:
        return f"PackedWindows({self._stream.num_tokens} tokens, {len(self)} windows of {self._seq_len})"
