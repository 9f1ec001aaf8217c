"""Tiny pipelines of the families in which picture and text look at each other in one sequence.

Schedulers, scales and shifts are the published ones.
"""

from __future__ import annotations

import diffusers
from diffusers import FlowMatchEulerDiscreteScheduler

from . import encoders, tokenizers
from .encoders import WIDTH
from .parts import kl_vae, pipeline


def sd3() -> diffusers.StableDiffusion3Pipeline:
    """SD 3.5 medium: normed queries and keys, a second self-attention in the first block."""
    tokenizer, tokenizer_2 = tokenizers.clip_tokenizer(), tokenizers.clip_tokenizer(pad="!")
    tokenizer_3 = tokenizers.t5_tokenizer()
    transformer = diffusers.SD3Transformer2DModel(
        sample_size=16,
        patch_size=2,
        in_channels=16,
        out_channels=16,
        num_layers=3,
        attention_head_dim=8,
        num_attention_heads=4,
        joint_attention_dim=3 * WIDTH,
        caption_projection_dim=32,
        pooled_projection_dim=2 * WIDTH,
        pos_embed_max_size=16,
        dual_attention_layers=(0,),
        qk_norm="rms_norm",
    )
    return pipeline(
        "StableDiffusion3Pipeline",
        tokenizer=tokenizer,
        tokenizer_2=tokenizer_2,
        tokenizer_3=tokenizer_3,
        text_encoder=encoders.clip_encoder(tokenizer, projected=True),
        text_encoder_2=encoders.clip_encoder(tokenizer_2, projected=True, act="gelu"),
        text_encoder_3=encoders.t5_encoder(tokenizer_3, width=3 * WIDTH),
        transformer=transformer,
        vae=kl_vae(16, scale=1.5305, shift=0.0609),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
    )


def flux_dev() -> diffusers.FluxPipeline:
    return _flux(guidance=True, shift=3.0)


def flux_schnell() -> diffusers.FluxPipeline:
    return _flux(guidance=False, shift=1.0)


def flux2() -> diffusers.Flux2Pipeline:
    tokenizer = tokenizers.mistral_tokenizer()
    return pipeline(
        "Flux2Pipeline",
        tokenizer=tokenizer,
        text_encoder=encoders.mistral_encoder(tokenizer),
        **_flux2_parts(guidance=True),
    )


def klein_base() -> diffusers.Flux2KleinPipeline:
    return _klein(distilled=False)


def klein() -> diffusers.Flux2KleinPipeline:
    return _klein(distilled=True)


def qwen_image() -> diffusers.QwenImagePipeline:
    tokenizer = tokenizers.qwen_tokenizer()
    transformer = diffusers.QwenImageTransformer2DModel(
        patch_size=2,
        in_channels=64,
        out_channels=16,
        num_layers=3,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=WIDTH,
        guidance_embeds=False,
        axes_dims_rope=(4, 6, 6),
    )
    return pipeline(
        "QwenImagePipeline",
        tokenizer=tokenizer,
        text_encoder=encoders.qwen_vl_encoder(tokenizer),
        transformer=transformer,
        vae=diffusers.AutoencoderKLQwenImage(base_dim=8, num_res_blocks=1),
        scheduler=FlowMatchEulerDiscreteScheduler(
            shift=1.0,
            use_dynamic_shifting=True,
            base_shift=0.5,
            max_shift=0.9,
            base_image_seq_len=256,
            max_image_seq_len=8192,
            shift_terminal=0.02,
            time_shift_type="exponential",
        ),
    )


def z_image() -> diffusers.ZImagePipeline:
    return _z_image(shift=6.0)


def z_image_turbo() -> diffusers.ZImagePipeline:
    return _z_image(shift=3.0)


def _flux(guidance: bool, shift: float):
    tokenizer, tokenizer_2 = tokenizers.clip_tokenizer(), tokenizers.t5_tokenizer()
    transformer = diffusers.FluxTransformer2DModel(
        patch_size=1,
        in_channels=64,
        num_layers=2,
        num_single_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=WIDTH,
        pooled_projection_dim=WIDTH,
        guidance_embeds=guidance,
        axes_dims_rope=(4, 6, 6),
    )
    return pipeline(
        "FluxPipeline",
        tokenizer=tokenizer,
        tokenizer_2=tokenizer_2,
        text_encoder=encoders.clip_encoder(tokenizer),
        text_encoder_2=encoders.t5_encoder(tokenizer_2),
        transformer=transformer,
        vae=kl_vae(16, scale=0.3611, shift=0.1159),
        scheduler=FlowMatchEulerDiscreteScheduler(
            shift=shift,
            use_dynamic_shifting=guidance,
            base_shift=0.5,
            max_shift=1.15,
            base_image_seq_len=256,
            max_image_seq_len=4096,
        ),
    )


def _klein(distilled: bool):
    tokenizer = tokenizers.qwen_tokenizer()
    return pipeline(
        "Flux2KleinPipeline",
        tokenizer=tokenizer,
        text_encoder=encoders.qwen3_encoder(tokenizer, layers=28, causal_head=True),
        is_distilled=distilled,
        **_flux2_parts(guidance=False),
    )


def _flux2_parts(guidance: bool) -> dict:
    return {
        "transformer": diffusers.Flux2Transformer2DModel(
            in_channels=128,
            num_layers=2,
            num_single_layers=2,
            attention_head_dim=16,
            num_attention_heads=2,
            joint_attention_dim=3 * WIDTH,
            axes_dims_rope=(4, 4, 4, 4),
            guidance_embeds=guidance,
        ),
        "vae": diffusers.AutoencoderKLFlux2(
            block_out_channels=(8, 8, 8, 8),
            layers_per_block=1,
            latent_channels=32,
            norm_num_groups=4,
        ),
        "scheduler": FlowMatchEulerDiscreteScheduler(
            shift=3.0,
            use_dynamic_shifting=True,
            base_shift=0.5,
            max_shift=1.15,
            base_image_seq_len=256,
            max_image_seq_len=4096,
            time_shift_type="exponential",
        ),
    }


def _z_image(shift: float):
    tokenizer = tokenizers.qwen_tokenizer()
    transformer = diffusers.ZImageTransformer2DModel(
        in_channels=16,
        dim=32,
        n_layers=2,
        n_refiner_layers=1,
        n_heads=2,
        n_kv_heads=2,
        cap_feat_dim=WIDTH,
        axes_dims=[4, 6, 6],
        axes_lens=[1536, 512, 512],
    )
    return pipeline(
        "ZImagePipeline",
        tokenizer=tokenizer,
        text_encoder=encoders.qwen3_encoder(tokenizer, layers=3, causal_head=False),
        transformer=transformer,
        vae=kl_vae(16, scale=0.3611, shift=0.1159),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=shift),
    )
