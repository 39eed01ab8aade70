"""The model card of an export: how the model is used, how it was trained, and how good it is."""

from pathlib import PurePath
from typing import Any

from huggingface_hub import ModelCardData

from .evaluation import find_results, format_results, read_results
from .models import find_run, read_params

# scripts/export.py prints it, and the card contains it.
SNIPPET = """\
import open_clip
from PIL import Image

captions = ["a photo of a dog", "a photo of a cat"]
model, preprocess = open_clip.create_model_from_pretrained("{source}")
tokens = open_clip.get_tokenizer("{source}")(captions)
image, text, *_ = model.eval()(preprocess(Image.open("{picture}"))[None], tokens)
print(sorted(zip((image @ text.T)[0].tolist(), captions), reverse=True))
"""
# Settings of the trainer that the card lists.
SETTINGS = (
    *("model", "pretrained", "epochs", "total_steps", "train_num_samples", "batch_size"),
    *("accum_freq", "world_size", "lr", "beta1", "beta2", "eps", "wd", "warmup", "lr_scheduler"),
    *("grad_clip_norm", "precision", "seed", "force_image_size", "image_mean", "image_std"),
    *("image_interpolation", "aug_cfg", "dataset_resampled", "dataset_without_replacement"),
    *("dataset_reinforcement", "dataset_reinforcement_config", "distill_loss_weights"),
    *("dataset_reinforcement_mix_synthetic", "dataset_reinforcement_mix_synthetic_ratio"),
    *("distill_teacher_dimension", "distill_logit_scale", "distill_average_after_softmax"),
)
DATA = ("train_data", "val_data", "imagenet_val")


def shorten_path(value: Any) -> str:
    """A setting's value; of paths only the last three parts: others are of the machine."""
    if isinstance(value, str) and "/" in value:
        return "/".join(PurePath(value).parts[-3:])
    return str(value)


def format_settings(params: dict[str, Any], names: tuple[str, ...]) -> list[str]:
    given = {name: params.get(name) for name in names}
    rows = [
        f"| `--{name.replace('_', '-')}` | `{shorten_path(value)}` |"
        for name, value in given.items()
        if value not in (None, "", False, {})
    ]
    return ["| option | value |", "|---|---|", *rows] if rows else ["Not known."]


def make_card(
    name: str,
    source: str,
    checkpoint: str,
    record: dict[str, Any],
    license_name: str | None,
    data_license: str | None,
) -> str:
    """The text of README.md.

    Args:
        name: of the model, or of its repository.
        source: where OpenCLIP loads it from, ``hf-hub:REPO`` or ``local-dir:DIR``.
        checkpoint: the file that was exported; its run's params.txt and results are read.
        record: of the export: settings and formats.
        license_name: of the weights, as the Hub names it; None: not stated.
        data_license: of the training data; None: not stated.
    """
    settings = record["settings"]
    params = read_params(find_run(checkpoint) / "params.txt")
    found = find_results(checkpoint)
    results = read_results(found, settings["sha256"], record.get("model_config", ""))
    data = ModelCardData(
        license=license_name,
        library_name="open_clip",
        pipeline_tag="zero-shot-image-classification",
        tags=["clip", "dataset-reinforcement"],
    )
    formats = [
        f"| {row['format']} | {', '.join(f'`{file}`' for file in row['files'])} "
        f"| {row['bytes'] / 1e6:.1f} MB |"
        for row in record["rows"]
    ]
    scores = [f"| {name} | {metric} | {score} |" for name, metric, score in format_results(results)]
    parts = [
        f"---\n{data.to_yaml()}\n---",
        f"# {name}",
        f"A CLIP model `{params.get('model') or settings['model']}` with "
        f"{record['parameters'] / 1e6:.1f} M parameters. It embeds images and captions, for "
        "zero-shot classification and retrieval.",
        "## Use",
        "```python\n" + SNIPPET.format(source=source, picture="picture.jpg") + "```",
        "The ONNX and Core ML encoders, where there are any, take images that are preprocessed as "
        "`open_clip_config.json` says, or tokenized captions, and return embeddings of unit "
        "length.",
        "\n".join(["| format | files | size |", "|---|---|---|", *formats]),
        "## Training",
        "Trained with the patched OpenCLIP of clip-dataset-reinforcement, "
        "`python -m training.main` with these options:",
        "\n".join(format_settings(params, SETTINGS)),
        "## Data",
        "\n".join(format_settings(params, DATA)),
        f"Licence of the training data: {data_license or 'not stated; see the data set'}.",
        "## Evaluation",
        "Zero-shot, in percent, with standard errors."
        if scores
        else "Not evaluated with `scripts/evaluate.sh`.",
    ]
    if scores:
        parts.append("\n".join(["| data set | metric | score |", "|---|---|---|", *scores]))
    parts += ["## Licence", f"Licence of the weights: {license_name or 'not stated'}."]
    return "\n\n".join(parts) + "\n"
