"""Training from the command line: `imageprompt train` and `imageprompt quickstart`."""
