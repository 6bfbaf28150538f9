"""A dataset's tokenizer as the tokenizer.json that `transformers` loads.

It is compared with the tokenizer itself before it is written: the same ids for texts that are easily changed.
"""

import base64
import itertools
import json

from trainit.config import ConfigError
from trainit.tokenizers.base import SPACE, Tokenizer
from trainit.tokenizers.bpe import byte_characters

# Not among them: the name of the end of text and U+2581, which are text here and something else there.
PROBES = (
    *(
        "",
        " ",
        "\n",
        "a",
        " a",
        "  a  b   c",
        "tab\tand\r\nline\n\nends \n",
        "def f(x):\n    return x  # 1_000\n",
    ),
    *("don't, can't; it's 1234567890.5!", "Ελληνικά, русский, 汉字, 한국어, हिन्दी, עברית", "e\u0301 ﬁ Å ½ ①"),
    *("\x00\x7f\x85\xa0\u200d\u2028\ufeff", "😀 \N{REGIONAL INDICATOR SYMBOL LETTER D}"),
)


def tokenizer_json(tokenizer: Tokenizer) -> str:
    """The content of tokenizer.json. ConfigError if it would give other ids for a probe."""
    try:
        from tokenizers import Tokenizer as Library
    except ImportError:
        raise ConfigError("the package tokenizers is missing: pip install 'trainit[hf]'") from None
    content = json.dumps(_MAKERS[tokenizer.name](tokenizer), ensure_ascii=False)
    try:
        made = Library.from_str(content)
    except Exception as error:  # it raises no narrower one
        raise ConfigError(f"the tokenizer {tokenizer.name} cannot be exported: {error}") from None
    for text in PROBES:
        expected = tokenizer.encode([text])[0].tolist() if text else []
        if (actual := made.encode(text, add_special_tokens=False).ids) != expected:
            raise ConfigError(
                f"the tokenizer {tokenizer.name} cannot be exported: {text!r} is {expected} here and would "
                f"be {actual} by the library tokenizers; export without it by --tokenizer=none"
            )
    return content


def config_json(tokenizer: Tokenizer, context_length: int) -> dict:
    """The content of tokenizer_config.json."""
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": _end(tokenizer),
        "model_max_length": context_length,
        "clean_up_tokenization_spaces": False,
    }


def _end(tokenizer: Tokenizer) -> str:
    return "<|endoftext|>" if tokenizer.name == "bytes" else tokenizer.end_name


def _added(number: int, content: str, special: bool) -> dict:
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    return {"id": number, "content": content, **flags, "special": special}


def _byte_level(use_regex: bool) -> dict:
    return {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": use_regex}


def _file(tokenizer: Tokenizer, model: dict, **parts: dict | None) -> dict:
    empty = dict.fromkeys(
        ("truncation", "padding", "normalizer", "pre_tokenizer", "post_processor", "decoder")
    )
    end = _added(tokenizer.end_of_text, _end(tokenizer), special=True)
    return {"version": "1.0", **empty, "added_tokens": [end], "model": model, **parts}


def _bytes(tokenizer: Tokenizer) -> dict:
    """Each byte is a token, written as GPT-2 writes bytes."""
    vocabulary = {character: byte for byte, character in enumerate(byte_characters())}
    level = _byte_level(use_regex=False)
    return _file(tokenizer, _bpe(vocabulary, []), pre_tokenizer=level, decoder=level)


def _gpt2(tokenizer: Tokenizer) -> dict:
    """The merge that makes a token is the last one that a byte-pair encoder does on the token itself."""
    lines = (line.split() for line in tokenizer.serialize().splitlines())
    ranks = {base64.b64decode(token): int(rank) for token, rank in lines}
    characters = byte_characters()
    written = {token: "".join(characters[byte] for byte in token) for token in ranks}
    merges = []
    for token, rank in sorted(ranks.items(), key=lambda item: item[1]):
        parts = [bytes([byte]) for byte in token]
        while len(parts) > 2:
            pairs = [ranks.get(a + b, rank) for a, b in itertools.pairwise(parts)]
            at = min(range(len(pairs)), key=pairs.__getitem__)
            parts[at : at + 2] = [parts[at] + parts[at + 1]]
        if len(parts) == 2:
            merges.append([written[part] for part in parts])
    level = _byte_level(use_regex=True)
    model = _bpe({written[token]: rank for token, rank in ranks.items()}, merges)
    return _file(tokenizer, model, pre_tokenizer=level, decoder=level)


def _bpe(vocabulary: dict[str, int], merges: list, **more: object) -> dict:
    options = {
        "dropout": None,
        "unk_token": None,
        "continuing_subword_prefix": None,
        "end_of_word_suffix": None,
    }
    return {"type": "BPE", **options, "fuse_unk": False, "vocab": vocabulary, "merges": merges, **more}


def _sentencepiece(tokenizer: Tokenizer) -> dict:
    """Pieces with their scores. What a user has defined is found in a text before all else."""
    from sentencepiece import SentencePieceProcessor
    from sentencepiece.sentencepiece_model_pb2 import ModelProto  # type: ignore[attr-defined]

    content = tokenizer.serialize()
    p, proto = SentencePieceProcessor(model_proto=content), ModelProto.FromString(content)
    spec, kinds = proto.normalizer_spec, type(proto.pieces[0])
    if spec.precompiled_charsmap or spec.remove_extra_whitespaces:
        raise ConfigError(
            "the sentencepiece model normalizes texts, which no file of the library tokenizers does alike; "
            "export without it by --tokenizer=none"
        )
    scores = {p.id_to_piece(i): p.get_score(i) for i in range(p.vocab_size())}
    defined = [
        _added(i, piece.piece.replace(SPACE, " "), special=False)
        for i, piece in enumerate(proto.pieces)
        if piece.type == kinds.USER_DEFINED and i != tokenizer.end_of_text
    ]
    unknown = p.id_to_piece(p.unk_id())
    if proto.trainer_spec.model_type == proto.trainer_spec.UNIGRAM:
        model = {
            "type": "Unigram",
            "unk_id": p.unk_id(),
            "byte_fallback": True,
            "vocab": [*map(list, scores.items())],
        }
    else:
        numbers = {piece: i for i, piece in enumerate(scores)}
        normal = {p.id_to_piece(i) for i, piece in enumerate(proto.pieces) if piece.type == kinds.NORMAL}
        pairs = [
            (scores[piece], piece[:cut], piece[cut:])
            for piece in normal
            for cut in range(1, len(piece))
            if piece[:cut] in numbers and piece[cut:] in numbers
        ]
        pairs.sort(key=lambda pair: (-pair[0], numbers[pair[1]], numbers[pair[2]]))
        merges = [[left, right] for _, left, right in pairs]
        model = _bpe(numbers, merges, unk_token=unknown, fuse_unk=True, byte_fallback=True)
    replace = {"type": "Replace", "pattern": {"String": " "}, "content": SPACE}
    prefix = [{"type": "Prepend", "prepend": SPACE}] * spec.add_dummy_prefix
    back = {"type": "Replace", "pattern": {"String": SPACE}, "content": " "}
    strip = [{"type": "Strip", "content": " ", "start": 1, "stop": 0}] * spec.add_dummy_prefix
    decoders = [back, {"type": "ByteFallback"}, {"type": "Fuse"}, *strip]
    parts = {
        "normalizer": {"type": "Sequence", "normalizers": [*prefix, replace]},
        "decoder": {"type": "Sequence", "decoders": decoders},
    }
    file = _file(tokenizer, model, **parts)
    return file | {"added_tokens": file["added_tokens"] + defined}


def _own_file(tokenizer: Tokenizer) -> dict:
    """The file as it was given; its end of text is special there, too."""
    about = json.loads(tokenizer.serialize())
    for token in about.get("added_tokens") or []:
        token["special"] |= token["content"] == tokenizer.end_name
    return about | {"truncation": None, "padding": None}


_MAKERS = {"bytes": _bytes, "gpt2": _gpt2, "sentencepiece": _sentencepiece, "tokenizers": _own_file}
