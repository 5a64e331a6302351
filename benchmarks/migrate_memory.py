"""How much memory `sat migrate` needs for a 2 GB checkpoint: `python benchmarks/migrate_memory.py [GIGABYTES]`.

For a checkpoint in one file, in four model-parallel files, and one whose word embedding is most of it, the peak of a
process that migrates it is compared with the promise: at most 1.2 times the largest file, and one tensor. Counted is
the resident memory above that of a process that has migrated a tiny checkpoint, pages of mapped files included.
"""

import json
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

# Not `ru_maxrss`: a process inherits it from the one that started it, which has just written the files.
CHILD = """
import json, re, sys, time
from swissarmy.interop.sat_legacy.migrate import migrate
def peak():
    return int(re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read())[1]) * 1024
migrate(sys.argv[1], sys.argv[2])
before, start = peak(), time.perf_counter()
migrate(sys.argv[3], sys.argv[4])
print(json.dumps([peak() - before, time.perf_counter() - start]))
"""


@dataclass(frozen=True)
class Case:
    """A synthetic GPT-2 in float32."""

    name: str
    ranks: int
    layers: int
    hidden: int
    words: int

    def shapes(self) -> Iterator[tuple[str, tuple[int, ...]]]:
        """The names and shapes of each rank's share."""
        h, n = self.hidden, self.ranks
        yield "transformer.word_embeddings.weight", (self.words // n, h)
        yield "transformer.position_embeddings.weight", (1024, h)
        for layer in range(self.layers):
            start = f"transformer.layers.{layer}"
            yield from _linear(f"{start}.input_layernorm", (h,))
            yield from _linear(f"{start}.attention.query_key_value", (3 * h // n, h))
            yield f"{start}.attention.dense.weight", (h, h // n)
            yield f"{start}.attention.dense.bias", (h,)
            yield from _linear(f"{start}.post_attention_layernorm", (h,))
            yield from _linear(f"{start}.mlp.dense_h_to_4h", (4 * h // n, h))
            yield f"{start}.mlp.dense_4h_to_h.weight", (h, 4 * h // n)
            yield f"{start}.mlp.dense_4h_to_h.bias", (h,)
        yield from _linear("transformer.final_layernorm", (h,))

    def write(self, folder: Path) -> Path:
        """Make the files."""
        step = folder / "1"
        step.mkdir(parents=True)
        (folder / "latest").write_text("1")
        (folder / "model_config.json").write_text(json.dumps({"model_class": "GPT2Model", "num_attention_heads": 16}))
        for rank in range(self.ranks):
            # Word embeddings differ between ranks, as those of a split model do.
            module = {name: torch.full(shape, 0.01 * (1 + rank * ("word" in name))) for name, shape in self.shapes()}
            torch.save({"module": module, "iteration": 1}, step / f"mp_rank_{rank:02d}_model_states.pt")
        return folder


def _linear(name: str, shape: tuple[int, ...]) -> Iterator[tuple[str, tuple[int, ...]]]:
    yield f"{name}.weight", shape
    yield f"{name}.bias", shape[:1]


def cases(gigabytes: float) -> list[Case]:
    """Three checkpoints of about that size together with their embeddings."""
    layers = max(1, round(gigabytes * 1e9 / (12 * 2048 * 2048 * 4)))
    words = round(gigabytes * 1e9 * 0.8 / (1024 * 4)) // 512 * 512
    return [
        Case("one file", 1, layers, 2048, 50_176),
        Case("four files", 4, layers, 2048, 50_176),
        Case("mostly one tensor", 1, 4, 1024, words),
    ]


def main() -> None:
    """Measure, and print a table."""
    gigabytes = float(sys.argv[1]) if len(sys.argv) > 1 else 2.0
    table = Table("checkpoint", "largest file", "largest tensor", "allowed", "peak", "seconds")
    with tempfile.TemporaryDirectory() as temporary:
        root = Path(temporary)
        tiny = Case("tiny", 1, 1, 64, 512).write(root / "tiny")
        for number, case in enumerate(cases(gigabytes)):
            source = case.write(root / str(number))
            arguments = [str(tiny), str(root / f"tiny-{number}"), str(source), str(root / f"new-{number}")]
            done = subprocess.run([sys.executable, "-c", CHILD, *arguments], capture_output=True, text=True, check=True)
            peak, seconds = json.loads(done.stdout)
            file = max(path.stat().st_size for path in (source / "1").iterdir())
            tensor = max(4 * torch.Size(shape).numel() * case.ranks for _, shape in case.shapes())
            allowed = 1.2 * file + tensor
            row = [f"{size / 1e6:,.0f} MB" for size in (file, tensor, allowed, peak)]
            table.add_row(case.name, *row, f"{seconds:.1f}", style="" if peak <= allowed else "red")
            for folder in (source, root / f"new-{number}"):
                shutil.rmtree(folder)
    Console().print(table)


if __name__ == "__main__":
    main()
