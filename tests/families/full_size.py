"""The pipelines that people fine-tune, at their full size: the configurations that are published,
over the small vocabularies of `tokenizers`. Their modules are of FakeTensors, which know their
shape, dtype and device and take no memory.

Sources: the config.json files of each model on the hub, as of its transformer, vae and text_encoder
folders. What is not written here is the default of the class in diffusers or transformers, which
are of these very models: FLUX.1-dev, Qwen-Image, Z-Image, Sana 1.6B, FLUX.2's autoencoder.
`PUBLISHED` are the weights of the denoiser's files on the hub, in billions; a table of positions is
one of the weights where it is saved.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import diffusers
import torch
from diffusers import DPMSolverMultistepScheduler, EulerDiscreteScheduler
from diffusers import FlowMatchEulerDiscreteScheduler as FlowMatch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from dreamblend.models.flux import Flux
from dreamblend.models.flux2 import Flux2
from dreamblend.models.pixart import PixArt
from dreamblend.models.qwen_image import QwenImage
from dreamblend.models.sana import Sana
from dreamblend.models.sd3 import SD3
from dreamblend.models.sdxl import SDXL
from dreamblend.models.through_pipeline import ThroughPipeline
from dreamblend.models.z_image import ZImage

from . import tokenizers

PUBLISHED = {
    "Stable Diffusion XL": 2.567,
    "Stable Diffusion 3.5 medium": 2.470,
    "Stable Diffusion 3.5 large": 8.146,
    "FLUX.1-dev": 11.901,
    "FLUX.2 klein base 4B": 3.876,
    "Qwen-Image": 20.430,
    "Z-Image": 6.155,
    "Sana 1.6B": 1.604,
    "PixArt-Sigma": 0.611,
}
DYNAMIC = {"use_dynamic_shifting": True, "base_image_seq_len": 256, "base_shift": 0.5}
# what is computed of such a module and of real tensors is without memory too
WITHOUT_MEMORY = FakeTensorMode(allow_non_fake_inputs=True)


def empty(
    make: Callable[..., nn.Module], dtype: torch.dtype = torch.bfloat16
) -> Callable[..., nn.Module]:
    """The same constructor, whose modules are of this dtype and take no memory."""

    def made(*args: Any, **kwargs: Any) -> nn.Module:
        usual = torch.get_default_dtype()
        torch.set_default_dtype(dtype)
        try:
            with WITHOUT_MEMORY:
                return make(*args, **kwargs)
        finally:
            torch.set_default_dtype(usual)

    return made


def emptied(module: nn.Module) -> nn.Module:
    """The module, its weights that take memory replaced by some that do not."""
    for layer in module.modules():
        for name, weight in layer.named_parameters(recurse=False):
            if not isinstance(weight, FakeTensor):
                fake = WITHOUT_MEMORY.from_tensor(weight.data, static_shapes=True)
                layer.register_parameter(name, nn.Parameter(fake, weight.requires_grad))
    return module


def sdxl() -> diffusers.StableDiffusionXLPipeline:
    """stabilityai/stable-diffusion-xl-base-1.0."""
    unet = empty(diffusers.UNet2DConditionModel)(
        sample_size=128,
        block_out_channels=(320, 640, 1280),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        transformer_layers_per_block=(1, 2, 10),
        attention_head_dim=(5, 10, 20),
        cross_attention_dim=2048,
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=256,
        projection_class_embeddings_input_dim=2816,
    )
    return diffusers.StableDiffusionXLPipeline(
        tokenizer=tokenizers.clip_tokenizer(),
        tokenizer_2=tokenizers.clip_tokenizer(pad="!"),
        text_encoder=_clip_l(),
        text_encoder_2=_clip_g(),
        unet=unet,
        vae=_kl_vae(4, scaling_factor=0.13025, force_upcast=True),
        scheduler=EulerDiscreteScheduler(
            beta_start=0.00085,
            beta_end=0.012,
            beta_schedule="scaled_linear",
            timestep_spacing="leading",
            steps_offset=1,
        ),
        add_watermarker=False,
    )


def sd35_medium() -> diffusers.StableDiffusion3Pipeline:
    """stabilityai/stable-diffusion-3.5-medium."""
    return _sd35(24, 384, dual_attention_layers=tuple(range(13)))


def sd35_large() -> diffusers.StableDiffusion3Pipeline:
    """stabilityai/stable-diffusion-3.5-large."""
    return _sd35(38, 192)


def _sd35(layers: int, positions: int, **config: Any) -> diffusers.StableDiffusion3Pipeline:
    transformer = empty(diffusers.SD3Transformer2DModel)(
        sample_size=128,
        in_channels=16,
        out_channels=16,
        num_layers=layers,
        attention_head_dim=64,
        num_attention_heads=layers,
        joint_attention_dim=4096,
        caption_projection_dim=64 * layers,
        pooled_projection_dim=2048,
        pos_embed_max_size=positions,
        qk_norm="rms_norm",
        **config,
    )
    return diffusers.StableDiffusion3Pipeline(
        tokenizer=tokenizers.clip_tokenizer(),
        tokenizer_2=tokenizers.clip_tokenizer(pad="!"),
        tokenizer_3=tokenizers.t5_tokenizer(),
        text_encoder=_clip_l(projected=True),
        text_encoder_2=_clip_g(),
        text_encoder_3=_t5(),
        transformer=transformer,
        vae=_kl_vae(16, scaling_factor=1.5305, shift_factor=0.0609, use_quant_conv=False),
        scheduler=FlowMatch(shift=3.0),
    )


def flux_dev() -> diffusers.FluxPipeline:
    """black-forest-labs/FLUX.1-dev."""
    return diffusers.FluxPipeline(
        tokenizer=tokenizers.clip_tokenizer(),
        tokenizer_2=tokenizers.t5_tokenizer(),
        text_encoder=_clip_l(),
        text_encoder_2=_t5(),
        transformer=empty(diffusers.FluxTransformer2DModel)(guidance_embeds=True),
        vae=_kl_vae(16, scaling_factor=0.3611, shift_factor=0.1159, use_quant_conv=False),
        scheduler=FlowMatch(shift=3.0, max_shift=1.15, max_image_seq_len=4096, **DYNAMIC),
    )


def klein_base() -> diffusers.Flux2KleinPipeline:
    """black-forest-labs/FLUX.2-klein-base-4B."""
    transformer = empty(diffusers.Flux2Transformer2DModel)(
        num_layers=5,
        num_single_layers=20,
        num_attention_heads=24,
        joint_attention_dim=7680,
        guidance_embeds=False,
    )
    return diffusers.Flux2KleinPipeline(
        tokenizer=tokenizers.qwen_tokenizer(),
        text_encoder=_qwen3(causal_head=True),
        transformer=transformer,
        vae=empty(diffusers.AutoencoderKLFlux2, torch.float32)(),
        scheduler=FlowMatch(shift=3.0, max_shift=1.15, max_image_seq_len=4096, **DYNAMIC),
        is_distilled=False,
    )


def qwen_image() -> diffusers.QwenImagePipeline:
    """Qwen/Qwen-Image, with Qwen2.5-VL 7B."""
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    text = {
        "vocab_size": 152064,
        "hidden_size": 3584,
        "intermediate_size": 18944,
        "num_hidden_layers": 28,
        "num_attention_heads": 28,
        "num_key_value_heads": 4,
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 1_000_000.0,
            "mrope_section": [16, 24, 24],
        },
    }
    vision = {"depth": 32, "hidden_size": 1280, "intermediate_size": 3420, "num_heads": 16}
    vision |= {"out_hidden_size": 3584, "fullatt_block_indexes": [7, 15, 23, 31]}
    return diffusers.QwenImagePipeline(
        tokenizer=tokenizers.qwen_tokenizer(),
        text_encoder=empty(Qwen2_5_VLForConditionalGeneration)(
            Qwen2_5_VLConfig(text_config=text, vision_config=vision)
        ),
        transformer=empty(diffusers.QwenImageTransformer2DModel)(),
        vae=empty(diffusers.AutoencoderKLQwenImage, torch.float32)(),
        scheduler=FlowMatch(
            shift=1.0,
            max_shift=0.9,
            max_image_seq_len=8192,
            shift_terminal=0.02,
            time_shift_type="exponential",
            **DYNAMIC,
        ),
    )


def z_image() -> diffusers.ZImagePipeline:
    """Tongyi-MAI/Z-Image."""
    return diffusers.ZImagePipeline(
        tokenizer=tokenizers.qwen_tokenizer(),
        text_encoder=_qwen3(causal_head=False),
        transformer=empty(diffusers.ZImageTransformer2DModel)(),
        vae=_kl_vae(16, scaling_factor=0.3611, shift_factor=0.1159, use_quant_conv=False),
        scheduler=FlowMatch(shift=6.0),
    )


def sana() -> diffusers.SanaPipeline:
    """Efficient-Large-Model/Sana_1600M_1024px_diffusers. Gemma 2 of 2 billion weights."""
    from transformers import Gemma2Config, Gemma2Model

    blocks = ("ResBlock",) * 3 + ("EfficientViTBlock",) * 3
    scales = ((),) * 3 + ((5,),) * 3
    vae = empty(diffusers.AutoencoderDC, torch.float32)(
        encoder_block_types=blocks,
        decoder_block_types=blocks,
        encoder_qkv_multiscales=scales,
        decoder_qkv_multiscales=scales,
        downsample_block_type="Conv",
        upsample_block_type="interpolate",
        scaling_factor=0.41407,
    )
    return diffusers.SanaPipeline(
        tokenizer=tokenizers.gemma_tokenizer(),
        text_encoder=empty(Gemma2Model)(Gemma2Config()),
        transformer=empty(diffusers.SanaTransformer2DModel)(sample_size=32),
        vae=vae,
        scheduler=DPMSolverMultistepScheduler(
            prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0
        ),
    )


def pixart_sigma() -> diffusers.PixArtSigmaPipeline:
    """PixArt-alpha/PixArt-Sigma-XL-2-1024-MS."""
    return diffusers.PixArtSigmaPipeline(
        tokenizer=tokenizers.t5_tokenizer(),
        text_encoder=_t5(),
        transformer=empty(diffusers.PixArtTransformer2DModel)(
            sample_size=128, caption_channels=4096, use_additional_conditions=False
        ),
        vae=_kl_vae(4, scaling_factor=0.13025),
        scheduler=DPMSolverMultistepScheduler(
            beta_start=0.0001, beta_end=0.02, beta_schedule="linear"
        ),
    )


# of Stable Diffusion's autoencoder and all like it, and of openai/clip-vit-large-patch14
KL_VAE = {
    "block_out_channels": (128, 256, 512, 512),
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "layers_per_block": 2,
}
CLIP_L = {
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "projection_dim": 768,
    "eos_token_id": 2,
}


def _kl_vae(channels: int, use_quant_conv: bool = True, **config: Any) -> diffusers.AutoencoderKL:
    return empty(diffusers.AutoencoderKL, torch.float32)(
        **KL_VAE,
        latent_channels=channels,
        sample_size=1024,
        use_quant_conv=use_quant_conv,
        use_post_quant_conv=use_quant_conv,
        **config,
    )


def _clip_l(projected: bool = False):
    """openai/clip-vit-large-patch14."""
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    config = CLIPTextConfig(**CLIP_L)
    return empty(CLIPTextModelWithProjection if projected else CLIPTextModel)(config)


def _clip_g():
    """laion/CLIP-ViT-bigG-14-laion2B-39B-b160k."""
    from transformers import CLIPTextConfig, CLIPTextModelWithProjection

    return empty(CLIPTextModelWithProjection)(
        CLIPTextConfig(
            hidden_size=1280,
            intermediate_size=5120,
            num_hidden_layers=32,
            num_attention_heads=20,
            projection_dim=1280,
            hidden_act="gelu",
            eos_token_id=2,
        )
    )


def _t5():
    """google/t5-v1_1-xxl, the encoder."""
    from transformers import T5Config, T5EncoderModel

    return empty(T5EncoderModel)(
        T5Config(
            d_model=4096,
            d_kv=64,
            d_ff=10240,
            num_layers=24,
            num_heads=64,
            feed_forward_proj="gated-gelu",
            is_encoder_decoder=False,
            use_cache=False,
        )
    )


def _qwen3(causal_head: bool):
    """Qwen/Qwen3-4B."""
    from transformers import Qwen3Config, Qwen3ForCausalLM, Qwen3Model

    config = Qwen3Config(
        vocab_size=151936,
        hidden_size=2560,
        intermediate_size=9728,
        num_hidden_layers=36,
        num_attention_heads=32,
        num_key_value_heads=8,
        head_dim=128,
        tie_word_embeddings=True,
        rope_parameters={"rope_type": "default", "rope_theta": 1_000_000.0},
    )
    return empty(Qwen3ForCausalLM if causal_head else Qwen3Model)(config)


FULL_SIZE: dict[str, tuple[Callable[[], Any], type[ThroughPipeline]]] = {
    "Stable Diffusion XL": (sdxl, SDXL),
    "Stable Diffusion 3.5 medium": (sd35_medium, SD3),
    "Stable Diffusion 3.5 large": (sd35_large, SD3),
    "FLUX.1-dev": (flux_dev, Flux),
    "FLUX.2 klein base 4B": (klein_base, Flux2),
    "Qwen-Image": (qwen_image, QwenImage),
    "Z-Image": (z_image, ZImage),
    "Sana 1.6B": (sana, Sana),
    "PixArt-Sigma": (pixart_sigma, PixArt),
}


def full_size(name: str) -> ThroughPipeline:
    """A model of FULL_SIZE, as it is on a GPU: in bf16, the autoencoder in fp32."""
    pipeline, family = FULL_SIZE[name]
    return family(pipeline(), name)
