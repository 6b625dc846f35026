"""What a run in the plane may be told.

    Setting               the choices of one distillation
    LAGGING, KEEPING_UP   the two that every scenario starts from
    IDA, ISG              what switches a part on

Knows no networks but by the name of what they are trained on.
"""

from dataclasses import dataclass

from plane.denoisers import ANCHORS

BATCH, EVERY = 128, 25  # points a step; iterations between measurements


# fmt: off
@dataclass(frozen=True)
class Setting:
    target: str = "ring"          # what the teacher knows
    start: str = ""               # what student and fake score know at first; "": the same
    exact: bool = False           # the teacher is known in closed form
    diffusion: bool = False       # DDPM in place of Flow
    defect: float = 0.0           # the teacher's error near the anchors
    iterations: int = 600
    ttur: int = 1                 # fake updates per student update
    lr: float = 5e-4              # of the student
    lr_fake: float = 5e-4         # of the fake score
    ida: float = 1.0              # lambda; 1: no IDA
    pull: str = "student"         # or "start": the control, pulled to where it began
    w_isg: float = 0.0
    w_anchor: float = 0.0         # the control: regression on the teacher's step from the anchor
    distance: str = "l2"          # of ISG
    taus: tuple[float, ...] = ANCHORS
    against: str = ""             # the variant that this one is compared with, seed by seed
    measures: tuple[str, ...] = ("swd",)
# fmt: on


# TTUR 1, a slow fake score and far to go; TTUR 5, a fast one, at home from the start.
LAGGING = Setting(target="moved ring", start="ring", ttur=1, lr=2e-4, lr_fake=5e-5)
KEEPING_UP = Setting(ttur=5)
IDA, ISG = {"ida": 0.97}, {"w_isg": 1.0}
