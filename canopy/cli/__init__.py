"""The command line: one file per command group. Parse, call, print; no arithmetic here."""
