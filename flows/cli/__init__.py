"""Flows - the command line `selfplay`: its commands, and what they ask of a machine, a server and a store."""
