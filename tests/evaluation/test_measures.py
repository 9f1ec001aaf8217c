"""The table of measures against what measures."""

from __future__ import annotations

import pytest
import torch

from dreamblend.attention import collapse
from dreamblend.evaluation import measures
from dreamblend.evaluation.measures import MEASURES
from dreamblend.evaluation.protocols import PRESETS
from dreamblend.evaluation.scores import Scores


def maps_of(share: float) -> torch.Tensor:
    """Four words that have places of their own, and share the first one's the more, the more
    collapsed they are; what they have of the attention shrinks, but for the first.
    """
    apart = torch.eye(4).repeat_interleave(4, 1)[None] * 0.25
    together = apart[:, :1].expand(1, 4, 16)
    return torch.lerp(apart, together, share) * torch.tensor([1.0, *[1 - share / 2] * 3])[:, None]


@pytest.mark.parametrize("name", collapse.MEASURES)
def test_the_better_end_is_where_nothing_is_collapsed(name):
    mask, subject = torch.ones(1, 4, dtype=torch.bool), torch.tensor([[True, *[False] * 3]])
    sound, collapsed = (
        collapse.measure(maps_of(share), mask, subject)[name].item() for share in (0.0, 0.9)
    )
    higher = MEASURES[name].higher_is_better
    assert higher is None or (sound > collapsed) == higher


def test_everything_that_is_scored_is_in_the_table(mug_photos):
    assert set(collapse.MEASURES) < set(measures.DIAGNOSED)
    scores = Scores(mug_photos, "sks")
    metrics = scores.metrics(1)
    (row,) = scores.update(metrics, torch.zeros(1, 3, 64, 64), "a mug", 0, torch.arange(1))
    assert {*metrics, *row, *(p.diversity_name for p in PRESETS.values())} <= MEASURES.keys()


def test_a_measure_is_found_by_its_name_and_by_what_files_call_it():
    values = {name: i for i, name in enumerate(MEASURES)}
    files = measures.keyed(values)
    assert files["prompt"] == values["prompt_fidelity"] and len(files) == len(values)
    assert [measures.find(key) for key in files] == list(MEASURES.values())
    assert measures.find("stars") is None and measures.title("my_stars") == "my stars"
