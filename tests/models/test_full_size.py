"""The families at full size, without the memory: a training step and blends go through, and take
what such models take.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from benchmarks.counted import (
    COUNTED,
    WINDOW,
    Counted,
    decoding,
    drawing,
    encoding,
    one_pass,
    pair_of,
    parameters,
    size_of,
    training_step,
)
from dreamblend.blending.blends import CAG, Late, Region
from dreamblend.blending.models import Models
from tests.families.full_size import FULL_SIZE, PUBLISHED, full_size

SOON = "PixArt-Sigma"  # the smallest
pytestmark = pytest.mark.filterwarnings("ignore:.*self.trainer.*")  # which a step alone has not


@pytest.fixture(
    scope="module",
    params=[pytest.param(name, marks=[pytest.mark.heavy] * (name != SOON)) for name in FULL_SIZE],
)
def name(request) -> str:
    return request.param


@pytest.fixture(scope="module")
def models(name) -> Models:
    return pair_of(full_size(name))


@pytest.fixture(scope="module")
def single(models) -> Counted:
    """The denoiser, once."""
    return one_pass(models.late)


def test_a_model_has_as_many_weights_as_are_published(name):
    assert parameters([full_size(name).denoiser]) == pytest.approx(1e9 * PUBLISHED[name], rel=0.01)


@pytest.mark.heavy
def test_a_training_step_goes_through_and_keeps_little_in_memory(name, single):
    """Forward, again for the checkpoints, and back to the adapters: frozen weights have no
    gradients. What is kept fits beside the weights.
    """
    step = training_step(full_size(name))
    assert 2.8 < step.flop / single.flop < 3.6
    assert step.peak < 4e9


@pytest.mark.heavy
def test_a_blend_goes_through(models):
    assert drawing(models, Region(), steps=2).peak < 3e9


@pytest.mark.heavy
def test_what_blends_add_to_a_plain_image(models, single):
    """Recording adds little; region is one pass of each snapshot, and one of early's empty prompt
    where there is guidance; CAG's guided step reads a part of the late snapshot, and goes back.
    """
    text, distilled = encoding(models).flop, models.late.distilled
    late, region = (drawing(models, blend) for blend in (Late(), Region(asked=1.0)))
    of_late, of_region = (1, 2) if distilled else (2, 3)
    for drawn, snapshots, passes in ((late, 1, of_late), (region, 2, of_region)):
        once = (drawn.flop - snapshots * text) / (COUNTED * passes)
        assert single.flop < 1.001 * once < 1.02 * single.flop
    cag = drawing(models, CAG(window=WINDOW))
    reference = (late.flop + text) / 2  # one of two steps is guided, and the reference ends there
    assert 0.4 < (cag.flop - late.flop - reference) / single.flop < 2.1
    assert late.peak < 3e9 and region.peak < 3e9 and cag.peak < 25e9


def test_an_image_is_decoded(models):
    decoded = decoding(models.late)
    assert 1e12 < decoded.flop < 2e13 and decoded.peak < 8e9


def test_memory_is_counted_as_long_as_a_tensor_is_there():
    with Counted() as count:
        a = torch.zeros(1000)
        b = a + 1
        view = b[:10]
        del a, b
        assert count.bytes == 4000 and count.peak == 8000  # the view holds all of b
        square = view[None] @ view[:, None]
        del view
        assert count.bytes == square.nbytes == 4
    assert count.flop == 20 and count.peak <= 8000


def test_the_weights_of_a_module_count_once():
    layer = torch.nn.Linear(10, 10, bias=False).bfloat16()
    assert parameters([layer]) == 100 and size_of([layer]) == 200
    assert parameters([torch.nn.Sequential(layer, layer)]) == 100


def test_the_page_shows_a_row_of_every_family():
    page = (Path(__file__).resolve().parents[2] / "docs" / "families.md").read_text("utf-8")
    counts = page.split("<!-- table of counts -->")[1].split("<!-- end of the table")[0]
    shown = [line.split(" | ")[0].removeprefix("| ") for line in counts.strip().splitlines()[2:]]
    assert shown == [f"{name}, 1024 px" for name in FULL_SIZE]
