"""Tokenizers of Hugging Face's `tokenizers`: any tokenizer.json, and training a byte-level one."""

import hashlib
import json
import os
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from k2jax.data.optional import needs
from k2jax.data.sources import Document
from k2jax.data.tokenizers.base import as_text, checked_ids

# What opens, closes and pads where no tokenizer_config.json says it; the first is what train_bpe writes.
_USUAL = {
    "bos_token": ("<|bos|>", "<s>", "<bos>", "[BOS]", "<|begin_of_text|>", "<｜begin▁of▁sentence｜>"),
    "eos_token": ("<|eos|>", "</s>", "<eos>", "[EOS]", "<|end_of_text|>", "<|endoftext|>", "<｜end▁of▁sentence｜>"),
    "pad_token": ("<|pad|>", "<pad>", "[PAD]"),
}


class HuggingFaceTokenizer:
    """A tokenizer.json, or a folder with one.

    BOS, EOS and PAD are those of tokenizer_config.json beside it; without that file, the usual names are looked for.
    A tokenizer without BOS (GPT-2, Qwen) opens documents with its EOS, one without PAD pads with it. Truncation,
    padding and templates that the file asks for are switched off, and special tokens in a text are text.

    Raises FileNotFoundError for a missing file, and ValueError for one that cannot be read or has no EOS.
    """

    def __init__(self, path: str | Path):
        path = Path(path).expanduser()
        with needs("hf", f"data.tokenizer='hf:{path}'"):
            import tokenizers
        file = path / "tokenizer.json" if path.is_dir() else path
        if not file.exists():
            raise FileNotFoundError(
                f"data.tokenizer='hf:{path}': {file} does not exist. Fix: give a tokenizer.json or its folder."
            )
        content = file.read_bytes()
        try:
            self._tokenizer = tokenizers.Tokenizer.from_buffer(content)
        except Exception as error:  # The package raises nothing narrower.
            raise ValueError(
                f"data.tokenizer='hf:{path}': {file} is no tokenizer.json ({error}). Fix: give one that the package "
                f"tokenizers {tokenizers.__version__} reads."
            ) from error
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self._tokenizer.encode_special_tokens = True
        self._unknown_id = _unknown_id(json.loads(content)["model"], self._tokenizer)
        self.bos_id, self.eos_id, self.pad_id = _special_ids(self._tokenizer, file)
        self.vocab_size = max(self._tokenizer.get_vocab(with_added_tokens=True).values()) + 1
        ids = f"{self.bos_id} {self.eos_id} {self.pad_id}"
        self.fingerprint = f"hf-{hashlib.sha256(content + ids.encode()).hexdigest()[:16]}"

    def encode(self, text: bytes | str) -> np.ndarray:
        """Ids [N] int32. Raises ValueError for text that the vocabulary cannot write, which would lose it."""
        text = as_text(text)
        ids = np.array(self._tokenizer.encode(text, add_special_tokens=False).ids, dtype=np.int32)
        if self._unknown_id is not None and self._unknown_id in ids:
            raise ValueError(
                f"data.tokenizer: its vocabulary cannot write the text that begins with {text[:60]!r}, so the text "
                "would be lost. Fix: use a byte-level tokenizer, or one with byte fallback."
            )
        return ids

    def encode_document(self, text: bytes | str) -> np.ndarray:
        """Ids [N + 2] int32: BOS, the text, EOS."""
        return np.concatenate([[self.bos_id], self.encode(text), [self.eos_id]], dtype=np.int32)

    def decode(self, ids) -> str:
        """Text of ids [N]; special ids are dropped. Raises ValueError for an id outside 0..vocab_size - 1."""
        return self._tokenizer.decode(checked_ids(ids, self.vocab_size).tolist(), skip_special_tokens=True)


def train_bpe(documents: Iterable[Document], vocab_size: int, folder: str | Path) -> HuggingFaceTokenizer:
    """Trains a byte-level BPE of `vocab_size` ids, 3 of them special, and writes `folder`/tokenizer.json.

    Text is split into words by GPT-2's pattern. The file is written whole or not at all; 'hf:FOLDER' names it.

    Raises ValueError if vocab_size is less than 259 (256 bytes and the special ids), or more than the text gives.
    """
    with needs("hf", f"training a tokenizer of {vocab_size} ids"):
        import tokenizers
    special = [names[0] for names in _USUAL.values()]
    least = 256 + len(special)
    if vocab_size < least:
        raise ValueError(f"vocab_size={vocab_size}: bytes and special ids alone are {least}. Fix: try 8192.")
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=special,
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator((as_text(document.text) for document in documents), trainer)
    if tokenizer.get_vocab_size() != vocab_size:
        raise ValueError(
            f"vocab_size={vocab_size}: the text has words for {tokenizer.get_vocab_size()} ids only. Fix: ask for "
            "that many, or give more text."
        )
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    scratch = folder / "tokenizer.json.partial"
    scratch.write_text(tokenizer.to_str(pretty=True), encoding="utf-8")
    os.replace(scratch, folder / "tokenizer.json")
    return HuggingFaceTokenizer(folder)


def _special_ids(tokenizer, file):
    config = file.with_name("tokenizer_config.json")
    named = _named_tokens(config) if config.exists() else {}
    ids = {}
    for role, usual in _USUAL.items():
        names = [named[role]] if named.get(role) else [] if config.exists() else usual
        found = [i for i in map(tokenizer.token_to_id, names) if i is not None]
        if named.get(role) and not found:
            raise ValueError(
                f"data.tokenizer: {config} calls {role} {named[role]!r}, which {file} lacks. Fix: mend one."
            )
        ids[role] = found[0] if found else ids.get("eos_token")
    if ids["eos_token"] is None:
        raise ValueError(
            f"data.tokenizer='hf:{file}' does not say which token ends a document. Fix: put a tokenizer_config.json "
            f'with "eos_token" (and "bos_token", "pad_token") beside it.'
        )
    bos = ids["eos_token"] if ids["bos_token"] is None else ids["bos_token"]
    return bos, ids["eos_token"], ids["pad_token"]


def _named_tokens(config):
    try:
        named = json.loads(config.read_text(encoding="utf-8"))
        tokens = {role: named.get(role) for role in _USUAL}
    except (ValueError, AttributeError) as error:
        raise ValueError(f"data.tokenizer: {config} is no JSON object ({error}). Fix: restore it.") from error
    return {role: token["content"] if isinstance(token, dict) else token for role, token in tokens.items()}


def _unknown_id(model, tokenizer):
    if model.get("unk_id") is not None:  # Unigram
        return model["unk_id"]
    return tokenizer.token_to_id(model["unk_token"]) if model.get("unk_token") else None
