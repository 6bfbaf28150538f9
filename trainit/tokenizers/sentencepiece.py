"""Vocabularies of the library sentencepiece."""

import io
from collections.abc import Iterable
from typing import Any

import numpy as np

from trainit.tokenizers.base import SPACE, SURROGATES, Vocabulary, piece_bytes


class SentencePieceTokenizer(Vocabulary):
    """A sentencepiece model (Kudo & Richardson 2018, arXiv 1808.06226).

    Its character for a space, U+2581, is encoded as bytes where it stands in a text.
    """

    name = "sentencepiece"

    def __init__(self, model: bytes, end_of_text: int | str | None = None):
        import sentencepiece

        self._content = model
        try:
            self._processor = p = sentencepiece.SentencePieceProcessor(model_proto=model)
        except RuntimeError as error:
            raise ValueError(f"not a sentencepiece model: {error}") from None
        pieces = {p.id_to_piece(i): i for i in range(p.vocab_size())}
        end_of_text = p.eos_id() if end_of_text is None else end_of_text
        self.end_of_text = pieces.get(end_of_text, -1) if isinstance(end_of_text, str) else end_of_text
        if self.end_of_text < 0:
            why = "end-of-sentence id" if end_of_text == -1 else f"token {end_of_text!r}"
            raise ValueError(f"the sentencepiece model has no {why}, which ends each document")
        self.end_name = p.id_to_piece(self.end_of_text)
        self.table = [piece_bytes(piece, p.is_byte(i)) for piece, i in pieces.items()]
        single = {self.table[i][0]: i for i in range(p.vocab_size()) if p.is_byte(i)}
        self.byte_ids = np.array([single.get(byte, -1) for byte in range(256)], np.int32)
        self.is_unigram = any(p.get_score(i) % 1 for i in range(p.vocab_size()))  # those of BPE are ranks
        self.prefixed = p.id_to_piece(p.encode("a")[0]).startswith(SPACE)
        if (self.byte_ids >= 0).all() and not self.prefixed:
            self.by_bytes = SURROGATES + SPACE
        # The library keeps control tokens apart from text, but the end of a text may be of another kind.
        ends = [] if p.is_control(self.end_of_text) else [self.end_of_text]
        self.names = {i: self.table[i] for i in ends}
        for i in range(p.vocab_size()):
            if p.is_control(i) or p.is_unknown(i) or i == self.end_of_text:
                self.table[i] = b""

    @classmethod
    def train(cls, texts: Iterable[str], vocab_size: int, sample: int = 0) -> "SentencePieceTokenizer":
        """Byte-pair encoding in which every text is representable and decodes to itself.

        Bytes are the fallback, nothing is normalized, and the newline is a token of its own. `vocab_size`
        includes special ids and 256 bytes. At most `sample` lines are drawn from the texts; 0: all.
        Raises ValueError with what sentencepiece says, as when vocab_size does not fit the texts.
        """
        import sentencepiece

        model = io.BytesIO()
        sampled: Any = {"input_sentence_size": sample, "shuffle_input_sentence": True} if sample else {}
        lines = (line for text in texts for line in text.splitlines(keepends=True))
        try:
            sentencepiece.SentencePieceTrainer.train(
                sentence_iterator=(line.encode("utf8", "replace") for line in lines),
                model_writer=model,
                model_type="bpe",
                vocab_size=vocab_size,
                byte_fallback=True,
                required_chars=SPACE,  # else a text without spaces makes a model that loses them
                normalization_rule_name="identity",
                add_dummy_prefix=False,
                remove_extra_whitespaces=False,
                user_defined_symbols=["\n"],
                eos_id=0,
                eos_piece="<|endoftext|>",
                unk_id=1,
                bos_id=-1,
                pad_id=-1,
                max_sentence_length=1 << 20,
                num_threads=1,
                minloglevel=2,
                **sampled,
            )
        except RuntimeError as error:
            raise ValueError(f"sentencepiece cannot train with vocab_size={vocab_size}: {error}") from None
        return cls(model.getvalue())

    def _encode_pieces(self, texts: list[str]) -> list[np.ndarray]:
        return [np.array(ids, np.int32) for ids in self._processor.encode(texts, num_threads=1)]
