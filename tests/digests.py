"""One digest for the run of each teacher: did a change of structure change a number?

    OMP_NUM_THREADS=1 python tests/digests.py > before.txt      # and again after; then diff

The large teachers at a width of a dozen channels, from official folders of random weights: four
iterations of the whole method, in fp32 and in bf16, then log.csv and the student's tensors. Equal
on one machine with one number of threads; not a test, since processors round differently.
"""

import hashlib
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE), str(HERE.parent)]

import torch  # noqa: E402
from PIL import Image  # noqa: E402
from safetensors.torch import load_file  # noqa: E402
from small import SMALL, make_official  # noqa: E402

import teachers  # noqa: E402
import train  # noqa: E402

ALL_ON = "--w-isg 1 --w-gan 1 --ida-decay .97 --size 32 48 --batch 2 --steps 4 --ttur 2"
ALL_ON += " --lr-warmup 0 --lr 1e-2 --lr-fake 1e-2 --lr-disc 1e-2 --exam-every 0 --workers 0"


def pictures(folder: Path) -> Path:
    """Five images of other shapes, with captions."""
    folder.mkdir()
    draw = torch.Generator().manual_seed(0)
    for k in range(5):
        shape = (40 + 9 * k, 70 - 5 * k, 3)
        pixels = torch.randint(0, 256, shape, dtype=torch.uint8, generator=draw)
        Image.fromarray(pixels.numpy()).save(folder / f"{k}.png")
        (folder / f"{k}.txt").write_text(f"a red fox {k}")
    return folder


def digest(out: Path) -> str:
    """Of a run's log and of its student's tensors, by name."""
    total = hashlib.blake2b((out / "log.csv").read_bytes(), digest_size=8)
    for name, tensor in sorted(load_file(out / "student.safetensors").items()):
        total.update(name.encode() + tensor.contiguous().view(torch.uint8).numpy().tobytes())
    return total.hexdigest()


def run(folder: Path, *flags: str) -> str:
    sys.argv = ["train.py", *flags, "--out", str(folder)]
    train.main()
    return digest(folder)


def main() -> None:
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads")
    with tempfile.TemporaryDirectory() as name:
        place = Path(name)
        data = pictures(place / "data")
        flags = "--steps 20 --exam-every 10 --no-table"
        print("digits", run(place / "digits", *flags.split()), flush=True)
        for teacher in (name for name in SMALL if name != "flux-schnell"):
            teachers.FOUND[teacher] = SMALL[teacher]
            make_official(teacher, place / teacher)
            where = ["--teacher", teacher, "--weights", str(place / teacher), "--data", str(data)]
            for kind, how in (("fp32", ["--no-bf16", "--no-recompute"]), ("bf16", [])):
                out = place / f"{teacher}-{kind}"
                print(teacher, kind, run(out, *where, *ALL_ON.split(), *how), flush=True)


if __name__ == "__main__":
    main()
