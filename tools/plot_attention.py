"""Draws who sees whom, for any attention configuration, as a PNG.

    python tools/plot_attention.py --window 8 --dilation "1|1,4" --global_tokens prefix:2 --out pattern.png
    python tools/plot_attention.py --preset tiny --source 320 --target 64 --cell 2 --out tiny.png

One panel per layer and dilation that differ; rows are queries, columns keys, in packed order. Dark blue: the window.
Orange: through a global token. Light blue: a target's view of its source in cached conditioning. Grey lines part
source and draws.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import argparse
import struct
import zlib
from dataclasses import replace

import torch
from torch import Tensor
from torch.nn import functional as F

from model.attention.pattern import AttentionPattern, allowed, global_tokens, layer_patterns
from model.batch import TokenLayout
from model.config import AttentionConfig, ModelConfig
from model.errors import ConfigError
from tools.command import run
from trainer.config_load import load
from trainer.parser import Parser
from trainer.presets import PRESETS, RECIPES

WHITE, GREY, WINDOW, GLOBAL, SOURCE = (255, 255, 255), (150, 150, 150), (31, 78, 140), (240, 150, 40), (165, 205, 235)
EOS, WORD = 2, 5


def example_document(source: int, target: int, draws: int, policy: str) -> TokenLayout:
    """One document whose source and targets end in a separator."""
    is_target_T = torch.arange(source + draws * target) >= source
    draw_T = (torch.arange(len(is_target_T)) - source).div(max(target, 1), rounding_mode="floor").clamp_min(0)
    position_T = torch.arange(len(is_target_T)) - draw_T * target
    document_T = torch.zeros_like(position_T)
    tokens_T = torch.full_like(position_T, WORD)
    tokens_T[(position_T == source - 1) | (position_T == source + target - 1)] = EOS
    is_global_T = global_tokens(policy, tokens_T=tokens_T, document_T=document_T, position_T=position_T,
                                is_target_T=is_target_T, draw_T=draw_T, eos_id=EOS)
    return TokenLayout(document_T, position_T, is_target_T, draw_T, is_global_T)


def panel(layout: TokenLayout, pattern: AttentionPattern, cell: int) -> Tensor:
    """uint8 [T * cell, T * cell, 3] of a pattern whose heads are all alike."""
    none_T = torch.zeros_like(layout.is_global_T)
    pattern = replace(pattern, dilations=pattern.dilations[:1])
    seen_TT = allowed(layout, pattern)[0]
    to_source_TT = layout.is_target_T[:, None] & ~layout.is_target_T[None, :] & pattern.cached
    windows_TT = allowed(replace(layout, is_global_T=none_T), replace(pattern, cached=False))[0] & ~to_source_TT
    image_TT3 = torch.tensor(WHITE, dtype=torch.uint8).repeat(*seen_TT.shape, 1)
    for where_TT, colour in ((seen_TT, GLOBAL), (seen_TT & to_source_TT, SOURCE), (seen_TT & windows_TT, WINDOW)):
        image_TT3[where_TT] = torch.tensor(colour, dtype=torch.uint8)
    image = image_TT3.repeat_interleave(cell, 0).repeat_interleave(cell, 1)
    borders = ((layout.is_target_T.diff() != 0) | (layout.draw_T.diff() != 0)).nonzero().flatten() + 1
    for line in (borders * cell).tolist():
        image[line, :] = image[:, line] = torch.tensor(GREY, dtype=torch.uint8)
    return image


def side_by_side(panels: list[Tensor], gap: int) -> Tensor:
    framed = [F.pad(image, (0, 0, gap, 0, gap, gap), value=WHITE[0]) for image in panels]
    return F.pad(torch.cat(framed, dim=1), (0, 0, 0, gap), value=WHITE[0])


def write_png(image: Tensor, path: Path) -> None:
    """uint8 [height, width, 3], 8 bits RGB (RFC 2083)."""
    height, width, _ = image.shape

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    rows = F.pad(image.flatten(1), (1, 0))  # filter byte 0 before each row
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
                     + chunk(b"IDAT", zlib.compress(rows.contiguous().numpy().tobytes(), 9)) + chunk(b"IEND", b""))


def window(text: str) -> int | list[int]:
    sides = [int(side) for side in text.split(",")]
    return sides if len(sides) > 1 else sides[0]


def chosen_config(arguments: argparse.Namespace) -> ModelConfig:
    """The configuration to start from, with what the command line gives in its place."""
    def given(*names: str) -> dict:
        return {name: getattr(arguments, name) for name in names if getattr(arguments, name) is not None}

    base = ModelConfig(layers=2, attention=AttentionConfig(window=8))
    if arguments.preset or arguments.recipe or arguments.config:
        base = load(arguments.preset, arguments.recipe, arguments.config).model
    return replace(base, **given("layers"), diffusion=replace(base.diffusion, **given("conditioning")),
                   attention=replace(base.attention, **given("heads", "window", "dilation", "global_tokens")))


def main() -> None:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    start = parser.add_argument_group("a run's configuration to start from (default: a small window)")
    start.add_argument("--preset", default="", choices=PRESETS)
    start.add_argument("--recipe", default="", choices=RECIPES)
    start.add_argument("--config", type=Path, help="run configuration, .toml or .json")
    parser.add_argument("--window", type=window, help="W, or left,right")
    parser.add_argument("--dilation", help="as model.attention.dilation")
    parser.add_argument("--global_tokens", help="as model.attention.global_tokens")
    parser.add_argument("--heads", type=int)
    parser.add_argument("--layers", type=int)
    parser.add_argument("--conditioning", choices=("cached", "joint"))
    parser.add_argument("--source", type=int, default=32, help="tokens")
    parser.add_argument("--target", type=int, default=16, help="tokens")
    parser.add_argument("--draws", type=int, default=1, help="noised copies of the target (cached only)")
    parser.add_argument("--cell", type=int, default=8, help="pixels a token")
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()

    config = chosen_config(arguments)
    for name in ("heads", "layers", "cell", "draws"):
        if getattr(arguments, name) is not None and getattr(arguments, name) < 1:
            raise ConfigError(f"--{name}", "must be at least 1")
    if min(arguments.source, arguments.target) < 0 or arguments.source + arguments.target == 0:
        raise ConfigError("--source, --target", "are token counts of which one must be positive")
    if config.diffusion.conditioning == "joint" and arguments.draws > 1:
        raise ConfigError("--draws", "joint conditioning has one draw of each target")
    layout = example_document(arguments.source, arguments.target, arguments.draws, config.attention.global_tokens)
    panels: dict[AttentionPattern, str] = {}
    for layer, pattern in enumerate(layer_patterns(config)):
        for head, dilation in enumerate(pattern.dilations):
            panels.setdefault(replace(pattern, dilations=(dilation,)), f"layer {layer}, head {head}, step {dilation}")
    image = side_by_side([panel(layout, pattern, arguments.cell) for pattern in panels], gap=2 * arguments.cell)
    write_png(image, arguments.out)
    print(f"{arguments.out}: from the left, the patterns first met in {'; '.join(panels.values())}")


if __name__ == "__main__":
    run(main)
