"""A cache gives back what was computed, for the very same samples, and says so where it cannot."""

import json
from pathlib import Path

import pytest
import torch

from dataset import cache
from dataset.cache import Cache, check_purpose, send_rows, write_cache, write_purpose
from dataset.images import Pairs


def data(ids):
    """Sample i: a caption, sizes, and an image of i."""
    captions = [f"fox {i}" for i in ids]
    images = torch.stack([torch.full((3, 2, 2), float(i)) for i in ids])
    return Pairs(captions, images, torch.tensor([[i, 1, 0, 0, 2, 2] for i in ids]))


def compute(pairs):
    mean = pairs.images.mean((1, 2, 3))
    return {"context": mean[:, None, None].expand(-1, 3, 2).bfloat16(), "latent": mean[:, None]}


@pytest.fixture(autouse=True)
def short(monkeypatch):
    monkeypatch.setattr(cache, "SHARD", 4)


def test_every_sample_comes_back_in_any_order(tmp_path):
    write_cache(tmp_path, data, 10, 3, compute)
    assert len(list(tmp_path.glob("shard-*"))) == 3, "10 samples, 4 a shard"
    ids = [9, 0, 5, 5]
    rows = Cache(tmp_path).rows(data(ids), "cpu")
    wanted = compute(data(ids))
    assert rows.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert torch.equal(rows[name], tensor) and rows[name].dtype == tensor.dtype


def test_an_interrupted_cache_is_continued_and_ranks_share_it(tmp_path):
    """Shards that are there are not computed again; two ranks write what one would."""
    seen = []

    def counted(pairs):
        seen.extend(pairs.captions)
        return compute(pairs)

    for name in ("one", "two"):
        (tmp_path / name).mkdir()
    write_cache(tmp_path / "two", data, 10, 3, counted, rank=1, world=2)
    assert seen == [f"fox {i}" for i in range(4, 8)]
    (tmp_path / "two" / "shard-000000.part").write_bytes(b"half a shard")
    write_cache(tmp_path / "two", data, 10, 3, counted)
    assert sorted(seen) == sorted(f"fox {i}" for i in range(10)), "each sample once"
    write_cache(tmp_path / "one", data, 10, 3, compute)
    for path in (tmp_path / "one").iterdir():
        assert path.read_bytes() == (tmp_path / "two" / path.name).read_bytes(), path.name


@pytest.mark.parametrize("change", ["caption", "size", "pixel"])
def test_changed_data_are_noticed(tmp_path, change):
    write_cache(tmp_path, data, 4, 4, compute)
    pairs = data([2])
    if change == "caption":
        pairs.captions[0] += "!"
    elif change == "size":
        pairs.sizes[0, 0] += 1
    else:
        pairs.images[0, 0, 0, 0] += 1 / 255
    with pytest.raises(ValueError, match="the data have changed"):
        Cache(tmp_path).rows(pairs, "cpu")


def test_counts_stay_on_the_host():
    """Networks go by them; on the meta device, where whatever is sent has no values any more."""
    sent = send_rows({"x": torch.ones(2), "length": torch.tensor([3, 4])}, "meta")
    assert sent["x"].device.type == "meta" and sent["length"].tolist() == [3, 4]


def test_a_cache_for_something_else_is_refused(tmp_path):
    about = {"teacher": "flux-dev", "size": [1024, 1024]}
    check_purpose(tmp_path, about)
    assert not any(tmp_path.iterdir()), "what is only looked at is not written"
    write_purpose(tmp_path, about)
    check_purpose(tmp_path, about)
    with pytest.raises(ValueError, match=r"teacher: flux-dev -> sdxl"):
        check_purpose(tmp_path, about | {"teacher": "sdxl"})
    assert json.loads((tmp_path / "about.json").read_text()) == about
    (tmp_path / "about.json").write_text("{")
    with pytest.raises(ValueError, match="damaged"):
        check_purpose(tmp_path, about)
    assert not list(Path(tmp_path).glob("*.part*"))


def test_a_finished_cache_is_only_read(tmp_path):
    """It may lie on a disk that nobody writes to: no file is made anew, and none is another. One
    from before there was a choice of T5's length is as good."""
    about = {"teacher": "flux-dev", "t5_length": None}
    (tmp_path / "about.json").write_text('{"teacher": "flux-dev"}')
    write_cache(tmp_path, data, 10, 3, compute)
    before = {path.name: path.stat() for path in tmp_path.iterdir()}
    check_purpose(tmp_path, about)
    write_cache(tmp_path, data, 10, 3, compute)
    assert len(Cache(tmp_path).rows(data([3]), "cpu")) == 2
    after = {path.name: path.stat() for path in tmp_path.iterdir()}
    assert before.keys() == after.keys()
    for name, was in before.items():
        assert (was.st_ino, was.st_mtime_ns) == (after[name].st_ino, after[name].st_mtime_ns)
