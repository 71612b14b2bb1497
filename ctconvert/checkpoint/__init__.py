"""Reading and writing checkpoints: safetensors files, their index, the manifest."""
