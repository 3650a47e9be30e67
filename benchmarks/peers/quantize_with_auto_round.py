"""Run auto-round at 4 bits, symmetric, groups of 32, on given sequences, in its own environment.

    PYTHON quantize_with_auto_round.py BASE SEQUENCES.safetensors OUT THREADS ITERATIONS
"""

import sys

import torch
from auto_round import AutoRound
from safetensors.torch import load_file
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, AutoTokenizer

base, sequences, out, threads, iterations = sys.argv[1:]
torch.set_num_threads(int(threads))
rows = load_file(sequences)["sequences"]
model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
rounder = AutoRound(model, AutoTokenizer.from_pretrained(base), bits=4, group_size=32, sym=True, iters=int(iterations),
                    nsamples=len(rows), seqlen=rows.shape[1], batch_size=8, dataset=DataLoader(list(rows), batch_size=8),
                    device_map="cpu", enable_torch_compile=False)
rounder.quantize_and_save(out, format="auto_gptq")
