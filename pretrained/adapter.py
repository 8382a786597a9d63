"""A causal language model of Hugging Face transformers as the trunk of a head.

`Pretrained` is the adapter: all that decode.py and a head need of a trunk. A trunk is a model of
the hub, a folder, or a .gguf file; a checkpoint holds the head, and the name and the hash of the
trunk. How one is trained: see train.py. Needs transformers, for a .gguf file also gguf and
accelerate.
"""

import hashlib
import inspect
import re
from contextlib import suppress
from dataclasses import asdict, dataclass
from functools import cache, partial
from pathlib import Path

import torch
import torch.nn as nn

from common import in_a_line
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
    get = partial(huggingface_hub.snapshot_download, name,  # some hold their weights twice
                  ignore_patterns=["*/*", "consolidated*"])
    try:
        folder = Path(get(allow_patterns=plain))
        if not any(folder.glob("*.safetensors")):
            folder = Path(get(allow_patterns=[*plain, "*.bin"]))
    except Exception as e:  # of the network, the hub, a bad name: many kinds
        raise BadInput(f"{name} is no folder here, and the hub does not give it ({in_a_line(e)}); "
                       "the folder of a copy will do, too") from None
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


def read(tokenizer, text, add_special_tokens=False, **options):
    """tokenizer(text); BadInput where it cannot, as of a word that has no token, not even [UNK]."""
    try:
        return tokenizer(text, add_special_tokens=add_special_tokens, **options)
    except Exception as e:  # those of tokenizers have no class of their own
        raise BadInput(f"this model's tokenizer cannot read a text ({in_a_line(e)})") from None


WORD = re.compile(r"\s*\w*\s*")  # is in a template's code, as `content`, or spaces


class HubTokenizer:
    """A tokenizer of transformers, as tokenizer.py asks for one. With chat, a text is the answer to
    a user's message; BadInput where there is no template for that. A chat that is a str begins with
    that as the system's message.

    config: of the model, whose ids and room prompts must keep to. ends: the ids that end a text.
    """

    def __init__(self, tokenizer, config, chat, ends=()):
        if chat and not tokenizer.chat_template:
            raise BadInput("this model has no chat template: leave --system away, or, where text "
                           "was made with a template, take the tokenizer with it")
        self.tokenizer, self.chat, self.ends = tokenizer, chat, frozenset(ends)
        self.n_vocab, self.longest = config.vocab_size, config.block_size - 1
        self.gap, self.answer_end = ("\n\n", self.ends) if chat else ("", None)
        added, unknown = tokenizer.added_tokens_decoder.items(), tokenizer.unk_token_id
        template = str(tokenizer.chat_template)  # whose tokens are not all special: <think>
        self.control = {i: token.content for i, token in added
                        if i in self.ends or token.special and i != unknown
                        or token.content in template and not WORD.fullmatch(token.content)}
        self.begin = ids_in_front(tokenizer)
        for token in self.control.values() if isinstance(chat, str) else ():
            if token in chat:
                raise BadInput(f"the system's message holds the control token {token}; take it out")

    def prompt_ids(self, text):
        if self.chat:
            ids = self.encode(text, partial(self.render, add_generation_prompt=True))
            if len(ids) > self.longest:  # else its beginning would be lost
                raise BadInput(f"the message is of {len(ids):,} tokens with its template, and the "
                               f"model has room for {self.longest:,} before an answer")
            return self.known(ids)
        ids, first = [*self.begin, *self.encode(text)], self.tokenizer.bos_token_id
        if not ids and first is None:
            raise BadInput("this model has no token that texts begin with: give it a prompt")
        return self.known(ids or [first])

    def known(self, ids):
        """The ids, if the model has a row for each of them."""
        for x in ids:
            if x >= self.n_vocab:
                token = self.tokenizer.convert_ids_to_tokens(x)
                raise BadInput(f"the model has {self.n_vocab:,} tokens, and its tokenizer gives it "
                               f"one more, {token!r}, with the id {x}")
        return ids

    def open_message(self, frame):
        """The ids of a user's message that is not finished yet."""

        def opened(frame):
            before, found, _ = self.render(frame).rpartition(frame)
            if not found:
                raise BadInput("this model's chat template changes a user's message, so that the "
                               "model cannot finish one; give it whole ones, --prompts")
            return before + found

        return self.known(self.encode(frame, opened))

    def render(self, message, **options):
        """A user's message in the model's template."""
        has_system = isinstance(self.chat, str)
        whole = [{"role": "system", "content": self.chat if has_system else "Be brief."},
                 {"role": "user", "content": message}]
        apply = partial(self.tokenizer.apply_chat_template, tokenize=False, **options)
        given, other = (whole, whole[1:]) if has_system else (whole[1:], whole)
        try:
            text = apply(given)
        except Exception as e:  # what a template raises, or Python in it: many kinds
            advice = ""
            with suppress(Exception):
                apply(other)
                advice = ("; leave --system away" if has_system else
                          "; --system of pretrained.generate gives it a system's message before it")
            after = " after the system's" * has_system
            raise BadInput("this model's chat template refuses a user's message"
                           f"{after}: {in_a_line(e)}{advice}") from None
        if has_system and self.chat.strip() not in text:
            raise BadInput("this model's chat template leaves the system's message out, or changes "
                           "it; leave --system away")
        return text

    def encode(self, text, wrap=str):
        """The ids of wrap(text). A control token in the text is plain text: a mark in it, of which
        nothing is left, keeps it from being one."""
        mark = next(c for c in map(chr, range(0xE000, 0xF900)) if c not in text)  # private use
        plain = text
        for token in self.control.values() if self.tokenizer.is_fast else ():  # else: see below
            plain = plain.replace(token, token[:1] + mark + token[1:])
        whole, is_marked = wrap(plain), plain != text
        found = read(self.tokenizer, whole, return_offsets_mapping=is_marked)
        ids = found["input_ids"]
        if is_marked:
            spans = [whole[start:end] for start, end in found["offset_mapping"]]
            ids = [x for x, span in zip(ids, spans) if span != mark]
        # whatever a tokenizer makes of the mark, or of other forms of a control token
        expected = read(self.tokenizer, wrap(mark))["input_ids"]
        if self.controls(ids) != self.controls(expected) or mark in self.tokenizer.decode(ids):
            raise BadInput("this model's tokenizer cannot keep a control token plain that is in "
                           "the text; take it out")
        return ids

    def controls(self, ids):
        return [x for x in ids if x in self.control]

    def decode(self, tokens):
        tokens = [x for x in tokens if x not in self.ends]  # not all of them are special
        # a clean-up would move what was there before
        return self.tokenizer.decode(tokens, skip_special_tokens=True,
                                     clean_up_tokenization_spaces=False)

    def pieces(self, prompt=()):
        ids = [] if self.chat else list(prompt)  # an answer stands by itself
        shown = self.decode(ids)

        def piece(token):
            nonlocal shown
            ids.extend(() if token is None else (token,))
            text = self.decode(ids)  # a token's form depends on those before it
            if token is not None and text.endswith("\ufffd"):
                return ""  # of a character that is not whole yet
            new, shown = text[len(shown) :], text
            return new

        return piece


def ids_in_front(tokenizer):
    """What a tokenizer puts before a text; what it puts behind one, as [SEP], would end it."""
    plain, whole = (read(tokenizer, "a A 0", add_special_tokens=added)["input_ids"]
                    for added in (False, True))
    places = range(len(whole) - len(plain) + 1)
    return next((whole[:i] for i in places if whole[i : i + len(plain)] == plain), [])


def ends_of_text(lm, tokenizer):
    """The ids that end a text: where transformers' generate would stop, and the tokenizer's own."""
    own = getattr(lm.generation_config, "eos_token_id", None)
    ids = {tokenizer.eos_token_id, *(own if isinstance(own, (list, tuple)) else [own])}
    n_vocab = lm.get_output_embeddings().weight.size(0)
    return {x for x in ids - {None} if 0 <= x < n_vocab}  # no other one is ever written


# -----------------------------------------------------------------------------
# the adapter


@dataclass
class PretrainedConfig(GPTConfig):
    """Of the trunk, decode.py and the heads need block_size, vocab_size and n_embd alone."""

    draft_vocab: int = 0  # K, how many tokens the head can draft; 0 means all of them

    def __post_init__(self):
        super().__post_init__()
        K = self.draft_vocab
        if type(K) is not int or not 0 <= K <= self.n_token:  # True is no number
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


def new_head(config):
    """The head of a PretrainedConfig, with fresh weights."""
    Head, K = head_class(config.head), config.draft_vocab
    return few_tokens(Head, K)(config) if K else Head(config)


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
            self.head = new_head(config)
            if config.draft_vocab:  # rows of the trunk's W, and so of its type
                self.head.draft_rows = self.head.draft_rows.to(self.dtype)
        parameters = inspect.signature(lm.base_model.forward).parameters
        self.knows_places = "position_ids" in parameters
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
        """Of idx (B, T) its logits; of a whole batch, as train.py calls it, the loss."""
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
        if self.lm.base_model is self.lm:  # its trunk is not what its LM head is on
            raise BadInput(f"{name} gives no hidden states, which a head drafts from")
        try:  # transformers' own code, and none of ours
            hidden, why = self.lm.base_model(idx, use_cache=False).last_hidden_state, ""
        except Exception as e:  # what a class asks for, or has no kernel for: many kinds
            if isinstance(e, MemoryError) or "memory" in str(e):
                raise
            raise BadInput(f"{name} computes nothing from tokens alone in {self.dtype} here "
                           f"({type(e).__name__}: {in_a_line(e)})") from None
        if not self.is_one_product(idx, hidden):
            raise BadInput(f"{name}: its logits are not its LM head of its last hidden state (they "
                           "are scaled or capped, or a layer is between), which a head needs")
        if self.lm.get_input_embeddings().weight.size(0) < self.config.vocab_size:
            raise BadInput(f"{name} has an LM head for {self.config.vocab_size:,} tokens, some of "
                           "which it cannot read: its embedding has fewer rows")
        try:
            cache = self.new_cache()
            first = self.hidden(idx[:, :4], cache)
            self.hidden(idx[:, :3], cache)  # a draft that is rejected
            cache.length = 4
            same = self.close(torch.cat((first, self.hidden(idx[:, 4:], cache)), 1), hidden)
        except torch.OutOfMemoryError:
            raise
        except (AttributeError, LookupError, TypeError, ValueError, RuntimeError) as e:
            same = None  # no cache at all, or one that refuses
            why = f" ({type(e).__name__}: {in_a_line(e)})"
        on_cpu = self.dtype == torch.bfloat16 and self.device.type == "cpu"
        if same is False and on_cpu and not can_pack(self.dtype):
            raise BadInput(f"{name} gives other states token by token than at once: this CPU has "
                           "no products in bfloat16, and rounds too much; take --dtype float32")
        if not same:
            raise BadInput(f"{name} has no cache that can be rolled back, or does not read from "
                           "left to right, so its drafts could not be verified; take a plain "
                           f"transformer decoder{why}")

    def is_one_product(self, idx, hidden):
        """Whether the logits after idx are the LM head's own, of the last of the hidden states.

        Within one pass nothing is rounded twice, so all is equal to the last bit, in any type. A
        tolerance would let logits pass in bfloat16 that are capped at 30, or a state that is scaled
        by 1.05.
        """
        seen = {}

        def note(module, args, out):
            seen[module] = args[0] if args else None, out

        trunk = self.lm.base_model
        hooks = [part.register_forward_hook(note) for part in (trunk, self.lm_head)]
        try:
            logits = self.lm(idx, use_cache=False).logits
        finally:
            for hook in hooks:
                hook.remove()
        x, out = seen.get(self.lm_head, (None, None))
        # some, as OPT, call a part of the trunk alone: then it is that of the pass before
        state = seen[trunk][1].last_hidden_state if trunk in seen else hidden
        return (torch.is_tensor(x) and torch.equal(widen(x), widen(state))
                and torch.equal(widen(out), widen(logits)) and self.close(hidden, state))

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
        if getattr(self.lm.config.get_text_config(), "window_size", None):
            return False  # of GPT-Neo: a long text ends the others' window
        if not self.knows_places:  # as MPT, where a tree's drafts for one place lie apart
            return False
        idx = torch.arange(3, 11, device=self.device).unsqueeze(0) % self.config.vocab_size
        lengths, cache = (6, 1), RowCache(2, 8)
        try:
            for row, length in enumerate(lengths):
                fill(self, cache, row, idx[:, :length])
            x = torch.cat([idx[:, length : length + 2] for length in lengths])
            expected = [self.hidden(idx[:, : length + 2])[0, -2:] for length in lengths]
            return all(map(self.close, hidden_of_rows(self, x, cache), expected))
        except torch.OutOfMemoryError:
            raise
        except (AttributeError, TypeError, ValueError, RuntimeError, IndexError):
            return False  # it asks more of a cache, or has another kind of mask

    @torch.inference_mode()
    def check_padding(self):
        """BadInput unless prompts that are padded on the left have their own states."""
        idx = torch.arange(3, 19, device=self.device).unsqueeze(0) % self.config.vocab_size
        mask = torch.ones_like(idx).index_fill(1, torch.arange(8, device=self.device), 0)
        places = (mask.cumsum(1) - 1).clamp_min(0)
        out = self.pass_over(idx, None, attention_mask=mask, position_ids=places)
        if not self.close(out.last_hidden_state[:, 8:], self.hidden(idx[:, 8:])):
            raise BadInput(f"{self.source['name']} counts places by itself, and so cannot answer "
                           "prompts of different lengths at once; take --batch_size 1")

    def train(self, mode=True):
        super().train(mode)
        self.lm.eval()  # it is shared, and stays as it is
        return self

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
            self.head.logits = partial(packed_logits, rows)

    def load_head(self, state, path):
        """Take over the head of a checkpoint's tensors; BadInput where it does not fit."""
        head = {name.removeprefix("head."): tensor for name, tensor in state.items()}
        try:
            self.head.load_state_dict(head)
        except RuntimeError as e:  # torch's list of what is missing, or of another shape
            raise BadInput(f"{path} holds no head that fits: {in_a_line(e)}") from None

    def to_checkpoint(self):
        state = {f"head.{name}": tensor for name, tensor in self.head.state_dict().items()}
        return {"model": state, "model_args": asdict(self.config),
                "trunk": {"door": "adapter", **self.source}}


# -----------------------------------------------------------------------------
# loading


@cache
def load_lm(name, device, dtype):
    """(model of transformers, its tokenizer, {name, sha256, tokenizer}); BadInput where it cannot
    be had. Heads beside one another share their trunk."""
    folder, gguf = find_model(name)
    source = {"name": str(name), "sha256": fingerprint(folder, gguf)}
    transformers, options = import_transformers(), {"trust_remote_code": False}  # nor asked for
    options |= {"gguf_file": gguf} if gguf else {}
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder, **options)
        if gguf and hasattr(transformers, "GgufConfig"):  # else it may compute on packed weights
            options["quantization_config"] = transformers.GgufConfig(dequantize=True)
        lm, found = transformers.AutoModelForCausalLM.from_pretrained(
            folder, dtype=dtype, output_loading_info=True, **options)
    except MemoryError:
        raise
    except Exception as e:  # of a file, a class, a missing package: many kinds
        raise BadInput(f"{name} cannot be loaded as a causal language model "
                       f"({in_a_line(e)})") from None
    if missing := sorted(found["missing_keys"]):  # a base model's files have no LM head
        raise BadInput(f"{name} lacks {missing[0]}, which transformers would draw at random")
    if not gguf:  # whose settings are in it
        source["config"] = sha256(folder / "config.json")
    vocabulary = sorted(tokenizer.get_vocab().items()), tokenizer.chat_template
    source["tokenizer"] = hashlib.sha256(repr(vocabulary).encode()).hexdigest()
    return lm.to(device).eval(), tokenizer, source


def lm_config(lm, **head):
    """The PretrainedConfig of a model of transformers with a head."""
    c, W = lm.config.get_text_config(), lm.get_output_embeddings().weight
    rooms = ("max_position_embeddings", "max_seq_len", "max_target_positions")  # MPT's, Whisper's
    block_size = min(filter(None, (getattr(c, name, None) for name in rooms)), default=2048)
    # a full cache cannot be rolled back; of Doge: a longer text has a mask that looks ahead
    for name in ("sliding_window", "attention_chunk_size", "keep_window_size"):
        if (window := getattr(c, name, None) or 0) > 0:
            block_size = min(block_size, window - 1)
    rope = getattr(c, "rope_parameters", None) or getattr(c, "rope_scaling", None) or {}
    if "longrope" in str(rope):  # a longer text changes the angles of keys that are cached
        own = [rope, *(part for part in rope.values() if isinstance(part, dict))]  # one per kind
        first = [part.get("original_max_position_embeddings") for part in own]
        first.append(getattr(c, "original_max_position_embeddings", None))
        block_size = min(filter(None, first), default=block_size)
    return PretrainedConfig(block_size=block_size, vocab_size=W.size(0), n_embd=W.size(1),
                            n_layer=1, n_head=1, target="lm_head", **{"n_future": 1, **head})


def load_pretrained(name, device, dtype="auto", known=None, chat=None, **head):
    """(Pretrained, HubTokenizer): a model, its head fresh or, by default, none.

    known: what a checkpoint or a data folder says of the trunk, which must still be true. chat: see
    HubTokenizer; None is as the model is meant.
    """
    lm, tokenizer, source = load_lm(name, device, getattr(torch, measured_dtype(dtype, device)))
    # heads of before say nothing of the config
    was = source if known is None else {"config": source.get("config")} | known
    for part, what in (("sha256", "weights"), ("tokenizer", "tokenizer"), ("config", "settings")):
        if was.get(part) != source.get(part):
            raise BadInput(f"{name} has changed: its {what} are not what the head or its text were "
                           "made with. Take that version of it, or write text and train anew.")
    model = Pretrained(lm, lm_config(lm, **head), source)
    model.check(name)
    chat = bool(tokenizer.chat_template) if chat is None else chat
    return model, HubTokenizer(tokenizer, model.config, chat, ends_of_text(lm, tokenizer))


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
