"""What a training run does between OpenCLIP's steps: checkpoints, pre-emption, and stopping on NaN.

With ``--save-every-n-steps`` or ``--dataset-without-replacement`` a checkpoint also contains
``dr``: the position within the epoch, the state of the loaders, and the state of the random
generators. On SIGTERM, which a job gets when it is pre-empted, all ranks agree on a step, save, and
exit with status 143. A loss that is not finite stops all ranks; each writes the uids of its last
batches to the log folder.
"""

import json
import logging
import math
import os
import re
import signal
import sys
from collections import Counter, deque
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from .chain import list_counts
from .checkpoint import save, step_checkpoints
from .loader import Loader, gather_objects
from .towers import parameters_without_gradient, update_statistics_once

TERMINATED = 128 + signal.SIGTERM  # exit status
MAX_WAIT_FRACTION = 0.1  # more time than this that steps wait for data leads to a warning
STEPS_KEPT = 3  # whose losses and uids are kept: a loss is examined up to two steps later


class _Step(NamedTuple):
    """The losses of a step, on their way to the CPU, and the uids of this rank's samples."""

    epoch: int
    step: int
    names: list[str]
    values: Tensor
    copied: Any  # a CUDA event, or None
    uids: list[str]

    def losses(self) -> dict[str, float]:
        if self.copied is not None:
            self.copied.synchronize()
        return dict(zip(self.names, self.values.tolist(), strict=True))

    def is_finite(self) -> bool:
        return all(math.isfinite(value) for value in self.losses().values())


class Run:
    """Checkpoints and checks of a run. All ranks have to call each method.

    Args:
        args: the trainer's options.
        data: OpenCLIP's data sets by name.
        model, optimizer, scaler: as OpenCLIP saves them; no scaler: None.
    """

    def __init__(self, args: Any, data: dict, model: Any, optimizer: Any, scaler: Any):
        self.args, self.model, self.optimizer, self.scaler = args, model, optimizer, scaler
        loader = data["train"].dataloader if "train" in data else None
        self.loader = loader if isinstance(loader, Loader) else None
        # Whether a checkpoint says more than which epochs are complete.
        self.resumes_within_epochs = self.loader is not None and bool(
            args.save_every_n_steps or args.dataset_without_replacement
        )
        self.steps: deque[_Step] = deque(maxlen=STEPS_KEPT)
        self.group: Any = None
        self.exchange: tuple[Any, Tensor] | None = None  # in progress
        self.terminated = self.has_stepped = False
        if (args.accum_freq > 1 or args.grad_checkpointing) and not args.torchcompile:
            update_statistics_once(model)
        if self.loader is not None and dist.is_initialized():
            self.group = dist.new_group(backend="gloo")  # agrees while the GPUs work
        if self.resumes_within_epochs:
            signal.signal(signal.SIGTERM, self._terminate)
        if self.loader is not None and args.rank == 0:
            steps = self.loader.num_batches // args.accum_freq
            total = args.total_steps or steps * args.epochs
            logging.info(f"The run takes {total} optimizer steps, in epochs of {steps}")

    # --- state ------------------------------------------------------------------------------------
    def state_dict(self, epoch: int) -> dict:
        """The content of a checkpoint after ``epoch`` whole epochs, or within the next one."""
        self._check_steps()
        content = {
            "epoch": epoch,
            "name": self.args.name,
            "state_dict": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
        }
        if self.scaler is not None:
            content["scaler"] = self.scaler.state_dict()
        if self.loader is not None and self.resumes_within_epochs:
            state = self.loader.state_dict(self.group)
            generators = {"cpu": torch.get_rng_state()}
            if torch.cuda.is_available():
                generators["cuda"] = torch.cuda.get_rng_state()
            for rank, own in zip(
                state["ranks"], gather_objects(generators, self.group), strict=True
            ):
                rank["generators"] = own
            content["dr"] = state
        return content

    def load_state_dict(self, content: dict) -> None:
        """Restore the position at which the checkpoint was written.

        A checkpoint without ``dr`` has only the number of epochs.
        """
        state = content.get("dr")
        if self.loader is None:
            return
        self.loader.epoch = content.get("epoch", 0)
        if not state:
            return
        self.loader.load_state_dict(state)
        if self.resumes_within_epochs and len(state["ranks"]) == self.args.world_size:
            generators = state["ranks"][self.args.rank]["generators"]
            torch.set_rng_state(generators["cpu"])
            if torch.cuda.is_available() and "cuda" in generators:
                torch.cuda.set_rng_state(generators["cuda"])

    # --- between steps ----------------------------------------------------------------------------
    def after_step(self, epoch: int, step: int, losses: dict[str, Tensor]) -> None:
        """Save a checkpoint if it is due, or stop the run; after each optimizer step.

        Args:
            epoch: whole epochs that are complete.
            step: optimizer steps of the present epoch that are complete.
            losses: of this step, by name.
        """
        if not self.has_stepped:
            self.has_stepped = True
            self._check_gradients()
        self._observe(epoch, step, losses)
        previous = self.steps[-2] if len(self.steps) > 1 else None  # its copy is surely complete
        not_finite = previous is not None and not previous.is_finite()
        fault = self.loader.fault if self.loader is not None else ""
        terminate, stop = self._agree(self.terminated or bool(fault), not_finite)
        if stop:
            self._stop_on_loss()
        if not self.resumes_within_epochs:
            return
        every = self.args.save_every_n_steps
        if terminate or (every and step % every == 0):
            content = self.state_dict(epoch)
            if self.args.save_logs:
                path = os.path.join(self.args.checkpoint_path, f"epoch_{epoch}_step_{step}.pt")
                save(content, path)
                for old in step_checkpoints(self.args.checkpoint_path)[: -self.args.keep_last_k]:
                    os.remove(old)
                logging.info(f"Saved {path}")
        if terminate:
            self._wait_for_all()
            if fault:
                raise SystemExit(
                    f"error: {fault}. Stopped after step {step} of epoch {epoch}. Check the store "
                    "and the network, and continue with --resume latest."
                )
            why = "by SIGTERM" if self.terminated else "as another rank has to stop,"
            logging.info(
                f"Stopped {why} after step {step} of epoch {epoch}. Continue with --resume latest."
            )
            sys.exit(TERMINATED)

    def after_epoch(self, epoch: int, writer: Any = None) -> None:
        """Log what was skipped in an epoch on all ranks, also as ``data/skipped_…``, and how long
        steps waited for data, also as ``data/wait_fraction``."""
        if self.loader is None:
            return
        self._check_steps()
        args, ranks = self.args, gather_objects(self.loader.reset_counts(), self.group)
        waited = max(gather_objects(self.loader.wait_fraction, self.group))
        if args.rank != 0:
            return
        read = sum(counts.read for counts in ranks)
        skipped = sum((Counter(counts.skipped) for counts in ranks), Counter())
        fraction = skipped.total() / max(read, 1)
        reasons = f": {list_counts(skipped)}" if skipped else ""
        logging.info(
            f"Skipped in epoch {epoch}: {skipped.total()} of {read} samples "
            f"({fraction:.2%}){reasons}"
        )
        logging.info(f"Steps waited for data in {waited:.1%} of the time of epoch {epoch}")
        if waited > MAX_WAIT_FRACTION:
            logging.warning(
                "Data loading is the bottleneck. Use more --workers (now "
                f"{args.workers} for each rank; this machine has {os.cpu_count()} cores), more "
                "cores, or shards that are read faster: docs/performance.md compares the formats"
            )
        step = self.loader.num_batches // args.accum_freq * (epoch + 1) - 1
        scalars = {"data/skipped_fraction": fraction, "data/wait_fraction": waited}
        for reason, count in skipped.items():
            scalars["data/skipped_" + re.sub(r"\W+", "_", reason).strip("_")] = count
        if writer is not None:
            for name, value in scalars.items():
                writer.add_scalar(name, value, step)
        if args.wandb:
            import wandb

            wandb.log({**scalars, "step": step}, step=step)

    def _check_gradients(self) -> None:
        """Stop the run if something that was unlocked is not trained; otherwise warn."""
        found = parameters_without_gradient(self.model)
        names = ", ".join(found[:5]) + (f" and {len(found) - 5} more" if len(found) > 5 else "")
        if found and (self.args.lock_image or self.args.lock_text):
            raise SystemExit(
                f"error: {names}: unlocked, but without a gradient in the first step, so not "
                "trained. Lock other layers, or train without --grad-checkpointing."
            )
        if found and self.args.rank == 0:
            logging.warning(f"Not trained, as the first step gave no gradient: {names}")

    # --- losses -----------------------------------------------------------------------------------
    def _observe(self, epoch: int, step: int, losses: dict[str, Tensor]) -> None:
        """Keep a step's losses and uids. GPUs copy the losses when they have computed them."""
        stacked = torch.stack([value.detach().float() for value in losses.values()])
        values, copied = stacked.to("cpu", non_blocking=True), None
        if stacked.is_cuda:
            copied = torch.cuda.Event()
            copied.record()
        uids = [uid for batch in self.loader.recent_uids for uid in batch] if self.loader else []
        self.steps.append(_Step(epoch, step, list(losses), values, copied, uids))

    def _check_steps(self) -> None:
        """Stop the run if a loss so far was not finite on any rank; waits for the GPUs."""
        flag = torch.tensor([int(not all(step.is_finite() for step in self.steps))])
        if self.group is not None:
            dist.all_reduce(flag, dist.ReduceOp.MAX, self.group)
        if flag.item():
            self._stop_on_loss()

    def _stop_on_loss(self) -> None:
        """Write the last steps' losses and uids to the log folder, and exit."""
        folder = os.path.join(self.args.logs, self.args.name)
        path = os.path.join(folder, f"not_finite_rank_{self.args.rank}.json")
        found = [
            {
                "epoch": step.epoch,
                "step": step.step,
                "losses": {name: str(value) for name, value in step.losses().items()},
                "uids": step.uids,
            }
            for step in self.steps
        ]
        os.makedirs(folder, exist_ok=True)
        with open(path, "w", encoding="utf-8") as file:
            json.dump(found, file, indent=1)
        bad = next((step for step in self.steps if not step.is_finite()), self.steps[0])
        terms = ", ".join(f"{name} {value:g}" for name, value in bad.losses().items())
        self._wait_for_all()
        raise SystemExit(
            f"error: the loss is not finite in step {bad.step} of epoch {bad.epoch} (rank "
            f"{self.args.rank}: {terms}). {path} lists the uids of its {len(bad.uids)} samples. "
            "Look at these samples, or lower the learning rate, and continue from the last "
            "checkpoint."
        )

    # --- ranks ------------------------------------------------------------------------------------
    def _terminate(self, *_: Any) -> None:
        self.terminated = True

    def _agree(self, *flags: bool) -> list[bool]:
        """For each flag, whether any rank had raised it at the last call.

        The ranks are asked then and answer now, so that no rank waits for another.
        """
        if self.group is None:
            return list(flags)
        answer = [False] * len(flags)
        if self.exchange:
            work, sent = self.exchange
            work.wait()
            answer = [bool(flag) for flag in sent.tolist()]
        sent = torch.tensor([int(flag) for flag in flags])
        work = dist.all_reduce(sent, dist.ReduceOp.MAX, self.group, async_op=True)
        self.exchange = work, sent
        return answer

    def _wait_for_all(self) -> None:
        """torchrun ends all ranks when the first one exits."""
        if self.group is not None:
            dist.barrier(self.group)
