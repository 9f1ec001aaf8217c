"""Metrics against numpy, in any split and over processes; evaluators in their real layouts;
protocols, intervals, copies.
"""

import json
import warnings
from dataclasses import replace
from pathlib import Path
from random import Random

import numpy as np
import pytest
import torch
import torch.multiprocessing as mp
import torch.nn.functional as F
from conftest import REAL_PHOTOS
from PIL import Image

from dreamblend.attention import collapse
from dreamblend.errors import InputError
from dreamblend.evaluation import protocols
from dreamblend.evaluation.encoders import SandboxPrompt, prompt_encoder, subject_encoder
from dreamblend.evaluation.metrics import (
    Collapse,
    Copying,
    Diversity,
    PriorPreservation,
    PromptFidelity,
    SubjectFidelity,
)
from dreamblend.evaluation.preprocess import IMAGENET, Preprocess
from dreamblend.evaluation.scores import Scores, score, table
from dreamblend.models import SANDBOX
from dreamblend.sandbox import world
from dreamblend.storage.blend_folder import Result
from dreamblend.storage.photos import list_photos, open_photo, to_pixels

N, PROMPTS, DIM = 23, 4, 8
TOLERANCE = dict(rtol=0, atol=1e-5)


def unit(*shape, seed=0):
    return F.normalize(torch.randn(*shape, generator=torch.Generator().manual_seed(seed)), dim=-1)


def given():
    """Vectors, prompts, agreements (one unknown) and measures of N images, and a subject's
    photos.
    """
    rng = torch.Generator().manual_seed(5)
    return dict(
        photos=unit(5, DIM, seed=1),
        features=unit(N, DIM, seed=2),
        index=torch.arange(N),
        prompt=torch.arange(N) % 3,  # prompt 3 has no image
        agreement=torch.cat([torch.rand(N - 1, generator=rng) - 0.3, torch.tensor([torch.nan])]),
        measured={name: torch.rand(N, generator=rng) for name in collapse.MEASURES},
    )


def make_metrics(photos):
    return {
        "all": SubjectFidelity(photos),
        "one": SubjectFidelity(photos, "one-to-one", 100.0),
        "prior": PriorPreservation(photos),
        "copies": Copying(photos),
        "prompt": PromptFidelity(),
        "clipscore": PromptFidelity(2.5, 0.0),
        "perceptual": Diversity(PROMPTS, DIM),
        "cosine": Diversity(PROMPTS, DIM, 0.5),
        "collapse": Collapse(),
    }


def feed(metrics, g, part):
    f, index = g["features"][part], g["index"][part]
    for name in ("all", "one", "prior"):
        metrics[name].update(f, index)
    metrics["copies"].update(f)
    for name in ("prompt", "clipscore"):
        metrics[name].update(g["agreement"][part])
    for name in ("perceptual", "cosine"):
        metrics[name].update(f, g["prompt"][part])
    metrics["collapse"].update({name: v[part] for name, v in g["measured"].items()})


def values(metrics):
    found = {name: m.compute() for name, m in metrics.items()}
    found |= found.pop("collapse")
    return {name: float(v) for name, v in found.items()}


def numpy_values(g):
    """Straight from the definitions: every pair by itself."""
    f, photos, a = (g[k].double().numpy() for k in ("features", "photos", "agreement"))
    cosine = np.array([[np.dot(u, v) for v in photos] for u in f])
    between = [np.dot(u, v) for i, u in enumerate(photos) for v in photos[:i]]
    squared, cosines = [], []
    for p in range(PROMPTS):
        own = f[g["prompt"].numpy() == p]
        pairs = [(own[i], own[j]) for i in range(len(own)) for j in range(i)]
        if pairs:
            squared.append(np.mean([((u - v) ** 2).sum() for u, v in pairs]))
            cosines.append(np.mean([1 - np.dot(u, v) for u, v in pairs]))
    return {
        "all": cosine.mean(),
        "one": 100 * np.mean([cosine[i, i % len(photos)] for i in range(N)]),
        "prior": cosine.mean(),
        "copies": np.mean(cosine.max(1) > max(between)),
        "prompt": np.nanmean(a),
        "clipscore": np.mean(2.5 * np.maximum(a[:-1], 0)),
        "perceptual": np.mean(squared),
        "cosine": np.mean(cosines),
        **{name: v.double().mean().item() for name, v in g["measured"].items()},
    }


def assert_same(found, wanted):
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        assert found[name] == pytest.approx(value, abs=1e-5), name


# ------------------------------------------------------------------------------------------ metrics
@pytest.mark.parametrize("cuts", [[N], [1] * N, [2, 13, 8], [22, 1]])
def test_metrics_agree_with_numpy_in_any_split(cuts):
    g = given()
    metrics = make_metrics(g["photos"])
    order = torch.randperm(N, generator=torch.Generator().manual_seed(len(cuts)))
    for part in order.split(cuts):
        feed(metrics, g, part)
    assert_same(values(metrics), numpy_values(g))


def _process(rank, store, out):
    """Rank 0 has 17 of 23 images, rank 1 six."""
    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{store}", rank=rank, world_size=2
    )
    g = given()
    metrics = make_metrics(g["photos"])
    for part in torch.arange(N).split([9, 8, 4, 2])[2 * rank : 2 * rank + 2]:
        feed(metrics, g, part)
    Path(f"{out}-{rank}").write_text(json.dumps(values(metrics)))
    torch.distributed.destroy_process_group()


@pytest.mark.heavy
def test_two_processes_with_unequal_shares_give_the_values_of_one(tmp_path):
    mp.spawn(_process, (tmp_path / "store", tmp_path / "out"), nprocs=2)
    for rank in range(2):
        assert_same(json.loads((tmp_path / f"out-{rank}").read_text()), numpy_values(given()))


def test_identical_images_score_one_and_have_no_diversity():
    one = unit(1, 384)
    many = one.expand(50, -1)
    fidelity, diversity = SubjectFidelity(one), Diversity(1, 384, 0.5)
    fidelity.update(many)
    diversity.update(many, torch.zeros(50, dtype=torch.int64))
    assert fidelity.compute().item() == pytest.approx(1, abs=1e-6)
    assert 0 <= diversity.compute().item() < 1e-12


def test_nothing_to_judge_is_no_number():
    prompt, diversity, measures = PromptFidelity(), Diversity(2, 3), Collapse()
    prompt.update(torch.tensor([torch.nan]))
    diversity.update(unit(2, 3), torch.tensor([0, 1]))  # one image a prompt
    measures.update(
        {
            name: torch.tensor([0.5 if name == "entropy" else torch.nan])
            for name in collapse.MEASURES
        }
    )
    assert prompt.compute().isnan() and diversity.compute().isnan()
    assert [name for name, v in measures.compute().items() if not v.isnan()] == ["entropy"]


def test_metrics_start_afresh_and_keep_no_images():
    g = given()
    metrics = make_metrics(g["photos"])
    feed(metrics, g, slice(None))

    def size():
        return sum(v.numel() for m in metrics.values() for v in m.metric_state.values())

    before, wanted = size(), values(metrics)
    feed(metrics, g, slice(None))
    assert size() == before
    for m in metrics.values():
        m.reset()
    feed(metrics, g, slice(None))
    assert_same(values(metrics), wanted)


def test_wrong_inputs_are_told():
    with pytest.raises(InputError, match="all-pairs or one-to-one"):
        SubjectFidelity(unit(2, 3), "some-pairs")
    with pytest.raises(InputError, match="at least one photo"):
        SubjectFidelity(torch.empty(0, 3))
    with pytest.raises(InputError, match="index"):
        SubjectFidelity(unit(2, 3), "one-to-one").update(unit(2, 3))
    for photos in (unit(1, 3), unit(1, 3).expand(4, -1)):
        with pytest.raises(InputError, match="two different photos"):
            Copying(photos)


# ----------------------------------------------------------------------------------- on the sandbox
def renders(look, seed, count=8, **where):
    rng = Random(seed)
    scenes = [
        world.Scene(
            (world.pose(rng, look, **where),), rng.choice(world.PLACES), rng.getrandbits(32)
        )
        for _ in range(count)
    ]
    return to_pixels([world.render(scene)[0] for scene in scenes])


@pytest.fixture(scope="module")
def judge(mug_photos):
    return Scores(mug_photos, "sks")


def test_real_above_tuned_above_base(judge):
    look = world.SUBJECTS["teal_mug"]
    real, tuned = (
        renders(look, 1),
        renders(replace(look, pattern="plain", pitch=0.3), 1),
    )  # "tuned": its colours without its pattern
    rng = Random(2)
    base = torch.cat([renders(world.random_look(rng, "mug"), i, 1) for i in range(16)])

    def mean(pixels):
        return np.mean(judge.subject(pixels))

    assert mean(real) > mean(tuned) + 0.05 > mean(base) + 0.1
    prior = PriorPreservation(judge.photos)
    prior.update(judge.subject_judge.images(base))
    assert prior.compute().item() == pytest.approx(mean(base), abs=1e-5)


def test_the_parts_of_the_thing_that_is_named_first_are_looked_for(judge, mug_photos):
    look = world.SUBJECTS["teal_mug"]
    whole = renders(look, 5)
    broken = renders(replace(look, lacks=frozenset(world.STANDING_OUT["mug"])), 5)
    prompt = "A sks mug, next to a robot"
    there, lost = (np.array(judge.each(p, prompt)["parts"]) for p in (whole, broken))
    assert there.min() > 0.9 and lost.max() < 0.1
    direct = judge.parts_judge.judge.parts(whole, "mug").mean(1)
    np.testing.assert_allclose(there, direct.numpy(), **TOLERANCE)
    assert judge.each(whole, "a sks teacup")["parts"] == [None] * len(whole)
    other = replace(protocols.find("sandbox"), parts=None)
    assert Scores(mug_photos, "sks", other).each(whole, prompt)["parts"] == [None] * len(whole)


def test_diversity_is_the_mean_of_pairwise_perceptual_distances(judge):
    pixels = renders(world.SUBJECTS["teal_mug"], 3, 5)
    levels = [f.double().numpy() for f in judge.prompt_judge.judge.perceptual_features(pixels)]
    pairs = [
        sum(((f[i] - f[j]) ** 2).sum(0).mean() for f in levels) for i in range(5) for j in range(i)
    ]
    assert judge.diversity(pixels) == pytest.approx(np.mean(pairs), abs=1e-5)
    assert judge.diversity(pixels[:1]) is None


def test_prompt_fidelity_is_told_without_the_identifier(judge):
    pixels = to_pixels(
        [
            world.render(
                world.Scene((world.pose(Random(i), world.SUBJECTS["teal_mug"]),), "in the snow", i)
            )[0]
            for i in range(4)
        ]
    )
    snow, beach = (
        np.mean(judge.prompt_fidelity(pixels, f"a sks mug {place}"))
        for place in ("in the snow", "on the beach")
    )
    assert snow > 0.8 > 0.2 > beach
    assert judge.prompt_fidelity(pixels, "a sks mug") == [None] * 4
    own = judge.prompt_judge.judge
    direct = own.agreement(own.embed_images(pixels), "a mug in the snow")
    np.testing.assert_allclose(
        judge.prompt_fidelity(pixels, "a sks mug in the snow"), direct.numpy(), **TOLERANCE
    )


def test_a_copied_photo_is_flagged_and_another_real_photo_is_not(judge, mug_photos):
    copied = to_pixels([open_photo(p) for p in list_photos(mug_photos)])
    noisy = (
        copied + 0.02 * torch.randn(copied.shape, generator=torch.Generator().manual_seed(0))
    ).clamp(-1, 1)
    other = renders(world.SUBJECTS["teal_mug"], 4, height=(30, 36))

    def flagged(pixels):
        return (lambda m: (m.update(judge.subject_judge.images(pixels)), m.compute().item())[1])(
            Copying(judge.photos)
        )

    assert flagged(copied) == 1
    assert flagged(noisy) == 1
    assert flagged(other) == 0
    assert np.mean(judge.subject(copied)) > np.mean(
        judge.subject(other)
    )  # why it must be flagged: copying inflates subject fidelity


def test_scores_of_a_blends_folder(tmp_path, mug_photos, monkeypatch):
    rows, prompts = [], ["a sks mug in the snow", "a sks mug on the beach", "a sks mug"]
    for p, prompt in enumerate(prompts):
        for seed in range(3):
            for kind in ("late", "cag"):
                file = f"{p}-{seed}-{kind}.png"
                image = (
                    open_photo(list_photos(mug_photos)[seed])
                    if kind == "late"
                    else world.render(world.random_scene(Random(9 * p + seed)))[0]
                )
                image.save(tmp_path / file)
                measured = {"overlap": 0.25, "context_mass": None}
                rows.append(
                    Result(prompt=prompt, seed=seed, kind=kind, file=file, collapse=measured)
                )
    monkeypatch.setattr(
        "dreamblend.evaluation.scores.BATCH", 2
    )  # a prompt's images come in several batches
    scored, summary = score(tmp_path, rows, mug_photos, "sks")
    assert [(row["kind"], row["n"]) for row in summary] == [("cag", 9), ("late", 9)]
    assert all(
        row.scores["protocol"] == "sandbox"
        and (row.scores["prompt"] is None) == (row.prompt == "a sks mug")
        for row in scored
    )
    cag, late = summary
    assert late["copies"] == 1 and cag["copies"] == 0 and late["subject"] > cag["subject"]
    assert (late["overlap"], late["context_mass"]) == (0.25, None)
    judge = Scores(mug_photos, "sks")

    def of(prompt):
        return [
            open_photo(tmp_path / r.file) for r in rows if r.kind == "cag" and r.prompt == prompt
        ]

    pixels = {prompt: to_pixels(of(prompt)) for prompt in prompts}
    assert cag["diversity"] == pytest.approx(
        np.mean([judge.diversity(p) for p in pixels.values()]), abs=1e-5
    )
    assert cag["subject"] == pytest.approx(
        np.mean([judge.subject(p) for p in pixels.values()]), abs=1e-5
    )
    assert late["parts"] > 0.9 and late["parts"] == pytest.approx(
        np.mean([row.scores["parts"] for row in scored if row.kind == "late"]), abs=1e-5
    )
    assert cag["prompt"] == pytest.approx(
        np.mean([judge.prompt_fidelity(pixels[p], p) for p in prompts[:2]]), abs=1e-5
    )
    (
        json.dumps(summary, allow_nan=False),
        json.dumps([row.line() for row in scored], allow_nan=False),
    )
    assert "late" in table(summary)


# ------------------------------------------------------------------------------------- real layouts
def save_tiny_dino(folder: Path, **processor) -> Path:
    from transformers import ViTConfig, ViTModel

    torch.manual_seed(0)
    shape = dict(
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        image_size=32,
        patch_size=8,
    )
    ViTModel(ViTConfig(**shape), add_pooling_layer=False).save_pretrained(folder)
    said = {
        "do_resize": True,
        "size": 32,
        "resample": 2,
        "do_normalize": True,
        "image_mean": [0.5] * 3,
        "image_std": [0.5] * 3,
    } | processor
    (folder / "preprocessor_config.json").write_text(
        json.dumps({**said, "feature_extractor_type": "ViTFeatureExtractor"})
    )
    return folder


def save_tiny_clip(folder: Path) -> Path:
    from transformers import CLIPConfig, CLIPModel, CLIPTokenizer

    torch.manual_seed(1)
    tokenizer = CLIPTokenizer.from_pretrained(SANDBOX / "tokenizer")
    shape = dict(hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32)
    ends = dict(
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    CLIPModel(
        CLIPConfig(
            text_config=dict(
                **shape, **ends, vocab_size=len(tokenizer), max_position_embeddings=16
            ),
            vision_config=dict(**shape, image_size=32, patch_size=8),
            projection_dim=12,
        )
    ).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text(
        json.dumps(
            {
                "crop_size": 32,
                "do_center_crop": True,
                "do_normalize": True,
                "do_resize": True,
                "feature_extractor_type": "CLIPFeatureExtractor",
                "image_mean": [0.48145466, 0.4578275, 0.40821073],
                "image_std": [0.26862954, 0.26130258, 0.27577711],
                "resample": 3,
                "size": 32,
            }
        )
    )
    return folder


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    folder = tmp_path_factory.mktemp("evaluators")
    return str(save_tiny_dino(folder / "dino")), str(save_tiny_clip(folder / "clip"))


def smooth_photo(width, height, seed=0):
    noise = np.random.default_rng(seed).integers(0, 256, (8, 8, 3), np.uint8)
    return Image.fromarray(noise).resize((width, height), Image.Resampling.BICUBIC)


def test_dino_is_the_class_token_of_what_its_files_say(tiny):
    from transformers import ViTModel

    encoder, photo = subject_encoder(tiny[0]), smooth_photo(50, 40)
    assert encoder.preprocess == Preprocess(32, None, resample="bilinear")
    pixels = (
        torch.from_numpy(np.array(photo.resize((32, 32), Image.Resampling.BILINEAR))).permute(
            2, 0, 1
        )[None]
        / 127.5
        - 1
    )
    with torch.no_grad():
        token = (
            ViTModel.from_pretrained(tiny[0], add_pooling_layer=False)
            .eval()(pixel_values=pixels)
            .last_hidden_state[:, 0]
        )
    found = encoder.images(to_pixels([photo]))
    assert found.shape == (1, 16) and found.norm(dim=1).item() == pytest.approx(1, abs=1e-5)
    np.testing.assert_allclose(found, F.normalize(token, dim=-1), atol=0.01)  # PIL rounds to 8 bits


def test_clip_agrees_with_transformers_own_processor(tiny):
    from transformers import CLIPModel, CLIPProcessor, CLIPTokenizer
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    encoder, texts = prompt_encoder(tiny[1]), ["a mug on the beach", "a cat"]
    photos = [smooth_photo(50, 40), smooth_photo(64, 97, 1), smooth_photo(20, 33, 2)]
    processor = CLIPProcessor(
        CLIPImageProcessorPil.from_pretrained(tiny[1]), CLIPTokenizer.from_pretrained(tiny[1])
    )
    inputs = processor(
        images=photos, text=texts, padding=True, truncation=True, max_length=16, return_tensors="pt"
    )
    pixels = [to_pixels([p])[0] for p in photos]
    assert (
        encoder.preprocess(pixels) - inputs["pixel_values"]
    ).abs().max() < 0.03  # an 8-bit level is .015 after normalising
    with torch.no_grad():
        wanted = CLIPModel.from_pretrained(tiny[1]).eval()(**inputs)
    np.testing.assert_allclose(encoder.images(pixels), wanted.image_embeds, atol=0.01)
    np.testing.assert_allclose(encoder.texts(texts), wanted.text_embeds, **TOLERANCE)
    agreement = encoder.agreement(encoder.images(pixels), texts[0])
    np.testing.assert_allclose(agreement, wanted.image_embeds @ wanted.text_embeds[0], atol=0.01)
    assert encoder.texts([" ".join(["a mug"] * 40)]).shape == (1, 12)  # longer than its context


def test_preprocessing_crops_the_centre_and_is_read_where_it_is_said(tmp_path):
    image = torch.zeros(1, 3, 40, 80)
    image[..., 40:] = 1
    out = Preprocess(32, 16, (0.5,) * 3, (0.25,) * 3)(image)
    assert (
        out.shape == (1, 3, 16, 16) and out[..., :6].abs().max() < 0.2 and out[..., 10:].min() > 1.8
    )
    newer = save_tiny_dino(
        tmp_path / "newer",
        size={"shortest_edge": 36},
        crop_size={"height": 32, "width": 32},
        do_center_crop=True,
        resample=3,
    )
    assert subject_encoder(str(newer)).preprocess == Preprocess(36, 32)
    (newer / "preprocessor_config.json").unlink()
    assert subject_encoder(str(newer)).preprocess == Preprocess(32, 32, **IMAGENET)


def test_evaluators_that_cannot_be_loaded_are_told(tiny, tmp_path):
    with pytest.raises(
        InputError, match="cannot load the evaluator 'facebook/dino-vits61'.*HF_HUB_OFFLINE"
    ):
        subject_encoder("facebook/dino-vits61")
    with pytest.raises(InputError, match="cannot load the evaluator 'sandbx'"):
        prompt_encoder("sandbx")
    with pytest.raises(InputError, match="family vit, and here it must be clip"):
        prompt_encoder(tiny[0])
    with pytest.raises(InputError, match="family clip, and here it must be vit or dinov2"):
        subject_encoder(tiny[1])
    with pytest.raises(
        InputError, match="takes images of 32 pixels and its preprocessing makes 224"
    ):
        subject_encoder(tiny[0], protocols.DINO)
    pickled = save_tiny_dino(tmp_path / "pickled")
    (pickled / "model.safetensors").rename(pickled / "pytorch_model.bin")
    with pytest.raises(InputError, match="safetensors"):
        subject_encoder(str(pickled))


# ---------------------------------------------------------------------------------------- protocols
def test_protocols_store_every_setting():
    for name, protocol in protocols.PRESETS.items():
        assert (
            protocols.find(name) is protocol
            and json.loads(json.dumps(protocol.as_dict()))["name"] == name
        )
        assert protocol.text("a sks mug on the beach", "sks") == "a mug on the beach"
    assert replace(protocol, identifier=True).text("a sks mug", "sks") == "a sks mug"
    assert {p.diversity_name for p in protocols.PRESETS.values()} == {"diversity", "diversity_dino"}
    with pytest.raises(InputError, match="dreambench-plus"):
        protocols.find("dreambench++")


@pytest.mark.parametrize("name", ["dreambooth", "custom-diffusion", "dreambench-plus"])
def test_published_protocols_on_tiny_models(name, tiny, mug_photos, tmp_path):
    preset = replace(
        protocols.find(name),
        subject=tiny[0],
        prompt=tiny[1],
        subject_preprocess=None,
        prompt_preprocess=None,
    )
    judge = Scores(mug_photos, "sks", preset)
    photos = [open_photo(p) for p in list_photos(mug_photos)]
    pixels = to_pixels(photos)[:4]
    dino, clip = judge.subject_judge, judge.prompt_judge
    cosine = (dino.images(pixels) @ dino.images(to_pixels(photos)).T).numpy()
    text = (clip.images(pixels) @ clip.texts(["a mug on the beach"])[0]).numpy()
    subject = {"dreambench-plus": 100 * np.diag(cosine)}.get(name, cosine.mean(1))
    prompt = {"custom-diffusion": 2.5 * np.maximum(text, 0), "dreambench-plus": 100 * text}.get(
        name, text
    )
    np.testing.assert_allclose(judge.subject(pixels), subject, rtol=1e-5)
    np.testing.assert_allclose(
        judge.prompt_fidelity(pixels, "a sks mug on the beach"),
        prompt,
        atol=1e-5 * preset.prompt_scale,
    )
    each = judge.each(pixels, "a sks mug on the beach")
    near = (clip.images(pixels) @ clip.images(to_pixels(photos)).T).numpy()
    assert each["subject"] == judge.subject(pixels) and each[
        "prompt_fidelity"
    ] == judge.prompt_fidelity(pixels, "a sks mug on the beach")
    np.testing.assert_allclose(
        each["subject_clip"],
        100 * np.diag(near) if name == "dreambench-plus" else near.mean(1),
        rtol=1e-5,
    )
    assert judge.prior(pixels) == pytest.approx(
        preset.subject_scale * cosine.mean(), rel=1e-5
    )  # whatever the pairing
    own = dino.images(pixels).numpy()
    assert judge.diversity(pixels) == pytest.approx(
        np.mean([1 - own[i] @ own[j] for i in range(4) for j in range(i)]), abs=1e-5
    )
    for i, photo in enumerate(photos):
        photo.save(tmp_path / f"{i}.png")
    measured = {"overlap": 0.1, "context_mass": 0.2}
    rows = [
        Result(prompt="a mug", seed=i, kind="cag", file=f"{i}.png", collapse=measured)
        for i in range(5)
    ]
    scored, [summary] = score(tmp_path, rows, mug_photos, "sks", preset)
    assert summary["subject"] == pytest.approx(
        np.mean([row.scores["subject"] for row in scored]), rel=1e-5
    )
    assert {
        "diversity_dino",
        "copies",
        "subject_clip",
    } < summary.keys() and "diversity" not in summary
    if name == "dreambench-plus":
        assert summary["subject"] == pytest.approx(100, abs=1e-3)  # each is its own photo


@pytest.mark.skipif(not REAL_PHOTOS.is_dir(), reason="the DreamBooth photos are not here")
def test_real_photos_of_many_sizes_are_judged(tiny):
    preset = replace(
        protocols.find("dreambooth"),
        subject=tiny[0],
        prompt=tiny[1],
        subject_preprocess=None,
        prompt_preprocess=None,
    )
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        judge = Scores(REAL_PHOTOS / "rc_car", "sks", preset)
    metric = Copying(judge.photos)
    metric.update(
        judge.subject_judge.images(
            [to_pixels([open_photo(p)])[0] for p in list_photos(REAL_PHOTOS / "rc_car")]
        )
    )
    assert metric.compute() == 1


def test_perceptual_vectors_have_the_dimension_of_every_level():
    assert SandboxPrompt().perceptual(torch.zeros(2, 3, 128, 128)).shape == (
        2,
        48 * 32**2 + 96 * 16**2 + 160 * 8**2 + 224 * 4**2,
    )
