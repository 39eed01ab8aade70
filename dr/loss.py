"""The distillation loss of dataset reinforcement, computed in chunks of rows.

Source: Vasu et al., MobileCLIP: Fast Image-Text Models through Multi-Modal Reinforced Training,
CVPR 2024 (arXiv 2311.17049), section 4. The contrastive half is CLIP's loss (arXiv 2103.00020).
For unit-length student features I, T with logit scale σ, and unit-length features I^k, T^k of
teacher k = 1…K with scale τ_k:

    P_i2t          = (1/K) Σ_k softmax_rows(τ_k I^k T^kᵀ)
    P_t2i          = (1/K) Σ_k softmax_rows(τ_k T^k I^kᵀ)
    distill(T)     = ½ [H(P_i2t, softmax_rows(σ I Tᵀ)) + H(P_t2i, softmax_rows(σ T Iᵀ))]
    contrastive(T) = ½ [CE(σ I Tᵀ) + CE(σ T Iᵀ)]
    loss           = w₀ (contrastive(T) + contrastive(T_syn)) + w₁ (distill(T) + distill(T_syn))

H is the cross entropy, averaged over rows. CE is the same with targets on the diagonal. Without
``average_after_softmax`` the teachers' logits are summed before a single softmax.

On N processes, with and without ``local_loss``, the mean of the ranks' losses equals the loss of
one process with the whole batch. With ``gather_with_grad``, so does the mean of the ranks'
gradients, which DistributedDataParallel computes. Without ``gather_with_grad``, a rank's gradient
reaches its own features only, as in OpenCLIP's ClipLoss.

Not supported: horovod, different batch sizes on different ranks, second derivatives.
"""

import argparse
from collections.abc import Callable, Sequence
from functools import partial, reduce
from itertools import product
from operator import iadd
from typing import Any

import torch
import torch.distributed
import torch.distributed.nn
from torch import Tensor, nn
from torch.nn import functional as F

# Each chunk has up to three matrices of rows × global batch in memory, and reads the features of
# the global batch once. On a CPU, 64 rows take 25 % more time than 128 rows, and 256 rows 28 % more
# memory (scripts/benchmarks/loss.py). A GPU should want larger matrices; that is not measured.
CHUNK_ROWS = {"cpu": 128}
CHUNK_ROWS_ELSEWHERE = 512


def chunk_losses(
    rows: Tensor,
    columns: Tensor,
    scale: Tensor,
    labels: Tensor,
    targets: Tensor | None,
    weights: Sequence[float],
) -> tuple[Tensor, Tensor]:
    """Sum the losses over a chunk of rows, in one direction (image to text or text to image).

    Args:
        rows: student features ``[R, D]``.
        columns: student features ``[C, D]``.
        scale: σ, a scalar.
        labels: column of each row's own pair, ``[R]``.
        targets: the teachers' distribution ``[R, C]``, modified in place; None if w₁ is 0.
        weights: (w₀, w₁).

    Returns:
        The weighted sums (contrastive, distill), two scalars.
    """
    log_p = Similarities.apply(scale * rows, columns).log_softmax(dim=1)
    if targets is None:
        contrastive = weights[0] * F.nll_loss(log_p, labels, reduction="sum")
        return contrastive, torch.zeros_like(contrastive)
    # Both terms are cross entropies, so they share one product: w₁ P + w₀ on the diagonal.
    diagonal = torch.arange(len(rows), device=rows.device), labels
    targets[diagonal] += weights[0] / weights[1]
    both = -weights[1] * (targets * log_p).sum()
    contrastive = -weights[0] * log_p.detach()[diagonal].sum()
    return contrastive, both - contrastive


class Similarities(torch.autograd.Function):
    """``rows @ columns.T``, whose gradient with respect to columns is added to ``columns.grad``.

    autograd would allocate a gradient as large as the columns for each chunk, and then add it.
    """

    @staticmethod
    def forward(ctx: Any, rows: Tensor, columns: Tensor) -> Tensor:
        ctx.save_for_backward(rows)
        ctx.columns = columns  # saved-tensor hooks could replace it by a copy without its grad
        return rows @ columns.T

    @staticmethod
    def backward(ctx: Any, incoming: Tensor) -> tuple[Tensor, None]:
        (rows,) = ctx.saved_tensors
        if ctx.columns.requires_grad:
            ctx.columns.grad.addmm_(incoming.T, rows)
        return incoming @ ctx.columns, None


class ChunkedLosses(torch.autograd.Function):
    """Losses whose gradients are computed in the forward pass, so that only those are kept.

    ``compute(weights, *inputs)`` returns the weighted losses ``[2]`` and the gradients of their
    sum. The backward pass multiplies the gradients by the incoming gradient. It computes them again
    if the two losses have different incoming gradients, or if it runs a second time.
    """

    @staticmethod
    def forward(ctx: Any, compute: Callable, weights: Sequence[float], *inputs: Tensor) -> Tensor:
        losses, ctx.gradients = compute(weights, *inputs)
        ctx.compute, ctx.weights = compute, weights
        ctx.save_for_backward(*inputs)
        return losses

    @staticmethod
    def backward(ctx: Any, incoming: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():
            raise RuntimeError(
                "DRClipLoss has no second derivative: call backward without create_graph=True"
            )
        gradients = ctx.gradients
        ctx.gradients = None  # the caller may change them
        pairs = list(zip(incoming.tolist(), ctx.weights, strict=True))
        factors = {factor for factor, weight in pairs if weight}
        if gradients is None or len(factors) != 1:
            weights = [factor * weight for factor, weight in pairs]
            _, gradients = ctx.compute(weights, *ctx.saved_tensors)
        elif factors != {1.0}:
            for gradient in gradients:
                if gradient is not None:
                    gradient *= max(factors)
        return None, None, *gradients


class DRClipLoss(nn.Module):
    """Contrastive and distillation loss over one or two captions per image.

    Args:
        local_loss: use the local samples as rows and the global batch as columns. Otherwise every
            rank uses the global batch as rows too.
        gather_with_grad: let gradients flow through the gathering of the student's features.
        cache_labels: has no effect; accepted because OpenCLIP passes it.
        rank: rank of this process.
        world_size: number of processes.
        use_horovod: must be False; accepted because OpenCLIP passes it.
        teacher_dimension: width D_k of each teacher's block in the teacher features, which are as
            wide as their sum. ``[-1]`` means one teacher, as wide as the features.
        distill_loss_weights: (w₀, w₁), contrastive and distillation. A term with weight 0 is not
            computed.
        average_after_softmax: average the teachers' distributions instead of summing their logits.
        dist_logit_scale: τ, one number for all teachers or one for each.

    Raises:
        ValueError: ``use_horovod`` is True, or there is neither one scale nor one per teacher.
    """

    def __init__(
        self,
        local_loss: bool = False,
        gather_with_grad: bool = False,
        cache_labels: bool = False,
        rank: int = 0,
        world_size: int = 1,
        use_horovod: bool = False,
        teacher_dimension: Sequence[int] = (-1,),
        distill_loss_weights: Sequence[float] = (1.0, 1.0),
        average_after_softmax: bool = False,
        dist_logit_scale: float | Sequence[float] | None = None,
    ) -> None:
        super().__init__()
        if use_horovod:
            raise ValueError(
                "DRClipLoss does not run under horovod: start with torchrun, without --horovod"
            )
        teachers = len(teacher_dimension)
        scales: Any = dist_logit_scale
        if not isinstance(scales, Sequence):
            scales = [scales]
        if len(scales) not in (1, teachers):
            raise ValueError(
                f"dist_logit_scale has {len(scales)} values, teacher_dimension {teachers}: "
                "give one scale, or one for each teacher"
            )
        self.local_loss = local_loss
        self.gather_with_grad = gather_with_grad
        self.rank = rank
        self.world_size = world_size
        self.teacher_dimension = list(teacher_dimension)
        self.weights = tuple(distill_loss_weights)
        self.average_after_softmax = average_after_softmax
        self.dist_logit_scale = list(scales) if len(scales) == teachers else [*scales] * teachers

    def forward(
        self,
        image_features: Tensor,
        text_features: Tensor,
        logit_scale: Tensor,
        dist_image_features: Tensor,
        dist_text_features: Tensor,
        syn_text_features: Tensor | None = None,
        dist_syn_text_features: Tensor | None = None,
        output_dict: bool = False,
    ) -> dict[str, Tensor] | tuple[Tensor, Tensor]:
        """Compute both losses, in float32 also under autocast.

        On a GPU the matrix products use TF32 if the trainer allows it, as OpenCLIP's does.

        Args:
            image_features: student, ``[B, D]``, unit length; B is this process's batch size.
            text_features: student, original captions, ``[B, D]``.
            logit_scale: σ, a scalar.
            dist_image_features: teachers, ``[B, ΣD_k]``, each teacher's block of unit length.
            dist_text_features: teachers, original captions, ``[B, ΣD_k]``.
            syn_text_features: student, synthetic captions, ``[B, D]``, or None.
            dist_syn_text_features: teachers, synthetic captions, ``[B, ΣD_k]``, or None.
            output_dict: return ``{"contrastive_loss": …, "distill_loss": …}``.

        Returns:
            The two weighted losses, scalars, as a dict or as a tuple (contrastive, distill).

        Raises:
            ValueError: the teacher dimensions do not add up to the width of the teacher features,
                there is no teacher scale, or only one of the two synthetic arguments is None.
        """
        if (syn_text_features is None) != (dist_syn_text_features is None):
            raise ValueError(
                "syn_text_features and dist_syn_text_features go together: one of them is None"
            )
        inputs = [logit_scale.float()]
        for features in (image_features, text_features, syn_text_features):
            if features is not None:
                inputs.extend(self._gather(features.float()))
        if not torch.is_grad_enabled():
            inputs = [tensor.detach() for tensor in inputs]  # so that no gradients are computed
        teachers = []
        if self.weights[1]:
            for features in (dist_image_features, dist_text_features, dist_syn_text_features):
                if features is not None:
                    self._check_teacher(features.shape[1])
                    teachers.append(self._gather(features.detach().float()))
        compute = partial(self.losses_and_gradients, teachers)
        contrastive, distill = ChunkedLosses.apply(compute, self.weights, *inputs).unbind()
        if output_dict:
            return {"contrastive_loss": contrastive, "distill_loss": distill}
        return contrastive, distill

    def _check_teacher(self, width: int) -> None:
        """Raise ValueError if the settings do not fit teacher features of this width."""
        if None in self.dist_logit_scale:
            raise ValueError(
                "no teacher scale: set dist_logit_scale "
                "(--distill-logit-scale, 100 in the DataCompDR recipes)"
            )
        dimensions = self.teacher_dimension
        if dimensions != [-1] and sum(dimensions) != width:
            raise ValueError(
                f"teacher dimensions {' + '.join(map(str, dimensions))} = {sum(dimensions)} "
                f"(--distill-teacher-dimension), but the stored embeddings are {width} wide"
            )

    def _gather(self, features: Tensor) -> tuple[Tensor, Tensor]:
        """Return the features of the rows, ``[B or N·B, D]``, and of the columns, ``[N·B, D]``."""
        if self.world_size == 1:
            return features, features
        if self.gather_with_grad and features.requires_grad:
            everything = torch.cat(torch.distributed.nn.all_gather(features.contiguous()))
        else:
            gathered = [torch.empty_like(features) for _ in range(self.world_size)]
            torch.distributed.all_gather(gathered, features.detach().contiguous())
            if not self.local_loss:
                gathered[self.rank] = features  # gradients reach one's own features
            everything = torch.cat(gathered)
        return (features, everything) if self.local_loss else (everything, everything)

    def _teacher_distribution(self, rows: Tensor, columns: Tensor) -> Tensor:
        """Return the distribution ``[R, C]`` of teacher features ``[R, ΣD_k]``, ``[C, ΣD_k]``."""
        widths = [rows.shape[1]] if self.teacher_dimension == [-1] else self.teacher_dimension
        blocks = zip(
            self.dist_logit_scale, rows.split(widths, 1), columns.split(widths, 1), strict=True
        )
        logits = (scale * row_block @ column_block.T for scale, row_block, column_block in blocks)
        if not self.average_after_softmax:
            return reduce(iadd, logits).softmax(dim=1)
        return reduce(iadd, (matrix.softmax(dim=1) for matrix in logits)).div_(len(widths))

    def losses_and_gradients(
        self,
        teachers: Sequence[tuple[Tensor, Tensor]],
        weights: Sequence[float],
        scale: Tensor,
        *students: Tensor,
    ) -> tuple[Tensor, list[Tensor | None]]:
        """Compute the losses, and the gradients of their sum, one chunk of rows at a time.

        The backward pass of a chunk follows its forward pass and adds to the gradients of the
        chunks before it, so no matrix of all rows × all columns is ever in memory.

        Args:
            teachers: (rows, columns) of the images, of the original captions and, optionally, of
                the synthetic captions. Not used if w₁ is 0.
            weights: (w₀, w₁).
            scale: σ, a scalar.
            students: rows and columns in the same order, four or six tensors.

        Returns:
            The losses ``[2]`` (contrastive, distill), and the gradients of ``scale`` and
            ``students``; None for a tensor that does not require one.
        """
        leaves = [x.detach().requires_grad_(x.requires_grad) for x in (scale, *students)]
        for leaf in leaves:
            if leaf.requires_grad:
                leaf.grad = torch.zeros_like(leaf)
        scale, rows, columns = leaves[0], leaves[1::2], leaves[2::2]
        height = len(rows[0])
        labels = torch.arange(height, device=scale.device)
        if self.local_loss:
            labels += self.rank * height
        chunk_rows = CHUNK_ROWS.get(scale.device.type, CHUNK_ROWS_ELSEWHERE)
        totals = torch.zeros(2, device=scale.device)
        chunks = [slice(start, start + chunk_rows) for start in range(0, height, chunk_rows)]
        directions = [pair for text in range(1, len(rows)) for pair in ((0, text), (text, 0))]
        for (one, other), chunk in product(directions, chunks):
            with torch.enable_grad(), torch.autocast(scale.device.type, enabled=False):
                sums = chunk_losses(
                    rows[one][chunk],
                    columns[other],
                    scale,
                    labels[chunk],
                    self._teacher_distribution(teachers[one][0][chunk], teachers[other][1])
                    if weights[1]
                    else None,
                    weights,
                )
                losses = torch.stack(sums) / (2 * height)  # each direction's mean, halved
                if losses.requires_grad:
                    losses.sum().backward()
            totals += losses.detach()
        return totals, [leaf.grad for leaf in leaves]


def create_loss(args: argparse.Namespace) -> DRClipLoss:
    """Create the loss from the trainer's options."""
    return DRClipLoss(
        local_loss=args.local_loss,
        gather_with_grad=args.gather_with_grad,
        cache_labels=True,
        rank=args.rank,
        world_size=args.world_size,
        teacher_dimension=args.distill_teacher_dimension,
        distill_loss_weights=args.distill_loss_weights,
        average_after_softmax=args.distill_average_after_softmax,
        dist_logit_scale=args.distill_logit_scale,
    )
