"""The real transformers loads what we export, and we load what it saves (needs torch).

Run with `pytest -m gpu tests/hf/test_transformers.py`; torch itself stays on the CPU.
"""

import dataclasses
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import longcat_jax as lc
from longcat_jax.hf.from_hf import from_hf
from longcat_jax.hf.to_hf import Target, to_hf
from longcat_jax.model.longcat import Model
from tests.hf.variants import GOLDEN, read_tensors, same_bits

pytestmark = [pytest.mark.gpu, pytest.mark.filterwarnings("default")]
TOLERANCE = 5e-5


def in_float32(model: Model) -> Model:
    config = dataclasses.replace(model.config, dtype="float32")
    return Model(config, jax.tree.map(lambda x: x.astype(jnp.float32), model.params))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", ["tiny", "tiny_yarn"])
def test_transformers_computes_the_same_logits_both_ways(
    name: str, dtype: str, tmp_path: Path
) -> None:
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    jax.config.update("jax_default_matmul_precision", "highest")
    from_hf(GOLDEN / name, tmp_path / "ours", dtype=dtype)
    to_hf(tmp_path / "ours", tmp_path / "hf", target=Target("transformers", shard_bytes=300_000))
    expected = np.load(GOLDEN / name / "expected.npz")
    ids = expected["ids"]
    ours = np.asarray(lc.forward(in_float32(lc.load(tmp_path / "ours")), ids).logits)

    kind = transformers.LongcatFlashForCausalLM
    theirs = kind.from_pretrained(tmp_path / "hf", dtype=torch.float32).eval()
    with torch.no_grad():
        logits = theirs(torch.tensor(ids)).logits.numpy()
    print(f"{name} {dtype}: max |ours - transformers {np.abs(ours - logits).max():.2e}|", end=" ")
    assert np.abs(ours - logits).max() <= TOLERANCE
    if dtype == "float32":
        wanted = np.stack([expected["logits_0"], expected["logits_1"]])
        assert np.abs(logits - wanted).max() <= TOLERANCE

    theirs.save_pretrained(tmp_path / "saved")
    from_hf(tmp_path / "saved", tmp_path / "again")
    again = lc.load(tmp_path / "again")
    assert again.config.num_nextn_predict_layers == 0  # transformers has no MTP
    back = np.asarray(lc.forward(again, ids).logits)
    print(f"saved and imported: {np.abs(back - logits).max():.2e}")
    assert np.abs(back - logits).max() <= TOLERANCE
    to_hf(tmp_path / "again", tmp_path / "out", target=Target("transformers"))
    if dtype == "float32":
        source = {n: v for n, v in read_tensors(GOLDEN / name).items() if ".mtp." not in n}
        found = read_tensors(tmp_path / "out")
        same_bits(source, {n: found[n] for n in source})
