"""P-GPTQ: GPTQ whose Hessian leaves out the first positions of each sequence (MiniCPM4, arXiv 2506.07900, 4.1.2)."""
