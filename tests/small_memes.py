"""Small folders for the loader's tests: memes in the release's layout, and a BERT of 32 dimensions without weights."""

import json
from pathlib import Path

import numpy as np
from PIL import Image

from mmfusion.encoders.frozen import EncoderConfig

WORDS = "a dog cat runs on the hill people love you hate my big red house".split()


def write_bert(folder: Path, **settings: object) -> Path:
    """config.json and vocab.txt of a tiny BERT; no weights."""
    folder.mkdir(parents=True, exist_ok=True)
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *sorted(set(WORDS)), "##s", "?"]
    (folder / "vocab.txt").write_text("\n".join(vocabulary) + "\n")
    config = {
        "model_type": "bert",
        "vocab_size": len(vocabulary),
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 64,
        "max_position_embeddings": 64,
    }
    (folder / "config.json").write_text(json.dumps(config | settings))
    return folder


def picture(seed: int, size: tuple[int, int] = (40, 30)) -> Image.Image:
    """A smooth random picture."""
    small = np.random.default_rng(seed).integers(0, 256, (4, 4, 3), dtype=np.uint8)
    return Image.fromarray(small).resize(size, Image.Resampling.BICUBIC)


def meme_rows(split: str, count: int, first: int = 0) -> list[dict[str, object]]:
    """Rows with alternating labels; texts of one to nine words, some of them repeated."""
    rng = np.random.default_rng(first)
    rows = []
    for number in range(first, first + count):
        text = " ".join(rng.choice(WORDS, rng.integers(1, 10)))
        rows.append({"id": number, "img": f"img/{number:05}.png", "label": number % 2, "text": text})
    return rows


def write_rows(path: Path, rows: list[dict[str, object]]) -> None:
    """One JSON object per line."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def write_memes(folder: Path, counts: dict[str, int] | None = None) -> Path:
    """train / dev / test jsonl (test without labels, as in phase 1) and their PNG files; returns train.jsonl."""
    (folder / "img").mkdir(parents=True, exist_ok=True)
    first = 0
    for split, count in (counts or {"train": 22, "dev": 8, "test": 5}).items():
        rows = meme_rows(split, count, first)
        for row in rows:
            picture(int(row["id"])).save(folder / str(row["img"]))
        if split == "test":
            rows = [{key: value for key, value in row.items() if key != "label"} for row in rows]
        write_rows(folder / f"{split}.jsonl", rows)
        first += count
    return folder / "train.jsonl"


def small_encoders(bert: Path, **changes: object) -> EncoderConfig:
    """Both architectures with seeded random weights, on 32-pixel pictures."""
    settings = {"image_encoder": "random:resnet50", "image_size": 32, "text_encoder": f"random:{bert}"}
    return EncoderConfig(**(settings | changes))
