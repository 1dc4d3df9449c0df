"""LongCat-Flash of 2.33 B parameters, 0.85 B active: what one 80 GB GPU trains at full speed.

The benchmark model of experiments/bench: the released model's ratios at a third of its width,
float32 master weights and Adam moments beside bfloat16 activations. Rates and initialisation are
those of a proxy an eighth as wide (section 3.1.1): the router's, at full width, would move a logit
by more than 1 in a step, and all tokens would follow the same few experts.
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    """32 real and 16 identity experts, 4 of 6 selections steered to real ones."""
    return ConfigDict(
        dict(
            seed=0,
            model=dict(
                vocab_size=32768,
                hidden_size=2048,
                num_layers=8,
                num_attention_heads=16,
                q_lora_rank=768,
                kv_lora_rank=512,
                qk_nope_head_dim=128,
                qk_rope_head_dim=64,
                v_head_dim=128,
                ffn_hidden_size=4096,
                expert_ffn_hidden_size=1024,
                n_routed_experts=32,
                zero_expert_num=16,
                moe_topk=6,
                moe_topk_real=4.0,
                routed_scaling_factor=6.0,
                rope_theta=10000.0,
                initializer_range=0.0566,  # of the proxy: 0.02 here
                max_position_embeddings=8192,
                num_nextn_predict_layers=0,
                dtype="bfloat16",
            ),
            train=dict(
                steps=2000,
                global_batch=8,
                sequence_length=4096,
                log_every=10,
                eval_every=500,
                checkpoint_every=1000,
                remat="ample",
                unroll=8,  # all layers
                vocab_chunk=32768,  # whole
            ),
            proxy=dict(hidden_size=256),
            optim=dict(
                learning_rate=2.4e-3,  # of the proxy: 3e-4 for matrices here
                schedule="wsd",
                warmup_steps=100,
                decay_steps=400,
                final_scale=0.1,
                router_scale=0.15,
                mtp_weight=0.0,
                balance=dict(alpha=1e-3, groups=8),
                pid=dict(mu=0.05),
            ),
        )
    )
