"""A run's own encoders, for pictures and texts that need not be of its data."""

from collections.abc import Sequence
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from mmfusion.encoders.extract import BATCH_CPU
from mmfusion.encoders.frozen import (
    ImageEncoder,
    TextEncoder,
    find_image_encoder,
    find_text_encoder,
    image_preprocessing,
)
from mmfusion.encoders.images import Preprocessing, decode_rgb, preprocess, reason_unreadable
from mmfusion.encoders.tokens import ImageTokenEncoder, TextTokenEncoder
from mmfusion.encoders.weights import EncoderSource
from mmfusion.errors import InputError, printable
from mmfusion.models.token_ensemble import TokenEnsemble
from mmfusion.runs.load import TrainedRun
from mmfusion.sequences import Sequences


class RunEncoders:
    """Image and text encoder of a run, each loaded when it is first needed; raises InputError where one is lacking.

    On another kind of device than the run's, vectors differ from its own by the arithmetic (bfloat16 on CUDA).
    """

    def __init__(self, run: TrainedRun, device: str) -> None:
        self.run, self.device = run, device
        self.gives_tokens = isinstance(run.ensembles[run.main_row], TokenEnsemble)

    @cached_property
    def _image_source(self) -> EncoderSource:
        return find_image_encoder(self.run.encoders)

    @cached_property
    def preprocessing(self) -> Preprocessing:
        """How a picture is brought into the image encoder's shape."""
        return image_preprocessing(self.run.encoders, self._image_source)

    @cached_property
    def image(self) -> ImageEncoder:
        """uint8 pixels (b, S, S, 3) -> (b, d)."""
        kind = ImageTokenEncoder if self.gives_tokens else ImageEncoder
        return kind(self.run.encoders, self._image_source, self.device)

    @cached_property
    def text(self) -> TextEncoder:
        """b lists of token ids -> (b, d)."""
        kind = TextTokenEncoder if self.gives_tokens else TextEncoder
        return kind(self.run.encoders, find_text_encoder(self.run.encoders), self.device)

    def words(self, text: str) -> list[str]:
        """What the tokens of one text, without special ones, are called."""
        special = set(self.text.tokenizer.all_special_ids)
        ids = [i for i in self.tokens(text) if i not in special] or self.tokens(text)[:1]
        return [str(word) for word in self.text.tokenizer.convert_ids_to_tokens(ids)]

    def tokens(self, text: str) -> list[int]:
        """Token ids of one text."""
        return self.text.tokenize([text])[0]

    def read(self, image: Path) -> np.ndarray:
        """Pixels (S, S, 3) as the encoder sees them. Raises what Pillow raises on a file that is no picture."""
        return preprocess(decode_rgb(image), self.preprocessing).copy()  # Pillow's own memory is read-only

    @property
    def lacking(self) -> str | None:
        """Why memes cannot be encoded as the run's were, in words; None where they can."""
        if self.run.memes is None:
            return f"{self.run.folder} was not trained on memes"
        if self.run.memes.given:
            return f"features of {', '.join(self.run.memes.given)} came from files (--features)"
        return None

    def encode(
        self, images: Sequence[Path | str] | None = None, texts: Sequence[str] | None = None, flag: str = ""
    ) -> dict[str, Tensor | Sequences]:
        """Features of memes: "image" (N, d) of N files, "text" (N, d) of N texts; what is not given is left out.

        Of a run whose models take tokens, sequences of them.

        `flag` stands before the file in a message. Raises InputError naming the file that is missing or no picture, or
        the text that is no Unicode, and for a run whose features of memes are not its encoders'; ValueError where not
        N files, N texts or both are given.
        """
        if self.lacking is not None:
            raise InputError(f"{self.lacking}: it takes no raw memes; give features")
        given = [values for values in (images, texts) if values is not None]
        if any(isinstance(values, str | Path) for values in given) or len({len(values) for values in given}) != 1:
            raise ValueError("give a list of N files as images, a list of N texts, or both")
        if not len(given[0]):
            raise ValueError("there is nothing to encode: the lists are empty")
        for what, values, kind in (("images", images, str | Path), ("texts", texts, str)):
            if (
                row := next(
                    (i for i, one in enumerate(() if values is None else values) if not isinstance(one, kind)), None
                )
            ) is not None:
                raise ValueError(
                    f"{what}: row {row} is {values[row]!r:.40}, no {'file' if what == 'images' else 'text'}; "
                    f"encode memes that lack it apart, with {what} left out"
                )
        features = {}
        if images is not None:
            _ = self.preprocessing  # before the first picture: an encoder that is lacking is no bad picture
            vectors = []
            for start in range(0, len(images), BATCH_CPU):
                pixels = [self._picture(Path(path), flag) for path in images[start : start + BATCH_CPU]]
                vectors.append(self.image(np.stack(pixels)))
            features["image"] = _joined(vectors)
        if texts is not None:
            for text in texts:
                if any("\ud800" <= letter <= "\udfff" for letter in text):
                    raise InputError(f"text {printable(text)[:60]}: holds bytes that are no UTF-8; write it again")
            tokens = self.text.tokenize(list(texts))
            starts = range(0, len(tokens), BATCH_CPU)
            features["text"] = _joined([self.text(tokens[start : start + BATCH_CPU]) for start in starts])
        return features

    def _picture(self, path: Path, flag: str) -> np.ndarray:
        try:
            return self.read(path)
        except Exception as error:  # a hostile file may raise nearly anything inside Pillow
            reason = reason_unreadable(error)
            raise InputError(f"{flag}{printable(str(path))}: {reason}; give a picture that Pillow reads") from error


def _joined(batches: Sequence[Tensor | list[Tensor]]) -> Tensor | Sequences:
    """Encoded batches after each other."""
    if isinstance(batches[0], Tensor):
        return torch.cat(list(batches))
    return Sequences([tokens for batch in batches for tokens in batch])
