"""Data as people have them: what can be read is read, the rest is counted, named or refused.

Each test is of one kind of trouble; docs/robustness.md lists them.
"""

import io
import json
import os
import sys
import tarfile
from pathlib import Path

import pytest
import torch
from conftest import refused
from PIL import Image
from test_images import encoded, flat, good, write_folder, write_tar

import evaluate
import sample
import train
from config import Parser, Refusal, legible
from dataset import folders
from dataset.cache import Cache, write_cache
from dataset.captions import LONGEST, read_lines, read_prompts
from dataset.identity import changes, identity
from dataset.images import Pairs
from dataset.pixels import SUFFIXES, upright
from dataset.shards import expand, tar_members
from dataset.sources import open_data
from engine import build, ranks
from engine.run import check_run, settings_of
from nets import weights
from teachers import configure, find

SIZE = (16, 16)
IMAGE = encoded(flat((9, 9, 9)))


def opened(path, seed: int = 0):
    return open_data(str(path), SIZE, seed)


def seen(data) -> list[str]:
    """Captions of an epoch, one by one; bad ones are replaced."""
    return [data([i]).captions[0] for i in range(len(data.source))]


def listed(folder: Path, entries: list[str], count: int = 30) -> Path:
    """A list of `count` good samples, and of these, which are JSON."""
    write_folder(folder, good(count))
    rows = [f'{{"image": "{n:03d}.png", "caption": "fox {n}"}}' for n in range(count)]
    (folder / "list.json").write_text(f"[{', '.join([*rows, *entries])}]")
    return folder / "list.json"


def tarred(path: Path, extra: list[tuple[str, bytes]], count: int = 30) -> Path:
    members = [
        (f"{n:03d}.{s}", x) for n in range(count) for s, x in (("png", IMAGE), ("txt", b"fox"))
    ]
    return write_tar(path, [*members, *extra])


def bad_one(data) -> str:
    """What is said of the only bad sample, in a line that any screen can show."""
    seen(data)
    assert len(data.bad_items) == 1
    remark = data.remark()
    assert remark.encode() and remark.isprintable() and "1 of 31 samples are bad" in remark
    return remark


# --- strings that UTF-8 cannot hold, JSON that Python cannot --------------------------------------

HALF, SWAPPED = r"a fox \ud83e", r"\udd8a\ud83e"


@pytest.mark.parametrize(
    "caption, why",
    [
        (f'"{HALF}"', "no UTF-8 text"),
        (f'"{SWAPPED}"', "no UTF-8 text"),
        (r'"\u200b\ufeff \u0000"', "empty"),
        ("null", "empty"),
        ('["a", "b"]', "no text but a list"),
        ("NaN", "no text but a number"),
        ('{"en": "fox"}', "no text but an object"),
        (f'"{"a" * (LONGEST + 1)}"', "100,001 letters"),
    ],
    ids=["half", "swapped", "unseen", "null", "list", "number", "object", "endless"],
)
def test_a_caption_that_is_none_is_a_bad_sample(tmp_path, caption, why):
    """In a list and in a tar's JSON: named, counted, replaced; the run goes on."""
    image = '{"image": "000.png", "caption": '
    assert why in bad_one(opened(listed(tmp_path / "a", [f"{image}{caption}}}"])))
    members = [("x.png", IMAGE), ("x.json", f'{{"caption": {caption}}}'.encode())]
    remark = bad_one(opened(tarred(tmp_path / "b" / "0.tar", members)))
    assert why in remark and "0.tar:x" in remark


@pytest.mark.parametrize(
    "stored, why",
    [
        (b"[" * 100_000, "nested too deep"),
        (b'{"caption": "fox", "id": ' + b"9" * 5000 + b"}", "too many digits"),
        (b'{"caption": "fox', "Unterminated string"),
        (b"[1]", "no JSON object"),
        (b'{"caption": "fox \xf0\x9f"}', "no UTF-8 text"),
    ],
    ids=["deep", "digits", "cut", "list", "bytes"],
)
def test_json_that_cannot_be_read_is_a_bad_sample_or_names_the_list(tmp_path, stored, why):
    members = [("x.png", IMAGE), ("x.json", stored)]
    assert why in bad_one(opened(tarred(tmp_path / "b" / "0.tar", members)))
    for name, start in (("list.json", b""), ("lines.jsonl", b'{"image": "a.png"}\n')):
        (tmp_path / name).write_bytes(start + stored)
        if stored != b"[1]":
            with pytest.raises(Refusal, match=name) as error:
                opened(tmp_path / name)
            assert "line 2" in str(error.value) or not start or "UTF-8" in why


def test_names_that_are_no_utf8_are_read_and_shown(tmp_path):
    """Of a file, good and bad; of a tar's member; of a list's entry, beside an emoji in two halves
    that is whole; and of the folder itself."""
    for name, image in (("good", IMAGE), ("bad", b"no image")):
        folder = write_folder(tmp_path / name, good(30))
        stem = os.fsencode(folder) + b"/caf\xe9"
        Path(os.fsdecode(stem + b".png")).write_bytes(image)
        Path(os.fsdecode(stem + b".txt")).write_bytes(b"coffee")
    assert "coffee" in seen(opened(tmp_path / "good"))
    assert r"bad/caf\xe9.png" in bad_one(opened(tmp_path / "bad"))
    extra = [(os.fsdecode(b"caf\xe9.png"), b"no image"), (os.fsdecode(b"caf\xe9.txt"), b"coffee")]
    path = tarred(tmp_path / "b" / "0.tar", [])
    with tarfile.open(path, "a", format=tarfile.GNU_FORMAT, errors="surrogateescape") as tar:
        for name, content in extra:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    assert r"0.tar:caf\xe9" in bad_one(opened(path))
    entries = [r'{"image": "\ud83e.png", "caption": "x"}']
    entries += [r'{"image": "000.png", "caption": "\ud83e\udd8a"}']
    data = opened(listed(tmp_path / "c", entries, 29))
    remark = bad_one(data)
    assert "\U0001f98a" in seen(data)
    assert r"\ud83e.png" in remark and "name is no UTF-8" in remark
    latin = tmp_path / os.fsdecode(b"caf\xe9")
    write_folder(latin, good(2))
    assert len(seen(opened(latin))) == 2
    (latin / "000.txt").unlink()
    assert r"caf\xe9 (1 images without" in opened(latin).remark()


def test_prompts_that_are_no_utf8_are_named(command, tmp_path, monkeypatch):
    """As data a few lines may be bad; where all are wanted, and on the command line, none."""
    lines = [b"a fox %d" % n for n in range(40)]
    lines[7] = "größer".encode("latin-1")
    (tmp_path / "p.txt").write_bytes(b"\n".join(lines))
    data = opened(tmp_path / "p.txt")
    assert len(data.captions) == 39
    assert "p.txt, line 8 (it is no UTF-8 text)" in data.remark() and not data.remark()
    with pytest.raises(Refusal, match=r"p\.txt: line 8 \(it is no UTF-8"):
        read_prompts(tmp_path / "p.txt")
    (tmp_path / "p.txt").write_bytes(b"\n".join(lines[7:10]))
    with pytest.raises(Refusal, match=r"1 of 3 prompts are bad|line 1 \(it is no UTF-8"):
        [opened(tmp_path / "p.txt") for _ in range(1)] and read_prompts(tmp_path / "p.txt")
    half = os.fsdecode(b"caf\xe9")
    draw = (sample, "--teacher", "digits", "--prompt")
    refused(command(*draw, half), r'--prompt is "caf\xe9", which is no UTF-8 text')
    refused(command(*draw, "a one and a two", "--negative", half), r"--negative", r"caf\xe9")
    refused(command(train, "--show", "a one and a two", half), r"--show", r"caf\xe9")


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-be", "utf-16-le"])
def test_utf16_does_not_pass_for_utf8(tmp_path, encoding):
    """Without a mark, English in UTF-16 is UTF-8 with zeros between its letters."""
    (tmp_path / "p.txt").write_bytes("a fox\nin the snow\n".encode(encoding))
    (tmp_path / "l.json").write_bytes('[{"image": "a.png", "caption": "x"}]'.encode(encoding))
    for name in ("p.txt", "l.json"):
        with pytest.raises(Refusal, match=f"{name} is no UTF-8 text but UTF-16"):
            opened(tmp_path / name)
    path = write_folder(tmp_path / "x", [*good(30), (IMAGE, "a fox".encode(encoding))])
    assert "its caption is no UTF-8 text" in bad_one(opened(path))


def test_what_a_screen_would_obey_is_escaped(command, tmp_path, monkeypatch):
    """Control characters, turns and line ends, in names, remarks and refusals."""
    said = legible("a\x1b[31m b\n\u2028\u202e\x85 \ud83e é 中 \U0001f98a")
    assert said == r"a\x1b[31m b\n\u2028\u202e\x85 \ud83e é 中 " + "\U0001f98a"
    folder = write_folder(tmp_path / "red\x1b[31m\nline", good(24))
    (folder / "003.png").write_bytes(b"gone")
    data = opened(folder)
    seen(data)
    remark = data.remark()
    assert remark.isprintable() and r"red\x1b[31m\nline/003.png" in remark
    gone = tmp_path / "no\x1b[31m\nne"
    said = command(train, "--teacher", "sd15", "--weights", gone, "--data", gone)
    refused(said, r"no\x1b[31m\nne is missing", r"no\x1b[31m\nne is no folder")


def test_what_all_ranks_would_say_the_first_says_alone(tmp_path, monkeypatch, capsys):
    """What was passed over, before a sample is read; of bad samples each rank has its own. So of
    the lines of a file of prompts."""
    monkeypatch.setattr(build, "locate_files", lambda *how, **more: {})
    folder, prompts = write_folder(tmp_path / "x", good(30)), tmp_path / "p.txt"
    (folder / "003.txt").unlink()
    (folder / "007.png").write_bytes(b"gone")
    prompts.write_bytes(b"fox\n" * 30 + b"caf\xe9\n")
    for rank in (0, 1):
        monkeypatch.setattr(ranks, "rank", lambda rank=rank: rank)
        for path, told in ((folder, "1 images without a caption"), (prompts, "p.txt, line 31")):
            cfg = configure("sd15", data=str(path), size=(64, 64), w_gan=0.0)
            data = build.open_inputs(cfg, find("sd15"))
            assert (told in capsys.readouterr().out) == (rank == 0)
            assert data.remark() == ""
            captions = data(range(29)).captions
            news = data.remark()
            assert told not in news and len(captions) == 29
            assert ("007.png" in news and "1 of 29 samples" in news) == (path == folder)


def test_a_screen_that_lacks_letters_gets_escapes(monkeypatch):
    """Where Python was told to speak ASCII."""
    told = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(told, "ascii"))
    Parser().parse_args([])
    print("caf\xe9 \udce9")
    sys.stdout.flush()
    assert told.getvalue() == b"caf\\xe9 \\udce9\n"


# --- left out ------------------------------------------------------------------------------------

KINDS = {".jpg": "JPEG", ".png": "PNG", ".webp": "WEBP", ".bmp": "BMP", ".tiff": "TIFF"}
KINDS |= {".gif": "GIF", ".avif": "AVIF"}
ALIASES = {".jfif": ".jpg", ".jpe": ".jpg", ".JPEG": ".jpg", ".tif": ".tiff", ".PNG": ".png"}


@pytest.mark.parametrize("suffix", [*KINDS, *ALIASES])
@pytest.mark.parametrize("form", ["folder", "shards"])
def test_every_kind_of_image_is_read(tmp_path, suffix, form):
    """By a folder and by a tar; the caption's suffix may be in capitals too."""
    kind = KINDS[ALIASES.get(suffix, suffix)]
    assert kind != "AVIF" or ".avif" in SUFFIXES
    stored = encoded(flat((200, 10, 10), 32, 24), kind)
    if form == "folder":
        folder = write_folder(tmp_path / "x", good(2))
        (folder / f"new{suffix}").write_bytes(stored)
        (folder / "new.TXT").write_bytes(b"new")
        path = folder
    else:
        path = tarred(tmp_path / "x" / "0.TAR", [(f"new{suffix}", stored), ("new.TXT", b"new")], 2)
    data = opened(path)
    assert data.remark() == "" and len(data.source) == 3
    pairs = data(range(3))
    red = pairs.images[pairs.captions.index("new")].mean((1, 2))
    assert red[0] > 0.4 and red[1] < -0.7 and not data.bad


@pytest.mark.parametrize("form", ["TIFF", "AVIF"])
def test_other_kinds_are_turned_as_exif_says(tmp_path, form):
    """Like a JPEG, for the pixels and for the bucket, which is chosen by the file's head."""
    for turn in (1, 3, 6, 8):
        image = flat((0, 0, 0), 64, 32)
        image.paste((255, 255, 255), (0, 0, 16, 32))
        stored = {}
        for kind in (form, "JPEG"):
            exif = Image.Exif()  # a new one: pillow empties it on its way to AVIF
            exif[0x0112] = turn
            stored[kind] = encoded(image, kind, exif=exif)
        got, want = (upright(stored[kind]) for kind in (form, "JPEG"))
        assert got.size == want.size
        for x, y in ((4, 4), (-5, 4), (4, -5), (-5, -5)):
            at = (x % got.width, y % got.height)
            assert abs(got.getpixel(at)[0] - want.getpixel(at)[0]) < 30
        path = write_folder(tmp_path / f"{turn}", [(stored[form], b"x")])
        data = open_data(str(path), (256, 256), 0, buckets=True)
        assert (data([0]).images.shape[2] > 256) == (turn > 4)


def test_grey_of_unknown_white_is_a_bad_sample():
    for pixels in (torch.rand(4, 4), torch.full((4, 4), 70_000, dtype=torch.int32)):
        with pytest.raises(ValueError, match="32 bits"):
            upright(encoded(Image.fromarray(pixels.numpy()), "TIFF"))


def test_folders_behind_links_tars_below_and_beside_images_are_read(tmp_path):
    target = write_folder(tmp_path / "elsewhere", good(3))
    root = write_folder(tmp_path / "x", good(2))
    (root / "sub").symlink_to(target)
    tarred(root / "below" / "0.tar", [], 4)
    tarred(root / "1.TAR", [], 5)
    data = opened(root)
    assert len(data.source) == 2 + 3 + 4 + 5 and not data.remark()
    captions = seen(data)
    assert captions.count("fox") == 9 and captions.count("sample 0") == 2
    first = captions[:7]
    assert "fox" in first and any("sample" in caption for caption in first), "an epoch mixes them"
    assert captions == data(range(14)).captions == opened(root)(range(14)).captions


def test_what_is_passed_over_does_not_change_the_order(tmp_path):
    """Of tars, and of images: beside what is none of either."""
    for path in (tarred(tmp_path / "a" / "0.tar", []).parent, write_folder(tmp_path / "b", good())):
        before = opened(path)(range(20)).captions
        (path / "stats.parquet").write_bytes(b"PAR1")
        write_tar(path / "none.tar", [("readme.md", b"x")])
        (path / "bare.png").write_bytes(IMAGE)
        after = opened(path)
        assert after(range(20)).captions == before
        for why in ("1 .parquet files", "1 images without a caption", "1 .md files"):
            assert why in after.remark() or why in str(after.bad)


PARTS = {
    "dots": ("22.05.png", "22.05.txt"),
    "many dots": ("Track 2.1 (v1.1).png", "Track 2.1 (v1.1).json"),
    "own names": ("s7.image.png", "s7.caption.txt"),
    "after the whole name": ("a.png", "a.png.txt"),
    "kohya": ("a.png", "a.caption"),
    "folder with a dot": ("train.v1/2.5.png", "train.v1/2.5.txt"),
    "dot, slash": ("./a.b.png", "./a.b.txt"),
}


@pytest.mark.parametrize("kind", PARTS)
def test_parts_of_a_sample_find_each_other(tmp_path, kind):
    image, caption = PARTS[kind]
    text = b'{"text": "new"}' if caption.endswith("json") else b"new"
    data = opened(tarred(tmp_path / "0.tar", [(image, IMAGE), (caption, text)], 3))
    assert not data.remark() and sorted(seen(data)) == ["fox", "fox", "fox", "new"]


def test_no_caption_is_given_to_another_image(tmp_path):
    """img.001 has no caption, img.002 no image; s has two images, and nobody knows which."""
    extra = [("img.000.png", IMAGE), ("img.000.txt", b"fox"), ("img.001.png", IMAGE)]
    extra += [("img.002.txt", b"other"), ("s.a.png", IMAGE), ("s.b.png", IMAGE), ("s.txt", b"s")]
    data = opened(tarred(tmp_path / "0.tar", extra, 2))
    assert set(seen(data)) == {"fox"} and len(data.source) == 3
    assert "3 images without a caption, 2 captions without an image" in data.remark()


def test_a_blank_text_leaves_the_word_to_the_json(tmp_path):
    extra = [("x.png", IMAGE), ("x.txt", b" \n"), ("x.json", b'{"caption": "from json"}')]
    assert "from json" in seen(opened(tarred(tmp_path / "0.tar", extra, 3)))
    folder = write_folder(tmp_path / "x", good(3))
    (folder / "000.txt").write_text("")
    (folder / "001.txt").unlink()
    for name in ("000", "001", "002"):
        (folder / f"{name}.json").write_text(f'{{"prompt": "json {name}"}}')
    assert sorted(seen(opened(folder))) == ["json 000", "json 001", "sample 2"]


def test_windows_paths_in_a_list_are_found(tmp_path, monkeypatch):
    """And those from the home folder."""
    path = listed(tmp_path / "a", [r'{"image": "in\\b.png", "caption": "new"}'], 2)
    (tmp_path / "a" / "in").mkdir()
    (tmp_path / "a" / "in" / "b.png").write_bytes(IMAGE)
    assert "new" in seen(opened(path))
    monkeypatch.setenv("HOME", str(tmp_path / "a"))
    (tmp_path / "home.json").write_text('[{"image": "~/000.png", "caption": "home"}]')
    assert seen(opened(tmp_path / "home.json")) == ["home"]
    (tmp_path / "web.json").write_text('[{"image": "https://x/0.png", "caption": "x"}]')
    with pytest.raises(Refusal, match="entry 1 is an address"):
        opened(tmp_path / "web.json")


def test_what_is_passed_over_is_counted_by_reason(tmp_path):
    """In the first remark, once, and where nothing is left, in the refusal."""
    root = write_folder(tmp_path / "x", good(3))
    (root / "stats.json").write_text("{}")
    for name in ("a.heic", "b.heic", "c", "d.png"):
        (root / name).write_bytes(IMAGE)
    (root / "alone.txt").write_text("no image")
    (root / "gone.png").symlink_to("/nowhere/x.png")
    (root / "loop").symlink_to(root)
    os.mkfifo(root / "pipe.png")
    (root / "004.png").mkdir()
    data = opened(root)
    remark = data.remark()
    for why in (
        "2 .heic files",
        "1 files without a suffix",
        "1 images without a caption",
        "1 captions without an image",
        "1 links to nothing",
        "1 links to folders that are there already",
        "1 pipes",
        "1 .json files",
    ):
        assert why in remark, f"{why} is not in: {remark}"
    assert len(seen(data)) == 3 and not data.remark()
    for path in root.glob("00*.txt"):
        path.unlink()
    with pytest.raises(
        Refusal, match="holds no image with a caption; .*4 images without a caption"
    ):
        opened(root)


def test_of_many_tars_what_is_passed_over_is_one_count(tmp_path):
    for k in range(7):
        tarred(tmp_path / "x" / f"{k}.tar", [("bare.png", IMAGE), ("a.npy", b"")], 2)
    data = opened(tmp_path / "x")
    (why,) = data.bad.values()
    assert why == "7 .npy files, 7 images without a caption" and "7 tars" in data.remark()


# --- hidden files --------------------------------------------------------------------------------

HIDDEN = (".ipynb_checkpoints", "__MACOSX", "@eaDir", "$RECYCLE.BIN", ".Trash-1000/files")
HIDDEN += ("#recycle", "lost+found", "System Volume Information", ".thumbnails/normal", "found.000")


@pytest.mark.parametrize("form", ["folder", "shards"])
def test_hidden_and_system_files_are_never_data(tmp_path, form):
    """Readable images with captions in such folders, and under such names; they are counted."""
    inside = [f"{folder}/{name}" for folder in HIDDEN for name in ("9.png", "9.txt")]
    names = [*inside, "._000.png", "._000.txt", ".9.png", ".9.txt"]
    content = [IMAGE if name.endswith("png") else b"an old caption" for name in names]
    if form == "folder":
        path = write_folder(tmp_path / "x", good(3))
        for name, stored in zip(names, content, strict=True):
            (path / name).parent.mkdir(parents=True, exist_ok=True)
            (path / name).write_bytes(stored)
        (path / ".DS_Store").write_bytes(b"Bud1")
        count = "10 hidden or system folders, 4 hidden or system files"
    else:
        path = tarred(tmp_path / "x.tar", list(zip(names, content, strict=True)), 3)
        count = "24 hidden or system files"
    data = opened(path)
    assert count in data.remark()
    assert len(data.source) == 3 and "an old caption" not in seen(data)


def test_a_folder_called_like_an_image_is_none(tmp_path):
    path = write_folder(tmp_path / "x", good(2))
    (path / "9.png").mkdir()
    (path / "9.txt").write_text("a folder")
    write_folder(path / "9.png", good(1))
    assert sorted(seen(opened(path))) == ["sample 0", "sample 0", "sample 1"]


# --- lines ---------------------------------------------------------------------------------------


def test_a_line_ends_at_three_marks_and_at_no_other(tmp_path, monkeypatch):
    r"""\n, \r\n and \r, in every command; U+2028, U+0085, tabulators and form feeds are text."""
    path = tmp_path / "p.txt"
    path.write_bytes("\ufeffa\u2028b\r\nc\x85d\re\x0bf\x0cg\n\n\u200b\nh\ti".encode())
    want = ["a\u2028b", "c\x85d", "e\x0bf\x0cg", "h\ti"]
    assert read_lines(path) == (want, {}) and opened(path).captions == want
    monkeypatch.setattr(sys, "argv", ["", "--teacher", "digits", "--prompts", str(path)])
    assert sample.prompts_of(sample.sample_arguments("")) == want
    monkeypatch.setattr(sys, "argv", ["", "--student", "x", "--prompts", str(path)])
    assert evaluate.prompts_of(evaluate.evaluate_arguments(""), None, SIZE, 9) == want
    rows = [json.dumps({"image": "000.png", "caption": w}, ensure_ascii=False) for w in want]
    folder = write_folder(tmp_path / "x", good(1))
    (folder / "l.jsonl").write_bytes("\r".join(rows).encode())
    assert sorted(seen(opened(folder / "l.jsonl"))) == sorted(want)


# --- whose data they are -------------------------------------------------------------------------


def test_data_are_the_same_wherever_they_lie(tmp_path, monkeypatch):
    """A folder with and without a slash at the end, from elsewhere, copied; a list with paths from
    the root; tars; prompts."""
    (tmp_path / "x").mkdir()
    root = write_folder(tmp_path / "x" / "d", good(5))
    want = identity(opened(root))
    monkeypatch.chdir(root)
    other = write_folder(tmp_path / "scratch", good(5))
    for path in ("../d", "../d/", ".", f"{root}/", other):
        assert identity(opened(path)) == want
    for name, folder in (("a", root), ("b", other)):
        rows = [{"image": str(folder / f"{n:03d}.png"), "caption": f"{n}"} for n in range(5)]
        (tmp_path / f"{name}.json").write_text(json.dumps(rows))
        tarred(tmp_path / name / "0.tar", [], 4)
    assert identity(opened(tmp_path / "a.json")) == identity(opened(tmp_path / "b.json")) != want
    assert identity(opened(tmp_path / "a")) == identity(opened(tmp_path / "b" / "0.tar"))


CHANGED = {
    "caption": lambda d: (d / "003.txt").write_text("another"),
    "name": lambda d: [(d / f"003.{s}").rename(d / f"003a.{s}") for s in ("png", "txt")],
    "fewer": lambda d: (d / "003.txt").unlink(),
    "suffix": lambda d: (d / "003.png").rename(d / "003.jpg"),
}
TOLD = {"caption": "other captions at", "name": "other names at", "suffix": "other names at"}


@pytest.mark.parametrize("kind", CHANGED)
def test_a_run_continues_with_its_data_alone(tmp_path, kind):
    """Copied to another place they are its data; changed, they are refused with what differs."""
    cfg = configure("sd15", data=str(tmp_path / "x"), out=str(tmp_path / "run"))
    write_folder(tmp_path / "x", good(5))
    (tmp_path / "run").mkdir()
    saved = settings_of(cfg, {}, identity(opened(tmp_path / "x")))
    (tmp_path / "run" / "config.json").write_text(json.dumps(saved))
    copy = write_folder(tmp_path / "copy", good(5))
    cfg = configure("sd15", data=str(copy), out=str(tmp_path / "run"))
    data = opened(copy)
    check_run(cfg, tmp_path / "run", settings_of(cfg, {}, identity(data)), data)
    CHANGED[kind](copy)
    data = opened(copy)
    with pytest.raises(Refusal, match="another configuration") as error:
        check_run(cfg, tmp_path / "run", settings_of(cfg, {}, identity(data)), data)
    assert TOLD.get(kind, "data: 5 samples -> 4") in str(error.value)
    assert "003" in str(error.value) or kind == "fewer"


def test_prompts_and_older_runs_have_an_identity_too(tmp_path):
    path = tmp_path / "p.txt"
    path.write_text("a\nb\nc\n")
    old = identity(opened(path))
    path.write_text("a\nB\nc\n")
    data = opened(path)
    assert changes({"identity": old}, identity(data), "p.txt", data) == [
        "data: other captions at prompt 2"
    ]
    assert changes({"data": "p.txt"}, identity(data), "p.txt", data) == []
    assert changes({"data": "q.txt"}, old, "p.txt", data) == ["data: q.txt -> p.txt"]
    assert identity(object()) == {}


def test_of_many_captions_some_are_read_and_all_names(tmp_path, monkeypatch):
    """200 samples in 64 runs: what differs is named by its run's first sample."""
    root = write_folder(tmp_path / "x", good(200))
    old, data = identity(opened(root)), opened(root)
    monkeypatch.setattr("dataset.identity.READ", 50)
    assert identity(data) != old, "fewer captions are read"
    old = identity(data)
    (root / "101.png").rename(root / "101.jpg")
    (told,) = changes({"identity": old}, identity(opened(root)), "", opened(root))
    assert "other names among 3 samples from" in told and "/100.png on" in told


def test_a_tilde_is_the_home_folder_after_every_flag(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    given = ["--data=~/d", "--out=~/o", "--weights=~/w", "--cache=~/c"]
    monkeypatch.setattr(sys, "argv", ["train.py", *given])
    cfg, _ = train.train_arguments("")
    assert [cfg.data, cfg.out, cfg.weights, cfg.cache] == [str(tmp_path / x) for x in "dowc"]
    assert configure(data="~/d").data == str(tmp_path / "d")
    given = ["--checkpoint=~/s", "--prompts=~/p", "--weights=~/w", "--base=~/b", "--out=~/o.png"]
    monkeypatch.setattr(sys, "argv", ["sample.py", *given])
    found = sample.sample_arguments("")
    for name in ("checkpoint", "prompts", "weights", "base", "out"):
        assert str(getattr(found, name)).startswith(str(tmp_path)), name
    names = ("student", "data", "weights", "inception", "clip-g", "hpsv2", "out")
    monkeypatch.setattr(sys, "argv", ["evaluate.py", *(f"--{name}=~/{name}" for name in names)])
    found = vars(evaluate.evaluate_arguments(""))
    for name in names:
        path = found[name.replace("-", "_")]
        assert str(path[0] if name == "student" else path) == str(tmp_path / name)


@pytest.mark.parametrize(
    "given",
    [
        (train, "--teacher", "sd15", "--no-gan", "--weights", "none", "--data", ""),
        (sample, "--teacher", "digits", "--prompts", ""),
        (sample, "--checkpoint", "", "--prompt", "x"),
        (evaluate, "--student", ""),
        (evaluate, "--student", "x", "--out", " "),
    ],
)
def test_nothing_is_no_folder(command, given, monkeypatch, tmp_path):
    """It would be the current one."""
    monkeypatch.chdir(write_folder(tmp_path / "x", good(2)))
    refused(command(*given), "empty")


def test_an_image_that_is_listed_twice_resumes_alike(tmp_path):
    """Under a good caption and an empty one: whoever has not seen the bad one gives the same."""
    rows = ['{"image": "003.png", "caption": ""}', '{"image": "005.png", "caption": null}']
    path = listed(tmp_path / "x", rows, 60)
    data = opened(path)
    whole = [data([i]).captions[0] for i in range(124)]
    assert {"fox 3", "fox 5"} <= set(whole[62:]), "the good ones go on being seen"
    assert len(data.bad_items) == 2
    for start in (20, 62, 100):
        assert [*opened(path)(range(start, 124)).captions] == whole[start:]


# --- what never ends -----------------------------------------------------------------------------


def test_only_files_are_read(tmp_path):
    """Pipes, devices and folders that a list or a flag names: said, and nobody waits."""
    path = listed(tmp_path / "x", ['{"image": "pipe", "caption": "x"}'])
    os.mkfifo(tmp_path / "x" / "pipe")
    assert "pipe (it is a pipe, no file)" in bad_one(opened(path))
    for name, kind in (("/dev/zero", "a device"), (".", "a folder")):
        rows = [f'{{"image": "{name}", "caption": "x"}}']
        assert f"it is {kind}, no file" in bad_one(opened(listed(tmp_path / "y", rows)))
    for name in ("p.txt", "l.json", "l.jsonl", "0.tar"):
        os.mkfifo(tmp_path / name)
        with pytest.raises((Refusal, FileNotFoundError), match=name):
            opened(tmp_path / name)
    with pytest.raises(Refusal, match="p.txt: it is a pipe, no file"):
        read_prompts(tmp_path / "p.txt")
    with pytest.raises(Refusal, match="/dev/zero: it is a device"):
        read_prompts(Path("/dev/zero"))


def test_no_more_is_read_than_may_be(tmp_path, monkeypatch):
    """Files of holes: a list, an image, a caption; and a pattern of too many shards."""
    image = '{"image": "long.png", "caption": "x"}'
    path = listed(tmp_path / "x", [image])
    with open(tmp_path / "x" / "long.png", "wb") as file:
        file.truncate(2**33)
    assert "long.png (it has 8 GiB, more than 512 MiB)" in bad_one(opened(path))
    folder = write_folder(tmp_path / "y", good(30))
    (folder / "x.png").write_bytes(IMAGE)
    with open(folder / "x.txt", "wb") as file:
        file.truncate(2**33)
    assert "x.png (its caption has 8 GiB, more than 391 KiB)" in bad_one(opened(folder))
    for name in ("p.txt", "l.json"):
        with open(tmp_path / name, "wb") as file:
            file.truncate(2**33)
        with pytest.raises(Refusal, match=f"{name}: it has 8 GiB, more than 2 GiB"):
            opened(tmp_path / name)
    for pattern in ("{0..999999999}.tar", "{0..9999}/{0..9999}.tar"):
        with pytest.raises(Refusal, match="more than 1,000,000 shards"):
            expand(pattern)
    assert expand("x{1..99999999999}.tar") == [Path("x{1..99999999999}.tar")]


def test_folders_within_themselves_are_read_once(tmp_path):
    root = write_folder(tmp_path / "x", good(2))
    for k in range(12):  # which would be 2^12 ways to the last one
        (root / f"d{k}").mkdir()
        (root / f"d{k}" / "up").symlink_to(root)
        (root / f"d{k}" / "next").symlink_to(root / f"d{(k + 1) % 12}")
    write_folder(root / "d11" / "in", good(1))
    assert len(opened(root).source) == 3
    found = folders.look_through(root)
    assert sum(found.passed.values()) == 24


# --- tars ----------------------------------------------------------------------------------------


def raw_member(name: str, size: int, kind: bytes = b"0", field: bytes | None = None) -> bytes:
    """A header block, its checksum right; field: of the size, if not octal."""
    info = tarfile.TarInfo(name)
    info.type, info.size = kind, 0
    block = bytearray(info.tobuf(tarfile.GNU_FORMAT)[:512])
    block[124:136] = field or b"%011o\0" % size
    block[148:156] = b" " * 8
    block[148:156] = b"%06o\0 " % sum(block)
    return bytes(block)


def padded(stored: bytes) -> bytes:
    return stored + bytes(-len(stored) % 512)


def test_a_member_of_eight_gib_is_a_bad_sample_and_what_follows_is_read(tmp_path):
    """Its size is in bytes, as GNU writes it, or in a record ahead of it, as POSIX does."""
    size = 2**33
    record = b"%d size=%d\n" % (len(b"19 size=8589934592\n"), size)
    for k, head in enumerate(
        (
            raw_member("big.png", 0, field=b"\x80" + size.to_bytes(11, "big")),
            raw_member("x", len(record), b"x") + padded(record) + raw_member("big.png", 0),
        )
    ):
        path = tmp_path / f"{k}.tar"
        with open(path, "wb") as file:
            file.write(head)
            file.seek(size, os.SEEK_CUR)
            for name, content in (("big.txt", b"big"), ("z.png", IMAGE), ("z.txt", b"last")):
                file.write(raw_member(name, len(content)) + padded(content))
            for n in range(30):
                file.write(raw_member(f"{n}.png", len(IMAGE)) + padded(IMAGE))
                file.write(raw_member(f"{n}.txt", 3) + padded(b"fox"))
            file.write(bytes(1024))
        data = opened(path)
        assert len(data.source) == 32 and "last" in seen(data)
        assert ":big (it has 8 GiB, more than 512 MiB)" in data.remark()


def test_links_in_a_tar_are_what_they_lead_to(tmp_path):
    path = tarred(tmp_path / "0.tar", [], 3)
    with tarfile.open(path, "a") as tar:
        for name, kind, to in (
            ("a/7", tarfile.SYMTYPE, "../000"),
            ("8", tarfile.LNKTYPE, "001"),
            ("9", tarfile.SYMTYPE, "gone"),
        ):
            for suffix in ("png", "txt"):
                info = tarfile.TarInfo(f"{name}.{suffix}")
                info.type, info.linkname = kind, f"{to}.{suffix}"
                tar.addfile(info)
    data = opened(path)
    assert len(seen(data)) == 5 and "2 links to what is not in the tar" in data.remark()
    assert [data.source.name(k).split(":")[1] for k in range(5)] == [
        "000",
        "a/7",
        "001",
        "8",
        "002",
    ]


def test_records_ahead_of_a_member_are_read_one_by_one(tmp_path):
    """A record's value may look like another one."""
    path = tmp_path / "0.tar"
    with tarfile.open(path, "w", format=tarfile.PAX_FORMAT, pax_headers={"comment": "git"}) as tar:
        for suffix, content in (("png", IMAGE), ("txt", b"new")):
            info = tarfile.TarInfo(f"bücher/{'x' * 120}.{suffix}")
            info.size, info.mtime = len(content), 1.5
            info.pax_headers = {"SCHILY.xattr.user.a": "1 path=evil\n", "comment": "9 path=x"}
            tar.addfile(info, io.BytesIO(content))
    data = opened(path)
    assert seen(data) == ["new"] and "bücher/xxx" in data.source.name(0)


@pytest.mark.parametrize(
    "stored, why",
    [
        (b"\x1f\x8b" + bytes(600), "damaged at byte 0: it is compressed"),
        (b"\x28\xb5\x2f\xfd" + bytes(600), "it is compressed"),
        (raw_member("x", 2**30, b"L") + bytes(512), "the tar ends early"),
        (raw_member("a", 0) + bytes(1024) + raw_member("b", 0), "goes on after its end mark"),
        (raw_member("x", 20, b"x") + padded(b"99 path=a\n"), "damaged at byte"),
        (raw_member("a.png", 0, b"S") + raw_member("b.txt", 0, b"3") + bytes(1024), ""),
    ],
    ids=["gzip", "zstd", "long", "two", "record", "devices"],
)
def test_what_is_wrong_with_a_tar_is_said(tmp_path, stored, why):
    (tmp_path / "0.tar").write_bytes(stored)
    with pytest.raises(Refusal, match="holds no image with a caption; ") as error:
        opened(tmp_path / "0.tar")
    assert (why or "1 sparse files, 1 devices and the like") in str(error.value)
    with open(tmp_path / "0.tar", "rb") as file:
        if not why:
            assert list(tar_members(file)) == []


def test_weights_and_caches_may_lie_in_a_folder_of_any_name(tmp_path):
    """And be called anything: libraries that take UTF-8 alone get another name of theirs."""
    folder = tmp_path / os.fsdecode(b"caf\xe9")
    folder.mkdir()
    path = folder / os.fsdecode(b"\xe9.safetensors")
    weights.write({"a": torch.ones(2)}, path, {"teacher": "x"})
    assert os.listdir(os.fsencode(folder)) == [b"\xe9.safetensors"], "the file itself, no link"
    with weights.open_weights(path) as file:
        assert file.get_tensor("a").tolist() == [1, 1] and file.metadata() == {"teacher": "x"}
    write_cache(folder, lambda ids: Pairs([f"{i}" for i in ids], None), 3, 2, lambda pairs: {
        "x": torch.tensor([[float(caption)] for caption in pairs.captions])
    })  # fmt: skip
    assert Cache(folder).rows(Pairs(["2", "0"], None), "cpu")["x"].tolist() == [[2], [0]]
