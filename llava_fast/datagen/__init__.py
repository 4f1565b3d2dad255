"""Instruction data from captions and boxes with a teacher that never sees a picture (section 3 of the paper)."""
