"""Bases that are known by a name alone: nothing but the registry knows which these are."""

from __future__ import annotations

import warnings

import pytest

from dreamblend.evaluation.encoders import OWN
from dreamblend.evaluation.protocols import PRESETS, find
from dreamblend.models import load_backbone, locate_base
from dreamblend.models.bases import SHIPPED, ShippedBase, own_judges
from dreamblend.training.module import Tuner
from dreamblend.tuning import METHODS


@pytest.mark.parametrize("name", SHIPPED)
def test_what_ships_has_its_weights_its_judges_and_a_rate_of_every_method(name):
    assert locate_base(name) == str(SHIPPED[name].folder) and SHIPPED[name].folder.is_dir()
    protocol = find("auto", name)
    assert protocol.name == own_judges(name) and {protocol.subject, protocol.prompt} <= OWN.keys()
    assert all(name in method.rates for method in METHODS.values())


def test_another_base_is_one_entry(tiny_base, monkeypatch):
    monkeypatch.setitem(SHIPPED, "tiny", ShippedBase(tiny_base, judges="dreambench-plus"))
    assert load_backbone("tiny").fingerprint() == load_backbone(str(tiny_base)).fingerprint()
    assert find("auto", "tiny") is PRESETS["dreambench-plus"]
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # a high rate is no surprise there
        assert Tuner("tiny", learning_rate=1.0).base == "tiny"


def test_a_base_of_the_wide_world_has_no_judges_of_its_own():
    assert own_judges("owner/name") is None and find("auto", "owner/name").name == "dreambooth"
