"""What nobody should write into a file, and who reads it: for ``fuzz.py`` and the tests.

All chance comes from a ``random.Random`` that the caller gives: a seeded one, hypothesis's, or a fuzzer's bytes.
"""
