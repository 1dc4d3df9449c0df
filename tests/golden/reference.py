"""LongCat-Flash in plain float64 numpy: the oracle for numbers, independent of the package.

The main model's logits were compared with HuggingFace transformers 5.23 (fp32), YaRN and fp8
included: max |diff| 5e-5 of logits up to 11, the fp32 noise. transformers has no MTP head: this
file is its definition.
"""

import numpy as np


def rms_norm(x, weight, eps):
    return x / np.sqrt((x * x).mean(-1, keepdims=True) + eps) * weight


def silu(x):
    return x / (1 + np.exp(-x))


def softmax(x):
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def rope_frequencies(config, theta):
    """Angles per position [rope/2], gains on cos and sin and on scores (1, 1 without YaRN)."""
    dim = config["qk_rope_head_dim"]
    frequency = theta ** (-np.arange(0, dim, 2) / dim)
    scaling = config.get("rope_scaling") or config.get("rope_parameters") or {}
    if (scaling.get("type") or scaling.get("rope_type") or "default") == "default":
        return frequency, 1.0, 1.0
    factor, original = scaling["factor"], scaling["original_max_position_embeddings"]

    def dim_of(rotations):
        return dim * np.log(original / (rotations * 2 * np.pi)) / (2 * np.log(theta))

    low = max(np.floor(dim_of(scaling.get("beta_fast", 32))), 0)
    high = min(np.ceil(dim_of(scaling.get("beta_slow", 1))), dim - 1)
    ramp = np.clip((np.arange(dim // 2) - low) / max(high - low, 0.001), 0, 1)
    frequency = frequency / factor * ramp + frequency * (1 - ramp)

    def mscale(value):
        return 0.1 * value * np.log(factor) + 1 if factor > 1 else 1.0

    if scaling.get("mscale") and scaling.get("mscale_all_dim"):
        gain = mscale(scaling["mscale"]) / mscale(scaling["mscale_all_dim"])
    else:
        gain = mscale(1.0)
    score = mscale(scaling["mscale_all_dim"]) ** 2 if scaling.get("mscale_all_dim") else 1.0
    return frequency, gain, score


def rotate(x, position, frequency, gain=1.0):
    """x [T, heads, rope]; pairs are (2i, 2i+1); output keeps the order [evens | odds]."""
    angle = position[:, None, None] * frequency
    cos, sin = gain * np.cos(angle), gain * np.sin(angle)
    even, odd = x[..., 0::2], x[..., 1::2]
    return np.concatenate([even * cos - odd * sin, odd * cos + even * sin], -1).astype(x.dtype)


class Reference:
    def __init__(self, config, weights):
        self.c, self.w = config, weights
        rope = config.get("rope_parameters") or {}
        theta = config.get("rope_theta") or rope["rope_theta"]
        self.frequency, self.rope_gain, self.score_gain = rope_frequencies(config, theta)

    def linear(self, x, name):
        return x @ self.w[name + ".weight"].T

    def norm(self, x, name, eps=None):
        return rms_norm(x, self.w[name + ".weight"], eps or self.c["rms_norm_eps"])

    def mla(self, x, prefix, position):
        c = self.c
        heads, nope, rope = c["num_attention_heads"], c["qk_nope_head_dim"], c["qk_rope_head_dim"]
        rank, v_dim, dim, tokens = c["kv_lora_rank"], c["v_head_dim"], c["hidden_size"], len(x)
        q = self.linear(
            self.norm(self.linear(x, prefix + "q_a_proj"), prefix + "q_a_layernorm", 1e-6),
            prefix + "q_b_proj",
        ).reshape(tokens, heads, nope + rope)
        q = q * (dim / c["q_lora_rank"]) ** 0.5
        kv = self.linear(x, prefix + "kv_a_proj_with_mqa")
        latent = self.norm(kv[:, :rank], prefix + "kv_a_layernorm", 1e-6) * (dim / rank) ** 0.5
        k_rope = rotate(kv[:, None, rank:], position, self.frequency, self.rope_gain)
        k_v = self.linear(latent, prefix + "kv_b_proj").reshape(tokens, heads, nope + v_dim)
        q = np.concatenate(
            [q[..., :nope], rotate(q[..., nope:], position, self.frequency, self.rope_gain)], -1
        )
        k = np.concatenate([k_v[..., :nope], np.broadcast_to(k_rope, (tokens, heads, rope))], -1)
        score = np.einsum("thd,shd->hts", q, k) * (nope + rope) ** -0.5 * self.score_gain
        score = np.where(position[None, None, :] <= position[None, :, None], score, -np.inf)
        out = np.einsum("hts,shv->thv", softmax(score), k_v[..., nope:])
        return self.linear(out.reshape(tokens, heads * v_dim), prefix + "o_proj")

    def ffn(self, x, prefix):
        return self.linear(
            silu(self.linear(x, prefix + "gate_proj")) * self.linear(x, prefix + "up_proj"),
            prefix + "down_proj",
        )

    def moe(self, x, prefix):
        c = self.c
        p = softmax(self.linear(x, prefix + "router.classifier"))
        choice = p + self.w[prefix + "router.e_score_correction_bias"]
        selected = np.argsort(-choice, -1, kind="stable")[:, : c["moe_topk"]]
        y = np.zeros_like(x)
        for t, row in enumerate(selected):
            for e in row:
                expert = (
                    x[t]
                    if e >= c["n_routed_experts"]
                    else self.ffn(x[t : t + 1], f"{prefix}experts.{e}.")[0]
                )
                y[t] += p[t, e] * c["routed_scaling_factor"] * expert
        return y, selected

    def block(self, x, layer, position):
        p = f"model.layers.{layer}."
        x = x + self.mla(self.norm(x, p + "input_layernorm.0"), p + "self_attn.0.", position)
        h = self.norm(x, p + "post_attention_layernorm.0")
        shortcut, selected = self.moe(h, p + "mlp.")
        x = x + self.ffn(h, p + "mlps.0.")
        x = x + self.mla(self.norm(x, p + "input_layernorm.1"), p + "self_attn.1.", position)
        h = self.norm(x, p + "post_attention_layernorm.1")
        return x + self.ffn(h, p + "mlps.1.") + shortcut, selected

    def forward(self, ids):
        """ids [T] -> logits [T, V], hidden after the final norm [T, D], selected [L, T, K]."""
        position = np.arange(len(ids))
        x = self.w["model.embed_tokens.weight"][ids]
        selected = []
        for layer in range(self.c["num_layers"]):
            x, chosen = self.block(x, layer, position)
            selected.append(chosen)
        hidden = self.norm(x, "model.norm")
        return hidden @ self.w["lm_head.weight"].T, hidden, np.stack(selected)

    def mtp(self, ids, hidden):
        """Draft logits [T-1, V]: row t predicts token t+2 from hidden_t and the token t+1."""
        p = "model.mtp.layers.0."
        embedding = self.w["model.mtp.embed_tokens.weight"][ids[1:]]
        x = self.linear(
            np.concatenate(
                [self.norm(embedding, p + "enorm.m"), self.norm(hidden[:-1], p + "hnorm.m")], -1
            ),
            p + "eh_proj",
        )
        x = x + self.mla(self.norm(x, p + "input_layernorm"), p + "self_attn.", np.arange(len(x)))
        x = x + self.ffn(self.norm(x, p + "post_attention_layernorm"), p + "transformer_layer.mlp.")
        return self.norm(x, "model.mtp.norm") @ self.w["lm_head.weight"].T


def expected_of(reference, ids):
    out = {"ids": ids}
    for row, sequence in enumerate(ids):
        logits, hidden, selected = reference.forward(sequence)
        out |= {
            f"logits_{row}": logits,
            f"hidden_{row}": hidden,
            f"selected_{row}": selected,
            f"mtp_logits_{row}": reference.mtp(sequence, hidden),
        }
    return out
