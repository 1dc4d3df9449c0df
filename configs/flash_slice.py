"""Two blocks of LongCat-Flash at its real widths: what one 80 GB GPU trains of it.

Width 6144, 64 heads, experts of 2048, top 12; 24 + 12 experts instead of 512 + 256 and a
vocabulary of 32768, so that float32 master weights and Adam moments fit. For experiments/bench. It
needs 77 GB: XLA_PYTHON_CLIENT_MEM_FRACTION=0.92.
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    """24 real and 12 identity experts, 8 of 12 selections steered to real ones."""
    return ConfigDict(
        dict(
            seed=0,
            model=dict(
                vocab_size=32768,
                hidden_size=6144,
                num_layers=2,
                num_attention_heads=64,
                q_lora_rank=1536,
                kv_lora_rank=512,
                qk_nope_head_dim=128,
                qk_rope_head_dim=64,
                v_head_dim=128,
                ffn_hidden_size=12288,
                expert_ffn_hidden_size=2048,
                n_routed_experts=24,
                zero_expert_num=12,
                moe_topk=12,
                moe_topk_real=8.0,
                routed_scaling_factor=6.0,
                rope_theta=1e6,
                initializer_range=0.01,
                max_position_embeddings=8192,
                num_nextn_predict_layers=0,
                dtype="bfloat16",
            ),
            train=dict(
                steps=1000,
                global_batch=5,
                sequence_length=4096,
                remat="selective",
                unroll=2,  # all layers
                vocab_chunk=32768,  # whole
            ),
            optim=dict(
                learning_rate=2e-4,
                warmup_steps=100,
                decay_steps=200,
                mtp_weight=0.0,
                balance=dict(alpha=1e-3, groups=8),
            ),
        )
    )
