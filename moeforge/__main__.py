"""Lets `python -m moeforge` be the command."""

from moeforge.cli import main

main()
