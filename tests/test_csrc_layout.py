"""csrc/layout.h says of both caches what layout.py says."""

import re
from pathlib import Path

from vllm_dsv32 import layout

HEADER = Path(__file__).parents[1] / "csrc/layout.h"


def test_the_header_has_the_constants():
    constants = dict(re.findall(r"constexpr int (\w+) = (\d+);", HEADER.read_text()))
    assert {name: int(value) for name, value in constants.items()} == {
        "kKvLoraRank": layout.KV_LORA_RANK,
        "kRopeDim": layout.ROPE_DIM,
        "kLatentGroupSize": layout.LATENT_GROUP_SIZE,
        "kLatentFp8Nbytes": layout.LATENT_FP8_NBYTES,
        "kIndexHeadDim": layout.INDEX_HEAD_DIM,
        "kIndexKeyNbytes": layout.INDEX_KEY_NBYTES,
    }
