"""The collapse measures on maps made by hand: their ends, their order, and what must not change
them.
"""

from __future__ import annotations

import pytest
import torch

from dreamblend.attention import collapse
from dreamblend.attention.words import subject_words, token_table
from dreamblend.models import load_backbone

N, Q = 4, 16  # words, queries: each word has four queries to itself in the disjoint maps
MASK = torch.ones(1, N, dtype=torch.bool)
SUBJECT = torch.tensor([[True, False, False, False]])


def disjoint() -> torch.Tensor:
    maps = torch.zeros(1, N, Q)
    for word in range(N):
        maps[0, word, 4 * word : 4 * word + 4] = torch.tensor([0.1, 0.2, 0.3, 0.4])
    return maps


def identical() -> torch.Tensor:
    return disjoint()[:, :1].expand(1, N, Q) * torch.tensor([0.4, 0.3, 0.2, 0.1]).view(
        1, N, 1
    )  # one place, not one share


def random_maps(batch: int = 3, seed: int = 0) -> torch.Tensor:
    """Shares of attention such as a softmax gives: what the words leave goes to other tokens."""
    return (
        torch.randn(batch, N + 3, Q, generator=torch.Generator().manual_seed(seed))
        .mul(2)
        .softmax(1)[:, :N]
    )


def one(
    measure: str, maps: torch.Tensor, mask: torch.Tensor = MASK, subject: torch.Tensor = SUBJECT
) -> float:
    return collapse.measure(maps, mask, subject)[measure].item()


# --------------------------------------------------------------------------------- collapsed or not
def test_words_that_share_one_map_are_collapsed():
    assert one("overlap", identical()) == pytest.approx(1, abs=1e-5)
    assert one("effective_rank", identical()) == pytest.approx(1 / N, abs=1e-5)
    assert one("subject_mass", identical()) > 0.5


def test_words_of_their_own_places_are_not_collapsed():
    assert one("overlap", disjoint()) <= 0
    assert one("effective_rank", disjoint()) == pytest.approx(1, abs=1e-5)
    assert one("subject_mass", disjoint()) == 0


@pytest.mark.parametrize(
    "measure, sign", [("overlap", 1), ("effective_rank", -1), ("subject_mass", 1)]
)
def test_measures_move_one_way_from_disjoint_to_collapsed(measure, sign):
    same = disjoint()[:, :1].expand(1, N, Q)
    values = torch.tensor(
        [one(measure, torch.lerp(disjoint(), same, w)) for w in torch.linspace(0, 1, 9).tolist()]
    )
    assert (sign * values.diff() > 0).all()


def test_overlap_of_flat_maps_is_none():
    """Two words that attend nowhere in particular share no place, though their plain cosine
    is 1.
    """
    flat = torch.full((1, N, Q), 0.1) + 1e-3 * torch.rand(
        1, N, Q, generator=torch.Generator().manual_seed(0)
    )
    assert abs(one("overlap", flat)) < 0.3


def test_overlap_is_between_the_subject_and_the_others_only():
    maps = disjoint()
    maps[:, 2] = maps[:, 1]  # two context words of one place
    assert one("overlap", maps) == pytest.approx(one("overlap", disjoint()))
    assert one("overlap", maps, subject=torch.tensor([[False, True, False, False]])) > 0


def test_a_subject_of_two_words_is_not_compared_with_itself():
    maps = disjoint()
    maps[:, 1] = maps[:, 0]  # "sks" and "mug" of one place
    assert one("overlap", maps, subject=torch.tensor([[True, True, False, False]])) <= 0


# ------------------------------------------------------------------------------- each measure alone
def test_entropy_is_one_for_flat_maps_and_zero_for_a_single_peak():
    peak = torch.zeros(1, N, Q)
    peak[0, :, 3] = 0.7
    assert one("entropy", torch.full((1, N, Q), 0.2)) == pytest.approx(1, abs=1e-5)
    assert one("entropy", peak) == pytest.approx(0, abs=1e-6)
    assert one(
        "entropy",
        disjoint()[:, :1] * 0 + torch.tensor([1.0] * 4 + [0.0] * 12),
        MASK[:, :1],
        SUBJECT[:, :1],
    ) == pytest.approx(0.5, abs=1e-5)


def test_subject_mass_is_the_others_share_inside_the_subjects_region():
    maps = torch.zeros(1, 3, 4)
    maps[0, 0] = torch.tensor([0.6, 0.5, 0.1, 0])  # the region: the first two queries
    maps[0, 1] = torch.tensor([0.1, 0.1, 0.1, 0.1])  # half of it inside
    maps[0, 2] = torch.tensor([0.2, 0.1, 0, 0.1])  # three quarters
    assert one("subject_mass", maps, MASK[:, :3], SUBJECT[:, :3]) == pytest.approx((0.5 + 0.75) / 2)


def test_context_mass_is_the_share_of_the_other_words():
    maps = torch.zeros(1, 3, 4)
    maps[0, 0], maps[0, 1], maps[0, 2] = 0.5, torch.tensor([0.1, 0.3, 0.1, 0.3]), 0.05
    assert one("context_mass", maps, MASK[:, :3], SUBJECT[:, :3]) == pytest.approx(0.2 + 0.05)


def test_context_mass_falls_as_the_words_lose_attention():
    assert one("context_mass", 0.5 * random_maps(1)) == pytest.approx(
        0.5 * one("context_mass", random_maps(1))
    )


@pytest.mark.parametrize("measure", ["overlap", "effective_rank", "entropy", "subject_mass"])
def test_measures_of_place_do_not_depend_on_how_much_attention_a_word_gets(measure):
    shares = torch.tensor([0.3, 1.0, 0.01, 0.6]).view(1, N, 1)
    assert one(measure, random_maps(1) * shares) == pytest.approx(
        one(measure, random_maps(1)), abs=1e-5
    )


# ----------------------------------------------------------------------------- what must not matter
@pytest.mark.parametrize("measure", collapse.MEASURES)
def test_padding_does_not_change_a_measure(measure):
    """A batch's shorter prompts have masked words, and what their maps hold is of no account."""
    maps, mask, subject = random_maps(), MASK.expand(3, -1), SUBJECT.expand(3, -1)
    expected = collapse.measure(maps, mask, subject)[measure]

    def more(x, value):
        return torch.cat([x, torch.full_like(x[:, :2], value)], 1)

    for filling in (0.0, 0.37):
        padded = torch.cat([maps, torch.full((3, 2, Q), filling) * torch.rand(3, 2, Q)], 1)
        for wrongly in (False, True):
            found = collapse.measure(padded, more(mask, False), more(subject, wrongly))[measure]
            torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("measure", collapse.MEASURES)
def test_the_order_of_the_words_does_not_change_a_measure(measure):
    maps, order = random_maps(), torch.tensor([2, 0, 3, 1])
    expected = collapse.measure(maps, MASK.expand(3, -1), SUBJECT.expand(3, -1))[measure]
    found = collapse.measure(maps[:, order], MASK.expand(3, -1), SUBJECT.expand(3, -1)[:, order])[
        measure
    ]
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("measure", collapse.MEASURES)
def test_the_others_of_the_batch_do_not_change_a_measure(measure):
    maps = random_maps()
    together = collapse.measure(maps, MASK.expand(3, -1), SUBJECT.expand(3, -1))[measure]
    alone = torch.cat([collapse.measure(maps[i : i + 1], MASK, SUBJECT)[measure] for i in range(3)])
    torch.testing.assert_close(together, alone, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    "words, subject",
    [
        ([True] * 4, [True] * 4),  # "sks mug": no context
        ([True] * 4, [False] * 4),  # the subject is not named
        ([True] + [False] * 3, [True] + [False] * 3),
        ([False] * 4, [False] * 4),  # no content word at all
    ],
)
@pytest.mark.parametrize(
    "maps", [random_maps(1), torch.zeros(1, N, Q), torch.full((1, N, Q), 0.25)]
)
def test_every_measure_is_finite(words, subject, maps):
    mask, subject = torch.tensor([words]), torch.tensor([subject])
    found = {
        **collapse.measure(maps, mask, subject),
        "divergence": collapse.divergence(maps, random_maps(1), mask),
    }
    assert all(value.isfinite().all() for value in found.values()), found


# -------------------------------------------------------------------------- divergence, sensitivity
def test_divergence_is_zero_for_equal_maps_and_one_for_disjoint_ones():
    maps = disjoint()
    torch.testing.assert_close(
        collapse.divergence(maps, 0.3 * maps, MASK), torch.zeros(1, N), atol=1e-6, rtol=0
    )
    torch.testing.assert_close(collapse.divergence(maps, maps.roll(4, 2), MASK), torch.ones(1, N))


def test_divergence_is_symmetric_between_zero_and_one_and_only_of_real_words():
    a, b, mask = random_maps(), random_maps(seed=1), torch.tensor([[True, True, False, True]] * 3)
    found = collapse.divergence(a, b, mask)
    torch.testing.assert_close(found, collapse.divergence(b, a, mask))
    assert (found[mask] > 0).all() and (found[mask] < 1).all() and (found[:, 2] == 0).all()


def predictions(contexts: int = 4, batch: int = 2) -> torch.Tensor:
    return torch.randn(contexts, batch, 4, 8, 8, generator=torch.Generator().manual_seed(0))


def test_prompt_sensitivity_is_zero_where_the_context_changes_nothing():
    assert collapse.prompt_sensitivity(predictions()[:1].expand(4, -1, -1, -1, -1)).tolist() == [
        0,
        0,
    ]
    assert collapse.prompt_sensitivity(torch.zeros(4, 2, 4, 8, 8)).tolist() == [0, 0]


def test_prompt_sensitivity_does_not_depend_on_the_scale_of_the_predictions():
    expected = collapse.prompt_sensitivity(predictions())
    torch.testing.assert_close(collapse.prompt_sensitivity(37 * predictions()), expected)
    torch.testing.assert_close(
        collapse.prompt_sensitivity(predictions().bfloat16()), expected, atol=1e-2, rtol=1e-2
    )


def test_prompt_sensitivity_falls_as_the_predictions_come_together():
    common = 5 * torch.ones(1, 2, 4, 8, 8)
    values = torch.stack(
        [collapse.prompt_sensitivity(common + spread * predictions()) for spread in (1, 0.5, 0.1)]
    )
    assert (values.diff(dim=0) < 0).all()


def test_prompt_sensitivity_of_one_context_is_zero_and_not_nan():
    assert collapse.prompt_sensitivity(predictions(contexts=1)).tolist() == [0, 0]


# ----------------------------------------------------------------- words of a prompt, for the above
@pytest.fixture(scope="module")
def model(tiny_base):
    return load_backbone(str(tiny_base))


@pytest.mark.parametrize(
    "prompt, identifier, class_noun, expected",
    [
        ("a sks mug on the beach", "sks", "mug", ["sks", "mug"]),
        ("SKS Mug, red", "sks", "mug", ["SKS", "Mug"]),
        ("a sks coffee mug with tea", "sks", "coffee mug", ["sks", "coffee", "mug"]),
        ("a sks teddy-bear in the snow", "sks", "teddy-bear", ["sks", "teddy-bear"]),
        ("a sks mug's handle", "sks", "mug", ["sks", "mug's"]),
        ("a sks mug’s handle", "sks", "mug", ["sks", "mug’s"]),
        ("a <sks> mug", "<sks>", "mug", ["sks", "mug"]),
        ("a smug dog", "sks", "mug", []),
    ],
)
def test_the_subjects_words_are_found_in_a_prompt(model, prompt, identifier, class_noun, expected):
    spans = model.spans(prompt)
    found = subject_words(model, [prompt], identifier, class_noun, len(spans) + 2)
    assert found.shape == (1, len(spans) + 2) and not found[0, len(spans) :].any()
    assert [span.word for span, own in zip(spans, found[0].tolist()) if own] == expected


def test_the_token_table_holds_every_words_positions_and_pads_the_shorter_prompt(model):
    prompts = ["a sks mug on the wonderful beach", "sky", "of the"]
    tokens, words = token_table(model, prompts)
    assert tokens.shape[0] == words.shape[0] == 3 and words.shape[2] == tokens.shape[1]
    for i, prompt in enumerate(prompts):
        spans = model.spans(prompt)
        for j in range(words.shape[1]):
            positions = tokens[i][words[i, j].bool()].tolist()
            assert positions == (list(spans[j].tokens) if j < len(spans) else [])
    assert words.sum(1).max() == 1  # a token is of one word
