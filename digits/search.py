"""The search for the embedded task's preset: every setting that was tried.

    python -m digits.search                               # each with seed 0
    python -m digits.search --kinds slow slow-g2 --seeds 10 11

As digits/ablation.py: a folder for each run, students examined at 1, 2, 4 and 8 steps. The table
has each at the number of steps that it is trained for. Writes table.md and metrics.json.
"""

from engine.flags import ablation_arguments

# Where the search began, in full: the preset until "chosen" became it.
START = (
    "--lr 1.5e-4 --lr-fake 1.2e-3 --lr-disc 5e-4 --lr-warmup 50 --lr-start 0 --lr-final 0.1 "
    "--betas .9 .999 --ema 0.98 --batch 32 --steps 750 --ttur 5 --t-fake uniform "
    "--p-backward .5 --w-isg 5 --w-gan 0.15 --guidance-dmd 1.3 2.7 --guidance-isg 2 2"
)
SLOW, LOW = "--lr-fake 1e-4", "--lr-fake 1e-4 --guidance-dmd 1 2"
GAN, HIGHER = f"{LOW} --w-gan .3", "--lr-fake 1e-4 --guidance-dmd 1 2.2 --w-gan .3"
FAKE3 = "--lr-fake 3e-4 --guidance-dmd 1 2.2 --w-gan .3 --p-backward .8 --w-isg 8"
CHOSEN = f"{FAKE3} --betas 0 .999"
TWO = "--student-steps 2 --p-backward 1 --taus 1 .55"
LONGER = (  # 600 student updates
    "--guidance-dmd 1.5 3.5 --ttur 2 --lr 3e-4 --lr-fake 1e-3 --w-isg .3 --w-gan 0 --steps 1200"
)
CHANGES = {
    "start": "",
    "slow": SLOW,
    "slow-short": f"{SLOW} --steps 450",
    "slow-gan3": f"{SLOW} --w-gan .3",
    "slow-isg2": f"{SLOW} --w-isg 2",
    "slow-g2": LOW,
    "slow-g2-gan3": GAN,
    "g2-gan6-isg8": f"{LOW} --w-gan .6 --w-isg 8",
    "g2-gan3-pb1": f"{GAN} --p-backward 1",
    "g2-gan3-ema99": f"{GAN} --ema .99",
    "g2-gan3-lambda9": f"{GAN} --ida-decay .9",
    "g2-gan3-logit": f"{GAN} --t-dmd logit-normal",
    "g2-gan3-ttur3": f"{GAN} --ttur 3",
    "g2-gan3-lr25": f"{GAN} --lr 2.5e-4 --p-backward .8",
    "g2-gan3-lr10": f"{GAN} --lr 1e-4 --p-backward .8",
    "g2-gan3-taus": f"{GAN} --p-backward .8 --taus 1 .85 .62 .33",
    "g22-pb8-isg8": f"{HIGHER} --p-backward .8 --w-isg 8",
    "g22-pb1-isg10": f"{HIGHER} --p-backward 1 --w-isg 10",
    "g22-pb1-isg7": f"{HIGHER} --p-backward 1 --w-isg 7",
    "g22-pb1-isg7-long": f"{HIGHER} --p-backward 1 --w-isg 7 --steps 1100",
    "g2-gan3-constant": f"{GAN} --lr 1e-4 --lr-final 1",
    "fake3": FAKE3,
    "fake12": f"{FAKE3} --lr-fake 1.2e-3",
    "chosen": CHOSEN,
    "chosen-fake1": f"{CHOSEN} --lr-fake 1e-4",
    "chosen-fake6": f"{CHOSEN} --lr-fake 6e-4",
    "chosen-isg5": f"{CHOSEN} --w-isg 5",
    "chosen-unshifted": f"{CHOSEN} --shift 1 --taus 1 .857142857 .666666667 .4",
    "chosen-600": f"{CHOSEN} --steps 600",
    "chosen-600-ttur4": f"{CHOSEN} --steps 600 --ttur 4",
    "chosen-500": f"{CHOSEN} --steps 500",
    "chosen-500-ttur3": f"{CHOSEN} --steps 500 --ttur 3",
    "two-a": f"{GAN} --student-steps 2",
    "two-b": f"{TWO} --lr-fake 5e-4 --w-isg 3",
    "two-c": f"{TWO} --lr-fake 5e-4 --guidance-dmd 1 2.2 --w-isg 4 --w-gan .3",
    "two-d": f"{TWO} --lr-fake 5e-4 --betas 0 .999 --w-isg 3",
    "two-e": f"{TWO} --lr-fake 5e-4 --w-isg 8",
    "two-f": f"{TWO} --lr-fake 5e-4 --w-isg 3 --ttur 3",
    "two-k": f"{TWO} --lr 2.5e-4 --lr-fake 1e-3 --w-isg 5 --ttur 2 --steps 1000",
    "two-m": f"--student-steps 2 {LONGER} --guidance-dmd 1.2 2.6",
    "two-chosen": f"--student-steps 2 {LONGER}",
    "one-t2": f"--student-steps 1 {LONGER} --lr-fake 5e-4 --w-isg 3 --steps 600",
    "one-d": f"--student-steps 1 {LONGER} --lr 1.5e-4 --lr-fake 5e-4",
    "one-f": f"--student-steps 1 {LONGER} --lr-fake 5e-4 --w-isg 0",
    "one-h": f"--student-steps 1 {LONGER} --lr 5e-4 --lr-fake 2e-3",
    "one-chosen": f"--student-steps 1 {LONGER}",
    "rescale": "--guidance-rescale .7",  # the knobs that presets leave off, beside "start"
    "t-guidance": "--t-guidance logit-normal",
    "anchor-weights": "--anchor-weights .5 1 1 1.5",
}
SETTINGS = {
    name: (flags or "where it began", f"{START} {flags}") for name, flags in CHANGES.items()
}
HOW = {"known": SETTINGS, "seeds": (0,), "out": "runs/search"}

if __name__ == "__main__":  # --help, and what cannot be, is answered here: torch takes seconds
    ablation_arguments(__doc__, **HOW)

from digits.ablation import COUNTS, examine_all, show_table


def own_steps(flags: str) -> int:
    """Of the student that a setting trains."""
    words = flags.split()
    return int(words[words.index("--student-steps") + 1]) if "--student-steps" in words else 4


def main() -> None:
    given = ablation_arguments(__doc__, **HOW)
    teacher, students = examine_all(given)
    for kind, runs in students.items():
        k = COUNTS.index(own_steps(CHANGES[kind]))
        students[kind] = [rows[k : k + 1] for rows in runs]
    show_table(given, teacher, students)
    print(f"{given.out}: table.md, metrics.json, and a folder for each run")


if __name__ == "__main__":
    main()
