"""A row of several documents, masked, is each of them alone: forward and gradient."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from test_gpt import MODERN, SMALL, by_path, model_config, random_parameters, random_tokens

from trainit.config import Config, ConfigError
from trainit.model.gpt import GPT
from trainit.model.layers import find_documents
from trainit.parallel.mesh import choose_attention

END = 7
VARIANTS = {
    "gpt2": {},
    "modern": MODERN | {"num_kv_heads": 2},
    "rope_unrolled_remat": {"positions": "rope", "scan_layers": False, "remat": "block"},
    "tied": {"tied_embeddings": True, "qk_norm": True},
}
ENDS = ((3, 4, 9, 15), (0,), ())  # where in each row of 16 an end-of-text id stands


def rows_of_documents() -> tuple[np.ndarray, list[tuple[int, int, int]]]:
    """Rows with ends of text, and (row, start, stop) of each piece."""
    tokens = np.array(random_tokens((len(ENDS), SMALL["context_length"]), 3))
    tokens[tokens == END] = END + 1
    pieces = []
    for row, ends in enumerate(ENDS):
        tokens[row, list(ends)] = END
        starts = [0, *(end + 1 for end in ends)]
        stops = [*(end + 1 for end in ends), tokens.shape[1]]
        pieces += [(row, a, b) for a, b in zip(starts, stops, strict=True) if a < b]
    return tokens, pieces


def test_documents_are_found():
    tokens = jnp.array([[5, END, 5, END, END, 6], [5, 5, 5, 5, 5, END]])
    documents = find_documents(tokens, END)
    assert documents.number_BL.tolist() == [[0, 0, 1, 1, 2, 3], [0] * 6]
    assert documents.position_BL.tolist() == [[0, 1, 0, 1, 0, 0], [0, 1, 2, 3, 4, 5]]


@pytest.mark.evidence(
    "the document mask: rows of several documents equal separate passes, forward and gradient"
)
@pytest.mark.parametrize("changes", VARIANTS.values(), ids=VARIANTS)
def test_masked_rows_equal_separate_passes(changes):
    masked = GPT(model_config(**changes, document_mask=True, end_of_text=END))
    alone = GPT(model_config(**changes))
    parameters = random_parameters(alone, 0)
    tokens, pieces = rows_of_documents()
    targets = np.array(random_tokens(tokens.shape, 4))

    def masked_loss(p):
        logits = masked(p, jnp.array(tokens))
        return optax.softmax_cross_entropy_with_integer_labels(logits, targets).sum(), logits

    def separate_loss(p):
        total, logits = 0.0, []
        for row, start, stop in pieces:
            logits.append(alone(p, jnp.array(tokens[None, row, start:stop])))
            at = targets[None, row, start:stop]
            total += optax.softmax_cross_entropy_with_integer_labels(logits[-1], at).sum()
        return total, logits

    (loss, logits), grads = jax.jit(jax.value_and_grad(masked_loss, has_aux=True))(parameters)
    (expected, parts), expected_grads = jax.jit(jax.value_and_grad(separate_loss, has_aux=True))(parameters)
    assert abs(loss / expected - 1) < 1e-6
    for (row, start, stop), part in zip(pieces, parts, strict=True):
        np.testing.assert_allclose(logits[row, start:stop], part[0], rtol=1e-4, atol=2e-5)
    for path, grad in by_path(grads).items():
        wanted = by_path(expected_grads)[path]
        np.testing.assert_allclose(
            grad, wanted, rtol=1e-4, atol=1e-6 + 1e-4 * np.abs(wanted).max(), err_msg=path
        )
    unmasked = alone(parameters, jnp.array(tokens))
    assert np.abs(unmasked[0, 4:] - logits[0, 4:]).max() > 1e-2  # it is the mask that does it
    np.testing.assert_allclose(unmasked[2], logits[2], rtol=1e-4, atol=2e-5)  # one document, one row


def test_the_mask_needs_an_id():
    with pytest.raises(ConfigError, match=r"0 to 99, not model\.end_of_text=-1"):
        model_config(document_mask=True)


@pytest.mark.parametrize(
    "rows, length, changes, expected",
    [
        (16, 1024, {}, "cudnn"),  # 32 MiB
        (8, 4096, {}, "cudnn"),  # 256 MiB
        (9, 4096, {}, "blockwise"),
        (0, 1024, {}, "blockwise"),  # an older GPU, which has no gradient with a mask
        (16, 1024, {"window": 8}, "blockwise"),
    ],
)
def test_cudnn_takes_masks_up_to_a_size(rows, length, changes, expected):
    c = model_config(
        document_mask=True, end_of_text=END, dim=64, num_heads=1, context_length=length, **changes
    )
    assert choose_attention(c, "cuda", "bfloat16", masked_rows=rows) == expected
    if expected == "blockwise":
        asked = Config({**c.to_dict(), "attention": "cudnn"})
        with pytest.raises(ConfigError, match=f"{rows * length**2 / 2**19:g} MiB"):
            choose_attention(asked, "cuda", "bfloat16", masked_rows=rows)
