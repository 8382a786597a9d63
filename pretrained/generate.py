"""Let a pretrained model answer prompts, and keep its hidden states beside its text.

    python -m pretrained.generate --init_from HuggingFaceTB/SmolLM2-135M-Instruct
    python -m pretrained.train --data_dir data/own --out_dir out/own
    python bench_speculative.py --out_dir out/own

The prompts are those of prompts.py, or yours. The trunk is frozen, so the head trains over the
stored states, at its own cost alone. An interrupted run goes on by the same command. --init_from
names a model of the hub, a folder, or a .gguf file. A checkpoint then holds the head, and the name
and the hash of the trunk. Needs transformers, and for a .gguf file gguf and accelerate.
"""

import hashlib
import itertools
import json
from functools import partial
from pathlib import Path

import torch
from torch.nn import functional as F

from common import (ArgumentParser, any_path, any_seed, locked, number, pick_device, progress_bar,
                    run_script, utf8)
from decode import categorical
from model import BadInput, widen
from pretrained.adapter import load_pretrained
from pretrained.prompts import FRAMES, HELD_OUT, SHARES, read_prompts
from pretrained.texts import open_texts


@torch.inference_mode()
def answer(model, prompts, max_new_tokens, temperature, ends, generator):
    """Continue prompts, lists of ids, all at once.

    Returns for each prompt its tokens x_1, ..., x_L (L,), the last one being one of ends or the
    max_new_tokens-th; the hidden states e_0, ..., e_{L-1} (L, C) that they were drawn from; and the
    logsumexp (L,) of the logits there.
    """
    B, width, device = len(prompts), max(map(len, prompts)), model.device
    idx = torch.full((B, width), prompts[0][0], device=device)
    mask = torch.zeros_like(idx)  # the padding is on the left, and nothing sees it
    for i, prompt in enumerate(prompts):
        idx[i, width - len(prompt) :] = torch.tensor(prompt, device=device)
        mask[i, width - len(prompt) :] = 1
    places, rows = (mask.cumsum(1) - 1).clamp_min(0), torch.arange(B)
    past, found, uniform = None, [], partial(torch.rand, generator=generator)
    ends = torch.tensor(sorted(ends), dtype=torch.long, device=device)
    for _ in range(max_new_tokens):
        out = model.pass_over(idx, past, attention_mask=mask, position_ids=places)
        past, e = out[model.cache_name], out.last_hidden_state[:, -1]
        logits = widen(model.lm_head(e))
        p = (logits / temperature).softmax(-1)
        # sums in float64 take 15 times as long, for digits that training text does not need
        tokens = categorical(p, uniform, torch.float32)
        found.append((rows, tokens.cpu(), e.cpu(), logits.logsumexp(-1).cpu()))
        alive = ~torch.isin(tokens, ends)
        if not alive.all():  # texts that have ended make room
            kept = alive.nonzero().flatten()
            if not len(kept):
                break
            past.batch_select_indices(kept)
            rows, mask, places, tokens = rows[kept.cpu()], mask[kept], places[kept], tokens[kept]
        idx = tokens.unsqueeze(1)
        mask, places = F.pad(mask, (0, 1), value=1), places[:, -1:] + 1
    rows, *parts = (torch.cat(column) for column in zip(*found))
    return [tuple(part[rows == i] for part in parts) for i in range(B)]


def schedule(prompts, shares):
    """Prompts for ever: the kinds by their shares, in turn, and each kind's prompts in order."""
    sources = {kind: itertools.cycle(texts) for kind, texts in prompts.items()}
    turns = [kind for kind in prompts for _ in range(shares.get(kind, 1))]
    for kind in itertools.cycle(turns):
        yield next(sources[kind])


def chosen_kinds(prompts, kinds):
    """{kind: prompts} of the kinds that are asked for; None are all."""
    unknown = sorted(set(kinds or ()) - set(prompts))
    if unknown:
        raise BadInput(f"there are no prompts of the kind {unknown[0]}; there are "
                       f"{', '.join(prompts)}")
    return {kind: texts for kind, texts in prompts.items() if not kinds or kind in kinds}


LONGEST_MESSAGE = 32  # tokens that finish a frame


def finish(model, enc, frames, generator):
    """The frames as messages of one line, which the model finishes as if it were the user."""
    opened = [enc.open_message(frame) for frame in frames]
    texts = answer(model, opened, LONGEST_MESSAGE, 0.8, enc.ends, generator)
    # decoded after their beginnings: alone, a text may lose its first space
    whole = [enc.decode([*ids, *tokens.tolist()]) for ids, (tokens, *_) in zip(opened, texts)]
    messages = [frame + text[len(enc.decode(ids)) :].split("\n")[0]
                for frame, ids, text in zip(frames, opened, whole)]
    held_out = {message for kind in HELD_OUT.values() for message in kind}
    return [frame if message in held_out else message for frame, message in zip(frames, messages)]


def generate(args):
    training, held_out = (chosen_kinds(prompts, args.kinds) for prompts in
                          (read_prompts(args.prompts) if args.prompts else (FRAMES, HELD_OUT)))
    dtype, path = args.dtype, Path(args.data_dir) / "meta.json"
    if dtype == "auto" and path.exists():  # a trial might choose another one than before
        dtype = json.loads(path.read_bytes()).get("dtype", dtype).removeprefix("torch.")
    model, enc = load_pretrained(args.init_from, pick_device(args.device), dtype,
                                 chat=args.system or None)
    if args.batch_size > 1:
        model.check_padding()
    model.pack()
    settings = {
        "trunk": model.source, "chat": enc.chat, "ends": sorted(enc.ends),
        "vocab_size": enc.n_vocab, "dtype": str(model.dtype),
        "n_embd": model.config.n_embd, "temperature": args.temperature, "seed": args.seed,
        "max_new_tokens": args.max_new_tokens, "batch_size": args.batch_size,
        "prompts": [prompt for kind in held_out.values() for prompt in kind],
        "kinds": [kind for kind, prompts in held_out.items() for _ in prompts],
        "training": hashlib.sha256(repr(training).encode()).hexdigest(),
    }
    frames = enc.chat and not args.prompts  # which the model itself makes messages of
    longest = max(len(enc.prompt_ids(prompt)) for kind in training.values() for prompt in kind)
    longest += LONGEST_MESSAGE if frames else 0
    if longest + args.max_new_tokens > model.config.block_size:
        raise BadInput(f"The longest prompt, {longest} tokens with its ending, and "
                       f"--max_new_tokens {args.max_new_tokens} do not fit "
                       f"{model.config.block_size}, the model's context or its window")
    with locked(args.data_dir) as folder:
        texts = open_texts(folder, settings)
        lengths, prompts = texts.meta["lengths"], schedule(training, {} if args.prompts else SHARES)
        for _ in lengths:
            next(prompts)
        with progress_bar(total=args.num_texts, initial=len(lengths), unit="text") as bar:
            while len(lengths) < args.num_texts:
                generator = torch.Generator(model.device).manual_seed(args.seed + len(lengths))
                batch = list(itertools.islice(prompts, args.batch_size))
                if frames:
                    batch = finish(model, enc, batch, generator)
                batch = [enc.prompt_ids(prompt) for prompt in batch]
                texts.append(answer(model, batch, args.max_new_tokens, args.temperature,
                                    enc.ends, generator))
                bar.update(args.batch_size)
                bar.set_postfix(tokens=f"{sum(lengths):,}")
    print(f"{args.data_dir}: {len(lengths):,} texts of {model.source['name']}, {sum(lengths):,} "
          f"tokens, {'answers to messages' if enc.chat else 'plain text'}")


# -----------------------------------------------------------------------------


def parse_args():
    parser = ArgumentParser(__doc__)
    parser.add_argument("--init_from", required=True, type=any_path,
                        help="the model: a name of the hub, a folder or a .gguf file")
    parser.add_argument("--data_dir", default="data/own", type=any_path,
                        help="folder for the texts (data/own)")
    parser.add_argument("--prompts", nargs="+", type=any_path, metavar="FILE",
                        help="files with a prompt per line, each one a kind (those of prompts.py)")
    parser.add_argument("--kinds", nargs="+", metavar="KIND",
                        help="the kinds to write: a head for these alone drafts them better (all)")
    parser.add_argument("--system", type=utf8, metavar="MESSAGE", default="",
                        help="the system's message, which chats begin with (none)")
    parser.add_argument("--num_texts", type=number(int, 1), default=4096,
                        help="texts to write, in whole batches (4096)")
    parser.add_argument("--max_new_tokens", type=number(int, 2), default=192,
                        help="longest text in tokens (192)")
    parser.add_argument("--temperature", type=number(float, 1e-3, 1e3), default=0.7,
                        help="of the draws (0.7)")
    parser.add_argument("--batch_size", type=number(int, 1), default=96, help="texts at once (96)")
    parser.add_argument("--seed", type=any_seed, default=1337, help="of prompts and draws (1337)")
    parser.add_argument("--device", default="auto",
                        help="cpu, cuda, cuda:1; auto takes cuda, else cpu")
    parser.add_argument("--dtype", default="auto", choices=["auto", "float32", "bfloat16"],
                        help="auto is bfloat16 where a trial finds it faster (auto)")
    return parser.parse_args()


def main():
    generate(parse_args())


if __name__ == "__main__":
    run_script(main)
