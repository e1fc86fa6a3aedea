"""Corpora to datasets: UltraClean and the exact parts of UltraChat v2, as functions for `datasets`."""
