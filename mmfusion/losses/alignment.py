"""Alignment losses by name: each a function of latents (B, L) by modality, at its default settings.

    name          loss                    sees partners   symmetric in the modalities    hub   0 iff (M > 1)
    margin        margin_ranking          yes             yes                            no    partners nearest by .2
    info_nce      info_nce                yes             yes, or around a hub           yes   never; log B by chance
    gram          gram_volume_contrast    yes             yes, or around a hub           yes   never; log B by chance
    multilinear   multilinear_contrast    yes             on average over batches        yes   never; log B by chance
    bures         local_bures             yes             yes, or around a hub           yes   equal local covariances
    transport     batch_transport         no              yes, or around a hub           yes   equal sets of directions
    mmd           batch_mmd               no              yes, or around a hub           yes   0 on average, if equal
    stein         stein_divergence        no              yes, by its mean               O(M)  equal covariances
    coral         coral                   no              yes, by its mean               O(M)  equal covariances

A loss that does not see partners is the same after a permutation of the rows of one modality. `bures` and `coral` fall
where all latents shrink: beside them the prior, or another floor of the variance, must stay. Equal latents of three or
more modalities are no minimum of `gram` (there it is log B) and of `multilinear` (which scores products, not equality).
"""

from collections.abc import Callable, Mapping

from torch import Tensor

from mmfusion.losses.contrastive import gram_volume_contrast, info_nce, margin_ranking, multilinear_contrast
from mmfusion.losses.covariance import coral, local_bures, stein_divergence
from mmfusion.losses.marginal import batch_mmd, batch_transport

ALIGNMENTS: dict[str, Callable[[Mapping[str, Tensor]], Tensor]] = {
    "margin": margin_ranking,
    "info_nce": info_nce,
    "transport": batch_transport,
    "stein": stein_divergence,
    "bures": local_bures,
    "coral": coral,
    "mmd": batch_mmd,
    "gram": gram_volume_contrast,
    "multilinear": multilinear_contrast,
}
TEMPERED = ("info_nce", "gram", "multilinear")
"""those that take a temperature, which a model may learn, and the rows' items"""
