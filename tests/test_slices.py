"""Test cases on disk: images of every kind, folders, and files that do not fit together."""

import io
import math
import shutil
import struct
import zlib
from dataclasses import replace
from pathlib import Path

import imageio.v3 as iio
import numpy as np
import pytest
import SimpleITK as sitk
import tifffile
from conftest import file_limit
from PIL import Image

from brainseg import phantom
from brainseg.io import predictions
from brainseg.io.labels import Labels
from brainseg.io.layouts import find_case, find_cases
from brainseg.io.predictions import write_case
from brainseg.io.slices import Case


@pytest.fixture(scope="module")
def pair() -> tuple[np.ndarray, np.ndarray]:
    """Make a phantom volume (6, 64, 64, 3) uint8 and its mask."""
    return phantom.make_volume(1, slices=6, size=64)


def write(folder: Path, volume: np.ndarray, mask: np.ndarray | None = None, first=1) -> Path:
    """Write a case as TIFFs, slices and masks numbered from `first`."""
    folder.mkdir(parents=True, exist_ok=True)
    for k, image in enumerate(volume, start=first):
        iio.imwrite(folder / f"x_{k}.tif", image)
    for k, label in enumerate(mask if mask is not None else (), start=first):
        iio.imwrite(folder / f"x_{k}_mask.tif", label.astype(np.uint8) * 255)
    return folder


def noise(*shape: int, low=0, high=256, dtype=np.uint8) -> np.ndarray:
    return np.random.default_rng(0).integers(low, high, shape).astype(dtype)


# Reading


def test_unpadded_numbers_are_in_the_order_of_integers(tmp_path):
    volume, mask = noise(12, 10, 14, 3), noise(12, 10, 14) > 127
    case = find_case(write(tmp_path / "case", volume, mask))
    assert case.name == "case" and case.numbers == tuple(range(1, 13))
    read, read_mask = case.read_pair()
    assert np.array_equal(read, volume) and np.array_equal(read_mask, mask)


@pytest.mark.parametrize("first", [0, 1, 20])
def test_numbers_may_start_anywhere_and_be_padded(tmp_path, first):
    volume = noise(3, 10, 14, 3)
    for k, image in enumerate(volume, start=first):
        iio.imwrite(tmp_path / f"any thing.1_{k:03d}.TIFF", image)
    case = find_case(tmp_path)
    assert case.numbers == (first, first + 1, first + 2) and case.masks == ()
    assert np.array_equal(case.read(), volume)


@pytest.mark.parametrize("suffix", ["tif", "tiff", "png", "PNG"])
@pytest.mark.parametrize("channels", [(), (3,)])
@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
def test_formats(tmp_path, suffix, channels, dtype):
    volume = noise(3, 10, 14, *channels, high=np.iinfo(dtype).max, dtype=dtype)
    if suffix.lower() == "png" and channels and dtype == np.uint16:
        pytest.skip("Pillow cannot write it")
    for k, image in enumerate(volume):
        iio.imwrite(tmp_path / f"x_{k}.{suffix}", image)
    read = find_case(tmp_path).read()
    assert read.dtype == dtype
    assert np.array_equal(read, volume.reshape(3, 10, 14, -1))


def test_float_tiff(tmp_path):
    volume = np.random.default_rng(0).random((2, 10, 14), dtype=np.float32)
    for k, image in enumerate(volume):
        tifffile.imwrite(tmp_path / f"x_{k}.tif", image)
    assert np.array_equal(find_case(tmp_path).read()[..., 0], volume)


@pytest.mark.parametrize("compression", ["tiff_lzw", "tiff_adobe_deflate", "packbits", None])
def test_compressed_tiff(tmp_path, compression):
    image = noise(10, 14, 3)
    Image.fromarray(image).save(tmp_path / "x_1.tif", compression=compression)
    assert np.array_equal(find_case(tmp_path).read()[0], image)


@pytest.mark.parametrize("compression", ["tiff_lzw", None])
def test_a_tiff_that_its_tag_turns_is_refused(tmp_path, compression):
    """Pillow, which reads some TIFFs, turns them; tifffile, which reads the others, does not."""
    image = noise(10, 14)
    for orientation in (1, 3):
        tags = {274: orientation}
        Image.fromarray(image).save(tmp_path / "x_1.tif", compression=compression, tiffinfo=tags)
        if orientation == 1:
            assert np.array_equal(find_case(tmp_path).read()[0, ..., 0], image)
    with pytest.raises(ValueError, match="x_1.tif: its tag Orientation turns it"):
        find_case(tmp_path).read()


@pytest.mark.parametrize("kind, shape", [("uint16", (10, 14, 3)), ("int8", (10, 14))])
def test_compressed_tiff_that_would_lose_bits_is_refused(tmp_path, kind, shape):
    """Pillow, which reads LZW, keeps 8 bits of such colours, and makes -1 of signed bytes 255."""
    image = sitk.GetImageFromArray(noise(*shape, low=-5, dtype=kind), isVector=len(shape) == 3)
    writer = sitk.ImageFileWriter()
    writer.SetFileName(str(tmp_path / "x_1.tif"))
    for compressor in ("PackBits", "LZW"):
        writer.UseCompressionOn()
        writer.SetCompressor(compressor)
        writer.Execute(image)
        if compressor == "PackBits":
            assert find_case(tmp_path).read().dtype == kind
    with pytest.raises(ValueError, match=f"x_1.tif: has compressed {kind} pixels; save it without"):
        find_case(tmp_path).read()


def test_tiff_with_separate_planes(tmp_path):
    image = noise(10, 14, 3)
    planes = np.ascontiguousarray(image.transpose(2, 0, 1))
    tifffile.imwrite(tmp_path / "x_1.tif", planes, photometric="rgb", planarconfig="separate")
    assert np.array_equal(find_case(tmp_path).read()[0], image)


MASKS = {
    "0/255": ("tif", lambda m: m.astype(np.uint8) * 255),
    "0/1": ("tif", lambda m: m.astype(np.uint8)),
    "bool": ("tif", lambda m: m),
    "uint16": ("tif", lambda m: m.astype(np.uint16) * 65535),
    "float": ("tif", lambda m: m.astype(np.float32)),
    "RGB": ("tif", lambda m: np.repeat(m[..., None], 3, axis=-1).astype(np.uint8) * 255),
    "red": ("png", lambda m: m[..., None] * np.array([255, 0, 0], dtype=np.uint8)),
    "png": ("png", lambda m: m.astype(np.uint8) * 255),
    "png 0/1": ("png", lambda m: m.astype(np.uint8)),
}


@pytest.mark.parametrize("suffix, style", MASKS.values(), ids=MASKS)
def test_masks_are_bool_however_they_are_stored(tmp_path, suffix, style):
    """Once, a newer image library left masks at 0/255: loss near -0.99, DSC 0, no error."""
    volume, mask = noise(2, 10, 14, 3), noise(2, 10, 14) > 127
    write(tmp_path, volume)
    for k, label in enumerate(mask, start=1):
        imwrite = tifffile.imwrite if suffix == "tif" else iio.imwrite
        imwrite(tmp_path / f"x_{k}_mask.{suffix}", style(label))
    read = find_case(tmp_path).read_mask()
    assert read.dtype == bool and np.array_equal(read, mask)


@pytest.mark.parametrize("mode", ["1", "P", "LA", "RGBA"])
def test_png_masks_of_a_drawing_program(tmp_path, mode):
    """An opaque alpha channel is not a lesion."""
    mask = noise(10, 14) > 127
    write(tmp_path, noise(1, 10, 14, 3))
    Image.fromarray(mask).convert("RGB" if mode == "P" else "L").convert(mode).save(
        tmp_path / "x_1_mask.png"
    )
    assert np.array_equal(find_case(tmp_path).read_mask()[0], mask)


def test_numbers_of_a_coloured_palette_are_labels(tmp_path):
    """So drawing programs and annotation tools store labels; 0 is black."""
    labels = np.random.default_rng(0).integers(0, 3, (10, 14)).astype(np.uint8)
    write(tmp_path, noise(1, 10, 14, 3))
    image = Image.fromarray(labels)
    image.putpalette(bytes.fromhex("000000800000008000"))
    image.save(tmp_path / "x_1_mask.png")
    case = find_case(tmp_path)
    assert np.array_equal(case.read_mask()[0], labels > 0)
    second = replace(case, labels=Labels((2,)))
    assert np.array_equal(second.read_mask()[0], labels == 2)


COMPRESSED = [("png", None), ("tif", None), ("tif", "tiff_lzw"), ("tif", "tiff_deflate")]


@pytest.mark.parametrize("suffix, compression", COMPRESSED)
def test_a_coloured_palette_of_a_scan_is_refused(tmp_path, suffix, compression):
    """Its numbers were taken for FLAIR: no lesion was where it is."""
    image = Image.fromarray(np.random.default_rng(0).integers(0, 3, (10, 14)).astype(np.uint8))
    image.putpalette(bytes.fromhex("000000800000008000"))
    image.save(tmp_path / f"x_1.{suffix}", compression=compression)
    with pytest.raises(ValueError, match=f"x_1.{suffix}: has a palette of colours; save it as RGB"):
        find_case(tmp_path).read()


@pytest.mark.parametrize("suffix, compression", COMPRESSED)
def test_colours_of_a_palette_are_read_as_rgb(tmp_path, suffix, compression):
    """Unless 0 alone is black, its numbers mean nothing."""
    image = Image.fromarray(np.random.default_rng(0).integers(0, 3, (10, 14)).astype(np.uint8))
    image.putpalette(bytes.fromhex("0a0a14800000008000"))
    image.save(tmp_path / f"x_1.{suffix}", compression=compression)
    assert np.array_equal(find_case(tmp_path).read()[0], np.asarray(image.convert("RGB")))


def test_a_png_that_its_exif_turns_is_refused(tmp_path):
    exif = Image.Exif()
    exif[274] = 6
    Image.fromarray(noise(10, 14)).save(tmp_path / "x_1.png", exif=exif)
    with pytest.raises(ValueError, match="x_1.png: its tag Orientation turns it"):
        find_case(tmp_path).read()


# Folders


def test_a_root_of_cases_with_stray_files(tmp_path, pair):
    """The root of the published data set contains `data.csv` and `README.md`."""
    for name in ("b", "a", "c"):
        write(tmp_path / name, *pair)
        (tmp_path / name / "notes.txt").write_text("not a slice")
        (tmp_path / name / "._x_1.tif").write_bytes(b"left by a Mac")
    (tmp_path / "data.csv").write_text("Patient")
    (tmp_path / "README.md").write_text("# data")
    (tmp_path / ".git").mkdir()
    assert [case.name for case in find_cases(tmp_path)] == ["a", "b", "c"]
    assert [case.name for case in find_cases(str(tmp_path), ["c", "a"])] == ["a", "c"]
    assert np.array_equal(find_cases(tmp_path)[0].read(), pair[0])


def test_published_layout(phantoms):
    cases = find_cases(phantoms)
    assert [case.name for case in cases] == [f"phantom_{k:03d}" for k in range(12)]
    volume, mask = cases[0].read_pair()
    assert volume.shape == (8, 64, 64, 3) and volume.dtype == np.uint8
    assert mask.shape == (8, 64, 64) and mask.dtype == bool and mask.any()


def test_real_cases(lgg):
    cases = find_cases(lgg)
    assert [case.name.split("_")[2] for case in cases] == ["4942", "4944", "7692"]
    for case in cases:
        assert case.numbers == tuple(range(1, len(case.slices) + 1))
        volume, mask = case.read_pair()
        for number, image, lesion in zip(case.numbers, volume, mask, strict=True):
            path = case.folder / f"{case.name}_{number}.tif"
            assert np.array_equal(image, iio.imread(path))
            path = case.folder / f"{case.name}_{number}_mask.tif"
            assert np.array_equal(lesion, iio.imread(path) > 0)


def test_a_case_folder_is_a_root_of_one(tmp_path, pair, monkeypatch):
    """Once, inference needed ten cases, masks and the data set's own names."""
    folder = write(tmp_path / "my scan", pair[0])
    (case,) = find_cases(folder)
    assert case.name == "my scan" and case.masks == () and len(case.read()) == 6
    monkeypatch.chdir(folder)
    assert [case.name for case in find_cases(".")] == ["my scan"]


def test_a_case_folder_is_not_taken_for_another_case(tmp_path, pair):
    folder = write(tmp_path / "mine", pair[0])
    assert [case.name for case in find_cases(folder, ["mine"])] == ["mine"]
    with pytest.raises(ValueError, match="holds no case 'other'"):
        find_cases(folder, ["other"])


def test_missing_root(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere: no such folder"):
        find_cases(tmp_path / "nowhere")


def test_file_in_place_of_root(tmp_path):
    (tmp_path / "data.csv").write_text("Patient")
    with pytest.raises(ValueError, match="data.csv: is not a volume file"):
        find_cases(tmp_path / "data.csv")


@pytest.mark.parametrize("stray", [None, "data.csv", ".hidden/x"])
def test_root_without_a_case(tmp_path, stray):
    if stray:
        (tmp_path / stray).parent.mkdir(exist_ok=True)
        (tmp_path / stray).write_text("x")
    with pytest.raises(ValueError, match=f"{tmp_path.name}: holds no case"):
        find_cases(tmp_path)


def test_case_without_a_slice(tmp_path, pair):
    write(tmp_path / "a", *pair)
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="empty: holds no slice"):
        find_cases(tmp_path)


def test_unknown_name(tmp_path, pair):
    write(tmp_path / "a", *pair)
    with pytest.raises(ValueError, match=f"{tmp_path.name}: holds no case 'b'"):
        find_cases(tmp_path, ["a", "b"])


# Slices that do not fit together


@pytest.fixture
def case(tmp_path, pair) -> Path:
    """Write a valid case of six slices with masks, for a test to break."""
    return write(tmp_path / "case", *pair)


@pytest.mark.parametrize("number", [1, 3, 6])
def test_missing_mask_is_refused_not_shifted(case, number):
    """Once, it silently shifted every later mask by one slice."""
    (case / f"x_{number}_mask.tif").unlink()
    with pytest.raises(ValueError, match=f"{case}: mask {number} is missing"):
        find_case(case)


@pytest.mark.parametrize("number", [1, 6])
def test_mask_without_its_slice(case, number):
    (case / f"x_{number}.tif").unlink()
    with pytest.raises(ValueError, match=f"{case}: slice {number} is missing"):
        find_case(case)


def test_gap_in_the_numbers(case):
    for name in ("x_4.tif", "x_4_mask.tif"):
        (case / name).unlink()
    with pytest.raises(ValueError, match=f"{case}: slice 4 is missing between 1 and 6"):
        find_case(case)


@pytest.mark.parametrize("copy", ["x_01.tif", "y_1.tif", "x_1.png", "x_01_mask.tif"])
def test_two_files_for_one_slice(case, copy):
    source = "x_1_mask.tif" if "mask" in copy else "x_1.tif"
    shutil.copy(case / source, case / copy)
    with pytest.raises(ValueError, match="slice 1 is also in") as stop:
        find_case(case)
    assert str(case) in str(stop.value) and copy in str(stop.value)


@pytest.mark.parametrize("name", ["preview.png", "x.tif", "x_1_seg.tif", "7.tif", "x_2b.tif"])
def test_misnamed_slice(case, name):
    shutil.copy(case / "x_1.tif", case / name)
    with pytest.raises(ValueError, match=rf"{case / name}: a slice is named"):
        find_case(case)


@pytest.mark.parametrize("name", ["x_3.tif", "x_3_mask.tif"])
def test_slice_of_another_shape(case, name):
    iio.imwrite(case / name, iio.imread(case / name)[:, 1:])
    with pytest.raises(ValueError, match=rf"{case / name}: 64 x 63 .*, but x_1.* has 64 x 64"):
        find_case(case).read_pair()


def test_slice_with_other_channels(case):
    iio.imwrite(case / "x_3.tif", iio.imread(case / "x_3.tif")[..., 0])
    with pytest.raises(ValueError, match=rf"{case}/x_3.tif: 64 x 64 x 1 .* has 64 x 64 x 3"):
        find_case(case).read()


def test_masks_of_another_shape(case):
    for path in case.glob("*_mask.tif"):
        iio.imwrite(path, iio.imread(path)[::2, ::2])
    with pytest.raises(ValueError, match=f"{case}: masks of 32 x 32 .* slices of 64 x 64"):
        find_case(case).read_pair()


def test_no_mask_at_all_is_refused_where_one_is_needed(tmp_path, pair):
    folder = write(tmp_path / "case", pair[0])
    with pytest.raises(ValueError, match=f"{folder}: has no mask"):
        find_case(folder).read_pair()


# Damaged files


def encoded(image: np.ndarray, kind: str) -> bytes:
    """Encode a TIFF with its directory before (`first`) or after the pixels, or a PNG."""
    buffer = io.BytesIO()
    if kind == "first":
        tifffile.imwrite(buffer, image, photometric="rgb")
    elif kind == "png":
        iio.imwrite(buffer, image, extension=".png")
    else:
        compression = None if kind == "plain" else kind
        Image.fromarray(image).save(buffer, "tiff", compression=compression)
    return buffer.getvalue()


def test_directory_is_where_the_names_say():
    """A directory before the pixels survives their loss, which is the harder case."""
    places = {}
    for kind in ("first", "tiff_adobe_deflate"):
        with tifffile.TiffFile(io.BytesIO(encoded(noise(20, 24, 3), kind))) as tiff:
            places[kind] = tiff.pages[0].offset < tiff.pages[0].dataoffsets[0]
    assert places == {"first": True, "tiff_adobe_deflate": False}


@pytest.mark.filterwarnings("ignore::UserWarning")  # from Pillow, about the same damage
@pytest.mark.parametrize("kind", ["first", "plain", "tiff_adobe_deflate", "tiff_lzw", "packbits"])
@pytest.mark.parametrize("kept", [0, 1, 4, 8, 9, 60, 150, 280, 0.5, 0.9, -200, -100, -8, -1])
def test_truncated_tiff(tmp_path, kind, kept):
    """The file is refused by name or, if nothing essential is lost, read as if whole."""
    image = noise(20, 24, 3)
    content = encoded(image, kind)
    path = tmp_path / "x_1.tif"
    path.write_bytes(content[: int(kept * len(content)) if 0 < kept < 1 else kept])
    try:
        read = find_case(tmp_path).read()
    except ValueError as error:
        assert str(path) in str(error) and "cut short" in str(error)
    else:
        assert read.dtype == np.uint8 and np.array_equal(read[0], image)
        assert kept in (-1, -8)


@pytest.mark.parametrize("missing", [1, 100, 4000, 9000])
def test_a_mask_that_does_not_fit_is_an_error(tmp_path, missing):
    slices = Case("x", (1,), (), ())
    volume, mask = np.ones((1, 1024, 16, 1), np.uint8), np.ones((1, 1024, 16), bool)
    write_case(tmp_path, slices, volume, mask, None)
    path = tmp_path / "x/x_1_mask.tif"
    earlier = path.read_bytes()
    with file_limit(len(earlier) - missing), pytest.raises(OSError, match=f"{tmp_path}"):
        write_case(tmp_path, slices, volume, mask, None)
    assert path.read_bytes() == earlier


def test_no_picture_of_an_earlier_mask_stays_beside_a_new_one(tmp_path, monkeypatch):
    slices = Case("x", (1,), (), ())
    volume, mask = np.ones((1, 32, 32, 1), np.uint8), np.zeros((1, 32, 32), bool)
    write_case(tmp_path, slices, volume, mask, None)
    assert (tmp_path / "x/x_1.png").exists() and (tmp_path / "x.gif").exists()
    monkeypatch.setattr(predictions, "outline_in_palette", lambda *_, **__: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        write_case(tmp_path, slices, volume, ~mask, None)
    assert [path.name for path in tmp_path.rglob("x*.*")] == ["x_1_mask.tif"]
    assert iio.imread(tmp_path / "x/x_1_mask.tif").all()


@pytest.mark.parametrize("kept", [0, 8, 40, 0.5, 0.9])
def test_truncated_png(tmp_path, kept):
    content = encoded(noise(20, 24, 3), "png")
    path = tmp_path / "x_1.png"
    path.write_bytes(content[: int(kept * len(content)) if 0 < kept < 1 else kept])
    with pytest.raises(ValueError, match=f"{path}: not a readable image, or cut short"):
        find_case(tmp_path).read()


@pytest.mark.parametrize("name", ["x_2.tif", "x_2_mask.tif"])
@pytest.mark.parametrize(
    "content",
    [b"", b"not an image\n" * 40, b"II*\0", b"\0" * 500],
    ids="empty text head 0".split(),
)
def test_anything_but_an_image_is_refused(case, name, content):
    (case / name).write_bytes(content)
    with pytest.raises(ValueError, match=f"{case / name}: not a readable image"):
        find_case(case).read_pair()


@pytest.mark.parametrize("kind", ["EPS", "JPEG", "BMP", "WEBP", "GIF", "PPM", "PNG", "TIFF"])
@pytest.mark.parametrize("name", ["x_1.png", "x_1.tif"])
def test_the_name_chooses_the_decoder(tmp_path, name, kind):
    Image.fromarray(noise(20, 24, 3)).save(tmp_path / name, kind)
    if name.endswith(kind.lower()[:3]):
        assert find_case(tmp_path).read().shape == (1, 20, 24, 3)
        return
    with pytest.raises(ValueError, match=f"{tmp_path / name}: not a readable image"):
        find_case(tmp_path).read()


def test_a_second_page_that_only_pillow_can_unpack(tmp_path):
    first, second = Image.fromarray(noise(20, 24, 3)), Image.fromarray(noise(20, 24, 3))
    options = {"save_all": True, "append_images": [second], "compression": "tiff_lzw"}
    first.save(tmp_path / "x_1.tif", **options)
    with pytest.raises(ValueError, match="x_1.tif: holds an array of shape .*, not one 2-D slice"):
        find_case(tmp_path).read()


def test_an_ome_tiff_opens_no_other_file(tmp_path, monkeypatch):
    tifffile.imwrite(tmp_path / "secret", noise(20, 24))
    named = '<UUID FileName="../secret">urn:uuid:1</UUID>'
    xml = (
        '<OME xmlns="http://www.openmicroscopy.org/Schemas/OME/2016-06"><Image ID="Image:0">'
        '<Pixels DimensionOrder="XYZCT" Type="uint8" SizeX="24" SizeY="20" SizeZ="2" SizeC="1" '
        f'SizeT="1"><TiffData FirstZ="0" IFD="0">{named}</TiffData></Pixels></Image></OME>'
    )
    pages = np.stack([noise(20, 24)] * 2)
    (tmp_path / "case").mkdir()
    tifffile.imwrite(tmp_path / "case/x_1.tif", pages, description=xml, metadata=None)
    opened, builtin = [], open

    def spy(file, *args, **options):
        opened.append(Path(str(file)).name)
        return builtin(file, *args, **options)

    monkeypatch.setattr("builtins.open", spy)
    with pytest.raises(ValueError, match=r"\(2, 20, 24, 1\), not one 2-D slice"):
        find_case(tmp_path / "case").read()
    assert "secret" not in opened


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_nan_in_a_file(tmp_path, value):
    image = np.ones((10, 14), dtype=np.float32)
    tifffile.imwrite(tmp_path / "x_1.tif", image)
    image[3, 3] = value
    tifffile.imwrite(tmp_path / "x_2.tif", image)
    with pytest.raises(ValueError, match=f"{tmp_path}/x_2.tif: holds NaN"):
        find_case(tmp_path).read()


def write_png(path: Path, image: np.ndarray, colours: int) -> None:
    """Write an image (H, W, C) uint16 with the number that PNG has for its kind of colours."""
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in image)
    header = struct.pack(">IIBBBBB", image.shape[1], image.shape[0], 16, colours, 0, 0, 0)
    with open(path, "wb") as file:
        file.write(b"\x89PNG\r\n\x1a\n")
        for name, data in ((b"IHDR", header), (b"IDAT", zlib.compress(rows)), (b"IEND", b"")):
            check = struct.pack(">I", zlib.crc32(name + data))
            file.write(struct.pack(">I", len(data)) + name + data + check)


def test_png_of_16_bit_colour_keeps_its_16_bits(tmp_path):
    """Pillow, and so most readers, would silently reduce it to 8 bits."""
    image = noise(20, 30, 3, high=4096, dtype=np.uint16)
    write_png(tmp_path / "scan_1.png", image, 2)
    volume = find_case(tmp_path).read()
    assert volume.dtype == np.uint16 and np.array_equal(volume[0], image)


def test_png_of_16_bit_grey_with_opacity_is_refused(tmp_path):
    """In 8 bits, a mask of ones would be empty."""
    write_png(tmp_path / "scan_1.png", np.full((20, 30, 2), (1, 65535), np.uint16), 4)
    with pytest.raises(ValueError, match="scan_1.png: has 16 bits of grey, and opacity"):
        find_case(tmp_path).read()


def test_slices_of_two_cases_in_one_folder_are_refused(tmp_path):
    for k, name in enumerate(["a_1", "a_2", "b_3"]):
        iio.imwrite(tmp_path / f"{name}.tif", np.full((8, 8, 3), k, np.uint8))
    with pytest.raises(ValueError, match="b_3.tif: is of another case than a_1.tif"):
        find_case(tmp_path)
