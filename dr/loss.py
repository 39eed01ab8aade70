"""The distillation loss of dataset reinforcement.

Source: Vasu et al., MobileCLIP: Fast Image-Text Models through Multi-Modal Reinforced Training, CVPR 2024
(arXiv 2311.17049), section 4; the contrastive half is that of Radford et al., arXiv 2103.00020. For unit-length student
features I, T with logit scale σ and features I^k, T^k of teacher k = 1…K with scale τ_k:

    P_i2t          = (1/K) Σ_k softmax_rows(τ_k I^k T^kᵀ)        P_t2i = (1/K) Σ_k softmax_rows(τ_k T^k I^kᵀ)
    distill(T)     = ½ [H(P_i2t, softmax_rows(σ I Tᵀ)) + H(P_t2i, softmax_rows(σ T Iᵀ))]     H: mean cross entropy
    contrastive(T) = ½ [CE(σ I Tᵀ) + CE(σ T Iᵀ)]                 targets on the diagonal
    loss           = w₀ (contrastive(T) + contrastive(T_syn)) + w₁ (distill(T) + distill(T_syn))

Without ``average_after_softmax`` the teachers' logits are added up before one softmax.

What equals what: on N processes the mean of the ranks' losses is the loss of one process with the whole batch, with and
without ``local_loss``, to float32 rounding; so are, with ``gather_with_grad``, the gradients averaged over ranks (as
DistributedDataParallel does). Without it a rank's gradient reaches its own features only, as in OpenCLIP's ClipLoss.

Left out: horovod, and batches of different size on different ranks.
"""

import math
from collections.abc import Sequence

import torch
import torch.distributed
import torch.distributed.nn
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

# Elements of local × global batch that are in memory at once, three times, of 4 bytes each. Each chunk reads the whole
# batch's features again: half of this costs a CPU a tenth of its time; a GPU should want more still (not measured).
CHUNK = {"cpu": 2**22}
LARGE_CHUNK = 2**24  # elsewhere


class DRClipLoss(nn.Module):
    """Contrastive and distillation loss over one or two captions for each image.

    Args:
        local_loss: rows are the local samples only, columns the global batch; otherwise both are global.
        gather_with_grad: let gradients flow through the gathering of the student's features.
        cache_labels: of no effect, targets cost nothing; kept as are OpenCLIP's other arguments.
        rank: of this process.
        world_size: number of processes.
        use_horovod: refused; kept so that the arguments are those of OpenCLIP's losses.
        teacher_dimension: width D_k of each teacher's block in the teacher features, which are as wide as their sum;
            ``[-1]``: one teacher, as wide as the features.
        distill_loss_weights: (w₀, w₁), contrastive and distillation. A term with weight 0 is not computed.
        average_after_softmax: average the teachers' distributions, not their logits.
        dist_logit_scale: τ, one number for all teachers or one for each.
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
    ):
        super().__init__()
        if use_horovod:
            raise ValueError(
                "DRClipLoss does not run under horovod: start with torchrun, without --horovod"
            )
        self.local_loss = local_loss
        self.gather_with_grad = gather_with_grad
        self.rank = rank
        self.world_size = world_size
        self.teacher_dimension = list(teacher_dimension)
        self.contrastive_weight, self.distill_weight = distill_loss_weights
        self.average_after_softmax = average_after_softmax
        scales = dist_logit_scale if isinstance(dist_logit_scale, Sequence) else [dist_logit_scale]
        if len(scales) not in (1, len(self.teacher_dimension)):
            raise ValueError(
                f"dist_logit_scale has {len(scales)} values, teacher_dimension {len(self.teacher_dimension)}: "
                "give one scale, or one for each teacher"
            )
        self.dist_logit_scale = list(scales) * (
            len(self.teacher_dimension) if len(scales) == 1 else 1
        )

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
        """Compute both losses, in float32 whatever autocast says (on a GPU in TF32, which OpenCLIP's trainer allows).

        Args:
            image_features: student, ``[B, D]``, unit length; B is this process's batch.
            text_features: student, original captions, ``[B, D]``.
            logit_scale: σ, a scalar.
            dist_image_features: teachers, ``[B, ΣD_k]``, each teacher's block of unit length.
            dist_text_features: teachers, original captions, ``[B, ΣD_k]``.
            syn_text_features: student, synthetic captions, ``[B, D]``, or None: no second term.
            dist_syn_text_features: teachers, synthetic captions, ``[B, ΣD_k]``; goes with ``syn_text_features``.
            output_dict: return ``{"contrastive_loss": …, "distill_loss": …}``.

        Returns:
            The two scalars, weighted, as a dict or as a tuple (contrastive, distill).

        Raises:
            ValueError: teacher dimensions that don't add up to the width of the teacher features, no teacher scale, or
                one of the two synthetic arguments without the other.
        """
        if (syn_text_features is None) != (dist_syn_text_features is None):
            raise ValueError(
                "syn_text_features and dist_syn_text_features go together: one of them is None"
            )
        with torch.autocast(device_type=image_features.device.type, enabled=False):
            image = self._rows_and_columns(image_features.float())
            dist_image = self._teacher_rows_and_columns(dist_image_features)
            students, sides = list(dict.fromkeys(image)), []
            for student, teacher in (
                (text_features, dist_text_features),
                (syn_text_features, dist_syn_text_features),
            ):
                if student is not None:
                    text, dist_text = (
                        self._rows_and_columns(student.float()),
                        self._teacher_rows_and_columns(teacher),
                    )
                    sides.append(
                        (0, len(students) + len(set(text)) - 1, dist_image[0], dist_text[1])
                    )
                    sides.append((len(students), len(set(image)) - 1, dist_text[0], dist_image[1]))
                    students.extend(dict.fromkeys(text))
            first = self.rank * len(image[0]) if self.world_size > 1 and self.local_loss else 0
            weights = (self.contrastive_weight, self.distill_weight)
            contrastive, distill = _Losses.apply(
                sides, first, weights, logit_scale.float(), *students
            )
        return (
            {"contrastive_loss": contrastive, "distill_loss": distill}
            if output_dict
            else (contrastive, distill)
        )

    def _rows_and_columns(self, features: Tensor) -> tuple[Tensor, Tensor]:
        """The features whose similarities are this process's: rows ``[B or N·B, D]`` and columns ``[N·B, D]``."""
        if self.world_size == 1:
            return features, features
        if self.gather_with_grad and features.requires_grad:
            everything = torch.cat(torch.distributed.nn.all_gather(features.contiguous()))
        else:
            gathered = [torch.empty_like(features) for _ in range(self.world_size)]
            torch.distributed.all_gather(gathered, features.detach().contiguous())
            if not self.local_loss:
                gathered[self.rank] = (
                    features  # as OpenCLIP's gather_features: gradients reach one's own features
                )
            everything = torch.cat(gathered)
        return (features, everything) if self.local_loss else (everything, everything)

    def _teacher_rows_and_columns(self, features: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        """The same for teacher features: without gradient, one tensor for each softmax, the rows times τ."""
        if not self.distill_weight:
            return [], []
        if None in self.dist_logit_scale:
            raise ValueError(
                "no teacher scale: set dist_logit_scale (--distill-logit-scale, 100 in both recipes)"
            )
        dimensions = (
            [features.shape[1]] if self.teacher_dimension == [-1] else self.teacher_dimension
        )
        if sum(dimensions) != features.shape[1]:
            raise ValueError(
                f"teacher dimensions {' + '.join(map(str, dimensions))} = {sum(dimensions)} "
                f"(--distill-teacher-dimension), but the stored embeddings are {features.shape[1]} wide"
            )
        rows, columns = self._rows_and_columns(features.detach().float())
        rows = [
            scale * part
            for scale, part in zip(
                self.dist_logit_scale, rows.split(dimensions, dim=1), strict=True
            )
        ]
        if self.average_after_softmax:
            return rows, list(columns.split(dimensions, dim=1))
        return [torch.cat(rows, dim=1)], [columns]  # Σ_k τ_k I^k T^kᵀ in one product


class _Losses(torch.autograd.Function):
    """The two losses, with gradients that are computed along with them; see :func:`_losses`.

    So no matrix of local × global batch is kept for the backward pass, which has only to scale what is there. Gradients
    are linear in the weights: where the two losses get different ones, they are computed again with other weights; so
    they are for a second backward pass.
    """

    @staticmethod
    def forward(ctx, sides, first, weights, scale, *students):
        losses, gradients = _losses(
            sides, first, weights, scale, students, any(ctx.needs_input_grad)
        )
        ctx.sides, ctx.first, ctx.weights, ctx.gradients = sides, first, weights, gradients
        ctx.save_for_backward(scale, *students)
        return losses

    @staticmethod
    @once_differentiable
    def backward(ctx, *outer):
        outer = [float(gradient) for gradient in outer]
        factors = {gradient for gradient, weight in zip(outer, ctx.weights, strict=True) if weight}
        gradients, ctx.gradients = ctx.gradients, None
        if gradients and len(factors) == 1:
            (factor,) = factors
            gradients = (
                gradients if factor == 1 else [gradient.mul_(factor) for gradient in gradients]
            )
        else:
            scale, *students = ctx.saved_tensors
            weights = [
                weight * gradient for weight, gradient in zip(ctx.weights, outer, strict=True)
            ]
            with torch.autocast(scale.device.type, enabled=False):
                _, gradients = _losses(ctx.sides, ctx.first, weights, scale, students, True)
        return None, None, None, *gradients


def _losses(sides, first, weights, scale, students, with_gradients):
    """The two losses and the gradients of their sum, a chunk of rows at a time.

    Args:
        sides: for each distribution of the student: which of ``students`` are its rows ``[R, D]`` and its columns
            ``[C, D]``, and the teachers' rows and columns, a tensor for each softmax.
        first: the column in which the first row's own pair stands.
        weights: (w₀, w₁).
        scale: σ, a scalar.
        students: the features.
        with_gradients: otherwise there are none.

    Returns:
        (contrastive, distill), and the gradients with respect to the scale and to each of ``students``.
    """
    losses = torch.zeros_like(scale), torch.zeros_like(scale)
    gradients = (
        [torch.zeros_like(scale), *map(torch.zeros_like, students)] if with_gradients else []
    )
    height, width = len(students[sides[0][0]]), len(students[sides[0][1]])  # of all sides
    share = 1 / (2 * height)  # half of the mean over rows
    chunks = math.ceil(height * width / CHUNK.get(scale.device.type, LARGE_CHUNK))
    step = math.ceil(height / chunks)
    space = students[0].new_empty(3 if weights[1] else 2, step, width)  # used again for each chunk
    for row_number, column_number, teacher_rows, teacher_columns in sides:
        columns = students[column_number]
        for start in range(0, height, step):
            chunk = slice(start, start + step)
            rows = students[row_number][chunk]
            log_p, free = space[:2, : len(rows)]
            if weights[1]:
                targets = space[2, : len(rows)]  # the sum of the teachers' distributions
                target_weight = weights[1] / len(teacher_rows)
                for number, (teacher_row, teacher_column) in enumerate(
                    zip(teacher_rows, teacher_columns, strict=True)
                ):
                    torch.mm(teacher_row[chunk], teacher_column.T, out=free)
                    torch.softmax(free, 1, out=log_p if number else targets)
                    if number:
                        targets += log_p
            torch.log_softmax(torch.mm(scale * rows, columns.T, out=free), 1, out=log_p)
            own = torch.arange(len(rows), device=rows.device)
            own = own, own + (first + start)
            if weights[0]:
                losses[0].sub_(log_p[own].sum(), alpha=weights[0] * share)
            if weights[1]:
                # summed in pairs; as a product of vectors a long row's sum would be off by 3e-5
                losses[1].sub_(
                    torch.mul(targets, log_p, out=free).sum(), alpha=target_weight * share
                )
            if with_gradients:
                # with respect to the logits: (w₀ + w₁) softmax - w₀ diagonal - w₁ average of targets, each row a share
                d_logits = log_p.exp_().mul_(sum(weights))
                if weights[0]:
                    d_logits[own] -= weights[0]
                if weights[1]:
                    d_logits.sub_(targets, alpha=target_weight)
                d_rows = (d_logits @ columns).mul_(share)
                gradients[0] += torch.linalg.vecdot(d_rows, rows).sum()
                gradients[1 + row_number][chunk].addcmul_(d_rows, scale)
                gradients[1 + column_number].addmm_(d_logits.T, rows * (scale * share))
    return losses, gradients


def create_loss(args) -> DRClipLoss:
    """The loss of the trainer's options."""
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
