"""Decoding: every kind of image file gives the same square of RGB pixels."""

import os
import struct
from pathlib import Path

import numpy as np
import pytest
from PIL import EpsImagePlugin, Image
from PIL.JpegImagePlugin import JpegImageFile

from net.data.decode import decode
from net.readers.image import UnreadableImageError
from tests.pictures import picture


def gradient(width: int = 90, height: int = 60) -> Image.Image:
    """Red increases to the right and green downwards, so that orientation and channel order show."""
    rows, columns = np.mgrid[:height, :width]
    pixels = np.stack([255 * columns // (width - 1), 255 * rows // (height - 1), np.full_like(rows, 40)], -1)
    return Image.fromarray(pixels.astype(np.uint8))


def difference(one: np.ndarray, other: np.ndarray) -> float:
    return float(np.abs(one.astype(float) - other.astype(float)).mean())


def test_scales_the_shorter_side_and_cuts_the_centre(tmp_path: Path) -> None:
    for size in ((90, 60), (60, 90)):
        image = gradient(*size)
        image.save(tmp_path / "a.png")
        side = min(size)
        left, top = (size[0] - side) // 2, (size[1] - side) // 2
        expected = image.crop((left, top, left + side, top + side)).resize((32, 32), Image.Resampling.BICUBIC)
        result = decode(tmp_path / "a.png", 32)
        assert result.shape == (32, 32, 3)
        assert result.dtype == np.uint8
        assert difference(result, np.asarray(expected)) < 0.5


def test_pixels_of_the_right_size_stay(tmp_path: Path) -> None:
    image = picture(0, 0, 48, 48)
    image.save(tmp_path / "a.png")
    assert np.array_equal(decode(tmp_path / "a.png", 48), np.asarray(image))


@pytest.mark.parametrize("size", [(1, 1), (3, 200), (2000, 10)])
def test_any_size(tmp_path: Path, size: tuple[int, int]) -> None:
    Image.new("RGB", size, (10, 200, 30)).save(tmp_path / "a.png")
    assert (decode(tmp_path / "a.png", 32) == np.array([10, 200, 30])).all()


def test_large_jpeg_is_decoded_at_a_fraction(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """At a half, quarter or eighth of its size: the smallest that is large enough."""
    image = picture(2, 1, 1200, 900)
    image.save(tmp_path / "a.jpg", quality=95)
    decoded = []
    load = JpegImageFile.load

    def noted(self: JpegImageFile) -> object:
        decoded.append(self.size)
        return load(self)

    monkeypatch.setattr(JpegImageFile, "load", noted)
    for size, at in ((64, (150, 113)), (256, (600, 450)), (500, (1200, 900))):
        square = image.crop((150, 0, 1050, 900)).resize((size, size), Image.Resampling.BICUBIC)
        assert difference(decode(tmp_path / "a.jpg", size), np.asarray(square)) < 4
        assert decoded[-1] == at


def test_scaling_is_pillow_s_bicubic_with_antialiasing(tmp_path: Path) -> None:
    """On noise, which distinguishes filters: bilinear differs by 10 gray levels, no antialiasing by 35."""
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (120, 120, 3), dtype=np.uint8))
    noise.save(tmp_path / "a.png")
    for size in (48, 200):
        expected = np.asarray(noise.resize((size, size), Image.Resampling.BICUBIC))
        assert difference(decode(tmp_path / "a.png", size), expected) < 1


def modes() -> dict[str, tuple[str, Image.Image, np.ndarray]]:
    """For each kind of file: its name, the image, and the RGB pixels it represents."""
    rgb = gradient(60, 60)
    pixels = np.asarray(rgb)
    gray = rgb.convert("L")
    gray_rgb = np.asarray(gray.convert("RGB"))
    wide = np.asarray(gray).astype(np.uint16) * 257
    transparent = rgb.convert("RGBA")
    transparent.putalpha(Image.fromarray(np.where(np.arange(60)[:, None] < 30, 255, 0).repeat(60, 1).astype(np.uint8)))
    on_white = pixels.copy()
    on_white[30:] = 255
    palette = rgb.quantize(256)
    half = gray.copy().convert("LA")
    half.putalpha(Image.new("L", (60, 60), 0))
    return {
        "rgb": ("a.png", rgb, pixels),
        "bmp": ("a.bmp", rgb, pixels),
        "webp": ("a.webp", rgb, pixels),
        "gray": ("a.png", gray, gray_rgb),
        "gray jpeg": ("a.jpg", gray, gray_rgb),
        "16-bit": ("a.png", Image.fromarray(wide), gray_rgb),
        "16-bit tiff": ("a.tif", Image.fromarray(wide), gray_rgb),
        "one bit": ("a.png", gray.convert("1"), np.asarray(gray.convert("1").convert("RGB"))),
        "palette": ("a.png", palette, np.asarray(palette.convert("RGB"))),
        "gif": ("a.gif", palette, np.asarray(palette.convert("RGB"))),
        "alpha": ("a.png", transparent, on_white),
        "gray with alpha": ("a.png", half, np.full_like(pixels, 255)),
        "cmyk": ("a.jpg", rgb.convert("CMYK"), pixels),
        "cmyk tiff": ("a.tif", rgb.convert("CMYK"), pixels),
    }


@pytest.mark.parametrize("kind", list(modes()))
def test_every_mode(tmp_path: Path, kind: str) -> None:
    name, image, expected = modes()[kind]
    image.save(tmp_path / name, **({"quality": 95} if name.endswith(("jpg", "webp")) else {}))
    assert difference(decode(tmp_path / name, 60), expected) < (3 if name.endswith(("jpg", "webp")) else 0.01)


def test_palette_with_a_transparent_colour(tmp_path: Path) -> None:
    image = Image.new("P", (60, 60), 1)
    image.putpalette([0, 0, 0, 200, 10, 10])
    image.paste(0, (0, 0, 60, 30))
    image.save(tmp_path / "a.png", transparency=0)
    result = decode(tmp_path / "a.png", 60)
    assert (result[:30] == 255).all()
    assert (result[30:] == np.array([200, 10, 10])).all()


@pytest.mark.parametrize("orientation", range(1, 9))
def test_orientation_tag(tmp_path: Path, orientation: int) -> None:
    upright = gradient(64, 64)
    undo = {
        2: Image.Transpose.FLIP_LEFT_RIGHT,
        3: Image.Transpose.ROTATE_180,
        4: Image.Transpose.FLIP_TOP_BOTTOM,
        5: Image.Transpose.TRANSPOSE,
        6: Image.Transpose.ROTATE_90,
        7: Image.Transpose.TRANSVERSE,
        8: Image.Transpose.ROTATE_270,
    }
    stored = upright.transpose(undo[orientation]) if orientation > 1 else upright
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored.save(tmp_path / "a.jpg", quality=98, exif=exif)
    assert difference(decode(tmp_path / "a.jpg", 64), np.asarray(upright)) < 3


def test_an_orientation_that_cannot_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The pixels are whole. But memory that is not enough is no damage: the image would be packed unturned."""
    gradient(64, 64).save(tmp_path / "a.png")
    expected = decode(tmp_path / "a.png", 64)

    errors: list[BaseException] = [SyntaxError("not a TIFF file"), struct.error("short"), MemoryError()]

    def fail(self: Image.Image) -> None:
        raise errors.pop(0)

    monkeypatch.setattr(Image.Image, "getexif", fail)
    for _ in range(2):
        assert (decode(tmp_path / "a.png", 64) == expected).all()
    with pytest.raises(MemoryError):
        decode(tmp_path / "a.png", 64)
    for value in ([6], "6", (6, 6), None, 9):
        monkeypatch.setattr(Image.Image, "getexif", lambda self, value=value: {0x0112: value})
        assert (decode(tmp_path / "a.png", 64) == expected).all()


def test_damaged_files_say_why(tmp_path: Path) -> None:
    picture(0, 0, 80, 80).save(tmp_path / "whole.jpg")
    content = (tmp_path / "whole.jpg").read_bytes()
    cases = {
        "truncated.jpg": content[: len(content) // 2],
        "empty.jpg": b"",
        "text.jpg": b"this is no picture",
        "header.jpg": content[:20],
    }
    for name, damaged in cases.items():
        (tmp_path / name).write_bytes(damaged)
        with pytest.raises(UnreadableImageError) as refused:
            decode(tmp_path / name, 32)
        assert str(refused.value)
        assert "\n" not in str(refused.value)


def test_no_file_and_floating_point_pixels(tmp_path: Path) -> None:
    with pytest.raises(UnreadableImageError, match="does not exist"):
        decode(tmp_path / "nowhere.jpg", 32)
    os.mkfifo(tmp_path / "pipe.jpg")
    with pytest.raises(UnreadableImageError, match="is a pipe"):
        decode(tmp_path / "pipe.jpg", 32)
    Image.fromarray(np.random.default_rng(0).random((40, 40), np.float32)).save(tmp_path / "a.tif")
    with pytest.raises(UnreadableImageError, match="floating-point pixels"):
        decode(tmp_path / "a.tif", 32)


def test_whatever_a_decoder_raises_is_about_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Image.new("RGB", (40, 40)).save(tmp_path / "a.png")
    for error in (struct.error("short"), RuntimeError("short"), AttributeError("short"), NotImplementedError("short")):

        def fail(*_: object, error: Exception = error) -> None:
            raise error

        monkeypatch.setattr(Image.Image, "draft", fail)
        with pytest.raises(UnreadableImageError, match="short"):
            decode(tmp_path / "a.png", 32)


def test_a_bomb_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    Image.new("RGB", (100, 100)).save(tmp_path / "a.png")
    with pytest.raises(UnreadableImageError, match="decompression bomb"):
        decode(tmp_path / "a.png", 32)


@pytest.mark.parametrize("name", ["cat.jpg", "cat.eps"])
def test_no_program_is_started(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """Pillow detects formats by content, and runs Ghostscript for PostScript."""
    started = []
    monkeypatch.setattr(EpsImagePlugin, "Ghostscript", lambda *_, **__: started.append(1))
    head = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 40 40\n%%EndComments\n%%EOF\n"
    (tmp_path / name).write_bytes(head)
    assert Image.open(tmp_path / name).format == "EPS"
    with pytest.raises(UnreadableImageError, match="no image in a raster format"):
        decode(tmp_path / name, 32)
    assert started == []


def test_every_raster_format_is_known(tmp_path: Path) -> None:
    image = picture(0, 0, 32, 32)
    for name in ("a.bmp", "a.gif", "a.ico", "a.pcx", "a.ppm", "a.sgi", "a.tga", "a.tif", "a.png", "a.webp", "a.jpg"):
        image.save(tmp_path / name)
        assert decode(tmp_path / name, 32).shape == (32, 32, 3)


@pytest.mark.parametrize("suffix", ["png", "jpg", "webp"])
def test_metadata_that_are_damaged_turn_nothing(tmp_path: Path, suffix: str) -> None:
    image = picture(0, 0, 64, 64)
    for name, extra in (("plain", {}), ("garbage", {"exif": b"Exif\0\0garbage"})):
        image.save(tmp_path / f"{name}.{suffix}", **extra)
    assert np.array_equal(decode(tmp_path / f"garbage.{suffix}", 64), decode(tmp_path / f"plain.{suffix}", 64))


def test_integer_pixels_without_an_agreed_range(tmp_path: Path) -> None:
    gray = np.asarray(gradient().convert("L"))
    Image.fromarray(gray.astype(np.int32)).save(tmp_path / "i.tif")
    with pytest.raises(UnreadableImageError, match="32-bit and signed pixels have no agreed range"):
        decode(tmp_path / "i.tif", 32)
    Image.fromarray(gray.astype(np.uint16)).save(tmp_path / "dark.png")
    with pytest.raises(UnreadableImageError, match="none is above 255"):
        decode(tmp_path / "dark.png", 32)
