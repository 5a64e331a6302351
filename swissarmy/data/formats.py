"""From a config to the encoder of its records and the collator of their samples."""

from collections.abc import Mapping
from typing import Any

from torch.utils.data import default_collate

from swissarmy.core.errors import ConfigError, nearest
from swissarmy.data.config import DataConfig, RecordFormat
from swissarmy.data.loading.batches import Collate
from swissarmy.data.loading.collate import (
    CausalCollator,
    ClassificationCollator,
    ImageCollator,
    PackedCollator,
    Padding,
    Seq2SeqCollator,
)
from swissarmy.data.samples.chat_encoder import ChatEncoder
from swissarmy.data.samples.encoders import (
    ClassificationEncoder,
    CompletionEncoder,
    Seq2SeqEncoder,
    TextEncoder,
    TokensEncoder,
)
from swissarmy.data.samples.examples import Encoder
from swissarmy.data.samples.image_encoder import ImageEncoder
from swissarmy.data.source import RecordError
from swissarmy.data.tokenizer import Tokenizer


def format_of(record: Mapping[str, Any], where: str, config: DataConfig) -> RecordFormat:
    """What a record is, by its fields, where the config leaves it open.

    Raises:
        RecordError: It has the fields of no format.
    """
    if config.record_format != "auto":
        return config.record_format
    wanted: dict[RecordFormat, tuple[str, ...]] = {
        "tokens": (config.tokens_field,),
        "chat": (config.messages_field,),
        "completion": (config.prompt_field, config.completion_field),
        "seq2seq": (config.source_field, config.target_field),
        "classification": (config.text_field, config.label_field),
        "images": (config.image_field,),
        "text": (config.text_field,),
    }
    for record_format, fields in wanted.items():
        if all(field in record for field in fields):
            return record_format
    names = dict.fromkeys(name for fields in wanted.values() for name in fields)
    hints = "".join(hint for field in record if (hint := nearest(str(field), names)))
    has = ", ".join(map(repr, record)) or "none"
    known = "; ".join(f"{name}: {', '.join(fields)}" for name, fields in wanted.items())
    raise RecordError(
        f"{where}: the fields {has} are those of no format.{hints} Formats and their fields are {known}. Give the "
        "record_format, or say what its fields are called"
    )


def encoder_for(record_format: RecordFormat, config: DataConfig, tokenizer: Tokenizer | None) -> Encoder | None:
    """What makes samples of records; `None` where they are samples.

    Raises:
        ConfigError: It needs a tokenizer and there is none, or the tokenizer lacks what it needs.
    """
    if record_format == "samples":
        return None
    if record_format == "tokens":
        return TokensEncoder(tokens_field=config.tokens_field)
    if record_format == "images":
        channels, height, width = config.image_shape
        half = (0.5,) * channels
        return ImageEncoder(
            size=(height, width),
            mean=config.image_mean or half,
            std=config.image_std or half,
            crop=config.image_crop,
            image_field=config.image_field,
            label_field=config.label_field,
            label_names=config.label_names,
        )
    if tokenizer is None:
        raise ConfigError(f"records of the format {record_format!r} need a tokenizer.")
    return _text_encoder(record_format, config, tokenizer)


def _text_encoder(record_format: RecordFormat, config: DataConfig, tokenizer: Tokenizer) -> Encoder:
    append_eos = tokenizer.eos_token_id is not None if config.append_eos is None else config.append_eos
    match record_format:
        case "completion":
            return CompletionEncoder(
                tokenizer=tokenizer,
                prompt_field=config.prompt_field,
                completion_field=config.completion_field,
                append_eos=append_eos,
                train_on_prompt=config.train_on_prompt,
            )
        case "chat":
            return ChatEncoder(tokenizer=tokenizer, messages_field=config.messages_field, train_on=config.train_on)
        case "seq2seq":
            return Seq2SeqEncoder(
                tokenizer=tokenizer,
                source_field=config.source_field,
                target_field=config.target_field,
                source_prefix=config.source_prefix,
            )
        case "classification":
            return ClassificationEncoder(
                tokenizer=tokenizer,
                text_field=config.text_field,
                text_pair_field=config.text_pair_field,
                label_field=config.label_field,
                label_names=config.label_names,
            )
        case _:
            return TextEncoder(tokenizer=tokenizer, text_field=config.text_field, append_eos=append_eos)


def collator_for(record_format: RecordFormat, config: DataConfig, tokenizer: Tokenizer | None) -> Collate:
    """What makes batches of samples.

    Raises:
        ConfigError: The tokenizer lacks what is needed.
    """
    if record_format == "samples":
        return default_collate
    if record_format == "images":
        return ImageCollator()
    if config.packing:
        assert config.sequence_length is not None, "the config refuses packing without it"
        return PackedCollator(length=config.sequence_length, pad_id=_pad_id(tokenizer))
    padding = padding_for(config, tokenizer)
    match record_format:
        case "seq2seq":
            return Seq2SeqCollator(padding=padding)
        case "classification":
            return ClassificationCollator(padding=padding)
        case _:
            return CausalCollator(padding=padding)


def padding_for(config: DataConfig, tokenizer: Tokenizer | None) -> Padding:
    """How rows of tokens become a rectangle."""
    pad_id = _pad_id(tokenizer)
    return Padding(pad_id=pad_id, side=config.padding_side, pad_to_multiple=config.pad_to_multiple)


def _pad_id(tokenizer: Tokenizer | None) -> int:
    """Padding is masked, so that any token will do where there is none for it."""
    candidates = () if tokenizer is None else (tokenizer.pad_token_id, tokenizer.eos_token_id)
    return next((token for token in candidates if token is not None), 0)
