"""Odd and broken photos, the pixel round trip, the stream of draws, and the data module in a real
Trainer.
"""

from __future__ import annotations

import re
import warnings
from collections import Counter
from itertools import islice
from pathlib import Path

import lightning as L
import numpy as np
import pytest
import torch
from PIL import Image, ImageCms
from torch import nn

from dreamblend.errors import InputError
from dreamblend.storage.photos import (
    FORMATS,
    list_photos,
    load_photo,
    open_photo,
    to_images,
    to_pixels,
)
from dreamblend.training.data import Draws, SubjectData

REAL = Path(__file__).resolve().parents[3] / "shared/data/dreambooth/dataset"
RED, GREEN, BLUE, WHITE = (255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 255)


def load(image: Image.Image, path: Path, size: int = 64, **options) -> np.ndarray:
    """Save, load, and check what every photo must come out as."""
    image.save(path, **options)
    photo = load_photo(path, size)
    assert photo.mode == "RGB" and photo.size == (size, size)
    return np.asarray(photo).astype(int)


def near(pixel: np.ndarray, colour: tuple[int, int, int], tolerance: int = 1) -> bool:
    return bool(np.abs(pixel - np.array(colour)).max() <= tolerance)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Three plain photos in one folder."""
    (tmp_path / "mug").mkdir()
    for i, colour in enumerate((RED, GREEN, BLUE)):
        Image.new("RGB", (64, 64), colour).save(tmp_path / "mug" / f"{i}.png")
    return tmp_path / "mug"


# --------------------------------------------------------------------------------------------- list
def test_list_takes_images_only_and_sorts(tmp_path):
    for name in ("b.JPG", "a.png", "c.Tiff", "notes.txt", ".hidden.png", "jpg"):
        (tmp_path / name).touch()
    (tmp_path / "folder.png").mkdir()
    assert [p.name for p in list_photos(tmp_path)] == ["a.png", "b.JPG", "c.Tiff"]


def test_images_that_cannot_be_read_are_named_once_and_nothing_else_is(tmp_path):
    image = Image.new("RGB", (9, 9))
    image.save(tmp_path / "a.JFIF", "JPEG")
    for name in ("b.NEF", "c.svg", "d.mov", "a.txt", "a.json", ".hidden.dng", "Thumbs.db"):
        (tmp_path / name).touch()
    (tmp_path / "folder.psd").mkdir()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert (
            [p.name for p in list_photos(tmp_path)]
            == [p.name for p in list_photos(tmp_path)]
            == ["a.JFIF"]
        )
    (said,) = (str(w.message) for w in caught)
    assert (
        ": b.NEF, c.svg, d.mov cannot be read" in said
        and "JPEG or PNG" in said
        and "pillow-heif" not in said
    )
    assert load_photo(tmp_path / "a.JFIF", 8).size == (8, 8)


@pytest.mark.parametrize(
    "name, kind, extra", [("x.avif", "AVIF", None), ("x.HEIC", "HEIF", "pillow-heif")]
)
def test_photos_of_phones_are_read_where_a_library_can_and_named_where_not(
    tmp_path, name, kind, extra
):
    Image.new("RGB", (9, 9), RED).save(tmp_path / "a.png")
    if kind in FORMATS:
        Image.new("RGB", (64, 64), GREEN).save(tmp_path / name)
        assert len(list_photos(tmp_path)) == 2 and near(
            np.asarray(load_photo(tmp_path / name, 32)).astype(int)[9, 9], GREEN, 8
        )
        return
    (tmp_path / name).touch()
    with pytest.warns(UserWarning, match=f"{name} cannot be read and is left out.*{extra or ''}"):
        assert [p.name for p in list_photos(tmp_path)] == ["a.png"]


@pytest.mark.parametrize(
    "what, say", [("missing", "does not exist"), ("file.txt", "not a folder"), ("empty", "webp")]
)
def test_list_says_what_is_wrong(tmp_path, what, say):
    (tmp_path / "file.txt").touch()
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match=f"{re.escape(str(tmp_path / what))}.*{say}"):
        list_photos(tmp_path / what)


# --------------------------------------------------------------------------------------- odd photos
@pytest.mark.parametrize("mode", ["RGBA", "LA"])
def test_transparency_becomes_white_whatever_colour_hides_there(tmp_path, mode):
    image = Image.new(mode, (64, 64), (0, 0, 0, 0) if mode == "RGBA" else (0, 0))
    image.paste((*RED, 255) if mode == "RGBA" else (90, 255), (0, 0, 32, 64))
    pixels = load(image, tmp_path / "x.png")
    assert near(pixels[5, 5], RED if mode == "RGBA" else (90, 90, 90)) and near(
        pixels[5, 60], WHITE
    )


def test_half_transparent_is_blended(tmp_path):
    assert near(
        load(Image.new("RGBA", (64, 64), (0, 0, 0, 51)), tmp_path / "x.png")[9, 9], (204, 204, 204)
    )


def test_palette_with_and_without_transparency(tmp_path):
    image = Image.new("P", (64, 64), 1)
    image.putpalette([*BLUE, *RED])
    image.paste(0, (0, 0, 32, 64))
    plain = load(image, tmp_path / "plain.png")
    assert near(plain[5, 5], BLUE) and near(plain[5, 60], RED)
    clear = load(image, tmp_path / "clear.png", transparency=1)
    assert near(clear[5, 5], BLUE) and near(clear[5, 60], WHITE)


DEEP = [
    ("uint16", 65535, "png"),
    ("uint16", 65535, "tif"),
    ("int32", 65535, "tif"),
    ("float32", 1, "tif"),
]


@pytest.mark.parametrize("dtype, top, ending", DEEP)
def test_deep_grey_keeps_its_mean(tmp_path, dtype, top, ending):
    ramp = np.linspace(0, top, 64).repeat(64).reshape(64, 64).T.astype(dtype)
    pixels = load(Image.fromarray(ramp), tmp_path / f"x.{ending}")
    assert abs(pixels.mean() - 127.5) < 1 and pixels[0, 0, 0] == 0 and pixels[0, -1, 0] == 255


def test_dark_16_bit_photo_stays_dark(tmp_path):
    assert near(
        load(Image.fromarray(np.full((64, 64), 2570, "uint16")), tmp_path / "x.png")[3, 3],
        (10, 10, 10),
        0,
    )


def test_cmyk_jpeg(tmp_path):
    image = Image.new("CMYK", (64, 64), (0, 255, 255, 0))  # magenta and yellow ink: red
    image.paste((0, 0, 0, 0), (32, 0, 64, 64))
    pixels = load(image, tmp_path / "x.jpg", quality=95)
    assert near(pixels[9, 9], RED, 6) and near(pixels[9, 55], WHITE, 6)


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "L"])
def test_an_image_in_srgb_stays_as_it_is(tmp_path, mode):
    image = noise().convert(mode)
    image.save(tmp_path / "plain.png")
    image.save(
        tmp_path / "profile.png",
        icc_profile=(
            ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
            if mode != "L"
            else b"no profile"
        ),
    )
    plain, profile = (
        np.asarray(open_photo(tmp_path / f"{name}.png")).astype(int)
        for name in ("plain", "profile")
    )
    assert np.abs(plain - profile).max() <= 1


def test_colours_are_those_of_the_image_s_own_profile(tmp_path):
    """A profile whose red is sRGB's green: so its colours come out exchanged."""
    profile = (
        ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB"))
        .tobytes()
        .replace(b"rXYZ", b"____", 1)
        .replace(b"gXYZ", b"rXYZ", 1)
    )
    Image.new("RGB", (64, 64), (200, 60, 30)).save(
        tmp_path / "x.png", icc_profile=profile.replace(b"____", b"gXYZ", 1)
    )
    assert near(np.asarray(open_photo(tmp_path / "x.png")).astype(int), (60, 200, 30), 2)


def test_one_bit_and_grey(tmp_path):
    bits = Image.new("1", (64, 64), 0)
    bits.paste(1, (0, 0, 32, 64))
    pixels = load(bits, tmp_path / "bits.png")
    assert near(pixels[5, 5], WHITE) and near(pixels[5, 60], (0, 0, 0))
    assert near(load(Image.new("L", (64, 64), 77), tmp_path / "grey.png")[0, 0], (77, 77, 77))


def test_exif_rotation_is_applied(tmp_path):
    image = Image.new("RGB", (96, 64), BLUE)
    image.paste(RED, (0, 0, 48, 32))  # stored top left; orientation 6 shows it top right
    exif = Image.Exif()
    exif[0x0112] = 6
    pixels = load(image, tmp_path / "x.jpg", exif=exif, quality=95)
    assert near(pixels[4, 60], RED, 8)
    assert all(near(pixels[y, x], BLUE, 8) for y, x in ((4, 4), (60, 4), (60, 60)))


@pytest.mark.parametrize("size", [(200, 64), (64, 200), (400, 128)])
def test_non_square_keeps_the_centre_unstretched(tmp_path, size):
    image, short = Image.new("RGB", size, RED), min(size)
    x, y = (size[0] - short) // 2, (size[1] - short) // 2
    image.paste(GREEN, (x, y, x + short, y + short))
    pixels = load(image, tmp_path / "x.png")
    assert near(pixels[2:-2, 2:-2], GREEN)


@pytest.mark.parametrize(
    "crop, size, corner",
    [
        ("center", (64, 160), (0, 48)),
        ("top", (64, 160), (0, 0)),
        ("bottom", (64, 160), (0, 96)),
        ("left", (160, 64), (0, 0)),
        ("right", (160, 64), (96, 0)),
        ("top", (160, 64), (48, 0)),
        ("left", (64, 160), (0, 48)),
        ("bottom", (64, 64), (0, 0)),
    ],
)
def test_a_crop_says_where_the_square_lies(tmp_path, crop, size, corner):
    image = Image.new("RGB", size, RED)
    image.paste(GREEN, (*corner, corner[0] + 64, corner[1] + 64))
    image.save(tmp_path / "x.png")
    assert near(np.asarray(load_photo(tmp_path / "x.png", 64, crop)).astype(int), GREEN)
    (pixels,) = SubjectData(tmp_path, "mug", crop=crop).instance_pixels(64)
    assert torch.equal(pixels, to_pixels([load_photo(tmp_path / "x.png", 64, crop)]))


@pytest.mark.parametrize(
    "size, told",
    [
        ((1080, 1920), True),
        ((2520, 1080), True),
        ((3024, 4032), False),
        ((6000, 4000), False),
        ((4272, 2848), False),
    ],
)
def test_photos_that_lose_much_to_the_square_are_named_once(folder, size, told):
    """Phones' films and panoramas; not the 4:3 of phones and the 3:2 of cameras."""
    Image.new("RGB", tuple(side // 10 for side in size)).save(folder / "long.png")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(2):
            SubjectData(folder, "mug").check()
        SubjectData(folder, "mug", crop="top").check()
    said = [str(w.message) for w in caught]
    assert len(said) == told and all(
        "more than a third of long.png" in s and "data.crop to top" in s for s in said
    )


def test_first_frame_of_an_animation(tmp_path):
    frames = [Image.new("RGB", (64, 64), c) for c in (GREEN, RED)]
    pixels = load(frames[0], tmp_path / "x.gif", save_all=True, append_images=frames[1:])
    assert near(pixels, GREEN)


def test_shrinking_does_not_alias(tmp_path):
    checks = (np.indices((256, 256)).sum(0) % 2 * 255).astype(np.uint8)
    assert np.abs(load(Image.fromarray(checks), tmp_path / "x.png", 32) - 127.5).max() < 4


def test_warns_of_small_photos_only(tmp_path):
    Image.new("RGB", (100, 31)).save(tmp_path / "x.png")
    with pytest.warns(UserWarning, match="x.png.*100 x 31.*blur"):
        load_photo(tmp_path / "x.png", 64)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load_photo(tmp_path / "x.png", 62)


# ------------------------------------------------------------------------------------ broken photos
def noise() -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8))


def write_bad(path: Path, kind: str) -> None:
    noise().save(path)
    whole = path.read_bytes()
    middle = len(whole) // 2
    content = {
        "truncated": whole[:middle],
        "stub": whole[:20],
        "empty": b"",
        "text": b"not an image",
        "damaged": (
            whole[:middle]
            + bytes(b ^ 255 for b in whole[middle : middle + 9])
            + whole[middle + 9 :]
        ),
    }
    path.write_bytes(content[kind])


BAD = [
    ("jpg", "truncated"),
    ("png", "truncated"),
    ("gif", "truncated"),
    ("tif", "truncated"),
    ("bmp", "truncated"),
    ("webp", "truncated"),
    ("jpg", "stub"),
    ("png", "stub"),
    ("webp", "stub"),
    ("jpg", "empty"),
    ("jpg", "text"),
    ("png", "damaged"),
]


@pytest.mark.parametrize("ending, kind", BAD)
def test_bad_files_are_named(tmp_path, ending, kind):
    path = tmp_path / f"x.{ending}"
    write_bad(path, kind)
    with pytest.raises(
        InputError, match=f"^{re.escape(str(path))} .*replace or remove it"
    ) as caught:
        load_photo(path, 32)
    assert "\n" not in str(caught.value) and (kind != "empty" or "empty" in str(caught.value))
    with pytest.raises(InputError, match=re.escape(str(path))):
        SubjectData(tmp_path, "mug").check()


def test_missing_file_and_bomb_are_named(tmp_path, monkeypatch):
    with pytest.raises(InputError, match="gone.png"):
        load_photo(tmp_path / "gone.png", 32)
    noise().save(tmp_path / "bomb.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    with pytest.raises(InputError, match="bomb.png.*smaller copy or remove"):
        load_photo(tmp_path / "bomb.png", 32)


# ------------------------------------------------------------------------------------------- pixels
def test_round_trip_is_exact():
    levels = np.arange(256, dtype=np.uint8).repeat(3).reshape(1, 16, 16, 3)
    images = [Image.fromarray(levels[0]), noise().resize((16, 16))]
    pixels = to_pixels(images)
    assert (
        pixels.shape == (2, 3, 16, 16)
        and pixels.dtype == torch.float32
        and pixels.min() == -1
        and pixels.max() == 1
    )
    assert all(np.array_equal(a, b) for a, b in zip(images, to_images(pixels), strict=True))


def test_images_are_clamped_and_rounded():
    values = torch.tensor([-9.0, -1 + 0.6 / 127.5, 9.0]).view(1, 3, 1, 1)
    assert to_images(values.double().requires_grad_())[0].getpixel((0, 0)) == (0, 1, 255)


# -------------------------------------------------------------------------------------------- draws
def same(a: dict, b: dict) -> bool:
    def plain(value):
        return value.tolist() if isinstance(value, torch.Tensor) else value

    return a.keys() == b.keys() and all(plain(a[k]) == plain(b[k]) for k in a)


def test_a_draw_has_photos_then_priors():
    draw = next(iter(Draws(5, 7, 3, False, seed=0)))
    assert draw["prior"].tolist() == [False] * 3 + [True] * 3 and draw["draw"] == 0
    assert (
        draw["index"].dtype == torch.long
        and draw["flipped"].dtype == torch.bool
        and draw["index"].shape == draw["flipped"].shape == (6,)
    )
    alone = next(iter(Draws(5, 0, 3, False, seed=0)))
    assert alone["prior"].tolist() == [False] * 3 and torch.equal(alone["index"], draw["index"][:3])


def test_start_continues_the_stream():
    whole = list(islice(Draws(5, 7, 3, True, seed=4, rank=1, world_size=2), 30))
    later = list(islice(Draws(5, 7, 3, True, seed=4, rank=1, world_size=2, start=lambda: 11), 19))
    assert all(same(a, b) for a, b in zip(whole[11:], later, strict=True))
    other = list(islice(Draws(5, 7, 3, True, seed=5, rank=1, world_size=2), 30))
    assert not all(same(a, b) for a, b in zip(whole, other))


@pytest.mark.parametrize("batch_size", [1, 2, 4])
def test_ranks_share_one_stream_of_permutations(batch_size):
    world = 3
    ranks = [
        list(islice(Draws(5, 4, batch_size, False, 0, rank, world), 20)) for rank in range(world)
    ]
    common = list(
        islice(Draws(5, 4, batch_size * world, False, 0), 20)
    )  # one process with the whole batch
    for prior, n in ((False, 5), (True, 4)):
        stream = [
            i
            for step in zip(*ranks)
            for draw in step
            for i in draw["index"][draw["prior"] == prior].tolist()
        ]
        assert stream == [
            i for draw in common for i in draw["index"][draw["prior"] == prior].tolist()
        ]  # no position twice, none left out
        turns = [stream[k : k + n] for k in range(0, len(stream) - n + 1, n)]
        assert all(Counter(turn) == Counter(range(n)) for turn in turns)
        assert len(set(map(tuple, turns))) > 1  # a new order each pass


def test_flip():
    never, half = (
        torch.cat([d["flipped"] for d in islice(Draws(4, 3, 5, flip, 0), 100)])
        for flip in (False, True)
    )
    assert not never.any() and 0.4 < half.float().mean() < 0.6


# ------------------------------------------------------------------------------------------- module
def test_prompts(folder):
    data = SubjectData(folder, "mug", identifier="zwx")
    assert (data.instance_prompt, data.class_prompt) == ("a zwx mug", "a mug")
    data = SubjectData(folder, "mug", prompt="a photo of sks mug", class_prompt="one {class_noun}")
    data.check()
    assert (data.instance_prompt, data.class_prompt) == ("a photo of sks mug", "one mug")


@pytest.mark.parametrize(
    "settings, say",
    [
        (dict(class_noun=" "), "class_noun"),
        (dict(class_noun="a\nb"), "class_noun"),
        (dict(identifier=""), "identifier"),
        (dict(batch_size=0), "batch_size"),
        (dict(crop="middle"), "crop.*top"),
        (dict(num_class_images=-1), "num_class_images"),
        (dict(num_class_images=2), "class_images_dir"),
        (dict(class_images_dir=Path(__file__)), "class_images_dir"),
        (dict(prompt="a {idenifier} mug"), "prompt.*placeholder"),
        (dict(prompt="a {} mug"), "prompt.*placeholder"),
        (dict(prompt="a {mug"), "placeholder"),
        (dict(prompt="a {class_noun}"), "name the subject"),
        (dict(class_prompt="a {identifier}"), "class_prompt.*placeholder"),
        (dict(instance_dir=Path("gone")), "gone"),
    ],
)
def test_check_names_the_setting(folder, settings, say):
    data = SubjectData(**(dict(instance_dir=folder, class_noun="mug") | settings))
    with pytest.raises(InputError, match=say):
        data.prepare_data()


def test_pixels_of_photos_and_priors(folder):
    data = SubjectData(folder, "mug", class_images_dir=folder, num_class_images=2)
    (photos,), (priors,) = data.instance_pixels(32), data.prior_pixels(32)
    assert torch.equal(photos, to_pixels([load_photo(p, 32) for p in data.photos])) and torch.equal(
        priors, photos[:2]
    )
    assert list(SubjectData(folder, "mug").prior_pixels(32)) == []
    with pytest.raises(InputError, match="holds 3 images: add 6"):
        SubjectData(folder, "mug", class_images_dir=folder, num_class_images=9).prior_pixels(32)
    for i in range(4):
        Image.new("RGB", (64, 64)).save(folder / f"more-{i}.png")
    assert [len(batch) for batch in SubjectData(folder, "mug").instance_pixels(32)] == [4, 3]


class Listener(L.LightningModule):
    """Trains one number and keeps the draws it was given."""

    def __init__(self):
        super().__init__()
        self.weight, self.seen = nn.Parameter(torch.zeros(1)), []

    def training_step(self, batch, _):
        self.seen.append(batch)
        return (self.weight * batch["index"].float().mean()).sum()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


@pytest.mark.parametrize("accumulate", [1, 3])
def test_a_resumed_run_goes_on_with_the_next_draw(folder, tmp_path, accumulate):
    def fit(steps: int, resume: Path | None = None) -> tuple[L.Trainer, list[dict]]:
        quiet = dict(
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            accelerator="cpu",
        )
        trainer = L.Trainer(max_steps=steps, accumulate_grad_batches=accumulate, **quiet)
        model = Listener()
        trainer.fit(model, SubjectData(folder, "mug", batch_size=2, flip=True), ckpt_path=resume)
        return trainer, model.seen

    _, whole = fit(7)
    first, before = fit(4)
    first.save_checkpoint(tmp_path / "x.ckpt")
    _, after = fit(7, tmp_path / "x.ckpt")
    assert [b["draw"] for b in whole] == list(range(7 * accumulate))
    assert all(same(a, b) for a, b in zip(whole, before + after, strict=True))


@pytest.mark.skipif(not REAL.exists(), reason="the DreamBooth photos are not here")
def test_real_photos():
    for subject in sorted(p for p in REAL.iterdir() if p.is_dir())[::10]:
        data = SubjectData(subject, subject.name)
        data.check()
        pixels = torch.cat(list(data.instance_pixels(64)))
        assert 3 <= len(pixels) <= 6 and pixels.std((1, 2, 3)).min() > 0.05
