"""Print a diagnosis of your arrays and write it as one page, diagnosis-NAME.html.

python -m mmfusion.diagnose --data my_arrays.npz --target label
"""

import os
import sys
from dataclasses import dataclass, field, replace
from pathlib import Path

from mmfusion.cli import pick_device, run_command
from mmfusion.data.array_files import read_arrays
from mmfusion.data.arrays import SPLIT_KEY, ArraysConfig, dataset_from_arrays
from mmfusion.diagnose.inner import Budget
from mmfusion.diagnose.measure import diagnose
from mmfusion.diagnose.page import diagnosis_page, diagnosis_text
from mmfusion.errors import InputError, printable
from mmfusion.files import write_text

TEST_SHARE = 0.2


@dataclass(frozen=True)
class Config:
    """Is there an interaction, which rank, data enough, which modality: one page before the training."""

    data: ArraysConfig = field(default_factory=ArraysConfig)
    budget: Budget = field(default_factory=Budget)
    device: str = "auto"
    """cpu, cuda, cuda:1, ...; auto takes CUDA where there is one"""
    out: Path = Path(".")
    """folder that diagnosis-NAME.html is written to"""


def main(config: Config) -> None:
    """Everything from the file to the page. Raises InputError for what the user can put right."""
    config.budget.check()
    if config.data.data is None:
        raise InputError("--data: name the file of your arrays; docs/your_data.md has the keys")
    device = pick_device(config.device)
    path = Path(os.path.expanduser(config.data.data))
    arrays, _ = read_arrays(path)
    options = config.data
    has_splits = any(found and found[2] == "train" for found in map(SPLIT_KEY.fullmatch, arrays))
    if not has_splits and options.folds is None and options.hold_out is None:
        options = replace(options, hold_out=TEST_SHARE)  # stays out of the diagnosis, for the run that follows
    name = printable(path.absolute().name if path.is_dir() else path.stem)
    found = diagnose(dataset_from_arrays(arrays, options, name, str(path)), config.budget, device)
    print(diagnosis_text(found))
    page = config.out / f"diagnosis-{name}.html"
    write_text(page, diagnosis_page(found))
    print(f"\nThe same as a page: {page}")


def run(arguments: list[str]) -> int:
    """`python -m mmfusion.diagnose FLAGS`; returns the exit code."""
    return run_command(main, Config, arguments)


if __name__ == "__main__":
    sys.exit(run(sys.argv[1:]))
