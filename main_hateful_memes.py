"""Train jWAE + LMF on Hateful Memes, beside its baselines, and report every score with its spread.

python main_hateful_memes.py                      the embedded demo: drawn memes, no download
python main_hateful_memes.py --jsonl hm/train.jsonl --img-dir hm/img      the real data set
"""

import sys
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch

from mmfusion.cli import pick_device, run_command
from mmfusion.data.memes import MemesConfig, load_memes
from mmfusion.distributed import end_process, join_processes, leave_processes
from mmfusion.encoders.frozen import EncoderConfig
from mmfusion.errors import InputError
from mmfusion.models.fusion import ModelConfig
from mmfusion.models.token_ensemble import TokenConfig, check_compiler_use
from mmfusion.runs.folder import RunConfig, RunFolder, defaults_for
from mmfusion.runs.run import carry_out
from mmfusion.training.recipe import ObjectiveConfig, TrainingConfig

# ---------------------------------------------------------------------------------------------------------------------
# Your data: the train.jsonl of the Hateful Memes release (dev and test are found beside it) and its folder of images.
# Left empty, the script trains on a demo that it draws itself. --jsonl and --img-dir override this.
REAL_PATH = {"jsonl": "", "img_dir": ""}
# ---------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Config:
    """Train jWAE + LMF on Hateful Memes. Without --jsonl, --download or an edited REAL_PATH: on an embedded demo."""

    data: MemesConfig = field(default_factory=MemesConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    run: RunConfig = field(default_factory=RunConfig)
    encoders: EncoderConfig = field(default_factory=EncoderConfig)
    tokens: TokenConfig = field(default_factory=TokenConfig)

    def check(self) -> None:
        """Raise InputError naming the first flag whose value makes no sense."""
        for section in (self.training, self.model, self.tokens, self.objective, self.encoders):
            section.check()
        check_compiler_use(self.tokens, self.training.compile)


def locate(data: MemesConfig) -> MemesConfig:
    """The data section with REAL_PATH filled in where no flag is given."""
    if data.download:
        if data.jsonl or data.img_dir:
            raise InputError("--download: brings its own files; leave --jsonl and --img-dir out")
        return data
    if data.jsonl:
        return data
    if not isinstance(REAL_PATH, dict) or not set(REAL_PATH) <= {"jsonl", "img_dir"}:
        raise InputError(f'REAL_PATH in {__file__}: is {REAL_PATH!r:.60}; it must be {{"jsonl": ..., "img_dir": ...}}')
    here = Path(__file__).resolve().parent  # a relative path means the same wherever the script is started
    named = {key: here / Path(path).expanduser() for key, path in REAL_PATH.items() if path}
    jsonl, img_dir = named.get("jsonl"), data.img_dir or named.get("img_dir")
    if img_dir and not jsonl:
        where = "--img-dir" if data.img_dir else "REAL_PATH['img_dir']"
        raise InputError(f"{where} {img_dir}: images without captions; give --jsonl (or REAL_PATH['jsonl']) too")
    return replace(data, jsonl=jsonl, img_dir=img_dir)


# ---- the run -----------------------------------------------------------------------------------------------------


def main(config: Config) -> None:
    """Everything from files to report. Raises InputError for what the user can put right."""
    config.check()
    config = replace(config, data=locate(config.data))
    device = pick_device(config.training.device)
    run = RunFolder.claim(config, config.data.run_name)  # before hours of extraction, not after

    # ---- features, from the cache where they are there; under torchrun all processes extract
    processes = join_processes(str(device))
    dataset = load_memes(config.data, config.encoders, processes, tokens=config.tokens.takes_tokens)

    # ---- training (each process a share of the members), scores, rank factors, report: what every run does
    carry_out(run, dataset.description, [dataset], config, torch.device(processes.device))
    leave_processes()


def begun(config: Config) -> Config | None:
    """With --resume or --config the settings of that run, so that no flag need be given again."""
    return defaults_for(Config, config.run, lambda: locate(config.data).run_name)


def run(arguments: list[str]) -> int:
    """The command line; returns the exit code."""
    return run_command(main, Config, arguments, begun)


if __name__ == "__main__":
    end_process(run(sys.argv[1:]))
