"""Low-rank adapters (LoRA, Hu et al., 2021; DoRA, Liu et al., 2024) as PEFT writes them, beside a model that stays.

`_peft` reads a folder, `_sites` knows the layers that take adapters and holds the memory that they read, `_fit` brings
the one into the shape of the other, `desk` lends adapters to requests, `_merge` writes checkpoints that need none.
"""
