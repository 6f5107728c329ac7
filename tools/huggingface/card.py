"""The README.md of a Hugging Face folder: what the model is, what was measured of it, how to use it."""

from __future__ import annotations

from tools.conversion.files import Tensors
from tools.huggingface.figures import EVALUATED
from trainer.config import RunConfig

_HEAD = """\
---
library_name: transformers
tags: [diffusion-language-model, long-document, mixture-of-experts, custom_code]
---
# {name}

A diffusion language model for long documents: conditioned on a source, it turns noise into a target of up to
{canvas} tokens in {steps} steps. Sources are read up to {source} tokens; what is longer is cut.

| | |
| --- | --- |
{facts}
"""
_USE = """
## Use

Needs torch and transformers 5. `trust_remote_code=True` runs the Python files of this folder: read them, or load only
what comes from people you trust.

```python
from transformers import AutoModel, AutoTokenizer

model = AutoModel.from_pretrained("{name}", trust_remote_code=True)
tokenizer = AutoTokenizer.from_pretrained("{name}", trust_remote_code=True)
print(model.write(["The text of a document."], tokenizer, seed=0)[0])
```

`write` takes `solver`, `steps`, `grid`, `temperature`, `end_temperature`, `guidance`, `clamp` and `seed`, by default as
the run had them; `draw` takes and gives token ids; calling the model is one denoising. What a model writes can be
wrong, and is as biased as the texts that it was trained on.

The code in this folder is under the Apache License 2.0 (`LICENSE-code`).
"""


def model_card(name: str, run: RunConfig, tensors: Tensors, dtype: str, facts: dict, figures: dict) -> str:
    """facts: step and weights. figures: as `figures_of` gives them."""
    model, data = run.model, run.data
    total = sum(shape.numel() for kind, shape, _ in tensors.values() if kind.is_floating_point)
    experts = sum(shape.numel() for name, (_, shape, _) in tensors.items() if ".moe.experts." in name)
    active = total - experts + experts * model.moe.top_k // model.moe.experts
    step = "unknown" if facts["step"] is None else f"{facts['step']:,} of {run.train.steps:,}"
    rows = {"recipe": f"{run.recipe} (preset {run.preset})" if run.preset else run.recipe,
            "parameters": f"{total:,}, of which a token passes {active:,}",
            "network": f"{model.layers} layers of width {model.width}, window {model.attention.window}, "
                       f"{model.moe.experts} experts (top-{model.moe.top_k})",
            "vocabulary": f"{model.vocab_size:,} pieces, embeddings of width {model.embed_dim}",
            "conditioning": model.diffusion.conditioning, "step": step,
            "weights": f"{facts['weights']}, {dtype}"}
    parts = [_HEAD.format(name=name, canvas=data.max_target_tokens, steps=run.sample.steps,
                          source=data.longest_source(),
                          facts="\n".join(f"| {key} | {value} |" for key, value in rows.items()))]
    if evaluation := figures.get("evaluation"):
        names = [name for name in EVALUATED if name in evaluation]
        parts.append(f"\n## Validation\n\nCross-entropy in nats per token after step {evaluation['step']:,}, the mean "
                     "over the noise levels, beside\nthe best that can be known of a token without context and the "
                     "same model with sources exchanged:\n\n"
                     f"| {' | '.join(EVALUATED[name] for name in names)} |\n|{' ---: |' * len(names)}\n"
                     f"| {' | '.join(f'{evaluation[name]:.3f}' for name in names)} |\n")
    for split, table in figures.get("scores", {}).items():
        parts.append(f"\n## Texts generated for `{split}`\n\n{table}")
    return "".join(parts) + _USE.format(name=name)
