"""Byte-level BPE: trained on a corpus in seconds, or read from a tokenizer.json.

Only byte-level tokenizers are taken: any text round-trips exactly and the number of bytes behind
every id is known, which is what bits per byte are counted with. Ids 0, 1 and 2 of a trained one are
<unk> (never produced; padding), <longcat_s> (begin) and </longcat_s> (end), the released model's
begin and end.
"""

import hashlib
import json
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from longcat_jax.data.records import DataError

SPECIAL_TOKENS = ("<unk>", "<longcat_s>", "</longcat_s>")
SAMPLE_BYTES = 8_000_000
"""Text that training looks at; more changes the merges little and takes seconds longer."""
MIN_VOCAB_SIZE = len(SPECIAL_TOKENS) + 256


def _byte_of_character() -> dict[str, int]:
    """The printable stand-in of every byte in byte-level vocabularies (GPT-2's table)."""
    kept = [*range(33, 127), *range(161, 173), *range(174, 256)]
    table = {chr(byte): byte for byte in kept}
    for offset, byte in enumerate(byte for byte in range(256) if byte not in set(kept)):
        table[chr(256 + offset)] = byte
    return table


class Tokenizer:
    """A byte-level tokenizer. `sha256` identifies its vocabulary and rules."""

    def __init__(self, text: str) -> None:
        """`text`: the content of a tokenizer.json, known to be byte-level."""
        self._tokenizer = tokenizers.Tokenizer.from_str(text)
        # "</longcat_s>" inside a document is text, not the end of it.
        self._tokenizer.encode_special_tokens = True
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self.text = text
        self.sha256 = hashlib.sha256(text.encode()).hexdigest()
        self.vocab_size = 1 + max(self._tokenizer.get_vocab(with_added_tokens=True).values())

    def encode(self, text: str) -> list[int]:
        """Ids of `text`, without begin and end."""
        return self._tokenizer.encode(text, add_special_tokens=False).ids

    def encode_documents(
        self, texts: Sequence[str], *, bos_token_id: int, eos_token_id: int
    ) -> list[np.ndarray]:
        """Each text as int32 ids between `bos_token_id` and `eos_token_id`, on all cores."""
        encoded = self._tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)
        return [np.array([bos_token_id, *e.ids, eos_token_id], np.int32) for e in encoded]

    def decode(self, ids: Sequence[int]) -> str:
        """Text of `ids`; special tokens are left out, bytes that aren't UTF-8 become U+FFFD."""
        return self._tokenizer.decode([int(i) for i in ids], skip_special_tokens=True)

    def token_bytes(self) -> np.ndarray:
        """int32 [vocab_size]: bytes of text behind each id; 0 for special tokens and unused ids."""
        added = self._tokenizer.get_added_tokens_decoder()
        length = np.zeros(self.vocab_size, np.int32)
        for token, index in self._tokenizer.get_vocab(with_added_tokens=True).items():
            if index not in added:
                length[index] = len(token)  # a character of a byte-level token stands for a byte
            elif not added[index].special:
                length[index] = len(token.encode())
        return length

    def special_ids(self) -> frozenset[int]:
        """Ids of special tokens."""
        added = self._tokenizer.get_added_tokens_decoder()
        return frozenset(index for index, token in added.items() if token.special)

    def save(self, path: Path) -> None:
        """Writes the tokenizer.json."""
        path.write_text(self.text, encoding="utf-8")


def _is_byte_level(description: dict) -> bool:
    decoder = description.get("decoder") or {}
    parts = [decoder, *decoder.get("decoders", ())]
    return any(part.get("type") == "ByteLevel" for part in parts)


def load_tokenizer(path: str | Path) -> Tokenizer:
    """The tokenizer in a tokenizer.json.

    Raises:
      DataError: no such file, not a tokenizer, or not a byte-level one.
    """
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8")
        description = json.loads(text)
        byte_level = isinstance(description, dict) and _is_byte_level(description)
    except OSError as error:
        raise DataError(f"{path}: cannot read the tokenizer ({error.strerror})") from error
    except ValueError as error:
        raise DataError(f"{path}: not a tokenizer.json ({error})") from error
    if not byte_level:
        raise DataError(f"{path}: not a byte-level tokenizer; bits per byte need one")
    try:
        return Tokenizer(text)
    except Exception as error:  # the library raises bare Exception
        raise DataError(f"{path}: not a tokenizer.json ({error})") from error


def train_tokenizer(documents: Iterable[str], vocab_size: int) -> Tokenizer:
    """Byte-level BPE of at most `vocab_size` entries; the same text gives the same file.

    Args:
      documents: the first SAMPLE_BYTES of them are looked at.
      vocab_size: special tokens and the 256 bytes included.

    Raises:
      DataError: fewer entries than the bytes and special tokens alone take.
    """
    if vocab_size < MIN_VOCAB_SIZE:
        raise DataError(
            f"vocab_size={vocab_size}: must be >= {MIN_VOCAB_SIZE} (256 bytes and "
            f"{len(SPECIAL_TOKENS)} special tokens)"
        )
    sample, size = [], 0
    for document in documents:
        sample.append(document)
        size += len(document)
        if size >= SAMPLE_BYTES:
            break
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=sorted(_byte_of_character()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(sample, trainer, length=len(sample))
    return Tokenizer(tokenizer.to_str(pretty=True))
