"""Write text with a trained model, as it is drawn.

    python sample.py --out_dir out/toy --prompt "Lily went to the" --num_samples 3
    python sample.py --out_dir out/toy --mode plain --temperature 0

speculative (the default of a model with a CP head), plain and oracle draw from the same distribution; see decode.py.
"""

import argparse
import sys
import time
from pathlib import Path

import torch

from decode import Stats, generate, generate_cached, generate_speculative
from model import GPT
from prepare_tinystories import TextStream, load_tokenizer
from train import pick_device

MODES = {"speculative": generate_speculative, "plain": generate_cached, "oracle": generate}


def load(out_dir, device="auto", dtype="float32"):
    """(model, tokenizer, checkpoint) of out_dir/ckpt.pt, the model in evaluation mode on the device."""
    path = Path(out_dir) / "ckpt.pt"
    if not path.exists():
        sys.exit(f"There is no checkpoint {path}; train one first: python train.py --out_dir {out_dir}")
    torch.set_flush_denormal(True)  # probabilities below 1e-38 are 0; x86 would be slow at them
    ckpt = torch.load(path, map_location="cpu", weights_only=True)
    model = GPT.from_checkpoint(ckpt).to(device=pick_device(device), dtype=getattr(torch, dtype)).eval()
    return model, load_tokenizer(ckpt["meta"]["tokenizer"]), ckpt


def add_model_flags(parser):
    parser.add_argument("--out_dir", default="out/toy", help="folder of the checkpoint (out/toy)")
    parser.add_argument("--device", default="auto", help="cpu, cuda, cuda:1, mps; auto takes cuda, then mps, then cpu")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16", "float16", "float64"],
                        help="of the weights; probabilities are always float32 or wider (float32)")
    parser.add_argument("--seed", type=int, default=1337, help="seed of the draws (1337)")


def prompt_ids(enc, text):
    """A text begins behind an <|endoftext|>, as in training."""
    return [enc.eot_token, *enc.encode_ordinary(text)]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_model_flags(parser)
    parser.add_argument("--mode", choices=MODES, help="decoder (speculative where there is a CP head, else plain)")
    parser.add_argument("--prompt", default="", help="beginning of the text (none: the model begins)")
    parser.add_argument("--num_samples", type=int, default=1, help="texts to write (1)")
    parser.add_argument("--max_new_tokens", type=int, default=256, help="longest text in tokens (256)")
    parser.add_argument("--temperature", type=float, default=1.0, help="0 is greedy, 1 the model's own law (1)")
    parser.add_argument("--top_k", type=int, help="draw from the k most probable tokens only")
    parser.add_argument("--top_p", type=float, help="draw from the smallest set of tokens of this probability only")
    args = parser.parse_args()

    sys.stdout.reconfigure(errors="replace")  # a pipe may not speak utf-8
    model, enc, _ = load(args.out_dir, args.device, args.dtype)
    mode = args.mode or ("speculative" if model.cp_head else "plain")
    generator = torch.Generator(model.lm_head.weight.device).manual_seed(args.seed)
    stats, n_tokens, start = Stats(), 0, time.perf_counter()
    options = dict(temperature=args.temperature, top_k=args.top_k, top_p=args.top_p, stop_token=enc.eot_token,
                   generator=generator, stats=stats)
    for _ in range(args.num_samples):
        print(args.prompt, end="", flush=True)
        stream = TextStream(enc)
        for token in MODES[mode](model, prompt_ids(enc, args.prompt), args.max_new_tokens, **options):
            n_tokens += 1
            if token != enc.eot_token:
                print(stream.push(token), end="", flush=True)
        print(stream.end(), end="\n\n")
    seconds = time.perf_counter() - start
    print(f"{mode}: {n_tokens} tokens, {stats.tokens_per_step:.2f} per step, {n_tokens / seconds:.0f} tokens/s")


if __name__ == "__main__":
    main()
