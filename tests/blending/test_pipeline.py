"""`DreamBlendPipeline` draws what `predict` draws, and is called as diffusers' pipelines are."""

from __future__ import annotations

import functools
import json
import subprocess
import sys
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

import diffusers
import numpy as np
import pytest
import torch
from families import CALL, FAMILIES, SMALL, save_family, small_bases
from safetensors.torch import save_file
from tiny_runs import fit

from dreamblend import DreamBlendPipeline
from dreamblend.blending.blends import CAG, Early, Late, Region
from dreamblend.blending.module import Blender
from dreamblend.blending.pipeline import DreamBlendOutput
from dreamblend.errors import InputError
from dreamblend.models import load_backbone
from dreamblend.storage.photos import open_photo
from dreamblend.storage.runs import open_run
from dreamblend.tuning import Full, LoRA

PROMPTS = ["a sks mug on the beach", "a red sks mug in the snow"]
SUBJECT = {"identifier": "sks", "class_noun": "mug"}
FEW = (
    "stable_diffusion",
    "flux_dev",
)  # what differs is inside the families, which have tests of their own
EACH = [
    pytest.param(name, marks=[] if name in FEW else pytest.mark.heavy)
    for name in ("stable_diffusion", *FAMILIES)
]
QUIET = {"disable": True}
LATE, FEW_STEPS = {"blend": "late"}, {"num_inference_steps": 2}


def save_lora(base: Path, file: Path, seed: int) -> Path:
    """A random LoRA of a base, as diffusers saves it: a checkpoint made elsewhere."""
    model, tuning = load_backbone(str(base)), LoRA(rank=2)
    tuning.attach(model)
    ((_, weights),) = tuning.export(model).items()
    source = torch.Generator().manual_seed(seed)
    tensors = {
        name: 0.2 * torch.randn(value.shape, generator=source)
        for name, value in weights.tensors.items()
    }
    save_file(tensors, file, metadata=weights.metadata)
    return file


@pytest.fixture(scope="module")
def pair(tmp_path_factory, tiny_base):
    """Family -> its base, and an early and a late LoRA of it."""
    root = tmp_path_factory.mktemp("pairs")

    @functools.cache
    def made(name: str) -> tuple[Path, Path, Path]:
        base = tiny_base if name == "stable_diffusion" else save_family(name, root)
        loras = [save_lora(base, root / f"{name}-{seed}.safetensors", seed) for seed in (1, 2)]
        return base, *loras

    return made


def sized(name: str) -> AbstractContextManager:
    """Bases of a family are loaded with a small size of their own, as Stable Diffusion's is."""
    return nullcontext() if name == "stable_diffusion" else small_bases()


@pytest.fixture
def opened(pair):
    def opened(name: str = "stable_diffusion", **options) -> DreamBlendPipeline:
        base, early, late = pair(name)
        with sized(name):
            made = DreamBlendPipeline.from_pretrained(
                base, early=early, late=late, **{**SUBJECT, **options}
            )
        made.set_progress_bar_config(**QUIET)
        return made

    return opened


@pytest.fixture(scope="module")
def ours(pair):
    """One of Stable Diffusion. Not to be changed, but for its bars and its scheduler."""
    base, early, late = pair("stable_diffusion")
    made = DreamBlendPipeline.from_pretrained(base, early=early, late=late, **SUBJECT)
    made.set_progress_bar_config(**QUIET)
    return made


def seeded(*seeds: int) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(seed) for seed in seeds]


# ------------------------------------------------------------------------------------- as `predict`
@pytest.mark.parametrize("name", EACH)
def test_the_predict_loop_draws_the_same_to_the_bit(name, pair, opened):
    """Two prompts with two seeds: images, maps and measures of the blend and of each snapshot."""
    base, early, late = pair(name)
    with sized(name):
        blender = Blender(
            str(early),
            str(late),
            base=str(base),
            num_inference_steps=2,
            guidance_scale=3,
            **SUBJECT,
        )
        drawn = blender.predict_step([(prompt, seed) for prompt in PROMPTS for seed in (5, 6)])
    output = opened(name)(
        PROMPTS,
        num_images_per_prompt=2,
        num_inference_steps=2,
        guidance_scale=3,
        generator=seeded(5, 6, 5, 6),
        compare=True,
    )
    for kind, of_kind in (("early", output.early), ("region", output), ("late", output.late)):
        pictures = [picture for picture in drawn if picture.kind == kind]
        assert len(pictures) == len(of_kind.images) == 4
        for i, picture in enumerate(pictures):
            assert picture.image.tobytes() == of_kind.images[i].tobytes()
            assert picture.words == of_kind.words[i] and torch.equal(picture.maps, of_kind.maps[i])
            assert picture.collapse == of_kind.collapse[i]
    assert output.images[0].tobytes() != output.late.images[0].tobytes()


@pytest.mark.parametrize("name", EACH[1:] + [pytest.param(FEW[0], marks=pytest.mark.heavy)])
def test_one_over_a_pipeline_in_memory_draws_the_same_and_leaves_it_as_it_was(name, pair, opened):
    base, early, late = pair(name)
    pipe = diffusers.DiffusionPipeline.from_pretrained(base)
    pipe.set_progress_bar_config(**QUIET)
    size = 32 if name == "stable_diffusion" else SMALL
    call = {"height": size, "width": size, "output_type": "np", **FEW_STEPS}

    def own() -> np.ndarray:
        more = {"negative_prompt": " "} if name == "qwen_image" else CALL.get(name, {})
        return pipe(prompt=PROMPTS[0], generator=seeded(3)[0], **call, **more).images

    before = own()
    modules = pipe.components.values()
    over = DreamBlendPipeline.from_pipe(pipe, early=early, late=late, **SUBJECT)
    over.set_progress_bar_config(**QUIET)
    assert {id(m) for m in over.models.late.components().values()} <= {id(m) for m in modules}
    drawn = [p(PROMPTS[0], generator=seeded(3)[0], **call).images for p in (over, opened(name))]
    assert np.array_equal(*drawn) and not np.allclose(drawn[0], before, atol=0.01)
    assert np.allclose(own(), before, atol=1e-5)


# -------------------------------------------------------------------------- as diffusers' pipelines
@pytest.fixture(scope="module")
def theirs(pair):
    """diffusers' own pipeline with the late LoRA in it."""
    base, _, late = pair("stable_diffusion")
    pipe = diffusers.StableDiffusionPipeline.from_pretrained(base, safety_checker=None)
    pipe.load_lora_weights(late.parent, weight_name=late.name)
    pipe.set_progress_bar_config(**QUIET)
    return pipe


def near(one: object, other: object) -> bool:
    return np.allclose(np.asarray(one, float), np.asarray(other, float), atol=1e-4)


@pytest.mark.parametrize("scheduler", ["DDIMScheduler", "EulerAncestralDiscreteScheduler"])
@pytest.mark.parametrize(
    "several",
    [pytest.param(False, marks=pytest.mark.heavy), True],
    ids=["one generator", "one for each"],
)
def test_the_late_snapshot_alone_is_what_diffusers_draws(scheduler, several, ours, theirs):
    """With every argument that they share; the second scheduler adds noise at its steps."""
    plain = theirs.scheduler
    ours.scheduler = theirs.scheduler = getattr(diffusers, scheduler).from_config(plain.config)
    call = dict(height=32, width=40, num_inference_steps=3, guidance_scale=5, output_type="np")
    drawn = [
        pipe(
            PROMPTS,
            num_images_per_prompt=2,
            generator=seeded(1, 2, 3, 4) if several else seeded(1)[0],
            **call,
            **more,
        ).images
        for pipe, more in ((theirs, {}), (ours, {"blend": "late"}))
    ]
    ours.scheduler = theirs.scheduler = plain
    assert drawn[0].shape == (4, 32, 40, 3) and near(*drawn)


def test_each_type_of_output_is_diffusers_and_latents_may_be_given(ours, theirs):
    latents = torch.randn(1, 4, 8, 8, generator=seeded(4)[0])
    for kind in ("np", "pt", "latent", "pil"):
        call = dict(latents=latents, num_inference_steps=2, output_type=kind, guidance_scale=4)
        wanted, made = (p(PROMPTS[0], **call, **m).images for p, m in ((theirs, {}), (ours, LATE)))
        assert type(wanted) is type(made)
        if kind == "pil":
            assert np.abs(np.asarray(wanted[0], int) - np.asarray(made[0], int)).max() <= 1
        else:
            assert wanted.shape == made.shape and near(wanted, made)
    images, nothing = ours(PROMPTS[0], num_inference_steps=1, return_dict=False)
    assert images[0].size == (32, 32) and nothing is None


def test_a_callback_sees_each_step_and_changes_the_latents_as_in_diffusers(ours, theirs):
    def callback(pipe, step, t, kwargs):
        seen[-1].append((step, int(t), kwargs["latents"].shape))
        return {"latents": kwargs["latents"] * 0.9}

    seen: list[list] = []
    drawn = []
    for pipe, more in ((theirs, {}), (ours, {"blend": "late", "compare": True})):
        seen.append([])
        call = dict(num_inference_steps=3, guidance_scale=4, output_type="np")
        drawn.append(
            pipe(
                PROMPTS[0],
                generator=seeded(0)[0],
                callback_on_step_end=callback,
                callback_on_step_end_tensor_inputs=["latents"],
                **call,
                **more,
            ).images
        )
    assert len(seen[0]) == 3 and seen[0] == seen[1]  # not of the early snapshot's own drawing
    assert near(*drawn)


@pytest.mark.parametrize("several", [pytest.param(False, marks=pytest.mark.heavy), True])
def test_a_negative_prompt_and_a_rescale_act_as_in_diffusers(several, ours, theirs):
    call = dict(num_inference_steps=2, guidance_scale=6, output_type="np", guidance_rescale=0.6)
    call["negative_prompt"] = ["blue", "green cubes"] if several else "blue"
    count = {"num_images_per_prompt": 2 if several else 1}
    prompts = PROMPTS if several else PROMPTS[0]
    drawn = [
        pipe(prompts, generator=seeded(1)[0], **call, **count, **more).images
        for pipe, more in ((theirs, {}), (ours, LATE))
    ]
    assert near(*drawn)


def test_prompts_may_come_encoded(ours, theirs):
    prompts = ["a red sks mug"] * 2
    states, _ = theirs.encode_prompt(prompts, "cpu", 1, False)
    call = dict(output_type="np", guidance_scale=4, prompt_embeds=states, **FEW_STEPS)
    wanted = theirs(generator=seeded(1)[0], **call).images
    assert near(wanted, ours(PROMPTS, generator=seeded(1)[0], **call, **LATE).images)
    with pytest.raises(InputError, match="no pooled_prompt_embeds: leave it out"):
        ours(PROMPTS, **call, pooled_prompt_embeds=states[:, 0])
    with pytest.raises(InputError, match=r"prompt_embeds are \(2, .*for these prompts \(1, "):
        ours(PROMPTS[0], **call)


@pytest.mark.parametrize("long", [False, True])
def test_prompts_may_come_encoded_alone_with_the_negative_ones(long, ours, theirs):
    """Of any length, as compel makes them of long prompts."""
    states, negative = theirs.encode_prompt(PROMPTS, "cpu", 1, True, ["blue", "green cubes"])
    if long:
        states, negative = (torch.cat([one, one.flip(0)], 1) for one in (states, negative))
    encoded = dict(prompt_embeds=states, negative_prompt_embeds=negative)
    call = dict(output_type="np", guidance_scale=4, num_images_per_prompt=2, **FEW_STEPS, **encoded)
    wanted = theirs(generator=seeded(1)[0], **call).images
    made = ours(generator=seeded(1)[0], **call, **LATE)
    assert near(wanted, made.images) and made.images.shape[0] == 4
    assert made.words == [[]] * 4 and made.collapse == [{}] * 4 and len(made.maps[0]) == 0
    mixed = ours(generator=seeded(1)[0], **call, blend="score").images
    assert np.isfinite(mixed).all() and not near(mixed, wanted)
    with pytest.raises(InputError, match="do not say which tokens name the subject, and region"):
        ours(**call)
    del call["negative_prompt_embeds"]
    if long:
        with pytest.raises(InputError, match="of 64 tokens.*give negative_prompt_embeds of their"):
            ours(**call, **LATE)
    else:
        with pytest.raises(InputError, match="clip_skip acts on prompts"):
            ours(**call, **LATE, clip_skip=1)


@pytest.mark.parametrize("blend", ["late", "region", "cag", "switch"])
def test_a_callback_interrupts_as_in_diffusers(blend, ours, theirs):
    def stop(pipe, step, t, kwargs):
        seen.append(step)
        pipe._interrupt = step == last
        return kwargs

    for last in (0, 1):
        seen: list[int] = []
        call = dict(num_inference_steps=4, output_type="latent", callback_on_step_end=stop)
        made = ours(PROMPTS[0], generator=seeded(1)[0], blend=blend, compare=True, **call)
        assert seen == list(range(last + 1)) and ours.interrupt
        if blend == "late":
            wanted = theirs(PROMPTS[0], generator=seeded(1)[0], guidance_scale=4, **call).images
            assert near(wanted, made.images)
        else:
            assert made.late is None
        assert made.images.isfinite().all() and len(made.maps[0]) == 3
    call["callback_on_step_end"] = None
    assert ours(PROMPTS[0], compare=True, blend=blend, **call).early is not None
    assert not ours.interrupt


# ------------------------------------------------------------------------- options of a drawing
def drawn_by(pipe, *more: dict, **call) -> np.ndarray:
    call = {"guidance_scale": 4, "output_type": "np", **FEW_STEPS, **call}
    for one in more:
        call |= one
    return pipe(PROMPTS[0], generator=seeded(1)[0], **call).images


def test_the_strength_of_a_lora_is_diffusers_own_and_of_one_call(ours, theirs):
    usual = drawn_by(ours, LATE)
    scaled = {"cross_attention_kwargs": {"scale": 0.4}}
    wanted = drawn_by(theirs, scaled)
    assert near(wanted, drawn_by(ours, LATE, scaled)) and not near(wanted, usual)
    early_off = {"attention_kwargs": {"scale": (0, 0.4)}}
    assert near(wanted, drawn_by(ours, LATE, early_off))
    theirs.disable_lora()
    bare = drawn_by(theirs)
    theirs.enable_lora()
    assert near(bare, drawn_by(ours, {"blend": "early"}, early_off))
    assert np.array_equal(usual, drawn_by(ours, LATE))


def test_clip_skip_is_diffusers_own_and_of_one_call(ours, theirs):
    # diffusers looks for the inner module that the encoder was in earlier versions of transformers
    vars(theirs.text_encoder).setdefault("text_model", theirs.text_encoder)
    usual, skipped = drawn_by(ours, LATE), {"clip_skip": 1}
    wanted = drawn_by(theirs, skipped)
    assert near(wanted, drawn_by(ours, LATE, skipped)) and not near(wanted, usual)
    assert np.array_equal(usual, drawn_by(ours, LATE))


def test_another_scheduler_and_autoencoder_are_set_as_in_diffusers(opened, theirs, tmp_path):
    ours = opened()
    usual = drawn_by(ours, LATE)
    plain, decoder = theirs.scheduler, theirs.vae
    karras = {"use_karras_sigmas": True}
    of_diffusers = diffusers.DPMSolverMultistepScheduler.from_config(plain.config, **karras)
    theirs.vae = type(decoder).from_config(decoder.config).eval()
    theirs.vae.save_pretrained(tmp_path)
    theirs.scheduler = of_diffusers
    wanted = drawn_by(theirs)
    for scheduler, vae in ((of_diffusers, theirs.vae), ("dpm++-2m-karras", tmp_path)):
        ours.scheduler, ours.vae = "euler", vae
        ours.scheduler = scheduler
        assert near(wanted, drawn_by(ours, LATE)) and not near(wanted, usual)
    theirs.scheduler, theirs.vae = plain, decoder
    with pytest.raises(InputError, match="'euler_a'.*euler-a"):
        ours.scheduler = "euler_a"
    with pytest.raises(InputError, match="vae has latents of 16 channels, and the base's have 4"):
        ours.vae = diffusers.AutoencoderKL(latent_channels=16)
    half = opened(torch_dtype=torch.bfloat16).to("cpu")
    half.vae = theirs.vae
    drawn_by(half, LATE)
    assert half.vae.dtype == torch.bfloat16 and theirs.vae is half.vae
    theirs.vae.float()
    ours.enable_model_cpu_offload(device="cpu")
    with pytest.raises(InputError, match="set it before enable_model_cpu_offload"):
        ours.vae = decoder


def test_a_reference_guides_as_in_predict(pair, ours, mug_photos):
    base, early, late = pair("stable_diffusion")
    photo, options = mug_photos / "0.png", {"num_inference_steps": 4, "guidance_scale": 4.0}
    blender = Blender(
        *(str(early), str(late)),
        **{"base": str(base), "blend": CAG(), "reference": photo, "compare": False},
        **(SUBJECT | options),
    )
    wanted = [picture.image for picture in blender.predict_step([(PROMPTS[0], 1)] * 4)]
    call = {"num_images_per_prompt": 4, "blend": "cag", **options}
    for reference in (str(photo), open_photo(photo)):
        made = ours(PROMPTS[0], reference=reference, generator=seeded(1, 1, 1, 1), **call).images
        assert [one.tobytes() for one in made] == [one.tobytes() for one in wanted]
    without = ours(PROMPTS[0], generator=seeded(1, 1, 1, 1), **call).images
    assert without[0].tobytes() != wanted[0].tobytes()


@pytest.mark.heavy
@pytest.mark.parametrize("name", ["sdxl", "flux_dev"])
def test_a_family_takes_the_embeddings_that_it_makes(name, opened):
    ours = opened(name)
    own = ours.models.late.encode_prompts(PROMPTS)
    embeds = {"prompt_embeds": own.states, "pooled_prompt_embeds": own.extras["pooled"]}
    drawn = [
        ours(PROMPTS, generator=seeded(1)[0], output_type="np", **FEW_STEPS, **more).images
        for more in (embeds, {}, {**embeds, "prompt_embeds": 0 * own.states})
    ]
    assert np.array_equal(*drawn[:2]) and not np.array_equal(*drawn[1:])
    alone = [
        ours(prompts, generator=seeded(1)[0], output_type="np", **FEW_STEPS, **LATE, **more).images
        for prompts, more in ((None, embeds), (PROMPTS, {}))
    ]
    assert np.array_equal(*alone)
    with pytest.raises(InputError, match="needs pooled_prompt_embeds beside"):
        ours(PROMPTS, prompt_embeds=own.states)


@pytest.mark.heavy
@pytest.mark.parametrize("name", ["sana", "pixart_sigma", "qwen_image", "z_image"])
def test_a_family_that_masks_padding_takes_what_its_pipeline_encodes(name, opened):
    """Alone, and beside their prompts; with negative ones of another length."""
    ours, negative = opened(name), "blue"
    pipe = ours.models.late.pipe

    def encoded(prompts: list[str], prefix: str = "") -> dict:
        if name == "z_image":
            states, _ = pipe.encode_prompt(list(prompts), "cpu", do_classifier_free_guidance=False)
            return {f"{prefix}prompt_embeds": states}
        if name == "qwen_image":
            states, mask = pipe.encode_prompt(list(prompts), device="cpu")
            return {f"{prefix}prompt_embeds": states, f"{prefix}prompt_embeds_mask": mask}
        more = {"complex_human_instruction": None} if name == "sana" else {}
        states, mask, *_ = pipe.encode_prompt(prompts, do_classifier_free_guidance=False, **more)
        return {f"{prefix}prompt_embeds": states, f"{prefix}prompt_attention_mask": mask}

    def drawn(*prompts, **more) -> np.ndarray:
        call = {"generator": seeded(1)[0], "output_type": "np", **FEW_STEPS, **LATE, **more}
        return ours(*prompts, **call).images

    embeds = encoded(PROMPTS)
    plain = drawn(PROMPTS, negative_prompt=negative)
    against = encoded([negative] * len(PROMPTS), "negative_")
    alone = drawn(**embeds, **against)
    assert near(drawn(PROMPTS, **embeds, **against), alone)
    # Sana's own prompts have an instruction before them, which its negative prompts have not
    assert near(plain, alone) != (name == "sana")
    if name == "z_image":
        with pytest.raises(InputError, match="no prompt_embeds_mask: leave it out"):
            drawn(**embeds, prompt_embeds_mask=torch.ones(2, 3))
        with pytest.raises(InputError, match="are a list for this base, of .tokens, "):
            drawn(prompt_embeds=[torch.ones(2, 3)])
    elif name == "qwen_image":
        with pytest.raises(InputError, match="no prompt_attention_mask: leave it out"):
            drawn(**embeds, prompt_attention_mask=torch.ones(2, 3))
    else:
        with pytest.raises(InputError, match="needs prompt_attention_mask beside prompt_embeds"):
            drawn(prompt_embeds=embeds["prompt_embeds"])
        with pytest.raises(InputError, match="the mask of prompt_embeds are"):
            drawn(**embeds | {"prompt_attention_mask": embeds["prompt_attention_mask"][:, :3]})


def test_bars_show_each_drawing_and_can_be_turned_off(ours, capsys):
    ours(PROMPTS[0], num_inference_steps=2)
    assert capsys.readouterr().err == ""
    ours.set_progress_bar_config()
    ours(PROMPTS[0], num_inference_steps=2, compare=True)
    said = capsys.readouterr().err
    assert all(f"{kind}: 100%" in said for kind in ("early", "region", "late"))
    ours(PROMPTS[0], num_inference_steps=4, blend=CAG(window=(0.0, 0.5)))
    said = capsys.readouterr().err
    ours.set_progress_bar_config(**QUIET)
    assert "early: 100%" in said and "2/2" in said and "cag: 100%" in said


def test_a_blend_is_named_or_given_with_its_settings(ours):

    def draw(blend) -> DreamBlendOutput:
        return ours(PROMPTS[0], generator=seeded(1)[0], blend=blend, output_type="pt", **FEW_STEPS)

    named, early, late = draw("region"), draw(Early()), draw(Late())
    assert torch.equal(named.images, draw(Region()).images)
    assert torch.equal(draw(Region(weight=0.0, asked=1.0)).images, early.images)
    cag = draw(CAG(strength=0.3))
    assert cag.distance[0] > 0 and named.distance == [None]
    assert not torch.equal(cag.images, late.images)
    assert named.words == [["sks", "mug", "beach"]] and named.maps[0].shape == (3, 4, 4)
    assert ours("a {subject}", **FEW_STEPS).words == [["sks", "mug"]]


@pytest.mark.parametrize(
    ("call", "says"),
    [
        ({"blend": "mix"}, "blend is 'mix': it is one of early, late, cag"),
        ({"output_type": "jpg"}, "output_type is 'jpg'"),
        ({"prompt": []}, "prompt is no text"),
        ({"num_inference_steps": 0}, "num_inference_steps is 0"),
        ({"num_images_per_prompt": 0}, "num_images_per_prompt is 0"),
        ({"generator": seeded(1, 2)}, "2 generators for 1 images"),
        ({"latents": torch.zeros(1, 16, 8)}, "latents are"),
        ({"latents": torch.zeros(1, 4, 8, 8), "height": 64}, "another size"),
        ({"height": 33}, "multiples of 8"),
        ({"negative_prompt": ["a", "b"]}, "2 negative prompts for 1 prompts"),
        ({"negative_prompt": "a", "guidance_scale": 1}, "negative_prompt acts on what guidance"),
        ({"guidance_rescale": 2.0}, "guidance_rescale is 2.0"),
        ({"callback_on_step_end_tensor_inputs": ["prompt_embeds"]}, "latents is all"),
        ({"prompt": None}, "prompt is no text.*or prompt_embeds"),
        ({"negative_prompt": "a", "negative_prompt_embeds": torch.zeros(1)}, "are both given"),
        ({"negative_prompt_embeds": torch.zeros(1, 7, 8)}, "negative_prompt_embeds are"),
        ({"prompt_embeds": [torch.zeros(7, 8)]}, "prompt_embeds are one tensor for this base"),
        ({"pooled_prompt_embeds": torch.zeros(1, 8)}, "is nothing without prompt_embeds"),
        ({"negative_prompt_embeds_mask": torch.zeros(1, 8)}, "nothing without negative_prompt_em"),
        ({"cross_attention_kwargs": {"gligen": 1}}, "scale.* is all that there is"),
        ({"cross_attention_kwargs": {"scale": "a"}}, "a number, or .early, late"),
        ({"clip_skip": 9}, "clip_skip is 9"),
        ({"reference": "photo.png"}, "reference guides CAG alone, and region is drawn"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_what_cannot_be_drawn_is_said_in_one_sentence(call, says, ours):
    with pytest.raises(InputError, match=says):
        ours(**{"prompt": PROMPTS[0], **call})


def test_inference_mode_is_refused_as_guidance_needs_gradients(ours):
    with torch.inference_mode(), pytest.raises(InputError, match=r"leave out torch.inference_mode"):
        ours(PROMPTS[0])


def test_pipelines_that_cannot_be_blended_over_are_refused(pair):
    base, early, late = pair("stable_diffusion")
    pipe = diffusers.StableDiffusionPipeline.from_pretrained(base, safety_checker=None)
    with pytest.raises(InputError, match="is a DDPMPipeline: the families that can be loaded are"):
        DreamBlendPipeline.from_pipe(
            diffusers.DDPMPipeline(pipe.unet, pipe.scheduler), early=early, late=late, **SUBJECT
        )
    pipe.load_lora_weights(early.parent, weight_name=early.name)
    with pytest.raises(InputError, match="LoRA adapters of its own.*unload_lora_weights"):
        DreamBlendPipeline.from_pipe(pipe, early=early, late=late, **SUBJECT)
    with pytest.raises(InputError, match="do not say their identifier: .* identifier="):
        DreamBlendPipeline.from_pretrained(base, early=early, late=late)


# -------------------------------------------------------------------------------- where it computes
def test_it_moves_casts_and_takes_turns(opened):
    ours = opened()
    exact = ours(PROMPTS[0], generator=seeded(1)[0], output_type="np", **FEW_STEPS).images
    assert ours.device.type == "cpu" and ours.dtype == torch.float32
    ours.enable_model_cpu_offload(device="cpu")
    offloaded = ours(PROMPTS[0], generator=seeded(1)[0], output_type="np", **FEW_STEPS).images
    assert np.array_equal(offloaded, exact) and ours.device.type == "cpu"
    half = opened(torch_dtype=torch.bfloat16)
    rounded = half(PROMPTS[0], generator=seeded(1)[0], output_type="np", **FEW_STEPS).images
    assert half.dtype == torch.bfloat16 and np.abs(rounded - exact).max() < 0.1
    assert not np.array_equal(rounded, exact)
    assert half.to("cpu", torch.float32).dtype == torch.float32
    assert half.to(torch.bfloat16).dtype == torch.bfloat16


# --------------------------------------------------------------------------------- saved and opened
def test_what_is_saved_is_opened_and_draws_the_same(pair, ours, tmp_path):
    folder = tmp_path / "saved"
    wanted = ours(PROMPTS[0], generator=seeded(1)[0], output_type="np", **FEW_STEPS).images
    ours.save_pretrained(folder)
    base, early, late = pair("stable_diffusion")
    pipe = diffusers.StableDiffusionPipeline.from_pretrained(base, safety_checker=None)
    over = DreamBlendPipeline.from_pipe(pipe, early=early, late=late, **SUBJECT)
    over.save_pretrained(tmp_path / "over")
    for saved in (folder, tmp_path / "over"):
        moved = saved.rename(tmp_path / f"moved-{saved.name}")
        again = DreamBlendPipeline.from_pretrained(moved)
        again.set_progress_bar_config(**QUIET)
        drawn = again(
            "a {subject} on the beach", generator=seeded(1)[0], output_type="np", **FEW_STEPS
        )
        assert np.array_equal(drawn.images, wanted)
        plain = diffusers.DiffusionPipeline.from_pretrained(moved / "base", safety_checker=None)
        for name, value in pipe.unet.state_dict().items():  # in which adapters lie by now
            if "lora_" not in name:
                assert torch.equal(plain.unet.state_dict()[name.replace(".base_layer", "")], value)
    with pytest.raises(InputError, match="exists already: name another folder"):
        ours.save_pretrained(tmp_path / "moved-saved")
    with pytest.raises(InputError, match="holds both snapshots: leave out early and late"):
        DreamBlendPipeline.from_pretrained(tmp_path / "moved-saved", early=early, late=late)
    with pytest.raises(InputError, match="a blend takes two snapshots"):
        DreamBlendPipeline.from_pretrained(base, early=early)
    record = tmp_path / "moved-saved" / "dreamblend.json"
    record.write_text(record.read_text().replace('"early', '"../early'))
    with pytest.raises(InputError, match="damaged .*: save the pair again"):
        DreamBlendPipeline.from_pretrained(tmp_path / "moved-saved")


@pytest.mark.heavy
def test_the_snapshots_of_a_run_are_saved_too_and_a_cast_base_is_not(
    tiny_base, mug_photos, tmp_path
):
    fit(tiny_base, mug_photos, tmp_path / "run", Full(), steps=[1, 3])
    run = {"run": tmp_path / "run", "early": 1, "late": 3}
    ours = DreamBlendPipeline.from_pretrained(**run)
    ours.save_pretrained(tmp_path / "saved")
    again = DreamBlendPipeline.from_pretrained(tmp_path / "saved")
    call = {"output_type": "np", "blend": "cag", **FEW_STEPS}
    drawn = [p(PROMPTS[0], generator=seeded(1)[0], **call).images for p in (ours, again)]
    assert np.array_equal(*drawn)
    pipe = diffusers.StableDiffusionPipeline.from_pretrained(
        tiny_base, safety_checker=None, torch_dtype=torch.float16
    )
    with pytest.warns(UserWarning, match="in float16, so that nothing shows whether"):
        over = DreamBlendPipeline.from_pipe(pipe, **run)
    with pytest.raises(InputError, match="weights were cast.*load it in fp32 to save it"):
        over.save_pretrained(tmp_path / "cast")
    other = diffusers.StableDiffusionPipeline.from_pretrained(tiny_base, safety_checker=None)
    torch.nn.init.zeros_(other.unet.conv_in.weight)
    with pytest.raises(InputError, match="has other weights"):
        DreamBlendPipeline.from_pipe(other, **run)


def test_importing_the_package_imports_nothing_large():
    asked = "import sys, dreamblend; sys.exit('torch' in sys.modules or 'diffusers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", asked]).returncode == 0


def test_a_run_gives_its_picked_pair(tiny_base, mug_photos, tmp_path):
    run = tmp_path / "run"
    fit(tiny_base, mug_photos, run, steps=[1, 2, 3])
    with pytest.raises(InputError, match=f"no picked pair.*select --run {run}"):
        DreamBlendPipeline.from_pretrained(run=run)
    weights = {str(step): snapshot.weights for step, snapshot in open_run(run).snapshots.items()}
    record = {"early": 1, "late": 3, "weights": weights, "about": {"guidance_scale": 7.5}}
    (run / "pair.json").write_text(json.dumps(record))
    pair = DreamBlendPipeline.from_pretrained(run=run).pair
    assert (pair.early.about.step, pair.late.about.step) == (1, 3)
    with pytest.raises(InputError, match="name early and late"):
        DreamBlendPipeline.from_pretrained(run=run, early=1)
    (run / "pair.json").write_text(json.dumps({**record, "weights": {"1": "-"}}))
    with pytest.raises(InputError, match="no picked pair of the snapshots that it has now"):
        DreamBlendPipeline.from_pretrained(run=run)
