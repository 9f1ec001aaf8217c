"""Tiny pipelines of the families whose picture looks at the text across: SDXL, Sana, PixArt-Sigma.

Schedulers, scales and shifts are the published ones. VAEs shrink by the family's real factor:
images of 64 x 64 and 96 x 64 pixels fit all families.
"""

from __future__ import annotations

import diffusers
from diffusers import DPMSolverMultistepScheduler

from . import encoders, tokenizers
from .encoders import WIDTH
from .parts import kl_vae, pipeline


def sdxl(width: int = WIDTH, layers: int = 3) -> diffusers.StableDiffusionXLPipeline:
    """Width and layers are of the second text encoder."""
    tokenizer, tokenizer_2 = tokenizers.clip_tokenizer(), tokenizers.clip_tokenizer(pad="!")
    unet = diffusers.UNet2DConditionModel(
        sample_size=8,
        in_channels=4,
        out_channels=4,
        layers_per_block=1,
        block_out_channels=(16, 32, 32),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        transformer_layers_per_block=(1, 1, 2),
        attention_head_dim=(2, 2, 4),
        norm_num_groups=4,
        cross_attention_dim=WIDTH + width,
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=width + 6 * 8,
    )
    return pipeline(
        "StableDiffusionXLPipeline",
        tokenizer=tokenizer,
        tokenizer_2=tokenizer_2,
        text_encoder=encoders.clip_encoder(tokenizer),
        text_encoder_2=encoders.clip_encoder(
            tokenizer_2, projected=True, act="gelu", width=width, layers=layers
        ),
        unet=unet,
        vae=kl_vae(4, scale=0.13025, force_upcast=True),
        scheduler=diffusers.EulerDiscreteScheduler(
            beta_start=0.00085,
            beta_end=0.012,
            beta_schedule="scaled_linear",
            timestep_spacing="leading",
            steps_offset=1,
        ),
    )


def sana() -> diffusers.SanaPipeline:
    tokenizer = tokenizers.gemma_tokenizer()
    transformer = diffusers.SanaTransformer2DModel(
        in_channels=32,
        out_channels=32,
        num_layers=2,
        num_attention_heads=4,
        attention_head_dim=8,
        num_cross_attention_heads=2,
        cross_attention_head_dim=16,
        cross_attention_dim=32,
        caption_channels=WIDTH,
        sample_size=32,
    )
    vae = diffusers.AutoencoderDC(
        latent_channels=32,
        attention_head_dim=8,
        encoder_block_types=("ResBlock",) * 5 + ("EfficientViTBlock",),
        decoder_block_types=("ResBlock",) * 5 + ("EfficientViTBlock",),
        encoder_block_out_channels=(8, 8, 8, 8, 16, 32),
        decoder_block_out_channels=(8, 8, 8, 8, 16, 32),
        encoder_layers_per_block=(1,) * 6,
        decoder_layers_per_block=(1,) * 6,
        encoder_qkv_multiscales=((),) * 5 + ((5,),),
        decoder_qkv_multiscales=((),) * 5 + ((5,),),
        downsample_block_type="conv",
        upsample_block_type="interpolate",
        scaling_factor=0.41407,
    )
    return pipeline(
        "SanaPipeline",
        tokenizer=tokenizer,
        text_encoder=encoders.gemma_encoder(tokenizer),
        transformer=transformer,
        vae=vae,
        scheduler=DPMSolverMultistepScheduler(
            prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0
        ),
    )


def pixart_sigma() -> diffusers.PixArtSigmaPipeline:
    tokenizer = tokenizers.t5_tokenizer()
    transformer = diffusers.PixArtTransformer2DModel(
        sample_size=128,
        num_layers=2,
        patch_size=2,
        in_channels=4,
        out_channels=8,
        num_attention_heads=4,
        attention_head_dim=8,
        cross_attention_dim=32,
        caption_channels=WIDTH,
        use_additional_conditions=False,
    )
    return pipeline(
        "PixArtSigmaPipeline",
        tokenizer=tokenizer,
        text_encoder=encoders.t5_encoder(tokenizer),
        transformer=transformer,
        vae=kl_vae(4, scale=0.13025, force_upcast=True),
        scheduler=DPMSolverMultistepScheduler(
            beta_start=0.0001, beta_end=0.02, beta_schedule="linear"
        ),
    )
