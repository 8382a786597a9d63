"""The scripts from text to bench, and what the README says of them."""

import ast
import http.server
import json
import re
import runpy
import shutil
import subprocess
import sys
import threading
from functools import partial
from itertools import count
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from helpers import FLAGS, TOY, call, run
from test_cp_head import tiny_model

import common
import prepare_tinystories as prep
import sample as sampler
import train as trainer
from decode import Greedy, generate, generate_oracle, generate_plain
from decoders.coupled import Coupled
from model import ROOT
from tokenizer import EOT, load_tokenizer

FOLDERS = ("heads", "decoders", "pretrained", "experiments", "course")
TEXT = 'Once upon a time, Lily saw 12 red balls.\n"Look!" she said. They didn\'t stop.\n\n  The end_of it all.\n'


HEAD_ONLY = ["--batch_size", 4, "--max_iters", 8, "--eval_interval", 4, "--eval_windows", 4, "--log_interval", 2,
             "--device", "cpu", "--init_from"]  # a checkpoint's trunk keeps its own shape


@pytest.fixture(scope="module")
def trained(toy, tmp_path_factory):
    """A folder with toy data and a model that train.py trained on it for a few steps."""
    return shutil.copytree(toy, tmp_path_factory.mktemp("run"), dirs_exist_ok=True)


# -----------------------------------------------------------------------------
# train.py


def test_train_logs_and_checkpoints(trained):
    """The log is JSON lines; the checkpoint is plain tensors and plain Python."""
    log = [json.loads(line) for line in (trained / "out/toy/log.jsonl").read_text().splitlines()]
    assert [line["iter"] for line in log if "val" in line] == [4, 8, 12]
    assert [line["iter"] for line in log if "val" not in line] == [2, 4, 6, 8, 10, 12]
    ckpt = torch.load(trained / "out/toy/ckpt.pt", weights_only=True)
    assert ckpt["iter_num"] == 12 and ckpt["train_config"]["rank"] == 2
    assert ckpt["meta"]["tokenizer"]["tokens"]
    assert {p.name for p in (trained / "out/toy").iterdir()} - {".lock"} == {"ckpt.pt", "log.jsonl"}


def test_same_seed_trains_the_same_model(trained):
    out = run(trained, "train.py", *TOY.split(), "--out_dir", "again")
    assert "bits per byte" in out and "component usage" in out and "wrote again" in out
    a, b = (torch.load(trained / path / "ckpt.pt", weights_only=True)["model"] for path in ("out/toy", "again"))
    assert all(torch.equal(a[name], b[name]) for name in a)


def test_max_seconds_ends_a_run_and_its_learning_rate_decay(trained, monkeypatch):
    """The cosine reaches its end with the time, long before max_iters. By a clock on which every
    step takes 1/8 s, and which begins after the first."""
    monkeypatch.setattr(trainer, "time", SimpleNamespace(monotonic=count(step=0.125).__next__))
    run(trained, "train.py", *TOY.split(), "--max_iters", 100, "--max_seconds", 2,
        "--out_dir", "timed", "--eval_interval", 10**6, "--log_interval", 1)
    log = [json.loads(line) for line in (trained / "timed/log.jsonl").read_text().splitlines()]
    cfg = trainer.PRESETS["toy"]
    assert (log[-1]["seconds"], log[-1]["iter"]) == (2, 17)
    assert log[-2]["lr"] < 1.5 * cfg.min_lr + 0.1 * cfg.lr < max(line["lr"] for line in log[:-1])


def test_heads_on_a_frozen_trunk_leave_it_as_it_was(trained):
    """--init_from a checkpoint in nanoGPT's own layout with --freeze_trunk: the trunk's tensors
    stay bit for bit, the head's change."""
    run(trained, "train.py", "--preset", "toy", "--n_future", 1, *FLAGS, "--out_dir", "plain")
    ckpt = torch.load(trained / "plain/ckpt.pt", weights_only=True)
    nano = ("n_layer", "n_head", "n_embd", "block_size", "bias", "vocab_size", "dropout")
    torch.save({"model": {"_orig_mod." + name: tensor for name, tensor in ckpt["model"].items()},
                "model_args": {name: ckpt["model_args"][name] for name in nano}}, trained / "plain/ckpt.pt")
    run(trained, "train.py", "--preset", "toy", *HEAD_ONLY, "plain/ckpt.pt", "--freeze_trunk", "--out_dir", "tuned")
    tuned = torch.load(trained / "tuned/ckpt.pt", weights_only=True)["model"]
    assert all(torch.equal(tensor, tuned[name]) for name, tensor in ckpt["model"].items())
    assert (tuned["head.maps"] - torch.eye(16)).abs().mean() > 1e-3


def test_a_trained_head_is_kept_where_it_fits(trained):
    """--init_from goes on with a trained head; another kind of head, --n_future or --rank begins afresh, and so does
    --fresh_head. The trunk is kept in any case. A chain's greedy text is plain decoding's, and it goes through the
    bench, resume and bfloat16 as any other."""
    flags = ["--preset", "toy", "--head", "cp", "--rank", 2, *HEAD_ONLY, "out/toy/ckpt.pt", "--freeze_trunk",
             "--lr", 1e-4, "--seed", 1]
    for out_dir, kept, more in (("kept", True, []), ("chain", False, ["--head", "chain"]),
                                ("fresh", False, ["--fresh_head", "--dtype", "bfloat16"]),
                                ("longer", False, ["--n_future", 9]), ("wider", False, ["--rank", 3])):
        out = run(trained, "train.py", *flags, *more, "--out_dir", out_dir)
        assert f"the trunk {'and its head' if kept else 'with a fresh head'}" in out, out_dir
    assert "head chain" in run(trained, "train.py", "--resume", "--out_dir", "chain")
    old, kept, chain, fresh, longer, wider = (
        torch.load(trained / out_dir / "ckpt.pt", weights_only=True)["model"]
        for out_dir in ("out/toy", "kept", "chain", "fresh", "longer", "wider"))
    for name, tensor in old.items():
        assert name.startswith("head.") or all(torch.equal(tensor, other[name]) for other in (kept, chain, fresh, wider))
    assert 0 < (old["head.maps"] - kept["head.maps"]).abs().max() < 0.01
    assert all((old["head.maps"] - other["head.maps"]).abs().max() > 0.02 for other in (chain, fresh))
    assert len(longer["head.maps"]) == 9 and wider["head.maps"].size(1) == 3 and chain["head.out"].any()
    run(trained, "train.py", "--resume", "--out_dir", "chain", "--max_iters", 10)
    greedy = [run(trained, "sample.py", "--out_dir", "chain", "--temperature", 0, "--max_new_tokens", 60,
                  "--dtype", "float64", "--mode", mode) for mode in ("speculative", "oracle")]
    assert greedy[0].splitlines()[:-1] == greedy[1].splitlines()[:-1]  # but for the line of statistics
    out = run(trained, "bench_speculative.py", "--rounds", 5, "--max_new_tokens", 8, "--out_dir", "chain")
    assert json.loads(out.splitlines()[-1])["card"]["head"] == "chain"


def test_plain_model_samples_and_has_nothing_to_bench(trained):
    run(trained, "train.py", "--preset", "toy", "--n_future", 1, *FLAGS, "--out_dir", "plain1", "--grad_accum", 2,
        "--max_seconds", 60)
    assert "plain: " in run(trained, "sample.py", "--out_dir", "plain1", "--max_new_tokens", 5)
    code, message = call("bench", ["--out_dir", str(trained / "plain1")])
    assert code == 1 and "n_future = 1" in message


# -----------------------------------------------------------------------------
# sample.py


def test_samples_in_all_modes(trained):
    """All decoders write the same greedy text; a seed repeats a sample; one token is no
    step."""
    texts = {}
    for mode in ("speculative", "plain", "oracle", "captured", "draft_tree", "batched", "coupled"):
        out = run(trained, "sample.py", "--mode", mode, "--temperature", 0, "--prompt", "Lily went",
                  "--max_new_tokens", 40, "--dtype", "float64")
        texts[mode], summary = out.rsplit("\n\n", 1)
        assert re.match(rf"{mode}: \d+ tokens, \d\.\d\d per step", summary)
    assert len(set(texts.values())) == 1 and texts["plain"].startswith("Lily went")
    warped = ["--num_samples", 2, "--top_k", 20, "--top_p", 0.9, "--temperature", 0.8, "--seed", 0,
              "--max_new_tokens", 30]
    first, second = (run(trained, "sample.py", *warped).rsplit("\n\n", 1)[0] for _ in range(2))
    assert first == second
    assert "speculative: 1 token, " in run(trained, "sample.py", "--max_new_tokens", 1)


def test_threads_are_those_of_a_trial_or_of_the_flag(toy, monkeypatch):
    """A short text, or one core, needs no trial."""
    monkeypatch.setattr(torch, "get_num_threads", lambda: 4)
    seen = []
    monkeypatch.setattr(torch, "set_num_threads", seen.append)
    run(toy, "sample", "--max_new_tokens", 40, "--threads", 3)
    assert seen == [3]
    run(toy, "sample", "--max_new_tokens", 4)
    assert seen == [3]
    run(toy, "sample", "--max_new_tokens", 40)
    assert seen[1:-1] == [1, 2, 4] and seen[-1] in (1, 2, 4)


def test_the_mode_coupled_writes_what_any_decoder_would(trained, monkeypatch):
    """At temperature 1, in float64: two samples, which differ, and each is the text of plain decoding and of the oracle
    with the same noise. Without it the three decoders' texts differ."""
    flags = ["--dtype", "float64", "--num_samples", 2, "--max_new_tokens", 25, "--seed", 5]
    monkeypatch.chdir(trained)
    model, enc, _ = sampler.load("out/toy", "cpu", "float64")
    generator = torch.Generator().manual_seed(5)
    seeds = [torch.randint(2**32, (), generator=generator).item() for _ in range(2)]
    written = run(trained, "sample.py", *flags, "--mode", "coupled").rsplit("\n\n", 1)[0]
    for decoder in (generate, generate_plain, generate_oracle):
        ids = [[*decoder(model, enc.prompt_ids(""), 25, sampler=Coupled(seed), stop_token=enc.eot_token)]
               for seed in seeds]
        ids = [[x for x in text if x != enc.eot_token] for text in ids]
        assert ids[0] != ids[1] and "\n\n".join(map(enc.decode, ids)).strip() == written.strip()
    free = [run(trained, "sample.py", *flags, "--mode", mode).rsplit("\n\n", 1)[0]
            for mode in ("speculative", "plain", "oracle")]
    assert free[0] != free[1] == free[2] != written


def test_help_without_docstrings():
    """As python -OO has it."""
    assert "None" not in common.ArgumentParser(None).format_help()


def test_show_drafts_marks_every_token_by_its_origin(trained, monkeypatch, capsys):
    """The text is the same without the marks; colours, on a terminal, are ANSI escapes, and none
    with NO_COLOR."""
    def sample(*args):
        out = run(trained, "sample.py", "--seed", 3, "--max_new_tokens", 30, *args)
        return out.rsplit("\n\n", 1)[0]  # without the summary

    legend, marked = sample("--show_drafts").split("\n\n", 1)
    assert "draft 7 accepted [7]" in legend and "the drafts [b]" in legend and "\x1b[0m" not in legend + marked
    assert re.sub(r"\[[1-7cbp]\]", "", marked) == sample() and len(re.findall(r"\[[1-7cbp]\]", marked)) == 30
    monkeypatch.chdir(trained)
    monkeypatch.setattr(sys, "argv", "sample.py --show_drafts --max_new_tokens 30 --seed 3".split())
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    for variable, value, n_coloured in (  # the tokens, and the legend's ten names
            ("NO_COLOR", "", 30 + 10), ("NO_COLOR", "1", 0), ("NO_COLOR", "", 40), ("TERM", "dumb", 0)):
        monkeypatch.setenv(variable, value)
        sampler.main()
        assert capsys.readouterr().out.count("\x1b[0m") == n_coloured


def test_loaded_weights_are_the_checkpoints_stored_by_columns(trained):
    """On a CPU in float32: the same numbers in the order that is fast on few rows, the tied
    embedding still tied."""
    for dtype, by_columns in (("float32", True), ("float64", False)):
        model, _, ckpt = sampler.load(trained / "out/toy", "cpu", dtype)
        for name, tensor in ckpt["model"].items():
            assert torch.equal(model.state_dict()[name], tensor.to(getattr(torch, dtype))), name
        assert model.transformer.wte.weight is model.lm_head.weight
        linears = [module for module in model.modules() if isinstance(module, torch.nn.Linear)]
        assert all((linear.weight.stride(0) == 1) == by_columns for linear in linears)


def test_loading_and_decoding_change_no_setting_of_the_process(trained):
    """Whoever imports sample.py keeps PyTorch's own kernels; the fast ones are on within the block
    alone."""
    before = torch.backends.mkldnn.enabled
    model, _, _ = sampler.load(trained / "out/toy", "cpu")
    assert torch.backends.mkldnn.enabled == before
    with pytest.raises(KeyError), sampler.fast_kernels(model):
        assert not torch.backends.mkldnn.enabled
        raise KeyError
    assert torch.backends.mkldnn.enabled == before
    with sampler.fast_kernels(tiny_model()):  # float64: nothing to gain
        assert torch.backends.mkldnn.enabled == before


def test_sampling_needs_no_network_library(trained):
    """sample.py runs where requests is not to be had."""
    code = "import sys; sys.modules['requests'] = None; import sample; sample.main()"
    result = subprocess.run([sys.executable, "-c", code, "--max_new_tokens", "3"], cwd=trained, capture_output=True,
                            text=True, env={"PYTHONPATH": str(ROOT)})
    assert result.returncode == 0 and "speculative: " in result.stdout, result.stderr


# -----------------------------------------------------------------------------
# bench_speculative.py and the download


def test_bench_ends_with_one_json_object(trained):
    out = run(trained, "bench_speculative.py", "--rounds", 5, "--max_new_tokens", 10)
    result = json.loads(out.splitlines()[-1])
    assert {"device", "dtype", "threads", "n_future", "rank", "target"} <= set(result["card"])
    assert [(row["mode"], row["temperature"]) for row in result["rows"]] == [
        ("plain", 0.0), ("speculative", 0.0), ("plain", 1.0), ("speculative", 1.0)]
    for row in result["rows"]:
        assert row["tokens_per_second"] > 0 and row["speedup"] > 0 and 1 <= row["tokens_per_step"] <= 8
    fast = result["rows"][1]
    assert len(fast["acceptance"]) == 7 and len(fast["histogram"]) == 9 and fast["bound"] > 0
    # 8 prompts, 5 rounds, 10 tokens each, the first of which the prefill yields
    assert sum(k * h for k, h in enumerate(fast["histogram"])) == 8 * 5 * 9


def test_batches_are_measured_and_end_with_one_json_object(trained):
    lines = run(trained, "decoders.batched", "--batch_sizes", 1, 10, "--max_new_tokens", 8, "--rounds", 5,
                "--device", "cpu", "--dtype", "float64").splitlines()
    rows = json.loads(lines[-1])["rows"]
    assert [(row["batch_size"], row["temperature"]) for row in rows] == [(1, 0.0), (10, 0.0), (1, 1.0), (10, 1.0)]
    assert [line.split()[:2] for line in lines[2:6]] == [["1", "0.0"], ["10", "0.0"], ["1", "1.0"], ["10", "1.0"]]
    assert all(row["plain"] > 0 and row["speedup"] > 0 and 1 <= row["tokens_per_step"] <= 8 for row in rows)
    assert rows[0]["same_texts"] and rows[1]["same_texts"]


def test_marginal_target_and_text_files_end_to_end(trained):
    """The paper's own target on a user's folder with a foreign file in it; the bench times the LM
    head apart."""
    folder = trained / "texts"
    folder.mkdir()
    (folder / "a.txt").write_text(EOT.join([TEXT] * 30), encoding="utf-8")
    (folder / "b.bin").write_bytes(b"\xff\xfe\x00")
    out = run(trained, "prepare_tinystories.py", "--input", folder, "--vocab_size", 280)
    assert "skipped 1 files" in out and "30 documents" not in out and "280 ids" in out
    run(trained, "train.py", *FLAGS, "--target", "marginal", "--head", "full", "--out_dir", "out/text")
    out = run(trained, "bench_speculative.py", "--rounds", 5, "--max_new_tokens", 8, "--out_dir", "out/text")
    rows = json.loads(out.splitlines()[-1])["rows"]
    assert [row["mode"] for row in rows] == ["plain", "speculative", "lm_head_only"] * 2


def test_a_tilde_in_a_flag_is_the_home_folder(tmp_path, monkeypatch):
    """--data_dir=~/x, which no shell expands."""
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "cwd").mkdir()
    out = run(tmp_path / "cwd", "prepare", "--toy", "--stories", "5", "--data_dir=~/x")
    assert "entropy of the grammar" in out
    assert (tmp_path / "x/meta.json").exists() and not list((tmp_path / "cwd").iterdir())


def test_tinystories_is_downloaded_and_prepared(tmp_path, monkeypatch):
    """Without flags the script fetches both files of the data set, here from a server on this
    machine: train.txt becomes train.bin and valid.txt val.bin; --max_mb takes the first stories."""
    for split, n in (("train", 8000), ("valid", 40)):  # 1.4 MB
        text = f"\n{EOT}\n".join(f"Story {i} of {split}." + 20 * " Go on." for i in range(n))
        (tmp_path / f"TinyStoriesV2-GPT4-{split}.txt").write_text(text)
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=tmp_path))
    threading.Thread(target=server.serve_forever, args=[0.01], daemon=True).start()  # ends sooner
    monkeypatch.setattr(prep, "TINYSTORIES", f"http://127.0.0.1:{server.server_port}/")
    monkeypatch.setenv("no_proxy", "*")
    for args, n_train in (([], 8000), (["--max_mb", "1"], None)):
        monkeypatch.setattr(sys, "argv", ["prepare_tinystories.py", "--data_dir", str(tmp_path / "data"), *args])
        prep.main()
        meta = json.loads((tmp_path / "data/meta.json").read_text())
        n_train = n_train or (tmp_path / "TinyStoriesV2-GPT4-train.txt").read_bytes()[:10**6].count(EOT.encode())
        # the last of the 40 has no mark after it; of the first megabyte, what comes after the last
        # mark is left out
        n_val = 39 if args else 40
        assert [meta["splits"][split]["documents"] for split in ("train", "val")] == [n_train, n_val]
    server.shutdown()
    enc = load_tokenizer(meta["tokenizer"])
    ids = np.fromfile(tmp_path / "data/val.bin", dtype=np.uint16)
    stories = [f"Story {i} of valid." + 20 * " Go on." for i in range(2)]
    assert enc.decode(ids).startswith(EOT.join([*stories, ""]))


class Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *args):
        pass


# -----------------------------------------------------------------------------
# the documents


def documents():
    return {path.name: path.read_text(encoding="utf-8") for path in [ROOT / "README.md", *(ROOT / "docs").glob("*.md")]}


@pytest.mark.parametrize("script", ["prepare_tinystories", "train", "sample", "bench_speculative", "decoders.batched",
                                    "pretrained.nanogpt", "pretrained.train",
                                    "pretrained.generate", "experiments.bench_training", "experiments.plots",
                                    "experiments.peers", "experiments.reproduce"])
def test_help_knows_every_flag_that_the_documents_use(script, monkeypatch, capsys):
    command = f"-m {script}" if "." in script else f"{script}.py"
    commands = re.findall(rf"python {re.escape(command)}\b([^\n&`|]*)", "\n".join(documents().values()))
    flags = set(re.findall(r"--\w+", " ".join(commands)))
    monkeypatch.setattr(sys, "argv", [f"{script}.py", "--help"])
    with pytest.raises(SystemExit) as end:  # the file as Python runs it: importing torch takes seconds
        runpy.run_path(str(ROOT / f"{script.replace('.', '/')}.py"), run_name="__main__")
    assert end.value.code == 0 and flags and flags <= set(re.findall(r"--\w+", capsys.readouterr().out))


def test_what_the_documents_name_exists():
    """Every `function` of `file.py` in a document is in that file, and every file and link leads
    somewhere. Guards documents that drift away from the code; their text may say what it wants."""
    names = {"heads/yours.py": {"Head"}}  # a reader's own
    for path in [*ROOT.glob("*.py"), *(path for folder in FOLDERS for path in (ROOT / folder).glob("*.py"))]:
        tree = ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        found = {node.name for node in tree if isinstance(node, (ast.FunctionDef, ast.ClassDef))}
        names[path.relative_to(ROOT).as_posix()] = found
    everything = set().union(*names.values()) | {"PRESETS", "TrainConfig"}
    for document, text in documents().items():
        for name, file in re.findall(r"`([\w.]+)` (?:in|of) `([\w/]+\.py)`", text):
            assert name.split(".")[-1] in names[file] | {"PRESETS"}, (document, name, file)
        for name in re.findall(r"`([\w.]+)\(\)`", text):
            assert name.split(".")[-1] in everything, (document, name)
        for file in re.findall(r"`([\w/]+\.py)`", text):
            assert file in names or (ROOT / file).exists() or (ROOT / "tests" / file).exists(), (document, file)
        for link in re.findall(r"\]\(([^)#]+)[^)]*\)", text):
            folder = ROOT if document == "README.md" else ROOT / "docs"
            assert link.startswith("http") or (folder / link).exists(), (document, link)


def test_the_snippets_of_the_readme_run(trained, monkeypatch, capsys):
    """Each block of Python that imports something, pasted in order; what its comments promise comes
    out. In float64, in which no two logits are equal up to rounding."""
    monkeypatch.chdir(trained)
    monkeypatch.setattr(sampler, "load", partial(sampler.load, dtype="float64"))
    blocks = re.findall(r"```python\n((?:import|from) .*?)```", documents()["README.md"], re.S)
    names = {}
    for block in blocks:
        exec(block, names)
    assert len(blocks) == 2
    assert torch.equal(names["product"], torch.full((2, 2), 0.25)) and torch.equal(names["mixture"], torch.eye(2) / 2)
    assert names["tokens"] == list(generate_plain(names["model"], names["prompt"], 50, sampler=Greedy()))


# -----------------------------------------------------------------------------
# flags arrive


def test_every_flag_of_the_sampler_reaches_it(toy, monkeypatch):
    seen, make = [], sampler.make_sampler
    monkeypatch.setattr(sampler, "make_sampler", lambda *args: seen.append(args) or make(*args))
    run(toy, "sample.py", "--temperature", 0.7, "--top_k", 5, "--top_p", 0.9, "--max_new_tokens", 4)
    assert seen[-1][:3] == (0.7, 5, 0.9)


def test_tokens_per_step_leave_out_the_prefill(toy):
    """Nine plain tokens are one of the prefill, and those of eight steps."""
    out = run(toy, "sample.py", "--mode", "plain", "--max_new_tokens", 9, "--seed", 3)
    assert "plain: 9 tokens, 1.00 per step" in out


def test_a_trunk_that_is_gone_on_with_gets_this_runs_dropout(toy, tmp_path):
    run(toy, "train.py", *TOY.split(), "--init_from", "out/toy/ckpt.pt", "--dropout", 0.3,
        "--out_dir", tmp_path)
    assert torch.load(tmp_path / "ckpt.pt", weights_only=True)["model_args"]["dropout"] == 0.3
