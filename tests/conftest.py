"""What tests share: small denoisers (real modules, with closed forms where a test needs one), and
commands run as a user runs them."""

import os
import sys

import pytest
import torch
from own import make_own
from torch import nn

import teachers
from schedule import DDPM, Flow, Rng

torch.set_num_threads(1)  # the networks are tiny: threads only wait for each other


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers(config):
    """All tests: a process for every core, four at most, each of which takes a whole file at a
    time. Some of them: in this process, which starts sooner."""
    return min(os.cpu_count(), 4) if config.args_source.name == "TESTPATHS" else 0


class Linear(nn.Module):
    """A denoiser with weights: x_t mixed over channels, shifted by time and cond["c"] (B, 1)."""

    def __init__(self, schedule=None, channels: int = 2, seed: int = 0):
        super().__init__()
        self.schedule = schedule or Flow()
        draw = torch.Generator().manual_seed(seed)
        self.mix = nn.Parameter(0.5 * torch.randn(channels, channels, generator=draw))
        self.time = nn.Parameter(0.5 * torch.randn(channels, generator=draw))
        self.text = nn.Parameter(0.5 * torch.randn(channels, generator=draw))

    def forward(self, x_t, t, cond):
        mixed = torch.einsum("dc,bchw->bdhw", self.mix, x_t)
        shift = t[:, None] * self.time + cond["c"] * self.text
        return mixed + shift[:, :, None, None]


class GaussianVelocity(nn.Module):
    """The exact velocity for data ~ N(mean, std^2) under Flow, closed form; counts its calls."""

    def __init__(self, mean: float, std: float):
        super().__init__()
        self.schedule, self.mean, self.std, self.calls = Flow(), mean, std, []

    def forward(self, x_t, t, cond):
        self.calls.append(x_t.shape)
        t = t.reshape(-1, 1, 1, 1)
        variance = (1 - t) ** 2 * self.std**2 + t**2
        x0 = self.mean + (1 - t) * self.std**2 / variance * (x_t - (1 - t) * self.mean)
        return (x_t - x0) / t.clamp_min(1e-6)


# Files that take longest: they come first, so that no process ends with one of them alone.
LONGEST = (
    "full_size plane docs parallel plan bench hacking commands ablation compile evaluate faults"
)
FIRST = [f"test_{name}" for name in LONGEST.split()]


def pytest_collection_modifyitems(items):
    places = {name: k for k, name in enumerate(FIRST)}
    items.sort(key=lambda item: places.get(item.path.stem, len(FIRST)))


@pytest.fixture
def rng():
    """rng("purpose", batch): the random sources of step 0."""
    return lambda purpose="test", batch=3, step=0: Rng(0, step, purpose, range(batch))


@pytest.fixture(params=[Flow(), Flow(3.0), DDPM()], ids=["flow", "flow, shift 3", "ddpm"])
def schedule(request):
    return request.param


@pytest.fixture
def x0():
    return torch.randn(3, 2, 4, 6, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def cond():
    return {"c": torch.tensor([[1.0], [-1.0], [0.5]])}


@pytest.fixture
def uncond():
    return {"c": torch.zeros(3, 1)}


@pytest.fixture(scope="session")
def own(tmp_path_factory):
    """A folder with mine.py, the small teacher of docs/own_teacher.md, its weights and pictures."""
    folder = tmp_path_factory.mktemp("own")
    make_own(folder)
    return folder


@pytest.fixture(autouse=True)
def found_anew(monkeypatch):
    """What is kept of a teacher's own file, and where it looks for its neighbours, ends with the
    test."""
    monkeypatch.setattr(sys, "path", [*sys.path])
    before = dict(teachers.FOUND)
    yield
    teachers.FOUND.clear()
    teachers.FOUND.update(before)


@pytest.fixture
def command(monkeypatch, capsys):
    """command(module, "--flag", ...) -> exit code (0 if it returned), stdout, stderr."""

    def run(module, *arguments):
        monkeypatch.setattr(sys, "argv", [f"{module.__name__}.py", *map(str, arguments)])
        code = 0
        try:
            module.main()
        except SystemExit as stop:
            code = stop.code
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return run


def refused(result, *named):
    code, out, err = result
    assert code == 2 and err.count("\n") == 1 and "Traceback" not in err, err
    for word in named:
        assert word in err, f"{word} is not named in: {err}"
