"""Run GPTQModel's GPTQ at 4 bits, symmetric, groups of 32, on given sequences, in its own environment.

    PYTHON quantize_with_gptqmodel.py BASE SEQUENCES.safetensors OUT THREADS
"""

import os
import sys

base, sequences, out, threads = sys.argv[1:]
os.environ["GPTQMODEL_CPU_WORKERS"] = threads

import torch  # noqa: E402
from gptqmodel import GPTQModel, QuantizeConfig  # noqa: E402
from safetensors.torch import load_file  # noqa: E402

torch.set_num_threads(int(threads))
rows = load_file(sequences)["sequences"].tolist()
model = GPTQModel.load(base, QuantizeConfig(bits=4, group_size=32, sym=True, desc_act=False), device="cpu")
model.quantize([{"input_ids": row, "attention_mask": [1] * len(row)} for row in rows], batch_size=8)
model.save(out)
