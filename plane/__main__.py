"""The paper's claims in two dimensions: seconds a run, a table and a picture for each.

    python -m plane                      # every scenario, a few minutes
    python -m plane ida --seeds 5        # one

dmd.py, ida.py, isg.py and schedule.py are used as they are for the large teachers. A point of the
plane is a latent (B, 2, 1, 1); the networks have 9,090 weights. Writes OUT/SCENARIO.png.
"""

import argparse
import os
import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

from config import CALLS, Parser, Refusal, place, refuse
from engine.pictures import points_and_graphs
from nets.disk import try_folder
from plane import scenarios
from plane.scenarios import SCENARIOS
from plane.tables import graphs, panels, reference, table
from plane.workers import Key, prepare_worker, run_all


def arguments() -> argparse.Namespace:
    parser = Parser(
        prog="python -m plane",
        description=f"{__doc__}\n{scenarios.__doc__}",
    )
    parser.add_argument("scenario", nargs="*", default=["all"], help="one or several; default: all")
    parser.add_argument(
        "--seeds", type=int, may=CALLS, default=3, help="runs of each variant; default: 3"
    )
    parser.add_argument(
        "--out", type=place, default=Path("runs/plane"), help="folder; default: runs/plane"
    )
    given = parser.parse_args()
    unknown = [name for name in given.scenario if name not in (*SCENARIOS, "all")]
    if unknown:
        parser.error(f'unknown scenario "{unknown[0]}"; choose from all, {", ".join(SCENARIOS)}')
    try:
        try_folder(given.out)
    except Refusal as error:
        parser.error(str(error))
    return given


def main() -> None:
    given = arguments()
    chosen = SCENARIOS if "all" in given.scenario else given.scenario
    taught: dict[Key, dict] = {}
    pool = ProcessPoolExecutor(os.cpu_count(), get_context("spawn"), prepare_worker)
    try:
        for name in chosen:
            began, scenario = time.perf_counter(), SCENARIOS[name]()
            results = run_all(name, scenario, given.seeds, pool, taught)
            print(f"{name}\n{table(scenario, results)}\n{reference(scenario, taught)}")
            plots = panels(scenario, results), graphs(scenario, results, taught)
            points_and_graphs(given.out / f"{name}.png", *plots)
            seconds = time.perf_counter() - began
            print(
                f"  {given.out / name}.png, {seconds:.0f} s, {given.seeds} seeds\n",
                flush=True,
            )
    except KeyboardInterrupt:
        refuse("interrupted", code=130)
    finally:
        pool.shutdown(cancel_futures=True)


if __name__ == "__main__":
    main()
