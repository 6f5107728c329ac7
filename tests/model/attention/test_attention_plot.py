"""The picture of a pattern shows exactly the pairs that are seen."""

import struct
import subprocess
import sys
import zlib
from dataclasses import replace
from pathlib import Path

import torch

from model.attention.pattern import AttentionPattern, allowed
from tools.plot_attention import WHITE, example_document, panel, write_png

ROOT = Path(__file__).parents[3]


def read_png(path):
    """[height, width, 3] of the 8-bit RGB images without filters that `write_png` writes."""
    data = path.read_bytes()
    assert data[:8] == b"\x89PNG\r\n\x1a\n"
    at, pixels, size = 8, b"", None
    while at < len(data):
        (length,), kind = struct.unpack(">I", data[at:at + 4]), data[at + 4:at + 8]
        body = data[at + 8:at + 8 + length]
        assert struct.unpack(">I", data[at + 8 + length:at + 12 + length])[0] == zlib.crc32(kind + body)
        if kind == b"IHDR":
            width, height, *rest = struct.unpack(">IIBBBBB", body)
            assert rest == [8, 2, 0, 0, 0]
            size = height, width
        pixels += body if kind == b"IDAT" else b""
        at += 12 + length
    rows = torch.frombuffer(bytearray(zlib.decompress(pixels)), dtype=torch.uint8).view(size[0], -1)
    assert not rows[:, 0].any()
    return rows[:, 1:].reshape(*size, 3)


def test_panel_is_the_predicate(tmp_path):
    layout = example_document(11, 6, 2, "prefix:1+separators")
    pattern = AttentionPattern((2, 1), (1, 2), True)
    for head, dilation in enumerate(pattern.dilations):
        image = panel(layout, replace(pattern, dilations=(dilation,)), cell=3)
        write_png(image, tmp_path / "pattern.png")
        cells = read_png(tmp_path / "pattern.png")[1::3, 1::3]
        assert torch.equal((cells != torch.tensor(WHITE)).any(-1), allowed(layout, pattern)[head])


def test_command_line(tmp_path):
    def plot(*flags):
        return subprocess.run([sys.executable, str(ROOT / "tools/plot_attention.py"), "--out", str(tmp_path / "p.png"),
                               *flags], capture_output=True, text=True, timeout=120)
    assert plot("--dilation", "1|1,2", "--source", "6", "--target", "4", "--cell", "2").returncode == 0
    assert read_png(tmp_path / "p.png").shape == (28, 52, 3)
    refused = plot("--window", "7")
    assert refused.returncode != 0 and "model.attention.window" in refused.stderr and "Traceback" not in refused.stderr
