"""How NxD cuts and fuses a Llama's parameters, as data: name in the module to a way to cut.

The ways are those of :class:`neuron_lightning.checkpoint.formats.nxd_layout.NxdLayout`: ``rows`` and ``columns`` are
cut, ``q`` and ``kv`` follow the heads, a number says how many parts are fused below one another.
"""

from __future__ import annotations

NXD_LLAMA: dict[str, str] = {
    r"(.*\.)?embed_tokens\.weight": "vocab",
    r"(.*\.)?lm_head\.(weight|bias)": "vocab",
    r"(.*\.)?qkv_proj\.(weight|bias)_qkv": "qkv",
    r"(.*\.)?qkv_proj\.(weight|bias)_q": "rows q",
    r"(.*\.)?qkv_proj\.(weight|bias)_[kv]": "rows kv",
    r"(.*\.)?qkv_proj\.(weight|bias)": "rows 3",
    r"(.*\.)?[qkv]_proj\.(weight|bias)": "rows",
    r"(.*\.)?o_proj\.weight": "columns q",
    r"(.*\.)?gate_up_proj\.(weight|bias)": "rows 2",
    r"(.*\.)?(gate|up)_proj\.(weight|bias)": "rows",
    r"(.*\.)?down_proj\.weight": "columns",
    r"(.*\.)?(o|down)_proj\.bias": "whole",
    r"(.*\.)?\w*norm\.weight": "whole",
    r"(.*\.)?inv_freq": "whole",
}
