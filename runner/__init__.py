"""Short real fine-tunes, supervised and RL, LoRA and full, on a GPU or a CPU, held against their prediction."""
