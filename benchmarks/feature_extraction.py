"""The whole loader, decoding included, against the bare encoders on ready tensors.

    python -m benchmarks.feature_extraction

Both sides run ResNet-50 (224 pixels, channels_last) and BERT-base with random weights (speed knows no difference) over
the same batches, one thread to a batch; repeats are interleaved, so that a busy machine slows both. The bare encoders
are torchvision's and transformers' modules as they come; the loader folds ResNet's batch norms into its convolutions,
so it stands beside bare encoders with that fold, too: there, decoding is all the difference.
"""

import argparse
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torchvision
import transformers
from PIL import Image, ImageDraw, ImageFont
from tqdm import tqdm

from hateful_memes_loader import load_hateful_memes, read_annotations
from mmfusion.distributed import Processes
from mmfusion.encoders import extract as feature_extraction
from mmfusion.encoders.extract import BATCH_CPU, BATCH_CUDA
from mmfusion.encoders.frozen import EncoderConfig, ImageEncoder, TextEncoder, find_image_encoder, find_text_encoder
from mmfusion.encoders.images import Preprocessing, decode_rgb, preprocess

GMAC_RESNET50 = 4.09  # per image of 224 x 224
GMAC_BERT_TOKEN = 0.085  # 12 layers of 7.1 million weights, per token; attention itself is below 1 % at 17 tokens
EPOCHS = 30  # of a training that encodes anew for every epoch
WORDS = "when you look at the people who live in this house and they love every single day of it".split()


def draw_photo(rng: np.random.Generator, caption: str) -> Image.Image:
    """An 825 x 550 picture with the statistics of a photo: 1/f structure, once through JPEG, a caption in white."""
    spectrum = np.fft.rfft2(rng.standard_normal((3, 550, 825)))  # (3, 550, 413)
    frequency = np.hypot(np.fft.fftfreq(550)[:, None], np.fft.rfftfreq(825)[None]) + 1 / 825
    pixels = np.fft.irfft2(spectrum / frequency**1.6, s=(550, 825))
    pixels = 128 + 55 * pixels / pixels.std()
    photo = Image.fromarray(pixels.clip(0, 255).astype(np.uint8).transpose(1, 2, 0).copy())
    font = ImageFont.load_default(40)
    ImageDraw.Draw(photo).text((40, 450), caption, "white", font, stroke_width=3, stroke_fill="black")
    return photo


def write_folder(folder: Path, count: int) -> Path:
    """A train and a dev split of photo-like PNG files, texts of some 17 tokens, and BERT-base without weights."""
    rng = np.random.default_rng(0)
    (folder / "img").mkdir(parents=True)
    for split, number in (("train", count - 8), ("dev", 8)):
        rows = []
        for index in range(number):
            text = " ".join(rng.choice(WORDS, int(rng.gamma(4.0, 1.9)) + 2)) + f" {split} {index}"
            img = f"img/{split}{index:05}.png"
            photo = draw_photo(rng, text[:30])
            photo.save(folder / "photo.jpg", quality=90)
            with Image.open(folder / "photo.jpg") as compressed:
                compressed.save(folder / img)
            rows.append({"img": img, "label": index % 2, "text": text})
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    bert = folder / "bert"
    transformers.BertConfig().save_pretrained(bert)
    letters = "abcdefghijklmnopqrstuvwxyz0123456789"
    pieces = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *sorted(set(WORDS)), *letters, *(f"##{x}" for x in letters)]
    (bert / "vocab.txt").write_text("\n".join(pieces) + "\n")
    return folder / "train.jsonl"


def build(config: EncoderConfig, device: str) -> tuple[ImageEncoder, TextEncoder]:
    """Both encoders, as the loader builds them: a cost per run and not per meme."""
    image = ImageEncoder(config, find_image_encoder(config), device)
    return image, TextEncoder(config, find_text_encoder(config), device)


class BareEncoders:
    """Both encoders and all their inputs, decoded and tokenised beforehand, in the loader's own batches."""

    def __init__(self, jsonl: Path, config: EncoderConfig, device: str) -> None:
        self.processes = Processes(device=device)
        memes = [meme for name in ("train", "dev") for meme in read_annotations(jsonl.parent / f"{name}.jsonl")[0]]
        self.image, self.text = build(config, device)
        self.folded, self.plain = self.image.model, torchvision.models.resnet50().eval()
        self.plain.fc = torch.nn.Identity()
        self.plain.to(device, memory_format=torch.channels_last)
        preprocessing = Preprocessing("squash", config.image_size, config.image_size, (0.0,) * 3, (1.0,) * 3)
        pixels = [preprocess(decode_rgb(jsonl.parent / meme.img), preprocessing) for meme in memes]
        tokens = sorted(self.text.tokenize(sorted({meme.text for meme in memes})), key=len)
        self.tokens_per_text = sum(map(len, tokens)) / len(tokens)
        size = BATCH_CUDA if device.startswith("cuda") else BATCH_CPU
        self.pixels = [np.stack(pixels[start : start + size]) for start in range(0, len(pixels), size)]
        self.tokens = [tokens[start : start + size] for start in range(0, len(tokens), size)]

    def __call__(self, folded: bool = False) -> None:
        """Encode everything, on the loader's own threads."""
        self.image.model = self.folded if folded else self.plain
        with feature_extraction._encoder_threads(self.processes) as (pool, _):
            list(pool.map(self.image, self.pixels))
            list(pool.map(self.text, self.tokens))


def seconds(call: Callable[[], object]) -> float:
    """Wall-clock time of one call."""
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def core_seconds(call: Callable[[], object]) -> tuple[float, float]:
    """Wall-clock time, and the time on all cores of this process and of the workers it has waited for."""
    before = os.times()
    wall = seconds(call)
    after = os.times()
    return wall, sum(after[:4]) - sum(before[:4])


def peak_gmacs(cores: int) -> float:
    """What this machine's matrix product reaches now, in GMAC/s over all cores: the floor's denominator."""
    a = torch.randn(2048, 2048)
    before = torch.get_num_threads()
    torch.set_num_threads(cores)
    best = min(seconds(lambda: a @ a) for _ in range(10))
    torch.set_num_threads(before)
    return 2048**3 / best / 1e9


def report(runs: dict[str, list[tuple[float, float]]], options: argparse.Namespace, png: float, tokens: float) -> None:
    """Print the table. A run is (wall-clock, core) seconds; `png` bytes and `tokens` are means."""
    cores, n = Processes().cores, options.memes
    gmac = GMAC_RESNET50 + GMAC_BERT_TOKEN * tokens
    floor = n * gmac / peak_gmacs(cores)
    print(
        f"{n} memes, PNG 825x550 of {png / 1e3:.0f} kB, {tokens:.1f} tokens; {options.device}, {cores} cores, torch "
        f"{torch.__version__}, {options.repeats} interleaved repeats, load average {os.getloadavg()[0]:.1f}"
    )
    print(f"{'':44}{'median s':>10}{'min':>8}{'max':>8}{'memes/s':>9}{'core ms/meme':>14}")
    print(f"{f'floor: {gmac:.2f} GMAC a meme at the speed of matmul':44}{floor:10.2f}{'':16}{n / floor:9.1f}")
    names = {
        "bare": "bare encoders, ready tensors",
        "folded": "bare encoders, batch norms folded",
        "build": "building both encoders, once a run",
        "cold": "whole loader, cold cache",
        "warm": "whole loader, warm cache",
    }
    for key, name in names.items():
        wall, core = zip(*runs[key], strict=True)
        middle = statistics.median(wall)
        each = "" if key == "build" else f"{n / middle:9.1f}{1e3 * statistics.median(core) / n:14.1f}"
        print(f"{name:44}{middle:10.2f}{min(wall):8.2f}{max(wall):8.2f}{each}")
    bare, cold, built = (statistics.median(wall for wall, _ in runs[key]) for key in ("bare", "cold", "build"))
    print(f"{f'naive: {EPOCHS} epochs, encoding in each':44}{EPOCHS * bare:10.2f}")
    print(f"{'naive / (cold once + cached epochs)':44}{EPOCHS * bare / cold:10.1f}")
    print(f"{'bare / floor':44}{bare / floor:10.2f}")
    # building is paid once a run: on 256 memes it weighs 50 times what it does on the data set's 12,140
    for side in ("bare", "folded"):
        for clock, name in enumerate(("throughput", "core time")):
            rows = zip(runs[side], runs["cold"], runs["build"], strict=True)
            ratios = [b[clock] / (c[clock] - m[clock]) for b, c, m in rows]
            target = "    to reach: .90" if side == "bare" else ""
            print(f"{f'{name}: {side} / (loader - building)':44}{_spread(ratios)}{target}")
    print(f"{'throughput: bare / loader, building included':44}{bare / cold:10.3f}    ({built:.1f} s of building)")


def _spread(ratios: list[float]) -> str:
    return f"{statistics.median(ratios):10.3f}{min(ratios):8.3f}{max(ratios):8.3f}"


def main() -> None:
    """Measure and print one table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--memes", type=int, default=256, help="distinct memes to encode in each repeat")
    parser.add_argument("--repeats", type=int, default=5, help="interleaved repeats of each side")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        jsonl = write_folder(folder / "data", options.memes)
        size = statistics.mean(path.stat().st_size for path in (jsonl.parent / "img").iterdir())
        config = EncoderConfig(image_encoder="random:resnet50", text_encoder=f"random:{jsonl.parent / 'bert'}")
        bare = BareEncoders(jsonl, config, options.device)

        def load(cache: str) -> None:
            load_hateful_memes(jsonl, None, config, folder / cache, device=options.device, progress=False)

        load("first")  # both sides warm up: imports, allocators, kernels
        bare()
        calls = {
            "bare": bare,
            "folded": partial(bare, folded=True),
            "cold": load,
            "warm": load,
            "build": lambda: build(config, options.device),
        }
        runs: dict[str, list[tuple[float, float]]] = {name: [] for name in calls}
        for repeat in tqdm(range(options.repeats), desc="repeats"):
            for name, call in calls.items():
                runs[name].append(core_seconds(partial(call, f"repeat{repeat}") if call is load else call))
        report(runs, options, size, bare.tokens_per_text)


if __name__ == "__main__":
    main()
