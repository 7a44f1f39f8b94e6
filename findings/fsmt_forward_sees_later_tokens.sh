#!/usr/bin/env bash
# transformers 5.24.0, FSMT: the decoder of a plain forward is not causal.
#
# Behaviour: `model(input_ids=..., decoder_input_ids=...)` without `labels` takes `use_cache=True` from the config, and
#   with it FSMT builds no causal mask (nor a padding mask). Every position then attends to the tokens after it. With
#   `use_cache=False`, or with `labels`, the mask is there. BART, given the same call, is causal either way.
# Output seen: another last decoder token changes the FSMT logits of the positions before it by up to 3.8; with
#   `use_cache=False`, with `labels`, and in BART by exactly 0.
# Why it matters: teacher-forced log-probabilities, perplexity and reranking scores of FSMT (the WMT19 translation models)
#   depend on the words still to come. The values look normal, and no warning is shown.
# Exit code: 0 the behaviour is as described, 1 it is not, 2 the packages could not be installed.
set -euo pipefail
folder="$(mktemp -d)"
trap 'rm -rf "$folder"' EXIT
cd "$folder"
"${PYTHON:-python3}" -m venv venv && venv/bin/pip install --quiet --no-compile --disable-pip-version-check \
    torch==2.13.0 transformers==5.24.0 numpy==2.4.6 || exit 2
cat > demo.py <<'PY'
import sys

import torch
import transformers
from transformers import BartConfig, BartForConditionalGeneration, FSMTConfig, FSMTForConditionalGeneration

size = {"d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 2, "init_std": 0.5}
size |= {"decoder_attention_heads": 2, "encoder_ffn_dim": 32, "decoder_ffn_dim": 32, "dropout": 0.0}
torch.manual_seed(0)
fsmt = FSMTConfig(langs=["en", "de"], src_vocab_size=20, tgt_vocab_size=20, **size)
fsmt = FSMTForConditionalGeneration(fsmt).eval()
bart = BartForConditionalGeneration(BartConfig(vocab_size=20, **size)).eval()

source = torch.tensor([[4, 5, 6, 7, 2]])
one, other = torch.tensor([[2, 8, 9, 10, 11]]), torch.tensor([[2, 8, 9, 10, 12]])  # they differ in the last token only


def earlier_change(forward):
    """The largest change of a logit before the last position when only the last decoder token changes."""
    with torch.no_grad():
        return (forward(one) - forward(other))[:, :-1].abs().max().item()


leak = {"FSMT, forward as it is": earlier_change(lambda t: fsmt(input_ids=source, decoder_input_ids=t).logits)}
causal = {
    "FSMT, use_cache=False": earlier_change(lambda t: fsmt(source, decoder_input_ids=t, use_cache=False).logits),
    "FSMT, labels given": earlier_change(lambda t: fsmt(source, decoder_input_ids=t, labels=one).logits),
    "BART, forward as it is": earlier_change(lambda t: bart(input_ids=source, decoder_input_ids=t).logits),
}
print("transformers", transformers.__version__, "| change of earlier logits when only the last decoder token changes:")
for name, change in (leak | causal).items():
    print(f"  {name:24s} {change:.4f}")
holds = min(leak.values()) > 0.01 and max(causal.values()) < 1e-5
print("As described: FSMT's forward without labels sees later tokens." if holds else "Changed: not as described.")
sys.exit(not holds)
PY
code=0
HF_HUB_OFFLINE=1 venv/bin/python -I demo.py || code=$?
exit "$code"
