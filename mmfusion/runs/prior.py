"""What a run says of its latents: do they follow the prior, and do they carry anything?"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass

import numpy as np
import torch

from mmfusion.dataset import Dataset, Split
from mmfusion.metrics.format import counted, mean_std
from mmfusion.metrics.prior import NUMBERS, PriorCheck, check_prior
from mmfusion.models.fusion import FusionEnsemble, FusionModel
from mmfusion.models.temporal_lmf import TemporalFusion
from mmfusion.models.token_ensemble import TokenEnsemble
from mmfusion.runs.tokens import token_cloud


@dataclass(frozen=True)
class PriorReport:
    """Latents of one modality on one split, by S members."""

    modality: str
    split: str
    examples: int
    numbers: dict[str, list[float]]
    """the four of `mmfusion.metrics.prior.NUMBERS`, (S,) each"""
    ranges: dict[str, tuple[float, float]]
    """1 to 99 % of each under draws of the prior at the same number of examples"""
    dimension_of_means: list[float]
    """(S,) effective dimension of Cov(mu)"""
    share_of_means: list[float]
    """(S,) share of the latents' variance that is not noise"""
    enforced: list[bool]
    """(S,), as `mmfusion.metrics.prior.PriorCheck`"""


def prior_report(datasets: Sequence[Dataset], ensemble: FusionEnsemble | TokenEnsemble) -> list[dict[str, object]]:
    """Every modality on every split of 2 examples or more, entries of `PriorReport`; of several folds on the first.

    Of LMF over pairs of tokens it is one token of each example that must follow the prior, as in training.
    """
    members, found = ensemble.part(0, len(datasets)).members, []
    parts = {part: split for part, split in datasets[0].splits.items() if len(split) > 1}
    latents = {part: [latents_of_split(member, split) for member in members] for part, split in parts.items()}
    for name in ensemble.shape["input_dims"]:
        for part, of_members in latents.items():
            checks = [check_prior(*one[name]) for one in of_members]
            found.append(asdict(_joined(name, part, len(parts[part]), checks)))
    return found


@torch.inference_mode()
def latents_of_split(
    member: FusionModel | TemporalFusion, split: Split
) -> dict[str, tuple[np.ndarray, np.ndarray | None]]:
    """Of each modality mean latents (n, L), and the variances (L,) of their noise or None."""
    if isinstance(member, TemporalFusion):
        return {name: (z.astype(np.float64), None) for name, z in token_cloud(member, split).items()}
    x = {name: split.features[name] for name in member.modalities}
    means, variances = member.jwae.posterior({name: member.standardise[name](x[name]) for name in x})
    return {
        name: (z.double().numpy(), variances[name].double().numpy() if variances else None) for name, z in means.items()
    }


def print_prior(reports: Sequence[dict[str, object]]) -> None:
    """The numbers of every modality and split, mean +- std over seeds, each above its range under the prior."""
    if not reports:
        return
    print("\ndo the latents follow N(0, I)? (mean +- std over seeds; below: 1 to 99 % of draws of it, as many)")
    titles = ("largest eigenvalue", "effective dim.", "in the 95 % ball", "mean |std - 1|")
    print(f"{'':18}" + "".join(f"{title:>20}" for title in titles) + "   follows in")
    for one in reports:
        said = f"{sum(one['enforced'])} of {counted(len(one['enforced']), 'seed')}"
        print(f"{one['modality']} {one['split']}"[:17].ljust(18), end="")
        print("".join(f"{mean_std(one['numbers'][name]):>20}" for name in NUMBERS) + f"   {said}")
        cells = (f"[{low:.3f}, {high:.3f}]" for low, high in one["ranges"].values())
        print(" " * 18 + "".join(f"{cell:>20}" for cell in cells))
    print("\nand do they carry anything?    effective dim. of the means   share of the variance that is no noise")
    for one in reports:
        print(f"{one['modality']} {one['split']}"[:30].ljust(31), end="")
        print(f"{mean_std(one['dimension_of_means']):>27}   {mean_std(one['share_of_means'])}")


def _joined(modality: str, part: str, examples: int, checks: Sequence[PriorCheck]) -> PriorReport:
    first = checks[0].follows
    return PriorReport(
        modality,
        part,
        examples,
        {name: [check.follows[name].value for check in checks] for name in first},
        {name: (number.low, number.high) for name, number in first.items()},
        [check.dimension_of_means for check in checks],
        [check.share_of_means for check in checks],
        [check.enforced for check in checks],
    )
