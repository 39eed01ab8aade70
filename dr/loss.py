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

from collections.abc import Sequence

import torch
import torch.distributed
import torch.distributed.nn
from torch import Tensor, nn
from torch.nn import functional as F


class DRClipLoss(nn.Module):
    """Contrastive and distillation loss over one or two captions for each image.

    Args:
        local_loss: rows are the local samples only, columns the global batch; otherwise both are global.
        gather_with_grad: let gradients flow through the gathering of the student's features.
        cache_labels: keep the targets of the contrastive loss between steps.
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
            raise ValueError("DRClipLoss does not run under horovod: start with torchrun, without --horovod")
        self.local_loss = local_loss
        self.gather_with_grad = gather_with_grad
        self.cache_labels = cache_labels
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
        self.dist_logit_scale = list(scales) * (len(self.teacher_dimension) if len(scales) == 1 else 1)
        self._labels: dict[tuple[torch.device, int], Tensor] = {}

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
            raise ValueError("syn_text_features and dist_syn_text_features go together: one of them is None")
        with torch.autocast(device_type=image_features.device.type, enabled=False):
            pairs = [(text_features, dist_text_features)]
            if syn_text_features is not None:
                pairs.append((syn_text_features, dist_syn_text_features))
            contrastive = image_features.new_zeros((), dtype=torch.float32)
            distill = contrastive.clone()
            image, all_image = self._rows_and_columns(image_features.float())
            if self.distill_weight:
                dist_image, all_dist_image = self._teacher_rows_and_columns(dist_image_features)
            for student, teacher in pairs:
                text, all_text = self._rows_and_columns(student.float())
                logits = logit_scale * image @ all_text.T, logit_scale * text @ all_image.T
                if self.contrastive_weight:
                    labels = self._diagonal(logits[0])
                    contrastive = contrastive + sum(F.cross_entropy(side, labels) for side in logits) / 2
                if self.distill_weight:
                    dist_text, all_dist_text = self._teacher_rows_and_columns(teacher)
                    targets = (
                        self._distribution(dist_image, all_dist_text),
                        self._distribution(dist_text, all_dist_image),
                    )
                    sides = zip(logits, targets, strict=True)
                    distill = distill + sum(F.cross_entropy(side, target) for side, target in sides) / 2
            contrastive = self.contrastive_weight * contrastive
            distill = self.distill_weight * distill
        return {"contrastive_loss": contrastive, "distill_loss": distill} if output_dict else (contrastive, distill)

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
                gathered[self.rank] = features  # as OpenCLIP's gather_features: gradients reach one's own features
            everything = torch.cat(gathered)
        return (features, everything) if self.local_loss else (everything, everything)

    def _teacher_rows_and_columns(self, features: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        """The same for teacher features, without gradient and split by teacher, each ``[·, D_k]``."""
        dimensions = [features.shape[1]] if self.teacher_dimension == [-1] else self.teacher_dimension
        if sum(dimensions) != features.shape[1]:
            raise ValueError(
                f"teacher dimensions {' + '.join(map(str, dimensions))} = {sum(dimensions)} "
                f"(--distill-teacher-dimension), but the stored embeddings are {features.shape[1]} wide"
            )
        rows, columns = self._rows_and_columns(features.detach().float())
        return list(rows.split(dimensions, dim=1)), list(columns.split(dimensions, dim=1))

    @torch.no_grad()
    def _distribution(self, rows: list[Tensor], columns: list[Tensor]) -> Tensor:
        """The teachers' distribution over the columns for each row, ``[rows, columns]``, rows adding up to 1."""
        if None in self.dist_logit_scale:
            raise ValueError("no teacher scale: set dist_logit_scale (--distill-logit-scale, 100 in both recipes)")
        teachers = zip(self.dist_logit_scale, rows, columns, strict=True)
        logits = (scale * row @ column.T for scale, row, column in teachers)
        if self.average_after_softmax:
            return sum(side.softmax(dim=1) for side in logits) / len(rows)
        return sum(logits).softmax(dim=1)

    def _diagonal(self, logits: Tensor) -> Tensor:
        """The column in which each row's own pair stands, ``[rows]``."""
        key = (logits.device, len(logits))
        if key not in self._labels:
            first = self.rank * len(logits) if self.world_size > 1 and self.local_loss else 0
            labels = torch.arange(first, first + len(logits), device=logits.device)
            if not self.cache_labels:
                return labels
            self._labels = {key: labels}
        return self._labels[key]


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
