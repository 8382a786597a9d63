"""The tokenizer, the toy's grammar, and how text becomes documents and .bin files."""

import hashlib
import io
import json
import random
import re
from collections import defaultdict

import numpy as np
import pytest

import prepare_tinystories as prep
import tokenizer
from model import BadInput
from tokenizer import EOT, PATTERN, TextStream, build_tokenizer, encode, load_tokenizer

TEXT = 'Once upon a time, Lily saw 12 red balls.\n"Look!" she said. They didn\'t stop.\n\n  The end_of it all.\n'


def random_text(rng, length):
    """Any Unicode but surrogates, with plenty of spaces, newlines and letters."""
    planes = [(32, 127), (0x20, 0x2FF), (0x300, 0xD7FF), (0xE000, 0xFFFF), (0x10000, 0x10FFFF)]
    return "".join(rng.choice(" \n\t\r") if rng.random() < 0.2 else chr(rng.randint(*rng.choice(planes)))
                   for _ in range(length))


# -----------------------------------------------------------------------------
# the tokenizer


@pytest.mark.parametrize("vocab_size", [257, 300, 2048])
def test_any_text_round_trips(vocab_size):
    """encode -> decode is the identity on any Unicode text, the words <|endoftext|> included, and
    never emits the <|endoftext|> token; the pattern that cuts the pieces loses no character."""
    enc = load_tokenizer(build_tokenizer([TEXT], vocab_size))
    rng = random.Random(0)
    texts = ["", TEXT, "<|endoftext|>", f"a{EOT}b", "\u0301x\u200d\u3000\u2028_"]
    for text in texts + [random_text(rng, 60) for _ in range(300)]:
        ids = encode(enc, text)
        assert enc.decode(ids) == text and enc.eot_token not in ids
        assert "".join(re.findall(PATTERN, text)) == text


@pytest.mark.parametrize("run", [" ", "\n", "\u3000", "x"])
def test_a_million_equal_characters_are_encoded(run):
    """In a document, in a prompt, and where the pieces are counted. Guards a stack overflow in
    tiktoken's regex, which shows at some 600,000 white-space characters in a row."""
    text = "Once." + run * 1_200_000 + "End"
    enc = load_tokenizer(build_tokenizer([text], 300))
    assert enc.decode(encode(enc, text)) == text
    file = io.BytesIO()
    assert prep.encode_all(enc, [text], file, "test")["documents"] == 1
    assert enc.decode(np.frombuffer(file.getvalue(), dtype=np.uint16)) == text + EOT


def test_any_ids_decode():
    """A model may emit any ids: they decode to text, streamed or at once, and a split character is
    held back."""
    enc = load_tokenizer(build_tokenizer([TEXT], 300))
    rng = random.Random(0)
    for _ in range(200):
        ids = [rng.randrange(enc.n_vocab) for _ in range(20)]
        stream = TextStream(enc)
        assert "".join(map(stream.push, ids)) + stream.end() == enc.decode(ids)
    stream = TextStream(enc)
    assert [stream.push(b) for b in "é€".encode()] == ["", "é", "", "", "€"] and stream.end() == ""


def test_control_characters_are_shown_and_not_sent_to_a_terminal():
    """Escape, bell, carriage return and the rest of both sets of control codes; newline, tab and
    letters stay."""
    enc = load_tokenizer(build_tokenizer([TEXT], 257))
    stream, text = TextStream(enc, printable=True), "a\x1b[31m\x07\r\n\té\x9b\x7f"
    assert "".join(map(stream.push, text.encode())) == "a\\x1b[31m\\x07\\x0d\n\té\\x9b\\x7f"


def test_tokenizer_survives_json_and_is_at_most_as_large_as_asked():
    """The description is plain JSON; ids are the 256 bytes, whole pieces by frequency, then
    <|endoftext|>."""
    text = TEXT * 3 + " the" * 10
    description = build_tokenizer([text], 270)
    enc = load_tokenizer(json.loads(json.dumps(description)))
    assert enc.n_vocab == 270 and enc.eot_token == 269 and enc.decode_single_token_bytes(65) == b"A"
    assert encode(enc, " the the") == [256, 256]
    small = load_tokenizer(build_tokenizer(["ab ab"], 2048))
    assert small.n_vocab == 256 + 2 + 1  # a corpus of two pieces has no more


def test_pieces_of_any_script_are_used():
    """What Python's regex counts as a piece, tiktoken's finds again: every piece of a corpus in
    several scripts is one id. Guards \\w, which the two read differently (combining marks,
    superscripts)."""
    text = "हिन्दी में पढ़ना शुरू। العَرَبِيَّة 日本語 x² naïve — “quoted” it's 42 a_b c\u0301a"
    enc = load_tokenizer(build_tokenizer([text], 2048))
    assert [enc.decode([i]) for i in encode(enc, text)] == re.findall(PATTERN, text)


def test_a_text_without_spaces_does_not_become_one_token():
    description = build_tokenizer(["acgt" * 5000 + " word word"], 2048)
    assert max(map(len, description["tokens"])) <= 32 and " word" in description["tokens"]
    assert len(encode(load_tokenizer(description), "acgt" * 5000)) > 600


def test_vocab_size_257_is_bytes():
    enc = load_tokenizer(build_tokenizer([TEXT], 257))
    assert encode(enc, "né") == list("né".encode())


def test_a_description_that_is_none_is_refused():
    with pytest.raises(BadInput, match="the tokenizer pieces257 cannot be read"):
        load_tokenizer(build_tokenizer([TEXT], 257) | dict(pattern="("))


# -----------------------------------------------------------------------------
# the toy's grammar


def test_toy_entropy_is_the_mean_surprisal():
    """The entropy by the chain rule equals the mean of -log2 P(story) over 20,000 stories, to 6
    standard errors, and it is at least 0.8 bits per token. The stories are the same in every run;
    over other seeds, the chance of a false alarm is 2e-9."""
    rng = random.Random(0)
    stories, bits = zip(*(prep.toy_story(rng) for _ in range(20_000)))
    assert abs(np.mean(bits) - prep.toy_entropy()) < 6 * np.std(bits) / len(bits) ** 0.5
    enc = load_tokenizer(build_tokenizer(stories, 2048))
    tokens = sum(len(ids) + 1 for ids in enc.encode_ordinary_batch(list(stories)))
    assert prep.toy_entropy() * len(stories) / tokens > 0.8


def test_toy_stories_spell_out_their_choices():
    """The same text always comes from the same choices; else the text's entropy would be below the
    choices'."""
    rng, seen = random.Random(1), defaultdict(set)
    for template in prep.EVENTS:  # single sentences repeat often enough to show a collision
        slots = re.findall(r"{([A-Z]+)}", template)
        for _ in range(3000):
            choice = tuple(rng.choice(prep.SLOTS[slot]) for slot in slots)
            text = template.format(name="Lily", he="she", his="her", thing="ball", look="red",
                                   spot="under the old tree", **dict(zip(slots, choice)))
            seen[text].add((template, choice))
    assert all(len(choices) == 1 for choices in seen.values())


def test_toy_stories_agree_over_distance():
    """The name's pronoun, the place's spot and the object come back in every story."""
    rng = random.Random(2)
    for _ in range(200):
        story, _ = prep.toy_story(rng)
        name, place = re.match(r"(\w+) went to the (\w+)", story).groups()
        he, his = dict((n, (h, s)) for n, h, s in prep.PEOPLE)[name]
        wrong = {"she", "her"} if he == "he" else {"he", "his"}
        assert not wrong & set(re.sub(r"her mother's", "", story).lower().replace(".", "").split())
        assert dict(prep.PLACES)[place] in story


# -----------------------------------------------------------------------------
# documents


def test_bench_has_eight_prompts_whatever_the_corpus():
    """Whole pieces, 64 characters at most; of a toy's stories they tell different ones."""
    assert len(prep.bench_prompts(["A story. " * 9] * 100)) == 8
    for n in (1, 3, 8):
        prompts = prep.bench_prompts([f"{i} " + "=" * 500 for i in range(n)])
        assert len(prompts) == 8 and all(0 < len(p) <= 64 for p in prompts)
    rng = random.Random(0)
    stories = [prep.toy_story(rng)[0] for _ in range(8)]
    prompts = prep.bench_prompts(stories)
    assert all(s.startswith(p) and s[len(p)] in " ." for s, p in zip(stories, prompts)) and len(set(prompts)) == 8


def test_split_is_by_document_and_by_seed():
    def split(documents, seed):
        return [list(read()) for read in prep.split_documents(lambda: iter(documents), seed)]

    documents = [f"story {i}" for i in range(100)]
    train, val = split(documents, 0)
    assert sorted(train + val) == sorted(documents) and len(val) == 5
    assert split(documents, 0) == [train, val] != split(documents, 1)
    train, val = split(["line\n" * 100], 0)
    assert train[0] + val[0] == "line\n" * 100 and len(val[0]) == 20  # 5 %, from a line's end on
    train, val = split(["x" * 990 + "\nlast line"], 0)
    assert len(val[0]) == 50  # no line ends near the place of the cut


def test_a_file_that_is_named_twice_is_read_once(tmp_path):
    """Also by its folder, by another spelling and by a link: else its documents would be in train
    and in val."""
    (tmp_path / "a.txt").write_text("one")
    (tmp_path / "b.txt").write_text("two")
    (tmp_path / "link.txt").symlink_to(tmp_path / "a.txt")
    files, _ = prep.text_files([tmp_path / "a.txt", tmp_path, tmp_path / "b.txt", tmp_path / ".." / tmp_path.name])
    assert list(prep.documents(files)) == ["one", "two"]


def test_documents_are_read_in_parts_as_they_are(tmp_path, monkeypatch):
    """Whatever the size of the parts that a file is read in: documents come out whole, newlines
    stay as they are, a byte order mark goes, and empty documents are none."""
    text = "\ufeffone\r\nüber" + EOT + "two\n\n 2\r" + EOT + "\n" + EOT + "x" + EOT + "y\nthree"
    (tmp_path / "a.txt").write_bytes(text.encode())
    chunks = prep.chunks
    for size in (2**22, 12, 1):
        monkeypatch.setattr(prep, "chunks", lambda path: chunks(path, size))
        assert "".join(prep.chunks(tmp_path / "a.txt")) == text[1:]
        assert list(prep.documents([tmp_path / "a.txt"])) == ["one\r\nüber", "two\n\n 2", "x", "y\nthree"]
    assert len(list(prep.chunks(tmp_path / "a.txt"))) > 4


def test_long_documents_are_encoded_in_parts(monkeypatch):
    """Cut at a line's end where there is one, nothing lost, one <|endoftext|> after each
    document."""
    monkeypatch.setattr(tokenizer, "SEGMENT", 10)
    texts = ["line one\nline two\nx" * 3, "y" * 25, "short"]
    parts = [list(tokenizer.segments(text)) for text in texts]
    assert max(len(part) for part in sum(parts, [])) <= 10 and ["".join(p) for p in parts] == texts
    assert all(part.endswith("\n") for part in parts[0][:-1])
    enc, file = load_tokenizer(build_tokenizer(texts, 257)), io.BytesIO()
    counts = prep.encode_all(enc, texts, file, "test")
    ids = np.frombuffer(file.getvalue(), dtype=np.uint16)
    assert "".join(enc.decode([i]) for i in ids) == EOT.join(texts) + EOT
    assert counts["sha256"] == hashlib.sha256(file.getvalue()).hexdigest()
    assert (counts["documents"], counts["tokens"], counts["bytes"]) == (3, len(ids), sum(map(len, texts)))
    batches = list(prep.batches(texts, size=20))
    assert [part for part, _ in sum(batches, [])] == sum(parts, []) and sum(ends for _, ends in sum(batches, [])) == 3
    assert all(20 <= sum(len(text) for text, _ in batch) < 30 for batch in batches[:-1])


def test_first_megabytes_end_with_a_whole_story(tmp_path):
    """What stands after the last <|endoftext|> is half a story, or half a character."""
    for text in (f"one{EOT}two{EOT}thr".encode() + b"\xc3", f"one{EOT}two{EOT}".encode()):
        (tmp_path / "a").write_bytes(text)
        prep.drop_cut_story(tmp_path / "a")
        assert list(prep.documents([tmp_path / "a"])) == ["one", "two"]
