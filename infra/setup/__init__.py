"""Set-up: `.venv` from the lock, llama.cpp built for any processor of this kind, every native library proven.

Runs before anything is installed, so it imports nothing but Python's own library.
"""
