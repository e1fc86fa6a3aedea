"""The `minicpm4` command: one small module for each subcommand, heavy imports inside it."""
