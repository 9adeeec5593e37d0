"""MXFP4 numbers are widened as transformers widens gpt-oss's."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from pipeline.errors import UserError
from workers.decoder.mxfp4 import widen
from workers.decoder.safetensors_files import SafetensorsFiles
from workers.decoder.storage import Source


def random_blocks(*shape: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Blocks [..., G, 16] and scales [..., G] as published: any bytes, and powers of two of a sensible size."""
    generator = torch.Generator().manual_seed(seed)
    blocks = torch.randint(0, 256, (*shape, 16), generator=generator, dtype=torch.uint8)
    return blocks, torch.randint(118, 126, shape, generator=generator, dtype=torch.uint8)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_numbers_are_what_transformers_makes_of_them(dtype: torch.dtype) -> None:
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    blocks, scales = random_blocks(3, 10, 4)
    scales[0, 0] = torch.tensor([0, 1, 200, 250], dtype=torch.uint8)
    # transformers gives [experts, in, out]
    assert torch.equal(widen(blocks, scales, dtype), convert_moe_packed_tensors(blocks, scales, dtype=dtype).mT)


def test_one_byte_holds_two_numbers_the_first_in_its_lower_half() -> None:
    blocks = torch.zeros(1, 16, dtype=torch.uint8)
    blocks[0, :3] = torch.tensor([0x21, 0xF7, 0x90])
    got = widen(blocks, torch.tensor([128], dtype=torch.uint8), torch.float32)
    assert got[:6].tolist() == [1.0, 2.0, 12.0, -12.0, 0.0, -1.0]
    assert not got[6:].any()


def test_a_slice_is_widened_without_the_rest(tmp_path: Path) -> None:
    blocks, scales = random_blocks(3, 10, 2)
    save_file({"b": blocks, "s": scales}, tmp_path / "model.safetensors")
    files, wide = SafetensorsFiles(tmp_path), widen(blocks, scales, torch.float32)
    assert torch.equal(files.read(Source("b", scales="s", at=2), torch.float32), wide[2])
    got = files.read(Source("b", scales="s", at=1, rows=(1, 10), step=2), torch.float32)
    assert torch.equal(got, wide[1, 1::2])


def test_blocks_without_their_own_scales_are_refused(tmp_path: Path) -> None:
    blocks, scales = random_blocks(3, 10, 2)
    save_file({"b": blocks, "s": scales[:, :9].contiguous()}, tmp_path / "model.safetensors")
    with pytest.raises(UserError, match="don't make MXFP4 numbers"):
        SafetensorsFiles(tmp_path).read(Source("b", scales="s", at=2), torch.float32)
