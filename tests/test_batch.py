"""A reinforced batch goes through the training step with its rows in place."""

import torch
from torchvision.transforms import functional as F

from dr.batch import Batch, add_teacher, share_of_gradient, unpack_batch

STATISTICS = torch.tensor([[0.5, 0.4, 0.3], [0.2, 0.3, 0.4]])


def reinforced_batch(size=5, captions=2):
    images = torch.arange(size * 12, dtype=torch.uint8).reshape(size, 2, 2, 3)
    texts = (
        torch.arange(size)[:, None, None] * 10
        + torch.arange(captions)[None, :, None]
        + torch.zeros(1, 1, 7, dtype=int)
    )
    uids = [str(number) for number in range(size)]
    return Batch(
        images, texts, uids, torch.rand(size, 4), torch.rand(size, captions, 4), STATISTICS
    )


def test_texts_become_one_batch_originals_first_and_are_split_again():
    batch = reinforced_batch()
    images, texts, teacher = unpack_batch(batch, torch.device("cpu"))
    pixels = torch.stack([F.to_tensor(image.numpy()) for image in batch.images])
    assert torch.equal(images, F.normalize(pixels, *STATISTICS.tolist()))
    assert texts[:, 0].tolist() == [0, 10, 20, 30, 40, 1, 11, 21, 31, 41]
    out = add_teacher(
        {"image_features": images, "text_features": texts, "logit_scale": torch.tensor(1.0)},
        teacher,
    )
    assert out["text_features"][:, 0].tolist() == [0, 10, 20, 30, 40]
    assert out["syn_text_features"][:, 0].tolist() == [1, 11, 21, 31, 41]
    assert torch.equal(out["dist_image_features"], batch.image_emb)
    assert torch.equal(out["dist_text_features"], batch.text_emb[:, 0])
    assert torch.equal(out["dist_syn_text_features"], batch.text_emb[:, 1])


def test_with_one_caption_there_is_no_second_term():
    batch = reinforced_batch(captions=1)
    _, texts, teacher = unpack_batch(batch, torch.device("cpu"))
    assert torch.equal(texts, batch.texts[:, 0])
    out = add_teacher({"text_features": texts}, teacher)
    assert set(out) == {"text_features", "dist_image_features", "dist_text_features"}


def test_a_plain_batch_and_its_output_stay_what_they_are():
    images, texts = reinforced_batch()[:2]
    found = unpack_batch(Batch(images, texts[:, :1], []), torch.device("cpu"))
    assert found[0] is images and torch.equal(found[1], texts[:, 0]) and found[2] == {}
    own = texts[:, 0]  # of OpenCLIP's stages
    assert unpack_batch(Batch(images, own, []), torch.device("cpu"))[1] is own
    assert unpack_batch((images, texts), torch.device("cpu")) == (images, texts, {})
    out = {"text_features": texts, "logits": images}
    assert add_teacher(out, {}) == out
    scale = torch.tensor(3.0, requires_grad=True)
    assert share_of_gradient(scale, {}, 4) is scale


def test_the_logit_scale_keeps_its_value_and_shares_its_gradient():
    scale = torch.tensor(14.285714, requires_grad=True)
    shared = share_of_gradient(scale, {"dist_image_features": scale}, 3)
    assert shared.item() == scale.item()
    shared.backward()
    torch.testing.assert_close(scale.grad, torch.tensor(1 / 3))
