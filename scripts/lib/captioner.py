"""Captioners: OpenCLIP's CoCa models, which write captions of images.

OpenCLIP's own ``generate`` draws from one random generator for a whole batch, so that a caption
would depend on the other images of its batch, and needs an old version of transformers. Here each
caption has random numbers of its own.
"""

import hashlib
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .models import load_model_or_exit

ROUNDS = 5  # of sampling: those after the first replace blank and repeated captions


class Sampling(NamedTuple):
    """How captions are written.

    Attributes:
        captions: number for each image.
        top_p: nucleus sampling: a token is drawn from the most probable ones, which together have
            this probability.
        temperature: divides the logits.
        beams: beam search with this number of beams takes the place of sampling; 0: sampling.
        max_tokens: length of a caption.
        seed: of the random numbers.
    """

    captions: int = 5
    top_p: float = 0.9
    temperature: float = 1.0
    beams: int = 0
    max_tokens: int = 30
    seed: int = 0


class Captioner:
    """A model that writes captions of images.

    Args:
        name: OpenCLIP model name, a model config file, or ``hf-hub:ORGANISATION/REPOSITORY``.
        pretrained: OpenCLIP tag, or a checkpoint file; empty for a name on the Hub.
        device: where it runs.
        precision: ``fp32``, or ``bf16`` for autocast.

    Raises:
        SystemExit: there is no such model, its weights cannot be loaded, or it writes no captions.
    """

    def __init__(self, name: str, pretrained: str, device: torch.device, precision: str) -> None:
        self.device, self.autocast = device, precision == "bf16"
        loaded = load_model_or_exit("captioner", name, pretrained, device)
        self.model, self.tokenizer = loaded.model, loaded.tokenizer
        if not hasattr(self.model, "generate"):
            raise SystemExit(
                f"error: the captioner {name} is a {type(self.model).__name__} without generate: "
                "expected a CoCa model, such as coca_ViT-L-14"
            )
        if not hasattr(self.tokenizer, "eot_token_id"):
            raise SystemExit(
                f"error: the tokenizer of the captioner {name} is a "
                f"{type(self.tokenizer).__name__}: expected OpenCLIP's SimpleTokenizer"
            )
        self.max_tokens: int = self.model.context_length
        self.preprocess: Callable[[Any], Tensor] = loaded.make_transform()
        self.start, self.end = self.tokenizer.sot_token_id, self.tokenizer.eot_token_id

    @torch.inference_mode()
    def write_captions(self, images: Tensor, uids: Sequence[str], how: Sampling) -> list[list[str]]:
        """Write captions of a batch of images, without blank and repeated ones.

        Args:
            images: float32 ``[B, 3, H, W]``, as ``preprocess`` returns them.
            uids: of the images, which the random numbers depend on.
            how: how to write.

        Returns:
            for each image ``how.captions`` of them, or fewer if not as many were found.
        """
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.autocast):
            embs = self.model._encode_image(images.to(self.device))[1]
            found: list[dict[str, None]] = [{} for _ in uids]  # sets that keep their order
            if how.beams:
                tokens = self._search_beams(embs, how).tolist()
                for captions, rows in zip(found, tokens, strict=True):
                    captions.update(dict.fromkeys(filter(None, map(self._decode, rows))))
            drawn = [0] * len(uids)
            for _ in range(0 if how.beams else ROUNDS):
                rows = [
                    (image, drawn[image] + number)
                    for image, captions in enumerate(found)
                    for number in range(how.captions - len(captions))
                ]
                if not rows:
                    break
                numbers = torch.stack([_draw(uids[image], number, how) for image, number in rows])
                places = torch.tensor([image for image, _ in rows], device=self.device)
                tokens = self._sample(embs[places], numbers.to(self.device), how).tolist()
                for (image, _), row in zip(rows, tokens, strict=True):
                    drawn[image] += 1
                    if caption := self._decode(row):
                        found[image].setdefault(caption)
        return [list(captions)[: how.captions] for captions in found]

    def _predict(self, embs: Tensor, tokens: Tensor) -> Tensor:
        """Logits ``[R, vocabulary]`` of the next token.

        Args:
            embs: of the images, ``[R, P, D]``.
            tokens: so far, ``[R, T]``.
        """
        logits = self.model.text_decoder(embs, self.model._encode_text(tokens)[1])[:, -1].float()
        logits[:, self.start] = -torch.inf
        return logits

    def _sample(self, embs: Tensor, numbers: Tensor, how: Sampling) -> Tensor:
        """Draw a caption for each row.

        Args:
            embs: of the images, ``[R, P, D]``.
            numbers: uniform random numbers, ``[R, max_tokens]``.
            how: how to draw.

        Returns:
            tokens ``[R, T]``: the start, the caption, and from its end on the end token.
        """
        tokens = torch.full((len(embs), 1), self.start, device=self.device)
        for step in range(how.max_tokens):
            rows = (tokens[:, -1] != self.end).nonzero()[:, 0]
            if not len(rows):
                break
            logits = self._predict(embs[rows], tokens[rows])
            drawn = draw_tokens(logits / how.temperature, numbers[rows, step], how.top_p)
            added = torch.full((len(embs), 1), self.end, device=self.device)
            added[rows, 0] = drawn
            tokens = torch.cat([tokens, added], dim=1)
        return tokens

    def _search_beams(self, embs: Tensor, how: Sampling) -> Tensor:
        """The most probable captions, by mean log-probability of a token.

        Args:
            embs: of the images, ``[B, P, D]``.
            how: how to search.

        Returns:
            tokens ``[B, beams, T]``, the best first.
        """
        count, beams = len(embs), how.beams
        embs = embs.repeat_interleave(beams, dim=0)
        tokens = torch.full((count, beams, 1), self.start, device=self.device)
        scores = torch.full((count, beams), -torch.inf, device=self.device)
        scores[:, 0] = 0  # all beams begin as one
        lengths = torch.ones_like(scores)
        for _ in range(how.max_tokens):
            ended = tokens[:, :, -1] == self.end
            if ended.all():
                break
            log_probs = self._predict(embs, tokens.flatten(0, 1)).log_softmax(1)
            log_probs = log_probs.unflatten(0, (count, beams))
            log_probs[ended] = -torch.inf  # a caption that has ended stays as it is
            log_probs[:, :, self.end].masked_fill_(ended, 0)
            totals = (scores[:, :, None] + log_probs).flatten(1)
            scores, best = totals.topk(beams, dim=1)
            parents, added = best // log_probs.shape[2], best % log_probs.shape[2]
            lengths = lengths.gather(1, parents) + ~ended.gather(1, parents)
            kept = parents[:, :, None].expand(-1, -1, tokens.shape[2])
            tokens = torch.cat([tokens.gather(1, kept), added[:, :, None]], dim=2)
        order = (scores / lengths).argsort(dim=1, descending=True)
        return tokens.gather(1, order[:, :, None].expand_as(tokens))

    def _decode(self, tokens: Sequence[int]) -> str:
        """The text between start and end token, with single spaces; it may be empty."""
        written = list(tokens)[1:]
        if self.end in written:
            written = written[: written.index(self.end)]
        return " ".join(self.tokenizer.decode(written).split())


def _draw(uid: str, number: int, how: Sampling) -> Tensor:
    """The uniform random numbers ``[max_tokens]`` of an image's caption with this number."""
    digest = hashlib.sha256(f"{how.seed} {uid} {number}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little", signed=True))
    return torch.rand(how.max_tokens, generator=generator)


def draw_tokens(logits: Tensor, numbers: Tensor, top_p: float) -> Tensor:
    """Draw a token for each row by nucleus sampling (Holtzman et al., arXiv 1904.09751).

    Args:
        logits: ``[R, vocabulary]``.
        numbers: uniform random numbers ``[R]``, which decide.
        top_p: the fewest tokens whose probabilities sum up to this or more are drawn from.

    Returns:
        tokens ``[R]``.
    """
    probabilities, tokens = logits.softmax(1).sort(dim=1, descending=True, stable=True)
    sums = probabilities.cumsum(1)
    kept = sums - probabilities < top_p
    wanted = numbers * sums.masked_fill(~kept, 0).amax(1)
    place = (sums <= wanted[:, None]).sum(1).minimum(kept.sum(1) - 1)
    return tokens.gather(1, place[:, None])[:, 0]
