"""Small LongCat-Flash on the Python source of the environment, for two CPU cores."""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    """16 real and 16 identity experts, 3 of 4 selections steered to real ones."""
    return ConfigDict(
        dict(
            seed=0,
            model=dict(
                vocab_size=4096,
                hidden_size=96,
                num_layers=4,
                num_attention_heads=4,
                q_lora_rank=48,
                kv_lora_rank=32,
                qk_nope_head_dim=16,
                qk_rope_head_dim=8,
                v_head_dim=16,
                ffn_hidden_size=192,
                expert_ffn_hidden_size=64,
                n_routed_experts=16,
                zero_expert_num=16,
                moe_topk=4,
                moe_topk_real=3.0,
                routed_scaling_factor=6.0,
                rope_theta=10000.0,
                initializer_range=0.1,
                max_position_embeddings=4096,
                dtype="float32",
            ),
            train=dict(
                steps=700,
                global_batch=8,
                sequence_length=128,
                log_every=20,
                eval_every=140,
                checkpoint_every=140,
                remat="full",  # on a CPU making activations again is quicker than storing them
            ),
            optim=dict(
                learning_rate=8e-3,
                schedule="wsd",
                warmup_steps=40,
                decay_steps=660,
                final_scale=0.02,
                router_scale=0.15,
                balance=dict(alpha=1e-3, groups=8),
                pid=dict(mu=0.1, mu_final=0.03),
            ),
        )
    )
