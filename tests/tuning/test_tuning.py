"""Snapshots of every method: plain diffusers and our own `restore` predict what the module in
training predicts at that step.
"""

from __future__ import annotations

import json
import re
import shutil
import warnings
from pathlib import Path

import lightning as L
import pytest
import torch
from conftest import save_tiny_base
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from single_files import original
from tiny_runs import PROMPTS, contents, fit, plain_pipeline, plain_predict, predict, step

from dreamblend import tuning
from dreamblend.blending.models import Models, drawing_dtype
from dreamblend.blending.pair import Pair
from dreamblend.errors import InputError
from dreamblend.models import load_backbone
from dreamblend.storage import snapshots
from dreamblend.storage.foreign import LORA
from dreamblend.storage.snapshots import DTYPES
from dreamblend.tuning import Full, LoRA, restore

METHODS = {
    "full": lambda: Full(),
    "full-text": lambda: Full(text_encoder=True),
    "lora": lambda: LoRA(rank=4, alpha=10.0),
    "lora-text": lambda: LoRA(rank=4, alpha=2.0, text_encoder=True),
    "dora": lambda: LoRA(rank=4, alpha=6.0, dora=True),
    "dora-text": lambda: LoRA(rank=4, alpha=6.0, dora=True, text_encoder=True),
}
EXACT = dict(
    rtol=0, atol=2e-6
)  # the order of sums differs between a peft layer in training and one that is loaded


class Watch(L.Callback):
    """Notes what the module predicts after each optimizer step."""

    def __init__(self):
        self.predicted = {}

    def on_train_batch_end(self, trainer, module, *_):
        self.predicted[trainer.global_step] = predict(module.backbone)


@pytest.fixture(scope="module")
def runs(tiny_base, mug_photos, tmp_path_factory):
    """method -> (run folder, step -> prediction in training); each method is trained once."""
    done = {}

    def run(name: str):
        if name not in done:
            out, watch = tmp_path_factory.mktemp(name), Watch()
            fit(tiny_base, mug_photos, out, METHODS[name](), steps=[2, 4], callbacks=(watch,))
            done[name] = out, watch.predicted
        return done[name]

    return run


def open_plainly(base: Path, snapshot: Path):
    """The one line of DESIGN 5.1 for each method."""
    from diffusers import UNet2DConditionModel
    from transformers import CLIPTextModel

    pipe = plain_pipeline(base)
    if (snapshot / LORA).exists():
        pipe.load_lora_weights(snapshot)
        return pipe
    pipe.unet = UNet2DConditionModel.from_pretrained(snapshot, subfolder="unet")
    if (snapshot / "text_encoder").exists():
        pipe.text_encoder = CLIPTextModel.from_pretrained(snapshot, subfolder="text_encoder")
    return pipe


# ----------------------------------------------------------------------------- the same predictions
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.holds("train LoRA", "snapshot in diffusers", of="stable_diffusion")
def test_plain_diffusers_predicts_what_training_did(runs, tiny_base, method):
    out, trained = runs(method)
    untouched = plain_predict(plain_pipeline(tiny_base))
    for number in (2, 4):
        opened = plain_predict(open_plainly(tiny_base, step(out, number)))
        torch.testing.assert_close(opened, trained[number], **EXACT)
        assert (opened - untouched).abs().max() > 1e-3  # it has learned something to tell apart
    assert (trained[4] - trained[2]).abs().max() > 1e-3


@pytest.mark.parametrize("method", METHODS)
def test_restore_predicts_what_training_did(runs, tiny_base, method):
    out, trained = runs(method)
    for number in (2, 4):
        view = restore(snapshots.read(step(out, number)), load_backbone(str(tiny_base)), "any")
        torch.testing.assert_close(predict(view), trained[number], **EXACT)


@pytest.mark.parametrize("dtype, eps", [("fp16", 2**-11), ("bf16", 2**-8)])
@pytest.mark.parametrize("method", ["full", "lora-text"])
def test_smaller_dtypes_round_the_weights_and_nothing_else(
    tiny_base, mug_photos, tmp_path, method, dtype, eps
):
    module = fit(tiny_base, mug_photos, tmp_path, METHODS[method](), steps=[2], dtype=dtype)
    for name, content in module.tuning.export(module.backbone).items():
        if isinstance(content, snapshots.Weights):
            saved = load_file(step(tmp_path, 2) / name)
            assert saved.keys() == content.tensors.keys()
            for key, value in content.tensors.items():
                assert saved[key].dtype == snapshots.DTYPES[dtype] and torch.equal(
                    saved[key], value.to(saved[key].dtype)
                ), key
    assert json.loads((step(tmp_path, 2) / "snapshot.json").read_text())["dtype"] == str(
        snapshots.DTYPES[dtype]
    ).removeprefix("torch.")
    trained = predict(module.backbone)
    for opened in (
        plain_predict(open_plainly(tiny_base, step(tmp_path, 2))),
        predict(restore(snapshots.read(step(tmp_path, 2)), load_backbone(str(tiny_base)), "any")),
    ):
        assert (opened - trained).norm() / trained.norm() < 8 * eps


def test_a_snapshot_holds_trained_weights_alone(runs, tiny_base):
    assert set(contents(step(runs("full")[0], 2))) == {
        "snapshot.json",
        "unet/config.json",
        "unet/diffusion_pytorch_model.safetensors",
    }
    assert set(contents(step(runs("lora")[0], 2))) == {"snapshot.json", LORA}
    out, _ = runs("lora")
    with safe_open(step(out, 2) / LORA, "pt") as file:
        assert all(key.startswith("unet.") and "lora_" in key for key in file.keys())
    assert "text_encoder/model.safetensors" in contents(step(runs("full-text")[0], 2))


def test_a_full_snapshot_does_not_say_where_the_base_lay(runs, tiny_base):
    for part in ("unet", "text_encoder"):
        assert (
            str(tiny_base) not in (step(runs("full-text")[0], 2) / part / "config.json").read_text()
        )


# ---------------------------------------------------------------------------------- pairs in memory
@pytest.mark.parametrize("method", ["lora", "lora-text", "dora"])
def test_a_lora_pair_shares_one_denoiser_and_keeps_the_base(runs, tiny_base, method):
    out, trained = runs(method)
    untouched = predict(load_backbone(str(tiny_base)))
    loaded = Models.load(Pair.find(out, "2", "4"), str(tiny_base))
    assert loaded.early.denoiser is loaded.late.denoiser is loaded.base.denoiser
    assert loaded.early.parts()["text_encoder"] is loaded.base.parts()["text_encoder"]
    for _ in range(2):  # in any order, also after each other
        torch.testing.assert_close(
            predict(loaded.early), plain_predict(open_plainly(tiny_base, step(out, 2))), **EXACT
        )
        torch.testing.assert_close(
            predict(loaded.late), plain_predict(open_plainly(tiny_base, step(out, 4))), **EXACT
        )
        assert torch.equal(predict(loaded.base), untouched)
        torch.testing.assert_close(predict(loaded.late), trained[4], **EXACT)


@pytest.mark.parametrize("method", ["full", "full-text"])
def test_a_full_pair_shares_what_was_not_trained_and_keeps_the_base(runs, tiny_base, method):
    out, trained = runs(method)
    loaded = Models.load(Pair.find(out, "2", "4"), str(tiny_base))
    assert loaded.early.vae is loaded.late.vae is loaded.base.vae
    assert (loaded.early.parts()["text_encoder"] is loaded.late.parts()["text_encoder"]) == (
        method == "full"
    )
    torch.testing.assert_close(predict(loaded.early), trained[2], **EXACT)
    torch.testing.assert_close(predict(loaded.late), trained[4], **EXACT)
    assert torch.equal(predict(loaded.base), predict(load_backbone(str(tiny_base))))


def test_merged_ends_are_the_snapshots_themselves(runs, tiny_base):
    for method in ("full-text", "lora"):
        out, trained = runs(method)
        loaded = Models.load(Pair.find(out, "2", "4"), str(tiny_base))
        torch.testing.assert_close(predict(loaded.merged(0.0)), trained[2], rtol=0, atol=1e-5)
        torch.testing.assert_close(predict(loaded.merged(1.0)), trained[4], rtol=0, atol=1e-5)


@pytest.mark.parametrize("method", ["full", "full-text"])
def test_a_full_pair_leaves_alone_what_it_does_not_draw_with(runs, tiny_base, method):
    """Cast as it would be moved: the untouched base stays as it was read."""
    loaded = Models.load(Pair.find(runs(method)[0], "2", "4"), str(tiny_base))
    loaded.to("cpu", torch.bfloat16)

    def kinds(module):
        return {p.dtype for p in module.parameters()}

    assert kinds(loaded.base.denoiser) == {torch.float32} and kinds(loaded.base.vae) == {
        torch.bfloat16
    }
    assert kinds(loaded.base.parts()["text_encoder"]) == {
        torch.float32 if method == "full-text" else torch.bfloat16
    }
    assert all(
        kinds(module) == {torch.bfloat16}
        for model in (loaded.early, loaded.late)
        for module in model.modules()
    )


def differences(loaded: Models, dtype: torch.dtype) -> torch.Tensor:
    """What late adds to early in each weight of the denoiser's layers, where both are cast: of
    adapters their products.
    """
    if loaded.early.adapters is None:
        both = zip(*(model.denoiser.parameters() for model in (loaded.early, loaded.late)))
        return torch.cat([(q.to(dtype).float() - p.to(dtype).float()).flatten() for p, q in both])
    layers = [m for m in loaded.base.denoiser.modules() if hasattr(m, "lora_A") and len(m.lora_A)]

    def product(layer, name):
        return (
            layer.lora_B[name].weight.to(dtype).float()
            @ layer.lora_A[name].weight.to(dtype).float()
        )

    return torch.cat(
        [(product(layer, "late") - product(layer, "early")).flatten() for layer in layers]
    )


@pytest.mark.parametrize("method, left", [("full", 0.5), ("lora", 0.01)])
def test_what_is_drawn_in_by_default_on_a_gpu_keeps_what_was_learned(
    tiny_base, mug_photos, tmp_path, method, left
):
    """Snapshots 2 steps of rate 1e-4 apart: bf16 in the place of the base's weights loses more than
    half of it, and beside them less than 1 %.
    """
    fit(
        tiny_base,
        mug_photos,
        tmp_path,
        Full() if method == "full" else LoRA(rank=4),
        steps=[2, 4],
        learning_rate=1e-4,
    )
    loaded = Models.load(Pair.find(tmp_path, "2", "4"), str(tiny_base))
    there = differences(loaded, torch.float32)

    def error(dtype):
        return ((differences(loaded, dtype) - there).norm() / there.norm()).item()

    def vanished(dtype):
        return (differences(loaded, dtype)[there != 0] == 0).float().mean().item()

    half = torch.bfloat16
    assert (
        error(half) > left and vanished(half) > 0.2 if method == "full" else error(half) < left
    ), (error(half), vanished(half))
    default = DTYPES[drawing_dtype(method, "cuda")]
    assert error(default) <= 0.01 and vanished(default) <= 0.01, (error(default), vanished(default))


def test_only_what_stands_apart_is_drawn_in_half_precision_by_default():
    assert {name: drawing_dtype(name, "cuda:1") for name in tuning.METHODS} == {
        "full": "fp32",
        "custom-diffusion": "fp32",
        "lora": "bf16",
        "t-lora": "bf16",
        "textual-inversion": "bf16",
    }


def test_a_pair_of_two_subjects_is_refused_and_of_two_folders_of_photos_told(
    tiny_base, mug_photos, tmp_path
):
    import shutil

    other = shutil.copytree(mug_photos, tmp_path / "photos")
    fit(tiny_base, mug_photos, tmp_path / "a", LoRA(rank=2), steps=[1])
    for name, photos, data in (("b", mug_photos, {"identifier": "ohwx"}), ("c", other, {})):
        fit(tiny_base, photos, tmp_path / name, LoRA(rank=2), steps=[2], data=data)
    with pytest.raises(InputError, match="early knows 'sks mug' and late 'ohwx mug'"):
        Pair.find(None, str(step(tmp_path / "a", 1)), str(step(tmp_path / "b", 2)))
    with pytest.warns(UserWarning, match=f"late on those in {other}"):
        Pair.find(None, str(step(tmp_path / "a", 1)), str(step(tmp_path / "c", 2)))


def test_loaded_refuses_another_base(runs, tmp_path):
    other = save_tiny_base(tmp_path / "other", seed=5)
    with pytest.raises(InputError, match="other weights: name their base with --model.base"):
        Models.load(Pair.find(runs("lora")[0], "2", "4"), str(other))


def test_a_lora_of_other_shapes_is_refused(runs, tiny_base, tmp_path):
    tensors = load_file(step(runs("lora")[0], 2) / LORA)
    save_file(
        {k: torch.cat([v, v], 1) if "lora_A" in k else v for k, v in tensors.items()},
        tmp_path / "wide.safetensors",
    )
    with pytest.raises(InputError, match="wide.safetensors"):
        restore(snapshots.read(tmp_path / "wide.safetensors"), load_backbone(str(tiny_base)), "any")


def test_a_lora_for_another_family_is_refused_and_not_ignored(tiny_base, tmp_path):
    save_file(
        {"transformer.single_blocks.0.attn.to_q.lora_A.weight": torch.zeros(4, 16)},
        tmp_path / "flux.safetensors",
    )
    with pytest.raises(InputError, match="flux.safetensors.*another family"):
        restore(snapshots.read(tmp_path / "flux.safetensors"), load_backbone(str(tiny_base)), "any")


def test_a_denoiser_of_another_shape_is_refused(runs, tmp_path):
    from diffusers import UNet2DConditionModel

    UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(8, 16),
        layers_per_block=1,
        cross_attention_dim=16,
        attention_head_dim=2,
        norm_num_groups=4,
        down_block_types=("CrossAttnDownBlock2D",) * 2,
        up_block_types=("CrossAttnUpBlock2D",) * 2,
    ).save_pretrained(tmp_path / "checkpoint-3/unet")
    with pytest.raises(InputError, match="another model than the base"):
        restore(
            snapshots.read(tmp_path / "checkpoint-3"),
            load_backbone(str(save_tiny_base(tmp_path / "base"))),
            "any",
        )


def test_a_checkpoint_that_lacks_weights_is_refused_and_not_filled_at_random(tiny_base, tmp_path):
    pipe = plain_pipeline(tiny_base)
    pipe.unet.save_pretrained(tmp_path / "checkpoint-3/unet")
    file = tmp_path / "checkpoint-3/unet/diffusion_pytorch_model.safetensors"
    tensors = load_file(file)
    tensors.pop("conv_out.weight")
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(InputError, match="checkpoint-3/unet lacks weights .*conv_out.weight"):
        restore(snapshots.read(tmp_path / "checkpoint-3"), load_backbone(str(tiny_base)), "any")


@pytest.mark.parametrize(
    "make, say",
    [
        (lambda: LoRA(rank=0), "model.tuning.rank"),
        (lambda: LoRA(alpha=0.0), "model.tuning.alpha"),
        (lambda: LoRA(dropout=1.0), "model.tuning.dropout"),
        (lambda: LoRA(targets=["to_nothing"]), "to_nothing.*match no layer"),
    ],
)
def test_settings_that_cannot_be_are_refused(tiny_base, make, say):
    with pytest.raises(InputError, match=say):
        make().attach(load_backbone(str(tiny_base)))


# ----------------------------------------------------------------------- checkpoints made elsewhere
def shift(module, seed: int = 3) -> None:
    """Other weights, as another trainer would leave them."""
    source = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in module.parameters():
            p += 0.05 * torch.randn(p.shape, generator=source)


def same_as_plain(path: Path, base: Path, pipe) -> None:
    restored = predict(
        restore(snapshots.read(snapshots.resolve(None, str(path))), load_backbone(str(base)), "any")
    )
    torch.testing.assert_close(restored, plain_predict(pipe), **EXACT)
    assert (restored - plain_predict(plain_pipeline(base))).abs().max() > 1e-3


def test_a_diffusers_checkpoint_folder(tiny_base, tmp_path):
    pipe = plain_pipeline(tiny_base)
    shift(pipe.unet)
    pipe.unet.save_pretrained(tmp_path / "checkpoint-400/unet")
    same_as_plain(tmp_path / "checkpoint-400", tiny_base, pipe)


def test_a_checkpoint_folder_in_the_fp16_variant(tiny_base, tmp_path):
    pipe = plain_pipeline(tiny_base)
    shift(pipe.unet)
    pipe.unet.half().save_pretrained(tmp_path / "checkpoint-400/unet", variant="fp16")
    pipe.unet.float()
    same_as_plain(tmp_path / "checkpoint-400", tiny_base, pipe)


def test_a_whole_model_in_one_file(tiny_base, tmp_path):

    pipe = plain_pipeline(tiny_base)
    shift(pipe.unet)
    shift(pipe.text_encoder)
    pipe.save_pretrained(tmp_path / "pipeline")
    save_file(original(tmp_path / "pipeline"), tmp_path / "model.safetensors")
    same_as_plain(tmp_path / "model.safetensors", tiny_base, pipe)


def test_a_full_pipeline_folder(tiny_base, tmp_path):
    pipe = plain_pipeline(tiny_base)
    shift(pipe.unet)
    shift(pipe.text_encoder)
    pipe.save_pretrained(tmp_path / "pipeline")
    same_as_plain(tmp_path / "pipeline", tiny_base, pipe)


def foreign_lora(base: Path, folder: Path, alpha: float = 4.0) -> dict:
    """A LoRA as diffusers' training scripts save it; the tensors that were saved."""
    from diffusers import StableDiffusionPipeline
    from diffusers.utils import convert_state_dict_to_diffusers
    from peft import LoraConfig, get_peft_model_state_dict

    pipe, layers = plain_pipeline(base), {}
    for name, targets in (
        ("unet", ["to_q", "to_k", "to_v", "to_out.0"]),
        ("text_encoder", ["q_proj", "v_proj", "out_proj"]),
    ):
        module = getattr(pipe, name)
        module.add_adapter(
            LoraConfig(r=4, lora_alpha=alpha, target_modules=targets, init_lora_weights="gaussian")
        )
        shift(module)
        layers[name] = convert_state_dict_to_diffusers(get_peft_model_state_dict(module))
    StableDiffusionPipeline.save_lora_weights(
        folder, unet_lora_layers=layers["unet"], text_encoder_lora_layers=layers["text_encoder"]
    )
    return load_file(folder / LORA)


def test_a_diffusers_lora_folder_and_file(tiny_base, tmp_path):
    foreign_lora(tiny_base, tmp_path / "lora")
    (tmp_path / "mug.safetensors").write_bytes((tmp_path / "lora" / LORA).read_bytes())
    for path in (tmp_path / "lora", tmp_path / "mug.safetensors"):
        pipe = plain_pipeline(tiny_base)
        pipe.load_lora_weights(path)
        same_as_plain(path, tiny_base, pipe)


def test_a_kohya_lora_with_alpha(tiny_base, tmp_path):
    kohya = {}
    for key, value in foreign_lora(tiny_base, tmp_path / "lora").items():
        part, rest = key.split(".", 1)
        module = rest.rsplit(".", 2)[0]
        direction = "lora_down" if ".lora_A." in key or ".down." in key else "lora_up"
        module = module.removesuffix(".lora").removesuffix(".lora_linear_layer")
        name = (
            "lora_unet_" + module if part == "unet" else "lora_te_text_model_" + module
        ).replace(".", "_")
        kohya |= {f"{name}.{direction}.weight": value, f"{name}.alpha": torch.tensor(2.0)}
    save_file(kohya, tmp_path / "kohya.safetensors")
    pipe = plain_pipeline(tiny_base)
    pipe.load_lora_weights(tmp_path / "kohya.safetensors")
    same_as_plain(tmp_path / "kohya.safetensors", tiny_base, pipe)
    full_strength = plain_pipeline(tiny_base)
    full_strength.load_lora_weights(tmp_path / "lora")
    assert (plain_predict(pipe) - plain_predict(full_strength)).abs().max() > 1e-3  # alpha counts


# ------------------------------------------------------ the same as weights that are merged by hand
RANKS = {"unet": (4, 10.0), "text_encoder": (3, 2.0)}  # rank and alpha, which differ


def factors(
    pipe, layers: str = r"to_[qkv]|to_out\.0|proj_in|conv1|conv_shortcut|[qkv]_proj|out_proj|fc1"
) -> dict[str, dict]:
    """part -> layer -> down, up, alpha: every other layer has an alpha of its own."""
    source, found = torch.Generator().manual_seed(1), {}
    for part, (rank, alpha) in RANKS.items():
        chosen = [
            (n, m)
            for n, m in getattr(pipe, part).named_modules()
            if re.search(rf"(^|\.)({layers})$", n)
        ]
        found[part] = {
            name: (
                0.2 * torch.randn(rank, *m.weight.shape[1:], generator=source),
                0.2
                * torch.randn(
                    m.weight.shape[0], rank, *[1] * (m.weight.ndim - 2), generator=source
                ),
                alpha * (1 + i % 2),
            )
            for i, (name, m) in enumerate(chosen)
        }
    return found


def merged(
    base: Path, found: dict[str, dict], magnitude: float | None = None, rslora: bool = False
):
    """A pipeline with W + alpha / rank * up @ down as its weights; with magnitudes, every output's
    row is `magnitude` times as long as W's (DoRA).
    """
    pipe = plain_pipeline(base)
    for part, layers in found.items():
        for name, (down, up, alpha) in layers.items():
            weight = getattr(pipe, part).get_submodule(name).weight
            scale = alpha / (len(down) ** 0.5 if rslora else len(down))
            rows = weight.data.flatten(1) + scale * up.flatten(1) @ down.flatten(1)
            if magnitude is not None:
                rows = (
                    rows
                    / rows.norm(dim=1, keepdim=True)
                    * magnitude
                    * weight.data.flatten(1).norm(dim=1, keepdim=True)
                )
            weight.data = rows.view_as(weight)
    return pipe


def in_kohyas_names(
    base: Path, found: dict[str, dict], magnitude: float | None = None, te: str = "lora_te"
) -> dict[str, torch.Tensor]:
    pipe, tensors = plain_pipeline(base), {}
    for part, layers in found.items():
        for name, (down, up, alpha) in layers.items():
            start = "lora_unet_" + name if part == "unet" else f"{te}_text_model_{name}"
            start, weight = (
                start.replace(".", "_"),
                getattr(pipe, part).get_submodule(name).weight.data,
            )
            tensors |= {
                f"{start}.lora_down.weight": down,
                f"{start}.lora_up.weight": up,
                f"{start}.alpha": torch.tensor(alpha),
            }
            if magnitude is not None:
                tensors[f"{start}.dora_scale"] = magnitude * weight.flatten(1).norm(dim=1).view(
                    -1, *[1] * (weight.ndim - 1)
                )
    return tensors


@pytest.mark.parametrize("magnitude", [None, 1.3])
@pytest.mark.holds("LoRA files", of="stable_diffusion")
def test_a_kohya_file_is_as_merged_by_hand(tiny_base, tmp_path, magnitude):
    """Alphas of single layers, convolutions (LoCon) and DoRA's magnitudes, in denoiser and text
    encoder: diffusers' own reader loses all of these.
    """
    found = factors(plain_pipeline(tiny_base))
    save_file(in_kohyas_names(tiny_base, found, magnitude), tmp_path / "a.safetensors")
    save_file(
        in_kohyas_names(tiny_base, found, magnitude, te="lora_te1"), tmp_path / "b.safetensors"
    )
    base, whole = load_backbone(str(tiny_base)), plain_predict(merged(tiny_base, found, magnitude))
    untouched = predict(base)
    first, second = (
        restore(snapshots.read(tmp_path / f"{name}.safetensors"), base, name) for name in "ab"
    )  # beside each other
    for view in (first, second, first):
        torch.testing.assert_close(predict(view), whole, rtol=0, atol=1e-5)
    assert torch.equal(predict(base), untouched) and (whole - untouched).abs().max() > 1e-2
    for part in RANKS:  # each part counts
        assert (
            plain_predict(merged(tiny_base, {part: found[part]}, magnitude)) - whole
        ).abs().max() > 1e-3


@pytest.mark.parametrize(
    "spelled",
    [
        {
            "unet": "unet.{}.lora.{}.weight",
            "text_encoder": "text_encoder.text_model.{}.lora_linear_layer.{}.weight",
        },
        {
            "unet": "unet.{}.{}.weight",
            "text_encoder": "text_encoder.text_model.{}.{}.weight",
            "processors": True,
        },
        {"unet": "{}.lora_{}.weight", "text_encoder": "text_encoder.{}.lora_{}.weight"},
        {
            "unet": "lycoris_{}.lora_{}.weight",
            "text_encoder": "lora_te_text_model_{}.lora_{}.weight",
        },
    ],
)
def test_every_spelling_of_the_same_factors_is_the_same(tiny_base, tmp_path, spelled):
    found = {
        part: {n: (a, b, float(len(a))) for n, (a, b, _) in layers.items()}
        for part, layers in factors(
            plain_pipeline(tiny_base), r"to_[qkv]|to_out\.0|[qkv]_proj|out_proj"
        ).items()
    }
    tensors = {}
    for part, layers in found.items():
        for name, (down, up, _) in layers.items():
            if "processors" in spelled:  # of diffusers before peft
                attention, last = re.fullmatch(
                    r"(.+?)\.((?:to_)?(?:q|k|v|out)(?:_proj|\.0)?)", name
                ).groups()
                last = "to_" + re.search("q|k|v|out", last)[0] + "_lora"
                name = f"{attention}.processor.{last}" if part == "unet" else f"{attention}.{last}"
            if spelled[part].startswith(("lycoris_", "lora_te_")):
                name = name.replace(".", "_")
            tensors |= {
                spelled[part].format(name, "down"): down,
                spelled[part].format(name, "up"): up,
            }
    save_file(tensors, tmp_path / "a.safetensors")
    view = restore(snapshots.read(tmp_path / "a.safetensors"), load_backbone(str(tiny_base)), "any")
    torch.testing.assert_close(
        predict(view), plain_predict(merged(tiny_base, found)), rtol=0, atol=1e-5
    )


def peft_adapters(
    base: Path, folder: Path, parts=("unet", "text_encoder"), seed: int = 0, **settings
):
    """Adapters as peft's own `save_pretrained` writes them, a folder a module; the pipeline with
    them in it.
    """
    from peft import LoraConfig, get_peft_model

    pipe = plain_pipeline(base)
    torch.manual_seed(seed)
    for part in parts:
        targets = ["to_q", "to_v", "conv1"] if part == "unet" else ["q_proj", "fc1"]
        config = LoraConfig(
            **{
                **dict(r=4, lora_alpha=10, target_modules=targets, init_lora_weights=False),
                **settings,
            }
        )
        setattr(pipe, part, get_peft_model(getattr(pipe, part), config))
        getattr(pipe, part).save_pretrained(folder / part)
    return pipe


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"use_rslora": True},
        {"use_dora": True},
        {"lora_bias": True},
        {
            "rank_pattern": {"to_q": 2, "q_proj": 6},
            "alpha_pattern": {"to_q": 9, r"layers\.1\.mlp\.fc1": 3},
        },
    ],
    ids=str,
)
def test_adapters_that_peft_saved_predict_what_they_did(tiny_base, tmp_path, settings):
    pipe = peft_adapters(tiny_base, tmp_path, **settings)
    pipe.text_encoder.eval()
    same_as_plain(tmp_path, tiny_base, pipe)
    pipe.text_encoder = plain_pipeline(tiny_base).text_encoder
    for path in (tmp_path / "unet", tmp_path / "unet/adapter_model.safetensors"):
        same_as_plain(path, tiny_base, pipe)


@pytest.mark.parametrize(
    "settings, say",
    [
        ({"bias": "lora_only"}, "with bias: 'lora_only'.*merge_and_unload"),
        ({"modules_to_save": ["conv_out"]}, "with modules_to_save.*merge_and_unload"),
        (
            {"init_lora_weights": "olora", "target_modules": ["to_q"]},
            "init_lora_weights: 'olora', which changed its base.*merge_and_unload",
        ),
    ],
)
def test_a_peft_adapter_that_is_more_than_its_factors_is_refused(
    tiny_base, tmp_path, settings, say
):
    peft_adapters(tiny_base, tmp_path, ["unet"], **settings)
    base = load_backbone(str(tiny_base))
    untouched = predict(base)
    with pytest.raises(InputError, match=say):
        restore(snapshots.read(tmp_path), base, "any")
    assert torch.equal(predict(base), untouched)


def test_a_peft_adapter_without_its_configuration_or_of_another_rank_is_refused(
    tiny_base, tmp_path
):
    peft_adapters(tiny_base, tmp_path, ["unet"])
    config = tmp_path / "unet/adapter_config.json"
    said = json.loads(config.read_text())
    for change, say in (
        ({"r": 8}, "says that the rank of unet.* is 8, and holds 4"),
        ({"peft_type": "VERA"}, "of the kind VERA"),
        ({"use_dora": True}, "says use_dora: True"),
    ):
        config.write_text(json.dumps(said | change))
        with pytest.raises(InputError, match=say):
            restore(snapshots.read(tmp_path), load_backbone(str(tiny_base)), "any")
    config.unlink()
    with pytest.raises(InputError, match="adapter_config.json, which is missing"):
        restore(
            snapshots.read(tmp_path / "unet/adapter_model.safetensors"),
            load_backbone(str(tiny_base)),
            "any",
        )


@pytest.mark.parametrize(
    "change, say",
    [
        (
            lambda t: t | {"lora_te2_text_model_encoder_layers_0_mlp_fc1.alpha": torch.tensor(1.0)},
            "holds lora_te2_text_model.*, which no layer of",
        ),
        (
            lambda t: t | {"bundle_emb.sks.string_to_param.*": torch.zeros(1, 16)},
            "holds bundle_emb.sks",
        ),
        (
            lambda t: {k: v for k, v in t.items() if k != next(n for n in t if "lora_up" in n)},
            "has no lora_B.weight for the layer",
        ),
        (
            lambda t: {k: v for k, v in t.items() if k != next(n for n in t if "dora_scale" in n)},
            "has no lora_magnitude_vector for the layer",
        ),
        (
            lambda t: {k: v.flatten(1).T if "to_k.dora_scale" in k else v for k, v in t.items()},
            "magnitudes .* are of a layer's inputs",
        ),
        (
            lambda t: t | {"lora_unet_conv_in.scalar": torch.tensor(2.0)},
            "holds lora_unet_conv_in.scalar",
        ),
    ],
)
def test_a_part_that_cannot_act_is_named_and_nothing_stays_behind(tiny_base, tmp_path, change, say):
    save_file(
        {
            k: v.contiguous()
            for k, v in change(
                in_kohyas_names(tiny_base, factors(plain_pipeline(tiny_base)), 1.0)
            ).items()
        },
        tmp_path / "a.safetensors",
    )
    base = load_backbone(str(tiny_base))
    untouched = predict(base)
    with pytest.raises(InputError, match=say):
        restore(snapshots.read(tmp_path / "a.safetensors"), base, "any")
    assert torch.equal(predict(base), untouched) and not any(
        "lora_" in n for n, _ in base.denoiser.named_parameters()
    )


def test_a_foreign_pair_is_loaded_over_one_base(tiny_base, tmp_path):
    for name, alpha in (("early", 4.0), ("late", 4.0)):
        foreign_lora(tiny_base, tmp_path / name, alpha)
    pair = Pair.find(None, str(tmp_path / "early"), str(tmp_path / "late"))
    assert pair.about is None
    loaded = Models.load(pair, str(tiny_base))
    assert loaded.early.denoiser is loaded.late.denoiser
    assert PROMPTS and torch.equal(predict(loaded.base), predict(load_backbone(str(tiny_base))))


def test_what_a_full_checkpoint_holds_beside_is_refused_or_told(tiny_base, tmp_path):
    pipe = plain_pipeline(tiny_base)
    shift(pipe.unet)
    pipe.save_pretrained(tmp_path)
    base, checkpoint = load_backbone(str(tiny_base)), snapshots.read(tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        restore(checkpoint, base, "any")  # the base's own VAE is nothing to speak of
    shift(pipe.vae)
    pipe.vae.save_pretrained(tmp_path / "vae")
    with pytest.warns(UserWarning, match="has another VAE than"):
        restore(checkpoint, base, "any")
    file = tmp_path / "unet/diffusion_pytorch_model.safetensors"
    save_file(load_file(file) | {"more.weight": torch.zeros(1)}, file, metadata={"format": "pt"})
    with pytest.raises(
        InputError, match="holds weights that a UNet2DConditionModel has no place for .more.weight"
    ):
        restore(checkpoint, base, "any")


def test_a_checkpoint_that_predicts_something_else_than_the_base_is_refused(tiny_base, tiny_v_base):
    with pytest.raises(InputError, match="predicts v_prediction, and its base .* epsilon"):
        restore(snapshots.read(tiny_v_base), load_backbone(str(tiny_base)), "any")


# ---------------------------------------------------------------------------- the layout of the hub
@pytest.mark.parametrize("prefix", ["text_model.", ""])
def test_a_full_snapshot_is_what_save_pretrained_writes(tiny_base, mug_photos, tmp_path, prefix):
    """Files of the hub call the text encoder's weights text_model.*; what transformers 5 made alone
    does not, and old snapshots do not.
    """
    base = shutil.copytree(tiny_base, tmp_path / "base")
    text = base / "text_encoder/model.safetensors"
    save_file({prefix + k: v for k, v in load_file(text).items()}, text, metadata={"format": "pt"})
    module = fit(base, mug_photos, tmp_path / "run", Full(text_encoder=True), steps=[1])
    for part, trained, name in (
        ("unet", module.backbone.denoiser, "diffusion_pytorch_model.safetensors"),
        ("text_encoder", module.backbone.parts()["text_encoder"], "model.safetensors"),
    ):
        trained.save_pretrained(tmp_path / part)
        mine, theirs = step(tmp_path / "run", 1) / part, tmp_path / part
        ours, saved = load_file(mine / name), load_file(theirs / name)
        assert ours.keys() == saved.keys() and all(torch.equal(ours[k], saved[k]) for k in saved)
        assert any(k.startswith("text_model.") for k in ours) == (
            part == "text_encoder" and prefix != ""
        )
        said = json.loads((theirs / "config.json").read_text())
        said.pop("_name_or_path", None)  # where the base lay
        assert json.loads((mine / "config.json").read_text()) == said
        with safe_open(mine / name, "pt") as a, safe_open(theirs / name, "pt") as b:
            assert a.metadata() == b.metadata()
    for opened in (base, tiny_base):  # also over a base of the other layout
        view = restore(snapshots.read(step(tmp_path / "run", 1)), load_backbone(str(opened)), "any")
        torch.testing.assert_close(predict(view), predict(module.backbone), **EXACT)


def test_a_lora_names_the_text_encoder_as_other_tools_do(runs):
    keys = [
        k for k in load_file(step(runs("lora-text")[0], 2) / LORA) if k.startswith("text_encoder.")
    ]
    assert keys and all(k.startswith("text_encoder.text_model.encoder.layers.") for k in keys)
