"""The original's network, losses, gradients and checkpoints."""

import json
import warnings

import pytest
import torch

from model.diffuseq_import import import_weights, original_config, weight_map
from model.diffusion_lm import DiffusionLM, NoiseDraw
from model.errors import ConfigError
from tests.model.parity.golden import CASES, FOLDER, V2, load, network, packed, reference_attention

CLOSE = {"rtol": 1e-5, "atol": 2e-5}


def forward(model: DiffusionLM, x_BLE: torch.Tensor, time_B: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The network's prediction and its logits, [B, L, ...], in the original's coordinates."""
    batch = packed(torch.zeros(x_BLE.shape[:2], dtype=torch.int64), torch.ones(x_BLE.shape[:2]))
    plan = model.prepare(batch, device="cpu", dtype=torch.float32)
    level_B = model.schedule.log_snr_at(time_B.double() * model.config.diffusion.steps / 1000)
    output = model._output(model.denoiser(x_BLE.flatten(0, 1), level_B, plan.stream)[0], None)
    logits = model.logits(output, model.rows())
    return model.unshifted(output).view_as(x_BLE), logits.view(*x_BLE.shape[:2], -1)


@pytest.mark.parametrize("name", ["network", "network_unprojected"])
def test_forward_after_importing_weights(name):
    """With and without projections between embeddings and encoder, at fractional times."""
    golden, model = load(f"{name}_io"), network(f"{name}_state")
    hidden = []
    model.denoiser.blocks[0].register_forward_hook(lambda module, given, result: hidden.append(result))
    output, logits = forward(model, golden["x_t"], golden["t_model"])
    torch.testing.assert_close(output, golden["output"], **CLOSE)
    torch.testing.assert_close(logits, golden["logits"], **CLOSE)
    if "encoder_layer_0" in golden:
        torch.testing.assert_close(hidden[0].view_as(golden["encoder_layer_0"]), golden["encoder_layer_0"], **CLOSE)


def loss_inputs(golden: dict, model: DiffusionLM, rows: slice):
    """The recorded draws of some rows, as a batch with all randomness given."""
    batch = packed(golden["input_ids"][rows], golden["input_mask"][rows])
    target_T = batch.is_target_T
    absorbed = golden["absorb_draw"][rows].flatten() if "absorb_draw" in golden else torch.zeros(len(batch))
    draw = NoiseDraw(
        time_C=(golden["t"][rows] + 0.5) / model.config.diffusion.steps, weight_C=golden["weights"][rows],
        noise_NE=golden["noise"][rows].flatten(0, 1)[target_T], uniform_N=1.0 - absorbed[target_T].float(),
        embedding_noise_TE=golden["x0_noise"][rows].flatten(0, 1))
    return batch, model.prepare(batch, device="cpu", dtype=torch.float32), draw


VERSIONS = pytest.mark.parametrize("case, weights, arguments", [
    ("training_losses_v1", "network_state", {}), ("training_losses_v2", "network_v2_state", V2)], ids=["v1", "v2"])


@VERSIONS
def test_every_loss_term_of_every_row(case, weights, arguments):
    golden, model = load(case), network(weights, **arguments)
    assert (golden["t"] == 0).any()
    for row in range(len(golden["t"])):
        report = model(*loss_inputs(golden, model, slice(row, row + 1)), 1.0, 1.0, 1.0)
        for name, term in (("mse", "mse"), ("rounding", "decoder_nll"), ("cross_entropy", "nll")):
            torch.testing.assert_close(report.terms[name], golden[term][row], rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(report.terms["terminal"], golden["tT_loss"][row], rtol=1e-4, atol=0)
        if arguments:
            torch.testing.assert_close(0.01 * report.terms["absorbing_norm"], golden["mean_embed_reg"])
        torch.testing.assert_close(report.loss_C[0], golden["loss"][row], rtol=1e-5, atol=1e-5)


@VERSIONS
def test_weighted_loss_and_gradients(case, weights, arguments):
    golden, model = load(case), network(weights, **arguments)
    seen = []
    model.denoiser.register_forward_pre_hook(lambda module, given: seen.append(given[0].detach()))
    report = model(*loss_inputs(golden, model, slice(None)), 1.0, 1.0, 1.0)
    torch.testing.assert_close(seen[0].view_as(golden["x_t"]), golden["x_t"], rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(report.loss_C, golden["loss"], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(report.total.detach(), golden["total"], rtol=1e-5, atol=1e-5)
    report.total.backward()
    parameters = dict(model.named_parameters())
    ours = {"word_embedding.weight" if key == "embedding" else parts[0]: parameters[key].grad
            for key, parts in weight_map(model.config).items()}
    width = model.config.width
    for name, gradient in golden.items():
        if name.startswith("grad."):
            key = name.removeprefix("grad.")
            if "self.value" in key:
                found = ours[key.replace("value", "query")][2 * width:]
            elif "self.query" in key:
                found = ours[key][:width]
            else:
                found = ours[key]
            torch.testing.assert_close(found, gradient, rtol=1e-4, atol=5e-7)
    norm = torch.stack([p.grad.double().norm() for p in model.parameters()]).norm()
    torch.testing.assert_close(norm, golden["grad_norm"], rtol=1e-4, atol=5e-7)


def checkpoint(version: str):
    folder = FOLDER / f"checkpoint_{version}"
    arguments, bert = (json.loads((folder / name).read_text()) for name in ("training_args.json", "bert_config.json"))
    state = torch.load(next(folder.glob("ema_*.pt")), weights_only=True)
    return reference_attention(original_config(arguments, bert)), state, load(f"checkpoint_{version}_io")


@pytest.mark.parametrize("version", ["v1", "v2"])
@pytest.mark.parametrize("table, name", [("live", "original"), ("averaged", "ema_table")])
def test_checkpoints_give_the_originals_results(version, table, name):
    config, state, golden = checkpoint(version)
    with pytest.warns(UserWarning, match=f"differ by up to .*; the {table} one is taken"):
        weights = import_weights(config, state, table)
    model = DiffusionLM(config)
    model.load_state_dict(weights)
    output, logits = forward(model, golden["x_t"], golden["t_model"])
    torch.testing.assert_close(output, golden["output"], **CLOSE)
    torch.testing.assert_close(logits, golden[f"logits_{name}"], **CLOSE)
    table_VE = model.unshifted(model.rows())
    torch.testing.assert_close(table_VE[golden["input_ids"]], golden[f"embeds_{name}"], **CLOSE)


@pytest.mark.parametrize("version", ["v1", "v2"])
def test_every_key_is_used_once_and_made_once(version):
    config, state, _ = checkpoint(version)
    wanted = weight_map(config)
    used = [key for parts in wanted.values() for key in parts]
    assert len(used) == len(set(used)) and state.keys() - set(used) == {"position_ids", "word_embedding.weight"}
    assert wanted.keys() | {"prior_count_V"} == DiffusionLM(config).state_dict().keys()


def test_checkpoints_that_do_not_fit_are_refused():
    config, state, _ = checkpoint("v2")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for changed, text in (({**state, "extra.weight": state["LayerNorm.bias"]}, "extra.weight"),
                              ({key: value for key, value in state.items() if key != "mean_embed"}, "mean_embed")):
            with pytest.raises(ConfigError, match=text):
                import_weights(config, changed)
    arguments = json.loads((FOLDER / "checkpoint_v2" / "training_args.json").read_text())
    bert = json.loads((FOLDER / "checkpoint_v2" / "bert_config.json").read_text())
    for key, value in (("noise_schedule", "pw_lin"), ("predict_xstart", False), ("denoise", False)):
        with pytest.raises(ConfigError) as error:
            original_config({**arguments, key: value}, bert)
        assert error.value.key == key
    assert CASES["checkpoint_v2_io"]["params"]["T"] == config.diffusion.steps
