"""What a run promises when disks, processes, files and people fail; see docs/robustness.md.

Small networks and functions called directly; whole commands only where the order of things counts.
"""

import errno
import json
import os
import pickle
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import processes
import pytest
import torch
from conftest import refused
from own import flags_of
from safetensors import SafetensorError
from safetensors.torch import save_file
from small import SMALL, make_official
from test_cache import compute
from test_cache import data as cached_data
from test_commands import student  # noqa: F401 (a fixture)
from torch import nn

import sample
import teachers
import train
from config import Config, Range, Refusal, differences, refuse
from dataset.cache import check_purpose, write_cache, write_purpose
from engine import checkpoint, ranks
from engine.batch import fill_cache
from engine.results import finite
from engine.run import LogFile, Run, begin, check_run, saved_settings, settings_of
from engine.start import check_weights
from nets import disk
from nets.files import Part, fetch
from nets.same import identity, same_weights
from nets.weights import open_weights, write
from teachers import configure, find

ROOT = Path(__file__).parent.parent


@pytest.fixture(autouse=True)
def signals():
    """As they were afterwards; heard, also behind "&" in a script, which has Ctrl-C ignored."""
    heard = (signal.SIGINT, signal.SIGTERM)
    before = [signal.getsignal(number) for number in heard]
    signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    for number, handler in zip(heard, before, strict=True):
        signal.signal(number, handler)


# --- files ---------------------------------------------------------------------------------------


def test_a_file_is_whole_or_as_it_was(tmp_path):
    """Also where what fails is Ctrl-C; nothing of the new one is left."""
    path = tmp_path / "config.json"
    disk.write_text(path, "old")
    for error in (ValueError, KeyboardInterrupt, OSError):
        with pytest.raises(error), disk.whole(path) as part:
            part.write_text("half")
            raise error
    with pytest.raises(OSError, match=r"config.json cannot be written \(File too large\)$"):
        processes_with_little_room(path)
    assert path.read_text() == "old" and [*tmp_path.iterdir()] == [path]


def processes_with_little_room(path: Path) -> None:
    """Writes more than this process may, for as long as this takes."""
    import resource

    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, before[1]))
    try:
        write({"x": torch.zeros(1000)}, path, {})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_new_files_have_the_permissions_that_the_user_gives(tmp_path):
    """safetensors makes its own for the owner alone."""
    before = os.umask(0o027)
    try:
        write({"x": torch.ones(2)}, tmp_path / "w.safetensors", {})
        disk.write_text(tmp_path / "a.json", "{}")
    finally:
        os.umask(before)
    assert {path.stat().st_mode & 0o777 for path in tmp_path.iterdir()} == {0o640}


@pytest.mark.parametrize(
    "error, asked",
    [
        (OSError(errno.ENOSPC, "No space left"), True),
        (OSError(errno.EDQUOT, "Disk quota exceeded"), True),
        (SafetensorError("I/O error: No space left on device (os error 28)"), True),
        (OSError(errno.EFBIG, "File too large"), False),
        (SafetensorError("I/O error: Permission denied (os error 13)"), False),
        (OSError("of ours"), False),
    ],
)
def test_only_a_full_disk_is_asked_about(tmp_path, error, asked):
    """And what safetensors raises is neither OSError nor ValueError: it becomes one."""
    with pytest.raises(OSError) as caught, disk.whole(tmp_path / "x.png"):
        raise error
    said = str(caught.value)
    assert said.startswith(f"{tmp_path}/x.png cannot be written (") and "\n" not in said
    assert said.endswith("is the disk full?") == asked


def test_the_number_of_an_error_reaches_all_ranks(tmp_path):
    """Where a file of one of them cannot be written, all say the same."""

    def fail():
        raise disk.failed(tmp_path, OSError(errno.ENOSPC, "No space left"))

    with pytest.raises(OSError, match=f"^{tmp_path} cannot be written") as caught:
        ranks.on_all_ranks(fail)
    assert caught.value.errno == errno.ENOSPC


WRITES = r"(?<!disk)\.write_(text|bytes)\(|os\.replace\(|save_file\(|savez|\bopen\([^)]*\"[wax]b?\""
OTHERS = {  # what is written within `whole` or in a folder renamed as a whole, or appended
    "nets/disk.py": 2,
    "nets/weights.py": 2,
    "engine/run.py": 2,
    "engine/pictures.py": 0,
    "digits/pretrain.py": 1,
    "digits/ablation.py": 1,
}


def test_one_function_writes_all_files():
    """`disk.whole`; a line that writes otherwise is counted here."""
    folders = ("", "nets/", "engine/", "dataset/", "digits/", "measure/", "plane/", "teachers/")
    for path in (p for name in folders for p in (ROOT / name).glob("*.py")):
        found = [line for line in path.read_text().splitlines() if re.search(WRITES, line)]
        allowed = OTHERS.get(str(path.relative_to(ROOT)), 0)
        assert len(found) == allowed, f"{path}: {found}"


@pytest.mark.parametrize(
    "kind, said",
    [
        ("nothing", "is missing; fetch it"),
        ("folder", "is a folder; give a file"),
        ("link", "is missing, a link to what is not there"),
        ("pipe", "is no ordinary file"),
        ("below", "is missing; fetch it"),
    ],
)
def test_a_file_that_cannot_be_read_is_called_what_it_is(tmp_path, kind, said):
    path = tmp_path / "w.safetensors"
    if kind == "folder":
        path.mkdir()
    elif kind == "link":
        path.symlink_to(tmp_path / "gone")
    elif kind == "pipe":
        os.mkfifo(path)
    elif kind == "below":
        path.write_text("")
        path = path / "x"
    with pytest.raises((Refusal, FileNotFoundError), match=said):
        open_weights(path)


# --- places --------------------------------------------------------------------------------------


def test_an_output_place_is_tried_and_left_as_it_was(tmp_path):
    disk.try_folder(tmp_path / "a" / "b")
    disk.try_folder(tmp_path)
    assert not any(tmp_path.iterdir())
    (tmp_path / "file").write_text("")
    (tmp_path / "link").symlink_to(tmp_path / "gone")
    for wrong in (tmp_path / "file", tmp_path / "file" / "x", tmp_path / "link", Path("/proc/x")):
        said = rf"--out {wrong} cannot be written to \(.*: .*{wrong.parts[1]}.*\); choose another"
        with pytest.raises(Refusal, match=said):
            disk.try_folder(wrong)
        with pytest.raises(Refusal, match=said), disk.hold(wrong):
            pass


def test_sample_tries_its_place_before_it_loads(command, student, tmp_path, monkeypatch):  # noqa: F811
    """Minutes, for the large teachers."""
    monkeypatch.setattr(type(find("digits")), "load_text", None)  # whoever loads fails otherwise
    (tmp_path / "out.png").mkdir()
    (tmp_path / "file").write_text("")
    asked = (sample, "--checkpoint", student, "--prompt", "a one and a two", "--out")
    refused(command(*asked, tmp_path / "out.png"), "out.png is a folder")
    refused(command(*asked, tmp_path / "file" / "x.png"), "cannot be written to")


def test_two_processes_do_not_share_a_folder(tmp_path):
    """The second hears who holds it. The lock goes with its process, however that ends."""
    out = tmp_path / "deep" / "run"
    holder = f"held by pid {os.getpid()} on host {socket.gethostname()} since 2"
    with disk.hold(out), pytest.raises(Refusal, match=f"--out {out} is {holder}"), disk.hold(out):
        pass
    assert not (tmp_path / "deep").exists(), "what is made for nothing goes again"
    out.mkdir(parents=True)
    (other,) = processes.launch(hold_for_ever, 0, tmp_path / "printed.txt", out)
    processes.wait_for("ready", out, [other])
    with pytest.raises(Refusal, match=f"held by pid {other.pid} on host"), disk.hold(out):
        pass
    (out / f"student.{other.pid}.part.safetensors").write_text("half")
    other.kill()
    other.join()
    with disk.hold(out / "theirs"):
        (out / "theirs" / "0.7.part.png").write_text("")
        with disk.hold(out):
            found = sorted(str(p.relative_to(out)) for p in out.rglob("*"))
            assert found == [".lock", "ready", "theirs", "theirs/.lock", "theirs/0.7.part.png"]


def hold_for_ever(out: Path) -> None:
    with disk.hold(out):
        (out / "ready").write_text("")
        time.sleep(60)


def test_a_disk_without_locks_goes_by_the_holders_line(tmp_path, monkeypatch):
    def unknown(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr("fcntl.flock", unknown)
    host = socket.gethostname()
    line = tmp_path / ".lock"
    line.write_text(f"held by pid {os.getppid()} on host {host} since then\n")
    with pytest.raises(Refusal, match="held by pid"), disk.hold(tmp_path):
        pass
    for gone in (f"pid 99999999 on host {host}", "pid 1 on host elsewhere"):
        line.write_text(f"held by {gone} since then\n")
        with disk.hold(tmp_path):
            assert f"pid {os.getpid()} " in line.read_text()


def test_a_run_only_reads_a_finished_cache(tmp_path, monkeypatch):
    """It may lie on a disk that cannot be written to. Another is one process's at a time."""
    pictures = SimpleNamespace(epochs=SimpleNamespace(length=4), data=cached_data)
    family = SimpleNamespace(own_data="", name="sd35-medium", uses_null=False)
    cfg = configure("sd35-medium", cache=str(tmp_path), w_gan=0.0)
    with disk.hold(tmp_path), pytest.raises(Refusal, match=f"--cache {tmp_path} is held by pid"):
        fill_cache(cfg, family, pictures, torch.device("cpu"))
    write_cache(tmp_path, cached_data, 4, 4, compute)
    before = everything(tmp_path)
    monkeypatch.setattr("nets.disk.whole", None)
    monkeypatch.setattr("engine.batch.take_folder", None)  # whoever writes fails
    cache = fill_cache(cfg, family, pictures, torch.device("cpu"))
    assert len(cache.places) == 4 and everything(tmp_path) == before


# --- checkpoints ---------------------------------------------------------------------------------


def small(seed: int):
    torch.manual_seed(seed)
    net = nn.Linear(4, 4)
    adam = torch.optim.AdamW(net.parameters())
    net(torch.ones(4)).sum().backward()
    adam.step()
    return {"student": net}, {"student": [adam]}


@pytest.fixture(scope="module")
def two_saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoints")
    for step in (1, 2):
        checkpoint.save_checkpoint(folder, step, *small(step), {"config": {}}, keep=2)
    return folder


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def replaced(path: Path, by=None) -> None:
    disk.remove(path)
    if by:
        by(path)


TENSORS = "__0_0.distcp"
DAMAGE = {
    "tensors cut": lambda at: os.truncate(at / TENSORS, 100),
    "tensors empty": lambda at: os.truncate(at / TENSORS, 0),
    "a bit in tensors": lambda at: flip(at / TENSORS),
    "tensors gone": lambda at: (at / TENSORS).unlink(),
    "tensors a folder": lambda at: replaced(at / TENSORS, Path.mkdir),
    "tensors a dangling link": lambda at: replaced(at / TENSORS, lambda p: p.symlink_to("gone")),
    "tensors a pipe": lambda at: replaced(at / TENSORS, os.mkfifo),
    "a bit in metadata": lambda at: flip(at / ".metadata"),
    "a bit in extra": lambda at: flip(at / "extra.json"),
    "a bit in digests": lambda at: flip(at / "digests.json"),
    "digests empty": lambda at: os.truncate(at / "digests.json", 0),
    "digests no text": lambda at: (at / "digests.json").write_bytes(b"\xff\xfe{"),
    "digests a list": lambda at: (at / "digests.json").write_text("[]"),
    "digests gone": lambda at: (at / "digests.json").unlink(),
    "a file more": lambda at: (at / "more").write_text(""),
    "a folder more": lambda at: (at / "more").mkdir(),
    "a link more": lambda at: (at / "more").symlink_to("gone"),
    "all gone": lambda at: replaced(at, Path.mkdir),
    "a file": lambda at: replaced(at, Path.touch),
    "a dangling link": lambda at: replaced(at, lambda p: p.symlink_to("gone")),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_a_damaged_checkpoint_of_any_kind_is_passed_over(two_saved, tmp_path, kind):
    """The one before it is used, and said so; a later save neither trips over it nor keeps it in
    place of what is sound. With all damaged nothing is used, and nothing goes."""
    folder = tmp_path / "checkpoints"
    shutil.copytree(two_saved, folder)
    newest = folder / "step-00000002"
    DAMAGE[kind](newest)
    nets, optimizers = small(9)
    extra, (remark,) = checkpoint.load_checkpoint(folder, nets, optimizers)
    assert extra["step"] == 1 and f"{newest} is damaged (" in remark and "step-00000001" in remark
    assert torch.equal(nets["student"].weight, small(1)[0]["student"].weight)
    checkpoint.save_checkpoint(folder, 2, nets, optimizers, {}, keep=1)
    assert [path.name for path in checkpoint.checkpoints(folder)] == ["step-00000002"]
    assert checkpoint.load_checkpoint(folder, nets, optimizers) == ({"step": 2}, [])
    DAMAGE[kind](newest)
    with pytest.raises(Refusal, match="no checkpoint in .* is sound .*--overwrite"):
        checkpoint.load_checkpoint(folder, nets, optimizers)
    assert os.path.lexists(newest)


def test_a_save_keeps_itself_whatever_lies_there(two_saved, tmp_path):
    """A damaged newer one was passed over: what is saved next is older by its name."""
    folder = tmp_path / "checkpoints"
    shutil.copytree(two_saved, folder)
    os.rename(folder / "step-00000002", folder / "step-00000009")
    (folder / "step-00000009" / "extra.json").unlink()
    checkpoint.save_checkpoint(folder, 2, *small(2), {}, keep=1)
    assert [path.name for path in folder.iterdir()] == ["step-00000002"]


class Payload:
    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


@pytest.mark.parametrize("where", ["metadata", "values"])
def test_a_planted_payload_does_not_run(two_saved, tmp_path, where):
    """A checkpoint's table of contents is a pickle, and so is what is no tensor. Digests are made
    to agree: whoever plants can count."""
    folder, ran = tmp_path / "checkpoints", tmp_path / "ran"
    shutil.copytree(two_saved, folder)
    newest = folder / "step-00000002"
    if where == "metadata":
        (newest / ".metadata").write_bytes(pickle.dumps(Payload(ran)))
    else:
        nets, (state,) = small(2)[0], [checkpoint.state_of(*small(2))]
        state["opt.student"]["param_groups"][0]["lr"] = Payload(ran)
        with checkpoint.quiet():
            checkpoint.dcp.save(state, checkpoint_id=newest, no_dist=True)
    listed = checkpoint.digests(newest)
    (newest / "digests.json").write_text(json.dumps(listed))
    assert checkpoint.fault(newest) == ""
    nets, optimizers = small(9)
    extra, (remark,) = checkpoint.load_checkpoint(folder, nets, optimizers)
    assert extra["step"] == 1 and "damaged (" in remark
    assert not ran.exists(), "it ran"


@pytest.mark.parametrize("writer, reader", [("ours", "ours"), ("ours", "torch"), ("torch", "ours")])
def test_a_tensor_of_any_kind_comes_back_as_it_was(tmp_path, writer, reader):
    """Of no values, of one, of two bytes, out of order, large. What we write torch reads, and what
    torch writes, as it did until 27 November 2026, we read: such a run goes on."""

    def odd(seed: int):
        nets, optimizers = small(seed)
        nets["student"].weight.data = nets["student"].weight.data.T
        made = [torch.rand(0, 3), torch.rand(3).bfloat16(), torch.rand(400, 100)[::2], seed > 5]
        for name, value in zip(("none", "short", "large", "flag"), made, strict=True):
            nets["student"].register_buffer(name, torch.as_tensor(value))
        return nets, optimizers

    place, wanted, found = tmp_path / "step-00000002", checkpoint.state_of(*odd(2)), odd(9)
    if writer == "ours":
        checkpoint.save_checkpoint(tmp_path, 2, *odd(2), {}, keep=1)
    with checkpoint.quiet():
        if writer == "torch":
            checkpoint.dcp.save(wanted, checkpoint_id=place, no_dist=True)
            (place / "extra.json").write_text('{"step": 2}')
            (place / "digests.json").write_text(json.dumps(checkpoint.digests(place)))
        if reader == "torch":
            state = checkpoint.state_of(*found)
            checkpoint.dcp.load(state, checkpoint_id=place, no_dist=True)
        else:
            assert checkpoint.load_checkpoint(tmp_path, *found) == ({"step": 2}, [])
            state = checkpoint.state_of(*found)
    found, wanted = (dict(checkpoint.tensors_of(x)) for x in (state, wanted))
    assert len(wanted) == 12 and found.keys() == wanted.keys()
    assert all(torch.equal(tensor, wanted[name]) for name, tensor in found.items())


def test_what_is_not_finite_is_not_saved(two_saved, tmp_path):
    """A checkpoint of such weights is no good one: those before it stay."""
    folder = tmp_path / "checkpoints"
    shutil.copytree(two_saved, folder)
    for value in (float("nan"), float("inf")):
        nets, optimizers = small(3)
        nets["student"].weight.data[1, 2] = value
        with pytest.raises(FloatingPointError, match="net.student.weight .*not finite"):
            checkpoint.save_checkpoint(folder, 3, nets, optimizers, {}, keep=1)
    assert sorted(path.name for path in folder.iterdir()) == ["step-00000001", "step-00000002"]


def test_a_disk_that_fills_inside_a_save_is_called_full(tmp_path, monkeypatch):
    """Where torch writes, it makes of that an error of its own, which does not say why."""

    class Full(checkpoint.DigestedFile):
        def __init__(self, path):
            super().__init__(Path("/dev/full"))

    monkeypatch.setattr(checkpoint, "DigestedFile", Full)
    with pytest.raises(OSError, match=r"step-00000001 cannot be written .*; is the disk full\?"):
        checkpoint.save_checkpoint(tmp_path, 1, *small(1), {}, keep=1)
    assert not any(tmp_path.iterdir())


def test_ctrl_c_inside_a_save_is_no_full_disk(tmp_path, monkeypatch):
    """torch wraps it like a failure to write."""

    def stop(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(checkpoint.DigestedFile, "write", stop)
    with pytest.raises(KeyboardInterrupt):
        checkpoint.save_checkpoint(tmp_path, 1, *small(1), {}, keep=1)
    assert not checkpoint.checkpoints(tmp_path)


# --- a run's folder ------------------------------------------------------------------------------

FLAGS = ("--batch", 2, "--ttur", 1, "--no-gan", "--no-isg", "--exam-every", 0)
FLAGS += ("--ema", 0, "--lr-final", 1, "--lr-warmup", 0, "--save-every", 1, "--keep", 1)


@pytest.fixture(scope="module")
def finished(own, tmp_path_factory):
    """A run of one iteration."""
    out = tmp_path_factory.mktemp("finished") / "run"
    printed = out.with_suffix(".txt")
    processes.finish(
        processes.command, 0, printed, [*flags_of(own), *FLAGS, "--steps", 1, "--out", out]
    )
    return out


@pytest.fixture
def copy(finished, tmp_path):
    shutil.copytree(finished, tmp_path / "run")
    return tmp_path / "run"


def everything(out: Path) -> dict[str, bytes]:
    return {str(p.relative_to(out)): p.read_bytes() for p in out.rglob("*") if p.is_file()}


def test_a_finished_run_may_be_given_more_steps_in_another_place(own, command, copy, monkeypatch):
    """With its configuration emptied by a full disk, which its checkpoint still knows."""
    (copy / "config.json").write_text("")
    moved = copy.with_name("moved")
    os.rename(copy, moved)
    monkeypatch.setattr(train, "finish", lambda *_: None)
    code, out, err = command(train, *flags_of(own), *FLAGS, "--steps", 2, "--out", moved)
    assert code == 0 and "continuing, steps 1 to 2" in out + err, err
    assert [row["step"] for row in LogFile(moved / "log.csv", 9).rows()] == ["0", "1"]
    assert json.loads((moved / "config.json").read_text())["steps"] == 2
    refused(
        command(train, *flags_of(own), *FLAGS, "--steps", 1, "--out", moved),
        "steps: 2 -> 1",
        "not fewer",
    )


def test_more_steps_are_refused_where_the_learning_rate_falls_over_them():
    was = json.loads(json.dumps(vars(configure(lr_final=0.1, steps=5))))
    (said,) = differences(was, configure(lr_final=0.1, steps=9))
    assert said == "steps: 5 -> 9, over which the learning rate falls to --lr-final 0.1"
    was = json.loads(json.dumps(vars(configure(lr_final=1.0, steps=5))))
    assert differences(was, configure(lr_final=1.0, steps=9)) == []


def test_overwrite_deletes_nothing_before_the_networks_stand(own, command, copy, monkeypatch):
    """A mistake elsewhere is refused first; and so is a folder that another run holds."""
    before = everything(copy)
    flags = (*flags_of(own), *FLAGS, "--steps", 1, "--out", copy, "--overwrite")
    refused(command(train, *flags, "--optimizer", "torch.optim.Nobody"), "Nobody")
    monkeypatch.setattr("engine.build.load_roles", gone)
    refused(command(train, *flags), "it is gone")
    with disk.hold(copy):
        refused(command(train, *flags), f"held by pid {os.getpid()}")
    assert everything(copy) == before


def gone(*_):
    raise FileNotFoundError("it is gone")


def test_a_run_begins_with_its_checkpoints_gone_or_with_those_of_another(tmp_path):
    """Between the two it continues from nothing, wherever it is killed."""
    settings = settings_of(configure(), {}, {})
    folder = tmp_path / "checkpoints" / "step-00000001"
    folder.mkdir(parents=True)
    begin(tmp_path, settings, overwrite=False)
    assert folder.exists() and saved_settings(tmp_path) == settings
    begin(tmp_path, settings | {"steps": 9}, overwrite=True)
    assert [p.name for p in tmp_path.iterdir()] == ["config.json"]


def test_a_damaged_configuration_costs_no_checkpoint(copy):
    """Its checkpoint says what it was; where none can, it stops, and nothing goes."""
    whole = saved_settings(copy)
    extra = max(copy.glob("checkpoints/step-*")) / "extra.json"
    for text in ("", "{", "[]", "null", '{"batch": "2"}', "\xff"):
        (copy / "config.json").write_text(text)
        assert saved_settings(copy) == whole
    (copy / "config.json").unlink()
    assert saved_settings(copy) == whole
    extra.unlink()
    with pytest.raises(Refusal, match=r"config.json is gone, and 1 checkpoints .*--overwrite"):
        saved_settings(copy)


@pytest.mark.parametrize(
    "damage",
    [
        lambda lines: lines[:2] + lines[3:],  # a row lost
        lambda lines: lines[:3] + ["7,9,9,9\n", *lines[3:]],  # another run's row
        lambda lines: lines[:3] + [lines[2], *lines[3:]],  # twice
        lambda lines: lines[:3] + ["2,\0\0\n", "rubbish\n", '"\n'] + lines[3:],
        lambda lines: [lines[0], lines[2], lines[1], *lines[3:]],
        lambda lines: lines[:4] + lines[4:5] * 0 + ["3,0."],  # cut
    ],
)
def test_a_log_is_mended_by_its_steps(tmp_path, damage):
    """Rows that are lost stay lost, and no other takes their number."""
    path = tmp_path / "log.csv"
    log = LogFile(path, 0)
    for step in range(4):
        log.write(step, {"dmd": step / 2, "fake": 1.0, "norm_fake": 2.0})
    log.file.close()
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join(damage(lines)))
    log = LogFile(path, 3)
    log.write(3, {"dmd": 1.5, "fake": 1.0, "norm_fake": 2.0})
    rows = log.rows()
    steps = [int(row["step"]) for row in rows]
    assert steps == sorted(set(steps)) and set(steps) <= {0, 1, 2, 3} and 3 in steps
    assert len(steps) >= 3 and all(float(row["dmd"]) == int(row["step"]) / 2 for row in rows)


def test_a_log_that_cannot_be_written_is_named(tmp_path):
    log = LogFile(tmp_path / "log.csv", 0)
    log.file.close()
    log.file = open("/dev/full", "w", buffering=1)  # noqa: SIM115
    log.writer.writer = __import__("csv").writer(log.file)
    with pytest.raises(OSError, match=r"log.csv cannot be written \(.*; is the disk full\?"):
        log.write(0, {})


# --- the same weights? ---------------------------------------------------------------------------


@pytest.fixture
def weights(tmp_path):
    torch.manual_seed(0)
    tensors = {"a.weight": torch.randn(70, 9), "b.bias": torch.randn(80), "n": torch.ones(2)}

    def saved(change=lambda name, x: x) -> dict:
        path = tmp_path / "w.safetensors"
        save_file({name: change(name, x).contiguous() for name, x in tensors.items()}, path)
        return identity([path])

    return saved


def test_a_copy_in_other_bits_is_the_same_and_another_network_is_not(weights):
    one = weights()
    assert same_weights(one, weights()) and len(one["digest"]) == 16
    kinds = (torch.half, torch.bfloat16)
    half, bf16 = (weights(lambda _, x, kind=kind: x.to(kind)) for kind in kinds)
    assert half["digest"] != one["digest"] != bf16["digest"]
    assert all(same_weights(*pair) for pair in ((one, half), (bf16, one), (half, bf16)))
    tuned = weights(lambda _, x: 1.01 * x)
    assert not same_weights(one, tuned) and not same_weights(half, tuned)
    assert not same_weights(half, weights(lambda name, x: x.t() if x.ndim == 2 else x))


def test_a_run_with_other_weights_is_refused_naming_both(tmp_path, weights):
    one, other = weights(), weights(lambda _, x: 2 * x)
    cfg = configure()
    begin(tmp_path, settings_of(cfg, {"vae": one}, {}), overwrite=False)
    check_run(cfg, tmp_path, settings_of(cfg, {"vae": weights(lambda _, x: x.half())}, {}))
    both = f"{one['digest']} -> {other['digest']}"
    with pytest.raises(Refusal, match=f"the weights of the vae: {both}"):
        check_run(cfg, tmp_path, settings_of(cfg, {"vae": other}, {}))
    about = {"size": [8, 8], "parts": {"clip_l": one}}
    write_purpose(tmp_path, about)
    check_purpose(tmp_path, about)
    with pytest.raises(Refusal, match=f"the weights of clip_l: {both}"):
        check_purpose(tmp_path, about | {"parts": {"clip_l": other}})


def test_a_run_keeps_what_it_was_made_of(own, finished):
    """In config.json and in the student's file."""
    parts = json.loads((finished / "config.json").read_text())["parts"]
    family = find(str(own / "mine.py"))
    files = family.locate(disc=False)
    assert parts == {part: identity(paths, family.prefix(part)) for part, paths in files.items()}
    with open_weights(finished / "student.safetensors") as file:
        about = json.loads(file.metadata()["parts"])
    assert about == {part: x["digest"] for part, x in parts.items()}


def test_headers_of_every_part_are_compared_before_anything_is_loaded(tmp_path, monkeypatch):
    """Of each file in its turn another network's is there; no tensor is read."""
    family, files = SMALL["sd35-medium"], tmp_path / "files"
    monkeypatch.setitem(teachers.FOUND, "sd35-medium", family)
    make_official("sd35-medium", files)
    cfg = configure("sd35-medium", weights=str(files), w_gan=1.0, cache="", size=(32, 32))
    monkeypatch.setattr("nets.weights.each_tensor", None)  # whoever reads fails
    check_weights(cfg, family)
    every = {path for paths in family.locate(str(files), disc=True).values() for path in paths}
    every = sorted(path for path in every if path.suffix == ".safetensors")
    assert len(every) == 6
    for path in every:
        kept = path.read_bytes()
        save_file({"other.weight": torch.ones(2)}, path)
        with pytest.raises(Refusal, match=path.name):
            check_weights(cfg, family)
        path.write_bytes(kept)


def test_what_is_not_finite_is_not_exported(tmp_path):
    """In the dtype of the file: fp16 and bf16 end sooner than fp32."""
    path = tmp_path / "student.safetensors"
    for value, dtype in ((float("nan"), torch.float32), (1e30, torch.float16)):
        tensors = [("a", torch.ones(2)), ("b", torch.tensor([1.0, value]))]
        with pytest.raises(FloatingPointError, match="b has values that are not finite"):
            dict(finite(tensors, dtype, path))
    assert dict(finite(tensors, torch.float32, path)).keys() == {"a", "b"}


# --- signals -------------------------------------------------------------------------------------


def test_a_signal_is_heeded_when_an_iteration_ends_and_elsewhere_at_once():
    """The second Ctrl-C is the system's, which asks nobody."""
    for number in (signal.SIGTERM, signal.SIGINT):
        carried = Run()
        with pytest.raises(ranks.Stopped):
            os.kill(os.getpid(), number)
            time.sleep(1)
        with pytest.raises(ranks.Stopped), carried.iterating():
            pass  # wherever that was swallowed
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    Run()
    assert signal.getsignal(signal.SIGINT) == signal.SIG_IGN, "who is to hear nothing hears nothing"
    signal.signal(signal.SIGINT, signal.default_int_handler)
    carried = Run()
    with pytest.raises(ranks.Stopped), carried.iterating():
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(0.01)
        assert carried.stop == "SIGINT"
        assert signal.getsignal(signal.SIGINT) == signal.SIG_DFL
    cfg = configure(steps=9, save_every=5)
    assert carried.is_due(cfg, 1, torch.device("cpu")) == (True, True)


@pytest.mark.parametrize("number, code", [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_while_loading_is_one_line(own, command, tmp_path, monkeypatch, number, code):
    """And leaves nothing."""

    def load(*_):
        os.kill(os.getpid(), number)
        time.sleep(1)

    monkeypatch.setattr("train.build_nets", load)
    said = command(train, *flags_of(own), *FLAGS, "--steps", 1, "--out", tmp_path / "run")
    assert said[0] == code and said[2] == "train.py: stopped\n", said
    assert not (tmp_path / "run").exists()


def test_a_signal_in_a_step_saves_and_one_after_the_last_is_heeded(own, command, copy, monkeypatch):
    """The run stops saved, and its end is made by the same command."""
    step = train.train_step

    def stopped(*given):
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(0.01)
        return step(*given)

    monkeypatch.setattr(train, "train_step", stopped)
    flags = (*flags_of(own), *FLAGS, "--steps", 2, "--save-every", 9, "--out", copy)
    code, out, err = command(train, *flags)
    assert code == 0 and "stopped by SIGINT after step 2, saved" in out + err, err
    end = lambda *_: os.kill(os.getpid(), signal.SIGTERM) or time.sleep(1)  # noqa: E731
    monkeypatch.setattr(train, "finish", end)
    code, out, err = command(train, *flags)
    assert code == 143 and "stopped; the last good checkpoint is" in err.splitlines()[-1], err


def test_ctrl_c_while_importing_is_one_line():
    """torch takes seconds."""
    run = [sys.executable, "-c", "import config; raise KeyboardInterrupt"]
    done = subprocess.run(run, cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (130, "-c: interrupted\n")


def test_ctrl_c_while_sampling_is_one_line(command, student, tmp_path, monkeypatch):  # noqa: F811
    def stop(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(sample, "draw_samples", stop)
    asked = ("--checkpoint", student, "--prompt", "a one and a two", "--out", tmp_path / "o.png")
    code, out, err = command(sample, *asked)
    assert (code, err.splitlines()[-1]) == (130, "sample.py: interrupted"), err
    assert not any(tmp_path.iterdir())


def test_a_rank_whose_peer_stopped_says_so(tmp_path):
    printed = tmp_path / "printed.txt"
    codes = processes.join(processes.launch(leave_the_other, 2, printed))
    assert sorted(codes) == [0, 1], printed.read_text()
    said = printed.read_text()
    assert said.count("\n") == 1 and "rank 1: another rank has stopped (" in said, said


def leave_the_other() -> None:
    with ranks.refusals():
        ranks.start()
        ranks.barrier()
        if ranks.rank() == 0:
            os._exit(0)
        ranks.mean_over_ranks({"x": 1.0}, torch.device("cpu"))


# --- values --------------------------------------------------------------------------------------

HUGE = ("size", "batch", "accumulate", "student_steps", "disc_channels", "adapter", "steps")


@pytest.mark.parametrize("field", Config.__dataclass_fields__.values(), ids=lambda f: f.name)
def test_every_number_has_bounds(field):
    """nan, inf and what is outside are refused by the declaration itself, in every field."""
    kinds = getattr(field.type, "__args__", (field.type,))
    if not {int, float} & {*kinds}:
        return
    may, count = field.metadata["may"], len(kinds) if field.type not in (int, float) else 1
    wrong = [float("nan"), float("inf"), -float("inf")]
    wrong += [] if may == Range() else [-1, -1e9]
    wrong += [10**30] if field.name in (*HUGE, "workers") else []
    for value in wrong:
        with pytest.raises(Refusal, match=f"{field.name.replace('_', '-')} is "):
            may.check(field.name.replace("_", "-"), (value,) * count if count > 1 else value)


@pytest.mark.parametrize(
    "given, said",
    [
        (("--batch", 10**9), "--batch is 1000000000; it must be from 1 to 65,536"),
        (("--size", 30000, 30000, "--batch", 60000), "648,000 GB of pixels in an iteration"),
        (("--student-steps", 10**12), "--student-steps is 1000000000000"),
        (("--clip", -1), "--clip is -1.0"),
        (("--betas", 2, 0), "--betas is 2.0 0.0"),
        (("--isg-margin", "nan"), "--isg-margin is nan"),
    ],
)
def test_what_no_memory_holds_is_refused_with_the_number(command, tmp_path, given, said):
    refused(command(train, *given, "--out", tmp_path / "run"), said)
    assert not any(tmp_path.iterdir())


def test_memory_that_there_is_not_is_one_line(capsys):
    with pytest.raises(SystemExit) as stop, ranks.refusals():
        torch.empty(2**56)
    said = capsys.readouterr().err
    assert stop.value.code == 2 and said.count("\n") == 1
    assert "out of memory: 288,230,376.2 GB at once; a smaller --size or --batch takes less" in said


# --- trust ---------------------------------------------------------------------------------------


def test_commands_to_be_copied_are_quoted_and_pinned():
    part = Part("maker/net", ("a b.safetensors", "$(touch x).json"), revision="c0ffee")
    said = fetch([(part, file) for file in part.files], "my; folder")
    assert said == (
        "hf download maker/net 'a b.safetensors' '$(touch x).json' --revision c0ffee "
        "--local-dir 'my; folder'"
    )


def test_what_is_said_moves_no_cursor(capsys):
    with pytest.raises(SystemExit):
        refuse("a\x1b[2Jb\nc\udc80", spoken=True)
    assert capsys.readouterr().err.endswith(": a\\x1b[2Jb\\nc\\x80\n")


# --- the notes -----------------------------------------------------------------------------------


def test_the_notes_on_robustness_name_every_kind():
    """A promise a line, each with tests that exist."""
    note = (ROOT / "docs" / "robustness.md").read_text()
    rows = [line for line in note.splitlines() if line.startswith("| ") and "`test_" in line]
    every = {
        name
        for path in (ROOT / "tests").glob("test_*.py")
        for name in re.findall(r"^def (test_\w+)", path.read_text(), re.MULTILINE)
    }
    assert len(rows) >= 20
    for row in rows:
        named = re.findall(r"`(test_\w+)`", row)
        assert named and set(named) <= every, row
