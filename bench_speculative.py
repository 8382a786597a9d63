"""How much faster is speculative decoding than the fastest plain decoding of the same model?

    python bench_speculative.py --out_dir out/toy

Plain and speculative decoding continue the same prompts for the same number of tokens (no stop token), in turn, round
after round; speeds are medians over the rounds, and a speed-up is the median of the rounds' own ratios. The last line
of stdout is one JSON object.
"""

import argparse
import copy
import json
import os
import platform
import statistics
import time
from dataclasses import replace

import torch

from decode import Stats, generate_cached, generate_speculative, new_cache
from sample import add_model_flags, load, prompt_ids


def synchronize(device):
    if device.type in ("cuda", "mps"):
        getattr(torch, device.type).synchronize()


def timed(function, device):
    """(seconds, result) of function(), with the device's queue empty before and after."""
    synchronize(device)
    start = time.perf_counter()
    result = function()
    synchronize(device)
    return time.perf_counter() - start, result


class Bench:
    def __init__(self, model, prompts, n_tokens, seed):
        self.model, self.prompts, self.n_tokens, self.seed = model, prompts, n_tokens, seed
        self.device = model.lm_head.weight.device
        self.modes = {"plain": (generate_cached, model), "speculative": (generate_speculative, model)}
        if model.config.target == "marginal":  # plain decoding pays for r heads here; what would the trunk alone cost?
            lm_head_only = copy.copy(model)
            lm_head_only.config = replace(model.config, target="lm_head")
            self.modes["lm_head_only"] = (generate_cached, lm_head_only)

    def decode(self, mode, temperature, seed, stats=None, prompts=None):
        """Continue every prompt; returns the texts."""
        function, model = self.modes[mode]
        generator = torch.Generator(self.device).manual_seed(seed)
        return [list(function(model, prompt, self.n_tokens, temperature=temperature, generator=generator, stats=stats))
                for prompt in prompts or self.prompts]

    def best_threads(self):
        """The number of CPU threads at which plain decoding is fastest."""
        if self.device.type != "cpu":
            return torch.get_num_threads()
        seconds = {2**k: [] for k in range((os.cpu_count() or 1).bit_length())}
        self.decode("plain", 1.0, 0, prompts=self.prompts[:1])
        for _ in range(5):
            for n in seconds:
                torch.set_num_threads(n)
                seconds[n].append(timed(lambda: self.decode("plain", 1.0, 0, prompts=self.prompts[:1]), self.device)[0])
        return min(seconds, key=lambda n: statistics.median(seconds[n]))

    def rounds(self, temperature, n_rounds):
        """Seconds per token of every round, the Stats of all rounds together, and the first round's texts, by mode."""
        seconds, stats, texts = {m: [] for m in self.modes}, {m: Stats() for m in self.modes}, {}
        for mode in self.modes:  # warm up
            self.decode(mode, temperature, self.seed, prompts=self.prompts[:1])
        for i in range(n_rounds):
            for mode in self.modes:
                spent, text = timed(lambda: self.decode(mode, temperature, self.seed + i, stats[mode]), self.device)
                seconds[mode].append(spent / sum(map(len, text)))
                texts.setdefault(mode, text)
        return seconds, stats, texts

    @torch.inference_mode()
    def forward_seconds(self, n_tokens, n_rounds=100):
        """Median seconds of a cached forward pass of n tokens with their target rows, in the middle of the block."""
        cache, tokens = new_cache(self.model), torch.zeros(1, n_tokens, dtype=torch.long, device=self.device)
        seconds = []
        for _ in range(n_rounds):
            cache.length = self.model.config.block_size // 2
            seconds.append(timed(lambda: self.model.target_logits(self.model.hidden(tokens, cache)[0]), self.device)[0])
        return statistics.median(seconds)

    @torch.inference_mode()
    def first_difference(self, texts):
        """Where greedy texts first part, and the gap between the two largest logits there; None where none part."""
        for i, (prompt, plain, fast) in enumerate(zip(self.prompts, texts["plain"], texts["speculative"])):
            for k, (a, b) in enumerate(zip(plain, fast)):
                if a != b:
                    ids = torch.tensor([(prompt + plain)[: len(prompt) + k][-self.model.config.block_size :]], device=self.device)
                    top = self.model(ids)[0, -1].topk(2).values
                    return {"prompt": i, "token": k, "logit_gap": (top[0] - top[1]).item()}
        return None


def table(rows):
    print(f"{'mode':14} {'temp':>4} {'tokens/s':>9} {'speed-up':>8} {'bound':>6} {'tok/step':>8}  acceptance by position")
    for row in rows:
        acceptance = " ".join(f"{a:.2f}" if a is not None else "-" for a in row["acceptance"])
        bound = f"{row['bound']:.2f}" if row["bound"] else ""
        print(f"{row['mode']:14} {row['temperature']:4.1f} {row['tokens_per_second']:9.0f} {row['speedup']:7.2f}x {bound:>6} "
              f"{row['tokens_per_step']:8.2f}  {acceptance}")
        if row["mode"] == "speculative":
            steps = sum(row["histogram"])
            print(" " * 20 + "steps by tokens: " + " ".join(f"{k}:{h / steps:.0%}" for k, h in enumerate(row["histogram"]) if k))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_model_flags(parser)
    parser.add_argument("--rounds", type=int, default=7, help="interleaved rounds, at least 5 (7)")
    parser.add_argument("--max_new_tokens", type=int, help="tokens per prompt (as many as fit the block, at most 256)")
    parser.add_argument("--threads", type=int, help="CPU threads (the number that is best for plain decoding)")
    args = parser.parse_args()
    if args.rounds < 5:
        parser.error("--rounds must be at least 5: the median of fewer is noise")

    model, enc, ckpt = load(args.out_dir, args.device, args.dtype)
    config = model.config
    if model.cp_head is None:
        parser.error(f"{args.out_dir} has n_future = 1: there is no head to draft from, so nothing to compare")
    prompts = [prompt_ids(enc, text) for text in ckpt["meta"]["prompts"]]
    n_tokens = args.max_new_tokens or min(256, config.block_size - max(map(len, prompts)))
    bench = Bench(model, prompts, n_tokens, args.seed)
    torch.set_num_threads(args.threads or bench.best_threads())
    trunk, head = model.n_params()
    name = torch.cuda.get_device_name() if bench.device.type == "cuda" else platform.processor() or platform.machine()
    card = {
        "out_dir": args.out_dir, "device": str(bench.device), "hardware": name, "torch": torch.__version__, "dtype": args.dtype,
        "threads": torch.get_num_threads(), "trunk_parameters": trunk, "head_parameters": head, "n_future": config.n_future,
        "rank": config.rank, "factors": config.factors, "target": config.target, "vocab_size": config.n_token,
        "prompts": len(prompts), "tokens_per_prompt": n_tokens, "rounds": args.rounds, "seed": args.seed,
    }
    for key, value in card.items():
        print(f"{key:18} {value}")
    if config.target == "marginal":
        print("target = marginal: plain decoding computes r heads for its one token too; lm_head_only is the same trunk\n"
              "with its plain LM head, timed for its speed alone (the head is not trained to predict on its own)")
    one, n = bench.forward_seconds(1), bench.forward_seconds(config.n_future)
    card["forward_ms_1"], card["forward_ms_n"] = one * 1e3, n * 1e3
    print(f"forward + target rows: 1 token {one * 1e3:.3f} ms, {config.n_future} tokens {n * 1e3:.3f} ms\n")
    rows = []
    for temperature in (0.0, 1.0):
        seconds, stats, texts = bench.rounds(temperature, args.rounds)
        plain_step = statistics.median(seconds["plain"])
        for mode in bench.modes:
            s = stats[mode]
            rows.append({
                "mode": mode, "temperature": temperature, "tokens_per_second": 1 / statistics.median(seconds[mode]),
                "tokens_per_step": s.tokens_per_step,
                "speedup": statistics.median(p / t for p, t in zip(seconds["plain"], seconds[mode])),
                # drafting, verifying and the host for free: only the forward pass of n tokens and its targets are paid
                "bound": s.tokens_per_step * plain_step / n if mode == "speculative" else None,
                "step_ms": statistics.median(seconds[mode]) * s.tokens_per_step * 1e3,
                "acceptance": [a if a == a else None for a in s.acceptance], "histogram": s.histogram,
            })
        if temperature == 0:
            card["first_difference"] = bench.first_difference(texts)
    table(rows)
    part = card["first_difference"]
    print("\ntemperature 0: " + ("both texts are the same, token for token" if part is None else
          f"texts part at token {part['token']} of prompt {part['prompt']}, where the two top logits differ by {part['logit_gap']:.2e}"))
    print(json.dumps({"card": card, "rows": rows}))


if __name__ == "__main__":
    main()
