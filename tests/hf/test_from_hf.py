"""Imported checkpoints compute what the oracle computes, whatever the files look like."""

import dataclasses
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import longcat_jax as lc
from longcat_jax.config import MeshConfig
from longcat_jax.hf.from_hf import check, from_hf
from longcat_jax.hf.selection import Selection
from longcat_jax.model.longcat import Model
from longcat_jax.sharding import make_mesh
from tests.golden.checkpoint import load_golden
from tests.golden.reference import Reference
from tests.hf import variants
from tests.hf.variants import BF16, GOLDEN, VARIANTS, copy_golden, golden

TOLERANCE = {"tiny": 5e-5, "tiny_yarn": 5e-5, "tiny_fp8": 2e-4}


def expected(name: str) -> dict[str, np.ndarray]:
    return dict(np.load(GOLDEN / name / "expected.npz"))


def assert_reproduces(model: Model, wanted: dict[str, np.ndarray], tolerance: float) -> None:
    """Logits, MTP logits where there are, selected experts as sets."""
    has_mtp = "mtp" in model.params
    out = lc.forward(model, wanted["ids"], mtp=has_mtp)
    for row in range(len(wanted["ids"])):
        assert np.abs(out.logits[row] - wanted[f"logits_{row}"]).max() <= tolerance
        if has_mtp:
            assert np.abs(out.mtp_logits[row] - wanted[f"mtp_logits_{row}"]).max() <= tolerance
        np.testing.assert_array_equal(
            np.sort(out.selected_experts[:, row], axis=-1), np.sort(wanted[f"selected_{row}"], -1)
        )


@pytest.mark.parametrize("name", list(TOLERANCE))
def test_golden_numbers(name: str, tmp_path: Path) -> None:
    result = from_hf(GOLDEN / name, tmp_path / "out")
    model, wanted = lc.load(tmp_path / "out"), expected(name)
    assert result.finished and not result.warnings
    assert model.config.dtype == "float32"
    assert_reproduces(model, wanted, TOLERANCE[name])


@pytest.mark.parametrize("name", ["tiny", "tiny_yarn"])
def test_golden_greedy_tokens(name: str, tmp_path: Path) -> None:
    from_hf(GOLDEN / name, tmp_path / "out")
    model, wanted = lc.load(tmp_path / "out"), expected(name)
    prompt, greedy = wanted["greedy_prompt"].tolist(), wanted["greedy"].tolist()
    assert lc.generate(model, [prompt], max_new_tokens=len(greedy)).tokens == [greedy]


@pytest.fixture(scope="module")
def parameters() -> dict:
    """The golden parameters by an independent loader."""
    return load_golden("tiny")[1]


def assert_same_parameters(actual: dict, wanted: dict) -> None:
    assert jax.tree.structure(actual) == jax.tree.structure(wanted)
    for (path, a), b in zip(
        jax.tree_util.tree_leaves_with_path(actual), jax.tree.leaves(wanted), strict=True
    ):
        a = np.asarray(a)
        assert (a.dtype, a.shape) == (b.dtype, b.shape), path
        assert a.tobytes() == np.ascontiguousarray(b).tobytes(), path


@pytest.mark.parametrize("dialect", ["released", "transformers"])
@pytest.mark.parametrize("variant", list(VARIANTS))
def test_every_layout_gives_the_same_parameters(
    variant: str, dialect: str, parameters: dict, tmp_path: Path
) -> None:
    raw, tensors = golden("tiny")
    if dialect == "transformers":
        raw = variants.transformers_dialect(raw)
    from_hf(VARIANTS[variant](raw, tensors, tmp_path / "hf"), tmp_path / "out")
    model = lc.load(tmp_path / "out")
    wanted = dict(parameters)
    if variant == "without_mtp":
        del wanted["mtp"]
        assert model.config.num_nextn_predict_layers == 0
    assert_same_parameters(model.params, wanted)


@pytest.mark.parametrize("variant", ["padded", "sharded", "without_mtp"])
def test_golden_numbers_of_other_layouts(variant: str, tmp_path: Path) -> None:
    from_hf(VARIANTS[variant](*golden("tiny_yarn"), tmp_path / "hf"), tmp_path / "out")
    assert_reproduces(lc.load(tmp_path / "out"), expected("tiny_yarn"), 5e-5)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_16_bit_files_keep_their_dtype_and_the_router_its_own(dtype: str, tmp_path: Path) -> None:
    raw, tensors = golden("tiny")
    kind = BF16 if dtype == "bfloat16" else np.dtype(np.float16)
    tensors = variants.rounded(tensors, kind)
    from_hf(variants.plain({**raw, "dtype": dtype}, tensors, tmp_path / "hf"), tmp_path / "out")
    model = lc.load(tmp_path / "out")
    assert model.config.dtype == dtype
    for path, leaf in jax.tree_util.tree_leaves_with_path(model.params):
        router = any(getattr(key, "key", "") == "router" for key in path)
        assert leaf.dtype == (jnp.float32 if router else kind), path
    # Computed in float32, the rounded parameters give the rounded oracle's numbers.
    ids = expected("tiny")["ids"]
    reference = Reference(raw, {n: np.asarray(v, np.float64) for n, v in tensors.items()})
    wanted = {"ids": ids}
    for row, sequence in enumerate(ids):
        logits, hidden, selected = reference.forward(sequence)
        wanted |= {f"logits_{row}": logits, f"selected_{row}": selected}
        wanted[f"mtp_logits_{row}"] = reference.mtp(sequence, hidden)
    exact = Model(
        dataclasses.replace(model.config, dtype="float32"),
        jax.tree.map(lambda x: x.astype(jnp.float32), model.params),
    )
    assert_reproduces(exact, wanted, 5e-5)


def test_a_bfloat16_checkpoint_runs_as_it_is(tmp_path: Path) -> None:
    from_hf(GOLDEN / "tiny", tmp_path / "out", dtype="bfloat16")
    wanted = expected("tiny")
    logits = lc.forward(lc.load(tmp_path / "out"), wanted["ids"]).logits
    error = np.asarray(logits[0], np.float64) - wanted["logits_0"]
    assert np.sqrt((error**2).mean()) < 0.1 * wanted["logits_0"].std()


def test_a_router_rounded_by_somebody_else_is_stored_in_float32(tmp_path: Path) -> None:
    raw, tensors = golden("tiny")
    tensors = {name: value.astype(BF16) for name, value in tensors.items()}
    from_hf(variants.plain(raw, tensors, tmp_path / "hf"), tmp_path / "out")
    router = lc.load(tmp_path / "out").params["layers"]["mlp"]["router"]
    wanted = tensors["model.layers.1.mlp.router.classifier.weight"].astype(np.float32)
    assert router["classifier"].dtype == router["e_score_correction_bias"].dtype == jnp.float32
    np.testing.assert_array_equal(router["classifier"][1], wanted.T)


def test_fp8_becomes_the_dtype_that_config_json_names(tmp_path: Path) -> None:
    raw, tensors = variants.read_fp8("tiny_fp8")
    exempt = "model.layers.0.self_attn.0.q_b_proj.weight"  # as disable_quant_module leaves some
    scale = tensors.pop(exempt + "_scale_inv")
    full = np.repeat(np.repeat(scale, 128, 0), 128, 1)[:160, :136]
    tensors[exempt] = (tensors[exempt].astype(np.float32) * full).astype(BF16)
    raw["dtype"] = "bfloat16"
    from_hf(variants.write_fp8(tmp_path / "hf", raw, tensors), tmp_path / "out")
    model = lc.load(tmp_path / "out")
    assert model.config.dtype == "bfloat16"
    attention = model.params["layers"]["self_attn_0"]
    assert attention["q_b_proj"].dtype == jnp.bfloat16
    np.testing.assert_array_equal(attention["q_b_proj"][0], tensors[exempt].T)
    # kv_a_proj_with_mqa has 144 rows: one block of 128 and a partial one, as 576 = 4.5 x 128.
    name = "model.layers.1.self_attn.0.kv_a_proj_with_mqa.weight"
    scale = np.repeat(np.repeat(tensors[name + "_scale_inv"], 128, 0), 128, 1)[:144, :160]
    wanted = (tensors[name].astype(np.float32) * scale).astype(BF16)
    np.testing.assert_array_equal(attention["kv_a_proj_with_mqa"][1], wanted.T)


def test_dtype_option_converts_all_but_the_router(tmp_path: Path) -> None:
    from_hf(GOLDEN / "tiny", tmp_path / "out", dtype="bfloat16")
    model = lc.load(tmp_path / "out")
    _, tensors = golden("tiny")
    assert model.config.dtype == "bfloat16"
    np.testing.assert_array_equal(model.params["lm_head"], tensors["lm_head.weight"].astype(BF16).T)
    assert model.params["layers"]["mlp"]["router"]["classifier"].dtype == jnp.float32


def test_opens_onto_a_mesh(parameters: dict, tmp_path: Path) -> None:
    from_hf(GOLDEN / "tiny", tmp_path / "out")
    mesh = make_mesh(MeshConfig(fsdp=2, expert=2))
    params = lc.load(tmp_path / "out", mesh=mesh).params
    experts = params["layers"]["mlp"]["experts"]["gate_up_proj"]
    assert experts.addressable_shards[0].data.shape == (3, 5, 24, 44)
    assert_same_parameters(params, parameters)


def test_tokenizer_and_config_stand_beside(tmp_path: Path) -> None:
    source = copy_golden("tiny", tmp_path / "hf")
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        (source / name).write_text(f'{{"name": "{name}"}}')
    (source / "modeling.py").write_text("import os")
    from_hf(source, tmp_path / "out")
    model = lc.load(tmp_path / "out")
    assert model.tokenizer == tmp_path / "out" / "tokenizer.json"
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert names == {
        "checkpoints",
        "config.json",
        "generation_config.json",
        "tokenizer.json",
        "tokenizer_config.json",
    }
    saved = json.loads((tmp_path / "out" / "config.json").read_text())
    assert saved["model"]["moe_topk_real"] == model.config.moe_topk_real


def test_a_slice_is_the_model_with_those_layers_and_experts(tmp_path: Path) -> None:
    """Against the oracle on tensors picked by hand."""
    raw, tensors = golden("tiny")
    selection = Selection(layers=(1, 3), experts=(2, 9))
    result = from_hf(GOLDEN / "tiny", tmp_path / "out", selection=selection)
    model = lc.load(tmp_path / "out")
    rows = [*range(2, 9), *range(10, 15)]
    small = {n: v for n, v in tensors.items() if ".layers." not in n or ".mtp." in n}
    for layer in (0, 1):
        new, old = f"model.layers.{layer}.", f"model.layers.{layer + 1}."
        for name, value in tensors.items():
            if name.startswith(old) and ".experts." not in name:
                own = value[rows] if ".router." in name else value
                small[new + name.removeprefix(old)] = own
        for expert in range(7):
            for kind in ("gate_proj", "up_proj", "down_proj"):
                part = f"mlp.experts.{{}}.{kind}.weight"
                small[new + part.format(expert)] = tensors[old + part.format(expert + 2)]
    assert result.tensors == len(small)
    config = {**raw, "num_layers": 2, "n_routed_experts": 7}
    reference = Reference(config, {n: np.asarray(v, np.float64) for n, v in small.items()})
    ids = expected("tiny")["ids"][:1]
    logits, hidden, selected = reference.forward(ids[0])
    wanted = {"ids": ids, "logits_0": logits, "selected_0": selected}
    wanted["mtp_logits_0"] = reference.mtp(ids[0], hidden)
    assert_reproduces(model, wanted, 5e-5)


def test_a_slice_lowers_the_budget_where_few_experts_are_left(tmp_path: Path) -> None:
    from_hf(GOLDEN / "tiny", tmp_path / "out", selection=Selection(experts=(4, 6)))
    config = lc.load(tmp_path / "out").config
    assert (config.num_layers, config.n_routed_experts, config.moe_topk_real) == (3, 2, 2)


def test_values_that_are_not_finite_are_warned_of_and_kept(tmp_path: Path) -> None:
    raw, tensors = golden("tiny")
    name = "model.layers.2.mlp.experts.7.up_proj.weight"
    tensors[name] = np.full_like(tensors[name], np.nan)
    tensors["model.norm.weight"][3] = np.inf
    result = from_hf(variants.plain(raw, tensors, tmp_path / "hf"), tmp_path / "out")
    assert sorted(result.warnings) == [
        f"{name}: 1056 of 1056 values are not finite",
        "model.norm.weight: 1 of 48 values are not finite",
    ]
    params = lc.load(tmp_path / "out").params
    assert np.isnan(params["layers"]["mlp"]["experts"]["gate_up_proj"][2, 7, :, 22:]).all()


def test_check_says_what_is_there_and_writes_nothing(tmp_path: Path) -> None:
    folder = VARIANTS["padded"](*golden("tiny"), tmp_path / "hf")
    text = check(folder)
    assert "188 of 188 tensors" in text and "an MTP head" in text
    assert "30 matrices of identity experts are not used" in text
    assert "fp8 matrices become float32" in check(GOLDEN / "tiny_fp8")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["hf"]
