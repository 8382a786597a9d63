"""A causal language model of Hugging Face transformers as the trunk of a head.

`Pretrained` is the adapter: all that decode.py and a head need of a trunk. A trunk is a model of the
hub, a folder, or a .gguf file; a checkpoint holds the head, and the name and the hash of the trunk.
How one is trained: see generate.py. Needs transformers, and for a .gguf file gguf and accelerate.
"""

import functools
import hashlib
import inspect
from dataclasses import asdict, replace
from pathlib import Path

import torch
import torch.nn as nn

from common import bfloat16_is_faster, import_transformers
from model import GPT, HEAD_FIELDS, BadInput, CPHead, GPTConfig, head_class, widen
from pretrained.losses import loss_on_states
from pretrained.packed import PackedLinear, can_pack, linear_weight, packed_unembed

# -----------------------------------------------------------------------------
# the files of a model


NEEDS = ("A pretrained model", "transformers, for a .gguf file also gguf and accelerate")


def find_model(name):
    """(folder, .gguf file in it or None) of a folder, a .gguf file, or a model of the hub, which is
    downloaded where need be."""
    path = Path(name)
    if path.is_dir():
        return path, None
    if path.is_file() and path.suffix == ".gguf":
        return path.parent, path.name
    if path.exists() or path.suffix == ".gguf" or name[:1] in "./" or name.count("/") > 1:
        raise BadInput(f"{name} is no folder here, no .gguf file and no name of the hub, as owner/model")
    import_transformers(*NEEDS)
    import huggingface_hub  # comes with transformers

    plain = ["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja"]
    try:
        folder = Path(huggingface_hub.snapshot_download(name, allow_patterns=plain))
        if not any(folder.glob("*.safetensors")):
            folder = Path(huggingface_hub.snapshot_download(name, allow_patterns=[*plain, "*.bin"]))
    except Exception as e:  # of the network, the hub, a bad name: many kinds
        why = (str(e).strip() or type(e).__name__).splitlines()[0][:200]
        raise BadInput(f"{name} is no folder here, and the hub does not give it ({why}); without a "
                       "network, name the folder of a copy") from None
    return folder, None


def sha256(*paths):
    """Of the bytes of files, one after another."""
    total = hashlib.sha256()
    for path in paths:
        with open(path, "rb") as file:
            while part := file.read(2**20):
                total.update(part)
    return total.hexdigest()


def fingerprint(folder, gguf):
    """The hash of a model's weights."""
    files = [folder / gguf] if gguf else sorted(folder.glob("*.safetensors"))
    files = files or sorted(folder.glob("*.bin"))
    if not files or not (gguf or (folder / "config.json").exists()):
        raise BadInput(f"{folder} holds no model: config.json and *.safetensors or *.bin, or name the "
                       ".gguf file in it")
    return sha256(*files)


def check_memory(transformers, config, dtype, name):
    """BadInput where a model is larger than the memory that is free, as far as Linux tells."""
    try:
        free = [line for line in open("/proc/meminfo") if line.startswith("MemAvailable")]
        free = int(free[0].split()[1]) * 1024
    except (OSError, IndexError):
        return
    with torch.device("meta"):
        lm = transformers.AutoModelForCausalLM.from_config(config)
    need = sum(p.numel() for p in lm.parameters()) * dtype.itemsize
    if need > 0.9 * free:
        raise BadInput(f"{name} needs {need / 1e9:.1f} GB for its weights in {str(dtype)[6:]}, and "
                       f"{free / 1e9:.1f} GB are free; take a smaller model, or --dtype bfloat16")


class HubTokenizer:
    """A tokenizer of transformers: what is used here of a tiktoken.Encoding, and chat prompts."""

    def __init__(self, tokenizer, n_vocab):
        self.tokenizer, self.n_vocab = tokenizer, n_vocab
        self.eot_token = tokenizer.eos_token_id
        self.has_chat = bool(tokenizer.chat_template)

    def sha256(self):
        vocabulary = sorted(self.tokenizer.get_vocab().items())
        return hashlib.sha256(repr((vocabulary, self.tokenizer.chat_template)).encode()).hexdigest()

    def prompt_ids(self, text, chat):
        """The ids that a text begins with, or, with chat, that a model's answer to it begins after."""
        if chat and not self.has_chat:
            raise BadInput("this model has no chat template; leave --chat away.")
        if chat:
            message = [{"role": "user", "content": text}]
            return list(self.tokenizer.apply_chat_template(message, add_generation_prompt=True,
                                                           return_dict=True)["input_ids"])
        ids = self.tokenizer(text)["input_ids"]
        first = self.tokenizer.bos_token_id
        return ids or [self.eot_token if first is None else first]

    def open_message(self, frame):
        """The ids of a user's message that is not finished yet."""
        message = [{"role": "user", "content": frame}]
        text = self.tokenizer.apply_chat_template(message, tokenize=False)
        text = text[: text.index(frame) + len(frame)]
        return self.tokenizer(text, add_special_tokens=False)["input_ids"]

    def decode(self, tokens):
        return self.tokenizer.decode(tokens, skip_special_tokens=True)

    def text_pieces(self):
        """A function from the next token to the text that it completes."""
        from tokenizers.decoders import DecodeStream

        stream, backend = DecodeStream(skip_special_tokens=True), self.tokenizer._tokenizer
        return lambda token: stream.step(backend, token) or ""


# -----------------------------------------------------------------------------
# the adapter


class Cache:
    """The cache of a model of transformers, with a length that can be set back."""

    past = None

    @property
    def length(self):
        return self.past.get_seq_length() if self.past is not None else 0

    @length.setter
    def length(self, length):
        if length == 0:
            self.past = None
        elif length < self.length:
            self.past.crop(length - self.length)  # a negative number is what to take away


class Pretrained(GPT):
    """A causal language model of transformers under a head. Its weights are frozen.

    source: what a checkpoint says of the trunk, {name, sha256, tokenizer}.
    """

    teacher = "kl"  # one of TEACHERS, which `loss` uses
    takes_rows = False  # whether decoders/batched.py knows that it takes texts of different lengths

    def __init__(self, lm, config, source):
        nn.Module.__init__(self)
        self.config, self.source = config, source
        self.lm = lm.requires_grad_(False)
        self.lm_head = lm.get_output_embeddings()
        self.head = head_class(config.head)(config) if config.n_future > 1 else None
        if config.draft_vocab and self.head:  # rows of the trunk's W, and so of its type
            self.head.draft_rows = self.head.draft_rows.to(self.dtype)
        parameters = inspect.signature(lm.base_model.forward).parameters
        self.cache_name = "cache" if "cache" in parameters else "past_key_values"  # its older name

    def new_cache(self, B=1):
        return Cache()

    def hidden(self, idx, cache=None, **options):
        if cache is None:
            return self.lm.base_model(idx, use_cache=False, **options).last_hidden_state
        out = self.pass_over(idx, cache.past, **options)
        cache.past = out[self.cache_name]
        return out.last_hidden_state

    def pass_over(self, idx, past, **options):
        """What the trunk of transformers returns for idx (B, T) after its own cache, past."""
        return self.lm.base_model(idx, use_cache=True, **{self.cache_name: past}, **options)

    loss = loss_on_states  # what the head is trained on

    def close(self, a, b):
        """Whether two results differ by rounding alone."""
        limit = 1e-3 if self.dtype in (torch.float32, torch.float64) else 0.1
        return ((a - b).norm() < limit * b.norm()).item()

    @torch.inference_mode()
    def check(self, name):
        """BadInput unless hidden, its cache, rolling back, and the LM head do what a decoder needs."""
        idx = torch.arange(3, 11, device=self.device).unsqueeze(0) % self.config.vocab_size
        try:
            hidden = self.hidden(idx)
        except AttributeError:  # its trunk is not what its LM head is on
            raise BadInput(f"{name} gives no hidden states, which a head drafts from") from None
        if not self.close(widen(self.lm_head(hidden)), widen(self.lm(idx, use_cache=False).logits)):
            raise BadInput(f"{name}: its logits are not its LM head of its last hidden state (they are "
                           "scaled or capped), which a head needs")
        try:
            cache = self.new_cache()
            first = self.hidden(idx[:, :4], cache)
            self.hidden(idx[:, :3], cache)  # a draft that is rejected
            cache.length = 4
            same = self.close(torch.cat((first, self.hidden(idx[:, 4:], cache)), 1), hidden)
        except (AttributeError, KeyError, TypeError, ValueError, RuntimeError):
            same = None  # no cache at all, or one that refuses
        emulated = self.dtype == torch.bfloat16 and self.device.type == "cpu" and not can_pack(self.dtype)
        if same is False and emulated:
            raise BadInput(f"{name} gives other states token by token than at once: this CPU has no "
                           "products in bfloat16, and rounds too much; take --dtype float32")
        if not same:
            raise BadInput(f"{name} has no cache that can be rolled back, or does not read from left to "
                           "right, so its drafts could not be verified; take a plain transformer decoder")

    def pack(self):
        """Decode from now on, with every linear layer a PackedLinear, and so the rows of W that drafts
        are unembedded with, where oneDNN has products for this CPU and type. The weights must not
        change after that."""
        if not (self.device.type == "cpu" and can_pack(self.dtype)):
            return
        packed = {}  # by the layer: the LM head is in here twice
        for parent in list(self.modules()):
            for name, child in list(parent.named_children()):
                if linear_weight(child) is not None:
                    if child not in packed:  # the head needs the LM head's W
                        keep = child.weight if child is self.lm_head else None
                        packed[child] = PackedLinear(linear_weight(child), child.bias, keep)
                    setattr(parent, name, packed[child])
        if self.head is not None and type(self.head).unembed is CPHead.unembed:
            rows = self.lm_head if self.head.draft_ids is None else PackedLinear(self.head.draft_rows)
            self.head.unembed = functools.partial(packed_unembed, rows)

    def load_head(self, state, path):
        """Take over the head of a checkpoint's tensors; BadInput where it does not fit."""
        head = {name.removeprefix("head."): tensor for name, tensor in state.items()}
        try:
            self.head.load_state_dict(head)
        except RuntimeError as e:  # torch's list of what is missing, superfluous or of another shape
            raise BadInput(f"{path} holds no head that fits: {' '.join(str(e).split())[:300]}") from None

    def to_checkpoint(self):
        state = {f"head.{name}": tensor for name, tensor in self.head.state_dict().items()}
        return {"model": state, "model_args": asdict(self.config), "trunk": self.source}


@functools.cache
def load_lm(name, device, dtype):
    """(model of transformers, HubTokenizer, {name, sha256, tokenizer}); BadInput where it cannot be
    had. Heads beside one another share their trunk.
    """
    folder, gguf = find_model(name)
    source = {"name": str(name), "sha256": fingerprint(folder, gguf)}
    transformers, options = import_transformers(*NEEDS), {"gguf_file": gguf} if gguf else {}
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder, **options)
        config = transformers.AutoConfig.from_pretrained(folder, **options)
        if not gguf:
            check_memory(transformers, config, dtype, name)
        elif hasattr(transformers, "GgufConfig"):  # newer versions would compute on packed weights
            options["quantization_config"] = transformers.GgufConfig(dequantize=True)
        lm = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, **options)
    except (BadInput, MemoryError):
        raise
    except Exception as e:  # of a file, a class, a missing package: many kinds
        why = " ".join(str(e).split())[:200]
        raise BadInput(f"{name} cannot be loaded as a causal language model ({why})") from None
    enc = HubTokenizer(tokenizer, lm.get_output_embeddings().weight.size(0))
    return lm.to(device).eval(), enc, {**source, "tokenizer": enc.sha256()}


def lm_config(lm, **head):
    """The GPTConfig of a model of transformers with a head: what decode.py and the head ask for."""
    c, W = lm.config.get_text_config(), lm.get_output_embeddings().weight
    block_size = getattr(c, "max_position_embeddings", None) or 2048
    if window := getattr(c, "sliding_window", None):  # a cache that is full cannot be rolled back
        block_size = min(block_size, window - 1)
    return GPTConfig(block_size=block_size, vocab_size=W.size(0), n_embd=W.size(1),
                     n_layer=1, n_head=1, target="lm_head", **{"n_future": 1, **head})


def load_pretrained(name, device, dtype="auto", known=None, **head):
    """(Pretrained, HubTokenizer): a model, its head fresh or, by default, none.

    known: what a checkpoint or a data folder says of the trunk, which must still be true.
    """
    lm, enc, source = load_lm(name, device, getattr(torch, measured_dtype(dtype, device)))
    for part, what in (("sha256", "weights"), ("tokenizer", "tokenizer")):
        if known is not None and known.get(part) != source[part]:
            raise BadInput(f"{name} has changed: its {what} are not what the head or its text were made "
                           "with. Take that version of it, or write text and train anew.")
    model = Pretrained(lm, lm_config(lm, **head), source)
    model.check(name)
    return model, enc


def measured_dtype(name, device):
    """Of --dtype; auto is bfloat16 where a trial finds it faster."""
    return ("bfloat16" if bfloat16_is_faster(device) else "float32") if name == "auto" else name


def load_checkpoint(ckpt, path, device, dtype):
    """(Pretrained, HubTokenizer) of a checkpoint, which holds the head and names the trunk."""
    source, args = ckpt["trunk"], ckpt["model_args"]
    if not isinstance(source, dict) or not isinstance(source.get("name"), str):
        raise BadInput(f"{path} does not say what its trunk is; train anew")
    head = {name: args.get(name) for name in HEAD_FIELDS}
    try:
        model, enc = load_pretrained(source["name"], device, dtype, source, **head)
    except BadInput as e:
        raise BadInput(f"The trunk of {path}: {e}") from None
    model.load_head(ckpt["model"], path)
    return model, enc


def new_model(cfg, meta, device):
    """For a TrainConfig, which may leave things open, and a data folder's meta: the TrainConfig, and
    the trunk that the folder is of, with a fresh head."""
    if cfg.init_from:
        raise BadInput(f"{cfg.data_dir} holds text and states of {meta['trunk']['name']}, which is the "
                       "trunk; leave --init_from away")
    if cfg.target != "lm_head":
        raise BadInput("a pretrained trunk keeps its own LM head as the target; leave --target away")
    if head_class(cfg.head).reads_trunk:
        raise BadInput(f"--head {cfg.head} reads more of the trunk than the states that are stored; take "
                       "another --head")
    cfg = replace(cfg, freeze_trunk=True, dtype=measured_dtype(cfg.dtype, device))
    head = {name: getattr(cfg, name) for name in HEAD_FIELDS}
    return cfg, load_pretrained(meta["trunk"]["name"], device, cfg.dtype, meta["trunk"], **head)[0]
