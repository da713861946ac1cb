"""What ensembles of independently trained members have in common: their files, and how they are put together."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Self

from torch import nn

from mmfusion.files import write_json, write_safetensors
from mmfusion.models.pretrained import CONFIG, WEIGHTS


class Ensemble(nn.Module):
    """Members of one shape. `shape` holds the constructor's arguments, `members` among them, and is config.json."""

    shape: dict[str, object]
    members: nn.ModuleList

    def save_pretrained(self, folder: Path, entries: Mapping[str, object] | None = None) -> None:
        """Write model.safetensors and config.json, the latter with further `entries`. Raises InputError."""
        write_safetensors(folder / WEIGHTS, self.state_dict())
        write_json(folder / CONFIG, {**self.shape, **(entries or {})})

    @classmethod
    def from_members(cls, models: Sequence[nn.Module], **shape: object) -> Self:
        """An ensemble with the values of trained models, in evaluation mode; `shape` is its constructor's arguments."""
        ensemble = cls(**shape, members=len(models)).eval()
        for empty, model in zip(ensemble.members, models, strict=True):
            empty.load_state_dict(model.state_dict())
        return ensemble

    def part(self, fold: int, folds: int) -> Self:
        """The members of one fold, of an ensemble whose members are seed-major, then fold; they are shared."""
        members = list(self.members)[fold::folds]
        chosen = type(self)(**{**self.shape, "members": 0})
        chosen.shape["members"] = len(members)
        chosen.members.extend(members)
        return chosen.eval()
