"""Makes `tokenizer.json`, one token for each character of the shipped text: `python examples/gpt/make_tokenizer.py`."""

from pathlib import Path

from tokenizers import Tokenizer, decoders
from tokenizers.models import BPE

from swissarmy.data.tokenizer import Tokenizer as WithRoles

HERE = Path(__file__).parent
TEXT = HERE.parent / "data" / "kjv_gospels_and_acts.txt"
SPECIAL = {"pad_token": "<pad>", "eos_token": "<eos>", "unk_token": "<unk>"}

alphabet = [*SPECIAL.values(), *sorted(set(TEXT.read_text()))]
characters = Tokenizer(BPE({each: number for number, each in enumerate(alphabet)}, merges=[], unk_token="<unk>"))
characters.decoder = decoders.Fuse()
WithRoles(characters, special_tokens=SPECIAL).save_pretrained(HERE)
