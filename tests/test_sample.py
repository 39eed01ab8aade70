"""One sample: what is selected belongs together; what is broken is reported, never run."""

import gzip
import io
import json
import pickle
import random
import zipfile

import numpy as np
import open_clip
import pytest
import torch
from PIL import Image
from shards import AUGMENTATION, encode, picture, reinforced_sample, stored_embeddings

from dr import sample as reinforcement
from dr.pipeline import keep_image_and_caption
from dr.sample import (
    MAX_CAPTION,
    BadSample,
    caption,
    decode_image,
    select,
    synthetic_captions,
)
from dr.sampling import RandomChoice
from dr.transforms import compose_from_config

COMPOSE = compose_from_config(AUGMENTATION)


@pytest.mark.parametrize("bf16", [False, True], ids=["npz", "pth.gz"])
@pytest.mark.parametrize("as_string", [False, True], ids=["list", "string"])
def test_the_embeddings_are_those_of_the_drawn_augmentation_and_captions(bf16, as_string):
    sample = reinforced_sample(3, bf16=bf16, as_string=as_string)
    stored = json.loads(sample["paug.json"])["param_aug"]
    stored = json.loads(stored) if as_string else stored
    seen = set()
    for seed in range(60):
        random.seed(seed)
        selected = select(sample, COMPOSE, RandomChoice())
        augmentation = stored.index(COMPOSE.compress(selected["params"]))
        original, synthetic = (int(text.split()[1]) for text in selected["captions"])
        assert original == 0 and synthetic > 0
        assert torch.equal(selected["image_emb"].float(), torch.full((12,), 3 + augmentation / 64))
        assert torch.equal(
            selected["text_emb"].float(),
            torch.tensor([[-3.0], [-3 - synthetic / 64]]).expand(2, 12),
        )
        assert (
            selected["image_emb"].dtype
            == selected["text_emb"].dtype
            == (torch.bfloat16 if bf16 else torch.float32)
        )
        assert selected["jpg"] == sample["jpg"]
        seen.add((augmentation, synthetic))
    assert len(seen) == 4 * 3  # every combination comes up


def test_mixing_draws_one_caption_with_the_given_probability():
    sample = reinforced_sample(3)
    for ratio, low, high in ((0.0, 0, 0), (1.0, 400, 400), (0.25, 70, 130)):
        random.seed(0)
        selected = [select(sample, COMPOSE, RandomChoice(), mix_ratio=ratio) for _ in range(400)]
        for one in selected:
            (text,) = one["captions"]
            assert torch.equal(one["text_emb"], torch.full((1, 12), -3 - int(text.split()[1]) / 64))
        assert (
            low <= sum(not one["captions"][0].startswith("caption 0") for one in selected) <= high
        )


def broken(**members):
    """A sample with other members; None leaves one out."""
    sample = {
        **reinforced_sample(5),
        **{name.replace("_", "."): data for name, data in members.items()},
    }
    return {name: data for name, data in sample.items() if data is not None}


def npz(**arrays):
    stream = io.BytesIO()
    np.savez(stream, **arrays)
    return stream.getvalue()


def rows(image=4, text=4, width=12, fill=0.5):
    return stored_embeddings(torch.full((image, width), fill), torch.full((text, width), fill))


def bomb():
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("image_emb.npy", bytes(2**27))
    return stream.getvalue()


def pth_gz(image_emb):
    stream = io.BytesIO()
    torch.save({"image_emb": image_emb, "text_emb": torch.zeros(4, 12)}, stream)
    return gzip.compress(stream.getvalue())


def params(entry):
    return b'{"param_aug": [%s]}' % b",".join([entry] * 4)


HUGE = str(10**400).encode()
BROKEN = {
    "few bytes, many rows": (broken(npz=None, pth_gz=pth_gz(torch.zeros(1, 1).expand(4, 2**26))), "oversized pth.gz"),
    "a tensor without data": (broken(npz=None, pth_gz=pth_gz(torch.zeros(4, 12, device="meta"))), "unreadable pth.gz"),
    "sparse": (broken(npz=None, pth_gz=pth_gz(torch.zeros(4, 12).to_sparse())), "unreadable pth.gz"),
    "huge box": (broken(paug_json=params(b"[[0,0,%s,9],null]" % HUGE)), "expected 4 int"),
    "huge magnitude": (broken(paug_json=params(b"[[0,0,9,9],[[1,%s],[1,1]]]" % HUGE)), "expected 2 pairs"),
    "many operations": (broken(paug_json=params(b"[[0,0,9,9],[%s]]" % b",".join([b"[1,1]"] * 99))), "expected 2 pairs"),
    "no image": (broken(jpg=None), r"lacks an image \(jpg or jpeg or png or webp\)"),
    "no caption": (broken(txt=None), r"lacks a caption \(txt\)"),
    "no synthetic captions": (broken(syn_json=None), "lacks synthetic captions"),
    "no parameters": (broken(paug_json=None), "lacks augmentation parameters"),
    "no embeddings": (broken(npz=None), r"lacks embeddings \(npz or safetensors or pth.gz\)"),
    "empty caption": (broken(txt=b" \n"), "empty caption"),
    "caption in another encoding": (broken(txt=b"caf\xe9"), "unreadable txt"),
    "bad json": (broken(syn_json=b'{"syn_text": ['), "unreadable syn.json"),
    "deep json": (broken(paug_json=b"[" * 100_000), "unreadable paug.json"),
    "json without the field": (broken(paug_json=b"{}"), "unreadable paug.json: expected an object with param_aug"),
    "no list of captions": (broken(syn_json=b'{"syn_text": "one"}'), "unreadable syn.json"),
    "a caption that is none": (broken(syn_json=b'{"syn_text": ["a", 3]}'), "unreadable syn.json"),
    "no list of parameters": (broken(paug_json=b'{"param_aug": "[1, 2"}'), "unreadable paug.json"),
    "wrong parameters": (broken(paug_json=b'{"param_aug": [[1], [1], [1], [1]]}'), "augmentation parameters"),
    "too few image rows": (broken(npz=rows(image=3)), "row counts disagree: image_emb has 3 rows for 4 augmentations"),
    "too many text rows": (broken(npz=rows(text=5)), "row counts disagree: text_emb has 5 rows for 1 original captions and 3 under syn_text"),
    "another width": (broken(npz=rows(width=11)), "embedding width: image_emb is 11 wide, expected 12"),
    "not finite": (broken(npz=rows(fill=float("nan"))), "embeddings are not finite"),
    "beyond float32": (broken(npz=npz(image_emb=np.full((4, 12), 1e99), text_emb=np.ones((4, 12)))), "not finite"),
    "integers": (broken(npz=npz(image_emb=np.ones((4, 12), int), text_emb=np.ones((4, 12)))), "image_emb is int64"),
    "float8": (broken(npz=None, pth_gz=pth_gz(torch.ones(4, 12).to(torch.float8_e4m3fn))), "image_emb is torch.float8"),
    "one array": (broken(npz=npz(image_emb=np.zeros((4, 12)))), "unreadable npz: KeyError"),
    "short npz": (broken(npz=rows()[:-200]), "unreadable npz"),
    "no npz": (broken(npz=b"hello"), "unreadable npz"),
    "zip bomb": (broken(npz=bomb()), "oversized npz: 134217728 bytes inflated"),
    "gzip bomb": (broken(npz=None, pth_gz=gzip.compress(bytes(2**27))), "oversized pth.gz"),
    "zip bomb in gzip": (broken(npz=None, pth_gz=gzip.compress(bomb())), "oversized pth.gz"),
    "no gzip": (broken(npz=None, pth_gz=b"hello"), "unreadable pth.gz"),
    "short pth.gz": (broken(npz=None, pth_gz=reinforced_sample(5, bf16=True)["pth.gz"][:-100]), "unreadable pth.gz"),
}  # fmt: skip


@pytest.mark.parametrize(("sample", "message"), BROKEN.values(), ids=BROKEN.keys())
def test_a_broken_sample_is_told_from_others_by_its_reason(sample, message):
    with pytest.raises(BadSample, match=message) as raised:
        select(sample, COMPOSE, RandomChoice(), width=12)
    assert str(raised.value).startswith(raised.value.reason)
    assert not any(
        digit in raised.value.reason for digit in "0123456789"
    )  # one reason for all samples of its kind


class Planted:
    """Unpickled, it leaves a file behind."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (open, (self.path, "w"))


@pytest.mark.parametrize(
    "where", ["npz", "array in npz", "pth.gz", "legacy pth.gz", "pickle in pth.gz"]
)
def test_a_planted_pickle_is_not_run(where, tmp_path):
    path, stream = tmp_path / "ran", io.BytesIO()
    planted = Planted(str(path))
    pickle.loads(pickle.dumps(planted)).close()
    assert path.exists()  # it does what it should, if it is run
    path.unlink()
    if where == "npz":
        members = {"npz": pickle.dumps(planted)}
    elif where == "array in npz":
        np.savez(stream, image_emb=np.array([planted], dtype=object), text_emb=np.zeros((4, 12)))
        members = {"npz": stream.getvalue()}
    else:
        if where == "pickle in pth.gz":
            stream.write(pickle.dumps(planted))
        else:
            torch.save(
                {"image_emb": planted}, stream, _use_new_zipfile_serialization=where == "pth.gz"
            )
        members = {"npz": None, "pth_gz": gzip.compress(stream.getvalue())}
    with pytest.raises(BadSample, match="unreadable"):
        select(broken(**members), COMPOSE, RandomChoice())
    assert not path.exists()


def test_a_stored_tensor_that_asks_for_gradients_gets_none():
    """Such a tensor can't leave a worker: the run would hang."""
    selected = select(
        broken(npz=None, pth_gz=pth_gz(torch.zeros(4, 12, requires_grad=True))),
        COMPOSE,
        RandomChoice(),
    )
    assert not selected["image_emb"].requires_grad


def test_images_of_every_kind_become_rgb():
    for mode, image_format in (
        ("RGB", "JPEG"),
        ("CMYK", "JPEG"),
        ("L", "PNG"),
        ("P", "PNG"),
        ("RGBA", "WEBP"),
    ):
        for size in ((40, 48), (1, 1)):
            sample = {
                "png": encode(picture(0, *size).convert(mode), image_format)
            }  # the member's name is not asked
            img = decode_image(sample)
            assert (img.mode, img.size) == ("RGB", size[::-1])


RAMP = np.tile(np.linspace(0, 65535, 64).astype(np.uint16), (4, 1))
LOGO = np.zeros((4, 6, 4), np.uint8)  # black, on a transparent ground
LOGO[1:3, 2:4, 3] = 255


def with_alpha(mode):
    return Image.fromarray(LOGO).convert(mode)


def palette_with_transparency():
    img = Image.fromarray(LOGO[..., 3] // 255 + 1).convert("P")  # 2: the logo, 1: the ground
    img.putpalette([0, 0, 0, 10, 10, 10, 0, 0, 0] + [0] * 759)
    return img


@pytest.mark.parametrize(
    ("img", "image_format", "options"),
    [
        (with_alpha("RGBA"), "PNG", {}),
        (with_alpha("LA"), "PNG", {}),
        (with_alpha("RGBA"), "WEBP", {"lossless": True}),
        (palette_with_transparency(), "PNG", {"transparency": 1}),
        (Image.fromarray(10 - 5 * (LOGO[..., 3] // 128)), "PNG", {"transparency": 10}),
        (Image.fromarray(LOGO[..., 3].astype(np.uint16) * 0 + 7), "PNG", {"transparency": 7}),
    ],
    ids=[
        "RGBA",
        "LA",
        "WebP",
        "palette",
        "grey with a transparent value",
        "16 bits, all transparent",
    ],
)
def test_transparency_is_composited_on_white(img, image_format, options):
    stream = io.BytesIO()
    img.save(stream, image_format, **options)
    found = np.asarray(decode_image({"png": stream.getvalue()}))
    logo = LOGO[..., 3] == 255
    if img.mode.startswith("I"):
        logo[:] = False
    assert (found[~logo] == 255).all() and (found[logo] < 12).all()


def test_sixteen_bits_are_scaled_to_eight():
    found = np.asarray(decode_image({"png": encode(Image.fromarray(RAMP), "PNG")}))
    assert found.shape == (4, 64, 3) and (found == found[..., :1]).all()
    assert np.abs(found[0, :, 0] - RAMP[0] / 257).max() <= 0.5


def test_a_jpeg_is_what_pillow_decodes():
    data = encode(picture(3))
    assert np.array_equal(decode_image({"jpg": data}), Image.open(io.BytesIO(data)))


# --- captions -------------------------------------------------------------------------------------
def long_captions():
    rng = random.Random(0)
    letters = "".join(rng.choices("abcdefghij", k=9000))
    yield letters
    yield "\N{FACE WITH TEARS OF JOY}" * 9000
    yield "a" * 9000
    yield " ".join("".join(rng.choices("aeiourstn", k=rng.randrange(1, 9))) for _ in range(3000))
    yield "word" + 9000 * " " + "another" + 5000 * "\n" + letters
    yield "&amp;lt;&#8217;" * 2000


@pytest.mark.parametrize("number", range(6))
def test_a_long_caption_is_cut_without_changing_its_tokens(number):
    tokenizer = open_clip.get_tokenizer("ViT-B-16")
    text = list(long_captions())[number]
    sample = {"txt": text.encode(), "syn.json": json.dumps({"syn_text": [text]}).encode()}
    for found in (caption(sample), *synthetic_captions(sample)):
        assert len(found) <= MAX_CAPTION < len(text)
        assert torch.equal(tokenizer([found]), tokenizer([text]))
    (kept,) = keep_image_and_caption([sample])
    assert kept == {"txt": caption(sample).encode()}
    short = {"txt": b" a  caption\n of many spaces "}
    assert caption(short) == "a  caption\n of many spaces"


def test_broken_and_oversized_images_are_told(monkeypatch):
    whole = encode(picture(0, 200, 300))
    for data in (whole[: len(whole) // 2], b"", b"<html>gone</html>"):
        with pytest.raises(BadSample, match="undecodable image"):
            decode_image({"jpg": data})
    with pytest.raises(BadSample, match="undecodable image"):
        decode_image({"jpg": encode(picture(0), "EPS")})  # Pillow would start ghostscript
    monkeypatch.setattr(reinforcement, "MAX_PIXELS", 1000)
    with pytest.raises(BadSample, match="oversized image: 300x200"):
        decode_image({"jpg": whole})
