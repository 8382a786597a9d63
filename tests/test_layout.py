"""One way: who imports whom. The core stands at the top and names no folder; of the folders, each
imports the core and those to its left. And the door opens to files that are there, and to nothing else."""

import ast
import os
import subprocess
import sys

import pytest

import model
from model import ROOT, BadInput, door, head_class, words

FOLDERS = ("heads", "decoders", "pretrained", "experiments", "course")  # from left to right
CORE = {"model": set(), "tokenizer": {"model"}, "decode": {"model"}, "common": {"model", "tokenizer"},
        "train": {"model", "common"}, "sample": {"model", "tokenizer", "decode", "common"},
        "bench_speculative": {"model", "decode", "common", "sample"},
        "prepare_tinystories": {"model", "tokenizer", "common"}}  # by file: what it may import


def our_files():
    """{path in the repository: source} of the Python files in git."""
    listed = subprocess.run(["git", "ls-files", "*.py"], cwd=ROOT, capture_output=True, text=True)
    if listed.returncode:
        pytest.skip("no git here, or no repository")
    paths = [path for path in listed.stdout.split() if (ROOT / path).exists()]
    return {path: (ROOT / path).read_text(encoding="utf-8") for path in paths}


def module_of(path):
    return path.removesuffix(".py").removesuffix("/__init__").replace("/", ".")


def imports(path, source, modules):
    """The modules of ours that a file imports, anywhere in it."""
    package, found = module_of(path).split(".")[:-1], []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            base = ".".join([*base, *([node.module] if node.module else [])])
            inside = [f"{base}.{alias.name}" for alias in node.names]
            found += [name if name in modules else base for name in inside]
        elif isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
            called = getattr(node.func, "attr", getattr(node.func, "id", None))
            if called in ("import_module", "__import__"):
                found.append(str(node.args[0].value))
    ours = {name.split(".")[0] for name in modules}
    return {name for name in found if name.split(".")[0] in ours}


def is_test(module):
    return module.startswith("tests.") or module.split(".")[-1].startswith(("test_", "conftest"))


def wrong_arrows(files):
    """What is wrong with {path: source}, a line each."""
    modules = {module_of(path) for path in files}
    arrows = {module_of(path): imports(path, source, modules) for path, source in files.items()}
    wrong = []
    for module, others in arrows.items():
        folder = module.split(".")[0]
        if is_test(module):
            continue
        if folder not in FOLDERS and folder not in CORE:
            wrong.append(f"{module} is neither the core nor in a folder")
            continue
        for other in sorted(others):
            its = other.split(".")[0]
            if folder in CORE:
                allowed = its in CORE[folder]
            else:
                allowed = its in CORE or its in FOLDERS[: FOLDERS.index(folder) + 1]
            if not allowed:
                wrong.append(f"{module} imports {other}")
    return wrong + circles(arrows)


def circles(arrows):
    """The circles of {module: modules}: what is left when all that imports nothing has gone, and so on."""
    left = {module: {other for other in others if other in arrows} for module, others in arrows.items()}
    while True:
        free = {module for module, others in left.items() if not others}
        if not free:
            return [f"a circle: {', '.join(sorted(left))}"] if left else []
        left = {module: others - free for module, others in left.items() if module not in free}


def test_all_imports_go_one_way():
    files = our_files()
    assert {module_of(path) for path in files} >= CORE.keys() and len(files) > 50
    assert wrong_arrows(files) == []


WRONG = {  # made-up sources: what is wrong in them
    "a core file that imports a folder": ({"sample.py": "def f():\n    from decoders import batched\n"},
                                          "sample imports decoders"),
    "by import_module": ({"train.py": "import importlib\nimportlib.import_module('heads.chain')\n"},
                         "train imports heads.chain"),
    "by its bare name": ({"common.py": "from importlib import import_module\n"
                                       "import_module('pretrained.texts')\n"},
                         "common imports pretrained.texts"),
    "by __import__": ({"common.py": "__import__('pretrained.texts')\n"},
                      "common imports pretrained.texts"),
    "a head that imports a decoder": ({"heads/own.py": "import decoders.batched\n"},
                                      "heads.own imports decoders.batched"),
    "relatively": ({"heads/own.py": "from ..decoders import batched\n"}, "heads.own imports decoders"),
    "a folder to the right": ({"pretrained/own.py": "from experiments.plots import save\n"},
                              "pretrained.own imports experiments.plots"),
    "model imports the tokenizer": ({"model.py": "from tokenizer import EOT\n"}, "model imports tokenizer"),
    "model imports common": ({"model.py": "import common\n"}, "model imports common"),
    "decode imports train": ({"decode.py": "import train\n"}, "decode imports train"),
    "a file that imports a test": ({"heads/own.py": "import test_cp_head\n"},
                                   "heads.own imports test_cp_head"),
    "a circle in a folder": ({"heads/a.py": "from heads import b\n", "heads/b.py": "from heads.c import f\n",
                              "heads/c.py": "from .a import f\n"}, "a circle: heads.a, heads.b, heads.c"),
    "a new file at the top": ({"extra.py": ""}, "extra is neither the core nor in a folder"),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_arrow_is_found(name):
    files, line = WRONG[name]
    core = [f"{module}.py" for module in CORE]
    packages = [f"{folder}/__init__.py" for folder in FOLDERS]
    others = dict.fromkeys([*core, *packages, "heads/chain.py", "decoders/batched.py", "pretrained/texts.py",
                            "experiments/plots.py", "test_cp_head.py"], "")
    assert wrong_arrows(others) == []
    assert line in "; ".join(wrong_arrows(others | files))


# -----------------------------------------------------------------------------
# the door


def test_words_are_files():
    """A word opens what is there; files without a class Head or a function generate are no words."""
    assert {"chain", "full", "recurrent", "tree_circuit", "mask"} <= set(words("head"))
    shared = {"circuits", "few_tokens", "masks", "sequential"}  # of several heads
    assert not {"cp", "tree", "__init__", *shared} & set(words("head"))
    assert words("mode") == ["batched", "captured", "coupled", "draft_tree"]
    assert words("trunk") == ["adapter"]
    assert head_class("cp") is model.CPHead
    for word in words("head"):
        assert head_class(word).__module__ == f"heads.{word}" and issubclass(head_class(word), model.CPHead)
    for word in words("mode"):
        assert callable(door("mode", word).generate)
    assert callable(door("trunk", "adapter").load)


@pytest.mark.parametrize("word", ["", "os", "../model", "..model", "chain.py", "heads.chain", "__init__",
                                  "circuits", "masks", "cp", "CHAIN", "chain\n", None, 3, ["chain"]])
def test_the_door_is_shut(word):
    """To what a checkpoint might ask for: nothing is imported."""
    before = set(sys.modules)
    with pytest.raises(BadInput, match=r"^head must be one of cp, chain, "):
        door("head", word)
    assert set(sys.modules) == before


def test_a_head_of_ones_own_is_a_file(tmp_path, monkeypatch):
    """It is found where it is put."""
    (tmp_path / "heads").mkdir()
    (tmp_path / "heads/own.py").write_text("from model import CPHead\n\n\nclass Head(CPHead):\n    pass\n")
    (tmp_path / "heads/notes.py").write_text("x = 'class Head('\n")
    monkeypatch.setattr(model, "ROOT", tmp_path)
    assert words("head") == ["own"]


def test_the_core_needs_no_folder(tmp_path):
    """With its files alone, train.py makes a model with the CP head and sample.py decodes with it."""
    for module in CORE:
        (tmp_path / f"{module}.py").write_bytes((ROOT / f"{module}.py").read_bytes())
    small = ("--preset toy --head cp --n_layer 1 --n_head 2 --n_embd 16 --block_size 32 --batch_size 4 --rank 2 "
             "--n_future 3 --max_iters 2 --eval_windows 4 --device cpu").split()
    code = "import runpy, sys"
    for script, args in (("prepare_tinystories", ["--toy", "--stories", "50"]), ("train", small),
                         ("sample", ["--max_new_tokens", "5"])):
        code += f"; sys.argv[1:] = {args}; runpy.run_path('{script}.py', run_name='__main__')"
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    result = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=environment,
                            capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert "wrote out/toy/ckpt.pt" in result.stdout and "speculative: 5 tokens" in result.stdout


def test_threads_are_told_how_to_wait_before_torch_is_loaded():
    """OpenMP reads its environment once, when torch loads it. `python -m` runs a folder's __init__ first."""
    files = our_files()
    scripts = [path for path, source in files.items() if '__name__ == "__main__"' in source and not is_test(module_of(path))]
    assert len(scripts) > 15
    for path in scripts:
        *folder, _ = path.split("/")
        source = files["/".join([*folder, "__init__.py"])] if folder else files[path]
        found = [name for node in ast.parse(source).body if isinstance(node, (ast.Import, ast.ImportFrom))
                 for name in ([node.module] if isinstance(node, ast.ImportFrom) else [alias.name for alias in node.names])]
        assert [name for name in found if name in ("torch", "model", "common", "decode", "sample")][0] == "common", path
