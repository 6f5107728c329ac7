"""From sources to texts: candidates and their choice, gaps, and texts without a source."""

from dataclasses import replace

import numpy as np
import pytest
import sacrebleu
import torch

from model.errors import ConfigError
from model.packing import generation_batch
from model.sampling import SamplerSettings, sample
from tests.model.small import CANVAS, VOCABULARY, small_config, small_model
from trainer.generate import GappedText, generate, infill, no_source
from trainer.mbr import choose, utilities

CPU = torch.device("cpu")
SETTINGS = SamplerSettings(steps=4)


class Words:
    """Stands in for a vocabulary: a text is the numbers of its tokens up to its end."""

    bos_id, eos_id, pad_id = 1, 2, 3

    def decode(self, ids):
        return [" ".join(str(i) for i in row[:row.index(2) if 2 in row else None] if i not in (1, 3)) for row in ids]


def sources(*numbers):
    return [(n, np.array([1, *np.random.default_rng(n).integers(4, VOCABULARY, 6), 2])) for n in numbers]


def test_the_text_that_the_others_agree_with_is_chosen():
    texts = ["the cat sat on a mat", "a dog ran", "the cat sat on the mat", "the cat sat on the mat today", ""]
    expected = [np.mean([sacrebleu.sentence_bleu(text, [other]).score for j, other in enumerate(texts) if j != i])
                for i, text in enumerate(texts)]
    assert utilities(texts) == pytest.approx(expected)
    assert choose(texts) == int(np.argmax(expected)) == 2
    assert choose(["only"]) == 0 and choose(["", ""]) == 0


@pytest.mark.parametrize("conditioning", ["cached", "joint"])
def test_candidates_are_the_texts_of_their_own_noise(conditioning):
    """The first candidate is what is generated without others, whatever the batch; the chosen one is among them."""
    model = small_model(small_config(conditioning=conditioning))
    single = list(generate(model, Words(), sources(3, 8, 5), CANVAS, SETTINGS, device=CPU))
    several = list(generate(model, Words(), sources(3, 8, 5), CANVAS, SETTINGS, device=CPU, candidates=4,
                            documents_per_batch=2))
    assert [record["document"] for record in several] == [3, 8, 5]
    for one, many in zip(single, several, strict=True):
        assert many["candidates"][0] == one["text"] and "candidates" not in one
        assert len(set(many["candidates"])) > 1
        assert many["text"] == many["candidates"][choose(many["candidates"])]


@pytest.mark.parametrize("conditioning", ["cached", "joint"])
def test_a_texts_batch_changes_hardly_a_token(conditioning):
    model = small_model(small_config(conditioning=conditioning))
    asked = sources(*range(24))

    def tokens(documents_per_batch):
        found = []
        for start in range(0, len(asked), documents_per_batch):
            numbers, ids = zip(*asked[start:start + documents_per_batch], strict=True)
            batch = generation_batch(ids, canvas_tokens=CANVAS, pad_id=3, samples=numbers)
            found.append(sample(model, batch, replace(SETTINGS, steps=10)).tokens_CL)
        return torch.cat(found)

    alone = tokens(1)
    assert len(alone.unique()) > 20
    assert all((tokens(size) == alone).float().mean() >= 0.99 for size in (5, 24))


def test_gapped_texts_keep_what_is_given():
    model = small_model(small_config(conditioning="joint", infilling=0.5))
    a, b = np.array([4, 5, 6]), np.array([7, 8])
    (_, source), = sources(3)
    empty = np.empty(0, np.int64)
    texts = [GappedText(3, source, (a, 2, b)), GappedText(8, empty, (1, b, 3)), GappedText(5, source, (6,))]
    records = list(infill(model, Words(), texts, SETTINGS, device=CPU, texts_per_batch=2))
    assert [record["document"] for record in records] == [3, 8, 5]
    first, second, third = (record["text"].split() for record in records)
    assert first[:3] == ["4", "5", "6"] and first[5:] == ["7", "8"] and " ".join(first[3:5]) == records[0]["fills"][0]
    assert second[1:3] == ["7", "8"] and [second[0], " ".join(second[3:])] == records[1]["fills"]
    assert [" ".join(third)] == records[2]["fills"]
    with pytest.raises(ValueError, match="no gap"):
        list(infill(model, Words(), [GappedText(1, source, (a,))], SETTINGS, device=CPU))


def test_what_a_model_was_not_trained_for_is_refused():
    model = small_model(small_config())
    with pytest.raises(ConfigError) as error:
        list(infill(model, Words(), [GappedText(1, np.empty(0), (2,))], SETTINGS, device=CPU))
    assert error.value.key == "model.diffusion.infilling"
    with pytest.raises(ConfigError) as error:
        no_source(model.config, Words())
    assert error.value.key == "model.diffusion.source_dropout"


def test_unconditional_texts_are_those_of_an_empty_source():
    model = small_model(small_config(source_dropout=0.1))
    nothing = [(number, no_source(model.config, Words())) for number in range(3)]
    free = list(generate(model, Words(), nothing, CANVAS, SETTINGS, device=CPU))
    guided = replace(SETTINGS, guidance=0.0)  # all weight on the pass without source
    assert free == list(generate(model, Words(), sources(0, 1, 2), CANVAS, guided, device=CPU))
