"""Weights in prompts, chunks of long ones, and what they do to the text states."""

import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from jaxsd.conditioning import emphasise
from jaxsd.prompts import parse_weights
from jaxsd.tokenizer import PromptTruncated, Tokenizer


@pytest.mark.parametrize(
    "prompt, pieces",
    [
        ("", []),
        ("a red seven", [("a red seven", 1.0)]),
        ("a (red:1.3) seven", [("a ", 1.0), ("red", 1.3), (" seven", 1.0)]),
        ("(red:1.5)", [("red", 1.5)]),
        ("(a (b:2) c:1.5)", [("a ", 1.5), ("b", 3.0), (" c", 1.5)]),
        ("(a:.5)(b:0.5)", [("ab", 0.5)]),
        ("(a : 2 )", [("a ", 2.0)]),
        # Without a number, or without a partner, they are text, as to diffusers.
        ("a photo (2020)", [("a photo (2020)", 1.0)]),
        ("((red)) [blue]", [("((red)) [blue]", 1.0)]),
        ("a:1.3) b", [("a:1.3) b", 1.0)]),
        ("(a b", [("(a b", 1.0)]),
        ("(a) (b:2", [("(a) (b:2", 1.0)]),
        ("(open (b:2)", [("(open ", 1.0), ("b", 2.0)]),
        ("(in (2020) it:2)", [("in (2020) it", 2.0)]),
        ("at 12:30) or (1:2)", [("at 12:30) or ", 1.0), ("1", 2.0)]),
        (r"\(a:1.3\) (b\):2)", [("(a:1.3) ", 1.0), ("b)", 2.0)]),
        (r"back\slash", [(r"back\slash", 1.0)]),
    ],
)
def test_weights(prompt, pieces):
    found = parse_weights(prompt)
    assert [text for text, _ in found] == [text for text, _ in pieces]
    np.testing.assert_allclose([w for _, w in found], [w for _, w in pieces])


@pytest.fixture(scope="module")
def words(tmp_path_factory) -> Tokenizer:
    return tiny.tokenizer(tmp_path_factory.mktemp("words") / "tokenizer")


def test_ids_without_weights_are_the_tokenizers(words):
    prompts = ["a red seven", "", "nine (2)"]
    ids, weights = words.weighted(prompts, 16)
    np.testing.assert_array_equal(ids[:, 0], words(prompts, 16))
    assert ids.shape == (3, 1, 16) and (weights == 1).all()


def test_weights_stand_where_their_tokens_stand(words):
    (ids,), (weights,) = words.weighted(["a (red:1.3) seven"], 16)
    np.testing.assert_array_equal(ids, words(["a red seven"], 16))
    np.testing.assert_allclose(weights[0, :6], [1, 1, 1.3, 1, 1, 1])


def test_chunks(words):
    prompt = "a red seven, " * 3 + "(nine:2)"
    inner = words.ids("a red seven, a red seven, a red seven, nine")
    count = words.chunks([prompt, "nine"], 8)
    assert count == -(-len(inner) // 6) > 1
    (ids, short), (weights, _) = words.weighted([prompt, "nine"], 8, count)
    start, end = int(ids[0, 0]), words.eos_token_id
    assert (ids[:, 0] == start).all()
    read = [i for row in ids for i in row if i not in (start, end)]
    assert read == inner  # every token once, in order
    assert weights[ids == inner[-1]].tolist()[-1] == 2 and weights.sum() > weights.size
    np.testing.assert_array_equal(short[1], words([""], 8)[0])  # the shorter prompt is filled up
    with pytest.warns(PromptTruncated, match="nine"):
        cut, _ = words.weighted([prompt], 8, count - 1)
    np.testing.assert_array_equal(cut[0], ids[:-1])


def test_emphasis():
    rng = np.random.default_rng(0)
    states = jnp.asarray(rng.normal(0.3, 1, (2, 5, 7)), jnp.float32)
    weights = jnp.asarray([[1, 1.5, 1, 0.5, 1], [1] * 5], jnp.float32)
    out = emphasise(states, weights)
    scaled = states[0] * weights[0][:, None]
    np.testing.assert_allclose(out[0], scaled * states[0].mean() / scaled.mean(), rtol=1e-4)
    np.testing.assert_array_equal(out[1], states[1])
    assert np.isfinite(emphasise(jnp.zeros((1, 2, 3)), jnp.ones((1, 2)))).all()
