"""BitCPM4: ternary weights, trained by the plain Trainer and packed into 2 bits (MiniCPM4, arXiv 2506.07900, 4.2)."""
