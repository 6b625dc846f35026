"""Data on disk: who sees which sample, what is done to images, and what becomes of bad ones."""

import io
import json
import random
import struct
import tarfile
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from dataset import pixels, shards
from dataset.ahead import Ahead, batch_ids
from dataset.order import Epochs, bucket_sizes, in_batches
from dataset.pixels import cut, upright
from dataset.shards import expand, tar_members
from dataset.sources import open_data

COUNT, SIZE = 24, (16, 16)


def encoded(image: Image.Image, form: str = "PNG", **options) -> bytes:
    file = io.BytesIO()
    image.save(file, form, **options)
    return file.getvalue()


def flat(colour, width: int = 16, height: int = 16, mode: str = "RGB") -> Image.Image:
    return Image.new(mode, (width, height), colour)


def write_folder(root, samples: list[tuple[bytes, bytes]]):
    """Files 000.png, 000.txt, ...; returns the folder."""
    root.mkdir(exist_ok=True)
    for n, (image, caption) in enumerate(samples):
        (root / f"{n:03d}.png").write_bytes(image)
        (root / f"{n:03d}.txt").write_bytes(caption)
    return root


def write_tar(path, members: list[tuple[str, bytes]], form: int = tarfile.USTAR_FORMAT):
    path.parent.mkdir(exist_ok=True)
    with tarfile.open(path, "w", format=form) as tar:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return path


def good(count: int = COUNT) -> list[tuple[bytes, bytes]]:
    """Images whose red is their number, and captions that say it."""
    return [(encoded(flat((n, 0, 0))), f"sample {n}".encode()) for n in range(count)]


@pytest.fixture
def write(tmp_path):
    """write(form) -> what --data is given for the same 24 samples in that form."""

    def in_form(form: str) -> str:
        folder = write_folder(tmp_path / "images", good())
        names = [f"images/{n:03d}.png" for n in range(COUNT)]
        captions = [caption.decode() for _, caption in good()]
        objects = [{"image": a, "caption": b} for a, b in zip(names, captions, strict=True)]
        if form == "folder":
            return str(folder)
        if form == "three lists":
            keys = {"keys": names, "image_paths": names, "prompts": captions}
            (tmp_path / "list.json").write_text(json.dumps(keys))
            return str(tmp_path / "list.json")
        if form == "list of objects":
            (tmp_path / "list.json").write_text(json.dumps(objects))
            return str(tmp_path / "list.json")
        if form == "json lines":
            (tmp_path / "list.jsonl").write_text("\n".join(map(json.dumps, objects)) + "\n")
            return str(tmp_path / "list.jsonl")
        if form == "prompts":
            (tmp_path / "prompts.txt").write_text("\n".join(captions))
            return str(tmp_path / "prompts.txt")
        for shard in range(3):
            members = []
            for n in range(8 * shard, 8 * shard + 8):
                members.append((f"{n:09d}.png", good()[n][0]))
                if form == "shards with txt":
                    members.append((f"{n:09d}.txt", good()[n][1]))
                members.append((f"{n:09d}.json", json.dumps(objects[n]).encode()))
            write_tar(tmp_path / "shards" / f"{shard:05d}.tar", members)
        many = form == "shards with txt"
        return str(tmp_path / "shards") + ("" if many else "/{00000..00002}.tar")

    return in_form


ALL_FORMS = [
    "folder",
    "three lists",
    "list of objects",
    "json lines",
    "shards with txt",
    "shards with json",
    "prompts",
]


def captions_of(path: str, ranks: int, workers: int, steps: range, batch: int = 2) -> list[str]:
    """What all ranks see, each with a data set of its own."""
    seen = {}
    for rank in range(ranks):
        data = open_data(path, SIZE, seed=5)
        ids = [batch_ids(step, batch, rank, ranks) for step in steps]
        with Ahead(data, ids.__getitem__, workers, range(len(ids))) as batches:
            for n, pairs in zip(ids, batches, strict=True):
                seen.update(zip(n, pairs.captions, strict=True))
                if pairs.images is not None:
                    red = ((pairs.images[:, 0, 0, 0] + 1) * 127.5).round().int().tolist()
                    assert pairs.captions == [f"sample {r}" for r in red], "another's caption"
    return [seen[i] for i in sorted(seen)]


# --- who sees what -------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ALL_FORMS)
def test_an_epoch_shows_each_sample_once_to_any_ranks_and_workers(write, form):
    """Two epochs: the same order for all, each sample once in each, in another order."""
    path = write(form)
    whole = captions_of(path, 1, 0, range(COUNT))
    every = sorted(f"sample {n}" for n in range(COUNT))
    assert sorted(whole[:COUNT]) == sorted(whole[COUNT:]) == every
    assert whole[:COUNT] != whole[COUNT:]
    for ranks, workers in ((1, 3), (2, 1), (3, 2)):
        assert captions_of(path, ranks, workers, range(COUNT // ranks)) == whole


@pytest.mark.parametrize("form", ALL_FORMS)
def test_a_run_resumed_in_mid_epoch_sees_the_rest_of_it(write, form):
    """Five steps of one rank, then the other fourteen samples by two ranks with two workers."""
    path = write(form)
    whole = captions_of(path, 1, 0, range(COUNT // 2))
    before, after = captions_of(path, 1, 1, range(4)), captions_of(path, 2, 2, range(2, 6))
    assert before + after == whole


def test_a_random_crop_is_a_function_of_seed_and_number(tmp_path):
    wide = Image.fromarray(np.random.default_rng(0).integers(0, 255, (16, 64, 3), dtype=np.uint8))
    path = str(write_folder(tmp_path / "x", [(encoded(wide), b"noise")] * 30))
    one, two = (open_data(path, SIZE, 1, crop="random") for _ in range(2))
    batch = one(range(4, 28))
    alone = two([20])
    assert torch.equal(batch.images[16:17], alone.images)
    assert torch.equal(batch.sizes[16:17], alone.sizes)
    left = batch.sizes[:, 3]
    assert len(left.unique()) > 12 and left.min() < 12 and 36 < left.max() <= 48
    other = open_data(path, SIZE, 2, crop="random")(range(4, 28))
    assert not torch.equal(other.sizes, batch.sizes)


def test_shards_are_read_window_by_window(write, monkeypatch):
    """24 samples in shards of 8, windows of 4: a window never reaches into more than two shards,
    the shards' order changes, and samples are shuffled within a window."""
    monkeypatch.setattr(shards, "WINDOW", 4)
    source = open_data(write("shards with txt"), SIZE, 0).source
    orders = [source.order(torch.Generator().manual_seed(n)) for n in range(20)]
    for order in orders:
        assert order.sort().values.tolist() == list(range(COUNT))
        for window in order.split(4):
            assert window.max() // 8 == window.min() // 8, "8 is a multiple of 4"
    assert len({int(order[0]) // 8 for order in orders}) == 3
    assert any(order[:4].diff().lt(0).any() for order in orders)


def test_an_epochs_order_is_made_once():
    made = []

    def order(draw):
        made.append(1)
        return torch.randperm(10, generator=draw)

    epochs = Epochs(10, order, 0)
    assert sorted(epochs.item(i) for i in range(10)) == list(range(10))
    assert [epochs.item(i) for i in (9, 10, 9, 10)] and len(made) == 2


# --- tars ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_headers_say_where_members_are(tmp_path, form):
    """As the standard library sees them: with long names, folders, empty and odd-sized files."""
    deep = "d" * 90 + "/" + "e" * 60 + "/"
    members = [("a.txt", b"x" * 513), ("empty.txt", b""), (deep + "long.jpg", b"y" * 1024)]
    if form != tarfile.USTAR_FORMAT:
        members += [("n" * 300 + ".txt", b"z"), ("äöü.txt", b"utf-8"), ("after.txt", b"!")]
    path = write_tar(tmp_path / "x.tar", members, form)
    with tarfile.open(path, "a", format=form) as tar:
        folder = tarfile.TarInfo("f" * (40 if form == tarfile.USTAR_FORMAT else 200))
        folder.type = tarfile.DIRTYPE
        tar.addfile(folder)
        tar.addfile(tarfile.TarInfo("last.txt"))
    with open(path, "rb") as file:
        ours = list(tar_members(file))
    with tarfile.open(path) as tar:
        theirs = [(m.name, m.offset_data, m.size) for m in tar if m.isfile()]
    assert ours == theirs and len(ours) > 3


def test_a_pattern_names_its_shards():
    assert [p.name for p in expand("x/{098..101}.tar")] == [
        "098.tar",
        "099.tar",
        "100.tar",
        "101.tar",
    ]
    assert [str(p) for p in expand("{a}/x-{8..10}.tar")] == [f"{{a}}/x-{n}.tar" for n in (8, 9, 10)]
    assert [str(p) for p in expand("{0..1}/{00..01}.tar")] == [
        f"{a}/0{b}.tar" for a in (0, 1) for b in (0, 1)
    ]


@pytest.mark.parametrize("damage", ["cut", "cut in a caption", "overwritten", "one bit", "no tar"])
def test_a_corrupt_tar_is_named_and_its_readable_part_used(write, damage):
    """Three shards of 8 samples, the second damaged in its third sample (or from its start)."""
    path = write("shards with txt")
    broken = Path(path) / "00001.tar"
    with tarfile.open(broken) as tar:
        at = tar.getmember("000000010.png").offset_data
        caption = tar.getmember("000000010.txt").offset_data
    stored = bytearray(broken.read_bytes())
    if damage == "cut":
        stored = stored[: at + 10]
    elif damage == "cut in a caption":
        stored = stored[: caption + 8]
    elif damage == "overwritten":
        stored[at - 512 : at] = random.Random(0).randbytes(512)
    elif damage == "one bit":
        stored[at - 512 + 8] ^= 1  # in the name: a header's sum tells
    else:
        stored = b"<html>not found</html>" * 100
    broken.write_bytes(stored)
    data = open_data(path, SIZE, 0)
    left = 16 if damage == "no tar" else 18
    assert len(data.source) == left
    captions = data(range(left)).captions
    expected = [*range(8), *([] if damage == "no tar" else [8, 9]), *range(16, 24)]
    assert sorted(captions) == sorted(f"sample {n}" for n in expected)
    assert list(data.bad) == [str(broken)] and "tar" in data.bad[str(broken)]
    remark = data.remark()
    assert str(broken) in remark and f"0 of {left} samples" in remark, "a tar is no sample"
    assert data.remark() == "", "said once"


def test_a_tar_is_as_good_when_only_its_end_mark_is_missing(write):
    """It is still named: whoever wrote it did not finish."""
    path = write("shards with txt")
    shard = Path(path) / "00002.tar"
    with tarfile.open(shard) as tar:
        last = tar.getmembers()[-1]
    shard.write_bytes(shard.read_bytes()[: last.offset_data + 512])
    data = open_data(path, SIZE, 0)
    assert len(data.source) == COUNT and list(data.bad.values()) == ["the tar ends early"]


# --- one image -----------------------------------------------------------------------------------


def test_images_are_turned_as_exif_says():
    """Orientation 6: the camera's left edge is on top; the six sizes are of the upright image."""
    image = flat((0, 0, 0), 32, 16)
    image.paste((255, 255, 255), (0, 0, 8, 16))
    exif = Image.Exif()
    exif[0x0112] = 6
    turned = upright(encoded(image, "JPEG", exif=exif, quality=95))
    assert turned.size == (16, 32)
    assert min(turned.getpixel((8, 2))) > 240 and max(turned.getpixel((8, 20))) < 15
    assert cut(turned, (32, 16), (0.5, 0.5))[1][:2] == (32, 16)


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P", "webp"])
def test_what_is_transparent_is_over_white(mode):
    image = flat((200, 0, 0, 0), mode="RGBA")
    image.paste((0, 0, 200, 255), (0, 0, 8, 16))
    options = {"lossless": True} if mode == "webp" else {}
    image = image.quantize() if mode == "P" else image.convert("LA" if mode == "LA" else "RGBA")
    result = upright(encoded(image, "WEBP" if mode == "webp" else "PNG", **options))
    assert result.mode == "RGB" and result.getpixel((12, 8)) == (255, 255, 255)
    assert result.getpixel((2, 8)) == ((23,) * 3 if mode == "LA" else (0, 0, 200))


def test_half_transparent_is_half_white():
    assert upright(encoded(flat((0, 0, 0, 128), mode="RGBA"))).getpixel((3, 3)) == (127,) * 3


def test_grey_becomes_three_equal_channels():
    assert upright(encoded(flat(77, mode="L"))).getpixel((0, 0)) == (77, 77, 77)
    assert upright(encoded(flat(1, mode="1"))).getpixel((0, 0)) == (255, 255, 255)


def test_sixteen_bits_of_grey_are_scaled_to_eight():
    """257 v is the 16-bit value of the 8-bit v."""
    ramp = (257 * np.arange(256, dtype=np.uint16)).reshape(16, 16)
    result = np.asarray(upright(encoded(Image.fromarray(ramp))))
    assert (result == np.arange(256).reshape(16, 16, 1)).all()


def test_cmyk_becomes_rgb():
    """Full cyan has no red; JPEG may err by a few levels."""
    red, green, blue = upright(encoded(flat((255, 0, 0, 0), mode="CMYK"), "JPEG")).getpixel((8, 8))
    assert red < 10 and green > 245 and blue > 245


def test_the_crop_is_of_the_scaled_image_and_its_sizes_say_where():
    """A ramp of 100 x 50 to 20 x 20: scaled by .4 to 40 x 20, cropped at left 10. A pixel's
    expected value is the ramp at its centre, within a level of the filter's rounding."""
    ramp = np.tile(2 * np.arange(100, dtype=np.uint8), (50, 1))
    pixels, sizes = cut(Image.fromarray(ramp).convert("RGB"), (20, 20), (0.5, 0.5))
    assert sizes == (50, 100, 0, 10, 20, 20) and pixels.shape == (3, 20, 20)
    expected = 2 * ((torch.arange(20) + 10.5) / 0.4 - 0.5)
    assert ((pixels + 1) * 127.5 - expected).abs().max() < 1.01
    first, last = (cut(Image.fromarray(ramp).convert("RGB"), (20, 20), (0, u)) for u in (0, 0.999))
    assert first[1][3] == 0 and last[1][3] == 20
    assert first[0].mean() < pixels.mean() < last[0].mean()


@pytest.mark.parametrize("shape", [(16, 16), (7, 5), (1, 300), (333, 16), (97, 89), (4000, 3)])
def test_any_shape_is_covered_without_a_step_outside(shape):
    """A constant image stays constant, up to its edges."""
    for where in ((0.0, 0.0), (0.999, 0.999)):
        pixels, _ = cut(flat((10, 20, 30), *shape), (24, 16), where)
        assert pixels.shape == (3, 24, 16)
        colours = ((pixels + 1) * 127.5).round().flatten(1).unique(dim=1)
        assert colours.tolist() == [[10], [20], [30]]


def test_the_six_sizes_of_a_batch_are_its_samples(tmp_path):
    path = write_folder(tmp_path / "x", [(encoded(flat(0, 40, 20)), b"wide")])
    batch = open_data(str(path), SIZE, 0)([0])
    assert batch.sizes.tolist() == [[20, 40, 0, 8, 16, 16]]


# --- aspect ratios -------------------------------------------------------------------------------


def test_bucket_sizes_have_about_one_area():
    """Multiples of 64, at most 10 % under the area, at most 2 : 1, with the size asked for."""
    for size in ((1024, 1024), (512, 512), (768, 1344)):
        sizes = bucket_sizes(size)
        area, aspects = size[0] * size[1], [height / width for height, width in sizes]
        assert size in sizes and all(a % 64 == 0 and b % 64 == 0 for a, b in sizes)
        assert all(0.9 * area < a * b <= area for a, b in sizes)
        assert all(0.5 <= a <= 2 for a in aspects) and aspects == sorted(set(aspects))
    assert len(bucket_sizes((1024, 1024))) == 9
    assert {(1152, 896), (896, 1152), (832, 1216), (1344, 768)} < set(bucket_sizes((1024, 1024)))


@pytest.mark.parametrize("count, batch", [(40, 4), (41, 4), (3, 4), (7, 1), (50, 8)])
def test_batches_of_one_bucket_lose_nothing(count, batch):
    """Each item once; fewer than a batch of them twice (or more, if there are fewer); all but the
    batches at borders are of one bucket."""
    draw = torch.Generator().manual_seed(count)
    buckets = torch.randint(0, 3, (count,), generator=draw)
    order = in_batches(torch.randperm(count, generator=draw), buckets, batch)
    assert len(order) % batch == 0 and len(order) - count < batch
    assert order.unique().tolist() == list(range(count))
    mixed = sum(len(buckets[b].unique()) > 1 for b in order.split(batch))
    assert mixed <= 2


def bucketed(tmp_path, count: int = 30, seed: int = 0, batch: int = 4):
    """Images tall, square and wide."""
    shapes = [(64, 64), (46, 88), (90, 45)]
    samples = [
        (encoded(flat((n, 0, 0), *shapes[n % 3])), f"sample {n}".encode()) for n in range(count)
    ]
    path = str(write_folder(tmp_path / "x", samples))
    return open_data(path, (256, 256), seed, buckets=True, batch=batch)


def test_a_batch_has_one_shape_and_an_epoch_every_sample(tmp_path):
    """30 samples in batches of 4 over 2 ranks: 8 batches, 2 samples shown twice. Shapes fit."""
    data, captions, shapes = bucketed(tmp_path), [], set()
    for step in range(4):
        for rank in range(2):
            batch = data(batch_ids(step, 4, rank, 2))
            captions += batch.captions
            shapes.add(batch.images.shape[2:])
            assert batch.sizes[:, 4:].unique(dim=0).tolist() == [list(batch.images.shape[2:])]
            fitting = (batch.sizes[:, 0] > batch.sizes[:, 1]) == (
                batch.images.shape[2] > batch.images.shape[3]
            )
            assert fitting.float().mean() >= 0.5, "most of a batch has the batch's aspect"
    assert len(captions) == 32 and set(captions) == {f"sample {n}" for n in range(30)}
    assert len(shapes) == 3
    again = bucketed(tmp_path)(batch_ids(1, 4, 1, 2))
    assert again.captions == captions[12:16], "no need to have seen what came before"


def test_buckets_follow_exif(tmp_path):
    """A picture taken upright is stored lying: PNG and JPEG, past 64 KB and truncated too."""
    exif = Image.Exif()
    exif[0x0112] = 8
    noise = np.random.default_rng(0).integers(0, 255, (200, 400, 3), dtype=np.uint8)
    lying = Image.fromarray(noise)
    forms = [("JPEG", {"quality": 100}), ("PNG", {}), ("WEBP", {"lossless": True})]
    stored = [encoded(lying, form, exif=exif, **options) for form, options in forms]
    assert min(map(len, stored)) > 1 << 16
    path = write_folder(tmp_path / "x", [(image, b"tall") for image in stored])
    data = open_data(str(path), (256, 256), 0, buckets=True)
    assert [data([i]).images.shape[2] > 256 for i in range(3)] == [True] * 3


# --- bad samples ---------------------------------------------------------------------------------


def damaged(kind: str) -> tuple[bytes, bytes]:
    picture = np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8)
    jpeg = encoded(Image.fromarray(picture), "JPEG")
    return {
        "truncated": (jpeg[: len(jpeg) // 2], b"half"),
        "no image": (b"<html>gone</html>", b"gone"),
        "empty image": (b"", b"nothing"),
        "icon": (encoded(flat(0), "ICO"), b"another format"),
        "empty caption": (jpeg, b""),
        "blank caption": (jpeg, b" \n\t"),
        "caption not UTF-8": (jpeg, "größer".encode("latin-1")),
        "bomb": (encoded(flat(0, 300, 300)), b"large"),
    }[kind]


WHY = {
    "truncated": "truncated",
    "no image": "no JPEG, PNG or WebP",
    "empty image": "no JPEG, PNG or WebP",
    "icon": "no JPEG, PNG or WebP",
    "empty caption": "caption is empty",
    "blank caption": "caption is empty",
    "caption not UTF-8": "no UTF-8",
    "bomb": "decompression bomb",
}


@pytest.mark.parametrize("kind", WHY)
@pytest.mark.parametrize("form", ["folder", "shards"])
def test_a_bad_sample_is_named_and_replaced_by_the_next(tmp_path, monkeypatch, kind, form):
    """One of 24 is bad: the other 23 are seen where they were, the one after it twice."""
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 20_000)
    samples = good()

    def opened():
        if form == "folder":
            return open_data(str(write_folder(tmp_path / "x", samples)), SIZE, 0)
        members = [
            (f"{n:03d}.{suffix}", part)
            for n, sample in enumerate(samples)
            for suffix, part in zip(("png", "txt"), sample, strict=True)
        ]
        return open_data(str(write_tar(tmp_path / "y" / "0.tar", members)), SIZE, 0)

    whole = opened()(range(COUNT)).captions
    samples[7] = damaged(kind)
    data, place = opened(), whole.index("sample 7")
    seen = [data([i]).captions[0] for i in range(COUNT)]
    following = opened()([place + 1]).captions[0]
    assert seen == whole[:place] + [following] + whole[place + 1 :]
    ((name, why),) = data.bad.items()
    assert "007" in name and WHY[kind] in why and "0x" not in why
    remark = data.remark()
    assert name in remark and why in remark and f"1 of {COUNT}" in remark and "\n" not in remark
    assert data.remark() == ""
    data(range(COUNT))
    assert data.remark() == "" and len(data.bad) == 1, "a bad sample counts once"


def folder_with_bad(folder, count: int, places: list[int]):
    """A data set of `count` samples, of which those at these places of the first epoch are bad."""
    data = open_data(str(write_folder(folder, good(count))), SIZE, 0)
    for place in places:
        Path(data.source.name(data.epochs.item(place))).write_bytes(damaged("truncated")[0])
    return data


def test_more_than_five_percent_of_bad_samples_stop_the_run(tmp_path):
    """Of 40: two bad are 5 % and pass, the third stops it, in one line with their names."""
    data = folder_with_bad(tmp_path / "two", 40, [5, 30])
    data(range(80))
    assert len(data.bad) == 2 and len(data.seen) == 40
    data = folder_with_bad(tmp_path / "three", 40, [0, 1, 30])
    data(range(30))
    with pytest.raises(ValueError, match=r"^3 of 31 samples are bad.*\.png \(.*truncated") as error:
        data([30])
    assert "\n" not in str(error.value)


def test_a_few_bad_samples_at_the_start_do_not_stop_a_large_run(tmp_path):
    """Ten of the first 20 of 300 are bad: 5 % of the 200 that judgement waits for; one more is
    too many."""
    data = folder_with_bad(tmp_path / "x", 300, list(range(0, 20, 2)))
    data(range(300))
    assert len(data.bad) == 10
    with pytest.raises(ValueError, match="^11 of 21 samples"):
        folder_with_bad(tmp_path / "y", 300, [*range(0, 20, 2), 20])(range(300))


def test_where_all_is_bad_the_run_stops_at_once(tmp_path):
    """One sample, less than are needed for a share; and a hundred, of which six are read."""
    one = str(write_folder(tmp_path / "one", [damaged("no image")]))
    with pytest.raises(ValueError, match=r"no sample can be read: .*000\.png"):
        open_data(one, SIZE, 0)([0])
    many = str(write_folder(tmp_path / "many", [damaged("empty image")] * 100))
    data = open_data(many, SIZE, 0)
    with pytest.raises(ValueError, match="6 of 6 samples are bad.* and 1 more"):
        data([0])
    assert len(data.bad) == 6


def test_bad_samples_keep_the_shape_of_their_batch(tmp_path):
    data = bucketed(tmp_path)
    paths = sorted((tmp_path / "x").glob("*.png"))
    paths[4].write_bytes(b"gone")
    data = open_data(str(tmp_path / "x"), (256, 256), 0, buckets=True, batch=4)
    captions = sum((data(batch_ids(step, 4)).captions for step in range(8)), [])
    assert set(captions) == {f"sample {n}" for n in range(30)} - {"sample 4"}
    assert list(data.bad) == [str(paths[4])]


@pytest.mark.filterwarnings("ignore:Corrupt EXIF", "ignore:Tag data larger")
def test_no_damage_to_an_image_ends_a_run():
    """A thousand files with flipped bytes, in three formats: read, or refused as bad."""
    draw, refused = random.Random(0), 0
    image = Image.fromarray(np.random.default_rng(0).integers(0, 255, (24, 24, 3), dtype=np.uint8))
    exif = Image.Exif()
    exif[0x0112] = 6
    whole = [encoded(image, form, exif=exif) for form in ("JPEG", "PNG", "WEBP")]
    for n in range(1000):
        broken = bytearray(whole[n % 3])
        for _ in range(draw.choice((1, 3, 20))):
            broken[draw.randrange(len(broken))] = draw.randrange(256)
        if n % 4 == 0:
            broken = broken[: draw.randrange(len(broken))]
        try:
            cut(upright(bytes(broken)), SIZE, (0.5, 0.5))
        except pixels.BAD as error:
            refused += 1
            assert pixels.reason(error) and "\n" not in pixels.reason(error)
    assert 200 < refused < 1000


# --- reading ahead -------------------------------------------------------------------------------


class Slow:
    """A data set whose batches take longer the earlier they are asked for.

    meet: so many must be read at once, or it fails.
    """

    def __init__(self, bad: int | None = None, meet: int = 1):
        self.bad, self.asked = bad, []
        self.together = threading.Barrier(meet, timeout=20)

    def __call__(self, ids):
        self.asked.append(ids[0])
        self.together.wait()
        time.sleep(0.02 if ids[0] % 3 == 0 else 0.001)
        if ids[0] == self.bad:
            raise ValueError("too many samples are bad")
        return list(ids)


def of_step(step: int) -> range:
    return range(step, step + 1)


@pytest.mark.parametrize("workers", [0, 1, 4])
def test_batches_come_in_order_from_any_step(workers):
    for steps in (range(12), range(7, 12), range(3, 3)):
        with Ahead(Slow(), of_step, workers, steps) as batches:
            assert list(batches) == [[step] for step in steps]


def test_workers_read_at_once_and_not_too_far_ahead():
    """Three workers, of whom each waits for the others; five batches taken, two each ahead."""
    data = Slow(meet=3)
    with Ahead(data, of_step, 3, range(12)) as batches:
        assert list(batches) == [[step] for step in range(12)]
    data = Slow()
    with Ahead(data, of_step, 3, range(100)) as batches:
        for _ in range(5):
            next(batches)
        time.sleep(0.2)
        assert len(data.asked) <= 5 + 2 * 3
    assert sorted(data.asked) == list(range(len(data.asked)))


@pytest.mark.parametrize("workers", [0, 3])
def test_leaving_the_loop_leaves_no_thread(workers):
    before, data = set(threading.enumerate()), Slow()
    with pytest.raises(KeyboardInterrupt), Ahead(data, of_step, workers, range(50)) as batches:
        next(batches)
        raise KeyboardInterrupt
    assert set(threading.enumerate()) == before
    asked = len(data.asked)
    time.sleep(0.05)
    assert len(data.asked) == asked < 20


@pytest.mark.parametrize("workers", [0, 3])
def test_an_error_comes_with_its_batch(workers):
    with Ahead(Slow(bad=4), of_step, workers, range(50)) as batches:
        assert [next(batches) for _ in range(4)] == [[0], [1], [2], [3]]
        with pytest.raises(ValueError, match="too many samples are bad"):
            next(batches)


# --- what --data cannot be -----------------------------------------------------------------------


def test_what_data_cannot_be_is_said_in_one_line(tmp_path):
    """Each names the path and what is wrong; where nothing is found, all forms and the way to
    start without images."""
    (tmp_path / "empty").mkdir()
    (tmp_path / "picture.gif").write_bytes(b"")
    (tmp_path / "blank.txt").write_text("\n \n")
    (tmp_path / "latin.txt").write_bytes("größer".encode("latin-1"))
    write_tar(tmp_path / "none" / "0.tar", [("readme.md", b"no samples")])
    write_tar(tmp_path / "gz" / "0.tar", [])
    (tmp_path / "gz" / "0.tar").write_bytes(struct.pack("600s", b"\x1f\x8b\x08"))
    lists = {
        "cut.json": '{"keys": [',
        "uneven.json": '{"image_paths": ["a.png"], "prompts": []}',
        "other.json": '{"a": 1}',
        "numbers.json": "[1, 2]",
        "nameless.jsonl": '{"image": "a.png", "caption": "x"}\n{"caption": "x"}',
        "absent.jsonl": '{"image": "a.png", "caption": "x"}',
        "nothing.json": "[]",
    }
    for name, text in lists.items():
        (tmp_path / name).write_text(text)
    everything = ["--data prompts.txt --no-gan", ".jsonl", "{000..127}.tar", "folder of images"]
    refused = {
        "data": ["is missing", *everything],
        "empty": ["holds no image with a caption", *everything],
        "picture.gif": ["picture.gif", *everything],
        "blank.txt": ["holds no prompt", *everything],
        "none": ["holds no image with a caption", *everything],
        "gz": ["damaged at byte 0", *everything],
        "none/{0..3}.tar": ["3 of 4 shards", "none/1.tar", *everything],
        "none/{3..0}.tar": ["is missing", *everything],
        "nothing.json": ["holds no image with a caption"],
        "latin.txt": ["no UTF-8"],
        "cut.json": ["cut.json is not the JSON"],
        "uneven.json": ["one length", "image_paths", "prompts"],
        "other.json": ["one length"],
        "numbers.json": ['{"image": ..., "caption": ...}'],
        "nameless.jsonl": ["entry 2 names no image"],
        "absent.jsonl": ["a.png is missing", "relative to the list"],
    }
    for name, words in refused.items():
        with pytest.raises((ValueError, FileNotFoundError)) as error:
            open_data(str(tmp_path / name), SIZE, 0)
        said = str(error.value)
        assert name.split("/")[0] in said and "\n" not in said
        for word in words:
            assert word in said, f"{word} is not in: {said}"


def test_crop_and_bucket_sizes_are_checked(tmp_path):
    path = str(write_folder(tmp_path / "x", good(1)))
    with pytest.raises(ValueError, match='--crop is "middle"; choose from centre, random'):
        open_data(path, SIZE, 0, crop="middle")
    with pytest.raises(ValueError, match="--size 16 16: .* multiples of 64"):
        open_data(path, SIZE, 0, buckets=True)


def test_images_without_a_caption_are_left_out_and_counted(tmp_path):
    """Three in a folder, then in a tar; and those of which none has a caption."""
    path = write_folder(tmp_path / "x", good(3))
    (path / "001.txt").unlink()
    image = good()[0][0]
    members = [("a.png", image), ("b.png", image), ("b.txt", b"one"), ("c.txt", b"alone")]
    tar = write_tar(tmp_path / "y" / "0.tar", members)
    why = "1 images without a caption"
    for place, left, more in ((path, 2, ""), (tar, 1, ", 1 captions without an image")):
        data = open_data(str(place), SIZE, 0)
        assert len(data.source) == left
        assert data.bad == {str(place): why + more} and data.remark()
    with pytest.raises(
        ValueError, match=r"holds no image with a caption; .*0.tar \(1 images without"
    ):
        open_data(str(write_tar(tar, members[:1])), SIZE, 0)
