"""Training of models of tokens: a member is the same beside others, alone, and after a kill; every task; every term."""

import math
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
from sklearn.metrics import roc_auc_score

from mmfusion.dataset import Dataset, Split, take
from mmfusion.errors import NonFiniteLoss
from mmfusion.losses.token_alignment import TransportTerm
from mmfusion.models.fusion import ModelConfig
from mmfusion.models.temporal_lmf import TemporalFusion
from mmfusion.models.token_ensemble import TokenConfig, TokenEnsemble
from mmfusion.models.wma import TokenTransformer
from mmfusion.sequences import Sequences
from mmfusion.training import fit, trainer
from mmfusion.training.feed import Feed, Member
from mmfusion.training.fit import Method, fit_methods
from mmfusion.training.objective import predict_tokens, token_objective
from mmfusion.training.recipe import ObjectiveConfig, TrainingConfig
from mmfusion.training.trainer import Fold, Problem, Schedule, TrainingData, train

DIMS = {"image": 4, "text": 6}
BOTH = ("image", "text")
FUSIONS = ("wma", "transport")


def split(examples: int, seed: int, task: str = "binary", dims: dict[str, int] = DIMS) -> Split:
    """One token of each modality carries a sign; their product decides the label."""
    rng = np.random.default_rng(seed)
    signs = rng.choice([-1.0, 1.0], (examples, len(dims)))
    features = {}
    for m, (name, dim) in enumerate(dims.items()):
        parts = [torch.from_numpy(rng.normal(0, 0.3, (rng.integers(1, 6), dim))).float() for _ in range(examples)]
        for part, sign in zip(parts, signs[:, m], strict=True):
            part[rng.integers(len(part)), 0] = 2.0 * sign
        features[name] = Sequences(parts)
    product = torch.from_numpy(signs.prod(1)).float()
    target = {
        "binary": (product > 0).float(),
        "regression": 3 * product + 10,
        "multilabel": torch.stack([product > 0, torch.from_numpy(signs[:, 0]) > 0], 1).float(),
        "multiclass": (product > 0).float() + (product > 0) * torch.from_numpy(signs[:, 0] > 0),
    }[task].float()
    return Split(features, target, [f"{seed}-{i}" for i in range(examples)])


def dataset(task: str = "binary", dims: dict[str, int] = DIMS, examples: int = 72) -> Dataset:
    names = {"multiclass": ("a", "b", "c")}.get(task, ("class 0", "class 1"))
    splits = {"train": split(examples, 0, task, dims), "dev": split(40, 1, task, dims)}
    labels = ["first", "second"] if task == "multilabel" else []
    return Dataset("signs", task, splits, "dev", class_names=names, target_names=labels)


TOKENS = {
    "wma": TokenConfig("wma", transformer_width=16, transformer_layers=1, transformer_heads=4),
    "transport": TokenConfig("transport"),
}
MODEL = ModelConfig(latent_dim=4, hidden_dim=8, rank=2)
TRAINING = TrainingConfig(seeds=2, epochs=2, batch_size=16, weight_decay=0.1, device="cpu")


def fitted(fusion: str, data: Dataset | list[Dataset] | None = None, methods: list[Method] | None = None, **more):
    objectives = more.pop("objectives", ObjectiveConfig())
    options = {name: more.pop(name) for name in ("checkpoint", "on_epoch") if name in more}
    modalities = tuple((data[0] if isinstance(data, list) else data or dataset()).input_dims)
    training, tokens = replace(TRAINING, **more), TOKENS[fusion]
    if fusion == "wma":  # one set of tests for both models
        tokens = replace(tokens, transformer_modality_dropout=training.modality_dropout)
    return fit_methods(
        data or dataset(),
        methods or [Method("it", modalities, fusion)],
        MODEL,
        objectives,
        training,
        tokens=tokens,
        **options,
    )


def test_transformer_has_a_modality_dropout_of_its_own():
    method, common = Method("it", tuple(dataset().input_dims)), replace(TRAINING, seeds=1)
    other = replace(common, modality_dropout=0.5)

    def found(fusion, training, **own):
        tokens, methods = replace(TOKENS[fusion], **own), [replace(method, fusion=fusion)]
        (ensemble,), _ = fit_methods(dataset(), methods, MODEL, ObjectiveConfig(), training, tokens=tokens)
        return weights_of(ensemble)

    assert torch.equal(found("wma", common), found("wma", other))
    assert not torch.equal(found("wma", common), found("wma", common, transformer_modality_dropout=0.5))
    assert not torch.equal(found("transport", common), found("transport", other))


# ---- members


def run(fusion: str, members: list[Member], stacked: bool, **options):
    data = dataset()
    fold = Fold(torch.arange(72), torch.arange(40))

    def build(member: Member) -> torch.nn.Module:
        if fusion == "wma":
            return TokenTransformer(DIMS, width=16, layers=1, heads=4, places=6, dropout=0.2)
        return TemporalFusion(DIMS, latent_dim=4, hidden_dim=8, rank=2)

    problem = Problem(
        build,
        partial(token_objective, transport=TransportTerm()),
        predict_tokens,
        lambda p, y: roc_auc_score(y, p),
        uniforms=build(members[0]).uniforms,
    )
    schedule = Schedule(
        **{"epochs": 2, "batch_size": 16, "learning_rate": 1e-4, "stacked": stacked, "checkpoint_seconds": 0.0}
        | options
    )
    return train(problem, members, TrainingData(data.splits["train"], data.splits["dev"], [fold]), schedule)


def members_of(fusion: str, seeds: int) -> list[Member]:
    weights = {"bce": 1.0, "transport": 0.3, "token_mmd": 0.1}
    weights |= {"mmd": 0.5, "reconstruction": 0.1} if fusion == "transport" else {}
    return [Member(seed, weights, 0.1, {}, dict.fromkeys(DIMS, 0.3), 0, 0.25) for seed in range(seeds)]


def weights_of(model: torch.nn.Module) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def said(model: torch.nn.Module) -> torch.Tensor:
    """Not the weights: where a gradient is 0, as of the keys' bias, Adam makes whole steps of its rounding errors."""
    with torch.no_grad():
        features = dataset().splits["dev"].features
        return predict_tokens(model, {name: x.padded() for name, x in features.items()})


TO_ROUNDING = 1e-3  # of logits that differ by twenty times that between seeds


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("fusion", FUSIONS)
def test_stacked_training_is_that_of_member_after_member(fusion):
    members = members_of(fusion, 3)
    members.append(replace(members[1], loss_weights=members[1].loss_weights | {"transport": 1.0}))  # shares its batches
    stacked, in_turn = (run(fusion, members, choice) for choice in (True, False))
    for a, b in zip(stacked.models, in_turn.models, strict=True):
        torch.testing.assert_close(said(a), said(b), rtol=0, atol=TO_ROUNDING)
    for a, b in zip(stacked.history, in_turn.history, strict=True):
        for term in a["loss"]:
            np.testing.assert_allclose(a["loss"][term], b["loss"][term], rtol=1e-3, atol=1e-4)


def test_members_of_one_seed_trained_in_turn_have_their_batches_in_common_and_not_in_copies():
    members = [*members_of("wma", 2), *members_of("wma", 2)]
    data, fold = dataset().splits["train"], Fold(torch.arange(72), torch.arange(40))
    feeds = [Feed(data, members, [fold], 16, torch.device("cpu"), stacked=stacked) for stacked in (True, False)]
    for copied, shared in zip(*(feed.batches(0) for feed in feeds), strict=True):
        for name in DIMS:
            for whole, lazy in zip(copied.features[name], shared.features[name], strict=True):
                assert whole.shape == lazy.shape and all(torch.equal(whole[s], lazy[s]) for s in range(4))
                assert lazy[0].data_ptr() == lazy[2].data_ptr() != lazy[1].data_ptr()


@pytest.mark.parametrize("stacked", [True, False])
@pytest.mark.parametrize("fusion", FUSIONS)
def test_member_alone_is_the_same_among_five(fusion, stacked):
    members = members_of(fusion, 5)
    among = run(fusion, members, stacked)
    alone = run(fusion, members[3:4], stacked)
    torch.testing.assert_close(said(among.models[3]), said(alone.models[0]), rtol=0, atol=TO_ROUNDING)
    assert (said(among.models[3]) - said(among.models[2])).abs().max() > 20 * TO_ROUNDING


class Killed(Exception):
    pass


@pytest.mark.parametrize("fusion", FUSIONS)
def test_resume_after_a_kill_changes_no_bit(fusion, tmp_path, monkeypatch):
    monkeypatch.setattr(fit, "Schedule", partial(Schedule, checkpoint_seconds=0.0))
    (whole,), _ = fitted(fusion, epochs=4, feature_dropout=0.25)
    path = tmp_path / "checkpoint.safetensors"

    def kill(record: dict) -> None:
        if record["epoch"] == 1:
            raise Killed

    with pytest.raises(Killed):
        fitted(fusion, epochs=4, feature_dropout=0.25, checkpoint=path, on_epoch=kill)
    seen = []
    (resumed,), _ = fitted(fusion, epochs=4, feature_dropout=0.25, checkpoint=path, on_epoch=seen.append)
    assert [record["epoch"] for record in seen] == [0, 1, 2, 3]
    for name, value in whole.state_dict().items():
        assert torch.equal(value, resumed.state_dict()[name]), name


def test_checkpoint_of_tokens_cut_elsewhere_is_of_another_training(tmp_path):
    path, data = tmp_path / "checkpoint.safetensors", dataset()
    fitted("wma", data, checkpoint=path)
    parts = list(data.splits["train"].features["text"])
    # no longest sequence becomes longer or shorter, or else the table of places would tell
    long = next(i for i, part in enumerate(parts[:-1]) if 1 < len(part) < 5 and len(parts[i + 1]) < 5)
    parts[long : long + 2] = [parts[long][:-1], torch.cat([parts[long][-1:], parts[long + 1]])]
    features = data.splits["train"].features | {"text": Sequences(parts)}
    data.splits["train"] = replace(data.splits["train"], features=features)
    with pytest.raises(Exception, match="other settings"):
        fitted("wma", data, checkpoint=path)


@pytest.mark.parametrize("fusion", FUSIONS)
def test_folds_are_trained_apart(fusion):
    whole = split(90, 0)
    parts = [np.arange(90)[k::3] for k in range(3)]
    datasets = []
    for k in range(3):
        splits = {
            "train": take(whole, np.sort(np.concatenate([parts[k], parts[(k + 1) % 3]]))),
            "dev": take(whole, parts[(k + 2) % 3][:15]),
            "test": take(whole, parts[(k + 2) % 3][15:]),
        }
        datasets.append(Dataset("signs", "binary", splits, "dev"))
    (ensemble,), trained = fitted(fusion, datasets)
    assert len(ensemble.members) == 6 and len(trained.history[0]["score"]) == 6
    (alone,), _ = fitted(fusion, datasets[1])
    for s in range(2):  # members are seed-major, then fold
        own, member = alone.members[s], ensemble.members[3 * s + 1]
        torch.testing.assert_close(own.standardise["text"].mean, member.standardise["text"].mean)
    outputs = ensemble.part(1, 3).predict(datasets[1].splits["test"].features)
    assert outputs.shape == (2, 15)


# ---- what is drawn


def test_every_batch_holds_other_examples_and_members_of_a_seed_share_them():
    data = split(50, 0)
    members = [Member(0, {}), Member(1, {}), Member(0, {}, dropout={"text": 0.5}, feature_dropout=0.5)]
    feed = Feed(data, members, [Fold(torch.arange(50), torch.arange(50))], 16, torch.device("cpu"), None, 3)
    target_sums, masks = [], []
    for batch in feed.batches(0):
        assert batch.features["text"].values.shape[:2] == (3, 16)
        assert torch.equal(batch.features["text"].values[0], batch.features["text"].values[2])
        assert not torch.equal(batch.target[0], batch.target[1])
        assert batch.uniforms[0].shape == (3, 16, 3) and batch.kept["text"].shape == (3, 16, 6)
        assert (batch.kept["text"][:2] == 1).all() and set(batch.kept["text"][2].unique().tolist()) == {0.0, 2.0}
        assert (batch.present["text"][:2] == 1).all()
        target_sums.append(batch.target.sum())
        masks.append(batch.features["text"].mask.sum(-1))
    hidden = torch.cat([batch.present["text"][2] for batch in feed.batches(0)])
    assert 0.2 < hidden.mean() < 0.8
    again = [batch.features["text"].mask.sum(-1) for batch in feed.batches(0)]
    assert all(torch.equal(a, b) for a, b in zip(masks, again, strict=True))
    # batches of like length: shorter padding than whole random ones
    padded = sum(mask.amax() for mask in masks)
    assert padded <= 5 * len(masks) - 1


@pytest.mark.parametrize("fusion", FUSIONS)
def test_rate_of_hiding_changes_what_is_learned(fusion):
    found = [weights_of(fitted(fusion, modality_dropout=rate, seeds=1)[0][0]) for rate in (0.0, 0.9)]
    assert not torch.allclose(found[0], found[1]) and all(w.isfinite().all() for w in found)


def test_members_that_have_stopped_cost_nothing_and_change_nothing(monkeypatch):
    options = {"epochs": 8, "patience": 1, "seeds": 4, "learning_rate": 1e-2, "keep": "best"}
    counts, original = [], trainer._in_turn

    def counting(*args, only=None, **more):
        counts.append(None if only is None else len(only))
        return original(*args, only=only, **more)

    monkeypatch.setattr(trainer, "_in_turn", counting)
    (found,), trained = fitted("wma", **options)
    passed_over = [count for count in counts if count is not None and count < 4]
    assert passed_over, "some seed stops before the others"
    monkeypatch.setattr(trainer._State, "training_on", lambda self, *_: list(range(len(self.best_epoch))))
    (expected,), whole = fitted("wma", **options)
    assert torch.equal(weights_of(found), weights_of(expected))
    assert trained.best_epoch == whole.best_epoch and trained.best_score == whole.best_score
    for record, best in zip(np.transpose([r["score"] for r in trained.history]), whole.best_epoch, strict=True):
        np.testing.assert_array_equal(record[best + 2 :], record[best + 1 : best + 2].repeat(len(record) - best - 2))


# ---- tasks


@pytest.mark.parametrize("task", ["binary", "regression", "multilabel", "multiclass"])
@pytest.mark.parametrize("fusion", FUSIONS)
def test_every_task_learns_from_its_tokens(fusion, task, tmp_path):
    data = dataset(task, examples=160)
    options = {"epochs": 20, "patience": 20, "learning_rate": 1e-2, "modality_dropout": 0.0, "batch_size": 32}
    (ensemble,), trained = fitted(fusion, data, **options)
    scores = np.array([record["score"] for record in trained.history]).mean(1)
    assert scores.max() > scores[0] + 0.05, scores
    dev = data.splits["dev"]
    p = ensemble.predict(dev.features)
    shapes = {"multilabel": (2, 40, 2), "multiclass": (2, 40, 3)}
    assert p.shape == shapes.get(task, (2, 40))
    if task == "binary":
        assert roc_auc_score(dev.target, p.mean(0)) > 0.8
    if task == "regression":
        assert (p.mean(0) - dev.target).abs().mean() < 2.5 and p.mean().item() == pytest.approx(10, abs=2)
    ensemble.save_pretrained(tmp_path)
    assert torch.equal(TokenEnsemble.from_pretrained(tmp_path).predict(dev.features), p)


@pytest.mark.parametrize("fusion", FUSIONS)
def test_three_modalities_and_one(fusion):
    for dims in (DIMS | {"audio": 3}, {"text": 6}):
        (ensemble,), trained = fitted(fusion, dataset(dims=dict(sorted(dims.items()))))
        assert ("transport" in trained.history[0]["loss"]) == (len(dims) > 1)
        assert ensemble.predict(dataset(dims=dims).splits["dev"].features).isfinite().all()


# ---- terms


def final(fusion: str, term: str, weights: list[dict[str, float]], **more) -> list[float]:
    """Mean of a term over the last epoch, of methods that weigh it differently."""
    methods = [Method(str(k), BOTH, fusion, active_rank=2, weights=own) for k, own in enumerate(weights)]
    options = {"epochs": 25, "patience": 99, "learning_rate": 3e-3, "modality_dropout": 0.0, "keep": "last"} | more
    _, trained = fitted(fusion, methods=methods, **options)
    return np.mean(np.reshape(trained.history[-1]["loss"][term], (len(weights), -1)), 1).tolist()


@pytest.mark.parametrize("fusion", FUSIONS)
def test_transport_brings_tokens_together(fusion):
    without, with_term = final(fusion, "transport", [{"transport": 0.0}, {"transport": 3.0}])
    assert with_term < 0.6 * without


def test_weight_of_transport_rises_over_the_steps_of_its_warm_up():
    """While it rises, tokens stay farther apart than under the whole weight."""

    def distances(share: float) -> list[float]:
        objectives = ObjectiveConfig(transport_warm_up=share, transport_weight=3)
        _, trained = fitted("wma", epochs=4, patience=9, objectives=objectives)
        return [np.mean(record["loss"]["transport"]) for record in trained.history]

    assert all(at_once < late for at_once, late in zip(distances(0.0), distances(1.0), strict=True))


def test_random_plan_is_minimised_where_no_token_is_matched():
    """The control lowers its own loss, which any pairing has: the transport distance is what it does not know."""
    random = ObjectiveConfig(transport_method="random", transport_weight=1.0)
    (without, with_term) = final("wma", "transport", [{"transport": 0.0}, {}], objectives=random)
    assert with_term < without


@pytest.mark.parametrize("fusion", FUSIONS)
def test_mmd_between_tokens_falls_when_weighted(fusion):
    without, with_term = final(fusion, "token_mmd", [{}, {"token_mmd": 3.0}])
    assert with_term < 0.7 * without


def test_what_no_member_weighs_is_not_computed(monkeypatch):
    def fail(*_args: object) -> None:
        raise AssertionError("computed")

    _, trained = fitted("wma", objectives=ObjectiveConfig(transport_weight=0.0))
    assert list(trained.history[0]["loss"]) == ["bce"]
    monkeypatch.setattr(TransportTerm, "__call__", fail)
    fitted("wma", objectives=ObjectiveConfig(transport_weight=0.0))
    with pytest.raises(AssertionError, match="computed"):
        fitted("wma")


def test_unweighted_terms_leave_the_training_as_it_is():
    """A member of weight 0 beside one of weight 1 is the member that never heard of the term."""
    methods = [Method(str(w), BOTH, "wma", weights={"transport": w}) for w in (1.0, 0.0)]
    ensembles, _ = fitted("wma", methods=methods, seeds=1)
    (alone,), _ = fitted("wma", seeds=1, objectives=ObjectiveConfig(transport_weight=0.0))
    torch.testing.assert_close(weights_of(ensembles[1]), weights_of(alone), rtol=0, atol=1e-6)


@pytest.mark.parametrize("prior", ["bures", "sliced", "characteristic"])
def test_every_prior_is_a_term_of_pairs(prior):
    objectives = ObjectiveConfig(mmd_weight=0.0, **{f"{prior}_weight": 1.0})
    _, trained = fitted("transport", objectives=objectives)
    assert prior in trained.history[0]["loss"] and all(map(math.isfinite, trained.history[-1]["loss"][prior]))


def test_unknown_weight_is_refused():
    with pytest.raises(ValueError, match="weighs 'gromov'"):
        fitted("wma", methods=[Method("it", BOTH, "wma", weights={"gromov": 1.0})])


# ---- hostile data


def changed(name: str, change) -> Dataset:
    data = dataset()
    for key, part in data.splits.items():
        x = Sequences([change(tokens) for tokens in part.features[name]])
        data.splits[key] = replace(part, features=part.features | {name: x})
    return data


@pytest.mark.parametrize("fusion", FUSIONS)
@pytest.mark.parametrize(
    ("what", "change"),
    [
        ("zeros", torch.zeros_like),
        ("one token", lambda x: x[:1]),
        ("nothing at all", lambda x: x[:0]),
        ("huge", lambda x: x * 1e30),
        ("tiny", lambda x: x * 1e-30),
    ],
)
def test_odd_tokens_train_to_finite_values(fusion, what, change):
    (ensemble,), trained = fitted(fusion, changed("text", change), feature_dropout=0.25)
    assert weights_of(ensemble).isfinite().all()
    assert all(math.isfinite(v) for record in trained.history for term in record["loss"].values() for v in term)


@pytest.mark.parametrize("fusion", FUSIONS)
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_tokens_that_are_no_numbers_end_in_one_line(fusion, value):
    def spoil(x: torch.Tensor) -> torch.Tensor:
        x = x.clone()
        x[0, 0] = value
        return x

    with pytest.raises(NonFiniteLoss, match="became nan"):
        fitted(fusion, changed("text", spoil))


@pytest.mark.parametrize("fusion", FUSIONS)
def test_strong_dropout_of_everything_stays_finite(fusion, monkeypatch):
    monkeypatch.setitem(TOKENS, "wma", replace(TOKENS["wma"], transformer_dropout=0.9))
    (ensemble,), _ = fitted(fusion, modality_dropout=0.99, feature_dropout=0.9)
    assert weights_of(ensemble).isfinite().all()


@pytest.mark.parametrize("fusion", FUSIONS)
def test_long_sequences(fusion):
    data = dataset(examples=32)
    for key, part in data.splits.items():
        x = Sequences([tokens.repeat(400, 1)[:2000] for tokens in part.features["text"]])
        data.splits[key] = replace(part, features=part.features | {"text": x})
    (ensemble,), _ = fitted(fusion, data, epochs=1, seeds=1, batch_size=4)
    assert ensemble.predict(data.splits["dev"].features).isfinite().all()
