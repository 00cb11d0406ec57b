"""Weights that people already have, as imageprompt models. Each module names the layout that it reads."""
