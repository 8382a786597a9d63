"""How much faster is speculative decoding than the fastest plain decoding of the same model?

    python bench_speculative.py --out_dir out/toy

Plain and speculative decoding continue the same prompts for the same number of tokens (no stop
token), in turn, round after round; speeds are medians over the rounds, and a speed-up is the median
of the rounds' own ratios. A chat model answers its held-out prompts instead, and may end before
that; each kind of prompts has a line of its own. The last line of stdout is one JSON object.
docs/results.md says how to read the table.
"""

import copy
import itertools
import json
import os
import platform
import statistics
import time
from collections import Counter
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise
from pathlib import Path

# before torch: it says how threads wait
from common import ArgumentParser, number, run_script
import torch

from decode import Stats, generate, generate_plain, make_sampler, window_ids
from model import BadInput
from sample import add_cut_flags, add_model_flags, best_threads, fast_kernels, load

HEAD_FIELDS = ("head", "n_future", "rank")  # of a config: which head it is

# -----------------------------------------------------------------------------
# clocks


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


class Laps:
    """Adds up the device's own time by part of a step, without waiting for the device.

    On CUDA a moment is an event in the device's queue, else it is a time. The clocks cost a step
    some microseconds.
    """

    def __init__(self, device):
        self.device, self.moments = device, []

    def lap(self, part):
        """What came since the last lap belongs to this part."""
        moment = time.perf_counter()
        if self.device.type == "cuda":
            moment = torch.cuda.Event(enable_timing=True)
            moment.record()
        self.moments.append((part, moment))

    @contextmanager
    def around(self, model, sampler):
        """Within the block, the four calls that a step is made of are timed."""
        calls = [(model.head, "draft", "draft"), (model, "hidden", "trunk"),
                 (model, "target_logits", "target"), (sampler, "verify", "verify")]
        for owner, name, part in calls:
            setattr(owner, name, partial(self.call, getattr(owner, name), part))
        try:
            yield
        finally:
            for owner, name, _ in calls:
                delattr(owner, name)  # the class's own shows again

    def call(self, function, part, *args, **options):
        self.lap("rest")
        result = function(*args, **options)
        self.lap(part)
        return result

    def seconds(self):
        """{part: seconds}; on CUDA the queue must have come past them."""
        totals = Counter()
        for (_, start), (part, end) in pairwise(self.moments):
            seconds = end - start if isinstance(start, float) else start.elapsed_time(end) / 1e3
            totals[part] += seconds
        return totals


def hardware(device):
    """The name of a GPU or CPU, as far as the system tells."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.exists() else []
    names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    name = names[0] if names else platform.processor() or platform.machine()
    return f"{name}, {os.cpu_count()} cores"


# -----------------------------------------------------------------------------
# the measurement


@dataclass
class Mode:
    """A decoder, its model, whether it drafts, the context it runs in, the plain mode that it is
    compared with, and whether its steps have parts that can be timed."""

    function: callable
    model: torch.nn.Module
    speculative: bool = False
    kernels: callable = None
    base: str = "plain"
    has_parts: bool = True

    def context(self):
        return (self.kernels or partial(fast_kernels, self.model))()


class Bench:
    """prompts: lists of ids, or by kind a dict of such lists; stop_token ends a text. modes: by
    name, to which one may add; about: what `describe` is to say of these."""

    def __init__(self, model, prompts, n_tokens, seed, stop_token=None):
        self.model, self.device = model, model.device
        self.kinds = prompts if isinstance(prompts, dict) else {"all": prompts}
        self.prompts = [prompt for kind in self.kinds.values() for prompt in kind]
        self.n_tokens, self.seed, self.stop_token = n_tokens, seed, stop_token
        self.cuts = {}  # top_k and top_p of the samplers
        self.modes, self.about = {"plain": Mode(generate_plain, model)}, {}
        self.modes["speculative"] = Mode(generate, model, True)
        if model.config.target == "marginal":  # plain decoding pays for r heads: how much?
            lm_head_only = copy.copy(model)
            lm_head_only.config = replace(model.config, target="lm_head")
            self.modes["lm_head_only"] = Mode(generate_plain, lm_head_only)

    def decode(self, name, temperature, seed, prompts=None, laps=None, **options):
        """Continue the prompts, or all of them; returns the texts. laps time the steps' parts."""
        mode, options = self.modes[name], {"stop_token": self.stop_token, **options}
        generator = torch.Generator(self.device).manual_seed(seed)
        sampler = make_sampler(temperature, generator=generator, **self.cuts)
        with mode.context(), laps.around(mode.model, sampler) if laps else nullcontext():
            return [list(mode.function(mode.model, prompt, self.n_tokens, sampler=sampler,
                                       **options)) for prompt in prompts or self.prompts]

    def time_one(self, name):
        """Seconds to continue the first prompt greedily."""
        return timed(lambda: self.decode(name, 0.0, 0, self.prompts[:1]), self.device)[0]

    def best_threads(self):
        """The number of CPU threads at which plain decoding is fastest."""
        return best_threads(self.device, lambda: self.time_one("plain"))

    def rounds(self, temperature, n_rounds):
        """By mode: a list of rounds, each a dict of seconds, tokens, texts, if speculative seconds
        by part, and by kind of prompts seconds, tokens and steps; and the Stats of all rounds."""
        rounds, stats = {name: [] for name in self.modes}, {name: Stats() for name in self.modes}
        for name in self.modes:  # warm up, for as long as a text may be
            self.decode(name, temperature, self.seed, [max(self.prompts, key=len)], stop_token=None)
        for i in range(n_rounds):
            for own in rounds.values():
                own.append(dict(seconds=0, tokens=0, texts=[], parts=Counter(), kinds={}))
            for kind, name in itertools.product(self.kinds, self.modes):
                self.measure(name, kind, temperature, self.seed + i, rounds[name][-1], stats[name])
        return rounds, stats

    def measure(self, name, kind, temperature, seed, found, stats):
        """Let a mode continue the prompts of a kind, and add what it took to its round."""
        mode, steps = self.modes[name], stats.steps
        laps = Laps(self.device) if mode.speculative and mode.has_parts else None
        decode = partial(self.decode, name, temperature, seed, self.kinds[kind], laps, stats=stats)
        seconds, texts = timed(decode, self.device)
        tokens = sum(map(len, texts))
        found["seconds"] += seconds
        found["tokens"] += tokens
        found["texts"] += texts
        found["parts"] += laps.seconds() if laps else Counter()
        # the prefill of each prompt yields a token, and counts as no step
        found["kinds"][kind] = {"seconds": seconds, "tokens": tokens, "steps": stats.steps - steps,
                                "prompts": len(texts)}

    def rows(self, temperature, n_rounds):
        """One row of the table per mode, and the first round's texts by mode."""
        rounds, stats = self.rounds(temperature, n_rounds)
        rows = [self.row(name, temperature, rounds, stats[name]) for name in self.modes]
        return rows, {name: rounds[name][0]["texts"] for name in rounds}

    def row(self, name, temperature, rounds, stats):
        """The row of a mode: medians over its rounds, and the Stats of all of them."""
        mode, own = self.modes[name], rounds[name]

        def per_token(*parts):  # seconds of a round, or of parts of its steps, for a token
            return [sum(r["parts"][part] for part in parts) / r["tokens"] if parts else
                    r["seconds"] / r["tokens"] for r in own]

        plain = rounds[mode.base]
        ratios = speedups(plain, per_token())
        row = {"mode": name, "temperature": temperature,
               "tokens_per_second": 1 / statistics.median(per_token()),
               "speedup": statistics.median(ratios), "speedup_range": [min(ratios), max(ratios)],
               "bound": None,
               "tokens_per_step": stats.tokens_per_step if stats.steps else None,  # None: a peer
               "acceptance": [a if a == a else None for a in stats.acceptance],
               "histogram": stats.histogram, "distinct": distinct(own[0]["texts"])}
        if len(self.kinds) > 1:
            row["kinds"] = {kind: self.row_of_kind(kind, own, plain) for kind in self.kinds}
        if mode.base != "plain":
            row["over"] = mode.base
        if mode.speculative:
            n_passes = stats.steps + len(own) * len(self.prompts)  # prefills, too
            ms = 1e3 * sum(r["tokens"] for r in own) / n_passes  # a pass's, of a token's seconds
            row |= {key: getattr(mode.model.config, key) for key in HEAD_FIELDS}
            row["step_ms"] = ms * statistics.median(per_token())
        if mode.speculative and mode.has_parts:
            row["parts_ms"] = {part: ms * statistics.median(per_token(part))
                               for part in ("draft", "trunk", "target", "verify")}
            row["parts_ms"]["rest"] = row["step_ms"] - sum(row["parts_ms"].values())
            row["bound"] = statistics.median(speedups(plain, per_token("trunk", "target")))
        return row

    @staticmethod
    def row_of_kind(kind, own, plain):
        """What a row says of one kind of prompts, from the mode's rounds and plain decoding's."""
        own, plain = ([r["kinds"][kind] for r in rounds] for rounds in (own, plain))
        ratios = speedups(plain, [o["seconds"] / o["tokens"] for o in own])
        steps = sum(o["steps"] for o in own)
        tokens = sum(o["tokens"] - o["prompts"] for o in own)
        return {"speedup": statistics.median(ratios), "speedup_range": [min(ratios), max(ratios)],
                "tokens_per_step": tokens / steps if steps else None}

    @torch.inference_mode()
    def first_difference(self, texts, name="speculative"):
        """Where greedy texts first part, and the gap of the two top logits there; or None."""
        for i, (prompt, plain, fast) in enumerate(zip(self.prompts, texts["plain"], texts[name])):
            for k, (a, b) in enumerate(zip(plain, fast)):
                if a != b:
                    logits = self.model(window_ids(prompt + plain[:k], self.model))[0, -1]
                    first, second = logits.topk(2).values.tolist()
                    return {"prompt": i, "token": k, "logit_gap": first - second}
        return None


def speedups(plain, seconds):
    """Round by round: plain decoding's seconds per token, of its rounds, over another mode's."""
    return [r["seconds"] / r["tokens"] / fast for r, fast in zip(plain, seconds)]


def distinct(texts, length=8):
    """The share of different ones among all runs of `length` tokens; in a loop it is near 0."""
    runs = [tuple(text[i : i + length]) for text in texts for i in range(len(text) - length + 1)]
    return len(set(runs)) / len(runs) if runs else 1.0


# -----------------------------------------------------------------------------
# what is printed


def describe(bench, args):
    """What was measured, on what."""
    config, device, (trunk, head) = bench.model.config, bench.device, bench.model.n_params()
    return {
        "out_dir": args.out_dir, "device": str(device), "hardware": hardware(device),
        "torch": torch.__version__, "dtype": str(bench.model.dtype).removeprefix("torch."),
        "threads": torch.get_num_threads(), "trunk_parameters": trunk, "head_parameters": head,
        **{name: getattr(config, name) for name in HEAD_FIELDS}, "target": config.target,
        "vocab_size": config.n_token, "prompts": len(bench.prompts),
        "tokens_per_prompt": bench.n_tokens, "rounds": args.rounds, "seed": args.seed,
        **{name: value for name, value in bench.cuts.items() if value is not None},
        **bench.about,
    }


def print_card(card, bench):
    for key, value in card.items():
        print(f"{key:20} {value}")
    if card["target"] == "marginal":
        print("target = marginal: plain decoding computes r heads for its one token, too.\n"
              "lm_head_only is the trunk with its plain LM head, untrained: for its speed alone.")
    for name, mode in bench.modes.items():
        if mode.base != "plain":
            print(f"{name}: its speed-up is over {mode.base}")
        elif mode.speculative:
            print(f"{name}: head {mode.model.config.head}, n = {mode.model.config.n_future}, "
                  f"r = {mode.model.head.rank}")


def print_table(rows):
    width = max(len(row["mode"]) for row in rows)
    print(f"\n{'mode':{width}} temp  tokens/s speed-up        range  bound tok/step  acceptance by "
          "offset")
    for row in rows:
        acceptance = " ".join("-" if a is None else f"{a:.2f}" for a in row["acceptance"])
        spread = "{:.2f}..{:.2f}".format(*row["speedup_range"])
        bound = f"{row['bound']:.2f}x" if row["bound"] else ""
        per_step = f"{row['tokens_per_step']:.2f}" if row["tokens_per_step"] else ""
        print(f"{row['mode']:{width}} {row['temperature']:4.1f} {row['tokens_per_second']:9.0f} "
              f"{row['speedup']:7.2f}x {spread:>12} {bound:>6} {per_step:>8}  {acceptance}")
        if "over" in row:
            print(f"{'':{width}}  its speed-up is over {row['over']}")
        if "step_ms" in row:
            n_steps = sum(row["histogram"])
            shares = (f"{k}:{h / n_steps:.0%}" for k, h in enumerate(row["histogram"]) if k)
            print(f"{'':{width}}  steps by tokens: {' '.join(shares)}")
            parts = " + ".join(f"{part} {ms:.2f}" for part, ms in row.get("parts_ms", {}).items())
            print(f"{'':{width}}  a step {row['step_ms']:.2f} ms{' = ' + parts if parts else ''}")
        if row["mode"] == "plain":
            print(f"{'':{width}}  {row['distinct']:.0%} of its runs of 8 tokens are different ones")
            continue
        for kind, part in row.get("kinds", {}).items():
            spread = "{:.2f}..{:.2f}".format(*part["speedup_range"])
            per_step = f"{part['tokens_per_step']:.2f}" if part["tokens_per_step"] else ""
            print(f"{kind:>{width + 15}} {part['speedup']:7.2f}x {spread:>12} {'':6} {per_step:>8}")


def print_differences(differences):
    print()
    for name, part in differences.items():
        what = "the text of plain decoding, token for token"
        if part is not None:
            what = (f"texts part at token {part['token']} of prompt {part['prompt']}; the two top "
                    f"logits differ by {part['logit_gap']:.1e} there")
        print(f"temperature 0, {name}: {what}")


# -----------------------------------------------------------------------------


def parse_args(description, add_flags):
    parser = ArgumentParser(description)
    add_model_flags(parser)
    parser.add_argument("--rounds", type=number(int, 5), default=7,
                        help="interleaved rounds, at least 5: the median of fewer is noise (7)")
    parser.add_argument("--max_new_tokens", type=number(int, 2),
                        help="tokens per prompt, the first of which the prefill yields (as many as "
                             "fit the block, or half of it; at most 256)")
    parser.add_argument("--temperatures", nargs="+", type=number(float, 0, 1e6), default=[0.0, 1.0],
                        help="a table's rows for each of them; 0 is greedy (0 1)")
    add_cut_flags(parser)
    parser.add_argument("--threads", type=number(int, 1, 1024),
                        help="CPU threads (the number that is best for plain decoding)")
    if add_flags is not None:
        add_flags(parser)
    return parser.parse_args()


def main(description=__doc__, add_flags=None, add_modes=None):
    """Measure. Another script may add flags to the parser, and modes: add_modes(bench, args)."""
    args = parse_args(description, add_flags)
    torch.set_flush_denormal(True)  # probabilities below 1e-38 are 0; x86 would be slow at them
    model, enc, ckpt = load(args.out_dir, args.device, args.dtype)
    if model.head is None:
        raise BadInput(f"{args.out_dir} has n_future = 1: there is no head to draft from, so "
                       "nothing to compare.")
    meta, prompts = ckpt["meta"], {}
    for kind, text in zip(meta.get("kinds", ["all"] * len(meta["prompts"])), meta["prompts"]):
        prompts.setdefault(kind, []).append(enc.prompt_ids(text))
    room = model.config.block_size - max(len(ids) for kind in prompts.values() for ids in kind)
    n_tokens = args.max_new_tokens or min(256, max(room, model.config.block_size // 2, 2))
    bench = Bench(model, prompts, n_tokens, args.seed, enc.answer_end)
    bench.cuts = {"top_k": args.top_k, "top_p": args.top_p}
    if add_modes is not None:
        add_modes(bench, args)
    torch.set_num_threads(args.threads or bench.best_threads())
    card = describe(bench, args)
    print_card(card, bench)

    rows = []
    for temperature in args.temperatures:
        found, texts = bench.rows(temperature, args.rounds)
        rows += found
        if temperature == 0:
            card["first_difference"] = {name: bench.first_difference(texts, name) for name in texts
                                        if name not in ("plain", "lm_head_only")}
    print_table(rows)
    print_differences(card.get("first_difference", {}))
    print(json.dumps({"card": card, "rows": rows}), flush=True)


if __name__ == "__main__":
    run_script(main)
