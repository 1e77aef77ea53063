"""Steps: how each part of a model's life is done. A kind `a.b` is the file `steps/a/b.py`."""
