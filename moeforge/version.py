"""The version of moeforge, and nothing else, so that reading it imports nothing."""

__version__ = "0.1.0"
