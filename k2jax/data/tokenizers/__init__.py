"""Tokens from text: bytes, Kimi K2's tokenizer, any of Hugging Face, or one trained on the corpus."""

from k2jax.data.tokenizers.base import ByteTokenizer, Tokenizer

__all__ = ["ByteTokenizer", "Tokenizer", "load_tokenizer"]


def load_tokenizer(name: str) -> Tokenizer:
    """The tokenizer that `data.tokenizer` names.

    'bytes'; 'k2' (from the package splintr-rs) or 'k2:FILE' (a tiktoken.model); 'hf:PATH' (a tokenizer.json or its
    folder).

    Raises ValueError for another name, a missing optional package or a damaged file, FileNotFoundError for none.
    """
    form, _, path = name.partition(":")
    if name == "bytes":
        return ByteTokenizer()
    if name == "k2" or (form == "k2" and path):
        from k2jax.data.tokenizers.k2 import K2Tokenizer

        return K2Tokenizer(path or None)
    if form == "hf" and path:
        from k2jax.data.tokenizers.hugging_face import HuggingFaceTokenizer

        return HuggingFaceTokenizer(path)
    raise ValueError(f"data.tokenizer={name!r} is not known. Fix: use 'bytes', 'k2', 'k2:FILE' or 'hf:PATH'.")
