"""Buckets, crops and what the denoiser is told of them, as diffusers' script for SDXL has it; in
one process as in several.
"""

from __future__ import annotations

from collections import Counter
from itertools import islice
from pathlib import Path
from random import Random

import diffusers
import numpy as np
import pytest
import torch
from families import save_family, small_bases
from PIL import Image
from safetensors.torch import load_file
from tiny_runs import fit, step

from dreamblend.errors import InputError
from dreamblend.storage import snapshots
from dreamblend.storage.photos import load_photo, open_photo, photo_size, to_pixels
from dreamblend.training.data import Draws, SubjectData
from dreamblend.training.framing import bucket_sizes, corner, covering, nearest
from dreamblend.tuning import Full, LoRA

UNET = "unet/diffusion_pytorch_model.safetensors"
SIZES = [(64, 64), (120, 60), (60, 120), (64, 96), (64, 64)]  # width, height


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Photos of several shapes, every pixel its own. Not to be changed."""
    folder, source = tmp_path_factory.mktemp("mug"), np.random.default_rng(0)
    for i, (width, height) in enumerate(SIZES):
        pixels = source.integers(0, 256, (height, width, 3), dtype=np.uint8)
        Image.fromarray(pixels).resize((width, height)).save(folder / f"{i}.png")
    return folder


# ------------------------------------------------------------------------------------------ buckets
@pytest.mark.parametrize("resolution, multiple", [(512, 8), (1024, 16), (768, 8), (64, 8), (32, 8)])
def test_buckets_have_the_area_of_the_square_and_sides_that_fit(resolution, multiple):
    sizes = bucket_sizes(resolution, multiple)
    assert (resolution, resolution) in sizes and {size[::-1] for size in sizes} == {*sizes}
    assert all(side % multiple == 0 for size in sizes for side in size)
    step = max(multiple, resolution // 16)
    for height, width in sizes:
        area = height * width
        assert resolution**2 - step * max(height, width) < area <= resolution**2
        assert max(height, width) <= 4 * min(height, width)


def test_a_photo_goes_to_the_nearest_shape():
    sizes = bucket_sizes(1024, 8)
    assert nearest((3000, 3000), sizes) == (1024, 1024)
    tall, wide = nearest((4032, 3024), sizes), nearest((3024, 4032), sizes)
    assert tall == wide[::-1] and abs(tall[0] / tall[1] - 4 / 3) < 0.06
    assert nearest((9000, 1000), sizes) == max(sizes, key=lambda size: size[0] / size[1])


@pytest.mark.parametrize("batch_size, world", [(1, 6), (2, 3), (3, 2), (6, 1)])
def test_batches_are_of_one_bucket_and_use_all_photos_equally_often(batch_size, world):
    """Whoever draws them; and a run that goes on draws the same."""
    buckets, repeats = [0, 1, 1, 2, 0], [1, 1, 1, 2, 1]
    options = {"repeats": repeats, "buckets": buckets}
    ranks = [Draws(5, 3, batch_size, True, 0, rank, world, **options) for rank in range(world)]
    draws = [draw for step in islice(zip(*ranks), 60 // world) for draw in step]
    one = list(islice(Draws(5, 3, batch_size, True, 0, **options), 60))
    late = next(iter(Draws(5, 3, batch_size, True, 0, start=lambda: 7, **options)))
    for draw, alone in [*zip(draws, one, strict=True), (late, one[7])]:
        assert draw["index"].tolist() == alone["index"].tolist()
        assert draw["flipped"].tolist() == alone["flipped"].tolist()
        assert {buckets[i] for i in draw["index"][:batch_size].tolist()} == {draw["bucket"]}
    for lap in range(0, 60, 6):  # six photos, with their repeats
        used = Counter(
            i for draw in draws[lap : lap + 6] for i in draw["index"][:batch_size].tolist()
        )
        assert used == {i: n * batch_size for i, n in enumerate(repeats)}
    assert len({tuple(d["bucket"] for d in draws[lap : lap + 6]) for lap in range(0, 60, 6)}) > 3


def test_one_bucket_draws_what_no_bucket_does():
    plain, one = (Draws(5, 4, 3, True, 0, buckets=of) for of in (None, [0] * 5))
    for a, b in islice(zip(plain, one), 20):
        assert a["index"].tolist() == b["index"].tolist() and a["bucket"] == b["bucket"] == 0


# -------------------------------------------------------------------------------------------- crops
def script(width: int, height: int, side: int) -> tuple[tuple[int, int], tuple[int, int]]:
    """train_dreambooth_lora_sdxl.py: the size after Resize(side), and y1, x1 of --center_crop."""
    short, long = min(width, height), max(width, height)
    new = int(side * long / short)
    height, width = (side, new) if width >= height else (new, side)
    y1 = max(0, int(round((height - side) / 2.0)))
    x1 = max(0, int(round((width - side) / 2.0)))
    return (height, width), (y1, x1)


@pytest.mark.parametrize("width, height", [(4032, 3024), (3000, 4001), (512, 512), (700, 333)])
def test_a_centre_crop_is_told_as_in_diffusers_script(width, height):
    scaled, at = script(width, height, 512)
    assert covering((height, width), (512, 512)) == scaled
    assert corner((height, width), (512, 512), "center") == at


def test_a_random_crop_lies_anywhere_in_the_photo_like_torchvisions():
    """Each place is as likely: RandomCrop draws from 0 to height - h, both included."""
    found = Counter(corner((64, 67), (64, 64), "random", Random(i)) for i in range(2000))
    assert {*found} == {(0, i) for i in range(4)} and min(found.values()) > 400


def test_a_random_crop_is_the_part_that_is_told(folder):
    data = SubjectData(folder, "mug", crop="random", flip=True)
    data.arrange(64, 8)
    lefts = set()
    for draw in islice(Draws(5, 0, 4, True, 0, buckets=[0] * 5), 20):
        frames = data.told(draw)["frames"].tolist()
        for index, flipped, frame in zip(draw["index"].tolist(), draw["flipped"].tolist(), frames):
            width, height = SIZES[index]
            (scaled_h, scaled_w), _ = script(width, height, 64)
            assert frame[:2] == [height, width] and frame[4:] == [64, 64]
            photo = open_photo(data.photos[index]).resize((scaled_w, scaled_h), Image.LANCZOS)
            pixels = to_pixels([photo])
            pixels = pixels.flip(-1) if flipped else pixels
            top, left = frame[2:4]
            wanted = pixels[..., top : top + 64, left : left + 64]
            assert torch.equal(data.drawn_crop(index, flipped, frame), wanted)
            lefts |= {left} if index == 1 else set()
    assert len(lefts) > 5


def test_the_corner_of_a_mirrored_photo_is_that_in_the_mirror(folder):
    data = SubjectData(folder, "mug", crop="left", flip=True)
    data.arrange(60, 4)
    for draw in islice(Draws(5, 0, 4, True, 0, buckets=[0] * 5), 9):
        for index, flipped, frame in zip(
            *(draw[name].tolist() for name in ("index", "flipped")),
            data.told(draw)["frames"].tolist(),
        ):
            if index == 1:  # 120 x 60
                assert frame[2:4] == [0, 60 if flipped else 0]


def test_the_size_in_the_header_is_that_of_the_upright_photo(tmp_path):
    for orientation in (1, 3, 6, 8):
        exif = Image.Exif()
        exif[0x0112] = orientation
        Image.new("RGB", (96, 64)).save(tmp_path / "x.jpg", exif=exif)
        photo = open_photo(tmp_path / "x.jpg")
        assert photo_size(tmp_path / "x.jpg") == (photo.height, photo.width)


@pytest.mark.parametrize("settings, say", [({"crop": "Random"}, "crop is 'Random': .* random")])
def test_a_crop_that_there_is_not_is_refused(folder, settings, say):
    with pytest.raises(InputError, match=say):
        SubjectData(folder, "mug", **settings).check()


# ----------------------------------------------------------------------------------------- training
@pytest.mark.parametrize(
    "options",
    [
        pytest.param({}, marks=pytest.mark.heavy),
        pytest.param({"buckets": True}, marks=pytest.mark.heavy),
        {"crop": "random"},
    ],
)
def test_sdxl_is_told_the_photo_the_corner_and_the_size(options, folder, tmp_path, monkeypatch):
    """compute_time_ids of diffusers' script: original size, crop's corner, the size asked for.
    Class images are told theirs.
    """
    seen, forward = [], diffusers.UNet2DConditionModel.forward

    def listening(unet, sample, *args, added_cond_kwargs, **kwargs):
        seen.append((added_cond_kwargs["time_ids"].tolist(), sample.shape))
        return forward(unet, sample, *args, added_cond_kwargs=added_cond_kwargs, **kwargs)

    monkeypatch.setattr(diffusers.UNet2DConditionModel, "forward", listening)
    (tmp_path / "prior").mkdir()
    Image.new("RGB", (64, 64)).save(tmp_path / "prior/0.png")
    with small_bases():
        module = fit(
            save_family("sdxl", tmp_path),
            folder,
            tmp_path / "run",
            LoRA(rank=2),
            steps=[5],
            data={
                "batch_size": 2,
                "num_class_images": 1,
                "class_images_dir": tmp_path / "prior",
                **options,
            },
        )
    draws = module.data.train_dataloader().dataset
    sizes = set()
    for draw, (time_ids, shape) in zip(islice(map(draws.at, range(5)), 5), seen, strict=True):
        height, width = module.data.sizes[draw["bucket"]]
        assert shape[2:] == module.backbone.latent_size(height, width)
        sizes.add((height, width))
        for row, index in enumerate(draw["index"][:2].tolist()):
            original = [*reversed(SIZES[index])]
            assert time_ids[row][:2] == original and time_ids[row][4:] == [height, width]
            if not options:
                assert tuple(time_ids[row][2:4]) == script(*SIZES[index], 64)[1]
        assert time_ids[2][:2] == [64, 64] and time_ids[2][4:] == [height, width]
    assert (len(sizes) > 1) == ("buckets" in options)
    settings = snapshots.read(snapshots.find(tmp_path / "run")[0][1]).about.settings
    assert settings["crop"] == options.get("crop", "center")
    assert settings.get("buckets") == options.get("buckets")


def weights(out: Path) -> dict[str, torch.Tensor]:
    return load_file(step(out, 2) / UNET)


@pytest.mark.parametrize("options", [{"crop": "random"}, {"buckets": True}])
def test_buckets_and_random_crops_change_the_weights_and_repeat_to_the_bit(
    options, folder, tiny_base, tmp_path
):
    def run(name: str, **more) -> dict[str, torch.Tensor]:
        tuning = Full(text_encoder=False)
        more = {"steps": [1, 2], **more}
        fit(tiny_base, folder, tmp_path / name, tuning, **more)
        return weights(tmp_path / name)

    plain = run("plain")
    data = {"batch_size": 2, "flip": True, **options}
    whole = run("whole", data=data)
    again = run("again", data=data)
    assert all(torch.equal(whole[k], again[k]) for k in whole)
    assert not all(torch.equal(whole[k], plain[k]) for k in whole)


def test_the_latents_of_a_bucket_are_those_of_the_photo_in_its_shape(folder, tiny_base, tmp_path):
    data = {"buckets": True, "resolution": 64}
    module = fit(tiny_base, folder, tmp_path, Full(text_encoder=False), steps=[1], data=data)
    shapes = {
        index: module.data.sizes[bucket]
        for index, photo in enumerate(module.latents[False])
        for bucket in photo
    }
    assert shapes[0] == shapes[4] == (64, 64)
    assert shapes[1] == shapes[2][::-1] and shapes[1][1] > shapes[1][0]
    pixels = to_pixels([load_photo(module.data.photos[1], shapes[1])])
    assert pixels.shape[2:] == shapes[1]
    with torch.no_grad():
        mean, _ = module.backbone.encode(pixels)
    (found,) = module.latents[False][1].values()
    torch.testing.assert_close(found[0], mean)
