#!/usr/bin/env bash
# transformers 5.24.0 with a GGUF file: float32 weights are refused as "quantized", by the Trainer and by `save_pretrained`.
#
# Behaviour: `from_pretrained(folder, gguf_file=...)` gives a model of ordinary float32 parameters (a quantised file is dequantised
#   as it is read), and marks it as quantised for good. `Trainer(model=...)` then says "You cannot perform fine-tuning on purely
#   quantized models. Please attach trainable adapters", and `save_pretrained` that it is not serializable. Here the file holds
#   float32 tensors only, so that nothing in it was ever quantised. The same weights in a model made by `from_config` are trained
#   and saved.
# Output seen: every parameter float32 and equal to the file, both refusals; one step of the Trainer and a saved file for the copy.
# Why it matters: the messages name a cause which is not there and a remedy (adapters) which is not needed; who believes them trains
#   fewer weights than could be trained.
# Exit code: 0 the behaviour is as described, 1 it is not, 2 the packages could not be installed.
set -euo pipefail
folder="$(mktemp -d)"
trap 'rm -rf "$folder"' EXIT
cd "$folder"
"${PYTHON:-python3}" -m venv venv && venv/bin/pip install --quiet --no-compile --disable-pip-version-check \
    torch==2.13.0 transformers==5.24.0 accelerate==1.15.0 datasets==5.2.0 gguf==0.19.0 numpy==2.4.6 || exit 2
cat > demo.py <<'PY'
import sys

import gguf
import numpy as np
import torch
import transformers
from datasets import Dataset
from transformers import AutoModelForCausalLM, LlamaConfig, Trainer, TrainingArguments

SIZES = ["vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "tie_word_embeddings"]
vocabulary, width, inner, heads = 32, 16, 32, 2
writer = gguf.GGUFWriter("tiny.gguf", "llama")
writer.add_block_count(1)
writer.add_context_length(32)
writer.add_embedding_length(width)
writer.add_feed_forward_length(inner)
writer.add_head_count(heads)
writer.add_head_count_kv(heads)
writer.add_rope_dimension_count(width // heads)
writer.add_layer_norm_rms_eps(1e-6)
writer.add_vocab_size(vocabulary)
random = np.random.default_rng(0)
shapes = {"token_embd": (vocabulary, width), "output": (vocabulary, width), "output_norm": (width,)}
shapes |= {f"blk.0.{name}": (width, width) for name in ("attn_q", "attn_k", "attn_v", "attn_output")}
shapes |= {"blk.0.ffn_gate": (inner, width), "blk.0.ffn_up": (inner, width), "blk.0.ffn_down": (width, inner)}
shapes |= {"blk.0.attn_norm": (width,), "blk.0.ffn_norm": (width,)}
tensors = {name: random.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}
for name, values in tensors.items():
    writer.add_tensor(f"{name}.weight", values)
writer.write_header_to_file()
writer.write_kv_data_to_file()
writer.write_tensors_to_file()
writer.close()

model = AutoModelForCausalLM.from_pretrained(".", gguf_file="tiny.gguf")
dtypes = {parameter.dtype for parameter in model.parameters()}
equal = np.array_equal(model.lm_head.weight.detach().numpy(), tensors["output"])
rows = Dataset.from_dict({"input_ids": [[1, 2, 3]] * 4, "labels": [[1, 2, 3]] * 4})


def attempt(candidate):
    """What the Trainer says, or the loss of its one step."""
    arguments = TrainingArguments("out", use_cpu=True, report_to="none", max_steps=1, save_strategy="no", disable_tqdm=True)
    try:
        return Trainer(model=candidate, args=arguments, train_dataset=rows).train().training_loss
    except ValueError as error:
        return str(error)


first = attempt(model)
try:
    model.save_pretrained("plain")
    saved = "saved"
except ValueError as error:
    saved = str(error)
copy = AutoModelForCausalLM.from_config(LlamaConfig(**{name: getattr(model.config, name) for name in SIZES}))
copy.load_state_dict(model.state_dict())
second = attempt(copy)
copy.save_pretrained("copy")
print("transformers", transformers.__version__, "| dtypes", dtypes, "| head equal to the file:", equal)
print("  from GGUF, Trainer:        ", str(first)[:70])
print("  from GGUF, save_pretrained:", saved[:70])
print("  the same weights in a model from a config: training loss", second)
refused = isinstance(first, str) and "purely quantized" in first and "not serializable" in saved
holds = dtypes == {torch.float32} and equal and refused and isinstance(second, float)
print("As described: float32 weights from GGUF are refused as quantised." if holds else "Changed: not as described.")
sys.exit(not holds)
PY
code=0
HF_HUB_OFFLINE=1 venv/bin/python -I demo.py || code=$?
exit "$code"
