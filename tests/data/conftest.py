"""Two small prepared sources with one tokenizer, and configurations that read them."""

import random
from collections.abc import Callable
from pathlib import Path

import pytest

from longcat_jax.config import Config, from_mapping
from longcat_jax.data import prepare

MODEL = dict(
    vocab_size=320,
    hidden_size=24,
    num_layers=2,
    num_attention_heads=3,
    q_lora_rank=12,
    kv_lora_rank=8,
    qk_nope_head_dim=10,
    qk_rope_head_dim=4,
    v_head_dim=6,
    ffn_hidden_size=48,
    expert_ffn_hidden_size=16,
    n_routed_experts=5,
    zero_expert_num=2,
    moe_topk=3,
    moe_topk_real=2.0,
)


def write_text(path: Path, alphabet: str, documents: int, *, seed: int) -> Path:
    """A .jsonl file of documents of 1 to 60 words over an alphabet."""
    draw = random.Random(seed)
    with path.open("w") as file:
        for _ in range(documents):
            words = ["".join(draw.choices(alphabet, k=5)) for _ in range(draw.randint(1, 60))]
            file.write('{"text": "' + " ".join(words) + '"}\n')
    return path


@pytest.fixture(scope="session")
def sources(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """`letters` and `digits`: prepared directories whose texts share no character but the space."""
    root = tmp_path_factory.mktemp("sources")
    letters = write_text(root / "letters.jsonl", "abcde", 70, seed=1)
    digits = write_text(root / "digits.jsonl", "01234", 40, seed=2)
    prepare([str(letters)], root / "letters", vocab_size=310, validation=0.1)
    tokenizer = str(root / "letters" / "tokenizer.json")
    prepare([str(digits)], root / "digits", tokenizer_path=tokenizer, validation=0.1)
    return {name: str(root / name) for name in ("letters", "digits")}


@pytest.fixture(scope="session")
def make_config() -> Callable[..., Config]:
    """Config of 6 rows of 19 tokens, with `data` and other top-level or train fields replaced."""

    def make(data: dict, *, seed: int = 0, model: dict | None = None, **train: int) -> Config:
        return from_mapping(
            dict(
                seed=seed,
                model=MODEL | (model or {}),
                train=dict(steps=9, global_batch=6, sequence_length=19) | train,
                optim=dict(learning_rate=1e-3),
                data=data,
            )
        )

    return make
