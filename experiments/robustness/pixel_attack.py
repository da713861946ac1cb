"""PGD on the pixels of a few memes, through the frozen image encoder, and the pictures before and after."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from mmfusion.data.folds import tested_split
from mmfusion.dataset import Split
from mmfusion.encoders.frozen import ImageEncoder, find_image_encoder, image_preprocessing
from mmfusion.encoders.images import decode_rgb, preprocess
from mmfusion.files import write_atomically
from mmfusion.models.fusion import FusionModel
from mmfusion.robustness.attacks import pgd
from mmfusion.runs.load import TrainedRun

EPSILON = 8.0
"""l_inf size in steps of 255: what is hardly seen"""
STEPS = 20


@dataclass(frozen=True)
class PixelAttack:
    """One meme, before and after; pictures as the encoder sees them, (S, S, 3) of 0..255."""

    key: str
    """id of the meme"""
    before: np.ndarray
    after: np.ndarray
    probability: tuple[float, float]
    """of the first member, before and after, both of the 8-bit pictures"""
    label: int

    @property
    def flipped(self) -> bool:
        """True where the attack has changed the sign of the logit."""
        return (self.probability[0] >= 0.5) != (self.probability[1] >= 0.5)

    @property
    def line(self) -> str:
        """One line of the table."""
        largest = int(np.abs(self.after.astype(int) - self.before.astype(int)).max())
        return (
            f"{self.key}: label {self.label}, probability {self.probability[0]:.3f} -> {self.probability[1]:.3f}, "
            f"no pixel moved by more than {largest} of 255{', flipped' if self.flipped else ''}"
        )

    def save(self, folder: Path) -> None:
        """PNG files before and after."""
        stem = self.key.replace("/", "_").rsplit(".", 1)[0]
        for kind, pixels in (("before", self.before), ("after", self.after)):
            picture = Image.fromarray(pixels)
            write_atomically(folder / f"{stem}-{kind}.png", lambda path, p=picture: p.save(path, "PNG"))


def attack_pixels(run: TrainedRun, count: int, device: str = "cpu") -> list[PixelAttack]:
    """Attack the first `count` test memes that the first member gets right, within 8/255 in l_inf.

    Away from the label; the other modality stays. What is reported is the rounded 8-bit picture, as saved.
    Raises InputError where pictures or encoder are gone.
    """
    split = run.datasets[0].splits[tested_split(run.datasets[0])]
    model = run.members(run.main_row)[0]
    with torch.no_grad():
        logits = model(split.features, reconstruct=False).prediction.squeeze(-1)
    right = ((logits >= 0) == (split.target == 1)).nonzero().flatten()[:count].tolist()
    paths = run.image_paths([split.ids[row] for row in right])
    source = find_image_encoder(run.encoders)
    preprocessing = image_preprocessing(run.encoders, source)
    encoder = ImageEncoder(run.encoders, source, device)
    pictures = {row: preprocess(decode_rgb(paths[split.ids[row]]), preprocessing) for row in right}
    return [_attack(model, encoder, split, row, before) for row, before in pictures.items()]


def _attack(model: FusionModel, encoder: ImageEncoder, split: Split, row: int, before: np.ndarray) -> PixelAttack:
    """One meme; `before` (S, S, 3) are its pixels."""
    pixels = torch.from_numpy(before.astype(np.float32)).permute(2, 0, 1).unsqueeze(0)  # (1, 3, S, S)
    others = {name: x[row : row + 1] for name, x in split.features.items()}
    label = int(split.target[row])

    def logit(x: Tensor) -> Tensor:
        image = encoder.features(x.to(encoder.device)).float().cpu()
        return model(others | {"image": image}, reconstruct=False).prediction.squeeze(-1)

    attack = pgd(
        lambda change: (2 * label - 1) * logit(pixels + change),
        pixels,
        EPSILON,
        torch.inf,
        steps=STEPS,
        restarts=1,
        bounds=(-pixels, 255 - pixels),
    )
    after = (pixels + attack.change).round().clamp(0, 255)
    with torch.no_grad():
        chances = tuple(float(logit(x).sigmoid()) for x in (pixels, after))
    picture = after.squeeze(0).permute(1, 2, 0).to(torch.uint8).numpy()
    return PixelAttack(split.ids[row], np.array(before), np.ascontiguousarray(picture), chances, label)
