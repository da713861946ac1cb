"""Dropout of single features: its rate, who shares it, and what the model makes of it."""

import pytest
import torch

from mmfusion.dataset import Fold, Split
from mmfusion.models.fusion import FusionModel
from mmfusion.training.feed import Feed, Member


def test_features_are_dropped_at_their_rate_alike_for_members_of_a_seed_and_never_where_the_rate_is_0():
    split = Split({"a": torch.ones(64, 30), "b": torch.ones(64, 20)}, torch.zeros(64), [str(i) for i in range(64)])
    rates = (0.0, 0.25, 0.25, 0.75)
    members = [Member(seed, {}, feature_dropout=rate) for seed, rate in zip((0, 0, 0, 1), rates, strict=True)]
    fold = Fold(torch.arange(64), torch.arange(64))
    feed = Feed(split, members, [fold], 32, torch.device("cpu"))
    first, second = (torch.cat([batch.kept["a"], batch.kept["b"]], -1) for batch in feed.batches(0))
    assert first.shape == (4, 32, 50) and not torch.equal(first, second)
    assert (first[0] == 1).all() and torch.equal(first[1], first[2])
    for s, rate in enumerate(rates):
        assert set(first[s].unique().tolist()) <= {0.0, torch.tensor(1 / (1 - rate)).item()}
        assert abs((first[s] == 0).float().mean() - rate) < 4 * (0.25 / 1600) ** 0.5
    again = next(iter(feed.batches(0))).kept
    assert torch.equal(torch.cat([again["a"], again["b"]], -1), first)
    assert (
        next(iter(Feed(split, members[:1], [Fold(torch.arange(64), torch.arange(64))], 32, "cpu").batches(0))).kept
        == {}
    )


def test_a_rate_of_one_modality_alone_leaves_the_others_whole_and_draws_the_same_masks():
    split = Split({"a": torch.ones(64, 30), "b": torch.ones(64, 20)}, torch.zeros(64), [str(i) for i in range(64)])
    fold = Fold(torch.arange(64), torch.arange(64))
    rates = ({"b": 0.5}, 0.5, {"a": 0.25, "b": 0.75}, 0.0)
    members = [Member(0, {}, feature_dropout=rate) for rate in rates]
    kept = next(iter(Feed(split, members, [fold], 32, torch.device("cpu")).batches(0))).kept
    assert (kept["a"][0] == 1).all() and torch.equal(kept["b"][0], kept["b"][1]) and (kept["b"][0] == 0).any()
    assert set(kept["a"][2].unique().tolist()) == {0.0, torch.tensor(1 / 0.75).item()}
    assert set(kept["b"][2].unique().tolist()) == {0.0, 4.0} and (kept["b"][3] == 1).all()
    with pytest.raises(ValueError, match="'c'"):
        Feed(split, [Member(0, {}, feature_dropout={"c": 0.5})], [fold], 32, torch.device("cpu"))


def test_a_dropped_feature_is_its_mean_to_the_encoder_and_whole_to_the_reconstruction():
    model = FusionModel({"a": 4, "b": 3}, 5, 8, 2)
    features = {"a": torch.randn(50, 4) * 3 + 2, "b": torch.randn(50, 3)}
    model.fit_standardisation(features)
    kept = {"a": torch.tensor([0.0, 2.0, 2.0, 0.0]).expand(50, 4), "b": torch.ones(50, 3)}
    output = model(features, kept=kept)
    by_hand = {name: module(features[name]) * kept[name] for name, module in model.standardise.items()}
    torch.testing.assert_close(output.latents["a"], model.jwae.encode(by_hand)["a"])
    torch.testing.assert_close(output.standardised["a"], model.standardise["a"](features["a"]))
