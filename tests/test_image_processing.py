"""Pixels equal timm's evaluation transform to the last bit, whatever form the image comes in."""

import base64
import io
import json
import runpy
import struct
import threading
import zlib
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from conftest import picture
from PIL import Image
from timm.data import create_transform, resolve_data_config
from transformers import AutoImageProcessor

from imageprompt import ImagePromptImageProcessor

SWEEP = runpy.run_path(str(Path(__file__).parents[1] / "scripts" / "sweep_preprocessing.py"))
SIZES = [(70, 90), (33, 101), (257, 129)]


def cfg_of(name: str) -> dict:
    return resolve_data_config(pretrained_cfg=timm.get_pretrained_cfg(name).to_dict())


def encoded(image: Image.Image, format: str = "PNG", **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


@pytest.fixture
def processor() -> ImagePromptImageProcessor:
    return ImagePromptImageProcessor(size={"height": 32, "width": 32}, crop_pct=1.0)


def pixels(processor, image, **settings) -> torch.Tensor:
    return processor(image, return_tensors="pt", **settings)["pixel_values"]


def same(processor, image, expected: Image.Image) -> bool:
    return torch.equal(pixels(processor, image), pixels(processor, expected))


def test_pain_17_pixels_equal_timms_to_the_last_bit_for_all_its_pretrained_settings():
    names = {json.dumps(cfg_of(name)): name for name in SWEEP["names"]()}
    settings = {name: SWEEP["settings_of"](name, {}) for name in names.values()}
    assert len(settings) > 150
    assert {ours["crop_mode"] for ours, _ in settings.values()} == {"center", "squash", "border"}
    assert any(ours["crop_pct"] > 1 for ours, _ in settings.values())
    assert any(ours["input_size"][1] != ours["input_size"][2] for ours, _ in settings.values())
    pictures = {"landscape": (131, 90), "small": (33, 41)}
    results = {name: SWEEP["compare"](*pair, pictures=pictures) for name, pair in settings.items()}
    assert {name: result.difference for name, result in results.items() if result.difference != 0} == {}
    assert {picture for result in results.values() for picture in result.refused_by_both} == {"line"}


def test_the_sweep_sees_a_difference():
    ours, timms = SWEEP["settings_of"]("resnet18.a1_in1k", {})
    assert SWEEP["compare"](ours | {"crop_pct": 0.9}, timms).difference > 0
    assert SWEEP["compare"](ours | {"crop_mode": "border"}, timms).difference == float("inf")


@pytest.mark.slow
def test_pain_17_the_sweep_over_timms_registry_gives_what_is_committed():
    committed = json.loads((Path(__file__).parents[1] / "docs" / "preprocessing" / "sweep.json").read_text())
    measured = SWEEP["sweep"](progress=False)
    assert measured["unequal"] == {} and measured["largest_difference"] == 0
    if committed["versions"]["timm"] == timm.__version__:
        assert {key: committed[key] for key in measured} == json.loads(json.dumps(measured))


@pytest.mark.parametrize("crop_mode", ["center", "squash", "border"])
def test_non_square_input_equals_timms_transform(crop_mode):
    cfg = cfg_of("resnet18.a1_in1k") | {"input_size": (3, 48, 80), "crop_mode": crop_mode, "crop_pct": 0.9}
    processor, transform = (
        ImagePromptImageProcessor.from_pretrained_cfg(cfg),
        create_transform(**cfg, is_training=False),
    )
    for size in SIZES:
        assert torch.equal(pixels(processor, picture(0, size))[0], transform(picture(0, size)))


def test_real_photos_equal_timms_transform(shared_data):
    dataset = pytest.importorskip("datasets").load_dataset(str(shared_data / "flickr8k"), split="validation[:8]")
    cfg = cfg_of("vit_small_patch16_224.augreg_in21k_ft_in1k")
    processor, transform = (
        ImagePromptImageProcessor.from_pretrained_cfg(cfg),
        create_transform(**cfg, is_training=False),
    )
    expected = torch.stack([transform(photo.convert("RGB")) for photo in dataset["image"]])
    assert torch.equal(pixels(processor, list(dataset["image"])), expected)


@pytest.mark.parametrize("name", ["resnet18.a1_in1k", "eva_giant_patch14_336.clip_ft_in1k"])
def test_saved_settings_are_timms_and_load_equal(name, tmp_path):
    cfg = cfg_of(name)
    processor = ImagePromptImageProcessor.from_pretrained_cfg(cfg)
    assert processor.pretrained_cfg == {k: list(v) if isinstance(v, tuple) else v for k, v in cfg.items()}
    processor.save_pretrained(tmp_path)
    loaded = AutoImageProcessor.from_pretrained(tmp_path, trust_remote_code=False)
    assert isinstance(loaded, ImagePromptImageProcessor)
    assert loaded.to_dict() == processor.to_dict()
    assert torch.equal(pixels(loaded, picture()), pixels(processor, picture()))
    written = json.loads((tmp_path / "preprocessor_config.json").read_text())
    assert not written.keys() & {"rescale_factor", "do_normalize", "return_tensors"}


def test_pain_29_transparent_pixels_are_laid_on_white(processor):
    rgba = np.dstack([np.asarray(picture()), np.zeros((70, 90), np.uint8)])
    rgba[:, 45:, 3] = 255
    expected = np.where(rgba[..., 3:] > 0, rgba[..., :3], 255).astype(np.uint8)
    assert same(processor, Image.fromarray(rgba), Image.fromarray(expected))
    assert same(processor, rgba, Image.fromarray(expected))


def test_pain_29_the_transparent_colour_of_a_palette_is_white(processor):
    image = Image.new("P", (4, 4), 1)
    image.putpalette([255, 0, 0, 0, 0, 255])
    image.paste(0, (0, 0, 2, 4))
    expected = Image.new("RGB", (4, 4), (0, 0, 255))
    expected.paste("white", (0, 0, 2, 4))
    assert same(processor, Image.open(io.BytesIO(encoded(image, transparency=0))), expected)


@pytest.mark.parametrize("mode", ["L", "P", "CMYK", "1", "YCbCr", "HSV"])
def test_pain_29_opaque_modes_are_converted_as_pil_does(mode, processor):
    image = picture(mode=mode)
    assert same(processor, image, image.convert("RGB"))


def test_pain_29_grey_with_alpha_is_laid_on_white(processor):
    image = Image.merge("LA", [Image.new("L", (4, 4), 100), Image.new("L", (4, 4), 0)])
    assert same(processor, image, Image.new("RGB", (4, 4), "white"))


def test_a_transparent_colour_key_is_white(processor):
    image = picture(mode="RGB")
    key = image.getpixel((0, 0))
    expected = np.asarray(image).copy()
    expected[(expected == key).all(-1)] = 255
    assert same(processor, encoded(image, transparency=key), Image.fromarray(expected))


def test_half_transparent_palette_entries_are_blended_with_white(processor):
    image = Image.new("P", (4, 4), 1)
    image.putpalette([0, 0, 0, 200, 100, 0])
    data = encoded(image, transparency=bytes([0, 51]))  # a fifth of the colour, four fifths of white
    assert same(processor, data, Image.new("RGB", (4, 4), (244, 224, 204)))


def test_pain_29_an_inverted_cmyk_jpeg_has_its_colours(processor):
    data = encoded(Image.new("CMYK", (16, 16), (0, 255, 255, 0)), "JPEG", quality=100)
    assert b"Adobe" in data  # such files store 255 for no ink
    assert Image.open(io.BytesIO(data)).mode == "CMYK"
    assert same(processor, data, Image.new("RGB", (16, 16), "red"))


def png(color_type: int, *samples: int, **chunks: bytes) -> bytes:
    """A 4x4 PNG of one colour with 16 bits per sample, some kinds of which Pillow cannot write."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    rows = (b"\0" + struct.pack(f">{len(samples)}H", *samples) * 4) * 4
    extra = b"".join(chunk(name.encode(), data) for name, data in chunks.items())
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", 4, 4, 16, color_type, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + extra + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


@pytest.mark.parametrize(
    ("data", "colour"),
    [
        (png(0, 100 * 257), (100, 100, 100)),
        (png(2, 100 * 257, 0, 255 * 257), (100, 0, 255)),
        (png(4, 100 * 257, 65535), (100, 100, 100)),
        (png(4, 100 * 257, 0), (255, 255, 255)),
        (png(6, 100 * 257, 0, 255 * 257, 0), (255, 255, 255)),
        (png(0, 100 * 257, tRNS=struct.pack(">H", 100 * 257)), (255, 255, 255)),
        (png(0, 100 * 257, tRNS=struct.pack(">H", 101 * 257)), (100, 100, 100)),
        (b"P5 4 4 65535\n" + struct.pack(">16H", *[100 * 257] * 16), (100, 100, 100)),
        (b"P5 4 4 65535\n" + struct.pack(">16H", *[257] * 16), (1, 1, 1)),
    ],
    ids=["grey", "rgb", "grey alpha", "clear grey", "clear rgb", "clear key", "other key", "pgm", "dark pgm"],
)
def test_files_of_sixteen_bits_are_scaled_to_eight(data, colour, processor):
    assert same(processor, data, Image.new("RGB", (4, 4), colour))


@pytest.mark.parametrize("as_png", [True, False])
def test_sixteen_bits_are_scaled_to_eight(as_png, processor):
    grey = np.asarray(picture(mode="L"))
    deep = Image.fromarray(grey.astype(np.uint16) * 257)
    assert deep.mode == "I;16"
    assert same(processor, Image.open(io.BytesIO(encoded(deep))) if as_png else deep, Image.fromarray(grey))


@pytest.mark.parametrize("dtype", [np.int32, np.float32])
def test_thirty_two_bit_pil_images_are_not_black(dtype, processor):
    grey = np.asarray(picture(mode="L"))
    image = Image.fromarray((grey / 255 if dtype == np.float32 else grey).astype(dtype))
    assert image.mode == ("F" if dtype == np.float32 else "I")
    assert same(processor, image, Image.fromarray(grey))


TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
LOSSLESS = {"PNG": {}, "WEBP": {"lossless": True}, "TIFF": {}}


def oriented(orientation: int) -> Image.Exif:
    exif = Image.Exif()
    exif[0x0112] = orientation
    return exif


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("format", LOSSLESS)
def test_a_rotated_photo_stands_upright(format, orientation, processor, tmp_path):
    stored = picture()
    data = encoded(stored, format, exif=oriented(orientation), **LOSSLESS[format])
    (tmp_path / "photo").write_bytes(data)
    upright = stored.transpose(TURNS[orientation]) if orientation > 1 else stored
    for source in (data, tmp_path / "photo", Image.open(io.BytesIO(data))):
        assert same(processor, source, upright)


def test_a_rotated_jpeg_stands_upright(processor):
    stored = Image.open(io.BytesIO(encoded(picture(), "JPEG"))).convert("RGB")
    data = encoded(picture(), "JPEG", exif=oriented(6))
    assert same(processor, data, stored.transpose(TURNS[6]))
    assert same(processor, Image.open(io.BytesIO(data)), stored.transpose(TURNS[6]))


@pytest.mark.filterwarnings("ignore:Corrupt EXIF data")
@pytest.mark.parametrize("exif", [b"Exif\0\0neither nor", b"Exif\0\0II*\0\xff\xff\xff\xff", oriented(9).tobytes()])
def test_a_photo_with_broken_exif_data_stays_as_it_is(exif, processor):
    image = picture()
    image.info["exif"] = exif
    assert same(processor, image, picture())
    assert same(processor, encoded(picture(), exif=exif), picture())


ANIMATIONS = {"GIF": {}, "PNG": {}, "WEBP": {"lossless": True}, "TIFF": {}}


@pytest.mark.parametrize("format", ANIMATIONS)
def test_an_animation_gives_its_first_frame_or_the_one_to_which_it_was_sought(format, processor, tmp_path):
    first, second = Image.new("RGB", (9, 9), "red"), Image.new("RGB", (9, 9), "blue")
    data = encoded(first, format, save_all=True, append_images=[second], **ANIMATIONS[format])
    (tmp_path / "animation").write_bytes(data)
    opened = Image.open(io.BytesIO(data))
    assert opened.n_frames == 2
    for source in (data, tmp_path / "animation", opened):
        assert same(processor, source, first)
    opened.seek(1)
    assert same(processor, opened, second)
    assert opened.tell() == 1


@pytest.mark.parametrize(
    "make",
    [
        lambda a: a,
        lambda a: a.transpose(2, 0, 1),
        lambda a: a / 255,
        lambda a: (a / 255).astype(np.float32),
        lambda a: a.astype(np.float32),
        lambda a: a.astype(np.int64),
        lambda a: a.astype(np.uint16) * 257,
        lambda a: torch.from_numpy(a),
        lambda a: torch.from_numpy(a).permute(2, 0, 1),
        lambda a: torch.from_numpy(a).permute(2, 0, 1) / 255,
        lambda a: (torch.from_numpy(a) / 255).requires_grad_(),
        lambda a: np.asfortranarray(a),
        lambda a: np.dstack([a, np.full(a.shape[:2], 255, np.uint8)]),
    ],
    ids=[
        "hwc",
        "chw",
        "double",
        "float",
        "float255",
        "int64",
        "uint16",
        "tensor",
        "tensor_chw",
        "tensor_float",
        "with_grad",
        "strided",
        "rgba",
    ],
)
def test_arrays_and_tensors_equal_the_pil_image(make, processor):
    assert same(processor, make(np.asarray(picture()).copy()), picture())


@pytest.mark.parametrize(
    "make",
    [
        lambda a: a,
        lambda a: a[None],
        lambda a: a[..., None],
        lambda a: a / 255,
        lambda a: torch.from_numpy(a)[None],
        lambda a: a[:3],  # three rows are no channels
    ],
    ids=["hw", "chw", "hwc", "float", "tensor", "flat"],
)
def test_grey_arrays_equal_the_grey_pil_image(make, processor):
    grey = np.asarray(picture(mode="L")).copy()
    made = make(grey)
    assert same(processor, made, Image.fromarray(grey[:3] if made.shape == (3, 90) else grey))


def test_half_precision_is_rounded_to_the_nearest_level(processor):
    tensor = (torch.from_numpy(np.asarray(picture()).copy()).permute(2, 0, 1) / 255).bfloat16()
    expected = (tensor.float() * 255).round().byte().permute(1, 2, 0).numpy()
    assert same(processor, tensor, Image.fromarray(expected))


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_floats_may_miss_their_range_by_rounding_only(dtype, processor):
    levels = np.asarray(picture())
    for limit in (1, 255):
        rounded = (levels / 255 * limit).astype(dtype)
        rounded[0, 0], rounded[0, 1] = -1e-6 * limit, (1 + 1e-6) * limit
        expected = levels.copy()
        expected[0, 0], expected[0, 1] = 0, 255
        assert same(processor, rounded, Image.fromarray(expected))
        rounded[0, 1] = 1.02 * limit  # what a bicubic filter leaves behind; as one of 255 levels it would be black
        with pytest.raises(ValueError, match=r"its values go from -\S+ to (1.0|260).* clipped"):
            processor(rounded)


def test_grey_arrays_with_alpha_are_laid_on_white(processor):
    grey = np.asarray(picture(mode="L"))
    assert same(processor, np.dstack([grey, np.full_like(grey, 255)]), Image.fromarray(grey))
    assert same(processor, np.dstack([grey, np.zeros_like(grey)])[:9], Image.new("L", (90, 9), 255))


def test_a_mask_is_black_and_white(processor):
    mask = np.asarray(picture(mode="L")) > 127
    assert same(processor, mask, Image.fromarray(mask.astype(np.uint8) * 255))
    assert same(processor, mask.astype(np.float32), Image.fromarray(mask.astype(np.uint8) * 255))


@pytest.fixture
def server():
    """A web server on this machine that serves one picture."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            found = self.path == "/picture.png"
            self.send_response(200 if found else 404)
            self.end_headers()
            self.wfile.write(encoded(picture()) if found else b"")

        def log_message(self, *_):
            pass

    server = HTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    thread.join()
    server.server_close()


def test_paths_bytes_data_uris_base64_and_urls_are_opened(processor, server, tmp_path):
    data, path = encoded(picture()), tmp_path / "picture.png"
    path.write_bytes(data)
    text = base64.b64encode(data).decode()
    sources = [data, bytearray(data), path, str(path), text, base64.encodebytes(data).decode()]
    sources += [f"data:image/png;base64,{text}", f"{server}/picture.png"]
    assert torch.equal(pixels(processor, sources), pixels(processor, [picture()] * len(sources)))


def test_many_files_do_not_stay_open(processor, tmp_path):
    picture().save(tmp_path / "picture.png")
    assert all(image.fp is None for image in processor.fetch_images([tmp_path / "picture.png"] * 2))


def test_batches_and_nested_lists_keep_their_order(processor):
    images = [picture(seed) for seed in range(4)]
    expected = pixels(processor, images)
    batch = np.stack([np.asarray(image) for image in images])
    for nested in ([[images[0]], images[1:]], tuple(images), batch, torch.from_numpy(batch), [batch[:2], batch[2:]]):
        assert torch.equal(pixels(processor, nested), expected)


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "L"])
def test_the_callers_image_stays_as_it_is_and_is_not_shared(mode, processor):
    image = picture(0, (32, 32), mode)  # of the very size that the tower takes
    before = image.tobytes()
    result = pixels(processor, image)
    assert (image.mode, image.tobytes()) == (mode, before)
    kept = result.clone()
    image.paste(0, (0, 0, 32, 32))
    assert torch.equal(result, kept)
    array = np.asarray(picture(0, (32, 32), mode)).copy()
    result = pixels(processor, array)
    array[:] = 0
    assert torch.equal(result, kept)


def test_the_callers_default_type_and_device_change_no_pixel():
    processor = ImagePromptImageProcessor(size={"height": 20, "width": 30})  # settings that were not used before
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device("meta"), torch.inference_mode():
            inside = pixels(processor, picture())
    finally:
        torch.set_default_dtype(torch.float32)
    assert (inside.dtype, inside.device.type) == (torch.float32, "cpu")
    expected = create_transform(**processor.pretrained_cfg, is_training=False)(picture())
    assert torch.equal(inside[0], expected) and torch.equal(pixels(processor, picture())[0], expected)


def test_a_line_that_timm_cannot_resize_is_refused_with_its_size(processor):
    line = Image.new("RGB", (3000, 1))
    with pytest.raises(
        ValueError, match=r"Image 1: timm's transform cannot resize 3000x1 pixels .* less extreme shape"
    ):
        processor([picture(), line], crop_mode="border")


def test_greyscale_towers_get_one_channel():
    processor = ImagePromptImageProcessor(
        size={"height": 28, "width": 28}, image_mean=[0.5], image_std=[0.5], crop_pct=1.0
    )
    expected = (torch.from_numpy(np.asarray(picture(0, (28, 28), "L")).copy()) / 255 - 0.5) / 0.5
    assert torch.allclose(pixels(processor, picture(0, (28, 28)))[0, 0], expected)


BROKEN = {
    "corrupt bytes": (b"not an image", "no readable image in 12 bytes"),
    "a truncated photo": (encoded(picture(), "JPEG")[:3000], "truncated"),
    "a truncated header": (encoded(picture())[:20], "no readable image in 20 bytes"),
    "a missing file": (
        "missing.png",
        r"'missing.png' \(there is no such file, and it is no base64 text\). Pass an exist",
    ),
    "nothing": (None, "a NoneType is no image: pass PIL, an array"),
    "a record": ({"bytes": b""}, "a dict is no image"),
    "no pixels": (Image.new("RGB", (0, 5)), r"no pixels \(width 0, height 5\)"),
    "an empty array": (np.zeros((0, 5, 3)), r"no pixels \(shape \(0, 5, 3\)\)"),
    "one dimension": (np.zeros(5), r"shape \(5,\) is no image"),
    "seven channels": (np.zeros((9, 9, 7)), r"shape \(9, 9, 7\) is no image"),
    "channels first or last": (np.zeros((3, 9, 3), np.uint8), "may have its channels first or last"),
    "normalised values": (torch.randn(3, 9, 9), "not yet normalised"),
    "large values": (np.full((9, 9), 70_000), "its values go from 70000 to 70000"),
    "not a number": (np.full((9, 9), np.nan), "its values go from nan"),
}


@pytest.mark.parametrize(("image", "message"), BROKEN.values(), ids=BROKEN)
def test_an_unreadable_image_is_refused_with_its_index_and_the_mend(image, message, processor):
    with pytest.raises(ValueError, match=rf"Image 1: .*{message}"):
        processor([picture(), image])


def test_a_truncated_file_opened_by_the_caller_is_refused(processor):
    image = Image.open(io.BytesIO(encoded(picture(), "JPEG")[:3000]))
    with pytest.raises(ValueError, match=r"Image 0: .*truncated"):
        processor(image)


def test_a_png_that_claims_to_be_huge_is_refused(processor):
    header = b"IHDR" + struct.pack(">IIBBBBB", 40_000, 40_000, 8, 2, 0, 0, 0)
    data = b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + header + struct.pack(">I", 0)
    with pytest.raises(ValueError, match="no readable image in 33 bytes"):
        processor(data)


def test_a_url_without_an_image_is_refused(processor, server):
    with pytest.raises(ValueError, match=r"no readable image in 'http.*missing' .*404"):
        processor(f"{server}/missing")


def test_no_image_at_all_is_refused(processor):
    with pytest.raises(ValueError, match="no image in `images`"):
        processor([])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"crop_pct": 0.0}, "`crop_pct` is a share"),
        ({"crop_pct": 87.5}, "`crop_pct` is a share"),
        ({"crop_mode": "centre"}, "one of center, center_floor, squash, border; got 'centre'"),
        ({"crop_mode": "center_floor", "crop_pct": 1.1}, "the crop is at most the image, `crop_pct` 1; got 1.1"),
        ({"size": {"shortest_edge": 224}}, "positive `height` and `width`"),
        ({"size": {"height": 0, "width": 8}}, "positive `height` and `width`"),
        ({"image_mean": [0.5, 0.5]}, "one value .* or three"),
        ({"image_mean": [0.5]}, "one value .* or three"),
        ({"image_std": [0.0, 0.5, 0.5]}, "`image_std` is positive"),
        ({"resample": 99}, "one of PIL's filters"),
    ],
)
def test_impossible_settings_are_refused_early_and_in_a_call(settings, message, processor):
    with pytest.raises(ValueError, match=message):
        ImagePromptImageProcessor(**settings)
    with pytest.raises(ValueError, match=message):
        processor(picture(), **settings)


@pytest.mark.parametrize("setting", ["do_normalize", "do_rescale", "do_resize", "do_center_crop"])
def test_switches_that_timms_transform_lacks_are_refused(setting, processor):
    with pytest.raises(ValueError, match=f"{setting}: timm's transform has no such setting"):
        ImagePromptImageProcessor(**{setting: False})
    with pytest.raises(TypeError, match=setting):
        processor(picture(), **{setting: False})


def test_settings_of_one_call_are_used_for_that_call_only(processor):
    assert pixels(processor, picture(), size={"height": 16, "width": 24}).shape == (1, 3, 16, 24)
    assert pixels(processor, picture()).shape == (1, 3, 32, 32)


def test_an_unknown_interpolation_is_refused():
    with pytest.raises(ValueError, match="Unknown interpolation 'random'; known: nearest"):
        ImagePromptImageProcessor.from_pretrained_cfg(cfg_of("resnet18.a1_in1k") | {"interpolation": "random"})


def test_arrays_come_out_as_arrays_on_request(processor):
    assert isinstance(processor(picture(), return_tensors="np")["pixel_values"], np.ndarray)
