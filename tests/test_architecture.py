"""The shape of the package: imports run one way, importing changes nothing, public names exist and are documented."""

import ast
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import swissarmy as sat

ROOT = Path(sat.__file__).parent
FILES = sorted(ROOT.rglob("*.py"))
MIXINS = sorted(path for path in (ROOT / "mixins").glob("*.py") if path.name != "__init__.py")

MAY_IMPORT = {
    "core": set(),
    "nn": {"core"},
    "backbone": {"core", "nn"},
    "mixins": {"core", "nn", "backbone"},
    "models": {"core", "nn", "backbone", "mixins"},
    "data": {"core"},
    "generation": {"core", "nn", "backbone", "mixins", "models", "data"},
    "interop": {"core", "nn", "backbone", "mixins", "models", "data"},
    "training": {"core", "nn", "backbone", "mixins", "models", "data", "generation", "interop"},
}
"""What each folder may import beside itself; `cli`, `testing` and the package itself may import all."""
UPWARD = {("backbone/model.py", "swissarmy.interop.save"), ("backbone/model.py", "swissarmy.interop.adapter")}
"""The one way up, at call time: `model.save_pretrained` and `model.save_adapter`."""

FROZEN = """
TransformerConfig BaseModel load AutoModel load_tokenizer list_models PrefixTuningMixin fill_sequence generate stream
BaseMixin non_conflict replaceable GreedyStrategy SamplingStrategy HookContext CachedAutoRegressiveMixin KVCache
Mask Full Causal SlidingWindow PrefixLM Padding Documents Dense
BeamSearchStrategy evaluate_perplexity Perplexity filling_sequence CachedAutoregressiveMixin
train TrainConfig
""".split()
"""The names of the contract that exist; a name is added here when it comes, and never taken away."""
FROZEN_METHODS = """
add_mixin get_mixin del_mixin with_mixin explain save_pretrained enable_activation_checkpointing compile
freeze_except trainable_summary
""".split()


def imports_of(path: Path) -> Iterator[str]:
    """Every module that a file imports, inside functions too."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: imports are absolute"
            yield str(node.module)


def in_a_new_process(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120)
    return done.stdout


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_run_one_way(path: Path) -> None:
    relative = path.relative_to(ROOT)
    folder = relative.parts[0]
    for module in imports_of(path):
        if folder not in MAY_IMPORT or not module.startswith("swissarmy.") or (str(relative), module) in UPWARD:
            continue
        target = module.split(".")[1]
        assert target == folder or target in MAY_IMPORT[folder], f"{relative} imports {module}"


def test_nothing_below_the_command_line_imports_the_package_as_a_whole() -> None:
    for path in FILES:
        if path.relative_to(ROOT).parts[0] in MAY_IMPORT:
            assert not {"swissarmy", "swissarmy.api"} & set(imports_of(path)), path


@pytest.mark.parametrize("forbidden", ["transformers", "peft", "sat", "deepspeed", "apex", "triton"])
def test_the_package_never_imports(forbidden: str) -> None:
    users = [str(path) for path in FILES if forbidden in {name.split(".")[0] for name in imports_of(path)}]
    assert not users


def test_every_folder_is_a_package_with_a_place_in_the_order() -> None:
    folders = {path.relative_to(ROOT).parts[0] for path in FILES if path.parent != ROOT}
    assert folders <= {*MAY_IMPORT, "cli", "testing"}


def test_importing_starts_no_thread_and_changes_no_state_of_the_process() -> None:
    code = """
import json, locale, logging, os, random, signal, sys, threading, warnings
import numpy, torch, torch.distributed.tensor, huggingface_hub

def state():
    return {
        "environment": dict(os.environ),
        "threads": threading.active_count(),
        "tasks": len(os.listdir("/proc/self/task")),
        "folder": os.getcwd(),
        "torch threads": torch.get_num_threads(),
        "dtype": str(torch.get_default_dtype()),
        "device": str(torch.get_default_device()),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "precision": torch.get_float32_matmul_precision(),
        "torch seed": torch.initial_seed(),
        "random": hash(random.getstate()),
        "numpy": str(numpy.random.get_state()[1][:4]),
        "warnings": [str(item) for item in warnings.filters],
        "handlers": [str(item) for item in logging.getLogger().handlers],
        "level": logging.getLogger().level,
        "signals": [str(signal.getsignal(number)) for number in (signal.SIGTERM, signal.SIGINT, signal.SIGPIPE)],
        "locale": locale.setlocale(locale.LC_ALL),
        "hook": str(sys.excepthook),
        "recursion": sys.getrecursionlimit(),
    }

before = state()
import swissarmy
for name in swissarmy.__all__:
    getattr(swissarmy, name)
print(json.dumps([before, state()]))
"""
    before, after = json.loads(in_a_new_process(code))
    assert after == before


def test_importing_brings_in_nothing_heavy_that_is_not_needed_yet() -> None:
    code = "import sys, swissarmy.api; print(' '.join(sorted({name.partition('.')[0] for name in sys.modules})))"
    loaded = set(in_a_new_process(code).split())
    assert not loaded & {
        "transformers",
        "peft",
        "gguf",
        "datasets",
        "PIL",
        "matplotlib",
        "wandb",
        "tensorboard",
        "tyro",
    }


def test_nothing_but_training_loads_the_packages_for_many_processes() -> None:
    code = "import sys, swissarmy; swissarmy.load; print('torch.distributed.tensor' in sys.modules)"
    assert in_a_new_process(code).strip() == "False"


def test_listing_the_families_imports_none_that_was_not_there() -> None:
    code = """
import sys, swissarmy
swissarmy.list_models
before = set(sys.modules)
swissarmy.list_models()
print(set(sys.modules) - before)
"""
    assert in_a_new_process(code).strip() == "set()"


def test_a_public_name_that_does_not_exist_is_an_attribute_error() -> None:
    """Python's own traceback adds the nearest name, from `dir()`."""
    with pytest.raises(AttributeError, match="'swissarmy' has no attribute 'BaseMixn'"):
        sat.BaseMixn  # noqa: B018


def test_importing_the_package_alone_does_not_load_torch() -> None:
    assert in_a_new_process("import sys, swissarmy; print('torch' in sys.modules)").strip() == "False"


# Public names


@pytest.mark.parametrize("name", sat.__all__)
def test_every_public_name_exists_and_is_documented(name: str) -> None:
    thing = getattr(sat, name)
    assert (thing.__doc__ or "").strip(), name
    assert not (thing.__doc__ or "").startswith(f"{name}("), f"{name}: only the docstring that dataclass makes"


def test_public_names_are_sorted_and_complete() -> None:
    assert sat.__all__ == sorted(set(sat.__all__))
    nodes = ast.walk(ast.parse((ROOT / "api.py").read_text()))
    own = [node for node in nodes if isinstance(node, ast.ImportFrom) and str(node.module).startswith("swissarmy.")]
    assert {alias.name for node in own for alias in node.names} == set(sat.__all__)
    assert {*sat.__all__, "__version__"} <= set(dir(sat))


@pytest.mark.parametrize("name", FROZEN)
def test_a_name_of_the_contract_stays(name: str) -> None:
    assert name in sat.__all__


@pytest.mark.parametrize("name", FROZEN_METHODS)
def test_a_method_of_the_contract_stays(name: str) -> None:
    assert callable(getattr(sat.BaseModel, name))


def test_every_mixin_of_the_library_that_stands_alone_is_public_or_of_one_family() -> None:
    for path in MIXINS:
        names = {node.name for node in ast.parse(path.read_text()).body if isinstance(node, ast.ClassDef)}
        assert any(name in sat.__all__ for name in names), f"nothing of {path.name} is public"


# The files of mixins


@pytest.mark.parametrize("path", MIXINS, ids=lambda path: path.stem)
def test_a_mixin_file_opens_with_its_hooks_and_parameters(path: Path) -> None:
    docstring = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
    assert "Hooks: `" in docstring
    assert "Parameters:" in docstring


@pytest.mark.parametrize("path", MIXINS, ids=lambda path: path.stem)
def test_the_hooks_that_a_mixin_file_names_are_those_that_it_defines(path: Path) -> None:
    from swissarmy.core.hooks import HOOKS

    tree = ast.parse(path.read_text(encoding="utf-8"))
    defined = {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)} & set(HOOKS)
    docstring = ast.get_docstring(tree) or ""
    named = {hook for hook in HOOKS if f"`{hook}`" in docstring}
    assert named == defined


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_file_opens_with_a_docstring_and_stays_readable(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert not text or ast.get_docstring(ast.parse(text)), f"{path} opens without a docstring"
    assert text.count("\n") <= 400
