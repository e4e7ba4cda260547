"""GGUF checkpoints, read once and written anew as safetensors, which everything else loads.

file.py reads the container, model.py says what its metadata mean to transformers, convert.py writes the directory,
once.py sees to it that this happens once.
"""
