"""Language and speech models of transformers, built small from their configs."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from benchmarks.zoo.architecture import Architecture, Batch, Blocks, Phase, Workload, own_loss

__all__ = ["LANGUAGE"]

_VOCABULARY = 256


def _tokens(batch_size: int, length: int) -> Tensor:
    return torch.randint(3, _VOCABULARY, (batch_size, length))


def _model(name: str, head: str, **config: object) -> nn.Module:
    import transformers  # noqa: PLC0415 - seconds to import

    # Training uses neither the cache of keys and values nor the tokens that end a text.
    common = {"use_cache": False, "bos_token_id": None, "eos_token_id": None, "pad_token_id": 0}
    made = getattr(transformers, f"{name}Config")(**(common | config))
    return getattr(transformers, f"{name}{head}")(made).train()


def _causal(
    name: str, *, batch_size: int = 8, length: int = 64, head: str = "ForCausalLM", **config: object
) -> Callable[[int], Workload]:
    def build(seed: int) -> Workload:
        torch.manual_seed(seed)
        module = _model(name, head, vocab_size=_VOCABULARY, **config)
        tokens = _tokens(batch_size, length)
        return Workload(module, {"input_ids": tokens, "labels": tokens}, (Phase(own_loss),))

    return build


def _with_mask(seed: int) -> Workload:
    """Llama as trainers call it: with an attention mask, which here hides nothing, and without dropout.

    Eager code drops such a mask and takes a causal kernel; a compiler's trace, which reads no values, keeps it.
    """
    workload = _causal("Llama", **(_DECODER | {"attention_dropout": 0.0}))(seed)
    mask = torch.ones_like(workload.batch["input_ids"])
    return Workload(workload.module, {**workload.batch, "attention_mask": mask}, workload.phases)


def _masked(name: str, **config: object) -> Callable[[int], Workload]:
    """A masked language model on padded texts: its attention mask differs between rows."""

    def build(seed: int) -> Workload:
        torch.manual_seed(seed)
        module = _model(name, "ForMaskedLM", vocab_size=_VOCABULARY, **config)
        tokens = _tokens(8, 64)
        mask = torch.arange(64) < torch.tensor([64, 60, 48, 40, 64, 33, 20, 8])[:, None]
        batch = {"input_ids": tokens, "attention_mask": mask.long(), "labels": tokens.masked_fill(~mask, -100)}
        return Workload(module, batch, (Phase(own_loss),))

    return build


def _t5(seed: int) -> Workload:
    torch.manual_seed(seed)
    module = _model(
        "T5",
        "ForConditionalGeneration",
        vocab_size=_VOCABULARY,
        d_model=64,
        d_kv=16,
        d_ff=128,
        num_layers=3,
        num_heads=4,
        decoder_start_token_id=0,
    )
    batch = {"input_ids": _tokens(8, 64), "labels": _tokens(8, 48)}
    return Workload(module, batch, (Phase(own_loss),))


def _whisper(seed: int) -> Workload:
    torch.manual_seed(seed)
    module = _model(
        "Whisper",
        "ForConditionalGeneration",
        vocab_size=_VOCABULARY,
        num_mel_bins=16,
        d_model=64,
        encoder_layers=3,
        decoder_layers=3,
        encoder_attention_heads=4,
        decoder_attention_heads=4,
        encoder_ffn_dim=128,
        decoder_ffn_dim=128,
        max_source_positions=64,
        max_target_positions=32,
        dropout=0.1,
        decoder_start_token_id=1,
    )
    batch = {"input_features": torch.randn(8, 16, 128), "labels": _tokens(8, 32)}
    return Workload(module, batch, (Phase(own_loss),))


def _wav2vec2(seed: int) -> Workload:
    """Pretrained features fine-tuned by CTC; spans of time are masked, drawn by numpy."""
    torch.manual_seed(seed)
    module = _model(
        "Wav2Vec2",
        "ForCTC",
        vocab_size=32,
        hidden_size=64,
        num_hidden_layers=3,
        num_attention_heads=4,
        intermediate_size=128,
        conv_dim=(32, 32, 32),
        conv_stride=(5, 2, 2),
        conv_kernel=(10, 3, 3),
        num_conv_pos_embeddings=16,
        num_conv_pos_embedding_groups=4,
        layerdrop=0.1,
        mask_time_length=4,
        mask_time_prob=0.1,
        ctc_loss_reduction="mean",
    )
    batch = {"input_values": torch.randn(4, 2560), "labels": torch.randint(1, 32, (4, 12))}
    return Workload(module, batch, (Phase(own_loss),))


def _clip(seed: int) -> Workload:
    import transformers  # noqa: PLC0415 - seconds to import

    torch.manual_seed(seed)
    shared = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 3, "num_attention_heads": 4}
    # The text ends at the token with the highest number.
    text = {
        "vocab_size": _VOCABULARY,
        "max_position_embeddings": 32,
        "bos_token_id": 1,
        "eos_token_id": _VOCABULARY - 1,
        **shared,
    }
    vision = {"image_size": 48, "patch_size": 8, **shared}
    module = transformers.CLIPModel(
        transformers.CLIPConfig(text_config=text, vision_config=vision, projection_dim=32)
    ).train()
    batch = {"input_ids": _tokens(8, 32), "pixel_values": torch.randn(8, 3, 48, 48)}

    def loss(module: nn.Module, batch: Batch) -> Tensor:
        return module(**batch, return_loss=True).loss

    return Workload(module, batch, (Phase(loss),))


_DECODER = {
    "hidden_size": 64,
    "intermediate_size": 176,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "attention_dropout": 0.1,
}
_ENCODER = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
}

LANGUAGE = (
    Architecture("llama", _causal("Llama", **_DECODER, tie_word_embeddings=True), is_fast=True),
    Architecture("llama_with_mask", _with_mask, is_fast=True),
    Architecture("qwen2", _causal("Qwen2", **_DECODER)),
    Architecture(
        "mixtral",
        _causal("Mixtral", **_DECODER, num_local_experts=4, output_router_logits=True),
        blocks=Blocks.MODULE,  # its hooks are installed in the first forward; torch._grouped_mm has no float32 trace
        is_fast=True,
    ),
    Architecture("gpt2", _causal("GPT2", head="LMHeadModel", n_embd=64, n_layer=4, n_head=4, n_positions=64)),
    Architecture(
        "opt",
        _causal(
            "OPT",
            hidden_size=64,
            ffn_dim=128,
            num_hidden_layers=4,
            num_attention_heads=4,
            max_position_embeddings=64,
            word_embed_proj_dim=64,
            layerdrop=0.2,
        ),
        blocks=Blocks.MODULE,  # skips layers by drawn numbers
        is_fast=True,
    ),
    Architecture("gpt_neox", _causal("GPTNeoX", **_ENCODER, hidden_dropout=0.1, attention_dropout=0.1)),
    Architecture("mamba", _causal("Mamba", batch_size=4, length=32, hidden_size=32, num_hidden_layers=3, state_size=8)),
    Architecture(
        "rwkv", _causal("Rwkv", batch_size=8, length=16, hidden_size=64, attention_hidden_size=64, num_hidden_layers=4)
    ),
    Architecture("bert", _masked("Bert", **_ENCODER), is_fast=True),
    Architecture("albert", _masked("Albert", embedding_size=32, **_ENCODER)),
    Architecture(
        "distilbert",
        _masked("DistilBert", dim=64, hidden_dim=128, n_layers=4, n_heads=4, max_position_embeddings=64),
    ),
    Architecture("t5", _t5, is_fast=True),
    Architecture("whisper", _whisper),
    Architecture("wav2vec2", _wav2vec2, blocks=Blocks.MODULE),  # reads the largest label, skips layers
    Architecture("clip", _clip),
)
