"""Make the configuration of a public architecture tiny: hidden size 64, two to four layers, 256 tokens.

A rule by name serves most configurations of transformers; `OVERRIDES` has what a rule cannot know. Nothing here imports
torch.
"""

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, TypeGuard, cast

__all__ = ["DIFFUSERS", "NUM_LAYERS", "OVERRIDES", "VOCABULARY", "tiny_values"]

VOCABULARY = 256
NUM_LAYERS = 4
_SPECIAL_TOKENS_FROM = 200  # the tokens of a batch are below

_LAYERS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers", "depth", "num_blocks")
_HALF = (
    "encoder_layers", "decoder_layers", "num_encoder_layers", "num_decoder_layers", "encoder_num_hidden_layers",
    "decoder_num_hidden_layers", "num_sparse_encoder_layers", "speech_encoder_layers", "t2u_encoder_layers",
    "t2u_decoder_layers",
)  # fmt: skip
_HIDDEN = (
    "hidden_size", "d_model", "n_embd", "dim", "emb_dim", "embedding_size", "hidden_dim", "word_embed_proj_dim",
    "decoder_hidden_size", "encoder_hidden_size", "pooler_hidden_size", "output_hidden_size", "lru_width",
    "attention_hidden_size", "embedding_dim", "cross_hidden_size", "input_embedding_size", "output_embedding_size",
    "projection_dim", "out_hidden_size", "hidden_size_global", "d_latents",
)  # fmt: skip
_INNER = (
    "intermediate_size", "encoder_ffn_dim", "decoder_ffn_dim", "ffn_dim", "d_ff", "d_inner", "n_inner", "dim_ff", "dff",
    "ffn_hidden_size", "feed_forward_size", "dense_intermediate_size", "mlp_dim", "intermediate_size_mlp",
    "shared_intermediate_size", "speech_encoder_intermediate_size", "t2u_encoder_ffn_dim", "t2u_decoder_ffn_dim",
)  # fmt: skip
_INNER_OF_EXPERTS = (
    "moe_intermediate_size", "shared_expert_intermediate_size", "expert_ffn_hidden_size",
    "shared_experts_intermediate_size", "moe_shared_expert_intermediate_size",
)  # fmt: skip
_HEADS = (
    "num_attention_heads", "n_head", "n_heads", "num_heads", "encoder_attention_heads", "decoder_attention_heads",
    "num_encoder_attention_heads", "num_decoder_attention_heads", "attention_heads", "encoder_num_attention_heads",
    "decoder_num_attention_heads", "encoder_num_key_value_heads", "decoder_num_key_value_heads", "num_kv_heads",
    "num_self_attention_heads", "num_cross_attention_heads", "swa_num_attention_heads", "cross_num_attention_heads",
    "cross_num_key_value_heads", "speech_encoder_attention_heads", "t2u_encoder_attention_heads",
    "t2u_decoder_attention_heads", "index_n_heads", "linear_num_value_heads", "conf_num_attention_heads",
    "linear_num_heads", "linear_num_key_heads",
)  # fmt: skip
_HEAD_SIZE = (
    "head_dim", "kv_channels", "d_head", "d_kv", "attention_head_size", "swa_head_dim", "cross_head_dim", "v_head_dim",
    "linear_key_head_dim", "linear_value_head_dim", "index_head_dim", "qk_nope_head_dim", "attention_head_dim",
    "dim_head", "linear_head_dim", "global_head_dim",
)  # fmt: skip
_EXPERTS = (
    "num_experts", "n_routed_experts", "num_local_experts", "moe_num_experts", "n_experts", "num_routed_experts",
)  # fmt: skip
_LENGTHS = (
    "max_position_embeddings", "n_positions", "max_source_positions", "max_target_positions", "n_ctx", "max_seq_len",
    "max_encoder_position_embeddings", "max_decoder_position_embeddings", "context_length", "max_text_positions",
    "t2u_max_position_embeddings",
)  # fmt: skip
_VOCABULARIES = (
    "vocab_size", "src_vocab_size", "tgt_vocab_size", "decoder_vocab_size", "vocab_size_per_layer_input",
    "codebook_size", "t2u_vocab_size", "entity_vocab_size", "unpadded_vocab_size", "char_vocab_size",
)  # fmt: skip

_EXACT: dict[str, int] = {
    **dict.fromkeys(_LAYERS, NUM_LAYERS),
    **dict.fromkeys(_HALF, NUM_LAYERS // 2),
    **dict.fromkeys(_HIDDEN, 64),
    **dict.fromkeys(_INNER, 128),
    **dict.fromkeys(_INNER_OF_EXPERTS, 32),
    **dict.fromkeys(_HEADS, 4),
    **dict.fromkeys(_HEAD_SIZE, 16),
    **dict.fromkeys(_EXPERTS, 4),
    **dict.fromkeys(_LENGTHS, 128),
    **dict.fromkeys(_VOCABULARIES, VOCABULARY),
    "num_experts_per_tok": 2,
    "num_experts_per_token": 2,
    "moe_topk": 2,
    "moe_k": 2,
    "n_group": 1,
    "num_expert_group": 1,
    "topk_group": 1,
    "kv_lora_rank": 16,
    "q_lora_rank": 32,
    "o_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_head_dim": 24,
    "rotary_dim": 8,
    "query_pre_attn_scalar": 16,
    "sliding_window": 32,
    "sliding_window_size": 32,
    "attention_window_size": 32,
    "local_attention": 32,
    "attention_chunk_size": 32,
    "index_topk": 16,
    "num_mel_bins": 16,
    "input_feat_per_channel": 16,
    "feature_projection_input_dim": 16,
    "hidden_size_per_layer_input": 16,
    "num_kv_shared_layers": 0,
    "max_window_layers": 2,
    "num_conv_pos_embeddings": 16,
    "num_conv_pos_embedding_groups": 4,
    "classifier_proj_size": 32,
    "xvector_output_dim": 32,
    "num_channels": 3,
    "bottleneck_size": 16,
    "intra_bottleneck_size": 32,
    "true_hidden_size": 32,
    "entity_emb_size": 32,
    "mamba_n_heads": 8,
    "mamba_num_heads": 8,
    "mamba_d_head": 16,
    "mamba_head_dim": 16,
    "mamba_d_state": 16,
    "ssm_state_size": 16,
    "state_size": 16,
    "mamba_chunk_size": 32,
    "mamba_dt_rank": 8,
    "time_step_rank": 8,
    "chunk_size": 32,
    "conv_channels": 32,
    "subsampling_conv_channels": 32,
}

# Pictures stay as small as their patches allow: eight patches a side.
_NUM_PATCHES_A_SIDE = 8
_NARROWEST_STAGE = 16
_LARGEST_SIZE = 256
_LOOKS_LIKE_A_SIZE = re.compile(r"(_dim|_size|_width|_channels|_rank|_units|_hidden_dim)$")
_LOOKS_LIKE_STAGES = re.compile(
    r"(hidden_sizes?|embed_dims?|dims?|channels|conv_dim|tdnn_dim|base_attn_unit_dims|stage_(in|mid|out)_channels)$"
)
_LOOKS_LIKE_DEPTHS = re.compile(r"(depths?|stage_num_blocks|num_block_repeats|n_attn_blocks|numb_of_layers|focal_dep)")
_LOOKS_LIKE_HEADS = re.compile(r"(num_heads|num_attention_heads)$")
_LOOKS_LIKE_A_TOKEN = re.compile(r"(_token_id|_token_index)$")
_FIRST_TOKENS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1}

OVERRIDES: dict[str, dict[str, Any]] = {
    "audio-spectrogram-transformer": {"max_length": 128},
    "big_bird": {"attention_type": "original_full"},  # what it changes to, once and for all, for short texts
    "bit": {"num_groups": 4},
    "blt": {"encoder_hash_byte_group_vocab": 512},
    "cohere_compass_text": {
        "rope_parameters": {
            kind: {"rope_type": "default", "rope_theta": 10000.0} for kind in ("full_attention", "sliding_attention")
        }
    },
    "cvt": {"depth": [1, 2, 3], "embed_dim": [16, 48, 96]},
    "deepseek_v2": {"num_experts_per_tok": 2},
    "dia": {"delay_pattern": [0, 8, 9]},
    "donut-swin": {"window_size": 2, "image_size": 64},
    "dots1": {"n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2},
    "efficientnet": {"width_coefficient": 0.3, "depth_coefficient": 0.6, "hidden_dim": 384, "image_size": 64},
    "esm": {"vocab_size": VOCABULARY, "pad_token_id": 0, "mask_token_id": 4},
    "esmc": {"vocab_size": VOCABULARY},
    "gemma4_assistant": {"hidden_size_per_layer_input": 0},
    "hgnet_v2": {
        "stem_channels": [3, 8, 16],
        "stage_in_channels": [16, 32, 64, 96],
        "stage_mid_channels": [8, 16, 24, 32],
        "stage_out_channels": [32, 64, 96, 128],
        "stage_numb_of_layers": [2, 2, 2, 2],
    },
    "hunyuan_v1_dense": {"head_dim": 16},
    "hunyuan_v1_moe": {"head_dim": 16},
    "imagegpt": {"vocab_size": VOCABULARY},
    "led": {"attention_window": 16, "max_encoder_position_embeddings": 128, "max_decoder_position_embeddings": 128},
    "lfm2_moe": {"layer_types": ["conv", "full_attention", "conv", "full_attention"]},
    "mamba2": {"num_heads": 8, "head_dim": 16, "n_groups": 2},
    "ministral": {"head_dim": 16},
    "mobilebert": {"true_hidden_size": 32, "intra_bottleneck_size": 32, "embedding_size": 32},
    "mobilevitv2": {"image_size": 128},
    "nemotron": {"num_key_value_heads": 2},
    "pop2piano": {"d_kv": 16},
    "ReformerForMaskedLM": {"is_decoder": False},
    "reformer": {
        "axial_pos_shape": [8, 8],
        "axial_pos_embds_dim": [16, 48],
        "is_decoder": True,
        "num_buckets": 4,
        "local_attn_chunk_length": 16,
        "lsh_attn_chunk_length": 16,
    },
    "speech_to_text": {"max_source_positions": 256},
    "speecht5": {"max_text_positions": 128, "vocab_size": VOCABULARY},
    "swin": {"window_size": 2, "image_size": 64},
    "textnet": {"image_size": 64, "stem_out_channels": 16, "hidden_sizes": [16, 16, 24, 32, 48]},
    "wav2vec2-bert": {"vocab_size": 32},
    "wav2vec2-conformer": {"vocab_size": 32},
    "xmod": {"default_language": "en_XX"},
    "zamba2": {
        "attention_hidden_size": 128,
        "attention_head_dim": 32,
        "kv_channels": 16,
        "mamba_headdim": 32,
        "n_mamba_heads": 4,
        "hybrid_layer_ids": [1, 3],
        "layers_block_type": ["linear_attention", "hybrid", "linear_attention", "hybrid"],
    },
}
"""What the rule cannot know, by the `model_type` of a configuration, or by the class."""


def tiny_values(values: Mapping[str, Any], *, keeps_unknown_sizes: bool = False) -> dict[str, Any]:
    """Return the values of a configuration that differ from the defaults `values`, so that it becomes tiny.

    **Arguments:** `values`: attributes by name, with nested configurations as dictionaries. `keeps_unknown_sizes`:
    leaves out what is only guessed from the end of a name.
    """
    num_layers = next((values[name] for name in _LAYERS if isinstance(values.get(name), int)), 0)
    found: dict[str, Any] = {}
    for name, value in values.items():
        tiny = _tiny_value(name, value, num_layers, values, guesses=not keeps_unknown_sizes)
        if tiny != value:
            found[name] = tiny
    return found


def _tiny_value(name: str, value: Any, num_layers: int, values: Mapping[str, Any], *, guesses: bool) -> Any:
    if isinstance(value, dict):
        return _tiny_part(cast("dict[str, Any]", value), guesses=guesses)
    if _LOOKS_LIKE_A_TOKEN.search(name):
        return _tiny_token(name, value)
    if isinstance(value, bool) or value is None or isinstance(value, (str, float)):
        return value
    if _is_list(value):
        return _tiny_list(name, value, num_layers)
    if not isinstance(value, int):
        return value
    if name in ("num_key_value_heads", "swa_num_key_value_heads"):
        heads = values.get(name.replace("key_value", "attention"))
        return 1 if value == 1 else 4 if value == heads else 2
    if name == "head_dim" and "qk_rope_head_dim" in values:
        return 8  # latent attention calls its rotary part so
    if name == "embed_dim" and "depths" in values:
        return 32  # doubled from stage to stage
    if name == "image_size":
        return _tiny_side(values)
    if name in _EXACT:
        return min(value, _EXACT[name]) if value > 0 else value
    if guesses and value >= _LARGEST_SIZE and _LOOKS_LIKE_A_SIZE.search(name):
        return 64
    return value


def _is_list(value: Any) -> TypeGuard[Sequence[Any]]:
    return isinstance(value, (list, tuple))


def _tiny_part(values: dict[str, Any], *, guesses: bool) -> dict[str, Any]:
    """Return all values of a nested configuration, tiny; other dictionaries stay as they are."""
    if "model_type" not in values:
        return values
    tiny = values | tiny_values(values, keeps_unknown_sizes=not guesses)
    tiny.pop("per_layer_config", None)  # it is made of the other values, by the number of a layer
    return tiny


def _tiny_side(values: Mapping[str, Any]) -> int:
    patch: Any = values.get("patch_size")
    sides = list(patch) if _is_list(patch) else [patch]
    return _NUM_PATCHES_A_SIDE * max([s for s in sides if isinstance(s, int)] or [8])


def _tiny_token(name: str, value: Any) -> Any:
    if isinstance(value, int) and not isinstance(value, bool):
        if value < 0:
            return value
        number = sum(map(ord, name)) % (VOCABULARY - _SPECIAL_TOKENS_FROM)
        return _FIRST_TOKENS.get(name, _SPECIAL_TOKENS_FROM + number)
    return [_FIRST_TOKENS.get(name, 2)] * len(value) if _is_list(value) else value


def _tiny_list(name: str, value: Sequence[Any], num_layers: int) -> Sequence[Any]:
    made: Callable[[Iterable[Any]], Sequence[Any]] = list[Any] if isinstance(value, list) else tuple[Any, ...]
    if value and len(value) == num_layers and num_layers > NUM_LAYERS:
        return made(_every_kind(value)[:NUM_LAYERS])
    if not all(isinstance(v, int) and not isinstance(v, bool) for v in value) or not value:
        return value
    if _LOOKS_LIKE_DEPTHS.search(name):
        return made(min(v, 2) for v in value)
    if _LOOKS_LIKE_HEADS.search(name):
        return made(max(1, v // value[0]) for v in value)
    if _LOOKS_LIKE_STAGES.search(name):
        factor = max(1, min(value) // _NARROWEST_STAGE)
        return made(max(8, v // factor // 8 * 8) for v in value)
    return value


def _every_kind(value: Sequence[Any]) -> list[Any]:
    """Return `NUM_LAYERS` of the layers in their order: the first ones, or one of each kind if those lack one."""
    first = list(value[:NUM_LAYERS])
    if all(any(v == f for f in first) for v in value):
        return first
    kinds = [v for n, v in enumerate(value) if all(v != earlier for earlier in value[:n])]
    return [kinds[n] if n < len(kinds) else kinds[-1] for n in range(NUM_LAYERS)]


_TEXT = ("noise", 2, 8, 32)
_UNET = {
    "sample_size": 32,
    "block_out_channels": (16, 32),
    "layers_per_block": 1,
    "norm_num_groups": 8,
}
_UNET_WITH_TEXT = {
    **_UNET,
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
    "cross_attention_dim": 32,
    "attention_head_dim": 8,
}
_VAE = {
    "block_out_channels": (16, 32),
    "down_block_types": ("DownEncoderBlock2D",) * 2,
    "up_block_types": ("UpDecoderBlock2D",) * 2,
    "norm_num_groups": 8,
}
_HEADS_OF_16: dict[str, int] = {"num_attention_heads": 4, "attention_head_dim": 16}

# A control net takes what its model takes, and the picture that steers it.
_SD3 = {
    **_HEADS_OF_16,
    "sample_size": 16,
    "patch_size": 2,
    "in_channels": 4,
    "num_layers": 3,
    "joint_attention_dim": 32,
    "caption_projection_dim": 64,
    "pooled_projection_dim": 64,
    "out_channels": 4,
}
_SD3_INPUTS = {
    "hidden_states": ("noise", 2, 4, 16, 16),
    "encoder_hidden_states": _TEXT,
    "pooled_projections": ("noise", 2, 64),
    "timestep": ("steps", 2),
}
_FLUX = {
    **_HEADS_OF_16,
    "patch_size": 1,
    "in_channels": 4,
    "num_layers": 2,
    "num_single_layers": 2,
    "joint_attention_dim": 32,
    "pooled_projection_dim": 32,
    "axes_dims_rope": [4, 4, 8],
}
_FLUX_INPUTS = {
    "hidden_states": ("noise", 2, 64, 4),
    "encoder_hidden_states": _TEXT,
    "pooled_projections": ("noise", 2, 32),
    "timestep": ("ones", 2),
    "img_ids": ("ones", 64, 3),
    "txt_ids": ("ones", 8, 3),
}
DIFFUSERS: dict[str, tuple[dict[str, Any], dict[str, tuple[Any, ...]]]] = {
    "UNet1DModel": (
        {
            "block_out_channels": (16, 32),
            "sample_size": 32,
            "in_channels": 8,
            "out_channels": 8,
            "down_block_types": ("DownResnetBlock1D",) * 2,
            "up_block_types": ("UpResnetBlock1D",),
            "mid_block_type": "MidResTemporalBlock1D",
            "layers_per_block": 1,
            "act_fn": "swish",
            "out_block_type": "OutConv1DBlock",
            "flip_sin_to_cos": False,
            "freq_shift": 1.0,
            "use_timestep_embedding": True,
        },
        {"sample": ("noise", 4, 8, 32), "timestep": ("steps", 4)},
    ),
    "UNet2DModel": (
        _UNET
        | {
            "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
            "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
            "attention_head_dim": 8,
        },
        {"sample": ("noise", 4, 3, 32, 32), "timestep": ("steps", 4)},
    ),
    "UNet2DConditionModel": (
        _UNET_WITH_TEXT | {"up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D")},
        {"sample": ("noise", 2, 4, 32, 32), "timestep": ("steps", 2), "encoder_hidden_states": _TEXT},
    ),
    "UNet3DConditionModel": (
        _UNET
        | {
            "down_block_types": ("CrossAttnDownBlock3D", "DownBlock3D"),
            "up_block_types": ("UpBlock3D", "CrossAttnUpBlock3D"),
            "cross_attention_dim": 32,
            "attention_head_dim": 8,
        },
        {"sample": ("noise", 1, 4, 4, 16, 16), "timestep": ("steps", 1), "encoder_hidden_states": ("noise", 1, 8, 32)},
    ),
    "UNetSpatioTemporalConditionModel": (
        {
            "block_out_channels": (32, 64),
            "layers_per_block": 1,
            "num_attention_heads": 4,
            "sample_size": 16,
            "down_block_types": ("CrossAttnDownBlockSpatioTemporal", "DownBlockSpatioTemporal"),
            "up_block_types": ("UpBlockSpatioTemporal", "CrossAttnUpBlockSpatioTemporal"),
            "cross_attention_dim": 32,
            "addition_time_embed_dim": 32,
            "projection_class_embeddings_input_dim": 96,
        },
        {
            "sample": ("noise", 1, 2, 8, 16, 16),
            "timestep": ("steps", 1),
            "encoder_hidden_states": ("noise", 1, 1, 32),
            "added_time_ids": ("noise", 1, 3),
        },
    ),
    "UVit2DModel": (
        {
            "hidden_size": 32,
            "cond_embed_dim": 32,
            "micro_cond_encode_dim": 8,
            "micro_cond_embed_dim": 40,
            "encoder_hidden_size": 32,
            "vocab_size": 32,
            "codebook_size": 16,
            "in_channels": 32,
            "block_out_channels": 32,
            "num_hidden_layers": 3,
            "num_attention_heads": 4,
            "intermediate_size": 64,
            "block_num_heads": 4,
            "sample_size": 8,
        },
        {
            "input_ids": ("classes", 2, 8, 8),
            "encoder_hidden_states": _TEXT,
            "pooled_text_emb": ("noise", 2, 32),
            "micro_conds": ("ones", 2, 5),
        },
    ),
    "AutoencoderKL": (_VAE, {"sample": ("noise", 2, 3, 32, 32)}),
    "AsymmetricAutoencoderKL": (
        {
            "down_block_types": ("DownEncoderBlock2D",) * 2,
            "down_block_out_channels": (16, 32),
            "up_block_types": ("UpDecoderBlock2D",) * 2,
            "up_block_out_channels": (16, 32),
            "norm_num_groups": 8,
        },
        {"sample": ("noise", 2, 3, 32, 32), "mask": ("ones", 2, 1, 32, 32)},
    ),
    "AutoencoderKLTemporalDecoder": (
        {"block_out_channels": (32, 64), "down_block_types": ("DownEncoderBlock2D",) * 2, "layers_per_block": 1},
        {"sample": ("noise", 2, 3, 16, 16)},
    ),
    "AutoencoderTiny": (
        {
            "encoder_block_out_channels": (16, 16),
            "decoder_block_out_channels": (16, 16),
            "num_encoder_blocks": (1, 2),
            "num_decoder_blocks": (2, 1),
        },
        {"sample": ("noise", 2, 3, 32, 32)},
    ),
    "AutoencoderDC": (
        {
            "in_channels": 3,
            "latent_channels": 4,
            "attention_head_dim": 2,
            "encoder_block_types": ("ResBlock", "EfficientViTBlock"),
            "decoder_block_types": ("ResBlock", "EfficientViTBlock"),
            "encoder_block_out_channels": (8, 8),
            "decoder_block_out_channels": (8, 8),
            "encoder_qkv_multiscales": ((), (5,)),
            "decoder_qkv_multiscales": ((), (5,)),
            "encoder_layers_per_block": (1, 1),
            "decoder_layers_per_block": (1, 1),
            "downsample_block_type": "conv",
            "upsample_block_type": "interpolate",
            "decoder_norm_types": "rms_norm",
            "decoder_act_fns": "silu",
            "scaling_factor": 0.4,
        },
        {"sample": ("noise", 2, 3, 32, 32)},
    ),
    "AutoencoderOobleck": (
        {
            "encoder_hidden_size": 12,
            "decoder_channels": 12,
            "decoder_input_channels": 6,
            "audio_channels": 2,
            "downsampling_ratios": [2, 4],
            "channel_multiples": [1, 2],
        },
        {"sample": ("noise", 2, 2, 512)},
    ),
    "AutoencoderKLCogVideoX": (
        {
            "down_block_types": ("CogVideoXDownBlock3D",) * 4,
            "up_block_types": ("CogVideoXUpBlock3D",) * 4,
            "block_out_channels": (8, 8, 8, 8),
            "latent_channels": 4,
            "layers_per_block": 1,
            "norm_num_groups": 2,
            "temporal_compression_ratio": 4,
        },
        {"sample": ("noise", 1, 3, 8, 16, 16)},
    ),
    "AutoencoderKLWan": (
        {
            "base_dim": 3,
            "z_dim": 16,
            "dim_mult": [1, 1, 1, 1],
            "num_res_blocks": 1,
            "temperal_downsample": [False, True, True],
        },
        {"sample": ("noise", 1, 3, 9, 16, 16)},
    ),
    "VQModel": (
        _VAE | {"latent_channels": 3, "num_vq_embeddings": 32},
        {"sample": ("noise", 2, 3, 32, 32)},
    ),
    "ControlNetModel": (
        {
            "block_out_channels": (16, 32),
            "layers_per_block": 1,
            "norm_num_groups": 8,
            "cross_attention_dim": 32,
            "attention_head_dim": 8,
            "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
            "conditioning_embedding_out_channels": (8, 16),
        },
        {
            "sample": ("noise", 2, 4, 16, 16),
            "timestep": ("steps", 2),
            "encoder_hidden_states": _TEXT,
            "controlnet_cond": ("noise", 2, 3, 32, 32),
        },
    ),
    "Transformer2DModel": (
        {**_HEADS_OF_16, "in_channels": 32, "norm_num_groups": 8, "num_layers": 3, "cross_attention_dim": 32},
        {"hidden_states": ("noise", 2, 32, 16, 16), "encoder_hidden_states": _TEXT},
    ),
    "DiTTransformer2DModel": (
        {
            **_HEADS_OF_16,
            "in_channels": 4,
            "out_channels": 4,
            "num_layers": 4,
            "norm_num_groups": 8,
            "sample_size": 16,
            "num_embeds_ada_norm": 10,
        },
        {"hidden_states": ("noise", 4, 4, 16, 16), "timestep": ("steps", 4), "class_labels": ("classes", 4)},
    ),
    "PixArtTransformer2DModel": (
        {
            **_HEADS_OF_16,
            "in_channels": 4,
            "out_channels": 8,
            "num_layers": 3,
            "sample_size": 16,
            "patch_size": 2,
            "cross_attention_dim": 64,
            "caption_channels": 32,
            "norm_num_groups": 8,
            "use_additional_conditions": False,
        },
        {"hidden_states": ("noise", 2, 4, 16, 16), "timestep": ("steps", 2), "encoder_hidden_states": _TEXT},
    ),
    "SD3Transformer2DModel": (_SD3, _SD3_INPUTS),
    "SD3ControlNetModel": (_SD3, _SD3_INPUTS | {"controlnet_cond": ("noise", 2, 4, 16, 16)}),
    "FluxTransformer2DModel": (_FLUX, _FLUX_INPUTS),
    "FluxControlNetModel": (_FLUX, _FLUX_INPUTS | {"controlnet_cond": ("noise", 2, 64, 4)}),
    "AuraFlowTransformer2DModel": (
        {
            **_HEADS_OF_16,
            "sample_size": 16,
            "patch_size": 2,
            "in_channels": 4,
            "num_mmdit_layers": 2,
            "num_single_dit_layers": 2,
            "caption_projection_dim": 64,
            "joint_attention_dim": 32,
            "out_channels": 4,
            "pos_embed_max_size": 64,
        },
        {"hidden_states": ("noise", 2, 4, 16, 16), "encoder_hidden_states": _TEXT, "timestep": ("ones", 2)},
    ),
    "HunyuanDiT2DModel": (
        {
            **_HEADS_OF_16,
            "sample_size": 16,
            "patch_size": 2,
            "in_channels": 4,
            "num_layers": 4,
            "hidden_size": 64,
            "cross_attention_dim": 32,
            "cross_attention_dim_t5": 32,
            "pooled_projection_dim": 16,
            "text_len": 8,
            "text_len_t5": 8,
            "activation_fn": "gelu-approximate",
            "use_style_cond_and_image_meta_size": False,
        },
        {
            "hidden_states": ("noise", 2, 4, 16, 16),
            "encoder_hidden_states": _TEXT,
            "timestep": ("steps", 2),
            "text_embedding_mask": ("ones", 2, 8),
            "encoder_hidden_states_t5": _TEXT,
            "text_embedding_mask_t5": ("ones", 2, 8),
        },
    ),
    "SanaTransformer2DModel": (
        {
            "patch_size": 1,
            "in_channels": 4,
            "out_channels": 4,
            "num_layers": 3,
            "num_attention_heads": 4,
            "attention_head_dim": 16,
            "num_cross_attention_heads": 4,
            "cross_attention_head_dim": 16,
            "cross_attention_dim": 64,
            "caption_channels": 32,
            "sample_size": 16,
        },
        {"hidden_states": ("noise", 2, 4, 16, 16), "encoder_hidden_states": _TEXT, "timestep": ("steps", 2)},
    ),
    "CogVideoXTransformer3DModel": (
        {
            **_HEADS_OF_16,
            "in_channels": 4,
            "out_channels": 4,
            "time_embed_dim": 16,
            "text_embed_dim": 32,
            "num_layers": 3,
            "sample_width": 8,
            "sample_height": 8,
            "sample_frames": 9,
            "patch_size": 2,
            "temporal_compression_ratio": 4,
            "max_text_seq_length": 8,
        },
        {"hidden_states": ("noise", 2, 3, 4, 8, 8), "encoder_hidden_states": _TEXT, "timestep": ("steps", 2)},
    ),
    "WanTransformer3DModel": (
        {
            "patch_size": (1, 2, 2),
            "num_attention_heads": 4,
            "attention_head_dim": 16,
            "in_channels": 4,
            "out_channels": 4,
            "text_dim": 32,
            "freq_dim": 64,
            "ffn_dim": 64,
            "num_layers": 3,
            "cross_attn_norm": True,
            "qk_norm": "rms_norm_across_heads",
            "rope_max_seq_len": 32,
        },
        {
            "hidden_states": ("noise", 1, 4, 2, 16, 16),
            "encoder_hidden_states": ("noise", 1, 8, 32),
            "timestep": ("steps", 1),
        },
    ),
    "MochiTransformer3DModel": (
        {
            **_HEADS_OF_16,
            "patch_size": 2,
            "num_layers": 3,
            "pooled_projection_dim": 32,
            "in_channels": 4,
            "text_embed_dim": 32,
            "time_embed_dim": 16,
            "max_sequence_length": 8,
        },
        {
            "hidden_states": ("noise", 1, 4, 2, 16, 16),
            "encoder_hidden_states": ("noise", 1, 8, 32),
            "timestep": ("steps", 1),
            "encoder_attention_mask": ("flags", 1, 8),
        },
    ),
    "Lumina2Transformer2DModel": (
        {
            "sample_size": 16,
            "patch_size": 2,
            "in_channels": 4,
            "hidden_size": 64,
            "num_layers": 2,
            "num_refiner_layers": 1,
            "num_attention_heads": 4,
            "num_kv_heads": 2,
            "multiple_of": 16,
            "axes_dim_rope": (4, 4, 8),
            "axes_lens": (64, 64, 64),
            "cap_feat_dim": 32,
        },
        {
            "hidden_states": ("noise", 2, 4, 16, 16),
            "encoder_hidden_states": _TEXT,
            "timestep": ("ones", 2),
            "encoder_attention_mask": ("flags", 2, 8),
        },
    ),
    "StableAudioDiTModel": (
        {
            "sample_size": 32,
            "in_channels": 8,
            "out_channels": 8,
            "num_layers": 3,
            "attention_head_dim": 16,
            "num_attention_heads": 4,
            "num_key_value_attention_heads": 2,
            "cross_attention_dim": 32,
            "cross_attention_input_dim": 32,
            "time_proj_dim": 32,
            "global_states_input_dim": 32,
        },
        {
            "hidden_states": ("noise", 2, 8, 32),
            "timestep": ("steps", 2),
            "encoder_hidden_states": _TEXT,
            "global_hidden_states": ("noise", 2, 1, 32),
        },
    ),
    "PriorTransformer": (
        {
            "num_attention_heads": 4,
            "attention_head_dim": 16,
            "num_layers": 3,
            "embedding_dim": 32,
            "num_embeddings": 8,
            "additional_embeddings": 4,
        },
        {
            "hidden_states": ("noise", 4, 32),
            "timestep": ("steps", 4),
            "proj_embedding": ("noise", 4, 32),
            "encoder_hidden_states": ("noise", 4, 8, 32),
        },
    ),
}
"""The main classes of diffusers: the arguments of their constructors, and what their forward is given."""
