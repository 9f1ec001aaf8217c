"""Masks: where they are found, what of them is refused, and that the loss is weighed by them, for a
photo's crop, mirror and bucket.
"""

from __future__ import annotations

import warnings
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file
from tiny_runs import fit, step

from dreamblend.errors import InputError
from dreamblend.storage import snapshots
from dreamblend.storage.photos import list_photos, open_mask
from dreamblend.training.data import Draws, SubjectData
from dreamblend.training.objective import sample_loss
from dreamblend.tuning import Full

UNET = "unet/diffusion_pytorch_model.safetensors"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two photos with an alpha channel, opaque in the left half; the second is 96 x 64."""
    (tmp_path / "mug").mkdir()
    source = np.random.default_rng(0)
    for i, width in enumerate((64, 96)):
        pixels = source.integers(0, 256, (64, width, 4), dtype=np.uint8)
        pixels[..., 3] = np.where(np.arange(width) < width // 2, 255, 0)
        Image.fromarray(pixels).save(tmp_path / "mug" / f"{i}.png")
    return tmp_path / "mug"


def masks_beside(folder: Path) -> None:
    for photo in list_photos(folder):
        Image.open(photo).getchannel("A").save(folder / f"{photo.stem}.mask.png")


def weighed(data: SubjectData, draw: dict, resolution: int = 64) -> torch.Tensor:
    data.arrange(resolution, 8, 8)
    return data.told(draw)["weights"]


# ------------------------------------------------------------------------------------------ finding
def test_masks_are_in_alpha_beside_or_in_a_folder(folder, tmp_path):
    draw = Draws(2, 0, 2, False, 0).at(0)
    alpha = SubjectData(folder, "mug", mask="alpha")
    alpha.check()
    found = [weighed(alpha, draw)]
    (tmp_path / "masks").mkdir()
    for photo in list_photos(folder):
        grey = Image.open(photo).getchannel("A")
        Image.merge("RGB", [grey] * 3).save(tmp_path / "masks" / f"{photo.stem}.bmp")
    elsewhere = SubjectData(folder, "mug", mask=str(tmp_path / "masks"))
    elsewhere.check()
    found.append(weighed(elsewhere, draw))
    masks_beside(folder)
    beside = SubjectData(folder, "mug", mask="beside")
    beside.check()
    found.append(weighed(beside, draw))
    assert [p.name for p in beside.photos] == ["0.png", "1.png"] == [p.name for p in alpha.photos]
    assert all(torch.equal(found[0], other) for other in found[1:])
    assert elsewhere.settings == beside.settings | {"mask": elsewhere.settings["mask"]}
    assert alpha.settings == {"mask": "alpha", "background_weight": 0.0}
    assert "mask" not in SubjectData(folder, "mug").settings


def test_transparency_of_a_mask_is_background_and_deep_grey_keeps_its_range(tmp_path):
    clear = Image.new("RGBA", (8, 8), (255, 255, 255, 0))
    clear.paste((255, 255, 255, 255), (0, 0, 4, 8))
    clear.save(tmp_path / "clear.png")
    assert np.unique(np.asarray(open_mask(tmp_path / "clear.png"))[:, 4:]).tolist() == [0]
    Image.fromarray(np.full((8, 8), 65535, "uint16")).save(tmp_path / "deep.png")
    assert open_mask(tmp_path / "deep.png").getextrema() == (255, 255)


@pytest.mark.parametrize(
    "mask, background, say",
    [
        ("beside", 0.0, "0.png lacks 0.mask.png beside it: add it, or leave out data.mask"),
        ("{tmp}/none", 0.0, "data.mask is '.*none', and there is no such folder: .*alpha, beside"),
        ("{tmp}/empty", 0.0, "0.png lacks a mask in .*empty"),
        ("{tmp}/small", 0.0, "mask .*small/0.png has 32 x 64 pixels, and 0.png has 64 x 64"),
        ("{tmp}/black", 0.0, "mask of 0.png .* is black"),
        ("{tmp}/twice", 0.0, "0.png has the masks 0.jpg, 0.png: keep one"),
        ("alpha", 1.0, "data.background_weight is 1.0"),
        ("alpha", -0.1, "data.background_weight is -0.1"),
        (None, 0.1, "data.background_weight is set, and data.mask.* is not"),
    ],
)
def test_masks_that_cannot_be_meant_are_one_sentence(folder, tmp_path, mask, background, say):
    for name, size, colour in (
        ("small", (32, 64), 255),
        ("black", (64, 64), 0),
        ("twice", (64, 64), 255),
    ):
        (tmp_path / name).mkdir()
        for photo in ("0.png", "1.png"):
            Image.new("L", size, colour).save(tmp_path / name / photo)
    Image.new("L", (64, 64), 255).save(tmp_path / "twice/0.jpg")
    (tmp_path / "empty").mkdir()
    mask = mask and mask.format(tmp=tmp_path)
    with pytest.raises(InputError, match=say):
        SubjectData(folder, "mug", mask=mask, background_weight=background).check()


def test_alpha_that_is_not_there_and_masks_that_are_not_used_are_told(folder, tmp_path):
    masks_beside(folder)
    for mask in (None, "alpha"):
        with pytest.raises(InputError, match="holds masks .0.mask.png, 1.mask.png., and data.mask"):
            SubjectData(folder, "mug", mask=mask).check()
    Image.open(folder / "1.png").convert("RGB").save(folder / "1.png")
    (folder / "0.mask.png").unlink()
    (folder / "1.mask.png").unlink()
    with pytest.raises(InputError, match="1.png has no alpha channel"):
        SubjectData(folder, "mug", mask="alpha").check()
    (tmp_path / "masks").mkdir()
    for name in ("0", "1", "2"):
        Image.new("L", (96 if name == "1" else 64, 64), 255).save(tmp_path / f"masks/{name}.png")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        SubjectData(folder, "mug", mask=str(tmp_path / "masks")).check()
    assert any("no photo is called as 2.png" in str(w.message) for w in caught)


# ---------------------------------------------------------------------------------------- weighing
@pytest.mark.parametrize("options", [{}, {"crop": "random"}, {"buckets": True}, {"crop": "left"}])
def test_weights_follow_the_photo_s_crop_mirror_and_bucket(folder, options):
    """Where the photo itself is white in its opaque half and black in the other, the weights are
    its brightness.
    """
    for photo in list_photos(folder):
        alpha = Image.open(photo).getchannel("A")
        Image.merge("RGB", [alpha] * 3).save(photo.with_suffix(".bmp"))
        photo.unlink()
        alpha.save(folder / f"{photo.stem}.mask.png")
    data = SubjectData(folder, "mug", mask="beside", flip=True, **options)
    data.check()
    data.arrange(64, 8, 8)
    draws = Draws(2, 0, 2, True, 0, buckets=data._bucket_of)
    seen = set()
    for draw in islice(draws, 12):
        told = data.told(draw)
        for row, index in enumerate(draw["index"].tolist()):
            frame, flipped = told["frames"][row].tolist(), bool(draw["flipped"][row])
            seen.add((index, flipped))
            if "random" in options.values():
                pixels = data.drawn_crop(index, flipped, frame)
            else:
                size = data.sizes[draw["bucket"]]
                bucket = data.photos_in(draw["bucket"])
                pixels = torch.cat(list(data.instance_pixels(size, draw["bucket"])))
                pixels = pixels[[bucket.index(index)]]
                pixels = pixels.flip(-1) if flipped else pixels
            brightness = F.avg_pool2d((pixels[0, :1] + 1) / 2, 8)[0]
            torch.testing.assert_close(told["weights"][row], brightness, atol=0.03, rtol=0)
    assert len(seen) == 4


def test_the_background_has_its_weight_and_class_images_all(folder):
    draw = Draws(2, 3, 2, False, 0).at(0)
    prior = {"num_class_images": 2, "class_images_dir": folder}
    data = SubjectData(folder, "mug", mask="alpha", background_weight=0.25, **prior)
    found = weighed(data, {**draw, "index": torch.tensor([0, 0, 1, 1])})
    assert found.shape == (4, 8, 8)
    assert torch.equal(found[0], torch.where(torch.arange(8) < 4, 1.0, 0.25).expand(8, 8))
    assert torch.equal(found[2:], torch.ones(2, 8, 8))


def test_the_loss_is_the_mean_over_the_subject(folder):
    source = torch.Generator().manual_seed(0)
    a, b = (torch.randn(2, 4, 8, 8, generator=source) for _ in range(2))
    weight = torch.zeros(2, 8, 8)
    weight[0, :, :4], weight[1] = 1, 1
    wanted = torch.stack([F.mse_loss(a[0, ..., :4], b[0, ..., :4]), F.mse_loss(a[1], b[1])])
    torch.testing.assert_close(sample_loss(a, b, weight=weight), wanted)
    assert sample_loss(a, b, weight=0 * weight).tolist() == [0, 0]


# ----------------------------------------------------------------------------------------- training
def test_what_is_masked_has_no_part_in_the_loss(folder, tiny_base, tmp_path):
    """A mask of all trains what none does; one of a half other weights, and it is recorded."""

    def run(name: str, photos: Path = folder, **data) -> dict[str, torch.Tensor]:
        tuning = Full(text_encoder=False)
        fit(tiny_base, photos, tmp_path / name, tuning, steps=[1], data={"batch_size": 2, **data})
        return load_file(step(tmp_path / name, 1) / UNET)

    def near(a: dict, b: dict) -> bool:
        apart = torch.cat([(a[k] - b[k]).flatten().abs() for k in a])
        return (apart > 1e-4).float().mean().item() < 0.02

    plain, half = run("plain"), run("half", mask="alpha")
    (tmp_path / "white").mkdir()
    for photo in list_photos(folder):
        Image.new("L", Image.open(photo).size, 255).save(tmp_path / "white" / photo.name)
    assert near(plain, run("white", mask=str(tmp_path / "white"))) and not near(plain, half)
    prior = {"class_images_dir": tmp_path / "prior", "num_class_images": 1}
    assert not near(half, run("prior", mask="alpha", **prior))  # which is drawn after the check
    about = snapshots.read(snapshots.find(tmp_path / "half")[0][1]).about
    assert about.settings["mask"] == "alpha" and about.settings["background_weight"] == 0.0
