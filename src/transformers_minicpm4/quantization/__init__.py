"""A model to a smaller checkpoint: P-GPTQ (INT4 that other engines read) and BitCPM4 (ternary, trained and packed)."""
