"""Text to token ids and back: a tiktoken.Encoding that a plain dict describes in full.

    enc = load_tokenizer(build_tokenizer(["Once upon a time"], vocab_size=300))
    ids = encode(enc, "Once upon")

The dict {name, pattern, tokens} stands in meta.json and in every checkpoint, so neither needs a
file beside it. For another tokenizer, write another function that returns such a dict, and give it
a line in TOKENIZERS, from which --tokenizer chooses.
"""

import codecs
import re
import threading
from collections import Counter

import tiktoken

from model import BadInput

EOT = "<|endoftext|>"
LONGEST = 32  # bytes of a piece: a text without spaces is one piece, and must not become one token
SEGMENT = 2**17  # characters encoded at once: a million spaces in a row overflow tiktoken's stack
# Pieces: words with the space in front, digits, punctuation (ASCII's and U+2010-205E), spaces;
# every character is in one of these classes. No \w: Python's re, which counts pieces, and
# tiktoken's regex, which encodes, disagree on it.
PATTERN = (r"'(?:[sdmt]|ll|ve|re)| ?[^\s\d!-/:-@\[-`{-~\u2010-\u205e]+| ?\d+"
           r"| ?[!-/:-@\[-`{-~\u2010-\u205e]+|\s+(?!\S)|\s+")


def build_tokenizer(documents, vocab_size):
    """The 256 bytes, the most frequent whole pieces of the documents, and <|endoftext|>: at most
    vocab_size ids.

    tiktoken looks a whole piece up before it merges bytes, so any text round-trips and no BPE
    training is needed. 257 is bytes. A small corpus has fewer pieces than asked for. Returns the
    description that `load_tokenizer` reads.
    """
    counts = Counter()
    for document in documents:
        for text in segments(document):
            counts.update(re.findall(PATTERN, text))
    pieces = [p for p in counts if 1 < len(p.encode()) <= LONGEST]
    pieces = sorted(pieces, key=lambda p: (-counts[p], p))[: vocab_size - 257]
    tokens = [bytes([b]) for b in range(256)] + [p.encode() for p in pieces]
    return {"name": f"pieces{len(tokens) + 1}", "pattern": PATTERN,
            "tokens": [token.decode("latin-1") for token in tokens]}


def gpt2_tokenizer(documents=(), vocab_size=0, timeout=60):
    """GPT-2's BPE, whatever the documents and vocab_size; only this step needs tiktoken's files.

    tiktoken downloads them without a time-out (seconds, here), so it would wait for ever where a
    firewall is silent.
    """
    result = []

    def load():
        try:
            result.append(tiktoken.get_encoding("gpt2"))
        except Exception as e:  # requests' own kinds among them
            result.append(e)

    thread = threading.Thread(target=load, daemon=True)
    thread.start()
    thread.join(timeout)
    enc = result[0] if result else TimeoutError(f"no answer in {timeout} s")
    if isinstance(enc, Exception):
        raise BadInput(
            f"GPT-2's BPE files could not be had ({type(enc).__name__}). With a network, try "
            "again; without one, set TIKTOKEN_CACHE_DIR to a copy of tiktoken's cache, or take "
            "--tokenizer pieces, which needs none.")
    tokens = [enc.decode_single_token_bytes(i).decode("latin-1") for i in range(enc.eot_token)]
    return {"name": "gpt2", "pattern": enc._pat_str, "tokens": tokens}


TOKENIZERS = {"pieces": build_tokenizer, "gpt2": gpt2_tokenizer}


class Tokenizer(tiktoken.Encoding):
    """A tiktoken.Encoding, and what the scripts ask of any tokenizer. Your own has these, too:

        prompt_ids(text)   the ids that a text begins with
        pieces(prompt)     a function from the next token after these ids to the text that it
                           completes, and from None to what is left at the end
        gap                what stands between a prompt and its text
        ends               the ids that end a text
        answer_end         those that end an answer; None for texts that go on
    """

    gap, answer_end = "", None

    @property
    def ends(self):
        return {self.eot_token}

    def prompt_ids(self, text):
        return [self.eot_token, *encode(self, text)]  # texts begin after one, as in training

    def pieces(self, prompt=()):
        # holds back the bytes of a character until it is complete
        decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

        def piece(token):
            end = token is None
            return decoder.decode(b"" if end else self.decode_single_token_bytes(token), final=end)

        return piece


class Characters:
    """A tokenizer of single characters, as nanoGPT has: it knows no others, nor <|endoftext|>."""

    gap, ends, answer_end = "", (), None

    def __init__(self, name, characters):
        self.name, self.characters, self.n_vocab = name, characters, len(characters)
        self.ids = {character: i for i, character in enumerate(characters)}

    def encode_ordinary(self, text):
        unknown = sorted(set(text) - self.ids.keys())
        if unknown:
            raise BadInput(f"the model knows {self.n_vocab} characters, and {unknown[0]!r} is none "
                           "of them")
        return [self.ids[character] for character in text]

    def decode(self, tokens):
        return "".join(self.characters[token] for token in tokens)

    def prompt_ids(self, text):
        return encode(self, text or ("\n" if "\n" in self.ids else self.characters[0]))

    def pieces(self, prompt=()):
        return lambda token: "" if token is None else self.characters[token]


def load_tokenizer(description):
    """The Tokenizer of a description {name, pattern, tokens}; tokens are byte strings written as
    latin-1.

    Ids are the places in that list; <|endoftext|> comes last and is `eot_token`. All 256 bytes must
    be among the tokens, so that any text can be encoded: else BadInput. Without a pattern, the
    tokens are characters: see `Characters`.
    """
    name, pattern = description["name"], description["pattern"]
    tokens = [token.encode("latin-1") for token in description["tokens"]]
    ranks = {token: i for i, token in enumerate(tokens)}
    if pattern is not None and not all(bytes([b]) in ranks for b in range(256)):
        raise BadInput(f"the tokenizer {name} lacks some of the 256 single bytes, so it cannot "
                       "encode every text")
    try:
        if pattern is None:
            return Characters(name, [token.decode() for token in tokens])
        return Tokenizer(name, pat_str=pattern, mergeable_ranks=ranks,
                         special_tokens={EOT: len(ranks)})
    except Exception as e:  # bytes that are no character; for a wrong pattern many kinds
        raise BadInput(f"the tokenizer {name} cannot be read ({type(e).__name__}: {e})") from None


def encode(enc, text):
    """The token ids of a text, in which the words "<|endoftext|>" are plain text."""
    return [token for part in segments(text) for token in enc.encode_ordinary(part)]


def segments(text):
    """A text in parts of at most SEGMENT characters, cut at a line's end if there is one."""
    start = 0
    while len(text) - start > SEGMENT:
        cut = text.rfind("\n", start, start + SEGMENT) + 1 or start + SEGMENT
        yield text[start:cut]
        start = cut
    yield text[start:]


class TextStream:
    """The token ids after a prompt's in, text out, as far as it is complete.

    With printable, control characters other than newline and tab come out as visible escapes
    (\\x1b): a model of bytes may write any of them, and a terminal would obey.
    """

    def __init__(self, enc, prompt=(), printable=False):
        self.piece, self.printable = enc.pieces(prompt), printable

    def push(self, token):
        """The text that a token completes; what is left for None, at the end."""
        text = self.piece(token)
        if not self.printable:
            return text
        control = r"[\x00-\x08\x0b-\x1f\x7f-\x9f]"
        return re.sub(control, lambda match: f"\\x{ord(match[0]):02x}", text)

    def end(self):
        return self.push(None)
