"""Tokenizers from the vocabulary files that came before `tokenizer.json`: `vocab.txt`, `vocab.json`, `merges.txt`."""

from pathlib import Path

import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors

from swissarmy.core.errors import TokenizerError
from swissarmy.interop.byte_level import GPT2, QWEN2, byte_level_bpe, split_merges
from swissarmy.interop.json_object import read_json_object
from swissarmy.interop.tokenizer_files import TokenizerFolder


def word_piece_from_file(path: Path, folder: TokenizerFolder) -> tokenizers.Tokenizer:
    """BERT's WordPiece, one token a line, with `do_lower_case`, `strip_accents` and `tokenize_chinese_chars`.

    Raises:
        TokenizerError: the file is not UTF-8, or lacks the unknown, begin or separator token.
    """
    lines = _read_text(path).removesuffix("\n").split("\n")
    vocab = {line.removesuffix("\r"): number for number, line in enumerate(lines)}
    special = {role: token.content for role, token in folder.special_tokens().items()}
    for role in ("unk_token", "cls_token", "sep_token"):
        if special[role] not in vocab:
            raise TokenizerError(f"{path}: the {role} {special[role]!r} is not in it; is this a BERT vocabulary?")
    backend = tokenizers.Tokenizer(models.WordPiece(vocab=vocab, unk_token=special["unk_token"]))
    strip_accents = None if folder.config.get("strip_accents") is None else folder.flag("strip_accents", False)
    backend.normalizer = normalizers.BertNormalizer(
        clean_text=True,
        handle_chinese_chars=folder.flag("tokenize_chinese_chars", True),
        strip_accents=strip_accents,
        lowercase=folder.flag("do_lower_case", True),
    )
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    backend.decoder = decoders.WordPiece(prefix="##")
    begin, end = special["cls_token"], special["sep_token"]
    backend.post_processor = processors.TemplateProcessing(
        single=[f"{begin}:0", "$A:0", f"{end}:0"],
        pair=[f"{begin}:0", "$A:0", f"{end}:0", "$B:1", f"{end}:1"],
        special_tokens=[(begin, vocab[begin]), (end, vocab[end])],
    )
    return backend


def byte_level_from_files(vocab_path: Path, merges_path: Path, folder: TokenizerFolder) -> tokenizers.Tokenizer:
    """Byte-level BPE as in GPT-2; as in RoBERTa or Qwen 2 where the folder says so.

    Raises:
        TokenizerError: a file is not what it should be, or the vocabulary is of another kind (CLIP, OpenAI GPT).
    """
    vocab = read_json_object(vocab_path, TokenizerError)
    for token, number in vocab.items():
        if type(number) is not int or number < 0:
            raise TokenizerError(f"{vocab_path}: the id of {token!r} is {number!r}, not a whole number")
        if token.endswith("</w>"):
            raise TokenizerError(
                f"{vocab_path}: it marks the end of words ({token!r}), so it is no byte-level BPE; "
                "save it with transformers, which writes a tokenizer.json"
            )
    lines = [line.removesuffix("\r") for line in _read_text(merges_path).split("\n")]
    if lines[0].startswith("#version"):
        del lines[0]
    prefix = folder.flag("add_prefix_space", False)
    splitting = QWEN2 if any(name.startswith("qwen2") for name in folder.names()) else GPT2
    merges = split_merges((line for line in lines if line), str(merges_path))
    backend = byte_level_bpe(vocab, merges, splitting, add_prefix_space=prefix, source=str(merges_path))
    if folder.family == "roberta":
        _surround(backend, folder, vocab, vocab_path)
    return backend


def _surround(backend: tokenizers.Tokenizer, folder: TokenizerFolder, vocab: dict[str, int], path: Path) -> None:
    """RoBERTa's `<s> A </s>`, and `<s> A </s></s> B </s>` for a pair."""
    special = folder.special_tokens()
    begin, end = special["cls_token"].content, special["sep_token"].content
    for token in (begin, end):
        if token not in vocab:
            raise TokenizerError(f"{path}: {token!r}, which goes around each text, is not in it")
    prefix = folder.flag("add_prefix_space", False)
    backend.post_processor = processors.RobertaProcessing(
        (end, vocab[end]), (begin, vocab[begin]), trim_offsets=True, add_prefix_space=prefix
    )


def _read_text(path: Path) -> str:
    """A UTF-8 file, its line ends as they are: some tokens are characters that Python counts as line ends."""
    try:
        return path.read_bytes().decode("utf-8")
    except UnicodeDecodeError as error:
        raise TokenizerError(f"{path}: not UTF-8, at byte {error.start}") from error
