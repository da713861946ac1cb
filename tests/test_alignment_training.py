"""The model that aligns modalities, and its training without labels."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from mmfusion.data.folds import FoldedDataset
from mmfusion.dataset import Fold, Split
from mmfusion.errors import InputError
from mmfusion.losses.alignment import ALIGNMENTS
from mmfusion.metrics.retrieval import cross_retrieval
from mmfusion.models.alignment import LEAST_TEMPERATURE, TEMPERATURE, AlignmentEnsemble, AlignmentModel
from mmfusion.models.fusion import FusionEnsemble
from mmfusion.training.align import AlignmentTraining, Weighting, align, mean_precision
from mmfusion.training.trainer import train

DIMS = {"a": 6, "b": 5, "c": 4}
SHORT = AlignmentTraining(latent_dim=4, hidden_dim=8, seeds=2, epochs=3, batch_size=16, patience=3)


def features_of(n: int = 9, dims: dict[str, int] = DIMS) -> dict[str, torch.Tensor]:
    torch.manual_seed(1)
    return {name: torch.randn(n, d) * 3 + 2 for name, d in dims.items()}


def model_of(dims: dict[str, int] = DIMS, **shape) -> AlignmentModel:
    torch.manual_seed(0)
    model = AlignmentModel(dims, **{"latent_dim": 4, "hidden_dim": 8} | shape)
    for name, x in features_of(50, dims).items():
        model.standardise[name].fit(x)
    return model


def toy(folds: int = 1, modalities: int = 2) -> FoldedDataset:
    """120 examples of four shared factors, seen through linear maps with noise."""
    rng = torch.Generator().manual_seed(0)
    factors = torch.randn(120, 4, generator=rng)
    maps = {name: torch.randn(4, d, generator=rng) for name, d in list(DIMS.items())[:modalities]}
    features = {name: factors @ w + 0.1 * torch.randn(120, w.shape[1], generator=rng) for name, w in maps.items()}
    order = torch.randperm(120, generator=rng)
    cuts = [Fold(rows[60:], rows[30:60], rows[:30]) for rows in (order.roll(60 * f) for f in range(folds))]
    pool = Split(features, torch.zeros(120), [str(i) for i in range(120)])
    return FoldedDataset("toy", "regression", pool, cuts, [], {}, labelled=False)


# ---- the model ---------------------------------------------------------------------------------------------------


def test_hidden_modality_lies_at_the_mean_of_the_examples_others():
    model, x = model_of(), features_of()
    full = model(x).latents
    present = {"a": torch.tensor([0.0, 1, 0, 1, 1, 1, 1, 1, 0]), "b": torch.tensor([1.0, 0, 0, 1, 1, 1, 1, 1, 0])}
    hidden = model(x, present | {"c": torch.tensor([1.0] * 8 + [0])}).latents
    for i in range(9):
        there = [name for name in DIMS if i < 8 and (name == "c" or present[name][i])]
        for name in DIMS:
            if name in there or not there:  # of the last example nothing is left: it keeps its own
                expected = full[name][i]
            else:
                expected = sum(full[other][i] for other in there) / len(there)
            torch.testing.assert_close(hidden[name][i], expected)


def test_no_gradient_flows_through_a_hidden_latent_to_any_modality():
    model, x = model_of(), features_of(5)
    half = model(x, {"a": torch.tensor([0.0, 0, 1, 1, 1])}).latents["a"]
    grads = [
        torch.autograd.grad(
            half[rows].square().sum(), list(model.jwae.parameters()), allow_unused=True, retain_graph=True
        )
        for rows in (slice(0, 2), slice(2, 5))
    ]
    total = [sum(float(g.abs().sum()) for g in grad if g is not None) for grad in grads]
    assert total[0] == 0 and total[1] > 0


def test_hidden_latents_do_not_depend_on_their_own_features():
    model, x = model_of(), features_of(5)
    other = x | {"a": torch.randn(5, 6)}
    present = {"a": torch.zeros(5)}
    torch.testing.assert_close(model(x, present).latents["a"], model(other, present).latents["a"])
    assert not torch.allclose(model(x).latents["a"], model(other).latents["a"])


def test_identity_start_gives_the_standardised_features_back_and_forth():
    dims = {"a": 4, "b": 4}
    model, x = model_of(dims, hidden_dim=0), features_of(7, dims)
    model.start_at_identity()
    output = model(x)
    for name in dims:
        expected = (x[name] - model.standardise[name].mean) / model.standardise[name].std
        torch.testing.assert_close(output.latents[name], expected)
        torch.testing.assert_close(output.reconstructions[name], expected)
    torch.testing.assert_close(output.temperature.item(), TEMPERATURE)


@pytest.mark.parametrize(("dims", "hidden"), [({"a": 4, "b": 5}, 0), ({"a": 4, "b": 4}, 8)])
def test_identity_of_other_widths_or_with_a_hidden_layer_is_an_error(dims, hidden):
    with pytest.raises(ValueError, match="identity has affine encoders of one width"):
        model_of(dims, hidden_dim=hidden).start_at_identity()


def test_cross_decoding_decodes_every_modality_from_the_sources_latent():
    model, x = model_of(), features_of()
    decoded = model.cross_decode({"b": x["b"]}, "b")
    z = model.jwae.encoders["b"]((x["b"] - model.standardise["b"].mean) / model.standardise["b"].std)
    assert list(decoded) == list(DIMS)
    for name in DIMS:
        torch.testing.assert_close(decoded[name], model.jwae.decoders[name](z))
    torch.testing.assert_close(decoded["b"], model(x).reconstructions["b"])


def test_dropped_features_are_dropped_before_the_encoder_and_not_from_what_is_reconstructed():
    model, x = model_of(), features_of()
    kept = {name: torch.randint(0, 2, v.shape).float() for name, v in x.items()}
    output = model(x, kept=kept)
    for name in DIMS:
        torch.testing.assert_close(
            output.latents[name], model.jwae.encoders[name](output.standardised[name] * kept[name])
        )
    torch.testing.assert_close(output.standardised["a"], model(x).standardised["a"])


def test_temperature_stays_above_its_least():
    model = model_of()
    model.log_temperature.data.fill_(-9.0)
    assert model(features_of()).temperature.item() == pytest.approx(LEAST_TEMPERATURE)


def test_similarity_of_an_ensemble_is_the_mean_cosine_of_its_members():
    torch.manual_seed(0)
    ensemble, x = AlignmentEnsemble(DIMS, 3, 4, 8).eval(), features_of()
    found = ensemble.similarity({"c": x["c"][:4]}, {"a": x["a"]})
    for q in range(4):
        for g in range(9):
            cosines = [
                F.cosine_similarity(m.encode({"c": x["c"]})["c"][q], m.encode({"a": x["a"]})["a"][g], dim=0).item()
                for m in ensemble.members
            ]
            assert found[q, g].item() == pytest.approx(np.mean(cosines), abs=1e-5)
    assert ensemble.encode(x)["b"].shape == (3, 9, 4)


# ---- training ----------------------------------------------------------------------------------------------------


def precision(data: FoldedDataset, ensemble: AlignmentEnsemble) -> list[float]:
    dev = {name: x[data.folds[0].dev] for name, x in data.pool.features.items()}
    z = [member.eval().encode(dev) for member in ensemble.members]
    pairs = [cross_retrieval({name: x.detach() for name, x in one.items()}).values() for one in z]
    return [float(np.mean([scores.mean_average_precision for scores in one])) for one in pairs]


def test_contrast_finds_partners_and_no_weight_stays_at_chance():
    data = toy()
    rows = [Weighting("contrast", {"info_nce": 1.0}), Weighting("nothing", {"info_nce": 0.0})]
    training = AlignmentTraining(latent_dim=4, hidden_dim=0, seeds=2, epochs=40, batch_size=30, learning_rate=1e-2)
    found = align(data, rows, training)
    assert list(found) == ["contrast", "nothing"]
    chance = np.mean(1 / np.arange(1, 31))  # of one partner among 30
    assert min(precision(data, found["contrast"])) > 0.8
    assert max(precision(data, found["nothing"])) < chance + 0.2


def test_members_of_a_stack_equal_members_trained_alone():
    data = toy(folds=2, modalities=3)
    rows = [
        Weighting("one", {"info_nce": 1.0, "prior": 0.1}, masking=0.3),
        Weighting("two", {"transport": 1.0, "reconstruction": 0.5}),
    ]
    together = align(data, rows, SHORT)
    assert [len(ensemble.members) for ensemble in together.values()] == [4, 4]
    for row in rows:
        alone = align(data, [row], SHORT)[row.label]
        for one, other in zip(together[row.label].members, alone.members, strict=True):
            for (name, x), y in zip(one.state_dict().items(), other.state_dict().values(), strict=True):
                torch.testing.assert_close(x, y, rtol=1e-3, atol=1e-4, msg=lambda m, n=name: f"{n}: {m}")


def test_loss_that_a_row_does_not_weigh_is_not_computed_for_it(monkeypatch):
    """Rows of the same losses are one stack; a loss that fails spoils the rows that weigh it alone."""
    stacks = []

    def failing(latents, **_):
        raise RuntimeError("computed")

    def recorded(problem, members, *args, **options):
        stacks.append([member.settings["weighting"] for member in members[:: SHORT.seeds]])
        return train(problem, members, *args, **options)

    monkeypatch.setitem(ALIGNMENTS, "transport", failing)
    monkeypatch.setattr("mmfusion.training.align.train", recorded)
    rows = [
        Weighting("one", {"info_nce": 1.0}),
        Weighting("two", {"info_nce": 1.0, "coral": 1.0, "transport": 0.0}),
        Weighting("three", {"info_nce": 2.0, "transport": 0.0}),
    ]
    assert list(align(toy(), rows, SHORT)) == ["one", "two", "three"]
    assert stacks == [["one", "three"], ["two"]]
    with pytest.raises(RuntimeError, match="computed"):
        align(toy(), [Weighting("four", {"transport": 1.0})], SHORT)


def test_training_in_groups_goes_on_from_a_checkpoint_of_each(tmp_path):
    rows = [Weighting("one", {"info_nce": 1.0}), Weighting("two", {"coral": 1.0})]
    first = align(toy(), rows, SHORT, checkpoint=tmp_path / "a.safetensors")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a-0.safetensors", "a-1.safetensors"]
    again = align(toy(), rows, SHORT, checkpoint=tmp_path / "a.safetensors")
    for label in ("one", "two"):
        for x, y in zip(first[label].state_dict().values(), again[label].state_dict().values(), strict=True):
            assert torch.equal(x, y)


def test_members_are_seed_major_then_fold_and_standardised_on_their_own_training_part():
    data = toy(folds=2)
    members = align(data, [Weighting("x", {"info_nce": 1.0})], SHORT)["x"].members
    for i, member in enumerate(members):
        for name, x in data.pool.features.items():
            torch.testing.assert_close(member.standardise[name].mean, x[data.folds[i % 2].train].mean(0))
    only = data.folds[1:]
    alone = align(FoldedDataset("t", "regression", data.pool, only, [], {}), [Weighting("x", {"info_nce": 1.0})], SHORT)
    weights = [m.jwae.encoders["a"].state_dict() for m in (members[1], members[3], *alone["x"].members)]
    for one, other in ((0, 2), (1, 3)):
        for key in weights[0]:
            torch.testing.assert_close(weights[one][key], weights[other][key], rtol=1e-3, atol=1e-4)


def test_targets_are_not_looked_at():
    data = toy()
    other = toy()
    other.pool.target.copy_(torch.randn(120))
    found = [align(one, [Weighting("x", {"info_nce": 1.0})], SHORT)["x"].state_dict() for one in (data, other)]
    assert all(torch.equal(found[0][key], found[1][key]) for key in found[0])


def test_only_the_named_modalities_are_aligned():
    ensemble = align(toy(modalities=3), [Weighting("x", {"info_nce": 1.0})], SHORT, modalities=("c", "a"))["x"]
    assert ensemble.shape["input_dims"] == {"a": 6, "c": 4}


@pytest.mark.parametrize(
    ("weights", "modalities", "words"),
    [
        ({"infonce": 1.0}, None, "no loss 'infonce'; known are margin, info_nce"),
        ({"info_nce": 1.0}, ("a",), "two modalities or more are aligned, not a alone"),
    ],
)
def test_what_cannot_be_aligned_is_a_value_error(weights, modalities, words):
    with pytest.raises(ValueError, match=words):
        align(toy(), [Weighting("x", weights)], SHORT, modalities=modalities)


def test_precision_of_a_collapsed_space_is_zero_and_of_a_perfect_one_is_one():
    z = np.random.default_rng(0).normal(size=(8, 1, 3)).repeat(3, 1)
    assert mean_precision(z) == pytest.approx(1)
    z[3, 1] = 0
    assert mean_precision(z) == 0


# ---- files


def test_saved_ensemble_comes_back_and_no_other_model_does(tmp_path):
    ensemble = AlignmentEnsemble({"a": 5, "b": 4}, members=2, latent_dim=3, hidden_dim=0).eval()
    ensemble.save_pretrained(tmp_path)
    loaded = AlignmentEnsemble.from_pretrained(tmp_path)
    assert loaded.shape == ensemble.shape and not loaded.training
    features = {"a": torch.randn(6, 5), "b": torch.randn(6, 4)}
    for name, z in ensemble.encode(features).items():
        assert torch.equal(loaded.encode(features)[name], z)
    with pytest.raises(InputError, match="hidden_dim is 0"):
        FusionEnsemble.from_pretrained(tmp_path)
    AlignmentEnsemble({"a": 5, "b": 4}).save_pretrained(tmp_path)
    with pytest.raises(InputError, match="fusion is"):
        FusionEnsemble.from_pretrained(tmp_path)
    FusionEnsemble({"a": 5, "b": 4}).save_pretrained(tmp_path)
    with pytest.raises(InputError, match=r"fusion is .lmf"):
        AlignmentEnsemble.from_pretrained(tmp_path)
