"""Export a trained model: OpenCLIP's format of the Hub, ONNX and Core ML; publish it on the Hub.

    python scripts/export.py logs/NAME/checkpoints/epoch_20.pt --model ViT-B-16 --output DIR --onnx

The script writes to the output folder

    open_clip_config.json, open_clip_model.safetensors    the Hub's OpenCLIP layout; a tokenizer if
                                                          it is not OpenCLIP's own
    image_encoder.onnx, text_encoder.onnx                 with --onnx
    image_encoder.mlpackage, text_encoder.mlpackage       with --coreml
    README.md                                             the model card
    export.json                                           measurements, settings and versions

`open_clip.create_model_and_transforms("local-dir:DIR")` of open_clip_torch 3.0 and newer loads the
folder. The ONNX and Core ML encoders take a batch of images, preprocessed as open_clip_config.json
specifies, or of tokenized captions; Core ML takes a single one. They return embeddings of unit
length. FastViT models are reparameterized for inference there; the safetensors keep the
trainable blocks, so OpenCLIP can load them and continue training.

Each format is loaded again and compared with the checkpoint's model on images and captions: those
of --data, otherwise those of the run's validation or training data if they are on this machine,
otherwise tiles of docs/sample.png and built-in captions. If a difference is above the tolerance,
the script fails, and the folder is not written. Core ML runs on macOS only, so elsewhere it is not
compared. Without coremltools, --coreml is skipped with a message, and the other formats are
written.

--push REPO uploads the folder to the Hub, after a list of what is uploaded. It uses the token of
`hf auth login` or of HF_TOKEN.
"""

import argparse
import importlib.util
import json
import os
import secrets
import shutil
import statistics
import sys
import tarfile
import time
import warnings
from collections.abc import Callable, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, NamedTuple

import open_clip
import torch
from lib import ROOT
from lib.model_card import SNIPPET, make_card, shorten_path
from lib.models import LoadedModel, ModelError, find_run, load_model, load_weights, read_params
from lib.publish import hash_file, publish, publish_json
from lib.report import describe_error, printable, run_command
from lib.shards import expand_braces
from PIL import Image
from timm.utils import reparameterize_model
from torch import Tensor, nn
from torch.nn import functional as F

from dr.sample import BadSample, caption, check_members, decode_image
from dr.tar import PLAIN_MEMBERS, read_samples

CONFIG, WEIGHTS = "open_clip_config.json", "open_clip_model.safetensors"
CARD, RECORD = "README.md", "export.json"
LOCAL_DIR = "3.0"  # of open_clip_torch, which loads local-dir:
EXAMPLES = 16  # images and captions that the formats are compared on
MIN_HALVED = 256  # numbers of a weight that --fp16 stores in half precision
RUNS, SECONDS = 10, 3.0  # of a measurement, at most; the median is the latency
ONNX_PACKAGES = ("onnx", "onnxscript", "onnxruntime")
PACKAGES = ("torch", "open_clip_torch", "timm", *ONNX_PACKAGES, "coremltools")
# Where the run has no data on this machine, the formats are compared on tiles of this image.
EXAMPLE_IMAGE = ROOT / "docs" / "sample.png"
CAPTIONS = (
    *("a photo of a dog", "a photo of a cat", "two people at a table", "a red car on a road"),
    *("a woman office worker", "a page of text", "a diagram in blue", "a drawing of a face"),
    *("the sea at sunset", "a bowl of fruit", "a city at night", "a map", "a bird on a branch"),
    *("a child with a kite", "an old wooden door", "nothing at all"),
)


class Tolerance(NamedTuple):
    """How much a format may differ from the checkpoint's model.

    Attributes:
        difference: largest, of a number in an embedding of unit length.
        cosine: smallest, of an embedding and the checkpoint's.
    """

    difference: float
    cosine: float


EXACT = Tolerance(1e-4, 0.9999)
HALF = Tolerance(1e-2, 0.999)


class ExportError(Exception):
    """Why a model cannot be exported, in a line for people."""


class Examples(NamedTuple):
    """What the formats are compared on.

    Attributes:
        source: where they come from.
        images: ``[N, 3, H, W]``, preprocessed.
        tokens: ``[C, context length]``.
    """

    source: str
    images: Tensor
    tokens: Tensor


class Format(NamedTuple):
    """A format that was written.

    Attributes:
        name: for people.
        files: of the output folder.
        tolerance: how much it may differ.
        encode_image: ``[N, 3, H, W]`` to embeddings ``[N, D]``; None if it cannot run here.
        encode_text: ``[C, context length]`` to embeddings ``[C, D]``.
    """

    name: str
    files: tuple[str, ...]
    tolerance: Tolerance
    encode_image: Callable[[Tensor], Tensor] | None
    encode_text: Callable[[Tensor], Tensor] | None


# --- encoders -------------------------------------------------------------------------------------
class ImageEncoder(nn.Module):
    """A model's image encoder, to embeddings of unit length."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, image: Tensor) -> Tensor:
        return F.normalize(self.model.encode_image(image), dim=-1)


class TextEncoder(nn.Module):
    """A model's text encoder, to embeddings of unit length."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, text: Tensor) -> Tensor:
        return F.normalize(self.model.encode_text(text), dim=-1)


def encode_with(encoder: nn.Module) -> Callable[[Tensor], Tensor]:
    return torch.inference_mode()(encoder.eval())


# --- images and captions --------------------------------------------------------------------------
def read_pairs(shard: str) -> tuple[list[Image.Image], list[str]]:
    """The first images and captions of an image-caption shard."""
    images, captions = [], []
    try:
        with open(shard, "rb") as file:
            for _, members in read_samples(file, lambda extension: True):
                try:
                    check_members(members, PLAIN_MEMBERS)
                    img, text = decode_image(members), caption(members)
                except BadSample:
                    continue
                images.append(img)
                captions.append(text)
                if len(images) == EXAMPLES:
                    break
    except tarfile.TarError as error:
        raise ExportError(f"{shard} is not a whole tar: {error}") from None
    if not images:
        raise ExportError(f"{shard} has no sample with an image and a caption")
    return images, captions


def cut_tiles(path: Path) -> list[Image.Image]:
    """The tiles of an image, from its middle."""
    img = Image.open(path).convert("RGB")
    side = round(EXAMPLES**0.5)
    width, height = img.width // (2 * side), img.height // (2 * side)
    return [
        img.crop((left, top, left + width, top + height))
        for top in range(img.height // 4, img.height // 4 + side * height, height)
        for left in range(img.width // 4, img.width // 4 + side * width, width)
    ]


def find_data(checkpoint: str) -> str | None:
    """A shard of the run's validation or training data that is on this machine."""
    params = read_params(find_run(checkpoint) / "params.txt")
    for data in (params.get("val_data"), params.get("train_data")):
        shard = expand_braces(data.partition("::")[0])[0] if data else ""
        if shard.endswith(".tar") and os.path.isfile(shard):
            return shard
    return None


def read_examples(model: LoadedModel, checkpoint: str, data: str | None) -> Examples:
    shard = expand_braces(data)[0] if data else find_data(checkpoint)
    if shard:
        images, captions = read_pairs(shard)
    else:
        images, captions = cut_tiles(EXAMPLE_IMAGE), list(CAPTIONS)
    transform = model.make_transform()
    inputs = torch.stack([transform(img) for img in images])
    return Examples(shard or str(EXAMPLE_IMAGE), inputs, model.tokenizer(captions))


# --- formats --------------------------------------------------------------------------------------
def write_openclip(model: LoadedModel, folder: Path) -> Format:
    """Write the Hub's OpenCLIP layout, and load it again."""
    from safetensors.torch import save_file

    (folder / CONFIG).write_text(json.dumps(model.make_config(), indent=2) + "\n")
    state = {name: value.clone() for name, value in model.model.state_dict().items()}
    save_file(state, folder / WEIGHTS)  # clones, as tensors that share memory are refused
    (folder / WEIGHTS).chmod((folder / CONFIG).stat().st_mode)  # save_file makes it private
    if hasattr(model.tokenizer, "save_pretrained"):
        model.tokenizer.save_pretrained(folder)
    files = tuple(sorted(path.name for path in folder.iterdir()))
    loaded = load_openclip(model, folder)
    return Format(
        "OpenCLIP",
        files,
        EXACT,
        encode_with(ImageEncoder(loaded)),
        encode_with(TextEncoder(loaded)),
    )


def load_openclip(model: LoadedModel, folder: Path) -> Any:
    """The model in a folder; by `local-dir:` where the installed OpenCLIP has it."""
    if hasattr(open_clip.factory, "LOCAL_DIR_PREFIX"):
        return open_clip.create_model(f"local-dir:{folder}").eval()
    copy = open_clip.create_model(model.name, force_image_size=model.preprocessing["size"])
    load_weights(copy, str(folder / WEIGHTS), model.name)
    return copy.eval()


def make_encoders(model: LoadedModel) -> tuple[ImageEncoder, TextEncoder]:
    """The encoders, reparameterized for inference."""
    copy = reparameterize_model(model.model)
    return ImageEncoder(copy).eval(), TextEncoder(copy).eval()


def halve_weights(graph: Any) -> None:
    """Store the weights of an ONNX graph in float16; they are cast to float32 when it is loaded.

    A graph that computes in float16 is slower on CPUs, and onnxruntime 1.32 crashes on some.
    """
    from onnx import TensorProto, helper, numpy_helper

    casts = []
    for weight in graph.initializer:
        values = numpy_helper.to_array(weight)
        if weight.data_type != TensorProto.FLOAT or values.size < MIN_HALVED:
            continue
        name = weight.name
        weight.CopyFrom(numpy_helper.from_array(values.astype("float16"), f"{name}_float16"))
        casts.append(helper.make_node("Cast", [weight.name], [name], to=TensorProto.FLOAT))
    nodes = [*casts, *graph.node]
    del graph.node[:]
    graph.node.extend(nodes)


def write_onnx(model: LoadedModel, examples: Examples, folder: Path, half: bool) -> Format:
    """Write both encoders with onnxscript, and load them with onnxruntime."""
    import onnx
    import onnxruntime

    inputs = {"image": examples.images[:2], "text": examples.tokens[:2]}
    preprocessing = {name: str(value) for name, value in model.preprocessing.items()}
    run = {}
    for encoder, (kind, example) in zip(make_encoders(model), inputs.items(), strict=True):
        with warnings.catch_warnings():  # of torch, about its own code
            warnings.simplefilter("ignore")
            program = torch.onnx.export(
                encoder,
                (example,),
                input_names=[kind],
                output_names=[f"{kind}_embedding"],
                dynamic_shapes=({0: torch.export.Dim("batch")},),
                dynamo=True,
                verbose=False,
            )
        if kind == "image":
            program.model.metadata_props.update(preprocessing)
        proto = program.model_proto
        if half:
            halve_weights(proto.graph)
        path = folder / f"{kind}_encoder.onnx"
        onnx.save(proto, str(path))
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3  # errors
        options.intra_op_num_threads = torch.get_num_threads()  # as the other formats
        session = onnxruntime.InferenceSession(
            str(path), options, providers=["CPUExecutionProvider"]
        )
        run[kind] = make_runner(session, kind)
    files = ("image_encoder.onnx", "text_encoder.onnx")
    name = "ONNX, float16" if half else "ONNX"
    return Format(name, files, HALF if half else EXACT, run["image"], run["text"])


def make_runner(session: Any, name: str) -> Callable[[Tensor], Tensor]:
    return lambda batch: torch.from_numpy(session.run(None, {name: batch.numpy()})[0])


def write_coreml(model: LoadedModel, examples: Examples, folder: Path, half: bool) -> Format:
    """Write both encoders with coremltools; they take one image, and one caption."""
    import coremltools
    import numpy as np

    precision = coremltools.precision.FLOAT16 if half else coremltools.precision.FLOAT32
    inputs = {"image": examples.images[:1], "text": examples.tokens[:1].int()}
    run = {}
    for encoder, (kind, example) in zip(make_encoders(model), inputs.items(), strict=True):
        torch.backends.mha.set_fastpath_enabled(False)  # coremltools does not know its operation
        try:
            with torch.no_grad():
                traced = torch.jit.trace(encoder, example)
        finally:
            torch.backends.mha.set_fastpath_enabled(True)
        dtype = np.float32 if kind == "image" else np.int32
        try:
            converted = coremltools.convert(
                traced,
                inputs=[coremltools.TensorType(name=kind, shape=example.shape, dtype=dtype)],
                outputs=[coremltools.TensorType(name=f"{kind}_embedding")],
                compute_precision=precision,
                minimum_deployment_target=coremltools.target.iOS16,
            )
        except Exception as error:  # of any kind
            raise ExportError(
                f"coremltools {coremltools.__version__} can't convert the {kind} encoder: "
                f"{printable(describe_error(error), 300)}. It works with the versions of torch and "
                "NumPy of its time (9.0: NumPy before 2.4); or export without --coreml"
            ) from None
        converted.save(str(folder / f"{kind}_encoder.mlpackage"))
        run[kind] = make_predictor(converted, kind)
    can_run = sys.platform == "darwin"
    files = ("image_encoder.mlpackage", "text_encoder.mlpackage")
    name = "Core ML, float16" if half else "Core ML"
    tolerance = HALF if half else EXACT
    image, text = (run["image"], run["text"]) if can_run else (None, None)
    return Format(name, files, tolerance, image, text)


def make_predictor(model: Any, name: str) -> Callable[[Tensor], Tensor]:
    def predict(batch: Tensor) -> Tensor:
        dtype = torch.float32 if name == "image" else torch.int32
        rows = [
            model.predict({name: row[None].to(dtype).numpy()})[f"{name}_embedding"] for row in batch
        ]
        return torch.cat([torch.from_numpy(row) for row in rows])

    return predict


# --- comparison -----------------------------------------------------------------------------------
def compare(written: Format, model: LoadedModel, examples: Examples) -> dict[str, Any]:
    """Compare a format with the checkpoint's model, and measure its latency.

    Raises:
        ExportError: they differ by more than the tolerance.
    """
    row: dict[str, Any] = {"format": written.name, "files": list(written.files)}
    if written.encode_image is None or written.encode_text is None:
        return row
    with torch.inference_mode():
        images, texts = (
            ImageEncoder(model.model)(examples.images),
            TextEncoder(model.model)(examples.tokens),
        )
    found = written.encode_image(examples.images), written.encode_text(examples.tokens)
    pairs = ((images, found[0]), (texts, found[1]))
    difference = max(float((a - b).abs().max()) for a, b in pairs)
    cosine = min(float((a * b).sum(dim=1).min()) for a, b in pairs)
    best, best_found = (images @ texts.T).argmax(dim=1), (found[0] @ found[1].T).argmax(dim=1)
    agree = int((best == best_found).sum())
    tolerance = written.tolerance
    # not (a <= b), as NaN is never within a tolerance
    if not (difference <= tolerance.difference and cosine >= tolerance.cosine):
        raise ExportError(
            f"{written.name} differs from the checkpoint by {difference:.2g} (expected at most "
            f"{tolerance.difference:g}), smallest cosine {cosine:.6f} (expected at least "
            f"{tolerance.cosine:g}): nothing was written. Export without --fp16, or with other "
            "versions of torch and onnxruntime"
        )
    return row | {
        "largest_difference": difference,
        "smallest_cosine": cosine,
        "top1_agreement": agree,
        "examples": len(images),
        "image_ms": measure(written.encode_image, examples.images[:1]),
        "text_ms": measure(written.encode_text, examples.tokens[:1]),
    }


def measure(encode: Callable[[Tensor], Tensor], batch: Tensor) -> float:
    """Median time of an encoder in milliseconds."""
    taken: list[float] = []
    encode(batch)  # warms up
    while len(taken) < RUNS and sum(taken) < SECONDS:
        start = time.perf_counter()
        encode(batch)
        taken.append(time.perf_counter() - start)
    return 1000 * statistics.median(taken)


def size_of(path: Path) -> int:
    """Bytes of a file, or of all files in a folder."""
    if path.is_dir():
        return sum(part.stat().st_size for part in path.rglob("*") if part.is_file())
    return path.stat().st_size


def format_rows(rows: Sequence[dict[str, Any]]) -> str:
    """The table of the formats."""
    lines = [
        f"{'format':<18}{'size':>10}{'one image':>12}{'one caption':>13}"
        f"{'difference':>12}{'cosine':>10}{'top-1':>8}"
    ]
    for row in rows:
        line = f"{row['format']:<18}{row['bytes'] / 1e6:>7.1f} MB"
        if "image_ms" in row:
            line += (
                f"{row['image_ms']:>9.1f} ms{row['text_ms']:>10.1f} ms"
                f"{row['largest_difference']:>12.1e}{row['smallest_cosine']:>10.6f}"
                f"{row['top1_agreement']:>5}/{row['examples']}"
            )
        else:
            line += "   not compared: it runs on macOS only"
        lines.append(line)
    return "\n".join(lines)


# --- the folder -----------------------------------------------------------------------------------
def find_missing(packages: Sequence[str]) -> list[str]:
    return [name for name in packages if importlib.util.find_spec(name) is None]


def find_versions() -> dict[str, str]:
    found = {}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def describe_settings(args: argparse.Namespace) -> dict[str, Any]:
    """What an export is made of; one with the same settings need not be made again."""
    formats = [name for name in ("onnx", "coreml") if getattr(args, name)]
    is_file = args.model.endswith(".json")
    return {
        "sha256": hash_file(args.checkpoint),
        "model": Path(args.model).stem if is_file else args.model,
        "config_sha256": hash_file(args.model) if is_file else None,
        "formats": formats,
        "fp16": args.fp16,
    }


def write_formats(args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Write and compare all formats; returns the record."""
    model = load_model(args.model, args.checkpoint, torch.device("cpu"))
    examples = read_examples(model, args.checkpoint, args.data)
    writers = [lambda: write_openclip(model, folder)]
    if args.onnx:
        writers.append(lambda: write_onnx(model, examples, folder, args.fp16))
    if args.coreml:
        writers.append(lambda: write_coreml(model, examples, folder, args.fp16))
    rows = []
    for write in writers:
        row = compare(write(), model, examples)
        rows.append(row | {"bytes": sum(size_of(folder / name) for name in row["files"])})
    return {
        "settings": describe_settings(args),
        "parameters": sum(parameter.numel() for parameter in model.model.parameters()),
        "model_config": model.hash_config(),
        "rows": rows,
        "compared_on": shorten_path(examples.source),
        "threads": torch.get_num_threads(),
        "versions": find_versions(),
    }


def export(args: argparse.Namespace) -> dict[str, Any]:
    """Write the output folder, whole or not at all; returns its record."""
    output: Path = args.output
    recorded = output / RECORD
    if recorded.is_file():
        record = json.loads(recorded.read_text())
        if record["settings"] == describe_settings(args):
            print(f"{output} has this export already")
            return record
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise ExportError(
            f"--output {output} exists and is not this export: remove it, or choose another folder"
        )
    output.parent.mkdir(parents=True, exist_ok=True)
    partial = output.with_name(f".{output.name}.{secrets.token_hex(4)}.partial")
    partial.mkdir()
    try:
        record = write_formats(args, partial)
        publish_json(partial / RECORD, record)
        partial.rename(output)  # replaces an empty folder
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return record


# --- the Hub --------------------------------------------------------------------------------------
def push(folder: Path, repo: str, private: bool) -> None:
    """Upload the folder's files to a model repository of the Hub."""
    from huggingface_hub import HfApi

    api = HfApi()
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    kind = "private" if private else "public"
    print(f"\nuploads to {api.endpoint}/{repo} ({kind} if it is new):")
    for path in files:
        print(f"  {path.relative_to(folder).as_posix():<40}{path.stat().st_size / 1e6:>10.2f} MB")
    try:
        api.create_repo(repo, private=private, exist_ok=True)
        api.upload_folder(repo_id=repo, folder_path=folder, commit_message="Add the model")
    except Exception as error:  # the Hub's, the network's, or a missing token
        line = printable(describe_error(error), 400)
        raise ExportError(
            f"--push {repo}: {line}. {folder} is complete: log in with `hf auth login`, check the "
            "network, and run the command again"
        ) from None
    print(f"uploaded: {api.endpoint}/{repo}")


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    text = "weights: a checkpoint of the trainer, a state dict, or safetensors"
    add("checkpoint", metavar="CHECKPOINT", help=text)
    add("--model", required=True, help="OpenCLIP model name, or a model config FILE.json")
    add("--output", required=True, type=Path, help="folder to write")
    add("--onnx", action="store_true", help="write the encoders as ONNX")
    text = "write the encoders for Core ML; skipped if coremltools is not installed"
    add("--coreml", action="store_true", help=text)
    text = "store the weights of ONNX and Core ML in half precision"
    add("--fp16", action="store_true", help=text)
    text = "image-caption shard on which the formats are compared; default: data of the run"
    add("--data", metavar="SHARD", help=text)
    add("--push", metavar="REPO", help="upload the folder to this model repository of the Hub")
    add("--private", action="store_true", help="make a new repository private")
    text = "licence of the weights, as the Hub names it: mit, cc-by-nc-4.0, …; --push needs it"
    add("--license", help=text)
    add("--data-license", help="licence of the training data, for the model card")
    args = parser.parse_args(arguments)
    if args.fp16 and not (args.onnx or args.coreml):
        parser.error("--fp16 is for --onnx and --coreml: add one of them")
    if args.push and not args.license:
        parser.error("--push needs --license, the licence of the weights: mit, cc-by-nc-4.0, …")
    if not os.path.isfile(args.checkpoint):
        parser.error(f"there is no checkpoint file {args.checkpoint}")
    return args


def main(arguments: Sequence[str] | None = None) -> None:
    args = parse_arguments(arguments)
    if args.onnx and (missing := find_missing(ONNX_PACKAGES)):
        raise ExportError(f"--onnx needs {', '.join(missing)}: pip install -e '.[export]'")
    if args.coreml and find_missing(["coremltools"]):
        print(
            "Core ML was skipped: coremltools is not installed. Run `pip install coremltools "
            f"'numpy<2.4'`, remove {args.output}, and run the command again"
        )
        args.coreml = False
    record = export(args)
    name = args.push or args.output.resolve().name
    source = f"hf-hub:{args.push}" if args.push else f"local-dir:{args.output.name}"
    card = make_card(name, source, args.checkpoint, record, args.license, args.data_license)
    publish(args.output / CARD, lambda file: file.write(card.encode()))
    print(f"{record['parameters'] / 1e6:.1f} M parameters; compared on {record['compared_on']};")
    print(f"time of one input on this CPU, {record['threads']} threads\n")
    print(format_rows(record["rows"]))
    if args.push:
        push(args.output, args.push, args.private)
    snippet = SNIPPET.format(source=f"local-dir:{args.output}", picture="picture.jpg")
    print(f"\nTo rank captions for an image, in Python:\n\n{snippet}")


if __name__ == "__main__":
    run_command(main, ExportError, ModelError)
