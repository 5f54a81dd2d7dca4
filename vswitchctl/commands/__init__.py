"""The command line's groups, one module each; imported when used."""
