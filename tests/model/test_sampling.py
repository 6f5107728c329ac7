"""Sampling beside its formulas: DDIM, grids, guidance, candidates, canvases of any length, gaps."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from model.diffusion.schedule import alpha_sigma
from model.errors import ConfigError
from model.packing import Segment, candidates_batch
from model.sampling import COMPAT, GRIDS, SOLVERS, SamplerSettings, _drawn, _probability, _Solver, noise_levels, sample
from tests.model.small import CANVAS, VOCABULARY, small_config, small_model
from tests.model.test_bert_denoiser import bert_config

F64 = torch.float64
EOS, PAD = 2, 3


def source_of(number: int, tokens: int = 9) -> np.ndarray:
    return np.concatenate([[1], np.random.default_rng(number).integers(4, VOCABULARY, tokens), [EOS]])


def canvas(number: int, length: int = CANVAS, tokens: int = 9) -> Segment:
    return Segment(source_of(number, tokens), np.full(length, PAD), 0, number)


def test_ddim_is_its_papers_update_between_the_levels_that_are_visited():
    """Song et al. 2020, equation 12 with sigma = 0, on a denoiser that is not linear in z."""
    levels = torch.linspace(-6, 4, 7, dtype=F64)
    z = expected = torch.randn(50, 4, dtype=F64, generator=torch.Generator().manual_seed(0))
    solver = _Solver("ddim", levels)
    alpha, sigma = alpha_sigma(levels)
    for index in range(6):
        z = solver.step(index, z, torch.tanh(3 * z), z)
        noise = (expected - alpha[index] * torch.tanh(3 * expected)) / sigma[index]
        expected = alpha[index + 1] * torch.tanh(3 * expected) + sigma[index + 1] * noise
    torch.testing.assert_close(z, expected)


def test_ancestral_is_the_posterior_of_the_levels_that_are_visited():
    """Ho et al. 2020, equations 6 and 7, with alpha-bar of the levels in place of neighbouring steps."""
    levels = torch.tensor([-3.0, 1.0], dtype=F64)
    z, clean, noise = torch.randn(3, 50, 4, dtype=F64, generator=torch.Generator().manual_seed(0))
    found = _Solver("ancestral", levels).step(0, z, clean, noise)
    (bar_t, bar_s), beta = levels.sigmoid(), 1 - levels.sigmoid()[0] / levels.sigmoid()[1]
    mean = (bar_s.sqrt() * beta * clean + (1 - beta).sqrt() * (1 - bar_s) * z) / (1 - bar_t)
    torch.testing.assert_close(found, mean + (beta * (1 - bar_s) / (1 - bar_t)).sqrt() * noise)


def test_grids_are_even_in_what_they_name():
    model = small_model(small_config(schedule="sqrt", conditioning="joint"))
    time, log_snr = (noise_levels(model, SamplerSettings(steps=9, grid=grid)) for grid in ("time", "log_snr"))
    assert (time[0], time[-1]) == (log_snr[0], log_snr[-1])
    torch.testing.assert_close(log_snr.diff(), (log_snr[-1] - log_snr[0]).expand(8) / 8)
    t = (1 - time.double().sigmoid()).square() - 1e-4  # sqrt: alpha^2 = 1 - sqrt(t + 1e-4)
    torch.testing.assert_close(t[1:-1].diff(), torch.full((6,), -1 / 8, dtype=F64), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("schedule, discrete", [("log_snr", 0), ("sqrt", 0), ("cosine", 0), ("sqrt", 100),
                                                ("cosine", 100), ("linear", 100)])
@pytest.mark.parametrize("grid", GRIDS)
def test_solvers_with_the_truth_as_estimate_keep_to_the_process_at_any_number_of_steps(schedule, discrete, grid):
    """Also where two levels that are visited are one: beyond the cut of a schedule, and between discrete steps."""
    model = small_model(small_config(schedule=schedule, steps=discrete))
    generator = torch.Generator().manual_seed(0)
    start, clean = torch.randn(2, 200, 4, generator=generator)
    twice = False
    for steps in (20, 150, 640, 700):
        levels = noise_levels(model, SamplerSettings(steps=steps, grid=grid))
        twice |= bool((levels.diff() == 0).any())
        for name in SOLVERS:
            solver = _Solver(name, levels)
            z = solver.alphas[0] * clean + solver.sigmas[0] * start
            for index in range(steps - 1):
                z = solver.step(index, z, clean, torch.randn(200, 4, generator=generator))
            noise = (z - solver.alphas[-1] * clean) / solver.sigmas[-1]
            assert noise.abs().max() < 5 and 0.8 < noise.std() < 1.2, (steps, name)
    assert twice == (grid == "time" and (schedule == "cosine" or bool(discrete)))


def test_a_pair_of_equal_levels_changes_nothing():
    """The first order of the step behind it apart."""
    levels = torch.tensor([-6.0, -6.0, -3.0, 1.0, 1.0])
    z, clean, noise = torch.randn(3, 20, 4, generator=torch.Generator().manual_seed(0))
    for name, (order, _) in SOLVERS.items():
        plain, doubled = _Solver(name, levels[1:4]), _Solver(name, levels)
        expected = [plain.step(index, z, clean / (index + 1), noise) for index in range(2)]
        assert torch.equal(doubled.step(0, z, clean, noise), z)
        found = [doubled.step(index + 1, z, clean / (index + 1), noise) for index in range(2)]
        assert all(map(torch.equal, found, expected)), (name, order)
        assert torch.equal(doubled.step(3, z, clean, noise), z)


@pytest.mark.parametrize("conditioning", ["cached", "joint"])
def test_a_text_depends_on_seed_sample_and_candidate_alone(conditioning):
    """The same canvas by itself, beside canvases of other lengths and sources, and as one of several candidates."""
    model = small_model(small_config(conditioning=conditioning, self_conditioning=0.5))
    settings = SamplerSettings(steps=6, seed=4)

    def texts(segments, candidates=1):
        batch = candidates_batch(segments, candidates=candidates, share_sources=conditioning == "cached")
        return sample(model, batch, settings).tokens_CL

    alone = texts([canvas(5)])[0]
    together = texts([canvas(3, length=7), canvas(5), canvas(8, tokens=21)])
    assert together.shape == (3, CANVAS) and (together[0, 7:] == PAD).all() and (together[:, :7] != PAD).all()
    assert torch.equal(together[1], alone)
    several = texts([canvas(3), canvas(5)], candidates=3)
    assert torch.equal(several[3], alone)
    assert len({tuple(row) for row in several[3:].tolist()}) == 3
    fewer = texts([canvas(5)], candidates=2)
    assert torch.equal(fewer, several[3:5])


def test_guidance_mixes_the_predictions_with_and_without_source():
    """At scale 0 a source does not count; at 1 nothing changes; beyond, the first step is the stated mixture."""
    config = small_config(source_dropout=0.1, absorbing=0.0)
    model = small_model(config)
    batch = candidates_batch([canvas(3), canvas(8)])

    def estimate(guidance, given=batch, steps=1):
        return sample(model, given, SamplerSettings(steps=steps, guidance=guidance)).estimate_NE

    other_sources = candidates_batch([replace(canvas(3), source=source_of(30, 15)), canvas(8)])
    torch.testing.assert_close(estimate(0.0, steps=4), estimate(0.0, other_sources, steps=4))
    assert not torch.allclose(estimate(1.0, steps=4), estimate(1.0, other_sources, steps=4))
    empty = candidates_batch([replace(canvas(n), source=np.array([1, EOS])) for n in (3, 8)])
    torch.testing.assert_close(estimate(0.0), estimate(1.0, empty))

    mse = replace(small_config(conditioning="joint", loss="mse", schedule="sqrt", absorbing=0.0, source_dropout=0.1),
                  input="noisy", bayes_skip=False)
    model = small_model(mse)  # its prediction is an embedding, so the mixture can be seen as it is
    model.config = replace(mse, eos_id=0)  # no filler behind an end
    free, conditional = estimate(0.0), estimate(1.0)
    assert not torch.allclose(free, conditional)
    alive = conditional.abs().sum(-1) > 0
    mixed = free + 2.5 * (conditional - free)
    assert alive.any() and torch.allclose(estimate(2.5)[::CANVAS], mixed[::CANVAS])  # the first token of each text


def test_guidance_is_refused_where_the_model_never_saw_an_empty_source():
    with pytest.raises(ConfigError, match="source_dropout") as error:
        sample(small_model(small_config()), candidates_batch([canvas(3)]), SamplerSettings(guidance=2.0))
    assert error.value.key == "sample.guidance"


def test_temperature_is_refused_where_embeddings_are_predicted():
    config = replace(small_config(loss="mse"), bayes_skip=False)
    SamplerSettings().check(config)
    with pytest.raises(ConfigError, match="predicts embeddings") as error:
        SamplerSettings(temperature=0.5).check(config)
    assert error.value.key == "sample.temperature"


@pytest.mark.parametrize("solver", ["ddim", COMPAT])
def test_sampling_is_abandoned_between_its_steps(solver):
    calls = []

    def between():
        calls.append(solver)
        if len(calls) == 4:
            raise InterruptedError

    model, batch = small_model(bert_config()), candidates_batch([canvas(3)])
    sample(model, batch, SamplerSettings(solver=solver, steps=3), between=between)
    assert len(calls) == 3
    with pytest.raises(InterruptedError):
        sample(model, batch, SamplerSettings(solver=solver, steps=3), between=between)


def test_the_originals_solver_refuses_a_trace():
    with pytest.raises(ConfigError, match="keeps no trace"):
        sample(small_model(bert_config()), candidates_batch([canvas(3)]), SamplerSettings(solver=COMPAT), trace=[])


def test_sources_are_emptied_to_their_marks():
    without = Segment(np.empty(0, np.int64), np.full(4, PAD), 0, 1)
    batch = candidates_batch([canvas(3, 4), canvas(8, 4, tokens=2), without])
    empty = batch.without_sources()
    expected = candidates_batch([*(Segment(np.array([1, EOS]), np.full(4, PAD), 0, n) for n in (3, 8)), without])
    one = batch.without_sources(torch.tensor([False, True, False]))
    for name, value in vars(expected).items():
        assert torch.equal(torch.as_tensor(getattr(empty, name)), torch.as_tensor(value)), name
    assert len(one) == len(batch) - 2 and one.position_T.tolist() == [*range(15), *range(6), *range(4)]


def test_gaps_are_filled_around_what_is_given():
    """Given tokens are seen from both sides; no text ends before a given token."""
    config = small_config(conditioning="joint", infilling=0.5)
    model = small_model(config)
    with torch.no_grad():
        model.head.bias[EOS] = 30.0  # eager to end
    text = np.random.default_rng(0).integers(4, VOCABULARY, 10)
    given = np.array([1, 1, 1, 0, 0, 0, 1, 1, 0, 0], bool)
    filled = np.where(given, text, PAD)

    def fill(tokens):
        batch = candidates_batch([Segment(source_of(3), tokens, 0, 3, given)])
        assert batch.is_target_T.sum() == 5 and batch.is_given_T.sum() == 5
        return sample(model, batch, SamplerSettings(steps=5))

    drawn = fill(filled)
    assert drawn.tokens_CL.shape == (1, 5)
    assert (drawn.tokens_CL[0, :3] != EOS).all() and (drawn.tokens_CL[0, 3:] == EOS).all()
    for place in (2, 6):  # on either side of the first gap
        changed = filled.copy()
        changed[place] = 4 + (filled[place] - 3) % (VOCABULARY - 4)
        assert not torch.allclose(fill(changed).estimate_NE[:3], drawn.estimate_NE[:3])


def test_tokens_are_drawn_as_often_as_they_are_likely():
    probability_V = torch.tensor([0.0, 0.5, 0.0, 0.3, 0.2, 0.0])
    choice_N = (torch.arange(1000) + 0.5) / 1000
    drawn_N = _drawn(probability_V.expand(1000, -1), choice_N)
    assert torch.bincount(drawn_N, minlength=6).tolist() == [0, 500, 0, 300, 200, 0]
    ends_N = _drawn(probability_V.expand(2, -1), torch.tensor([0.0, 1 - 2**-24]))
    assert ends_N.tolist() == [1, 4]  # never one that cannot be


def test_words_are_sharpened_and_the_chance_of_an_end_is_not():
    config = small_config()
    logits_NV = torch.randn(5, VOCABULARY, generator=torch.Generator().manual_seed(0))
    is_word_V = torch.arange(VOCABULARY) != config.eos_id
    found_NV = _probability(logits_NV, SamplerSettings(temperature=0.25), config)
    torch.testing.assert_close(found_NV[:, config.eos_id], logits_NV.softmax(-1)[:, config.eos_id])
    words_NV = (4 * logits_NV[:, is_word_V]).softmax(-1)
    torch.testing.assert_close(found_NV[:, is_word_V] / found_NV[:, is_word_V].sum(-1, keepdim=True), words_NV)
    torch.testing.assert_close(found_NV.sum(-1), torch.ones(5))
    alike = SamplerSettings(temperature=0.25, end_temperature=0.25)
    torch.testing.assert_close(_probability(logits_NV, alike, config), (4 * logits_NV).softmax(-1))
    logits_NV[0, config.eos_id] = -torch.inf  # ruled out where a given token follows
    assert _probability(logits_NV, SamplerSettings(temperature=0.25), config)[0, config.eos_id] == 0


def test_the_ends_own_temperature_is_refused_where_filler_is_predicted():
    with pytest.raises(ConfigError, match="what follows a text's end") as error:
        SamplerSettings(end_temperature=0.5).check(small_config(loss_over="canvas"))
    assert error.value.key == "sample.end_temperature"
