"""Probes of components: polarity, speaker and other known properties of an example, beyond its prediction.

Named before any result was seen: `polarity` of the transcript (positive minus negative words of the lists below),
`length` of the transcript in words, and `speaker`.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from mmfusion.data.folds import FoldedDataset
from mmfusion.models.identifiability import match

POSITIVE = frozenset(
    "amazing amusing awesome beautiful best better brilliant charming clever cool delightful enjoy enjoyed fantastic "
    "excellent entertaining exciting favorite fresh fun funny glad good gorgeous great happy hilarious impressed "
    "impressive interesting like liked love loved nice perfect perfectly powerful recommend strong wonderful".split()
)
NEGATIVE = frozenset(
    "annoying awful awkward bad bored boring cheap cheesy confusing crap disappointed disappointing disappointment "
    "dislike dumb fail failed hate hated horrible lame lacking mediocre mess pointless poor poorly problem predictable "
    "ridiculous sad silly slow stupid sucked sucks terrible ugly unfortunately unfunny waste weak weird worse "
    "worst".split()
)
TRANSCRIPTS = ("transcript", "text", "caption")  # columns of metadata, the first that is there
SPEAKERS = ("speaker", "group")  # a group is a video, with one speaker
PERMUTATIONS = 100  # of the examples


def words(text: str) -> list[str]:
    """Lower-case words; an apostrophe belongs to its word."""
    return re.findall(r"[a-z0-9]+(?:'[a-z]+)*", text.lower())


def polarity(text: str) -> int:
    """Number of positive minus number of negative words; no negation, no degree."""
    found = words(text)
    return sum(word in POSITIVE for word in found) - sum(word in NEGATIVE for word in found)


def probes_of(data: FoldedDataset) -> tuple[dict[str, np.ndarray], list[str]]:
    """The probes that the study's metadata allow, and a note for each that they do not.

    Returns:
        {"polarity", "length": float (N,), "speaker": int (N,) index of the speaker} over the pool, and the notes.
    """
    columns = data.pool.metadata
    probes, notes = {}, []
    transcript = next((columns[name] for name in TRANSCRIPTS if name in columns), None)
    if transcript is None:
        notes.append("no probes of polarity and length: the data hold no transcripts")
    else:
        probes["polarity"] = np.array([polarity(text) for text in transcript], float)
        probes["length"] = np.array([len(words(text)) for text in transcript], float)
    speaker = next((name for name in SPEAKERS if name in columns), None)
    if speaker is None:
        notes.append("no probe of the speaker: the data do not name them")
    else:
        probes["speaker"] = np.unique(columns[speaker], return_inverse=True)[1]
        if speaker == "group":
            notes.append("the speaker is taken to be the video's (column group)")
    return probes, notes


def unit_columns(x: np.ndarray) -> np.ndarray:
    """Columns (n, ...) centred and of norm 1; 0 where a column is constant up to rounding."""
    mean = x.mean(0)
    centred = x - mean
    norm = np.linalg.norm(centred, axis=0)
    constant = norm <= 1e-9 * np.abs(mean) * len(x) ** 0.5
    return np.where(constant, 0, centred / np.where(constant, 1, norm))


def residual(x: np.ndarray, given: np.ndarray) -> np.ndarray:
    """What a linear regression on `given` leaves of x, centred and of norm 1.

    Args:
        x: (n, O, ...).
        given: (n, O); output o of x is regressed on column o.

    Returns:
        (n, O, ...); 0 where nothing but rounding is left.
    """
    x, u = unit_columns(x), unit_columns(given)
    slope = np.einsum("no...,no->o...", x, u)  # (O, ...)
    left = x - np.einsum("o...,no->no...", slope, u)  # (n, O, ...)
    norm = np.linalg.norm(left, axis=0)
    return np.where(norm > 1e-6, left / np.where(norm > 1e-6, norm, 1), 0)


def correlation_ratio(x: np.ndarray, groups: np.ndarray) -> np.ndarray:
    """eta = sqrt(variance between groups / variance) of each column.

    Args:
        x: (n, ...).
        groups: int (n,) in 0 .. G - 1.

    Returns:
        (...) in [0, 1]; 0 for a constant column. Grows with the number of groups: compare with permuted groups.
    """
    x = unit_columns(x)
    member = np.eye(groups.max() + 1)[groups]  # (n, G)
    sums = np.tensordot(member.T, x, 1)  # (G, n) (n, ...) -> (G, ...)
    sizes = member.sum(0).clip(1).reshape(-1, *[1] * (x.ndim - 1))
    return np.sqrt((sums**2 / sizes).sum(0).clip(0, 1))


def partial_association(components: np.ndarray, prediction: np.ndarray, probe: np.ndarray) -> np.ndarray:
    """How strongly each component tells a probe beyond what the prediction tells.

    Args:
        components: (n, O, K).
        prediction: (n, O), taken out of its components, and of a probe that is a number.
        probe: float (n,): |partial correlation|; int (n,): correlation ratio of what is left of the component.

    Returns:
        (O, K) in [0, 1].
    """
    left = residual(components, prediction)  # (n, O, K)
    if np.issubdtype(probe.dtype, np.integer):
        return correlation_ratio(left, probe)
    of_probe = residual(np.repeat(probe[:, None], prediction.shape[1], 1), prediction)  # (n, O)
    return np.abs(np.einsum("nok,no->ok", left, of_probe))


@dataclass
class Probe:
    """How strongly the component that tells a probe best tells it, and whether it is the same one in every start."""

    partial_association: np.ndarray  # (S, F) mean over outputs
    null: np.ndarray  # (S, F) mean of the same over permutations of the examples
    p: float  # share of permutations in which the mean over seeds and folds is as large
    best: np.ndarray  # int (S, F, O): the component, numbered as in the first seed
    same: np.ndarray  # (F, S, S) |correlation| of those components of two starts, given the prediction; diagonal 0
    same_null: np.ndarray  # (F, S, S) the same, the examples of one of them permuted


def probe(
    components: Sequence[Sequence[np.ndarray]],
    predictions: Sequence[Sequence[np.ndarray]],
    values: Sequence[np.ndarray],
) -> Probe:
    """Which component tells a probe best, and how well, beside permuted probes.

    Args:
        components: (n_f, O, K) of [seed][fold].
        predictions: (n_f, O) of [seed][fold].
        values: (n_f,) of [fold], float, or int for a category.
    """
    rng, size, folds = np.random.default_rng(0), len(components), len(values)
    strengths = np.zeros((PERMUTATIONS + 1, size, folds))
    best = np.zeros((size, folds, components[0][0].shape[1]), int)
    same, same_null = np.zeros((folds, size, size)), np.zeros((folds, size, size))
    for f, here in enumerate(values):
        if np.issubdtype(here.dtype, np.integer):
            here = np.unique(here, return_inverse=True)[1]
        # all seeds share the permutations, so that their mean can be set against its own distribution
        orders = [np.arange(len(here))] + [rng.permutation(len(here)) for _ in range(PERMUTATIONS)]
        reference, tellers = unit_columns(components[0][f]), []
        for s in range(size):
            given = (components[s][f], predictions[s][f])
            strength = np.stack([partial_association(*given, here[order]) for order in orders])  # (P, O, K)
            strengths[:, s, f] = strength.max(-1).mean(-1)
            alike = np.abs(np.einsum("nok,nol->okl", unit_columns(components[s][f]), reference))
            teller = strength[0].argmax(-1)  # (O,)
            best[s, f] = [match(c)[0][k] for c, k in zip(alike, teller, strict=True)]
            tellers.append(np.take_along_axis(residual(*given), teller[None, :, None], -1)[..., 0])  # (n, O)
        same[f], same_null[f] = _likeness(np.stack(tellers), orders[1:])
    mean = strengths.mean((1, 2))
    p = (1 + np.count_nonzero(mean[1:] >= mean[0])) / len(mean)
    return Probe(strengths[0], strengths[1:].mean(0), p, best, same, same_null)


def _likeness(x: np.ndarray, orders: Sequence[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """Columns (S, n, O) of norm 1 -> (S, S) mean |correlation| over outputs, and its mean over permuted examples."""
    own = np.abs(np.einsum("sno,tno->sto", x, x)).mean(-1)
    null = np.mean([np.abs(np.einsum("sno,tno->sto", x, x[:, order])).mean(-1) for order in orders], axis=0)
    off = 1 - np.eye(len(x))
    return own * off, (null + null.T) / 2 * off
