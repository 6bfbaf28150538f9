"""Of which subset each target of a split is, and how many UTF-8 bytes of text it stands for."""

from dataclasses import dataclass, field

import numpy as np

from trainit.data.dataset import Split, pieces
from trainit.tokenizers.chat.marks import ids_of

AT_ONCE = 1 << 22  # ids of a long document that are counted together


@dataclass(frozen=True)
class Targets:
    """Describes the targets of a split whose documents are known. The index of all of them stays in memory.

    The bytes of the text that a document was made of are shared out over its tokens: in proportion to the
    bytes that their ids stand for, of which an end of text has none, or equally if no id stands for any. So
    they sum up to the bytes of the text, whatever the tokenizer adds to it or loses of it.
    """

    split: Split
    token_bytes: np.ndarray  # (vocabulary,) that each id stands for
    _index: dict = field(default_factory=dict)  # by shard: what `documents` returns
    _shares: dict = field(default_factory=dict)  # by shard and document: what `share` returns

    def share(self, shard: int, document: int) -> tuple[float, float]:
        """Returns a and b: a token of this document has a * (bytes of its id) + b bytes of the text."""
        if (shard, document) not in self._shares:
            starts, sizes, _ = self._documents(shard)
            begin, *following = starts[document : document + 2].tolist()
            ids = ids_of(self.split.shards[shard][begin : following[0] if following else None])
            parts = (self.token_bytes[ids[i : i + AT_ONCE]] for i in range(0, len(ids), AT_ONCE))
            size, of_ids = int(sizes[document]), sum(int(part.sum()) for part in parts)
            self._shares[shard, document] = (size / of_ids, 0.0) if of_ids else (0.0, size / len(ids))
        return self._shares[shard, document]

    def _documents(self, shard: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        if shard not in self._index:
            self._index[shard] = self.split.documents(shard)
        return self._index[shard]

    def read(self, sequences: np.ndarray, length: int) -> tuple[np.ndarray, np.ndarray]:
        """Returns subset, uint16 (n, length), and bytes, float32, of each target of `split.read`; else 0."""
        subsets, sizes = (np.zeros((len(sequences), length), dtype) for dtype in (np.uint16, np.float32))
        for row, sequence in enumerate(np.asarray(sequences).tolist()):
            begin, stop = sequence * length + 1, min((sequence + 1) * length + 1, self.split.tokens)
            filled = 0
            for shard, first, last in pieces(self.split.ends, begin, stop) if sequence >= 0 else ():
                starts, _, of = self._documents(shard)
                document = np.searchsorted(starts, np.arange(first, last), side="right") - 1
                shares = [self.share(shard, number) for number in range(document[0], document[-1] + 1)]
                a, b = np.array(shares)[document - document[0]].T
                own = row, slice(filled, filled + last - first)
                subsets[own] = of[document]
                sizes[own] = a * self.token_bytes[ids_of(self.split.shards[shard][first:last])] + b
                filled += last - first
        return subsets, sizes
