"""A causal language model of Hugging Face transformers as the trunk of a head.

`Pretrained` is the adapter: all that decode.py and a head need of a trunk. A trunk is a model of
the hub, a folder, or a .gguf file; a checkpoint holds the head, and the name and the hash of the
trunk. How one is trained: see train.py. Needs transformers, for a .gguf file also gguf and
accelerate.
"""

import functools
import hashlib
import inspect
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.nn as nn

from decoders.batched import RowCache, fill, hidden_of_rows
from heads.few_tokens import few_tokens
from model import GPT, BadInput, GPTConfig, door, head_class, widen
from pretrained.packed import (PackedLinear, bfloat16_is_faster, can_pack, linear_weight,
                               packed_logits)

# -----------------------------------------------------------------------------
# the files of a model


def import_transformers():
    """The module transformers, without its progress bars."""
    try:
        import transformers
    except ImportError:
        raise BadInput("A pretrained model needs transformers: python -m pip install transformers, "
                       "for a .gguf file also gguf and accelerate") from None
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    return transformers


def find_model(name):
    """(folder, .gguf file in it or None) of a folder, a .gguf file, or a model of the hub, which is
    downloaded where need be."""
    path = Path(name)
    if path.is_dir():
        return path, None
    if path.is_file() and path.suffix == ".gguf":
        return path.parent, path.name
    if path.exists() or path.suffix == ".gguf" or name[:1] in "./" or name.count("/") > 1:
        raise BadInput(f"{name} is no folder here, no .gguf file and no name of the hub, as "
                       "owner/model")
    import_transformers()
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
        raise BadInput(f"{folder} holds no model: config.json and *.safetensors or *.bin, or name "
                       "the .gguf file in it")
    return sha256(*files)


class HubTokenizer:
    """A tokenizer of transformers, as tokenizer.py asks for one. With chat, a text is the answer to
    a user's message; BadInput where there is no template for that."""

    def __init__(self, tokenizer, n_vocab, chat):
        if chat and not tokenizer.chat_template:
            raise BadInput("this model has no chat template, and its text was made with one")
        self.tokenizer, self.n_vocab, self.chat = tokenizer, n_vocab, chat
        self.eot_token = tokenizer.eos_token_id
        self.gap, self.answer_end = ("\n\n", self.eot_token) if chat else ("", None)

    def prompt_ids(self, text):
        if self.chat:
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

    def pieces(self):
        from tokenizers.decoders import DecodeStream

        stream, backend = DecodeStream(skip_special_tokens=True), self.tokenizer._tokenizer
        return lambda token: "" if token is None else stream.step(backend, token) or ""


# -----------------------------------------------------------------------------
# the adapter


@dataclass
class PretrainedConfig(GPTConfig):
    """Of the trunk, decode.py and the heads need block_size, vocab_size and n_embd alone."""

    draft_vocab: int = 0  # K, how many tokens the head can draft; 0 means all of them

    def __post_init__(self):
        super().__post_init__()
        K = self.draft_vocab
        if not isinstance(K, int) or not 0 <= K <= self.n_token:
            raise BadInput(f"draft_vocab must be a whole number from 0 to {self.n_token}, the "
                           f"tokens that there are, not {K!r}")
        if K and self.head == "full":
            raise BadInput("draft_vocab needs another head than full, whose unembeddings are its "
                           "own")
        check_last_states(self.head)


def check_last_states(head):
    """BadInput for a head with a Model of its own, which looks further into the trunk."""
    if head != "cp" and "Model" in vars(door("head", head)):
        raise BadInput(f"head {head} looks further into the trunk than its last states, which are "
                       "all that there is here; take another --head")


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

    takes_rows = None  # texts of different lengths in one pass: not tried yet

    def __init__(self, lm, config, source):
        nn.Module.__init__(self)
        self.config, self.source = config, source
        self.lm = lm.requires_grad_(False)
        self.lm_head = lm.get_output_embeddings()
        self.head = None
        if config.n_future > 1:
            Head, K = head_class(config.head), config.draft_vocab
            self.head = few_tokens(Head, K)(config) if K else Head(config)
            if K:  # rows of the trunk's W, and so of its type
                self.head.draft_rows = self.head.draft_rows.to(self.dtype)
        parameters = inspect.signature(lm.base_model.forward).parameters
        self.cache_name = "cache" if "cache" in parameters else "past_key_values"  # its older name

    def new_cache(self, B=1):
        return Cache()

    def hidden(self, idx, cache=None, places=None, mask=None):
        """As `GPT.hidden`. With places, cache is one that attention in transformers writes to, as
        RowCache is, and BadInput where this model would get it wrong."""
        if places is not None:
            self.check_rows()
            out = self.pass_over(idx, cache, attention_mask=mask, position_ids=places)
        elif cache is None:
            out = self.lm.base_model(idx, use_cache=False)
        else:
            out = self.pass_over(idx, cache.past)
            cache.past = out[self.cache_name]
        return out.last_hidden_state

    def pass_over(self, idx, past, **options):
        """What the trunk of transformers returns for idx (B, T) after its own cache, past."""
        return self.lm.base_model(idx, use_cache=True, **{self.cache_name: past}, **options)

    def forward(self, *batch, **weights):
        """Logits of idx (B, T), or `loss` of a batch of more, which train.py says."""
        return self.loss(*batch, **weights) if len(batch) > 1 else super().forward(*batch)

    # what a model must be able to do

    def close(self, a, b):
        """Whether two results differ by rounding alone."""
        limit = 1e-3 if self.dtype in (torch.float32, torch.float64) else 0.1
        return ((a - b).norm() < limit * b.norm()).item()

    @torch.inference_mode()
    def check(self, name):
        """BadInput unless hidden, its cache, roll-back and the LM head are as a decoder needs."""
        idx = torch.arange(3, 11, device=self.device).unsqueeze(0) % self.config.vocab_size
        try:
            hidden = self.hidden(idx)
        except AttributeError:  # its trunk is not what its LM head is on
            raise BadInput(f"{name} gives no hidden states, which a head drafts from") from None
        if not self.close(widen(self.lm_head(hidden)), widen(self.lm(idx, use_cache=False).logits)):
            raise BadInput(f"{name}: its logits are not its LM head of its last hidden state (they "
                           "are scaled or capped), which a head needs")
        try:
            cache = self.new_cache()
            first = self.hidden(idx[:, :4], cache)
            self.hidden(idx[:, :3], cache)  # a draft that is rejected
            cache.length = 4
            same = self.close(torch.cat((first, self.hidden(idx[:, 4:], cache)), 1), hidden)
        except (AttributeError, KeyError, TypeError, ValueError, RuntimeError):
            same = None  # no cache at all, or one that refuses
        on_cpu = self.dtype == torch.bfloat16 and self.device.type == "cpu"
        if same is False and on_cpu and not can_pack(self.dtype):
            raise BadInput(f"{name} gives other states token by token than at once: this CPU has "
                           "no products in bfloat16, and rounds too much; take --dtype float32")
        if not same:
            raise BadInput(f"{name} has no cache that can be rolled back, or does not read from "
                           "left to right, so its drafts could not be verified; take a plain "
                           "transformer decoder")

    @torch.inference_mode()
    def check_rows(self):
        """BadInput unless the model takes texts of different lengths in a pass: one trial."""
        if self.takes_rows is None:
            self.takes_rows = True  # in the trial
            self.takes_rows = self.rows_are_right()
        if not self.takes_rows:
            raise BadInput(f"{self.source.get('name')} cannot take texts of different lengths in "
                           "one pass, which batches, captured steps and trees are made of; decode "
                           "one text at a time, speculatively or plainly")

    def rows_are_right(self):
        """Whether two texts in a RowCache have the states that each has by itself."""
        config = self.lm.config.get_text_config()
        # of some, a long text changes the angles of the others' places, or ends their window
        rope = str([getattr(config, name, "") for name in ("rope_parameters", "rope_scaling")])
        windows = [getattr(config, name, None) for name in ("window_size", "attention_chunk_size")]
        if any(windows) or "longrope" in rope or "dynamic" in rope:
            return False
        idx = torch.arange(3, 11, device=self.device).unsqueeze(0) % self.config.vocab_size
        lengths, cache = (6, 1), RowCache(2, 8)
        try:
            for row, length in enumerate(lengths):
                fill(self, cache, row, idx[:, :length])
            x = torch.cat([idx[:, length : length + 2] for length in lengths])
            expected = [self.hidden(idx[:, : length + 2])[0, -2:] for length in lengths]
            return all(map(self.close, hidden_of_rows(self, x, cache), expected))
        except (AttributeError, TypeError, ValueError, RuntimeError, IndexError):
            return False  # it asks more of a cache, or has another kind of mask

    # weights

    def pack(self):
        """Decode from now on, with every linear layer a PackedLinear, and so the rows of W that
        drafts are unembedded with, where oneDNN has products for this CPU and type. The weights
        must not change after that."""
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
        if self.head is not None and self.config.head != "full":  # whose vectors are logits
            rows = PackedLinear(self.head.draft_rows) if self.config.draft_vocab else self.lm_head
            self.head.logits = functools.partial(packed_logits, rows)

    def load_head(self, state, path):
        """Take over the head of a checkpoint's tensors; BadInput where it does not fit."""
        head = {name.removeprefix("head."): tensor for name, tensor in state.items()}
        try:
            self.head.load_state_dict(head)
        except RuntimeError as e:  # torch's list of what is missing, or of another shape
            why = " ".join(str(e).split())[:300]
            raise BadInput(f"{path} holds no head that fits: {why}") from None

    def to_checkpoint(self):
        state = {f"head.{name}": tensor for name, tensor in self.head.state_dict().items()}
        return {"model": state, "model_args": asdict(self.config),
                "trunk": {"door": "adapter", **self.source}}


# -----------------------------------------------------------------------------
# loading


@functools.cache
def load_lm(name, device, dtype):
    """(model of transformers, its tokenizer, {name, sha256, tokenizer}); BadInput where it cannot
    be had. Heads beside one another share their trunk."""
    folder, gguf = find_model(name)
    source = {"name": str(name), "sha256": fingerprint(folder, gguf)}
    transformers, options = import_transformers(), {"gguf_file": gguf} if gguf else {}
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder, **options)
        if gguf and hasattr(transformers, "GgufConfig"):  # else it may compute on packed weights
            options["quantization_config"] = transformers.GgufConfig(dequantize=True)
        lm = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, **options)
    except MemoryError:
        raise
    except Exception as e:  # of a file, a class, a missing package: many kinds
        why = " ".join(str(e).split())[:200]
        raise BadInput(f"{name} cannot be loaded as a causal language model ({why})") from None
    vocabulary = sorted(tokenizer.get_vocab().items()), tokenizer.chat_template
    source["tokenizer"] = hashlib.sha256(repr(vocabulary).encode()).hexdigest()
    return lm.to(device).eval(), tokenizer, source


def lm_config(lm, **head):
    """The PretrainedConfig of a model of transformers with a head."""
    c, W = lm.config.get_text_config(), lm.get_output_embeddings().weight
    block_size = getattr(c, "max_position_embeddings", None) or 2048
    if window := getattr(c, "sliding_window", None):  # a cache that is full cannot be rolled back
        block_size = min(block_size, window - 1)
    return PretrainedConfig(block_size=block_size, vocab_size=W.size(0), n_embd=W.size(1),
                            n_layer=1, n_head=1, target="lm_head", **{"n_future": 1, **head})


def load_pretrained(name, device, dtype="auto", known=None, chat=None, **head):
    """(Pretrained, HubTokenizer): a model, its head fresh or, by default, none.

    known: what a checkpoint or a data folder says of the trunk, which must still be true. chat: see
    HubTokenizer; None is as the model is meant.
    """
    lm, tokenizer, source = load_lm(name, device, getattr(torch, measured_dtype(dtype, device)))
    for part, what in (("sha256", "weights"), ("tokenizer", "tokenizer")):
        if known is not None and known.get(part) != source[part]:
            raise BadInput(f"{name} has changed: its {what} are not what the head or its text were "
                           "made with. Take that version of it, or write text and train anew.")
    model = Pretrained(lm, lm_config(lm, **head), source)
    model.check(name)
    chat = bool(tokenizer.chat_template) if chat is None else chat
    return model, HubTokenizer(tokenizer, model.config.vocab_size, chat)


def measured_dtype(name, device):
    """Of --dtype; auto is bfloat16 where a trial finds it faster."""
    return ("bfloat16" if bfloat16_is_faster(device) else "float32") if name == "auto" else name


def load_checkpoint(ckpt, path, device, dtype):
    """(Pretrained, HubTokenizer) of a checkpoint, which holds the head and names the trunk."""
    source, args, meta = ckpt["trunk"], ckpt["model_args"], ckpt.get("meta")
    if not isinstance(source.get("name"), str) or not isinstance(meta, dict) or "chat" not in meta:
        raise BadInput(f"{path} does not say what its trunk is and how texts begin; train anew")
    head = {name: args.get(name) for name in ("head", "n_future", "rank", "draft_vocab")}
    try:
        model, enc = load_pretrained(source["name"], device, dtype, source, meta["chat"], **head)
    except BadInput as e:
        raise BadInput(f"The trunk of {path}: {e}") from None
    if model.head is None:
        raise BadInput(f"{path} holds no head; train anew")
    model.load_head(ckpt["model"], path)
    return model, enc


def load(ckpt, path, device, dtype):
    """`load_checkpoint`, for decoding: in evaluation mode, and packed."""
    model, enc = load_checkpoint(ckpt, path, device, dtype)
    model = model.to(device, model.dtype).eval()
    model.pack()
    return model, enc
