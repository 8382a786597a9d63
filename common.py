"""What the scripts share: errors in one line, whole files, one writer per folder, checkpoints."""

import argparse
import errno
import hashlib
import json
import math
import os
import re
import secrets
import signal
import sys
import threading
import warnings
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import fields
from pathlib import Path

# Threads of GNU's OpenMP wait awake for 300,000 turns by default. Beside a busy process all of them
# wait for one that has no core, and little gets done. The setting is read when torch is loaded, so
# scripts import this file first.
if "OMP_WAIT_POLICY" not in os.environ:
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")

import numpy as np
import torch
from filelock import FileLock, Timeout  # comes with torch
from tqdm import tqdm

from model import BadInput, GPTConfig, new_model

# -----------------------------------------------------------------------------
# a user's mistake gets one line, not a traceback


class ArgumentParser(argparse.ArgumentParser):
    """argparse with the script's docstring for help and errors of one line."""

    def __init__(self, description, **options):
        super().__init__(description=description or "", allow_abbrev=False,  # python -OO has none
                         formatter_class=argparse.RawDescriptionHelpFormatter, **options)

    def error(self, message):
        self.exit(2, f"{self.prog}: {message} (--help explains the flags)\n")


def number(kind, low, high=float("inf"), above=False):
    """An argparse type: a finite int or float in [low, high], in (low, high] with `above`."""
    limits = f"above {low}" if above else f"at least {low}"
    limits += f" and at most {high}" if high < math.inf else ""

    def parse(text):
        value = kind(text)
        if not low <= value <= high or above and value == low or value == math.inf:
            raise argparse.ArgumentTypeError(f"must be {limits}, not {text}")
        return value

    parse.__name__ = kind.__name__  # argparse names it where the text is no number at all
    return parse


any_seed = number(int, 0, 2**32 - 1)  # a CPU's generator looks at 32 bits: larger ones repeat


def in_a_line(error):
    """The words of somebody else's exception, which may be many lines, or none."""
    return " ".join(str(error).split())[:300] or type(error).__name__


def utf8(text):
    """An argparse type: text, and no bytes of a shell that are not utf-8."""
    try:
        text.encode()
    except UnicodeEncodeError:
        raise argparse.ArgumentTypeError("is not valid utf-8") from None
    return text


def any_path(text):
    """An argparse type: a path, also with the ~ that a shell leaves in --flag=~/folder."""
    if not text:
        raise argparse.ArgumentTypeError("is empty")
    return os.path.expanduser(text)


DISK_FULL = {errno.ENOSPC, errno.EFBIG, getattr(errno, "EDQUOT", errno.ENOSPC)}
NO_LOCKS = {errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK, getattr(errno, "ENOTSUP", errno.ENOSYS)}


def run_script(main):
    """Run main(); what a user or the machine can do wrong ends in one line and a non-zero exit."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")  # a pipe may not speak utf-8
    try:
        main()
    except BadInput as e:
        sys.exit(str(e))
    except KeyboardInterrupt:
        print("\ninterrupted", file=sys.stderr)
        sys.exit(130)
    except BrokenPipeError:  # `python sample.py | head`: whoever read our output has gone
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except OSError as e:
        then = "; free some space and try again" if e.errno in DISK_FULL else ""
        sys.exit(f"{e.filename or 'writing'}: {e.strerror or e}{then}")
    except (MemoryError, RuntimeError) as e:  # torch has words for it, and on a CPU no class
        about_memory = "out of memory|not enough memory|allocate memory"
        if not isinstance(e, MemoryError) and not re.search(about_memory, str(e)):
            raise
        sys.exit(f"Out of memory ({' '.join(str(e).split())[:200]}). A smaller model, --batch_size "
                 "or --block_size needs less.")


def progress_bar(**options):
    """tqdm, which is silent where there is no stderr (pythonw, 2>&-)."""
    if sys.stderr is None:
        options["disable"] = True
    return tqdm(mininterval=1.0, **options)


# -----------------------------------------------------------------------------
# files


@contextmanager
def replacing(*paths):
    """A binary file to write for each path; they take the paths' places when the block ends well.

    Whenever the process dies, a path holds the old file or the new one, never a part of it. Of
    several paths the last is away while the others change: where it is, they belong together. A
    link stays, and the file that it leads to changes.
    """
    paths = [Path(path).resolve() for path in paths]
    tmps = [temporary(path) for path in paths]
    try:
        with ExitStack() as stack:
            files = [stack.enter_context(open(tmp, "xb")) for tmp in tmps]
            yield files if len(files) > 1 else files[0]
            for file in files:
                file.flush()
                os.fsync(file.fileno())  # now, when nothing is lost yet if the disk is full
        if len(paths) > 1:
            paths[-1].unlink(missing_ok=True)
        for tmp, path in zip(tmps, paths):
            os.replace(tmp, path)
    except BaseException as e:
        for tmp in tmps:
            tmp.unlink(missing_ok=True)
        # torch.save's own RuntimeError hides what a full disk or Ctrl-C raised
        hidden = type(e) is RuntimeError and isinstance(e.__context__, (OSError, KeyboardInterrupt))
        error = e.__context__ if hidden else e
        if isinstance(error, OSError) and str(error.filename or ".tmp").endswith(".tmp"):
            error.filename = str(paths[0] if len(paths) == 1 else paths[0].parent)
        raise error


def temporary(path):
    """A name beside path that nobody else has; the folder is made if need be."""
    path.parent.mkdir(parents=True, exist_ok=True)
    return path.with_name(f"{path.name}.{secrets.token_hex(4)}.tmp")


def check_folder(path):
    """BadInput if a file is where a folder is asked for."""
    if Path(path).is_file():
        raise BadInput(f"{path} is a file; name a folder")


@contextmanager
def locked(folder):
    """The folder, made if need be, for this process alone: BadInput if another one writes there.

    The system frees the lock when the process ends, however it ends. What a killed writer left
    half-written goes, and so does a new folder in which nothing gets written.
    """
    folder = Path(folder)
    check_folder(folder)
    is_new, error = not folder.exists(), None
    folder.mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder / ".lock", timeout=0)
    try:
        lock.acquire()
    except Timeout:
        raise BadInput(f"Another process writes in {folder}; wait for its end, or take another "
                       "folder.") from None
    except (OSError, NotImplementedError) as e:  # the second is filelock's for ENOSYS
        error = e
    try:
        if getattr(error, "errno", errno.ENOSYS if error else None) in NO_LOCKS:
            raise BadInput(f"{folder} is on a file system that cannot lock files, so two writers "
                           "could mix theirs; take a folder on a local disk")
        if error:
            error.filename = str(folder)  # the lock is not what the user knows
            raise error
        check_writable(folder / "probe")  # where an old lock can be opened, a new file may not
        for file in folder.iterdir():
            if re.search(r"\.[0-9a-f]{8}\.tmp$", file.name):
                file.unlink()
        yield folder
    finally:
        lock.release()
        if is_new and set(os.listdir(folder)) <= {".lock"}:  # which some versions take away
            (folder / ".lock").unlink(missing_ok=True)
            folder.rmdir()


def check_writable(path):
    """OSError if no file can be written where path is: to be called before long work."""
    path = Path(path).resolve()
    probe = temporary(path)
    try:
        open(probe, "xb").close()
        probe.unlink()
    except OSError as e:
        e.filename = str(path.parent)  # the probe is not what the user knows
        raise


# -----------------------------------------------------------------------------
# the machine


def pick_device(name):
    """The torch.device of a --device flag; auto is cuda, then mps, then cpu."""
    if name == "auto":
        mps = "mps" if torch.backends.mps.is_available() else "cpu"
        name = "cuda" if torch.cuda.is_available() else mps
    try:
        x = torch.zeros(1, device=name)
        x.item()  # fails now, not later, where there is no such device or it holds no values
        return x.device
    except (RuntimeError, AssertionError, NotImplementedError, ImportError) as e:
        why = str(e).splitlines()[0]
        raise BadInput(f"--device {name} cannot be used here ({why}); try cpu") from None


@contextmanager
def onednn(enabled):
    """Within the block, torch's CPU kernels are not oneDNN's unless enabled."""
    before = torch.backends.mkldnn.enabled
    torch.backends.mkldnn.enabled = before and enabled
    try:
        yield
    finally:
        torch.backends.mkldnn.enabled = before


@contextmanager
def stop_signals(patient=False):
    """A list that is empty until Ctrl-C, SIGTERM or SIGHUP, and then holds the signal's number.

    A second Ctrl-C interrupts as usual, unless patient: torchrun passes on what the terminal has
    sent already. A second one of the others changes nothing: a terminal that closes may send
    SIGHUP twice. Off the main thread, Python allows no handlers: it stays empty.
    """
    caught, before = [], {}

    def note(number, frame):
        caught.append(number)
        if number == signal.SIGINT and not patient:
            signal.signal(number, before[number])
            with suppress(OSError):  # a step may take long
                os.write(2, b"\nthis step is the last one; Ctrl-C once more loses it\n")

    names = [name for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]
    main = threading.current_thread() is threading.main_thread()
    for s in [getattr(signal, name) for name in names] if main else []:
        if signal.getsignal(s) not in (signal.SIG_IGN, None):  # ignored by a shell's background job
            before[s] = signal.signal(s, note)
    try:
        yield caught
    finally:
        for s, handler in before.items():
            signal.signal(s, handler)


# -----------------------------------------------------------------------------
# checkpoints and data


# settings of older versions' heads, and their values where a head is one of today's
OLD_HEADS = {"draft_vocab": 0, "factors": "reduced", "context": "none"}
WRAPPERS = re.compile(r"^((_orig_mod\.)?module\.)+|\b(_orig_mod|_fsdp_wrapped_module)\.")


def from_checkpoint(ckpt, fresh_head=False, **changes):
    """The model of a checkpoint dict, ours or one of nanoGPT's train.py, loaded strictly.

    changes: fields of GPTConfig that differ from the checkpoint's (n_future, rank, head, target,
    dropout, n_token). Where they ask for another head, or with fresh_head, the old one is left out
    and a fresh one is put on the trunk. BadInput for what does not fit, or settings not known here.
    """
    args = {"head": "cp", "n_future": 1, "rank": 1} | ckpt["model_args"]  # nanoGPT's has no head
    old = {f.name: args.pop(f.name) for f in fields(GPTConfig) if f.name in args}
    for name in ("n_layer", "n_head", "n_embd", "block_size", "vocab_size"):
        if name not in old:  # a default would do other things than the model, without a word
            raise BadInput(f"its model_args do not say {name}")
    new = {**old, **changes}
    fresh_head |= any(old[key] != new[key] for key in ("head", "n_future", "rank"))
    for name, value in args.items():
        if name not in OLD_HEADS or not fresh_head and value != OLD_HEADS[name]:
            raise BadInput(f"its model_args say {name} = {value!r}, which is not known here")
    config = GPTConfig(**new)
    model = new_model(config)
    # nanoGPT once saved the causal mask
    state = {WRAPPERS.sub("", name): tensor for name, tensor in ckpt["model"].items()
             if not name.endswith(".attn.bias")}
    if config.rank == 1:  # an older version had a router for one component, too
        state = {name: tensor for name, tensor in state.items() if ".router." not in name}
    if fresh_head:
        fresh = model.state_dict()
        state = {name: tensor for name, tensor in state.items() if not name.startswith("head.")}
        state |= {name: tensor for name, tensor in fresh.items() if name.startswith("head.")}
    try:
        model.load_state_dict(state)
    except RuntimeError as e:  # torch's list of what is missing, superfluous or of another shape
        raise BadInput(in_a_line(e)) from None
    return model


def load_model(ckpt, path, fresh_head=False, **changes):
    """`from_checkpoint` of what `read_checkpoint` read from path."""
    try:
        return from_checkpoint(ckpt, fresh_head, **changes)
    except BadInput as e:
        def fits(**changes):
            with suppress(BadInput):
                return from_checkpoint(ckpt, True, **changes)

        trunk = fits(head="cp", n_future=1, rank=1)
        if trunk and changes and not fits(**changes):
            raise  # it is what the flags ask for that cannot be
        advice = (" README says how to convert one of an older version; train.py --init_from "
                  f"{path} --fresh_head keeps the trunk alone." if trunk else "")
        raise BadInput(f"{path} holds no model that fits: {e}.{advice}") from None


def read_checkpoint(path, script=None):
    """A checkpoint's dict, plain tensors and Python: no foreign code is run. script writes one."""
    path = Path(path)
    check_folder(path.parent)
    if path.is_dir():
        raise BadInput(f"{path} is a folder; name the checkpoint in it, {path / 'ckpt.pt'}")
    if not path.exists():
        there = ", ".join(str(p) for p in sorted(path.parent.glob("*.pt")))
        advice = (f"; {path.parent} holds {there}" if there else script and
                  f"; train one first: python {script} --out_dir {path.parent}")
        raise BadInput(f"There is no checkpoint {path}{advice or ''}")
    try:
        with warnings.catch_warnings(), open(path, "rb") as file:
            warnings.simplefilter("ignore")  # of a foreign file torch has more to say than one line
            ckpt = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as e:  # a pickle that asks for code, half a file: torch raises many kinds
        ours = isinstance(e, OSError) and e.filename  # torch's own OSError names no file
        if ours or isinstance(e, MemoryError) or "memory" in str(e):
            raise
        ckpt = None
    keys = ("model", "model_args")
    if (not isinstance(ckpt, dict) or not all(isinstance(ckpt.get(key), dict) for key in keys)
            or not all(map(torch.is_tensor, ckpt["model"].values()))):
        raise BadInput(f"{path} is not a checkpoint of plain tensors with model and model_args, or "
                       "it is damaged; nothing in it was run. Train anew or take another file.")
    return ckpt


def check_meta(meta, where):
    """BadInput unless meta is what prepare_tinystories.py writes, as far as it is used."""
    if isinstance(meta, dict) and isinstance(meta.get("read_by"), str):
        raise BadInput(f"{where} is for another script: python -m {meta['read_by']}")
    try:
        tokens = {token.encode("latin-1") for token in meta["tokenizer"]["tokens"]}
        pattern = meta["tokenizer"]["pattern"]  # None: characters, without an <|endoftext|>
        texts = [meta["tokenizer"]["name"], pattern or "", *meta["prompts"]]
        good = (len(tokens) + (pattern is not None) == meta["vocab_size"] and meta["prompts"]
                and 0 < meta["bytes_per_token"] < math.inf
                and all(isinstance(text, str) for text in texts)
                and all(meta["splits"][split]["tokens"] > 0 for split in ("train", "val")))
    except (KeyError, TypeError, AttributeError, UnicodeEncodeError):
        good = False
    if not good:
        raise BadInput(f"{where} is not a meta file of prepare_tinystories.py, or it is damaged; "
                       "write the data anew.")


HASHED = 2**27  # bytes of a .bin file that is read and compared with its hash; larger ones are not


def read_meta(data_dir):
    """data_dir/meta.json, if train.bin and val.bin are the files that it speaks of."""
    path = Path(data_dir) / "meta.json"
    check_folder(path.parent)
    again = f"python prepare_tinystories.py --data_dir {data_dir} ..."
    if not path.exists():
        raise BadInput(f"There is no data in {data_dir}; write some: {again}")
    try:
        meta = json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        meta = None
    check_meta(meta, path)
    for name in ("train", "val"):
        file, split = path.with_name(f"{name}.bin"), meta["splits"][name]
        size = 2 * split["tokens"]
        same = file.exists() and file.stat().st_size == size
        if same and size <= HASHED:
            data = file.read_bytes()
            same = (hashlib.sha256(data).hexdigest() == split.get("sha256")
                    and np.frombuffer(data, dtype=np.uint16).max() < meta["vocab_size"])
        if not same:
            raise BadInput(f"{file} is not the file of {size:,} bytes that {path} speaks of; write "
                           f"them anew: {again}")
    return meta


class Batches:
    """Batches of training data, which start at n_starts different places.

    A subclass sets n_starts and batch_size, and its at(starts) makes a batch of the numbers of some
    places, a list or an array.
    """

    def random(self, generator, rank=0, ranks=1):
        """Batches at random places, for ever: of every `ranks` batches that one process would get,
        the one of this rank."""
        while True:
            starts = torch.randint(self.n_starts, (ranks, self.batch_size), generator=generator)
            yield self.at(starts[rank].tolist())

    def fixed(self, n):
        """Batches at n evenly spaced places: the same ones at any batch size."""
        starts = np.linspace(0, self.n_starts - 1, n).astype(int)
        for i in range(0, n, self.batch_size):
            yield self.at(starts[i : i + self.batch_size])


def check_tokenizer(ckpt, meta, path):
    """BadInput unless a checkpoint knows the data's tokens under the same ids.

    nanoGPT's holds no tokenizer to compare, so its number of ids must be the data's, padded or not;
    50,257 are GPT-2's.
    """
    name, n = meta["tokenizer"]["name"], meta["vocab_size"]
    if "meta" in ckpt:
        check_meta(ckpt["meta"], path)
        theirs = ckpt["meta"]["tokenizer"]["name"]
        same = ckpt["meta"]["tokenizer"] == meta["tokenizer"]
    else:
        vocab_size = ckpt["model_args"].get("vocab_size")
        theirs = "gpt2" if vocab_size in (50257, 50304) else f"one of {vocab_size} ids"
        same = vocab_size in (n, padded(n)) and theirs in (name, f"one of {vocab_size} ids")
    if not same:
        raise BadInput(f"{path} was trained with another tokenizer ({theirs}) than the data's "
                       f"({name}); take --data_dir with the data it was trained on, or train anew.")


def padded(n_token):
    return -(-n_token // 64) * 64
