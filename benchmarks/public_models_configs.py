"""Make the configuration of a public architecture tiny: hidden size 64, two to four layers, 256 tokens.

A rule by name serves most configurations of transformers; `OVERRIDES` has what a rule cannot know. Nothing here imports
torch.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any

__all__ = ["NUM_LAYERS", "OVERRIDES", "VOCABULARY", "tiny_values"]

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

OVERRIDES: dict[str, dict[str, Any]] = {}
"""What the rule cannot know, by the `model_type` of a configuration."""


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


def _tiny_value(name: str, value: Any, num_layers: int, values: Mapping[str, Any], *, guesses: bool) -> Any:  # noqa: PLR0911, C901 - one rule a line
    if isinstance(value, dict):
        if "model_type" in value:
            return value | tiny_values(value, keeps_unknown_sizes=not guesses)
        return value
    if _LOOKS_LIKE_A_TOKEN.search(name):
        return _tiny_token(name, value)
    if isinstance(value, bool) or value is None or isinstance(value, (str, float)):
        return value
    if isinstance(value, (list, tuple)):
        return _tiny_list(name, value, num_layers)
    if not isinstance(value, int):
        return value
    if name in ("num_key_value_heads", "swa_num_key_value_heads"):
        heads = values.get(name.replace("key_value", "attention"))
        return 1 if value == 1 else 4 if value == heads else 2
    if name == "image_size":
        return _tiny_side(values)
    if name in _EXACT:
        return min(value, _EXACT[name]) if value > 0 else value
    if guesses and value >= _LARGEST_SIZE and _LOOKS_LIKE_A_SIZE.search(name):
        return 64
    return value


def _tiny_side(values: Mapping[str, Any]) -> int:
    patch = values.get("patch_size")
    sides = [patch] if isinstance(patch, int) else list(patch) if isinstance(patch, (list, tuple)) else []
    return _NUM_PATCHES_A_SIDE * max([s for s in sides if isinstance(s, int)] or [8])


def _tiny_token(name: str, value: Any) -> Any:
    if isinstance(value, int) and not isinstance(value, bool):
        if value < 0:
            return value
        number = sum(map(ord, name)) % (VOCABULARY - _SPECIAL_TOKENS_FROM)
        return _FIRST_TOKENS.get(name, _SPECIAL_TOKENS_FROM + number)
    return type(value)(_FIRST_TOKENS.get(name, 2) for _ in value) if isinstance(value, (list, tuple)) else value


def _tiny_list(name: str, value: Sequence[Any], num_layers: int) -> Any:
    made = type(value)
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


EXTRA_INPUTS: dict[str, tuple[str, ...]] = {}
"""Inputs beside the tokens that a class asks for in training, as zeros of the tokens' shape, by class."""
