"""experiments/reproduce.py: the experiments at a small scale, what is not made twice, and that documents show what
was measured."""

import itertools
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from helpers import call, exit_code, fork, in_a_fork, start

import train as trainer
from experiments import before_after, bench_training, reproduce
from experiments.reproduce import EXPERIMENTS, SCALES
from model import ROOT, BadInput

COMMAND = [sys.executable, "-m", "experiments.reproduce"]
ELSEWHERE = {**os.environ, "PYTHONPATH": str(ROOT)}  # the environment of a process in another folder


def launch(cwd, *args):
    """Run the script in cwd, in a process of its own."""
    return subprocess.run([*COMMAND, *map(str, args)], cwd=cwd, env=ELSEWHERE, capture_output=True, text=True,
                          encoding="utf-8")


def script_by_fork(place, name, script, flags, *files):
    """Place.script, whose processes would import torch for seconds each."""
    log = place.work / "logs" / f"{name}.txt"
    log.parent.mkdir(exist_ok=True)
    module, out = script.removesuffix(".py").replace("/", "."), log.with_suffix(".out")
    args = [*map(str, files), *reproduce.as_flags(flags)]
    if exit_code(fork(start, module, args, out=out, err=log)):
        raise BadInput(log.read_text())
    return out.read_text()


def measure_by_fork(*args):
    code, out, error = in_a_fork(bench_training.row_process, json.dumps(args))
    assert code == 0, error
    return json.loads(out.splitlines()[-1])


def specialties_by_fork(ckpt, out_dir, specialties=reproduce.specialties):
    """The only thing that reproduce itself computes: whoever has computed cannot fork, as locks of
    MKL may be taken then."""
    code, out, error = in_a_fork(lambda: print(json.dumps(specialties(ckpt, out_dir))))
    assert code == 0, error
    return json.loads(out)


def reproduce_by_fork(*args):
    reproduce.Place.script, bench_training.measure_apart = script_by_fork, measure_by_fork
    reproduce.specialties = specialties_by_fork
    start("experiments.reproduce", args)


@pytest.fixture(scope="module")
def smoke(forks, tmp_path_factory):
    """A folder in which everything was run once, and the output."""
    cwd = tmp_path_factory.mktemp("reproduce")
    code, out, error = forks(cwd, reproduce_by_fork, "all", "--scale", "smoke")
    assert code == 0, error
    return cwd, out


def place_of(**args):
    return reproduce.Place(SimpleNamespace(**dict(threads=1, nanogpt="no", text=None, jobs=1) | args))


def results(cwd):
    return {path.name: path.read_text() for path in (cwd / "results" / "smoke").glob("*.json")}


def test_all_experiments_run_and_write_a_table_and_a_picture(smoke):
    cwd, out = smoke
    for name, experiment in EXPERIMENTS.items():
        cells = list(experiment.cells(SCALES["smoke"]))
        if not cells:
            continue  # needs SmolLM2, transformers or nanoGPT
        for panel in experiment.panels:  # none is empty
            assert all(any(dict(zip(experiment.labels, cell.labels))[key] == value for cell in cells)
                       for key, value in panel.only), panel
        table = (cwd / "results" / "smoke" / f"{name}.md").read_text(encoding="utf-8")
        assert experiment.title in table and table.split("\n", 2)[2] in out
        more = 4 if name == "balance" else 0  # lines of what components specialise on
        assert table.count("\n|") == 2 + len(list(experiment.cells(SCALES["smoke"]))) + more
        if find_spec("matplotlib"):
            picture = (cwd / "results" / "smoke" / f"{name}.png").read_bytes()
            assert picture.startswith(b"\x89PNG") and len(picture) > 10_000
    found = json.loads(results(cwd)["stories-n2-r2-seed1.json"])
    assert found["spec"]["flags"]["n_future"] == 2 and found["hardware"] and found["date"] and found["data"]
    assert [point["iter"] for point in found["val"]] == [2, 4] and len(found["components"]) == 2


@pytest.mark.slow
def test_real_processes_two_at_once_make_what_forks_make(smoke, tmp_path):
    """The same runs, tables and pictures, and the losses wherever no clock ends a training."""
    result = launch(tmp_path, "all", "--scale", "smoke", "--jobs", 2)
    assert result.returncode == 0, result.stderr
    here, there = (sorted(path.name for path in (cwd / "results/smoke").iterdir())
                   for cwd in (smoke[0], tmp_path))
    assert here == there and len(here) > 40
    own, forks = ({name: [point["joint"] for point in run["val"]]
                   for name, run in zip(texts, map(json.loads, texts.values()))
                   if "val" in run and "seconds" not in name}  # a clock ends those that name it
                  for texts in (results(tmp_path), results(smoke[0])))
    assert own.keys() == forks.keys() and len(own) > 10
    for name, joints in own.items():
        assert joints == pytest.approx(forks[name], rel=1e-4), name  # of five digits


def test_finished_runs_are_not_made_again(smoke, monkeypatch, capsys):
    """The models may be gone. A damaged result and one of other settings get a line each, and stay what
    they are; so does a run whose model is needed and gone."""
    cwd, _ = smoke
    before, folder = results(cwd), cwd / "results" / "smoke"
    path, bench = folder / "stories-n2-r2-seed1.json", folder / "bench-stories-n2-r1-seed1-marginal.json"

    def refused(message, *experiments):
        with monkeypatch.context() as patch:
            patch.chdir(cwd)
            code, line = call("experiments.reproduce", (*experiments, "--scale", "smoke"))
        assert code == 1 and message in line and line.count("\n") == 0
        assert "Traceback" not in capsys.readouterr().err

    (cwd / "out").rename(cwd / "gone")
    try:
        with monkeypatch.context() as patch:
            patch.chdir(cwd)
            assert call("experiments.reproduce", "rank sizes --scale smoke") == (0, "")
        assert results(cwd) == before
        wider = before[path.name].replace('"n_embd": 16', '"n_embd": 32')
        for text, message in (("{", "is no result of experiments/reproduce.py; move it away"),
                              (wider, "is a run of other settings")):
            path.write_text(text)
            refused(message, "rank")
            assert path.read_text() == text
        path.write_text(before[path.name])
        bench.unlink()
        refused("The model of stories-n2-r1-seed1-marginal is gone", "acceptance")
    finally:
        path.write_text(before[path.name])
        bench.write_text(before[bench.name])
        shutil.rmtree(cwd / "out")
        (cwd / "gone").rename(cwd / "out")
    other = before[path.name].replace(json.loads(before[path.name])["data"], "0" * 64)
    path.write_text(other)
    refused("is a run of other data", "rank")
    path.write_text(before[path.name])


def interrupted_after_a_result(*args):
    """Ctrl-C just before the next script of an experiment starts."""
    script, places = reproduce.Place.script, []

    def interrupted(place, *args):
        if results(Path()):
            places.append(place)
            os.kill(os.getpid(), signal.SIGINT)
        return script(place, *args)

    reproduce.Place.script = interrupted
    try:
        start("experiments.reproduce", args)
    finally:
        assert places and not any(process.poll() is None for process in places[0].processes)


@pytest.mark.slow
def test_an_interrupted_experiment_goes_on(forks, tmp_path):
    """Ctrl-C after the first result: exit code 130, no process is left at work, and the same command
    makes the rest."""
    code, _, error = forks(tmp_path, interrupted_after_a_result, "next_token", "--scale", "smoke")
    first = results(tmp_path)
    assert code == 130 and "Traceback" not in error, error
    wanted = {f"{run.name}.json" for cell in EXPERIMENTS["next_token"].cells(SCALES["smoke"]) for run in cell.runs}
    assert first and set(first) < wanted
    assert launch(tmp_path, "next_token", "--scale", "smoke", "--jobs", 2).returncode == 0
    assert set(results(tmp_path)) == wanted and all(results(tmp_path)[name] == text for name, text in first.items())


def test_an_interrupted_training_goes_on(smoke, tmp_path, monkeypatch):
    """A frozen trunk's head, stopped after half of its steps, ends with the losses of the whole
    run, in a process of its own; one of other settings does not go on."""
    scale = SCALES["smoke"]
    monkeypatch.chdir(tmp_path)
    shutil.copytree(smoke[0] / "out", "out")
    head = scale.training(n_future=2, rank=2, trunk=scale.trunk())[0]
    whole = json.loads(results(smoke[0])[f"{head.name}.json"])
    place = place_of(scale="smoke", results="results", work="out/reproduce")
    out = place.work / head.name
    shutil.rmtree(out)
    half = {"data_dir": place.data("stories"), "out_dir": out, "init_from": place.work / scale.trunk().name / "ckpt.pt",
            "freeze_trunk": True, "fresh_head": True} | head.spec["flags"]
    monkeypatch.setattr(trainer, "evaluate", lambda run, real=trainer.evaluate: os.kill(os.getpid(), signal.SIGTERM)
                        or real(run))
    assert call("train", " ".join(reproduce.as_flags(half)))[0] == 130
    assert torch.load(out / "ckpt.pt", weights_only=True)["iter_num"] < 4
    monkeypatch.undo()
    monkeypatch.chdir(tmp_path)
    found = head.run(place)
    joints, expected = ([point["joint"] for point in result["val"]] for result in (found, whole))
    assert joints == pytest.approx(expected, rel=1e-4)  # results have five digits
    other = scale.training(n_future=2, rank=2, trunk=scale.trunk(), lr=1e-4)[0]
    shutil.copytree(out, place.work / other.name)
    with pytest.raises(BadInput, match="is a run of other settings; move it away"):
        other.run(place)


def test_bad_input_is_one_line(tmp_path, smoke, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert call("experiments.reproduce", "ranks")[0] == 2
    line = capsys.readouterr().err
    assert "invalid choice: 'ranks'" in line and line.count("\n") == 1
    for args, message, n_bars in (("rank --scale smoke --text a.txt", "leave --text away", 0),
                                  ("next_token --text no.txt", "no.txt: no such file or folder", 1)):
        code, line = call("experiments.reproduce", args)
        assert code == 1 and message in line and line.count("\n") == 0
        assert capsys.readouterr().err.count("\n") == n_bars
    assert call("experiments.reproduce", "smollm2 --scale smoke")[0] == 0
    assert "smollm2: not at this scale" in capsys.readouterr().err
    monkeypatch.chdir(smoke[0])
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setattr(sys, "argv", ["reproduce.py", "sizes", "--scale", "smoke"])
    reproduce.main()
    line = "no picture: Plots need matplotlib: python -m pip install matplotlib"
    assert capsys.readouterr().err.strip().endswith(line)


def test_tables_are_means_and_ranges_of_the_runs():
    """By hand: two seeds, one that has no value, and the comparison seed by seed."""
    a, b = SCALES["laptop"].training((1, 2), n_future=4, rank=1), SCALES["laptop"].training((1, 2), n_future=4, rank=8)
    losses = dict(zip((run.name for run in a + b), (2.0, 3.0, 1.5, 2.0)))
    found = {name: {"val": [{"joint": 9.0, "next": 9.0}, {"joint": loss, "next": loss / 2}]}
             for name, loss in losses.items()}
    experiment = reproduce.Experiment("title", None, ("r",), reproduce.LOSSES, ())
    cells = [reproduce.Cell((1,), a, a), reproduce.Cell((8,), b, a)]
    table = reproduce.markdown(experiment, list(reproduce.rows_of(experiment, cells, found)))
    assert table.splitlines()[2:] == ["| 1 | 2.500 (2.000..3.000) | - | 1.250 (1.000..1.500) |",
                                      "| 8 | 1.750 (1.500..2.000) | 0.750 (0.500..1.000) | 0.875 (0.750..1.000) |"]


def with_needs(run):
    yield run
    for need in run.needs:
        yield from with_needs(need)


def test_runs_of_different_settings_have_different_names():
    """At every scale; or one would be taken for the other."""
    for scale in SCALES.values():
        specs = {}
        for experiment in EXPERIMENTS.values():
            for cell in experiment.cells(scale):
                for made in itertools.chain.from_iterable(map(with_needs, (*cell.runs, *cell.against))):
                    spec = json.dumps(made.spec, sort_keys=True)
                    assert specs.setdefault(made.name, spec) == spec, made.name


def test_specialties_are_posteriors(smoke, monkeypatch):
    """The share of a token that is a component's, from (1) written out."""
    monkeypatch.chdir(smoke[0])
    out_dir = Path("out/reproduce/smoke/stories-n2-r2-seed1")
    model, enc, ckpt = reproduce.load(out_dir, "cpu")
    cfg = reproduce.TrainConfig(**ckpt["train_config"])
    data = reproduce.Windows(Path(cfg.data_dir) / "val.bin", cfg, torch.device("cpu"))
    shares, head, W = {}, model.head, model.lm_head.weight
    with torch.no_grad():
        for idx, gold in data.fixed(64):
            for e, window in zip(model.hidden(idx).flatten(0, 1), gold.flatten(0, 1)):
                share = torch.stack([head.router(e).softmax(-1)[a] * torch.stack([
                    (W @ head.maps[s, a] @ e).softmax(-1)[window[s]] for s in range(2)]).prod() for a in range(2)])
                shares.setdefault(enc.decode([window[0].item()]), []).append(share / share.sum())
    found = reproduce.specialties(ckpt, out_dir, least=1)["components"]
    assert len(found) == 2 and all(len(tokens) == 8 for tokens in found)
    for a, tokens in enumerate(found):
        for token, share in tokens:
            # float32 adds up some hundred shares: 1e-5
            assert share == pytest.approx(torch.stack(shares[token]).mean(0)[a].item(), abs=1e-4)
        most = max(torch.stack(given).mean(0)[a].item() for given in shares.values())
        assert tokens[0][1] == pytest.approx(most, abs=1e-4)


def test_documents_show_the_tables_that_the_results_give():
    """Every table of the laptop's scale in docs/results.md, word for word, and its picture."""
    document = (ROOT / "docs" / "results.md").read_text(encoding="utf-8")
    place = place_of(scale="laptop", results=ROOT / "results", work="no")
    tables = [path.stem for path in place.results.glob("*.md")]
    assert {"rank", "balance", "next_token"} <= set(tables) <= set(EXPERIMENTS)
    for name in tables:
        experiment, cells = EXPERIMENTS[name], list(EXPERIMENTS[name].cells(place.scale))
        found = place.found(reproduce.runs_of(cells))
        table = reproduce.markdown(experiment, list(reproduce.rows_of(experiment, cells, found)))
        table += experiment.more(cells, found)
        assert (place.results / f"{name}.md").read_text(encoding="utf-8").endswith(table), name
        assert table in document, name
        assert not experiment.panels or f"results/laptop/{name}.png" in document, name


def test_tables_of_before_and_after_are_those_of_their_runs():
    """And in docs/results.md."""
    document = (ROOT / "docs" / "results.md").read_text(encoding="utf-8")
    for path in (ROOT / "results/before_after").glob("*.json"):
        table = before_after.HEADER
        for name, sides in json.loads(path.read_text(encoding="utf-8"))["runs"].items():
            sides = [[{(row["mode"], row["temperature"]): row for row in run} for run in side] for side in sides]
            table += "".join(before_after.lines(name, *sides))
        assert path.with_suffix(".md").read_text(encoding="utf-8") == table
        assert table in document


def of_the_gpu():
    """The two tables of results/h100, from its runs."""
    lines = ["| model | dtype | decoding | plain, ms | step / plain, 0 | tok/step, 0 | speed-up, 0 | tok/step, 1 | speed-up, 1 "
             "| tokens/s, 0 |", "|" + 10 * "---|"]
    for name, model in (("toy1_f32", "the toy, r = 1"), ("chain_eager", "bytes, chain"), ("chain_f32", "bytes, chain"),
                        ("chain_bf16", "bytes, chain"), ("tiny_f32", "tinystories"), ("tiny_bf16", "tinystories")):
        bench = json.loads((ROOT / f"results/h100/{name}.json").read_text(encoding="utf-8"))
        rows = {(row["mode"], row["temperature"]): row for row in bench["rows"]}
        plain, fast, sampled = rows["plain", 0.0], rows["speculative", 0.0], rows["speculative", 1.0]
        ms = 1e3 / plain["tokens_per_second"]
        speed = ["{:.2f} ({:.2f}..{:.2f})".format(row["speedup"], *row["speedup_range"]) for row in (fast, sampled)]
        lines.append(f"| {model} | {bench['card']['dtype']} | {'captured' if bench['card']['captured'] else 'step by step'} "
                     f"| {ms:.2f} | {fast['step_ms'] / ms:.2f} | {fast['tokens_per_step']:.2f} | {speed[0]} "
                     f"| {sampled['tokens_per_step']:.2f} | {speed[1]} | {fast['tokens_per_second']:.0f} |")
    run = json.loads((ROOT / "results/h100/train_tinystories.json").read_text(encoding="utf-8"))
    speed, GFLOP = run["tokens_per_second"], 0.47
    return "\n".join(lines) + "\n", (
        "| training | steps | tokens/s | GFLOP per token | TFLOP/s | next | joint |\n|---|---|---|---|---|---|---|\n"
        f"| tinystories, bfloat16 | {run['iter']} | {speed:.0f} | {GFLOP} | {speed * GFLOP / 1e3:.0f} "
        f"| {run['val']['next']:.2f} | {run['val']['joint']:.2f} |\n")


GONE = ("1.593 1.680"  # of two teachers, whose runs went with them: commit 52cd0e9 has both
        " 1.165 1.147 2.470 2.472 0.920 0.916 2.279 2.269 2.679 3.931 2.690 3.947"  # trunks, made twice
        " 2.42 2.73"  # of one seed, where the table has a mean
        " 2.109 1.903 1.946 1.805 1.828 2.70 2.66 0.68 0.51 0.84"  # by files that went
        " 1.62 1.27 1.53 1.35 1.13 1.00 0.79 1.82 2.04")  # the Xeon's, in commit 5176038


def tables_of(text):
    """The Markdown tables of a document, each with its lines."""
    return re.findall(r"(?:^\|.*\n)+", text, flags=re.M)


def strangers(text, tables):
    """The decimals in the prose of a document that round no number of the tables."""
    numbers = [abs(float(x)) for x in re.findall(r"-?\d+(?:\.\d+)?", tables.replace("..", " "))]
    no_prose = (r"```.*?```|`[^`]*`|\]\(\S*\)|\d{4}\.\d{5}|^    .*?$|^\|.*?$|"
                r"(?:arXiv|torch|transformers)\s[\d.]+")
    prose = re.sub(no_prose, " ", text, flags=re.S | re.M).replace("..", " ")
    found = re.findall(r"(?<![\w.-])\d+\.\d+(?![\w.])", prose)
    return [x for x in found if all(abs(float(x) - y) > 0.5000001 * 10.0 ** -len(x.split(".")[1]) for y in numbers)]


def test_every_figure_of_the_results_is_one_that_the_runs_give():
    """A table with decimals is one of results/laptop, or of the runs in results/h100, word for word. A decimal in the prose of a section
    of docs/results.md rounds a number of that section's tables, and one in the README a number of any,
    but for its first table: a row of it has the numbers of one row. Whole numbers are not checked."""
    made = {path.stem: path.read_text(encoding="utf-8") for path in (ROOT / "results" / "laptop").glob("*.md")}
    made["h100"] = "\n".join(of_the_gpu())
    made |= {path.stem: path.read_text("utf-8") for path in (ROOT / "results/before_after").glob("*.md")}
    document = (ROOT / "docs" / "results.md").read_text(encoding="utf-8")
    for table in tables_of(document):
        assert table in "".join(made.values()) or not re.search(r"\d\.\d", table), table
    for section in re.split(r"^(?=##)", document, flags=re.M):
        assert not strangers(section, "".join([*tables_of(section), GONE])), section[:60]
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert not strangers(readme, "".join(made.values()))
    for row in tables_of(readme)[0].splitlines()[2:]:
        cells = row.replace("|", " ").strip()
        assert any(not strangers(cells, own) for own in made["speedups"].splitlines()), row
    assert strangers("It is 0.123 or 4.57.", "| 0.12 | 4.565 |") == ["0.123"]  # this test can fail


def test_a_bench_of_two_heads_gives_each_its_own_row():
    a, b = (SCALES["laptop"].training((1,), n_future=4, rank=r)[0] for r in (1, 8))
    bench = reproduce.Bench((a, b), {})
    rows = [{"mode": mode, "temperature": 1.0, "speedup": x, "tokens_per_second": 100.0} for mode, x in
            (("plain", 1.0), ("speculative", 2.0), (f"speculative, {b.name}", 3.0))]
    column, found = reproduce.of_bench("speedup", 1.0), {bench.name: {"bench": {"rows": rows}}}
    assert [column(found, bench.of(own), None, ()) for own in (a, b)] == [2.0, 3.0]
