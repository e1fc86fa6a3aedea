"""Quantized weights to files that other engines read: GPTQ, CPM.cu's Marlin layout, GGUF."""
