"""Textual Inversion, Custom Diffusion and T-LoRA: what moves, what a snapshot holds and who reads
it, views side by side, the masks, the recipes.
"""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from lightning.pytorch.callbacks import EMAWeightAveraging, ModelCheckpoint
from safetensors.torch import load_file, save_file
from tiny_runs import (
    PROMPTS,
    command,
    contents,
    fit,
    plain_pipeline,
    plain_predict,
    predict,
    probe,
    step,
)

from dreamblend.blending.blends import CAG, Merge
from dreamblend.blending.models import Models
from dreamblend.blending.module import Blender
from dreamblend.blending.pair import Pair
from dreamblend.errors import InputError
from dreamblend.models import load_backbone
from dreamblend.models.adapters import overlay
from dreamblend.storage import snapshots
from dreamblend.storage.foreign import CUSTOM, LORA, WORD
from dreamblend.tuning import CustomDiffusion, LoRA, TextualInversion, TLoRA, restore
from dreamblend.tuning.t_lora import active_ranks
from train import main

MIDDLE = "mid_block.attentions.0.transformer_blocks.0.attn2"
ROOT = Path(__file__).resolve().parents[2]
METHODS = {
    "word": lambda: TextualInversion(),
    "words": lambda: TextualInversion(vectors=3),
    "custom": lambda: CustomDiffusion(),
    "t-lora": lambda: TLoRA(rank=4, min_rank=1),
}
EXACT = dict(rtol=0, atol=2e-6)


def parts(backbone) -> dict[str, torch.Tensor]:
    """Every weight of the base's own modules."""
    modules = {
        "denoiser": backbone.denoiser,
        "vae": backbone.vae,
        "text": backbone.parts()["text_encoder"],
    }
    return {
        f"{part}.{k.replace('.base_layer', '')}": v.clone()
        for part, m in modules.items()
        for k, v in m.state_dict().items()
        if "lora_" not in k
    }


@pytest.fixture(scope="module")
def runs(tiny_base, mug_photos, tmp_path_factory):
    """method -> (run folder, the module after the last step); each method is trained once, in four
    steps.
    """
    done = {}

    def run(name: str):
        if name not in done:
            out = tmp_path_factory.mktemp(name)
            done[name] = (
                out,
                fit(
                    tiny_base,
                    mug_photos,
                    out,
                    METHODS[name](),
                    steps=[2, 4],
                    data=dict(batch_size=2),
                ),
            )
        return done[name]

    return run


def view(out: Path, number: int, base, name: str = "any"):
    return restore(snapshots.read(step(out, number)), base, name)


# --------------------------------------------------------------------------------------- what moves
@pytest.mark.parametrize(
    "method, moves",
    [
        ("word", None),
        ("words", None),
        ("t-lora", None),
        ("custom", r"denoiser\..*\.attn2\.to_[kv]\.weight"),
    ],
)
def test_only_the_declared_weights_move(runs, tiny_base, method, moves):
    module = runs(method)[1]
    before, after = parts(load_backbone(str(tiny_base))), parts(module.backbone)
    moved = {k for k in before if not torch.equal(before[k], after[k])}
    assert before.keys() == after.keys()
    assert moved == {k for k in before if moves and re.fullmatch(moves, k)}
    assert len(moved) == (2 * len(module.backbone.sites()) if moves else 0)
    if module.backbone.concept:
        like = "sks" if method == "custom" else "mug"
        assert (
            module.backbone.concept.vectors - module.backbone.embedding(like)
        ).abs().min() > 0  # AdamW moves every entry


@pytest.mark.parametrize("noun", ["mug", "teddy bear", "toy soldier's hat"])
def test_a_word_begins_as_its_class_noun(tiny_base, noun):
    base = load_backbone(str(tiny_base))
    ids = base.tokenizer(noun, add_special_tokens=False).input_ids
    TextualInversion(vectors=2).attach(base, "sks", noun)
    rows = base.parts()["text_encoder"].get_input_embeddings().weight[ids]
    assert (
        torch.equal(base.concept.vectors, rows.mean(0).expand(2, -1))
        and base.concept.vectors.requires_grad
    )
    if len(ids) == 1:  # with one vector, at first the same as the noun in its place
        TextualInversion().attach(base, "sks", noun)
        plain = load_backbone(str(tiny_base))
        assert torch.equal(
            base.encode_prompts(["a sks on the beach"]).states,
            plain.encode_prompts([f"a {noun} on the beach"]).states,
        )


# ----------------------------------------------------------------------------- the word in a prompt
@pytest.fixture(scope="module")
def named(tiny_base):
    """A base that knows `sks` by three vectors."""
    base = load_backbone(str(tiny_base))
    TextualInversion(vectors=3).attach(base, "sks", "mug")
    with torch.no_grad():
        base.concept.vectors += torch.arange(3.0)[:, None]
    return base


def test_spans_find_the_words_around_a_learned_one(named):
    spans = {s.word: s.tokens for s in named.spans("a Sks mug in the snow")}
    assert spans["Sks"] == (2, 3, 4) and spans["mug"] == (5,) and len(spans) == 3
    assert [s.tokens for s in named.spans("a <sks> mug")] == [(2, 3, 4), (5,)]
    plain = load_backbone(named.base)
    assert named.spans("asks a sksx mug") == plain.spans(
        "asks a sksx mug"
    )  # a part of a word is not the word


@pytest.mark.parametrize("prompt", ["", "a red mug, on the beach's sand", "a mug " * 40])
def test_prompts_without_the_word_are_encoded_as_ever(named, prompt):
    plain = load_backbone(named.base)
    assert torch.equal(named.encode_prompts([prompt]).states, plain.encode_prompts([prompt]).states)
    assert named.spans(prompt) == plain.spans(prompt) and named.dropped_words(
        prompt
    ) == plain.dropped_words(prompt)


def test_a_long_prompt_with_the_word_is_cut(named):
    long = "a red mug " * 9 + "sks snow"
    assert named.encode_prompts([long, "sks"]).states.shape[:2] == (2, named.length)
    assert named.dropped_words("red " * 28 + "sks snow") == [
        "sks",
        "snow",
    ]  # two of its three vectors fit, and do not count


# ------------------------------------------------------------------ the same predictions, from disk
@pytest.mark.parametrize("method", METHODS)
def test_restore_predicts_what_training_did_and_changes_nothing_else(runs, tiny_base, method):
    out, module = runs(method)
    base = load_backbone(str(tiny_base))
    untouched, weights, vocabulary = predict(base), parts(base), len(base.tokenizer)
    late, early = view(out, 4, base, "late"), view(out, 2, base, "early")
    first = predict(early)
    for _ in range(2):  # in any order, also after each other
        torch.testing.assert_close(predict(late), predict(module.backbone), **EXACT)
        assert torch.equal(predict(base), untouched) and torch.equal(predict(early), first)
    assert (predict(late) - untouched)[0].abs().max() > 1e-4 and (predict(late) - first)[
        0
    ].abs().max() > 1e-5
    assert len(base.tokenizer) == vocabulary and base.concept is None
    after = parts(base)
    assert all(torch.equal(weights[k], after[k]) for k in weights)
    pointers = {p.data_ptr() for p in base.denoiser.parameters()}
    own = [n for n, p in late.denoiser.named_parameters() if p.data_ptr() not in pointers]
    assert len(own) == (2 * len(base.sites()) if method == "custom" else 0)  # all else is shared


@pytest.mark.parametrize("method", METHODS)
def test_merged_ends_are_the_snapshots_and_its_middle_is_between(runs, tiny_base, method):
    loaded = Models.load(Pair.find(runs(method)[0], "2", "4"), str(tiny_base))
    ends = [predict(loaded.early), predict(loaded.late)]
    for weight in (0, 1):
        torch.testing.assert_close(predict(loaded.merged(float(weight))), ends[weight], **EXACT)
    middle = loaded.merged(0.5)
    assert min((predict(middle) - end).abs().max() for end in ends) > 1e-6
    if middle.concept:
        torch.testing.assert_close(
            middle.concept.vectors, (loaded.early.concept.vectors + loaded.late.concept.vectors) / 2
        )
        assert middle.denoiser.conv_in.weight is loaded.base.denoiser.conv_in.weight
        assert torch.equal(predict(loaded.early), ends[0]) and torch.equal(
            predict(loaded.late), ends[1]
        )


def test_views_of_unlike_words_are_not_blended(runs, tiny_base):
    paths = [
        str(step(runs(method)[0], number) / WORD) for method, number in (("word", 2), ("words", 4))
    ]
    with pytest.raises(InputError, match="early learned 1 vectors for 'sks' and late 3"):
        Models.load(Pair.find(None, *paths), str(tiny_base))


# ----------------------------------------------------------------------- plain diffusers reads them
@pytest.mark.parametrize("method, count", [("word", 1), ("words", 3)])
def test_diffusers_loads_the_word(runs, tiny_base, method, count):
    out, module = runs(method)
    assert set(contents(step(out, 4))) == {"snapshot.json", WORD}
    assert {k: tuple(v.shape) for k, v in load_file(step(out, 4) / WORD).items()} == {
        "<sks>": (count, 16)
    }
    pipe = plain_pipeline(tiny_base)
    pipe.load_textual_inversion(step(out, 4))
    prompts = [
        pipe.maybe_convert_prompt(p.replace("sks", "<sks>"), pipe.tokenizer) for p in PROMPTS
    ]
    tokens = pipe.tokenizer(
        prompts,
        padding="max_length",
        max_length=pipe.tokenizer.model_max_length,
        return_tensors="pt",
    ).input_ids
    with torch.no_grad():
        torch.testing.assert_close(
            pipe.unet(*probe(), pipe.text_encoder(tokens)[0]).sample,
            predict(module.backbone),
            **EXACT,
        )


def test_diffusers_loads_custom_diffusion(runs, tiny_base):
    out, module = runs("custom")
    folder = step(out, 4)
    assert set(contents(folder)) == {"snapshot.json", CUSTOM, "<sks>.safetensors"}
    trained = [k for k, v in load_file(folder / CUSTOM).items() if v.numel()]
    assert all(
        re.fullmatch(r".*\.attn2\.processor\.to_[kv]_custom_diffusion\.weight", k) for k in trained
    )
    pipe = plain_pipeline(tiny_base)
    pipe.unet.load_attn_procs(folder, weight_name=CUSTOM, _pipeline=pipe)
    pipe.load_textual_inversion(folder, weight_name="<sks>.safetensors")
    tokens = pipe.tokenizer(
        [p.replace("sks", "<sks>") for p in PROMPTS],
        padding="max_length",
        max_length=32,
        return_tensors="pt",
    ).input_ids
    with torch.no_grad():
        torch.testing.assert_close(
            pipe.unet(*probe(), pipe.text_encoder(tokens)[0]).sample,
            predict(module.backbone),
            rtol=0,
            atol=1e-5,
        )
    pipe.unet.save_attn_procs(folder.parent / "theirs")  # and what diffusers saves is read here
    theirs = restore(snapshots.read(folder.parent / "theirs"), load_backbone(str(tiny_base)), "any")
    theirs.concept = view(out, 4, theirs).concept
    torch.testing.assert_close(predict(theirs), predict(module.backbone), **EXACT)


def test_diffusers_loads_a_t_lora_without_its_mask(runs, tiny_base, tmp_path):
    out, module = runs("t-lora")
    assert set(contents(step(out, 4))) == {"snapshot.json", LORA}
    pipe = plain_pipeline(tiny_base)
    pipe.load_lora_weights(step(out, 4))
    unmasked = LoRA.restore(step(out, 4), load_backbone(str(tiny_base)), "any")
    torch.testing.assert_close(plain_predict(pipe), predict(unmasked), **EXACT)
    assert (predict(unmasked) - predict(module.backbone))[
        1
    ].abs().max() > 1e-5  # at t = 700 the mask counts
    (tmp_path / "mug.safetensors").write_bytes(
        (step(out, 4) / LORA).read_bytes()
    )  # the file alone keeps its mask
    alone = restore(
        snapshots.read(tmp_path / "mug.safetensors"), load_backbone(str(tiny_base)), "any"
    )
    torch.testing.assert_close(predict(alone), predict(module.backbone), **EXACT)


# ------------------------------------------------------------------------------------ T-LoRA's mask
def test_active_ranks_fall_with_the_timestep():
    t = torch.tensor([0.0, 1, 250, 499.5, 999, 1000])
    assert active_ranks(t, 8, 2, 1.0, 1000).tolist() == [8, 7, 6, 5, 2, 2]
    assert active_ranks(t, 8, 2, 2.0, 1000).tolist() == [8, 7, 5, 3, 2, 2]
    assert active_ranks(t, 8, 8, 1.0, 1000).tolist() == [8] * 6


@torch.no_grad()
def at(backbone, t, rows: slice = slice(None)) -> torch.Tensor:
    latents = probe()[0][:1].expand(3, -1, -1, -1)
    return backbone.denoise(latents[rows], t, backbone.encode_prompts(PROMPTS[:1] * 3)[rows])


def test_the_mask_is_of_each_sample(runs, tiny_base):
    late = view(runs("t-lora")[0], 4, load_backbone(str(tiny_base)))
    mixed = at(late, torch.tensor([0, 500, 990]))
    for i, t in enumerate((0, 500, 990)):
        torch.testing.assert_close(
            mixed[i], at(late, torch.tensor(t), slice(i, i + 1))[0], **EXACT
        )  # also a timestep for the whole batch
    full = LoRA.restore(step(runs("t-lora")[0], 4), load_backbone(str(tiny_base)), "full")
    unmasked = at(full, torch.tensor([0, 500, 990]))
    torch.testing.assert_close(mixed[0], unmasked[0], **EXACT)
    for (
        name,
        weight,
    ) in full.denoiser.named_parameters():  # at t near T only the first direction acts
        if "lora_A" in name:
            weight.data[1:] = 0
    torch.testing.assert_close(mixed[2], at(full, torch.tensor([0, 500, 990]))[2], **EXACT)
    assert (mixed[2] - unmasked[2]).abs().max() > 1e-5


def test_each_adapter_of_one_base_has_its_own_mask(runs, tiny_base, mug_photos, tmp_path):
    fit(tiny_base, mug_photos, tmp_path, LoRA(rank=4), steps=[2])
    alone = [
        predict(view(out, 2, load_backbone(str(tiny_base))))
        for out in (runs("t-lora")[0], tmp_path)
    ]
    base = load_backbone(str(tiny_base))
    masked, plain = view(runs("t-lora")[0], 2, base, "masked"), view(tmp_path, 2, base, "plain")
    for _ in range(2):
        torch.testing.assert_close(predict(masked), alone[0], **EXACT)
        torch.testing.assert_close(predict(plain), alone[1], **EXACT)
    base.forget("masked")
    torch.testing.assert_close(predict(plain), alone[1], **EXACT)
    torch.testing.assert_close(
        predict(view(runs("t-lora")[0], 2, base, "masked")), alone[0], **EXACT
    )
    assert len(base.denoiser._forward_pre_hooks) == 1


def test_masked_directions_get_no_gradient(tiny_base):
    base = load_backbone(str(tiny_base))
    TLoRA(rank=4, min_rank=1).attach(base)
    ups = [p for name, p in base.denoiser.named_parameters() if "lora_B" in name]
    latents, text = probe()[0], base.encode_prompts(PROMPTS)
    base.denoise(latents, torch.tensor([999, 999]), text).square().mean().backward()
    assert all(not p.grad[:, 1:].any() for p in ups) and any(p.grad[:, :1].any() for p in ups)


# ------------------------------------------------------------------------- averages, continued runs
@pytest.mark.parametrize("method", ["custom", "t-lora"])
def test_a_continued_run_with_averaged_weights_ends_as_the_whole_one(
    tiny_base, mug_photos, tmp_path, method
):
    def average():
        return EMAWeightAveraging(decay=0.5)

    fit(
        tiny_base,
        mug_photos,
        tmp_path / "whole",
        METHODS[method](),
        steps=[3],
        callbacks=(average(),),
    )
    keep = ModelCheckpoint(tmp_path, filename="two", every_n_train_steps=1)
    fit(
        tiny_base,
        mug_photos,
        tmp_path / "cut",
        METHODS[method](),
        steps=[2],
        callbacks=(average(), keep),
    )
    state = torch.load(tmp_path / "two.ckpt", weights_only=True)
    assert all(
        re.search(r"lora_|attn2\.to_[kv]\.|\.vectors$", k) for k in state["current_model_state"]
    )  # the trained weights alone
    fit(
        tiny_base,
        mug_photos,
        tmp_path / "cut",
        METHODS[method](),
        steps=[3],
        callbacks=(average(),),
        ckpt_path=tmp_path / "two.ckpt",
    )
    assert contents(step(tmp_path / "cut", 3)) == contents(step(tmp_path / "whole", 3))
    assert (
        snapshots.read(step(tmp_path / "cut", 3))
        .about.settings["averaged"]
        .startswith("EMAWeightAveraging(")
    )


# ------------------------------------------------------------------------------------------ recipes
@pytest.mark.parametrize("recipe", ["textual_inversion", "custom_diffusion", "t_lora"])
def test_a_recipe_trains_and_its_snapshots_blend(tiny_base, mug_photos, tmp_path, recipe):
    status, _, err = command(
        main,
        "fit",
        "--config",
        ROOT / f"configs/train_{recipe}.yaml",
        "--model.base",
        tiny_base,
        "--data.instance_dir",
        mug_photos,
        "--data.class_noun",
        "mug",
        "--out",
        tmp_path,
        "--snapshots.steps",
        "[2,4]",
        "--trainer.max_steps",
        4,
        "--trainer.accelerator",
        "cpu",
        "--trainer.logger",
        "false",
        "--trainer.callbacks",
        "[]",
        "--trainer.enable_progress_bar",
        "false",
        "--data.batch_size",
        1,
        "--data.class_images_dir",
        tmp_path / "prior",
        *(["--data.num_class_images", 2] if recipe == "custom_diffusion" else []),
    )
    assert status == 0, err
    for blend in (CAG(window=(0.0, 1.0)), Merge()):
        module = Blender("2", "4", run=tmp_path, blend=blend, num_inference_steps=2)
        module.load()
        before = {
            n: m.processor
            for n, m in module.models.late.denoiser.named_modules()
            if hasattr(m, "processor")
        }
        with torch.no_grad():
            pictures = module.predict_step([("a sks mug on the beach", 0), ("a mug", 1)])
        assert {p.kind for p in pictures} == {"early", blend.name, "late"}
        assert pictures[0].words == ["sks", "mug", "beach"] and all(
            p.maps.isfinite().all() for p in pictures
        )
        assert all(
            m.processor is before[n]
            for n, m in module.models.late.denoiser.named_modules()
            if n in before
        )


# ------------------------------------------------------------------------------------------- errors
@pytest.mark.parametrize(
    "make, say",
    [
        (lambda: TextualInversion(vectors=0), "model.tuning.vectors is 0"),
        (lambda: TLoRA(rank=4, min_rank=5), "model.tuning.min_rank is 5"),
        (lambda: TLoRA(power=0.0), "model.tuning.power is 0"),
        (lambda: TLoRA(rank=0), "model.tuning.rank is 0"),
    ],
)
def test_settings_that_cannot_be_are_refused(make, say):
    with pytest.raises(InputError, match=say):
        make()


@pytest.mark.parametrize(
    "identifier, noun, say",
    [
        ("my mug", "mug", "data.identifier is 'my mug'"),
        ("a/b", "mug", "slashes"),
        ("sks", "", "knows nothing of ''"),
    ],
)
def test_words_that_cannot_be_learned_are_refused(tiny_base, identifier, noun, say):
    with pytest.raises(InputError, match=say):
        TextualInversion().attach(load_backbone(str(tiny_base)), identifier, noun)


@pytest.mark.parametrize(
    "tensors, say",
    [
        ({"<cat>": torch.zeros(2, 24)}, "has vectors \\(2, 24\\).*16 channels"),
        (
            {"mid.attn2.processor.to_k_custom_diffusion.weight": torch.zeros(2, 2)},
            "cannot load.*mid.attn2.to_k",
        ),
        (
            {f"{MIDDLE}.processor.to_k_custom_diffusion.weight": torch.zeros(2, 2)},
            "is \\(2, 2\\) and not",
        ),
    ],
)
def test_weights_of_another_base_are_refused(tiny_base, tmp_path, tensors, say):
    save_file(tensors, tmp_path / "other.safetensors")
    with pytest.raises(InputError, match=say):
        restore(
            snapshots.read(tmp_path / "other.safetensors"), load_backbone(str(tiny_base)), "any"
        )


def test_a_word_made_elsewhere_is_read_under_its_own_name(tiny_base, tmp_path):
    save_file({"<cat-toy>": torch.ones(16)}, tmp_path / WORD)
    base = load_backbone(str(tiny_base))
    learned = restore(snapshots.read(tmp_path), base, "any")
    assert [s.word for s in learned.spans("a <cat-toy> here")] == ["cat-toy", "here"]
    change = (
        (
            learned.encode_prompts(["a <cat-toy>"]).states
            - base.encode_prompts(["a <cat-toy>"]).states
        )
        .abs()
        .max()
    )
    assert change > 1e-3 and torch.equal(
        learned.encode_prompts(["a cat"]).states, base.encode_prompts(["a cat"]).states
    )


@pytest.mark.parametrize(
    "key, name, identifier, word",
    [
        ("<sksdog>", "learned_embeds-steps-200.safetensors", None, "sksdog"),
        ("sksdog", "learned_embeds-steps-200.safetensors", "sksdog", "sksdog"),
        ("sksdog", "any.safetensors", "<SksDog>", "sksdog"),
        ("emb_params", "sksdog.safetensors", None, "sksdog"),
        ("emb_params", "sksdog-200.safetensors", "ohwx", "ohwx"),
        ("clip_l", "any.safetensors", "ohwx", "ohwx"),
    ],
)
@pytest.mark.parametrize("vectors", [1, 3])
def test_a_word_of_any_tool_is_what_prompts_call_it(
    tiny_base, tmp_path, key, name, identifier, word, vectors
):
    """A prompt with the word is encoded as one of diffusers' own pipeline that has learned the same
    vectors.
    """
    learned = torch.randn(vectors, 16, generator=torch.Generator().manual_seed(2))
    save_file({key: learned}, tmp_path / name)
    view = restore(
        snapshots.read(tmp_path / name), load_backbone(str(tiny_base)), "any", identifier
    )
    pipe = plain_pipeline(tiny_base)
    pipe.load_textual_inversion({f"<{word}>": learned})
    prompt = pipe.maybe_convert_prompt(f"a <{word}> mug", pipe.tokenizer)
    ids = pipe.tokenizer(
        prompt, padding="max_length", max_length=view.length, return_tensors="pt"
    ).input_ids
    for written in (word, f"<{word}>"):
        torch.testing.assert_close(
            view.encode_prompts([f"a {written} mug"]).states, pipe.text_encoder(ids)[0], **EXACT
        )


@pytest.mark.parametrize(
    "tensors, identifier, say",
    [
        (
            {"<cat-toy>": torch.ones(16)},
            "sks",
            (
                "the word in .* is 'cat-toy', and prompts would say 'sks': name it with"
                " --model.identifier cat-toy"
            ),
        ),
        ({"clip_l": torch.ones(1, 16), "clip_g": torch.ones(1, 24)}, "sks", "a word of SDXL"),
        ({"emb_params": torch.ones(1, 16), "more": torch.ones(1)}, "sks", "holds 2 tensors"),
        ({"sks": torch.ones(1, 24)}, "sks", "has vectors"),
    ],
)
def test_a_word_that_no_prompt_would_use_is_refused(tiny_base, tmp_path, tensors, identifier, say):
    save_file(tensors, tmp_path / "word.safetensors")
    with pytest.raises(InputError, match=say):
        restore(
            snapshots.read(tmp_path / "word.safetensors"),
            load_backbone(str(tiny_base)),
            "any",
            identifier,
        )


def test_a_pair_of_words_made_elsewhere_blends_under_the_identifier(tiny_base, tmp_path):
    for number in (200, 400):
        save_file(
            {"emb_params": 3 * torch.randn(2, 16, generator=torch.Generator().manual_seed(number))},
            tmp_path / f"sksdog-{number}.safetensors",
        )
    early, late = (str(tmp_path / f"sksdog-{number}.safetensors") for number in (200, 400))
    module = Blender(
        early, late, base=str(tiny_base), identifier="ohwx", class_noun="dog", num_inference_steps=2
    )
    module.load()
    assert module.models.early.concept.word == module.models.late.concept.word == "ohwx"
    with torch.no_grad():
        pictures = {p.kind: p for p in module.predict_step([("a ohwx dog", 0)])}
    assert pictures["early"].image.tobytes() != pictures["late"].image.tobytes() and pictures[
        "late"
    ].words == ["ohwx", "dog"]


def test_a_custom_diffusion_folder_whose_word_is_a_pickle_is_refused(runs, tiny_base, tmp_path):
    (tmp_path / CUSTOM).write_bytes((step(runs("custom")[0], 2) / CUSTOM).read_bytes())
    torch.save({"<sks>": torch.zeros(16)}, tmp_path / "<sks>.bin")
    with pytest.raises(InputError, match="<sks>.bin is a pickle"):
        restore(snapshots.read(tmp_path), load_backbone(str(tiny_base)), "any")


def test_a_t_lora_that_lost_its_mask_is_refused(runs, tiny_base, tmp_path):
    save_file(load_file(step(runs("t-lora")[0], 2) / LORA), tmp_path / LORA)
    with pytest.raises(InputError, match="does not say how its ranks are masked"):
        TLoRA.restore(tmp_path, load_backbone(str(tiny_base)), "any")


def test_an_overlay_shares_all_but_what_it_replaces():
    inner = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Linear(2, 2))
    module = torch.nn.Sequential(inner, torch.nn.Linear(2, 2))
    other = overlay(module, {"0.1.weight": torch.zeros(2, 2)})
    assert (
        other[1] is module[1]
        and other[0][0] is module[0][0]
        and other[0][1].bias is module[0][1].bias
    )
    assert not other[0][1].weight.any() and module[0][1].weight.any()
