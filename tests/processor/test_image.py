"""image.py against transformers' own processors, and against what a few lines of PIL say."""

from __future__ import annotations

import io
import json
import threading
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps
from transformers import AutoImageProcessor
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.llava.image_processing_pil_llava import LlavaImageProcessorPil

import llava_fast.processor.image as image_module
from llava_fast.errors import ConfigError, ImageError
from llava_fast.processor.image import CLIP_MEAN, CLIP_STD, ImageProcessor, load_image
from tests.realdata import real_data

MEAN = torch.tensor(CLIP_MEAN).view(3, 1, 1)
STD = torch.tensor(CLIP_STD).view(3, 1, 1)


def reference(image: Image.Image, size: int, aspect: str) -> torch.Tensor:
    kind = LlavaImageProcessorPil if aspect == "pad" else CLIPImageProcessorPil
    processor = kind(size={"shortest_edge": size}, crop_size={"height": size, "width": size}, do_pad=aspect == "pad")
    return processor(image, return_tensors="pt")["pixel_values"][0]


def grey_levels(pixels: torch.Tensor) -> torch.Tensor:
    return (pixels * STD + MEAN) * 255


def difference(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    return (grey_levels(a) - grey_levels(b)).abs()


def noise(width: int, height: int, channels: int = 3, seed: int = 0) -> np.ndarray:
    """Black and white noise: the hardest picture for a filter that rounds between its passes."""
    values = np.random.default_rng(seed).integers(0, 2, (height, width, channels), dtype=np.uint8) * 255
    return values if channels > 1 else values[:, :, 0]


def smooth(width: int, height: int) -> Image.Image:
    x, y = np.meshgrid(np.arange(width), np.arange(height))
    bands = [127 + 120 * np.sin(x / 31 + i) * np.cos(y / 23 - i) for i in range(3)]
    return Image.fromarray(np.stack(bands, -1).astype(np.uint8))


def encode(image: Image.Image, kind: str, **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


# ---- the arithmetic


@pytest.mark.parametrize("aspect", ["square", "pad"])
@pytest.mark.parametrize("size", [224, 336])
def test_real_photos_match_transformers(size: int, aspect: str):
    photos = sorted(real_data("photos").iterdir())
    photos += sorted(real_data("llava_pretrain", "images").rglob("*.jpg"))[::50]
    photos += sorted(real_data("scienceqa", "images").rglob("*.png"))[::20]
    assert len(photos) > 12
    processor = ImageProcessor(size, aspect)
    for path in photos:
        apart = difference(processor(path), reference(load_image(path), size, aspect))
        assert apart.max() < 1.01, path
        assert apart.mean() < 1e-3, path


@pytest.mark.parametrize("aspect", ["square", "pad"])
@pytest.mark.parametrize(
    "shape",
    [(1, 1), (2, 3), (97, 101), (101, 97), (336, 336), (337, 335), (640, 480), (300, 1199), (1199, 300)],
)
def test_hard_pictures_of_ordinary_shape_are_exact(shape: tuple[int, int], aspect: str):
    image = Image.fromarray(noise(*shape))
    apart = difference(ImageProcessor(336, aspect)(image), reference(image, 336, aspect))
    assert apart.max() < 0.01


ELONGATED = [(1, 500), (500, 1), (3, 2000), (2000, 3), (50, 210), (210, 50), (300, 1300), (1300, 300)]


@pytest.mark.parametrize("aspect", ["square", "pad"])
@pytest.mark.parametrize("shape", ELONGATED)
def test_elongated_pictures_match_transformers(shape: tuple[int, int], aspect: str):
    image = smooth(*shape)
    apart = difference(ImageProcessor(112, aspect)(image), reference(image, 112, aspect))
    assert apart.max() < 1.01
    assert apart.mean() < 0.02


@pytest.mark.parametrize("aspect", ["square", "pad"])
@pytest.mark.parametrize("size", [48, 64])
@pytest.mark.parametrize("shape", ELONGATED)
def test_computing_only_a_part_changes_nothing(
    shape: tuple[int, int], size: int, aspect: str, monkeypatch: pytest.MonkeyPatch
):
    image = Image.fromarray(noise(*shape))
    monkeypatch.setattr(image_module, "_COSTLY", 0)
    apart = difference(ImageProcessor(size, aspect)(image), two_passes(image, size, aspect)).round()
    assert apart.max() <= 2  # a box is held in float32, and black and white noise doubles a level's difference
    assert (apart > 0).float().mean() < 0.01


def two_passes(image: Image.Image, size: int, aspect: str) -> torch.Tensor:
    """The whole picture resized, first in width, then in height; cut or padded in numpy."""
    pixels = np.asarray(image)
    short, long = min(image.size), max(image.size)
    if aspect == "pad":
        square = np.full((long, long, 3), (122, 116, 104), np.uint8)
        top, left = (long - image.height) // 2, (long - image.width) // 2
        square[top : top + image.height, left : left + image.width] = pixels
        image, width, height = Image.fromarray(square), size, size
    else:
        width, height = (int(size * side / short) for side in image.size)
    image = image.resize((width, image.height), Image.Resampling.BICUBIC)
    pixels = np.asarray(image.resize((width, height), Image.Resampling.BICUBIC))
    top, left = (height - size) // 2, (width - size) // 2
    part = torch.from_numpy(pixels[top : top + size, left : left + size].copy()).permute(2, 0, 1)
    return (part / 255 - MEAN) / STD


@pytest.mark.parametrize("shape", [(20_000, 1), (1, 20_000)])
def test_extreme_pictures_build_nothing_gigantic(shape: tuple[int, int], monkeypatch: pytest.MonkeyPatch):
    largest = 0
    new, resize = Image.new, Image.Image.resize

    def counting_new(mode, size, *args):
        nonlocal largest
        largest = max(largest, size[0] * size[1])
        return new(mode, size, *args)

    def counting_resize(self, size, *args, **kwargs):
        nonlocal largest
        largest = max(largest, size[0] * size[1])
        return resize(self, size, *args, **kwargs)

    image = smooth(*shape)
    monkeypatch.setattr(Image, "new", counting_new)
    monkeypatch.setattr(Image.Image, "resize", counting_resize)
    square, padded = ImageProcessor(336)(image), ImageProcessor(336, "pad")(image)
    assert largest < 20_000 * 20_000 / 16  # the plain way: 336 x 6.7 million, and 20,000 x 20,000
    # What the eye would expect: the middle pixel, and a line on the background.
    middle = torch.from_numpy(np.asarray(image).reshape(-1, 3)[9_999:10_001].mean(0, dtype=np.float32))
    assert (grey_levels(square).mean((1, 2)) - middle).abs().max() < 3
    background = grey_levels(padded)[:, 0, 0]
    torch.testing.assert_close(background, torch.tensor([122.0, 116.0, 104.0]), atol=1e-2, rtol=0)


def test_too_thin_to_pad_is_an_error_and_can_still_be_cropped():
    image = Image.new("RGB", (1, 1_000_000))
    with pytest.raises(ImageError, match="1x1000000 is too long and thin"):
        ImageProcessor(336, "pad")(image)
    assert ImageProcessor(336)(image).shape == (3, 336, 336)


def test_pad_centres_with_floor_offsets_on_the_mean_colour():
    red = Image.new("RGB", (7, 4), (255, 0, 0))  # 3 rows to fill: 1 above, 2 below
    levels = grey_levels(ImageProcessor(7, "pad")(red)).round().to(torch.uint8)
    is_red = (levels == torch.tensor([255, 0, 0], dtype=torch.uint8).view(3, 1, 1)).all(0).all(1)
    is_mean = (levels == torch.tensor([122, 116, 104], dtype=torch.uint8).view(3, 1, 1)).all(0).all(1)
    assert is_red.tolist() == [False, True, True, True, True, False, False]
    assert is_mean.tolist() == [True, False, False, False, False, True, True]


def test_writes_into_the_given_tensor_and_stacks():
    images = [smooth(60, 40), smooth(40, 60)]
    processor = ImageProcessor(32)
    out = torch.full((2, 3, 32, 32), 9.0)
    result = processor(images[0], out[1])
    assert result.data_ptr() == out[1].data_ptr() and (out[0] == 9).all()
    batch = processor.stack(images)
    assert batch.dtype == torch.float32 and batch.shape == (2, 3, 32, 32)
    assert torch.equal(batch[0], out[1]) and torch.equal(batch[1], processor(images[1]))
    assert processor.stack([]).shape == (0, 3, 32, 32)


def test_other_mean_and_std():
    image, mean, std = smooth(50, 50), (0.5, 0.4, 0.3), (0.5, 0.25, 0.2)
    expected = (np.asarray(image).transpose(2, 0, 1) / 255 - np.reshape(mean, (3, 1, 1))) / np.reshape(std, (3, 1, 1))
    np.testing.assert_allclose(ImageProcessor(50, mean=mean, std=std)(image).numpy(), expected, atol=1e-5)
    assert ImageProcessor(50, mean=mean, std=std).background == (127, 102, 76)


def test_threads_agree():
    processor, image = ImageProcessor(64, "pad"), encode(smooth(120, 90), "PNG")
    expected = processor(image)
    results: list[torch.Tensor] = []
    threads = [threading.Thread(target=lambda: results.extend(processor(image) for _ in range(10))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(results) == 40 and all(torch.equal(r, expected) for r in results)


# ---- sources and modes


@pytest.mark.parametrize("mode", ["L", "CMYK", "1", "P", "YCbCr", "HSV"])
def test_modes_convert_as_pil_does(mode: str):
    image = smooth(40, 30).convert(mode)
    assert np.array_equal(load_image(image), image.convert("RGB"))


@pytest.mark.parametrize("mode", ["RGBA", "LA", "PA", "La", "RGBa"])
def test_alpha_lies_on_white(mode: str):
    colour = np.asarray(smooth(40, 30).convert("L" if mode in ("LA", "La", "PA") else "RGB")).astype(float)
    colour = colour.reshape(30, 40, -1)
    alpha = np.linspace(0, 255, 40).round().astype(np.uint8)[None].repeat(30, 0)
    whole = np.dstack([colour.astype(np.uint8), alpha])
    straight = Image.fromarray(whole, "LA" if mode in ("LA", "La", "PA") else "RGBA")
    a = alpha[..., None] / 255
    expected = np.broadcast_to(colour * a + 255 * (1 - a), (30, 40, 3))
    assert np.abs(np.asarray(load_image(_convert(straight, mode))) - expected).max() <= 2  # PIL's own integer rounding


def _convert(image: Image.Image, mode: str) -> Image.Image:
    # PIL drops the alpha of LA on the direct way to PA.
    return image.convert("RGBA").convert(mode) if mode == "PA" else image.convert(mode)


def test_palette_transparency_lies_on_white():
    image = Image.new("P", (4, 4), 1)
    image.putpalette([0, 0, 0, 10, 20, 30])
    image.putpixel((0, 0), 0)
    for kind in ("PNG", "GIF"):
        pixels = np.asarray(load_image(encode(image, kind, transparency=0)))
        assert pixels[0, 0].tolist() == [255, 255, 255] and pixels[3, 3].tolist() == [10, 20, 30]


def test_sixteen_bit_grey_keeps_its_upper_byte():
    values = np.array([[0, 255, 256, 0x1234, 65535]], np.uint16)
    for source in (
        Image.fromarray(values),
        encode(Image.fromarray(values), "PNG"),
        encode(Image.fromarray(values), "TIFF"),
    ):
        assert np.asarray(load_image(source))[0, :, 1].tolist() == [0, 0, 1, 0x12, 255]


@pytest.mark.parametrize("mode", ["I", "F"])
def test_pixels_without_a_range_are_refused(mode: str):
    with pytest.raises(ImageError, match=f"mode {mode}.*8 bits"):
        load_image(Image.new(mode, (4, 4)))


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF"])
def test_formats_from_path_and_bytes(kind: str, tmp_path: Path):
    data = encode(smooth(40, 30), kind)
    expected = Image.open(io.BytesIO(data)).convert("RGB")
    path = tmp_path / "any name"
    path.write_bytes(data)
    for source in (path, str(path), data, bytearray(data), memoryview(data), Image.open(path)):
        assert np.array_equal(load_image(source), expected)


def test_first_frame_of_an_animation():
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue")]
    for kind in ("GIF", "WEBP"):
        data = encode(frames[0], kind, save_all=True, append_images=frames[1:])
        assert np.abs(np.asarray(load_image(data)).astype(int) - [255, 0, 0]).max() <= 2


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["PNG", "TIFF", "WEBP"])
def test_exif_orientation(kind: str, orientation: int):
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encode(smooth(40, 30), kind, exif=exif, **({"lossless": True} if kind == "WEBP" else {}))
    image = load_image(data)
    assert np.array_equal(image, ImageOps.exif_transpose(Image.open(io.BytesIO(data))).convert("RGB"))
    assert image.size == ((30, 40) if orientation > 4 else (40, 30))
    assert np.array_equal(load_image(image), image)  # upright already: not turned twice


def test_damaged_exif_does_not_cost_the_picture():
    data = encode(smooth(40, 30), "JPEG", exif=b"Exif\x00\x00garbage that is no TIFF header")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert load_image(data).size == (40, 30)


def test_arrays_and_tensors():
    image = smooth(40, 30)
    array = np.asarray(image)
    tensor = torch.from_numpy(array.copy())
    same = [array, array[:, ::-1][:, ::-1], np.asfortranarray(array), array / 255, (array / 255).astype(np.float32)]
    same += [tensor, tensor.permute(2, 0, 1), tensor.permute(2, 0, 1) / 255, (tensor / 255).requires_grad_()]
    for source in same:
        assert np.array_equal(load_image(source), image)
    assert np.abs(np.asarray(load_image((tensor / 255).bfloat16())).astype(int) - array).max() <= 1
    grey = load_image(array[:, :, 0])
    assert np.array_equal(np.asarray(grey)[:, :, 2], array[:, :, 0])
    half = np.dstack([array, np.zeros((30, 40), np.uint8)])
    assert (np.asarray(load_image(half)) == 255).all()


def test_source_is_left_alone():
    image = smooth(40, 30).convert("RGBA")
    before = image.tobytes()
    load_image(image)
    assert image.mode == "RGBA" and image.tobytes() == before
    array = np.asarray(smooth(40, 30)).copy()
    kept = array.copy()
    ImageProcessor(16)(array)
    assert np.array_equal(array, kept)


# ---- errors


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (np.zeros((4, 5, 2), np.uint8), r"shape \(4, 5, 2\) and dtype uint8.*\(H, W, 3\)"),
        (np.zeros((1, 4, 5, 3), np.uint8), r"shape \(1, 4, 5, 3\)"),
        (np.zeros((0, 5, 3), np.uint8), "no pixels"),
        (np.zeros((4, 5, 3), np.int64), "dtype int64.*uint8"),
        (np.zeros((4, 5), bool), "dtype bool"),
        (np.full((4, 5, 3), 200.0), r"values from 200 to 200.*0\.\.1"),
        (np.full((4, 5), np.nan), "values from nan"),
        (np.full((4, 5), -0.1), r"values from -0\.1"),
        (torch.zeros(4, 5), r"tensor of shape \(4, 5\)"),
        (torch.zeros(1, 3, 4, 5), r"tensor of shape \(1, 3, 4, 5\)"),
        (torch.zeros(3, 4, 5, dtype=torch.int32), r"torch\.int32"),
        (torch.zeros(3, 0, 5), "no pixels"),
        (Image.new("RGB", (0, 5)), "0x5 has no pixels"),
        (b"", r"image bytes \(0 bytes\): the image file is empty"),
        (b"plain text, nothing else", "begins with b'plain text, '.*JPEG"),
        (encode(Image.new("RGB", (4, 4)), "PPM"), "not an image.*supported are JPEG"),
        (17, "cannot read an image from int"),
        (None, "cannot read an image from NoneType"),
    ],
)
def test_unusable_sources(source, message: str):
    with pytest.raises(ImageError, match=message) as caught:
        load_image(source)
    assert " at 0x" not in str(caught.value)


@pytest.mark.filterwarnings("ignore:Corrupt EXIF data")
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF"])
def test_truncated_files_name_path_and_cause(kind: str, tmp_path: Path):
    data = encode(Image.fromarray(noise(80, 60)), kind)
    path = tmp_path / f"cut.{kind.lower()}"
    for keep in (3, 20, len(data) // 3, len(data) - len(data) // 8):
        path.write_bytes(data[:keep])
        with pytest.raises(ImageError) as caught:
            load_image(path)
        assert str(path) in str(caught.value) and " at 0x" not in str(caught.value)


def test_files_that_are_no_images(tmp_path: Path):
    fake = tmp_path / "fake.jpg"
    fake.write_text("version https://git-lfs.github.com/spec/v1")
    with pytest.raises(ImageError, match=r"fake\.jpg: not an image.*b'version http'"):
        load_image(fake)
    (tmp_path / "empty.png").touch()
    with pytest.raises(ImageError, match=r"empty\.png: the image file is empty"):
        load_image(tmp_path / "empty.png")
    with pytest.raises(ImageError, match=r"nowhere\.png: cannot open the image file: No such file"):
        load_image(tmp_path / "nowhere.png")
    with pytest.raises(ImageError, match="Is a directory"):
        load_image(tmp_path)
    with pytest.raises(ImageError, match="null"):
        load_image("a\0b.png")


def test_damaged_bytes_never_escape_as_other_errors():
    random = np.random.default_rng(0)
    for kind in ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF"):
        data = encode(smooth(40, 30), kind)
        for _ in range(30):
            broken = bytearray(data)
            for at in random.integers(0, len(data), 12):
                broken[at] = random.integers(256)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                try:
                    assert load_image(broken, max_pixels=10**6).mode == "RGB"
                except ImageError as error:
                    assert " at 0x" not in str(error)


def test_pixel_limit_is_read_from_the_header(tmp_path: Path):
    header_only = encode(Image.new("L", (5000, 4000)), "PNG")[:60]  # nothing behind it could be decoded
    with pytest.raises(ImageError, match=r"5000x4000 is 20000000 pixels, over the limit max_pixels=1000000"):
        load_image(header_only, max_pixels=1_000_000)
    with pytest.raises(ImageError, match="max_pixels=100"):
        ImageProcessor(16, max_pixels=100)(smooth(20, 20))
    assert load_image(smooth(10, 10), max_pixels=100).size == (10, 10)


def test_pil_own_limit_is_a_typed_error_and_stays_as_it_is(monkeypatch: pytest.MonkeyPatch):
    data = encode(Image.new("L", (100, 100)), "PNG")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 4000)  # as if the picture were over PIL's limit
    with pytest.raises(ImageError, match="PIL's own pixel limit"):
        load_image(data)
    assert Image.MAX_IMAGE_PIXELS == 4000
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 6000)  # between the warning and the error
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(ImageError, match="PIL's own pixel limit"):
            load_image(data)


# ---- configuration


@pytest.mark.parametrize("aspect", ["square", "pad"])
def test_transformers_reads_what_save_writes(aspect: str, tmp_path: Path):
    ours = ImageProcessor(56, aspect, mean=(0.5, 0.4, 0.3), std=(0.2, 0.3, 0.4))
    ours.save(tmp_path / "new")
    theirs = AutoImageProcessor.from_pretrained(tmp_path / "new", backend="pil")
    assert type(theirs) is (LlavaImageProcessorPil if aspect == "pad" else CLIPImageProcessorPil)
    image = smooth(100, 61)
    expected = theirs(image, return_tensors="pt")["pixel_values"][0]
    assert expected.shape == (3, 56, 56)
    torch.testing.assert_close(ours(image), expected, atol=1e-5, rtol=0)
    again = ImageProcessor.load(tmp_path / "new")
    assert (again.size, again.aspect, again.mean, again.std) == (ours.size, ours.aspect, ours.mean, ours.std)


@pytest.mark.parametrize("aspect", ["square", "pad"])
def test_reads_what_transformers_writes(aspect: str, tmp_path: Path):
    kind = LlavaImageProcessorPil if aspect == "pad" else CLIPImageProcessorPil
    size = {"size": {"shortest_edge": 56}, "crop_size": {"height": 56, "width": 56}}
    theirs = kind(**size, **({"do_pad": True} if aspect == "pad" else {}))
    theirs.save_pretrained(tmp_path)
    ours = ImageProcessor.load(tmp_path)
    assert ours.aspect == aspect
    image = smooth(100, 61)
    torch.testing.assert_close(ours(image), theirs(image, return_tensors="pt")["pixel_values"][0], atol=1e-5, rtol=0)


def write_config(folder: Path, name: str = "preprocessor_config.json", **config) -> Path:
    (folder / name).write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize(
    "config",
    [
        {"size": 48, "crop_size": 48, "resample": 3, "feature_extractor_type": "CLIPFeatureExtractor"},
        {"size": {"shortest_edge": 48}, "crop_size": {"height": 48, "width": 48}},
        {"size": {"shortest_edge": 48}, "crop_size": 48, "rescale_factor": 0.00392156862745098},
        {"size": {"height": 48, "width": 48}, "crop_size": 48, "do_pad": True},
    ],
)
def test_published_forms_of_the_sizes(config: dict, tmp_path: Path):
    processor = ImageProcessor.load(write_config(tmp_path, **config))
    assert processor.size == 48 and processor.mean == CLIP_MEAN and processor.std == CLIP_STD
    assert processor.aspect == ("pad" if config.get("do_pad") else "square")
    assert ImageProcessor.load(tmp_path, aspect="pad").aspect == "pad"


def test_processor_config_of_transformers_5(tmp_path: Path):
    write_config(tmp_path, "processor_config.json", image_processor={"size": 48, "crop_size": 48}, patch_size=14)
    assert ImageProcessor.load(tmp_path).size == 48


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"resample": 2}, r"resample=2 is not supported; only bicubic \(3\)"),
        ({"do_center_crop": False}, "do_center_crop=false"),
        ({"do_normalize": False}, "do_normalize=false"),
        ({"rescale_factor": 0.5}, "rescale_factor=0.5"),
        ({"size": {"shortest_edge": 256}, "crop_size": 224}, "size=256 and crop_size=224 differ"),
        ({"size": {"height": 224, "width": 224}}, "stretches pictures to a square"),
        ({"size": {"shortest_edge": 224, "longest_edge": 448}}, "size=.*is not one square side"),
        ({"crop_size": {"height": 224, "width": 196}}, "crop_size=.*is not one square side"),
        ({"size": [224, 224]}, "size=.*is not one square side"),
        ({"image_std": [0.5, 0.0, 0.5]}, "std above 0"),
        ({"image_mean": [0.5]}, "three numbers"),
    ],
)
def test_configs_that_ask_for_something_else(config: dict, message: str, tmp_path: Path):
    with pytest.raises(ConfigError, match=message):
        ImageProcessor.load(write_config(tmp_path, **config))


def test_missing_and_damaged_config(tmp_path: Path):
    with pytest.raises(ConfigError, match=r"no preprocessor_config\.json"):
        ImageProcessor.load(tmp_path)
    (tmp_path / "preprocessor_config.json").write_text("{")
    with pytest.raises(ConfigError, match="not valid JSON"):
        ImageProcessor.load(tmp_path)


@pytest.mark.parametrize(("size", "aspect"), [(0, "square"), (-3, "pad"), (224, "anyres")])
def test_bad_arguments(size: int, aspect: str):
    with pytest.raises(ConfigError):
        ImageProcessor(size, aspect)
