"""Write text with a trained model, as it is drawn.

    python sample.py --out_dir out/toy --prompt "Lily went to the" --num_samples 3
    python sample.py --out_dir out/toy --mode plain --temperature 0
    python sample.py --out_dir out/toy --show_drafts

speculative (the default of a model with a head), plain and oracle draw from the same distribution,
see decode.py. So do the other modes; a file of the mode's name says how.
"""

import os
import statistics
import sys
import time
from itertools import pairwise
from pathlib import Path

# before torch: it says how threads wait
from common import (ArgumentParser, any_path, any_seed, check_meta, load_model, number, pick_device,
                    onednn, read_checkpoint, run_script, utf8)
import torch

from decode import Greedy, Stats, generate, generate_oracle, generate_plain, make_sampler
from model import BadInput, door, words
from tokenizer import TextStream, load_tokenizer

MODES = {"speculative": generate, "plain": generate_plain, "oracle": generate_oracle}


def load(out_dir, device="auto", dtype="auto"):
    """(model, tokenizer, checkpoint) of out_dir/ckpt.pt, the model in evaluation mode."""
    path, device = Path(out_dir) / "ckpt.pt", pick_device(device)
    ckpt = read_checkpoint(path, "train.py")
    if "trunk" in ckpt:  # a head on a model from elsewhere
        trunk = ckpt["trunk"] if isinstance(ckpt["trunk"], dict) else {}
        if "door" not in trunk:
            raise BadInput(f"{path} does not say what its trunk is. README says how to convert a "
                           "checkpoint of an older version; else train anew.")
        model, enc = door("trunk", trunk["door"]).load(ckpt, path, device, dtype)
        return model, enc, ckpt
    dtype = "float32" if dtype == "auto" else dtype
    if device.type == "mps" and dtype == "float64":
        raise BadInput("mps has no float64; take --device cpu.")
    if "meta" not in ckpt:
        raise BadInput(f"{path} holds no tokenizer (a checkpoint of nanoGPT?); train.py "
                       f"--init_from {path} makes one that does.")
    check_meta(ckpt["meta"], path)
    model, enc = load_model(ckpt, path), load_tokenizer(ckpt["meta"]["tokenizer"])
    if enc.n_vocab != model.config.n_token:
        raise BadInput(f"{path} holds a model of {model.config.n_token} tokens and a tokenizer of "
                       f"{enc.n_vocab}; train anew.")
    model = model.to(device=device, dtype=getattr(torch, dtype)).eval()
    if device.type == "cpu" and dtype == "float32":  # stored by columns: faster for a few rows
        for p in model.parameters():
            if p.dim() > 1:
                p.data = p.data.flatten(0, -2).T.contiguous().T.view(p.shape)
    return model, enc, ckpt


def fast_kernels(model):
    """A context in which passes of a few rows are fastest: in float32 on a CPU, without oneDNN."""
    return onednn(not (model.device.type == "cpu" and model.dtype == torch.float32))


def best_threads(device, work):
    """The number of CPU threads at which work() takes least. Beside a busy process that is one: two
    would wait for each other."""
    most = torch.get_num_threads()  # torch's own default: the cores that there are
    if device.type != "cpu" or most == 1:
        return most
    seconds = {}
    for n in sorted({most, *(2**k for k in range(most.bit_length()))}):
        torch.set_num_threads(n)
        work()  # starts the threads
        times = [time.perf_counter()]
        for _ in range(5):
            work()
            times.append(time.perf_counter())
        seconds[n] = statistics.median(end - start for start, end in pairwise(times))
    return min(seconds, key=seconds.get)


# -----------------------------------------------------------------------------
# where each token came from

GREENS = {1: 30, 2: 36, 3: 42, 4: 78, 5: 114, 6: 150, 7: 186}  # the later a draft, the paler
COLOURS = {"corrected": 203, "bonus": 75, "plain": 250}


def paint(text, origin, colour):
    """A token in the colour of its origin (see Stats.count), or before a mark, [2] or [c]."""
    if not colour:
        return f"{text}[{origin if isinstance(origin, int) else origin[0]}]"
    code = GREENS[min(origin, 7)] if isinstance(origin, int) else COLOURS[origin]
    return f"\x1b[38;5;{code}m{text}\x1b[0m"


def legend(n_drafts, colour):
    names = {k: f"draft {k} accepted" for k in range(1, n_drafts + 1)}
    if n_drafts:
        names |= {"corrected": "rejected draft corrected", "bonus": "bonus token after the drafts"}
    names["plain"] = "no draft there"
    return "   ".join(paint(name if colour else f"{name} ", origin, colour)
                      for origin, name in names.items())


# -----------------------------------------------------------------------------


def add_model_flags(parser):
    parser.add_argument("--out_dir", type=any_path, default="out/toy",
                        help="folder of the checkpoint (out/toy)")
    parser.add_argument("--device", default="auto",
                        help="cpu, cuda, cuda:1, mps; auto takes cuda, then mps, then cpu")
    parser.add_argument("--dtype", default="auto",
                        choices=["auto", "float32", "bfloat16", "float16", "float64"],
                        help="of the weights; probabilities are float32 or wider. auto is float32, "
                             "or what a model from elsewhere is fastest in (auto)")
    parser.add_argument("--seed", type=any_seed, default=1337, help="seed of the draws (1337)")


def add_cut_flags(parser):
    parser.add_argument("--top_k", type=number(int, 1), help="draw from the k most probable tokens")
    parser.add_argument("--top_p", type=number(float, 1e-6, 1),
                        help="draw from the smallest set of tokens that has this probability")


def parse_args():
    parser = ArgumentParser(__doc__)
    add_model_flags(parser)
    parser.add_argument("--mode", choices=[*MODES, *words("mode")],
                        help="decoder (speculative where there is a head, else plain)")
    parser.add_argument("--prompt", type=utf8, default="",
                        help="beginning of the text, or what a chat model is to answer (none)")
    parser.add_argument("--num_samples", type=number(int, 1), default=1, help="texts to write (1)")
    parser.add_argument("--max_new_tokens", type=number(int, 0), default=256,
                        help="longest text in tokens (256)")
    parser.add_argument("--temperature", type=number(float, 0, 1e6), default=1.0,
                        help="0 is greedy, 1 the model's own distribution (1)")
    add_cut_flags(parser)
    parser.add_argument("--threads", type=number(int, 1, 1024),
                        help="CPU threads, with which a seed always gives the same text (those "
                             "that a trial finds best for a small model, else all cores)")
    parser.add_argument("--show_drafts", action="store_true",
                        help="colour each token by where it came from; in a pipe, or with "
                             "NO_COLOR, mark it")
    return parser.parse_args()


def is_terminal():
    return sys.stdout is not None and sys.stdout.isatty()


def write_sample(args, decoder, model, enc, sampler, colour):
    """Print one text; returns what the decoder did."""
    prompt, stats = enc.prompt_ids(args.prompt), Stats()
    stream = TextStream(enc, prompt, printable=is_terminal())
    tokens = decoder(model, prompt, args.max_new_tokens, sampler=sampler, stop_token=enc.ends,
                     stats=stats)
    print(args.prompt, end=enc.gap, flush=True)
    for i, token in enumerate(tokens):
        text = stream.push(token) if token not in enc.ends else stream.end()
        if args.show_drafts:
            text = paint(text, stats.origins[i], colour)
        print(text, end="", flush=True)
    print(stream.end(), end="\n\n")
    return stats


def main():
    args = parse_args()
    options = args.temperature, args.top_k, args.top_p
    make_sampler(*options)  # says now what is wrong with them
    torch.set_flush_denormal(True)  # probabilities below 1e-38 are 0; x86 would be slow at them
    model, enc, _ = load(args.out_dir, args.device, args.dtype)
    mode = args.mode or ("speculative" if model.head else "plain")
    drafts = mode not in ("plain", "oracle")
    if drafts and not model.head:
        raise BadInput(f"{args.out_dir} has n_future = 1: there is no head to draft from; take "
                       "--mode plain.")
    decoder = MODES[mode] if mode in MODES else door("mode", mode).generate
    plain = os.environ.get("NO_COLOR") or os.environ.get("TERM") == "dumb"  # https://no-color.org
    colour = is_terminal() and not plain
    if args.show_drafts:
        print(legend(model.config.n_future - 1 if drafts else 0, colour) + "\n")
    sampler = make_sampler(*options, torch.Generator(model.device).manual_seed(args.seed))
    with fast_kernels(model):
        if args.threads:
            torch.set_num_threads(args.threads)
        elif model.n_params()[0] < 3e7 and args.max_new_tokens * args.num_samples > 32:
            # of larger models a trial takes long, and threads pay
            torch.set_num_threads(best_threads(
                model.device, lambda: list(decoder(model, [0], 32, sampler=Greedy()))))
        start = time.perf_counter()
        samples = [write_sample(args, decoder, model, enc, sampler, colour)
                   for _ in range(args.num_samples)]
    seconds = time.perf_counter() - start
    n_tokens, steps = sum(len(s.origins) for s in samples), sum(s.steps for s in samples)
    per_step = f" {sum(s.tokens for s in samples) / steps:.2f} per step," if steps else ""
    tokens = "token" if n_tokens == 1 else "tokens"
    print(f"{mode}: {n_tokens} {tokens},{per_step} {n_tokens / seconds:.0f} tokens/s")


if __name__ == "__main__":
    run_script(main)
