"""Reading tokenizers: Hugging Face folders (new and old), GGUF files, and names on the hub."""

from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import AddedToken

from swissarmy.core.errors import CheckpointError, TokenizerError
from swissarmy.data.tokenizer import SPECIAL_TOKENS, Tokenizer
from swissarmy.interop.gguf_tokenizer import load_gguf_tokenizer
from swissarmy.interop.hub import describe_folder, resolve
from swissarmy.interop.tokenizer_files import TokenizerFolder
from swissarmy.interop.vocab_files import byte_level_from_files, word_piece_from_file

TOKENIZER_PATTERNS = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "config.json",
    "generation_config.json",
    "vocab.txt",
    "vocab.json",
    "merges.txt",
)
"""The files of a repository that a tokenizer is read from."""

_SENTENCEPIECE = ("tokenizer.model", "spiece.model", "sentencepiece.bpe.model", "spm.model")


def load_tokenizer(path_or_hub_name: str | Path) -> Tokenizer:
    """Load a tokenizer; nothing in the folder is executed.

    A folder is read from `tokenizer.json`, else `vocab.txt` (BERT's WordPiece), else `vocab.json` and `merges.txt`
    (byte-level BPE: GPT-2, RoBERTa, Qwen 2), else its one GGUF file. Special tokens come from
    `tokenizer_config.json` and `special_tokens_map.json`, else the family's own, else the ids in `config.json`;
    one that is not in the vocabulary is left out. `chat_template.jinja` wins over the field `chat_template`.

    Args:
        path_or_hub_name: a folder, a `tokenizer.json`, a `.gguf` file, or a name on the Hugging Face hub.

    Raises:
        TokenizerError: it cannot be found, fetched or read; the message says what is there instead.
        MissingExtraError: it is a GGUF file, and the package `gguf` is not installed.
    """
    try:
        path = resolve(path_or_hub_name, TOKENIZER_PATTERNS)
        if path.is_dir():
            return _from_folder(path)
        if path.suffix == ".gguf":
            return load_gguf_tokenizer(path)
    except CheckpointError as error:
        raise TokenizerError(str(error)) from error
    if path.suffix != ".json":
        raise TokenizerError(f"{path}: a tokenizer is a folder, a tokenizer.json or a .gguf file")
    # what lies beside a file of another name need not belong to it
    beside = path.parent if path.name == "tokenizer.json" else None
    return _finish(_from_json(path), TokenizerFolder(beside))


def _from_folder(root: Path) -> Tokenizer:
    if (root / "tokenizer.json").is_file():
        return _finish(_from_json(root / "tokenizer.json"), TokenizerFolder(root))
    if (root / "vocab.txt").is_file():
        folder = TokenizerFolder(root, family="bert")
        return _finish(word_piece_from_file(root / "vocab.txt", folder), folder)
    if (root / "vocab.json").is_file() and (root / "merges.txt").is_file():
        folder = TokenizerFolder(root, family="roberta" if TokenizerFolder(root).is_roberta() else "gpt2")
        return _finish(byte_level_from_files(root / "vocab.json", root / "merges.txt", folder), folder)
    models = sorted(root.glob("*.gguf"))
    if len(models) == 1:
        return load_gguf_tokenizer(models[0])
    raise _unreadable(root)


def _unreadable(root: Path) -> TokenizerError:
    for name in _SENTENCEPIECE:
        if (root / name).is_file():
            return TokenizerError(
                f"{root / name}: sentencepiece models are not read; convert it once, where transformers is installed: "
                f"AutoTokenizer.from_pretrained({str(root)!r}).save_pretrained(...) writes a tokenizer.json"
            )
    return TokenizerError(
        "there is no tokenizer (tokenizer.json, vocab.txt, vocab.json with merges.txt, or one .gguf file): "
        f"{describe_folder(root)}"
    )


def _from_json(path: Path) -> tokenizers.Tokenizer:
    try:
        return tokenizers.Tokenizer.from_file(str(path))
    except Exception as error:  # the Rust library raises nothing more specific
        raise TokenizerError(f"{path}: not a tokenizer that the library `tokenizers` reads: {error}") from error


def _finish(backend: tokenizers.Tokenizer, folder: TokenizerFolder) -> Tokenizer:
    """Add what the files beside the vocabulary say."""
    _add_tokens(backend, folder)
    special = {role: token for role, token in folder.special_tokens().items() if _has(backend, token.content)}
    missing = [token for token in special.values() if token.content not in _special_contents(backend)]
    backend.add_special_tokens(list(missing))
    ends = folder.end_ids()
    contents = {role: token.content for role, token in special.items()}
    for role, number in folder.special_ids(ends).items():
        token = backend.id_to_token(number)
        if token is not None:
            contents.setdefault(role, token)
    return Tokenizer(
        backend,
        special_tokens={role: contents[role] for role in SPECIAL_TOKENS if role in contents},
        eos_token_ids=ends,
        chat_template=folder.chat_template(),
        model_max_length=folder.model_max_length(),
    )


def _has(backend: tokenizers.Tokenizer, token: str) -> bool:
    return backend.token_to_id(token) is not None


def _special_contents(backend: tokenizers.Tokenizer) -> set[str]:
    return {token.content for token in backend.get_added_tokens_decoder().values() if token.special}


def _add_tokens(backend: tokenizers.Tokenizer, folder: TokenizerFolder) -> None:
    """Tokens beyond the vocabulary, in the order of their ids, which must come out as the files say."""
    present = {token.content for token in backend.get_added_tokens_decoder().values()}
    stated: dict[int, AddedToken] = folder.added_tokens()
    for number, token in sorted(stated.items()):
        if token.content in present:
            continue
        if token.special:
            backend.add_special_tokens([token])
        else:
            backend.add_tokens([token])
        given: Any = backend.token_to_id(token.content)
        if given != number:
            raise TokenizerError(
                f"{folder.root}: the added token {token.content!r} has id {number} there, and here {given}; "
                "the vocabulary file belongs to another tokenizer, or tokens in between are missing"
            )
