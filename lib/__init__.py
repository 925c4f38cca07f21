"""The stages' common code, one subject per file, without a circle; it imports no stage but model.py."""
