"""The exact parts of UltraChat v2 and of the RL data recipe (MiniCPM4, arXiv 2506.07900) as functions for `datasets`."""
