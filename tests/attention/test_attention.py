"""Recording of attention maps on a real (tiny) UNet: what is recorded, and that the model is as it
was afterwards.
"""

from __future__ import annotations

import copy
import gc
import weakref
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from diffusers import UNet2DConditionModel
from diffusers.models.attention_processor import CustomDiffusionAttnProcessor2_0
from peft import LoraConfig
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from dreamblend.attention.recording import record
from dreamblend.attention.words import by_grid
from dreamblend.models import Site, load_backbone
from dreamblend.models.adapters import set_adapters

PROMPTS = ["a sks mug on the beach", "a red sks mug"]
T = torch.tensor(400)


@pytest.fixture(scope="module")
def model(tiny_base):
    """A tiny base whose maps have peaks: the queries of random weights hardly tell tokens apart."""
    model = load_backbone(str(tiny_base))
    with torch.no_grad():
        for site in model.sites():
            model.denoiser.get_submodule(site).to_q.weight.mul_(12)
    return model


@pytest.fixture(scope="module")
def z(model):
    return torch.randn(2, *model.latent_shape, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def text(model):
    return model.encode_prompts(PROMPTS)


def forwards(denoiser: nn.Module) -> dict[str, object]:
    """The layers whose forward pass is another than their class's."""
    return {
        name: vars(layer)["forward"]
        for name, layer in denoiser.named_modules()
        if "forward" in vars(layer)
    }


# --------------------------------------------------------------------------------- what is recorded
def test_maps_are_fp32_probabilities_over_the_tokens_at_each_query(model, z, text):
    with record(model.denoiser, model.sites()) as maps:
        model.denoise(z, T, text)
    assert list(maps) == list(model.sites())
    for name, site in model.sites().items():
        heads, queries = model.denoiser.get_submodule(name).heads, site.height * site.width
        assert maps[name].shape == (2, heads, queries, model.length)
        assert maps[name].dtype == torch.float32 and maps[name].min() >= 0
        torch.testing.assert_close(maps[name].sum(3), torch.ones(2, heads, queries))


@pytest.mark.holds("maps", of="stable_diffusion")
def test_maps_are_those_of_diffusers_own_attention_scores(model, z, text):
    site = list(model.sites())[0]
    layer, seen = model.denoiser.get_submodule(site), {}
    hook = layer.register_forward_pre_hook(
        lambda m, args, kwargs: seen.update(x=args[0], text=kwargs["encoder_hidden_states"]),
        with_kwargs=True,
    )
    with record(model.denoiser, {site: model.sites()[site]}) as maps:
        model.denoise(z, T, text)
    hook.remove()
    q = layer.head_to_batch_dim(layer.to_q(seen["x"]))
    k = layer.head_to_batch_dim(layer.to_k(seen["text"]))
    torch.testing.assert_close(maps[site].flatten(0, 1), layer.get_attention_scores(q, k))


def test_recording_leaves_the_prediction_as_it_is(model, z, text):
    plain = model.denoise(z, T, text)
    with record(model.denoiser, model.sites()):
        recorded = model.denoise(z, T, text)
    assert torch.equal(recorded, plain)


def test_rows_and_columns_select_the_image_and_the_text_of_one_sequence(model, z, text):
    """As in joint attention, where a part of the queries and of the keys is the image's or the
    text's: the shares stay those of the whole.
    """
    (name, site), *_ = model.sites().items()
    with record(model.denoiser, {name: site}) as whole:
        model.denoise(z, T, text)
    part = replace(site, rows=slice(8, None), columns=slice(2, -1))
    with record(model.denoiser, {name: part}) as found:
        model.denoise(z, T, text)
    torch.testing.assert_close(found[name], whole[name][:, :, 8:, 2:-1])
    with record(model.denoiser, {name: part}, torch.tensor([[0, 3], [1, 2]])) as chosen:
        model.denoise(z, T, text)
    torch.testing.assert_close(chosen[name][1], found[name][1][..., [1, 2]])


def test_maps_made_in_parts_are_those_made_at_once_and_so_are_their_gradients(
    model, z, text, monkeypatch
):
    found = []
    for most in (2**27, 2 * 2 * 5 * model.length):  # all queries, and five
        monkeypatch.setattr("dreamblend.attention.recording.MOST_SCORES", most)
        latents = z.clone().requires_grad_()
        with record(model.denoiser, model.sites(8)) as maps:
            model.denoise(latents, T, text)
        (gradient,) = torch.autograd.grad(by_grid(maps)[..., 3].sum(), latents)
        found.append((by_grid(maps).detach(), gradient))
    for at_once, in_parts in zip(*found):
        torch.testing.assert_close(in_parts, at_once, atol=1e-6, rtol=1e-4)


def test_heads_averaged_as_they_are_made_are_the_mean_of_all(model, z, text, monkeypatch):
    tokens = torch.tensor([[3, 6], [2, 0]])
    with record(model.denoiser, model.sites(), tokens) as whole:
        model.denoise(z, T, text)
    for most, error in ((2**27, 0), (2 * 2 * 5 * model.length, 1e-6)):  # all queries, and five
        monkeypatch.setattr("dreamblend.attention.recording.MOST_SCORES", most)
        with record(model.denoiser, model.sites(), tokens, mean_heads=True) as averaged:
            model.denoise(z, T, text)
        for site, maps in whole.items():
            mean = maps.mean(1, keepdim=True)
            torch.testing.assert_close(averaged[site], mean, atol=error, rtol=0)


class Largest(TorchDispatchMode):
    """Keeps the most entries of any tensor that is made."""

    entries = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        made = function(*args, **(kwargs or {}))
        for tensor in made if isinstance(made, (tuple, list)) else (made,):
            if isinstance(tensor, torch.Tensor):
                self.entries = max(self.entries, tensor.numel())
        return made


class Joint(nn.Module):
    """Attention of a sequence to itself, as in a block of a transformer."""

    def __init__(self, mask: torch.Tensor | None = None):
        super().__init__()
        self.mask = mask

    def forward(self, x):
        return F.scaled_dot_product_attention(x, x, x, self.mask)


@pytest.mark.parametrize("gradients", [False, True])
def test_joint_attention_of_a_large_image_is_never_held_whole(monkeypatch, gradients):
    """A block of FLUX.1 at 1024 pixels: 24 heads, 512 columns of text, then 4,096 of the image."""
    most, heads, text, image = 2**24, 24, 512, 4096
    monkeypatch.setattr("dreamblend.attention.recording.MOST_SCORES", most)
    denoiser, site = nn.Sequential(Joint()), Site(64, 64, slice(text, None), slice(text))
    with (
        FakeTensorMode(),  # nothing is computed
        torch.set_grad_enabled(gradients),
        Largest() as largest,
        record(denoiser, {"0": site}, mean_heads=True, stop_at_last=True) as maps,
    ):
        denoiser(torch.empty(1, heads, text + image, 128))
    assert maps["0"].shape == (1, 1, image, text)
    assert 0 < largest.entries <= most < heads * image * text


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("masked", [None, torch.bool, torch.float32])
def test_the_kernels_own_sums_give_the_maps_of_the_whole_softmax(dtype, masked):
    """Without gradients the maps are made from flash attention's sums, with them from all keys."""
    text, image = 7, 16
    mask = None
    if masked is not None:
        mask = torch.rand(2, 1, 1, text + image) > 0.3
        mask[..., -1] = True  # there is something to see
        mask = mask if masked == torch.bool else torch.where(mask, 0.5, -torch.inf).to(dtype)
    denoiser = nn.Sequential(Joint(mask))
    states = 2 * torch.randn(2, 3, text + image, 8, dtype=dtype)
    site = Site(4, 4, slice(text, None), slice(text))
    for half in (False, True):
        for tokens in (None, torch.tensor([[5, 0, 3], [2, 6, 6]])[half:]):
            with record(denoiser, {"0": site}, tokens, conditional_only=half) as maps:
                denoiser(states)
                whole = maps["0"]
                with torch.no_grad(), Counted() as counted:
                    denoiser(states)
            assert "aten::_softmax" not in counted.names
            assert maps["0"].max() <= 1.001
            tolerance = 1e-5 if dtype == torch.float32 else 0.02
            torch.testing.assert_close(maps["0"], whole, atol=tolerance, rtol=0)


class Counted(TorchDispatchMode):
    """Keeps the names of the operations that ran."""

    def __init__(self):
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.names.add(function.name())
        return function(*args, **(kwargs or {}))


def test_tokens_select_columns_for_each_sample(model, z, text):
    tokens = torch.tensor([[3, 6], [2, 0]])
    with record(model.denoiser, model.sites()) as whole:
        model.denoise(z, T, text)
    with record(model.denoiser, model.sites(), tokens) as chosen:
        model.denoise(z, T, text)
    for site in whole:
        expected = torch.stack([whole[site][0][..., [3, 6]], whole[site][1][..., [2, 0]]])
        assert torch.equal(chosen[site], expected)


def test_conditional_only_records_the_second_half_and_leaves_the_prediction(model, z, text):
    empty = model.encode_prompts([""] * 2)
    latents, both = torch.cat([z, z]), type(text).cat([empty, text])
    plain = model.denoise(latents, T, both)
    with record(model.denoiser, model.sites()) as whole:
        model.denoise(latents, T, both)
    with record(model.denoiser, model.sites(), conditional_only=True) as half:
        recorded = model.denoise(latents, T, both)
    assert torch.equal(recorded, plain)
    for site in whole:
        torch.testing.assert_close(half[site], whole[site][2:], atol=1e-5, rtol=1e-5)


def test_a_mask_on_the_text_takes_masked_tokens_out_of_the_maps(model, z, text):
    mask = torch.ones(2, model.length)
    mask[:, 5:] = 0
    arguments = (z, T, text.states)
    plain = model.denoiser(*arguments, encoder_attention_mask=mask).sample
    with record(model.denoiser, model.sites()) as maps:
        recorded = model.denoiser(*arguments, encoder_attention_mask=mask).sample
    assert torch.equal(recorded, plain)
    for site in maps:
        assert maps[site][..., 5:].max() < 1e-6 and torch.allclose(
            maps[site].sum(3), torch.ones(())
        )


def test_maps_are_differentiable_in_the_latents(model, z, text):
    latents = z.clone().requires_grad_()
    with record(model.denoiser, model.sites(4)) as maps:
        model.denoise(latents, T, text)
    (gradient,) = torch.autograd.grad(by_grid(maps)[..., 3].sum(), latents)
    assert gradient.isfinite().all() and gradient.abs().max() > 0


def test_a_second_pass_replaces_the_maps_of_the_first(model, z, text):
    with record(model.denoiser, model.sites(4)) as maps:
        model.denoise(z, T, text)
        first = dict(maps)
        model.denoise(z.flip(0), T, text)
    assert all(not torch.equal(first[site], maps[site]) for site in maps)


def test_by_grid_is_the_mean_over_heads_and_sites(model, z, text):
    with record(model.denoiser, model.sites(8)) as maps:
        model.denoise(z, T, text)
    expected = sum(maps[site][:, head] for site in maps for head in range(2)) / (2 * len(maps))
    torch.testing.assert_close(by_grid(maps), expected)


def test_by_grid_refuses_maps_of_different_grids(model, z, text):
    with record(model.denoiser, model.sites()) as maps:
        model.denoise(z, T, text)
    with pytest.raises(ValueError, match=r"different grids.*16.*64"):
        by_grid(maps)


# ------------------------------------------------------------------------ stopping at the last site
def modules_that_run(denoiser: nn.Module, run) -> list[str]:
    """The names of the modules whose forward began while `run` was called, in order."""
    names = []
    hooks = [
        m.register_forward_pre_hook(lambda *_, name=name: names.append(name))
        for name, m in denoiser.named_modules()
    ]
    try:
        run()
    finally:
        for hook in hooks:
            hook.remove()
    return names


def test_stop_at_last_keeps_nothing_of_the_pass_in_memory(model, z, text):
    """The exception that ends it refers to every frame of the pass: caught carelessly, it keeps the
    activations until the next gc.
    """
    seen = []
    hook = (
        model.denoiser.down_blocks[0]
        .resnets[0]
        .register_forward_hook(lambda m, args, output: seen.append(weakref.ref(output)))
    )
    gc.disable()
    try:
        with record(model.denoiser, model.sites(4), stop_at_last=True) as maps:
            model.denoise(z.clone().requires_grad_(), T, text)
        assert len(maps) == 4 and seen[0]() is not None
        del maps
        assert seen[0]() is None
    finally:
        gc.enable()
        hook.remove()


@pytest.mark.parametrize("grid", [4, 8])
def test_stop_at_last_records_the_maps_of_a_full_pass(model, z, text, grid):
    with record(model.denoiser, model.sites(grid)) as whole:
        model.denoise(z, T, text)
    with record(model.denoiser, model.sites(grid), stop_at_last=True) as stopped:
        model.denoise(z, T, text)
    assert list(stopped) == list(whole) and all(
        torch.equal(stopped[site], whole[site]) for site in whole
    )


def test_stop_at_last_runs_no_module_after_the_last_site(model, z, text):
    def run(stop: bool) -> None:
        with record(model.denoiser, model.sites(4), stop_at_last=stop):
            model.denoise(z, T, text)

    stopped, whole = (
        modules_that_run(model.denoiser, lambda stop=stop: run(stop)) for stop in (True, False)
    )
    last = list(model.sites(4))[-1]
    assert stopped == whole[: len(stopped)] and len(stopped) < len(whole)
    assert stopped[stopped.index(last) + 1 :] == [f"{last}.to_q", f"{last}.to_k", f"{last}.to_v"]


def test_stop_at_last_leaves_the_block_and_goes_on_after_it(model, z, text):
    reached = []
    with record(model.denoiser, model.sites(8), stop_at_last=True):
        model.denoise(z, T, text)
        reached.append("the rest of the block")
    assert reached == []


def test_sites_in_another_order_stop_at_the_last_that_runs(model, z, text):
    sites = model.sites(4)
    names = list(sites)
    with record(model.denoiser, sites) as whole:
        model.denoise(z, T, text)
    turned = {name: sites[name] for name in (names[-1], *names[:-1])}
    with record(model.denoiser, turned, stop_at_last=True) as maps:
        output = "nothing"
        output = model.denoise(z, T, text)
    assert (
        output == "nothing"
        and set(maps) == set(names)
        and all(torch.equal(maps[n], whole[n]) for n in names)
    )


# --------------------------------------------------------------------------- the model is as it was
def test_forward_passes_are_the_layers_own_afterwards(model, z, text):
    with record(model.denoiser, model.sites()):
        model.denoise(z, T, text)
        assert set(forwards(model.denoiser)) == set(model.sites())
    assert forwards(model.denoiser) == {}


def test_a_forward_pass_that_another_library_put_there_is_there_afterwards(model, z, text):
    """As accelerate's hooks do to offload weights."""
    (name, site), *_ = model.sites(4).items()
    layer, calls = model.denoiser.get_submodule(name), []
    original = layer.forward

    def hooked(*args, **kwargs):
        calls.append(name)
        return original(*args, **kwargs)

    layer.forward = hooked
    try:
        with record(model.denoiser, {name: site}) as maps:
            model.denoise(z, T, text)
        assert calls == [name] and list(maps) == [name] and layer.forward is hooked
    finally:
        del layer.forward


def test_only_the_recorded_sites_are_touched(model):
    with record(model.denoiser, model.sites(4)):
        assert set(forwards(model.denoiser)) == set(model.sites(4))


def test_forward_passes_are_restored_after_an_exception_in_the_block(model, z, text):
    with pytest.raises(RuntimeError, match="mine"), record(model.denoiser, model.sites()):
        model.denoise(z, T, text)
        raise RuntimeError("mine")
    assert forwards(model.denoiser) == {}


def test_forward_passes_are_restored_after_an_exception_in_the_model(model, z):
    with pytest.raises(RuntimeError), record(model.denoiser, model.sites()):
        model.denoiser(z, T, torch.zeros(2, 5, 7))  # the text has the wrong width
    assert forwards(model.denoiser) == {}


def test_forward_passes_are_restored_after_stop_at_last(model, z, text):
    with record(model.denoiser, model.sites(8), stop_at_last=True):
        model.denoise(z, T, text)
    assert forwards(model.denoiser) == {}


def test_an_unknown_site_raises_and_leaves_the_model_untouched(model):
    wrong = "mid_block.attentions.7.attn2"
    with pytest.raises(KeyError, match=wrong):
        with record(model.denoiser, {**model.sites(), wrong: Site(4, 4)}):
            pass
    assert forwards(model.denoiser) == {}


def test_a_layer_without_attention_raises_and_leaves_the_model_untouched(model, z, text):
    with pytest.raises(TypeError, match="conv_in calls no scaled_dot_product_attention"):
        with record(model.denoiser, {**model.sites(), "conv_in": Site(8, 8)}):
            model.denoise(z, T, text)
    assert forwards(model.denoiser) == {}


def test_a_processor_with_weights_of_its_own_is_read_as_it_acts(model, z, text):
    """Custom Diffusion's processor makes keys and values with layers of its own."""
    denoiser, (name, site) = copy.deepcopy(model.denoiser), next(iter(model.sites(4).items()))
    layer = denoiser.get_submodule(name)
    torch.manual_seed(0)
    own = CustomDiffusionAttnProcessor2_0(
        hidden_size=layer.to_q.in_features, cross_attention_dim=text.states.shape[-1]
    )
    with torch.no_grad():
        own.to_k_custom_diffusion.weight.normal_(std=3)
    layer.set_processor(own)
    with torch.no_grad(), record(denoiser, {name: site}) as maps:
        denoiser(z, T, text.states)
    with torch.no_grad(), record(model.denoiser, {name: site}) as base:
        model.denoise(z, T, text)
    assert (maps[name] - base[name]).abs().max() > 0.01
    torch.testing.assert_close(maps[name].sum(3), torch.ones(maps[name].shape[:3]))


# --------------------------------------------------------------------------- recording in recording
def test_a_nested_recording_gets_its_maps_and_the_outer_one_keeps_its_own(model, z, text):
    with record(model.denoiser, model.sites(4)) as outer:
        model.denoise(z, T, text)
        kept = dict(outer)
        between = forwards(model.denoiser)
        with record(model.denoiser, model.sites(4), stop_at_last=True) as inner:
            model.denoise(z.flip(0), T, text)
        assert forwards(model.denoiser) == between
        assert all(outer[site] is kept[site] for site in kept) and set(inner) == set(outer)
        model.denoise(z.flip(0), T, text)  # the outer one records on
    assert forwards(model.denoiser) == {}
    assert all(torch.equal(outer[site], inner[site]) for site in inner)


def test_a_nested_recording_of_other_sites_does_not_swallow_the_stop_of_the_outer_one(
    model, z, text
):
    reached = []
    with record(model.denoiser, model.sites(4), stop_at_last=True) as outer:
        with record(model.denoiser, dict([*model.sites(8).items()][:1])) as inner:
            model.denoise(z, T, text)
        reached.append("the rest of the outer block")
    assert reached == [] and len(inner) == 1 and set(outer) == set(model.sites(4))
    assert forwards(model.denoiser) == {}


# ------------------------------------------------------------------------------ LoRA, low precision
@pytest.fixture
def adapted(model):
    """A copy of the model with two random LoRA adapters on its attention layers."""
    other = model.replaced(unet=copy.deepcopy(model.denoiser))
    for i, name in enumerate(("early", "late")):
        torch.manual_seed(i)
        config = LoraConfig(
            r=2,
            lora_alpha=8,
            target_modules=["to_q", "to_k", "to_v", "to_out.0"],
            init_lora_weights=False,
        )
        other.denoiser.add_adapter(config, adapter_name=name)
    set_adapters(other.denoiser, {})
    return other


def test_recording_sees_the_active_adapter(adapted, model, z, text):
    maps = {}
    for name, adapters in (("off", {}), ("early", {"early": 1.0}), ("late", {"late": 1.0})):
        view = adapted.bind(adapters)
        plain = view.denoise(z, T, text)
        with record(view.denoiser, view.sites(4)) as maps[name]:
            recorded = view.denoise(z, T, text)
        assert torch.equal(recorded, plain)
    with record(model.denoiser, model.sites(4)) as base:
        model.denoise(z, T, text)
    for site in base:
        assert torch.equal(maps["off"][site], base[site])
        for other in (base[site], maps["late"][site]):
            assert not torch.allclose(maps["early"][site], other, atol=1e-3)


def test_maps_stay_fp32_under_autocast(model, z, text):
    with record(model.denoiser, model.sites()) as exact:
        model.denoise(z, T, text)
    with torch.autocast("cpu", torch.bfloat16), record(model.denoiser, model.sites()) as maps:
        assert model.denoise(z, T, text).isfinite().all()
    for site in maps:
        assert maps[site].dtype == torch.float32
        torch.testing.assert_close(maps[site].sum(3), torch.ones(maps[site].shape[:3]))
        torch.testing.assert_close(maps[site], exact[site], atol=0.1, rtol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_maps_stay_fp32_in_a_model_of_low_precision(model, z, text, dtype):
    with record(model.denoiser, model.sites()) as exact:
        model.denoise(z, T, text)
    low = copy.deepcopy(model.denoiser).to(dtype)
    with record(low, model.sites()) as maps:
        output = low(z.to(dtype), T, text.states.to(dtype)).sample
    assert output.dtype == dtype
    for site in maps:
        assert maps[site].dtype == torch.float32
        torch.testing.assert_close(maps[site].sum(3), torch.ones(maps[site].shape[:3]))
        torch.testing.assert_close(maps[site], exact[site], atol=0.1, rtol=0)


def test_large_queries_and_keys_do_not_overflow_in_fp16():
    """Stable Diffusion 2.1 is known for them: q . k is above fp16's 65504 before it is scaled."""
    torch.manual_seed(0)
    denoiser = UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(16,),
        layers_per_block=1,
        cross_attention_dim=16,
        attention_head_dim=1,
        norm_num_groups=4,
        down_block_types=("CrossAttnDownBlock2D",),
        up_block_types=("UpBlock2D",),
        mid_block_type=None,
    ).half()
    site = "down_blocks.0.attentions.0.transformer_blocks.0.attn2"
    layer = denoiser.get_submodule(site)
    x, text = torch.randn(1, 64, 16).half(), torch.randn(1, 5, 16).half()
    with torch.no_grad():
        layer.to_q.weight.mul_(200), layer.to_k.weight.mul_(200)
        q, k = layer.to_q(x), layer.to_k(text)
        assert not (q @ k.transpose(1, 2)).isfinite().all()
        with record(denoiser, {site: Site(8, 8)}) as maps:
            recorded = layer(x, encoder_hidden_states=text)
    expected = F.softmax(q.float() @ k.float().transpose(1, 2) * layer.scale, -1)
    assert recorded.isfinite().all()
    torch.testing.assert_close(maps[site][:, 0].argmax(-1), expected.argmax(-1))
