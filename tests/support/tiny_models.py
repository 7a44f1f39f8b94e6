"""Any model class of transformers, small: its default config shrunk by the names of its sizes, sub-configs too."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import torch
from transformers import PreTrainedConfig
from transformers.models.auto import modeling_auto
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

VOCAB = 97
# No class is built whose weights would be more than this.
LARGEST = 9_000_000

# The first pattern which fits the name of an integer gives its value.
_SIZES: tuple[tuple[str, int], ...] = (
    (r"(vocab_size|n_vocab|vocabulary_size)(_per_layer_input)?$|^n_tokens$", VOCAB),
    (r"^(image_size|img_size|input_size|tile_size|crop_size|frame_size)$", 28),
    (r"^(patch_size|patch_stride|patch_kernel_size)$", 14),
    (r"(num_key_value_heads|num_kv_heads|num_attention_groups|n_kv_heads|multi_query_group_num|num_global_key_value_heads)$", 2),
    (r"(attention_heads|num_heads|n_heads?|attn_heads|num_query_heads|value_heads|key_heads|mamba_heads)$", 4),
    (r"(num_hidden_layers|n_layers?|num_layers|encoder_layers|decoder_layers|num_encoder_layers|num_decoder_layers|depth|layers)$", 2),
    (r"(num_experts|n_routed_experts|num_local_experts|moe_num_experts|n_experts|num_routed_experts|n_shared_experts.*)$", 4),
    (r"(num_experts_per_tok|experts_per_token|moe_top_?k|top_?k|moe_k|num_experts_per_token|num_selected_experts)$", 2),
    (r"(n_group|topk_group|num_shared_experts|num_groups|n_groups)$", 1),
        (r"(qk_nope_head_dim|v_head_dim|qk_head_dim|head_dim|head_size|d_kv|kv_channels|.*head_dim)$", 8),
    (r"(lora_rank|_rank|low_rank_dim)$", 8),
    (r"(rotary_dim|n_rot|rotary_ndims)$", 4),
    (r"(max_position_embeddings|n_positions|max_seq_len|n_ctx|max_sequence_length|max_target_positions|model_max_length)$", 256),
    (r"max_source_positions$", 32),
    (r"(sliding_window|attention_window|attention_window_size|window_size|local_attention|chunk_size.*|attention_chunk_size)$", 16),
    (r"(intermediate_size|ffn_dim|ffn_hidden_size|d_ff|n_inner|inner_dim|mlp_dim|hidden_dim|d_inner|ff_dim|mlp_hidden.*)(_\w+)?$", 32),
    (r"(hidden_size|d_model|n_embd|embed_dim|embedding_size|dim|hidden_dims|model_dim|projection_dim|width|proj_dim|_embed_dim|emb_dim|d_embed|embd_pdim|lru_width|out_hidden_size|projector_hidden_size)(_\w+)?$", 32),
    (r"(num_mel_bins|n_mels|input_feat_per_channel|num_freq_bins)$", 16),
    (r"(state_size|ssm_state_size|mamba_d_state|d_state|time_step_rank|mamba_d_head|num_landmarks)$", 8),
    (r"(num_feature_levels|num_query_tokens|mm_tokens_per_image|n_queries|num_queries)$", 4),
    (r"(conv_channels|num_channels_hidden)$", 16),
)  # fmt: skip
_SECTION = [2, 1, 1]  # half of a head of 8
# Models which have a section of their own where the config names none.
_THREE_POSITIONS = ("glm4v", "glm46v", "glm_ocr", "paddleocr_vl", "qwen2_vl", "qwen2_5_vl")
_NEVER = re.compile(
    r"(_id|_index|_ids|dropout|_prob|_std|theta|_factor|eps|version|interval|_loss|_coef)$|^(num_feat_extract_layers$|num_labels|pad_|bos_|eos_)"
)
_TOKEN = re.compile(r"(token_id|token_index|_id|token_idx|_token)$")


# Where a size follows from others by no name.
SETTINGS: dict[str, dict[str, Any]] = {
    "hunyuan_v1_dense": dict(head_dim=8),
    "hunyuan_v1_moe": dict(head_dim=8),
    "ministral": dict(head_dim=8),
    "nemotron": dict(num_key_value_heads=2, head_dim=8),
    "lfm2_moe": dict(layer_types=["conv", "full_attention"]),
    "moonshine": dict(encoder_num_key_value_heads=4, decoder_num_key_value_heads=4),
    "speecht5": dict(vocab_size=VOCAB),
    "dbrx": dict(
        attn_config=dict(kv_n_heads=2, rope_theta=10000.0, clip_qkv=8.0),
        ffn_config=dict(hidden_size=32, ffn_hidden_size=32, moe_num_experts=4, moe_top_k=2),
    ),
    "deepseek_v2": dict(num_experts_per_tok=2),
    "jamba": dict(attn_layer_period=2, attn_layer_offset=1),
    "encoder-decoder": dict(decoder_start_token_id=1),
    "xmod": dict(default_language="en_XX"),
    "reformer": dict(is_decoder=True, axial_pos_shape=[4, 4], axial_pos_embds_dim=[16, 16], num_buckets=4, local_attn_chunk_length=8, lsh_attn_chunk_length=8),
    "xlnet": dict(d_head=8),
    "mamba2": dict(num_heads=4, head_dim=16),
    "bamba": dict(mamba_n_heads=4, mamba_d_head=16),
    "falcon_h1": dict(mamba_n_heads=4, mamba_d_head=8, mamba_d_ssm=32),
    "granitemoehybrid": dict(layer_types=["mamba", "attention"], mamba_n_heads=4, mamba_d_head=16),
    "gemma3n_text": dict(intermediate_size=32, activation_sparsity_pattern=[0.0, 0.0], num_kv_shared_layers=0),
    "dory": dict(num_hidden_layers=3, n_input_layers=1, n_recurrent_layers=1, n_output_layers=1),
}  # fmt: skip


def shrunk(value: Any, name: str = "", counter: Iterator[int] | None = None) -> Any:
    """A config's dict with small sizes: widths of 32, two layers, four heads, four experts, 97 tokens, ids below that."""
    counter = counter if counter is not None else iter(range(5, 90))
    if isinstance(value, dict):
        # A sub-config keeps its model type, by which it is read again.
        dropped = _DROPPED if not name else [key for key in _DROPPED if key != "model_type"]
        kept = {key: inner for key, inner in value.items() if inner is not None and key not in dropped}
        return _consistent({key: shrunk(inner, str(key), counter) for key, inner in kept.items()})
    if isinstance(value, bool) or not isinstance(value, int | float | list | tuple):
        return value
    if isinstance(value, int) and _TOKEN.search(name) and value >= VOCAB:
        return next(counter)
    if isinstance(value, float) and (
        "dropout" in name or name.endswith(("_pdrop", "layerdrop", "_drop")) or "jitter" in name or re.match("mask_.*_prob", name)
    ):
        return 0.0
    if name == "mrope_section":
        return _SECTION
    if isinstance(value, list | tuple) and value and all(type(v) is int for v in value):
        if "token_id" in name or "_ids" in name:
            return [v if v < VOCAB else next(counter) for v in value]
        return value
    if not isinstance(value, int) or _NEVER.search(name):
        return value
    for pattern, size in _SIZES:
        if re.search(pattern, name):
            return min(value, size) if value > 0 else value
    return value


def _consistent(config: dict[str, Any]) -> dict[str, Any]:
    """Lists of one entry per layer are cut to the layers there are."""
    layers = next(
        (config[k] for k in ("num_hidden_layers", "num_layers", "n_layer", "n_layers") if isinstance(config.get(k), int)), None
    )
    for key, value in list(config.items()):
        if (
            layers
            and isinstance(value, list | tuple)
            and len(value) > layers
            and re.search(r"layer|block|pattern|type|schedule|indices", key)
        ):
            if all(isinstance(v, str | bool) or v is None for v in value):
                # One of each kind where there is room.
                kinds = list(dict.fromkeys(value))[:layers]
                config[key] = (kinds + [value[-1]] * layers)[:layers]
            elif all(isinstance(v, int) for v in value) and "indices" not in key and "indexes" not in key:
                config[key] = list(value[:layers])
            elif all(isinstance(v, int) for v in value):
                config[key] = [v for v in value if v < layers] or [layers - 1]
    if "kv_lora_rank" in config and "num_attention_heads" in config:  # latent attention has no groups
        config["num_key_value_heads"] = config["num_attention_heads"]
    return config


# What a model is, not how large; and what follows from other sizes, which the config computes again.
_DROPPED = (
    "architectures", "transformers_version", "model_type", "_name_or_path", "torch_dtype", "dtype", "id2label", "label2id",
    "per_layer_config",
)  # fmt: skip


def tiny_config(model_type: str) -> PreTrainedConfig:
    """The default config of a model type, shrunk."""
    config_class = CONFIG_MAPPING[model_type]
    small = shrunk(config_class().to_dict()) | SETTINGS.get(model_type, {})
    for name in ("pad_token_id", "decoder_start_token_id") if small.get("is_encoder_decoder") else ():
        small.setdefault(name, 0)
    config = config_class(**small)
    rope = getattr(config.get_text_config(), "rope_parameters", None)
    if model_type in _THREE_POSITIONS and isinstance(rope, dict):
        rope["mrope_section"] = _SECTION
    return config


def tiny_model(model_type: str, class_name: str, **settings: Any) -> Any:
    """The class with random weights moved off their initial values, in float32.

    Raises: whatever the class raises; MemoryError where the shrunk config is still large.
    """
    import transformers

    model_class = getattr(transformers, class_name)
    config = tiny_config(model_type)
    if not isinstance(config, model_class.config_class):
        config = config.get_text_config()  # type: ignore[attr-defined]
    for name, value in settings.items():
        setattr(config, name, value)
    with torch.device("meta"):
        size = sum(p.numel() for p in model_class(config).parameters())
    if size > LARGEST:
        raise MemoryError(f"{size:,} weights")
    torch.manual_seed(0)
    model = model_class(config)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.is_floating_point():
                parameter += 0.05 * torch.randn(parameter.shape, generator=generator)
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):  # some are 0.1 whatever the config says
            module.p = 0.0
    find = getattr(model, "get_output_embeddings", None)
    head = find() if callable(find) else None
    if head is not None and getattr(head, "weight", None) is not None:
        with torch.no_grad():
            head.weight.mul_(4)  # logits far enough apart for another alignment to be another loss
    return model


def classes(mapping: str) -> list[tuple[str, str]]:
    """(model type, class name) of a mapping such as "CAUSAL_LM"."""
    found = getattr(modeling_auto, f"MODEL_FOR_{mapping}_MAPPING_NAMES")
    return [(kind, name) for kind, names in found.items() for name in (names if isinstance(names, tuple | list) else (names,))]
