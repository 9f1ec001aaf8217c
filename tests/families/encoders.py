"""Tiny text encoders of the families' real classes."""

from __future__ import annotations

WIDTH = 16


def clip_encoder(
    tokenizer,
    projected: bool = False,
    act: str = "quick_gelu",
    width: int = WIDTH,
    layers: int = 3,
):
    """Token states of that width; a projected one also gives a pooled state of it. The ids of
    start and end are those of the published configs: 2 as end makes pooling take the largest id.
    """
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=32,
        projection_dim=width,
        num_hidden_layers=layers,
        num_attention_heads=2,
        max_position_embeddings=77,
        hidden_act=act,
        bos_token_id=0,
        eos_token_id=2,
        pad_token_id=1,
    )
    return (CLIPTextModelWithProjection if projected else CLIPTextModel)(config)


def t5_encoder(tokenizer, width: int = WIDTH):
    from transformers import T5Config, T5EncoderModel

    return T5EncoderModel(
        T5Config(
            vocab_size=len(tokenizer),
            d_model=width,
            d_kv=8,
            d_ff=32,
            num_layers=2,
            num_heads=2,
            feed_forward_proj="gated-gelu",
            is_encoder_decoder=False,
            use_cache=False,
        )
    )


def qwen3_encoder(tokenizer, layers: int, causal_head: bool):
    """FLUX.2 klein reads the states after layers 9, 18 and 27; Z-Image those before the last."""
    from transformers import Qwen3Config, Qwen3ForCausalLM, Qwen3Model

    config = Qwen3Config(
        **_language_model(tokenizer, layers),
        rope_parameters={"rope_type": "default", "rope_theta": 1_000_000.0},
        tie_word_embeddings=True,
    )
    return (Qwen3ForCausalLM if causal_head else Qwen3Model)(config)


def qwen_vl_encoder(tokenizer):
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    text = _language_model(tokenizer, layers=2) | {
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 1_000_000.0,
            "mrope_section": [1, 1, 2],
        }
    }
    text.pop("pad_token_id")
    vision = {"depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2}
    vision |= {"out_hidden_size": WIDTH, "fullatt_block_indexes": [0]}
    ids = {
        f"{name}_token_id": tokenizer.convert_tokens_to_ids(f"<|{token}|>")
        for name, token in {
            "image": "image_pad",
            "video": "video_pad",
            "vision_start": "vision_start",
            "vision_end": "vision_end",
            "vision": "vision_pad",
        }.items()
    }
    return Qwen2_5_VLForConditionalGeneration(
        Qwen2_5_VLConfig(text_config=text, vision_config=vision, **ids)
    )


def gemma_encoder(tokenizer):
    from transformers import Gemma2Config, Gemma2Model

    return Gemma2Model(
        Gemma2Config(
            **_language_model(tokenizer, layers=2),
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
        )
    )


def mistral_encoder(tokenizer):
    """FLUX.2 reads the states after layers 10, 20 and 30."""
    from transformers import Mistral3Config, Mistral3ForConditionalGeneration

    text = {"model_type": "mistral", **_language_model(tokenizer, layers=31)}
    vision = {"model_type": "pixtral", "hidden_size": 16, "num_hidden_layers": 1}
    vision |= {"num_attention_heads": 2, "intermediate_size": 16, "image_size": 28}
    vision |= {"patch_size": 14, "head_dim": 8}
    return Mistral3ForConditionalGeneration(
        Mistral3Config(
            text_config=text,
            vision_config=vision,
            image_token_index=tokenizer.convert_tokens_to_ids("[IMG]"),
        )
    )


def _language_model(tokenizer, layers: int) -> dict:
    return {
        "vocab_size": len(tokenizer),
        "hidden_size": WIDTH,
        "intermediate_size": 32,
        "num_hidden_layers": layers,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 8,
        "max_position_embeddings": 2048,
        "pad_token_id": tokenizer.pad_token_id,
    }
