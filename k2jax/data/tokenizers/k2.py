r"""Kimi K2's tokenizer: tiktoken byte-pair encoding, 163,584 ranks and 256 special ids.

The ranks and the pattern are those of the released model (huggingface.co/moonshotai/Kimi-K2-Base: tiktoken.model and
tokenization_kimi.py); Moonlight, Kimi-Linear and K2's later versions use the same file.
"""

import base64
import hashlib
import re
from pathlib import Path

import numpy as np

from k2jax.data.optional import needs
from k2jax.data.tokenizers.base import as_text, checked_ids

NUM_RANKS = 163_584
SHA256 = "b6c497a7469b33ced9c38afb1ad6e47f03f5e5dc05f15930799210ec050c5103"

PATTERN = "|".join(
    (
        r"[\p{Han}]+",
        r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]*[\p{Ll}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]+"
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?",
        r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]+[\p{Ll}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]*"
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?",
        r"\p{N}{1,3}",
        r" ?[^\s\p{L}\p{N}]+[\r\n]*",
        r"\s*[\r\n]+",
        r"\s+(?!\S)",
        r"\s+",
    )
)

# tokenizer_config.json of the release; the other ids up to 163,839 are reserved.
_NAMED = {
    163584: "[BOS]",
    163585: "[EOS]",
    163586: "<|im_end|>",
    163587: "<|im_user|>",
    163588: "<|im_assistant|>",
    163590: "<|start_header_id|>",
    163591: "<|end_header_id|>",
    163593: "[EOT]",
    163594: "<|im_system|>",
    163595: "<|tool_calls_section_begin|>",
    163596: "<|tool_calls_section_end|>",
    163597: "<|tool_call_begin|>",
    163598: "<|tool_call_argument_begin|>",
    163599: "<|tool_call_end|>",
    163601: "<|im_middle|>",
    163838: "[UNK]",
    163839: "[PAD]",
}
SPECIAL = {_NAMED.get(i, f"<|reserved_token_{i}|>"): i for i in range(NUM_RANKS, NUM_RANKS + 256)}

# tokenization_kimi.py cuts the text before tiktoken sees it: its regular expressions are slow on long runs.
_LONGEST_TEXT = 400_000  # characters
_LONGEST_RUN = 25_000  # characters, all of them spaces or none
_RUN = re.compile(rf"\S{{{_LONGEST_RUN + 1},}}|\s{{{_LONGEST_RUN + 1},}}")


class K2Tokenizer:
    """Kimi K2's tokenizer, from a file tiktoken.model (or a folder with one), or from the package splintr-rs.

    Raises ValueError for a missing package, or if the ranks are not K2's by their SHA-256; FileNotFoundError for a
    missing file.
    """

    vocab_size = NUM_RANKS + len(SPECIAL)
    bos_id = SPECIAL["[BOS]"]
    eos_id = SPECIAL["[EOS]"]
    pad_id = SPECIAL["[PAD]"]
    fingerprint = f"k2-{SHA256[:16]}"

    def __init__(self, path: str | Path | None = None):
        with needs("k2", "data.tokenizer='k2'"):
            import tiktoken
        ranks = _ranks(_packaged_model() if path is None else _read_model(Path(path).expanduser()))
        self._encoding = tiktoken.Encoding(
            "kimi_k2", pat_str=PATTERN, mergeable_ranks=ranks, special_tokens=SPECIAL, explicit_n_vocab=self.vocab_size
        )

    def encode(self, text: bytes | str, allow_special: bool = False) -> np.ndarray:
        """Ids [N] int32. allow_special: '<|im_end|>' and the like become their one id (chats), not text (documents)."""
        allowed = self._encoding.special_tokens_set if allow_special else set()
        pieces = [
            self._encoding.encode_to_numpy(piece, allowed_special=allowed, disallowed_special=())
            for piece in _pieces(as_text(text))
        ]
        return np.concatenate([*pieces, []]).astype(np.int32)

    def encode_document(self, text: bytes | str) -> np.ndarray:
        """Ids [N + 2] int32: BOS, the text, EOS."""
        return np.concatenate([[self.bos_id], self.encode(text), [self.eos_id]], dtype=np.int32)

    def decode(self, ids) -> str:
        """Text of ids [N]; special ids are dropped, and what is not UTF-8 becomes U+FFFD.

        Raises ValueError for an id outside 0..vocab_size - 1.
        """
        ids = checked_ids(ids, self.vocab_size)
        return self._encoding.decode_bytes(ids[ids < NUM_RANKS].tolist()).decode("utf-8", errors="replace")


def _pieces(text: str):
    for first in range(0, len(text), _LONGEST_TEXT):
        part = text[first : first + _LONGEST_TEXT]
        cuts = [
            cut for run in _RUN.finditer(part) for cut in range(run.start() + _LONGEST_RUN, run.end(), _LONGEST_RUN)
        ]
        for start, stop in zip([0, *cuts], [*cuts, len(part)], strict=True):
            yield part[start:stop]


def _read_model(path):
    file = path / "tiktoken.model" if path.is_dir() else path
    if not file.exists():
        raise FileNotFoundError(
            f"data.tokenizer='k2:{path}': {file} does not exist. Fix: give K2's tiktoken.model or its folder, or write "
            "'k2' to take it from the package splintr-rs."
        )
    model = file.read_bytes()
    _check(model, f"data.tokenizer='k2:{path}': {file}", "copy tiktoken.model of Kimi K2 again")
    return model


def _packaged_model():
    """The bytes of tiktoken.model, made again from the package that carries its ranks."""
    with needs("k2", "data.tokenizer='k2'"):
        import splintr
    packaged = splintr.Tokenizer.from_pretrained("kimi_k2")
    tokens = (packaged.decode_token_bytes(i) for i in range(NUM_RANKS))
    model = b"".join(base64.b64encode(token) + b" %d\n" % i for i, token in enumerate(tokens))
    _check(model, "data.tokenizer='k2': the package splintr-rs", "pip install 'k2jax[k2]' again, or use 'k2:FILE'")
    return model


def _check(model, what, fix):
    found = hashlib.sha256(model).hexdigest()
    if found != SHA256:
        raise ValueError(f"{what} has SHA-256 {found}; K2's tokenizer has {SHA256}. Fix: {fix}.")


def _ranks(model):
    lines = (line.split() for line in model.splitlines())
    return {base64.b64decode(token): int(rank) for token, rank in lines}
