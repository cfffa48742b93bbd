"""Operators that the simulated compiler has no lowering for, as a table: each use is a counted, named fallback.

The real device's list is not published. These are the ones whose result has a shape, or whose work has a size, that
depends on values, which static graphs cannot express, and the linear algebra, sorting of rows and counting that
XLA's compilers of this family were seen to leave to the CPU (torch-xla 2.9).
"""

from __future__ import annotations

WITHOUT = (
    # shapes that depend on values
    "aten::nonzero",
    "aten::nonzero_numpy",
    "aten::masked_select",
    "aten::unique_dim",
    "aten::unique_consecutive",
    "aten::_unique",
    "aten::_unique2",
    "aten::bincount",
    "aten::histc",
    # work that depends on values
    "aten::_embedding_bag",
    "aten::_embedding_bag_forward_only",
    "aten::grid_sampler_2d",
    "aten::grid_sampler_3d",
    # linear algebra by LAPACK
    "aten::linalg_qr",
    "aten::_linalg_svd",
    "aten::_linalg_eigh",
    "aten::linalg_eig",
    "aten::linalg_inv_ex",
    "aten::linalg_lu_factor_ex",
    "aten::linalg_cholesky_ex",
)
