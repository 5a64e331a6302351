"""Encoders for records of text: documents, prompts with answers, token ids, pairs of sequences, labelled texts.

Each is a small frozen value that names the fields it reads; `chat_encoder.py` and `image_encoder.py` have the others.
Shapes: n tokens of a record.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from functools import cached_property
from typing import Any, final

import numpy as np
from numpy.typing import NDArray

from swissarmy.core.errors import ConfigError, nearest
from swissarmy.data.samples.examples import IGNORED, Cut, Flags, Ids, Sample, token_sample
from swissarmy.data.samples.offset_tokenizer import OffsetTokenizer, tokenizer_fingerprint
from swissarmy.data.source import RecordError, digest, field_of
from swissarmy.data.tokenizer import Tokenizer


@dataclass(frozen=True, kw_only=True)
class TokenizerEncoder(ABC):
    """What encoders with a tokenizer share."""

    tokenizer: Tokenizer = field(repr=False)
    """Makes the ids."""

    @cached_property
    def fingerprint(self) -> str:
        """Of the class, the tokenizer and every other field."""
        settings = {each.name: getattr(self, each.name) for each in fields(self) if each.name != "tokenizer"}
        return digest(type(self).__name__, tokenizer_fingerprint(self.tokenizer), settings)

    @abstractmethod
    def __call__(self, record: Mapping[str, Any], *, where: str, cut: Cut | None = None) -> Sample:
        """The sample of one record; see `Encoder`."""

    @cached_property
    def offsets(self) -> OffsetTokenizer:
        """The tokenizer, telling where each token begins."""
        return OffsetTokenizer(self.tokenizer)

    def end_id(self) -> int:
        """The id that ends a text.

        Raises:
            ConfigError: the tokenizer has none.
        """
        if self.tokenizer.eos_token_id is None:
            cure = ": say append_eos=False" if hasattr(self, "append_eos") else ""
            raise ConfigError(f"{type(self).__name__}: the tokenizer has no eos_token to end texts with{cure}")
        return self.tokenizer.eos_token_id


@final
@dataclass(frozen=True, kw_only=True)
class TextEncoder(TokenizerEncoder):
    """`{"text": ...}`: every token is to be predicted."""

    text_field: str = "text"
    """Where the text is."""
    append_eos: bool = True
    """End with the end token, where the tokenizer does not do so by itself."""
    add_special_tokens: bool = True
    """Add what the tokenizer puts around a text, such as a first token."""

    def __post_init__(self) -> None:
        """Refuse to append what does not exist."""
        if self.append_eos:
            self.end_id()

    def __call__(self, record: Mapping[str, Any], *, where: str, cut: Cut | None = None) -> Sample:
        """`input_ids` and `loss_mask`, `[n]`."""
        text = text_of(record, self.text_field, where)
        ids = self.tokenizer.encode(text, add_special_tokens=self.add_special_tokens)
        if self.append_eos and ids[-1:] != [self.end_id()]:
            ids.append(self.end_id())
        return token_sample(np.array(ids, dtype=np.int64), np.ones(len(ids), dtype=np.bool_), cut)


@final
@dataclass(frozen=True, kw_only=True)
class CompletionEncoder(TokenizerEncoder):
    """`{"prompt": ..., "completion": ...}`: the completion and the end token are to be predicted.

    The two are encoded as one text, as they will be read; a token that begins in the prompt belongs to the prompt.
    """

    prompt_field: str = "prompt"
    """Where the prompt is."""
    completion_field: str = "completion"
    """Where the completion is; a space between the two belongs at its beginning."""
    append_eos: bool = True
    """End with the end token, where the tokenizer does not do so by itself."""
    add_special_tokens: bool = True
    """Add what the tokenizer puts around a text, such as a first token."""
    train_on_prompt: bool = False
    """Predict the prompt as well."""

    def __post_init__(self) -> None:
        """Refuse to append what does not exist."""
        if self.append_eos:
            self.end_id()

    def __call__(self, record: Mapping[str, Any], *, where: str, cut: Cut | None = None) -> Sample:
        """`input_ids` and `loss_mask`, `[n]`.

        Raises:
            RecordError: also if no token of the completion is left after cutting.
        """
        prompt = text_of(record, self.prompt_field, where)
        text = prompt + text_of(record, self.completion_field, where)
        ids, begins = self.offsets(text, add_special_tokens=self.add_special_tokens)
        scored = begins >= (0 if self.train_on_prompt else len(prompt))
        if self.append_eos and ids[-1:].tolist() != [self.end_id()]:
            ids, scored = np.append(ids, self.end_id()), np.append(scored, True)
        return scored_sample(ids, scored, cut, where=where)


@final
@dataclass(frozen=True, kw_only=True)
class TokensEncoder:
    """`{"input_ids": [...]}`, with `loss_mask` (0 and 1) or `labels` (-100 where nothing is to be predicted) if wanted.

    `labels` belong to the tokens beside which they stand, not shifted, and repeat their ids.
    """

    tokens_field: str = "input_ids"
    """Where the ids are."""

    @property
    def fingerprint(self) -> str:
        """Of the settings."""
        return digest("TokensEncoder", self.tokens_field)

    def __call__(self, record: Mapping[str, Any], *, where: str, cut: Cut | None = None) -> Sample:
        """`input_ids` and `loss_mask`, `[n]`."""
        ids = integers_of(record, self.tokens_field, where)
        return token_sample(ids, self._scored(record, ids, where), cut)

    def _scored(self, record: Mapping[str, Any], ids: Ids, where: str) -> Flags:
        name = next((name for name in ("loss_mask", "labels") if name in record), None)
        if name is None:
            return np.ones(len(ids), dtype=np.bool_)
        values = integers_of(record, name, where, kinds="iub" if name == "loss_mask" else "iu")
        if len(values) != len(ids):
            raise RecordError(f"{where}: {name} has {len(values)} values for {len(ids)} tokens in {self.tokens_field}")
        if name == "loss_mask":
            return values.astype(np.bool_)
        scored: Flags = values != IGNORED
        if (values != ids)[scored].any():
            position = int(((values != ids) & scored).argmax())
            raise RecordError(
                f"{where}: labels[{position}] is {values[position]} beside token {ids[position]}: labels repeat the "
                f"ids that are to be predicted, unshifted, and are {IGNORED} elsewhere"
            )
        return scored


@final
@dataclass(frozen=True, kw_only=True)
class Seq2SeqEncoder(TokenizerEncoder):
    """`{"source": ..., "target": ...}`: for encoder-decoders."""

    source_field: str = "source"
    """Where the text is that the encoder reads."""
    target_field: str = "target"
    """Where the text is that the decoder is to give."""
    source_prefix: str = ""
    """Put before every source, such as `summarize: `."""
    start_id: int | None = None
    """What the decoder begins with; the padding token when omitted, as in T5."""

    def __post_init__(self) -> None:
        """Refuse a tokenizer that cannot begin or end a target."""
        self.end_id()
        if self.start_id is None and self.tokenizer.pad_token_id is None:
            raise ConfigError("Seq2SeqEncoder: the tokenizer has no pad_token to begin targets with: give start_id")

    def __call__(self, record: Mapping[str, Any], *, where: str, cut: Cut | None = None) -> Sample:
        """`input_ids` `[n]`; `decoder_input_ids` and `labels` `[m]`, the former being the latter one token late."""
        source = self._ids(self.source_prefix + text_of(record, self.source_field, where), cut)
        target = self._ids(text_of(record, self.target_field, where), cut)
        start = self.tokenizer.pad_token_id if self.start_id is None else self.start_id
        begun = np.concatenate((np.array([start], dtype=np.int64), target[:-1]))
        return {"input_ids": source, "decoder_input_ids": begun, "labels": target}

    def _ids(self, text: str, cut: Cut | None) -> Ids:
        """The ids of a text, ended; what is cut off is text, so that the end stays."""
        ids = self.tokenizer.encode(text)
        if ids[-1:] != [self.end_id()]:
            ids.append(self.end_id())
        if cut is not None and len(ids) > cut.max_length:
            kept = Cut(cut.max_length - 1, cut.side).kept(len(ids) - 1)
            ids = [*ids[:-1][kept], ids[-1]]
        return np.array(ids, dtype=np.int64)


@final
@dataclass(frozen=True, kw_only=True)
class ClassificationEncoder(TokenizerEncoder):
    """`{"text": ..., "label": ...}`, or two texts and a label."""

    text_field: str = "text"
    """Where the text is."""
    text_pair_field: str | None = None
    """Where the second text is, for models that read pairs."""
    label_field: str = "label"
    """Where the class is: its name or its number."""
    label_names: Sequence[str] = ()
    """The classes in order; without them labels must be numbers."""

    def __call__(self, record: Mapping[str, Any], *, where: str, cut: Cut | None = None) -> Sample:
        """`input_ids` and `token_type_ids` `[n]`, `labels` `[]`.

        Texts are cut at the right, the longer of a pair first, and keep their special tokens.

        Raises:
            ConfigError: it is to cut at the left.
        """
        if cut is not None and cut.side == "left":
            raise ConfigError("ClassificationEncoder cuts at the right only: its special tokens stand at the left")
        encoding = self.tokenizer(
            text_of(record, self.text_field, where),
            text_pair=None if self.text_pair_field is None else text_of(record, self.text_pair_field, where),
            max_length=None if cut is None else cut.max_length,
            truncation=cut is not None,
        )
        return {
            "input_ids": encoding.input_ids[0].numpy(),
            "token_type_ids": encoding.token_type_ids[0].numpy(),
            "labels": label_of(record, self.label_field, self.label_names, where),
        }


def text_of(record: Mapping[str, Any], name: str, where: str) -> str:
    """A field that holds text.

    Raises:
        RecordError: there is no such field, or it holds something else.
    """
    value = field_of(record, name, where)
    if not isinstance(value, str):
        raise RecordError(f"{where}: field {name!r} holds a {type(value).__name__}, not text")
    return value


def integers_of(record: Mapping[str, Any], name: str, where: str, *, kinds: str = "iu") -> Ids:
    """A field that holds a list of whole numbers, of these kinds of NumPy's, `[n]` int64.

    Raises:
        RecordError: there is no such field, or it holds something else.
    """
    value = field_of(record, name, where)
    try:
        array = np.asarray(value)
    except (ValueError, OverflowError) as error:
        raise RecordError(f"{where}: field {name!r} is no list of whole numbers: {error}") from error
    if array.ndim != 1 or (array.size and array.dtype.kind not in kinds):
        raise RecordError(
            f"{where}: field {name!r} is no list of whole numbers, but {array.dtype} of shape {array.shape}"
        )
    return array.astype(np.int64)


def label_of(record: Mapping[str, Any], name: str, label_names: Sequence[str], where: str) -> NDArray[np.int64]:
    """The number of a class, `[]` int64.

    Raises:
        RecordError: there is no such field, or no such class.
    """
    value = field_of(record, name, where)
    if isinstance(value, str):
        if value not in label_names:
            known = (
                f"the classes are {', '.join(map(repr, label_names))}" if label_names else "classes have no names here"
            )
            raise RecordError(f"{where}: {name} is {value!r}, and {known}.{nearest(value, label_names)}")
        return np.array(label_names.index(value), dtype=np.int64)
    if isinstance(value, bool | float) or not isinstance(value, int | np.integer):
        raise RecordError(f"{where}: {name} is {value!r}; a class is a name or a whole number")
    if value < 0 or (label_names and value >= len(label_names)):
        known = f"from 0 to {len(label_names) - 1}" if label_names else "from 0 on"
        raise RecordError(f"{where}: {name} is {value}, and classes are numbered {known}")
    return np.array(value, dtype=np.int64)


def scored_sample(ids: Ids, scored: Flags, cut: Cut | None, *, where: str) -> Sample:
    """A causal sample of which something is to be predicted.

    Raises:
        RecordError: nothing is.
    """
    sample = token_sample(ids, scored, cut)
    if sample["loss_mask"].any():
        return sample
    if cut is None or not scored.any():
        raise RecordError(f"{where}: no token of this record is to be predicted: it has no answer")
    raise RecordError(
        f"{where}: of {len(ids)} tokens {cut.max_length} are kept, and none of them is to be predicted: allow more, "
        "or cut at the other side"
    )
