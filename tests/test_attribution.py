"""Maps over words and regions: what they sum to, and that they depend on the weights."""

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.stats import spearmanr
from small_memes import picture, small_encoders, write_bert

from mmfusion.encoders.frozen import EncoderConfig, ImageEncoder, TextEncoder, find_image_encoder, find_text_encoder
from mmfusion.encoders.images import Preprocessing, preprocess
from mmfusion.explain.saliency import overlay, region_map, seen_box, word_map

SIZE = 128


def _image_encoder(config: EncoderConfig) -> ImageEncoder:
    return ImageEncoder(config, find_image_encoder(config), "cpu")


@pytest.fixture(scope="module")
def resnet() -> ImageEncoder:
    return _image_encoder(EncoderConfig(image_encoder="random:resnet50", image_size=SIZE))


@pytest.fixture(scope="module")
def bert(tmp_path_factory) -> TextEncoder:
    config = small_encoders(write_bert(tmp_path_factory.mktemp("bert")))
    return TextEncoder(config, find_text_encoder(config), "cpu")


def pixels(seed: int, size: int = SIZE) -> np.ndarray:
    squash = Preprocessing("squash", size, size, (0.5,) * 3, (0.5,) * 3)
    return preprocess(picture(seed), squash).copy()


def head(seed: int, width: int):
    """A small network over vectors (b, d) -> (b,)."""
    torch.manual_seed(seed)
    layers = torch.nn.Sequential(torch.nn.Linear(width, 16), torch.nn.GELU(), torch.nn.Linear(16, 1))
    return lambda x: layers(x).squeeze(-1)


# ---- regions


@pytest.mark.parametrize("about_reference", [False, True])
def test_cells_sum_to_gradient_times_feature(resnet, about_reference):
    reference = torch.rand(2048) if about_reference else None
    mapped = region_map(resnet, pixels(0), head(0, 2048), reference)
    assert mapped.cells.shape == (4, 4)
    counted = mapped.feature - (0 if reference is None else reference.numpy())
    assert mapped.cells.sum() == pytest.approx(float(mapped.gradient @ counted), rel=1e-4, abs=1e-6)
    np.testing.assert_allclose(mapped.feature, resnet(pixels(0)[None])[0], rtol=1e-4, atol=1e-6)


def test_encoder_is_differentiable_in_its_pixels(resnet):
    x = torch.from_numpy(pixels(0)).permute(2, 0, 1)[None].float().requires_grad_(True)
    features = resnet.features(x)
    torch.testing.assert_close(features.detach(), resnet(pixels(0)[None]), rtol=1e-4, atol=1e-5)
    (gradient,) = torch.autograd.grad(features.sum(), x)
    step = gradient / gradient.norm()
    with torch.no_grad():
        change = (resnet.features(x + step) - resnet.features(x - step)).sum().item() / 2
    assert change == pytest.approx(gradient.norm().item(), rel=0.05)


def test_cells_of_a_linear_score_are_what_each_cell_alone_adds(resnet):
    weight = torch.randn(2048, generator=torch.Generator().manual_seed(1))
    mapped = region_map(resnet, pixels(1), lambda x: x @ weight)
    seen = []
    with resnet.model.avgpool.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0])):
        resnet(pixels(1)[None])
    for i, j in ((0, 0), (2, 3)):
        alone = torch.zeros_like(seen[0])
        alone[..., i, j] = seen[0][..., i, j]
        assert mapped.cells[i, j] == pytest.approx((alone.mean((2, 3))[0] @ weight).item(), rel=1e-3, abs=1e-5)


def test_randomised_weights_change_the_map(resnet):
    # Adebayo et al. (2018): a map that stays the same describes the picture, not the model
    def maps(encoder, top) -> list[np.ndarray]:
        """One map per picture, each about the mean picture."""
        reference = torch.cat([encoder(pixels(seed)[None]) for seed in range(4)]).mean(0)
        return [region_map(encoder, pixels(seed), top, reference).cells.ravel() for seed in range(4)]

    original = maps(resnet, head(0, 2048))
    np.testing.assert_allclose(original, maps(resnet, head(0, 2048)), rtol=1e-5, atol=1e-9)
    randomised = {"head": [maps(resnet, head(seed, 2048)) for seed in range(1, 7)], "encoder": []}
    other = _image_encoder(EncoderConfig(image_encoder="random:resnet50", image_size=SIZE))
    torch.manual_seed(7)
    for _ in range(3):
        for module in other.model.modules():
            if isinstance(module, torch.nn.Conv2d):
                torch.nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        randomised["encoder"].append(maps(other, head(0, 2048)))
    for name, draws in randomised.items():
        correlations = [[spearmanr(a, b).statistic for a, b in zip(original, draw, strict=True)] for draw in draws]
        # one draw of 16 smooth cells may agree or disagree by chance: the average over draws may not
        assert abs(np.mean(correlations)) < 0.4, (name, correlations)


def test_encoder_whose_vector_is_no_average_has_no_map(tmp_path):
    from transformers import ViTConfig, ViTModel

    small = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    ViTModel(ViTConfig(image_size=32, patch_size=16, **small)).save_pretrained(tmp_path)
    encoder = _image_encoder(EncoderConfig(image_encoder=str(tmp_path)))
    assert region_map(encoder, pixels(0, 32), head(0, 32)) is None


def test_hugging_face_resnet_has_a_map_too(tmp_path):
    from transformers import ResNetConfig, ResNetModel

    config = ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic")
    ResNetModel(config).save_pretrained(tmp_path)
    encoder = _image_encoder(EncoderConfig(image_encoder=str(tmp_path), image_size=32))
    mapped = region_map(encoder, pixels(0, 32), head(0, 16))
    assert mapped.cells.sum() == pytest.approx(float(mapped.gradient @ mapped.feature), rel=1e-4, abs=1e-6)


@torch.no_grad()
def test_box_is_what_the_crop_keeps():
    picture = Image.new("RGB", (300, 200))
    assert seen_box(picture.size, Preprocessing("squash", 64, 73, (0,) * 3, (1,) * 3)) == (0, 0, 1, 1)
    how = Preprocessing("crop", 64, 80, (0,) * 3, (1,) * 3)
    left, top, right, bottom = seen_box(picture.size, how)
    picture.paste((255, 255, 255), tuple(round(x) for x in (left * 300, top * 200, right * 300, bottom * 200)))
    cut = preprocess(picture, how)
    assert cut[3:-3, 3:-3].min() > 250  # all white but for the filter's reach
    assert np.asarray(picture).mean() < 255 * (64 * 64) / (120 * 80) * 1.05


def test_overlay_tints_the_cell_that_feeds_the_score_and_nothing_outside_the_box():
    cells = np.array([[1.0, 0.0], [0.0, -1.0]])
    drawn = np.asarray(overlay(Image.new("RGB", (80, 80), "grey"), cells, (0.0, 0.0, 0.5, 1.0))).astype(int)
    orange, blue = drawn[10, 5], drawn[70, 35]
    assert orange[0] > orange[2] + 50 and blue[2] > blue[0] + 50
    assert np.ptp(drawn[:, 45:], axis=2).max() == 0


# ---- words


def test_words_are_those_of_the_text_in_order(bert):
    words = word_map(bert, "my dogs  hate YOU, ok?", head(0, 32))
    assert [word for word, _ in words] == ["my", "dogs", "hate", "YOU", ",", "ok", "?"]
    assert word_map(bert, "", head(0, 32)) == []


@torch.no_grad()
def test_value_of_a_word_is_what_the_score_loses_with_the_text_written_without_it(bert):
    text, score = "dogs love the dogs", head(1, 32)  # dog ##s love the dog ##s

    def value(written: str) -> float:
        return score(bert(bert.tokenize([written]))).item()

    without = ("love the dogs", "dogs the dogs", "dogs love dogs", "dogs love the")
    mapped = word_map(bert, text, score)
    assert [word for word, _ in mapped] == text.split()
    expected = [value(text) - value(written) for written in without]
    np.testing.assert_allclose([loss for _, loss in mapped], expected, rtol=1e-3, atol=1e-6)
    assert len(set(expected)) == 4  # the two "dogs" are told apart


def test_text_longer_than_the_encoder_takes_is_mapped_as_far_as_it_is_read(bert):
    assert len(word_map(bert, "dog " * 100, head(0, 32))) == 62  # 64 positions, two of them special


def test_byte_level_words_do_not_begin_with_a_space(tmp_path):
    from tokenizers import ByteLevelBPETokenizer
    from tokenizers.processors import RobertaProcessing, TemplateProcessing
    from transformers import PreTrainedTokenizerFast, RobertaConfig, RobertaModel

    trained = ByteLevelBPETokenizer()
    trained.train_from_iterator(["you love the big dog"] * 20, vocab_size=300, special_tokens=["<s>", "<pad>", "</s>"])
    trained._tokenizer.post_processor = RobertaProcessing(("</s>", 2), ("<s>", 0))
    fast = PreTrainedTokenizerFast(tokenizer_object=trained._tokenizer, pad_token="<pad>", model_max_length=30)
    fast.save_pretrained(tmp_path)
    small = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    RobertaModel(RobertaConfig(vocab_size=len(fast), max_position_embeddings=40, **small)).save_pretrained(tmp_path)
    config = EncoderConfig(text_encoder=str(tmp_path))
    encoder = TextEncoder(config, find_text_encoder(config), "cpu")
    assert [word for word, _ in word_map(encoder, "you love dogs", head(0, 32))][:2] == ["you", "love"]
    tokenizer = encoder.tokenizer  # one that adds nothing leaves nothing of a text of one word
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="$A", special_tokens=[])
    assert len(word_map(encoder, "love", head(0, 32))) == 1
