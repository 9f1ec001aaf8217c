"""A reference from any image: inverted and drawn again it is the same image, and CAG follows it."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from families import save_family, shrunk
from test_blends import full_pair

from dreamblend.blending.batch import Batch
from dreamblend.blending.blends import CAG, Drawing, Early, draw_reference
from dreamblend.blending.draw import draw
from dreamblend.blending.guidance import map_distance
from dreamblend.blending.inversion import inverted
from dreamblend.blending.models import Models
from dreamblend.blending.module import Blender
from dreamblend.blending.options import Options
from dreamblend.errors import InputError
from dreamblend.models import load_backbone
from dreamblend.storage.photos import load_photo, to_pixels

PAIRS = [("a sks mug on the beach", 3), ("a red sks mug", 8)]
STEPS = 10
WHOLE = CAG(window=(0.0, 1.0))


@pytest.fixture(scope="module", params=["tiny_base", "tiny_v_base", "sd3"])
def models(request, tmp_path_factory) -> Models:
    if request.param == "sd3":
        folder = save_family("sd3", tmp_path_factory.mktemp("families"))
        return full_pair(shrunk(load_backbone(str(folder))))
    return full_pair(load_backbone(str(request.getfixturevalue(request.param))))


def batch_of(models: Models, scale: float = 0.0, seed: int = 0, count: int = 1) -> Batch:
    pairs = [(prompt, number + seed) for prompt, number in PAIRS[:count]]
    return Batch.of(models, pairs, "sks", "mug", STEPS, scale)


def distance(a: Drawing, b: Drawing) -> float:
    return sum(float(map_distance(a.site_maps[i], b.site_maps[i]).mean()) for i in b.site_maps)


@torch.no_grad()
def test_what_early_drew_is_inverted_to_its_noise_and_its_maps(models):
    batch = batch_of(models)
    drawn = draw_reference(batch, [WHOLE])
    found = inverted(batch, [WHOLE], drawn.latents)
    again = Early().draw(replace(batch, noise=found.latents))
    assert (again.latents - drawn.latents).norm() < 0.02 * drawn.latents.norm()
    assert (found.latents - batch.noise).norm() < 0.02 * batch.noise.norm()
    other = draw_reference(batch_of(models, seed=50), [WHOLE])
    assert distance(found, drawn) < 0.01 * distance(other, drawn)


@torch.no_grad()
def test_each_prompt_has_the_reference_as_if_it_were_alone(models):
    image = torch.randn(1, *models.early.latent_shape, generator=torch.Generator().manual_seed(1))
    together = inverted(batch_of(models, count=2), [WHOLE], image)
    alone = inverted(batch_of(models), [WHOLE], image)
    torch.testing.assert_close(together.latents[:1], alone.latents, atol=1e-4, rtol=1e-4)


@pytest.fixture(scope="module")
def full(tiny_base) -> Models:
    return full_pair(load_backbone(str(tiny_base)))


@pytest.mark.parametrize("scheduler", ["euler-karras", "heun", "pndm", "dpm++-2m"])
@torch.no_grad()
def test_it_has_the_maps_of_the_steps_of_any_sampler(full, scheduler):
    models = Models(full.early.bind({}), full.late.bind({}), full.base)
    Options(scheduler=scheduler).apply(models)
    batch, blend = batch_of(models, 4.0), CAG(window=(0.2, 0.8))
    found = inverted(batch, [blend], torch.zeros_like(batch.noise))
    assert set(found.site_maps) == set(blend.guided_steps(batch.calls))
    assert found.latents.isfinite().all()


def test_cag_follows_a_photo_and_early_is_drawn_as_without(full, mug_photos):
    photo = load_photo(mug_photos / "0.png", 32)
    batch, blend = batch_of(full, 4.0, count=2), CAG(strength=1.0, window=(0.0, 1.0), repeats=3)
    with torch.no_grad():
        image = full.early.encode(to_pixels([photo]))[0]
        target = inverted(batch, [blend], image)
        guided = draw(replace(batch, reference=to_pixels([photo])), blend, compare=True)
        usual = draw(batch, blend, compare=True)
    assert torch.equal(guided["early"].latents, usual["early"].latents)
    assert torch.equal(guided["late"].latents, usual["late"].latents)
    assert not torch.allclose(guided["cag"].latents, usual["cag"].latents, atol=1e-2)
    # at the first step both start from the late snapshot's distance; by the mean it has fallen
    weak = CAG(strength=1e-6, window=(0.0, 1.0))
    with torch.no_grad():
        unmoved = weak.draw(batch, target)
    assert (guided["cag"].distance < unmoved.distance).all()


def test_a_reference_for_a_blend_that_has_none_is_refused(tmp_path):
    with pytest.raises(InputError, match="guides CAG alone, and region is drawn"):
        Blender("1", "2", reference=tmp_path / "photo.png")
    with pytest.raises(InputError, match="cannot be read as a photo"):
        Blender("1", "2", blend=CAG(), reference=tmp_path / "photo.png")
