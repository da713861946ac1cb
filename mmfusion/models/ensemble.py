"""What ensembles of independently trained members have in common: their files, and how they are put together."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import ClassVar, Self

from torch import nn

from mmfusion.errors import InputError
from mmfusion.files import write_json, write_safetensors
from mmfusion.models.pretrained import CONFIG, WEIGHTS, load_weights


class Ensemble(nn.Module):
    """Members of one shape. `shape` holds the constructor's arguments, `members` among them, and is config.json."""

    shape: dict[str, object]
    members: nn.ModuleList
    kind: ClassVar[dict[str, object]] = {}
    """further entries of config.json, by which models that are no fusion are told from it"""

    def save_pretrained(self, folder: Path, entries: Mapping[str, object] | None = None) -> None:
        """Write model.safetensors and config.json, the latter with further `entries`. Raises InputError."""
        write_safetensors(folder / WEIGHTS, self.state_dict())
        write_json(folder / CONFIG, {**self.shape, **self.kind, **(entries or {})})

    @classmethod
    def from_members(cls, models: Sequence[nn.Module], **shape: object) -> Self:
        """An ensemble with the values of trained models, in evaluation mode; `shape` is its constructor's arguments."""
        ensemble = cls(**shape, members=len(models)).eval()
        for empty, model in zip(ensemble.members, models, strict=True):
            empty.load_state_dict(model.state_dict())
        return ensemble

    @classmethod
    def from_folder(cls, folder: Path, shape: Mapping[str, object]) -> Self:
        """An ensemble of this shape, in evaluation mode, every weight from the folder's file.

        Raises InputError where a weight is missing, foreign or not finite, or the shape describes no ensemble.
        """
        try:
            ensemble = cls(**shape)
        except (ValueError, TypeError, RuntimeError, MemoryError) as error:  # RuntimeError: torch has no memory for it
            reason = " ".join(str(error).split())[:120]
            where = f"{folder / CONFIG}: describes a model that cannot be made"
            raise InputError(f"{where} ({reason}); train the run anew") from error
        load_weights(ensemble, folder / WEIGHTS)
        return ensemble.eval()

    def part(self, fold: int, folds: int) -> Self:
        """The members of one fold, of an ensemble whose members are seed-major, then fold; they are shared."""
        members = list(self.members)[fold::folds]
        chosen = type(self)(**{**self.shape, "members": 0})
        chosen.shape["members"] = len(members)
        chosen.members.extend(members)
        return chosen.eval()
