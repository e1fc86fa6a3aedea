"""UltraClean (MiniCPM4, arXiv 2506.07900, section 3.1; Ultra-FineWeb, arXiv 2505.05427) as functions for `datasets`."""
