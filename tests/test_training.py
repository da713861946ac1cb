"""The trainer: S members at once are S trainings, kill and resume change no bit."""

import json
import shutil

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import save_file
from sklearn.metrics import roc_auc_score
from torch import nn

from mmfusion.dataset import Split, take
from mmfusion.errors import InputError, NonFiniteLoss
from mmfusion.models.fusion import FusionModel
from mmfusion.training.feed import Batch, Feed, Member, epoch_order
from mmfusion.training.objective import objective, predict
from mmfusion.training.trainer import (
    Fold,
    Problem,
    Schedule,
    TrainingData,
    _learning_rate,
    build_members,
    train,
    vectorized_step,
)

WEIGHTS = {"bce": 1.0, "mmd": 0.3, "reconstruction": 0.1, "alignment": 0.05}
DIMS = {"image": 6, "text": 5}


def split(examples: int, seed: int) -> Split:
    """Two modalities whose product decides the label."""
    rng = torch.Generator().manual_seed(seed)
    features = {name: torch.randn(examples, d, generator=rng) for name, d in DIMS.items()}
    target = (features["image"][:, 0] * features["text"][:, 0] > 0).float()
    return Split(features, target, [str(i) for i in range(examples)])


DATA, SELECTION = split(100, 0), split(60, 1)


def build(member: Member) -> FusionModel:
    model = FusionModel(DIMS, latent_dim=4, hidden_dim=8, rank=3, active_rank=member.settings.get("active_rank"))
    model.fit_standardisation(DATA.features)
    return model


def run(members: list[Member], **options):
    schedule = Schedule(**{"epochs": 3, "batch_size": 16, "checkpoint_seconds": 0.0} | options.pop("schedule", {}))
    terms, outputs = options.pop("objective", objective), options.pop("predict", predict)
    problem = Problem(build, terms, outputs, lambda p, y: roc_auc_score(y, p))
    splits = {"train": DATA, "selection": SELECTION, "folds": None}
    data = TrainingData(**{name: options.pop(name, split) for name, split in splits.items()})
    return train(problem, members, data, schedule, **options)


def weights_of(model: nn.Module) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in model.parameters()])


@pytest.mark.parametrize(("decay_of_companion", "share"), [(0.0, 0.0), (0.1, 0.0), (0.0, 0.5), (0.0, 1.0)])
def test_stacked_training_equals_a_plain_loop_with_adamw(decay_of_companion, share):
    """`share` of all steps over which the weight of two terms rises to 50 times the common one."""
    weights = WEIGHTS | {"mmd": 15.0, "alignment": 2.5} if share else WEIGHTS
    member = Member(seed=3, loss_weights=weights, weight_decay=0.1)
    schedule = {"epochs": 2, "patience": 9, "warm_up": {"mmd": share, "alignment": share} if share else {}}
    trained = run([Member(0, weights, decay_of_companion), member], schedule=schedule)
    (model,) = build_members(build, [member])
    matrices = [p for p in model.parameters() if p.ndim > 1]
    others = [p for p in model.parameters() if p.ndim < 2]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}]
    optimizer, best = torch.optim.AdamW(groups, lr=1e-3), (-1.0, None)
    for epoch in range(2):
        order = epoch_order(3, epoch, len(DATA))
        for k in range(len(DATA) // 16):
            rows = order[16 * k : 16 * k + 16]
            batch = Batch({name: x[rows] for name, x in DATA.features.items()}, DATA.target[rows])
            risen = min(1.0, (6 * epoch + k) / (share * 12)) if share else 1.0
            now = {name: w * risen if name in ("mmd", "alignment") else w for name, w in weights.items()}
            optimizer.zero_grad()
            sum(now[name] * term for name, term in objective(model, batch).items()).backward()
            optimizer.step()
        auroc = roc_auc_score(SELECTION.target, predict(model, SELECTION.features).detach())
        if auroc > best[0]:
            best = (auroc, weights_of(model).clone())
    assert trained.best_score[1] == pytest.approx(best[0])
    torch.testing.assert_close(weights_of(trained.models[1]), best[1], rtol=1e-4, atol=1e-5)


def test_a_member_does_not_depend_on_its_companions():
    alone = run([Member(1, WEIGHTS)])
    heavier = {**WEIGHTS, "mmd": 3.0}
    together = run([Member(0, WEIGHTS), Member(1, WEIGHTS), Member(1, heavier), Member(2, WEIGHTS, 0.5)])
    torch.testing.assert_close(weights_of(together.models[1]), weights_of(alone.models[0]), rtol=1e-4, atol=1e-5)
    for a, b in zip(alone.history, together.history, strict=True):
        assert b["loss"]["bce"][1] == pytest.approx(a["loss"]["bce"][0], abs=1e-5)


def test_members_of_one_seed_share_initial_values_and_batches_and_other_seeds_share_nothing():
    same, twin, other = build_members(build, [Member(5, WEIGHTS), Member(5, {**WEIGHTS, "mmd": 9}), Member(6, WEIGHTS)])
    assert torch.equal(weights_of(same), weights_of(twin))
    drawn = [p.ndim > 1 for p in same.parameters()]
    for p, q, is_drawn in zip(same.parameters(), other.parameters(), drawn, strict=True):
        assert not is_drawn or not torch.isclose(p, q).any()
    assert not torch.equal(epoch_order(5, 0, 50), epoch_order(6, 0, 50))
    assert not torch.equal(epoch_order(5, 0, 50), epoch_order(5, 1, 50))


@given(st.integers(0, 2**31), st.integers(0, 500), st.integers(1, 300))
@settings(max_examples=30, deadline=None)
def test_an_epoch_visits_every_example_once(seed, epoch, examples):
    assert sorted(epoch_order(seed, epoch, examples).tolist()) == list(range(examples))


def test_building_leaves_the_callers_random_numbers_alone():
    torch.manual_seed(1)
    expected = torch.rand(3)
    torch.manual_seed(1)
    build_members(build, [Member(0, WEIGHTS)])
    assert torch.equal(torch.rand(3), expected)


def test_masked_member_is_trained_as_the_smaller_model():
    masked = run([Member(0, WEIGHTS, settings={"active_rank": 1})]).models[0]
    (initial,) = build_members(build, [Member(0, WEIGHTS, settings={"active_rank": 1})])
    assert masked.fusion.rank_mask.tolist() == [1, 0, 0]
    torch.testing.assert_close(masked.fusion.rank_weights[1:], initial.fusion.rank_weights[1:], rtol=0, atol=0)
    assert not torch.equal(masked.fusion.rank_weights[:1], initial.fusion.rank_weights[:1])


def test_same_arguments_give_the_same_bits():
    a, b = run([Member(0, WEIGHTS), Member(1, WEIGHTS)]), run([Member(0, WEIGHTS), Member(1, WEIGHTS)])
    assert a.history == b.history
    assert all(torch.equal(weights_of(x), weights_of(y)) for x, y in zip(a.models, b.models, strict=True))


class Killed(BaseException):
    """Stands for a SIGKILL: nothing in the trainer may catch it."""


@pytest.mark.parametrize("epoch", [0, 2, 4])
def test_resume_is_bit_identical_wherever_the_run_was_stopped(tmp_path, epoch):
    members = [Member(0, WEIGHTS, 0.01), Member(1, WEIGHTS)]
    schedule = {"epochs": 6, "patience": 9}
    whole = run(members, schedule=schedule)

    def stop(record):
        if record["epoch"] == epoch:
            raise Killed

    checkpoint = tmp_path / "checkpoint.safetensors"
    with pytest.raises(Killed):
        run(members, schedule=schedule, checkpoint=checkpoint, on_epoch=stop)
    seen = []
    resumed = run(members, schedule=schedule, checkpoint=checkpoint, on_epoch=seen.append)
    assert resumed.history == whole.history == seen
    assert resumed.best_epoch == whole.best_epoch
    assert all(torch.equal(weights_of(x), weights_of(y)) for x, y in zip(resumed.models, whole.models, strict=True))


def test_finished_training_is_not_trained_again(tmp_path):
    checkpoint = tmp_path / "checkpoint.safetensors"
    first = run([Member(0, WEIGHTS)], checkpoint=checkpoint)
    written = checkpoint.stat().st_mtime_ns
    second = run([Member(0, WEIGHTS)], checkpoint=checkpoint)
    assert checkpoint.stat().st_mtime_ns == written
    assert torch.equal(weights_of(first.models[0]), weights_of(second.models[0]))


@pytest.mark.parametrize(
    "change", [{"members": [Member(0, {**WEIGHTS, "mmd": 0.5})]}, {"train": split(100, 7)}, {"schedule": {"epochs": 4}}]
)
def test_checkpoint_of_another_training_is_refused(tmp_path, change):
    checkpoint = tmp_path / "checkpoint.safetensors"
    run([Member(0, WEIGHTS)], checkpoint=checkpoint)
    with pytest.raises(InputError, match="other settings"):
        run(**{"members": [Member(0, WEIGHTS)], "checkpoint": checkpoint} | change)


def flip(state, metadata):
    state["parameters/fusion.rank_weights"][0, 0] += 1e-3


def last_dimension_of_one(state, metadata):
    state["parameters/fusion.rank_weights"] = state["parameters/fusion.rank_weights"][:, :1].clone()


def drop_tensor(state, metadata):
    del state["exp_avg/fusion.rank_weights"]


@pytest.mark.parametrize(
    "change",
    [
        flip,
        last_dimension_of_one,
        drop_tensor,
        lambda state, metadata: state.update(extra=torch.ones(1)),
        lambda state, metadata: metadata.clear(),
        lambda state, metadata: metadata.update(progress="{}"),
        lambda state, metadata: metadata.update(progress="[" * 100_000),
        lambda state, metadata: metadata.update(sha256="0"),
        lambda state, metadata: state.update({k: v.half() for k, v in state.items()}),
    ],
    ids=["value", "broadcast", "missing", "extra", "no metadata", "no progress", "nested", "checksum", "dtype"],
)
def test_changed_checkpoint_is_refused(tmp_path, change):
    checkpoint = tmp_path / "checkpoint.safetensors"
    run([Member(0, WEIGHTS)], checkpoint=checkpoint)
    with safe_open(checkpoint, framework="pt") as file:
        state, metadata = {name: file.get_tensor(name) for name in file.keys()}, file.metadata()
    change(state, metadata)
    save_file(state, checkpoint, metadata or None)
    with pytest.raises(InputError, match=r"checkpoint\.safetensors: damaged"):
        run([Member(0, WEIGHTS)], checkpoint=checkpoint)


def test_damaged_checkpoint_is_named(tmp_path):
    checkpoint = tmp_path / "checkpoint.safetensors"
    run([Member(0, WEIGHTS)], checkpoint=checkpoint)
    checkpoint.write_bytes(checkpoint.read_bytes()[:-100])
    with pytest.raises(InputError, match=r"checkpoint\.safetensors: damaged"):
        run([Member(0, WEIGHTS)], checkpoint=checkpoint)


def test_patience_keeps_the_best_epoch_and_a_stopped_member_stays_stopped():
    scores = iter(
        [[0.5, 0.6], [0.9, 0.5], [0.8, 0.4], [0.7, 0.9], [0.95, 0.8], [0.99, 0.7], [0.1, 0.6], [0, 0], [0, 0]]
    )
    current = []

    def score(predictions, target):
        if not current:
            current.extend(next(scores))
        return current.pop(0)

    schedule = Schedule(epochs=9, batch_size=16, patience=2)
    members = [Member(0, WEIGHTS), Member(1, WEIGHTS)]
    trained = train(Problem(build, objective, predict, score), members, TrainingData(DATA, SELECTION), schedule)
    # member 0 peaks at epoch 1 and stops at 3: its later .95 and .99 do not count; member 1 stopped at 2, before .9
    assert (trained.best_epoch, trained.best_score) == ([1, 0], [0.9, 0.6])
    assert len(trained.history) == 4


def test_loss_that_is_not_finite_names_term_member_and_step_and_keeps_the_checkpoint(tmp_path):
    checkpoint = tmp_path / "checkpoint.safetensors"

    def poisoned(model, batch):
        terms = objective(model, batch)
        # 100 examples, 6 steps an epoch: from the second epoch on
        return terms | {"mmd": torch.where(calls["epoch"] == 1, torch.nan, 1.0) * terms["mmd"]}

    calls = {"epoch": torch.tensor(0)}
    good = None

    def on_epoch(record):
        nonlocal good
        good = checkpoint.read_bytes()
        calls["epoch"].add_(1)

    with pytest.raises(NonFiniteLoss, match=r"'mmd' of member 0 \(seed 4\) became nan at step 6 \(epoch 1\)"):
        run([Member(4, WEIGHTS)], objective=poisoned, checkpoint=checkpoint, on_epoch=on_epoch)
    assert good is not None
    assert checkpoint.read_bytes() == good


def test_exploding_member_is_named_among_its_companions():
    members = [Member(3, WEIGHTS), Member(5, {**WEIGHTS, "mmd": float("inf")}), Member(7, WEIGHTS)]
    with pytest.raises(NonFiniteLoss, match=r"of member 1 \(seed 5\)"):
        run(members)


def test_predictions_that_are_not_finite_stop_the_run():
    def spoilt(model, features):
        return predict(model, features) * torch.nan

    with pytest.raises(NonFiniteLoss, match=r"predictions of member 0 \(seed 8\)"):
        run([Member(8, WEIGHTS)], predict=spoilt)


def test_fewer_examples_than_a_batch_make_one_batch():
    trained = run([Member(0, WEIGHTS)], schedule={"batch_size": 5000, "epochs": 1})
    assert np.isfinite(trained.history[0]["loss"]["bce"]).all()


def test_vectorized_gradients_equal_autograd_of_each_model():
    models = [m.double() for m in build_members(build, [Member(s, WEIGHTS) for s in range(3)])]
    features = {name: torch.randn(3, 16, d, dtype=torch.float64) for name, d in DIMS.items()}
    target = (torch.rand(3, 16) > 0.5).double()
    parameters, buffers = torch.func.stack_module_state(models)
    weights = {name: torch.full((3,), w, dtype=torch.float64) for name, w in WEIGHTS.items()}
    gradients, _ = vectorized_step(models[0], objective)(parameters, buffers, Batch(features, target), weights)
    for s, model in enumerate(models):
        batch = Batch({name: x[s] for name, x in features.items()}, target[s])
        loss = sum(WEIGHTS[name] * term for name, term in objective(model, batch).items())
        for (name, _), g in zip(
            model.named_parameters(), torch.autograd.grad(loss, list(model.parameters())), strict=True
        ):
            torch.testing.assert_close(gradients[name][s], g, rtol=1e-9, atol=1e-11)


def test_records_are_plain_json():
    trained = run([Member(0, WEIGHTS)], schedule={"epochs": 1})
    assert json.loads(json.dumps(trained.history)) == trained.history


@pytest.mark.skipif(shutil.which("g++") is None, reason="compilation needs a C++ compiler")
def test_compiled_training_is_the_same_up_to_rounding():
    members = [Member(0, WEIGHTS, 0.1), Member(1, WEIGHTS)]
    plain, compiled = (run(members, schedule={"epochs": 1, "compile": c}) for c in (False, True))
    for a, b in zip(plain.models, compiled.models, strict=True):
        torch.testing.assert_close(weights_of(a), weights_of(b), rtol=1e-3, atol=1e-5)


def test_fold_is_trained_and_selected_on_its_own_rows():
    folds = [Fold(torch.arange(70), torch.arange(30)), Fold(torch.arange(25, 100), torch.arange(25, 60))]
    together = run([Member(seed, WEIGHTS, fold=fold) for seed in (0, 1) for fold in (0, 1)], folds=folds)
    for fold, rows in enumerate(folds):
        alone = run([Member(1, WEIGHTS)], train=take(DATA, rows.train), selection=take(SELECTION, rows.dev))
        torch.testing.assert_close(
            weights_of(together.models[2 + fold]), weights_of(alone.models[0]), rtol=1e-4, atol=1e-5
        )
        assert together.best_score[2 + fold] == pytest.approx(alone.best_score[0])


def test_fold_of_the_other_half_does_not_see_these_examples():
    folds = [Fold(torch.arange(50), torch.arange(30)), Fold(torch.arange(50, 100), torch.arange(30, 60))]
    members = [Member(0, WEIGHTS, fold=0), Member(0, WEIGHTS, fold=1)]
    before = run(members, folds=folds)
    flipped = Split(DATA.features, DATA.target.clone(), DATA.ids)
    flipped.target[50:] = 1 - flipped.target[50:]
    after = run(members, folds=folds, train=flipped)
    assert torch.equal(weights_of(before.models[0]), weights_of(after.models[0]))
    assert not torch.equal(weights_of(before.models[1]), weights_of(after.models[1]))


def test_dropout_hides_each_modality_at_its_rate_and_what_is_hidden_stays_hidden_at_higher_rates():
    members = [Member(0, WEIGHTS, dropout={"text": rate}) for rate in (0.0, 0.3, 0.6, 1.0)]
    fold = Fold(torch.arange(100), torch.arange(60))
    feed = Feed(DATA, members, [fold], 10, torch.device("cpu"))
    present = torch.cat([b.present["text"] for epoch in range(20) for b in feed.batches(epoch)], dim=1)  # (4, 2000)
    assert list(next(feed.batches(0)).present) == ["text"]  # nobody drops images
    torch.testing.assert_close(present.mean(1), torch.tensor([1.0, 0.7, 0.4, 0.0]), atol=0.03, rtol=0)
    assert (present[1:] <= present[:-1]).all()
    without = Feed(DATA, [Member(0, WEIGHTS)], [fold], 10, torch.device("cpu"))
    assert next(without.batches(0)).present == {}


def test_modality_that_is_always_hidden_teaches_its_encoder_nothing_and_rate_zero_changes_nothing():
    bce_alone = dict.fromkeys(WEIGHTS, 0.0) | {"bce": 1.0}
    hidden = Member(0, bce_alone, dropout={"text": 1.0})
    never, always, plain = run([Member(0, bce_alone, dropout={"text": 0.0}), hidden, Member(0, bce_alone)]).models
    (initial,) = build_members(build, [hidden])
    assert torch.equal(weights_of(always.jwae.encoders["text"]), weights_of(initial.jwae.encoders["text"]))
    assert not torch.equal(weights_of(always.jwae.encoders["image"]), weights_of(initial.jwae.encoders["image"]))
    torch.testing.assert_close(weights_of(never), weights_of(plain), rtol=1e-5, atol=1e-6)


def test_dropout_of_an_unknown_modality_is_an_error():
    with pytest.raises(ValueError, match="sound"):
        run([Member(0, WEIGHTS, dropout={"sound": 0.5})])


def test_keeping_the_last_epoch_keeps_it_also_after_a_kill(tmp_path):
    options = {"schedule": {"epochs": 4, "patience": 1, "keep": "last", "annealing": "cosine"}}
    members = [Member(0, WEIGHTS, 0.1), Member(1, WEIGHTS, 0.2)]
    whole = run(members, **options)
    assert len(whole.history) == 4

    def kill(record):
        if record["epoch"] == 1:
            raise Killed

    path = tmp_path / "checkpoint.safetensors"
    with pytest.raises(Killed):
        run(members, checkpoint=path, on_epoch=kill, **options)
    resumed = run(members, checkpoint=path, **options)
    assert resumed.history == whole.history
    finished = run(members, checkpoint=path, **options)  # from the checkpoint alone
    for a, b, c in zip(whole.models, resumed.models, finished.models, strict=True):
        assert torch.equal(weights_of(a), weights_of(b)) and torch.equal(weights_of(a), weights_of(c))
    best = run(members, schedule={"epochs": 4, "patience": 4, "annealing": "cosine"})
    kept = [s for s, epoch in enumerate(whole.best_epoch) if epoch < 3]
    assert all(not torch.equal(weights_of(whole.models[s]), weights_of(best.models[s])) for s in kept)


def test_cosine_annealing_falls_from_the_learning_rate_to_nearly_zero():
    schedule = Schedule(learning_rate=0.2, annealing="cosine")
    rates = [_learning_rate(schedule, step, 100) for step in range(100)]
    assert rates[0] == 0.2 and rates[50] == pytest.approx(0.1) and rates[-1] < 1e-4
    assert rates == sorted(rates, reverse=True)
    assert _learning_rate(Schedule(learning_rate=0.2), 99, 100) == 0.2
