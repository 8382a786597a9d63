"""How much faster is speculative decoding than the fastest plain decoding of the same model?

    python bench_speculative.py --out_dir out/toy

Plain and speculative decoding continue the same prompts for the same number of tokens (no stop token), in turn, round
after round; speeds are medians over the rounds, and a speed-up is the median of the rounds' own ratios. The last line
of stdout is one JSON object.
"""

import copy
import json
import os
import platform
import statistics
import sys
import time
from dataclasses import replace
from pathlib import Path

import torch

from common import ArgumentParser, number, run_script
from decode import Stats, generate_cached, generate_speculative, new_cache, window_ids
from plot import check_plot, draw_bench, save
from sample import add_model_flags, load, prompt_ids


def synchronize(device):
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    if device.type == "mps":
        torch.mps.synchronize()


def hardware(device):
    """The name of a GPU or CPU, as far as the system tells."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.exists() else []
    names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    return f"{names[0] if names else platform.processor() or platform.machine()}, {os.cpu_count()} cores"


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
        most = torch.get_num_threads()  # torch's own default: the cores that there are
        seconds = {n: [] for n in sorted({most, *(2**k for k in range(most.bit_length()))})}
        self.decode("plain", 1.0, 0, prompts=self.prompts[:1])
        for _ in range(5):
            for n in seconds:
                torch.set_num_threads(n)
                seconds[n].append(timed(lambda: self.decode("plain", 1.0, 0, prompts=self.prompts[:1]), self.device)[0])
        return min(seconds, key=lambda n: statistics.median(seconds[n]))

    def rounds(self, temperature, n_rounds):
        """Seconds per token of every round, the Stats of all rounds together, and the first round's texts, by mode.

        Under "forward" the seconds stand that a forward pass of n tokens and their target rows took in that round.
        """
        seconds, stats, texts = {m: [] for m in (*self.modes, "forward")}, {m: Stats() for m in self.modes}, {}
        for mode in self.modes:  # warm up
            self.decode(mode, temperature, self.seed, prompts=self.prompts[:1])
        for i in range(n_rounds):
            for mode in self.modes:
                spent, text = timed(lambda: self.decode(mode, temperature, self.seed + i, stats[mode]), self.device)
                seconds[mode].append(spent / sum(map(len, text)))
                texts.setdefault(mode, text)
            seconds["forward"].append(self.forward_seconds(self.model.config.n_future))
        return seconds, stats, texts

    @torch.inference_mode()
    def forward_seconds(self, n_tokens, repeats=100):
        """Mean seconds of a cached forward pass of n tokens with their target rows, in the middle of the block."""
        cache, tokens = new_cache(self.model), torch.zeros(1, n_tokens, dtype=torch.long, device=self.device)

        def forwards():
            for _ in range(repeats):
                cache.length = self.model.config.block_size // 2
                self.model.target_logits(self.model.hidden(tokens, cache)[0])

        return timed(forwards, self.device)[0] / repeats

    @torch.inference_mode()
    def first_difference(self, texts):
        """Where greedy texts first part, and the gap between the two largest logits there; None where none part."""
        for i, (prompt, plain, fast) in enumerate(zip(self.prompts, texts["plain"], texts["speculative"])):
            for k, (a, b) in enumerate(zip(plain, fast)):
                if a != b:
                    logits = self.model(window_ids(prompt + plain[:k], self.model))[0, -1]
                    top = logits[: self.model.config.n_token].topk(2).values
                    return {"prompt": i, "token": k, "logit_gap": (top[0] - top[1]).item()}
        return None

    def rows(self, temperature, n_rounds):
        """One row of the table per mode, and the first round's texts."""
        seconds, stats, texts = self.rounds(temperature, n_rounds)

        def times_faster_than_plain(mode):
            return statistics.median(plain / own for plain, own in zip(seconds["plain"], seconds[mode]))

        rows = []
        for mode in self.modes:
            per_token, s = statistics.median(seconds[mode]), stats[mode]
            rows.append({
                "mode": mode, "temperature": temperature, "tokens_per_second": 1 / per_token,
                "tokens_per_step": s.tokens_per_step, "step_ms": 1e3 * per_token * s.tokens_per_step,
                "speedup": times_faster_than_plain(mode), "bound": None,
                "acceptance": [a if a == a else None for a in s.acceptance], "histogram": s.histogram,
            })
            if mode == "speculative":  # as if drafting, verifying and the host were free
                rows[-1]["forward_ms"] = 1e3 * statistics.median(seconds["forward"])
                rows[-1]["bound"] = s.tokens_per_step * times_faster_than_plain("forward")
        return rows, texts


def describe(bench, args):
    """What was measured, on what."""
    config, device = bench.model.config, bench.device
    trunk, head = bench.model.n_params()
    return {
        "out_dir": args.out_dir, "device": str(device), "hardware": hardware(device), "torch": torch.__version__,
        "dtype": args.dtype, "threads": torch.get_num_threads(), "trunk_parameters": trunk, "head_parameters": head,
        "n_future": config.n_future, "rank": config.rank, "factors": config.factors, "context": config.context, "target": config.target,
        "vocab_size": config.n_token, "prompts": len(bench.prompts), "tokens_per_prompt": bench.n_tokens,
        "rounds": args.rounds, "seed": args.seed,
    }


def print_card(card):
    for key, value in card.items():
        print(f"{key:18} {value}")
    if card["target"] == "marginal":
        print("target = marginal: plain decoding computes r heads for its one token, too. lm_head_only is the same\n"
              "trunk with its plain LM head, for its speed alone: that head was not trained to predict on its own.")


def print_table(rows):
    print(f"\n{'mode':12} temp  tokens/s speed-up  bound tok/step  acceptance by position")
    for row in rows:
        acceptance = " ".join("-" if a is None else f"{a:.2f}" for a in row["acceptance"])
        bound = f"{row['bound']:.2f}x" if row["bound"] else ""
        print(f"{row['mode']:12} {row['temperature']:4.1f} {row['tokens_per_second']:9.0f} {row['speedup']:7.2f}x "
              f"{bound:>6} {row['tokens_per_step']:8.2f}  {acceptance}")
        if row["mode"] == "speculative":
            shares = (f"{k}:{h / sum(row['histogram']):.0%}" for k, h in enumerate(row["histogram"]) if k)
            print(f"{'':18}steps by tokens: {' '.join(shares)}")
            print(f"{'':18}a step {row['step_ms']:.2f} ms; the forward pass and its targets {row['forward_ms']:.2f} ms")


def parse_args():
    parser = ArgumentParser(__doc__)
    add_model_flags(parser)
    parser.add_argument("--rounds", type=number(int, 5), default=7,
                        help="interleaved rounds, at least 5: the median of fewer is noise (7)")
    parser.add_argument("--max_new_tokens", type=number(int, 2),
                        help="tokens per prompt, the first of which the prefill yields (as many as fit the block, at "
                             "most 256)")
    parser.add_argument("--threads", type=number(int, 1, 1024),
                        help="CPU threads (the number that is best for plain decoding)")
    parser.add_argument("--plot", metavar="FILE.png", help="draw the speed-ups, the acceptance and the histogram")
    return parser.parse_args()


def main():
    args = parse_args()
    if args.plot:
        check_plot(args.plot)  # now, not after minutes of measuring
    model, enc, ckpt = load(args.out_dir, args.device, args.dtype)
    if model.cp_head is None:
        sys.exit(f"{args.out_dir} has n_future = 1: there is no head to draft from, so nothing to compare.")
    prompts = [prompt_ids(enc, text) for text in ckpt["meta"]["prompts"]]
    n_tokens = args.max_new_tokens or max(2, min(256, model.config.block_size - max(map(len, prompts))))
    bench = Bench(model, prompts, n_tokens, args.seed)
    torch.set_num_threads(args.threads or bench.best_threads())
    card = describe(bench, args)
    print_card(card)

    greedy, texts = bench.rows(0.0, args.rounds)
    sampled, _ = bench.rows(1.0, args.rounds)
    print_table(greedy + sampled)
    part = card["first_difference"] = bench.first_difference(texts)
    print("\ntemperature 0: " + ("both texts are the same, token for token" if part is None else
          f"texts part at token {part['token']} of prompt {part['prompt']}; the two top logits differ by "
          f"{part['logit_gap']:.1e} there"))
    print(json.dumps({"card": card, "rows": greedy + sampled}), flush=True)
    if args.plot:
        save(draw_bench(card, greedy + sampled), args.plot)


if __name__ == "__main__":
    run_script(main)
