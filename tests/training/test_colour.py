import numpy as np
import pytest
import torch
from PIL import Image, ImageEnhance, ImageOps

from training import colour


@pytest.fixture(scope="module")
def picture():
    pixels = np.random.default_rng(0).integers(20, 200, (32, 32, 3), dtype=np.uint8)
    return Image.fromarray(pixels).resize((64, 48), Image.Resampling.BICUBIC)


def tensor(picture):
    return torch.from_numpy(np.asarray(picture).copy()).permute(2, 0, 1)[None].float() / 255


def difference(result, picture):
    """Largest difference in 8-bit levels."""
    return (result * 255 - tensor(picture) * 255).abs().max().item()


@pytest.mark.parametrize("factor", [0.3, 1.0, 1.7])
@pytest.mark.parametrize(
    ("ours", "pillows"),
    [
        (colour.brightness, ImageEnhance.Brightness),
        (colour.contrast, ImageEnhance.Contrast),
        (colour.saturation, ImageEnhance.Color),
        (colour.sharpness, ImageEnhance.Sharpness),
    ],
)
def test_enhancements_agree_with_pillow(picture, ours, pillows, factor):
    result = ours(tensor(picture), torch.tensor([factor]))
    assert difference(result, pillows(picture).enhance(factor)) <= 2


@pytest.mark.parametrize("bits", [1, 4, 8])
def test_posterize_agrees_with_pillow(picture, bits):
    assert difference(colour.posterize(tensor(picture), torch.tensor([bits])), ImageOps.posterize(picture, bits)) < 0.01


def test_solarize_agrees_with_pillow(picture):
    result = colour.solarize(tensor(picture), torch.tensor([128 / 255]))
    assert difference(result, ImageOps.solarize(picture, 128)) < 0.01


def test_autocontrast_agrees_with_pillow(picture):
    assert difference(colour.autocontrast(tensor(picture)), ImageOps.autocontrast(picture)) <= 1


def test_equalize_agrees_with_pillow(picture):
    assert difference(colour.equalize(tensor(picture)), ImageOps.equalize(picture)) < 0.01


def test_what_resampling_leaves_of_exact_values_is_taken_for_them():
    """`grid_sample` leaves them some 1e-7 off: a constant channel would turn black, a level lose a whole step."""
    torch.manual_seed(0)
    levels = torch.randint(0, 4, (2, 3, 16, 16)) * 64 / 255
    flat = torch.full((2, 3, 16, 16), 200 / 255)
    off = (torch.rand(2, 3, 16, 16) - 0.5) * 4e-7
    torch.testing.assert_close(colour.autocontrast(flat + off), flat, atol=1e-6, rtol=0)
    torch.testing.assert_close(colour.posterize(levels + off, torch.tensor([2, 2])), levels, atol=1e-6, rtol=0)


def test_constant_images_survive():
    flat = torch.full((2, 3, 8, 8), 0.5)
    factor = torch.tensor([0.2, 1.8])
    torch.testing.assert_close(colour.autocontrast(flat), flat)
    torch.testing.assert_close(colour.contrast(flat, factor), flat, atol=1e-4, rtol=0)
    assert colour.equalize(flat).isfinite().all()


def test_gray_images_have_no_saturation():
    gray = torch.rand(3, 1, 6, 6)
    torch.testing.assert_close(colour.saturation(gray, torch.tensor([0.0, 0.5, 2.0])), gray)


def test_each_image_has_its_own_factor():
    images = torch.full((2, 1, 4, 4), 0.4)
    result = colour.brightness(images, torch.tensor([0.5, 2.0]))
    assert result[:, 0, 0, 0].tolist() == pytest.approx([0.2, 0.8])


def test_contrast_is_about_the_mean_of_the_luma():
    pixels = np.zeros((8, 8, 3), np.uint8) + np.array([20, 200, 20], np.uint8)
    pixels[:4] //= 2
    picture = Image.fromarray(pixels)
    tensor = torch.from_numpy(pixels).permute(2, 0, 1)[None].float() / 255
    found = colour.contrast(tensor, torch.tensor([0.3])) * 255
    wanted = np.asarray(ImageEnhance.Contrast(picture).enhance(0.3)).transpose(2, 0, 1)
    assert np.abs(found[0].numpy() - wanted).max() <= 2
