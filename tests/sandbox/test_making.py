"""The recipe: tokenizers, autoencoder and bases as they are made, and stages that go on where they
were interrupted.
"""

from __future__ import annotations

from pathlib import Path
from random import Random

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, StableDiffusion3Pipeline
from torch import nn

from dreamblend.models import load_backbone
from dreamblend.sandbox import world
from dreamblend.sandbox.drawing import LABELS
from dreamblend.sandbox.making import autoencoder, base, data, dit, fitting
from dreamblend.sandbox.making.fitting import Run


def test_an_interrupted_stage_continues_to_the_same_weights(tmp_path, monkeypatch):
    monkeypatch.setattr(fitting, "_SAVED_EVERY", 0.0)

    def run(scratch: Path, stop_at: int | None = None) -> dict:
        torch.manual_seed(0)
        model = nn.Linear(4, 4)

        def batch(step: int, rng: Random) -> fitting.Batch:
            if step == stop_at:
                raise KeyboardInterrupt
            return {"wanted": torch.tensor(rng.random())}

        def loss(given: fitting.Batch, generator: torch.Generator) -> torch.Tensor:
            return (model(torch.randn(8, 4, generator=generator)) - given["wanted"]).square().mean()

        fitting.fit("stage", model, batch, loss, 510, 1e-2, Run(scratch, "cpu"))
        return {k: v.clone() for k, v in model.state_dict().items()}

    whole = run(tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "parts", stop_at=300)
    assert (tmp_path / "parts" / "stage.resume.safetensors").is_file()
    parts = run(tmp_path / "parts")
    assert all(torch.equal(whole[k], parts[k]) for k in whole)


def test_normal_latents_are_decoded_as_before():
    vae, x = autoencoder.make_autoencoder(), torch.randn(2, 3, 128, 128)
    with torch.no_grad():
        before = vae.encode(x).latent_dist
        picture = vae.decode(before.mean).sample
        mean, std = before.mean.mean((0, 2, 3)), before.mean.std((0, 2, 3))
        autoencoder.normalise(vae, mean, std)
        after = vae.encode(x).latent_dist
        assert torch.allclose(after.mean.mean((0, 2, 3)), torch.zeros(8), atol=1e-4)
        assert torch.allclose(after.mean.std((0, 2, 3)), torch.ones(8), atol=1e-4)
        assert torch.allclose(after.std * std[:, None, None], before.std, rtol=1e-4)
        assert torch.allclose(vae.decode(after.mean).sample, picture, atol=1e-4)


def test_both_bases_are_folders_that_diffusers_draws_from(tmp_path, monkeypatch):
    monkeypatch.setattr(data, "_SHARD", 32)
    monkeypatch.setattr(data, "_CHUNK", 16)
    run = Run(tmp_path, "cpu")
    vae = autoencoder.make_autoencoder()
    vae.register_to_config(scaling_factor=1.0, shift_factor=0.0)
    tokenizer = data.make_tokenizer()
    nouns = [len(tokenizer(n, add_special_tokens=False).input_ids) for n in world.NOUNS]
    assert sum(n > 1 for n in nouns) >= 3
    scenes = data.load_scenes(32, vae, tokenizer, run)
    again = data.load_scenes(32, vae, tokenizer, run)
    assert torch.equal(scenes.latents, again.latents) and scenes.latents.shape == (32, 8, 16, 16)
    assert len(scenes.labels.unique()) > 10
    monkeypatch.setattr(base, "BATCH", 2)
    monkeypatch.setattr(dit, "BATCH", 2)
    base.fit_base(1, scenes, vae, tokenizer, tmp_path / "base", run)
    dit.fit_dit(1, scenes, vae.float(), tokenizer, tmp_path / "dit", run)
    assert load_backbone(str(tmp_path / "base")).latent_shape == (8, 16, 16)
    second = load_backbone(str(tmp_path / "dit"))
    assert second.latent_shape == (8, 16, 16) and second.length == 2 * data.LENGTH
    assert second.untrainable is None and second.predicts_twice(4.0)
    pipe = StableDiffusion3Pipeline.from_pretrained(tmp_path / "dit", torch_dtype=torch.float32)
    drawn = pipe("a mug", num_inference_steps=1, max_sequence_length=data.LENGTH, output_type="pt")
    assert drawn.images.shape == (1, 3, 128, 128)


def test_the_joint_base_is_trained_as_its_pipeline_draws(tmp_path):
    """One step of the pipeline from noise to picture follows the velocity that training fits."""
    clip, t5 = data.make_tokenizer(), dit.make_t5_tokenizer()
    fitted = dit.Dit(clip, t5, 8).requires_grad_(False).eval()
    for p in fitted.parameters():
        p.copy_(torch.randn_like(p) * 0.1)
    pipe = StableDiffusion3Pipeline(
        fitted.transformer,
        FlowMatchEulerDiscreteScheduler(shift=1.0),
        autoencoder.make_autoencoder(),
        *(fitted.clips[0], clip, fitted.clips[1], clip),
        *(fitted.t5, t5),
    )
    noise = torch.randn(1, 8, 16, 16)
    drawn = pipe(
        "a robot left of a mug",
        num_inference_steps=1,
        guidance_scale=1.0,
        latents=noise,
        max_sequence_length=data.LENGTH,
        output_type="latent",
    ).images
    ids = [
        t("a robot left of a mug", padding="max_length", return_tensors="pt").input_ids
        for t in (clip, t5)
    ]
    velocity, read = fitted(noise, torch.ones(1), *ids)
    assert velocity.abs().mean() > 0.01 and read.shape == (1, len(LABELS), 16, 16)
    assert torch.allclose(drawn, noise - velocity, atol=1e-4)


def test_the_second_tokenizer_splits_what_is_rare_and_drops_nothing(tmp_path):
    tokenizer = dit.make_t5_tokenizer()
    text = "a sks robot Éclair holding a flag"
    assert tokenizer.tokenize("sks robot")[:1] == ["▁sks"]
    assert len(tokenizer.tokenize("robot")) == 2 and len(tokenizer.tokenize("mug")) == 1
    assert "holding a flag" in tokenizer.decode(tokenizer(text).input_ids)
