"""What a model is asked to write about: frames of prompts, by kind, and prompts that are held out.

generate.py lets a chat model finish the frames by itself: "Write a short story about" becomes a
user's message that nobody wrote (as in Magpie, arXiv 2406.08464), and then the model answers it. So
no list of topics is needed, and the head sees as many topics as there are texts. Held-out prompts
are for bench_speculative.py: no training prompt may be one of them. Files of one's own prompts take
the place of both: see `read_prompts`.
"""

from pathlib import Path

from model import BadInput

FRAMES = {
    "stories": ["Write a short story about", "Tell me a story about",
                "Can you write a story for children about", "Write a tale of"],
    "questions": ["What is", "Can you explain how", "Why", "What is the difference between"],
    "instructions": ["Give me five tips for", "Write a short guide to", "How do I",
                     "Write a polite email to"],
    "code": ["Write a Python function that", "Show me Python code that",
             "How do I write a Python function that", "Write a short Python program that"],
}
SHARES = {"stories": 2, "questions": 1, "instructions": 1, "code": 1}  # of the texts

HELD_OUT = {
    "stories": [
        "Write a short story about a travelling musician who builds a boat.",
        "Tell me a story about a lost dog who finds a hidden door.",
        "Can you write a story for children about a bear who must cross the sea?",
        "Write a tale of a sailor who waits for the first snow.",
        "Write a short story about a snail who gets lost in a forest.",
        "Tell me a story about a clever fox who hears a strange song.",
        "Can you write a story for children about a lonely robot who wins a race?",
        "Write a tale of an old lighthouse keeper who makes a new friend.",
    ],
    "questions": [
        "What is the ozone layer?", "Can you explain how glass is made?", "Why is the sky blue?",
        "What is the difference between a comet and an asteroid?", "What is a black hole?",
        "Can you explain how evolution works?", "Why is sleep important?",
        "What is the difference between weather and climate?",
    ],
    "instructions": [
        "Give me five tips for training a puppy.", "Write a short guide to growing tomatoes.",
        "How do I prepare for a marathon?",
        "Write a polite email to my landlord about a broken heater.",
        "Give me five tips for hiking alone.", "Write a short guide to riding a bicycle in a city.",
        "How do I sleep better?", "Write a polite email to a teacher who was ill.",
    ],
    "code": [
        "Write a Python function that adds two numbers.",
        "Show me Python code that computes the average of a list.",
        "How do I write a Python function that rotates a list?",
        "Write a short Python program that prints a multiplication table.",
        "Write a Python function that multiplies two matrices.",
        "Show me Python code that counts the vowels of a string.",
        "How do I write a Python function that checks whether a number is prime?",
        "Write a short Python program that simulates a dice roll.",
    ],
}


def read_prompts(paths):
    """({kind: prompts}, {kind: held-out prompts}) of files with one prompt per line: a file is a
    kind, and its first eight lines, or its first half if that is shorter, are held out."""
    training, held_out = {}, {}
    for path in map(Path, paths):
        try:
            with open(path, encoding="utf-8-sig") as file:  # -sig: Windows puts a mark first
                lines = [line.strip() for line in file]  # splitlines would end them at U+2028, too
        except UnicodeDecodeError:
            raise BadInput(f"{path} is not a utf-8 text with a prompt per line") from None
        lines = list(dict.fromkeys(filter(None, lines)))
        if len(lines) < 2:
            raise BadInput(f"{path} holds fewer than two different prompts, one per line")
        if path.stem in training:
            raise BadInput(f"{path} is a second file of the kind {path.stem}; rename it, or put "
                           "both into one")
        n = min(8, len(lines) // 2)
        held_out[path.stem], training[path.stem] = lines[:n], lines[n:]
    return training, held_out
