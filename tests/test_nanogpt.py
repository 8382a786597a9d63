"""A run of nanoGPT gets a head: its data folder is converted, its checkpoint is read as it is."""

import json
import pickle
import random
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import call

import common
from common import from_checkpoint
from model import GPT, BadInput, GPTConfig
from pretrained import nanogpt
from sample import load
from tokenizer import Characters, TextStream, load_tokenizer

CHARACTERS = "\n !&',-.:;?abcdefghijklmnopqrstuvwxyz_Ä€"
CONVERT = "nano/data --output data/nano"
NANO = "--data_dir data/nano --init_from nano/ckpt.pt --freeze_trunk --n_future 3 --rank 2 --device cpu"


@pytest.fixture
def nano(tmp_path, monkeypatch):
    """What nanoGPT's shakespeare_char leaves: train.bin, val.bin, meta.pkl; ckpt.pt of a compiled model."""
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "nano/data"
    folder.mkdir(parents=True)
    dice = random.Random(0)
    for name, n in (("train", 4000), ("val", 900)):
        ids = [dice.randrange(len(CHARACTERS)) for _ in range(n)]
        np.array(ids, dtype=np.uint16).tofile(folder / f"{name}.bin")
    meta = {"vocab_size": len(CHARACTERS), "itos": dict(enumerate(CHARACTERS)),
            "stoi": {c: i for i, c in enumerate(CHARACTERS)}}
    (folder / "meta.pkl").write_bytes(pickle.dumps(meta))
    torch.manual_seed(0)
    args = dict(n_layer=2, n_head=2, n_embd=16, block_size=32, bias=False, vocab_size=len(CHARACTERS), dropout=0.0)
    state = {f"_orig_mod.{name}": tensor for name, tensor in GPT(GPTConfig(**args)).state_dict().items()}
    torch.save({"model": state, "optimizer": {}, "model_args": args, "iter_num": 7, "best_val_loss": torch.tensor(1.5),
                "config": {"dataset": "shakespeare_char", "compile": True}}, tmp_path / "nano/ckpt.pt")
    return tmp_path / "nano"


def files(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_four_commands_for_a_run_of_nanogpt(nano, capsys):
    """Convert the data, train a head, sample, bench. nanoGPT's files stay as they are, and so do the
    trunk's logits, to the last bit."""
    before = files(nano)
    assert call("pretrained.nanogpt", CONVERT) == (0, "")
    assert call("train", f"{NANO} --max_iters 3 --batch_size 4 --eval_windows 4 --out_dir out/nano") == (0, "")
    assert call("sample", "--out_dir out/nano --max_new_tokens 40 --show_drafts") == (0, "")
    assert call("bench", "--out_dir out/nano --max_new_tokens 8 --rounds 5 --threads 1 "
                         "--dtype float64") == (0, "")  # in which no two logits are as good as equal
    card = json.loads(capsys.readouterr().out.splitlines()[-1])["card"]
    assert (card["vocab_size"], card["prompts"], card["first_difference"]) == (40, 8, {"speculative": None})
    assert files(nano) == before

    ckpt = torch.load(nano / "ckpt.pt", weights_only=True)
    plain, (model, enc, _) = from_checkpoint(ckpt).eval(), load("out/nano", "cpu")
    idx = torch.tensor([enc.encode_ordinary("to be, or not to be: Ä€")])
    with torch.inference_mode():
        theirs = torch.nn.functional.linear(plain.hidden(idx), plain.lm_head.weight)
        assert torch.equal(from_checkpoint(torch.load("out/nano/ckpt.pt", weights_only=True)).eval()(idx), theirs)
        torch.testing.assert_close(model(idx), theirs)  # load stores its weights by columns
    assert call("train", "--resume --max_iters 5 --out_dir out/nano --device cpu") == (0, "")


WRAPPED = ["_fsdp_wrapped_module.", "module.", "_orig_mod.", "module._orig_mod.", "_orig_mod.module.", "module.module.",
           "_orig_mod.module._orig_mod.", ""]


@pytest.mark.parametrize("prefix", WRAPPED)
def test_the_names_that_wrappers_give_are_taken_off(nano, prefix):
    """DataParallel, DDP, torch.compile, of the whole or of its blocks, in any order."""
    ckpt = torch.load(nano / "ckpt.pt", weights_only=True)
    expected = from_checkpoint(ckpt).state_dict()
    names = {name.removeprefix("_orig_mod."): tensor for name, tensor in ckpt["model"].items()}
    for inner in ("", "_orig_mod."):
        state = {prefix + name.replace("h.1.", f"h.1.{inner}"): tensor for name, tensor in names.items()}
        found = from_checkpoint({**ckpt, "model": state}).state_dict()
        assert found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in found)
        torch.save({**ckpt, "model": state}, nano / "ckpt.pt")
    assert call("pretrained.nanogpt", CONVERT) == (0, "")
    assert call("train", f"{NANO} --max_iters 1 --batch_size 4 --eval_windows 4 --out_dir out/nano") == (0, "")


@pytest.mark.parametrize("change", [{"rope": True}, {"n_kv_head": 1}, {"activation": "swiglu"}, {"window": None},
                                    {"draft_vocab": 9}, {"factors": "full"}, {"context": "previous"}], ids=str)
def test_a_setting_of_a_fork_is_refused_by_name(nano, change):
    """With weights of the same names and shapes it would load, and another model would be computed. A
    head's own setting of our older versions matters to that head alone."""
    ckpt, ((name, value),) = torch.load(nano / "ckpt.pt", weights_only=True), change.items()
    older = name in ("draft_vocab", "factors", "context")
    torch.save({**ckpt, "model_args": {**ckpt["model_args"], **change}}, nano / "ckpt.pt")
    assert call("pretrained.nanogpt", CONVERT) == (0, "")
    code, message = call("train", f"{NANO} --max_iters 1 --batch_size 4 --eval_windows 4 --out_dir out/nano")
    if older:
        assert (code, message) == (0, "")
    else:
        assert code == 1 and f"its model_args say {name} = {value!r}" in message and "\n" not in message
        assert "--fresh_head" not in message and not Path("out/nano").exists()
    with pytest.raises(BadInput, match=f"say {name} = "):
        from_checkpoint(torch.load(nano / "ckpt.pt", weights_only=True))


def test_settings_that_change_nothing_are_known(nano):
    """What nanoGPT's versions wrote, and ours where it means what is done today."""
    ckpt = torch.load(nano / "ckpt.pt", weights_only=True)
    args = {**ckpt["model_args"], "draft_vocab": 0, "factors": "reduced", "context": "none"}
    from_checkpoint({**ckpt, "model_args": args})
    first = {name: value for name, value in args.items() if name != "bias"}  # before nanoGPT had it
    with pytest.raises(BadInput, match="Missing key.*bias"):
        from_checkpoint({**ckpt, "model_args": first})


@pytest.mark.parametrize("name", ["n_layer", "n_head", "n_embd", "block_size", "vocab_size"])
def test_a_shape_that_is_not_said_is_no_default(name, nano):
    """12 heads where there were 2 fit the same weights, and are another model."""
    ckpt = torch.load(nano / "ckpt.pt", weights_only=True)
    del ckpt["model_args"][name]
    with pytest.raises(BadInput, match=f"do not say {name}"):
        from_checkpoint(ckpt)


def test_characters_round_trip_and_begin_with_a_newline(nano):
    assert call("pretrained.nanogpt", CONVERT) == (0, "")
    meta = common.read_meta("data/nano")
    enc = load_tokenizer(meta["tokenizer"])
    assert isinstance(enc, Characters) and not enc.ends and enc.n_vocab == len(CHARACTERS)
    ids = enc.encode_ordinary(CHARACTERS)
    assert ids == list(range(40)) and enc.decode(ids) == CHARACTERS
    stream = TextStream(enc)
    assert "".join(map(stream.push, ids)) + stream.end() == CHARACTERS
    assert enc.prompt_ids("") == [0] and enc.prompt_ids("to be") == enc.encode_ordinary("to be")
    for name in ("train.bin", "val.bin"):
        assert Path("data/nano", name).read_bytes() == (nano / "data" / name).read_bytes()
    val = np.fromfile("nano/data/val.bin", dtype=np.uint16)
    per_token = len(enc.decode(val.tolist()).encode()) / len(val)
    assert meta["bytes_per_token"] == pytest.approx(per_token)
    assert {name: part["tokens"] for name, part in meta["splits"].items()} == {"train": 4000, "val": 900}
    assert len(meta["prompts"]) == 8 and meta["prompts"][0] == enc.decode(val[:16].tolist())


def test_without_meta_pkl_the_tokens_are_gpt2s(nano, monkeypatch):
    """Here a stand-in of 300 ids, since GPT-2's own need a download."""
    def gpt2_tokenizer():
        tokens = [chr(b) for b in range(256)] + ["x" * k for k in range(2, 45)]
        return {"name": "gpt2", "pattern": r"[\s\S]", "tokens": tokens}

    monkeypatch.setattr(nanogpt, "gpt2_tokenizer", gpt2_tokenizer)
    (nano / "data/meta.pkl").unlink()
    assert call("pretrained.nanogpt", CONVERT) == (0, "")
    meta = common.read_meta("data/nano")
    assert (meta["tokenizer"]["name"], meta["vocab_size"]) == ("gpt2", 300)
    code, message = call("train", f"{NANO} --max_iters 1 --out_dir out/nano")  # 40 ids in the checkpoint
    assert code == 1 and "another tokenizer" in message and not Path("out/nano").exists()


@pytest.mark.parametrize("left", ["meta.pkl", "train.bin", "input.txt"])
def test_nothing_is_written_over(nano, left):
    """Neither by our texts, nor by a conversion, nor is anything left behind, after which the folder
    would not be nanoGPT's any more. The folders of its BPE data have no meta.pkl."""
    if left != "meta.pkl":
        (nano / "data/meta.pkl").unlink()
        (nano / "data/input.txt").write_text("To be")
    if left == "input.txt":
        for split in ("train", "val"):
            (nano / f"data/{split}.bin").unlink()
    before = files(nano)
    code, message = call("prepare", "--input nano/data/input.txt --data_dir nano/data")
    assert code == 1 and ", which this script did not write" in message and files(nano) == before
    if left != "meta.pkl":
        return
    code, message = call("prepare", "--toy --stories 50 --data_dir nano/data")
    assert code == 1 and ", which this script did not write" in message
    code, message = call("pretrained.nanogpt", "nano/data --output nano/data")
    assert code == 1 and message.endswith("and nothing is written over; take another --output")
    assert files(nano) == before
    assert call("pretrained.nanogpt", CONVERT) == (0, "")
    there = files(Path("data/nano"))
    assert "nothing is written over" in call("pretrained.nanogpt", CONVERT)[1]
    assert files(Path("data/nano")) == there


def test_an_interrupted_conversion_leaves_no_data(nano, monkeypatch):
    """It dies while it writes: no half of a file is taken for the whole, and the same command works."""
    monkeypatch.setattr(nanogpt.json, "dumps", lambda meta: (_ for _ in ()).throw(KeyboardInterrupt))
    assert call("pretrained.nanogpt", CONVERT)[0] == 130
    monkeypatch.undo()
    monkeypatch.chdir(nano.parent)
    with pytest.raises(BadInput, match="There is no data in data/nano"):
        common.read_meta("data/nano")
    assert call("pretrained.nanogpt", CONVERT) == (0, "")
    common.read_meta("data/nano")


def test_a_folder_of_nanogpts_own_is_no_data_of_ours(nano):
    """The core knows its format no more, and says so in one line."""
    code, message = call("train", NANO.replace("data/nano", "nano/data"))
    assert code == 1 and message.startswith("There is no data in nano/data") and "\n" not in message
    code, message = call("pretrained.nanogpt", "nowhere --output data/nano")
    assert code == 1 and message.startswith("There is no nowhere/train.bin") and not Path("data/nano").exists()


class Hostile:
    def __reduce__(self):
        return open, ("owned", "w")


@pytest.mark.parametrize("pickled", [
    pickle.dumps(Hostile()), pickle.dumps({"itos": Hostile()}), b"", b"hello", pickle.dumps({"itos": {0: "a"}})[:-3],
    pickle.dumps({"stoi": {}}), pickle.dumps([1]), pickle.dumps({"itos": {0: "a", 2: "b"}}),
    pickle.dumps({"itos": {0: 1}}), pickle.dumps({"itos": {0: "\ud800"}}), pickle.dumps({"itos": {0: "a", 1: "a"}})])
def test_a_meta_pkl_that_is_none_gets_one_line_and_runs_nothing(nano, pickled):
    (nano / "data/meta.pkl").write_bytes(pickled)
    code, message = call("pretrained.nanogpt", CONVERT)
    assert code == 1 and "meta.pkl" in message and "nothing in it was run" in message and "\n" not in message
    assert not Path("owned").exists() and not Path("data/nano").exists()


@pytest.mark.parametrize("name,data", [("val", b""), ("train", bytes(401)), ("val", b"\x07\x00" * 15),
                                       ("train", b"\x28\x00" * 500), ("val", None)])
def test_bin_files_that_do_not_fit_get_one_line(nano, name, data):
    """Empty, half an id, too short, an id that no character has, none at all."""
    path = nano / f"data/{name}.bin"
    path.unlink() if data is None else path.write_bytes(data)
    code, message = call("pretrained.nanogpt", CONVERT)
    assert code == 1 and f"{name}.bin" in message and "\n" not in message and not Path("data/nano").exists()


def test_a_character_that_the_model_does_not_know_is_named(nano):
    assert call("pretrained.nanogpt", CONVERT) == (0, "")
    assert call("train", f"{NANO} --max_iters 1 --batch_size 4 --eval_windows 4 --out_dir out/nano") == (0, "")
    code, message = call("sample", ["--out_dir", "out/nano", "--prompt", "to bé"])
    assert code == 1 and message == "the model knows 40 characters, and 'é' is none of them"
    with pytest.raises(BadInput, match="'Z'"):
        Characters("abc", "abc").encode_ordinary("abZ")
