"""What a change did to the speed of decoding: the benches of two checkouts, in turn.

    python -m experiments.before_after ../before --pairs cp ../before/out/toy out/toy \\
        --output results/before_after/x

Each pair is a name, a checkpoint's folder for the other checkout, and one for this one. Runs
alternate, before and after. A cell is the median over the rounds, with their range in brackets.
Writes OUTPUT.md, the table, and OUTPUT.json, all rows of all runs. Nothing else should run on the
machine.
"""

import json
import os
import statistics
import subprocess
import sys
from pathlib import Path

from common import ArgumentParser, any_path, number, progress_bar, replacing, run_script
from model import ROOT, BadInput

BENCH = ["bench_speculative.py", "--rounds", "5", "--max_new_tokens", "64", "--threads", "1",
         "--out_dir"]
HEADER = ("| head | mode | temperature | tok/step before | after | speed-up before | after "
          "| tokens/s, after over before |\n|---|---|---|---|---|---|---|---|\n")


def bench(checkout, out_dir):
    """{(mode, temperature): row} of a bench in a checkout; its last line is JSON."""
    command = [sys.executable, *BENCH, str(Path(out_dir).resolve())]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    found = subprocess.run(command, cwd=checkout, env=env, capture_output=True, text=True)
    if found.returncode:
        line = (found.stderr.strip() or "nothing").splitlines()[-1]
        raise BadInput(f"The bench in {checkout} ended with {found.returncode} and says: {line}")
    document = json.loads(found.stdout.splitlines()[-1])
    return document["card"], {(row["mode"], row["temperature"]): row for row in document["rows"]}


def lines(name, before, after):
    """The table's rows for one pair: lists of runs, as of `bench`."""
    for key in before[0]:
        old, new = ([run[key] for run in runs] for runs in (before, after))
        ratios = [b["tokens_per_second"] / a["tokens_per_second"] for a, b in zip(old, new)]
        steps, speeds = ([statistics.median(run[part] for run in runs) for runs in (old, new)]
                         for part in ("tokens_per_step", "speedup"))
        cells = [name, key[0], f"{key[1]:g}", *(f"{x:.2f}" for x in (*steps, *speeds)),
                 f"{statistics.median(ratios):.2f} ({min(ratios):.2f}..{max(ratios):.2f})"]
        yield "| " + " | ".join(cells) + " |\n"


def main():
    parser = ArgumentParser(__doc__)
    parser.add_argument("before", type=any_path, help="folder of the other checkout")
    parser.add_argument("--pairs", nargs=3, action="append", required=True,
                        metavar=("NAME", "BEFORE", "AFTER"),
                        help="a name and two checkpoints' folders")
    parser.add_argument("--rounds", type=number(int, 3), default=5, help="benches of each side (5)")
    parser.add_argument("--output", type=any_path, required=True, help="OUTPUT.md and OUTPUT.json")
    args = parser.parse_args()
    table, runs = HEADER, {}
    with progress_bar(total=2 * args.rounds * len(args.pairs)) as bar:
        for name, *out_dirs in args.pairs:
            sides = runs[name] = ([], [])
            for _ in range(args.rounds):
                for side, checkout, out_dir in zip(sides, (args.before, ROOT), out_dirs):
                    card, rows = bench(checkout, out_dir)
                    side.append(rows)
                    bar.update()
            table += "".join(lines(name, *sides))
    del card["out_dir"]
    plain = {name: [[list(run.values()) for run in side] for side in sides]
             for name, sides in runs.items()}
    with replacing(f"{args.output}.md", f"{args.output}.json") as (text, document):
        text.write(table.encode())
        document.write(json.dumps({"card": card, "runs": plain}).encode())
    print(table)


if __name__ == "__main__":
    run_script(main)
