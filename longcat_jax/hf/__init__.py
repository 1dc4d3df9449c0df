"""HuggingFace checkpoints to ours and back, streamed piece by piece (docs/converting.md).

layout.py is the one table of names; config.py reads and writes config.json of either dialect;
selection.py cuts a small model out; safetensors.py and store.py are the two sides' files; check.py
compares before a byte is written; staging.py and transfer.py make a conversion restartable and
parallel; from_hf.py and to_hf.py put them together.
"""
