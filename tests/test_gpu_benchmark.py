"""The benchmark of a GPU, every part of it run in small on the CPU: there both sides are the CPU."""

import json
import time
from dataclasses import replace

import pytest
import torch
from small_memes import write_bert, write_memes
from test_main import flags

from benchmarks import gpu
from benchmarks.gpu import Line, Pair, Sizes, agreement, difference, has_failed, main, measure, render


@pytest.fixture(scope="module")
def pair(tmp_path_factory) -> Pair:
    """Small sizes of everything, a tiny BERT, and small memes to train the two runs on."""
    folder = tmp_path_factory.mktemp("gpu")
    bert = write_bert(folder / "bert")
    write_memes(folder, {"train": 20, "dev": 8})
    arguments = flags(folder, epochs=1)
    for flag in ("--device", "--name"):  # the benchmark's own
        place = arguments.index(flag)
        del arguments[place : place + 2]
    sizes = Sizes(
        widths=(12, 7), train=192, dev=20, members=(2,), repeats=2, photos=4, images=8, texts=8, image_size=32,
        bert=bert, steps=5, compile=False, run_flags=tuple(arguments),
    )  # fmt: skip
    return Pair("cpu", "cpu", sizes, folder)


@pytest.mark.parametrize("part", gpu.PARTS)
def test_every_part_runs_and_the_cpu_agrees_with_itself(pair, part):
    lines = measure(pair, {part: (gpu.PARTS[part][0], 300)})
    assert not has_failed(lines), render(lines)
    assert len(lines) > 2 and lines[-1].name == "seconds"


def test_parts_fit_into_eight_minutes():
    assert sum(seconds for _, seconds in gpu.PARTS.values()) <= 480


def test_layer_that_differs_by_a_thousandth_fails(pair, monkeypatch):
    original, calls = gpu.LowRankMultimodalFusion.forward, []

    def forward(layer, latents):
        calls.append(None)
        return original(layer, latents) * (1.001 if len(calls) == 1 else 1)

    monkeypatch.setattr(gpu.LowRankMultimodalFusion, "forward", forward)
    lines = measure(pair, {"LMF layer": gpu.PARTS["LMF layer"]})
    assert [line.verdict for line in lines[:2]] == ["FAILED", "FAILED"]


@pytest.mark.parametrize(("found", "verdict"), [(9e-5, "ok"), (2e-4, "FAILED"), (float("nan"), "FAILED")])
def test_agreement_is_judged_by_its_bound(found, verdict):
    assert agreement("part", "name", found).verdict == verdict


def test_difference_is_relative_to_the_largest_value():
    assert difference(torch.tensor([10.0, 0.1]), torch.tensor([10.0, 0.0])) == pytest.approx(0.01)


def test_part_that_fails_or_takes_too_long_is_marked_and_the_others_go_on(pair):
    def broken(_: Pair):
        yield Line("broken", "before", "1")
        raise RuntimeError("CUDA error: an illegal\nmemory access")

    def endless(_: Pair):
        yield Line("endless", "before", "1")
        time.sleep(60)

    def sound(_: Pair):
        yield Line("sound", "it", "1", "", "ok")

    lines = measure(pair, {"broken": (broken, 10), "endless": (endless, 0.2), "sound": (sound, 10)})
    table = render(lines)
    assert [line.part for line in lines if line.verdict == "FAILED"] == ["broken", "endless"]
    assert "RuntimeError: CUDA error: an illegal memory access" in table and "did not end within 0.2 s" in table
    assert [line.name for line in lines].count("before") == 2 and lines[-2].verdict == "ok"
    assert has_failed(lines) and not has_failed(lines[-2:])


def test_without_cuda_it_is_one_line_and_exit_code_2(capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert main([]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and error.startswith("error: no CUDA device here; run it where")


@pytest.mark.parametrize("found", [0.0, 1.0])
def test_command_prints_the_table_writes_json_and_exits_by_the_verdicts(tmp_path, capsys, monkeypatch, found):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "a GPU")
    monkeypatch.setattr(gpu, "measure", lambda pair: [agreement("part", "something", found)])
    assert main(["--json", str(tmp_path / "gpu.json")]) == int(found > 0)
    assert ("FAILED" in capsys.readouterr().out) == (found > 0)
    assert json.loads((tmp_path / "gpu.json").read_text())["lines"][0]["name"] == "something"
    assert main(["--json", str(tmp_path / "nowhere/gpu.json")]) == 2


def test_plain_loop_takes_the_steps_of_the_trainer(pair):
    # both sides of the ratio: as many steps over as many examples
    sizes = replace(pair.sizes, train=200)
    plain, steps = gpu.PlainLoop("cpu", sizes), []
    plain.optimizer.register_step_post_hook(lambda *_: steps.append(None))
    plain.epoch()
    assert len(steps) == 200 // 64
