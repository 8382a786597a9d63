"""A checkpoint from before commit 591b56d in the format of today.

    python -m pretrained.convert out/old/ckpt.pt out/new/ckpt.pt

What differs: a head of one component has no router; the circuit that was called tree is
tree_circuit; the draft vocabulary and the teacher are settings of pretrained.train alone; a
checkpoint says which file reads its trunk. The weights stay as they are, and so does the state of
training, with which --resume goes on, but for teachers that are gone. The old file is not changed.
"""

from dataclasses import fields
from pathlib import Path

import torch

from common import (ArgumentParser, any_path, check_writable, from_checkpoint, in_a_line,
                    read_checkpoint, replacing, run_script)
from model import BadInput
from pretrained.adapter import PretrainedConfig, new_head
from train import TrainConfig

ROUTER = ("head.router.weight", "head.router.bias")
BUFFERS = ("head.draft_ids", "head.draft_rows")  # and no parameters
GONE = ("lk", "nextlat")  # teachers


def convert(old):
    """The checkpoint dict of today that an old one becomes; BadInput where something in it is not
    known, or where today's code does not load the result."""
    args, settings = dict(old["model_args"]), dict(old.get("train_config", {}))
    one_router = ROUTER[0] in old["model"] and len(old["model"][ROUTER[0]]) == 1
    is_old = one_router or args.get("head") == "tree" or "draft_vocab" in args
    if not is_old or "trunk" in old and "door" in old["trunk"]:
        raise BadInput("it is of today's format already, or nanoGPT's, which --init_from takes as "
                       "it is")
    known = {"model_args": {f.name for f in fields(PretrainedConfig)},
             "train_config": {f.name for f in fields(TrainConfig)} | {"teacher", "draft_vocab"}}
    for part, names in (("model_args", args), ("train_config", settings)):
        if unknown := sorted(names.keys() - known[part]):
            raise BadInput(f"its {part} hold {unknown[0]}, which no version knows that this reads")
    for names in (args, settings):
        if names.get("head") == "tree":
            names["head"] = "tree_circuit"
    new = {**old, "model": dict(old["model"]), "model_args": args}
    if one_router:
        new["model"] = {name: tensor for name, tensor in old["model"].items() if name not in ROUTER}
    if "train_config" in old:
        new["train_config"] = settings
        if "random_of_others" not in old:  # of a version for one process, without teachers for ours
            new["random_of_others"] = []
            settings |= {} if "trunk" in old else {"teacher": "text", "draft_vocab": 0}
    if "optimizer" in old:
        new["optimizer"] = renumbered(old, new["model"], settings)
    if "trunk" in old:
        new["trunk"] = {"door": "adapter", **old["trunk"]}
    elif args.pop("draft_vocab", 0):
        raise BadInput("it has a draft vocabulary on a trunk of ours, which there is no more")
    if settings.get("teacher") in GONE:  # nothing can go on with it, but it decodes
        del new["optimizer"], new["train_config"]
    elif "trunk" not in old and settings.get("teacher") == "text":  # of train.py, which has none
        del settings["teacher"], settings["draft_vocab"]
    check(new)
    return new


def renumbered(old, state, settings):
    """The optimizer's state without the parameters that are gone: it knows them by numbers, in the
    order of train.py's two groups, matrices of the trunk first."""
    frozen = settings.get("freeze_trunk", False) or "trunk" in old
    names = [name for name in old["model"] if name not in ("lm_head.weight", *BUFFERS)
             and (name.startswith("head.") or not frozen)]
    decayed = [name for name in names
               if old["model"][name].dim() > 1 and not name.startswith("head.")]
    rest = [name for name in names if name not in decayed]
    optimizer = old["optimizer"]
    if [len(group["params"]) for group in optimizer["param_groups"]] != [len(decayed), len(rest)]:
        raise BadInput("its optimizer's state is of other parameters than its model")
    numbers = {number: new for new, number in enumerate(
        number for number, name in enumerate(decayed + rest) if name in state)}
    groups = [{**group, "params": [numbers[i] for i in group["params"] if i in numbers]}
              for group in optimizer["param_groups"]]
    moments = {numbers[i]: part for i, part in optimizer["state"].items() if i in numbers}
    return {"state": moments, "param_groups": groups}


def check(ckpt):
    """BadInput unless today's code loads the model, or of a pretrained trunk the head."""
    if "trunk" not in ckpt:
        from_checkpoint(ckpt)
        return
    head = new_head(PretrainedConfig(**ckpt["model_args"]))
    try:
        head.load_state_dict({name.removeprefix("head."): x for name, x in ckpt["model"].items()})
    except RuntimeError as e:  # torch's list of what is missing, superfluous or of another shape
        raise BadInput(in_a_line(e)) from None


# -----------------------------------------------------------------------------


def main():
    parser = ArgumentParser(__doc__)
    parser.add_argument("old", type=any_path, metavar="OLD.pt", help="the checkpoint to read")
    parser.add_argument("new", type=any_path, metavar="NEW.pt", help="the file to write")
    args = parser.parse_args()
    new = Path(args.new)
    if new.exists():
        raise BadInput(f"{new} is there already, and nothing is written over")
    check_writable(new)
    ckpt = read_checkpoint(args.old)
    try:
        ckpt = convert(ckpt)
    except BadInput as e:
        raise BadInput(f"{args.old} is not converted: {e}") from None
    except (AttributeError, KeyError, IndexError, TypeError, ValueError):  # of other types
        raise BadInput(f"{args.old} is not converted: it is not what train.py wrote") from None
    with replacing(new) as file:
        torch.save(ckpt, file)
    print(f"wrote {new}")


if __name__ == "__main__":
    run_script(main)
