"""Trainer of S members at once: the objective sees one model and one batch, the step a stack of members.

A member is a seed plus whatever may differ without changing a shape: the weights of the loss terms, the weight decay,
the fold of the data, the rates at which modalities are dropped, and what `build` makes of it (for instance a rank
mask). Members with the same seed see the same batches in the same order, so differences between settings are paired;
different seeds share nothing. The random numbers of an epoch are a function of (seed, epoch) alone: a resumed run
needs no generator state, and no member depends on its companions.
"""

import hashlib
import itertools
import json
import math
import time
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import ClassVar, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.func import functional_call, grad_and_value, stack_module_state, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._pytree import tree_leaves, tree_map

from mmfusion.dataset import Fold, Split
from mmfusion.distributed import current_processes
from mmfusion.errors import InputError, NonFiniteLoss
from mmfusion.sequences import Sequences, Tokens, chunks, token_counts
from mmfusion.training.checkpoint import read_checkpoint, write_checkpoint
from mmfusion.training.feed import Batch, Feed, Member

MOMENTS = ("exp_avg", "exp_avg_sq")  # of AdamW
WARM_UP = 0.1  # share of all steps over which a linear schedule rises
Annealing = Literal["none", "cosine", "linear"]


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """What all members have in common."""

    epochs: int = 40
    batch_size: int = 64
    learning_rate: float = 1e-3
    annealing: Annealing = "none"
    """cosine: the learning rate falls to 0 over all epochs along half a cosine (Loshchilov & Hutter, 2017); linear: it
    rises over the first tenth of all steps, then falls to 0 on a straight line"""
    patience: int = 10
    """epochs without a better selection score after which a member stops"""
    keep: Literal["best", "last"] = "best"
    """the epoch whose parameters are returned: the best by the selection score, or the last (nothing stops early)"""
    compile: bool = False
    stacked: bool = True
    """one call of each operation for all members; else member by member, which wide models are as fast with on a CPU"""
    warm_up: Mapping[str, float] = field(default_factory=dict)
    """{loss term: share of all steps over which its weight rises from 0 on a straight line}"""
    checkpoint_seconds: float = 10.0
    """least time between two checkpoints; results do not depend on it"""


@dataclass
class Trained:
    """S trained members, each at the epoch that the schedule keeps; `best_*` tell which epoch scored best."""

    models: list[nn.Module]
    best_epoch: list[int]
    best_score: list[float]
    history: list[dict]
    """one record per epoch: {"epoch", "loss": {term: [S]}, "score": [S]}"""


ModelCall = Callable[..., NamedTuple]
Objective = Callable[[ModelCall, Batch], dict[str, Tensor]]
Predict = Callable[[ModelCall, dict[str, Tensor | Tokens]], Tensor]


def build_members(build: Callable[[Member], nn.Module], members: list[Member]) -> list[nn.Module]:
    """Models of all members, initial values drawn from each member's own seed; the caller's RNG is left as it was."""
    models = []
    for member in members:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(member.seed)
            models.append(build(member))
    return models


def vectorized_step(skeleton: nn.Module, objective: Objective, compile: bool = False, stacked: bool = True) -> Callable:
    """Map the objective's gradient over S members, in one call of each operation or, not `stacked`, member by member.

    Returns step(parameters (S, ...), buffers (S, ...), batch (S, B, ...), weights {term: (S,)}, only=None) ->
    (gradients (S, ...), terms {term: (S,)}). Where they are mapped member by member, those that are not in `only` are
    passed over, and get 0.
    """

    def loss(parameters: dict, buffers: dict, batch: Batch, weights: dict) -> tuple[Tensor, dict[str, Tensor]]:
        terms = objective(lambda *args, **kw: functional_call(skeleton, (parameters, buffers), args, kw), batch)
        return sum(weights[name] * value for name, value in terms.items()), terms

    one = grad_and_value(loss, has_aux=True)

    def step(
        parameters: dict, buffers: dict, batch: Batch, weights: dict, only: Collection[int] | None = None
    ) -> tuple[dict, dict[str, Tensor]]:
        all_members = partial(_at_once, one) if stacked else partial(_in_turn, one, only=only)
        gradients, (_, terms) = all_members(parameters, buffers, batch, weights)
        return gradients, terms

    return torch.compile(step) if compile else step


def _at_once(function: Callable, *stacks: object, in_dims: Sequence[int | None] | int = 0) -> object:
    """`torch.func.vmap(function, in_dims)(*stacks)`."""
    mapped = vmap(function, in_dims)
    if tree_leaves(stacks[0])[0].device.type != "cpu":
        return mapped(*stacks)
    # the CPU's fused attention has no batching rule: vmap would warn, and call it for one member after the other
    with sdpa_kernel(SDPBackend.MATH):
        return mapped(*stacks)


def _in_turn(
    function: Callable,
    *stacks: object,
    in_dims: Sequence[int | None] | None = None,
    only: Collection[int] | None = None,
) -> object:
    """What `_at_once` gives, one member after another; of members that are not in `only`, 0."""
    dims = in_dims or (0,) * len(stacks)
    first = next(stack for stack, dim in zip(stacks, dims, strict=True) if dim == 0)
    size = len(tree_leaves(first)[0])
    chosen = range(size) if only is None else sorted(only)
    results = {}
    for s in chosen:
        own = [x if dim is None else tree_map(lambda leaf: leaf[s], x) for x, dim in zip(stacks, dims, strict=True)]  # noqa: B023
        results[s] = function(*own)
    nothing = tree_map(torch.zeros_like, next(iter(results.values()))) if len(results) < size else None
    return tree_map(lambda *leaves: torch.stack(leaves), *(results.get(s, nothing) for s in range(size)))


class _State:
    """Parameters, optimiser and best values of S members; the part of a training that a checkpoint holds."""

    def __init__(self, models: list[nn.Module], members: list[Member], schedule: Schedule, device: torch.device):
        parameters, buffers = stack_module_state(models)
        # detached: with requires_grad, autograd would record the step's own backward pass for a second one
        self.parameters = {k: v.detach().to(device) for k, v in parameters.items()}  # (S, ...)
        self.buffers = {k: v.to(device) for k, v in buffers.items()}  # (S, ...)
        decay = torch.tensor([m.weight_decay for m in members], device=device)  # (S,)
        # a decay that all members share rides along in the optimiser's kernel; others need a pass of their own
        is_shared = bool((decay == decay[0]).all())
        shared = decay[0].item() if is_shared else 0.0
        self.decay = None if is_shared else decay
        matrices = [p for p in self.parameters.values() if p.ndim > 2]  # (S, rows, columns)
        others = [p for p in self.parameters.values() if p.ndim <= 2]
        groups = [{"params": matrices, "weight_decay": shared}, {"params": others, "weight_decay": 0.0}]
        # elementwise, so one AdamW over the stack is S independent ones; `fused` has no per-tensor Python cost
        self.optimizer = torch.optim.AdamW(groups, lr=schedule.learning_rate, fused=True)
        self.best = {k: v.detach().clone() for k, v in self.parameters.items()}
        self.best_epoch = [-1] * len(members)
        self.best_score = [-math.inf] * len(members)
        self.history: list[dict] = []
        self.out_of_patience: list[bool] = []
        """of every epoch: no member of this process would train on"""
        self.finished = False

    def apply(self, gradients: dict[str, Tensor], learning_rate: float) -> None:
        """One AdamW step of every member."""
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate
        with torch.no_grad():
            keep = None if self.decay is None else (1 - learning_rate * self.decay).view(-1, 1, 1)
            for name, parameter in self.parameters.items():
                if keep is not None and parameter.ndim > 2:
                    parameter.mul_(keep)
                parameter.grad = gradients[name]
        self.optimizer.step()

    def training_on(self, epoch: int, schedule: Schedule) -> list[int]:
        """Members that this epoch can still change: those that have not run out of patience."""
        if schedule.keep == "last":
            return list(range(len(self.best_epoch)))
        found = [s for s, best in enumerate(self.best_epoch) if epoch - best <= schedule.patience]
        return found or [0]  # a process whose members have all stopped waits for those of others

    def select(self, epoch: int, scores: list[float], schedule: Schedule) -> bool:
        """Keep the parameters of members that have improved; True when every member has run out of patience."""
        better = torch.zeros(len(scores), dtype=torch.bool)
        keeps_last = schedule.keep == "last"
        for s, score in enumerate(scores):
            # a member that has stopped stays stopped, whatever its companions still need
            in_time = keeps_last or epoch - self.best_epoch[s] <= schedule.patience
            if in_time and score > self.best_score[s]:
                better[s], self.best_score[s], self.best_epoch[s] = True, score, epoch
        if keeps_last:
            self.best = self.parameters
            return False
        for name, parameter in self.parameters.items():
            self.best[name][better] = parameter.detach()[better]
        return all(epoch - best >= schedule.patience for best in self.best_epoch)

    def save(self, path: Path, identity: str) -> None:
        """Write everything that a resumed training needs."""
        tensors = {}
        for name, parameter in self.parameters.items():
            tensors[f"parameters/{name}"] = parameter
            if self.best is not self.parameters:
                tensors[f"best/{name}"] = self.best[name]
            for key, value in self.optimizer.state[parameter].items():
                tensors[f"{key}/{name}"] = value
        progress = {
            "identity": identity,
            "finished": self.finished,
            "best_epoch": self.best_epoch,
            "best_score": self.best_score,
            "history": self.history,
            "out_of_patience": self.out_of_patience,
        }
        write_checkpoint(path, tensors, progress)

    def load(self, path: Path, identity: str) -> None:
        """Go on from a checkpoint. Raises InputError where it is damaged or belongs to another training."""
        shapes = {name: tuple(parameter.shape) for name, parameter in self.parameters.items()}
        wanted = {f"{key}/{name}": shape for name, shape in shapes.items() for key in ("parameters", *MOMENTS)}
        wanted |= {f"step/{name}": () for name in shapes}
        tensors, progress = read_checkpoint(path, wanted, {f"best/{name}": shape for name, shape in shapes.items()})
        if progress["identity"] != identity:
            raise InputError(f"{path}: belongs to a run with other settings; choose another --name")
        with torch.no_grad():
            for name, parameter in self.parameters.items():
                parameter.copy_(tensors[f"parameters/{name}"])
                if f"best/{name}" in tensors:
                    self.best[name].copy_(tensors[f"best/{name}"])
                else:  # the last epoch's are kept
                    self.best = self.parameters
                self.optimizer.state[parameter] = {
                    key: tensors[f"{key}/{name}"].to(parameter.device) for key in ("step", *MOMENTS)
                }
        self.finished, self.history = progress["finished"], progress["history"]
        last = [self.finished] if self.history else []
        self.out_of_patience = progress.get("out_of_patience", [False] * (len(self.history) - 1) + last)
        self.best_epoch, self.best_score = progress["best_epoch"], progress["best_score"]


class Problem(NamedTuple):
    """What one member is, what it minimises, and what it is selected by."""

    build: Callable[[Member], nn.Module]
    """makes one member's model; called under that member's seed"""
    objective: Objective
    """(model, batch) -> named loss terms of ONE model on ONE batch; their weighted sum is minimised"""
    predict: Predict
    """(model, features) -> predictions (N,) or (N, O) of one model, for selection"""
    score: Callable[[np.ndarray, np.ndarray], float]
    """(predictions, target) -> float, larger is better"""
    directions: tuple[int, int] | None = None
    """(K, L) of the random directions that the objective is given at each step; default: none"""
    uniforms: int = 0
    """how many uniform numbers the objective is given for each example at each step"""


class TrainingData(NamedTuple):
    """The split trained on, the split selected on (perhaps the same), and the rows of both for each `Member.fold`."""

    train: Split
    selection: Split
    folds: Sequence[Fold] | None = None
    """default: one fold, all rows"""


def train(
    problem: Problem,
    members: list[Member],
    data: TrainingData,
    schedule: Schedule,
    *,
    device: str | torch.device = "cpu",
    checkpoint: Path | None = None,
    on_epoch: Callable[[dict], None] | None = None,
) -> Trained:
    """Train all members at once and return each at the epoch that `score` likes best, or at the last.

    Args:
        checkpoint: file to save progress to, and to go on from where it exists.
        on_epoch: called with each epoch's record; after a resume it gets the past epochs' records first.

    Where `join_processes` has joined several processes (torchrun), each trains its share of the members, and every one
    returns all of them. All must call with the same arguments; `checkpoint` then names a file for each.

    On the CPU the result is a function of the arguments, bit for bit, also across a kill and a resume.
    Raises NonFiniteLoss (the last good checkpoint stays), InputError for a checkpoint of other settings.
    """
    processes = current_processes()
    own = list(range(len(members)))[processes.rank :: processes.world_size]
    if checkpoint is not None and processes.world_size > 1:
        checkpoint = checkpoint.with_stem(f"{checkpoint.stem}-{processes.rank + 1}-of-{processes.world_size}")
    with processes.together():  # a checkpoint of other settings, in one of them, ends all
        training = _Training(problem, [members[s] for s in own], data, schedule, torch.device(device), checkpoint)
    history: list[dict] = []
    finished = False
    while not finished:
        failure, part = None, None
        try:
            part = training.epoch(len(history))
        except NonFiniteLoss as error:
            failure = error
        everyone = processes.gather((part, str(failure) if failure else None))
        if failed := next((message for _, message in everyone if message), None):
            raise failure or NonFiniteLoss(failed)
        parts = [part for part, _ in everyone if part is not None]
        history.append(_merge([record for record, _ in parts]))
        finished = all(out for _, out in parts) or len(history) == schedule.epochs
        with processes.together():  # a full disk, in one of them, ends all
            training.save(finished)
        if on_epoch:
            on_epoch(history[-1])
    state = training.state
    if processes.world_size == 1:
        return Trained(training.models(), state.best_epoch, state.best_score, history)
    states = [model.state_dict() for model in training.models()]
    found = processes.gather(list(zip(own, states, state.best_epoch, state.best_score, strict=True)))
    rows = sorted(itertools.chain.from_iterable(found), key=lambda row: row[0])
    models = build_members(problem.build, members)
    for model, (_, values, *_) in zip(models, rows, strict=True):
        model.load_state_dict(values)
    return Trained(models, [row[2] for row in rows], [row[3] for row in rows], history)


def _merge(records: list[dict]) -> dict:
    """One record of an epoch from those of K processes, whose members are every K-th."""
    if len(records) == 1:
        return records[0]

    def interleave(columns: list[list]) -> list:
        return [x for row in itertools.zip_longest(*columns) for x in row if x is not None]

    losses = [record["loss"] for record in records]
    loss = {name: interleave([part[name] for part in losses]) for name in losses[0]}
    return {"epoch": records[0]["epoch"], "loss": loss, "score": interleave([r["score"] for r in records])}


class _Training:
    """One process's members and how far they are."""

    def __init__(
        self,
        problem: Problem,
        members: list[Member],
        data: TrainingData,
        schedule: Schedule,
        device: torch.device,
        checkpoint: Path | None,
    ) -> None:
        self.members, self.schedule, self.checkpoint = members, schedule, checkpoint
        self.is_ahead = False
        """an epoch has been trained that the checkpoint does not hold"""
        self.built = build_members(problem.build, members)
        self.state = _State(self.built, members, schedule, device) if members else _NoMembers()
        if not members:  # more processes than members: this one has nothing to do but to listen
            return
        folds = data.folds or [Fold(torch.arange(len(data.train)), torch.arange(len(data.selection)))]
        data = data._replace(folds=folds)
        self.identity = _identity(members, schedule, data, self.built[0])
        if checkpoint is not None and checkpoint.exists():
            self.state.load(checkpoint, self.identity)
        self.skeleton = self.built[0].to(device)  # lends its forward; its own parameters are never read
        self.step = vectorized_step(self.skeleton, problem.objective, schedule.compile, schedule.stacked)
        drawn = (problem.directions, problem.uniforms)
        self.feed = Feed(data.train, members, folds, schedule.batch_size, device, *drawn, schedule.stacked)
        self.selection = _Selection(data.selection, members, folds, problem, device, schedule.stacked)
        self.saved_at = time.monotonic()

    def epoch(self, epoch: int) -> tuple[dict, bool] | None:
        """(record, whether no member would train on) of an epoch, from the checkpoint or trained now."""
        if not self.members:
            return None
        state = self.state
        if epoch == len(state.history):
            self.is_ahead = True
            # one after the other, members that have stopped cost nothing: their last numbers stand
            only = None if self.schedule.stacked else state.training_on(epoch, self.schedule)
            losses = _train_epoch(epoch, state, self.step, self.feed, self.members, self.schedule, only)
            scores = self.selection.scores(self.skeleton, state, epoch, only)
            if only is not None and state.history:
                losses, scores = _carried_on(state.history[-1], losses, scores, only)
            state.history.append({"epoch": epoch, "loss": losses, "score": scores})
            state.out_of_patience.append(state.select(epoch, scores, self.schedule))
        return state.history[epoch], state.out_of_patience[epoch]

    def save(self, finished: bool) -> None:
        """Write the checkpoint where it is due."""
        if self.checkpoint is None or not self.is_ahead:
            return
        if not finished and time.monotonic() - self.saved_at < self.schedule.checkpoint_seconds:
            return
        self.is_ahead = False
        self.state.finished = finished
        self.state.save(self.checkpoint, self.identity)
        self.saved_at = time.monotonic()

    def models(self) -> list[nn.Module]:
        """Every member at its best epoch, or its last."""
        return _load_best(self.built, self.state) if self.members else []


class _NoMembers:
    """The state of a process without members."""

    best_epoch: ClassVar[list[int]] = []
    best_score: ClassVar[list[float]] = []


class _Selection:
    """The examples that members are selected on, and each member's score on those of its fold."""

    def __init__(
        self,
        split: Split,
        members: list[Member],
        folds: Sequence[Fold],
        problem: Problem,
        device: torch.device,
        stacked: bool,
    ) -> None:
        self.stacked = stacked
        self.members, self.score = members, problem.score
        self.target = split.target.numpy()
        self.rows = [folds[member.fold].dev.numpy() for member in members]
        # every member predicts all that any fold needs
        self.needed = torch.from_numpy(np.unique(np.concatenate(self.rows)))
        if (counts := token_counts(split.features)) is not None:
            self.needed = self.needed[counts[self.needed].argsort(stable=True)]
        self.place = np.zeros(len(split), dtype=int)
        self.place[self.needed] = np.arange(len(self.needed))
        self.features, self.device, self.predict = split.features, device, problem.predict

    def scores(
        self, skeleton: nn.Module, state: _State, epoch: int, only: Collection[int] | None = None
    ) -> list[float]:
        """One score per member. Raises NonFiniteLoss: the epoch's last step may spoil what no loss has seen yet."""
        parts = chunks(self.features, self.needed, self.device)
        # (S, n) or (S, n, O)
        predictions = _predict_members(skeleton, state, self.predict, parts, self.stacked, only).numpy()
        scores = []
        for s, (member, rows) in enumerate(zip(self.members, self.rows, strict=True)):
            prediction = predictions[s, self.place[rows]]
            if not np.isfinite(prediction).all():
                raise NonFiniteLoss(
                    f"the predictions of member {s} (seed {member.seed}) are not finite after the "
                    f"last step of epoch {epoch}; lower --learning-rate"
                )
            scores.append(float(self.score(prediction, self.target[rows])))
        return scores


def _carried_on(
    before: dict, losses: dict[str, list], scores: list[float], only: Collection[int]
) -> tuple[dict[str, list], list[float]]:
    """Losses {term: [S]} and scores [S], those of members that are not in `only` from the record `before`."""

    def mixed(now: list, then: list) -> list:
        return [now[s] if s in only else then[s] for s in range(len(now))]

    return {name: mixed(of, before["loss"][name]) for name, of in losses.items()}, mixed(scores, before["score"])


def _train_epoch(
    epoch: int,
    state: _State,
    step: Callable,
    feed: Feed,
    members: list[Member],
    schedule: Schedule,
    only: Collection[int] | None = None,
) -> dict[str, list]:
    """One pass over the data; the mean of each loss term, {term: [S]}."""
    device = feed.target.device
    names = list(members[0].loss_weights)
    weights = {n: torch.tensor([float(m.loss_weights[n]) for m in members], device=device) for n in names}
    history, all_steps = [], schedule.epochs * feed.steps
    for k, batch in enumerate(feed.batches(epoch)):
        number = epoch * feed.steps + k
        now = {n: w * _risen(schedule.warm_up.get(n, 0.0), number, all_steps) for n, w in weights.items()}
        further = {} if only is None else {"only": only}
        gradients, terms = step(state.parameters, state.buffers, batch, now, **further)
        state.apply(gradients, _learning_rate(schedule, number, all_steps))
        history.append(torch.stack([terms[name] for name in names]).detach())
    values = torch.stack(history).cpu()  # (steps, terms, S); one transfer an epoch, so that a GPU is never waited for
    bad = (~values.isfinite()).nonzero()
    if len(bad):
        k, t, s = bad[0].tolist()
        raise NonFiniteLoss(
            f"loss term '{names[t]}' of member {s} (seed {members[s].seed}) became {values[k, t, s].item()} at step "
            f"{epoch * feed.steps + k} (epoch {epoch}); lower --learning-rate or that term's weight"
        )
    return {name: values[:, t].double().mean(0).tolist() for t, name in enumerate(names)}


def _risen(share: float, step: int, steps: int) -> float:
    """How much of a weight counts at this step: 0 at first, 1 once that share of all steps is over."""
    return min(1.0, step / (share * steps)) if share else 1.0


def _learning_rate(schedule: Schedule, step: int, steps: int) -> float:
    if schedule.annealing == "none":
        return schedule.learning_rate
    if schedule.annealing == "cosine":
        return schedule.learning_rate * (1 + math.cos(math.pi * step / steps)) / 2
    warm = max(1, round(WARM_UP * steps))
    return schedule.learning_rate * min((step + 1) / warm, (steps - step) / max(1, steps - warm))


@torch.no_grad()
def _predict_members(
    skeleton: nn.Module,
    state: _State,
    predict: Predict,
    parts: Iterable[dict],
    stacked: bool,
    only: Collection[int] | None = None,
) -> Tensor:
    """Predictions (S, N) or (S, N, O) of all members, on the CPU."""

    def one(parameters: dict, buffers: dict, features: dict) -> Tensor:
        return predict(lambda *args, **kw: functional_call(skeleton, (parameters, buffers), args, kw), features)

    in_dims = (0, 0, None)
    many = partial(_at_once, one, in_dims=in_dims) if stacked else partial(_in_turn, one, in_dims=in_dims, only=only)
    return torch.cat([many(state.parameters, state.buffers, features).cpu() for features in parts], dim=1)


def _load_best(models: list[nn.Module], state: _State) -> list[nn.Module]:
    """Each member's best values in a module of its own, on the CPU."""
    for s, model in enumerate(models):
        model.cpu().load_state_dict({name: value[s].cpu() for name, value in (state.best | state.buffers).items()})
    return models


def _identity(members: list[Member], schedule: Schedule, data: TrainingData, model: nn.Module) -> str:
    """Digest of everything that the result depends on, so that a checkpoint cannot be continued as another run."""
    settings = asdict(schedule)
    del settings["checkpoint_seconds"]
    if settings["stacked"]:  # what it was before there was a choice
        del settings["stacked"]
    if not settings["warm_up"]:
        del settings["warm_up"]
    shapes = {name: list(value.shape) for name, value in model.state_dict().items()}
    digest = hashlib.sha256(json.dumps([settings, [asdict(m) for m in members], shapes], sort_keys=True).encode())
    for split in (data.train, data.selection):
        # the lengths first: tokens cut at other places are other sequences
        parts = ([x.lengths, *x] if isinstance(x, Sequences) else [x] for x in (*split.features.values(), split.target))
        for tensor in itertools.chain.from_iterable(parts):
            digest.update(tensor.contiguous().numpy().tobytes())
    for rows in itertools.chain.from_iterable(fold[:2] for fold in data.folds):
        digest.update(rows.numpy().tobytes() + b"|")
    return digest.hexdigest()
