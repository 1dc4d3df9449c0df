import json
from pathlib import Path

import numpy as np
import pytest
import tokenizers
from tokenizers import models

from longcat_jax.data import DataError, load_tokenizer
from longcat_jax.data.tokenizer import Tokenizer, train_tokenizer

TEXTS = [f"def name_{i}(value: int) -> int:\n    return value * {i}\n" for i in range(60)]
ODD = "a\tb\r\n  \u00e9\u4e2d\U0001f600 </longcat_s><unk> \x01 end"


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train_tokenizer(TEXTS, 300)


def test_any_text_round_trips_and_its_bytes_are_counted(tokenizer: Tokenizer) -> None:
    lengths = tokenizer.token_bytes()
    assert lengths.shape == (300,) and lengths.dtype == np.int32
    for text in (*TEXTS[:3], ODD):
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids) == text
        assert lengths[ids].sum() == len(text.encode())
        assert min(ids) > 2, "special tokens written in a text are text"


def test_special_tokens(tokenizer: Tokenizer) -> None:
    assert tokenizer.special_ids() == {0, 1, 2}
    assert tokenizer.token_bytes()[:3].tolist() == [0, 0, 0]
    (document,) = tokenizer.encode_documents(["def"], bos_token_id=1, eos_token_id=2)
    assert document.dtype == np.int32
    assert document.tolist() == [1, *tokenizer.encode("def"), 2]
    assert tokenizer.decode(document) == "def"


def test_training_is_repeatable_and_merges(tokenizer: Tokenizer) -> None:
    again = train_tokenizer(list(TEXTS), 300)
    assert again.text == tokenizer.text and again.sha256 == tokenizer.sha256
    assert train_tokenizer(TEXTS[:2], 280).sha256 != tokenizer.sha256
    assert len(tokenizer.encode(TEXTS[0])) < len(TEXTS[0]) / 2


def test_saved_and_loaded(tokenizer: Tokenizer, tmp_path: Path) -> None:
    tokenizer.save(tmp_path / "tokenizer.json")
    loaded = load_tokenizer(tmp_path / "tokenizer.json")
    assert loaded.sha256 == tokenizer.sha256
    assert loaded.encode(ODD) == tokenizer.encode(ODD)


def test_added_tokens_count_their_text(tokenizer: Tokenizer, tmp_path: Path) -> None:
    other = tokenizers.Tokenizer.from_str(tokenizer.text)
    other.add_tokens(["\u4e2d\u6587"])
    other.save(str(tmp_path / "t.json"))
    assert load_tokenizer(tmp_path / "t.json").token_bytes()[300] == 6


def test_too_small_a_vocabulary() -> None:
    with pytest.raises(DataError, match="vocab_size=258: must be >= 259"):
        train_tokenizer(TEXTS, 258)


def test_files_that_are_no_byte_level_tokenizer(tmp_path: Path, tokenizer: Tokenizer) -> None:
    path = tmp_path / "t.json"
    with pytest.raises(DataError, match="cannot read the tokenizer"):
        load_tokenizer(path)
    broken = json.loads(tokenizer.text) | {"model": {"type": "BPE"}}
    contents = [b"{", b"\xff\xfe", b"[]", json.dumps(broken).encode()]
    contents.append(tokenizers.Tokenizer(models.BPE()).to_str().encode())
    for content in contents:
        path.write_bytes(content)
        with pytest.raises(DataError, match=r"t\.json: not a ") as caught:
            load_tokenizer(path)
        assert "\n" not in str(caught.value)
