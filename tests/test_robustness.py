"""The hostile world: interruptions, full disks, bad input. Nothing is lost, and a mistake gets one
line."""

import errno
import hashlib
import json
import os
import pickle
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
import zipfile
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from helpers import (TOY, assert_same_run, call, can_compile, contents, exit_code, fork, in_a_fork,
                     stamps, start, steps_of, wait_until)

import bench_speculative
import common
import model
import prepare_tinystories
import tokenizer
import train
from experiments import plots
from model import ROOT, GPT, GPTConfig

FROM = "--preset toy --batch_size 4 --max_iters 1 --eval_windows 4 --device cpu --init_from"
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


@pytest.fixture(scope="module")
def home(toy, tmp_path_factory):
    """A folder with toy data, a trained model, a plain one, one in nanoGPT's own format, and other
    people's files."""
    home = tmp_path_factory.mktemp("home")
    shutil.copytree(toy, home, dirs_exist_ok=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(home)
        plain = f"{TOY} --n_future 1 --bias --max_iters 2 --out_dir out/plain"
        assert call("train", plain) == (0, "")
        other = "--toy --stories 120 --vocab_size 300 --data_dir data/other"
        assert call("prepare", other) == (0, "")
        make_bad_files(home)
        make_large_vocabulary(home)
    return home


def make_bad_files(home):
    ckpt = torch.load(home / "out/toy/ckpt.pt", weights_only=True)
    whole = (home / "out/toy/ckpt.pt").read_bytes()
    fewer = {k: v for k, v in ckpt.items() if k not in ("meta", "train_config", "optimizer")}
    odd = {**ckpt, "model": {**ckpt["model"], "transformer.ln_f.weight": torch.zeros(7)}}
    nan, huge = ({**ckpt, "model": {**ckpt["model"], "transformer.ln_f.weight": torch.full((16,), value)}}
                 for value in (float("nan"), 6e5))
    gpt2 = {"model": GPT(GPTConfig(block_size=32, n_layer=1, n_head=2, n_embd=16, bias=False)).state_dict(),
            "model_args": dict(block_size=32, vocab_size=50304, n_layer=1, n_head=2, n_embd=16, bias=False)}
    older = {**ckpt, "train_config": {**ckpt["train_config"], "factors": "reduced"}}
    wordless = {**ckpt, "meta": {**ckpt["meta"], "prompts": []}}
    tokenizer = ckpt["meta"]["tokenizer"]
    byteless = {**ckpt, "meta": {**ckpt["meta"], "tokenizer": {**tokenizer, "tokens": ["??", *tokenizer["tokens"][1:]]}}}
    group = {**ckpt["optimizer"], "param_groups": ckpt["optimizer"]["param_groups"][:1]}
    groupless = {**ckpt, "optimizer": group}
    beheaded = {**ckpt, "model": {name: x for name, x in ckpt["model"].items() if name != "head.maps"}}
    renamed, forked = ({**ckpt, "model_args": {**ckpt["model_args"], **change}}
                       for change in ({"head": "gone"}, {"rope": True}))
    wide = {**ckpt, "model_args": {**ckpt["model_args"], "n_embd": "wide"}}

    class Hostile:
        def __reduce__(self):
            return open, ("owned", "w")

    files = {"cut": whole[: len(whole) // 2], "empty": b"", "text": b"hello\n", "hostile": pickle.dumps(Hostile())}
    others = dict(nanogpt=fewer, odd=odd, wide=wide, list=[1], dict={"a": 1}, nan=nan, huge=huge, gpt2=gpt2, older=older,
                  wordless=wordless, byteless=byteless, groupless=groupless, beheaded=beheaded, renamed=renamed,
                  forked=forked)
    for name, content in {**files, **others}.items():
        path = home / "out" / name / "ckpt.pt"
        path.parent.mkdir()
        path.write_bytes(content) if isinstance(content, bytes) else torch.save(content, path)
    for name, meta in (("nojson", "{"), ("foreign", '{"a": 1}'), ("own", '{"read_by": "pretrained.train"}')):
        shutil.copytree(home / "data/toy", home / "data" / name)
        (home / "data" / name / "meta.json").write_text(meta)
    meta = json.loads((home / "data/toy/meta.json").read_text())
    tokens = meta["tokenizer"]["tokens"]
    shorter = dict(tokenizer={**meta["tokenizer"], "tokens": tokens[:260]}, vocab_size=261)  # than the ids in the files
    edits = dict(smaller=dict(vocab_size=100), zero=dict(bytes_per_token=0), silent=dict(prompts=[]), shorter=shorter)
    for name, edit in edits.items():
        shutil.copytree(home / "data/toy", home / "data" / name)
        (home / "data" / name / "meta.json").write_text(json.dumps({**meta, **edit}))
    shutil.copytree(home / "data/toy", home / "data/swapped")
    data = bytearray((home / "data/toy/train.bin").read_bytes())
    data[10] ^= 1
    (home / "data/swapped/train.bin").write_bytes(data)
    for name in ("cut", "empty", "gone"):
        shutil.copytree(home / "data/toy", home / "data" / name)
    (home / "data/cut/train.bin").write_bytes((home / "data/toy/train.bin").read_bytes()[:-2])
    (home / "data/empty/val.bin").write_bytes(b"")
    (home / "data/gone/train.bin").unlink()
    assert call("prepare", "--toy --stories 120 --seed 2 --data_dir data/again") == (0, "")
    again = json.loads((home / "data/again/meta.json").read_text())
    (home / "data/again/meta.json").write_text(json.dumps({**again, "tokenizer": meta["tokenizer"],
                                                                   "vocab_size": meta["vocab_size"]}))  # other texts
    (home / "data/blank").mkdir()
    for split in ("train", "valid"):
        (home / f"data/blank/TinyStoriesV2-GPT4-{split}.txt").touch()
    shutil.copytree(home / "data/blank", home / "data/half")
    (home / "data/half/TinyStoriesV2-GPT4-train.txt").write_text("A story.")
    (home / "latin1.txt").write_bytes("Çedilla".encode("latin-1"))
    (home / "utf16.txt").write_bytes("A story.".encode("utf-16-le"))  # without a mark it is utf-8, too
    (home / "none.txt").write_text(" \n")
    (home / "folder").mkdir()
    (home / "folder/binary").write_bytes(b"\xff\xfe")


BAD = [
    ("train", "--data_dir nowhere", "There is no data in nowhere"),
    ("train", "--data_dir data/nojson", "is not a meta file"),
    ("train", "--data_dir data/foreign", "is not a meta file"),
    ("train", "--data_dir data/cut", "data/cut/train.bin is not the file of"),
    ("train", "--data_dir data/empty", "data/empty/val.bin is not the file of"),
    ("train", "--data_dir data/gone", "data/gone/train.bin is not the file of"),
    ("train", "--block_size 100000", "take more text or a smaller --block_size"),
    ("train", "--n_embd 10 --n_head 3", "n_embd 10 is not divisible by n_head 3"),
    ("train", "--freeze_trunk --n_future 1", "n_future = 1 has none"),
    ("train", "--preset pretrained", "invalid choice: 'pretrained'"),
    ("train", "--data_dir data/own", "meta.json is for another script: python -m pretrained.train"),
    ("train", "--freeze_trunk", "--freeze_trunk needs a trunk that is trained: name its checkpoint with --init_from"),
    ("train", "--data_dir latin1.txt", "latin1.txt is a file; name a folder"),
    ("train", "--out_dir latin1.txt", "latin1.txt is a file; name a folder"),
    ("train", "--block_size 1", "block_size must be a whole number of at least 2"),
    ("train", "--lr nan", "--lr: must be at least 0, not nan"),
    ("train", "--lr -1", "--lr: must be at least 0, not -1"),
    ("train", "--lr 1e30", "Training has diverged"),
    ("train", "--max_iters 0", "--max_iters: must be at least 1 and at most 1000000000, not 0"),
    ("train", "--preset", "--preset: expected one argument"),
    ("train", "--rank 100000000000000000000", "--rank: must be at least 1 and at most 1000000"),
    ("train", "--max_iters many", "invalid int value: 'many'"),
    ("train", "--joint_share 0", "--joint_share: must be above 0 and at most 1, not 0"),
    ("train", "--warmup 1", "--warmup: must be at least 0 and at most 0.99"),
    ("train", "--batch_size 0", "--batch_size: must be at least 1"),
    ("train", "--seed -1", "--seed: must be at least 0"),
    ("train", "--dtype float8", "invalid choice: 'float8'"),
    ("train", "--head tucker", "invalid choice: 'tucker'"),
    ("train", "--seed 4294967296", "--seed: must be at least 0 and at most 4294967295"),
    ("train", "--device hpu", "--device hpu cannot be used here"),
    ("train", "--device privateuseone", "--device privateuseone cannot be used here"),
    ("train", "--init_from out/toy/ckpt.pt --n_embd 32", "has n_embd = 16, not 32; leave --n_embd away"),
    ("train", "--init_from out/toy/ckpt.pt --block_size 64", "has block_size = 32, not 64; leave --block_size away"),
    ("train", "--init_from out/nanogpt/ckpt.pt --data_dir data/other", "another tokenizer (one of"),
    ("train", "--init_from out/gpt2/ckpt.pt", "another tokenizer (gpt2)"),
    ("train", "--out_dir /proc/out", "/proc/out"),
    ("train", "--resume --out_dir out/older", "holds no state of training"),
    ("train", "--resume --out_dir out/groupless", "The optimizer's state does not fit the model"),
    ("train", "--init_from out/toy/ckpt.pt --bias", "has bias = False, not True; leave --bias away"),
    ("train", "--init_from out/plain/ckpt.pt --no-bias", "has bias = True, not False; leave --no-bias away"),
    *(("train", f"--data_dir data/{name}", f"data/{name}/meta.json is not a meta file") for name in
      ("smaller", "zero", "silent")),
    ("train", "--data_dir data/shorter", "data/shorter/train.bin is not the file of"),
    ("train", "--data_dir data/swapped", "data/swapped/train.bin is not the file of"),
    ("train", "--fresh_head", "--fresh_head needs a trunk that is trained: name its checkpoint with --init_from"),
    ("train", "--device toaster", "--device toaster cannot be used here"),
    ("train", "--device meta", "--device meta cannot be used here"),
    ("train", "--preset huge", "invalid choice: 'huge'"),
    ("train", "--n_layers 3", "unrecognized arguments: --n_layers 3"),
    ("train", "--out_dir latin1.txt/out", "latin1.txt"),
    ("train", "--init_from nowhere.pt", "There is no checkpoint nowhere.pt"),
    ("train", "--init_from out/nowhere/ckpt.pt", "There is no checkpoint out/nowhere/ckpt.pt"),
    ("train", "--init_from out/toy/ckpt.pt --head mask --target marginal", "--head mask needs --target lm_head"),
    ("train", "--init_from out/toy/ckpt.pt --fresh_head --head conditional --target marginal",
     "--head conditional needs --target lm_head"),
    ("train", "--init_from out/odd/ckpt.pt --fresh_head", "out/odd/ckpt.pt holds no model that fits: "),
    ("train", "--init_from out/beheaded/ckpt.pt", "--init_from out/beheaded/ckpt.pt --fresh_head keeps the trunk"),
    ("sample", "--out_dir out/beheaded", "train.py --init_from out/beheaded/ckpt.pt --fresh_head keeps the trunk"),
    ("sample", "--out_dir out/renamed", "train.py --init_from out/renamed/ckpt.pt --fresh_head keeps the trunk"),
    ("sample", "--out_dir out/forked", "its model_args say rope = True"),
    ("train", "--init_from out/toy/nope.pt", "There is no checkpoint out/toy/nope.pt; out/toy holds out/toy/ckpt.pt"),
    ("train", "--init_from out/toy", "out/toy is a folder; name the checkpoint in it, out/toy/ckpt.pt"),
    ("train", "--resume --out_dir out/plain --no-bias", "bias = True, not False; leave --no-bias away"),
    ("train", "--init_from out/cut/ckpt.pt", "is not a checkpoint"),
    ("train", "--init_from out/plain/ckpt.pt --data_dir data/other", "another tokenizer"),
    ("train", "--init_from out/nanogpt/ckpt.pt --data_dir data/large", "another tokenizer"),
    ("train", "--resume --out_dir out/nowhere", "There is no checkpoint out/nowhere/ckpt.pt"),
    ("train", "--resume --out_dir out/nanogpt", "holds no state of training"),
    ("train", "--resume --rank 7", "goes on with rank = 2, not 7"),
    ("train", "--resume --data_dir data/again", "is not what out/toy/ckpt.pt was trained on"),
    ("train", "--resume --data_dir data/other", "another tokenizer"),
    ("prepare", "--input nowhere.txt", "nowhere.txt: no such file or folder"),
    ("prepare", f"--input {os.devnull}", "neither a plain file nor a folder"),
    ("prepare", "--input latin1.txt", "latin1.txt is not utf-8 text"),
    ("prepare", "--input utf16.txt", "utf16.txt holds NUL characters"),
    ("prepare", "--input none.txt", "There is no text in none.txt"),
    ("prepare", "--input folder", "There is no text in folder"),
    ("prepare", "--toy --vocab_size 256", "--vocab_size: must be at least 257"),
    ("prepare", "--toy --vocab_size 65537", "at most 65536, not 65537"),
    ("prepare", "--toy --input a", "not allowed with argument"),
    ("prepare", "--toy --max_mb 5", "--max_mb is for the download"),
    ("prepare", "--max_mb 0", "--max_mb: must be at least 1"),
    ("prepare", "--toy --stories 1", "--stories: must be at least 2"),
    ("prepare", "--data_dir data/blank", "There is no text in data/blank/TinyStoriesV2-GPT4-train.txt"),
    ("prepare", "--data_dir data/half", "There is no text in data/half/TinyStoriesV2-GPT4-valid.txt"),
    ("prepare", "--toy --data_dir /proc/data", "/proc/data"),
    ("prepare", "--toy --seed -1", "--seed: must be at least 0"),
    ("prepare", "--toy --data_dir latin1.txt", "latin1.txt is a file; name a folder"),
    ("prepare", "--toy --data_dir latin1.txt/data", "latin1.txt"),
    *(("sample", f"--out_dir out/{name}", "is not a checkpoint") for name in
      ("cut", "empty", "text", "hostile", "list", "dict")),
    ("sample", "--out_dir out/toy/ckpt.pt", "out/toy/ckpt.pt is a file; name a folder"),
    ("sample", "--out_dir out/odd", "holds no model that fits"),
    ("sample", "--out_dir out/wide", "holds no model that fits"),
    ("sample", "--out_dir out/nanogpt", "holds no tokenizer"),
    ("sample", "--out_dir nowhere", "There is no checkpoint nowhere/ckpt.pt; train one first"),
    ("sample", "--out_dir out/plain --mode speculative", "no head to draft from"),
    ("sample", "--temperature -0.1", "--temperature: must be at least 0"),
    ("sample", "--temperature 1e-40", "temperature must be 0, which is greedy, or from 1e-6"),
    ("sample", "--temperature nan", "--temperature: must be at least 0"),
    ("sample", "--out_dir out/nan", "the model gives NaN or infinite logits: its weights are damaged, or overflow"),
    ("sample", "--out_dir out/nan --temperature 0 --mode plain", "try --dtype float32"),
    ("sample", "--out_dir out/huge --dtype float16", "try --dtype float32"),
    ("sample", "--out_dir out/wordless", "is not a meta file"),
    ("sample", "--out_dir out/byteless", "lacks some of the 256 single bytes"),
    ("sample", "--temperature 1e39", "--temperature: must be at least 0 and at most 1000000.0, not 1e39"),
    ("sample", "--temperature inf", "--temperature: must be at least 0"),
    ("sample", "--top_k 0", "--top_k: must be at least 1"),
    ("sample", "--top_p 0", "--top_p: must be at least 1e-06 and at most 1"),
    ("sample", "--top_p 1.5", "--top_p: must be at least 1e-06 and at most 1"),
    ("sample", "--num_samples 0", "--num_samples: must be at least 1"),
    ("sample", "--max_new_tokens -1", "--max_new_tokens: must be at least 0"),
    ("sample", "--mode fast", "invalid choice: 'fast'"),
    ("sample", ["--prompt", b"\xff".decode(errors="surrogateescape")], "is not valid utf-8"),
    ("bench", "--out_dir out/plain", "n_future = 1"),
    ("bench", "--out_dir out/hostile", "is not a checkpoint"),
    ("bench", "--rounds 4", "--rounds: must be at least 5"),
    ("bench", "--max_new_tokens 1", "--max_new_tokens: must be at least 2"),
    ("bench", "--out_dir out/wordless", "is not a meta file"),
    ("bench", "--out_dir out/nan", "try --dtype float32"),
    ("plot", "out/toy --output out.gif", "out.gif: the name of a picture must end in"),
    ("plot", "bench out.json --output out", "out: the name of a picture must end in"),
    ("plot", "out/toy --output /proc/x/y.png", "/proc/x"),
    ("plot", "nowhere --output x.png", "nowhere: No such file"),
    ("bench", "--threads 0", "--threads: must be at least 1"),
]


@pytest.mark.parametrize("script,args,line", BAD, ids=[f"{script} {args}" for script, args, _ in BAD])
def test_bad_input_gets_one_line(script, args, line, home, monkeypatch, capsys):
    """One line that says what is wrong, a non-zero exit, no traceback, and every file is as it
    was."""
    if script == "plot" and ("/proc" in args or "nowhere" in args):
        pytest.importorskip("matplotlib")
    monkeypatch.chdir(home)
    before = stamps(home)
    if script == "train":
        args = f"--preset toy {args}" if "--resume" in args else f"{TOY} {args}"
    code, message = call(script, args)
    message = message or capsys.readouterr().err.splitlines()[-1]
    assert code != 0 and line in message.replace(os.sep, "/") and "\n" not in message
    assert stamps(home) == before


@pytest.mark.parametrize("script,args,advice", [
    ("train", "--init_from nowhere.pt", ""), ("train", "--init_from nano/ckpt.pt", ""),
    ("pretrained.convert", "nano/ckpt.pt new.pt", ""),
    ("sample", "--out_dir nano", "; train one first: python train.py --out_dir nano"),
    ("train", "--resume --out_dir out/nowhere", "; train one first: python train.py --out_dir out/nowhere"),
    ("pretrained.train", "--resume --out_dir nano", "; train one first: python -m pretrained.train --out_dir nano")])
def test_where_there_is_no_checkpoint_the_advice_is_what_writes_one(script, args, advice, home, monkeypatch):
    """None to train one where somebody else's is named."""
    monkeypatch.chdir(home)
    code, message = call(script, f"{TOY} {args}" if "init_from" in args else args)
    assert code == 1 and message.startswith("There is no checkpoint ") and message.partition(".pt")[2] == advice


@pytest.mark.parametrize("error", [MemoryError(), RuntimeError("[...] DefaultCPUAllocator: not enough memory: ...")])
def test_too_little_memory_gets_one_line(error, home, monkeypatch):
    def allocates(*args):
        raise error

    monkeypatch.chdir(home)
    monkeypatch.setattr(train, "new_model", allocates)
    code, message = call("train", TOY)
    assert code == 1 and message.startswith("Out of memory (") and "--batch_size" in message and "\n" not in message


def make_large_vocabulary(home):
    """Data of a tokenizer that is larger than a nanoGPT checkpoint's vocabulary."""
    text = " ".join(f"w{i:03}x" for i in range(2000))
    (home / "large.txt").write_text(text * 3)
    description = tokenizer.build_tokenizer(["".join(chr(0x4E00 + i) + " " for i in range(600))], 1500)
    prepare_tinystories.prepare(lambda: [text] * 9, lambda: [text], description, home / "data/large")


# -----------------------------------------------------------------------------
# input that only looks bad


def test_edges_of_good_input(home, monkeypatch, capsys):
    """An empty prompt, one longer than the block, no new tokens, a foreign checkpoint that a head
    is put on."""
    monkeypatch.chdir(home)
    for args in ("--max_new_tokens 5", "--max_new_tokens 0", ["--prompt", "Lily went " * 40, "--max_new_tokens", "9"],
                 ["--prompt", "<|endoftext|> é€", "--max_new_tokens", "3"]):
        assert call("sample", args) == (0, "")
        assert "speculative: " in capsys.readouterr().out
    assert call("train", f"{FROM} out/nanogpt/ckpt.pt --out_dir out/tuned") == (0, "")


def test_output_to_a_closed_pipe_is_no_traceback(home):
    """python sample.py | head"""
    command = [sys.executable, ROOT / "sample.py", "--max_new_tokens", "5000"]
    with subprocess.Popen(command, cwd=home, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        process.stdout.read(1)
        process.stdout.close()
        assert b"Traceback" not in process.stderr.read()


def test_gpt2_tokenizer_without_a_network_says_what_to_do(monkeypatch):
    """tiktoken's download has no time-out and fails in requests' own way (tiktoken #281, #369)."""
    def fails(name):
        raise ConnectionError("no route")

    silent, answered = threading.Event(), []
    for get_encoding in (fails, lambda name: silent.wait(120) or answered.append(name)):
        monkeypatch.setattr(tokenizer.tiktoken, "get_encoding", get_encoding)
        with pytest.raises(model.BadInput, match="set TIKTOKEN_CACHE_DIR"):
            tokenizer.gpt2_tokenizer(timeout=0.2)
    assert not answered
    silent.set()


def test_a_compiler_that_is_missing_is_explained(home, monkeypatch):
    """Before anything is trained, and in one line whatever the compiler says."""
    monkeypatch.chdir(home)
    before = contents(home)

    def compiled(function):
        def fails(*args):
            raise RuntimeError("no C++ compiler\nhere")
        return fails

    monkeypatch.setattr(torch, "compile", compiled)
    code, message = call("train", f"{TOY} --compile")
    assert code == 1 and message.startswith("--compile does not work here") and "Leave --compile away" in message
    assert contents(home) == before


def test_a_checkpoint_of_any_length_is_called_damaged(home, tmp_path):
    """torch's reader has an OSError, too, for some of them."""
    whole = (home / "out/toy/ckpt.pt").read_bytes()
    for length in range(0, len(whole), len(whole) // 25):
        (tmp_path / "ckpt.pt").write_bytes(whole[:length])
        with pytest.raises(model.BadInput, match="it is damaged"):
            common.read_checkpoint(tmp_path / "ckpt.pt")


def test_a_checkpoint_that_may_not_be_read_says_so(home, monkeypatch):
    """Not "damaged": the user would train anew what is whole. (Tests may run as root, who may read
    everything.)"""
    def denied(*args, **kwargs):
        raise PermissionError(errno.EACCES, "Permission denied", "out/toy/ckpt.pt")

    monkeypatch.chdir(home)
    monkeypatch.setattr("builtins.open", denied)
    assert call("sample", "") == (1, "out/toy/ckpt.pt: Permission denied")


def test_the_gpu_preset_runs_reduced_on_a_cpu(home, monkeypatch):
    """--preset tinystories with its target, its batches in parts and bfloat16, at a size for a
    CPU."""
    monkeypatch.chdir(home)
    assert call("train", "--preset tinystories --data_dir data/toy --out_dir out/gpu --n_layer 2 --n_head 2 "
                         "--n_embd 32 --block_size 32 --batch_size 4 --eval_windows 4 --max_iters 4 "
                         "--dtype bfloat16 --device cpu --log_interval 1") == (0, "")
    log = [json.loads(line) for line in Path("out/gpu/log.jsonl").read_text().splitlines()]
    config = torch.load("out/gpu/ckpt.pt", weights_only=True)["train_config"]
    assert config["grad_accum"] == 4 and config["target"] == "marginal" and 4 < log[-1]["val"]["joint"] < 8


WITHOUT_STDERR = [("prepare", "--toy --stories 120 --data_dir data/mute"),
                  ("train", f"{TOY} --max_iters 2 --out_dir out/mute")]
scripts_without_stderr = pytest.mark.parametrize("script,args", WITHOUT_STDERR,
                                                 ids=["prepare", "train"])


@scripts_without_stderr
def test_without_stderr_the_scripts_run_without_a_bar(script, args, home, monkeypatch, capsys):
    """pythonw has none."""
    monkeypatch.chdir(home)
    monkeypatch.setattr(sys, "stderr", None)
    assert call(script, args) == (0, "") and "\nwrote " in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.skipif(os.name != "posix", reason="needs a POSIX shell")
@scripts_without_stderr
def test_a_shell_that_closes_stderr_changes_nothing(script, args, home):
    """2>&-, as python starts then."""
    file = ROOT / {"prepare": "prepare_tinystories.py", "train": "train.py"}[script]
    command = f"exec '{sys.executable}' '{file}' {args} 2>&-"
    result = subprocess.run(["sh", "-c", command], cwd=home, stdout=subprocess.PIPE, text=True)
    assert result.returncode == 0 and "\nwrote " in result.stdout


# -----------------------------------------------------------------------------
# a bug of whoever edits the code keeps its traceback


def bug(*args, **kwargs):
    return a_name_with_a_typo  # noqa: F821


ON_CPU = {**vars(train.TrainConfig()), "device": "cpu"}
BUGS = [("train", TOY, "model.CPHead.log_joint"), ("train", TOY, "model.GPT.__init__"),
        ("train", TOY, "model.GPT.forward"), ("train", TOY, "model.balance_loss"),
        ("train", TOY, "train.learning_rate"), ("train", TOY, "train.evaluate"),
        ("train", "--preset toy --resume", "train.Run.restore"),
        ("train", "--preset toy --resume", "model.CPHead.__init__"),
        ("train", f"{FROM} out/toy/ckpt.pt", "model.CPHead.__init__"),
        ("train", f"{FROM} out/toy/ckpt.pt", "common.from_checkpoint"),
        ("sample", "", "model.CPHead.__init__"), ("sample", "", "model.CPHead.draft"),
        ("sample", "", "decode.speculative_step"),
        ("sample", "", "decode.verify"), ("sample", "", "decode.residual"), ("sample", "", "decode.warp"),
        ("sample", "--temperature 0", "decode.keep_equal"), ("sample", "", "sample.load_tokenizer"),
        ("bench", "", "decode.verify"), ("bench", "", "model.walk"),
        ("bench", "", "bench_speculative.Laps.call"),
        ("plot", "out/toy --output x.png", "experiments.plots.draw_runs"),
        ("training", "--ranks 1 --futures 2 --vocab_sizes 64", "experiments.bench_training.benchmark"),
        ("training", f"--row {json.dumps([ON_CPU, 64, False], separators=(',', ':'))}",
         "model.CPHead.log_joint"),
        ("prepare", "--toy --stories 9 --data_dir data/bug", "tokenizer.segments"),
        ("prepare", "--toy --stories 9 --data_dir data/bug", "prepare_tinystories.toy_story")]


@pytest.mark.parametrize("script,args,where", BUGS, ids=[f"{script} {where}" for script, _, where in BUGS])
def test_a_bug_keeps_its_traceback(script, args, where, home, tmp_path, monkeypatch):
    """A misspelt name, planted in each script's path, comes out as the NameError that it is; no
    line of ours hides it."""
    for folder in ("data/toy", "out/toy"):
        shutil.copytree(home / folder, tmp_path / folder)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(where, bug)
    if script == "plot":
        pytest.importorskip("matplotlib")
    if script == "bench":
        monkeypatch.setattr(bench_speculative, "best_threads", lambda *given: 1)
        args += " --max_new_tokens 4 --rounds 5"
    with pytest.raises(NameError, match="a_name_with_a_typo"):
        start(script, args)


@pytest.mark.slow
def test_a_bug_in_compiled_code_keeps_its_traceback(home, tmp_path, monkeypatch):
    """A first step that fails under --compile is not a missing compiler."""
    if not can_compile():
        pytest.skip("no C++ compiler, or a torch that compiles wrong gradients")
    shutil.copytree(home / "data/toy", tmp_path / "data/toy")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(model, "balance_loss", bug)
    with pytest.raises(Exception, match="a_name_with_a_typo"):
        start("train", f"{TOY} --compile")


# -----------------------------------------------------------------------------
# two writers


WRITERS = {"train": (f"{TOY} --max_iters 2 --out_dir", "train.optimizer_step",
                     ["ckpt.pt", "log.jsonl"]),
           "prepare": ("--toy --stories 120 --data_dir", "prepare_tinystories.toy_story",
                       ["meta.json", "train.bin", "val.bin"])}


def two_writers(script):
    """One of them stops in the midst of its work, until the other one is refused."""
    args, where, files = WRITERS[script]

    def stops_once():
        module, name = where.split(".")
        function = getattr(sys.modules[module], name)

        def stopped(*args):
            setattr(sys.modules[module], name, function)
            os.kill(os.getpid(), signal.SIGSTOP)
            return function(*args)

        setattr(sys.modules[module], name, stopped)
        start(script, f"{args} out/both")

    def write(folder):
        return in_a_fork(start, script, f"{args} {folder}")

    first = fork(stops_once, err="error")
    assert os.WIFSTOPPED(os.waitpid(first, os.WUNTRACED)[1]), Path("error").read_text()
    code, _, error = write("out/both")
    line = "Another process writes in out/both; wait for its end, or take another folder."
    assert (code, error.strip()) == (1, line)
    os.kill(first, signal.SIGCONT)
    assert exit_code(first) == 0, Path("error").read_text()
    assert sorted(path.name for path in Path("out/both").iterdir()) == [".lock", *files]
    assert write("out/alone")[0] == 0
    Path("out/both/ckpt.pt.0a1b2c3d.tmp").write_bytes(b"half of a checkpoint, of a killed run")
    shutil.copytree("out/both", "out/first")
    assert write("out/both")[0] == 0  # the lock is free again
    assert not list(Path("out/both").glob("*.tmp"))


@pytest.mark.parametrize("script", WRITERS)
def test_a_second_writer_is_refused_and_the_first_is_not_disturbed(script, forks, home, tmp_path):
    """Two at once in one folder: the second ends with a line, the first as if it was alone; nothing
    is mixed."""
    shutil.copytree(home / "data/toy", tmp_path / "data/toy")
    code, _, error = forks(tmp_path, two_writers, script)
    assert code == 0, error
    first, alone = tmp_path / "out/first", tmp_path / "out/alone"
    if script == "train":
        assert_same_run(first / "ckpt.pt", alone / "ckpt.pt")
    else:
        for name in WRITERS[script][-1]:
            assert (first / name).read_bytes() == (alone / name).read_bytes()


def two_writers_at_once(script):
    args, _, files = WRITERS[script]
    for i in range(5):
        both = [fork(start, script, f"{args} out/{i}", err=f"error{k}") for k in range(2)]
        (code, _), (other, line) = ends = sorted(
            (exit_code(child), Path(f"error{k}").read_text()) for k, child in enumerate(both))
        assert code == 0 and (other == 0 or "Another process writes in" in line), ends
        # the first checkpoint is kept where the second writer came after the first
        names = {path.name for path in Path(f"out/{i}").iterdir()}
        assert names - {"ckpt.old.pt"} == {".lock", *files}, names


@pytest.mark.slow
@pytest.mark.parametrize("script", WRITERS)
def test_of_two_writers_at_once_each_ends_or_is_refused(script, forks, home, tmp_path):
    """Making the folder and taking the lock run against each other."""
    shutil.copytree(home / "data/toy", tmp_path / "data/toy")
    code, _, error = forks(tmp_path, two_writers_at_once, script)
    assert code == 0, error


def dies_with_a_lock():
    common.locked("x").__enter__()
    os.kill(os.getpid(), signal.SIGKILL)


def test_a_lock_does_not_outlive_its_process(forks, tmp_path):
    assert forks(tmp_path, dies_with_a_lock)[0] == -signal.SIGKILL
    with common.locked(tmp_path / "x"):
        with pytest.raises(model.BadInput, match="Another process"), common.locked(tmp_path / "x"):
            pass
    with common.locked(tmp_path / "x"):
        pass


def makes_one(error):
    def acquire(self, *args, **options):
        Path(self.lock_file).touch()
        raise error

    return acquire


WRITE = {"train": f"{TOY} --out_dir out/new", "prepare": "--toy --stories 50 --data_dir data/new",
         "pretrained.nanogpt": "nano --output data/new"}
NO_LOCKS = [NotImplementedError("FileSystem does not appear to support flock; use SoftFileLock instead"),
            OSError(errno.EOPNOTSUPP, "Operation not supported"), OSError(errno.ENOLCK, "No locks available"),
            OSError(errno.ENOSYS, "Function not implemented")]


@pytest.mark.parametrize("error", NO_LOCKS, ids=str)
@pytest.mark.parametrize("script", WRITE)
def test_a_file_system_without_locks_gets_one_line_and_keeps_no_folder(script, error, home, tmp_path, monkeypatch):
    """As on some network file systems: filelock opens its file, and then the system says no."""
    shutil.copytree(home / "data/toy", tmp_path / "data/toy")
    shutil.copytree(home / "data/toy", tmp_path / "nano")
    (tmp_path / "out").mkdir()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(common.FileLock, "acquire", makes_one(error))
    before = stamps(tmp_path)
    code, message = call(script, WRITE[script])
    assert code == 1 and "/new is on a file system that cannot lock files" in message and "\n" not in message
    assert "take a folder on a local disk" in message and stamps(tmp_path) == before


def test_a_folder_goes_whose_lock_has_gone(tmp_path, monkeypatch):
    """Some versions of filelock take the file away when they release it."""
    release = common.FileLock.release

    def and_unlink(self, *args, **options):
        release(self, *args, **options)
        Path(self.lock_file).unlink(missing_ok=True)

    monkeypatch.setattr(common.FileLock, "release", and_unlink)
    with pytest.raises(KeyError), common.locked(tmp_path / "new"):
        raise KeyError
    assert not (tmp_path / "new").exists()


def test_a_folder_that_cannot_be_written_to_shows_before_the_work(home, monkeypatch):
    """Not after 300 steps, at the first save."""
    def readonly(path):
        raise OSError(errno.EROFS, "Read-only file system", str(path))

    monkeypatch.chdir(home)
    monkeypatch.setattr(common, "check_writable", readonly)
    monkeypatch.setattr(plots, "new_figure", lambda *args: None)  # also where there is no matplotlib
    monkeypatch.setattr(plots, "check_writable", readonly)
    monkeypatch.setattr(train, "optimizer_step", bug)
    monkeypatch.setattr(prepare_tinystories, "toy_story", bug)
    for script, args in (("train", TOY), ("prepare", "--toy"), ("plot", "out/toy --output x.png")):
        code, message = call(script, args)
        assert code == 1 and message.endswith("Read-only file system")


def test_a_linked_checkpoint_that_cannot_be_written_shows_before_the_work(home, tmp_path, monkeypatch):
    """The folder may be written to; what the link leads to may not."""
    shutil.copytree(home / "data/toy", tmp_path / "data/toy")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(train, "optimizer_step", bug)
    Path("out").mkdir()
    Path("out/ckpt.pt").symlink_to("/proc/disk/large.pt")
    code, message = call("train", f"{TOY} --out_dir out")
    assert code == 1 and message.startswith("/proc/disk")


def test_a_bug_within_a_write_is_not_taken_for_a_full_disk(tmp_path):
    """A NameError on the way out of an OSError: its own traceback, and no line about a file."""
    with pytest.raises(NameError), common.replacing(tmp_path / "x"):
        try:
            open(tmp_path / "nowhere")
        except OSError:
            bug()
    assert not list(tmp_path.iterdir())


def test_a_linked_checkpoint_stays_a_link(home, tmp_path, monkeypatch):
    """What it leads to changes: somebody keeps large files on another disk."""
    shutil.copytree(home / "data/toy", tmp_path / "data/toy")
    monkeypatch.chdir(tmp_path)
    Path("disk").mkdir()
    Path("out").mkdir()
    Path("out/ckpt.pt").symlink_to(tmp_path / "disk/large.pt")
    assert call("train", f"{TOY} --max_iters 1 --out_dir out") == (0, "")
    assert Path("out/ckpt.pt").is_symlink() and torch.load("disk/large.pt", weights_only=True)["iter_num"] == 1


# -----------------------------------------------------------------------------
# interruptions


@pytest.mark.parametrize("stops", [(3, 7), (2, 6), (4, 8)],
                         ids=["between", "at a log line", "at an evaluation"])
@pytest.mark.parametrize("how", SIGNALS)
def test_interrupted_run_goes_on_bit_identically(how, stops, home, monkeypatch, capsys):
    """Ctrl-C, or a terminal that closes, saves the step; --resume ends where a run without a break does, with dropout
    and a random share of the positions, and with every line of its log. Guards a resume that forgets the generators
    (nanoGPT #467)."""
    monkeypatch.chdir(home)
    step, steps = train.optimizer_step, []

    def interrupted(*args):
        steps.append(1)
        if len(steps) in stops:
            signal.raise_signal(how)
            if how != signal.SIGINT:
                signal.raise_signal(how)  # a closing terminal may say it twice; only a second Ctrl-C is impatience
        return step(*args)

    monkeypatch.setattr(train, "optimizer_step", interrupted)
    out = ["--out_dir", f"out/broken{how}-{stops[0]}"]
    assert call("train", [*TOY.split(), *out])[0] == 130
    assert f"stopped after step {stops[0]}" in capsys.readouterr().err
    assert call("train", ["--resume", *out])[0] == 130
    assert call("train", ["--resume", *out]) == (0, "")
    assert len(steps) == 12
    assert_same_run(f"{out[1]}/ckpt.pt", "out/toy/ckpt.pt")
    assert Path(out[1], "log.jsonl").read_text().count("\n") == 6 + 3
    assert signal.getsignal(how) is signal.default_int_handler
    assert call("train", ["--resume", *out]) == (0, "")
    assert "complete after 12 steps" in capsys.readouterr().out


def test_a_second_ctrl_c_ends_a_run_at_once(home, monkeypatch, capsys):
    """It does not wait for the step."""
    monkeypatch.chdir(home)

    def impatient(*args):
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(train, "optimizer_step", impatient)
    assert call("train", f"{TOY} --out_dir out/impatient") == (130, "")
    assert not Path("out/impatient").exists()  # nothing was written, so no folder is left


def test_a_new_run_keeps_the_old_checkpoint(home, monkeypatch):
    """Whoever forgets --resume and notices finds the finished model again, as it was."""
    monkeypatch.chdir(home)
    shutil.copytree("out/toy", "out/twice")
    old = Path("out/twice/ckpt.pt").read_bytes()
    step = train.optimizer_step
    monkeypatch.setattr(train, "optimizer_step", lambda *args: signal.raise_signal(signal.SIGINT) or step(*args))
    assert call("train", f"{TOY} --out_dir out/twice")[0] == 130
    assert torch.load("out/twice/ckpt.pt", weights_only=True)["iter_num"] == 1
    assert Path("out/twice/ckpt.old.pt").read_bytes() == old
    assert call("train", "--resume --out_dir out/twice")[0] == 130
    assert Path("out/twice/ckpt.old.pt").read_bytes() == old


@pytest.mark.parametrize("name, text", [("ckpt.pt", b"precious"), ("log.jsonl", b"keep\n")])
def test_a_new_run_writes_over_nothing_that_is_not_its_own(name, text, home, tmp_path, monkeypatch):
    """Its log would go at once, and the checkpoint that is kept with the run after it."""
    monkeypatch.chdir(home)
    (tmp_path / name).write_bytes(text)
    code, message = call("train", f"{TOY} --out_dir {tmp_path}")
    assert code == 1 and message.startswith(f"{tmp_path / name} is not of train.py") and "\n" not in message
    assert contents(tmp_path) == {tmp_path / name: text}


def test_an_interrupted_run_that_has_diverged_saves_nothing(home, monkeypatch):
    monkeypatch.chdir(home)
    step, steps, before = train.optimizer_step, [], contents(home)

    def interrupted(*args):
        steps.append(1)
        if len(steps) == 5:
            signal.raise_signal(signal.SIGINT)
        return step(*args)

    monkeypatch.setattr(train, "optimizer_step", interrupted)
    code, message = call("train", f"{TOY} --lr 1e30 --log_interval 100")
    assert code == 1 and "has diverged" in message and contents(home) == before


def test_a_second_ctrl_c_while_saving_leaves_the_old_files(home, monkeypatch, capsys):
    """It ends the run at once and without a traceback, although torch.save covers the interrupt
    with an error of its own.
    """
    monkeypatch.chdir(home)
    before, replacing = contents(home), common.replacing

    class Interrupted:
        def write(self, data):
            raise KeyboardInterrupt

        def __getattr__(self, name):
            return lambda *args: None

    @contextmanager
    def interrupted(*paths):
        with replacing(*paths):
            yield Interrupted()

    monkeypatch.setattr(train, "replacing", interrupted)
    with replacing(home / "x"):
        pass
    (home / "x").unlink()
    shutil.rmtree(home / "out/new", ignore_errors=True)
    assert call("train", f"{TOY} --out_dir out/new") == (130, "")
    assert capsys.readouterr().err.endswith("\ninterrupted\n") and contents(home) == before


def test_files_that_belong_together_change_together(tmp_path, monkeypatch):
    """A disk that fills up with the last bytes of any of them leaves all of the old ones."""
    paths = [tmp_path / name for name in "abc"]
    for path in paths:
        path.write_text("old")
    for fail in range(3):
        calls, fsync = [], os.fsync

        def full(fd):
            calls.append(fd)
            if len(calls) == fail + 1:
                raise OSError(errno.ENOSPC, "No space left on device")
            fsync(fd)

        with monkeypatch.context() as patch, pytest.raises(OSError, match="No space"):
            patch.setattr(os, "fsync", full)
            with common.replacing(*paths) as files:
                for file in files:
                    file.write(b"new")
        assert {path.name: path.read_text() for path in tmp_path.iterdir()} == dict.fromkeys("abc", "old")
    renamed, replace = [], os.replace
    monkeypatch.setattr(os, "replace", lambda a, b: renamed.append((b.name, paths[2].exists())) or replace(a, b))
    with common.replacing(*paths) as files:
        for file in files:
            file.write(b"new")
    assert renamed == [("a", False), ("b", False), ("c", False)]
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == dict.fromkeys("abc", "new")


def test_a_background_job_goes_on_ignoring_ctrl_c(home, monkeypatch):
    monkeypatch.chdir(home)
    step = train.optimizer_step
    monkeypatch.setattr(train, "optimizer_step", lambda *args: signal.raise_signal(signal.SIGINT) or step(*args))
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    assert call("train", f"{TOY} --max_iters 2 --out_dir out/background") == (0, "")


def test_a_larger_max_iters_trains_on(home, monkeypatch):
    monkeypatch.chdir(home)
    shutil.copytree("out/toy", "out/longer")
    assert call("train", "--resume --out_dir out/longer --max_iters 30") == (0, "")
    assert torch.load("out/longer/ckpt.pt", weights_only=True)["iter_num"] == 30


KILLED = (f"{TOY} --eval_interval 1 --warmup 0 --lr 1e-3 --min_lr 1e-3 "  # one rate at any length
          "--out_dir out/killed")


def kill_many(n, script, args, check, written):
    """Start a script n times, kill -9 it at a random moment each time, and look at what it left.
    The first one ends by itself, and shows how long that takes. Every other one of those that are
    killed has written what changes `written` before the moment begins to be waited for."""
    rng, longest = random.Random(0), None
    for i in range(n + 1):
        begin, before = time.monotonic(), written()
        child = fork(start, script, args(i), err="error")
        if i == 0:
            assert exit_code(child) == 0, Path("error").read_text()
            longest = time.monotonic() - begin
        else:
            if i % 2 == 0:
                wait_until(lambda: written() != before)
            time.sleep(rng.uniform(0, longest))
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
        check()


def kill_prepare(n):
    """The three files belong together, of the old text or of the new one. While they are renamed
    meta.json is away, which says that there is no data until the next run ends; but not before the
    new ones are whole, by whichever name."""
    folder = Path("data/toy")

    def belong_together(meta, files):
        return all(hashlib.sha256(files(f"{name}.bin").read_bytes()).hexdigest() == split["sha256"]
                   for name, split in json.loads(meta.read_text())["splits"].items())

    def new(name):
        return next(folder.glob(f"{name}.*.tmp"), folder / name)

    was_there = False

    def check():
        nonlocal was_there
        is_there, before = (folder / "meta.json").exists(), was_there
        if is_there or before:
            files = folder.joinpath if is_there else new
            assert belong_together(files("meta.json"), files)
        was_there = is_there

    kill_many(n, "prepare", lambda i: f"--toy --stories {200 + i}", check,
              lambda: folder.exists() and folder.stat().st_mtime_ns)


def kill_train(n):
    """The first child trains one step; the others go on from wherever the one before was killed.
    The checkpoint is whole and so is every line of the log."""
    def check():
        with zipfile.ZipFile("out/killed/ckpt.pt") as file:
            assert file.testzip() is None
        for line in Path("out/killed/log.jsonl").read_text().splitlines():
            json.loads(line)

    resume = "--resume --out_dir out/killed --max_iters 1000000"
    kill_many(n, "train", lambda i: resume if i else f"{KILLED} --max_iters 1", check,
              lambda: steps_of("out/killed/ckpt.pt"))


@pytest.mark.parametrize("n", [6, pytest.param(20, marks=pytest.mark.slow)])
@pytest.mark.parametrize("what", [kill_prepare, kill_train])
def test_kills_lose_nothing(what, n, forks, home, tmp_path, monkeypatch):
    """kill -9 at random moments: prepare leaves the old or the new files, train a checkpoint that a
    resumed run takes to the very state of a run that nobody killed."""
    if what == kill_train:
        shutil.copytree(home / "data/toy", tmp_path / "data/toy")
    code, _, error = forks(tmp_path, what, n)
    assert code == 0, error
    if what == kill_train:
        monkeypatch.chdir(tmp_path)
        reached = steps_of("out/killed/ckpt.pt")
        assert reached > n // 2
        end = f"--max_iters {reached + 2}"
        assert call("train", f"--resume --out_dir out/killed {end}") == (0, "")
        assert call("train", f"{KILLED} {end} --out_dir out/whole") == (0, "")
        assert_same_run("out/killed/ckpt.pt", "out/whole/ckpt.pt")


def write_little(script, args):
    """A script on a disk that is full after 20 kB."""
    import resource

    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
    start(script, args)


@pytest.mark.parametrize("script,args", [("train", TOY), ("prepare", "--toy --stories 600")])
def test_a_full_disk_leaves_the_old_files(script, args, forks, home, tmp_path):
    """A write that fails half-way (here at a limit of the file size): one line, the old files
    whole, nothing else."""
    for folder in ("data/toy", "out/toy"):
        shutil.copytree(home / folder, tmp_path / folder)
    before = contents(tmp_path)
    code, _, error = forks(tmp_path, write_little, script, args)
    assert code == 1 and "free some space" in error.splitlines()[-1]
    assert "Traceback" not in error and contents(tmp_path) == before


def test_input_may_be_given_in_parts_and_no_path_is_empty(tmp_path, monkeypatch, capsys):
    """--input a --input b reads both: guards files that silently count for nothing. An empty path
    is a shell variable that is not set."""
    monkeypatch.chdir(tmp_path)
    for name in "ab":
        Path(f"{name}.txt").write_text(f"{name} story. " * 50 + "<|endoftext|>" + f"one of {name} more.")
    assert call("prepare", "--input a.txt --input b.txt --data_dir both --vocab_size 257") == (0, "")
    meta = json.loads(Path("both/meta.json").read_text())
    assert sum(split["documents"] for split in meta["splits"].values()) == 4
    assert call("train", ["--out_dir", ""])[0] == call("prepare", ["--input", ""])[0] == 2
    assert capsys.readouterr().err.count("is empty") == 2
