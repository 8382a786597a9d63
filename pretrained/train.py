"""Train a head on a frozen trunk, from the trunk's own rows or its text.

    python -m pretrained.train --data_dir data/own --out_dir out/own     on what generate.py wrote
    python -m pretrained.train --preset toy --init_from out/toy/ckpt.pt --out_dir out/kl
    python -m pretrained.train --resume --out_dir out/own

The first is for a model of transformers: the head trains over the stored states, and a checkpoint
names the trunk. The second is for a model of train.py, whose states are computed in each step; its
checkpoint is one of train.py. Loop, flags, interruptions and torchrun are those of train.py, and
the loss is that of losses.py.
"""

from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch

import train
from common import number, run_script
from model import BadInput
from pretrained.adapter import check_last_states, load_checkpoint, load_pretrained, measured_dtype
from pretrained.losses import TEACHERS, loss_on_frozen_trunk, loss_on_states
from pretrained.texts import States, read_texts
from train import PRESETS, RANKS, TrainConfig, flag


@dataclass(frozen=True)
class HeadConfig(TrainConfig):
    teacher: str = flag("kl", "what the head learns from: the trunk's rows (kl), or the text alone",
                        tuple(TEACHERS))
    draft_vocab: int = flag(0, "K, the head drafts the K most frequent tokens of the text alone, "
                            "on a pretrained trunk; 0 is all", number(int, 0, 10**6))


OURS = {name: HeadConfig(**{**asdict(preset), "freeze_trunk": True, "target": "lm_head"})
        for name, preset in PRESETS.items()}
HEAD_PRESETS = {
    "pretrained": HeadConfig(
        data_dir="data/own", out_dir="out/own", freeze_trunk=True, head="recurrent", n_future=6,
        rank=1, draft_vocab=4096, batch_size=128, lr=2e-3, min_lr=1e-5, max_iters=9000,
        eval_interval=500, eval_windows=2048,
    ),
    **OURS,
}


class HeadRun(train.Run):
    Config, presets, script = HeadConfig, HEAD_PRESETS, "-m pretrained.train"

    def read_meta(self, cfg, ckpt):
        meta = read_texts(cfg.data_dir)
        if ckpt and (meta or "trunk" in ckpt) and ckpt["meta"] != meta:
            raise BadInput(f"The data in {cfg.data_dir} is not what {cfg.out_dir}/ckpt.pt was "
                           "trained on; a new run needs another --out_dir.")
        return meta or super().read_meta(cfg, ckpt)

    def read_data(self, split):
        if "trunk" in self.meta:
            return States(self.meta, self.cfg, split, self.device)
        return super().read_data(split)

    def build(self):
        cfg = self.cfg
        if not cfg.freeze_trunk or cfg.target != "lm_head" or cfg.n_future == 1:
            raise BadInput("A head learns here from a trunk that stays as it is, and from its LM "
                           "head: leave --no-freeze_trunk and --target away, and take an "
                           "--n_future above 1.")
        check_last_states(cfg.head)
        build = self.build_on_pretrained if "trunk" in self.meta else self.build_on_ours
        return self.taught(build())

    def build_on_pretrained(self):
        """The trunk that data_dir is of, with a fresh head."""
        cfg, source = self.cfg, self.meta["trunk"]
        if cfg.init_from or cfg.fresh_head:
            name = "init_from" if cfg.init_from else "fresh_head"
            raise BadInput(f"{cfg.data_dir} holds text and states of {source['name']}, which is "
                           f"the trunk; leave --{name} away")
        if RANKS > 1 and self.device.type == "cpu" and cfg.dtype == "auto":
            cfg = replace(cfg, dtype="float32")  # a trial in each process may end differently
        cfg = replace(cfg, dtype=measured_dtype(cfg.dtype, self.device))
        if "draft_vocab" not in self.given:  # the preset's, of which small vocabularies have less
            cfg = replace(cfg, draft_vocab=min(cfg.draft_vocab, self.meta["vocab_size"]))
        head = {name: getattr(cfg, name) for name in ("head", "n_future", "rank", "draft_vocab")}
        model, _ = load_pretrained(source["name"], self.device, cfg.dtype, source,
                                   self.meta["chat"], **head)
        built = {name: value for name, value in asdict(model.config).items() if hasattr(cfg, name)}
        self.cfg = replace(cfg, **built)  # what is built is what gets saved
        if cfg.draft_vocab:
            counts = self.read_data("train").counts(model.config.n_token)
            ids = np.argsort(-counts, kind="stable")[: cfg.draft_vocab].copy()
            model.head.choose_drafts(torch.from_numpy(ids), model.unembed.detach().cpu())
            share = counts[ids].sum() / counts.sum()
            print(f"drafts {len(ids):,} of {len(counts):,} tokens, {share:.1%} of the text")
        return model

    def build_on_ours(self):
        """The trunk of --init_from, a checkpoint of train.py or of nanoGPT."""
        if self.cfg.draft_vocab:
            raise BadInput("--draft_vocab is for a pretrained trunk; leave it away for a model of "
                           "train.py")
        model = super().build()
        if model.config.block_size < model.config.n_future:
            raise BadInput(f"The trunk's own rows need a --block_size of at least n_future, "
                           f"{model.config.n_future}")
        return model

    def report(self, val):
        super().report(val)
        print("a draft is accepted   " + " ".join(f"{share:.3f}" for share in val["accept"]) +
              f"   at temperature 1, by offset; {val['per_step']:.2f} tokens per step")

    def load(self, ckpt):
        if "trunk" not in self.meta:
            return self.taught(super().load(ckpt))
        path = Path(self.cfg.out_dir) / "ckpt.pt"
        return self.taught(load_checkpoint(ckpt, path, self.device, self.cfg.dtype)[0])

    def taught(self, model):
        """A model whose `loss`, and so model(*batch), is what a head learns from its teacher."""
        loss = loss_on_states if "trunk" in self.meta else loss_on_frozen_trunk
        model.loss = partial(loss, model, self.cfg.teacher)
        return model


def main():
    train.main(HeadRun, __doc__)


if __name__ == "__main__":
    run_script(main)
