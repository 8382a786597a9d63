"""The plots: what is read from a log, what is drawn, and what is left behind when something goes wrong."""

import json
import sys
from unittest import mock

import pytest

import plot

BLUE, RED = plot.PALETTE[:2]
CARD = {"hardware": "A CPU, 2 cores", "device": "cpu", "dtype": "float32", "threads": 1, "n_future": 3, "rank": 2,
        "context": "none", "vocab_size": 50, "target": "lm_head", "factors": "reduced"}


@pytest.fixture(scope="session")
def settings():
    """matplotlib's, before anything is drawn; tests that draw are skipped where there is no matplotlib."""
    return pytest.importorskip("matplotlib").rcParams.copy()  # dict() would make matplotlib choose a backend


draws = pytest.mark.usefixtures("settings")


def parts(i, n_future):
    """The parts of a loss as train.py logs them, other ones for every i."""
    offset = [1.0 + 1 / i + 0.5 * s for s in range(n_future)]
    if n_future == 1:
        return {"next": offset[0], "joint": offset[0], "offset": offset}
    return {"next": 0.9 + 1 / i, "joint": sum(offset) / n_future, "offset": offset, "balance": 1.0, "usage": [0.5, 0.5]}


def log_text(n_future=3, iters=10):
    """A log with a training line every 2 steps, a validation line every 4, and 30 s a step."""
    lines = []
    for i in range(2, iters + 1, 2):
        clock = {"iter": i, "seconds": 30.0 * i}
        lines.append(clock | {"lr": 0.1, "loss": 9.0, "tokens_per_second": 5.0} | parts(i, n_future))
        if i % 4 == 0:
            lines.append(clock | {"val": parts(10 * i, n_future)})
    return "".join(json.dumps(line) + "\n" for line in lines)


def write_log(folder, text):
    folder.mkdir(parents=True)
    (folder / "log.jsonl").write_text(text, encoding="utf-8")
    return folder


def row(mode, temperature, speedup, bound=None, acceptance=(), histogram=(0, 9)):
    return {"mode": mode, "temperature": temperature, "speedup": speedup, "bound": bound,
            "acceptance": list(acceptance), "histogram": list(histogram)}


ROWS = [row("plain", 0.0, 1.0), row("speculative", 0.0, 2.5, 3.5, [0.75, None, 0.5], [0, 2, 6, 0]),
        row("plain", 1.0, 1.0), row("speculative", 1.0, 1.5, 2.0, [0.5, 0.25, None], [0, 4, 4, 2])]


def lines(panel):
    """(colour, marker, x, y) of the panel's lines that have points, in the order in which they were drawn."""
    return [(line.get_color(), line.get_marker(), list(line.get_xdata()), list(line.get_ydata()))
            for line in panel.lines if len(line.get_xdata())]


def legend(figure_or_panel):
    return [text.get_text() for text in figure_or_panel.get_legend().get_texts()]


def assert_text_fits(figure):
    """All text that is drawn lies inside of the picture, and none on other text."""
    from matplotlib.text import Text

    with mock.patch.object(Text, "draw", autospec=True, side_effect=Text.draw) as draw:
        figure.draw_without_rendering()
    texts = dict.fromkeys(call.args[0] for call in draw.call_args_list)  # each once
    texts = [text for text in texts if text.get_visible() and text.get_text().strip()]
    boxes = [(text.get_text(), text.get_window_extent()) for text in texts]
    assert len(boxes) > 20
    for i, (text, box) in enumerate(boxes):
        assert figure.bbox.x0 <= box.x0 and box.x1 <= figure.bbox.x1, text
        assert figure.bbox.y0 <= box.y0 and box.y1 <= figure.bbox.y1, text
        assert not [(text, other) for other, its in boxes[:i] if box.overlaps(its)]


# -----------------------------------------------------------------------------
# reading


def test_a_log_is_read_whole(tmp_path):
    """From a folder or a file: training and validation apart, and every number as it was written."""
    folder = write_log(tmp_path / "run", log_text())
    log = plot.read_log(folder)
    assert log == plot.read_log(str(folder / "log.jsonl"))
    assert [point["iter"] for point in log["train"]] == [2, 4, 6, 8, 10]
    assert [point["iter"] for point in log["val"]] == [4, 8]
    expected = {name: parts(80, 3)[name] for name in ("next", "joint", "offset")}
    assert log["val"][1] == expected | {"iter": 8, "seconds": 240.0}


@pytest.mark.parametrize("text", ["{", "[]", '{"iter": 3}', '{"iter": 3, "seconds": 1.0, "val": 2}', "\x00"])
def test_another_file_is_refused_in_one_line(tmp_path, text):
    folder = write_log(tmp_path / "run", log_text() + text)
    with pytest.raises(SystemExit, match=r"^\S+log\.jsonl is not a log of train\.py$"):
        plot.read_log(folder)
    (folder / "log.jsonl").write_text("")
    with pytest.raises(SystemExit, match=r"^\S+log\.jsonl is empty$"):
        plot.read_log(folder)


def test_smoothing_follows_a_slope_and_levels_noise():
    """A straight line is unchanged, its ends included; noise that alternates falls by the width of the mean; a short
    log is not smoothed."""
    slope = [3.0 * i for i in range(200)]
    assert plot.smooth(slope) == pytest.approx(slope)
    assert max(map(abs, plot.smooth([(-1.0) ** i for i in range(200)])[5:-5])) == pytest.approx(1 / 11)
    assert plot.smooth([1.0, 5.0, 2.0]) == [1.0, 5.0, 2.0] and plot.smooth([]) == []


# -----------------------------------------------------------------------------
# runs


@draws
@pytest.mark.parametrize("x, label, per_step", [("iter", "steps", 1), ("seconds", "minutes", 0.5)])
def test_the_curves_of_a_run_are_the_logs_values(tmp_path, x, label, per_step):
    left, right = plot.draw_runs(["toy"], [plot.read_log(write_log(tmp_path / "toy", log_text()))], x).axes
    train, val = (2, 4, 6, 8, 10), (4, 8)
    assert lines(left) == [
        (BLUE, marker, [per_step * i for i in steps], [parts(scale * i, 3)[name] for i in steps])
        for name, val_marker in (("next", "o"), ("joint", "s"))
        for marker, steps, scale in (("None", train, 1), (val_marker, val, 10))
    ]
    assert lines(right) == [(BLUE, "o", [1, 2, 3], parts(80, 3)["offset"])]
    assert (left.get_xlabel(), left.get_ylabel(), right.get_xlabel()) == (label, "nats per token", "offset s")
    assert right.get_ylabel() == "nats, given the true tokens before it in the window"
    assert legend(left) == ["toy", "next token, validation", "joint per token, validation", "training, smoothed"]


@draws
def test_runs_have_colours_and_names_of_their_own(tmp_path):
    """Each in the legend by its name, in its colour."""
    logs = [plot.read_log(write_log(tmp_path / name, log_text(n))) for name, n in (("a", 3), ("b", 2))]
    figure = plot.draw_runs(["old", "new"], logs)
    left, right = figure.axes
    assert [(color, x) for color, _, x, _ in lines(right)] == [(BLUE, [1, 2, 3]), (RED, [1, 2])]
    assert [color for color, *_ in lines(left)] == [BLUE] * 4 + [RED] * 4
    assert legend(left)[:2] == ["old", "new"]
    assert [handle.get_color() for handle in left.get_legend().legend_handles[:2]] == [BLUE, RED]
    assert_text_fits(figure)


@draws
def test_a_model_without_a_head_has_the_next_token_curve_alone(tmp_path):
    """Beside one with a head as well; where no run has offsets, validated or not, there is no panel for them."""
    plain, cp = (plot.read_log(write_log(tmp_path / str(n), log_text(n))) for n in (1, 3))
    (left,) = plot.draw_runs(["plain"], [plain]).axes
    assert [marker for _, marker, *_ in lines(left)] == ["None", "o"]
    assert legend(left) == ["plain", "next token, validation", "training, smoothed"]
    left, right = plot.draw_runs(["plain", "cp"], [plain, cp]).axes
    assert [color for color, *_ in lines(left)] == [BLUE] * 2 + [RED] * 4 and [c for c, *_ in lines(right)] == [RED]
    (left,) = plot.draw_runs(["young"], [cp | {"val": []}]).axes
    assert [marker for _, marker, *_ in lines(left)] == ["None", "None"]


def test_the_script_writes_a_picture(settings, tmp_path, monkeypatch, capsys):
    """One PNG of a legible size and nothing else; no pyplot, and matplotlib's settings are as they were."""
    import matplotlib

    monkeypatch.delitem(sys.modules, "matplotlib.pyplot", raising=False)
    folders = [write_log(tmp_path / name, log_text(n)) for name, n in (("a", 3), ("b", 1))]
    (tmp_path / "out").mkdir()
    monkeypatch.setattr(sys, "argv", ["plot.py", *map(str, folders), "--output", str(tmp_path / "out/x.PNG")])
    plot.main()
    assert "x.PNG" in capsys.readouterr().out and [p.name for p in (tmp_path / "out").iterdir()] == ["x.PNG"]
    png = (tmp_path / "out/x.PNG").read_bytes()
    width, height = (int.from_bytes(png[i : i + 4], "big") for i in (16, 20))
    assert png.startswith(b"\x89PNG") and 900 <= width <= 1400 and 400 <= height <= 700
    assert "matplotlib.pyplot" not in sys.modules and matplotlib.rcParams.copy() == settings


# -----------------------------------------------------------------------------
# bench


@draws
def test_bench_bars_are_the_speedups_and_bounds():
    """From the top down, measured above bound, plain left out, with a line at 1; other modes by name, if they have a
    speed-up."""
    graph = row("graph", 0.0, 4.0)
    figure = plot.draw_bench(CARD, [*ROWS, graph, row("odd", 1.0, None)])
    speed = figure.axes[0]
    labels = [label.get_text() for label in speed.get_yticklabels()]
    assert list(zip(labels, [bar.get_width() for bar in speed.patches])) == [
        ("speculative", 2.5), ("bound (5)", 3.5), ("graph", 4.0), ("speculative", 1.5), ("bound (5)", 2.0)]
    assert [bar.get_y() + bar.get_height() / 2 for bar in speed.patches] == pytest.approx(list(speed.get_yticks()))
    assert [text.get_text() for text in speed.texts] == ["2.50x", "3.50x", "4.00x", "1.50x", "2.00x"]
    assert speed.yaxis_inverted() and [x for _, _, x, _ in lines(speed)] == [[1, 1]]
    from matplotlib.colors import same_color

    for bar, color in zip(speed.patches, [BLUE, BLUE, BLUE, RED, RED]):  # the bounds are hollow
        assert same_color(bar.get_edgecolor() if bar.get_hatch() else bar.get_facecolor(), color)
    assert_text_fits(figure)


@draws
def test_bench_acceptance_has_gaps_where_no_step_got():
    acceptance = plot.draw_bench(CARD, ROWS).axes[1]
    (*_, x, greedy), (*_, sampled) = lines(acceptance)
    assert x == [1, 2, 3] and [color for color, *_ in lines(acceptance)] == [BLUE, RED]
    assert greedy == pytest.approx([0.75, float("nan"), 0.5], nan_ok=True)
    assert sampled == pytest.approx([0.5, 0.25, float("nan")], nan_ok=True)


@draws
def test_bench_histogram_is_in_shares_at_the_number_of_tokens():
    """The temperatures side by side around the number, which is the list's index."""
    bars = plot.draw_bench(CARD, ROWS).axes[2].patches
    assert [bar.get_height() for bar in bars] == [0.25, 0.75, 0, 0.4, 0.4, 0.2]
    assert [bar.get_x() + bar.get_width() for bar in bars[:3]] == pytest.approx([1, 2, 3])
    assert [bar.get_x() for bar in bars[3:]] == pytest.approx([1, 2, 3])


@draws
def test_bench_says_what_was_measured_on_what():
    """In one line that fits, however long the hardware's name is; one legend names both temperatures."""
    figure = plot.draw_bench(CARD, ROWS)
    assert figure.get_suptitle() == "A CPU, 2 cores, cpu, float32, threads = 1, n = 3, r = 2, context none"
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["temperature 0", "temperature 1"]
    figure = plot.draw_bench(CARD | {"hardware": "A CPU with a long name " * 20}, ROWS)
    assert "\n" not in figure.get_suptitle() and figure.get_suptitle().endswith("r = 2, context none")
    assert_text_fits(figure)


@draws
def test_many_heads_make_a_bench_taller():
    """bench_speculative.py --beside: every bar and its label has room; the other panels are the first head's."""
    others = [row(f"speculative, out/bytes_previous_{i}", temperature, 1.5) | {"bound": 2.0}
              for i in range(5) for temperature in (0.0, 1.0)]
    figure = plot.draw_bench(CARD, [*ROWS, *others])
    assert figure.get_figheight() > plot.draw_bench(CARD, ROWS).get_figheight()
    assert len(figure.axes[1].lines) == len(plot.draw_bench(CARD, ROWS).axes[1].lines)
    assert_text_fits(figure)


# -----------------------------------------------------------------------------
# heads over the rank


def head_row(context, rank, temperature, tokens, speedup):
    head = {"n_future": CARD["n_future"], "factors": CARD["factors"], "context": context, "rank": rank}
    return row("speculative", temperature, speedup) | {"tokens_per_step": tokens, **head}


HEADS = [row("plain", 0.0, 1.0), head_row("none", 4, 0.0, 2.0, 1.5), head_row("none", 4, 1.0, 1.8, 1.2),
         head_row("none", 1, 0.0, 1.7, 1.4), head_row("none", 1, 1.0, 1.6, 1.1), head_row("previous", 1, 0.0, 3.0, 2.5)]


@draws
def test_ranks_have_a_colour_per_context_and_a_line_per_temperature():
    """Points in the order of the rank, not of the rows; what was not measured is left out."""
    figure = plot.draw_ranks(CARD, HEADS[1:])
    tokens, speedups = figure.axes
    assert lines(tokens) == [(BLUE, "o", [1, 4], [1.7, 2.0]), (BLUE, "o", [1, 4], [1.6, 1.8]), (RED, "o", [1], [3.0])]
    assert [y for *_, y in lines(speedups)] == [[1.4, 1.5], [1.1, 1.2], [2.5]]
    assert [line.get_linestyle() for line in tokens.lines] == ["-", "--", "-"]
    assert [label.get_text() for label in tokens.get_xticklabels()] == ["1", "4"]
    assert [text.get_text() for text in figure.legends[0].get_texts()] == [
        "context none, temperature 0", "context none, temperature 1", "context previous, temperature 0"]
    assert figure.get_suptitle() == "A CPU, 2 cores, cpu, float32, n = 3, V = 50"
    assert_text_fits(figure)


@draws
def test_ranks_are_read_from_what_the_bench_printed(tmp_path, monkeypatch):
    """Plain decoding and heads of another n or other factors are left out; one line for a file that is none of the
    bench's, for a bench of an older version, and for a second file."""
    path, picture = tmp_path / "0.txt", tmp_path / "x.png"
    argv = ["plot.py", "--ranks", str(path), "--output", str(picture)]
    monkeypatch.setattr(sys, "argv", argv)
    rows = [*HEADS, HEADS[1] | {"n_future": 9}, HEADS[1] | {"factors": "full"}]
    path.write_text("a table\n" + json.dumps({"card": CARD, "rows": rows}) + "\n")
    assert plot.read_bench(path) == (CARD, HEADS[1:])
    plot.main()
    assert picture.stat().st_size > 10_000
    no_hardware = {key: value for key, value in CARD.items() if key != "hardware"}
    for text in ("", "a table\n", "{}\n", "[]", json.dumps({"card": CARD, "rows": HEADS[:1]}),
                 json.dumps({"card": no_hardware, "rows": HEADS}),
                 json.dumps({"card": CARD, "rows": [HEADS[1] | {"rank": "one"}]}),
                 json.dumps({"card": CARD, "rows": [HEADS[1] | {"context": None}]})):
        path.write_text(text)
        with pytest.raises(SystemExit, match=r"^\S+0\.txt does not end with the JSON object of this version's"):
            plot.main()
    for extra in (["--x", "iter"], [str(path)]):
        monkeypatch.setattr(sys, "argv", [*argv[:3], *extra, *argv[3:]])
        with pytest.raises(SystemExit, match="2"):
            plot.main()


# -----------------------------------------------------------------------------
# files and errors


@draws
@pytest.mark.parametrize("name, start", [("x.png", b"\x89PNG"), ("x.pdf", b"%PDF"), ("x.svg", b"<?xml")])
def test_the_name_decides_the_format(tmp_path, name, start):
    plot.save(plot.draw_bench(CARD, ROWS), str(tmp_path / name))
    assert [path.name for path in tmp_path.iterdir()] == [name] and (tmp_path / name).read_bytes().startswith(start)


@pytest.mark.parametrize("name", ["x.gif", "x", "png"])
def test_unknown_formats_are_refused_before_anything_is_measured(name):
    with pytest.raises(SystemExit, match=r"^\S+: the name of a picture must end in one of \.png, \.pdf, \.svg$"):
        plot.check_plot(name)


def test_matplotlib_missing_is_one_line(tmp_path, monkeypatch):
    """From the script, and from the bench's early question."""
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    folder, picture = write_log(tmp_path / "run", log_text()), str(tmp_path / "x.png")
    monkeypatch.setattr(sys, "argv", ["plot.py", str(folder), "--output", picture])
    for call in (plot.main, lambda: plot.check_plot(picture)):
        with pytest.raises(SystemExit, match="^Plots need matplotlib: python -m pip install matplotlib$"):
            call()
    assert not (tmp_path / "x.png").exists()


def test_more_runs_than_colours_are_refused(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["plot.py", *["run"] * (len(plot.PALETTE) + 1), "--output", "x.png"])
    with pytest.raises(SystemExit, match="2"):
        plot.main()
    assert "at most 7 runs" in capsys.readouterr().err
