"""Draw the losses of one or several runs, or a bench.

    python -m experiments.plots out/toy --output loss.png
    python -m experiments.plots out/laptop_r1 out/laptop_r4 --x seconds --output loss.png
    python -m experiments.plots bench bench.json --output bench.png

Runs: left, the losses in train.py's log.jsonl, of training and of validation; right, the last
validation's loss by offset. A bench: what bench_speculative.py said in a file, of which the last
line counts. Only this file needs matplotlib.
"""

import json
import textwrap
from pathlib import Path

from common import ArgumentParser, any_path, check_writable, replacing, run_script
from model import BadInput

FORMATS = (".png", ".pdf", ".svg")
PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")  # Okabe's
X_AXES = {"iter": ("steps", 1), "seconds": ("minutes", 60)}  # field of the log: label and divisor


def read_log(path):
    """The log.jsonl at path, or in the folder path: {"train": points, "val": points}. A point is a
    dict of iter, seconds, next and, where the model has a head, joint and offset (a list).

    BadInput if it is not a log of train.py.
    """
    path = Path(path) / "log.jsonl" if Path(path).is_dir() else Path(path)
    points = {"train": [], "val": []}
    try:
        for line in map(json.loads, path.read_text(encoding="utf-8").splitlines()):
            parts = line.get("val", line)
            point = {"iter": line["iter"], "seconds": float(line["seconds"]),
                     "next": float(parts["next"])}
            if "usage" in parts:  # else n_future = 1, and joint is next
                point["joint"] = float(parts["joint"])
                point["offset"] = [float(loss) for loss in parts["offset"]]
            points["val" if "val" in line else "train"].append(point)
    except (ValueError, KeyError, TypeError, AttributeError):
        raise BadInput(f"{path} is not a log of train.py") from None
    if not any(points.values()):
        raise BadInput(f"{path} is empty")
    return points


def smooth(values):
    """Centred mean over at most 11 values and a tenth of all, narrower at both ends."""
    half, last = min(5, len(values) // 20), len(values) - 1
    widths = [min(half, i, last - i) for i in range(len(values))]
    return [sum(values[i - k : i + k + 1]) / (2 * k + 1) for i, k in enumerate(widths)]


def new_figure(width, height, width_ratios=(1,)):
    """(Figure, its panels in one row). Without pyplot there is no window and no global state."""
    try:
        import matplotlib
    except ImportError:
        raise BadInput("Plots need matplotlib: python -m pip install matplotlib") from None
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=110, layout="constrained")
    figure.get_layout_engine().set(w_pad=0.1, h_pad=0.07)
    FigureCanvasAgg(figure)
    panels = figure.subplots(1, len(width_ratios), width_ratios=width_ratios, squeeze=False)[0]
    for panel in panels:
        panel.spines[["top", "right"]].set_visible(False)
        panel.grid(alpha=0.25)
        panel.set_axisbelow(True)
    return figure, panels


def say(figure, title, card):
    """Write what was measured, on what, above the panels; the hardware's name may be long."""
    hardware = textwrap.shorten(card["hardware"], 80, placeholder=" ...")
    figure.suptitle(title.format(**card | {"hardware": hardware}), fontsize=10)


def draw_runs(names, logs, x="iter"):
    """The Figure of the losses of up to seven runs, a colour each. logs: what read_log returns; x:
    iter or seconds.

    Left, over steps or minutes: next-token loss and joint loss per token, pale and smoothed in
    training, with markers in validation. Right: the last validation's loss by offset. n_future = 1
    has neither joint nor offsets; where no run has offsets (yet), there is no right panel.
    """
    offsets = [log["val"][-1].get("offset") if log["val"] else None for log in logs]
    figure, panels = new_figure(10, 4.4, (1.5, 1) if any(offsets) else (1,))
    from matplotlib.lines import Line2D

    left, (label, unit) = panels[0], X_AXES[x]
    markers = {"next": dict(marker="o", ms=5), "joint": dict(marker="s", ms=5, mfc="white")}
    for color, log, offset in zip(PALETTE, logs, offsets):
        for part, marker in markers.items():
            train, val = ([p for p in log[split] if part in p] for split in ("train", "val"))
            losses = smooth([p[part] for p in train])
            left.plot([p[x] / unit for p in train], losses, color=color, lw=0.9, alpha=0.4)
            left.plot([p[x] / unit for p in val], [p[part] for p in val], color=color, lw=1.6,
                      **marker)
        if offset:
            panels[1].plot(range(1, len(offset) + 1), offset, color=color, lw=1.6, marker="o", ms=5)
    left.set(xlabel=label, ylabel="nats per token", title="loss")
    legend = [dict(color=color, lw=3, label=name.replace("$", r"\$"))
              for color, name in zip(PALETTE, names)]
    legend.append(dict(color="gray", label="next token, validation", **markers["next"]))
    if any("joint" in point for log in logs for point in log["train"] + log["val"]):
        legend.append(dict(color="gray", label="joint per token, validation", **markers["joint"]))
    legend.append(dict(color="gray", lw=0.9, alpha=0.6, label="training, smoothed"))
    left.legend(handles=[Line2D([], [], **style) for style in legend], fontsize=9,
                loc="upper right")
    if any(offsets):
        panels[1].set(xlabel="offset s", title="loss by offset, last validation")
        panels[1].set_ylabel("nats, given the true tokens before it in the window", fontsize=9)
        panels[1].locator_params("x", integer=True, nbins=12)
    return figure


def draw_bench(card, rows):
    """The Figure of a bench, a colour per temperature; card and rows as in the JSON object that the
    bench prints.

    Three panels: the speed-ups of all modes over plain decoding, with the bound of docs/results.md;
    of mode speculative, the share of drafts accepted by offset, with a gap where no step got that
    far, and the share of the steps that yielded 1, 2, ... tokens.
    """
    rows = [row for row in rows if row["mode"] != "plain" and row.get("speedup")]
    n_bars = len(rows) + sum(row.get("bound") is not None for row in rows)
    height = max(4.2, 1.5 + 0.25 * n_bars)
    figure, (speed, acceptance, steps) = new_figure(10.5, height, (1.2, 1, 1))
    rows.sort(key=lambda row: row["temperature"])  # stable: the modes keep their order
    colors = dict(zip(sorted({row["temperature"] for row in rows}), PALETTE))
    labels = []  # of the bars, from the top down
    for row in rows:
        color = colors[row["temperature"]]
        over = f" (over {row['over']})" if "over" in row else ""
        bars = [(row["mode"] + over, row["speedup"], dict(color=color))]
        if row.get("bound"):
            hollow = dict(facecolor="white", edgecolor=color, hatch="///")
            bars.append(("bound", row["bound"], hollow))
        for label, length, style in bars:
            bar = speed.barh(len(labels), length, height=0.7, **style)
            box = dict(color="white", pad=1)
            speed.bar_label(bar, fmt="%.2fx", padding=4, fontsize=9, bbox=box)
            labels.append(label)
    speed.axvline(1, color="black", lw=1, ls="--")
    speed.set_yticks(range(len(labels)), labels)
    speed.invert_yaxis()
    speed.grid(visible=False, axis="y")
    speed.margins(x=0.18)  # room for the label of the longest bar
    speed.set(xlabel="times the speed of plain decoding", title="speed-up")

    speculative = [row for row in rows if row["mode"] == "speculative"]
    for i, row in enumerate(speculative):
        style = dict(color=colors[row["temperature"]], label=f"temperature {row['temperature']:g}")
        rates = [float("nan") if rate is None else rate for rate in row["acceptance"]]
        acceptance.plot(range(1, len(rates) + 1), rates, marker="o", ms=5, lw=1.6, **style)
        width, total = 0.8 / len(speculative), sum(row["histogram"])
        places = [k + (i + 0.5) * width - 0.4 for k in range(1, len(row["histogram"]))]
        steps.bar(places, [count / total for count in row["histogram"][1:]], width, **style)
    acceptance.set(xlabel="offset of the draft", ylabel="share accepted, where reached",
                   title="acceptance")
    acceptance.set_ylim(0, 1.05)
    steps.set(xlabel="tokens", ylabel="share of the steps", title="tokens per step")
    steps.grid(visible=False, axis="x")
    for panel in (acceptance, steps):
        panel.locator_params("x", integer=True, nbins=12)
    handles = acceptance.get_legend_handles_labels()
    figure.legend(*handles, loc="outside lower center", ncols=2, fontsize=9)
    say(figure, "{hardware}, {device}, {dtype}, threads = {threads}, head {head}, n = {n_future}, "
                "r = {rank}", card)
    return figure


def read_bench(path):
    """The card and the rows of the JSON object at the end of the file that bench_speculative.py's
    output went to. BadInput if it does not end so.
    """
    data = Path(path).read_bytes()
    utf16 = data.startswith((b"\xff\xfe", b"\xfe\xff"))  # what PowerShell's > writes
    try:
        bench = json.loads(data.decode("utf-16" if utf16 else "utf-8-sig").strip().splitlines()[-1])
        card = bench["card"]
        [card[key] for key in ("hardware", "device", "dtype", "threads", "head", "n_future",
                               "rank")]
        drawn = [row for row in bench["rows"] if row["mode"] != "plain" and row.get("speedup")]
        [row["speedup"] + row["temperature"] + (row.get("bound") or 0) for row in drawn][0]
        [sum(filter(None, row["acceptance"])) / sum(row["histogram"])
         for row in drawn if row["mode"] == "speculative"]
    except (ValueError, KeyError, TypeError, IndexError, AttributeError, ZeroDivisionError):
        raise BadInput(f"{path} does not end with the JSON object of this version's "
                       "bench_speculative.py") from None
    return card, bench["rows"]


def check_plot(path):
    """BadInput or OSError if no picture can be drawn into path: before a long measurement."""
    if Path(path).suffix.lower() not in FORMATS:
        raise BadInput(f"{path}: the name of a picture must end in one of {', '.join(FORMATS)}")
    if Path(path).is_dir():
        raise BadInput(f"{path} is a folder, not the name of a picture")
    new_figure(1, 1)
    check_writable(path)


def save(figure, path):
    """Write the picture, whole or not at all; the end of its name says in which format."""
    with replacing(path) as file:
        figure.savefig(file, format=Path(path).suffix[1:].lower(), dpi=figure.dpi)


def main():
    parser = ArgumentParser(__doc__)
    parser.add_argument("runs", nargs="+", type=any_path,
                        help="out_dir of train.py, or a log.jsonl; at most "
                             f"{len(PALETTE)}. Or the word "
                             "bench, and the output of one bench_speculative.py")
    parser.add_argument("--output", required=True, type=any_path,
                        help=f"the picture: {', '.join(FORMATS)}")
    parser.add_argument("--x", choices=X_AXES, help="x axis: steps, or the time of training (iter)")
    args = parser.parse_args()
    bench = args.runs[0] == "bench"  # a run of that name is ./bench
    if bench and (args.x or len(args.runs) != 2):
        parser.error("bench draws one file, and has no --x")
    if not bench and len(args.runs) > len(PALETTE):
        parser.error(f"at most {len(PALETTE)} runs, as many as there are colours")
    check_plot(args.output)
    if bench:
        figure = draw_bench(*read_bench(args.runs[1]))
    else:
        folders = [Path(run).parent if Path(run).is_file() else Path(run) for run in args.runs]
        names = [folder.resolve().name for folder in folders]
        figure = draw_runs(names, [read_log(run) for run in args.runs], args.x or "iter")
    save(figure, args.output)
    print(f"wrote {args.output}")


if __name__ == "__main__":
    run_script(main)
