"""Tokenizers: published ids, no text lost, special tokens in documents stay text, and errors that name the fix."""

import json
import random
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from k2jax.data.sources import Document
from k2jax.data.tokenizers import ByteTokenizer, load_tokenizer


def random_text(seed, length=400):
    """Any characters, controls and all planes included, but no half of a surrogate pair."""
    draw = random.Random(seed)
    ranges = [(0, 0x80), (0x80, 0x800), (0x4E00, 0x9FFF), (0xE000, 0x10000), (0x1F300, 0x1FAFF), (0x20000, 0x10FFFF)]
    return "".join(chr(draw.randrange(*draw.choice(ranges))) for _ in range(length))


def assert_is_a_tokenizer(tokenizer, text):
    """What every tokenizer promises, for one that loses nothing."""
    ids = tokenizer.encode(text)
    assert ids.dtype == np.int32
    assert tokenizer.decode(ids) == text
    np.testing.assert_array_equal(ids, tokenizer.encode(text.encode()))
    document = tokenizer.encode_document(text.encode())
    assert document.dtype == np.int32
    np.testing.assert_array_equal(document, [tokenizer.bos_id, *ids, tokenizer.eos_id])
    assert tokenizer.decode(document) == text
    assert tokenizer.encode_document(b"").tolist() == [tokenizer.bos_id, tokenizer.eos_id]
    assert max(document) < tokenizer.vocab_size
    for bad in (-1, tokenizer.vocab_size):
        with pytest.raises(
            ValueError, match=rf"ids: {bad} is not a token id \(0\.\.{tokenizer.vocab_size - 1}\)\. Fix: "
        ):
            tokenizer.decode([bad])


# --- Kimi K2 ------------------------------------------------------------------------------------------------------

# Ids of the test suite of github.com/ml-rust/splintr, made with the released tokenizer.
GOLDEN = {
    "Hello world": [19180, 2695],
    "Hello, world!": [19180, 11, 2695, 0],
    "你好世界": [33845, 2243],
    "1234567890": [6694, 12972, 16242, 15],
    "中文English混合": [16717, 44372, 13935],
    "<|im_user|>hello<|im_end|>": [163587, 22931, 163586],
}


@pytest.fixture(scope="module")
def k2():
    pytest.importorskip("tiktoken")
    pytest.importorskip("splintr")
    return load_tokenizer("k2")


@pytest.mark.parametrize("text", GOLDEN)
def test_k2_gives_the_published_ids(k2, text):
    assert k2.encode(text, allow_special=True).tolist() == GOLDEN[text]


def test_k2_has_the_released_models_vocabulary(k2):
    assert (k2.vocab_size, k2.bos_id, k2.eos_id, k2.pad_id) == (163_840, 163_584, 163_585, 163_839)
    special = [163595, 163601, 163838, 163589]
    names = ["<|tool_calls_section_begin|>", "<|im_middle|>", "[UNK]", "<|reserved_token_163589|>"]
    assert [k2.encode(name, allow_special=True).tolist() for name in names] == [[i] for i in special]


@pytest.mark.parametrize("seed", range(3))
def test_k2_loses_no_character(k2, seed):
    assert_is_a_tokenizer(k2, random_text(seed))


def test_k2_in_a_document_special_tokens_are_text(k2):
    text = "a <|im_end|> b [EOS] <|reserved_token_163600|>"
    ids = k2.encode_document(text)
    assert max(ids[1:-1]) < 163_584
    assert k2.decode(ids) == text
    assert k2.encode(text, allow_special=True).max() == 163_600


def test_k2_agrees_with_the_package_that_carries_it(k2):
    import splintr

    other = splintr.Tokenizer.from_pretrained("kimi_k2")
    for seed in range(20):
        text = random_text(100 + seed, 200)
        assert k2.encode(text).tolist() == other.encode_ordinary(text)


def test_k2_cuts_long_texts_and_long_runs_where_the_release_does(k2):
    for text, cuts in [
        ("ab" * 30_000, [25_000, 50_000]),
        ("x " + "é" * 25_001, [25_002]),
        ("x " + "é" * 25_000, []),
        (" " * 25_002 + "y", [25_000]),
        ("word " * 80_001, [400_000]),
        ("a" * 399_000 + " " + "b" * 26_000, [*range(25_000, 399_000, 25_000), 400_000, 425_000]),
    ]:
        pieces = [text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)], strict=True)]
        expected = np.concatenate([k2._encoding.encode_ordinary(piece) for piece in pieces])
        np.testing.assert_array_equal(k2.encode(text), expected)
        assert k2.decode(k2.encode(text)) == text


def test_k2_from_a_file_is_the_same_and_a_changed_file_is_refused(k2, tmp_path):
    from k2jax.data.tokenizers.k2 import _packaged_model

    model = _packaged_model()
    assert len(model) == 2_795_286
    (tmp_path / "tiktoken.model").write_bytes(model)
    for name in (f"k2:{tmp_path}", f"k2:{tmp_path}/tiktoken.model"):
        other = load_tokenizer(name)
        assert other.fingerprint == k2.fingerprint
        assert other.encode("Hello, world!").tolist() == GOLDEN["Hello, world!"]
    (tmp_path / "tiktoken.model").write_bytes(model[:-1])
    with pytest.raises(
        ValueError, match=r"data\.tokenizer='k2:.*has SHA-256 [0-9a-f]{64}; K2's tokenizer has b6c4.*Fix: "
    ):
        load_tokenizer(f"k2:{tmp_path}")
    with pytest.raises(FileNotFoundError, match=r"data\.tokenizer='k2:.*none does not exist\. Fix: .*'k2'"):
        load_tokenizer(f"k2:{tmp_path}/none")


# --- Hugging Face -------------------------------------------------------------------------------------------------

PAGES = [Document(f"{i}.txt", f"the clip of a head keeps its logit low {i}\n".encode()) for i in range(200)]


@pytest.fixture(scope="module")
def bpe(tmp_path_factory):
    """(tokenizer, folder) of a small trained BPE."""
    pytest.importorskip("tokenizers")
    from k2jax.data.tokenizers.hugging_face import train_bpe

    folder = tmp_path_factory.mktemp("bpe")
    return train_bpe(PAGES, 290, folder), folder


def test_a_trained_bpe_loses_no_character_and_loads_again(bpe):
    tokenizer, folder = bpe
    assert tokenizer.vocab_size == 290
    assert len(tokenizer.encode(" keeps its logit low")) < 14
    for seed in range(3):
        assert_is_a_tokenizer(tokenizer, random_text(seed))
    for name in (f"hf:{folder}", f"hf:{folder}/tokenizer.json"):
        assert load_tokenizer(name).fingerprint == tokenizer.fingerprint
        assert load_tokenizer(name).encode("a head").tolist() == tokenizer.encode("a head").tolist()


def test_training_a_bpe_twice_gives_the_same_ids(bpe, tmp_path):
    from k2jax.data.tokenizers.hugging_face import train_bpe

    assert train_bpe(PAGES, 290, tmp_path).fingerprint == bpe[0].fingerprint
    assert train_bpe(PAGES, 289, tmp_path).fingerprint != bpe[0].fingerprint


@pytest.mark.parametrize(("size", "message"), [(258, "alone are 259"), (100_000, r"words for \d+ ids only")])
def test_a_bpe_size_that_cannot_be_is_refused(bpe, tmp_path, size, message):
    from k2jax.data.tokenizers.hugging_face import train_bpe

    with pytest.raises(ValueError, match=rf"vocab_size={size}: .*{message}.*Fix: "):
        train_bpe(PAGES, size, tmp_path)
    assert not (tmp_path / "tokenizer.json").exists()


def test_hf_in_a_document_special_tokens_are_text(bpe):
    text = "a <|eos|> b <|bos|>"
    ids = bpe[0].encode_document(text)
    assert not {bpe[0].bos_id, bpe[0].eos_id} & set(ids[1:-1].tolist())
    assert bpe[0].decode(ids) == text


def changed(folder, out, **config):
    """Copy of a tokenizer with `tokenizer.json` edited by config['edit'] and tokenizer_config.json from the rest."""
    content = json.loads((folder / "tokenizer.json").read_text())
    config.pop("edit", lambda content: None)(content)
    out.mkdir()
    (out / "tokenizer.json").write_text(json.dumps(content))
    if config:
        (out / "tokenizer_config.json").write_text(json.dumps(config))
    return load_tokenizer(f"hf:{out}")


def test_hf_what_the_file_would_do_to_a_text_is_switched_off(bpe, tmp_path):
    def cut_and_fill(content):
        content["truncation"] = {"direction": "Right", "max_length": 4, "strategy": "LongestFirst", "stride": 0}
        content["padding"] = {
            "strategy": {"Fixed": 64}, "direction": "Right", "pad_to_multiple_of": None, "pad_id": 2, "pad_type_id": 0,
            "pad_token": "<|pad|>",
        }  # fmt: skip
        content["post_processor"] = {
            "type": "TemplateProcessing",
            "single": [{"SpecialToken": {"id": "<|bos|>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
            "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
            "special_tokens": {"<|bos|>": {"id": "<|bos|>", "ids": [0], "tokens": ["<|bos|>"]}},
        }

    other = changed(bpe[1], tmp_path / "t", edit=cut_and_fill)
    text = "the clip of a head keeps its logit low"
    np.testing.assert_array_equal(other.encode_document(text), bpe[0].encode_document(text))


def test_hf_special_ids_come_from_the_config_beside_it(bpe, tmp_path):
    only_eos = changed(bpe[1], tmp_path / "a", eos_token="<|eos|>")
    assert (only_eos.bos_id, only_eos.eos_id, only_eos.pad_id) == (1, 1, 1)
    swapped = changed(bpe[1], tmp_path / "b", bos_token={"content": "<|pad|>"}, eos_token="<|bos|>", pad_token=None)
    assert (swapped.bos_id, swapped.eos_id, swapped.pad_id) == (2, 0, 0)
    assert len({bpe[0].fingerprint, only_eos.fingerprint, swapped.fingerprint}) == 3
    with pytest.raises(ValueError, match=r"calls eos_token '</s>', which .*lacks\. Fix: "):
        changed(bpe[1], tmp_path / "c", eos_token="</s>")
    with pytest.raises(ValueError, match=r"does not say which token ends a document\. Fix: put a tokenizer_config"):
        changed(bpe[1], tmp_path / "d", model_max_length=5)
    (tmp_path / "a" / "tokenizer_config.json").write_text("[1]")
    with pytest.raises(ValueError, match=r"tokenizer_config\.json is no JSON object"):
        load_tokenizer(f"hf:{tmp_path / 'a'}")


def test_hf_text_that_the_vocabulary_cannot_write_is_refused(tmp_path):
    tokenizers = pytest.importorskip("tokenizers")
    words = {"<unk>": 0, "</s>": 1, "known": 2}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="<unk>"))
    tokenizer.add_special_tokens(["<unk>", "</s>"])
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    loaded = load_tokenizer(f"hf:{tmp_path}")
    assert loaded.encode("known").tolist() == [2]
    with pytest.raises(ValueError, match=r"cannot write the text that begins with 'strange'.*Fix: use a byte-level"):
        loaded.encode_document("strange")


# --- by name ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["bpe", "k2:", "hf:", "hf", "", "bytes:x"])
def test_a_name_that_is_not_known_is_refused(name):
    with pytest.raises(ValueError, match=rf"data\.tokenizer='{name}' is not known\. Fix: use 'bytes', 'k2', "):
        load_tokenizer(name)


def test_a_missing_or_damaged_tokenizer_json_is_named(tmp_path):
    pytest.importorskip("tokenizers")
    with pytest.raises(FileNotFoundError, match=r"data\.tokenizer='hf:.*tokenizer\.json does not exist\. Fix: "):
        load_tokenizer(f"hf:{tmp_path}")
    (tmp_path / "tokenizer.json").write_text('{"model": ')
    with pytest.raises(ValueError, match=r"tokenizer\.json is no tokenizer\.json \(.*Fix: "):
        load_tokenizer(f"hf:{tmp_path}")


@pytest.mark.parametrize(("name", "extra"), [("k2", "k2"), ("hf:x", "hf")])
def test_a_missing_package_is_named_with_its_extra(name, extra):
    code = (
        "import sys\nfor name in ('tiktoken', 'splintr', 'tokenizers'):\n    sys.modules[name] = None\n"
        f"from k2jax.data.tokenizers import load_tokenizer\nload_tokenizer({name!r})"
    )
    result = subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[1], capture_output=True, text=True)
    assert re.search(
        rf"ValueError: data\.tokenizer='{name}'.*Fix: pip install 'k2jax\[{extra}\]'\.$", result.stderr.strip()
    )


def test_bytes_by_name():
    assert isinstance(load_tokenizer("bytes"), ByteTokenizer)
    assert_is_a_tokenizer(load_tokenizer("bytes"), random_text(0))
