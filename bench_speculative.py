"""How much faster is speculative decoding than the fastest plain decoding of the same model?

    python bench_speculative.py --out_dir out/toy
    python bench_speculative.py --out_dir out/toy --peers    beside Hugging Face's transformers, with the same weights
    python bench_speculative.py --out_dir out/a --beside out/b out/c    beside other heads on the same trunk

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
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import replace
from functools import partial
from importlib.metadata import version
from pathlib import Path
from unittest.mock import patch

import torch

import decode
from common import ArgumentParser, number, run_script
from decode import Stats, generate, generate_cached, generate_speculative, window_ids
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


def now(device):
    """A moment of the device's own time, without waiting for it: on CUDA an event in its queue, else seconds."""
    if device.type != "cuda":
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def seconds_between(start, end):
    """Of two moments of `now`; CUDA's queue must have come past them."""
    return end - start if isinstance(start, float) else start.elapsed_time(end) / 1e3


@contextmanager
def parts_timed(model):
    """A dict that gets the (start, end) of every part of every speculative step in the block, the prefill's among them:
    trunk, the forward pass of n tokens; targets, their logits; draft; verify. The clocks cost a step some microseconds.
    """
    def clocked(function, moments):
        def part(*args):
            start = now(device)
            result = function(*args)
            moments.append((start, now(device)))
            return result
        return part

    device = model.lm_head.weight.device
    parts = {"trunk": (model, "hidden"), "targets": (model, "target_logits"), "draft": (decode, "draft"),
             "verify": (decode, "verify")}
    moments = {name: [] for name in parts}
    with ExitStack() as stack:
        for name, (owner, function) in parts.items():
            stack.enter_context(patch.object(owner, function, clocked(getattr(owner, function), moments[name])))
        yield moments


# -----------------------------------------------------------------------------
# other people's decoders on the same weights


LOOKUP = 10  # tokens that prompt lookup drafts at most


def to_transformers(model):
    """The same GPT as a Hugging Face GPT2LMHeadModel: the same law of the next token, to rounding.

    SystemExit with one line without transformers, or where the target is not the LM head.
    """
    if model.config.target != "lm_head":
        sys.exit("--peers needs a model with target lm_head: others know nothing of the CP head's marginal.")
    try:
        import transformers
    except ImportError:
        sys.exit("--peers needs transformers: python -m pip install transformers")
    transformers.logging.set_verbosity_error()
    c = model.config
    peer = transformers.GPT2LMHeadModel(transformers.GPT2Config(
        vocab_size=c.n_token, n_positions=c.block_size + LOOKUP, n_embd=c.n_embd, n_layer=c.n_layer, n_head=c.n_head,
        activation_function="gelu", bos_token_id=None, eos_token_id=None))
    peer = peer.to(device=model.lm_head.weight.device, dtype=model.lm_head.weight.dtype).eval()
    ours, state = model.state_dict(), peer.state_dict()
    with torch.no_grad():
        for name, theirs in state.items():
            tensor = ours.get(name)
            if tensor is None:  # a bias that our model is without
                theirs.zero_()
            elif any(name.endswith(f"{layer}.weight") for layer in ("c_attn", "c_proj", "c_fc")):
                theirs.copy_(tensor.T)  # they are stored as inputs x outputs
            else:
                rows = min(len(theirs), len(tensor))  # without the rows of the vocabulary that are no tokens; the
                theirs[rows:].zero_()  # positions behind the block are for guesses of the lookup that get thrown away
                theirs[:rows].copy_(tensor[:rows])
    return peer


def transformers_generate(peer, prompt, max_new_tokens, *, temperature, generator, stats, **options):
    """peer.generate in the form of our decoders; its randomness is torch's own, so the generator only seeds it."""
    torch.manual_seed(generator.initial_seed())
    sampling = dict(do_sample=True, temperature=temperature, top_k=0) if temperature else dict(do_sample=False)
    idx = torch.tensor([prompt], device=peer.device)
    return peer.generate(idx, attention_mask=torch.ones_like(idx), max_new_tokens=max_new_tokens, **sampling,
                         **options)[0, len(prompt) :].tolist()


# -----------------------------------------------------------------------------
# the measurement


HEAD = ("n_future", "rank", "factors", "context")  # what says of which kind a head is


def check_same_law(model, other, out_dir):
    """SystemExit with one line unless both models write the same texts: then their heads compare."""
    if model.config.target != "lm_head":
        sys.exit("--beside needs a model with target lm_head: with another, the head itself says what gets written.")
    head = {name: getattr(model.config, name) for name in (*HEAD, "dropout")}
    theirs = other.state_dict()
    same = other.cp_head is not None and replace(other.config, **head) == model.config and all(
        name.startswith("cp_head.") or torch.equal(p, theirs[name]) for name, p in model.state_dict().items())
    if not same:
        sys.exit(f"--beside: {out_dir} is not another head on the very trunk of --out_dir, with target lm_head.")


class Bench:
    """beside: other heads on the model's trunk, a dict of names and models."""

    def __init__(self, model, prompts, n_tokens, seed, peers=False, beside=None):
        self.model, self.prompts, self.n_tokens, self.seed = model, prompts, n_tokens, seed
        self.device = model.lm_head.weight.device
        self.heads = {"speculative": model} | {f"speculative, {name}": other for name, other in (beside or {}).items()}
        self.modes = {"plain": (generate_cached, model)}
        self.modes |= {mode: (generate_speculative, head) for mode, head in self.heads.items()}
        if peers:
            peer = to_transformers(model)
            lookup = partial(transformers_generate, prompt_lookup_num_tokens=LOOKUP)
            self.modes |= {"no_cache": (generate, model), "transformers": (transformers_generate, peer),
                           "transformers_prompt_lookup": (lookup, peer)}
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
        """By mode: seconds per token of every round, for the speculative ones those of the parts of a step in them, the
        Stats of all rounds together, and the first round's texts."""
        seconds, parts = {mode: [] for mode in self.modes}, {mode: [] for mode in self.heads}
        stats, texts = {mode: Stats() for mode in self.modes}, {}
        for mode in self.modes:  # warm up
            self.decode(mode, temperature, self.seed, prompts=self.prompts[:1])
        for i in range(n_rounds):
            for mode in self.modes:
                with parts_timed(self.heads[mode]) if mode in self.heads else nullcontext() as moments:
                    spent, text = timed(lambda: self.decode(mode, temperature, self.seed + i, stats[mode]), self.device)
                n_tokens = sum(map(len, text))
                seconds[mode].append(spent / n_tokens)
                texts.setdefault(mode, text)
                if mode in self.heads:
                    parts[mode].append({name: sum(seconds_between(*pair) for pair in pairs) / n_tokens
                                        for name, pairs in moments.items()})
        return seconds, parts, stats, texts

    @torch.inference_mode()
    def first_difference(self, texts, mode="speculative"):
        """Where greedy texts first part, and the gap between the two largest logits there; None where none part."""
        for i, (prompt, plain, fast) in enumerate(zip(self.prompts, texts["plain"], texts[mode])):
            for k, (a, b) in enumerate(zip(plain, fast)):
                if a != b:
                    logits = self.model(window_ids(prompt + plain[:k], self.model))[0, -1]
                    top = logits[: self.model.config.n_token].topk(2).values
                    return {"prompt": i, "token": k, "logit_gap": (top[0] - top[1]).item()}
        return None

    def rows(self, temperature, n_rounds):
        """One row of the table per mode, and the first round's texts."""
        seconds, parts, stats, texts = self.rounds(temperature, n_rounds)
        n_prefills = n_rounds * len(self.prompts)  # a forward pass and a token each

        def times_faster_than_plain(own):
            return statistics.median(plain / mine for plain, mine in zip(seconds["plain"], own))

        rows = []
        for mode in self.modes:
            per_token, s = statistics.median(seconds[mode]), stats[mode]
            per_step = s.tokens_per_step if s.steps else None  # transformers does not tell
            per_pass = (s.tokens + n_prefills) / (s.steps + n_prefills)  # tokens that a forward pass yields
            rows.append({
                "mode": mode, "temperature": temperature, "tokens_per_second": 1 / per_token,
                "tokens_per_step": per_step, "step_ms": per_step and 1e3 * per_token * per_pass,
                "speedup": times_faster_than_plain(seconds[mode]), "bound": None,
                "acceptance": [a if a == a else None for a in s.acceptance], "histogram": s.histogram,
            })
            if mode in self.heads:
                rows[-1] |= {name: getattr(self.heads[mode].config, name) for name in HEAD}
                ms = {name: 1e3 * per_pass * statistics.median(p[name] for p in parts[mode]) for name in parts[mode][0]}
                rows[-1]["parts_ms"] = {**ms, "rest": rows[-1]["step_ms"] - sum(ms.values())}
                rows[-1]["bound"] = times_faster_than_plain([p["trunk"] + p["targets"] for p in parts[mode]])
        return rows, texts


def describe(bench, args):
    """What was measured, on what."""
    config, device = bench.model.config, bench.device
    trunk, head = bench.model.n_params()
    return {
        "out_dir": args.out_dir, "device": str(device), "hardware": hardware(device), "torch": torch.__version__,
        "dtype": args.dtype, "threads": torch.get_num_threads(), "trunk_parameters": trunk, "head_parameters": head,
        **{name: getattr(config, name) for name in HEAD},
        "target": config.target, "vocab_size": config.n_token, "prompts": len(bench.prompts),
        "tokens_per_prompt": bench.n_tokens, "rounds": args.rounds, "seed": args.seed,
        **({"transformers": version("transformers"), "prompt_lookup_tokens": LOOKUP} if args.peers else {}),
    }


def print_card(card):
    for key, value in card.items():
        print(f"{key:18} {value}")
    if card["target"] == "marginal":
        print("target = marginal: plain decoding computes r heads for its one token, too. lm_head_only is the same\n"
              "trunk with its plain LM head, for its speed alone: that head was not trained to predict on its own.")


def print_table(rows):
    width = max(len(row["mode"]) for row in rows)
    print(f"\n{'mode':{width}} temp  tokens/s speed-up  bound tok/step  acceptance by position")
    for row in rows:
        acceptance = " ".join("-" if a is None else f"{a:.2f}" for a in row["acceptance"])
        bound = f"{row['bound']:.2f}x" if row["bound"] else ""
        per_step = f"{row['tokens_per_step']:.2f}" if row["tokens_per_step"] else ""
        print(f"{row['mode']:{width}} {row['temperature']:4.1f} {row['tokens_per_second']:9.0f} {row['speedup']:7.2f}x "
              f"{bound:>6} {per_step:>8}  {acceptance}")
        if "parts_ms" in row:
            shares = (f"{k}:{h / sum(row['histogram']):.0%}" for k, h in enumerate(row["histogram"]) if k)
            print(f"{'':{width}}  steps by tokens: {' '.join(shares)}")
            parts = " + ".join(f"{part} {ms:.2f}" for part, ms in row["parts_ms"].items())
            print(f"{'':{width}}  a step {row['step_ms']:.2f} ms = {parts}")


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
    parser.add_argument("--peers", action="store_true",
                        help="also time decoding without a cache, and Hugging Face's transformers on the same weights")
    parser.add_argument("--beside", metavar="OUT_DIR", nargs="+", default=[],
                        help="also time the heads of other checkpoints, which were trained on the same, frozen trunk")
    parser.add_argument("--plot", metavar="FILE.png", help="draw the speed-ups, the acceptance and the histogram")
    return parser.parse_args()


def main():
    args = parse_args()
    if args.plot:
        check_plot(args.plot)  # now, not after minutes of measuring
    model, enc, ckpt = load(args.out_dir, args.device, args.dtype)
    if model.cp_head is None:
        sys.exit(f"{args.out_dir} has n_future = 1: there is no head to draft from, so nothing to compare.")
    beside = {out_dir: load(out_dir, args.device, args.dtype)[0] for out_dir in args.beside}
    for out_dir, other in beside.items():
        check_same_law(model, other, out_dir)
    prompts = [prompt_ids(enc, text) for text in ckpt["meta"]["prompts"]]
    room = model.config.block_size - max(map(len, prompts))
    n_tokens = args.max_new_tokens or max(2, min(256, room))
    if args.peers and n_tokens > room:
        sys.exit(f"--peers: transformers has no window that moves on, so --max_new_tokens must be at most {room}.")
    bench = Bench(model, prompts, n_tokens, args.seed, args.peers, beside)
    torch.set_num_threads(args.threads or bench.best_threads())
    card = describe(bench, args)
    print_card(card)
    for mode, head in bench.heads.items():
        print(f"{mode}: n = {head.config.n_future}, r = {head.config.rank}, context {head.config.context}")

    greedy, texts = bench.rows(0.0, args.rounds)
    sampled, _ = bench.rows(1.0, args.rounds)
    print_table(greedy + sampled)
    card["first_difference"] = {mode: bench.first_difference(texts, mode) for mode in texts
                                if mode not in ("plain", "lm_head_only")}
    print()
    for mode, part in card["first_difference"].items():
        print(f"temperature 0, {mode}: " + ("the text of plain decoding, token for token" if part is None else
              f"texts part at token {part['token']} of prompt {part['prompt']}; the two top logits differ by "
              f"{part['logit_gap']:.1e} there"))
    print(json.dumps({"card": card, "rows": greedy + sampled}), flush=True)
    if args.plot:
        save(draw_bench(card, greedy + sampled), args.plot)


if __name__ == "__main__":
    run_script(main)
