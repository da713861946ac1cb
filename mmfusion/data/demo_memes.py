"""Draw a small folder of memes, in the layout of the Hateful Memes release, whose label needs image and text together.

Eight pictures and eight phrases. Picture i carries the code s_i e_a (a sign and one of four axes), phrase t the code
g_t h_b (a sign and one of the four rows of the Hadamard matrix H), and the meme is "hateful" exactly when

    <s_i e_a, g_t h_b>  =  s_i g_t H[b, a]  =  +1

so the table of labels (8 x 8) is a sign matrix of rank PLANTED_RANK = 4 with equal singular values and with as many
+1 as -1 in each row and column: each picture and each phrase is as often hateful as benign (the benign confounders
of Kiela et al. 2020), neither says anything alone, and no rank below four describes the table. Nothing drawn here is
hateful; the word is the data set's.
"""

import json
import math
import os
import random
import shutil
from pathlib import Path

from filelock import FileLock
from PIL import Image, ImageDraw, ImageFont

from mmfusion.errors import InputError
from mmfusion.files import read_regular_file, write_atomically, write_json, write_text

PLANTED_RANK = 4
HADAMARD = ((1, 1, 1, 1), (1, -1, 1, -1), (1, 1, -1, -1), (1, -1, -1, 1))

# name: (sky top, sky bottom, ground, what stands on it)
PICTURES = {
    "sunset": ((250, 110, 60), (255, 215, 120), (110, 45, 60), "sun"),
    "ocean": ((120, 190, 240), (205, 235, 255), (20, 85, 160), "waves"),
    "forest": ((170, 215, 190), (215, 240, 215), (35, 75, 35), "trees"),
    "city at night": ((10, 12, 40), (45, 35, 80), (25, 25, 30), "towers"),
    "snow": ((205, 215, 230), (240, 244, 250), (250, 250, 255), "flakes"),
    "desert": ((90, 160, 225), (200, 220, 230), (225, 180, 105), "dunes"),
    "meadow": ((100, 180, 255), (190, 225, 255), (90, 175, 60), "flowers"),
    "volcano": ((60, 25, 25), (150, 55, 30), (40, 30, 30), "cone"),
}
PHRASES = (
    "look how many people love you",
    "everyone is welcome over here",
    "this is where you feel at home",
    "love the way you smell today",
    "finally some really good company",
    "my favourite kind of weather",
    "nothing but the very best for us",
    "who could ask for more than that",
)
OPENINGS = ("", "oh ", "well ", "my friends ")
# memes for each of the 64 (picture, phrase) pairs
COPIES = {"train": 12, "dev": 3, "test": 5}
SIZE = (224, 168)  # width, height in pixels
MANIFEST_BYTES = 100_000_000  # demo.json has 0.1 MB


def hateful(picture: int, phrase: int) -> bool:
    """The planted label of picture 0..7 with phrase 0..7: codes are (axis = index % 4, sign = index // 4)."""
    sign = (1 if picture < 4 else -1) * (1 if phrase < 4 else -1)
    return sign * HADAMARD[phrase % 4][picture % 4] > 0


def draw_demo(folder: Path, seed: int = 0) -> Path:
    """Draw the demo into `folder` unless it is there already; return the path of its train.jsonl.

    Leaves `img/*.png`, `train.jsonl`, `dev.jsonl`, `test.jsonl`, `demo.json` (picture and phrase of each meme) and
    `bert/` (configuration and vocabulary of BERT-base for these words, without weights). The manifest `demo.json` is
    written last, so an interrupted drawing is drawn again. Raises InputError where `folder` cannot be written or holds
    something that this function did not draw.
    """
    recipe = {"seed": seed, "copies": COPIES, "size": list(SIZE), "planted_rank": PLANTED_RANK, "version": 1}
    if not _is_drawn(folder, recipe):
        try:
            folder.parent.mkdir(parents=True, exist_ok=True)
            with FileLock(folder.parent / f".{folder.name}.lock"):  # of two runs at once one draws, the other waits
                if not _is_drawn(folder, recipe):
                    _draw(folder, recipe)
        except OSError as error:
            reason = error.strerror or error
            raise InputError(f"{folder}: cannot be drawn ({reason}); choose another --cache-dir") from error
    return folder / "train.jsonl"


def _is_drawn(folder: Path, recipe: dict[str, object]) -> bool:
    manifest = folder / "demo.json"
    return os.path.lexists(manifest) and _drawn_recipe(manifest) == recipe


def _draw(folder: Path, recipe: dict[str, object]) -> None:
    manifest = folder / "demo.json"
    if folder.exists() and not folder.is_dir():
        raise InputError(f"{folder}: is a file, and the demo is drawn into a folder of that name; move it away")
    if folder.exists() and any(folder.iterdir()) and not (folder / "demo.lock").exists() and not manifest.exists():
        raise InputError(f"{folder}: exists and is not a demo folder; move it away or choose another --cache-dir")
    write_text(folder / "demo.lock", "a drawing that has begun\n")
    manifest.unlink(missing_ok=True)
    shutil.rmtree(folder / "img", ignore_errors=True)

    rng = random.Random(recipe["seed"])
    truth: dict[str, dict[str, object]] = {}
    number = 0
    for split, copies in COPIES.items():
        pairs = [(i, t) for i in range(len(PICTURES)) for t in range(len(PHRASES))] * copies
        rng.shuffle(pairs)
        rows = []
        for picture, phrase in pairs:
            number += 1
            img = f"img/{number:05d}.png"
            text = rng.choice(OPENINGS) + PHRASES[phrase]
            image = draw_meme(picture, text, rng)
            write_atomically(folder / img, lambda path, image=image: image.save(path, format="png", compress_level=1))
            rows.append({"id": f"{number:05d}", "img": img, "label": int(hateful(picture, phrase)), "text": text})
            truth[img] = {"picture": picture, "phrase": phrase}
        write_text(folder / f"{split}.jsonl", "".join(json.dumps(row) + "\n" for row in rows))

    _write_bert_architecture(folder / "bert")
    write_json(manifest, {"recipe": recipe, "pictures": list(PICTURES), "phrases": list(PHRASES), "memes": truth})
    (folder / "demo.lock").unlink(missing_ok=True)


def _drawn_recipe(manifest: Path) -> object:
    """The recipe in a manifest; None where it is damaged, and the demo is drawn again."""
    content = read_regular_file(manifest, MANIFEST_BYTES, "remove the demo's folder")
    try:
        return json.loads(content)["recipe"]
    except (ValueError, KeyError, TypeError, RecursionError):
        return None


def draw_meme(picture: int, text: str, rng: random.Random) -> Image.Image:
    """One RGB meme of SIZE: scene number `picture` with jittered colours and places, `text` drawn over it."""
    top, bottom, ground, motif = list(PICTURES.values())[picture]
    width, height = SIZE
    jitter = [rng.randint(-18, 18) for _ in range(3)]
    top, bottom, ground = (tuple(min(255, max(0, c + j)) for c, j in zip(rgb, jitter)) for rgb in (top, bottom, ground))  # noqa: B905 - three channels each
    horizon = int(height * rng.uniform(0.5, 0.68))

    image = Image.new("RGB", SIZE, ground)
    draw = ImageDraw.Draw(image)
    for y in range(horizon):
        mix = y / horizon
        draw.line(
            [(0, y), (width, y)], fill=tuple(int((1 - mix) * a + mix * b) for a, b in zip(top, bottom, strict=True))
        )
    _MOTIFS[motif](draw, rng, horizon)
    _draw_caption(draw, text, rng)
    return image


def _sun(draw: ImageDraw.ImageDraw, rng: random.Random, horizon: int) -> None:
    x, radius = rng.randint(40, SIZE[0] - 40), rng.randint(18, 30)
    draw.ellipse([x - radius, horizon - radius, x + radius, horizon + radius], fill=(255, 240, 160))
    draw.rectangle([0, horizon, SIZE[0], SIZE[1]], fill=(100, 45, 60))


def _waves(draw: ImageDraw.ImageDraw, rng: random.Random, horizon: int) -> None:
    for y in range(horizon + 6, SIZE[1], 9):
        shift = rng.randint(0, 20)
        for x in range(-shift, SIZE[0], 22):
            draw.arc([x, y, x + 22, y + 9], 180, 360, fill=(150, 200, 240), width=2)


def _trees(draw: ImageDraw.ImageDraw, rng: random.Random, horizon: int) -> None:
    for _ in range(16):
        x, h = rng.randint(0, SIZE[0]), rng.randint(35, 70)
        green = rng.randint(70, 120)
        draw.polygon(
            [(x - h // 4, horizon + 12), (x, horizon + 12 - h), (x + h // 4, horizon + 12)], fill=(20, green, 35)
        )


def _towers(draw: ImageDraw.ImageDraw, rng: random.Random, horizon: int) -> None:
    x = 0
    while x < SIZE[0]:
        w, h = rng.randint(16, 32), rng.randint(30, 85)
        draw.rectangle([x, horizon - h, x + w, SIZE[1]], fill=(30, 30, 48))
        for wy in range(horizon - h + 5, horizon + 20, 9):
            for wx in range(x + 4, x + w - 4, 7):
                if rng.random() < 0.5:
                    draw.rectangle([wx, wy, wx + 2, wy + 3], fill=(255, 225, 120))
        x += w + 3


def _flakes(draw: ImageDraw.ImageDraw, rng: random.Random, horizon: int) -> None:
    for _ in range(110):
        x, y, r = rng.randint(0, SIZE[0]), rng.randint(0, horizon), rng.randint(1, 3)
        draw.ellipse([x - r, y - r, x + r, y + r], fill=(255, 255, 255))


def _dunes(draw: ImageDraw.ImageDraw, rng: random.Random, horizon: int) -> None:
    for shade in (210, 190, 170):
        phase, base = rng.uniform(0, 6.3), horizon + (210 - shade)
        ridge = [(x, base + 9 * math.sin(x / 28 + phase)) for x in range(0, SIZE[0] + 8, 8)]
        draw.polygon([*ridge, (SIZE[0], SIZE[1]), (0, SIZE[1])], fill=(shade + 20, shade - 30, shade - 110))


def _flowers(draw: ImageDraw.ImageDraw, rng: random.Random, horizon: int) -> None:
    for _ in range(60):
        x, y = rng.randint(0, SIZE[0]), rng.randint(horizon + 4, SIZE[1])
        draw.ellipse([x - 3, y - 3, x + 3, y + 3], fill=rng.choice([(255, 80, 120), (255, 240, 80), (250, 250, 250)]))


def _cone(draw: ImageDraw.ImageDraw, rng: random.Random, horizon: int) -> None:
    x = rng.randint(80, SIZE[0] - 80)
    draw.polygon(
        [(x - 85, horizon + 15), (x - 14, horizon - 65), (x + 14, horizon - 65), (x + 85, horizon + 15)],
        fill=(70, 45, 40),
    )
    draw.line(
        [(x, horizon - 65), (x + rng.randint(-12, 12), horizon - 25), (x + rng.randint(-25, 25), horizon + 12)],
        fill=(255, 120, 20),
        width=5,
    )


_MOTIFS = {
    "sun": _sun,
    "waves": _waves,
    "trees": _trees,
    "towers": _towers,
    "flakes": _flakes,
    "dunes": _dunes,
    "flowers": _flowers,
    "cone": _cone,
}


def _draw_caption(draw: ImageDraw.ImageDraw, text: str, rng: random.Random) -> None:
    """White letters with a black rim, as memes have them, in two lines at the foot or at the head of the picture.

    Size, place and line break vary, so that the width of a caption does not tell the image encoder which phrase it is.
    """
    words = text.split()
    cut = len(words) // 2 + rng.randint(-1, 1)
    lines = " ".join(words[:cut]), " ".join(words[cut:])
    size = rng.randint(10, 15)
    font = ImageFont.load_default(size=size)
    while max(font.getlength(line) for line in lines) > SIZE[0] - 24:  # room for the rim and the shift
        size -= 1
        font = ImageFont.load_default(size=size)
    y = rng.choice([rng.randint(2, 10), SIZE[1] - 2 * size - rng.randint(8, 16)])
    for line in lines:
        x = SIZE[0] / 2 + rng.randint(-8, 8)
        draw.text((x, y), line, font=font, fill="white", stroke_width=1, stroke_fill="black", anchor="ma")
        y += size + 4


def _write_bert_architecture(folder: Path) -> None:
    """Configuration of BERT-base (12 layers, 768) and a word vocabulary for the demo's captions; no weights."""
    words = sorted({word for text in (*PHRASES, *OPENINGS) for word in text.split()})
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *words]
    write_text(folder / "vocab.txt", "\n".join(vocabulary) + "\n")
    write_json(
        folder / "config.json", {"model_type": "bert", "architectures": ["BertModel"], "vocab_size": len(vocabulary)}
    )
    write_json(folder / "tokenizer_config.json", {"tokenizer_class": "BertTokenizer", "do_lower_case": True})
