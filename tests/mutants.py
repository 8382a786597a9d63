"""Do the tests see faults? This plants one at a time, and says which test finds it first.

    python tests/mutants.py                all, two at a time; writes the table of docs/testing.md
    python tests/mutants.py model.py       those of a file; writes nothing

A fault, a mutant, is a small edit of a copy of the repository, with what is not committed, in a
temporary folder: nobody's files are touched. Of the tests, those files run that can see it, the
likeliest first, up to the first failure. At the end, the tests that found something run once more without any fault, and have to
pass. docs/testing.md says how to add one.
"""

import os
import queue
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
JOBS, LIMIT = 2, 600  # processes side by side; seconds for a mutant: one may loop for ever
RUNNING = set()  # these processes
TABLE = re.compile(r"(?<=<!-- mutants -->\n).*(?=<!-- end of mutants -->)", re.S)  # in the document


class Mutant(NamedTuple):
    file: str
    what: str  # is wrong, in plain words
    old: str  # text that the file has exactly once
    new: str  # what stands there instead
    tests: str  # the files that can see it: "heads" is tests/test_heads.py
    options: str = ""  # of pytest: -k where another test would stumble over it first

    def paths(self):
        return ["test_cp_head.py" if name == "cp_head" else f"tests/test_{name}.py"
                for name in self.tests.split()]

    def source(self):
        """The file with the fault."""
        return (ROOT / self.file).read_text(encoding="utf-8").replace(self.old, self.new)


M = Mutant
MUTANTS = [
    M("model.py", "the joint leaves out the components' weights",
      "log_w.unsqueeze(1) + log_p.cumsum(1)", "log_p.cumsum(1)", "cp_head"),
    M("model.py", "the router's softmax goes over the positions",
      "widen(self.router(e)), dim=-1", "widen(self.router(e)), dim=0", "cp_head"),
    M("model.py", "the balance loss sees the joint's share of the positions alone",
      "joint = self.head.log_joint(",
      "balance = balance_loss(log_w[some])\n        joint = self.head.log_joint(", "cp_head"),
    M("model.py", "walking through a window, the posterior is not updated",
      "self.log_b = self.log_b + self.head.log_along(self.P_x, x)", "pass", "cp_head"),
    M("model.py", "q has the weights from before the drafts, not those that they lead to",
      "(log_b.unsqueeze(1) + seen.cumsum(1))", "log_b.unsqueeze(1).expand_as(seen)", "cp_head"),
    M("model.py", "in a pass after others, a token sees the one after it",
      "mask.triu_(past + 1)", "mask.triu_(past + 2)", "model"),
    M("model.py", "drafts are softmaxes over padded ids, too",
      "self.lm_head.weight[: self.config.n_token]", "self.lm_head.weight", "decode"),
    M("model.py", "the logits of all factors are kept for the backward pass",
      "partial(checkpoint, chunk, use_reentrant=False, preserve_rng_state=False)", "chunk",
      "model"),
    M("decode.py", "after a rejection the token is drawn from p, not from the residual",
      "return (keep * p - q).relu()", "return keep * p", "cp_head"),
    M("decode.py", "the residual leaves out keep",
      "(keep * p - q).relu()", "(p - q).relu()", "cp_head"),
    M("decode.py", "a token of probability 0 can be drawn",
      "u * cdf[..., -1:], right=True", "u * cdf[..., -1:]", "decode"),
    M("decode.py", "top-p leaves out the token that crosses the threshold",
      "sorted_p.cumsum(-1) - sorted_p ", "sorted_p.cumsum(-1) ", "decode"),
    M("decode.py", "the temperature is forgotten where top-p is given",
      "if temperature != 1:", "if temperature != 1 and top_p is None:", "decode"),
    M("decode.py", "of equal logits, drafts are judged by the last and drawn by the first",
      "keep_equal(logits.argmax(-1), drafted)",
      "keep_equal(logits.size(-1) - 1 - logits.flip(-1).argmax(-1), drafted)",
      "decode"),
    M("decode.py", "a sampler's generator, and so the seed, is not used",
      "partial(torch.rand, generator=generator)", "torch.rand", "decode"),
    M("decode.py", "rejected drafts stay in the cache",
      "cache.length = length + len(new)", "cache.length = length + x.size(1)", "cp_head"),
    M("decode.py", "a draft starts from the state of the last draft, also of a rejected one",
      "return hidden[:, k], token[0]", "return hidden[:, -1], token[0]", "decode"),
    M("decode.py", "after a new window, the draft starts from the old window's state",
      "            e = model.hidden(window_ids(tokens, model)[:, :-1], cache)[:, -1]",
      "            model.hidden(window_ids(tokens, model)[:, :-1], cache)", "decode"),
    M("decode.py", "the window moves one token too early",
      "-(-(t - block_size) // stride)", "((t - block_size) // stride + 1)", "decode"),
    M("decode.py", "plain decoding, the baseline, has lost its cache",
      "        if cache.length == model.config.block_size:", "        if True:", "decode"),
    M("decode.py", "the stop token is not part of the text",
      "return block[: i + 1], 0", "return block[:i], 0", "cp_head"),
    M("decode.py", "the tokens after a text's end are counted",
      "stats.count(len(new), len(block)", "stats.count(len(new), len(new)", "decode"),
    M("train.py", "gradients are a sum over grad_accum, not a mean",
      "scaler.scale(loss / cfg.grad_accum)", "scaler.scale(loss)", "train"),
    M("train.py", "the cosine does not wait for the warm-up",
      "x = (progress - cfg.warmup) / (1 - cfg.warmup)", "x = progress", "train"),
    M("train.py", "weight decay on norms and on the head",
      '{"params": rest, "weight_decay": 0.0}', '{"params": rest, "weight_decay": cfg.weight_decay}',
      "train"),
    M("train.py", "the last window of the text is never seen",
      "len(self.data) - self.T - self.n + 1", "len(self.data) - self.T - self.n", "train"),
    M("train.py", "--resume draws the windows from the beginning again",
      'self.windows.set_state(states[RANK]["windows"])', "pass", "robustness"),
    M("train.py", "--resume forgets the optimizer's moments",
      'self.optimizer.load_state_dict(ckpt["optimizer"])', 'ckpt["optimizer"]', "robustness",
      "-k bit_identically"),
    M("train.py", "the checkpoint is written in its place, not beside it",
      "with replacing(path) as file:\n            torch.save",
      'with open(path, "wb") as file:\n            torch.save', "robustness"),
    M("train.py", "the checkpoint has no tokenizer",
      '"meta": self.meta,', '"meta": {**self.meta, "tokenizer": None},', "scripts robustness"),
    M("train.py", "every rank trains alone",
      "run.net = DistributedDataParallel(run.net)", "pass", "distributed"),
    M("train.py", "the validation text is the training text",
      'self.read_data("val")', 'self.read_data("train")', "train"),
    M("train.py", "the weights of the loss do not reach it",
      '("joint_weight", "balance_weight", "joint_share")', '("joint_share",)', "train"),
    M("train.py", "the process group outlives the run, and may abort Python",
      "from torch.distributed.nn import functional", "pass", "distributed"),
    M("common.py", "all ranks get the same batches",
      "self.at(starts[rank]", "self.at(starts[0]", "distributed"),
    M("common.py", "the validation windows are drawn anew every time",
      "np.linspace(0, self.n_starts - 1, n)", "np.random.randint(self.n_starts, size=n)", "train"),
    M("common.py", "a folder is not locked",
      "lock.acquire()", 'open(folder / ".lock", "a").close()', "robustness"),
    M("common.py", "every exception becomes one line, bugs, too",
      "    except BadInput as e:\n        sys.exit(str(e))",
      "    except Exception as e:\n        sys.exit(str(e))", "robustness", "-k traceback"),
    M("common.py", "a foreign checkpoint can run code",
      "weights_only=True", "weights_only=False", "robustness"),
    M("sample.py", "--seed is not used",
      "torch.Generator(model.device).manual_seed(args.seed)", "torch.Generator(model.device)",
      "scripts"),
    M("tokenizer.py", "long texts are cut anywhere, not at a line's end",
      'text.rfind("\\n", start, start + SEGMENT) + 1 or start + SEGMENT', "start + SEGMENT",
      "tokenizer"),
    M("prepare_tinystories.py", "documents of val are in train, too",
      "if i not in val)", "if True)", "tokenizer"),
    M("prepare_tinystories.py", "a download that broke off counts as whole",
      "if size < whole < sys.maxsize:", "if False:", "download"),
    M("prepare_tinystories.py", "the part of an older version is continued",
      ', "If-Range": version.read_text()', "", "download"),
    M("bench_speculative.py", "the token of the prefill counts as one of a step",
      'o["tokens"] - o["prompts"] for', 'o["tokens"] for', "bench"),
    M("bench_speculative.py", "the clock stops before the device is done",
      "result = function()\n    synchronize(device)\n", "result = function()\n", "bench"),
    M("bench_speculative.py", "nothing is warmed up",
      "self.decode(name, temperature, self.seed, [max(self.prompts, key=len)], stop_token=None)",
      "pass", "bench"),
    M("bench_speculative.py", "every speed-up is over plain, whatever the mode names",
      "plain = rounds[mode.base]", 'plain = rounds["plain"]', "bench captured"),
    M("heads/low_rank.py", "decoding goes on with the W U of older directions",
      "in (unembed, self.directions)]", "in (unembed,)]", "heads"),
    M("heads/conditional.py", "the joint of the others is of the state that has not seen x_1",
      "super().log_joint(z, gold[:, 1:], unembed)", "super().log_joint(e, gold[:, 1:], unembed)",
      "cp_head"),
    M("heads/chain.py", "all offsets share one gate",
      "gates[:, s - 2]", "gates[:, 0]", "cp_head"),
    M("heads/hmm.py", "the drawn path moves by the transition of the place before",
      "in log_T[1:k]:", "in log_T[: k - 1]:", "cp_head"),
    M("heads/masks.py", "a mask sees the masks after it",
      "torch.ones(m, m, device=x.device).tril()", "torch.ones(m, m, device=x.device)", "masks"),
    M("heads/few_tokens.py", "a token that is never drafted counts as the last that is",
      "x.clamp_max(self.K - 1)) * inside", "x.clamp_max(self.K - 1))", "heads"),
    M("decoders/batched.py", "rejected drafts stay in a row's cache",
      "cache.length[i] += k + 1", "cache.length[i] += found.size(1) - 2", "batched"),
    M("decoders/captured.py", "all steps use the random numbers of the first",
      "self.draw_numbers(generator)\n        if n_drafts", "if n_drafts", "captured"),
    M("decoders/coupled.py", "drafts that were thrown away move the places on",
      "self.place = self.verified  #", "pass  #", "cp_head decode"),
    M("decoders/draft_length.py", "CLP promises the chance of at most k drafts, not of at least k",
      "p.flip(-1).cumsum(-1).flip(-1)", "p.cumsum(-1)", "draft_length"),
    M("decoders/draft_tree.py", "the nodes of a tree stand one after another, not by their depth",
      "past + tree.depth.unsqueeze(0)", "past + torch.arange(x.size(1)).unsqueeze(0)",
      "draft_tree"),
    M("pretrained/adapter.py", "a window that slides is one token too long",
      "min(block_size, window - 1)", "min(block_size, window)", "pretrained"),
    M("pretrained/packed.py", "packed layers forget their bias",
      "self.times(x, self.bias)", "self.times(x)", "pretrained"),
    M("pretrained/convert.py", "the optimizer's moments go to other parameters",
      "enumerate(decayed + rest)", "enumerate(rest + decayed)", "pretrained"),
    M("experiments/reproduce.py", "a gain has the wrong sign",
      "value(found, against, None, labels) - value(found, run, None, labels)",
      "value(found, run, None, labels) - value(found, against, None, labels)", "reproduce"),
    M("course/exercises.py", "an answer without the components' weights",
      "of the window's own tokens -> (N, n).\n    \"\"\"\n    raise NotImplementedError",
      "of the window's own tokens -> (N, n).\n    \"\"\"\n    return log_p.cumsum(1).logsumexp(-1)",
      "exercises"),
]


def pytest(copy, *args):
    """The tests that fail in a copy of the repository; of what cannot be imported, the file."""
    command = [sys.executable, "-m", "pytest", "-v", "-p", "no:cacheprovider", *args]
    # a file changes faster than the times by which Python tells old bytecode
    own = {**os.environ, "PYTHONDONTWRITEBYTECODE": "1", "TMPDIR": str(copy.parent)}
    log = copy.parent / f"{copy.name}.log"
    with open(log, "w", encoding="utf-8") as out:
        process = subprocess.Popen(command, cwd=copy, env=own, stdout=out, stderr=out,
                                   start_new_session=True)
        RUNNING.add(process)
        try:
            code = process.wait(LIMIT)
        except subprocess.TimeoutExpired:
            end(process)
            return ["time limit"]
        finally:
            RUNNING.remove(process)
    output = log.read_text(encoding="utf-8", errors="replace")
    tests = re.findall(r"^(\S+::.+?) (?:FAILED|ERROR)\b", output, flags=re.M)
    failures = tests or re.findall(r"^ERROR (\S+\.py)", output, flags=re.M)
    if bool(code) != bool(failures):
        raise RuntimeError(f"pytest ended with {code}:\n{output[-2000:]}")
    return failures


def end(process):
    """With all that it has started."""
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def hunt(mutant, copies):
    """(test that found it or None, seconds)."""
    copy, start = copies.get(), time.monotonic()
    path = copy / mutant.file
    before = path.read_bytes()
    try:
        path.write_text(mutant.source(), encoding="utf-8")
        found = pytest(copy, "-x", *mutant.options.split(), *mutant.paths())
        return found[0] if found else None, time.monotonic() - start
    finally:
        path.write_bytes(before)
        copies.put(copy)


def table(found):
    """The rows of docs/testing.md."""
    rows = ["| file | fault | found by |", "|---|---|---|"]
    for m in MUTANTS:
        test, _ = found[m]
        test = f"`{test.split('[')[0]}`" if test else "**not found**"
        rows.append(f"| `{m.file}` | {m.what} | {test} |")
    return "\n".join(rows) + "\n"


def plant_all(mutants):
    """{mutant: what hunt says}, and which of the tests that found one fail without any, too."""
    found, copies = {}, queue.Queue()
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(JOBS) as pool:
        for i in range(JOBS):
            copy = Path(folder) / f"copy{i}"
            shutil.copytree(ROOT, copy, ignore=shutil.ignore_patterns(
                ".git", "__pycache__", ".*cache", ".venv", "data", "out", "models"))
            copies.put(copy)
        jobs = {pool.submit(hunt, m, copies): m for m in mutants}
        try:
            for n, job in enumerate(as_completed(jobs), 1):
                m, (test, seconds) = jobs[job], job.result()
                found[m] = test, seconds
                what = f"found by {test}" if test else "NOT FOUND"
                print(f"{n}/{len(jobs)} {m.file}: {m.what}: {what} in {seconds:.0f} s", flush=True)
        except BaseException as e:
            pool.shutdown(wait=False, cancel_futures=True)
            for process in [*RUNNING]:
                end(process)
            if isinstance(e, KeyboardInterrupt):
                sys.exit(130)
            raise
        tests = sorted({test for test, _ in found.values() if test and "::" in test})
        return found, pytest(copies.get(), *tests) if tests else []


def main(files):
    known = {m.file: None for m in MUTANTS}
    if not known.keys() >= set(files):
        sys.exit(f"{__doc__}\nThere are mutants of {', '.join(known)}.")
    chosen = [m for m in MUTANTS if not files or m.file in files]
    start = time.monotonic()
    found, false = plant_all(chosen)
    lost = [m for m in chosen if not found[m][0]]
    print(f"{len(chosen) - len(lost)} of {len(chosen)} found in {time.monotonic() - start:.0f} s",
          *(f"not found: {m.file}: {m.what}" for m in lost),
          *(f"fails without any fault, too: {test}" for test in false), sep="\n")
    if not files:
        document = ROOT / "docs/testing.md"
        text = document.read_text(encoding="utf-8")
        document.write_text(TABLE.sub(lambda _: table(found), text), encoding="utf-8")
    return 1 if lost or false else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
