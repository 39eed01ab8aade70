"""Read the samples of image-caption shards, one after the other, in the workers of a loader."""

import os
import sys
import tarfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any

from torch.utils.data import IterableDataset, get_worker_info
from tqdm import tqdm

from dr.sample import BadSample, check_members
from dr.tar import IMAGE_MEMBERS, Members, read_samples

from .report import printable
from .shards import (
    FORBIDDEN_NAME,
    MAX_NAME,
    ShardError,
    expand_braces,
    is_forbidden,
    parse_json_object,
    parse_uid,
    strip_name,
)
from .tasks import RANK, wait_for_other_ranks

READ_MEMBERS = (*IMAGE_MEMBERS, "txt", "json", "url.txt")

Sample = dict[str, Any]  # what ``prepare`` returns, and its ``uid`` and ``bytes``


class ShardSamples(IterableDataset):
    """The samples of a shard, prepared, in order, for any number of workers.

    Args:
        shard: path of the tar.
        required: members that a sample must have, as ``dr.tar.PLAIN_MEMBERS``.
        prepare: from uid, members and the content of ``json`` to what is yielded of a sample; it
            may raise BadSample.
    """

    def __init__(
        self,
        shard: str,
        required: dict[str, tuple[str, ...]],
        prepare: Callable[[str, Members[bytes], dict[str, Any]], Sample],
    ) -> None:
        self.shard, self.required, self.prepare = shard, required, prepare

    def __iter__(self) -> Iterator[Sample]:
        """Yield samples; or ``skipped``, why one cannot be used; or ``damage``, of the tar."""
        worker = get_worker_info()
        first, step = (worker.id, worker.num_workers) if worker else (0, 1)
        try:
            with open(self.shard, "rb") as file:
                samples = read_samples(file, READ_MEMBERS.__contains__, whole=True)
                for index, (key, members) in enumerate(samples):
                    if index % step == first:
                        size = sum(map(len, members.values()))
                        yield {**self._prepare(key, members), "bytes": size}
        except (tarfile.TarError, OSError) as error:  # a worker would add its traceback
            yield {"damage": str(error), "bytes": 0}

    def _prepare(self, key: str, members: Members[bytes]) -> Sample:
        uid = key
        try:
            check_members(members, self.required)
            uid, about = self._identify(key, members)
            return {"uid": uid, **self.prepare(uid, members, about)}
        except BadSample as error:
            return {"uid": uid, "skipped": error.reason, "detail": str(error)}

    @staticmethod
    def _identify(key: str, members: Members[bytes]) -> tuple[str, dict[str, Any]]:
        """A sample's uid, and the content of its ``json``."""
        try:
            about = parse_json_object(members.get("json", b"{}"))
        except (ValueError, RecursionError) as error:
            raise BadSample("unreadable json", error) from error
        try:
            if is_forbidden(strip_name(key)):
                raise ValueError(FORBIDDEN_NAME)
            uid = parse_uid(about.get("uid", strip_name(key)))
        except ValueError as error:
            raise BadSample(str(error)) from error
        if len(os.fsencode(f"{uid}.paug.json")) > MAX_NAME:
            raise BadSample(f"a name of over {MAX_NAME} bytes")
        return uid, about


def skip_bad_samples(
    samples: Iterable[Sample], shard: str, skipped: Counter[str], uids: set[str], bar: tqdm
) -> Iterator[Sample]:
    """Yield the usable samples of a shard.

    Args:
        samples: as :class:`ShardSamples` yields them.
        shard: its path, for messages.
        skipped: receives how many were skipped, by reason.
        uids: receives the uids of all samples.
        bar: advances by the bytes read.

    Raises:
        ShardError: the shard is damaged.
    """
    seen = set[str]()
    for sample in samples:
        bar.update(sample["bytes"])
        if "damage" in sample:
            raise ShardError(f"not a whole tar: {sample['damage']}")
        uids.add(sample["uid"])
        if "skipped" not in sample and sample["uid"] in seen:
            reason = "a uid twice in one shard"
            sample = {"uid": sample["uid"], "skipped": reason, "detail": reason}
        if "skipped" in sample:
            skipped[sample["skipped"]] += 1
            uid, detail = printable(sample["uid"]), printable(sample["detail"], 1000)
            print(f"warning: skipped sample {uid} of {shard}: {detail}", file=sys.stderr)
        else:
            seen.add(sample["uid"])
            yield sample


def no_sample_left(skipped: Counter[str]) -> ShardError:
    """The error of a shard whose samples were all skipped."""
    reasons = ", ".join(f"{number} {reason}" for reason, number in skipped.items())
    return ShardError(f"no sample would be left: {reasons or 'the shard is empty'}")


def find_shards(pattern: str, output: Path) -> list[str]:
    """The input shards; exits with a line if some are missing, have the same name, or are the
    output's."""
    shards = expand_braces(pattern)
    absent = [shard for shard in shards if not os.path.isfile(shard)]
    if absent:
        raise SystemExit(
            f"error: {len(absent)} of {len(shards)} shards of --input are missing, the first is "
            f"{absent[0]}"
        )
    if len({os.path.basename(shard) for shard in shards}) < len(shards):
        raise SystemExit(
            "error: --input names several shards of one file name: process each folder into an "
            "--output of its own"
        )
    for shard in shards:
        if os.path.realpath(shard) == os.path.realpath(output / os.path.basename(shard)):
            raise SystemExit(
                f"error: --output {output} is the folder of --input {shard}: choose another folder"
            )
    return shards


def process_shards(
    shards: Sequence[str],
    process: Callable[[str, Counter[str], tqdm], int],
    command: str,
    verb: str,
) -> None:
    """Process shards one after the other, print a summary, and wait for the other ranks.

    Args:
        shards: paths of this rank's shards.
        process: from a shard, the counts of skipped samples by reason, and the bar, to how many
            samples were written; ShardError fails the shard alone.
        command: its name, for the bar.
        verb: past participle of what was done to shards.

    Raises:
        SystemExit: some shards failed.
    """
    skipped, written, failed = Counter[str](), 0, dict[str, str]()
    ends = list(accumulate(os.path.getsize(shard) for shard in shards))
    with tqdm(
        total=ends[-1] if ends else 0,
        desc=f"{command} (rank {RANK})",
        unit="B",
        unit_scale=True,
        disable=None if RANK == 0 else True,
    ) as bar:
        for number, (shard, end) in enumerate(zip(shards, ends, strict=True)):
            bar.set_postfix_str(f"{number} of {len(shards)} shards")
            try:
                written += process(shard, skipped, bar)
            except ShardError as error:
                failed[shard] = printable(error, 1000)
                bar.write(f"{shard}: failed: {failed[shard]}", file=sys.stderr)
            bar.update(end - bar.n)  # headers and padding, too
    reasons = ", ".join(f"{number} {reason}" for reason, number in skipped.items())
    summary = f"rank {RANK}: {len(shards) - len(failed)} shards {verb}, {written} samples"
    print(summary + (f"; skipped: {reasons}" if reasons else ""))
    sys.stdout.flush()
    wait_for_other_ranks()
    if failed:
        shard, reason = next(iter(failed.items()))
        raise SystemExit(
            f"error: rank {RANK}: {len(failed)} of {len(shards)} shards failed, the first is "
            f"{shard}: {reason}; run it again when they are fixed"
        )
