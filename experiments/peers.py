"""bench_speculative.py beside other people's decoders on the same weights: those of transformers.

    python -m experiments.peers --out_dir out/toy

For a model from here, decoding without a cache is also timed. Flags and output are those of
bench_speculative.py; see there.
"""

from contextlib import nullcontext
from functools import partial
from importlib.metadata import version

import torch

import bench_speculative
from bench_speculative import Mode
from common import import_transformers, run_script
from decode import generate
from model import BadInput
from sample import fast_kernels

LOOKUP = 10  # tokens that prompt lookup drafts at most


def to_transformers(model):
    """The same GPT as a Hugging Face GPT2LMHeadModel: the same distribution of the next token, to
    rounding. A pretrained model is one of transformers already.

    BadInput without transformers, or where the target is not the LM head.
    """
    if hasattr(model, "lm"):
        return model.lm
    if model.config.target != "lm_head":
        raise BadInput("The peers need a model with target lm_head: others know nothing of the head's "
                       "marginal.")
    transformers = import_transformers("This bench")
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
            else:  # theirs has no padding ids, and positions past the block for the lookup's guesses
                rows = min(len(theirs), len(tensor))
                theirs[rows:].zero_()
                theirs[:rows].copy_(tensor[:rows])
    return peer


def transformers_generate(peer, prompt, max_new_tokens, *, sampler, stop_token=None, stats=None,
                          **options):
    """peer.generate in the form of our decoders. Our generator seeds torch's own."""
    peer.generation_config.eos_token_id = stop_token
    options["do_sample"] = sampler.generator is not None
    if options["do_sample"]:
        seed = torch.randint(2**31, (), generator=sampler.generator, device=peer.device)
        torch.manual_seed(seed.item())
        options |= dict(temperature=1.0, top_k=0)
    idx = torch.tensor([prompt], device=peer.device)
    text = peer.generate(idx, attention_mask=torch.ones_like(idx), max_new_tokens=max_new_tokens,
                         **options)
    return text[0, len(prompt) :].tolist()


def add_transformers(bench):
    """transformers' two decoders, with the kernels that are faster for them, default or ours."""
    peer = to_transformers(bench.model)
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


def add_peers(bench):
    """To a Bench, the modes no_cache, transformers and transformers_prompt_lookup."""
    room = bench.model.config.block_size - max(map(len, bench.prompts))
    if bench.n_tokens > room:
        raise BadInput("transformers' window does not move on, so --max_new_tokens must be at most "
                       f"{room}.")
    if not hasattr(bench.model, "lm"):  # of a large model, it would take hours
        bench.modes["no_cache"] = Mode(generate, bench.model)
    add_transformers(bench)


# -----------------------------------------------------------------------------


def main():
    bench_speculative.main(__doc__, add_peers)


if __name__ == "__main__":
    run_script(main)
