"""Location and identity of an encoder's weights, found without importing any model library.

A specification is `resnet50`, a local file of ResNet-50 weights, a local folder in Hugging Face layout, the name of a
Hugging Face model, or `timm:` and the name of a timm model; `random:` before it keeps the architecture (and the
tokenizer) and draws weights from seed 0.
"""

import fnmatch
import hashlib
import http.client
import json
import os
import queue
import socket
import threading
import urllib.error
import urllib.request
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import torch

from mmfusion.encoders.timm_models import MODEL_TYPE, PREFIX, hub_repository, registered_settings, require_timm
from mmfusion.errors import InputError
from mmfusion.files import WEIGHT_BYTES, check_regular_file, read_regular_file

# published file names; the part after the dash begins the SHA-256 of the file
RESNET50_FILES = {"IMAGENET1K_V1": "resnet50-0676ba61.pth", "IMAGENET1K_V2": "resnet50-11ad3fa6.pth"}
RESNET50_URL = "https://download.pytorch.org/models/"
WEIGHT_SUFFIXES = {".pth", ".pt", ".safetensors"}
RANDOM_SEED = 0
CONFIG_BYTES = 10_000_000  # config.json has a few kB

WEIGHT_PATTERNS = ("*.safetensors", "pytorch_model*.bin")  # the first that matches is what transformers reads
SETTING_PATTERNS = ("config.json", "preprocessor_config.json", "tokenizer*", "special_tokens*", "added_tokens.json")
VOCABULARY_PATTERNS = ("vocab*", "merges.txt", "*.model")


@dataclass(frozen=True)
class EncoderSource:
    """An encoder that was found on disk (or, for torchvision's ResNet-50, at a known address)."""

    name: str
    """as the user wrote it"""
    flag: str
    """the flag that chooses it, for error messages"""
    path: Path | None
    """folder in Hugging Face layout, file of ResNet-50 weights, or None: torchvision's own ResNet-50, `timm_name`"""
    identity: dict[str, object]
    """what fixes its values: revision or hash; no path, so that a moved folder keeps its cache"""
    timm_name: str | None = None
    """a timm model whose weights are drawn at random: there is no folder"""

    @property
    def is_random(self) -> bool:
        """True for seeded random weights."""
        return self.name.startswith("random:")

    @property
    def is_torchvision(self) -> bool:
        """True for torchvision's ResNet-50, False for a Hugging Face or timm model."""
        return self.timm_name is None and (self.path is None or not self.path.is_dir())


def find_encoder(name: str, flag: str, image_weights: str | None = None) -> EncoderSource:
    """Find what `name` means, downloading a Hugging Face model only where it is not on disk.

    `image_weights` names the torchvision weights and allows `resnet50`. Raises InputError with the remedy.
    """
    bare = name.removeprefix("random:")
    is_random = bare != name
    if image_weights and bare.startswith(PREFIX):
        return _find_timm(name, bare.removeprefix(PREFIX), flag, is_random)
    path = Path(os.path.expanduser(bare))  # as it is where the home of ~NAME is not known
    if image_weights and bare == "resnet50":
        return EncoderSource(name, flag, None, _resnet50_identity(is_random, image_weights))
    if not os.path.isdir(path) and os.path.lexists(path):
        if image_weights is None or is_random or path.suffix not in WEIGHT_SUFFIXES:
            raise InputError(f"{flag} {name}: is a file; give a folder in Hugging Face layout or a model's name")
        identity = {"model": "torchvision resnet50", "weights_sha256": _sha256(path, flag)}
        return EncoderSource(name, flag, path, identity)
    if os.path.isdir(path):
        return EncoderSource(name, flag, path, _folder_identity(path, name, flag, is_random))
    if path.is_absolute() or bare[:1] in {".", "~"} or path.suffix in WEIGHT_SUFFIXES or bare.count("/") > 1:
        raise InputError(f"{flag} {name}: no such file or folder; give a path that exists, or a model's name")
    return _find_on_hub(name, bare, flag, is_random)


def resnet50_file(source: EncoderSource) -> Path | None:
    """The file with ResNet-50's weights, downloaded where needed; None for random weights. Raises InputError."""
    if source.path or source.is_random:
        return source.path
    folder = Path(torch.hub.get_dir()) / "checkpoints"
    path = folder / str(source.identity["file"])
    if os.path.lexists(path):
        check_regular_file(path, WEIGHT_BYTES, "remove it, it is fetched again", f"{source.flag} resnet50:")
        return path
    url = RESNET50_URL + path.name
    remedy = (
        f"{source.flag} resnet50: {path.name} is not in {folder} and {url} cannot be reached; copy the file there, "
        f"pass it as {source.flag} FILE.pth, or run the demo"
    )
    if not reachable(url):
        raise InputError(remedy)
    previous = socket.getdefaulttimeout()
    socket.setdefaulttimeout(30)  # urlopen would otherwise wait for ever on a connection that has died
    try:
        folder.mkdir(parents=True, exist_ok=True)
        torch.hub.download_url_to_file(url, str(path), hash_prefix=path.stem.split("-")[1])
    except (OSError, RuntimeError) as error:  # RuntimeError: the hash does not agree
        raise InputError(f"{remedy} ({' '.join(str(error).split())})") from error
    finally:
        socket.setdefaulttimeout(previous)
    return path


def reachable(url: str, seconds: float = 4.0) -> bool:
    """Does any server answer at `url`, through whatever proxy is set, within some seconds?"""
    answers: queue.Queue[bool] = queue.Queue()

    def ask() -> None:
        try:
            urllib.request.urlopen(urllib.request.Request(url, method="HEAD"), timeout=seconds).close()
        except urllib.error.HTTPError:
            answers.put(True)  # an answer, if not a kind one
        except (OSError, http.client.HTTPException):
            answers.put(False)
        else:
            answers.put(True)

    threading.Thread(target=ask, daemon=True).start()  # a thread, since no timeout of urllib covers the name look-up
    try:
        return answers.get(timeout=seconds + 1)
    except queue.Empty:
        return False


def _sha256(path: Path, flag: str) -> str:
    check_regular_file(path, WEIGHT_BYTES, "fetch it again", flag)
    try:
        with path.open("rb") as handle:
            return hashlib.file_digest(handle, "sha256").hexdigest()
    except OSError as error:
        raise InputError(f"{flag} {path}: cannot be read ({error.strerror or error}); fetch it again") from error


def _resnet50_identity(is_random: bool, image_weights: str) -> dict[str, object]:
    if is_random:
        return {"model": "torchvision resnet50", **_random_identity("torchvision")}
    if image_weights not in RESNET50_FILES:
        raise InputError(f"--image-weights {image_weights}: choose one of {', '.join(RESNET50_FILES)}")
    return {"model": "torchvision resnet50", "weights": image_weights, "file": RESNET50_FILES[image_weights]}


def _random_identity(library: str) -> dict[str, object]:
    """Random draws follow the seed, the generator (torch) and the order in which the library makes its layers."""
    versions = {"torch": torch.__version__, library: version(library)}
    return {"weights": "seeded random weights", "seed": RANDOM_SEED, "versions": versions}


def _folder_identity(folder: Path, name: str, flag: str, is_random: bool) -> dict[str, object]:
    """Hash of everything in the folder that changes a value: settings, vocabulary and, unless random, weights."""
    try:
        content = list(folder.iterdir())
    except OSError as error:
        raise InputError(f"{flag} {name}: cannot be read ({error.strerror or error}); check the path") from error
    for path in content:  # all of them: the model libraries look for a dozen names beyond those below
        if not path.is_dir():
            check_regular_file(path, WEIGHT_BYTES, "remove it, or fetch it again", flag)
    if not (folder / "config.json").is_file():
        raise InputError(f"{flag} {name}: holds no config.json; give a folder that save_pretrained() wrote")
    files = {path for pattern in SETTING_PATTERNS + VOCABULARY_PATTERNS for path in folder.glob(pattern)}
    weights = next(filter(None, (sorted(folder.glob(pattern)) for pattern in WEIGHT_PATTERNS)), [])
    if not weights and not is_random:
        raise InputError(f"{flag} {name}: holds no weights ({' or '.join(WEIGHT_PATTERNS)}); give a complete folder")
    if not is_random:
        files |= set(weights)
    lines = [f"{path.name} {_sha256(path, flag)}" for path in sorted(files) if path.is_file()]
    kind = model_type(folder, name, flag)
    identity: dict[str, object] = {"model": kind}
    identity["files_sha256"] = hashlib.sha256("\n".join(lines).encode()).hexdigest()
    if is_random and kind == MODEL_TYPE:
        require_timm(f"{flag} {name}")
    return identity | (_random_identity("timm" if kind == MODEL_TYPE else "transformers") if is_random else {})


def model_type(folder: Path, name: str, flag: str) -> str:
    """What transformers calls the kind of model in a folder. Raises InputError where its config.json is of no model."""
    try:
        content = read_regular_file(folder / "config.json", CONFIG_BYTES, "fetch it again", flag)
        config = json.loads(content)
        # as timm's own repositories are, which transformers knows by this key
        return MODEL_TYPE if "model_type" not in config and "pretrained_cfg" in config else str(config["model_type"])
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise InputError(f"{flag} {name}: its config.json is not that of a Hugging Face model") from error


def _find_timm(name: str, model: str, flag: str, is_random: bool) -> EncoderSource:
    """A timm model by its own name: on the hub, or drawn at random without it."""
    where = f"{flag} {name}"
    if not is_random:
        return _find_on_hub(name, hub_repository(model, where), flag, is_random)
    registered_settings(model, where)  # says so where there is no such model
    return EncoderSource(name, flag, None, {"model": f"timm {model}", **_random_identity("timm")}, model)


def _find_on_hub(name: str, repository: str, flag: str, is_random: bool) -> EncoderSource:
    """A model in the local Hugging Face cache, brought there first where it is missing."""
    from huggingface_hub import errors, snapshot_download

    try:
        folder = Path(snapshot_download(repository, local_files_only=True))
        identity = _folder_identity(folder, name, flag, is_random) if is_random else {"model": repository}
        if is_random or any(any(folder.glob(pattern)) for pattern in WEIGHT_PATTERNS):
            return EncoderSource(name, flag, folder, identity | {"revision": folder.name})
    except errors.HFValidationError as error:
        raise InputError(f"{flag} {name}: neither a file, a folder nor the name of a Hugging Face model") from error
    except (OSError, InputError):  # not in the local cache, or only in parts
        pass
    folder = _download_from_hub(repository, flag)
    identity = _folder_identity(folder, name, flag, is_random) if is_random else {"model": repository}
    return EncoderSource(name, flag, folder, identity | {"revision": folder.name})


def _download_from_hub(repository: str, flag: str) -> Path:
    from huggingface_hub import HfApi, constants, errors, snapshot_download

    remedy = (
        f"{flag} {repository}: neither in {constants.HF_HUB_CACHE} nor to be had from {constants.ENDPOINT}; pass a "
        f"local folder ({flag} FOLDER), copy the model into that cache, or run the demo"
    )
    if constants.HF_HUB_OFFLINE or not reachable(constants.ENDPOINT):
        raise InputError(remedy)
    try:
        names = [name for name in HfApi().list_repo_files(repository) if "/" not in name]
        # many models are there in five formats: take the one that transformers prefers
        weights = next(pattern for pattern in WEIGHT_PATTERNS if fnmatch.filter(names, pattern))
        patterns = (weights, f"{weights}.index.json", *SETTING_PATTERNS, *VOCABULARY_PATTERNS)
        wanted = [name for name in names if any(fnmatch.fnmatch(name, pattern) for pattern in patterns)]
        return Path(snapshot_download(repository, allow_patterns=wanted))
    except (OSError, errors.HTTPError, StopIteration) as error:
        raise InputError(f"{remedy} ({' '.join(str(error).split())[:120]})") from error
