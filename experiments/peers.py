"""bench_speculative.py with more rows: other heads, our other decoders, other people's decoders.

    python -m experiments.peers --out_dir out/a --beside out/b          other heads on its trunk
    python -m experiments.peers --out_dir out/toy --nodes 8 16          draft trees
    python -m experiments.peers --out_dir out/toy --captured --compile  steps of fixed shapes
    python -m experiments.peers --out_dir out/toy --transformers        decoders of transformers

All that is asked for is timed in one bench, in turn. Its own flags and its output are those of
bench_speculative.py; see there.
"""

import copy
import itertools
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from importlib.metadata import version

import torch

import bench_speculative
from bench_speculative import HEAD_FIELDS, Mode
from common import any_path, number, run_script
from decode import generate, generate_oracle
from decoders import captured, draft_tree
from model import BadInput
from pretrained.adapter import Pretrained
from sample import fast_kernels, load

LOOKUP = 10  # tokens that prompt lookup drafts at most

# -----------------------------------------------------------------------------
# other heads, and our other decoders


def check_same_target(model, other, out_dir):
    """BadInput unless both models write the same texts: then their heads compare."""
    if model.config.target != "lm_head":
        raise BadInput("--beside needs a model with target lm_head: with another, the head itself "
                       "says what gets written.")
    ours, theirs = model.state_dict(), other.state_dict()
    trunk = [name for name in ours if not name.startswith("head.")]
    config, about_head = vars(model.config), (*HEAD_FIELDS, "draft_vocab", "dropout")
    same = type(other.config) is type(model.config) and other.head is not None
    same = same and model.config == replace(
        other.config, **{name: config[name] for name in about_head if name in config})
    if not same or not all(torch.equal(ours[name].to_dense(), theirs[name].to_dense())
                           for name in trunk):
        raise BadInput(f"--beside: {out_dir} is not another head on the very trunk of --out_dir, "
                       "with target lm_head; train.py makes one with --init_from, --fresh_head "
                       "and --freeze_trunk.")


def add_beside(bench, models):
    """The heads of other models on the same trunk, {out_dir: model}."""
    for out_dir, other in models.items():
        check_same_target(bench.model, other, out_dir)
        bench.modes[f"speculative, {out_dir}"] = Mode(generate, other, True)


def heads_of(bench):
    """{mode: model} of the heads that draft in steps of decode.py."""
    return {name: mode.model for name, mode in bench.modes.items() if mode.function is generate}


def add_trees(bench, sizes):
    """Draft trees of some sizes, of every head."""
    for n_nodes, (name, model) in itertools.product(sizes, heads_of(bench).items()):
        draft_tree.check_tree(model, n_nodes)
        decoder = partial(draft_tree.generate, n_nodes=n_nodes)
        bench.modes[f"{name}, tree of {n_nodes}"] = Mode(decoder, model, True, has_parts=False)


def add_captured(bench, compile):
    """Plain decoding and every head in steps of fixed shapes, compared with each other."""
    if compile:
        captured.check_compiler(bench.device)
    how = "compiled" if compile else "captured"
    base = f"plain, {how}"
    bench.modes[base] = Mode(captured.kept(False, compile), bench.model)
    for name, model in heads_of(bench).items():
        bench.modes[f"{name}, {how}"] = Mode(captured.kept(True, compile), model, True, base=base,
                                             has_parts=False)


# -----------------------------------------------------------------------------
# transformers


def to_transformers(model):
    """The same GPT as a Hugging Face GPT2LMHeadModel: the same distribution of the next token, to
    rounding. A pretrained model is one of transformers already.

    BadInput without transformers, or where the target is not the LM head.
    """
    if model.config.target != "lm_head":
        raise BadInput("--transformers needs a model with target lm_head: others know nothing of "
                       "the head's marginal.")
    try:
        import transformers
    except ImportError:
        raise BadInput("--transformers needs it: python -m pip install transformers") from None
    transformers.logging.set_verbosity_error()
    if isinstance(model, Pretrained):
        peer = copy.copy(model.lm)  # its own has penalties and cuts of the model's makers
        peer.generation_config = transformers.GenerationConfig()
        return peer
    c = model.config
    peer = transformers.GPT2LMHeadModel(transformers.GPT2Config(
        vocab_size=c.n_token, n_positions=c.block_size + LOOKUP, n_embd=c.n_embd, n_layer=c.n_layer,
        n_head=c.n_head, activation_function="gelu", bos_token_id=None, eos_token_id=None))
    peer = peer.to(device=model.device, dtype=model.dtype).eval()
    ours, state = model.state_dict(), peer.state_dict()
    with torch.no_grad():
        for name, theirs in state.items():
            tensor = ours.get(name)
            if tensor is None:  # a bias that our model is without
                theirs.zero_()
            elif any(name.endswith(f"{layer}.weight") for layer in ("c_attn", "c_proj", "c_fc")):
                theirs.copy_(tensor.T)  # they are stored as inputs x outputs
            else:  # theirs has no padding ids, and positions past the block for lookup's guesses
                rows = min(len(theirs), len(tensor))
                theirs[rows:].zero_()
                theirs[:rows].copy_(tensor[:rows])
    return peer


def transformers_generate(peer, prompt, max_new_tokens, *, sampler, stop_token=None, stats=None,
                          **options):
    """peer.generate in the form of our decoders; stop_token as one of theirs, or a set of ids. Our
    generator seeds torch's own."""
    several = isinstance(stop_token, (set, frozenset))
    options["eos_token_id"] = sorted(stop_token) if several else stop_token
    options["do_sample"] = sampler.generator is not None
    if options["do_sample"]:
        seed = torch.randint(2**31, (), generator=sampler.generator, device=peer.device)
        torch.manual_seed(seed.item())
        cuts = sampler.warp.keywords
        options |= dict(temperature=cuts["temperature"], top_k=cuts["top_k"] or 0,
                        top_p=cuts["top_p"] or 1.0)
    idx = torch.tensor([prompt], device=peer.device)
    text = peer.generate(idx, attention_mask=torch.ones_like(idx), max_new_tokens=max_new_tokens,
                         **options)
    return text[0, len(prompt) :].tolist()


def add_transformers(bench):
    """The modes transformers and transformers_prompt_lookup, with the kernels that are faster for
    them, default or ours; and no_cache, decoding without a cache."""
    room = bench.model.config.block_size - max(map(len, bench.prompts))
    if bench.n_tokens > room:
        raise BadInput("transformers' window does not move on, so --max_new_tokens must be at most "
                       f"{room}.")
    peer = to_transformers(bench.model)
    if not isinstance(bench.model, Pretrained):  # of a large model, it would take hours
        bench.modes["no_cache"] = Mode(generate_oracle, bench.model)
    kernels = {"default": nullcontext, "without oneDNN": partial(fast_kernels, bench.model)}
    seconds = {name: [] for name in kernels}
    for _ in range(4):
        for name, context in kernels.items():
            bench.modes["transformers"] = Mode(transformers_generate, peer, kernels=context)
            seconds[name].append(bench.time_one("transformers"))
    kernel = min(seconds, key=lambda name: min(seconds[name][1:]))  # the first warms up
    best = kernels[kernel]
    bench.modes["transformers"] = Mode(transformers_generate, peer, kernels=best)
    lookup = partial(transformers_generate, prompt_lookup_num_tokens=LOOKUP)
    bench.modes["transformers_prompt_lookup"] = Mode(lookup, peer, kernels=best)
    bench.about |= {"transformers": version("transformers"), "transformers_kernels": kernel,
                    "prompt_lookup_tokens": LOOKUP}


# -----------------------------------------------------------------------------


def add_flags(parser):
    parser.add_argument("--beside", metavar="OUT_DIR", nargs="+", type=any_path, default=[],
                        help="the heads of other checkpoints, trained on the same frozen trunk")
    parser.add_argument("--nodes", type=number(int, 1, 1024), nargs="+", default=[], metavar="N",
                        help="trees of so many drafts: see decoders/draft_tree.py")
    parser.add_argument("--captured", action="store_true",
                        help="both decoders in steps of fixed shapes, which a GPU replays")
    parser.add_argument("--compile", action="store_true",
                        help="the same, in steps that torch.compile has compiled, some 15 s for "
                             "each decoder, temperature and size of the cache (needs a C++ "
                             "compiler)")
    parser.add_argument("--transformers", action="store_true",
                        help="transformers' generate, and its prompt lookup, on the same weights; "
                             "of a model from here, also decoding without a cache")


def add_modes(bench, args):
    """To a Bench, all that is asked for."""
    add_beside(bench, {out_dir: load(out_dir, args.device, args.dtype)[0]
                       for out_dir in args.beside})
    if args.transformers:
        add_transformers(bench)
    add_trees(bench, args.nodes)
    for compile in [False] * args.captured + [True] * args.compile:
        add_captured(bench, compile)


def main():
    bench_speculative.main(__doc__, add_flags, add_modes)


if __name__ == "__main__":
    run_script(main)
