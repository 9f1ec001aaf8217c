"""The tiny families are what plain diffusers loads, draws with and reads LoRAs into."""

import functools

import pytest
import torch
from diffusers import DiffusionPipeline
from diffusers.training_utils import _collate_lora_metadata
from families import FAMILIES, draw, save_family
from peft import LoraConfig, get_peft_model_state_dict

pytestmark = pytest.mark.heavy  # of the tests' own models, and not of the project
DOG, HOUSE = "a photo of sks dog in the snow", "a red house"
CLASSES = {
    "sdxl": "StableDiffusionXLPipeline",
    "sd3": "StableDiffusion3Pipeline",
    "flux_dev": "FluxPipeline",
    "flux_schnell": "FluxPipeline",
    "flux2": "Flux2Pipeline",
    "klein_base": "Flux2KleinPipeline",
    "klein": "Flux2KleinPipeline",
    "qwen_image": "QwenImagePipeline",
    "z_image": "ZImagePipeline",
    "z_image_turbo": "ZImagePipeline",
    "sana": "SanaPipeline",
    "pixart_sigma": "PixArtSigmaPipeline",
}
LORA = [name for name in FAMILIES if name != "pixart_sigma"]  # its pipeline has no loader


@pytest.fixture(scope="session")
def fresh(tmp_path_factory):
    """Loads a family anew from its folder."""
    root = tmp_path_factory.getbasetemp() / "families"

    def load_family(name: str) -> DiffusionPipeline:
        pipeline = DiffusionPipeline.from_pretrained(save_family(name, root), local_files_only=True)
        pipeline.set_progress_bar_config(disable=True)
        return pipeline

    return load_family


@pytest.fixture(scope="session")
def load(fresh):
    """Loads a family once for all tests that leave it as it is."""
    return functools.cache(fresh)


@pytest.mark.parametrize("name", FAMILIES)
def test_plain_diffusers_draws_with_each_folder(load, name):
    pipeline = load(name)
    assert type(pipeline).__name__ == CLASSES[name]
    batch = draw(pipeline, name, [DOG, HOUSE])
    alone = torch.cat([draw(pipeline, name, [DOG]), draw(pipeline, name, [HOUSE])])
    torch.testing.assert_close(batch, alone, atol=1e-4, rtol=0)
    assert batch.shape == (2, 3, 64, 64) and batch.std() > 0.05
    assert torch.isfinite(draw(pipeline, name, [DOG], output_type="latent")).all()
    wide = draw(pipeline, name, [DOG], height=64, width=96)
    assert wide.shape == (1, 3, 64, 96) and torch.isfinite(wide).all()


@pytest.mark.parametrize("name", FAMILIES)
def test_one_word_of_the_prompt_moves_the_picture(load, name):
    """With the noise the same: the two prompts have the same letters."""
    pipeline = load(name)
    dog, god = draw(pipeline, name, ["a photo of dog"]), draw(pipeline, name, ["a photo of god"])
    assert (dog - god).abs().max() > 1e-3


@pytest.mark.parametrize("name", ["sana", "pixart_sigma"])
def test_the_mask_of_the_text_moves_the_picture(load, name):
    pipeline = load(name)
    embeds, mask, _, _ = pipeline.encode_prompt(DOG, do_classifier_free_guidance=False)
    images = [
        pipeline(
            prompt_embeds=embeds,
            prompt_attention_mask=shown,
            negative_prompt=None,
            height=64,
            width=64,
            num_inference_steps=2,
            guidance_scale=1.0,
            use_resolution_binning=False,
            generator=torch.Generator().manual_seed(0),
            output_type="pt",
        ).images
        for shown in (mask, torch.ones_like(mask))
    ]
    assert (images[0] - images[1]).abs().max() > 1e-3


@pytest.mark.parametrize("name", FAMILIES)
def test_each_tokenizer_splits_some_words_and_keeps_others_whole(load, name):
    pipeline = load(name)
    names = ("tokenizer", "tokenizer_2", "tokenizer_3")
    for tokenizer in filter(None, (getattr(pipeline, part, None) for part in names)):
        encoded = tokenizer(DOG, return_offsets_mapping=True)
        pieces = [DOG[start:end].strip() for start, end in encoded["offset_mapping"]]
        assert "dog" in pieces and "snow" not in pieces
        assert tokenizer.unk_token_id not in encoded["input_ids"][1:-1]


def test_qwen_image_cuts_just_its_template_off(load):
    pipeline = load("qwen_image")
    before = pipeline.prompt_template_encode.split("{}")[0]
    cut = pipeline.tokenizer(before)["input_ids"]
    assert len(cut) == pipeline.prompt_template_encode_start_idx


@pytest.mark.parametrize("name", LORA)
def test_a_lora_goes_through_the_pipelines_own_loader(fresh, name, tmp_path):
    pipeline = fresh(name)
    part = "unet" if hasattr(pipeline, "unet") else "transformer"
    denoiser = getattr(pipeline, part)
    plain = draw(pipeline, name, [DOG])
    denoiser.add_adapter(LoraConfig(r=2, lora_alpha=6, target_modules=["to_q", "to_v"]))
    generator = torch.Generator().manual_seed(0)
    for key, weight in denoiser.named_parameters():
        if "lora_B" in key:
            weight.data = torch.randn(weight.shape, generator=generator)
    tuned = draw(pipeline, name, [DOG])
    pipeline.save_lora_weights(
        tmp_path,
        **{f"{part}_lora_layers": get_peft_model_state_dict(denoiser)},
        **_collate_lora_metadata({part: denoiser}),
    )
    reader = fresh(name)
    reader.load_lora_weights(tmp_path)
    torch.testing.assert_close(draw(reader, name, [DOG]), tuned, atol=1e-5, rtol=0)
    assert (tuned - plain).abs().max() > 1e-3
