"""LongCat-Flash as released (arXiv 2509.01322): 560.66 B parameters, 27.15 B active per token.

Look at it with `longcat plan --config=configs/flash_560b.py`; nothing is allocated. Training it
needs a cluster; the batch here is the report's first stage in spirit, not its schedule.
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    """Released sizes; hyperparameters transferred from a proxy of width 768 (s = 8)."""
    return ConfigDict(
        dict(
            seed=0,
            model=dict(
                vocab_size=131072,
                hidden_size=6144,
                num_layers=28,
                num_attention_heads=64,
                q_lora_rank=1536,
                kv_lora_rank=512,
                qk_nope_head_dim=128,
                qk_rope_head_dim=64,
                v_head_dim=128,
                ffn_hidden_size=12288,
                expert_ffn_hidden_size=2048,
                n_routed_experts=512,
                zero_expert_num=256,
                moe_topk=12,
                moe_topk_real=8.0,
                routed_scaling_factor=6.0,
                rope_theta=1e6,
            ),
            proxy=dict(hidden_size=768),
            train=dict(
                steps=500_000,
                global_batch=4096,
                sequence_length=8192,
                eval_every=1000,
                checkpoint_every=1000,
                remat="full",
            ),
            optim=dict(
                learning_rate=2e-3,
                warmup_steps=2000,
                decay_steps=50_000,
                balance=dict(alpha=1e-3, groups=32),
            ),
        )
    )
