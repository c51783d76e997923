"""Small random models of the package transformers, by their own classes."""

from typing import Any

import torch

import funcprecond as fp
from tests.zoo.model import (
    CLASSES,
    EXAMPLES,
    PIXELS,
    TOKENS,
    WORDS,
    Model,
    class_terms,
    classifier,
    images,
    language_model,
    square_terms,
    tokens,
    zoo,
)

# Most models name their sizes like this.
SIZES = {
    "vocab_size": WORDS,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": 16,
}
NO_TOKENS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}


def _made(name: str, config: str, **options: Any) -> Any:
    import transformers

    return getattr(transformers, name)(getattr(transformers, config)(**options))


def _causal(
    name: str, config: str, *, mask: bool = True, diagonal: tuple[str, ...] = (), **options: Any
) -> Model:
    """A causal language model with the mask that a tokenizer makes."""
    model = _made(name, config, **{**NO_TOKENS, **options})
    ids = tokens()
    inputs = {"input_ids": ids}
    if mask:
        inputs["attention_mask"] = torch.ones_like(ids)
    # The grouped products of experts have no float64.
    wide = not {"num_local_experts", "num_experts"} & options.keys()
    rounded = {"wide": wide, "tolerance": 1e-5 if wide else 1e-4}
    return language_model(model, inputs, ids, outputs="logits", diagonal=diagonal, **rounded)


def _masked(ids: torch.Tensor) -> dict[str, torch.Tensor]:
    """Two of the examples are shorter than the others."""
    mask = torch.ones_like(ids)
    mask[1, -2:] = mask[2, -1:] = 0
    return {"input_ids": ids, "attention_mask": mask}


def _sentences(name: str, config: str, diagonal: tuple[str, ...] = (), **options: Any) -> Model:
    """A classifier of sentences."""
    model = _made(name, config, **{**SIZES, **NO_TOKENS, "num_labels": CLASSES, **options})
    return classifier(model, _masked(tokens()), outputs="logits", diagonal=diagonal)


def _pictures(name: str, config: str, pixels: int = PIXELS, **options: Any) -> Model:
    model = _made(name, config, **{"num_labels": CLASSES, **options})
    return images(model, pixels, outputs="logits")


# --------------------------------------------------------------------------- causal language models
GROUPED = {**SIZES, "num_key_value_heads": 1}
CAUSAL: dict[str, tuple[str, str, dict[str, Any]]] = {
    "GPT-2": (
        "GPT2LMHeadModel",
        "GPT2Config",
        {"vocab_size": WORDS, "n_positions": 16, "n_embd": 16, "n_layer": 2, "n_head": 2},
    ),
    "Llama": ("LlamaForCausalLM", "LlamaConfig", GROUPED),
    "Mixtral": (
        "MixtralForCausalLM",
        "MixtralConfig",
        {**GROUPED, "num_local_experts": 4, "num_experts_per_tok": 2},
    ),
    "Mamba": (
        "MambaForCausalLM",
        "MambaConfig",
        {
            "vocab_size": WORDS,
            "hidden_size": 16,
            "num_hidden_layers": 2,
            "state_size": 4,
            "diagonal": ("*.A_log",),
        },
    ),
    "OPT": (
        "OPTForCausalLM",
        "OPTConfig",
        {**SIZES, "ffn_dim": 24, "word_embed_proj_dim": 16},
    ),
    "Qwen2": ("Qwen2ForCausalLM", "Qwen2Config", GROUPED),
    "Qwen3": ("Qwen3ForCausalLM", "Qwen3Config", {**GROUPED, "head_dim": 8}),
    "Qwen3-MoE": (
        "Qwen3MoeForCausalLM",
        "Qwen3MoeConfig",
        {
            **GROUPED,
            "head_dim": 8,
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 12,
        },
    ),
    "Gemma": ("GemmaForCausalLM", "GemmaConfig", {**GROUPED, "head_dim": 8}),
    "Gemma-2": ("Gemma2ForCausalLM", "Gemma2Config", {**GROUPED, "head_dim": 8}),
    "Falcon": ("FalconForCausalLM", "FalconConfig", SIZES),
    "MPT": (
        "MptForCausalLM",
        "MptConfig",
        {"vocab_size": WORDS, "d_model": 16, "n_heads": 2, "n_layers": 2, "max_seq_len": 16},
    ),
    "BLOOM": (
        "BloomForCausalLM",
        "BloomConfig",
        {"vocab_size": WORDS, "hidden_size": 16, "n_layer": 2, "n_head": 2},
    ),
    "Phi": ("PhiForCausalLM", "PhiConfig", SIZES),
    "GPT-NeoX": ("GPTNeoXForCausalLM", "GPTNeoXConfig", SIZES),
}
for _name, (_model, _config, _options) in CAUSAL.items():
    zoo(f"transformers {_name}", "transformers")(
        lambda m=_model, c=_config, o=_options: _causal(m, c, **o)
    )


@zoo("transformers RWKV", "transformers")
def rwkv() -> Model:
    return _causal(
        "RwkvForCausalLM",
        "RwkvConfig",
        mask=False,
        vocab_size=WORDS,
        hidden_size=16,
        attention_hidden_size=16,
        num_hidden_layers=2,
        intermediate_size=24,
        context_length=16,
        diagonal=("*.time_decay",),
        rescale_every=0,  # it would divide weights in place
        use_cache=False,  # it has no backward pass
    )


# ------------------------------------------------------------------------- classifiers of sentences
ENCODERS = {
    "BERT": ("BertForSequenceClassification", "BertConfig", {}),
    "RoBERTa": (
        "RobertaForSequenceClassification",
        "RobertaConfig",
        {"max_position_embeddings": 20},
    ),
    "DistilBERT": (
        "DistilBertForSequenceClassification",
        "DistilBertConfig",
        {"dim": 16, "hidden_dim": 24, "n_layers": 2, "n_heads": 2},
    ),
    "ALBERT": (
        "AlbertForSequenceClassification",
        "AlbertConfig",
        {"embedding_size": 8},
    ),
    "ELECTRA": (
        "ElectraForSequenceClassification",
        "ElectraConfig",
        {"embedding_size": 8},
    ),
    "DeBERTa-v2": (
        "DebertaV2ForSequenceClassification",
        "DebertaV2Config",
        {
            "relative_attention": True,
            "pos_att_type": ["p2c", "c2p"],
            "position_buckets": 4,
            "diagonal": ("*.rel_embeddings.weight",),
        },
    ),
}
for _name, (_model, _config, _options) in ENCODERS.items():
    zoo(f"transformers {_name}", "transformers")(
        lambda m=_model, c=_config, o=_options: _sentences(m, c, **o)
    )


@zoo("transformers BERT, masked words", "transformers")
def bert_masked() -> Model:
    model = _made("BertForMaskedLM", "BertConfig", **SIZES, **NO_TOKENS)
    ids = tokens()
    targets = torch.where(torch.arange(TOKENS) % 3 == 0, ids, -100)
    return Model(
        model, (_masked(ids), targets), fp.losses.cross_entropy, class_terms, outputs="logits"
    )


# ------------------------------------------------------------------------------ encoder and decoder
def _translation(name: str, config: str, **options: Any) -> Model:
    model = _made(name, config, vocab_size=WORDS, decoder_start_token_id=0, **NO_TOKENS, **options)
    ids, words = tokens(), tokens()
    inputs = {**_masked(ids), "decoder_input_ids": torch.roll(words, 1, 1)}
    return Model(
        model,
        (inputs, words),
        fp.losses.cross_entropy,
        class_terms,
        outputs="logits",
        tolerance=1e-5,
    )


@zoo("transformers T5", "transformers")
def t5() -> Model:
    return _translation(
        "T5ForConditionalGeneration",
        "T5Config",
        d_model=16,
        d_kv=8,
        d_ff=24,
        num_layers=2,
        num_heads=2,
    )


BART = {
    "d_model": 16,
    "encoder_layers": 1,
    "decoder_layers": 1,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
    "encoder_ffn_dim": 24,
    "decoder_ffn_dim": 24,
}


@zoo("transformers BART", "transformers")
def bart() -> Model:
    return _translation(
        "BartForConditionalGeneration", "BartConfig", **BART, max_position_embeddings=16
    )


@zoo("transformers Whisper", "transformers")
def whisper() -> Model:
    model = _made(
        "WhisperForConditionalGeneration",
        "WhisperConfig",
        **BART,
        **NO_TOKENS,
        decoder_start_token_id=3,
        vocab_size=WORDS,
        num_mel_bins=8,
        max_source_positions=10,
        max_target_positions=16,
        suppress_tokens=None,
        begin_suppress_tokens=None,
    )
    words = tokens()
    inputs = {
        "input_features": torch.randn(EXAMPLES, 8, 20),
        "decoder_input_ids": torch.roll(words, 1, 1),
    }
    return Model(
        model,
        (inputs, words),
        fp.losses.cross_entropy,
        class_terms,
        outputs="logits",
    )


# ----------------------------------------------------------------------------------------- pictures
VISION = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 16,
    "patch_size": 4,
}


@zoo("transformers ViT", "transformers")
def vit() -> Model:
    return _pictures("ViTForImageClassification", "ViTConfig", 16, **VISION)


@zoo("transformers DeiT", "transformers")
def deit() -> Model:
    return _pictures("DeiTForImageClassification", "DeiTConfig", 16, **VISION)


@zoo("transformers Swin", "transformers")
def swin() -> Model:
    return _pictures(
        "SwinForImageClassification",
        "SwinConfig",
        image_size=32,
        patch_size=4,
        embed_dim=8,
        depths=[2, 2],
        num_heads=[2, 2],
        window_size=4,
    )


@zoo("transformers ResNet", "transformers")
def resnet() -> Model:
    return _pictures(
        "ResNetForImageClassification",
        "ResNetConfig",
        embedding_size=8,
        hidden_sizes=[8, 16],
        depths=[1, 1],
        layer_type="basic",
    )


@zoo("transformers ConvNeXt", "transformers")
def convnext() -> Model:
    return _pictures(
        "ConvNextForImageClassification",
        "ConvNextConfig",
        hidden_sizes=[8, 12, 16, 24],
        depths=[1, 1, 1, 1],
        num_stages=4,
    )


@zoo("transformers MobileNetV2", "transformers")
def mobilenet() -> Model:
    return _pictures(
        "MobileNetV2ForImageClassification",
        "MobileNetV2Config",
        depth_multiplier=0.1,
        depth_divisible_by=4,
        min_depth=4,
        finegrained_output=False,
    )


@zoo("transformers CLIP", "transformers")
def clip() -> Model:
    """Towers for text and for pictures that shall predict given embeddings."""
    model = _made(
        "CLIPModel",
        "CLIPConfig",
        text_config={**SIZES, **NO_TOKENS, "projection_dim": 8},
        vision_config={**VISION, "projection_dim": 8},
        projection_dim=8,
    )
    inputs = {**_masked(tokens()), "pixel_values": torch.randn(EXAMPLES, 3, 16, 16)}
    targets = torch.randn(EXAMPLES, 16)

    def embeddings(outputs: Any) -> torch.Tensor:
        return torch.cat([outputs.text_embeds, outputs.image_embeds], -1)

    return Model(
        model,
        (inputs, targets),
        fp.losses.mse,
        square_terms,
        outputs=embeddings,
        diagonal=("logit_scale",),
    )


@zoo("transformers CLIP, contrastive", "transformers")
def clip_contrastive() -> Model:
    """Half of its own loss: the texts of all examples are the classes of each picture."""
    model = clip().model
    inputs = {**_masked(tokens()), "pixel_values": torch.randn(EXAMPLES, 3, 16, 16)}
    return Model(
        model,
        (inputs, torch.arange(EXAMPLES)),
        fp.losses.cross_entropy,
        class_terms,
        outputs="logits_per_image",
        refused=dict.fromkeys(("per-sample gradients", "smw_ng"), "are not defined"),
        diagonal=("logit_scale",),
    )
