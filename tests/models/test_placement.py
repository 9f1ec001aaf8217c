"""Where weights lie and in what form: the same images, near them where weights are quantised."""

from __future__ import annotations

import functools
import json

import pytest
import torch
from diffusers import UNet2DConditionModel
from families import save_family
from pretend import ON_PRETEND, pretend_device
from tiny_runs import blend_words, command, fit, step

from blend import main as blend
from dreamblend.attention import record
from dreamblend.blending.blends import Merge, Score
from dreamblend.blending.module import Blender
from dreamblend.errors import InputError
from dreamblend.models import load_backbone, placement
from dreamblend.models.compiled import compile_blocks
from dreamblend.models.placement import QUANTISERS
from dreamblend.sampling import initial_noise
from dreamblend.selection.survey import Survey
from dreamblend.storage import snapshots
from dreamblend.training.encoded import EncodedPrompts
from dreamblend.tuning import Full, LoRA, restore

PROMPTS = ["a sks mug", "a red cube in the snow"]
SMALL = 64  # pixels, as the tiny autoencoders take them


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("families")
    return functools.partial(lambda name: save_family(name, root))


@pytest.fixture
def small(monkeypatch):
    """Bases whose own size is small: the pipelines of most families say 1024 pixels."""

    def load(*args, **options):
        model = load_backbone(*args, **options)
        factor = model.pixels_a_latent
        model.latent_shape = (model.latent_shape[0], SMALL // factor, SMALL // factor)
        model.size = SMALL
        return model

    for module in ("blending.models", "training.module"):
        monkeypatch.setattr(f"dreamblend.{module}.load_backbone", load)
    return load


@torch.no_grad()
def prediction(model) -> torch.Tensor:
    noise = initial_noise(model.latent_shape, [1, 2])
    t = torch.tensor([100.0, 700.0])
    return model.denoise(noise, t, model.encode_prompts(PROMPTS)).float()


def likeness(a: torch.Tensor, b: torch.Tensor) -> float:
    return torch.cosine_similarity(a.flatten(), b.flatten(), 0).item()


# ---------------------------------------------------------------------------------------- quantised
@pytest.mark.parametrize(("kind", "least"), [("int8", 0.99), ("nf4", 0.7)])
def test_a_lora_trains_over_quantised_weights_and_blends(
    kind, least, folder, mug_photos, tmp_path, small
):
    """Its snapshots are those of the full base: they load over it, quantised or not."""
    pytest.importorskip(QUANTISERS[kind])
    base = folder("flux_dev")
    trained = fit(base, mug_photos, tmp_path, LoRA(rank=2), steps=[1, 3], quantize=kind)
    block = trained.backbone.denoiser.transformer_blocks[0]
    for layer in (block.attn.to_q.base_layer, block.ff.net[2]):
        assert type(layer.weight) is not torch.nn.Parameter and not layer.weight.requires_grad
    snapshot, full = snapshots.read(step(tmp_path, 3)), small(str(base))
    assert snapshot.about.base_hash == full.fingerprint()
    assert snapshot.about.settings["quantize"] == kind

    quantised = small(str(base))
    placement.quantise(quantised, kind, torch.float32)
    late = restore(snapshot, quantised, "late")
    ours = prediction(trained.backbone)
    torch.testing.assert_close(prediction(late), ours, atol=1e-5, rtol=1e-5)
    assert not torch.equal(prediction(late.bare()), ours)  # the adapter acts
    exact = prediction(restore(snapshot, full, "late"))
    assert least < likeness(ours, exact) < 1 - 1e-6

    blender = Blender(
        "1",
        "3",
        run=tmp_path,
        blend=Score(),
        num_inference_steps=2,
        quantize=kind,
        dtype="fp32",
    )
    pictures = blender.draw([("a sks mug on the beach", 7)], 1)
    assert [picture.kind for picture in pictures] == ["early", "score", "late"]
    assert blender.settings["quantize"] == kind
    early = blender.models.early.denoiser
    assert early is blender.models.late.denoiser  # one base for both


def test_quantised_weights_compute_in_half_precision(folder, small):
    pytest.importorskip("torchao")
    full, quantised = (small(str(folder("flux_dev"))) for _ in range(2))
    placement.quantise(quantised, "int8", torch.bfloat16)
    for model in (full, quantised):  # as a blend casts all parts
        model.to("cpu", torch.bfloat16)
    assert quantised.denoiser.dtype == torch.bfloat16
    assert likeness(prediction(quantised), prediction(full)) > 0.99


@pytest.mark.heavy
def test_the_pair_is_picked_over_quantised_weights(mug_photos, tmp_path):
    """By `select`, and by `predict`, which takes the pick of the same base."""
    pytest.importorskip("torchao")
    run, out = tmp_path / "run", tmp_path / "out"
    fit("sandbox", mug_photos, run, LoRA(rank=2), steps=[1, 4])
    over = Survey(run, ["a {subject}"], [7], Score(), quantize="int8")
    assert over.dtype == "bf16"
    block = over._load().denoiser.mid_block.attentions[0].transformer_blocks[0]
    assert type(block.attn2.to_q.weight) is not torch.nn.Parameter

    words = blend_words(run, out, "--model.quantize", "int8", "--model.num_inference_steps", 1)
    status, _, err = command(blend, *words, "--early", "auto", "--late", "auto")
    assert status == 0, err
    points = json.loads((run / "survey.json").read_text())["points"].values()
    assert {(p["of"]["quantize"], p["of"]["dtype"]) for p in points} == {("int8", "bf16")}
    assert len(points) == 4  # the base, two snapshots and their blend


def test_what_cannot_be_quantised_is_refused(tiny_base, mug_photos, tmp_path, monkeypatch):
    with pytest.raises(InputError, match="model.quantize is 'int4': it is one of int8, nf4"):
        fit(tiny_base, mug_photos, tmp_path, LoRA(), quantize="int4")
    monkeypatch.setattr(placement.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(InputError, match="pip install 'dreamblend.quantize.'"):
        fit(tiny_base, mug_photos, tmp_path, LoRA(), quantize="int8")
    monkeypatch.setattr(placement.importlib.util, "find_spec", lambda name: object())
    with pytest.raises(InputError, match="full trains them: train LoRA"):
        fit(tiny_base, mug_photos, tmp_path, Full(), quantize="int8")
    fit(tiny_base, mug_photos, tmp_path, Full(), steps=[1, 2])
    with pytest.raises(InputError, match=r"these snapshots \(full\) replace them"):
        Blender("1", "2", run=tmp_path, quantize="nf4")
    with pytest.raises(InputError, match=r"these snapshots \(full\) replace them"):
        Survey(tmp_path, ["a {subject}"], [7], Score(), quantize="nf4")


# ---------------------------------------------------------------------------------------- offloaded
class Residents:
    """At every call of a model's modules: which of them have weights on the device."""

    def __init__(self, *models):
        self.big = {id(m): m for model in models for m in model.modules() if m is not model.concept}
        self.at_once: set[int] = set()

    def __enter__(self):
        vaes = [m for m in self.big.values() if type(m).__name__.startswith("Autoencoder")]
        called = [*self.big.values(), *(vae.decoder for vae in vaes)]
        self.handles = [m.register_forward_hook(self.count) for m in called]
        return self

    def count(self, *_):
        there = [any(p.device.type != "cpu" for p in m.parameters()) for m in self.big.values()]
        self.at_once.add(sum(there))

    def __exit__(self, *_):
        for handle in self.handles:
            handle.remove()


KINDS = UNet2DConditionModel._repeated_blocks
METHODS = {
    "lora": ("flux_dev", lambda: LoRA(rank=2), Score()),
    "full": ("klein_base", lambda: Full(), Merge(0.5)),
}


@pytest.mark.parametrize("method", ["lora", pytest.param("full", marks=pytest.mark.heavy)])
def test_modules_take_turns_on_the_device(method, folder, mug_photos, tmp_path, small):
    """One at a time, and the pictures are those of models that are there together."""
    base, tuning, blend = METHODS[method]
    fit(folder(base), mug_photos, tmp_path, tuning(), steps=[1, 3])

    def blender(**more) -> Blender:
        made = Blender(
            "1", "3", run=tmp_path, blend=blend, num_inference_steps=2, dtype="fp32", **more
        )
        made.to("pretend:0")
        made.on_predict_start()
        return made

    with pretend_device() as device:
        pairs = [("a sks mug on the beach", 7)]
        offloaded = blender(offload="model")
        models = offloaded.models
        with Residents(models.early, models.late) as residents:
            pictures = offloaded.draw(pairs, 1)
        assert residents.at_once == {1}
        assert models.early.device == models.late.device == device
        for picture, whole in zip(pictures, blender().draw(pairs, 1), strict=True):
            assert picture.kind == whole.kind and picture.image == whole.image

        offloaded.place(models.base)  # a diagnosis takes the base and each snapshot
        late = restore(offloaded.pair.late, models.base, "diagnosed")
        with torch.no_grad():
            assert late.encode_prompts(PROMPTS).states.device == device


def test_a_run_encodes_its_prompts_with_one_module_on_the_device_and_trains_as_ever(
    folder, mug_photos, tmp_path, small, monkeypatch
):
    at_once: set[int] = set()

    class Watched(EncodedPrompts):
        def __init__(self, backbone, prompts):
            with Residents(backbone) as residents:
                super().__init__(backbone, prompts)
            at_once.update(residents.at_once)

    monkeypatch.setattr("dreamblend.training.module.EncodedPrompts", Watched)
    with pretend_device():
        for offload in ("none", "model"):
            at_once.clear()
            trained = fit(
                folder("flux_dev"),
                mug_photos,
                tmp_path / offload,
                LoRA(rank=2),
                steps=[2],
                offload=offload,
                trainer=ON_PRETEND,
            )
            assert (at_once == {1}) == (offload == "model")
            assert not hasattr(trained.backbone.denoiser, "_hf_hook")
    weights = [
        (step(tmp_path / offload, 2) / "pytorch_lora_weights.safetensors").read_bytes()
        for offload in ("none", "model")
    ]
    assert weights[0] == weights[1]


def test_an_unknown_way_of_offloading_is_refused(tmp_path, tiny_base, mug_photos):
    fit(tiny_base, mug_photos, tmp_path, Full(), steps=[1, 2])
    with pytest.raises(InputError, match="model.offload is 'disk': it is one of none, model"):
        Blender("1", "2", run=tmp_path, offload="disk")


# ----------------------------------------------------------------------------------------- compiled
@pytest.mark.heavy  # the compiler takes minutes
def test_compiled_blocks_predict_and_are_recorded_as_before(folder, small):
    """The prediction, the maps, and the maps' gradient, through compiled blocks."""
    model = small(str(folder("flux_dev")))
    sites = model.sites(model.default_grid())
    prompts, t = model.encode_prompts(PROMPTS), torch.tensor([100.0, 700.0])

    def found() -> list[torch.Tensor]:
        z = initial_noise(model.latent_shape, [1, 2]).requires_grad_()
        with record(model.denoiser, sites) as maps:
            output = model.denoise(z, t, prompts)
        (gradient,) = torch.autograd.grad(sum(m.square().sum() for m in maps.values()), z)
        return [output.detach(), gradient, *(m.detach() for m in maps.values())]

    exact, compiled = found(), compile_blocks(model.denoiser, sites)
    assert compiled == ["transformer_blocks.0", "single_transformer_blocks.1"]  # others are read
    for _ in range(2):
        torch.testing.assert_close(found(), exact, atol=1e-5, rtol=1e-4)


@pytest.mark.heavy
def test_a_blend_compiles_the_blocks_that_it_does_not_read(tiny_base, mug_photos, tmp_path):
    fit(tiny_base, mug_photos, tmp_path, LoRA(rank=2), steps=[1, 2])
    blender = Blender("1", "2", run=tmp_path, compile=True)
    denoiser, sites = blender.load().late.denoiser, blender.models.base.sites(blender.grid)
    blocks = {n: m for n, m in denoiser.named_modules() if type(m).__name__ in KINDS}
    read = {n for n in blocks if any(site.startswith(f"{n}.") for site in sites)}
    compiled = {n for n, m in denoiser.named_modules() if m._compiled_call_impl is not None}
    assert read and compiled == blocks.keys() - read
    assert blender.settings["compile"] is True
