"""Re-applying stored parameters gives the very pixels that were embedded."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision import transforms as T

from dr.transforms import RAND_AUGMENT_OPS, compose_from_config

DATA = Path(__file__).parent / "data"
GOLDEN = json.loads((DATA / "augmentations.json").read_text())
PIXELS = np.load(DATA / "augmentations.npz")
ALL = {
    "to_rgb": {"enable": True},
    "resize": {"size": 80},
    "random_crop": {"size": 72, "padding": 2},
    "random_resized_crop": {"size": 48, "interpolation": "bicubic"},
    "random_horizontal_flip": {"p": 0.5},
    "rand_augment": {"p": 0.7},
    "to_tensor": {"enable": True},
    "random_erase": {"p": 0.7, "value": [0.1, 0.2, 0.3]},
    "normalize": {"mean": [0.5, 0.4, 0.3], "std": [0.2, 0.3, 0.4]},
}


def picture(seed, height=90, width=120):
    """A smooth picture with some texture, so that every operation changes it."""
    rng = np.random.default_rng(seed)
    small = Image.fromarray(rng.integers(0, 256, (7, 9, 3), dtype=np.uint8)).resize(
        (width, height), Image.BICUBIC
    )
    noise = rng.integers(-20, 20, (height, width, 3))
    return Image.fromarray(np.clip(np.asarray(small).astype(int) + noise, 0, 255).astype(np.uint8))


def uint8_config(config):
    """The same without normalisation, so that the result is exact in uint8."""
    return {name: arguments for name, arguments in config.items() if name != "normalize"}


def as_uint8(tensor):
    return (tensor * 255).round().to(torch.uint8).permute(1, 2, 0).numpy()


@pytest.mark.parametrize("index", range(len(GOLDEN["params"])))
def test_known_answers_are_met_exactly_in_uint8(index):
    compose = compose_from_config(uint8_config(GOLDEN["config"]))
    img = Image.fromarray(PIXELS[f"image_{index}"])
    for stored, expected in zip(GOLDEN["params"][index], PIXELS[f"output_{index}"], strict=True):
        tensor, _ = compose.reapply(img, compose.decompress(stored))
        np.testing.assert_array_equal(as_uint8(tensor), expected, err_msg=str(stored))


def test_known_answer_is_met_after_normalisation():
    compose = compose_from_config(GOLDEN["config"])
    tensor, _ = compose.reapply(
        Image.fromarray(PIXELS["image_0"]), compose.decompress(GOLDEN["params"][0][0])
    )
    assert tensor.dtype == torch.float32
    np.testing.assert_array_equal(tensor.numpy(), PIXELS["normalized_0_0"])


def test_known_answers_cover_every_operation_and_both_signs():
    seen = {
        (op, magnitude > 0)
        for image in GOLDEN["params"]
        for _, ops in image
        for op, magnitude in ops
    }
    for op, (name, signed, _, _) in enumerate(RAND_AUGMENT_OPS):
        assert {sign for o, sign in seen if o == op} == (
            {True, False} if signed else {name in ("Posterize", "Solarize")}
        )


def test_fresh_draws_equal_torchvision():
    """One seed, the same pixels: RandomResizedCrop and RandAugment of torchvision, on 300 draws."""
    ours = compose_from_config(uint8_config(GOLDEN["config"]))
    theirs = T.Compose(
        [
            T.RandomResizedCrop(48, interpolation=T.InterpolationMode.BICUBIC),
            T.RandAugment(),
            T.ToTensor(),
        ]
    )
    ops = set()
    for seed in range(300):
        img = picture(seed % 10, height=60 + seed % 50, width=70 + seed % 37)
        torch.manual_seed(seed)
        expected = theirs(img)
        torch.manual_seed(seed)
        tensor, params = ours(img)
        assert torch.equal(tensor, expected), params
        assert torch.equal(ours.reapply(img, params)[0], expected), params
        ops.update(op for op, _ in params["rand_augment"])
    assert ops == set(range(len(RAND_AUGMENT_OPS)))


@pytest.mark.parametrize("magnitude", [0, 5, 17, 30])
def test_fresh_draws_equal_torchvision_at_other_magnitudes(magnitude):
    ours = compose_from_config(
        {
            "rand_augment": {
                "num_ops": 3,
                "magnitude": magnitude,
                "interpolation": "bilinear",
                "fill": [9, 8, 7],
            }
        }
    )
    theirs = T.RandAugment(3, magnitude, interpolation=T.InterpolationMode.BILINEAR, fill=[9, 8, 7])
    for seed in range(60):
        torch.manual_seed(seed)
        expected = theirs(picture(seed))
        torch.manual_seed(seed)
        np.testing.assert_array_equal(np.asarray(ours(picture(seed))[0]), np.asarray(expected))


def test_parameters_survive_json_and_reapply_exactly():
    compose = compose_from_config(ALL)
    skipped = set()
    for seed in range(100):
        torch.manual_seed(seed)
        img = picture(seed)
        tensor, params = compose(img)
        stored = json.loads(json.dumps(compose.compress(params)))
        again, params_again = compose.reapply(img, compose.decompress(stored))
        assert torch.equal(tensor, again)
        assert params_again == params
        assert compose.compress(params_again) == stored
        assert len(stored) == 5  # crop, resized crop, flip, rand_augment, erase
        skipped.update(i for i, entry in enumerate(stored) if entry is None)
    assert skipped == {3, 4}  # RandAugment and erasing were skipped at times, and stored as null


def test_erasing_and_flipping_equal_torchvision():
    ours = compose_from_config(
        {"random_horizontal_flip": {}, "to_tensor": {}, "random_erase": {"value": 0.25}}
    )
    theirs = T.Compose([T.RandomHorizontalFlip(), T.ToTensor(), T.RandomErasing(value=0.25)])
    for seed in range(50):
        torch.manual_seed(seed)
        expected = theirs(picture(seed))
        torch.manual_seed(seed)
        assert torch.equal(ours(picture(seed))[0], expected)


def test_a_stored_entry_of_datacompdr_decompresses():
    compose = compose_from_config(GOLDEN["config"])
    params = compose.decompress([[14, 87, 236, 275], [[9, -0.27], [3, -30.453]]])
    assert params == {
        "random_resized_crop": (14, 87, 236, 275),
        "rand_augment": ((9, -0.27), (3, -30.453)),
    }
    tensor, _ = compose.reapply(picture(0, 256, 400), params, size=64)
    assert tensor.shape == (3, 64, 64)


def test_the_order_in_the_config_does_not_matter():
    torch.manual_seed(0)
    one, params = compose_from_config(ALL)(picture(1))
    two, _ = compose_from_config(dict(reversed(ALL.items()))).reapply(picture(1), params)
    assert torch.equal(one, two)


def test_enable_false_removes_a_transform():
    config = {**ALL, "rand_augment": {"enable": False}, "random_crop": {"enable": False, "size": 3}}
    assert "rand_augment" not in compose_from_config(config).transforms
    assert (
        len(compose_from_config(config).compress(compose_from_config(config)(picture(0))[1])) == 3
    )


def test_other_picture_modes_become_rgb():
    compose = compose_from_config(GOLDEN["config"])
    for mode in ("L", "P", "CMYK", "RGBA", "LA", "I;16"):
        img = (
            Image.fromarray(np.arange(8100, dtype=np.uint16).reshape(90, 90))
            if mode == "I;16"
            else None
        )
        tensor, _ = compose(
            img or picture(0, 90, 90).convert("L" if mode == "LA" else "RGB").convert(mode)
        )
        assert tensor.shape == (3, 48, 48)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"colour_jitter": {}}, "colour_jitter"),
        ({"image_augmentation": {}}, "the one around it"),
        ({"random_resized_crop": {"size": 8, "siez": 9}}, "siez"),
        ({"random_resized_crop": {}}, "size"),
        ({"normalize": {"mean": [0], "std": [1]}}, "to_tensor"),
        ({"to_tensor": {}, "random_erase": {"value": "random"}}, "random_erase"),
    ],
)
def test_a_wrong_config_is_an_error_that_names_what_is_wrong(config, message):
    with pytest.raises(ValueError, match=message):
        compose_from_config(config)


@pytest.mark.parametrize(
    "stored",
    [
        [[0, 0, 9, 9]],
        [[0, 0, 9], None],
        [[0, 0, 9.5, 9], None],
        [[0, 0, float("inf"), 9], None],
        ["0099", None],
        [[0, 0, 9, 9], [[14, 0.0]]],
        [[0, 0, 9, 9], [[-1, 0.0]]],
        [[0, 0, 9, 9], [[1, float("nan")]]],
        [[0, 0, 9, 9], [[1]]],
        "[[0, 0, 9, 9], null]",
        None,
    ],
)
def test_wrong_stored_parameters_are_an_error(stored):
    with pytest.raises(ValueError, match="expected"):
        compose_from_config(GOLDEN["config"]).decompress(stored)


@pytest.mark.parametrize("box", [[0, 0, 91, 10], [0, 1, 10, 120], [-1, 0, 10, 10], [5, 5, 0, 5]])
def test_a_crop_box_outside_the_image_is_an_error(box):
    compose = compose_from_config(GOLDEN["config"])
    with pytest.raises(ValueError, match="not inside the image of 90x120"):
        compose.reapply(picture(0), compose.decompress([box, None]))
