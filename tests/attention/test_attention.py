"""Recording of attention maps on a real (tiny) UNet: what is recorded, and that the model is as it
was afterwards.
"""

from __future__ import annotations

import copy
import gc
import weakref

import pytest
import torch
import torch.nn.functional as F
from diffusers import UNet2DConditionModel
from peft import LoraConfig
from torch import nn

from dreamblend.attention.recording import record
from dreamblend.attention.words import by_grid
from dreamblend.models import load_backbone
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


def processors(denoiser: nn.Module) -> dict[str, int]:
    return {
        name: id(layer.processor)
        for name, layer in denoiser.named_modules()
        if hasattr(layer, "processor")
    }


# --------------------------------------------------------------------------------- what is recorded
def test_maps_are_fp32_probabilities_over_the_tokens_at_each_query(model, z, text):
    with record(model.denoiser, model.sites()) as maps:
        model.denoise(z, T, text)
    assert list(maps) == list(model.sites())
    for site, grid in model.sites().items():
        heads = model.denoiser.get_submodule(site).heads
        assert (
            maps[site].shape == (2, heads, grid * grid, model.length)
            and maps[site].dtype == torch.float32
        )
        assert maps[site].min() >= 0
        torch.testing.assert_close(maps[site].sum(3), torch.ones(2, heads, grid * grid))


def test_maps_are_those_of_diffusers_own_attention_scores(model, z, text):
    site = list(model.sites())[0]
    layer, seen = model.denoiser.get_submodule(site), {}
    hook = layer.register_forward_pre_hook(
        lambda m, args, kwargs: seen.update(x=args[0], text=kwargs["encoder_hidden_states"]),
        with_kwargs=True,
    )
    with record(model.denoiser, [site]) as maps:
        model.denoise(z, T, text)
    hook.remove()
    q = layer.head_to_batch_dim(layer.to_q(seen["x"]))
    k = layer.head_to_batch_dim(layer.to_k(seen["text"]))
    torch.testing.assert_close(maps[site].flatten(0, 1), layer.get_attention_scores(q, k))


def test_recording_leaves_the_prediction_as_it_is(model, z, text):
    plain = model.denoise(z, T, text)
    with record(model.denoiser, model.sites()):
        recorded = model.denoise(z, T, text)
    torch.testing.assert_close(recorded, plain, atol=1e-5, rtol=1e-5)


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
    torch.testing.assert_close(recorded, plain, atol=1e-5, rtol=1e-5)
    for site in whole:
        torch.testing.assert_close(half[site], whole[site][2:], atol=1e-5, rtol=1e-5)


def test_a_mask_on_the_text_takes_masked_tokens_out_of_the_maps(model, z, text):
    mask = torch.ones(2, model.length)
    mask[:, 5:] = 0
    arguments = (z, T, text.states)
    plain = model.denoiser(*arguments, encoder_attention_mask=mask).sample
    with record(model.denoiser, model.sites()) as maps:
        recorded = model.denoiser(*arguments, encoder_attention_mask=mask).sample
    torch.testing.assert_close(recorded, plain, atol=1e-5, rtol=1e-5)
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


def test_sites_named_twice_or_in_another_order_stop_at_the_last_that_runs(model, z, text):
    names = list(model.sites(4))
    with record(model.denoiser, names) as whole:
        model.denoise(z, T, text)
    with record(model.denoiser, [names[-1], *names], stop_at_last=True) as maps:
        output = "nothing"
        output = model.denoise(z, T, text)
    assert (
        output == "nothing"
        and set(maps) == set(names)
        and all(torch.equal(maps[n], whole[n]) for n in names)
    )


# --------------------------------------------------------------------------- the model is as it was
def test_processors_are_the_same_objects_afterwards(model, z, text):
    before = processors(model.denoiser)
    with record(model.denoiser, model.sites()):
        model.denoise(z, T, text)
        assert processors(model.denoiser) != before
    assert processors(model.denoiser) == before


def test_only_the_recorded_sites_are_touched(model):
    before = processors(model.denoiser)
    with record(model.denoiser, model.sites(4)):
        changed = {
            name
            for name, processor in processors(model.denoiser).items()
            if processor != before[name]
        }
    assert changed == set(model.sites(4))


def test_processors_are_restored_after_an_exception_in_the_block(model, z, text):
    before = processors(model.denoiser)
    with pytest.raises(RuntimeError, match="mine"), record(model.denoiser, model.sites()):
        model.denoise(z, T, text)
        raise RuntimeError("mine")
    assert processors(model.denoiser) == before


def test_processors_are_restored_after_an_exception_in_the_model(model, z):
    before = processors(model.denoiser)
    with pytest.raises(RuntimeError), record(model.denoiser, model.sites()):
        model.denoiser(z, T, torch.zeros(2, 5, 7))  # the text has the wrong width
    assert processors(model.denoiser) == before


def test_processors_are_restored_after_stop_at_last(model, z, text):
    before = processors(model.denoiser)
    with record(model.denoiser, model.sites(8), stop_at_last=True):
        model.denoise(z, T, text)
    assert processors(model.denoiser) == before


def test_an_unknown_site_raises_and_leaves_the_model_untouched(model):
    before = processors(model.denoiser)
    for wrong in ("mid_block.attentions.7.attn2", "conv_in"):
        with pytest.raises(KeyError, match=wrong):
            with record(model.denoiser, [*model.sites(), wrong]):
                pass
        assert processors(model.denoiser) == before


def test_a_processor_with_weights_of_its_own_is_refused(model, text):
    """To replace it would leave its weights out (Custom Diffusion's and IP-Adapter's processors are
    modules).
    """

    class Own(nn.Module):
        def forward(self, attn, hidden_states, encoder_hidden_states=None):
            return hidden_states

    denoiser = copy.deepcopy(model.denoiser)
    sites = list(model.sites(4))
    denoiser.get_submodule(sites[1]).set_processor(Own())
    before = processors(denoiser)
    with pytest.raises(TypeError, match="Own"), record(denoiser, sites):
        pass
    assert processors(denoiser) == before


# --------------------------------------------------------------------------- recording in recording
def test_a_nested_recording_gets_its_maps_and_the_outer_one_keeps_its_own(model, z, text):
    before = processors(model.denoiser)
    with record(model.denoiser, model.sites(4)) as outer:
        model.denoise(z, T, text)
        kept = dict(outer)
        between = processors(model.denoiser)
        with record(model.denoiser, model.sites(4), stop_at_last=True) as inner:
            model.denoise(z.flip(0), T, text)
        assert processors(model.denoiser) == between
        assert all(outer[site] is kept[site] for site in kept) and set(inner) == set(outer)
        model.denoise(z.flip(0), T, text)  # the outer one records on
    assert processors(model.denoiser) == before
    assert all(torch.equal(outer[site], inner[site]) for site in inner)


def test_a_nested_recording_of_other_sites_does_not_swallow_the_stop_of_the_outer_one(
    model, z, text
):
    before, reached = processors(model.denoiser), []
    with record(model.denoiser, model.sites(4), stop_at_last=True) as outer:
        with record(model.denoiser, list(model.sites(8))[:1]) as inner:
            model.denoise(z, T, text)
        reached.append("the rest of the outer block")
    assert reached == [] and len(inner) == 1 and set(outer) == set(model.sites(4))
    assert processors(model.denoiser) == before


# ------------------------------------------------------------------------------ LoRA, low precision
@pytest.fixture
def adapted(model):
    """A copy of the model with two random LoRA adapters on its attention layers."""
    other = model.replaced(denoiser=copy.deepcopy(model.denoiser))
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
        torch.testing.assert_close(recorded, plain, atol=1e-5, rtol=1e-5)
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
        with record(denoiser, [site]) as maps:
            recorded = layer(x, encoder_hidden_states=text)
    expected = F.softmax(q.float() @ k.float().transpose(1, 2) * layer.scale, -1)
    assert recorded.isfinite().all()
    torch.testing.assert_close(maps[site][:, 0].argmax(-1), expected.argmax(-1))
