"""Model card of a run: README.md beside the saved model, made of what the run itself knows."""

import json
from collections.abc import Mapping
from pathlib import Path

from mmfusion.dataset import Dataset
from mmfusion.files import write_text
from mmfusion.metrics.format import counted, mean_std
from mmfusion.metrics.scores import Score
from mmfusion.metrics.tasks import TABLE_SCORES
from mmfusion.models.fusion import FusionEnsemble
from mmfusion.models.token_ensemble import TokenEnsemble

CARD = "README.md"
TAGS = {
    "binary": "tabular-classification",
    "multiclass": "tabular-classification",
    "multilabel": "tabular-classification",
    "regression": "tabular-regression",
}
"""nearest name that the Hugging Face hub has for a task on vectors"""


def write_card(
    folder: Path,
    dataset: Dataset,
    ensemble: FusionEnsemble | TokenEnsemble,
    scores: Mapping[str, Mapping[str, Mapping[str, Score]]],
    folds: int,
) -> None:
    """Write README.md into a run's folder: what the model is, its data, its scores, how to load it, what to mind."""
    shape = ensemble.shape
    inputs = ", ".join(f"`{name}` {width}" for name, width in shape["input_dims"].items())
    main = next(iter(scores), None)
    parts = scores[main] if main is not None else {}
    shown = [name for name in TABLE_SCORES[dataset.task] if any(name in by for by in parts.values())]
    table = ["| part | n | " + " | ".join(shown) + " |", "| --- " * (2 + len(shown)) + "|"]
    for part, by in parts.items():
        mark = " (selected upon)" if part == dataset.selection else ""
        cells = (mean_std(by[name].members, interval=(by[name].low, by[name].high)) for name in shown)
        table.append(f"| {part}{mark} | {next(iter(by.values())).examples} | " + " | ".join(cells) + " |")
    seeds = counted(len(ensemble.members) // folds, "seed")
    of_folds = f" on each of {folds} folds" if folds > 1 else ""
    header = {"tags": ["low-rank-multimodal-fusion"], "pipeline_tag": TAGS[dataset.task]}
    example = ", ".join(f'"{name}": x_{place}' for place, name in enumerate(shape["input_dims"]))
    takes, kind, head = (
        "raw vectors",
        "FusionEnsemble",
        "a joint Wasserstein autoencoder with low-rank multimodal fusion",
    )
    size = f"rank {shape['rank']}, latents of width {shape['latent_dim']}" if "rank" in shape else ""
    module, title = "fusion", "jWAE-LMF"
    if isinstance(ensemble, TokenEnsemble):
        title = main
        takes, kind, module = "raw tokens, N lists of (T_i, d) each", "TokenEnsemble", "token_ensemble"
        if shape["fusion"] == "wma":
            head = "a fusion transformer whose modalities' tokens a Wasserstein distance aligns"
            size = f"{shape['layers']} layers of width {shape['width']}"
        else:
            head = f"low-rank multimodal fusion over pairs of tokens ({shape['plan']} plan)"
    notes = "\n".join(f"- {note}" for note in dataset.notes) or "- none"
    write_text(
        folder / CARD,
        f"""---
{_yaml(header)}---
# {title} on {dataset.name}

{seeds[:1].upper()}{seeds[1:]}{of_folds} of {head}.

- task: {dataset.task}
- {size}
- inputs: {takes}, {inputs} wide; standardisation is part of the model

```python
from mmfusion.models.{module} import {kind}
model = {kind}.from_pretrained("FOLDER")
model.predict({{{example}}})  # every member's {"values" if dataset.task == "regression" else "probabilities"}
```

Scores of the members: mean +- standard deviation over seeds [95 % bootstrap interval over examples].

{chr(10).join(table) if parts else "No part of the data could be scored."}

What the reader of a score must know:
{notes}

Settings, versions and data are in `config.json`, baselines below `baselines/`.
""",
    )


def _yaml(header: Mapping[str, object]) -> str:
    """A flat mapping of texts and lists of texts as YAML; JSON's quotes are YAML's too."""
    lines = ""
    for key, value in header.items():
        values = [f"\n- {json.dumps(one)}" for one in value] if isinstance(value, list) else [f" {json.dumps(value)}"]
        lines += f"{key}:{''.join(values)}\n"
    return lines
