"""Loading of bases, told apart from plain diffusers by nothing, and what a backbone answers: spans,
sites, fingerprints, views.
"""

from __future__ import annotations

import copy
import json
import re
import shutil
import socket
import unicodedata
import warnings
from pathlib import Path

import diffusers
import huggingface_hub
import pytest
import torch
from diffusers import (
    DDIMScheduler,
    EulerDiscreteScheduler,
    PNDMScheduler,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)
from diffusers.utils.import_utils import BACKENDS_MAPPING
from peft import LoraConfig
from safetensors.torch import load_file, save_file
from single_files import TEXT, UNET, VAE, original
from tiny_runs import PROMPTS, contents, fit, plain_pipeline, predict, probe
from torch import Tensor
from transformers import CLIPTextConfig, CLIPTextModel

from dreamblend.blending.module import Blender
from dreamblend.errors import InputError
from dreamblend.models import Backbone, Site, load_backbone, locate_base
from dreamblend.models.noise import noise_of
from dreamblend.models.stable_diffusion import StableDiffusion
from dreamblend.models.text import STOPWORDS
from dreamblend.models.trust import read_config
from dreamblend.sampling import classifier_free, initial_noise, sample
from dreamblend.storage.snapshots import About, read, write
from dreamblend.training import objective
from dreamblend.tuning import Full, LoRA, restore

pytestmark = pytest.mark.filterwarnings("ignore:Already found a `peft_config`")
# The levels of a real Stable Diffusion: no attention at the lowest one but in the middle.
REAL = dict(
    down_block_types=("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",),
    up_block_types=("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3,
)


def unet(
    side: int = 8, channels: tuple[int, ...] = (8, 8, 16, 16), layers: int = 2, **blocks
) -> UNet2DConditionModel:
    torch.manual_seed(5)
    return UNet2DConditionModel(
        sample_size=side,
        block_out_channels=channels,
        layers_per_block=layers,
        cross_attention_dim=16,
        attention_head_dim=2,
        norm_num_groups=4,
        **blocks,
    ).eval()


@pytest.fixture(scope="module")
def real_base(tiny_base, tmp_path_factory) -> Path:
    """A base with a real one's levels and two layers on each."""
    folder = shutil.copytree(tiny_base, tmp_path_factory.mktemp("real") / "base")
    unet(**REAL).save_pretrained(folder / "unet")
    return folder


@pytest.fixture(scope="module")
def loaded(tiny_base) -> Backbone:
    """The tiny base, for tests that leave it as it is."""
    return load_backbone(str(tiny_base))


@pytest.fixture
def copied(tiny_base, tmp_path) -> Path:
    """A base to spoil."""
    return shutil.copytree(tiny_base, tmp_path / "base")


def refused(base: Path | str, config: Path | str | None = None, find=None) -> str:
    """The one sentence for a wrong base, by `find` (locate_base, which reads nothing large) or
    load_backbone.
    """
    with pytest.raises(InputError) as error:
        find(str(base)) if find else load_backbone(str(base), config and str(config))
    message = str(error.value)
    assert "\n" not in message and len(message) < 500 and str(base) in message
    return message


def edit(file: Path, change) -> None:
    tensors = load_file(file)
    save_file(change(tensors) or tensors, file, {"format": "pt"})


# -------------------------------------------------------------------------- equality with diffusers
@pytest.mark.parametrize(
    "fixture, prediction",
    [("tiny_base", "epsilon"), ("tiny_v_base", "v_prediction"), ("real_base", "epsilon")],
)
@pytest.mark.holds("load", of="stable_diffusion")
def test_a_pipeline_folder_says_what_plain_diffusers_says(request, fixture, prediction):
    folder = request.getfixturevalue(fixture)
    before = contents(folder)
    model, pipe = load_backbone(str(folder)), plain_pipeline(folder)
    assert (model.base, model.size, model.latent_shape) == (str(folder), 32, (4, 8, 8))
    assert (
        model.scheduler.config == pipe.scheduler.config
        and model.scheduler.config.prediction_type == prediction
    )
    for module, plain in zip(model.modules(), (pipe.unet, pipe.vae, pipe.text_encoder)):
        assert not any(m.training for m in module.modules()) and not any(
            p.requires_grad for p in module.parameters()
        )
        assert {k: v.dtype for k, v in module.state_dict().items()} == {
            k: v.dtype for k, v in plain.state_dict().items()
        }
        assert all(torch.equal(v, plain.state_dict()[k]) for k, v in module.state_dict().items())
    assert contents(folder) == before

    prompts = [*PROMPTS, "", "a mug " * 40]
    text = model.encode_prompts(prompts).states
    assert torch.equal(text, pipe.encode_prompt(prompts, "cpu", 1, False)[0])
    z, t = probe()
    assert torch.equal(
        model.denoise(z, t, model.encode_prompts(PROMPTS)), pipe.unet(z, t, text[:2]).sample
    )

    pixels = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1
    posterior, factor = pipe.vae.encode(pixels).latent_dist, pipe.vae.config.scaling_factor
    mean, deviation = model.encode(pixels)
    assert mean.shape == (2, *model.latent_shape)
    torch.testing.assert_close(mean / factor, posterior.mean)
    torch.testing.assert_close(deviation / factor, posterior.std)
    torch.testing.assert_close(model.decode(mean), pipe.vae.decode(posterior.mean).sample)


def test_the_vae_s_own_scale_is_used(copied):
    config = json.loads((copied / "vae/config.json").read_text())
    (copied / "vae/config.json").write_text(json.dumps({**config, "scaling_factor": 0.5}))
    model = load_backbone(str(copied))
    pixels = torch.linspace(-1, 1, 3 * 32 * 32).view(1, 3, 32, 32)
    mean, _ = model.encode(pixels)
    torch.testing.assert_close(mean, model.vae.encode(pixels).latent_dist.mean / 2)
    torch.testing.assert_close(model.decode(mean), model.vae.decode(2 * mean).sample)


@pytest.mark.parametrize("variant", [None, "fp16"])
def test_a_folder_saved_in_fp16_is_loaded_in_fp32(tiny_base, loaded, tmp_path, variant):
    plain_pipeline(tiny_base).to(torch.float16).save_pretrained(tmp_path, variant=variant)
    assert all((".fp16." in p.name) == (variant == "fp16") for p in tmp_path.rglob("*.safetensors"))
    model = load_backbone(str(tmp_path))
    for module, exact in zip(model.modules(), loaded.modules()):
        assert {p.dtype for p in module.parameters()} == {torch.float32}
        assert all(
            torch.equal(p, q.half().float())
            for p, q in zip(module.parameters(), exact.parameters())
        )
    torch.testing.assert_close(predict(model), predict(loaded), atol=0.02, rtol=0.02)


def test_a_folder_with_the_names_of_old_saves_loads(copied, loaded):
    """Stable Diffusion 1.5 on the hub: the VAE's attention, the text encoder's prefix and its
    position ids.
    """
    old = {"to_q.": "query.", "to_k.": "key.", "to_v.": "value.", "to_out.0.": "proj_attn."}
    edit(
        copied / VAE,
        lambda t: {
            re.sub("to_[qkv]\\.|to_out\\.0\\.", lambda m: old[m[0]], k): v for k, v in t.items()
        },
    )
    edit(
        copied / TEXT,
        lambda t: (
            {f"text_model.{k}": v for k, v in t.items()}
            | {"text_model.embeddings.position_ids": torch.arange(32)[None]}
        ),
    )
    model = load_backbone(str(copied))
    assert model.fingerprint() == loaded.fingerprint()
    z = probe()[0]
    assert torch.equal(model.decode(z), loaded.decode(z)) and torch.equal(
        predict(model), predict(loaded)
    )


# ------------------------------------------------------------------------------------- single files
@pytest.fixture
def single(tiny_base, tmp_path) -> Path:
    save_file(original(tiny_base), tmp_path / "model.safetensors")
    return tmp_path / "model.safetensors"


@pytest.mark.parametrize("fixture", ["tiny_base", "tiny_v_base", "real_base"])
@pytest.mark.holds("single file", of="stable_diffusion")
def test_a_single_file_is_the_folder_it_was_made_from(request, fixture, tmp_path):
    folder, file = request.getfixturevalue(fixture), tmp_path / "model.safetensors"
    save_file(original(folder), file)
    model, whole = load_backbone(str(file), str(folder)), load_backbone(str(folder))
    assert model.base == str(file) and (model.size, model.latent_shape) == (
        whole.size,
        whole.latent_shape,
    )
    assert model.scheduler.config == whole.scheduler.config
    assert model.fingerprint() == whole.fingerprint()
    torch.testing.assert_close(
        predict(model), predict(whole)
    )  # kernels round by where in memory a weight lies, too
    assert torch.equal(model.encode_prompts(PROMPTS).states, whole.encode_prompts(PROMPTS).states)
    assert torch.equal(model.decode(probe()[0]), whole.decode(probe()[0]))
    assert not any(
        m.training or p.requires_grad
        for part in model.modules()
        for m in part.modules()
        for p in m.parameters()
    )


def test_a_single_file_takes_its_own_weights_and_the_configuration_of_the_folder(
    single, tiny_v_base, loaded
):
    edit(single, lambda t: {k: v.half() if v.is_floating_point() else v for k, v in t.items()})
    model = load_backbone(str(single), str(tiny_v_base))
    assert model.scheduler.config.prediction_type == "v_prediction"
    for module, exact in zip(model.modules(), loaded.modules()):
        assert all(
            torch.equal(v, exact.state_dict()[k].half().float())
            for k, v in module.state_dict().items()
        )


def test_a_single_file_without_its_configuration_names_the_setting(single):
    """The tensors cannot tell image size, prediction or tokens: diffusers takes those of a model on
    the hub.
    """
    message = refused(single)
    assert "model.base_config" in message and "stable-diffusion-v1-5" in message


@pytest.fixture
def lookups(monkeypatch) -> list:
    """Every name that is looked up in a network that is allowed but not there."""
    asked = []

    def nothing(host, *_, **__):
        asked.append(host)
        raise socket.gaierror(-2, "Name or service not known")

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(socket, "getaddrinfo", nothing)
    return asked


def test_what_is_on_disk_asks_no_network(lookups, tiny_base, single):
    load_backbone(str(tiny_base))
    load_backbone(str(single), str(tiny_base))
    assert lookups == []


def test_a_network_that_is_not_there_is_asked_once(lookups, single):
    assert "model.base_config" in refused(single) and len(lookups) == 1
    assert "connection" in refused("no-such-owner/no-such-model") and len(lookups) == 2


@pytest.mark.parametrize("config", ["missing/config", "/missing/config", "missing"])
def test_a_configuration_that_is_not_there_is_named(single, config):
    message = refused(single, config)
    assert f"configuration {config} of" in message and "model.base_config" in message


def test_a_configuration_of_another_size_names_the_setting(single, real_base, tiny_base, tmp_path):
    assert (
        f"{real_base}" in (message := refused(single, real_base)) and "model.base_config" in message
    )
    (tmp_path / "empty").mkdir()
    with pytest.raises(
        InputError, match=f"{re.escape(str(tmp_path / 'empty'))} .*model_index.json"
    ):
        load_backbone(str(single), str(tmp_path / "empty"))
    folder = shutil.copytree(
        tiny_base, tmp_path / "mute", ignore=shutil.ignore_patterns("tokenizer*")
    )
    with pytest.raises(
        InputError, match=f"{re.escape(str(folder / 'tokenizer'))} has no vocabulary"
    ):
        load_backbone(str(single), str(folder))


def test_the_weights_beside_a_configuration_are_not_needed(single, tiny_base, loaded, tmp_path):
    folder = shutil.copytree(
        tiny_base, tmp_path / "config", ignore=shutil.ignore_patterns("*.safetensors")
    )
    assert torch.equal(predict(load_backbone(str(single), str(folder))), predict(loaded))


@pytest.mark.parametrize(
    "prefix, say",
    [
        ("first_stage_model.", "AutoencoderKL"),
        ("first_stage_model.decoder.up.0", "lacks weights"),
        ("model.diffusion_model.middle_block.1.norm", "lacks weights"),
        (
            "cond_stage_model.transformer.text_model.encoder.layers.1",
            "text_encoder lacks encoder.layers.1",
        ),
        ("cond_stage_model.", "CLIPTextModel"),
    ],
)
def test_a_single_file_that_lacks_weights_is_refused(single, tiny_base, tmp_path, prefix, say):
    edit(single, lambda t: {k: v for k, v in t.items() if not k.startswith(prefix)})
    folder = shutil.copytree(
        tiny_base, tmp_path / "config", ignore=shutil.ignore_patterns("*.safetensors")
    )
    assert say in refused(single, folder)


@pytest.mark.parametrize(
    "change, say",
    [
        (lambda t: {f"lora_unet_{i}.lora_up.weight": torch.ones(1) for i in range(2)}, "is a LoRA"),
        (lambda t: {"unet.mid_block.attentions.0.to_q.lora_A.weight": torch.ones(1)}, "is a LoRA"),
        (
            lambda t: {"blocks.0.attn.qkv_x.weight": torch.ones(1)},
            "of the kind mochi",
        ),
        (lambda t: {"conv_in.weight": torch.ones(1)}, "no Stable Diffusion 1.x or 2.x"),
        (
            lambda t: (
                t
                | {
                    "conditioner.embedders.0.model.transformer.resblocks.9.mlp.c_proj.bias": (
                        torch.ones(1)
                    )
                }
            ),
            "xl_refiner",
        ),
        (
            lambda t: (
                t | {"model.diffusion_model.input_blocks.0.0.weight": torch.ones(16, 9, 3, 3)}
            ),
            "inpainting",
        ),
    ],
)
def test_a_single_file_of_something_else_is_known_by_its_header(single, tiny_base, change, say):
    edit(single, change)
    assert say in refused(single, find=locate_base)
    assert say in refused(single, tiny_base)


# -------------------------------------------------------------------------------------- wrong bases
@pytest.mark.parametrize(
    "name",
    [
        "missing",
        "./missing",
        "~/missing/model",
        "/missing",
        "/missing/a.safetensors",
        "missing.safetensors",
        "a/b/c",
    ],
)
def test_a_path_that_is_not_there(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert "does not exist" in refused(name, find=locate_base)


@pytest.mark.parametrize("name", ["model.ckpt", "model.bin", "model.pt", "MODEL.CKPT", "model.pth"])
def test_a_pickle_is_never_opened(name, tmp_path):
    (tmp_path / name).touch()
    for path in (tmp_path / name, f"missing/{name}"):
        assert (
            "pickle" in (message := refused(path, find=locate_base)) and ".safetensors" in message
        )


@pytest.mark.parametrize("name", ["photo.png", "model"])
def test_a_file_of_another_kind(name, tmp_path):
    (tmp_path / name).touch()
    assert "not a .safetensors file" in refused(tmp_path / name, find=locate_base)


@pytest.mark.parametrize("content", [b"", b"hello", b"\xff" * 100])
def test_a_file_that_is_no_safetensors_file(content, tmp_path):
    (tmp_path / "model.safetensors").write_bytes(content)
    assert "is damaged" in refused(tmp_path / "model.safetensors", find=locate_base)


def test_a_single_file_that_is_cut_off(single):
    single.write_bytes(single.read_bytes()[:-100])
    assert "is damaged" in refused(single, find=locate_base)


def test_a_folder_that_is_no_pipeline(tmp_path):
    assert "no model_index.json" in refused(tmp_path, find=locate_base)


@pytest.mark.parametrize(
    "family",
    [
        "KandinskyPipeline",
        "HunyuanDiTPipeline",
        "LTXPipeline",
        "StableDiffusionInpaintPipeline",
        "StableDiffusionUpscalePipeline",
        ["my_pipeline", "StableDiffusionPipeline"],
        None,
    ],
)
def test_another_family_is_known_by_its_index(family, tmp_path):
    (tmp_path / "model_index.json").write_text(json.dumps({"_class_name": family}))
    message = refused(tmp_path, find=locate_base)
    assert str(family) in message and "Stable Diffusion 1.x and 2.x" in message


@pytest.mark.parametrize("index", ["", "{", "[]", "{}", '"text"', b"\xff\xfe"])
def test_a_damaged_index(index, copied):
    (copied / "model_index.json").write_bytes(index if isinstance(index, bytes) else index.encode())
    assert "is damaged" in refused(copied, find=locate_base)


@pytest.mark.parametrize(
    "name",
    [
        UNET,
        VAE,
        TEXT,
        "unet",
        "tokenizer",
        "text_encoder/config.json",
        "unet/config.json",
        "scheduler",
    ],
)
def test_a_folder_that_lacks_something(name, copied):
    shutil.rmtree(copied / name) if (copied / name).is_dir() else (copied / name).unlink()
    message = refused(copied, find=locate_base)
    assert str(copied / name.split("/")[0]) in message and "incomplete" in message


@pytest.mark.parametrize("name", [UNET, VAE, TEXT])
def test_pickled_weights_are_left_alone(name, copied):
    torch.save(load_file(copied / name), (copied / name).with_name("pytorch_model.bin"))
    (copied / name).unlink()
    assert "pickled" in (message := refused(copied, find=locate_base)) and ".safetensors" in message


@pytest.mark.parametrize("name", [UNET, VAE, TEXT])
def test_weights_that_are_cut_off(name, copied):
    (copied / name).write_bytes((copied / name).read_bytes()[:-100])
    assert f"{copied / name} is damaged" in refused(copied, find=locate_base)


@pytest.mark.parametrize(
    "name, lost",
    [
        (UNET, "conv_out.weight"),
        (VAE, "decoder.conv_in.bias"),
        (TEXT, "encoder.layers.0.layer_norm2.weight"),
        (TEXT, "embeddings.token_embedding.weight"),
    ],
)
def test_weights_that_are_not_all_there_are_not_made_up(name, lost, copied):
    edit(copied / name, lambda t: {k: v for k, v in t.items() if k != lost})
    assert lost in (message := refused(copied)) and name.split("/")[0] in message


@pytest.mark.parametrize("name", [UNET, TEXT])
def test_weights_of_another_shape(name, copied):
    edit(
        copied / name,
        lambda t: {k: v[..., :2].contiguous() if v.ndim > 1 else v for k, v in t.items()},
    )
    assert "cannot load the base" in refused(copied)


@pytest.mark.parametrize(
    "name", ["unet/config.json", "text_encoder/config.json", "scheduler/scheduler_config.json"]
)
def test_a_damaged_configuration(name, copied):
    (copied / name).write_text("{")
    assert f"{copied / name} is damaged" in refused(copied, find=locate_base)


def test_a_model_that_takes_more_than_latents_is_refused(copied):
    unet(in_channels=9, **REAL).save_pretrained(copied / "unet")
    assert "9 channels" in refused(copied)


# ------------------------------------------------------------------------------------------ the hub
@pytest.fixture
def cache(tiny_base, tmp_path, monkeypatch):
    """The hub's cache with one repository in it."""

    def put(name: str) -> Path:
        place = tmp_path / "hub" / f"models--{name.replace('/', '--')}"
        (place / "refs").mkdir(parents=True)
        (place / "refs" / "main").write_text("0" * 40)
        return shutil.copytree(tiny_base, place / "snapshots" / ("0" * 40))

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    return put


def test_a_hub_id_that_is_cached_loads_offline(cache, loaded):
    cache("owner/name")
    model = load_backbone("owner/name")
    assert model.base == "owner/name" and model.fingerprint() == loaded.fingerprint()


def test_a_revision_of_a_hub_id_is_the_one_that_loads(cache, loaded, tiny_v_base):
    snapshots = cache("owner/name").parent
    shutil.copytree(tiny_v_base, snapshots / ("1" * 40))
    (snapshots.parent / "refs" / "v2").write_text("1" * 40)
    other = load_backbone(str(tiny_v_base)).fingerprint()
    assert load_backbone("owner/name", revision="v2").fingerprint() == other
    assert load_backbone("owner/name", revision="1" * 40).fingerprint() == other
    assert load_backbone("owner/name").fingerprint() == loaded.fingerprint() != other


def test_a_revision_that_is_not_there_or_of_no_hub_id_is_refused(cache, tiny_base):
    cache("owner/name")
    with pytest.raises(InputError, match="no owner/name of revision v9"):
        load_backbone("owner/name", revision="v9")
    with pytest.raises(InputError, match="model.revision is v9"):
        load_backbone(str(tiny_base), revision="v9")


def add_half(folder: Path, *names: str) -> Path:
    """A base with its weights in half precision beside the plain ones; those of some parts."""
    pipe = plain_pipeline(folder)
    for name in names or ("unet", "vae", "text_encoder"):
        getattr(pipe, name).half().save_pretrained(folder / name, variant="fp16")
    return folder


def halved(model: Backbone) -> list[torch.Tensor]:
    """A model's weights, rounded as files in half precision round them."""
    return [v.half().float() for m in model.modules() for v in m.parameters()]


@pytest.mark.parametrize("where", ["folder", "hub"])
def test_a_variant_is_the_one_that_loads(where, cache, loaded, copied):
    base = str(copied) if where == "folder" else "owner/name"
    add_half(copied if where == "folder" else cache(base))
    half = load_backbone(base, variant="fp16")
    found = [v for m in half.modules() for v in m.parameters()]
    assert all(torch.equal(a, b) for a, b in zip(found, halved(loaded), strict=True))
    assert half.variant == "fp16" and half.denoiser.dtype == torch.float32
    assert load_backbone(base).fingerprint() == loaded.fingerprint() != half.fingerprint()


def test_parts_without_a_variant_are_told_and_read_as_they_are(copied, loaded):
    add_half(copied, "unet")
    with pytest.warns(UserWarning, match="no weights of the variant fp16 for vae, text_encoder"):
        model = load_backbone(str(copied), variant="fp16")
    assert model.fingerprint([model.vae]) == loaded.fingerprint([loaded.vae])
    assert model.fingerprint([model.denoiser]) != loaded.fingerprint([loaded.denoiser])


def test_a_variant_that_is_not_there_is_refused(cache, tiny_base, single):
    cache("owner/name")
    for base, said in (
        (str(tiny_base), "has no weights of that name, such as unet/"),
        ("owner/name", "owner/name has no weights of that name"),
        (str(single), "is one file, which has no variants"),
    ):
        with pytest.raises(InputError, match=f"model.variant is bf16, and .*{said}"):
            load_backbone(base, variant="bf16")


def test_files_of_a_variant_that_are_damaged_are_named(copied):
    add_half(copied)
    half = copied / "unet/diffusion_pytorch_model.fp16.safetensors"
    half.write_bytes(half.read_bytes()[:-100])
    load_backbone(str(copied))
    with pytest.raises(InputError, match="fp16.safetensors"):
        load_backbone(str(copied), variant="fp16")


def test_a_single_file_takes_a_cached_configuration(cache, single, loaded):
    cache("owner/name")
    assert load_backbone(str(single), "owner/name").fingerprint() == loaded.fingerprint()


def test_a_hub_id_of_another_family_is_refused(cache):
    (cache("owner/xl") / "model_index.json").write_text('{"_class_name": "KandinskyPipeline"}')
    with pytest.raises(InputError, match="^owner/xl holds a KandinskyPipeline"):
        load_backbone("owner/xl")


def test_a_hub_id_that_is_cached_in_part_is_refused(cache):
    (cache("owner/name") / UNET).unlink()
    with pytest.raises(InputError, match="unet has no .safetensors weights"):
        load_backbone("owner/name")


def test_a_hub_id_that_is_not_cached(tmp_path, cache):
    for name in ("no-such-owner/no-such-model", "no such/model"):
        message = refused(name)
        assert "hub" in message and "HF_HUB_OFFLINE" in message


# --------------------------------------------------------------------------------- words and tokens
TEXTS = [
    "a photo of sks mug on the beach",
    "A Sks MUG, in the SNOW!!",
    "a teddy-bear's mug; \"quoted\" (really?) next to the 3d-printed rock'n'roll cube...",
    "a zebra beside a zebra and another zebra",
    "un café à Zürich, ÉCOLE straße",
    unicodedata.normalize("NFD", "un café à Zürich"),
    "🍵 a mug🍵with 🎉🎉 tea 杯子 кружка",
    "   a    mug\t\nred   ",
    "mug",
    "the of a",
    "!!! ... 🍵",
    "",
]


def plain(text: str) -> str:
    return "".join(unicodedata.normalize("NFC", text).lower().split())


@pytest.mark.parametrize("prompt", TEXTS)
def test_token_positions_are_those_of_the_word(loaded, prompt):
    ids = loaded.tokenizer(
        prompt, padding="max_length", max_length=loaded.length, truncation=True
    ).input_ids
    end = ids.index(loaded.tokenizer.eos_token_id)
    spans = loaded.spans(prompt)
    for span in spans:
        assert plain(loaded.tokenizer.decode([ids[i] for i in span.tokens])) == plain(span.word)
        assert (
            span.tokens == tuple(range(span.tokens[0], span.tokens[-1] + 1))
            and span.tokens[0] > 0
            and span.tokens[-1] < end
        )
        assert span.word.lower() not in STOPWORDS and span.word in prompt
    taken = [i for span in spans for i in span.tokens]
    assert taken == sorted(set(taken))
    words = [
        w
        for w in re.findall(r"[^\W_]+", unicodedata.normalize("NFC", prompt).lower())
        if w not in STOPWORDS
    ]
    if not loaded.dropped_words(prompt):
        assert [
            w
            for span in spans
            for w in re.findall(r"[^\W_]+", plain(span.word))
            if w not in STOPWORDS
        ] == words


def test_words_and_their_tokens_by_hand(loaded):
    assert [s.word for s in loaded.spans("a teddy-bear's mug, two red mugs")] == [
        "teddy-bear's",
        "mug",
        "two",
        "red",
        "mugs",
    ]
    first, second, third = loaded.spans("zebra Zebra zebra")
    n = len(first.tokens)
    assert n > 1 and [s.tokens[0] for s in (first, second, third)] == [1, 1 + n, 1 + 2 * n]
    assert loaded.spans("") == [] and loaded.dropped_words("") == []


def test_the_words_that_fall_off_a_long_prompt_are_named_in_order(loaded):
    words = [f"{'mug cube zebra beach snow'.split()[i % 5]}{i}" for i in range(200)]
    prompt = " ".join(words)
    spans, dropped = loaded.spans(prompt), loaded.dropped_words(prompt)
    assert len(spans) > 3 and [s.word for s in spans] + dropped == words
    ids = loaded.tokenizer(
        prompt, padding="max_length", max_length=loaded.length, truncation=True
    ).input_ids
    assert (
        len(ids) == loaded.length == loaded.encode_prompts([prompt]).states.shape[1]
        and ids[-1] == loaded.tokenizer.eos_token_id
    )
    assert max(i for s in spans for i in s.tokens) < loaded.length - 1
    for span in spans:
        assert plain(loaded.tokenizer.decode([ids[i] for i in span.tokens])) == span.word
    assert torch.equal(
        loaded.encode_prompts([prompt]).states, loaded.encode_prompts([prompt + " and more"]).states
    )


def test_a_word_is_dropped_where_its_last_token_is(loaded):
    n = len(loaded.spans("zebra")[0].tokens)
    for spare in range(2 * n):
        prompt = "a " * (loaded.length - 2 - spare) + "zebra"
        fits = spare >= n
        assert [s.word for s in loaded.spans(prompt)] == ["zebra"] * fits and loaded.dropped_words(
            prompt
        ) == ["zebra"] * (not fits)


def test_function_words_that_fall_off_are_named_too(loaded):
    assert loaded.dropped_words("mug " * loaded.length + "on the beach")[-3:] == [
        "on",
        "the",
        "beach",
    ]


# -------------------------------------------------------------------------------------------- sites
LAYOUTS = {
    "tiny": dict(
        channels=(16, 32),
        layers=1,
        down_block_types=("CrossAttnDownBlock2D",) * 2,
        up_block_types=("CrossAttnUpBlock2D",) * 2,
    ),
    "real": REAL,
    "real at 12": dict(side=12, **REAL),  # 12, 6, 3 and then 2
    "none at first": dict(
        channels=(8, 8, 8),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    ),
    "deep": dict(
        channels=(8, 8),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        transformer_layers_per_block=(1, 11),
    ),
}


def backbone_of(model: UNet2DConditionModel, like: Backbone) -> StableDiffusion:
    return StableDiffusion(pipe_of(like, model), "a-base")


def pipe_of(like: Backbone, unet: UNet2DConditionModel | None = None) -> StableDiffusionPipeline:
    """The modules of a backbone as diffusers has them."""
    return StableDiffusionPipeline(
        unet=unet or like.denoiser,
        vae=like.vae,
        text_encoder=like.text_encoder,
        tokenizer=like.tokenizer,
        scheduler=like.scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


@pytest.mark.parametrize("layout", LAYOUTS)
def test_sites_are_in_the_order_they_run_with_the_grid_they_see(loaded, layout):
    model, seen = backbone_of(unet(**LAYOUTS[layout]), loaded), []
    layers = {name: m for name, m in model.denoiser.named_modules() if name.endswith("attn2")}
    for name, layer in layers.items():
        layer.register_forward_pre_hook(
            lambda m, args, name=name: seen.append((name, args[0].shape[1]))
        )
    with torch.no_grad():
        model.denoise(
            torch.randn(1, *model.latent_shape), torch.tensor(3), model.encode_prompts(["a mug"])
        )
    assert len(seen) == len(layers) > 2
    assert [(name, site.height * site.width) for name, site in model.sites().items()] == seen
    grids = {site.height for site in model.sites().values()}
    for grid in grids:
        assert list(model.sites(grid).items()) == [
            (name, Site(grid, grid)) for name, queries in seen if queries == grid * grid
        ]
    with pytest.raises(
        InputError, match=f"grid 5 in a-base: it has {re.escape(str(sorted(grids)))}; set `grid`"
    ):
        model.sites(5)


def test_the_real_layout_s_coarsest_grid_is_the_middle_alone_and_not_the_default(loaded):
    model = backbone_of(unet(**REAL), loaded)
    assert list(model.sites(min(site.height for site in model.sites().values()))) == [
        "mid_block.attentions.0.transformer_blocks.0.attn2"
    ]
    assert model.default_grid() == 2 and len(model.sites(2)) == 5
    assert [name.split(".")[0] for name in model.sites()] == ["down_blocks"] * 6 + ["mid_block"] + [
        "up_blocks"
    ] * 9


@pytest.mark.parametrize(
    "name, side, grid",
    [
        ("stable-diffusion-v1-5", 64, 16),
        ("stable-diffusion-v1-5", 96, 24),
        ("stable-diffusion-v1-5", 32, 8),
        ("stable-diffusion-2-1", 96, 24),
        ("stable-diffusion-2-1-base", 64, 16),
    ],
)
def test_the_default_grid_of_real_models_is_a_quarter_of_the_latents(loaded, name, side, grid):
    """As the literature reads: 16 x 16 at 512 pixels, of five layers."""
    with torch.device("meta"):
        # diffusers takes the size of an old version's configuration for a slip
        said = {**REAL_UNETS[name], "sample_size": side, "_diffusers_version": "0.42.0"}
        model = backbone_of(UNet2DConditionModel.from_config(said), loaded)
    assert model.default_grid() == grid and len(model.sites(grid)) == 5


@pytest.mark.parametrize(
    "layout, grid", [("tiny", 4), ("real at 12", 3), ("none at first", 2), ("deep", 4)]
)
def test_the_default_grid_is_one_that_the_model_has(loaded, layout, grid):
    assert backbone_of(unet(**LAYOUTS[layout]), loaded).default_grid() == grid


def test_the_sandbox_reads_half_the_latents_side():
    """A quarter is not there, and its whole side is farther from one."""
    base = load_backbone("sandbox")
    assert (base.latent_shape[1], base.default_grid()) == (16, 8)


# ----------------------------------------------------------------------- configurations as they are
# What the hub's models say: keys of old and new versions of diffusers, values as they stand there.
FIRST = {
    "_class_name": "UNet2DConditionModel",
    "_diffusers_version": "0.6.0",
    "act_fn": "silu",
    "attention_head_dim": 8,
    "block_out_channels": [320, 640, 1280, 1280],
    "center_input_sample": False,
    "cross_attention_dim": 768,
    "down_block_types": [
        "CrossAttnDownBlock2D",
        "CrossAttnDownBlock2D",
        "CrossAttnDownBlock2D",
        "DownBlock2D",
    ],
    "downsample_padding": 1,
    "flip_sin_to_cos": True,
    "freq_shift": 0,
    "in_channels": 4,
    "layers_per_block": 2,
    "mid_block_scale_factor": 1,
    "norm_eps": 1e-05,
    "norm_num_groups": 32,
    "out_channels": 4,
    "sample_size": 64,
    "up_block_types": [
        "UpBlock2D",
        "CrossAttnUpBlock2D",
        "CrossAttnUpBlock2D",
        "CrossAttnUpBlock2D",
    ],
}
SECOND = {
    **FIRST,
    "_diffusers_version": "0.10.0.dev0",
    "attention_head_dim": [5, 10, 20, 20],
    "cross_attention_dim": 1024,
    "dual_cross_attention": False,
    "use_linear_projection": True,
}
NEWER = {
    "class_embed_type": None,
    "num_class_embeds": None,
    "only_cross_attention": [False] * 4,
    "resnet_time_scale_shift": "default",
    "upcast_attention": None,
    "conv_in_kernel": 3,
    "conv_out_kernel": 3,
    "time_cond_proj_dim": None,
    "time_embedding_type": "positional",
    "timestep_post_act": None,
    "mid_block_type": "UNetMidBlock2DCrossAttn",
    "projection_class_embeddings_input_dim": None,
}
REAL_UNETS = {
    "stable-diffusion-v1-4": {**FIRST, "_diffusers_version": "0.2.2"},
    "stable-diffusion-v1-5": FIRST,
    "stable-diffusion-2-base": SECOND,
    "stable-diffusion-2": {**SECOND, "_diffusers_version": "0.8.0", "sample_size": 96},
    "stable-diffusion-2-1-base": (
        SECOND
        | {
            "only_cross_attention": False,
            "num_class_embeds": None,
            "upcast_attention": False,
        }
    ),
    "stable-diffusion-2-1": (
        {**SECOND, "sample_size": 96}
        | {"only_cross_attention": False, "num_class_embeds": None, "upcast_attention": True}
    ),
    "sd-turbo": {**SECOND, **NEWER, "_diffusers_version": "0.24.0.dev0"},
    "a fine-tune of 1.5": {
        **FIRST,
        **NEWER,
        "_diffusers_version": "0.17.0",
        "_name_or_path": "./out",
    },
    "an LCM": {**FIRST, **NEWER, "_diffusers_version": "0.22.0.dev0", "time_cond_proj_dim": 256},
}
NOISE = {
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "num_train_timesteps": 1000,
    "trained_betas": None,
}
PLMS = {
    **NOISE,
    "_class_name": "PNDMScheduler",
    "set_alpha_to_one": False,
    "skip_prk_steps": True,
    "steps_offset": 1,
    "clip_sample": False,
}
DPM = {
    **NOISE,
    "_class_name": "DPMSolverMultistepScheduler",
    "algorithm_type": "dpmsolver++",
    "dynamic_thresholding_ratio": 0.995,
    "lambda_min_clipped": float("-inf"),
    "lower_order_final": True,
    "prediction_type": "epsilon",
    "sample_max_value": 1.0,
    "solver_order": 2,
    "solver_type": "midpoint",
    "steps_offset": 1,
    "thresholding": False,
    "timestep_spacing": "leading",
    "use_karras_sigmas": True,
    "variance_type": None,
    "clip_sample": False,
    "set_alpha_to_one": False,
    "skip_prk_steps": True,
}
LMS = {**NOISE, "_class_name": "LMSDiscreteScheduler", "_diffusers_version": "0.6.0"}
REAL_SCHEDULERS = {
    "stable-diffusion-v1-4": {**PLMS, "_diffusers_version": "0.7.0.dev0"},
    "stable-diffusion-v1-5": {**PLMS, "_diffusers_version": "0.6.0"},
    "stable-diffusion-2-base": {
        **PLMS,
        "_diffusers_version": "0.8.0",
        "prediction_type": "epsilon",
    },
    "stable-diffusion-2": {
        **NOISE,
        "_class_name": "DDIMScheduler",
        "clip_sample": False,
        "set_alpha_to_one": False,
        "steps_offset": 1,
        "skip_prk_steps": True,
        "prediction_type": "v_prediction",
    },
    "stable-diffusion-2-1-base": {
        **PLMS,
        "_diffusers_version": "0.10.0.dev0",
        "prediction_type": "epsilon",
    },
    "stable-diffusion-2-1": {
        **NOISE,
        "_class_name": "DDIMScheduler",
        "clip_sample": False,
        "set_alpha_to_one": False,
        "steps_offset": 1,
        "skip_prk_steps": True,
        "prediction_type": "v_prediction",
    },
    "sd-turbo": {
        **NOISE,
        "_class_name": "EulerDiscreteScheduler",
        "interpolation_type": "linear",
        "prediction_type": "epsilon",
        "steps_offset": 1,
        "timestep_spacing": "trailing",
        "use_karras_sigmas": False,
        "sample_max_value": 1.0,
        "set_alpha_to_one": False,
        "clip_sample": False,
    },
    "a fine-tune of 1.5": DPM,
    "an LCM": {
        **NOISE,
        "_class_name": "LCMScheduler",
        "clip_sample": False,
        "clip_sample_range": 1.0,
        "dynamic_thresholding_ratio": 0.995,
        "original_inference_steps": 50,
        "prediction_type": "epsilon",
        "rescale_betas_zero_snr": False,
        "sample_max_value": 1.0,
        "set_alpha_to_one": True,
        "steps_offset": 0,
        "thresholding": False,
        "timestep_spacing": "leading",
    },
}
CHECKER = {
    "safety_checker": ["stable_diffusion", "StableDiffusionSafetyChecker"],
    "feature_extractor": ["transformers", "CLIPFeatureExtractor"],
}
REAL_INDICES = {
    "stable-diffusion-v1-4": CHECKER,
    "stable-diffusion-v1-5": CHECKER,
    "a fine-tune of 1.5": {
        **CHECKER,
        "safety_checker": [None, None],
        "image_encoder": [None, None],
        "requires_safety_checker": False,
        "_name_or_path": "x",
    },
    "stable-diffusion-2-1": {
        "feature_extractor": ["transformers", "CLIPImageProcessor"],
        "requires_safety_checker": False,
        "safety_checker": [None, None],
    },
}


@pytest.mark.filterwarnings("ignore::FutureWarning")  # of diffusers, about its own old keys
@pytest.mark.parametrize("name", REAL_UNETS)
def test_a_model_with_the_configuration_of_a_real_one_loads(name, copied):
    """Its sizes are made small; all else is as it stands on the hub."""
    full, scheduler = REAL_UNETS[name], REAL_SCHEDULERS[name]
    put(copied / "unet/config.json", full)
    put(copied / "scheduler/scheduler_config.json", scheduler)
    index = json.loads((copied / "model_index.json").read_text())
    put(
        copied / "model_index.json",
        {
            **index,
            **REAL_INDICES.get(name, {}),
            "_diffusers_version": "0.6.0",
            "scheduler": ["diffusers", scheduler["_class_name"]],
        },
    )
    assert read_config(copied / "unet/config.json") == full and locate_base(str(copied)) == str(
        copied
    )
    heads = full["attention_head_dim"]
    small = {
        "block_out_channels": [20, 40, 80, 80] if isinstance(heads, list) else [8, 8, 16, 16],
        "norm_num_groups": 4,
        "cross_attention_dim": 16,
    }
    torch.manual_seed(0)
    UNet2DConditionModel.from_config({**full, **small}).save_pretrained(copied / "unet")
    put(copied / "unet/config.json", {**full, **small})
    model = load_backbone(str(copied))
    assert (
        model.latent_shape == (4, full["sample_size"], full["sample_size"])
        and model.default_grid() == full["sample_size"] // 4
    )
    assert type(model.scheduler).__name__ == scheduler["_class_name"]
    assert noise_of(model.scheduler).prediction == scheduler.get(
        "prediction_type", "epsilon"
    ) and model.distilled == (name == "an LCM")
    assert predict(model.replaced()).isfinite().all()


def put(file: Path, said: dict) -> None:
    file.write_text(json.dumps(said))


@pytest.mark.parametrize("said, side", [([8, 8], 8), (None, 8), (8, 8)])
def test_a_sample_size_is_a_number_a_pair_or_the_vae_s(copied, said, side):
    put(
        copied / "unet/config.json",
        {**json.loads((copied / "unet/config.json").read_text()), "sample_size": said},
    )
    model = load_backbone(str(copied))
    assert (model.latent_shape, model.size) == ((4, side, side), 32)


def test_a_model_of_wide_images_is_refused(copied):
    put(
        copied / "unet/config.json",
        {**json.loads((copied / "unet/config.json").read_text()), "sample_size": [8, 12]},
    )
    assert "48 x 32 pixels" in (message := refused(copied)) and "square" in message


@pytest.mark.parametrize(
    "kind, package", [("LMSDiscreteScheduler", "scipy"), ("DPMSolverSDEScheduler", "torchsde")]
)
def test_a_sampler_whose_package_is_not_there_is_named_and_another_draws(
    copied, monkeypatch, kind, package
):
    from diffusers.utils import dummy_torch_and_scipy_objects, dummy_torch_and_torchsde_objects

    dummies = {"scipy": dummy_torch_and_scipy_objects, "torchsde": dummy_torch_and_torchsde_objects}
    monkeypatch.setattr(
        diffusers, kind, getattr(dummies[package], kind)
    )  # as where the package is not installed
    monkeypatch.setattr(
        "diffusers.utils.import_utils.BACKENDS_MAPPING",
        {**BACKENDS_MAPPING, package: (lambda: False, BACKENDS_MAPPING[package][1])},
    )
    put(
        copied / "scheduler/scheduler_config.json",
        {**LMS, "_class_name": kind, "prediction_type": "v_prediction"},
    )
    put(
        copied / "model_index.json",
        {**json.loads((copied / "model_index.json").read_text()), "scheduler": ["diffusers", kind]},
    )
    with pytest.warns(
        UserWarning, match=f"{kind} requires the {package} library.*EulerDiscreteScheduler"
    ) as told:
        model = load_backbone(str(copied))
    assert len(str(next(w for w in told if package in str(w.message)).message).splitlines()) == 1
    noise = noise_of(model.scheduler)
    prediction, alpha = noise.prediction, noise.alpha
    plain = DDIMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
    assert prediction == "v_prediction" and torch.equal(alpha, plain.alphas_cumprod.sqrt())


# ----------------------------------------------------------------------------- what a base predicts
def marked(file: Path, *tensors: str, **metadata: str) -> Path:
    said = {key.replace("__", "."): value for key, value in metadata.items()}
    save_file(
        load_file(file) | {name: torch.tensor([]) for name in tensors},
        file,
        {"format": "pt", **said},
    )
    return file


V = [
    (["v_pred"], {}),
    ([], {"modelspec__prediction_type": "v"}),
    ([], {"modelspec__predict_key": "v"}),
    ([], {"modelspec__architecture": "stable-diffusion-v2-768-v"}),
    ([], {"ss_v_parameterization": "True"}),
]


@pytest.mark.parametrize("tensors, metadata", V)
def test_the_marks_of_a_single_file_say_what_it_predicts(single, tiny_base, tensors, metadata):
    marked(single, *tensors, **metadata)
    with pytest.warns(
        UserWarning, match="predicts v_prediction by its own marks .*epsilon by its configuration"
    ):
        model = load_backbone(str(single), str(tiny_base))
    assert (
        noise_of(model.scheduler).prediction == "v_prediction"
        and type(model.scheduler) is DDIMScheduler
    )


@pytest.mark.filterwarnings("error::UserWarning")
@pytest.mark.parametrize(
    "metadata",
    [
        {},
        {"modelspec__architecture": "stable-diffusion-v1"},
        {"modelspec__prediction_type": "epsilon"},
        {"ss_v_parameterization": "False"},
    ],
)
def test_marks_that_agree_with_the_configuration_are_silent(single, tiny_base, metadata):
    model = load_backbone(str(marked(single, **metadata)), str(tiny_base))
    assert noise_of(model.scheduler).prediction == "epsilon"


def test_marks_that_contradict_each_other_are_told_and_the_setting_decides(single, tiny_base):
    marked(single, "v_pred", modelspec__prediction_type="epsilon")
    assert (
        "model.base_prediction" in (message := refused(single, tiny_base))
        and "v_pred says v_prediction" in message
    )
    for prediction in ("epsilon", "v_prediction"):
        with pytest.warns(
            UserWarning, match=f"predicts {prediction}, as model.base_prediction says"
        ):
            assert (
                noise_of(
                    load_backbone(str(single), str(tiny_base), prediction).scheduler
                ).prediction
                == prediction
            )


def test_the_setting_counts_for_a_folder_too_and_is_checked(tiny_base):
    with pytest.warns(
        UserWarning,
        match=(
            "predicts v_prediction, as model.base_prediction says, and its own scheduler says"
            " epsilon"
        ),
    ):
        assert (
            noise_of(load_backbone(str(tiny_base), None, "v_prediction").scheduler).prediction
            == "v_prediction"
        )
    with pytest.raises(
        InputError, match="model.base_prediction is 'v': it is one of epsilon, v_prediction"
    ):
        load_backbone(str(tiny_base), None, "v")


@pytest.mark.filterwarnings("ignore:.*as model.base_prediction says")
def test_the_setting_of_a_run_is_kept_for_its_blends_and_a_blend_has_its_own(
    tiny_base, mug_photos, tmp_path
):
    module = fit(
        tiny_base, mug_photos, tmp_path, LoRA(rank=2), steps=[1, 2], base_prediction="v_prediction"
    )
    assert module.noise.prediction == "v_prediction"
    provenances = []
    for own, prediction in (({}, "v_prediction"), ({"base_prediction": "epsilon"}, "epsilon")):
        blender = Blender("1", "2", tmp_path, **own)
        provenances.append(blender.settings["scheduler"])
        blender.load()
        assert {
            noise_of(m.scheduler).prediction for m in (blender.models.early, blender.models.late)
        } == {prediction}
    assert (
        provenances[0] != provenances[1]
    )  # images of one prediction are not taken for those of the other


def test_training_a_distilled_model_is_refused(copied, mug_photos, tmp_path):
    UNet2DConditionModel.from_config(
        {**UNet2DConditionModel.load_config(copied / "unet"), "time_cond_proj_dim": 16}
    ).save_pretrained(copied / "unet")
    with pytest.raises(InputError, match="is a distilled model"):
        fit(copied, mug_photos, tmp_path / "run")


@pytest.mark.parametrize("kind", [DDIMScheduler, PNDMScheduler, EulerDiscreteScheduler])
def test_zero_terminal_snr_is_trained_and_drawn_with_finite_numbers(
    single, tiny_base, tmp_path, kind
):
    folder = shutil.copytree(tiny_base, tmp_path / "config")
    kind.from_config(
        DDIMScheduler.load_config(folder / "scheduler"),
        prediction_type="v_prediction",
        skip_prk_steps=True,
    ).save_pretrained(folder / "scheduler")
    put(
        folder / "model_index.json",
        {
            **json.loads((folder / "model_index.json").read_text()),
            "scheduler": ["diffusers", kind.__name__],
        },
    )
    model = load_backbone(str(marked(single, "v_pred", "ztsnr")), str(folder))
    assert (
        type(model.scheduler) is (DDIMScheduler if kind is PNDMScheduler else kind)
        and model.scheduler.config.timestep_spacing == "trailing"
    )
    noise = noise_of(model.scheduler)
    prediction, alpha, sigma = noise.prediction, noise.alpha, noise.sigma
    assert (
        prediction == "v_prediction" and alpha[-1] < 1e-3 and sigma[-1] > 0.9999 and alpha[0] > 0.99
    )
    for levels in (alpha, sigma, objective.min_snr_weight(prediction, alpha, sigma, 5.0)):
        assert levels.isfinite().all()
    text, noise = model.encode_prompts(PROMPTS), initial_noise(model.latent_shape, [1, 2])
    z = sample(
        classifier_free(model, text, model.encode_prompts([""] * 2), 4.0), noise, model.schedule(3)
    )
    assert z.isfinite().all()


def test_zero_terminal_snr_of_an_epsilon_model_is_a_contradiction(single, tiny_base):
    marked(single, "ztsnr")
    assert (
        "zero terminal SNR" in (message := refused(single, tiny_base))
        and "model.base_prediction" in message
    )
    assert (
        noise_of(load_backbone(str(single), str(tiny_base), "epsilon").scheduler).alpha[-1] > 0.01
    )  # the user's word: the mark is wrong


@pytest.fixture
def second(tiny_base, cache, tmp_path) -> Path:
    """A single file of Stable Diffusion 2's text width, whose configuration diffusers takes from a
    repository with 768-pixel images.
    """
    folder = cache("stabilityai/stable-diffusion-2-1")
    torch.manual_seed(0)
    UNet2DConditionModel.from_config(
        {
            **UNet2DConditionModel.load_config(folder / "unet"),
            "cross_attention_dim": 1024,
            "sample_size": 192,
            "block_out_channels": [8, 8, 8, 8],
            "down_block_types": REAL["down_block_types"],
            "up_block_types": REAL["up_block_types"],
            "layers_per_block": 2,
        }
    ).save_pretrained(folder / "unet")
    text = CLIPTextModel(
        CLIPTextConfig(
            **{
                **json.loads((folder / "text_encoder/config.json").read_text()),
                "hidden_size": 1024,
                "num_hidden_layers": 1,
            }
        )
    )
    text.save_pretrained(folder / "text_encoder")
    DDIMScheduler.from_config(
        DDIMScheduler.load_config(folder / "scheduler"), prediction_type="v_prediction"
    ).save_pretrained(folder / "scheduler")
    file = tmp_path / "second.safetensors"
    save_file(original(folder), file)
    return file


@pytest.mark.parametrize(
    "metadata, wanted, prediction, size",
    [
        ({}, None, "v_prediction", 768),
        ({}, "epsilon", "epsilon", 512),
        ({"modelspec__architecture": "stable-diffusion-v2-512"}, None, "epsilon", 512),
        ({"modelspec__architecture": "stable-diffusion-v2-768-v"}, None, "v_prediction", 768),
        (
            {"modelspec__prediction_type": "v", "modelspec__resolution": "512x512"},
            None,
            "v_prediction",
            512,
        ),
    ],
)
def test_a_file_of_stable_diffusion_2_is_told_by_its_marks_or_the_setting(
    second, metadata, wanted, prediction, size
):
    marked(second, **metadata)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        model = load_backbone(str(second), None, wanted)
    assert (
        noise_of(model.scheduler).prediction == prediction
        and model.size == size
        and model.latent_shape[1] == size // 4
    )
    asked = [str(w.message) for w in told if "model.base_prediction" in str(w.message)]
    assert len(asked) == (not metadata and not wanted)


# -------------------------------------------------------------------------------------- fingerprint
def test_the_fingerprint_is_of_the_weights(tiny_base, tiny_v_base, loaded, tmp_path):
    again = load_backbone(str(tiny_base))
    assert (
        again.fingerprint() == loaded.fingerprint() != load_backbone(str(tiny_v_base)).fingerprint()
    )
    plain_pipeline(tiny_base).save_pretrained(tmp_path)
    assert load_backbone(str(tmp_path)).fingerprint() == loaded.fingerprint()
    again.vae.decoder.conv_in.weight.add_(1)  # which no method trains
    assert again.fingerprint() == loaded.fingerprint()
    predict(again.to(dtype=torch.float64).to(dtype=torch.float32))
    assert again.fingerprint() == loaded.fingerprint()


@pytest.mark.parametrize("module", ["unet", "text_encoder"])
def test_the_fingerprint_tells_every_changed_tensor(loaded, module):
    model = loaded.replaced(**{module: copy.deepcopy(loaded.parts()[module])})
    part = model.parts()[module]
    seen = {before := model.fingerprint()}
    for parameter in list(part.parameters())[::7]:
        kept = parameter.clone()
        parameter.mul_(1.01).add_(1e-3)
        seen.add(model.fingerprint())
        parameter.copy_(kept)
    assert len(seen) == 1 + len(list(part.parameters())[::7]) and model.fingerprint() == before


# -------------------------------------------------------------------------- other modules, adapters
class TwoEncoders(StableDiffusion):
    """A family with a second text encoder, as SDXL has, whose states follow the first's."""

    def __init__(self, pipe: StableDiffusionPipeline):
        super().__init__(pipe, "two-encoders")
        self._parts["text_encoder_2"] = copy.deepcopy(pipe.text_encoder)


def test_a_second_text_encoder_trains_is_saved_and_comes_back(loaded, tmp_path):
    """All that goes over what trains goes over every part."""
    model = TwoEncoders(pipe_of(loaded))
    assert list(model.text_encoders) == ["text_encoder", "text_encoder_2"]
    for method in (Full(text_encoder=True), LoRA(text_encoder=True)):
        tuned = model.replaced(**{n: copy.deepcopy(m) for n, m in model.parts().items()})
        method.attach(tuned)
        assert list(method.trained(tuned)) == ["unet", "text_encoder", "text_encoder_2"]
        for module in method.trained(tuned).values():
            assert any(p.requires_grad for p in module.parameters())
        with torch.no_grad():
            for p in method.parameters(tuned):
                p.add_(0.1)
        wanted = {n: m.state_dict() for n, m in method.trained(tuned).items()}
        about = About(1, method.name, "b", tuned.fingerprint(), "sks", "mug", "fp32", 0)
        path = write(tmp_path / method.name, about, method.export(tuned))
        again = restore(read(path), model, "early")
        again.activate()
        for name, state in wanted.items():
            there = again.parts()[name].state_dict()
            for key, value in state.items():
                assert torch.equal(there[key.replace(".tuned.", ".early.")], value)
        model.forget("early")


def test_replaced_modules_leave_the_original_as_it_was(loaded):
    before = predict(loaded)
    frozen = {name: p.clone() for name, p in loaded.denoiser.named_parameters()}
    denoiser, encoder = (
        copy.deepcopy(m).requires_grad_(True).train().double()
        for m in (loaded.denoiser, loaded.parts()["text_encoder"])
    )
    for module in (denoiser, encoder):
        with torch.no_grad():
            for p in module.parameters():
                p.mul_(1.5)
    for modules in (
        {"unet": denoiser},
        {"text_encoder": encoder},
        {"unet": denoiser, "text_encoder": encoder},
    ):
        other = loaded.replaced(**modules)
        assert other.denoiser is modules.get("unet", loaded.denoiser)
        assert other.parts()["text_encoder"] is modules.get(
            "text_encoder", loaded.parts()["text_encoder"]
        )
        assert (
            other.vae is loaded.vae
            and other.scheduler is loaded.scheduler
            and other.base == loaded.base
        )
        for module in modules.values():
            assert not any(m.training for m in module.modules())
            assert all(
                p.dtype == torch.float32 and not p.requires_grad for p in module.parameters()
            )
        assert (
            not torch.allclose(predict(other), before, atol=1e-3)
            and other.fingerprint() != loaded.fingerprint()
        )
    z, t = probe()
    with torch.no_grad():
        assert torch.equal(
            predict(other), denoiser(z, t, other.encode_prompts(PROMPTS).states).sample
        )
    assert torch.equal(predict(loaded), before) and all(
        torch.equal(p, frozen[name]) for name, p in loaded.denoiser.named_parameters()
    )
    same = loaded.replaced()
    assert same is not loaded and same.denoiser is loaded.denoiser


@pytest.fixture
def adapted(loaded) -> Backbone:
    """A copy with two random LoRA adapters on the denoiser; `late` is on the text encoder too."""
    other = loaded.replaced(
        unet=copy.deepcopy(loaded.denoiser),
        text_encoder=copy.deepcopy(loaded.parts()["text_encoder"]),
    )
    for name, module in (
        ("early", other.denoiser),
        ("late", other.denoiser),
        ("late", other.parts()["text_encoder"]),
    ):
        adapt(module, name)
    other._active["adapters"] = {"?": 1.0}  # diffusers leaves the last one active
    return other


def adapt(module: torch.nn.Module, name: str) -> None:
    torch.manual_seed(len(name))
    targets = ["to_q", "to_v"] if isinstance(module, UNet2DConditionModel) else ["q_proj", "v_proj"]
    module.add_adapter(
        LoraConfig(r=2, lora_alpha=8, target_modules=targets, init_lora_weights=False),
        adapter_name=name,
    )


def apart(*outputs: Tensor) -> bool:
    return all((a - b).abs().max() > 1e-3 for i, a in enumerate(outputs) for b in outputs[:i])


def test_views_switch_the_shared_modules(adapted, loaded):
    adapters = {
        "early": {"early": 1.0},
        "late": {"late": 1.0},
        "both": {"early": 0.5, "late": 0.5},
        "off": {},
    }
    views = {name: adapted.bind(weights) for name, weights in adapters.items()}
    assert all(view.denoiser is adapted.denoiser for view in views.values())
    first = {name: predict(view) for name, view in views.items()}
    assert apart(*first.values())
    assert torch.equal(first["off"], predict(loaded))
    for name in ("late", "early", "off", "both", "late", "off", "early"):
        assert torch.equal(predict(views[name]), first[name])
    assert torch.equal(predict(adapted), predict(loaded))  # with no word of adapters it is the base
    assert torch.equal(
        views["early"].encode_prompts(PROMPTS).states, loaded.encode_prompts(PROMPTS).states
    )
    assert apart(
        views["late"].encode_prompts(PROMPTS).states, loaded.encode_prompts(PROMPTS).states
    )
    assert not any(p.requires_grad for module in adapted.modules() for p in module.parameters())


def test_the_weight_of_an_adapter_scales_what_it_adds(adapted):
    name = next(iter(adapted.sites())) + ".to_q"
    layer, x = adapted.denoiser.get_submodule(name), torch.randn(3, 16)

    def out(adapters: dict[str, float]) -> Tensor:
        adapted.bind(adapters).activate()
        return layer(x)

    plain, early, late = out({}), out({"early": 1.0}), out({"late": 1.0})
    torch.testing.assert_close(
        out({"early": 0.25, "late": 2.0}), plain + 0.25 * (early - plain) + 2 * (late - plain)
    )
    torch.testing.assert_close(out({"early": 0.0}), plain)
    assert torch.equal(out({"early": 1.0}), early)


@pytest.mark.parametrize("active", [{"early": 1.0}, {"late": 1.0}, {"early": 1.0, "late": 1.0}, {}])
@pytest.mark.parametrize("name", ["early", "late"])
def test_a_forgotten_adapter_is_gone_and_the_base_is_the_base(adapted, loaded, active, name):
    other = {"early": "late", "late": "early"}[name]
    kept, base = predict(adapted.bind({other: 1.0})), predict(loaded)
    predict(adapted.bind(active))
    adapted.forget(name)
    for module in adapted.parts().values():
        assert name not in (getattr(module, "peft_config", None) or {}) and not any(
            f".{name}." in k for k in module.state_dict()
        )
    assert torch.equal(predict(adapted), base)
    assert torch.equal(predict(adapted.bind({other: 1.0})), kept) and torch.equal(
        predict(adapted.bind({})), base
    )
    adapted.forget(other)
    assert torch.equal(predict(adapted), base) and torch.equal(predict(adapted.bind({})), base)
    adapt(adapted.denoiser, name)  # the name is free again
    adapted._active["adapters"] = {"?": 1.0}
    assert apart(predict(adapted.bind({name: 1.0})), base) and torch.equal(
        predict(adapted.bind({})), base
    )


def test_forgetting_what_is_not_there_changes_nothing(adapted, loaded):
    view = adapted.bind({"late": 1.0})
    before = predict(view)
    adapted.forget("other")
    assert torch.equal(predict(view), before)
    whole = predict(loaded)
    loaded.forget("other")
    assert torch.equal(predict(loaded), whole)


def test_the_fingerprint_does_not_count_adapters(adapted, loaded):
    for adapters in ({}, {"early": 1.0}, {"early": 1.0, "late": 0.5}):
        predict(adapted.bind(adapters))
        assert adapted.fingerprint() == loaded.fingerprint()
    for name in ("early", "late"):
        adapted.forget(name)
        assert adapted.fingerprint() == loaded.fingerprint()


def test_an_adapter_in_training_is_left_alone(loaded):
    """A backbone that has no word of adapters, as a tuner's, keeps those it was given active and in
    training.
    """
    model = loaded.replaced(unet=copy.deepcopy(loaded.denoiser))
    adapt(model.denoiser, "tuned")
    z, t = probe()
    model.denoise(z, t, model.encode_prompts(PROMPTS)).sum().backward()
    trained = [p for name, p in model.denoiser.named_parameters() if "lora_" in name]
    assert trained and all(p.requires_grad and p.grad is not None for p in trained)
    model.forget("other")
    assert apart(predict(model), predict(loaded)) and all(p.requires_grad for p in trained)


def test_encoded_prompts_carry_gradients_where_the_text_encoder_trains(loaded):
    model = loaded.replaced(text_encoder=copy.deepcopy(loaded.parts()["text_encoder"]))
    assert not model.encode_prompts(PROMPTS).states.requires_grad
    model.parts()["text_encoder"].requires_grad_(True)
    model.encode_prompts(PROMPTS).states.sum().backward()
    assert model.parts()["text_encoder"].embeddings.token_embedding.weight.grad.abs().sum() > 0


def test_a_loaded_base_does_not_use_the_kernel_of_wrong_gradients(tiny_base):
    torch.backends.cuda.enable_cudnn_sdp(True)
    load_backbone(str(tiny_base))
    assert not torch.backends.cuda.cudnn_sdp_enabled()
