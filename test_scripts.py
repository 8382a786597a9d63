"""The tokenizer, the toy's grammar, and the scripts from text to bench, run as a user runs them."""

import copy
import hashlib
import http.server
import io
import json
import multiprocessing
import os
import random
import re
import signal
import subprocess
import sys
import threading
from collections import defaultdict
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import bench_training
import decode
import prepare_tinystories as prep
import sample as sampler
import train as trainer
from bench_speculative import Bench, check_same_law, parts_timed, print_table, to_transformers
from decode import Stats
from model import GPT
from test_cp_head import tiny_model

HERE = Path(__file__).parent
TEXT = 'Once upon a time, Lily saw 12 red balls.\n"Look!" she said. They didn\'t stop.\n\n  The end_of it all.\n'


def random_text(rng, length):
    """Any Unicode but surrogates, with plenty of spaces, newlines and letters."""
    planes = [(32, 127), (0x20, 0x2FF), (0x300, 0xD7FF), (0xE000, 0xFFFF), (0x10000, 0x10FFFF)]
    return "".join(rng.choice(" \n\t\r") if rng.random() < 0.2 else chr(rng.randint(*rng.choice(planes)))
                   for _ in range(length))


# -----------------------------------------------------------------------------
# tokenizer


@pytest.mark.parametrize("vocab_size", [257, 300, 2048])
def test_any_text_round_trips(vocab_size):
    """encode -> decode is the identity on any Unicode text, the words <|endoftext|> included, and never emits the
    <|endoftext|> token; the pattern that cuts the pieces loses no character."""
    enc = prep.load_tokenizer(prep.build_tokenizer([TEXT], vocab_size))
    rng = random.Random(0)
    texts = ["", TEXT, "<|endoftext|>", f"a{prep.EOT}b", "\u0301x\u200d\u3000\u2028_"]
    for text in texts + [random_text(rng, 60) for _ in range(300)]:
        ids = enc.encode_ordinary(text)
        assert enc.decode(ids) == text and enc.eot_token not in ids
        assert "".join(re.findall(prep.PATTERN, text)) == text


def test_any_ids_decode():
    """A model may emit any ids: they decode to text, streamed or at once, and a split character is held back."""
    enc = prep.load_tokenizer(prep.build_tokenizer([TEXT], 300))
    rng = random.Random(0)
    for _ in range(200):
        ids = [rng.randrange(enc.n_vocab) for _ in range(20)]
        stream = prep.TextStream(enc)
        assert "".join(map(stream.push, ids)) + stream.end() == enc.decode(ids)
    stream = prep.TextStream(enc)
    assert [stream.push(b) for b in "é€".encode()] == ["", "é", "", "", "€"] and stream.end() == ""


def test_tokenizer_survives_json_and_is_at_most_as_large_as_asked():
    """The description is plain JSON; ids are the 256 bytes, whole pieces by frequency, then <|endoftext|>."""
    text = TEXT * 3 + " the" * 10
    description = prep.build_tokenizer([text], 270)
    enc = prep.load_tokenizer(json.loads(json.dumps(description)))
    assert enc.n_vocab == 270 and enc.eot_token == 269 and enc.decode_single_token_bytes(65) == b"A"
    assert enc.encode_ordinary(" the the") == [256, 256]
    small = prep.load_tokenizer(prep.build_tokenizer(["ab ab"], 2048))
    assert small.n_vocab == 256 + 2 + 1  # a corpus of two pieces has no more


def test_pieces_of_any_script_are_used():
    """What Python's regex counts as a piece, tiktoken's finds again: every piece of a corpus in several scripts is one
    id. Guards \\w, which the two read differently (combining marks, superscripts)."""
    text = "हिन्दी में पढ़ना शुरू। العَرَبِيَّة 日本語 x² naïve — “quoted” it's 42 a_b c\u0301a"
    enc = prep.load_tokenizer(prep.build_tokenizer([text], 2048))
    assert [enc.decode([i]) for i in enc.encode_ordinary(text)] == re.findall(prep.PATTERN, text)


def test_a_text_without_spaces_does_not_become_one_token():
    description = prep.build_tokenizer(["acgt" * 5000 + " word word"], 2048)
    assert max(map(len, description["tokens"])) <= 32 and " word" in description["tokens"]
    assert len(prep.load_tokenizer(description).encode_ordinary("acgt" * 5000)) > 600


def test_vocab_size_257_is_bytes():
    enc = prep.load_tokenizer(prep.build_tokenizer([TEXT], 257))
    assert enc.encode_ordinary("né") == list("né".encode())


# -----------------------------------------------------------------------------
# the toy's grammar


def test_toy_entropy_is_the_mean_surprisal():
    """The entropy by the chain rule equals the mean of -log2 P(story) over 20,000 stories (false alarm: the tolerance
    is 6 standard errors), and it is at least 0.8 bits per token."""
    rng = random.Random(0)
    stories, bits = zip(*(prep.toy_story(rng) for _ in range(20_000)))
    assert abs(np.mean(bits) - prep.toy_entropy()) < 6 * np.std(bits) / len(bits) ** 0.5
    enc = prep.load_tokenizer(prep.build_tokenizer(stories, 2048))
    tokens = sum(len(ids) + 1 for ids in enc.encode_ordinary_batch(list(stories)))
    assert prep.toy_entropy() * len(stories) / tokens > 0.8


def test_toy_stories_spell_out_their_choices():
    """The same text always comes from the same choices; else the text's entropy would be below the choices'."""
    rng, seen = random.Random(1), defaultdict(set)
    for template in prep.EVENTS:  # single sentences repeat often enough to show a collision
        slots = re.findall(r"{([A-Z]+)}", template)
        for _ in range(3000):
            choice = tuple(rng.choice(prep.SLOTS[slot]) for slot in slots)
            text = template.format(name="Lily", he="she", his="her", thing="ball", look="red",
                                   spot="under the old tree", **dict(zip(slots, choice)))
            seen[text].add((template, choice))
    assert all(len(choices) == 1 for choices in seen.values())


def test_toy_stories_agree_over_distance():
    """The name's pronoun, the place's spot and the object come back in every story."""
    rng = random.Random(2)
    for _ in range(200):
        story, _ = prep.toy_story(rng)
        name, place = re.match(r"(\w+) went to the (\w+)", story).groups()
        he, his = dict((n, (h, s)) for n, h, s in prep.PEOPLE)[name]
        wrong = {"she", "her"} if he == "he" else {"he", "his"}
        assert not wrong & set(re.sub(r"her mother's", "", story).lower().replace(".", "").split())
        assert dict(prep.PLACES)[place] in story


# -----------------------------------------------------------------------------
# splitting, training


def test_bench_has_eight_prompts_whatever_the_corpus():
    assert len(prep.bench_prompts(["A story. " * 9] * 100)) == 8
    for n in (1, 3, 8):
        prompts = prep.bench_prompts([f"{i} " + "=" * 500 for i in range(n)])
        assert len(prompts) == 8 and all(0 < len(p) <= 24 for p in prompts)


def test_split_is_by_document_and_by_seed():
    def split(documents, seed):
        return [list(read()) for read in prep.split_documents(lambda: iter(documents), seed)]

    documents = [f"story {i}" for i in range(100)]
    train, val = split(documents, 0)
    assert sorted(train + val) == sorted(documents) and len(val) == 5
    assert split(documents, 0) == [train, val] != split(documents, 1)
    train, val = split(["line\n" * 100], 0)
    assert train[0] + val[0] == "line\n" * 100 and len(val[0]) == 20  # 5 %, from a line's end on
    train, val = split(["x" * 990 + "\nlast line"], 0)
    assert len(val[0]) == 50  # no line ends near the place of the cut


def test_documents_are_read_in_parts_as_they_are(tmp_path, monkeypatch):
    """Whatever the size of the parts that a file is read in: documents come out whole, newlines stay as they are, a
    byte order mark goes, and empty documents are none."""
    text = "\ufeffone\r\nüber" + prep.EOT + "two\n\n 2\r" + prep.EOT + "\n" + prep.EOT + "x" + prep.EOT + "y\nthree"
    (tmp_path / "a.txt").write_bytes(text.encode())
    chunks = prep.chunks
    for size in (2**22, 12, 1):
        monkeypatch.setattr(prep, "chunks", lambda path: chunks(path, size))
        assert "".join(prep.chunks(tmp_path / "a.txt")) == text[1:]
        assert list(prep.documents([tmp_path / "a.txt"])) == ["one\r\nüber", "two\n\n 2", "x", "y\nthree"]
    assert len(list(prep.chunks(tmp_path / "a.txt"))) > 4


def test_long_documents_are_encoded_in_parts(monkeypatch):
    """Cut at a line's end where there is one, nothing lost, one <|endoftext|> behind each document."""
    monkeypatch.setattr(prep, "SEGMENT", 10)
    texts = ["line one\nline two\nx" * 3, "y" * 25, "short"]
    parts = list(prep.segments(texts))
    assert max(len(text) for text, _ in parts) <= 10 and sum(ends for _, ends in parts) == 3
    assert "".join(text + "|" * ends for text, ends in parts) == "".join(text + "|" for text in texts)
    enc = prep.load_tokenizer(prep.build_tokenizer(texts, 257))
    file = io.BytesIO()
    counts = prep.encode(enc, texts, file, "test")
    ids = np.frombuffer(file.getvalue(), dtype=np.uint16)
    assert "".join(enc.decode([i]) for i in ids) == prep.EOT.join(texts) + prep.EOT
    assert counts["sha256"] == hashlib.sha256(file.getvalue()).hexdigest()
    assert (counts["documents"], counts["tokens"], counts["bytes"]) == (3, len(ids), sum(map(len, texts)))
    batches = list(prep.batches(parts, size=20))
    assert sum(batches, []) == parts and all(20 <= sum(len(text) for text, _ in b) < 30 for b in batches[:-1])


def test_first_megabytes_end_with_a_whole_story(tmp_path):
    """What stands behind the last <|endoftext|> is half a story, or half a character."""
    for text in (f"one{prep.EOT}two{prep.EOT}thr".encode() + b"\xc3", f"one{prep.EOT}two{prep.EOT}".encode()):
        (tmp_path / "a").write_bytes(text)
        prep.drop_cut_story(tmp_path / "a")
        assert list(prep.documents([tmp_path / "a"])) == ["one", "two"]


def windows(tmp_path, n_tokens, **config):
    np.arange(n_tokens, dtype=np.uint16).tofile(tmp_path / "x.bin")
    cfg = trainer.TrainConfig(block_size=6, n_future=3, **config)
    return trainer.Windows(tmp_path / "x.bin", cfg, torch.device("cpu"))


def test_every_position_has_its_full_window(tmp_path):
    """targets[b, t, s - 1] is the token s places after idx[b, t], for every t, the last ones included."""
    data = windows(tmp_path, 50, batch_size=32)
    idx, targets = next(data.random(torch.Generator().manual_seed(0)))
    assert torch.equal(targets, idx.unsqueeze(-1) + torch.arange(1, 4)) and idx.shape == (32, 6)
    assert data.n_starts == 42 and windows(tmp_path, 9).at([0])[1][0, -1].tolist() == [6, 7, 8]
    with pytest.raises(SystemExit, match="holds 8 tokens"):
        windows(tmp_path, 8)


def test_validation_windows_do_not_depend_on_the_batch_size(tmp_path):
    once, twice = (torch.cat([idx for idx, _ in windows(tmp_path, 500, batch_size=size).fixed(10)]) for size in (10, 3))
    assert torch.equal(once, twice) and once[0, 0] == 0 and once[-1, -1] == 496


def test_learning_rate_rises_then_falls_to_its_minimum():
    cfg = trainer.TrainConfig(lr=1.0, min_lr=0.1, warmup=0.1)
    rates = [trainer.learning_rate(i / 100, cfg) for i in range(101)]
    assert rates[10] == max(rates) == pytest.approx(1.0) and rates[100] == pytest.approx(0.1) and 0 < rates[0] < 0.05
    assert rates[:11] == sorted(rates[:11]) and rates[10:] == sorted(rates[10:], reverse=True)


def test_optimizer_decays_the_trunks_matrices_only():
    """Norms, biases and the head, whose maps start at the identity and not at 0, are not decayed."""
    cfg = trainer.TrainConfig(n_layer=1, n_head=2, n_embd=8, block_size=4, bias=True)
    model = trainer.build_model(cfg, {"vocab_size": 5})
    decayed, rest = (group["params"] for group in trainer.build_optimizer(model, cfg, torch.device("cpu")).param_groups)
    names = {id(p): name for name, p in model.named_parameters()}
    assert {names[id(p)].rsplit(".", 2)[-2] for p in decayed} == {"wte", "wpe", "c_attn", "c_proj", "c_fc"}
    assert {names[id(p)] for p in rest} | {names[id(p)] for p in decayed} == set(names.values())


def test_accumulated_gradients_are_those_of_one_large_batch(monkeypatch):
    """2 batches of 4 windows step like 1 batch of 8; clipping bounds the norm. Guards a missing 1 / grad_accum."""
    tokens = torch.randint(5, (8, 9), generator=torch.Generator().manual_seed(0))
    idx, targets = tokens[:, :6], tokens[:, 1:].unfold(1, 3, 1)
    grads = {}
    for accum, clip in ((1, 0.0), (2, 0.0), (2, 1e-3)):
        cfg = trainer.TrainConfig(n_layer=1, n_head=2, n_embd=8, block_size=6, n_future=3, grad_accum=accum,
                                  grad_clip=clip, balance_weight=0.0)
        torch.manual_seed(0)
        model = trainer.build_model(cfg, {"vocab_size": 5})
        run = trainer.Run(cfg, {}, model, torch.device("cpu"), torch.float32)
        run.optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
        before = [p.detach().clone() for p in model.parameters()]
        batches = zip(idx.chunk(accum), targets.chunk(accum))
        monkeypatch.setattr(trainer, "learning_rate", lambda progress, cfg: 1.0)
        trainer.optimizer_step(run, model.loss, batches, trainer.nullcontext())
        grads[accum, clip] = torch.cat([(a - b.detach()).flatten() for a, b in zip(before, model.parameters())])
    torch.testing.assert_close(grads[1, 0.0], grads[2, 0.0], rtol=0, atol=1e-6)
    assert grads[2, 1e-3].norm().item() == pytest.approx(1e-3, rel=1e-2) and grads[1, 0.0].norm() > 0.1


def test_tinystories_preset_has_the_papers_size():
    """About 56M parameters, head included."""
    with torch.device("meta"):
        cfg = trainer.PRESETS["tinystories"]
        assert 53e6 < sum(trainer.build_model(cfg, {"vocab_size": 50257}).n_params()) < 59e6


# -----------------------------------------------------------------------------
# the scripts, end to end


def launch(cwd, script, *args):
    """Run a script of this repository in cwd, as a user does."""
    command = [sys.executable, HERE / script, *map(str, args)]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, encoding="utf-8")


def run(cwd, script, *args):
    """The stdout of a script that must succeed."""
    result = launch(cwd, script, *args)
    assert result.returncode == 0, result.stderr
    return result.stdout


SMALL = ["--n_layer", 1, "--n_head", 2, "--n_embd", 16, "--block_size", 32, "--batch_size", 4, "--max_iters", 8,
         "--eval_interval", 4, "--eval_windows", 4, "--log_interval", 2, "--device", "cpu"]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A folder with toy data and a model that train.py trained on it for a few steps."""
    cwd = tmp_path_factory.mktemp("run")
    assert "entropy of the grammar" in run(cwd, "prepare_tinystories.py", "--toy", "--stories", 300)
    out = run(cwd, "train.py", "--preset", "toy", "--rank", 2, *SMALL)
    assert "bits per byte" in out and "component usage" in out and "wrote out" in out
    return cwd


def test_train_logs_and_checkpoints(trained):
    """The log is JSON lines with every loss apart; the checkpoint is plain tensors and plain Python."""
    log = [json.loads(line) for line in (trained / "out/toy/log.jsonl").read_text().splitlines()]
    assert [line["iter"] for line in log if "val" in line] == [4, 8]
    steps = [line for line in log if "val" not in line]
    assert [line["iter"] for line in steps] == [2, 4, 6, 8]
    assert {"loss", "next", "joint", "balance", "offset", "usage", "lr", "tokens_per_second"} <= set(steps[0])
    ckpt = torch.load(trained / "out/toy/ckpt.pt", weights_only=True)
    assert ckpt["iter_num"] == 8 and ckpt["meta"]["tokenizer"]["tokens"] and ckpt["train_config"]["rank"] == 2
    assert sorted(p.name for p in (trained / "out/toy").iterdir()) == ["ckpt.pt", "log.jsonl"]


def test_same_seed_trains_the_same_model(trained):
    run(trained, "train.py", "--preset", "toy", "--rank", 2, *SMALL, "--out_dir", "again")
    a, b = (torch.load(trained / path / "ckpt.pt", weights_only=True)["model"] for path in ("out/toy", "again"))
    assert all(torch.equal(a[name], b[name]) for name in a)


def test_samples_in_three_modes(trained):
    """The three decoders write the same greedy text; a seed repeats a sample."""
    texts = {}
    for mode in ("speculative", "plain", "oracle"):
        out = run(trained, "sample.py", "--mode", mode, "--temperature", 0, "--prompt", "Lily went",
                  "--max_new_tokens", 40, "--dtype", "float64")
        texts[mode], summary = out.rsplit("\n\n", 1)
        assert re.match(rf"{mode}: \d+ tokens, \d\.\d\d per step", summary)
    assert texts["speculative"] == texts["plain"] == texts["oracle"] and texts["plain"].startswith("Lily went")
    warped = ["--num_samples", 2, "--top_k", 20, "--top_p", 0.9, "--temperature", 0.8, "--seed", 0,
              "--max_new_tokens", 30]
    first, second = (run(trained, "sample.py", *warped).rsplit("\n\n", 1)[0] for _ in range(2))
    assert first == second


def test_show_drafts_marks_every_token_by_its_origin(trained, monkeypatch, capsys):
    """The text is the same without the marks; colours, on a terminal, are ANSI escapes, and none with NO_COLOR."""
    def sample(*args):
        out = run(trained, "sample.py", "--seed", 3, "--max_new_tokens", 30, *args)
        return out.rsplit("\n\n", 1)[0]  # without the summary

    legend, marked = sample("--show_drafts").split("\n\n", 1)
    assert "[7]draft 7 accepted" in legend and "[b]bonus" in legend and "\x1b[0m" not in legend + marked
    assert re.sub(r"\[[1-7cbp]\]", "", marked) == sample() and len(re.findall(r"\[[1-7cbp]\]", marked)) == 30

    monkeypatch.chdir(trained)
    monkeypatch.setattr(sys, "argv", "sample.py --show_drafts --max_new_tokens 30 --seed 3".split())
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    for no_color, n_coloured in (("", 30 + 10), ("1", 0)):  # the tokens, and the legend's ten names
        monkeypatch.setenv("NO_COLOR", no_color)
        sampler.main()
        out = capsys.readouterr().out
        assert out.count("\x1b[0m") == n_coloured
    assert re.sub(r"\[[1-7cbp]\]", "", out.split("\n\n", 1)[1]).startswith(sample())


def test_loaded_weights_are_the_checkpoints_stored_by_columns(trained):
    """On a CPU in float32: the same numbers in the order that is fast on few rows, the tied embedding still tied."""
    for dtype, by_columns in (("float32", True), ("float64", False)):
        model, _, ckpt = sampler.load(trained / "out/toy", "cpu", dtype)
        for name, tensor in ckpt["model"].items():
            assert torch.equal(model.state_dict()[name], tensor.to(getattr(torch, dtype))), name
        assert model.transformer.wte.weight is model.lm_head.weight
        linears = [module for module in model.modules() if isinstance(module, torch.nn.Linear)]
        assert all((linear.weight.stride(0) == 1) == by_columns for linear in linears)


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


def test_marginal_target_and_text_files_end_to_end(trained):
    """The paper's own target on a user's folder with a foreign file in it; the bench times the LM head apart."""
    folder = trained / "texts"
    folder.mkdir()
    (folder / "a.txt").write_text(prep.EOT.join([TEXT] * 30), encoding="utf-8")
    (folder / "b.bin").write_bytes(b"\xff\xfe\x00")
    out = run(trained, "prepare_tinystories.py", "--input", folder, "--vocab_size", 280)
    assert "skipped 1 files" in out and "30 documents" not in out and "280 ids" in out
    run(trained, "train.py", *SMALL, "--target", "marginal", "--factors", "full", "--out_dir", "out/text")
    out = run(trained, "bench_speculative.py", "--rounds", 5, "--max_new_tokens", 8, "--out_dir", "out/text")
    rows = json.loads(out.splitlines()[-1])["rows"]
    assert [row["mode"] for row in rows] == ["plain", "speculative", "lm_head_only"] * 2


def test_tinystories_is_downloaded_and_prepared(tmp_path, monkeypatch):
    """Without flags the script fetches both files of the data set, here from a server on this machine: train.txt
    becomes train.bin and valid.txt val.bin; --max_mb takes the first stories."""
    for split, n in (("train", 60_000), ("valid", 40)):
        text = f"\n{prep.EOT}\n".join(f"Story {i} of {split}." for i in range(n))
        (tmp_path / f"TinyStoriesV2-GPT4-{split}.txt").write_text(text)
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=tmp_path))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setattr(prep, "TINYSTORIES", f"http://127.0.0.1:{server.server_port}/")
    monkeypatch.setenv("no_proxy", "*")
    for args, n_train in (([], 60_000), (["--max_mb", "1"], None)):
        monkeypatch.setattr(sys, "argv", ["prepare_tinystories.py", "--data_dir", str(tmp_path / "data"), *args])
        prep.main()
        meta = json.loads((tmp_path / "data/meta.json").read_text())
        n_train = n_train or (tmp_path / "TinyStoriesV2-GPT4-train.txt").read_bytes()[:10**6].count(prep.EOT.encode())
        # the last of the 40 has no mark behind it; of the first megabyte, what stands behind the last mark is left out
        n_val = 39 if args else 40
        assert [meta["splits"][split]["documents"] for split in ("train", "val")] == [n_train, n_val]
    server.shutdown()
    enc = prep.load_tokenizer(meta["tokenizer"])
    ids = np.fromfile(tmp_path / "data/val.bin", dtype=np.uint16)
    assert enc.decode(ids).startswith(f"Story 0 of valid.{prep.EOT}Story 1 of valid.{prep.EOT}")


class Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *args):
        pass


def test_max_seconds_ends_a_run_and_its_learning_rate_decay(trained):
    """The cosine reaches its end with the time, long before max_iters."""
    run(trained, "train.py", "--preset", "toy", *SMALL, "--max_iters", 10**6, "--max_seconds", 2, "--out_dir", "timed",
        "--eval_interval", 10**6, "--log_interval", 1)
    log = [json.loads(line) for line in (trained / "timed/log.jsonl").read_text().splitlines()]
    cfg = trainer.PRESETS["toy"]
    assert 2 <= log[-1]["seconds"] < 20 and log[-1]["iter"] < 10**6
    assert log[-2]["lr"] < 1.5 * cfg.min_lr + 0.1 * cfg.lr < max(line["lr"] for line in log[:-1])


def test_heads_on_a_frozen_trunk_leave_it_as_it_was(trained):
    """--init_from a checkpoint in nanoGPT's own layout with --freeze_trunk: the trunk's tensors stay bit for bit, the
    head's change."""
    run(trained, "train.py", "--preset", "toy", "--n_future", 1, *SMALL, "--out_dir", "plain")
    ckpt = torch.load(trained / "plain/ckpt.pt", weights_only=True)
    nano = ("n_layer", "n_head", "n_embd", "block_size", "bias", "vocab_size", "dropout")
    torch.save({"model": {"_orig_mod." + name: tensor for name, tensor in ckpt["model"].items()},
                "model_args": {name: ckpt["model_args"][name] for name in nano}}, trained / "plain/ckpt.pt")
    run(trained, "train.py", "--preset", "toy", *SMALL, "--init_from", "plain/ckpt.pt", "--freeze_trunk",
        "--out_dir", "tuned")
    tuned = torch.load(trained / "tuned/ckpt.pt", weights_only=True)["model"]
    assert all(torch.equal(tensor, tuned[name]) for name, tensor in ckpt["model"].items())
    eye = torch.eye(16)
    assert (tuned["cp_head.factors"] - eye).abs().mean() > 1e-3


def test_a_trained_head_learns_to_see_its_previous_token(trained):
    """--context previous with --init_from keeps the trained factors and trains the new part; --fresh_head keeps
    nothing. Its greedy text is plain decoding's, and it goes through the bench, resume and bfloat16 as any other."""
    see = ["--preset", "toy", "--rank", 2, *SMALL, "--init_from", "out/toy/ckpt.pt", "--freeze_trunk", "--lr", 1e-4,
           "--context", "previous"]
    out = run(trained, "train.py", *see, "--out_dir", "seeing")
    assert "context previous" in out and "of the head, factors, mix.weight, mix.bias\n" in out
    out = run(trained, "train.py", *see, "--fresh_head", "--seed", 1, "--dtype", "bfloat16", "--out_dir", "fresh")
    assert "of the head, nothing\n" in out
    old, seeing, fresh = (torch.load(trained / out_dir / "ckpt.pt", weights_only=True)["model"]["cp_head.factors"]
                          for out_dir in ("out/toy", "seeing", "fresh"))
    assert 0 < (old - seeing).abs().max() < 0.01 < 0.02 < (old - fresh).abs().max()
    assert torch.load(trained / "seeing/ckpt.pt", weights_only=True)["model"]["cp_head.out"].any()
    run(trained, "train.py", "--resume", "--out_dir", "seeing", "--max_iters", 10)
    greedy = [run(trained, "sample.py", "--out_dir", "seeing", "--temperature", 0, "--max_new_tokens", 60, "--mode",
                  mode) for mode in ("speculative", "oracle")]
    assert greedy[0].splitlines()[:-1] == greedy[1].splitlines()[:-1]  # but for the line of statistics
    out = run(trained, "bench_speculative.py", "--rounds", 5, "--max_new_tokens", 8, "--out_dir", "seeing")
    assert json.loads(out.splitlines()[-1])["card"]["context"] == "previous"


def test_coupled_modes_write_the_same_texts(trained):
    """--coupled at temperature 1, in float64: all samples of the three modes agree; without it they do not."""
    coupled, free = ([run(trained, "sample.py", "--dtype", "float64", "--num_samples", 2, "--max_new_tokens", 25,
                          "--mode", mode, *flags).splitlines()[:-1] for mode in ("speculative", "plain", "oracle")]
                     for flags in (["--coupled"], []))
    assert coupled[0] == coupled[1] == coupled[2] and free[0] != free[1] and coupled[0][0] != coupled[0][2]


def test_plain_model_samples_and_has_nothing_to_bench(trained):
    run(trained, "train.py", "--preset", "toy", "--n_future", 1, *SMALL, "--out_dir", "plain1", "--grad_accum", 2,
        "--max_seconds", 60)
    assert "plain: " in run(trained, "sample.py", "--out_dir", "plain1", "--max_new_tokens", 5)
    bench = launch(trained, "bench_speculative.py", "--out_dir", "plain1")
    assert bench.returncode != 0 and "n_future = 1" in bench.stderr and "Traceback" not in bench.stderr


def test_bfloat16_autocast_trains(trained):
    run(trained, "train.py", "--preset", "toy", *SMALL, "--dtype", "bfloat16", "--out_dir", "bf16")
    log = [json.loads(line) for line in (trained / "bf16/log.jsonl").read_text().splitlines()]
    assert 0 < log[-1]["val"]["joint"] < 10


def test_bench_arithmetic(monkeypatch):
    """Speed-up: the median of the rounds' ratios. Bound, equation (5): the same over the forward passes alone. A step's
    time: that of all forward passes, the three rounds' prefills among them."""
    parts = [dict(trunk=trunk, targets=0.1, draft=0.05, verify=0.03) for trunk in (0.1, 0.1, 0.3)]
    rounds, parts = {"plain": [1.0, 2.0, 4.0], "speculative": [0.5, 0.5, 0.5]}, {"speculative": parts}
    stats = {"plain": Stats(12, 12), "speculative": Stats(7, 12, offered=[2, 0], accepted=[1, 0])}
    bench = Bench(tiny_model(target="lm_head"), [[1]], 5, 0)  # in three rounds 15 tokens, out of 10 forward passes
    monkeypatch.setattr(bench, "rounds", lambda temperature, n_rounds: (rounds, parts, stats, {}))
    plain, fast = bench.rows(0.0, 3)[0]
    assert (plain["speedup"], plain["bound"], plain["tokens_per_second"]) == (1.0, None, 0.5)
    assert fast["speedup"] == 4.0 and fast["bound"] == 10 and fast["tokens_per_second"] == 2.0
    assert fast["acceptance"] == [0.5, None] and fast["step_ms"] == 750 and fast["tokens_per_step"] == 12 / 7
    assert fast["parts_ms"] == pytest.approx({"trunk": 150, "targets": 150, "draft": 75, "verify": 45, "rest": 330})


def test_bench_times_the_parts_of_a_step():
    """Each part once in every step, trunk and targets in the prefill, too, in order and apart; the decoder is itself
    again behind the block, and the parts of a round are less than the whole."""
    model = tiny_model(block_size=16, n_future=4)
    bench, stats = Bench(model, [[1], [2, 3]], 12, 0), Stats()
    before = decode.draft, decode.verify, model.hidden
    with parts_timed(model) as moments:
        texts = bench.decode("speculative", 0.0, 0, stats)
    assert (decode.draft, decode.verify, model.hidden) == before and texts == bench.decode("speculative", 0.0, 0)
    passes = stats.steps + 2
    assert {name: len(pairs) for name, pairs in moments.items()} == {
        "trunk": passes, "targets": passes, "draft": stats.steps, "verify": stats.steps}
    steps = sorted((pair, name) for name, pairs in moments.items() for pair in pairs)
    assert [name for _, name in steps[:7]] == ["trunk", "targets", "draft", "trunk", "targets", "verify", "draft"]
    assert all(start < end <= following for ((start, end), _), ((following, _), _) in zip(steps, steps[1:]))
    for temperature in (0.0, 1.0):
        seconds, parts, _, _ = bench.rounds(temperature, 2)
        assert all(0 < sum(p.values()) < s for p, s in zip(parts["speculative"], seconds["speculative"], strict=True))


@pytest.mark.parametrize("bias", [True, False])
def test_peers_have_our_weights(bias):
    """transformers' GPT-2 gives our logits, without the padded tokens, and its greedy text is ours, with and without
    its prompt lookup, which may guess past the block."""
    pytest.importorskip("transformers")
    model = tiny_model(target="lm_head", vocab_size=12, n_token=9, block_size=32, bias=bias)
    peer, idx = to_transformers(model), torch.randint(9, (2, 10))
    with torch.no_grad():
        torch.testing.assert_close(peer(idx).logits, model(idx)[..., :9], rtol=0, atol=1e-12)
    bench = Bench(model, [[1, 2] * 6, [3]], 20, 0, peers=True)  # up to the last position of the block
    assert list(bench.modes) == ["plain", "speculative", "no_cache", "transformers", "transformers_prompt_lookup"]
    texts = {mode: bench.decode(mode, 0.0, 0) for mode in bench.modes}
    assert all(bench.first_difference(texts, mode) is None for mode in bench.modes)
    for temperature, mode in ((1.0, "transformers"), (1.0, "transformers_prompt_lookup")):
        assert [len(text) for text in bench.decode(mode, temperature, 0)] == [20, 20]
    rows = {row["mode"]: row for row in bench.rows(1.0, 1)[0]}
    assert rows["transformers"]["tokens_per_step"] is None and rows["transformers"]["speedup"] > 0
    print_table(list(rows.values()))
    json.dumps(list(rows.values()), allow_nan=False)


def test_peers_are_refused_in_one_line(monkeypatch):
    """Without transformers, and for a target that no other decoder knows."""
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(SystemExit, match="^--peers needs transformers: python -m pip install transformers$"):
        to_transformers(tiny_model(target="lm_head"))
    with pytest.raises(SystemExit, match="^--peers needs a model with target lm_head"):
        to_transformers(tiny_model(target="marginal"))


def test_heads_are_timed_side_by_side(tmp_path, monkeypatch, capsys):
    """--beside: other heads on one trunk in the same rounds, each with its own rows; one line for another trunk, a
    target that is the head's own, and a checkpoint without a head."""
    model = tiny_model(target="lm_head").float()
    other = GPT.from_checkpoint(model.checkpoint(), rank=3, n_future=5, context="previous").eval()
    model, other = model.double(), other.double()
    bench = Bench(model, [[1, 2]], 12, 0, beside={"out/b": other})
    for temperature in (0.0, 1.0):
        rows, texts = bench.rows(temperature, 2)
        assert [row["mode"] for row in rows] == ["plain", "speculative", "speculative, out/b"]
        heads = [(row["n_future"], row["rank"], row["context"]) for row in rows[1:]]
        assert heads == [(3, 2, "none"), (5, 3, "previous")] and "rank" not in rows[0]
        assert [len(row["acceptance"]) for row in rows[1:]] == [2, 4]
        assert all(row["bound"] > 0 and row["parts_ms"]["trunk"] > 0 for row in rows[1:])
        if temperature == 0:
            assert bench.first_difference(texts, "speculative, out/b") is None
    print_table(rows)
    lines = capsys.readouterr().out.splitlines()
    assert len({line.index("1.0 ") for line in lines if line.startswith(("plain", "speculative"))}) == 1
    check_same_law(model, other, "out/b")
    one_weight = copy.deepcopy(other)
    with torch.no_grad():
        one_weight.transformer.h[0].mlp.c_fc.weight[0, 0] += 1
    for wrong in (one_weight, tiny_model(target="marginal"), tiny_model(target="lm_head", n_future=1),
                  tiny_model(target="lm_head", n_layer=1), tiny_model(target="lm_head", n_head=1),
                  tiny_model(target="lm_head", n_token=4), tiny_model(target="lm_head", bias=not model.config.bias)):
        with pytest.raises(SystemExit, match="^--beside: out/b is not another head on the very trunk of --out_dir"):
            check_same_law(model, wrong, "out/b")
    with pytest.raises(SystemExit, match="^--beside needs a model with target lm_head: with another,"):
        check_same_law(tiny_model(target="marginal"), other, "out/b")


def test_nanogpts_algorithm_is_ours_with_one_future_token():
    """The rival in train.py --benchmark computes the same loss and gradients."""
    model, idx = tiny_model(n_future=1, rank=1), torch.randint(5, (2, 9))
    both = model.loss, partial(bench_training.nanogpt_loss, model)
    losses = [loss(idx[:, :-1], idx[:, 1:, None])[0] for loss in both]
    ours, theirs = (torch.autograd.grad(loss, list(model.parameters())) for loss in losses)
    assert losses[0].item() == pytest.approx(losses[1].item(), abs=1e-12)
    for a, b in zip(ours, theirs):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-12)


@pytest.mark.parametrize("target,factors,context,share,sampled", [
    ("marginal", "reduced", "none", 1, False), ("lm_head", "reduced", "previous", 1, False),
    ("lm_head", "full", "none", 0.5, False), ("lm_head", "reduced", "previous", 0.5, True)])
def test_flops_of_training_are_those_that_torch_counts(target, factors, context, share, sampled):
    """The matrix products of a step, without what the chunks of logits compute again; attention has next to none."""
    cfg = trainer.TrainConfig(block_size=2, n_layer=2, n_head=2, n_embd=16, n_future=3, rank=2, batch_size=4,
                              target=target, factors=factors, context=context, joint_share=share,
                              sample_component=sampled)
    model, step = bench_training.stepper(cfg, 64, torch.device("cpu"), torch.float32)
    with FlopCounterMode(display=False) as counter:
        step()
    # 8 positions, n r factors, of which n have a gradient if one component was drawn, and the LM head
    again = 2 * 8 * 16 * 64 * ((3 if sampled else 6) * share + (target == "lm_head"))
    assert counter.get_total_flops() - again == pytest.approx(bench_training.flops(model.config, cfg), rel=0.02)


def test_benchmark_of_training_has_a_row_per_head(monkeypatch, capsys):
    """Small shapes, through train.py's flag: rows of n = 1 in both algorithms and of the head, with their JSON; memory
    holds 16 bytes per parameter at least, AdamW's state among them; what does not fit into memory is said; one line for
    shapes that are none, and for flags that mean nothing here."""
    for name, values in (("VOCABULARIES", (8191,)), ("FUTURES", (3,)), ("RANKS", (1, 2))):
        monkeypatch.setattr(bench_training, name, values)
    args = "train.py --benchmark --device cpu --n_layer 1 --n_embd 256 --n_head 2 --block_size 4 --batch_size 1"
    monkeypatch.setattr(sys, "argv", args.split())
    trainer.main()
    out = capsys.readouterr().out
    rows = json.loads(out.splitlines()[-1])["rows"]
    assert [(row["algorithm"], row["n_future"], row["rank"]) for row in rows] == [
        ("nanoGPT", 1, 1), ("ours", 1, 1), ("ours", 3, 1), ("ours", 3, 2)]
    assert all(row["seconds"] > 0 and row["ratio"] > 0 and row["flops_per_second"] > 0 for row in rows)
    assert [row["head_parameters"] > 0 for row in rows] == [False, False, True, True]
    for row in rows:
        assert row["trunk_parameters"] > 8192 * 256  # padded, as train.py does
        assert row["bytes"] is None or row["bytes"] > 15 * (row["trunk_parameters"] + row["head_parameters"])
    monkeypatch.setattr(bench_training, "VOCABULARIES", (2**45,))
    trainer.main()
    assert capsys.readouterr().out.count("not enough memory") == 4
    monkeypatch.setattr(sys, "argv", [*args.split(), "--n_head", "3"])
    with pytest.raises(SystemExit, match=r"^n_embd 256 is not divisible by n_head 3\.$"):
        trainer.main()
    for flag in ("--resume", "--compile", "--rank=3", "--init_from=x"):
        monkeypatch.setattr(sys, "argv", [*args.split(), flag])
        with pytest.raises(SystemExit, match="2"):
            trainer.main()
        assert f"{flag.split('=')[0]}: means nothing to --benchmark" in capsys.readouterr().err


@pytest.mark.skipif(sys.platform == "win32", reason="has no process groups")
def test_ctrl_c_ends_the_benchmark_of_training(tmp_path):
    """A terminal interrupts the whole group, so also the process that measures, here while it starts: one line, code
    130, and no process stays behind. SIGTERM ends it in order, too."""
    args = "--benchmark --device cpu --n_layer 1 --n_embd 32 --n_head 2 --block_size 16 --batch_size 1".split()
    for number, code, line in ((signal.SIGINT, 130, "interrupted"), (signal.SIGTERM, 143, "")):
        process = subprocess.Popen([sys.executable, HERE / "train.py", *args], stdout=subprocess.PIPE, text=True,
                                   stderr=subprocess.PIPE, start_new_session=True, cwd=tmp_path,
                                   preexec_fn=partial(signal.signal, signal.SIGINT, signal.SIG_DFL))  # nohup ignores it
        while "nanoGPT" not in process.stdout.readline():  # the first row; the next process imports torch by now
            pass
        os.killpg(process.pid, number) if number == signal.SIGINT else process.terminate()
        out, err = process.communicate(timeout=60)  # ends when no process holds the pipes any more
        assert (process.returncode, err.strip()) == (code, line)


@pytest.mark.skipif(sys.platform == "win32", reason="has no signals between threads")
def test_ctrl_c_waits_until_a_process_has_started(monkeypatch):
    """Also where another thread, which nothing blocks, hears of it. Guards a child that is left half started, and says
    so in a traceback."""
    started, go = [], threading.Event()
    thread = threading.Thread(target=lambda: go.wait() and signal.pthread_kill(threading.get_ident(), signal.SIGINT))
    thread.start()

    class Process:
        def __init__(self, **options):
            pass

        def start(self):
            go.set()
            thread.join()
            started.append(True)

    monkeypatch.setattr(multiprocessing.get_context("spawn"), "Process", Process)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # nohup ignores it
    try:
        with pytest.raises(KeyboardInterrupt):
            bench_training.measure_apart()
        assert started and signal.getsignal(signal.SIGINT) is signal.default_int_handler
        assert not signal.pthread_sigmask(signal.SIG_BLOCK, ())
    finally:
        signal.signal(signal.SIGINT, before)


def test_bench_finds_where_texts_part():
    """The first difference, and the gap of the two top logits there, padded ids left out."""
    model = tiny_model(n_token=4)
    bench = Bench(model, [[1], [2]], 3, 0)
    assert bench.first_difference({"plain": [[0, 1, 2], [3]], "speculative": [[0, 1, 2], [3]]}) is None
    part = bench.first_difference({"plain": [[0, 1, 2], [3, 1, 1]], "speculative": [[0, 1, 2], [3, 2, 1]]})
    logits = model(torch.tensor([[2, 3]]))[0, -1, :4].sort().values
    assert (part["prompt"], part["token"]) == (1, 1) and part["logit_gap"] == (logits[-1] - logits[-2]).item()


@pytest.mark.parametrize("script", ["prepare_tinystories", "train", "sample", "bench_speculative", "plot"])
def test_help_knows_every_flag_that_the_readme_uses(script, tmp_path):
    flags = set(re.findall(r"--\w+", " ".join(re.findall(rf"python {script}\.py([^\n&`]*)", readme()))))
    assert flags and flags <= set(re.findall(r"--\w+", run(tmp_path, f"{script}.py", "--help")))


# -----------------------------------------------------------------------------
# the README


def readme():
    return (HERE / "README.md").read_text(encoding="utf-8")


def test_readme_quotes_the_code_as_it_is():
    """Every line of a block that begins with a file's name stands in that file, and so does the code in the table of
    the proof. Guards a README that drifts away from its code."""
    quotes = [block.splitlines() for block in re.findall(r"```python\n# (\w+\.py\n.*?)```", readme(), re.S)]
    quotes.append(["decode.py", *re.findall(r"^\|[^|]+\| `([^`]+)` \|$", readme().split("| the argument |")[1], re.M)])
    assert len(quotes) >= 3 and len(quotes[-1]) > 5
    for name, *lines in quotes:
        code = (HERE / name).read_text(encoding="utf-8")
        assert [line for line in lines if line.strip() not in code] == []


def test_readme_examples_run(trained, monkeypatch, capsys):
    """Each block of Python in it, pasted; the worked example gives 2 bits to independent heads and 1 to a mixture."""
    monkeypatch.chdir(trained)
    blocks = re.findall(r"```python\n((?:import|from) .*?)```", readme(), re.S)
    names = {}
    for block in blocks:
        exec(block, names)
    assert len(blocks) == 2 and "product" in names
    assert torch.equal(names["product"], torch.full((2, 2), 0.25)) and torch.equal(names["mixture"], torch.eye(2) / 2)
