"""Prepare and read data.

text_to_bin.py holds the .bin reader, the writer and the tokenizer that everything uses.
"""
