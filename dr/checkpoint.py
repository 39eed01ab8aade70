"""Checkpoints: written whole or not at all, also within an epoch; resumed without unpickling what they like.

OpenCLIP's checkpoints hold the learning rate as a NumPy scalar (ours as a float), which ``weights_only=True`` refuses
unless NumPy's scalars are allowed by name. Nothing else is.

``Checkpoints`` is what the trainer saves with. With ``--save-every-n-steps`` or ``--dataset-without-replacement`` its
checkpoints also hold ``dr``: how far within the epoch, where sampling stands, and the state of the random generators;
on SIGTERM, as a job that is pre-empted gets it, all ranks agree on a step, save, and end with status 143.
"""

import contextlib
import copy
import glob
import logging
import os
import re
import signal
import sys
from functools import lru_cache

import fsspec
import numpy as np
import torch
import torch.distributed as dist

LATEST = "epoch_latest.pt"
TEMPORARY = "checkpoint.tmp"  # always the same, so that a killed run leaves one at most
TERMINATED = 128 + signal.SIGTERM


def load(file, map_location=None, mmap=None):
    """``torch.load(…, weights_only=True)`` that also takes NumPy numbers, as written by NumPy 1 and 2.

    Args:
        file: path or binary file.
        map_location, mmap: as in ``torch.load``.
    """
    scalar = np.float64(0).__reduce__()[0]  # the function that pickled NumPy scalars are made by
    allowed = [np.dtype, *(type(np.dtype(kind)) for kind in ("f8", "f4", "i8", "i4", "?"))]
    allowed += [(scalar, f"numpy.{core}.multiarray.scalar") for core in ("core", "_core")]
    with torch.serialization.safe_globals(allowed):
        return torch.load(file, map_location=map_location, weights_only=True, mmap=mmap)


def save(content: dict, path: str) -> None:
    """Write a checkpoint; until it is on the disk, whole, whatever had its name stays."""
    folder = os.path.dirname(path)
    temporary = os.path.join(folder, TEMPORARY)
    with open(temporary, "wb") as file:
        torch.save(content, file)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
    descriptor = os.open(folder, os.O_RDONLY)
    with contextlib.suppress(OSError):  # some file systems have no such thing
        os.fsync(descriptor)  # the new name too
    os.close(descriptor)


def step_checkpoints(folder: str) -> list[str]:
    """The checkpoints within epochs, the least advanced first."""
    found = []
    for path in glob.glob(os.path.join(glob.escape(folder), "epoch_*_step_*.pt")):
        if numbers := re.fullmatch(r"epoch_(\d+)_step_(\d+)\.pt", os.path.basename(path)):
            found.append((*map(int, numbers.groups()), path))
    return [path for _, _, path in sorted(found)]


def latest(folder: str) -> str | None:
    """The most advanced checkpoint in a folder: of whole epochs, within one, or ``epoch_latest.pt``.

    One that can't be read, as a kill may leave it where it is not written by :func:`save`, is passed over.
    """
    found = []
    for path in glob.glob(os.path.join(glob.escape(folder), "epoch_*.pt")):
        numbers = re.fullmatch(
            r"epoch_(\d+)(?:_step_(\d+))?\.pt|" + re.escape(LATEST), os.path.basename(path)
        )
        if not numbers:
            continue
        if numbers[1] is None:
            epoch = _peek(path).get("epoch")
            if epoch is not None:
                found.append((epoch, 0, True, path))
        else:
            found.append((int(numbers[1]), int(numbers[2] or 0), False, path))
    for *_, is_latest, path in sorted(found, reverse=True):
        if is_latest or _peek(path):
            return path
    return None


def _peek(path: str) -> dict:
    """What a checkpoint holds, its tensors unread; empty: it can't be read."""
    try:
        return load(path, map_location="cpu", mmap=True)
    except Exception as error:  # whatever a broken file makes torch raise
        logging.warning(f"Passed over {path}, which can't be read: {type(error).__name__}: {error}")
        return {}


def resumes(args) -> bool:
    """Whether checkpoints say more than which epochs are done."""
    return bool(args.save_every_n_steps or args.dataset_without_replacement)


def resumed(args) -> dict:
    """``dr`` of the checkpoint that the run is resumed from; empty: there is none."""
    path = args.resume
    return _resumed(path) if path and (resumes(args) or os.path.isfile(path)) else {}


@lru_cache(1)
def _resumed(path: str) -> dict:
    if os.path.isfile(path):
        return copy.deepcopy(
            load(path, map_location="cpu", mmap=True).get("dr", {})
        )  # which lets go of the file
    with fsspec.open(path, "rb") as file:  # on a remote file system
        return load(file, map_location="cpu").get("dr", {})


def gathered(args, found, group=None) -> list:
    """What each rank has found, in all ranks."""
    if not dist.is_initialized():
        return [found]
    everywhere = [None] * args.world_size
    dist.all_gather_object(everywhere, found, group)
    return everywhere


class Checkpoints:
    """Makes, and within epochs writes, the checkpoints of a run.

    Args:
        args: the trainer's options.
        loader: of ``loader``; its state is saved too.
        model, optimizer, scaler: as OpenCLIP saves them; no scaler: None.
    """

    def __init__(self, args, loader, model, optimizer, scaler):
        self.args, self.loader, self.model, self.optimizer, self.scaler = (
            args,
            loader,
            model,
            optimizer,
            scaler,
        )
        self.group = self.asked = None
        self.terminated = False
        if not resumes(args):
            return
        if args.distributed:
            self.group = dist.new_group(
                backend="gloo"
            )  # the ranks agree beside the GPUs' work, without waiting for it
        signal.signal(signal.SIGTERM, self._terminate)
        generators = [rank["generators"] for rank in resumed(args).get("ranks", [])]
        if len(generators) == args.world_size:
            torch.set_rng_state(generators[args.rank]["cpu"])
            if torch.cuda.is_available() and "cuda" in generators[args.rank]:
                torch.cuda.set_rng_state(generators[args.rank]["cuda"])

    def content(self, epoch: int, step: int = 0) -> dict:
        """What is saved after ``epoch`` epochs and ``step`` optimiser steps of the next one. All ranks have to call."""
        content = {
            "epoch": epoch,
            "name": self.args.name,
            "state_dict": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
        }
        if self.scaler is not None:
            content["scaler"] = self.scaler.state_dict()
        if resumes(self.args):
            generators = {"cpu": torch.get_rng_state()}
            if torch.cuda.is_available():
                generators["cuda"] = torch.cuda.get_rng_state()
            loader = self.loader
            own = {"generators": generators, "read": loader.read, "skipped": dict(loader.skipped)}
            own["cursors"] = loader.cursors
            ranks = gathered(self.args, own, self.group)
            cursors = [cursor for rank in ranks for cursor in rank.pop("cursors")]
            content["dr"] = {
                "step": step,
                "steps_in_epoch": loader.num_batches // self.args.accum_freq,
                "ranks": ranks,
                "sampling": loader.sampling(cursors),
            }
        return content

    def after_step(self, epoch: int, step: int) -> None:
        """Save if it is time to, or if the job is to end; all ranks call this after each optimiser step.

        Args:
            epoch: epochs that are done.
            step: optimiser steps of the present one that are done.
        """
        if not resumes(self.args):
            return
        terminate, every = self._any_terminated(), self.args.save_every_n_steps
        if terminate or (every and step % every == 0):
            content = self.content(epoch, step)
            if self.args.save_logs:
                path = os.path.join(self.args.checkpoint_path, f"epoch_{epoch}_step_{step}.pt")
                save(content, path)
                for old in step_checkpoints(self.args.checkpoint_path)[: -self.args.keep_last_k]:
                    os.remove(old)
                logging.info(f"Saved {path}")
        if terminate:
            if self.group is not None:
                dist.barrier(self.group)  # torchrun ends the others when the first of them ends
            logging.info(
                f"Ends after step {step} of epoch {epoch}, as SIGTERM asked for; go on with --resume latest"
            )
            sys.exit(TERMINATED)

    def after_epoch(self, epoch: int, writer=None) -> None:
        """Report what was skipped in an epoch; all ranks call this at its end."""
        if hasattr(
            self.loader, "report_skipped"
        ):  # not OpenCLIP's loaders of csv files and of synthetic data
            self.loader.report_skipped(self.args, epoch, writer)

    def _terminate(self, *_) -> None:
        self.terminated = True

    def _any_terminated(self) -> bool:
        """Whether any rank had got the signal by the last step: asked then, answered now, so that nobody waits."""
        if self.group is None:
            return self.terminated
        answer = False
        if self.asked:
            work, flag = self.asked
            work.wait()
            answer = bool(flag.item())
        flag = torch.tensor([int(self.terminated)])
        self.asked = dist.all_reduce(flag, dist.ReduceOp.MAX, self.group, async_op=True), flag
        return answer
