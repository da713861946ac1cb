"""One explained prediction in words and numbers, for the shell."""

import numpy as np

from mmfusion.explain.account import TOLERANCE, Explanation


def headline(explanation: Explanation, row: int) -> str:
    """The prediction with its spread over seeds, the label where there is one."""
    target = explanation.examples.targets[row]
    seeds = f"{len(explanation.seeds)} seed" + "s" * (len(explanation.seeds) > 1)
    if explanation.task == "binary":
        value, name = explanation.probability(row), "probability of label 1"
        label = "" if target is None else f"; the label is {target:g}"
    else:
        value, name = explanation.account.prediction[:, row], explanation.output
        label = "" if target is None else f"; the target is {target:.3g}"
    spread = f" +- {value.std(ddof=1):.2g}" if len(value) > 1 else ""
    return f"{name}: {value.mean():.3g}{spread} over {seeds} ({value.min():.2g} to {value.max():.2g}){label}"


def reach(explanation: Explanation, row: int) -> str:
    """How far each latent may move before any seed changes its decision, or how much it moves a value (mean).

    Every seed has latents of its own, so radii are counted in each one's rms std of the latent.
    """
    account, cells = explanation.account, []
    for name in account.modalities:
        if explanation.task == "binary":
            radius = account.radius[name][:, row] / account.latent_std[name]
            cells.append(f"{name} {radius.min():.2f} (seeds' mean {radius.mean():.2f})")
        else:
            cells.append(f"{name} {(account.slope[name][:, row] * account.latent_std[name]).mean():.2g}")
    if explanation.task == "binary":
        return "certified l2 radius of one latent in standard deviations, least over seeds: " + ", ".join(cells)
    return f"largest change of the {explanation.output} as one latent moves by its std: " + ", ".join(cells)


def print_explanation(explanation: Explanation, row: int = 0) -> None:
    """One explained example as text."""
    account, ranks = explanation.account, explanation.ranks
    count = len(explanation.seeds)
    print(f"{explanation.run}: {explanation.row}, {count} seed(s)")
    print(f"{explanation.examples.ids[row]}  {explanation.examples.text(row)!r}\n\n{headline(explanation, row)}")

    binary = explanation.task == "binary"
    print(f"\n{'certified radius (l2)' if binary else 'largest change (l2)':24}", end="")
    print(
        "the least change of one latent that changes a seed's own decision, in its rms std on train"
        if binary
        else f"of the {explanation.output} as one latent moves by its rms std on train, mean over seeds"
    )
    for name in account.modalities:
        if binary:
            radius = account.radius[name][:, row] / account.latent_std[name]
            print(f"  {name:20}  least over seeds {radius.min():.3f}; {_cell(radius)}")
        else:
            print(f"  {name:20}  {_cell(account.slope[name][:, row] * account.latent_std[name])}")

    print(f"\nthe {explanation.output}, taken apart exactly about the mean of train (mean +- std over seeds)")
    for name, part in account.parts.items():
        print(f"  {name:20}  {_cell(part[:, row])}")
    print(f"  {'sum':20}  {_cell(sum(part[:, row] for part in account.parts.values()))}")
    print(
        f"  the parts sum to the {explanation.output} in every seed: largest difference {account.residual:.0e} "
        f"(allowed: {TOLERANCE:.0e})"
    )

    print(f"\nrank terms of seed {explanation.seed}")
    kind = "canonical component" if ranks.canonical else "rank"
    names = "".join(f"{name:>12}" for name in account.modalities)
    own = "" if not ranks.canonical else "   the layer's own rank term"
    print(f"  {kind:20}{names}      weight        term   std on train{own}")
    for k, term in enumerate(ranks.terms[row]):
        coordinates = "".join(f"{value:12.3f}" for value in ranks.coordinates[row, k])
        own = f"{ranks.raw_terms[row, k]:28.3f}" if ranks.canonical else ""
        print(f"  {k + 1:<20}{coordinates}{ranks.weight[k]:12.3f}{term:12.3f}{ranks.std[k]:15.3f}{own}")
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
            target = explanation.train.targets[place]
            label = "" if target is None else f"label {target:g}" if binary else f"{target:.3g}"
            print(f"  {k + 1:<3} {explanation.train.ids[place]:24} {label:10} {explanation.train.text(place)[:60]!r}")
    _print_maps(explanation, row)


def _print_maps(explanation: Explanation, row: int) -> None:
    maps = explanation.maps[row]
    if maps is None:
        return
    for name, words in maps.words.items():
        print(f"\nwords of {name} that feed {explanation.mapped} (gradient x input)")
        print("  " + "  ".join(f"{word} {value:+.3f}" for word, value in words))
    if maps.regions is not None:
        print(f"\nregions of the picture that feed {explanation.mapped} (gradient x (input - mean of train))")
        for line in maps.regions.cells:
            print("  " + "".join(f"{value:9.3f}" for value in line))
    for note in maps.notes:
        print(f"\n{note}")


def _cell(values: np.ndarray) -> str:
    return f"{values.mean():8.3f}" + (f" +- {values.std(ddof=1):.3f}" if len(values) > 1 else "")
