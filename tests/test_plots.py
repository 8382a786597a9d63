"""The plots: what is read, which values are drawn, and what is left when something goes wrong."""

import json
import sys

import pytest

from experiments import plots
from model import BadInput

CARD = {"hardware": "A CPU, 2 cores", "device": "cpu", "dtype": "float32", "threads": 1, "n_future": 3, "rank": 2,
        "head": "cp", "vocab_size": 50, "target": "lm_head"}
draws = pytest.mark.skipif(not __import__("importlib.util").util.find_spec("matplotlib"), reason="no matplotlib")


def parts(i, n_future):
    """The parts of a loss as train.py logs them, other ones for every i."""
    offset = [1.0 + 1 / i + 0.5 * s for s in range(n_future)]
    if n_future == 1:
        return {"next": offset[0], "joint": offset[0], "offset": offset}
    return {"next": 0.9 + 1 / i, "joint": sum(offset) / n_future, "offset": offset, "balance": 1.0, "usage": [0.5, 0.5]}


def write_log(folder, n_future=3, end=""):
    """A log with a training line every 2 steps, a validation line every 4, and 30 s a step."""
    lines = []
    for i in range(2, 11, 2):
        clock = {"iter": i, "seconds": 30.0 * i}
        lines.append(clock | {"lr": 0.1, "loss": 9.0, "tokens_per_second": 5.0} | parts(i, n_future))
        if i % 4 == 0:
            lines.append(clock | {"val": parts(10 * i, n_future)})
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) + end, encoding="utf-8")
    return folder


def row(mode, temperature, speedup, bound=None, acceptance=(), histogram=(0, 9), **more):
    return {"mode": mode, "temperature": temperature, "speedup": speedup, "bound": bound,
            "acceptance": list(acceptance), "histogram": list(histogram), **more}


ROWS = [row("plain", 0.0, 1.0), row("speculative", 0.0, 2.5, 3.5, [0.75, None, 0.5], [0, 2, 6, 0]),
        row("plain", 1.0, 1.0), row("speculative", 1.0, 1.5, 2.0, [0.5, 0.25, None], [0, 4, 4, 2])]


def lines(panel):
    """(x, y) of the panel's lines that have points, in the order in which they were drawn."""
    return [(list(line.get_xdata()), list(line.get_ydata())) for line in panel.lines if len(line.get_xdata())]


# -----------------------------------------------------------------------------
# runs


def test_a_log_is_read_whole(tmp_path):
    """From a folder or a file: training and validation apart, and every number as it was
    written."""
    folder = write_log(tmp_path / "run")
    log = plots.read_log(folder)
    assert log == plots.read_log(str(folder / "log.jsonl"))
    assert [point["iter"] for point in log["train"]] == [2, 4, 6, 8, 10]
    assert [point["iter"] for point in log["val"]] == [4, 8]
    expected = {name: parts(80, 3)[name] for name in ("next", "joint", "offset")}
    assert log["val"][1] == expected | {"iter": 8, "seconds": 240.0}


@pytest.mark.parametrize("text", ["{", "[]", '{"iter": 3}', '{"iter": 3, "seconds": 1.0, "val": 2}', "\x00"])
def test_another_file_is_refused_in_one_line(tmp_path, text):
    folder = write_log(tmp_path / "run", end=text)
    with pytest.raises(BadInput, match=r"^\S+log\.jsonl is not a log of train\.py$"):
        plots.read_log(folder)
    (folder / "log.jsonl").write_text("")
    with pytest.raises(BadInput, match=r"^\S+log\.jsonl is empty$"):
        plots.read_log(folder)


def test_smoothing_follows_a_slope_and_levels_noise():
    """A straight line is unchanged, its ends included; noise that alternates falls by the width of
    the mean; a short log is not smoothed."""
    slope = [3.0 * i for i in range(200)]
    assert plots.smooth(slope) == pytest.approx(slope)
    assert max(map(abs, plots.smooth([(-1.0) ** i for i in range(200)])[5:-5])) == pytest.approx(1 / 11)
    assert plots.smooth([1.0, 5.0, 2.0]) == [1.0, 5.0, 2.0] and plots.smooth([]) == []


@draws
@pytest.mark.parametrize("x,per_step", [("iter", 1), ("seconds", 0.5)])
def test_the_curves_of_a_run_are_the_logs_values(tmp_path, x, per_step):
    """Training and validation of both losses over steps or minutes; the last validation's loss by
    offset."""
    left, right = plots.draw_runs(["toy"], [plots.read_log(write_log(tmp_path / "toy"))], x).axes
    assert lines(left) == [([per_step * i for i in steps], [parts(scale * i, 3)[name] for i in steps])
                           for name in ("next", "joint") for steps, scale in (((2, 4, 6, 8, 10), 1), ((4, 8), 10))]
    assert lines(right) == [([1, 2, 3], parts(80, 3)["offset"])]
    assert left.get_xlabel() and left.get_ylabel() and right.get_xlabel() and right.get_ylabel()


@draws
def test_a_model_without_a_head_has_the_next_token_curve_alone(tmp_path):
    """Also beside one with a head; where no run has offsets, validated or not, there is no panel
    for them."""
    plain, cp = (plots.read_log(write_log(tmp_path / str(n), n)) for n in (1, 3))
    (left,) = plots.draw_runs(["plain"], [plain]).axes
    assert len(lines(left)) == 2
    left, right = plots.draw_runs(["plain", "cp"], [plain, cp]).axes
    assert len(lines(left)) == 6 and len(lines(right)) == 1
    (left,) = plots.draw_runs(["young"], [cp | {"val": []}]).axes
    assert len(lines(left)) == 2


# -----------------------------------------------------------------------------
# the bench


@draws
def test_bench_bars_are_the_speedups_and_bounds():
    """Measured, then bound; plain left out; other modes by name, if they have a speed-up."""
    figure = plots.draw_bench(CARD, [*ROWS, row("graph", 0.0, 4.0), row("odd", 1.0, None)])
    speed, acceptance, steps = figure.axes
    labels = [label.get_text() for label in speed.get_yticklabels()]
    assert list(zip(labels, [bar.get_width() for bar in speed.patches])) == [
        ("speculative", 2.5), ("bound", 3.5), ("graph", 4.0), ("speculative", 1.5), ("bound", 2.0)]
    (x, greedy), (_, sampled) = lines(acceptance)  # with a gap where no step got that far
    assert x == [1, 2, 3] and greedy == pytest.approx([0.75, float("nan"), 0.5], nan_ok=True)
    assert sampled == pytest.approx([0.5, 0.25, float("nan")], nan_ok=True)
    assert [bar.get_height() for bar in steps.patches] == [0.25, 0.75, 0, 0.4, 0.4, 0.2]
    assert all(str(CARD[key]) in figure.get_suptitle() for key in ("hardware", "device", "dtype", "n_future", "head"))


@pytest.mark.parametrize("encoding,end", [("utf-8", "\n"), ("utf-8", "\n\n  \r\n"), ("utf-16", "\n"),
                                          ("utf-8-sig", "")])
def test_a_bench_is_read_from_what_it_printed(tmp_path, encoding, end):
    """As a shell writes it, PowerShell's UTF-16 and blank lines at the end included."""
    (tmp_path / "0.txt").write_text("a table\n" + json.dumps({"card": CARD, "rows": ROWS}) + end, encoding=encoding)
    assert plots.read_bench(tmp_path / "0.txt") == (CARD, ROWS)


@pytest.mark.parametrize("text", ["", "\n", "a table\n", "{}\n", "[]", json.dumps({"card": CARD, "rows": ROWS[:1]}),
                                  json.dumps({"card": {}, "rows": ROWS}), "\udcff",
                                  json.dumps({"card": CARD, "rows": [ROWS[1] | {"temperature": "one"}]}),
                                  json.dumps({"card": CARD, "rows": [ROWS[1] | {"histogram": [0]}]})])
def test_another_file_than_the_benchs_is_refused(tmp_path, text):
    (tmp_path / "0.txt").write_text(text, errors="surrogateescape")
    with pytest.raises(BadInput, match=r"^\S+0\.txt does not end with the JSON object of this version's"):
        plots.read_bench(tmp_path / "0.txt")


# -----------------------------------------------------------------------------
# the script


@draws
def test_the_script_writes_a_picture_and_changes_no_setting(tmp_path, monkeypatch):
    """In the format that its name says; whole, and nothing beside it; without pyplot, which has a
    global state."""
    import matplotlib

    settings = matplotlib.rcParams.copy()
    monkeypatch.delitem(sys.modules, "matplotlib.pyplot", raising=False)
    (tmp_path / "bench.txt").write_text(json.dumps({"card": CARD, "rows": ROWS}))
    folders = [str(write_log(tmp_path / name, n)) for name, n in (("a", 3), ("b", 1))]
    for args, name, start in ((folders, "x.PNG", b"\x89PNG"), (folders, "y.pdf", b"%PDF"),
                              (["bench", str(tmp_path / "bench.txt")], "z.svg", b"<?xml")):
        monkeypatch.setattr(sys, "argv", ["plots.py", *args, "--output", str(tmp_path / "out" / name)])
        plots.main()
        assert (tmp_path / "out" / name).read_bytes().startswith(start)
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["x.PNG", "y.pdf", "z.svg"]
    assert "matplotlib.pyplot" not in sys.modules and matplotlib.rcParams.copy() == settings


@pytest.mark.parametrize("name", ["x.gif", "x", "png"])
def test_unknown_formats_are_refused_before_anything_is_measured(name):
    with pytest.raises(BadInput, match=r"^\S+: the name of a picture must end in one of \.png, \.pdf, \.svg$"):
        plots.check_plot(name)


def test_matplotlib_missing_is_one_line(tmp_path, monkeypatch):
    """From the script, and from its early question."""
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    picture = str(tmp_path / "x.png")
    monkeypatch.setattr(sys, "argv", ["plots.py", str(write_log(tmp_path / "run")), "--output", picture])
    for call in (plots.main, lambda: plots.check_plot(picture)):
        with pytest.raises(BadInput, match="^Plots need matplotlib: python -m pip install matplotlib$"):
            call()
    assert not (tmp_path / "x.png").exists()


@pytest.mark.parametrize("args", [["run"] * (len(plots.PALETTE) + 1), ["bench"], ["bench", "a", "b"],
                                  ["bench", "a", "--x", "iter"]])
def test_flags_that_do_not_go_together_are_refused(args, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["plots.py", *args, "--output", "x.png"])
    with pytest.raises(SystemExit, match="2"):
        plots.main()
