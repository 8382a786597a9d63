"""Write text with a trained model, as it is drawn.

    python sample.py --out_dir out/toy --prompt "Lily went to the" --num_samples 3
    python sample.py --out_dir out/toy --mode plain --temperature 0
    python sample.py --out_dir out/toy --show_drafts

speculative (the default of a model with a CP head), plain and oracle draw from the same distribution; see decode.py.
"""

import os
import sys
import time
from pathlib import Path

import torch

from common import ArgumentParser, load_model, number, pick_device, run_script, utf8
from decode import Coupling, Stats, generate, generate_cached, generate_speculative
from prepare_tinystories import TextStream, load_tokenizer

MODES = {"speculative": generate_speculative, "plain": generate_cached, "oracle": generate}


def load(out_dir, device="auto", dtype="float32"):
    """(model, tokenizer, checkpoint) of out_dir/ckpt.pt, the model in evaluation mode on the device."""
    path = Path(out_dir) / "ckpt.pt"
    torch.set_flush_denormal(True)  # probabilities below 1e-38 are 0; x86 would be slow at them
    if dtype == "float32":  # on a few rows oneDNN's GELU takes 10 us a call, PyTorch's own 2: a tenth of a step
        torch.backends.mkldnn.enabled = False
    device = pick_device(device)
    if device.type == "mps" and dtype == "float64":
        sys.exit("mps has no float64; take --device cpu.")
    model, ckpt = load_model(path)
    if "meta" not in ckpt:
        sys.exit(f"{path} holds no tokenizer (a checkpoint of nanoGPT?); train.py --init_from {path} makes one that "
                 "does.")
    try:
        enc, _ = load_tokenizer(ckpt["meta"]["tokenizer"]), ckpt["meta"]["prompts"]
    except Exception as e:  # tiktoken's own kinds among them
        sys.exit(f"{path} holds a tokenizer that cannot be read ({type(e).__name__}); train anew.")
    if enc.n_vocab != model.config.n_token:
        sys.exit(f"{path} holds a model of {model.config.n_token} tokens and a tokenizer of {enc.n_vocab}; train anew.")
    model = model.to(device=device, dtype=getattr(torch, dtype)).eval()
    if device.type == "cpu" and dtype == "float32":  # stored by columns: faster for a few rows, as fast for one
        for module in model.modules():
            if isinstance(module, torch.nn.Linear):
                module.weight.data = module.weight.data.T.contiguous().T
    return model, enc, ckpt


def add_model_flags(parser):
    parser.add_argument("--out_dir", default="out/toy", help="folder of the checkpoint (out/toy)")
    parser.add_argument("--device", default="auto", help="cpu, cuda, cuda:1, mps; auto takes cuda, then mps, then cpu")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16", "float16", "float64"],
                        help="of the weights; probabilities are always float32 or wider (float32)")
    parser.add_argument("--seed", type=number(int, 0, 2**63 - 1), default=1337, help="seed of the draws (1337)")


def prompt_ids(enc, text):
    """A text begins behind an <|endoftext|>, as in training."""
    return [enc.eot_token, *enc.encode_ordinary(text)]


# -----------------------------------------------------------------------------
# where each token came from

GREENS = {1: 30, 2: 36, 3: 42, 4: 78, 5: 114, 6: 150, 7: 186}  # of the 256 colours; the deeper a draft, the paler
COLOURS = {"corrected": 203, "bonus": 75, "plain": 250}


def paint(text, origin, colour):
    """A token in the colour of its origin (see Stats.count); without colour, behind a mark such as [2] or [c]."""
    if not colour:
        return f"[{origin if isinstance(origin, int) else origin[0]}]{text}"
    code = GREENS[min(origin, 7)] if isinstance(origin, int) else COLOURS[origin]
    return f"\x1b[38;5;{code}m{text}\x1b[0m"


def legend(n_drafts, colour):
    names = {k: f"draft {k} accepted" for k in range(1, n_drafts + 1)}
    if n_drafts:
        names |= {"corrected": "rejected draft corrected", "bonus": "bonus token behind the drafts"}
    return "   ".join(paint(name, origin, colour) for origin, name in {**names, "plain": "no draft there"}.items())


# -----------------------------------------------------------------------------


def parse_args():
    parser = ArgumentParser(__doc__)
    add_model_flags(parser)
    parser.add_argument("--mode", choices=MODES, help="decoder (speculative where there is a CP head, else plain)")
    parser.add_argument("--prompt", type=utf8, default="", help="beginning of the text (none: the model begins)")
    parser.add_argument("--num_samples", type=number(int, 1), default=1, help="texts to write (1)")
    parser.add_argument("--max_new_tokens", type=number(int, 0), default=256, help="longest text in tokens (256)")
    parser.add_argument("--temperature", type=number(float, 0, 1e6), default=1.0,
                        help="0 is greedy, 1 the model's own law (1)")
    parser.add_argument("--top_k", type=number(int, 1), help="draw from the k most probable tokens only")
    parser.add_argument("--top_p", type=number(float, 1e-6, 1),
                        help="draw from the smallest set of tokens of this probability only")
    parser.add_argument("--coupled", action="store_true",
                        help="tie the random numbers to the place in the text: every mode writes the same text, of the "
                             "same law, and keeps fewer drafts")
    parser.add_argument("--show_drafts", action="store_true",
                        help="colour each token by where it came from (marks, not colours, in a pipe or with NO_COLOR)")
    args = parser.parse_args()
    if 0 < args.temperature < 1e-6:
        parser.error("argument --temperature: 0 is greedy; above it, 1e-6 is the least")
    return args


def main():
    args = parse_args()
    model, enc, _ = load(args.out_dir, args.device, args.dtype)
    mode = args.mode or ("speculative" if model.cp_head else "plain")
    if mode == "speculative" and not model.cp_head:
        sys.exit(f"{args.out_dir} has n_future = 1: there is no head to draft from; take --mode plain.")
    colour = sys.stdout is not None and sys.stdout.isatty() and not os.environ.get("NO_COLOR")  # https://no-color.org
    if args.show_drafts:
        print(legend(model.config.n_future - 1 if mode == "speculative" else 0, colour) + "\n")
    device = model.lm_head.weight.device
    generator = torch.Generator(device).manual_seed(args.seed)
    stats, n_tokens, start = Stats(), 0, time.perf_counter()
    options = dict(temperature=args.temperature, top_k=args.top_k, top_p=args.top_p, stop_token=enc.eot_token,
                   generator=generator, stats=stats)
    for i in range(args.num_samples):
        if args.coupled:
            options["generator"] = Coupling(args.seed + i, device)
        print(args.prompt, end="", flush=True)
        stream = TextStream(enc)
        for token in MODES[mode](model, prompt_ids(enc, args.prompt), args.max_new_tokens, **options):
            text = stream.push(token) if token != enc.eot_token else stream.end()
            if args.show_drafts:
                text = paint(text, stats.origins[n_tokens], colour)
            print(text, end="", flush=True)
            n_tokens += 1
        print(stream.end(), end="\n\n")
    seconds = time.perf_counter() - start
    print(f"{mode}: {n_tokens} tokens, {stats.tokens_per_step:.2f} per step, {n_tokens / seconds:.0f} tokens/s")


if __name__ == "__main__":
    run_script(main)
