"""What the scripts share: errors in one line, files that are whole or not there, checkpoints, devices."""

import argparse
import errno
import os
import re
import sys
import warnings
from contextlib import ExitStack, contextmanager
from pathlib import Path

import torch

from model import GPT

# -----------------------------------------------------------------------------
# a user's mistake gets one line, not a traceback


class ArgumentParser(argparse.ArgumentParser):
    """argparse with the script's docstring for help and errors of one line."""

    def __init__(self, description, **options):
        super().__init__(description=description, formatter_class=argparse.RawDescriptionHelpFormatter,
                         allow_abbrev=False, **options)

    def error(self, message):
        self.exit(2, f"{self.prog}: {message} (--help explains the flags)\n")


def number(kind, low, high=float("inf"), above=False):
    """An argparse type: a finite int or float in [low, high], in (low, high] with `above`."""
    limits = f"{'above' if above else 'at least'} {low}" + (f" and at most {high}" if high < float("inf") else "")

    def parse(text):
        value = kind(text)
        if not (low < value if above else low <= value) or not value <= high or value == float("inf"):
            raise argparse.ArgumentTypeError(f"must be {limits}, not {text}")
        return value

    parse.__name__ = kind.__name__  # argparse names it where the text is no number at all
    return parse


def utf8(text):
    """An argparse type: text, without the escapes that Python puts where the shell's bytes are not utf-8."""
    try:
        text.encode()
    except UnicodeEncodeError:
        raise argparse.ArgumentTypeError("is not valid utf-8") from None
    return text


DISK_FULL = {errno.ENOSPC, errno.EFBIG, getattr(errno, "EDQUOT", errno.ENOSPC)}


def run_script(main):
    """Run main(); what a user or the machine can do wrong ends in one line and a non-zero exit."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")  # a pipe may not speak utf-8
    try:
        main()
    except KeyboardInterrupt:
        print("\ninterrupted", file=sys.stderr)
        sys.exit(130)
    except BrokenPipeError:  # `python sample.py | head`: whoever read our output has gone
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except OSError as e:
        then = "; free some space and try again" if e.errno in DISK_FULL else ""
        sys.exit(f"{e.filename or 'writing'}: {e.strerror or e}{then}")
    except (MemoryError, RuntimeError) as e:  # torch has words for it, and on a CPU no class of its own
        if not isinstance(e, MemoryError) and not re.search("out of memory|not enough memory|allocate memory", str(e)):
            raise
        sys.exit(f"Out of memory ({' '.join(str(e).split())[:200]}). A smaller model, --batch_size or --block_size "
                 "needs less.")


# -----------------------------------------------------------------------------
# files


@contextmanager
def replacing(*paths):
    """A binary file to write for each path, which take the paths' places when the block ends well, else are gone.

    Whenever the process dies, a path holds the old file or the new one, never a part of it. Of several paths the last
    is away while the others change: where it is, they belong together.
    """
    tmps = [Path(path).with_name(Path(path).name + ".tmp") for path in paths]
    try:
        with ExitStack() as stack:
            for tmp in tmps:
                tmp.parent.mkdir(parents=True, exist_ok=True)
            files = [stack.enter_context(open(tmp, "wb")) for tmp in tmps]
            yield files if len(files) > 1 else files[0]
            for file in files:
                file.flush()
                os.fsync(file.fileno())  # now, when nothing is lost yet if the disk is full
        if len(paths) > 1:
            Path(paths[-1]).unlink(missing_ok=True)
        for tmp, path in zip(tmps, paths):
            os.replace(tmp, path)
    except BaseException as e:
        for tmp in tmps:
            if tmp.parent.is_dir():
                tmp.unlink(missing_ok=True)
        error = e.__context__ if isinstance(e.__context__, (OSError, KeyboardInterrupt)) else e  # torch.save hides it
        if isinstance(error, OSError) and (error.filename is None or str(error.filename).endswith(".tmp")):
            error.filename = str(paths[0] if len(paths) == 1 else Path(paths[0]).parent)
        raise error


# -----------------------------------------------------------------------------
# devices and checkpoints


def pick_device(name):
    """The torch.device of a --device flag; auto is cuda, then mps, then cpu."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        x = torch.zeros(1, device=name)
        x.item()  # fails now, not later, where there is no such device or it holds no values
        return x.device
    except (RuntimeError, AssertionError, NotImplementedError) as e:
        sys.exit(f"--device {name} cannot be used here ({str(e).splitlines()[0]}); try cpu")


def load_model(path, fresh_head=False, **head):
    """(model, checkpoint dict) of a file that train.py or nanoGPT's train.py wrote; options as in GPT.from_checkpoint.

    Only plain tensors and plain Python are read (weights_only), so a foreign file cannot run code.
    """
    path = Path(path)
    if path.is_dir():
        sys.exit(f"{path} is a folder; name the checkpoint in it, {path / 'ckpt.pt'}")
    if not path.is_file():
        there = [str(p) for p in sorted(path.parent.glob("*.pt"))]
        sys.exit(f"There is no checkpoint {path}; " + (f"{path.parent} holds {', '.join(there)}" if there else
                 f"train one first: python train.py --out_dir {path.parent}"))
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of a foreign file torch has more to say than our one line
            ckpt = torch.load(path, map_location="cpu", weights_only=True)
        ckpt["model"], ckpt["model_args"]
    except Exception as e:  # a pickle that asks for code, half a file, another format: torch raises many kinds
        sys.exit(f"{path} is not a checkpoint of plain tensors with 'model' and 'model_args', or it is damaged "
                 f"({type(e).__name__}); nothing in it was run. Train anew or take another file.")
    try:
        return GPT.from_checkpoint(ckpt, fresh_head, **head), ckpt
    except Exception as e:
        reason = " ".join(str(e).split())[:300]
        sys.exit(f"{path} holds no model that fits: {reason or type(e).__name__}. If only its head is at fault, "
                 f"train.py --init_from {path} --fresh_head keeps the trunk.")
