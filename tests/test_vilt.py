"""Early fusion from a ViLT's weights: the same function, the same start for every seed, and what is refused."""

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from small_memes import write_bert, write_memes
from test_main import flags, refused
from test_token_training import MODEL, TRAINING, dataset
from torch import Tensor
from transformers import ViltConfig, ViltForMaskedLM, ViltModel

import main_hateful_memes as script
from main_hateful_memes import Config, run
from mmfusion.cli import parse
from mmfusion.data.memes import load_memes
from mmfusion.encoders.frozen import EncoderConfig, find_image_encoder, find_text_encoder
from mmfusion.encoders.tokens import ImageTokenEncoder, TextTokenEncoder
from mmfusion.errors import InputError
from mmfusion.models.token_ensemble import TokenConfig, TokenEnsemble, load_ensemble
from mmfusion.models.vilt import own_embeddings, read_vilt
from mmfusion.models.wma import TokenTransformer
from mmfusion.sequences import Tokens
from mmfusion.training.fit import Method, fit_methods
from mmfusion.training.recipe import ObjectiveConfig

BOTH = ("image", "text")
SIZES = {
    "vocab_size": 24,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 96,
    "image_size": 64,
    "patch_size": 32,
    "max_position_embeddings": 16,
    "layer_norm_eps": 1e-2,  # large, so that another one shows
}


def vilt_of(kind: type = ViltModel, **changes: object) -> torch.nn.Module:
    """A ViLT all of whose parameters are random; its own start has biases of 0."""
    torch.manual_seed(0)
    model = kind(ViltConfig(**(SIZES | changes))).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.normal_(0, 0.3)
    return model


@pytest.fixture(scope="module")
def vilt(tmp_path_factory) -> Path:
    """A folder with a tiny ViLT and its tokenizer."""
    folder = write_bert(tmp_path_factory.mktemp("vilt"))  # for its vocabulary
    vilt_of().save_pretrained(folder)
    return folder


@pytest.fixture
def copy(vilt, tmp_path) -> Path:
    return shutil.copytree(vilt, tmp_path / "copy")


def embeddings_of(model: ViltModel) -> tuple[dict[str, Tokens], dict[str, Tensor]]:
    """What a ViLT's layers are given of two random pictures and texts, kinds apart, and what comes out of them."""
    torch.manual_seed(1)
    ids, mask = torch.randint(0, 22, (2, 5)), torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]])
    pixels = torch.randn(2, 3, 64, 64)
    torch.manual_seed(2)  # it permutes the patches at random
    patches, seen, _ = model.embeddings.visual_embed(pixels, torch.ones(2, 64, 64))
    torch.manual_seed(2)
    last = model(input_ids=ids, attention_mask=mask, pixel_values=pixels).last_hidden_state
    text = model.embeddings.text_embeddings(input_ids=ids)
    tokens = {"text": Tokens(text, mask.float()), "image": Tokens(patches, seen.float())}
    return tokens, {"text": last[:, :5], "image": last[:, 5:]}


# ---- the function ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "changes"),
    [
        (ViltModel, {}),
        (ViltForMaskedLM, {}),
        (ViltModel, {"qkv_bias": False}),
        (ViltModel, {"modality_type_vocab_size": 3}),
    ],
)
@torch.no_grad()
def test_layers_give_the_last_hidden_state_of_the_vilt_that_they_start_from(tmp_path, kind, changes):
    theirs = vilt_of(kind, **changes)
    theirs.save_pretrained(tmp_path)
    tokens, expected = embeddings_of(getattr(theirs, "vilt", theirs))
    start = read_vilt(tmp_path)
    assert start.shape == {"width": 32, "layers": 2, "heads": 4, "hidden_dim": 96, "epsilon": 1e-2}
    model = TokenTransformer({"image": 32, "text": 32}, **start.shape, embedded_inputs=BOTH)
    for name, x in tokens.items():
        model.standardise[name].fit(x.values.flatten(0, 1))
    start.fill(model)
    output = model(tokens)
    for name, x in output.layers[-1].items():
        there = x.mask.bool()
        torch.testing.assert_close(model.norm(x.values)[there], expected[name][there], rtol=1e-5, atol=1e-5)
    every = zip(torch.cat([expected[n] for n in BOTH], 1), torch.cat([tokens[n].mask for n in BOTH], 1), strict=True)
    means = torch.stack([last[mask.bool()].mean(0) for last, mask in every])
    torch.testing.assert_close(output.prediction, model.readout(means), rtol=1e-4, atol=1e-4)


def test_encoders_give_tokens_that_are_its_embeddings_in_their_places(vilt):
    model = ViltModel.from_pretrained(vilt).eval()
    config = EncoderConfig(image_encoder=str(vilt), text_encoder=str(vilt))
    encoder = ImageTokenEncoder(config, find_image_encoder(config), "cpu")
    pixels = np.random.default_rng(0).integers(0, 256, (2, 64, 64, 3), dtype=np.uint8)
    x = (torch.from_numpy(pixels).permute(0, 3, 1, 2).float() - encoder.mean) / encoder.std
    with torch.no_grad():
        expected, _, (places, _) = model.embeddings.visual_embed(x, torch.ones(2, 64, 64))
    for found, patches, place in zip(encoder(pixels), expected[:, 1:], places, strict=True):
        row_by_row = torch.empty_like(patches)
        row_by_row[place[:, 0] * 2 + place[:, 1]] = patches
        torch.testing.assert_close(found.float(), row_by_row, rtol=2e-3, atol=2e-3)
    encoder = TextTokenEncoder(config, find_text_encoder(config), "cpu")
    ids = encoder.tokenize(["a dog runs", "hill"])
    for found, row in zip(encoder(ids), ids, strict=True):
        with torch.no_grad():
            expected = model.embeddings.text_embeddings(input_ids=torch.tensor([row]))[0, 1:-1]  # [CLS], [SEP]
        torch.testing.assert_close(found.float(), expected, rtol=2e-3, atol=2e-3)


def test_feed_forward_is_twice_the_width_unless_given():
    assert TokenTransformer({"text": 3}, 16, 1, 4).layers[0].hidden.out_features == 32
    given = TokenTransformer({"text": 3}, 16, 1, 4, hidden_dim=24, epsilon=0.1).layers[0]
    assert (given.hidden.out_features, given.readout.in_features) == (24, 24)
    assert (given.before_attention.eps, given.before_hidden.eps) == (0.1, 0.1)


def test_embedded_inputs_must_have_the_width():
    with pytest.raises(ValueError, match="embedded input 'text' is 3 wide, not 16"):
        TokenTransformer({"text": 3}, 16, 1, 4, embedded_inputs=["text"])


# ---- training --------------------------------------------------------------------------------------------------------


def fitted(vilt: Path, provenance: dict, rate: float = 1e-9) -> TokenEnsemble:
    data = replace(dataset(dims={"image": 32, "text": 6}), provenance=provenance)
    training = replace(TRAINING, epochs=1, learning_rate=rate, weight_decay=0.0)
    tokens = TokenConfig("wma", transformer_weights=str(vilt))
    return fit_methods(data, [Method("t", BOTH, "wma")], MODEL, ObjectiveConfig(), training, tokens=tokens)[0][0]


def test_seeds_share_layers_and_kinds_and_nothing_else(vilt):
    (first, second), theirs = fitted(vilt, {}).members, load_file(vilt / "model.safetensors")
    kinds = theirs["embeddings.token_type_embeddings.weight"]
    for member in (first, second):
        for ours, name in (("layers.1.readout", "encoder.layer.1.output.dense"), ("norm", "layernorm")):
            for part in ("weight", "bias"):
                found = member.state_dict()[f"{ours}.{part}"]
                torch.testing.assert_close(found, theirs[f"{name}.{part}"], rtol=0, atol=1e-6)
        torch.testing.assert_close(torch.stack([member.kinds["text"], member.kinds["image"]]), kinds, rtol=0, atol=1e-6)
    shared = {n for n, p in first.named_parameters() if torch.allclose(p, second.get_parameter(n), atol=1e-6)}
    of_start = {n for n, _ in first.named_parameters() if n.startswith(("layers.", "norm.", "kinds.", "embedded."))}
    assert shared == of_start


def test_tokens_enter_as_they_are_where_a_vilt_embedded_them_alone(vilt):
    encoders = {"image": {"encoder": {"model": "vilt"}}, "text": {"encoder": {"model": "bert"}}}
    ensemble, x = fitted(vilt, {"encoders": encoders}), torch.randn(5, 32)
    assert ensemble.shape["embedded_inputs"] == ["image"]
    for member in ensemble.members:
        assert member.standardise["image"].std.sub(1).abs().max() > 0.1
        torch.testing.assert_close(member.project["image"](member.standardise["image"](x)), x, rtol=1e-5, atol=1e-5)
        assert member.places["image"].abs().max() < 1e-6 < member.places["text"].abs().max()
    assert fitted(vilt, {}).shape["embedded_inputs"] == []


def test_embeddings_of_another_width_are_projected():
    provenance = {"encoders": {name: {"encoder": {"model": "vilt"}} for name in ("image", "text")}}
    assert own_embeddings(provenance, {"image": 32, "text": 16}, 32) == ["image"]
    assert own_embeddings({"encoders": ["vilt"]}, {"image": 32}, 32) == []


def test_layers_are_trained_on(vilt):
    still, moved = (fitted(vilt, {}, rate).members[0].layers[0].project_in.weight for rate in (1e-9, 1e-2))
    assert (still - moved).abs().max() > 1e-3


# ---- a run -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def memes(vilt, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("memes")
    write_memes(folder, {"train": 16, "dev": 8})
    return folder


def test_run_of_early_fusion_loads_without_the_folder(vilt, memes, copy, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    encoders = {"image-encoder": vilt, "text-encoder": vilt, "image-size": None}
    arguments = flags(memes, fusion="wma", transformer_weights=copy, epochs=1, **encoders)
    assert run(arguments) == 0
    config = parse(Config, arguments)
    data = load_memes(config.data, config.encoders, script.join_processes("cpu"), tokens=True)
    assert data.splits["dev"].features["image"][0].shape == (4, 32)
    shutil.rmtree(copy)
    ensemble = load_ensemble(tmp_path / "runs/trial")
    shape = {"width": 32, "layers": 2, "heads": 4, "hidden_dim": 96, "epsilon": 1e-2, "embedded_inputs": list(BOTH)}
    assert {name: ensemble.shape[name] for name in shape} == shape
    lines = (tmp_path / "runs/trial/predictions_dev.csv").read_text().splitlines()
    place = lines[0].split(",").index("seed_1")
    written = np.array([float(line.split(",")[place]) for line in lines[1:]])
    np.testing.assert_allclose(ensemble.predict(data.splits["dev"].features)[1], written, atol=1e-6)
    for entry, value in {"epsilon": "x", "embedded_inputs": ["audio"], "hidden_dim": 0}.items():
        saved = json.loads((tmp_path / "runs/trial/config.json").read_text())
        (tmp_path / "bad").mkdir(exist_ok=True)
        (tmp_path / "bad/config.json").write_text(json.dumps(saved | {entry: value}))
        with pytest.raises(InputError, match=r"config\.json") as raised:
            load_ensemble(tmp_path / "bad")
        assert "\n" not in str(raised.value)


# ---- mistakes --------------------------------------------------------------------------------------------------------


def settings(**changes: object) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        path = folder / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    return change


def tensor(name: str, change: Callable[[Tensor], Tensor | None]) -> Callable[[Path], None]:
    def of_folder(folder: Path) -> None:
        state = load_file(folder / "model.safetensors")
        state[name] = change(state[name])
        save_file({n: x for n, x in state.items() if x is not None}, folder / "model.safetensors", {"format": "pt"})

    return of_folder


def pickled(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


QUERY = "encoder.layer.1.attention.attention.query.weight"


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (shutil.rmtree, "no such folder"),
        (lambda folder: (folder / "config.json").unlink(), "no such file"),
        (lambda folder: (folder / "config.json").write_text("{"), "is no JSON"),
        (lambda folder: (folder / "config.json").write_text("[]"), "model_type 'None', not vilt"),
        (settings(model_type="bert"), "model_type 'bert', not vilt"),
        (settings(hidden_act="relu"), "hidden_act is 'relu'"),
        (settings(num_attention_heads=5), "num_attention_heads 5 do not divide hidden_size 32"),
        (settings(num_hidden_layers=10**9), "num_hidden_layers is 1000000000, no whole number from 1 to 64"),
        (settings(num_hidden_layers=3), "lacks encoder.layer.2.attention.attention.query.weight"),
        (settings(intermediate_size=True), "intermediate_size is True"),
        (settings(layer_norm_eps=0), "layer_norm_eps is 0"),
        (settings(intermediate_size=64), r"is (96, 32), where config.json leads to (64, 32)"),
        (pickled, "holds no model.safetensors, and other files of weights are not read"),
        (lambda folder: (folder / "model.safetensors").write_bytes(b"x" * 99), "model.safetensors cannot be read"),
        (tensor(QUERY, lambda x: None), f"model.safetensors lacks {QUERY}"),
        (tensor(QUERY, lambda x: x[:, 1:].contiguous()), f"{QUERY} is (32, 31), where config.json leads to (32, 32)"),
    ],
)
def test_folder_that_holds_no_vilt_is_one_line_before_anything_is_encoded(copy, change, said):
    change(copy)
    with pytest.raises(InputError) as raised:
        TokenConfig("wma", transformer_weights=str(copy)).check()
    message = str(raised.value)
    assert said in message and message.startswith("--transformer-weights ") and "\n" not in message


def test_weights_that_are_no_numbers_are_refused(copy):
    tensor(QUERY, lambda x: x.fill_(float("nan")))(copy)
    with pytest.raises(InputError, match="holds values that are no finite numbers"):
        read_vilt(copy)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"fusion": "wma", "transformer_weights": "nowhere"}, "--transformer-weights nowhere: no such folder"),
        ({"fusion": "wma", "transformer_weights": "VILT", "transformer_layers": 3}, "--transformer-layers 3: --transf"),
        ({"fusion": "transport", "transformer_weights": "VILT"}, "is of --fusion wma, and this is transport"),
    ],
)
def test_bad_flags_are_one_line(vilt, memes, capsys, tmp_path, monkeypatch, changes, said):
    monkeypatch.chdir(tmp_path)
    changes = {name: vilt if value == "VILT" else value for name, value in changes.items()}
    assert said in refused(capsys, flags(memes, **changes))
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("kind", ["image", "text"])
def test_vilt_gives_no_vector_of_one_modality(vilt, memes, capsys, tmp_path, monkeypatch, kind):
    monkeypatch.chdir(tmp_path)
    write_bert(memes / "bert")
    message = refused(capsys, flags(memes, **{f"{kind}-encoder": vilt}, cache_dir=tmp_path / "cache"))
    assert f"--{kind}-encoder" in message and "it is for --fusion wma" in message
