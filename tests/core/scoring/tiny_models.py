"""A tiny model of nearly every class that transformers has under a head, from its default config by generic sizes."""

from typing import Any

import torch
import transformers
from transformers.models.auto import modeling_auto

HEADS = ("CAUSAL_LM", "SEQ_TO_SEQ_CAUSAL_LM", "MASKED_LM", "TOKEN_CLASSIFICATION", "SEQUENCE_CLASSIFICATION")
VOCAB, LABELS, PAD, END = 50, 4, 1, 2
MOST = 5_000_000  # parameters that still count as tiny

_SIZES: dict[str, int] = {}
for _size, _names in {
    VOCAB: "vocab_size src_vocab_size tgt_vocab_size n_words word_vocab_size encoder_vocab_size text_vocab_size "
    "entity_vocab_size decoder_vocab_size pronunciation_vocab_size shape_vocab_size",
    16: "hidden_size d_model n_embd dim embed_dim emb_dim embedding_size hidden_dim attention_hidden_size "
    "word_embed_proj_dim projection_dim pooler_hidden_size entity_emb_size q_lora_rank kv_lora_rank qk_nope_head_dim "
    "o_lora_rank lru_width hidden_size_per_layer_input decoder_hidden_size encoder_hidden_size dim_model "
    "cross_attention_hidden_size",
    32: "intermediate_size ffn_dim d_ff n_inner encoder_ffn_dim decoder_ffn_dim d_inner dim_ff ffn_hidden_size "
    "feed_forward_size moe_intermediate_size shared_expert_intermediate_size mamba_d_ssm intermediate_size_mlp "
    "shared_intermediate_size",
    2: "num_hidden_layers n_layer n_layers num_layers encoder_layers decoder_layers num_encoder_layers "
    "num_decoder_layers num_hidden_groups n_enc_layer num_attention_heads n_head n_heads encoder_attention_heads "
    "decoder_attention_heads num_heads num_key_value_heads num_kv_heads n_head_kv num_encoder_attention_heads "
    "num_decoder_attention_heads num_experts_per_tok moe_top_k top_k num_selected_experts n_group topk_group "
    "linear_num_key_heads linear_num_value_heads n_kv_heads depth swa_num_attention_heads swa_num_key_value_heads "
    "ngram n_shared_experts num_codebooks index_n_heads",
    4: "num_experts num_local_experts n_routed_experts moe_num_experts expert_num num_routed_experts",
    8: "head_dim qk_rope_head_dim v_head_dim d_kv kv_channels attention_head_size linear_key_head_dim "
    "linear_value_head_dim qk_head_dim global_head_dim head_size index_head_dim swa_head_dim swa_v_head_dim "
    "attention_key_dim pronunciation_embed_dim shape_embed_dim",
    64: "max_position_embeddings n_positions n_ctx max_source_positions max_target_positions max_sequence_length "
    "seq_length max_seq_len sliding_window context_length",
}.items():
    _SIZES |= dict.fromkeys(_names.split(), _size)
_TOKENS = {"pad_token_id": PAD, "eos_token_id": END, "bos_token_id": 0}

# What the sizes alone don't make consistent.
_MORE: dict[str, dict[str, Any]] = {
    "gptj": {"rotary_dim": 8},
    "codegen": {"n_head": 4, "rotary_dim": 4},
    "nemotron": {"num_key_value_heads": 2, "head_dim": 8},
    "layoutlmv3": {"coordinate_size": 2, "shape_size": 4},
    "lilt": {"hidden_size": 24},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "xmod": {"default_language": "en_XX"},
    "deepseek_v2": {"topk_method": "greedy", "num_experts_per_tok": 2},
    **dict.fromkeys(("ministral", "hunyuan_v1_dense", "hunyuan_v1_moe"), {"head_dim": 8}),
    "mamba2": {"num_heads": 4, "head_dim": 8, "expand": 2, "n_groups": 1},
    "falcon_h1": {"mamba_n_heads": 4, "mamba_d_head": 8, "mamba_d_ssm": 32},
    "zaya": {"num_experts_per_tok": 1, "moe_router_topk": 1},
}


def head_classes(head: str) -> dict[str, str]:
    """The classes under a head, each with a model type that it serves."""
    found: dict[str, str] = {}
    for model_type, names in getattr(modeling_auto, f"MODEL_FOR_{head}_MAPPING_NAMES").items():
        for name in (names,) if isinstance(names, str) else names:
            found.setdefault(name, model_type)
    return found


def _small(config: dict[str, Any]) -> dict[str, Any]:
    sizes: dict[str, Any] = {}
    for name, value in config.items():
        if isinstance(value, dict) and ("config" in name or name in ("encoder", "decoder")):
            sizes[name] = _small(value)
        elif name.endswith("_token_id") and isinstance(value, (int, list)):
            sizes[name] = _TOKENS.get(name, 3)
        elif name == "layer_types" and isinstance(value, list):
            sizes[name] = [value[0], value[-1]]
        elif name in _SIZES and (value or name == "vocab_size") and not isinstance(value, (bool, str, list)):
            sizes[name] = _SIZES[name]
    return sizes


def tiny_model(head: str, name: str, model_type: str, **options: Any) -> Any:
    """A model of a class with weights that make its logits differ; raises where the sizes don't fit."""
    if head in HEADS[3:]:
        options = {"num_labels": LABELS, **options}
    kind: Any = transformers.CONFIG_MAPPING[model_type]
    sizes = {**_small(kind().to_dict()), **_MORE.get(model_type, {}), "pad_token_id": PAD, **options}
    config: Any = kind(**sizes, is_decoder=head == "CAUSAL_LM")
    for part in {id(part): part for part in (config, config.get_text_config())}.values():
        part.pad_token_id = PAD
        if part.is_encoder_decoder:
            part.decoder_start_token_id = 3
    cls = getattr(transformers, name)
    with torch.device("meta"):
        count = sum(parameter.numel() for parameter in cls(config).parameters())
    if count > MOST:
        raise ValueError(f"{name} has {count:,} parameters")
    torch.manual_seed(0)
    model = cls(config).float().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.mul_(3)
    return model


def tiny_batch(head: str) -> dict[str, torch.Tensor]:
    """Three rows of 8, 6 and 5 tokens, padded on the right, each with one end-of-text token (BART pools there)."""
    generator = torch.Generator().manual_seed(0)
    lengths = torch.tensor([8, 6, 5])
    mask = (torch.arange(8) < lengths[:, None]).long()
    ids = torch.randint(4, VOCAB, (3, 8), generator=generator).masked_fill(mask == 0, PAD)
    ids[torch.arange(3), lengths - 1] = END
    if head == "SEQUENCE_CLASSIFICATION":
        labels = torch.tensor([3, 0, 2])
    else:
        most = LABELS if head == "TOKEN_CLASSIFICATION" else VOCAB
        labels = torch.randint(0, most, (3, 8), generator=generator).masked_fill(mask == 0, -100)
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}
