"""The data sets that the commands know by name: where they are on the Hub, and their folders here.

A command takes the name with ``--dataset``. Facts that are not known are None. The module imports
nothing outside the standard library, so that scripts/download_images.sh can use it before
img2dataset is installed.
"""

import argparse
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

from . import ROOT

DOWNLOAD_DATACOMPDR = "bash scripts/download_datacompdr12m.sh"
DOWNLOAD_IMAGES = "bash scripts/download_images.sh"


class Folder(NamedTuple):
    """A folder of shards, and the setting (environment variable) that replaces it.

    Attributes:
        setting: name of the environment variable.
        default: path below ``datasets/`` at the repository's root.
        maker: the command that fills the folder, for messages; empty: there is none.
        needed: ``unless empty``: a setting that is empty stands for no folder. ``if there``: also
            where the default folder does not exist.
    """

    setting: str
    default: str
    maker: str
    needed: Literal["always", "unless empty", "if there"] = "always"

    def path(self) -> Path:
        """The folder, whether or not it exists."""
        return Path(os.environ.get(self.setting) or ROOT / "datasets" / self.default)

    def find(self) -> Path | None:
        """The folder; None: there is none, and none is needed.

        Raises:
            SystemExit: it does not exist.
        """
        path, setting = self.path(), os.environ.get(self.setting)
        if setting == "" and self.needed != "always":
            return None
        if path.is_dir():
            return path
        if not setting and self.needed == "if there":
            return None
        advice = f"make it, or unset {self.setting}"
        if self.maker:
            advice = f"run `{self.maker}`, or set {self.setting}"
        raise SystemExit(f"no folder {path} ({self.setting}): {advice}")


@dataclass(frozen=True)
class DataSet:
    """What is known of a data set.

    Attributes:
        repository: on the Hugging Face Hub.
        per_folder: shards in each folder of the repository; 0: all are at its root; None: the
            layout is not known, and a download takes what it finds.
        shards: their number.
        size: of all shards, in words.
        licence: of the shards; None: the data set's card on the Hub names it.
        captions, images, reinforcements, joined: the folders of its shards here; a data set of
            captions has no reinforcements and is not joined.
        config: file in ``configs/`` that records how it was reinforced.
        with_captions: the data set of its captions, which is downloaded as well.
        urls_in: the shards that have the image URLs; None: not known, so they are taken from
            whichever has them.
        caption_help: what to do if the shards have no captions.
    """

    repository: str
    per_folder: int | None
    shards: int | None
    size: str | None
    licence: str | None
    captions: Folder
    images: Folder
    reinforcements: Folder | None = None
    joined: Folder | None = None
    config: str = ""
    with_captions: str | None = None
    urls_in: Literal["captions", "reinforcements"] | None = None
    caption_help: str = ""

    @property
    def shard_folder(self) -> Folder:
        """Where its shards are downloaded to."""
        return self.reinforcements or self.captions

    def find_urls(self) -> tuple[Path, Path | None]:
        """The folder of the image URLs, and that of the reinforcements, if that is another one.

        Raises:
            SystemExit: there is no folder with URLs.
        """
        if self.reinforcements is None:
            found = self.captions.find()
        elif self.urls_in == "reinforcements":
            found = self.reinforcements.find()
        else:
            found = self.captions.find()
            reinforcements = self.reinforcements.path()
            if found is not None and reinforcements.is_dir():
                return found, reinforcements
            found = found or self.reinforcements.find()
        assert found is not None  # always needed
        return found, None

    def how_to_get(self) -> dict[str, str]:
        """What to do if the shards have no samples with an image, a caption, reinforcements."""
        found = {"image": f"`{self.images.maker}` downloads them"}
        found["caption"] = self.caption_help or f"`{self.captions.maker}` makes them"
        if self.reinforcements:
            found["reinforcement"] = f"`{self.reinforcements.maker}` downloads them"
        return found

    @property
    def config_path(self) -> Path:
        return ROOT / "configs" / self.config


def _datacompdr12m(repository: str, size: str) -> DataSet:
    return DataSet(
        repository=repository,
        per_folder=0,
        shards=1024,
        size=size,
        licence=None,
        captions=Folder("DATACOMP12M_PATH", "DataComp-12M", DOWNLOAD_DATACOMPDR),
        images=Folder("DATACOMP12M_IMAGES_PATH", "DataComp-12M-images", DOWNLOAD_IMAGES),
        reinforcements=Folder(
            "DATACOMPDR12M_NOIMG_PATH", "DataCompDR-12M-noimage", DOWNLOAD_DATACOMPDR
        ),
        joined=Folder(
            "DATACOMPDR12M_PATH", "DataCompDR-12M/shards", "bash scripts/join_datacompdr12m.sh"
        ),
        config="datacompdr12m.json",
        with_captions="datacomp12m",
        urls_in="captions",
    )


def _dfndr(
    name: str, title: str, repository: str, shards: int | None, joined: str, config: str
) -> DataSet:
    # The data sets could not be opened when this was written: what is None is not published.
    setting = title.replace("-", "")
    captions = f"{setting}_CAPTIONS_PATH"
    return DataSet(
        repository=repository,
        per_folder=None,
        shards=shards,
        size=None,
        licence="CC-BY-NC-ND",
        captions=Folder(captions, f"{title}-captions", "", "if there"),
        images=Folder(
            f"{setting}_IMAGES_PATH", f"{title}-images", f"{DOWNLOAD_IMAGES} --dataset {name}"
        ),
        reinforcements=Folder(
            f"{setting}_NOIMG_PATH",
            f"{title}-noimage",
            f"python scripts/download_shards.py --dataset {name}",
        ),
        joined=Folder(f"{setting}_PATH", joined, f"python scripts/join_shards.py --dataset {name}"),
        config=config,
        caption_help="neither the image shards nor the reinforcement shards have them (txt): set "
        f"{captions} to a folder of shards with <uid>.txt; scripts/inspect_shard.py shows what a "
        "shard has",
    )


DATASETS = {
    "datacomp12m": DataSet(
        repository="mlfoundations/DataComp-12M",
        per_folder=0,
        shards=1024,
        size=None,
        licence=None,
        captions=Folder("DATACOMP12M_PATH", "DataComp-12M", DOWNLOAD_DATACOMPDR),
        images=Folder("DATACOMP12M_IMAGES_PATH", "DataComp-12M-images", DOWNLOAD_IMAGES),
        urls_in="captions",
    ),
    "datacompdr12m": _datacompdr12m("apple/DataCompDR-12M", "2.8 TB"),
    "datacompdr12m-bf16": _datacompdr12m("apple/DataCompDR-12M-bf16", "at most 1.4 TB"),
    "datacompdr1b": DataSet(
        repository="apple/DataCompDR-1B",
        per_folder=1000,
        shards=65_536,
        size="about 125 TB",
        licence=None,
        captions=Folder(
            "DATACOMP1B_PATH", "DataComp-1B", "python scripts/caption_shards.py", "unless empty"
        ),
        images=Folder("DATACOMP1B_IMAGES_PATH", "DataComp-1B-images", f"{DOWNLOAD_IMAGES} --1b"),
        reinforcements=Folder(
            "DATACOMPDR1B_NOIMG_PATH", "DataCompDR-1B-noimage", f"{DOWNLOAD_DATACOMPDR} --1b"
        ),
        joined=Folder("DATACOMPDR1B_PATH", "DataCompDR-1B", "bash scripts/join_datacompdr1b.sh"),
        config="datacompdr1b.json",
        urls_in="reinforcements",
    ),
    "dfndr12m": _dfndr(
        "dfndr12m", "DFNDR-12M", "apple/DFNDR-12M", 1024, "DFNDR-12M/shards", "dfndr12m.json"
    ),
    "dfndr12m-bf16": _dfndr(
        "dfndr12m-bf16",
        "DFNDR-12M",
        "apple/DFNDR-12M-bf16",
        1024,
        "DFNDR-12M/shards",
        "dfndr12m.json",
    ),
    "dfndr2b": _dfndr("dfndr2b", "DFNDR-2B", "apple/DFNDR-2B", None, "DFNDR-2B", "dfndr2b.json"),
}
REINFORCED = [name for name, dataset in DATASETS.items() if dataset.reinforcements]


def add_dataset_option(
    parser: argparse.ArgumentParser | argparse._ArgumentGroup,
    text: str,
    reinforced: bool = True,
) -> None:
    """Add ``--dataset NAME``; ``args.dataset`` is the name, or None.

    Args:
        parser: to add it to.
        text: the help of the option.
        reinforced: whether only data sets with reinforcements are accepted.
    """
    names = REINFORCED if reinforced else list(DATASETS)
    parser.add_argument(
        "--dataset", choices=names, metavar="NAME", help=f"{text}; one of {', '.join(names)}"
    )


def describe_datasets(*folders: str, reinforced: bool = True) -> str:
    """A table of the data sets for ``--help``, and the settings of these folders of theirs.

    Args:
        folders: some of ``captions``, ``images``, ``reinforcements``, ``joined``.
        reinforced: whether only data sets with reinforcements are listed.
    """
    rows = [("name", "repository on the Hub", "shards", "size", "licence")]
    settings: dict[str, str] = {}
    for name in REINFORCED if reinforced else DATASETS:
        dataset = DATASETS[name]
        shards = f"{dataset.shards:,}" if dataset.shards else "unknown"
        licence = dataset.licence or "see its card"
        rows.append((name, dataset.repository, shards, dataset.size or "unknown", licence))
        for attribute in folders:
            folder: Folder | None = getattr(dataset, attribute)
            if folder:
                settings[folder.setting] = f"{attribute}; datasets/{folder.default}"
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["data sets (--dataset NAME)"]
    for row in rows:
        cells = (cell.ljust(width) for cell, width in zip(row, widths, strict=True))
        lines.append("  " + "  ".join(cells).rstrip())
    lines += ["", "their folders: settings (environment variables), and the defaults"]
    width = max(map(len, settings))
    lines += [f"  {setting:<{width}}  {text}" for setting, text in settings.items()]
    return "\n".join(lines)
