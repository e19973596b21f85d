"""The window of the image that is kept, against torchvision's rules worked out by hand."""

import pytest

from service import geometry
from service.artifact import InputSpec, Resize


def spec(height=224, width=224, mode="crop", shorter_side=256):
    side = shorter_side if mode == "crop" else None
    return InputSpec(height=height, width=width, resize=Resize(mode=mode, shorter_side=side))


@pytest.mark.parametrize(
    ("size", "shorter_side", "resized"),
    [
        ((500, 375), 256, (341, 256)),  # 341.33 is cut, not rounded
        ((375, 500), 256, (256, 341)),
        ((640, 427), 232, (347, 232)),  # 347.7
        ((256, 256), 256, (256, 256)),
        ((8, 8), 32, (32, 32)),
        ((30_000, 1), 32, (960_000, 32)),
    ],
)
def test_resized_size_is_torchvisions(size, shorter_side, resized):
    assert geometry.resized_size(*size, shorter_side) == resized


def test_crop_is_the_centre_of_the_resized_image_taken_back_to_the_source():
    window = geometry.window(500, 375, 1, spec())

    # Resized to 341x256; crop starts at round(58.5) = 58 (half to even) and at 16.
    assert window.box == pytest.approx((58 * 500 / 341, 16 * 375 / 256, 282 * 500 / 341, 240 * 375 / 256))
    assert (window.width, window.height) == (224, 224)


def test_without_a_shorter_side_the_crop_takes_all_it_can():
    window = geometry.window(100, 50, 1, InputSpec(height=32, width=32))

    assert window.box == pytest.approx((25, 0, 75, 50))


def test_stretch_takes_everything():
    window = geometry.window(30_000, 1, 1, spec(32, 64, "stretch"))

    assert window.box == (0, 0, 30_000, 1)
    assert (window.width, window.height) == (64, 32)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_oriented_window_stays_inside_and_keeps_its_shape(orientation):
    window = geometry.window(501, 333, orientation, spec(200, 100, shorter_side=210))

    assert 0 <= window.left < window.right <= 501
    assert 0 <= window.top < window.bottom <= 333
    assert (window.width, window.height) == ((100, 200) if orientation < 5 else (200, 100))


def test_half_pixel_of_a_rounded_crop_moves_to_the_other_side_when_the_image_is_mirrored():
    upright = geometry.window(500, 375, 1, spec())
    mirrored = geometry.window(500, 375, 2, spec())

    assert mirrored.left == pytest.approx(500 - upright.right)
    assert mirrored.right == pytest.approx(500 - upright.left)
    assert mirrored.left != pytest.approx(upright.left)


def test_shrink_is_that_of_the_less_shrunk_axis():
    assert geometry.window(1000, 100, 1, spec(50, 50, "stretch")).shrink == 2
    assert geometry.window(8, 8, 1, spec(32, 32, "stretch")).shrink == 0.25


def test_reach_covers_the_filter_and_ends_at_the_image():
    window = geometry.Window(100, 10, 300, 110, 100, 100)

    # Horizontally 2:1, so bicubic reads 2 * 2 pixels beyond, vertically 1:1, so 2; one more for fractions.
    assert window.reach(500, 500) == (95, 7, 305, 113)
    assert window.reach(302, 111) == (95, 7, 302, 111)


def test_window_of_a_scaled_decode_and_of_a_part():
    window = geometry.Window(100, 10, 300, 110, 50, 50)

    assert window.scaled(4).box == (25, 2.5, 75, 27.5)
    assert window.within(90, 10).box == (10, 0, 210, 100)
