"""Data: conversation files, converters, packing and loading."""
