"""One explained prediction in words and numbers: the sentence that all forms of it begin with, and the shell's text."""

import unicodedata

import numpy as np

from mmfusion.explain.account import Explanation
from mmfusion.explain.ranks import TOLERANCE
from mmfusion.metrics.format import counted, mean_std

TURNS = "\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069"  # turn the direction of all that follows


def sentence(explanation: Explanation, row: int) -> str:
    """What the model predicts, how sure it is, whether that is right, and which part of the example decides.

    "Hateful with probability 0.93 (5 of 5 seeds agree); wrong: labelled benign. Image and text together push most:
    +2.1 in a logit of +2.6." The first line of the printed text, the title of the figure, the heading on the page.
    """
    if explanation.chooses:
        return f"{_decision(explanation, row)}. {_largest_part(explanation, row)}"
    value, target = explanation.account.prediction[:, row], explanation.examples.targets[row]
    seeds = counted(len(value), "seed") + (f", {value.min():.2f} to {value.max():.2f}" if len(value) > 1 else "")
    error = "unlabelled" if target is None else f"the target is {target:.2f}, the error {value.mean() - target:+.2f}"
    name = explanation.output[:1].upper() + explanation.output[1:]
    return f"{name} {value.mean():.2f} ({seeds}); {error}. {_largest_part(explanation, row)}"


def is_wrong(explanation: Explanation, row: int) -> bool:
    """True where the decision of a classification, that of the mean probability, is not the label."""
    target = explanation.examples.targets[row]
    if not explanation.chooses or target is None:
        return False
    return explanation.says(row) != int(target)


def _decision(explanation: Explanation, row: int) -> str:
    """Class, probability, agreement of the seeds, and the label."""
    p, target = explanation.probability(row), explanation.examples.targets[row]
    several = explanation.pairs is not None
    positive = several or bool(p.mean() >= 0.5)
    agree = explanation.chances[:, row].argmax(-1) == explanation.says(row) if several else (p >= 0.5) == positive
    seeds = "1 seed" if len(p) == 1 else f"{int(agree.sum())} of {len(p)} seeds agree"
    name = explanation.names(row)[positive]
    chosen = p.mean() if positive else 1 - p.mean()
    probability = f"{chosen:.2f}" if chosen < 0.995 else "above 0.99"
    verdict = "unlabelled"
    if target is not None:
        verdict = ("wrong" if is_wrong(explanation, row) else "right") + f": labelled {explanation.label(target)}"
    rather = f", rather than {explanation.names(row)[0]}" if several else ""
    return f"{name[:1].upper()}{name[1:]} with probability {probability}{rather} ({seeds}); {verdict}"


def _largest_part(explanation: Explanation, row: int) -> str:
    """The part that pushes the mean prediction furthest towards where it ends: from 0, or from a regression's bias."""
    parts = {name: part[:, row].mean() for name, part in explanation.account.parts.items()}
    bias = parts.pop("bias")
    binary = explanation.chooses
    total = sum(parts.values()) + (bias if binary else 0.0)
    positive = bool(total >= 0)
    if binary and explanation.account.seeds_disagree[row]:
        return f"The seeds disagree: their mean {explanation.output} is {_signed(total)}."
    name = max(parts, key=lambda part: parts[part] if positive else -parts[part])
    whole = f"in a {explanation.output} of {_signed(total)}" if binary else f"from {bias:.2f} at the mean of train"
    if binary and (parts[name] > 0) != positive:
        return f"No part of the example pushes that way: the bias does, {_signed(bias)} {whole}."
    *others, last = name.removesuffix(" alone").split(" x ")
    subject = f"{', '.join(others)} and {last} together push" if others else f"{last} alone pushes"
    return f"{subject[:1].upper()}{subject[1:]} most: {_signed(parts[name])} {whole}."


def _signed(value: float) -> str:
    return f"{value:+.1f}" if abs(value) >= 1 else f"{value:+.2f}"


def plain(text: str) -> str:
    """The text with every control character replaced: it may come from a stranger, and a terminal would obey it."""
    return "".join(
        " "  # line ends and tabs too
        if letter.isspace()
        else "\N{REPLACEMENT CHARACTER}"
        if letter in TURNS or unicodedata.category(letter) in ("Cc", "Cs")  # C0 and C1; halves of a surrogate pair
        else letter
        for letter in text
    )


def headline(explanation: Explanation, row: int) -> str:
    """The prediction with its spread over seeds, and the loss where there is a label."""
    count = len(explanation.seeds)
    if explanation.chooses:
        value, name = explanation.probability(row), f"probability of {explanation.names(row)[1]}"
        cost = "cross-entropy"
    else:
        value, name = explanation.account.prediction[:, row], explanation.output
        cost = "squared error"
    seeds = f"over {count} seeds ({value.min():.2f} to {value.max():.2f})" if count > 1 else "of 1 seed"
    loss = explanation.loss(row)
    return f"{name} {mean_std(value)} {seeds}" + ("" if loss is None else f"; {cost} {loss:.3f}")


def reach(explanation: Explanation, row: int) -> str:
    """How far each latent may move before any seed changes its decision, or how much it moves a value (mean).

    Every seed has latents of its own, so radii are counted in each one's rms std of the latent.
    """
    account, cells = explanation.account, []
    for name in account.modalities:
        if explanation.chooses:
            radius = account.radius[name][:, row] / account.latent_std[name]
            mean = f" (seeds' mean {radius.mean():.2f})" if len(radius) > 1 else ""
            cells.append(f"{name} {radius.min():.2f}{mean}")
        else:
            cells.append(f"{name} {(account.slope[name][:, row] * account.latent_std[name]).mean():.2g}")
    if explanation.chooses:
        who = "no seed changes its" if len(explanation.seeds) > 1 else "the seed does not change its"
        return f"certified: {who} decision before one latent alone moves by, in standard deviations: {', '.join(cells)}"
    return (
        f"certified: as one latent alone moves by its standard deviation, the {explanation.output} changes by at most "
        "(mean over seeds): " + ", ".join(cells)
    )


def print_explanation(explanation: Explanation, row: int = 0) -> None:
    """One explained example as text."""
    account = explanation.account
    print(f"{sentence(explanation, row)}\n{headline(explanation, row)}\n")
    print(f"{plain(explanation.examples.ids[row])}  {explanation.examples.text(row)!r}")
    print(f"{explanation.run}: {explanation.row}, {counted(len(explanation.seeds), 'seed')}")
    for note in explanation.notes:
        print(f"note: {plain(note)}")

    binary = explanation.chooses
    print(f"\n{'certified radius (l2)' if binary else 'largest change (l2)':24}", end="")
    print(
        "the least change of one latent that changes a seed's own decision, in its rms std on train"
        if binary
        else f"of the {explanation.output} as one latent moves by its rms std on train, mean over seeds"
    )
    for name in account.modalities:
        if binary:
            radius = account.radius[name][:, row] / account.latent_std[name]
            print(f"  {name:20}  {_cell(radius)}{f'; least over seeds {radius.min():.3f}' if len(radius) > 1 else ''}")
        else:
            print(f"  {name:20}  {_cell(account.slope[name][:, row] * account.latent_std[name])}")

    spread = " (mean +- std over seeds)" if len(explanation.seeds) > 1 else ""
    print(f"\nthe {explanation.output}, taken apart exactly about the mean of train{spread}")
    for name, part in account.parts.items():
        print(f"  {name:20}  {_cell(part[:, row])}")
    print(f"  {'sum':20}  {_cell(sum(part[:, row] for part in account.parts.values()))}")
    print(
        f"  the parts sum to the {explanation.output} in every seed: largest difference {account.residual:.0e} "
        f"(allowed: {TOLERANCE:.0e})"
    )

    if account.variance:
        print(f"\nhow unsure, because of whose latent: std of the {explanation.output}{spread}, shares of its variance")
        print(f"  {'because of all':20}  {_cell(account.std[:, row])}")
        whole = np.maximum(account.std[:, row] ** 2, 1e-30)
        for name, part in account.variance.items():
            print(f"  {name:20}  {_cell(part[:, row] / whole)}")

    _print_ranks(explanation, row)
    _print_maps(explanation, row)


def doubt(explanation: Explanation, row: int) -> str:
    """How unsure the prediction is because of the latents' noise, and of whose; empty where they are certain."""
    account = explanation.account
    if not account.variance:
        return ""
    total = sum(part[:, row].mean() for part in account.variance.values())
    shares = ", ".join(
        f"{name} {part[:, row].mean() / max(total, 1e-30):.0%}" for name, part in account.variance.items()
    )
    return f"std of the {explanation.output} from the latents' noise {np.sqrt(total):.2f}, its variance: {shares}"


def _print_ranks(explanation: Explanation, row: int) -> None:
    """Rank terms of one seed, and the training examples nearest by each."""
    account, ranks = explanation.account, explanation.ranks
    print(f"\nrank terms of seed {explanation.seed}")
    kind = "canonical component" if ranks.canonical else "rank"
    names = "".join(f"{name:>12}" for name in account.modalities)
    own = "" if not ranks.canonical else "   the layer's own rank term"
    print(f"  {kind:20}{names}      weight        term   std on train{own}")
    for k, term in enumerate(ranks.terms[row]):
        coordinates = "".join(f"{value:12.3f}" for value in ranks.coordinates[row, k])
        own = f"{ranks.raw_terms[row, k]:28.3f}" if ranks.canonical else ""
        print(f"  {k + 1:<20}{coordinates}{ranks.weight[row, k]:12.3f}{term:12.3f}{ranks.std[row, k]:15.3f}{own}")
    what = " x ".join(account.modalities) if ranks.canonical else f"{explanation.output} less its bias"
    width = 12 * len(account.modalities) + 12
    print(f"  {'sum: ' + what:<{20 + width}}{ranks.terms[row].sum():12.3f}   (difference {ranks.residual:.0e})")
    if ranks.canonical:
        print(
            "  (two modalities: the layer's own terms are not identified, another seed or basis splits the same logit "
            "otherwise;\n  canonical components are: coordinates of variance 1 on train, term = weight x their product)"
        )
    elif len(account.modalities) > 2:
        print("  (three or more modalities: identified if the factors satisfy Kruskal's condition, up to their order)")

    print(f"\ntraining examples nearest in the coordinates of each {kind}")
    for k in range(ranks.terms.shape[1]):
        for place in ranks.neighbours[row, k]:
            label = explanation.label(explanation.train.targets[place])
            key = plain(explanation.train.ids[place])
            print(f"  {k + 1:<3} {key:24} {label:10} {explanation.train.text(place)[:60]!r}")


def _print_maps(explanation: Explanation, row: int) -> None:
    maps = explanation.maps[row]
    if maps is None:
        return
    for name, words in maps.words.items():
        print(f"\nwords of {name} that feed {explanation.mapped} (with the word minus without it)")
        print("  " + "  ".join(f"{plain(word)} {value:+.3f}" for word, value in words))
    if maps.regions is not None:
        print(f"\nregions of the picture that feed {explanation.mapped} (gradient x (input - mean of train))")
        for line in maps.regions.cells:
            print("  " + "".join(f"{value:9.3f}" for value in line))
    for note in maps.notes:
        print(f"\n{plain(note)}")


def _cell(values: np.ndarray) -> str:
    return mean_std(values).rjust(17 if len(values) > 1 else 8)  # the means of a column stand below each other
